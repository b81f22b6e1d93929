//! What reclaim aims at.

use memcg_core::reclaim::{BATCH, STOCK_CAP, balloon_target, effective_high, finds_room, stock_max};
use memcg_core::tree::{LimitPatch, Mode, Tree};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

fn mib(n: u64) -> Pages {
    Pages::from_mib(n)
}

fn limit(n: u64) -> Limit {
    Limit::Pages(mib(n))
}

/// There is always a `high`, or nothing would be reclaimed before the vCPUs that could help are held.
/// Semantics: T1, T26.
#[test]
fn high_is_implied_by_max() {
    let table = [
        (Limit::Max, Limit::Max, Limit::Max),
        (limit(448), Limit::Max, limit(448)),
        (limit(448), limit(512), limit(448)),
        (limit(600), limit(512), limit(512)),
        (Limit::Max, limit(512), limit(512 - 16)),
        (Limit::Max, limit(128), limit(124)),
        (Limit::Max, limit(64), limit(60)),
        (Limit::Max, limit(3), limit(0)),
        (Limit::Max, limit(0), limit(0)),
        (limit(0), limit(512), limit(0)),
    ];
    for (high, max, expected) in table {
        assert_eq!(effective_high(high, max), expected, "high {high} max {max}");
    }
}

/// The balloon's size follows from the limits; nobody sets it.
/// Semantics: T1.
#[test]
fn the_balloon_holds_what_is_above_high() {
    assert_eq!(balloon_target(mib(1024), Limit::Max, Limit::Max), Pages::ZERO);
    assert_eq!(balloon_target(mib(1024), Limit::Max, limit(512)), mib(528));
    assert_eq!(balloon_target(mib(1024), limit(256), limit(512)), mib(768));
    assert_eq!(balloon_target(mib(128), Limit::Max, limit(512)), Pages::ZERO);
    assert_eq!(balloon_target(mib(128), limit(0), limit(512)), mib(128));
}

/// What is charged ahead of need is a small part of what is left, at the VM and at its group.
/// Semantics: 59.
#[test]
fn stock_shrinks_to_single_pages_near_a_limit() {
    assert_eq!(stock_max(None, None, 1), STOCK_CAP);
    assert_eq!(stock_max(Some(mib(1024)), None, 1), STOCK_CAP);
    assert_eq!(stock_max(Some(Pages(800)), None, 1), Pages(100));
    assert_eq!(stock_max(Some(Pages(800)), Some(Pages(800)), 4), Pages(25));
    assert_eq!(stock_max(Some(Pages(7)), None, 1), Pages(1));
    assert_eq!(stock_max(Some(Pages(0)), None, 1), Pages(0));
    assert_eq!(stock_max(None, Some(Pages(0)), 0), Pages(0));
}

/// The smallest VM can be reclaimed, to the page: no target is rounded down to nothing.
/// Semantics: 113, B89.
#[test]
fn a_vm_of_8_pages_can_be_reclaimed() {
    for high in 0..8 {
        let high_limit = Limit::Pages(Pages(high));
        assert_eq!(balloon_target(Pages(8), high_limit, Limit::Max), Pages(8 - high));
        assert_eq!(balloon_target(Pages(8), high_limit, Limit::Pages(Pages(4))), Pages(8 - high.min(4)));
    }
}

/// Growth one page at a time wakes background reclaim exactly once a crossing, and what it aims at is below: usage
/// settles there without a single refused charge.
/// Semantics: 115, B80, T26.
#[test]
fn growth_through_high_wakes_reclaim_once_a_crossing() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let group = crate::nodes::group(&mut tree, root, "group");
    let vm = crate::nodes::vm(&mut tree, group, "vm");
    let high = LimitPatch { high: Some(Limit::Pages(Pages(50))), ..LimitPatch::max(Limit::Pages(Pages(100))) };
    tree.set_limits(group, &high).unwrap();
    let mut woken = 0;
    for touch in 1..=300u64 {
        let charge = tree.try_charge(vm, Pages(1), Mode::Wait).expect("never as far as max");
        let usage = tree.usage(group).0;
        assert_eq!(charge.crossed_high.iter().collect::<Vec<_>>(), if usage == 51 { vec![group] } else { vec![] });
        woken += charge.crossed_high.iter().count();
        if woken > 0 && touch % 20 == 0 && tree.above_high(group) {
            // The balloon, at last: down to its target of a guest that has everything.
            let give = balloon_target(Pages(usage), tree.reclaim_high(group), Limit::Max);
            tree.uncharge(vm, give);
            assert_eq!(tree.usage(group), Pages(50), "at high, not a page below");
        }
    }
    let node = tree.snapshot(group);
    assert_eq!((node.events.high, node.memory.failcnt, node.events.max), (woken as u64, 0, 0));
    assert!(woken > 5 && node.memory.peak < Pages(100));
}

proptest! {
    /// No limits, however odd, lead to a target that cannot be reached.
    /// Semantics: T1.
    #[test]
    fn targets_are_possible(size in 0u64..1 << 30, high in any::<Option<u32>>(), max in any::<Option<u32>>()) {
        let to_limit = |n: Option<u32>| Limit::from(n.map(|n| Pages(n.into())));
        let (high, max) = (to_limit(high), to_limit(max));
        prop_assert!(effective_high(high, max) <= max);
        prop_assert!(balloon_target(Pages(size), high, max) <= Pages(size));
    }

    /// An eighth of any room, shared by any number of members.
    /// Semantics: 59, 60.
    #[test]
    fn stock_is_a_small_part_of_the_room(room in any::<u64>(), group in any::<Option<u64>>(), members in any::<u32>()) {
        let stock = stock_max(Some(Pages(room)), group.map(Pages), members);
        prop_assert!(stock <= STOCK_CAP);
        prop_assert!(stock.0 <= (room / 8).max(room.min(1)));
        if let Some(group) = group {
            prop_assert!(stock.0 <= (group / 8 / u64::from(members.max(1))).max(group.min(1)));
        }
    }
}

/// More room is news only for who had none: parts of a group's limit change all the time.
#[test]
fn a_higher_limit_is_room_for_who_was_at_it() {
    let table = [
        (1000, 1000, 1001, true),
        (1000, 1000, 1000, false),
        (1000, 1000, 900, false),
        (1000 - BATCH + 1, 1000, 1001, true),
        (1000 - BATCH, 1000, 2000, false),
        (0, u64::MAX, u64::MAX, false),
        (u64::MAX, 5, 6, true),
        (0, 0, 1, true),
    ];
    for (has, told, now, finds) in table {
        assert_eq!(finds_room(has, told, now), finds, "{has} of {told}, now {now}");
    }
}

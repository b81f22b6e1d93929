//! What reclaim aims at.

use memcg_core::reclaim::{STOCK_CAP, balloon_target, effective_high, stock_max};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

fn mib(n: u64) -> Pages {
    Pages::from_mib(n)
}

fn limit(n: u64) -> Limit {
    Limit::Pages(mib(n))
}

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

#[test]
fn the_balloon_holds_what_is_above_high() {
    assert_eq!(balloon_target(mib(1024), Limit::Max, Limit::Max), Pages::ZERO);
    assert_eq!(balloon_target(mib(1024), Limit::Max, limit(512)), mib(528));
    assert_eq!(balloon_target(mib(1024), limit(256), limit(512)), mib(768));
    assert_eq!(balloon_target(mib(128), Limit::Max, limit(512)), Pages::ZERO);
    assert_eq!(balloon_target(mib(128), limit(0), limit(512)), mib(128));
}

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

proptest! {
    #[test]
    fn targets_are_possible(size in 0u64..1 << 30, high in any::<Option<u32>>(), max in any::<Option<u32>>()) {
        let to_limit = |n: Option<u32>| Limit::from(n.map(|n| Pages(n.into())));
        let (high, max) = (to_limit(high), to_limit(max));
        prop_assert!(effective_high(high, max) <= max);
        prop_assert!(balloon_target(Pages(size), high, max) <= Pages(size));
    }

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

//! Charges, rule by rule. Sequences of everything are in `model`.

use memcg_core::reclaim::{HIGH_MARGIN, STOCK_CAP};
use memcg_core::tree::{Counter, Kind, LimitPatch, Mode, NodeId, Overhead, Tree};
use memcg_core::units::{Limit, Pages};

use crate::nodes::{Family, family};

impl Family {
    fn max(&mut self, id: NodeId, pages: u64) {
        self.tree.set_limits(id, &LimitPatch::max(Limit::Pages(Pages(pages)))).unwrap();
    }

    fn patch(&mut self, id: NodeId, patch: LimitPatch) {
        self.tree.set_limits(id, &patch).unwrap();
    }

    fn usages(&self) -> [u64; 5] {
        [self.tree.root(), self.group, self.vm, self.sibling, self.uncle].map(|id| self.tree.usage(id).0)
    }
}

fn pages(n: u64) -> Option<Limit> {
    Some(Limit::Pages(Pages(n)))
}

/// No limit and no protection until somebody sets one, and nothing that somebody else left behind.
/// Semantics: 1, 2, 119.
#[test]
fn a_new_node_is_empty_and_unlimited() {
    let f = family();
    let node = f.tree.snapshot(f.vm);
    assert_eq!((node.memory.usage, node.memory.failcnt, node.limits.max), (Pages::ZERO, 0, Limit::Max));
    assert_eq!((node.limits.min, node.limits.low, node.limits.high), (Limit::ZERO, Limit::ZERO, Limit::Max));
    assert_eq!(f.tree.margin(f.vm), None);
    assert_eq!(Tree::new(Limit::Pages(Pages(9))).margin(Tree::new(Limit::Max).root()), Some(Pages(9)));
}

/// A limit of 0 refuses the first page; it is neither "not set" nor "unlimited".
/// Semantics: 3, 103, B1.
#[test]
fn limit_zero_refuses_the_first_page() {
    let mut f = family();
    f.max(f.vm, 0);
    let refused = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap_err();
    assert_eq!((refused.level, refused.short_by, refused.counter), (f.vm, Pages(1), Counter::Memory));
    assert_eq!(f.usages(), [0; 5]);
    assert_eq!(f.tree.snapshot(f.vm).memory.failcnt, 1);
}

/// 512 pages on a limit of 100 are refused whole, and 511 free pages are not enough for them.
/// Semantics: 3, 7.
#[test]
fn a_large_charge_is_all_or_nothing() {
    let mut f = family();
    f.max(f.vm, 100);
    assert_eq!(f.tree.try_charge(f.vm, Pages(512), Mode::NoRetry).unwrap_err().short_by, Pages(412));
    f.max(f.vm, 1000);
    let _ = f.tree.try_charge(f.vm, Pages(489), Mode::Wait).unwrap();
    assert_eq!(f.tree.margin(f.vm), Some(Pages(511)));
    assert_eq!(f.tree.try_charge(f.vm, Pages(512), Mode::NoRetry).unwrap_err().short_by, Pages(1));
    assert_eq!(f.tree.usage(f.vm), Pages(489));
    let _ = f.tree.try_charge(f.vm, Pages(511), Mode::NoRetry).unwrap();
    assert_eq!(f.tree.margin(f.vm), Some(Pages::ZERO));
    let node = f.tree.snapshot(f.vm).memory;
    assert_eq!((node.failcnt, node.batch_misses), (0, 2), "batch misses are no failures");
}

/// A refusal names a limit; advice must name the one that is in the way, wherever that is.
#[test]
fn the_narrowest_limit_is_found_at_any_level_and_the_nearest_of_several() {
    let mut f = family();
    let root = f.tree.root();
    assert_eq!(f.tree.narrowest(f.vm), None);
    f.max(root, 50);
    assert_eq!(f.tree.narrowest(f.vm), Some(root));
    f.max(f.group, 50);
    assert_eq!(f.tree.narrowest(f.vm), Some(f.group), "of the same");
    f.max(f.vm, 60);
    assert_eq!((f.tree.narrowest(f.vm), f.tree.narrowest(root)), (Some(f.group), Some(root)));
    f.max(f.vm, 20);
    assert_eq!(f.tree.narrowest(f.vm), Some(f.vm));
    let _ = f.tree.try_charge(f.sibling, Pages(40), Mode::Wait).unwrap();
    assert_eq!(f.tree.narrowest(f.vm), Some(f.group), "what others use counts");
}

/// A VM keeps room by giving up pages of its own: not those that are promised to it, or to a group that it is in, for the sake
/// of a limit that it shares with others. From its own limit nothing protects it.
/// Semantics: T2.
#[test]
fn who_is_within_what_it_is_promised_keeps_no_room_for_others() {
    let at_least = HIGH_MARGIN;
    let mut f = family();
    let (root, group, vm) = (f.tree.root(), f.group, f.vm);
    let told = |f: &Family, spare| f.tree.room_to_keep(f.vm, Pages(spare));
    let min = |f: &mut Family, at, min| f.patch(at, LimitPatch { min: pages(min), ..LimitPatch::default() });
    f.max(f.group, 9000);
    let _ = f.tree.try_charge(f.vm, Pages(6000), Mode::Wait).unwrap();
    let _ = f.tree.try_charge(f.sibling, Pages(2990), Mode::Wait).unwrap();
    assert_eq!(told(&f, 0), Some(Pages(10)), "nothing is promised");
    min(&mut f, vm, 6000);
    assert_eq!(told(&f, 0), Some(at_least));
    min(&mut f, vm, 6000 - at_least.0);
    assert_eq!(told(&f, 0), Some(at_least), "what it keeps free would be of that");
    min(&mut f, vm, 6000 - at_least.0 - 1);
    assert_eq!((told(&f, 0), told(&f, 1)), (Some(Pages(10)), Some(at_least)), "so would it be of what nobody uses");
    min(&mut f, vm, 0);
    min(&mut f, group, 9000);
    assert_eq!(told(&f, 0), Some(Pages(10)), "no group is protected from its own limit");
    f.max(root, 8995);
    assert_eq!(told(&f, 0), Some(Pages(10)), "of the group");
    f.max(f.group, 12_000);
    assert_eq!(told(&f, 0), Some(at_least), "of the root");
    f.max(f.vm, 6007);
    assert_eq!((told(&f, 0), f.tree.margin(f.vm)), (Some(Pages(7)), Some(Pages(5))), "its own");
}

/// After a forced change usage may be above the limit: that leaves no room, rather than a huge one.
/// Semantics: 83, B1.
#[test]
fn usage_above_the_limit_leaves_no_room() {
    let mut f = family();
    let _ = f.tree.try_charge(f.vm, Pages(10), Mode::Wait).unwrap();
    f.max(f.vm, 5);
    assert_eq!(f.tree.margin(f.vm), Some(Pages::ZERO));
    assert_eq!(f.tree.try_charge(f.vm, Pages(6), Mode::Wait).unwrap_err().short_by, Pages(6));
    let node = f.tree.snapshot(f.vm);
    assert_eq!((node.overcharge, node.memory.usage), (Pages(5), Pages(10)));
}

/// Who reclaims must know where: the level that refused is named, and below and beside it nothing moves.
/// Semantics: 63.
#[test]
fn the_level_that_refused_is_named() {
    let mut f = family();
    f.max(f.group, 10);
    let _ = f.tree.try_charge(f.sibling, Pages(8), Mode::Wait).unwrap();
    let before = f.usages();
    let refused = f.tree.try_charge(f.vm, Pages(3), Mode::Wait).unwrap_err();
    assert_eq!((refused.level, refused.short_by), (f.group, Pages(1)));
    assert_eq!(f.usages(), before);
    assert!(f.tree.is_within(f.sibling, refused.level), "reclaim may take from the sibling");
    assert!(!f.tree.is_within(f.uncle, refused.level), "but not from the uncle");
    let failcnt = |id| f.tree.snapshot(id).memory.failcnt;
    assert_eq!([f.tree.root(), f.group, f.vm].map(failcnt), [0, 1, 0]);
    // Where several levels are full, it is the lowest: what is freed further up would not help.
    f.max(f.tree.root(), 8);
    for (level, vm_max) in [(f.group, 3), (f.vm, 2)] {
        f.max(f.vm, vm_max);
        assert_eq!(f.tree.try_charge(f.vm, Pages(3), Mode::Wait).unwrap_err().level, level);
    }
}

/// A peak says what was used, not what was asked for.
/// Semantics: 120.
#[test]
fn a_refused_charge_leaves_the_peak() {
    let mut f = family();
    f.max(f.tree.root(), 10);
    let _ = f.tree.try_charge(f.vm, Pages(4), Mode::Wait).unwrap();
    let _ = f.tree.try_charge(f.vm, Pages(7), Mode::Wait).unwrap_err();
    for id in [f.tree.root(), f.group, f.vm] {
        assert_eq!(f.tree.snapshot(id).memory.peak, Pages(4));
    }
}

/// What each mode does at the limit is said by the caller, and only what may wait counts as a failure.
/// Semantics: 62, 84, T28, B33, B52, B82.
#[test]
fn modes_at_the_limit() {
    let mut f = family();
    f.max(f.vm, 4);
    let _ = f.tree.try_charge(f.vm, Pages(4), Mode::Wait).unwrap();
    for mode in [Mode::Wait, Mode::Again, Mode::NoWait, Mode::NoRetry] {
        assert_eq!(f.tree.try_charge(f.vm, Pages(1), mode).unwrap_err().level, f.vm, "{mode:?}");
    }
    let node = f.tree.snapshot(f.vm);
    let memory = node.memory;
    assert_eq!((memory.failcnt, memory.would_block, memory.batch_misses, memory.forced), (1, 1, 1, 0));
    assert_eq!((memory.usage, node.events.max, node.overcharge), (Pages(4), 1, Pages::ZERO));
    let charge = f.tree.try_charge(f.vm, Pages(2), Mode::NoFail).unwrap();
    assert_eq!(charge.forced_at, Some(f.vm));
    let node = f.tree.snapshot(f.vm);
    assert_eq!((node.memory.usage, node.memory.forced, node.overcharge), (Pages(6), 1, Pages(2)));
    assert!(f.tree.check().is_empty());
}

/// One waiting charge, tried ten thousand times, is one failure.
/// Semantics: 117, B39.
#[test]
fn a_waiting_charge_fails_once() {
    let mut f = family();
    f.max(f.vm, 1);
    let _ = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap();
    let _ = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap_err();
    for _ in 0..10_000 {
        let _ = f.tree.try_charge(f.vm, Pages(1), Mode::Again).unwrap_err();
    }
    let node = f.tree.snapshot(f.vm);
    assert_eq!((node.memory.failcnt, node.events.max), (1, 1));
    f.tree.uncharge(f.vm, Pages(1));
    let _ = f.tree.try_charge(f.vm, Pages(1), Mode::Again).unwrap();
}

/// Where no limit is in the way of a batch, only 64 bits are: it shrinks to those, and is not refused.
/// Semantics: 61.
#[test]
fn a_batch_without_a_limit_shrinks_to_what_can_be_counted() {
    let mut f = family();
    let _ = f.tree.try_charge(f.uncle, Pages(10), Mode::Wait).unwrap();
    let mut up_to = |want| f.tree.charge_up_to(f.vm, Pages(want), Pages::ZERO, Mode::NoRetry).map(|c| c.pages.0);
    assert_eq!(up_to(u64::MAX), Ok(u64::MAX - 10));
    assert_eq!(up_to(1), Ok(0));
    assert_eq!(f.tree.usage(f.tree.root()), Pages(u64::MAX));
}

/// What is wanted ahead shrinks to what fits; what a fault waits for does not.
/// Semantics: 61, 116, B50.
#[test]
fn charge_up_to_shrinks_the_batch_only() {
    let mut f = family();
    f.max(f.vm, 100);
    let mut up_to = |want, min| f.tree.charge_up_to(f.vm, Pages(want), Pages(min), Mode::Wait).map(|c| c.pages.0);
    assert_eq!(up_to(64, 1), Ok(64));
    assert_eq!(up_to(512, 1), Ok(36));
    assert_eq!(up_to(512, 0), Ok(0));
    assert_eq!(up_to(512, 1).unwrap_err().short_by, Pages(1));
    assert_eq!(up_to(0, 0), Ok(0));
    let memory = f.tree.snapshot(f.vm).memory;
    assert_eq!((memory.failcnt, memory.batch_misses, memory.usage), (1, 1, Pages(100)));
}

/// Overhead asks its own limit first and fails there, with no trace in memory: nothing is reclaimed for it in vain.
/// Semantics: 80, 81, 114, B51.
#[test]
fn overhead_is_charged_to_both_and_asks_k_first() {
    let mut f = family();
    f.patch(f.vm, LimitPatch { vmm_max: pages(10), max: pages(50), ..LimitPatch::default() });
    let _ = f.tree.try_charge(f.vm, Pages(40), Mode::Wait).unwrap();
    let _ = f.tree.try_charge_as(f.vm, Kind::Overhead(Overhead::Queue), Pages(10), Mode::Wait).unwrap();
    let refused = f.tree.try_charge_as(f.vm, Kind::Overhead(Overhead::Queue), Pages(1), Mode::Wait).unwrap_err();
    assert_eq!(refused.counter, Counter::Vmm, "reclaim would not help, and U is full too");
    let node = f.tree.snapshot(f.vm);
    assert_eq!((node.memory.usage, node.vmm.usage), (Pages(50), Pages(10)));
    assert_eq!((node.memory.failcnt, node.vmm.failcnt, node.events.max), (0, 1, 0));
    // K with room, U without: U refuses and K stays.
    f.patch(f.vm, LimitPatch { vmm_max: pages(20), ..LimitPatch::default() });
    let refused = f.tree.try_charge_as(f.vm, Kind::Overhead(Overhead::Queue), Pages(1), Mode::Wait).unwrap_err();
    assert_eq!(refused.counter, Counter::Memory);
    let node = f.tree.snapshot(f.vm);
    assert_eq!((node.vmm.usage, node.vmm.failcnt, node.memory.failcnt), (Pages(10), 1, 1));
    f.tree.uncharge_as(f.vm, Kind::Overhead(Overhead::Queue), Pages(10));
    let node = f.tree.snapshot(f.vm);
    assert_eq!((node.memory.usage, node.vmm.usage), (Pages(40), Pages::ZERO));
    assert!(f.tree.check().is_empty());
}

/// A VM that is being killed is never refused what it needs to die, at any limit, and it is counted.
/// Semantics: 77, B53, B54.
#[test]
fn teardown_completes_at_every_limit() {
    let mut f = family();
    f.patch(f.vm, LimitPatch { vmm_max: pages(0), max: pages(0), ..LimitPatch::default() });
    f.max(f.group, 0);
    let charge = f.tree.try_charge_as(f.vm, Kind::Overhead(Overhead::Queue), Pages(3), Mode::NoFail).unwrap();
    assert_eq!(charge.forced_at, Some(f.vm));
    assert_eq!((f.tree.snapshot(f.vm).vmm.forced, f.tree.snapshot(f.group).overcharge), (1, Pages(3)));
    assert_eq!(f.tree.uncharge_all(f.vm), Pages(3));
    assert_eq!((f.usages(), f.tree.snapshot(f.group).overcharge), ([0; 5], Pages::ZERO));
}

/// What is above a limit is shown, refuses every further charge, and ends as soon as usage fits.
/// Semantics: 82, 83, T15.
#[test]
fn an_overcharge_only_falls() {
    let mut f = family();
    let _ = f.tree.try_charge(f.vm, Pages(10), Mode::Wait).unwrap();
    f.max(f.vm, 4);
    for left in [6, 5, 4, 3, 2, 1] {
        assert_eq!(f.tree.snapshot(f.vm).overcharge, Pages(left));
        let _ = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap_err();
        f.tree.uncharge(f.vm, Pages(1));
    }
    assert_eq!(f.tree.snapshot(f.vm).overcharge, Pages::ZERO);
    let _ = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap_err();
    f.tree.uncharge(f.vm, Pages(1));
    let _ = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap();
}

/// Growing through `high` page by page wakes reclaim once, at every level that has one; so does a huge charge.
/// Semantics: 115, B80.
#[test]
fn high_is_crossed_once_per_crossing() {
    let mut f = family();
    f.patch(f.vm, LimitPatch { high: pages(5), ..LimitPatch::default() });
    f.patch(f.group, LimitPatch { high: pages(7), ..LimitPatch::default() });
    let mut crossings = Vec::new();
    for n in 1..=10u64 {
        let charge = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap();
        crossings.extend(charge.crossed_high.iter().map(|id| (n, id)));
    }
    assert_eq!(crossings, [(6, f.vm), (8, f.group)]);
    assert!(f.tree.above_high(f.vm) && f.tree.above_high(f.group) && !f.tree.above_high(f.tree.root()));
    f.tree.uncharge(f.vm, Pages(5));
    assert!(!f.tree.above_high(f.vm), "at high is not above it");
    let charge = f.tree.try_charge(f.vm, Pages(512), Mode::NoRetry).unwrap();
    assert_eq!(charge.crossed_high.iter().collect::<Vec<_>>(), [f.vm, f.group]);
    assert_eq!((f.tree.snapshot(f.vm).events_local.high, f.tree.snapshot(f.group).events_local.high), (2, 2));
}

/// Reclaim starts before the limit although nobody has set a `high`: `max − max(4 MiB, max/32)`.
/// Semantics: 115, T1.
#[test]
fn max_implies_a_high() {
    let mut f = family();
    f.max(f.vm, 32 * 1024);
    let _ = f.tree.try_charge(f.vm, Pages(31 * 1024), Mode::Wait).unwrap();
    assert!(!f.tree.above_high(f.vm));
    let charge = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap();
    assert_eq!(charge.crossed_high.iter().next(), Some(f.vm));
}

/// Every reservation ends in exactly one commit or refund, and refused ones leave nothing.
/// Semantics: 78, 107, 108, B10, B13.
#[test]
fn a_reservation_commits_or_refunds() {
    let mut f = family();
    f.max(f.vm, 8);
    drop(f.tree.reserve(f.vm, Pages(8), Mode::Wait).unwrap());
    assert_eq!(f.usages(), [0; 5]);
    let charge = f.tree.reserve(f.vm, Pages(8), Mode::Wait).unwrap().commit();
    assert_eq!((charge.pages, f.usages()), (Pages(8), [8, 8, 8, 0, 0]));
    for _ in 0..100 {
        let _ = f.tree.reserve(f.vm, Pages(1), Mode::Wait).unwrap_err();
    }
    f.tree.uncharge(f.vm, Pages(8));
    let charge = f.tree.reserve(f.vm, Pages(5), Mode::Wait).unwrap().commit_part(Pages(2));
    assert_eq!((charge.pages, f.usages()), (Pages(2), [2, 2, 2, 0, 0]));
    drop(f.tree.reserve_as(f.vm, Kind::Overhead(Overhead::Queue), Pages(3), Mode::Wait).unwrap());
    assert_eq!((f.usages(), f.tree.snapshot(f.vm).vmm.usage), ([2, 2, 2, 0, 0], Pages::ZERO));
    f.tree.uncharge(f.vm, Pages(2));
    f.tree.remove(f.vm).unwrap();
}

/// Who pays is said when a charge is prepared, before anything is used; refused, nothing is left of it at any level, in any
/// counter, but one count where it was refused.
/// Semantics: 106.
#[test]
fn who_pays_is_said_first_and_a_refusal_leaves_nothing() {
    let kinds = [Kind::Guest, Kind::Overhead(Overhead::Queue), Kind::Store, Kind::Swap];
    for (kind, counter) in kinds.into_iter().zip(Counter::ALL) {
        let mut f = family();
        let four = pages(4);
        f.patch(
            f.group,
            LimitPatch { max: four, vmm_max: four, store_max: four, swap_max: four, ..LimitPatch::default() },
        );
        let _ = f.tree.reserve_as(f.vm, kind, Pages(4), Mode::Wait).unwrap().commit();
        let all = |f: &Family| f.tree.ids().map(|id| f.tree.snapshot(id)).collect::<Vec<_>>();
        let shown = |f: &Family, id| {
            let node = f.tree.snapshot(id);
            [node.memory, node.vmm, node.store, node.swap][counter as usize]
        };
        let used = |f: &Family, id| shown(f, id).usage.0;
        assert_eq!([f.group, f.vm, f.sibling].map(|id| used(&f, id)), [4, 4, 0], "{kind:?}: the VM that was named");
        let before = all(&f);
        assert_eq!(f.tree.reserve_as(f.sibling, kind, Pages(1), Mode::Again).unwrap_err().level, f.group);
        assert_eq!(all(&f), before, "{kind:?}");
        let _ = f.tree.reserve_as(f.sibling, kind, Pages(1), Mode::Wait).unwrap_err();
        let failures = |f: &Family, id| shown(f, id).failcnt;
        assert_eq!([f.tree.root(), f.group, f.vm, f.sibling].map(|id| failures(&f, id)), [0, 1, 0, 0], "{kind:?}");
        assert_eq!([f.group, f.vm, f.sibling].map(|id| used(&f, id)), [4, 4, 0], "{kind:?}");
    }
}

/// A double uncharge takes from nobody else, and is counted as the bug that it is.
/// Semantics: 4, B65.
#[test]
#[cfg(not(debug_assertions))]
fn an_uncharge_below_zero_is_clamped_and_counted() {
    let mut f = family();
    let _ = f.tree.try_charge(f.vm, Pages(3), Mode::Wait).unwrap();
    let _ = f.tree.try_charge(f.sibling, Pages(5), Mode::Wait).unwrap();
    f.tree.uncharge(f.vm, Pages(4));
    assert_eq!(f.usages(), [5, 5, 0, 5, 0]);
    assert_eq!(f.tree.snapshot(f.vm).memory.underflows, 1);
    assert_eq!(f.tree.check().len(), 1);
}

/// The same stops a debug build, where the caller is to be seen.
/// Semantics: 4, B65.
#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "uncharge of 4 pages")]
fn an_uncharge_below_zero_stops_a_debug_build() {
    let mut f = family();
    let _ = f.tree.try_charge(f.vm, Pages(3), Mode::Wait).unwrap();
    f.tree.uncharge(f.vm, Pages(4));
}

/// What is charged in one role is not taken off in another: overhead never exceeds memory.
/// Semantics: 105, B84.
#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "uncharge of 2 pages")]
fn overhead_is_not_uncharged_as_guest_memory() {
    let mut f = family();
    let _ = f.tree.try_charge_as(f.vm, Kind::Overhead(Overhead::Queue), Pages(3), Mode::Wait).unwrap();
    f.tree.uncharge(f.vm, Pages(2));
}

/// Counters do not wrap, whatever is asked for: a huge request is refused even without a limit.
/// Semantics: 3, B1.
#[test]
fn counters_stay_within_64_bits() {
    let mut f = family();
    let _ = f.tree.try_charge(f.vm, Pages(u64::MAX - 1), Mode::NoRetry).unwrap();
    let _ = f.tree.try_charge(f.vm, Pages(2), Mode::NoRetry).unwrap_err();
    let refused = f.tree.try_charge(f.sibling, Pages(2), Mode::NoFail).unwrap_err();
    assert_eq!(refused.level, f.group);
    assert_eq!(f.usages()[3], 0);
    f.tree.uncharge(f.vm, Pages(u64::MAX - 1));
    assert_eq!(f.usages(), [0; 5]);
}

/// Swap is counted beside memory, with its own limit at every level.
/// Semantics: 63.
#[test]
fn swap_has_its_own_limit() {
    let mut f = family();
    f.patch(f.group, LimitPatch { swap_max: pages(4), ..LimitPatch::default() });
    let _ = f.tree.try_charge_as(f.vm, Kind::Swap, Pages(4), Mode::NoWait).unwrap();
    assert_eq!(f.tree.try_charge_as(f.vm, Kind::Swap, Pages(1), Mode::NoWait).unwrap_err().level, f.group);
    assert_eq!((f.usages(), f.tree.snapshot(f.group).swap.usage), ([0; 5], Pages(4)));
    assert_eq!(f.tree.snapshot(f.group).swap.would_block, 1);
}

/// A VM's stock is bounded by its own room and by its part of each group's.
/// Semantics: 59.
#[test]
fn stock_is_shared_out_among_members() {
    let mut f = family();
    assert_eq!(f.tree.stock_max(f.vm), STOCK_CAP);
    f.max(f.group, 1600);
    assert_eq!(f.tree.snapshot(f.group).members, 2);
    assert_eq!(f.tree.stock_max(f.vm), Pages(100));
    f.max(f.vm, 80);
    assert_eq!(f.tree.stock_max(f.vm), Pages(10));
    f.max(f.tree.root(), 24);
    assert_eq!((f.tree.snapshot(f.tree.root()).members, f.tree.stock_max(f.vm)), (3, Pages(1)));
    let _ = f.tree.try_charge(f.uncle, Pages(24), Mode::Wait).unwrap();
    assert_eq!(f.tree.stock_max(f.vm), Pages::ZERO);
}

/// Whatever happens between a charge and its use, each way out commits or refunds: an error, a part, even a panic.
/// Semantics: 17, 86, 87, B13.
#[test]
fn every_way_out_commits_or_refunds() {
    type Way = fn(&mut Tree, NodeId);
    fn use_part(tree: &mut Tree, vm: NodeId, part: u64) {
        let _ = tree.reserve(vm, Pages(8), Mode::Wait).unwrap().commit_part(Pages(part));
    }
    let ways: [(&str, u64, Way); 6] = [
        ("commit", 8, |tree, vm| {
            let _ = tree.reserve(vm, Pages(8), Mode::Wait).unwrap().commit();
        }),
        ("a part", 3, |tree, vm| use_part(tree, vm, 3)),
        ("more than all", 8, |tree, vm| use_part(tree, vm, 9)),
        ("nothing", 0, |tree, vm| use_part(tree, vm, 0)),
        ("an error", 0, |tree, vm| {
            let host_has_no_memory = |tree: &mut Tree| {
                let reservation = tree.reserve(vm, Pages(8), Mode::Wait).map_err(|_| ())?;
                Err::<(), ()>(())?;
                let _ = reservation.commit();
                Ok::<(), ()>(())
            };
            assert_eq!(host_has_no_memory(tree), Err(()));
        }),
        ("a panic", 0, |tree, vm| {
            let dies = std::panic::AssertUnwindSafe(|| {
                let _reservation = tree.reserve(vm, Pages(8), Mode::Wait).unwrap();
                std::panic::resume_unwind(Box::new("a thread dies"));
            });
            assert!(std::panic::catch_unwind(dies).is_err());
        }),
    ];
    for (way, kept, run) in ways {
        let mut f = family();
        run(&mut f.tree, f.vm);
        assert_eq!(f.usages(), [kept, kept, kept, 0, 0], "{way}");
        assert_eq!(f.tree.check(), [], "{way}");
    }
}

/// A refund is an uncharge like any other: what it frees is found, and what it takes off is every counter it was on.
/// Semantics: 78, B72.
#[test]
fn a_refund_is_an_uncharge() {
    for kind in Kind::ALL {
        let mut f = family();
        f.tree.set_returning(f.vm).unwrap();
        let reservation = f.tree.reserve_as(f.vm, kind, Pages(2), Mode::NoFail).unwrap();
        drop(reservation);
        assert_eq!((f.tree.returning(f.group), f.tree.check()), (Pages::ZERO, vec![]), "{kind:?}");
        assert_eq!(f.tree.reap(), [f.vm], "{kind:?}");
    }
}

/// A refusal carries what explains it: level, counter, usage, limit and how much is missing.
/// Semantics: 63.
#[test]
fn a_refusal_has_the_numbers() {
    let mut f = family();
    f.patch(f.group, LimitPatch { max: pages(1000), swap_max: pages(3), ..LimitPatch::default() });
    f.tree.set_ceiling(f.group, Some(Pages(512)));
    let _ = f.tree.try_charge(f.sibling, Pages(500), Mode::Wait).unwrap();
    let refused = f.tree.try_charge(f.vm, Pages(16), Mode::Wait).unwrap_err();
    assert_eq!((refused.level, refused.counter), (f.group, Counter::Memory));
    assert_eq!((refused.usage, refused.limit, refused.short_by), (Pages(500), Limit::Pages(Pages(512)), Pages(4)));
    assert_eq!(refused.to_string(), "memory: 2.0M in use of 2M, short by 16K");
    let refused = f.tree.try_charge_as(f.vm, Kind::Swap, Pages(4), Mode::Wait).unwrap_err();
    assert_eq!(refused.to_string(), "swap: 0 in use of 12K, short by 4K");
}

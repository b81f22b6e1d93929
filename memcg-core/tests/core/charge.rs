//! Charges: the rules of semantics rows 1-7, 57-64, 77-84, 104-120 one by one. Sequences are in `model`.

use memcg_core::tree::{Counter, Kind, LimitPatch, Mode, NodeId, Overhead, Tree};
use memcg_core::units::{Limit, Pages};

use crate::nodes::{group, vm};

/// A tree `/ → group → vm, sibling` and `/ → uncle`.
struct Family {
    tree: Tree,
    group: NodeId,
    vm: NodeId,
    sibling: NodeId,
    uncle: NodeId,
}

fn family() -> Family {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let group = group(&mut tree, root, "group");
    let (vm, sibling) = (vm(&mut tree, group, "vm"), crate::nodes::vm(&mut tree, group, "sibling"));
    let uncle = crate::nodes::vm(&mut tree, root, "uncle");
    Family { tree, group, vm, sibling, uncle }
}

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

/// semantics rows 1, 2, 10, 119.
#[test]
fn a_new_node_is_empty_and_unlimited() {
    let f = family();
    let node = f.tree.snapshot(f.vm);
    assert_eq!((node.memory.usage, node.memory.failcnt, node.limits.max), (Pages::ZERO, 0, Limit::Max));
    assert_eq!((node.limits.min, node.limits.low, node.limits.high), (Limit::ZERO, Limit::ZERO, Limit::Max));
    assert_eq!(f.tree.margin(f.vm), None);
    assert_eq!(Tree::new(Limit::Pages(Pages(9))).margin(Tree::new(Limit::Max).root()), Some(Pages(9)));
}

/// semantics row 3, B1: a limit of 0 refuses the first page and is not "unlimited".
#[test]
fn limit_zero_refuses_the_first_page() {
    let mut f = family();
    f.max(f.vm, 0);
    let refused = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap_err();
    assert_eq!((refused.level, refused.short_by, refused.counter), (f.vm, Pages(1), Counter::Memory));
    assert_eq!(f.usages(), [0; 5]);
    assert_eq!(f.tree.snapshot(f.vm).memory.failcnt, 1);
}

/// semantics rows 3, 7, 64, H4: 512 pages on a limit of 100 are refused whole; 511 free pages are not enough.
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

/// semantics row 3, B1: usage above the limit (after a forced change) leaves no room, rather than a huge one.
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

/// semantics row 63: the level that refused is named; below and beside it nothing moves.
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
}

/// semantics row 120: a refused charge leaves every peak.
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

/// semantics row 62, 84: what each mode does at the limit, and what its refusal counts as.
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

/// semantics rows 39, 117, B39: one waiting charge, tried many times, is one failure.
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

/// semantics rows 61, 64, 116: what is wanted ahead shrinks to what fits; what a fault waits for does not.
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

/// semantics rows 57, 80-81, B51: overhead asks K first and fails there, with no trace in U.
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

/// semantics row 77: what must not fail does not, and is counted.
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

/// semantics rows 82, 83: an overcharge is reported and only falls.
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

/// semantics row 115, B80: growing through `high` page by page is one crossing, at every level that has one.
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

/// Without a `high` of its own, `max` implies one (max − max(4 MiB, max/32)).
#[test]
fn max_implies_a_high() {
    let mut f = family();
    f.max(f.vm, 32 * 1024);
    let _ = f.tree.try_charge(f.vm, Pages(31 * 1024), Mode::Wait).unwrap();
    assert!(!f.tree.above_high(f.vm));
    let charge = f.tree.try_charge(f.vm, Pages(1), Mode::Wait).unwrap();
    assert_eq!(charge.crossed_high.iter().next(), Some(f.vm));
}

/// semantics rows 78, 107, B10, B13: every reservation ends in exactly one commit or refund.
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

/// semantics row 4, B65: a double uncharge does not take from anyone else, and is counted.
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

/// semantics row 4: the same stops a debug build.
#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "uncharge of 4 pages")]
fn an_uncharge_below_zero_stops_a_debug_build() {
    let mut f = family();
    let _ = f.tree.try_charge(f.vm, Pages(3), Mode::Wait).unwrap();
    f.tree.uncharge(f.vm, Pages(4));
}

/// K ≤ U: overhead cannot be taken off as if it were guest memory.
#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "uncharge of 2 pages")]
fn overhead_is_not_uncharged_as_guest_memory() {
    let mut f = family();
    let _ = f.tree.try_charge_as(f.vm, Kind::Overhead(Overhead::Queue), Pages(3), Mode::Wait).unwrap();
    f.tree.uncharge(f.vm, Pages(2));
}

/// Counters do not wrap, whatever is asked for.
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

/// Swap is counted beside memory, with its own limit.
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
#[test]
fn stock_is_shared_out_among_members() {
    let mut f = family();
    assert_eq!(f.tree.stock_max(f.vm), Pages::from_mib(8));
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

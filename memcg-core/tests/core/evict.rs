//! Evicted pages: counted once, in one step, by every limit that is concerned.

use memcg_core::tree::{Counter, EvictError, Kind, LimitPatch, Mode, NodeId, Tree};
use memcg_core::units::{Limit, Pages};

use crate::nodes;

/// `/ → group → vm` with 1000 guest pages.
fn vm() -> (Tree, NodeId, NodeId) {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let group = nodes::group(&mut tree, root, "group");
    let vm = nodes::vm(&mut tree, group, "vm");
    let _ = tree.try_charge(vm, Pages(1000), Mode::Wait).unwrap();
    (tree, group, vm)
}

fn limit(pages: u64) -> Option<Limit> {
    Some(Limit::Pages(Pages(pages)))
}

/// Memory, store, swap.
fn usage(tree: &Tree, id: NodeId) -> [u64; 3] {
    let node = tree.snapshot(id);
    [node.memory, node.store, node.swap].map(|counter| counter.usage.0)
}

/// What is evicted leaves memory by as much as it frees, and comes back exactly, at every level.
/// Semantics: 24.
#[test]
fn evicted_pages_come_back_exactly() {
    let (mut tree, group, vm) = vm();
    tree.evict(vm, Pages(1000), Pages(300)).unwrap();
    for id in [vm, group, tree.root()] {
        assert_eq!(usage(&tree, id), [300, 300, 1000]);
        assert_eq!(tree.snapshot(id).memory.peak, Pages(1000), "both at once was never needed");
    }
    let charge = tree.refault(vm, Pages(1000), Pages(300), Mode::Wait).unwrap();
    assert_eq!((charge.pages, usage(&tree, group), tree.check()), (Pages(1000), [1000, 0, 0], vec![]));
}

/// A touched page is charged before its content is put back: at the limit the mode decides, and a refusal leaves it
/// evicted.
/// Semantics: 24, 62.
#[test]
fn a_refault_is_charged_like_any_touch() {
    let (mut tree, group, vm) = vm();
    tree.evict(vm, Pages(100), Pages(20)).unwrap();
    tree.set_limits(group, &LimitPatch::max(Limit::Pages(Pages(950)))).unwrap();
    let refused = tree.refault(vm, Pages(100), Pages(20), Mode::Wait).unwrap_err();
    let EvictError::Refused(refused) = refused else { panic!("{refused}") };
    assert_eq!((refused.level, refused.counter, refused.short_by), (group, Counter::Memory, Pages(50)));
    assert_eq!((usage(&tree, vm), tree.snapshot(group).memory.failcnt), ([920, 20, 100], 1));
    // Putting back frees its part of the store: 30 more fit although 37 come back.
    let _ = tree.refault(vm, Pages(37), Pages(7), Mode::Again).unwrap();
    assert_eq!(usage(&tree, vm), [950, 13, 63]);
    let charge = tree.refault(vm, Pages(10), Pages(0), Mode::NoFail).unwrap();
    assert_eq!((charge.forced_at, tree.snapshot(group).overcharge), (Some(group), Pages(10)));
    assert_eq!(tree.check(), []);
}

/// `swap.max` and the store's cap decide, of any level, and a refusal changes nothing but its count.
/// Semantics: 27, 63.
#[test]
fn both_caps_decide_about_eviction() {
    let patches = [
        (LimitPatch { swap_max: limit(99), ..LimitPatch::default() }, Counter::Swap),
        (LimitPatch { store_max: limit(39), ..LimitPatch::default() }, Counter::Store),
    ];
    for (patch, counter) in patches {
        for upper in [true, false] {
            let (mut tree, group, vm) = vm();
            let level = if upper { group } else { vm };
            tree.set_limits(level, &patch).unwrap();
            let before = [tree.root(), group, vm].map(|id| usage(&tree, id));
            let Err(EvictError::Refused(refused)) = tree.evict(vm, Pages(100), Pages(40)) else {
                panic!("it does not fit");
            };
            assert_eq!((refused.level, refused.counter, refused.short_by), (level, counter, Pages(1)));
            assert_eq!([tree.root(), group, vm].map(|id| usage(&tree, id)), before);
            let node = tree.snapshot(level);
            assert_eq!((node.swap.would_block + node.store.would_block, node.memory.would_block), (1, 0));
            tree.evict(vm, Pages(99), Pages(39)).unwrap();
        }
    }
}

/// Evicting in an emergency works above the limit, and what it frees lowers the overcharge.
/// Semantics: 82, 83.
#[test]
fn eviction_lowers_an_overcharge() {
    let (mut tree, _, vm) = vm();
    tree.set_limits(vm, &LimitPatch::max(Limit::Pages(Pages(900)))).unwrap();
    assert_eq!(tree.snapshot(vm).overcharge, Pages(100));
    tree.evict(vm, Pages(120), Pages(20)).unwrap();
    assert_eq!(tree.snapshot(vm).overcharge, Pages::ZERO);
}

/// What is not there cannot be moved, and what grows by being stored stays: typed errors, nothing changed.
/// Semantics: 4.
#[test]
fn only_what_is_there_is_moved() {
    let (mut tree, _, vm) = vm();
    let before = tree.snapshot(vm);
    let not_charged =
        |kind, charged, asked| EvictError::NotCharged { kind, charged: Pages(charged), asked: Pages(asked) };
    assert_eq!(tree.evict(vm, Pages(1001), Pages(0)), Err(not_charged(Kind::Guest, 1000, 1001)));
    let larger = EvictError::Larger { pages: Pages(3), stored: Pages(4) };
    assert_eq!(tree.evict(vm, Pages(3), Pages(4)), Err(larger));
    assert_eq!(tree.refault(vm, Pages(1), Pages(0), Mode::Wait), Err(not_charged(Kind::Swap, 0, 1)));
    assert_eq!(tree.snapshot(vm), before);
    tree.evict(vm, Pages(8), Pages(1)).unwrap();
    assert_eq!(tree.refault(vm, Pages(8), Pages(2), Mode::Wait), Err(not_charged(Kind::Store, 1, 2)));
    // What the guest gives away while it is evicted is uncharged from where it is.
    tree.uncharge_as(vm, Kind::Swap, Pages(8));
    tree.uncharge_as(vm, Kind::Store, Pages(1));
    assert_eq!((usage(&tree, vm), tree.check()), ([992, 0, 0], vec![]));
}

/// Without accounting there is nothing to move.
/// Semantics: 58.
#[test]
fn eviction_without_accounting_is_free() {
    let mut tree = Tree::new(Limit::Max);
    let vm = tree.add(tree.root(), "vm").unwrap();
    tree.evict(vm, Pages(3), Pages(1)).unwrap();
    let _ = tree.refault(vm, Pages(3), Pages(1), Mode::Wait).unwrap();
    assert_eq!((usage(&tree, vm), usage(&tree, tree.root())), ([0; 3], [0; 3]));
}

/// A worker evicts within what it was granted and says so afterwards: what it stores was charged as guest memory, so memory
/// stays as it is, and what was freed comes back as its stock does.
/// Semantics: 24, 27.
#[test]
fn a_worker_says_afterwards_what_it_has_evicted() {
    let (mut tree, group, vm) = vm();
    let settle = |tree: &mut Tree, stored, swapped| tree.settle_evicted(vm, Pages(stored), Pages(swapped));
    settle(&mut tree, 30, 100);
    for id in [vm, group, tree.root()] {
        assert_eq!(usage(&tree, id), [1000, 30, 100]);
    }
    // 70 pages of stock come back.
    tree.uncharge(vm, Pages(70));
    settle(&mut tree, 20, 40);
    assert_eq!(usage(&tree, group), [930, 20, 40], "60 were touched again, 10 pages of the store are stock");
    settle(&mut tree, 20, 40);
    assert_eq!((usage(&tree, group), tree.check()), ([930, 20, 40], vec![]));
    assert_eq!(tree.uncharge_all(vm), Pages(930));
    assert_eq!((usage(&tree, group), usage(&tree, vm)), ([0, 0, 0], [0, 0, 0]));
}

/// It has happened, so it is counted, whatever the limits; that it went above them is counted, too.
/// Semantics: 82, 83.
#[test]
fn what_was_evicted_above_a_limit_is_counted() {
    let (mut tree, group, vm) = vm();
    tree.set_limits(group, &LimitPatch { swap_max: limit(50), ..LimitPatch::default() }).unwrap();
    tree.set_limits(vm, &LimitPatch { store_max: limit(10), ..LimitPatch::default() }).unwrap();
    tree.settle_evicted(vm, Pages(10), Pages(50));
    let forced = |tree: &Tree, id| {
        let node = tree.snapshot(id);
        (node.store.forced, node.swap.forced)
    };
    assert_eq!((forced(&tree, vm), forced(&tree, group)), ((0, 0), (0, 0)));
    tree.settle_evicted(vm, Pages(11), Pages(51));
    assert_eq!((forced(&tree, vm), forced(&tree, group)), ((1, 0), (0, 1)));
    // It may only fall, and that is nobody's fault.
    tree.settle_evicted(vm, Pages(11), Pages(50));
    assert_eq!((forced(&tree, vm), forced(&tree, group), usage(&tree, group)), ((1, 0), (0, 1), [1000, 11, 50]));
    // Without an account nothing is charged.
    let root = tree.root();
    let free = tree.add(root, "free").unwrap();
    tree.settle_evicted(free, Pages(1), Pages(1));
    assert_eq!(usage(&tree, free), [0, 0, 0]);
}

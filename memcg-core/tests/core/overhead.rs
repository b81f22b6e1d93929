//! What a VM costs beside its guest's memory: overhead (K) and the store of evicted pages.

use memcg_core::tree::{Counter, Kind, LimitPatch, Mode, Overhead, Tree};
use memcg_core::units::{Limit, Pages};

use crate::nodes;

fn limit(pages: u64) -> Option<Limit> {
    Some(Limit::Pages(Pages(pages)))
}

/// A bomb of vCPUs ends at `floor(K / size)`, before the thread exists; one that ends makes room for exactly one more,
/// and a sibling does not notice.
/// Semantics: 56, 98.
#[test]
fn a_bomb_of_vcpus_ends_at_its_own_limit() {
    let mut tree = Tree::new(Limit::Pages(Pages(10_000)));
    let root = tree.root();
    let [bomber, sibling] = ["bomber", "sibling"].map(|name| nodes::vm(&mut tree, root, name));
    tree.set_limits(bomber, &LimitPatch { vmm_max: limit(100), ..LimitPatch::default() }).unwrap();
    let vcpu = Kind::Overhead(Overhead::Vcpu);
    let bomb = |tree: &mut Tree| {
        (0..1000).take_while(|_| tree.try_charge_as(bomber, vcpu, Pages(9), Mode::NoWait).is_ok()).count()
    };
    assert_eq!(bomb(&mut tree), 11);
    tree.uncharge_as(bomber, vcpu, Pages(9));
    assert_eq!(bomb(&mut tree), 1);
    let _ = tree.try_charge_as(sibling, vcpu, Pages(9), Mode::NoWait).unwrap();
    for _ in 0..11 {
        tree.uncharge_as(bomber, vcpu, Pages(9));
    }
    assert_eq!(tree.snapshot(bomber).vmm.usage, Pages::ZERO);
}

/// Each type of overhead is shown by itself and returned as what it was: one cannot be uncharged as another.
/// Semantics: 76, T13.
#[test]
fn overhead_is_shown_by_type() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let vm = nodes::vm(&mut tree, root, "vm");
    for (n, overhead) in (1..).zip(Overhead::ALL) {
        let _ = tree.try_charge_as(vm, Kind::Overhead(overhead), Pages(n), Mode::NoWait).unwrap();
    }
    let node = tree.snapshot(vm);
    let parts: Vec<u64> = node.overhead.iter().map(|(_, pages)| pages.0).collect();
    assert_eq!((parts, node.vmm.usage, node.memory.usage), (vec![1, 2, 3, 4, 5], Pages(15), Pages(15)));
    assert_eq!(tree.snapshot(root).overhead.get(Overhead::Worker), Pages::ZERO, "of the node itself");
    tree.uncharge_as(vm, Kind::Overhead(Overhead::Worker), Pages(5));
    let node = tree.snapshot(vm);
    assert_eq!((node.overhead.get(Overhead::Worker), node.vmm.usage), (Pages::ZERO, Pages(10)));
    assert_eq!(tree.check(), []);
}

/// What is charged as one type is not uncharged as another, although the sum would allow it.
/// Semantics: B65, B66, B84.
#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "uncharge of 2 pages")]
fn overhead_is_not_uncharged_as_another_type() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let vm = nodes::vm(&mut tree, root, "vm");
    let _ = tree.try_charge_as(vm, Kind::Overhead(Overhead::Queue), Pages(2), Mode::NoWait).unwrap();
    tree.uncharge_as(vm, Kind::Overhead(Overhead::Vcpu), Pages(2));
}

/// The store is memory with a cap of its own, which is asked first.
/// Semantics: 14.
#[test]
fn the_store_is_memory_with_a_cap() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let vm = nodes::vm(&mut tree, root, "vm");
    tree.set_limits(vm, &LimitPatch { store_max: limit(5), max: limit(8), ..LimitPatch::default() }).unwrap();
    let _ = tree.try_charge_as(vm, Kind::Store, Pages(5), Mode::NoWait).unwrap();
    let _ = tree.try_charge(vm, Pages(3), Mode::NoWait).unwrap();
    let refused = tree.try_charge_as(vm, Kind::Store, Pages(1), Mode::NoWait).unwrap_err();
    assert_eq!((refused.counter, refused.usage, refused.limit), (Counter::Store, Pages(5), limit(5).unwrap()));
    assert_eq!(refused.to_string(), "store: 20K in use of 20K, short by 4K");
    tree.set_limits(vm, &LimitPatch { store_max: limit(6), ..LimitPatch::default() }).unwrap();
    let refused = tree.try_charge_as(vm, Kind::Store, Pages(1), Mode::NoWait).unwrap_err();
    assert_eq!((refused.counter, refused.short_by), (Counter::Memory, Pages(1)));
    let node = tree.snapshot(vm);
    assert_eq!((node.store.usage, node.memory.usage, node.vmm.usage), (Pages(5), Pages(8), Pages::ZERO));
    assert_eq!((node.store.would_block, node.memory.would_block), (1, 1));
    tree.uncharge_as(vm, Kind::Store, Pages(5));
    assert_eq!((tree.usage(vm), tree.snapshot(root).store.usage), (Pages(3), Pages::ZERO));
}

/// One limit covers everything that is in memory, and usage is the sum of it; swap is not in it.
/// Semantics: 14, 57.
#[test]
fn one_limit_covers_everything_in_memory() {
    for last in Kind::ALL {
        let mut tree = Tree::new(Limit::Max);
        let root = tree.root();
        let vm = nodes::vm(&mut tree, root, "vm");
        tree.set_limits(vm, &LimitPatch::max(Limit::Pages(Pages(70)))).unwrap();
        for kind in Kind::ALL {
            let _ = tree.try_charge_as(vm, kind, Pages(10), Mode::Wait).unwrap();
        }
        let node = tree.snapshot(vm);
        assert_eq!((node.memory.usage, node.swap.usage), (Pages(70), Pages(10)));
        assert_eq!((node.vmm.usage, node.store.usage), (Pages(50), Pages(10)));
        let more = tree.try_charge_as(vm, last, Pages(1), Mode::Wait);
        if last == Kind::Swap {
            assert!(more.is_ok());
        } else {
            assert_eq!(more.unwrap_err().counter, Counter::Memory, "{last:?}");
        }
    }
}

/// Where the limit on overhead is, decides who refuses: none, memory's alone; a lower one, itself; a higher one, memory's,
/// and then overhead is only watched.
/// Semantics: 56, 57, 114.
#[test]
fn three_ways_to_limit_overhead() {
    for (vmm_max, granted, refuser) in
        [(None, 20, Counter::Memory), (Some(5), 5, Counter::Vmm), (Some(30), 20, Counter::Memory)]
    {
        let mut tree = Tree::new(Limit::Max);
        let root = tree.root();
        let vm = nodes::vm(&mut tree, root, "vm");
        let vmm_max = vmm_max.and_then(limit).or(Some(Limit::Max));
        tree.set_limits(vm, &LimitPatch { max: limit(20), vmm_max, ..LimitPatch::default() }).unwrap();
        let queue = Kind::Overhead(Overhead::Queue);
        let mut refused = None;
        let count = (0..100)
            .take_while(|_| {
                refused = tree.try_charge_as(vm, queue, Pages(1), Mode::Wait).err();
                refused.is_none()
            })
            .count();
        let node = tree.snapshot(vm);
        assert_eq!((count, refused.map(|refused| refused.counter)), (granted, Some(refuser)));
        let expected = if refuser == Counter::Vmm { (1, 0, 0) } else { (0, 1, 1) };
        assert_eq!(
            (node.vmm.failcnt, node.memory.failcnt, node.events.max),
            expected,
            "only memory's is a reason to act"
        );
    }
}

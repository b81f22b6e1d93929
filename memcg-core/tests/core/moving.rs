//! A VM or group moves with all its charges, or not at all.

use memcg_core::tree::{Counter, Kind, LimitPatch, Mode, MoveError, Moved, NodeId, NodeSnapshot, Overhead, Tree};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

use crate::nodes::{group, vm};

/// `/ → a → vm`, `/ → b`, `/ → top → c → other`.
struct World {
    tree: Tree,
    a: NodeId,
    b: NodeId,
    top: NodeId,
    c: NodeId,
    vm: NodeId,
    other: NodeId,
}

fn world() -> World {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let [a, b, top] = ["a", "b", "top"].map(|name| group(&mut tree, root, name));
    let c = group(&mut tree, top, "c");
    let other = vm(&mut tree, c, "other");
    let vm = vm(&mut tree, a, "vm");
    World { tree, a, b, top, c, vm, other }
}

fn limit(pages: u64) -> Option<Limit> {
    Some(Limit::Pages(Pages(pages)))
}

const VCPU: Kind = Kind::Overhead(Overhead::Vcpu);

impl World {
    /// 100 guest pages, 10 overhead, 5 store, 20 swap.
    fn fill(&mut self) {
        for (kind, pages) in [(Kind::Guest, 100), (VCPU, 10), (Kind::Store, 5), (Kind::Swap, 20)] {
            let _ = self.tree.try_charge_as(self.vm, kind, Pages(pages), Mode::Wait).unwrap();
        }
    }

    fn set(&mut self, id: NodeId, patch: LimitPatch) {
        self.tree.set_limits(id, &patch).unwrap();
    }

    /// Memory, vmm, store, swap.
    fn usage(&self, id: NodeId) -> [u64; 4] {
        let node = self.tree.snapshot(id);
        [node.memory, node.vmm, node.store, node.swap].map(|counter| counter.usage.0)
    }

    fn all(&self) -> Vec<(NodeId, NodeSnapshot)> {
        self.tree.ids().map(|id| (id, self.tree.snapshot(id))).collect()
    }
}

/// What was charged before the move counts in the new group and no longer in the old one, overhead included; later
/// uncharges reach the new ancestors.
/// Semantics: 33, 100, T19.
#[test]
fn everything_charged_moves_along() {
    let mut w = world();
    w.fill();
    assert!(matches!(w.tree.move_node(w.vm, w.c), Ok(Moved::Moved(_))));
    assert_eq!((w.tree.path(w.vm), w.tree.find("/a/vm")), ("/top/c/vm".to_owned(), None));
    assert_eq!((w.usage(w.a), w.usage(w.c), w.usage(w.top)), ([0; 4], [115, 10, 5, 20], [115, 10, 5, 20]));
    assert_eq!(w.tree.snapshot(w.vm).overhead.get(Overhead::Vcpu), Pages(10));
    w.tree.uncharge_as(w.vm, VCPU, Pages(10));
    w.tree.uncharge(w.vm, Pages(100));
    assert_eq!((w.usage(w.top), w.usage(w.tree.root())), ([5, 0, 5, 20], [5, 0, 5, 20]));
    assert_eq!(w.tree.check(), []);
}

/// The common ancestor sees nothing: no peak, no failure, even when it is full to the last page.
/// Semantics: 89.
#[test]
fn the_common_ancestor_sees_nothing() {
    let mut w = world();
    w.fill();
    let root = w.tree.root();
    w.set(root, LimitPatch { max: limit(115), swap_max: limit(20), vmm_max: limit(10), ..LimitPatch::default() });
    let before = w.tree.snapshot(root);
    for to in [w.b, w.c, w.top, root, w.a] {
        assert!(matches!(w.tree.move_node(w.vm, to), Ok(Moved::Moved(_))));
        assert_eq!(w.tree.snapshot(root), NodeSnapshot { members: w.tree.snapshot(root).members, ..before.clone() });
        assert_eq!(w.tree.check(), []);
    }
    // Inside one group, the group is the common ancestor.
    let inner = group(&mut w.tree, w.a, "inner");
    w.set(w.a, LimitPatch::max(Limit::Pages(Pages(115))));
    let before = w.tree.snapshot(w.a);
    assert!(matches!(w.tree.move_node(w.vm, inner), Ok(Moved::Moved(_))));
    assert_eq!(w.tree.snapshot(w.a), NodeSnapshot { members: 1, ..before });
}

/// A move to where it is already says so, and changes nothing; a move of what is no VM or group is an error.
/// Semantics: 32, B23.
#[test]
fn a_move_to_the_same_group_is_reported() {
    let mut w = world();
    w.fill();
    let before = w.all();
    assert_eq!(w.tree.move_node(w.vm, w.a), Ok(Moved::Unchanged));
    assert_eq!(w.tree.move_node(w.tree.root(), w.a), Err(MoveError::Root));
    assert_eq!(w.all(), before);
}

/// Each counter of each new ancestor must have room, ceilings included; the error has the level and the numbers, and
/// nothing has changed, not even a count of failures.
/// Semantics: 33, B25.
#[test]
fn a_move_that_does_not_fit_is_refused_whole() {
    let patch = LimitPatch::default();
    let cases = [
        (LimitPatch { vmm_max: limit(9), ..patch }, Counter::Vmm, 9, 1),
        (LimitPatch { store_max: limit(4), ..patch }, Counter::Store, 4, 1),
        (LimitPatch { max: limit(100), ..patch }, Counter::Memory, 100, 15),
        (LimitPatch { swap_max: limit(0), ..patch }, Counter::Swap, 0, 20),
        // The counter that cannot be reclaimed is asked first.
        (LimitPatch { max: limit(0), vmm_max: limit(0), ..patch }, Counter::Vmm, 0, 10),
    ];
    for (patch, counter, max, short) in cases {
        for upper in [true, false] {
            let mut w = world();
            w.fill();
            let level = if upper { w.top } else { w.c };
            w.set(level, patch);
            let before = w.all();
            let Err(MoveError::NoRoom { name, path, refused }) = w.tree.move_node(w.vm, w.c) else {
                panic!("it does not fit");
            };
            assert_eq!((name.as_str(), path), ("vm", w.tree.path(level)));
            assert_eq!((refused.level, refused.counter), (level, counter));
            assert_eq!((refused.limit, refused.short_by), (Limit::Pages(Pages(max)), Pages(short)));
            assert_eq!(w.all(), before);
        }
    }
    let mut w = world();
    w.fill();
    w.set(w.c, LimitPatch::max(Limit::Pages(Pages(1000))));
    w.tree.set_ceiling(w.c, Some(Pages(114)));
    let error = w.tree.move_node(w.vm, w.c).unwrap_err();
    let told = "\"vm\" does not fit /top/c (memory: 0 in use of 456K, short by 4K): raise that limit, or free \
                memory first";
    assert_eq!(error.to_string(), told);
    w.tree.set_ceiling(w.c, Some(Pages(115)));
    assert!(w.tree.move_node(w.vm, w.c).is_ok());
}

/// Where a node can be: not below itself, not where its name is taken, not too deep, not below a VM or what is being
/// removed.
/// Semantics: 32, 33.
#[test]
fn places_that_are_refused() {
    let mut w = world();
    w.fill();
    let _ = w.tree.try_charge(w.other, Pages(1), Mode::Wait).unwrap();
    let twin = vm(&mut w.tree, w.b, "vm");
    let deep = (0..5).fold(w.c, |at, _| group(&mut w.tree, at, "deep"));
    let gone = group(&mut w.tree, w.b, "gone");
    w.tree.set_offline(gone).unwrap();
    let before = w.all();
    let refused = [
        (w.top, w.top, "\"top\" cannot be moved to /top, which is \"top\" itself or below it"),
        (w.top, w.c, "\"top\" cannot be moved to /top/c, which is \"top\" itself or below it"),
        (w.vm, w.other, "\"other\" is a VM with memory of its own: only groups can have members"),
        (w.vm, w.b, "/b has a member \"vm\" already: remove or move that one first"),
        (w.vm, deep, "\"vm\" has 0 levels of members and /top/c/deep/deep/deep/deep/deep is 7 deep: 7 are possible"),
        (w.top, w.a, "\"top\" has 6 levels of members and /a is 1 deep: 7 are possible"),
        (w.vm, gone, "the group \"gone\" is being removed: choose another"),
        (gone, w.c, "\"gone\" is being removed: what is charged to it returns where it is"),
    ];
    for (id, to, told) in refused {
        assert_eq!(w.tree.move_node(id, to).unwrap_err().to_string(), told);
        assert_eq!(w.all(), before);
    }
    // The name of what is being removed is free.
    w.tree.set_offline(twin).unwrap();
    assert!(w.tree.move_node(w.vm, w.b).is_ok());
}

/// A group moves with its members, and only the levels between change.
/// Semantics: 33, 89.
#[test]
fn a_group_moves_with_its_members() {
    let mut w = world();
    w.fill();
    let _ = w.tree.try_charge(w.other, Pages(7), Mode::Wait).unwrap();
    let second = vm(&mut w.tree, w.a, "second");
    assert!(w.tree.move_node(w.a, w.c).is_ok());
    assert_eq!(w.tree.path(w.vm), "/top/c/a/vm");
    assert_eq!((w.usage(w.a), w.usage(w.c), w.usage(w.vm)), ([115, 10, 5, 20], [122, 10, 5, 20], [115, 10, 5, 20]));
    assert_eq!([w.top, w.tree.root()].map(|id| w.tree.snapshot(id).members), [3, 4]);
    // Depths are right below too: the deepest place is found there, and not one further.
    let full = (0..3).fold(second, |at, _| group(&mut w.tree, at, "x"));
    assert!(w.tree.add(full, "x").is_err());
    assert_eq!(w.tree.check(), []);
}

/// Members of an accounted group are accounted: what is not must be activated first. The other way round it stays on.
/// Semantics: 73, 94.
#[test]
fn accounting_is_not_lost_or_gained_by_a_move() {
    let mut w = world();
    let plain = w.tree.add(w.tree.root(), "plain").unwrap();
    let new = w.tree.add(plain, "new").unwrap();
    let error = w.tree.move_node(new, w.b).unwrap_err();
    assert!(matches!(error, MoveError::NotAccounted { .. }), "{error}");
    assert!(w.tree.move_node(new, w.tree.root()).is_ok(), "the root takes everybody");
    w.tree.activate(new, |_| Pages(3)).unwrap();
    assert!(w.tree.move_node(new, w.b).is_ok());
    assert_eq!(w.usage(w.b)[0], 3);
    assert!(w.tree.move_node(w.vm, plain).is_ok());
    let _ = w.tree.try_charge(w.vm, Pages(1), Mode::Wait).unwrap();
    assert_eq!((w.usage(plain)[0], w.tree.check()), (1, vec![]));
}

/// What goes above `high` at the destination is a crossing, once; what was above already is none.
/// Semantics: 115.
#[test]
fn a_move_crosses_high_at_the_destination() {
    let mut w = world();
    w.fill();
    for (id, high) in [(w.c, 114), (w.top, 115)] {
        w.set(id, LimitPatch { high: limit(high), ..LimitPatch::default() });
    }
    let Ok(Moved::Moved(crossed)) = w.tree.move_node(w.vm, w.c) else { panic!("it fits") };
    assert_eq!(crossed.iter().collect::<Vec<_>>(), [w.c]);
    let _ = w.tree.try_charge(w.other, Pages(1), Mode::Wait).unwrap();
    let _ = w.tree.try_charge(w.b, Pages(1), Mode::Wait).unwrap();
    let Ok(Moved::Moved(crossed)) = w.tree.move_node(w.b, w.c) else { panic!("it fits") };
    assert!(crossed.is_empty(), "above high before and after");
}

/// A charge names its node, not its group: charged before a move, it is uncharged after it from where the VM is now;
/// and a move that happens between two steps of a charge finds it either wholly charged or not at all.
/// Semantics: 34, 78.
#[test]
fn a_charge_follows_its_vm() {
    let mut w = world();
    let reserved = w.tree.reserve(w.vm, Pages(4), Mode::Wait).unwrap();
    let charge = reserved.commit();
    let _ = w.tree.move_node(w.vm, w.c).unwrap();
    assert_eq!((w.usage(w.a)[0], w.usage(w.top)[0]), (0, 4));
    w.tree.uncharge(w.vm, charge.pages);
    assert_eq!((w.usage(w.a)[0], w.usage(w.top)[0], w.tree.check()), (0, 0, vec![]));
}

/// Nobody's references leak by moving: after a thousand moves both groups can be removed as soon as they are empty.
/// Semantics: 134, B105.
#[test]
fn a_thousand_moves_leave_both_groups_as_they_were() {
    let mut w = world();
    w.fill();
    let before = [w.a, w.b].map(|id| w.tree.snapshot(id));
    for _ in 0..500 {
        let _ = w.tree.move_node(w.vm, w.b).unwrap();
        let _ = w.tree.move_node(w.vm, w.a).unwrap();
    }
    assert_eq!(w.tree.snapshot(w.a), before[0]);
    assert_eq!(w.usage(w.b), [0; 4]);
    w.tree.remove(w.b).unwrap();
    w.tree.uncharge_all(w.vm);
    w.tree.remove(w.vm).unwrap();
    w.tree.remove(w.a).unwrap();
}

proptest! {
    #![proptest_config(crate::cases::cases(100))]

    /// However a VM is moved about while its guest touches and gives memory, the groups together are charged what is
    /// resident, and nothing is lost.
    /// Semantics: 34.
    #[test]
    fn nothing_is_lost_between_groups(steps in prop::collection::vec((0usize..4, 0u64..50, 0u64..50), 1..100)) {
        let mut w = world();
        let mut resident = 0;
        for (to, touched, given) in steps {
            let _ = w.tree.try_charge(w.vm, Pages(touched), Mode::Wait).unwrap();
            resident += touched;
            let _ = w.tree.move_node(w.vm, [w.a, w.b, w.c, w.tree.root()][to]).unwrap();
            let given = given.min(resident);
            w.tree.uncharge(w.vm, Pages(given));
            resident -= given;
            let groups: u64 = [w.a, w.b, w.top].iter().map(|id| w.usage(*id)[0]).sum();
            let alone = if to == 3 { resident } else { 0 };
            prop_assert_eq!((w.usage(w.vm)[0], groups + alone), (resident, resident));
            prop_assert_eq!(w.tree.check(), vec![]);
        }
    }
}

//! Birth, going offline, the last uncharge, and being freed exactly once.

use memcg_core::tree::{
    Accounting, AddError, Kind, LimitPatch, Mode, NodeId, Overhead, RemoveError, SetLimitError, Tree,
};
use memcg_core::units::{Limit, Pages};

use crate::nodes::{self, Family, family};

impl Family {
    fn charge(&mut self, id: NodeId, pages: u64) {
        let _ = self.tree.try_charge(id, Pages(pages), Mode::NoFail).unwrap();
    }
}

/// A name can be used again while the charges of the one before are still there, and the new one starts from zero.
/// Semantics: 2, 20, 90.
#[test]
fn a_charged_node_outlives_its_name() {
    let mut f = family();
    f.charge(f.vm, 2);
    assert!(matches!(f.tree.remove(f.vm), Err(RemoveError::Charged { usage: Pages(2), .. })));
    f.tree.set_offline(f.vm).unwrap();
    f.tree.set_offline(f.vm).unwrap();
    assert_eq!(f.tree.find("/group/vm"), None);
    let again = nodes::vm(&mut f.tree, f.group, "vm");
    assert_eq!(f.tree.snapshot(again).memory.usage, Pages::ZERO);
    assert_eq!((f.tree.usage(f.group), f.tree.reap()), (Pages(2), vec![]));
    assert_eq!(
        f.tree.zombies().map(|id| (f.tree.path(id), f.tree.usage(id).0)).collect::<Vec<_>>(),
        [("/group/vm".to_owned(), 2)]
    );
    f.tree.uncharge(f.vm, Pages(2));
    assert!(f.tree.contains(f.vm), "an uncharge, which may be on a fault's path, frees nothing");
    assert_eq!((f.tree.reap(), f.tree.reap()), (vec![f.vm], vec![]));
    assert!(!f.tree.contains(f.vm) && f.tree.contains(again));
    let reused = f.tree.add(f.group, "other").unwrap();
    assert!(reused != f.vm && !f.tree.contains(f.vm), "ids are not reused");
    assert_eq!(f.tree.check(), []);
}

/// What is in flight when its VM goes ends against the dying node: a fault is refused there, teardown is not, and a
/// refund finds its charge.
/// Semantics: 77, 79, B85.
#[test]
fn what_is_in_flight_ends_against_the_dying_node() {
    let mut f = family();
    f.charge(f.vm, 3);
    f.tree.set_offline(f.vm).unwrap();
    for mode in [Mode::Wait, Mode::Again, Mode::NoWait, Mode::NoRetry] {
        let before = f.tree.snapshot(f.vm);
        assert_eq!(f.tree.try_charge(f.vm, Pages(1), mode).unwrap_err().level, f.vm);
        assert_eq!(f.tree.charge_up_to(f.vm, Pages(8), Pages(0), mode).unwrap().pages, Pages::ZERO);
        assert_eq!(f.tree.snapshot(f.vm), before);
    }
    let _ = f.tree.try_charge_as(f.vm, Kind::Overhead(Overhead::Worker), Pages(1), Mode::NoFail).unwrap();
    f.tree.uncharge(f.vm, Pages(3));
    assert_eq!(f.tree.reap(), []);
    assert_eq!(f.tree.uncharge_all(f.vm), Pages(1));
    assert_eq!(f.tree.reap(), [f.vm]);
}

/// A group stays as long as a VM lives in it, and takes no new one once it goes.
/// Semantics: 13, B7.
#[test]
fn a_group_does_not_go_before_its_vms() {
    let mut f = family();
    assert!(matches!(f.tree.remove(f.group), Err(RemoveError::HasChildren { children: 2, .. })));
    assert!(matches!(f.tree.set_offline(f.group), Err(RemoveError::HasChildren { children: 2, .. })));
    assert_eq!(f.tree.remove(f.tree.root()), Err(RemoveError::Root));
    assert_eq!(f.tree.set_returning(f.tree.root()), Err(RemoveError::Root));
    f.charge(f.vm, 1);
    f.tree.set_offline(f.vm).unwrap();
    let refused = f.tree.set_offline(f.group).unwrap_err();
    assert_eq!(refused.to_string(), "\"group\" has members (1): remove or move them first");
    f.tree.remove(f.sibling).unwrap();
    f.tree.set_offline(f.group).unwrap();
    assert_eq!(f.tree.add(f.group, "late"), Err(AddError::ParentOffline("group".to_owned())));
    assert!(f.tree.move_node(f.uncle, f.group).is_err());
    assert!(matches!(f.tree.remove(f.group), Err(RemoveError::Charged { usage: Pages(1), .. })), "the zombie's");
    assert_eq!(f.tree.check(), []);
}

/// Every order of destroying a VM, destroying its group, and the uncharges, with a look for what can be freed after
/// each step: each is freed exactly once, as soon as it may be, the child first.
/// Semantics (table): 88, 91, 92, 97, B58, B59, B67, T22.
#[test]
fn every_order_of_destroying_and_uncharging_frees_once() {
    let orders = permutations(&[0, 1, 2, 3, 4]);
    assert_eq!(orders.len(), 120);
    for order in orders {
        let mut f = family();
        f.tree.remove(f.sibling).unwrap();
        f.charge(f.vm, 5);
        let _ = f.tree.try_charge_as(f.vm, Kind::Swap, Pages(2), Mode::Wait).unwrap();
        let mut freed = Vec::new();
        let (mut left, mut vm_offline, mut group_wanted) = (3, false, false);
        for step in &order {
            match step {
                0 => f.tree.set_offline(f.vm).unwrap(),
                1 => group_wanted = true,
                2 => f.tree.uncharge(f.vm, Pages(4)),
                3 => f.tree.uncharge(f.vm, Pages(1)),
                _ => f.tree.uncharge_as(f.vm, Kind::Swap, Pages(2)),
            }
            vm_offline |= *step == 0;
            left -= usize::from(*step >= 2);
            if group_wanted && f.tree.contains(f.group) {
                assert_eq!(f.tree.set_offline(f.group).is_ok(), vm_offline || !f.tree.contains(f.vm));
            }
            freed.extend(f.tree.reap());
            let vm_free = vm_offline && left == 0;
            let expected = [(vm_free, f.vm), (vm_free && group_wanted, f.group)];
            let expected: Vec<NodeId> = expected.into_iter().filter(|(free, _)| *free).map(|(_, id)| id).collect();
            assert_eq!(freed, expected, "{order:?} after step {step}");
            assert_eq!(f.tree.check(), []);
        }
    }
}

fn permutations(of: &[usize]) -> Vec<Vec<usize>> {
    if of.is_empty() {
        return vec![Vec::new()];
    }
    let first = |n: &usize| {
        let n = *n;
        let rest: Vec<usize> = of.iter().copied().filter(|other| *other != n).collect();
        permutations(&rest).into_iter().map(move |tail| [vec![n], tail].concat())
    };
    of.iter().flat_map(first).collect()
}

/// Ancestors that become free because of a descendant's last uncharge are freed with it, however many levels.
/// Semantics: 90, B58.
#[test]
fn dead_ancestors_go_with_their_last_descendant() {
    let mut tree = Tree::new(Limit::Max);
    let mut chain = vec![tree.root()];
    for name in ["a", "b", "c", "d"] {
        let id = nodes::group(&mut tree, *chain.last().unwrap(), name);
        chain.push(id);
    }
    let vm = *chain.last().unwrap();
    let _ = tree.try_charge(vm, Pages(1), Mode::Wait).unwrap();
    for id in chain[1..].iter().rev() {
        tree.set_offline(*id).unwrap();
        assert_eq!(tree.reap(), []);
    }
    assert_eq!(tree.accounted(), 4);
    tree.uncharge(vm, Pages(1));
    let upwards: Vec<NodeId> = chain[1..].iter().rev().copied().collect();
    assert_eq!(tree.reap(), upwards);
    assert_eq!((tree.ids().count(), tree.accounted(), tree.check()), (1, 0, vec![]));
}

/// Refused charges leave nothing behind that would keep a node.
/// Semantics: 13, B10, B13.
#[test]
fn refused_charges_do_not_keep_a_node() {
    let mut f = family();
    f.tree
        .set_limits(f.vm, &LimitPatch { max: Some(Limit::ZERO), vmm_max: Some(Limit::ZERO), ..LimitPatch::default() })
        .unwrap();
    for kind in [Kind::Guest, Kind::Overhead(Overhead::Vcpu), Kind::Store] {
        for mode in [Mode::Wait, Mode::Again, Mode::NoWait, Mode::NoRetry] {
            assert!(f.tree.try_charge_as(f.vm, kind, Pages(1), mode).is_err());
            assert!(f.tree.reserve_as(f.vm, kind, Pages(1), mode).is_err());
        }
    }
    drop(f.tree.reserve(f.vm, Pages(1), Mode::NoFail).unwrap());
    f.tree.remove(f.vm).unwrap();
}

/// How many are accounted falls when one is freed, not when it is removed: its charges may outlive it.
/// Semantics: 93, T23.
#[test]
fn accounting_ends_with_the_last_charge() {
    let mut f = family();
    assert_eq!(f.tree.accounted(), 4);
    let plain = f.tree.add(f.tree.root(), "plain").unwrap();
    assert_eq!(f.tree.accounted(), 4);
    f.tree.activate(plain, |_| Pages(1)).unwrap();
    f.tree.activate(plain, |_| Pages(1)).unwrap();
    assert_eq!(f.tree.accounted(), 5);
    f.tree.set_offline(plain).unwrap();
    assert_eq!((f.tree.reap(), f.tree.accounted()), (vec![], 5));
    f.tree.uncharge_all(plain);
    assert_eq!((f.tree.reap(), f.tree.accounted()), (vec![plain], 4));
    for id in [f.vm, f.sibling, f.group, f.uncle] {
        f.tree.remove(id).unwrap();
    }
    assert_eq!((f.tree.accounted(), f.tree.check()), (0, vec![]));
}

/// Overhead lives as long as its thread, and cannot be reclaimed: it does not stop the end of its VM, but its node stays
/// until it is given back.
/// Semantics: 79.
#[test]
fn overhead_that_is_left_does_not_stop_an_end() {
    let mut f = family();
    let tables = Kind::Overhead(Overhead::PageTables);
    let _ = f.tree.try_charge_as(f.vm, tables, Pages(3), Mode::Wait).unwrap();
    assert!(matches!(f.tree.remove(f.vm), Err(RemoveError::Charged { usage: Pages(3), .. })));
    f.tree.set_offline(f.vm).unwrap();
    let node = f.tree.snapshot(f.vm);
    assert_eq!((node.online, node.memory.usage, node.vmm.usage), (false, Pages(3), Pages(3)));
    assert_eq!(f.tree.reap(), []);
    f.tree.uncharge_as(f.vm, tables, Pages(3));
    assert_eq!(f.tree.reap(), [f.vm]);
}

/// A charge that nobody takes back is not forgotten with its node: the node stays in the list of zombies.
/// Semantics: 96.
#[test]
fn a_leak_is_seen() {
    let mut f = family();
    f.charge(f.vm, 10);
    f.tree.set_offline(f.vm).unwrap();
    f.tree.uncharge(f.vm, Pages(9));
    assert_eq!(f.tree.reap(), []);
    assert_eq!(f.tree.zombies().collect::<Vec<_>>(), [f.vm]);
    let told = "\"vm\" still has 1 page charged: taken offline, it goes when they are back";
    assert_eq!(f.tree.remove(f.vm).unwrap_err().to_string(), told);
}

/// After the last step nothing touches a freed node: its id is refused even when its place is taken by another.
/// Semantics: B18, B68.
#[test]
#[should_panic(expected = "the id is of a node of this tree")]
fn the_id_of_a_freed_node_is_of_no_other() {
    let mut f = family();
    f.tree.remove(f.vm).unwrap();
    let other = nodes::vm(&mut f.tree, f.group, "vm");
    f.charge(other, 1);
    f.tree.uncharge(f.vm, Pages(1));
}

/// What is charged to a VM that is gone is in use, not room; but it is known to come back, and how much, at each level.
/// Semantics: 90.
#[test]
fn what_is_returning_is_shown_and_is_not_room() {
    let mut f = family();
    f.tree.set_limits(f.group, &LimitPatch::max(Limit::Pages(Pages(100)))).unwrap();
    f.charge(f.vm, 60);
    let _ = f.tree.try_charge_as(f.vm, Kind::Overhead(Overhead::Vcpu), Pages(4), Mode::Wait).unwrap();
    let _ = f.tree.try_charge_as(f.vm, Kind::Swap, Pages(7), Mode::Wait).unwrap();
    f.charge(f.sibling, 6);
    f.tree.set_returning(f.vm).unwrap();
    f.tree.set_returning(f.vm).unwrap();
    let returning = |f: &Family| [f.tree.root(), f.group, f.vm, f.sibling].map(|id| f.tree.returning(id).0);
    assert_eq!((returning(&f), f.tree.margin(f.sibling)), ([64, 64, 64, 0], Some(Pages(30))));
    assert_eq!(f.tree.snapshot(f.group).returning, Pages(64));
    f.tree.uncharge(f.vm, Pages(20));
    assert_eq!((returning(&f), f.tree.margin(f.sibling)), ([44, 44, 44, 0], Some(Pages(50))));
    f.tree.uncharge(f.sibling, Pages(6));
    let _ = f.tree.try_charge(f.vm, Pages(1), Mode::NoFail).unwrap();
    assert_eq!(returning(&f), [45, 45, 45, 0]);
    let root = f.tree.root();
    assert!(f.tree.move_node(f.vm, root).is_err(), "it returns where it is");
    let other = nodes::group(&mut f.tree, root, "other");
    let _ = f.tree.move_node(f.group, other).unwrap();
    assert_eq!((returning(&f), f.tree.returning(other)), ([45, 45, 45, 0], Pages(45)));
    let _ = f.tree.move_node(f.group, root).unwrap();
    assert_eq!((returning(&f), f.tree.returning(other)), ([45, 45, 45, 0], Pages::ZERO));
    f.tree.uncharge_all(f.vm);
    assert_eq!((returning(&f), f.tree.reap()), ([0; 4], vec![f.vm]));
    assert_eq!(f.tree.check(), []);
}

/// A group that only waits for members that are going is told to go offline, not to remove what cannot be removed.
/// Semantics: 13, 79.
#[test]
fn a_group_of_zombies_is_told_to_wait_for_them() {
    let mut f = family();
    f.charge(f.vm, 3);
    f.tree.set_offline(f.vm).unwrap();
    assert!(matches!(f.tree.remove(f.group), Err(RemoveError::HasChildren { children: 1, .. })), "the sibling");
    f.tree.remove(f.sibling).unwrap();
    let waits = |usage| RemoveError::Charged { name: "group".to_owned(), usage: Pages(usage) };
    assert_eq!(f.tree.remove(f.group), Err(waits(3)));
    f.tree.uncharge(f.vm, Pages(3));
    assert_eq!(f.tree.remove(f.group), Err(waits(0)), "not yet reaped");
    f.tree.set_offline(f.group).unwrap();
    assert_eq!(f.tree.reap(), [f.vm, f.group]);
    assert_eq!(f.tree.check(), []);
}

/// Numbers that no host has do not make the sum of what is returning wrong on the way.
/// Semantics: 90.
#[test]
fn what_is_returning_is_right_up_to_64_bits() {
    let mut f = family();
    f.charge(f.vm, u64::MAX - 100);
    f.tree.set_returning(f.vm).unwrap();
    f.tree.uncharge(f.vm, Pages(5));
    assert_eq!([f.tree.root(), f.group, f.vm].map(|id| f.tree.returning(id)), [Pages(u64::MAX - 105); 3]);
    assert_eq!(f.tree.check(), []);
    assert_eq!(f.tree.uncharge_all(f.vm), Pages(u64::MAX - 105));
    assert_eq!((f.tree.returning(f.tree.root()), f.tree.reap()), (Pages::ZERO, vec![f.vm]));
}

/// Whatever is wrong with what a VM is made of, there is no VM, its name is free and its group can go.
/// Semantics: 9, 13, B5, B63.
#[test]
fn a_node_is_made_whole_or_not_at_all() {
    let mut f = family();
    let plain = f.tree.add(f.tree.root(), "plain").unwrap();
    let one = Limit::Pages(Pages(1));
    let good = LimitPatch { max: Some(one), ..LimitPatch::default() };
    let bad = LimitPatch { min: Some(Limit::Pages(Pages(2))), max: Some(one), ..LimitPatch::default() };
    let late = LimitPatch { if_generation: Some(3), ..good };
    let before: Vec<_> = f.tree.ids().map(|id| (id, f.tree.snapshot(id))).collect();
    let accounted = f.tree.accounted();
    let cases = [
        (plain, "no/name", good, Accounting::On),
        (f.group, "vm", good, Accounting::On),
        (plain, "new", bad, Accounting::On),
        (plain, "new", late, Accounting::On),
        (plain, "new", good, Accounting::Off),
        (f.group, "new", bad, Accounting::Off),
    ];
    for (parent, name, limits, accounting) in cases {
        let error = f.tree.add_with(parent, name, &limits, accounting).unwrap_err();
        let after: Vec<_> = f.tree.ids().map(|id| (id, f.tree.snapshot(id))).collect();
        assert_eq!((after, f.tree.accounted(), f.tree.check()), (before.clone(), accounted, vec![]), "{error}");
    }
    let refused = f.tree.add_with(plain, "new", &good, Accounting::Off).unwrap_err();
    assert!(matches!(refused, AddError::Limits(SetLimitError::NotAccounted { .. })));
    let new = f.tree.add_with(plain, "new", &good, Accounting::On).unwrap();
    assert_eq!((f.tree.limits(new).max, f.tree.accounting(new)), (one, Accounting::On));
    f.tree.remove(new).unwrap();
    f.tree.remove(plain).unwrap();
    let inherits = f.tree.add_with(f.group, "inherits", &good, Accounting::Off).unwrap();
    assert_eq!(f.tree.accounting(inherits), Accounting::On);
}

/// Names, places and depths; an add that fails leaves nothing.
/// Semantics: 9.
#[test]
fn names_and_places() {
    let mut f = family();
    let nodes = f.tree.ids().count();
    for name in ["", "a/b", "..", ".hidden", "-x", "a b", "ü", "x\n", &"n".repeat(65)] {
        assert!(matches!(f.tree.add(f.group, name), Err(AddError::BadName(_))), "{name:?}");
    }
    assert!(matches!(f.tree.add(f.group, "vm"), Err(AddError::Exists(_))));
    let _ = f.tree.try_charge(f.uncle, Pages(1), Mode::Wait).unwrap();
    assert!(matches!(f.tree.add(f.uncle, "x"), Err(AddError::ParentCharged(_))));
    f.tree.set_offline(f.sibling).unwrap();
    assert!(matches!(f.tree.add(f.sibling, "x"), Err(AddError::ParentOffline(_))));
    assert_eq!(f.tree.ids().count(), nodes);
    let mut at = f.vm;
    while let Ok(next) = f.tree.add(at, "deep") {
        at = next;
    }
    assert!(matches!(f.tree.add(at, "deep"), Err(AddError::TooDeep)));
    assert_eq!(f.tree.path(at), "/group/vm/deep/deep/deep/deep/deep");
    assert_eq!(f.tree.find("group/vm/deep"), f.tree.find("/group/vm//deep/"));
    assert_eq!((f.tree.path(f.tree.root()), f.tree.find("/")), ("/".to_owned(), Some(f.tree.root())));
    // A charge through all levels, each with a high, still needs no allocation for its crossings.
    let all: Vec<NodeId> = f.tree.ancestry(at).collect();
    for id in &all {
        f.tree.set_limits(*id, &LimitPatch { high: Some(Limit::Pages(Pages(5))), ..LimitPatch::default() }).unwrap();
    }
    let charge = f.tree.try_charge(at, Pages(10), Mode::Wait).unwrap();
    assert_eq!(charge.crossed_high.iter().collect::<Vec<_>>(), all);
}

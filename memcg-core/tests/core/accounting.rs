//! Accounting is off until it is wanted, and then on for good.

use memcg_core::tree::{Accounting, AddError, Counter, Kind, LimitPatch, Mode, NodeId, SetLimitError, Tree};
use memcg_core::units::{Limit, Pages};

use crate::nodes;

fn max(pages: u64) -> LimitPatch {
    LimitPatch::max(Limit::Pages(Pages(pages)))
}

/// `/ → group → a, b`, nothing accounted.
fn unaccounted() -> (Tree, NodeId, [NodeId; 2]) {
    let mut tree = Tree::new(Limit::Max);
    let group = tree.add(tree.root(), "group").unwrap();
    let vms = ["a", "b"].map(|name| tree.add(group, name).unwrap());
    (tree, group, vms)
}

/// A VM without a limit costs nothing: everything succeeds, in every mode and kind, and nothing is counted anywhere.
/// Semantics: 12, 58, 67.
#[test]
fn while_it_is_off_every_charge_succeeds_without_a_trace() {
    let (mut tree, _, [a, _]) = unaccounted();
    tree.set_limits(tree.root(), &max(0)).unwrap();
    let before: Vec<_> = tree.ids().map(|id| tree.snapshot(id)).collect();
    for kind in Kind::ALL {
        for mode in [Mode::Wait, Mode::Again, Mode::NoWait, Mode::NoRetry, Mode::NoFail] {
            let charge = tree.try_charge_as(a, kind, Pages(7), mode).unwrap();
            assert_eq!((charge.pages, charge.forced_at, charge.crossed_high.is_empty()), (Pages(7), None, true));
            tree.uncharge_as(a, kind, Pages(9));
        }
    }
    assert_eq!(tree.charge_up_to(a, Pages(64), Pages(1), Mode::Wait).unwrap().pages, Pages(64));
    drop(tree.reserve(a, Pages(5), Mode::Wait).unwrap());
    let _ = tree.reserve(a, Pages(5), Mode::Wait).unwrap().commit();
    assert_eq!((tree.margin(a), tree.uncharge_all(a)), (None, Pages::ZERO));
    let after: Vec<_> = tree.ids().map(|id| tree.snapshot(id)).collect();
    assert_eq!(after, before);
    assert_eq!(tree.check(), []);
}

/// Usage means everything from the first moment: what is resident is charged in the step that turns accounting on.
/// Semantics: 67, 68, 94.
#[test]
fn activation_charges_what_is_resident_in_one_step() {
    let (mut tree, group, [a, b]) = unaccounted();
    tree.set_limits(tree.root(), &max(25)).unwrap();
    let resident = |id| Pages(if id == a { 10 } else { 20 });
    let charged = tree.activate(group, resident).unwrap();
    let leaves: Vec<_> = charged.iter().map(|(id, charge)| (*id, charge.pages, charge.forced_at)).collect();
    assert_eq!(leaves, [(a, Pages(10), None), (b, Pages(20), Some(tree.root()))]);
    for id in [group, a, b] {
        assert_eq!(tree.accounting(id), Accounting::On);
    }
    assert_eq!([tree.root(), group, a, b].map(|id| tree.usage(id).0), [30, 30, 10, 20]);
    assert_eq!(tree.snapshot(tree.root()).overcharge, Pages(5), "above the budget, and said so");
    // No page is uncharged that was not charged.
    tree.uncharge(a, Pages(10));
    tree.uncharge(b, Pages(20));
    assert_eq!((tree.usage(tree.root()), tree.check()), (Pages::ZERO, vec![]));
}

/// A second activation changes nothing, and a group charges only those who were not accounted before.
/// Semantics: 70, 73, T18, T25.
#[test]
fn activation_is_for_good_and_counts_nothing_twice() {
    let (mut tree, group, [a, b]) = unaccounted();
    assert_eq!(tree.activate(a, |_| Pages(3)).unwrap().len(), 1);
    assert_eq!((tree.accounting(group), tree.accounting(b)), (Accounting::Off, Accounting::Off));
    assert_eq!(tree.usage(group), Pages(3), "a group shows what its accounted members are charged");
    assert_eq!(tree.activate(a, |_| panic!("it is accounted")), Ok(vec![]));
    let charged = tree.activate(group, |id| if id == b { Pages(4) } else { panic!("it is accounted") }).unwrap();
    assert_eq!(charged.len(), 1);
    assert_eq!(tree.usage(group), Pages(7));
    // No limit and no charge takes it back.
    tree.set_limits(a, &LimitPatch { max: Some(Limit::Max), vmm_max: Some(Limit::Max), ..max(0) }).unwrap();
    tree.uncharge_all(a);
    let _ = tree.try_charge(a, Pages(1), Mode::Wait).unwrap();
    assert_eq!((tree.accounting(a), tree.usage(a)), (Accounting::On, Pages(1)));
}

/// One enum and one step: a node born at any moment around the activation of its parent is wholly on or wholly off.
/// Semantics: 73, B60, B61.
#[test]
fn a_child_is_accounted_from_birth_if_its_parent_is() {
    for born_first in [true, false] {
        let mut tree = Tree::new(Limit::Max);
        let group = tree.add(tree.root(), "group").unwrap();
        assert_eq!(tree.accounting(group), Accounting::Off, "the root's is not passed on");
        let early = born_first.then(|| tree.add(group, "child").unwrap());
        tree.activate(group, |_| Pages::ZERO).unwrap();
        let child = early.unwrap_or_else(|| tree.add(group, "child").unwrap());
        let grandchild = tree.add(child, "grandchild").unwrap();
        assert_eq!([child, grandchild].map(|id| tree.accounting(id)), [Accounting::On; 2]);
        let _ = tree.try_charge(grandchild, Pages(2), Mode::Wait).unwrap();
        assert_eq!(tree.usage(group), Pages(2));
        assert_eq!(tree.check(), []);
    }
    assert_eq!(Tree::new(Limit::Max).accounting(Tree::new(Limit::Max).root()), Accounting::On);
}

/// A limit that limits something needs accounting; writing back what an unlimited node reads as changes nothing.
/// Semantics: 67, 69.
#[test]
fn only_a_real_limit_needs_accounting() {
    let (mut tree, _, [a, _]) = unaccounted();
    let before = tree.snapshot(a);
    let l = tree.limits(a);
    let same = LimitPatch {
        min: Some(l.min),
        low: Some(l.low),
        high: Some(l.high),
        max: Some(l.max),
        swap_max: Some(l.swap_max),
        store_max: Some(l.store_max),
        vmm_max: Some(l.vmm_max),
        if_generation: Some(0),
    };
    assert_eq!(tree.set_limits(a, &same), Ok(0));
    let one = Some(Limit::Pages(Pages(1)));
    let real = [
        LimitPatch { min: one, ..LimitPatch::default() },
        LimitPatch { low: Some(Limit::Max), ..LimitPatch::default() },
        LimitPatch { high: one, ..LimitPatch::default() },
        LimitPatch { swap_max: one, ..LimitPatch::default() },
        LimitPatch { store_max: one, ..LimitPatch::default() },
        LimitPatch { vmm_max: one, ..LimitPatch::default() },
        LimitPatch { min: Some(Limit::ZERO), low: Some(Limit::ZERO), high: Some(Limit::ZERO), ..max(0) },
    ];
    for patch in real {
        let error = tree.set_limits(a, &patch).unwrap_err();
        assert_eq!(error, SetLimitError::NotAccounted { path: "/group/a".to_owned() });
    }
    assert_eq!(tree.snapshot(a), before);
    tree.activate(a, |_| Pages::ZERO).unwrap();
    for patch in real {
        tree.set_limits(a, &patch).unwrap();
    }
}

/// Numbers that do not fit 64 bits are refused before anything has changed.
/// Semantics: B60.
#[test]
fn an_impossible_activation_changes_nothing() {
    let (mut tree, group, [a, b]) = unaccounted();
    let other = nodes::vm(&mut tree, group, "c");
    let _ = tree.try_charge(other, Pages(2), Mode::Wait).unwrap();
    for resident in [[u64::MAX, 1], [u64::MAX - 1, 0], [u64::MAX - 2, 1]] {
        let of = |id| Pages(if id == a { resident[0] } else { resident[1] });
        let refused = tree.activate(group, of).unwrap_err();
        assert_eq!((refused.counter, refused.limit), (Counter::Memory, Limit::Max));
        assert_eq!([group, a, b].map(|id| tree.accounting(id)), [Accounting::Off; 3]);
        assert_eq!(tree.usage(tree.root()), Pages(2));
    }
    assert!(tree.activate(group, |id| Pages(if id == a { u64::MAX - 2 } else { 0 })).is_ok());
}

/// A VM that is not accounted has nothing charged to it, so it may become a group; an accounted one only while empty.
/// Semantics: 9.
#[test]
fn a_charged_node_gets_no_members() {
    let (mut tree, _, [a, b]) = unaccounted();
    let _ = tree.try_charge(a, Pages(1), Mode::Wait).unwrap();
    let member = tree.add(a, "member").unwrap();
    assert_eq!(tree.accounting(member), Accounting::Off);
    tree.activate(b, |_| Pages(1)).unwrap();
    assert_eq!(tree.add(b, "member"), Err(AddError::ParentCharged("b".to_owned())));
}

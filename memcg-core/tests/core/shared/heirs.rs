//! Hand-overs: who inherits what a leaving VM owned, and who hears of it.

use super::*;

/// Nobody goes on paying for memory that it no longer maps, and no page is paid for twice or by nobody.
/// Semantics: 133, B90.
#[test]
fn charges_follow_ownership() {
    let mut h = mapped_by(&[A, B, C]);
    h.touch(A, 0..10);
    h.touch(B, 0..4);
    h.touch(C, 2..8);
    h.touch(C, 20..23);
    assert_eq!(h.usages(), [10, 0, 3, 0]);
    h.leave(A);
    assert_eq!(h.usages(), [0, 4, 4 + 3, 0], "0..4 to B, 4..8 to C, 8..10 are gone");
    assert_eq!(h.resident(), 11);
    h.leave(C);
    assert_eq!((h.usages(), h.resident()), ([0, 4, 0, 0], 4));
    h.leave(B);
    assert_eq!((h.usages(), h.resident()), ([0; 4], 0));
}

/// The owner ends while only a debugger is attached: no heir is looked for, nothing dangles, and nothing is left.
/// Semantics: 124, B103, B108.
#[test]
fn a_debugger_is_no_heir() {
    let mut h = mapped_by(&[A]);
    h.touch(A, 0..4);
    let debugger = h.regions.hold(h.region).unwrap();
    let heard = h.leave(A);
    assert_eq!(heard.iter().map(|h| (h.to, h.pages)).collect::<Vec<_>>(), [(Owner::Root, Pages(4))]);
    h.tree.remove(h.vms[A]).unwrap();
    assert_eq!(
        (0..5).map(|page| h.owner(page)).collect::<Vec<_>>(),
        [[Some(Owner::Root); 4].as_slice(), &[None]].concat()
    );
    assert_eq!(
        h.regions.forget(h.region).unwrap_err().to_string(),
        "shared region 1 is in use (mappings: 0, temporary ones: 1): end them first"
    );
    let _ = h.unhold(debugger);
    assert_eq!((h.root_own(), h.resident()), (0, 0));
    h.regions.forget(h.region).unwrap();
}

/// The same heir on every run: clones of who leaves, then siblings, then anybody, each in the order of joining.
/// Semantics: 126.
#[test]
fn the_nearest_kin_inherits() {
    // In the order of joining, A first: C is a stranger, B or D is what the case says.
    let heir_of = |a: Origin, b: Origin, d: Origin| {
        let mut h = mapped_by(&[]);
        for (vm, origin) in [(A, a), (C, Origin::default()), (B, b), (D, d)] {
            h.map(vm, origin);
            h.touch(vm, 0..1);
        }
        h.leave(A);
        let heir = (0..4).find(|vm| h.owner(0) == h.is(*vm)).unwrap();
        assert_eq!(h.usages()[heir], 1);
        heir
    };
    let (a, b) = (host().vms[A], host().vms[B]);
    let none = Origin::default();
    assert_eq!(heir_of(template(1), template(1), clone_of(a)), D, "a clone before a sibling that came first");
    assert_eq!(heir_of(template(1), clone_of(a), clone_of(a)), B, "the elder clone");
    assert_eq!(heir_of(template(1), template(2), template(1)), D, "a sibling before a stranger that came first");
    assert_eq!(heir_of(clone_of(b), none, clone_of(b)), D, "clones of one VM are siblings");
    assert_eq!(heir_of(template(1), template(2), clone_of(b)), C, "no kin: who came first");
    assert_eq!(heir_of(none, none, none), C, "to have no template is not to have the same one");
}

/// The heirs of a region are looked for among those who map this page: a clone that maps something else is none.
/// Semantics: 127, T29.
#[test]
fn an_heir_maps_the_page() {
    let mut h = host();
    let other = h.regions.declare(Pages(4)).unwrap();
    h.map(A, Origin::default());
    h.map(B, clone_of(h.vms[A]));
    h.map(C, Origin::default());
    h.regions.map(&h.tree, other, h.vms[D], clone_of(h.vms[A])).unwrap();
    h.regions.touch(&mut h.tree, other, h.vms[D], 0, Mode::Wait).unwrap();
    h.touch(A, 0..2);
    h.touch(B, 1..2);
    h.touch(C, 0..2);
    h.leave(A);
    assert_eq!((h.owner(0), h.owner(1)), (h.is(C), h.is(B)));
    assert_eq!(h.usages(), [0, 1, 1, 1]);
}

/// An heir is checked at the moment of the hand-over: without room it takes what fits, and the next takes the rest.
/// Semantics: 127, 128, B20.
#[test]
fn who_has_no_room_inherits_no_more_than_fits() {
    let mut h = mapped_by(&[A, B, C, D]);
    for vm in [A, B, C, D] {
        h.touch(vm, 0..10);
    }
    h.vm_max(B, 3);
    h.vm_max(C, 0);
    h.max(h.right, 5);
    h.leave(A);
    assert_eq!((h.usages(), h.root_own()), ([0, 3, 0, 5], 2));
    assert_eq!((h.owner(2), h.owner(3), h.owner(8)), (h.is(B), h.is(D), Some(Owner::Root)));
    assert_eq!(h.tree.snapshot(h.vms[C]).memory.failcnt, 0, "an heir has not failed");
    // The root's pages stay the root's while somebody maps them, and go with the last one.
    h.vm_max(B, 100);
    h.leave(D);
    assert_eq!((h.usages(), h.root_own()), ([0, 3 + 5, 0, 0], 2));
    h.leave(B);
    assert_eq!((h.usages(), h.root_own(), h.resident()), ([0; 4], 10, 10), "C has no room");
    h.leave(C);
    assert_eq!((h.root_own(), h.resident()), (0, 0));
    assert_eq!(h.tree.check(), []);
}

/// The root's turn cannot fail, not even on a host whose budget has become too small: it is reported as overcharge.
/// Semantics: 77, 128.
#[test]
fn the_root_pays_even_above_its_budget() {
    let mut h = mapped_by(&[A, C]);
    h.touch(A, 0..4);
    h.touch(C, 0..4);
    h.max(h.tree.root(), 3);
    h.leave(A);
    let root = h.tree.snapshot(h.tree.root());
    assert_eq!((h.usages(), h.root_own(), root.overcharge), ([0, 0, 3, 0], 1, Pages(1)));
    h.leave(C);
    assert_eq!((h.root_own(), h.resident()), (0, 0));
}

/// Inside a full group pages change hands all the same: the leaver's charge is taken off first.
/// Semantics: 127.
#[test]
fn a_full_group_is_no_obstacle_within_it() {
    let mut h = mapped_by(&[A, B]);
    h.max(h.left, 6);
    h.max(h.tree.root(), 6);
    h.touch(A, 0..6);
    h.touch(B, 0..6);
    h.leave(A);
    assert_eq!((h.usages(), h.root_own()), ([0, 6, 0, 0], 0));
    assert_eq!(h.tree.snapshot(h.left).memory.peak, Pages(6), "nor is a moment's double charge seen");
}

/// Heirs that end during the hand-over, in any order and even behind our back, are passed over; nothing panics.
/// Semantics: 127, B101, B111.
#[test]
fn a_dead_vm_inherits_nothing() {
    let mut h = mapped_by(&[A, B, C, D]);
    for vm in [A, B, C, D] {
        h.touch(vm, 0..2);
    }
    h.tree.set_offline(h.vms[B]).unwrap();
    // Its node is gone before it has left: a mistake of the caller.
    h.tree.set_offline(h.vms[C]).unwrap();
    h.tree.remove(h.vms[C]).unwrap();
    h.leave(A);
    assert_eq!((h.owner(0), h.tree.usage(h.vms[D])), (h.is(D), Pages(2)));
    h.leave(D);
    assert_eq!((h.owner(0), h.root_own()), (Some(Owner::Root), 2), "only dead ones map it");
    h.leave(C);
    h.leave(B);
    assert_eq!((h.owner(0), h.root_own(), h.resident()), (None, 0, 0));
    assert_eq!(h.leave(B), [], "once more is no harm");
}

/// The hook hears of a change of the paying group, once for each pair, whatever the number of pages; a first touch and
/// a hand-over within a group are none.
/// Semantics: 129, B107.
#[test]
fn the_hook_is_called_once_for_each_change_of_group() {
    let mut h = mapped_by(&[A, B, C, D]);
    h.touch(A, 0..20);
    h.touch(B, 0..5);
    h.touch(C, 3..10);
    h.touch(D, 5..15);
    h.regions.hold(h.region).unwrap();
    h.vm_max(C, 2);
    let heard = h.leave(A);
    let [a, c, d] = [A, C, D].map(|vm| Owner::Vm(h.vms[vm]));
    let told = |from, to, pages| Handover { region: h.region, from, to, pages: Pages(pages) };
    assert_eq!(heard, [told(a, c, 2), told(a, d, 8), told(a, Owner::Root, 5)], "5 went to B, in the same group");
    assert_eq!(h.usages(), [0, 5, 2, 8]);
    let heard = h.leave(D);
    assert_eq!(heard.iter().map(|h| h.to).collect::<Vec<_>>(), [Owner::Root], "C is full");
    // A VM that is in no group: the root as an owner is not the root as its group.
    let mut h = host();
    let root = h.tree.root();
    let loner = vm(&mut h.tree, root, "loner");
    h.vms[A] = loner;
    h.map(A, Origin::default());
    h.touch(A, 0..1);
    h.regions.hold(h.region).unwrap();
    assert_eq!(h.leave(A).iter().map(|h| h.to).collect::<Vec<_>>(), [Owner::Root]);
}

/// Without a hook the same happens.
/// Semantics: 130.
#[test]
fn a_hook_only_listens() {
    let run = |hook: bool| {
        let mut h = mapped_by(&[A, C]);
        h.touch(A, 0..9);
        h.touch(C, 0..4);
        let mut calls = 0;
        let mut count = |_: &Handover| calls += 1;
        let released = h.regions.leave(&mut h.tree, h.vms[A], if hook { Some(&mut count) } else { None });
        assert_eq!(calls, u32::from(hook));
        (h.state(), released)
    };
    assert_eq!(run(true), run(false));
    assert_eq!(run(false).1, Released { freed: Pages(5), handed_over: Pages(4), to_root: Pages(0) });
}

/// A VM that ends keeps its charges until it leaves its regions, then its node can go; it is never its own heir, not even
/// while it is online and its pages are held.
/// Semantics: 131, B111.
#[test]
fn a_vm_leaves_its_regions_before_its_node_goes() {
    for offline in [true, false] {
        let mut h = mapped_by(&[A, B]);
        let a = h.vms[A];
        h.touch(A, 0..3);
        h.touch(B, 0..1);
        let hold = h.regions.hold(h.region).unwrap();
        if offline {
            h.tree.set_offline(a).unwrap();
        }
        assert!(h.tree.remove(a).is_err(), "its shared pages are still charged");
        let released = h.regions.leave(&mut h.tree, a, None);
        assert_eq!(released, Released { freed: Pages(0), handed_over: Pages(1), to_root: Pages(2) });
        h.tree.remove(a).unwrap();
        assert_eq!((h.owner(0), h.owner(1), h.tree.usage(h.left)), (h.is(B), Some(Owner::Root), Pages(1)));
        assert_eq!(h.unhold(hold).freed, Pages(2));
        let alone = h.regions.leave(&mut h.tree, h.vms[B], None);
        assert_eq!(alone, Released { freed: Pages(1), ..Released::default() }, "it does not find itself");
    }
}

/// Owners are VMs, not threads or processes: while the main thread is dead, being replaced, or its charges return, the
/// VM's group pays, not the root.
/// Semantics: 125, B106.
#[test]
fn charges_do_not_escape_while_a_vm_is_half_dead() {
    let mut h = mapped_by(&[A, B]);
    h.touch(A, 0..8);
    h.touch(B, 0..8);
    h.tree.set_offline(h.vms[A]).unwrap();
    assert_eq!(h.try_touch(B, 3), Ok(Touch::Present(h.is(A).unwrap())));
    assert_eq!((h.usages(), h.root_own(), h.tree.usage(h.left)), ([8, 0, 0, 0], 0, Pages(8)));
    h.leave(A);
    assert_eq!((h.usages(), h.root_own(), h.tree.usage(h.left)), ([0, 8, 0, 0], 0, Pages(8)));
}

/// A VM that replaces its memory object leaves the old one, and only that: the old has one heir, the new one owner.
/// Semantics: 132, B100.
#[test]
fn a_replaced_object_is_handed_over_and_the_new_one_is_not() {
    let mut h = mapped_by(&[A, C]);
    let new = h.regions.declare(Pages(16)).unwrap();
    for vm in [A, C] {
        h.touch(vm, 0..5);
        h.regions.map(&h.tree, new, h.vms[vm], Origin::default()).unwrap();
        for page in 0..7 {
            h.regions.touch(&mut h.tree, new, h.vms[vm], page, Mode::Wait).unwrap();
        }
    }
    let _ = h.regions.unmap(&mut h.tree, h.region, h.vms[A], None).unwrap();
    assert_eq!(h.usages(), [7, 0, 5, 0]);
    assert_eq!((h.owner(4), h.regions.region(new).unwrap().owner(6)), (h.is(C), h.is(A)));
    assert_eq!(h.regions.owned(Owner::Vm(h.vms[A])), Pages(7));
    let mappers: Vec<NodeId> = h.regions.region(h.region).unwrap().mappers().collect();
    assert_eq!(mappers, [h.vms[C]]);
}

/// An owner that moves takes its charges along: not one page is touched for it, the next one is charged where it is now,
/// and who merely shares its pages stays where it is.
/// Semantics: 121, B26.
#[test]
fn an_owner_that_moves_takes_its_charges_along() {
    let mut h = mapped_by(&[A, B]);
    h.touch(A, 0..5);
    h.touch(B, 0..5);
    h.touch(B, 5..7);
    let before = format!("{:?}", h.regions);
    let _ = h.tree.move_node(h.vms[A], h.right).unwrap();
    assert_eq!(format!("{:?}", h.regions), before);
    assert_eq!((h.tree.usage(h.left), h.tree.usage(h.right)), (Pages(2), Pages(5)));
    assert_eq!(h.tree.parent(h.vms[B]), Some(h.left));
    h.touch(A, 7..8);
    assert_eq!((h.tree.usage(h.left), h.tree.usage(h.right)), (Pages(2), Pages(6)));
    // Now they are in different groups, and this hand-over changes who pays.
    assert_eq!(h.leave(A).iter().map(|h| h.pages).collect::<Vec<_>>(), [Pages(5)]);
    assert_eq!((h.tree.usage(h.left), h.tree.usage(h.right)), (Pages(7), Pages(0)));
}

/// A reference belongs to the VM that holds it, a charge to its leaf: a thousand moves of owners and sharers leave both
/// groups with what they had.
/// Semantics: 134, B105.
#[test]
fn a_thousand_moves_leave_references_and_charges_alone() {
    let mut h = mapped_by(&[A, B, C]);
    for vm in [A, B, C] {
        h.touch(vm, 0..3);
    }
    let before = (h.usages(), [h.left, h.right].map(|group| h.tree.snapshot(group).memory.usage));
    let refs = |h: &Host| (0..3).map(|page| h.regions.region(h.region).unwrap().refs(page)).collect::<Vec<_>>();
    for n in 0..1000 {
        let (vm, to) = ([A, B][n / 2 % 2], [h.right, h.left][n % 2]);
        let _ = h.tree.move_node(h.vms[vm], to).unwrap();
        assert_eq!((h.owner(2), refs(&h)), (h.is(A), vec![3; 3]));
    }
    assert_eq!((h.usages(), [h.left, h.right].map(|group| h.tree.snapshot(group).memory.usage)), before);
    for vm in [A, B, C] {
        h.leave(vm);
    }
    assert_eq!((h.tree.usage(h.tree.root()), h.tree.check()), (Pages(0), vec![]));
}

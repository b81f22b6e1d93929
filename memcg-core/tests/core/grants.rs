//! Workers' stocks and the tree that charges for them, together: what is charged ahead of need is bounded, given back on
//! demand, and never a reason to reclaim.

use memcg_core::reclaim::STOCK_CAP;
use memcg_core::stock::Stock;
use memcg_core::tree::{LimitPatch, Mode, NodeId, Tree};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

const RESERVE: Pages = Pages(4);

fn limit(n: u64) -> Limit {
    Limit::Pages(Pages(n))
}

/// A VM's leaf and its worker's stock.
struct Vm {
    id: NodeId,
    stock: Stock,
    granted: u64,
    returned: u64,
}

impl Vm {
    fn new(tree: &mut Tree, parent: NodeId, name: &str) -> Vm {
        let id = crate::nodes::vm(tree, parent, name);
        Vm { id, stock: Stock::new(RESERVE), granted: 0, returned: 0 }
    }

    /// The worker asks and the controller answers; pages that could be granted.
    fn ask(&mut self, tree: &mut Tree, waiting: u64) -> Pages {
        self.report(tree);
        let (want, now) = (self.stock.want(Pages(waiting)), self.stock.want_now(Pages(waiting)));
        let got = match tree.charge_up_to(self.id, want, now, Mode::Wait) {
            Ok(charge) => charge.pages,
            // What cannot wait does not fit: as much of it as does.
            Err(_) => tree.charge_up_to(self.id, now, Pages::ZERO, Mode::NoRetry).unwrap().pages,
        };
        self.granted += got.0;
        self.stock.grant(1, self.granted, tree.stock_max(self.id), tree.margin(self.id)).unwrap();
        got
    }

    /// A beat without faults: the worker asks ahead of need, and gives back what it may not hold.
    fn refill(&mut self, tree: &mut Tree) -> Pages {
        let got = self.ask(tree, 0);
        self.stock.give_back(self.stock.surplus(Pages::ZERO));
        self.report(tree);
        got
    }

    /// The controller learns what was given back.
    fn report(&mut self, tree: &mut Tree) {
        let back = self.stock.returned_total() - self.returned;
        self.returned += back;
        tree.uncharge(self.id, Pages(back));
    }

    fn recall(&mut self, tree: &mut Tree) {
        self.stock.recall();
        self.report(tree);
    }

    /// The guest touches pages; those that could be charged.
    fn touch(&mut self, tree: &mut Tree, pages: u64) -> u64 {
        let mut left = pages;
        while left > 0 {
            if let Some(run) = self.stock.prepare(Pages(left)) {
                let filled = run.pages();
                run.commit(filled);
                left -= filled.0;
            } else if self.ask(tree, left).is_zero() {
                break;
            }
        }
        self.stock.give_back(self.stock.surplus(Pages::ZERO));
        self.report(tree);
        pages - left
    }
}

/// The root has 100 000 pages; a group in a group; a VM in it.
fn nested() -> (Tree, [NodeId; 3], Vm) {
    let mut tree = Tree::new(limit(100_000));
    let root = tree.root();
    let outer = crate::nodes::group(&mut tree, root, "outer");
    let inner = crate::nodes::group(&mut tree, outer, "inner");
    let vm = Vm::new(&mut tree, inner, "vm");
    (tree, [root, outer, inner], vm)
}

/// Whichever level is nearly full, what is charged ahead of need is a small part of what is left there.
/// Semantics: 59, 60, B70.
#[test]
fn the_stock_shrinks_near_the_limit_of_any_ancestor() {
    for level in 0..4 {
        let (mut tree, groups, mut vm) = nested();
        for pages in [20, 40, 80, 160, 320, 640, 1280, 2560, 2560] {
            vm.touch(&mut tree, pages);
            vm.refill(&mut tree);
        }
        assert!(vm.stock.stock() > Pages(1000), "a large batch while there is room");
        vm.recall(&mut tree);
        let used = tree.usage(vm.id).0;
        let id = groups.get(level).copied().unwrap_or(vm.id);
        for room in [800, 80, 8, 1] {
            vm.recall(&mut tree);
            tree.set_limits(id, &LimitPatch::max(limit(used + room))).unwrap();
            vm.refill(&mut tree);
            let held = vm.stock.stock().0;
            assert!(held <= (room / 8).max(1), "level {level}: {held} held with room for {room}");
        }
        vm.recall(&mut tree);
        tree.set_limits(id, &LimitPatch::max(limit(used))).unwrap();
        assert_eq!((tree.stock_max(vm.id), vm.refill(&mut tree)), (Pages::ZERO, Pages::ZERO), "and none at the limit");
    }
}

/// Room for 5 pages: a fault succeeds though a batch does not fit, nobody is asked to reclaim, and what did not fit ahead
/// of need is counted apart.
/// Semantics: 61, B70.
#[test]
fn a_batch_that_does_not_fit_is_no_failure() {
    let (mut tree, _, mut vm) = nested();
    tree.set_limits(vm.id, &LimitPatch::max(limit(RESERVE.0 + 5))).unwrap();
    vm.refill(&mut tree);
    assert_eq!(vm.touch(&mut tree, 5), 5);
    let node = tree.snapshot(vm.id);
    assert_eq!((node.memory.usage, node.memory.failcnt, node.events.max), (Pages(9), 0, 0));
    let _ = tree.charge_up_to(vm.id, Pages(32), Pages::ZERO, Mode::Wait).unwrap();
    let node = tree.snapshot(vm.id);
    assert_eq!((node.memory.failcnt, node.memory.batch_misses, node.events.max), (0, 1, 0));
    assert_eq!(vm.touch(&mut tree, 1), 0, "only a fault that does not fit is one");
    assert_eq!(tree.snapshot(vm.id).memory.failcnt, 1);
}

/// A request for 512 pages with 100 left gets 100, at the first attempt: it is not retried for more, and nobody dies.
/// Semantics: 64, T11, B50.
#[test]
fn a_huge_request_falls_back_to_what_there_is() {
    let (mut tree, _, mut vm) = nested();
    tree.set_limits(vm.id, &LimitPatch::max(limit(100))).unwrap();
    let refused = tree.try_charge(vm.id, Pages(512), Mode::NoRetry).unwrap_err();
    assert_eq!((refused.short_by, tree.usage(vm.id)), (Pages(412), Pages::ZERO), "as a whole it is refused");
    let got = tree.charge_up_to(vm.id, Pages(512), Pages(1), Mode::Wait).unwrap();
    assert_eq!(got.pages, Pages(100));
    vm.granted = 100;
    vm.stock.grant(1, 100, Pages(512), Some(Pages::ZERO)).unwrap();
    let run = vm.stock.prepare(Pages(512)).unwrap();
    assert_eq!(run.pages(), Pages(96), "all but the reserve");
    run.commit(Pages(96));
    let node = tree.snapshot(vm.id);
    assert_eq!((node.memory.failcnt, node.memory.batch_misses, node.events.max), (0, 1, 0));
}

/// Restoring an image into a VM that is too small stops in the middle: what is restored is charged and stays, and it goes
/// on from there when there is room.
/// Semantics: 29.
#[test]
fn bulk_population_reports_partial_progress() {
    let (mut tree, _, mut vm) = nested();
    tree.set_limits(vm.id, &LimitPatch::max(limit(604))).unwrap();
    vm.refill(&mut tree);
    let restored = vm.touch(&mut tree, 1000);
    assert_eq!(restored, 600, "all of max but the reserve");
    assert_eq!((vm.stock.guest(), tree.usage(vm.id)), (Pages(600), Pages(604)));
    assert!(vm.stock.is_balanced() && tree.check().is_empty());
    assert_eq!(vm.touch(&mut tree, 400), 0);
    tree.set_limits(vm.id, &LimitPatch::max(limit(1004))).unwrap();
    assert_eq!(vm.touch(&mut tree, 400), 400);
    assert_eq!((vm.stock.guest(), tree.usage(vm.id)), (Pages(1000), Pages(1004)));
}

/// What one VM holds ahead of need is room for another as soon as it is recalled; the failure is counted once.
/// Semantics: 60, 117.
#[test]
fn a_neighbour_s_stock_is_room() {
    let mut tree = Tree::new(limit(100));
    let root = tree.root();
    let [mut a, mut b] = ["a", "b"].map(|name| Vm::new(&mut tree, root, name));
    b.refill(&mut tree);
    let got = tree.charge_up_to(a.id, Pages(90), Pages(4), Mode::Wait).unwrap().pages;
    a.granted = got.0;
    a.stock.grant(1, got.0, STOCK_CAP, None).unwrap();
    let left = tree.margin(b.id).unwrap();
    let _ = tree.try_charge(b.id, left, Mode::NoRetry).unwrap();
    assert_eq!(tree.try_charge(b.id, Pages(1), Mode::Wait).unwrap_err().level, root);
    a.recall(&mut tree);
    assert_eq!(tree.usage(a.id), RESERVE);
    // Three faults wait, and of what came back exactly so many succeed as there are pages.
    let room = tree.margin(b.id).unwrap().0;
    let served = (0..room + 3).filter(|_| tree.try_charge(b.id, Pages(1), Mode::Again).is_ok()).count() as u64;
    assert_eq!((served, tree.snapshot(root).memory.failcnt), (room, 1));
}

/// A VM that dies with a stock leaves nothing behind.
/// Semantics: 60, 20.
#[test]
fn a_dead_vm_s_stock_is_given_back() {
    let (mut tree, groups, mut vm) = nested();
    vm.touch(&mut tree, 3000);
    vm.refill(&mut tree);
    assert!(vm.stock.stock() > Pages::ZERO);
    assert_eq!(tree.uncharge_all(vm.id), vm.stock.held());
    assert!(groups.iter().all(|id| tree.usage(*id).is_zero()));
    tree.remove(vm.id).unwrap();
}

#[derive(Clone, Debug)]
enum Op {
    Touch(usize, u64),
    Give(usize, u64),
    Beat(usize),
    Recall(usize),
    /// A new `max` for the group or one VM, forced when it is below usage.
    Limit(usize, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let vm = 0usize..3;
    prop_oneof![
        5 => (vm.clone(), 1u64..400).prop_map(|(vm, pages)| Op::Touch(vm, pages)),
        3 => (vm.clone(), 0u64..400).prop_map(|(vm, pages)| Op::Give(vm, pages)),
        1 => vm.clone().prop_map(Op::Beat),
        1 => vm.prop_map(Op::Recall),
        1 => (0usize..4, 0u64..1500).prop_map(|(node, max)| Op::Limit(node, max)),
    ]
}

proptest! {
    /// Three VMs in a group, whatever they do: what is charged is at every moment guest, stock and reserve; the stock is
    /// within its cap when the VM has been answered, and after a recall only the reserve is ahead of the guest.
    /// Semantics (table): 59, 60, 61, B70.
    #[test]
    fn usage_minus_resident_is_stock_and_reserve(ops in prop::collection::vec(op(), 0..60)) {
        let mut tree = Tree::new(Limit::Max);
        let root = tree.root();
        let group = crate::nodes::group(&mut tree, root, "group");
        let mut vms: Vec<_> = (0..3).map(|n| Vm::new(&mut tree, group, &format!("vm{n}"))).collect();
        for op in ops {
            match op {
                Op::Touch(vm, pages) => {
                    let room = tree.margin(vms[vm].id);
                    let before = vms[vm].stock.guest();
                    let touched = vms[vm].touch(&mut tree, pages);
                    let vm = &vms[vm];
                    prop_assert_eq!(vm.stock.guest(), before + Pages(touched));
                    if touched < pages {
                        prop_assert_eq!(tree.margin(vm.id), Some(Pages::ZERO), "of {:?}", room);
                        prop_assert_eq!(vm.stock.stock(), Pages::ZERO);
                    }
                    let cap = STOCK_CAP.min(vm.stock.stock_max());
                    prop_assert!(vm.stock.stock() <= cap);
                }
                Op::Give(vm, pages) => {
                    let vm = &mut vms[vm];
                    vm.stock.uncharge(Pages(pages).min(vm.stock.guest()));
                }
                Op::Beat(vm) => vms[vm].stock.tick(),
                Op::Recall(vm) => {
                    vms[vm].recall(&mut tree);
                    let vm = &vms[vm];
                    prop_assert_eq!(tree.usage(vm.id), vm.stock.guest() + vm.stock.reserve());
                }
                Op::Limit(node, max) => {
                    let id = vms.get(node).map_or(group, |vm| vm.id);
                    tree.set_limits(id, &LimitPatch::max(limit(max))).unwrap();
                }
            }
            for vm in &mut vms {
                prop_assert!(vm.stock.is_balanced());
                prop_assert_eq!(tree.usage(vm.id), vm.stock.guest() + vm.stock.stock() + vm.stock.reserve());
                prop_assert!(vm.stock.reserve() <= RESERVE);
            }
            prop_assert!(tree.check().is_empty());
        }
    }
}

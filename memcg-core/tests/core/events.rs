//! What is counted: events, failures, bypasses; and looking at the whole tree.

use memcg_core::tree::{Counter, CounterSnapshot, Event, Events, Kind, LimitPatch, Mode, NodeId, Overhead, Tree};
use memcg_core::units::{Limit, Pages};

use crate::nodes;

/// `/ → group → vm, sibling`.
struct Family {
    tree: Tree,
    group: NodeId,
    vm: NodeId,
    sibling: NodeId,
}

fn family() -> Family {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let group = nodes::group(&mut tree, root, "group");
    let [vm, sibling] = ["vm", "sibling"].map(|name| nodes::vm(&mut tree, group, name));
    Family { tree, group, vm, sibling }
}

impl Family {
    /// What root, group, VM and sibling show: local and with what is below.
    fn events(&self, of: impl Fn(&Events) -> u64) -> [[u64; 2]; 4] {
        [self.tree.root(), self.group, self.vm, self.sibling].map(|id| {
            let node = self.tree.snapshot(id);
            [of(&node.events_local), of(&node.events)]
        })
    }

    fn set(&mut self, id: NodeId, patch: LimitPatch) {
        self.tree.set_limits(id, &patch).unwrap();
    }
}

fn limit(pages: u64) -> Option<Limit> {
    Some(Limit::Pages(Pages(pages)))
}

/// An event belongs to one level, and every group shows what happened anywhere below; as in cgroup v2.
/// Semantics: 63.
#[test]
fn an_event_counts_at_its_level_and_above() {
    type Of = fn(&Events) -> u64;
    let kinds: [(Event, Of); 6] = [
        (Event::Low, |e| e.low),
        (Event::High, |e| e.high),
        (Event::Max, |e| e.max),
        (Event::Oom, |e| e.oom),
        (Event::OomKill, |e| e.oom_kill),
        (Event::OomPause, |e| e.oom_pause),
    ];
    for (event, of) in kinds {
        let mut f = family();
        f.tree.record(f.vm, event);
        f.tree.record(f.group, event);
        assert_eq!(f.events(of), [[0, 2], [1, 2], [1, 1], [0, 0]], "{event:?}");
        let sum = |e: &Events| e.low + e.high + e.max + e.oom + e.oom_kill + e.oom_pause;
        assert_eq!(f.events(sum)[0], [0, 2], "and nothing else is counted");
    }
}

/// `max` counts where the limit was met, once for each waiting charge; `high` where it was crossed.
/// Semantics: 63, 115, B39.
#[test]
fn the_tree_records_max_and_high_where_they_are_met() {
    let mut f = family();
    f.set(f.group, LimitPatch { max: limit(10), high: limit(5), ..LimitPatch::default() });
    let _ = f.tree.try_charge(f.vm, Pages(6), Mode::Wait).unwrap();
    assert_eq!(f.events(|e| e.high), [[0, 1], [1, 1], [0, 0], [0, 0]]);
    for mode in [Mode::Wait, Mode::Again, Mode::NoWait, Mode::NoRetry] {
        let _ = f.tree.try_charge(f.sibling, Pages(5), mode).unwrap_err();
    }
    assert_eq!(f.events(|e| e.max), [[0, 1], [1, 1], [0, 0], [0, 0]]);
    // The other ways above `high`: a refault, a move, a lower limit.
    f.tree.evict(f.vm, Pages(3), Pages(0)).unwrap();
    let _ = f.tree.refault(f.vm, Pages(3), Pages(0), Mode::Wait).unwrap();
    assert_eq!(f.events(|e| e.high)[1], [2, 2]);
    let root = f.tree.root();
    let _ = f.tree.move_node(f.vm, root).unwrap();
    let _ = f.tree.move_node(f.vm, f.group).unwrap();
    assert_eq!(f.events(|e| e.high)[1], [3, 3]);
    f.set(f.vm, LimitPatch { high: limit(5), ..LimitPatch::default() });
    assert_eq!(f.events(|e| e.high), [[0, 4], [3, 4], [1, 1], [0, 0]]);
}

/// Each counter's peak and failcnt are reset by themselves; a peak stays at least usage, and events count on.
/// Semantics: 66, B69.
#[test]
fn peak_and_failcnt_are_reset_one_by_one() {
    let kinds = [Kind::Guest, Kind::Overhead(Overhead::Queue), Kind::Store, Kind::Swap];
    for (which, kind) in Counter::ALL.into_iter().zip(kinds) {
        let mut f = family();
        let nine = limit(9);
        let patch =
            LimitPatch { max: limit(29), vmm_max: nine, store_max: nine, swap_max: nine, ..LimitPatch::default() };
        f.set(f.vm, patch);
        for kind in kinds {
            let _ = f.tree.try_charge_as(f.vm, kind, Pages(9), Mode::Wait).unwrap();
            let _ = f.tree.try_charge_as(f.vm, kind, Pages(30), Mode::Wait).unwrap_err();
        }
        for kind in kinds {
            f.tree.uncharge_as(f.vm, kind, Pages(5));
        }
        let all = |f: &Family| {
            let node = f.tree.snapshot(f.vm);
            [node.memory, node.vmm, node.store, node.swap].map(|c: CounterSnapshot| (c.peak.0, c.failcnt, c.usage.0))
        };
        let mut expected = [(27, 1, 12), (9, 1, 4), (9, 1, 4), (9, 1, 4)];
        assert_eq!(all(&f), expected);
        f.tree.reset_peak(f.vm, which);
        expected[which as usize].0 = expected[which as usize].2;
        assert_eq!(all(&f), expected, "{kind:?}");
        f.tree.reset_failcnt(f.vm, which);
        expected[which as usize].1 = 0;
        assert_eq!(all(&f), expected);
        let _ = f.tree.try_charge_as(f.vm, kind, Pages(1), Mode::Wait).unwrap();
        expected[which as usize].0 += 1;
        assert_eq!(all(&f)[which as usize].0, expected[which as usize].0, "it starts from now");
        assert_eq!(f.tree.snapshot(f.vm).events.max, 1);
        assert_eq!(f.tree.snapshot(f.group).memory.peak, Pages(27), "the group's are its own");
    }
}

/// Work that names no VM is paid by the root and counted; work that names its VM is charged to that VM alone.
/// Semantics: 10, 19, 77, T16, T24.
#[test]
fn work_without_a_context_is_the_root_s() {
    let mut tree = Tree::new(limit(3).unwrap());
    let charge = tree.charge_root(Kind::Guest, Pages(2)).unwrap();
    assert!(charge.forced_at.is_none(), "the root exists before the first group");
    let root = tree.root();
    let [a, b] = ["a", "b"].map(|name| nodes::vm(&mut tree, root, name));
    // One helper thread works for two VMs.
    for (vm, pages) in [(a, 1), (b, 2), (a, 4)] {
        let _ = tree.try_charge(vm, Pages(pages), Mode::NoFail).unwrap();
    }
    assert_eq!([a, b].map(|id| tree.usage(id).0), [5, 2]);
    let node = tree.snapshot(root);
    assert_eq!((node.memory.own, node.memory.usage, node.overcharge), (Pages(2), Pages(9), Pages(6)));
    assert_eq!((node.memory.forced, tree.snapshot_all().no_context), (2, 1));
    let _ = tree.charge_root(Kind::Overhead(Overhead::Worker), Pages(1)).unwrap();
    assert_eq!(tree.snapshot_all().no_context, 2);
    let _ = tree.charge_root(Kind::Guest, Pages(u64::MAX)).unwrap_err();
    assert_eq!(tree.snapshot_all().no_context, 2);
    tree.uncharge(root, Pages(2));
    tree.uncharge_as(root, Kind::Overhead(Overhead::Worker), Pages(1));
    assert_eq!((tree.usage(root), tree.check()), (Pages(7), vec![]));
}

/// One call shows everything of one moment: a parent is the sum of its members and itself, overhead is never above
/// memory, and who is gone is still there with what it holds.
/// Semantics: 5, 90, B4, B64, B71, T17.
#[test]
fn the_whole_tree_is_one_moment() {
    let mut f = family();
    let vcpu = Kind::Overhead(Overhead::Vcpu);
    let _ = f.tree.try_charge(f.vm, Pages(10), Mode::Wait).unwrap();
    let _ = f.tree.try_charge_as(f.vm, vcpu, Pages(4), Mode::Wait).unwrap();
    let _ = f.tree.try_charge_as(f.sibling, vcpu, Pages(3), Mode::Wait).unwrap();
    let _ = f.tree.charge_root(Kind::Guest, Pages(1)).unwrap();
    f.tree.set_returning(f.vm).unwrap();
    let again = nodes::vm(&mut f.tree, f.group, "vm");
    let all = f.tree.snapshot_all();
    // A copy: what happens later does not change it.
    f.tree.uncharge_all(f.vm);
    let seen: Vec<_> =
        all.nodes.iter().map(|n| (n.path.as_str(), n.node.memory.usage.0, n.node.vmm.usage.0, n.node.online)).collect();
    let expected = [
        ("/", 18, 7, true),
        ("/group", 17, 7, true),
        ("/group/vm", 14, 4, false),
        ("/group/sibling", 3, 3, true),
        ("/group/vm", 0, 0, true),
    ];
    assert_eq!(seen, expected);
    assert_eq!((all.nodes[2].id, all.nodes[4].id, all.nodes[0].node.returning), (f.vm, again, Pages(14)));
    assert_eq!((all.accounted, all.no_context), (4, 1));
}

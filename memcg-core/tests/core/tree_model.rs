//! Random sequences against a model so naive that it cannot be wrong: every sum is computed from scratch.

use memcg_core::reclaim::effective_high;
use memcg_core::tree::{
    Counter, EvictError, Kind, LimitPatch, MAX_LEVELS, Mode, Moved, NodeId, NodeSnapshot, Refused, Tree,
};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

/// What is charged to one node itself, and its limits.
#[derive(Clone, Debug)]
struct Node {
    id: NodeId,
    parent: Option<usize>,
    /// Pages by kind, in the order of [`Kind::ALL`].
    own: [u64; Kind::ALL.len()],
    max: Limit,
    high: Limit,
    vmm_max: Limit,
    store_max: Limit,
    swap_max: Limit,
    ceiling: Option<u64>,
    online: bool,
    returning: bool,
    gone: bool,
}

#[derive(Clone, Debug)]
struct Model {
    nodes: Vec<Node>,
}

/// Which counters a charge moves, in the order in which they are asked.
fn counters(kind: Kind) -> &'static [Counter] {
    match kind {
        Kind::Guest => &[Counter::Memory],
        Kind::Overhead(_) => &[Counter::Vmm, Counter::Memory],
        Kind::Store => &[Counter::Store, Counter::Memory],
        Kind::Swap => &[Counter::Swap],
    }
}

fn index(kind: Kind) -> usize {
    Kind::ALL.iter().position(|other| *other == kind).unwrap()
}

impl Model {
    fn chain(&self, node: usize) -> Vec<usize> {
        std::iter::successors(Some(node), |n| self.nodes[*n].parent).collect()
    }

    /// Own + children, by looking at every node.
    fn usage(&self, node: usize, what: Counter) -> u64 {
        let below = |n: &usize| !self.nodes[*n].gone && self.chain(*n).contains(&node);
        let own = |n: usize| {
            let of = |kind: &&Kind| counters(**kind).contains(&what);
            Kind::ALL.iter().filter(of).map(|kind| self.nodes[n].own[index(*kind)]).sum::<u64>()
        };
        (0..self.nodes.len()).filter(below).map(own).sum()
    }

    /// Memory of those below that are gone.
    fn returning(&self, node: usize) -> u64 {
        let gone = |n: &usize| {
            let other = &self.nodes[*n];
            !other.gone && other.returning && self.chain(*n).contains(&node)
        };
        let memory = |n: usize| self.nodes[n].own.iter().sum::<u64>() - self.nodes[n].own[index(Kind::Swap)];
        (0..self.nodes.len()).filter(gone).map(memory).sum()
    }

    fn limit(&self, node: usize, what: Counter) -> Limit {
        let n = &self.nodes[node];
        match what {
            Counter::Memory => n.max.min(n.ceiling.map_or(Limit::Max, |c| Limit::Pages(Pages(c)))),
            Counter::Vmm => n.vmm_max,
            Counter::Store => n.store_max,
            Counter::Swap => n.swap_max,
        }
    }

    fn fits(&self, node: usize, what: Counter, pages: u64) -> bool {
        Limit::Pages(Pages(self.usage(node, what) + pages)) <= self.limit(node, what)
    }

    /// Who would refuse, and for which counter.
    fn refuser(&self, node: usize, kind: Kind, pages: u64) -> Option<(usize, Counter)> {
        if pages == 0 {
            return None;
        }
        counters(kind).iter().find_map(|what| {
            self.chain(node).into_iter().find(|level| !self.fits(*level, *what, pages)).map(|level| (level, *what))
        })
    }

    /// Offline, without charges and children.
    fn is_free(&self, node: usize) -> bool {
        let n = &self.nodes[node];
        let children = self.nodes.iter().any(|other| !other.gone && other.parent == Some(node));
        !n.gone && !n.online && !children && n.own.iter().all(|pages| *pages == 0)
    }

    fn own(&mut self, node: usize, kind: Kind) -> &mut u64 {
        &mut self.nodes[node].own[index(kind)]
    }
}

#[derive(Clone, Debug)]
enum Op {
    Add(usize),
    Remove(usize),
    Move(usize, usize),
    Offline(usize, bool),
    Reap,
    Charge(usize, Kind, u64, Mode),
    Uncharge(usize, Kind, u64),
    Evict(usize, u64, u64),
    Refault(usize, u64, u64, Mode),
    UpTo(usize, u64, u64),
    Reserve(usize, u64, u64),
    Limits(usize, [Option<u64>; 5]),
    Ceiling(usize, Option<u64>),
}

fn op() -> impl Strategy<Value = Op> {
    let node = 0usize..64;
    let kind = prop_oneof![4 => Just(Kind::Guest), 4 => prop::sample::select(&Kind::ALL[..])];
    let mode =
        prop_oneof![Just(Mode::Wait), Just(Mode::Again), Just(Mode::NoWait), Just(Mode::NoRetry), Just(Mode::NoFail)];
    let pages = prop_oneof![0u64..8, 0u64..600];
    let limit = prop::option::of(0u64..1000);
    prop_oneof![
        2 => node.clone().prop_map(Op::Add),
        1 => node.clone().prop_map(Op::Remove),
        2 => (node.clone(), node.clone()).prop_map(|(n, m)| Op::Move(n, m)),
        1 => (node.clone(), any::<bool>()).prop_map(|(n, returning)| Op::Offline(n, returning)),
        1 => Just(Op::Reap),
        8 => (node.clone(), kind.clone(), pages.clone(), mode.clone()).prop_map(|(n, k, p, m)| Op::Charge(n, k, p, m)),
        5 => (node.clone(), kind, pages.clone()).prop_map(|(n, k, p)| Op::Uncharge(n, k, p)),
        3 => (node.clone(), pages.clone(), 0u64..100).prop_map(|(n, p, s)| Op::Evict(n, p, s)),
        3 => (node.clone(), pages.clone(), 0u64..100, mode).prop_map(|(n, p, s, m)| Op::Refault(n, p, s, m)),
        2 => (node.clone(), pages.clone(), 0u64..4).prop_map(|(n, w, m)| Op::UpTo(n, w, m)),
        2 => (node.clone(), pages.clone(), pages).prop_map(|(n, p, u)| Op::Reserve(n, p, u)),
        3 => (node.clone(), prop::array::uniform5(limit.clone())).prop_map(|(n, limits)| Op::Limits(n, limits)),
        1 => (node, limit).prop_map(|(n, c)| Op::Ceiling(n, c)),
    ]
}

fn to_limit(pages: Option<u64>) -> Limit {
    Limit::from(pages.map(Pages))
}

struct Run {
    tree: Tree,
    model: Model,
}

impl Run {
    fn new() -> Run {
        let tree = Tree::new(Limit::Max);
        let root = Node {
            id: tree.root(),
            parent: None,
            own: [0; Kind::ALL.len()],
            max: Limit::Max,
            high: Limit::Max,
            vmm_max: Limit::Max,
            store_max: Limit::Max,
            swap_max: Limit::Max,
            ceiling: None,
            online: true,
            returning: false,
            gone: false,
        };
        Run { tree, model: Model { nodes: vec![root] } }
    }

    /// A node that is still there.
    fn pick(&self, n: usize) -> usize {
        let alive: Vec<usize> = (0..self.model.nodes.len()).filter(|n| !self.model.nodes[*n].gone).collect();
        alive[n % alive.len()]
    }

    fn snapshots(&self) -> Vec<(NodeId, NodeSnapshot)> {
        self.tree.ids().map(|id| (id, self.tree.snapshot(id))).collect()
    }

    /// A refused charge: nothing has changed but one count at one level, and the model would have refused there too.
    fn check_refused(
        &self,
        before: &[(NodeId, NodeSnapshot)],
        refused: Refused,
        expected: Option<(usize, Counter)>,
        mode: Mode,
    ) {
        let (level, what) = expected.expect("the model would have granted it");
        assert_eq!(refused.level, self.model.nodes[level].id);
        assert_eq!(refused.counter, what);
        for ((id, mut old), (_, new)) in before.iter().cloned().zip(self.snapshots()) {
            if id == refused.level && (old.online || what != Counter::Memory) {
                let counter = match what {
                    Counter::Memory => &mut old.memory,
                    Counter::Vmm => &mut old.vmm,
                    Counter::Store => &mut old.store,
                    Counter::Swap => &mut old.swap,
                };
                match mode {
                    Mode::Wait => {
                        counter.failcnt += 1;
                        old.events_local.max += u64::from(what == Counter::Memory);
                    }
                    Mode::NoWait => counter.would_block += 1,
                    Mode::NoRetry => counter.batch_misses += 1,
                    Mode::Again => {}
                    Mode::NoFail => unreachable!("never refused here"),
                }
            }
            let met = mode == Mode::Wait && what == Counter::Memory && self.model.nodes[level].online;
            old.events.max += u64::from(met && self.tree.is_within(refused.level, id));
            assert_eq!(old, new, "semantics row 63: a refused charge changes nothing but one failcnt");
        }
    }

    /// Who would refuse a charge in this mode, and for which counter; an offline node does itself.
    fn expected(&self, node: usize, kind: Kind, pages: u64, mode: Mode) -> Option<(usize, Counter)> {
        let offline = pages > 0 && !self.model.nodes[node].online && mode != Mode::NoFail;
        if offline { Some((node, Counter::Memory)) } else { self.model.refuser(node, kind, pages) }
    }

    fn charge(&mut self, node: usize, kind: Kind, pages: u64, mode: Mode) {
        let id = self.model.nodes[node].id;
        let before = self.snapshots();
        let expected = self.expected(node, kind, pages, mode);
        match self.tree.try_charge_as(id, kind, Pages(pages), mode) {
            Ok(charge) => {
                assert!(expected.is_none() || mode == Mode::NoFail, "the model would have refused");
                assert_eq!(charge.forced_at, expected.map(|(level, _)| self.model.nodes[level].id));
                let memory_before: Vec<u64> = self.before(node);
                *self.model.own(node, kind) += pages;
                let crossed: Vec<NodeId> = charge.crossed_high.iter().collect();
                assert_eq!(crossed, self.crossings(node, &memory_before), "edge-triggered (row 115)");
            }
            Err(refused) => self.check_refused(&before, refused, expected, mode),
        }
    }

    fn evict(&mut self, node: usize, pages: u64, stored: u64) {
        let before = self.snapshots();
        let [store, swap] =
            [(Counter::Store, stored), (Counter::Swap, pages)].map(|(what, n)| self.first(node, what, n));
        match self.tree.evict(self.model.nodes[node].id, Pages(pages), Pages(stored)) {
            Ok(()) => {
                assert!(store.is_none() && swap.is_none());
                *self.model.own(node, Kind::Guest) -= pages;
                *self.model.own(node, Kind::Store) += stored;
                *self.model.own(node, Kind::Swap) += pages;
            }
            Err(EvictError::Refused(refused)) => self.check_refused(&before, refused, store.or(swap), Mode::NoWait),
            Err(_) => {
                assert!(stored > pages || *self.model.own(node, Kind::Guest) < pages);
                assert_eq!(self.snapshots(), before);
            }
        }
    }

    fn refault(&mut self, node: usize, pages: u64, stored: u64, mode: Mode) {
        let before = self.snapshots();
        let more = pages.saturating_sub(stored);
        let offline = !self.model.nodes[node].online && mode != Mode::NoFail;
        let expected = if offline { Some((node, Counter::Memory)) } else { self.first(node, Counter::Memory, more) };
        let memory_before = self.before(node);
        match self.tree.refault(self.model.nodes[node].id, Pages(pages), Pages(stored), mode) {
            Ok(charge) => {
                assert!(expected.is_none() || mode == Mode::NoFail);
                *self.model.own(node, Kind::Guest) += pages;
                *self.model.own(node, Kind::Store) -= stored;
                *self.model.own(node, Kind::Swap) -= pages;
                let crossed: Vec<NodeId> = charge.crossed_high.iter().collect();
                assert_eq!(crossed, self.crossings(node, &memory_before));
            }
            Err(EvictError::Refused(refused)) => self.check_refused(&before, refused, expected, mode),
            Err(_) => {
                let there = [(Kind::Store, stored), (Kind::Swap, pages)];
                let short = there.into_iter().any(|(kind, n)| *self.model.own(node, kind) < n);
                assert!(stored > pages || short);
                assert_eq!(self.snapshots(), before);
            }
        }
    }

    /// The lowest level without room in one counter.
    fn first(&self, node: usize, what: Counter, pages: u64) -> Option<(usize, Counter)> {
        let full = |level: &usize| pages > 0 && !self.model.fits(*level, what, pages);
        self.model.chain(node).into_iter().find(full).map(|level| (level, what))
    }

    fn move_node(&mut self, node: usize, to: usize) {
        let before = self.snapshots();
        let moved = self.tree.move_node(self.model.nodes[node].id, self.model.nodes[to].id);
        if node != 0 && self.model.nodes[node].parent == Some(to) {
            assert_eq!(moved, Ok(Moved::Unchanged));
            assert_eq!(self.snapshots(), before);
            return;
        }
        let (old, new) = (self.model.chain(node), self.model.chain(to));
        let newly: Vec<usize> = new.iter().copied().filter(|level| !old.contains(level)).collect();
        let depth = |n: usize| self.model.chain(n).len();
        let below = |n: &usize| !self.model.nodes[*n].gone && self.model.chain(*n).contains(&node);
        let height = (0..self.model.nodes.len()).filter(below).map(depth).max().unwrap() - depth(node);
        let fits = |level: &usize| {
            Counter::ALL.iter().all(|what| {
                let pages = self.model.usage(node, *what);
                pages == 0 || self.model.fits(*level, *what, pages)
            })
        };
        let possible = node != 0
            && !new.contains(&node)
            && self.model.nodes[node].online
            && self.model.nodes[to].online
            && (to == 0 || self.model.nodes[to].own.iter().all(|pages| *pages == 0))
            && depth(to) + 1 + height <= MAX_LEVELS
            && newly.iter().all(fits);
        assert_eq!(moved.is_ok(), possible, "{moved:?}");
        if !possible {
            assert_eq!(self.snapshots(), before, "a refused move changes nothing");
            return;
        }
        // Above, and at the common ancestor, nothing has moved: no peak, no count. Members may have.
        for ((id, mut old_node), (_, new_node)) in before.into_iter().zip(self.snapshots()) {
            let level = self.model.nodes.iter().position(|n| n.id == id && !n.gone).unwrap();
            if old.contains(&level) == new.contains(&level) {
                old_node.members = new_node.members;
                old_node.events.high = new_node.events.high;
                assert_eq!(old_node, new_node);
            }
        }
        self.model.nodes[node].parent = Some(to);
    }

    fn before(&self, node: usize) -> Vec<u64> {
        self.model.chain(node).into_iter().map(|level| self.model.usage(level, Counter::Memory)).collect()
    }

    fn crossings(&self, node: usize, before: &[u64]) -> Vec<NodeId> {
        let crosses = |(level, before): &(usize, &u64)| {
            let n = &self.model.nodes[*level];
            let high = effective_high(n.high, n.max);
            let above = |usage: u64| Limit::Pages(Pages(usage)) > high;
            !above(**before) && above(self.model.usage(*level, Counter::Memory))
        };
        self.model.chain(node).into_iter().zip(before).filter(crosses).map(|(l, _)| self.model.nodes[l].id).collect()
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Add(n) => {
                let parent = self.pick(n);
                let name = format!("n{}", self.model.nodes.len());
                let Ok(id) = self.tree.add(self.model.nodes[parent].id, &name) else {
                    return;
                };
                self.tree.activate(id, |_| Pages::ZERO).unwrap();
                let node = Node { id, parent: Some(parent), ..Run::new().model.nodes[0].clone() };
                self.model.nodes.push(node);
            }
            Op::Remove(n) => {
                let node = self.pick(n);
                let empty = Counter::ALL.iter().all(|what| self.model.usage(node, *what) == 0);
                let leaf = self.model.nodes.iter().all(|other| other.gone || other.parent != Some(node));
                let removed = self.tree.remove(self.model.nodes[node].id).is_ok();
                assert_eq!(removed, node != 0 && empty && leaf);
                self.model.nodes[node].gone = removed;
            }
            Op::Move(n, m) => {
                let (node, to) = (self.pick(n), self.pick(m));
                self.move_node(node, to);
            }
            Op::Charge(n, kind, pages, mode) => {
                let node = self.pick(n);
                self.charge(node, kind, pages, mode);
            }
            Op::Uncharge(n, kind, pages) => {
                let node = self.pick(n);
                let pages = pages.min(*self.model.own(node, kind));
                self.tree.uncharge_as(self.model.nodes[node].id, kind, Pages(pages));
                *self.model.own(node, kind) -= pages;
            }
            Op::Offline(n, returning) => {
                let node = self.pick(n);
                let id = self.model.nodes[node].id;
                let done = if returning { self.tree.set_returning(id) } else { self.tree.set_offline(id) };
                let online = |other: &Node| !other.gone && other.parent == Some(node) && other.online;
                assert_eq!(done.is_ok(), node != 0 && !self.model.nodes.iter().any(online));
                self.model.nodes[node].online &= done.is_err();
                self.model.nodes[node].returning |= returning && done.is_ok();
            }
            Op::Reap => {
                let mut reaped = self.tree.reap();
                let mut expected = Vec::new();
                while let Some(node) = (1..self.model.nodes.len()).find(|n| self.model.is_free(*n)) {
                    self.model.nodes[node].gone = true;
                    expected.push(self.model.nodes[node].id);
                }
                reaped.sort_unstable();
                expected.sort_unstable();
                assert_eq!(reaped, expected);
            }
            Op::Evict(n, pages, stored) => {
                let node = self.pick(n);
                self.evict(node, pages, stored);
            }
            Op::Refault(n, pages, stored, mode) => {
                let node = self.pick(n);
                self.refault(node, pages, stored, mode);
            }
            Op::UpTo(n, want, min) => {
                let node = self.pick(n);
                let id = self.model.nodes[node].id;
                let online = self.model.nodes[node].online;
                let room = if online { self.tree.margin(id).map_or(u64::MAX, |room| room.0) } else { 0 };
                match self.tree.charge_up_to(id, Pages(want), Pages(min), Mode::Wait) {
                    Ok(charge) => {
                        assert_eq!(charge.pages.0, want.min(room).max(min));
                        self.model.nodes[node].own[0] += charge.pages.0;
                    }
                    Err(_) => assert!(room < min),
                }
            }
            Op::Reserve(n, pages, used) => {
                let node = self.pick(n);
                let id = self.model.nodes[node].id;
                let expected = self.expected(node, Kind::Guest, pages, Mode::NoWait);
                match self.tree.reserve(id, Pages(pages), Mode::NoWait) {
                    Ok(reservation) if used > pages => drop(reservation),
                    Ok(reservation) => {
                        let _ = reservation.commit_part(Pages(used));
                        self.model.nodes[node].own[0] += used;
                    }
                    Err(refused) => assert_eq!(Some(refused.level), expected.map(|(l, _)| self.model.nodes[l].id)),
                }
            }
            Op::Limits(n, [max, high, vmm_max, store_max, swap_max]) => {
                let node = self.pick(n);
                let patch = LimitPatch {
                    max: Some(to_limit(max)),
                    high: Some(to_limit(high)),
                    vmm_max: Some(to_limit(vmm_max)),
                    store_max: Some(to_limit(store_max)),
                    swap_max: Some(to_limit(swap_max)),
                    ..LimitPatch::default()
                };
                let before = self.tree.snapshot(self.model.nodes[node].id);
                let ok = self.tree.set_limits(self.model.nodes[node].id, &patch).is_ok();
                let fits_vmm = Limit::Pages(Pages(self.model.usage(node, Counter::Vmm))) <= to_limit(vmm_max);
                assert_eq!(ok, fits_vmm && (high.is_none() || to_limit(high) <= to_limit(max)));
                if ok {
                    let n = &mut self.model.nodes[node];
                    n.max = to_limit(max);
                    n.high = to_limit(high);
                    n.vmm_max = to_limit(vmm_max);
                    n.store_max = to_limit(store_max);
                    n.swap_max = to_limit(swap_max);
                } else {
                    assert_eq!(self.tree.snapshot(self.model.nodes[node].id), before);
                }
            }
            Op::Ceiling(n, ceiling) => {
                let node = self.pick(n);
                self.tree.set_ceiling(self.model.nodes[node].id, ceiling.map(Pages));
                self.model.nodes[node].ceiling = ceiling;
            }
        }
    }

    /// The invariants, at every moment.
    fn check(&self) {
        assert_eq!(self.tree.check(), [], "the tree's own check");
        for (n, node) in self.model.nodes.iter().enumerate().filter(|(_, node)| !node.gone) {
            let real = self.tree.snapshot(node.id);
            let usage = |what| Pages(self.model.usage(n, what));
            assert_eq!(real.memory.usage, usage(Counter::Memory));
            assert_eq!(real.vmm.usage, usage(Counter::Vmm));
            assert_eq!(real.store.usage, usage(Counter::Store));
            assert_eq!(real.swap.usage, usage(Counter::Swap));
            for (overhead, pages) in real.overhead.iter() {
                assert_eq!(pages.0, node.own[index(Kind::Overhead(overhead))]);
            }
            assert!(real.vmm.usage <= real.memory.usage && real.memory.usage <= real.memory.peak);
            let over = node.max.as_pages().map_or(Pages::ZERO, |max| usage(Counter::Memory).saturating_sub(max));
            assert_eq!(real.overcharge, over);
            assert_eq!((real.online, real.returning), (node.online, Pages(self.model.returning(n))));
            let room = |level: usize| {
                let limit = self.model.limit(level, Counter::Memory).as_pages()?;
                Some(limit.saturating_sub(Pages(self.model.usage(level, Counter::Memory))))
            };
            assert_eq!(self.tree.margin(node.id), self.model.chain(n).into_iter().filter_map(room).min());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// semantics rows 1-5, 57, 63, 78, 115, 120 and invariants 1, 2, 3, 5, 6 of the design, over any sequence.
    #[test]
    fn the_tree_agrees_with_the_model(ops in prop::collection::vec(op(), 1..80)) {
        let mut run = Run::new();
        for op in ops {
            run.apply(op);
            run.check();
        }
        // semantics row 60: everybody leaves, nothing stays behind.
        for node in run.model.nodes.iter().filter(|node| !node.gone) {
            run.tree.uncharge_all(node.id);
        }
        let root = run.tree.snapshot(run.tree.root());
        for counter in [root.memory, root.vmm, root.store, root.swap] {
            prop_assert_eq!(counter.usage, Pages::ZERO);
        }
        prop_assert_eq!(run.tree.check(), vec![]);
    }

    /// Without `NoFail`, forced limits and lower ceilings, usage is within every limit at every moment.
    #[test]
    fn usage_never_exceeds_a_limit(
        limits in prop::array::uniform3(prop::option::of(0u64..500)),
        ops in prop::collection::vec((0usize..2, 0u64..300, any::<bool>()), 0..200),
    ) {
        let mut tree = Tree::new(to_limit(limits[0]));
        let root = tree.root();
        let group = crate::nodes::group(&mut tree, root, "group");
        let vms = ["a", "b"].map(|name| crate::nodes::vm(&mut tree, group, name));
        tree.set_limits(group, &LimitPatch::max(to_limit(limits[1]))).unwrap();
        tree.set_limits(vms[0], &LimitPatch::max(to_limit(limits[2]))).unwrap();
        for (vm, pages, charge) in ops {
            if charge {
                let _ = tree.charge_up_to(vms[vm], Pages(pages), Pages(0), Mode::NoRetry);
            } else {
                tree.uncharge(vms[vm], Pages(pages).min(tree.usage(vms[vm])));
            }
            for id in tree.ids() {
                let node = tree.snapshot(id);
                prop_assert!(Limit::Pages(node.memory.usage) <= node.limits.max);
                prop_assert!(Limit::Pages(node.memory.peak) <= node.limits.max);
            }
        }
    }
}

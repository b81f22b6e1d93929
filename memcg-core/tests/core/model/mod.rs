//! Random sequences of everything that can be done to a tree, against an oracle that keeps a list of pages
//! ([`oracle`]) and counts every number anew after every step. Trees grow to 200 nodes.
//!
//! `PROPTEST_CASES` sets the number of sequences; a failure prints the shortest one that shows it.

mod changes;
mod oracle;
mod steps;

use memcg_core::tree::{Accounting, Counter, CounterSnapshot, Kind, LimitPatch, Mode, NodeId, Overhead, Tree};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

use changes::{Running, Wanted};
use oracle::{Node, Oracle, counters, index};

/// One thing that is done. Numbers of nodes are taken modulo those that are there.
#[derive(Clone, Debug)]
enum Op {
    Add(usize),
    AddMany(usize, usize),
    Activate(usize, u64),
    Offline(usize, bool),
    Remove(usize),
    Reap,
    Move(usize, usize),
    Charge(usize, Kind, u64, Mode),
    UpTo(usize, u64, u64),
    Reserve(usize, Kind, u64, u64),
    Uncharge(usize, Kind, u64),
    UnchargeAll(usize),
    Evict(usize, u64, u64),
    Refault(usize, u64, u64, Mode),
    /// A worker says what is in its store and in swap.
    Evicted(usize, u64, u64),
    /// Limits of up to four nodes in one request.
    Change(Vec<(usize, Wanted)>, memcg_core::limit_change::Mode, u64),
    /// So many seconds pass, and every change that waits looks at usage.
    Wait(u64),
    Cancel(usize),
    Reset(usize, Counter),
}

fn op() -> impl Strategy<Value = Op> {
    use memcg_core::limit_change::Mode as How;
    let node = 0usize..200;
    let kind = prop_oneof![
        4 => Just(Kind::Guest),
        1 => prop::sample::select(&Overhead::ALL[..]).prop_map(Kind::Overhead),
        1 => Just(Kind::Store),
        1 => Just(Kind::Swap)
    ];
    let mode =
        prop_oneof![Just(Mode::Wait), Just(Mode::Again), Just(Mode::NoWait), Just(Mode::NoRetry), Just(Mode::NoFail)];
    let pages = prop_oneof![4 => 0u64..8, 3 => 0u64..64, 1 => 0u64..520];
    let how = prop_oneof![3 => Just(How::Reclaim), 1 => Just(How::Force), 1 => Just(How::Refuse)];
    let wanted = prop::collection::vec((node.clone(), changes::wanted()), 1..4);
    prop_oneof![
        4 => node.clone().prop_map(Op::Add),
        1 => (node.clone(), 1usize..40).prop_map(|(n, k)| Op::AddMany(n, k)),
        4 => (node.clone(), 0u64..20).prop_map(|(n, p)| Op::Activate(n, p)),
        2 => (node.clone(), any::<bool>()).prop_map(|(n, back)| Op::Offline(n, back)),
        1 => node.clone().prop_map(Op::Remove),
        2 => Just(Op::Reap),
        4 => (node.clone(), node.clone()).prop_map(|(n, m)| Op::Move(n, m)),
        16 => (node.clone(), kind.clone(), pages.clone(), mode.clone()).prop_map(|(n, k, p, m)| Op::Charge(n, k, p, m)),
        3 => (node.clone(), pages.clone(), 0u64..4).prop_map(|(n, w, m)| Op::UpTo(n, w, m)),
        3 => (node.clone(), kind.clone(), pages.clone(), pages.clone()).prop_map(|(n, k, p, u)| Op::Reserve(n, k, p, u)),
        8 => (node.clone(), kind, pages.clone()).prop_map(|(n, k, p)| Op::Uncharge(n, k, p)),
        1 => node.clone().prop_map(Op::UnchargeAll),
        4 => (node.clone(), pages.clone(), 0u64..30).prop_map(|(n, p, s)| Op::Evict(n, p, s)),
        4 => (node.clone(), pages.clone(), 0u64..30, mode).prop_map(|(n, p, s, m)| Op::Refault(n, p, s, m)),
        4 => (node.clone(), pages.clone(), pages).prop_map(|(n, s, p)| Op::Evicted(n, s, p)),
        8 => (wanted, how, 0u64..20).prop_map(|(w, h, s)| Op::Change(w, h, s)),
        4 => (0u64..8).prop_map(Op::Wait),
        1 => (0usize..8).prop_map(Op::Cancel),
        1 => (node, prop::sample::select(&Counter::ALL[..])).prop_map(|(n, c)| Op::Reset(n, c)),
    ]
}

/// The tree, the oracle, and the changes of limits that wait.
struct Run {
    tree: Tree,
    oracle: Oracle,
    running: Vec<Running>,
    now: u64,
}

/// Nodes that a tree may have here.
const MOST: usize = 200;

impl Run {
    fn new() -> Run {
        let tree = Tree::new(Limit::Pages(Pages(4000)));
        let mut root = Node::new(tree.root(), None, tree.accounting(tree.root()));
        root.limits = tree.limits(tree.root());
        Run { tree, oracle: Oracle { nodes: vec![root], pages: Vec::new() }, running: Vec::new(), now: 0 }
    }

    /// A node that is there.
    fn pick(&self, n: usize) -> usize {
        let alive: Vec<usize> = self.oracle.alive().collect();
        alive[n % alive.len()]
    }

    fn id(&self, node: usize) -> NodeId {
        self.oracle.nodes[node].id
    }

    /// Every number of every node, and what holds at every moment.
    fn check(&self) {
        assert_eq!(self.tree.check(), [], "the tree's own check");
        let (usages, owns) = (self.oracle.usages(), self.oracle.owns());
        let own_in = |n: usize, counter: Counter| -> u64 {
            let part = |kind: &&Kind| counters(**kind).contains(&counter);
            Kind::ALL.iter().filter(part).map(|kind| owns[n][index(*kind)]).sum()
        };
        assert_eq!(self.tree.ids().count(), self.oracle.alive().count());
        let accounted = |n: &usize| *n != 0 && self.oracle.nodes[*n].accounting == Accounting::On;
        assert_eq!(self.tree.accounted(), self.oracle.alive().filter(accounted).count());
        for n in self.oracle.alive() {
            let node = &self.oracle.nodes[n];
            let snapshot = self.tree.snapshot(node.id);
            let seen = [snapshot.memory, snapshot.vmm, snapshot.store, snapshot.swap];
            for counter in Counter::ALL {
                let counts = node.counts[counter as usize];
                let expected = CounterSnapshot {
                    usage: Pages(usages[n][counter as usize]),
                    own: Pages(own_in(n, counter)),
                    peak: Pages(counts.peak),
                    failcnt: counts.failcnt,
                    batch_misses: counts.batch_misses,
                    would_block: counts.would_block,
                    forced: counts.forced,
                    underflows: 0,
                };
                assert_eq!(seen[counter as usize], expected, "{counter} of {}", self.tree.path(node.id));
            }
            for (overhead, pages) in snapshot.overhead.iter() {
                assert_eq!(pages.0, owns[n][index(Kind::Overhead(overhead))]);
            }
            let usage = snapshot.memory.usage;
            let over = node.limits.max.as_pages().map_or(Pages::ZERO, |max| usage.saturating_sub(max));
            assert_eq!(snapshot.overcharge, over, "usage above max is reported, all of it (invariant 1)");
            assert!(snapshot.vmm.usage + snapshot.store.usage <= usage, "K <= U (invariant 2)");
            assert_eq!((snapshot.limits, snapshot.ceiling), (node.limits, node.ceiling.map(Pages)));
            assert_eq!((snapshot.events_local, snapshot.events), (node.events_local, node.events));
            assert_eq!((snapshot.accounting, snapshot.online), (node.accounting, node.online));
            assert_eq!(snapshot.members as usize, self.oracle.members(n));
            let room = |level: &usize| {
                let limit = self.oracle.nodes[*level].limit(Counter::Memory).as_pages()?;
                Some(limit.saturating_sub(Pages(usages[*level][Counter::Memory as usize])))
            };
            let margin = self.oracle.chain(n).iter().filter_map(room).min();
            assert_eq!(self.tree.margin(node.id), margin.filter(|_| node.accounting == Accounting::On));
            let gone = self.oracle.below(n).into_iter().filter(|n| self.oracle.nodes[*n].returning);
            let returning: u64 = gone.map(|n| own_in(n, Counter::Memory)).sum();
            assert_eq!(self.tree.returning(node.id), Pages(returning));
        }
        self.check_changes();
    }
}

proptest! {
    #![proptest_config(crate::cases::cases(96))]

    /// Whatever is done in whatever order, the tree says what a count of all pages says: usage, peaks, refusals at the
    /// level that refused, crossings, limits in force, members, what returns.
    /// Semantics (table): 1, 3, 4, 5, 20, 33, 57, 63, 89, 115, 120, B1, B4, B25, B39, B51, B64, B71, B80.
    #[test]
    fn a_tree_is_what_its_pages_add_up_to(ops in prop::collection::vec(op(), 1..120)) {
        let mut run = Run::new();
        for op in ops {
            run.apply(op);
            run.check();
        }
        run.end();
    }

    /// Without `NoFail`, forced limits and lower ceilings, usage is within every limit at every moment.
    /// Semantics: 3, 61, 116.
    #[test]
    fn usage_never_exceeds_a_limit(
        limits in prop::array::uniform3(prop::option::of(0u64..500)),
        ops in prop::collection::vec((0usize..2, 0u64..300, any::<bool>()), 0..200),
    ) {
        let limits = limits.map(|pages| Limit::from(pages.map(Pages)));
        let mut tree = Tree::new(limits[0]);
        let root = tree.root();
        let group = crate::nodes::group(&mut tree, root, "group");
        let vms = ["a", "b"].map(|name| crate::nodes::vm(&mut tree, group, name));
        tree.set_limits(group, &LimitPatch::max(limits[1])).unwrap();
        tree.set_limits(vms[0], &LimitPatch::max(limits[2])).unwrap();
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

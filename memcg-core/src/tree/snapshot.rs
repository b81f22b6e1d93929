//! Looking at a node.

use super::counter::{CounterSnapshot, OverheadParts};
use super::{Accounting, Counter, Events, Limits, NodeId, Tree};
use crate::units::{Limit, Pages};

/// One node at one moment: every number is of the same state of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSnapshot {
    /// Whether it is charged for what it uses; if not, these are numbers of its accounted members.
    pub accounting: Accounting,
    /// Memory: everything, guest pages, overhead and store.
    pub memory: CounterSnapshot,
    /// Overhead; counted in memory too.
    pub vmm: CounterSnapshot,
    /// Overhead of this very node, by type.
    pub overhead: OverheadParts,
    /// Compressed content of evicted pages; counted in memory too.
    pub store: CounterSnapshot,
    /// Evicted pages.
    pub swap: CounterSnapshot,
    /// The limits in force.
    pub limits: Limits,
    /// `memory.max` that was asked for and is not yet in force.
    pub max_pending: Option<Limit>,
    /// The cap on memory while `max_pending` is being reached.
    pub ceiling: Option<Pages>,
    /// Where background reclaim starts: `high`, or what `max` implies; of the pending limits where `max` is lowered.
    pub effective_high: Limit,
    /// Memory above `memory.max`, left by a forced change or a charge that could not be refused. May only fall.
    pub overcharge: Pages,
    /// What of memory belongs to VMs that are gone: in use, but on its way back ([`Tree::set_returning`]).
    pub returning: Pages,
    /// `memory.events`: what happened here and below. Never reset.
    pub events: Events,
    /// `memory.events.local`: what happened here. Never reset.
    pub events_local: Events,
    /// Number of changes of this node's limits, pending ones included: for compare-and-set.
    pub generation: u64,
    /// VMs that share this node's room: childless nodes below it, or itself.
    pub members: u32,
    /// False once its name is taken away ([`Tree::set_offline`]).
    pub online: bool,
}

/// One node of a [`TreeSnapshot`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeNode {
    /// Which node.
    pub id: NodeId,
    /// Its path; two may be equal when one of them is offline.
    pub path: String,
    /// Everything about it.
    pub node: NodeSnapshot,
}

/// The whole tree at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeSnapshot {
    /// All nodes, zombies too, the root first and each before its members.
    pub nodes: Vec<TreeNode>,
    /// Charges without the context of a VM, which the root pays ([`Tree::charge_root`]), since the start.
    pub no_context: u64,
    /// Accounted nodes, the root aside.
    pub accounted: usize,
}

impl Tree {
    /// Everything about everything, of one moment: a parent shows what its members add up to.
    pub fn snapshot_all(&self) -> TreeSnapshot {
        let of = |id| TreeNode { id, path: self.path(id), node: self.snapshot(id) };
        let nodes = self.subtree(self.root).map(of).collect();
        TreeSnapshot { nodes, no_context: self.no_context, accounted: self.accounted }
    }

    /// Everything about a node.
    pub fn snapshot(&self, id: NodeId) -> NodeSnapshot {
        let node = self.node(id);
        NodeSnapshot {
            accounting: node.accounting,
            memory: *node.counters.get(Counter::Memory),
            vmm: *node.counters.get(Counter::Vmm),
            overhead: node.counters.parts,
            store: *node.counters.get(Counter::Store),
            swap: *node.counters.get(Counter::Swap),
            limits: *node.limits(),
            max_pending: node.pending.as_ref().and_then(|pending| pending.patch.max),
            ceiling: node.ceiling(),
            effective_high: self.reclaim_high(id),
            overcharge: node.overcharge,
            returning: node.returning,
            events: node.events,
            events_local: node.events_local,
            generation: node.generation,
            members: node.members,
            online: node.online,
        }
    }

    /// Memory charged to `id` and below.
    pub fn usage(&self, id: NodeId) -> Pages {
        self.node(id).counters.get(Counter::Memory).usage
    }

    /// One counter of `id`.
    pub fn counter(&self, id: NodeId, counter: Counter) -> CounterSnapshot {
        *self.node(id).counters.get(counter)
    }

    /// False once the name of `id` is taken away ([`Tree::set_offline`]).
    pub fn is_online(&self, id: NodeId) -> bool {
        self.node(id).online
    }

    /// The limits of `id` in force.
    pub fn limits(&self, id: NodeId) -> Limits {
        *self.node(id).limits()
    }

    /// The same, but for those of memory, swap and store that are being lowered: they are what they will be.
    pub fn coming_limits(&self, id: NodeId) -> Limits {
        let limits = self.limits(id);
        let Some(pending) = &self.node(id).pending else { return limits };
        let lower = |now: Limit, new: Option<Limit>| new.map_or(now, |new| now.min(new));
        Limits {
            max: lower(limits.max, pending.patch.max),
            swap_max: lower(limits.swap_max, pending.patch.swap_max),
            store_max: lower(limits.store_max, pending.patch.store_max),
            ..limits
        }
    }

    /// Number of changes of `id`'s limits so far.
    pub fn generation(&self, id: NodeId) -> u64 {
        self.node(id).generation
    }

    /// Forgets the peak of one counter of `id`: it starts again from the usage of now (row 66).
    pub fn reset_peak(&mut self, id: NodeId, counter: Counter) {
        let counter = self.node_mut(id).counters.get_mut(counter);
        counter.peak = counter.usage;
    }

    /// Sets the failure count of one counter of `id` to zero; events are never reset.
    pub fn reset_failcnt(&mut self, id: NodeId, counter: Counter) {
        self.node_mut(id).counters.get_mut(counter).failcnt = 0;
    }
}

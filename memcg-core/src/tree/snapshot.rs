//! Looking at a node.

use super::counter::{CounterSnapshot, OverheadParts};
use super::{Accounting, Counter, Limits, NodeId, Tree};
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
    /// [`super::Mode::Wait`] charges refused by `memory.max` or the ceiling, since the start; never reset.
    pub max_hits: u64,
    /// Times that memory went above the effective high limit.
    pub high_hits: u64,
    /// Number of changes of this node's limits, pending ones included: for compare-and-set.
    pub generation: u64,
    /// VMs that share this node's room: childless nodes below it, or itself.
    pub members: u32,
    /// False once its name is taken away ([`Tree::set_offline`]).
    pub online: bool,
}

impl Tree {
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
            limits: node.limits,
            max_pending: node.pending.as_ref().and_then(|pending| pending.patch.max),
            ceiling: node.ceiling,
            effective_high: self.reclaim_high(id),
            overcharge: node.overcharge,
            returning: node.returning,
            max_hits: node.max_hits,
            high_hits: node.high_hits,
            generation: node.generation,
            members: node.members,
            online: node.online,
        }
    }

    /// Memory charged to `id` and below.
    pub fn usage(&self, id: NodeId) -> Pages {
        self.node(id).counters.get(Counter::Memory).usage
    }

    /// The limits of `id` in force.
    pub fn limits(&self, id: NodeId) -> Limits {
        self.node(id).limits
    }

    /// Number of changes of `id`'s limits so far.
    pub fn generation(&self, id: NodeId) -> u64 {
        self.node(id).generation
    }

    /// Forgets the peaks of `id`: they start again from the usage of now.
    pub fn reset_peak(&mut self, id: NodeId) {
        let counters = &mut self.node_mut(id).counters;
        for counter in counters.iter_mut() {
            counter.peak = counter.usage;
        }
    }

    /// Sets the failure counts of `id` to zero; `max_hits` stays.
    pub fn reset_failcnt(&mut self, id: NodeId) {
        let counters = &mut self.node_mut(id).counters;
        for counter in counters.iter_mut() {
            counter.failcnt = 0;
        }
    }
}

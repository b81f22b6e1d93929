//! The invariants of the tree, as a function that anyone may call at any time.

use super::{NodeId, Tree};
use crate::units::{Limit, Pages};

/// An invariant that does not hold. There should never be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Memory above `max` that is not reported as overcharge.
    #[error("{path}: usage {usage} is above max by more than the reported overcharge {overcharge}")]
    OverLimit {
        /// Path of the node.
        path: String,
        /// Memory in use.
        usage: Pages,
        /// Overcharge reported.
        overcharge: Pages,
    },
    /// More overhead than memory.
    #[error("{path}: vmm {vmm} is above memory {memory}")]
    VmmAboveMemory {
        /// Path of the node.
        path: String,
        /// Overhead.
        vmm: Pages,
        /// Memory.
        memory: Pages,
    },
    /// A counter is not what its parts add up to.
    #[error("{path}: {counter} is {usage}, own and children add up to {sum}")]
    Sum {
        /// Path of the node.
        path: String,
        /// Which counter.
        counter: &'static str,
        /// Its usage.
        usage: Pages,
        /// Own charges and the usage of all children.
        sum: Pages,
    },
    /// A counter's peak is below its usage.
    #[error("{path}: the peak of {counter} is below its usage")]
    Peak {
        /// Path of the node.
        path: String,
        /// Which counter.
        counter: &'static str,
    },
    /// Something was uncharged that had not been charged.
    #[error("{path}: {count} uncharges of {counter} were larger than what was charged")]
    Underflow {
        /// Path of the node.
        path: String,
        /// Which counter.
        counter: &'static str,
        /// How often.
        count: u64,
    },
    /// The number of members is not what a walk finds.
    #[error("{path}: {members} members are recorded, {found} are there")]
    Members {
        /// Path of the node.
        path: String,
        /// Recorded.
        members: u32,
        /// Found.
        found: u32,
    },
}

impl Tree {
    /// Every invariant that does not hold: usage ≤ max or reported as overcharge, K ≤ U, parent = own + children,
    /// peak ≥ usage, no underflow, members right. Empty in a healthy tree, at any moment.
    pub fn check(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        for id in self.ids() {
            self.check_node(id, &mut found);
        }
        found
    }

    fn check_node(&self, id: NodeId, found: &mut Vec<Violation>) {
        let node = self.node(id);
        let path = || self.path(id);
        let (memory, vmm) = (node.counters.memory.usage, node.counters.vmm.usage);
        if let Limit::Pages(max) = node.limits.max
            && memory.saturating_sub(max) > node.overcharge
        {
            found.push(Violation::OverLimit { path: path(), usage: memory, overcharge: node.overcharge });
        }
        if vmm > memory {
            found.push(Violation::VmmAboveMemory { path: path(), vmm, memory });
        }
        let counters = |id: NodeId| {
            let counters = &self.node(id).counters;
            [("memory", counters.memory), ("vmm", counters.vmm), ("swap", counters.swap)]
        };
        for (n, (counter, value)) in counters(id).into_iter().enumerate() {
            let below: Pages = node.children.iter().map(|child| counters(*child)[n].1.usage).sum();
            let sum = value.own + below;
            if sum != value.usage {
                found.push(Violation::Sum { path: path(), counter, usage: value.usage, sum });
            }
            if value.peak < value.usage {
                found.push(Violation::Peak { path: path(), counter });
            }
            if value.underflows > 0 {
                found.push(Violation::Underflow { path: path(), counter, count: value.underflows });
            }
        }
        let members = match node.children.as_slice() {
            [] => 1,
            children => children.iter().map(|child| self.node(*child).members).sum(),
        };
        if members != node.members {
            found.push(Violation::Members { path: path(), members: node.members, found: members });
        }
    }
}

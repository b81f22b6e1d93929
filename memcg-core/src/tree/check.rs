//! The invariants of the tree, as a function that anyone may call at any time.

use super::{Accounting, Counter, NodeId, Tree};
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
    /// Overhead is not what its types add up to, or there is less memory than what must be in it.
    #[error("{path}: of {memory} charged to it are {vmm} overhead ({parts} by type) and {store} store")]
    Parts {
        /// Path of the node.
        path: String,
        /// Memory charged to this very node.
        memory: Pages,
        /// Overhead charged to it.
        vmm: Pages,
        /// The same, type by type.
        parts: Pages,
        /// Store charged to it.
        store: Pages,
    },
    /// An accounted node above one that is not, or charges that should not be.
    #[error("{path}: accounting is off, but its parent's is on or something is charged to it")]
    Accounting {
        /// Path of the node.
        path: String,
    },
    /// What is returning is not what the nodes below add up to, or more than is charged.
    #[error("{path}: {returning} of memory are returning, the parts add up to {sum}")]
    Returning {
        /// Path of the node.
        path: String,
        /// Recorded.
        returning: Pages,
        /// What is charged to it if it is gone, and the children's.
        sum: Pages,
    },
    /// Online below a node that is being removed.
    #[error("{path}: online, but its parent is not")]
    Orphan {
        /// Path of the node.
        path: String,
    },
    /// The number of accounted nodes is wrong.
    #[error("{recorded} nodes are recorded as accounted, {found} are")]
    Accounted {
        /// Recorded.
        recorded: usize,
        /// Found.
        found: usize,
    },
    /// A counter is not what its parts add up to.
    #[error("{path}: {counter} is {usage}, own and children add up to {sum}")]
    Sum {
        /// Path of the node.
        path: String,
        /// Which counter.
        counter: Counter,
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
        counter: Counter,
    },
    /// Something was uncharged that had not been charged.
    #[error("{path}: {count} uncharges of {counter} were larger than what was charged")]
    Underflow {
        /// Path of the node.
        path: String,
        /// Which counter.
        counter: Counter,
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
    /// store and overhead by type within memory, peak ≥ usage, no underflow, members,
    /// accounting and what is returning right, nobody online below who is not. Empty in a healthy tree, at any moment.
    pub fn check(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        for id in self.ids() {
            self.check_node(id, &mut found);
        }
        let is_on = |id: &NodeId| *id != self.root && self.accounting(*id) == Accounting::On;
        let accounted = self.ids().filter(is_on).count();
        if accounted != self.accounted {
            found.push(Violation::Accounted { recorded: self.accounted, found: accounted });
        }
        found
    }

    fn check_node(&self, id: NodeId, found: &mut Vec<Violation>) {
        let node = self.node(id);
        let path = || self.path(id);
        let usage = |which| node.counters.get(which).usage;
        let (memory, vmm) = (usage(Counter::Memory), usage(Counter::Vmm));
        if let Limit::Pages(max) = node.limits().max
            && memory.saturating_sub(max) > node.overcharge
        {
            found.push(Violation::OverLimit { path: path(), usage: memory, overcharge: node.overcharge });
        }
        if vmm > memory {
            found.push(Violation::VmmAboveMemory { path: path(), vmm, memory });
        }
        let [memory, vmm, store, _] = Counter::ALL.map(|which| node.counters.get(which).own);
        let parts = node.counters.parts.iter().map(|(_, pages)| pages).sum();
        if parts != vmm || vmm + store > memory {
            found.push(Violation::Parts { path: path(), memory, vmm, parts, store });
        }
        let inherited = node.parent.is_some_and(|up| up != self.root && self.accounting(up) == Accounting::On);
        if node.accounting == Accounting::Off && (inherited || !node.counters.is_free_of_own()) {
            found.push(Violation::Accounting { path: path() });
        }
        let own = if node.returning_own.is_some() { memory } else { Pages::ZERO };
        let below: Pages = node.children.iter().map(|child| self.returning(*child)).sum();
        if own + below != node.returning {
            found.push(Violation::Returning { path: path(), returning: node.returning, sum: own + below });
        }
        if node.online && node.parent.is_some_and(|up| !self.node(up).online) {
            found.push(Violation::Orphan { path: path() });
        }
        for which in Counter::ALL {
            let counter = node.counters.get(which);
            let below: Pages = node.children.iter().map(|child| self.node(*child).counters.get(which).usage).sum();
            let sum = counter.own + below;
            if sum != counter.usage {
                found.push(Violation::Sum { path: path(), counter: which, usage: counter.usage, sum });
            }
            if counter.peak < counter.usage {
                found.push(Violation::Peak { path: path(), counter: which });
            }
            if counter.underflows > 0 {
                found.push(Violation::Underflow { path: path(), counter: which, count: counter.underflows });
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

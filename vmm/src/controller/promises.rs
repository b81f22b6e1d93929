//! What is promised: the memory that each node will have in any case, added up against the limits above it.
//!
//! ```text
//!  promise of a VM    = max(min, overhead charged for it)          no reclaim takes either
//!  promise of a group = max(min, sum of its members' promises)
//!  fits               : sum of the members' promises ≤ max, in every group, and in the host's budget
//! ```
//!
//! A promise that could not be kept is refused when it is made: a VM that is created or moved, a `min` that is raised,
//! a `max` that is lowered. What is short already, because charges came that could not be refused, refuses nothing that
//! does not make it worse.

use std::collections::BTreeMap;

use memcg_core::tree::{Counter, LimitPatch, Limits, NodeId};
use memcg_core::units::{Limit, Pages, exact, human};

use super::actor::Actor;
use super::error::{Code, Refusal};

/// One node's part.
#[derive(Clone, Copy, Debug, Default)]
struct Promise {
    /// Its own claim.
    own: Pages,
    /// The sum of its members' promises.
    below: Pages,
    /// What they must fit.
    max: Limit,
}

impl Promise {
    fn total(&self) -> Pages {
        self.own.max(self.below)
    }

    /// Pages that its members are promised beyond its limit.
    fn missing(&self) -> Pages {
        self.max.as_pages().map_or(Pages::ZERO, |max| self.below.saturating_sub(max))
    }
}

impl Actor {
    /// The limits that a node has, or will have when a smaller `max` is reached that is pending.
    fn limits_to_come(&self, node: NodeId) -> Limits {
        let snapshot = self.tree.snapshot(node);
        let max = snapshot.max_pending.map_or(snapshot.limits.max, |pending| pending.min(snapshot.limits.max));
        Limits { max, ..snapshot.limits }
    }

    fn promises(&self, limits: impl Fn(NodeId) -> Limits) -> BTreeMap<NodeId, Promise> {
        let nodes: Vec<_> = self.tree.subtree(self.root).collect();
        let mut promises: BTreeMap<NodeId, Promise> = BTreeMap::new();
        // Members before their groups.
        for node in nodes.into_iter().rev() {
            let Limits { min, max, .. } = limits(node);
            let promise = promises.entry(node).or_default();
            let online = self.tree.is_online(node);
            // `min=max` protects whatever is in use.
            let min = if online { min.as_pages().unwrap_or_else(|| self.tree.usage(node)) } else { Pages::ZERO };
            let overhead = self.tree.counter(node, Counter::Vmm).own;
            (promise.own, promise.max) = (min.max(overhead), max);
            let total = promise.total();
            if let Some(parent) = self.tree.parent(node) {
                promises.entry(parent).or_default().below += total;
            }
        }
        promises
    }

    /// Whether limits may be changed so.
    ///
    /// # Errors
    /// The group whose members would be promised more than there is.
    pub fn check_patches(&self, patches: &[(NodeId, LimitPatch)]) -> Result<(), Refusal> {
        let worse = |(node, patch): &(NodeId, LimitPatch)| {
            let now = self.tree.limits(*node);
            let has_members = !self.tree.children(*node).is_empty();
            patch.min.is_some_and(|min| min > now.min) || has_members && patch.max.is_some_and(|max| max < now.max)
        };
        // Nearly all changes are of a VM's own `max`: nothing is added up for those.
        if !patches.iter().any(worse) {
            return Ok(());
        }
        let before = self.promises(|node| self.limits_to_come(node));
        let after = self.promises(|node| {
            let patch = patches.iter().find(|(at, _)| *at == node);
            patch.map_or_else(|| self.limits_to_come(node), |(_, patch)| patch.apply(self.tree.limits(node)))
        });
        match after.iter().find(|(node, promise)| promise.missing() > before[*node].missing()) {
            Some((node, promise)) => Err(self.promised_too_much(*node, promise)),
            None => Ok(()),
        }
    }

    /// Whether `node` may be below `parent`: it is new there, or is to be moved there.
    ///
    /// # Errors
    /// The group whose members would be promised more than there is.
    pub fn check_place(&self, node: NodeId, parent: NodeId) -> Result<(), Refusal> {
        let promises = self.promises(|node| self.limits_to_come(node));
        let mut more = promises[&node].total();
        let old_parent = self.tree.parent(node);
        for at in self.tree.ancestry(parent) {
            // What is above both places has it already.
            if old_parent != Some(parent) && self.tree.is_within(node, at) {
                break;
            }
            let mut promise = promises[&at];
            let before = if old_parent == Some(parent) {
                Promise { below: promise.below.saturating_sub(more), ..promise }
            } else {
                promise
            };
            promise.below = before.below + more;
            if promise.missing() > before.missing() {
                return Err(self.promised_too_much(at, &promise));
            }
            more = promise.total().saturating_sub(before.total());
        }
        Ok(())
    }

    fn promised_too_much(&self, node: NodeId, promise: &Promise) -> Refusal {
        let missing = promise.missing();
        let path = self.tree.path(node);
        let message = format!(
            "{path} cannot keep what its members would be promised: their memory.min and overhead are {} together, \
             its memory.max is {}, {} are missing: raise memory.max of {path} to {}, or promise less",
            human(promise.below.bytes()),
            promise.max,
            human(missing.bytes()),
            exact(promise.below.bytes()),
        );
        Refusal::new(Code::DoesNotFit, message).missing(missing.bytes())
    }
}

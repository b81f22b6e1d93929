//! Limits of a node and how they are set: wholly or not at all, one node or many.
//!
//! A request is a [`LimitPatch`] for each of its nodes. All of them are checked before the first limit moves. What
//! cannot be in force yet is remembered at its node with the number of the request (its ticket), and comes into force,
//! or is dropped, at all nodes of that request in one step; [`crate::limit_change`] decides when.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Accounting, Counter, Event, NodeId, Tree};
use crate::reclaim;
use crate::units::{Limit, Pages, human};

/// The limits of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `memory.min`: never reclaimed below this for anyone else's need. 0 at first.
    pub min: Limit,
    /// `memory.low`: reclaimed below this only when nothing above `low` is left. 0 at first.
    pub low: Limit,
    /// `memory.high`: background reclaim starts above; [`Limit::Max`]: not set, `max` implies one.
    pub high: Limit,
    /// `memory.max`: no charge is granted above.
    pub max: Limit,
    /// `swap.max`: no eviction above.
    pub swap_max: Limit,
    /// `store.max`: no eviction whose compressed content goes above.
    pub store_max: Limit,
    /// `vmm.max`: overhead above is refused.
    pub vmm_max: Limit,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            min: Limit::ZERO,
            low: Limit::ZERO,
            high: Limit::Max,
            max: Limit::Max,
            swap_max: Limit::Max,
            store_max: Limit::Max,
            vmm_max: Limit::Max,
        }
    }
}

/// A change of some limits of one node; `None` leaves a limit as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LimitPatch {
    /// New `memory.min`.
    pub min: Option<Limit>,
    /// New `memory.low`.
    pub low: Option<Limit>,
    /// New `memory.high`.
    pub high: Option<Limit>,
    /// New `memory.max`.
    pub max: Option<Limit>,
    /// New `swap.max`.
    pub swap_max: Option<Limit>,
    /// New `store.max`.
    pub store_max: Option<Limit>,
    /// New `vmm.max`.
    pub vmm_max: Option<Limit>,
    /// Only if the node's generation is this: compare-and-set for clients that do not know of each other.
    pub if_generation: Option<u64>,
}

impl LimitPatch {
    /// A patch of `memory.max` alone.
    pub fn max(max: Limit) -> LimitPatch {
        LimitPatch { max: Some(max), ..LimitPatch::default() }
    }

    /// The limits that `limits` become.
    pub fn apply(&self, limits: Limits) -> Limits {
        Limits {
            min: self.min.unwrap_or(limits.min),
            low: self.low.unwrap_or(limits.low),
            high: self.high.unwrap_or(limits.high),
            max: self.max.unwrap_or(limits.max),
            swap_max: self.swap_max.unwrap_or(limits.swap_max),
            store_max: self.store_max.unwrap_or(limits.store_max),
            vmm_max: self.vmm_max.unwrap_or(limits.vmm_max),
        }
    }

    /// Whether it asks for any limit or protection at all. What only says `max`, or a `min` or `low` of 0, does not: to
    /// write back what an unlimited node reads as changes nothing, accounting included (row 69).
    pub fn limits_something(&self) -> bool {
        let capped = [self.high, self.max, self.swap_max, self.store_max, self.vmm_max];
        let protected = [self.min, self.low];
        capped.into_iter().flatten().any(|limit| !limit.is_max())
            || protected.into_iter().flatten().any(|limit| limit != Limit::ZERO)
    }

    /// This patch without what `later` sets.
    fn without(self, later: &LimitPatch) -> LimitPatch {
        let keep = |mine: Option<Limit>, later: Option<Limit>| if later.is_some() { None } else { mine };
        LimitPatch {
            min: keep(self.min, later.min),
            low: keep(self.low, later.low),
            high: keep(self.high, later.high),
            max: keep(self.max, later.max),
            swap_max: keep(self.swap_max, later.swap_max),
            store_max: keep(self.store_max, later.store_max),
            vmm_max: keep(self.vmm_max, later.vmm_max),
            if_generation: None,
        }
    }
}

impl Limits {
    /// Whether the limits fit each other: `min`, `low` and `high` not above `max`. [`Limit::Max`] fits everything: "all
    /// of it" for `min` and `low`, "not set" for `high`.
    ///
    /// # Errors
    /// [`AboveMax`] with the first that does not fit.
    pub fn check(&self) -> Result<(), AboveMax> {
        let knobs = [("memory.min", self.min), ("memory.low", self.low), ("memory.high", self.high)];
        match knobs.into_iter().find(|(_, value)| !value.is_max() && *value > self.max) {
            Some((knob, value)) => Err(AboveMax { knob, value, max: self.max }),
            None => Ok(()),
        }
    }
}

/// A limit or protection that is above `memory.max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{knob} {value} would be above memory.max {max}: choose a lower {knob} or a higher memory.max; a request may set both"
)]
pub struct AboveMax {
    /// The limit at fault, such as `memory.min`.
    pub knob: &'static str,
    /// Its value.
    pub value: Limit,
    /// The `memory.max` that it would meet, now or when a pending change is done.
    pub max: Limit,
}

/// A node that uses more than the `memory.max` that it was to have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: memory.max {limit} is below the {} in use", human(.usage.bytes()))]
pub struct Above {
    /// Path of the node.
    pub path: String,
    /// Memory in use.
    pub usage: Pages,
    /// What was asked for.
    pub limit: Limit,
}

/// Why limits were not set. The old ones are in force, wholly, at every node of the request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetLimitError {
    /// `min`, `low` or `high` above `max`.
    #[error("{path}: {why}")]
    AboveMax {
        /// Path of the node.
        path: String,
        /// Which limit, and by how much.
        why: AboveMax,
    },
    /// Accounting is off, so that there is nothing to limit.
    #[error("{path} is not accounted, so there is nothing to limit: activate its accounting first")]
    NotAccounted {
        /// Path of the node.
        path: String,
    },
    /// Somebody else changed limits meanwhile.
    #[error(
        "{path}: the limits have changed meanwhile (generation {actual}, not {expected}): \
         read them again and decide anew"
    )]
    Stale {
        /// Path of the node.
        path: String,
        /// The generation that the caller has seen.
        expected: u64,
        /// The generation now.
        actual: u64,
    },
    /// `vmm.max` below the overhead in use, which cannot be reclaimed.
    #[error("{path}: vmm.max {limit} is below the {} of overhead in use, which cannot be reclaimed", human(.usage.bytes()))]
    VmmBelowUsage {
        /// Path of the node.
        path: String,
        /// Overhead in use.
        usage: Pages,
        /// What was asked for.
        limit: Limit,
    },
    /// `memory.max` below usage, and the caller wanted to be refused then.
    #[error("{}: free memory first, or use mode=reclaim or mode=force", list(above))]
    BelowUsage {
        /// Every node that is above, in the order of the request.
        above: Vec<Above>,
    },
    /// A request names a node twice; which of the two is meant is not for us to guess.
    #[error("{path} is named twice in one request: put its limits in one place")]
    NamedTwice {
        /// Path of the node.
        path: String,
    },
}

fn list(above: &[Above]) -> String {
    above.iter().map(Above::to_string).collect::<Vec<_>>().join("; ")
}

/// Limits of one node that wait until those of every node of their request can be in force.
#[derive(Clone, Debug)]
pub(super) struct Pending {
    /// The request; the same at all its nodes.
    pub ticket: u64,
    /// All nodes of the request, so that nobody looks for them in the whole tree.
    pub nodes: Arc<[NodeId]>,
    /// What is to be set.
    pub patch: LimitPatch,
}

/// The part of one node in a request that waits.
pub(crate) struct Waits {
    pub node: NodeId,
    pub patch: LimitPatch,
    /// Where `max` is lowered: the cap on usage meanwhile.
    pub ceiling: Option<Pages>,
}

impl Tree {
    /// The limits that this node has are those of generation `generation`: for an owner that remembers them from before
    /// the tree, so that a client's compare-and-set does not meet a number that meant something else.
    pub fn restore_generation(&mut self, id: NodeId, generation: u64) {
        self.node_mut(id).generation = generation;
    }

    /// Sets limits at once. `max` is **not** compared with usage: below it, the change is forced and the excess is an
    /// overcharge; [`crate::limit_change`] offers the alternatives, and many nodes in one step. A new `max` supersedes a
    /// pending one. Returns the node's new generation, or the old one when nothing was different (row 69).
    ///
    /// # Errors
    /// [`SetLimitError`]; nothing has changed then.
    pub fn set_limits(&mut self, id: NodeId, patch: &LimitPatch) -> Result<u64, SetLimitError> {
        self.set_all_limits(&[(id, *patch)])?;
        Ok(self.generation(id))
    }

    /// [`Self::set_limits`] of many nodes: all of it, or an error and nothing.
    pub(crate) fn set_all_limits(&mut self, patches: &[(NodeId, LimitPatch)]) -> Result<(), SetLimitError> {
        self.check_patches(patches)?;
        for (id, _) in patches.iter().filter(|(_, patch)| patch.max.is_some()) {
            self.end_pending(*id, false);
        }
        for (id, patch) in patches {
            let node = self.node_mut(*id);
            if let Some(pending) = &mut node.pending {
                // The later request wins, also against what is still to come of an earlier one.
                pending.patch = pending.patch.without(patch);
            }
            let new = patch.apply(*node.limits());
            if new != *node.limits() {
                self.install(*id, new);
            }
        }
        Ok(())
    }

    /// Whether `patch` may be applied to `id`.
    ///
    /// # Errors
    /// What [`Self::set_limits`] would say.
    pub fn check_patch(&self, id: NodeId, patch: &LimitPatch) -> Result<(), SetLimitError> {
        self.check_patches(&[(id, *patch)])
    }

    /// Whether `patches` may be applied together.
    ///
    /// # Errors
    /// [`SetLimitError`] of the first node that is in the way.
    pub fn check_patches(&self, patches: &[(NodeId, LimitPatch)]) -> Result<(), SetLimitError> {
        let overruled = self.overruled(patches);
        let mut named = BTreeSet::new();
        for (id, patch) in patches {
            if !named.insert(*id) {
                return Err(SetLimitError::NamedTwice { path: self.path(*id) });
            }
            self.check_one(*id, patch, &overruled)?;
        }
        Ok(())
    }

    fn check_one(&self, id: NodeId, patch: &LimitPatch, overruled: &BTreeSet<u64>) -> Result<(), SetLimitError> {
        let node = self.node(id);
        if let Some(expected) = patch.if_generation
            && expected != node.generation
        {
            return Err(SetLimitError::Stale { path: self.path(id), expected, actual: node.generation });
        }
        let new = patch.apply(*node.limits());
        let above = |why| SetLimitError::AboveMax { path: self.path(id), why };
        new.check().map_err(above)?;
        if let Some(pending) = &node.pending
            && !overruled.contains(&pending.ticket)
        {
            // Must still hold when the pending change is done.
            pending.patch.without(patch).apply(new).check().map_err(above)?;
        }
        if node.accounting == Accounting::Off && patch.limits_something() {
            return Err(SetLimitError::NotAccounted { path: self.path(id) });
        }
        let usage = node.counters.get(Counter::Vmm).usage;
        if patch.vmm_max.is_some() && Limit::Pages(usage) > new.vmm_max {
            return Err(SetLimitError::VmmBelowUsage { path: self.path(id), usage, limit: new.vmm_max });
        }
        Ok(())
    }

    /// The pending requests that `patches` take the place of: those with a part in a node that gets a new `max`.
    fn overruled(&self, patches: &[(NodeId, LimitPatch)]) -> BTreeSet<u64> {
        let with_max = patches.iter().filter(|(_, patch)| patch.max.is_some());
        with_max.filter_map(|(id, _)| self.node(*id).pending.as_ref()).map(|pending| pending.ticket).collect()
    }

    /// Caps memory of `id` below `max` for the time being, `None` to lift the cap. Not a limit of the user's: it does
    /// not count as a change of limits.
    pub fn set_ceiling(&mut self, id: NodeId, ceiling: Option<Pages>) {
        self.node_mut(id).set_ceiling(ceiling);
    }

    /// Whether memory of `id` is above its effective high limit, pending limits included: background reclaim has work.
    pub fn above_high(&self, id: NodeId) -> bool {
        Limit::Pages(self.usage(id)) > self.reclaim_high(id)
    }

    /// What background reclaim of `id` should aim at: the effective high limit. Where a lower `max` is pending, that of
    /// the limits to come; what is to be raised later is not used before it is in force.
    pub fn reclaim_high(&self, id: NodeId) -> Limit {
        let node = self.node(id);
        let to_come = node.pending.as_ref().map(|pending| pending.patch.apply(*node.limits()));
        let limits = to_come.filter(|to_come| to_come.max < node.limits().max).unwrap_or(*node.limits());
        reclaim::effective_high(limits.high, limits.max)
    }

    /// Records a request that waits. It takes the place of every request that waits at one of its nodes. The patches
    /// have been checked. Returns its ticket.
    pub(crate) fn begin_pending(&mut self, request: &[Waits]) -> u64 {
        let nodes: Arc<[NodeId]> = request.iter().map(|waits| waits.node).collect();
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        for Waits { node: id, patch, ceiling } in request {
            self.end_pending(*id, false);
            let node = self.node_mut(*id);
            node.pending = Some(Pending { ticket, nodes: Arc::clone(&nodes), patch: *patch });
            node.set_ceiling(*ceiling);
            node.generation += 1;
        }
        ticket
    }

    /// Whether the request with this ticket still waits; `id` is any of its nodes.
    pub(crate) fn is_pending(&self, id: NodeId, ticket: u64) -> bool {
        self.contains(id) && self.node(id).pending.as_ref().is_some_and(|pending| pending.ticket == ticket)
    }

    /// Whether what is pending at `id` could come into force now. Beside `max` only `vmm.max` can be in the way:
    /// overhead may have grown since the request was checked, and cannot be reclaimed.
    pub(crate) fn pending_fits(&self, id: NodeId) -> bool {
        let node = self.node(id);
        let fits = |pending: &Pending| {
            let new = pending.patch.apply(*node.limits());
            let (memory, vmm) = (node.counters.get(Counter::Memory).usage, node.counters.get(Counter::Vmm).usage);
            let lowered = new.max < node.limits().max;
            (!lowered || Limit::Pages(memory) <= new.max)
                && (pending.patch.vmm_max.is_none() || Limit::Pages(vmm) <= new.vmm_max)
        };
        node.pending.as_ref().is_some_and(fits)
    }

    /// Ends the request that waits at `id`, if one does, at all its nodes in one step: puts it in force, or drops it.
    pub(crate) fn end_pending(&mut self, id: NodeId, commit: bool) {
        let Some(Pending { ticket, nodes, .. }) = self.node(id).pending.clone() else {
            return;
        };
        for &id in nodes.iter() {
            // A request that is about to wait has taken the place of this one at some nodes already.
            if !self.is_pending(id, ticket) {
                continue;
            }
            let node = self.node_mut(id);
            node.set_ceiling(None);
            let pending = node.pending.take().filter(|_| commit);
            let new = pending.map_or(*node.limits(), |pending| pending.patch.apply(*node.limits()));
            self.install(id, new);
        }
    }

    /// Puts `new` in force.
    fn install(&mut self, id: NodeId, new: Limits) {
        let node = self.node_mut(id);
        let was_above = node.above_high();
        node.set_limits(new);
        node.generation += 1;
        if !was_above && node.above_high() {
            self.record(id, Event::High);
        }
    }
}

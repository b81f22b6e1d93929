//! Limits of a node and how they are set: wholly or not at all.

use super::{Accounting, Counter, Node, NodeId, Tree};
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

/// Why limits were not set. The old ones are in force, wholly.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetLimitError {
    /// `min`, `low` or `high` above `max`.
    #[error("{knob} {value} would be above memory.max {max}: lower {knob} too, or both in one request")]
    AboveMax {
        /// The limit at fault, such as `memory.min`.
        knob: &'static str,
        /// Its value.
        value: Limit,
        /// The `memory.max` that it would meet, now or when a pending change is done.
        max: Limit,
    },
    /// Accounting is off, so that there is nothing to limit.
    #[error("{node:?} is not accounted: activate its accounting first")]
    NotAccounted {
        /// Path of the node.
        node: String,
    },
    /// Somebody else changed limits meanwhile.
    #[error("the limits have changed meanwhile (generation {actual}, not {expected}): read them again and decide anew")]
    Stale {
        /// The generation that the caller has seen.
        expected: u64,
        /// The generation now.
        actual: u64,
    },
    /// `vmm.max` below the overhead in use, which cannot be reclaimed.
    #[error("vmm.max {limit} is below the {} of overhead in use, which cannot be reclaimed", human(.usage.bytes()))]
    VmmBelowUsage {
        /// Overhead in use.
        usage: Pages,
        /// What was asked for.
        limit: Limit,
    },
    /// `memory.max` below usage, and the caller wanted to be refused then.
    #[error(
        "memory.max {limit} is below the {} in use: free memory first, or use mode=reclaim or mode=force",
        human(.usage.bytes())
    )]
    BelowUsage {
        /// Memory in use.
        usage: Pages,
        /// What was asked for.
        limit: Limit,
    },
}

/// A lower `memory.max` that is not yet in force.
#[derive(Clone, Debug)]
pub(super) struct PendingMax {
    /// Tells this request from a later one.
    ticket: u64,
    /// What is to be set when usage fits; `max` is in it.
    pub patch: LimitPatch,
}

impl Tree {
    /// Sets limits at once. `max` is **not** compared with usage: below it, the change is forced and the excess is an
    /// overcharge; [`crate::limit_change`] offers the alternatives. A new `max` supersedes a pending one. Returns the
    /// node's new generation, or the old one when nothing was different.
    ///
    /// # Errors
    /// [`SetLimitError`]; nothing has changed then.
    pub fn set_limits(&mut self, id: NodeId, patch: &LimitPatch) -> Result<u64, SetLimitError> {
        self.check_patch(id, patch)?;
        let node = self.node_mut(id);
        let superseded = patch.max.is_some() && node.pending.is_some();
        if superseded {
            node.pending = None;
            node.ceiling = None;
        }
        if let Some(pending) = &mut node.pending {
            // The later request wins, also against what is still to come of an earlier one.
            pending.patch = pending.patch.without(patch);
        }
        let new = patch.apply(node.limits);
        if new != node.limits || superseded {
            node.install(new);
        }
        Ok(node.generation)
    }

    /// Whether `patch` may be applied to `id`.
    ///
    /// # Errors
    /// What [`Self::set_limits`] would say.
    pub fn check_patch(&self, id: NodeId, patch: &LimitPatch) -> Result<(), SetLimitError> {
        let node = self.node(id);
        if let Some(expected) = patch.if_generation
            && expected != node.generation
        {
            return Err(SetLimitError::Stale { expected, actual: node.generation });
        }
        let new = patch.apply(node.limits);
        check_order(&new)?;
        if let Some(pending) = &node.pending
            && patch.max.is_none()
        {
            // Must still hold when the pending change is done.
            check_order(&pending.patch.without(patch).apply(new))?;
        }
        if node.accounting == Accounting::Off && patch.limits_something() {
            return Err(SetLimitError::NotAccounted { node: self.path(id) });
        }
        let usage = node.counters.get(Counter::Vmm).usage;
        if patch.vmm_max.is_some() && Limit::Pages(usage) > new.vmm_max {
            return Err(SetLimitError::VmmBelowUsage { usage, limit: new.vmm_max });
        }
        Ok(())
    }

    /// Caps memory of `id` below `max` for the time being, `None` to lift the cap. Not a limit of the user's: it does
    /// not count as a change of limits.
    pub fn set_ceiling(&mut self, id: NodeId, ceiling: Option<Pages>) {
        self.node_mut(id).ceiling = ceiling;
    }

    /// Whether memory of `id` is above its effective high limit, pending limits included: background reclaim has work.
    pub fn above_high(&self, id: NodeId) -> bool {
        Limit::Pages(self.usage(id)) > self.reclaim_high(id)
    }

    /// What background reclaim of `id` should aim at: the effective high limit, of the pending limits if there are any.
    pub fn reclaim_high(&self, id: NodeId) -> Limit {
        let node = self.node(id);
        let limits = node.pending.as_ref().map_or(node.limits, |pending| pending.patch.apply(node.limits));
        reclaim::effective_high(limits.high, limits.max)
    }

    /// Records a change that waits for usage to fall; it supersedes an earlier one. The patch has been checked.
    pub(crate) fn begin_pending(&mut self, id: NodeId, patch: LimitPatch, ceiling: Pages) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let node = self.node_mut(id);
        node.pending = Some(PendingMax { ticket, patch });
        node.ceiling = Some(ceiling);
        node.generation += 1;
        ticket
    }

    /// Whether the change with this ticket still waits.
    pub(crate) fn is_pending(&self, id: NodeId, ticket: u64) -> bool {
        self.contains(id) && self.node(id).pending.as_ref().is_some_and(|pending| pending.ticket == ticket)
    }

    /// Whether the pending change of `id` could come into force now. Only `vmm.max` can be in the way beside `max`
    /// itself: overhead may have grown since the request was checked, and cannot be reclaimed.
    pub(crate) fn pending_fits(&self, id: NodeId) -> bool {
        let node = self.node(id);
        let fits = |pending: &PendingMax| {
            let new = pending.patch.apply(node.limits);
            let (memory, vmm) = (node.counters.get(Counter::Memory).usage, node.counters.get(Counter::Vmm).usage);
            Limit::Pages(memory) <= new.max && (pending.patch.vmm_max.is_none() || Limit::Pages(vmm) <= new.vmm_max)
        };
        node.pending.as_ref().is_some_and(fits)
    }

    /// Ends the pending change of `id`: puts it in force, or drops it. Returns the new generation.
    pub(crate) fn end_pending(&mut self, id: NodeId, commit: bool) -> u64 {
        let node = self.node_mut(id);
        node.ceiling = None;
        if let Some(pending) = node.pending.take() {
            let new = if commit { pending.patch.apply(node.limits) } else { node.limits };
            node.install(new);
        }
        node.generation
    }
}

impl Node {
    /// Puts `new` in force.
    fn install(&mut self, new: Limits) {
        let usage = Limit::Pages(self.counters.get(Counter::Memory).usage);
        let was_above = usage > self.high();
        self.limits = new;
        self.generation += 1;
        self.settle_overcharge();
        if !was_above && usage > self.high() {
            self.high_hits += 1;
        }
    }
}

/// Whether the limits fit each other. [`Limit::Max`] fits everything: "all of it" for `min` and `low`, "not set" for
/// `high`.
fn check_order(limits: &Limits) -> Result<(), SetLimitError> {
    let knobs = [("memory.min", limits.min), ("memory.low", limits.low), ("memory.high", limits.high)];
    for (knob, value) in knobs {
        if !value.is_max() && value > limits.max {
            return Err(SetLimitError::AboveMax { knob, value, max: limits.max });
        }
    }
    Ok(())
}

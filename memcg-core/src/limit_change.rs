//! One change of `memory.max` while the guest runs.
//!
//! The kernel's counters of 2006 and 2012 knew two answers to a limit below usage: reclaim, then set; or refuse. Here
//! the caller chooses, and there is a third: set now and report the excess.
//!
//! ```text
//!  begin ── usage <= new, or the limit is raised ─────────────────────► in force
//!    │ usage above
//!    ├─ refuse ────────────────────────────────► error, old limit stays
//!    ├─ force ─────────────────────────────────────────────────────────► in force, excess = overcharge, may only fall
//!    └─ reclaim ─► PENDING ── usage <= new ────────────────────────────► in force
//!                    │ ▲ └─── deadline ────────► not reached, old limit stays, ceiling gone
//!                    │ └ ceiling follows usage down
//!                    └─ another change of max ─► superseded, this one touches nothing more
//! ```
//!
//! While a change is pending, `memory.max` reads the old value and a **ceiling** keeps a guest that faults back in from
//! winning the race: the lowest usage since the request + slack, never below the new limit, never above the old one. It
//! is a ratchet: it only falls, but for a guest that is held at it ([`LimitChange::widen`]).
//!
//! **Two clients.** The later request for `max` on a node supersedes the pending one, if it is accepted itself; a
//! request that is refused leaves the pending one alone. The earlier client's next step says [`Step::Superseded`]. A
//! client that does not want to overrule another gives the generation it has seen ([`LimitPatch::if_generation`]): a
//! pending request counts as a change, so it is refused as stale. Other limits may be changed meanwhile as long as they
//! fit both the old and the pending `max`.
//!
//! **All or nothing.** Everything in a patch waits with its `max` and comes into force in the same moment.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 6, B2 | a refused change leaves the old limit in force, wholly |
//! | 71 | [`Mode::Refuse`]; lowering `vmm.max` is always like that |
//! | 82, 83 | [`Mode::Force`]: the excess is reported, not hidden |
//! | 91, B91 | `high` is looked at again with each change |
//! | 118, B81 | reclaim first, then set, with `<=`: a limit of 0 is reached at usage 0, and not one page too many |
//! | B83 | a deadline, and a ceiling while reclaim races with the guest |

use std::time::Duration;

use crate::tree::{LimitPatch, NodeId, SetLimitError, Tree};
use crate::units::{Limit, PAGE_SIZE, Pages};

/// The terms on which a limit below usage is reclaimed for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// Time after which the request has failed.
    pub wait: Duration,
    /// What the guest may use above its lowest usage meanwhile.
    pub slack: Pages,
    /// How far below the new limit usage must come before it is in force early, see [`LimitChange::set_margin`].
    pub margin: Pages,
}

/// What to do when usage is above the new limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Reclaim first; the old limit stays in force until usage fits, and for good when it does not by the deadline.
    #[default]
    Reclaim,
    /// In force now; what is above is an overcharge.
    Force,
    /// An error.
    Refuse,
}

/// The room above the lowest usage that a guest needs in order to go on while it is shrunk: 1 MiB + 64 pages a vCPU.
pub fn slack(vcpus: u32) -> Pages {
    Pages((1 << 20) / PAGE_SIZE + 64 * u64::from(vcpus))
}

/// A change that is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The node's generation with it.
    pub generation: u64,
    /// Memory in use.
    pub usage: Pages,
    /// What of it is above the new limit; only after [`Mode::Force`].
    pub overcharge: Pages,
}

/// What became of a request.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a pending change must be driven to its end"]
pub enum Begun {
    /// In force.
    Committed(Outcome),
    /// Waits for usage to fall: call [`LimitChange::on_usage`] whenever it may have, and at the deadline.
    Pending(LimitChange),
}

/// How a pending change stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Not yet.
    Waiting {
        /// No charge is granted above this meanwhile.
        ceiling: Pages,
        /// How far the lowest usage is below that at the request: pages.
        progress: Pages,
    },
    /// In force.
    Committed(Outcome),
    /// The deadline passed; the old limit stays.
    NotReached {
        /// Memory in use.
        usage: Pages,
        /// Lowest memory in use since the request.
        lowest: Pages,
    },
    /// A later request, or the node's removal, has replaced this one.
    Superseded,
}

impl Step {
    /// True when nothing more will happen.
    pub fn is_final(&self) -> bool {
        !matches!(self, Step::Waiting { .. })
    }
}

/// A pending change of one node's `memory.max`.
///
/// It holds no borrow of the tree. Dropping it without an end leaves ceiling and `max_pending` in place until the next
/// change of that node's `max`; to give up, call [`LimitChange::cancel`].
#[derive(Debug, PartialEq, Eq)]
pub struct LimitChange {
    id: NodeId,
    ticket: u64,
    old: Limit,
    new: Pages,
    slack: Pages,
    margin: Pages,
    at_request: Pages,
    lowest: Pages,
    deadline: Duration,
    ended: Option<Step>,
}

impl LimitChange {
    /// Asks for a new `memory.max` of `id`. `now` is the time since any fixed start, `wait` how long usage may take to
    /// fall, `slack` see [`slack`].
    ///
    /// # Errors
    /// [`SetLimitError`] when the limits would not fit each other, or usage is above and the mode is
    /// [`Mode::Refuse`]; the old limit, and an earlier pending change, are as before.
    pub fn begin(
        tree: &mut Tree,
        id: NodeId,
        new_max: Limit,
        mode: Mode,
        now: Duration,
        terms: Terms,
    ) -> Result<Begun, SetLimitError> {
        LimitChange::begin_patch(tree, id, &LimitPatch::max(new_max), mode, now, terms)
    }

    /// [`LimitChange::begin`] for any limits: the whole patch comes into force together with its `max`. Without a `max`
    /// in it that is at once.
    ///
    /// # Errors
    /// As [`LimitChange::begin`], and when the patch's generation is not the node's.
    pub fn begin_patch(
        tree: &mut Tree,
        id: NodeId,
        patch: &LimitPatch,
        mode: Mode,
        now: Duration,
        terms: Terms,
    ) -> Result<Begun, SetLimitError> {
        tree.check_patch(id, patch)?;
        let usage = tree.usage(id);
        let old = tree.limits(id).max;
        let margin = if mode == Mode::Reclaim { terms.margin } else { Pages::ZERO };
        let above = |new: &Pages| usage + margin > *new && Limit::Pages(*new) < old;
        let lowered = patch.max.and_then(Limit::as_pages).filter(above);
        let new = match (lowered, mode) {
            (None, _) | (Some(_), Mode::Force) => {
                let generation = tree.set_limits(id, patch)?;
                return Ok(Begun::Committed(outcome(tree, id, generation)));
            }
            (Some(new), Mode::Refuse) => {
                return Err(SetLimitError::BelowUsage { usage, limit: Limit::Pages(new) });
            }
            (Some(new), Mode::Reclaim) => new,
        };
        let mut change = LimitChange {
            id,
            ticket: 0,
            old,
            new,
            slack: terms.slack,
            margin,
            at_request: usage,
            lowest: usage,
            deadline: now.saturating_add(terms.wait),
            ended: None,
        };
        change.ticket = tree.begin_pending(id, *patch, change.ceiling());
        Ok(Begun::Pending(change))
    }

    /// Looks at usage again: commits, gives up at the deadline, or lowers the ceiling. Usage that fits at the deadline
    /// is in time. After the end it repeats its last answer.
    pub fn on_usage(&mut self, tree: &mut Tree, now: Duration) -> Step {
        if let Some(step) = self.ended {
            return step;
        }
        let step = self.step(tree, now);
        if step.is_final() {
            self.ended = Some(step);
        }
        step
    }

    fn step(&mut self, tree: &mut Tree, now: Duration) -> Step {
        if !tree.is_pending(self.id, self.ticket) {
            return Step::Superseded;
        }
        let usage = tree.usage(self.id);
        self.lowest = self.lowest.min(usage);
        let settled = now >= self.deadline || usage + self.margin <= self.new;
        if settled && tree.pending_fits(self.id) {
            let generation = tree.end_pending(self.id, true);
            return Step::Committed(outcome(tree, self.id, generation));
        }
        if now >= self.deadline {
            tree.end_pending(self.id, false);
            return Step::NotReached { usage, lowest: self.lowest };
        }
        let ceiling = self.ceiling();
        tree.set_ceiling(self.id, Some(ceiling));
        Step::Waiting { ceiling, progress: self.at_request.saturating_sub(self.lowest) }
    }

    /// Before the deadline, waits until usage is `margin` below the new limit. For a guest that is still giving memory
    /// back: at the limit itself it would be held in the middle of it, and then it could give no more.
    pub fn set_margin(&mut self, margin: Pages) {
        self.margin = margin;
    }

    /// The guest is held at the ceiling: doubles the slack. What gives memory back may need memory first (a driver that
    /// collects a batch of pages before it hands them over), and a held guest gives nothing. The ceiling still never
    /// exceeds the old limit, which is the one in force.
    pub fn widen(&mut self) {
        self.slack = Pages(self.slack.0.saturating_mul(2));
    }

    /// Gives up before the deadline: the old limit stays, the ceiling goes. No effect on a change that has ended.
    pub fn cancel(self, tree: &mut Tree) {
        if self.ended.is_none() && tree.is_pending(self.id, self.ticket) {
            tree.end_pending(self.id, false);
        }
    }

    /// Lowest usage + slack, between the new limit and the old one.
    fn ceiling(&self) -> Pages {
        let ceiling = (self.lowest + self.slack).max(self.new);
        self.old.as_pages().map_or(ceiling, |old| ceiling.min(old))
    }

    /// The node.
    pub fn node(&self) -> NodeId {
        self.id
    }

    /// The limit that is asked for.
    pub fn new_max(&self) -> Pages {
        self.new
    }

    /// When it gives up, in the caller's time.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }
}

fn outcome(tree: &Tree, id: NodeId, generation: u64) -> Outcome {
    let node = tree.snapshot(id);
    Outcome { generation, usage: node.memory.usage, overcharge: node.overcharge }
}

//! Changes of limits while guests run: one node or many, wholly or not at all.
//!
//! The kernel's counters of 2006 and 2012 knew two answers to a limit below usage: reclaim, then set; or refuse. Here
//! the caller chooses, and there is a third: set now and report the excess. A request may name many nodes, for example
//! to take from one VM what another is to get. A request for one node is a request for many, with one.
//!
//! ```text
//!  begin ── a patch cannot be ─────────────────────► error, nothing has changed at any node
//!    │
//!    ├─ refuse, and usage is above somewhere ──────► error that names every such node, nothing has changed
//!    ├─ force ─────────────────────────────────────► COMMITTED, excess = overcharge, may only fall
//!    ├─ reclaim, and usage fits everywhere ────────► COMMITTED
//!    └─ reclaim ─► PENDING ── usage fits everywhere ► COMMITTED: shrunk and grown in one step
//!                   │  ▲ └─── deadline ────────────► NOT REACHED, old limits stay, ceilings gone
//!                   │  └ ceilings follow usage down
//!                   └─ a later change of max at one of the nodes, or one of them is removed
//!                                                 ─► SUPERSEDED, at all nodes; this one touches nothing more
//! ```
//!
//! **Shrink first, then grow.** While a change is pending, every limit reads its old value. What is to be raised waits
//! too: it is the memory that the others have still to give. A node whose `max` is lowered gets a **ceiling** that keeps
//! a guest that faults back in from winning the race: its lowest usage since the request + slack, never below the new
//! limit, never above the old one. It is a ratchet: it only falls, but for a guest that is held at it
//! ([`LimitChange::widen`]). A node that has come down to its new limit stays under it while others are still falling.
//!
//! **Two clients.** The later request for `max` on a node supersedes the pending one, at all its nodes, if it is
//! accepted itself; a request that is refused leaves the pending one alone. A request that has to wait itself takes the
//! place of whatever waits at its nodes. The earlier client's next look says [`State::Superseded`]. A client that does
//! not want to overrule another gives the generation that it has seen ([`LimitPatch::if_generation`]): a pending request
//! counts as a change, so it is refused as stale. Other limits may be changed meanwhile as long as they fit both the old
//! and the pending `max`.
//!
//! **Nodes come and go.** What is pending moves with its node. A node that goes offline stays part of the change, since
//! its usage can only fall; one that is removed ends it.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 6, B2 | a refused change leaves the old limits in force, wholly |
//! | 71 | [`Mode::Refuse`]; lowering `vmm.max` is always like that |
//! | 82, 83 | [`Mode::Force`]: the excess is reported, not hidden |
//! | 91, B91 | `high` is looked at again with each change |
//! | 118, B81 | reclaim first, then set, with `<=`: a limit of 0 is reached at usage 0, and not one page too many |
//! | 42, B34, B83 | a deadline, and a ceiling while reclaim races with the guest |

use std::time::Duration;

use crate::tree::{Above, LimitPatch, NodeId, SetLimitError, Tree, Waits};
use crate::units::{Limit, PAGE_SIZE, Pages};

/// What to do when usage is above a new limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Reclaim first; the old limits stay in force until usage fits, and for good when it does not by the deadline.
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

/// What is asked for at one node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// The node; the root too, whose `max` is the host's budget.
    pub node: NodeId,
    /// Its new limits.
    pub patch: LimitPatch,
    /// What the guest may use above its lowest usage while it is shrunk, see [`slack`]. In pages.
    pub slack: Pages,
    /// How far below the new `max` usage must come before that is in force early, see [`LimitChange::set_margin`].
    pub margin: Pages,
}

impl Request {
    /// A request without slack and margin.
    pub fn new(node: NodeId, patch: LimitPatch) -> Request {
        Request { node, patch, slack: Pages::ZERO, margin: Pages::ZERO }
    }
}

/// How a change stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Waits for usage to fall: call [`LimitChange::on_usage`] whenever it may have, and at the deadline.
    Pending,
    /// In force at all nodes.
    Committed,
    /// The deadline passed; the old limits stay at all nodes. [`LimitChange::nodes`] says how far each got.
    NotReached,
    /// A later request, or the removal of a node, has ended this one.
    Superseded,
}

/// One node's part in a change, as it was when the change was last looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeChange {
    /// The node.
    pub node: NodeId,
    /// Its `memory.max` before the change.
    pub old: Limit,
    /// The one that is asked for; the same as `old` when the request leaves it alone.
    pub new: Limit,
    /// Memory in use when the change was asked for.
    pub at_request: Pages,
    /// Memory in use.
    pub usage: Pages,
    /// Lowest memory in use since the request.
    pub lowest: Pages,
    /// Usage fits the new limits, with the margin.
    pub reached: bool,
    /// No charge is granted above this while the change is pending; `None` where `max` is not lowered.
    pub ceiling: Option<Pages>,
    /// Memory above `memory.max` in force; after [`Mode::Force`] what is above the new one.
    pub overcharge: Pages,
    /// The node's generation.
    pub generation: u64,
    slack: Pages,
    margin: Pages,
    /// Once reached, the new limit is the ceiling. Not for a guest that was held there and could not go on.
    latch: bool,
}

impl NodeChange {
    fn new(tree: &Tree, request: &Request) -> NodeChange {
        let old = tree.limits(request.node).max;
        let usage = tree.usage(request.node);
        let mut part = NodeChange {
            node: request.node,
            old,
            new: request.patch.max.unwrap_or(old),
            at_request: usage,
            usage,
            lowest: usage,
            reached: false,
            ceiling: None,
            overcharge: Pages::ZERO,
            generation: 0,
            slack: request.slack,
            margin: request.margin,
            latch: true,
        };
        part.look(tree);
        part
    }

    /// The new `max` where it is lower than the old one.
    fn lowered(&self) -> Option<Pages> {
        self.new.as_pages().filter(|_| self.new < self.old)
    }

    /// Pages that the node has given since the request, at its best.
    pub fn progress(&self) -> Pages {
        self.at_request.saturating_sub(self.lowest)
    }

    fn look(&mut self, tree: &Tree) {
        let node = tree.snapshot(self.node);
        self.usage = node.memory.usage;
        self.overcharge = node.overcharge;
        self.generation = node.generation;
        self.lowest = self.lowest.min(self.usage);
        let Some(new) = self.lowered() else {
            self.reached = true;
            return;
        };
        self.reached = self.usage + self.margin <= new || (self.reached && self.latch);
        let ceiling = if self.reached && self.latch { new } else { (self.lowest + self.slack).max(new) };
        self.ceiling = Some(self.old.as_pages().map_or(ceiling, |old| ceiling.min(old)));
    }
}

/// A change of the limits of one node or many.
///
/// It holds no borrow of the tree. While it is [`State::Pending`] it must be driven to its end: dropped, it leaves
/// ceilings and `max_pending` in place until the next change of a `max` there; to give up, call
/// [`LimitChange::cancel`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a pending change must be driven to its end"]
pub struct LimitChange {
    ticket: u64,
    nodes: Vec<NodeChange>,
    deadline: Duration,
    state: State,
}

impl LimitChange {
    /// Asks for new limits at the nodes of `requests`. `now` is the time since any fixed start, `wait` how long usage
    /// may take to fall. Without a `max` below usage, and in mode [`Mode::Force`], everything is in force at once.
    ///
    /// # Errors
    /// [`SetLimitError`] when a node is named twice, its generation is not the one given, its limits would not fit each
    /// other, or usage is above and the mode is [`Mode::Refuse`]. The old limits, and earlier pending changes, are as
    /// before.
    pub fn begin(
        tree: &mut Tree,
        requests: &[Request],
        mode: Mode,
        now: Duration,
        wait: Duration,
    ) -> Result<LimitChange, SetLimitError> {
        let patches: Vec<_> = requests.iter().map(|request| (request.node, request.patch)).collect();
        tree.check_patches(&patches)?;
        let nodes: Vec<_> = requests.iter().map(|request| NodeChange::new(tree, request)).collect();
        if mode == Mode::Refuse {
            let above = above(tree, &nodes);
            if !above.is_empty() {
                return Err(SetLimitError::BelowUsage { above });
            }
        }
        let deadline = now.saturating_add(wait);
        if mode == Mode::Reclaim && nodes.iter().any(|part| !part.reached) {
            let parts = nodes.iter().zip(&patches);
            let waits = parts.map(|(part, (node, patch))| Waits { node: *node, patch: *patch, ceiling: part.ceiling });
            let ticket = tree.begin_pending(&waits.collect::<Vec<_>>());
            let mut change = LimitChange { ticket, nodes, deadline, state: State::Pending };
            change.look(tree);
            return Ok(change);
        }
        tree.set_all_limits(&patches)?;
        let mut change = LimitChange { ticket: 0, nodes, deadline, state: State::Committed };
        change.look(tree);
        change.settle();
        Ok(change)
    }

    /// Looks at usage again: commits, gives up at the deadline, or lowers the ceilings. Usage that fits at the deadline
    /// is in time, whatever its margin. After the end it repeats its last answer.
    pub fn on_usage(&mut self, tree: &mut Tree, now: Duration) -> State {
        if self.state != State::Pending {
            return self.state;
        }
        if !self.is_current(tree) {
            self.state = State::Superseded;
            self.settle();
            return self.state;
        }
        self.look(tree);
        let late = now >= self.deadline;
        let settled = late || self.nodes.iter().all(|part| part.reached);
        let fits = self.nodes.iter().all(|part| tree.pending_fits(part.node));
        match (settled && fits, late) {
            (true, _) => self.end(tree, State::Committed),
            (false, true) => self.end(tree, State::NotReached),
            (false, false) => {
                for part in &self.nodes {
                    tree.set_ceiling(part.node, part.ceiling);
                }
            }
        }
        self.state
    }

    fn end(&mut self, tree: &mut Tree, state: State) {
        let reached: Vec<_> = self.nodes.iter().map(|part| tree.pending_fits(part.node)).collect();
        self.end_pending(tree, state == State::Committed);
        self.state = state;
        self.look(tree);
        self.settle();
        // At the end a margin counts no more.
        for (part, reached) in self.nodes.iter_mut().zip(reached) {
            part.reached = reached;
        }
    }

    /// The change has ended, and with it the ceilings.
    fn settle(&mut self) {
        for part in &mut self.nodes {
            part.ceiling = None;
        }
    }

    fn look(&mut self, tree: &Tree) {
        for part in &mut self.nodes {
            part.look(tree);
        }
    }

    /// Ends the tree's waiting for this change, which is current.
    fn end_pending(&self, tree: &mut Tree, commit: bool) {
        if let Some(first) = self.nodes.first() {
            tree.end_pending(first.node, commit);
        }
    }

    /// Whether the tree still waits for this change. It waits at all nodes or at none.
    fn is_current(&self, tree: &Tree) -> bool {
        self.nodes.first().is_some_and(|part| tree.is_pending(part.node, self.ticket))
    }

    /// Before the deadline, waits until usage of `node` is `margin` below its new limit. For a guest that is still
    /// giving memory back: at the limit itself it would be held in the middle of it, and then it could give no more. No
    /// effect on a node that is not part of the change.
    pub fn set_margin(&mut self, node: NodeId, margin: Pages) {
        if let Some(part) = self.nodes.iter_mut().find(|part| part.node == node) {
            part.margin = margin;
        }
    }

    /// The guest at `node` is held at its ceiling: doubles its slack. What gives memory back may need memory first (a
    /// driver that collects a batch of pages before it hands them over), and a held guest gives nothing. The ceiling
    /// still never exceeds the old limit, which is the one in force. No effect on a node that is not part of the change.
    pub fn widen(&mut self, node: NodeId) {
        if let Some(part) = self.nodes.iter_mut().find(|part| part.node == node) {
            part.slack = Pages(part.slack.0.saturating_mul(2));
            part.latch = false;
        }
    }

    /// Gives up before the deadline: the old limits stay, the ceilings go. No effect on a change that has ended.
    pub fn cancel(self, tree: &mut Tree) {
        if self.state == State::Pending && self.is_current(tree) {
            self.end_pending(tree, false);
        }
    }

    /// How it stands, as last looked at.
    pub fn state(&self) -> State {
        self.state
    }

    /// Its nodes, in the order of the request.
    pub fn nodes(&self) -> &[NodeChange] {
        &self.nodes
    }

    /// When it gives up, in the caller's time.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }
}

/// The nodes that use more than the `max` that they are to have.
fn above(tree: &Tree, nodes: &[NodeChange]) -> Vec<Above> {
    let too_much = nodes.iter().filter(|part| part.lowered().is_some_and(|new| part.usage > new));
    too_much.map(|part| Above { path: tree.path(part.node), usage: part.usage, limit: part.new }).collect()
}

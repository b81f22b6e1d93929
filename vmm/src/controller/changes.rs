//! Changes of limits while a VM runs.
//!
//! The decisions are `memcg_core::limit_change`'s; here is what surrounds them: the stock is recalled first, so that
//! pages the guest does not use are not counted against the request; the balloon and the worker learn of the new
//! aim; and whoever asked gets an answer in time:
//!
//! ```text
//!  request ─► recall ─► begin ─┬─ in force ────────────────────► 200
//!                              ├─ refused ─────────────────────► 409, nothing has changed
//!                              └─ pending ─┬─ in force ────────► 200
//!                                          ├─ wait_ms is over ─► 202, goes on
//!                                          ├─ deadline ────────► 409 limit_not_reached, old limit
//!                                          └─ later request ───► 409 superseded
//! ```

use std::time::Duration;

use memcg_core::limit_change::{LimitChange, Mode, Request, State, slack};
use memcg_core::reclaim;
use memcg_core::tree::{LimitPatch, SetLimitError};
use memcg_core::units::{Limit, Pages, human};
use serde_json::json;
use tokio::time::Instant;

use super::actor::{Actor, answer};
use super::error::{Code, Refusal};
use super::events::EventKind;
use super::host;
use super::view::VmView;
use super::vm::{Awaited, Reply, VmId, Waiting};
use crate::worker::protocol::ToWorker;

/// How long usage may take to fall below a new limit.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// How long a worker's stock is waited for; a silent worker's stays counted.
const RECALL_PATIENCE: Duration = Duration::from_millis(500);

/// A change that is asked for.
#[derive(Clone, Copy, Debug)]
pub struct MemoryChange {
    /// The new limits.
    pub patch: LimitPatch,
    /// What to do when usage is above the new `max`.
    pub mode: Mode,
    /// Whether accounting is to be on. A limit turns it on by itself, and nothing turns it off.
    pub track: Option<bool>,
    /// How long the client waits for it, [`DEADLINE`] when it does not say.
    pub wait: Option<Duration>,
}

/// A change that was accepted.
#[derive(Clone, Debug)]
pub struct Changed {
    /// It is in force; otherwise it still waits for memory to be given back.
    pub in_force: bool,
    /// The VM after it.
    pub view: VmView,
}

/// A client that waits.
struct Waiter {
    until: Instant,
    reply: Reply<Changed>,
}

/// A change that is asked for, while the stock comes back.
pub(super) struct Requested {
    change: MemoryChange,
    waiter: Waiter,
}

/// A change that waits for memory to be given back.
pub(super) struct Change {
    pub(super) pending: LimitChange,
    patch: LimitPatch,
    deadline: Instant,
    waiters: Vec<Waiter>,
    /// The recall that is not yet answered.
    recall: Option<u32>,
}

impl Change {
    /// The `memory.max` that is asked for.
    fn new_max(&self) -> Limit {
        self.pending.nodes()[0].new
    }

    /// When something has to be done about it.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.waiters.iter().map(|waiter| waiter.until).chain([self.deadline]).min()
    }
}

impl Actor {
    /// Takes a request: tests it, begins accounting where there is none yet, and recalls the stock when it could be in
    /// the way.
    pub fn change(&mut self, id: VmId, change: MemoryChange, reply: Reply<Changed>) {
        let Some((change, reply)) = self.accounted_first(id, change, reply) else { return };
        let vm = self.vms.get_mut(&id).expect("found");
        let node = vm.node;
        let wait = change.wait.unwrap_or_else(|| host::scaled(DEADLINE));
        let waiter = Waiter { until: Instant::now() + wait, reply };
        let lowered = change.patch.max.filter(|max| Limit::Pages(self.tree.usage(node)) > *max);
        if lowered.is_some() {
            if change.mode == Mode::Reclaim
                && let Some(same) = vm.change.as_mut().filter(|same| same.patch == change.patch)
            {
                // Asked for already: wait together.
                same.waiters.push(waiter);
                return;
            }
            let seq = vm.next_seq();
            if vm.send(ToWorker::Recall { seq }) {
                let until = Instant::now() + host::scaled(RECALL_PATIENCE);
                let what = Awaited::Recall(Box::new(Requested { change, waiter }));
                vm.waiting.push(Waiting { seq, until, what });
                return;
            }
        }
        self.begin_change(id, Requested { change, waiter });
    }

    /// The stock is back, or will not come: begin.
    pub fn begin_change(&mut self, id: VmId, requested: Requested) {
        let Requested { change: MemoryChange { patch, mode, wait, .. }, waiter } = requested;
        let now = self.elapsed();
        let vm = &self.vms[&id];
        let before = self.tree.generation(vm.node);
        let deadline = host::scaled(DEADLINE).max(wait.unwrap_or_default());
        let margin = patch.max.map_or(Pages::ZERO, |max| self.margin(id, max));
        let request = Request { node: vm.node, patch, slack: slack(vm.cpus), margin };
        let begun = LimitChange::begin(&mut self.tree, &[request], mode, now, deadline);
        let name = vm.name.clone();
        match begun {
            Err(error) => {
                let refusal = self.refusal(id, &error);
                answer(waiter.reply, Err(refusal));
            }
            Ok(done) if done.state() == State::Committed => {
                self.drop_superseded(id);
                if self.tree.generation(self.vms[&id].node) != before {
                    self.limits_changed(id);
                }
                let view = self.vm_view(id, false);
                answer(waiter.reply, Ok(Changed { in_force: true, view }));
            }
            Ok(pending) => {
                self.drop_superseded(id);
                let vm = self.vms.get_mut(&id).expect("found");
                vm.change = Some(Change {
                    pending,
                    patch: LimitPatch { if_generation: None, ..patch },
                    deadline: Instant::now() + deadline,
                    waiters: vec![waiter],
                    recall: None,
                });
                vm.grant_due = true;
                let wanted = patch.max.and_then(Limit::as_bytes);
                let details = self.account(id, json!({ "max_pending_bytes": wanted }));
                self.event(EventKind::LimitRequested, Some(&name), details);
                self.aim_balloon(id);
            }
        }
    }

    /// Tells the clients of a change that a later one has replaced.
    fn drop_superseded(&mut self, id: VmId) {
        let Some(vm) = self.vms.get_mut(&id) else {
            return;
        };
        let now = self.start.elapsed();
        let replaced = vm.change.take_if(|change| change.pending.on_usage(&mut self.tree, now) == State::Superseded);
        if let Some(change) = replaced {
            let refusal = Refusal::new(Code::Superseded, "a later change of memory.max took this one's place");
            for waiter in change.waiters {
                answer(waiter.reply, Err(refusal.clone()));
            }
        }
    }

    /// Drives every pending change.
    pub fn advance_changes(&mut self) {
        for id in self.vms.changing() {
            self.advance_change(id);
        }
    }

    /// Looks at a pending change again.
    pub fn advance_change(&mut self, id: VmId) {
        let now = self.elapsed();
        let Some(vm) = self.vms.get_mut(&id) else {
            return;
        };
        let node = vm.node;
        let Some(new) = vm.change.as_ref().map(Change::new_max) else { return };
        let margin = self.margin(id, new);
        let vm = self.vms.get_mut(&id).expect("checked");
        let Some(change) = &mut vm.change else { return };
        change.pending.set_margin(node, margin);
        let ceiling = self.tree.snapshot(node).ceiling;
        match change.pending.on_usage(&mut self.tree, now) {
            State::Pending => {
                vm.grant_due |= ceiling != self.tree.snapshot(node).ceiling;
                self.recall_last(id);
            }
            State::Committed => {
                let waiters = self.take_waiters(id);
                self.limits_changed(id);
                for waiter in waiters {
                    let view = self.vm_view(id, false);
                    answer(waiter.reply, Ok(Changed { in_force: true, view }));
                }
            }
            State::NotReached => {
                let part = &change.pending.nodes()[0];
                let (usage, lowest) = (part.usage, part.lowest);
                let waiters = self.take_waiters(id);
                let details = self.account(id, json!({ "lowest_bytes": lowest.bytes() }));
                let vm = self.vms.get_mut(&id).expect("checked");
                // The ceiling is gone.
                vm.grant_due = true;
                self.roomier = true;
                let limits = self.tree.limits(node);
                let name = vm.name.clone();
                let refusal = Refusal::new(
                    Code::LimitNotReached,
                    format!(
                        "the guest did not give enough memory back in time: usage is {}, memory.max is still {}; \
                         wait longer with --wait, or use --mode force",
                        human(usage.bytes()),
                        limits.max
                    ),
                )
                .usage(usage.bytes())
                .generation(self.tree.generation(node));
                self.event(EventKind::LimitNotReached, Some(&name), details);
                self.aim_balloon(id);
                for waiter in waiters {
                    answer(waiter.reply, Err(refusal.clone()));
                }
            }
            State::Superseded => self.drop_superseded(id),
        }
    }

    /// Recalls the stock when it alone keeps a pending change from being in force.
    fn recall_last(&mut self, id: VmId) {
        let vm = self.vms.get_mut(&id).expect("checked");
        let stock = vm.report.stock + vm.in_flight();
        let usage = self.tree.usage(vm.node);
        let answered = vm.report.answers;
        let Some(change) = &mut vm.change else { return };
        if change.recall.is_some() && answered == change.recall {
            change.recall = None;
        }
        let enough = Limit::Pages(usage.saturating_sub(Pages(stock))) <= change.new_max();
        if stock > 0 && enough && change.recall.is_none() {
            let seq = vm.next_seq();
            // One that was not sent is not waited for: the next report is the next chance.
            let sent = vm.send(ToWorker::Recall { seq });
            if let Some(change) = &mut vm.change {
                change.recall = sent.then_some(seq);
            }
        }
    }

    /// How far below a new `max` usage must be before that is in force early: as far as the balloon aims, unless it is
    /// there already. A guest without a balloon driver gives nothing, so there is nothing to wait for.
    fn margin(&self, id: VmId, max: Limit) -> Pages {
        let vm = &self.vms[&id];
        let (Limit::Pages(new), Limit::Pages(high)) = (max, reclaim::effective_high(Limit::Max, max)) else {
            return Pages::ZERO;
        };
        let target = self.balloon_for(id, Limit::Pages(high));
        let there = u64::from(vm.report.balloon_actual) >= target.0;
        if !vm.report.balloon_ready || there { Pages::ZERO } else { new.saturating_sub(high) }
    }

    /// Ends what is overdue: clients that do not want to wait longer, and the change itself.
    pub fn overdue_change(&mut self, id: VmId, now: Instant) {
        self.advance_change(id);
        while let Some(vm) = self.vms.get_mut(&id)
            && let Some(change) = &mut vm.change
            && let Some(index) = change.waiters.iter().position(|waiter| waiter.until <= now)
        {
            let waiter = change.waiters.swap_remove(index);
            let view = self.vm_view(id, false);
            answer(waiter.reply, Ok(Changed { in_force: false, view }));
        }
    }

    /// The VM has ended before its change.
    pub fn abandon_change(&mut self, change: Change, why: &Refusal) {
        change.pending.cancel(&mut self.tree);
        for waiter in change.waiters {
            answer(waiter.reply, Err(why.clone()));
        }
    }

    /// Nobody will begin this change any more.
    pub fn abandon_request(requested: Requested, why: &Refusal) {
        answer(requested.waiter.reply, Err(why.clone()));
    }

    fn take_waiters(&mut self, id: VmId) -> Vec<Waiter> {
        self.vms.get_mut(&id).and_then(|vm| vm.change.take()).map(|change| change.waiters).unwrap_or_default()
    }

    /// Limits have come into force: everybody concerned learns of it.
    fn limits_changed(&mut self, id: VmId) {
        let vm = self.vms.get_mut(&id).expect("checked");
        vm.grant_due = true;
        self.roomier = true;
        let counters = self.tree.snapshot(vm.node);
        let name = vm.name.clone();
        let limits = counters.limits;
        let details = self.account(
            id,
            json!({
                "generation": counters.generation,
                "min_bytes": limits.min.as_bytes(),
                "low_bytes": limits.low.as_bytes(),
                "high_bytes": limits.high.as_bytes(),
                "swap_max_bytes": limits.swap_max.as_bytes(),
                "vmm_max_bytes": limits.vmm_max.as_bytes(),
                "overcharge_bytes": counters.overcharge.bytes(),
            }),
        );
        self.event(EventKind::LimitChanged, Some(&name), details);
        self.aim_balloon(id);
    }

    /// What the interface says about a change that was refused.
    pub fn refusal(&self, id: VmId, error: &SetLimitError) -> Refusal {
        let node = self.vms[&id].node;
        let code = match error {
            SetLimitError::AboveMax { .. } => Code::InvalidLimit,
            SetLimitError::Stale { .. } => Code::GenerationMismatch,
            SetLimitError::NotAccounted { .. } => Code::NotAccounted,
            SetLimitError::VmmBelowUsage { .. } | SetLimitError::BelowUsage { .. } => Code::LimitBelowUsage,
            SetLimitError::NamedTwice { .. } => Code::BadRequest,
        };
        Refusal::new(code, error.to_string())
            .usage(self.tree.usage(node).bytes())
            .generation(self.tree.generation(node))
    }
}

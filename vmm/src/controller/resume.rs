//! Paused VMs that go on: when they may, what is missing until then, and who waits for it.
//!
//! | paused by | goes on when asked, if | goes on by itself |
//! | --- | --- | --- |
//! | somebody at the interface | | never |
//! | its policy | what it owes fits its limits | with room for more than that (`grants.rs`) |
//! | the policy, for others | what it gave up fits | when they have been well for some time (`victim.rs`) |
//!
//! ```text
//!            may it? ── yes ─────────────────────────────► Resume, the answer when its worker has heard
//!  resume ──►  │ no, and time to wait: again after each input ──┤
//!              └ no, and none is left ─► 409 with what is missing
//! ```
//!
//! A VM that the policy has paused may be paused by somebody at the interface as well. Then it is *kept*: what it was paused for
//! still holds, but it does not go on by itself. Whoever asks for it to go on takes that back, whether it can at once or not.

use serde_json::{Value, json};
use tokio::time::Instant;

use super::actor::{Actor, PAUSE_PATIENCE, answer, refuse, silent};
use super::error::{Code, Refusal};
use super::events::EventKind;
use super::grants::GO_ON;
use super::host;
use super::journal::Entry;
use super::view::{PausedBy, VmState, VmView};
use super::vm::{Awaited, Reply, VmId, Waiting};
use crate::worker::protocol::ToWorker;
use memcg_core::units::{Pages, human};

/// Somebody who waits for a VM to go on.
pub(super) struct Resuming {
    id: VmId,
    until: Instant,
    reply: Reply<VmView>,
}

impl Resuming {
    /// When it is told what is missing.
    pub fn deadline(&self) -> Instant {
        self.until
    }
}

/// Why a VM may not go on, and what the event of that says beside the account.
type Obstacle = (Refusal, Value);

impl Actor {
    /// Lets the vCPUs go on for somebody at the interface, who waits until `until` for that to be possible.
    pub fn resume_on_request(&mut self, name: &str, until: Instant, reply: Reply<VmView>) {
        let id = match self.find_alive(name).and_then(|id| self.can_remember().map(|()| id)) {
            Ok(id) => id,
            Err(refusal) => return answer(reply, Err(refusal)),
        };
        let vm = self.vms.get_mut(&id).expect("found");
        if vm.state != VmState::Paused {
            answer(reply, Ok(self.vm_view(id, false)));
            return;
        }
        if std::mem::take(&mut vm.kept_paused)
            && let Some(by) = vm.paused_by
        {
            let vm = vm.name.clone();
            self.remember(Entry::Paused { vm, by });
        }
        match self.may_go_on(id) {
            Ok(()) => self.resume(id, "request", Some(reply)),
            Err(_) if until > Instant::now() => self.resumes.push(Resuming { id, until, reply }),
            Err(obstacle) => self.refuse_resume(id, obstacle, reply),
        }
    }

    /// Lets the vCPUs of a paused VM go on that is to end, as soon as that is possible until `until`. Nobody is told when it is not.
    pub fn resume_to_stop(&mut self, id: VmId, until: Instant) {
        match self.may_go_on(id) {
            Ok(()) => self.resume(id, "stop", None),
            Err(_) => {
                // It is killed before it would be refused.
                let (reply, _) = tokio::sync::oneshot::channel();
                self.resumes.push(Resuming { id, until: until + host::scaled(PAUSE_PATIENCE), reply });
            }
        }
    }

    /// Whether a paused VM may go on now. What it owes is charged then.
    fn may_go_on(&mut self, id: VmId) -> Result<(), Obstacle> {
        if let Some(refusal) = self.stays_empty(id) {
            let why = json!({ "why": refusal.message, "missing_bytes": refusal.missing_bytes });
            return Err((refusal, why));
        }
        if self.vms[&id].paused_by == Some(PausedBy::User) || self.pay(id) {
            return Ok(());
        }
        let vm = &self.vms[&id];
        let room = self.tree.margin(vm.node).unwrap_or_default();
        let missing = Pages(vm.need()).saturating_sub(room);
        let usage = self.tree.usage(vm.node).bytes();
        let (limit, raise) = self.limit_in_the_way(id, missing);
        let missing = missing.bytes();
        let message = format!(
            "the VM {:?} needs {} more than {limit} leaves: raise it with `{raise}`",
            self.vms[&id].name,
            human(missing)
        );
        let refusal = Refusal::new(Code::ResumeRefused, message).usage(usage).missing(missing);
        Err((refusal, json!({ "missing_bytes": missing })))
    }

    /// What is missing until a VM may go on that was paused for want of memory.
    pub fn resume_missing(&self, id: VmId) -> Option<Pages> {
        if self.is_emptied(id) {
            return Some(self.missing(id).map_or(Pages::ZERO, |(missing, _)| missing));
        }
        let need = self.resume_need(id)? + Pages(GO_ON);
        Some(need.saturating_sub(self.tree.margin(self.vms[&id].node).unwrap_or(need)))
    }

    /// What has to be there for a VM to go on that was paused for want of memory.
    pub fn resume_need(&self, id: VmId) -> Option<Pages> {
        let vm = &self.vms[&id];
        match vm.paused_by.filter(|_| vm.state == VmState::Paused)? {
            PausedBy::User => None,
            PausedBy::Policy => Some(Pages(vm.need())),
            PausedBy::Host | PausedBy::Group => Some(self.comes_back(id)),
        }
    }

    /// Refuses to let a VM go on: an answer, and an event with what explains it.
    fn refuse_resume(&mut self, id: VmId, (refusal, more): Obstacle, reply: Reply<VmView>) {
        let details = self.account(id, more);
        let name = self.vms[&id].name.clone();
        self.event(EventKind::ResumeRefused, Some(&name), details);
        answer(reply, Err(refusal));
    }

    /// Answers those whose VM goes on, or has ended, and lets go on what may by now.
    pub fn serve_resumes(&mut self) {
        for waiting in std::mem::take(&mut self.resumes) {
            match self.vms.get(&waiting.id).map(|vm| vm.state) {
                Some(VmState::Paused) if self.may_go_on(waiting.id).is_ok() => {
                    self.resume(waiting.id, "request", Some(waiting.reply));
                }
                Some(VmState::Paused) => self.resumes.push(waiting),
                Some(VmState::Starting | VmState::Running) => {
                    answer(waiting.reply, Ok(self.vm_view(waiting.id, false)));
                }
                Some(VmState::Ended) | None => {
                    answer(waiting.reply, Err(Refusal::new(Code::WrongState, "the VM has ended")));
                }
            }
        }
    }

    /// Tells those whose time is over what is missing.
    pub fn overdue_resumes(&mut self, now: Instant) {
        let late: Vec<_> = self.resumes.extract_if(.., |waiting| waiting.until <= now).collect();
        for Resuming { id, reply, .. } in late {
            match self.vms.get(&id).is_some_and(|vm| vm.state == VmState::Paused).then(|| self.may_go_on(id)) {
                Some(Err(obstacle)) => self.refuse_resume(id, obstacle, reply),
                // It may: that is done, and said, after this input like after every other.
                _ => self.resumes.push(Resuming { id, until: now + host::scaled(PAUSE_PATIENCE), reply }),
            }
        }
    }

    /// Somebody pauses the VM again that others wait for.
    pub fn supersede_resumes(&mut self, id: VmId) {
        for waiting in self.resumes.extract_if(.., |waiting| waiting.id == id).collect::<Vec<_>>() {
            answer(waiting.reply, Err(Refusal::new(Code::Superseded, "a later request paused the VM")));
        }
    }

    /// Lets the vCPUs go on.
    pub fn resume(&mut self, id: VmId, by: &str, reply: Option<Reply<VmView>>) {
        let vm = self.vms.get_mut(&id).expect("found");
        let seq = vm.next_seq();
        if !vm.send(ToWorker::Resume { seq }) {
            let silent = silent(&vm.name);
            refuse(reply, silent);
            return;
        }
        // It is a candidate like any other.
        self.victims.forget(vm.node);
        vm.state = VmState::Running;
        vm.resume_seq = Some(seq);
        (vm.paused_by, vm.kept_paused) = (None, false);
        vm.grant_due = true;
        vm.report.paused = false;
        // The worker answers no pause that was taken back before its vCPUs were out.
        let taken_back = vm.waiting.extract_if(.., |w| matches!(w.what, Awaited::Paused(_)));
        for waiting in taken_back.collect::<Vec<_>>() {
            if let Awaited::Paused(reply) = waiting.what {
                answer(reply, Err(Refusal::new(Code::Superseded, "a later request let the VM go on")));
            }
        }
        // Time in which nobody could have helped does not count.
        vm.holds = Default::default();
        vm.count_hold(self.start.elapsed());
        if let Some(hold) = &mut vm.hold {
            hold.since = Instant::now();
            hold.deadline = hold.since + vm.oom.deadline;
            (hold.recalled, hold.acted) = (false, false);
        }
        if let Some(reply) = reply {
            let until = Instant::now() + host::scaled(PAUSE_PATIENCE);
            vm.waiting.push(Waiting { seq, until, what: Awaited::Resumed(reply) });
        }
        let details = self.account(id, json!({ "by": by }));
        let name = self.vms[&id].name.clone();
        self.remember(Entry::Resumed { vm: name.clone() });
        self.event(EventKind::Resumed, Some(&name), details);
    }
}

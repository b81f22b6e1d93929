//! Somebody is chosen: the host has no memory left, and what its VMs were asked for did not come in time.
//!
//! Who goes is `memcg_core::oom`'s: one after the other, by rules that `ballast oom rank` shows beforehand. Here it is done, and
//! said why, with the whole list.
//!
//! ```text
//!              ┌─ pause: vCPUs stop, then all of its memory is evicted ─── host calm, and room for what was evicted ──► resume
//!  critical ───┤
//!              └─ kill: its worker ends, and the host has its memory back
//! ```
//!
//! A pause is a remedy only by what it frees. So a VM that is paused for others is *emptied*: its ladder has a goal of
//! nothing, and ends when nothing is left that could be evicted. It goes on by itself when the host has been calm for long
//! enough and has room for what is to come back; nobody else may let it go on before.

use std::time::Duration;

use memcg_core::oom::{self, Choice};
use memcg_core::tree::{Event, NodeId};
use memcg_core::units::{Pages, human};
use serde_json::{Value, json};

use super::actor::Actor;
use super::changes::Target;
use super::error::{Code, Refusal};
use super::events::{EventKind, merged};
use super::oom_log::DecidedBy;
use super::view::{OomAction, PausedBy, VmState};
use super::vm::{KilledBy, Vm, VmEnd, VmId};

/// How long the memory of one who was chosen may take to come back before the next one is chosen.
pub const RETURNS: Duration = Duration::from_secs(10);

/// Entries of the list that an event shows, at most: more would crowd the others out of the log.
const SHOWN: usize = 10;

impl Actor {
    /// Chooses somebody for the host, and says whether the time to cool down begins.
    pub fn choose_for_host(&mut self) -> bool {
        let mut victims = self.victims.clone();
        let ranked = oom::rank(&self.candidates(self.root));
        let list: Vec<_> = ranked.iter().take(SHOWN).map(ToString::to_string).collect();
        let chosen = match victims.decide(&self.tree, self.root, &ranked, self.elapsed()) {
            Choice::Wait(_) => None,
            Choice::Nobody(why) => Some((None, why.to_string())),
            Choice::Act(entry) => Some((Some(entry.candidate.id), entry.to_string())),
        };
        self.victims = victims;
        let Some((node, why)) = chosen else { return false };
        let details = json!({ "why": why, "ranked": list });
        if let Some(id) = node.and_then(|node| self.owners().remove(&node)) {
            return self.act_for_host(id, details);
        }
        tracing::warn!(why, "the host has no memory left");
        let number = self.log_nobody(self.root, DecidedBy::Policy, &why);
        self.event(EventKind::NobodyChosen, None, merged(details, json!({ "decision": number })));
        true
    }

    /// Does what was chosen. False when it cannot be done: the next one is chosen at the next look.
    fn act_for_host(&mut self, id: VmId, why: Value) -> bool {
        let vm = &self.vms[&id];
        let (node, name, action) = (vm.node, vm.name.clone(), vm.oom.action);
        if action == OomAction::Pause && vm.to_worker.capacity() == 0 {
            self.victims.failed(node);
            self.log_decision(id, self.root, DecidedBy::Policy);
            return false;
        }
        tracing::warn!(vm = name, ?action, "the host has no memory left");
        self.tell_victim(id, self.root, why);
        match action {
            OomAction::Pause => {
                self.pause(id, PausedBy::Host, None);
                self.look_soon(Target::Vm(id));
            }
            OomAction::Kill => self.kill(id, VmEnd::Killed(KilledBy::Host)),
        }
        true
    }

    /// Counts and tells that the policy acts on a VM because `level` has no room; `more` is what else explains it.
    pub fn tell_victim(&mut self, id: VmId, level: NodeId, more: Value) {
        let number = self.log_decision(id, level, DecidedBy::Policy);
        let vm = &self.vms[&id];
        let (node, name) = (vm.node, vm.name.clone());
        let (counted, action) = match vm.oom.action {
            OomAction::Pause => (Event::OomPause, "pause"),
            OomAction::Kill => (Event::OomKill, "kill"),
        };
        self.tree.record(level, Event::Oom);
        self.tree.record(node, counted);
        let said = json!({ "action": action, "limit_of": self.tree.path(level), "decision": number });
        let details = self.account(id, merged(said, more));
        self.event(EventKind::VictimSelected, Some(&name), details);
    }

    /// Whether a VM stands still for others, and gives all that it has.
    pub fn is_emptied(&self, id: VmId) -> bool {
        let vm = &self.vms[&id];
        vm.state == VmState::Paused && vm.paused_by == Some(PausedBy::Host)
    }

    /// What a VM that was emptied needs in order to go on as before: what was evicted, less what that takes now.
    pub fn comes_back(&self, id: VmId) -> Pages {
        let report = &self.vms[&id].report;
        Pages(report.swapped.saturating_sub(report.store))
    }

    /// Why a VM that was emptied may not go on now, if it may not.
    pub fn stays_empty(&self, id: VmId) -> Option<Refusal> {
        let shortage = self.shortage.as_ref().filter(|_| self.is_emptied(id))?;
        let missing = shortage.missing_for(self.comes_back(id));
        let name = &self.vms[&id].name;
        if missing.is_zero() {
            return None;
        }
        let message = format!(
            "the VM {name:?} was paused because the host ran short of memory, and {} are missing still: it goes on by itself \
             when they are there; `ballast oom rank` shows who holds how much",
            human(missing.bytes())
        );
        let usage = self.tree.usage(self.vms[&id].node).bytes();
        Some(Refusal::new(Code::ResumeRefused, message).usage(usage).missing(missing.bytes()))
    }

    /// The host has been calm: who was paused first goes on, if there is room.
    pub fn resume_for_host(&mut self) -> bool {
        let emptied = |(id, vm): &(VmId, &Vm)| self.is_emptied(*id) && !vm.kept_paused;
        let Some(id) = self.vms.iter().filter(emptied).map(|(id, _)| id).next() else { return false };
        if self.stays_empty(id).is_some() {
            return false;
        }
        self.victims.forget(self.vms[&id].node);
        self.resume(id, "policy", None);
        true
    }
}

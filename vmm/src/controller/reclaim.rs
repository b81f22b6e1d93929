//! `reclaim`: memory that somebody wants back now from a VM or a group, whatever the limits.
//!
//! As `memory.reclaim` of cgroup v2: usage is to fall by so many bytes, by all means that do not hurt: stock, balloon,
//! eviction. What a group is to give is divided among its VMs as it is for a limit. Nothing is held for it, no limit changes, and the guest may take everything again. Asked for is a *goal*
//! of the ladder (`ladders.rs`); the answer comes when usage has been there, or with how far it got, when the time is
//! over or nothing more can be had.

use std::time::Duration;

use memcg_core::ladder::Rung;
use memcg_core::units::Pages;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::Controller;
use super::actor::{Actor, answer};
use super::changes::Target;
use super::error::{Code, Refusal};
use super::view::{GroupView, VmView};
use super::vm::Reply;

/// What came of a request for memory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReclaimedView {
    /// What was asked for, rounded up to pages.
    pub requested_bytes: u64,
    /// By how much usage has fallen at its lowest.
    pub reclaimed_bytes: u64,
    /// The VM now, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmView>,
    /// The group now, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupView>,
}

impl ReclaimedView {
    /// All that was asked for has come back.
    pub fn is_reached(&self) -> bool {
        self.reclaimed_bytes >= self.requested_bytes
    }
}

/// A request that waits for memory.
pub(super) struct Reclaiming {
    target: Target,
    /// Usage when it came, and at its lowest since.
    from: Pages,
    lowest: Pages,
    goal: Pages,
    wanted: Pages,
    until: Instant,
    reply: Reply<ReclaimedView>,
}

impl Reclaiming {
    /// When the client is told how far it got.
    pub fn deadline(&self) -> Instant {
        self.until
    }
}

impl Controller {
    /// Takes `bytes` back from a VM, and answers within `wait` how far it got.
    ///
    /// # Errors
    /// See [`Code`]: there is no such VM, it is not charged, or it is just starting.
    pub async fn reclaim(&self, name: &str, bytes: u64, wait: Duration) -> Result<ReclaimedView, Refusal> {
        let name = name.to_owned();
        let target = move |actor: &Actor| actor.reclaimable_vm(&name);
        self.ask(move |actor, reply| actor.reclaim(target(actor), Pages::from_bytes_ceil(bytes), wait, reply)).await
    }

    /// Takes `bytes` back from the VMs of a group together; as [`Self::reclaim`].
    ///
    /// # Errors
    /// See [`Code`]: there is no such group, or none of its VMs is charged.
    pub async fn reclaim_group(&self, path: &str, bytes: u64, wait: Duration) -> Result<ReclaimedView, Refusal> {
        let path = path.to_owned();
        let target = move |actor: &Actor| actor.reclaimable_group(&path);
        self.ask(move |actor, reply| actor.reclaim(target(actor), Pages::from_bytes_ceil(bytes), wait, reply)).await
    }
}

impl Actor {
    /// The VM of this name, if it can be asked for memory.
    fn reclaimable_vm(&self, name: &str) -> Result<Target, Refusal> {
        let id = self.find_alive(name)?;
        if !self.vms[&id].accounted() {
            let message = format!("what the VM {name:?} uses is not known: `ballast set {name} track=on` first");
            return Err(Refusal::new(Code::NotAccounted, message));
        }
        if !self.may_climb(Target::Vm(id)) {
            return Err(Refusal::new(Code::WrongState, format!("the VM {name:?} is still starting")));
        }
        Ok(Target::Vm(id))
    }

    /// The group at this path, if its VMs can be asked for memory.
    fn reclaimable_group(&self, path: &str) -> Result<Target, Refusal> {
        let target = Target::Group(self.find_group(path)?);
        let vms = self.vms_of(target);
        if !vms.is_empty() && !vms.iter().any(|id| self.vms[id].accounted()) {
            let message = format!("what the VMs in {path} use is not known: `ballast group set {path} track=on` first");
            return Err(Refusal::new(Code::NotAccounted, message));
        }
        self.check_there(target)?;
        Ok(target)
    }

    /// Takes `wanted` pages back from a target, and answers when that is done, or over.
    pub fn reclaim(
        &mut self,
        target: Result<Target, Refusal>,
        wanted: Pages,
        wait: Duration,
        reply: Reply<ReclaimedView>,
    ) {
        let target = match target {
            Ok(target) => target,
            Err(refusal) => return answer(reply, Err(refusal)),
        };
        // What was stuck before may not be now: each request is an attempt of its own.
        for id in self.vms_of(target) {
            self.vms.get_mut(&id).expect("listed").report.cold.stuck = false;
        }
        let from = self.tree.usage(self.node_of(target));
        let (lowest, goal, until) = (from, from.saturating_sub(wanted), Instant::now() + wait);
        self.reclaims.push(Reclaiming { target, from, lowest, goal, wanted, until, reply });
        self.goal_changed(target);
    }

    /// Somebody wants another usage of a target than before, or nobody does any more.
    fn goal_changed(&mut self, target: Target) {
        if let Target::Group(node) = target {
            self.squeeze(node);
        }
        self.look_soon(target);
    }

    /// Whether somebody waits for memory of a target.
    pub fn reclaiming(&self, target: Target) -> bool {
        self.reclaims.iter().any(|wanted| wanted.target == target)
    }

    /// What somebody wants a target to come down to, the least of all, and until when.
    pub fn reclaim_goal(&self, target: Target) -> Option<(Pages, Instant)> {
        let wanted = self.reclaims.iter().filter(|wanted| wanted.target == target);
        wanted.min_by_key(|wanted| wanted.goal).map(|wanted| (wanted.goal, wanted.until))
    }

    /// Whether nothing more can be had of a target than what it has given, as far as is known.
    pub fn is_stuck(&self, target: Target) -> bool {
        self.ladders.get(&target).is_some_and(|climb| climb.rung() == Rung::Stuck)
    }

    /// A target was looked at: answers those who have what they wanted, or will not get more.
    pub fn answer_reclaims(&mut self, target: Target) {
        if !self.reclaiming(target) {
            return;
        }
        let usage = self.tree.usage(self.node_of(target));
        let stuck = self.is_stuck(target);
        let now = Instant::now();
        for wanted in self.reclaims.iter_mut().filter(|wanted| wanted.target == target) {
            wanted.lowest = wanted.lowest.min(usage);
        }
        let over = |wanted: &mut Reclaiming| {
            wanted.target == target && (wanted.lowest <= wanted.goal || stuck || wanted.until <= now)
        };
        let over: Vec<_> = self.reclaims.extract_if(.., over).collect();
        if !over.is_empty() {
            self.goal_changed(target);
        }
        for Reclaiming { from, lowest, wanted, reply, .. } in over {
            let (vm, group) = match target {
                Target::Vm(id) => (Some(self.vm_view(id, false)), None),
                Target::Group(node) => (None, Some(self.group_view(node))),
            };
            let reclaimed = from.saturating_sub(lowest).min(wanted);
            let (requested_bytes, reclaimed_bytes) = (wanted.bytes(), reclaimed.bytes());
            answer(reply, Ok(ReclaimedView { requested_bytes, reclaimed_bytes, vm, group }));
        }
    }

    /// Tells clients whose time is over.
    pub fn overdue_reclaims(&mut self, now: Instant) {
        let late: Vec<_> =
            self.reclaims.iter().filter(|wanted| wanted.until <= now).map(|wanted| wanted.target).collect();
        for target in late {
            self.answer_reclaims(target);
        }
    }

    /// A target is gone: so is what was wanted of it.
    pub fn abandon_reclaims(&mut self, target: Target, why: &Refusal) {
        let gone: Vec<_> = self.reclaims.extract_if(.., |wanted| wanted.target == target).collect();
        for wanted in gone {
            answer(wanted.reply, Err(why.clone()));
        }
    }
}

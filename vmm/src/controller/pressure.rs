//! `memory.pressure` of VMs and groups: what the workers say, booked at every level.
//!
//! A worker says when a hold begins and when it ends, and with everything else how long its vCPUs were held in all. So the
//! actor knows a hold that lasts while it lasts, and one that was over before anybody heard of it by its length: it
//! is booked as the time before the report. So is the time in which vCPUs waited for evicted pages to come back: which of
//! them is not known, so that of several vCPUs one waits. Nobody is woken to be asked; [`Pressure`] works out the time in which nothing
//! changed when somebody looks.
//!
//! A VM counts while it would run: running, held, or paused because it has no memory. One that a user has paused would
//! not. A worker's word cannot count for more than the time that has passed since the last one.

use std::collections::BTreeMap;
use std::time::Duration;

use memcg_core::pressure::{Averages, Member, Pressure};
use memcg_core::tree::{NodeId, Tree};

use super::actor::Actor;
use super::view::{PausedBy, PressureLine, PressureView, VmState};
use super::vm::{Vm, VmId};

/// What of a VM matters here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stall {
    member: Member,
    /// Time that its vCPUs were held in all, as its worker says.
    held_us: u64,
    /// Time that they waited for evicted pages in all, likewise.
    refault_us: u64,
}

impl Stall {
    /// What `vm` is doing.
    pub fn of(vm: &Vm) -> Self {
        let would_run = match vm.state {
            VmState::Running => true,
            VmState::Paused => vm.paused_by == Some(PausedBy::Policy),
            VmState::Starting | VmState::Ended => false,
        };
        let member = match (would_run, vm.report.held) {
            (false, _) => Member::Idle,
            (true, false) => Member::Running,
            // A hold is of every vCPU.
            (true, true) => Member::Fully,
        };
        Self { member, held_us: vm.report.held_us, refault_us: vm.report.refault_us }
    }
}

/// The pressure of every node, and how each VM is counted in it.
#[derive(Default)]
pub(super) struct Pressures {
    nodes: BTreeMap<NodeId, Pressure>,
    vms: BTreeMap<VmId, Counted>,
}

#[derive(Default)]
struct Counted {
    stall: Stall,
    /// Its node and those above, in which it is counted.
    places: Vec<NodeId>,
}

impl Pressures {
    fn change(&mut self, places: &[NodeId], at: Duration, from: Member, to: Member) {
        for place in places {
            self.nodes.entry(*place).or_insert_with(|| Pressure::new(at)).change(at, from, to);
        }
    }

    /// Forgets nodes that are no longer there.
    pub fn prune(&mut self, tree: &Tree) {
        self.nodes.retain(|node, _| tree.contains(*node));
    }
}

impl Actor {
    /// Books what has become of the VMs that have changed since the last time.
    pub fn feel_pressure(&mut self) {
        for id in self.vms.restless() {
            self.feel(id);
        }
    }

    /// Books what has become of one VM, or that it is in another place of the tree.
    pub fn feel(&mut self, id: VmId) {
        let now = self.elapsed();
        let mut counted = self.pressures.vms.remove(&id).unwrap_or_default();
        let Some(vm) = self.vms.get(&id) else { return };
        let stall = Stall::of(vm);
        let places: Vec<_> = self.tree.ancestry(vm.node).collect();
        if places != counted.places {
            self.pressures.change(&counted.places, now, counted.stall.member, Member::Idle);
            self.pressures.change(&places, now, Member::Idle, counted.stall.member);
            counted.places = places;
        }
        let mut before = counted.stall.member;
        if before == Member::Running {
            let ago = |us| now.saturating_sub(Duration::from_micros(us));
            let held = stall.held_us.saturating_sub(counted.stall.held_us);
            let refaults = stall.refault_us.saturating_sub(counted.stall.refault_us);
            let waits = if vm.cpus == 1 { Member::Fully } else { Member::Partly };
            // A hold that has begun since the last report, and that may be over, and before it what was waited for.
            for (us, since, state) in
                [(refaults, ago(held.saturating_add(refaults)), waits), (held, ago(held), Member::Fully)]
            {
                if us > 0 {
                    self.pressures.change(&counted.places, since, before, state);
                    before = state;
                }
            }
        }
        self.pressures.change(&counted.places, now, before, stall.member);
        counted.stall = stall;
        if stall.member != Member::Idle || vm.state != VmState::Ended {
            self.pressures.vms.insert(id, counted);
        }
    }

    /// The pressure of a VM or a group now.
    pub fn pressure_view(&self, node: NodeId) -> PressureView {
        let now = self.elapsed();
        let Some(pressure) = self.pressures.nodes.get(&node) else { return PressureView::default() };
        PressureView { some: pressure.some(now).into(), full: pressure.full(now).into() }
    }
}

impl From<Averages> for PressureLine {
    fn from(averages: Averages) -> Self {
        let [avg10, avg60, avg300] = averages.hundredths.map(|hundredths| f64::from(hundredths) / 100.0);
        let total_us = u64::try_from(averages.total.as_micros()).unwrap_or(u64::MAX);
        Self { avg10, avg60, avg300, total_us }
    }
}

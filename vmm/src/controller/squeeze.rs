//! What a group is to give back, divided among the VMs in it.
//!
//! A VM's own limit says how large its balloon should be. A group's limit says only what all of its VMs may use
//! together, so somebody has to say who gives:
//!
//! ```text
//!  usage rises above the group's high ──┐          spread over its VMs by what they use above their protection, idle first
//!  a lower limit is asked for ──────────┴─► AIMS ◄──────────┐
//!                                            │ every second │ still above: spread again, as things are now
//!                                            │              │ below: half of the room is given back to them
//!                                            └──────────────┘
//!                                            └─► every VM has what it would have without the group: no aims any more
//! ```
//!
//! Memory that somebody asks of the group is like a lower high until the answer.
//!
//! An aim is a usage that a VM should come down to; its balloon follows the smallest of its own `high` and of its aims
//! ([`Actor::balloon_target`]). A guest without a balloon driver is not asked, and gives nothing. One that has stalled keeps its
//! aim, and the others are asked for what it does not give. Nothing of this is needed for the limit to hold: it only keeps
//! guests from being held at it.

use std::collections::BTreeMap;
use std::time::Duration;

use memcg_core::progress::State;
use memcg_core::tree::NodeId;
use memcg_core::units::{Limit, Pages};
use tokio::time::Instant;

use super::actor::Actor;
use super::changes::Target;
use super::host;
use super::vm::{Vm, VmId};

/// Time between two looks at a group that gives.
const EVERY: Duration = Duration::from_secs(1);

/// A group whose VMs have aims, or that is above its high.
pub(super) struct Squeeze {
    aims: BTreeMap<VmId, Pages>,
    /// When it is looked at again.
    pub next: Instant,
}

impl Actor {
    /// What a VM may use whatever the groups above it want: what it is promised now. An aim may be older than that.
    pub fn promised(&self, id: VmId) -> Pages {
        self.tree.limits(self.vms[&id].node).min.as_pages().unwrap_or(Pages(u64::MAX))
    }

    /// What a VM should use at most for the sake of the groups above it.
    pub fn aim(&self, id: VmId) -> Limit {
        let above = self.tree.ancestry(self.vms[&id].node).filter_map(|at| self.squeezed.get(&at)?.aims.get(&id));
        above.min().map_or(Limit::Max, |aim| Limit::Pages(self.promised(id).max(*aim)))
    }

    /// A group has gone above its high. Usage may cross it many times a second; once a second is looked at anyway.
    pub fn squeeze_soon(&mut self, group: NodeId) {
        if !self.squeezed.contains_key(&group) {
            self.squeeze(group);
        }
    }

    /// Looks at a group whose usage or limits have changed.
    pub fn squeeze(&mut self, group: NodeId) {
        // Memory that somebody has asked for (`reclaim.rs`) is like a lower high for so long.
        let asked = self.reclaim_goal(Target::Group(group)).map(|(goal, _)| goal);
        let high = self.tree.reclaim_high(group).as_pages().into_iter().chain(asked).min();
        let usage = self.tree.usage(group);
        let mut before = self.squeezed.remove(&group).map(|squeeze| squeeze.aims).unwrap_or_default();
        before.retain(|id, _| self.is_alive(*id) && self.tree.is_within(self.vms[id].node, group));
        let aims = match high {
            Some(high) if usage > high => {
                // Who has come down and need not give more stays down.
                let mut aims = before.clone();
                aims.extend(self.divide(group, usage.saturating_sub(high), |vm| gives(vm).then_some(Pages::ZERO)));
                aims
            }
            Some(high) => self.give(&before, high.saturating_sub(usage)),
            None => BTreeMap::new(),
        };
        let concerned: Vec<_> = before.keys().chain(aims.keys()).copied().collect();
        // Above its high it is looked at again also when nobody can give: a guest's driver may come later.
        if !aims.is_empty() || high.is_some_and(|high| usage > high) {
            self.squeezed.insert(group, Squeeze { aims, next: Instant::now() + host::scaled(EVERY) });
        }
        for id in concerned {
            self.aim_balloon(id);
        }
    }

    /// The aims with half of `room` given back, without those that hold nobody back any more.
    fn give(&self, aims: &BTreeMap<VmId, Pages>, room: Pages) -> BTreeMap<VmId, Pages> {
        let each = room.0 / 2 / aims.len().max(1) as u64;
        let more = aims.iter().map(|(id, aim)| (*id, *aim + Pages(each)));
        more.filter(|(id, aim)| self.balloon_for(*id, Limit::Pages(*aim)) > self.own_balloon_target(*id)).collect()
    }

    /// Looks again at the groups for which it is time.
    pub fn overdue_squeezes(&mut self, now: Instant) {
        let due: Vec<_> = self.squeezed.iter().filter(|(_, squeeze)| squeeze.next <= now).map(|(at, _)| *at).collect();
        for group in due {
            if self.tree.contains(group) {
                self.squeeze(group);
            } else {
                self.squeezed.remove(&group);
            }
        }
    }

    /// Looks at the groups at and above a node whose usage or place has changed.
    pub fn squeeze_above(&mut self, node: NodeId) {
        let groups = self.tree.ancestry(node).filter(|at| *at == self.root || self.groups.contains(at));
        for group in groups.collect::<Vec<_>>() {
            if self.squeezed.contains_key(&group) || self.tree.above_high(group) {
                self.squeeze(group);
            }
        }
    }
}

/// Whether a VM's balloon can be asked for something.
fn gives(vm: &Vm) -> bool {
    vm.report.balloon_ready && vm.balloon.state() != State::Stalled
}

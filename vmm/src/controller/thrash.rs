//! Groups whose VMs thrash: what is evicted from one comes back for another's, and nobody gets anywhere.
//!
//! Whether that is so is `memcg_core::thrash`'s. Here a group is watched from when its VMs are evicted for it until its ladder has
//! been at rest for a minute, and somebody is chosen for it (`victim.rs`) as if it had no memory left: it has none for all of them.
//! A host that is short is like a group: as long as eviction keeps up with those who take pages back, it never gets any shorter.

use std::collections::BTreeMap;
use std::time::Duration;

use memcg_core::thrash::{self, Watch};
use memcg_core::tree::NodeId;
use tokio::time::Instant;

use super::actor::Actor;
use super::changes::Target;
use super::host;
use super::oom_log::Reason;
use super::victim::Outcome;
use super::view::VmState;
use super::vm::Vm;

/// Time between two looks at a group.
const EVERY: Duration = Duration::from_secs(1);

/// The groups that are watched: when each is looked at next, and whether it thrashed at the last look.
#[derive(Debug, Default)]
pub struct Thrashing(BTreeMap<NodeId, (Watch, Instant, bool)>);

impl Thrashing {
    /// Watches a group from now on.
    pub fn watch(&mut self, group: NodeId) {
        self.0.entry(group).or_insert_with(|| (Watch::default(), Instant::now(), false));
    }

    /// Whether somebody has to go because a group thrashes.
    pub fn is_seen(&self, group: NodeId) -> bool {
        self.0.get(&group).is_some_and(|(.., thrashes)| *thrashes)
    }

    /// When one of them is to be looked at.
    pub fn next_look(&self) -> Option<Instant> {
        self.0.values().map(|(_, next, _)| *next).min()
    }
}

impl Actor {
    /// Looks at the groups for which it is time.
    pub fn overdue_thrashing(&mut self, now: Instant) {
        let due: Vec<_> = self.thrashing.0.iter().filter(|(_, (_, next, _))| *next <= now).map(|(at, _)| *at).collect();
        for group in due {
            let Some((mut watch, ..)) = self.thrashing.0.remove(&group) else { continue };
            if !self.tree.contains(group) || !self.ladders.contains_key(&Target::Group(group)) {
                continue;
            }
            let thrashes = self.thrashes(group, &mut watch);
            if thrashes && self.choose(group, Reason::Thrash) == Outcome::Done {
                tracing::warn!("the guests of {} only took pages from each other", self.tree.path(group));
                watch.acted();
                if group == self.root {
                    self.chosen_for_host();
                }
            }
            self.thrashing.0.insert(group, (watch, now + host::scaled(EVERY), thrashes));
        }
    }

    /// Whether the VMs that run and have no nearer limit in the way than this group's, or the host's end, thrash.
    fn thrashes(&self, group: NodeId, watch: &mut Watch) -> bool {
        let is_short = self.is_short();
        let runs =
            |vm: &Vm| vm.state == VmState::Running && thrash::is_in_the_way(&self.tree, group, vm.node, is_short);
        let vms = self.vms_of(Target::Group(group)).into_iter().map(|id| &self.vms[&id]).filter(|vm| runs(vm));
        let by_node: BTreeMap<NodeId, &Vm> = vms.map(|vm| (vm.node, vm)).collect();
        let guests = by_node.iter().map(|(node, vm)| (*node, vm.report.cold.refaulted));
        // A slow host is one whose time runs more slowly.
        let ran = |node| by_node.get(&node)?.process.guest_ran().map(|time| time / host::slowness());
        watch.step(self.elapsed() / host::slowness(), guests, ran)
    }
}

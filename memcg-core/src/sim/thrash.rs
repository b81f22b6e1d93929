//! Groups whose guests only take pages from each other: as `thrash.rs` of the controller does it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::guest::{Guest, State};
use super::host::Host;
use crate::ladder::Rung;
use crate::thrash::{self, Watch};
use crate::tree::NodeId;

/// Time between two looks at a group.
const EVERY: Duration = Duration::from_secs(1);

/// The groups that are watched, and when each is looked at next.
#[derive(Debug, Default)]
pub struct Thrashing(BTreeMap<NodeId, (Watch, Duration)>);

impl Host {
    /// Looks at the groups for whose sake something is evicted, or was not long ago, and has somebody chosen where they thrash.
    pub(super) fn thrash(&mut self) {
        let evicts = self.climbs.iter().filter(|(_, climb)| climb.rung() >= Rung::Evict).map(|(at, _)| *at);
        for group in evicts.filter(|at| !self.owners.contains_key(at)) {
            self.thrashing.0.entry(group).or_insert_with(|| (Watch::default(), self.now));
        }
        self.thrashing.0.retain(|at, _| self.climbs.contains_key(at));
        let due = self.thrashing.0.iter().filter(|(_, (_, next))| *next <= self.now).map(|(at, _)| *at);
        for group in due.collect::<Vec<_>>() {
            let Some((mut watch, _)) = self.thrashing.0.remove(&group) else { continue };
            if self.thrashes(group, &mut watch) && self.choose(group) {
                watch.acted();
                if group == self.tree.root() {
                    self.watch.chosen(self.now);
                }
            }
            self.thrashing.0.insert(group, (watch, self.now + EVERY));
        }
    }

    /// Whether the VMs that run and have no nearer limit in the way than this group's, or the host's end, thrash.
    fn thrashes(&self, group: NodeId, watch: &mut Watch) -> bool {
        let is_short = self.verdict.short.is_some();
        let runs = |vm: &&Guest| vm.state == State::Runs && thrash::is_in_the_way(&self.tree, group, vm.node, is_short);
        let members = self.members.get(&group).map_or(&[][..], Vec::as_slice);
        let theirs = members.iter().map(|at| &self.vms[*at]).filter(runs);
        let guests: Vec<_> = theirs.map(|vm| (vm.node, vm.refaulted)).collect();
        // What a guest does not wait for it runs.
        let ran = |node| Some(Duration::from_millis(self.vms[*self.owners.get(&node)?].lived));
        watch.step(self.now, guests, ran)
    }
}

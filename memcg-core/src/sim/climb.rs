//! Levels that are to come down, and what is asked of whom for that: as `ladders.rs` and `reclaim.rs` of the controller do it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::guest::Guest;
use super::host::Host;
use super::setup::Policy;
use crate::ladder::{Driver, Eviction, Ladder, Means, Rung, Sample, Terms, aims};
use crate::spread::Facts;
use crate::tree::NodeId;
use crate::units::Pages;

/// Time between the end of a climb and the next that nobody waits for.
const EVERY: Duration = Duration::from_secs(1);

/// The ladder of one level.
#[derive(Debug)]
pub struct Climb {
    ladder: Ladder,
    /// Since when it is at rest.
    rested: Option<Duration>,
}

impl Climb {
    /// The rung that it is on.
    pub fn rung(&self) -> Rung {
        self.ladder.rung()
    }
}

/// Memory that was asked of all VMs together.
#[derive(Debug)]
pub struct Request {
    goal: Pages,
    until: Duration,
}

/// What the VMs are to come down to, by each means.
struct Aims {
    give: BTreeMap<usize, Pages>,
    evict: BTreeMap<usize, Pages>,
}

impl Host {
    /// What all VMs together have been asked for and have not given yet.
    pub(super) fn asked(&self) -> Pages {
        let goal = self.requests.iter().map(|request| request.goal).min();
        goal.map_or(Pages::ZERO, |goal| self.tree.usage(self.tree.root()).saturating_sub(goal))
    }

    /// Asks all VMs together for so much.
    pub(super) fn ask(&mut self, wanted: Pages) {
        let goal = self.tree.usage(self.tree.root()).saturating_sub(wanted);
        self.requests.push(Request { goal, until: self.now + self.watch.terms().patience });
    }

    /// Lets every level go on that is to come down.
    pub(super) fn climb(&mut self, ms: u64) {
        for level in self.levels() {
            self.look_at(level);
        }
        if self.climbs.is_empty() {
            return;
        }
        let aims = self.aims();
        for (at, aim) in aims.give {
            self.sums.given += self.vms[at].give(&mut self.tree, aim, ms);
        }
        for (at, aim) in aims.evict {
            self.sums.evicted += self.vms[at].evict(&mut self.tree, aim, ms);
        }
        self.settle_requests();
    }

    /// The levels that have to be looked at.
    fn levels(&self) -> Vec<NodeId> {
        let above = self.limited.iter().filter(|at| self.tree.above_high(**at)).copied();
        let held = self.vms.iter().filter_map(|vm| Some(vm.refused?.level));
        let emptied = self.vms.iter().filter(|vm| vm.is_emptied()).map(|vm| vm.node);
        let asked = (!self.requests.is_empty()).then(|| self.tree.root());
        let mut levels: Vec<_> =
            self.climbs.keys().copied().chain(above).chain(held).chain(emptied).chain(asked).collect();
        levels.sort_unstable();
        levels.dedup();
        levels
    }

    fn look_at(&mut self, level: NodeId) {
        let sample = self.sample_of(level);
        let over = sample.goal.is_some_and(|goal| sample.usage > goal || sample.means.held.is_some());
        let urgent = sample.means.held.is_some() || sample.until.is_some();
        let new = || over.then(|| Climb { ladder: Ladder::new(Terms::default()), rested: None });
        let Some(mut climb) = self.climbs.remove(&level).or_else(new) else { return };
        let rests = climb.rung() == Rung::Rest;
        let too_soon = rests && over && !urgent && climb.rested.is_some_and(|at| self.now < at + EVERY);
        if !too_soon {
            let _ = climb.ladder.look(&sample).last();
        }
        if climb.rung() != Rung::Rest {
            climb.rested = None;
            self.climbs.insert(level, climb);
        } else if self.now < climb.rested.unwrap_or(self.now) + EVERY {
            climb.rested = Some(climb.rested.unwrap_or(self.now));
            self.climbs.insert(level, climb);
        }
    }

    /// A level as its ladder sees it.
    fn sample_of(&self, level: NodeId) -> Sample {
        let is_root = level == self.tree.root();
        let high = self.tree.reclaim_high(level).as_pages();
        let asked = self.requests.iter().filter(|_| is_root);
        let emptied = self.owners.get(&level).filter(|at| self.vms[**at].is_emptied()).map(|_| Pages::ZERO);
        let members = self.members.get(&level).map_or(&[][..], Vec::as_slice);
        let held = |at: &&usize| self.vms[**at].refused.is_some_and(|refused| refused.level == level);
        let owed: Pages = members.iter().filter(held).map(|at| self.vms[*at].owes).sum();
        Sample {
            now: self.now,
            usage: self.tree.usage(level) + owed,
            goal: asked.clone().map(|request| request.goal).chain(high).chain(emptied).min(),
            until: asked.map(|request| request.until).min(),
            means: Means::together(members.iter().map(|at| self.means_of(&self.vms[*at], level))),
        }
    }

    fn means_of(&self, vm: &Guest, level: NodeId) -> Means {
        if !vm.is_alive() {
            return Means::default();
        }
        let held = vm.refused.is_some_and(|refused| refused.level == level);
        let left = vm.setup.deadline.saturating_sub(vm.account.held(self.now));
        Means {
            stock: Pages::ZERO,
            reporting: false,
            driver: vm.driver(),
            eviction: vm.eviction(&self.tree),
            held: held.then(|| self.now + left),
        }
    }

    /// What every VM is to come down to for the sake of all levels: the least of what they want.
    fn aims(&self) -> Aims {
        let mut aims = Aims { give: BTreeMap::new(), evict: BTreeMap::new() };
        for (level, climb) in &self.climbs {
            let asks = climb.ladder.asks();
            if let Some(goal) = asks.balloon {
                let gives = |vm: &Guest| vm.driver() == Driver::Cooperating;
                self.aim(*level, goal, gives, &mut aims.give);
            }
            if let Some(goal) = asks.evict {
                let evicts = |vm: &Guest| vm.is_alive() && vm.eviction(&self.tree) == Eviction::Possible;
                self.aim(*level, goal, evicts, &mut aims.evict);
            }
        }
        aims
    }

    /// What those who `can` are to come down to, so that `level` comes to its goal.
    fn aim(&self, level: NodeId, goal: Pages, can: impl Fn(&Guest) -> bool, into: &mut BTreeMap<usize, Pages>) {
        let mut lower = |at: usize, aim: Pages| {
            let least = into.entry(at).or_insert(aim);
            *least = aim.min(*least);
        };
        if let Some(at) = self.owners.get(&level) {
            if can(&self.vms[*at]) {
                lower(*at, goal);
            }
            return;
        }
        let need = self.tree.usage(level).saturating_sub(goal);
        if need.is_zero() {
            return;
        }
        for (node, aim) in self.divide(level, need, can) {
            let promised = self.tree.limits(node).min.as_pages().unwrap_or(Pages(u64::MAX));
            lower(self.owners[&node], aim.max(promised));
        }
    }

    /// What a level has to give, divided by the policy.
    fn divide(&self, level: NodeId, need: Pages, can: impl Fn(&Guest) -> bool) -> Vec<(NodeId, Pages)> {
        let facts = |node: NodeId, priority: Option<i32>| {
            let vm = &self.vms[*self.owners.get(&node)?];
            let asked = can(vm) && priority.is_none_or(|priority| vm.setup.priority == priority);
            asked.then(|| Facts { idle: vm.idle(), pinned: Pages::ZERO, shares: vm.setup.shares })
        };
        let terms = self.policy.terms();
        if self.policy != Policy::PriorityOnly {
            return aims(&self.tree, level, need, &terms, |node| facts(node, None)).0;
        }
        let (mut all, mut left) = (Vec::new(), need);
        for priority in self.priorities(level) {
            let (some, short) = aims(&self.tree, level, left, &terms, |node| facts(node, Some(priority)));
            all.extend(some);
            left = short;
        }
        all
    }

    /// The priorities that there are, the lowest first.
    fn priorities(&self, level: NodeId) -> Vec<i32> {
        let members = self.members.get(&level).map_or(&[][..], Vec::as_slice);
        let mut priorities: Vec<_> = members.iter().map(|at| self.vms[*at].setup.priority).collect();
        priorities.sort_unstable();
        priorities.dedup();
        priorities
    }

    /// Forgets what was asked for and is there, or will not come.
    fn settle_requests(&mut self) {
        let root = self.tree.root();
        let usage = self.tree.usage(root);
        let stuck = self.climbs.get(&root).is_some_and(|climb| climb.rung() == Rung::Stuck);
        let now = self.now;
        self.requests.retain(|request| usage > request.goal && !stuck && now < request.until);
    }
}

//! The ladders: what is done about each VM and each group that uses more than it should.
//!
//! Which rung, and for how long, is `memcg_core::ladder`'s; here is what it sees and what comes of it. A target has a
//! ladder while it is above its *goal*: the effective `high` of its limits, in force or pending, or what somebody has
//! asked for (`reclaim.rs`).
//!
//! ```text
//!  a report, a charge above high,        ┌─ recall  ─► Recall to the workers
//!  other limits, a request, time ─► look ┼─ balloon ─► BalloonTarget (balloon.rs), of what was asked for
//!                                        └─ evict   ─► Reclaim{aim} to the workers: the least of what their own ladder
//!                                                      and those of the groups above want
//! ```
//!
//! A VM that is held at its own limit is its own ladder's affair, one that is held at a group's limit is that of the
//! group: cold pages of the neighbours are evicted for it. The hold itself, and what the policy does at its end, is in
//! `grants.rs`; as long as eviction gets somewhere, that end is put off ([`Actor::gives`]).
//!
//! What a group wants of a VM is an amount: its aim rises with each page that the VM is granted ([`Part`]). An aim that
//! stayed where it was would make a VM that grows evict all that it touches, while its neighbours have cold pages. The need
//! is divided anew as soon as half of what was asked for has come, so whoever has cold pages gives as fast as it can.
//!
//! What the limits want of balloons is sent at once, whatever the rung (`squeeze.rs` says what a group's limits want): a
//! guest that gives is faster than anything else. What the rung decides is when that is not waited for any more.
//!
//! # How often
//!
//! Usage may cross `high` many times a second. Another climb begins a second after the last, unless somebody waits for
//! it; a group is looked at ten times a second at most; and one rung of one target is told as an event once a minute.

use std::collections::BTreeMap;
use std::time::Duration;

use memcg_core::frame::Histogram;
use memcg_core::idle::Known;
use memcg_core::ladder::{Asks, Driver, Eviction, Ladder, Means, Rung, SPREAD, Sample, Terms, aims};
use memcg_core::progress::State;
use memcg_core::spread::Facts;
use memcg_core::tree::NodeId;
use memcg_core::units::Pages;
use serde_json::json;
use tokio::time::Instant;

use super::actor::Actor;
use super::changes::Target;
use super::events::{EventKind, merged};
use super::host;
use super::view::{ReclaimRung, ReclaimView, VmState};
use super::vm::{Vm, VmId};
use crate::worker::protocol::{Report, ToWorker};

/// Time between the end of a climb and the next that nobody waits for, and the longest between two divisions of a need.
const EVERY: Duration = Duration::from_secs(1);

/// Time between two looks at a group.
const GROUP_LOOK: Duration = Duration::from_millis(100);

/// Time between two questions to workers that evict and say nothing.
const ASK: Duration = Duration::from_millis(250);

/// What comes again and again where memory is short is told as an event again only after this: a rung of a target, what was evicted,
/// a limit that was met.
pub const QUIET: Duration = Duration::from_secs(60);

/// Free pages that came back by reports so long ago are just now.
pub(super) const REPORTING: Duration = Duration::from_secs(1);

/// The ladder of one target.
pub(super) struct Climb {
    ladder: Ladder,
    /// The stock was recalled for this climb.
    recalled: bool,
    /// What the VMs of a group should give by eviction, and when that was worked out.
    evict: BTreeMap<VmId, Part>,
    spread_at: Option<Instant>,
    /// When it is looked at again.
    next: Option<Instant>,
    looked: Instant,
    /// Since when it is at rest.
    rested: Option<Instant>,
    /// When each rung was last told.
    told: BTreeMap<ReclaimRung, Instant>,
    /// As the climb began: when, usage, and what had been given and evicted so far.
    began: (Instant, Pages, Given),
}

/// The part of one VM in what its group is to give. What the VM is granted meanwhile it may keep: others give for that.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// What it was to come down to when the need was divided.
    aim: Pages,
    /// What it had been granted until then.
    granted: u64,
}

impl Part {
    /// What the VM should come down to now.
    fn aim(self, vm: &Vm) -> Pages {
        self.aim + Pages(vm.granted_total.saturating_sub(self.granted))
    }
}

/// Memory that VMs have given so far, by how.
#[derive(Clone, Copy, Debug, Default)]
struct Given {
    balloon: u64,
    report: u64,
    evicted: u64,
}

impl Climb {
    fn new(now: Instant) -> Self {
        Self {
            ladder: Ladder::new(Terms { rung: host::scaled(Terms::default().rung) }),
            recalled: false,
            evict: BTreeMap::new(),
            spread_at: None,
            next: None,
            looked: now,
            rested: None,
            told: BTreeMap::new(),
            began: (now, Pages::ZERO, Given::default()),
        }
    }

    /// The rung that it is on.
    pub fn rung(&self) -> Rung {
        self.ladder.rung()
    }

    /// When it has to be looked at.
    pub fn next(&self) -> Option<Instant> {
        self.next
    }

    /// Notes that a rung is told now; false when that was done lately.
    fn tell(&mut self, rung: ReclaimRung, now: Instant) -> bool {
        let lately = self.told.get(&rung).is_some_and(|told| now < *told + QUIET);
        if !lately {
            self.told.insert(rung, now);
        }
        !lately
    }
}

impl Actor {
    /// Something has changed for a target: it is looked at after this input.
    pub fn look_soon(&mut self, target: Target) {
        self.unlooked.insert(target);
    }

    /// The usage of a VM has changed: it and the groups above are looked at if that matters.
    pub fn look_above(&mut self, id: VmId) {
        let node = self.vms[&id].node;
        let targets = self.tree.ancestry(node).map(|at| if at == node { Target::Vm(id) } else { Target::Group(at) });
        let concerned = |(at, target): &(NodeId, Target)| {
            self.tree.above_high(*at) || self.ladders.contains_key(target) || self.reclaiming(*target)
        };
        let concerned: Vec<_> = self.tree.ancestry(node).zip(targets).filter(concerned).collect();
        self.unlooked.extend(concerned.into_iter().map(|(_, target)| target));
    }

    /// Looks at everything that has changed.
    pub fn look_at_all(&mut self) {
        let now = Instant::now();
        while let Some(target) = self.unlooked.pop_first() {
            self.look(target, now);
        }
    }

    /// Looks at those for whom it is time.
    pub fn overdue_ladders(&mut self, now: Instant) {
        let due = |(_, climb): &(&Target, &Climb)| climb.next.is_some_and(|next| next <= now);
        let due: Vec<_> = self.ladders.iter().filter(due).map(|(target, _)| *target).collect();
        for target in due {
            self.ask_the_silent(target, now);
            self.look(target, now);
        }
    }

    /// What a ladder asks of its target now.
    pub fn asks(&self, target: Target) -> Asks {
        self.ladders.get(&target).map(|climb| climb.ladder.asks()).unwrap_or_default()
    }

    /// Looks at one target.
    fn look(&mut self, target: Target, now: Instant) {
        if self.may_climb(target) {
            self.climb(target, now);
            self.answer_reclaims(target);
        } else if let Some(climb) = self.ladders.remove(&target) {
            for id in climb.evict.into_keys() {
                self.aim_reclaim(id, None);
            }
        }
    }

    fn climb(&mut self, target: Target, now: Instant) {
        let sample = self.sample(target);
        let over = sample.goal.is_some_and(|goal| sample.usage > goal || sample.means.held.is_some());
        let urgent = sample.means.held.is_some() || sample.until.is_some();
        let Some(mut climb) = self.ladders.remove(&target).or_else(|| over.then(|| Climb::new(now))) else { return };
        let rests = climb.ladder.rung() == Rung::Rest;
        let too_soon = match climb.rested {
            Some(rested) if rests && over && !urgent => now < rested + host::scaled(EVERY),
            _ => matches!(target, Target::Group(_)) && !urgent && !rests && now < climb.looked + GROUP_LOOK,
        };
        if too_soon {
            let wait = if rests { host::scaled(EVERY) } else { GROUP_LOOK };
            climb.next = Some(climb.rested.filter(|_| rests).unwrap_or(climb.looked) + wait);
            self.ladders.insert(target, climb);
            return;
        }
        climb.looked = now;
        let before = climb.ladder.rung();
        let reached = climb.ladder.look(&sample).last();
        if rests && reached.is_some() {
            (climb.recalled, climb.rested) = (false, None);
            climb.began = (now, sample.usage, self.given(target));
        }
        self.act(&mut climb, target, &sample, reached.is_some(), now);
        match reached {
            Some(Rung::Rest) if before != Rung::Rest => {
                climb.rested = Some(now);
                self.tell_end(&mut climb, target, now);
            }
            Some(rung) => self.tell_rung(&mut climb, target, rung, &sample, now),
            None => {}
        }
        if let Target::Group(group) = target
            && climb.ladder.asks().evict.is_some()
        {
            self.thrashing.watch(group);
        }
        climb.next = self.next_look(&climb, &sample, now);
        let forgotten = climb.ladder.rung() == Rung::Rest && climb.next.is_none();
        if !forgotten {
            self.ladders.insert(target, climb);
        }
    }

    /// When a target is to be looked at though nothing happens.
    fn next_look(&self, climb: &Climb, sample: &Sample, now: Instant) -> Option<Instant> {
        let deadline = climb.ladder.deadline(sample).map(|deadline| self.start + deadline);
        match climb.ladder.rung() {
            // It is remembered only for what was told of it.
            Rung::Rest => {
                let quiet = climb.told.values().map(|told| *told + QUIET);
                quiet.chain(climb.rested.map(|rested| rested + host::scaled(EVERY))).filter(|at| *at > now).max()
            }
            Rung::Recall | Rung::Reports | Rung::Balloon => deadline,
            Rung::Evict => deadline.into_iter().chain([now + host::scaled(ASK)]).min(),
            // What one was asked for in vain is asked of others.
            Rung::Hold => deadline.into_iter().chain([now + host::scaled(EVERY)]).min(),
            Rung::Stuck | Rung::Oom => None,
        }
    }

    /// Whether a target can have a ladder.
    pub fn may_climb(&self, target: Target) -> bool {
        match target {
            Target::Vm(id) => {
                self.is_alive(id) && self.vms[&id].accounted() && self.vms[&id].state != VmState::Starting
            }
            Target::Group(node) => self.tree.contains(node) && self.tree.is_online(node),
        }
    }

    /// A target as its ladder sees it.
    fn sample(&self, target: Target) -> Sample {
        let node = self.node_of(target);
        let high = self.tree.reclaim_high(node).as_pages();
        let asked = self.reclaim_goal(target);
        let emptied = matches!(target, Target::Vm(id) if self.is_emptied(id)).then_some(Pages::ZERO);
        let pending = self.changes.iter().find(|change| change.names(target)).map(|change| change.deadline());
        let until = asked.map(|(_, until)| until).into_iter().chain(pending).min();
        let members = self.vms_of(target);
        let owed: u64 = members.iter().filter(|id| self.held_at(**id, node)).map(|id| self.vms[id].need()).sum();
        Sample {
            now: self.elapsed(),
            usage: self.tree.usage(node) + Pages(owed),
            goal: asked.map(|(goal, _)| goal).into_iter().chain(high).chain(emptied).min(),
            until: until.map(|until| until.saturating_duration_since(self.start)),
            means: self.means(target, node, &members),
        }
    }

    fn means(&self, target: Target, node: NodeId, members: &[VmId]) -> Means {
        let asked = self.ladders.get(&target).is_some_and(|climb| climb.rung() != Rung::Rest && climb.recalled);
        let mut means = Means::together(members.iter().map(|id| self.means_of(*id, node)));
        // A guest that runs has a stock again at once: what counts is that it was back.
        if asked && !members.iter().any(|id| self.is_recalled(*id)) {
            means.stock = Pages::ZERO;
        }
        means
    }

    /// What can be had of one VM for the sake of the limit at `node`.
    fn means_of(&self, id: VmId, node: NodeId) -> Means {
        let vm = &self.vms[&id];
        let until = vm.hold.map(|hold| hold.deadline.saturating_duration_since(self.start));
        Means {
            stock: Pages(vm.spare()),
            reporting: vm.reported_at.is_some_and(|at| at.elapsed() < host::scaled(REPORTING)),
            driver: driver(vm),
            eviction: eviction(vm),
            held: until.filter(|_| self.held_at(id, node)),
        }
    }

    /// Whether a VM is held because of the limit at `node`.
    pub fn held_at(&self, id: VmId, node: NodeId) -> bool {
        let vm = &self.vms[&id];
        vm.hold.is_some() && vm.refused() && vm.refused_at == Some(node)
    }

    /// Does what the ladder asks for.
    fn act(&mut self, climb: &mut Climb, target: Target, sample: &Sample, moved: bool, now: Instant) {
        let asks = climb.ladder.asks();
        if asks.recall && !climb.recalled {
            climb.recalled = true;
            let mut holders = self.vms_of(target);
            holders.retain(|id| self.vms[id].spare() > 0);
            self.recall(&holders, move |actor| actor.look_soon(target));
        }
        if let (Target::Group(group), Some(goal)) = (target, asks.evict) {
            let need = sample.usage.saturating_sub(goal);
            let late = climb.spread_at.is_none_or(|at| now >= at + host::scaled(EVERY));
            if moved || late || self.to_come(climb).0 < need.0 / 2 {
                climb.evict.retain(|id, _| self.is_alive(*id) && self.tree.is_within(self.vms[id].node, group));
                let part = |(id, aim)| (id, Part { aim, granted: self.vms[&id].granted_total });
                let parts = self.divide(group, need, |vm| {
                    (eviction(vm) == Eviction::Possible).then_some(Pages(vm.report.cold.hard))
                });
                climb.evict.extend(parts.into_iter().map(part));
                climb.spread_at = Some(now);
            }
        }
        self.ask(climb, target);
        if asks.evict.is_none() {
            climb.evict.clear();
            climb.spread_at = None;
        }
        if let Target::Vm(id) = target
            && moved
        {
            self.aim_balloon(id);
        }
    }

    /// Tells the workers of a target what they are to come down to.
    fn ask(&mut self, climb: &Climb, target: Target) {
        let asked = match target {
            Target::Vm(id) => vec![id],
            Target::Group(_) => climb.evict.keys().copied().collect(),
        };
        let asks = climb.ladder.asks().evict.is_some();
        for id in asked {
            let aim = match target {
                Target::Vm(_) => climb.ladder.asks().evict,
                // One that is gone since the need was divided is asked for nothing.
                Target::Group(_) => {
                    self.vms.get(&id).filter(|_| asks).zip(climb.evict.get(&id)).map(|(vm, part)| part.aim(vm))
                }
            };
            self.aim_reclaim(id, Some((target, aim)));
        }
    }

    /// What the VMs of a group were told to give by eviction and have not given yet, as far as they still can.
    fn to_come(&self, climb: &Climb) -> Pages {
        let can = |id: &VmId| self.is_alive(*id) && eviction(&self.vms[id]) == Eviction::Possible;
        let parts = climb.evict.iter().filter(|(id, _)| can(id)).map(|(id, part)| (&self.vms[id], part));
        let left = |vm: &Vm| Pages(vm.report.guest.saturating_sub(vm.report.cold.hard));
        parts.map(|(vm, part)| self.tree.usage(vm.node).saturating_sub(part.aim(vm)).min(left(vm))).sum()
    }

    /// What the VMs of a group should come down to so that they give `need`, those of them that can, and of what is not `hard`
    /// to get by the means that is asked about. What is idle goes first.
    pub fn divide(&self, group: NodeId, need: Pages, hard: impl Fn(&Vm) -> Option<Pages>) -> Vec<(VmId, Pages)> {
        let by_node: BTreeMap<NodeId, VmId> =
            self.vms_of(Target::Group(group)).into_iter().map(|id| (self.vms[&id].node, id)).collect();
        let facts = |node: NodeId| {
            let vm = &self.vms[by_node.get(&node)?];
            let idle = known(vm).idle();
            let hard = hard(vm)?.min(idle);
            Some(Facts { idle: idle.saturating_sub(hard), pinned: vm.reserve_target + hard, shares: vm.shares })
        };
        let (aims, _) = aims(&self.tree, group, need, &SPREAD, facts);
        aims.into_iter().map(|(node, aim)| (by_node[&node], aim)).collect()
    }

    /// Sends a worker what it is to come down to by eviction, when that has changed. `with` is what one of the ladders wants
    /// that is being looked at.
    pub fn aim_reclaim(&mut self, id: VmId, with: Option<(Target, Option<Pages>)>) {
        let Some(vm) = self.vms.get(&id).filter(|vm| vm.alive() && vm.accounted()) else { return };
        let above =
            self.tree.ancestry(vm.node).map(|at| if at == vm.node { Target::Vm(id) } else { Target::Group(at) });
        let wanted = above.filter_map(|target| {
            let own = target == Target::Vm(id);
            let aim = match with {
                Some((looked_at, aim)) if looked_at == target => aim?,
                _ => {
                    let climb = self.ladders.get(&target)?;
                    let goal = climb.ladder.asks().evict?;
                    if own { goal } else { climb.evict.get(&id)?.aim(vm) }
                }
            };
            Some(if own { aim } else { aim.max(self.promised(id)) })
        });
        // What it costs from the start is no concern of its worker.
        let beside = self.tree.usage(vm.node).saturating_sub(vm.outstanding());
        let aim = wanted.min().map_or(u64::MAX, |usage| usage.saturating_sub(beside).0);
        let vm = self.vms.get_mut(&id).expect("found");
        if vm.reclaim_aim != aim {
            vm.reclaim_aim = aim;
            vm.reclaim_due = !vm.send(ToWorker::Reclaim { aim });
        }
    }

    /// A VM is told what it has been granted: what a group wants of it is an amount, so its aim rises by as much.
    pub fn raise_aim(&mut self, id: VmId) {
        if self.ladders.values().any(|climb| climb.evict.contains_key(&id)) {
            self.aim_reclaim(id, None);
        }
    }

    /// Sends an aim that a worker had no room for.
    pub fn send_reclaim(&mut self, id: VmId) {
        let vm = self.vms.get_mut(&id).expect("checked");
        vm.reclaim_due = !vm.send(ToWorker::Reclaim { aim: vm.reclaim_aim });
    }

    /// Workers that evict may have nothing else to say.
    fn ask_the_silent(&mut self, target: Target, now: Instant) {
        let Some(climb) = self.ladders.get(&target).filter(|climb| climb.ladder.rung() == Rung::Evict) else { return };
        let since = climb.looked;
        let asked = self.vms_of(target).into_iter().filter(|id| {
            let vm = &self.vms[id];
            vm.reclaim_aim != u64::MAX && vm.heard_at.is_none_or(|at| at <= since) && since < now
        });
        for id in asked.collect::<Vec<_>>() {
            let vm = self.vms.get_mut(&id).expect("listed");
            let seq = vm.next_seq();
            // One that does not read is asked again.
            vm.send(ToWorker::Query { seq });
        }
    }

    /// Whether a VM that is held may hope: eviction gets somewhere at the limit that is in its way.
    pub fn gives(&self, id: VmId) -> bool {
        let vm = &self.vms[&id];
        let target = |at: NodeId| if at == vm.node { Target::Vm(id) } else { Target::Group(at) };
        let climb = vm.refused_at.and_then(|at| self.ladders.get(&target(at)));
        climb.is_some_and(|climb| climb.ladder.rung() == Rung::Evict)
    }

    /// Whether a VM has come down as far as it can: its ladder is at its end, and its worker has nothing left to evict.
    pub fn has_given_all(&self, id: VmId) -> bool {
        let at_its_end = self.ladders.get(&Target::Vm(id)).is_some_and(|climb| climb.rung() >= Rung::Stuck);
        at_its_end && eviction(&self.vms[&id]) == Eviction::Stuck
    }

    /// What the VMs of a target have given so far.
    fn given(&self, target: Target) -> Given {
        let mut given = Given::default();
        for id in self.vms_of(target) {
            let report = &self.vms[&id].report;
            given.balloon += report.faults.discarded;
            given.report += report.faults.reported;
            given.evicted += report.cold.evicted;
        }
        given
    }

    /// A target has come to another rung.
    fn tell_rung(&mut self, climb: &mut Climb, target: Target, rung: Rung, sample: &Sample, now: Instant) {
        let rung = ReclaimRung::from(rung);
        let silent = match rung {
            // Of these there are other events.
            ReclaimRung::Rest | ReclaimRung::Recall | ReclaimRung::Hold | ReclaimRung::Oom => true,
            ReclaimRung::Reports | ReclaimRung::Balloon | ReclaimRung::Evict | ReclaimRung::Stuck => false,
        };
        if silent || !climb.tell(rung, now) {
            return;
        }
        let goal = climb.ladder.goal().unwrap_or_default();
        let details = json!({
            "rung": rung,
            "goal_bytes": goal.bytes(),
            "above_bytes": sample.usage.saturating_sub(goal).bytes(),
        });
        self.target_event(EventKind::Reclaim, target, details);
    }

    /// A target is where it should be.
    fn tell_end(&mut self, climb: &mut Climb, target: Target, now: Instant) {
        let (since, usage, before) = climb.began;
        let told = climb.told.values().any(|told| *told >= since);
        if !told || !climb.tell(ReclaimRung::Rest, now) {
            return;
        }
        let after = self.given(target);
        let bytes = |after: u64, before: u64| Pages(after.saturating_sub(before)).bytes();
        let details = json!({
            "from_bytes": usage.bytes(),
            "took_ms": u64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX),
            "balloon_bytes": bytes(after.balloon, before.balloon),
            "report_bytes": bytes(after.report, before.report),
            "evicted_bytes": bytes(after.evicted, before.evicted),
        });
        self.target_event(EventKind::Reclaimed, target, details);
    }

    /// A worker has evicted pages, on request or by itself.
    pub fn tell_evicted(&mut self, id: VmId) {
        let now = Instant::now();
        let vm = self.vms.get_mut(&id).expect("checked");
        let (evicted, (told, at)) = (vm.report.cold.evicted, vm.evicted_told);
        if evicted <= told || at.is_some_and(|at| now < at + QUIET) {
            return;
        }
        vm.evicted_told = (evicted, Some(now));
        let name = vm.name.clone();
        let details = json!({
            "evicted_bytes": Pages(evicted - told).bytes(),
            "swap_bytes": Pages(vm.report.swapped).bytes(),
            "store_bytes": Pages(vm.report.store).bytes(),
        });
        let details = merged(self.account(id, json!({})), details);
        self.event(EventKind::Evicted, Some(&name), details);
    }

    /// The ladder of a target, for the interface.
    pub fn reclaim_view(&self, target: Target) -> ReclaimView {
        let Some(climb) = self.ladders.get(&target) else { return ReclaimView::default() };
        let rung = climb.ladder.rung();
        let since = self.elapsed().saturating_sub(climb.ladder.since());
        ReclaimView {
            rung: rung.into(),
            since_ms: (rung != Rung::Rest).then(|| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
            goal_bytes: climb.ladder.goal().map(Pages::bytes),
            stuck: (rung >= Rung::Stuck).then(|| self.no_more(&[target])),
        }
    }
}

/// What is known of the pages of a VM.
fn known(vm: &Vm) -> Known {
    let Report { guest, idle, cold, .. } = &vm.report;
    Known {
        resident: Pages(*guest),
        aside: Pages(*idle),
        ages: Histogram { pages: cold.ages.map(Pages) },
        in_use: cold.working_set.map(|pages| Pages(pages) + Pages(cold.error)),
    }
}

/// How far a balloon driver helps.
fn driver(vm: &Vm) -> Driver {
    // A guest that stands still gives nothing, and that says nothing about it.
    let runs = vm.state != VmState::Paused;
    match (vm.report.balloon_ready && runs, vm.balloon.state()) {
        (false, _) => Driver::Absent,
        (true, State::Cooperating) => Driver::Cooperating,
        (true, State::Slow) => Driver::Slow,
        (true, State::Stalled) => Driver::Stalled,
    }
}

/// Whether anything can be evicted of a VM.
fn eviction(vm: &Vm) -> Eviction {
    // Where less is asked for than when it said so, it is so still.
    let says = vm.report.cold.stuck && vm.report.cold.aim <= vm.reclaim_aim;
    if says || vm.store.bytes == 0 || vm.report.swapped >= vm.leases.swap {
        Eviction::Stuck
    } else {
        Eviction::Possible
    }
}

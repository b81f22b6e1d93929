//! Reports, wants, grants and holds.
//!
//! A report is checked against what was granted before anything is done with it: totals only grow, nobody gives
//! back more than they got, and nobody holds more than they have. Then what came back is uncharged and what is wanted
//! is charged: first for faults that have happened (a refusal counts, and the worker holds its vCPUs), then ahead of
//! need, as long as there is room.
//!
//! A want that was refused is remembered and served as soon as something changes, who has waited longest first; the worker
//! need not ask again. As long as somebody is refused, nothing is left to be had ahead of need at that level.
//!
//! A hold has one deadline, from the first report that says so. Repeating it does not put the deadline off. Running pays for
//! as much time held, and what comes meanwhile counts by its rate ([`memcg_core::hold`]).
//!
//! ```text
//!  held ── deadline ─► refused? ─ no ─► its grant is on the way: again in a second
//!                         │ yes
//!                         ▼
//!                      progress? ─ yes ─► pages come, or are being evicted: again in a second, for a bounded time
//!                         │ no
//!                         ▼
//!                      the neighbours' stocks come back ─ served ─► it goes on
//!                         │ too little came
//!                         ▼
//!                      the policy: at its own limit it is killed, or paused until there is room for what it owes and GO_ON
//!                      more; at a group's, somebody in the group is chosen (`victim.rs`), and it is looked at again
//! ```
//!
//! Why more? A VM that went on with the page that it owes would touch the next one and be paused again, and so on.

use std::time::Duration;

use memcg_core::hold::Verdict;
use memcg_core::oom::{self, RETURNS};
use memcg_core::reclaim::{self, FIRST_STOCK, finds_room};
use memcg_core::tree::{Charge, Mode, Refused, Tree};
use memcg_core::units::{Limit, Pages};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::actor::{Actor, Input, answer};
use super::changes::Target;
use super::cold;
use super::events::{EventKind, merged};
use super::host;
use super::ladders::QUIET;
use super::oom_log::Reason;
use super::overhead;
use super::shortage;
use super::victim::Outcome;
use super::view::VmState;
use super::vm::{Awaited, Hold, Vm, VmId};
use crate::worker::protocol::{Report, ToWorker};

/// Room beyond what it owes that a VM needs to go on by itself after its policy has paused it.
pub(super) const GO_ON: u64 = 64;

/// Time after which the policy tries again to pause a VM whose worker does not read.
pub(super) const SILENT_RETRY: Duration = Duration::from_secs(1);

impl Actor {
    /// Takes a report.
    pub fn report(&mut self, id: VmId, report: Report) {
        let vm = self.vms.get_mut(&id).expect("checked");
        if vm.accounted() && report.epoch != 0 && report.epoch < self.epoch {
            // It counts as an earlier controller did, and has not read the first grant of this one.
            return;
        }
        if let Err(reason) = check(vm, &report) {
            self.lie(id, reason);
            return;
        }
        let returned = Pages(report.returned_total - vm.returned_total);
        let before = vm.report;
        self.shrink_store(id, &report);
        let vm = self.vms.get_mut(&id).expect("checked");
        if !returned.is_zero() {
            vm.returned_total = report.returned_total;
            self.tree.uncharge(vm.node, returned);
            self.roomier = true;
        }
        let now = Instant::now();
        if report.faults.reported > before.faults.reported {
            vm.reported_at = Some(now);
        }
        vm.heard_at = Some(now);
        vm.report = report;
        vm.reported = true;
        self.grow_overhead(id, overhead::grown(&before));
        self.settle_cold(id, &before);
        self.watch_hold(id);
        if self.recounting.is_none() {
            self.aim_balloon(id);
        }
        self.answered(id, report.answers);
        // Before anything is granted anew: what just came back may be all that a new limit waits for.
        self.advance_changes();
        // Nor is it granted to this one ahead of need while others wait for it.
        self.serve_refused_but(Some(id));
        self.serve(id, true);
        self.tell_evicted(id);
        self.tell_failed_writes(id);
        self.tell_guest_errors(id);
        self.stop_unfilled(id, before.faults.unfilled);
        self.look_above(id);
    }

    /// Gives the answers that waited for this report.
    fn answered(&mut self, id: VmId, seq: Option<u32>) {
        let Some(seq) = seq else { return };
        self.stock_is_back(id, seq);
        // More than one may wait for the same pause.
        while let Some(vm) = self.vms.get_mut(&id)
            && let Some(index) = vm.waiting.iter().position(|waiting| waiting.seq == seq)
        {
            match vm.waiting.swap_remove(index).what {
                Awaited::View(reply) | Awaited::Paused(reply) | Awaited::Resumed(reply) => {
                    answer(reply, Ok(self.vm_view(id, false)));
                }
            }
        }
    }

    /// The first grant of this controller: what is missing from the reserve, what faults wait for, and a first stock.
    pub fn fund(&mut self, id: VmId) {
        let vm = &self.vms[&id];
        if !vm.accounted() {
            return;
        }
        let need = vm.need();
        // What does not fit is missing from the reserve, and the loader's first want is refused too: only the worker
        // knows what the kernel needs, so it is the one to fail and to name the smallest limit that would do.
        let got = self.charge_need(id, need, Mode::Wait);
        let vm = self.vms.get_mut(&id).expect("checked");
        vm.set_missing(need - got);
        let (short, stock) = (got < need, vm.report.stock);
        if !short {
            let most = self.stock_max(id).min(FIRST_STOCK.0);
            self.charge_ahead(id, most.saturating_sub(stock));
        }
        self.send_grant(id, short);
    }

    /// Charges what the VM wants, as far as it fits, and tells its worker. `fresh` when the worker has just reported:
    /// then a want gets an answer in any case, and a refusal counts, unless it is of what has been refused before: a
    /// worker says what it wants with every report, also when somebody has only asked for its numbers.
    fn serve(&mut self, id: VmId, fresh: bool) {
        let vm = self.vms.get_mut(&id).expect("checked");
        if !vm.accounted() || !vm.alive() || vm.cause.is_some() || self.recounting.is_some() {
            return;
        }
        // One that has not read its last grant yet asks again by itself if that is not enough. An answer to each of its
        // reports would be the reason for another report, and so on for ever.
        let asked = fresh && vm.report.want.max(vm.report.want_now) > 0 && vm.in_flight() == 0;
        let need = vm.need();
        let want = vm.report.want.max(vm.report.want_now).saturating_sub(vm.in_flight()).min(vm.useful()).max(need);
        let was_refused = vm.refused();
        let new = fresh && need > vm.missing;
        let recalled = self.is_recalled(id);
        let got = self.charge_need(id, need, if new { Mode::Wait } else { Mode::Again });
        let vm = self.vms.get_mut(&id).expect("checked");
        let refused = got < need;
        vm.set_missing(need - got);
        let mut ahead = 0;
        // Whoever asked before it had the recall would have again what is decided over: it will ask once more.
        if !refused && !recalled {
            let held_stock = vm.report.stock + vm.in_flight().saturating_sub(got);
            ahead = self.charge_ahead(id, (want - need).min(self.stock_max(id).saturating_sub(held_stock)));
        }
        if asked || got + ahead > 0 || refused != was_refused {
            self.send_grant(id, refused);
        }
        // One that stands still for others meets no limit: it is not to have anything.
        if refused && fresh && !was_refused && !self.is_emptied(id) {
            self.tell_refused(id, Pages(need - got));
            // What those who share the limit hold ahead of need is needed here, now.
            let mut neighbours = self.neighbours(id);
            neighbours.retain(|id| !self.is_recalled(*id));
            self.recall(&neighbours, |_| ());
        }
        if !refused && self.vms[&id].stopped_by_policy() && !self.vms[&id].kept_paused {
            self.resume(id, "policy", None);
        }
    }

    /// Says that so much is `missing` below a limit, unless that was said of the same limit lately.
    fn tell_refused(&mut self, id: VmId, missing: Pages) {
        let now = Instant::now();
        let vm = self.vms.get_mut(&id).expect("checked");
        let lately = |(at, told): (_, Instant)| at == vm.refused_at && now < told + QUIET;
        if vm.refused_told.is_some_and(lately) {
            return;
        }
        vm.refused_told = Some((vm.refused_at, now));
        let (at, name) = (vm.refused_at.map(|at| self.tree.path(at)), vm.name.clone());
        let details = self.account(id, json!({ "missing_bytes": missing.bytes(), "limit_of": at }));
        self.event(EventKind::MaxHit, Some(&name), details);
    }

    /// Whether so many pages could be charged.
    fn has_room(&self, id: VmId, pages: u64) -> bool {
        self.tree.margin(self.vms[&id].node).is_none_or(|room| room.0 >= pages)
    }

    /// Charges all that a VM owes, or nothing. For somebody who wants it to go on, with whatever room there is.
    pub fn pay(&mut self, id: VmId) -> bool {
        let need = self.vms[&id].need();
        if !self.has_room(id, need) {
            return false;
        }
        if need > 0 {
            let node = self.vms[&id].node;
            self.charged(id, |tree| tree.try_charge(node, Pages(need), Mode::Again));
            self.vms.get_mut(&id).expect("checked").set_missing(0);
            self.send_grant(id, false);
        }
        true
    }

    /// Charges at most `pages` that faults wait for and returns how many. In mode `Wait` what does not fit counts as
    /// a failure. A VM that its policy has stopped gets all of it when it can go on with it, else nothing; one that stands still
    /// for others gets it when it goes on.
    fn charge_need(&mut self, id: VmId, pages: u64, mode: Mode) -> u64 {
        let stopped = self.vms[&id].stopped_by_policy() && pages > 0;
        if self.is_emptied(id) || stopped && !self.has_room(id, pages.saturating_add(GO_ON)) {
            return 0;
        }
        let node = self.vms[&id].node;
        let fits = self.tree.margin(node).map_or(pages, |room| room.0.min(pages));
        let charged = self.charged(id, |tree| tree.try_charge(node, Pages(fits), mode));
        if charged < pages {
            // Does not fit; the tree counts that.
            let refused = self.tree.try_charge(node, Pages(pages - charged), mode).err();
            let level = refused.and_then(|refused| oom::level(mode, &refused));
            self.vms.get_mut(&id).expect("checked").refused_at = level;
        }
        charged
    }

    /// Charges at most `pages` ahead of need.
    fn charge_ahead(&mut self, id: VmId, pages: u64) -> u64 {
        let node = self.vms[&id].node;
        self.charged(id, |tree| tree.charge_up_to(node, Pages(pages), Pages::ZERO, Mode::NoRetry))
    }

    /// Does a charge and books it.
    fn charged(&mut self, id: VmId, charge: impl FnOnce(&mut Tree) -> Result<Charge, Refused>) -> u64 {
        let Ok(charge) = charge(&mut self.tree) else {
            return 0;
        };
        let vm = self.vms.get_mut(&id).expect("checked");
        vm.granted_total += charge.pages.0;
        if vm.hold.is_some() {
            vm.count_hold(self.start.elapsed());
        }
        let (node, name) = (vm.node, vm.name.clone());
        // A VM that is evicted from crosses the one that `max` implies all the time. The tree counts that.
        let is_set = |tree: &Tree, at| tree.limits(at).high != Limit::Max;
        if charge.crossed_high.iter().any(|at| at == node) {
            if is_set(&self.tree, node) {
                let details = self.account(id, json!({}));
                self.event(EventKind::HighCrossed, Some(&name), details);
            }
            self.look_soon(Target::Vm(id));
        }
        for group in charge.crossed_high.iter().filter(|at| *at != node) {
            if is_set(&self.tree, group) {
                self.target_event(EventKind::HighCrossed, Target::Group(group), json!({}));
            }
            self.squeeze_soon(group);
            self.look_soon(Target::Group(group));
        }
        charge.pages.0
    }

    /// The limit that leaves a VM the least, its own or that of a group that it is in, and the words that raise it by what is
    /// `missing`.
    pub fn limit_in_the_way(&self, id: VmId, missing: Pages) -> (String, String) {
        let vm = &self.vms[&id];
        let at = self.tree.narrowest(vm.node).unwrap_or(vm.node);
        let raise = self.words_to_raise(at, missing);
        let limit = if at == vm.node { "its limit".to_owned() } else { format!("the limit of {}", self.tree.path(at)) };
        (limit, raise)
    }

    /// Those who share with a VM the limit that is in its way, and hold stock.
    fn neighbours(&self, id: VmId) -> Vec<VmId> {
        let vm = &self.vms[&id];
        let level = vm.refused_at.filter(|level| *level != vm.node && self.tree.contains(*level));
        let mut vms = level.map(|level| self.vms_of(Target::Group(level))).unwrap_or_default();
        vms.retain(|other| *other != id && self.vms[other].spare() > 0);
        vms
    }

    /// What a worker may hold ahead of need: nothing while its VM stands still.
    fn stock_max(&self, id: VmId) -> u64 {
        let vm = &self.vms[&id];
        let most = if self.is_short() { shortage::STOCK } else { Pages(u64::MAX) };
        if vm.state == VmState::Paused { 0 } else { self.tree.stock_max(vm.node).min(most).0 }
    }

    /// Tells a worker what it has and how much room there is.
    pub fn send_grant(&mut self, id: VmId, refused: bool) {
        // Before the grant, or the worker would evict what it is granted.
        self.raise_aim(id);
        let (stock_max, leases) = (self.stock_max(id), self.leases(id));
        let vm = self.vms.get_mut(&id).expect("checked");
        // It tries again where it had no room for evicted pages, and is not stuck as far as is known.
        vm.report.cold.stuck &= !finds_room(vm.report.swapped, vm.leases.swap, leases.swap)
            && !finds_room(vm.report.store, vm.leases.store, leases.store);
        vm.leases = leases;
        let room = self.tree.room_to_keep(vm.node, Pages(vm.spare())).map_or(u64::MAX, |room| room.0);
        let granted_total = vm.granted_total;
        // A grant that was not taken is sent again with the next totals. Without accounting there is nothing to grant.
        vm.grant_due = vm.accounted()
            && !vm.send(ToWorker::Grant {
                epoch: self.epoch,
                granted_total,
                stock_max,
                room,
                swap_max: leases.swap,
                store_max: leases.store,
                refused,
            });
    }

    /// Sends the grants that are due: those that were dropped, and those after a change of limits.
    pub fn send_due(&mut self) {
        for id in self.vms.due() {
            self.send_due_to(id);
        }
    }

    fn send_due_to(&mut self, id: VmId) {
        let room = |vm: &Vm| vm.to_worker.capacity() > 0;
        let vm = &self.vms[&id];
        if vm.grant_due && vm.greeted && room(vm) {
            self.send_grant(id, vm.refused());
        }
        let vm = &self.vms[&id];
        if vm.balloon_due && room(vm) {
            self.aim_balloon(id);
        }
        let vm = self.vms.get_mut(&id).expect("checked");
        if vm.start_due && room(vm) {
            vm.start_due = !vm.send(ToWorker::Start);
        }
        if vm.reclaim_due && room(vm) {
            self.send_reclaim(id);
        }
        let vm = self.vms.get_mut(&id).expect("checked");
        if !room(vm) && (vm.grant_due || vm.balloon_due || vm.start_due || vm.reclaim_due) {
            vm.awaits_room = true;
            let (to_worker, inbox) = (vm.to_worker.clone(), self.inbox.clone());
            // What a worker reads may leave it nothing to report, so its reading alone wakes nobody here.
            tokio::spawn(async move {
                // Given back at once: it is the actor that uses it.
                drop(to_worker.reserve().await);
                if let Some(inbox) = inbox.upgrade() {
                    // An actor that is gone has nothing to say.
                    let _ = inbox.send(Input::Room(id)).await;
                }
            });
        }
    }

    /// A full queue has room again: what is due is sent after this input, as after every other.
    pub fn room_again(&mut self, id: VmId) {
        if let Some(vm) = self.vms.get_mut(&id) {
            vm.awaits_room = false;
        }
    }

    /// Tries the refused wants again when there may be room for them.
    pub fn serve_refused(&mut self) {
        self.serve_refused_but(None);
    }

    /// The same but for one, whose turn is next.
    fn serve_refused_but(&mut self, next: Option<VmId>) {
        if !std::mem::take(&mut self.roomier) {
            return;
        }
        self.look_at_emptied();
        for id in self.vms.refused() {
            if Some(id) != next {
                self.serve(id, false);
            }
        }
    }

    /// The size that the balloon should have: from its own limits, and from what the groups above have to give.
    pub fn balloon_target(&self, id: VmId) -> Pages {
        // What somebody has asked for beside the limits is a goal of its ladder.
        let aim = self.asks(Target::Vm(id)).balloon.map_or(Limit::Max, Limit::Pages).min(self.aim(id));
        self.own_balloon_target(id).max(self.balloon_for(id, aim))
    }

    /// The size that the balloon should have because of the VM's own limits in force, or those that are pending.
    pub fn own_balloon_target(&self, id: VmId) -> Pages {
        self.balloon_within(id, self.tree.reclaim_high(self.vms[&id].node))
    }

    /// The size that the balloon should have so that usage stays at `high`, a limit that lasts. Overhead is taken for what
    /// it is when all RAM is in use: the target does not follow each page of it.
    pub fn balloon_within(&self, id: VmId, high: Limit) -> Pages {
        let vm = &self.vms[&id];
        self.balloon_beside(vm, vm.fixed_overhead() + vm.most_grown(), high)
    }

    /// The size that the balloon should have so that usage comes from what it is now to `high`.
    pub fn balloon_for(&self, id: VmId, high: Limit) -> Pages {
        let vm = &self.vms[&id];
        self.balloon_beside(vm, self.tree.snapshot(vm.node).vmm.usage, high)
    }

    /// Reserve and overhead are charged inside the limits, so they are no room for guest pages.
    fn balloon_beside(&self, vm: &Vm, overhead: Pages, high: Limit) -> Pages {
        let beside = vm.reserve_target + overhead;
        let high = high.as_pages().map(|high| high.saturating_sub(beside));
        reclaim::balloon_target(vm.size, high.into(), Limit::Max)
    }

    /// Begins, keeps or ends the time in which a VM is held.
    pub fn watch_hold(&mut self, id: VmId) {
        let elapsed = self.elapsed();
        let vm = self.vms.get_mut(&id).expect("checked");
        vm.count_hold(elapsed);
        if !vm.report.held {
            vm.hold = None;
        } else if vm.hold.is_none() {
            let since = Instant::now();
            let left = vm.oom.deadline.saturating_sub(vm.held_for(elapsed));
            vm.hold = Some(Hold { since, deadline: since + left, recalled: false, acted: false });
            // Held below the limit in force, by the ceiling of a change that needs the guest to run.
            let node = vm.node;
            self.widen_changes(node);
        }
    }

    /// Lets the policy act on a VM that was held for too long.
    pub fn overdue_hold(&mut self, id: VmId, now: Instant) {
        let Some(vm) = self.vms.get_mut(&id) else {
            return;
        };
        let (running, refused) = (vm.state == VmState::Running, vm.refused());
        if !running || vm.hold.is_none_or(|hold| hold.acted || hold.deadline > now) {
            return;
        }
        let (elapsed, gives) = (self.elapsed(), self.gives(id));
        let vm = self.vms.get_mut(&id).expect("found");
        let verdict = vm.patience(elapsed, gives);
        let Some(hold) = &mut vm.hold else { return };
        if let Some(wait) = more_time(refused, verdict) {
            hold.deadline = now + wait;
            return;
        }
        if hold.recalled {
            return self.act_on_hold(id, now);
        }
        // Nobody is paused or ended for pages that nobody uses.
        hold.recalled = true;
        hold.deadline = now + host::scaled(SILENT_RETRY);
        let since = hold.since;
        let neighbours = self.neighbours(id);
        self.recall(&neighbours, move |actor| {
            actor.serve_refused();
            let now = Instant::now();
            if !actor.is_alive(id) {
                return;
            }
            let (elapsed, gives) = (actor.elapsed(), actor.gives(id));
            let vm = actor.vms.get_mut(&id).expect("it lives");
            let (running, refused) = (vm.state == VmState::Running, vm.refused());
            let verdict = vm.patience(elapsed, gives);
            let Some(hold) = vm.hold.as_mut().filter(|hold| hold.since == since && !hold.acted && running) else {
                return;
            };
            // What has come since is that stock, and comes once: for whom it was too little it is no progress.
            let verdict = if gives { verdict } else { Verdict::Act };
            match more_time(refused, verdict) {
                Some(wait) => (hold.recalled, hold.deadline) = (false, now + wait),
                None => actor.act_on_hold(id, now),
            }
        });
    }

    /// Lets the policy act for a VM that is held and that nobody can help: on itself at its own limit, else on somebody of the
    /// group that has no room.
    fn act_on_hold(&mut self, id: VmId, now: Instant) {
        let vm = &self.vms[&id];
        let (node, refused_at) = (vm.node, vm.refused_at);
        let level = refused_at.filter(|level| self.tree.contains(*level)).unwrap_or(node);
        let outcome = if level == node { self.choose_itself(id) } else { self.choose(level, Reason::Full) };
        let again = match outcome {
            Outcome::Wait(until) => until,
            Outcome::Done | Outcome::Nobody => now + host::scaled(RETURNS),
        };
        if let Some(hold) = self.vms.get_mut(&id).and_then(|vm| vm.hold.as_mut()).filter(|hold| !hold.acted) {
            hold.deadline = again;
        }
    }

    /// The numbers that explain an event of this VM, added to `more`.
    pub fn account(&self, id: VmId, more: Value) -> Value {
        let vm = &self.vms[&id];
        let counters = self.tree.snapshot(vm.node);
        let mut details = json!({
            "usage_bytes": counters.memory.usage.bytes(),
            "max_bytes": counters.limits.max.as_bytes(),
            "debt_bytes": Pages(vm.report.debt).bytes(),
            "balloon_target_bytes": self.balloon_target(id).bytes(),
            "balloon_actual_bytes": Pages(vm.report.balloon_actual.into()).bytes(),
        });
        if vm.hold.is_some() {
            let held = vm.held_for(self.elapsed());
            details["held_ms"] = u64::try_from(held.as_millis()).unwrap_or(u64::MAX).into();
        }
        merged(details, more)
    }
}

/// How much longer a VM may be held, if its policy is to do nothing yet.
fn more_time(refused: bool, verdict: Verdict) -> Option<Duration> {
    match verdict {
        // What it waits for is on its way.
        _ if !refused => Some(host::scaled(SILENT_RETRY)),
        Verdict::Wait(time) => Some(time),
        Verdict::Act => None,
    }
}

/// Tests a report against what this VM was granted and what it said before.
fn check(vm: &Vm, report: &Report) -> Result<(), String> {
    if report.granted_total > vm.granted_total || report.granted_total < vm.report.granted_total {
        return Err(format!("says it was granted {} pages, it was {}", report.granted_total, vm.granted_total));
    }
    if report.returned_total < vm.returned_total {
        return Err(format!("gave back {} pages, before it were {}", report.returned_total, vm.returned_total));
    }
    let Some(charged) = report.granted_total.checked_sub(report.returned_total) else {
        return Err(format!("gave back {} of {} pages", report.returned_total, report.granted_total));
    };
    let (holds, cost) = (report.held(), overhead::grown(report));
    if vm.accounted() && holds.is_none_or(|holds| holds > charged) {
        return Err(format!("holds more than the {charged} pages that it was granted"));
    }
    let before = overhead::grown(&vm.report);
    if cost.tables < before.tables || cost.records < before.records {
        return Err("says that its pages have become cheaper".to_owned());
    }
    overhead::check(report, vm.size, vm.accounted())?;
    cold::check(report, vm.size, vm.accounted())?;
    if report.ballooned > vm.size.0 {
        return Err(format!("says that {} of {} pages are in the balloon", report.ballooned, vm.size.0));
    }
    Ok(())
}

//! What is done about VMs and groups that use more than they should.

use tokio::task::JoinHandle;

use super::super::MemoryChange;
use super::super::reclaim::ReclaimedView;
use super::super::view::{ReclaimRung, VmState};
use super::limits::{ask, change};
use super::*;
use crate::controller::error::Code;

use ReclaimRung::{Balloon, Evict, Hold, Oom, Rest, Stuck};

/// Pages of the limit, and of the `high` that follows from it.
const MAX: u64 = 4096;
const HIGH: u64 = MAX - 1024;

/// A VM that can evict, in some group, under `max`; its guest holds `guest` pages.
pub(super) async fn evicting(
    controller: &Controller,
    name: &str,
    group: &'static str,
    max: Limit,
    guest: u64,
) -> FakeWorker {
    holding(controller, name, Setup { max, group, evicts: true, ..Setup::default() }, guest).await
}

/// A VM whose guest holds `guest` pages.
pub(super) async fn holding(controller: &Controller, name: &str, setup: Setup, guest: u64) -> FakeWorker {
    let mut worker = FakeWorker::add_to(controller, name, setup).await.expect("added");
    worker.hello().await;
    worker.say(FromWorker::Loaded { plan: 0 }).await;
    while worker.try_next().await.is_some() {}
    while worker.report.guest < guest {
        worker.touch((guest - worker.report.guest).min(100)).await;
    }
    worker
}

async fn alone(guest: u64) -> FakeWorker {
    let (controller, _) = Controller::start(Limit::Max);
    evicting(&controller, "vm", "/", pages(MAX), guest).await
}

impl FakeWorker {
    /// Reads what there is, and gives back what is recalled.
    pub(super) async fn obey(&mut self) {
        while let Some(message) = self.try_next().await {
            if let ToWorker::Recall { seq } | ToWorker::Query { seq } = message {
                self.book();
                if matches!(message, ToWorker::Recall { .. }) {
                    self.report.returned_total += self.report.stock;
                    self.report.stock = 0;
                }
                self.answer(seq).await;
            }
        }
    }

    /// Obeys for so many milliseconds, in steps in which every deadline passes in its order.
    pub(super) async fn obey_for(&mut self, ms: u64) {
        for _ in 0..ms / 50 {
            self.obey().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.obey().await;
    }

    /// Evicts `n` pages into a quarter of them, and gives back what that frees.
    pub(super) async fn evict_and_return(&mut self, n: u64) {
        self.evict(n, n / 4).await;
        self.report.returned_total += self.report.stock;
        self.report.stock = 0;
        self.tell().await;
    }

    async fn rung(&mut self) -> ReclaimRung {
        self.view().await.reclaim.rung
    }
}

/// The rungs that events tell of, and those of the end.
async fn told(controller: &Controller) -> Vec<String> {
    let events = controller.events(0).await.expect("events").into_iter();
    let of_ladders = events.filter(|event| matches!(event.event, EventKind::Reclaim | EventKind::Reclaimed));
    of_ladders.map(|event| event.details.get("rung").map_or("end".to_owned(), |rung| rung.to_string())).collect()
}

/// A guest without a driver is not waited for: when its stock is back, its cold pages go, until it is where it should be.
/// Semantics: 115.
#[tokio::test(start_paused = true)]
async fn above_its_high_a_deaf_guest_loses_its_cold_pages() {
    let mut worker = alone(3300).await;
    worker.obey_for(200).await;
    assert_eq!((worker.rung().await, worker.aim), (Evict, HIGH));
    let view = worker.view().await;
    assert_eq!(view.reclaim.goal_bytes, Some(HIGH * 4096));
    worker.evict_and_return(800).await;
    worker.obey().await;
    assert_eq!((worker.rung().await, worker.aim), (Rest, u64::MAX));
    assert_eq!(told(&worker.controller).await, ["\"evict\"", "end"]);
    let end = worker.has_event(EventKind::Reclaimed).await.expect("an event");
    assert_eq!((&end.details["evicted_bytes"], &end.details["balloon_bytes"]), (&(800 * 4096).into(), &0.into()));
    assert_eq!(worker.has_event(EventKind::Evicted).await.expect("an event").details["swap_bytes"], 800 * 4096);
}

/// A driver that gives has two seconds before anything is taken, and less when it does not.
/// Semantics: 42, 117.
#[tokio::test(start_paused = true)]
async fn a_guest_that_gives_has_its_time_first() {
    let mut worker = alone(2000).await;
    worker.report.balloon_ready = true;
    worker.tell().await;
    worker.obey().await;
    while worker.report.guest < 3500 {
        worker.touch(100).await;
        worker.obey().await;
    }
    worker.obey_for(1500).await;
    assert_eq!((worker.rung().await, worker.aim), (Balloon, u64::MAX));
    for _ in 0..4 {
        worker.report.ballooned += 20;
        worker.free(20).await;
        worker.obey_for(300).await;
    }
    assert_eq!((worker.rung().await, worker.aim), (Evict, HIGH), "it gives, and its time is over");
    assert_eq!(told(&worker.controller).await, ["\"balloon\"", "\"evict\""]);
}

/// The guest gives 400 pages, and its worker all stock.
async fn fall(worker: &mut FakeWorker) {
    worker.book();
    worker.report.returned_total += worker.report.stock;
    worker.report.stock = 0;
    worker.free(400).await;
}

/// The guest touches pages until it has 3300.
async fn rise(worker: &mut FakeWorker) {
    while worker.report.guest < 3300 {
        worker.touch(100).await;
    }
}

/// A VM that usage keeps on its limit climbs a few times in a minute, and its events tell of it once. Of a `high` that nobody
/// has set no event tells; of one that was set, each crossing.
/// Semantics: 115.
#[tokio::test(start_paused = true)]
async fn who_hovers_about_its_high_fills_no_log() {
    let mut worker = alone(3300).await;
    for _ in 0..30 {
        worker.obey_for(200).await;
        if worker.aim != u64::MAX {
            fall(&mut worker).await;
        }
        rise(&mut worker).await;
    }
    let told = told(&worker.controller).await;
    assert!(told.len() <= 4, "{told:?}");
    let climbs = worker.view().await.memory.events.high;
    assert!(climbs > 4, "{climbs}");
    assert!(worker.has_event(EventKind::HighCrossed).await.is_none());
    let patch = LimitPatch { high: Some(Limit::Pages(Pages(HIGH))), ..LimitPatch::default() };
    let change = MemoryChange { patch, mode: memcg_core::limit_change::Mode::Reclaim, track: None, wait: None };
    worker.controller.change("vm", change).await.expect("changed");
    let before = worker.view().await.memory.events.high;
    for _ in 0..3 {
        fall(&mut worker).await;
        rise(&mut worker).await;
    }
    let crossed = worker.view().await.memory.events.high - before;
    let told = worker.events().await.iter().filter(|event| event.event == EventKind::HighCrossed).count();
    assert!(crossed > 0 && told as u64 == crossed, "{told} of {crossed}");
}

/// One that can be neither asked nor evicted is shown as stuck, and tried again when something comes back.
/// Semantics: 44.
#[tokio::test(start_paused = true)]
async fn what_does_not_come_down_is_said() {
    let mut worker = alone(3300).await;
    worker.obey_for(200).await;
    worker.report.cold.stuck = true;
    worker.tell().await;
    assert_eq!(worker.rung().await, Stuck);
    assert_eq!(worker.aim, HIGH, "it is still asked for what it may find later");
    worker.report.cold.stuck = false;
    worker.evict_and_return(100).await;
    assert_eq!(worker.rung().await, Evict);
    // No more comes: within two seconds that is known again.
    worker.obey_for(2200).await;
    assert_eq!(worker.rung().await, Stuck);
}

/// A VM that is held at a group's limit, whose guest takes what a neighbour gives, a little now and then, is not held for ever:
/// what it gets lets it run for a moment. The neighbour cannot be evicted.
/// Semantics: 42, B34, T11.
#[tokio::test(start_paused = true)]
async fn a_trickle_does_not_put_the_policy_off() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(pages(4000))).await.expect("made");
    let mut gives = evicting(&controller, "gives", "/gold", Limit::Max, 2500).await;
    let mut held = evicting(&controller, "held", "/gold", Limit::Max, 1000).await;
    while !held.grant.3 {
        held.touch(50).await;
        gives.obey().await;
        held.obey().await;
    }
    let mut waited = 0;
    while held.has_event(EventKind::VictimSelected).await.is_none() && waited < 600 {
        // It touches one page more than it has.
        held.book();
        held.report.guest += std::mem::take(&mut held.report.stock);
        (held.report.want, held.report.want_now, held.report.held) = (1, 1, true);
        held.tell().await;
        for _ in 0..4 {
            (gives.report.cold.stuck, held.report.cold.stuck) = (true, true);
            gives.obey_for(500).await;
            held.obey_for(500).await;
        }
        waited += 4;
        gives.free(1).await;
        held.obey().await;
        held.report.guest += held.fresh();
        (held.report.want, held.report.want_now, held.report.held) = (0, 0, false);
        held.tell().await;
        held.obey_for(50).await;
    }
    // Five seconds, all holds together, and the neighbours' stock was asked for first.
    assert!((5..=12).contains(&waited), "{waited} s");
    let victim = held.has_event(EventKind::VictimSelected).await.expect("an event");
    assert_eq!((victim.vm.as_deref(), &victim.details["limit_of"]), (Some("gives"), &"/gold".into()), "the bigger one");
}

/// A guest that is held at its limit cannot help itself. While its cold pages go its policy waits, and no longer.
/// Semantics: 42, B34, T7.
#[tokio::test(start_paused = true)]
async fn a_held_guest_is_not_given_up_while_eviction_gets_somewhere() {
    let mut worker = alone(3500).await;
    worker.report.balloon_ready = true;
    while worker.report.guest + worker.report.reserve < MAX {
        worker.touch(10).await;
    }
    (worker.report.want, worker.report.want_now) = (5000, 5000);
    worker.report.held = true;
    worker.tell().await;
    worker.obey().await;
    assert_eq!((worker.rung().await, worker.aim), (Evict, HIGH));
    // It finds some, and the guest takes it at once: nobody is paused for ten seconds.
    for step in 0..10 {
        worker.evict_and_return(400).await;
        worker.obey_for(1000).await;
        worker.book();
        let got = std::mem::take(&mut worker.report.stock);
        worker.report.guest += got;
        worker.report.want_now -= got;
        worker.report.want = worker.report.want_now;
        worker.tell().await;
        assert!(worker.has_event(EventKind::VictimSelected).await.is_none(), "at step {step}");
    }
    worker.report.cold.stuck = true;
    worker.tell().await;
    assert_eq!(worker.rung().await, Hold);
    worker.obey_for(8000).await;
    assert!(worker.has_event(EventKind::VictimSelected).await.is_some());
    let view = worker.view().await;
    assert_eq!((view.state, view.reclaim.rung), (VmState::Paused, Oom));
}

/// What a group has too much its members lose, those who can, by what they use; nobody else does. One that leaves the group
/// is not asked for it any more.
/// Semantics: 41, 63.
#[tokio::test(start_paused = true)]
async fn a_group_s_need_is_evicted_from_its_members() {
    let (controller, _) = Controller::start(Limit::Max);
    for (path, max) in [("/gold", 6000), ("/iron", 9000)] {
        controller.put_group(path, change(pages(max))).await.expect("made");
    }
    let mut a = evicting(&controller, "a", "/gold", Limit::Max, 3000).await;
    let mut b = evicting(&controller, "b", "/gold", Limit::Max, 1500).await;
    let mut c = evicting(&controller, "c", "/iron", Limit::Max, 2000).await;
    b.report.cold.stuck = true;
    b.report.cold.aim = u64::MAX;
    b.tell().await;
    a.touch(400).await;
    for _ in 0..8 {
        for worker in [&mut a, &mut b, &mut c] {
            worker.obey_for(50).await;
        }
    }
    let group = controller.group("/gold").await.expect("shown");
    assert_eq!(group.reclaim.rung, Evict);
    let above = group.memory.current_bytes / 4096 - (6000 - 1024);
    let usage = |worker: &FakeWorker| worker.report.held().expect("a number");
    assert!(usage(&a) - above - 8 <= a.aim && a.aim <= usage(&a), "{} of {} for {above}", a.aim, usage(&a));
    assert_eq!((b.aim, c.aim), (u64::MAX, u64::MAX), "one has nothing, the other is elsewhere");
    controller.move_vm("a", "/iron").await.expect("it fits");
    a.obey().await;
    assert_eq!(a.aim, u64::MAX);
}

/// Of two that have as much, and use as much of it, who has three times the shares loses a third.
/// Semantics: 41.
#[tokio::test(start_paused = true)]
async fn who_has_more_shares_gives_less() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(pages(6000))).await.expect("made");
    let setup = |shares| Setup { max: Limit::Max, group: "/gold", evicts: true, shares, ..Setup::default() };
    let mut rich = holding(&controller, "rich", setup(300), 2400).await;
    let mut poor = holding(&controller, "poor", setup(100), 2400).await;
    let shown = controller.list().await.expect("shown");
    assert_eq!(shown.iter().map(|vm| vm.memory.shares).collect::<Vec<_>>(), [300, 100]);
    poor.touch(100).await;
    rich.touch(100).await;
    for _ in 0..8 {
        rich.obey_for(50).await;
        poor.obey_for(50).await;
    }
    let [rich, poor] = [&rich, &poor].map(|worker| worker.report.held().expect("a number") - worker.aim);
    assert!(rich > 8 && poor.abs_diff(3 * rich) <= 8, "rich {rich}, poor {poor}");
}

/// Idle pages that do not shrink are no pages that can be had: the whole need goes to the neighbour, at once.
/// Semantics: 41.
#[tokio::test(start_paused = true)]
async fn who_has_idle_pages_that_do_not_shrink_is_not_asked_for_them() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(pages(6000))).await.expect("made");
    let mut hard = evicting(&controller, "hard", "/gold", Limit::Max, 2400).await;
    (hard.report.idle, hard.report.cold.hard) = (2400, 2390);
    hard.tell().await;
    let mut soft = evicting(&controller, "soft", "/gold", Limit::Max, 2400).await;
    soft.touch(200).await;
    for _ in 0..8 {
        hard.obey_for(50).await;
        soft.obey_for(50).await;
    }
    let group = controller.group("/gold").await.expect("shown");
    assert_eq!(group.reclaim.rung, Evict);
    let above = group.memory.current_bytes / 4096 - (6000 - 1024);
    let asked = |worker: &FakeWorker| worker.report.held().expect("a number").saturating_sub(worker.aim);
    assert!(asked(&hard) <= 10 && asked(&soft) + 10 >= above, "{} and {} of {above}", asked(&hard), asked(&soft));
}

/// What a VM of a group is granted while its group gives is its own: it is not told to evict what it has just touched. Its
/// neighbour with cold pages is told to give more as soon as it has given half, not a second later.
/// Semantics: 41, 63.
#[tokio::test(start_paused = true)]
async fn a_vm_that_grows_in_a_full_group_keeps_what_it_is_granted() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(pages(6000))).await.expect("made");
    let mut idle = evicting(&controller, "idle", "/gold", Limit::Max, 3500).await;
    idle.report.idle = 3000;
    idle.tell().await;
    let mut busy = evicting(&controller, "busy", "/gold", Limit::Max, 1600).await;
    let usage = |worker: &FakeWorker| worker.report.held().expect("a number");
    for _ in 0..4 {
        idle.obey_for(50).await;
        busy.obey_for(50).await;
    }
    assert_eq!(controller.group("/gold").await.expect("shown").reclaim.rung, Evict);
    let (part, before) = (usage(&busy).saturating_sub(busy.aim), usage(&busy));
    for _ in 0..3 {
        let (aim, gives) = (idle.aim, usage(&idle) - idle.aim);
        idle.report.idle -= gives;
        idle.evict_and_return(gives).await;
        busy.touch(gives).await;
        idle.obey_for(50).await;
        busy.obey_for(100).await;
        idle.obey().await;
        assert!(idle.aim < aim, "{} after {aim}", idle.aim);
        assert!(usage(&busy).saturating_sub(busy.aim) <= part + 16, "{} of {}, {part} before", busy.aim, usage(&busy));
    }
    assert!(usage(&busy) >= before + 200, "{} after {before}", usage(&busy));
}

/// What is promised to a VM that evicts for its group it keeps, from the moment that it is promised.
/// Semantics: T2.
#[tokio::test(start_paused = true)]
async fn a_promise_ends_what_a_group_wants_evicted_below_it() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(pages(6000))).await.expect("made");
    let mut worker = evicting(&controller, "vm", "/gold", Limit::Max, 5500).await;
    worker.obey_for(200).await;
    assert!(worker.aim < 5100, "{}", worker.aim);
    let patch = LimitPatch { min: Some(pages(5300)), ..LimitPatch::default() };
    worker.controller.change("vm", MemoryChange { patch, ..change(Limit::Max) }).await.expect("it fits");
    worker.obey_for(200).await;
    assert_eq!(worker.aim, 5300);
}

/// A worker near a limit evicts by itself to keep some room. That others fill its group is no reason to do so within what its VM
/// is promised.
/// Semantics: T2.
#[tokio::test(start_paused = true)]
async fn a_full_group_looks_roomy_to_who_is_within_its_promise() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(pages(6000))).await.expect("made");
    let mut promised = evicting(&controller, "promised", "/gold", Limit::Max, 1500).await;
    let mut busy = evicting(&controller, "busy", "/gold", Limit::Max, 1500).await;
    let patch = LimitPatch { min: Some(pages(2500)), ..LimitPatch::default() };
    controller.change("promised", MemoryChange { patch, ..change(Limit::Max) }).await.expect("it fits");
    busy.touch(4000).await;
    for worker in [&mut promised, &mut busy] {
        worker.obey().await;
        worker.touch(1).await;
    }
    assert!(busy.grant.2 < 64, "{:?}", busy.grant);
    assert!(promised.grant.2 >= 1024, "{:?}", promised.grant);
    // No page more is there for that.
    assert_eq!(controller.group("/gold").await.expect("shown").memory.current_bytes, 6000 * 4096);
}

/// A VM of a group that evicts may be gone before the need is divided anew: the others are asked all the same.
/// Semantics: 41.
#[tokio::test(start_paused = true)]
async fn a_vm_that_is_gone_is_asked_for_nothing() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(pages(6000))).await.expect("made");
    let mut stays = evicting(&controller, "stays", "/gold", Limit::Max, 3500).await;
    let mut goes = evicting(&controller, "goes", "/gold", Limit::Max, 1600).await;
    for _ in 0..4 {
        stays.obey_for(50).await;
        goes.obey_for(50).await;
    }
    assert_eq!(controller.group("/gold").await.expect("shown").reclaim.rung, Evict);
    goes.exit(ExitReason::PowerOff).await;
    controller.remove("goes").await.expect("it has ended");
    for _ in 0..40 {
        stays.obey_for(50).await;
    }
    assert!(controller.group("/gold").await.is_ok(), "the controller lives");
}

/// A lower limit with little time: eviction begins before half of it is over, although the driver gives.
/// Semantics: 118, B83.
#[tokio::test(start_paused = true)]
async fn a_limit_that_is_lowered_begins_to_evict_in_time() {
    let mut worker = alone(2500).await;
    worker.report.balloon_ready = true;
    worker.tell().await;
    worker.obey().await;
    let lower = MemoryChange { wait: Some(Duration::from_secs(3)), ..change(pages(1500)) };
    let answer = ask(&worker, lower);
    let mut waited = 0;
    while worker.aim == u64::MAX {
        worker.obey_for(50).await;
        waited += 50;
    }
    assert!((1500..=5000).contains(&waited), "within half of the ten seconds that a change has: {waited}");
    assert_eq!(worker.aim, 1500 - 1024);
    worker.evict(2300, 100).await;
    worker.report.returned_total += worker.report.stock;
    worker.report.stock = 0;
    worker.tell().await;
    worker.obey_for(100).await;
    assert_eq!(worker.view().await.memory.max_bytes, Some(1500 * 4096));
    assert!(answer.await.expect("no panic").expect("reached").in_force);
}

/// A limit that comes with a ban on swap evicts nothing: the worker hears of the ban before it hears what to come down to.
/// Semantics: T1.
#[tokio::test(start_paused = true)]
async fn a_ban_on_swap_comes_before_the_need_to_evict() {
    let mut worker = alone(2500).await;
    worker.obey().await;
    let patch = LimitPatch { max: Some(pages(2000)), swap_max: Some(pages(0)), ..LimitPatch::default() };
    let force = MemoryChange { patch, mode: memcg_core::limit_change::Mode::Force, ..change(Limit::Max) };
    let answer = ask(&worker, force);
    worker.answer_recall().await;
    answer.await.expect("no panic").expect("by force");
    while worker.aim == u64::MAX {
        worker.next().await;
    }
    assert_eq!(worker.leases.0, 0);
    let reclaim = worker.view().await.reclaim;
    assert_eq!(reclaim.rung, Stuck);
    assert!(reclaim.stuck.is_some_and(|why| why.contains("raise swap.max above 0, at which nothing is evicted")));
}

/// A limit is not reached because nothing more can be had: to wait longer would not help, and what would is said.
/// Semantics: 44.
#[tokio::test(start_paused = true)]
async fn a_limit_out_of_reach_is_refused_with_what_would_help() {
    let mut worker = alone(2500).await;
    worker.obey().await;
    let told = async |worker: &mut FakeWorker, max: u64| {
        let answer = ask(worker, change(pages(max)));
        worker.obey_for(11_000).await;
        let refusal = answer.await.expect("no panic").expect_err("not reached");
        assert_eq!(refusal.code, Code::LimitNotReached);
        refusal.message
    };
    let answer = ask(&worker, change(pages(600)));
    for _ in 0..22 {
        worker.obey_for(500).await;
        worker.evict_and_return(80).await;
    }
    let message = answer.await.expect("no panic").expect_err("not reached").message;
    assert!(message.contains("; wait longer with --wait, or"), "it would still come: {message}");
    worker.report.cold.stuck = true;
    let message = told(&mut worker, 600).await;
    assert!(
        message.ends_with("; nothing more can be had: raise store.max, which is full, or use --mode force"),
        "{message}"
    );
    let patch = LimitPatch { store_max: Some(pages(4096)), ..LimitPatch::default() };
    worker.controller.change("vm", MemoryChange { patch, ..change(Limit::Max) }).await.expect("a limit");
    worker.obey().await;
    worker.report.cold.stuck = true;
    let message = told(&mut worker, 600).await;
    assert!(message.ends_with("; nothing more can be had: ask for a higher limit, or use --mode force"), "{message}");
    worker.report.cold.incompressible = 900;
    let message = told(&mut worker, 600).await;
    assert!(message.contains("do not shrink") && !message.contains("--wait"), "{message}");
    for (swap_max, helps) in [(1000, ", which is full"), (0, " above 0, at which nothing is evicted")] {
        let patch = LimitPatch { swap_max: Some(pages(swap_max)), ..LimitPatch::default() };
        worker.controller.change("vm", MemoryChange { patch, ..change(Limit::Max) }).await.expect("a limit");
        let message = told(&mut worker, 600).await;
        assert!(message.contains(&format!("nothing more can be had: raise swap.max{helps}, ")), "{message}");
    }
}

/// In a group it is said whose limit of swap is in the way.
#[tokio::test(start_paused = true)]
async fn what_would_help_a_group_names_the_vms() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(pages(6000))).await.expect("made");
    let mut banned = evicting(&controller, "banned", "/gold", Limit::Max, 1800).await;
    let mut other = evicting(&controller, "other", "/gold", Limit::Max, 1800).await;
    let patch = LimitPatch { swap_max: Some(pages(0)), ..LimitPatch::default() };
    controller.change("banned", MemoryChange { patch, ..change(Limit::Max) }).await.expect("a limit");
    let asked = controller.clone();
    let answer = tokio::spawn(async move { asked.change_group("/gold", change(pages(3000))).await });
    for _ in 0..30 {
        for worker in [&mut banned, &mut other] {
            worker.obey_for(250).await;
            worker.report.cold.stuck = true;
            worker.tell().await;
        }
    }
    banned.obey_for(4000).await;
    let message = answer.await.expect("no panic").expect_err("not reached").message;
    assert!(message.contains("raise swap.max of banned above 0, at which nothing is evicted"), "{message}");
}

type Reclaimed = JoinHandle<Result<ReclaimedView, Refusal>>;

fn reclaim(worker: &FakeWorker, wanted: u64, wait: u64) -> Reclaimed {
    let controller = worker.controller.clone();
    tokio::spawn(async move { controller.reclaim("vm", wanted * 4096, Duration::from_secs(wait)).await })
}

/// What is asked for is taken by all means that do not hurt, and no limit has changed.
/// Semantics: 41, 43.
#[tokio::test(start_paused = true)]
async fn memory_is_reclaimed_on_request() {
    let mut worker = alone(2000).await;
    worker.obey().await;
    worker.book();
    worker.tell().await;
    let before = worker.view().await.memory.current_bytes / 4096;
    let answer = reclaim(&worker, 700, 10);
    worker.obey_for(100).await;
    assert_eq!((worker.rung().await, worker.aim), (Evict, before - 700));
    worker.evict_and_return(1200).await;
    let reclaimed = answer.await.expect("no panic").expect("reached");
    assert!(reclaimed.is_reached(), "{reclaimed:?}");
    assert_eq!(reclaimed.requested_bytes, 700 * 4096);
    worker.obey().await;
    let view = worker.view().await;
    assert_eq!((worker.aim, view.memory.max_bytes), (u64::MAX, Some(MAX * 4096)));
    assert_eq!(view.reclaim.rung, Rest);
}

/// What is asked of a group its members give together, by what they use; nobody else does. No limit has changed, and when all
/// of it is there nobody is asked any more.
/// Semantics: 41.
#[tokio::test(start_paused = true)]
async fn memory_of_a_group_is_reclaimed_on_request() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(Limit::Max)).await.expect("made");
    let mut a = evicting(&controller, "a", "/gold", Limit::Max, 3000).await;
    let mut b = evicting(&controller, "b", "/gold", Limit::Max, 1500).await;
    let mut c = evicting(&controller, "c", "/", Limit::Max, 2000).await;
    b.report.balloon_ready = true;
    b.tell().await;
    let used = async || controller.group("/gold").await.expect("shown").memory.current_bytes / 4096;
    let (asked, goal) = (controller.clone(), used().await - 3000);
    let answer = tokio::spawn(async move { asked.reclaim_group("/gold", 3000 * 4096, Duration::from_secs(60)).await });
    b.obey_for(50).await;
    let targets = async || {
        let vms = controller.list().await.expect("listed");
        vms.iter().map(|vm| vm.balloon.target_bytes > 0).collect::<Vec<_>>()
    };
    assert_eq!(targets().await, [false, true, false], "its driver is asked at once");
    while controller.group("/gold").await.expect("shown").reclaim.rung != Evict {
        for worker in [&mut a, &mut b, &mut c] {
            worker.obey_for(50).await;
        }
    }
    for worker in [&mut a, &mut b, &mut c] {
        worker.obey().await;
    }
    let usage = |worker: &FakeWorker| worker.report.held().expect("a number");
    let gives = |worker: &FakeWorker| usage(worker).saturating_sub(worker.aim);
    let above = used().await - goal;
    assert!(gives(&a) > gives(&b) && gives(&b) > 0, "{} and {}", gives(&a), gives(&b));
    assert!((above..=above + 8).contains(&(gives(&a) + gives(&b))), "{} and {} of {above}", gives(&a), gives(&b));
    assert_eq!(c.aim, u64::MAX, "it is elsewhere");
    a.evict_and_return(gives(&a) / 3 * 4 + 100).await;
    b.evict_and_return(gives(&b) / 3 * 4 + 100).await;
    let reclaimed = answer.await.expect("no panic").expect("reached");
    assert!(reclaimed.is_reached() && reclaimed.vm.is_none(), "{reclaimed:?}");
    assert_eq!(reclaimed.group.expect("a group").memory.max_bytes, None);
    for worker in [&mut a, &mut b] {
        worker.obey_for(100).await;
        assert_eq!(worker.aim, u64::MAX);
    }
    assert_eq!(targets().await, [false; 3]);
}

/// Whoever waits for memory of a group hears that it is gone, and nobody is asked whose memory is not known.
#[tokio::test(start_paused = true)]
async fn a_request_for_memory_of_a_group_ends_with_the_group() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(Limit::Max)).await.expect("made");
    let reclaim = |path: &'static str, pages: u64| {
        let controller = controller.clone();
        tokio::spawn(async move { controller.reclaim_group(path, pages * 4096, Duration::from_secs(60)).await })
    };
    let nothing = reclaim("/gold", 1).await.expect("no panic").expect("nothing is there");
    assert_eq!((nothing.is_reached(), nothing.reclaimed_bytes), (false, 0));
    assert_eq!(reclaim("/none", 1).await.expect("no panic").expect_err("refused").code, Code::NotFound);
    let mut worker = evicting(&controller, "vm", "/gold", pages(MAX), 1000).await;
    let answer = reclaim("/gold", 900);
    worker.obey_for(100).await;
    controller.move_vm("vm", "/").await.expect("it fits");
    let left = answer.await.expect("no panic").expect("as a move takes all of it away");
    assert!(left.is_reached());
    controller.remove_group("/gold").await.expect("it is empty");
    let setup = Setup { max: Limit::Max, accounting: false, ..Setup::default() };
    let (controller, _) = Controller::start(Limit::Max);
    let _worker = FakeWorker::add_to(&controller, "vm", setup).await.expect("added");
    let refusal = controller.reclaim_group("/", 4096, Duration::from_secs(1)).await.expect_err("refused");
    assert_eq!(refusal.code, Code::NotAccounted);
}

/// As much as there was, and not a word later than it is clear that there is no more.
/// Semantics: 44.
#[tokio::test(start_paused = true)]
async fn a_request_that_is_not_reached_says_how_far_it_got() {
    let mut worker = alone(2000).await;
    worker.obey().await;
    let answer = reclaim(&worker, 1500, 60);
    worker.obey_for(100).await;
    worker.evict_and_return(400).await;
    worker.report.cold.stuck = true;
    worker.tell().await;
    let reclaimed = answer.await.expect("no panic").expect("not reached");
    assert!(!reclaimed.is_reached() && reclaimed.reclaimed_bytes >= 300 * 4096, "{}", reclaimed.reclaimed_bytes);
    // One whose time is over is answered, too.
    worker.report.cold.stuck = false;
    let answer = reclaim(&worker, 1500, 1);
    worker.obey_for(1500).await;
    assert!(!answer.await.expect("no panic").expect("not reached").is_reached());
    assert_eq!(worker.aim, u64::MAX, "nobody wants it any more");
    let nothing = worker.controller.reclaim("vm", 0, Duration::from_secs(1)).await.expect("at once");
    assert!(nothing.is_reached());
}

/// Whoever asks for what cannot be is told so.
#[tokio::test(start_paused = true)]
async fn a_request_is_refused_that_makes_no_sense() {
    let setup = Setup { max: Limit::Max, accounting: false, ..Setup::default() };
    let worker = FakeWorker::running(setup).await;
    let refused = |name: &'static str| {
        let controller = worker.controller.clone();
        async move { controller.reclaim(name, 4096, Duration::from_secs(1)).await.expect_err("refused").code }
    };
    assert_eq!((refused("vm").await, refused("nobody").await), (Code::NotAccounted, Code::NotFound));
    let mut worker = alone(1000).await;
    worker.obey().await;
    let answer = reclaim(&worker, 900, 60);
    worker.obey_for(100).await;
    worker.exit(ExitReason::PowerOff).await;
    assert_eq!(answer.await.expect("no panic").expect_err("it has ended").code, Code::WrongState);
}

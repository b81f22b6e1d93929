//! Who is chosen where a group is full.

use super::super::error::Code;
use super::super::oom_log::{Outcome, Reason};
use super::super::view::{OomPreference, PausedBy, VmState};
use super::ladders::holding;
use super::limits::change;
use super::shortage::{all, left, pass, policy, watched};
use super::*;

/// A group of so many pages, and VMs in it whose guests hold as much as is said.
pub(super) struct Full {
    pub controller: Controller,
    pub workers: Vec<FakeWorker>,
}

/// One that is killed when it is chosen.
pub(super) fn kill(preference: OomPreference, priority: i32) -> OomPolicy {
    OomPolicy { priority, ..policy(OomAction::Kill, preference) }
}

pub(super) const KILL: OomPreference = OomPreference::None;

impl Full {
    pub async fn new(pages_of: u64, vms: &[(&'static str, u64, OomPolicy)]) -> Self {
        let (controller, _) = Controller::start(Limit::Max);
        controller.put_group("/gold", change(pages(pages_of))).await.expect("made");
        let mut full = Self { controller, workers: Vec::new() };
        for (name, guest, oom) in vms {
            full.add(name, "/gold", *guest, *oom).await;
        }
        full
    }

    pub async fn add(&mut self, name: &str, group: &'static str, guest: u64, oom: OomPolicy) {
        // A pause is worth something only where something can be evicted.
        let evicts = oom.action == OomAction::Pause;
        let setup = Setup { max: Limit::Max, group, evicts, oom, queue: 512, ..Setup::default() };
        let worker = holding(&self.controller, name, setup, guest).await;
        self.workers.push(worker);
    }

    /// The last guest touches all that is left, and is held with a want of so many pages more.
    pub async fn fill(&mut self, wants: u64) {
        let last = self.workers.len() - 1;
        self.fill_with(last, wants).await;
    }

    pub async fn fill_with(&mut self, which: usize, wants: u64) {
        loop {
            self.workers[which].touch(100).await;
            for worker in &mut self.workers {
                worker.obey().await;
            }
            let worker = &mut self.workers[which];
            if worker.grant.3 {
                (worker.report.want, worker.report.want_now, worker.report.held) = (wants, wants, true);
                worker.tell().await;
                return;
            }
        }
    }

    /// The guest whose want was served goes on.
    pub async fn let_go(&mut self, which: usize) {
        let worker = &mut self.workers[which];
        worker.obey().await;
        assert!(!worker.grant.3, "it was refused again");
        worker.report.guest += std::mem::take(&mut worker.report.want_now);
        (worker.report.want, worker.report.held) = (0, false);
        worker.book();
        worker.tell().await;
    }

    pub async fn pass(&mut self, ms: u64) {
        pass(&mut self.workers, ms).await;
    }

    pub fn killed(&self) -> Vec<bool> {
        self.workers.iter().map(FakeWorker::killed).collect()
    }

    /// The names of those that a VM is said to wait for.
    pub async fn waits_for(&self, name: &str) -> Vec<String> {
        let vm = self.controller.list().await.expect("listed").into_iter().find(|vm| vm.name == name).expect("there");
        vm.waits_for.into_iter().map(|ahead| ahead.vm).collect()
    }

    pub async fn state(&self, name: &str) -> VmState {
        self.controller.list().await.expect("listed").into_iter().find(|vm| vm.name == name).expect("there").state
    }
}

/// Who is held is not who goes: of those in the group it is the first of the list, and nobody outside of it, however big. When
/// the memory of that one is back, whoever was held goes on.
/// Semantics: 48, 63, B40.
#[tokio::test(start_paused = true)]
async fn a_full_group_chooses_the_first_of_its_own_and_the_held_one_goes_on() {
    let mut full = Full::new(6000, &[("big", 3000, kill(KILL, 0)), ("asks", 500, kill(KILL, 0))]).await;
    full.add("outside", "/", 9000, kill(KILL, -9)).await;
    full.fill_with(1, 200).await;
    full.pass(6000).await;
    assert_eq!(full.killed(), [true, false, false]);
    let victim = all(&full.controller, EventKind::VictimSelected).await.pop().expect("told");
    assert_eq!((victim.vm.as_deref(), &victim.details["limit_of"]), (Some("big"), &"/gold".into()));
    assert_eq!(victim.details["reason"], "full");
    let ranked = victim.details["ranked"].as_array().expect("a list");
    assert!(ranked.len() == 2 && ranked[0].as_str().expect("a sentence").starts_with("big: "), "{ranked:?}");
    assert!(victim.details["why"] == ranked[0] && victim.details["frees_bytes"].as_u64() > Some(3000 * 4096));
    let end = full.workers.remove(0).die(Death::Signal(9)).await;
    assert_eq!(end, VmEnd::Killed(super::super::KilledBy::Group));
    full.pass(1000).await;
    full.let_go(0).await;
    full.pass(30_000).await;
    assert_eq!(full.killed(), [false, false]);
    let gold = full.controller.group("/gold").await.expect("shown").memory.events;
    assert_eq!((gold.oom, gold.oom_kill), (1, 1));
    let mut decisions = full.controller.oom_log(0).await.expect("alive").decisions;
    let decision = decisions.pop().expect("recorded");
    let there = (decision.level.as_str(), decision.max_bytes, decision.short);
    assert_eq!((there, decision.vm.as_deref()), (("/gold", Some(6000 * 4096), None), Some("big")));
    let freed = (decision.outcome, decision.freed_bytes);
    assert_eq!((freed, decisions.len()), ((Outcome::Freed, decision.expected_bytes), 0), "one was enough");
    let why = full.controller.why("asks").await.expect("told");
    let text = "the policy killed big, not this one, which came 2nd in the list";
    assert!(why.story.iter().any(|sentence| sentence.text.contains(text)), "{:#?}", why.story);
}

/// As long as the memory of one is on its way, no second one goes for the same group; in another group somebody does.
/// Semantics: 47, B42.
#[tokio::test(start_paused = true)]
async fn there_is_one_victim_at_a_time_in_each_group() {
    let vms = [("big", 2500, kill(KILL, 0)), ("next", 1500, kill(KILL, 0)), ("asks", 500, kill(KILL, 5))];
    let mut full = Full::new(6000, &vms).await;
    full.fill(100).await;
    full.pass(6000).await;
    assert_eq!(full.killed(), [true, false, false]);
    full.controller.put_group("/iron", change(pages(3000))).await.expect("made");
    full.add("iron", "/iron", 500, kill(KILL, 0)).await;
    full.fill(100).await;
    full.pass(6000).await;
    assert_eq!(full.killed(), [true, false, false, true], "each group has its own");
    full.pass(5000).await;
    assert_eq!(full.killed(), [true, true, false, true], "its memory has not come back in time");
}

/// Everybody is omitted: the one that is held stays so, nobody goes in their place, and that is said, with what would help. A
/// raised limit lets it go on.
/// Semantics: 44, 49, B41.
#[tokio::test(start_paused = true)]
async fn where_all_of_a_group_are_omitted_the_held_one_stays_held() {
    let omit = kill(OomPreference::Omit, 0);
    let mut full = Full::new(4000, &[("a", 2000, omit), ("b", 500, omit)]).await;
    full.add("outside", "/", 9000, kill(KILL, 0)).await;
    full.fill_with(1, 100).await;
    full.pass(40_000).await;
    let said = all(&full.controller, EventKind::NobodyChosen).await;
    assert!(said.len() == 1 && said[0].group.as_deref() == Some("/gold"), "{said:?}");
    assert_eq!(said[0].details["why"], "nobody can be chosen: 2 omitted");
    assert_eq!(said[0].details["ranked"].as_array().map(Vec::len), Some(2));
    assert_eq!((full.killed(), full.state("b").await), (vec![false; 3], VmState::Running));
    let asked = full.controller.clone();
    let raised = tokio::spawn(async move { asked.change_group("/gold", change(pages(5000))).await });
    full.pass(1000).await;
    raised.await.expect("no panic").expect("raised");
    full.let_go(1).await;
}

/// One that is never to be chosen is not at its own limit either.
/// Semantics: 49, B41.
#[tokio::test(start_paused = true)]
async fn one_that_is_omitted_stays_held_at_its_own_limit() {
    let (controller, _) = Controller::start(Limit::Max);
    let oom = kill(OomPreference::Omit, 0);
    let worker = holding(&controller, "vm", Setup { oom, ..Setup::default() }, 1000).await;
    let mut full = Full { controller, workers: vec![worker] };
    full.fill(100).await;
    full.pass(30_000).await;
    assert_eq!(full.killed(), [false]);
    let said = all(&full.controller, EventKind::NobodyChosen).await;
    assert!(said.len() == 1 && said[0].vm.as_deref() == Some("vm"), "{said:?}");
}

/// What is within its `memory.min` is not taken, however much it is.
/// Semantics: 41, T2.
#[tokio::test(start_paused = true)]
async fn one_within_its_min_is_not_chosen() {
    let mut full = Full::new(6000, &[("promised", 3000, kill(KILL, -9)), ("asks", 500, kill(KILL, 9))]).await;
    let used = full.controller.list().await.expect("listed")[0].memory.current_bytes;
    let patch = LimitPatch { min: Some(Limit::Pages(Pages(used / 4096))), ..LimitPatch::default() };
    let asked = full.controller.clone();
    let promise = super::super::MemoryChange { patch, ..change(Limit::Max) };
    let promised = tokio::spawn(async move { asked.change("promised", promise).await });
    full.pass(1000).await;
    promised.await.expect("no panic").expect("it fits");
    full.fill(100).await;
    full.pass(6000).await;
    assert_eq!(full.killed(), [false, true]);
    let victim = all(&full.controller, EventKind::VictimSelected).await.pop().expect("told");
    let spared = victim.details["ranked"][1].as_str().expect("a sentence").to_owned();
    assert!(spared.starts_with("promised: spared:") && spared.contains("within its memory.min"), "{spared}");
}

/// A pause for the group takes all that the VM has; the held one goes on with it. The paused one goes on by itself when there is
/// room for what it gave, and for nobody before.
/// Semantics: 50, T7.
#[tokio::test(start_paused = true)]
async fn who_is_paused_for_its_group_is_emptied_and_goes_on_when_there_is_room() {
    let pause = |priority| OomPolicy { priority, ..policy(OomAction::Pause, KILL) };
    let mut full = Full::new(6000, &[("big", 3000, pause(0)), ("asks", 500, pause(9))]).await;
    full.fill(200).await;
    full.pass(10_000).await;
    assert_eq!((full.state("big").await, full.state("asks").await), (VmState::Paused, VmState::Running));
    let view = full.controller.list().await.expect("listed").remove(0);
    assert_eq!(view.paused_by, Some(PausedBy::Group));
    let big = &mut full.workers[0];
    assert!(big.aim <= RESERVE, "{}", big.aim);
    big.evict_and_return(2900).await;
    full.pass(1000).await;
    full.let_go(1).await;
    // It takes what was given.
    full.workers[1].touch(2000).await;
    full.pass(30_000).await;
    assert_eq!(full.state("big").await, VmState::Paused);
    let refused = full.controller.resume("big").await.expect_err("no room");
    assert_eq!(refused.code, Code::ResumeRefused);
    assert!(refused.message.contains("its group ran short") && refused.message.contains("missing still in /gold"));
    full.workers[1].free(2500).await;
    full.pass(1000).await;
    assert_eq!(full.state("big").await, VmState::Running);
    assert_eq!(all(&full.controller, EventKind::VictimSelected).await.len(), 1);
}

/// One that is being emptied is to have nothing, so no limit is in its way: what it owes now and then is not told.
#[tokio::test(start_paused = true)]
async fn who_is_being_emptied_meets_no_limit() {
    let pause = |priority| OomPolicy { priority, ..policy(OomAction::Pause, KILL) };
    let mut full = Full::new(6000, &[("big", 3000, pause(0)), ("asks", 500, pause(9))]).await;
    full.fill(200).await;
    full.pass(10_000).await;
    assert_eq!(full.state("big").await, VmState::Paused);
    for debt in [5, 0, 7, 0, 9] {
        let report = &mut full.workers[0].report;
        report.guest = report.guest + debt - report.debt;
        report.reserve = RESERVE - debt;
        report.debt = debt;
        full.workers[0].tell().await;
        full.pass(500).await;
    }
    let told = all(&full.controller, EventKind::MaxHit).await;
    assert!(told.iter().all(|event| event.vm.as_deref() == Some("asks")), "{told:?}");
}

/// What is granted and not taken yet pays for what faults have taken before: a pause would not give that back, so nobody is
/// paused for it.
#[tokio::test(start_paused = true)]
async fn nobody_is_paused_for_a_grant_that_faults_wait_for() {
    let mut full = Full::new(6000, &[]).await;
    for name in ["gives", "asks"] {
        let oom = policy(OomAction::Pause, KILL);
        let setup = Setup { max: Limit::Max, group: "/gold", oom, queue: 512, ..Setup::default() };
        full.workers.push(holding(&full.controller, name, setup, 1000).await);
    }
    full.fill(23).await;
    full.workers[0].free(17).await;
    // The other one is granted that, and says nothing of it: it is held as before.
    pass(&mut full.workers[..1], 10_000).await;
    assert_eq!(all(&full.controller, EventKind::VictimSelected).await, []);
    let said = all(&full.controller, EventKind::NobodyChosen).await;
    assert_eq!(said.len(), 1);
    assert_eq!(said[0].details["why"], "nobody can be chosen: 2 with nothing to free");
}

/// Two that were paused for their group go on one after the other, the one first that was paused first.
/// Semantics: T7.
#[tokio::test(start_paused = true)]
async fn those_that_were_emptied_go_on_one_after_the_other() {
    let pause = |priority| OomPolicy { priority, ..policy(OomAction::Pause, KILL) };
    let vms = [("second", 1500, pause(1)), ("first", 1500, pause(0)), ("asks", 500, pause(9))];
    let mut full = Full::new(5000, &vms).await;
    full.fill(100).await;
    full.pass(10_000).await;
    assert_eq!(full.state("first").await, VmState::Paused);
    assert_eq!(full.waits_for("asks").await, ["first"]);
    // It gives nothing in time.
    full.pass(12_000).await;
    assert_eq!(full.state("second").await, VmState::Paused);
    assert_eq!(full.waits_for("second").await, ["first"]);
    assert_eq!(full.waits_for("first").await, [""; 0]);
    for which in [0, 1] {
        full.workers[which].evict_and_return(1400).await;
    }
    full.pass(500).await;
    full.let_go(2).await;
    // There is room for both by now.
    assert_eq!((full.state("first").await, full.state("second").await), (VmState::Running, VmState::Paused));
    full.pass(9000).await;
    assert_eq!(full.state("second").await, VmState::Paused);
    full.pass(2000).await;
    assert_eq!(full.state("second").await, VmState::Running);
}

/// A host that is short lets nobody go on who was paused for a group.
#[tokio::test(start_paused = true)]
async fn nobody_goes_on_while_the_host_is_short() {
    let pause = |priority| OomPolicy { priority, ..policy(OomAction::Pause, KILL) };
    let mut full = Full::new(6000, &[("big", 3000, pause(0)), ("asks", 500, pause(9))]).await;
    full.fill(100).await;
    full.pass(10_000).await;
    assert_eq!(full.state("big").await, VmState::Paused);
    let host = watched(&full.controller).await;
    *host.lock().expect("alive") = left(700);
    full.pass(2000).await;
    full.workers[0].evict_and_return(2900).await;
    full.pass(1000).await;
    full.let_go(1).await;
    full.workers[1].free(500).await;
    full.pass(5000).await;
    assert_eq!(full.state("big").await, VmState::Paused, "its group has room");
    *host.lock().expect("alive") = left(9000);
    full.pass(12_000).await;
    assert_eq!(full.state("big").await, VmState::Running);
}

/// A worker that reads nothing cannot be told to stop: the next one goes.
/// Semantics: 47.
#[tokio::test(start_paused = true)]
async fn who_does_not_listen_is_passed_over() {
    let pause = |priority| OomPolicy { priority, ..policy(OomAction::Pause, KILL) };
    let vms = [("deaf", 2000, pause(0)), ("next", 1000, pause(5)), ("asks", 500, pause(9))];
    let mut full = Full::new(6000, &vms).await;
    full.fill(100).await;
    for _ in 0..600 {
        // Nobody reads the questions.
        let asked = full.controller.clone();
        drop(tokio::spawn(async move { asked.show("deaf").await }));
    }
    pass(&mut full.workers[1..], 10_000).await;
    assert_eq!((full.state("deaf").await, full.state("next").await), (VmState::Running, VmState::Paused));
}

/// A group whose guests want more than it has for ever: one is chosen in ten seconds, not more.
/// Semantics: 47, B34.
#[tokio::test(start_paused = true)]
async fn a_group_that_never_has_enough_chooses_one_in_ten_seconds() {
    let kills: Vec<_> = ["a", "b", "c", "d", "e", "f"].map(|name| (name, 800, kill(KILL, 0))).into();
    let mut full = Full::new(6 * (800 + RESERVE) + 400, &kills).await;
    full.fill(100).await;
    let mut seen = Vec::new();
    for second in 0..45 {
        full.pass(1000).await;
        if let Some(gone) = full.workers.iter().position(FakeWorker::killed) {
            seen.push(second);
            let _ = full.workers.remove(gone).die(Death::Signal(9)).await;
            // Its memory is not enough either: the next one takes all of it at once.
            full.pass(200).await;
            for worker in &mut full.workers {
                worker.report.guest += worker.report.want_now.min(worker.fresh());
                (worker.report.want, worker.report.want_now, worker.report.held) = (0, 0, false);
                worker.book();
            }
            full.fill(100).await;
        }
    }
    assert!((3..=5).contains(&seen.len()) && seen.is_sorted_by(|a, b| a + 9 <= *b), "{seen:?}");
}

/// Two whose pages go and come back all the time get nowhere, although nobody is refused anything for long: one of them is
/// paused, the other one goes on, and nobody has to go for one alone.
/// Semantics: 42.
#[tokio::test(start_paused = true)]
async fn of_guests_that_thrash_one_stands_still() {
    let pause = |priority| OomPolicy { priority, ..policy(OomAction::Pause, KILL) };
    let mut full = Full::new(6000, &[("first", 2800, pause(0)), ("other", 2600, pause(9))]).await;
    for thrashing in [1, 2] {
        for _ in 0..14 {
            for worker in &mut full.workers[..thrashing] {
                worker.report.cold.evicted += 2000;
                worker.report.cold.refaulted += 2000;
                worker.tell().await;
            }
            full.pass(1000).await;
        }
        let states = [full.state("first").await, full.state("other").await];
        let first = if thrashing == 1 { VmState::Running } else { VmState::Paused };
        assert_eq!(states, [first, VmState::Running], "{thrashing}");
    }
    let chosen = all(&full.controller, EventKind::VictimSelected).await;
    assert_eq!(chosen.len(), 1);
    assert_eq!((&chosen[0].details["limit_of"], &chosen[0].details["reason"]), (&"/gold".into(), &"thrash".into()));
    let decision = full.controller.oom_log(0).await.expect("alive").decisions.pop().expect("recorded");
    assert_eq!((decision.reason, decision.short), (Reason::Thrash, None));
    let why = full.controller.why("other").await.expect("told");
    let text = "the VMs of /gold thrashed, they only took pages from each other";
    assert!(why.story.iter().any(|sentence| sentence.text.contains(text)), "{:#?}", why.story);
}

/// A controller that begins does not know whom the last one has chosen: that one has its time.
#[tokio::test(start_paused = true)]
async fn a_controller_that_has_taken_over_chooses_nobody_at_once() {
    let mut full = Full::new(6000, &[("big", 3000, kill(KILL, 0)), ("asks", 500, kill(KILL, 0))]).await;
    let took_over = full.controller.ask(|actor, reply| {
        actor.begin_recount();
        actor.end_recount();
        super::super::actor::answer(reply, Ok(()));
    });
    took_over.await.expect("the controller is there");
    full.fill_with(1, 200).await;
    full.pass(9000).await;
    assert_eq!(full.killed(), [false, false]);
    full.pass(3000).await;
    assert_eq!(full.killed(), [true, false]);
}

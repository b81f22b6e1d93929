//! What is recorded of decisions, and of what came of them.

use super::super::actor::answer;
use super::super::journal::Journal;
use super::super::oom_log::{BUCKETS, DecidedBy, DecisionView, OomLogView, Outcome, RING, Reason};
use super::super::rank::SparedBy;
use super::super::shortage::ShortageSign;
use super::super::view::OomPreference;
use super::grants::held;
use super::shortage::{chosen_by, left, pass, policy, watched};
use super::*;
use crate::controller::events::LIFE;

async fn log(controller: &Controller, since: u64) -> OomLogView {
    controller.oom_log(since).await.expect("alive")
}

async fn last(controller: &Controller) -> DecisionView {
    log(controller, 0).await.decisions.pop().expect("a decision")
}

async fn first(controller: &Controller) -> DecisionView {
    log(controller, 0).await.decisions.remove(0)
}

/// Everybody can see afterwards who was chosen, from which list, why, and what it brought; the event has the number.
/// Semantics: 74.
#[tokio::test(start_paused = true)]
async fn a_pause_for_the_host_is_recorded_with_its_list_and_followed_until_the_vm_goes_on() {
    let (controller, _) = Controller::start(Limit::Max);
    let pause = policy(OomAction::Pause, OomPreference::None);
    let omit = policy(OomAction::Pause, OomPreference::Omit);
    let mut workers =
        vec![chosen_by(&controller, "a", 3000, pause).await, chosen_by(&controller, "b", 4000, omit).await];
    assert_eq!(log(&controller, 0).await, OomLogView { dropped: 0, decisions: Vec::new() });
    let host = watched(&controller).await;
    *host.lock().expect("alive") = left(300);
    pass(&mut workers, 6000).await;
    let decision = last(&controller).await;
    assert_eq!((decision.vm.as_deref(), decision.id), (Some("a"), Some(workers[0].id.0)));
    assert_eq!((decision.action, decision.by), (Some(OomAction::Pause), DecidedBy::Policy));
    assert_eq!((decision.level.as_str(), decision.max_bytes), ("/", None));
    assert_eq!((decision.short, decision.available_bytes), (Some(ShortageSign::Available), Some(300 * 4096)));
    assert_eq!(decision.reason, Reason::Host);
    assert_eq!((decision.outcome, decision.freed_bytes, decision.took_ms), (Outcome::UnderWay, 0, None));
    let places: Vec<_> = decision.ranked.iter().map(|entry| (entry.rank, entry.vm.as_str(), entry.spared)).collect();
    assert_eq!(places, [(1, "a", None), (2, "b", Some(SparedBy::Omit))]);
    let first = &decision.ranked[0];
    assert!(first.usage_bytes > 3000 * 4096 && first.frees_bytes == decision.expected_bytes, "{first:?}");
    assert_eq!((decision.why.as_str(), decision.not_shown), (first.why.as_str(), 0));
    let told = workers[0].has_event(EventKind::VictimSelected).await.expect("told");
    assert_eq!((&told.details["decision"], &told.details["reason"]), (&decision.number.into(), &"host".into()));
    workers[0].evict_and_return(1000).await;
    let part = last(&controller).await;
    assert_eq!((part.outcome, part.took_ms), (Outcome::UnderWay, None));
    assert!(part.freed_bytes >= 750 * 4096, "{part:?}");
    workers[0].evict_and_return(1900).await;
    let all = last(&controller).await;
    assert_eq!(all.outcome, Outcome::Freed);
    assert!(all.freed_bytes >= all.expected_bytes && all.took_ms.is_some_and(|took| took < 2000), "{all:?}");
    *host.lock().expect("alive") = left(9000);
    pass(&mut workers, 25_000).await;
    let resumed = last(&controller).await;
    assert_eq!((resumed.outcome, resumed.took_ms), (Outcome::Resumed, all.took_ms));
    assert!(resumed.outcome_ms >= resumed.time_ms && log(&controller, 0).await.decisions.len() == 1);
    let (_, tally) = controller.tally().await.expect("alive");
    assert_eq!(tally.oom.decisions[&(Some(OomAction::Pause), DecidedBy::Policy)], 1);
    assert_eq!(tally.oom.freed[&OomAction::Pause], resumed.freed_bytes);
    assert_eq!(tally.oom.returns[&OomAction::Pause].counts.iter().sum::<u64>(), 1);
}

/// A victim that does not die in time is late, and the next one is another decision. What it gives in the end counts.
/// Semantics: 47, 74.
#[tokio::test(start_paused = true)]
async fn a_victim_that_does_not_die_is_late_until_its_memory_is_back() {
    let (controller, _) = Controller::start(Limit::Max);
    let kill = policy(OomAction::Kill, OomPreference::None);
    let mut workers =
        vec![chosen_by(&controller, "a", 3000, kill).await, chosen_by(&controller, "b", 1000, kill).await];
    let host = watched(&controller).await;
    *host.lock().expect("alive") = left(300);
    pass(&mut workers, 6000).await;
    assert_eq!(last(&controller).await.outcome, Outcome::UnderWay);
    pass(&mut workers, 10_500).await;
    let decisions = log(&controller, 0).await.decisions;
    let seen: Vec<_> = decisions.iter().map(|d| (d.number, d.vm.as_deref(), d.outcome)).collect();
    assert_eq!(seen, [(1, Some("a"), Outcome::Late), (2, Some("b"), Outcome::UnderWay)]);
    assert_eq!(log(&controller, 1).await.decisions, decisions[1..]);
    workers.remove(0).die(Death::Signal(9)).await;
    pass(&mut workers, 3000).await;
    let a = log(&controller, 0).await.decisions.remove(0);
    assert_eq!((a.outcome, a.freed_bytes), (Outcome::Freed, a.expected_bytes));
    assert!(a.took_ms.is_some_and(|took| took > 10_000), "{a:?}");
    let (_, tally) = controller.tally().await.expect("alive");
    let returns = tally.oom.returns[&OomAction::Kill];
    assert_eq!(returns.counts[BUCKETS.iter().position(|ms| *ms == 30_000).expect("a bucket")], 1, "{returns:?}");
}

/// One of whose memory nothing can be had is not said to have freed any; what is found of it later counts all the same.
#[tokio::test(start_paused = true)]
async fn a_pause_that_frees_nothing_has_brought_nothing() {
    let (controller, _) = Controller::start(Limit::Max);
    let pause = policy(OomAction::Pause, OomPreference::None);
    let mut workers = vec![chosen_by(&controller, "a", 3000, pause).await];
    let host = watched(&controller).await;
    *host.lock().expect("alive") = left(300);
    pass(&mut workers, 6000).await;
    assert_eq!(first(&controller).await.outcome, Outcome::UnderWay);
    workers[0].report.cold.stuck = true;
    workers[0].tell().await;
    pass(&mut workers, 20_000).await;
    let nothing = first(&controller).await;
    assert_eq!((nothing.outcome, nothing.freed_bytes, nothing.took_ms), (Outcome::Nothing, 0, None));
    workers[0].report.cold.stuck = false;
    workers[0].evict_and_return(1000).await;
    let some = first(&controller).await;
    assert_eq!((some.outcome, some.freed_bytes), (Outcome::Late, 750 * 4096));
    let worker = workers.remove(0);
    worker.die(Death::Signal(9)).await;
    pass(&mut workers, 1000).await;
    assert_eq!(first(&controller).await.outcome, Outcome::Freed);
}

/// A VM that is paused at its own limit gives nothing to anybody: it waits, and goes on when the limit is raised.
#[tokio::test(start_paused = true)]
async fn a_pause_at_a_limit_of_its_own_waits_until_that_is_raised() {
    let mut worker = held(Setup::default()).await;
    worker.obey_for(8000).await;
    let decision = last(&worker.controller).await;
    assert_eq!((decision.outcome, decision.expected_bytes, decision.short), (Outcome::Waits, 0, None));
    assert_eq!(decision.reason, Reason::Limit);
    assert_eq!((decision.level.as_str(), decision.max_bytes), ("/vm", Some(4096 * 4096)));
    assert_eq!(decision.why, "vm: it was held at its own limit for too long");
    worker.controller.change("vm", super::limits::change(pages(8192))).await.expect("in force");
    worker.obey().await;
    assert_eq!(last(&worker.controller).await.outcome, Outcome::Resumed);
}

/// Where nobody may be chosen that is a decision as well.
/// Semantics: 44.
#[tokio::test(start_paused = true)]
async fn that_nobody_can_be_chosen_is_recorded_with_the_reasons() {
    let (controller, _) = Controller::start(Limit::Max);
    let omit = policy(OomAction::Kill, OomPreference::Omit);
    let mut workers = Vec::new();
    for name in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"] {
        workers.push(chosen_by(&controller, name, 300, omit).await);
    }
    let host = watched(&controller).await;
    *host.lock().expect("alive") = left(300);
    pass(&mut workers, 6000).await;
    let decision = last(&controller).await;
    assert_eq!((decision.vm, decision.action, decision.outcome), (None, None, Outcome::Nobody));
    assert_eq!(decision.why, "nobody can be chosen: 12 omitted");
    assert_eq!((decision.ranked.len(), decision.not_shown), (10, 2));
    let told = workers[0].has_event(EventKind::NobodyChosen).await.expect("told");
    assert_eq!((&told.details["decision"], &told.details["reason"]), (&decision.number.into(), &"host".into()));
    let (_, tally) = controller.tally().await.expect("alive");
    assert_eq!(tally.oom.decisions[&(None, DecidedBy::Policy)], 1);
}

/// One whose worker does not listen cannot be paused: that is seen, and the next one goes.
#[tokio::test(start_paused = true)]
async fn a_pause_that_could_not_be_told_has_failed() {
    let (controller, _) = Controller::start(Limit::Max);
    let pause = policy(OomAction::Pause, OomPreference::None);
    let setup = Setup { max: Limit::Max, evicts: true, oom: pause, queue: 2, ..Setup::default() };
    let deaf = super::ladders::holding(&controller, "deaf", setup, 3000).await;
    let mut workers = vec![chosen_by(&controller, "other", 1000, pause).await];
    let host = watched(&controller).await;
    *host.lock().expect("alive") = left(300);
    // Questions that it does not read fill its queue.
    for _ in 0..3 {
        controller.show("deaf").await.expect("last known numbers");
    }
    pass(&mut workers, 7000).await;
    let decisions = log(&controller, 0).await.decisions;
    let seen: Vec<_> = decisions.iter().map(|d| (d.vm.as_deref(), d.outcome)).collect();
    assert_eq!(seen, [(Some("deaf"), Outcome::Failed), (Some("other"), Outcome::UnderWay)]);
    drop(deaf);
}

/// The ring is bounded, says what is missing, and its numbers go on above those of the controllers before.
#[tokio::test(start_paused = true)]
async fn old_decisions_are_counted_and_a_new_life_has_numbers_of_its_own() {
    let place = tempfile::tempdir().expect("a directory");
    for life in 0..2 {
        let journal = Journal::open(&place.path().join("journal")).expect("opened").1;
        let (controller, _) = Controller::start_with(Limit::Max, journal);
        let many = RING as u64 + 5;
        let decided = controller.ask(move |actor, reply| {
            for _ in 0..many {
                actor.log_nobody(actor.root, Reason::Host, DecidedBy::Policy, "why");
            }
            answer(reply, Ok(()));
        });
        decided.await.expect("done");
        let numbers =
            async |since| log(&controller, since).await.decisions.iter().map(|d| d.number).collect::<Vec<_>>();
        let before = life * LIFE;
        let all: Vec<_> = (before + 6..=before + many).collect();
        assert_eq!((log(&controller, 0).await.dropped, numbers(0).await), (5, all.clone()));
        assert_eq!((log(&controller, before + 3).await.dropped, numbers(before + 3).await), (2, all.clone()));
        assert_eq!(numbers(before + many - 1).await, [before + many]);
        assert_eq!(numbers(before + many).await, [0u64; 0]);
        assert_eq!(numbers(u64::MAX).await, all, "somebody else's number");
    }
}

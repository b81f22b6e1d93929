//! Changes of limits while a VM runs.

use memcg_core::limit_change::Mode;

use super::super::changes::NodeChange;
use super::super::error::Code;
use super::super::{Changed, MemoryChange};
use super::*;

/// A change of `max` by reclaim, with the usual patience.
pub(super) fn change(max: Limit) -> MemoryChange {
    MemoryChange { patch: LimitPatch::max(max), mode: Mode::Reclaim, track: None, wait: None }
}

pub(super) type Answer = tokio::task::JoinHandle<Result<Changed, Refusal>>;

pub(super) fn ask(worker: &FakeWorker, change: MemoryChange) -> Answer {
    let controller = worker.controller.clone();
    tokio::spawn(async move { controller.change("vm", change).await })
}

/// A VM whose guest holds `guest` pages, without a wish.
async fn with_guest(guest: u64) -> FakeWorker {
    let mut worker = FakeWorker::running(Setup::default()).await;
    worker.touch(guest).await;
    assert_eq!(worker.report.guest, guest);
    worker.report.want = 100;
    worker.tell().await;
    worker.report.want = 0;
    while worker.try_next().await.is_some() {}
    worker.book();
    worker
}

/// Semantics: T1.
#[tokio::test(start_paused = true)]
async fn a_limit_above_usage_is_in_force_at_once() {
    let mut worker = with_guest(1000).await;
    let changed = worker.controller.change("vm", change(pages(3000))).await.expect("changed");
    assert!(changed.in_force);
    assert_eq!(changed.view.memory.max_bytes, Some(3000 * 4096));
    // The worker learns of its new room and of the balloon that follows.
    let (mut told, mut aimed) = (false, None);
    while let Some(message) = worker.try_next().await {
        match message {
            ToWorker::Grant { .. } => told = true,
            ToWorker::BalloonTarget { pages } => aimed = Some(u64::from(pages)),
            _ => {}
        }
    }
    assert!(told);
    assert_eq!(worker.grant.2, 3000 - worker.grant.0 + worker.report.returned_total);
    assert_eq!(aimed, Some(SIZE - (3000 - 1024 - RESERVE - super::growth())));
    let event = worker.has_event(EventKind::LimitChanged).await.expect("an event");
    assert_eq!(event.details["max_bytes"], 3000 * 4096);
}

/// Semantics: 60, 118.
#[tokio::test(start_paused = true)]
async fn stock_is_recalled_before_a_limit_is_compared_with_usage() {
    let mut worker = with_guest(1000).await;
    assert!(worker.report.stock > 0);
    let refuse = MemoryChange { mode: Mode::Refuse, ..change(pages(1000 + RESERVE)) };
    let answer = ask(&worker, refuse);
    worker.answer_recall().await;
    let changed = answer.await.expect("no panic").expect("fits without the stock");
    assert!(changed.in_force);
    assert_eq!(changed.view.memory.current_bytes, (1000 + RESERVE) * 4096);
}

/// What a worker asked for before it had the recall is not granted before that is decided: it would count against it.
/// Semantics: 60.
#[tokio::test(start_paused = true)]
async fn nothing_is_granted_ahead_while_stock_is_recalled() {
    let mut worker = with_guest(1000).await;
    let refuse = MemoryChange { mode: Mode::Refuse, ..change(pages(1000 + RESERVE)) };
    let answer = ask(&worker, refuse);
    let seq = worker.hear_recall().await;
    let granted = worker.grant.0;
    worker.report.want = 512;
    worker.tell().await;
    worker.report.want = 0;
    worker.give_stock_back(seq).await;
    assert!(answer.await.expect("no panic").expect("fits without the stock").in_force);
    assert_eq!(worker.grant.0, granted);
}

/// Semantics: 118, B2.
#[tokio::test(start_paused = true)]
async fn refuse_leaves_everything_as_it_was() {
    let mut worker = with_guest(1000).await;
    let answer = ask(&worker, MemoryChange { mode: Mode::Refuse, ..change(pages(1000)) });
    worker.answer_recall().await;
    let refusal = answer.await.expect("no panic").expect_err("refused");
    assert_eq!(refusal.code, Code::LimitBelowUsage);
    assert_eq!(refusal.usage_bytes, Some((1000 + RESERVE) * 4096));
    let view = worker.view().await;
    assert_eq!(view.memory.max_bytes, Some(4096 * 4096));
    assert_eq!(view.memory.max_pending_bytes, None);
}

/// Semantics: 82, 83, T15.
#[tokio::test(start_paused = true)]
async fn force_is_in_force_at_once_and_reports_the_excess() {
    let mut worker = with_guest(1000).await;
    let answer = ask(&worker, MemoryChange { mode: Mode::Force, ..change(pages(1000)) });
    worker.answer_recall().await;
    let changed = answer.await.expect("no panic").expect("forced");
    assert!(changed.in_force);
    assert_eq!(changed.view.memory.max_bytes, Some(1000 * 4096));
    assert_eq!(changed.view.memory.stat.overcharge_bytes, RESERVE * 4096);
    worker.free(RESERVE).await;
    assert_eq!(worker.view().await.memory.stat.overcharge_bytes, 0);
}

/// Semantics: 118, T3.
#[tokio::test(start_paused = true)]
async fn reclaim_commits_when_the_guest_has_given_enough_back() {
    let mut worker = with_guest(1000).await;
    let answer = ask(&worker, change(pages(600)));
    worker.answer_recall().await;
    let view = worker.view().await;
    assert_eq!(view.memory.max_bytes, Some(4096 * 4096), "the old limit until usage fits");
    assert_eq!(view.memory.max_pending_bytes, Some(600 * 4096));
    assert_eq!(view.balloon.target_bytes, SIZE * 4096, "of the limit that is pending: below the margin");
    let ceiling = view.memory.ceiling_bytes.expect("a ceiling");
    assert_eq!(ceiling, (1000 + RESERVE + 256 + 64) * 4096);
    worker.free(300).await;
    let lower = worker.view().await.memory.ceiling_bytes.expect("a ceiling");
    assert_eq!(lower, ceiling - 300 * 4096, "it follows usage down");
    worker.free(250).await;
    let changed = answer.await.expect("no panic").expect("reached");
    assert!(changed.in_force);
    assert_eq!(changed.view.memory.max_bytes, Some(600 * 4096));
    assert_eq!(changed.view.memory.max_pending_bytes, None);
    let kinds: Vec<_> = worker.events().await.iter().map(|event| event.event).collect();
    let last = [EventKind::LimitRequested, EventKind::Reclaim, EventKind::LimitChanged];
    assert!(kinds.ends_with(&last), "{kinds:?}");
}

/// Neither its reserve nor its overhead comes back: a limit below both is refused before anybody is asked for anything.
/// Semantics: 44, 118.
#[tokio::test(start_paused = true)]
async fn what_cannot_be_reached_is_refused_at_once_with_what_can() {
    let mut worker = with_guest(1000).await;
    let group = worker.controller.put_group("/g", change(pages(5000))).await;
    assert!(group.is_ok());
    let refusal = worker.controller.change("vm", change(pages(RESERVE - 1))).await.expect_err("refused");
    assert_eq!((refusal.code, refusal.usage_bytes), (Code::OverheadRefused, Some(worker.grant.0 * 4096)));
    assert!(refusal.message.contains("memory.max=2M is the smallest"), "{}", refusal.message);
    // In a transaction nothing is changed elsewhere either.
    let nodes = vec![NodeChange::group("/g", &change(pages(4000))), NodeChange::vm("vm", &change(pages(RESERVE - 1)))];
    let refusal = worker.controller.change_many(nodes, Mode::Reclaim, None).await.expect_err("refused");
    assert_eq!(refusal.code, Code::OverheadRefused);
    assert_eq!(worker.try_next().await, None, "not even its stock was recalled");
    let view = worker.view().await;
    assert_eq!((view.memory.max_bytes, view.memory.max_pending_bytes), (Some(4096 * 4096), None));
    // The host's budget is the limit of a group.
    let refusal = worker.controller.change_group("/", change(pages(RESERVE - 1))).await.expect_err("refused");
    assert_eq!(refusal.code, Code::OverheadRefused);
    let answer = ask(&worker, change(pages(512)));
    worker.answer_recall().await;
    worker.free(1000 + RESERVE - 512).await;
    assert!(answer.await.expect("no panic").expect("reached").in_force, "2M");
    let force = MemoryChange { mode: Mode::Force, ..change(pages(RESERVE - 1)) };
    assert!(worker.controller.change("vm", force).await.expect("forced").in_force);
}

/// What the smallest limit depends on is what its VMs can give: nothing is said of cold pages where none may be evicted.
/// Semantics: 118.
#[tokio::test(start_paused = true)]
async fn the_smallest_limit_is_named_with_what_it_depends_on() {
    let mut worker = with_guest(1000).await;
    let limits = |max, swap| {
        let patch = LimitPatch { swap_max: Some(swap), ..LimitPatch::default() };
        MemoryChange { patch, ..change(max) }
    };
    let told = async |worker: &mut FakeWorker, end: &str| {
        let refusal = worker.controller.change("vm", change(pages(RESERVE - 1))).await.expect_err("refused");
        assert!(refusal.message.ends_with(end), "{}", refusal.message);
    };
    told(&mut worker, " is the smallest that will do, if its cold pages compress well").await;
    worker.controller.change("vm", limits(pages(4096), pages(0))).await.expect("a limit");
    told(&mut worker, " is the smallest that will do").await;
    worker.report.balloon_ready = true;
    worker.tell().await;
    told(&mut worker, " is the smallest that will do, if its guest gives back the rest").await;
}

/// Semantics: 44, 118, B83.
#[tokio::test(start_paused = true)]
async fn what_is_not_reached_by_the_deadline_leaves_the_old_limit() {
    let mut worker = with_guest(1000).await;
    let answer = ask(&worker, change(pages(600)));
    worker.answer_recall().await;
    let refusal = answer.await.expect("no panic").expect_err("not reached");
    assert_eq!(refusal.code, Code::LimitNotReached);
    assert_eq!(refusal.usage_bytes, Some((1000 + RESERVE) * 4096));
    assert!(refusal.message.contains("still 16M"), "{}", refusal.message);
    let view = worker.view().await;
    assert_eq!(view.memory.max_bytes, Some(4096 * 4096));
    assert_eq!((view.memory.max_pending_bytes, view.memory.ceiling_bytes), (None, None));
    assert!(worker.has_event(EventKind::LimitNotReached).await.is_some());
    // The balloon is let go again.
    assert_eq!(view.balloon.target_bytes, (SIZE - (4096 - 1024 - RESERVE - super::growth())) * 4096);
}

/// The time that a recall takes is a part of the client's, not of the guest's: it is not told that a change goes on which is
/// given up a moment later.
#[tokio::test(start_paused = true)]
async fn a_client_that_waits_as_long_as_the_change_hears_its_end() {
    for wait in [None, Some(super::super::changes::DEADLINE)] {
        let mut worker = with_guest(1000).await;
        let answer = ask(&worker, MemoryChange { wait, ..change(pages(600)) });
        tokio::time::sleep(Duration::from_millis(300)).await;
        worker.answer_recall().await;
        let refusal = answer.await.expect("no panic").expect_err("not reached");
        assert_eq!(refusal.code, Code::LimitNotReached, "{wait:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_waits_shorter_is_told_that_it_goes_on() {
    let mut worker = with_guest(1000).await;
    let answer = ask(&worker, MemoryChange { wait: Some(Duration::from_secs(1)), ..change(pages(600)) });
    worker.answer_recall().await;
    let changed = answer.await.expect("no panic").expect("accepted");
    assert!(!changed.in_force);
    assert_eq!(changed.view.memory.max_pending_bytes, Some(600 * 4096));
    worker.free(600).await;
    assert_eq!(worker.view().await.memory.max_bytes, Some(600 * 4096));
}

#[tokio::test(start_paused = true)]
async fn stock_alone_does_not_keep_a_limit_from_being_reached() {
    let mut worker = with_guest(1000).await;
    let answer = ask(&worker, change(pages(900)));
    worker.answer_recall().await;
    // The guest gives some back and touches some: the stock is charged again.
    worker.report.want = 16;
    worker.free(200).await;
    while worker.try_next().await.is_some() {}
    worker.report.want = 0;
    worker.book();
    assert!(worker.report.stock > 0);
    worker.free(29).await;
    worker.answer_recall().await;
    assert!(answer.await.expect("no panic").expect("reached").in_force);
}

#[tokio::test(start_paused = true)]
async fn a_silent_worker_keeps_its_stock_and_does_not_keep_the_client() {
    let worker = with_guest(1000).await;
    let usage = worker.grant.0;
    let refuse = MemoryChange { mode: Mode::Refuse, ..change(pages(1000 + RESERVE)) };
    let refusal = worker.controller.change("vm", refuse).await.expect_err("the stock counts");
    assert_eq!(refusal.usage_bytes, Some(usage * 4096));
}

/// Semantics: 72.
#[tokio::test(start_paused = true)]
async fn a_later_change_takes_the_place_of_a_pending_one() {
    let mut worker = with_guest(1000).await;
    let first = ask(&worker, change(pages(600)));
    worker.answer_recall().await;
    while worker.has_event(EventKind::LimitRequested).await.is_none() {}
    let second = worker.controller.change("vm", change(pages(2000))).await.expect("in force");
    assert!(second.in_force);
    let refusal = first.await.expect("no panic").expect_err("superseded");
    assert_eq!(refusal.code, Code::Superseded);
    let view = worker.view().await;
    assert_eq!(view.memory.max_bytes, Some(2000 * 4096));
    assert_eq!(view.memory.ceiling_bytes, None);
}

#[tokio::test(start_paused = true)]
async fn the_same_change_twice_is_one_change() {
    let mut worker = with_guest(1000).await;
    let first = ask(&worker, change(pages(600)));
    worker.answer_recall().await;
    while worker.has_event(EventKind::LimitRequested).await.is_none() {}
    let second = ask(&worker, change(pages(600)));
    while worker.try_next().await.is_some() {}
    worker.free(600).await;
    assert!(first.await.expect("no panic").expect("reached").in_force);
    assert!(second.await.expect("no panic").expect("reached").in_force);
}

/// Semantics: 72.
#[tokio::test(start_paused = true)]
async fn an_old_generation_is_refused() {
    let mut worker = with_guest(10).await;
    let generation = worker.view().await.generation;
    let with = |generation, max| MemoryChange {
        patch: LimitPatch { if_generation: Some(generation), ..LimitPatch::max(max) },
        ..change(max)
    };
    let changed = worker.controller.change("vm", with(generation, pages(3000))).await.expect("changed");
    assert!(changed.view.generation > generation);
    let refusal = worker.controller.change("vm", with(generation, pages(3100))).await.expect_err("stale");
    assert_eq!(refusal.code, Code::GenerationMismatch);
    assert_eq!(refusal.generation, Some(changed.view.generation));
    assert_eq!(worker.view().await.memory.max_bytes, Some(3000 * 4096));
}

#[tokio::test(start_paused = true)]
async fn contradictory_limits_are_refused_wholly() {
    let mut worker = with_guest(10).await;
    let patch = LimitPatch { min: Some(pages(3000)), ..LimitPatch::max(pages(2000)) };
    let refusal = worker.controller.change("vm", MemoryChange { patch, ..change(Limit::Max) }).await.expect_err("no");
    assert_eq!(refusal.code, Code::InvalidLimit);
    let view = worker.view().await;
    assert_eq!((view.memory.min_bytes, view.memory.max_bytes), (Some(0), Some(4096 * 4096)));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_vm_ends_its_pending_change() {
    let mut worker = with_guest(1000).await;
    let answer = ask(&worker, change(pages(600)));
    worker.answer_recall().await;
    while worker.has_event(EventKind::LimitRequested).await.is_none() {}
    assert_eq!(worker.exit(ExitReason::PowerOff).await, VmEnd::Guest(ExitReason::PowerOff));
    assert_eq!(answer.await.expect("no panic").expect_err("over").code, Code::WrongState);
}

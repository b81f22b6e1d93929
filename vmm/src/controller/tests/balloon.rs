//! What a guest is told to give, and what is said about one that does not.

use super::*;
use crate::controller::view::BalloonProgress;

/// Targets that are sent until `end` of test time from now, with the second in which each came.
async fn targets(worker: &mut FakeWorker, end: u64) -> Vec<(u64, u32)> {
    let start = tokio::time::Instant::now();
    let end = start + Duration::from_secs(end);
    let mut targets = Vec::new();
    while let Ok(message) = tokio::time::timeout_at(end, worker.inbox.recv()).await {
        if let ToWorker::BalloonTarget { pages } = worker.note(message.expect("the actor lives")) {
            targets.push((start.elapsed().as_secs(), pages));
        }
    }
    targets
}

/// A guest with a driver that has `given` pages in its balloon, and the target that it has been told.
async fn with_driver(given: u64) -> (FakeWorker, u32) {
    let mut worker = FakeWorker::running(Setup::default()).await;
    let view = worker.view().await;
    worker.report.balloon_ready = true;
    worker.report.ballooned = given;
    worker.report.balloon_actual = given as u32;
    worker.tell().await;
    (worker, u32::try_from(view.balloon.target_bytes / 4096).unwrap())
}

/// Semantics: 42, 117.
#[tokio::test(start_paused = true)]
async fn a_guest_that_gives_nothing_is_told_that_it_is_enough_and_asked_again() {
    let (mut worker, target) = with_driver(100).await;
    let told = targets(&mut worker, 29).await;
    let expected = [(2, 100), (4, target), (6, 100), (10, target), (12, 100), (20, target), (22, 100)];
    assert_eq!(told, expected, "no report of the worker was needed for it");
    let view = worker.view().await.balloon;
    assert_eq!((view.told_bytes, view.target_bytes), (100 * 4096, u64::from(target) * 4096));
    assert_eq!(view.progress, Some(BalloonProgress::Stalled));
    let kinds: Vec<_> = worker.events().await.into_iter().map(|event| event.event).collect();
    let count = |kind| kinds.iter().filter(|k| **k == kind).count();
    assert_eq!((count(EventKind::TargetStalled), count(EventKind::Uncooperative)), (1, 1), "{kinds:?}");
    let stalled = worker.has_event(EventKind::TargetStalled).await.unwrap().details;
    assert_eq!(stalled["told_bytes"], 100 * 4096);
    assert_eq!(stalled["missing_bytes"], (u64::from(target) - 100) * 4096);
    assert_eq!(stalled["again_in_ms"], 2000);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_gives_what_is_missing_is_left_in_peace() {
    let (mut worker, target) = with_driver(0).await;
    while worker.report.ballooned < u64::from(target) {
        assert_eq!(targets(&mut worker, 1).await, []);
        worker.report.ballooned = (worker.report.ballooned + 10_000).min(target.into());
        worker.report.balloon_actual = worker.report.ballooned as u32;
        worker.tell().await;
    }
    assert_eq!(targets(&mut worker, 600).await, []);
    assert_eq!(worker.view().await.balloon.progress, Some(BalloonProgress::Cooperating));
    assert!(worker.has_event(EventKind::TargetStalled).await.is_none());
}

/// What it says about its balloon is not what it has given.
/// Semantics: 42, 117.
#[tokio::test(start_paused = true)]
async fn a_guest_that_says_it_has_given_everything_has_stalled() {
    let (mut worker, target) = with_driver(0).await;
    worker.report.balloon_actual = target;
    worker.tell().await;
    targets(&mut worker, 3).await;
    assert!(worker.has_event(EventKind::TargetStalled).await.is_some());
    assert_eq!(worker.view().await.balloon.progress, Some(BalloonProgress::Stalled));
}

/// A guest that stands still gives nothing, and it is not its fault.
#[tokio::test(start_paused = true)]
async fn time_in_which_a_guest_is_held_is_not_its_own() {
    let (mut worker, _) = with_driver(0).await;
    targets(&mut worker, 1).await;
    worker.report.held = true;
    worker.tell().await;
    assert_eq!(targets(&mut worker, 4).await, []);
    worker.report.held = false;
    worker.tell().await;
    let told = targets(&mut worker, 3).await;
    assert_eq!(told.first(), Some(&(1, 0)), "two seconds of its own");
}

#[tokio::test(start_paused = true)]
async fn a_guest_without_a_driver_is_not_asked() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    assert_eq!(targets(&mut worker, 60).await, []);
    assert_eq!(worker.view().await.balloon.progress, None);
    assert!(worker.has_event(EventKind::TargetStalled).await.is_none());
}

/// The guest's valve: what it takes is said, at most once a second, and it is left alone for a while.
#[tokio::test(start_paused = true)]
async fn a_guest_that_takes_pages_back_when_it_is_out_of_memory_is_an_event() {
    let (mut worker, target) = with_driver(10_000).await;
    for step in 1..=10 {
        worker.report.ballooned -= 256;
        worker.report.balloon_actual -= 256;
        worker.report.oom_deflated = 256 * step;
        worker.tell().await;
    }
    let told = targets(&mut worker, 70).await;
    assert_eq!(told[0], (0, 10_000 - 256));
    assert!(told.iter().any(|(at, pages)| *at >= 64 && *pages == target), "asked again: {told:?}");
    assert!(told.iter().all(|(at, pages)| *at >= 64 || *pages <= 10_000 - 256), "too early: {told:?}");
    let events = worker.events().await;
    let taken: Vec<_> = events.iter().filter(|event| event.event == EventKind::GuestDeflatedOnOom).collect();
    let bytes: Vec<_> = taken.iter().map(|event| event.details["taken_bytes"].as_u64().unwrap()).collect();
    assert_eq!(bytes, [256 * 4096, 9 * 256 * 4096]);
    assert_eq!(taken[1].details["taken_total_bytes"], 10 * 256 * 4096);
}

/// What a guest gets wrong is told once, and again when it is twice as much: no flood of events for a flood of errors.
#[tokio::test(start_paused = true)]
async fn a_guest_that_is_refused_things_is_an_event_each_time_that_they_have_doubled() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    for errors in 0..100 {
        worker.report.faults.guest_errors = errors;
        worker.tell().await;
    }
    let events = worker.events().await;
    let told = events.iter().filter(|event| event.event == EventKind::GuestMisbehaves);
    let totals: Vec<_> = told.map(|event| event.details["guest_errors_total"].as_u64().unwrap()).collect();
    assert_eq!(totals, [1, 2, 4, 8, 16, 32, 64]);
}

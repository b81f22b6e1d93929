//! Requests, and the life of a VM.

use memcg_core::limit_change::Mode;

use super::super::error::Code;
use super::super::view::VmState;
use super::super::{KilledBy, MemoryChange};
use super::*;

#[tokio::test(start_paused = true)]
async fn a_vm_goes_from_starting_to_running_to_ended() {
    let mut worker = FakeWorker::add(Setup::default()).await;
    assert_eq!(worker.controller.show("vm").await.expect("shown").state, VmState::Starting);
    assert_eq!(worker.controller.pause("vm").await.expect_err("too early").code, Code::WrongState);
    worker.hello().await;
    worker.say(FromWorker::Loaded { plan: 7 }).await;
    assert_eq!(worker.next().await, ToWorker::Start);
    let controller = worker.controller.clone();
    assert_eq!(controller.list().await.expect("listed")[0].state, VmState::Running);
    assert_eq!(worker.exit(ExitReason::Status(3)).await, VmEnd::Guest(ExitReason::Status(3)));
    let view = controller.show("vm").await.expect("still known");
    assert_eq!(view.state, VmState::Ended);
    assert_eq!(controller.pause("vm").await.expect_err("over").code, Code::WrongState);
    assert!(controller.kill("vm").await.is_ok(), "idempotent");
    let kinds: Vec<_> = controller.events(0).await.expect("events").iter().map(|event| event.event).collect();
    assert_eq!(kinds, [EventKind::Created, EventKind::Started, EventKind::Stopped]);
}

#[tokio::test(start_paused = true)]
async fn last_words_are_heard_whether_the_process_or_the_socket_ends_first() {
    for process_first in [true, false] {
        let worker = FakeWorker::running(Setup::default()).await;
        let (controller, id) = (worker.controller.clone(), worker.id);
        if process_first {
            controller.worker_died(id, Death::Exited(0)).await;
            worker.say(FromWorker::Exited(ExitReason::Reset)).await;
            controller.heard(id, FromLink::Closed).await;
        } else {
            worker.say(FromWorker::Exited(ExitReason::Reset)).await;
            controller.heard(id, FromLink::Closed).await;
            controller.worker_died(id, Death::Exited(0)).await;
        }
        assert_eq!(worker.end.await.expect("told"), VmEnd::Guest(ExitReason::Reset));
    }
}

#[tokio::test(start_paused = true)]
async fn a_socket_that_stays_open_does_not_keep_a_dead_vm() {
    let worker = FakeWorker::running(Setup::default()).await;
    worker.controller.worker_died(worker.id, Death::Signal(9)).await;
    let end = tokio::time::timeout(Duration::from_secs(15), worker.end).await.expect("bounded").expect("told");
    assert_eq!(end, VmEnd::Died { message: "was killed by the host (signal 9)".to_owned() });
}

/// Semantics: 2, 20, 90.
#[tokio::test(start_paused = true)]
async fn charges_of_a_dead_vm_return_and_its_name_is_free_at_once() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    worker.touch(500).await;
    let controller = worker.controller.clone();
    worker.die(Death::Signal(11)).await;
    assert!(controller.host().await.expect("shown").current_bytes > 0, "not before the host has the memory");
    let other = FakeWorker::add_to(&controller, "vm", Setup::default()).await.expect("the name is free");
    assert_eq!(controller.show("vm").await.expect("shown").state, VmState::Starting);
    tokio::time::timeout(Duration::from_secs(30), async {
        while controller.host().await.expect("shown").current_bytes > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("charges return");
    drop(other);
}

#[tokio::test(start_paused = true)]
async fn a_name_is_taken_while_its_vm_runs() {
    let worker = FakeWorker::running(Setup::default()).await;
    let Err(refusal) = FakeWorker::add_to(&worker.controller, "vm", Setup::default()).await else { panic!("added") };
    assert_eq!(refusal.code, Code::AlreadyExists);
    let Err(refusal) = FakeWorker::add_to(&worker.controller, "../vm", Setup::default()).await else { panic!("added") };
    assert_eq!(refusal.code, Code::BadRequest);
}

#[tokio::test(start_paused = true)]
async fn pause_and_resume_are_answered_by_the_worker_and_idempotent() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    let controller = worker.controller.clone();
    let pausing = tokio::spawn(async move { controller.pause("vm").await });
    let ToWorker::Pause { seq } = worker.next().await else { panic!("no pause") };
    assert!(matches!(worker.next().await, ToWorker::Grant { stock_max: 0, .. }));
    worker.report.paused = true;
    worker.answer(seq).await;
    assert_eq!(pausing.await.expect("no panic").expect("paused").state, VmState::Paused);
    assert!(worker.controller.pause("vm").await.is_ok());
    assert_eq!(worker.try_next().await, None);

    let controller = worker.controller.clone();
    let resuming = tokio::spawn(async move { controller.resume("vm").await });
    let ToWorker::Resume { seq } = worker.next().await else { panic!("no resume") };
    assert!(matches!(worker.next().await, ToWorker::Grant { stock_max: 1.., .. }));
    worker.report.paused = false;
    worker.answer(seq).await;
    assert_eq!(resuming.await.expect("no panic").expect("resumed").state, VmState::Running);
    assert!(worker.controller.resume("vm").await.is_ok());
    assert_eq!(worker.try_next().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_pause_is_answered_when_the_vcpus_are_out_or_when_it_is_taken_back() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    let start = |worker: &FakeWorker| {
        let controller = worker.controller.clone();
        tokio::spawn(async move { controller.pause("vm").await })
    };
    let first = start(&worker);
    let ToWorker::Pause { seq } = worker.next().await else { panic!("no pause") };
    assert!(matches!(worker.next().await, ToWorker::Grant { stock_max: 0, .. }));
    // The second one is not told that the VM stands still before it does.
    let second = start(&worker);
    assert_eq!(worker.try_next().await, None);
    assert!(!second.is_finished());
    worker.report.paused = true;
    worker.answer(seq).await;
    for pausing in [first, second] {
        assert_eq!(pausing.await.expect("no panic").expect("paused").state, VmState::Paused);
    }

    let controller = worker.controller.clone();
    tokio::spawn(async move { controller.resume("vm").await });
    let ToWorker::Resume { seq } = worker.next().await else { panic!("no resume") };
    assert!(matches!(worker.next().await, ToWorker::Grant { stock_max: 1.., .. }));
    worker.report.paused = false;
    worker.answer(seq).await;
    let taken_back = start(&worker);
    assert!(matches!(worker.next().await, ToWorker::Pause { .. }));
    let controller = worker.controller.clone();
    tokio::spawn(async move { controller.resume("vm").await });
    // No answer of the worker is needed, and it would give none.
    assert_eq!(taken_back.await.expect("no panic").expect_err("taken back").code, Code::Superseded);
}

#[tokio::test(start_paused = true)]
async fn a_second_pause_does_not_say_yes_for_a_silent_worker() {
    let worker = FakeWorker::running(Setup::default()).await;
    for _ in 0..2 {
        assert_eq!(worker.controller.pause("vm").await.expect_err("silent").code, Code::Busy);
    }
}

#[tokio::test(start_paused = true)]
async fn kill_is_answered_when_the_worker_is_gone() {
    let worker = FakeWorker::running(Setup::default()).await;
    let controller = worker.controller.clone();
    let killing = tokio::spawn(async move { controller.kill("vm").await });
    while !worker.killed() {
        tokio::task::yield_now().await;
    }
    assert!(!killing.is_finished());
    assert_eq!(worker.die(Death::Signal(9)).await, VmEnd::Killed(KilledBy::Request));
    assert_eq!(killing.await.expect("no panic").expect("killed").state, VmState::Ended);
}

#[tokio::test(start_paused = true)]
async fn a_silent_worker_gives_old_numbers_and_busy_and_can_be_killed() {
    let mut worker = FakeWorker::running(Setup { queue: 4, ..Setup::default() }).await;
    worker.touch(10).await;
    let view = worker.controller.show("vm").await.expect("shown");
    assert!(view.stale);
    assert_eq!(view.memory.stat.guest_bytes, 10 * 4096);
    assert_eq!(worker.controller.pause("vm").await.expect_err("silent").code, Code::Busy);
    // Its queue is full by now at the latest; nobody waits for it.
    for _ in 0..10 {
        assert!(worker.controller.show("vm").await.expect("shown").stale);
    }
    let controller = worker.controller.clone();
    let killing = tokio::spawn(async move { controller.kill("vm").await });
    worker.die(Death::Signal(9)).await;
    assert!(killing.await.expect("no panic").is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_did_not_fit_the_queue_is_sent_later() {
    let mut worker = FakeWorker::running(Setup { queue: 1, ..Setup::default() }).await;
    worker.book();
    let before = worker.report.granted_total;
    // Fills the queue.
    worker.controller.show("vm").await.expect("shown");
    worker.report.want = 500;
    worker.report.want_now = 500;
    worker.tell().await;
    worker.controller.host().await.expect("alive");
    assert!(matches!(worker.next().await, ToWorker::Query { .. }));
    worker.tell().await;
    worker.next().await;
    assert!(worker.grant.0 >= before + 500, "{:?} after {before}", worker.grant);
}

/// A worker that reads need not have anything to report: its reading must be enough to send it what did not fit.
#[tokio::test(start_paused = true)]
async fn what_did_not_fit_the_queue_is_sent_as_soon_as_there_is_room() {
    let mut worker = FakeWorker::running(Setup { queue: 1, ..Setup::default() }).await;
    worker.touch(5000).await;
    assert!(worker.grant.3, "more is wanted than fits");
    let (before, missing) = (worker.grant.0, worker.report.want_now);
    // Fills the queue.
    assert!(worker.controller.show("vm").await.expect("shown").stale);
    let max = MemoryChange { patch: LimitPatch::max(pages(8192)), mode: Mode::Reclaim, track: None, wait: None };
    assert!(worker.controller.change("vm", max).await.expect("changed").in_force);
    assert!(matches!(worker.next().await, ToWorker::Query { .. }));
    assert!(matches!(worker.next().await, ToWorker::Grant { refused: false, .. }));
    assert!(worker.grant.0 >= before + missing, "{:?} after {before}", worker.grant);
    assert!(matches!(worker.next().await, ToWorker::BalloonTarget { .. }));
}

/// A worker that was slow to read while it loaded is started when it reads.
#[tokio::test(start_paused = true)]
async fn a_worker_whose_queue_is_full_when_it_has_loaded_is_started_when_there_is_room() {
    let mut worker = FakeWorker::add(Setup { queue: 1, ..Setup::default() }).await;
    // The first grant fills the queue.
    worker.say(FromWorker::Hello(hello(true))).await;
    worker.say(FromWorker::Loaded { plan: 0 }).await;
    worker.controller.host().await.expect("alive");
    assert!(!worker.killed());
    assert!(matches!(worker.next().await, ToWorker::Grant { .. }));
    let next = [worker.next().await, worker.next().await];
    assert!(next.contains(&ToWorker::Start), "{next:?}");
}

/// Many requests at once leave the tasks that write to a worker their turn.
#[tokio::test(start_paused = true)]
async fn a_burst_of_requests_is_not_taken_for_a_worker_that_does_not_read() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    let controller = worker.controller.clone();
    tokio::spawn(async move {
        while let Some(message) = worker.inbox.recv().await {
            if let ToWorker::Query { seq } = worker.note(message) {
                worker.answer(seq).await;
            }
        }
    });
    let ask = |_| {
        let controller = controller.clone();
        tokio::spawn(async move { controller.show("vm").await })
    };
    let burst: Vec<_> = (0..200).map(ask).collect();
    for (number, shown) in burst.into_iter().enumerate() {
        let view = shown.await.expect("no panic").expect("shown");
        assert!(!view.stale, "request {number} got old numbers");
    }
}

#[tokio::test(start_paused = true)]
async fn garbage_ends_the_worker_and_never_the_controller() {
    let worker = FakeWorker::running(Setup::default()).await;
    worker.controller.heard(worker.id, FromLink::Garbage("malformed message".to_owned())).await;
    worker.controller.host().await.expect("alive");
    assert!(worker.killed());
    let VmEnd::Died { message } = worker.die(Death::Signal(9)).await else { panic!("another end") };
    assert_eq!(message, "sent garbage (malformed message)");
}

#[tokio::test(start_paused = true)]
async fn unknown_names_are_not_found() {
    let (controller, _) = Controller::start(Limit::Max);
    assert_eq!(controller.show("nobody").await.expect_err("unknown").code, Code::NotFound);
    assert_eq!(controller.kill("nobody").await.expect_err("unknown").code, Code::NotFound);
    assert!(controller.list().await.expect("listed").is_empty());
}

/// Semantics: 101.
#[tokio::test(start_paused = true)]
async fn the_budget_of_all_vms_is_kept() {
    let (controller, _) = Controller::start(pages(1000));
    let mut workers = Vec::new();
    for name in ["a", "b"] {
        let setup = Setup { max: Limit::Max, ..Setup::default() };
        let mut worker = FakeWorker::add_to(&controller, name, setup).await.expect("added");
        worker.hello().await;
        workers.push(worker);
    }
    for worker in &mut workers {
        worker.report.want = 5000;
        worker.report.want_now = 5000;
        worker.tell().await;
    }
    let host = controller.host().await.expect("shown");
    assert!(host.current_bytes <= 1000 * 4096);
    assert_eq!(host.budget_bytes, Some(1000 * 4096));
}

/// Whoever looks at all VMs has those asked that were silent for a second: once until they answer, and nobody when nobody looks.
#[tokio::test(start_paused = true)]
async fn who_was_silent_is_asked_when_somebody_looks() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    let controller = worker.controller.clone();
    controller.ask_idle().await;
    assert_eq!(worker.try_next().await, None, "it has just said something");
    for _ in 0..2 {
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(worker.try_next().await, None, "nobody has looked");
        controller.ask_idle().await;
        let Some(ToWorker::Query { seq }) = worker.try_next().await else { panic!("not asked") };
        tokio::time::advance(Duration::from_secs(9)).await;
        controller.ask_idle().await;
        assert_eq!(worker.try_next().await, None, "it has not answered");
        worker.answer(seq).await;
        controller.ask_idle().await;
        assert_eq!(worker.try_next().await, None, "it has answered");
    }
}

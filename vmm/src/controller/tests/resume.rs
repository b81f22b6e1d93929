//! Paused VMs that go on when there is memory for them, and who waits for that.

use std::sync::Mutex;

use memcg_core::host::Reading;
use tokio::task::JoinHandle;

use super::super::error::Code;
use super::super::view::{OomPreference, PausedBy, VmState};
use super::grants::held;
use super::ladders::holding;
use super::shortage::{left, watched};
use super::*;

/// A VM whose policy has paused it because it is at its limit.
async fn paused_at_its_limit() -> FakeWorker {
    let mut worker = held(Setup::default()).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    while worker.try_next().await.is_some() {}
    worker
}

fn resuming(worker: &FakeWorker, wait: u64) -> JoinHandle<Result<VmView, Refusal>> {
    let controller = worker.controller.clone();
    tokio::spawn(async move { controller.resume_within("vm", Duration::from_secs(wait)).await })
}

/// Answers the resume that must be among the next messages.
async fn go_on(worker: &mut FakeWorker) {
    loop {
        if let ToWorker::Resume { seq } = worker.next().await {
            worker.report.paused = false;
            return worker.answer(seq).await;
        }
    }
}

async fn state(controller: &Controller) -> VmState {
    controller.show("vm").await.expect("shown").state
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_vm_at_its_limit_is_answered_when_the_limit_is_raised() {
    let mut worker = paused_at_its_limit().await;
    let need = worker.controller.list().await.expect("listed")[0].resume_bytes.expect("it waits for memory");
    assert!(need > 0);
    let waiting = resuming(&worker, 60);
    assert_eq!(worker.try_next().await, None);
    worker.controller.change("vm", limits::change(pages(8192))).await.expect("raised");
    go_on(&mut worker).await;
    let view = waiting.await.expect("no panic").expect("it goes on");
    assert_eq!((view.state, view.resume_bytes), (VmState::Running, None));
    assert_eq!(worker.has_event(EventKind::ResumeRefused).await, None);
}

#[tokio::test(start_paused = true)]
async fn who_has_waited_long_enough_hears_what_is_missing() {
    let mut worker = paused_at_its_limit().await;
    let begin = tokio::time::Instant::now();
    let refusal = resuming(&worker, 60).await.expect("no panic").expect_err("nothing has changed");
    assert_eq!(begin.elapsed().as_secs(), 60);
    let missing = worker.controller.list().await.expect("listed")[0].resume_bytes;
    assert_eq!((refusal.code, refusal.missing_bytes), (Code::ResumeRefused, missing));
    let told = worker.has_event(EventKind::ResumeRefused).await.expect("told");
    assert_eq!(told.details["missing_bytes"].as_u64(), missing);
    // Nobody waits any more: what comes later is its policy's.
    worker.controller.change("vm", limits::change(pages(8192))).await.expect("raised");
    go_on(&mut worker).await;
    assert_eq!(worker.has_event(EventKind::Resumed).await.expect("told").details["by"], "policy");
}

#[tokio::test(start_paused = true)]
async fn a_pause_ends_the_wait_and_so_does_the_end_of_the_vm() {
    let worker = paused_at_its_limit().await;
    let waiting = resuming(&worker, 60);
    tokio::time::sleep(Duration::from_secs(1)).await;
    // The worker that the test plays does not answer it; that it was heard is enough.
    let _ = worker.controller.pause("vm").await;
    assert_eq!(waiting.await.expect("no panic").expect_err("paused").code, Code::Superseded);
    let waiting = resuming(&worker, 60);
    tokio::time::sleep(Duration::from_secs(1)).await;
    worker.die(Death::Signal(9)).await;
    assert_eq!(waiting.await.expect("no panic").expect_err("ended").code, Code::WrongState);
}

/// A VM at its limit that a user pauses, too, is kept when there is room again, and goes on when it is asked to.
#[tokio::test(start_paused = true)]
async fn a_vm_that_is_paused_twice_over_goes_on_only_when_it_is_asked_to() {
    let mut worker = paused_at_its_limit().await;
    let _ = worker.controller.pause("vm").await;
    let view = worker.controller.list().await.expect("listed").remove(0);
    assert_eq!((view.paused_by, view.kept_paused), (Some(PausedBy::Policy), true));
    worker.controller.change("vm", limits::change(pages(8192))).await.expect("raised");
    while let Some(message) = worker.try_next().await {
        assert!(!matches!(message, ToWorker::Resume { .. }), "somebody wants it paused");
    }
    assert_eq!(state(&worker.controller).await, VmState::Paused);
    let asked = resuming(&worker, 0);
    go_on(&mut worker).await;
    let view = asked.await.expect("no panic").expect("it goes on");
    assert_eq!((view.state, view.kept_paused), (VmState::Running, false));
}

/// A VM that has been emptied for the host, and has nothing of what it had before.
async fn emptied() -> (FakeWorker, Arc<Mutex<Option<Reading>>>) {
    let (controller, _) = Controller::start(Limit::Max);
    let oom = OomPolicy { action: OomAction::Pause, preference: OomPreference::None, ..OomPolicy::default() };
    let setup = Setup { max: Limit::Max, evicts: true, oom, ..Setup::default() };
    let mut worker = holding(&controller, "vm", setup, 3000).await;
    let host = watched(&controller).await;
    *host.lock().expect("alive") = left(300);
    worker.obey_for(8000).await;
    assert_eq!(state(&controller).await, VmState::Paused);
    worker.evict_and_return(2900).await;
    (worker, host)
}

/// A user's pause of such a VM is no way around the room that it needs: it stays emptied, it stays paused when there is room
/// again, and a resume before that is refused.
#[tokio::test(start_paused = true)]
async fn a_user_that_pauses_an_emptied_vm_does_not_get_it_back_without_room() {
    let (mut worker, host) = emptied().await;
    let controller = worker.controller.clone();
    let _ = controller.pause("vm").await;
    worker.obey_for(1000).await;
    let view = controller.show("vm").await.expect("shown");
    assert_eq!((view.paused_by, view.kept_paused), (Some(PausedBy::Host), true));
    assert_eq!(view.resume_bytes, Some((2900 - 2900 / 4) * 4096));
    *host.lock().expect("alive") = left(9000);
    worker.obey_for(40_000).await;
    assert_eq!(state(&controller).await, VmState::Paused, "somebody wants it so");
    *host.lock().expect("alive") = left(2000);
    worker.obey_for(12_000).await;
    let refused = controller.resume("vm").await.expect_err("no room");
    assert!(refused.code == Code::ResumeRefused && refused.missing_bytes.is_some_and(|bytes| bytes > 0), "{refused:?}");
    // That has taken the user's pause back.
    assert!(!controller.show("vm").await.expect("shown").kept_paused);
    *host.lock().expect("alive") = left(9000);
    worker.obey_for(12_000).await;
    assert_eq!(state(&controller).await, VmState::Running);
}

/// Who waits for an emptied VM has it as soon as the host is not short and has room for it.
#[tokio::test(start_paused = true)]
async fn who_waits_for_an_emptied_vm_has_it_when_the_host_has_room() {
    let (mut worker, host) = emptied().await;
    let waiting = resuming(&worker, 600);
    worker.obey_for(5000).await;
    assert!(!waiting.is_finished());
    *host.lock().expect("alive") = left(9000);
    go_on(&mut worker).await;
    assert_eq!(waiting.await.expect("no panic").expect("it goes on").state, VmState::Running);
}

/// That the host has no memory for a page of a VM is told, and the VM is paused and emptied. It goes on when it is asked to, as
/// no host is watched here that might be short.
#[tokio::test(start_paused = true)]
async fn a_vm_for_which_the_host_has_no_memory_is_paused_and_goes_on_when_it_is_asked_to() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut worker =
        holding(&controller, "vm", Setup { max: Limit::Max, evicts: true, ..Setup::default() }, 1000).await;
    worker.report.held = true;
    worker.report.faults.unfilled = 1;
    worker.tell().await;
    worker.obey_for(1000).await;
    let told = worker.has_event(EventKind::HostOutOfMemory).await.expect("told");
    assert_eq!((told.vm.as_deref(), &told.details["times"]), (Some("vm"), &serde_json::json!(1)));
    let view = controller.show("vm").await.expect("shown");
    assert_eq!((view.state, view.paused_by), (VmState::Paused, Some(PausedBy::Host)));
    assert!(worker.aim < 1000, "it is emptied: {}", worker.aim);
    let asked = resuming(&worker, 0);
    worker.report.held = false;
    // It met this before it heard that it was paused at all.
    worker.report.faults.unfilled = 4;
    go_on(&mut worker).await;
    assert_eq!(asked.await.expect("no panic").expect("it goes on").state, VmState::Running);
    let told = async |worker: &FakeWorker| {
        let events = worker.events().await;
        events.iter().filter(|event| event.event == EventKind::HostOutOfMemory).count()
    };
    assert_eq!(told(&worker).await, 1);
    worker.report.faults.unfilled = 5;
    worker.tell().await;
    assert_eq!(told(&worker).await, 2, "there is none now either");
}

/// A guest that was emptied hears nothing of a stop: it goes on as soon as there is room, to hear of it, or is killed, and that is
/// said.
#[tokio::test(start_paused = true)]
async fn a_stop_of_an_emptied_vm_lets_it_go_on_or_says_that_it_heard_nothing() {
    for has_room in [true, false] {
        let (mut worker, host) = emptied().await;
        let controller = worker.controller.clone();
        let stopping = tokio::spawn(async move { controller.stop("vm", Duration::from_secs(60)).await });
        worker.obey_for(5000).await;
        assert!(!stopping.is_finished() && !worker.killed());
        if has_room {
            *host.lock().expect("alive") = left(9000);
            worker.obey_for(20_000).await;
            assert_eq!(state(&worker.controller).await, VmState::Running);
            worker.exit(ExitReason::PowerOff).await;
        } else {
            worker.obey_for(56_000).await;
            assert!(worker.killed());
            assert_eq!(worker.has_event(EventKind::ResumeRefused).await, None, "nobody has asked for that");
            worker.die(Death::Signal(9)).await;
        }
        let stopped = stopping.await.expect("no panic").expect("stopped");
        assert_eq!((stopped.killed, stopped.unheard), (!has_room, !has_room));
    }
}

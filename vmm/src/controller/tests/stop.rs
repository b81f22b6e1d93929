//! Guests that are asked to end, those that do not, and what is remembered of ended VMs.

use super::super::error::Code;
use super::super::lifecycle::MOST_ENDED;
use super::super::stop::StopView;
use super::super::view::VmState;
use super::super::vm::KilledBy;
use super::*;

/// Asks for a stop, and waits until the worker has heard of it.
async fn stop(worker: &mut FakeWorker, seconds: u64) -> tokio::task::JoinHandle<Result<StopView, Refusal>> {
    let controller = worker.controller.clone();
    let stopping = tokio::spawn(async move { controller.stop("vm", Duration::from_secs(seconds)).await });
    while worker.next().await != ToWorker::PowerButton {}
    stopping
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_powers_itself_off_is_not_killed() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    let controller = worker.controller.clone();
    let stopping = stop(&mut worker, 10).await;
    tokio::time::sleep(Duration::from_secs(9)).await;
    assert!(!worker.killed() && !stopping.is_finished());
    assert_eq!(worker.exit(ExitReason::PowerOff).await, VmEnd::Guest(ExitReason::PowerOff));
    let stopped = stopping.await.expect("no panic").expect("stopped");
    assert!(!stopped.killed);
    assert_eq!(stopped.vm.end.as_deref(), Some("the guest powered itself off"));
    let again = controller.stop("vm", Duration::ZERO).await.expect("it has ended already");
    assert_eq!((again.killed, again.vm.state), (false, VmState::Ended));
    assert_eq!(controller.stop("none", Duration::ZERO).await.expect_err("unknown").code, Code::NotFound);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_is_killed_when_the_time_is_over() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    let stopping = stop(&mut worker, 10).await;
    tokio::time::sleep(Duration::from_millis(9_990)).await;
    assert!(!worker.killed());
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(worker.killed());
    assert_eq!(worker.has_event(EventKind::Killed).await, None, "not before it is gone");
    let controller = worker.controller.clone();
    assert_eq!(worker.die(Death::Signal(9)).await, VmEnd::Killed(KilledBy::Stop));
    let stopped = stopping.await.expect("no panic").expect("stopped");
    assert!(stopped.killed);
    assert_eq!(stopped.vm.end.as_deref(), Some("it was killed: it did not power itself off in time"));
    let events = controller.events(0).await.expect("events");
    let killed = events.iter().find(|event| event.event == EventKind::Killed).expect("an event");
    assert_eq!(killed.details["by"], "stop");
}

/// Two wait for one end; the button is pressed once, and whoever has the least patience decides.
#[tokio::test(start_paused = true)]
async fn the_shortest_patience_counts() {
    for (first, second) in [(60, 5), (5, 60)] {
        let mut worker = FakeWorker::running(Setup::default()).await;
        let one = stop(&mut worker, first).await;
        let controller = worker.controller.clone();
        let other = tokio::spawn(async move { controller.stop("vm", Duration::from_secs(second)).await });
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert!(!worker.killed());
        assert_eq!(worker.try_next().await, None, "one press is enough");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(worker.killed(), "{first} {second}");
        worker.die(Death::Signal(9)).await;
        for stopping in [one, other] {
            assert!(stopping.await.expect("no panic").expect("stopped").killed);
        }
    }
}

/// A guest that stands still would hear nothing.
#[tokio::test(start_paused = true)]
async fn a_vm_that_a_user_has_paused_goes_on_to_end() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    let controller = worker.controller.clone();
    let pausing = tokio::spawn(async move { controller.pause("vm").await });
    let seq = loop {
        if let ToWorker::Pause { seq } = worker.next().await {
            break seq;
        }
    };
    worker.report.paused = true;
    worker.answer(seq).await;
    assert_eq!(pausing.await.expect("no panic").expect("paused").state, VmState::Paused);
    let stopping = stop(&mut worker, 10).await;
    assert!(matches!(worker.next().await, ToWorker::Resume { .. }));
    worker.exit(ExitReason::PowerOff).await;
    assert!(!stopping.await.expect("no panic").expect("stopped").killed);
}

#[tokio::test(start_paused = true)]
async fn what_a_vm_was_made_with_is_known_after_its_end() {
    let (controller, _) = Controller::start(Limit::Max);
    let text = r#"{"kernel": "/k", "memory": {"size_bytes": 268435456}}"#;
    let config: Arc<VmConfig> = Arc::new(serde_json::from_str(text).expect("understood"));
    let setup = Setup { config: Some(Arc::clone(&config)), ..Setup::default() };
    let worker = FakeWorker::add_to(&controller, "web", setup).await.expect("added");
    assert_eq!(controller.config("web").await.expect("it runs"), config);
    worker.die(Death::Signal(9)).await;
    assert_eq!(controller.config("web").await.expect("it has ended"), config);
    while controller.host().await.expect("shown").current_bytes > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(controller.config("web").await.expect("its memory is back"), config);
    assert_eq!(controller.config("none").await.expect_err("unknown").code, Code::NotFound);
    let by_hand = FakeWorker::add_to(&controller, "vm", Setup::default()).await.expect("added");
    assert_eq!(controller.config("vm").await.expect_err("as in run").code, Code::WrongState);
    drop(by_hand);
}

#[tokio::test(start_paused = true)]
async fn the_newest_of_the_ended_are_remembered() {
    let (controller, _) = Controller::start(Limit::Max);
    for number in 0..MOST_ENDED + 2 {
        // The names are in another order than the VMs.
        let name = format!("vm-{}", (number * 7) % (MOST_ENDED + 2));
        let setup = Setup { accounting: false, max: Limit::Max, ..Setup::default() };
        let worker = FakeWorker::add_to(&controller, &name, setup).await.expect("added");
        worker.die(Death::Signal(9)).await;
        // Until its memory is back.
        tokio::time::sleep(Duration::from_secs(2)).await;
    }
    let names: std::collections::BTreeSet<_> =
        controller.list().await.expect("listed").into_iter().map(|vm| vm.name).collect();
    assert_eq!(names.len(), MOST_ENDED);
    assert!(!names.contains("vm-0") && !names.contains("vm-7") && names.contains("vm-14"));
}

//! Many VMs under one controller: the same request twice, VMs that are forgotten, and what is kept of those that ended.

use super::super::error::Code;
use super::super::view::VmState;
use super::*;

/// A description that runs nothing here; only whether two are the same matters.
fn config(cpus: u32) -> Arc<VmConfig> {
    let text = format!(r#"{{"kernel": "/k", "cpus": {cpus}, "memory": {{"size_bytes": 268435456}}}}"#);
    Arc::new(serde_json::from_str(&text).expect("understood"))
}

async fn add(controller: &Controller, name: &str) -> FakeWorker {
    let setup = Setup { config: Some(config(1)), ..Setup::default() };
    FakeWorker::add_to(controller, name, setup).await.expect("added")
}

/// Waits until all charges are back.
async fn drained(controller: &Controller) {
    while controller.host().await.expect("shown").current_bytes > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_vm_is_the_same_when_it_runs_and_was_asked_for_with_the_same_words() {
    let (controller, _) = Controller::start(Limit::Max);
    assert_eq!(controller.same("web", config(1)).await.expect("none"), None);
    let worker = add(&controller, "web").await;
    assert_eq!(controller.same("web", config(1)).await.expect("the same"), Some(worker.id));
    assert_eq!(controller.same("web", config(2)).await.expect_err("another").code, Code::AlreadyExists);
    worker.die(Death::Signal(9)).await;
    assert_eq!(controller.same("web", config(2)).await.expect("it has ended"), None);
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_a_start_learns_that_it_runs_or_why_not() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut good = add(&controller, "good").await;
    let starting = tokio::spawn({
        let (controller, id) = (controller.clone(), good.id);
        async move { controller.started(id).await }
    });
    good.hello().await;
    assert!(!starting.is_finished());
    good.say(FromWorker::Loaded { plan: 0 }).await;
    assert_eq!(starting.await.expect("no panic").expect("started").state, VmState::Running);
    assert_eq!(controller.started(good.id).await.expect("runs").name, "good");

    let bad = add(&controller, "bad").await;
    let id = bad.id;
    let starting = tokio::spawn({
        let controller = controller.clone();
        async move { controller.started(id).await }
    });
    tokio::task::yield_now().await;
    bad.say(FromWorker::Failed { message: "no kernel".to_owned(), smallest_max: None }).await;
    bad.die(Death::Exited(1)).await;
    let refusal = starting.await.expect("no panic").expect_err("it did not start");
    assert_eq!(
        (refusal.code, refusal.message.as_str()),
        (Code::StartFailed, "the VM \"bad\" did not start: no kernel")
    );
    assert_eq!(controller.started(id).await.expect_err("later").code, Code::StartFailed);
}

/// A VM that has ended is shown until it is removed or replaced, also when its memory is back and its node is gone.
#[tokio::test(start_paused = true)]
async fn an_ended_vm_stays_visible_until_it_is_removed_or_replaced() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut worker = add(&controller, "web").await;
    worker.hello().await;
    worker.die(Death::Signal(9)).await;
    for _ in 0..2 {
        let view = controller.show("web").await.expect("shown");
        assert_eq!(view.end.as_deref(), Some("the worker was killed by the host (signal 9)"));
        assert_eq!(controller.list().await.expect("listed").len(), 1);
        assert_eq!(controller.console("web").await.expect("kept"), "");
        assert_eq!(controller.kill("web").await.expect("idempotent").state, VmState::Ended);
        assert_eq!(controller.pause("web").await.expect_err("over").code, Code::WrongState);
        drained(&controller).await;
    }
    assert_eq!(controller.show("web").await.expect("shown").memory.current_bytes, 0);
    let again = add(&controller, "web").await;
    let list = controller.list().await.expect("listed");
    assert_eq!(list.iter().map(|vm| vm.state).collect::<Vec<_>>(), [VmState::Starting]);
    again.die(Death::Signal(9)).await;
    drained(&controller).await;
    controller.remove("web").await.expect("removed");
    assert_eq!(controller.remove("web").await.expect_err("twice").code, Code::NotFound);
    assert_eq!(controller.show("web").await.expect_err("gone").code, Code::NotFound);
    assert!(controller.list().await.expect("listed").is_empty());
}

/// What was never charged is empty at once, and must not be taken away with another's.
#[tokio::test(start_paused = true)]
async fn two_vms_without_an_account_end_one_after_the_other() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut ends = Vec::new();
    for name in ["web", "db"] {
        let setup = Setup { accounting: false, max: Limit::Max, ..Setup::default() };
        let mut worker = FakeWorker::add_to(&controller, name, setup).await.expect("added");
        worker.hello().await;
        ends.push(worker);
    }
    for worker in ends {
        worker.die(Death::Signal(9)).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(controller.list().await.expect("the controller lives").len(), 2);
}

/// Its charges stay until the host has the memory, whether or not anybody can still see the VM.
/// Semantics: 90.
#[tokio::test(start_paused = true)]
async fn a_vm_that_runs_is_removed_when_its_worker_is_gone() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut worker = add(&controller, "web").await;
    worker.hello().await;
    let other = add(&controller, "db").await;
    let removing = tokio::spawn({
        let controller = controller.clone();
        async move { controller.remove("web").await }
    });
    while !worker.killed() {
        tokio::task::yield_now().await;
    }
    assert!(!removing.is_finished());
    worker.die(Death::Signal(9)).await;
    removing.await.expect("no panic").expect("removed");
    assert!(controller.host().await.expect("shown").current_bytes > 0, "not before the host has the memory");
    let names: Vec<_> = controller.list().await.expect("listed").into_iter().map(|vm| vm.name).collect();
    assert_eq!(names, ["db"]);
    assert!(!other.killed());
    drained(&controller).await;
    assert_eq!(controller.show("web").await.expect_err("gone").code, Code::NotFound);
    assert!(controller.events(0).await.expect("events").iter().any(|event| event.event == EventKind::Removed));
}

#[tokio::test(start_paused = true)]
async fn a_console_that_is_not_kept_is_refused() {
    let worker = FakeWorker::running(Setup::default()).await;
    assert_eq!(worker.controller.console("vm").await.expect_err("nothing is kept").code, Code::WrongState);
    assert_eq!(worker.controller.console("none").await.expect_err("unknown").code, Code::NotFound);
}

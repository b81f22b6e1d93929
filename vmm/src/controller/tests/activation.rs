//! Accounting that begins on a running VM.

use memcg_core::limit_change::Mode;
use memcg_core::tree::Overhead;

use super::super::MemoryChange;
use super::super::error::Code;
use super::super::view::VmState;
use super::limits::{Answer, ask, change};
use super::*;

/// A VM that runs without accounting.
async fn unlimited() -> FakeWorker {
    let worker = FakeWorker::running(Setup { max: Limit::Max, accounting: false, ..Setup::default() }).await;
    worker.tell().await;
    worker
}

fn track(on: bool) -> MemoryChange {
    MemoryChange { track: Some(on), patch: LimitPatch::default(), ..change(Limit::Max) }
}

impl FakeWorker {
    /// Takes the order to begin, which must be the next message but for balloon targets.
    pub(super) async fn activate(&mut self) -> u32 {
        loop {
            match self.next().await {
                ToWorker::Activate { seq, .. } => return seq,
                ToWorker::BalloonTarget { .. } => {}
                other => panic!("{other:?} instead of the order to begin"),
            }
        }
    }

    /// Begins with `resident` pages and takes the grant that follows.
    pub(super) async fn activated(&mut self, seq: u32, resident: u64) {
        self.report.guest = resident;
        self.report.granted_total = resident;
        self.say(FromWorker::Activated { seq, resident, reserve_target: RESERVE }).await;
        self.tell().await;
        self.first_grant().await;
        self.accounting = true;
        self.tell().await;
    }
}

async fn refused(answer: Answer) -> Refusal {
    answer.await.expect("no panic").expect_err("refused")
}

/// What is resident is charged before anything else is decided, so usage means everything from the first moment.
/// Semantics: 67, 68, 94.
#[tokio::test(start_paused = true)]
async fn the_first_limit_charges_what_is_resident_and_then_holds() {
    let overhead = cost([(Overhead::Worker, 200), (Overhead::Vcpu, 50)]);
    let setup = Setup { max: Limit::Max, accounting: false, overhead, ..Setup::default() };
    let mut worker = FakeWorker::running(setup).await;
    worker.tell().await;
    assert!(!worker.view().await.accounting);
    let answer = ask(&worker, change(pages(4096)));
    let seq = worker.activate().await;
    assert!(!worker.view().await.accounting, "not before the worker has counted");
    assert_eq!(worker.view().await.memory.current_bytes, 0);
    worker.activated(seq, 1000).await;
    let changed = answer.await.expect("no panic").expect("changed");
    assert!(changed.in_force && changed.view.accounting);
    assert_eq!(changed.view.memory.max_bytes, Some(4096 * 4096));
    let view = worker.view().await;
    let stat = view.memory.stat;
    assert_eq!((stat.guest_bytes, stat.reserve_bytes), (1000 * 4096, RESERVE * 4096));
    assert_eq!(view.vmm.current_bytes, 250 * 4096, "what it costs beside its pages is charged as well");
    let parts = stat.guest_bytes + stat.reserve_bytes + stat.stock_bytes + view.vmm.current_bytes;
    assert_eq!(view.memory.current_bytes, parts);
    let event = worker.has_event(EventKind::AccountingBegan).await.expect("an event");
    assert_eq!(event.details["resident_bytes"], 1000 * 4096);
    // From now on it is a VM like any other.
    worker.touch(10_000).await;
    assert!(worker.grant.3, "no room for as much");
    assert!(worker.view().await.memory.current_bytes <= 4096 * 4096);
}

/// Tools write all values back that they have read: that must not turn accounting on.
/// Semantics: 69.
#[tokio::test(start_paused = true)]
async fn writing_back_that_there_is_no_limit_activates_nothing() {
    let mut worker = unlimited().await;
    let before = worker.view().await.generation;
    let same = LimitPatch { min: Some(Limit::ZERO), high: Some(Limit::Max), ..LimitPatch::max(Limit::Max) };
    for change in [change(Limit::Max), MemoryChange { patch: same, ..change(Limit::Max) }, track(false)] {
        let changed = worker.controller.change("vm", change).await.expect("nothing to do");
        assert!(changed.in_force && !changed.view.accounting);
        assert_eq!(changed.view.generation, before);
    }
    assert_eq!(worker.try_next().await, None, "the worker hears nothing of it");
}

/// Accounting without a limit, and no way back: a count with a gap says nothing.
/// Semantics: 70.
#[tokio::test(start_paused = true)]
async fn track_counts_without_a_limit_and_cannot_be_taken_back() {
    let mut worker = unlimited().await;
    let answer = ask(&worker, track(true));
    let seq = worker.activate().await;
    worker.activated(seq, 77).await;
    assert!(answer.await.expect("no panic").expect("on").view.accounting);
    assert!(worker.controller.change("vm", track(true)).await.is_ok(), "once more is nothing new");
    assert_eq!(worker.controller.change("vm", track(false)).await.expect_err("no").code, Code::WrongState);
    assert!(worker.controller.change("vm", change(Limit::Max)).await.expect("no limit").view.accounting);
    worker.touch(100).await;
    assert_eq!(worker.view().await.memory.stat.guest_bytes, 177 * 4096);
}

/// A host that cannot charge leaves the VM as it was, and a later attempt may be luckier.
/// Semantics: 67.
#[tokio::test(start_paused = true)]
async fn a_worker_that_cannot_charge_changes_nothing() {
    let mut worker = unlimited().await;
    let answer = ask(&worker, change(pages(4096)));
    let seq = worker.activate().await;
    let message = "there is no /dev/userfaultfd: run another kernel".to_owned();
    worker.say(FromWorker::NotActivated { seq, message }).await;
    let refusal = refused(answer).await;
    assert_eq!(refusal.code, Code::NotAccounted);
    assert!(refusal.message.contains("cannot begin: there is no /dev/userfaultfd"), "{refusal}");
    let view = worker.view().await;
    assert!(!view.accounting && view.state == VmState::Running);
    assert_eq!((view.memory.max_bytes, view.memory.current_bytes), (None, 0));
    let answer = ask(&worker, change(pages(4096)));
    let seq = worker.activate().await;
    worker.activated(seq, 5).await;
    assert!(answer.await.expect("no panic").expect("now it can").in_force);
}

/// A change that would be refused anyway begins nothing.
#[tokio::test(start_paused = true)]
async fn contradictions_and_old_generations_begin_nothing() {
    let mut worker = unlimited().await;
    let contradiction = LimitPatch { min: Some(pages(3000)), ..LimitPatch::max(pages(2000)) };
    let old = LimitPatch { if_generation: Some(99), ..LimitPatch::max(pages(2000)) };
    for (patch, code) in [(contradiction, Code::InvalidLimit), (old, Code::GenerationMismatch)] {
        let refusal = worker.controller.change("vm", MemoryChange { patch, ..change(Limit::Max) }).await;
        assert_eq!(refusal.expect_err("refused").code, code);
    }
    let both = MemoryChange { track: Some(false), ..change(pages(2000)) };
    assert_eq!(worker.controller.change("vm", both).await.expect_err("refused").code, Code::WrongState);
    assert_eq!(worker.try_next().await, None);
}

/// Two clients ask for limits at once: one activation, then one change after the other.
/// Semantics: 72, 94.
#[tokio::test(start_paused = true)]
async fn two_clients_cause_one_activation_and_their_changes_keep_their_order() {
    let mut worker = unlimited().await;
    let first = ask(&worker, change(pages(4096)));
    let seq = worker.activate().await;
    let second = ask(&worker, change(pages(3000)));
    assert_eq!(worker.try_next().await, None, "no second order");
    worker.activated(seq, 100).await;
    assert_eq!(first.await.expect("no panic").expect("changed").view.memory.max_bytes, Some(4096 * 4096));
    assert_eq!(second.await.expect("no panic").expect("changed").view.memory.max_bytes, Some(3000 * 4096));
}

/// The client of the first limit has the same choice as any other: here nothing is given back.
#[tokio::test(start_paused = true)]
async fn a_first_limit_below_what_is_resident_keeps_to_its_mode() {
    for mode in [Mode::Refuse, Mode::Force, Mode::Reclaim] {
        let mut worker = unlimited().await;
        let answer = ask(&worker, MemoryChange { mode, ..change(pages(600)) });
        let seq = worker.activate().await;
        worker.activated(seq, 1000).await;
        worker.answer_recall().await;
        match mode {
            Mode::Refuse => assert_eq!(refused(answer).await.code, Code::LimitBelowUsage),
            Mode::Force => {
                let changed = answer.await.expect("no panic").expect("forced");
                assert_eq!(changed.view.memory.stat.overcharge_bytes, (1000 + RESERVE - 600) * 4096);
            }
            Mode::Reclaim => {
                assert_eq!(worker.view().await.memory.max_pending_bytes, Some(600 * 4096));
                worker.free(1000 - 600 + RESERVE).await;
                assert!(answer.await.expect("no panic").expect("reached").in_force);
            }
        }
        assert!(worker.view().await.accounting, "{mode:?}: counted in any case");
    }
}

/// Late is not never: the client hears that the worker is silent, and the account is right when it speaks at last.
#[tokio::test(start_paused = true)]
async fn a_worker_that_is_late_keeps_no_client_and_is_believed_when_it_comes() {
    let mut worker = unlimited().await;
    let answer = ask(&worker, change(pages(4096)));
    let seq = worker.activate().await;
    assert_eq!(refused(answer).await.code, Code::Busy);
    let patient = ask(&worker, change(pages(4000)));
    assert_eq!(worker.try_next().await, None, "it has been told already");
    worker.activated(seq, 300).await;
    let changed = patient.await.expect("no panic").expect("changed");
    assert_eq!(changed.view.memory.max_bytes, Some(4000 * 4096), "the first request is forgotten");
    assert_eq!(worker.view().await.memory.stat.guest_bytes, 300 * 4096);
}

/// The same when nobody waits any more: without a limit the account does no harm.
#[tokio::test(start_paused = true)]
async fn an_answer_that_nobody_waits_for_still_begins_the_account() {
    let mut worker = unlimited().await;
    let answer = ask(&worker, change(pages(4096)));
    let seq = worker.activate().await;
    assert_eq!(refused(answer).await.code, Code::Busy);
    worker.activated(seq, 300).await;
    let view = worker.view().await;
    assert_eq!((view.accounting, view.memory.max_bytes), (true, None));
}

/// However the VM ends in the middle, its clients are answered and nothing stays charged.
#[tokio::test(start_paused = true)]
async fn the_end_of_a_vm_ends_its_activation() {
    for how in 0..3 {
        let mut worker = unlimited().await;
        let controller = worker.controller.clone();
        let answers = [ask(&worker, change(pages(4096))), ask(&worker, track(true))];
        worker.activate().await;
        match how {
            0 => assert_eq!(worker.exit(ExitReason::PowerOff).await, VmEnd::Guest(ExitReason::PowerOff)),
            1 => assert!(matches!(worker.die(Death::Signal(9)).await, VmEnd::Died { .. })),
            _ => {
                let killing = tokio::spawn({
                    let controller = controller.clone();
                    async move { controller.kill("vm").await }
                });
                while !worker.killed() {
                    tokio::task::yield_now().await;
                }
                worker.die(Death::Signal(9)).await;
                assert!(killing.await.expect("no panic").is_ok());
            }
        }
        for answer in answers {
            assert_eq!(refused(answer).await.code, Code::WrongState);
        }
        assert_eq!(controller.host().await.expect("alive").current_bytes, 0);
    }
}

/// A VM that dies just after it was counted gives its charges back like any other.
#[tokio::test(start_paused = true)]
async fn charges_that_activation_made_return_when_the_vm_is_gone() {
    let mut worker = unlimited().await;
    let answer = ask(&worker, change(pages(4096)));
    let seq = worker.activate().await;
    worker.activated(seq, 1000).await;
    assert!(answer.await.expect("no panic").is_ok());
    let controller = worker.controller.clone();
    assert!(controller.host().await.expect("alive").current_bytes > 1000 * 4096);
    worker.die(Death::Signal(9)).await;
    tokio::time::timeout(Duration::from_secs(30), async {
        while controller.host().await.expect("alive").current_bytes > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("charges return");
}

/// Pause and resume go their way meanwhile; a VM that stands still gets its reserve and no stock.
#[tokio::test(start_paused = true)]
async fn a_paused_vm_is_activated_and_gets_no_stock() {
    let mut worker = unlimited().await;
    let controller = worker.controller.clone();
    let answer = ask(&worker, change(pages(4096)));
    let seq = worker.activate().await;
    let pausing = tokio::spawn(async move { controller.pause("vm").await });
    let ToWorker::Pause { seq: pause } = worker.next().await else { panic!("no pause") };
    worker.report.paused = true;
    worker.answer(pause).await;
    assert_eq!(pausing.await.expect("no panic").expect("paused").state, VmState::Paused);
    worker.activated(seq, 1000).await;
    assert!(answer.await.expect("no panic").expect("changed").in_force);
    let view = worker.view().await;
    assert_eq!((view.state, view.memory.current_bytes), (VmState::Paused, (1000 + RESERVE) * 4096));
    assert!(worker.controller.resume("vm").await.is_err(), "nobody answers, but it was sent");
    assert!(matches!(worker.next().await, ToWorker::Grant { .. } | ToWorker::Resume { .. }));
}

/// The worker is not trusted here either.
#[tokio::test(start_paused = true)]
async fn a_worker_that_lies_about_its_pages_is_ended() {
    for (asked, wrong_seq, resident, reserve_target) in [
        (false, 0, 10, RESERVE),
        (true, 1, 10, RESERVE),
        (true, 0, SIZE + 1, RESERVE),
        (true, 0, u64::MAX, RESERVE),
        (true, 0, 10, RESERVE + 1),
    ] {
        let mut worker = unlimited().await;
        let seq = if asked {
            ask(&worker, change(pages(4096)));
            worker.activate().await
        } else {
            7
        };
        worker.say(FromWorker::Activated { seq: seq + wrong_seq, resident, reserve_target }).await;
        worker.controller.host().await.expect("alive");
        assert!(worker.killed(), "{resident} pages, a reserve of {reserve_target}");
    }
    // What was not begun holds nothing, whatever it says.
    let mut worker = unlimited().await;
    worker.report.granted_total = 5;
    worker.report.guest = 5;
    worker.tell().await;
    worker.controller.host().await.expect("alive");
    assert!(worker.killed());
    let worker = unlimited().await;
    worker.say(FromWorker::NotActivated { seq: 3, message: "no".to_owned() }).await;
    worker.controller.host().await.expect("alive");
    assert!(worker.killed());
}

/// A budget that comes late counts what is there already: it is above, and no page is granted on top.
/// Semantics: 68, 83, 101.
#[tokio::test(start_paused = true)]
async fn a_budget_that_comes_late_counts_everything_first_and_grants_nothing_more() {
    let mut worker = unlimited().await;
    let controller = worker.controller.clone();
    let changing = tokio::spawn({
        let change = MemoryChange { mode: Mode::Force, ..change(pages(500)) };
        async move { controller.change_group("/", change).await }
    });
    let seq = worker.activate().await;
    worker.activated(seq, 1000).await;
    worker.answer_recall().await;
    let root = changing.await.expect("no panic").expect("in force").view;
    assert_eq!((root.memory.max_bytes, root.accounting), (Some(500 * 4096), true));
    assert_eq!(root.memory.overcharge_bytes, (1000 + RESERVE - 500) * 4096);
    worker.touch(10).await;
    assert_eq!((worker.grant.2, worker.grant.3), (0, true));
    assert!(worker.view().await.accounting);
    let controller = worker.controller.clone();
    let setup = Setup { max: Limit::Max, accounting: false, ..Setup::default() };
    let other = FakeWorker::add_to(&controller, "other", setup).await.expect("added");
    assert!(controller.show("other").await.expect("shown").accounting, "so is every VM that is made later");
    drop(other);
}

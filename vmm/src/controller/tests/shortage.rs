//! A host that runs short of memory.

use std::sync::Mutex;

use memcg_core::host::{Reading, Terms};
use memcg_core::units::human;

use super::super::shortage::ShortageSign;
use super::super::view::{OomPreference, VmState};
use super::ladders::{evicting, holding};
use super::*;
use crate::controller::error::Code;
use crate::controller::oom_log::Reason;

/// Terms in the size of these VMs: short below 1000 pages, not above 1500, critical below 500.
fn terms() -> Terms {
    let sizes = Terms::new(Pages::from_mib(24_576));
    let (enter, leave, critical) = (Pages(1000), Pages(1500), Pages(500));
    Terms { enter, leave, critical, step: Pages(1000), least: Pages(64), ..sizes }
}

/// Has a controller watch a host of which somebody else says how it is; `None` when it says nothing.
pub(super) async fn watched(controller: &Controller) -> Arc<Mutex<Option<Reading>>> {
    let host = Arc::new(Mutex::new(None));
    let said = Arc::clone(&host);
    controller.watch_host(Box::new(move || *said.lock().expect("alive")), Pages::from_mib(24_576), terms()).await;
    host
}

pub(super) fn left(pages: u64) -> Option<Reading> {
    Some(Reading { available: Pages(pages), stalled: Some(Duration::ZERO) })
}

/// The operations page has the marks of small and large hosts.
#[test]
fn the_marks_in_the_documentation_are_those_of_the_program() {
    let page = include_str!("../../../../docs/operations.md");
    for gib in [1, 4, 16, 64, 512] {
        let terms = Terms::new(Pages::from_mib(gib * 1024));
        let marks = [terms.enter, terms.leave, terms.critical, terms.step].map(|pages| human(pages.bytes()));
        let row = format!("| {gib}G | {} |\n", marks.join(" | "));
        assert!(page.contains(&row), "docs/operations.md has no row {row}");
    }
}

/// A host that runs short asks its VMs, who has idle memory first, for as much as is missing; when there is enough again, nobody
/// is asked any more.
/// Semantics: 41.
#[tokio::test(start_paused = true)]
async fn a_host_that_runs_short_asks_its_vms_until_it_is_not() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut a = evicting(&controller, "a", "/", Limit::Max, 3000).await;
    let mut b = evicting(&controller, "b", "/", Limit::Max, 3000).await;
    b.report.idle = 2500;
    b.tell().await;
    let host = watched(&controller).await;
    a.obey_for(11_000).await;
    assert_eq!(
        controller.host().await.expect("alive").shortage.expect("watched").available_bytes,
        0,
        "nothing was said"
    );
    *host.lock().expect("alive") = left(700);
    for worker in [&mut a, &mut b] {
        worker.obey_for(10_500).await;
    }
    let shortage = controller.host().await.expect("alive").shortage.expect("watched");
    assert_eq!((shortage.short, shortage.available_bytes), (Some(ShortageSign::Available), 700 * 4096));
    let entered = a.has_event(EventKind::PressureEntered).await.expect("told");
    assert_eq!((entered.vm.as_deref(), &entered.details["short"]), (None, &serde_json::json!("available")));
    let gives = |worker: &FakeWorker| worker.report.held().expect("a number").saturating_sub(worker.aim);
    assert!(gives(&b) > gives(&a), "{} and {}", gives(&a), gives(&b));
    assert!(a.grant.1 <= 64, "nothing is granted ahead: {}", a.grant.1);
    *host.lock().expect("alive") = left(9000);
    for worker in [&mut a, &mut b] {
        worker.obey_for(12_000).await;
    }
    let left = a.has_event(EventKind::PressureLeft).await.expect("told");
    assert!(left.details["lasted_ms"].as_u64().expect("a number") >= 20_000, "{left:?}");
    for worker in [&mut a, &mut b] {
        worker.obey_for(5000).await;
        assert_eq!(worker.aim, u64::MAX);
    }
    assert!(a.grant.1 > 64);
}

/// A VM without a limit whose guest holds `guest` pages.
pub(super) async fn chosen_by(controller: &Controller, name: &str, guest: u64, oom: OomPolicy) -> FakeWorker {
    holding(controller, name, Setup { max: Limit::Max, evicts: true, oom, ..Setup::default() }, guest).await
}

pub(super) fn policy(action: OomAction, preference: OomPreference) -> OomPolicy {
    OomPolicy { action, preference, ..OomPolicy::default() }
}

/// The events of one kind.
pub(super) async fn all(controller: &Controller, kind: EventKind) -> Vec<Event> {
    let events = controller.events(0).await.expect("events");
    events.into_iter().filter(|event| event.event == kind).collect()
}

/// Lets all workers obey for so many milliseconds.
pub(super) async fn pass(workers: &mut [FakeWorker], ms: u64) {
    for _ in 0..ms / 50 {
        for worker in &mut *workers {
            worker.obey().await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Critical for longer than reclaim may take: the first of the list goes, and nobody else before the time to cool down is over.
/// Semantics: 47, 74.
#[tokio::test(start_paused = true)]
async fn one_goes_when_reclaim_does_not_help_and_the_next_only_after_a_while() {
    let (controller, _) = Controller::start(Limit::Max);
    let kill = policy(OomAction::Kill, OomPreference::None);
    let mut workers = Vec::new();
    for (name, guest, oom) in [
        ("small", 500, kill),
        ("large", 3000, kill),
        ("larger", 4000, policy(OomAction::Kill, OomPreference::Omit)),
        ("medium", 2000, kill),
    ] {
        workers.push(chosen_by(&controller, name, guest, oom).await);
    }
    let host = watched(&controller).await;
    *host.lock().expect("alive") = left(300);
    let killed = |workers: &[FakeWorker]| workers.iter().map(FakeWorker::killed).collect::<Vec<_>>();
    pass(&mut workers, 4500).await;
    assert_eq!(killed(&workers), [false; 4], "reclaim has its time");
    pass(&mut workers, 1000).await;
    assert_eq!(killed(&workers), [false, true, false, false]);
    let victim = workers[0].has_event(EventKind::VictimSelected).await.expect("told");
    assert_eq!((victim.vm.as_deref(), &victim.details["action"]), (Some("large"), &serde_json::json!("kill")));
    let ranked = victim.details["ranked"].as_array().expect("a list");
    assert!(ranked.len() == 4 && ranked[0].as_str().expect("a sentence").starts_with("large: "), "{ranked:?}");
    assert!(ranked[3].as_str().expect("a sentence").contains("omit"), "{ranked:?}");
    pass(&mut workers, 9000).await;
    assert_eq!(killed(&workers), [false, true, false, false], "its memory is on its way");
    pass(&mut workers, 2000).await;
    assert_eq!(killed(&workers), [false, true, false, true], "it did not come");
}

/// Nobody may be chosen: that is said, once a minute, and nothing is done.
/// Semantics: 49, 51.
#[tokio::test(start_paused = true)]
async fn where_everybody_is_omitted_nobody_goes_and_that_is_said() {
    let (controller, _) = Controller::start(Limit::Max);
    let omit = policy(OomAction::Kill, OomPreference::Omit);
    let mut workers = vec![chosen_by(&controller, "a", 3000, omit).await, chosen_by(&controller, "b", 100, omit).await];
    let host = watched(&controller).await;
    *host.lock().expect("alive") = left(300);
    pass(&mut workers, 34_000).await;
    let said = all(&controller, EventKind::NobodyChosen).await;
    assert!(said.len() == 1 && said[0].group.as_deref() == Some("/"), "{said:?}");
    assert_eq!(said[0].details["why"], "nobody can be chosen: 2 omitted");
    pass(&mut workers, 40_000).await;
    assert_eq!(all(&controller, EventKind::NobodyChosen).await.len(), 2);
    assert!(!workers.iter().any(FakeWorker::killed));
}

/// A pause for the host takes all that the VM has. Nobody lets it go on while the host is short; it goes on by itself when there
/// is room for what was evicted.
#[tokio::test(start_paused = true)]
async fn who_is_paused_for_the_host_is_emptied_and_goes_on_when_there_is_room() {
    let (controller, _) = Controller::start(Limit::Max);
    let pause = policy(OomAction::Pause, OomPreference::None);
    let mut workers =
        vec![chosen_by(&controller, "a", 3000, pause).await, chosen_by(&controller, "b", 1000, pause).await];
    let host = watched(&controller).await;
    *host.lock().expect("alive") = left(300);
    pass(&mut workers, 8000).await;
    let state = async |name: &str| controller.show(name).await.expect("shown").state;
    assert_eq!((state("a").await, state("b").await), (VmState::Paused, VmState::Running));
    let a = &mut workers[0];
    let fixed = a.report.held().expect("a number") - a.report.guest - a.report.stock;
    assert!(a.aim <= fixed, "{} of {fixed}", a.aim);
    a.evict_and_return(2900).await;
    let refused = controller.resume("a").await.expect_err("the host is short");
    assert!(refused.code == Code::ResumeRefused && refused.message.contains("are missing still"), "{refused:?}");
    // Enough for the host, not for the VM.
    *host.lock().expect("alive") = left(2000);
    pass(&mut workers, 30_000).await;
    assert!(workers[0].has_event(EventKind::PressureLeft).await.is_some());
    assert_eq!(state("a").await, VmState::Paused);
    *host.lock().expect("alive") = left(9000);
    pass(&mut workers, 11_000).await;
    assert_eq!(state("a").await, VmState::Running);
    assert_eq!(state("b").await, VmState::Running, "one was enough");
}

/// Where all that is taken of VMs without limits comes back at once, eviction keeps up and the host never gets any shorter. But
/// nobody gets anywhere: one of them stands still for the others, for that reason.
/// Semantics: 42.
#[tokio::test(start_paused = true)]
async fn on_a_host_whose_guests_thrash_one_stands_still() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut a = evicting(&controller, "a", "/", Limit::Max, 3000).await;
    let mut b = evicting(&controller, "b", "/", Limit::Max, 3000).await;
    let host = watched(&controller).await;
    for short in [false, true] {
        *host.lock().expect("alive") = left(if short { 700 } else { 9000 });
        for _ in 0..25 {
            for worker in [&mut a, &mut b] {
                worker.report.cold.evicted += 2000;
                worker.report.cold.refaulted += 2000;
                worker.tell().await;
                worker.obey_for(500).await;
            }
        }
        let states = [controller.show("a").await, controller.show("b").await].map(|vm| vm.expect("shown").state);
        let paused = states.iter().filter(|state| **state == VmState::Paused).count();
        assert_eq!(paused, usize::from(short), "{states:?}");
    }
    let decision = controller.oom_log(0).await.expect("alive").decisions.pop().expect("recorded");
    assert_eq!((decision.reason, decision.level.as_str()), (Reason::Thrash, "/"));
}

//! Wants, refusals, holds.

use super::*;

#[tokio::test(start_paused = true)]
async fn the_first_grant_is_the_reserve_and_a_first_stock() {
    let mut worker = FakeWorker::add(Setup::default()).await;
    worker.hello().await;
    let (granted, stock_max, room, refused) = worker.grant;
    assert_eq!(worker.report.reserve, RESERVE);
    assert!(granted > RESERVE && !refused);
    assert_eq!(room, 4096 - granted);
    assert!(stock_max <= room / 8 && stock_max > 0);
    assert_eq!(worker.report.stock, (4096 - RESERVE) / 8);
}

#[tokio::test(start_paused = true)]
async fn a_limit_below_the_reserve_is_answered_with_a_refusal_and_the_worker_names_the_smallest() {
    let mut worker = FakeWorker::add(Setup { max: pages(100), ..Setup::default() }).await;
    worker.hello().await;
    assert_eq!(worker.grant, (100, 0, 0, true));
    let message = "memory.max is too small\u{1b}[0m".to_owned();
    worker.say(FromWorker::Failed { message, smallest_max: Some(200) }).await;
    let end = worker.die(Death::Exited(1)).await;
    // What a worker says is printed on a terminal: no control characters.
    let message = "memory.max is too small[0m".to_owned();
    assert_eq!(end, VmEnd::Failed { message, smallest_max: Some(Pages(200)) });
}

/// Semantics: 12, 58.
#[tokio::test(start_paused = true)]
async fn without_accounting_nothing_is_charged() {
    let setup = Setup { max: Limit::Max, accounting: false, ..Setup::default() };
    let mut worker = FakeWorker::add(setup).await;
    worker.hello().await;
    worker.report.want = 100;
    worker.report.want_now = 100;
    worker.tell().await;
    assert_eq!(worker.try_next().await, None);
}

/// Semantics: 1, 3, 117, B39.
#[tokio::test(start_paused = true)]
async fn usage_never_exceeds_max_and_a_refusal_counts_once() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    for _ in 0..100 {
        worker.touch(100).await;
    }
    let view = worker.view().await;
    assert_eq!(view.memory.current_bytes, 4096 * 4096);
    assert_eq!(view.memory.peak_bytes, 4096 * 4096);
    let stat = view.memory.stat;
    assert_eq!(stat.guest_bytes + stat.stock_bytes + stat.reserve_bytes, view.memory.current_bytes);
    let failed = view.memory.events.failcnt;
    assert!(failed > 0);
    assert!(worker.has_event(EventKind::MaxHit).await.is_some());
    assert!(worker.grant.3, "told to hold its vCPUs");

    // Trying again because something changed elsewhere counts nothing.
    worker.report.want_now = 0;
    worker.report.want = 0;
    worker.report.debt = 5;
    worker.report.reserve -= 5;
    worker.report.guest += 5;
    worker.tell().await;
    let once = worker.view().await.memory.events.failcnt;
    assert!(once <= failed + 1);
    for _ in 0..5 {
        worker.tell().await;
        let events = worker.view().await.memory.events;
        assert_eq!(events.failcnt, once, "looking counts nothing, nor does asking again");
        assert_eq!(events.max, once);
    }
    worker.report.debt = 6;
    worker.report.reserve -= 1;
    worker.report.guest += 1;
    worker.tell().await;
    assert_eq!(worker.view().await.memory.events.failcnt, once + 1, "one more page is missing");
    // Giving back pays the debt without a word from the worker.
    worker.free(50).await;
    let message = worker.next().await;
    assert!(matches!(message, ToWorker::Grant { refused: false, .. }), "{message:?}");
}

#[tokio::test(start_paused = true)]
async fn a_want_that_crosses_a_grant_is_not_served_twice() {
    let mut worker = FakeWorker::running(Setup { max: Limit::Max, ..Setup::default() }).await;
    while worker.try_next().await.is_some() {}
    worker.book();
    let before = worker.grant.0;
    worker.report.want = 10;
    worker.report.want_now = 10;
    worker.tell().await;
    worker.tell().await;
    worker.tell().await;
    while worker.try_next().await.is_some() {}
    assert_eq!(worker.grant.0, before + 10);
}

#[tokio::test(start_paused = true)]
async fn a_want_for_more_than_the_vm_can_use_is_cut() {
    let mut worker = FakeWorker::running(Setup { max: Limit::Max, ..Setup::default() }).await;
    worker.report.want = u64::MAX;
    worker.report.want_now = u64::MAX;
    worker.tell().await;
    while worker.try_next().await.is_some() {}
    let dead = super::super::cold::most_dead(Pages(SIZE)).0;
    assert_eq!(worker.grant.0, SIZE + super::growth() + RESERVE + memcg_core::reclaim::STOCK_CAP.0 + dead);
}

/// What the guest's pages cost comes out of what was granted: usage stays what it is, a part of it becomes overhead, and it
/// stays that when the pages are given back.
/// Semantics: 14, 76, B84.
#[tokio::test(start_paused = true)]
async fn what_pages_cost_turns_from_stock_into_overhead() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    worker.touch(300).await;
    let before = worker.view().await;
    (worker.report.tables, worker.report.records) = (4, 1);
    worker.report.stock -= 5;
    let view = worker.view().await;
    assert_eq!(view.memory.current_bytes, before.memory.current_bytes);
    assert_eq!((before.vmm.current_bytes, view.vmm.current_bytes), (0, 5 * 4096));
    let accounted = view.overhead.accounted;
    assert_eq!((accounted.page_tables_bytes, accounted.frame_records_bytes), (4 * 4096, 4096));
    assert_eq!((accounted.kernel_bytes, accounted.user_bytes), (4 * 4096, 4096));
    worker.free(300).await;
    let view = worker.view().await;
    assert_eq!(view.memory.current_bytes, before.memory.current_bytes - 300 * 4096);
    assert_eq!(view.vmm.current_bytes, 5 * 4096);
    worker.report.tables -= 1;
    worker.tell().await;
    worker.controller.host().await.expect("alive");
    assert!(worker.killed(), "tables do not go before the VM does");
}

/// Semantics: 4, B65.
#[tokio::test(start_paused = true)]
async fn lies_end_the_worker() {
    type Lie = fn(&mut Report);
    let lies: [(&str, Lie); 8] = [
        ("returned more than granted", |r| r.returned_total = r.granted_total + 1),
        ("was granted more", |r| r.granted_total += 1),
        ("holds more", |r| r.guest += 1),
        ("overflows", |r| (r.guest, r.stock) = (u64::MAX, u64::MAX)),
        ("has paid what it does not have", |r| r.tables += 1),
        ("has paid for more than all tables", |r| {
            (r.stock, r.tables) = (r.stock - most_tables() - 1, most_tables() + 1);
        }),
        ("balloon larger than RAM", |r| r.ballooned = SIZE + 1),
        ("grants fall", |r| (r.granted_total, r.guest, r.stock, r.reserve) = (0, 0, 0, 0)),
    ];
    for (what, lie) in lies {
        let mut worker = FakeWorker::running(Setup::default()).await;
        lie(&mut worker.report);
        worker.tell().await;
        worker.controller.host().await.expect("alive");
        assert!(worker.killed(), "{what}");
        let controller = worker.controller.clone();
        assert!(matches!(worker.die(Death::Signal(9)).await, VmEnd::Died { .. }), "{what}");
        let events = controller.events(0).await.expect("events");
        assert_eq!(events.last().map(|event| event.event), Some(EventKind::WorkerDied), "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_total_that_falls_is_a_lie_and_so_is_a_second_hello() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    worker.touch(100).await;
    worker.free(10).await;
    worker.report.returned_total -= 1;
    worker.tell().await;
    worker.controller.host().await.expect("alive");
    assert!(worker.killed());

    let worker = FakeWorker::running(Setup::default()).await;
    worker.say(FromWorker::Hello(hello(true))).await;
    worker.controller.host().await.expect("alive");
    assert!(worker.killed());
}

#[tokio::test(start_paused = true)]
async fn a_hello_that_does_not_fit_the_vm_ends_the_worker() {
    let slot = |gpa, bytes| RamSlot { gpa, hva: 0, bytes, stage: 0 };
    for (ram, reserve_target) in [
        ([slot(0, 4096), slot(0, 0)], RESERVE),
        ([slot(0, SIZE * 4096), slot(0, 4096)], RESERVE),
        ([slot(u64::MAX, SIZE * 4096), slot(0, 0)], RESERVE),
        ([slot(0, SIZE * 4096), slot(0, 0)], RESERVE + 1),
        ([slot(0, u64::MAX), slot(0, u64::MAX)], RESERVE),
    ] {
        let worker = FakeWorker::add(Setup::default()).await;
        worker.say(FromWorker::Hello(Hello { ram, reserve_target, ..hello(true) })).await;
        worker.controller.host().await.expect("alive");
        assert!(worker.killed(), "{ram:?}");
    }
    let worker = FakeWorker::add(Setup::default()).await;
    worker.tell().await;
    worker.controller.host().await.expect("alive");
    assert!(worker.killed(), "a report before hello");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_says_nothing_is_ended() {
    let worker = FakeWorker::add(Setup::default()).await;
    tokio::time::sleep(Duration::from_secs(101)).await;
    assert!(worker.killed());
    assert!(matches!(worker.die(Death::Signal(9)).await, VmEnd::Died { .. }));
}

/// A VM that is held since now: its limit is used up and it has a debt of 3 pages.
pub(super) async fn held(setup: Setup) -> FakeWorker {
    until_held(FakeWorker::running(setup).await).await
}

/// Has the guest of a VM touch memory until it is held.
async fn until_held(mut worker: FakeWorker) -> FakeWorker {
    for _ in 0..60 {
        worker.touch(100).await;
    }
    worker.report.want = 3;
    worker.report.want_now = 3;
    worker.report.debt = 3;
    worker.report.reserve -= 3;
    worker.report.guest += 3;
    worker.report.held = true;
    worker.tell().await;
    while worker.try_next().await.is_some() {}
    worker
}

/// Who looks at a VM that is held sees whose limit that is.
#[tokio::test(start_paused = true)]
async fn a_hold_names_the_limit_that_leaves_no_room() {
    let mut own = held(Setup::default()).await;
    assert_eq!(own.view().await.held.limit_of.as_deref(), Some("/vm"));
    own.report.held = false;
    assert_eq!(own.view().await.held.limit_of, None);
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", super::limits::change(pages(2000))).await.expect("made");
    let setup = Setup { group: "/gold", max: Limit::Max, ..Setup::default() };
    let mut in_group = FakeWorker::add_to(&controller, "vm", setup).await.expect("added");
    in_group.hello().await;
    in_group.say(FromWorker::Loaded { plan: 0 }).await;
    let mut in_group = until_held(in_group).await;
    assert_eq!(in_group.view().await.held.limit_of.as_deref(), Some("/gold"));
    assert_eq!(in_group.has_event(EventKind::MaxHit).await.expect("told").details["limit_of"], "/gold");
}

/// A guest that is at its limit again and again is told of once a minute, however often it was refused something.
#[tokio::test(start_paused = true)]
async fn a_limit_that_is_met_again_and_again_is_told_once_a_minute() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    for told in 1..=3 {
        for _ in 0..60 {
            worker.touch(100).await;
            (worker.report.want, worker.report.want_now) = (0, 0);
            worker.tell().await;
        }
        let hits = super::shortage::all(&worker.controller, EventKind::MaxHit).await;
        assert_eq!(hits.len(), told);
        assert!(worker.view().await.memory.events.max > told as u64 * 10);
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
}

/// Semantics: 42, B34, T11.
#[tokio::test(start_paused = true)]
async fn a_hold_has_one_deadline_that_repeating_does_not_put_off() {
    let mut worker = held(Setup::default()).await;
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        worker.tell().await;
        while let Some(message) = worker.try_next().await {
            assert!(!matches!(message, ToWorker::Pause { .. }), "too early");
        }
    }
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert!(matches!(worker.next().await, ToWorker::Pause { .. }));
    let victim = worker.has_event(EventKind::VictimSelected).await.expect("an event");
    assert_eq!(victim.details["action"], "pause");
    assert_eq!(victim.details["usage_bytes"], 4096 * 4096);
    assert_eq!(victim.details["max_bytes"], 4096 * 4096);
    assert_eq!(victim.details["debt_bytes"], 3 * 4096);
    assert!(victim.details["held_ms"].as_u64().expect("a number") >= 5000);
    let paused = worker.has_event(EventKind::Paused).await.expect("an event");
    assert_eq!(paused.details["by"], "policy");
}

/// Semantics: 51.
#[tokio::test(start_paused = true)]
async fn a_release_cancels_the_deadline_and_a_new_hold_starts_anew() {
    let mut worker = held(Setup::default()).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    worker.report.held = false;
    worker.tell().await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    worker.report.held = true;
    worker.tell().await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(worker.has_event(EventKind::VictimSelected).await, None);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(worker.has_event(EventKind::VictimSelected).await.is_some());
}

/// Semantics: 51.
#[tokio::test(start_paused = true)]
async fn the_policy_kills_when_it_says_so() {
    let oom = OomPolicy { action: OomAction::Kill, deadline: Duration::from_secs(5), ..OomPolicy::default() };
    let worker = held(Setup { oom, ..Setup::default() }).await;
    tokio::time::sleep(Duration::from_millis(4900)).await;
    assert!(!worker.killed());
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(worker.killed());
    let controller = worker.controller.clone();
    assert_eq!(worker.die(Death::Signal(9)).await, VmEnd::Killed(super::super::KilledBy::Policy));
    let kinds: Vec<_> = controller.events(0).await.expect("events").iter().map(|event| event.event).collect();
    assert!(kinds.ends_with(&[EventKind::VictimSelected, EventKind::Killed]), "{kinds:?}");
    assert_eq!(controller.show("vm").await.expect("still known").memory.events.oom_kill, 1);
}

/// Semantics: 51, T7.
#[tokio::test(start_paused = true)]
async fn a_raised_limit_lets_a_vm_that_the_policy_paused_go_on() {
    let mut worker = held(Setup::default()).await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    while worker.try_next().await.is_some() {}
    // Nobody can make it go on while it has no memory.
    let refused = worker.controller.resume("vm").await.expect_err("refused");
    assert_eq!(refused.code, super::super::error::Code::ResumeRefused);
    assert!(worker.has_event(EventKind::ResumeRefused).await.is_some());

    let change = super::limits::change(pages(8192));
    worker.controller.change("vm", change).await.expect("raised");
    let (mut granted, mut resumed) = (false, false);
    while let Some(message) = worker.try_next().await {
        match message {
            ToWorker::Grant { refused, .. } => granted |= !refused,
            ToWorker::Resume { .. } => resumed = granted,
            _ => {}
        }
    }
    assert!(resumed, "after the grant");
    let event = worker.has_event(EventKind::Resumed).await.expect("an event");
    assert_eq!(event.details["by"], "policy");
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_a_user_paused_stays_paused_when_its_limit_is_raised() {
    let mut worker = held(Setup::default()).await;
    let controller = worker.controller.clone();
    let pausing = tokio::spawn(async move { controller.pause("vm").await });
    let ToWorker::Pause { seq } = worker.next().await else { panic!("no pause") };
    worker.report.paused = true;
    worker.answer(seq).await;
    pausing.await.expect("no panic").expect("paused");
    // The deadline of the hold does not run while the VM is paused.
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(worker.has_event(EventKind::VictimSelected).await, None);
    worker.controller.change("vm", super::limits::change(pages(8192))).await.expect("raised");
    while let Some(message) = worker.try_next().await {
        assert!(!matches!(message, ToWorker::Resume { .. }));
    }
}

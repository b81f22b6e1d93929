//! Groups: limits over several VMs, transactions, moves, and memory that is out at a group's limit.

use memcg_core::limit_change::Mode;

use super::super::error::Code;
use super::super::view::{BalloonProgress, GroupView, LimitsView, VmState};
use super::super::{Changed, MemoryChange, NodeChange};
use super::limits::change;
use super::*;

/// A controller with the groups `/gold` and `/iron`, which may have so many pages.
async fn groups(gold: u64, iron: u64) -> Controller {
    let (controller, _) = Controller::start(Limit::Max);
    for (path, max) in [("/gold", gold), ("/iron", iron)] {
        assert!(controller.put_group(path, change(pages(max))).await.expect("made").0);
    }
    controller
}

/// A VM without a limit of its own that runs in `group`, whose guest holds `guest` pages.
async fn member(controller: &Controller, name: &str, group: &'static str, guest: u64) -> FakeWorker {
    let setup = Setup { max: Limit::Max, group, ..Setup::default() };
    let mut worker = FakeWorker::add_to(controller, name, setup).await.expect("added");
    worker.hello().await;
    worker.say(FromWorker::Loaded { plan: 0 }).await;
    while worker.try_next().await.is_some() {}
    worker.touch(guest).await;
    assert_eq!(worker.report.guest, guest);
    worker.tell().await;
    worker
}

async fn group(controller: &Controller, path: &str) -> GroupView {
    controller.group(path).await.expect("shown")
}

async fn vm(controller: &Controller, name: &str) -> VmView {
    controller.list().await.expect("listed").into_iter().find(|vm| vm.name == name).expect("there is one")
}

type Many = tokio::task::JoinHandle<Result<Changed<LimitsView>, Refusal>>;

fn all(controller: &Controller, nodes: &[(&str, Limit)]) -> Many {
    let node = |(name, max): &(&str, Limit)| {
        let change = change(*max);
        if name.starts_with('/') { NodeChange::group(name, &change) } else { NodeChange::vm(name, &change) }
    };
    let (controller, nodes) = (controller.clone(), nodes.iter().map(node).collect());
    tokio::spawn(async move { controller.change_many(nodes, Mode::Reclaim, None).await })
}

/// What a refusal in a full group names is enough, and what it proposes beside that would help.
#[tokio::test(start_paused = true)]
async fn who_finds_a_group_full_is_told_what_would_make_room() {
    let controller = groups(1024, 4096).await;
    let a = member(&controller, "a", "/gold", 400).await;
    let b = member(&controller, "b", "/gold", 1024 - 2 * RESERVE - 400).await;
    let spec = || {
        let overhead = super::cost([(memcg_core::tree::Overhead::Worker, 200)]);
        VmSpec { group: "/gold".to_owned(), overhead, ..plain("c") }
    };
    let refusal = controller.create(spec()).await.expect_err("it is full");
    assert_eq!(refusal.code, Code::OverheadRefused);
    assert_eq!(
        refusal.message,
        "the VM \"c\" needs 800K beside its pages, and memory.max of /gold is 4M, of which others use 4M: raise it to 6M, \
         or make room for 2M in it: end a VM, lower the memory.max of one, or, where they do not need it, `ballast \
         reclaim /gold 2M`"
    );
    // The worker of a VM that has no limit of its own does not know whose is in the way.
    let setup = Setup { max: Limit::Max, group: "/gold", ..Setup::default() };
    let worker = FakeWorker::add_to(&controller, "d", setup).await.expect("it costs nothing");
    worker.say(FromWorker::Hello(hello(true))).await;
    worker.say(FromWorker::Failed { message: "too small".to_owned(), smallest_max: Some(300) }).await;
    let VmEnd::Failed { message, smallest_max: None } = worker.die(Death::Exited(1)).await else {
        panic!("another end")
    };
    assert!(
        message.starts_with("it needs 1.2M to load its guest, and memory.max of /gold is 4M, of which"),
        "{message}"
    );
    assert!(message.contains("raise it to 6M, or make room for 2M in it"), "{message}");
    // A group that is too small for it alone is another matter.
    let large = VmSpec { overhead: super::cost([(memcg_core::tree::Overhead::Worker, 2000)]), ..spec() };
    let refusal = controller.create(large).await.expect_err("too large");
    assert!(refusal.message.ends_with("is 4M: raise it to 13M, or use fewer vCPUs or less RAM"), "{}", refusal.message);
    // Until the host has a dead one's memory back.
    controller.worker_died(b.id, Death::Signal(9)).await;
    controller.heard(b.id, FromLink::Closed).await;
    let refusal = controller.create(spec()).await.expect_err("it is still full");
    assert!(
        refusal.message.contains("VMs that have ended still hold 1.9M: try again in a moment"),
        "{}",
        refusal.message
    );
    while group(&controller, "/gold").await.memory.returning_bytes > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    controller.create(spec()).await.expect("there is room");
    drop(a);
}

/// The stocks of all VMs come back before a group's usage is judged, and what they give together brings the limit down.
/// Semantics: 41, 60, 118.
#[tokio::test(start_paused = true)]
async fn a_group_shrinks_by_what_its_vms_give() {
    let controller = groups(8192, 4096).await;
    let mut a = member(&controller, "a", "/gold", 1000).await;
    let mut b = member(&controller, "b", "/gold", 1000).await;
    let other = member(&controller, "c", "/iron", 100).await;
    let asked = controller.clone();
    let answer = tokio::spawn(async move { asked.change_group("/gold", change(pages(1500))).await });
    a.answer_recall().await;
    assert_eq!(group(&controller, "/gold").await.memory.max_pending_bytes, None, "not before all have answered");
    b.answer_recall().await;
    let pending = group(&controller, "/gold").await.memory;
    assert_eq!(pending.current_bytes, 2 * (1000 + RESERVE) * 4096);
    assert_eq!((pending.max_bytes, pending.max_pending_bytes), (Some(8192 * 4096), Some(1500 * 4096)));
    assert!(pending.ceiling_bytes.is_some());
    a.free(500).await;
    assert!(!answer.is_finished());
    b.free(300).await;
    let changed = answer.await.expect("no panic").expect("reached");
    assert!(changed.in_force);
    assert_eq!(changed.view.memory.max_bytes, Some(1500 * 4096));
    let events = controller.events(0).await.expect("events");
    let of = |kind: EventKind| -> Vec<_> {
        events.iter().filter(|event| event.event == kind).map(|event| event.group.clone().expect("a group")).collect()
    };
    assert_eq!(of(EventKind::LimitRequested), ["/gold"]);
    assert_eq!(of(EventKind::LimitChanged), ["/gold"]);
    drop(other);
}

/// A worker that says nothing keeps its stock, and the group's client no longer than its patience.
/// Semantics: 60, 71.
#[tokio::test(start_paused = true)]
async fn a_silent_member_s_stock_stays_counted() {
    let controller = groups(8192, 4096).await;
    let mut a = member(&controller, "a", "/gold", 1000).await;
    let mut b = member(&controller, "b", "/gold", 1000).await;
    b.report.want = 100;
    b.tell().await;
    while b.try_next().await.is_some() {}
    b.report.want = 0;
    b.book();
    b.tell().await;
    let silent = 1000 + RESERVE + b.report.stock;
    assert!(b.report.stock > 0);
    let asked = controller.clone();
    let refuse = MemoryChange { mode: Mode::Refuse, ..change(pages(2000)) };
    let answer = tokio::spawn(async move { asked.change_group("/gold", refuse).await });
    a.answer_recall().await;
    let refusal = answer.await.expect("no panic").expect_err("too much is in use");
    assert_eq!((refusal.code, refusal.usage_bytes), (Code::LimitBelowUsage, Some((1000 + RESERVE + silent) * 4096)));
    drop(b);
}

/// What one gets is what another has still to give: both in one step.
/// Semantics: 118, T3.
#[tokio::test(start_paused = true)]
async fn a_transaction_shrinks_before_it_grows_and_is_in_force_in_one_step() {
    let controller = groups(4096, 4096).await;
    let mut a = member(&controller, "a", "/gold", 1000).await;
    let b = member(&controller, "b", "/iron", 10).await;
    let answer = all(&controller, &[("a", pages(600)), ("b", pages(3000)), ("/iron", pages(5000))]);
    a.answer_recall().await;
    while vm(&controller, "a").await.memory.max_pending_bytes.is_none() {}
    assert_eq!(vm(&controller, "b").await.memory.max_bytes, None);
    assert_eq!(group(&controller, "/iron").await.memory.max_bytes, Some(4096 * 4096));
    a.free(1000 + RESERVE - 600).await;
    let changed = answer.await.expect("no panic").expect("reached");
    assert!(changed.in_force && changed.view.in_force);
    let max: Vec<_> = changed.view.vms.iter().map(|vm| vm.memory.max_bytes).collect();
    assert_eq!(max, [Some(600 * 4096), Some(3000 * 4096)]);
    assert_eq!(changed.view.groups[0].memory.max_bytes, Some(5000 * 4096));
    let events = controller.events(0).await.expect("events");
    let changes = events.iter().filter(|event| event.event == EventKind::LimitChanged);
    let named: Vec<_> = changes.map(|event| event.vm.clone().or(event.group.clone()).expect("a name")).collect();
    assert_eq!(named, ["a", "b", "/iron"]);
    drop(b);
}

/// Semantics: 6, 118.
#[tokio::test(start_paused = true)]
async fn a_transaction_that_is_refused_or_not_reached_changes_nothing_anywhere() {
    let controller = groups(4096, 4096).await;
    let mut a = member(&controller, "a", "/gold", 1000).await;
    let b = member(&controller, "b", "/iron", 10).await;
    let before = (vm(&controller, "a").await.generation, vm(&controller, "b").await.generation);
    let stale = MemoryChange {
        patch: LimitPatch { if_generation: Some(99), ..LimitPatch::max(pages(9)) },
        ..change(Limit::Max)
    };
    let good = NodeChange::vm("a", &change(pages(2000)));
    for (bad, code) in [
        (NodeChange::vm("b", &stale), Code::GenerationMismatch),
        (NodeChange::vm("nobody", &change(pages(2000))), Code::NotFound),
        (NodeChange::group("/none", &change(pages(2000))), Code::NotFound),
        (good.clone(), Code::BadRequest),
    ] {
        let refused = controller.change_many(vec![good.clone(), bad], Mode::Reclaim, None).await;
        assert_eq!(refused.expect_err("refused").code, code);
    }
    assert_eq!((vm(&controller, "a").await.generation, vm(&controller, "b").await.generation), before);
    let answer = all(&controller, &[("a", pages(600)), ("b", pages(3000))]);
    a.answer_recall().await;
    let refusal = answer.await.expect("no panic").expect_err("nothing is given back");
    assert_eq!(refusal.code, Code::LimitNotReached);
    assert!(refusal.message.contains("/gold/a uses 4.4M and its memory.max is still max"), "{refusal}");
    assert_eq!([vm(&controller, "a").await, vm(&controller, "b").await].map(|vm| vm.memory.max_bytes), [None; 2]);
    drop(b);
}

/// What cannot be in force wholly is given up when one of those it names is gone.
#[tokio::test(start_paused = true)]
async fn the_end_of_one_vm_ends_a_transaction_that_waits() {
    let controller = groups(4096, 4096).await;
    let mut a = member(&controller, "a", "/gold", 1000).await;
    let b = member(&controller, "b", "/iron", 10).await;
    let answer = all(&controller, &[("a", pages(600)), ("b", pages(3000))]);
    a.answer_recall().await;
    while vm(&controller, "a").await.memory.max_pending_bytes.is_none() {}
    b.die(Death::Signal(9)).await;
    assert_eq!(answer.await.expect("no panic").expect_err("over").code, Code::WrongState);
    let memory = vm(&controller, "a").await.memory;
    assert_eq!((memory.max_bytes, memory.max_pending_bytes, memory.ceiling_bytes), (None, None, None));
}

/// The first limit of a group counts all VMs in it first, or is refused and limits nobody.
/// Semantics: 67, 68, 73.
#[tokio::test(start_paused = true)]
async fn the_first_limit_of_a_group_begins_the_account_of_all_its_vms() {
    let (controller, _) = Controller::start(Limit::Max);
    let none = MemoryChange { patch: LimitPatch::default(), ..change(Limit::Max) };
    controller.put_group("/gold", none).await.expect("made");
    let mut workers = Vec::new();
    for name in ["a", "b"] {
        let setup = Setup { max: Limit::Max, accounting: false, group: "/gold", ..Setup::default() };
        let mut worker = FakeWorker::add_to(&controller, name, setup).await.expect("added");
        worker.hello().await;
        worker.say(FromWorker::Loaded { plan: 0 }).await;
        assert_eq!(worker.next().await, ToWorker::Start);
        worker.tell().await;
        workers.push(worker);
    }
    let ask = || {
        let controller = controller.clone();
        tokio::spawn(async move { controller.change_group("/gold", change(pages(8192))).await })
    };
    let answer = ask();
    let [a, b] = &mut workers[..] else { panic!("two") };
    let (seq_a, seq_b) = (a.activate().await, b.activate().await);
    a.activated(seq_a, 700).await;
    b.say(FromWorker::NotActivated { seq: seq_b, message: "no userfaultfd".to_owned() }).await;
    assert_eq!(answer.await.expect("no panic").expect_err("one cannot").code, Code::NotAccounted);
    let gold = group(&controller, "/gold").await;
    assert_eq!((gold.accounting, gold.memory.max_bytes), (false, None));

    let answer = ask();
    let seq_b = b.activate().await;
    b.activated(seq_b, 300).await;
    let changed = answer.await.expect("no panic").expect("in force");
    assert!(changed.in_force && changed.view.accounting);
    assert!(changed.view.memory.current_bytes >= (700 + 300 + 2 * RESERVE) * 4096);
    assert!(vm(&controller, "b").await.accounting);
}

/// Everything that is charged goes along, what is not used comes back first, and the sum above does not change.
/// Semantics: 32, 33, 89.
#[tokio::test(start_paused = true)]
async fn a_vm_moves_with_all_its_charges() {
    let controller = groups(4096, 2000).await;
    let mut a = member(&controller, "a", "/gold", 1000).await;
    let asked = controller.clone();
    let moving = tokio::spawn(async move { asked.move_vm("a", "/iron").await });
    a.answer_recall().await;
    assert_eq!(moving.await.expect("no panic").expect("moved").group, "/iron");
    let used = |path: &'static str| async { group(&controller, path).await.memory.current_bytes };
    assert_eq!((used("/gold").await, used("/iron").await), (0, (1000 + RESERVE) * 4096));
    assert_eq!(used("/").await, (1000 + RESERVE) * 4096);
    assert_eq!(controller.move_vm("a", "/iron").await.expect("again").group, "/iron");
    let events = controller.events(0).await.expect("events");
    let moves: Vec<_> = events.iter().filter(|event| event.event == EventKind::Moved).collect();
    assert_eq!(moves.len(), 1, "to where it is, is no move");
    assert_eq!((&moves[0].details["from"], &moves[0].details["to"]), (&"/gold/a".into(), &"/iron/a".into()));
    // From now on the new group's limit holds it.
    a.touch(5000).await;
    assert!(a.grant.3, "no room for as much");
    assert!(used("/iron").await <= 2000 * 4096);

    // A group moves with everything in it.
    let moving = tokio::spawn({
        let controller = controller.clone();
        async move { controller.move_group("/iron", "/gold").await }
    });
    a.answer_recall().await;
    assert_eq!(moving.await.expect("no panic").expect("moved").path, "/gold/iron");
    assert_eq!(vm(&controller, "a").await.group, "/gold/iron");
    assert_eq!(used("/gold").await, used("/gold/iron").await);
    assert_eq!(controller.move_group("/gold", "/gold/iron").await.expect_err("in itself").code, Code::WrongState);
}

/// Semantics: 33, B25.
#[tokio::test(start_paused = true)]
async fn what_does_not_fit_stays_where_it_is() {
    let controller = groups(4096, 1000).await;
    let mut a = member(&controller, "a", "/gold", 1000).await;
    let asked = controller.clone();
    let moving = tokio::spawn(async move { asked.move_vm("a", "/iron").await });
    a.answer_recall().await;
    let refusal = moving.await.expect("no panic").expect_err("too large");
    assert_eq!((refusal.code, refusal.missing_bytes), (Code::DoesNotFit, Some(RESERVE * 4096)));
    assert_eq!(vm(&controller, "a").await.group, "/gold");
    assert_eq!(group(&controller, "/iron").await.memory.current_bytes, 0);
    assert_eq!(controller.move_vm("a", "/none").await.expect_err("where").code, Code::NoSuchGroup);
    assert_eq!(controller.move_vm("b", "/iron").await.expect_err("who").code, Code::NotFound);
    assert!(controller.events(0).await.expect("events").iter().all(|event| event.event != EventKind::Moved));
}

/// A VM that is not charged is counted before it comes into a group that is.
/// Semantics: 68, 73.
#[tokio::test(start_paused = true)]
async fn a_vm_is_counted_before_it_moves_into_an_accounted_group() {
    let controller = groups(4096, 4096).await;
    let setup = Setup { max: Limit::Max, accounting: false, ..Setup::default() };
    let mut a = FakeWorker::add_to(&controller, "a", setup).await.expect("added");
    a.hello().await;
    a.say(FromWorker::Loaded { plan: 0 }).await;
    assert_eq!(a.next().await, ToWorker::Start);
    a.tell().await;
    let asked = controller.clone();
    let moving = tokio::spawn(async move { asked.move_vm("a", "/gold").await });
    let seq = a.activate().await;
    a.activated(seq, 500).await;
    a.answer_recall().await;
    let moved = moving.await.expect("no panic").expect("moved");
    assert!(moved.accounting);
    assert_eq!(group(&controller, "/gold").await.memory.current_bytes, (500 + RESERVE) * 4096);
}

/// At a group's limit the neighbours' stock comes back, and whoever was refused goes on with it: nobody is a victim.
/// Semantics: 42, 50, 60.
#[tokio::test(start_paused = true)]
async fn the_stock_of_neighbours_is_recalled_before_the_policy_acts() {
    let controller = groups(4096, 4096).await;
    let mut a = member(&controller, "a", "/gold", 100).await;
    let mut b = member(&controller, "b", "/gold", 100).await;
    let stock = b.report.stock;
    assert!(stock > 10);
    let room = 4096 - 2 * (RESERVE + 100) - stock;
    a.touch(room + 5).await;
    assert!(a.grant.3, "refused: the rest is the neighbour's stock");
    a.report.held = true;
    a.tell().await;
    b.answer_recall().await;
    while a.try_next().await.is_some() {}
    assert!(!a.grant.3, "it was tried again");
    a.report.held = false;
    a.report.want_now = 0;
    a.report.want = 0;
    a.book();
    a.tell().await;
    let gold = group(&controller, "/gold").await;
    assert_eq!((gold.memory.events.oom, gold.memory.events_local.max), (0, 1));
    assert_eq!(vm(&controller, "a").await.state, VmState::Running);
}

/// The stock of neighbours that is too little puts nothing off, neither what comes at the begin of a hold nor what they have
/// again at its deadline.
/// Semantics: 42, B34.
#[tokio::test(start_paused = true)]
async fn the_policy_acts_at_its_deadline_though_neighbours_gave_their_stock() {
    for (deadline, late) in [(500, 600), (5000, 5100)] {
        let controller = groups(4096, 4096).await;
        let oom =
            OomPolicy { deadline: Duration::from_millis(deadline), action: OomAction::Kill, ..OomPolicy::default() };
        let setup = Setup { max: Limit::Max, group: "/gold", oom, ..Setup::default() };
        let mut a = super::ladders::holding(&controller, "a", setup, 100).await;
        let mut b = member(&controller, "b", "/gold", 100).await;
        assert!(b.report.stock > 100, "{:?}", b.report);
        a.touch(4096).await;
        assert!(a.grant.3, "refused");
        a.report.held = true;
        a.tell().await;
        let began = tokio::time::Instant::now();
        b.answer_recall().await;
        while a.try_next().await.is_some() {}
        assert!(a.fresh() > 100 && a.grant.3, "it has got some");
        while a.has_event(EventKind::VictimSelected).await.is_none() && began.elapsed() < Duration::from_secs(20) {
            tokio::time::sleep(Duration::from_millis(10)).await;
            if began.elapsed() == Duration::from_millis(deadline - 10) {
                b.book();
                b.report.guest -= 20;
                b.report.stock += 20;
                b.tell().await;
            }
            b.obey().await;
        }
        let acted = u64::try_from(began.elapsed().as_millis()).expect("short");
        assert!((deadline..=late).contains(&acted), "{acted} ms instead of {deadline}");
    }
}

/// Out of memory is recorded where the limit was met, what was done about it at the VM, and a group shows both.
/// Semantics: 47, 48, 63.
#[tokio::test(start_paused = true)]
async fn out_of_memory_is_recorded_at_the_level_that_refused() {
    let controller = groups(1500, 4096).await;
    let oom = OomPolicy { action: OomAction::Kill, ..OomPolicy::default() };
    let setup = Setup { max: Limit::Max, group: "/gold", oom, ..Setup::default() };
    let mut a = super::ladders::holding(&controller, "a", setup, 500).await;
    let calm = member(&controller, "b", "/iron", 500).await;
    a.touch(3000).await;
    a.report.held = true;
    a.tell().await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    let gold = group(&controller, "/gold").await.memory;
    assert_eq!((gold.events.oom, gold.events_local.oom, gold.events.oom_kill), (1, 1, 1));
    let own = vm(&controller, "a").await.memory.events;
    assert_eq!((own.oom, own.oom_kill, own.failcnt), (0, 1, 0), "its own limit was not met");
    assert_eq!(group(&controller, "/").await.memory.events_local.oom, 0);
    assert_eq!(vm(&controller, "b").await.state, VmState::Running);
    let event = a.has_event(EventKind::VictimSelected).await.expect("an event");
    assert_eq!((&event.details["limit_of"], event.vm.as_deref()), (&"/gold".into(), Some("a")));
    drop(calm);
}

/// Who gives is who uses most above its protection, and a guest without a driver is not asked.
/// Semantics: 41, 63, T2.
#[tokio::test(start_paused = true)]
async fn a_group_s_need_is_spread_over_the_balloons_of_its_vms() {
    let controller = groups(8192, 4096).await;
    let mut workers = Vec::new();
    for (name, guest) in [("a", 2000), ("b", 1000), ("c", 1000)] {
        let mut worker = member(&controller, name, "/gold", guest).await;
        worker.report.balloon_ready = name != "c";
        worker.tell().await;
        workers.push(worker);
    }
    let protect =
        MemoryChange { patch: LimitPatch { low: Some(pages(1200)), ..LimitPatch::default() }, ..change(Limit::Max) };
    controller.change("b", protect).await.expect("protected");
    let asked = controller.clone();
    let answer = tokio::spawn(async move { asked.change_group("/gold", change(pages(4000))).await });
    for worker in &mut workers {
        worker.answer_recall().await;
    }
    while group(&controller, "/gold").await.memory.max_pending_bytes.is_none() {}
    let targets = |vms: Vec<VmView>| vms.iter().map(|vm| vm.balloon.target_bytes / 4096).collect::<Vec<_>>();
    let usage = 4000 + 3 * RESERVE;
    // The group should come down to its high: 1024 pages below its max.
    let need = usage - (4000 - 1024);
    let now = targets(controller.list().await.expect("listed"));
    assert_eq!(now, [SIZE - (2000 - need), 0, 0], "a alone has something above its protection and a driver");
    workers[0].free(need).await;
    let changed = answer.await.expect("no panic").expect("reached");
    assert!(changed.in_force);
    // With room again, it gets some back every second, until it has all of it.
    workers[0].free(500).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let later = targets(controller.list().await.expect("listed"));
    assert!(later[0] < now[0], "{later:?}");
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert_eq!(targets(controller.list().await.expect("listed")), [0, 0, 0]);
}

/// Of two guests with a driver, the one that is busy keeps its memory as long as the other has some that nobody uses, whether
/// that is aside already or only known from its working set. Protection comes before either.
/// Semantics: 41, 63, T2.
#[tokio::test(start_paused = true)]
async fn the_balloon_of_a_busy_vm_is_left_alone_while_a_neighbour_is_idle() {
    type Says = fn(&mut Report);
    let aside: Says = |report| report.idle = 1400;
    let known: Says = |report| {
        (report.cold.working_set, report.cold.error) = (Some(60), 40);
        report.cold.ages = [100, 0, 0, 1400, 0, 0, 0, 0];
    };
    let all: Says = |report| {
        (report.cold.working_set, report.cold.error) = (Some(1500), 0);
        report.cold.ages = [1500, 0, 0, 0, 0, 0, 0, 0];
    };
    let nothing: Says = |_| ();
    let low = |low| LimitPatch { low: Some(pages(low)), ..LimitPatch::default() };
    let min = |min| LimitPatch { min: Some(pages(min)), ..LimitPatch::default() };
    let need = 2 * (1500 + RESERVE) - (3400 - 1024);
    // What is known of each, the limits of the first, and what it gives.
    for (of_a, of_b, patch, gives_of_a) in [
        (aside, nothing, LimitPatch::default(), need - 20..=need),
        (known, all, LimitPatch::default(), need - 20..=need),
        (nothing, nothing, LimitPatch::default(), need / 2..=need / 2),
        (all, aside, LimitPatch::default(), 0..=20),
        (aside, nothing, low(1500 + RESERVE), 0..=0),
        (aside, nothing, min(1500 + RESERVE - 300), 300..=300),
    ] {
        let controller = groups(3400, 4096).await;
        let mut workers =
            [member(&controller, "a", "/gold", 1500).await, member(&controller, "b", "/gold", 1500).await];
        controller.change("a", MemoryChange { patch, ..change(Limit::Max) }).await.expect("protected");
        for (worker, says) in workers.iter_mut().zip([of_a, of_b]) {
            worker.report.returned_total += worker.report.stock;
            worker.report.stock = 0;
            says(&mut worker.report);
            worker.tell().await;
        }
        for worker in &mut workers {
            worker.report.balloon_ready = true;
            worker.tell().await;
        }
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let asked = |vm: &VmView| (vm.balloon.target_bytes / 4096).saturating_sub(SIZE - 1500);
        let vms = controller.list().await.expect("listed");
        let (a, b) = (asked(&vms[0]), asked(&vms[1]));
        assert!(gives_of_a.contains(&a), "{a} of {need}, {gives_of_a:?} expected");
        assert_eq!(a + b, need);
    }
}

/// What a VM was asked to come down to it gets back when it is promised more, however full its group is.
/// Semantics: T2.
#[tokio::test(start_paused = true)]
async fn a_balloon_that_a_group_has_asked_for_honours_a_promise_that_comes_later() {
    let controller = groups(3000, 4096).await;
    let mut a = member(&controller, "a", "/gold", 2500).await;
    a.report.balloon_ready = true;
    a.tell().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let asked = async || vm(&controller, "a").await.balloon.target_bytes / 4096;
    assert!(asked().await > SIZE - (2100 - RESERVE), "{}", asked().await);
    let patch = LimitPatch { min: Some(pages(2100)), ..LimitPatch::default() };
    controller.change("a", MemoryChange { patch, ..change(Limit::Max) }).await.expect("it fits");
    assert_eq!(asked().await, SIZE - (2100 - RESERVE), "it may use what it is promised");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(asked().await, SIZE - (2100 - RESERVE), "and nobody takes it again");
}

/// A group that is above its high asks those whose driver comes later, too.
/// Semantics: 41.
#[tokio::test(start_paused = true)]
async fn a_driver_that_comes_when_its_group_is_above_its_high_is_asked() {
    let controller = groups(3000, 4096).await;
    let mut booting = member(&controller, "a", "/gold", 2500).await;
    assert_eq!(vm(&controller, "a").await.balloon.target_bytes, 0, "it has no driver yet");
    booting.report.balloon_ready = true;
    booting.tell().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(vm(&controller, "a").await.balloon.target_bytes > 0);
    // It gives all that it has to, and gets it back when its group is not in its way any more.
    booting.free(1000).await;
    controller.change_group("/gold", change(Limit::Max)).await.expect("raised");
    assert_eq!(vm(&controller, "a").await.balloon.target_bytes, 0);
}

/// What a guest that has stalled does not give, the others give.
/// Semantics: 41, 42.
#[tokio::test(start_paused = true)]
async fn the_others_are_asked_for_what_a_stalled_guest_does_not_give() {
    let controller = groups(3400, 4096).await;
    let mut workers = Vec::new();
    for name in ["a", "b"] {
        let mut worker = member(&controller, name, "/gold", 1500).await;
        worker.report.balloon_ready = true;
        worker.tell().await;
        workers.push(worker);
    }
    let asked = async |name| vm(&controller, name).await.balloon.target_bytes;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (of_a, of_b) = (asked("a").await, asked("b").await);
    assert!(of_a > 0 && of_b > 0, "{of_a} {of_b}");
    let balloon = of_b / 4096;
    (workers[1].report.ballooned, workers[1].report.balloon_actual) = (balloon, u32::try_from(balloon).unwrap());
    workers[1].free(balloon - (SIZE - 1500)).await;
    assert_eq!(asked("b").await, of_b, "it has given its share");
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(vm(&controller, "a").await.balloon.progress, Some(BalloonProgress::Stalled));
    // The group should come down to 1024 pages below its max.
    let need = 3000 + 2 * RESERVE - (3400 - 1024);
    assert_eq!(asked("b").await, (SIZE - (1500 - need)) * 4096, "b alone is asked for all of it");
    assert!(asked("a").await > 0, "which still should");
}

/// A group that is removed while memory of its VMs is not back is shown with what is left, and its path is free.
/// Semantics: 13, 20, 90.
#[tokio::test(start_paused = true)]
async fn a_removed_group_is_shown_as_dying_until_its_charges_are_back() {
    let controller = groups(4096, 4096).await;
    let a = member(&controller, "a", "/gold", 1000).await;
    assert_eq!(controller.remove_group("/gold").await.expect_err("a VM is in it").code, Code::NotEmpty);
    a.die(Death::Signal(9)).await;
    controller.remove_group("/gold").await.expect("nothing runs in it");
    let dying: Vec<_> = controller.groups().await.expect("listed").into_iter().filter(|group| group.dying).collect();
    assert_eq!((dying.len(), dying[0].path.as_str()), (1, "/gold"));
    assert!(dying[0].memory.current_bytes > 1000 * 4096);
    assert_eq!(dying[0].memory.returning_bytes, dying[0].memory.current_bytes);
    assert_eq!(controller.group("/gold").await.expect_err("its name is gone").code, Code::NotFound);
    assert!(controller.put_group("/gold", change(pages(100))).await.expect("the path is free").0);
    while controller.host().await.expect("shown").current_bytes > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let left: Vec<_> =
        controller.groups().await.expect("listed").into_iter().map(|group| (group.path, group.dying)).collect();
    assert_eq!(left, [("/".to_owned(), false), ("/gold".to_owned(), false), ("/iron".to_owned(), false)]);
}

/// A promise that is short already, for whatever reason, is not in the way of what makes it no worse.
/// Semantics: T2.
#[tokio::test(start_paused = true)]
async fn promises_refuse_what_makes_them_worse_and_nothing_else() {
    let controller = groups(4096, 4096).await;
    let a = member(&controller, "a", "/gold", 10).await;
    let b = member(&controller, "b", "/gold", 10).await;
    let min = |pages: u64| {
        let patch = LimitPatch { min: Some(super::pages(pages)), ..LimitPatch::default() };
        MemoryChange { patch, ..change(Limit::Max) }
    };
    controller.change("a", min(3000)).await.expect("promised");
    let refusal = controller.change("b", min(1500)).await.expect_err("together too much");
    assert_eq!((refusal.code, refusal.missing_bytes), (Code::DoesNotFit, Some(404 * 4096)));
    controller.change("b", min(1096)).await.expect("it fits exactly");
    // Both in one transaction: what one gives up the other may have.
    let node = |name: &str, pages| NodeChange::vm(name, &min(pages));
    let swap = vec![node("a", 1096), node("b", 3000)];
    assert!(controller.change_many(swap, Mode::Reclaim, None).await.expect("it fits").in_force);
    let force = MemoryChange { mode: Mode::Force, ..change(pages(4000)) };
    assert_eq!(controller.change_group("/gold", force).await.expect_err("also by force").code, Code::DoesNotFit);
    let refused = controller.move_group("/gold", "/iron").await;
    assert!(refused.is_ok(), "4096 fit 4096: {refused:?}");
    let more =
        MemoryChange { patch: LimitPatch { min: Some(pages(1)), ..LimitPatch::default() }, ..change(Limit::Max) };
    let refusal = controller.put_group("/iron/x", more).await.expect_err("no page is left");
    assert_eq!((refusal.code, refusal.missing_bytes), (Code::DoesNotFit, Some(4096)));
    drop((a, b));
}

/// A group whose path nobody may write cannot come about by a move either.
/// Semantics: 32.
#[tokio::test(start_paused = true)]
async fn a_move_makes_no_path_that_is_too_long() {
    let controller = groups(4096, 4096).await;
    for path in ["/a", "/a/b", "/a/b/c", "/iron/x", "/iron/x/y", "/iron/x/y/z"] {
        controller.put_group(path, change(Limit::Max)).await.expect("made");
    }
    let refusal = controller.move_group("/a", "/iron/x/y/z").await.expect_err("seven names");
    assert_eq!(refusal.code, Code::WrongState);
    assert!(refusal.message.contains("at most 6 names"), "{}", refusal.message);
    controller.move_group("/a", "/iron/x/y").await.expect("six names");
    controller.remove_group("/iron/x/y/a/b/c").await.expect("its path can be written");
    let refusal = controller.move_group("/iron/x", "/iron/x/y/a/b").await.expect_err("into itself");
    assert!(refusal.message.contains("itself"), "{}", refusal.message);
}

//! A controller that begins where another has ended: what it believes of its journal and of its workers.

use super::super::actor::Actor;
use super::super::error::Code;
use super::super::journal::{Entry, Journal, Remembered, Store};
use super::super::view::{GroupView, VmState};
use super::super::{MemoryChange, view::PausedBy};
use super::*;
use memcg_core::limit_change::Mode;
use std::io;
use std::sync::Mutex;

/// Pages of the stock that [`holding`] has.
const STOCK: u64 = 10;

/// A journal in memory, that can be full.
#[derive(Clone, Default)]
struct Disk {
    text: Arc<Mutex<Vec<u8>>>,
    full: Arc<AtomicBool>,
}

impl Store for Disk {
    fn make_room(&mut self) -> io::Result<()> {
        if self.full.load(Ordering::Relaxed) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn append(&mut self, line: &[u8]) -> io::Result<u64> {
        self.make_room()?;
        let mut text = self.text.lock().expect("no panic");
        text.extend(line);
        Ok(text.len() as u64)
    }

    fn replace(&mut self, lines: &[u8]) -> io::Result<u64> {
        self.text.lock().expect("no panic").clear();
        self.append(lines)
    }
}

impl Disk {
    /// The controller's next life on this disk, and what it remembers.
    fn live(&self) -> (Controller, Remembered) {
        let text = self.text.lock().expect("no panic").clone();
        let (remembered, journal) = Journal::reopen(&text, Box::new(self.clone())).expect("whole");
        (Controller::start_with(Limit::Max, journal).0, remembered)
    }
}

fn config() -> Arc<VmConfig> {
    let text = r#"{"kernel": "/k", "memory": {"size_bytes": 268435456, "max_bytes": 16777216}}"#;
    Arc::new(serde_json::from_str(text).expect("understood"))
}

fn setup(accounting: bool) -> Setup {
    Setup { config: Some(config()), accounting, ..Setup::default() }
}

/// A running VM of a first controller, which then is there no more.
async fn left_behind(disk: &Disk, setup: Setup) -> FakeWorker {
    let (controller, _) = disk.live();
    let mut worker = FakeWorker::add_to(&controller, "vm", setup).await.expect("added");
    worker.hello().await;
    worker.say(FromWorker::Loaded { plan: 0 }).await;
    while worker.try_next().await.is_some() {}
    worker
}

/// What a worker says to a second controller: it holds `guest` pages.
fn holding(guest: u64) -> Hello {
    let granted_total = 500 + guest + STOCK + RESERVE;
    let report = Report {
        epoch: 1,
        granted_total,
        returned_total: 500,
        guest,
        stock: STOCK,
        reserve: RESERVE,
        ..Report::default()
    };
    Hello { loaded: Some(3), started: true, report, ..hello(true) }
}

/// Takes the only VM over.
async fn take_over(disk: &Disk, said: Hello) -> FakeWorker {
    let (controller, remembered) = disk.live();
    restored(controller, &remembered, said).await
}

/// The only VM, whose worker has said hello.
async fn restored(controller: Controller, remembered: &Remembered, said: Hello) -> FakeWorker {
    let vm = remembered.vms().next().expect("one is remembered").clone();
    let id = controller.ask(move |actor, reply| super::super::actor::answer(reply, actor.restore(&vm, None))).await;
    let id = id.expect("restored");
    let (to_worker, inbox) = mpsc::channel(64);
    let killed = Arc::new(AtomicBool::new(false));
    let end = controller.attach(id, Box::new(Puppet(Arc::clone(&killed))), to_worker).await.expect("attached");
    let held = said.report.granted_total.saturating_sub(said.report.returned_total);
    let report = Report { epoch: 0, granted_total: held, returned_total: 0, ..said.report };
    let (accounting, grant) = (said.accounting, (0, 0, 0, false));
    let (leases, aim, evicts) = ((0, 0), u64::MAX, false);
    let worker = FakeWorker { controller, id, inbox, killed, end, accounting, report, grant, leases, aim, evicts };
    worker.say(FromWorker::Hello(said)).await;
    worker
}

async fn messages(worker: &mut FakeWorker) -> Vec<ToWorker> {
    let mut messages = Vec::new();
    while let Some(message) = worker.try_next().await {
        messages.push(message);
    }
    messages
}

async fn usage(controller: &Controller) -> u64 {
    controller.host().await.expect("shown").current_bytes / 4096
}

/// Pages that the VM costs beside its pages.
fn overhead() -> u64 {
    config().spec("vm").expect("sensible").overhead.iter().map(|part| part.pages().0).sum()
}

/// What the worker has evicted is counted anew, too: its store is part of what it holds, and swap is beside it.
#[tokio::test(start_paused = true)]
async fn what_the_worker_has_evicted_is_counted_on_from_there() {
    let disk = Disk::default();
    left_behind(&disk, setup(true)).await;
    let mut said = holding(2000);
    (said.report.guest, said.report.store, said.report.swapped) = (1700, 300, 1200);
    let worker = take_over(&disk, said).await;
    let host = worker.controller.group("/").await.expect("shown");
    assert_eq!(host.swap.current_bytes, 1200 * 4096);
    let vm = worker.controller.list().await.expect("listed").remove(0);
    assert_eq!((vm.swap.current_bytes, vm.memory.stat.store_bytes), (1200 * 4096, 300 * 4096));
    let check = worker.controller.host().await.expect("shown").current_bytes / 4096;
    assert!(check >= 2000 + STOCK + RESERVE + overhead());
}

#[tokio::test(start_paused = true)]
async fn what_the_worker_holds_is_charged_and_counted_on_from_there() {
    let disk = Disk::default();
    left_behind(&disk, setup(true)).await;
    let mut worker = take_over(&disk, holding(2000)).await;
    let messages = messages(&mut worker).await;
    let held = 2000 + STOCK + RESERVE;
    let ToWorker::Grant { epoch: 2, granted_total, refused: false, .. } = messages[0] else { panic!("{messages:?}") };
    assert!(granted_total >= held, "{messages:?}");
    assert!(!messages.contains(&ToWorker::Start), "it runs already");
    assert_eq!(usage(&worker.controller).await, granted_total + overhead());
    let event = worker.has_event(EventKind::Adopted).await.expect("said");
    assert_eq!((event.details["guest_bytes"].as_u64(), event.details["life"].as_u64()), (Some(2000 * 4096), Some(2)));
    assert!(worker.has_event(EventKind::Created).await.is_none());

    // A report in the old count says nothing about this one, however often it comes.
    let old = Report { epoch: 1, granted_total: 9999, returned_total: 9000, guest: 999, ..Report::default() };
    worker.say(FromWorker::Report(old)).await;
    assert_eq!(usage(&worker.controller).await, granted_total + overhead());
    assert!(!worker.killed());
    worker.report.epoch = 2;
    worker.book();
    worker.free(100).await;
    assert_eq!(usage(&worker.controller).await, granted_total + overhead() - 100);
    let view = worker.view().await;
    assert_eq!((view.state, view.memory.stat.guest_bytes), (VmState::Running, 1900 * 4096));
    assert!(!worker.killed());
}

/// What looks like room may be what a VM of the same group holds that is not counted yet.
#[tokio::test(start_paused = true)]
async fn nothing_is_granted_before_every_vm_is_counted() {
    let disk = Disk::default();
    left_behind(&disk, setup(true)).await;
    let (controller, remembered) = disk.live();
    let ask = |what: fn(&mut Actor)| {
        let controller = controller.clone();
        async move {
            let done = controller.ask(move |actor, reply| {
                what(actor);
                super::super::actor::answer(reply, Ok(()));
            });
            done.await.expect("the controller is there");
        }
    };
    ask(Actor::begin_recount).await;
    let mut worker = restored(controller.clone(), &remembered, holding(2000)).await;
    let wants = Report { want: 9, want_now: 9, epoch: 2, ..worker.report };
    worker.say(FromWorker::Report(wants)).await;
    assert_eq!(messages(&mut worker).await, []);
    let held = 2000 + STOCK + RESERVE + overhead();
    assert_eq!(usage(&controller).await, held, "it is charged at once");
    ask(Actor::end_recount).await;
    assert!(matches!(messages(&mut worker).await[0], ToWorker::Grant { epoch: 2, refused: false, .. }));
    assert!(usage(&controller).await > held);
}

/// What pages cost is overhead for the next controller as it was for the last, and no page of it is charged twice.
/// Semantics: 14.
#[tokio::test(start_paused = true)]
async fn what_pages_have_cost_is_overhead_again() {
    let disk = Disk::default();
    left_behind(&disk, setup(true)).await;
    let mut said = holding(2000);
    (said.report.tables, said.report.records, said.report.guest) = (10, 2, 2000 - 12);
    let mut worker = take_over(&disk, said).await;
    let messages = messages(&mut worker).await;
    let ToWorker::Grant { granted_total, .. } = messages[0] else { panic!("{messages:?}") };
    assert_eq!(usage(&worker.controller).await, granted_total + overhead());
    worker.report.epoch = 2;
    let view = worker.view().await;
    assert_eq!(view.vmm.current_bytes, (overhead() + 12) * 4096);
    assert!(!worker.killed());
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_claims_what_it_cannot_have_is_ended() {
    let report = |change: fn(&mut Report)| {
        let mut said = holding(2000);
        change(&mut said.report);
        said
    };
    for (lie, said) in [
        ("more than all", holding(SIZE + 2048)),
        ("more RAM than it has", report(|r| (r.guest, r.granted_total) = (SIZE + 1, 500 + SIZE + 1 + STOCK + RESERVE))),
        ("more than granted", report(|r| r.stock += 1)),
        ("less than granted", report(|r| r.stock -= 1)),
        ("returned more than granted", report(|r| r.returned_total = r.granted_total + 1)),
        ("overflows", report(|r| (r.guest, r.stock) = (u64::MAX, u64::MAX))),
        (
            "more tables than RAM needs",
            report(|r| (r.tables, r.guest) = (most_tables() + 1, r.guest - most_tables() - 1)),
        ),
        ("a life to come", report(|r| r.epoch = 2)),
        ("a balloon larger than RAM", report(|r| r.ballooned = SIZE + 1)),
        ("no account", Hello { report: Report::default(), reserve_target: 0, accounting: false, ..holding(0) }),
        ("another VM", Hello { instance: INSTANCE + 1, ..holding(2000) }),
        ("another size", Hello { ram: [RamSlot::default(); 2], ..holding(2000) }),
    ] {
        let disk = Disk::default();
        left_behind(&disk, setup(true)).await;
        let worker = take_over(&disk, said).await;
        assert_eq!(usage(&worker.controller).await, overhead(), "{lie}");
        assert!(worker.killed(), "{lie}");
        assert!(matches!(worker.die(Death::Unknown).await, VmEnd::Died { .. }), "{lie}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_has_just_been_started_holds_nothing_yet() {
    for said in [holding(0), Hello { started: true, ..hello(true) }] {
        let worker = FakeWorker::add(Setup::default()).await;
        worker.say(FromWorker::Hello(said)).await;
        worker.controller.host().await.expect("alive");
        assert!(worker.killed());
    }
}

#[tokio::test(start_paused = true)]
async fn more_than_the_limit_is_an_overcharge_and_no_reason_to_kill() {
    let disk = Disk::default();
    left_behind(&disk, setup(true)).await;
    let mut worker = take_over(&disk, holding(5000)).await;
    let messages = messages(&mut worker).await;
    assert!(matches!(messages[0], ToWorker::Grant { granted_total, .. } if granted_total == 5000 + STOCK + RESERVE));
    worker.report.epoch = 2;
    let view = worker.view().await;
    assert_eq!(view.memory.stat.overcharge_bytes, (5000 + STOCK + RESERVE + overhead() - 4096) * 4096);
    assert!(!worker.killed());
}

#[tokio::test(start_paused = true)]
async fn a_pause_stays_by_the_same_hand() {
    let disk = Disk::default();
    let worker = left_behind(&disk, setup(true)).await;
    let pausing = tokio::spawn({
        let controller = worker.controller.clone();
        async move { controller.pause("vm").await }
    });
    worker.controller.host().await.expect("alive");
    // It has heard of it, or not yet: remembered it is.
    for paused in [true, false] {
        let mut worker = take_over(&disk, Hello { paused, ..holding(1000) }).await;
        let messages = messages(&mut worker).await;
        assert_eq!(messages.iter().any(|m| matches!(m, ToWorker::Pause { .. })), !paused, "{messages:?}");
        assert!(!messages.iter().any(|m| matches!(m, ToWorker::Resume { .. })), "{messages:?}");
        let list = worker.controller.list().await.expect("listed");
        assert_eq!(list[0].state, VmState::Paused);
    }
    pausing.abort();
}

/// Who was paused for others gives all that it has to the next controller, too, and goes on when there is room for what it gave.
/// Semantics: T7.
#[tokio::test(start_paused = true)]
async fn one_that_was_emptied_goes_on_giving_and_goes_on_when_there_is_room() {
    let disk = Disk::default();
    left_behind(&disk, setup(true)).await;
    let line = serde_json::to_vec(&Entry::Paused { vm: "vm".to_owned(), by: PausedBy::Group }).expect("plain");
    disk.text.lock().expect("no panic").extend([&line[..], b"\n"].concat());
    let mut said = holding(2000);
    (said.report.guest, said.report.store, said.report.swapped) = (800, 1200, 5000);
    said.paused = true;
    let mut worker = take_over(&disk, said).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = messages(&mut worker).await;
    assert!(before.iter().any(|message| matches!(message, ToWorker::Reclaim { aim } if *aim <= RESERVE)), "{before:?}");
    let goes_on = |messages: &[ToWorker]| messages.iter().any(|message| matches!(message, ToWorker::Resume { .. }));
    assert!(!goes_on(&before), "what it gave does not fit");
    worker.controller.change("vm", super::limits::change(pages(8192))).await.expect("raised");
    let at_once = messages(&mut worker).await;
    assert!(!goes_on(&at_once), "it may have been chosen a moment ago, and has given little yet: {at_once:?}");
    tokio::time::sleep(memcg_core::oom::RETURNS).await;
    let after = messages(&mut worker).await;
    assert!(goes_on(&after), "{after:?}");
}

#[tokio::test(start_paused = true)]
async fn a_pause_that_was_taken_back_before_the_worker_heard_of_it_is_taken_back_again() {
    let disk = Disk::default();
    left_behind(&disk, setup(true)).await;
    let mut worker = take_over(&disk, Hello { paused: true, ..holding(1000) }).await;
    let messages = messages(&mut worker).await;
    assert!(messages.iter().any(|m| matches!(m, ToWorker::Resume { .. })), "{messages:?}");
    assert_eq!(worker.controller.list().await.expect("listed")[0].state, VmState::Running);
}

#[tokio::test(start_paused = true)]
async fn limits_are_those_in_force_and_their_generation_goes_on() {
    let disk = Disk::default();
    let worker = left_behind(&disk, setup(true)).await;
    let max = |n| MemoryChange { patch: LimitPatch::max(pages(n)), mode: Mode::Reclaim, track: None, wait: None };
    let mut generation = 0;
    for n in [5000, 6000, 7000] {
        let changed = worker.controller.change("vm", max(n)).await.expect("changed");
        assert!(changed.in_force);
        generation = changed.view.generation;
    }
    let worker = take_over(&disk, holding(1000)).await;
    let view = worker.controller.list().await.expect("listed").remove(0);
    assert_eq!((view.memory.max_bytes, view.generation), (Some(7000 * 4096), generation));
}

/// Accounting had begun, and the controller died before it was told.
#[tokio::test(start_paused = true)]
async fn an_account_that_nobody_remembers_is_there_all_the_same() {
    let disk = Disk::default();
    let unlimited = r#"{"kernel": "/k", "memory": {"size_bytes": 268435456}}"#;
    let config = Some(Arc::new(serde_json::from_str(unlimited).expect("understood")));
    let setup = Setup { config, max: Limit::Max, accounting: false, ..Setup::default() };
    left_behind(&disk, setup).await;
    let mut said = holding(1000);
    (said.report.stock, said.report.reserve, said.report.debt) = (0, 0, RESERVE);
    said.report.returned_total += STOCK + RESERVE;
    let mut worker = take_over(&disk, said).await;
    let messages = messages(&mut worker).await;
    let ToWorker::Grant { granted_total, .. } = messages[0] else { panic!("{messages:?}") };
    assert!(granted_total >= 1000 + RESERVE, "the reserve is granted");
    let view = worker.controller.list().await.expect("listed").remove(0);
    assert!(view.accounting && view.vmm.current_bytes > 0, "{view:?}");
    assert!(usage(&worker.controller).await > granted_total, "its overhead is charged, too");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_was_loaded_and_never_started_is_started() {
    let disk = Disk::default();
    left_behind(&disk, setup(true)).await;
    let mut worker = take_over(&disk, Hello { started: false, ..holding(10) }).await;
    assert!(messages(&mut worker).await.contains(&ToWorker::Start));
    // One that is still loading is started when it says that it has.
    let mut worker = take_over(&disk, Hello { started: false, loaded: None, ..holding(10) }).await;
    assert!(!messages(&mut worker).await.contains(&ToWorker::Start));
    worker.say(FromWorker::Loaded { plan: 10 }).await;
    assert!(messages(&mut worker).await.contains(&ToWorker::Start));
    assert!(!worker.killed());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_remembered_is_not_done() {
    let disk = Disk::default();
    let mut worker = left_behind(&disk, setup(true)).await;
    disk.full.store(true, Ordering::Relaxed);
    let controller = worker.controller.clone();
    let Err(refusal) = FakeWorker::add_to(&controller, "db", setup(true)).await else { panic!("made") };
    assert_eq!((refusal.code, refusal.code.status()), (Code::CannotRemember, 507), "{refusal}");
    let change = MemoryChange { patch: LimitPatch::max(pages(9000)), mode: Mode::Force, track: None, wait: None };
    assert_eq!(controller.change("vm", change).await.expect_err("full").code, Code::CannotRemember);
    assert_eq!(controller.pause("vm").await.expect_err("full").code, Code::CannotRemember);
    assert_eq!(controller.resume("vm").await.expect_err("full").code, Code::CannotRemember);
    let vm = controller.list().await.expect("listed");
    assert_eq!((vm.len(), vm[0].state, vm[0].memory.max_bytes), (1, VmState::Running, Some(4096 * 4096)));
    assert_eq!(messages(&mut worker).await, []);
    disk.full.store(false, Ordering::Relaxed);
    assert!(controller.change("vm", change).await.expect("room").in_force);
}

#[tokio::test(start_paused = true)]
async fn a_vm_that_ended_is_shown_and_one_that_was_removed_is_not() {
    let disk = Disk::default();
    let worker = left_behind(&disk, setup(true)).await;
    let controller = worker.controller.clone();
    worker.exit(ExitReason::PowerOff).await;
    let (_, remembered) = disk.live();
    assert_eq!(
        remembered.vms().next().and_then(|vm| vm.ended.clone()).as_deref(),
        Some("the guest powered itself off")
    );
    controller.remove("vm").await.expect("removed");
    let (_, remembered) = disk.live();
    assert_eq!(remembered.vms().count(), 0);
    let line = serde_json::to_string(&Entry::Paused { vm: "vm".to_owned(), by: PausedBy::User }).expect("plain");
    assert_eq!(line, r#"{"paused":{"vm":"vm","by":"user"}}"#);
}

/// An account that began without a limit goes on in the next life, wherever it began.
#[tokio::test(start_paused = true)]
async fn groups_that_are_tracked_without_a_limit_stay_tracked() {
    let on = MemoryChange { patch: LimitPatch::default(), mode: Mode::Reclaim, track: Some(true), wait: None };
    let nothing = MemoryChange { track: None, ..on };
    let disk = Disk::default();
    let (controller, _) = disk.live();
    for path in ["/asked", "/asked/inside", "/into", "/moves", "/free"] {
        controller.put_group(path, nothing).await.expect("made");
    }
    controller.change_group("/asked", on).await.expect("tracked");
    controller.change_group("/into", on).await.expect("tracked");
    controller.move_group("/moves", "/into").await.expect("moved");
    controller.move_group("/into/moves", "/").await.expect("moved");
    let accounts =
        |groups: Vec<GroupView>| groups.into_iter().map(|group| (group.path, group.accounting)).collect::<Vec<_>>();
    let next = |disk: &Disk| {
        let (controller, remembered) = disk.live();
        async move {
            controller.take_over(std::path::Path::new("/nowhere"), &remembered).await.expect("taken over");
            let groups = accounts(controller.groups().await.expect("listed"));
            (controller, groups)
        }
    };
    let before = accounts(controller.groups().await.expect("listed"));
    let expected =
        [("/", false), ("/asked", true), ("/asked/inside", true), ("/free", false), ("/into", true), ("/moves", true)];
    assert_eq!(before, expected.map(|(path, on)| (path.to_owned(), on)));
    let (controller, groups) = next(&disk).await;
    assert_eq!(groups, before);
    let restarted = &controller.events(1).await.expect("events")[0];
    assert_eq!((restarted.event, &restarted.details["life"]), (EventKind::Restarted, &2.into()));
    controller.change_group("/", on).await.expect("tracked");
    for _ in 0..2 {
        let (_, groups) = next(&disk).await;
        assert!(groups.iter().all(|(_, on)| *on), "{groups:?}");
    }
}

/// What is shown of a VM that has ended says where its group is now, and `start` finds it there.
#[tokio::test(start_paused = true)]
async fn a_vm_that_has_ended_goes_where_its_group_goes() {
    let disk = Disk::default();
    let (controller, _) = disk.live();
    let nothing = MemoryChange { patch: LimitPatch::default(), mode: Mode::Reclaim, track: None, wait: None };
    for path in ["/gold", "/goldfish", "/iron"] {
        controller.put_group(path, nothing).await.expect("made");
    }
    for (name, group) in [("vm", "/gold"), ("other", "/goldfish")] {
        let mut worker = FakeWorker::add_to(&controller, name, Setup { group, ..setup(true) }).await.expect("added");
        worker.hello().await;
        worker.say(FromWorker::Loaded { plan: 0 }).await;
        worker.exit(ExitReason::PowerOff).await;
        controller
            .ask(|actor, reply| {
                let ids: Vec<_> = actor.vms.iter().map(|(id, _)| id).collect();
                ids.into_iter().for_each(|id| actor.memory_is_back(id));
                super::super::actor::answer(reply, Ok(()));
            })
            .await
            .expect("settled");
    }
    controller.move_group("/gold", "/iron").await.expect("moved");
    let vms = controller.list().await.expect("listed");
    let groups: Vec<_> = vms.iter().map(|vm| (vm.name.as_str(), vm.group.as_str())).collect();
    assert_eq!(groups, [("other", "/goldfish"), ("vm", "/iron/gold")]);
    assert_eq!(controller.config("vm").await.expect("known").group, "/iron/gold");
    let (_, remembered) = disk.live();
    assert_eq!(remembered.vms().next().map(|vm| vm.group.as_str()), Some("/iron/gold"));
}

/// A VM is made anew while one of its name is still shown: removing that one does not make the new one forgotten.
#[tokio::test(start_paused = true)]
async fn what_is_made_again_is_remembered_when_its_forerunner_is_removed() {
    let disk = Disk::default();
    let (controller, _) = disk.live();
    let old = FakeWorker::add_to(&controller, "vm", setup(true)).await.expect("added");
    old.die(Death::Exited(0)).await;
    let spec = VmSpec { config: Some(config()), ..config().spec("vm").expect("sensible") };
    controller.create(spec).await.expect("its name is free");
    controller.remove("vm").await.expect("the one that has ended");
    let (_, remembered) = disk.live();
    let vms: Vec<_> = remembered.vms().map(|vm| (vm.name.as_str(), vm.ended.as_deref())).collect();
    assert_eq!(vms, [("vm", None)]);
}

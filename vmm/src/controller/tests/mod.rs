//! The actor against a worker that the test plays, over the actor's own channels and in paused time: a deadline of
//! ten seconds passes at once, and nothing but the actor's decisions is under test.

mod activation;
mod admission;
mod adopt;
mod audit;
mod balloon;
mod clients;
mod cold;
mod crowd;
mod fleet;
mod fuzz;
mod grants;
mod groups;
mod ladders;
mod limits;
mod oom_log;
mod pressure;
mod questions;
mod requests;
mod resume;
mod shortage;
mod stop;
mod victims;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use memcg_core::spread::DEFAULT_SHARES;
use memcg_core::tree::{LimitPatch, Overhead};
use memcg_core::units::{Limit, Pages};
use tokio::sync::{mpsc, oneshot};

use super::config::VmConfig;
use super::console::ConsoleLog;
use super::error::Refusal;
use super::events::{Event, EventKind};
use super::link::FromLink;
use super::overhead::Part;
use super::spawn::Death;
use super::view::{OomAction, VmView};
use super::{Controller, OomPolicy, VmEnd, VmId, VmSpec, WorkerProcess};
use crate::worker::protocol::{Area, ExitReason, FromWorker, Hello, RamSlot, Report, ToWorker};

/// Pages of RAM of the VM under test: 256 MiB.
const SIZE: u64 = 65536;

/// What its worker calls itself.
const INSTANCE: u64 = 99;

/// Pages of its reserve: one vCPU.
const RESERVE: u64 = 65 + 64;

/// Pages that a VM's overhead grows by when it uses all its RAM.
fn growth() -> u64 {
    memcg_core::frame::Cost::most(Pages(SIZE)).total().0
}

/// Page tables that a VM of [`SIZE`] pays for at most.
fn most_tables() -> u64 {
    memcg_core::frame::Cost::most(Pages(SIZE)).tables.0
}

/// A process that is a flag.
struct Puppet(Arc<AtomicBool>);

impl WorkerProcess for Puppet {
    fn pid(&self) -> i32 {
        4711
    }

    fn kill(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// There is no guest.
    fn guest_ran(&self) -> Option<Duration> {
        Some(Duration::ZERO)
    }
}

/// A worker that does what the test says; it keeps an honest account unless it is told otherwise.
struct FakeWorker {
    controller: Controller,
    id: VmId,
    inbox: mpsc::Receiver<ToWorker>,
    killed: Arc<AtomicBool>,
    end: oneshot::Receiver<VmEnd>,
    accounting: bool,
    /// What it says in its next report.
    report: Report,
    /// The last grant: total, largest stock, room, refused.
    grant: (u64, u64, u64, bool),
    /// What it may have in swap and in its store.
    leases: (u64, u64),
    /// What it is to come down to by eviction.
    aim: u64,
    evicts: bool,
}

/// How the VM under test is made.
struct Setup {
    cpus: u32,
    max: Limit,
    accounting: bool,
    shares: u32,
    oom: OomPolicy,
    overhead: Vec<Part>,
    config: Option<Arc<VmConfig>>,
    group: &'static str,
    queue: usize,
    /// Its worker has a store.
    evicts: bool,
}

impl Default for Setup {
    fn default() -> Self {
        let oom = OomPolicy { action: OomAction::Pause, deadline: Duration::from_secs(5), ..OomPolicy::default() };
        let max = Limit::Pages(Pages(4096));
        Self {
            cpus: 1,
            max,
            accounting: true,
            shares: DEFAULT_SHARES,
            oom,
            overhead: Vec::new(),
            config: None,
            group: "/",
            queue: 64,
            evicts: false,
        }
    }
}

/// What a worker says first that has just been started.
fn hello(accounting: bool) -> Hello {
    let mut ram = [RamSlot::default(); 2];
    ram[0] = RamSlot { gpa: 0, hva: 0x7000_0000_0000, bytes: SIZE * 4096, stage: 0x7100_0000_0000 };
    let reserve_target = if accounting { RESERVE } else { 0 };
    let report = Report { debt: reserve_target, ..Report::default() };
    Hello { instance: INSTANCE, ram, reserve_target, accounting, report, ..Hello::default() }
}

/// Parts of a cost, without saying whose memory it is.
fn cost<const N: usize>(parts: [(Overhead, u64); N]) -> Vec<Part> {
    parts.map(|(kind, pages)| Part { kind, user: Pages(pages), kernel: Pages(0) }).to_vec()
}

/// A VM of one vCPU that is charged, with no limit and no cost.
fn plain(name: &str) -> VmSpec {
    VmSpec {
        name: name.to_owned(),
        group: "/".to_owned(),
        size: Pages(SIZE),
        cpus: 1,
        accounting: true,
        limits: LimitPatch::default(),
        shares: DEFAULT_SHARES,
        oom: OomPolicy::default(),
        overhead: Vec::new(),
        loading: Pages::ZERO,
        swap_file: Pages::ZERO,
        instance: INSTANCE,
        config: None,
        console: None,
    }
}

fn pages(n: u64) -> Limit {
    Limit::Pages(Pages(n))
}

impl FakeWorker {
    /// Adds a VM called `vm` to a controller of its own.
    async fn add(setup: Setup) -> Self {
        let (controller, _) = Controller::start(Limit::Max);
        Self::add_to(&controller, "vm", setup).await.expect("added")
    }

    async fn add_to(controller: &Controller, name: &str, setup: Setup) -> Result<Self, Refusal> {
        let (to_worker, inbox) = mpsc::channel(setup.queue);
        let killed = Arc::new(AtomicBool::new(false));
        let spec = VmSpec {
            group: setup.group.to_owned(),
            cpus: setup.cpus,
            accounting: setup.accounting,
            limits: LimitPatch { max: Some(setup.max), ..LimitPatch::default() },
            shares: setup.shares,
            oom: setup.oom,
            overhead: setup.overhead,
            instance: INSTANCE,
            console: setup.config.is_some().then(|| ConsoleLog::new().expect("a descriptor")),
            config: setup.config,
            ..plain(name)
        };
        let id = controller.create(spec).await?;
        let end = controller.attach(id, Box::new(Puppet(Arc::clone(&killed))), to_worker).await?;
        let (report, grant, accounting) = (Report::default(), (0, 0, 0, false), setup.accounting);
        let (leases, aim, evicts) = ((0, 0), u64::MAX, setup.evicts);
        let controller = controller.clone();
        Ok(Self { controller, id, inbox, killed, end, accounting, report, grant, leases, aim, evicts })
    }

    /// A VM with `max` pages that runs and has reported once.
    async fn running(setup: Setup) -> Self {
        let accounting = setup.accounting;
        let mut worker = Self::add(setup).await;
        worker.hello().await;
        worker.say(FromWorker::Loaded { plan: 0 }).await;
        assert_eq!(worker.next().await, ToWorker::Start);
        while worker.try_next().await.is_some() {}
        if accounting {
            worker.tell().await;
        }
        worker
    }

    /// Says hello and takes the first grant, if there is any accounting.
    async fn hello(&mut self) {
        let bytes = if self.evicts { SIZE * 4096 } else { 0 };
        let store = Area { hva: 0x7200_0000_0000, bytes };
        self.say(FromWorker::Hello(Hello { store, ..hello(self.accounting) })).await;
        if self.accounting {
            self.first_grant().await;
        }
    }

    /// Takes the first grant after hello or activation: the reserve first, the rest is stock.
    async fn first_grant(&mut self) {
        let held = self.report.guest;
        let ToWorker::Grant { granted_total, .. } = self.next().await else { panic!("no grant") };
        let granted_total = granted_total - held;
        self.report.reserve = granted_total.min(RESERVE);
        self.report.debt = RESERVE - self.report.reserve;
        self.report.stock = granted_total - self.report.reserve;
    }

    async fn say(&self, message: FromWorker) {
        self.controller.heard(self.id, FromLink::Message(message)).await;
    }

    /// The next message, which must come.
    async fn next(&mut self) -> ToWorker {
        let message = tokio::time::timeout(Duration::from_secs(60), self.inbox.recv()).await;
        self.note(message.expect("in time").expect("the actor lives"))
    }

    /// The next message if there is one without time passing.
    async fn try_next(&mut self) -> Option<ToWorker> {
        // An answered request proves that the actor has dealt with everything before it.
        self.controller.host().await.expect("the actor lives");
        let message = self.inbox.try_recv().ok()?;
        Some(self.note(message))
    }

    fn note(&mut self, message: ToWorker) -> ToWorker {
        if let ToWorker::Grant { granted_total, stock_max, room, swap_max, store_max, refused, .. } = message {
            self.grant = (granted_total, stock_max, room, refused);
            self.leases = (swap_max, store_max);
            self.report.granted_total = granted_total;
        } else if let ToWorker::Reclaim { aim } = message {
            self.aim = aim;
            self.report.cold.aim = aim;
            self.report.cold.stuck = false;
        }
        message
    }

    /// Pages that arrived but are booked nowhere yet.
    fn fresh(&self) -> u64 {
        let report = &self.report;
        report.granted_total - report.returned_total - report.held().expect("a number")
    }

    /// Sends the report as it is.
    async fn tell(&self) {
        self.say(FromWorker::Report(self.report)).await;
    }

    /// The guest touches `n` pages: those in stock at once, the rest it waits for. What has arrived is booked first.
    async fn touch(&mut self, n: u64) {
        self.book();
        let at_once = n.min(self.report.stock);
        self.report.stock -= at_once;
        self.report.guest += at_once;
        self.report.want_now = n - at_once;
        self.report.want = n - at_once;
        self.tell().await;
        while self.try_next().await.is_some() {}
        let served = self.fresh().min(n - at_once);
        self.report.guest += served;
        self.report.want_now -= served;
        self.report.want = self.report.want_now;
        self.book();
    }

    /// Takes what has arrived into the stock.
    fn book(&mut self) {
        self.report.stock += self.fresh();
    }

    /// Gives back `n` guest pages.
    async fn free(&mut self, n: u64) {
        self.report.guest -= n;
        self.report.returned_total += n;
        self.tell().await;
    }

    /// Evicts `n` guest pages into `stored` pages of its store. What that frees is stock.
    async fn evict(&mut self, n: u64, stored: u64) {
        self.book();
        self.report.guest -= n;
        self.report.store += stored;
        self.report.stock += n - stored;
        self.report.swapped += n;
        self.report.cold.evicted += n;
        self.tell().await;
    }

    /// Answers the recall that must be the next message but grants.
    async fn answer_recall(&mut self) {
        let seq = self.hear_recall().await;
        self.give_stock_back(seq).await;
    }

    /// The number of the recall that must be the next message but grants.
    async fn hear_recall(&mut self) -> u32 {
        loop {
            match self.next().await {
                ToWorker::Recall { seq } => return seq,
                ToWorker::Grant { .. } | ToWorker::BalloonTarget { .. } => {}
                other => panic!("{other:?} instead of a recall"),
            }
        }
    }

    /// Answers recall `seq` with all of its stock.
    async fn give_stock_back(&mut self, seq: u32) {
        self.book();
        self.report.returned_total += self.report.stock;
        self.report.stock = 0;
        self.answer(seq).await;
    }

    async fn answer(&mut self, seq: u32) {
        self.report.answers = Some(seq);
        self.tell().await;
        self.report.answers = None;
    }

    /// The view after what is known; nobody answers the query, so it takes half a second of test time.
    async fn view(&mut self) -> VmView {
        let controller = self.controller.clone();
        let asking = tokio::spawn(async move { controller.show("vm").await });
        loop {
            match self.next().await {
                ToWorker::Query { seq } => {
                    self.answer(seq).await;
                    return asking.await.expect("no panic").expect("shown");
                }
                _ => self.book(),
            }
        }
    }

    async fn events(&self) -> Vec<Event> {
        self.controller.events(0).await.expect("events")
    }

    async fn has_event(&self, kind: EventKind) -> Option<Event> {
        self.events().await.into_iter().find(|event| event.event == kind)
    }

    fn killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }

    /// The process ends, then its socket.
    async fn die(self, death: Death) -> VmEnd {
        self.controller.worker_died(self.id, death).await;
        self.controller.heard(self.id, FromLink::Closed).await;
        self.end.await.expect("told")
    }

    /// The end of a guest that stopped by itself.
    async fn exit(self, reason: ExitReason) -> VmEnd {
        self.say(FromWorker::Exited(reason)).await;
        self.die(Death::Exited(0)).await
    }
}

//! The one owner of the tree of counters, of the VMs and of every operation that is under way.
//!
//! It is a task that receives one [`Input`] at a time: a request, a message of a worker, the death of a worker, or
//! the next of its own deadlines. It never waits for anything else, so no VM can stop another one, and each input
//! leaves the counters consistent. There are no locks because nobody else has the counters.
//!
//! | file | part |
//! | --- | --- |
//! | this one | the loop, the requests |
//! | `lifecycle.rs` | from hello to the end of a worker |
//! | `grants.rs` | reports, wants, grants, holds |
//! | `changes.rs` | changes of limits |
//! | `show.rs` | what the interface sees |

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;

use memcg_core::tree::{AddError, LimitPatch, NodeId, Tree};
use memcg_core::units::{Limit, Pages};
use serde_json::json;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use super::changes::{Change, Changed, MemoryChange};
use super::error::{Code, Refusal};
use super::events::{Event, EventKind, EventLog};
use super::host;
use super::link::FromLink;
use super::spawn::Death;
use super::view::{HostView, VmState, VmView};
use super::vm::{Awaited, KilledBy, OomPolicy, PausedBy, Reply, Vm, VmEnd, VmId, Waiting, WorkerProcess};
use crate::worker::protocol::{Report, ToWorker};

/// How long a request for a view waits for the worker's numbers.
const VIEW_PATIENCE: Duration = Duration::from_millis(500);

/// How long `pause` and `resume` wait for the worker.
const PAUSE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a worker may take to say hello, and to end after its last words.
pub(super) const WORKER_PATIENCE: Duration = Duration::from_secs(10);

/// A VM whose worker has been started.
pub struct NewVm {
    /// Number, from [`super::Controller::next_id`].
    pub id: VmId,
    /// Name, unique among those that run.
    pub name: String,
    /// Guest RAM.
    pub size: Pages,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Whether its memory is charged.
    pub accounting: bool,
    /// Its limits.
    pub limits: LimitPatch,
    /// What is done when it stays held.
    pub oom: OomPolicy,
    /// Its process.
    pub process: Box<dyn WorkerProcess>,
    /// The queue of messages for it.
    pub to_worker: mpsc::Sender<ToWorker>,
}

/// What the actor is asked.
pub(super) enum Request {
    Add(Box<NewVm>, Reply<oneshot::Receiver<VmEnd>>),
    Host(Reply<HostView>),
    List(Reply<Vec<VmView>>),
    Show(String, Reply<VmView>),
    Change(String, MemoryChange, Reply<Changed>),
    Pause(String, Reply<VmView>),
    Resume(String, Reply<VmView>),
    Kill(String, Reply<VmView>),
    Events(u64, Reply<Vec<Event>>),
}

/// What the actor receives.
pub(super) enum Input {
    Request(Request),
    Worker(VmId, FromLink),
    Died(VmId, Death),
    /// The memory of a dead worker is back.
    Settled(VmId),
}

/// The actor's state.
pub(super) struct Actor {
    pub tree: Tree,
    pub root: NodeId,
    pub vms: BTreeMap<VmId, Vm>,
    pub events: EventLog,
    pub news: watch::Sender<u64>,
    /// To send inputs to itself from helper tasks; weak, so that the actor ends with its users.
    pub inbox: mpsc::WeakSender<Input>,
    /// Origin of the times that the pure core is given.
    pub start: Instant,
    /// Something was uncharged or a limit rose: refused wants may fit now.
    pub roomier: bool,
}

impl Actor {
    pub fn new(budget: Limit, news: watch::Sender<u64>, inbox: mpsc::WeakSender<Input>) -> Self {
        let tree = Tree::new(budget);
        let root = tree.root();
        Self {
            tree,
            root,
            vms: BTreeMap::new(),
            events: EventLog::default(),
            news,
            inbox,
            start: Instant::now(),
            roomier: false,
        }
    }

    /// Runs until nobody can send inputs any more, then ends every worker.
    pub async fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        loop {
            let input = match self.next_deadline() {
                Some(at) => tokio::select! {
                    // Deadlines first: a flood of messages must not put them off.
                    biased;
                    () = tokio::time::sleep_until(at) => None,
                    input = inputs.recv() => Some(input),
                },
                None => Some(inputs.recv().await),
            };
            match input {
                None => self.on_time(),
                Some(Some(input)) => self.handle(input),
                Some(None) => break,
            }
            self.settle();
        }
        for vm in self.vms.values().filter(|vm| vm.death.is_none()) {
            vm.process.kill();
        }
    }

    fn handle(&mut self, input: Input) {
        match input {
            Input::Request(request) => self.request(request),
            Input::Worker(id, message) => self.heard(id, message),
            Input::Died(id, death) => self.worker_died(id, death),
            Input::Settled(id) => self.memory_is_back(id),
        }
    }

    /// Time since the actor began, for the pure core.
    pub fn elapsed(&self) -> Duration {
        Instant::now().saturating_duration_since(self.start)
    }

    pub fn event(&mut self, kind: EventKind, vm: Option<&str>, details: serde_json::Value) {
        let seq = self.events.push(kind, vm, details);
        self.news.send_replace(seq);
    }

    /// The VM of this name that runs, else the one that ended last.
    fn find(&self, name: &str) -> Result<VmId, Refusal> {
        let named = || self.vms.iter().filter(|(_, vm)| vm.name == name);
        named()
            .find(|(_, vm)| vm.state != VmState::Ended)
            .or_else(|| named().next_back())
            .map(|(id, _)| *id)
            .ok_or_else(|| Refusal::new(Code::NotFound, format!("there is no VM named {name:?} here")))
    }

    /// Like [`Self::find`] for requests that need a worker.
    fn find_alive(&self, name: &str) -> Result<VmId, Refusal> {
        let id = self.find(name)?;
        if self.vms[&id].alive() {
            Ok(id)
        } else {
            Err(Refusal::new(Code::WrongState, format!("the VM {name:?} has ended")))
        }
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::Add(vm, reply) => answer(reply, self.add(*vm)),
            Request::Host(reply) => answer(reply, Ok(self.host_view())),
            Request::List(reply) => {
                let list = self.vms.keys().map(|id| self.vm_view(*id, false)).collect();
                answer(reply, Ok(list));
            }
            Request::Show(name, reply) => match self.find(&name) {
                Ok(id) => self.show(id, reply),
                Err(refusal) => answer(reply, Err(refusal)),
            },
            Request::Change(name, change, reply) => match self.find_alive(&name) {
                Ok(id) => self.change(id, change, reply),
                Err(refusal) => answer(reply, Err(refusal)),
            },
            Request::Pause(name, reply) => match self.find_alive(&name) {
                Ok(id) => self.pause(id, PausedBy::User, Some(reply)),
                Err(refusal) => answer(reply, Err(refusal)),
            },
            Request::Resume(name, reply) => match self.find_alive(&name) {
                Ok(id) => self.resume_on_request(id, reply),
                Err(refusal) => answer(reply, Err(refusal)),
            },
            Request::Kill(name, reply) => match self.find(&name) {
                Ok(id) => self.kill_on_request(id, reply),
                Err(refusal) => answer(reply, Err(refusal)),
            },
            Request::Events(since, reply) => answer(reply, Ok(self.events.after(since))),
        }
    }

    fn add(&mut self, new: NewVm) -> Result<oneshot::Receiver<VmEnd>, Refusal> {
        if self.vms.values().any(|vm| vm.name == new.name && vm.state != VmState::Ended) {
            return Err(Refusal::new(Code::AlreadyExists, format!("a VM named {:?} runs already", new.name)));
        }
        let node = self.tree.add(self.root, &new.name).map_err(|error| match error {
            AddError::BadName(_) => Refusal::new(Code::BadRequest, error.to_string()),
            _ => Refusal::new(Code::AlreadyExists, error.to_string()),
        })?;
        if new.accounting {
            self.tree.activate(node, |_| Pages::ZERO).expect("a new node has nothing resident");
        }
        if let Err(error) = self.tree.set_limits(node, &new.limits) {
            // Nothing is charged to it, so removing cannot fail.
            let _ = self.tree.remove(node);
            return Err(Refusal::new(Code::InvalidLimit, error.to_string()));
        }
        let (ended, end) = oneshot::channel();
        let details = json!({
            "pid": new.process.pid(),
            "size_bytes": new.size.bytes(),
            "cpus": new.cpus,
            "max_bytes": new.limits.max.and_then(Limit::as_bytes),
            "accounting": new.accounting,
        });
        let vm = Vm {
            name: new.name,
            node,
            size: new.size,
            cpus: new.cpus,
            accounting: new.accounting,
            oom: new.oom,
            process: new.process,
            to_worker: new.to_worker,
            state: VmState::Starting,
            paused_by: None,
            ram: Vec::new(),
            greeted: false,
            reserve_target: Pages::ZERO,
            granted_total: 0,
            returned_total: 0,
            report: Report::default(),
            reported: false,
            guest_stats: None,
            refused: false,
            grant_due: false,
            balloon_sent: None,
            balloon_due: false,
            hold: None,
            oom_events: 0,
            oom_killed: false,
            change: None,
            seq: 0,
            waiting: Vec::new(),
            killers: Vec::new(),
            cause: None,
            death: None,
            link_closed: false,
            patience: Some(Instant::now() + host::scaled(WORKER_PATIENCE)),
            ended: Some(ended),
            warned: Cell::default(),
        };
        self.event(EventKind::Created, Some(&vm.name), details);
        self.vms.insert(new.id, vm);
        Ok(end)
    }

    /// Answers with fresh numbers when the worker gives them in time, else with the last known.
    fn show(&mut self, id: VmId, reply: Reply<VmView>) {
        let vm = self.vms.get_mut(&id).expect("found");
        if vm.alive() && vm.reported {
            let seq = vm.next_seq();
            if vm.send(ToWorker::Query { seq }) {
                let until = Instant::now() + host::scaled(VIEW_PATIENCE);
                vm.waiting.push(Waiting { seq, until, what: Awaited::View(reply) });
                return;
            }
        }
        let stale = vm.state != VmState::Ended;
        answer(reply, Ok(self.vm_view(id, stale)));
    }

    /// Stops the vCPUs. The stock comes back as well: a VM that stands still needs none.
    pub fn pause(&mut self, id: VmId, by: PausedBy, reply: Option<Reply<VmView>>) {
        let vm = self.vms.get_mut(&id).expect("found");
        if vm.state == VmState::Starting {
            refuse(reply, Refusal::new(Code::WrongState, format!("the VM {:?} is still starting", vm.name)));
            return;
        }
        if vm.state == VmState::Paused {
            if by == PausedBy::User {
                vm.paused_by = Some(by);
            }
            if let Some(reply) = reply {
                self.pause_again(id, reply);
            }
            return;
        }
        let (seq, recall) = (vm.next_seq(), vm.next_seq());
        if !vm.send(ToWorker::Pause { seq }) {
            let silent = silent(&vm.name);
            refuse(reply, silent);
            return;
        }
        if vm.accounting {
            vm.send(ToWorker::Recall { seq: recall });
        }
        vm.state = VmState::Paused;
        vm.paused_by = Some(by);
        if let Some(reply) = reply {
            let until = Instant::now() + host::scaled(PAUSE_PATIENCE);
            vm.waiting.push(Waiting { seq, until, what: Awaited::Paused(reply) });
        }
        let details = self.account(id, json!({ "by": if by == PausedBy::User { "request" } else { "policy" } }));
        let name = self.vms[&id].name.clone();
        self.event(EventKind::Paused, Some(&name), details);
    }

    /// A VM is to be paused that is paused already: its vCPUs may be on their way out, or its worker silent.
    fn pause_again(&mut self, id: VmId, reply: Reply<VmView>) {
        let vm = self.vms.get_mut(&id).expect("found");
        let pending = vm.waiting.iter().find(|w| matches!(w.what, Awaited::Paused(_))).map(|w| w.seq);
        if pending.is_none() && vm.report.paused {
            answer(reply, Ok(self.vm_view(id, false)));
            return;
        }
        let seq = pending.unwrap_or_else(|| vm.next_seq());
        if pending.is_none() && !vm.send(ToWorker::Pause { seq }) {
            answer(reply, Err(silent(&vm.name)));
            return;
        }
        let until = Instant::now() + host::scaled(PAUSE_PATIENCE);
        vm.waiting.push(Waiting { seq, until, what: Awaited::Paused(reply) });
    }

    fn resume_on_request(&mut self, id: VmId, reply: Reply<VmView>) {
        let vm = &self.vms[&id];
        if vm.state != VmState::Paused {
            answer(reply, Ok(self.vm_view(id, false)));
            return;
        }
        if vm.paused_by == Some(PausedBy::Policy) && vm.need() > 0 {
            let (name, need) = (vm.name.clone(), Pages(vm.need()));
            let usage = self.tree.snapshot(vm.node).memory.usage;
            let message = format!(
                "the VM {name:?} needs {} more than its limit leaves: raise it with `ballast set {name} memory.max=…`",
                memcg_core::units::human(need.bytes())
            );
            let details = self.account(id, json!({ "missing_bytes": need.bytes() }));
            self.event(EventKind::ResumeRefused, Some(&name), details);
            answer(reply, Err(Refusal::new(Code::ResumeRefused, message).usage(usage.bytes())));
            return;
        }
        self.resume(id, "request", Some(reply));
    }

    /// Lets the vCPUs go on.
    pub fn resume(&mut self, id: VmId, by: &str, reply: Option<Reply<VmView>>) {
        let vm = self.vms.get_mut(&id).expect("found");
        let seq = vm.next_seq();
        if !vm.send(ToWorker::Resume { seq }) {
            let silent = silent(&vm.name);
            refuse(reply, silent);
            return;
        }
        vm.state = VmState::Running;
        vm.paused_by = None;
        vm.report.paused = false;
        // The worker answers no pause that was taken back before its vCPUs were out.
        let taken_back = vm.waiting.extract_if(.., |w| matches!(w.what, Awaited::Paused(_)));
        for waiting in taken_back.collect::<Vec<_>>() {
            if let Awaited::Paused(reply) = waiting.what {
                answer(reply, Err(Refusal::new(Code::Superseded, "a later request let the VM go on")));
            }
        }
        if let Some(hold) = &mut vm.hold {
            // Time in which nobody could have helped does not count.
            hold.since = Instant::now();
            hold.deadline = hold.since + vm.oom.deadline;
            hold.acted = false;
        }
        if let Some(reply) = reply {
            let until = Instant::now() + host::scaled(PAUSE_PATIENCE);
            vm.waiting.push(Waiting { seq, until, what: Awaited::Resumed(reply) });
        }
        let details = self.account(id, json!({ "by": by }));
        let name = self.vms[&id].name.clone();
        self.event(EventKind::Resumed, Some(&name), details);
    }

    fn kill_on_request(&mut self, id: VmId, reply: Reply<VmView>) {
        let vm = self.vms.get_mut(&id).expect("found");
        if vm.state == VmState::Ended {
            answer(reply, Ok(self.vm_view(id, false)));
            return;
        }
        vm.killers.push(reply);
        self.kill(id, VmEnd::Killed(KilledBy::Request));
    }

    /// Ends a worker; the first cause is the one that counts.
    pub fn kill(&mut self, id: VmId, cause: VmEnd) {
        let vm = self.vms.get_mut(&id).expect("found");
        vm.cause.get_or_insert(cause);
        vm.process.kill();
    }

    /// The earliest thing that has to be done without being told.
    fn next_deadline(&self) -> Option<Instant> {
        self.vms.values().filter_map(Vm::next_deadline).min()
    }

    /// Does what is due.
    fn on_time(&mut self) {
        let now = Instant::now();
        let ids: Vec<_> = self.vms.keys().copied().collect();
        for id in ids {
            self.overdue_answers(id, now);
            self.overdue_change(id, now);
            self.overdue_hold(id, now);
            self.overdue_worker(id, now);
        }
    }

    fn overdue_answers(&mut self, id: VmId, now: Instant) {
        while let Some(vm) = self.vms.get_mut(&id)
            && let Some(index) = vm.waiting.iter().position(|w| w.until <= now)
        {
            let waiting = vm.waiting.swap_remove(index);
            match waiting.what {
                Awaited::View(reply) => answer(reply, Ok(self.vm_view(id, true))),
                Awaited::Paused(reply) | Awaited::Resumed(reply) => answer(reply, Err(silent(&vm.name))),
                Awaited::Recall(requested) => self.begin_change(id, *requested),
            }
        }
    }

    /// After every input: whatever has become possible happens now.
    fn settle(&mut self) {
        self.advance_changes();
        self.serve_refused();
        self.send_due();
    }
}

impl Vm {
    fn next_deadline(&self) -> Option<Instant> {
        let answers = self.waiting.iter().map(|w| w.until);
        let hold = self.hold.filter(|hold| !hold.acted && self.state == VmState::Running).map(|hold| hold.deadline);
        let change = self.change.as_ref().and_then(Change::next_deadline);
        answers.chain(hold).chain(change).chain(self.patience).min()
    }
}

/// Gives an answer; that nobody waits for it any more is no fault.
pub(super) fn answer<T>(reply: Reply<T>, result: Result<T, Refusal>) {
    let _ = reply.send(result);
}

fn refuse(reply: Option<Reply<VmView>>, refusal: Refusal) {
    match reply {
        Some(reply) => answer(reply, Err(refusal)),
        None => tracing::warn!(%refusal, "could not be done"),
    }
}

pub(super) fn silent(name: &str) -> Refusal {
    Refusal::new(
        Code::Busy,
        format!("the worker of the VM {name:?} does not answer: try again, or `ballast kill {name}`"),
    )
}

//! The one owner of the tree of counters, of the VMs and of every operation that is under way.
//!
//! It is a task that receives one [`Input`] at a time: a request, a message of a worker, the death of a worker, or
//! the next of its own deadlines. It never waits for anything else, so no VM can stop another one, and each input
//! leaves the counters consistent. There are no locks because nobody else has the counters.
//!
//! | file | part |
//! | --- | --- |
//! | this one | the loop, the requests |
//! | `admission.rs` | a VM before it has a process: node, limits, overhead |
//! | `lifecycle.rs` | from hello to the end of a worker |
//! | `journal.rs`, `adopt.rs` | what is remembered, and taking over what an earlier controller has left |
//! | `grants.rs` | reports, wants, grants, holds |
//! | `activation.rs` | accounting that begins on a running VM |
//! | `changes.rs` | changes of limits, of one node or many |
//! | `cold.rs` | what workers evict: stores, and limits of swap |
//! | `groups.rs` | groups, and what is asked of a VM or of a group alike |
//! | `promises.rs` | whether what is promised fits |
//! | `moves.rs` | VMs and groups that change their group |
//! | `ladders.rs`, `reclaim.rs` | what is done about those who use too much, and memory that somebody wants back |
//! | `questions.rs` | who may decide in its place |
//! | `recall.rs` | stocks that are wanted back |
//! | `resume.rs` | paused VMs that go on |
//! | `squeeze.rs` | who gives what a group has to |
//! | `thrash.rs` | groups whose VMs get nowhere |
//! | `strays.rs` | workers that run and could not be taken over |
//! | `shortage.rs`, `victim.rs` | a host that runs short, and who is chosen when nobody can give more |
//! | `stop.rs` | guests that are asked to end |
//! | `vms.rs` | the VMs, and for which of them something has to be done |
//! | `oom_log.rs` | what was decided when no memory was left, and what came of it |
//! | `pressure.rs` | how long VMs and groups wait for memory |
//! | `show.rs` | what the interface sees |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use memcg_core::oom::{RETURNS, Victims};
use memcg_core::tree::{NodeId, Tree};
use memcg_core::units::Limit;
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::admission::Created;

use super::changes::{Change, Target};
use super::config::VmConfig;
use super::console::ConsoleLog;
use super::error::{Code, Refusal};
use super::events::{EventKind, EventLog, Subject};
use super::host;
use super::journal::{Entry, Journal};
use super::ladders::Climb;
use super::link::FromLink;
use super::oom_log::OomLog;
use super::pressure::Pressures;
use super::questions::Questions;
use super::recall::Recall;
use super::reclaim::Reclaiming;
use super::resume::Resuming;
use super::shortage::Shortage;
use super::spawn::Death;
use super::squeeze::Squeeze;
use super::strays::Stray;
use super::thrash::Thrashing;
use super::victim::Choices;
use super::view::{PausedBy, VmState, VmView};
use super::vm::{Awaited, KilledBy, Reply, VmEnd, VmId, Waiting};
use super::vms::Vms;
use crate::worker::protocol::{Hello, ToWorker};

/// How long a request for a view waits for the worker's numbers.
const VIEW_PATIENCE: Duration = Duration::from_millis(500);

/// How long `pause` and `resume` wait for the worker.
pub(super) const PAUSE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a worker may take to say hello, and to end after its last words.
pub(super) const WORKER_PATIENCE: Duration = Duration::from_secs(10);

/// What the actor is asked: something to be done with its state. It answers by itself, at once or later.
pub(super) type Request = Box<dyn FnOnce(&mut Actor) + Send>;

/// What the actor receives.
#[expect(clippy::large_enum_variant, reason = "nearly all are messages, and a box would be an allocation for each")]
pub(super) enum Input {
    Request(Request),
    Worker(VmId, FromLink),
    Died(VmId, Death),
    /// The memory of a dead worker is back.
    Settled(VmId),
    /// A worker's queue was full and has room again.
    Room(VmId),
}

/// A VM that has ended and whose memory is back.
pub(super) struct Past {
    pub id: VmId,
    pub view: VmView,
    /// As it was asked for, so that it can be started again.
    pub config: Option<Arc<VmConfig>>,
    pub console: Option<ConsoleLog>,
}

/// The actor's state.
pub(super) struct Actor {
    pub tree: Tree,
    pub root: NodeId,
    pub vms: Vms,
    /// VMs that have left nothing but their last view, by name, until they are removed or there is another of the name.
    pub past: BTreeMap<String, Past>,
    /// VMs that were created and have no process yet.
    pub created: BTreeMap<VmId, Created>,
    /// Number of the next VM; never used twice.
    pub next_id: u64,
    /// The groups, the root aside; those that are removed too, until the last charge in them is back.
    pub groups: BTreeSet<NodeId>,
    /// All VMs are charged, those to come too: what they may use together is or was limited.
    pub everything_tracked: bool,
    /// Changes of limits that wait for memory to be given back.
    pub changes: Vec<Change>,
    /// Stocks that are on their way back.
    pub recalls: Vec<Recall>,
    /// The groups whose VMs have to come down for their sake.
    pub squeezed: BTreeMap<NodeId, Squeeze>,
    /// The ladders of those who use more than they should, or did lately.
    pub ladders: BTreeMap<Target, Climb>,
    /// Those for whom something has changed.
    pub unlooked: BTreeSet<Target>,
    /// Memory that somebody wants back.
    pub reclaims: Vec<Reclaiming>,
    /// Paused VMs that somebody waits for.
    pub resumes: Vec<Resuming>,
    pub events: EventLog,
    pub pressures: Pressures,
    pub news: watch::Sender<u64>,
    /// To send inputs to itself from helper tasks; weak, so that the actor ends with its users.
    pub inbox: mpsc::WeakSender<Input>,
    /// Origin of the times that the pure core is given.
    pub start: Instant,
    /// Something was uncharged or a limit rose: refused wants may fit now.
    pub roomier: bool,
    /// What a next controller must know.
    pub journal: Journal,
    /// Number of this controller's life: totals of workers count from its first grant.
    pub epoch: u32,
    /// Workers that run and could not be taken over, by the name of their VM.
    pub strays: BTreeMap<String, Stray>,
    /// Whether the host runs short, where somebody watches it.
    pub shortage: Option<Shortage>,
    /// The groups whose VMs may be thrashing.
    pub thrashing: Thrashing,
    /// Those who were chosen for others, until their memory is back.
    pub victims: Victims,
    /// What was decided, and what came of it.
    pub decisions: OomLog,
    /// What is remembered of how they were chosen.
    pub choices: Choices,
    /// Who is asked before, and what.
    pub questions: Questions,
    /// While VMs are taken over: those that have said hello and are not granted anything yet.
    pub recounting: Option<Vec<(VmId, Hello)>>,
}

impl Actor {
    pub fn new(budget: Limit, news: watch::Sender<u64>, inbox: mpsc::WeakSender<Input>, journal: Journal) -> Self {
        let tree = Tree::new(budget);
        let root = tree.root();
        Self {
            tree,
            root,
            vms: Vms::default(),
            past: BTreeMap::new(),
            created: BTreeMap::new(),
            next_id: 1,
            groups: BTreeSet::new(),
            everything_tracked: budget != Limit::Max,
            changes: Vec::new(),
            recalls: Vec::new(),
            squeezed: BTreeMap::new(),
            ladders: BTreeMap::new(),
            unlooked: BTreeSet::new(),
            reclaims: Vec::new(),
            resumes: Vec::new(),
            events: EventLog::of_life(journal.epoch()),
            decisions: OomLog::of_life(journal.epoch()),
            pressures: Pressures::default(),
            news,
            inbox,
            start: Instant::now(),
            roomier: false,
            epoch: journal.epoch(),
            journal,
            strays: BTreeMap::new(),
            shortage: None,
            thrashing: Thrashing::default(),
            victims: Victims::new(host::scaled(RETURNS)),
            choices: Choices::default(),
            questions: Questions::default(),
            recounting: None,
        }
    }

    /// Runs until nobody can send inputs any more, then ends every worker.
    pub async fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        loop {
            let input = match self.next_deadline() {
                // A timer would be late by up to a millisecond, and somebody who is held waits for what is due.
                Some(at) if at <= Instant::now() => {
                    tokio::task::yield_now().await;
                    None
                }
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
            // The tasks that write to the workers run when this one does not: without a break, a burst of requests would
            // fill a queue and look like a worker that does not read.
            if self.vms.crowded() {
                tokio::task::yield_now().await;
            }
        }
        for (_, vm) in self.vms.iter().filter(|(_, vm)| vm.death.is_none()) {
            vm.process.kill();
            vm.process.tidy();
        }
    }

    fn handle(&mut self, input: Input) {
        match input {
            Input::Request(request) => request(self),
            Input::Worker(id, message) => self.heard(id, message),
            Input::Died(id, death) => self.worker_died(id, death),
            Input::Settled(id) => self.memory_is_back(id),
            Input::Room(id) => self.room_again(id),
        }
    }

    /// Time since the actor began, for the pure core.
    pub fn elapsed(&self) -> Duration {
        Instant::now().saturating_duration_since(self.start)
    }

    pub fn event(&mut self, kind: EventKind, vm: Option<&str>, details: serde_json::Value) {
        self.event_of(kind, vm.map_or(Subject::Host, Subject::Vm), details);
    }

    pub fn event_of(&mut self, kind: EventKind, subject: Subject<'_>, details: serde_json::Value) {
        let seq = self.events.push(kind, subject, details);
        self.news.send_replace(seq);
    }

    /// The VM of this name that runs, else the one that ended last.
    pub fn find(&self, name: &str) -> Result<VmId, Refusal> {
        let ended = || self.vms.named(name).rfind(|(_, vm)| !vm.forgotten);
        self.vms.running(name).or_else(ended).map(|(id, _)| id).ok_or_else(|| self.unknown(name))
    }

    /// Like [`Self::find`] for requests that need a worker.
    pub fn find_alive(&self, name: &str) -> Result<VmId, Refusal> {
        match self.find(name) {
            Ok(id) if self.vms[&id].alive() => Ok(id),
            Err(refusal) if !self.past.contains_key(name) => Err(refusal),
            _ => Err(Refusal::new(Code::WrongState, format!("the VM {name:?} has ended"))),
        }
    }

    /// All VMs: those that have left nothing but their last view, then those that are there.
    pub fn list(&self) -> Vec<VmView> {
        let shown = self.vms.iter().filter(|(_, vm)| !vm.forgotten).map(|(id, _)| self.vm_view(id, false));
        self.past.values().map(|past| past.view.clone()).chain(shown).collect()
    }

    pub fn past_view(&self, name: &str) -> Option<VmView> {
        self.past.get(name).map(|past| past.view.clone())
    }

    /// The VM of this name that runs and was asked for with the same words.
    pub fn same(&self, name: &str, config: &VmConfig) -> Result<Option<VmId>, Refusal> {
        match self.vms.running(name) {
            None => Ok(None),
            Some((id, vm)) if vm.config.as_deref() == Some(config) => Ok(Some(id)),
            Some(_) => Err(Refusal::new(
                Code::AlreadyExists,
                format!(
                    "a VM named {name:?} runs that was made otherwise: choose another name, or `ballast rm {name}`"
                ),
            )),
        }
    }

    /// Answers when the guest runs, or will not.
    pub fn started(&mut self, id: VmId, reply: Reply<VmView>) {
        match self.vms.get_mut(&id) {
            Some(vm) if vm.state == VmState::Starting => vm.starters.push(reply),
            Some(vm) if vm.state != VmState::Ended => answer(reply, Ok(self.vm_view(id, false))),
            vm => {
                let epitaph = vm.and_then(|vm| vm.epitaph.as_deref()).unwrap_or("it has ended");
                answer(reply, Err(Refusal::new(Code::StartFailed, format!("the VM did not start: {epitaph}"))));
            }
        }
    }

    /// Forgets a VM, once its worker is gone.
    pub fn remove(&mut self, name: &str, reply: Reply<()>) {
        match self.find(name) {
            Ok(id) if self.vms[&id].state != VmState::Ended => {
                self.vms.get_mut(&id).expect("found").removers.push(reply);
                self.kill(id, VmEnd::Killed(KilledBy::Request));
            }
            Err(refusal) if !self.past.contains_key(name) => self.remove_stray(name, refusal, reply),
            _ => {
                self.removed(name);
                answer(reply, Ok(()));
            }
        }
    }

    /// What a VM prints.
    pub fn console(&self, name: &str) -> Result<ConsoleLog, Refusal> {
        let console = match self.find(name) {
            Ok(id) => &self.vms[&id].console,
            Err(refusal) => &self.past.get(name).ok_or(refusal)?.console,
        };
        let nothing = || Refusal::new(Code::WrongState, format!("what the VM {name:?} prints is not kept"));
        console.clone().ok_or_else(nothing)
    }

    /// Answers with fresh numbers when the worker gives them in time, else with the last known.
    pub fn show(&mut self, name: &str, reply: Reply<VmView>) {
        let id = match self.find(name) {
            Ok(id) => id,
            Err(refusal) => return answer(reply, self.past_view(name).ok_or(refusal)),
        };
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

    /// Stops the vCPUs. The stock comes back as well: a VM that stands still may hold none.
    pub fn pause(&mut self, id: VmId, by: PausedBy, reply: Option<Reply<VmView>>) {
        if by == PausedBy::User {
            self.supersede_resumes(id);
        }
        let vm = self.vms.get_mut(&id).expect("found");
        if vm.state == VmState::Starting {
            refuse(reply, Refusal::new(Code::WrongState, format!("the VM {:?} is still starting", vm.name)));
            return;
        }
        if vm.state == VmState::Paused {
            if by == PausedBy::User && vm.paused_by != Some(by) && !vm.kept_paused {
                // What it was paused for still holds, and what it gives for that.
                vm.kept_paused = true;
                let entry = Entry::Paused { vm: vm.name.clone(), by };
                self.remember(entry);
            }
            if let Some(reply) = reply {
                self.pause_again(id, reply);
            }
            return;
        }
        let seq = vm.next_seq();
        if !vm.send(ToWorker::Pause { seq }) {
            let silent = silent(&vm.name);
            refuse(reply, silent);
            return;
        }
        vm.state = VmState::Paused;
        vm.paused_by = Some(by);
        vm.paused_at = Some(Instant::now());
        vm.grant_due = true;
        let name = vm.name.clone();
        if let Some(reply) = reply {
            let until = Instant::now() + host::scaled(PAUSE_PATIENCE);
            vm.waiting.push(Waiting { seq, until, what: Awaited::Paused(reply) });
        }
        let details = self.account(id, json!({ "by": by.word() }));
        self.remember(Entry::Paused { vm: name.clone(), by });
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

    /// Stops the vCPUs for somebody at the interface.
    pub fn pause_on_request(&mut self, name: &str, reply: Reply<VmView>) {
        match self.find_alive(name).and_then(|id| self.can_remember().map(|()| id)) {
            Ok(id) => self.pause(id, PausedBy::User, Some(reply)),
            Err(refusal) => answer(reply, Err(refusal)),
        }
    }

    /// Ends a VM for somebody at the interface.
    pub fn kill_on_request(&mut self, name: &str, reply: Reply<VmView>) {
        let id = match self.find(name) {
            Ok(id) => id,
            Err(refusal) => return answer(reply, self.past_view(name).ok_or(refusal)),
        };
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
        vm.process.kill();
        if vm.cause.is_some() || vm.state == VmState::Ended {
            return;
        }
        let entry = match cause {
            VmEnd::Killed(by) => Some(Entry::Killed { vm: vm.name.clone(), by }),
            _ => None,
        };
        vm.cause = Some(cause);
        // Whoever finds it dead, or dying, is to know why.
        entry.into_iter().for_each(|entry| self.remember(entry));
    }

    /// The earliest thing that has to be done without being told.
    fn next_deadline(&mut self) -> Option<Instant> {
        let changes = self.changes.iter().map(Change::next_deadline);
        let recalls = self.recalls.iter().map(Recall::deadline);
        let squeezes = self.squeezed.values().map(|squeeze| squeeze.next);
        let ladders = self.ladders.values().filter_map(Climb::next);
        let reclaims = self.reclaims.iter().map(Reclaiming::deadline);
        let resumes = self.resumes.iter().map(Resuming::deadline);
        let host = self.shortage.iter().map(Shortage::next_look).chain(self.thrashing.next_look());
        let emptied = self.choices.look;
        let all = changes
            .chain(recalls)
            .chain(squeezes)
            .chain(ladders)
            .chain(reclaims)
            .chain(resumes)
            .chain(host)
            .chain(emptied);
        all.chain(self.vms.next_deadline()).min()
    }

    /// Does what is due.
    fn on_time(&mut self) {
        let now = Instant::now();
        self.end_recalls(Some(now));
        self.overdue_squeezes(now);
        self.overdue_changes(now);
        self.overdue_ladders(now);
        self.overdue_reclaims(now);
        self.overdue_shortage(now);
        self.overdue_resumes(now);
        self.overdue_thrashing(now);
        for id in self.vms.overdue(now) {
            self.overdue_answers(id, now);
            self.overdue_activation(id, now);
            self.overdue_hold(id, now);
            self.overdue_balloon(id, now);
            self.overdue_stop(id, now);
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
            }
        }
    }

    /// After every input: whatever has become possible happens now. What this costs does not depend on the number of VMs,
    /// only on how many of them wait for something.
    fn settle(&mut self) {
        self.advance_changes();
        self.serve_refused();
        self.resume_emptied();
        self.serve_resumes();
        // What a worker may evict comes before what it is to evict.
        self.send_due();
        self.look_at_all();
        self.send_due();
        self.feel_pressure();
        self.follow_decisions();
        debug_assert!(self.vms.in_order(), "a VM was changed behind the back of its index");
    }
}

/// Gives an answer; that nobody waits for it any more is no fault.
pub(super) fn answer<T>(reply: Reply<T>, result: Result<T, Refusal>) {
    let _ = reply.send(result);
}

pub(super) fn refuse(reply: Option<Reply<VmView>>, refusal: Refusal) {
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

//! Taking over the VMs that an earlier controller has left behind.
//!
//! The controller may die at any moment; the workers of `ballast serve` do not die with it. The next one takes each VM that
//! the journal knows:
//!
//! ```text
//!  journal ─► for each VM, all at once: connect, whose process is it?, Hello          (`meet`)
//!                │ nobody there ───────► ended while nobody was there; its last words are in its log. Without a log
//!                │                       there never was a worker, and the VM is forgotten
//!                │ a stranger ─────────► the same; the stranger is left alone
//!                │ another version ────► Stray: left alone, counted with the most it can hold by what the host sees
//!                │ silence, no socket ─► the same, and met again every few seconds
//!                ▼
//!             node, limits, overhead ─► recount: charge what Hello says ─► grant: a new epoch ─► one of the VMs
//! ```
//!
//! *What is true*: of what was asked for, the journal; of what is used, the worker. It cannot say more than it could ever
//! have got ([`Vm::most`]), and is charged whatever the limits, because the pages are there: too much is an overcharge,
//! which only falls. Pages that the old controller granted and that never arrived died with it.
//!
//! *Who comes first*: nobody. Grants begin when every VM is recounted; until then, room in a group may be what another
//! VM of it holds already.
//!
//! *Whose process*: the kernel says who listens (`SO_PEERCRED`), and gives a descriptor of that process
//! (`SO_PEERPIDFD`), which no later process with its number can be mistaken for. That it is this VM's worker it proves by
//! the number it was given at its start ([`Hello::instance`]).
//!
//! *What is dropped*: a change of a limit that waited for memory, the deadline of a hold (a new one begins), peaks and
//! failure counts, events. A pause stays, by the same hand. Nobody knows whether somebody was chosen just before, so for as long
//! as that one would have had to give its memory back nobody is.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use memcg_core::frame::Cost;
use memcg_core::tree::{self, LimitPatch, Mode, NodeId};
use memcg_core::units::{Limit, Pages};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketType};
use rustix::process::{Pid, PidfdFlags};
use serde_json::json;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::actor::{Actor, answer};
use super::cgroup::Cgroup;
use super::changes::Target;
use super::check;
use super::console::ConsoleLog;
use super::error::{Code, Refusal};
use super::events::EventKind;
use super::groups;
use super::journal::{Entry, Remembered, RememberedGroup, RememberedVm};
use super::link::{self, FromLink};
use super::spawn::{self, Death, DeathWatch, WorkerHandle};
use super::strays::Why;
use super::view::VmState;
use super::vm::{VmEnd, VmId, WorkerProcess};
use super::{Controller, VmSpec, activation, host};
use crate::worker::LAST_WORDS;
use crate::worker::protocol::{self, DecodeError, FromWorker, Hello, MAX_MESSAGE, Report, ToWorker};

/// How long a worker may take to say hello to a controller that begins: the others wait as long.
const MEETING: Duration = Duration::from_secs(3);

/// Time between two tries to reach a worker that has not noticed the end of its last controller yet.
const AGAIN: Duration = Duration::from_millis(20);

/// What was found in the place of a VM's worker.
pub(super) enum Found {
    /// Itself.
    Worker(Box<Worker>),
    /// It has ended.
    Ended(VmEnd),
    /// There never was one: the controller died before it had started it.
    Never,
    /// It runs, and cannot be talked to.
    Stray { worker: Option<(WorkerHandle, DeathWatch)>, why: Why },
}

/// A worker that has said hello.
pub(super) struct Worker {
    handle: WorkerHandle,
    watch: DeathWatch,
    socket: OwnedFd,
    hello: Hello,
}

/// The process of a VM that has ended.
struct Nobody;

impl WorkerProcess for Nobody {
    fn pid(&self) -> i32 {
        0
    }

    fn kill(&self) {}
}

impl Controller {
    /// Takes over what is `remembered`, whose directories are in `state`. Completes when each VM is one of this controller's,
    /// has ended, or is known to be unreachable.
    ///
    /// # Errors
    /// When the controller is going away.
    pub async fn take_over(&self, state: &Path, remembered: &Remembered) -> Result<(), Refusal> {
        for (path, group) in remembered.groups() {
            let (path, group) = (path.to_owned(), group.clone());
            self.ask(move |actor, reply| answer(reply, actor.restore_group(&path, &group))).await?;
        }
        let mut meetings = JoinSet::new();
        for (number, vm) in remembered.vms().enumerate() {
            let (directory, vm) = (state.join(&vm.name), vm.clone());
            meetings.spawn(async move {
                let found = match &vm.ended {
                    Some(_) => None,
                    None => Some(meet(&directory, &vm.name, vm.instance).await),
                };
                (number, vm, found)
            });
        }
        let mut met = meetings.join_all().await;
        find_unreachable(state, &mut met).await;
        self.ask(|actor, reply| {
            actor.begin_recount();
            answer(reply, Ok(()));
        })
        .await?;
        // In the order in which they were made: that is the order in which they end.
        met.sort_by_key(|(number, ..)| *number);
        for (_, vm, found) in met {
            let name = vm.name.clone();
            if let Err(refusal) = self.restore(vm, found).await {
                tracing::error!(vm = name, %refusal, "the VM cannot be taken over");
            }
        }
        self.ask(|actor, reply| {
            actor.end_recount();
            actor.track_all();
            answer(reply, Ok(()));
        })
        .await?;
        // What they say they hold is charged; the host knows whether that is all.
        let controller = self.clone();
        tokio::spawn(async move { controller.audit_all().await });
        self.clear(state).await
    }

    /// Removes what VMs that are no more have left in `state`. A worker there that nobody remembers is left alone.
    async fn clear(&self, state: &Path) -> Result<(), Refusal> {
        let vms: Vec<_> = self.list().await?.into_iter().filter(|vm| vm.state != VmState::Ended).collect();
        let strays =
            self.ask(|actor, reply| answer(reply, Ok(actor.strays.keys().cloned().collect::<Vec<_>>()))).await?;
        for left in std::fs::read_dir(state).into_iter().flatten().flatten() {
            let (directory, name) = (left.path(), left.file_name());
            let Some(name) = name.to_str() else { continue };
            let known = vms.iter().any(|vm| vm.name == name) || strays.iter().any(|stray| stray == name);
            if known || !directory.is_dir() {
                continue;
            }
            let Ok(peer) = link::reach(SocketType::SEQPACKET, &spawn::worker_socket(&directory)) else {
                spawn::tidy(&directory);
                continue;
            };
            if is_worker(peer.pid, name)
                && let Ok(pidfd) = link::process(&peer.socket)
                && let Ok(worker) = spawn::watch_over(peer.pid, pidfd, &directory, Cgroup::of_process(peer.pid))
            {
                let why = Why::for_ever("the journal does not know it");
                self.leave_alone(name.to_owned(), None, Some(worker), why).await?;
            }
        }
        Ok(())
    }

    async fn restore(&self, vm: RememberedVm, found: Option<Found>) -> Result<(), Refusal> {
        match found {
            None => self.ask(move |actor, reply| answer(reply, actor.restore_ended(&vm, None))).await,
            Some(Found::Ended(end)) => {
                let end = vm.end(end);
                self.ask(move |actor, reply| answer(reply, actor.restore_ended(&vm, Some(end)))).await
            }
            Some(Found::Never) => {
                self.ask(move |actor, reply| {
                    actor.remember(Entry::Gone { vm: vm.name });
                    answer(reply, Ok(()));
                })
                .await
            }
            Some(Found::Stray { worker, why }) => self.leave_alone(vm.name.clone(), Some(vm), worker, why).await,
            Some(Found::Worker(worker)) => self.restore_worker(vm, *worker).await,
        }
    }

    pub(super) async fn restore_worker(&self, vm: RememberedVm, worker: Worker) -> Result<(), Refusal> {
        let Worker { handle, watch, socket, hello } = worker;
        // Without it the guest goes on all the same.
        let console = ConsoleLog::of_worker(handle.pid()).ok();
        let id = self.ask(move |actor, reply| answer(reply, actor.restore(&vm, console))).await?;
        let hello = FromLink::Message(FromWorker::Hello(hello));
        // Nobody waits for the end of a VM of `serve`.
        let _end = self.adopt_with(id, handle, watch, socket, Some(hello)).await?;
        Ok(())
    }
}

/// Finds the workers of VMs that seem to have ended, and run where nobody can reach them: their sockets were removed.
async fn find_unreachable(state: &Path, met: &mut [(usize, RememberedVm, Option<Found>)]) {
    let unseen = |found: &Option<Found>| {
        matches!(found, Some(Found::Ended(_) | Found::Never | Found::Stray { worker: None, .. }))
    };
    if !met.iter().any(|(.., found)| unseen(found)) {
        return;
    }
    let below = state.to_owned();
    let running = tokio::task::spawn_blocking(move || check::workers_below(&below)).await;
    let Ok(Ok(running)) = running else {
        tracing::error!("/proc cannot be looked at: a worker that runs and cannot be reached is not found");
        return;
    };
    for (_, vm, found) in met.iter_mut().filter(|(.., found)| unseen(found)) {
        let directory = state.join(&vm.name);
        let worker = running.get(&vm.name).and_then(|pid| {
            let pidfd = rustix::process::pidfd_open(Pid::from_raw(*pid)?, PidfdFlags::empty()).ok()?;
            spawn::watch_over(*pid, pidfd, &directory, Cgroup::of_process(*pid)).ok()
        });
        if worker.is_some() {
            let socket = spawn::worker_socket(&directory);
            let why = Why::for_now(format!("nothing answers at its socket {}", socket.display()));
            *found = Some(Found::Stray { worker, why });
        }
    }
}

/// Looks who is in the place of a VM's worker.
pub(super) async fn meet(directory: &Path, name: &str, instance: u64) -> Found {
    let until = Instant::now() + host::scaled(MEETING);
    let gone = || match spawn::worker_log(directory).exists() {
        true => Found::Ended(end_in_log(&spawn::log_tail(directory))),
        false => Found::Never,
    };
    loop {
        let peer = match link::reach(SocketType::SEQPACKET, &spawn::worker_socket(directory)) {
            Ok(peer) => peer,
            Err(Errno::AGAIN) if Instant::now() < until => {
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            Err(Errno::AGAIN) => return Found::Stray { worker: None, why: Why::for_now("it takes no connection") },
            Err(_) => return gone(),
        };
        let stranger = |what: &str| {
            let message = format!("is gone, and process {} of user {} {what} in its place", peer.pid, peer.uid);
            Found::Ended(VmEnd::Died { message })
        };
        if peer.uid != rustix::process::geteuid().as_raw() {
            return stranger("listens");
        }
        // The process may have ended since it was asked to listen: then it is no longer there to be described.
        let Ok((handle, watch)) = link::process(&peer.socket)
            .and_then(|pidfd| spawn::watch_over(peer.pid, pidfd, directory, Cgroup::of_process(peer.pid)))
        else {
            return gone();
        };
        let (socket, pid) = (peer.socket, peer.pid);
        let stranger = |what: &str| {
            let message = format!("is gone, and process {pid} {what} in its place");
            Found::Ended(VmEnd::Died { message })
        };
        let why = match first_words(socket, until).await {
            Ok((socket, FromWorker::Hello(hello))) if hello.instance == instance => {
                return Found::Worker(Box::new(Worker { handle, watch, socket, hello }));
            }
            Ok((_, FromWorker::Hello(_))) => return stranger("is another VM's worker"),
            Ok((_, words)) => return Found::Ended(end_of(words)),
            Err(Silence::Closed) if Instant::now() < until => {
                tokio::time::sleep(AGAIN).await;
                continue;
            }
            Err(Silence::Closed) => Why::for_now("it hangs up"),
            Err(Silence::TimeOver) => Why::for_now("it says nothing"),
            Err(Silence::Garbage(error)) => Why::for_ever(format!("it is of another build ({error})")),
        };
        if is_ending(pid) {
            return Found::Stray { worker: Some((handle, watch)), why: Why::ending() };
        }
        if is_worker(pid, name) {
            return Found::Stray { worker: Some((handle, watch)), why };
        }
        return stranger("listens");
    }
}

/// Why a worker has not said what was waited for.
enum Silence {
    Closed,
    TimeOver,
    Garbage(DecodeError),
}

/// The first message on a connection.
async fn first_words(socket: OwnedFd, until: Instant) -> Result<(OwnedFd, FromWorker), Silence> {
    // SAFETY: the descriptor is owned and stays the same as long as its owner lives.
    let socket = unsafe { AsyncFd::register(socket) }.map_err(|_| Silence::Closed)?;
    let mut buffer = [0; MAX_MESSAGE + 1];
    let read = async {
        loop {
            let mut ready = socket.readable().await.map_err(|_| Silence::Closed)?;
            match rustix::net::recv(socket.get_ref(), &mut buffer, RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(Silence::Closed),
                Ok((length, _)) => return protocol::decode(&buffer[..length]).map_err(Silence::Garbage),
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                Err(_) => return Err(Silence::Closed),
            }
        }
    };
    let words = tokio::time::timeout_at(until, read).await.map_err(|_| Silence::TimeOver)??;
    Ok((socket.into_inner(), words))
}

/// Whether a process was started as the worker of this VM.
fn is_worker(pid: i32, name: &str) -> bool {
    let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words == format!("ballast\0worker\0{name}\0").into_bytes()
}

/// Whether a process was killed, and is not gone yet: it has not seen the signal, or has no memory any more, not even its command
/// line.
fn is_ending(pid: i32) -> bool {
    const SIGKILL: u64 = 1 << (libc::SIGKILL - 1);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let pending = status.lines().filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")));
    pending.filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok()).any(|mask| mask & SIGKILL != 0)
        || std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|words| words.is_empty())
}

/// How a VM ended that was told to nobody, by the end of its worker's log.
fn end_in_log(log: &str) -> VmEnd {
    let words = log.lines().rev().find_map(|line| serde_json::from_str(line.strip_prefix(LAST_WORDS)?).ok());
    words.map_or_else(|| VmEnd::Died { message: "ended while there was no controller".to_owned() }, end_of)
}

fn end_of(words: FromWorker) -> VmEnd {
    match words {
        FromWorker::Exited(reason) => VmEnd::Guest(reason),
        FromWorker::Failed { message, smallest_max } => {
            let message = message.chars().filter(|c| !c.is_control()).collect();
            VmEnd::Failed { message, smallest_max: smallest_max.map(Pages) }
        }
        _ => VmEnd::Died { message: "did not say hello".to_owned() },
    }
}

impl RememberedVm {
    /// How it ended, where it was found dead: what an earlier controller has done with it says more.
    pub(super) fn end(&self, found: VmEnd) -> VmEnd {
        match (found, self.killed) {
            (VmEnd::Died { .. }, Some(by)) => VmEnd::Killed(by),
            (found, _) => found,
        }
    }

    pub(super) fn spec(&self) -> Result<VmSpec, Refusal> {
        let mut spec = self.config.spec(&self.name)?;
        spec.group.clone_from(&self.group);
        spec.instance = self.instance;
        spec.accounting = self.accounting;
        if let Some((_, limits)) = self.limits {
            // The first limit begins the account.
            spec.limits = limits.into();
            spec.accounting |= spec.limits.limits_something();
        }
        spec.config = Some(Arc::clone(&self.config));
        Ok(spec)
    }
}

impl Actor {
    /// Makes a group again. What it promises is not compared with what is there: that was done when it was promised.
    fn restore_group(&mut self, path: &str, group: &RememberedGroup) -> Result<(), Refusal> {
        let mut limits = LimitPatch::from(group.limits);
        let node = match groups::split(path) {
            None => {
                if self.tree.limits(self.root).max != Limit::Max {
                    // What --budget says now counts.
                    limits.max = None;
                }
                let set = self.tree.set_limits(self.root, &limits);
                set.map_err(|error| self.refusal(&error))?;
                self.everything_tracked |= group.accounting;
                self.root
            }
            Some((above, name)) => {
                let above = self.group_for(above)?;
                let on = group.accounting || self.accounts(above);
                let accounting = if on { tree::Accounting::On } else { tree::Accounting::Off };
                let node = self.tree.add_with(above, name, &limits, accounting);
                let node =
                    node.map_err(|error| Refusal::new(Code::WrongState, format!("the group {path}: {error}")))?;
                self.groups.insert(node);
                node
            }
        };
        self.tree.restore_generation(node, group.generation);
        Ok(())
    }

    /// Where there is a budget nobody is outside of it: begins the account of VMs that were made before there was one.
    fn track_all(&mut self) {
        if !self.everything_tracked {
            return;
        }
        let unaccounted =
            self.vms.iter().filter(|(_, vm)| vm.alive() && !vm.accounted() && vm.state != VmState::Starting);
        let unaccounted: Vec<_> = unaccounted.map(|(id, _)| id).collect();
        self.account_first(&unaccounted, |_, result| {
            if let Err((_, refusal)) = result {
                tracing::error!(%refusal, "a VM is outside of the budget");
            }
        });
    }

    /// Makes room for a VM whose worker runs. Limits are not compared with what it uses.
    pub fn restore(&mut self, vm: &RememberedVm, console: Option<ConsoleLog>) -> Result<VmId, Refusal> {
        let (id, node) = self.create_again(VmSpec { console, ..vm.spec()? }, vm.paused, vm.kept_paused)?;
        if let Some((generation, _)) = vm.limits {
            self.tree.restore_generation(node, generation);
        }
        Ok(id)
    }

    /// From now on nothing is granted: what looks like room in a group may be what the next VM in it holds already.
    pub fn begin_recount(&mut self) {
        self.recounting = Some(Vec::new());
    }

    /// Every VM is counted: now they get what they wait for.
    pub fn end_recount(&mut self) {
        for (id, hello) in self.recounting.take().unwrap_or_default() {
            if self.vms.get(&id).is_some_and(|vm| vm.alive() && vm.cause.is_none()) {
                self.greeted(id, &hello);
            }
        }
        if self.vms.iter().next().is_some() || !self.strays.is_empty() {
            // Somebody may have been chosen just before.
            self.choices.chosen(self.tree.ids());
        }
    }

    /// Charges what the worker says it holds, and counts from there.
    pub fn recount(&mut self, id: VmId, hello: &Hello) {
        let vm = self.vms.get_mut(&id).expect("checked");
        let held = hello.report.granted_total - hello.report.returned_total;
        vm.granted_total = held;
        vm.returned_total = 0;
        vm.report = Report { answers: None, epoch: 0, granted_total: held, returned_total: 0, ..hello.report };
        vm.balloon.adopted(&hello.report);
        vm.reported = vm.adopted;
        if hello.started {
            vm.state = if vm.paused_by.is_some() { VmState::Paused } else { VmState::Running };
        }
        let (node, begins) = (vm.node, hello.accounting && !vm.accounted());
        let held = Pages(held);
        if begins {
            let overhead = vm.overhead.clone();
            vm.accounting = activation::Accounting::On;
            self.tree.activate(node, |_| held).expect("what fits into RAM fits into a counter");
            self.charge_what_is_there(node, &overhead);
        } else if !held.is_zero() {
            self.charge_whatever(node, held);
        }
        self.grow_overhead(id, Cost::default());
        self.recount_cold(id);
        let vm = self.vms.get_mut(&id).expect("checked");
        if vm.adopted {
            // What was asked of it, and what it has told of, was an earlier controller's.
            vm.reclaim_aim = vm.report.cold.aim;
            vm.evicted_told = (vm.report.cold.evicted, None);
            vm.failed_told = vm.report.cold.failed_writes;
        }
    }

    /// Charges pages that are there, whatever the limits.
    pub fn charge_whatever(&mut self, node: NodeId, pages: Pages) {
        let charged = self.tree.try_charge(node, pages, Mode::NoFail);
        let _crossed = charged.expect("what fits into RAM fits into a counter");
    }

    /// A VM was recounted and funded: brings its worker in line with what is remembered.
    pub fn adopted(&mut self, id: VmId, hello: &Hello) {
        let vm = self.vms.get_mut(&id).expect("checked");
        let name = vm.name.clone();
        let paused = vm.state == VmState::Paused;
        if paused && !hello.paused {
            let seq = vm.next_seq();
            vm.send(ToWorker::Pause { seq });
        }
        // The first numbers in this controller's count, whether the worker has anything to say or not.
        let seq = vm.next_seq();
        vm.send(ToWorker::Query { seq });
        self.watch_hold(id);
        let report = &self.vms[&id].report;
        let details = self.account(
            id,
            json!({
                "pid": self.vms[&id].process.pid(),
                "life": self.epoch,
                "guest_bytes": Pages(report.guest).bytes(),
                "stock_bytes": Pages(report.stock).bytes(),
                "reserve_bytes": Pages(report.reserve).bytes(),
                "overcharge_bytes": self.tree.snapshot(self.vms[&id].node).overcharge.bytes(),
            }),
        );
        self.event(EventKind::Adopted, Some(&name), details);
        if hello.started && !paused && hello.paused {
            // Whoever let it go on has been remembered, and not heard.
            self.resume(id, "request", None);
        }
        self.aim_balloon(id);
        self.aim_reclaim(id, None);
        if self.is_emptied(id) {
            // What an earlier controller has begun, perhaps just now: it has its time.
            self.choices.chosen(self.tree.ancestry(self.vms[&id].node));
            self.look_soon(Target::Vm(id));
            self.look_at_emptied();
        }
    }

    /// A VM that has ended before this controller began. `end`: nobody was there to see it.
    pub fn restore_ended(&mut self, remembered: &RememberedVm, end: Option<VmEnd>) -> Result<(), Refusal> {
        let (id, node) = self.create_again(remembered.spec()?, None, false)?;
        let (to_worker, _) = mpsc::channel(1);
        self.attach(id, Box::new(Nobody), to_worker)?;
        let vm = self.vms.get_mut(&id).expect("just attached");
        vm.link_closed = true;
        vm.patience = None;
        match end {
            Some(end) => {
                vm.cause = Some(end);
                self.worker_died(id, Death::Unknown);
            }
            None => {
                vm.state = VmState::Ended;
                vm.death = Some(Death::Unknown);
                vm.epitaph.clone_from(&remembered.ended);
                self.tree.set_returning(node).expect("a VM has no members");
                self.memory_is_back(id);
            }
        }
        Ok(())
    }
}

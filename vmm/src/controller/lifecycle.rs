//! From a worker's hello to its end.
//!
//! ```text
//!  Starting ──Loaded──► Running ◄──pause/resume──► Paused
//!     └──────────────────┴── process dead and socket read to its end ──► Ended ──memory back──► charges gone
//! ```
//!
//! Two things end a VM and come in any order: the pidfd says that the process is dead, and the socket says that
//! nothing more will be read. Only both together are the end, so that last words are not lost; a bound on the wait
//! keeps a socket that somebody else holds from keeping the VM alive.

use std::time::Duration;

use memcg_core::reclaim::STOCK_CAP;
use memcg_core::units::Pages;
use serde_json::json;
use tokio::time::Instant;

use super::actor::{Actor, Input, Past, WORKER_PATIENCE, answer};
use super::changes::Target;
use super::cold;
use super::error::{Code, Refusal};
use super::events::{EventKind, merged};
use super::host;
use super::journal::Entry;
use super::link::FromLink;
use super::overhead;
use super::spawn::Death;
use super::stop::StopView;
use super::view::{RamView, VmState};
use super::vm::{Awaited, KilledBy, Vm, VmEnd, VmId};
use crate::memory::pool;
use crate::worker::protocol::{ExitReason, FromWorker, Hello, ToWorker};

/// Most VMs that are remembered after their end; the newest are.
pub(super) const MOST_ENDED: usize = 1000;

/// How long last words are waited for once the process is dead.
const LAST_WORDS: Duration = Duration::from_secs(1);

impl Actor {
    /// Takes what came from a worker's socket. Nothing in it is believed before it is checked.
    pub fn heard(&mut self, id: VmId, item: FromLink) {
        let Some(vm) = self.vms.get_mut(&id) else {
            return;
        };
        if vm.state == VmState::Ended {
            return;
        }
        let message = match item {
            FromLink::Message(message) => message,
            FromLink::Garbage(reason) => {
                self.lie(id, format!("sent garbage ({reason})"));
                return;
            }
            FromLink::Closed => {
                vm.link_closed = true;
                if vm.death.is_some() {
                    self.end(id);
                } else {
                    vm.patience = Some(Instant::now() + host::scaled(WORKER_PATIENCE));
                }
                return;
            }
        };
        if vm.cause.is_some() {
            // It is being killed or has said its last words; only its end matters now.
            return;
        }
        let greeted = vm.greeted;
        match message {
            FromWorker::Hello(hello) if !greeted => self.hello(id, hello),
            FromWorker::Hello(_) => self.lie(id, "said hello twice".to_owned()),
            FromWorker::Failed { message, smallest_max } => {
                vm.patience = Some(Instant::now() + host::scaled(WORKER_PATIENCE));
                let message = message.chars().filter(|c| !c.is_control()).collect();
                // The worker does not know what it costs itself.
                let overhead = if vm.accounted() { vm.fixed_overhead() } else { Pages::ZERO };
                let cause = match smallest_max {
                    Some(pages) => self.too_small(id, message, Pages(pages) + overhead),
                    None => VmEnd::Failed { message, smallest_max: None },
                };
                self.vms.get_mut(&id).expect("checked").cause = Some(cause);
            }
            FromWorker::Exited(reason) => {
                vm.patience = Some(Instant::now() + host::scaled(WORKER_PATIENCE));
                vm.cause = Some(VmEnd::Guest(reason));
            }
            _ if !greeted => self.lie(id, "did not say hello".to_owned()),
            FromWorker::Report(report) => self.report(id, report),
            FromWorker::Activated { seq, resident, reserve_target } => {
                self.activated(id, seq, Pages(resident), Pages(reserve_target));
            }
            FromWorker::NotActivated { seq, message } => self.not_activated(id, seq, &message),
            FromWorker::Loaded { plan } => self.loaded(id, plan),
            FromWorker::GuestStats(stats) => vm.guest_stats = Some((stats, Instant::now())),
        }
    }

    /// A worker said something that cannot be true: it is broken or broken into, and its VM ends.
    pub fn lie(&mut self, id: VmId, message: String) {
        tracing::error!(vm = self.vms[&id].name, message, "the worker is ended");
        self.kill(id, VmEnd::Died { message });
    }

    /// A worker says who it is and what it holds: that is what is charged for it from now on.
    fn hello(&mut self, id: VmId, hello: Hello) {
        let vm = self.vms.get_mut(&id).expect("checked");
        if let Err(lie) = check_hello(vm, &hello, self.epoch) {
            self.lie(id, lie);
            return;
        }
        let slots = hello.ram.iter().filter(|slot| slot.bytes > 0);
        vm.ram = slots.map(|s| RamView { gpa: s.gpa, hva: s.hva, bytes: s.bytes, stage_hva: s.stage }).collect();
        (vm.store, vm.pool) = (hello.store.into(), hello.pool.into());
        vm.greeted = true;
        vm.patience = None;
        vm.reserve_target = Pages(hello.reserve_target);
        self.recount(id, &hello);
        match &mut self.recounting {
            Some(waiting) => waiting.push((id, hello)),
            None => self.greeted(id, &hello),
        }
    }

    /// A worker that was heard of gets what it needs to begin, or to go on.
    pub(super) fn greeted(&mut self, id: VmId, hello: &Hello) {
        self.fund(id);
        if self.vms[&id].adopted {
            self.adopted(id, hello);
        }
        if let Some(plan) = hello.loaded
            && !hello.started
        {
            self.loaded(id, plan);
        }
    }

    fn loaded(&mut self, id: VmId, plan: u64) {
        let vm = self.vms.get_mut(&id).expect("checked");
        if vm.state != VmState::Starting {
            self.lie(id, "loaded a kernel twice".to_owned());
            return;
        }
        vm.start_due = !vm.send(ToWorker::Start);
        vm.state = VmState::Running;
        let name = vm.name.clone();
        let details = self.account(id, json!({ "loaded_bytes": Pages(plan).bytes() }));
        self.event(EventKind::Started, Some(&name), details);
        for reply in std::mem::take(&mut self.vms.get_mut(&id).expect("checked").starters) {
            answer(reply, Ok(self.vm_view(id, false)));
        }
        self.aim_balloon(id);
    }

    /// The process is gone.
    pub fn worker_died(&mut self, id: VmId, death: Death) {
        let Some(vm) = self.vms.get_mut(&id) else {
            return;
        };
        vm.death = Some(death);
        if vm.link_closed {
            self.end(id);
        } else {
            vm.patience = Some(Instant::now() + host::scaled(LAST_WORDS));
        }
    }

    /// A worker has used up the time it had to say hello, to die or to be heard.
    pub fn overdue_worker(&mut self, id: VmId, now: Instant) {
        let Some(vm) = self.vms.get_mut(&id) else {
            return;
        };
        if vm.patience.is_none_or(|at| at > now) {
            return;
        }
        vm.patience = None;
        if vm.death.is_some() {
            self.end(id);
        } else if vm.greeted {
            self.kill(id, VmEnd::Died { message: "closed its socket and did not end".to_owned() });
        } else {
            self.kill(id, VmEnd::Died { message: "did not say hello in time".to_owned() });
        }
    }

    /// The VM has ended: everybody who waits for it is told, its charges stay until the host has the memory.
    fn end(&mut self, id: VmId) {
        let details = self.account(id, json!({}));
        let vm = self.vms.get_mut(&id).expect("checked");
        if vm.state == VmState::Ended {
            return;
        }
        let death = vm.death.unwrap_or(Death::Unknown);
        vm.state = VmState::Ended;
        (vm.paused_by, vm.kept_paused) = (None, false);
        vm.hold = None;
        vm.patience = None;
        // Its name is free again; its charges stay until the host has the memory.
        self.tree.set_returning(vm.node).expect("a VM has no members");
        vm.set_missing(0);
        vm.grant_due = false;
        let cause = vm.cause.take().unwrap_or_else(|| VmEnd::Died { message: death.to_string() });
        let epitaph = cause.to_string();
        let (kind, extra) = describe(&cause);
        let details = merged(details, extra);
        let gone = Refusal::new(Code::WrongState, format!("the VM {:?} has ended", vm.name));
        vm.process.tidy();
        if let Some(console) = &mut vm.console {
            console.keep();
        }
        let killed = matches!(cause, VmEnd::Killed(_));
        if let Some(ended) = vm.ended.take() {
            // Nobody may be waiting (a VM that outlives its starter).
            let _ = ended.send(cause);
        }
        let early = Refusal::new(Code::StartFailed, format!("the VM {:?} did not start: {epitaph}", vm.name));
        vm.epitaph = Some(epitaph);
        for starter in std::mem::take(&mut vm.starters) {
            answer(starter, Err(early.clone()));
        }
        let removers = std::mem::take(&mut vm.removers);
        let killers = std::mem::take(&mut vm.killers);
        let (stoppers, unheard) =
            vm.stopping.take().map(|stopping| (stopping.replies, stopping.unheard)).unwrap_or_default();
        let waiting = std::mem::take(&mut vm.waiting);
        let name = vm.name.clone();
        let how = vm.epitaph.clone().unwrap_or_default();
        self.refuse_waiting(id, &gone);
        self.recalled_in_vain(id);
        self.abandon_changes(id, &gone);
        self.ladders.remove(&Target::Vm(id));
        self.abandon_reclaims(Target::Vm(id), &gone);
        self.remember(Entry::Ended { vm: name.clone(), how });
        self.event(kind, Some(&name), details);
        for reply in killers {
            answer(reply, Ok(self.vm_view(id, false)));
        }
        for reply in stoppers {
            answer(reply, Ok(StopView { killed, unheard, vm: self.vm_view(id, false) }));
        }
        for waiting in waiting {
            match waiting.what {
                Awaited::View(reply) => answer(reply, Ok(self.vm_view(id, false))),
                Awaited::Paused(reply) | Awaited::Resumed(reply) => answer(reply, Err(gone.clone())),
            }
        }
        if !removers.is_empty() {
            self.removed(&name);
        }
        for reply in removers {
            answer(reply, Ok(()));
        }
        let residency = self.vms.get_mut(&id).and_then(|vm| vm.process.residency().cloned());
        if let Some(inbox) = self.inbox.upgrade() {
            tokio::spawn(async move {
                let back = match residency {
                    Some(residency) => residency.returned().await,
                    None => {
                        host::memory_settled().await;
                        true
                    }
                };
                if !back {
                    tracing::error!(vm = name, "the memory of the dead worker is not back after ten seconds");
                }
                // An actor that is gone needs no charges.
                let _ = inbox.send(Input::Settled(id)).await;
            });
        }
    }

    /// The host has a dead VM's memory back: its node goes, and what is left is its last view.
    pub fn memory_is_back(&mut self, id: VmId) {
        let Some(vm) = self.vms.get(&id) else {
            return;
        };
        let node = vm.node;
        self.tree.uncharge_all(node);
        let view = self.vm_view(id, false);
        if let Some(vm) = self.vms.remove(&id)
            && !vm.forgotten
        {
            self.past.insert(vm.name, Past { id, view, config: vm.config, console: vm.console });
            let oldest = || self.past.iter().min_by_key(|(_, past)| past.id).map(|(name, _)| name.clone());
            if self.past.len() > MOST_ENDED
                && let Some(name) = oldest()
            {
                self.past.remove(&name);
                self.gone(&name);
            }
        }
        // This one alone: another VM that was never charged is still looked at until its own memory is back.
        let _ = self.tree.remove(node);
        self.reap();
        self.roomier = true;
    }

    /// A VM that has ended was removed.
    pub fn removed(&mut self, name: &str) {
        self.forget(name);
        self.gone(name);
        self.event(EventKind::Removed, Some(name), json!({}));
    }

    /// A VM that has ended need not be remembered any more, unless it already is another one of its name that is.
    fn gone(&mut self, name: &str) {
        if !self.is_taken(name) {
            self.remember(Entry::Gone { vm: name.to_owned() });
        }
    }

    /// Shows a VM that has ended no more.
    pub fn forget(&mut self, name: &str) {
        self.past.remove(name);
        let ended = self.vms.named(name).filter(|(_, vm)| vm.state == VmState::Ended);
        for id in ended.map(|(id, _)| id).collect::<Vec<_>>() {
            self.vms.get_mut(&id).expect("found").forgotten = true;
        }
    }
}

/// Tests what a worker says first.
fn check_hello(vm: &Vm, hello: &Hello, epoch: u32) -> Result<(), String> {
    if hello.instance != vm.instance {
        return Err("is another VM's".to_owned());
    }
    let total = hello.ram.iter().filter(|slot| slot.bytes > 0).try_fold(0u64, |sum, slot| {
        // A slot that wraps around the address space is no slot.
        slot.gpa.checked_add(slot.bytes)?;
        slot.hva.checked_add(slot.bytes)?;
        sum.checked_add(slot.bytes)
    });
    let areas = [hello.store, hello.pool].map(|area| (area.hva, area.bytes));
    let elsewhere = hello.ram.iter().map(|slot| (slot.stage, slot.bytes)).chain(areas);
    // Whoever counts what is there goes through all of it.
    if hello.store.bytes > cold::most_stored(vm.size).bytes()
        || hello.pool.bytes > pool::BYTES
        || elsewhere.into_iter().any(|(start, bytes)| start.checked_add(bytes).is_none())
    {
        return Err("has a stage, a store or a pool where no memory can be".to_owned());
    }
    if total != Some(vm.size.bytes()) {
        return Err("has mapped another amount of RAM than it was told".to_owned());
    }
    // Accounting may have begun when nobody was left to remember it; it does not end.
    if hello.accounting != vm.accounted() && !(vm.adopted && hello.accounting) {
        return Err("does not charge as it was told".to_owned());
    }
    let (target, most) = (Pages(hello.reserve_target), vm.largest_reserve());
    if target > if hello.accounting { most } else { Pages::ZERO } {
        return Err(format!("wants a reserve of {target}, at most {most} are needed"));
    }
    let report = &hello.report;
    if report.epoch >= epoch {
        return Err(format!("has heard of the controller's life {}, this is {epoch}", report.epoch));
    }
    let holds = report.held();
    if holds != report.granted_total.checked_sub(report.returned_total) {
        return Err("says that it holds other pages than it was granted".to_owned());
    }
    overhead::check(report, vm.size, hello.accounting)?;
    cold::check(report, vm.size, hello.accounting)?;
    let most = vm.size + vm.most_grown() + target + STOCK_CAP + cold::most_dead(vm.size);
    let most = if hello.accounting { most.0 } else { 0 };
    if holds.is_none_or(|holds| holds > most) || report.guest > vm.size.0 || report.ballooned > vm.size.0 {
        return Err(format!("says that it holds {holds:?} pages, it can hold {most}"));
    }
    if !vm.adopted && (holds != Some(0) || hello.started || report.epoch != 0) {
        return Err("says that it has run already".to_owned());
    }
    Ok(())
}

/// The event of an end, with what explains it.
fn describe(cause: &VmEnd) -> (EventKind, serde_json::Value) {
    match cause {
        VmEnd::Guest(reason) => {
            let (reason, status) = match reason {
                ExitReason::PowerOff => ("power_off", None),
                ExitReason::Reset => ("reset", None),
                ExitReason::Status(status) => ("status", Some(*status)),
                ExitReason::TripleFault => ("triple_fault", None),
                ExitReason::Error => ("error", None),
            };
            (EventKind::Stopped, json!({ "reason": reason, "status": status }))
        }
        VmEnd::Killed(by) => {
            let by = match by {
                KilledBy::Policy => "policy",
                KilledBy::Host => "host",
                KilledBy::Group => "group",
                KilledBy::Request => "request",
                KilledBy::Stop => "stop",
            };
            (EventKind::Killed, json!({ "by": by }))
        }
        VmEnd::Failed { message, smallest_max } => {
            (EventKind::WorkerDied, json!({ "reason": message, "smallest_max_bytes": smallest_max.map(Pages::bytes) }))
        }
        VmEnd::Died { message } => (EventKind::WorkerDied, json!({ "reason": format!("the worker {message}") })),
    }
}

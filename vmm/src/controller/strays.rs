//! Workers that run and could not be taken over.
//!
//! A stray keeps its name and is charged with the most that it can hold: what the host finds at it, and what it may have been
//! granted beyond that. The latter is *assumed*: nobody is chosen at a level that only an assumption makes full (`victim.rs`). A
//! stray is killed only when somebody removes it. One that may answer another time is met again every few seconds:
//!
//! ```text
//!   Stray ── says hello ──► one of the VMs, recounted as at the beginning
//!     │
//!     └── its process ends, or `rm` kills it ──► a VM that has ended; removed
//! ```

use std::path::PathBuf;
use std::time::Duration;

use memcg_core::frame::Cost;
use memcg_core::reclaim::STOCK_CAP;
use memcg_core::tree::NodeId;
use memcg_core::units::{Limit, Pages, human};
use serde_json::json;

use super::Controller;
use super::actor::{Actor, Input, answer};
use super::adopt::{Found, Worker, meet};
use super::cold;
use super::error::{Code, Refusal};
use super::events::EventKind;
use super::grants::GO_ON;
use super::host;
use super::journal::{Entry, RememberedVm};
use super::overview::StrayView;
use super::residency::looseness;
use super::spawn::{DeathWatch, WorkerHandle};
use super::vm::{Reply, VmEnd};

/// Time between two tries to take over a worker that did not.
const LATER: Duration = Duration::from_secs(2);

/// A worker that runs and could not be taken over.
pub(super) struct Stray {
    worker: Option<WorkerHandle>,
    why: Why,
    /// Where the most that it can hold is charged, when the journal knows it.
    node: Option<NodeId>,
    /// How much of that charge is not at it, as far as the host says.
    assumed: Pages,
    vm: Option<RememberedVm>,
    removers: Vec<Reply<()>>,
}

/// Why a worker that runs could not be taken over.
pub(super) struct Why {
    words: String,
    /// It may be possible later.
    later: bool,
    /// It was killed, and is not gone yet: all that it has is on its way back.
    is_ending: bool,
}

impl Why {
    /// It will never be.
    pub fn for_ever(words: impl Into<String>) -> Self {
        Self { words: words.into(), later: false, is_ending: false }
    }

    /// It may be possible later.
    pub fn for_now(words: impl Into<String>) -> Self {
        Self { words: words.into(), later: true, is_ending: false }
    }

    /// It was killed.
    pub fn ending() -> Self {
        Self { words: "it is ending".to_owned(), later: false, is_ending: true }
    }
}

impl Controller {
    /// Leaves a worker alone that runs and cannot be taken over, until it ends, or can be.
    ///
    /// # Errors
    /// When the controller is going away.
    pub(super) async fn leave_alone(
        &self,
        name: String,
        vm: Option<RememberedVm>,
        worker: Option<(WorkerHandle, DeathWatch)>,
        why: Why,
    ) -> Result<(), Refusal> {
        let (handle, watch) = worker.unzip();
        let again = vm.clone().filter(|_| why.later).zip(handle.as_ref().map(|handle| handle.directory().to_owned()));
        let residency = handle.as_ref().and_then(WorkerHandle::residency).cloned();
        let held = tokio::task::spawn_blocking(move || Some(residency?.resident(&[]).ok()?.private));
        // Of one that is ending the host says little, and nobody has to go for what is on its way.
        let held = held.await.ok().flatten().filter(|_| !why.is_ending);
        let of = name.clone();
        self.ask(move |actor, reply| answer(reply, actor.leave_alone(of, vm, handle, held, why))).await?;
        let Some(watch) = watch else { return Ok(()) };
        let controller = self.clone();
        tokio::spawn(async move {
            let mut ended = std::pin::pin!(watch.ended());
            loop {
                let worker = tokio::select! {
                    _ = &mut ended => {
                        // An actor that is gone does not care.
                        let ended = Input::Request(Box::new(move |actor| actor.stray_ended(&name)));
                        let _ = controller.inbox.send(ended).await;
                        return;
                    }
                    worker = meet_later(again.as_ref()) => worker,
                };
                let (of, Some((vm, _))) = (name.clone(), &again) else { return };
                if controller.ask(move |actor, reply| answer(reply, actor.no_longer_stray(&of))).await.is_ok() {
                    if let Err(refusal) = controller.restore_worker(vm.clone(), *worker).await {
                        tracing::error!(vm = name, %refusal, "the VM cannot be taken over");
                    }
                    return;
                }
            }
        });
        Ok(())
    }
}

/// The worker of a VM, when it says hello at last.
async fn meet_later(again: Option<&(RememberedVm, PathBuf)>) -> Box<Worker> {
    let Some((vm, directory)) = again else { return std::future::pending().await };
    loop {
        tokio::time::sleep(host::scaled(LATER)).await;
        if let Found::Worker(worker) = meet(directory, &vm.name, vm.instance).await {
            return worker;
        }
    }
}

impl Actor {
    /// A worker runs that cannot be taken over; the host says that it has `held` pages.
    fn leave_alone(
        &mut self,
        name: String,
        vm: Option<RememberedVm>,
        worker: Option<WorkerHandle>,
        held: Option<Pages>,
        why: Why,
    ) -> Result<(), Refusal> {
        let (mut node, mut assumed) = (None, Pages::ZERO);
        if let Some(vm) = &vm {
            let spec = vm.spec()?;
            // What it was granted and has not used.
            let unused = super::vm::reserve(spec.cpus) + STOCK_CAP + looseness();
            let most = spec.size + Cost::most(spec.size).total() + unused + cold::most_dead(spec.size);
            let most = held.map_or(most, |held| most.min(held + unused));
            let at = self.add_node(self.group_for(&spec.group)?, &spec)?;
            if spec.accounting {
                self.charge_what_is_there(at, &spec.overhead);
                let most = spec.limits.max.and_then(Limit::as_pages).map_or(most, |max| max.min(most));
                self.charge_whatever(at, most);
                assumed = most.saturating_sub(held.unwrap_or(Pages::ZERO));
            }
            node = Some(at);
        }
        let pid = worker.as_ref().map(WorkerHandle::pid);
        tracing::error!(vm = name, pid, "the worker runs and is not taken over: {}", why.words);
        self.event(EventKind::NotAdopted, Some(&name), json!({ "pid": pid, "reason": why.words }));
        self.strays.insert(name, Stray { worker, why, node, assumed, vm, removers: Vec::new() });
        Ok(())
    }

    /// A stray has said hello: room for it is made anew.
    ///
    /// # Errors
    /// When it is to end, or has.
    fn no_longer_stray(&mut self, name: &str) -> Result<(), Refusal> {
        let stray = self.strays.remove(name).ok_or_else(|| self.unknown(name))?;
        if !stray.removers.is_empty() {
            self.strays.insert(name.to_owned(), stray);
            return Err(self.unknown(name));
        }
        if let Some(node) = stray.node {
            self.discard(node);
        }
        Ok(())
    }

    /// The process of a stray has ended.
    fn stray_ended(&mut self, name: &str) {
        let Some(stray) = self.strays.remove(name) else { return };
        if let Some(node) = stray.node {
            self.discard(node);
        }
        if let Some(worker) = stray.worker {
            worker.tidy();
        }
        if stray.removers.is_empty() {
            if let Some(vm) = stray.vm {
                let end = vm.end(VmEnd::Died { message: "ended, unattended".to_owned() });
                let restored = self.restore_ended(&vm, Some(end));
                debug_assert!(restored.is_ok(), "its name was kept free");
            }
            return;
        }
        self.remember(Entry::Gone { vm: name.to_owned() });
        self.event(EventKind::Removed, Some(name), json!({}));
        for reply in stray.removers {
            answer(reply, Ok(()));
        }
    }

    /// Ends a stray for somebody at the interface; `unknown` is the answer when there is none.
    pub fn remove_stray(&mut self, name: &str, unknown: Refusal, reply: Reply<()>) {
        match self.strays.get_mut(name) {
            Some(Stray { worker: Some(worker), removers, .. }) => {
                worker.kill();
                removers.push(reply);
            }
            _ => answer(reply, Err(unknown)),
        }
    }

    /// What is said of a name that no VM here has.
    pub fn unknown(&self, name: &str) -> Refusal {
        let Some(stray) = self.strays.get(name) else {
            return Refusal::new(Code::NotFound, format!("there is no VM named {name:?} here"));
        };
        let pid = stray.worker.as_ref().map_or("unknown".to_owned(), |worker| worker.pid().to_string());
        let Why { words, later, .. } = &stray.why;
        let help = if *later { "it is tried again until that is possible" } else { "start the ballast that made it" };
        let message = format!(
            "the worker of the VM {name:?} (process {pid}) could not be taken over: {words}; {help}, or end it with \
             `ballast rm {name}`"
        );
        Refusal::new(Code::WrongState, message)
    }

    /// Whose charges alone leave no memory in `level`: they are assumed, and without them there is room.
    pub fn assumed_full(&self, level: NodeId) -> Option<String> {
        let within = |stray: &Stray| stray.node.is_some_and(|node| self.tree.is_within(node, level));
        let within = || self.strays.iter().filter(|(_, stray)| within(stray) && !stray.assumed.is_zero());
        let assumed: Pages = within().map(|(_, stray)| stray.assumed).sum();
        let real = self.tree.usage(level).saturating_sub(assumed);
        let room = self.tree.limits(level).max.as_pages()?.saturating_sub(real);
        if assumed.is_zero() || room < Pages(GO_ON) {
            return None;
        }
        let names: Vec<_> = within().map(|(name, _)| format!("{name:?}")).collect();
        let of = if names.len() == 1 { "the worker" } else { "the workers" };
        let (names, assumed) = (names.join(", "), human(assumed.bytes()));
        Some(format!(
            "{of} of {names} cannot be asked, and {assumed} are kept for what may be there beside what is seen"
        ))
    }

    /// All of them, by name.
    pub fn stray_views(&self) -> Vec<StrayView> {
        let view = |(name, stray): (&String, &Stray)| StrayView {
            name: name.clone(),
            group: stray.vm.as_ref().map(|vm| vm.group.clone()),
            pid: stray.worker.as_ref().map(WorkerHandle::pid),
            why: stray.why.words.clone(),
            is_ending: stray.why.is_ending,
            charged_bytes: stray.node.map_or(0, |node| self.tree.usage(node).bytes()),
        };
        self.strays.iter().map(view).collect()
    }

    /// Refuses the name of a stray to others.
    ///
    /// # Errors
    /// When one has it.
    pub fn no_stray(&self, name: &str) -> Result<(), Refusal> {
        if !self.strays.contains_key(name) {
            return Ok(());
        }
        Err(Refusal { code: Code::AlreadyExists, ..self.unknown(name) })
    }
}

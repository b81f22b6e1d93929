//! The controller: one owner of all counters, and the handle by which everything else talks to it.
//!
//! `ballast run` has one in the foreground with a single VM; a service has the same with many. The actor holds a
//! tree of counters and a map of VMs in either case.

mod activation;
mod actor;
mod admission;
pub mod adopt;
pub mod armour;
pub mod audit;
mod backstop;
mod balloon;
pub mod cgroup;
mod changes;
pub mod check;
mod cold;
pub mod config;
pub mod console;
pub mod error;
pub mod events;
mod floor;
mod grants;
pub mod groups;
pub mod host;
mod idle;
pub mod journal;
pub mod ladders;
mod lifecycle;
mod link;
mod moves;
mod no_room;
pub mod oom_log;
pub mod overhead;
pub mod overview;
mod pressure;
mod promises;
pub mod questions;
pub mod rank;
mod recall;
pub mod reclaim;
mod release;
pub mod residency;
mod resume;
pub mod shortage;
mod show;
pub mod signals;
pub mod spawn;
mod squeeze;
pub mod standing;
pub mod start;
pub mod stop;
mod strays;
#[cfg(test)]
mod tests;
mod thrash;
mod unfilled;
mod victim;
pub mod view;
mod vm;
mod vms;
pub mod why;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use memcg_core::tree::LimitPatch;
use memcg_core::units::{Limit, Pages};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use actor::{Actor, Input, answer};
pub use changes::{Changed, DEADLINE, MemoryChange, NodeChange};
use config::VmConfig;
use console::ConsoleLog;
use error::{Code, Refusal};
use events::Event;
use journal::Journal;
use link::FromLink;
use overview::HostView;
use residency::Residency;
use spawn::{DeathWatch, WorkerHandle};
use view::{VmState, VmView};
pub use vm::{KilledBy, OomPolicy, VmEnd, VmId, WorkerProcess};

use crate::worker::protocol::ToWorker;

/// Inputs that may wait for the actor; whoever sends more waits.
const INBOX: usize = 256;

/// Talks to a controller. Clones talk to the same one; it ends with the last of them.
#[derive(Clone)]
pub struct Controller {
    inbox: mpsc::Sender<Input>,
    news: watch::Receiver<u64>,
}

/// What a VM is apart from its process.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// Name, unique among those that run.
    pub name: String,
    /// Path of the group that it is made in.
    pub group: String,
    /// Guest RAM.
    pub size: Pages,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Whether its memory is charged.
    pub accounting: bool,
    /// Its limits; those that are absent are the defaults.
    pub limits: LimitPatch,
    /// Who has twice as many gives half as much, when several have to give.
    pub shares: u32,
    /// What is done when it stays held.
    pub oom: OomPolicy,
    /// What it costs beside its pages ([`overhead::of`]); charged with accounting only.
    pub overhead: Vec<overhead::Part>,
    /// Pages that its kernel and its ramdisk take once they are loaded, at most; what they cost is in it.
    pub loading: Pages,
    /// Size of the file that its pages may be evicted to; zero without one.
    pub swap_file: Pages,
    /// What its worker calls itself, drawn at random.
    pub instance: u64,
    /// As it was asked for, so that the same request is known again.
    pub config: Option<Arc<VmConfig>>,
    /// What it prints, where that is kept.
    pub console: Option<ConsoleLog>,
}

impl WorkerProcess for WorkerHandle {
    fn pid(&self) -> i32 {
        WorkerHandle::pid(self)
    }

    fn since(&self) -> tokio::time::Instant {
        self.since()
    }

    fn kill(&self) {
        WorkerHandle::kill(self);
    }

    fn console(&self) -> Option<PathBuf> {
        Some(WorkerHandle::console(self))
    }

    fn tidy(&self) {
        WorkerHandle::tidy(self);
    }

    fn set_oom_score(&self, score: i16) -> io::Result<()> {
        WorkerHandle::set_oom_score(self, score)
    }

    fn guest_ran(&self) -> Option<Duration> {
        WorkerHandle::guest_ran(self)
    }

    fn residency(&self) -> Option<&Residency> {
        WorkerHandle::residency(self)
    }
}

impl Controller {
    /// Starts a controller whose VMs may use `budget` together.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(budget: Limit) -> (Self, JoinHandle<()>) {
        Self::start_with(budget, Journal::default())
    }

    /// The same with a journal, which its VMs survive it by.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start_with(budget: Limit, journal: Journal) -> (Self, JoinHandle<()>) {
        let (inbox, inputs) = mpsc::channel(INBOX);
        let (news_sender, news) = watch::channel(0);
        let actor = Actor::new(budget, news_sender, inbox.downgrade(), journal);
        let task = tokio::spawn(actor.run(inputs));
        (Self { inbox, news }, task)
    }

    /// Makes room for a VM that is to be started: its name, its limits, what it costs beside its pages. To be followed
    /// by [`Self::adopt`] or [`Self::withdraw`].
    ///
    /// # Errors
    /// When the name is taken, the limits contradict each other, or the overhead does not fit. Nothing has changed then.
    pub async fn create(&self, spec: VmSpec) -> Result<VmId, Refusal> {
        self.ask(|actor, reply| answer(reply, actor.create(spec))).await
    }

    /// Whether a VM that was created is accounted from the start: because it asked for that, or because its group is.
    ///
    /// # Errors
    /// When there is none of this number that waits for its worker.
    pub async fn is_accounted(&self, id: VmId) -> Result<bool, Refusal> {
        self.ask(move |actor, reply| answer(reply, actor.is_accounted(id))).await
    }

    /// Gives up a VM that was created and could not be started.
    ///
    /// # Errors
    /// When there is none of this number that waits for its worker.
    pub async fn withdraw(&self, id: VmId) -> Result<(), Refusal> {
        self.ask(move |actor, reply| answer(reply, actor.withdraw(id))).await
    }

    /// Takes the started worker of a created VM in. The receiver tells how the VM ended.
    ///
    /// # Errors
    /// When no such VM waits for a worker, or the socket cannot be watched. The worker is ended then.
    pub async fn adopt(
        &self,
        id: VmId,
        handle: WorkerHandle,
        watch: DeathWatch,
        socket: std::os::fd::OwnedFd,
    ) -> Result<oneshot::Receiver<VmEnd>, Refusal> {
        self.adopt_with(id, handle, watch, socket, None).await
    }

    /// The same with what the worker has said already.
    async fn adopt_with(
        &self,
        id: VmId,
        handle: WorkerHandle,
        watch: DeathWatch,
        socket: std::os::fd::OwnedFd,
        said: Option<FromLink>,
    ) -> Result<oneshot::Receiver<VmEnd>, Refusal> {
        let (kill, dead) = (handle.clone(), handle.clone());
        let adopt = async {
            let (to_worker, reader) = link::attach(socket, self.inbox.clone(), move |item| Input::Worker(id, item))
                .map_err(|e: io::Error| Refusal::new(Code::Busy, format!("the worker's socket is unusable: {e}")))?;
            let end = self.attach(id, Box::new(handle), to_worker).await?;
            if let Some(said) = said {
                self.heard(id, said).await;
            }
            tokio::spawn(reader);
            tokio::spawn(audit::keep(self.inbox.downgrade(), self.news.clone(), id));
            let inbox = self.inbox.clone();
            tokio::spawn(async move {
                let death = backstop::explain(watch.ended().await, dead.residency().and_then(Residency::cgroup));
                let text = dead.log_tail();
                if !text.is_empty() {
                    tracing::error!(pid = dead.pid(), "the worker said: {}", text.trim_end());
                }
                // An actor that is gone has ended its workers itself.
                let _ = inbox.send(Input::Died(id, death)).await;
            });
            Ok(end)
        };
        let adopted = adopt.await;
        if adopted.is_err() {
            kill.kill();
            kill.tidy();
        }
        adopted
    }

    /// Takes a worker in that is reached by `to_worker`, and whose words come by [`Self::heard`].
    ///
    /// # Errors
    /// When no such VM waits for a worker.
    pub async fn attach(
        &self,
        id: VmId,
        process: Box<dyn WorkerProcess>,
        to_worker: mpsc::Sender<ToWorker>,
    ) -> Result<oneshot::Receiver<VmEnd>, Refusal> {
        self.ask(move |actor, reply| answer(reply, actor.attach(id, process, to_worker))).await
    }

    /// Hands over what a worker sent.
    pub async fn heard(&self, id: VmId, item: FromLink) {
        // A controller that is gone does not care.
        let _ = self.inbox.send(Input::Worker(id, item)).await;
    }

    /// Reports the death of a worker's process.
    pub async fn worker_died(&self, id: VmId, death: spawn::Death) {
        // As above.
        let _ = self.inbox.send(Input::Died(id, death)).await;
    }

    /// The host and the controller.
    ///
    /// # Errors
    /// When the controller is going away; so for all the following.
    pub async fn host(&self) -> Result<HostView, Refusal> {
        self.ask(|actor, reply| answer(reply, Ok(actor.host_view()))).await
    }

    /// All VMs, with their last known numbers.
    ///
    /// # Errors
    /// See [`Self::host`].
    pub async fn list(&self) -> Result<Vec<VmView>, Refusal> {
        self.ask(|actor, reply| answer(reply, Ok(actor.list()))).await
    }

    /// One VM with fresh numbers, and what it costs beside its pages, measured.
    ///
    /// # Errors
    /// When there is none of this name.
    pub async fn show(&self, name: &str) -> Result<VmView, Refusal> {
        let asked = name.to_owned();
        let mut view = self.ask(move |actor, reply| actor.show(&asked, reply)).await?;
        view.overhead.measured = self.measure(name, &view).await;
        Ok(view)
    }

    /// What the VM costs beside its pages, when its worker can be looked into.
    async fn measure(&self, name: &str, view: &VmView) -> Option<residency::MeasuredView> {
        let asked = name.to_owned();
        let areas: Vec<_> =
            view.ram.iter().flat_map(view::RamView::areas).chain([view.store.area(), view.pool.area()]).collect();
        let residency = self.ask(move |actor, reply| answer(reply, Ok(actor.residency(&asked)))).await.ok()??;
        tokio::task::spawn_blocking(move || residency.measured(&areas).ok()).await.ok()?
    }

    /// Changes limits. Completes when they are in force, when they will not be, or when the client's time is over.
    ///
    /// # Errors
    /// See [`Code`].
    pub async fn change(&self, name: &str, change: MemoryChange) -> Result<Changed, Refusal> {
        let name = name.to_owned();
        self.ask(move |actor, reply| match actor.find_alive(&name) {
            Ok(id) => actor.change(id, change, reply),
            Err(refusal) => answer(reply, Err(refusal)),
        })
        .await
    }

    /// Stops the vCPUs and completes when they stand still.
    ///
    /// # Errors
    /// See [`Code`].
    pub async fn pause(&self, name: &str) -> Result<VmView, Refusal> {
        let name = name.to_owned();
        self.ask(move |actor, reply| actor.pause_on_request(&name, reply)).await
    }

    /// Lets the vCPUs go on.
    ///
    /// # Errors
    /// See [`Code`].
    pub async fn resume(&self, name: &str) -> Result<VmView, Refusal> {
        self.resume_within(name, Duration::ZERO).await
    }

    /// The same, as soon as that is possible: within `wait`, or not at all.
    ///
    /// # Errors
    /// See [`Code`].
    pub async fn resume_within(&self, name: &str, wait: Duration) -> Result<VmView, Refusal> {
        let (name, until) = (name.to_owned(), Instant::now() + wait);
        self.ask(move |actor, reply| actor.resume_on_request(&name, until, reply)).await
    }

    /// Ends a VM and completes when its worker is gone.
    ///
    /// # Errors
    /// See [`Code`].
    pub async fn kill(&self, name: &str) -> Result<VmView, Refusal> {
        let name = name.to_owned();
        self.ask(move |actor, reply| actor.kill_on_request(&name, reply)).await
    }

    /// The VM of this name that runs, if it was asked for with the same words.
    ///
    /// # Errors
    /// When one runs that was not.
    pub async fn same(&self, name: &str, config: Arc<VmConfig>) -> Result<Option<VmId>, Refusal> {
        let name = name.to_owned();
        self.ask(move |actor, reply| answer(reply, actor.same(&name, &config))).await
    }

    /// Completes when the guest runs.
    ///
    /// # Errors
    /// When it ended before that; the refusal says how.
    pub async fn started(&self, id: VmId) -> Result<VmView, Refusal> {
        self.ask(move |actor, reply| actor.started(id, reply)).await
    }

    /// Ends a VM if it runs, and forgets it when its worker is gone.
    ///
    /// # Errors
    /// When there is none of this name.
    pub async fn remove(&self, name: &str) -> Result<(), Refusal> {
        let name = name.to_owned();
        self.ask(move |actor, reply| actor.remove(&name, reply)).await
    }

    /// What the guest has printed, as far as it is kept.
    ///
    /// # Errors
    /// When there is no VM of this name, or nothing is kept.
    pub async fn console(&self, name: &str) -> Result<String, Refusal> {
        let name = name.to_owned();
        // It is read here, not by the actor.
        self.ask(move |actor, reply| answer(reply, actor.console(&name))).await.map(|console| console.text())
    }

    /// The events after number `since`.
    ///
    /// # Errors
    /// See [`Self::host`].
    pub async fn events(&self, since: u64) -> Result<Vec<Event>, Refusal> {
        self.ask(move |actor, reply| answer(reply, Ok(actor.events.after(since)))).await
    }

    /// The number of the newest event, to be watched.
    pub fn news(&self) -> watch::Receiver<u64> {
        self.news.clone()
    }

    /// Has `request` done by the actor, and waits for its answer.
    async fn ask<T: Send + 'static>(
        &self,
        request: impl FnOnce(&mut Actor, vm::Reply<T>) + Send + 'static,
    ) -> Result<T, Refusal> {
        let (reply, result) = oneshot::channel();
        let stopping = || Refusal::new(Code::Stopping, "the controller is going away");
        let request = Box::new(move |actor: &mut Actor| request(actor, reply));
        self.inbox.send(Input::Request(request)).await.map_err(|_| stopping())?;
        result.await.map_err(|_| stopping())?
    }
}

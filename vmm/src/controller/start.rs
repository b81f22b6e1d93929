//! The way of a VM from its description to a worker that runs; the same for `run` and `serve`.
//!
//! ```text
//!  plan: checked, files open ─► create: name, limits, overhead ─► launch: a process ─► adopt: one of the VMs
//!                                                                    └ failed ─► withdraw: nothing is left
//! ```

use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{self, Arc, PoisonError, Weak};

use tokio::sync::{Mutex, OwnedMutexGuard, RwLock, oneshot};

use super::backstop;
use super::cgroup::{self, Cgroup, Cgroups};
use super::config::{Plan, VmConfig};
use super::console::ConsoleLog;
use super::error::{Code, Refusal};
use super::spawn::{self, Launch, SpawnError};
use super::stop::STOP_PATIENCE;
use super::view::{VmState, VmView};
use super::{Controller, VmEnd, VmId, host};
use crate::chain::chain;

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The controller refused it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// There is no process.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// There is no cgroup for its process.
    #[error("the worker's cgroup cannot be made")]
    Cgroup(#[source] std::io::Error),
}

/// A VM whose worker runs.
#[derive(Debug)]
pub struct Started {
    /// Its number.
    pub id: VmId,
    /// Tells how it ended.
    pub end: oneshot::Receiver<VmEnd>,
    /// A connection to its console, made before the guest ran; with `attach` only.
    pub console: Option<UnixStream>,
}

/// Starts a VM in `directory`, which is made for it and goes with it. `log` is the level of the worker's log. With `attach`
/// its console is connected before the guest can print.
///
/// # Errors
/// See [`StartError`]; nothing is left then.
///
/// # Panics
/// Outside a tokio runtime.
pub async fn start(
    controller: &Controller,
    plan: Plan,
    directory: PathBuf,
    log: &str,
    attach: bool,
    cgroups: Option<&Cgroups>,
) -> Result<Started, StartError> {
    let Plan { mut spec, mut worker, kernel, initrd, swap_file } = plan;
    let no_memory = |error: io::Error| Refusal::new(Code::StartFailed, format!("the console cannot be made: {error}"));
    let log_of_console = ConsoleLog::new().map_err(no_memory)?;
    let console = log_of_console.memory().map_err(no_memory)?;
    spec.console = Some(log_of_console);
    let most = backstop::most(&spec);
    let make = |cgroups: &Cgroups| cgroups.make(&spec.name, cgroup::limit_for(most)).map_err(StartError::Cgroup);
    let cgroup = cgroups.map(make).transpose()?;
    let id = controller.create(spec).await.inspect_err(|_| discard(&cgroup))?;
    worker.accounting = controller.is_accounted(id).await?;
    let launch = Launch {
        config: worker,
        kernel,
        initrd,
        swap_file,
        console,
        attach,
        directory,
        cgroup: cgroup.clone(),
        log: log.to_owned(),
    };
    match spawn::launch_aside(launch).await {
        Ok(launched) => {
            let end = controller.adopt(id, launched.handle, launched.watch, launched.link).await?;
            Ok(Started { id, end, console: launched.console })
        }
        Err(error) => {
            discard(&cgroup);
            controller.withdraw(id).await?;
            Err(error.into())
        }
    }
}

/// Removes the cgroup of a worker that there will not be.
fn discard(cgroup: &Option<Cgroup>) {
    if let Some(cgroup) = cgroup {
        cgroup.remove();
    }
}

/// Makes the VMs of `ballast serve`. Those of different names are made at once; requests for one name come one after the
/// other, so that equal ones are one VM.
#[derive(Debug)]
pub struct Service {
    state: PathBuf,
    log: String,
    /// Where workers have cgroups of their own, if they have.
    cgroups: Option<Cgroups>,
    /// False when no more VMs are made; read as long as one is being made.
    open: RwLock<bool>,
    /// Held for a name as long as a VM of it is being made.
    names: sync::Mutex<HashMap<String, Weak<Mutex<()>>>>,
}

impl Service {
    /// For VMs whose directories are in `state`. With `cgroups` each worker has one.
    pub fn new(state: &Path, log: &str, cgroups: Option<Cgroups>) -> Self {
        let (state, log) = (state.to_owned(), log.to_owned());
        Self { state, log, cgroups, open: RwLock::new(true), names: sync::Mutex::default() }
    }

    /// The directory in which each VM has its own.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Makes and starts a VM, and waits until its guest runs. True: it is new; false: it was there, and is the same.
    ///
    /// # Errors
    /// What makes no sense, does not fit, cannot be started, or another VM of this name.
    ///
    /// # Panics
    /// When making it does.
    pub async fn put(
        self: &Arc<Self>,
        controller: &Controller,
        name: &str,
        config: VmConfig,
    ) -> Result<(bool, VmView), Refusal> {
        let (service, controller, name) = (Arc::clone(self), controller.clone(), name.to_owned());
        // By a task of its own: a client that goes away must not leave half a VM.
        let made = tokio::spawn(async move { service.make(&controller, &name, config).await });
        made.await.unwrap_or_else(|error| match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(stopping()),
        })
    }

    async fn make(&self, controller: &Controller, name: &str, config: VmConfig) -> Result<(bool, VmView), Refusal> {
        for path in [Some(&config.kernel), config.initrd.as_ref(), config.swap_dir.as_ref()].into_iter().flatten() {
            if !path.is_absolute() {
                let message = format!("{}: write an absolute path: the controller opens it", path.display());
                return Err(Refusal::new(Code::BadRequest, message));
            }
        }
        let open = self.open.read().await;
        if !*open {
            return Err(stopping());
        }
        let alone = self.alone(name).await;
        let config = Arc::new(config);
        if let Some(id) = controller.same(name, Arc::clone(&config)).await? {
            drop((open, alone));
            return Ok((false, controller.started(id).await?));
        }
        spawn::check_descriptors().map_err(|error| Refusal::new(Code::StartFailed, chain(&error)))?;
        let mut plan = config.plan(name)?;
        plan.worker.die_with_parent = false;
        plan.spec.config = Some(Arc::clone(&config));
        let started = start(controller, plan, self.state.join(name), &self.log, false, self.cgroups.as_ref()).await;
        let started = started.map_err(|error| match error {
            StartError::Refused(refusal) => refusal,
            error => Refusal::new(Code::StartFailed, chain(&error)),
        })?;
        drop((open, alone));
        Ok((true, controller.started(started.id).await?))
    }

    /// Waits until no other VM of this name is being made.
    async fn alone(&self, name: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
            names.retain(|_, lock| lock.strong_count() > 0);
            let lock = names.get(name).and_then(Weak::upgrade).unwrap_or_default();
            names.insert(name.to_owned(), Arc::downgrade(&lock));
            lock
        };
        lock.lock_owned().await
    }

    /// Makes no more VMs. Completes when none is being made.
    pub async fn close(&self) {
        *self.open.write().await = false;
    }

    /// Makes no more VMs and stops those there are, the newest first: all guests are asked to power themselves off, and
    /// what has not when the time of [`STOP_PATIENCE`] is over is killed.
    ///
    /// # Errors
    /// When the controller has gone.
    pub async fn stop(&self, controller: &Controller) -> Result<(), Refusal> {
        self.close().await;
        let running = controller.list().await?.into_iter().filter(|vm| vm.state != VmState::Ended);
        let stop = |vm: VmView| {
            let controller = controller.clone();
            tokio::spawn(async move { controller.stop(&vm.name, host::scaled(STOP_PATIENCE)).await })
        };
        for stopped in running.rev().map(stop).collect::<Vec<_>>() {
            // One that has ended meanwhile is as good.
            let _ = stopped.await;
        }
        Ok(())
    }

    /// Makes no more VMs and kills those there are.
    ///
    /// # Errors
    /// When the controller has gone.
    pub async fn kill(&self, controller: &Controller) -> Result<(), Refusal> {
        kill_all(controller).await?;
        // Those that were being made until now.
        self.close().await;
        kill_all(controller).await
    }
}

async fn kill_all(controller: &Controller) -> Result<(), Refusal> {
    let running = controller.list().await?.into_iter().filter(|vm| vm.state != VmState::Ended);
    let kill = |vm: VmView| {
        let controller = controller.clone();
        tokio::spawn(async move { controller.kill(&vm.name).await })
    };
    for killed in running.map(kill).collect::<Vec<_>>() {
        // One that has ended meanwhile is as good.
        let _ = killed.await;
    }
    Ok(())
}

fn stopping() -> Refusal {
    Refusal::new(Code::Stopping, "the controller is going away")
}

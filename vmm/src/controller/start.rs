//! The way of a VM from its description to a worker that runs; the same for `run` and `serve`.
//!
//! ```text
//!  plan: checked, files open ─► create: name, limits, overhead ─► launch: a process ─► adopt: one of the VMs
//!                                                                    └ failed ─► withdraw: nothing is left
//! ```

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{Mutex, oneshot};

use super::config::{Plan, VmConfig};
use super::console::ConsoleLog;
use super::error::{Code, Refusal};
use super::spawn::{self, Launch, SpawnError};
use super::view::{VmState, VmView};
use super::{Controller, VmEnd, VmId};
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
) -> Result<Started, StartError> {
    let Plan { mut spec, mut worker, kernel, initrd } = plan;
    let no_memory = |error: io::Error| Refusal::new(Code::StartFailed, format!("the console cannot be made: {error}"));
    let log_of_console = ConsoleLog::new().map_err(no_memory)?;
    let console = log_of_console.memory().map_err(no_memory)?;
    spec.console = Some(log_of_console);
    let id = controller.create(spec).await?;
    worker.accounting = controller.is_accounted(id).await?;
    match spawn::launch(Launch { config: worker, kernel, initrd, console, attach, directory, log: log.to_owned() }) {
        Ok(launched) => {
            let end = controller.adopt(id, launched.handle, launched.watch, launched.link).await?;
            Ok(Started { id, end, console: launched.console })
        }
        Err(error) => {
            controller.withdraw(id).await?;
            Err(error.into())
        }
    }
}

/// Makes the VMs of `ballast serve`, one at a time.
#[derive(Debug)]
pub struct Service {
    state: PathBuf,
    log: String,
    /// False when no more VMs are made.
    open: Mutex<bool>,
}

impl Service {
    /// For VMs whose directories are in `state`.
    pub fn new(state: &Path, log: &str) -> Self {
        Self { state: state.to_owned(), log: log.to_owned(), open: Mutex::new(true) }
    }

    /// Makes and starts a VM, and waits until its guest runs. True: it is new; false: it was there, and is the same.
    ///
    /// # Errors
    /// What makes no sense, does not fit, cannot be started, or another VM of this name.
    pub async fn put(&self, controller: &Controller, name: &str, config: VmConfig) -> Result<(bool, VmView), Refusal> {
        for path in [Some(&config.kernel), config.initrd.as_ref()].into_iter().flatten() {
            if !path.is_absolute() {
                let message = format!("{}: write an absolute path: the controller opens it", path.display());
                return Err(Refusal::new(Code::BadRequest, message));
            }
        }
        let open = self.open.lock().await;
        if !*open {
            return Err(Refusal::new(Code::Stopping, "the controller is going away"));
        }
        let config = Arc::new(config);
        if let Some(id) = controller.same(name, Arc::clone(&config)).await? {
            drop(open);
            return Ok((false, controller.started(id).await?));
        }
        let mut plan = config.plan(name)?;
        plan.spec.config = Some(Arc::clone(&config));
        let started = start(controller, plan, self.state.join(name), &self.log, false).await;
        let started = started.map_err(|error| match error {
            StartError::Refused(refusal) => refusal,
            StartError::Spawn(error) => Refusal::new(Code::StartFailed, chain(&error)),
        })?;
        drop(open);
        Ok((true, controller.started(started.id).await?))
    }

    /// Makes no more VMs and ends those there are, the newest first.
    ///
    /// # Errors
    /// When the controller has gone.
    pub async fn stop(&self, controller: &Controller) -> Result<(), Refusal> {
        *self.open.lock().await = false;
        let mut names: Vec<_> = controller.list().await?.into_iter().filter(|vm| vm.state != VmState::Ended).collect();
        while let Some(vm) = names.pop() {
            // One that has ended meanwhile is as good.
            let _ = controller.kill(&vm.name).await;
        }
        Ok(())
    }
}

//! `ballast serve`: one controller with many VMs, on one socket.

use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use memcg_core::host::Terms;
use memcg_core::units::{Limit, Pages};
use rustix::fs::{Access, FlockOperation};

use super::options::{duration, limit};
use super::signals::Signals;
use super::{DONE, Failure, SocketArg, notify, socket};
use crate::api::server::{self, BindError};
use crate::chain::chain;
use crate::controller::cgroup::Cgroups;
use crate::controller::journal::Journal;
use crate::controller::questions::{Hook, WAITS};
use crate::controller::signals::Signals as HostSignals;
use crate::controller::start::Service;
use crate::controller::{Controller, armour, host, spawn, standing};

/// The journal, in the directory of the VMs.
pub const JOURNAL: &str = "journal";

/// `ballast serve`.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// What all VMs together may use, a size or a share of the memory such as 80%; with it every VM is charged
    ///
    /// Of a serve that lives in a cgroup with a limit, a share is of that limit.
    #[arg(long, value_name = "SIZE|SHARE%", value_parser = budget, default_value = "max")]
    budget: Budget,
    /// Directory with what belongs to the VMs [default: beside the socket, ballast.d]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// At SIGTERM, leave the VMs running: the next `ballast serve` takes them over
    #[arg(long)]
    leave_running: bool,
    /// Gives each VM's process a cgroup with a limit, below the cgroup PATH, or below serve's own (auto); 10 to 20 ms a VM
    #[arg(long, value_name = "auto|PATH")]
    cgroup: Option<PathBuf>,
    /// Command that may say who is paused or killed when there is no memory left, and no client does
    #[arg(long, value_name = "PATH")]
    oom_hook: Option<PathBuf>,
    /// How long it may take, 100ms to 60s
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "2s", requires = "oom_hook")]
    oom_hook_wait: Duration,
    /// Where to listen, or a directory for ballast.sock [default: in $XDG_RUNTIME_DIR/ballast or /run/ballast]
    #[command(flatten)]
    socket: SocketArg,
}

/// Takes over what an earlier one has left, serves until a signal comes, then ends all VMs or leaves them. A second signal
/// kills those that have not ended yet.
pub async fn serve(args: ServeArgs, log: &str) -> Result<u8, Failure> {
    let as_failure = |error: &dyn std::error::Error| Failure::error(chain(error));
    let listen = socket::to_serve(&args.socket);
    let hook = hook(&args, &listen)?;
    spawn::check_socket_path(&listen).map_err(|error| as_failure(&error))?;
    socket::check_place(&args.socket, &listen).map_err(Failure::error)?;
    host::check_kernel().map_err(|error| as_failure(&error))?;
    host::open_kvm().map_err(|error| as_failure(&error))?;
    let host_signals = HostSignals::find();
    let budget = args.budget.of(host_signals.total());
    if budget != Limit::Max {
        host::open_userfaultfd().map_err(|error| as_failure(&error))?;
    }
    let descriptors = host::allow_descriptors();
    tracing::info!(descriptors, "each VM takes a few of them");
    let place = |asked: &PathBuf| Cgroups::find((asked != Path::new("auto")).then_some(asked)).map_err(Failure::error);
    let cgroups = args.cgroup.as_ref().map(place).transpose()?;
    if cgroups.is_none() {
        tracing::info!("workers have no cgroup of their own: nothing but their account limits them (--cgroup)");
    }
    let mut signals = Signals::new().map_err(|error| as_failure(&error))?;
    let bound = server::bind(&listen).map_err(|error| match error {
        BindError::InUse(path) => Failure::error(format!(
            "{path} is in use by another controller: choose another --socket, or stop that one with SIGTERM"
        )),
        error => as_failure(&error),
    })?;
    let state = args.state_dir.clone().unwrap_or_else(|| socket::vm_directory(&listen));
    let lock = take(&state)?;
    let journal = state.join(JOURNAL);
    let (remembered, opened) = Journal::open(&journal).map_err(|error| as_failure(&error))?;

    protect();
    let (controller, mut actor) = Controller::start_with(budget, opened);
    controller.take_over(&state, &remembered).await.map_err(|error| as_failure(&error))?;
    watch(&controller, host_signals).await;
    if let Some(hook) = hook {
        controller.ask_hook(hook).await.map_err(|error| as_failure(&error))?;
    }
    let service = Arc::new(Service::new(&state, log, cgroups));
    let server = server::serve(bound, controller.clone(), Some(Arc::clone(&service)));
    let server = server.map_err(|error| as_failure(&error))?;
    notify::ready();
    let signal = tokio::select! {
        signal = signals.next() => signal,
        // It has said why. Nothing is tidied up: the VMs run on as after a kill, and the next controller takes them over.
        _ = &mut actor => std::process::abort(),
    };
    if args.leave_running {
        tracing::info!(signal, "leaving all VMs running");
        service.close().await;
        // Before its last user goes: it would end its workers then.
        actor.abort();
    } else {
        tracing::info!(signal, "ending all VMs");
        if std::io::stderr().is_terminal() {
            eprintln!("ballast: the guests are asked to power themselves off; a second signal kills their VMs");
        }
        let stopped = tokio::select! {
            stopped = service.stop(&controller) => stopped,
            signal = signals.next() => {
                tracing::warn!(signal, "a second signal: the VMs that have not powered themselves off are killed");
                service.kill(&controller).await
            }
        };
        stopped.map_err(|error| as_failure(&error))?;
    }
    let file = if args.leave_running {
        server.close().await
    } else {
        server.stop().await;
        None
    };
    drop(controller);
    // The actor ends with its last user; connections that did not let go may keep it.
    actor.abort();
    Journal::remove_if_empty(&journal);
    if let Some(file) = file
        && journal.exists()
    {
        // VMs run on: who asks for them must not hear that there are none.
        file.leave();
    }
    if args.state_dir.is_none() {
        // What is not empty has something in it that is not ours.
        let _ = std::fs::remove_dir(&state);
    }
    drop(lock);
    Ok(DONE)
}

/// The command that decides, if there is one: it is run elsewhere, so its path has to be whole.
fn hook(args: &ServeArgs, listen: &Path) -> Result<Option<Hook>, Failure> {
    let Some(asked) = &args.oom_hook else { return Ok(None) };
    let cannot = |why: String| Failure::usage(format!("--oom-hook {} {why}", asked.display()));
    let program = asked.canonicalize().map_err(|error| cannot(format!("cannot be found ({error})")))?;
    let runs = rustix::fs::access(&program, Access::EXEC_OK).is_ok() && program.is_file();
    if !runs {
        return Err(cannot("is no program that can be run: make it executable".to_owned()));
    }
    let (wait, [least, most]) = (args.oom_hook_wait, WAITS);
    if wait < least || wait > most {
        return Err(Failure::usage(format!("--oom-hook-wait is {} ms to {} s", least.as_millis(), most.as_secs())));
    }
    let socket = std::path::absolute(listen).map_err(|error| Failure::error(chain(&error)))?;
    Ok(Some(Hook { program, wait, socket }))
}

/// Takes the directory of the VMs for this process alone.
fn take(state: &Path) -> Result<File, Failure> {
    spawn::make_directory(state).map_err(|error| Failure::error(chain(&error)))?;
    let failed = |error: std::io::Error| {
        Failure::error(format!(
            "the directory {} cannot be used ({error}): choose another --state-dir",
            state.display()
        ))
    };
    let lock = File::open(state).map_err(failed)?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
        rustix::io::Errno::WOULDBLOCK => Failure::error(format!(
            "the directory {} is in use by another ballast serve: choose another --state-dir",
            state.display()
        )),
        error => failed(error.into()),
    })?;
    Ok(lock)
}

/// Has the host's memory watched.
async fn watch(controller: &Controller, signals: HostSignals) {
    if !signals.has_pressure() {
        tracing::info!(
            "this kernel does not say how long tasks wait for memory (psi=1): available memory decides alone"
        );
    }
    let total = Pages::from_bytes_floor(signals.total());
    controller.watch_host(Box::new(move || signals.read().ok()), total, Terms::new(total)).await;
}

/// Makes sure, as far as the host lets it, that this process can act when there is no memory left.
fn protect() {
    armour::put_by();
    for obstacle in [armour::lock().err(), standing::obstacle(standing::stand_last())].into_iter().flatten() {
        tracing::info!("{obstacle}");
    }
}

/// What all VMs together may use, as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Budget {
    /// So much.
    Fixed(Limit),
    /// So many per cent of what there is.
    Share(u64),
}

impl Budget {
    /// The budget where there are `total` bytes.
    fn of(self, total: u64) -> Limit {
        match self {
            Self::Fixed(limit) => limit,
            Self::Share(percent) => Limit::Pages(Pages::from_bytes_floor(share(total, percent))),
        }
    }
}

/// So many per cent of a number of bytes.
fn share(total: u64, percent: u64) -> u64 {
    // Less than the whole, so it fits.
    (u128::from(total) * u128::from(percent) / 100) as u64
}

/// A budget from a size, `max` or a share.
fn budget(text: &str) -> Result<Budget, String> {
    let Some(percent) = text.strip_suffix('%') else { return limit(text).map(Budget::Fixed) };
    let percent = percent.parse().ok().filter(|percent| (1..=100).contains(percent));
    percent.map(Budget::Share).ok_or_else(|| format!("{text:?} is no share: write for example 80%"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_a_size_or_a_share_of_what_there_is() {
        let of = |text: &str| budget(text).map(|budget| budget.of(1000 << 20));
        assert_eq!(of("max"), Ok(Limit::Max));
        assert_eq!(of("20G"), Ok(Limit::Pages(Pages::from_mib(20 << 10))));
        assert_eq!(of("80%"), Ok(Limit::Pages(Pages::from_mib(800))));
        for wrong in ["0%", "101%", "%", "-1%", "8 %"] {
            assert!(of(wrong).is_err_and(|error| error.contains("no share")), "{wrong}");
        }
    }

    #[test]
    fn a_directory_is_taken_once() {
        let place = tempfile::tempdir().unwrap();
        let state = place.path().join("ballast.d");
        let lock = take(&state).expect("taken");
        assert!(take(&state).unwrap_err().message.contains("in use by another ballast serve"));
        drop(lock);
        take(&state).expect("free again");
        std::fs::write(place.path().join("file"), "").unwrap();
        assert!(take(&place.path().join("file")).unwrap_err().message.contains("in the way"));
    }
}

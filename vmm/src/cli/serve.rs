//! `ballast serve`: one controller with many VMs, on one socket.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memcg_core::units::Limit;
use rustix::fs::FlockOperation;

use super::options::limit;
use super::signals::Signals;
use super::{DONE, Failure, SocketArg, socket};
use crate::api::server;
use crate::chain::chain;
use crate::controller::start::Service;
use crate::controller::{Controller, host, spawn};

/// `ballast serve`.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// What all VMs together may use; with it every VM is charged
    #[arg(long, value_name = "SIZE", value_parser = limit, default_value = "max")]
    budget: Limit,
    /// Directory with what belongs to the VMs [default: beside the socket, ballast.d]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where to listen, or a directory for ballast.sock [default: in $XDG_RUNTIME_DIR/ballast or /run/ballast]
    #[command(flatten)]
    socket: SocketArg,
}

/// Serves until a signal comes, then ends all VMs.
pub async fn serve(args: ServeArgs, log: &str) -> Result<u8, Failure> {
    let as_failure = |error: &dyn std::error::Error| Failure::error(chain(error));
    let listen = socket::to_serve(&args.socket);
    spawn::check_socket_path(&listen).map_err(|error| as_failure(&error))?;
    host::check_kernel().map_err(|error| as_failure(&error))?;
    host::open_kvm().map_err(|error| as_failure(&error))?;
    if args.budget != Limit::Max {
        host::open_userfaultfd().map_err(|error| as_failure(&error))?;
    }
    let descriptors = host::allow_descriptors();
    tracing::info!(descriptors, "each VM takes a few of them");
    let mut signals = Signals::new().map_err(|error| as_failure(&error))?;
    let bound = server::bind(&listen).map_err(|error| as_failure(&error))?;
    let state = args.state_dir.clone().unwrap_or_else(|| socket::vm_directory(&listen));
    let lock = take(&state)?;

    let (controller, actor) = Controller::start(args.budget);
    let service = Arc::new(Service::new(&state, log));
    let server = server::serve(bound, controller.clone(), Some(Arc::clone(&service)));
    let server = server.map_err(|error| as_failure(&error))?;
    let signal = signals.next().await;
    tracing::info!(signal, "ending all VMs");
    service.stop(&controller).await.map_err(|error| as_failure(&error))?;
    server.stop().await;
    drop(controller);
    // The actor ends with its last user; connections that did not let go may keep it.
    actor.abort();
    if args.state_dir.is_none() {
        // What is not empty has something in it that is not ours.
        let _ = std::fs::remove_dir(&state);
    }
    drop(lock);
    Ok(DONE)
}

/// Takes the directory of the VMs for this process alone, and removes what a killed one has left in it.
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
    for left in std::fs::read_dir(state).map_err(failed)?.flatten() {
        spawn::tidy(&left.path());
    }
    Ok(lock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_taken_once_and_tidied() {
        let place = tempfile::tempdir().unwrap();
        let state = place.path().join("ballast.d");
        let left = state.join("web");
        spawn::make_directory(&left).unwrap();
        drop(std::os::unix::net::UnixListener::bind(spawn::worker_socket(&left)).unwrap());
        std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let lock = take(&state).expect("taken");
        assert!(!left.exists() && state.exists());
        assert!(take(&state).unwrap_err().message.contains("in use by another ballast serve"));
        drop(lock);
        take(&state).expect("free again");
        std::fs::write(place.path().join("file"), "").unwrap();
        assert!(take(&place.path().join("file")).unwrap_err().message.contains("in the way"));
    }
}

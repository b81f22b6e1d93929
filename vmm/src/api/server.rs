//! The socket: made for this user alone, taken over from a dead process, removed at the end.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Mode;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::controller::Controller;
use crate::controller::spawn::{SpawnError, check_socket_path};
use crate::controller::start::Service;

/// How long requests that are being answered may take when the server ends.
const GRACE: Duration = Duration::from_secs(1);

/// Why the socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path does not fit.
    #[error(transparent)]
    Path(#[from] SpawnError),
    /// A living process answers there.
    #[error("{0} is in use by a running VM: choose another --name or --socket, or end that one")]
    InUse(String),
    /// Something that is no socket is in the way.
    #[error("{0} exists and is not a socket: choose another --socket")]
    NotASocket(String),
    /// The system refused.
    #[error("the socket {path} cannot be made ({reason}): choose another --socket")]
    System {
        /// Path of the socket.
        path: String,
        /// The system's reason.
        reason: io::Error,
    },
}

/// A listening socket whose file is removed when it is dropped.
#[derive(Debug)]
pub struct Bound {
    listener: UnixListener,
    file: SocketFile,
}

/// The file of a socket that this process has made.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody else's socket may be at the path by now.
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Gone already is as good.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// Makes the socket at `path`, mode 0600, with the directory above it if that is missing (mode 0700). The file of
/// a process that is gone is replaced.
///
/// # Errors
/// See [`BindError`].
pub fn bind(path: &Path) -> Result<Bound, BindError> {
    check_socket_path(path)?;
    let name = || path.display().to_string();
    let failed = |reason| BindError::System { path: name(), reason };
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(BindError::NotASocket(name())),
        Ok(_) => match UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
            Ok(_) => return Err(BindError::InUse(name())),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    // The file must never be open to others, not even between two system calls.
    let before = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let listener = UnixListener::bind(path);
    rustix::process::umask(before);
    let listener = listener.map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let file = SocketFile { path: path.to_owned(), identity: identity(path) };
    Ok(Bound { listener, file })
}

/// A server that runs.
pub struct Server {
    task: JoinHandle<()>,
    stopping: watch::Sender<bool>,
    file: SocketFile,
}

/// Serves the interface of `controller` on a socket; with `service` it makes VMs, too.
///
/// # Errors
/// When the socket cannot be watched.
///
/// # Panics
/// Outside a tokio runtime.
pub fn serve(bound: Bound, controller: Controller, service: Option<Arc<Service>>) -> io::Result<Server> {
    let Bound { listener, file } = bound;
    let listener = tokio::net::UnixListener::from_std(listener)?;
    let (stopping, stopped) = watch::channel(false);
    let router = super::router(controller, service, stopped.clone());
    let task = tokio::spawn(async move {
        let mut stopped = stopped;
        let shutdown = async move {
            // Without a sender there is no server any more either.
            let _ = stopped.wait_for(|stopping| *stopping).await;
        };
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(shutdown).await {
            tracing::error!(%error, "the interface has ended");
        }
    });
    Ok(Server { task, stopping, file })
}

impl Server {
    /// Takes no more requests, gives those under way a second to be answered, and removes the socket.
    pub async fn stop(self) {
        let Self { task, stopping, file } = self;
        drop(file);
        stopping.send_replace(true);
        if tokio::time::timeout(GRACE, task).await.is_err() {
            tracing::debug!("a client did not let go");
        }
    }
}

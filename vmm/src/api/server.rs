//! The socket: made for this user alone, taken over from a dead process, removed at the end; and who may connect to it.
//!
//! ```text
//!  accept ─► whose is it? ─► is there a place? ─► a task of its own (connection.rs) ─► the routes
//!             └ 403           └ 503                └ gives its place back when it has ended
//! ```
//!
//! The mode of the file keeps other users out. Their credentials are asked for all the same, because a mode can be
//! changed and a descriptor passed on. The number of connections is bounded, since each has buffers and a descriptor:
//! without a bound a client that forgets to close would some day keep the controller from starting a VM.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Uid;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::connection::{Service as Connection, converse, turn_away};
use crate::controller::Controller;
use crate::controller::error::{Code, Refusal};
use crate::controller::spawn::{SpawnError, check_socket_path};
use crate::controller::start::Service;

/// Connections at a time; one more is answered 503 and closed. Whoever follows the events has one.
pub const MAX_CONNECTIONS: usize = 256;

/// How long requests that are being answered may take when the server ends. Then they are answered 503.
pub(super) const GRACE: Duration = Duration::from_secs(1);

/// How long after that the answers may take to be read.
const LAST_READ: Duration = Duration::from_millis(500);

/// Pause after a connection could not be accepted, for want of descriptors or memory: trying at once would only spin.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

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

/// The file of a socket that this process has made; removed when it is dropped.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    /// Leaves the file where it is: the next one replaces it, and clients learn from it that there is to be a next one.
    pub fn leave(mut self) {
        self.identity = None;
    }
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

/// Whether somebody listens at `path`. Waits for nobody: one who takes no connections is there all the same.
///
/// # Errors
/// `ConnectionRefused` when the file was left by one who is gone; what the system says otherwise.
pub fn knock(path: &Path) -> io::Result<()> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        // As many wait there as may.
        Ok(()) | Err(Errno::AGAIN) => Ok(()),
        Err(error) => Err(error.into()),
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
        Ok(_) => match knock(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path).map_err(failed)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed(e)),
            Ok(()) => return Err(BindError::InUse(name())),
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
    file: Option<SocketFile>,
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
    let task = tokio::spawn(accept_all(listener, router, stopped));
    Ok(Server { task, stopping, file: Some(file) })
}

/// Takes connections until the server stops, then waits for those there are.
async fn accept_all(listener: tokio::net::UnixListener, router: axum::Router, stopped: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut stopping = stopped.clone();
    loop {
        let accepted = tokio::select! {
            biased;
            // Without a sender there is no server any more either.
            _ = stopping.wait_for(|stopping| *stopping) => break,
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::error!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_AGAIN).await;
                continue;
            }
        };
        if !stream.peer_cred().is_ok_and(|peer| may_connect(peer.uid())) {
            let message = "only the user who started this controller may use it, and root: ask as one of them";
            turn_away(&stream, Refusal::new(Code::Forbidden, message));
            continue;
        }
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            let message = format!("there are {MAX_CONNECTIONS} connections already: close some, then try again");
            turn_away(&stream, Refusal::new(Code::Busy, message));
            continue;
        };
        let service = Connection::new(router.clone(), place, stopped.clone());
        connections.spawn(converse(stream, service, stopped.clone()));
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Whether somebody of this user may connect: the user of this process, and root.
fn may_connect(uid: u32) -> bool {
    uid == rustix::process::geteuid().as_raw() || Uid::from_raw(uid).is_root()
}

impl Server {
    /// Takes no more connections, gives requests under way a second to be answered, and removes the socket.
    pub async fn stop(mut self) {
        self.file.take();
        self.close().await;
    }

    /// [`Self::stop`], but the file of the socket is there until what is given is dropped: nobody listens at it.
    pub async fn close(self) -> Option<SocketFile> {
        let Self { mut task, stopping, file } = self;
        stopping.send_replace(true);
        if tokio::time::timeout(GRACE + LAST_READ, &mut task).await.is_err() {
            tracing::debug!("a client did not let go");
            task.abort();
        }
        file
    }
}

//! The channel to one worker: a `SOCK_SEQPACKET` socket on one side, two bounded queues of messages on the other.
//!
//! The actor never waits for a worker. It puts messages into a bounded queue and a small task writes them; a
//! worker that does not read fills its socket, then the queue, and then only its own messages are dropped. That
//! loses nothing: totals are cumulative, and the actor notes that a grant has to be sent again.
//!
//! The worker is not trusted: whatever does not decode becomes [`FromLink::Garbage`], and the actor ends the VM. What
//! comes behind it is read and forgotten: a worker that spews takes nobody's place in the actor's inbox.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use crate::worker::protocol::{self, FromWorker, MAX_MESSAGE, ToWorker};

/// Messages that may wait for a worker that does not read.
pub const QUEUE: usize = 64;

/// What arrives from a worker's socket.
#[expect(clippy::large_enum_variant, reason = "nearly all are messages, and a box would be an allocation for each")]
#[derive(Clone, Debug, PartialEq)]
pub enum FromLink {
    /// A well-formed message; its contents are still an allegation.
    Message(FromWorker),
    /// A packet that is no message, with the reason.
    Garbage(String),
    /// The worker has closed its end.
    Closed,
}

/// A worker that answers at a socket.
#[derive(Debug)]
pub struct Peer {
    /// The connection.
    pub socket: OwnedFd,
    /// Process that listens.
    pub pid: i32,
    /// User of that process.
    pub uid: u32,
}

/// Why a worker could not be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket could not be connected.
    #[error("the worker's socket {path} cannot be connected")]
    Connect {
        /// Path of the socket.
        path: String,
        /// The system's reason.
        source: io::Error,
    },
    /// Somebody else answers at the worker's socket.
    #[error("the socket {path} belongs to process {found} of user {uid}, not to the worker {expected}")]
    Stranger {
        /// Path of the socket.
        path: String,
        /// Process that listens.
        found: i32,
        /// User of that process.
        uid: u32,
        /// The worker.
        expected: i32,
    },
}

/// Connects to whoever listens at `path`, a socket of this kind.
///
/// # Errors
/// When nobody does.
pub fn reach(kind: SocketType, path: &Path) -> Result<Peer, Errno> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    rustix::net::connect(&socket, &address)?;
    // The credentials are those of the process that called listen().
    let peer = rustix::net::sockopt::socket_peercred(&socket)?;
    Ok(Peer { socket, pid: peer.pid.as_raw_nonzero().get(), uid: peer.uid.as_raw() })
}

/// The process that listens at the other end of `socket`: a descriptor of it, which no later process of its number can be
/// mistaken for.
///
/// # Errors
/// When the process is gone.
pub fn process(socket: &OwnedFd) -> io::Result<OwnedFd> {
    /// From `asm-generic/socket.h`, since Linux 6.5.
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut pidfd: RawFd = -1;
    let mut length = size_of::<RawFd>() as libc::socklen_t;
    // SAFETY: the kernel writes one descriptor's number to `pidfd` and its size to `length`; both live until it returns.
    let done = unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, (&raw mut pidfd).cast(), &raw mut length)
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for this process; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

/// Connects to the worker `pid` at `path` and checks that it is this process of this user that listens there.
///
/// # Errors
/// When nobody listens or somebody else does.
pub fn connect(path: &Path, pid: i32) -> Result<OwnedFd, ConnectError> {
    connect_as(SocketType::SEQPACKET, path, pid)
}

/// Like [`connect`], to a socket of this kind.
///
/// # Errors
/// When nobody listens or somebody else does.
pub fn connect_as(kind: SocketType, path: &Path, pid: i32) -> Result<OwnedFd, ConnectError> {
    let name = || path.display().to_string();
    let peer = reach(kind, path).map_err(|e| ConnectError::Connect { path: name(), source: e.into() })?;
    if peer.pid != pid || peer.uid != rustix::process::geteuid().as_raw() {
        return Err(ConnectError::Stranger { path: name(), found: peer.pid, uid: peer.uid, expected: pid });
    }
    Ok(peer.socket)
}

/// Takes `socket` over: starts the task that writes it and returns its queue together with the future that reads.
/// What arrives goes to `inbox`, wrapped by `wrap`; the caller spawns the reader when the receiver knows the worker.
/// Dropping the queue's sender ends the writer; the reader ends with the socket or with `inbox`'s receiver.
///
/// # Errors
/// When the socket cannot be watched (out of memory or of watches).
///
/// # Panics
/// Outside a tokio runtime.
pub fn attach<I, W>(
    socket: OwnedFd,
    inbox: mpsc::Sender<I>,
    wrap: W,
) -> io::Result<(mpsc::Sender<ToWorker>, impl Future<Output = ()> + Send + 'static)>
where
    I: Send + 'static,
    W: Fn(FromLink) -> I + Send + 'static,
{
    // SAFETY: `socket` owns its descriptor and gives the same one as long as it lives.
    let socket = Arc::new(unsafe { AsyncFd::register(socket) }?);
    let (sender, mut queue) = mpsc::channel::<ToWorker>(QUEUE);
    let writing = Arc::clone(&socket);
    tokio::spawn(async move {
        while let Some(message) = queue.recv().await {
            // Whoever has asked for this is answered first: to wake the worker takes longer than the answer.
            tokio::task::yield_now().await;
            if let Err(error) = write(&writing, &message).await {
                // The reader sees the same end and reports it.
                tracing::debug!(%error, "the worker's socket is gone");
                break;
            }
        }
    });
    let reader = async move {
        let mut buffer = [0; MAX_MESSAGE + 1];
        let mut lost = false;
        loop {
            let item = match read(&socket, &mut buffer).await {
                Ok(0) | Err(_) => FromLink::Closed,
                Ok(length) => match protocol::decode(&buffer[..length]) {
                    Ok(message) => FromLink::Message(message),
                    Err(error) => FromLink::Garbage(error.to_string()),
                },
            };
            // After garbage the actor kills the worker; it still wants to know when the socket closes.
            let last = item == FromLink::Closed;
            if lost && !last {
                continue;
            }
            lost = matches!(item, FromLink::Garbage(_));
            if inbox.send(wrap(item)).await.is_err() || last {
                break;
            }
        }
    };
    Ok((sender, reader))
}

async fn write(socket: &AsyncFd<OwnedFd>, message: &ToWorker) -> io::Result<()> {
    let mut buffer = [0; MAX_MESSAGE];
    let packet = protocol::encode(message, &mut buffer);
    loop {
        let mut ready = socket.writable().await?;
        match rustix::net::send(socket.get_ref(), packet, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads one packet; a packet that is longer than the buffer is cut, which leaves it one byte too long to decode.
async fn read(socket: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    let mut reset = false;
    loop {
        let mut ready = socket.readable().await?;
        match rustix::net::recv(socket.get_ref(), &mut *buffer, RecvFlags::DONTWAIT) {
            Ok((length, _)) => return Ok(length),
            Err(Errno::AGAIN) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            // A worker that ends with messages of ours unread resets the connection. That is reported first and once;
            // its last words are still there behind it.
            Err(Errno::CONNRESET) if !reset => reset = true,
            Err(error) => return Err(error.into()),
        }
    }
}

//! The clients at a console's socket. Belongs to the device thread's event loop.
//!
//! ```text
//!  connect ──► same user or root, and room? ── no ──► a line that says why, and the end
//!                 │ yes
//!                 ▼
//!      the ring, then what comes  ◄──►  what is typed        until it hangs up, or all is over
//! ```
//!
//! Each client has its own place in the output, so one that does not read keeps nobody up. What is typed waits in the
//! clients' sockets while the port's FIFO is full; the port wakes the pump when the guest has emptied that.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with, sockopt};

use super::{Console, RING_BYTES};
use crate::devices::serial::SerialPort;

/// Most clients at one time.
pub const MAX_CLIENTS: usize = 4;

/// Bytes moved by one system call at most.
const CHUNK: usize = 4096;

/// Moves bytes between the console, the port and the clients.
#[derive(Debug)]
pub struct ConsolePump {
    console: Arc<Console>,
    port: Arc<Mutex<SerialPort>>,
    listener: OwnedFd,
    clients: Vec<Client>,
}

/// Somebody at the console.
#[derive(Debug)]
struct Client {
    stream: OwnedFd,
    /// Number of the next byte for it.
    at: u64,
    /// It takes output.
    reads: bool,
    /// It has not said yet that it will type no more.
    types: bool,
    /// It has gone, and is watched no more: what it had typed may still wait for the FIFO.
    gone: bool,
    /// What it is watched for.
    interest: EventSet,
}

/// Why the pump stops writing to a client.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Written {
    /// It has everything, or is gone.
    All,
    /// It takes no more now.
    Full,
    /// There is more, and others want to be served.
    More,
}

impl ConsolePump {
    /// A pump for the clients that connect to `listener`, a listening stream socket, which is made non-blocking.
    ///
    /// # Errors
    /// When `listener` cannot be made non-blocking.
    pub fn new(console: Arc<Console>, port: Arc<Mutex<SerialPort>>, listener: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&listener)?;
        rustix::fs::fcntl_setfl(&listener, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { console, port, listener, clients: Vec::new() })
    }

    /// Writes to every client what is left, for the end of a VM. Gives up after `patience`.
    pub fn finish(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        // Who came at the last moment has not been seen by the event loop.
        self.accept();
        loop {
            let left: Vec<_> =
                self.clients.iter_mut().map(|client| client.write(&self.console) != Written::All).collect();
            let waiting = self.clients.iter().zip(left).filter(|(_, left)| *left);
            let mut waiting: Vec<_> = waiting.map(|(client, _)| PollFd::new(&client.stream, PollFlags::OUT)).collect();
            let time = deadline.saturating_duration_since(Instant::now());
            if waiting.is_empty() || time.is_zero() {
                return;
            }
            let time = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) };
            match poll(&mut waiting, Some(&time)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Whether nobody is there.
    #[cfg(test)]
    pub fn is_alone(&self) -> bool {
        self.clients.is_empty()
    }

    /// Takes in who has connected. Returns how many are new; they are the last of the clients.
    fn accept(&mut self) -> usize {
        let before = self.clients.len();
        // Bounded, because those who are refused may come again at once.
        for _ in 0..2 * MAX_CLIENTS {
            let Ok(stream) = accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) else { break };
            let me = rustix::process::geteuid();
            let trusted = sockopt::socket_peercred(&stream).is_ok_and(|peer| peer.uid == me || peer.uid.is_root());
            let here = self.clients.iter().filter(|client| !client.gone).count();
            if trusted && here < MAX_CLIENTS {
                let at = self.console.state().ring.start();
                let interest = EventSet::empty();
                self.clients.push(Client { stream, at, reads: true, types: true, gone: false, interest });
            } else {
                let why = if trusted {
                    format!("{MAX_CLIENTS} are at this console already: try again when one has left it")
                } else {
                    "only the user who started the VM may use its console".to_owned()
                };
                // Who does not hear it hears the end.
                let _ = rustix::io::write(&stream, format!("\r\nballast: {why}\r\n").as_bytes());
            }
        }
        self.clients.len() - before
    }

    /// Passes on what the clients have typed, as long as the FIFO has room.
    fn type_to_guest(&mut self) {
        let mut chunk = [0; CHUNK];
        if !self.clients.is_empty() {
            // Nobody is served first every time.
            self.clients.rotate_left(1);
        }
        for client in &mut self.clients {
            while client.types {
                let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
                let room = port.room_or_wake_later().min(CHUNK);
                if room == 0 {
                    return;
                }
                // The stream is non-blocking, so the lock is not held for long; only this thread adds to the FIFO.
                match rustix::io::read(&client.stream, &mut chunk[..room]) {
                    Ok(0) => client.types = false,
                    Ok(length) => port.receive(&chunk[..length]),
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => break,
                    Err(_) => client.types = false,
                }
            }
        }
    }

    /// Forgets who has gone, and watches the others for what they can do now.
    fn watch(&mut self, full: &[bool], ops: &mut EventOps<'_>) {
        let room = self.port.lock().unwrap_or_else(PoisonError::into_inner).room_or_wake_later() > 0;
        for (client, full) in self.clients.iter_mut().zip(full) {
            let mut interest = EventSet::empty();
            interest.set(EventSet::OUT, *full);
            interest.set(EventSet::IN, client.types && room);
            if client.gone || client.interest == interest {
                continue;
            }
            client.interest = interest;
            report(ops.modify(Events::new(&client.stream, interest)));
        }
        self.clients.retain(|client| {
            let over = !client.reads && !client.types;
            if over && !client.gone {
                report(ops.remove(Events::empty(&client.stream)));
            }
            !over
        });
    }
}

impl Client {
    /// Writes output until there is none or the stream takes no more, or for one ring's worth.
    fn write(&mut self, console: &Console) -> Written {
        let mut chunk = [0; CHUNK];
        for _ in 0..RING_BYTES / CHUNK {
            // Copied out, so that the lock is not held in a system call: a vCPU may want to print.
            let length = {
                let mut state = console.state();
                self.at = self.at.max(state.ring.start());
                let length = state.ring.copy(self.at, &mut chunk);
                state.awaited |= length == 0 && self.reads;
                length
            };
            if length == 0 || !self.reads {
                return Written::All;
            }
            match rustix::io::write(&self.stream, &chunk[..length]) {
                Ok(written) => self.at += written as u64,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Written::Full,
                Err(_) => self.reads = false,
            }
        }
        Written::More
    }
}

fn report(result: Result<(), event_manager::Error>) {
    if let Err(error) = result {
        tracing::warn!("a client of the console cannot be watched: {error}");
    }
}

impl MutEventSubscriber for ConsolePump {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.console.wake.as_raw_fd() {
            let _ = self.console.wake.read();
        } else if events.fd() == self.listener.as_raw_fd() {
            let new = self.accept();
            for client in self.clients.iter().rev().take(new) {
                report(ops.add(Events::new(&client.stream, client.interest)));
            }
        } else if events.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR)
            && let Some(client) = self.clients.iter_mut().find(|client| client.stream.as_raw_fd() == events.fd())
        {
            // A hang-up cannot be masked and would be reported for ever.
            report(ops.remove(Events::empty(&client.stream)));
            (client.gone, client.reads) = (true, false);
        }
        self.type_to_guest();
        let written: Vec<_> = self.clients.iter_mut().map(|client| client.write(&self.console)).collect();
        if written.contains(&Written::More) {
            self.console.wake();
        }
        let full: Vec<_> = written.iter().map(|written| *written == Written::Full).collect();
        self.watch(&full, ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for events in [Events::new(&self.console.wake, EventSet::IN), Events::new(&self.listener, EventSet::IN)] {
            if let Err(error) = ops.add(events) {
                tracing::warn!("the console cannot be watched: {error}");
            }
        }
    }
}

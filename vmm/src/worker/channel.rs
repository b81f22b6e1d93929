//! The worker's end of the controller's socket.
//!
//! Never blocks: a message that the socket has no room for is remembered as owed, and because reports hold absolute
//! numbers, the newest one says all. Reads and writes use one buffer each; nothing is allocated.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{RecvFlags, SendFlags, SocketFlags, accept_with, recv, send, sockopt};

use super::protocol::{FromWorker, MAX_MESSAGE, ToWorker, decode, encode};

/// What reading gave.
#[derive(Debug)]
pub enum Received {
    /// One message.
    Message(ToWorker),
    /// Nothing now.
    Empty,
    /// The controller is gone, or spoke nonsense; another may connect.
    Closed,
}

/// Listens for a controller and talks to the one that is connected.
#[derive(Debug)]
pub struct Channel {
    listener: OwnedFd,
    peer: Option<OwnedFd>,
}

impl Channel {
    /// A channel over a listening, non-blocking `SOCK_SEQPACKET` socket.
    pub fn new(listener: OwnedFd) -> Self {
        Self { listener, peer: None }
    }

    /// Makes the listening socket non-blocking.
    ///
    /// # Errors
    /// When it is no descriptor.
    pub fn prepare(&self) -> io::Result<()> {
        let flags = rustix::fs::fcntl_getfl(&self.listener)?;
        Ok(rustix::fs::fcntl_setfl(&self.listener, flags | rustix::fs::OFlags::NONBLOCK)?)
    }

    /// The listening socket: readable when a controller connects.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The connection, if there is one.
    pub fn peer(&self) -> Option<BorrowedFd<'_>> {
        self.peer.as_ref().map(AsFd::as_fd)
    }

    /// Takes a connection when none is there and the peer runs as our own user (or root). True when connected anew.
    pub fn accept(&mut self) -> bool {
        let Ok(peer) = accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) else { return false };
        let me = rustix::process::geteuid();
        let trusted = sockopt::socket_peercred(&peer).is_ok_and(|cred| cred.uid == me || cred.uid.is_root());
        if self.peer.is_some() || !trusted {
            return false;
        }
        self.peer = Some(peer);
        true
    }

    /// Reads one message.
    pub fn receive(&mut self) -> Received {
        let Some(peer) = &self.peer else { return Received::Empty };
        let mut buffer = [0u8; MAX_MESSAGE];
        match recv(peer, &mut buffer, RecvFlags::DONTWAIT) {
            Ok((n, _)) if n > 0 => match decode(&buffer[..n]) {
                Ok(message) => Received::Message(message),
                Err(_) => self.close(),
            },
            Err(e) if e == rustix::io::Errno::AGAIN || e == rustix::io::Errno::INTR => Received::Empty,
            _ => self.close(),
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// `WouldBlock` when the socket is full, `NotConnected` without a controller.
    pub fn send(&mut self, message: &FromWorker) -> io::Result<()> {
        let Some(peer) = &self.peer else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut buffer = [0u8; MAX_MESSAGE];
        match send(peer, encode(message, &mut buffer), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn close(&mut self) -> Received {
        self.peer = None;
        Received::Closed
    }
}

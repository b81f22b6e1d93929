//! The worker's end of the controller's socket.
//!
//! Never blocks: a message that the socket has no room for is remembered as owed, and because reports hold absolute
//! numbers, the newest one says all. Reads and writes use one buffer each; nothing is allocated.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
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

    /// True when the controller has hung up. It may have left messages that were not read yet.
    pub fn hung_up(&self) -> bool {
        let Some(peer) = &self.peer else { return false };
        let mut fds = [PollFd::new(peer, PollFlags::empty())];
        poll(&mut fds, Some(&Timespec::default())) == Ok(1) && fds[0].revents().contains(PollFlags::HUP)
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

    /// Forgets the controller; another may connect.
    pub fn close(&mut self) -> Received {
        self.peer = None;
        Received::Closed
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, connect, listen, socket_with};

    use super::*;

    fn socket() -> OwnedFd {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a socket")
    }

    #[test]
    fn a_controller_that_is_gone_makes_room_for_the_next_and_one_that_lives_does_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let address = SocketAddrUnix::new(dir.path().join("worker")).expect("short");
        let listener = socket();
        bind(&listener, &address).expect("bound");
        listen(&listener, 4).expect("listens");
        let mut channel = Channel::new(listener);
        let meet = || {
            let near = socket();
            connect(&near, &address).expect("connected");
            near
        };
        assert!(!channel.hung_up() && !channel.accept(), "nobody is there");
        let first = meet();
        assert!(channel.accept() && !channel.hung_up());
        let second = meet();
        assert!(!channel.accept(), "the first lives");
        let mut buffer = [0; MAX_MESSAGE];
        assert_eq!(recv(&second, &mut buffer, RecvFlags::DONTWAIT).map(|(n, _)| n), Ok(0), "sent away");
        send(&first, encode(&ToWorker::Start, &mut buffer), SendFlags::empty()).expect("sent");
        drop(first);
        assert!(channel.hung_up(), "also with a message before the end");
        assert!(matches!(channel.receive(), Received::Message(ToWorker::Start)));
        assert!(matches!(channel.receive(), Received::Closed));
        let _third = meet();
        assert!(channel.accept() && !channel.hung_up());
    }
}

//! What the guest prints and what is typed to it: a ring that everybody reads from, and the clients at its socket.
//!
//! ```text
//!  vCPU ──OUT──► SerialPort ──► Console: ring of the last 64 KiB ──► ConsolePump ──► client 1..4, each where it has got
//!  vCPU ◄──IN─── SerialPort ◄── FIFO of 64 bytes ◄──────────────────── ConsolePump ◄── what any of them types
//!                                      │ memory shared with the controller
//!                                      └─────► GET /vms/NAME/console; the last words of a worker that is gone
//! ```
//!
//! A vCPU never waits for whoever reads: the newest byte takes the place of the oldest, and a client that is too slow
//! goes on with the oldest that is left. The ring is memory that the controller can read as well, without asking: so it
//! has the last words however the worker has ended, and no time is lost on a worker that does not answer. It takes host
//! memory as it fills, 17 pages at most.

mod pump;
mod ring;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use pump::{ConsolePump, MAX_CLIENTS};
pub use ring::{RING_BYTES, Ring, create, read};

/// What the guest has printed, for those who print and those who read.
#[derive(Debug)]
pub struct Console {
    state: Mutex<State>,
    /// Wakes the pump: there is output that a client waits for, or the FIFO has room again.
    wake: EventFd,
}

#[derive(Debug)]
struct State {
    ring: Ring,
    /// A client has read everything and wants to hear of more. Nobody is woken for nothing: each byte is an exit.
    awaited: bool,
}

impl Console {
    /// A console that prints to the memory of [`create`].
    ///
    /// # Errors
    /// When that cannot be mapped, or the host has no descriptor left.
    pub fn new(memory: &File) -> io::Result<Self> {
        let state = State { ring: Ring::map(memory)?, awaited: false };
        Ok(Self { state: Mutex::new(state), wake: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Appends output. Never waits.
    pub fn print(&self, bytes: &[u8]) {
        let mut state = self.state();
        state.ring.push(bytes);
        let awaited = !bytes.is_empty() && std::mem::take(&mut state.awaited);
        drop(state);
        if awaited {
            self.wake();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the pump.
    pub fn wake(&self) {
        // It fails only when the counter is full, and then the pump is awake anyway.
        let _ = self.wake.write(1);
    }
}

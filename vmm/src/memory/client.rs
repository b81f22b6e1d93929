//! How other threads of the worker ask the fault thread about pages.
//!
//! The fault thread owns frame table and stock; nobody else changes them. A thread that needs pages filled, or wants to
//! give pages away, sends one [`Request`] and waits for its [`Reply`]. Both channels hold one message and are allocated
//! once; the ranges travel in a vector that goes back to its owner, so the fault thread allocates nothing.
//!
//! The reclaim thread asks in another way: it says what became of its last [`Work`] and is told the next one. What is
//! claimed for it, and when, the fault thread decides alone.
//!
//! Giving pages away takes two requests, because the discard itself is a system call that the fault thread must not make:
//!
//! ```text
//!  device thread                      fault thread
//!    Claim(runs)  ─────────────────►  ABSENT → BALLOONED; ACTIVE → DISCARDING: a fault there is remembered as `wanted`
//!    ◄──────────────────────────────  the runs in DISCARDING
//!    process_madvise(DONTNEED)
//!    Discarded(runs)  ─────────────►  DISCARDING → BALLOONED, uncharge, serve what was wanted
//! ```
//! What is discarded because the guest has reported it as free ends in ABSENT instead of BALLOONED.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use memcg_core::frame::FrameState;
use memcg_core::units::PAGE_SIZE;
use vmm_sys_util::eventfd::EventFd;

use super::store::{Corrupt, Moved, Stored};
use crate::worker::protocol::ExitReason;

/// A run of pages by index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First page index.
    pub first: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
}

impl Run {
    /// Adds pages to the end of `runs`: to the last one, where they follow it.
    pub fn append(runs: &mut Vec<Run>, first: u64, pages: u64) {
        match runs.last_mut() {
            Some(last) if last.first + last.pages == first => last.pages += pages,
            _ => runs.push(Run { first, pages }),
        }
    }
}

/// How a guest gives pages away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenAway {
    /// To the balloon: they are BALLOONED until it takes them back.
    Balloon,
    /// It has reported them as free: they are ABSENT, and a touch of them is a first touch.
    Report,
}

impl GivenAway {
    /// What becomes of such a page.
    pub fn state(self) -> FrameState {
        match self {
            Self::Balloon => FrameState::Ballooned,
            Self::Report => FrameState::Absent,
        }
    }
}

/// What the reclaim thread is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing: until the bell rings, or for so long.
    Rest(Option<Duration>),
    /// Move the pages of RAM that are claimed as MOVING to the stage.
    Age,
    /// Put the contents of the pages that are claimed as EVICTING, and are in the stage, into the store, and discard them.
    Evict {
        /// Pages of memory that the store may have in all. When it has more, some of it goes to the file.
        store_max: u64,
    },
    /// Read what [`Load::fetched`] names from the store's file.
    Fetch,
    /// The same of pages that nobody waits for yet, wherever in the store they are.
    Refill,
}

/// What has become of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It has rested.
    Rested,
    /// [`Load::moved`] are in the stage now; what else was claimed is where it was.
    Aged,
    /// [`Load::stored`] are in the store and have no memory any more; what else was claimed is as it was.
    Evicted {
        /// Pages that do not shrink enough.
        incompressible: u64,
        /// Pages of memory that the store has now.
        store: u64,
        /// Writes to the store's file that failed since the thread has started.
        failed_writes: u64,
    },
    /// [`Load::fetched`] has the contents.
    Fetched,
    /// The same, of what nobody waits for.
    Refilled,
}

/// The pages of a job. It goes to and fro between the two threads, so that neither allocates once it has grown.
#[derive(Debug, Default)]
pub struct Load {
    /// What is claimed, in numbers of RAM.
    pub claimed: Vec<Run>,
    /// What was moved.
    pub moved: Vec<Run>,
    /// What was stored.
    pub stored: Vec<Stored>,
    /// What was copied within the store, or from there to its file.
    pub copied: Vec<Moved>,
    /// What is read from the store's file.
    pub fetched: Fetched,
}

/// Pages and what the store has of them. Goes to the reclaim thread with the pages, and comes back with the contents.
#[derive(Debug, Default)]
pub struct Fetched {
    /// The pages, and where they are.
    pub pages: Vec<Stored>,
    /// The content of each.
    pub contents: Vec<[u8; PAGE_SIZE as usize]>,
    /// Those that cannot be read, by page; their place in `pages` is nobody's.
    pub failed: Vec<(u32, Corrupt)>,
}

/// What a thread asks.
#[derive(Debug)]
pub enum Request {
    /// Charge and fill every absent page of the run.
    Fill {
        /// The pages.
        run: Run,
        /// Wait for room (the loader); otherwise answer [`Reply::WouldBlock`] at once (devices).
        wait: bool,
    },
    /// Claim pages for a discard; answered with those that are present and have to be discarded.
    Claim(Vec<Run>, GivenAway),
    /// The claimed pages have been discarded.
    Discarded(Vec<Run>, GivenAway),
    /// The guest takes pages back from the balloon; they become absent.
    Deflated(Vec<Run>),
    /// The reclaim thread has done its job and asks for the next one.
    Reclaim(Done, Box<Load>),
    /// The device thread touches no guest memory until it is answered: accounting can begin.
    Quiet,
    /// The guest kernel is loaded: this many pages were written.
    Loaded(u64),
    /// Starting failed: say this to the controller and end the process.
    Failed(String, Option<u64>),
    /// The guest has ended: say this to the controller and end the process.
    Ended(ExitReason),
}

/// What the fault thread answers.
#[derive(Debug)]
pub enum Reply {
    /// Done; a vector that came with the request goes back.
    Done(Vec<Run>),
    /// No page could be charged now, or one is claimed by somebody else. The thread's retry eventfd is written when it is
    /// worth trying again.
    WouldBlock,
    /// What the reclaim thread is to do.
    Job(Work, Box<Load>),
}

/// One thread's line to the fault thread.
#[derive(Debug)]
pub struct Client {
    requests: SyncSender<(usize, Request)>,
    bell: EventFd,
    replies: Receiver<Reply>,
    id: usize,
}

/// The fault thread's end of all lines.
#[derive(Debug)]
pub struct Desk {
    /// Requests with the number of the client.
    pub requests: Receiver<(usize, Request)>,
    /// Where each client's answers go, by number.
    pub replies: Vec<SyncSender<Reply>>,
    /// Readable when requests wait.
    pub bell: EventFd,
}

/// Makes `N` clients and the desk that serves them.
///
/// # Errors
/// When the host gives no eventfd.
pub fn clients<const N: usize>() -> std::io::Result<([Client; N], Desk)> {
    let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
    let (sender, requests) = sync_channel(N);
    let mut clients = Vec::with_capacity(N);
    let mut replies = Vec::with_capacity(N);
    for id in 0..N {
        let (reply, receiver) = sync_channel(1);
        replies.push(reply);
        clients.push(Client { requests: sender.clone(), bell: bell.try_clone()?, replies: receiver, id });
    }
    let clients = clients.try_into().expect("as many as were made");
    Ok((clients, Desk { requests, replies, bell }))
}

impl Client {
    /// Makes the fault thread look around, without a question.
    pub fn ring(&self) {
        // Fails only when the counter is full: it is awake already.
        let _ = self.bell.write(1);
    }

    /// Asks, and waits for the answer. The fault thread never waits for user space, so this is short; only a
    /// [`Request::Fill`] with `wait` takes as long as the controller needs.
    pub fn ask(&self, request: Request) -> Reply {
        // The fault thread lives as long as the process: if it is gone, so are we.
        if self.requests.send((self.id, request)).is_err() || self.bell.write(1).is_err() {
            std::process::abort();
        }
        self.replies.recv().unwrap_or_else(|_| std::process::abort())
    }
}

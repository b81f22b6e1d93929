//! One VM as the controller knows it.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use memcg_core::frame::Cost;
use memcg_core::hold::{self, Verdict};
use memcg_core::reclaim::STOCK_CAP;
use memcg_core::tree::NodeId;
use memcg_core::units::{Pages, exact};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::activation::Accounting;
use super::balloon::BalloonAsking;
use super::cold::{self, Leases, Tried};
use super::config::VmConfig;
use super::console::ConsoleLog;
use super::error::Refusal;
use super::host;
use super::overhead::{self, Part};
use super::residency::Residency;
use super::spawn::Death;
use super::stop::Stopping;
use super::view::{AreaView, OomAction, OomPreference, PausedBy, RamView, VmState, VmView};
use crate::worker::protocol::{ExitReason, GuestStats, Report, ToWorker};

/// Time between two lines in the log about one worker that does not read.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// Pages that a reserve has for each vCPU and for each VM.
const RESERVE: (u64, u64) = (65, 64);

/// Pages that the reserve of a VM with `cpus` vCPUs needs at most.
pub(super) fn reserve(cpus: u32) -> Pages {
    Pages(RESERVE.0 * u64::from(cpus) + RESERVE.1)
}

/// Number of a VM in this controller; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub u64);

/// The process of a worker, as far as the actor needs it.
pub trait WorkerProcess: Send {
    /// Process id.
    fn pid(&self) -> i32;
    /// When it was started.
    fn since(&self) -> Instant {
        Instant::now()
    }
    /// Ends it at once; harmless when it has ended.
    fn kill(&self);
    /// The socket at which its guest's console is.
    fn console(&self) -> Option<PathBuf> {
        None
    }
    /// Removes what it had on disk; it has ended.
    fn tidy(&self) {}
    /// Tells the kernel when to take it, if it must take somebody.
    ///
    /// # Errors
    /// When the kernel does not let it.
    fn set_oom_score(&self, _score: i16) -> io::Result<()> {
        Ok(())
    }
    /// How long its guest has run in all, where the host says so.
    fn guest_ran(&self) -> Option<Duration> {
        None
    }
    /// What the host says of its memory, when it may be looked into.
    fn residency(&self) -> Option<&Residency> {
        None
    }
}

/// What is done with a VM that stays held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OomPolicy {
    /// The action.
    pub action: OomAction,
    /// How long the VM may be held before.
    pub deadline: Duration,
    /// Among several candidates, lower goes first.
    pub priority: i32,
    /// Whether it is a candidate when others must choose.
    pub preference: OomPreference,
}

impl Default for OomPolicy {
    fn default() -> Self {
        Self {
            action: OomAction::Pause,
            deadline: super::host::scaled(Duration::from_secs(5)),
            priority: 0,
            preference: OomPreference::None,
        }
    }
}

/// Who ended a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KilledBy {
    /// The OOM policy.
    Policy,
    /// The same, because the host ran short of memory.
    Host,
    /// The same, because its group did.
    Group,
    /// Somebody at the interface.
    Request,
    /// Somebody at the interface who had asked the guest to end, and it did not in time.
    Stop,
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmEnd {
    /// By itself.
    Guest(ExitReason),
    /// It was killed.
    Killed(KilledBy),
    /// It could not start or broke; the message is a sentence for the user.
    Failed {
        /// What happened.
        message: String,
        /// When `max` is too small to load the guest: the smallest that would do.
        smallest_max: Option<Pages>,
    },
    /// The worker ended without a word, or lied and was ended.
    Died {
        /// How, as the end of a sentence that begins with "the worker".
        message: String,
    },
}

impl fmt::Display for VmEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(ExitReason::PowerOff) => write!(f, "the guest powered itself off"),
            Self::Guest(ExitReason::Reset) => write!(f, "the guest asked for a reset"),
            Self::Guest(ExitReason::Status(status)) => write!(f, "the guest ended with status {status}"),
            Self::Guest(ExitReason::TripleFault) => write!(f, "the guest stopped with a triple fault"),
            Self::Guest(ExitReason::Error) => write!(f, "the VM failed"),
            Self::Killed(KilledBy::Request) => write!(f, "it was killed on request"),
            Self::Killed(KilledBy::Stop) => write!(f, "it was killed: it did not power itself off in time"),
            Self::Killed(KilledBy::Host) => write!(f, "it was killed: the host ran short of memory"),
            Self::Killed(KilledBy::Group) => write!(f, "it was killed: its group ran short of memory"),
            Self::Killed(KilledBy::Policy) => write!(f, "it was killed: it was held at its limit for too long"),
            Self::Failed { message, smallest_max: None } => write!(f, "{message}"),
            Self::Failed { message, smallest_max: Some(smallest) } => {
                write!(f, "{message}: a memory.max of {} or more is needed", exact(smallest.bytes()))
            }
            Self::Died { message } => write!(f, "the worker {message}"),
        }
    }
}

/// Answers a request.
pub(super) type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// Something that waits for a worker's report with a certain `seq`.
pub(super) struct Waiting {
    pub seq: u32,
    pub until: Instant,
    pub what: Awaited,
}

/// What happens when the report comes, or does not.
pub(super) enum Awaited {
    /// Show the VM; without an answer, its last known numbers.
    View(Reply<VmView>),
    /// The vCPUs are out; without an answer the request fails.
    Paused(Reply<VmView>),
    /// The vCPUs are let go on; without an answer the request fails.
    Resumed(Reply<VmView>),
}

/// A time during which the VM is held for want of memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hold {
    /// When the worker first said so.
    pub since: Instant,
    /// When the policy acts, or is looked at again.
    pub deadline: Instant,
    /// The stocks of those who share the limit were recalled for it.
    pub recalled: bool,
    /// It has acted.
    pub acted: bool,
}

/// One VM.
pub(super) struct Vm {
    pub name: String,
    pub node: NodeId,
    pub size: Pages,
    pub cpus: u32,
    pub accounting: Accounting,
    /// Who has twice as many gives half as much, when several have to give.
    pub shares: u32,
    /// What it costs beside its pages from the start, charged as long as it is accounted.
    pub overhead: Vec<Part>,
    pub oom: OomPolicy,
    pub process: Box<dyn WorkerProcess>,
    pub to_worker: mpsc::Sender<ToWorker>,
    /// The OOM score that its worker was given.
    pub oom_score: Option<i16>,
    /// When its worker was started.
    pub since: Instant,
    pub state: VmState,
    pub paused_by: Option<PausedBy>,
    /// Somebody at the interface wants it paused as well: it does not go on by itself.
    pub kept_paused: bool,
    /// When it was paused last; not known of one that was taken over paused.
    pub paused_at: Option<Instant>,
    pub ram: Vec<RamView>,
    pub store: AreaView,
    pub pool: AreaView,
    /// What its worker calls itself.
    pub instance: u64,
    /// Its worker was started by an earlier controller.
    pub adopted: bool,
    /// The worker has said hello.
    pub greeted: bool,
    /// Pages that the reserve needs, as the worker said.
    pub reserve_target: Pages,
    /// Pages charged for this VM since its start.
    pub granted_total: u64,
    /// Of these, pages the worker has given back.
    pub returned_total: u64,
    pub report: Report,
    pub reported: bool,
    pub guest_stats: Option<(GuestStats, Instant)>,
    /// Pages of the last want that could not be served: their refusal has been counted.
    pub missing: u64,
    /// Since when that is so.
    pub refused_since: Option<Instant>,
    /// The node whose limit was in its way.
    pub refused_at: Option<NodeId>,
    /// Where and when the events have told of that last.
    pub refused_told: Option<(Option<NodeId>, Instant)>,
    /// A grant was dropped because the worker did not read, or its room has changed: send one.
    pub grant_due: bool,
    /// What its balloon is asked for.
    pub balloon: BalloonAsking,
    /// What its worker may evict, as it was told last.
    pub leases: Leases,
    /// Size of the file that pages may go to, zero without one.
    pub swap_file: Pages,
    /// What its pages have shown when they were to be evicted.
    pub tried: Tried,
    /// What its worker is to come down to by eviction, `u64::MAX` when nothing is asked of it.
    pub reclaim_aim: u64,
    /// That was dropped because the worker did not read.
    pub reclaim_due: bool,
    /// When a report was last heard, and when one said that free pages had come back.
    pub heard_at: Option<Instant>,
    pub reported_at: Option<Instant>,
    /// When it was asked for one because it was silent.
    pub asked_at: Option<Instant>,
    /// How many evicted pages the events have told of, and when.
    pub evicted_told: (u64, Option<Instant>),
    /// Number of the message by which it may go on, until its worker has answered that.
    pub resume_seq: Option<u32>,
    /// Writes to its swap file that had failed when that was told last.
    pub failed_told: u64,
    /// The balloon target last sent.
    pub balloon_sent: Option<u32>,
    /// A target was dropped because the worker did not read.
    pub balloon_due: bool,
    /// The word to start was dropped because the worker did not read.
    pub start_due: bool,
    /// Somebody waits for room in the full queue, to send what is due.
    pub awaits_room: bool,
    pub hold: Option<Hold>,
    /// How long it was held of late, in one hold or in many.
    pub holds: hold::Account,
    pub seq: u32,
    pub waiting: Vec<Waiting>,
    /// Its guest was asked to power itself off.
    pub stopping: Option<Stopping>,
    /// Answers to `kill`, given when the process is gone.
    pub killers: Vec<Reply<VmView>>,
    /// Answers to `remove`, given when the process is gone.
    pub removers: Vec<Reply<()>>,
    /// Answers to those who wait for the guest to run.
    pub starters: Vec<Reply<VmView>>,
    /// As it was asked for.
    pub config: Option<Arc<VmConfig>>,
    /// What it prints, where that is kept.
    pub console: Option<ConsoleLog>,
    /// How it ended, for people.
    pub epitaph: Option<String>,
    /// It has ended and is shown no more; only its charges are still there.
    pub forgotten: bool,
    /// Why it is ending, once that is known.
    pub cause: Option<VmEnd>,
    /// How the process ended, while its last words may still be on the way.
    pub death: Option<Death>,
    pub link_closed: bool,
    /// The last audit has found more than was charged.
    pub suspected: bool,
    /// When to stop waiting: for hello, for the end after the last words, or for the last words after the end.
    pub patience: Option<Instant>,
    pub ended: Option<oneshot::Sender<VmEnd>>,
    /// When it was last said in the log that the worker does not read.
    pub warned: Option<Instant>,
}

impl Vm {
    /// Where the worker's address space has memory of the VM: RAM, its stage, its store and its pool.
    pub fn areas(&self) -> Vec<Range<u64>> {
        self.ram.iter().flat_map(RamView::areas).chain([self.store.area(), self.pool.area()]).collect()
    }

    /// Pages charged for this VM: resident, in stock, in reserve, on their way to the worker, or paid for what the
    /// resident ones cost.
    pub fn outstanding(&self) -> Pages {
        Pages(self.granted_total - self.returned_total)
    }

    /// Of these, pages that are overhead by now.
    pub fn grown(&self) -> Pages {
        overhead::grown(&self.report).total()
    }

    /// What it costs beside its pages from the start.
    pub fn fixed_overhead(&self) -> Pages {
        self.overhead.iter().map(Part::pages).sum()
    }

    /// The last want could not be served in full.
    pub fn refused(&self) -> bool {
        self.refused_since.is_some()
    }

    /// So many pages of the last want could not be served.
    pub fn set_missing(&mut self, pages: u64) {
        self.missing = pages;
        self.refused_since = (pages > 0).then(|| self.refused_since.unwrap_or_else(Instant::now));
    }

    /// Pages granted that the worker had not seen when it last reported.
    pub fn in_flight(&self) -> u64 {
        self.granted_total.saturating_sub(self.report.granted_total)
    }

    /// Pages that faults wait for, or that the reserve is short of; no more than it can use.
    pub fn need(&self) -> u64 {
        self.report.want_now.max(self.report.debt).saturating_sub(self.in_flight()).min(self.useful())
    }

    /// Pages that it can use beside those that it has, whatever it says.
    pub fn useful(&self) -> u64 {
        self.most().saturating_sub(self.outstanding()).0
    }

    /// Whether it is time for its policy. `now` is time since any fixed start, and `evicts`: pages are being evicted at the
    /// limit that is in its way.
    pub fn patience(&mut self, now: Duration, evicts: bool) -> Verdict {
        self.count_hold(now);
        match self.holds.verdict(Pages(self.missing), self.oom.deadline / host::slowness(), evicts) {
            Verdict::Wait(time) => Verdict::Wait(host::scaled(time)),
            Verdict::Act => Verdict::Act,
        }
    }

    /// Notes whether it is held. On a slow host all takes longer.
    pub fn count_hold(&mut self, now: Duration) {
        let is_held = self.report.held && self.state == VmState::Running;
        self.holds.look(now / host::slowness(), is_held, Pages(self.granted_total));
    }

    /// How long it was held of late.
    pub fn held_for(&self, now: Duration) -> Duration {
        host::scaled(self.holds.held(now / host::slowness()))
    }

    /// Pages charged ahead of need: those that nobody waits for.
    pub fn spare(&self) -> u64 {
        (self.report.stock + self.in_flight()).saturating_sub(self.report.want_now.max(self.report.debt))
    }

    /// The policy has stopped it, nobody else.
    pub fn stopped_by_policy(&self) -> bool {
        self.state == VmState::Paused && self.paused_by == Some(PausedBy::Policy)
    }

    /// It stands still for others, and gives all that it has.
    pub fn is_emptied(&self) -> bool {
        self.state == VmState::Paused && self.paused_by.is_some_and(PausedBy::is_for_others)
    }

    /// Sends a message, unless the worker has not read its last ones. Never waits.
    pub fn send(&mut self, message: ToWorker) -> bool {
        let sent = self.to_worker.try_send(message);
        // Every request may end here: a line for each would fill the log, and then the controller waits for its reader. One
        // that has gone is no news.
        let full = matches!(sent, Err(TrySendError::Full(_)));
        if full && self.warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            self.warned = Some(Instant::now());
            tracing::warn!(vm = self.name, "the worker does not read its messages");
        }
        sent.is_ok()
    }

    /// A new sequence number for a message that is answered.
    pub fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1);
        self.seq
    }

    /// Pages that it can use at most, whatever it says: its RAM, what that costs, its reserve, a full stock, and what is not
    /// cleaned away of its store.
    pub fn most(&self) -> Pages {
        self.size + self.most_grown() + self.reserve_target + STOCK_CAP + cold::most_dead(self.size)
    }

    /// Overhead that comes with the use of all its RAM.
    pub fn most_grown(&self) -> Pages {
        Cost::most(self.size).total()
    }

    /// Pages that a reserve needs at most.
    pub fn largest_reserve(&self) -> Pages {
        reserve(self.cpus)
    }

    /// True while the worker can be talked to.
    pub fn alive(&self) -> bool {
        self.state != VmState::Ended && self.death.is_none() && !self.link_closed
    }
}

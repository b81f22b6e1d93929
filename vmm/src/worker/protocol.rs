//! The messages between the controller and one worker.
//!
//! The socket is `SOCK_SEQPACKET`: one message a packet, at most [`MAX_MESSAGE`] bytes, encoded with postcard and
//! led by [`VERSION`]. The worker listens on its own socket and the controller connects, so that a later controller
//! can take a running worker over: it charges what [`Hello`] says, and its first grant begins a new epoch.
//!
//! Amounts are **cumulative totals**, never deltas: a message that is lost or repeated cannot count a page twice.
//! The worker is not trusted: the controller bounds every field against what it has itself granted.
//!
//! ```text
//!  controller                               worker
//!      | <------------- Hello ---------------- |   after connect: who it is, what it holds
//!      | ------------- Grant ----------------> |   reserve and first stock
//!      | <------------- Report --------------- |   loaded, vCPUs not yet running
//!      | ------------- Start ----------------> |
//!      | <--------- Report (want) ------------ |   ahead of need, or with a fault waiting
//!      | ------------- Grant ----------------> |
//!      | ------- Recall / Pause / ... -------> |   each with a `seq`
//!      | <------- Report (answers seq) ------- |
//!      | ------------ Activate --------------> |   the first limit of a VM that was started without one
//!      | <----------- Activated -------------- |   RAM is registered, this much is in it
//!      | ------------- Grant ----------------> |   what is in it, reserve and first stock
//!      | <------------- Exited --------------- |   last words, then the process ends
//! ```

use serde::{Deserialize, Serialize};

/// Version of this protocol. A worker may be of an earlier build than the controller that takes it over, so whoever changes
/// a message changes this number: another version is refused, and its VM goes on unattended.
pub const VERSION: u8 = 11;

/// Largest encoded message in bytes, the version byte included.
pub const MAX_MESSAGE: usize = 1024;

/// Largest number of RAM slots a worker has (below and above the 32-bit hole).
pub const MAX_SLOTS: usize = 2;

/// One slot of guest RAM as mapped in the worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamSlot {
    /// First guest-physical address in bytes.
    pub gpa: u64,
    /// First address in the worker's address space in bytes.
    pub hva: u64,
    /// Length in bytes, a multiple of the page size; 0 for an unused entry.
    pub bytes: u64,
    /// First address in the worker's address space of the slot's stage, as long as the slot: where its idle pages are.
    pub stage: u64,
}

/// A mapping of the worker's that is part of a VM's memory and not RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// First address in the worker's address space in bytes.
    pub hva: u64,
    /// Length in bytes, a multiple of the page size; 0 when there is none.
    pub bytes: u64,
}

/// What the controller says to a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToWorker {
    /// Pages charged to this VM so far. Sent in answer to a want, and unasked when room appears or limits change.
    Grant {
        /// Number of this controller's life; totals restart only with a recount (see [`FromWorker::Hello`]).
        epoch: u32,
        /// Pages granted since the VM was created, the reserve included.
        granted_total: u64,
        /// Pages that the worker may keep as stock from now on; what it has above this it gives back.
        stock_max: u64,
        /// Pages that could still be charged before some limit is met; `u64::MAX` without a limit.
        /// Fault-around is switched off when it is small.
        room: u64,
        /// Pages that the VM may have in swap, those that are there included; `u64::MAX` without a limit. When more are
        /// there already, they may only become fewer.
        swap_max: u64,
        /// Pages of memory that their compressed contents may take, likewise.
        store_max: u64,
        /// True when a waiting fault could not be charged: the worker holds its vCPUs until a grant covers its debt.
        refused: bool,
    },
    /// Give back all stock at once (the reserve stays) and answer.
    Recall {
        /// Echoed in [`Report::answers`].
        seq: u32,
    },
    /// Answer with a [`Report`].
    Query {
        /// Echoed in [`Report::answers`].
        seq: u32,
    },
    /// Let the vCPUs run for the first time.
    Start,
    /// Stop every vCPU in user space; answered when the last one is out of `KVM_RUN`.
    Pause {
        /// Echoed in [`Report::answers`].
        seq: u32,
    },
    /// Undo `Pause`. A hold for lack of memory stays.
    Resume {
        /// Echoed in [`Report::answers`].
        seq: u32,
    },
    /// Begin to charge: register RAM and count what is in it. Answered by [`FromWorker::Activated`] or
    /// [`FromWorker::NotActivated`].
    Activate {
        /// Echoed in the answer.
        seq: u32,
        /// Number of this controller's life, as in [`ToWorker::Grant`].
        epoch: u32,
    },
    /// The balloon size that the guest is asked for, in pages.
    BalloonTarget {
        /// Pages of 4 KiB.
        pages: u32,
    },
    /// Press the power button: the guest is to end by itself.
    PowerButton,
    /// Bring what the VM holds ([`Report::held`]) down to `aim` by moving cold pages aside and evicting them, whether the
    /// guest helps or not. Reports say how far it has got ([`Cold::aim`], [`Cold::stuck`]). Near `max`, and while vCPUs
    /// are held, a worker does so unasked.
    Reclaim {
        /// Pages; `u64::MAX` when nothing is asked any more.
        aim: u64,
    },
}

/// Why a worker's VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// A freestanding payload wrote its status to the exit port.
    Status(u8),
    /// The guest stopped with a triple fault.
    TripleFault,
    /// KVM or the VMM failed; the message is in [`FromWorker::Failed`].
    Error,
}

/// The memory of a VM as its worker sees it, one consistent snapshot. All amounts in pages unless named otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The `seq` that this answers, if any.
    pub answers: Option<u32>,
    /// The epoch of the last grant seen.
    pub epoch: u32,
    /// The `granted_total` of the last grant seen.
    pub granted_total: u64,
    /// Pages given back since the VM was created.
    pub returned_total: u64,
    /// Records in ACTIVE or IDLE: resident guest pages.
    pub guest: u64,
    /// Charged pages held ahead of need.
    pub stock: u64,
    /// Pages left in the reserve.
    pub reserve: u64,
    /// Pages that the kernel's page tables for this guest were paid with. Only grows.
    pub tables: u64,
    /// Pages that the frame records written so far were paid with. Only grows.
    pub records: u64,
    /// Pages missing from the reserve (taken by faults that could not be charged), or owed for tables and records.
    pub debt: u64,
    /// Records in state BALLOONED.
    pub ballooned: u64,
    /// Pages of memory in which the contents of evicted pages are kept; charged, and not counted in `guest`.
    pub store: u64,
    /// Records in state SWAPPED: pages that are in the store instead of memory.
    pub swapped: u64,
    /// Records in state IDLE, which `guest` counts too.
    pub idle: u64,
    /// Pages the worker would like to have granted now.
    pub want: u64,
    /// How many of `want` are for faults that happened already: refusing those counts as a failure.
    pub want_now: u64,
    /// The balloon size that the guest reports, in pages; never set by the VMM.
    pub balloon_actual: u32,
    /// Pages that the guest says it has taken back below its target because it was out of memory, since the start.
    pub oom_deflated: u64,
    /// True when the guest's balloon driver has said DRIVER_OK.
    pub balloon_ready: bool,
    /// True while every vCPU is out of the guest for want of memory.
    pub held: bool,
    /// True when all vCPUs are out because of `Pause`.
    pub paused: bool,
    /// Time that vCPUs have been held for lack of memory since the start, in microseconds.
    pub held_us: u64,
    /// Time that at least one vCPU has waited for an evicted page to come back since the start, in microseconds.
    pub refault_us: u64,
    /// Counters of the fault path since the start.
    pub faults: FaultCounts,
    /// What is known of its cold pages.
    pub cold: Cold,
}

impl Report {
    /// Everything that the controller has charged for this worker beside what the VM costs from the start: guest pages,
    /// stock, reserve, store, and what the guest's pages cost. `None` when that is no number.
    pub fn held(&self) -> Option<u64> {
        let Report { guest, stock, reserve, store, tables, records, .. } = *self;
        [guest, stock, reserve, store, tables, records].into_iter().try_fold(0, u64::checked_add)
    }
}

/// What a worker knows of pages that are not in use, and what reclaim has done with them. In pages, totals since the start
/// of the VM, unless named otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cold {
    /// The [`ToWorker::Reclaim`] that it works on, `u64::MAX` for none.
    pub aim: u64,
    /// It holds more than `aim` and finds nothing that it could evict: all is in use, does not shrink, or swap is full.
    pub stuck: bool,
    /// Pages moved aside.
    pub aged: u64,
    /// Pages that were touched while they were aside.
    pub returned: u64,
    /// Pages evicted.
    pub evicted: u64,
    /// Evicted pages that were touched again.
    pub refaulted: u64,
    /// Evicted pages that came back around a touched one.
    pub read_around: u64,
    /// Evicted pages that came back before they were touched, after a pause.
    pub read_ahead: u64,
    /// Pages that were to be evicted and stayed because they do not shrink enough; one that is tried again counts again.
    pub incompressible: u64,
    /// Idle pages that stayed when eviction was last tried, and that nobody has touched since, as far as is known.
    pub hard: u64,
    /// Evicted pages whose contents are in the file now.
    pub file: u64,
    /// Pages that were read from the file.
    pub fetched: u64,
    /// Writes to the file that failed; what was to be written stayed in memory.
    pub failed_writes: u64,
    /// Length of a generation, the unit of `ages` and `refaults`, in milliseconds; 0 while nothing is aged.
    pub generation_ms: u32,
    /// Pages in use in the last two generations, estimated from samples; with `error` it is between `working_set - error`
    /// and `working_set + error` in 95 of 100 cases. Absent before two generations are over.
    pub working_set: Option<u64>,
    /// See `working_set`.
    pub error: u64,
    /// Resident pages by age: buckets of [`memcg_core::frame::Histogram`].
    pub ages: [u64; 8],
    /// Pages that were moved aside or evicted and touched again, by the age that they had.
    pub refaults: [u64; 8],
}

/// Quantiles of a time that the worker measures, since the start of the VM, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Quantiles {
    /// Number of times measured.
    pub count: u64,
    /// Half of them were at most this (rounded up by at most a quarter).
    pub p50_us: u64,
    /// 99 of 100 were at most this (rounded up by at most a quarter).
    pub p99_us: u64,
    /// The longest, exact.
    pub max_us: u64,
}

/// Counters of the fault path. All since the start of the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultCounts {
    /// Fault events read from userfaultfd.
    pub events: u64,
    /// Events for a page that was there already.
    pub stale: u64,
    /// Pages filled because they were touched.
    pub touched: u64,
    /// Pages filled around a touched page.
    pub around: u64,
    /// Pages granted from the reserve.
    pub from_reserve: u64,
    /// Times that the host had no memory for a page that is charged.
    pub unfilled: u64,
    /// Faults in ballooned pages: the guest took a page back without saying so.
    pub implicit_deflates: u64,
    /// Faults of the VMM's own threads.
    pub vmm: u64,
    /// Pages discarded for the balloon.
    pub discarded: u64,
    /// Pages discarded because the guest has reported them as free.
    pub reported: u64,
    /// Pages filled again within seconds after they were discarded so.
    pub reported_back: u64,
    /// Pages reported as free and left alone: too many had come back, or the guest wants to find its poison in them.
    pub reported_left: u64,
    /// Things a guest claimed that were refused (bad page numbers, bad descriptors).
    pub guest_errors: u64,
    /// Time from the fault thread's waking up to its answer, for each fault.
    pub answer: Quantiles,
    /// Time from closing the gate for want of memory to the last vCPU out of `KVM_RUN`, for each hold.
    pub hold: Quantiles,
}

/// What a worker says first on a connection: who it is, how far it has got, and what it holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`WorkerConfig::instance`](super::config::WorkerConfig::instance).
    pub instance: u64,
    /// Where guest RAM is mapped.
    pub ram: [RamSlot; MAX_SLOTS],
    /// Where the contents of evicted pages are kept.
    pub store: Area,
    /// Where huge pages are zeroed ahead of need; they are charged as stock.
    pub pool: Area,
    /// Pages that the reserve needs: 65 a vCPU + 64. 0 when nothing is charged.
    pub reserve_target: u64,
    /// Whether memory is charged.
    pub accounting: bool,
    /// Distinct pages that the loader has written, once it is done.
    pub loaded: Option<u64>,
    /// [`ToWorker::Start`] has come.
    pub started: bool,
    /// [`ToWorker::Pause`] has come last; vCPUs may still be on their way out.
    pub paused: bool,
    /// What it holds. Its totals are those of the last controller's life.
    pub report: Report,
}

/// What a worker says to the controller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromWorker {
    /// First message on a connection; the controller recounts from it.
    Hello(Hello),
    /// The state of its memory.
    Report(Report),
    /// RAM is registered and charged from now on. The `resident` pages count as granted; totals go on from there. The
    /// vCPUs wait for the next grant, which brings the reserve.
    Activated {
        /// Of the [`ToWorker::Activate`] that is answered.
        seq: u32,
        /// Pages of guest RAM that are present, or in the host's swap.
        resident: u64,
        /// As in [`FromWorker::Hello`].
        reserve_target: u64,
    },
    /// Accounting cannot begin. The VM goes on as before.
    NotActivated {
        /// Of the [`ToWorker::Activate`] that is answered.
        seq: u32,
        /// One sentence for the user, at most 512 bytes.
        message: String,
    },
    /// The kernel is loaded; the vCPUs wait for `Start`. `plan` is the number of pages that loading filled.
    Loaded {
        /// Distinct pages written by the loader.
        plan: u64,
    },
    /// Guest statistics from the balloon's statistics queue.
    GuestStats(GuestStats),
    /// Starting failed or the VM broke; the process ends after this.
    Failed {
        /// One sentence for the user, at most 512 bytes.
        message: String,
        /// When the reason is that the limit is too small to load the guest: the smallest `max` that would do, in pages.
        smallest_max: Option<u64>,
    },
    /// The guest has ended; the process ends after this.
    Exited(ExitReason),
}

/// Guest statistics, in bytes or counts as the virtio specification has them (5.5.6.4); absent when not sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStats {
    /// Value of each known tag, by tag number (0 `swap_in` .. 15 `direct_reclaim`).
    pub values: [Option<u64>; 16],
    /// Milliseconds since the guest sent them.
    pub age_ms: u64,
}

/// A message that could not be decoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The packet was empty or longer than [`MAX_MESSAGE`].
    #[error("message of {0} bytes: must be 1 to {MAX_MESSAGE}")]
    Length(usize),
    /// The other side speaks another version.
    #[error("protocol version {0}, this side speaks {VERSION}")]
    Version(u8),
    /// The bytes are no message.
    #[error("malformed message")]
    Malformed,
}

/// Encodes `message` into `buf` and returns the bytes to send. Does not allocate.
///
/// # Panics
/// Never for the types of this module as long as free text is at most 512 bytes.
pub fn encode<'b, M: Serialize>(message: &M, buf: &'b mut [u8; MAX_MESSAGE]) -> &'b [u8] {
    buf[0] = VERSION;
    let used = postcard::to_slice(message, &mut buf[1..]).expect("messages are bounded").len();
    &buf[..used + 1]
}

/// Decodes one packet.
///
/// # Errors
/// When the packet is not exactly one message of this version.
pub fn decode<'b, M: Deserialize<'b>>(packet: &'b [u8]) -> Result<M, DecodeError> {
    match packet {
        [] => Err(DecodeError::Length(0)),
        p if p.len() > MAX_MESSAGE => Err(DecodeError::Length(p.len())),
        [VERSION, rest @ ..] => match postcard::take_from_bytes(rest) {
            Ok((message, [])) => Ok(message),
            _ => Err(DecodeError::Malformed),
        },
        [version, ..] => Err(DecodeError::Version(*version)),
    }
}

#[cfg(test)]
mod tests;

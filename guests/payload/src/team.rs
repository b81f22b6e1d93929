//! All vCPUs at work: vCPU 0 obeys commands, and gives each of the others a share when a command says so.

use core::hint::spin_loop;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering::SeqCst};

use crate::io;

/// What each vCPU is called with: its own number, and how many take part.
pub type Job<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Milliseconds between two looks for work, and for its end.
const POLL_MS: u32 = 2;

/// What vCPU 0 hands to the others. They look at `round`; when it changes, the rest is complete.
struct Shared {
    round: AtomicU64,
    done: AtomicU64,
    cpus: AtomicU64,
    /// They do something that vCPU 0 does not wait for.
    busy: AtomicBool,
    /// Points to a [`Job`] that stays until all are done.
    job: AtomicPtr<()>,
}

static SHARED: Shared = Shared {
    round: AtomicU64::new(0),
    done: AtomicU64::new(0),
    cpus: AtomicU64::new(1),
    busy: AtomicBool::new(false),
    job: AtomicPtr::new(null_mut()),
};

/// Runs `job` on vCPUs 0 to `cpus`, and returns when all of them are done: how many took part. Those that are busy do not,
/// so vCPU 0 does all of it. Only vCPU 0 calls this.
pub fn together(cpus: u64, job: Job<'_>) -> u64 {
    let cpus = if is_busy() { 1 } else { cpus };
    if cpus > 1 {
        start(cpus, (&raw const job).cast_mut().cast());
    }
    job(0, cpus);
    if cpus > 1 {
        wait();
    }
    cpus
}

/// Whether the other vCPUs do something that vCPU 0 does not wait for.
pub fn is_busy() -> bool {
    SHARED.busy.load(SeqCst)
}

/// Starts `job` on vCPUs 1 to `cpus`, which are busy until [`finish`]. False when they are so already, or when there is none.
/// Only vCPU 0 calls this.
pub fn begin(cpus: u64, job: &'static Job<'static>) -> bool {
    let free = cpus > 1 && !SHARED.busy.swap(true, SeqCst);
    if free {
        start(cpus, (&raw const *job).cast_mut().cast());
    }
    free
}

/// Waits for the end of what [`begin`] has started. False when nothing was. Only vCPU 0 calls this.
pub fn finish() -> bool {
    let busy = is_busy();
    if busy {
        wait();
        SHARED.busy.store(false, SeqCst);
    }
    busy
}

fn start(cpus: u64, job: *mut ()) {
    SHARED.job.store(job, SeqCst);
    SHARED.done.store(0, SeqCst);
    SHARED.cpus.store(cpus, SeqCst);
    SHARED.round.fetch_add(1, SeqCst);
}

fn wait() {
    while SHARED.done.load(SeqCst) < SHARED.cpus.load(SeqCst) - 1 {
        io::wait(POLL_MS);
        spin_loop();
    }
}

/// The life of a vCPU other than 0: waits for work, does its share.
pub fn serve(cpu: u64) -> ! {
    let mut seen = 0;
    loop {
        let round = SHARED.round.load(SeqCst);
        if round == seen {
            io::wait(POLL_MS);
            continue;
        }
        seen = round;
        // SAFETY: it points to the parameter of `together`, which does not return before this vCPU says that it is done, or
        // to the one of `begin`, which lives for ever; a job may be called by many at once.
        let job = unsafe { *SHARED.job.load(SeqCst).cast::<Job<'_>>() };
        job(cpu, SHARED.cpus.load(SeqCst));
        SHARED.done.fetch_add(1, SeqCst);
    }
}

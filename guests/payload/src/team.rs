//! All vCPUs at work: vCPU 0 obeys commands, and gives each of the others a share when a command says so.

use core::hint::spin_loop;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering::SeqCst};

use crate::io;

/// What each vCPU is called with: its own number, and how many take part.
type Job<'a> = &'a (dyn Fn(u64, u64) + Sync);

/// Milliseconds between two looks for work, and for its end.
const POLL_MS: u32 = 2;

/// What vCPU 0 hands to the others. They look at `round`; when it changes, the rest is complete.
struct Shared {
    round: AtomicU64,
    done: AtomicU64,
    cpus: AtomicU64,
    /// Points to a [`Job`] that stays until all are done.
    job: AtomicPtr<()>,
}

static SHARED: Shared = Shared {
    round: AtomicU64::new(0),
    done: AtomicU64::new(0),
    cpus: AtomicU64::new(1),
    job: AtomicPtr::new(null_mut()),
};

/// Runs `job` on vCPUs 0 to `cpus`, and returns when all of them are done. Only vCPU 0 calls this.
pub fn together(cpus: u64, job: Job<'_>) {
    if cpus > 1 {
        SHARED.job.store((&raw const job).cast_mut().cast(), SeqCst);
        SHARED.done.store(0, SeqCst);
        SHARED.cpus.store(cpus, SeqCst);
        SHARED.round.fetch_add(1, SeqCst);
    }
    job(0, cpus);
    while cpus > 1 && SHARED.done.load(SeqCst) < cpus - 1 {
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
        // SAFETY: it points to the parameter of `together`, which does not return before this vCPU says that it is done;
        // a job may be called by many at once.
        let job = unsafe { *SHARED.job.load(SeqCst).cast::<Job<'_>>() };
        job(cpu, SHARED.cpus.load(SeqCst));
        SHARED.done.fetch_add(1, SeqCst);
    }
}

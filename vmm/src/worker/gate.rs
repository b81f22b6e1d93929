//! Holding vCPUs in user space.
//!
//! A vCPU that may not run is *held*: it is out of `KVM_RUN` and waits on a futex here. A fault left unanswered in the
//! kernel would stop it too, but KVM answers guest faults from shared kernel workers: a few hundred waiting ones stall the
//! whole host, and a vCPU that waits in the kernel cannot always be brought out.
//!
//! Reasons are bits of one word; a vCPU runs when the word is 0:
//!
//! ```text
//!            hold(reason): set the bit, kick every vCPU
//!   RUNNING ───────────────────────────────────────────► HELD   (out of KVM_RUN, counted in `parked`)
//!           ◄───────────────────────────────────────────
//!            release(reason): clear the bit, last bit wakes all
//! ```
//!
//! The kick is a signal whose handler sets `immediate_exit` in the vCPU's own `kvm_run`. The vCPU clears that flag
//! *before* it looks at the word, so a kick between the look and `KVM_RUN` makes `KVM_RUN` return at once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use rustix::thread::futex;
use vmm_sys_util::eventfd::EventFd;

/// Held until the controller says `Start`.
pub const NOT_STARTED: u32 = 1;
/// Held because a fault could not be charged.
pub const NO_MEMORY: u32 = 2;
/// Held because somebody asked for a pause.
pub const PAUSED: u32 = 4;
/// Held while accounting begins, until the reserve is there.
pub const ACTIVATING: u32 = 8;

/// The gate that every vCPU passes before it enters the guest.
#[derive(Debug)]
pub struct Gate {
    reasons: AtomicU32,
    parked: AtomicU32,
    threads: Vec<OnceLock<i32>>,
    /// Monotonic nanoseconds at which the last vCPU came out after the last hold; for the `hold` figure.
    all_out_ns: AtomicU64,
    /// Written when the last vCPU comes out.
    all_out: EventFd,
}

/// The signal that brings a vCPU out of `KVM_RUN`.
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

impl Gate {
    /// A gate for `cpus` vCPUs, closed with [`NOT_STARTED`].
    ///
    /// # Errors
    /// When the host gives no eventfd.
    pub fn new(cpus: u32) -> std::io::Result<Self> {
        Ok(Self {
            reasons: AtomicU32::new(NOT_STARTED),
            parked: AtomicU32::new(0),
            threads: (0..cpus).map(|_| OnceLock::new()).collect(),
            all_out_ns: AtomicU64::new(0),
            all_out: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// The calling thread is vCPU `index` from now on and gets the kicks.
    pub fn register(&self, index: usize) {
        // SAFETY: gettid has no conditions.
        let _ = self.threads[index].set(unsafe { libc::gettid() });
    }

    /// Readable when the last vCPU has come out.
    pub fn all_out_event(&self) -> &EventFd {
        &self.all_out
    }

    /// True when every vCPU is out of the guest and stays out.
    pub fn all_out(&self) -> bool {
        self.reasons.load(SeqCst) != 0 && self.parked.load(SeqCst) as usize == self.threads.len()
    }

    /// When the last vCPU came out, in monotonic nanoseconds.
    pub fn all_out_ns(&self) -> u64 {
        self.all_out_ns.load(SeqCst)
    }

    /// Closes the gate for `reason` and kicks every vCPU. Waits for nothing. True when the reason is new.
    pub fn hold(&self, reason: u32) -> bool {
        let before = self.reasons.fetch_or(reason, SeqCst);
        if before == 0 {
            for tid in self.threads.iter().filter_map(OnceLock::get) {
                // SAFETY: tgkill touches no memory; the handler of this signal only writes the target's own kvm_run.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), *tid, kick_signal()) };
            }
            // A vCPU that waits in user space for its guest's sake notices too.
            let _ = futex::wake(&self.reasons, futex::Flags::PRIVATE, u32::MAX >> 1);
        }
        before & reason == 0
    }

    /// Opens the gate for `reason`; vCPUs go on when no reason is left. True when it was closed for it.
    pub fn release(&self, reason: u32) -> bool {
        let before = self.reasons.fetch_and(!reason, SeqCst);
        if before & !reason == 0 && before != 0 {
            let _ = futex::wake(&self.reasons, futex::Flags::PRIVATE, u32::MAX >> 1);
        }
        before & reason != 0
    }

    /// True while the gate is closed for `reason`.
    pub fn closed_for(&self, reason: u32) -> bool {
        self.reasons.load(SeqCst) & reason != 0
    }

    /// Called by a vCPU before it enters the guest: true when it may, at once. Otherwise call [`Gate::park`].
    pub fn open(&self) -> bool {
        self.reasons.load(SeqCst) == 0
    }

    /// Waits until the gate is open. Look at [`Gate::open`] again afterwards: it may have closed since.
    pub fn park(&self) {
        if self.parked.fetch_add(1, SeqCst) as usize + 1 == self.threads.len() {
            self.all_out_ns.store(monotonic_ns(), SeqCst);
            let _ = self.all_out.write(1);
        }
        loop {
            let reasons = self.reasons.load(SeqCst);
            if reasons == 0 {
                break;
            }
            let _ = futex::wait(&self.reasons, futex::Flags::PRIVATE, reasons, None);
        }
        self.parked.fetch_sub(1, SeqCst);
    }

    /// Waits for `time` or until the gate closes, whichever comes first (a guest that asked to wait).
    pub fn idle(&self, time: Duration) {
        let deadline = monotonic_ns().saturating_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        while self.open() {
            let left = deadline.saturating_sub(monotonic_ns());
            if left == 0 {
                return;
            }
            let timeout = rustix::time::Timespec {
                tv_sec: (left / 1_000_000_000) as i64,
                tv_nsec: (left % 1_000_000_000) as i64,
            };
            let _ = futex::wait(&self.reasons, futex::Flags::PRIVATE, 0, Some(&timeout));
        }
    }
}

/// Nanoseconds of the monotonic clock.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Instant;

    /// A thread that passes the gate again and again, as a vCPU does.
    fn runner(gate: &Arc<Gate>, index: usize, laps: &Arc<AtomicU64>) {
        let (gate, laps) = (gate.clone(), laps.clone());
        std::thread::spawn(move || {
            gate.register(index);
            loop {
                if !gate.open() {
                    gate.park();
                    continue;
                }
                laps.fetch_add(1, SeqCst);
                gate.idle(Duration::from_millis(1));
            }
        });
    }

    fn wait_for(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < deadline, "not in time: {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn all_reasons_must_be_gone_before_a_vcpu_runs() {
        // SAFETY: an empty handler for a signal that this test process does not use otherwise.
        unsafe { libc::signal(kick_signal(), (ignore as extern "C" fn(i32)) as libc::sighandler_t) };
        extern "C" fn ignore(_: i32) {}
        let gate = Arc::new(Gate::new(2).unwrap());
        let laps = Arc::new(AtomicU64::new(0));
        runner(&gate, 0, &laps);
        runner(&gate, 1, &laps);
        wait_for("both parked before the start", || gate.all_out());
        assert_eq!(laps.load(SeqCst), 0);
        gate.hold(PAUSED);
        gate.release(NOT_STARTED);
        assert!(gate.all_out(), "the pause still holds");
        assert_eq!(laps.load(SeqCst), 0);
        gate.release(PAUSED);
        wait_for("running", || laps.load(SeqCst) > 10);
        for _ in 0..200 {
            gate.hold(NO_MEMORY);
            wait_for("all out", || gate.all_out());
            let seen = laps.load(SeqCst);
            std::thread::yield_now();
            assert_eq!(laps.load(SeqCst), seen, "a vCPU ran while held");
            gate.release(NO_MEMORY);
        }
    }
}

//! Where the fault thread runs.
//!
//! A fault hands over twice: to the fault thread and back. Where waking a thread on another CPU is expensive (nested
//! machines: fifty times a wake on the same CPU), the fault thread belongs on the CPU of the vCPU that it serves; elsewhere
//! the scheduler knows better. A ping-pong of a few milliseconds decides, once in the life of a controller, which tells
//! its workers; and only for guests with one vCPU: with more, one thread cannot sit with all of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use vmm_sys_util::eventfd::EventFd;

/// Faults between two looks at where the vCPU runs. A look takes 4 µs. Where another CPU has nothing to do, the scheduler
/// moves a vCPU there each time that the fault thread wakes it and is still running itself; until the next look each fault
/// costs two wakes across CPUs, 60 µs each.
const LOOK_EVERY: usize = 16;

/// How much cheaper a wake on the same CPU must be before the thread is bound.
const WORTH_BINDING: f64 = 1.5;

/// Keeps the fault thread where its vCPU is, when that pays.
#[derive(Debug, Default)]
pub struct Placement {
    /// `/proc` stat line of the vCPU thread to follow, once it has one; none when the scheduler decides.
    stat: Option<Arc<OnceLock<File>>>,
    at: Option<usize>,
    faults: usize,
}

impl Placement {
    /// The scheduler decides.
    pub fn free() -> Self {
        Self::default()
    }

    /// Follows the thread of this process whose [`stat()`] line is (or will be) in `stat`.
    pub fn with(stat: Arc<OnceLock<File>>) -> Self {
        Self { stat: Some(stat), at: None, faults: LOOK_EVERY }
    }

    /// Counts faults, and moves the calling thread when its vCPU has moved.
    pub fn follow(&mut self, faults: usize) {
        let Some(stat) = &self.stat else { return };
        self.faults += faults;
        if self.faults < LOOK_EVERY {
            return;
        }
        let Some(cpu) = stat.get().and_then(processor) else { return };
        self.faults = 0;
        if self.at != Some(cpu) {
            let mut set = CpuSet::new();
            set.set(cpu);
            if sched_setaffinity(None, &set).is_ok() {
                self.at = Some(cpu);
            }
        }
    }
}

/// Opens the stat line of a thread of this process.
///
/// # Errors
/// When `/proc` does not have it.
pub fn stat(tid: i32) -> io::Result<File> {
    File::open(format!("/proc/self/task/{tid}/stat"))
}

/// The CPU a thread ran on last: field 39 of its `stat` line. Allocates nothing.
fn processor(stat: &File) -> Option<usize> {
    let mut buffer = [0u8; 1024];
    let n = stat.read_at(&mut buffer, 0).ok()?;
    let line = std::str::from_utf8(&buffer[..n]).ok()?;
    // The name in parentheses may hold anything; fields are counted behind it, from the third on.
    line.rsplit_once(')')?.1.split_ascii_whitespace().nth(36)?.parse().ok()
}

/// Whether a wake on the same CPU is so much cheaper that binding pays. The first call measures for a few milliseconds,
/// with threads of its own.
pub fn same_cpu_pays() -> bool {
    static PAYS: OnceLock<bool> = OnceLock::new();
    *PAYS.get_or_init(measure)
}

fn measure() -> bool {
    let Ok(allowed) = sched_getaffinity(None) else { return false };
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|c| allowed.is_set(*c));
    let (Some(first), Some(second)) = (cpus.next(), cpus.next()) else { return false };
    match (round_trip(first, first), round_trip(first, second)) {
        (Ok(same), Ok(other)) => other.as_secs_f64() > WORTH_BINDING * same.as_secs_f64(),
        _ => false,
    }
}

/// Time of a wake and its answer between two threads bound to CPUs `a` and `b`.
fn round_trip(a: usize, b: usize) -> io::Result<Duration> {
    const ROUNDS: u32 = 40;
    let (ping, pong) = (EventFd::new(libc::EFD_CLOEXEC)?, EventFd::new(libc::EFD_CLOEXEC)?);
    let bind = |cpu| {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set)
    };
    std::thread::scope(|scope| {
        let echo = scope.spawn(|| -> io::Result<()> {
            bind(b)?;
            for _ in 0..ROUNDS {
                ping.read()?;
                pong.write(1)?;
            }
            Ok(())
        });
        let caller = scope.spawn(|| -> io::Result<Duration> {
            bind(a)?;
            let mut best = Duration::MAX;
            for _ in 0..ROUNDS {
                let start = Instant::now();
                ping.write(1)?;
                pong.read()?;
                best = best.min(start.elapsed());
            }
            Ok(best)
        });
        let time = caller.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        echo.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))?;
        Ok(time)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_of_a_thread_is_read_from_its_stat_line() {
        let stat = File::open("/proc/thread-self/stat").unwrap();
        let allowed = sched_getaffinity(None).unwrap();
        assert!(allowed.is_set(processor(&stat).unwrap()));
    }

    #[test]
    fn calibration_ends_and_gives_a_round_trip() {
        assert!(round_trip(0, 0).unwrap() > Duration::ZERO);
        assert_eq!(same_cpu_pays(), same_cpu_pays(), "measured once");
    }
}

//! A process outside ballast that takes the memory of its host, and what the host says meanwhile.
//!
//! Only for a nested host (`scripts/rig`): what it does to others is what is looked at.

use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use crate::{PAGE, deadline, lines};

const MIB: u64 = 1 << 20;

/// The largest host that may be used up.
const LARGEST: u64 = 2048 * MIB;

/// Below so much that is left a hog takes its time: a second a bite in the rig.
const LITTLE: u64 = 256 * MIB;

/// Takes memory until it has so many bytes, a `bite` at a time and slowly at the end, says so, and keeps it. Never returns.
///
/// # Panics
/// On a host that is larger than a nested one.
pub fn take(bytes: u64, bite: u64) -> ! {
    assert!(is_small_host(), "this takes nearly all memory of its host: it is for the nested one (scripts/rig)");
    let mut kept: Vec<Vec<u8>> = Vec::new();
    while (kept.len() as u64) * bite < bytes {
        kept.push((0..bite).map(|at| (at % 251) as u8).collect());
        if available() < LITTLE {
            std::thread::sleep(deadline(1) / 10);
        }
    }
    println!("has {} of {bytes}", kept.len() as u64 * bite);
    loop {
        std::thread::park();
    }
}

/// Whether this host may be used up.
pub fn is_small_host() -> bool {
    total() < LARGEST
}

/// What the host has left, in bytes.
pub fn available() -> u64 {
    meminfo("MemAvailable:")
}

/// All memory of the host, in bytes.
pub fn total() -> u64 {
    meminfo("MemTotal:")
}

fn meminfo(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("a host says what it has");
    let line = text.lines().find_map(|line| line.strip_prefix(key)).expect("it is there");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

/// How often this host's kernel has killed a process for want of memory.
pub fn oom_kills() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").expect("a host counts");
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).expect("oom_kill")
}

/// Time since boot in which all tasks that would run waited for memory; `None` where the kernel does not say.
pub fn stalled() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/pressure/memory").ok()?;
    let full = text.lines().find_map(|line| line.strip_prefix("full "))?;
    full.rsplit_once("total=")?.1.trim().parse().ok().map(Duration::from_micros)
}

/// A process that ends with its owner.
#[derive(Debug)]
pub struct Hog {
    child: Child,
    words: Receiver<String>,
    has_all: bool,
}

impl Hog {
    /// This program once more with `words`, with which it must call [`take`].
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(words: &[&str]) -> Self {
        let program = std::env::current_exe().expect("this program is somewhere");
        let child = Command::new(program).args(words).stdout(Stdio::piped()).spawn();
        let mut child = child.expect("this program starts");
        let words = lines(child.stdout.take().expect("piped"), false);
        Self { child, words, has_all: false }
    }

    /// Whether it lives.
    pub fn lives(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Whether it has all that it wants; it is not heard any more when it was killed.
    pub fn has_all(&mut self) -> bool {
        self.has_all |= self.words.try_recv().is_ok();
        self.has_all
    }

    /// What it has, in bytes.
    pub fn resident(&self) -> u64 {
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.child.id())).unwrap_or_default();
        statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * PAGE
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

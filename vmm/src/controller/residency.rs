//! What the host says of a worker's memory: evidence that needs no word of the worker's.
//!
//! The controller opens the worker's pagemap when it starts it, or takes it over. The descriptor follows the address
//! space, not the number of the process. It answers three questions, always on a thread that may wait:
//!
//! * *measured*: what the VM costs beside its pages, next to what it is charged for it;
//! * *audit*: whether more is resident than was charged;
//! * *returned*: whether the memory of a worker that is dead has come back to the host. That is not when the process is
//!   gone: a kernel worker that was filling one of its pages may hold the address space for tens of milliseconds more.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use linux_raw_sys::general::PAGE_IS_PFNZERO;
use memcg_core::units::{PAGE_SIZE, Pages};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::cgroup::Cgroup;
use super::host;
use crate::memory::activation::scan;

/// Private memory that a dead worker's cgroup may still be charged when its memory counts as back: the kernel's counters
/// lag behind by so much.
const CRUMBS: u64 = 1 << 20;

/// How long evidence is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a VM costs beside its pages, measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MeasuredView {
    /// Private memory of the worker that is not guest RAM.
    pub user_bytes: u64,
    /// What the kernel charges the worker's cgroup for memory of its own (KVM, page tables, threads); `null` without a
    /// cgroup.
    pub kernel_bytes: Option<u64>,
}

/// What is resident of a worker at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Pages in the areas asked for that are present, or in the host's swap.
    pub areas: Pages,
    /// All its private memory, guest RAM included. The kernel sums it up loosely: within [`looseness`].
    pub private: Pages,
}

/// By how much the kernel's count of a process's pages may be wrong: each CPU has some that it has not added yet.
pub fn looseness() -> Pages {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    Pages(cpus * (2 * cpus).max(64))
}

/// A worker's memory as the host sees it.
#[derive(Clone, Debug)]
pub struct Residency {
    pid: i32,
    pagemap: Arc<File>,
    cgroup: Option<Cgroup>,
}

impl Residency {
    /// Of the process `pid`, which must not have been reaped, with its own cgroup if it has one.
    ///
    /// # Errors
    /// When it may not be looked into.
    pub fn open(pid: i32, cgroup: Option<Cgroup>) -> io::Result<Self> {
        Ok(Self { pid, pagemap: Arc::new(File::open(format!("/proc/{pid}/pagemap"))?), cgroup })
    }

    /// The cgroup of its own.
    pub fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// What is resident now. Takes a few milliseconds a GiB.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn resident(&self, areas: &[Range<u64>]) -> io::Result<Resident> {
        let mut pages = 0;
        for area in areas {
            let (mut at, end) = (area.start, area.end);
            while at < end {
                at = scan(&self.pagemap, at, end, |region| {
                    if region.categories & u64::from(PAGE_IS_PFNZERO) == 0 {
                        pages += (region.end - region.start) / PAGE_SIZE;
                    }
                })?;
            }
        }
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let kib: u64 = ["RssAnon:", "RssShmem:", "VmSwap:"].iter().map(|key| status_kib(&status, key)).sum();
        Ok(Resident { areas: Pages(pages), private: Pages::from_bytes_ceil(kib * 1024) })
    }

    /// What it costs beside its pages, which are in `areas`. Takes some ten milliseconds a GiB.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn measured(&self, areas: &[Range<u64>]) -> io::Result<MeasuredView> {
        let kernel_bytes = self.cgroup.as_ref().and_then(|cgroup| cgroup.charged().ok()).map(|charged| charged.kernel);
        let user_bytes = private(&fs::read_to_string(format!("/proc/{}/smaps", self.pid))?, areas);
        Ok(MeasuredView { user_bytes, kernel_bytes })
    }

    /// Whether the memory has come back, as far as can be told without waiting.
    fn is_back(&self) -> bool {
        // The end of the file: nobody uses the address space any more.
        let unused = matches!(self.pagemap.read_at(&mut [0; 8], 0), Ok(0) | Err(_));
        let charged = || self.cgroup.as_ref().and_then(|cgroup| cgroup.charged().ok());
        unused && charged().is_none_or(|charged| charged.anon < CRUMBS)
    }

    /// Waits until the memory of the worker, which has ended, is back, and removes its cgroup. False when it is not after
    /// ten seconds.
    pub async fn returned(self) -> bool {
        let end = Instant::now() + host::scaled(PATIENCE);
        let mut pause = Duration::from_millis(1);
        let back = loop {
            let this = self.clone();
            if tokio::task::spawn_blocking(move || this.is_back()).await.unwrap_or(true) {
                break true;
            }
            if Instant::now() >= end {
                break false;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        };
        if let Some(cgroup) = self.cgroup {
            cgroup.remove();
        } else if back {
            // Nobody uses it, and it may still be on its way.
            host::memory_settled().await;
        }
        back
    }
}

/// A line of `/proc/PID/status` in KiB.
fn status_kib(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Private memory outside of `areas` in bytes, out of the text of `/proc/PID/smaps`: what a process has written, and what
/// of that is swapped. KVM's own pages that it maps are the kernel's, and a page of a file whose writing to the disk is
/// still due (`Private_Dirty` counts it) is the page cache's.
fn private(smaps: &str, areas: &[Range<u64>]) -> u64 {
    let range = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    };
    let (mut counted, mut total) = (false, 0);
    for line in smaps.lines() {
        if let Some((start, end)) = range(line) {
            // An area may be several mappings.
            let guest = areas.iter().any(|area| area.start <= start && end <= area.end);
            counted = !guest && !line.contains("anon_inode:kvm");
        } else if counted && let Some((key, value)) = line.split_once(':') {
            let kib = || value.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
            if matches!(key, "Anonymous" | "Swap") {
                total += kib() * 1024;
            }
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_memory_is_what_is_neither_guest_ram_nor_kvm_s() {
        let smaps = "\
7f0000000000-7f0000400000 rw-p 00000000 00:00 0 
Anonymous:          4096 kB
Swap:                  8 kB
7f0000400000-7f0000500000 rw-p 00000000 00:00 0  [heap]
Private_Dirty:       112 kB
Anonymous:           100 kB
Swap:                  4 kB
7f0000600000-7f0000603000 rw-s 00000000 00:0f 1  anon_inode:kvm-vcpu:0
Private_Dirty:        12 kB
Anonymous:            12 kB
";
        let ram = 0x7f00_0000_0000..0x7f00_0040_0000;
        assert_eq!(private(smaps, &[ram]), 104 << 10);
        assert_eq!(private(smaps, &[]), (104 + 4104) << 10);
    }

    #[tokio::test]
    async fn a_process_that_lives_holds_its_memory_and_one_that_is_dead_does_not() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("started");
        let residency = Residency::open(child.id().cast_signed(), None).expect("looked into");
        assert!(!residency.is_back());
        assert!(residency.measured(&[]).expect("measured").user_bytes > 0);
        child.kill().expect("killed");
        child.wait().expect("reaped");
        assert!(residency.is_back());
        assert!(residency.measured(&[]).is_err());
        assert!(residency.returned().await);
    }
}

//! What it costs to find out which pages are used.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use ballast::memory::Ram;
use ballast::memory::uffd::{Move, USERFAULTFD_IOC_NEW, Uffd};
use ballast::worker::gate::monotonic_ns;
use linux_raw_sys::{general as sys, ioctl as nr};
use memcg_core::frame::{FrameState, FrameTable, List, Scan};

use crate::bare::{self, Task};
use crate::{Goal, MIB, Outcome, full, median, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 1] = ["R21"];

/// Measures one of [`IDS`].
pub fn measure(_id: &str) -> Result<Outcome, String> {
    Ok(scan())
}

/// What the guest has touched, all of it resident.
const START: u64 = 64 * MIB;
const TOUCHED: u64 = 256 * MIB;
const PAGES: u64 = TOUCHED / 4096;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// How the pages that were used are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The kernel's dirty tracking: every page that was written since is found and protected again. Reads are not seen.
    Raw,
    /// As we do it: the pages are taken off the list, and moved aside so that the next touch is a fault.
    Ours,
}

impl Way {
    /// Its word on the command line.
    pub fn word(self) -> &'static str {
        if self == Way::Raw { "age-raw" } else { "age-ours" }
    }

    /// The one of that word.
    pub fn parse(word: &str) -> Option<Self> {
        [Way::Raw, Way::Ours].into_iter().find(|way| way.word() == word)
    }

    /// Looks at all that the guest has touched: how long it took, in nanoseconds. Without a `uffd` of the guest's faults
    /// only [`Way::Raw`] can be.
    pub fn run(self, ram: &Ram, uffd: Option<&Uffd>) -> u64 {
        match uffd {
            Some(uffd) if self == Way::Ours => ours(ram, uffd),
            _ => raw(ram),
        }
    }
}

/// Isolates and moves aside all pages, by whole blocks of 2 MiB.
fn ours(ram: &Ram, uffd: &Uffd) -> u64 {
    for slot in ram.slots() {
        // SAFETY: the stage of guest RAM, whose faults are answered by the same thread until the process ends.
        unsafe { uffd.register(slot.stage, slot.bytes) }.expect("registering");
    }
    let first = ram.index_of_gpa(START).expect("RAM") as usize;
    let mut frames = FrameTable::new(ram.pages() as usize);
    frames.set_range(first, first + PAGES as usize, FrameState::Active);
    let mut runs = Vec::with_capacity(PAGES as usize);
    let begin = monotonic_ns();
    while frames.count(FrameState::Active) > 0 {
        runs.clear();
        frames.isolate(&Scan::new(List::Active, 64, 4096), |run| runs.push(run));
        for run in &runs {
            let (page, pages) = (run.start as u64, run.len() as u64);
            // SAFETY: the guest does not run, and nobody else looks at its pages.
            let moved = unsafe { uffd.move_pages(ram.hva(ram.other(page)), ram.hva(page), pages) };
            assert_eq!(moved, Move::Moved(pages), "the pages are there, and nobody holds them");
            frames.set_range(run.start, run.end, FrameState::Idle);
        }
    }
    let ns = monotonic_ns() - begin;
    assert_eq!(frames.count(FrameState::Idle), PAGES);
    ns
}

/// One scan that finds all pages written and protects them.
fn raw(ram: &Ram) -> u64 {
    let device = std::fs::File::options().read(true).write(true).open("/dev/userfaultfd").expect("the device");
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value and returns a new descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    assert!(fd >= 0, "userfaultfd");
    // SAFETY: it was just returned to us and is owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let features = sys::UFFD_FEATURE_WP_ASYNC | sys::UFFD_FEATURE_WP_UNPOPULATED;
    let mut api = sys::uffdio_api { api: 0xAA, features: features.into(), ioctls: 0 };
    ioctl(&fd, nr::UFFDIO_API, &mut api);
    let start = ram.hva(ram.index_of_gpa(START).expect("RAM"));
    let mut register = sys::uffdio_register {
        range: sys::uffdio_range { start, len: TOUCHED },
        mode: sys::UFFDIO_REGISTER_MODE_WP.into(),
        ioctls: 0,
    };
    ioctl(&fd, nr::UFFDIO_REGISTER, &mut register);
    let pagemap = std::fs::File::open("/proc/self/pagemap").expect("/proc is mounted");
    let mut found = [sys::page_region { start: 0, end: 0, categories: 0 }; 512];
    let written = u64::from(sys::PAGE_IS_WRITTEN);
    let mut scan = sys::pm_scan_arg {
        size: size_of::<sys::pm_scan_arg>() as u64,
        flags: u64::from(sys::PM_SCAN_WP_MATCHING | sys::PM_SCAN_CHECK_WPASYNC),
        start,
        end: start + TOUCHED,
        walk_end: 0,
        vec: found.as_mut_ptr() as u64,
        vec_len: found.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: written,
        category_anyof_mask: 0,
        return_mask: written,
    };
    let begin = monotonic_ns();
    // SAFETY: the argument and the vector that it names are valid for the call.
    let regions = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
    let ns = monotonic_ns() - begin;
    assert!(regions > 0 && scan.walk_end == start + TOUCHED, "a scan: {}", std::io::Error::last_os_error());
    let pages: u64 = found[..regions as usize].iter().map(|region| (region.end - region.start) / 4096).sum();
    assert_eq!(pages, PAGES, "all pages were written");
    ns
}

fn ioctl<T>(fd: &OwnedFd, request: u32, argument: &mut T) {
    // SAFETY: the request takes a pointer to this structure.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), request as libc::c_ulong, &raw mut *argument) };
    assert_eq!(done, 0, "userfaultfd: {}", std::io::Error::last_os_error());
}

/// R21: time for each resident page to find and mark all that were used, over that of the kernel's dirty tracking.
fn scan() -> Outcome {
    let look = |way| move || bare::task(Task::Age(way), "touch 64M 256M; mark 1; park") as f64 / PAGES as f64;
    let runs = pairs(full(7, 15), look(Way::Raw), look(Way::Ours));
    let notes = format!(
        "ns_per_page={:.1} raw_ns_per_page={:.1} ",
        median(runs.iter().map(|run| run.1)),
        median(runs.iter().map(|run| run.0)),
    );
    let values = runs.iter().map(|(raw, ours)| ours / raw).collect();
    let goal = Goal::AtMost { floor: 2.0, target: 1.2 };
    Outcome { id: "R21", name: "ageing_scan", unit: "x", goal, values, notes }
}

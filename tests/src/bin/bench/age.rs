//! What it costs to find out which pages are used.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use ballast::memory::Ram;
use ballast::memory::uffd::{Move, USERFAULTFD_IOC_NEW, Uffd};
use ballast::worker::gate::monotonic_ns;
use ballast_tests::{TestVm, number};
use linux_raw_sys::{general as sys, ioctl as nr};
use memcg_core::frame::{FrameState, FrameTable, List, Scan};
use serde_json::json;

use crate::bare::{self, Task};
use crate::vm::{field, huge_pages, service_ns};
use crate::{Goal, MIB, Outcome, full, median, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 3] = ["R21", "R22", "R24"];

/// Measures one of [`IDS`].
pub fn measure(id: &str) -> Result<Outcome, String> {
    Ok(match id {
        "R21" => scan(),
        "R22" => overhead(),
        _ => proactive(),
    })
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

/// A guest that has touched 320 MiB and uses a fifth of it by Zipf's law, and says each second how fast it was. It is aged
/// as long as it has a limit, so one guest is compared with itself: two would differ by more than that.
struct Watched {
    vm: TestVm,
    pid: u64,
}

/// A stretch of its time.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    /// Cycles of 1000 accesses, in its [`quiet`] part.
    cycles: f64,
    /// CPU time of the worker's own threads in a second.
    cpu_s: f64,
    /// How far the last estimate of the working set is off, as a share of it.
    off: f64,
    /// What is charged at the end, in bytes.
    usage: f64,
}

impl Watched {
    /// With huge pages, as any charged VM where the host gives some, or without.
    fn new(words: &str, huge: bool) -> Self {
        let memory = format!("size=384M,max=384M,swap=max,{words}");
        huge_pages(huge);
        let mut vm = TestVm::builder("bench").memory(&memory).cmdline("shell").start();
        huge_pages(false);
        vm.expect("READY", 20);
        let answer = vm.command("touch 16M 320M seed=1 fill=half", 60);
        assert!(answer.starts_with("OK"), "{answer}");
        vm.send("access zipf 16M 320M hot=64M period=1000");
        let pid = number(&vm.show(), "pid");
        Self { vm, pid }
    }

    /// Gives it a limit, or takes it; lets `first` seconds pass, and looks at the `seconds` after them.
    fn stretch(&self, aged: bool, first: usize, seconds: usize) -> Stretch {
        let max = aged.then_some(384 * MIB);
        let (status, answer) = self.vm.patch("", &json!({ "max_bytes": max }));
        assert_eq!(status, 200, "{answer}");
        // What it was in the middle of is neither.
        (0..=first).for_each(|_| drop(self.vm.expect("ACCESS ", 60)));
        let before = service_ns(self.pid);
        let lines: Vec<String> = (0..seconds).map(|_| self.vm.expect("ACCESS ", 60)).collect();
        let cpu_ns = service_ns(self.pid) - before;
        let now = self.vm.show();
        let two = field(&lines[seconds - 1], "two") * 4096.0;
        Stretch {
            cycles: quiet(lines.iter().map(|line| field(line, "cycles_per_1000"))),
            cpu_s: cpu_ns as f64 / 1e9 / seconds as f64,
            off: now["cold"]["working_set_bytes"].as_f64().map_or(1.0, |set| (set - two).abs() / two),
            usage: number(&now, "memory.current_bytes") as f64,
        }
    }
}

/// The lower quartile of the means of two seconds each: in every one of them there is a sample of a guest that is aged, and what
/// others do on this host only ever makes a guest slower.
fn quiet(seconds: impl Iterator<Item = f64>) -> f64 {
    let mut means: Vec<f64> = seconds.collect::<Vec<_>>().chunks_exact(2).map(|two| (two[0] + two[1]) / 2.0).collect();
    means.sort_by(f64::total_cmp);
    means[means.len() / 4]
}

/// One guest in turns not aged and aged, in pairs. A generation is shorter than by default, unless there is time.
struct Turns {
    watched: Watched,
    generation_s: usize,
    runs: Vec<(Stretch, Stretch)>,
}

impl Turns {
    fn new(huge: bool) -> Self {
        let (generation_s, first, seconds) = if full(0, 1) == 1 { (30, 60, 60) } else { (2, 5, 6) };
        let watched = Watched::new(&format!("ageing={generation_s}s"), huge);
        let off = || watched.stretch(false, 1, seconds);
        let turn = |i: usize| {
            let before = i.is_multiple_of(2).then(off);
            let on = watched.stretch(true, first, seconds);
            (before.unwrap_or_else(off), on)
        };
        let runs = (0..4).map(turn).collect();
        Self { watched, generation_s, runs }
    }
}

/// R21: CPU time of the worker for each resident page and generation, what it takes to answer the pages that are touched
/// among it, over the time in which the kernel's dirty tracking looks at a page once. What it takes to look at every page, as
/// that does, is printed too: all of it is the kernel's move.
fn scan() -> Outcome {
    let look = |way| move || bare::task(Task::Age(way), "touch 64M 256M; mark 1; park") as f64 / PAGES as f64;
    let looks = pairs(full(7, 15), look(Way::Raw), look(Way::Ours));
    let (raw, all) = (median(looks.iter().map(|run| run.0)), median(looks.iter().map(|run| run.1)));
    // The kernel looks at small pages too.
    let turns = Turns::new(false);
    let ours =
        |(off, on): &(Stretch, Stretch)| (on.cpu_s - off.cpu_s) * 1e9 * turns.generation_s as f64 / (on.usage / 4096.0);
    let ours: Vec<f64> = turns.runs.iter().map(ours).collect();
    let notes = format!(
        "generation_s={} ns_per_page={:.1} raw_ns_per_page={raw:.1} all_ns_per_page={all:.1} all_over_raw={:.2} ",
        turns.generation_s,
        median(ours.iter().copied()),
        all / raw,
    );
    let goal = Goal::AtMost { floor: 2.0, target: 1.2 };
    let values = ours.into_iter().map(|ns| ns / raw).collect();
    Outcome { id: "R21", name: "ageing_scan", unit: "x", goal, values, notes }
}

/// R22: speed of a guest that is aged, over that of the same one as long as it is not. How far the estimate of its working
/// set is off is printed too.
fn overhead() -> Outcome {
    let Turns { watched, generation_s, runs } = Turns::new(true);
    let now = watched.vm.show();
    let notes = format!(
        "ageing={generation_s}s aged_mib={} returned_mib={} estimate_off={:.3} cpu_s_per_s={:.4} off_cpu_s_per_s={:.4} ",
        number(&now, "cold.aged_bytes") / MIB,
        number(&now, "cold.returned_bytes") / MIB,
        median(runs.iter().map(|run| run.1.off)),
        median(runs.iter().map(|run| run.1.cpu_s)),
        median(runs.iter().map(|run| run.0.cpu_s)),
    );
    let values = runs.iter().map(|(off, on)| off.cycles / on.cycles).collect();
    let goal = Goal::AtLeast { floor: 0.97, target: 0.99 };
    Outcome { id: "R22", name: "ageing_overhead", unit: "x", goal, values, notes }
}

/// R24: the share of a guest's memory that proactive eviction gives back, its store counted, of a guest that uses a fifth of
/// it. Nothing where the guest becomes slower by more than 1 % than it is just before and just after. Three times in turns: of the
/// same build -3.9 % and 2.4 % were seen when the stretches were a minute apart.
fn proactive() -> Outcome {
    let runs: Vec<([Stretch; 4], [Stretch; 3])> = (0..full(3, 5))
        .map(|_| {
            let watched = Watched::new("ageing=2s,proactive=on", true);
            let off = || watched.stretch(false, 1, 10);
            let before = off();
            // What is cold goes in the first of them.
            let turns = [35, 5, 5].map(|first| (watched.stretch(true, first, 10), off()));
            ([before, turns[0].1, turns[1].1, turns[2].1], turns.map(|turn| turn.0))
        })
        .collect();
    let slower = |(off, on): &([Stretch; 4], [Stretch; 3])| {
        let around = |i: usize| 2.0 * on[i].cycles / (off[i].cycles + off[i + 1].cycles) - 1.0;
        [around(0), around(1), around(2)]
    };
    let slowdown = median(runs.iter().flat_map(slower));
    let saved = |(off, on): &([Stretch; 4], [Stretch; 3])| 1.0 - on[2].usage / off[0].usage;
    let notes = format!(
        "saved={:.3} slowdown={slowdown:.4} cpu_s_per_s={:.4} ",
        median(runs.iter().map(saved)),
        median(runs.iter().map(|run| run.1[2].cpu_s)),
    );
    let values = runs.iter().map(|run| if slowdown <= 0.01 { saved(run) } else { 0.0 }).collect();
    let goal = Goal::AtLeast { floor: 0.10, target: 0.20 };
    Outcome { id: "R24", name: "proactive_saving", unit: "fraction", goal, values, notes }
}

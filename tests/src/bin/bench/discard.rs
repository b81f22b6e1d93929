//! What the balloon's host side gives back, against the discards themselves.
//!
//! The guest puts all page numbers into its ring and rings the bell once: from then until everything is returned, the host
//! reads, checks, claims, discards and uncharges. The baseline is the system call alone, on the memory of a guest that has
//! touched as much, and of which a vCPU polls meanwhile as that of the other does: each discard interrupts whatever CPU it ran
//! on, and where that is dear it costs more than all else.

use ballast::memory::Ram;
use ballast::worker::gate::monotonic_ns;
use ballast_tests::{TestVm, number};

use crate::bare::{self, Task};
use crate::vm::{mark, service_ns};
use crate::{Goal, MIB, Outcome, full, median, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 2] = ["R7", "R8"];

/// Measures one of [`IDS`].
pub fn measure(id: &str) -> Result<Outcome, String> {
    Ok(if id == "R7" { contiguous() } else { scattered() })
}

/// Where the guest's memory begins that is given, its length, and the pages that are: as many as a ring holds.
const START: u64 = 64 * MIB;
const GIVEN: u64 = 512 * MIB;
const PAGES: u64 = GIVEN / 4096;

/// A raw discard of what the payload has touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raw {
    /// All in one call.
    One,
    /// Every other page, 512 in each call.
    Vector,
    /// Every other page, each with its own call.
    Each,
}

impl Raw {
    /// Its word on the command line.
    pub fn word(self) -> &'static str {
        match self {
            Raw::One => "discard-one",
            Raw::Vector => "discard-vector",
            Raw::Each => "discard-each",
        }
    }

    /// The one of that word.
    pub fn parse(word: &str) -> Option<Self> {
        [Raw::One, Raw::Vector, Raw::Each].into_iter().find(|raw| raw.word() == word)
    }

    /// Discards guest memory: how long it took, in nanoseconds.
    pub fn run(self, ram: &Ram) -> u64 {
        let first = ram.index_of_gpa(START).expect("RAM");
        let hva = |page: u64| ram.hva(first + page) as *mut libc::c_void;
        let begin = monotonic_ns();
        match self {
            Raw::One => discard(hva(0), GIVEN),
            Raw::Each => (0..PAGES).for_each(|page| discard(hva(2 * page), 4096)),
            Raw::Vector => {
                let me = rustix::process::Pid::from_raw(std::process::id() as i32).expect("an id");
                let me = rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty()).expect("a pidfd");
                for from in (0..PAGES).step_by(512) {
                    let vector: [libc::iovec; 512] =
                        std::array::from_fn(|i| libc::iovec { iov_base: hva(2 * (from + i as u64)), iov_len: 4096 });
                    vectored(&me, &vector);
                }
            }
        }
        monotonic_ns() - begin
    }
}

fn discard(at: *mut libc::c_void, bytes: u64) {
    // SAFETY: the range is RAM of a guest that does not run; no Rust reference points into it.
    assert_eq!(unsafe { libc::madvise(at, bytes as usize, libc::MADV_DONTNEED) }, 0, "a discard");
}

fn vectored(me: &impl std::os::fd::AsRawFd, vector: &[libc::iovec]) {
    let (pidfd, count) = (me.as_raw_fd(), vector.len());
    // SAFETY: as for `discard`, for each range of the vector.
    let done =
        unsafe { libc::syscall(libc::SYS_process_madvise, pidfd, vector.as_ptr(), count, libc::MADV_DONTNEED, 0) };
    assert_eq!(done, 4096 * count as i64, "a vectored discard of this process's own memory: since Linux 6.13");
}

/// One run of ours.
struct Ours {
    ns: u64,
    /// What the worker's own threads computed meanwhile.
    cpu_ns: u64,
}

/// Lets a guest touch so much, and give of it what `stride` says.
fn ours(touch: u64, stride: &str) -> Ours {
    let mut vm = TestVm::builder("bench").memory("size=1152M,max=1152M").cmdline("shell").start();
    vm.expect("READY", 20);
    for command in ["balloon init size=128", &format!("touch 64M {touch}")] {
        assert!(vm.command(command, 120).starts_with("OK"), "{command}");
    }
    let pid = number(&vm.show(), "pid");
    let before = service_ns(pid);
    vm.send(&format!("balloon give 64M {touch} {stride}"));
    let ns = mark(&vm, 1);
    let ns = mark(&vm, 2) - ns;
    Ours { ns, cpu_ns: service_ns(pid) - before }
}

/// R7: GiB/s of contiguous page numbers, over one `madvise` of the same range.
fn contiguous() -> Outcome {
    let raw = || bare::task(Task::Discard(Raw::One), "touch 64M 512M; mark 1; park");
    let runs = pairs(full(7, 15), raw, || ours(GIVEN, ""));
    outcome("R7", "discard_contiguous", &runs, Goal::AtLeast { floor: 0.5, target: 0.8 }, String::new())
}

/// R8: the same for every other page, over vectors of 512. One call for each page is printed too.
fn scattered() -> Outcome {
    let work = "touch 64M 1024M; mark 1; park";
    let raw = || bare::task(Task::Discard(Raw::Vector), work);
    let runs = pairs(full(7, 15), raw, || ours(2 * GIVEN, "stride=8K"));
    let each = bare::task(Task::Discard(Raw::Each), work);
    let mine = median(runs.iter().map(|(_, ours)| ours.ns as f64));
    let raw = median(runs.iter().map(|(raw, _)| *raw as f64));
    // What the vector alone gains is all that there is to be had.
    let notes = format!(
        "each_ns_per_page={:.0} over_each={:.2} raw_over_each={:.2} ",
        each as f64 / PAGES as f64,
        each as f64 / mine,
        each as f64 / raw
    );
    outcome("R8", "discard_scattered", &runs, Goal::AtLeast { floor: 0.5, target: 0.85 }, notes)
}

fn outcome(id: &'static str, name: &'static str, runs: &[(u64, Ours)], goal: Goal, notes: String) -> Outcome {
    let (raw, ours) = (median(runs.iter().map(|run| run.0 as f64)), median(runs.iter().map(|run| run.1.ns as f64)));
    let per_page = |ns: f64| ns / PAGES as f64;
    let gib = GIVEN as f64 / (1024.0 * MIB as f64);
    let notes = format!(
        "ns_per_page={:.0} raw_ns_per_page={:.0} gib_per_s={:.2} raw_gib_per_s={:.2} cpu_s_per_gib={:.3} \
         raw_cpu_s_per_gib={:.3} {notes}",
        per_page(ours),
        per_page(raw),
        gib / (ours / 1e9),
        gib / (raw / 1e9),
        median(runs.iter().map(|run| run.1.cpu_ns as f64)) / 1e9 / gib,
        raw / 1e9 / gib,
    );
    let values = runs.iter().map(|(raw, ours)| *raw as f64 / ours.ns as f64).collect();
    Outcome { id, name, unit: "x", goal, values, notes }
}

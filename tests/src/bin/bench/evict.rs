//! Eviction and refaults, against the kernel's own: a process in a memory cgroup over compressed swap.

use std::collections::{BTreeSet, HashMap};

use ballast::worker::gate::monotonic_ns;
use ballast_tests::{TestVm, number, wait_until};
use guest_common::{Access, Pattern};
use serde_json::json;

use crate::bare::{self, Handler, Place};
use crate::memcg::{Process, swapped_out};
use crate::vm::{field, mark, process_ns, service_ns};
use crate::{Goal, MIB, Outcome, full, median, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 6] = ["R10", "R11", "R12", "R13", "R14", "R23"];

/// Measures one of [`IDS`].
pub fn measure(id: &str) -> Result<Outcome, String> {
    // Says early what the host lacks.
    drop(Process::start(MIB, "")?);
    Ok(match id {
        "R10" => throughput(),
        "R11" => refault(),
        "R12" => pass(),
        "R13" => lower("R13", "limit_lowered", "", Goal::AtMost { floor: 1.5, target: 1.0 }),
        "R14" => {
            // It has more to give than it is asked for.
            let helps = "balloon init; balloon auto 384M 640M rounds=0";
            lower("R14", "limit_lowered_with_help", helps, Goal::AtMost { floor: 1.0, target: 0.3 })
        }
        _ => quality(),
    })
}

const GIB: f64 = (1024 * MIB) as f64;

/// A guest that has touched so much from 16 MiB on, as `fill` says, and waits.
fn guest(touched: u64, fill: &str) -> TestVm {
    let memory = format!("size={}M,max={}M,swap=max", touched / MIB + 32, touched / MIB + 96);
    let mut vm = TestVm::builder("bench").memory(&memory).option("--oom", "deadline=60s").cmdline("shell").start();
    vm.expect("READY", 20);
    let answer = vm.command(&format!("touch 16M {touched} seed=1 {fill}"), 120);
    assert!(answer.starts_with("OK"), "{answer}");
    vm
}

/// Lowers or raises its limit: how long it took until it was in force, in nanoseconds.
fn limit(vm: &TestVm, max: u64) -> u64 {
    let begin = monotonic_ns();
    let (status, answer) = vm.patch("?mode=reclaim&wait_ms=60000", &json!({ "max_bytes": max }));
    assert_eq!(status, 200, "{answer}");
    monotonic_ns() - begin
}

fn process(bytes: u64, fill: &str) -> Process {
    Process::start(bytes, fill).expect("it could be started before")
}

/// A rate of eviction.
#[derive(Clone, Copy, Debug)]
struct Rate {
    gib_per_s: f64,
    cpu_s_per_gib: f64,
}

impl Rate {
    fn new(bytes: u64, ns: u64, cpu_ns: u64) -> Self {
        let gib = bytes as f64 / GIB;
        Self { gib_per_s: gib / (ns as f64 / 1e9), cpu_s_per_gib: cpu_ns as f64 / 1e9 / gib }
    }
}

/// R10: GiB/s of pages that are evicted, over those of the kernel. Half of each page is data, half of it zeroes.
fn throughput() -> Outcome {
    const TOUCHED: u64 = 768 * MIB;
    let ours = || {
        let vm = guest(TOUCHED, "fill=half");
        let now = vm.show();
        let (pid, evicted) = (number(&now, "pid"), number(&now, "cold.evicted_bytes"));
        let cpu = service_ns(pid);
        // What is evicted leaves half of itself in the store, which counts.
        let ns = limit(&vm, TOUCHED * 3 / 4);
        Rate::new(number(&vm.show(), "cold.evicted_bytes") - evicted, ns, service_ns(pid) - cpu)
    };
    let theirs = || {
        let process = process(TOUCHED, "fill=half");
        let (ns, cpu) = process.limit(TOUCHED / 2);
        Rate::new(process.swapped(), ns, cpu)
    };
    let runs = pairs(full(5, 11), theirs, ours);
    let of = |what: fn(&(Rate, Rate)) -> f64| median(runs.iter().map(what));
    let notes = format!(
        "gib_per_s={:.2} memcg_gib_per_s={:.2} cpu_s_per_gib={:.2} memcg_cpu_s_per_gib={:.2} ",
        of(|run| run.1.gib_per_s),
        of(|run| run.0.gib_per_s),
        of(|run| run.1.cpu_s_per_gib),
        of(|run| run.0.cpu_s_per_gib),
    );
    let values = runs.iter().map(|(theirs, ours)| ours.gib_per_s / theirs.gib_per_s).collect();
    let goal = Goal::AtLeast { floor: 0.7, target: 1.0 };
    Outcome { id: "R10", name: "evict_rate", unit: "x", goal, values, notes }
}

/// A guest of which seven eighths are evicted, because its limit was low when it touched them, and that has room now.
fn evicted(touched: u64) -> TestVm {
    let memory = format!("size={}M,max={}M,swap=max", touched / MIB + 32, touched / MIB / 8);
    let mut vm = TestVm::builder("bench").memory(&memory).option("--oom", "deadline=60s").cmdline("shell").start();
    vm.expect("READY", 20);
    let answer = vm.command(&format!("touch 16M {touched} seed=1"), 120);
    assert!(answer.starts_with("OK"), "{answer}");
    limit(&vm, touched + 96 * MIB);
    vm
}

/// R11: p50 of touching an evicted page far from the last one, over that of a first touch that a minimal handler answers
/// with one page.
fn refault() -> Outcome {
    const TOUCHED: u64 = 512 * MIB;
    // Farther apart than what is brought back together.
    let work = "latency 16M 448M stride=128K";
    let ours = || {
        let mut vm = evicted(TOUCHED);
        let now = vm.show();
        let (pid, before) = (number(&now, "pid"), number(&now, "cold.refaulted_bytes"));
        let cpu = process_ns(pid);
        let answer = vm.command(work, 60);
        let cpu_s = (process_ns(pid) - cpu) as f64 / 1e9;
        let bytes = (number(&vm.show(), "cold.refaulted_bytes") - before) as f64;
        let refaulted = bytes / 4096.0 / field(&answer, "pages");
        (field(&answer, "p50_ns"), refaulted, cpu_s / (bytes / GIB))
    };
    let bare = || field(&bare::told(Handler::Granule(1), Place::Ours, work), "p50_ns");
    let runs = pairs(full(5, 11), bare, ours);
    let notes = format!(
        "p50_us={:.1} bare_p50_us={:.1} refaulted={:.2} cpu_s_per_gib={:.2} ",
        median(runs.iter().map(|run| run.1.0)) / 1000.0,
        median(runs.iter().map(|run| run.0)) / 1000.0,
        median(runs.iter().map(|run| run.1.1)),
        median(runs.iter().map(|run| run.1.2)),
    );
    let values = runs.iter().map(|(bare, ours)| ours.0 / bare).collect();
    let goal = Goal::AtMost { floor: 1.10, target: 1.03 };
    Outcome { id: "R11", name: "refault_latency", unit: "x", goal, values, notes }
}

/// Reading so many bytes that were evicted, with all the CPU time that it took, the reader's own among it.
#[derive(Clone, Copy, Debug)]
struct Pass {
    us_per_page: f64,
    cpu_s_per_gib: f64,
}

impl Pass {
    fn new(ns: u64, cpu_ns: u64, bytes: f64) -> Self {
        Self { us_per_page: ns as f64 / 1000.0 / (bytes / 4096.0), cpu_s_per_gib: cpu_ns as f64 / 1e9 / (bytes / GIB) }
    }
}

/// R12: reading everything in order when nearly all of it is evicted, for each evicted page, over the same in a process.
fn pass() -> Outcome {
    const TOUCHED: u64 = 512 * MIB;
    let ours = || {
        let mut vm = evicted(TOUCHED);
        let now = vm.show();
        let (pid, bytes) = (number(&now, "pid"), number(&now, "memory.stat.swapped_bytes") as f64);
        let cpu = process_ns(pid);
        vm.send(&format!("mark 1; touch 16M {TOUCHED} mode=read; mark 2"));
        let begin = mark(&vm, 1);
        let ns = mark(&vm, 2) - begin;
        Pass::new(ns, process_ns(pid) - cpu, bytes)
    };
    let theirs = || {
        let mut process = process(TOUCHED, "");
        process.limit(TOUCHED / 8);
        process.limit(TOUCHED + 96 * MIB);
        let bytes = process.swapped() as f64;
        let cpu = process_ns(process.pid());
        let ns = process.pass();
        Pass::new(ns, process_ns(process.pid()) - cpu, bytes)
    };
    let runs = pairs(full(5, 11), theirs, ours);
    let notes = format!(
        "us_per_page={:.2} memcg_us_per_page={:.2} cpu_s_per_gib={:.2} memcg_cpu_s_per_gib={:.2} ",
        median(runs.iter().map(|run| run.1.us_per_page)),
        median(runs.iter().map(|run| run.0.us_per_page)),
        median(runs.iter().map(|run| run.1.cpu_s_per_gib)),
        median(runs.iter().map(|run| run.0.cpu_s_per_gib)),
    );
    let values = runs.iter().map(|(theirs, ours)| ours.us_per_page / theirs.us_per_page).collect();
    let goal = Goal::AtMost { floor: 40.0, target: 4.0 };
    Outcome { id: "R12", name: "refault_pass", unit: "x", goal, values, notes }
}

/// A limit that was lowered: how long it took until it was in force, and what gave the memory, in MiB.
#[derive(Clone, Copy, Debug)]
struct Lowered {
    ms: f64,
    cpu_s: f64,
    given: u64,
    evicted: u64,
}

/// R13 and R14: from 1 GiB to 512 MiB, until the limit is in force, over the kernel's time for a process. `helps` is what
/// the guest's driver does meanwhile.
fn lower(id: &'static str, name: &'static str, helps: &str, goal: Goal) -> Outcome {
    const TOUCHED: u64 = 1008 * MIB;
    const MAX: u64 = 512 * MIB;
    let ours = || {
        let mut vm = guest(TOUCHED, "");
        if !helps.is_empty() {
            vm.send(helps);
            wait_until("the driver is ready", 20, || (vm.show()["balloon"]["ready"] == true).then_some(()));
        }
        let before = vm.show();
        let pid = number(&before, "pid");
        let cpu = service_ns(pid);
        let ns = limit(&vm, MAX);
        let (now, cpu) = (vm.show(), service_ns(pid) - cpu);
        assert!(number(&now, "memory.current_bytes") <= MAX, "{now}");
        // What the balloon has given is what the host has discarded: the driver says so only after the last page, when the
        // limit has long been in force.
        let mib = |key: &str, unit: u64| (number(&now, key) - number(&before, key)) * unit / MIB;
        let (given, evicted) = (mib("faults.discarded_pages", 4096), mib("cold.evicted_bytes", 1));
        assert!(helps.is_empty() || given > evicted, "the guest was to help: {given} MiB given, {evicted} MiB evicted");
        Lowered { ms: ns as f64 / 1e6, cpu_s: cpu as f64 / 1e9, given, evicted }
    };
    let theirs = || {
        let (ns, cpu) = process(TOUCHED, "").limit(MAX);
        Lowered { ms: ns as f64 / 1e6, cpu_s: cpu as f64 / 1e9, given: 0, evicted: 0 }
    };
    let runs = pairs(full(5, 11), theirs, ours);
    let per_gib = GIB / (TOUCHED - MAX) as f64;
    let of = |what: fn(&(Lowered, Lowered)) -> f64| median(runs.iter().map(what));
    let notes = format!(
        "ms={:.0} memcg_ms={:.0} cpu_s_per_gib={:.3} memcg_cpu_s_per_gib={:.3} balloon_mib={:.0} evicted_mib={:.0} ",
        of(|run| run.1.ms),
        of(|run| run.0.ms),
        of(|run| run.1.cpu_s) * per_gib,
        of(|run| run.0.cpu_s) * per_gib,
        of(|run| run.1.given as f64),
        of(|run| run.1.evicted as f64),
    );
    let values = runs.iter().map(|(theirs, ours)| ours.ms / theirs.ms).collect();
    Outcome { id, name, unit: "x", goal, values, notes }
}

/// What one run with too little memory came to.
#[derive(Clone, Copy, Debug)]
struct Misses {
    refaults: f64,
    evicted: f64,
    /// Pages that were resident at the end.
    resident: f64,
    /// Times that the kernel found nothing to take.
    rescues: u64,
}

/// The trace of R23: pages, all of them touched once, and accesses of each of its two parts. In the first it gets used to
/// its room, the second is counted.
const PAGES: u64 = 256 * MIB / 4096;
const ACCESSES: u64 = 1_000_000;

/// R23: refaults for each evicted page when 75 % of what is used fits, over those of the kernel for the same accesses.
/// Refaults of the two, and of one who knows the future, for 1000 accesses are printed too.
fn quality() -> Outcome {
    let room = PAGES * 3 / 4 * 4096;
    let ours = || {
        let mut vm = TestVm::builder("bench").memory("size=320M,max=512M,swap=max").cmdline("shell").start();
        vm.expect("READY", 20);
        let access = |vm: &mut TestVm, seed: u64| {
            let bytes = PAGES * 4096;
            let answer = vm.command(&format!("access zipf 16M {bytes} periods=1 each={ACCESSES} seed={seed}"), 300);
            assert!(answer.starts_with("OK"), "{answer}");
        };
        // All that is charged beside the pages is beside the room; so is what the store will need.
        let now = vm.show();
        let beside = number(&now, "memory.current_bytes") - number(&now, "memory.stat.guest_bytes") + 2 * MIB;
        limit(&vm, room + beside);
        assert!(vm.command(&format!("touch 16M {} seed=1", PAGES * 4096), 60).starts_with("OK"));
        access(&mut vm, 1);
        let before = vm.show();
        access(&mut vm, 2);
        let after = vm.show();
        let grown = |key: &str| (number(&after, key) - number(&before, key)) as f64 / 4096.0;
        Misses {
            refaults: grown("cold.refaulted_bytes"),
            evicted: grown("cold.evicted_bytes"),
            resident: number(&after, "memory.stat.guest_bytes") as f64 / 4096.0,
            rescues: 0,
        }
    };
    let theirs = || {
        let mut process = process(PAGES * 4096, "");
        process.limit(room);
        process.access(ACCESSES, 1, room);
        let (faults, out) = (process.stat("pgmajfault"), swapped_out());
        let rescues = process.access(ACCESSES, 2, room);
        Misses {
            rescues,
            refaults: (process.stat("pgmajfault") - faults) as f64,
            evicted: (swapped_out() - out) as f64,
            resident: process.stat("rss") as f64 / 4096.0,
        }
    };
    let runs = pairs(full(3, 7), theirs, ours);
    let thousand = |refaults: f64| refaults * 1000.0 / ACCESSES as f64;
    let of = |what: &dyn Fn(&(Misses, Misses)) -> f64| median(runs.iter().map(what));
    let notes = format!(
        "refaults_per_1000={:.2} memcg_refaults_per_1000={:.2} belady_per_1000={:.2} per_evicted={:.3} \
         memcg_per_evicted={:.3} resident={:.0} memcg_resident={:.0} memcg_stuck={} ",
        thousand(of(&|run| run.1.refaults)),
        thousand(of(&|run| run.0.refaults)),
        thousand(belady(PAGES * 3 / 4)),
        of(&|run| run.1.refaults / run.1.evicted),
        of(&|run| run.0.refaults / run.0.evicted),
        of(&|run| run.1.resident),
        of(&|run| run.0.resident),
        of(&|run| run.0.rescues as f64),
    );
    let per_evicted = |misses: &Misses| misses.refaults / misses.evicted;
    let values = runs.iter().map(|(theirs, ours)| per_evicted(ours) / per_evicted(theirs)).collect();
    let goal = Goal::AtMost { floor: 1.5, target: 1.1 };
    Outcome { id: "R23", name: "reclaim_quality", unit: "x", goal, values, notes }
}

/// Refaults of the second part of the trace with room for so many pages, for one who always evicts the page that is used
/// again last.
fn belady(room: u64) -> f64 {
    let part = |seed| Access::new(Pattern::Zipf, PAGES, PAGES, false, seed).take(ACCESSES as usize);
    let trace: Vec<u64> = part(1).chain(part(2)).collect();
    let mut again = vec![usize::MAX; trace.len()];
    let mut next = HashMap::new();
    for (i, page) in trace.iter().enumerate().rev() {
        again[i] = next.insert(*page, i).unwrap_or(usize::MAX);
    }
    // Resident pages by their next use; at first the ones used soonest of all, which all were resident.
    let mut first: Vec<(usize, u64)> =
        (0..PAGES).map(|page| (next.get(&page).copied().unwrap_or(usize::MAX), page)).collect();
    first.sort_unstable();
    let mut resident: BTreeSet<(usize, u64)> = first.into_iter().take(room as usize).collect();
    let mut refaults = 0;
    for (i, page) in trace.iter().enumerate() {
        if !resident.remove(&(i, *page)) {
            resident.pop_last();
            refaults += u64::from(i >= trace.len() / 2);
        }
        resident.insert((again[i], *page));
    }
    refaults as f64
}

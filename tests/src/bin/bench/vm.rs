//! A VM of the real program for one run, and the time between its payload's marks.

use ballast_tests::{TestVm, number};
use serde_json::Value;

/// One run of the payload between its two marks.
pub struct Run {
    /// Time between the marks.
    pub ns: u64,
    /// CPU time of the worker from its start to the second mark, the guest's own among it.
    pub cpu_ms: u64,
    /// The same between the marks, in nanoseconds.
    pub cpu_ns: u64,
    /// The fault counters at the end.
    pub faults: Value,
}

/// Starts a VM, lets it do `work` between two marks, and reads the fault counters at the end. One that is charged may use
/// huge pages: it decides itself what of its memory becomes resident.
pub fn run(memory: &str, cpus: u32, work: &str) -> Run {
    let charged = memory.contains("max=") || memory.contains("track=on");
    huge_pages(charged);
    let run = run_as_it_is(memory, cpus, work);
    huge_pages(false);
    run
}

/// Allows huge pages to this process and what it starts from now on, or forbids them.
pub fn huge_pages(allowed: bool) {
    // SAFETY: this prctl takes numbers only.
    unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, libc::c_ulong::from(!allowed), 0, 0, 0) };
}

fn run_as_it_is(memory: &str, cpus: u32, work: &str) -> Run {
    let mut vm = TestVm::builder("bench")
        .memory(memory)
        .option("--cpus", cpus.to_string())
        .cmdline(&format!("mark 1; {work}; mark 2; shell"))
        .start();
    let begin = mark(&vm, 1);
    // Nobody is asked for it: the worker has other things to do.
    let cpu = process_ns(child_of(vm.pid()));
    let end = mark(&vm, 2);
    let now = vm.show();
    let cpu_ns = process_ns(number(&now, "pid")) - cpu;
    let cpu_ms = cpu_ms(number(&now, "pid"));
    vm.send("exit 0");
    vm.wait(20);
    Run { ns: end - begin, cpu_ms, cpu_ns, faults: now["faults"].clone() }
}

/// Waits for mark `n` of a guest: when it was, on the host's monotonic clock.
pub fn mark(vm: &TestVm, n: u64) -> u64 {
    let line = vm.expect(&format!("MARK {n} "), 120);
    line.split_whitespace().nth(2).and_then(|ns| ns.parse().ok()).expect("a mark has its time")
}

/// A number out of a payload's answer, `key=` before it.
pub fn field(answer: &str, key: &str) -> f64 {
    let value = answer.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {key} in `{answer}`"))
}

/// The only process that another one has started.
fn child_of(pid: u32) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("children")).ok();
    let all: String = threads.filter_map(children).collect();
    all.split_whitespace().next().and_then(|pid| pid.parse().ok()).expect("a worker runs")
}

/// CPU time of a process so far, user and system, in milliseconds.
pub fn cpu_ms(pid: u64) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
    let ticks: u64 = [11, 12].iter().filter_map(|i| fields.get(*i)?.parse::<u64>().ok()).sum();
    ticks * 10
}

/// CPU time so far of a worker's threads that are no vCPUs, in nanoseconds.
pub fn service_ns(pid: u64) -> u64 {
    threads_ns(pid, |name| !name.starts_with("vcpu"))
}

/// CPU time so far of all threads of a process that have not ended, in nanoseconds.
pub fn process_ns(pid: u64) -> u64 {
    threads_ns(pid, |_| true)
}

fn threads_ns(pid: u64, which: impl Fn(&str) -> bool) -> u64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let ns = |thread: std::fs::DirEntry| -> Option<u64> {
        let name = std::fs::read_to_string(thread.path().join("comm")).ok()?;
        let times = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        times.split_whitespace().next()?.parse().ok().filter(|_| which(&name))
    };
    threads.filter_map(ns).sum()
}

//! A guest that touches all it has as fast as it can while its limit changes under it; and one that ends while it is
//! asked about.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use ballast_tests::{TestVm, http, number, resident_pages};
use serde_json::{Value, json};

use super::{MIB, skipped};

/// Resident anonymous memory of a process as another process sees it, in bytes.
fn rss_anon(pid: u64) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) * 1024
}

/// Checks one moment: usage, residency and the process against the limit in force.
fn check(now: &Value, highest_max: u64, at: &str) {
    let usage = number(now, "memory.current_bytes");
    let max = number(now, "memory.max_bytes");
    assert!(usage <= max, "{at}: usage {usage} above max {max}: {now}");
    // Residency is read a moment later than the snapshot, when the limit may have changed: the highest one bounds it.
    assert!(resident_pages(now) * 4096 <= highest_max, "{at}: resident above the highest limit {highest_max}");
    assert!(rss_anon(number(now, "pid")) <= highest_max, "{at}: the process holds more than its limit");
}

fn storm(cpus: u32) {
    let name = format!("storm{cpus}");
    if skipped(&name) {
        return;
    }
    let vm = TestVm::builder(&name)
        .memory("size=512M,max=48M")
        .option("--cpus", cpus.to_string())
        .option("--oom", "action=pause,deadline=60s")
        .cmdline("storm")
        .start();
    vm.wait_state("running", 10);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Another process's view, all the time.
        let (socket, path) = (vm.socket(), format!("/vms/{name}"));
        let done = &done;
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let (status, body) = http(socket, "GET", &path, None).expect("the socket answers");
                assert_eq!(status, 200, "{body}");
                check(&serde_json::from_str(&body).expect("JSON"), 200 * MIB, "watcher");
            }
        });
        let mut max = 48 * MIB;
        for i in 0..200u64 {
            let start = Instant::now();
            // Up by a megabyte most of the time, and down below usage, which a storm never gives back.
            let (query, wanted) = match i % 4 {
                0 | 2 => ("?mode=refuse", max + MIB),
                1 => ("?mode=refuse", max - 8 * MIB),
                _ => ("?mode=reclaim&wait_ms=20", max - 8 * MIB),
            };
            let (status, body) = vm.patch(query, &json!({ "max_bytes": wanted }));
            assert!([200, 202, 409].contains(&status), "change {i}: {status} {body}");
            if status == 200 {
                max = wanted;
            }
            check(&vm.show(), 200 * MIB, &format!("change {i} after {:?}", start.elapsed()));
        }
        done.store(true, Ordering::Relaxed);
    });
    let now = vm.show();
    let worst = number(&now, "faults.answer.max_us");
    assert!(worst < 100_000, "a fault waited {worst} us");
    for event in vm.events() {
        if let (Some(usage), Some(max)) = (event["usage_bytes"].as_u64(), event["max_bytes"].as_u64()) {
            assert!(usage <= max, "{event}");
        }
    }
    assert_eq!(number(&now, "memory.stat.overcharge_bytes"), 0);
}

/// Semantics: 1, 46, 118, B83.
#[test]
fn usage_never_exceeds_the_limit_with_one_vcpu() {
    storm(1);
}

/// Semantics: 1, 118.
#[test]
fn usage_never_exceeds_the_limit_with_two_vcpus() {
    storm(2);
}

#[test]
fn an_exit_status_survives_a_client_that_keeps_asking() {
    if skipped("an_exit_status_survives") {
        return;
    }
    for round in 0..10 {
        let mut vm = TestVm::builder("asked").memory("size=64M,max=32M").cmdline("exit 7").start();
        let socket = vm.socket().to_owned();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                // Queries that the worker has not read when it ends.
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let _ = http(&socket, "GET", "/vms/asked", None);
                    }
                });
            }
            // The clients must end with this test also when it fails: the scope waits for them.
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| vm.wait(10)));
            done.store(true, Ordering::Relaxed);
            let status = ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            assert_eq!(status.code(), Some(7), "round {round}");
        });
    }
}

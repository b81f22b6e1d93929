//! Memory that a guest does not give is taken: cold pages are moved aside, compressed, and brought back.
//!
//! The payload has no balloon here, so nothing but eviction can make room for it.

use ballast_tests::walk::exact;
use ballast_tests::{PAGE, TestVm, missing_on_host, number, wait_until};
use serde_json::json;

const MIB: u64 = 1 << 20;

fn skipped(test: &str) -> bool {
    missing_on_host().inspect(|reason| println!("SKIP {test} reason={reason}")).is_some()
}

/// Types a command that must succeed.
fn ok(vm: &mut TestVm, command: &str) {
    let answer = vm.command(command, 60);
    assert!(answer.starts_with("OK"), "{command}: {answer}");
}

fn shell(name: &str, memory: &str, cpus: &str) -> TestVm {
    let vm = TestVm::builder(name).memory(memory).option("--cpus", cpus).cmdline("shell").start();
    vm.expect("READY", 10);
    vm
}

/// A guest with twice as much as its limit loses nothing and is never stopped by its policy.
/// Semantics: 24, 27.
#[test]
fn a_guest_uses_twice_its_limit_and_finds_every_byte() {
    if skipped("cold-twice") {
        return;
    }
    let mut vm = shell("twice", "size=256M,max=64M,swap=max", "1");
    ok(&mut vm, "touch 16M 128M seed=7");
    let full = exact(&vm);
    assert!(number(&full, "swap.current_bytes") >= 60 * MIB, "{full}");
    assert!(number(&full, "memory.stat.store_bytes") > 0, "{full}");
    let (status, report) = vm.http("GET", "/check", None);
    assert!(status == 200 && report.contains(r#""ok":true"#) && !report.contains(r#""ok":false"#), "{report}");
    ok(&mut vm, "verify 16M 128M seed=7");
    ok(&mut vm, "hot 16M 128M passes=2");
    let end = exact(&vm);
    assert_eq!((&end["state"], number(&end, "memory.events.oom")), (&json!("running"), 0), "{end}");
}

/// The truth in the last line that a payload has printed about a period: pages used in it and in the one before.
fn truth(vm: &TestVm) -> u64 {
    let line = vm.expect("ACCESS ", 60);
    let two = line.split_whitespace().find_map(|word| word.strip_prefix("two=")).expect("it counts");
    two.parse().expect("a number")
}

/// Of a guest that uses a quarter of what it has, a sample finds that quarter, and nothing is taken from it.
#[test]
fn the_working_set_is_found_from_a_sample() {
    if skipped("cold-working-set") {
        return;
    }
    let mut vm = shell("working", "size=256M,max=256M,swap=max,ageing=2s", "1");
    ok(&mut vm, "touch 16M 160M seed=3");
    vm.send("access hot 16M 160M hot=40M period=2000");
    let (estimate, error, two) = wait_until("the estimate fits the truth", 60, || {
        let two = truth(&vm) * PAGE;
        let now = vm.show();
        let set = now["cold"]["working_set_bytes"].as_u64()?;
        let error = number(&now, "cold.working_set_error_bytes");
        (set.abs_diff(two) * 10 < two).then_some((set, error, two))
    });
    assert!(error < estimate / 4, "{estimate} ± {error}, it is {two}");
    let now = vm.show();
    assert_eq!(number(&now, "swap.current_bytes"), 0, "{now}");
}

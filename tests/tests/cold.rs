//! Memory that a guest does not give is taken: cold pages are moved aside, compressed, and brought back.
//!
//! The payload has no balloon here, so nothing but eviction can make room for it.

use ballast_tests::walk::exact;
use ballast_tests::{PAGE, TestVm, number, skipped, swap_or_skip, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

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

/// What does not shrink is taken too, where there is a file for it: nothing of it is left in memory, and every byte comes
/// back. The file has no name, and is gone with the VM.
#[test]
fn pages_that_do_not_shrink_go_to_a_file_and_come_back() {
    let Some(directory) = swap_or_skip("cold-file") else { return };
    let vm = TestVm::builder("file").memory("size=256M,max=64M,swap=max").option("--cpus", "2").cmdline("shell");
    let mut vm = vm.option("--swap-dir", directory.path().to_string_lossy()).start();
    vm.expect("READY", 10);
    ok(&mut vm, "touch 16M 128M seed=7 fill=full");
    let full = exact(&vm);
    assert!(number(&full, "cold.file_bytes") >= 70 * MIB, "{full}");
    // All but the payload's own few pages, which shrink.
    assert!(number(&full, "swap.current_bytes") < number(&full, "cold.file_bytes") + MIB, "{full}");
    assert!(number(&full, "memory.stat.store_bytes") < MIB / 4, "{full}");
    ok(&mut vm, "verify 16M 128M seed=7 fill=full");
    // What is written anew has another content, and perhaps an old slot.
    ok(&mut vm, "touch 48M 32M seed=8 fill=full");
    ok(&mut vm, "verify 48M 32M seed=8 fill=full");
    ok(&mut vm, "verify 16M 32M seed=7 fill=full");
    let end = exact(&vm);
    assert!(number(&end, "cold.fetched_bytes") >= 64 * MIB, "{end}");
    let still = (&end["state"], number(&end, "memory.events.oom"), number(&end, "cold.failed_writes"));
    assert_eq!(still, (&json!("running"), 0, 0), "{end}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "the file has a name");
}

/// A store that was filled under a higher limit does not keep a lower one from being reached: what of it is too much moves
/// to the file, and all of it that has to where the store may be as large as the VM.
/// Semantics: 24, 118.
#[test]
fn a_store_that_is_too_large_for_a_lower_limit_moves_to_the_file() {
    let Some(directory) = swap_or_skip("cold-store-file") else { return };
    for (fill, store) in [("half", ""), ("half", ",store=128M"), ("full", "")] {
        let vm = TestVm::builder("lowered").memory(&format!("size=128M,max=64M,swap=max{store}")).cmdline("shell");
        let mut vm = vm.option("--swap-dir", directory.path().to_string_lossy()).start();
        vm.expect("READY", 10);
        ok(&mut vm, &format!("touch 16M 88M seed=7 fill={fill}"));
        for max in [48 * MIB, 32 * MIB] {
            let (status, body) = vm.patch("?mode=reclaim&wait_ms=20000", &json!({ "max_bytes": max }));
            assert_eq!(status, 200, "{fill}{store} to {max}: {body}");
            let now = exact(&vm);
            assert!(number(&now, "memory.current_bytes") <= max, "{fill}{store}: {now}");
            let share = if store.is_empty() { max / 2 } else { max };
            assert!(number(&now, "memory.stat.store_bytes") <= share, "{fill}{store}: {now}");
        }
        let (status, report) = vm.http("GET", "/check", None);
        assert!(status == 200 && !report.contains(r#""ok":false"#), "{fill}{store}: {report}");
        ok(&mut vm, &format!("verify 16M 8M seed=7 fill={fill}"));
        // A guest that is left hardly a page of its own is slow.
        let (status, body) = vm.patch("", &json!({ "max_bytes": null }));
        assert_eq!(status, 200, "{body}");
        ok(&mut vm, &format!("verify 16M 88M seed=7 fill={fill}"));
        let end = exact(&vm);
        let still = (&end["state"], number(&end, "memory.events.oom"), number(&end, "cold.failed_writes"));
        assert_eq!(still, (&json!("running"), 0, 0), "{fill}{store}: {end}");
    }
}

/// A store takes no more memory than its own limit says, and the guest is held. It goes on when the store may be larger.
#[test]
fn a_store_has_a_limit_of_its_own() {
    if skipped("cold-store") {
        return;
    }
    let memory = "size=256M,max=64M,swap=max,store=256K";
    let mut vm = TestVm::builder("store").memory(memory).option("--oom", "deadline=120s").cmdline("shell").start();
    vm.expect("READY", 10);
    vm.send("touch 16M 128M seed=7");
    // It is held before too, for moments, on a busy host.
    let full = |now: &Value| now["held"]["now"] == true && number(now, "memory.stat.store_bytes") > 0;
    let held = wait_until("the guest is held with a store", 20, || Some(vm.show()).filter(full));
    assert_eq!(number(&held, "memory.store_max_bytes"), MIB / 4);
    assert!(number(&held, "memory.stat.store_bytes") <= MIB / 4, "{held}");
    let (status, body) = vm.patch("", &json!({ "store_max_bytes": null }));
    assert_eq!((status, &body["memory"]["store_max_bytes"]), (200, &json!(null)), "{body}");
    vm.expect("OK touch", 60);
    ok(&mut vm, "verify 16M 128M seed=7");
    assert!(number(&exact(&vm), "memory.stat.store_bytes") > MIB / 4);
}

/// Least share of a minute that is worth an alert, in per cent: docs/operations.md has it.
const ALERT: f64 = 5.0;

/// A guest that uses more than its limit waits for its pages again and again, and that is pressure; one whose working set
/// fits has none.
#[test]
fn a_guest_whose_working_set_does_not_fit_has_pressure() {
    if skipped("cold-pressure") {
        return;
    }
    let guest = |name: &str, hot: &str| {
        let mut vm = shell(name, "size=256M,max=80M,swap=max,ageing=off", "1");
        ok(&mut vm, "touch 16M 120M seed=3");
        vm.send(&format!("access hot 16M 120M hot={hot} period=1000"));
        vm.expect("ACCESS n=3 ", 60);
        vm
    };
    let some = |vm: &TestVm| vm.show()["pressure"]["some"].clone();
    let tight = guest("tight", "100M");
    let share =
        wait_until("it has pressure", 30, || some(&tight)["avg10"].as_f64().filter(|share| *share > 3.0 * ALERT));
    assert!(share <= 100.0);
    drop(tight);
    let fitting = guest("fitting", "20M");
    wait_until("it has none", 60, || some(&fitting)["avg10"].as_f64().filter(|share| *share < ALERT / 5.0));
}

/// Generations of the guests here, and the periods after which they say what they have used, in seconds.
const PERIOD_S: u64 = 3;

/// Lets a guest touch 160 MiB and then access them by a pattern.
fn accesses(name: &str, pattern: &str) -> TestVm {
    let mut vm = shell(name, &format!("size=256M,max=256M,swap=max,ageing={PERIOD_S}s"), "1");
    ok(&mut vm, "touch 16M 160M seed=3");
    vm.send(&format!("access {pattern} period={PERIOD_S}000"));
    vm
}

/// The truth in the next line that a payload prints about a period: bytes used in it and in the one before.
fn truth(vm: &TestVm) -> u64 {
    let line = vm.expect("ACCESS ", 60);
    let two = line.split_whitespace().find_map(|word| word.strip_prefix("two=")).expect("it counts");
    two.parse::<u64>().expect("a number") * PAGE
}

/// What a sample says that a guest uses, and how far off that may be. The first one is there after two periods.
fn estimate(vm: &TestVm) -> Option<(u64, u64)> {
    let cold = vm.show()["cold"].clone();
    Some((cold["working_set_bytes"].as_u64()?, cold["working_set_error_bytes"].as_u64()?))
}

/// Whether it is within a tenth of the truth, and says so.
fn fits((set, error): (u64, u64), two: u64) -> bool {
    set.abs_diff(two) * 10 <= two && error < two / 2
}

/// Waits for the first estimate: it, or one of the next two, is within a tenth of the truth.
fn found(vm: &TestVm) {
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let two = truth(vm);
        seen.extend(estimate(vm).map(|estimate| (estimate, two)));
        if seen.last().is_some_and(|(estimate, two)| fits(*estimate, *two)) {
            return;
        }
    }
    panic!("((estimate, error), truth): {seen:?}");
}

/// Of a guest that uses a quarter of what it has, a sample finds that quarter, and nothing is taken from it.
#[test]
fn the_working_set_is_found_from_a_sample() {
    if skipped("cold-working-set") {
        return;
    }
    let vm = accesses("working", "hot 16M 160M hot=40M");
    found(&vm);
    let now = vm.show();
    assert_eq!(number(&now, "swap.current_bytes"), 0, "{now}");
}

/// Popularity by Zipf's law: what is used now and then is used.
#[test]
fn the_working_set_of_a_zipf_guest_is_found() {
    if skipped("cold-zipf") {
        return;
    }
    found(&accesses("zipf", "zipf 16M 160M hot=40M"));
}

/// A sequential scan uses all of its memory, again and again.
#[test]
fn the_working_set_of_a_scan_is_all_of_it() {
    if skipped("cold-scan") {
        return;
    }
    found(&accesses("scan", "scan 16M 160M"));
}

/// A guest that turns to other memory uses both for a moment; two generations later only the new one.
#[test]
fn the_working_set_follows_a_change_of_phase() {
    if skipped("cold-phase") {
        return;
    }
    let vm = accesses("phase", "phase 16M 160M hot=40M moves=5");
    // The first change comes after five periods, and the next after five more.
    let lines: Vec<_> = (0..10).map(|_| (truth(&vm), estimate(&vm))).collect();
    let fitting = |lines: &[(u64, Option<(u64, u64)>)]| {
        lines.iter().filter(|(two, estimate)| estimate.is_some_and(|estimate| fits(estimate, *two))).count()
    };
    assert_eq!(lines[9].0, 40 * MIB, "two periods that are alike");
    assert!(fitting(&lines[3..5]) > 0 && fitting(&lines[8..]) > 0, "(truth, (estimate, error)): {lines:?}");
}

/// A guest that does nothing uses nothing, however seldom it is looked at.
#[test]
fn an_idle_guest_has_no_working_set() {
    if skipped("cold-idle") {
        return;
    }
    let vm = accesses("idle", "idle 16M 160M");
    let (set, error) = wait_until("an estimate", 60, || estimate(&vm));
    // The payload itself runs in one block of 2 MiB or two, and such a block is used as a whole.
    assert!(set <= 5 * MIB && error < 16 * MIB, "{set} ± {error}");
}

/// What is evicted and comes back does not count twice, nor what was evicted while the sample was drawn: the estimate
/// stays with the truth while proactive reclaim takes what the guest does not use.
#[test]
fn the_working_set_is_found_while_memory_is_evicted() {
    if skipped("cold-proactive") {
        return;
    }
    let mut vm = shell("proactive", "size=512M,max=400M,swap=max,ageing=2s,proactive=on", "1");
    ok(&mut vm, "touch 16M 256M seed=3");
    vm.send("access hot 16M 128M hot=64M period=2000");
    let mut seen = Vec::new();
    while seen.len() < 12 {
        let two = truth(&vm);
        let swap = number(&vm.show(), "swap.current_bytes");
        seen.push((estimate(&vm), two, swap));
    }
    let far = |((set, error), two): ((u64, u64), u64)| set.abs_diff(two) > error.max(two * 15 / 100);
    let wrong = |seen: &&(Option<(u64, u64)>, u64, u64)| seen.0.is_some_and(|estimate| far((estimate, seen.1)));
    // One in twenty may be, and the first ones saw the guest before it did this.
    let (all, wrong) = (seen.iter().filter(|seen| seen.0.is_some()).count(), seen[3..].iter().filter(wrong).count());
    assert!(all >= 6 && wrong <= 1, "((estimate, error), truth, swap): {seen:?}");
    assert!(seen[11].2 > 100 * MIB, "{seen:?}");
}

/// A guest that uses more than it has evicts and refaults all the time, so there is always memory to be found: its working
/// set is estimated all the same, anew in each period.
#[test]
fn the_working_set_of_a_guest_that_thrashes_is_found() {
    if skipped("cold-thrashing") {
        return;
    }
    let mut vm = shell("thrashing", "size=256M,max=48M,swap=max,ageing=2s", "1");
    ok(&mut vm, "touch 16M 160M seed=3");
    vm.send("access scan 16M 160M period=2000");
    let seen: Vec<_> = (0..8).map(|_| (truth(&vm), estimate(&vm))).collect();
    let known: Vec<_> = seen[4..].iter().filter_map(|(two, estimate)| Some((*two, (*estimate)?))).collect();
    assert_eq!(known.len(), 4, "(truth, (estimate, error)): {seen:?}");
    // An old one is worth less each period.
    assert!(known.iter().all(|(two, (_, error))| error < &(two / 4)), "{seen:?}");
    let near = |(two, (set, error)): &&(u64, (u64, u64))| set.abs_diff(*two) <= (two / 2).max(*error);
    assert!(known.iter().filter(near).count() >= 3, "(truth, (estimate, error)): {seen:?}");
}

/// That nothing could be evicted before is forgotten when somebody allows it.
#[test]
fn memory_is_reclaimed_after_a_request_that_got_nothing() {
    if skipped("cold-again") {
        return;
    }
    let mut vm = shell("again", "size=256M,max=200M,swap=0", "1");
    ok(&mut vm, "touch 16M 96M seed=5");
    let reclaim = |bytes: u64| {
        let (status, body) = vm.post(&format!("reclaim?bytes={bytes}"));
        assert!(matches!(status, 200 | 202), "{body}");
        number(&body, "reclaimed_bytes")
    };
    assert!(reclaim(64 * MIB) < 64 * MIB, "there is nowhere to go");
    let (status, body) = vm.patch("", &json!({ "swap_max_bytes": null }));
    assert_eq!(status, 200, "{body}");
    assert_eq!(reclaim(48 * MIB), 48 * MIB);
}

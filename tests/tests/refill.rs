//! A guest that was emptied while it stood still gets what it used last back before it asks.

use ballast_tests::walk::exact;
use ballast_tests::{TestVm, number, skipped, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Types a command that must succeed.
fn ok(vm: &mut TestVm, command: &str) {
    let answer = vm.command(command, 60);
    assert!(answer.starts_with("OK"), "{command}: {answer}");
}

fn post(vm: &TestVm, verb: &str) {
    let (status, body) = vm.post(verb);
    assert_eq!(status, 200, "{verb}: {body}");
}

/// Evicts all that a paused guest has.
fn empty(vm: &TestVm) {
    let guest = || number(&vm.show(), "memory.stat.guest_bytes");
    wait_until("nothing is left of it", 60, || {
        let (status, body) = vm.post(&format!("reclaim?bytes={}", 256 * MIB));
        assert!(status == 200 || status == 202, "{status}: {body}");
        (guest() < MIB / 4).then_some(())
    });
}

/// While a guest walks through its memory it gets it from both ends at once: by its touches, and ahead of them. Every byte is
/// there, and the account is exact.
/// Semantics: 24, 27.
#[test]
fn what_comes_back_ahead_of_the_guest_is_what_it_had() {
    if skipped("refill-contents") {
        return;
    }
    let vm = TestVm::builder("ahead").memory("size=256M,max=192M,swap=max,ageing=off").option("--cpus", "2");
    let mut vm = vm.cmdline("shell").start();
    vm.expect("READY", 10);
    ok(&mut vm, "touch 16M 96M seed=7 fill=mixed");
    ok(&mut vm, "touch 128M 16M seed=8 fill=same");
    for round in 0..4 {
        post(&vm, "pause");
        empty(&vm);
        let before = exact(&vm);
        assert_eq!(before["state"], "paused", "{before}");
        post(&vm, "resume");
        // The second time it writes, too.
        match round {
            1 => ok(&mut vm, "touch 16M 96M seed=9 fill=mixed"),
            2 => ok(&mut vm, "verify 16M 96M seed=9 fill=mixed"),
            _ => ok(&mut vm, "verify 128M 16M seed=8 fill=same"),
        }
        let ahead = |now: &Value| number(now, "cold.read_ahead_bytes") > number(&before, "cold.read_ahead_bytes");
        wait_until("something came back ahead", 10, || Some(vm.show()).filter(ahead));
    }
    wait_until("all of it is back", 20, || (number(&vm.show(), "swap.current_bytes") == 0).then_some(()));
    ok(&mut vm, "verify 16M 96M seed=9 fill=mixed");
    let end = exact(&vm);
    assert_eq!((&end["state"], number(&end, "memory.events.oom")), (&json!("running"), 0), "{end}");
    let (status, report) = vm.http("GET", "/check", None);
    assert!(status == 200 && !report.contains(r#""ok":false"#), "{report}");
}

/// A guest whose working set is known gets about as much back as that, the part that it uses, and not what it has left alone.
#[test]
fn the_working_set_comes_back_and_what_is_cold_does_not() {
    if skipped("refill-working-set") {
        return;
    }
    let mut vm = TestVm::builder("hot").memory("size=256M,max=240M,swap=max,ageing=1s").cmdline("shell").start();
    vm.expect("READY", 10);
    ok(&mut vm, "touch 16M 160M seed=7");
    vm.send("access hot 144M 32M hot=32M period=1000");
    let known = |now: &Value| {
        let set = now["cold"]["working_set_bytes"].as_u64().filter(|set| *set < 64 * MIB);
        set.is_some_and(|set| set > 16 * MIB)
    };
    wait_until("its working set is known", 60, || Some(vm.show()).filter(known));
    post(&vm, "pause");
    let set = number(&vm.show(), "cold.working_set_bytes");
    empty(&vm);
    let before = vm.show();
    post(&vm, "resume");
    let came = |key: &str, now: &Value| number(now, key) - number(&before, key);
    let after = wait_until("it has its memory back", 20, || {
        Some(vm.show()).filter(|now| number(now, "memory.stat.guest_bytes") > set / 4 * 3)
    });
    vm.expect("ACCESS", 60);
    vm.expect("ACCESS", 60);
    let later = vm.show();
    let (ahead, touched) = (came("cold.read_ahead_bytes", &later), came("cold.refaulted_bytes", &later));
    assert!(ahead <= set + MIB, "{ahead} of {set}");
    assert!(ahead >= 2 * touched, "{ahead} ahead, {touched} by touches: {after}");
    assert!(number(&later, "swap.current_bytes") >= 100 * MIB, "what is cold stays where it is: {later}");
}

/// What comes back ahead of need is nobody else's: with little room left under the limit it ends, and nothing is evicted for it.
#[test]
fn where_there_is_no_room_nothing_comes_back_ahead() {
    if skipped("refill-room") {
        return;
    }
    let mut vm = TestVm::builder("tight").memory("size=256M,max=192M,swap=max,ageing=off").cmdline("shell").start();
    vm.expect("READY", 10);
    ok(&mut vm, "touch 16M 128M seed=7");
    post(&vm, "pause");
    empty(&vm);
    let (status, body) = vm.patch("", &json!({ "max_bytes": 96 * MIB }));
    assert_eq!(status, 200, "{body}");
    let before = vm.show();
    post(&vm, "resume");
    let some = |now: &Value| number(now, "memory.current_bytes") > 88 * MIB;
    wait_until("the room is used", 20, || Some(vm.show()).filter(some));
    ok(&mut vm, "wait 1000");
    let now = exact(&vm);
    assert_eq!(number(&now, "cold.evicted_bytes"), number(&before, "cold.evicted_bytes"), "{now}");
    ok(&mut vm, "verify 16M 128M seed=7");
}

//! The first limit of a VM that was started without one: from that moment its charges are its resident pages, exactly, and
//! the limit holds.

use std::time::Instant;

use ballast_tests::{TestVm, deadline, http, number, resident_pages, skip, skipped, wait_until, written_pages};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A VM without a limit whose guest takes commands.
fn unlimited(name: &str, size: &str) -> TestVm {
    let vm = TestVm::builder(name).memory(&format!("size={size}")).cmdline("shell").start();
    vm.expect("READY", 10);
    vm
}

/// The VM as it is shown, after checking that what is charged is what the host's page tables hold, and that nothing but
/// that, the store, the stock and the reserve is charged.
fn exact(vm: &TestVm) -> Value {
    // A guest that has just gone on may touch a page between two looks: what counts is a moment in which it did not.
    let (now, resident) = wait_until("the guest is at rest", 10, || {
        let (before, resident) = (vm.show(), resident_pages(&vm.show()));
        let after = vm.show();
        let moved = |now: &Value| [&now["faults"]["events"], &now["cold"], &now["memory"]["stat"]].map(Value::clone);
        (moved(&before) == moved(&after)).then_some((after, resident))
    });
    assert_eq!(now["accounting"], json!(true), "{now}");
    assert_eq!(number(&now, "memory.stat.guest_bytes"), resident * 4096, "{now}");
    let parts = ["guest_bytes", "store_bytes", "stock_bytes", "reserve_bytes"];
    let parts: u64 = parts.iter().map(|part| number(&now, &format!("memory.stat.{part}"))).sum();
    assert_eq!(number(&now, "memory.current_bytes"), parts + number(&now, "vmm.current_bytes"), "{now}");
    now
}

/// Waits until the guest is held with all of its limit in use; that is exact too.
fn held_at_its_limit(vm: &TestVm) {
    let used_up =
        |now: &Value| now["held"]["now"] == true && now["memory"]["current_bytes"] == now["memory"]["max_bytes"];
    wait_until("the guest is held", 20, || vm.try_show().filter(used_up));
    exact(vm);
}

/// Whether the worker of a VM has a userfaultfd, and whether it has a fault thread.
fn equipment(vm: &TestVm) -> (bool, bool) {
    let pid = number(&vm.show(), "pid");
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("the worker's descriptors");
    let links: Vec<_> = links.filter_map(|e| std::fs::read_link(e.ok()?.path()).ok()).collect();
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the worker's threads");
    let names: Vec<_> = threads.filter_map(|t| std::fs::read_to_string(t.ok()?.path().join("comm")).ok()).collect();
    (
        links.iter().any(|link| link.to_string_lossy().contains("[userfaultfd]")),
        names.iter().any(|name| name.trim() == "fault"),
    )
}

fn ok(vm: &mut TestVm, command: &str) {
    let answer = vm.command(command, 60);
    assert!(answer.starts_with("OK"), "{command}: {answer}");
}

/// Accounting that nobody has asked for costs nothing; the first limit brings it, and writing "no limit" does not.
/// Semantics: 67, 69, 93.
#[test]
fn without_a_limit_there_is_no_userfaultfd_and_the_first_limit_brings_one() {
    if skipped("first-limit") {
        return;
    }
    let mut vm = unlimited("plain", "128M");
    ok(&mut vm, "touch 16M 16M seed=2");
    assert_eq!(equipment(&vm), (false, false));
    let (status, body) = vm.patch("", &json!({"max_bytes": null, "min_bytes": 0}));
    assert_eq!((status, &body["accounting"]), (200, &json!(false)), "{body}");
    assert_eq!(equipment(&vm), (false, false), "no limit is what there was before");
    let (status, body) = vm.patch("", &json!({"max_bytes": 96 * MIB, "swap_max_bytes": 0}));
    assert_eq!((status, &body["accounting"]), (200, &json!(true)), "{body}");
    assert_eq!(equipment(&vm), (true, true));
    let now = exact(&vm);
    assert!(number(&now, "memory.stat.guest_bytes") >= 16 * MIB);
    let (status, body) = vm.patch("", &json!({"max_bytes": null}));
    assert_eq!((status, &body["accounting"]), (200, &json!(true)), "one-way: {body}");
    ok(&mut vm, "touch 40M 16M seed=3");
    assert!(number(&exact(&vm), "memory.stat.guest_bytes") >= 32 * MIB, "without a limit it still counts");
    let (status, body) = vm.patch("", &json!({"track": false}));
    assert_eq!((status, body["code"].as_str()), (409, Some("wrong_state")), "{body}");
    ok(&mut vm, "verify 16M 16M seed=2");
    ok(&mut vm, "verify 40M 16M seed=3");
}

/// What was written is counted, what was only read is not (it is the kernel's page of zeroes), and then the limit holds.
/// Semantics: 67, 68, 94.
#[test]
fn a_first_limit_above_what_is_resident_is_exact_and_holds() {
    if skipped("first-limit-above") {
        return;
    }
    let mut vm = unlimited("above", "512M");
    ok(&mut vm, "touch 16M 32M seed=5");
    ok(&mut vm, "touch 64M 96M stride=12K seed=6");
    // Reading maps pages of zeroes, among them some that are neighbours of written ones.
    ok(&mut vm, "touch 64M 96M mode=read");
    ok(&mut vm, "touch 200M 64M mode=read");
    let before = resident_pages(&vm.show());
    let (status, body) = vm.patch("", &json!({"max_bytes": 160 * MIB, "swap_max_bytes": 0}));
    assert_eq!(status, 200, "{body}");
    let now = exact(&vm);
    let guest = number(&now, "memory.stat.guest_bytes");
    // 32 MiB and a third of 96 MiB, or all of them where the host gives huge pages; nothing of what was only read.
    assert!((64 * MIB..136 * MIB).contains(&guest), "{guest}");
    assert!(before * 4096 > guest + 60 * MIB, "pages of zeroes were mapped before: {before} pages");
    // Written to for the first time, a page that was only read is charged like any other.
    ok(&mut vm, "touch 200M 8M seed=8");
    assert!(number(&exact(&vm), "memory.stat.guest_bytes") >= guest + 8 * MIB);
    vm.send("touch 208M 128M seed=9");
    held_at_its_limit(&vm);
    let (status, body) = vm.patch("", &json!({"max_bytes": 320 * MIB}));
    assert_eq!(status, 200, "{body}");
    assert!(vm.expect("OK", 30).starts_with("OK"));
    exact(&vm);
    for (command, seed) in [("verify 16M 32M", 5), ("verify 64M 96M stride=12K", 6), ("verify 200M 8M", 8)] {
        ok(&mut vm, &format!("{command} seed={seed}"));
    }
    ok(&mut vm, "verify 208M 128M seed=9");
    assert!(number(&exact(&vm), "memory.current_bytes") <= 320 * MIB);
}

/// The modes are those of any change: what is above a forced limit is shown, and the balloon brings usage down.
/// Semantics: 67, 71, 118.
#[test]
fn a_first_limit_below_what_is_resident_is_refused_forced_or_reclaimed() {
    if skipped("first-limit-below") {
        return;
    }
    let mut vm = unlimited("refuse", "128M");
    ok(&mut vm, "touch 16M 48M seed=2");
    let (status, body) = vm.patch("?mode=refuse", &json!({"max_bytes": 32 * MIB, "swap_max_bytes": 0}));
    assert_eq!((status, body["code"].as_str()), (409, Some("limit_below_usage")), "{body}");
    // Pages that were only ever read are dropped when the account begins: they are there again before nothing can be charged.
    ok(&mut vm, "verify 16M 48M seed=2");
    let now = exact(&vm);
    assert!(now["memory"]["max_bytes"].is_null(), "no limit as before: {now}");
    let (status, body) = vm.patch("?mode=force", &json!({"max_bytes": 32 * MIB, "swap_max_bytes": 0}));
    assert_eq!(status, 200, "{body}");
    let now = exact(&vm);
    let over = number(&now, "memory.stat.overcharge_bytes");
    assert_eq!(number(&now, "memory.current_bytes"), 32 * MIB + over, "{now}");
    ok(&mut vm, "verify 16M 48M seed=2");

    let mut vm = unlimited("reclaim", "256M");
    ok(&mut vm, "balloon init");
    ok(&mut vm, "touch 16M 32M seed=2");
    ok(&mut vm, "touch 64M 128M seed=3");
    vm.send("balloon auto 64M 192M rounds=400");
    wait_until("the driver runs", 10, || (vm.show()["balloon"]["ready"] == true).then_some(()));
    let (status, body) = vm.patch("", &json!({"max_bytes": 128 * MIB}));
    assert_eq!(status, 200, "{body}");
    assert!(vm.expect("OK", 30).starts_with("OK"));
    let now = exact(&vm);
    assert_eq!(number(&now, "memory.max_bytes"), 128 * MIB);
    assert!(number(&now, "memory.current_bytes") <= 128 * MIB, "{now}");
    ok(&mut vm, "verify 16M 32M seed=2");
}

/// Where memory cannot be charged the VM runs on as it was, and the client reads what `ballast doctor` would say.
/// Semantics: 67.
#[test]
fn without_userfaultfd_a_first_limit_is_refused_with_what_to_do_and_the_vm_is_unharmed() {
    if skipped("first-limit-refused") {
        return;
    }
    // SAFETY: geteuid has no conditions.
    if unsafe { libc::geteuid() } != 0 {
        skip("first-limit-refused", "only root can hide a device");
        return;
    }
    let builder = TestVm::builder("poor").memory("size=64M").cmdline("shell");
    let mut vm = builder.without("/dev/userfaultfd").start();
    vm.expect("READY", 10);
    ok(&mut vm, "touch 16M 16M seed=2");
    for body in [json!({"max_bytes": 48 * MIB}), json!({"track": true})] {
        let (status, answer) = vm.patch("", &body);
        assert_eq!((status, answer["code"].as_str()), (409, Some("not_accounted")), "{answer}");
        let message = answer["message"].as_str().expect("a sentence");
        assert!(message.contains("/dev/userfaultfd") && message.contains("start the VM again"), "{message}");
    }
    let now = vm.show();
    assert_eq!((&now["accounting"], &now["state"]), (&json!(false), &json!("running")), "{now}");
    assert!(now["memory"]["max_bytes"].is_null() && number(&now, "memory.current_bytes") == 0, "{now}");
    ok(&mut vm, "verify 16M 16M seed=2");
    ok(&mut vm, "touch 32M 24M seed=3");
    vm.send("exit 7");
    assert_eq!(vm.wait(10).code(), Some(7));
}

/// Two vCPUs fault as fast as they can while accounting begins: no page is missed, counted twice or lost.
/// Semantics: 94, B60.
#[test]
fn activation_under_a_storm_of_two_vcpus_is_exact_and_loses_nothing() {
    if skipped("first-limit-storm") {
        return;
    }
    for round in 0..4 {
        let mut vm = TestVm::builder("storm").memory("size=1G").option("--cpus", "2").cmdline("shell").start();
        vm.expect("READY", 10);
        // Every other page: as many faults as there can be.
        vm.send("touch 16M 600M stride=8K seed=4 cpus=all");
        wait_until("the storm has begun", 20, || {
            (resident_pages(&vm.show()) * 4096 > (20 + 60 * round) * MIB).then_some(())
        });
        let start = Instant::now();
        let (status, body) = vm.patch("", &json!({"max_bytes": 900 * MIB}));
        let took = start.elapsed();
        assert_eq!(status, 200, "{body}");
        assert!(took < deadline(2), "it took {took:?}");
        assert!(vm.expect("OK", 60).starts_with("OK"));
        let now = exact(&vm);
        assert!(number(&now, "memory.stat.guest_bytes") >= 300 * MIB, "{now}");
        ok(&mut vm, "verify 16M 600M stride=8K seed=4");
        println!("round {round}: accounting began within {took:?} of the request");
    }
}

/// Increments that race with the count would be lost if a page were dropped or filled twice.
/// Semantics: 94.
#[test]
fn no_increment_is_lost_while_accounting_begins() {
    if skipped("first-limit-hot") {
        return;
    }
    for _ in 0..4 {
        let mut vm = unlimited("hot", "512M");
        // Read first, so that there are pages of zeroes to be dropped. The first pass writes to one after the other, and
        // is under way for much longer than the count takes.
        ok(&mut vm, "touch 32M 256M mode=read");
        let before = written_pages(&vm.show());
        vm.send("hot 32M 256M passes=3");
        wait_until("the first pass has begun", 20, || (written_pages(&vm.show()) > before + 256).then_some(()));
        let (status, body) = vm.patch("", &json!({"track": true}));
        assert_eq!((status, &body["accounting"]), (200, &json!(true)), "{body}");
        let answer = vm.line(60);
        assert!(answer.starts_with("OK"), "{answer}");
        exact(&vm);
    }
}

/// A VM that stands still is counted as it stands, and goes on as an accounted one.
/// Semantics: 67.
#[test]
fn a_paused_vm_is_activated_and_resumes() {
    if skipped("first-limit-paused") {
        return;
    }
    let mut vm = unlimited("paused", "128M");
    ok(&mut vm, "touch 16M 32M seed=2");
    assert_eq!(vm.post("pause").0, 200);
    let (status, body) = vm.patch("", &json!({"max_bytes": 64 * MIB, "swap_max_bytes": 0}));
    assert_eq!((status, &body["state"]), (200, &json!("paused")), "{body}");
    let now = exact(&vm);
    assert_eq!(number(&now, "memory.stat.stock_bytes"), 0, "who stands still needs none");
    assert_eq!(vm.post("resume").0, 200);
    ok(&mut vm, "verify 16M 32M seed=2");
    ok(&mut vm, "touch 48M 8M seed=3");
    vm.send("touch 56M 64M seed=3");
    held_at_its_limit(&vm);
}

/// Requests of all kinds at the moment of activation: everybody is answered, and at the end everything is true.
/// Semantics: 72, 94.
#[test]
fn clients_that_ask_at_the_same_moment_are_all_answered() {
    if skipped("first-limit-crowd") {
        return;
    }
    for round in 0..6 {
        let mut vm = unlimited("crowd", "128M");
        ok(&mut vm, "touch 16M 32M seed=2");
        let asked = ["limit", "limit", "pause", "resume", "track", "limit", "show"];
        std::thread::scope(|scope| {
            for (i, what) in asked.iter().cycle().skip(round).take(asked.len()).enumerate() {
                let socket = vm.socket();
                scope.spawn(move || {
                    let limit = json!({"max_bytes": (64 + i as u64) * MIB}).to_string();
                    let answer = match *what {
                        "limit" => http(socket, "PATCH", "/vms/crowd/memory", Some(&limit)),
                        "track" => http(socket, "PATCH", "/vms/crowd/memory", Some(r#"{"track":true}"#)),
                        "show" => http(socket, "GET", "/vms/crowd", None),
                        verb => http(socket, "POST", &format!("/vms/crowd/{verb}"), None),
                    };
                    let (status, body) = answer.expect("an answer");
                    assert!(status == 200 || status == 409 && *what == "pause", "{what}: {status} {body}");
                });
            }
        });
        assert_eq!(vm.post("resume").0, 200);
        ok(&mut vm, "verify 16M 32M seed=2");
        let max = number(&exact(&vm), "memory.max_bytes");
        assert!((64 * MIB..72 * MIB).contains(&max), "one of those asked for: {max}");
    }
    // And the hard end of one in the middle.
    for verb in ["kill", "exit"] {
        let mut vm = unlimited("end", "1G");
        ok(&mut vm, "touch 16M 512M seed=2");
        std::thread::scope(|scope| {
            let socket = vm.socket();
            let change = scope.spawn(move || http(socket, "PATCH", "/vms/end/memory", Some(r#"{"track":true}"#)));
            if verb == "kill" {
                let (status, body) = http(socket, "POST", "/vms/end/kill", None).expect("an answer");
                assert_eq!(status, 200, "{body}");
            }
            if let Ok(Ok((status, body))) = change.join() {
                assert!(status == 200 || status == 409 || status == 503, "{status} {body}");
            }
        });
        if verb == "exit" {
            vm.send("exit 7");
        }
        assert_eq!(vm.wait(10).code(), Some(if verb == "kill" { 137 } else { 7 }));
    }
}

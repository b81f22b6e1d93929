//! One guest of a `ballast run`.

use ballast_tests::{Builder, PAGE, TestVm, guest_file, number, resident_pages, wait_until};
use serde_json::{Value, json};

use super::{CMDLINE, MIB};

/// A Debian kernel with our init, on the uncompressed kernel: it boots fastest.
pub fn linux(name: &str) -> Builder {
    TestVm::builder(name).kernel(&guest_file("vmlinux")).option("--initrd", guest_file("initrd.img").to_string_lossy())
}

fn usage(now: &Value) -> u64 {
    number(now, "memory.current_bytes")
}

/// The answer line before `OK`: the command's data.
pub fn data(vm: &mut TestVm, command: &str, prefix: &str) -> String {
    vm.send(command);
    let line = vm.expect(prefix, 60);
    vm.expect("OK", 60);
    line
}

/// Charged equals resident while the guest stands still. What it had given to its balloon before that may still be on
/// its way to the host for a moment.
pub fn exact(vm: &TestVm, at: &str) {
    let (status, _) = vm.post("pause");
    assert!((200..300).contains(&status), "{at}: pause {status}");
    wait_until(&format!("{at}: charged equals resident"), 5, || {
        let now = vm.show();
        (number(&now, "memory.stat.guest_bytes") == resident_pages(&now) * PAGE).then_some(())
    });
    let (status, _) = vm.post("resume");
    assert!((200..300).contains(&status), "{at}: resume {status}");
}

/// Nothing in the guest's log that its limit did not demand.
pub fn healthy(vm: &mut TestVm) {
    let counts = data(vm, "dmesg-check", "DMESG");
    for clean in ["stalls=0", "ooms=0", "bugs=0"] {
        assert!(counts.contains(clean), "{counts}");
    }
}

/// One guest for the whole life under a limit: booting takes most of the time.
/// Semantics: 11, 46, 118, T3.
#[test]
fn linux_lives_under_a_limit_that_is_lowered_and_raised_and_is_exact_at_ten_points() {
    let mut vm =
        linux("life").cmdline(CMDLINE).memory("size=256M,max=192M").option("--balloon", "stats_interval=1s").start();
    vm.expect("READY", 60);
    let booted = vm.show();
    assert!(usage(&booted) <= 192 * MIB, "{booted}");
    exact(&vm, "booted");
    wait_until("the balloon has its first target", 60, || {
        let now = vm.show();
        (number(&now, "balloon.actual_bytes") > 0
            && number(&now, "balloon.actual_bytes") == number(&now, "balloon.target_bytes"))
        .then_some(())
    });
    exact(&vm, "first target reached");

    // Much is touched and little of it kept: that is what the balloon can take.
    for command in ["touch 96M 4", "free", "drop-caches", "touch 32M 5"] {
        assert!(vm.command(command, 60).starts_with("OK"), "{command}");
    }
    exact(&vm, "touched");
    assert!(data(&mut vm, "verify", "VERIFY").starts_with("VERIFY ok"));

    // One vCPU, init_on_alloc as Debian has it: each page that the balloon takes is touched first.
    let before = vm.show();
    let (status, body) = vm.patch("?mode=reclaim", &json!({"max_bytes": 128 * MIB}));
    assert_eq!(status, 200, "{body}");
    let now = vm.show();
    assert!(usage(&now) <= 128 * MIB && number(&now, "memory.max_bytes") == 128 * MIB, "{now}");
    assert!(resident_pages(&now) * PAGE <= 128 * MIB, "resident follows");
    assert!(number(&now, "balloon.actual_bytes") > number(&before, "balloon.actual_bytes"), "{now}");
    exact(&vm, "lowered");
    assert!(data(&mut vm, "verify", "VERIFY").starts_with("VERIFY ok"), "the balloon took no page in use");
    exact(&vm, "lowered and verified");

    assert!(number(&before, "memory.stat.guest_bytes") > 128 * MIB, "there was something to reclaim: {before}");
    let full = wait_until("the balloon is as large as asked", 60, || {
        let now = vm.show();
        let actual = number(&now, "balloon.actual_bytes");
        (actual == number(&now, "balloon.target_bytes")).then_some(actual)
    });
    let (status, body) = vm.patch("", &json!({"max_bytes": 192 * MIB}));
    assert_eq!(status, 200, "{body}");
    wait_until("the balloon deflates", 60, || (number(&vm.show(), "balloon.actual_bytes") < full).then_some(()));
    exact(&vm, "raised");
    assert!(vm.command("touch 32M 6", 60).starts_with("OK"));
    exact(&vm, "touched 32M more");
    assert!(data(&mut vm, "verify", "VERIFY").starts_with("VERIFY ok"));

    assert!(vm.command("free", 60).starts_with("OK"));
    assert!(vm.command("drop-caches", 60).starts_with("OK"));
    exact(&vm, "freed");
    let (status, body) = vm.patch("?mode=refuse", &json!({"max_bytes": 64 * MIB}));
    assert!(status == 200 || status == 409, "{body}");
    let (status, body) = vm.patch("?mode=reclaim", &json!({"max_bytes": 112 * MIB}));
    assert_eq!(status, 200, "{body}");
    exact(&vm, "lowered again");

    // The guest's own view arrives over the statistics queue, with its age.
    let total = wait_until("guest statistics", 30, || vm.show()["guest_stats"]["total_memory"].as_u64());
    assert!(total > 64 * MIB && total < 256 * MIB, "{total}");
    assert!(vm.show()["guest_stats"]["age_ms"].is_u64());
    healthy(&mut vm);
    exact(&vm, "at the end");
    vm.send("poweroff");
    assert_eq!(vm.wait(30).code(), Some(0));
    assert!(!vm.socket().exists());
}

/// What `ballast stop` does: the kernel hears of the button by ACPI, and its init turns the machine off.
#[test]
fn linux_powers_itself_off_when_the_button_is_pressed() {
    let mut vm = linux("button").cmdline(CMDLINE).memory("size=256M").start();
    vm.expect("READY", 60);
    let (status, stopped) = vm.post("stop?timeout_ms=300000");
    assert_eq!((status, &stopped["killed"]), (200, &json!(false)), "{stopped}");
    assert_eq!(stopped["vm"]["end"], "the guest powered itself off");
    assert_eq!(vm.wait(30).code(), Some(0));
}

#[test]
fn linux_held_at_its_limit_is_paused_and_goes_on_when_the_limit_is_raised() {
    // Without a balloon driver nothing keeps the guest below its limit.
    let mut vm = linux("atmax")
        .cmdline(&format!("{CMDLINE} module_blacklist=virtio_balloon"))
        .memory("size=256M,max=112M")
        .option("--oom", "action=pause,deadline=1s")
        .start();
    vm.expect("READY", 60);
    vm.send("touch 64M 9");
    let now = vm.wait_state("paused", 60);
    assert!(usage(&now) <= 112 * MIB, "{now}");
    assert_eq!(number(&now, "memory.stat.guest_bytes"), resident_pages(&now) * PAGE, "{now}");
    let (status, body) = vm.patch("", &json!({"max_bytes": 240 * MIB}));
    assert_eq!(status, 200, "{body}");
    assert!(vm.expect("OK", 60).starts_with("OK"));
    assert!(data(&mut vm, "verify", "VERIFY").starts_with("VERIFY ok"));
    healthy(&mut vm);
    let (status, _) = vm.post("kill");
    assert!((200..300).contains(&status));
    assert_eq!(vm.wait(10).code(), Some(137));
}

#[test]
fn linux_boots_from_a_bzimage_with_two_vcpus_and_without_a_limit() {
    // `noxsave`: the emulated host describes its XSAVE state wrongly to a second vCPU.
    let mut vm = TestVm::builder("smp")
        .kernel(&guest_file("vmlinuz"))
        .option("--initrd", guest_file("initrd.img").to_string_lossy())
        .cmdline(&format!("{CMDLINE} noxsave"))
        .option("--cpus", "2")
        .memory("size=256M")
        .start();
    vm.expect("READY", 90);
    let cpus = data(&mut vm, "cat /sys/devices/system/cpu/online", "0");
    assert_eq!(cpus, "0-1");
    assert!(vm.command("touch 32M 1", 60).starts_with("OK"));
    assert!(data(&mut vm, "verify", "VERIFY").starts_with("VERIFY ok"));
    vm.send("reboot");
    assert_eq!(vm.wait(30).code(), Some(0), "a reset ends the run");
}

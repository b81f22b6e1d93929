//! One guest: it meets its limit, gets another one while it runs, and loses nothing.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use ballast_tests::{TestVm, number, resident_pages, wait_until};
use serde_json::{Value, json};

use super::{MIB, Step};

/// Looks at the VM, and draws its line of the live table.
fn live(vm: &TestVm, note: &str) -> Value {
    let now = vm.show();
    draw(&vm.name, &now, note);
    now
}

/// One line of the live table, drawn over the last one; only on a terminal.
pub fn draw(name: &str, now: &Value, note: &str) {
    if std::io::stdout().is_terminal() {
        let mib =
            |path: &str| now.pointer(path).and_then(Value::as_u64).map_or("max".into(), |b| format!("{}M", b / MIB));
        let usage = number(now, "memory.current_bytes");
        let max = now["memory"]["max_bytes"].as_u64().unwrap_or(u64::MAX);
        let filled = (20.0 * usage as f64 / max.min(number(now, "size_bytes")) as f64).min(20.0) as usize;
        print!(
            "\r\x1b[K{name:<8} {:<8} [{:<20}] usage {:>5} max {:>5} resident {:>5}M swapped {:>5} balloon {:>5} of {:>5}  {note}",
            now["state"].as_str().unwrap_or("?"),
            "#".repeat(filled),
            mib("/memory/current_bytes"),
            mib("/memory/max_bytes"),
            resident_pages(now) * 4096 / MIB,
            mib("/memory/stat/swapped_bytes"),
            mib("/balloon/actual_bytes"),
            mib("/balloon/target_bytes"),
        );
        let _ = std::io::stdout().flush();
    }
}

/// The freestanding guest.
pub fn native(step: &mut Step) {
    let mut vm = TestVm::builder("native").memory("size=256M,max=64M").cmdline("shell").start();
    vm.expect("READY", 10);
    let start = Instant::now();
    vm.send("touch 16M 96M seed=7");
    let held = wait_until("the guest is held at its limit", 20, || {
        let now = live(&vm, "touching 96M");
        (now["held"]["now"] == true).then_some(now)
    });
    let usage = number(&held, "memory.current_bytes");
    let resident = resident_pages(&held);
    let exact = resident * 4096 == number(&held, "memory.stat.guest_bytes");
    step(
        "native-limit",
        usage <= 64 * MIB && usage > 63 * MIB && exact,
        &format!(
            "max_bytes={} usage_bytes={usage} guest_bytes={} resident_bytes={} ms={}",
            64 * MIB,
            number(&held, "memory.stat.guest_bytes"),
            resident * 4096,
            start.elapsed().as_millis()
        ),
    );
    let raised = Instant::now();
    let (status, answer) = vm.patch("", &json!({"max_bytes": 128 * MIB}));
    let touched = vm.expect("OK", 30);
    let now = live(&vm, "raised to 128M");
    let usage = number(&now, "memory.current_bytes");
    step(
        "native-raise",
        status == 200 && touched.starts_with("OK") && usage > 96 * MIB && usage <= 128 * MIB,
        &format!(
            "status={status} max_bytes={} usage_bytes={usage} ms={}",
            number(&answer, "memory.max_bytes"),
            raised.elapsed().as_millis()
        ),
    );
    let verified = vm.command("verify 16M 96M seed=7", 60);
    vm.send("exit 0");
    let status = vm.wait(20);
    step(
        "native-verify",
        verified.starts_with("OK") && status.success(),
        &format!("answer={} status={}", verified.replace(' ', ","), status.code().unwrap_or(-1)),
    );
}

/// The Debian guest.
pub fn linux(step: &mut Step, kernel: &Path, initrd: &Path) {
    let start = Instant::now();
    let mut vm = TestVm::builder("linux")
        .kernel(kernel)
        .option("--initrd", initrd.to_string_lossy())
        .cmdline("quiet panic=-1 pci=off")
        .memory("size=256M,max=192M")
        .start();
    vm.expect("READY", 60);
    let booted = vm.command("meminfo", 20);
    let now = live(&vm, "booted");
    let usage = number(&now, "memory.current_bytes");
    step(
        "linux-boot",
        usage <= 192 * MIB && booted.starts_with("OK"),
        &format!("ms={} usage_bytes={usage} max_bytes={}", start.elapsed().as_millis(), 192 * MIB),
    );

    // Much is touched and little of it kept: that is what the balloon can take.
    for command in ["touch 96M 4", "free", "drop-caches"] {
        let answer = vm.command(command, 60);
        assert!(answer.starts_with("OK"), "{command}: {answer}");
    }
    let touched = vm.command("touch 32M 5", 60);
    let before = live(&vm, "touched");
    let lower = Instant::now();
    let (status, answer) = vm.patch("?mode=reclaim", &json!({"max_bytes": 128 * MIB}));
    let now = live(&vm, "lowered to 128M");
    let usage = number(&now, "memory.current_bytes");
    let resident = resident_pages(&now) * 4096;
    step(
        "linux-lower",
        status == 200
            && touched.starts_with("OK")
            && number(&before, "memory.stat.guest_bytes") > 128 * MIB
            && usage <= 128 * MIB
            && resident <= 128 * MIB,
        &format!(
            "status={status} ms={} before_bytes={} usage_bytes={usage} resident_bytes={resident} max_bytes={} balloon_bytes={}",
            lower.elapsed().as_millis(),
            number(&before, "memory.current_bytes"),
            answer["memory"]["max_bytes"],
            number(&now, "balloon.actual_bytes"),
        ),
    );

    let full = wait_until("the balloon is as large as asked", 20, || {
        let now = live(&vm, "inflating");
        let actual = number(&now, "balloon.actual_bytes");
        (actual == number(&now, "balloon.target_bytes")).then_some(actual)
    });
    let (status, _) = vm.patch("", &json!({"max_bytes": 192 * MIB}));
    let now = wait_until("the balloon deflates", 20, || {
        let now = live(&vm, "raised to 192M");
        (number(&now, "balloon.actual_bytes") < full).then_some(now)
    });
    let more = vm.command("touch 24M 6", 60);
    step(
        "linux-raise",
        status == 200 && more.starts_with("OK"),
        &format!("status={status} balloon_bytes={} was={full}", number(&now, "balloon.actual_bytes")),
    );

    vm.send("verify");
    let verified = vm.expect("VERIFY", 60);
    vm.send("dmesg-check");
    let dmesg = vm.expect("DMESG", 20);
    live(&vm, "verified");
    step(
        "linux-verify",
        verified.starts_with("VERIFY ok") && dmesg.starts_with("DMESG stalls=0 ooms=0 bugs=0"),
        &format!("answer={} dmesg={}", verified.replace(' ', ","), dmesg.replace(' ', ",")),
    );

    vm.send("poweroff");
    let status = vm.wait(30);
    let gone = !vm.socket().exists();
    step(
        "linux-poweroff",
        status.success() && gone,
        &format!("status={} socket_gone={gone}", status.code().unwrap_or(-1)),
    );
}

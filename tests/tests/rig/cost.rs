//! What a Linux guest costs its host beside its pages, by the host's own books.

use ballast::controller::cgroup::Cgroups;
use ballast_tests::serve::{Console, Serve};
use ballast_tests::{guest_file, number, skip};
use serde_json::{Value, json};

use super::{CMDLINE, MIB};

/// A Linux guest costs what it is charged, in user space and in the kernel (`kernel` of `memory.stat` in cgroup v2): when
/// it has booted, and when it has used most of its RAM.
/// Semantics: 11.
#[test]
fn linux_costs_what_it_is_charged() {
    if let Err(why) = Cgroups::find(None) {
        skip("rig-cost", why);
        return;
    }
    let serve = Serve::start(&["--cgroup", "auto"]);
    let files = ["vmlinux", "initrd.img"].map(guest_file);
    for file in &files {
        // Whoever reads a file first is charged for its place in the page cache: not what a VM costs.
        std::fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
    let config = json!({
        "kernel": files[0], "initrd": files[1], "cmdline": CMDLINE,
        "memory": { "size_bytes": 256 * MIB, "max_bytes": 280 * MIB },
    });
    let mut console = Console::of(&serve.create_with("linux", &config));
    console.expect("READY", 60);
    fits(&serve.show("linux"), "booted");
    console.send("touch 160M 9");
    console.expect("OK", 60);
    let vm = serve.show("linux");
    assert!(number(&vm, "memory.stat.guest_bytes") > 160 * MIB, "{vm}");
    fits(&vm, "used");
}

/// Charged is within a tenth of measured.
fn fits(vm: &Value, when: &str) {
    for of in ["user_bytes", "kernel_bytes"] {
        let [charged, measured] = ["accounted", "measured"].map(|side| number(vm, &format!("overhead.{side}.{of}")));
        println!("{when} {of}: charged {} KiB, measured {} KiB", charged >> 10, measured >> 10);
        assert!(charged.abs_diff(measured) * 10 <= measured, "{when} {of}: {}", vm["overhead"]);
    }
}

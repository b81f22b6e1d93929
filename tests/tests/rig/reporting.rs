//! What Linux does with free page reporting.

use ballast_tests::{Builder, PAGE, TestVm, number, wait_until};
use serde_json::Value;

use super::{CMDLINE, MIB};
use crate::single::{data, exact, healthy, linux};

/// A guest that may report, without a limit that anybody would ask it for memory for.
fn reporting(name: &str, cmdline: &str) -> Builder {
    let cmdline = format!("{CMDLINE} {cmdline}");
    linux(name).cmdline(&cmdline).memory("size=384M,track=on").option("--balloon", "free_page_reporting=on")
}

fn guest(now: &Value) -> u64 {
    number(now, "memory.stat.guest_bytes")
}

/// Touches memory and frees it; how much was charged before it was freed.
fn churn(vm: &mut TestVm, seed: u32) -> u64 {
    assert!(vm.command(&format!("touch 128M {seed}"), 60).starts_with("OK"));
    assert!(data(vm, "verify", "VERIFY").starts_with("VERIFY ok"));
    let touched = guest(&vm.show());
    for command in ["free", "compact"] {
        assert!(vm.command(command, 60).starts_with("OK"), "{command}");
    }
    touched
}

/// The kernel reports what it has freed after about two seconds, and nobody has asked it to.
/// Semantics: 4, 46.
#[test]
fn linux_gives_back_by_itself_what_it_has_freed() {
    // One that clears what it frees reports as well, because poison is offered.
    for (name, cmdline) in [("reports", ""), ("clears", "init_on_free=1")] {
        let mut vm = reporting(name, cmdline).start();
        vm.expect("READY", 60);
        let touched = churn(&mut vm, 4);
        wait_until("what was freed is reported", 60, || (guest(&vm.show()) + 96 * MIB < touched).then_some(()));
        exact(&vm, name);
        let touched = churn(&mut vm, 5);
        wait_until("and once more", 60, || (guest(&vm.show()) + 96 * MIB < touched).then_some(()));
        exact(&vm, name);
        let now = vm.show();
        assert!(number(&now, "faults.reported_pages") * PAGE > 192 * MIB, "{now}");
        assert_eq!((number(&now, "balloon.actual_bytes"), number(&now, "faults.guest_errors")), (0, 0), "{now}");
        healthy(&mut vm);
    }
}

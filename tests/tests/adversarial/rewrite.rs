//! A guest that rewrites its pages as fast as it can, and knows what must be in each of them.

use ballast_tests::{TestVm, number, wait_until};
use serde_json::json;

use super::{MIB, skipped};

/// Its balloon takes and gives back other pages meanwhile, its limit moves, it is paused: no byte of its own changes.
#[test]
fn no_byte_is_lost_while_limits_move_and_the_guest_is_paused() {
    if skipped("rewrite") {
        return;
    }
    let mut vm = TestVm::builder("rewriter").memory("size=128M,max=96M").option("--cpus", "2").cmdline("shell").start();
    vm.expect("READY", 20);
    vm.send("rewrite 16M 48M");
    vm.expect("rewriting", 20);
    for i in 0..20 {
        let verb = if i % 2 == 0 { "pause" } else { "resume" };
        let (status, body) = vm.post(verb);
        assert!((200..300).contains(&status), "{verb}: {status} {body}");
        // Each time it runs it gets somewhere, and what it uses stays below what it may.
        let max = (80 + i) * MIB;
        let (status, body) = vm.patch("?mode=refuse", &json!({ "max_bytes": max }));
        assert_eq!(status, 200, "{body}");
        let now = vm.show();
        assert!(number(&now, "memory.current_bytes") <= max, "{now}");
    }
    wait_until("all of it is in use", 20, || (number(&vm.show(), "memory.stat.guest_bytes") >= 48 * MIB).then_some(()));
    let answer = vm.command("echo enough", 60);
    assert!(answer.starts_with("OK rewrite") && answer.contains(" bad=0"), "{answer}");
}

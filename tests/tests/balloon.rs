//! What a controller makes of balloon drivers: one that does nothing, and one that takes back what it has given.

use ballast_tests::{PAGE, TestVm, number, skipped, wait_until};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// A VM that should give 64 MiB and more, at its prompt, with a driver that has agreed to `features`.
fn asked(name: &str, features: &str) -> TestVm {
    let vm = TestVm::builder(name).memory("size=128M,max=64M").option("--balloon", "deflate_on_oom=on");
    let mut vm = vm.cmdline("shell").start();
    vm.expect("READY", 10);
    let answer = vm.command(&format!("balloon init features={features}"), 10);
    assert!(answer.starts_with("OK"), "{answer}");
    vm
}

fn event(vm: &TestVm, kind: &str) -> Option<Value> {
    vm.events().into_iter().find(|event| event["event"] == kind)
}

/// Semantics: 42, 117.
#[test]
fn a_driver_that_gives_nothing_is_told_that_it_has_given_enough() {
    if skipped("gives-nothing") {
        return;
    }
    let mut vm = asked("gives-nothing", "0x1");
    let target = number(&vm.show(), "balloon.target_bytes");
    assert!(target >= 64 * MIB, "{}", vm.show());
    // It says that it has given some, and has not.
    assert!(vm.command("balloon inflate 64M 4M", 10).starts_with("OK"));
    let stalled = wait_until("the guest has stalled", 20, || event(&vm, "target_stalled"));
    let now = vm.show();
    assert_eq!(now["balloon"]["progress"], "stalled");
    assert_eq!(number(&now, "balloon.target_bytes"), target, "it should still give as much");
    assert_eq!(stalled["told_bytes"], 4 * MIB);
    assert_eq!(stalled["missing_bytes"], target - 4 * MIB);
    // The guest learns of it, and is asked again.
    let told = |vm: &mut TestVm, pages: u64| {
        let said = vm.command("balloon status", 10);
        said.contains(&format!(" target={pages} ")).then_some(())
    };
    wait_until("it is asked again", 20, || told(&mut vm, target / PAGE));
    wait_until("it is left alone again", 20, || told(&mut vm, 4 * MIB / PAGE));
    wait_until("it is called what it is", 20, || event(&vm, "uncooperative"));
}

#[test]
fn what_a_guest_takes_back_when_it_is_out_of_memory_is_an_event_and_charged_when_touched() {
    if skipped("takes-back") {
        return;
    }
    let mut vm = asked("takes-back", "0x5");
    let target = number(&vm.show(), "balloon.target_bytes");
    assert!(vm.command("balloon auto 16M 100M", 10).starts_with("OK"));
    let before = vm.show();
    assert_eq!(
        (number(&before, "balloon.actual_bytes"), &before["balloon"]["progress"]),
        (target, &"cooperating".into())
    );
    assert!(vm.command("balloon deflate 16M 1M", 10).starts_with("OK"));
    assert!(vm.command("touch 16M 1M", 10).starts_with("OK"));
    let taken = wait_until("the controller knows", 20, || event(&vm, "guest_deflated_on_oom"));
    assert_eq!((&taken["taken_bytes"], &taken["balloon_actual_bytes"]), (&MIB.into(), &(target - MIB).into()));
    let now = vm.show();
    let guest = |vm| number(vm, "memory.stat.guest_bytes");
    assert!(guest(&now) >= guest(&before) + MIB, "{now}");
    assert_eq!(number(&now, "balloon.told_bytes"), target - MIB, "nothing more is asked of it for a while");
    assert_eq!(number(&now, "faults.implicit_deflates"), 0);
}

//! A guest runs only in a worker that can do nothing else: seen from outside, for every thread of a running VM. What the
//! filters forbid is tested where they are (`vmm/src/worker/sandbox/tests.rs`).

use std::path::PathBuf;

use ballast_tests::{TestVm, number, skipped};
use serde_json::json;

const MIB: u64 = 1 << 20;

fn worker(vm: &TestVm) -> PathBuf {
    format!("/proc/{}", number(&vm.show(), "pid")).into()
}

/// The names of the worker's threads, after checking that each of them is shut in, those that KVM has added too.
fn shut_in(vm: &TestVm) -> Vec<String> {
    let threads = std::fs::read_dir(worker(vm).join("task")).expect("the worker's threads");
    let mut names = Vec::new();
    for thread in threads {
        let status = std::fs::read_to_string(thread.expect("a thread").path().join("status")).expect("its status");
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
            line.unwrap_or_else(|| panic!("{name} in {status}")).to_owned()
        };
        let name = field("Name");
        assert_eq!(field("Seccomp"), "2", "{name} has a filter");
        assert_eq!(field("NoNewPrivs"), "1", "{name}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(set), "0000000000000000", "{name}: {set}");
        }
        names.push(name);
    }
    names.sort();
    names
}

/// Threads and accounting in every combination that a worker has: many vCPUs, no limit, and the first limit of a guest
/// that already runs, for which nothing can be opened any more.
#[test]
fn every_thread_of_a_running_vm_is_in_its_sandbox() {
    if skipped("sandbox") {
        return;
    }
    for (cpus, first_limit) in [(1, false), (1, true), (4, false), (12, true)] {
        let limit = if first_limit { "" } else { ",max=80M" };
        let mut vm = TestVm::builder("shut-in")
            .memory(&format!("size=96M{limit}"))
            .option("--cpus", cpus.to_string())
            .cmdline("shell")
            .start();
        vm.expect("READY", 20);
        let names = shut_in(&vm);
        let vcpus = names.iter().filter(|name| name.starts_with("vcpu")).count();
        assert_eq!(vcpus, cpus, "{names:?}");
        let answering = if first_limit { "channel" } else { "fault" };
        assert!(names.iter().any(|name| name == answering), "{names:?}");
        if first_limit {
            let (status, body) = vm.patch("", &json!({"max_bytes": 80 * MIB}));
            assert_eq!((status, &body["accounting"]), (200, &json!(true)), "{body}");
            assert!(shut_in(&vm).iter().any(|name| name == "fault"), "accounting has begun");
        }
        let answer = vm.command("touch 16M 16M seed=3", 60);
        assert!(answer.starts_with("OK"), "{answer}");
    }
}

//! What a VM costs beside its pages, and the host's own limit behind the account.
//!
//! A worker's cgroup needs a controller that may make some; where it may not, these tests say so and prove nothing.

use std::path::PathBuf;

use ballast_tests::serve::{Serve, is_alive, kill, pid, shell};
use ballast_tests::{memory_cgroup, number, skip, skipped, wait_until};
use serde_json::{Value, json};

/// A `serve` whose workers have cgroups, or why there is none here.
fn with_cgroups() -> Option<Serve> {
    if let Err(why) = ballast::controller::cgroup::Cgroups::look() {
        skip("cost", why);
        return None;
    }
    Some(Serve::start(&["--cgroup", "auto"]))
}

/// [`memory_cgroup`] of a worker.
fn cgroup(view: &Value) -> (PathBuf, &'static str) {
    memory_cgroup(&pid(view).to_string()).expect("the worker lives, in a cgroup")
}

fn limit(view: &Value) -> u64 {
    let (directory, file) = cgroup(view);
    std::fs::read_to_string(directory.join(file)).expect("a limit").trim().parse().expect("a number")
}

/// The host's limit stays above what the VM may use, whatever that is changed to, and goes with the VM.
#[test]
fn the_host_s_limit_of_a_worker_follows_the_vm_s_and_ends_with_it() {
    let Some(serve) = with_cgroups() else { return };
    let vm = serve.create("web");
    assert!(limit(&vm) >= number(&vm, "memory.max_bytes") + (16 << 20), "{vm}");
    for max in [60 << 20, 24 << 20] {
        let (status, body) = serve.ask("PATCH", "/vms/web/memory", Some(&json!({ "max_bytes": max })));
        assert_eq!(status, 200, "{body}");
        wait_until("the backstop follows", 10, || {
            ((max + (16 << 20)..max + (32 << 20)).contains(&limit(&vm))).then_some(())
        });
    }
    let (directory, _) = cgroup(&vm);
    assert!(serve.show("web")["overhead"]["measured"]["kernel_bytes"].as_u64().expect("measured") > 0);
    assert_eq!(serve.ask("DELETE", "/vms/web", None).0, 204);
    wait_until("the cgroup is gone", 20, || (!directory.exists()).then_some(()));
}

/// A controller that is killed leaves the cgroups of its workers; the next one removes those that nobody is in.
#[test]
fn cgroups_of_workers_that_ended_while_nobody_was_there_go_with_the_next_controller() {
    let Some(mut serve) = with_cgroups() else { return };
    let (stays, goes) = (serve.create("stays"), serve.create("goes"));
    let ((stays, _), (left, _)) = (cgroup(&stays), cgroup(&goes));
    serve.signal(libc::SIGKILL);
    serve.wait(10);
    kill(pid(&goes), libc::SIGKILL);
    wait_until("the worker is gone", 20, || (!is_alive(pid(&goes))).then_some(()));
    assert!(left.exists());
    serve.again();
    wait_until("its cgroup is gone", 20, || (!left.exists()).then_some(()));
    assert!(stays.exists());
    assert_eq!(serve.ask("DELETE", "/vms/stays", None).0, 204);
    wait_until("the other goes with its VM", 20, || (!stays.exists()).then_some(()));
}

/// Somebody else lowers the limit of the worker's cgroup: the kernel kills it, and the event says who it was.
#[test]
fn a_worker_that_the_host_s_oom_killer_ends_is_told_from_one_that_crashes() {
    let Some(serve) = with_cgroups() else { return };
    let mut config = shell();
    config["cmdline"] = "storm".into();
    config["memory"] = json!({ "size_bytes": 2u64 << 30, "max_bytes": 2u64 << 30 });
    let vm = serve.create_with("web", &config);
    assert_eq!(serve.ask("POST", "/vms/web/pause", None).0, 200);
    let (directory, file) = cgroup(&vm);
    // Never below what is used: v1 refuses that.
    let used = number(&serve.show("web"), "memory.current_bytes") + (16 << 20);
    std::fs::write(directory.join(file), used.to_string()).expect("lowered");
    serve.ask("POST", "/vms/web/resume", None);
    let ended = serve.wait_state("web", "ended");
    let how = ended["end"].as_str().expect("how");
    assert!(how.contains("killed by the host: its cgroup was full"), "{how}");
}

/// A VM costs what it is charged, in user space and, where that can be measured, in the kernel: when it idles (with four vCPUs too), when its
/// guest has touched half of its RAM, and when it uses nearly all of it and has given a page of each block to its balloon, so
/// that every page has a record of its own; and when it uses more than its limit.
/// Semantics: 11.
#[test]
fn what_a_vm_costs_is_what_it_is_charged() {
    if skipped("cost") {
        return;
    }
    let serve = with_cgroups().unwrap_or_else(|| Serve::start(&[]));
    let mut config = shell();
    config["memory"] = json!({ "size_bytes": 160 << 20, "max_bytes": 200 << 20 });
    let given: Vec<_> = (4..158).step_by(2).collect();
    let gifts: Vec<_> = given.iter().map(|mib| format!("balloon inflate {mib}M 4096")).collect();
    // What is left of a huge page that was split gets its table with the next touch.
    let full = format!(
        "touch 4M 154M seed=1; balloon init; {}; touch 4100K 153M stride=2M mode=read; shell",
        gifts.join("; ")
    );
    let evicted = "touch 4M 120M seed=1; verify 4M 120M seed=1; shell";
    for (name, cpus, cmdline, guest_mib, gifts) in [
        ("idle", 1, "shell", 0, 0),
        ("wide", 4, "shell", 0, 0),
        ("half", 1, "touch 4M 80M seed=1; shell", 80, 0),
        ("full", 1, &full, 150, given.len() as u64),
        ("evicted", 1, evicted, 60, 0),
    ] {
        if name == "evicted" {
            // A third of what it uses is in the store, which is no overhead.
            (config["memory"]["max_bytes"], config["memory"]["swap_max_bytes"]) = ((80 << 20).into(), json!(null));
        }
        (config["cpus"], config["cmdline"]) = (cpus.into(), cmdline.into());
        serve.create_with(name, &config);
        wait_until("the guest has done its work", 60, || {
            let vm = serve.show(name);
            let touched = number(&vm, "memory.stat.guest_bytes") >= guest_mib << 20;
            (touched && number(&vm, "memory.stat.ballooned_bytes") == gifts * 4096).then_some(())
        });
        // What is charged before it exists comes when each vCPU has run for the first time.
        let mut seen = Vec::new();
        wait_until("it costs what it is charged", 10, || {
            let vm = serve.show(name);
            let figures = ["user_bytes", "kernel_bytes"].map(|of| {
                let charged = number(&vm, &format!("overhead.accounted.{of}"));
                (of, charged, vm["overhead"]["measured"][of].as_u64())
            });
            if seen != figures {
                println!("{name}: of, charged, measured: {figures:?}");
                seen = figures.to_vec();
            }
            let fits = |(_, charged, measured): &(_, u64, Option<u64>)| {
                // Without a cgroup nobody can say what the kernel uses.
                measured.is_none_or(|measured| charged.abs_diff(measured) * 10 <= measured)
            };
            figures.iter().all(fits).then_some(())
        });
    }
}

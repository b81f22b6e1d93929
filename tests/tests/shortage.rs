//! A host that runs short of memory: here a small one, which is a cgroup that the controller and its VMs live in.

use std::fs;

use ballast_tests::serve::{Console, Serve, is_alive, pid};
use ballast_tests::small::SmallHost;
use ballast_tests::{number, payload, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// The memory of the small host: short below 64 MiB, not above 96 MiB, critical below 32 MiB.
const HOST: u64 = 384 * MIB;

/// A charged guest without a limit, and its console.
fn guest(serve: &Serve, name: &str, memory: &Value, oom: &Value) -> (u32, Console) {
    let mut all = json!({ "size_bytes": 256 * MIB, "track": true, "ageing_s": 1 });
    all.as_object_mut().expect("an object").extend(memory.as_object().expect("an object").clone());
    let config = json!({ "kernel": payload(), "cmdline": "shell", "debug_port": true, "memory": all, "oom": oom });
    let view = serve.create_with(name, &config);
    let console = Console::of(&view);
    console.expect("READY", 20);
    (pid(&view), console)
}

/// Lets a guest touch memory from 16 MiB on, as much as the host has, until it is `enough`.
fn fill(serve: &Serve, console: &mut Console, enough: impl Fn() -> bool) {
    let mut from = 16;
    wait_until("the host has got enough", 60, || {
        if enough() {
            return Some(());
        }
        let more = serve.host().expect("a small one").room() / MIB;
        if more > 0 {
            console.ok(&format!("touch {from}M {more}M seed=1"));
            from += more;
        }
        None
    });
}

/// What the kernel adds to the share of memory that a process has, when it looks for somebody to end.
fn oom_score(pid: u32) -> i16 {
    let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("a process");
    text.trim().parse().expect("a number")
}

/// A budget in per cent is of what a controller in a small cgroup has, not of what the host has.
#[test]
fn a_share_for_a_budget_is_of_the_cgroup_that_the_controller_lives_in() {
    let Some(small) = SmallHost::make_or_skip("shortage-budget", HOST) else { return };
    let serve = Serve::start_on(small, &["--budget", "50%"]);
    let root = serve.ask("GET", "/groups/", None).1;
    assert_eq!(number(&root, "memory.max_bytes"), HOST / 2, "{root}");
}

/// Memory that nobody uses goes before anybody has to be chosen: the host has enough again, every guest lives, and every byte is
/// there.
/// Semantics: 41.
#[test]
fn a_host_that_runs_short_gets_the_cold_memory_of_its_vms() {
    let Some(small) = SmallHost::make_or_skip("shortage-cold", HOST) else { return };
    let serve = Serve::start_on(small, &[]);
    let swap = json!({ "swap_max_bytes": null });
    let mut guests: Vec<_> = ["a", "b"].map(|name| guest(&serve, name, &swap, &json!({}))).into();
    guests[0].1.ok("touch 16M 150M seed=1");
    // It may be over again before the guest has touched what it was told to.
    fill(&serve, &mut guests[1].1, || !serve.told("pressure_entered").is_empty());
    let left = wait_until("it is not any more", 60, || serve.told("pressure_left").pop());
    assert!(number(&left, "available_bytes") >= number(&left, "leave_bytes"), "{left}");
    let swapped: u64 = ["a", "b"].map(|name| number(&serve.show(name), "swap.current_bytes")).iter().sum();
    assert!(swapped >= 16 * MIB, "{swapped}");
    assert_eq!(serve.told("victim_selected"), Vec::<Value>::new());
    guests[0].1.ok("verify 16M 20M seed=1");
}

/// Where nothing can be evicted one VM goes, the one that the rules choose, and the others live.
/// Semantics: 47, 74.
#[test]
fn a_host_that_stays_short_loses_the_vm_that_the_rules_choose() {
    let Some(small) = SmallHost::make_or_skip("shortage-kill", HOST) else { return };
    let serve = Serve::start_on(small, &[]);
    let oom = |preference: &str| json!({ "action": "kill", "preference": preference });
    let none = json!({ "swap_max_bytes": 0 });
    let mut spared = guest(&serve, "spared", &none, &oom("omit"));
    let mut chosen = guest(&serve, "chosen", &none, &oom("none"));
    let mut small_one = guest(&serve, "small", &none, &oom("none"));
    spared.1.ok("touch 16M 180M seed=1");
    small_one.1.ok("touch 16M 16M seed=1");
    // What is held ahead of need comes back first.
    fill(&serve, &mut chosen.1, || !serve.told("victim_selected").is_empty());
    let victim = serve.told("victim_selected").pop().expect("chosen");
    assert_eq!((&victim["vm"], &victim["action"]), (&json!("chosen"), &json!("kill")), "{victim}");
    assert_eq!(victim["ranked"].as_array().map(Vec::len), Some(3), "{victim}");
    // Should the kernel have to act before we do, it takes them in the same order.
    assert!(oom_score(small_one.0) > 0 && oom_score(spared.0) == 0);
    wait_until("the host has memory again", 60, || serve.told("pressure_left").pop());
    assert_eq!((oom_score(small_one.0), oom_score(spared.0)), (0, 0), "like any other process");
    let decision = wait_until("its memory is back", 20, || {
        let (_, log) = serve.ask("GET", "/oom/log", None);
        Some(log["decisions"][0].clone()).filter(|decision| decision["outcome"] == "freed")
    });
    assert_eq!(decision["number"], victim["decision"], "{decision}");
    assert!(number(&decision, "freed_bytes") >= 60 * MIB && number(&decision, "took_ms") < 10_000, "{decision}");
    let (table, reason) = (serve.verb(&["oom", "log"]).stdout, decision["why"].as_str().expect("a sentence"));
    let table = String::from_utf8(table).expect("text");
    assert!(table.contains(" available  chosen  kill ") && table.ends_with(&format!("  {reason}\n")), "{table}");
    assert!(!is_alive(chosen.0) && is_alive(spared.0) && is_alive(small_one.0));
    assert_eq!(serve.show("chosen")["state"], "ended");
    let why = |name: &str| String::from_utf8(serve.verb(&["why", name]).stdout).expect("text");
    let (of_chosen, of_spared) = (why("chosen"), why("spared"));
    for part in [
        "the policy killed it, 1st in the list: ",
        "; spared was spared: its preference is omit",
        "`ballast start chosen`",
    ] {
        assert!(of_chosen.contains(part), "{part:?} is not in\n{of_chosen}");
    }
    let part = "the policy killed chosen, not this one, which was spared: its preference is omit";
    assert!(of_spared.contains(part), "{part:?} is not in\n{of_spared}");
    let (_, facts) = serve.ask("GET", "/vms/chosen/why", None);
    assert_eq!(facts["decisions"][0]["number"], victim["decision"], "{facts}");
    assert_eq!(facts["story"].as_array().map(Vec::len), Some(of_chosen.lines().count()), "{of_chosen}");
    spared.1.ok("verify 16M 180M seed=1");
    assert_eq!(serve.told("victim_selected").len(), 1, "one was enough");
}

/// A kernel that does not say how long tasks wait for memory: what is available decides alone, and the log says so.
/// Semantics: 47.
#[test]
fn without_psi_available_memory_decides_alone() {
    let Some(small) = SmallHost::make_or_skip("shortage-psi", HOST) else { return };
    let serve = Serve::start_on(small.without("/proc/pressure/memory"), &["--log", "info"]);
    let log = fs::read_to_string(serve.place().join("log")).expect("a log");
    assert_eq!(log.matches("available memory decides alone").count(), 1, "{log}");
    let none = json!({ "swap_max_bytes": 0 });
    let mut spared = guest(&serve, "spared", &none, &json!({ "preference": "omit" }));
    let mut chosen = guest(&serve, "chosen", &none, &json!({ "action": "kill" }));
    spared.1.ok("touch 16M 150M seed=1");
    fill(&serve, &mut chosen.1, || !serve.told("victim_selected").is_empty());
    let entered = serve.told("pressure_entered").pop().expect("told");
    assert_eq!(entered["short"], "available", "{entered}");
    wait_until("the host has memory again", 60, || serve.told("pressure_left").pop());
    assert_eq!(serve.told("victim_selected").len(), 1, "one was enough");
    assert!(!is_alive(chosen.0) && is_alive(spared.0));
    spared.1.ok("verify 16M 150M seed=1");
}

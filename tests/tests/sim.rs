//! `ballast sim` and `ballast record`: what a simulation writes, and that a recorded controller can be played again.

use std::fs;
use std::process::{Command, Output};

use ballast_tests::serve::{Console, Serve, program};
use ballast_tests::{ballast, payload, skipped};
use memcg_core::sim::rules::RULES;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn sim(words: &[&str]) -> Output {
    Command::new(ballast()).arg("sim").args(words).output().expect("ballast runs")
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// The same words give the same files to the byte; each policy and host has its lines.
#[test]
fn a_simulation_is_the_same_each_time() {
    let place = tempfile::tempdir().expect("a directory");
    let run = |name: &str| {
        let [csv, svg] = ["csv", "svg"].map(|kind| place.path().join(format!("{name}.{kind}")).display().to_string());
        let policies = "proportional,no-idle-tax,priority-only";
        let words = ["--scenario", "mixed", "--vms", "60", "--hosts", "3", "--duration", "20m", "--seed", "5"];
        let more = ["--policy", policies, "--csv", &csv, "--svg", &svg, "--events"];
        let text = out(&sim(&[&words[..], &more[..]].concat()));
        [text, fs::read_to_string(csv).expect("written"), fs::read_to_string(svg).expect("written")]
    };
    let [text, csv, svg] = run("once");
    assert_eq!([text.clone(), csv.clone(), svg.clone()], run("again"));
    assert_eq!(csv.lines().count(), 1 + 3 * 3 * 21);
    assert!(svg.starts_with("<svg"));
    for policy in ["proportional", "no-idle-tax", "priority-only"] {
        assert!(text.contains(&format!("\n{policy}")) && svg.contains(policy), "{text}");
    }
}

/// Each line of the table of rules can be seen, and ends well.
#[test]
fn each_rule_can_be_played_by_its_name() {
    let list = out(&sim(&["--scenario", "list"]));
    for rule in RULES {
        assert!(list.contains(rule.id), "{}", rule.id);
        assert!(out(&sim(&["--scenario", rule.id])).starts_with(rule.says), "{}", rule.id);
    }
}

/// What cannot be simulated is said in one sentence.
#[test]
fn what_cannot_be_simulated_is_said() {
    let place = tempfile::tempdir().expect("a directory");
    let bad = place.path().join("bad");
    fs::write(&bad, "nonsense\n").expect("written");
    let bad = bad.display().to_string();
    for (words, part) in [
        (&["--scenario", "none"][..], "there is no scenario \"none\""),
        (&[][..], "TRACE"),
        (&[bad.as_str()][..], "line 1: expected"),
        (&["/proc/none"][..], "/proc/none: No such file"),
        (&["--scenario", "idle", "--policy", "worst"][..], "worst"),
        (&["--scenario", "idle", "--vms", "5", "--duration", "1m", "--csv", "/proc/none/x"][..], "cannot be written"),
    ] {
        let output = sim(words);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(part) && error.lines().count() == 1, "{words:?}: {error}");
    }
}

/// A controller is recorded while a guest grows; played again, the VM of the trace has grown as far, under the same limits.
#[test]
fn a_recorded_controller_is_played_again() {
    if skipped("record") {
        return;
    }
    let serve = Serve::start(&[]);
    serve.ask("PUT", "/groups/gold", Some(&json!({ "max_bytes": 512 * MIB })));
    let config = json!({
        "kernel": payload(), "cmdline": "shell", "debug_port": true, "group": "/gold",
        "memory": { "size_bytes": 256 * MIB, "max_bytes": 200 * MIB, "track": true, "ageing_s": 1 },
        "oom": { "action": "kill", "priority": 7 },
    });
    let view = serve.create_with("grows", &config);
    let mut console = Console::of(&view);
    console.expect("READY", 20);
    let trace = serve.place().join("trace");
    let path = trace.display().to_string();
    let mut record = program(&["record", "--every", "100ms", &path], serve.place()).spawn().expect("ballast runs");
    let moments = |least: usize| {
        ballast_tests::wait_until("moments", 20, || {
            let text = fs::read_to_string(&trace).unwrap_or_default();
            (text.matches("{\"at\"").count() >= least).then_some(text)
        })
    };
    moments(2);
    console.send("touch 16M 100M seed=1");
    console.expect("OK", 60);
    // Its worker has nothing to say any more: neither what it has taken from its stock nor that its guest rests.
    let used = |line: &str| {
        let line = serde_json::from_str::<Value>(line).ok()?;
        let used = &line["at"]["vms"]["grows"];
        Some([used[0].as_u64()?, used[1].as_u64()?])
    };
    ballast_tests::wait_until("all of it is recorded, and that it is idle", 20, || {
        let text = fs::read_to_string(&trace).unwrap_or_default();
        let is_idle = |[bytes, hot]: [u64; 2]| bytes >= 100 * MIB && hot < 16 * MIB;
        text.lines().filter_map(used).any(is_idle).then_some(())
    });
    ballast_tests::serve::kill(record.id(), libc::SIGTERM);
    assert!(record.wait().expect("it ends").success());

    let text = fs::read_to_string(&trace).expect("written");
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(lines[0]["host"]["version"], 1);
    let group = lines.iter().find_map(|line| line.get("group")).expect("a group");
    assert_eq!(group, &json!({ "path": "/gold", "limits": { "max_bytes": 512 * MIB } }));
    let vm = lines.iter().filter_map(|line| line.get("vm")).next_back().expect("a VM");
    assert_eq!((&vm["group"], &vm["limits"]["max_bytes"]), (&json!("/gold"), &json!(200 * MIB)));
    assert_eq!((&vm["action"], &vm["priority"]), (&json!("kill"), &json!(7)));
    let footprints: Vec<u64> = lines.iter().filter_map(|line| line["at"]["vms"]["grows"][0].as_u64()).collect();
    let (first, last) = (footprints[0], footprints[footprints.len() - 1]);
    assert!(last >= first + 100 * MIB && last < 200 * MIB, "{footprints:?}");

    let csv = serve.place().join("csv").display().to_string();
    out(&sim(&[&path, "--every", "1s", "--csv", &csv]));
    let csv = fs::read_to_string(csv).expect("written");
    let used: u64 = csv.lines().next_back().and_then(|line| line.split(',').nth(4)?.parse().ok()).expect("a number");
    assert!(used >= last && used < last + 64 * MIB, "{used}, recorded were {last}");
}

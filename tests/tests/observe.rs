//! Looking at a host: metrics, pressure, the overview, the invariants, the ranking.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use ballast_tests::openmetrics;
use ballast_tests::serve::{Serve, program, shell};
use ballast_tests::{number, skip, skipped, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A guest that asks for more than it may have, and is held for as long as anybody lets it.
fn hungry() -> Value {
    let mut config = shell();
    config["cmdline"] = "touch 8M 48M; wait 1000000000".into();
    config["memory"]["max_bytes"] = json!(24 * MIB);
    config["oom"] = json!({ "deadline_ms": 3_600_000 });
    config
}

/// Whoever watches is told that nobody is left to watch.
#[test]
fn following_the_events_ends_with_an_error_when_the_controller_goes() {
    if skipped("events-follow") {
        return;
    }
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let serve = Serve::start(&[]);
        serve.create("web");
        let mut watch = program(&["events", "-f"], serve.place());
        let mut watch = watch.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("ballast starts");
        let mut first = String::new();
        let mut events = BufReader::new(watch.stdout.take().expect("piped"));
        events.read_line(&mut first).expect("an event");
        assert!(first.contains("web"), "{first}");
        serve.signal(signal);
        // To its end, so that nothing keeps it from ending.
        std::io::copy(&mut events, &mut std::io::sink()).expect("readable");
        let ended = watch.wait_with_output().expect("it ends");
        let err = String::from_utf8_lossy(&ended.stderr);
        assert_eq!((ended.status.code(), err.lines().count()), (Some(1), 1), "{err}");
        assert!(err.contains("ballast.sock has ended, and with it its events"), "{err}");
    }
}

#[test]
fn a_vm_that_is_held_has_pressure_and_one_that_is_not_has_none() {
    if skipped("pressure") {
        return;
    }
    let serve = Serve::start(&[]);
    serve.create("calm");
    let (status, made) = serve.ask("PUT", "/groups/gold", Some(&json!({})));
    assert_eq!(status, 201, "{made}");
    let mut config = hungry();
    config["group"] = "/gold".into();
    serve.create_with("hungry", &config);
    let pressed = wait_until("an average rises", 90, || {
        let (_, overview) = serve.ask("GET", "/overview?events=5", None);
        let vm = |name: &str| overview["vms"].as_array()?.iter().find(|vm| vm["name"] == name).cloned();
        let (calm, hungry) = (vm("calm")?, vm("hungry")?);
        assert_eq!(number(&calm, "pressure.some.total_us"), 0, "{calm}");
        assert!(overview["events"].as_array()?.len() <= 5);
        let avg10 = hungry["pressure"]["full"]["avg10"].as_f64()?;
        (avg10 > 10.0).then_some((hungry, overview["groups"][0]["pressure"].clone()))
    });
    let (hungry, host) = pressed;
    assert_eq!(hungry["held"]["now"], true, "{hungry}");
    assert!(host["some"]["avg10"].as_f64().unwrap() > 10.0 && host["full"]["avg10"] == 0.0, "{host}");
    let (_, gold) = serve.ask("GET", "/groups/gold", None);
    assert!(gold["pressure"]["full"]["avg10"].as_f64().unwrap() > 10.0, "nobody else is in it: {gold}");
    // What the worker has measured and what the controller has seen are the same, but for the way between them.
    let fresh = serve.show("hungry");
    let (measured, seen) = (number(&fresh, "held.total_us"), number(&fresh, "pressure.full.total_us"));
    assert!(measured.abs_diff(seen) < 1_000_000, "{measured} and {seen} us");
    let (status, text) = serve.raw("GET", "/overview?events=x", None);
    assert_eq!(status, 400, "{text}");
}

/// The metrics that a document names, each with the labels that it wants to be equal to something.
fn expressions(text: &str) -> Vec<(String, Vec<String>)> {
    let metric = |(start, _)| {
        let rest: &str = &text[start..];
        let end = rest.find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap_or(rest.len());
        let selector =
            rest[end..].strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(inner, _)| inner);
        let labels = selector.split(',').filter(|label| label.contains('=') && !label.contains("!="));
        (rest[..end].to_owned(), labels.map(str::to_owned).collect())
    };
    let found: Vec<_> = text.match_indices("ballast_").map(metric).collect();
    assert!(found.len() > 10, "{found:?}");
    found
}

#[test]
fn metrics_are_what_a_collector_reads() {
    if skipped("metrics") {
        return;
    }
    let serve = Serve::start(&["--budget", "1G"]);
    let read = || {
        let (status, text) = serve.raw("GET", "/metrics", None);
        assert_eq!(status, 200, "{text}");
        openmetrics::parse(&text).unwrap_or_else(|error| panic!("{error} in\n{text}"))
    };
    let empty = read();
    assert_eq!(empty["ballast_vms"].series[""], 0.0);
    assert_eq!(empty["ballast_memory_limit_bytes"].series[r#"group="/",kind="max""#], (1 << 30) as f64);
    serve.create("web");
    // A VM that runs may not have touched anything yet.
    wait_until("its guest waits for words", 10, || {
        serve.raw("GET", "/vms/web/console", None).1.contains("READY").then_some(())
    });
    // Its worker's numbers are known once it has been asked.
    let view = serve.show("web");
    let metrics = read();
    let web = |family: &str, labels: &str| {
        let series = &metrics[family].series;
        *series.get(&format!("{labels}vm=\"web\"")).unwrap_or_else(|| panic!("{family} has no {labels} in {series:?}"))
    };
    assert_eq!(web("ballast_vmm_current_bytes", ""), number(&view, "vmm.current_bytes") as f64);
    assert_eq!(web("ballast_memory_limit_bytes", "kind=\"max\","), (48 * MIB) as f64);
    assert!(!metrics["ballast_memory_limit_bytes"].series.contains_key("kind=\"high\",vm=\"web\""), "there is none");
    assert_eq!(web("ballast_vm", "group=\"/\","), 1.0);
    assert_eq!(web("ballast_vm_state", "state=\"running\","), 1.0);
    assert_eq!(metrics["ballast_events"].series["event=\"created\""], 1.0);
    assert!(web("ballast_faults", "kind=\"all\",") > 0.0);
    assert!(metrics["ballast_guest_stats_age_seconds"].series.is_empty(), "the guest has no driver");
    for (name, labels) in expressions(include_str!("../../docs/operations.md")) {
        let family = metrics.get(name.trim_end_matches("_total").trim_end_matches("_bucket"));
        let family = family.unwrap_or_else(|| panic!("docs/operations.md asks for {name}, which is not there"));
        for label in labels {
            assert!(family.series.keys().any(|series| series.contains(&label)), "{name} has no {label}: {family:?}");
        }
    }
    // Everything that a VM has is there once, and a VM that has ended has nothing.
    let (status, _) = serve.ask("POST", "/vms/web/kill", None);
    assert_eq!(status, 200);
    let after = read();
    let left: Vec<_> = after.values().flat_map(|family| family.series.keys()).filter(|s| s.contains("web")).collect();
    assert!(left.is_empty(), "{left:?}");
    assert_eq!(after["ballast_events"].series["event=\"killed\""], 1.0);
}

/// The findings of `GET /check`, by name: whether it holds, and the sentence.
fn findings(view: &Value) -> Vec<(String, bool, String)> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let finding = |f: &Value| (text(&f["name"]), f["ok"] == true, text(&f["message"]));
    view["invariants"].as_array().expect("findings").iter().map(finding).collect()
}

#[test]
fn check_looks_at_a_running_host_and_finds_what_is_wrong_with_it() {
    if skipped("check") {
        return;
    }
    let serve = Serve::start(&["--budget", "1G"]);
    serve.create("calm");
    serve.create_with("hungry", &hungry());
    let busy = json!({
        "kernel": shell()["kernel"], "cmdline": "storm", "debug_port": true,
        "memory": { "size_bytes": 64 * MIB, "max_bytes": 80 * MIB },
    });
    serve.create_with("busy", &busy);
    let (status, view) = serve.ask("GET", "/check", None);
    assert_eq!((status, &view["ok"]), (200, &true.into()), "{view:#}");
    let names: Vec<_> = findings(&view).into_iter().map(|(name, ..)| name).collect();
    let all = "limits overhead sums counters nodes charges parts resident workers strangers sandbox untracked audit";
    assert_eq!(names.join(" "), all);
    let said = |view: &Value, name: &str| findings(view).into_iter().find(|(n, ..)| n == name).expect("there").2;
    assert!(said(&view, "workers").starts_with("3 VMs"), "{view:#}");
    let output = serve.verb(&["check"]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && text.contains("ok     resident"), "{text}");

    // A page that nobody was charged for: the worker's RAM gets one behind its back.
    let calm = serve.show("calm");
    let (pid, slot) = (number(&calm, "pid"), &calm["ram"][0]);
    let last = number(slot, "hva") + number(slot, "bytes") - 4096;
    let stolen = std::fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/mem"));
    let written = stolen.and_then(|mem| std::os::unix::fs::FileExt::write_all_at(&mem, &[1], last));
    if let Err(error) = written {
        // With userfaultfd the host's own access is refused, and cannot make a page.
        skip("check-stolen-page", error);
    } else {
        let (_, view) = serve.ask("GET", "/check", None);
        let resident = said(&view, "resident");
        assert!(view["ok"] == false && resident.starts_with("calm: "), "{view:#}");
        let output = serve.verb(&["check"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&output.stdout).contains("WRONG  resident"));
    }
}

#[test]
fn the_ranking_is_a_dry_run_with_every_term() {
    if skipped("rank") {
        return;
    }
    let serve = Serve::start(&[]);
    for (name, oom) in [
        ("precious", json!({ "action": "kill", "preference": "omit" })),
        ("late", json!({ "action": "kill", "priority": 5 })),
        ("first", json!({ "action": "kill", "priority": -5 })),
        ("kept", json!({ "action": "kill", "preference": "avoid" })),
    ] {
        let mut config = shell();
        config["oom"] = oom;
        serve.create_with(name, &config);
    }
    let (status, view) = serve.ask("GET", "/oom/rank", None);
    assert_eq!(status, 200, "{view}");
    let order: Vec<_> = view["candidates"].as_array().unwrap().iter().map(|c| c["vm"].as_str().unwrap()).collect();
    assert_eq!(order, ["first", "late", "kept", "precious"], "{view:#}");
    let first = &view["candidates"][0];
    assert_eq!((&first["rank"], &first["priority"], &first["group"]), (&1.into(), &(-5).into(), &"/".into()));
    assert_eq!(number(first, "usage_bytes"), number(&serve.show("first"), "memory.current_bytes"));
    assert_eq!(number(first, "frees_bytes"), number(first, "usage_bytes"), "a kill frees all");
    assert_eq!(view["candidates"][3]["spared"], "omit");
    assert!(first["why"].as_str().unwrap().starts_with("first: "), "{first}");
    assert_eq!(serve.names().len(), 4, "nothing was done");
    let text = String::from_utf8(serve.verb(&["oom", "rank"]).stdout).unwrap();
    assert!(text.contains("4. precious: spared: its preference is omit"), "{text}");
    for (path, expected) in [("/oom/rank?group=/none", 404), ("/oom/rank?group=none", 400), ("/oom/rank?grp=/", 400)] {
        assert_eq!(serve.raw("GET", path, None).0, expected, "{path}");
    }
    assert_eq!(serve.raw("GET", "/oom/rank?group=/first", None).0, 404, "a VM is no group");
    assert_eq!(serve.verb(&["oom", "rank", "gold"]).status.code(), Some(2));
}

//! `stop` and `start`: guests that end when they are asked to, those that do not, and VMs that run again.

use ballast_tests::serve::{Serve, is_alive, pid, shell};
use ballast_tests::{TestVm, skipped, wait_until};
use serde_json::{Value, json};

/// A guest that waits for ever and hears nothing.
fn deaf() -> Value {
    let mut config = shell();
    config["cmdline"] = json!("park");
    config
}

#[test]
fn a_guest_ends_when_it_is_asked_to_and_is_killed_when_it_does_not() {
    if skipped("stop") {
        return;
    }
    let serve = Serve::start(&[]);
    for name in ["hears", "paused"] {
        serve.create(name);
    }
    assert_eq!(serve.ask("POST", "/vms/paused/pause", None).0, 200);
    for name in ["hears", "paused"] {
        let (status, stopped) = serve.ask("POST", &format!("/vms/{name}/stop"), None);
        assert_eq!(
            (status, &stopped["killed"], &stopped["vm"]["state"]),
            (200, &json!(false), &json!("ended")),
            "{stopped}"
        );
        assert_eq!(stopped["vm"]["end"], "the guest ended with status 0");
    }
    let view = serve.create_with("deaf", &deaf());
    let (status, stopped) = serve.ask("POST", "/vms/deaf/stop?timeout_ms=100", None);
    assert_eq!((status, &stopped["killed"]), (200, &json!(true)), "{stopped}");
    assert_eq!(stopped["vm"]["end"], "it was killed: it did not power itself off in time");
    assert!(!is_alive(pid(&view)));
    assert_eq!(serve.ask("POST", "/vms/deaf/stop", None).1["killed"], false, "it has ended already");
    for (query, part) in
        [("?timeout_ms=-1", "the query"), ("?timeout=1", "the query"), ("?timeout_ms=86400001", "a day")]
    {
        let (status, refusal) = serve.ask("POST", &format!("/vms/deaf/stop{query}"), None);
        assert_eq!((status, &refusal["code"]), (400, &json!("bad_request")), "{query}: {refusal}");
        assert!(refusal["message"].as_str().is_some_and(|text| text.contains(part)), "{query}: {refusal}");
    }
    assert_eq!(serve.ask("POST", "/vms/none/stop", None).0, 404);
}

#[test]
fn a_vm_that_has_ended_runs_again_as_it_was() {
    if skipped("start") {
        return;
    }
    let serve = Serve::start(&[]);
    let mut config = shell();
    config["memory"]["max_bytes"] = json!(40 << 20);
    let first = serve.create_with("web", &config);
    let (status, same) = serve.ask("POST", "/vms/web/start", None);
    assert_eq!((status, pid(&same)), (200, pid(&first)), "it runs already");
    serve.ask("POST", "/vms/web/kill", None);
    let (status, again) = serve.ask("POST", "/vms/web/start", None);
    assert_eq!((status, &again["state"]), (201, &json!("running")), "{again}");
    assert_ne!(pid(&again), pid(&first));
    assert_eq!(again["memory"]["max_bytes"], config["memory"]["max_bytes"]);
    assert_eq!(serve.names(), ["web"]);
    serve.ask("DELETE", "/vms/web", None);
    assert_eq!(serve.ask("POST", "/vms/web/start", None).0, 404, "it was forgotten");
}

#[test]
fn verbs_take_several_names_and_do_nothing_unless_all_are_known() {
    if skipped("stop-verbs") {
        return;
    }
    let mut serve = Serve::start(&[]);
    for name in ["a", "b", "c"] {
        serve.create(name);
    }
    serve.create_with("deaf", &deaf());
    let state = |name: &str| serve.show(name)["state"].as_str().expect("a state").to_owned();
    let verb = |words: &[&str]| {
        let output = serve.verb(words);
        (output.status.code(), String::from_utf8(output.stderr).expect("text"))
    };
    assert_eq!(verb(&["pause", "a", "b"]), (Some(0), String::new()));
    assert_eq!((state("a"), state("b"), state("c")), ("paused".into(), "paused".into(), "running".into()));
    assert_eq!(verb(&["resume", "a", "b"]), (Some(0), String::new()));
    for word in ["pause", "resume", "kill", "stop", "start", "rm"] {
        let (status, err) = verb(&[word, "a", "none", "b", "nor-this"]);
        assert_eq!(status, Some(1), "{word}");
        for name in ["none", "nor-this"] {
            assert!(err.contains(&format!("there is no VM named {name:?}")), "{word}: {err}");
        }
        assert_eq!((state("a"), state("b")), ("running".into(), "running".into()), "{word} does nothing by halves");
    }
    let (status, err) = verb(&["stop", "a", "b", "deaf", "--timeout", "100ms"]);
    assert_eq!(status, Some(0), "{err}");
    assert!(err.contains("ballast: deaf did not power itself off and was killed\n"), "{err}");
    for name in ["a", "b", "deaf"] {
        assert_eq!(state(name), "ended", "{name}");
    }
    assert_eq!(verb(&["start", "a", "b"]), (Some(0), String::new()));
    assert_eq!((state("a"), state("b")), ("running".into(), "running".into()));
    assert_eq!(verb(&["kill", "a", "b"]), (Some(0), String::new()));
    // One that cannot be done keeps no other from being done.
    assert_eq!((verb(&["pause", "a", "c"]).0, state("c")), (Some(1), "paused".into()));
    assert_eq!(verb(&["resume", "c"]), (Some(0), String::new()));
    let (status, err) = verb(&["stop", "c", "x/y", "u/v"]);
    assert!(status == Some(2) && err.contains("x/y") && err.contains("u/v"), "{err}");
    assert_eq!(state("c"), "running", "nothing is done when a word makes no sense");
    assert_eq!(verb(&["rm", "a", "b", "deaf"]), (Some(0), String::new()));
    assert_eq!(serve.names(), ["c"]);

    // Everybody at once, within one deadline: two that hear nothing take no longer than one.
    for name in ["x", "y"] {
        serve.create_with(name, &deaf());
    }
    let begin = std::time::Instant::now();
    serve.signal(libc::SIGTERM);
    assert_eq!(serve.wait(18).code(), Some(0));
    let took = begin.elapsed();
    assert!(took >= ballast_tests::deadline(10), "they had their time: {took:?}");
}

#[test]
fn the_vm_of_a_run_is_stopped_like_any_other() {
    if skipped("stop-run") {
        return;
    }
    let mut vm = TestVm::builder("one").memory("size=64M,max=48M").cmdline("shell").start();
    vm.expect("READY", 10);
    let (status, stopped) = vm.post("stop");
    assert_eq!((status, &stopped["killed"]), (200, &json!(false)), "{stopped}");
    assert_eq!(vm.wait(10).code(), Some(0), "{}", vm.errors());
    let mut vm = TestVm::builder("one").memory("size=64M,max=48M").cmdline("park").start();
    wait_until("it runs", 10, || vm.try_show().filter(|now| now["state"] == "running"));
    assert_eq!(vm.post("stop?timeout_ms=50").1["killed"], true);
    assert_eq!(vm.wait(10).code(), Some(137));
    assert!(vm.errors().contains("did not power itself off in time"));
}

/// Who has no patience with guests that hear nothing asks a second time.
#[test]
fn a_second_signal_kills_what_has_not_ended_yet() {
    if skipped("stop-twice") {
        return;
    }
    let mut serve = Serve::start(&[]);
    let workers = ["x", "y"].map(|name| pid(&serve.create_with(name, &deaf())));
    serve.create("hears");
    let begin = std::time::Instant::now();
    serve.signal(libc::SIGTERM);
    wait_until("it is stopping", 10, || (serve.show("hears")["state"] == "ended").then_some(()));
    assert!(workers.iter().all(|pid| is_alive(*pid)), "they have their time");
    serve.signal(libc::SIGINT);
    assert_eq!(serve.wait(10).code(), Some(0));
    assert!(begin.elapsed() < ballast_tests::deadline(10), "nobody waited for the deaf: {:?}", begin.elapsed());
    assert!(!workers.iter().any(|pid| is_alive(*pid)));
}

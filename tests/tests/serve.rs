//! `ballast serve`: many VMs of the real program under one controller.

use std::path::PathBuf;
use std::process::Output;

use ballast_tests::serve::{Serve, is_alive, kill, pid, shell};
use ballast_tests::{TestVm, ballast, bare, enough, number, payload, skipped, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Semantics: 81, 98.
#[test]
fn three_vms_share_a_budget_and_one_that_is_killed_takes_no_other_with_it() {
    if skipped("serve-fleet") {
        return;
    }
    let mut serve = Serve::start(&["--budget", "24M"]);
    let views: Vec<_> = ["a", "b", "c"].map(|name| serve.create(name)).into();
    for name in ["a", "b", "c"] {
        wait_until("it has printed", 10, || {
            let (status, text) = serve.raw("GET", &format!("/vms/{name}/console"), None);
            (status == 200 && text.contains("READY")).then_some(())
        });
    }
    let (_, host) = serve.ask("GET", "/host", None);
    assert_eq!((number(&host, "vms"), number(&host, "budget_bytes")), (3, 24 * MIB));
    assert!(number(&host, "current_bytes") <= 24 * MIB, "{host}");
    let sum: u64 = ["a", "b", "c"].map(|name| number(&serve.show(name), "memory.current_bytes")).iter().sum();
    assert!(sum <= 24 * MIB, "{sum}");

    // What 8 GiB cost beside their pages is more than the whole budget.
    let mut large = shell();
    large["memory"] = json!({ "size_bytes": 8192 * MIB });
    let (status, refusal) = serve.ask("PUT", "/vms/d", Some(&large));
    assert_eq!((status, &refusal["code"]), (409, &json!("overhead_refused")), "{refusal}");
    assert!(refusal["message"].as_str().is_some_and(|text| text.contains("memory.max of / is 24M")), "{refusal}");
    assert_eq!(serve.ask("GET", "/vms/d", None).0, 404, "nothing is left of it");
    // Where there is a budget nobody is outside of it.
    large["memory"] = json!({ "size_bytes": 64 * MIB, "track": false });
    assert_eq!(serve.ask("PUT", "/vms/d", Some(&large)).1["code"], "invalid_limit");
    large["memory"] = json!({ "size_bytes": 64 * MIB });
    assert_eq!(serve.ask("PUT", "/vms/d", Some(&large)).1["accounting"], true);
    assert_eq!(serve.ask("DELETE", "/vms/d", None).0, 204);

    kill(pid(&views[1]), libc::SIGKILL);
    let ended = serve.wait_state("b", "ended");
    assert_eq!(ended["end"], "the worker was killed by the host (signal 9)");
    for name in ["a", "c"] {
        assert_eq!(serve.ask("POST", &format!("/vms/{name}/pause"), None).1["state"], "paused");
        assert_eq!(serve.ask("POST", &format!("/vms/{name}/resume"), None).1["state"], "running");
    }
    wait_until("its memory is back", 10, || (number(&serve.show("b"), "memory.current_bytes") == 0).then_some(()));
    assert_eq!(serve.names(), ["a", "b", "c"], "it is shown until somebody removes it");
    let again = serve.create("b");
    assert_ne!(pid(&again), pid(&views[1]));

    serve.signal(libc::SIGTERM);
    assert_eq!(serve.wait(10).code(), Some(0));
    for view in [&views[0], &views[2], &again] {
        assert!(!is_alive(pid(view)), "{view}");
    }
    let state = std::fs::read_dir(serve.state()).expect("readable").flatten().map(|entry| entry.file_name());
    assert_eq!(state.collect::<Vec<_>>(), ["journal"], "no directory of a VM");
    assert_eq!(serve.left(), [serve.state()], "no socket");
    serve.again();
    assert!(serve.show("a")["end"].is_string(), "it is remembered with how it ended");
    for name in ["a", "b", "c"] {
        assert_eq!(serve.ask("DELETE", &format!("/vms/{name}"), None).0, 204);
    }
    serve.signal(libc::SIGTERM);
    assert_eq!(serve.wait(10).code(), Some(0));
    assert_eq!(serve.left(), [] as [PathBuf; 0], "nothing to remember, nothing is left");
}

#[test]
fn the_same_vm_is_made_once_and_another_of_its_name_is_refused() {
    if skipped("serve-twice") {
        return;
    }
    let serve = Serve::start(&[]);
    let first = serve.create("web");
    let (status, again) = serve.ask("PUT", "/vms/web", Some(&shell()));
    assert_eq!((status, pid(&again)), (200, pid(&first)));
    let mut other = shell();
    other["cpus"] = json!(2);
    let (status, refusal) = serve.ask("PUT", "/vms/web", Some(&other));
    assert_eq!((status, &refusal["code"]), (409, &json!("already_exists")), "{refusal}");
    assert_eq!(pid(&serve.show("web")), pid(&first), "it goes on");

    assert_eq!(serve.ask("DELETE", "/vms/web", None).0, 204);
    assert!(!is_alive(pid(&first)));
    assert_eq!(serve.ask("DELETE", "/vms/web", None).0, 404);
    assert_eq!(serve.names(), [] as [String; 0]);
    let (status, view) = serve.ask("PUT", "/vms/web", Some(&other));
    assert_eq!((status, number(&view, "cpus")), (201, 2), "{view}");
}

/// A guest that ended by itself leaves its end and its last words behind.
#[test]
fn a_guest_that_ends_is_shown_with_how_it_ended() {
    if skipped("serve-ends") {
        return;
    }
    let serve = Serve::start(&[]);
    let mut short = shell();
    short["cmdline"] = json!("exit 7");
    let (status, view) = serve.ask("PUT", "/vms/short", Some(&short));
    assert_eq!(status, 201, "{view}");
    assert_eq!(serve.wait_state("short", "ended")["end"], "the guest ended with status 7");
    assert_eq!(serve.ask("POST", "/vms/short/pause", None).1["code"], "wrong_state");

    // Room for what it costs beside its pages, as the first refusal says, and none for its kernel.
    short["memory"]["max_bytes"] = json!(MIB);
    let (status, refusal) = serve.ask("PUT", "/vms/small", Some(&short));
    assert_eq!((status, &refusal["code"]), (409, &json!("overhead_refused")), "{refusal}");
    let message = refusal["message"].as_str().unwrap_or_default().to_owned();
    short["memory"]["max_bytes"] = json!(bare(&message));
    let (status, refusal) = serve.ask("PUT", "/vms/small", Some(&short));
    assert_eq!((status, &refusal["code"]), (409, &json!("start_failed")), "{refusal}");
    assert!(refusal["message"].as_str().is_some_and(|text| text.contains("or more is needed")), "{refusal}");
    assert_eq!(serve.show("small")["state"], "ended");
    // What the first refusal named is enough for all of that.
    short["memory"]["max_bytes"] = json!(enough(&message));
    let (status, view) = serve.ask("PUT", "/vms/small", Some(&short));
    assert_eq!(status, 201, "{view}");
    assert_eq!(serve.ask("DELETE", "/vms/small", None).0, 204);
}

#[test]
fn what_makes_no_sense_is_refused_and_makes_nothing() {
    if skipped("serve-negative") {
        return;
    }
    let serve = Serve::start(&[]);
    let memory = json!({ "size_bytes": 64 * MIB });
    let with = |key: &str, value: Value| {
        let mut body = shell();
        body[key] = value;
        body.to_string()
    };
    let table = [
        (String::new(), 400, "bad_request"),
        ("[]".to_owned(), 400, "bad_request"),
        ("null".to_owned(), 400, "bad_request"),
        ("{}".to_owned(), 400, "bad_request"),
        (json!({ "kernel": payload() }).to_string(), 400, "bad_request"),
        (json!({ "kernel": "payload.bin", "memory": memory }).to_string(), 400, "bad_request"),
        (json!({ "kernel": "/none", "memory": memory }).to_string(), 400, "bad_request"),
        (json!({ "kernel": "/", "memory": memory }).to_string(), 400, "bad_request"),
        (with("initrd", json!("/none")), 400, "bad_request"),
        (with("cpus", json!(0)), 400, "bad_request"),
        (with("cpus", json!(65)), 400, "bad_request"),
        (with("cpus", json!("1")), 400, "bad_request"),
        (with("frob", json!(1)), 400, "bad_request"),
        (with("oom", json!({ "action": "shoot" })), 400, "bad_request"),
        (with("balloon", json!({ "size_bytes": 1 })), 400, "bad_request"),
        (with("memory", json!({ "size_bytes": 1 })), 400, "invalid_limit"),
        (with("memory", json!({ "size_bytes": 64 * MIB, "max_bytes": 1 })), 400, "invalid_limit"),
        (with("memory", json!({ "size_bytes": 64 * MIB, "max_bytes": 4096, "track": false })), 400, "invalid_limit"),
        (with("memory", json!({ "size_bytes": 64 * MIB, "min_bytes": MIB, "max_bytes": 4096 })), 400, "invalid_limit"),
    ];
    for (body, status, code) in table {
        let of: String = body.chars().take(80).collect();
        let (got, refusal) = serve.raw("PUT", "/vms/web", Some(&body));
        let refusal: Value = serde_json::from_str(&refusal).unwrap_or_else(|error| panic!("{of}: {error}: {refusal}"));
        assert_eq!((got, &refusal["code"]), (status, &json!(code)), "{of}: {refusal}");
    }
    for name in ["..%2fetc", "-web", "a%20b", "%2e%2e"] {
        let (status, refusal) = serve.ask("PUT", &format!("/vms/{name}"), Some(&shell()));
        assert_eq!((status, &refusal["code"]), (400, &json!("bad_request")), "{name}: {refusal}");
    }
    for (method, path, status) in [
        ("GET", "/vms/web", 404),
        ("DELETE", "/vms/web", 404),
        ("GET", "/vms/web/console", 404),
        ("POST", "/vms", 405),
        ("DELETE", "/vms", 405),
        ("PUT", "/vms/web/console", 405),
    ] {
        assert_eq!(serve.ask(method, path, None).0, status, "{method} {path}");
    }
    assert_eq!(serve.names(), [] as [String; 0]);
    let state = std::fs::read_dir(serve.place().join("ballast.d")).expect("readable").flatten();
    let state: Vec<_> = state.map(|entry| entry.file_name()).collect();
    assert_eq!(state, ["journal"]);
}

/// Every verb finds `serve` as it finds a `run`.
#[test]
fn verbs_work_on_the_vms_of_serve() {
    if skipped("serve-verbs") {
        return;
    }
    let mut serve = Serve::start(&[]);
    let kernel = payload();
    let kernel = kernel.to_str().expect("text");
    let create = |name: &str, memory: &str| {
        let words = ["create", name, "--memory", memory, "--cmdline", "shell", "--debug-port", "--kernel", kernel];
        serve.verb(&words)
    };
    let ok = |output: Output| {
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{err}");
        String::from_utf8(output.stdout).expect("text")
    };
    assert_eq!(ok(serve.verb(&["ps"])).lines().count(), 1, "a header");
    for name in ["web", "db"] {
        ok(create(name, "size=64M,max=48M"));
    }
    ok(create("web", "size=64M,max=48M"));
    let refused = create("web", "size=64M,max=40M");
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("runs that was made otherwise"));

    ok(serve.verb(&["set", "web", "memory.max=44M"]));
    ok(serve.verb(&["pause", "web"]));
    let table = ok(serve.verb(&["ps"]));
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "GROUP", "STATE", "CURRENT", "MAX", "%", "VMM", "BALLOON", "PRESSURE", "AGE"]);
    assert_eq!((&lines[1][..3], lines[1][4]), (&["db", "/", "running"][..], "48M"), "{table}");
    assert_eq!((&lines[2][..3], lines[2][4]), (&["web", "/", "paused"][..], "44M"), "{table}");
    let list: Value = serde_json::from_str(&ok(serve.verb(&["ps", "--json"]))).expect("JSON");
    assert_eq!(list.as_array().map(Vec::len), Some(2));
    // Somebody else in the directory who hangs up is named, and hides nobody.
    let odd = std::os::unix::net::UnixListener::bind(serve.place().join("odd.sock")).expect("a socket");
    let hanging_up = std::thread::spawn(move || odd.incoming().take(2).for_each(drop));
    let all = serve.verb(&["ps"]);
    hanging_up.join().expect("it was asked");
    assert_eq!((all.status.code(), String::from_utf8_lossy(&all.stdout).lines().count()), (Some(1), 3));
    assert!(String::from_utf8_lossy(&all.stderr).contains("odd.sock does not answer"), "{all:?}");
    std::fs::remove_file(serve.place().join("odd.sock")).expect("removed");
    ok(serve.verb(&["resume", "web"]));
    assert!(ok(serve.verb(&["show", "web"])).contains("running"));
    let events = ok(serve.verb(&["events", "web"]));
    assert!(events.contains("limit_changed") && !events.contains("db"), "{events}");
    ok(serve.verb(&["kill", "web"]));
    assert!(ok(serve.verb(&["show", "web"])).contains("ended (it was killed on request)"));
    ok(serve.verb(&["rm", "web"]));
    assert_eq!(serve.verb(&["rm", "web"]).status.code(), Some(1));
    assert_eq!(serve.names(), ["db"]);

    let second = serve.verb(&["serve"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("is in use"), "{second:?}");
    serve.signal(libc::SIGINT);
    assert_eq!(serve.wait(10).code(), Some(0));
    let nobody = serve.verb(&["create", "web", "--memory", "size=64M", "--kernel", kernel]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("start `ballast serve`"), "{nobody:?}");
}

/// Two controllers have a VM of one name each. Nothing is done to either until somebody says to which.
#[test]
fn a_name_that_two_vms_have_is_neither_killed_nor_changed_by_chance() {
    if skipped("serve-ambiguous") {
        return;
    }
    let serve = Serve::start(&[]);
    assert_eq!(serve.ask("PUT", "/vms/web", Some(&shell())).0, 201);
    let mut own = TestVm::builder("web").memory("size=64M,max=48M").cmdline("shell").start();
    own.wait_state("running", 10);
    let runtime = tempfile::Builder::new().prefix("ba").tempdir().expect("a temporary directory");
    let sockets = runtime.path().join("ballast");
    std::fs::create_dir(&sockets).expect("made");
    std::os::unix::fs::symlink(serve.socket(), sockets.join("ballast.sock")).expect("made");
    std::os::unix::fs::symlink(own.socket(), sockets.join("web.sock")).expect("made");
    let program = |words: &[&str]| {
        let mut command = std::process::Command::new(ballast());
        command.args(words).env("XDG_RUNTIME_DIR", runtime.path()).env_remove("BALLAST_SOCKET");
        let said = command.output().expect("the program runs");
        (said.status.code(), String::from_utf8_lossy(&said.stderr).into_owned())
    };
    let verbs = [&["kill", "web"][..], &["stop", "web"], &["rm", "web"], &["pause", "web"], &["resume", "web"]];
    let more =
        [&["set", "web", "memory.max=40M"][..], &["reclaim", "web", "1M"], &["move", "web", "/"], &["start", "web"]];
    for words in verbs.into_iter().chain(more) {
        let (status, said) = program(words);
        assert_eq!(status, Some(1), "{words:?}: {said}");
        assert!(said.contains("several VMs are named \"web\"") && said.contains("web.sock"), "{words:?}: {said}");
    }
    // Nor to one that is named beside it.
    assert_eq!(serve.ask("PUT", "/vms/other", Some(&shell())).0, 201);
    for word in ["pause", "kill", "rm"] {
        let (status, said) = program(&[word, "other", "web", "nope"]);
        assert_eq!(status, Some(1), "{word}: {said}");
        assert!(said.contains("several VMs are named \"web\"") && said.contains("named \"nope\""), "{word}: {said}");
        assert_eq!(serve.show("other")["state"], json!("running"), "{word}");
    }
    assert_eq!((&serve.show("web")["state"], &own.show()["state"]), (&json!("running"), &json!("running")));
    let (status, said) = program(&["kill", "web", "--socket", &own.socket().to_string_lossy()]);
    assert_eq!(status, Some(0), "{said}");
    own.wait(10);
    assert_eq!(program(&["kill", "web"]).0, Some(0), "only one is left");
    // What nobody has ever heard of is said, and not waited for.
    let at = serve.socket().to_string_lossy().into_owned();
    let top = ["top", "--batch", "--group", "/nope", "--socket", &at];
    for words in [&["events", "nope"][..], &["events", "-f", "nope"], &top] {
        let (status, said) = program(words);
        assert_eq!(status, Some(1), "{words:?}: {said}");
        assert!(said.contains("nope"), "{words:?}: {said}");
    }
    let (status, said) = program(&["reclaim", "web", "8"]);
    assert!(status == Some(2) && said.contains("did you mean 8M"), "{said}");
    let nowhere = runtime.path().join("none/x.sock");
    let socket = nowhere.to_string_lossy();
    let (status, said) = program(&["run", "--socket", &socket, "--memory", "size=64M", "--kernel", "/proc/self/exe"]);
    assert!(status == Some(125) && said.contains("there is no directory"), "{said}");
    assert!(!runtime.path().join("none").exists(), "nothing was made");
}

//! Verbs against VMs that are not there, no more, or too many; and what readers of their output may do.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Stdio;

use ballast_tests::serve::Serve;
use ballast_tests::{TestVm, wait_until};
use serde_json::Value;

use super::{Place, Reaped, Said, finish, program, skipped, word};

/// Every verb that is about one VM, without its name.
const VERBS: [&[&str]; 6] = [&["show"], &["set", "memory.max=64M"], &["pause"], &["resume"], &["kill"], &["events"]];

/// A verb about the VM `name`, reached by `socket`.
fn about(name: &str, socket: &Path, verb: &[&str]) -> Said {
    let mut command = program(&[verb[0], name]);
    command.args(&verb[1..]).arg("--socket").arg(socket);
    finish(command)
}

#[test]
fn a_vm_that_is_not_there_is_an_error_that_says_where_it_was_looked_for() {
    let place = Place::new();
    let file = place.file("file.sock", b"");
    let dead = place.path("dead.sock");
    drop(UnixListener::bind(&dead).expect("a socket can be made"));
    for verb in VERBS {
        about("web", &place.path(""), verb).refused(1, "web.sock; `ballast run --name web …` starts one", &verb);
        about("web", &place.path("none/x.sock"), verb).refused(1, "none/x.sock; `ballast run", &verb);
        about("web", &file, verb).refused(1, "file.sock is not a socket", &verb);
        about("web", &dead, verb).refused(1, "nobody listens at ", &verb);
        about("dead", &place.path(""), verb).refused(1, "nobody listens at ", &verb);
    }
    for (socket, part) in [
        (place.path(""), "no VM is running; `ballast run …` starts one"),
        (place.path("none"), "there is no socket "),
        (file, "is not a socket"),
        (dead.clone(), "nobody listens at "),
    ] {
        let mut events = program(&["events", "--socket"]);
        events.arg(&socket);
        finish(events).refused(1, part, &socket);
        let mut events = program(&["events"]);
        events.env("BALLAST_SOCKET", &socket);
        finish(events).refused(1, part, &socket);
    }
    // A list without a line would say that there are none.
    let mut ps = program(&["ps", "--socket"]);
    ps.arg(&dead);
    finish(ps).refused(1, "nobody listens at ", &dead);
}

#[test]
fn somebody_who_does_not_speak_http_is_an_error() {
    let place = Place::new();
    let socket = place.path("odd.sock");
    let listener = UnixListener::bind(&socket).expect("a socket can be made");
    let verbs = VERBS.len();
    let odd = std::thread::spawn(move || {
        for stream in listener.incoming().take(2 * verbs) {
            use std::io::{Read, Write};
            let mut stream = stream.expect("a connection");
            // Part of the request is enough to answer, and whoever has hung up does not mind.
            let _ = stream.read(&mut [0; 16]).and_then(|_| stream.write_all(b"220 hello\r\n"));
        }
    });
    for verb in VERBS {
        about("web", &socket, verb).refused(1, "does not answer", &verb);
        about("odd", &place.path(""), verb).refused(1, "does not answer", &verb);
    }
    odd.join().expect("it has answered all");
}

#[test]
fn verbs_that_a_running_vm_cannot_follow_are_errors() {
    if skipped("verbs") {
        return;
    }
    let mut vm = TestVm::builder("verbs").memory("size=64M,max=48M").cmdline("shell").start();
    vm.expect("READY", 10);
    let before = vm.wait_state("running", 10);
    let socket = vm.socket().to_owned();
    for verb in VERBS.into_iter().filter(|verb| verb[0] != "events") {
        about("other", &socket, verb).refused(1, "other", &verb);
    }
    for (words, part) in [
        (&["set", "memory.min=64M"][..], "memory.min 64M would be above memory.max 48M"),
        (&["set", "memory.max=40M", "--generation", "12345"], "the limits have changed meanwhile"),
        (&["set", "memory.max=4K", "--mode", "refuse"], "free memory first, or use mode=reclaim or mode=force"),
    ] {
        about("verbs", &socket, words).refused(1, part, &words);
    }
    let now = vm.show();
    assert_eq!(
        (&now["generation"], &now["memory"]["max_bytes"]),
        (&before["generation"], &before["memory"]["max_bytes"])
    );

    let shown = about("verbs", &socket, &["show", "--json"]);
    assert_eq!((shown.status, shown.err.as_str()), (Some(0), ""));
    let shown: Value = serde_json::from_str(&shown.out).expect("JSON");
    assert_eq!(shown["name"], "verbs");
    let events = about("verbs", &socket, &["events", "--json"]);
    assert_eq!((events.status, events.err.as_str()), (Some(0), ""));
    let kinds: Vec<Value> = events.out.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(kinds.iter().any(|event| event["event"] == "started"), "{kinds:?}");
    let last = kinds.last().expect("an event")["seq"].to_string();
    let events = about("verbs", &socket, &["events", "--since", &last]);
    assert_eq!((events.status, events.out.as_str()), (Some(0), ""), "nothing has happened since");

    assert_eq!(about("verbs", &socket, &["pause"]).status, Some(0));
    assert_eq!(about("verbs", &socket, &["pause"]).status, Some(0), "twice is once");
    assert_eq!(about("verbs", &socket, &["resume"]).status, Some(0));
    assert_eq!(about("verbs", &socket, &["kill"]).status, Some(0));
    assert_eq!(vm.wait(10).code(), Some(137));
    assert!(vm.errors().contains("was killed on request"));
    about("verbs", &socket, &["show"]).refused(1, "no VM named \"verbs\" is running", &"show");
}

#[test]
fn one_of_several_vms_has_to_be_named() {
    let place = Place::new();
    let _a = UnixListener::bind(place.path("a.sock")).expect("a socket can be made");
    let _b = UnixListener::bind(place.path("b.sock")).expect("a socket can be made");
    drop(UnixListener::bind(place.path("dead.sock")).expect("a socket can be made"));
    let mut events = program(&["events", "--socket"]);
    events.arg(place.path(""));
    let which = format!("--socket {} or --socket {}", place.path("a.sock").display(), place.path("b.sock").display());
    finish(events).refused(1, &format!("several controllers are running, say which: {which}"), &"events");
}

#[test]
fn a_reader_that_has_enough_ends_its_verb() {
    if skipped("closed-stdout") {
        return;
    }
    let vm = TestVm::builder("reader").memory("size=64M,max=48M").cmdline("shell").start();
    vm.expect("READY", 10);
    vm.wait_state("running", 10);
    for words in [&["events", "reader", "-f"][..], &["events", "-f", "--json"], &["show", "reader"], &["doctor"]] {
        let mut command = program(words);
        if words[0] != "doctor" {
            command.arg("--socket").arg(vm.socket());
        }
        let mut child = Reaped(command.stdout(Stdio::piped()).spawn().expect("the program starts"));
        let mut line = String::new();
        BufReader::new(child.0.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
        assert!(!line.is_empty(), "{words:?}");
        // Whoever follows learns that nobody reads when there is something to say.
        vm.post("pause");
        vm.post("resume");
        assert_eq!(child.wait(&format!("{words:?} ends")), Some(0), "{words:?}");
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = || std::fs::File::options().write(true).open("/dev/full").expect("a device that takes nothing");
    let fails = |mut command: std::process::Command, of: &[&str]| {
        let output = command.stdout(full()).output().expect("the program runs");
        let err = String::from_utf8(output.stderr).expect("text");
        assert_eq!(output.status.code(), Some(1), "{of:?}: {err}");
        assert!(err.starts_with("ballast: the output could not be written: No space left"), "{of:?}: {err}");
        assert_eq!(err.lines().count(), 1, "{of:?}: {err}");
    };
    for words in [&["completions", "bash"][..], &["doctor"], &["--help"], &["run", "--help"], &["--version"]] {
        fails(program(words), words);
    }
    let place = Place::new();
    let mut ps = program(&["ps", "--json", "--socket"]);
    ps.arg(place.path(""));
    fails(ps, &["ps"]);
    std::os::unix::fs::symlink("/dev/full", place.path("ballast.1")).expect("a link can be made");
    finish(program(&["man", word(&place.path(""))])).refused(1, "the man pages cannot be written to ", &"man");
    if skipped("full-stdout") {
        return;
    }
    let serve = Serve::start(&["--budget", "256M"]);
    serve.create("web");
    wait_until("the guest says something", 10, || {
        serve.raw("GET", "/vms/web/console", None).1.contains("READY").then_some(())
    });
    for words in [
        &["ps"][..],
        &["ps", "--json"],
        &["show", "web"],
        &["show", "web", "--json"],
        &["set", "web", "memory.max=40M", "--json"],
        &["events"],
        &["events", "-f", "--json"],
        &["check"],
        &["check", "--json"],
        &["oom", "rank"],
        &["group", "ls"],
        &["group", "show", "/", "--json"],
        &["console", "--no-follow", "web"],
        &["top", "--batch"],
    ] {
        let mut command = program(words);
        command.env("BALLAST_SOCKET", serve.place());
        fails(command, words);
    }
}

/// A controller whose process is stopped has a socket, and takes no connections: the queue is full soon.
#[test]
fn a_controller_that_is_stopped_holds_nobody_up() {
    let place = Place::new();
    let stopped = UnixListener::bind(place.path("one.sock")).expect("a socket can be made");
    rustix::net::listen(&stopped, 1).expect("a short queue");
    let other = UnixListener::bind(place.path("two.sock")).expect("a socket can be made");
    // Answers that it has no VMs, for as long as this test runs.
    let host = r#"{"version":"","pid":1,"kernel":"","total_bytes":0,"available_bytes":0,"budget_bytes":null,"current_bytes":0,"vms":0,"last_event":0,"shortage":null}"#;
    let overview = format!(r#"{{"host":{host},"groups":[],"vms":[],"events":[]}}"#);
    std::thread::spawn(move || {
        for stream in other.incoming() {
            use std::io::{Read, Write};
            let mut stream = stream.expect("a connection");
            let mut request = [0; 1024];
            if stream.read(&mut request).is_ok_and(|length| length > 0) {
                let body = if request.starts_with(b"GET /overview") { overview.as_str() } else { "[]" };
                // Whoever has hung up does not mind.
                let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            }
        }
    });
    let (directory, socket) = (place.path(""), place.path("one.sock"));
    let silent = "one.sock has not answered for 5 s: its process is stopped";
    std::thread::scope(|scope| {
        for verb in VERBS.into_iter().chain([&["stop"][..], &["console"], &["console", "--no-follow"]]) {
            let (directory, socket) = (&directory, &socket);
            scope.spawn(move || about("one", directory, verb).refused(1, silent, &verb));
            scope.spawn(move || about("web", socket, verb).refused(1, silent, &verb));
        }
        for words in [&["check"][..], &["oom", "rank"], &["group", "ls"], &["rm", "web"], &["events"]] {
            let mut command = program(words);
            command.arg("--socket").arg(&socket);
            scope.spawn(move || finish(command).refused(1, silent, &words));
        }
        scope.spawn(|| {
            let mut ps = program(&["ps", "--socket"]);
            ps.arg(&directory);
            let said = finish(ps);
            assert_eq!(said.status, Some(1), "{said:?}");
            assert!(said.out.starts_with("NAME") && said.err.contains(silent), "{said:?}");
        });
        scope.spawn(|| {
            let mut top = program(&["top", "--batch", "--socket"]);
            top.arg(&socket);
            let said = finish(top);
            assert!(said.out.contains("one.sock has not answered"), "{said:?}");
        });
        scope.spawn(|| {
            if !skipped("stopped-serve") {
                let mut serve = program(&["serve", "--socket"]);
                serve.arg(&socket);
                finish(serve).refused(1, "one.sock is in use by another controller: choose another --socket", &"serve");
            }
        });
    });
}

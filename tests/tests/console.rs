//! The console of a real guest: who comes hears what was printed, several can be there, and what a guest has said stays.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use ballast::controller::console::ConsoleLog;
use ballast_tests::{TestVm, ballast, deadline, http, number, payload, skipped, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// `ballast console` with words for a VM.
fn console(socket: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(ballast());
    command.arg("console").args(words).arg("--socket").arg(socket).env_remove("BALLAST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A process that does not outlive its test.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Somebody at a console's socket.
struct Visitor(BufReader<UnixStream>);

impl Visitor {
    fn at(path: &str) -> Self {
        let stream = UnixStream::connect(path).expect("somebody listens");
        stream.set_read_timeout(Some(deadline(20))).expect("a socket");
        Self(BufReader::new(stream))
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line");
        line
    }

    fn say(&mut self, line: &str) {
        writeln!(self.0.get_mut(), "{line}").expect("it is taken");
    }

    /// What comes until the end.
    fn rest(mut self) -> String {
        let mut text = String::new();
        self.0.read_to_string(&mut text).expect("text");
        text
    }
}

fn guest(commands: &str) -> TestVm {
    TestVm::builder("web").memory("size=64M,max=48M").cmdline(commands).start()
}

fn path(vm: &TestVm) -> String {
    vm.show()["console"].as_str().expect("it has a console").to_owned()
}

fn pid(view: &Value) -> i32 {
    i32::try_from(number(view, "pid")).expect("a process id")
}

#[test]
fn several_hear_the_same_and_any_of_them_may_type() {
    if skipped("console-several") {
        return;
    }
    let mut vm = guest("shell");
    vm.expect("READY", 10);
    let path = path(&vm);
    let private = std::fs::metadata(Path::new(&path).parent().expect("a directory")).expect("it is there");
    assert_eq!(private.permissions().mode() & 0o777, 0o700);
    let (mut first, mut second) = (Visitor::at(&path), Visitor::at(&path));
    assert_eq!((first.line(), second.line()), ("READY\n".to_owned(), "READY\n".to_owned()), "what was there before");
    first.say("echo one");
    assert_eq!((first.line(), second.line()), ("OK echo one\n".to_owned(), "OK echo one\n".to_owned()));
    second.say("echo two");
    assert_eq!((first.line(), second.line()), ("OK echo two\n".to_owned(), "OK echo two\n".to_owned()));
    drop(first);
    assert!(vm.command("echo three", 10).starts_with("OK"));
    assert_eq!(second.line(), "OK echo three\n");
    assert_eq!(vm.http("GET", "/vms/web/console", None).1, "READY\nOK echo one\nOK echo two\nOK echo three\n");

    // Somebody who reads nothing keeps nobody up; the terminal of `run` and three more are all there is room for.
    let _idle = Visitor::at(&path);
    let mut last = Visitor::at(&path);
    assert_eq!(last.line(), "READY\n");
    let refused = Visitor::at(&path).rest();
    assert!(refused.contains("ballast: 4 are at this console already: try again"), "{refused}");
    let (status, out, err) = said(&console(vm.socket(), &["web"]).output().expect("it runs"));
    assert_eq!(status, Some(1), "{err}");
    assert!(out.contains("4 are at this console already") && err.contains("was closed"), "{out}{err}");

    vm.send("exit 3");
    assert_eq!(second.rest(), "OK exit\n");
    assert_eq!(last.rest(), "OK echo one\nOK echo two\nOK echo three\nOK exit\n");
    assert_eq!(vm.wait(10).code(), Some(3));
    assert!(!Path::new(&path).exists());
}

#[test]
fn the_verb_types_what_comes_on_stdin_and_goes_on_reading() {
    if skipped("console-verb") {
        return;
    }
    let vm = guest("shell");
    vm.expect("READY", 10);
    let mut visit = Reaped(console(vm.socket(), &["web"]).stdin(Stdio::piped()).spawn().expect("it runs"));
    visit.0.stdin.take().expect("piped").write_all(b"echo from a pipe\n").expect("it is taken");
    let mut lines = BufReader::new(visit.0.stdout.take().expect("piped")).lines();
    let mut line = || lines.next().expect("a line").expect("text");
    assert_eq!((line(), line()), ("READY".to_owned(), "OK echo from a pipe".to_owned()));
    assert!(visit.0.try_wait().expect("our child").is_none(), "the end of stdin is not the end");
    Visitor::at(&path(&vm)).say("echo from somebody else");
    assert_eq!(line(), "OK echo from somebody else");
    drop(visit);

    let (status, out, _) = said(&console(vm.socket(), &["web", "--no-follow"]).output().expect("it runs"));
    assert_eq!((status, out.as_str()), (Some(0), "READY\nOK echo from a pipe\nOK echo from somebody else\n"));
    assert_eq!(vm.show()["state"], "running");

    // One that reads to the end of the VM ends with it.
    let mut visit = Reaped(console(vm.socket(), &["web"]).spawn().expect("it runs"));
    let mut out = BufReader::new(visit.0.stdout.take().expect("piped"));
    let mut first = String::new();
    out.read_line(&mut first).expect("a line");
    assert_eq!(first, "READY\n");
    Visitor::at(&path(&vm)).say("exit 0");
    let mut rest = String::new();
    out.read_to_string(&mut rest).expect("text");
    assert!(rest.ends_with("OK exit\n"), "{rest}");
    assert_eq!(wait_until("it ends", 10, || visit.0.try_wait().expect("our child")).code(), Some(0));
}

#[test]
fn what_is_typed_at_once_is_answered_whole_and_in_order() {
    if skipped("console-pipe") {
        return;
    }
    let mut vm = guest("shell");
    vm.expect("READY", 10);
    let filling = "x".repeat(100);
    let count = 100;
    let mut input = String::new();
    for number in 0..count {
        input.push_str(&format!("echo {number} {filling}\n"));
    }
    input.push_str("exit 0\n");
    let typing = vm.typist(input);
    for number in 0..count {
        assert_eq!(vm.line(20), format!("OK echo {number} {filling}"));
    }
    assert_eq!(vm.line(20), "OK exit");
    typing.join().expect("it was typed");
    assert_eq!(vm.wait(10).code(), Some(0));
}

/// What a guest has said is there when its worker is stopped, has crashed, or has ended as it should.
#[test]
fn last_words_stay_however_a_vm_ends() {
    if skipped("console-ends") {
        return;
    }
    let place = tempfile::Builder::new().prefix("bc").tempdir().expect("a temporary directory");
    let socket = place.path().join("ballast.sock");
    let serve = Command::new(ballast()).args(["serve", "--socket"]).arg(&socket).stdin(Stdio::null()).spawn();
    let _serve = Reaped(serve.expect("it runs"));
    wait_until("serve answers", 10, || http(&socket, "GET", "/host", None).ok());
    let ask = |method: &str, path: &str, body: Option<&Value>| {
        let (status, text) = http(&socket, method, path, body.map(Value::to_string).as_deref()).expect("an answer");
        (status, text)
    };
    let show =
        |name: &str| -> Value { serde_json::from_str(&ask("GET", &format!("/vms/{name}"), None).1).expect("JSON") };
    let text = |name: &str| ask("GET", &format!("/vms/{name}/console"), None).1;
    let create = |name: &str, commands: &str| {
        let memory = json!({ "size_bytes": 64 * MIB, "max_bytes": 48 * MIB });
        let body = json!({ "kernel": payload(), "cmdline": commands, "debug_port": true, "memory": memory });
        assert_eq!(ask("PUT", &format!("/vms/{name}"), Some(&body)).0, 201);
    };
    let ended = |name: &str| wait_until("it has ended", 10, || Some(show(name)).filter(|vm| vm["state"] == "ended"));

    create("well", "echo said before it ended; exit 0");
    assert_eq!(ended("well")["console"], Value::Null);
    assert_eq!(text("well"), "OK echo said before it ended\nOK exit\n");
    // An address that is mapped nowhere, and no handler for the fault.
    create("crash", "echo said before it crashed; peek 0x8000000000");
    assert_eq!(ended("crash")["end"], "the guest stopped with a triple fault");
    assert_eq!(text("crash"), "OK echo said before it crashed\n");

    create("shot", "echo said before it was shot; shell");
    wait_until("it has printed", 10, || text("shot").contains("READY").then_some(()));
    let worker = pid(&show("shot"));
    let found = ConsoleLog::of_worker(worker).expect("another controller finds it, too");
    assert_eq!(found.text(), "OK echo said before it was shot\nREADY\n");
    // SAFETY: kill takes numbers; the worker is one that this test has caused.
    unsafe { libc::kill(worker, libc::SIGSTOP) };
    assert_eq!(text("shot"), found.text(), "a worker that does not answer is not asked");
    // SAFETY: as above.
    unsafe { libc::kill(worker, libc::SIGKILL) };
    ended("shot");
    assert_eq!(text("shot"), found.text());

    let (status, out, err) = said(&console(&socket, &["shot"]).output().expect("it runs"));
    assert_eq!((status, out.as_str()), (Some(1), ""));
    assert!(err.contains("`ballast console --no-follow shot` prints its last words"), "{err}");
    let (status, out, _) = said(&console(&socket, &["shot", "--no-follow"]).output().expect("it runs"));
    assert_eq!((status, out), (Some(0), found.text()));
    let (status, _, err) = said(&console(&socket, &["none"]).output().expect("it runs"));
    assert_eq!(status, Some(1));
    assert!(err.contains("no VM named \"none\""), "{err}");
}

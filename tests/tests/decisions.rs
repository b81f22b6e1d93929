//! Who decides when a group is full, with the real program: a client on the socket, a command, or nobody but the policy.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use ballast_tests::serve::{Decider, Serve};
use ballast_tests::{ballast, payload, skipped, wait_until};
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

/// A group that is full as soon as the last of its guests has touched its memory: `big` would be chosen, `kept` never.
fn fill(serve: &Serve) {
    let put = |path: &str, body: Value| {
        let (status, answer) = serve.ask("PUT", path, Some(&body));
        assert_eq!(status, 201, "{answer}");
    };
    put("/groups/full", json!({ "max_bytes": 56 * MIB }));
    for (name, touches, preference) in [("big", 16, "none"), ("kept", 12, "omit"), ("asks", 30, "none")] {
        let oom = json!({ "action": "kill", "deadline_ms": 300, "preference": preference, "priority": if name == "asks" { 9 } else { 0 } });
        let memory = json!({ "size_bytes": 64 * MIB, "swap_max_bytes": 0 });
        let cmdline = format!("touch 16M {touches}M; shell");
        put(
            &format!("/vms/{name}"),
            json!({ "kernel": payload(), "cmdline": cmdline, "debug_port": true, "group": "/full", "memory": memory, "oom": oom }),
        );
    }
}

/// The event that tells who was chosen.
fn victim(serve: &Serve) -> Value {
    wait_until("somebody is chosen", 30, || serve.told("victim_selected").into_iter().next())
}

/// A client kills whom the policy would have spared; the others go on.
/// Semantics: 51, T7.
#[test]
fn a_client_on_the_socket_decides() {
    if skipped("decisions-client") {
        return;
    }
    let serve = Serve::start(&[]);
    let mut client = Decider::register(&serve, 30_000);
    let (status, refusal) = serve.ask("PUT", "/oom/policy", Some(&json!({ "wait_ms": 1000 })));
    assert_eq!((status, &refusal["code"]), (409, &json!("wrong_state")), "{refusal}");
    fill(&serve);
    let asked = client.question();
    let ranked: Vec<_> = asked["ranked"].as_array().expect("a list").iter().map(|entry| entry["vm"].clone()).collect();
    assert_eq!(
        (&asked["level"], ranked),
        (&json!("/full"), vec![json!("big"), json!("asks"), json!("kept")]),
        "{asked}"
    );
    let path = format!("/oom/decisions/{}", asked["id"]);
    let (status, answer) = serve.ask("POST", &path, Some(&json!({ "answer": "kill", "vm": "kept" })));
    assert_eq!(status, 204, "{answer}");
    let victim = victim(&serve);
    assert_eq!((&victim["vm"], &victim["by"]), (&json!("kept"), &json!("client")), "{victim}");
    serve.wait_state("kept", "ended");
    wait_until("the one that was held goes on", 20, || (serve.show("asks")["held"]["now"] == false).then_some(()));
    assert_eq!(serve.show("big")["state"], "running");
}

/// A client that goes away is not waited for.
/// Semantics: 51.
#[test]
fn the_policy_decides_at_once_when_the_client_goes() {
    if skipped("decisions-leaves") {
        return;
    }
    let serve = Serve::start(&[]);
    let mut client = Decider::register(&serve, 60_000);
    fill(&serve);
    client.question();
    drop(client);
    let victim = victim(&serve);
    assert_eq!((&victim["vm"], &victim["by"]), (&json!("big"), &json!("policy")), "{victim}");
}

/// A script that can be run.
fn script(place: &TempDir, text: &str) -> PathBuf {
    let path = place.path().join("hook");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("set");
    path
}

/// Semantics: 51, T7.
#[test]
fn a_command_decides_where_no_client_does_and_one_that_hangs_does_not() {
    if skipped("decisions-hook") {
        return;
    }
    for (text, wait, expected) in [
        (r#"grep -q '"level":"/full"' && echo kill kept"#, "20s", ("kept", "hook")),
        ("exec sleep 1000", "300ms", ("big", "policy")),
        ("echo kill outside", "20s", ("big", "policy")),
    ] {
        let place = TempDir::new().expect("a directory");
        let hook = script(&place, text);
        let serve = Serve::start(&["--oom-hook", hook.to_str().expect("plain"), "--oom-hook-wait", wait]);
        fill(&serve);
        let victim = victim(&serve);
        assert_eq!((&victim["vm"], &victim["by"]), (&json!(expected.0), &json!(expected.1)), "{text}: {victim}");
    }
}

/// What a script answers that `ballast oom policy` runs, or answers by itself, counts as a client's. One answer that is refused
/// leaves time for another.
/// Semantics: 51, T7.
#[test]
fn a_script_is_the_client() {
    if skipped("decisions-script") {
        return;
    }
    for runs_command in [true, false] {
        let serve = Serve::start(&[]);
        let place = TempDir::new().expect("a directory");
        let answer = script(&place, r#"grep -q '"reason":"full"' && echo kill kept"#);
        let socket = serve.socket();
        let mut words = vec!["oom", "policy", "--wait", "30s", "--socket", socket.to_str().expect("plain")];
        if runs_command {
            words.extend(["--", answer.to_str().expect("plain")]);
        }
        let mut client = Client::start(&words);
        assert_eq!(client.complaint(), "ballast: asked from now on, before the policy decides\n");
        fill(&serve);
        if !runs_command {
            let asked: Value = serde_json::from_str(&client.line()).expect("a question");
            assert_eq!((&asked["level"], &asked["reason"]), (&json!("/full"), &json!("full")), "{asked}");
            client.say(&format!("{} kill outside", asked["id"]));
            let refused = client.complaint();
            assert!(refused.starts_with("ballast: question 1: kill outside is refused: "), "{refused}");
            client.say(&format!("{} kill kept", asked["id"]));
        }
        let victim = victim(&serve);
        assert_eq!((&victim["vm"], &victim["by"]), (&json!("kept"), &json!("client")), "{victim}");
        assert_eq!(client.complaint(), "ballast: question 1: kill kept\n");
        client.end();
    }
}

/// A program that is talked to.
struct Client {
    child: Child,
    out: BufReader<ChildStdout>,
    err: BufReader<ChildStderr>,
}

impl Client {
    fn start(words: &[&str]) -> Self {
        let mut command = Command::new(ballast());
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("ballast starts");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let err = BufReader::new(child.stderr.take().expect("piped"));
        Self { child, out, err }
    }

    /// The next line that it prints.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("readable");
        line
    }

    /// The next line on stderr.
    fn complaint(&mut self) -> String {
        let mut line = String::new();
        self.err.read_line(&mut line).expect("readable");
        line
    }

    fn say(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().expect("piped"), "{line}").expect("it reads");
    }

    /// Ends it by a signal.
    fn end(mut self) {
        rustix::process::kill_process(Pid::from_child(&self.child), Signal::TERM).expect("it runs");
        assert_eq!(self.child.wait().expect("it ends").code(), Some(0));
    }
}

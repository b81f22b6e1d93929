//! The contract of the interface, against a real `ballast serve`: every request of the served OpenAPI document is made
//! with success and in vain, and every answer is one that the document promises.
//!
//! A new route needs a good and a bad line in `calls.rs`; wrong methods, names, queries and bodies are made up from the
//! document by `hostile.rs`. `docs.rs` runs the `curl` lines of the documentation, `tutorial.rs` the tutorial.

mod calls;
mod contract;
mod docs;
mod hostile;
mod tutorial;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use ballast_tests::serve::{Serve, shell};
use ballast_tests::{deadline, payload, skipped, wait_until};
use serde_json::{Value, json};

use calls::{CALLS, Call, ELSEWHERE, Expect};
use contract::{Contract, send};

/// The body of a call with the paths of this machine in it.
fn body(call: &Call) -> String {
    call.body.replace("KERNEL", payload().to_str().expect("text"))
}

/// What must not change when the same is asked for again.
fn settled(answer: &str) -> Value {
    let answer: Value = serde_json::from_str(answer).unwrap_or_default();
    let limits: Vec<_> = ["min_bytes", "low_bytes", "high_bytes", "max_bytes"].map(|k| &answer["memory"][k]).into();
    json!([answer["name"], answer["path"], answer["state"], answer["pid"], answer["generation"], limits])
}

/// Also: what is asked for twice is done once.
#[test]
fn every_request_of_the_document_does_what_it_says_and_says_what_is_wrong() {
    if skipped("api-contract") {
        return;
    }
    let serve = Serve::start(&[]);
    let contract = Contract::of(&serve);
    let mut seen = BTreeSet::new();
    for call in CALLS {
        let (method, _) = call.route.split_once(' ').expect("a method and a path");
        let text = body(call);
        let what = format!("{} at {} with {text}", call.route, call.target);
        let answer = send(&serve, method, call.target, &text);
        contract.check(call.route, &answer).unwrap_or_else(|error| panic!("{what}: {error}"));
        match call.expect {
            Expect::Done(status) => assert_eq!(answer.status, status, "{what}: {}", answer.body),
            Expect::Twice(first, second) => {
                assert_eq!(answer.status, first, "{what}: {}", answer.body);
                let again = send(&serve, method, call.target, &text);
                contract.check(call.route, &again).unwrap_or_else(|error| panic!("{what}, again: {error}"));
                assert_eq!(again.status, second, "{what}, again: {}", again.body);
                if second < 300 {
                    assert_eq!(settled(&again.body), settled(&answer.body), "{what}: not the same again");
                }
            }
            Expect::Refused(status, code) => {
                let refusal: Value = serde_json::from_str(&answer.body).unwrap_or_default();
                assert_eq!((answer.status, refusal["code"].as_str()), (status, Some(code)), "{what}: {}", answer.body);
            }
        }
        seen.insert((call.route, matches!(call.expect, Expect::Refused(..))));
    }
    let mut missing = Vec::new();
    for (path, method, _) in contract.operations() {
        let route = format!("{} {path}", method.to_uppercase());
        for (refused, kind) in [(false, "good"), (true, "bad")] {
            let elsewhere = !refused && ELSEWHERE.contains(&route.as_str());
            if !elsewhere && !seen.contains(&(route.as_str(), refused)) {
                missing.push(format!("{kind} {route}"));
            }
        }
    }
    assert!(missing.is_empty(), "add these to CALLS in tests/tests/api/calls.rs: {missing:?}");
}

/// Compare-and-set: of two clients that have seen the same limits, one is told that the other was faster.
/// Semantics: 65.
#[test]
fn of_two_changes_from_one_generation_one_is_refused() {
    if skipped("api-generations") {
        return;
    }
    let serve = Serve::start(&[]);
    let generation = &serve.create("web")["generation"];
    let path = format!("/vms/web/memory?generation={generation}");
    let patch = |mib: u64| serve.ask("PATCH", &path, Some(&json!({ "max_bytes": mib << 20 })));
    let answers = std::thread::scope(|scope| [40, 44].map(|mib| scope.spawn(move || patch(mib))).map(|t| t.join()));
    let mut answers = answers.map(|answer| answer.expect("no panic"));
    answers.sort_by_key(|(status, _)| *status);
    let [(200, won), (409, lost)] = answers else { panic!("{answers:?}") };
    assert_eq!((&lost["code"], &lost["generation"]), (&json!("generation_mismatch"), &won["generation"]));
    assert_eq!(serve.show("web")["memory"]["max_bytes"], won["memory"]["max_bytes"]);
}

/// A client that sends the body in a write of its own may be refused before. Its write must not fail, or it would never
/// read why.
#[test]
fn a_body_that_comes_after_the_refusal_does_not_cost_the_client_the_answer() {
    if skipped("api-late-body") {
        return;
    }
    let serve = Serve::start(&[]);
    for (head, length, status, code) in [
        ("PUT /nowhere HTTP/1.1", 64, 404, "not_found"),
        ("POST /vms HTTP/1.1", 64, 405, "method_not_allowed"),
        ("POST /vms/web/pause?frob=1 HTTP/1.1", 64, 400, "bad_request"),
        ("PUT /vms/web HTTP/1.1", 1 << 20, 413, "too_large"),
    ] {
        let mut stream = UnixStream::connect(serve.socket()).expect("connected");
        stream.set_read_timeout(Some(deadline(20))).expect("set");
        let head = format!("{head}\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("answered to its end");
        // It has gone on to other things: if it was to close this connection, it has.
        assert_eq!(serve.ask("GET", "/host", None).0, 200);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{head}: {answer}");
        assert!(answer.contains(&format!("\"code\":\"{code}\"")), "{head}: {answer}");
        stream.write_all(&vec![b' '; length]).unwrap_or_else(|error| panic!("{head}: {error}"));
    }
}

/// Half a creation would be a name that nobody can use and nobody can remove.
#[test]
fn a_vm_is_made_although_its_client_hangs_up() {
    if skipped("api-hang-up") {
        return;
    }
    let serve = Serve::start(&[]);
    let config = shell().to_string();
    for n in 0..10 {
        let mut stream = UnixStream::connect(serve.socket()).expect("connected");
        let head = format!("PUT /vms/vm{n} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", config.len());
        stream.write_all(format!("{head}{config}").as_bytes()).expect("sent");
    }
    wait_until("all of them run", 20, || {
        let (_, vms) = serve.ask("GET", "/vms", None);
        let running = vms.as_array().expect("a list").iter().filter(|vm| vm["state"] == "running").count();
        (running == 10).then_some(())
    });
    for n in 0..10 {
        assert_eq!(serve.ask("PUT", &format!("/vms/vm{n}"), Some(&shell())).0, 200, "it is the one asked for");
        assert_eq!(serve.ask("DELETE", &format!("/vms/vm{n}"), None).0, 204);
    }
}

/// Whatever the document does not allow is refused, in the same form, and changes nothing.
#[test]
fn what_the_document_does_not_allow_is_refused_and_changes_nothing() {
    if skipped("api-hostile") {
        return;
    }
    let serve = Serve::start(&[]);
    let contract = Contract::of(&serve);
    for call in CALLS.iter().filter(|call| call.route.starts_with("PUT ") && !call.refused()) {
        // What the table makes is there, so that what is asked of it is wrong for one reason only.
        send(&serve, "PUT", call.target, &body(call));
    }
    let state = || {
        let lists = ["/vms", "/groups"].map(|path| serve.ask("GET", path, None).1);
        lists.map(|list| {
            list.as_array().into_iter().flatten().map(|item| settled(&item.to_string())).collect::<Vec<_>>()
        })
    };
    let before = state();
    let mut wrong = Vec::new();
    let mut requests = 0;
    for attack in hostile::attacks(&contract) {
        requests += 1;
        let answer = send(&serve, &attack.method, &attack.target, &attack.body);
        let checked = contract.check_refusal(&answer);
        if let Err(error) = checked.and_then(|()| attack.expected(answer.status)) {
            let short: String = attack.body.chars().take(120).collect();
            let target: String = attack.target.chars().take(80).collect();
            wrong.push(format!("{} {target} {short} ({}): {error}: {}", attack.method, attack.why, answer.body));
        }
    }
    println!("{requests} requests");
    assert!(wrong.is_empty(), "{} of {requests}:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(state(), before);
}

//! Making VMs of `ballast serve`: many at once, the same more than once, and when there is no room for more.

use std::io::Write;
use std::os::unix::net::UnixStream;

use ballast_tests::serve::{Serve, pid, shell};
use ballast_tests::{skipped, wait_until};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::Value;

/// The most that the test lets a controller have.
const HARD: Option<u64> = Some(1024);

#[test]
fn equal_requests_at_once_are_one_vm_and_other_names_are_others() {
    if skipped("create-at-once") {
        return;
    }
    let serve = Serve::start(&[]);
    let put = |name: &str| serve.ask("PUT", &format!("/vms/{name}"), Some(&shell()));
    let answers: Vec<(u16, Value)> = std::thread::scope(|scope| {
        let names = ["same", "same", "other", "same", "third", "same"];
        let threads = names.map(|name| scope.spawn(move || put(name)));
        threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    let (same, others): (Vec<_>, Vec<_>) = answers.iter().partition(|(_, view)| view["name"] == "same");
    assert_eq!(same.iter().filter(|(status, _)| *status == 201).count(), 1, "{same:?}");
    assert!(same.iter().all(|(status, view)| [200, 201].contains(status) && pid(view) == pid(&same[0].1)), "{same:?}");
    assert!(others.iter().all(|(status, view)| *status == 201 && view["state"] == "running"), "{others:?}");
    assert_eq!(serve.names(), ["other", "same", "third"]);
}

#[test]
fn a_client_that_goes_away_leaves_a_whole_vm() {
    if skipped("create-and-leave") {
        return;
    }
    let serve = Serve::start(&[]);
    let body = shell().to_string();
    let mut client = UnixStream::connect(serve.socket()).expect("it listens");
    let length = body.len();
    write!(
        client,
        "PUT /vms/vm HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .expect("it reads");
    drop(client);
    wait_until("the VM runs, or was never made", 20, || {
        let (status, view) = serve.ask("PUT", "/vms/vm", Some(&shell()));
        ([200, 201].contains(&status) && view["state"] == "running").then_some(())
    });
}

#[test]
fn when_no_descriptor_is_left_that_is_said_and_the_next_vm_can_be_made_with_more() {
    if skipped("create-descriptors") {
        return;
    }
    let serve = Serve::start(&[]);
    serve.create("first");
    let open = std::fs::read_dir(format!("/proc/{}/fd", serve.pid())).expect("it runs").count() as u64;
    let limit = |soft: Option<u64>| {
        let id = Pid::from_raw(serve.pid() as i32);
        prlimit(id, Resource::Nofile, Rlimit { current: soft, maximum: HARD }).expect("a process of this user");
    };
    limit(Some(open + 10));
    let (status, refusal) = serve.ask("PUT", "/vms/second", Some(&shell()));
    assert_eq!((status, &refusal["code"]), (409, &Value::from("start_failed")), "{refusal}");
    assert!(refusal["message"].as_str().expect("a sentence").contains("LimitNOFILE"), "{refusal}");
    assert_eq!(serve.names(), ["first"], "nothing is left of it");
    limit(HARD);
    serve.create("second");
}

//! A controller that is gone, and the next one: `ballast serve` killed in the middle of anything.

use std::path::{Path, PathBuf};

use ballast_tests::serve::{Serve, is_alive, kill, pid, program, shell};
use ballast_tests::{PAGE, http, number, resident_pages, skipped, wait_until};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A guest of 64 MiB with these commands and limits.
fn guest(commands: &str, memory: &Value) -> Value {
    let mut config = shell();
    config["cmdline"] = json!(commands);
    config["memory"] = memory.clone();
    config["memory"]["size_bytes"] = json!(64 * MIB);
    if memory["max_bytes"].is_number() {
        config["memory"]["swap_max_bytes"] = json!(0);
    }
    config
}

fn killed(serve: &mut Serve) {
    serve.signal(libc::SIGKILL);
    serve.wait(10);
}

/// What is charged is what is there: the guest's part is what the host's page tables have, and the parts are the whole.
fn is_exact(view: &Value) -> bool {
    let part = |name: &str| number(view, &format!("memory.stat.{name}_bytes"));
    let sum: u64 = ["guest", "stock", "reserve", "vmm"].iter().map(|name| part(name)).sum();
    part("guest") == resident_pages(view) * PAGE && number(view, "memory.current_bytes") == sum
}

/// Waits until the account of a VM is exact.
fn exact(serve: &Serve, name: &str) -> Value {
    wait_until(&format!("the account of {name} is exact"), 20, || Some(serve.show(name)).filter(is_exact))
}

/// Events of this controller's life about one VM.
fn events(serve: &Serve, name: &str) -> Vec<Value> {
    serve.events().into_iter().filter(|event| event["vm"] == name).collect()
}

fn event(serve: &Serve, name: &str, kind: &str) -> Value {
    let of = events(serve, name);
    of.iter().find(|event| event["event"] == kind).unwrap_or_else(|| panic!("no {kind}: {of:?}")).clone()
}

/// The processes of the VMs, and nothing else, go on; the next controller counts the same.
#[test]
fn the_next_controller_has_every_vm_with_equal_counts() {
    if skipped("adopt-all") {
        return;
    }
    let mut serve = Serve::start(&[]);
    // Held at its limit, for longer than this test takes.
    let mut full = guest("touch 16M 40M seed=7; verify 16M 40M seed=7; exit 5", &json!({ "max_bytes": 24 * MIB }));
    full["oom"] = json!({ "deadline_ms": 600_000 });
    serve.create_with("full", &full);
    let held = |serve: &Serve| Some(serve.show("full")).filter(|vm| vm["held"]["now"] == true && is_exact(vm));
    let full = wait_until("it is held at its limit", 20, || held(&serve));

    serve.create_with("paused", &guest("touch 16M 8M seed=3; shell", &json!({ "max_bytes": 32 * MIB })));
    wait_console(&serve, "paused", "READY");
    assert_eq!(serve.ask("POST", "/vms/paused/pause", None).0, 200);
    let paused = exact(&serve, "paused");

    // A limit below what it uses waits for memory that this guest never gives.
    serve.create_with("changing", &guest("touch 16M 16M seed=4; shell", &json!({ "max_bytes": 48 * MIB })));
    wait_console(&serve, "changing", "READY");
    let (status, pending) =
        serve.ask("PATCH", "/vms/changing/memory?wait_ms=0", Some(&json!({ "max_bytes": 8 * MIB })));
    assert_eq!((status, number(&pending, "memory.max_pending_bytes")), (202, 8 * MIB), "{pending}");

    let free = serve.create_with("free", &guest("touch 16M 4M seed=5; shell", &json!({})));
    assert_eq!(free["accounting"], false);

    // Writes while nobody is there, as far as its stock goes, and the rest when somebody is.
    let busy =
        "touch 16M 4M seed=3; wait 2000; touch 20M 20M seed=4; verify 16M 4M seed=3; verify 20M 20M seed=4; exit 42";
    let busy = serve.create_with("busy", &guest(busy, &json!({ "max_bytes": 48 * MIB })));

    // One is being made.
    let socket = serve.socket();
    let body = shell().to_string();
    let making = std::thread::spawn(move || http(&socket, "PUT", "/vms/new", Some(&body)));
    let journal = serve.state().join("journal");
    wait_until("it is remembered", 10, || {
        std::fs::read_to_string(&journal).expect("the journal").contains(r#""vm":"new""#).then_some(())
    });
    let before = resident_pages(&busy);
    killed(&mut serve);
    // A request on its way gets an end, if not an answer.
    let _ = making.join().expect("no panic");

    let workers = [&full, &paused, &pending, &free, &busy].map(pid);
    assert!(workers.iter().all(|pid| is_alive(*pid)), "{workers:?}");
    let stopped = wait_until("it went on alone until it had no more", 20, || {
        let now = resident_pages(&busy);
        std::thread::sleep(std::time::Duration::from_millis(50));
        (now > before && now == resident_pages(&busy)).then_some(now)
    });
    assert!(stopped < 28 * MIB / PAGE, "{stopped} pages without a controller: more than its stock");
    serve.again();

    let now = exact(&serve, "full");
    assert_eq!((pid(&now), &now["held"]["now"]), (workers[0], &json!(true)), "{now}");
    assert_eq!(number(&now, "memory.current_bytes"), number(&full, "memory.current_bytes"));
    assert_eq!(number(&now, "memory.stat.guest_bytes"), number(&full, "memory.stat.guest_bytes"));
    let now = exact(&serve, "paused");
    assert_eq!((pid(&now), &now["state"]), (workers[1], &json!("paused")));
    assert_eq!(number(&now, "memory.current_bytes"), number(&paused, "memory.current_bytes"));
    let now = exact(&serve, "changing");
    assert_eq!((pid(&now), number(&now, "memory.max_bytes")), (workers[2], 48 * MIB));
    assert_eq!(now["memory"]["max_pending_bytes"], Value::Null, "a change that waited is dropped");
    let now = serve.show("free");
    assert_eq!((pid(&now), &now["accounting"], &now["state"]), (workers[3], &json!(false), &json!("running")));
    for name in ["full", "paused", "changing", "free", "busy"] {
        let said = event(&serve, name, "adopted");
        assert_eq!(number(&said, "life"), 2, "{said}");
    }
    let ended = serve.wait_state("busy", "ended");
    assert_eq!(ended["end"], "the guest ended with status 42", "it found all that it wrote");

    // The one that was being made is there, or can be made.
    let (status, view) = serve.ask("PUT", "/vms/new", Some(&shell()));
    assert!(status == 200 || status == 201, "{status} {view}");
    assert_eq!(view["state"], "running");
    exact(&serve, "new");

    // All of them can be steered as before.
    assert_eq!(serve.ask("POST", "/vms/paused/resume", None).1["state"], "running");
    let (status, answer) = serve.ask("PATCH", "/vms/full/memory", Some(&json!({ "max_bytes": 60 * MIB })));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(serve.wait_state("full", "ended")["end"], "the guest ended with status 5", "it lost nothing");
    let (status, view) = serve.ask("PATCH", "/vms/free/memory", Some(&json!({ "max_bytes": 32 * MIB })));
    assert_eq!((status, &view["accounting"]), (200, &json!(true)), "{view}");
    exact(&serve, "free");

    killed(&mut serve);
    serve.again();
    let now = exact(&serve, "free");
    assert_eq!((number(&now, "memory.max_bytes"), &now["accounting"]), (32 * MIB, &json!(true)));
    assert_eq!(now["generation"], view["generation"]);
    let list = serve.ask("GET", "/vms", None).1;
    let sum: u64 = list.as_array().expect("a list").iter().map(|vm| number(vm, "memory.current_bytes")).sum();
    assert_eq!(number(&serve.ask("GET", "/host", None).1, "current_bytes"), sum);
}

fn wait_console(serve: &Serve, name: &str, text: &str) {
    wait_until(&format!("{name} prints {text}"), 20, || {
        let (status, console) = serve.raw("GET", &format!("/vms/{name}/console"), None);
        (status == 200 && console.contains(text)).then_some(())
    });
}

#[test]
fn what_ended_while_nobody_was_there_is_shown_with_how() {
    if skipped("adopt-ended") {
        return;
    }
    let mut serve = Serve::start(&[]);
    let shot = serve.create("shot");
    let other = serve.create("other");
    serve.create_with("quiet", &guest("wait 1000; exit 7", &json!({ "max_bytes": 32 * MIB })));
    let taken = serve.create("taken");
    killed(&mut serve);
    kill(pid(&shot), libc::SIGKILL);
    kill(pid(&taken), libc::SIGKILL);
    wait_until("they are gone", 10, || (!is_alive(pid(&shot)) && !is_alive(pid(&taken))).then_some(()));
    // Somebody else in the place of a worker is not it, and is left alone: it is this process.
    let place = serve.state().join("taken/worker");
    std::fs::remove_file(&place).expect("its socket");
    let stranger = listen(&place);
    let log = serve.state().join("quiet/log");
    wait_until("it has left its last words", 20, || {
        std::fs::read_to_string(&log).expect("a log").contains("last words").then_some(())
    });
    serve.again();
    for (name, end) in
        [("shot", "the worker ended while there was no controller"), ("quiet", "the guest ended with status 7")]
    {
        let view = serve.show(name);
        assert_eq!((&view["state"], &view["end"]), (&json!("ended"), &json!(end)), "{name}");
    }
    let view = serve.show("taken");
    assert!(view["end"].as_str().is_some_and(|end| end.contains("listens in its place")), "{view}");
    event(&serve, "shot", "worker_died");
    assert_eq!(event(&serve, "quiet", "stopped")["status"], 7);
    assert_eq!(pid(&serve.show("other")), pid(&other));
    assert!(place.exists(), "a stranger's socket is not ours to remove");
    drop(stranger);
    for name in ["shot", "quiet"] {
        assert!(!serve.state().join(name).exists(), "{name}: what was left is tidied");
        serve.create(name);
    }
    // Ended once, ended for every controller after it.
    killed(&mut serve);
    serve.again();
    assert_eq!(serve.show("taken")["state"], "ended");
    assert_eq!(serve.ask("DELETE", "/vms/taken", None).0, 204);
    killed(&mut serve);
    serve.again();
    assert_eq!(serve.ask("GET", "/vms/taken", None).0, 404);
}

fn listen(place: &Path) -> std::os::fd::OwnedFd {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.expect("a socket");
    rustix::net::bind(&socket, &SocketAddrUnix::new(place).expect("short")).expect("bound");
    rustix::net::listen(&socket, 4).expect("listens");
    socket
}

#[test]
fn vms_that_are_to_be_left_running_are_left_and_taken_over() {
    if skipped("adopt-leave") {
        return;
    }
    let mut serve = Serve::start(&["--leave-running", "--budget", "100M"]);
    let view = serve.create("web");
    for _ in 0..2 {
        serve.signal(libc::SIGTERM);
        assert_eq!(serve.wait(10).code(), Some(0));
        assert!(is_alive(pid(&view)));
        for words in [&["ps"][..], &["ps", "--json"], &["show", "web"], &["check"], &["group", "ls"]] {
            let said = serve.verb(words);
            let err = String::from_utf8_lossy(&said.stderr);
            assert_eq!((said.status.code(), said.stdout.len()), (Some(1), 0), "{words:?}: {err}");
            assert!(err.contains("its VMs run on, and `ballast serve`, started as it was, takes them over"), "{err}");
        }
        serve.again();
        assert_eq!(pid(&exact(&serve, "web")), pid(&view));
        let (status, same) = serve.ask("PUT", "/vms/web", Some(&shell()));
        assert_eq!((status, pid(&same)), (200, pid(&view)), "it is the one that is asked for");
    }
    assert_eq!(serve.ask("DELETE", "/vms/web", None).0, 204);
    assert!(!is_alive(pid(&view)));
    serve.signal(libc::SIGTERM);
    assert_eq!(serve.wait(10).code(), Some(0));
    assert_eq!(serve.left(), [] as [PathBuf; 0], "no VM is left, nor a socket that says so");
}

#[test]
fn a_journal_that_is_not_understood_refuses_the_start_and_loses_no_vm() {
    if skipped("adopt-garbage") {
        return;
    }
    let mut serve = Serve::start(&[]);
    let view = serve.create("web");
    killed(&mut serve);
    let journal = serve.state().join("journal");
    let good = std::fs::read_to_string(&journal).expect("the journal");
    std::fs::write(&journal, format!("{good}garbage\n")).expect("written");
    let refused = program(&["serve"], serve.place()).output().expect("it runs");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("line {} of", good.lines().count() + 1)), "{said}");
    assert!(said.contains("ballast rm NAME"), "{said}");
    assert!(is_alive(pid(&view)));

    // Without the journal the worker is nobody's: left alone, its name kept, until somebody says otherwise.
    let aside: PathBuf = serve.place().join("aside");
    std::fs::rename(&journal, &aside).expect("moved");
    serve.again();
    assert_eq!(serve.names(), [] as [String; 0]);
    assert!(is_alive(pid(&view)));
    event(&serve, "web", "not_adopted");
    let (status, refusal) = serve.ask("PUT", "/vms/web", Some(&shell()));
    assert_eq!((status, &refusal["code"]), (409, &json!("already_exists")), "{refusal}");
    assert!(refusal["message"].as_str().is_some_and(|text| text.contains("ballast rm web")), "{refusal}");
    killed(&mut serve);

    // With it, it is a VM like any other.
    std::fs::write(&journal, good).expect("written");
    serve.again();
    assert_eq!(pid(&exact(&serve, "web")), pid(&view));
    killed(&mut serve);
    std::fs::remove_file(&journal).expect("removed");
    serve.again();
    assert_eq!(serve.ask("DELETE", "/vms/web", None).0, 204);
    assert!(!is_alive(pid(&view)));
    serve.create("web");
}

/// What a client was told of one VM; absent when its last request had no answer.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Told {
    pid: u32,
    max: u64,
    paused: bool,
}

/// Random requests, one after the other, until there is no answer. Returns what is known of each name, and of which one
/// nothing is because the last request was for it.
fn random_requests(
    socket: &Path,
    mut told: std::collections::BTreeMap<&'static str, Option<Told>>,
    mut random: u64,
) -> (std::collections::BTreeMap<&'static str, Option<Told>>, &'static str) {
    loop {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let name = ["a", "b", "c"][(random >> 8) as usize % 3];
        let vm = format!("/vms/{name}");
        let max = (40 + (random >> 32) % 20) * MIB;
        let (method, path, body) = match random % 8 {
            0..=2 => ("PUT", vm, Some(shell())),
            3 => ("DELETE", vm, None),
            4 => ("POST", format!("{vm}/pause"), None),
            5 => ("POST", format!("{vm}/resume"), None),
            _ => ("PATCH", format!("{vm}/memory?mode=force"), Some(json!({ "max_bytes": max }))),
        };
        let body = body.map(|body| body.to_string());
        let Ok((status, answer)) = http(socket, method, &path, body.as_deref()) else { return (told, name) };
        let view: Value = serde_json::from_str(&answer).unwrap_or(Value::Null);
        match (method, status) {
            ("DELETE", 204) => drop(told.insert(name, None)),
            (_, 200 | 201) => {
                let max = number(&view, "memory.max_bytes");
                told.insert(name, Some(Told { pid: pid(&view), max, paused: view["state"] == "paused" }));
            }
            _ => {}
        }
    }
}

/// Whatever a client was told is so, whenever the controller dies.
#[test]
fn a_controller_that_is_killed_at_any_moment_keeps_its_word() {
    if skipped("adopt-random") {
        return;
    }
    let mut serve = Serve::start(&[]);
    let mut told = std::collections::BTreeMap::new();
    for round in 1..=10u64 {
        let seed = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let socket = serve.socket();
        let client = std::thread::spawn(move || random_requests(&socket, told, seed));
        // Any moment will do: no condition is waited for here.
        std::thread::sleep(std::time::Duration::from_micros(20_000 + (seed >> 20) % 200_000));
        killed(&mut serve);
        let (known, unknown) = client.join().expect("no panic");
        serve.again();
        for (name, told) in known.iter().filter(|(name, _)| **name != unknown) {
            let Some(told) = told else {
                assert_eq!(serve.ask("GET", &format!("/vms/{name}"), None).0, 404, "round {round}: {name} was removed");
                continue;
            };
            let view = exact(&serve, name);
            let now =
                Told { pid: pid(&view), max: number(&view, "memory.max_bytes"), paused: view["state"] == "paused" };
            assert_eq!(now, *told, "round {round}: {name}: {view}");
        }
        let (_, list) = serve.ask("GET", "/vms", None);
        let list = list.as_array().expect("a list").clone();
        for vm in list.iter().filter(|vm| vm["state"] != "ended") {
            exact(&serve, vm["name"].as_str().expect("a name"));
        }
        wait_until("the sum is what the VMs have", 20, || {
            let (_, list) = serve.ask("GET", "/vms", None);
            let sum: u64 = list.as_array().expect("a list").iter().map(|vm| number(vm, "memory.current_bytes")).sum();
            (number(&serve.ask("GET", "/host", None).1, "current_bytes") == sum).then_some(())
        });
        told = known;
        // Of this one only the next request knows.
        told.remove(unknown);
        serve.ask("DELETE", &format!("/vms/{unknown}"), None);
        told.insert(unknown, None);
    }
}

/// A budget counts for those, too, that were made before it.
#[test]
fn a_new_budget_counts_for_vms_that_are_taken_over() {
    if skipped("adopt-budget") {
        return;
    }
    let mut serve = Serve::start(&["--budget", "max"]);
    let free = serve.create_with("free", &guest("touch 16M 4M seed=5; shell", &json!({})));
    wait_console(&serve, "free", "READY");
    killed(&mut serve);
    serve.again_with(&["--budget", "1G"]);
    let view = wait_until("it is accounted", 20, || Some(serve.show("free")).filter(|vm| vm["accounting"] == true));
    assert_eq!(pid(&view), pid(&free));
    let view = exact(&serve, "free");
    assert_eq!(number(&serve.ask("GET", "/host", None).1, "current_bytes"), number(&view, "memory.current_bytes"));
}

/// A worker that stands still when its controller begins holds nobody up, and is taken over when it goes on.
#[test]
fn a_worker_that_is_silent_is_taken_over_when_it_speaks() {
    if skipped("adopt-silent") {
        return;
    }
    let mut serve = Serve::start(&["--budget", "1G"]);
    let silent = serve.create_with("silent", &guest("touch 8M 4M seed=5; shell", &json!({ "max_bytes": 32 * MIB })));
    wait_console(&serve, "silent", "READY");
    let before = exact(&serve, "silent");
    let other = serve.create("other");
    kill(pid(&silent), libc::SIGSTOP);
    killed(&mut serve);
    serve.again();
    assert_eq!(pid(&serve.show("other")), pid(&other));
    let (status, refusal) = serve.ask("GET", "/vms/silent", None);
    assert_eq!((status, &refusal["code"]), (409, &json!("wrong_state")));
    assert!(refusal["message"].as_str().is_some_and(|words| words.contains("tried again until")), "{refusal}");
    assert_eq!(serve.ask("PUT", "/vms/silent", Some(&shell())).0, 409, "its name stays taken");
    let asked = std::time::Instant::now();
    kill(pid(&silent), libc::SIGCONT);
    wait_until("it is taken over", 30, || (serve.ask("GET", "/vms/silent", None).0 == 200).then_some(()));
    let after = exact(&serve, "silent");
    assert_eq!(pid(&after), pid(&silent));
    let age = number(&after, "age_ms");
    assert!(u128::from(age) > asked.elapsed().as_millis(), "{age} ms: as old as its process, not as its controller");
    for part in ["max_bytes", "stat"] {
        let of = |view: &Value| match part {
            "stat" => view["memory"]["stat"]["guest_bytes"].clone(),
            key => view["memory"][key].clone(),
        };
        assert_eq!(of(&after), of(&before), "{part}");
    }
    let host = number(&serve.ask("GET", "/host", None).1, "current_bytes");
    let sum: u64 = ["silent", "other"].map(|name| number(&serve.show(name), "memory.current_bytes")).iter().sum();
    assert_eq!(host, sum, "what was charged for the worst is given back");
}

/// A worker that cannot be reached has not ended: its name stays taken, what it can hold stays charged, and `rm` ends it.
#[test]
fn a_worker_whose_socket_was_removed_has_not_ended() {
    if skipped("adopt-unreachable") {
        return;
    }
    let mut serve = Serve::start(&["--budget", "1G"]);
    let lost = serve.create("lost");
    killed(&mut serve);
    let place = serve.state().join("lost/worker");
    std::fs::rename(&place, serve.state().join("lost/elsewhere")).expect("moved");
    serve.again();
    let refusal = serve.ask("GET", "/vms/lost", None).1;
    assert!(refusal["message"].as_str().is_some_and(|words| words.contains("nothing answers at")), "{refusal}");
    assert_eq!(serve.ask("PUT", "/vms/lost", Some(&shell())).0, 409);
    let charged = number(&serve.ask("GET", "/host", None).1, "current_bytes");
    assert!(charged > number(&lost, "memory.current_bytes"), "the most it can hold: {charged}");
    assert!(is_alive(pid(&lost)), "nobody has asked for its end");
    assert_eq!(serve.ask("DELETE", "/vms/lost", None).0, 204);
    assert!(!is_alive(pid(&lost)));
    assert_eq!(number(&serve.ask("GET", "/host", None).1, "current_bytes"), 0);
}

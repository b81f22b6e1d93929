//! Three Linux guests under one controller, with a worker's cgroup (v2) around each of them.
//!
//! ```text
//!  / ─┬─ gold    a, b: without a balloon; together they want more than the group may have, and a more than its own limit
//!     └─ silver  c: with a balloon;  d: a payload, whose worker is to talk nonsense
//! ```

use ballast_tests::random::Random;
use ballast_tests::serve::{Console, Serve, is_alive, kill, pid, spew};
use ballast_tests::{PAGE, guest_file, number, payload, resident_pages, wait_until};
use serde_json::{Value, json};

use super::{CMDLINE, MIB};

fn linux(group: &str, max: u64, more: &str) -> Value {
    json!({
        "kernel": guest_file("vmlinux"), "initrd": guest_file("initrd.img"), "group": group,
        "cmdline": format!("{CMDLINE} {more}"),
        "memory": { "size_bytes": 176 * MIB, "max_bytes": max * MIB, "swap_max_bytes": 0 },
        "oom": { "action": "pause", "deadline_ms": 1000 },
    })
}

fn charge(of: &Value) -> u64 {
    number(of, "memory.current_bytes")
}

fn good(serve: &Serve, method: &str, path: &str, body: Value) -> Value {
    let (status, answer) = serve.ask(method, path, Some(&body).filter(|body| !body.is_null()));
    assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
    answer
}

fn group(serve: &Serve, path: &str) -> u64 {
    charge(&good(serve, "GET", &format!("/groups{path}"), Value::Null))
}

/// With every guest stopped: charges are resident memory, and every sum is right. The guests go on then; their views as
/// they were are given.
fn exact(serve: &Serve, names: &[&str], at: &str) -> Vec<Value> {
    for name in names {
        good(serve, "POST", &format!("/vms/{name}/pause"), Value::Null);
    }
    let views = wait_until(&format!("{at}: everything is exact"), 10, || {
        let views: Vec<_> = names.iter().map(|name| serve.show(name)).collect();
        let of = |path: &str| views.iter().filter(|vm| vm["group"] == path).map(charge).sum::<u64>();
        let pages = |vm: &Value| number(vm, "memory.stat.guest_bytes") == resident_pages(vm) * PAGE;
        let sums = ["/gold", "/silver"].into_iter().all(|path| of(path) == group(serve, path));
        let total = views.iter().map(charge).sum::<u64>() == group(serve, "/");
        (views.iter().all(pages) && sums && total).then_some(views)
    });
    for name in names {
        good(serve, "POST", &format!("/vms/{name}/resume"), Value::Null);
    }
    println!(
        "{at}: {}",
        views.iter().map(|vm| format!("{} {} KiB  ", vm["name"], charge(vm) >> 10)).collect::<String>()
    );
    views
}

/// Waits until the policy has paused a VM.
fn paused(serve: &Serve, name: &str) -> Value {
    wait_until(&format!("{name} is held, and then paused"), 20, || {
        Some(serve.show(name)).filter(|vm| vm["state"] == "paused")
    })
}

/// Limits at two levels hold: `a` meets its own, then `b` the group's.
fn limits(serve: &Serve, consoles: &mut [Console]) {
    consoles[0].send("touch 64M seed=9");
    let a = paused(serve, "a");
    assert!(charge(&a) <= 112 * MIB && charge(&a) > 111 * MIB, "{a}");
    consoles[1].send("touch 72M seed=8");
    // Of neither of them anything could be taken, so a pause would help nobody: it stays held.
    wait_until("b is held, and nobody can be chosen", 20, || serve.told("nobody_chosen").pop());
    let b = serve.show("b");
    assert!(b["held"]["now"] == true && b["state"] == "running", "{b}");
    assert!(charge(&b) < 106 * MIB, "its own limit was not met: {b}");
    let gold = group(serve, "/gold");
    assert!(gold <= 216 * MIB && gold > 215 * MIB, "{gold}");
    consoles[2].send("touch 16M seed=7");
    consoles[2].expect("OK", 60);
    // They stay as they are: no page that comes and goes lets one of them go on.
    let of = |kind: &str| serve.told(kind).len();
    assert!(of("resumed") + 1 == of("paused") && of("victim_selected") == 1, "{:?}", serve.events());
}

/// One transaction: what holds both of them, or nothing.
fn transaction(serve: &Serve, consoles: &mut [Console]) {
    let gold = group(serve, "/gold");
    let grow = |of_c: u64| {
        json!([
            { "vm": "a", "limits": { "max_bytes": 176 * MIB } },
            { "group": "/gold", "limits": { "max_bytes": 360 * MIB } },
            { "vm": "c", "limits": { "max_bytes": of_c * MIB } },
        ])
    };
    let (status, answer) = serve.ask("POST", "/limits?mode=refuse", Some(&grow(4)));
    assert_eq!(status, 409, "{answer}");
    assert_eq!((number(&serve.show("a"), "memory.max_bytes"), group(serve, "/gold")), (112 * MIB, gold));
    good(serve, "POST", "/limits", grow(160));
    assert_eq!(number(&serve.show("c"), "memory.max_bytes"), 160 * MIB);
    for console in &consoles[..2] {
        console.expect("OK", 90);
    }
}

/// Booting takes most of the time, so all of it is one life.
/// Semantics: 33, 51, 118.
#[test]
fn linux_three_guests_keep_two_levels_of_limits_through_a_move_and_the_death_of_their_controller() {
    let mut serve = Serve::start(&["--budget", "700M", "--cgroup", "auto"]);
    for (path, max) in [("/gold", 216), ("/silver", 430)] {
        good(&serve, "PUT", &format!("/groups{path}"), json!({ "max_bytes": max * MIB }));
    }
    // Without their balloons nothing keeps the two of gold below what they may use, but the limits.
    let greedy = "module_blacklist=virtio_balloon";
    let guests =
        [("a", linux("/gold", 112, greedy)), ("b", linux("/gold", 176, greedy)), ("c", linux("/silver", 144, ""))];
    let mut consoles = guests.map(|(name, config)| Console::of(&serve.create_with(name, &config)));
    let small = json!({
        "kernel": payload(), "cmdline": "shell", "debug_port": true, "group": "/silver",
        "memory": { "size_bytes": 32 * MIB, "max_bytes": 24 * MIB },
    });
    Console::of(&serve.create_with("d", &small)).expect("READY", 60);
    consoles.iter().for_each(|console| drop(console.expect("READY", 90)));
    exact(&serve, &["a", "b", "c", "d"], "booted");

    limits(&serve, &mut consoles);
    transaction(&serve, &mut consoles);
    exact(&serve, &["a", "b", "c", "d"], "after the transaction");

    // A guest goes to another group with all that it has.
    good(&serve, "POST", "/vms/b/move", json!({ "group": "/silver" }));
    let moved = exact(&serve, &["a", "b", "c", "d"], "moved");
    assert_eq!(moved[1]["group"], "/silver");
    assert_eq!(group(&serve, "/gold"), charge(&serve.show("a")));

    // One worker is killed, another talks nonsense to the controller, and nobody else notices.
    kill(pid(&moved[0]), libc::SIGKILL);
    wait_until("its charge is back", 20, || (group(&serve, "/gold") == 0).then_some(()));
    assert_eq!(serve.show("a")["state"], "ended");
    exact(&serve, &["b", "c", "d"], "a worker was killed");
    assert!(spew(pid(&moved[3]), &mut Random::new(5)) > 0);
    wait_until("its charge is back", 20, || {
        let d = serve.show("d");
        (d["state"] == "ended" && charge(&d) == 0).then_some(())
    });
    assert!(serve.show("d")["end"].as_str().is_some_and(|end| end.contains("garbage")));
    let before = exact(&serve, &["b", "c"], "a worker talked nonsense");

    // So is the controller: the next one finds both of them as they were.
    serve.signal(libc::SIGKILL);
    serve.wait(10);
    assert!(before.iter().all(|vm| is_alive(pid(vm))), "guests outlive their controller");
    serve.again();
    for vm in &before {
        let name = vm["name"].as_str().expect("a name");
        let now = wait_until(&format!("{name} is adopted"), 20, || {
            Some(serve.show(name)).filter(|vm| vm["state"] == "running" && vm["stale"] == false)
        });
        for key in ["pid", "group", "size_bytes"] {
            assert_eq!(now[key], vm[key], "{key}");
        }
        assert_eq!(now["memory"]["max_bytes"], vm["memory"]["max_bytes"]);
    }
    exact(&serve, &["b", "c"], "adopted");

    // Nothing was lost, and nothing in the guests' logs that their limits did not demand.
    for console in &mut consoles[1..] {
        console.send("verify");
        assert!(console.expect("VERIFY", 90).starts_with("VERIFY ok"));
        console.send("dmesg-check");
        let counts = console.expect("DMESG", 60);
        for clean in ["stalls=0", "ooms=0", "bugs=0"] {
            assert!(counts.contains(clean), "{counts}");
        }
    }
    exact(&serve, &["b", "c"], "at the end");
    serve.signal(libc::SIGTERM);
    assert_eq!(serve.wait(60).code(), Some(0));
}

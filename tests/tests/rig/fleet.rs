//! Three guests under one controller.

use ballast_tests::serve::{Console, Serve, is_alive, kill, pid};
use ballast_tests::{PAGE, guest_file, number, resident_pages, wait_until};
use serde_json::{Value, json};

use super::{CMDLINE, MIB};

fn config(group: &str, max: u64, more: &str) -> Value {
    let mut config = json!({
        "kernel": guest_file("vmlinux"), "initrd": guest_file("initrd.img"), "group": group,
        "cmdline": format!("{CMDLINE} {more}"),
        "memory": { "size_bytes": 176 * MIB, "max_bytes": max * MIB },
    });
    if !more.is_empty() {
        config["oom"] = json!({ "deadline_ms": 1000 });
    }
    config
}

fn charge(vm: &Value) -> u64 {
    number(vm, "memory.current_bytes")
}

fn group(serve: &Serve, path: &str) -> u64 {
    let (status, group) = serve.ask("GET", &format!("/groups{path}"), None);
    assert_eq!(status, 200, "{group}");
    charge(&group)
}

/// With every guest stopped: charges are resident memory, and every sum is right. The guests go on then; their views as
/// they were are given.
fn exact(serve: &Serve, names: &[&str], at: &str) -> Vec<Value> {
    for name in names {
        let (status, answer) = serve.ask("POST", &format!("/vms/{name}/pause"), None);
        assert_eq!(status, 200, "{at}: {answer}");
    }
    let views = wait_until(&format!("{at}: everything is exact"), 10, || {
        let views: Vec<_> = names.iter().map(|name| serve.show(name)).collect();
        let of = |path: &str| views.iter().filter(|vm| vm["group"] == path).map(charge).sum::<u64>();
        let pages = |vm: &Value| number(vm, "memory.stat.guest_bytes") == resident_pages(vm) * PAGE;
        let sums = ["/gold", "/silver"].into_iter().all(|path| of(path) == group(serve, path));
        let (_, host) = serve.ask("GET", "/host", None);
        let total = views.iter().map(charge).sum::<u64>() == number(&host, "current_bytes");
        (views.iter().all(pages) && sums && total).then_some(views)
    });
    for name in names {
        let (status, answer) = serve.ask("POST", &format!("/vms/{name}/resume"), None);
        assert_eq!(status, 200, "{at}: {answer}");
    }
    views
}

/// Booting takes most of the time, so all of it is one life.
#[test]
fn linux_three_guests_keep_two_levels_of_limits_through_a_move_and_the_death_of_their_controller() {
    let mut serve = Serve::start(&["--budget", "640M"]);
    for (path, max) in [("/gold", 264), ("/silver", 400)] {
        let (status, group) = serve.ask("PUT", &format!("/groups{path}"), Some(&json!({ "max_bytes": max * MIB })));
        assert_eq!(status, 201, "{group}");
    }
    // Without their balloons nothing keeps the two of gold below what they may use, but the limits.
    let greedy = "module_blacklist=virtio_balloon";
    let guests =
        [("a", config("/gold", 112, greedy)), ("b", config("/gold", 176, greedy)), ("c", config("/silver", 144, ""))];
    let mut consoles: Vec<_> =
        guests.iter().map(|(name, config)| Console::of(&serve.create_with(name, config))).collect();
    consoles.iter().for_each(|console| drop(console.expect("READY", 90)));
    exact(&serve, &["a", "b", "c"], "booted");

    // One meets its own limit, then the other one meets the group's.
    consoles[0].send("touch 64M 9");
    let held = |name: &str| {
        wait_until(&format!("{name} is held and paused"), 60, || {
            Some(serve.show(name)).filter(|vm| vm["state"] == "paused")
        })
    };
    let a = held("a");
    assert!(charge(&a) <= 112 * MIB && charge(&a) > 110 * MIB, "{a}");
    consoles[1].send("touch 72M 8");
    let b = held("b");
    assert!(charge(&b) < 176 * MIB - MIB, "its own limit was not met: {b}");
    let gold = group(&serve, "/gold");
    assert!(gold <= 264 * MIB && gold > 262 * MIB, "{gold}");
    consoles[2].send("touch 16M 7");
    consoles[2].expect("OK", 60);

    // One transaction: what holds both of them, or nothing.
    let grow = |of_c: u64| {
        json!([
            { "vm": "a", "limits": { "max_bytes": 176 * MIB } },
            { "group": "/gold", "limits": { "max_bytes": 360 * MIB } },
            { "vm": "c", "limits": { "max_bytes": of_c * MIB } },
        ])
    };
    let (status, answer) = serve.ask("POST", "/limits?mode=refuse", Some(&grow(4)));
    assert_eq!(status, 409, "{answer}");
    assert_eq!((number(&serve.show("a"), "memory.max_bytes"), group(&serve, "/gold")), (112 * MIB, gold));
    let (status, answer) = serve.ask("POST", "/limits", Some(&grow(160)));
    assert_eq!(status, 200, "{answer}");
    assert_eq!(number(&serve.show("c"), "memory.max_bytes"), 160 * MIB);
    for console in &consoles[..2] {
        console.expect("OK", 90);
    }
    exact(&serve, &["a", "b", "c"], "after the transaction");

    // A guest goes to another group with all that it has.
    let (status, answer) = serve.ask("POST", "/vms/b/move", Some(&json!({ "group": "/silver" })));
    assert_eq!(status, 200, "{answer}");
    let moved = exact(&serve, &["a", "b", "c"], "moved");
    assert_eq!(moved[1]["group"], "/silver");
    assert_eq!(group(&serve, "/gold"), charge(&serve.show("a")));

    // One worker is killed, and nobody else notices.
    kill(pid(&moved[0]), libc::SIGKILL);
    wait_until("its charge is back", 20, || (group(&serve, "/gold") == 0).then_some(()));
    assert_eq!(serve.show("a")["state"], "ended");
    let before = exact(&serve, &["b", "c"], "a worker was killed");

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

//! Groups of `ballast serve`, with the real program: limits at two levels, admission, and what is refused.

use ballast_tests::serve::{Console, Serve, pid};
use ballast_tests::{http, number, payload, resident_pages, skipped, swap_or_skip, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// What these tests ask for often.
trait Groups {
    /// A request; nothing is sent for `null`.
    fn request(&self, method: &str, path: &str, body: Value) -> (u16, Value);
    /// A verb: its status and what it printed.
    fn words(&self, words: &[&str]) -> (Option<i32>, String);
    fn wait_console(&self, name: &str, text: &str);

    /// A request that must succeed.
    fn good(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.request(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// A request that must be refused: status, code and body.
    fn refused(&self, method: &str, path: &str, body: Value) -> (u16, String, Value) {
        let (status, refusal) = self.request(method, path, body);
        assert!(status >= 400, "{method} {path}: {status} {refusal}");
        (status, refusal["code"].as_str().expect("a code").to_owned(), refusal)
    }

    fn group(&self, path: &str) -> Value {
        self.good("GET", &format!("/groups{path}"), Value::Null)
    }
}

impl Groups for Serve {
    fn request(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        self.ask(method, path, Some(&body).filter(|body| !body.is_null()))
    }

    fn words(&self, words: &[&str]) -> (Option<i32>, String) {
        let output = self.verb(words);
        let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    fn wait_console(&self, name: &str, text: &str) {
        wait_until(&format!("{name} says {text}"), 20, || {
            let (_, console) = http(&self.socket(), "GET", &format!("/vms/{name}/console"), None).ok()?;
            console.contains(text).then_some(())
        });
    }
}

/// A guest of 64 MiB in `group` that does `cmdline`.
fn guest(group: &str, cmdline: &str, memory: Value) -> Value {
    let mut all = json!({ "size_bytes": 64 * MIB, "swap_max_bytes": 0 });
    all.as_object_mut().expect("an object").extend(memory.as_object().expect("an object").clone());
    json!({ "kernel": payload(), "cmdline": cmdline, "debug_port": true, "group": group, "memory": all })
}

/// A VM that stays within what it is promised loses no page because others fill its group, nor when another controller takes
/// it over.
/// Semantics: T2.
#[test]
fn a_promise_is_kept_in_a_full_group() {
    if skipped("groups-promise") {
        return;
    }
    let mut serve = Serve::start(&[]);
    serve.good("PUT", "/groups/gold", json!({ "max_bytes": 64 * MIB }));
    let create = |serve: &Serve, name: &str, min: u64| {
        let memory = json!({ "size_bytes": 128 * MIB, "swap_max_bytes": null, "min_bytes": min });
        let console = Console::of(&serve.create_with(name, &guest("/gold", "shell", memory)));
        console.expect("READY", 20);
        console
    };
    let mut promised = create(&serve, "promised", 32 * MIB);
    promised.ok("touch 16M 16M");
    let mut busy = create(&serve, "busy", 0);
    busy.ok("touch 16M 80M seed=7");
    let swapped = |serve: &Serve, name: &str| number(&serve.show(name), "swap.current_bytes");
    assert!(swapped(&serve, "busy") > 30 * MIB, "the group is full");
    assert_eq!(swapped(&serve, "promised"), 0, "{}", serve.show("promised"));
    for _ in 0..2 {
        serve.signal(libc::SIGKILL);
        serve.wait(10);
        serve.again();
        busy.ok("verify 16M 80M seed=7");
        assert_eq!(swapped(&serve, "promised"), 0, "{}", serve.show("promised"));
    }
}

/// Semantics: 13, 73.
#[test]
fn groups_are_made_changed_listed_and_removed() {
    if skipped("groups-life") {
        return;
    }
    let serve = Serve::start(&[]);
    let (status, gold) = serve.ask("PUT", "/groups/gold", Some(&json!({ "max_bytes": 512 * MIB })));
    assert_eq!((status, number(&gold, "memory.max_bytes"), &gold["path"]), (201, 512 * MIB, &json!("/gold")), "{gold}");
    assert_eq!(serve.ask("PUT", "/groups/gold", Some(&json!({ "max_bytes": 512 * MIB }))).0, 200, "once more");
    assert_eq!(serve.ask("PUT", "/groups/gold%2Fweb", Some(&json!({}))).0, 201, "as generated clients write it");
    assert_eq!(serve.group("/gold/web")["accounting"], true, "below an accounted group");
    let other = serve.refused("PUT", "/groups/gold", json!({ "max_bytes": 5 * MIB }));
    assert_eq!((other.0, other.1.as_str()), (409, "already_exists"));

    serve.good("PUT", "/vms/w1", guest("/gold/web", "shell", json!({})));
    let w1 = serve.show("w1");
    assert_eq!((&w1["group"], &w1["accounting"]), (&json!("/gold/web"), &json!(true)));
    // The worker tells of its pages before its first answer, and the group has no others.
    let gold = serve.group("/gold");
    assert_eq!((number(&gold, "vms"), number(&gold, "groups")), (1, 1));
    assert_eq!(number(&serve.group("/"), "vms"), 1);
    wait_until("the counters agree", 10, || {
        let used = number(&serve.show("w1"), "memory.current_bytes");
        let above = ["/gold/web", "/gold", "/"].map(|path| number(&serve.group(path), "memory.current_bytes"));
        (above == [used; 3]).then_some(())
    });

    let view = serve.good("PATCH", "/groups/gold?generation=1", json!({ "max_bytes": 256 * MIB, "min_bytes": MIB }));
    assert_eq!((number(&view, "memory.max_bytes"), number(&view, "generation")), (256 * MIB, 2));
    let stale = serve.refused("PATCH", "/groups/gold?generation=1", json!({ "max_bytes": 5 * MIB }));
    assert_eq!((stale.0, stale.1.as_str()), (409, "generation_mismatch"));
    assert_eq!(serve.refused("DELETE", "/groups/gold", Value::Null).1, "not_empty");
    assert_eq!(serve.refused("DELETE", "/groups/gold/web", Value::Null).1, "not_empty", "a VM is in it");

    assert_eq!(serve.ask("DELETE", "/vms/w1", None).0, 204);
    assert_eq!(serve.ask("DELETE", "/groups/gold/web", None).0, 204, "dying or gone");
    assert_eq!(serve.ask("DELETE", "/groups/gold", None).0, 204);
    wait_until("nothing is left", 10, || {
        let groups = serve.good("GET", "/groups", Value::Null);
        let groups = groups.as_array().expect("a list");
        assert!(groups.iter().all(|group| group["path"] == "/" || group["dying"] == true), "{groups:?}");
        (groups.len() == 1).then_some(())
    });
    assert_eq!(number(&serve.group("/"), "memory.current_bytes"), 0);
    let (status, events) = http(&serve.socket(), "GET", "/events?follow=false", None).expect("events");
    assert_eq!(status, 200);
    for (kind, group) in [("created", "/gold/web"), ("limit_changed", "/gold"), ("removed", "/gold/web")] {
        let found = events.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        assert!(found.into_iter().any(|event| event["event"] == kind && event["group"] == group), "{kind} {group}");
    }
}

#[test]
fn bad_paths_and_missing_groups_are_refused_and_make_nothing() {
    if skipped("groups-paths") {
        return;
    }
    let serve = Serve::start(&[]);
    for path in ["gold/", "gold//web", "../gold", "-gold", "go%20ld", "%2e%2e", "a/b/c/d/e/f/g/h/i", "gold%00"] {
        let (status, code, refusal) = serve.refused("PUT", &format!("/groups/{path}"), json!({}));
        assert_eq!((status, code.as_str()), (400, "bad_request"), "{path}: {refusal}");
    }
    for body in
        [json!([]), json!({ "max_bytes": 1 }), json!({ "frob": 1 }), json!({ "min_bytes": 8192, "max_bytes": 4096 })]
    {
        assert_eq!(serve.refused("PUT", "/groups/gold", body.clone()).0, 400, "{body}");
    }
    let (status, code, refusal) = serve.refused("PUT", "/groups/gold/web", json!({}));
    assert_eq!((status, code.as_str()), (409, "no_such_group"));
    assert!(refusal["message"].as_str().is_some_and(|text| text.contains("no group /gold:")), "{refusal}");
    let (status, code, _) = serve.refused("PUT", "/vms/web", guest("/gold", "shell", json!({})));
    assert_eq!((status, code.as_str()), (409, "no_such_group"));
    assert_eq!(serve.refused("PUT", "/vms/web", guest("gold", "shell", json!({}))).0, 400);
    for (method, path, status) in [
        ("GET", "/groups/gold", 404),
        ("PATCH", "/groups/gold", 404),
        ("DELETE", "/groups/gold", 404),
        ("DELETE", "/groups/", 409),
        ("POST", "/groups", 405),
    ] {
        let body = json!({});
        assert_eq!(serve.ask(method, path, Some(&body)).0, status, "{method} {path}");
    }
    let groups = serve.good("GET", "/groups", Value::Null);
    assert_eq!(groups.as_array().map(Vec::len), Some(1), "{groups}");

    // A name is used once on the host, and a path is a VM or a group.
    serve.good("PUT", "/groups/gold", json!({}));
    serve.good("PUT", "/vms/web", guest("/gold", "shell", json!({})));
    assert_eq!(serve.refused("PUT", "/vms/web", guest("/", "shell", json!({}))).1, "already_exists");
    assert_eq!(serve.refused("PUT", "/groups/gold/web", json!({})).1, "already_exists");
    assert_eq!(serve.refused("PUT", "/vms/gold", guest("/", "shell", json!({}))).1, "already_exists");
    assert_eq!(serve.refused("PUT", "/groups/gold/web/x", json!({})).1, "no_such_group", "a VM is no group");
}

/// Two guests want 40 MiB each: one has a limit of its own, both share one, and neither is ever above.
/// Semantics: 1, 63.
#[test]
fn limits_at_two_levels_hold() {
    if skipped("groups-levels") {
        return;
    }
    let serve = Serve::start(&[]);
    serve.good("PUT", "/groups/gold", json!({ "max_bytes": 48 * MIB }));
    serve.good("PUT", "/vms/a", guest("/gold", "touch 16M 40M seed=7; shell", json!({ "max_bytes": 16 * MIB })));
    // First the one with a limit of its own: else the group's might be full before it meets that.
    wait_until("its own limit has refused", 20, || {
        let a = serve.show("a");
        assert!(number(&a, "memory.current_bytes") <= 16 * MIB, "{a}");
        (number(&a, "memory.events.failcnt") > 0).then_some(())
    });
    serve.good("PUT", "/vms/b", guest("/gold", "touch 16M 40M seed=7; shell", json!({})));
    // A guest is also held for the moment that an answer takes: only a refusal tells which limit it met.
    wait_until("the group's limit has refused", 20, || {
        let (a, gold) = (serve.show("a"), serve.group("/gold"));
        assert!(number(&a, "memory.current_bytes") <= 16 * MIB, "{a}");
        assert!(number(&gold, "memory.current_bytes") <= 48 * MIB, "{gold}");
        (number(&gold, "memory.events_local.failcnt") > 0).then_some(())
    });
    assert_eq!(number(&serve.show("b"), "memory.events.failcnt"), 0, "it has no limit of its own");
    // More for the group is more for the one that its limit held.
    serve.good("PATCH", "/groups/gold", json!({ "max_bytes": 96 * MIB }));
    serve.wait_console("b", "OK touch");
    serve.good("PATCH", "/vms/a/memory", json!({ "max_bytes": null }));
    serve.wait_console("a", "OK touch");
}

/// What the VMs of a group have in their stores comes down with the group's limit, where they have files for it.
/// Semantics: 118.
#[test]
fn stores_that_are_too_large_for_a_lower_limit_of_their_group_move_to_files() {
    let Some(directory) = swap_or_skip("groups-store-file") else { return };
    let serve = Serve::start(&[]);
    serve.good("PUT", "/groups/gold", json!({ "max_bytes": 96 * MIB }));
    for name in ["a", "b"] {
        let memory = json!({ "size_bytes": 96 * MIB, "swap_max_bytes": null });
        let mut vm = guest("/gold", "touch 16M 64M seed=7 fill=half; verify 16M 64M seed=7 fill=half; park", memory);
        vm["swap_dir"] = json!(directory.path());
        serve.good("PUT", &format!("/vms/{name}"), vm);
        serve.wait_console(name, "OK verify");
    }
    for max in [64 * MIB, 40 * MIB] {
        serve.good("PATCH", "/groups/gold?mode=reclaim&wait_ms=20000", json!({ "max_bytes": max }));
        let store = wait_until("the stores are within half of it", 20, || {
            let store = number(&serve.group("/gold"), "memory.store_bytes");
            (store <= max / 2).then_some(store)
        });
        assert!(store > max / 8, "they are not emptied: {store}");
    }
}

/// What is promised must be there, and a refusal says what is missing.
/// Semantics: 56, 98, T2.
#[test]
fn what_does_not_fit_is_refused_with_what_is_missing() {
    if skipped("groups-admission") {
        return;
    }
    let serve = Serve::start(&["--budget", "256M"]);
    serve.good("PUT", "/groups/gold", json!({ "max_bytes": 128 * MIB }));
    serve.good("PUT", "/groups/gold/a", json!({ "min_bytes": 96 * MIB }));
    let (status, code, refusal) = serve.refused("PUT", "/groups/gold/b", json!({ "min_bytes": 40 * MIB }));
    assert_eq!((status, code.as_str()), (409, "does_not_fit"), "{refusal}");
    assert_eq!(number(&refusal, "missing_bytes"), 8 * MIB);
    let (_, code, refusal) = serve.refused("PATCH", "/groups/gold", json!({ "max_bytes": 64 * MIB }));
    assert_eq!((code.as_str(), number(&refusal, "missing_bytes")), ("does_not_fit", 32 * MIB));
    let (_, code, refusal) = serve.refused("PATCH", "/groups/", json!({ "max_bytes": 90 * MIB }));
    assert_eq!((code.as_str(), number(&refusal, "missing_bytes")), ("does_not_fit", 6 * MIB), "the host's budget");
    let vm = guest("/gold", "shell", json!({ "min_bytes": 40 * MIB }));
    let (_, code, refusal) = serve.refused("PUT", "/vms/web", vm);
    assert_eq!((code.as_str(), number(&refusal, "missing_bytes")), ("does_not_fit", 8 * MIB));
    assert_eq!(serve.ask("GET", "/vms/web", None).0, 404, "nothing is left of it");
    serve.good("PUT", "/vms/web", guest("/gold", "shell", json!({ "min_bytes": 32 * MIB })));

    // Overhead that nobody can pay: the bomb ends, and the neighbour still gets its own.
    serve.good("PUT", "/groups/bomb", json!({ "vmm_max_bytes": 6 * MIB }));
    serve.good("PUT", "/groups/calm", json!({ "vmm_max_bytes": 6 * MIB }));
    let refusal = (0..20).find_map(|n| {
        let (status, answer) = serve.ask("PUT", &format!("/vms/bomb-{n}"), Some(&guest("/bomb", "shell", json!({}))));
        (status != 201).then_some(answer)
    });
    let refusal = refusal.expect("it ends");
    assert_eq!(refusal["code"], "overhead_refused", "{refusal}");
    assert!(refusal["message"].as_str().is_some_and(|text| text.contains("vmm.max of /bomb is 6M")), "{refusal}");
    serve.good("PUT", "/vms/calm", guest("/calm", "shell", json!({})));
    assert!(number(&serve.group("/bomb"), "vmm.current_bytes") <= 6 * MIB);
    assert_eq!(number(&serve.group("/bomb"), "memory.events.oom"), 0, "no victim for overhead");
}

/// Semantics: 118, T3.
#[test]
fn several_vms_and_their_group_change_in_one_transaction() {
    if skipped("groups-transaction") {
        return;
    }
    let serve = Serve::start(&[]);
    serve.good("PUT", "/groups/gold", json!({ "max_bytes": 160 * MIB }));
    for name in ["a", "b", "c"] {
        serve.good(
            "PUT",
            &format!("/vms/{name}"),
            guest("/gold", "touch 16M 8M; shell", json!({ "max_bytes": 48 * MIB })),
        );
        serve.wait_console(name, "OK touch");
    }
    let max = |name: &str| number(&serve.show(name), "memory.max_bytes") / MIB;
    let entry = |name: &str, mib: u64| json!({ "vm": name, "limits": { "max_bytes": mib * MIB } });
    let all = json!([entry("a", 40), entry("b", 24), entry("c", 56), { "group": "/gold", "limits": { "max_bytes": 120 * MIB } }]);
    let done = serve.good("POST", "/limits?wait_ms=5000", all);
    assert_eq!(done["in_force"], true, "{done}");
    assert_eq!((done["vms"].as_array().map(Vec::len), done["groups"].as_array().map(Vec::len)), (Some(3), Some(1)));
    assert_eq!([max("a"), max("b"), max("c")], [40, 24, 56]);

    // One that cannot be refuses all: the payload gives nothing back.
    let (status, code, refusal) = serve.refused("POST", "/limits?mode=refuse", json!([entry("c", 64), entry("b", 4)]));
    assert_eq!((status, code.as_str()), (409, "limit_below_usage"), "{refusal}");
    assert_eq!([max("a"), max("b"), max("c")], [40, 24, 56]);
    for (body, status) in [
        (json!([]), 400),
        (json!({}), 400),
        (json!([{ "limits": {} }]), 400),
        (json!([{ "vm": "a", "group": "/gold", "limits": {} }]), 400),
        (json!([{ "vm": "a", "limits": { "frob": 1 } }]), 400),
        (json!([entry("a", 41), entry("a", 42)]), 400),
        (json!([entry("a", 41), entry("nobody", 42)]), 404),
        (json!([entry("a", 41), { "vm": "b", "limits": { "max_bytes": 30 * MIB }, "generation": 99 }]), 409),
    ] {
        let (got, _, refusal) = serve.refused("POST", "/limits", body.clone());
        assert_eq!(got, status, "{body}: {refusal}");
    }
    assert_eq!([max("a"), max("b"), max("c")], [40, 24, 56]);

    let (status, text) = serve.words(&["set", "a", "b", "/gold", "memory.max=44M"]);
    assert_eq!(status, Some(0), "{text}");
    assert_eq!([max("a"), max("b"), number(&serve.group("/gold"), "memory.max_bytes") / MIB], [44; 3]);
    assert_eq!(serve.words(&["set", "a", "c", "memory.max=2M"]).0, Some(1), "less than they cost without their guests");
    assert_eq!(serve.words(&["set", "a", "c", "swap.max=0"]).0, Some(0));
    let (status, text) = serve.words(&["set", "a", "c", "memory.max=6M", "--wait", "100ms"]);
    assert_eq!(status, Some(3), "{text}");
    assert!(text.contains("a: not reached yet") && text.contains("c: not reached yet"), "{text}");
    let (status, text) = serve.words(&["set", "a", "b", "memory.max=45M", "--json"]);
    assert_eq!(status, Some(0), "{text}");
    let view: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(view["vms"].as_array().map(Vec::len), Some(2));
}

/// A VM at rest has the same pages before and after, and so have the groups that it leaves, enters and never leaves.
/// Semantics: 33, 89, 100.
#[test]
fn a_vm_and_a_group_move_with_equal_counts() {
    if skipped("groups-move") {
        return;
    }
    let serve = Serve::start(&[]);
    for (path, max) in [("/gold", 128), ("/iron", 64), ("/tin", 4)] {
        serve.good("PUT", &format!("/groups{path}"), json!({ "max_bytes": max * MIB }));
    }
    serve.good("PUT", "/vms/web", guest("/gold", "touch 16M 8M seed=7; shell", json!({})));
    serve.wait_console("web", "OK touch");
    serve.good("POST", "/vms/web/pause", Value::Null);
    let rest = || {
        wait_until("the stock is back", 10, || {
            Some(serve.show("web")).filter(|vm| number(vm, "memory.stat.stock_bytes") == 0)
        })
    };
    let used = |path: &str| number(&serve.group(path), "memory.current_bytes");
    let vm = rest();
    let before = number(&vm, "memory.current_bytes");
    assert_eq!((used("/gold"), used("/iron"), used("/")), (before, 0, before));

    let moved = serve.good("POST", "/vms/web/move", json!({ "group": "/iron" }));
    assert_eq!(moved["group"], "/iron");
    assert_eq!((used("/gold"), used("/iron"), used("/")), (0, before, before));
    let after = rest();
    assert_eq!(number(&after, "memory.current_bytes"), before);
    assert_eq!(number(&after, "memory.stat.guest_bytes"), resident_pages(&after) * 4096);
    assert_eq!(serve.good("POST", "/vms/web/move", json!({ "group": "/iron" }))["group"], "/iron", "once more");

    let (status, code, refusal) = serve.refused("POST", "/vms/web/move", json!({ "group": "/tin" }));
    assert_eq!((status, code.as_str()), (409, "does_not_fit"), "{refusal}");
    assert_eq!(number(&refusal, "missing_bytes"), before - 4 * MIB);
    assert_eq!((used("/iron"), used("/tin")), (before, 0), "nothing has changed");

    let moved = serve.good("POST", "/groups/iron/move", json!({ "parent": "/gold" }));
    assert_eq!(moved["path"], "/gold/iron");
    assert_eq!((used("/gold"), used("/gold/iron"), used("/")), (before, before, before));
    for (path, body, status) in [
        ("/groups/gold/move", json!({ "parent": "/gold/iron" }), 409),
        ("/groups/gold/move", json!({ "parent": "/none" }), 409),
        ("/groups/none/move", json!({ "parent": "/" }), 404),
        ("/groups/move", json!({ "parent": "/gold" }), 409),
        ("/groups/move/move", json!({ "parent": "/gold" }), 400),
        ("/groups/gold/frob", json!({ "parent": "/" }), 405),
        ("/groups/gold/move", json!({ "group": "/" }), 400),
        ("/vms/web/move", json!({ "group": "gold" }), 400),
        ("/vms/none/move", json!({ "group": "/gold" }), 404),
    ] {
        let (got, _, refusal) = serve.refused("POST", path, body);
        assert_eq!(got, status, "{path}: {refusal}");
    }
    // The same words are another VM now, and those of where it is are the same.
    assert_eq!(
        serve.refused("PUT", "/vms/web", guest("/gold", "touch 16M 8M seed=7; shell", json!({}))).1,
        "already_exists"
    );
    let (status, _) = serve.ask("PUT", "/vms/web", Some(&guest("/gold/iron", "touch 16M 8M seed=7; shell", json!({}))));
    assert_eq!(status, 200);
    let (status, text) = serve.words(&["move", "web", "/"]);
    assert_eq!((status, used("/gold")), (Some(0), 0), "{text}");
    let (status, text) = serve.words(&["group", "move", "/gold/iron", "/", "--json"]);
    assert_eq!(status, Some(0), "{text}");
    assert_eq!(serve.good("POST", "/vms/web/resume", Value::Null)["state"], "running");
    let (_, events) = http(&serve.socket(), "GET", "/events?follow=false", None).expect("events");
    assert_eq!(events.lines().filter(|line| line.contains("\"event\":\"moved\"")).count(), 4, "{events}");
}

/// Memory of a group comes back from its VMs together, and nobody else's. No limit is needed for it, and nothing is lost.
/// Semantics: 41.
#[test]
fn memory_of_a_group_is_reclaimed_from_its_vms() {
    if skipped("groups-reclaim") {
        return;
    }
    let serve = Serve::start(&[]);
    serve.good("PUT", "/groups/pair", json!({ "track": true }));
    let mut consoles = [("one", "/pair"), ("two", "/pair"), ("other", "/")].map(|(name, group)| {
        let config = guest(group, "touch 16M 32M seed=7; shell", json!({ "swap_max_bytes": null, "track": true }));
        let console = Console::of(&serve.create_with(name, &config));
        console.expect("READY", 20);
        console
    });
    let used = || number(&serve.group("/pair"), "memory.current_bytes");
    let evicted = || ["one", "two", "other"].map(|name| number(&serve.show(name), "cold.evicted_bytes"));
    let before = used();
    let (status, text) = serve.words(&["reclaim", "/pair", "40M", "--json"]);
    assert_eq!(status, Some(0), "{text}");
    let reclaimed: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!((number(&reclaimed, "reclaimed_bytes"), &reclaimed["vm"]), (40 * MIB, &Value::Null));
    assert_eq!(
        (&reclaimed["group"]["path"], &reclaimed["group"]["memory"]["max_bytes"]),
        (&json!("/pair"), &Value::Null)
    );
    // Their stock may be there again: one for each.
    assert!(used() <= before - 20 * MIB, "{before} before, {} after", used());
    let [one, two, other] = evicted();
    assert!(one > 2 * MIB && two > 2 * MIB && other == 0, "{one}, {two} and {other}");
    let (status, text) = serve.words(&["reclaim", "/", "40M"]);
    assert_eq!(status, Some(0), "{text}");
    assert!(evicted()[2] > 4 * MIB, "{:?}", evicted());
    for console in &mut consoles {
        console.send("verify 16M 32M seed=7");
        assert!(console.expect("OK verify", 20).contains("bad=0"));
    }
}

/// What a VM needs that has become busy in a full group comes from its neighbour, of which it is known that it is idle. Soon it
/// does not have to evict what it uses itself.
/// Semantics: 41, 63.
#[test]
fn cold_pages_of_a_neighbour_go_before_those_that_are_used() {
    if skipped("groups-cold-neighbour") {
        return;
    }
    let serve = Serve::start(&[]);
    serve.good("PUT", "/groups/pair", json!({ "max_bytes": 200 * MIB }));
    let create = |name: &str, cmdline: &str| {
        let memory = json!({ "size_bytes": 256 * MIB, "swap_max_bytes": null, "ageing_s": 1 });
        Console::of(&serve.create_with(name, &guest("/pair", cmdline, memory)))
    };
    let _idle = create("idle", "touch 16M 150M seed=3; park");
    wait_until("it is idle", 60, || (number(&serve.show("idle"), "memory.stat.idle_bytes") >= 120 * MIB).then_some(()));
    let busy = create("busy", "touch 16M 100M seed=3; access hot 16M 100M hot=90M period=1000");
    let evicted = |name: &str| number(&serve.show(name), "cold.evicted_bytes");
    // As it begins it is faster than anybody can give; then it has what it uses, and keeps it.
    wait_until("it evicts nothing", 60, || {
        let before = evicted("busy");
        let periods = [0; 2].map(|_| busy.expect("ACCESS", 60));
        let all = periods.iter().all(|period| period.contains(&format!(" distinct={} ", 90 * MIB / 4096)));
        (all && evicted("busy") == before).then_some(())
    });
    assert!(number(&serve.show("busy"), "memory.stat.guest_bytes") >= 90 * MIB);
    assert!(evicted("idle") > 40 * MIB, "{}", evicted("idle"));
    assert_eq!(number(&serve.show("idle"), "cold.refaulted_bytes"), 0);
}

/// Pages that do not shrink go to the file of a VM that has one, and stay where there is none. So all that the second one needs comes
/// from the first, although much of its own memory looks as idle: it is not held for long, and nobody is chosen.
/// Semantics: 41, 42.
#[test]
fn who_has_a_file_gives_for_a_neighbour_whose_pages_do_not_shrink() {
    let Some(directory) = swap_or_skip("groups-hard-neighbour") else { return };
    let serve = Serve::start(&[]);
    serve.good("PUT", "/groups/mixed", json!({ "max_bytes": 96 * MIB }));
    let create = |name: &str, cmdline: &str, more: Value| {
        let memory = json!({ "size_bytes": 128 * MIB, "swap_max_bytes": null });
        let mut vm = guest("/mixed", cmdline, memory);
        vm.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        serve.create_with(name, &vm);
        serve.wait_console(name, "OK touch");
    };
    create("filed", "touch 16M 50M seed=1 fill=full; park", json!({ "swap_dir": directory.path() }));
    create("hard", "touch 16M 60M seed=3 fill=full; park", json!({ "oom": { "deadline_ms": 5_000 } }));
    assert!(number(&serve.show("filed"), "cold.file_bytes") > 15 * MIB);
    let states = ["filed", "hard"].map(|name| serve.show(name)["state"].clone());
    assert_eq!(states, ["running", "running"]);
    let tried = number(&serve.show("hard"), "cold.incompressible_bytes");
    assert!(tried < 4 * 60 * MIB, "they are not tried again and again: {tried}");
}

#[test]
fn the_command_line_has_groups() {
    if skipped("groups-cli") {
        return;
    }
    let serve = Serve::start(&[]);
    let ok = |words: &[&str]| {
        let (status, text) = serve.words(words);
        assert_eq!(status, Some(0), "{words:?}: {text}");
        text
    };
    ok(&["group", "create", "/gold", "memory.max=512M", "memory.min=16M"]);
    ok(&["group", "create", "/gold/web"]);
    let kernel = payload();
    let kernel = kernel.to_str().expect("text");
    let words = ["--memory", "size=64M", "--cmdline", "shell", "--debug-port", "--kernel", kernel];
    ok(&[&["create", "w1", "--group", "/gold/web"], &words[..]].concat());
    let ps = ok(&["ps"]);
    assert!(ps.lines().any(|line| line.starts_with("w1    /gold/web  running")), "{ps}");
    ok(&["group", "set", "/gold", "memory.max=256M"]);
    let ls = ok(&["group", "ls"]);
    let rows: Vec<Vec<&str>> = ls.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows.iter().map(|row| row[0]).collect::<Vec<_>>(), ["GROUP", "/", "/gold", "/gold/web"], "{ls}");
    assert_eq!((rows[2][1], rows[2][3], rows[2][4]), ("1", "16M", "256M"), "{ls}");
    assert!(ok(&["group", "show", "/gold"]).contains("1 VM, 1 group below"));
    ok(&["reclaim", "/gold", "0"]);
    ok(&["reclaim", "/", "0"]);
    let json: Value = serde_json::from_str(&ok(&["group", "show", "/gold", "--json"])).expect("JSON");
    assert_eq!(number(&json, "memory.max_bytes"), 256 * MIB);
    let list: Value = serde_json::from_str(&ok(&["group", "ls", "--json"])).expect("JSON");
    assert_eq!(list.as_array().map(Vec::len), Some(3));
    for (words, status, part) in [
        (&["group", "create", "gold"][..], 2, "not the path of a group"),
        (&["group", "create", "/gold//x"], 2, "is not a name"),
        (&["group", "set", "/gold", "memory.frob=1M"], 2, "no limit"),
        (&["group", "set", "/gold", "memory.min=300M"], 1, "choose a lower memory.min or a higher memory.max"),
        (&["group", "rm", "/gold"], 1, "has members (1 VMs, 1 groups below)"),
        (&["group", "show", "/none"], 1, "there is no group /none"),
        (&["reclaim", "/none", "4K"], 1, "there is no group /none"),
        (&["reclaim", "/gold", "1G", "--wait", "1s"], 3, "nothing more could be had"),
        (&["group", "create", "/gold/reclaim"], 2, "no group is called \"reclaim\""),
        (&["group", "create", "/none/x"], 1, "group create /none"),
    ] {
        let (got, text) = serve.words(words);
        assert_eq!(got, Some(status), "{words:?}: {text}");
        assert!(text.contains(part), "{words:?}: {text}");
    }
    ok(&["rm", "w1"]);
    ok(&["group", "rm", "/gold/web"]);
}

/// How often the threads of a process have gone to sleep.
fn sleeps(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it lives").flatten();
    let texts = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
    texts
        .filter_map(|text| text.split_once("\nvoluntary_ctxt_switches:")?.1.lines().next()?.trim().parse::<u64>().ok())
        .sum()
}

/// What everybody has to wait for is said once: the workers of VMs that are held in a full group, or that a user has paused, are at
/// rest. Where nothing could be taken from anybody nobody is paused, and that is said.
/// Semantics: 49, 51, B41.
#[test]
fn a_full_group_whose_vms_are_all_held_is_at_rest() {
    if skipped("groups-at-rest") {
        return;
    }
    let serve = Serve::start(&[]);
    // Less than any one of them wants, so that none of them is content while the others wait.
    serve.good("PUT", "/groups/full", json!({ "max_bytes": 56 * MIB }));
    let names = ["a", "b", "c", "d"];
    let guests = names.map(|name| {
        let mut shell = guest("/full", "shell", json!({}));
        shell["oom"] = json!({ "action": "pause", "deadline_ms": 300 });
        Console::of(&serve.create_with(name, &shell))
    });
    for mut guest in guests {
        guest.expect("READY", 20);
        guest.send("storm");
    }
    serve.good("PUT", "/vms/quiet", guest("/", "touch 16M 8M; shell", json!({ "max_bytes": 60 * MIB })));
    serve.wait_console("quiet", "READY");
    serve.good("POST", "/vms/quiet/pause", Value::Null);
    let is_held = |name: &str| serve.show(name)["held"]["now"] == true;
    wait_until("all are held", 20, || names.iter().all(|name| is_held(name)).then_some(()));
    let events = || http(&serve.socket(), "GET", "/events?follow=false", None).expect("events").1;
    let of = |kind: &str| events().lines().filter(|line| line.contains(&format!("\"event\":\"{kind}\""))).count();
    wait_until("that is said", 20, || (of("nobody_chosen") > 0).then_some(()));
    let full = serve.group("/full");
    let missing = number(&full, "memory.max_bytes") - number(&full, "memory.current_bytes");
    assert!(missing < MIB, "{full}");
    let pids: Vec<_> = names.iter().chain(&["quiet"]).map(|name| pid(&serve.show(name))).collect();
    let before: Vec<_> = pids.iter().map(|pid| sleeps(*pid)).collect();
    for _ in 0..300 {
        serve.good("GET", "/host", Value::Null);
    }
    let after: Vec<_> = pids.iter().map(|pid| sleeps(*pid)).collect();
    let woken: Vec<_> = after.iter().zip(before).map(|(after, before)| after - before).collect();
    assert!(woken.iter().all(|woken| *woken < 20), "{woken:?}");
    assert_eq!((of("paused"), of("victim_selected"), of("nobody_chosen")), (1, 0, 1), "{}", events());
    // Real room is an end of it.
    serve.good("PATCH", "/groups/full", json!({ "max_bytes": 400 * MIB }));
    wait_until("none is held", 20, || (!names.iter().any(|name| is_held(name))).then_some(()));
}

/// A VM that touches nothing needs nothing: where its group is full and nothing of it can be evicted, it is not even looked at
/// what it uses, because what is moved aside costs page tables.
#[test]
fn who_touches_nothing_is_not_held_in_a_full_group() {
    if skipped("idle-in-a-full-group") {
        return;
    }
    let serve = Serve::start(&[]);
    serve.good("PUT", "/groups/full", json!({ "max_bytes": 96 * MIB }));
    let memory = json!({ "size_bytes": 128 * MIB, "swap_max_bytes": 0, "ageing_s": 1 });
    let park = |mib: u64| format!("touch 16M {mib}M; echo done; park");
    for (name, mib) in [("idle", 40), ("wants", 80)] {
        let mut config = guest("/full", &park(mib), memory.clone());
        config["oom"] = json!({ "deadline_ms": 600_000 });
        serve.create_with(name, &config);
        if name == "idle" {
            serve.wait_console(name, "done");
        }
    }
    wait_until("the one that wants more has been held for several generations", 60, || {
        (number(&serve.show("wants"), "held.total_us") > 4_000_000).then_some(())
    });
    let idle = serve.show("idle");
    assert!(idle["held"]["now"] == false && number(&idle, "memory.events.failcnt") == 0, "{idle}");
}

#[test]
fn one_whose_group_has_no_room_is_told_to_raise_the_group_s_limit() {
    if skipped("groups-advice") {
        return;
    }
    let serve = Serve::start(&[]);
    serve.good("PUT", "/groups/p", json!({ "max_bytes": 24 * MIB }));
    serve.good("PUT", "/groups/p/q", json!({}));
    let mut config = guest("/p/q", "touch 8M 48M; shell", json!({ "max_bytes": 16 * MIB }));
    config["oom"] = json!({ "action": "pause", "deadline_ms": 100 });
    serve.good("PUT", "/vms/web", config);
    serve.wait_state("web", "paused");
    let (status, said) = serve.words(&["resume", "web"]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("more than its limit leaves: raise it with `ballast set web memory.max=20M`"), "{said}");
    // With room below its own, the group's is the one to raise.
    serve.good("PATCH", "/groups/p?mode=force", json!({ "max_bytes": 15 * MIB }));
    serve.good("PATCH", "/vms/web/memory", json!({ "max_bytes": null }));
    let (status, said) = serve.words(&["resume", "web"]);
    assert_eq!(status, Some(1), "{said}");
    let advice = "more than the limit of /p leaves: raise it with `ballast group set /p memory.max=";
    assert!(said.contains(advice) && !said.contains('…'), "{said}");
    assert_eq!(serve.words(&["group", "set", "/p", "memory.max=64M"]).0, Some(0));
    wait_until("it goes on", 20, || (serve.show("web")["state"] == "running").then_some(()));
    serve.wait_console("web", "READY");
}

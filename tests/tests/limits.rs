//! Limits that hold, and what becomes of a guest that meets one.

use std::time::{Duration, Instant};

use ballast_tests::{TestVm, bare, deadline, number, resident_pages, skipped, wait_until};
use memcg_core::units::{SizeArg, parse_size};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// The guest is held at its limit; it may be held for a moment before, when it is faster than the grants.
fn held(vm: &TestVm) -> Value {
    let full = |now: &Value| number(now, "memory.current_bytes") == number(now, "memory.max_bytes");
    wait_until("the guest is held", 20, || vm.try_show().filter(|now| now["held"]["now"] == true && full(now)))
}

fn event<'e>(events: &'e [Value], kind: &str) -> Option<&'e Value> {
    events.iter().find(|e| e["event"] == kind)
}

/// Semantics: 42, 46, 51, T7.
#[test]
fn a_guest_at_its_limit_is_held_and_goes_on_where_it_stopped_when_the_limit_is_raised() {
    if skipped("held-and-raised") {
        return;
    }
    let mut vm = TestVm::builder("raise")
        .memory("size=256M,max=64M")
        .option("--oom", "action=pause,deadline=60s")
        .cmdline("shell")
        .start();
    vm.expect("READY", 10);
    vm.send("touch 16M 80M seed=7");
    let now = held(&vm);
    assert!(number(&now, "memory.current_bytes") <= 64 * MIB, "{now}");
    // The last faults of vCPUs on their way out may still be answered between the two looks.
    wait_until("what is charged is what is resident", 5, || {
        let now = vm.show();
        (number(&now, "memory.stat.guest_bytes") == resident_pages(&now) * 4096).then_some(())
    });
    assert!(vm.try_line().is_none(), "the command cannot have ended");
    let (status, body) = vm.patch("", &json!({"max_bytes": 128 * MIB}));
    assert_eq!(status, 200, "{body}");
    assert!(vm.expect("OK", 30).starts_with("OK"));
    assert!(vm.command("verify 16M 80M seed=7", 30).starts_with("OK"));
    let now = vm.show();
    assert!(number(&now, "memory.current_bytes") <= 128 * MIB && now["held"]["now"] == false, "{now}");
    vm.send("exit 7");
    assert_eq!(vm.wait(10).code(), Some(7));
}

/// Semantics: 51.
#[test]
fn a_guest_held_past_its_deadline_is_paused_and_resumes_when_it_gets_room() {
    if skipped("oom-pause") {
        return;
    }
    let mut vm = TestVm::builder("oompause")
        .memory("size=128M,max=32M")
        .option("--oom", "action=pause,deadline=300ms")
        .cmdline("shell")
        .start();
    vm.expect("READY", 10);
    vm.send("touch 16M 40M seed=1");
    let now = vm.wait_state("paused", 20);
    assert!(number(&now, "memory.current_bytes") <= 32 * MIB);
    let events = vm.events();
    let victim = event(&events, "victim_selected").expect("the choice is an event");
    assert!(victim["usage_bytes"].is_u64() && victim["max_bytes"] == json!(32 * MIB), "{victim}");
    let (status, _) = vm.patch("", &json!({"max_bytes": 96 * MIB}));
    assert_eq!(status, 200);
    assert!(vm.expect("OK", 20).starts_with("OK"));
    assert!(vm.command("verify 16M 40M seed=1", 20).starts_with("OK"));
}

/// A walk is filled in pieces up to the limit: they shrink with the room, and only the very last pages come one by one.
#[test]
fn a_walk_up_to_the_limit_takes_few_faults() {
    if skipped("few-faults") {
        return;
    }
    let mut vm = TestVm::builder("fewfaults")
        .memory("size=256M,max=64M")
        .option("--oom", "deadline=60s")
        .cmdline("shell")
        .start();
    vm.expect("READY", 10);
    vm.send("touch 16M 100M seed=7");
    let now = held(&vm);
    // While the controller's answer is on its way pages come one by one from the reserve: how many depends on the host.
    let touched = number(&now, "faults.touched_pages") - number(&now, "faults.from_reserve_pages");
    assert!(touched < 600, "{touched} faults for 64 MiB, of which 4 MiB are 1024 pages: {}", now["faults"]);
}

#[test]
fn a_guest_held_past_its_deadline_is_killed_when_that_is_its_policy() {
    if skipped("oom-kill") {
        return;
    }
    let mut vm = TestVm::builder("oomkill")
        .memory("size=128M,max=32M")
        .option("--oom", "action=kill,deadline=300ms")
        .cmdline("touch 16M 64M seed=1; exit 0")
        .start();
    assert_eq!(vm.wait(30).code(), Some(137));
    assert!(!vm.socket().exists(), "the socket file is gone");
    assert!(vm.errors().contains("killed"), "stderr says why");
}

#[test]
fn pause_resume_and_kill_work_within_a_second_at_the_limit_and_under_a_fault_storm() {
    if skipped("verbs-in-time") {
        return;
    }
    // Every other page: no fault fills more than one, so this is as many faults as two vCPUs can make.
    let storm = "touch 16M 1900M stride=8K cpus=all";
    for (name, memory, work) in [("atlimit", "size=256M,max=32M", "storm"), ("storming", "size=2G,max=1900M", storm)] {
        let mut vm = TestVm::builder(name)
            .memory(memory)
            .option("--cpus", "2")
            .option("--oom", "deadline=60s")
            .cmdline(work)
            .start();
        let begun = |now: &Value| number(now, "memory.stat.guest_bytes") > 16 * MIB;
        wait_until("the storm has begun", 20, || vm.try_show().filter(begun));
        for verb in ["pause", "resume", "pause", "kill"] {
            let start = Instant::now();
            let (status, body) = vm.post(verb);
            assert!((200..300).contains(&status), "{name}: {verb}: {status} {body}");
            assert!(start.elapsed() < deadline(1), "{name}: {verb} took {:?}", start.elapsed());
        }
        assert_eq!(vm.wait(5).code(), Some(137), "{name}");
    }
}

#[test]
fn a_killed_worker_ends_the_run_and_leaves_no_socket() {
    if skipped("worker-killed") {
        return;
    }
    let mut vm = TestVm::builder("wkilled").memory("size=256M,max=32M").cmdline("storm").start();
    let now = held(&vm);
    let start = Instant::now();
    // SAFETY: kill takes numbers; the worker is alive, the API has just said so.
    unsafe { libc::kill(number(&now, "pid") as i32, libc::SIGKILL) };
    assert_eq!(vm.wait(5).code(), Some(125));
    assert!(start.elapsed() < deadline(1) + Duration::from_millis(200), "{:?}", start.elapsed());
    assert!(!vm.socket().exists());
}

#[test]
fn another_vm_s_faults_are_served_while_one_is_held() {
    if skipped("neighbour") {
        return;
    }
    let first = TestVm::builder("offender")
        .memory("size=512M,max=32M")
        .option("--cpus", "4")
        .option("--oom", "deadline=60s")
        .cmdline("storm")
        .start();
    held(&first);
    let mut second = TestVm::builder("neighbour").memory("size=128M,max=100M").cmdline("shell").start();
    second.expect("READY", 10);
    let start = Instant::now();
    assert!(second.command("touch 16M 64M seed=2", 20).starts_with("OK"));
    assert!(start.elapsed() < deadline(10));
    assert!(second.command("verify 16M 64M seed=2", 20).starts_with("OK"));
    assert_eq!(first.show()["held"]["now"], json!(true));
}

/// Semantics: 82, 118, T3.
#[test]
fn refuse_reclaim_and_force_below_usage_do_what_they_say() {
    if skipped("modes") {
        return;
    }
    let mut vm = TestVm::builder("modes").memory("size=128M,max=100M").cmdline("shell").start();
    vm.expect("READY", 10);
    // The driver's own pages are there before nothing can be charged any more.
    for command in ["balloon init", "balloon inflate 100M 8M", "balloon deflate 100M 8M"] {
        assert!(vm.command(command, 10).starts_with("OK"), "{command}");
    }
    assert!(vm.command("touch 16M 64M seed=2", 20).starts_with("OK"));
    let usage = number(&vm.show(), "memory.stat.guest_bytes");
    assert!(usage >= 64 * MIB);

    let (status, body) = vm.patch("?mode=refuse", &json!({"max_bytes": 32 * MIB}));
    assert_eq!((status, body["code"].as_str()), (409, Some("limit_below_usage")), "{body}");
    assert_eq!(number(&vm.show(), "memory.max_bytes"), 100 * MIB, "the old limit stays");

    // Nobody gives anything back, so the request is accepted, and in the end it has failed.
    let (status, body) = vm.patch("?mode=reclaim&wait_ms=100", &json!({"max_bytes": 32 * MIB}));
    assert_eq!(status, 202, "{body}");
    let now = vm.show();
    assert_eq!(number(&now, "memory.max_bytes"), 100 * MIB, "the old limit is in force");
    assert_eq!(number(&now, "memory.max_pending_bytes"), 32 * MIB);
    wait_until("the request ends", 30, || vm.show()["memory"]["max_pending_bytes"].is_null().then_some(()));
    assert!(event(&vm.events(), "limit_not_reached").is_some());
    assert_eq!(number(&vm.show(), "memory.max_bytes"), 100 * MIB, "the old limit stays");

    let (status, body) = vm.patch("?mode=force", &json!({"max_bytes": 32 * MIB}));
    assert_eq!(status, 200, "{body}");
    let over = number(&vm.show(), "memory.stat.overcharge_bytes");
    assert!(over >= 32 * MIB, "what is above the limit is reported: {over}");
    vm.send("balloon inflate 48M 24M");
    let less = wait_until("the overcharge falls", 20, || {
        let now = number(&vm.show(), "memory.stat.overcharge_bytes");
        assert!(now <= over, "an overcharge only falls: {now} after {over}");
        (now < over).then_some(now)
    });
    assert!(less < over);
}

/// Semantics: 82, 83, B53.
#[test]
fn a_limit_forced_below_a_storm_leaves_an_overcharge_that_is_reported_and_never_grows() {
    if skipped("force-under-storm") {
        return;
    }
    let vm = TestVm::builder("force")
        .memory("size=512M,max=96M")
        .option("--cpus", "2")
        .option("--oom", "deadline=60s")
        .cmdline("storm")
        .start();
    held(&vm);
    let (status, body) = vm.patch("?mode=force", &json!({"max_bytes": 64 * MIB}));
    assert_eq!(status, 200, "{body}");
    let mut last = u64::MAX;
    for _ in 0..50 {
        let now = vm.show();
        let over = number(&now, "memory.stat.overcharge_bytes");
        assert_eq!(
            number(&now, "memory.current_bytes"),
            64 * MIB + over,
            "what is above the limit is the overcharge: {now}"
        );
        assert!(over > 0 && over <= last, "it never grows: {over} after {last}");
        last = over;
    }
}

/// Semantics: 72.
#[test]
fn an_old_generation_is_refused_and_nothing_changes() {
    if skipped("generation") {
        return;
    }
    let vm = TestVm::builder("gen").memory("size=64M,max=48M").cmdline("shell").start();
    let now = vm.wait_state("running", 10);
    let generation = number(&now, "generation");
    let (status, body) = vm.patch(&format!("?generation={generation}"), &json!({"max_bytes": 52 * MIB}));
    assert_eq!(status, 200, "{body}");
    let (status, body) = vm.patch(&format!("?generation={generation}"), &json!({"max_bytes": 56 * MIB}));
    assert_eq!(status, 409, "{body}");
    assert_eq!(number(&vm.show(), "memory.max_bytes"), 52 * MIB);
}

#[test]
fn a_limit_too_small_for_the_kernel_fails_and_names_the_smallest_that_would_do() {
    if skipped("too-small") {
        return;
    }
    let start = |max: &str| TestVm::builder("small").memory(&format!("size=64M,max={max}")).cmdline("shell").start();
    // What it costs beside its pages depends on the host and the build: the first refusal says it.
    let mut vm = start("1M");
    assert_eq!(vm.wait(10).code(), Some(125));
    let said = vm.errors();
    let mut vm = start(&bare(&said).to_string());
    assert_eq!(vm.wait(10).code(), Some(125));
    let said = vm.errors();
    let smallest = said.split_once(",max=").map(|(_, rest)| rest.split_whitespace().next().unwrap_or_default());
    let smallest = smallest.unwrap_or_else(|| panic!("stderr names `max=SIZE`: {said}"));
    let mut vm = TestVm::builder("small")
        .memory(&format!("size=64M,max={smallest}"))
        .option("--oom", "action=kill,deadline=300ms")
        .cmdline("shell")
        .start();
    // Loaded, it has not a page left for itself: it is held, and its policy ends it. That it got so far is the point.
    let status = vm.wait(20);
    assert_eq!(status.code(), Some(137), "{}", vm.errors());
}

/// What a VM keeps in any case is known: a limit below it is refused at once, and nobody is evicted for nothing.
/// Semantics: 44, 118.
#[test]
fn a_limit_that_nothing_can_reach_is_refused_at_once_with_the_smallest_that_will_do() {
    if skipped("below-the-floor") {
        return;
    }
    let mut vm = TestVm::builder("floor").memory("size=256M,max=192M,swap=max").cmdline("shell").start();
    vm.expect("READY", 10);
    assert!(vm.command("touch 16M 64M seed=7", 30).starts_with("OK"));
    let before = vm.show();
    let (status, body) = vm.patch("?mode=reclaim", &json!({"max_bytes": 2 * MIB}));
    assert_eq!(status, 409, "{body}");
    assert_eq!(body["code"], "overhead_refused", "{body}");
    let after = vm.show();
    let same = ["/memory/max_bytes", "/memory/stat/swapped_bytes", "/generation", "/memory/max_pending_bytes"];
    assert!(same.iter().all(|path| before.pointer(path) == after.pointer(path)), "{after}");
    assert!(event(&vm.events(), "limit_requested").is_none(), "not even asked for");
    let message = body["message"].as_str().unwrap_or_default();
    let named = message.split_once(": memory.max=").and_then(|(_, rest)| rest.split_once(" is the smallest"));
    let Some(Ok(SizeArg::Bytes(smallest))) = named.map(|(size, _)| parse_size(size)) else { panic!("{body}") };
    let (status, body) = vm.patch("?mode=reclaim", &json!({ "max_bytes": smallest }));
    assert_eq!(status, 200, "{body}");
    assert!(vm.command("verify 16M 64M seed=7", 60).contains("bad=0"));
}

//! Balloon drivers that lie, flood, stall and reset: the device counts it, and the next sane driver finds it working.

use ballast_tests::{PAGE, number, wait_until};
use serde_json::{Value, json};

use super::pair::{MAX, Pair};
use super::{MIB, skipped};

/// How many things the hostile guest claimed that were refused.
fn refused(pair: &Pair) -> u64 {
    number(&pair.serve.show("evil"), "faults.guest_errors")
}

/// Each attack is counted, and ends with a device that a sane driver can use.
#[test]
fn rings_and_descriptors_that_lie_are_counted_and_harm_nobody() {
    if skipped("lying-rings") {
        return;
    }
    let mut pair = Pair::start(json!({}));
    for attack in [
        "index 0 1000",
        "index 1 40000",
        "head 0 16",
        "head 1 65535",
        "chain 0 0",
        "chain 0 99",
        "chain 1 65535",
        "flags 0 4",
        "flags 1 2",
        "buffer 0 0x2000000 0xffffffff",
        "buffer 0 0x2000001 7",
        "buffer 0 0xfffffffffffffff0 64",
        "buffer 1 0xd0000000 64",
        "buffer 0 0x7fffffc 64",
        "rings 0 0xfffffffff000",
        "rings 1 0xd0000000",
        "kicks 77 3",
    ] {
        let before = refused(&pair);
        pair.attack(&["balloon init", &format!("balloon evil {attack}")]);
        wait_until(&format!("`{attack}` is counted"), 10, || (refused(&pair) > before).then_some(()));
        pair.rest();
    }
    pair.recover();
}

/// A page that is given again while it is in the balloon is counted, and once is all that it is uncharged. In one buffer
/// its number is one page, however often it is there.
#[test]
fn empty_buffers_and_repeated_page_numbers_change_nothing() {
    if skipped("repeated-pages") {
        return;
    }
    let mut pair = Pair::start(json!({}));
    pair.attack(&["balloon evil buffer 0 0x2000000 0", "touch 32M 8M seed=3", "balloon inflate 96M 64K"]);
    let charged = |pair: &Pair| number(&pair.rest(), "memory.stat.guest_bytes");
    let before = charged(&pair);
    pair.attack(&["balloon evil numbers 0 8192 1000 step=0", "balloon evil numbers 0 8192 1000 step=0"]);
    assert_eq!(charged(&pair), before - PAGE, "one page was given, if a thousand times");
    pair.attack(&["balloon evil numbers 0 8192 2048", "balloon evil numbers 0 8192 2048"]);
    assert_eq!(charged(&pair), before - 8 * MIB, "twice inflated");
    pair.attack(&["balloon evil numbers 1 16384 2048", "verify 33M 1M zero=only", "touch 32M 8M seed=4"]);
    assert_eq!(charged(&pair), before, "what was not in the balloon is deflated to no effect");
    pair.attack(&["verify 32M 8M seed=4"]);
    assert_eq!(refused(&pair), 1 + 1 + 2048, "the page again, with its neighbours, and all of them again");
    pair.recover();
}

/// A page number is an allegation: behind the end of RAM, in the hole below 4 GiB, and the largest there is.
#[test]
fn page_numbers_outside_ram_are_counted_and_dropped() {
    if skipped("outside-ram") {
        return;
    }
    let mut pair = Pair::start(json!({}));
    let before = number(&pair.rest(), "memory.stat.guest_bytes");
    for (attack, numbers) in
        [("0 32768 64", 64), ("0 0xd0000 16", 16), ("0 0xfffffff0 16", 16), ("1 0x80000000 2000", 2000)]
    {
        let counted = refused(&pair);
        pair.attack(&[&format!("balloon evil numbers {attack}")]);
        wait_until(&format!("`{attack}` is counted"), 10, || (refused(&pair) >= counted + numbers).then_some(()));
    }
    let after = number(&pair.rest(), "memory.stat.guest_bytes");
    assert!(after >= before, "nothing was given: {before} then {after}");
    pair.recover();
}

/// 60 000 statistics: the first few are read, the rest is dropped and counted.
#[test]
fn statistics_without_end_are_cut_off() {
    if skipped("endless-statistics") {
        return;
    }
    let mut pair = Pair::start(json!({ "stats_interval_s": 1 }));
    pair.attack(&["balloon init features=2", "balloon evil stats 2 16M 60000"]);
    wait_until("they are counted", 10, || (refused(&pair) > 0).then_some(()));
    pair.attack(&[
        "balloon init features=2",
        "balloon evil stats 2 16M 0",
        "balloon evil buffer 2 0x2000000 0xffffffff",
    ]);
    pair.recover();
}

/// The driver's second thoughts about features are not heard, and its kicks wake a device that finds nothing to do.
#[test]
fn late_features_and_storms_of_kicks_do_nothing() {
    if skipped("late-features") {
        return;
    }
    let mut pair = Pair::start(json!({}));
    let agreed = pair.attack(&["balloon status"]);
    let answers = pair.attack(&[
        "balloon evil features 0xffffffffffffffff",
        "balloon evil kicks 0 20000",
        "balloon evil kicks 1 20000",
        "balloon status",
    ]);
    assert_eq!(agreed[0], answers[3]);
    assert!(refused(&pair) > 0, "the write of features is counted");
    pair.recover();
}

/// Everything is given and taken back as fast as the guest can, and used in between. It is let do so for a moment, and then
/// it waits for its balloon; an event says so.
#[test]
fn floods_of_inflating_and_deflating_stay_within_the_limit() {
    if skipped("flood") {
        return;
    }
    let mut pair = Pair::start(json!({}));
    pair.attack(&["balloon evil flood 32M 48M rounds=3 touch=1", "balloon evil flood 32M 4M rounds=4"]);
    let told = wait_until("an event says so", 10, || {
        let (_, events) = pair.serve.raw("GET", "/events?follow=false", None);
        let mut events = events.lines().map(|line| serde_json::from_str::<Value>(line).expect("an event is JSON"));
        events.find(|event| event["event"] == "guest_misbehaves")
    });
    assert_eq!((&told["vm"], &told["guest_errors"]), (&json!("evil"), &told["guest_errors_total"]), "the first one");
    let vm = pair.recover();
    assert!(number(&vm, "faults.discarded_pages") >= 2 * 48 * MIB / PAGE, "{vm}");
}

/// Whatever was in flight when the device was reset: the page is either discarded or it is not, and charged accordingly.
#[test]
fn resets_in_mid_flight_lose_no_charge() {
    if skipped("mid-flight-resets") {
        return;
    }
    let mut pair = Pair::start(json!({}));
    pair.attack(&["touch 32M 4M seed=2", "balloon evil reset 32M 4M rounds=200", "touch 32M 4M seed=2"]);
    pair.attack(&["verify 32M 4M seed=2", "balloon evil reset 32M 4M rounds=20"]);
    pair.recover();
}

/// More RAM than its limit, most of it in the balloon, and then all vCPUs touch all of it at once.
#[test]
fn touching_all_that_is_ballooned_at_once_is_charged_up_to_the_limit() {
    if skipped("touch-ballooned") {
        return;
    }
    let mut pair = Pair::start(json!({}));
    pair.attack(&["touch 16M 64M seed=1 cpus=all", "balloon inflate 16M 64M", "touch 16M 64M seed=2 cpus=all"]);
    pair.attack(&["verify 16M 64M seed=2"]);
    let vm = pair.rest();
    assert!(number(&vm, "faults.implicit_deflates") >= 64 * MIB / PAGE, "{vm}");
    // And once more than the limit has room for, where nothing can be evicted: the guest is held, its memory is not taken
    // from others.
    let none = json!({ "swap_max_bytes": 0 });
    assert_eq!(pair.serve.ask("PATCH", "/vms/evil/memory", Some(&none)).0, 200);
    pair.attack(&["balloon inflate 16M 64M"]);
    pair.send("touch 8M 119M seed=3 cpus=all");
    wait_until("the guest is held", 20, || (pair.serve.show("evil")["held"]["now"] == true).then_some(()));
    let (status, answer) = pair.serve.ask("PATCH", "/vms/evil/memory", Some(&json!({ "max_bytes": MAX + 64 * MIB })));
    assert_eq!(status, 200, "{answer}");
    pair.answer();
    pair.recover();
}

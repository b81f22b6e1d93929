//! What a client does: anything that the interface offers, drawn at random, to VMs that others are busy with as well.

use std::time::{Duration, Instant};

use ballast_tests::payload;
use ballast_tests::random::Random;
use serde_json::{Value, json};

use super::world::{Call, World};

const MIB: u64 = 1 << 20;

/// VMs that come and go.
pub const COMERS: u64 = 25;
/// VMs that are there whenever all is at rest: what outlives a phase is watched for leaks.
pub const RESIDENTS: u64 = 5;

/// Name of a VM.
fn name(random: &mut Random) -> String {
    match random.below(COMERS + RESIDENTS) {
        n if n < COMERS => format!("v{n}"),
        n => resident(n - COMERS),
    }
}

/// Name of a VM that stays.
pub fn resident(n: u64) -> String {
    format!("r{n}")
}

/// A VM that stays: it has touched some memory and waits for ever.
pub fn resident_config() -> Value {
    json!({
        "kernel": payload(), "cmdline": "touch 8M 4M seed=5; park", "debug_port": true,
        "memory": { "size_bytes": 32 * MIB, "max_bytes": 24 * MIB },
    })
}

/// A VM of any kind: quiet, at its limit, busy for a while, with a balloon, or soon at its end.
fn config(random: &mut Random) -> Value {
    let size = *random.pick(&[24, 32, 48, 64]) * MIB;
    let work = match random.below(10) {
        0..=3 => String::new(),
        4 | 5 => format!("touch 8M {}M seed=3;", 2 + random.below(size / MIB - 12)),
        6 => "touch 8M 2M; wait 50; touch 10M 2M; wait 80; touch 12M 2M; wait 120; touch 14M 2M;".to_owned(),
        7 => "storm 8M 8M passes=40;".to_owned(),
        8 => "balloon init; touch 8M 8M; balloon inflate 8M 4M; wait 200; balloon deflate 8M 2M;".to_owned(),
        _ => format!("wait {}; exit {};", random.below(300), random.below(3)),
    };
    let mut memory = json!({ "size_bytes": size });
    if random.chance(80) {
        memory["max_bytes"] = json!((8 + random.below(size / MIB)) * MIB);
    }
    if random.chance(20) {
        memory["min_bytes"] = json!(random.below(4) * MIB);
    }
    if random.chance(10) {
        memory["vmm_max_bytes"] = json!(random.below(4) * MIB);
    }
    json!({
        "kernel": payload(), "cmdline": format!("{work} park"), "debug_port": true, "memory": memory,
        "cpus": 1 + random.below(2),
        "oom": { "action": random.pick(&["pause", "kill"]), "deadline_ms": 50 + random.below(1000) },
    })
}

/// Limits to set: a few keys at a time, sometimes ones that contradict each other.
fn limits(random: &mut Random) -> Value {
    let mut body = json!({});
    let amount = |random: &mut Random, most: u64| match random.below(8) {
        0 => Value::Null,
        _ => json!(random.below(most * 4) * MIB / 4),
    };
    if random.chance(75) {
        body["max_bytes"] = amount(random, 64);
    }
    if random.chance(20) {
        body["high_bytes"] = amount(random, 48);
    }
    if random.chance(10) {
        body["low_bytes"] = amount(random, 8);
    }
    if random.chance(10) {
        body["min_bytes"] = amount(random, 4);
    }
    if random.chance(5) {
        body["swap_max_bytes"] = amount(random, 8);
    }
    if random.chance(5) {
        body["vmm_max_bytes"] = amount(random, 4);
    }
    body
}

/// The query of a change of limits, and how long it asks to wait.
fn change(random: &mut Random) -> (String, Duration) {
    let wait = random.below(400);
    let mode = random.pick(&["reclaim", "reclaim", "force", "refuse"]);
    let mut query = format!("?mode={mode}&wait_ms={wait}");
    if random.chance(5) {
        query.push_str(&format!("&generation={}", random.below(20)));
    }
    (query, Duration::from_millis(wait))
}

/// Makes a request drawn at random.
fn draw(random: &mut Random) -> Call {
    let vm = name(random);
    let at = |what: &str| format!("/vms/{vm}{what}");
    match random.below(100) {
        0..=21 => {
            let config = if vm.starts_with('r') { resident_config() } else { config(random) };
            Call::new("PUT", "/vms/{name}", at("")).body(config)
        }
        22..=29 if vm.starts_with('v') => Call::new("DELETE", "/vms/{name}", at("")),
        30..=49 => {
            let (query, wait) = change(random);
            Call::new("PATCH", "/vms/{name}/memory", at("/memory") + &query).body(limits(random)).wait(wait)
        }
        50..=55 => Call::new("POST", "/vms/{name}/pause", at("/pause")),
        56..=61 => Call::new("POST", "/vms/{name}/resume", at("/resume")),
        62..=64 => Call::new("POST", "/vms/{name}/kill", at("/kill")),
        65..=80 => Call::new("GET", "/vms/{name}", at("")),
        81..=85 => Call::new("GET", "/vms", "/vms"),
        86..=88 => Call::new("GET", "/host", "/host"),
        89..=93 => Call::new("GET", "/vms/{name}/console", at("/console")),
        _ => Call::new("GET", "/events", format!("/events?since={}&follow=false", random.below(2000))),
    }
}

/// Makes requests until the time is over.
pub fn client(world: &World, mut random: Random, until: Instant) {
    while Instant::now() < until {
        let call = draw(&mut random);
        if world.has(call.method, call.route) {
            world.call(&call);
        }
    }
}

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

/// What a guest prints when it has done all that it has to.
pub const PARKED: &str = "all is done";

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

/// Path of a group: some are inside others, and the root is one.
fn group(random: &mut Random) -> String {
    let outer = random.below(4);
    match random.below(8) {
        0 | 1 => "/".to_owned(),
        2..=4 => format!("/g{outer}"),
        5 | 6 => format!("/g{outer}/h{}", random.below(2)),
        _ => format!("/g{outer}/h{}/i", random.below(2)),
    }
}

/// A VM that stays: it has touched some memory and waits for ever.
pub fn resident_config() -> Value {
    json!({
        "kernel": payload(), "cmdline": format!("touch 8M 4M seed=5; echo {PARKED}; park"), "debug_port": true,
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
        "kernel": payload(), "cmdline": format!("{work} echo {PARKED}; park"), "debug_port": true, "memory": memory,
        "cpus": 1 + random.below(2), "group": group(random),
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
    for (percent, key, most) in [
        (75, "max_bytes", 64),
        (20, "high_bytes", 48),
        (10, "low_bytes", 8),
        (10, "min_bytes", 4),
        (5, "swap_max_bytes", 8),
        (5, "store_max_bytes", 4),
        (5, "vmm_max_bytes", 4),
    ] {
        if random.chance(percent) {
            body[key] = amount(random, most);
        }
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

/// A request drawn at random.
fn draw(random: &mut Random) -> Call {
    if random.chance(25) { draw_group(random) } else { draw_vm(random) }
}

/// A request about one VM, or about the host.
fn draw_vm(random: &mut Random) -> Call {
    let vm = name(random);
    let at = |what: &str| format!("/vms/{vm}{what}");
    match random.below(112) {
        0..=21 => {
            let config = if vm.starts_with('r') { resident_config() } else { config(random) };
            Call::new("PUT", "/vms/{name}", at("")).body(config)
        }
        22..=27 if vm.starts_with('v') => Call::new("DELETE", "/vms/{name}", at("")),
        28..=46 => {
            let (query, wait) = change(random);
            Call::new("PATCH", "/vms/{name}/memory", at("/memory") + &query).body(limits(random)).wait(wait)
        }
        47..=52 => Call::new("POST", "/vms/{name}/pause", at("/pause")),
        53..=59 => Call::new("POST", "/vms/{name}/resume", at("/resume")),
        60 | 61 => Call::new("POST", "/vms/{name}/kill", at("/kill")),
        62 | 63 => {
            let timeout = random.below(500);
            let path = at("/stop") + &format!("?timeout_ms={timeout}");
            Call::new("POST", "/vms/{name}/stop", path).wait(Duration::from_millis(timeout))
        }
        64..=67 => Call::new("POST", "/vms/{name}/start", at("/start")),
        68..=77 => {
            let body = json!({ "group": group(random) });
            Call::new("POST", "/vms/{name}/move", at("/move")).body(body)
        }
        78..=90 => Call::new("GET", "/vms/{name}", at("")),
        91..=94 => Call::new("GET", "/vms", "/vms"),
        95 | 96 => Call::new("GET", "/host", "/host"),
        97..=100 => Call::new("GET", "/vms/{name}/console", at("/console")),
        101..=103 => Call::new("GET", "/metrics", "/metrics"),
        104 => Call::new("GET", "/oom/rank", format!("/oom/rank?group={}", group(random))),
        105 => Call::new("GET", "/overview", "/overview?events=20"),
        106 => Call::new("GET", "/check", "/check"),
        _ => Call::new("GET", "/events", format!("/events?since={}&follow=false", random.below(2000))),
    }
}

/// A request about groups, or about many nodes.
fn draw_group(random: &mut Random) -> Call {
    let path = group(random);
    let at = |what: &str| format!("/groups{path}{what}");
    match random.below(20) {
        // The root is there, and has the budget.
        0..=5 if path != "/" => Call::new("PUT", "/groups/{path}", at("")).body(limits_of_group(random)),
        6..=9 if path != "/" => {
            let (query, wait) = change(random);
            Call::new("PATCH", "/groups/{path}", at("") + &query).body(limits_of_group(random)).wait(wait)
        }
        10 | 11 if path != "/" => Call::new("DELETE", "/groups/{path}", at("")),
        12 | 13 => Call::new("GET", "/groups/{path}", at("")),
        14 => Call::new("GET", "/groups", "/groups"),
        15 => Call::new("POST", "/groups/{path}/move", at("/move")).body(json!({ "parent": group(random) })),
        _ => {
            let wait = random.below(400);
            let mode = random.pick(&["reclaim", "force", "refuse"]);
            let mut nodes: Vec<Value> = Vec::new();
            for _ in 0..2 + random.below(6) {
                nodes.push(if random.chance(70) {
                    json!({ "vm": name(random), "limits": limits(random) })
                } else {
                    json!({ "group": format!("/g{}", random.below(4)), "limits": limits_of_group(random) })
                });
            }
            let path = format!("/limits?mode={mode}&wait_ms={wait}");
            Call::new("POST", "/limits", path).body(Value::Array(nodes)).wait(Duration::from_millis(wait))
        }
    }
}

/// Limits of a group: mostly only `max`, in steps that some members together are above and some below.
fn limits_of_group(random: &mut Random) -> Value {
    match random.below(8) {
        0 => json!({}),
        1 => json!({ "max_bytes": null }),
        2 => json!({ "max_bytes": null, "min_bytes": random.below(16) * MIB }),
        _ => json!({ "max_bytes": (16 + random.below(256)) * MIB }),
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

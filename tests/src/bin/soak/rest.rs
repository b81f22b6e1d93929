//! What must hold whenever all is at rest.

use std::collections::{BTreeMap, BTreeSet};

use ballast_tests::{PAGE, number, resident_pages};
use serde_json::{Value, json};

use super::client::{PARKED, RESIDENTS, resident, resident_config};
use super::host;
use super::world::{Call, World};

/// Ends what still goes on when nobody asks for anything any more: changes of limits that wait for memory.
pub fn settle(world: &World) {
    for vm in vms(world) {
        if vm["memory"]["max_pending_bytes"].is_u64() {
            let path = format!("/vms/{}/memory?mode=force", vm["name"].as_str().unwrap_or_default());
            world.call(&Call::new("PATCH", "/vms/{name}/memory", path).body(json!({ "max_bytes": null })));
        }
    }
    for group in groups(world) {
        if group["memory"]["max_pending_bytes"].is_u64() {
            let path = format!("/groups{}?mode=force", group["path"].as_str().unwrap_or_default());
            world.call(&Call::new("PATCH", "/groups/{path}", path).body(json!({ "max_bytes": null })));
        }
    }
}

/// Takes everything away but the VMs that stay, and puts those back into the state they began in.
pub fn drain(world: &World) {
    for vm in vms(world) {
        let name = vm["name"].as_str().unwrap_or_default();
        if name.starts_with('v') {
            world.call(&Call::new("DELETE", "/vms/{name}", format!("/vms/{name}")));
        }
    }
    for n in 0..RESIDENTS {
        renew(world, &resident(n));
    }
    // The innermost first.
    let mut paths: Vec<_> =
        groups(world).iter().filter_map(|group| group["path"].as_str().map(str::to_owned)).collect();
    paths.sort_by_key(|path| std::cmp::Reverse(path.matches('/').count()));
    for path in paths.iter().filter(|path| *path != "/") {
        world.call(&Call::new("DELETE", "/groups/{path}", format!("/groups{path}")));
    }
}

/// A VM that stays, made afresh unless it is one that runs, and with its first limits.
fn renew(world: &World, name: &str) {
    let path = format!("/vms/{name}");
    let shown = world.call(&Call::new("GET", "/vms/{name}", &path));
    let Some(vm) = shown.filter(|(status, vm)| *status == 200 && vm["state"] != "ended").map(|(_, vm)| vm) else {
        world.call(&Call::new("DELETE", "/vms/{name}", &path));
        put(world, name);
        return;
    };
    if vm["group"].as_str().is_some_and(|group| group != "/") {
        let body = json!({ "group": "/" });
        world.call(&Call::new("POST", "/vms/{name}/move", format!("{path}/move")).body(body));
    }
    let mut limits = resident_config()["memory"].clone();
    for key in ["min_bytes", "low_bytes"] {
        limits[key] = json!(0);
    }
    for key in ["high_bytes", "swap_max_bytes", "store_max_bytes", "vmm_max_bytes"] {
        limits[key] = Value::Null;
    }
    limits.as_object_mut().expect("an object").remove("size_bytes");
    world.call(&Call::new("PATCH", "/vms/{name}/memory", format!("{path}/memory?mode=force")).body(limits));
    world.call(&Call::new("POST", "/vms/{name}/resume", format!("{path}/resume")));
}

fn put(world: &World, name: &str) {
    let answer = world.call(&Call::new("PUT", "/vms/{name}", format!("/vms/{name}")).body(resident_config()));
    if let Some((status, body)) = answer
        && status != 201
    {
        world.fail(format!("{name} cannot be made again: {status} {body}"));
    }
}

/// All VMs.
pub fn vms(world: &World) -> Vec<Value> {
    world.get("/vms", "/vms").and_then(|list| list.as_array().cloned()).unwrap_or_default()
}

/// All groups.
pub fn groups(world: &World) -> Vec<Value> {
    let list = world.has("GET", "/groups").then(|| world.get("/groups", "/groups")).flatten();
    list.and_then(|list| list.as_array().cloned()).unwrap_or_default()
}

/// Whether the guest has done all that it had to, and only waits from now on.
fn parked(world: &World, name: &str) -> bool {
    let printed = world.get("/vms/{name}/console", &format!("/vms/{name}/console"));
    printed.is_some_and(|text| text.as_str().is_some_and(|text| text.contains(PARKED)))
}

/// What may not change when nothing goes on: of each VM that has not ended, whose it is, how it is, and what it has.
pub fn picture(world: &World) -> BTreeMap<String, Value> {
    let running = vms(world).into_iter().filter(|vm| vm["state"] != "ended");
    let seen = running.filter_map(|vm| {
        let name = vm["name"].as_str()?.to_owned();
        let vm = world.get("/vms/{name}", &format!("/vms/{name}"))?;
        let kept = ["pid", "state", "group", "size_bytes", "cpus", "accounting", "oom", "ram"];
        let mut seen: Value = kept.iter().map(|key| ((*key).to_owned(), vm[*key].clone())).collect();
        for key in ["min_bytes", "low_bytes", "high_bytes", "max_bytes"] {
            seen[key] = vm["memory"][key].clone();
        }
        // Reclaim may still be at work: what it evicts, the guest still has.
        let bytes = ["guest_bytes", "swapped_bytes"].map(|key| vm["memory"]["stat"][key].as_u64().unwrap_or_default());
        seen["guest_bytes"] = (bytes[0] + bytes[1]).into();
        Some((name, seen))
    });
    seen.collect()
}

/// What is not as it has to be at rest. Numbers are not all of one moment: what is found once has to be found again.
pub fn problems(world: &World, controller: u32) -> Vec<String> {
    let mut found = Vec::new();
    let mut complain = |what: String| found.push(what);
    let mut charges: Vec<(String, u64)> = Vec::new();
    let mut workers = BTreeSet::new();
    for vm in vms(world) {
        let name = vm["name"].as_str().unwrap_or_default().to_owned();
        let Some(vm) = world.get("/vms/{name}", &format!("/vms/{name}")) else {
            complain(format!("{name} is in the list, and cannot be shown"));
            continue;
        };
        let at = |path: &str| number(&vm, path);
        charges.push((vm["group"].as_str().unwrap_or("/").to_owned(), at("memory.current_bytes")));
        if vm["state"] == "ended" {
            if at("memory.current_bytes") != 0 {
                complain(format!("{name} has ended, and {} bytes are charged", at("memory.current_bytes")));
            }
            continue;
        }
        let pid = u32::try_from(at("pid")).unwrap_or_default();
        workers.insert(pid);
        if vm["state"] == "starting" || vm["stale"] == true || vm["memory"]["max_pending_bytes"].is_u64() {
            complain(format!("{name} is not at rest: {vm}"));
            continue;
        }
        if vm["state"] == "running" && !parked(world, &name) {
            complain(format!("{name} still does something: {vm}"));
            continue;
        }
        if vm["accounting"] != true {
            continue;
        }
        let parts = ["guest", "store", "stock", "reserve", "vmm"];
        let parts: u64 = parts.map(|part| at(&format!("memory.stat.{part}_bytes"))).iter().sum();
        if parts != at("memory.current_bytes") {
            complain(format!("{name}: {} bytes are charged, its parts are {parts}", at("memory.current_bytes")));
        }
        if at("vmm.current_bytes") > at("memory.current_bytes") {
            complain(format!("{name}: more overhead than memory"));
        }
        if let Some(max) = vm["memory"]["max_bytes"].as_u64()
            && at("memory.current_bytes") > max + at("memory.stat.overcharge_bytes")
        {
            complain(format!("{name}: above its limit: {vm}"));
        }
        let (charged, resident) = (at("memory.stat.guest_bytes"), resident_pages(&vm) * PAGE);
        if charged != resident {
            complain(format!("{name}: {charged} bytes are charged for its pages, {resident} are resident"));
        }
    }
    let below = |path: &str| {
        let inside = format!("{}/", path.trim_end_matches('/'));
        charges
            .iter()
            .filter(|(group, _)| group == path || group.starts_with(&inside))
            .map(|(_, bytes)| bytes)
            .sum::<u64>()
    };
    for group in groups(world) {
        let path = group["path"].as_str().unwrap_or_default();
        let (charged, sum) = (number(&group, "memory.current_bytes"), below(path));
        if group["dying"] == true {
            complain(format!("{path} is removed, and still there"));
        }
        if group["memory"]["max_pending_bytes"].is_u64() {
            complain(format!("{path} is not at rest: {group}"));
        }
        if charged != sum {
            complain(format!("{path}: {charged} bytes are charged, to the VMs in it {sum}"));
        }
        if let Some(max) = group["memory"]["max_bytes"].as_u64()
            && charged > max + number(&group, "memory.overcharge_bytes")
        {
            complain(format!("{path}: above its limit: {group}"));
        }
    }
    let sum = below("/");
    if let Some(root) = world.get("/host", "/host")
        && number(&root, "current_bytes") != sum
    {
        complain(format!("the VMs' charges are {sum} bytes, the host's {}", root["current_bytes"]));
    }
    for process in host::children(&[controller, std::process::id()]) {
        if process.zombie && process.parent == controller {
            complain(format!("process {} has ended, and the controller has not waited for it", process.pid));
        } else if process.zombie {
            host::reap(process.pid);
        } else if process.worker && !workers.remove(&process.pid) {
            complain(format!("process {} is a worker of no VM", process.pid));
        }
    }
    for pid in workers {
        complain(format!("process {pid} is shown as a worker, and is not there"));
    }
    // What the controller says about itself comes last: it counts all pages again.
    if found.is_empty() && world.has("GET", "/check") {
        let invariants = world.get("/check", "/check").and_then(|check| check["invariants"].as_array().cloned());
        for invariant in invariants.unwrap_or_default().iter().filter(|invariant| invariant["ok"] != true) {
            found.push(format!("check: {}: {}", invariant["name"], invariant["message"]));
        }
    }
    found
}

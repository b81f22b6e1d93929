//! Forty guests in three groups under one controller.
//!
//! ```text
//!  / ─┬─ gold    14 VMs; two of them want more than their own limit
//!     ├─ silver  13 VMs
//!     └─ bronze  13 VMs; together they want more than the group's limit
//! ```

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use ballast_tests::random::Random;
use ballast_tests::serve::{Serve, kill, pid, spew};
use ballast_tests::{PAGE, http, number, payload, resident_pages, wait_until};
use serde_json::{Value, json};

use super::{MIB, Step, clear};

/// The steps, in order.
pub const STEPS: [&str; 7] =
    ["start", "limits", "transaction", "move", "worker-killed", "worker-garbage", "controller-killed"];

/// Groups, their limits in MiB, and how many VMs they have.
const GROUPS: [(&str, u64, usize); 3] = [("gold", 256, 14), ("silver", 192, 13), ("bronze", 96, 13)];
/// Limit of a VM of gold and of silver, in MiB.
const OWN: u64 = 20;
/// Limit of a VM of bronze, in MiB: it is not what stops one.
const LOOSE: u64 = 30;
/// What a member writes, in MiB; one that wants too much of its own; each member of the group that wants too much.
const MODEST: u64 = 6;
const GREEDY: u64 = 22;
const MANY: u64 = 12;

/// One guest of the plan.
struct Member {
    name: String,
    group: &'static str,
    max: u64,
    writes: u64,
}

fn plan() -> Vec<Member> {
    let member = |(group, _, count): (&'static str, u64, usize)| {
        (0..count).map(move |n| {
            let (max, writes) = match (group, n) {
                ("gold", 0 | 1) => (OWN, GREEDY),
                ("bronze", _) => (LOOSE, MANY),
                _ => (OWN, MODEST),
            };
            Member { name: format!("{group}-{n}"), group, max: max * MIB, writes }
        })
    };
    GROUPS.into_iter().flat_map(member).collect()
}

/// The fleet as it is now: every VM with fresh numbers and its resident pages, every group, the host.
struct Fleet {
    vms: BTreeMap<String, (Value, u64)>,
    groups: BTreeMap<String, Value>,
    host: Value,
}

impl Fleet {
    fn look(serve: &Serve) -> Self {
        let list = get(serve, "/vms");
        let names = list.as_array().expect("a list").iter().filter_map(|vm| vm["name"].as_str());
        let vms = names.map(|name| {
            let vm = serve.show(name);
            let resident = if vm["state"] == "ended" { 0 } else { resident_pages(&vm) * PAGE };
            (name.to_owned(), (vm, resident))
        });
        let vms = vms.collect();
        let groups = get(serve, "/groups");
        let path = |group: &Value| group["path"].as_str().expect("a path").to_owned();
        let groups = groups.as_array().expect("a list").iter().map(|group| (path(group), group.clone())).collect();
        Self { vms, groups, host: get(serve, "/host") }
    }

    fn vm(&self, name: &str) -> &Value {
        &self.vms[name].0
    }

    fn group(&self, name: &str) -> u64 {
        number(&self.groups[&format!("/{name}")], "memory.current_bytes")
    }

    /// What of the fleet's pages is charged, and what is resident.
    fn pages(&self) -> (u64, u64) {
        self.vms.values().fold((0, 0), |(charged, resident), (vm, there)| {
            (charged + number(vm, "memory.stat.guest_bytes"), resident + there)
        })
    }

    /// Whether every number adds up: charges are resident pages, a VM's parts its charge, the VMs' charges their
    /// group's, the groups' the host's.
    fn exact(&self) -> bool {
        let of = |name: &str| {
            let members = self.vms.values().filter(|(vm, _)| vm["group"] == format!("/{name}"));
            members.map(|(vm, _)| number(vm, "memory.current_bytes")).sum::<u64>()
        };
        let vms = self.vms.values().all(|(vm, resident)| {
            let part = |part: &str| number(vm, &format!("memory.stat.{part}_bytes"));
            part("guest") == *resident
                && number(vm, "memory.current_bytes") == part("guest") + part("stock") + part("reserve") + part("vmm")
        });
        let groups = GROUPS.iter().all(|(name, ..)| self.group(name) == of(name));
        let total: u64 = GROUPS.iter().map(|(name, ..)| self.group(name)).sum();
        vms && groups && total == number(&self.host, "current_bytes")
    }

    /// VMs of the plan that are not in the state, or have not the process and the pages, that they had `before`; `gone`
    /// are not asked about.
    fn harmed(&self, before: &Self, gone: &[&str]) -> usize {
        let same = |name: &String, (vm, resident): &(Value, u64)| {
            self.vms.get(name).is_some_and(|(now, there)| {
                let equal = |key: &str| now[key] == vm[key];
                let pages = now["memory"]["stat"]["guest_bytes"] == vm["memory"]["stat"]["guest_bytes"];
                equal("pid") && equal("state") && equal("group") && pages && there == resident
            })
        };
        let others = before.vms.iter().filter(|(name, _)| !gone.contains(&name.as_str()));
        let harmed: Vec<_> = others.filter(|(name, vm)| !same(name, vm)).map(|(name, _)| name.as_str()).collect();
        for name in &harmed {
            eprintln!(
                "demo: {name} was {} and is {}",
                before.vm(name),
                self.vms.get(*name).map_or(&Value::Null, |vm| &vm.0)
            );
        }
        harmed.len()
    }
}

fn get(serve: &Serve, path: &str) -> Value {
    let (status, value) = serve.ask("GET", path, None);
    assert_eq!(status, 200, "GET {path}: {value}");
    value
}

/// Waits until every number adds up. What a guest still does is not of one moment with what is asked.
fn at_rest(serve: &Serve, what: &str) -> Fleet {
    wait_until(what, 20, || {
        let fleet = Fleet::look(serve);
        live(&fleet, what);
        fleet.exact().then_some(fleet)
    })
}

/// One line over the last one: each group against its limit. Only on a terminal.
fn live(fleet: &Fleet, note: &str) {
    if !std::io::stdout().is_terminal() {
        return;
    }
    print!("{}", clear());
    for (name, max, _) in GROUPS {
        let usage = fleet.group(name);
        let filled = (10 * usage / (max * MIB)).min(10) as usize;
        print!("{name} [{:<10}] {:>4}M of {max}M  ", "#".repeat(filled), usage / MIB);
    }
    print!("{note}");
    let _ = std::io::stdout().flush();
}

/// The forty guests.
pub fn fleet(step: &mut Step) {
    let start = Instant::now();
    let mut serve = Serve::start(&["--budget", "1G"]);
    let plan = plan();
    create(&serve, &plan);
    let fleet = Fleet::look(&serve);
    let running = fleet.vms.values().filter(|(vm, _)| vm["state"] == "running").count();
    step(
        "start",
        running == plan.len() && fleet.groups.len() == GROUPS.len() + 1,
        &format!(
            "vms={} running={running} groups={} ms={} host_bytes={}",
            fleet.vms.len(),
            GROUPS.len(),
            start.elapsed().as_millis(),
            number(&fleet.host, "current_bytes")
        ),
    );
    limits(step, &serve, &plan);
    transaction(step, &serve);
    moved(step, &serve);
    killed(step, &serve);
    garbage(step, &serve);
    controller(step, &mut serve);
    serve.signal(libc::SIGTERM);
    serve.wait(30);
}

/// Makes groups and guests, four at a time.
fn create(serve: &Serve, plan: &[Member]) {
    for (name, max, _) in GROUPS {
        let (status, group) = serve.ask("PUT", &format!("/groups/{name}"), Some(&json!({ "max_bytes": max * MIB })));
        assert_eq!(status, 201, "{group}");
    }
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while let Some(member) = plan.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let config = json!({
                        "kernel": payload(), "group": format!("/{}", member.group), "debug_port": true,
                        "cmdline": format!("touch 4M {}M seed=7; park", member.writes),
                        "memory": { "size_bytes": 32 * MIB, "max_bytes": member.max, "swap_max_bytes": 0 },
                        // They stay held: what is done to one that is held for too long is not shown here.
                        "oom": { "deadline_ms": 600_000 },
                    });
                    serve.create_with(&member.name, &config);
                }
            });
        }
    });
}

/// Two levels of limits: of single VMs, and of a group.
fn limits(step: &mut Step, serve: &Serve, plan: &[Member]) {
    let start = Instant::now();
    let held = |fleet: &Fleet, group: &str| {
        let of = plan.iter().filter(|member| member.group == group);
        of.filter(|member| fleet.vm(&member.name)["held"]["now"] == true).count()
    };
    wait_until("both limits are met", 20, || {
        let fleet = Fleet::look(serve);
        live(&fleet, "writing");
        (held(&fleet, "gold") == 2 && held(&fleet, "bronze") > 0).then_some(())
    });
    let fleet = at_rest(serve, "everybody has written");
    let own = number(fleet.vm("gold-0"), "memory.current_bytes");
    let (bronze, of_bronze) = (fleet.group("bronze"), 96 * MIB);
    let within = plan.iter().all(|member| number(fleet.vm(&member.name), "memory.current_bytes") <= member.max)
        && GROUPS.iter().all(|(name, max, _)| fleet.group(name) <= max * MIB);
    let (charged, resident) = fleet.pages();
    step(
        "limits",
        within
            && own > OWN * MIB - MIB
            && bronze > of_bronze - MIB
            && held(&fleet, "gold") == 2
            && held(&fleet, "silver") == 0
            && charged == resident,
        &format!(
            "vm_bytes={own} vm_max_bytes={} group_bytes={bronze} group_max_bytes={of_bronze} held_at_own=2 \
             held_at_group={} charged_bytes={charged} resident_bytes={resident} ms={}",
            OWN * MIB,
            held(&fleet, "bronze"),
            start.elapsed().as_millis()
        ),
    );
}

/// Ten limits at once, or none.
fn transaction(step: &mut Step, serve: &Serve) {
    let change = |max: &dyn Fn(u64) -> u64| {
        let of = |n| json!({ "vm": format!("silver-{n}"), "limits": { "max_bytes": max(n) * MIB } });
        (0..10).map(of).collect::<Value>()
    };
    let count = |fleet: &Fleet, max: &dyn Fn(u64) -> u64| {
        let has = |n: &u64| number(fleet.vm(&format!("silver-{n}")), "memory.max_bytes") == max(*n) * MIB;
        (0..10).filter(has).count()
    };
    let before = Fleet::look(serve);
    // The last one cannot be: it uses more.
    let (refused, _) = serve.ask("POST", "/limits?mode=refuse", Some(&change(&|n| if n == 9 { 4 } else { 19 })));
    let kept = count(&Fleet::look(serve), &|_| OWN);
    let start = Instant::now();
    // Half go down, half up.
    let new = |n: u64| if n < 5 { OWN - 4 } else { OWN + 4 };
    let (status, answer) = serve.ask("POST", "/limits", Some(&change(&new)));
    let took = start.elapsed();
    let fleet = at_rest(serve, "ten limits at once");
    let (in_force, harmed) = (count(&fleet, &new), fleet.harmed(&before, &[]));
    if status != 200 {
        eprintln!("demo: {answer}");
    }
    step(
        "transaction",
        refused == 409 && kept == 10 && status == 200 && in_force == 10 && harmed == 0,
        &format!(
            "refused_status={refused} unchanged={kept} status={status} changed={in_force} ms={} harmed={harmed}",
            took.as_millis()
        ),
    );
}

/// A VM goes to another group, with all that it has.
fn moved(step: &mut Step, serve: &Serve) {
    let before = at_rest(serve, "before the move");
    let start = Instant::now();
    let (status, answer) = serve.ask("POST", "/vms/silver-0/move", Some(&json!({ "group": "/gold" })));
    let took = start.elapsed();
    if status != 200 {
        eprintln!("demo: {answer}");
    }
    let fleet = at_rest(serve, "after the move");
    let (was, is) = (before.vm("silver-0"), fleet.vm("silver-0"));
    let charge = |vm: &Value| number(vm, "memory.current_bytes");
    let pages = |vm: &Value| number(vm, "memory.stat.guest_bytes");
    // The stock is called back for the move, and granted again by the new group.
    let left = before.group("silver") - fleet.group("silver");
    let came = fleet.group("gold") - before.group("gold");
    step(
        "move",
        status == 200
            && is["group"] == "/gold"
            && pages(was) == pages(is)
            && fleet.vms["silver-0"].1 == pages(is)
            && left == charge(was)
            && came == charge(is)
            && was["pid"] == is["pid"],
        &format!(
            "status={status} guest_bytes_before={} guest_bytes={} resident_bytes={} left_group_bytes={left} \
             joined_group_bytes={came} ms={}",
            pages(was),
            pages(is),
            fleet.vms["silver-0"].1,
            took.as_millis()
        ),
    );
}

/// Stops and continues every VM but those that are gone: what none of them could if its own worker, or the controller,
/// had been harmed. Gives the slowest answer in ms.
fn all_answer(serve: &Serve, fleet: &Fleet, gone: &[&str]) -> u128 {
    let mut slowest = 0;
    for name in fleet.vms.keys().filter(|name| !gone.contains(&name.as_str())) {
        let start = Instant::now();
        let vm = serve.show(name);
        assert!(vm["stale"] == false, "{name} does not answer");
        slowest = slowest.max(start.elapsed().as_millis());
    }
    slowest
}

/// Waits for the end of a VM whose worker has been harmed, and for its charge to come back.
fn end_of(serve: &Serve, name: &str) -> Value {
    wait_until("its charge is back", 20, || {
        let vm = serve.show(name);
        (vm["state"] == "ended" && number(&vm, "memory.current_bytes") == 0).then_some(vm)
    })
}

/// A worker is killed from outside.
fn killed(step: &mut Step, serve: &Serve) {
    let before = at_rest(serve, "before a worker is killed");
    let start = Instant::now();
    kill(pid(before.vm("gold-5")), libc::SIGKILL);
    let ended = end_of(serve, "gold-5");
    let took = start.elapsed();
    let fleet = at_rest(serve, "after a worker was killed");
    let harmed = fleet.harmed(&before, &["gold-5"]);
    let freed = before.group("gold") - fleet.group("gold");
    let charge = number(before.vm("gold-5"), "memory.current_bytes");
    let slowest = all_answer(serve, &fleet, &["gold-5"]);
    step(
        "worker-killed",
        harmed == 0 && freed == charge,
        &format!(
            "end={} charge_bytes={charge} freed_bytes={freed} ms={} others={} harmed={harmed} slowest_answer_ms={slowest}",
            dashed(&ended["end"]),
            took.as_millis(),
            fleet.vms.len() - 1,
        ),
    );
}

fn dashed(text: &Value) -> String {
    text.as_str().unwrap_or("?").replace(' ', "-")
}

/// A worker talks nonsense to the controller, fast.
fn garbage(step: &mut Step, serve: &Serve) {
    let before = at_rest(serve, "before the garbage");
    let start = Instant::now();
    let sent = spew(pid(before.vm("gold-6")), &mut Random::new(3));
    let ended = end_of(serve, "gold-6");
    let took = start.elapsed();
    let fleet = at_rest(serve, "after the garbage");
    let gone = ["gold-5", "gold-6"];
    let harmed = fleet.harmed(&before, &gone);
    let slowest = all_answer(serve, &fleet, &gone);
    let end = dashed(&ended["end"]);
    step(
        "worker-garbage",
        harmed == 0 && sent > 0 && end.contains("garbage"),
        &format!(
            "packets={sent} end={end} ms={} others={} harmed={harmed} slowest_answer_ms={slowest}",
            took.as_millis(),
            fleet.vms.len() - gone.len(),
        ),
    );
}

/// The controller is killed; the next one finds all that it had.
fn controller(step: &mut Step, serve: &mut Serve) {
    let gone = ["gold-5", "gold-6"];
    let before = at_rest(serve, "before the controller is killed");
    let old = serve.pid();
    serve.signal(libc::SIGKILL);
    serve.wait(10);
    assert!(http(&serve.socket(), "GET", "/host", None).is_err(), "nobody answers any more");
    let start = Instant::now();
    serve.again();
    wait_until("all are adopted", 20, || {
        let list = get(serve, "/vms");
        let there = list.as_array().expect("a list").iter().filter(|vm| vm["stale"] == false && vm["state"] != "ended");
        (there.count() == before.vms.len() - gone.len()).then_some(())
    });
    let took = start.elapsed();
    let fleet = at_rest(serve, "the next controller");
    let harmed = fleet.harmed(&before, &gone);
    let ((charged_before, resident_before), (charged, resident)) = (before.pages(), fleet.pages());
    step(
        "controller-killed",
        harmed == 0
            && charged == charged_before
            && resident == resident_before
            && charged == resident
            && serve.pid() != old,
        &format!(
            "adopted={} harmed={harmed} charged_bytes_before={charged_before} charged_bytes={charged} \
             resident_bytes_before={resident_before} resident_bytes={resident} host_bytes_before={} host_bytes={} ms={}",
            fleet.vms.values().filter(|(vm, _)| vm["state"] != "ended").count(),
            before.host["current_bytes"],
            fleet.host["current_bytes"],
            took.as_millis()
        ),
    );
}

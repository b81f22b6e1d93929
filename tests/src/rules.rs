//! A line of the table of rules (`memcg_core::sim::rules`), played with real VMs under a real `ballast serve`.
//!
//! All of it is taken from the line: groups, limits, loads, what is done with a VM that is chosen, the client, and what has to come
//! of it. Other than in the simulator are
//!
//! * the *sizes*: everything has an eighth of what the line says;
//! * the *times*: the points of all loads come in their order, each as soon as those before it are reached. When something was
//!   decided is not looked at, only in which order;
//! * the *host*: where it has to become short it is a small one ([`SmallHost`]). It has more than an eighth, because what a host is
//!   critical below is the same for all small ones. A guest that would take the last of it waits;
//! * what a VM *costs* beside its pages. That is a part of its load, and not known to the page beforehand. So when a VM has what it
//!   wants at first, its `min` and `low` are put as far from what it uses as the line says.
//!
//! Lines that need something else cannot be played: memory that others use, swap, VMs that do not die or do not listen.

use std::collections::BTreeSet;
use std::thread;

use ballast::controller::shortage::STOCK;
use memcg_core::host::Terms;
use memcg_core::oom::Preference;
use memcg_core::sim::What;
use memcg_core::sim::rules::{Decided, NONE, Rule, Says, VmLine};
use memcg_core::units::Pages;
use serde_json::{Value, json};

use crate::serve::{Console, Decider, Serve, is_alive, pid};
use crate::small::SmallHost;
use crate::{PAGE, deadline, number, payload, skipped, wait_until};

const MIB: u64 = 1 << 20;

/// A line's amounts are so many times as large.
const SCALE: u64 = 8;

/// Where a guest's memory begins that it touches.
const START: u64 = 16 * MIB;

/// What a VM in the list of a decision may use more or less than the line says: a fault fills pages around it, too, and they cost
/// page tables.
const OFF: u64 = 8 * MIB;

/// Bytes of an amount of the table.
fn scaled(mib: u64) -> u64 {
    mib * MIB / SCALE
}

/// The same of a limit.
fn limit(mib: u64) -> Value {
    if mib == NONE { Value::Null } else { json!(scaled(mib)) }
}

/// Plays a line, and looks whether what came of it is what the line says.
///
/// # Panics
/// When it is not, with what was decided; also when it is a line that cannot be played.
pub fn play(rule: &'static Rule) {
    let test = format!("rules-{}", rule.id);
    if skipped(&test) {
        return;
    }
    assert!(rule.others.is_empty(), "{test} cannot be played");
    let at_host = rule.expects.iter().any(|expected| level(&expected.what) == "/");
    let serve = if at_host {
        let Some(host) = SmallHost::make_or_skip(&test, memory(rule)) else { return };
        Serve::start_on(host, &[])
    } else {
        Serve::start(&[])
    };
    for (path, low, max) in rule.groups {
        let limits = json!({ "low_bytes": limit(*low), "max_bytes": limit(*max) });
        let (status, answer) = serve.ask("PUT", &format!("/groups{path}"), Some(&limits));
        assert_eq!(status, 201, "{answer}");
    }
    let serve = &serve;
    let mut host = Host { rule, serve, guests: Vec::new(), decisions: Vec::new() };
    host.guests = rule.vms.iter().map(|line| Guest::start(serve, line)).collect();
    thread::scope(|scope| {
        let client = rule.client.map(|client| scope.spawn(move || be_asked(serve, rule, client)));
        host.live();
        if let Some(client) = client {
            client.join().expect("the client was asked");
        }
    });
    host.verify();
}

/// Memory of the small host of a line.
fn memory(rule: &Rule) -> u64 {
    let critical = |pages| Terms::new(pages).critical.bytes();
    let table = Pages::from_mib(rule.memory);
    let small = Pages(table.0 / SCALE);
    small.bytes() + critical(small) - critical(table) / SCALE
}

/// The level at which something is decided.
fn level(what: &Decided) -> &'static str {
    match *what {
        Decided::Kill(_, level, _) | Decided::Pause(_, level, _) | Decided::Nobody(level, _) => level,
        Decided::Spared(_) | Decided::Resume(_) => panic!("{what:?} cannot be played"),
    }
}

/// Whether the client of a line answers before it is too late.
fn in_time(client: (u64, u64, Says)) -> bool {
    client.1 < client.0
}

/// The client of a line. It answers at once if it is in time, else when the decision has been made, and is refused then.
fn be_asked(serve: &Serve, rule: &Rule, client: (u64, u64, Says)) {
    let (wait, _, Says::Takes(name)) = client else { panic!("{client:?} cannot be played") };
    let wait = u64::try_from(deadline(wait).as_millis()).expect("some seconds");
    let mut decider = Decider::register(serve, wait);
    let question = decider.question();
    if !in_time(client) {
        wait_until("it is too late", 60, || decisions(serve).pop());
    }
    let pauses = rule.vms.iter().any(|vm| vm.name == name && vm.pauses);
    let answer = json!({ "answer": if pauses { "pause" } else { "kill" }, "vm": name });
    let (status, said) = serve.ask("POST", &format!("/oom/decisions/{}", question["id"]), Some(&answer));
    assert_eq!(status, if in_time(client) { 204 } else { 404 }, "{said}");
}

/// What has been decided so far, the first first.
fn decisions(serve: &Serve) -> Vec<Value> {
    let (_, log) = serve.ask("GET", "/oom/log", None);
    log["decisions"].as_array().expect("a list").clone()
}

/// A decision as the simulator has it.
fn what(decision: &Value) -> What {
    let text = |key: &str| decision[key].as_str().unwrap_or_else(|| panic!("no {key} in {decision}")).to_owned();
    let (level, why) = (text("level"), text("why"));
    if decision["vm"].is_null() {
        What::Nobody { level, why }
    } else {
        What::Chosen { level, vm: text("vm"), killed: text("action") == "kill", why }
    }
}

/// A VM of the line, and what its guest is about.
struct Guest {
    line: &'static VmLine,
    pid: u32,
    console: Console,
    /// What the VM used when its guest had touched nothing.
    costs: u64,
    wants: u64,
    touched: u64,
    /// What it is touching now.
    touches: u64,
}

impl Guest {
    fn start(serve: &Serve, line: &'static VmLine) -> Self {
        let VmLine { name, load, immortal, deaf, ends, driver, swaps, .. } = line;
        assert!(!(*immortal || *deaf || *driver || *swaps || ends.is_some()), "{name} cannot be played");
        let most = load.iter().map(|(_, footprint, _)| scaled(*footprint)).max().unwrap_or(0);
        let preference = match line.preference {
            Preference::None => "none",
            Preference::Avoid => "avoid",
            Preference::Omit => "omit",
        };
        let action = if line.pauses { "pause" } else { "kill" };
        let config = json!({
            "kernel": payload(), "cmdline": "shell", "debug_port": true, "group": line.group,
            "memory": {
                "size_bytes": (START + most).next_multiple_of(2 * MIB), "track": true, "max_bytes": limit(line.max),
                "swap_max_bytes": 0,
            },
            "oom": { "action": action, "preference": preference, "priority": line.priority },
        });
        let view = serve.create_with(name, &config);
        let console = Console::of(&view);
        console.expect("READY", 20);
        let view = serve.show(name);
        let costs = number(&view, "memory.current_bytes") - number(&view, "memory.stat.stock_bytes");
        Self { line, pid: pid(&view), console, costs, wants: 0, touched: 0, touches: 0 }
    }

    /// What it has not yet, in whole pages.
    fn misses(&self) -> u64 {
        self.wants.saturating_sub(self.costs + self.touched) / PAGE * PAGE
    }

    /// Hears whether it has touched what it was told to.
    fn hear(&mut self) {
        let Some(answer) = self.console.latest("").filter(|_| self.touches > 0) else { return };
        assert!(answer.starts_with("OK"), "{}: {answer}", self.line.name);
        self.touched += std::mem::take(&mut self.touches);
    }

    /// Tells it to touch so much more, unless it is gone already.
    fn touch(&mut self, bytes: u64) {
        let touch = format!("touch {} {bytes} seed=1", START + self.touched);
        if self.console.try_send(&touch).is_ok() {
            self.touches = bytes;
        }
    }
}

/// The host of a line, while it is played.
struct Host<'a> {
    rule: &'static Rule,
    serve: &'a Serve,
    guests: Vec<Guest>,
    /// What was decided when it was looked at last.
    decisions: Vec<Value>,
}

impl Host<'_> {
    /// All guests get what they want, as far as they live and there is room, until all has been decided.
    fn live(&mut self) {
        let points = self.rule.vms.iter().flat_map(|vm| vm.load);
        for at in points.map(|(at, ..)| *at).collect::<BTreeSet<u64>>() {
            for guest in &mut self.guests {
                let point = guest.line.load.iter().find(|(when, ..)| *when == at);
                guest.wants = point.map_or(guest.wants, |(_, footprint, _)| scaled(*footprint));
            }
            self.go_on(&format!("all have what they want after {at} s, or it is decided"), |host| {
                host.is_decided() || host.is_content()
            });
            if at == 0 {
                self.protect();
            }
        }
        self.go_on("it is decided", Self::is_decided);
        if !self.rule.expects.iter().any(|expected| matches!(expected.what, Decided::Nobody(..))) {
            self.go_on("whoever is left has what it wants", Self::is_content);
        }
    }

    /// Goes on until that is so.
    fn go_on(&mut self, until: &str, so: impl Fn(&Self) -> bool) {
        wait_until(until, 60, || {
            self.decisions = decisions(self.serve);
            let gone = |vm: &str| self.decisions.iter().any(|decision| decision["vm"] == vm);
            let (mut left, mut waits) = (Vec::new(), false);
            for guest in self.guests.iter_mut().filter(|guest| !gone(guest.line.name)) {
                guest.hear();
                waits |= guest.touches > 0;
                left.push(guest);
            }
            // What is left of a small host is known when nobody takes anything of it.
            let mut room = self.serve.host().map_or(u64::MAX, |host| if waits { 0 } else { host.room() });
            for guest in left.into_iter().filter(|guest| guest.touches == 0) {
                let more = guest.misses().min(room / PAGE * PAGE);
                if more > 0 {
                    guest.touch(more);
                    room -= more;
                }
            }
            so(self).then_some(())
        });
    }

    /// Whether all has been decided that has to be.
    fn is_decided(&self) -> bool {
        self.decisions.len() >= self.rule.expects.len()
    }

    /// Whether everybody who is left has what it wants.
    fn is_content(&self) -> bool {
        let gone = |vm: &str| self.decisions.iter().any(|decision| decision["vm"] == vm);
        self.guests.iter().all(|guest| gone(guest.line.name) || guest.touches == 0 && guest.misses() == 0)
    }

    /// Puts the VMs' `min` and `low` where the line has them, seen from what they use on a host that is short.
    fn protect(&self) {
        for Guest { line, wants, touched, .. } in &self.guests {
            let told =
                || Some(self.serve.show(line.name)).filter(|vm| number(vm, "memory.stat.guest_bytes") >= *touched);
            let view = wait_until("its worker has told of all", 20, told);
            let stock = number(&view, "memory.stat.stock_bytes");
            let uses = number(&view, "memory.current_bytes") - stock + STOCK.bytes().min(stock);
            let at = |mib: u64| if mib == 0 { 0 } else { (uses + scaled(mib)).saturating_sub(*wants) };
            let limits = json!({ "min_bytes": at(line.min), "low_bytes": at(line.low) });
            let (status, answer) = self.serve.ask("PATCH", &format!("/vms/{}/memory", line.name), Some(&limits));
            assert_eq!(status, 200, "{answer}");
        }
    }

    /// Looks at what was decided, by whom and by which numbers, and at what has become of all.
    fn verify(&mut self) {
        self.decisions = decisions(self.serve);
        let decided: Vec<_> = self.decisions.iter().map(what).collect();
        if let Err(why) = self.rule.verify_order(&decided) {
            let list: String = decided.iter().map(|what| format!("    {what:?}\n")).collect();
            panic!("{}: {} But: {why}\n{list}", self.rule.id, self.rule.says);
        }
        let taken = match self.rule.client {
            Some(client @ (_, _, Says::Takes(name))) if in_time(client) => Some(name),
            _ => None,
        };
        for decision in &self.decisions {
            let by = if taken.is_some_and(|name| decision["vm"] == name) { "client" } else { "policy" };
            assert_eq!(decision["by"], by, "{decision}");
            for entry in decision["ranked"].as_array().expect("a list") {
                self.verify_numbers(entry);
            }
        }
        let told: Vec<_> =
            self.serve.told("victim_selected").into_iter().map(|event| event["decision"].clone()).collect();
        let acted = self.decisions.iter().filter(|decision| !decision["vm"].is_null());
        assert_eq!(told, acted.map(|decision| decision["number"].clone()).collect::<Vec<_>>());
        for guest in &mut self.guests {
            let name = guest.line.name;
            let chosen = self.decisions.iter().find(|decision| decision["vm"] == name);
            match chosen.map(|decision| &decision["action"]) {
                Some(action) if action == "kill" => {
                    self.serve.wait_state(name, "ended");
                    assert!(!is_alive(guest.pid), "{name}");
                }
                Some(_) => assert_eq!(self.serve.show(name)["state"], "paused", "{name}"),
                None => {
                    assert!(is_alive(guest.pid) && self.serve.show(name)["state"] == "running", "{name}");
                    if guest.touches == 0 && guest.touched > 0 {
                        guest.console.ok(&format!("verify {START} {} seed=1", guest.touched));
                    }
                }
            }
        }
    }

    /// Looks whether a VM in the list of a decision has what the line says, if that is the same all the time.
    fn verify_numbers(&self, entry: &Value) {
        let line = self.rule.vms.iter().find(|vm| entry["vm"] == vm.name).expect("a VM of the line");
        let [(_, footprint, _)] = line.load else { return };
        let [usage, stock, above, min] =
            ["usage", "stock", "above", "min"].map(|key| number(entry, &format!("{key}_bytes")));
        assert!((usage - stock).abs_diff(scaled(*footprint)) < OFF, "{entry}");
        let beyond = scaled(footprint.saturating_sub(line.min.max(line.low)));
        assert!(above.abs_diff(beyond) < OFF + stock, "{entry}");
        if line.min == *footprint {
            assert!(usage <= min && min - usage <= STOCK.bytes(), "not exactly at it: {entry}");
        }
    }
}

//! A host that runs short: twelve guests that want more than there is, and Linux guests beside a process that takes memory.
//!
//! ```text
//!  spread   the budget is lowered: idle guests give, the more the fewer shares they have, busy ones do not
//!  rank     who would go, and why, before anything is done
//!  pause    all become busy: they get nowhere, and the first of the list is paused and gives all that it has
//!  relief   the others are as fast as they were
//!  resume   one of them ends: there is room, and the one that was paused goes on by itself
//!  verify   every byte of everybody is there
//!  kill     the same with a guest that may be killed
//! ```
//!
//! The Linux guests have no budget, and a process beside them takes what their host has left: cold memory goes, and when that is
//! not enough the guest that is to go first. The kernel never has to choose.

use std::path::Path;
use std::time::Instant;

use ballast_tests::hog::{self, Hog};
use ballast_tests::serve::{Console, Serve, is_alive, pid};
use ballast_tests::{number, payload, wait_until};
use serde_json::{Value, json};

use super::{MIB, Step, clear};

/// The steps of the freestanding guests, in order.
pub const STEPS: [&str; 7] = ["spread", "rank", "pause", "relief", "resume", "verify", "kill"];

/// The step of the Linux guests.
pub const LINUX_STEPS: [&str; 1] = ["linux-host"];

/// Kinds of guests: what their names begin with, how many, and their shares.
const KINDS: [(&str, usize, u32); 3] = [("idle", 4, 100), ("rich", 4, 400), ("busy", 4, 100)];
/// RAM of each, where its memory begins, and how much it uses.
const SIZE: u64 = 96 * MIB;
const START: &str = "16M";
const HOT: u64 = 48 * MIB;
/// The budget: not quite enough for what twelve of them use, with what each costs beside that, and plenty for eleven.
const BUDGET: u64 = 12 * HOT + 24 * MIB;
/// The guest that goes first, one that goes last, and one that never goes.
const BATCH: &str = "busy-3";
const AVOIDED: &str = "rich-3";
const OMITTED: &str = "idle-0";
/// The one that ends, so that there is room again.
const LEAVES: &str = "idle-1";
/// The one that may be killed.
const CRASHER: &str = "crasher";

/// One guest, as it was made.
struct Guest {
    name: String,
    pid: u32,
    console: Console,
}

impl Guest {
    fn make(serve: &Serve, name: &str, shares: u32, oom: &Value) -> Self {
        let memory = json!({
            "size_bytes": SIZE, "swap_max_bytes": null, "track": true, "ageing_s": 1, "shares": shares,
        });
        let config =
            json!({ "kernel": payload(), "cmdline": "shell", "debug_port": true, "memory": memory, "oom": oom });
        let view = serve.create_with(name, &config);
        let mut console = Console::of(&view);
        console.expect("READY", 20);
        console.ok(&format!("touch {START} {}M seed=1", HOT / MIB));
        Self { name: name.to_owned(), pid: pid(&view), console }
    }

    /// Uses all that it has, over and over, until somebody types.
    fn work(&mut self) {
        self.console.send(&format!("access hot {START} {}M period=500", HOT / MIB));
    }

    /// Ends its work, and compares all of its memory.
    fn verify(&mut self) -> bool {
        self.console.send("");
        self.console.expect("OK", 60);
        self.console.send(&format!("verify {START} {}M seed=1", HOT / MIB));
        let answer = self.console.expect("", 60);
        let is_whole = answer.starts_with("OK") && answer.contains(" bad=0");
        if !is_whole {
            eprintln!("demo: {}: {answer}", self.name);
        }
        is_whole
    }
}

/// The host as it is played.
struct Host {
    serve: Serve,
    guests: Vec<Guest>,
}

impl Host {
    fn get(&self, path: &str) -> Value {
        let (status, value) = self.serve.ask("GET", path, None);
        assert_eq!(status, 200, "GET {path}: {value}");
        value
    }

    fn usage(&self) -> u64 {
        number(&self.get("/host"), "current_bytes")
    }

    /// What the guests use, and what that costs: not what is charged ahead of need.
    fn used(&self) -> u64 {
        let part = |vm: &Value, part: &str| number(vm, &format!("memory.stat.{part}_bytes"));
        let views = self.guests.iter().map(|guest| self.serve.show(&guest.name));
        views.map(|vm| part(&vm, "guest") + part(&vm, "vmm") + part(&vm, "reserve")).sum()
    }

    fn set_budget(&self, bytes: u64) -> (u16, Value) {
        self.serve.ask("PATCH", "/groups/?mode=reclaim&wait_ms=20000", Some(&json!({ "max_bytes": bytes })))
    }

    /// What those of a kind have given.
    fn given(&self, kind: &str) -> u64 {
        let of = self.guests.iter().filter(|guest| guest.name.starts_with(kind));
        of.map(|guest| number(&self.serve.show(&guest.name), "swap.current_bytes")).sum()
    }

    /// Accesses in half a second of the slowest of those that work, once each has said a new number.
    fn slowest(&self, but: &[&str]) -> u64 {
        let others = self.guests.iter().filter(|guest| !but.contains(&guest.name.as_str()));
        let speed = |guest: &Guest| {
            guest.console.latest("ACCESS");
            let line = guest.console.expect("ACCESS", 60);
            let number = line.split(' ').find_map(|word| word.strip_prefix("touches=")?.parse::<u64>().ok());
            number.unwrap_or_else(|| panic!("{}: {line}", guest.name))
        };
        others.map(speed).min().unwrap_or(0)
    }
}

fn live(note: &str) {
    use std::io::{IsTerminal, Write};
    if std::io::stdout().is_terminal() {
        print!("{}{note}", clear());
        let _ = std::io::stdout().flush();
    }
}

/// Twelve freestanding guests.
pub fn native(step: &mut Step) {
    let serve = Serve::start(&["--budget", "2G"]);
    let mut host = Host { serve, guests: Vec::new() };
    live("making twelve guests");
    for (kind, count, shares) in KINDS {
        for n in 0..count {
            let name = format!("{kind}-{n}");
            let (priority, preference) = match name.as_str() {
                BATCH => (-5, "none"),
                AVOIDED => (0, "avoid"),
                OMITTED => (0, "omit"),
                _ => (0, "none"),
            };
            let oom = json!({ "action": "pause", "priority": priority, "preference": preference });
            let mut guest = Guest::make(&host.serve, &name, shares, &oom);
            if kind == "busy" {
                guest.work();
            }
            host.guests.push(guest);
        }
    }
    spread(step, &host);
    rank(step, &host);
    paused(step, &mut host);
    killed(step, &mut host);
    host.serve.signal(libc::SIGTERM);
    host.serve.wait(30);
}

/// Who gives how much.
fn spread(step: &mut Step, host: &Host) {
    live("waiting until it is known who is idle");
    let is_known = |guest: &&Guest| {
        host.serve.show(&guest.name)["cold"]["working_set_bytes"].as_u64().is_some_and(|bytes| bytes < HOT / 4)
    };
    wait_until("idle guests are known", 60, || {
        let idle = host.guests.iter().filter(|guest| !guest.name.starts_with("busy"));
        idle.filter(is_known).count().eq(&8).then_some(())
    });
    let before = host.used();
    let start = Instant::now();
    let (status, answer) = host.set_budget(BUDGET);
    let ms = start.elapsed().as_millis();
    assert!(status == 200, "{answer}");
    let usage = host.usage();
    let [idle, rich, busy] = KINDS.map(|(kind, ..)| host.given(kind));
    step(
        STEPS[0],
        usage <= BUDGET && idle > 2 * rich && rich > busy,
        &format!(
            "before_bytes={before} budget_bytes={BUDGET} usage_bytes={usage} ms={ms} idle_gave_bytes={idle} \
             rich_gave_bytes={rich} busy_gave_bytes={busy}"
        ),
    );
}

/// Who would go, before anything is done.
fn rank(step: &mut Step, host: &Host) {
    let list = host.get("/oom/rank");
    let candidates = list["candidates"].as_array().expect("a list").clone();
    let vm = |place: usize| candidates[place]["vm"].as_str().unwrap_or("?").to_owned();
    let last = candidates.len() - 1;
    for candidate in &candidates {
        println!("{}  {:>2}. {}", clear(), candidate["rank"], candidate["why"].as_str().unwrap_or("?"));
    }
    let nothing = host.serve.told("victim_selected").is_empty();
    let is_as_asked = vm(0) == BATCH && vm(last - 1) == AVOIDED && vm(last) == OMITTED;
    step(
        STEPS[1],
        candidates.len() == 12 && is_as_asked && nothing,
        &format!("candidates={} first={} last={} never={}", candidates.len(), vm(0), vm(last - 1), vm(last)),
    );
}

/// All become busy; one stands still for the others, and goes on when there is room.
fn paused(step: &mut Step, host: &mut Host) {
    for guest in host.guests.iter_mut().filter(|guest| !guest.name.starts_with("busy")) {
        guest.work();
    }
    live("all twelve use all that they have");
    let before = number(&host.serve.show(BATCH), "memory.stat.guest_bytes");
    let start = Instant::now();
    let mut during = u64::MAX;
    let victim = wait_until("somebody is chosen", 120, || {
        during = during.min(host.slowest(&[BATCH]));
        host.serve.told("victim_selected").pop()
    });
    let chosen = start.elapsed().as_millis();
    let left = wait_until("what it has is evicted", 20, || {
        let now = host.serve.show(BATCH);
        let left = number(&now, "memory.stat.guest_bytes") + number(&now, "memory.stat.store_bytes");
        (left < before / 10).then_some(left)
    });
    step(
        STEPS[2],
        victim["vm"] == BATCH && victim["action"] == "pause" && left < before / 10,
        &format!(
            "vm={} ms_until_chosen={chosen} before_bytes={before} left_bytes={left} freed_percent={}",
            victim["vm"].as_str().unwrap_or("?"),
            100 * (before - left) / before
        ),
    );
    live("the others go on");
    let after = wait_until("the others are fast again", 60, || {
        let now = host.slowest(&[BATCH]);
        (now > 20 * during).then_some(now)
    });
    let victims = host.serve.told("victim_selected").len();
    let running = host.guests.iter().filter(|guest| host.serve.show(&guest.name)["state"] == "running").count();
    step(
        STEPS[3],
        victims == 1 && running == 11,
        &format!("running={running} slowest_during={during} slowest_after={after} victims={victims}"),
    );
    let (status, refusal) = host.serve.ask("POST", &format!("/vms/{BATCH}/resume"), None);
    let start = Instant::now();
    let (removed, _) = host.serve.ask("DELETE", &format!("/vms/{LEAVES}"), None);
    host.guests.retain(|guest| guest.name != LEAVES);
    let resumed = wait_until("it goes on by itself", 60, || host.serve.told("resumed").pop());
    let ms = start.elapsed().as_millis();
    let fast = wait_until("all are fast", 60, || Some(host.slowest(&[])).filter(|now| *now > 20 * during));
    step(
        STEPS[4],
        status == 409 && removed < 300 && resumed["vm"] == BATCH,
        &format!(
            "refused_before={} vm={} by={} ms={ms} slowest={fast}",
            refusal["code"].as_str().unwrap_or("?"),
            resumed["vm"].as_str().unwrap_or("?"),
            resumed["by"].as_str().unwrap_or("?"),
        ),
    );
    let intact = host.guests.iter_mut().filter_map(|guest| guest.verify().then_some(())).count();
    step(STEPS[5], intact == 11, &format!("guests={} intact={intact}", host.guests.len()));
}

/// One that may be killed comes, and there is too little again.
fn killed(step: &mut Step, host: &mut Host) {
    let oom = json!({ "action": "kill", "priority": -10 });
    let crasher = Guest::make(&host.serve, CRASHER, 100, &oom);
    let pid = crasher.pid;
    host.guests.push(crasher);
    for guest in &mut host.guests {
        guest.work();
    }
    live("twelve guests again, and one of them may be killed");
    let before = host.usage();
    let start = Instant::now();
    let victim = wait_until("somebody is chosen", 120, || host.serve.told("victim_selected").into_iter().nth(1));
    let chosen = start.elapsed().as_millis();
    let gone = Instant::now();
    wait_until("its memory is back", 20, || (host.usage() + HOT / 2 < before).then_some(()));
    let back = gone.elapsed().as_millis();
    host.guests.retain(|guest| guest.name != CRASHER);
    let ended = wait_until("it has ended", 20, || Some(host.serve.show(CRASHER)).filter(|vm| vm["state"] == "ended"));
    let alive = host.guests.iter().filter(|guest| is_alive(guest.pid)).count();
    let intact = host.guests.iter_mut().filter_map(|guest| guest.verify().then_some(())).count();
    step(
        STEPS[6],
        victim["vm"] == CRASHER && victim["action"] == "kill" && !is_alive(pid) && alive == 11 && intact == 11,
        &format!(
            "vm={} end={} ms_until_chosen={chosen} ms_until_back={back} others_alive={alive} intact={intact}",
            victim["vm"].as_str().unwrap_or("?"),
            ended["end"].as_str().unwrap_or("?").replace(' ', "-"),
        ),
    );
}

/// Linux guests, and what each has touched.
const LINUX: [(&str, &str); 3] = [("web", "omit"), ("db", "avoid"), ("batch", "none")];
const LINUX_SIZE: u64 = 288 * MIB;
const LINUX_USES: u64 = 144 * MIB;
/// The process takes so much more than the host has left, and so much at a time.
const TAKES: u64 = 128 * MIB;
const BITE: u64 = 4 * MIB;

/// Takes so many bytes of this host's memory, and keeps them.
pub fn hog(bytes: u64) -> ! {
    hog::take(bytes, BITE)
}

/// Three Debian guests, and a process that takes the memory of their host.
pub fn linux(step: &mut Step, kernel: &Path, initrd: &Path) {
    let serve = Serve::start(&[]);
    let mut guests: Vec<Guest> = Vec::new();
    for (name, preference) in LINUX {
        let config = json!({
            "kernel": kernel, "initrd": initrd, "cmdline": "quiet panic=-1 pci=off",
            "memory": { "size_bytes": LINUX_SIZE, "track": true, "swap_max_bytes": null, "ageing_s": 10 },
            "oom": { "action": "kill", "preference": preference },
        });
        let view = serve.create_with(name, &config);
        let mut console = Console::of(&view);
        console.expect("READY", 60);
        console.send(&format!("touch {LINUX_USES} seed=2 fill=mixed"));
        console.expect("OK", 120);
        guests.push(Guest { name: name.to_owned(), pid: pid(&view), console });
    }
    let mut host = Host { serve, guests };
    let (before, kills) = (hog::available(), hog::oom_kills());
    let mut hog = Hog::start(&["hog", &(before + TAKES).to_string()]);
    let has_all = wait_until("the process has what it wants", 240, || {
        live(&format!("{} MiB left", hog::available() / MIB));
        // The kernel may have killed it.
        hog.has_all().then_some(true).or_else(|| (!hog.lives()).then_some(false))
    });
    wait_until("the host has memory again", 240, || host.serve.told("pressure_left").pop());
    let victims = host.serve.told("victim_selected");
    let gone: Vec<_> = victims.iter().filter_map(|event| event["vm"].as_str()).collect();
    let is_gone = |name: &str| gone.contains(&name);
    let swapped: u64 = LINUX.iter().map(|(name, _)| number(&host.serve.show(name), "swap.current_bytes")).sum();
    let killed = hog::oom_kills() - kills;
    let hog_lives = hog.lives();
    drop(hog);
    let alive = |guest: &Guest| is_alive(guest.pid) != is_gone(&guest.name);
    let as_told = host.guests.iter().all(alive);
    let others: Vec<_> = host.guests.iter_mut().filter(|guest| !gone.contains(&guest.name.as_str())).collect();
    let (left, mut intact) = (others.len(), 0);
    for guest in others {
        guest.console.send("verify");
        let answer = guest.console.expect("VERIFY", 240);
        intact += usize::from(answer == format!("VERIFY ok pages={}", LINUX_USES / 4096));
    }
    step(
        LINUX_STEPS[0],
        has_all && hog_lives && killed == 0 && as_told && intact == left && gone.iter().all(|name| *name == "batch"),
        &format!(
            "available_bytes={before} taken_bytes={} kernel_kills={killed} swapped_bytes={swapped} chosen={} intact={intact} \
             of={left}",
            before + TAKES,
            if gone.is_empty() { "nobody".to_owned() } else { gone.join(",") },
        ),
    );
}

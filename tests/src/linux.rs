//! A Linux guest whose limit is lowered until it has to lose what it uses: first what it frees and reports, then what its
//! balloon takes out of the page cache, then pages that nobody asks it about.
//!
//! The guest has written to all of it, and says in the end whether it finds every byte. Without its balloon driver it can
//! neither report nor give, and eviction is all that is left.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use crate::{TestVm, deadline, number, wait_until};

const MIB: u64 = 1 << 20;
/// The guest's limit at first, with room for all of its RAM and what the VMM needs, and the limit that it gets.
pub const HIGH_MAX: u64 = 416 * MIB;
/// See [`HIGH_MAX`]. The kernel, the disk behind the page cache and the anonymous memory do not fit.
pub const LOW_MAX: u64 = 144 * MIB;
/// RAM, page cache and anonymous memory of the guest. What is cached is on a disk in memory, so it is there twice.
const SIZE: u64 = 384 * MIB;
/// See [`SIZE`].
const CACHE: u64 = 24 * MIB;
/// See [`SIZE`].
const ANONYMOUS: u64 = 64 * MIB;
/// What it frees, twice: a part that shows that it reports, and one that it reports while the limit is lowered. Linux
/// reports only while 32 blocks of 2 MiB are free.
const FREED: u64 = 72 * MIB;
/// Seconds that the lower limit may take.
const WAIT: u64 = 20;

/// What happened.
#[derive(Debug)]
pub struct Story {
    /// The status of the request to lower the limit, and how long its answer took.
    pub status: u16,
    /// See `status`; milliseconds.
    pub ms: u128,
    /// The VM just before, and when it was answered.
    pub before: Value,
    /// See `before`.
    pub after: Value,
    /// The rungs that the events name, in their order, as far as they are ways to get memory.
    pub rungs: Vec<String>,
    /// The event that says by what usage came down.
    pub reclaimed: Value,
    /// What the guest says in the end about its page cache, its anonymous memory and its log.
    pub answers: [String; 3],
}

impl Story {
    /// Bytes that came back by `report`, `balloon` or `evicted`, as the event has it.
    pub fn by(&self, way: &str) -> u64 {
        number(&self.reclaimed, &format!("{way}_bytes"))
    }

    /// Bytes that the guest has reported as free, in all: it does so every two seconds of its own. Whether one of these
    /// falls between the request and the balloon, which takes free pages first, is chance.
    pub fn reported(&self) -> u64 {
        number(&self.after, "faults.reported_pages") * 4096
    }

    /// Usage is at or below the lower limit, which is in force.
    pub fn is_below(&self) -> bool {
        let is = |key: &str| number(&self.after, &format!("memory.{key}_bytes"));
        self.status == 200 && is("max") == LOW_MAX && is("current") <= LOW_MAX
    }

    /// The guest finds every byte, and nothing is in its log that should not be.
    pub fn is_intact(&self) -> bool {
        let [cache, anonymous, log] = &self.answers;
        cache == &format!("CACHE ok pages={}", CACHE / 4096)
            && anonymous == &format!("VERIFY ok pages={}", ANONYMOUS / 4096)
            && log.starts_with("DMESG stalls=0 ooms=0 bugs=0")
    }

    /// The numbers, for one line.
    pub fn numbers(&self) -> String {
        format!(
            "status={} ms={} before_bytes={} usage_bytes={} max_bytes={LOW_MAX} rungs={} reported_bytes={} \
             report_bytes={} balloon_bytes={} evicted_bytes={} store_bytes={}",
            self.status,
            self.ms,
            number(&self.before, "memory.current_bytes"),
            number(&self.after, "memory.current_bytes"),
            self.rungs.join(","),
            self.reported(),
            self.by("report"),
            self.by("balloon"),
            self.by("evicted"),
            number(&self.after, "memory.stat.store_bytes"),
        )
    }
}

/// Plays it with a Linux guest that has its balloon driver, or one without.
///
/// # Panics
/// When the guest does not do what it is told.
pub fn play(name: &str, kernel: &Path, initrd: &Path, driver: bool) -> Story {
    let without = if driver { "" } else { " module_blacklist=virtio_balloon" };
    let mut vm = TestVm::builder(name)
        .kernel(kernel)
        .option("--initrd", initrd.to_string_lossy())
        .cmdline(&format!("quiet panic=-1 pci=off{without}"))
        .memory(&format!("size={}M,max={}M,swap=max", SIZE / MIB, HIGH_MAX / MIB))
        .option("--balloon", "free_page_reporting=on,deflate_on_oom=on")
        .start();
    vm.expect("READY", 60);
    say(&mut vm, &format!("cache {CACHE} seed=1 fill=mixed"));
    say(&mut vm, &format!("touch {ANONYMOUS} seed=2 fill=mixed"));
    for seed in [3, 4] {
        say(&mut vm, &format!("touch {FREED} seed={seed} fill=same"));
    }
    say(&mut vm, "free last=1");
    if driver {
        let reported = || number(&vm.show(), "faults.reported_pages");
        let charged = |vm: &TestVm| number(&vm.show(), "memory.stat.guest_bytes");
        let before = charged(&vm);
        wait_until("the guest reports what it has freed", 20, || {
            (charged(&vm) + FREED / 2 < before && reported() > 0).then_some(())
        });
    }
    let before = vm.show();
    say(&mut vm, "free last=1");
    let start = Instant::now();
    let query = format!("?mode=reclaim&wait_ms={}", deadline(WAIT).as_millis());
    let (status, _) = vm.patch(&query, &json!({ "max_bytes": LOW_MAX }));
    let ms = start.elapsed().as_millis();
    let after = vm.show();
    let reclaimed =
        wait_until("the end is an event", 20, || vm.events().into_iter().find(|event| event["event"] == "reclaimed"));
    let events = vm.events();
    let rungs = events.iter().filter(|event| event["event"] == "reclaim").filter_map(|event| event["rung"].as_str());
    // A host that is slow takes long over eviction, and says so again and again: that is not another way.
    let mut rungs: Vec<String> = rungs.filter(|rung| *rung != "stuck").map(str::to_owned).collect();
    rungs.dedup();
    // With room again it reads what is there at once: what was evicted is read from the store.
    let (raised, _) = vm.patch("", &json!({ "max_bytes": HIGH_MAX }));
    assert_eq!(raised, 200, "a limit can be raised");
    let answers = [("cache-verify", "CACHE"), ("verify", "VERIFY"), ("dmesg-check", "DMESG")].map(|(command, data)| {
        vm.send(command);
        // What went wrong stands in the place of the data.
        std::iter::repeat_with(|| vm.line(120)).find(|line| line.starts_with(data) || line.starts_with("ERR"))
    });
    let answers = answers.map(Option::unwrap_or_default);
    Story { status, ms, before, after, rungs, reclaimed, answers }
}

fn say(vm: &mut TestVm, command: &str) {
    let answer = vm.command(command, 120);
    assert!(answer.starts_with("OK"), "{command}: {answer}");
}

//! Random steps of one guest, and a model of what it must find in each of its pages.
//!
//! A step touches, reads, gives away or reports some pages, changes limits, stops the guest or lets it go on. The payload
//! writes every byte of a page, by the page's number and a seed, so that the model knows a page by its seed. Other vCPUs
//! may rewrite pages of their own meanwhile, and look at each before.
//!
//! A limit may be so low that the guest cannot go on. That is no failure: it is given room, and must then do what it was
//! told ([`Walk::relieved`] counts).
//!
//! A walk that fails prints its seed and its last steps.

use std::collections::VecDeque;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::random::Random;
use crate::{PAGE, TestVm, number, resident_pages, store_pages, wait_until};

const MIB: u64 = 1 << 20;

/// RAM, and what the payload is in.
const SIZE: u64 = 160 * MIB;
const PROGRAM: u64 = 2 * MIB;

/// What the steps use, of RAM.
const AREA: Range<u64> = 16 * MIB..112 * MIB;

/// What other vCPUs rewrite, beside it.
const REWRITTEN: Range<u64> = 120 * MIB..144 * MIB;

/// With a `max` of so much the guest can do all of it without giving up a page.
const ROOM: u64 = 180 * MIB;

/// Pages of a step, at most: more than a batch of a reclaim, and than a huge page.
const LONGEST: u64 = 700;

/// What a worker evicts at once.
const BATCH: u64 = MIB;

/// An answer that takes longer than this may need help.
const PATIENCE: Duration = Duration::from_millis(150);

/// Steps that are kept for the message of a failure.
const REMEMBERED: usize = 24;

/// What is in a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Zeroes,
    Pattern { seed: u64, fill: &'static str },
}

/// A guest that walks.
#[derive(Debug)]
pub struct Walk {
    /// It.
    pub vm: TestVm,
    /// Steps at which the guest had to be given room to go on.
    pub relieved: u64,
    random: Random,
    seed: u64,
    step: u64,
    last: VecDeque<String>,
    pages: Vec<Content>,
    swap: bool,
    paused: bool,
    /// Other vCPUs rewrite what is theirs; `None` where there are none.
    rewriting: Option<bool>,
    /// So much may be in swap although a limit is lower: it was there before that.
    swapped: u64,
}

/// Where a walk's evicted pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap<'a> {
    /// Nothing is evicted.
    None,
    /// To the store.
    Memory,
    /// What does not shrink, to a file in this directory.
    File(&'a Path),
}

/// The seed of `BALLAST_SEED`, or another.
pub fn seed_or(seed: u64) -> u64 {
    std::env::var("BALLAST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(seed)
}

impl Walk {
    /// A guest with `cpus` vCPUs at the beginning of its way.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(name: &str, seed: u64, cpus: u64, swap: &Swap<'_>) -> Self {
        let max = if *swap == Swap::None { "160M,swap=0" } else { "96M,swap=max,ageing=1s" };
        let mut vm = TestVm::builder(name).memory(&format!("size={SIZE},max={max}")).option("--cpus", cpus.to_string());
        if let Swap::File(directory) = swap {
            vm = vm.option("--swap-dir", directory.to_string_lossy());
        }
        let vm = vm.option("--balloon", "free_page_reporting=on").cmdline("shell").start();
        vm.expect("READY", 10);
        let mut walk = Self {
            vm,
            relieved: 0,
            random: Random::new(seed),
            seed,
            step: 0,
            last: VecDeque::new(),
            pages: vec![Content::Zeroes; pages(AREA) as usize],
            swap: *swap != Swap::None,
            paused: false,
            rewriting: (cpus > 1).then_some(false),
            swapped: 0,
        };
        walk.ok(&["balloon init features=0x31".to_owned()]);
        walk
    }

    /// Does one step.
    ///
    /// # Panics
    /// When the guest finds another content than the model, or an answer is not as it should be.
    pub fn step(&mut self) {
        self.step += 1;
        let draw = self.random.below(100);
        match (self.paused, draw) {
            (true, 0..50) => self.pause(false),
            (true, _) | (false, 0..8) => self.limits(),
            (false, 8..11) => self.pause(true),
            (false, 11..14) if self.rewriting.is_some() => self.rewrite(),
            (false, 11..42) => self.touch(),
            (false, 42..52) => drop(self.guest("touch", "mode=read")),
            (false, 52..68) => self.verify_some(),
            (false, 68..80) => self.give("balloon inflate"),
            (false, 80..88) => drop(self.guest("balloon deflate", "")),
            (false, _) => self.report(),
        }
    }

    /// Waits until nothing moves, and looks whether every charge is something that is there; returns the VM as it is then.
    ///
    /// # Panics
    /// When it is not so.
    pub fn rest(&mut self) -> Value {
        let moves = self.rewriting == Some(true) && !self.paused;
        if moves {
            self.post("pause");
        }
        let now = exact(&self.vm);
        let swapped = number(&now, "swap.current_bytes");
        let limit = now["swap"]["max_bytes"].as_u64().unwrap_or(u64::MAX);
        assert!(swapped <= limit.max(self.swapped), "more in swap than its limit, and {}: {now}", self.swapped);
        self.swapped = swapped;
        if moves {
            self.go_on();
        }
        now
    }

    /// Looks at all pages, and ends what other vCPUs do, which look at theirs.
    ///
    /// # Panics
    /// When one does not hold what was written last.
    pub fn verify_all(&mut self) {
        self.note("verify all".to_owned());
        if self.paused {
            self.pause(false);
        }
        if self.rewriting == Some(true) {
            self.rewrite();
        }
        self.verify(0..self.pages.len() as u64);
    }

    /// The guest gives away all but its program, so that no more may be charged, in swap, or stored.
    ///
    /// # Panics
    /// When it is.
    pub fn give_all(&mut self) -> Value {
        self.ok(&[format!("balloon inflate {PROGRAM} {}", SIZE - PROGRAM)]);
        self.pages.fill(Content::Zeroes);
        let now = self.rest();
        assert!(number(&now, "memory.stat.guest_bytes") <= PROGRAM, "{now}");
        assert!(number(&now, "swap.current_bytes") <= PROGRAM, "{now}");
        // The program's, and empty segments that are kept for the next pages.
        assert!(number(&now, "memory.stat.store_bytes") <= 2 * PROGRAM, "{now}");
        now
    }

    /// Gives the guest room: nothing has to be given up any more.
    ///
    /// # Panics
    /// When that is refused.
    pub fn relieve(&mut self) {
        let swap = if self.swap { Value::Null } else { json!(0) };
        let room = json!({ "max_bytes": ROOM, "high_bytes": null, "swap_max_bytes": swap });
        let (status, body) = self.vm.patch("?mode=force", &room);
        assert_eq!(status, 200, "{body}");
    }

    fn touch(&mut self) {
        let fill = *self.random.pick(&["mixed", "mixed", "mixed", "mixed", "same", "full"]);
        let seed = 1 + self.random.below(1 << 20);
        let cpus = if self.random.chance(50) { " cpus=all" } else { "" };
        let pages = self.guest("touch", &format!("seed={seed} fill={fill}{cpus}"));
        self.pages[pages].fill(Content::Pattern { seed, fill });
    }

    fn verify_some(&mut self) {
        let pages = self.draw();
        self.note(format!("verify {pages:?}"));
        self.verify(pages);
    }

    fn give(&mut self, command: &str) {
        let pages = self.guest(command, "");
        self.pages[pages].fill(Content::Zeroes);
    }

    /// Reports pages as free, which are lost unless the report was left alone.
    fn report(&mut self) {
        let left = |vm: &TestVm| number(&vm.show(), "faults.reported_left_pages");
        let before = left(&self.vm);
        let pages = self.guest("balloon report", "");
        if left(&self.vm) == before {
            self.pages[pages].fill(Content::Zeroes);
        }
    }

    /// Other vCPUs begin to rewrite what is theirs, or end.
    fn rewrite(&mut self) {
        let Range { start, end } = REWRITTEN;
        let rewriting = self.rewriting == Some(true);
        let seed = self.step;
        let begin = format!("rewrite {start} {} seed={seed} background=1", end - start);
        let command = if rewriting { "rewrite stop".to_owned() } else { begin };
        self.note(command.clone());
        self.ok(&[command]);
        self.rewriting = Some(!rewriting);
    }

    fn pause(&mut self, pause: bool) {
        self.note(format!("pause {pause}"));
        if pause {
            self.post("pause");
        } else {
            self.go_on();
        }
        self.paused = pause;
    }

    /// Resumes; a guest that needs more than its limit is given room.
    fn go_on(&mut self) {
        let (status, _) = self.vm.post("resume");
        if status == 409 {
            self.relieved += 1;
            self.relieve();
            self.post("resume");
        } else {
            assert_eq!(status, 200);
        }
    }

    fn post(&self, verb: &str) {
        let (status, body) = self.vm.post(verb);
        assert_eq!(status, 200, "{verb}: {body}");
    }

    /// Changes a limit: up or down, in any way, whatever is used.
    fn limits(&mut self) {
        let usage = number(&self.vm.show(), "memory.current_bytes");
        let mode = *self.random.pick(&["refuse", "reclaim&wait_ms=20", "reclaim&wait_ms=0", "force"]);
        let near = usage.saturating_sub(8 * MIB) / PAGE * PAGE + self.random.below(32) * MIB / 2;
        let low = (44 + self.random.below(48)) * MIB;
        let limits = match self.random.below(if self.swap { 8 } else { 2 }) {
            0 | 1 => json!({ "max_bytes": near }),
            2 | 3 => json!({ "max_bytes": low }),
            4 => json!({ "high_bytes": near.min(low) }),
            5 => json!({ "high_bytes": null, "max_bytes": low }),
            6 => json!({ "swap_max_bytes": self.random.below(80) * MIB }),
            _ => json!({ "swap_max_bytes": null }),
        };
        let (status, body) = self.vm.patch(&format!("?mode={mode}"), &limits);
        self.note(format!("{limits} {mode}: {status}"));
        // Not a `high` above `max`.
        assert!([200, 202, 409].contains(&status) || body["code"] == "invalid_limit", "{body}");
        if limits["swap_max_bytes"].is_u64() {
            // The worker has heard of it before it was asked this; it may be in the middle of a batch.
            self.swapped = number(&self.vm.show(), "swap.current_bytes") + BATCH;
        }
        if !self.swap {
            self.relieve();
        }
    }

    /// Lets the guest obey `verb` for some pages; says which.
    fn guest(&mut self, verb: &str, options: &str) -> Range<usize> {
        let pages = self.draw();
        let command = format!("{verb} {} {options}", words(&pages));
        self.note(command.clone());
        self.ok(&[command]);
        pages.start as usize..pages.end as usize
    }

    /// Some pages that lie in one piece: few mostly.
    fn draw(&mut self) -> Range<u64> {
        let most = if self.random.chance(30) { LONGEST } else { 60 };
        let first = self.random.below(self.pages.len() as u64);
        first..(first + 1 + self.random.below(most)).min(self.pages.len() as u64)
    }

    /// Lets the guest look at `pages`: each stretch with the same content is a command.
    fn verify(&mut self, pages: Range<u64>) {
        let mut commands = Vec::new();
        let mut at = pages.start;
        while at < pages.end {
            let content = self.pages[at as usize];
            let same = (at..pages.end).take_while(|page| self.pages[*page as usize] == content).count() as u64;
            let what = match content {
                Content::Zeroes => "fill=full zero=only".to_owned(),
                Content::Pattern { seed, fill } => format!("seed={seed} fill={fill}"),
            };
            commands.push(format!("verify {} {what}", words(&(at..at + same))));
            at += same;
        }
        self.ok(&commands);
    }

    /// Types commands, several a line, which must all succeed.
    fn ok(&mut self, commands: &[String]) {
        // A line has 512 bytes.
        for line in commands.chunks(8) {
            self.vm.send(&line.join(";"));
            for command in line {
                let answer = self.answer();
                assert!(answer.starts_with("OK"), "{command}: {answer}");
            }
        }
    }

    /// Waits for the guest's answer, and gives it room when it has none.
    fn answer(&mut self) -> String {
        let mut asked = Instant::now();
        let what = format!("step {}, seed {}: an answer", self.step, self.seed);
        let answer = |line: &String| line.starts_with("OK") || line.starts_with("ERR");
        wait_until(&what, 60, || {
            if let Some(line) = self.vm.try_line().filter(answer) {
                return Some(line);
            }
            if asked.elapsed() > PATIENCE {
                asked = Instant::now();
                let now = self.vm.show();
                if now["held"]["now"] == true || now["state"] == "paused" {
                    self.relieved += 1;
                    self.relieve();
                    self.vm.post("resume");
                }
            }
            None
        })
    }

    fn note(&mut self, what: String) {
        if self.last.len() == REMEMBERED {
            self.last.pop_front();
        }
        self.last.push_back(format!("{}: {what}", self.step));
    }
}

impl Drop for Walk {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let steps: Vec<_> = self.last.iter().map(String::as_str).collect();
            eprintln!("BALLAST_SEED={}, step {}; the last ones:\n{}", self.seed, self.step, steps.join("\n"));
        }
    }
}

/// Waits until all that is charged is there, by pagemap, and nothing else: guest pages in RAM and in the stage, the store,
/// and the rest by its parts, within the limit; returns the VM as it is then.
///
/// # Panics
/// When that is not so in time.
pub fn exact(vm: &TestVm) -> Value {
    let (end, mut seen) = (Instant::now() + crate::deadline(20), Value::Null);
    while Instant::now() < end {
        let now = vm.show();
        let has = |part: &str| number(&now, &format!("memory.stat.{part}_bytes"));
        let parts = ["guest", "store", "stock", "reserve", "vmm"];
        let sum: u64 = parts.iter().map(|part| has(part)).sum();
        let usage = number(&now, "memory.current_bytes");
        let limit = now["memory"]["max_bytes"].as_u64().unwrap_or(u64::MAX);
        assert!(usage <= limit.saturating_add(has("overcharge")), "above its limit: {now}");
        let resident = [resident_pages(&now), store_pages(&now)].map(|pages| pages * PAGE);
        if [has("guest"), has("store")] == resident && has("active") + has("idle") == resident[0] && sum == usage {
            return now;
        }
        seen = json!({ "resident": resident, "sum": sum, "shown": now });
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("charges are not what is resident (guest, store): {seen}");
}

fn pages(area: Range<u64>) -> u64 {
    (area.end - area.start) / PAGE
}

/// `START SIZE` of pages of [`AREA`].
fn words(pages: &Range<u64>) -> String {
    format!("{} {}", AREA.start + pages.start * PAGE, (pages.end - pages.start) * PAGE)
}

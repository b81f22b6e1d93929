//! A guest that uses a fifth of its memory, whose limit is lowered until little more than that fits: what is shown of cold
//! pages, and drawn.
//!
//! The guest does not help: it has no balloon driver. Its accesses go by Zipf's law over a hot set that it knows, and it
//! says in each period how long a thousand of them took.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{TestVm, deadline, http, number};

const MIB: u64 = 1 << 20;
/// What the guest uses all the time.
pub const HOT: u64 = 128 * MIB;
/// What it has touched once, beside that.
pub const COLD: u64 = 4 * HOT;
/// Its limit at first, with room for all, and the limit that it gets.
pub const HIGH_MAX: u64 = 768 * MIB;
/// See [`HIGH_MAX`].
pub const LOW_MAX: u64 = HOT / 4 * 5;
/// Time in which usage must follow.
pub const FOLLOWS: Duration = Duration::from_secs(10);
/// Where its memory begins, and the guest's RAM in all.
const START: u64 = 16 * MIB;
const SIZE: u64 = 1024 * MIB;
/// A period of the guest.
const PERIOD_MS: u64 = 250;
/// A guest is as fast as before when it does so much in the same time: a slow host is not what is looked for.
const AS_FAST: f64 = 0.8;

/// How long is looked at it, and how often at what the guest uses.
#[derive(Clone, Copy, Debug)]
pub struct Tempo {
    /// A generation of the VM's pages, as in `--memory ageing=`.
    pub ageing: &'static str,
    /// Periods of the guest (a quarter of a second) before the limit is lowered.
    pub before: usize,
    /// Periods after it is in force.
    pub after: usize,
    /// So many more are waited for until one is as fast as before: a busy host slows down some, and not all.
    pub patience: usize,
}

impl Tempo {
    /// To be shown: the generation is the default, so that there is no estimate of the working set yet.
    pub const SHOWN: Self = Self { ageing: "30s", before: 12, after: 24, patience: 96 };
    /// To be drawn: several generations before, during and after the change.
    pub const DRAWN: Self = Self { ageing: "2s", before: 60, after: 100, patience: 0 };
}

/// What is seen at one moment, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moment {
    /// Time since the first one, in milliseconds.
    pub ms: f64,
    /// What is charged, and the limit; while a lower one is asked for and not reached, that.
    pub usage: u64,
    /// See `usage`.
    pub limit: u64,
    /// The estimate of the working set, as far as there is one, and how far it may be off on either side.
    pub working_set: Option<(u64, u64)>,
    /// What the balloon holds.
    pub balloon: u64,
    /// What is evicted, at its full size, and what is kept of it in the store.
    pub swapped: u64,
    /// See `swapped`.
    pub store: u64,
}

/// One period of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Period {
    /// When it was over, as in [`Moment::ms`].
    pub ms: f64,
    /// Cycles that 1000 accesses took.
    pub cycles: f64,
}

/// What happened.
#[derive(Debug)]
pub struct Story {
    /// Moments in order, the first one before the guest touched anything.
    pub moments: Vec<Moment>,
    /// The guest's periods in order.
    pub periods: Vec<Period>,
    /// When the limit was lowered and when the request was answered, as in [`Moment::ms`].
    pub lowered: (f64, f64),
    /// The status of the answer.
    pub status: u16,
    /// The VM just before, and when it was answered.
    pub before: Value,
    /// See `before`.
    pub after: Value,
    /// The guest's last words about its accesses, and about all of its memory.
    pub accessed: String,
    /// See `accessed`.
    pub verified: String,
}

impl Story {
    /// Cycles of 1000 accesses before the limit was lowered, until it was in force, and after that: the median of the second
    /// half of the periods before, when what changed has settled; the median of those in the middle; the best after it.
    pub fn cycles(&self) -> [f64; 3] {
        cycles(&self.periods, self.lowered)
    }

    /// Whether the guest was as fast in the end as it was, but for what a shared machine does to both.
    pub fn is_fast_again(&self) -> bool {
        is_fast_again(&self.periods, self.lowered)
    }
}

/// See [`Story::cycles`].
fn cycles(periods: &[Period], (from, to): (f64, f64)) -> [f64; 3] {
    let of = |within: &dyn Fn(f64) -> bool| -> Vec<f64> {
        periods.iter().filter(|period| within(period.ms)).map(|period| period.cycles).collect()
    };
    // The first period that is over after the answer was at work before it.
    let during = to + PERIOD_MS as f64;
    let mut before = of(&|ms| ms < from);
    let settled = before.split_off(before.len() / 2);
    let best = of(&|ms| ms >= during).into_iter().fold(f64::NAN, f64::min);
    [median(settled), median(of(&|ms| (from..during).contains(&ms))), best]
}

/// See [`Story::is_fast_again`].
fn is_fast_again(periods: &[Period], lowered: (f64, f64)) -> bool {
    let [before, _, after] = cycles(periods, lowered);
    before / after >= AS_FAST
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of.get(of.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Plays it at a tempo; `look` sees the VM at every moment.
///
/// # Panics
/// When the guest does not do what it is told.
pub fn play(tempo: Tempo, mut look: impl FnMut(&Value)) -> Story {
    let mut vm = TestVm::builder("cold")
        .memory(&format!("size={}M,max={}M,swap=max,ageing={}", SIZE / MIB, HIGH_MAX / MIB, tempo.ageing))
        .option("--oom", "deadline=60s")
        .cmdline("shell")
        .start();
    vm.expect("READY", 20);
    let mut eyes = Eyes { start: Instant::now(), moments: Vec::new(), periods: Vec::new() };
    look(&eyes.look(&vm));
    let all = format!("{START} {}", HOT + COLD);
    vm.send(&format!("touch {all} seed=1"));
    eyes.until("the guest has touched its memory", &vm, &mut look, |_, lines| {
        lines.iter().any(|l| l.starts_with("OK touch"))
    });
    vm.send(&format!("access zipf {all} hot={HOT} period={PERIOD_MS} check=1 seed=1"));
    eyes.until("the guest has used its hot set for a time", &vm, &mut look, |eyes, _| {
        eyes.periods.len() >= tempo.before
    });
    let before = vm.show();
    let lowered = eyes.ms();
    let (status, after, answered) = std::thread::scope(|scope| {
        let socket = vm.socket().to_owned();
        let request = scope.spawn(move || {
            let query = format!("/vms/cold/memory?mode=reclaim&wait_ms={}", deadline(FOLLOWS.as_secs()).as_millis());
            http(&socket, "PATCH", &query, Some(&json!({ "max_bytes": LOW_MAX }).to_string()))
        });
        eyes.until("the request is answered", &vm, &mut look, |_, _| request.is_finished());
        let (status, body) = request.join().expect("it asks").expect("the socket answers");
        (status, serde_json::from_str(&body).unwrap_or(Value::Null), eyes.ms())
    });
    let least = eyes.periods.len() + tempo.after;
    eyes.until("the guest goes on", &vm, &mut look, |eyes, _| {
        let periods = eyes.periods.len();
        let enough = periods >= least + tempo.patience || is_fast_again(&eyes.periods, (lowered, answered));
        periods >= least && enough
    });
    vm.send("echo enough");
    let accessed = vm.expect("OK access", 60);
    let verified = vm.command(&format!("verify {all} seed=1"), 120);
    // The answer to `echo` may come first.
    let verified = if verified.starts_with("OK echo") { vm.expect("", 120) } else { verified };
    look(&eyes.look(&vm));
    let Eyes { moments, periods, .. } = eyes;
    Story { moments, periods, lowered: (lowered, answered), status, before, after, accessed, verified }
}

/// Who looks at the VM and hears the guest.
struct Eyes {
    start: Instant,
    moments: Vec<Moment>,
    periods: Vec<Period>,
}

impl Eyes {
    fn ms(&self) -> f64 {
        self.start.elapsed().as_secs_f64() * 1000.0
    }

    /// Looks until that is so, twenty times a second.
    fn until(
        &mut self,
        what: &str,
        vm: &TestVm,
        look: &mut impl FnMut(&Value),
        mut so: impl FnMut(&Self, &[String]) -> bool,
    ) {
        let end = Instant::now() + deadline(120);
        loop {
            look(&self.look(vm));
            let lines: Vec<String> = std::iter::from_fn(|| vm.try_line()).collect();
            let cycles = |line: &String| {
                let words = line.strip_prefix("ACCESS ")?.split_whitespace();
                words.filter_map(|word| word.strip_prefix("cycles_per_1000=")).next()?.parse().ok()
            };
            let ms = self.ms();
            self.periods.extend(lines.iter().filter_map(cycles).map(|cycles| Period { ms, cycles }));
            if so(self, &lines) {
                return;
            }
            assert!(!lines.iter().any(|line| line.starts_with("ERR")), "{what}: {lines:?}");
            assert!(Instant::now() < end, "not within {:?}: {what}", deadline(120));
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn look(&mut self, vm: &TestVm) -> Value {
        let vm = vm.show();
        let bytes = |path: &str| vm.pointer(path).and_then(Value::as_u64);
        self.moments.push(Moment {
            ms: self.ms(),
            usage: number(&vm, "memory.current_bytes"),
            limit: bytes("/memory/max_pending_bytes").or(bytes("/memory/max_bytes")).unwrap_or(0),
            working_set: bytes("/cold/working_set_bytes").zip(bytes("/cold/working_set_error_bytes")),
            balloon: number(&vm, "balloon.actual_bytes"),
            swapped: number(&vm, "memory.stat.swapped_bytes"),
            store: number(&vm, "memory.stat.store_bytes"),
        });
        vm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One period of three, or of all, is slow because others use the machine.
    #[test]
    fn a_guest_is_as_fast_as_before_when_one_period_says_so() {
        let of = |cycles: &[f64]| -> Vec<Period> {
            cycles.iter().enumerate().map(|(at, &cycles)| Period { ms: 1000.0 * at as f64, cycles }).collect()
        };
        let lowered = (3500.0, 4100.0);
        let busy = of(&[90.0, 90.0, 37.0, 150.0, 400.0, 52.0, 180.0, 40.0, 60.0]);
        assert_eq!(cycles(&busy, lowered), [150.0, 400.0, 40.0]);
        let slow = of(&[90.0, 30.0, 36.0, 35.0, 400.0, 52.0, 180.0, 48.0, 60.0]);
        assert_eq!(cycles(&slow, lowered), [36.0, 400.0, 48.0]);
        assert_eq!([&busy, &slow].map(|periods| is_fast_again(periods, lowered)), [true, false]);
        assert!(!is_fast_again(&[], lowered), "one that says nothing is not fast");
    }
}

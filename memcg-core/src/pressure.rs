//! How much time goes to waiting for memory: `memory.pressure`, as the kernel's PSI has it.
//!
//! A VM is *stalled* while a vCPU of it is held for want of memory or waits for a page to come back. Of a VM, and of a
//! group of VMs, two lines are kept:
//!
//! | line | stalled time is when |
//! | --- | --- |
//! | `some` | at least one vCPU waits |
//! | `full` | every vCPU of those VMs that would run waits: nothing gets on at all |
//!
//! A VM that somebody has paused, or that has not started, would not run: it is [`Member::Idle`] and in neither line, as a
//! sleeping task is not in the kernel's. A group in which nobody would run is not stalled.
//!
//! # What is computed
//!
//! Time is integrated over states, as the kernel's `psi_group_change` does. Each member is in one state at a time; when one
//! changes, the time since the last change is booked under the state that all were in together. So the times of several
//! members are a union in `some` and an intersection in `full`, not a sum.
//!
//! ```text
//!  a   ────────██████████────────────        █ every vCPU waits
//!  b   ──────────────██████──────────        ─ runs
//!  some        ████████████                  one of them or both
//!  full              ████                    both
//! ```
//!
//! `total` is that time. The averages are the kernel's: every 2 s the stalled share of that time goes into three
//! exponential averages with the decay of 10, 60 and 300 s, in its fixed point with 11 bits ([`DECAY`]), so equal
//! histories have equal numbers. Whoever asks sees whole periods only, as in the kernel's file.
//!
//! Nothing has to happen for time to pass: a period in which nothing changed is worked out when somebody asks or when
//! the next change comes, however many there were, and no VM is woken for it.

use std::time::Duration;

/// Bits after the point in the averages.
const FIXED_BITS: u32 = 11;

/// 1 in fixed point.
const FIXED_1: u64 = 1 << FIXED_BITS;

/// Time between two updates of the averages.
pub const PERIOD: Duration = Duration::from_secs(2);

const PERIOD_NS: u128 = PERIOD.as_nanos();

/// What is left of an average over 10, 60 and 300 s after one [`PERIOD`]: the kernel's `EXP_10s`, `EXP_60s` and
/// `EXP_300s`, that is `exp(-2/10)`, `exp(-2/60)` and `exp(-2/300)` in 1/2048.
pub const DECAY: [u64; 3] = [1677, 1981, 2034];

/// Shares of time in the last 10, 60 and 300 s, and the time in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Averages {
    /// Hundredths of a per cent of the last 10, 60 and 300 s: what the kernel prints as `avg10`, `avg60` and `avg300`, with
    /// its decimal point taken out; 0 to 10 000.
    pub hundredths: [u32; 3],
    /// Stalled time since the beginning.
    pub total: Duration,
}

/// One of the two lines.
#[derive(Clone, Copy, Debug, Default)]
struct Line {
    /// Per cent in fixed point.
    averages: [u64; 3],
    /// Stalled time of the period that is not over.
    period: Duration,
    total: Duration,
}

impl Line {
    /// Ends `periods` periods, of which the first was stalled for what has been booked and the others wholly or not at
    /// all.
    fn end_periods(&mut self, periods: u64, stalled: bool) {
        let share = self.period.as_nanos() * 100 / PERIOD_NS;
        self.period = Duration::ZERO;
        for (average, decay) in self.averages.iter_mut().zip(DECAY) {
            *average = approach(*average, decay, share as u64 * FIXED_1);
            if periods > 1 {
                let target = if stalled { 100 * FIXED_1 } else { 0 };
                *average = approach(*average, power(decay, periods - 1), target);
            }
        }
    }

    fn read(&self) -> Averages {
        // As LOAD_INT and LOAD_FRAC print it: cut off, not rounded.
        let hundredths = self.averages.map(|average| (average * 100 / FIXED_1) as u32);
        Averages { hundredths, total: self.total }
    }
}

/// The kernel's `calc_load`: `load` decays towards `active`, and reaches it.
fn approach(load: u64, decay: u64, active: u64) -> u64 {
    let rising = if active >= load { FIXED_1 - 1 } else { 0 };
    (load * decay + active * (FIXED_1 - decay) + rising) / FIXED_1
}

/// The kernel's `fixed_power_int`: `x` to the power of `n`.
fn power(mut x: u64, mut n: u64) -> u64 {
    let half = FIXED_1 / 2;
    let mut result = FIXED_1;
    while n > 0 {
        if n & 1 == 1 {
            result = (result * x + half) >> FIXED_BITS;
        }
        x = (x * x + half) >> FIXED_BITS;
        n >>= 1;
    }
    result
}

/// What one VM is doing, as far as its vCPUs wait for memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Member {
    /// It would not run anyhow, or is not there.
    #[default]
    Idle,
    /// No vCPU waits.
    Running,
    /// Some vCPUs wait, and at least one does not.
    Partly,
    /// Every vCPU waits.
    Fully,
}

/// The pressure of one VM, or of a group: of all VMs in it.
#[derive(Clone, Copy, Debug)]
pub struct Pressure {
    /// VMs that run or would.
    members: u32,
    /// Of these, with a vCPU that waits.
    partly: u32,
    /// Of these, with none that does not.
    fully: u32,
    some: Line,
    full: Line,
    /// Up to when time has been booked.
    booked: Duration,
    /// When the period ends that is not over.
    period_end: Duration,
}

impl Pressure {
    /// Without a member, from `now` on. Times are measured from any fixed moment.
    pub fn new(now: Duration) -> Pressure {
        let (some, full) = (Line::default(), Line::default());
        Pressure { members: 0, partly: 0, fully: 0, some, full, booked: now, period_end: now + PERIOD }
    }

    /// A member goes from one state to another at `at`. A time before that of another change counts as that one: what has
    /// been booked stays.
    pub fn change(&mut self, at: Duration, from: Member, to: Member) {
        self.book(at);
        let counts = |member| match member {
            Member::Idle => [0, 0, 0],
            Member::Running => [1, 0, 0],
            Member::Partly => [1, 1, 0],
            Member::Fully => [1, 1, 1],
        };
        let places = [&mut self.members, &mut self.partly, &mut self.fully];
        for ((place, before), after) in places.into_iter().zip(counts(from)).zip(counts(to)) {
            // A member that was not there cannot be less than there.
            *place = (*place + after).saturating_sub(before);
        }
    }

    /// Time that at least one vCPU waited, as of `now`.
    pub fn some(&self, now: Duration) -> Averages {
        self.at(now).some.read()
    }

    /// Time that every vCPU waited, as of `now`.
    pub fn full(&self, now: Duration) -> Averages {
        self.at(now).full.read()
    }

    /// The same later, when nothing has changed until then.
    fn at(mut self, now: Duration) -> Pressure {
        self.book(now);
        self
    }

    /// Books the time up to `to` under the present state.
    fn book(&mut self, to: Duration) {
        let to = to.max(self.booked);
        let beyond = to.checked_sub(self.period_end).map(|beyond| beyond.as_nanos());
        let (periods, rest) = beyond.map_or((0, 0), |beyond| (beyond / PERIOD_NS + 1, beyond % PERIOD_NS));
        // Of seconds in 64 bits there are not so many periods, and the rest is less than one.
        let (periods, rest) = (periods as u64, Duration::from_nanos(rest as u64));
        let states = [self.partly > 0, self.members > 0 && self.fully == self.members];
        for (line, stalled) in [&mut self.some, &mut self.full].into_iter().zip(states) {
            let passed = |from: Duration, to: Duration| if stalled { to - from } else { Duration::ZERO };
            line.total += passed(self.booked, to);
            line.period += passed(self.booked, to.min(self.period_end));
            if periods > 0 {
                line.end_periods(periods, stalled);
                line.period = passed(to - rest, to);
            }
        }
        if periods > 0 {
            self.period_end = to - rest + PERIOD;
        }
        self.booked = to;
    }
}

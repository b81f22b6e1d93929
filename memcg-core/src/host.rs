//! Whether the host runs short of memory, and what is to be done about it.
//!
//! Two signs are looked at together. *Available* memory says how much is left: the least of what the host has
//! (`MemAvailable`) and what the controller's own cgroup leaves it. *Stalled* time says whether anybody suffers: the part of
//! the time in which every task that would run waits for memory (the `full` line of the kernel's PSI). Stalls alone are no
//! reason: a container that thrashes within its own limit stalls, too, and nothing of ours would help it. So they count only
//! where memory is not plentiful either.
//!
//! ```text
//!  available
//!   ───────────────────────────────────────────────────────────
//!                                 above `leave` for `rest` ──► CALM
//!   leave ─────────────────────────────────────────────────────
//!            dead band: whoever is short stays so, and who is calm, too
//!   enter ─────────────────────────────────────────────────────
//!            below it for `hold` ──► SHORT: reclaim up to `leave`, at most `step` at a time
//!   critical ──────────────────────────────────────────────────
//!            SHORT at once; and when reclaim has had `patience`, a victim: one in each `cool_down`
//! ```
//!
//! A host on which half of all time is stalled is critical, too, as long as memory is not plentiful.
//!
//! Time and readings are parameters, so a recorded host can be played again: `memcg-core/tests/core/traces`.

use std::time::Duration;

use crate::units::Pages;

/// When the host is short, and how long that must last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Below this much available memory the host is short, if that lasts for [`Terms::hold`].
    pub enter: Pages,
    /// Above this much it is not any more, if that lasts for [`Terms::rest`]. What is reclaimed is meant to get here.
    pub leave: Pages,
    /// Below this much nobody waits, and reclaim alone is not trusted for longer than [`Terms::patience`].
    pub critical: Pages,
    /// Most that is reclaimed at a time.
    pub step: Pages,
    /// Less than this is not reclaimed: it would cost more than it is worth.
    pub least: Pages,
    /// Stalled time that makes a host short which has less than twice [`Terms::leave`], in thousandths.
    pub stalled: u32,
    /// How long a sign must last before the host counts as short.
    pub hold: Duration,
    /// How long all signs must be gone before it does not.
    pub rest: Duration,
    /// How long reclaim may take before somebody is chosen.
    pub patience: Duration,
    /// Least time between two victims.
    pub cool_down: Duration,
}

/// Stalled time that is critical, in thousandths.
const THRASHES: u32 = 500;

/// Bounds of [`Terms::enter`]: below 64 MiB the kernel itself is in trouble, and 2 GiB are enough for any host to act in.
const ENTER: [Pages; 2] = [Pages::from_mib(64), Pages::from_mib(2048)];

impl Terms {
    /// The terms of a host with so much memory: it is short below 5 % (64 MiB to 2 GiB), not above 1.5 times as much, and
    /// critical below half of it.
    pub fn new(total: Pages) -> Terms {
        let enter = Pages(total.0 / 20).clamp(ENTER[0], ENTER[1]);
        Terms {
            enter,
            leave: Pages(enter.0 / 2 * 3),
            critical: Pages(enter.0 / 2),
            step: enter,
            least: Pages(enter.0 / 16),
            stalled: 100,
            hold: Duration::from_secs(1),
            rest: Duration::from_secs(10),
            patience: Duration::from_secs(5),
            cool_down: Duration::from_secs(10),
        }
    }
}

/// Memory that a host can lose in a second, for all that is known: whoever is calm looks again before it could be short.
const RATE: Pages = Pages::from_mib(4096);

/// Shortest and longest time between two looks at a host that is calm. One that is short is looked at as often as the first says.
const LOOKS: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(10)];

/// What the host says at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// Memory that could be had without swapping: the least that any level above the controller leaves.
    pub available: Pages,
    /// Time since boot in which every task that would run has waited for memory; `None` where the kernel does not say.
    pub stalled: Option<Duration>,
}

/// Why the host is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sign {
    /// There is little memory left.
    Available,
    /// There is some left, and everybody waits for memory.
    Stalled,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Why the host is short, if it is.
    pub short: Option<Sign>,
    /// Since when.
    pub since: Duration,
    /// So much should be reclaimed, beside what has been asked for and is not back yet.
    pub reclaim: Pages,
    /// Somebody is to be chosen: [`Watch::chosen`] says that it was done.
    pub victim: bool,
}

/// The host's state over time.
#[derive(Clone, Copy, Debug)]
pub struct Watch {
    terms: Terms,
    before: Option<(Duration, Reading)>,
    /// Since when a sign has been there without a break, while calm; or been gone, while short.
    turning: Option<Duration>,
    short: Option<(Sign, Duration)>,
    /// Since when it has been critical without a break.
    critical: Option<Duration>,
    chosen: Option<Duration>,
    /// When a VM that had been paused for the host went on last.
    resumed: Option<Duration>,
}

impl Watch {
    /// A host that nothing is known of: calm.
    pub fn new(terms: Terms) -> Watch {
        Watch { terms, before: None, turning: None, short: None, critical: None, chosen: None, resumed: None }
    }

    /// How long after this reading the next one is due.
    pub fn next_look(&self, reading: Reading) -> Duration {
        let above = reading.available.saturating_sub(self.terms.enter);
        let is_turning = self.short.is_some() || self.turning.is_some() || above.is_zero();
        let reachable = Duration::from_millis(above.0.saturating_mul(1000) / RATE.0);
        if is_turning { LOOKS[0] } else { reachable.clamp(LOOKS[0], LOOKS[1]) }
    }

    /// Its terms.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// The host says `reading` at `now`; `asked` is what has been asked for before and is not back yet.
    ///
    /// A reading that is older than the last one is a clock that was set back: everything that must last begins anew.
    pub fn step(&mut self, now: Duration, reading: Reading, asked: Pages) -> Verdict {
        if self.before.is_some_and(|(at, _)| now < at) {
            (self.turning, self.critical) = (None, None);
            (self.chosen, self.resumed) = (self.chosen.map(|_| now), self.resumed.map(|_| now));
            self.short = self.short.map(|(sign, _)| (sign, now));
        }
        let share = self.share(now, reading);
        self.before = Some((now, reading));
        let terms = self.terms;
        let little = reading.available < terms.enter;
        let stalls = share >= terms.stalled && reading.available < Pages(terms.leave.0 * 2);
        let critical = reading.available < terms.critical || stalls && share >= THRASHES;
        self.critical = critical.then(|| self.critical.unwrap_or(now));
        match self.short {
            None => {
                self.turning = (little || stalls).then(|| self.turning.unwrap_or(now));
                let lasts = self.turning.is_some_and(|since| now - since >= terms.hold);
                if critical || lasts {
                    let sign = if little { Sign::Available } else { Sign::Stalled };
                    (self.short, self.turning) = (Some((sign, now)), None);
                }
            }
            Some(_) => {
                let gone = reading.available >= terms.leave && share < terms.stalled / 2;
                self.turning = gone.then(|| self.turning.unwrap_or(now));
                if self.turning.is_some_and(|since| now - since >= terms.rest) {
                    (self.short, self.turning) = (None, None);
                }
            }
        }
        let Some((sign, since)) = self.short else { return Verdict::default() };
        Verdict { short: Some(sign), since, reclaim: self.missing(reading, stalls, asked), victim: self.is_late(now) }
    }

    /// A victim was chosen: there is none before the time to cool down is over.
    pub fn chosen(&mut self, now: Duration) {
        self.chosen = Some(now);
    }

    /// Whether somebody who was paused for the host may go on: one after the other, as fast as victims are chosen.
    pub fn may_resume(&self, now: Duration) -> bool {
        let over = |at| now.saturating_sub(at) >= self.terms.cool_down;
        self.short.is_none() && self.resumed.is_none_or(over)
    }

    /// Somebody who was paused for the host goes on.
    pub fn resumed(&mut self, now: Duration) {
        self.resumed = Some(now);
    }

    /// What is missing until `back` could come back without making the host short again, by the last reading.
    pub fn missing_for(&self, back: Pages) -> Pages {
        let available = self.before.map_or(Pages::ZERO, |(_, reading)| reading.available);
        let missing = (self.terms.leave + back).saturating_sub(available);
        if self.short.is_some() { missing.max(Pages::ONE) } else { missing }
    }

    /// Part of the time since the last reading that was stalled, in thousandths; 0 where that is not known.
    fn share(&self, now: Duration, reading: Reading) -> u32 {
        let Some((at, before)) = self.before else { return 0 };
        let (Some(stalled), Some(until)) = (reading.stalled, before.stalled) else { return 0 };
        let waited = stalled.saturating_sub(until).as_micros() * 1000;
        let share = waited.checked_div(now.saturating_sub(at).as_micros()).unwrap_or(0);
        u32::try_from(share).unwrap_or(u32::MAX).min(1000)
    }

    /// What should be reclaimed. A host that stalls with memory left gets a quarter of a step: it is the wrong memory.
    fn missing(&self, reading: Reading, stalls: bool, asked: Pages) -> Pages {
        let least = if stalls { Pages(self.terms.step.0 / 4) } else { Pages::ZERO };
        // A little more, or what comes and goes would keep it below the mark.
        let wanted = self.terms.leave + self.terms.least;
        let missing = wanted.saturating_sub(reading.available).max(least).saturating_sub(asked);
        if missing < self.terms.least { Pages::ZERO } else { missing.min(self.terms.step) }
    }

    /// Whether reclaim has had its time, and whoever was chosen last, too.
    fn is_late(&self, now: Duration) -> bool {
        let over = |since: Option<Duration>, time| since.is_some_and(|since| now.saturating_sub(since) >= time);
        over(self.critical, self.terms.patience) && (self.chosen.is_none() || over(self.chosen, self.terms.cool_down))
    }
}

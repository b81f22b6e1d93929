//! Whether a guest gives what its balloon asks for: a rate, not a word.
//!
//! A guest may give nothing, or a page every five seconds, or say that it has given. What counts is how fast pages come,
//! measured over [`WINDOW`], against how many are missing:
//!
//! | state | at this rate |
//! | --- | --- |
//! | cooperating | what is missing is there in [`SOON`], or [`FAST`] pages come a second |
//! | slow | it is there in [`LATE`], or [`BRISK`] pages come a second |
//! | stalled | neither |
//!
//! The first window of a need is the grace that it takes a guest to begin.
//!
//! Linux tries for ever to reach a target ("Out of puff!", five times a second). So whoever has stalled is told that
//! what it has given is enough, and asked again later ([`Asking`]):
//!
//! ```text
//!  asks ── stalled ─► rests: the target is what the guest has ── 2 s, 4 s … 64 s ─► asks
//!   ▲ └── cooperating: the next rest is short again                                  │
//!   └────────────────────────────────────────────────────────────────────────────────┘
//! ```
//! A guest that takes pages back because it is out of memory ([`Asking::taken_back`]) is left alone for the longest time:
//! it would be out of memory again.
//!
//! Time is a parameter: the time in which the guest could run, since any moment. A guest that is held or paused cannot
//! give anything, and that is not its fault.

use std::time::Duration;

use crate::units::Pages;

/// Time over which a rate is measured.
pub const WINDOW: Duration = Duration::from_secs(2);

/// A guest that will be done in this time cooperates.
pub const SOON: Duration = Duration::from_secs(10);

/// A guest that will not be done in this time has stalled.
pub const LATE: Duration = Duration::from_secs(100);

/// Pages a second that are cooperation however many are missing: 16 MiB.
pub const FAST: u64 = 4096;

/// Pages a second that are no stall however many are missing: 1 MiB.
pub const BRISK: u64 = 256;

/// How long a guest that has stalled is left alone the first time, and at most.
pub const REST: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(64)];

/// How a guest answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum State {
    /// It gives what is missing in reasonable time, or nothing is missing, or it has just been asked.
    #[default]
    Cooperating,
    /// It gives, and nobody can wait for it.
    Slow,
    /// It gives nothing that would help.
    Stalled,
}

/// The rate at which one guest gives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    window: Option<Window>,
    verdict: Option<State>,
}

/// How things were when a window began.
#[derive(Clone, Copy, Debug)]
struct Window {
    since: Duration,
    released: u64,
    missing: u64,
}

impl Progress {
    /// A guest that nothing is known of.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a look at `now`: `released` pages have been given, as the host knows it, and `missing` pages have not. May be
    /// called as often as anybody likes; the state changes at the end of a window, and when nothing is missing.
    pub fn sample(&mut self, now: Duration, released: Pages, missing: Pages) -> State {
        if missing.is_zero() {
            *self = Self::new();
            return self.state();
        }
        let (released, missing) = (released.0, missing.0);
        let window = *self.window.get_or_insert(Window { since: now, released, missing });
        let passed = now.saturating_sub(window.since);
        if passed >= WINDOW {
            let given = released.saturating_sub(window.released);
            // What was asked for only lately could not be given before.
            let asked = window.missing.min(given.saturating_add(missing));
            self.verdict = Some(judge(given, asked, passed));
            self.window = Some(Window { since: now, released, missing });
        }
        self.state()
    }

    /// How it answers.
    pub fn state(&self) -> State {
        self.verdict.unwrap_or_default()
    }

    /// The same, once a whole window has been seen.
    pub fn verdict(&self) -> Option<State> {
        self.verdict
    }

    /// When the window ends.
    pub fn next(&self) -> Option<Duration> {
        self.window.map(|window| window.since + WINDOW)
    }
}

/// What it means that of `asked` pages `given` came in the time that has passed.
pub fn judge(given: u64, asked: u64, passed: Duration) -> State {
    let passed = passed.as_millis();
    // given / passed >= asked / within
    let done_within = |within: Duration| u128::from(given) * within.as_millis() >= u128::from(asked) * passed;
    let at_rate = |rate: u64| u128::from(given) * 1000 >= u128::from(rate) * passed;
    if given == 0 {
        State::Stalled
    } else if done_within(SOON) || at_rate(FAST) {
        State::Cooperating
    } else if done_within(LATE) || at_rate(BRISK) {
        State::Slow
    } else {
        State::Stalled
    }
}

/// What there is to tell about a guest that was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// It has stalled, and is left alone for a while.
    Stalled,
    /// It has stalled a second time, without having cooperated in between. Said once.
    Uncooperative,
}

/// Asks a guest for pages, leaves it alone when none come, and asks again.
#[derive(Clone, Copy, Debug)]
pub struct Asking {
    progress: Progress,
    rest: Option<Rest>,
    /// How long the next rest takes.
    pause: Duration,
    /// Stalls since it last cooperated.
    stalls: u32,
}

/// A time in which nothing more is asked for.
#[derive(Clone, Copy, Debug)]
struct Rest {
    told: Pages,
    until: Duration,
}

impl Default for Asking {
    fn default() -> Self {
        Self::new()
    }
}

impl Asking {
    /// A guest that has not been asked yet.
    pub fn new() -> Self {
        Self { progress: Progress::new(), rest: None, pause: REST[0], stalls: 0 }
    }

    /// Takes a look at `now`: the balloon should hold `wanted` pages, and the host knows of `released`; the guest says that
    /// it holds `actual`.
    pub fn look(&mut self, now: Duration, wanted: Pages, released: Pages, actual: Pages) -> Option<News> {
        let missing = wanted.saturating_sub(released);
        if missing.is_zero() {
            *self = Self::new();
            return None;
        }
        if self.rest.is_some_and(|rest| now < rest.until) {
            return None;
        }
        if self.rest.take().is_some() {
            self.progress = Progress::new();
        }
        self.progress.sample(now, released, missing);
        match self.progress.verdict()? {
            State::Slow => None,
            State::Cooperating => {
                (self.stalls, self.pause) = (0, REST[0]);
                None
            }
            State::Stalled => {
                // What it says comes a moment after what it does.
                self.rest = Some(Rest { told: actual.max(released).min(wanted), until: now + self.pause });
                self.pause = (2 * self.pause).min(REST[1]);
                self.stalls = self.stalls.saturating_add(1);
                match self.stalls {
                    1 => Some(News::Stalled),
                    2 => Some(News::Uncooperative),
                    _ => None,
                }
            }
        }
    }

    /// The guest has taken pages back because it is out of memory, and says that it holds `actual`.
    pub fn taken_back(&mut self, now: Duration, actual: Pages) {
        self.rest = Some(Rest { told: actual, until: now + REST[1] });
    }

    /// What the guest is told when `wanted` pages are wanted of it.
    pub fn told(&self, wanted: Pages) -> Pages {
        self.rest.map_or(wanted, |rest| rest.told.min(wanted))
    }

    /// How it answers. Who is not asked gives nothing, and who is asked again after a stall has still to show that it does.
    pub fn state(&self) -> State {
        match self.progress.verdict() {
            _ if self.rest.is_some() => State::Stalled,
            None if self.stalls > 0 => State::Stalled,
            _ => self.progress.state(),
        }
    }

    /// When the next look is due.
    pub fn next(&self) -> Option<Duration> {
        self.rest.map(|rest| rest.until).or_else(|| self.progress.next())
    }
}

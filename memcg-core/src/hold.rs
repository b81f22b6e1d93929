//! How long a guest may be held before the policy acts, and what puts that off.
//!
//! A held guest waits for memory that others give, or that is evicted. What comes meanwhile may be worth waiting for; or it
//! is a page now and then, with which the guest runs for a moment, touches the next page, and is held again: for as long as
//! whoever gives likes. So it is neither the last hold that counts, nor that something came:
//!
//! * *Time held* goes on from one hold to the next. Time in which the guest runs pays for as much.
//! * *Progress* is a rate, as everywhere ([`crate::progress`]): what came over the last one or two windows, against what
//!   faults wait for and [`STEP`] more, because whoever goes on with the one page that it owes is held at the next. When
//!   nothing has come for a window, or for the deadline where that is shorter, it is past: the neighbours' stock comes at
//!   the begin of a hold, and once.
//!
//! ```text
//!  held  ├─────────────── deadline ───────────────┼────────────── LATE ──────────────┤
//!         the policy waits                          only while pages come at a rate    only while BRISK pages
//!                                                   that is no stall, or are evicted   come a second
//! ```
//!
//! So what is less than [`BRISK`] puts the policy off by [`LATE`] at most, in all.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 42, B34, T11 | a refused charge waits until a deadline, whatever trickles in meanwhile |
//!
//! [`BRISK`]: crate::progress::BRISK

use std::time::Duration;

use crate::ladder::STEP;
use crate::progress::{LATE, State, WINDOW, judge};
use crate::units::Pages;

/// When somebody who is given more time is looked at again.
const AGAIN: Duration = Duration::from_secs(1);

/// What the policy is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing for so long; then another look.
    Wait(Duration),
    /// To act.
    Act,
}

/// The account of one guest. Time is since any fixed start.
#[derive(Clone, Copy, Debug, Default)]
pub struct Account {
    /// Time held, less time run since, when it was last looked at.
    held: Duration,
    looked: Duration,
    is_held: bool,
    now: Given,
    /// When pages were last seen to come.
    came: Duration,
    /// The last two windows' begins.
    windows: [Given; 2],
}

/// Pages that had come at a moment.
#[derive(Clone, Copy, Debug, Default)]
struct Given {
    at: Duration,
    pages: Pages,
}

impl Account {
    /// Takes a look at `now`: whether the guest is held from now on, and how many pages it was granted in all. To be called
    /// whenever a hold begins or ends, and as often as anybody likes.
    pub fn look(&mut self, now: Duration, is_held: bool, granted: Pages) {
        self.held = self.held(now);
        (self.looked, self.is_held) = (now, is_held);
        if granted > self.now.pages {
            self.came = now;
        }
        self.now = Given { at: now, pages: granted };
        if self.held.is_zero() {
            (self.windows, self.came) = ([self.now; 2], now);
        } else if now.saturating_sub(self.windows[1].at) >= WINDOW {
            self.windows = [self.windows[1], self.now];
        }
    }

    /// Time held by `now`, less time run since.
    pub fn held(&self, now: Duration) -> Duration {
        let passed = now.saturating_sub(self.looked);
        if self.is_held { self.held.saturating_add(passed) } else { self.held.saturating_sub(passed) }
    }

    /// What the policy is to do at the time of the last look, with so long a `deadline`, when faults wait for `missing` pages.
    /// `evicts`: at the limit that is in the way pages are being evicted.
    pub fn verdict(&self, missing: Pages, deadline: Duration, evicts: bool) -> Verdict {
        let Some(over) = self.held.checked_sub(deadline) else {
            return Verdict::Wait(deadline.saturating_sub(self.held));
        };
        let passed = self.now.at.saturating_sub(self.windows[0].at);
        let came = self.now.pages.saturating_sub(self.windows[0].pages);
        // For how long it counts yet.
        let counts = WINDOW.min(deadline).saturating_sub(self.now.at.saturating_sub(self.came));
        let at_rate = |missing| !counts.is_zero() && judge(came.0, missing, passed) != State::Stalled;
        if at_rate(u64::MAX) {
            // However many are missing.
            Verdict::Wait(AGAIN.min(counts))
        } else if evicts && over < LATE {
            Verdict::Wait(AGAIN.min(LATE - over))
        } else if at_rate((missing + STEP).0) && over < LATE {
            Verdict::Wait(AGAIN.min(counts).min(LATE - over))
        } else {
            Verdict::Act
        }
    }
}

//! Free page reporting: when it is worth what it costs.
//!
//! A guest reports blocks that have been free for a moment, and its memory comes back to the host by itself. When it
//! allocates the same blocks again at once, everybody has worked for nothing: a discard here, 512 faults there. So it is
//! counted how many of the pages reported of late have *come back*, and when most of them do, reports are answered and
//! nothing is discarded, for a while:
//!
//! ```text
//!                 half of what was reported in about 20 s has come back
//!  discards ──────────────────────────────────────────────────────────► leaves alone, 10 s, 20 s … 320 s
//!     ▲ └─ less than a quarter: the next time is short again                  │
//!     └───────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A guest that is short of room is not left alone: there, what it has freed keeps it from being held.
//!
//! What came back is known by the block of 2 MiB: a page filled in a block of which pages were reported less than
//! [`RECENT`] ago counts. That is exact for whole blocks, which is what Linux reports, and never more than all.

use std::ops::Range;

use crate::frame::BLOCK;
use crate::units::Pages;

/// Seconds in which a page that is filled again has come back.
pub const RECENT: u32 = 10;

/// Seconds over which reports and what came back are compared; what is older counts half, a quarter, and so on.
pub const PERIOD: u32 = 2 * RECENT;

/// Nothing is said about a guest that has reported less than this: 16 MiB.
pub const LEAST: Pages = Pages::from_mib(16);

/// Seconds for which reports are left alone the first time, and at most.
pub const QUIET: [u32; 2] = [RECENT, 320];

/// The reports of one guest, and what has become of the pages. Times are seconds since any moment.
#[derive(Clone, Debug)]
pub struct Reports {
    /// By block: when pages of it were last reported, and 1; 0 for never.
    at: Vec<u32>,
    /// When the last page of all was.
    last: Option<u32>,
    /// Pages reported and discarded in this period and, counting less and less, before.
    reported: u64,
    /// Of these, pages that were filled again.
    back: u64,
    began: u32,
    quiet_until: u32,
    /// How long the next quiet time is.
    quiet: u32,
}

impl Reports {
    /// A guest of `pages` pages that has reported nothing yet.
    pub fn new(pages: usize) -> Self {
        let at = vec![0; pages.div_ceil(BLOCK)];
        Self { at, last: None, reported: 0, back: 0, began: 0, quiet_until: 0, quiet: QUIET[0] }
    }

    /// Whether pages that the guest reports at `now` are to be discarded. `short` when it has hardly any room.
    pub fn welcome(&mut self, now: u32, short: bool) -> bool {
        if now < self.quiet_until {
            return short;
        }
        if self.quiet_until > 0 {
            // What was said before has long been acted upon.
            (self.quiet_until, self.reported, self.back, self.began) = (0, 0, 0, now);
        }
        if self.reported >= LEAST.0 && 2 * self.back >= self.reported {
            self.quiet_until = now.saturating_add(self.quiet);
            self.quiet = (2 * self.quiet).min(QUIET[1]);
            return short;
        }
        if now.saturating_sub(self.began) >= PERIOD {
            if self.reported >= LEAST.0 && 4 * self.back < self.reported {
                self.quiet = QUIET[0];
            }
            (self.reported, self.back, self.began) = (self.reported / 2, self.back / 2, now);
        }
        true
    }

    /// These pages, which the guest has reported, have been discarded.
    ///
    /// # Panics
    /// When there are no such pages.
    pub fn discarded(&mut self, now: u32, pages: Range<usize>) {
        self.reported += pages.len() as u64;
        self.last = Some(now);
        if !pages.is_empty() {
            self.at[pages.start / BLOCK..=(pages.end - 1) / BLOCK].fill(now.saturating_add(1));
        }
    }

    /// These pages have been filled. Returns how many of them have come back.
    ///
    /// # Panics
    /// When there are no such pages.
    #[inline]
    pub fn filled(&mut self, now: u32, pages: Range<usize>) -> u64 {
        if self.last.is_none_or(|last| now.saturating_sub(last) >= RECENT) {
            return 0;
        }
        self.come_back(now, pages)
    }

    fn come_back(&mut self, now: u32, pages: Range<usize>) -> u64 {
        let mut back = 0;
        let mut page = pages.start;
        while page < pages.end {
            let end = (page / BLOCK * BLOCK + BLOCK).min(pages.end);
            let at = self.at[page / BLOCK];
            if at > 0 && now.saturating_sub(at - 1) < RECENT {
                back += (end - page) as u64;
            }
            page = end;
        }
        // Pages of a block that were not reported count as well, but no more can come back than was there.
        let back = back.min(self.reported.saturating_sub(self.back));
        self.back += back;
        back
    }

    /// Until when reports are left alone, if they are at `now`.
    pub fn quiet_until(&self, now: u32) -> Option<u32> {
        (now < self.quiet_until).then_some(self.quiet_until)
    }
}

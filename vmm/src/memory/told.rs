//! What the controller hears of unasked.
//!
//! The fault thread compares it in each round of its loop with what it has told last, so it is made from the counters that
//! it consists of, and takes no lock. A whole report is made only when there is one to send.

use memcg_core::frame::FrameState;

use super::pages::Pages;
use crate::devices::balloon::BalloonHandle;

/// The part of a report whose change is worth one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    held: bool,
    returned_total: u64,
    ballooned: u64,
    balloon_actual: u32,
    balloon_ready: bool,
    /// How often the number of guest errors has doubled.
    errors: u32,
    /// Pages that the host had no memory for.
    unfilled: u64,
    /// Tenths of a second that vCPUs have waited for evicted pages.
    refaults: u64,
    /// A report that the socket had no room for.
    pub owed: bool,
}

impl Told {
    /// As things are now. `outside` is how many pages the guest has named that are not RAM.
    pub fn now(pages: Option<&Pages>, balloon: &BalloonHandle, outside: u64) -> Self {
        let mut errors = balloon.guest_errors() + outside;
        let mut told = Self { balloon_actual: balloon.actual(), balloon_ready: balloon.ready(), ..Self::default() };
        if let Some(pages) = pages {
            told.held = pages.is_held();
            told.returned_total = pages.stock.returned_total();
            told.ballooned = pages.frames.count(FrameState::Ballooned);
            told.unfilled = pages.counts.unfilled;
            told.refaults = pages.stall.total_us() / 100_000;
            errors += pages.counts.guest_errors;
        }
        told.errors = u64::BITS - errors.leading_zeros();
        told
    }
}

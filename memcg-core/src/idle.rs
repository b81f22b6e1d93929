//! How much of a VM's memory nobody uses, as far as its worker has found out.
//!
//! Two things are known, and neither says all:
//!
//! * What was put *aside*, and nobody has touched since, is idle for certain. To put pages aside costs the guest time, so it takes
//!   some generations until all that is idle is there, and in a guest that does nothing hardly anything is put aside.
//! * The *working set* says how many pages were in use in the last two generations, not which. The rest is idle; but it is
//!   as old as the last sample. What was seen in use since, such as the new pages of a guest that begins to grow, is not
//!   part of that rest.
//!
//! ```text
//!  resident  ├──── working set ────┼─ its error ─┼──────────── rest ────────────┤
//!  by age    ├─ seen in use of late ─┼──────────────── old ─────────────────────┤
//!  aside                                                    ├───────────────────┤
//!
//!  idle = max(aside, min(rest, old))
//! ```
//!
//! Whoever divides a need asks here, whatever means it is for ([`crate::ladder::aims`]).

use crate::frame::Histogram;
use crate::units::Pages;

/// Generations that a working set is about.
const GENERATIONS: u16 = 2;

/// What is known of the pages of one VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// Resident pages.
    pub resident: Pages,
    /// Of these, pages that were put aside and not touched since.
    pub aside: Pages,
    /// Resident pages by the time when they were last seen in use.
    pub ages: Histogram,
    /// Most pages that were in use in the last two generations, resident or not: the estimate and its error. `None` when there
    /// is no estimate.
    pub in_use: Option<Pages>,
}

impl Known {
    /// Resident pages that nobody uses, as far as is known. Never more than there are.
    pub fn idle(&self) -> Pages {
        let rest = self.in_use.map_or(Pages::ZERO, |in_use| self.resident.saturating_sub(in_use));
        let by_age = Histogram::FROM.iter().zip(self.ages.pages);
        let old: Pages = by_age.filter(|(from, _)| **from >= GENERATIONS).map(|(_, pages)| pages).sum();
        self.aside.max(rest.min(old)).min(self.resident)
    }
}

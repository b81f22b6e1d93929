//! The same order for the kernel: if it has to end a process before we could act, it is to be the one that we would have taken.
//!
//! The kernel adds two numbers for each process, in thousandths of all memory: what it uses, and its `oom_score_adj`; the highest
//! sum goes first. So the adjustment is what is missing to a sum that falls with the place in the list:
//!
//! ```text
//!  sum   1000 ┤ ■                         the first of the list: as much as a process that uses everything
//!             │   ■
//!             │     ■
//!   largest of the spared ┤ ─ ─ ─ ─ ─ ─   they have no adjustment, like any other process
//! ```
//!
//! What a process uses changes, and adjustments are set now and then. Steps are as large as there is room for.

use super::Ranked;
use crate::units::Pages;

/// The highest sum, and the largest adjustment that there is.
const MOST: u64 = 1000;

/// The `oom_score_adj` of the process of each VM of a [ranked](super::rank) list on a host with `total` memory, in its order: 0 to
/// 1000, and 0 for those that are spared.
pub fn standing<'a>(ranked: &'a [Ranked<'a>], total: Pages) -> impl Iterator<Item = i16> + 'a {
    let share = move |entry: &Ranked<'_>| (entry.candidate.usage.0.saturating_mul(MOST) / total.0.max(1)).min(MOST);
    let spared = |entry: &&Ranked<'_>| entry.spared.is_some();
    let least = ranked.iter().filter(spared).map(share).max().map_or(0, |share| (share + 1).min(MOST));
    let count = ranked.iter().filter(|entry| entry.spared.is_none()).count().max(1) as u64;
    ranked.iter().zip(0..).map(move |(entry, place)| {
        let sum = MOST - (MOST - least) * place.min(count) / count;
        if entry.spared.is_some() { 0 } else { sum.saturating_sub(share(entry)) as i16 }
    })
}

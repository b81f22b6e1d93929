//! What reclaim should aim at: pure arithmetic on limits.
//!
//! The balloon works from `high` upwards, while the guest still runs; at `max` its vCPUs are held and it could not help
//! itself. So there is always a `high`: the user's, or one with a margin below `max`. Nobody sets a balloon target.

use crate::units::{Limit, Pages};

/// Smallest distance that an implied `high` keeps from `max`: 4 MiB.
pub const HIGH_MARGIN: Pages = Pages::from_mib(4);

/// The implied `high` keeps at least one part in so many of `max` free.
const HIGH_SHARE: u64 = 32;

/// Largest stock that a worker may hold: 16 MiB.
pub const STOCK_CAP: Pages = Pages::from_mib(16);

/// Stock that a VM is given at its start: 8 MiB. One that walks through memory asks for more.
pub const FIRST_STOCK: Pages = Pages::from_mib(8);

/// Pages that are evicted at once, at most: 1 MiB.
pub const BATCH: u64 = 256;

/// A worker's stock is at most one part in so many of the room.
const STOCK_SHARE: u64 = 8;

/// Where background reclaim starts: `high` if set (but never above `max`), else `max - max(4 MiB, max / 32)`.
#[inline]
pub fn effective_high(high: Limit, max: Limit) -> Limit {
    match (high, max) {
        (Limit::Pages(_), _) => high.min(max),
        (Limit::Max, Limit::Max) => Limit::Max,
        (Limit::Max, Limit::Pages(max)) => Limit::Pages(max.saturating_sub(HIGH_MARGIN.max(Pages(max.0 / HIGH_SHARE)))),
    }
}

/// The balloon size that keeps a guest of `size` at its effective high: `size - high`, 0 without a limit or when the
/// guest fits. Never above `size`.
///
/// What a VM is charged beside its guest pages (reserve, overhead) counts against the same limit: a caller that wants
/// the total to end at `high` lowers `high` and `max` by that much first.
pub fn balloon_target(size: Pages, high: Limit, max: Limit) -> Pages {
    match effective_high(high, max) {
        Limit::Max => Pages::ZERO,
        Limit::Pages(high) => size.saturating_sub(high),
    }
}

/// The stock that one VM may hold: `min(16 MiB, room / 8, group_room / (8 × members))`, and a single page as long as
/// there is any room at all.
///
/// `room` is what the VM itself could still be charged, `group_room` the same of the tightest group above it, each
/// `None` without a limit. `members` is the number of VMs that share the group's room (0 counts as 1).
pub fn stock_max(room: Option<Pages>, group_room: Option<Pages>, members: u32) -> Pages {
    let own = room.map_or(STOCK_CAP, |room| share(room, 1));
    let group = group_room.map_or(STOCK_CAP, |room| share(room, members));
    STOCK_CAP.min(own).min(group)
}

/// Whether somebody that has `has` pages under a limit that was `told` and is `now` may find room where there was none: the
/// limit is higher, and no batch of [`BATCH`] pages was sure to fit.
pub fn finds_room(has: u64, told: u64, now: u64) -> bool {
    now > told && has.saturating_add(BATCH) > told
}

/// One part in 8 × `members` of `room`, at least a page unless the room is empty.
fn share(room: Pages, members: u32) -> Pages {
    Pages(room.0 / (STOCK_SHARE * u64::from(members.max(1)))).max(room.min(Pages::ONE))
}

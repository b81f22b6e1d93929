//! A guest that walks through new memory gets it in whole blocks of 2 MiB.
//!
//! A block that is wholly absent is filled with one huge page out of the [pool](super::pool), moved to its place; its later
//! touches find a mapping of 2 MiB, and ageing moves it as one. That is worth it for a guest that has walked through as much
//! already and has room for several blocks more. Anybody else gets what they touch.
//!
//! The pool exists only while the guest grows. When nothing is ready, a huge page is zeroed on the spot, beside what the
//! reclaim thread zeroes; when there is no charge for that either, the fault waits for it, since one is on its way
//! ([`Patience`]). Both still take less time than to fill 512 pages one by one. The pool goes back when the stock is short,
//! before the reserve is used, and all of it when there is pressure.
//!
//! A fault leaves an empty page table behind where it has happened, and a huge page that is moved there would be split: as slow
//! as to fill it page by page. A discard of the block, which has nothing in it, takes that table away (Linux 6.14, on x86).
//! An older host gets no blocks: all that this would save is lost in the split.

use std::ops::Range;

use memcg_core::frame::{BLOCK, FrameState};
use memcg_core::units::{PAGE_SIZE, Pages as Count};

use super::around::Window;
use super::client::Reply;
use super::pages::Pages;
use super::pool::{Back, SLOTS, Taken};
use super::ram::HUGE;
use super::uffd::Move;
use crate::worker::broken;
use crate::worker::gate::monotonic_ns;

/// Pages of a huge page.
const HUGE_PAGES: u64 = HUGE / PAGE_SIZE;

/// A fault fills at most one part in so many of the room with blocks, and the pool has no more either.
const ROOM_SHARE: u64 = 8;

/// Blocks that a fault fills where there is room for them, ready or not: a fault costs half of what it takes to zero one.
const AT_ONCE: usize = 4;

/// Pages of the stock that are left when a block is charged: they pay for what it costs beside its pages, and for a touch
/// elsewhere. Without them there would be a debt, and a guest in debt gets no blocks.
const BESIDE: u64 = 16;

/// The pool leaves one part in so many of the stock that is allowed to what is touched meanwhile.
const STOCK_SHARE: u64 = 4;

/// Blocks that are charged to the guest, and are to be filled before anything else happens to RAM.
///
/// Before it spends the time that this takes the fault thread can ask the controller for what comes next.
#[derive(Debug)]
pub(super) struct Due {
    /// First page of the first of them.
    first: u64,
    /// A slot for each, and whether there is a huge page in it that is ready.
    blocks: [Option<(Taken, bool)>; SLOTS],
    /// Since when a fault has waited for them.
    since_ns: Option<u64>,
}

/// What became of a touch that is worth whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Blocks {
    /// So much is filled, or due.
    Filled(Window),
    /// A block's charge, or its zeroes, will be there in a moment; nothing has changed.
    Later,
    /// There are none for it; nothing has changed.
    None,
}

/// How long a walk may wait for a block, in nanoseconds: longer than a controller that lives takes to grant one.
const PATIENCE_NS: u64 = 2_000_000;

/// The patience of a walk that finds too little stock for a block.
///
/// The next grant, or the next huge page, is a fraction of a millisecond away, and to fill a block page by page takes longer
/// than that. So the walk waits, but never for longer than 2 ms: a controller that does not speak costs it no more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Patience {
    /// It may wait.
    #[default]
    Fresh,
    /// It waits until then, in nanoseconds of the monotonic clock.
    Until(u64),
    /// It has waited for nothing, and does not do so again before the next grant.
    Spent,
}

impl Patience {
    /// Whether a walk may wait now; its time begins with the first that does.
    fn waits(&mut self, now_ns: u64) -> bool {
        if *self == Self::Fresh {
            *self = Self::Until(now_ns + PATIENCE_NS);
        }
        *self != Self::Spent
    }

    /// Nanoseconds that are left to those who wait, if there are any.
    pub(super) fn left(self, now_ns: u64) -> Option<u64> {
        match self {
            Self::Until(end) => Some(end.saturating_sub(now_ns)),
            Self::Fresh | Self::Spent => None,
        }
    }

    /// Whether the time of those who wait is over; if so it is spent.
    fn ends(&mut self, now_ns: u64) -> bool {
        let over = self.left(now_ns) == Some(0);
        if over {
            *self = Self::Spent;
        }
        over
    }

    /// A grant has come.
    pub(super) fn granted(&mut self) {
        if *self == Self::Spent {
            *self = Self::Fresh;
        }
    }

    /// Nobody waits any more.
    pub(super) fn served(&mut self) {
        if matches!(self, Self::Until(_)) {
            *self = Self::Fresh;
        }
    }
}

impl Pages {
    /// Pages that a fault may fill in blocks, 0 when there is not enough room for that.
    pub(super) fn most_in_blocks(&self) -> u64 {
        let most = self.stock.room().map_or(u64::MAX, |room| room.0 / ROOM_SHARE);
        let pressed = self.reclaim.pressed || self.stock.debt() > Count(0) || self.need() > 0;
        if pressed || most < HUGE_PAGES { 0 } else { most }
    }

    /// Fills the blocks behind the touched page, and what is before the first of them, for a walk that is worth it: one
    /// whose `window` has as many pages.
    pub(super) fn fill_blocks(&mut self, window: Window, touched: u64) -> Blocks {
        if !self.ram.pool().pays() || window.first != touched || window.pages < HUGE_PAGES {
            return Blocks::None;
        }
        let slot = self.ram.contiguous(touched);
        // Blocks of the host's, of RAM and of the frame table are the same but for a slot that begins elsewhere.
        let first = touched.next_multiple_of(HUGE_PAGES);
        let end = (touched + window.pages).next_multiple_of(HUGE_PAGES).min(slot.end);
        let (state, end) = self.frames.run(touched as usize, end as usize);
        let end = end as u64;
        if state != FrameState::Absent || end < first + HUGE_PAGES || !self.ram.hva(first).is_multiple_of(HUGE) {
            return Blocks::None;
        }
        if touched < first {
            let before = Window { first: touched, pages: first - touched };
            let Some(filled) = self.charge_and_fill(before, touched, true) else { return Blocks::None };
            if filled != before {
                return Blocks::Filled(filled);
            }
        }
        let blocks = self.charge_blocks(first, ((end - first) / HUGE_PAGES) as usize, touched == first);
        self.walks = true;
        self.order_blocks();
        if blocks == 0 && touched == first {
            return if self.may_wait() { Blocks::Later } else { Blocks::None };
        }
        Blocks::Filled(Window { first: touched, pages: first + blocks * HUGE_PAGES - touched })
    }

    /// Whether a walk that found no block may wait for one.
    fn may_wait(&mut self) -> bool {
        let comes = !self.is_refused() && self.stock.stock_max() >= Count(2 * HUGE_PAGES);
        let waits = comes && self.patience.waits(monotonic_ns());
        if waits {
            self.ram.pool().call();
        }
        waits
    }

    /// Time that is left to a walk that waits for a block, in nanoseconds; [`Pages::keep_pool`] is to be called then.
    pub fn patience_left(&self) -> Option<u64> {
        self.patience.left(monotonic_ns())
    }

    /// Charges up to `most` absent blocks from `first` on to the guest, those that are ready; where somebody waits for the
    /// first (`now`), also some to be zeroed on the spot if there are fewer than [`AT_ONCE`]. They are due then. Returns how
    /// many.
    fn charge_blocks(&mut self, first: u64, most: usize, now: bool) -> u64 {
        let ram = self.ram.clone();
        let mut due = Due { first, blocks: [const { None }; SLOTS], since_ns: None };
        let mut count = 0;
        while count < most.min(SLOTS) {
            let block = match ram.pool().take() {
                Some(ready) => {
                    self.stock.use_ahead(Count(HUGE_PAGES));
                    Some((ready, true))
                }
                None if now && count < AT_ONCE => self.charge_one().map(|empty| (empty, false)),
                None => None,
            };
            if block.is_none() {
                break;
            }
            due.blocks[count] = block;
            count += 1;
        }
        if count > 0 {
            // Those that are ready lie behind, and are filled first: what is granted meanwhile is zeroed beside the others.
            due.blocks[..count].reverse();
            self.due = Some(due);
        }
        count as u64
    }

    /// Charges a huge page that is to be zeroed now. `None` when there is nothing to charge it to, or no place for it.
    fn charge_one(&mut self) -> Option<Taken> {
        // What is being zeroed is ready sooner than another one would be.
        while self.stock.stock() < Count(HUGE_PAGES) && self.ram.pool().cancel() {
            self.stock.put_back(Count(HUGE_PAGES));
        }
        let reservation = self.stock.prepare(Count(HUGE_PAGES)).filter(|r| r.pages() == Count(HUGE_PAGES))?;
        let taken = self.ram.pool().take_empty()?;
        reservation.commit(Count(HUGE_PAGES));
        Some(taken)
    }

    /// Whether blocks are charged that are not filled yet.
    pub fn is_due(&self) -> bool {
        self.due.is_some()
    }

    /// Since when the fault has been waiting that the due blocks answer.
    pub(super) fn due_since(&mut self, ns: u64) {
        if let Some(due) = &mut self.due {
            due.since_ns = Some(ns);
        }
    }

    /// Fills the blocks that are due.
    pub(super) fn fill_due(&mut self) {
        while self.fill_one_due() {}
    }

    /// Fills one of the blocks that are due; false when none is.
    ///
    /// The one that somebody waits for comes last: a guest that went on would touch the next one before it is there.
    pub fn fill_one_due(&mut self) -> bool {
        let Some(due) = &mut self.due else { return false };
        let last = due.blocks.iter().rposition(Option::is_some);
        let (first, since) = (due.first, due.since_ns);
        let block = last.and_then(|at| due.blocks[at].take().map(|block| (at as u64, block)));
        let Some((at, (taken, ready))) = block else { return false };
        let first = first + at * HUGE_PAGES;
        let missing = if ready || self.ram.pool().zero(&taken) {
            self.put_block(first, taken)
        } else {
            self.ram.clone().pool().discard_taken(taken);
            self.fill_charged(first..first + HUGE_PAGES)
        };
        self.filled(first..first + HUGE_PAGES);
        if !missing.is_empty() {
            let (at, pages) = (self.ram.hva(missing.start), missing.end - missing.start);
            self.give_up(missing);
            // Whoever waits there asks again, for a page.
            self.uffd.wake(at, pages);
        }
        if at == 0 {
            self.due = None;
            if let Some(since) = since {
                self.answer_times.record(monotonic_ns().saturating_sub(since));
            }
        }
        true
    }

    /// Moves a huge page, which is charged to the guest, to an absent block. Returns the pages for which the host has no memory.
    fn put_block(&mut self, first: u64, taken: Taken) -> Range<u64> {
        self.ram.clear_table(first);
        let from = self.ram.pool().taken_at(&taken);
        let (mut at, mut moved) = (0, 0);
        while at < HUGE_PAGES {
            let (to, from) = (self.ram.hva(first + at), from + at * PAGE_SIZE);
            // SAFETY: what is in a slot that is taken is this thread's, and nobody has seen it.
            match unsafe { self.uffd.move_pages(to, from, HUGE_PAGES - at) } {
                Move::Moved(done) => {
                    at += done;
                    moved += done;
                }
                Move::Busy => {}
                Move::NoMemory => break,
                // As with a fill: one whose charge is missing.
                Move::Occupied => {
                    self.uffd.wake(to, 1);
                    at += 1;
                }
                // The range is ours and registered until the process ends: its end has begun.
                other => broken(format_args!("a zeroed page cannot be moved to page {}: {other:?}", first + at)),
            }
        }
        if moved == HUGE_PAGES {
            self.ram.set_huge(first);
            self.ram.pool().give_back(taken);
        } else {
            self.ram.pool().discard_taken(taken);
        }
        first + at..first + HUGE_PAGES
    }

    /// Pages that the pool may have now.
    fn pool_max(&self) -> Count {
        let stock = self.stock.stock_max().0;
        Count((stock - stock / STOCK_SHARE).min(self.most_in_blocks()))
    }

    /// Has huge pages zeroed for a guest that walks. A fault that comes before one is ready takes back what is only ordered.
    pub(super) fn order_blocks(&mut self) {
        let mut ordered = false;
        let enough = Count(HUGE_PAGES + BESIDE);
        while self.stock.ahead() + Count(HUGE_PAGES) <= self.pool_max()
            && self.stock.stock() >= enough
            && self.ram.pool().order()
        {
            ordered |= self.stock.set_aside(Count(HUGE_PAGES));
        }
        if ordered {
            self.ram.pool().ring();
        }
    }

    /// Whether there is stock for a page, be it out of the pool.
    pub(super) fn has_stock(&mut self) -> bool {
        self.stock.stock() > Count(0) || self.shrink_pool() && self.stock.stock() > Count(0)
    }

    /// Takes the charge of one slot of the pool back, if one is to be had at once.
    fn shrink_pool(&mut self) -> bool {
        let freed = self.stock.ahead() > Count(0) && self.ram.pool().take_back() == Back::Free;
        if freed {
            self.stock.put_back(Count(HUGE_PAGES));
        }
        freed
    }

    /// Empties the pool. What is being zeroed is discarded when that has ended.
    pub(super) fn give_up_pool(&mut self) {
        self.walks = false;
        while self.shrink_pool() {}
        while self.stock.ahead() > Count(0) && self.ram.pool().take_back() == Back::Soon {}
    }

    /// Whether stock that was recalled is still on its way.
    pub fn is_recalling(&self) -> bool {
        self.stock.ahead() > Count(0) && self.ram.pool().is_leaving()
    }

    /// Serves the walks that have waited for a block, takes the charges of what the reclaim thread has discarded, and gives up
    /// what the pool may not have any more. Returns the loader's answer when there is one.
    pub fn keep_pool(&mut self) -> Option<(usize, Reply)> {
        let now = monotonic_ns();
        if self.patience.ends(now) || self.patience.left(now).is_some() && self.ram.pool().is_ready() {
            return self.settle();
        }
        if !self.walks && self.stock.ahead() == Count(0) {
            return None;
        }
        let before = self.stock.ahead();
        let gone = self.ram.pool().collect();
        self.stock.put_back(Count(gone * HUGE_PAGES));
        while self.stock.ahead() > self.pool_max() && self.shrink_pool() {}
        if self.stock.ahead() < before {
            self.walks = false;
            return self.settle();
        }
        if self.walks {
            // A grant may have come.
            self.order_blocks();
        }
        None
    }
}

const _: () = assert!(HUGE_PAGES == BLOCK as u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_waits_two_milliseconds_and_then_no_more_before_a_grant() {
        let mut patience = Patience::default();
        assert!(patience.waits(1000) && patience.waits(1500));
        assert_eq!(patience.left(1500), Some(PATIENCE_NS - 500), "counted from the first that waits");
        patience.granted();
        assert!(!patience.ends(PATIENCE_NS + 999), "a grant that does not suffice makes the wait no longer");
        assert!(patience.ends(PATIENCE_NS + 1000));
        assert!(!patience.waits(PATIENCE_NS + 1001) && patience.left(0).is_none());
        patience.served();
        assert!(!patience.waits(PATIENCE_NS + 1002), "it was not served by what it waited for");
        patience.granted();
        assert!(patience.waits(2 * PATIENCE_NS));
    }

    #[test]
    fn one_that_got_its_block_may_wait_for_the_next() {
        let mut patience = Patience::default();
        assert!(patience.waits(0));
        patience.served();
        assert_eq!((patience, patience.ends(u64::MAX)), (Patience::Fresh, false));
    }
}

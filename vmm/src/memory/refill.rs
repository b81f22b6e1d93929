//! A guest that has stood still goes on: what it used last comes back before it asks.
//!
//! A VM that is paused for others is emptied, the coldest pages first. When it goes on it has nothing, and would wait for each
//! page of its working set by itself. So the reclaim thread reads it ahead: what was evicted last comes first, and no more than
//! what the VM used when it was stopped, less what it still has. How much that is, the last sample has said; where nothing was
//! aged, everything that was evicted since counts.
//!
//! ```text
//!  Pause ── evicted, one after the other ──► turns n .. m        Resume
//!           cold ························ hot                       │
//!                    ◄──── window by window, each in the order of the pages' numbers, so that neighbours come at once
//!
//!  reclaim thread: reads and decompresses a batch ─► fault thread: what is evicted still is charged, filled, and released
//! ```
//!
//! The fault thread does no more at a time than for a fault that fills much, and faults come first. Pages are charged ahead of
//! need: from the stock, which the controller fills as long as nobody else has to give for it. At the first sign of want it
//! ends: little room, a refusal, another pause.
//!
//! Pages of the sample that ageing watches are left alone: they are to come back by a touch, or not at all.

use std::ops::Range;

use memcg_core::frame::{FrameState, Turns};
use memcg_core::reclaim::{self, BATCH};
use memcg_core::units::{Limit, Pages as Count};

use super::client::{Fetched, Load, Reply, Work};
use super::cold::GONE;
use super::pages::Pages;
use super::store::Stored;
use super::uffd::{Fill, MAX_FILL};
use crate::worker::broken;
use crate::worker::gate;

/// Windows that the turns are cut into, at most: each is one way through the frame table.
const WINDOWS: u32 = 16;

/// The least pages of a window.
const WINDOW: u32 = 4096;

/// Blocks that are searched at a time.
const BLOCKS: usize = 32;

/// Stock that is asked for ahead, in batches.
const AHEAD: u64 = 32;

/// Stock that is left to faults.
const FAULTS: u64 = 64;

/// With no more stock than this a worker of a host that is short may have, it is not the time.
const LITTLE: Count = Count(64);

/// What comes back ahead of need, and how far that is.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Refill {
    /// While the VM is paused.
    pause: Option<Pause>,
    /// While it goes on.
    going: Option<Going>,
    /// How that was before the batch that is being read.
    batch: Option<Going>,
}

/// How it was when the VM was paused.
#[derive(Clone, Copy, Debug)]
struct Pause {
    /// Pages that had been evicted.
    evicted: u64,
    /// Pages in use, if that was known.
    used: Option<u64>,
}

/// What is left to do.
#[derive(Clone, Copy, Debug)]
struct Going {
    /// The window that is searched, and those before it.
    window: Turns,
    before: Turns,
    /// Pages of a window.
    width: u32,
    /// The page from which on it is searched.
    at: usize,
    /// Something has come back: from now on want is a reason to end, and not only to wait.
    begun: bool,
}

impl Pages {
    /// The vCPUs are stopped by somebody.
    pub fn on_pause(&mut self) {
        let all = self.reclaim.counts.evicted;
        // What has not come back since the last pause is still missing.
        let since = self.refill.going.map_or(0, |going| (all as u32).wrapping_sub(going.before.first));
        let used = self.ageing.estimate().map(|estimate| estimate.pages.0);
        let pause = Pause { evicted: all.saturating_sub(since.into()), used };
        self.refill = Refill { pause: Some(pause), ..Refill::default() };
    }

    /// They go on.
    pub fn on_resume(&mut self) {
        // What the host had no memory for is tried now.
        self.starved = self.starved.map(|_| 0);
        let Some(Pause { evicted, used }) = self.refill.pause.take() else { return };
        let count = self.reclaim.counts.evicted - evicted;
        let missing = used.map_or(u64::MAX, |used| used.saturating_sub(self.stock.guest().0));
        let most = |pages: u64| u32::try_from(pages).unwrap_or(u32::MAX);
        let all = Turns { first: evicted as u32, count: most(count) };
        let (wanted, _) = all.split_last(most(missing));
        if wanted.count == 0 {
            return;
        }
        let width = (wanted.count / WINDOWS).max(WINDOW);
        let (window, before) = wanted.split_last(width);
        self.refill.going = Some(Going { window, before, width, at: 0, begun: false });
        self.stock.expect(Count(AHEAD * MAX_FILL));
    }

    /// Whether there is something to read and to charge it to.
    pub(super) fn refill_is_due(&self) -> bool {
        self.refill.going.is_some() && self.refill_stock() > 0
    }

    /// Stock that may be used: what faults may need at once is theirs.
    fn refill_stock(&self) -> u64 {
        if self.stock.debt() > Count(0) || self.starved.is_some() {
            0
        } else {
            self.stock.stock().0.saturating_sub(FAULTS)
        }
    }

    /// Whether more may come back: there is room, and nobody wants it. What it takes, and what the next grant brings, must not
    /// be above where reclaim begins.
    fn may_refill(&self) -> bool {
        let held = self.stock.held();
        let is_below = self.stock.room().is_none_or(|room| {
            let high = reclaim::effective_high(Limit::Max, Limit::Pages(held + room));
            Limit::Pages(held + Count(room.0 / 4)) <= high
        });
        let is_wanted = held.0.saturating_add(BATCH) > self.reclaim.aim() || self.is_refused();
        is_below && !is_wanted && self.stock.stock_max() > LITTLE
    }

    /// The next pages to be read, if it is time for that.
    pub(super) fn refill(&mut self, load: &mut Load) -> Option<Work> {
        let mut going = self.refill.going?;
        if !self.may_refill() {
            self.refill.going = self.refill.going.filter(|going| !going.begun);
            return None;
        }
        self.stock.expect(Count(AHEAD * MAX_FILL));
        let most = self.refill_stock().min(MAX_FILL) as usize;
        if most == 0 {
            return None;
        }
        let pages = &mut load.fetched.pages;
        pages.clear();
        let next = self.frames.evicted_in(going.window, going.at, BLOCKS, |page| {
            let takes = pages.len() < most;
            if takes && !self.ageing.is_watched(page as u64) {
                pages.push(Stored { page: page as u32, place: self.place(page as u64) });
            }
            takes
        });
        self.refill.batch = Some(Going { begun: true, ..going });
        going.at = next.unwrap_or(0);
        if next.is_none() {
            (going.window, going.before) = going.before.split_last(going.width);
        }
        let is_over = going.window.count == 0;
        self.refill.going = Some(Going { begun: true, ..going }).filter(|_| !is_over);
        (!is_over || !load.fetched.pages.is_empty()).then_some(Work::Refill)
    }

    /// Pages have been read. Those that are still evicted, and can be charged, come back.
    pub(super) fn refilled(&mut self, read: &Fetched) -> Option<(usize, Reply)> {
        if let Some((_, corrupt)) = read.failed.iter().find(|(page, corrupt)| self.is_at(*page, corrupt.place)) {
            self.corrupt = Some(*corrupt);
        }
        let mut at = 0;
        while at < read.pages.len() {
            let run = self.run_of(read, at);
            if run.is_empty() {
                at += 1;
            } else if self.gate.closed_for(gate::PAUSED) {
                break;
            } else if !self.come_back(read, run.clone()) {
                // The stock was needed elsewhere, or the host has no memory: the rest of the batch is read again.
                self.refill.going = self.refill.batch.or(self.refill.going);
                break;
            } else {
                at = run.end;
            }
        }
        self.stock.owe(self.cost());
        self.settle()
    }

    /// The pages that were read, from the `at`th on, which lie side by side and are where they were; none when that one is not.
    fn run_of(&self, read: &Fetched, at: usize) -> Range<usize> {
        let first = read.pages[at].page;
        let follows = |(i, stored): &(usize, &Stored)| {
            stored.page == first.wrapping_add(*i as u32) && self.is_at(stored.page, stored.place.raw())
        };
        let pages = if first == GONE { 0 } else { read.pages[at..].iter().enumerate().take_while(follows).count() };
        // One piece of RAM is one mapping.
        let piece = if pages == 0 { 0 } else { self.ram.contiguous(first.into()).end - u64::from(first) };
        at..at + pages.min(piece as usize)
    }

    /// Whether `page` is evicted, and its content at `place`.
    pub(super) fn is_at(&self, page: u32, place: u32) -> bool {
        let page = page as usize;
        page < self.frames.len() && self.frames.state(page) == FrameState::Swapped && self.frames.place(page) == place
    }

    /// Charges and fills a run of pages that were read. False when it could not be done for all.
    fn come_back(&mut self, read: &Fetched, run: Range<usize>) -> bool {
        let first = u64::from(read.pages[run.start].page);
        let Some(reservation) = self.stock.prepare(Count(run.len() as u64)) else { return false };
        let charged = reservation.pages().0 as usize;
        let contents = &read.contents[run.start..run.start + charged];
        let mut filled = 0;
        while filled < charged {
            match self.uffd.fill_with(self.ram.hva(first + filled as u64), contents[filled..].as_flattened()) {
                Fill::Filled(pages) => filled += pages as usize,
                Fill::RetryLater => {}
                Fill::NoMemory => break,
                // Only this thread fills a page that is not there.
                other => broken(format_args!("evicted page {} cannot be filled: {other:?}", first + filled as u64)),
            }
        }
        reservation.commit(Count(filled as u64));
        for stored in &read.pages[run.start..run.start + filled] {
            if let Err(corrupt) = self.reclaim.release(stored.page.into(), stored.place) {
                self.corrupt = Some(corrupt);
            }
        }
        let pages = first..first + filled as u64;
        self.frames.set_range(pages.start as usize, pages.end as usize, FrameState::Active);
        if let Some(present) = self.ram.present() {
            present.set(pages);
        }
        self.reclaim.counts.read_ahead += filled as u64;
        if filled < charged {
            self.starve();
        }
        filled == run.len()
    }
}

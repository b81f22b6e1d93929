//! Cold pages, as their owner sees them: which are moved aside, which are evicted, and how they come back.
//!
//! The fault thread decides and keeps the books; the reclaim thread ([`super::reclaim`]) makes the system calls. A page is
//! claimed before it is touched, and gets its final state by what the call did:
//!
//! ```text
//!            Work::Age           moved            Work::Evict         stored: uncharge, charge the store
//!   ACTIVE ───────────► MOVING ─────────► IDLE ───────────────► EVICTING ─────────► SWAPPED
//!     ▲ ▲ └──────◄──────┘ stayed          │ ▲ └───────◄─────────┘ does not shrink      │
//!     │ └──────── touch: move back ───────┘ └── (head of the idle list)                │
//!     └───────────────────────── touch: charge, decompress ────────────────────────────┘
//! ```
//!
//! **When.** Reclaim works for the largest of three needs, and rests when there is none:
//!
//! * the debt of vCPUs that are held, and a margin, so that they are not held again at the next touch;
//! * the *margin* that is kept free below the limit while the guest runs: below `LOW` pages of room it is widened to
//!   `HIGH`, before anybody has to be held;
//! * the controller's aim ([`ToWorker::Reclaim`](crate::worker::protocol::ToWorker::Reclaim)).
//!
//! **Which.** Idle pages are evicted, the coldest first. Active ones are moved aside when there are few idle ones, from
//! the cold end of their list; what is touched there comes back and has proved that it is in use. So the idle list is the
//! inactive list of other systems, and its length decides how long a page has for that proof.
//!
//! What does not shrink goes to the store's file, where there is one ([`super::store::spill`]). A touch of such a page
//! waits for the reclaim thread to read it, before anything is charged ([`Work::Fetch`]). A store that is larger than it may
//! be, because its limit was lowered, goes there too, batch by batch, and so does what is needed when the guest has nothing
//! left to evict: as with cleaning, a page that is touched meanwhile comes from its old place, and the copy is released.
//!
//! Where there is no need at all, pages are aged ([`super::ageing`]).
//!
//! When nothing can be evicted (all that is idle does not shrink, or swap is full) reclaim is *stuck*. It tries again
//! after a second; the controller is told, and its policy goes on.

use std::ops::Range;
use std::time::Duration;

use memcg_core::frame::{BLOCK, FrameState, List, Scan};
use memcg_core::reclaim::{BATCH, finds_room};
use memcg_core::units::{PAGE_SIZE, Pages as Count};
use vmm_sys_util::eventfd::EventFd;

use super::around::Window;
use super::client::{Done, Fetched, Load, Reply, Run, Work};
use super::pages::{Charged, Pages};
use super::store::{Corrupt, Moved, Place, Reader, Stored};
use super::uffd::{Fill, Move};
use crate::worker::broken;
use crate::worker::gate::monotonic_ns;
use crate::worker::protocol::{Area, Cold};

/// The margin below the limit is widened when it is below one part in so many of what the VM holds.
const LOW_SHARE: u64 = 128;

/// The margin's bounds, in pages: below 64 a single vCPU's burst passes it, above 1024 it only costs memory.
const MARGIN: std::ops::RangeInclusive<u64> = 64..=1024;

/// While pages are evicted, one part in so many of the guest's pages is kept aside, to be looked at.
const IDLE_SHARE: u64 = 8;

/// Entries of a list that a job looks at, for each page that it wants.
const LOOK: usize = 4;

/// Time after which a reclaim that is stuck tries again.
const RETRY: Duration = Duration::from_secs(1);

/// How long reclaim stands back for the balloon.
const TURN: Duration = Duration::from_millis(1);

/// Pages around a refault that come back with it, at most.
const READ_AROUND: u64 = 16;

/// Pages that are read from the file at once, at most.
const FETCH: usize = 64;

/// What became of a touch of an evicted page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refault {
    /// So many pages came back, the touched one first.
    Back(u64),
    /// There was nothing to charge it to.
    Dry,
    /// It has to be read from the file first.
    Later,
}

/// The number of no page: RAM has fewer pages than that.
pub(super) const GONE: u32 = u32::MAX;

/// Reclaim as the fault thread knows it.
#[derive(Debug)]
pub struct Reclaim {
    /// Wakes the reclaim thread.
    bell: EventFd,
    /// It waits for the bell.
    resting: bool,
    /// The other half of the store.
    pub(super) store: Reader,
    /// What the VM should hold at most, in pages.
    aim: u64,
    swap_max: u64,
    store_max: u64,
    /// What the store was to be at most, the last time.
    store_aim: u64,
    /// The file took nothing of a store that is too large; until when that is believed, in nanoseconds.
    full_until: Option<u64>,
    /// What [`Reader::emptied`] said when what has died in the store was last given back.
    emptied: u64,
    /// Nothing could be evicted; until when that is believed, in nanoseconds.
    stuck_until: Option<u64>,
    /// Its thread rests for that, and wakes by itself.
    retries: bool,
    /// Pages that could not be evicted since one was.
    refused: u64,
    /// The VM is near its limit: the margin is kept in stock instead of being given back, so that what is touched next
    /// need not be asked for.
    pub(super) pressed: bool,
    /// The balloon waits for the end of a claim, and comes before the next one.
    yields: bool,
    /// The content of a page on its way back.
    content: Box<[u8; PAGE_SIZE as usize]>,
    /// What is to be read from the file next.
    wants: Vec<Stored>,
    /// What was read last. A page that has come back, or is not wanted any more, is [`GONE`] here.
    fetched: Fetched,
    pub(super) counts: Cold,
}

impl Reclaim {
    /// Reclaim whose thread is woken by `bell` and keeps contents in `store`.
    pub fn new(bell: EventFd, store: Reader) -> Self {
        Self {
            bell,
            resting: false,
            store,
            aim: u64::MAX,
            swap_max: u64::MAX,
            store_max: u64::MAX,
            store_aim: u64::MAX,
            full_until: None,
            emptied: 0,
            stuck_until: None,
            retries: false,
            refused: 0,
            pressed: false,
            yields: false,
            content: Box::new([0; PAGE_SIZE as usize]),
            wants: Vec::with_capacity(FETCH),
            fetched: Fetched::default(),
            counts: Cold { aim: u64::MAX, ..Cold::default() },
        }
    }

    /// Where contents of evicted pages are.
    pub fn area(&self) -> Area {
        self.store.area()
    }

    /// Its thread waits for the bell, from before there was anything to reclaim.
    pub fn rest(&mut self) {
        self.resting = true;
    }

    /// Nobody wants the content of `page`, which is at `place`, any more.
    pub(super) fn release(&mut self, page: u64, place: Place) -> Result<(), Corrupt> {
        if place.slot().is_some() {
            self.counts.file = self.counts.file.saturating_sub(1);
            if let Some(read) = self.fetched.pages.iter_mut().find(|read| u64::from(read.page) == page) {
                read.page = GONE;
            }
        }
        self.store.release(page as u32, place)
    }

    /// Finds the content of `page`, which is at `place`. False, and it is asked for, when it has to be read from the file.
    fn find(&mut self, page: u64, place: Place) -> Result<bool, Corrupt> {
        let stored = Stored { page: page as u32, place };
        if place.slot().is_none() {
            self.store.read(stored.page, place, &mut self.content)?;
            return Ok(true);
        }
        if let Some(i) = self.fetched.pages.iter().position(|read| *read == stored) {
            self.content.copy_from_slice(&self.fetched.contents[i]);
            return Ok(true);
        }
        if self.wants.len() < FETCH && !self.wants.contains(&stored) {
            self.wants.push(stored);
        }
        Ok(false)
    }

    /// Somebody else waits for pages that are claimed: after this claim it is their turn.
    pub fn give_way(&mut self) {
        self.yields = true;
    }

    /// What the VM should hold at most, in pages.
    pub(super) fn aim(&self) -> u64 {
        self.aim
    }

    /// The controller's aim. A lower one is worth another try of who is stuck; a higher one, as each grant brings it, is not.
    pub fn set_aim(&mut self, aim: u64) {
        if aim < self.aim && self.counts.stuck {
            (self.stuck_until, self.retries, self.counts.stuck, self.refused) = (None, false, false, 0);
        }
        (self.aim, self.counts.aim) = (aim, aim);
    }

    /// What could not be evicted before may be evicted now.
    fn try_again(&mut self) {
        (self.stuck_until, self.retries, self.full_until) = (None, false, None);
        (self.counts.stuck, self.counts.hard, self.refused) = (false, 0, 0);
    }
}

impl Pages {
    /// The limits of swap and store. More room is a reason to try again only where there was none: a part of a group's limit
    /// changes all the time, and a page that does not shrink stays one.
    pub fn set_swap_limits(&mut self, swap_max: u64, store_max: u64) {
        let (swapped, store) = (self.frames.count(FrameState::Swapped), self.stock.store().0);
        let reclaim = &mut self.reclaim;
        if finds_room(swapped, reclaim.swap_max, swap_max) || finds_room(store, reclaim.store_max, store_max) {
            reclaim.try_again();
        }
        if (swap_max, store_max) != (reclaim.swap_max, reclaim.store_max) {
            (reclaim.swap_max, reclaim.store_max, reclaim.full_until) = (swap_max, store_max, None);
        }
    }

    /// Pages that should be free and are not.
    pub(super) fn need(&self) -> u64 {
        let held = self.stock.held().0;
        // What the controller has not refused is on its way.
        let debt = if self.is_refused() { self.stock.debt().0 } else { 0 };
        let low = self.low();
        let margin = match self.free() {
            free if free < low || debt > 0 => (2 * low).saturating_sub(free),
            _ => 0,
        };
        (debt + margin).max(held.saturating_sub(self.reclaim.aim))
    }

    /// Pages below which the margin is widened, to twice as many.
    fn low(&self) -> u64 {
        (self.stock.held().0 / LOW_SHARE).clamp(*MARGIN.start(), *MARGIN.end())
    }

    /// Pages that can be filled before the limit is met.
    fn free(&self) -> u64 {
        self.stock.room().map_or(u64::MAX, |room| (room + self.stock.whole_stock()).0)
    }

    /// Stock that is to be given back: what exceeds its cap, but for the margin of a VM that lives at its limit.
    pub(super) fn surplus(&mut self) -> Count {
        // A stopped guest needs no margin, and one with more room gets what it needs ahead of need.
        self.reclaim.pressed &= self.free() <= 4 * self.low() && self.gate.open();
        let margin = if self.reclaim.pressed { 2 * self.low() } else { 0 };
        self.stock.surplus(Count(margin))
    }

    /// Whether pages may go to the store now.
    pub(super) fn may_evict(&self) -> bool {
        let swapped = self.frames.count(FrameState::Swapped);
        let has_room = self.stock.store().0 < self.reclaim.store_max || self.reclaim.store.has_file();
        swapped < self.reclaim.swap_max && has_room
    }

    /// Wakes the reclaim thread when there is something to do for it.
    pub fn ring_reclaim(&mut self) {
        let dead = self.reclaim.store.emptied() != self.reclaim.emptied;
        let wants = !self.reclaim.wants.is_empty();
        let large = self.may_write_back(self.reclaim.store_max);
        if self.reclaim.resting
            && (wants
                || dead
                || large
                || self.ageing_is_due()
                || self.refill_is_due()
                || self.need() > 0 && !self.reclaim.retries)
        {
            self.reclaim.resting = false;
            // Fails only when the counter is full: it is awake already.
            let _ = self.reclaim.bell.write(1);
        }
    }

    /// The reclaim thread has done its work, and gets more. Returns the loader's answer, too, when there is one now.
    pub fn on_reclaim(&mut self, done: Done, load: &mut Load) -> (Work, Option<(usize, Reply)>) {
        let reply = match done {
            Done::Rested => None,
            Done::Aged => {
                for run in &load.moved {
                    self.frames.set_range(run.first as usize, (run.first + run.pages) as usize, FrameState::Idle);
                    self.reclaim.counts.aged += run.pages;
                }
                self.end_claims(&load.claimed, FrameState::Moving, FrameState::Active);
                self.stock.owe(self.cost());
                self.settle()
            }
            Done::Evicted { incompressible, store, failed_writes } => {
                for (page, turn) in load.stored.iter().zip(self.reclaim.counts.evicted..) {
                    self.frames.set(page.page as usize, FrameState::Swapped);
                    self.frames.set_place(page.page as usize, page.place.raw());
                    self.frames.set_turn(page.page as usize, turn as u32);
                    self.reclaim.counts.file += u64::from(page.place.slot().is_some());
                }
                self.reclaim.counts.failed_writes = failed_writes;
                load.copied.iter().for_each(|copied| self.copied(copied));
                self.written_back(load.copied.iter().any(|copied| copied.new.slot().is_some()), store);
                let stayed = self.end_claims(&load.claimed, FrameState::Evicting, FrameState::Idle);
                self.evicted(load.stored.len() as u64, stayed, incompressible, store)
            }
            Done::Fetched => {
                std::mem::swap(&mut self.reclaim.fetched, &mut load.fetched);
                self.fetched()
            }
            Done::Refilled => self.refilled(&load.fetched),
        };
        let work = self.next_work(load);
        self.reclaim.resting = matches!(work, Work::Rest(_));
        (work, reply)
    }

    /// Pages have been read from the file: those that were forgotten meanwhile do not matter.
    fn fetched(&mut self) -> Option<(usize, Reply)> {
        // What waited while it was read has asked again.
        let (wants, read) = (&mut self.reclaim.wants, &self.reclaim.fetched);
        let failed = |page: u32| read.failed.iter().any(|(failed, _)| *failed == page);
        wants.retain(|want| !read.pages.contains(want) && !failed(want.page));
        let lost = read.failed.iter().find(|(page, corrupt)| self.is_at(*page, corrupt.place));
        if let Some((_, corrupt)) = lost {
            self.corrupt = Some(*corrupt);
        }
        for i in 0..self.reclaim.fetched.pages.len() {
            let Stored { page, place } = self.reclaim.fetched.pages[i];
            if self.is_at(page, place.raw()) {
                self.reclaim.counts.fetched += 1;
            } else {
                self.reclaim.fetched.pages[i].page = GONE;
            }
        }
        self.settle()
    }

    /// Whether some of the store may go to the file, because it has more than `most` pages.
    fn may_write_back(&self, most: u64) -> bool {
        let is_large = self.stock.store().0 > most && self.reclaim.store.has_file();
        is_large && self.reclaim.full_until.is_none_or(|until| monotonic_ns() >= until)
    }

    /// The store has `store` pages after a job in which something went to the file, or nothing.
    fn written_back(&mut self, some: bool, store: u64) {
        if some {
            self.reclaim.try_again();
        } else if store > self.reclaim.store_aim {
            self.reclaim.full_until = Some(monotonic_ns() + RETRY.as_nanos() as u64);
        }
    }

    /// What is claimed is to be evicted, into a store of at most `store_max` pages.
    fn evict(&mut self, store_max: u64) -> Work {
        self.reclaim.store_aim = store_max;
        Work::Evict { store_max }
    }

    /// An entry of the store has been copied: one of the two is needed.
    fn copied(&mut self, copied: &Moved) {
        let page = copied.page as usize;
        let needed = self.frames.state(page) == FrameState::Swapped && self.frames.place(page) == copied.old.raw();
        self.reclaim.counts.file += u64::from(copied.new.slot().is_some());
        let useless = if needed { copied.old } else { copied.new };
        if needed {
            self.frames.set_place(page, copied.new.raw());
        }
        if let Err(corrupt) = self.reclaim.release(copied.page.into(), useless) {
            self.corrupt = Some(corrupt);
        }
    }

    /// Books what was evicted.
    fn evicted(&mut self, evicted: u64, stayed: u64, incompressible: u64, store: u64) -> Option<(usize, Reply)> {
        self.reclaim.refused = if evicted > 0 { 0 } else { self.reclaim.refused + stayed };
        self.reclaim.counts.hard = self.reclaim.counts.hard.max(self.reclaim.refused);
        self.reclaim.counts.stuck &= evicted == 0;
        self.reclaim.counts.evicted += evicted;
        self.ageing.evicted(evicted);
        self.reclaim.counts.incompressible += incompressible;
        self.stock.evicted(Count(evicted), Count(store));
        self.stock.owe(self.cost());
        let reply = self.settle();
        // What was asked for is the controller's, however much stock there may be.
        let above = self.stock.held().0.saturating_sub(self.reclaim.aim);
        self.stock.give_back(Count(above));
        reply
    }

    /// What is still in state `claim` goes back to `state`; returns how many pages.
    fn end_claims(&mut self, claimed: &[Run], claim: FrameState, state: FrameState) -> u64 {
        let mut stayed = 0;
        for run in claimed {
            let (mut at, last) = (run.first as usize, (run.first + run.pages) as usize);
            while at < last {
                let (found, end) = self.frames.run(at, last);
                if found == claim {
                    self.frames.set_range(at, end, state);
                    stayed += (end - at) as u64;
                    if let Some(present) = self.ram.present().filter(|_| state == FrameState::Active) {
                        present.set(at as u64..end as u64);
                    }
                }
                at = end;
            }
        }
        stayed
    }

    /// What the reclaim thread should do now.
    fn next_work(&mut self, load: &mut Load) -> Work {
        let (now, store_max) = (monotonic_ns(), self.reclaim.store_max);
        self.reclaim.stuck_until = self.reclaim.stuck_until.filter(|until| now < *until);
        self.reclaim.retries = false;
        load.claimed.clear();
        if !self.reclaim.wants.is_empty() {
            load.fetched.pages.clear();
            std::mem::swap(&mut load.fetched.pages, &mut self.reclaim.wants);
            return Work::Fetch;
        }
        if std::mem::replace(&mut self.reclaim.emptied, self.reclaim.store.emptied()) != self.reclaim.emptied {
            // Nothing to evict, only to give back.
            return self.evict(store_max);
        }
        if self.may_write_back(store_max) {
            return self.evict(store_max);
        }
        let need = self.need();
        if need == 0 {
            self.reclaim.counts.stuck = false;
            if let Some(work) = self.refill(load) {
                return work;
            }
            let cold = self.ageing.proactive().min(BATCH);
            if cold > 0 && self.may_evict() && self.claim(List::Idle, cold, true, &mut load.claimed) {
                return self.evict(store_max);
            }
            return self.next_ageing(load);
        }
        self.reclaim.pressed |= self.free() < 2 * self.low();
        if self.sample(load) {
            return Work::Age;
        }
        if let Some(until) = self.reclaim.stuck_until {
            self.reclaim.retries = true;
            return Work::Rest(Some(Duration::from_nanos(until - now)));
        }
        if std::mem::take(&mut self.reclaim.yields) {
            return Work::Rest(Some(TURN));
        }
        let idle = self.frames.count(FrameState::Idle);
        if self.may_evict() && self.reclaim.refused < idle.max(1) {
            let aside = self.stock.guest().0 / IDLE_SHARE;
            // Pages that have just been put aside are not evicted before others have been looked at.
            if idle < aside.max(need.min(BATCH))
                && self.claim(List::Active, need.clamp(BATCH / 4, BATCH), true, &mut load.claimed)
            {
                return Work::Age;
            }
            let room = self.reclaim.swap_max.saturating_sub(self.frames.count(FrameState::Swapped));
            if self.claim(List::Idle, need.clamp(16, BATCH).min(room), true, &mut load.claimed) {
                return self.evict(store_max);
            }
        }
        // The active pages may be worth more than the idle ones that do not shrink.
        if self.may_evict() && self.claim(List::Active, need.clamp(BATCH / 4, BATCH), true, &mut load.claimed) {
            let claimed = load.claimed.iter().map(|run| run.pages).sum();
            self.reclaim.refused = self.reclaim.refused.saturating_sub(claimed);
            return Work::Age;
        }
        // The guest has nothing left to give; its store may have.
        let less = self.stock.store().0.saturating_sub(need);
        if self.may_write_back(less) {
            return self.evict(less);
        }
        self.reclaim.counts.stuck = true;
        self.reclaim.refused = 0;
        (self.reclaim.stuck_until, self.reclaim.retries) = (Some(now + RETRY.as_nanos() as u64), true);
        Work::Rest(Some(RETRY))
    }

    /// Claims about `want` pages from the cold end of a list, in runs; not `fine`, whole blocks where they are alike. False
    /// when there were none.
    pub(super) fn claim(&mut self, list: List, want: u64, fine: bool, runs: &mut Vec<Run>) -> bool {
        let scan = Scan { fine, ..Scan::new(list, LOOK * want as usize, want) };
        self.frames.isolate(&scan, |pages| {
            Run::append(runs, pages.start as u64, pages.len() as u64);
        });
        if let (List::Active, Some(present)) = (list, self.ram.present()) {
            runs.iter().for_each(|run| present.clear(run.first..run.first + run.pages));
        }
        !runs.is_empty()
    }

    /// Brings the idle page `page` back, and those of `pages` around it that are idle too.
    pub(super) fn bring_back(&mut self, page: u64, pages: Range<u64>) {
        let idle = |p: &u64| self.frames.state(*p as usize) == FrameState::Idle;
        let first = (pages.start..page).rev().take_while(idle).last().unwrap_or(page);
        let end = (page + 1..pages.end).take_while(idle).last().map_or(page + 1, |last| last + 1);
        self.frames.set_range(first as usize, end as usize, FrameState::Moving);
        let mut stayed = [0..0, 0..0, 0..0];
        let is_block = first.is_multiple_of(BLOCK as u64) && end - first == BLOCK as u64;
        if is_block && self.ram.is_huge(page) {
            // As one piece it stays one, once the page table is gone that the fault has left.
            self.ram.clear_table(first);
            stayed[0] = self.move_back(first..end);
        } else {
            (first..end).step_by(BLOCK).chain([end - 1]).for_each(|part| _ = self.ram.take_huge(part));
            // The one that somebody waits for goes first.
            stayed = [page..page + 1, first..page, page + 1..end].map(|pages| self.move_back(pages));
        }
        self.frames.set_range(first as usize, end as usize, FrameState::Active);
        if let Some(present) = self.ram.present() {
            present.set(first..end);
        }
        self.reclaim.counts.returned += end - first;
        self.reclaim.counts.hard = self.reclaim.counts.hard.saturating_sub(end - first);
        self.ageing.touched(first..end);
        stayed.into_iter().for_each(|pages| self.put_aside_again(pages));
    }

    /// Pages that are booked as back are aside still, because the host has no memory for what their mapping takes.
    fn put_aside_again(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        for state in [FrameState::Moving, FrameState::Idle] {
            self.frames.set_range(pages.start as usize, pages.end as usize, state);
        }
        if let Some(present) = self.ram.present() {
            present.clear(pages);
        }
        self.starve();
    }

    /// Moves pages from the stage to RAM; they are ours, so there is no way for this to fail for good. Returns those that are
    /// aside still, where the host has no memory.
    fn move_back(&mut self, pages: Range<u64>) -> Range<u64> {
        let mut at = pages.start;
        while at < pages.end {
            let (to, from) = (self.ram.hva(at), self.ram.hva(self.ram.other(at)));
            // SAFETY: the stage's pages are this thread's to give back; nobody else reads a page that is not claimed.
            match unsafe { self.uffd.move_pages(to, from, pages.end - at) } {
                Move::Moved(done) => at += done,
                Move::Busy => {}
                Move::NoMemory => break,
                // The page is neither here nor there: what the guest wrote is lost, and nothing may go on.
                other => broken(format_args!("idle page {at} cannot be moved back: {other:?}")),
            }
        }
        at..pages.end
    }

    /// Brings an evicted page back, and some behind it when the guest walks. When its content is lost, the guest will be
    /// ended, and the page stays as it is.
    pub(super) fn refault(&mut self, page: u64, reserve: bool) -> Charged {
        let most = if self.stock.debt() > Count(0) { 1 } else { READ_AROUND };
        let (window, stream) = self.around.window(page, self.ram.contiguous(page), most);
        let around = self.ageing.unwatched(page, window.first..window.first + window.pages);
        match self.read_back(page, around, reserve) {
            Ok(Refault::Dry) => Charged::Dry,
            Ok(Refault::Later) => Charged::Later,
            Ok(Refault::Back(pages)) => {
                self.ageing.refaulted(page);
                self.around.filled(stream, Window { first: page, pages });
                Charged::Served
            }
            Err(corrupt) => {
                self.corrupt = Some(corrupt);
                Charged::Served
            }
        }
    }

    /// Brings an evicted page back, charged like any touch, and those of `around` that follow it and are evicted too, as
    /// long as there is stock for them.
    ///
    /// # Errors
    /// When a content is not in the store any more: the guest cannot go on.
    fn read_back(&mut self, page: u64, around: Range<u64>, reserve: bool) -> Result<Refault, Corrupt> {
        let found = self.refault_one(page, reserve)?;
        if found == Refault::Dry {
            return Ok(found);
        }
        let mut next = page + 1;
        while next < around.end && self.frames.state(next as usize) == FrameState::Swapped {
            if found == Refault::Later {
                // What is in the file, too, is read with it.
                let place = self.place(next);
                if place.slot().is_none() || self.reclaim.find(next, place)? {
                    break;
                }
            } else if self.refault_one(next, false)? != Refault::Back(1) {
                break;
            } else {
                self.reclaim.counts.read_around += 1;
            }
            next += 1;
        }
        self.stock.owe(self.cost());
        Ok(if found == Refault::Later { found } else { Refault::Back(next - page) })
    }

    /// Where the content of an evicted page is.
    pub(super) fn place(&self, page: u64) -> Place {
        Place::from_raw(self.frames.place(page as usize))
            .unwrap_or_else(|| broken(format_args!("evicted page {page} is nowhere")))
    }

    fn refault_one(&mut self, page: u64, reserve: bool) -> Result<Refault, Corrupt> {
        let place = self.place(page);
        if !self.reclaim.find(page, place)? {
            return Ok(Refault::Later);
        }
        let from_reserve = !self.has_stock();
        let content = &self.reclaim.content;
        let Some(reservation) = (match from_reserve {
            false => self.stock.prepare(Count(1)),
            true if reserve => self.stock.prepare_reserve(),
            true => None,
        }) else {
            return Ok(Refault::Dry);
        };
        loop {
            match self.uffd.fill_with(self.ram.hva(page), &content[..]) {
                Fill::Filled(_) => break,
                Fill::RetryLater => {}
                Fill::NoMemory => {
                    drop(reservation);
                    self.starve();
                    return Ok(Refault::Dry);
                }
                // Only this thread fills a page that is not there.
                other => broken(format_args!("evicted page {page} cannot be filled: {other:?}")),
            }
        }
        reservation.commit(Count(1));
        self.counts.from_reserve += u64::from(from_reserve);
        self.reclaim.release(page, place)?;
        self.frames.set(page as usize, FrameState::Active);
        if let Some(present) = self.ram.present() {
            present.set(page..page + 1);
        }
        self.reclaim.counts.refaulted += 1;
        Ok(Refault::Back(1))
    }

    /// The guest does not want these evicted pages any more.
    pub(super) fn forget(&mut self, pages: Range<u64>) {
        for page in pages {
            let place = self.place(page);
            // A damaged entry is as good as forgotten: nobody will ask for it.
            let _ = self.reclaim.release(page, place);
        }
    }

    /// What is known of cold pages, for a report.
    pub(super) fn cold(&self) -> Cold {
        let pages = |histogram: memcg_core::frame::Histogram| histogram.pages.map(|pages| pages.0);
        let estimate = self.ageing.estimate();
        Cold {
            hard: self.reclaim.counts.hard.min(self.frames.count(FrameState::Idle)),
            generation_ms: self.ageing.generation_ms(),
            working_set: estimate.map(|estimate| estimate.pages.0),
            error: estimate.map_or(0, |estimate| estimate.error.0),
            ages: pages(self.frames.ages()),
            refaults: pages(self.frames.refaults()),
            ..self.reclaim.counts
        }
    }
}

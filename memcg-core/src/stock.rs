//! The worker's side of the account: pages that were charged before they exist.
//!
//! ```text
//!  controller ──grant──► reserve (filled first) ─┐ prepare_reserve, when the stock is empty
//!                        stock ──────────────────┼─prepare─► guest pages
//!      ▲                   ▲                     │                │
//!      └──── give_back ────┴──────── uncharge ◄──┴────────────────┘ (repays the reserve first)
//!                        stock ── owe ──► what the guest's pages cost beside them; it stays until the VM ends
//!                        stock ── set_aside ──► ahead: stock that has memory already ── use_ahead ──► guest pages
//!                        guest pages ── evicted ──► store: their compressed contents; the rest repays or is stock
//! ```
//!
//! At any moment `granted_total - returned_total == guest + store + stock + ahead + reserve + paid`: each page that the controller has
//! charged is in exactly one place. Totals are cumulative and carry an epoch, so a message that is lost or repeated cannot
//! count a page twice.
//!
//! **The reserve** is charged like everything else, inside `max`. It answers faults that could not be charged in time;
//! what is missing from it is the *debt*, and the vCPUs are held until the debt is repaid. A grant and an uncharge
//! both repay the debt before they fill the stock.
//!
//! **Stock that has memory already** ([`Stock::set_aside`]). A worker zeroes huge pages before its guest touches them. They are
//! stock for everybody else: a part of what `stock_max` allows and of what is asked for; but they can only be given back when
//! their memory is gone ([`Stock::put_back`]).
//!
//! **What pages cost** ([`Stock::owe`]). Pages that a guest uses need page tables and records. They are paid for with pages
//! of the stock, so what a VM uses in all stays inside what it was granted, however its cost grows. What the stock cannot
//! pay at once is debt, too: the next pages repay it after the reserve, and before the guest gets any.
//!
//! **Epochs.** An epoch is one life of the controller. The first grant of a newer epoch is a recount: the worker's
//! totals restart at what it holds (`granted_total = guest + store + stock + ahead + reserve + paid`, `returned_total = 0`), and the grant's
//! total counts from there. The new controller charges what the worker's report says it holds and grants on top of
//! that. Pages that an old controller granted and that never arrived die with it; pages given back in between are
//! granted again by the same arithmetic. A grant of an older epoch, and a total below the one known, are errors that
//! change nothing.
//!
//! **Accounting that begins on a running VM** ([`Stock::adopt`]). The worker finds N pages resident and reports them; the
//! controller charges them at once, whatever the limits, and grants on top. So the account starts with N pages granted
//! and in the guest, an empty stock and all of the reserve in debt: until the first grant there is nothing that a fault
//! could be answered with, and nothing to give back.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 4, B65, B66 | an uncharge below zero is clamped, counted and stops a debug build |
//! | 17, 106-108, B13 | [`Stock::prepare`] → fill → [`StockReservation::commit`], or drop = refund |
//! | 18 | a fill that lost its race commits fewer pages than it prepared |
//! | 46 | [`Stock::prepare_reserve`]: a fault is answered from the reserve, so it never waits for reclaim, which may need the faulting vCPU |
//! | 59, 60 | charged ahead of need, drained by [`Stock::recall`]; less than what was wanted may be taken |
//! | 61, B70 | [`Stock::want`] is for pages ahead of need and never a reason to reclaim; [`Stock::want_now`] may be |
//! | 64, T11, B50 | a large want is answered once, with what there is: a granule falls back to single pages |
//! | 67, 68 | [`Stock::adopt`]: what is resident when accounting begins |
//! | 27 | [`Stock::evicted`] is called when contents are in the store and the pages' memory is back |
//!
//! Nothing here allocates: it is on the fault path.

use crate::frame::Cost;
use crate::reclaim::STOCK_CAP;
use crate::units::Pages;

/// The batch that a fresh stock asks for: one granule of 64 KiB.
const FIRST_BATCH: u64 = 16;

/// Near a limit a batch is at most one part in so many of the room.
const ROOM_SHARE: u64 = 8;

/// Why a grant was not taken. Nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StockError {
    /// A message of a controller that is gone.
    #[error("grant of epoch {got}, but epoch {known} has begun")]
    OldEpoch {
        /// Epoch of the message.
        got: u32,
        /// Epoch in force.
        known: u32,
    },
    /// A cumulative total can only grow.
    #[error("granted total {got} is below {known}, which is already granted")]
    TotalFell {
        /// Total of the message.
        got: u64,
        /// Total known; after a change of epoch, the pages held.
        known: u64,
    },
}

/// The account of one worker.
#[derive(Clone, Debug)]
pub struct Stock {
    epoch: u32,
    granted_total: u64,
    returned_total: u64,
    guest: Pages,
    store: Pages,
    stock: Pages,
    ahead: Pages,
    reserve: Pages,
    reserve_target: Pages,
    cost: Cost,
    paid: Cost,
    stock_max: Pages,
    room: Option<Pages>,
    /// Pages asked for ahead of need, before the caps.
    batch: Pages,
    /// Pages that went from the stock to the guest since the batch was last judged by a grant.
    used: Pages,
    /// The same since the last [`Stock::tick`].
    used_tick: Pages,
    underflows: u64,
}

impl Stock {
    /// An empty account whose reserve is to hold `reserve_target` pages (65 a vCPU + 64; 0 when nothing is charged).
    /// It starts in debt: nothing is granted yet.
    pub fn new(reserve_target: Pages) -> Stock {
        Stock {
            epoch: 0,
            granted_total: 0,
            returned_total: 0,
            guest: Pages::ZERO,
            store: Pages::ZERO,
            stock: Pages::ZERO,
            ahead: Pages::ZERO,
            reserve: Pages::ZERO,
            reserve_target,
            cost: Cost::default(),
            paid: Cost::default(),
            stock_max: Pages::ZERO,
            room: None,
            batch: Pages(FIRST_BATCH),
            used: Pages::ZERO,
            used_tick: Pages::ZERO,
            underflows: 0,
        }
    }

    /// The account of a worker whose guest holds `guest` pages when accounting begins, in the controller's life `epoch`.
    /// They are charged without having been granted: totals go on from there. The reserve is owed.
    pub fn adopt(epoch: u32, reserve_target: Pages, guest: Pages) -> Stock {
        Stock { epoch, granted_total: guest.0, guest, ..Stock::new(reserve_target) }
    }

    /// Takes a grant: `granted_total` pages in this epoch so far, of which the new ones refill the reserve, then the
    /// stock. `stock_max` and `room` (`None`: no limit) hold from now on. Returns the pages that are new; a repeated
    /// message gives zero.
    ///
    /// # Errors
    /// [`StockError`] when the message is of an older epoch or its total went back; nothing has changed then.
    pub fn grant(
        &mut self,
        epoch: u32,
        granted_total: u64,
        stock_max: Pages,
        room: Option<Pages>,
    ) -> Result<Pages, StockError> {
        if epoch < self.epoch {
            return Err(StockError::OldEpoch { got: epoch, known: self.epoch });
        }
        let recount = epoch > self.epoch;
        let known = if recount { self.held().0 } else { self.granted_total };
        let new = granted_total.checked_sub(known).ok_or(StockError::TotalFell { got: granted_total, known })?;
        if recount {
            self.epoch = epoch;
            self.returned_total = 0;
        }
        self.granted_total = granted_total;
        if new > 0 {
            // By the caps that held while the batch was used, hence before the new ones.
            self.judge_batch();
            self.refill(Pages(new));
        }
        self.stock_max = stock_max;
        self.room = room;
        Ok(Pages(new))
    }

    /// Doubles the batch when the stock ran (nearly) dry before the grant that was asked for at half of it arrived:
    /// then faults are faster than the round trip.
    fn judge_batch(&mut self) {
        let batch = self.effective_batch();
        let dry = self.whole_stock() < part(batch, 4) && self.used >= part(batch, 2);
        if !batch.is_zero() && (dry || self.used >= batch) {
            // From what was really in force: a batch that a limit kept small must not grow unseen behind it.
            self.batch = Pages(batch.0 * 2).min(STOCK_CAP);
        }
        self.used = Pages::ZERO;
    }

    /// So many pages are about to be used: the batch is at least as large, within its caps, without waiting for the stock to
    /// run dry.
    #[inline]
    pub fn expect(&mut self, pages: Pages) {
        self.batch = self.batch.max(pages.min(STOCK_CAP));
    }

    /// A steady beat (about once a second): a beat with less than a quarter of the batch used halves the batch.
    pub fn tick(&mut self) {
        if self.used_tick < part(self.batch, 4) {
            self.batch = Pages((self.batch.0 / 2).max(1));
        }
        self.used_tick = Pages::ZERO;
    }

    /// Puts free charged pages where they belong: the reserve first.
    #[inline]
    fn refill(&mut self, pages: Pages) {
        let repaid = pages.min(self.reserve_target.saturating_sub(self.reserve));
        self.reserve += repaid;
        self.stock += pages.saturating_sub(repaid);
        self.pay();
    }

    /// The guest's pages have cost so much by now. Less than before changes nothing.
    #[inline]
    pub fn owe(&mut self, cost: Cost) {
        self.cost = Cost { tables: cost.tables.max(self.cost.tables), records: cost.records.max(self.cost.records) };
        self.pay();
    }

    /// Pays with the stock what it can.
    #[inline]
    fn pay(&mut self) {
        let Cost { tables, records } = self.cost;
        for (owed, paid) in [(tables, &mut self.paid.tables), (records, &mut self.paid.records)] {
            let pages = owed.saturating_sub(*paid).min(self.stock);
            *paid += pages;
            self.stock = self.stock.saturating_sub(pages);
        }
    }

    /// Takes up to `want` pages from the stock for a fill, `None` when it is empty or `want` is zero. Less than `want`
    /// means: fill a smaller run.
    #[inline]
    #[must_use = "dropped, the pages go back at once"]
    pub fn prepare(&mut self, want: Pages) -> Option<StockReservation<'_>> {
        let pages = want.min(self.stock);
        if pages.is_zero() {
            return None;
        }
        self.stock = self.stock.saturating_sub(pages);
        Some(StockReservation { account: self, pages, source: Source::Stock })
    }

    /// Takes exactly one page from the reserve, for a fault that cannot wait; it becomes debt. `None` when the reserve
    /// is used up, which its size makes impossible for guest faults.
    #[inline]
    #[must_use = "dropped, the pages go back at once"]
    pub fn prepare_reserve(&mut self) -> Option<StockReservation<'_>> {
        self.reserve = self.reserve.checked_sub(Pages::ONE)?;
        Some(StockReservation { account: self, pages: Pages::ONE, source: Source::Reserve })
    }

    /// `pages` guest pages are gone: their charge repays the reserve first, the rest is stock.
    ///
    /// More than there are is a bug of the caller: it is clamped, counted in [`Self::underflows`], and stops a debug
    /// build.
    #[inline]
    pub fn uncharge(&mut self, pages: Pages) {
        let real = pages.min(self.guest);
        if real != pages {
            self.underflows += 1;
            debug_assert!(false, "uncharge of {pages} with {} charged", self.guest);
        }
        self.guest = self.guest.saturating_sub(real);
        self.refill(real);
    }

    /// The contents of `pages` guest pages are in the store, which takes `store` pages of memory now: what that frees
    /// repays the reserve first, the rest is stock. With no pages, the store has only changed its size: what has died in
    /// it comes back so.
    ///
    /// A store that takes more than it had and was given is a bug of the caller: it is clamped, counted in
    /// [`Self::underflows`], and stops a debug build.
    pub fn evicted(&mut self, pages: Pages, store: Pages) {
        let (real, most) = (pages.min(self.guest), pages.min(self.guest) + self.store);
        if real != pages || store > most {
            self.underflows += 1;
            debug_assert!(false, "{pages} of {} evicted into a store of {store}, it had {}", self.guest, self.store);
        }
        self.guest = self.guest.saturating_sub(real);
        self.store = store.min(most);
        self.refill(most.saturating_sub(self.store));
    }

    /// Sets `pages` of the stock aside for memory that is to exist before it is touched. False, and nothing has changed, when
    /// the stock has fewer.
    pub fn set_aside(&mut self, pages: Pages) -> bool {
        let Some(left) = self.stock.checked_sub(pages) else { return false };
        self.stock = left;
        self.ahead += pages;
        true
    }

    /// Memory of `pages` that were set aside is the guest's now.
    ///
    /// More than there are is a bug of the caller: it is clamped, counted in [`Self::underflows`], and stops a debug build.
    pub fn use_ahead(&mut self, pages: Pages) {
        let real = self.off_ahead(pages);
        self.guest += real;
        self.used += real;
        self.used_tick += real;
    }

    /// `pages` that were set aside have no memory: they repay the reserve first, the rest is stock.
    ///
    /// More than there are is a bug of the caller, as with [`Self::use_ahead`].
    pub fn put_back(&mut self, pages: Pages) {
        let real = self.off_ahead(pages);
        self.refill(real);
    }

    fn off_ahead(&mut self, pages: Pages) -> Pages {
        let real = pages.min(self.ahead);
        if real != pages {
            self.underflows += 1;
            debug_assert!(false, "{pages} of {} that were set aside", self.ahead);
        }
        self.ahead = self.ahead.saturating_sub(real);
        real
    }

    /// Stock above what the controller allows, and above a `margin` that is to stay all the same: to be given back, as far as
    /// it has no memory yet.
    pub fn surplus(&self, margin: Pages) -> Pages {
        self.whole_stock().saturating_sub(self.stock_max.max(margin)).min(self.stock)
    }

    /// Gives back up to `pages` of the stock; returns how many. They are no longer the worker's once this returns; the
    /// next report tells the controller.
    pub fn give_back(&mut self, pages: Pages) -> Pages {
        let given = pages.min(self.stock);
        self.stock = self.stock.saturating_sub(given);
        self.returned_total += given.0;
        // Others may be faster; then the next grant says so.
        self.room = self.room.map(|room| room + given);
        given
    }

    /// Gives back all stock; the reserve stays. Returns how many pages.
    pub fn recall(&mut self) -> Pages {
        self.give_back(self.stock)
    }

    /// Pages that cannot wait: the debt, and those of the `waiting` faults that the stock does not cover.
    pub fn want_now(&self, waiting: Pages) -> Pages {
        self.debt() + waiting.saturating_sub(self.stock)
    }

    /// Pages to ask for: [`Self::want_now`], and a batch ahead of need as soon as the stock falls under half of it, or
    /// under three quarters while some has memory already.
    ///
    /// The batch adapts: it doubles, up to 16 MiB, while faults empty it faster than grants arrive, is halved by each
    /// idle [`Self::tick`], and is never more than the controller's `stock_max` or one eighth of the room, but at
    /// least one page while any stock is allowed.
    pub fn want(&self, waiting: Pages) -> Pages {
        let now = self.want_now(waiting);
        let left = self.whole_stock().saturating_sub(waiting);
        let batch = self.effective_batch();
        // What has memory already is used fast, and in large pieces.
        let enough = if self.ahead.is_zero() { part(batch, 2) } else { batch.saturating_sub(part(batch, 4)) };
        if left < enough { now + batch.saturating_sub(left) } else { now }
    }

    /// The batch with its caps.
    fn effective_batch(&self) -> Pages {
        let near = self.room.map_or(STOCK_CAP, |room| Pages((room.0 / ROOM_SHARE).max(1)));
        self.batch.min(near).min(self.stock_max).min(STOCK_CAP)
    }

    /// Pages in the guest: filled and charged.
    pub fn guest(&self) -> Pages {
        self.guest
    }

    /// Pages of memory that the contents of evicted pages take.
    pub fn store(&self) -> Pages {
        self.store
    }

    /// Pages charged ahead of need that have no memory.
    pub fn stock(&self) -> Pages {
        self.stock
    }

    /// Pages of the stock that have memory already, or are to get it.
    pub fn ahead(&self) -> Pages {
        self.ahead
    }

    /// Pages charged ahead of need, with memory or without.
    pub fn whole_stock(&self) -> Pages {
        self.stock + self.ahead
    }

    /// Pages left in the reserve.
    pub fn reserve(&self) -> Pages {
        self.reserve
    }

    /// What the reserve should hold.
    pub fn reserve_target(&self) -> Pages {
        self.reserve_target
    }

    /// Pages missing from the reserve, and those that what the guest's pages cost has not been paid with yet.
    #[inline]
    pub fn debt(&self) -> Pages {
        let owed = self.cost.total().saturating_sub(self.paid.total());
        self.reserve_target.saturating_sub(self.reserve) + owed
    }

    /// What the guest's pages cost, as far as it has been paid.
    pub fn paid(&self) -> Cost {
        self.paid
    }

    /// Everything the controller has charged for this worker: guest + store + stock + ahead + reserve + what was paid.
    pub fn held(&self) -> Pages {
        self.guest + self.store + self.stock + self.ahead + self.reserve + self.paid.total()
    }

    /// Pages granted in this epoch.
    pub fn granted_total(&self) -> u64 {
        self.granted_total
    }

    /// Pages given back in this epoch.
    pub fn returned_total(&self) -> u64 {
        self.returned_total
    }

    /// Epoch of the last grant, 0 before the first.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// The stock that the controller allows.
    pub fn stock_max(&self) -> Pages {
        self.stock_max
    }

    /// Pages that could still be charged when the last grant was sent, and those given back since; `None` without a limit.
    pub fn room(&self) -> Option<Pages> {
        self.room
    }

    /// Uncharges that asked for more than was there. Anything but 0 is a bug.
    pub fn underflows(&self) -> u64 {
        self.underflows
    }

    /// Whether each charged page is in exactly one place.
    pub fn is_balanced(&self) -> bool {
        self.granted_total.checked_sub(self.returned_total) == Some(self.held().0)
            && self.reserve <= self.reserve_target
    }
}

/// One part in `parts` of `pages`, rounded up: so that `n < part(pages, parts)` says `n * parts < pages` of any number.
fn part(pages: Pages, parts: u64) -> Pages {
    Pages(pages.0.div_ceil(parts))
}

/// Where the pages of a reservation came from, and where the unused ones go back to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Stock,
    Reserve,
}

/// Charged pages on their way into the guest. Dropped, it puts them back where they came from.
#[derive(Debug)]
#[must_use = "dropped, the pages go back at once"]
pub struct StockReservation<'a> {
    account: &'a mut Stock,
    pages: Pages,
    source: Source,
}

impl StockReservation<'_> {
    /// Pages reserved, at least one.
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// `used` of the pages are in the guest now; the rest goes back. Cannot fail.
    ///
    /// More than was reserved is a bug of the caller: it is clamped, counted as an underflow, and stops a debug build.
    #[inline]
    pub fn commit(mut self, used: Pages) {
        let real = used.min(self.pages);
        if real != used {
            self.account.underflows += 1;
            debug_assert!(false, "commit of {used} with {} reserved", self.pages);
        }
        self.pages = self.pages.saturating_sub(real);
        self.account.guest += real;
        if self.source == Source::Stock {
            self.account.used += real;
            self.account.used_tick += real;
        }
    }
}

impl Drop for StockReservation<'_> {
    #[inline]
    fn drop(&mut self) {
        match self.source {
            Source::Stock => self.account.stock += self.pages,
            Source::Reserve => self.account.reserve += self.pages,
        }
    }
}

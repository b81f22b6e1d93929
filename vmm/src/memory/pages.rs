//! The owner of a guest's pages: frame table, stock and what waits for them.
//!
//! [`Pages`] belongs to the fault thread and is plain data apart from the system calls that fill and wake. Nothing here
//! waits for user space, allocates, logs or locks. Each fault is answered when it is read:
//!
//! ```text
//!  state of the page     what happens
//!  ABSENT, BALLOONED     charge from the stock, fill, wake; with an empty stock one page from the reserve
//!  ACTIVE                somebody was faster: wake
//!  IDLE                  move back from the stage, wake
//!  SWAPPED               charge as above, decompress, wake; remembered as wanted while its content is read from a file
//!  claimed               remembered as wanted, served when the claim ends (a few system calls later)
//! ```
//! The last three are the business of [`super::cold`].
//!
//! A guest that walks through new memory gets whole blocks, as huge pages, where there is much room ([`super::huge`]).
//!
//! What the pages cost beside them ([`FrameTable::cost`]) is paid for with pages of the stock at the same time, so it is
//! inside `max` too.
//!
//! What the guest has reported as free is discarded unless most of what it has reported before came back at once
//! ([`memcg_core::reporting`]).
//!
//! A page from the reserve is a *debt*. When the controller cannot grant what would repay it, the vCPUs are held until
//! it can ([`crate::worker::gate`]). The reserve is charged inside `max`, so usage never exceeds the limit.

use std::ops::Range;
use std::sync::Arc;

use memcg_core::frame::{BLOCK, Cost, FrameState, FrameTable};
use memcg_core::reporting::Reports;
use memcg_core::stock::Stock;
use memcg_core::units::Pages as Count;

use super::ageing::{Ageing, Plan};
use super::around::{Around, Window};
use super::asked::Asked;
use super::client::{Reply, Run};
use super::cold::Reclaim;
use super::fill::fill;
use super::histogram::Histogram;
use super::huge::{Blocks, Due, Patience};
use super::ram::Ram;
use super::refill::Refill;
use super::stall::Stall;
use super::store::Corrupt;
use super::uffd::Uffd;
use crate::devices::balloon::BalloonHandle;
use crate::worker::broken;
use crate::worker::gate::{self, Gate, monotonic_ns};
use crate::worker::protocol::{FaultCounts, Report};

/// Pages that VMM threads may take from the reserve (ring pages of devices).
const DEVICE_RESERVE: u64 = 64;

/// Pages that the reserve needs for `cpus` vCPUs: each may have one fault of its own and 64 in KVM's workers, and devices
/// have `DEVICE_RESERVE`.
pub fn reserve_target(cpus: u32) -> u64 {
    65 * u64::from(cpus) + DEVICE_RESERVE
}

/// A fault fills at most one part in so many of the room that is left: 32 pages with 4 MiB, and nothing but the touched
/// page with less than 256 KiB. What is filled around a touch is charged and may never be used, and the ceiling of a limit
/// that is being lowered leaves little more than a MiB, which the guest's balloon driver needs for itself.
const AROUND_SHARE: u64 = 32;

/// A walk asks ahead for so many times the pages of a fault.
const WALK_AHEAD: u64 = 4;

/// Time between two beats of the stock, in nanoseconds.
const BEAT_NS: u64 = 1_000_000_000;

/// A run that the loader waits for.
#[derive(Debug)]
struct PendingFill {
    client: usize,
    left: Range<u64>,
}

/// Addresses of faults, as they were read.
#[derive(Debug)]
struct Batch {
    addresses: [u64; 64],
    count: usize,
    /// How many of them have been served.
    served: usize,
}

impl Default for Batch {
    fn default() -> Self {
        Self { addresses: [0; 64], count: 0, served: 0 }
    }
}

/// What became of a touch of a page that has no memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Charged {
    /// It is charged and there.
    Served,
    /// There was nothing left to charge it to.
    Dry,
    /// Its content is being read, and nothing is charged yet.
    Later,
}

/// Frame table, stock and everything that changes with them.
#[derive(Debug)]
pub struct Pages {
    pub(super) ram: Arc<Ram>,
    pub(super) uffd: Arc<Uffd>,
    pub(super) frames: FrameTable,
    pub(super) stock: Stock,
    pub(super) reclaim: Reclaim,
    pub(super) refill: Refill,
    pub(super) ageing: Ageing,
    pub(super) gate: Arc<Gate>,
    pub(super) around: Around,
    /// It walks through new memory, and has not stopped that for a second.
    pub(super) walks: bool,
    pub(super) due: Option<Due>,
    pub(super) patience: Patience,
    /// Faults that were read and not answered yet.
    batch: Batch,
    pub(super) counts: FaultCounts,
    waiting: Vec<u64>,
    pending: Option<PendingFill>,
    /// Changes places with the vector of each claim, so that claims allocate nothing once it has grown.
    pub(super) spare_runs: Vec<Run>,
    asked: Asked,
    pub(super) reports: Reports,
    /// Seconds since the host was started, as the thread last knew.
    pub(super) now: u32,
    /// The host had no memory for a page, and until when that is believed, in nanoseconds.
    pub(super) starved: Option<u64>,
    /// The store is damaged: the content of a page is lost, and the guest cannot go on.
    pub(super) corrupt: Option<Corrupt>,
    device_taken: u64,
    pub(super) device_blocked: bool,
    balloon: BalloonHandle,
    held_since: Option<u64>,
    held_ns: u64,
    pub(super) stall: Stall,
    /// The gate was closed and the last vCPU has not come out yet.
    leaving: bool,
    pub(super) answer_times: Histogram,
    hold_times: Histogram,
    beat_ns: u64,
}

impl Pages {
    /// The owner of `ram`, which is registered with `uffd`. `balloon` is told when an access
    /// that was refused is worth trying again.
    pub fn new(
        ram: Arc<Ram>,
        uffd: Uffd,
        gate: Arc<Gate>,
        cpus: u32,
        balloon: BalloonHandle,
        reclaim: Reclaim,
        plan: Plan,
    ) -> Self {
        let reserve = reserve_target(cpus);
        let uffd = Arc::new(uffd);
        ram.set_uffd(uffd.clone());
        Self {
            frames: FrameTable::new(ram.pages() as usize),
            stock: Stock::new(Count(reserve)),
            around: Around::new(cpus),
            walks: false,
            due: None,
            patience: Patience::default(),
            batch: Batch::default(),
            counts: FaultCounts::default(),
            // More faults than the reserve has pages cannot wait at once but for claimed pages, one a thread.
            waiting: Vec::with_capacity(4 * reserve as usize),
            pending: None,
            spare_runs: Vec::new(),
            asked: Asked::default(),
            reports: Reports::new(ram.pages() as usize),
            now: seconds(monotonic_ns()),
            starved: None,
            corrupt: None,
            reclaim,
            refill: Refill::default(),
            ageing: Ageing::new(plan, cpus),
            device_taken: 0,
            device_blocked: false,
            balloon,
            held_since: None,
            held_ns: 0,
            stall: Stall::default(),
            leaving: false,
            answer_times: Histogram::default(),
            hold_times: Histogram::default(),
            beat_ns: monotonic_ns(),
            ram,
            uffd,
            gate,
        }
    }

    /// Takes over what was resident before charging began, in the controller's life `epoch`. The reserve is owed.
    pub fn adopt(&mut self, epoch: u32, resident: &[Run]) {
        let present = self.ram.begin_charging();
        for run in resident {
            let pages = run.first..run.first + run.pages;
            self.frames.set_range(pages.start as usize, pages.end as usize, FrameState::Active);
            present.set(pages);
        }
        let guest = Count(self.frames.count(FrameState::Active));
        self.stock = Stock::adopt(epoch, self.stock.reserve_target(), guest);
        self.stock.owe(self.cost());
    }

    /// What the guest's use of its pages has cost so far.
    pub(super) fn cost(&self) -> Cost {
        self.frames.cost().with_huge(self.ram.huge_blocks())
    }

    /// What is damaged in the store, if a page's content was lost: the guest cannot go on.
    pub fn corrupt(&self) -> Option<Corrupt> {
        self.corrupt
    }

    /// The userfaultfd.
    pub fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Reads a batch of faults, or goes on with the last one, and answers it up to the first answer that is
    /// [due](Pages::fill_due); returns how many were answered. `woken_ns` is when the thread learnt of them.
    pub fn on_faults(&mut self, woken_ns: u64) -> usize {
        self.now = seconds(woken_ns);
        if self.batch.served == self.batch.count {
            (self.batch.served, self.batch.count) = (0, 0);
            let batch = &mut self.batch;
            self.uffd.read::<64>(|event| {
                batch.addresses[batch.count] = event.address;
                batch.count += 1;
            });
        }
        let before = self.batch.served;
        while self.batch.served < self.batch.count && !self.is_due() {
            let address = self.batch.addresses[self.batch.served];
            self.batch.served += 1;
            self.counts.events += 1;
            // Nobody but us knows of the stage, and there nothing that is missing is touched.
            let page = self.ram.index_of_hva(address);
            let page = page.unwrap_or_else(|| broken(format_args!("a fault at {address:#x}, which is no RAM")));
            let evicted = self.frames.state(page as usize) == FrameState::Swapped;
            self.serve(page);
            if self.is_due() {
                self.due_since(woken_ns);
                continue;
            }
            let now = monotonic_ns();
            self.answer_times.record(now.saturating_sub(woken_ns));
            if evicted {
                self.stall.refault(woken_ns, now, self.frames.wanted(page as usize));
            }
        }
        self.batch.served - before
    }

    /// Whether faults were read that are not answered yet.
    pub fn has_faults(&self) -> bool {
        self.batch.served < self.batch.count
    }

    /// Answers one fault.
    fn serve(&mut self, page: u64) {
        match self.frames.state(page as usize) {
            FrameState::Active => {
                self.counts.stale += 1;
                self.uffd.wake(self.ram.hva(page), 1);
            }
            FrameState::Discarding | FrameState::Moving | FrameState::Evicting => self.wait_for(page),
            FrameState::Idle => {
                if !self.return_fault(page) {
                    self.wait_for(page);
                    self.hold();
                }
            }
            state @ (FrameState::Absent | FrameState::Ballooned | FrameState::Swapped) => {
                match self.charge_fault(page, state) {
                    Charged::Served => self.hold_if_short(),
                    Charged::Later => self.wait_for(page),
                    Charged::Dry => {
                        self.wait_for(page);
                        self.hold();
                    }
                }
            }
        }
    }

    /// Remembers a fault that cannot be answered now; the set is keyed by page, so a repeated event adds nothing.
    fn wait_for(&mut self, page: u64) {
        if !self.frames.wanted(page as usize) && self.waiting.len() < self.waiting.capacity() {
            self.frames.set_wanted(page as usize, true);
            self.waiting.push(page);
        }
    }

    /// Answers a touch of a page that has no memory.
    fn charge_fault(&mut self, page: u64, state: FrameState) -> Charged {
        match state {
            FrameState::Swapped => self.refault(page, true),
            _ => self.fill_fault(page, state),
        }
    }

    /// Brings an idle page back: its whole block, if that was moved aside as one, or as many as a walk is worth; but for a
    /// huge page, which is touched as a whole, none that ageing has to see touched. False when the host has no memory for it.
    fn return_fault(&mut self, page: u64) -> bool {
        let begin = monotonic_ns();
        let slot = self.ram.contiguous(page);
        if let Some(block) = self.frames.whole_block(page as usize) {
            let block = block.start as u64..(block.end as u64).min(slot.end);
            let pages = if self.ram.is_huge(page) { block } else { self.ageing.unwatched(page, block) };
            self.bring_back(page, pages);
        } else {
            let (window, stream) = self.around.window(page, slot, BLOCK as u64);
            let pages = self.ageing.unwatched(page, window.first..window.first + window.pages);
            let window = Window { first: pages.start, pages: pages.end - pages.start };
            self.bring_back(page, pages);
            self.around.filled(stream, window);
        }
        self.ageing.answered(monotonic_ns().saturating_sub(begin));
        self.frames.state(page as usize) == FrameState::Active
    }

    /// Charges and fills the touched page, and what lies around it when that is promising.
    fn fill_fault(&mut self, page: u64, state: FrameState) -> Charged {
        let single = state == FrameState::Ballooned || self.stock.debt() > Count(0);
        let most = if single { 1 } else { self.stock.room().map_or(u64::MAX, |room| room.0 / AROUND_SHARE) };
        let blocks = if single { 0 } else { self.most_in_blocks() };
        let (window, stream) = self.around.window(page, self.ram.contiguous(page), most.max(blocks));
        self.stock.expect(Count(WALK_AHEAD * window.pages));
        let filled = match if blocks > 0 { self.fill_blocks(window, page) } else { Blocks::None } {
            Blocks::Filled(filled) => Some(filled),
            Blocks::Later => return Charged::Later,
            Blocks::None => {
                let window = self.absent_in(window.cut(page, most), page);
                self.charge_and_fill(window, page, true)
            }
        };
        let Some(filled) = filled else { return Charged::Dry };
        self.around.filled(stream, filled);
        self.counts.touched += 1;
        self.counts.around += filled.pages - 1;
        if state == FrameState::Ballooned {
            self.counts.implicit_deflates += 1;
        }
        Charged::Served
    }

    /// Charges what it can of `window`, the page `touched` in it first of all, and fills that. With `reserve` an empty stock
    /// is no reason to fail: one page comes from the reserve. Returns what was filled.
    pub(super) fn charge_and_fill(&mut self, window: Window, touched: u64, reserve: bool) -> Option<Window> {
        let mut cut = window;
        let missing;
        if self.has_stock()
            && let Some(reservation) = self.stock.prepare(Count(window.pages))
        {
            if reservation.pages().0 < window.pages {
                cut.first = touched;
                cut.pages = reservation.pages().0.min(window.first + window.pages - touched);
            }
            missing = fill(&self.uffd, &self.ram, cut, touched);
            reservation.commit(Count(cut.pages));
        } else {
            let reservation = if reserve { self.stock.prepare_reserve()? } else { return None };
            cut = Window { first: touched, pages: 1 };
            missing = fill(&self.uffd, &self.ram, cut, touched);
            reservation.commit(Count(1));
            self.counts.from_reserve += 1;
        }
        self.filled(cut.first..cut.first + cut.pages);
        let is_there = !missing.iter().any(|pages| pages.contains(&touched));
        missing.into_iter().for_each(|pages| self.give_up(pages));
        is_there.then_some(cut)
    }

    /// Books pages that have just got their memory.
    pub(super) fn filled(&mut self, pages: Range<u64>) {
        self.frames.set_range(pages.start as usize, pages.end as usize, FrameState::Active);
        self.counts.reported_back += self.reports.filled(self.now, pages.start as usize..pages.end as usize);
        if let Some(present) = self.ram.present() {
            present.set(pages);
        }
        self.stock.owe(self.cost());
    }

    /// The absent pages of `window` that lie in one piece with the touched page, which is filled whatever it is.
    fn absent_in(&self, window: Window, touched: u64) -> Window {
        let absent = |p: &u64| self.frames.state(*p as usize) == FrameState::Absent;
        let first = (window.first..touched).rev().take_while(absent).last().unwrap_or(touched);
        let last = (touched + 1..window.first + window.pages).take_while(absent).last().unwrap_or(touched);
        Window { first, pages: last + 1 - first }
    }

    /// Holds the vCPUs when the reserve is being used and the controller has said no, or when half of it is gone.
    fn hold_if_short(&mut self) {
        let debt = self.stock.debt();
        if debt > Count(0) && (self.is_refused() || debt > self.stock.reserve()) {
            self.hold();
        }
    }

    /// Whether the controller has nothing to grant.
    pub(super) fn is_refused(&self) -> bool {
        self.asked.refused() || self.stock.room() == Some(Count(0))
    }

    pub(super) fn hold(&mut self) {
        // Looked at before: on a busy host all may be out when the kicks are done.
        let (since, were_out) = (monotonic_ns(), self.gate.all_out());
        if self.gate.hold(gate::NO_MEMORY) {
            self.held_since = Some(since);
            self.leaving = !were_out;
        }
    }

    /// The last vCPU has come out.
    pub fn on_all_out(&mut self) {
        if let Some(since) = self.held_since
            && self.gate.all_out()
            && std::mem::take(&mut self.leaving)
        {
            self.hold_times.record(self.gate.all_out_ns().saturating_sub(since));
        }
    }

    /// A grant has come. Unknown totals are refused by the stock, whose word is the caller's reason to give up.
    ///
    /// # Errors
    /// When the totals contradict what was granted before.
    pub fn on_grant(
        &mut self,
        epoch: u32,
        granted_total: u64,
        stock_max: u64,
        room: Option<Count>,
        refused: bool,
    ) -> Result<Option<(usize, Reply)>, memcg_core::stock::StockError> {
        let new = self.stock.grant(epoch, granted_total, Count(stock_max), room)?;
        self.asked.answered(new, refused);
        self.patience.granted();
        let reply = self.settle();
        if self.walks {
            self.order_blocks();
        }
        if refused {
            self.hold_if_short();
        }
        Ok(reply)
    }

    /// Serves what waits, as far as the stock goes, opens the gate when nothing is owed any more, and gives back what
    /// exceeds the stock's cap. Returns the loader's answer when there is one.
    pub(super) fn settle(&mut self) -> Option<(usize, Reply)> {
        let (mut kept, mut evicted) = (0, false);
        for i in 0..self.waiting.len() {
            let page = self.waiting[i];
            self.fill_due();
            let served = match self.frames.state(page as usize) {
                FrameState::Discarding | FrameState::Moving | FrameState::Evicting => false,
                FrameState::Active => {
                    self.uffd.wake(self.ram.hva(page), 1);
                    true
                }
                // It is tried again, but not before there may be some.
                _ if self.starved.is_some() => false,
                FrameState::Idle => self.return_fault(page),
                state => self.charge_fault(page, state) == Charged::Served,
            };
            if served {
                self.frames.set_wanted(page as usize, false);
            } else {
                evicted |= self.frames.state(page as usize) == FrameState::Swapped;
                self.waiting[kept] = page;
                kept += 1;
            }
        }
        self.waiting.truncate(kept);
        if self.starved.is_some() {
            self.hold();
        }
        self.stall.looked(monotonic_ns(), evicted);
        if self.waiting.is_empty() {
            self.patience.served();
        }
        let reply = self.continue_pending();
        if self.stock.debt() == Count(0) && self.waiting.is_empty() {
            self.device_taken = 0;
            if self.gate.release(gate::NO_MEMORY) {
                self.held_ns += self.held_since.take().map_or(0, |since| monotonic_ns() - since);
            }
        }
        let device_may = self.stock.stock() > Count(0) || self.stock.debt() == Count(0);
        if self.device_blocked && device_may {
            self.device_blocked = false;
            self.balloon.retry();
        }
        let surplus = self.surplus();
        self.stock.give_back(surplus);
        reply
    }

    /// Fills absent pages of `pages` from the stock, and up to `spare` from the reserve; returns the first page that
    /// could not be charged.
    fn fill_run(&mut self, pages: Range<u64>, mut spare: u64) -> Option<u64> {
        let mut at = pages.start;
        while at < pages.end {
            let slot_end = self.ram.contiguous(at).end.min(pages.end);
            let (state, end) = self.frames.run(at as usize, slot_end as usize);
            let end = end as u64;
            match state {
                FrameState::Active => at = end,
                FrameState::Absent | FrameState::Ballooned => {
                    let dry = !self.has_stock();
                    let window = Window { first: at, pages: end - at };
                    let Some(filled) = self.charge_and_fill(window, at, spare > 0) else { return Some(at) };
                    if dry {
                        self.device_taken += filled.pages;
                        spare -= 1;
                    }
                    if state == FrameState::Ballooned {
                        self.counts.implicit_deflates += filled.pages;
                    }
                    self.counts.vmm += filled.pages;
                    at += filled.pages;
                }
                FrameState::Idle => {
                    self.bring_back(at, at..end);
                    if self.frames.run(at as usize, end as usize).0 == FrameState::Idle {
                        return Some(at);
                    }
                }
                FrameState::Swapped => {
                    let dry = !self.has_stock();
                    if dry && spare == 0 || self.refault(at, spare > 0) != Charged::Served {
                        return Some(at);
                    }
                    self.device_taken += u64::from(dry);
                    spare -= u64::from(dry);
                    self.counts.vmm += 1;
                    at += 1;
                }
                // It ends in a moment, and whoever asks is told then.
                FrameState::Moving | FrameState::Evicting | FrameState::Discarding => return Some(at),
            }
        }
        None
    }

    /// A VMM thread wants pages filled. `None` when it has to wait for the answer.
    pub fn on_fill(&mut self, client: usize, run: Run, wait: bool) -> Option<Reply> {
        let pages = run.first..run.first.saturating_add(run.pages).min(self.ram.pages());
        if wait {
            if self.asked.refused() {
                self.asked = Asked::No;
            }
            self.pending = Some(PendingFill { client, left: pages });
            return self.continue_pending().map(|(_, reply)| reply);
        }
        let spare = DEVICE_RESERVE.saturating_sub(self.device_taken);
        let stopped = self.fill_run(pages, spare);
        self.hold_if_short();
        match stopped {
            None => Some(Reply::Done(Vec::new())),
            Some(_) => {
                self.device_blocked = true;
                Some(Reply::WouldBlock)
            }
        }
    }

    fn continue_pending(&mut self) -> Option<(usize, Reply)> {
        let mut pending = self.pending.take()?;
        self.fill_due();
        match self.fill_run(pending.left.clone(), 0) {
            None => Some((pending.client, Reply::Done(Vec::new()))),
            Some(_) if self.asked.refused() => Some((pending.client, Reply::WouldBlock)),
            Some(at) => {
                pending.left.start = at;
                self.pending = Some(pending);
                None
            }
        }
    }

    /// Gives back all stock. While [`Pages::is_recalling`] says so, it has to be done once more.
    pub fn on_recall(&mut self) {
        self.give_up_pool();
        self.stock.recall();
    }

    /// Faults and loader's pages that have not been charged yet.
    fn unserved(&self) -> Count {
        if self.starved.is_some() {
            return Count(0);
        }
        let loader = self.pending.as_ref().map_or(0, |p| p.left.end - p.left.start);
        Count(self.waiting.len() as u64 + loader)
    }

    /// What to ask the controller for now, if anything: `(want, want_now)`. Marks it as asked.
    pub fn ask(&mut self) -> Option<(u64, u64)> {
        self.beat();
        self.asked.ask(&self.stock, self.unserved())
    }

    /// Lets the stock's batch shrink with the time that has passed.
    fn beat(&mut self) {
        let now = monotonic_ns();
        while now.saturating_sub(self.beat_ns) >= BEAT_NS {
            self.stock.tick();
            // After a long sleep the batch is at its least; more beats would change nothing.
            self.beat_ns = (self.beat_ns + BEAT_NS).max(now.saturating_sub(16 * BEAT_NS));
        }
    }

    /// The last want could not be sent.
    pub fn unasked(&mut self) {
        self.asked = Asked::No;
    }

    /// Whether the vCPUs stand still for want of memory.
    pub fn is_held(&self) -> bool {
        self.gate.closed_for(gate::NO_MEMORY)
    }

    /// The consistent picture of this moment.
    pub fn report(&self) -> Report {
        let running = self.held_since.map_or(0, |since| monotonic_ns().saturating_sub(since));
        Report {
            epoch: self.stock.epoch(),
            granted_total: self.stock.granted_total(),
            returned_total: self.stock.returned_total(),
            guest: self.stock.guest().0,
            stock: self.stock.whole_stock().0,
            reserve: self.stock.reserve().0,
            tables: self.stock.paid().tables.0,
            records: self.stock.paid().records.0,
            debt: self.stock.debt().0,
            ballooned: self.frames.count(FrameState::Ballooned),
            store: self.stock.store().0,
            swapped: self.frames.count(FrameState::Swapped),
            idle: self.frames.count(FrameState::Idle),
            cold: self.cold(),
            held: self.is_held(),
            held_us: (self.held_ns + running) / 1000,
            refault_us: self.stall.total_us(),
            faults: FaultCounts {
                answer: self.answer_times.quantiles(),
                hold: self.hold_times.quantiles(),
                ..self.counts
            },
            ..Report::default()
        }
    }
}

/// Whole seconds, for what needs no more.
pub(super) fn seconds(ns: u64) -> u32 {
    u32::try_from(ns / 1_000_000_000).unwrap_or(u32::MAX)
}

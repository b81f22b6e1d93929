//! Huge pages that are zeroed ahead of need.
//!
//! A guest that walks through new memory gets it in blocks of 2 MiB ([`super::huge`]): a huge page of the host out of this
//! pool, moved to where the guest wants it. To zero it takes a hundred times as long as to move it, so that is done before,
//! by the reclaim thread, which has nothing else to do while a guest may grow.
//!
//! The pool is a mapping beside RAM with a few *slots*. What a slot holds is charged from the moment on at which it is
//! ordered, so real memory is never more than what is charged:
//!
//! ```text
//!                order (charged)       the reclaim thread              moved into RAM, or discarded
//!  ┌──► EMPTY ───────────► ORDERED ───► ZEROING ──────────► READY ───────────────► TAKEN ───┐
//!  │      │                   │            │ not wanted any    │ for a second nobody         │
//!  │      │ zeroed at once    │ cancelled  ▼ more              ▼ has grown                   │
//!  │      └───► TAKEN         └──► EMPTY  UNWANTED ◄───────────┘                             │
//!  │                                       │ discarded, by the reclaim thread                │
//!  │            the charge is free again   ▼                                                 │
//!  └───────────────────────────────────── GONE                                               │
//!  └──────────────────────────────────────────────────────────────────────────────────────── ┘
//! ```
//! Each step is one compare-and-swap: neither thread waits for the other. The reclaim thread has a bell of its own for orders;
//! the fault thread is told of a huge page only when it has asked for that.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use super::ram::{HUGE, advise, reserve};
use crate::kernel;
use crate::worker::broken;
use crate::worker::protocol::Area;

/// Slots: as many as a full stock could fill.
pub const SLOTS: usize = 8;

/// Bytes of the mapping.
pub const BYTES: u64 = SLOTS as u64 * HUGE;

const EMPTY: u8 = 0;
const ORDERED: u8 = 1;
const ZEROING: u8 = 2;
const READY: u8 = 3;
const TAKEN: u8 = 4;
const UNWANTED: u8 = 5;
const GONE: u8 = 6;

/// What came back when a slot's charge was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Back {
    /// One slot's charge is free now.
    Free,
    /// One slot's charge will be, when the reclaim thread has discarded it.
    Soon,
    /// No slot is charged, but for those that are on their way back.
    Nothing,
}

/// The first kernel whose discard of an empty block takes away the page table that a fault has left there. With one, a huge
/// page that is moved to the block is split.
const TAKES_TABLES: (u32, u32) = (6, 14);

/// Whether this host gives huge pages, and leaves those whole that are moved to a block that was touched. Blocks of small
/// pages are not worth it: ageing would move 512 of them for one, and the guest would have to map them all again.
pub fn pays() -> bool {
    kernel::version().is_some_and(|version| version >= TAKES_TABLES) && kernel::gives_huge_pages()
}

/// The pool of one VM. Stays mapped until the process ends.
#[derive(Debug)]
pub struct Pool {
    base: u64,
    slots: [AtomicU8; SLOTS],
    bell: EventFd,
    /// The fault thread is to be told of the next one.
    called: AtomicBool,
    pays: bool,
}

/// A slot that the fault thread has taken, to be given back as empty.
#[derive(Debug)]
#[must_use = "the slot stays in use until it is given back"]
pub struct Taken(usize);

impl Pool {
    /// An empty pool.
    ///
    /// # Errors
    /// When the host refuses the address space or an eventfd.
    pub fn map() -> io::Result<Self> {
        let base = reserve(0, BYTES)?;
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP, libc::MADV_HUGEPAGE, libc::MADV_UNMERGEABLE] {
            // A kernel without huge pages, or without merging, has nothing against it.
            advise(base, BYTES, advice)
                .or_else(|e| if e.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(e) })?;
        }
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self {
            base,
            slots: [const { AtomicU8::new(EMPTY) }; SLOTS],
            bell,
            called: AtomicBool::new(false),
            pays: pays(),
        })
    }

    /// Whether a huge page that is moved to RAM stays one on this host.
    pub fn pays(&self) -> bool {
        self.pays
    }

    /// Where it is in this process.
    pub fn area(&self) -> Area {
        Area { hva: self.base, bytes: BYTES }
    }

    /// Readable when slots were ordered.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    fn address(&self, slot: usize) -> u64 {
        self.base + slot as u64 * HUGE
    }

    fn change(&self, slot: usize, from: u8, to: u8) -> bool {
        self.slots[slot].compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Changes the first slot that is in state `from`.
    fn change_any(&self, from: u8, to: u8) -> Option<usize> {
        (0..SLOTS).find(|slot| self.change(*slot, from, to))
    }

    /// Orders a huge page, which is charged. False when every slot is in use. By the fault thread.
    pub fn order(&self) -> bool {
        self.change_any(EMPTY, ORDERED).is_some()
    }

    /// Tells the reclaim thread of orders.
    pub fn ring(&self) {
        // Fails only when the counter is full: it is awake already.
        let _ = self.bell.write(1);
    }

    /// Takes a huge page that is ready. By the fault thread.
    pub fn take(&self) -> Option<Taken> {
        self.change_any(READY, TAKEN).map(Taken)
    }

    /// Takes an empty slot. By the fault thread.
    pub fn take_empty(&self) -> Option<Taken> {
        self.change_any(EMPTY, TAKEN).map(Taken)
    }

    /// Zeroes a huge page in an empty slot that was taken: a fifth of a millisecond. False when the host has no memory. By
    /// the fault thread.
    pub fn zero(&self, taken: &Taken) -> bool {
        self.populate(taken.0)
    }

    /// The address in this process of what is in a slot that was taken.
    pub fn taken_at(&self, taken: &Taken) -> u64 {
        self.address(taken.0)
    }

    /// Gives back a slot that nothing is left in. By the fault thread.
    pub fn give_back(&self, taken: Taken) {
        self.slots[taken.0].store(EMPTY, Ordering::Release);
    }

    /// Gives back a slot with whatever is left in it. By the fault thread.
    pub fn discard_taken(&self, taken: Taken) {
        self.discard(taken.0);
        self.give_back(taken);
    }

    /// Takes back an order that nobody has begun with. By the fault thread.
    pub fn cancel(&self) -> bool {
        self.change_any(ORDERED, EMPTY).is_some()
    }

    /// Asks for the charge of one slot, the cheapest first. By the fault thread.
    pub fn take_back(&self) -> Back {
        if self.cancel() {
            Back::Free
        } else if let Some(taken) = self.take() {
            self.discard_taken(taken);
            Back::Free
        } else if self.change_any(ZEROING, UNWANTED).is_some() {
            Back::Soon
        } else {
            Back::Nothing
        }
    }

    /// Slots whose charge is free again because the reclaim thread has discarded them. By the fault thread.
    pub fn collect(&self) -> u64 {
        (0..SLOTS).filter(|slot| self.change(*slot, GONE, EMPTY)).count() as u64
    }

    /// Whether a slot is on its way back.
    pub fn is_leaving(&self) -> bool {
        self.slots.iter().any(|slot| matches!(slot.load(Ordering::Acquire), UNWANTED | GONE))
    }

    /// Whether a huge page is ready.
    pub fn is_ready(&self) -> bool {
        self.slots.iter().any(|slot| slot.load(Ordering::Acquire) == READY)
    }

    /// Asks to be told of the next huge page. By the fault thread.
    pub fn call(&self) {
        self.called.store(true, Ordering::Release);
    }

    /// Zeroes what is ordered; `tell` is for when one is ready that the fault thread waits for, and when a slot's charge became
    /// free: it is not wanted any more, or the host has no memory. By the reclaim thread.
    pub fn zero_ordered(&self, mut tell: impl FnMut()) {
        while let Some(slot) = self.change_any(ORDERED, ZEROING) {
            let ready = self.populate(slot) && self.change(slot, ZEROING, READY);
            if !ready {
                self.leave(slot);
            }
            if !ready || self.called.swap(false, Ordering::AcqRel) {
                tell();
            }
        }
    }

    /// Discards what is ready: nobody has grown for a while. True when there was something. By the reclaim thread.
    pub fn empty(&self) -> bool {
        let mut gone = false;
        while let Some(slot) = self.change_any(READY, UNWANTED) {
            self.leave(slot);
            gone = true;
        }
        gone
    }

    /// Discards a slot that is the reclaim thread's.
    fn leave(&self, slot: usize) {
        self.discard(slot);
        self.slots[slot].store(GONE, Ordering::Release);
    }

    fn populate(&self, slot: usize) -> bool {
        advise(self.address(slot), HUGE, libc::MADV_POPULATE_WRITE).is_ok()
    }

    fn discard(&self, slot: usize) {
        if let Err(e) = advise(self.address(slot), HUGE, libc::MADV_DONTNEED) {
            // What is charged and what is there would not be the same any more.
            broken(format_args!("the host refuses to discard a page: {e}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memcg_core::units::PAGE_SIZE;

    /// Pages of the pool that are in memory.
    fn resident(pool: &Pool) -> u64 {
        let mut there = [0u8; (BYTES / PAGE_SIZE) as usize];
        // SAFETY: the range is the pool's, and the vector has a byte for each of its pages.
        let done = unsafe { libc::mincore(pool.base as *mut libc::c_void, BYTES as usize, there.as_mut_ptr()) };
        assert_eq!(done, 0);
        there.iter().filter(|page| *page & 1 == 1).count() as u64
    }

    const BLOCK: u64 = HUGE / PAGE_SIZE;

    /// Zeroes what is ordered; whether the fault thread was told of it.
    fn zero(pool: &Pool) -> bool {
        let mut told = false;
        pool.zero_ordered(|| told = true);
        told
    }

    fn is_empty(pool: &Pool) -> bool {
        pool.slots.iter().all(|slot| slot.load(Ordering::Acquire) == EMPTY)
    }

    #[test]
    fn what_is_ordered_gets_memory_and_is_taken_once() {
        let pool = Pool::map().unwrap();
        assert!(pool.order() && pool.order());
        assert!(pool.take().is_none() && resident(&pool) == 0, "ordered is not there yet");
        assert!(!zero(&pool));
        assert_eq!(resident(&pool), 2 * BLOCK);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        assert_ne!(pool.taken_at(&a), pool.taken_at(&b));
        assert_eq!((pool.taken_at(&a) | pool.taken_at(&b)) % HUGE, 0);
        assert!(pool.take().is_none());
        pool.discard_taken(a);
        pool.discard_taken(b);
        assert!(is_empty(&pool) && resident(&pool) == 0);
    }

    #[test]
    fn there_are_so_many_slots_and_no_more() {
        let pool = Pool::map().unwrap();
        assert_eq!((0..2 * SLOTS).filter(|_| pool.order()).count(), SLOTS);
        assert!(pool.take_empty().is_none());
        assert_eq!([(); SLOTS + 1].map(|()| pool.take_back()).iter().filter(|b| **b == Back::Free).count(), SLOTS);
        assert!(is_empty(&pool));
        let taken = pool.take_empty().unwrap();
        assert!(pool.zero(&taken) && resident(&pool) == BLOCK);
        pool.discard_taken(taken);
        assert!(is_empty(&pool));
    }

    #[test]
    fn every_charge_comes_back_the_cheapest_first_and_with_its_memory() {
        let pool = Pool::map().unwrap();
        assert!(pool.order() && !zero(&pool) && pool.order());
        assert_eq!((pool.cancel(), resident(&pool)), (true, BLOCK), "what was only ordered");
        assert!(!pool.cancel() && pool.order());
        assert_eq!((pool.take_back(), resident(&pool)), (Back::Free, BLOCK), "the same");
        assert_eq!((pool.take_back(), resident(&pool)), (Back::Free, 0), "what was ready");
        assert_eq!(pool.take_back(), Back::Nothing);
        assert!(is_empty(&pool));
    }

    #[test]
    fn what_is_being_zeroed_comes_back_when_that_has_ended() {
        let pool = Pool::map().unwrap();
        assert!(pool.order());
        let slot = pool.change_any(ORDERED, ZEROING).unwrap();
        assert!(pool.populate(slot));
        assert_eq!((pool.take_back(), pool.take_back()), (Back::Soon, Back::Nothing));
        assert!(pool.is_leaving() && pool.collect() == 0);
        assert!(!pool.change(slot, ZEROING, READY), "it is not wanted");
        pool.leave(slot);
        assert!(pool.is_leaving() && resident(&pool) == 0);
        assert_eq!((pool.collect(), pool.collect()), (1, 0));
        assert!(is_empty(&pool));
    }

    #[test]
    fn who_waits_for_a_huge_page_is_told_of_one() {
        let pool = Pool::map().unwrap();
        assert!(pool.order() && !zero(&pool), "nobody waits");
        pool.call();
        assert!(!zero(&pool), "nothing is ordered");
        let mut told = 0;
        assert!(pool.order() && pool.order());
        pool.zero_ordered(|| told += 1);
        assert_eq!(told, 1, "of the first");
        while pool.take_back() == Back::Free {}
        assert!(is_empty(&pool));
    }

    #[test]
    fn a_guest_that_does_not_grow_has_no_pool() {
        let pool = Pool::map().unwrap();
        assert!(pool.order() && pool.order());
        assert!(!zero(&pool) && pool.empty() && !pool.empty());
        assert_eq!((resident(&pool), pool.collect()), (0, 2));
        assert!(is_empty(&pool));
    }

    /// Both sides at once, each slot's charge counted by the one who has it.
    #[test]
    fn no_charge_is_lost_or_doubled_between_two_threads() {
        let pool = std::sync::Arc::new(Pool::map().unwrap());
        let end = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let other = {
            let (pool, end) = (pool.clone(), end.clone());
            std::thread::spawn(move || {
                for round in 0u32.. {
                    zero(&pool);
                    if round.is_multiple_of(3) {
                        pool.empty();
                    }
                    if end.load(Ordering::Acquire) {
                        return;
                    }
                    std::thread::yield_now();
                }
            })
        };
        let mut charged = 0u64;
        for round in 0u32..400 {
            charged += u64::from(pool.order());
            match round % 4 {
                0 => {
                    if let Some(taken) = pool.take() {
                        pool.discard_taken(taken);
                        charged -= 1;
                    }
                }
                1 => charged -= u64::from(pool.take_back() == Back::Free),
                2 => {
                    if let Some(taken) = pool.take_empty() {
                        pool.zero(&taken);
                        pool.discard_taken(taken);
                    }
                }
                _ => charged -= pool.collect(),
            }
            assert!(charged <= SLOTS as u64);
        }
        end.store(true, Ordering::Release);
        other.join().unwrap();
        charged -= pool.collect();
        while pool.take_back() == Back::Free {
            charged -= 1;
        }
        assert_eq!((charged, resident(&pool)), (0, 0));
        assert!(is_empty(&pool));
    }
}

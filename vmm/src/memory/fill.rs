//! Filling pages that are charged, and a host that has no memory for them.
//!
//! The kernel says ENOMEM when it has tried and found no page: the host is full, or a cgroup that the worker is in. A page that
//! is not there is not charged either, and who has touched it cannot go on. So all vCPUs are held, as when there is nothing to
//! charge it to, and the controller hears of it by a count ([`FaultCounts::unfilled`]): it says so in an event, and pauses the VM.
//!
//! ```text
//!   ENOMEM ─► the page is what it was before, its charge comes back ─► held ─┬─ a second later ───────────┬─► tried again
//!             whoever waits for it waits on                                  └─ paused, until it goes on ─┘
//! ```
//!
//! Nothing is lost: what was aside is aside, what was evicted is in the store.
//!
//! [`FaultCounts::unfilled`]: crate::worker::protocol::FaultCounts::unfilled

use std::ops::Range;
use std::time::Duration;

use memcg_core::frame::FrameState;
use memcg_core::units::Pages as Count;

use super::around::Window;
use super::client::Reply;
use super::pages::Pages;
use super::ram::Ram;
use super::uffd::{Fill, Uffd};
use crate::worker::broken;
use crate::worker::gate::{self, monotonic_ns};

/// Pages of a window that are filled first (64 KiB): few enough that the touch waits little longer than for one page.
const HEAD: u64 = 16;

/// How long a host is believed to have no memory.
const STARVED: Duration = Duration::from_secs(1);

impl Pages {
    /// Fills absent pages that are charged and booked; returns those for which the host has no memory.
    pub(super) fn fill_charged(&self, pages: Range<u64>) -> Range<u64> {
        fill_all(&self.uffd, &self.ram, pages)
    }

    /// Pages that are booked as filled are not there, because the host has no memory: they are absent, and not charged.
    pub(super) fn give_up(&mut self, missing: Range<u64>) {
        if missing.is_empty() {
            return;
        }
        let (first, end) = (missing.start as usize, missing.end as usize);
        self.frames.set_range(first, end, FrameState::Discarding);
        self.frames.set_range(first, end, FrameState::Absent);
        self.stock.uncharge(Count(missing.end - missing.start));
        if let Some(present) = self.ram.present() {
            present.clear(missing);
        }
        self.starve();
    }

    /// The host has no memory for a page that is wanted.
    pub(super) fn starve(&mut self) {
        self.counts.unfilled += 1;
        self.starved = Some(monotonic_ns() + STARVED.as_nanos() as u64);
    }

    /// Time until what the host had no memory for is tried again, in nanoseconds. Not while the VM is paused.
    pub fn starved_left(&self) -> Option<u64> {
        let until = self.starved.filter(|_| !self.gate.closed_for(gate::PAUSED))?;
        Some(until.saturating_sub(monotonic_ns()))
    }

    /// Tries again when it is time. Returns the loader's answer, if there is one now.
    pub fn try_starved(&mut self) -> Option<(usize, Reply)> {
        if self.starved_left() != Some(0) {
            return None;
        }
        self.starved = None;
        self.settle()
    }
}

/// Fills a window, the part around the touched page first: its vCPU is awake again while the rest is filled, and where
/// there is another CPU the two go on side by side. Returns what the host has no memory for, in three parts.
pub(super) fn fill(uffd: &Uffd, ram: &Ram, window: Window, touched: u64) -> [Range<u64>; 3] {
    let end = window.first + window.pages;
    let head = touched.saturating_sub(HEAD - 1).max(window.first);
    let head = if touched - window.first < HEAD { window.first } else { head };
    let head_end = (head + HEAD).min(end);
    [head..head_end, head_end..end, window.first..head].map(|pages| fill_all(uffd, ram, pages))
}

/// Fills every page of a run of absent pages in one slot, but for those that the host has no memory for, which are returned.
///
/// Only the fault thread leaves ABSENT, so a page that is there already is one whose charge is missing: it is counted
/// as filled.
fn fill_all(uffd: &Uffd, ram: &Ram, pages: Range<u64>) -> Range<u64> {
    let mut at = pages.start;
    while at < pages.end {
        match uffd.fill(ram.hva(at), pages.end - at) {
            Fill::Filled(done) => at += done,
            Fill::AlreadyPresent => {
                uffd.wake(ram.hva(at), 1);
                at += 1;
            }
            Fill::RetryLater => {}
            Fill::NoMemory => break,
            // The range is ours and registered until the process ends: its end has begun.
            Fill::Gone => broken(format_args!("page {at} cannot be filled")),
        }
    }
    at..pages.end
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::thread::JoinHandle;
    use std::time::Instant;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::balloon::{BalloonConfig, BalloonDevice};
    use crate::memory::GuestMem;
    use crate::memory::ageing::Plan;
    use crate::memory::cold::Reclaim;
    use crate::memory::give::BalloonPages;
    use crate::memory::store::{Codec, Store, Writer};
    use crate::worker::gate::Gate;

    const EPOCH: u32 = 1;
    const GRANTED: u64 = 500;

    /// The fault thread's part of a guest with 4 MiB of RAM, and the other half of its store.
    fn guest() -> Option<(Pages, Writer)> {
        let device = File::options().read(true).write(true).open("/dev/userfaultfd").ok()?;
        let ram = Arc::new(Ram::map(&[(0, 4 << 20)]).expect("mapped"));
        let uffd = Uffd::from_device(&device).expect("a userfaultfd");
        ram.keep_to_touches().expect("advice");
        ram.begin_charging();
        for slot in ram.slots() {
            for start in [slot.hva, slot.stage] {
                // SAFETY: a mapping of this test, which answers its faults.
                unsafe { uffd.register(start, slot.bytes) }.expect("registered");
            }
        }
        let event = || EventFd::new(libc::EFD_NONBLOCK).expect("a descriptor");
        let gate = Arc::new(Gate::new(1).expect("a gate"));
        gate.release(gate::NOT_STARTED);
        let config = BalloonConfig { ram_pages: 1024, deflate_on_oom: false, reporting: false, stats_interval: None };
        let (memory, pages) = (GuestMem::new(ram.clone(), None, false), BalloonPages::new(ram.clone(), None));
        let (_, _, balloon) = BalloonDevice::new(config, memory, pages, Box::new(event()), event()).expect("a balloon");
        let store = Store::new(1024, Codec::default(), None).expect("a store");
        let mut pages = Pages::new(ram, uffd, gate, 1, balloon, Reclaim::new(event(), store.reader), Plan::default());
        pages.on_grant(EPOCH, GRANTED, GRANTED, None, false).expect("granted");
        Some((pages, store.writer))
    }

    /// Somebody adds one to what is at `page`, and says what was there.
    fn touch(pages: &Pages, page: u64) -> JoinHandle<u64> {
        let at = pages.ram.hva(page);
        std::thread::spawn(move || {
            let at = at as *mut u64;
            // SAFETY: the page is in the mapping, which stays until the process ends, and nobody else writes there.
            unsafe {
                let was = at.read_volatile();
                at.write_volatile(was + 1);
                was
            }
        })
    }

    /// Answers faults until `enough`.
    fn answer(pages: &mut Pages, enough: impl Fn(&Pages) -> bool) {
        let begin = Instant::now();
        while !enough(pages) {
            assert!(begin.elapsed() < Duration::from_secs(20), "nobody asks");
            pages.on_faults(monotonic_ns());
            std::thread::yield_now();
        }
    }

    /// A page that the host has no memory for is what it was before, and not charged; its guest stands still. When there is
    /// memory, and the guest may go on, it finds what it had: nothing, what was aside, and what was evicted.
    #[test]
    fn a_host_without_memory_stops_the_guest_and_takes_nothing_from_it() {
        let Some((mut pages, mut writer)) = guest() else {
            println!("SKIP no-memory reason=no-access-to-/dev/userfaultfd");
            return;
        };
        for page in [7, 9] {
            let toucher = touch(&pages, page);
            answer(&mut pages, |pages| pages.frames.state(page as usize) == FrameState::Active);
            assert_eq!(toucher.join().expect("no panic"), 0);
            let (here, aside) = (pages.ram.hva(page), pages.ram.hva(pages.ram.other(page)));
            pages.frames.set(page as usize, FrameState::Moving);
            // SAFETY: nobody uses the page now.
            let moved = unsafe { pages.uffd.move_pages(aside, here, 1) };
            assert_eq!(moved, super::super::uffd::Move::Moved(1));
            pages.frames.set(page as usize, FrameState::Idle);
        }
        // The second one goes on into the store.
        let aside = pages.ram.hva(pages.ram.other(9));
        // SAFETY: the page is aside, and nobody writes there.
        writer.compress(9, unsafe { &*(aside as *const [u8; 4096]) });
        super::super::ram::advise(aside, 4096, libc::MADV_DONTNEED).expect("discarded");
        let mut stored = Vec::new();
        writer.append(&mut stored);
        pages.frames.set(9, FrameState::Evicting);
        pages.frames.set(9, FrameState::Swapped);
        pages.frames.set_place(9, stored[0].place.raw());
        pages.stock.evicted(Count(1), Count(writer.resident_pages()));
        for (page, state, was) in [(5, FrameState::Absent, 0), (7, FrameState::Idle, 1), (9, FrameState::Swapped, 1)] {
            let before = pages.report();
            pages.uffd.is_out.store(true, Ordering::Relaxed);
            let toucher = touch(&pages, page);
            answer(&mut pages, |pages| pages.counts.unfilled > before.faults.unfilled);
            assert_eq!(pages.frames.state(page as usize), state);
            assert!(pages.is_held() && pages.ask().is_none_or(|(_, now)| now == 0), "nobody waits for a charge");
            assert_eq!((pages.report().guest, pages.report().held()), (before.guest, Some(GRANTED)), "{state:?}");
            pages.gate.hold(gate::PAUSED);
            pages.on_pause();
            pages.uffd.is_out.store(false, Ordering::Relaxed);
            assert_eq!(pages.starved_left(), None, "not before it goes on");
            assert!(pages.try_starved().is_none() && !toucher.is_finished());
            pages.gate.release(gate::PAUSED);
            pages.on_resume();
            pages.try_starved();
            assert!(!pages.is_held());
            assert_eq!(toucher.join().expect("no panic"), was, "{state:?}");
            assert_eq!(pages.report().held(), Some(GRANTED));
        }
        // The mapping is registered with a descriptor that nobody reads any more.
        std::mem::forget(pages);
    }
}

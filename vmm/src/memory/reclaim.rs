//! The reclaim thread: makes the system calls by which cold pages are moved aside and evicted.
//!
//! It decides nothing. It does one piece of [`Work`] after the other, says what became of it, and rests on its bell when there is
//! none. What it works on is claimed, so nobody else touches it meanwhile: a page in the stage has no writer, and can be
//! compressed where it is.
//!
//! While it rests it zeroes huge pages for a guest that grows ([`super::pool`]), and discards them when it does not.
//!
//! Real memory is never more than what is charged: a batch is compressed into a scratch buffer, then the pages are
//! discarded, and only then do their contents take memory in the store.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use memcg_core::units::PAGE_SIZE;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

use super::client::{Client, Done, Fetched, Load, Reply, Request, Run, Work};
use super::cold::GONE;
use super::discard::Discarder;
use super::ram::{HUGE, Ram};
use super::store::{BATCH, Moved, Outcome, Spill, Stored, Writer};
use super::thread::borrow;
use super::uffd::{Move, Uffd};
use crate::worker::sandbox::{self, Thread};
use crate::worker::{broken, complain};

/// Tries to move a page that the kernel is busy with, before it stays where it is.
const TRIES: u32 = 3;

/// The store is cleaned when more than one part in so many of what lives in it is dead: a quarter of the whole.
const DEAD_SHARE: u64 = 3;

/// The same where the store is nearly full. At its limit nothing is evicted, whatever of it is dead, and nothing can be
/// cleaned either: that takes pages, and those come from evictions.
const DEAD_SHARE_FULL: u64 = 16;

/// A store is nearly full when less than one part in so many of its limit is left.
const FULL_SHARE: u64 = 4;

/// Empty segments of the store that are kept for the next pages.
const KEEP: usize = 1;

/// How long huge pages are kept for a guest that does not grow.
const GROWN: Duration = Duration::from_secs(1);

/// What the thread owns.
#[derive(Debug)]
pub struct ReclaimThread {
    client: Client,
    bell: EventFd,
    ram: Arc<Ram>,
    store: Writer,
    /// Where what does not go to the store goes, if anywhere.
    file: Option<Spill>,
    /// Pages of the stage whose contents are in scratch.
    batch: Vec<u64>,
    /// Pages of the stage whose contents are on their way to the file.
    spilled: Vec<u64>,
    /// A batch in runs.
    runs: Vec<Run>,
    /// Writes to the file that failed.
    failed_writes: u64,
    /// When huge pages were ordered last.
    ordered: Instant,
}

impl ReclaimThread {
    /// A thread that asks `client` for work when `bell` rings, and keeps contents in `store`, and what does not shrink in
    /// `file`.
    pub fn new(client: Client, bell: EventFd, ram: Arc<Ram>, store: Writer, file: Option<Spill>) -> Self {
        let (batch, spilled, runs) = (Vec::new(), Vec::new(), Vec::new());
        Self { client, bell, ram, store, file, batch, spilled, runs, failed_writes: 0, ordered: Instant::now() }
    }

    /// Runs until the process ends; says on `ready` that it is in its sandbox.
    ///
    /// # Errors
    /// When it cannot go there.
    pub fn run(mut self, ready: &SyncSender<()>) -> io::Result<()> {
        let discarder = Discarder::default();
        sandbox::enter(Thread::Reclaim).map_err(io::Error::other)?;
        // Whoever waited for this may have gone.
        let _ = ready.send(());
        let mut load = Box::<Load>::default();
        let mut done = Done::Rested;
        loop {
            let Reply::Job(work, pages) = self.client.ask(Request::Reclaim(done, load)) else {
                broken(format_args!("no work for reclaim"))
            };
            load = pages;
            done = match work {
                Work::Rest(time) => self.rest(time),
                Work::Age => self.age(&mut load),
                Work::Evict { store_max } => self.evict(&mut load, store_max, &discarder),
                Work::Fetch => {
                    self.fetch(&mut load.fetched);
                    Done::Fetched
                }
                Work::Refill => {
                    self.fetch(&mut load.fetched);
                    Done::Refilled
                }
            };
        }
    }

    fn rest(&mut self, time: Option<Duration>) -> Done {
        let until = time.map(|time| Instant::now() + time);
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            // What was zeroed ahead and is not used is given up.
            let kept = GROWN.saturating_sub(self.ordered.elapsed());
            let kept = self.ram.pool().is_ready().then_some(kept);
            if kept == Some(Duration::ZERO) {
                if self.ram.pool().empty() {
                    self.client.ring();
                }
                continue;
            }
            let timeout = left.into_iter().chain(kept).min();
            let timeout =
                timeout.map(|time| Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() });
            let mut bells = [&self.bell, self.ram.pool().bell()]
                .map(|bell| PollFd::from_borrowed_fd(borrow(bell.as_raw_fd()), PollFlags::IN));
            let _ = poll(&mut bells, timeout.as_ref());
            let [work, orders] = bells.map(|bell| bell.revents().contains(PollFlags::IN));
            if work {
                let _ = self.bell.read();
                return Done::Rested;
            }
            if orders {
                let _ = self.ram.pool().bell().read();
                self.ram.pool().zero_ordered(|| self.client.ring());
                self.ordered = Instant::now();
            } else if until.is_some_and(|until| until <= Instant::now()) {
                return Done::Rested;
            }
        }
    }

    /// Moves pages of RAM to the stage.
    fn age(&self, load: &mut Load) -> Done {
        let Some(uffd) = self.ram.uffd() else { broken(format_args!("pages are aged that are not registered")) };
        load.moved.clear();
        for run in &load.claimed {
            let (mut at, end) = (run.first, run.first + run.pages);
            while at < end {
                // A huge page moves whole, or is split by the move of a part.
                let next = end.min((at / BLOCK + 1) * BLOCK);
                if next - at < BLOCK {
                    self.ram.take_huge(at);
                }
                move_aside(&self.ram, uffd, at..next, &mut load.moved);
                at = next;
            }
        }
        Done::Aged
    }

    /// Puts pages of the stage into the store.
    fn evict(&mut self, load: &mut Load, store_max: u64, discarder: &Discarder) -> Done {
        load.stored.clear();
        let before = self.store.resident_pages();
        let mut incompressible = 0;
        for page in load.claimed.iter().flat_map(|run| run.first..run.first + run.pages) {
            let aside = self.ram.other(page);
            match self.store.compress(page as u32, content(&self.ram, aside)) {
                Outcome::Incompressible => incompressible += u64::from(!self.spill(aside, discarder, &mut load.stored)),
                _ => self.batch.push(aside),
            }
            if self.batch.len() == BATCH {
                self.put(store_max, discarder, &mut load.stored);
            }
        }
        self.put(store_max, discarder, &mut load.stored);
        self.write(discarder, &mut load.stored);
        self.clean(before, store_max, load);
        Done::Evicted { incompressible, store: self.store.resident_pages(), failed_writes: self.failed_writes }
    }

    /// Reads pages from the file, or from memory.
    fn fetch(&mut self, fetched: &mut Fetched) {
        fetched.contents.resize(fetched.pages.len(), [0; PAGE_SIZE as usize]);
        fetched.failed.clear();
        for (stored, content) in fetched.pages.iter_mut().zip(&mut fetched.contents) {
            let read = match (stored.place.slot(), &mut self.file) {
                (None, _) => self.store.read(stored.page, stored.place, content),
                (Some(_), Some(file)) => file.read(stored.page, stored.place, content),
                (Some(_), None) => broken(format_args!("there is no file to read from")),
            };
            if let Err(corrupt) = read {
                fetched.failed.push((stored.page, corrupt));
                // Whatever has been read is nobody's page.
                stored.page = GONE;
            }
        }
    }

    /// Takes a page of the stage into the file's batch, unless there is no file or no room in it.
    fn spill(&mut self, aside: u64, discarder: &Discarder, stored: &mut Vec<Stored>) -> bool {
        let Some(file) = &mut self.file else { return false };
        if !file.put(self.ram.other(aside) as u32, content(&self.ram, aside)) {
            return false;
        }
        self.spilled.push(aside);
        if file.pending() == BATCH {
            self.write(discarder, stored);
        }
        true
    }

    /// Ends a batch of the file: its pages are discarded when they are written, and stay where they are when the disk fails.
    fn write(&mut self, discarder: &Discarder, stored: &mut Vec<Stored>) {
        let Some(file) = &mut self.file else { return };
        match file.write(stored) {
            Ok(()) => discard(&self.ram, discarder, &mut self.spilled, &mut self.runs),
            Err(e) => {
                self.write_failed(&e);
                self.spilled.clear();
            }
        }
    }

    fn write_failed(&mut self, error: &io::Error) {
        if self.failed_writes == 0 {
            complain(format_args!("the swap file cannot be written, and its pages stay in memory: {error}"));
        }
        self.failed_writes += 1;
    }

    /// Writes a batch of what is in the store to the file, if there is one, and adds to `copied` what went there.
    fn write_back(&mut self, copied: &mut Vec<Moved>) {
        let Some(file) = &mut self.file else { return };
        let mut old = Vec::with_capacity(BATCH);
        let read = self.store.read_out(|page, place, content| {
            let taken = file.put(page, content);
            old.extend(taken.then_some(place));
            taken
        });
        let mut stored = Vec::with_capacity(BATCH);
        let written = file.write(&mut stored);
        let moved = stored.iter().zip(old).map(|(stored, old)| Moved { page: stored.page, old, new: stored.place });
        copied.extend(moved);
        if let Err(corrupt) = read {
            // The guest is ended when it asks for that page, if it ever does.
            complain(format_args!("{corrupt}"));
        }
        if let Err(e) = written {
            self.write_failed(&e);
        }
    }

    /// Gives back what has died in the store, which had `before` pages; where it is too much, what lives is copied
    /// together first, into no more memory than the evicted pages had. Of a store that is too large some goes to the file
    /// instead.
    fn clean(&mut self, before: u64, store_max: u64, load: &mut Load) {
        load.copied.clear();
        let is_large = self.store.resident_pages() > store_max;
        let collected = self.store.collect(if is_large { 0 } else { KEEP });
        let left = store_max.saturating_sub(self.store.resident_pages());
        let share = if left < store_max / FULL_SHARE { DEAD_SHARE_FULL } else { DEAD_SHARE };
        if self.store.resident_pages() > store_max {
            self.write_back(&mut load.copied);
        }
        if load.copied.is_empty() && self.store.dead_bytes() > self.store.live_bytes() / share {
            let room = (before + load.stored.len() as u64).saturating_sub(self.store.resident_pages());
            if let Err(corrupt) = self.store.clean(room, &mut load.copied) {
                // The guest is ended when it asks for that page, if it ever does.
                complain(format_args!("{corrupt}"));
            }
        }
        if let Err(e) = collected {
            complain(format_args!("the store cannot give memory back: {e}"));
        }
    }

    /// Ends a batch: discards its pages, then keeps their contents.
    fn put(&mut self, store_max: u64, discarder: &Discarder, stored: &mut Vec<Stored>) {
        let kept = self.store.keep_within(store_max.saturating_sub(self.store.resident_pages()));
        while self.batch.len() > kept {
            // What is left over is claimed, and stays unless the file takes it.
            let Some(aside) = self.batch.pop() else { break };
            self.spill(aside, discarder, stored);
        }
        discard(&self.ram, discarder, &mut self.batch, &mut self.runs);
        self.store.append(stored);
    }
}

/// Discards a batch of pages, which is empty then.
fn discard(ram: &Ram, discarder: &Discarder, batch: &mut Vec<u64>, runs: &mut Vec<Run>) {
    runs.clear();
    for page in batch.drain(..) {
        Run::append(runs, page, 1);
    }
    if let Err(e) = discarder.discard(ram, runs) {
        // Claimed pages of unknown content: neither charging nor uncharging them would be true.
        broken(format_args!("the host refuses to discard guest memory: {e}"));
    }
}

/// The content of a page of the stage that is claimed for this thread.
fn content(ram: &Ram, aside: u64) -> &[u8; PAGE_SIZE as usize] {
    // SAFETY: the page is in the stage, which stays mapped as long as `ram`, and claimed: nobody writes to it.
    unsafe { &*(ram.hva(aside) as *const [u8; PAGE_SIZE as usize]) }
}

/// Pages of a huge page of the host.
const BLOCK: u64 = HUGE / PAGE_SIZE;

/// Moves `pages`, which lie in one block, to the stage, and notes in `moved` which of them are there now.
fn move_aside(ram: &Ram, uffd: &Uffd, pages: Range<u64>, moved: &mut Vec<Run>) {
    let (mut at, mut tries) = (pages.start, 0);
    while at < pages.end {
        // SAFETY: the pages are guest RAM and claimed; a touch of them is a fault that waits for the end of the claim.
        match unsafe { uffd.move_pages(ram.hva(ram.other(at)), ram.hva(at), pages.end - at) } {
            Move::Moved(done) => {
                Run::append(moved, at, done);
                at += done;
                tries = 0;
            }
            Move::Busy if tries < TRIES => tries += 1,
            // Somebody holds this one (a device of the host, another process), or there is no memory: it stays.
            Move::Busy | Move::NoMemory => {
                at += 1;
                tries = 0;
            }
            other => broken(format_args!("active page {at} cannot be moved aside: {other:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn write(ram: &Ram, page: u64, value: u8) {
        // SAFETY: the page is in the mapping, and nobody else looks at it.
        unsafe { (ram.hva(page) as *mut u8).write_volatile(value) };
    }

    fn read(ram: &Ram, page: u64) -> u8 {
        // SAFETY: as above.
        unsafe { (ram.hva(page) as *const u8).read_volatile() }
    }

    /// Pages that are aside already because the kernel has moved them and not said so are moved like all others; one that has
    /// another one in its place is not, and both stay.
    #[test]
    fn pages_that_were_moved_without_a_word_are_told_of_and_others_stay() {
        let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") else {
            println!("SKIP move-aside reason=no-access-to-/dev/userfaultfd");
            return;
        };
        let ram = Ram::map(&[(0, 4 << 20)]).expect("mapped");
        let uffd = Uffd::from_device(&device).expect("a userfaultfd");
        ram.keep_to_touches().expect("advice");
        for page in [4, 7, 9] {
            write(&ram, page, page as u8);
        }
        for page in [5, 6] {
            write(&ram, ram.other(page), page as u8);
        }
        write(&ram, ram.other(9), 99);
        for slot in ram.slots() {
            for start in [slot.hva, slot.stage] {
                // SAFETY: a mapping of this test, of which no page is touched any more that is not there.
                unsafe { uffd.register(start, slot.bytes) }.expect("registered");
            }
        }
        let mut moved = Vec::new();
        move_aside(&ram, &uffd, 4..8, &mut moved);
        assert_eq!(moved, [Run { first: 4, pages: 4 }]);
        assert_eq!([4, 5, 6, 7].map(|page| read(&ram, ram.other(page))), [4, 5, 6, 7]);
        // SAFETY: as above.
        let other = unsafe { uffd.move_pages(ram.hva(ram.other(9)), ram.hva(9), 1) };
        assert!(matches!(other, Move::Occupied), "{other:?}");
        assert_eq!([9, ram.other(9)].map(|page| read(&ram, page)), [9, 99]);
    }
}

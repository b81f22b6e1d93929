//! A guest whose kernel reports free memory: it allocates and frees blocks all the time, and reports those that are free.
//!
//! Blocks are taken as a buddy allocator takes them, the one that was freed last first. Every so often all free ones
//! that have not been reported are, the one that has been free for longest first, as Linux does.

use core::cell::UnsafeCell;
use core::fmt::Write;

use guest_common::{Arguments, PAGE_SIZE};

use super::{Balloon, DEVICE_WRITES, Descriptor, MOST_ENTRIES, POLLS};
use crate::Error;
use crate::io::{self, Line};
use crate::memory::poke;

/// Most blocks of a range.
const MOST: usize = 4096;

/// Two lists of block numbers: those in use, in any order, and the free ones, the newest last; of these the first
/// `reported` have been reported.
struct Blocks {
    used: [u16; MOST],
    used_count: usize,
    free: [u16; MOST],
    free_count: usize,
    reported: usize,
}

struct Books(UnsafeCell<Blocks>);

// SAFETY: only vCPU 0 runs commands, so there is one user.
unsafe impl Sync for Books {}

static BOOKS: Books =
    Books(UnsafeCell::new(Blocks { used: [0; MOST], used_count: 0, free: [0; MOST], free_count: 0, reported: 0 }));

impl Balloon {
    /// `balloon allocate`: see the list of commands.
    pub(super) fn allocate(&mut self, arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
        let (start, size) = (arguments.number(1, "START")?, arguments.number(2, "SIZE")?);
        let order = arguments.number_or("order", 9)?.min(10);
        let (steps, every) = (arguments.number_or("steps", 1000)?, arguments.number_or("every", 2000)?);
        let (passes, mut seed) =
            (arguments.number_or("passes", 1)?, arguments.number_or("seed", 1)?.wrapping_mul(2) | 1);
        let report = arguments.number_or("report", 1)? != 0;
        let queue = if report { self.reporting_queue()? } else { 0 };
        let (block_pages, block_bytes) = (1 << order, PAGE_SIZE << order);
        let count = (size / block_bytes) as usize;
        if !(2..=MOST).contains(&count) || start % PAGE_SIZE != 0 {
            return Err(Error::Other("SIZE must be 2 to 4096 blocks"));
        }
        // SAFETY: the only user, and a command runs once at a time.
        let blocks = unsafe { &mut *BOOKS.0.get() };
        (blocks.used_count, blocks.free_count, blocks.reported) = (0, count, 0);
        (0..count).for_each(|i| blocks.free[i] = (count - 1 - i) as u16);
        let (mut reports, mut returned) = (0, 0);
        let every = every * io::cycles_per_ms();
        let begin = io::cycles();
        let mut reported = begin;
        for step in 1..=steps {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let draw = (seed >> 33) as usize;
            // A walk between nothing in use and everything.
            let grow = blocks.used_count == 0 || blocks.free_count > 0 && draw.is_multiple_of(2);
            if grow {
                returned += u64::from(blocks.reported == blocks.free_count);
                let block = start + u64::from(blocks.take()) * block_bytes;
                for _ in 0..passes {
                    (0..block_pages).for_each(|page| poke(block + page * PAGE_SIZE, step));
                }
            } else {
                blocks.give(draw / 2);
            }
            if report && io::cycles().wrapping_sub(reported) >= every {
                reported = io::cycles();
                reports += self.report_all(queue, blocks, start, block_bytes)?;
            }
        }
        let spent = io::cycles().wrapping_sub(begin);
        let _ = write!(answer, " steps={steps} blocks={count} reported={reports} returned={returned} cycles={spent}");
        Ok(())
    }

    /// Reports the free blocks that have not been; returns how many.
    fn report_all(&mut self, queue: usize, blocks: &mut Blocks, start: u64, bytes: u64) -> Result<u64, Error> {
        let mut reports = 0;
        let mut chain = [Descriptor { address: 0, length: 0, flags: DEVICE_WRITES, next: 0 }; MOST_ENTRIES as usize];
        while blocks.reported < blocks.free_count {
            let some = (blocks.free_count - blocks.reported).min(self.queue_size.into());
            for (i, descriptor) in chain[..some].iter_mut().enumerate() {
                let address = start + u64::from(blocks.free[blocks.reported + i]) * bytes;
                let next = i as u16 + 1;
                let flags = DEVICE_WRITES | if i + 1 < some { super::HAS_NEXT } else { 0 };
                *descriptor = Descriptor { address, length: bytes as u32, flags, next };
            }
            let ticket = self.offer(queue, &chain[..some])?;
            self.collect(ticket, POLLS)?.ok_or(Error::Other("the device did not answer"))?;
            blocks.reported += some;
            reports += some as u64;
        }
        Ok(reports)
    }
}

impl Blocks {
    /// Takes the newest free block. There is one.
    fn take(&mut self) -> u16 {
        self.free_count -= 1;
        self.reported = self.reported.min(self.free_count);
        let block = self.free[self.free_count];
        self.used[self.used_count] = block;
        self.used_count += 1;
        block
    }

    /// Frees one of those in use, which one `draw` says. There is one.
    fn give(&mut self, draw: usize) {
        let at = draw % self.used_count;
        self.used_count -= 1;
        self.free[self.free_count] = self.used[at];
        self.free_count += 1;
        self.used[at] = self.used[self.used_count];
    }
}

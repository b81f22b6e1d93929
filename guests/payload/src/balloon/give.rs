//! Giving very many pages at once: the whole ring is filled before the bell is rung once, so what passes until all is back
//! is the device's work and nothing else. Between the marks 1 and 2.

use core::fmt::Write;
use core::sync::atomic::{Ordering::SeqCst, fence};

use guest_common::{Arguments, PAGE_SIZE};

use super::{BATCH, Balloon, Descriptor, INFLATE, POLL_MS, POLLS, area_queue, register};
use crate::Error;
use crate::io::{self, Line};
use crate::memory::poke;

impl Balloon {
    /// `balloon give`: see the list of commands.
    pub(super) fn give(&mut self, arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
        let (start, size) = (arguments.number(1, "START")?, arguments.number(2, "SIZE")?);
        let stride = arguments.number_or("stride", PAGE_SIZE)?.max(PAGE_SIZE) / PAGE_SIZE;
        let numbers = arguments.number_or("numbers", 4 << 20)?;
        let (first, pages) = (start / PAGE_SIZE, size / PAGE_SIZE / stride);
        let buffers = pages.div_ceil(BATCH as u64);
        if self.window.is_none() || buffers > u64::from(self.queue_size) || numbers % PAGE_SIZE != 0 || pages % 2 != 0 {
            return Err(Error::Other(
                "an even number of pages, 1024 for each entry of the ring: balloon init size=128",
            ));
        }
        for pair in 0..pages / 2 {
            let number = |i: u64| (first + i * stride) & u64::from(u32::MAX);
            poke(numbers + pair * 8, number(pair * 2) | number(pair * 2 + 1) << 32);
        }
        let memory = area_queue(INFLATE);
        // SAFETY: the pointer is to one of the area's queues, which lives for ever and which no reference is made to; all
        // that is written is below the queue's size, hence below the arrays' length. Nothing is in flight.
        let used = unsafe {
            let index = (&raw const (*memory).available.index).read_volatile();
            for i in 0..buffers as u16 {
                let count = (pages - u64::from(i) * BATCH as u64).min(BATCH as u64);
                let address = numbers + u64::from(i) * PAGE_SIZE;
                let descriptor = Descriptor { address, length: count as u32 * 4, flags: 0, next: 0 };
                (&raw mut (*memory).descriptors[usize::from(i)]).write_volatile(descriptor);
                let slot = usize::from(index.wrapping_add(i) % self.queue_size);
                (&raw mut (*memory).available.entries[slot]).write_volatile(i);
            }
            (&raw mut (*memory).available.index).write_volatile(index.wrapping_add(buffers as u16));
            &raw const (*memory).used.index
        };
        // SAFETY: as above.
        let returned = || unsafe { used.read_volatile() };
        let end = returned().wrapping_add(buffers as u16);
        fence(SeqCst);
        io::mark(1);
        self.write(register::QUEUE_NOTIFY, INFLATE as u32)?;
        let mut polls = 0;
        while returned() != end {
            if polls == POLLS {
                return Err(Error::Other("the device did not answer"));
            }
            polls += 1;
            io::wait(POLL_MS);
        }
        io::mark(2);
        let _ = write!(answer, " given={pages} buffers={buffers}");
        self.set_actual(u64::from(self.actual) + pages)
    }
}

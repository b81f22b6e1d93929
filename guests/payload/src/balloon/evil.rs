//! What no driver would do. After each of these a sane driver has to be able to go on (`balloon init`).

use core::fmt::Write;

use guest_common::{Arguments, PAGE_SIZE};

use super::{AREA, DEVICE_WRITES};
use super::{BATCH, Balloon, DEFLATE, Descriptor, HAS_NEXT, INFLATE, area_queue, register};
use crate::Error;
use crate::io::{self, Line};
use crate::memory::poke;

/// Milliseconds that an answer is waited for; there may be none.
const PATIENCE_MS: u32 = 200;

impl Balloon {
    /// `balloon evil MODE ...`: see the list of commands.
    pub(super) fn evil(&mut self, arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
        let mode = arguments.word(1).unwrap_or("");
        let arguments = Arguments(arguments.0.split_once(mode).map_or("", |(_, rest)| rest));
        let queue = || -> Result<usize, Error> { Ok(arguments.number(0, "QUEUE")? as usize) };
        match mode {
            "numbers" => {
                let (first, count) = (arguments.number(1, "FIRST")?, arguments.number(2, "COUNT")?);
                self.numbers(queue()?, first, count, arguments.number_or("step", 1)?, answer)
            }
            "index" => {
                let ahead = arguments.number(1, "AHEAD")? as u16;
                self.lie(queue()?, Descriptor { address: 0, length: 4, flags: 0, next: 0 }, 0, ahead, answer)
            }
            "head" => {
                let head = arguments.number(1, "HEAD")? as u16;
                self.lie(queue()?, Descriptor { address: 0, length: 4, flags: 0, next: 0 }, head, 1, answer)
            }
            "chain" => {
                let next = arguments.number(1, "NEXT")? as u16;
                let writes = if queue()? > DEFLATE { DEVICE_WRITES } else { 0 };
                let descriptor = Descriptor { address: numbers(), length: 4, flags: HAS_NEXT | writes, next };
                self.lie(queue()?, descriptor, 0, 1, answer)
            }
            "flags" => {
                let flags = arguments.number(1, "FLAGS")? as u16;
                self.lie(queue()?, Descriptor { address: numbers(), length: 4, flags, next: 0 }, 0, 1, answer)
            }
            "buffer" => {
                let (address, length) = (arguments.number(1, "GPA")?, io::dword(arguments.number(2, "LENGTH")?));
                let flags = if arguments.number_or("write", 0)? != 0 { DEVICE_WRITES } else { 0 };
                self.lie(queue()?, Descriptor { address, length, flags, next: 0 }, 0, 1, answer)
            }
            "rings" => self.rings(queue()?, arguments.number(1, "GPA")?, answer),
            "stats" => self.stats(queue()?, arguments.number(1, "GPA")?, arguments.number(2, "TAGS")?, answer),
            "features" => self.features(arguments.number(0, "MASK")?, answer),
            "kicks" => {
                let (queue, count) = (io::dword(arguments.number(0, "QUEUE")?), arguments.number(1, "COUNT")?);
                (0..count).try_for_each(|_| self.write(register::QUEUE_NOTIFY, queue))?;
                self.state(answer)
            }
            "flood" => self.flood(arguments, answer),
            "reset" => self.resets(arguments, answer),
            _ => Err(Error::Other("numbers|index|head|chain|flags|buffer|rings|stats|features|kicks|flood|reset")),
        }
    }

    /// Page numbers of any kind: `FIRST`, `FIRST + step` and so on, modulo 2^32.
    fn numbers(&mut self, queue: usize, first: u64, count: u64, step: u64, answer: &mut Line) -> Result<(), Error> {
        let mut sent = 0;
        while sent < count {
            let some = (count - sent).min(BATCH as u64);
            for i in 0..some {
                let number = first.wrapping_add((sent + i).wrapping_mul(step)) as u32;
                // SAFETY: `i` is below BATCH, the array's length; no buffer is in flight that holds it.
                unsafe { (&raw mut (*AREA.0.get()).numbers).cast::<u32>().add(i as usize).write_volatile(number) };
            }
            self.submit(queue, numbers(), some as u32 * 4, false)?;
            sent += some;
        }
        self.state(answer)
    }

    /// Offers a chain that may be anything, in a ring that may say anything, and says whether the device returned it.
    fn lie(
        &mut self,
        queue: usize,
        descriptor: Descriptor,
        head: u16,
        ahead: u16,
        answer: &mut Line,
    ) -> Result<(), Error> {
        if queue >= self.queues() {
            return Err(Error::Other("there is no such queue"));
        }
        // SAFETY: the pointer is to one of the area's queues, which lives for ever and which no reference is made to.
        unsafe { (&raw mut (*area_queue(queue)).descriptors[0]).write_volatile(descriptor) };
        let ticket = self.publish(queue, head, ahead)?;
        let returned = self.collect(ticket, PATIENCE_MS)?.is_some();
        let _ = write!(answer, " returned={}", u8::from(returned));
        self.state(answer)
    }

    /// Moves the rings of a queue to where they should not be, and kicks it.
    fn rings(&mut self, queue: usize, address: u64, answer: &mut Line) -> Result<(), Error> {
        self.write(register::QUEUE_SELECT, queue as u32)?;
        self.write(register::QUEUE_READY, 0)?;
        for register in [register::QUEUE_DESCRIPTORS, register::QUEUE_AVAILABLE, register::QUEUE_USED] {
            self.write(register, address as u32)?;
            self.write(register + 4, (address >> 32) as u32)?;
        }
        self.write(register::QUEUE_READY, 1)?;
        self.write(register::QUEUE_NOTIFY, queue as u32)?;
        self.state(answer)
    }

    /// Statistics of so many tags, from `address` on, more than there are.
    fn stats(&mut self, queue: usize, address: u64, tags: u64, answer: &mut Line) -> Result<(), Error> {
        // A tag of two bytes and a value of eight each; any bytes will do.
        let bytes = tags * 10;
        (0..bytes.div_ceil(8)).for_each(|word| poke(address + word * 8, word | word << 40));
        let descriptor = Descriptor { address, length: io::dword(bytes), flags: 0, next: 0 };
        self.lie(queue, descriptor, 0, 1, answer)
    }

    /// Other features, while the device works with those that were agreed on.
    fn features(&mut self, mask: u64, answer: &mut Line) -> Result<(), Error> {
        for half in 0..2 {
            self.write(register::DRIVER_FEATURES_SELECT, half)?;
            self.write(register::DRIVER_FEATURES, (mask >> (32 * half)) as u32)?;
        }
        self.state(answer)
    }

    /// Inflates and deflates the pages of `START SIZE` as fast as it can, `rounds` times; with `touch=1` it also uses
    /// them each time they are back.
    fn flood(&mut self, arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
        let (start, size) = (arguments.number(0, "START")?, arguments.number(1, "SIZE")?);
        let (first, end) = (start / PAGE_SIZE, start.saturating_add(size) / PAGE_SIZE);
        let (rounds, touch) = (arguments.number_or("rounds", 0)?, arguments.number_or("touch", 0)? != 0);
        let mut round = 0;
        while (rounds == 0 || round < rounds) && !(rounds == 0 && io::wanted()) {
            self.send(INFLATE, first, end)?;
            self.send(DEFLATE, first, end)?;
            if touch {
                (first..end).for_each(|page| poke(page * PAGE_SIZE, round));
            }
            round += 1;
        }
        let _ = write!(answer, " rounds={round}");
        self.state(answer)
    }

    /// Gives pages and resets the device before they can be taken; and begins anew, `rounds` times.
    fn resets(&mut self, arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
        let (start, size) = (arguments.number(0, "START")?, arguments.number(1, "SIZE")?);
        let (first, count) = (start / PAGE_SIZE, (size / PAGE_SIZE).min(BATCH as u64));
        let rounds = arguments.number_or("rounds", 1)?;
        for _ in 0..rounds {
            for i in 0..count {
                let number = (first + i) as u32;
                // SAFETY: `i` is below BATCH, the array's length. What may be in flight is to be confused by this.
                unsafe { (&raw mut (*AREA.0.get()).numbers).cast::<u32>().add(i as usize).write_volatile(number) };
            }
            self.offer(INFLATE, &[Descriptor { address: numbers(), length: count as u32 * 4, flags: 0, next: 0 }])?;
            self.write(register::STATUS, 0)?;
            self.init(Arguments(""), &mut Line::new())?;
        }
        let _ = write!(answer, " rounds={rounds}");
        self.state(answer)
    }

    fn state(&mut self, answer: &mut Line) -> Result<(), Error> {
        let state = self.read(register::STATUS)?;
        let _ = write!(answer, " status={state:#x}");
        Ok(())
    }
}

/// Where the page numbers are.
fn numbers() -> u64 {
    // SAFETY: only computes the address of a field.
    unsafe { (&raw const (*AREA.0.get()).numbers) as u64 }
}

//! A virtio-balloon driver that polls: virtio 1.x over MMIO, split queues, one buffer in flight.
//!
//! It does what a test asks, also what no sane driver would do (`raw`, and all of [`evil`]), and reports what the device
//! did.

mod allocate;
mod evil;
mod give;

use core::cell::UnsafeCell;
use core::fmt::Write;
use core::hint::spin_loop;
use core::sync::atomic::{Ordering::SeqCst, fence};

use guest_common::{Arguments, PAGE_SIZE};

use crate::Error;
use crate::io::{self, Line};
use crate::memory::poke;

/// Where the monitor puts virtio-mmio devices, how far apart, and how many are looked at.
const WINDOWS: u64 = 0xd000_0000;
const WINDOW_BYTES: u64 = 0x1000;
const WINDOW_COUNT: u64 = 19;

/// Registers of virtio-mmio, version 2 (virtio 1.2, 4.2.2).
mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const QUEUE_NOTIFY: u64 = 0x50;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub const QUEUE_AVAILABLE: u64 = 0x90;
    pub const QUEUE_USED: u64 = 0xa0;
    pub const CONFIG_NUM_PAGES: u64 = 0x100;
    pub const CONFIG_ACTUAL: u64 = 0x104;
}

const MAGIC: u32 = 0x7472_6976;
const BALLOON_ID: u32 = 5;

/// Device status bits.
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
}

/// Feature bits.
mod feature {
    pub const MUST_TELL_HOST: u64 = 1 << 0;
    pub const STATS: u64 = 1 << 1;
    pub const FREE_PAGE_HINT: u64 = 1 << 3;
    pub const REPORTING: u64 = 1 << 5;
    pub const VERSION_1: u64 = 1 << 32;
}

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
/// Most queues that the features can ask for.
const QUEUES: usize = 5;
/// Entries of a queue, if it is not said otherwise and the device allows that many; and most entries.
const QUEUE_SIZE: u16 = 16;
const MOST_ENTRIES: u16 = 128;
/// Page numbers a buffer holds: a page of them.
const BATCH: usize = 1024;
/// Turns of a loop before the device is waited for, and milliseconds to wait at a time, and how often.
const SPINS: u32 = 1000;
const POLL_MS: u32 = 1;
const POLLS: u32 = 60_000;
/// Milliseconds between two looks at the target.
const ROUND_MS: u32 = 10;
/// Descriptor flag: the chain goes on.
const HAS_NEXT: u16 = 1;
/// Descriptor flag: the device writes.
const DEVICE_WRITES: u16 = 2;
/// Flag of the available ring: no interrupt, please.
const NO_INTERRUPT: u16 = 1;

/// One split queue, in a page of its own, laid out as the device reads it.
#[repr(C, align(4096))]
struct Queue {
    descriptors: [Descriptor; MOST_ENTRIES as usize],
    available: Ring<[u16; MOST_ENTRIES as usize]>,
    used: Ring<[[u32; 2]; MOST_ENTRIES as usize]>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

#[repr(C, align(8))]
struct Ring<T> {
    flags: u16,
    index: u16,
    entries: T,
}

/// What has been given to a queue: where the device will say that it is back.
#[derive(Clone, Copy)]
struct Ticket {
    queue: usize,
    seen: u16,
}

#[repr(C, align(4096))]
struct Area {
    queues: [Queue; QUEUES],
    numbers: [u32; BATCH],
}

/// Memory that the device reads and writes as well.
struct DeviceMemory(UnsafeCell<Area>);

// SAFETY: only vCPU 0 runs commands, so there is one user in this guest; accesses shared with the device are volatile.
unsafe impl Sync for DeviceMemory {}

// SAFETY: the area consists of integers, for which zeroes are a value.
static AREA: DeviceMemory = DeviceMemory(UnsafeCell::new(unsafe { core::mem::zeroed() }));

/// The driver's state.
pub struct Balloon {
    window: Option<u64>,
    features: u64,
    queue_size: u16,
    /// Pages in the balloon, as the driver tells the device.
    actual: u32,
    /// Pages of its range that `auto` has given away, from the start.
    given: u64,
}

impl Balloon {
    /// A driver without a device.
    pub const fn new() -> Self {
        Self { window: None, features: 0, queue_size: QUEUE_SIZE, actual: 0, given: 0 }
    }

    /// Obeys `balloon VERB ...`.
    pub fn obey(&mut self, arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
        match arguments.word(0) {
            Some("init") => self.init(arguments, answer),
            Some("status") => self.status(answer),
            Some("inflate") => {
                let (start, end) = range(arguments)?;
                if arguments.number_or("touch", 0)? != 0 {
                    // As a kernel with init_on_alloc does.
                    (start..end).for_each(|page| poke(page * PAGE_SIZE, 0));
                }
                self.send(INFLATE, start, end)?;
                self.set_actual(u64::from(self.actual) + (end - start))?;
                self.describe(end - start, answer)
            }
            Some("deflate") => {
                let (start, end) = range(arguments)?;
                self.send(DEFLATE, start, end)?;
                self.set_actual(u64::from(self.actual).saturating_sub(end - start))?;
                self.describe(end - start, answer)
            }
            Some("report") => {
                let (start, end) = range(arguments)?;
                let queue = self.reporting_queue()?;
                let length = u32::try_from((end - start) * PAGE_SIZE).map_err(|_| Error::Other("SIZE is too large"))?;
                self.submit(queue, start * PAGE_SIZE, length, true)?;
                self.describe(end - start, answer)
            }
            Some("auto") => self.follow(arguments, answer),
            Some("give") => self.give(arguments, answer),
            Some("allocate") => self.allocate(arguments, answer),
            Some("evil") => self.evil(arguments, answer),
            Some("raw") => {
                let queue = usize::try_from(arguments.number(1, "QUEUE")?).unwrap_or(usize::MAX);
                let (gpa, length) = (arguments.number(2, "GPA")?, io::dword(arguments.number(3, "LENGTH")?));
                let used = self.submit(queue, gpa, length, arguments.number_or("write", 0)? != 0)?;
                let _ = write!(answer, " used={used}");
                Ok(())
            }
            Some("reset") => {
                self.write(register::STATUS, 0)?;
                *self = Self::new();
                Ok(())
            }
            _ => Err(Error::Other("balloon init|status|inflate|deflate|report|auto|give|allocate|raw|evil|reset")),
        }
    }

    /// Finds a balloon (number `device` of them), agrees on features and switches all queues on.
    fn init(&mut self, arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
        let wanted = arguments.number_or("features", feature::MUST_TELL_HOST)? | feature::VERSION_1;
        let skip = usize::try_from(arguments.number_or("device", 0)?).unwrap_or(usize::MAX);
        let size = arguments.number_or("size", QUEUE_SIZE.into())?.clamp(1, MOST_ENTRIES.into()) as u16;
        let is_balloon = |window: &u64| {
            read32(window + register::MAGIC) == MAGIC && read32(window + register::DEVICE_ID) == BALLOON_ID
        };
        let window = (0..WINDOW_COUNT).map(|i| WINDOWS + i * WINDOW_BYTES).filter(is_balloon).nth(skip);
        let window = window.ok_or(Error::Other("no virtio-balloon device"))?;
        if read32(window + register::VERSION) != 2 {
            return Err(Error::Other("the device is not of version 2"));
        }
        *self = Self { window: Some(window), queue_size: size, ..Self::new() };
        let mut state = 0;
        self.write(register::STATUS, state)?;
        for bit in [status::ACKNOWLEDGE, status::DRIVER] {
            state |= bit;
            self.write(register::STATUS, state)?;
        }
        let mut offered = 0;
        for half in 0..2 {
            self.write(register::DEVICE_FEATURES_SELECT, half)?;
            offered |= u64::from(self.read(register::DEVICE_FEATURES)?) << (32 * half);
        }
        self.features = offered & wanted;
        for half in 0..2 {
            self.write(register::DRIVER_FEATURES_SELECT, half)?;
            self.write(register::DRIVER_FEATURES, (self.features >> (32 * half)) as u32)?;
        }
        state |= status::FEATURES_OK;
        self.write(register::STATUS, state)?;
        if self.read(register::STATUS)? & status::FEATURES_OK == 0 {
            return Err(Error::Other("the device refused the features"));
        }
        for queue in 0..self.queues() {
            self.start_queue(queue)?;
        }
        state |= status::DRIVER_OK;
        self.write(register::STATUS, state)?;
        let _ = write!(answer, " offered={offered:#x} features={:#x} queues={}", self.features, self.queues());
        Ok(())
    }

    /// How many queues the agreed features bring; numbers are dense.
    fn queues(&self) -> usize {
        let optional = [feature::STATS, feature::FREE_PAGE_HINT, feature::REPORTING];
        2 + optional.iter().filter(|bit| self.features & **bit != 0).count()
    }

    fn reporting_queue(&self) -> Result<usize, Error> {
        if self.features & feature::REPORTING == 0 {
            return Err(Error::Other("page reporting was not agreed on: balloon init features=0x20"));
        }
        Ok(self.queues() - 1)
    }

    fn start_queue(&mut self, queue: usize) -> Result<(), Error> {
        self.write(register::QUEUE_SELECT, queue as u32)?;
        let max = self.read(register::QUEUE_SIZE_MAX)?;
        if max == 0 {
            return Err(Error::Other("a queue is missing"));
        }
        self.queue_size = self.queue_size.min(max as u16);
        let memory = area_queue(queue);
        // SAFETY: the pointer is to one of the area's queues, which lives for ever; nothing is in flight on it yet.
        unsafe {
            memory.write_bytes(0, 1);
            (&raw mut (*memory).available.flags).write_volatile(NO_INTERRUPT);
        }
        self.write(register::QUEUE_SIZE, self.queue_size.into())?;
        // SAFETY: only computes the addresses of fields.
        let parts = unsafe { [&raw const (*memory).descriptors as u64, &raw const (*memory).available as u64] };
        // SAFETY: as above.
        let used = unsafe { &raw const (*memory).used as u64 };
        let registers = [register::QUEUE_DESCRIPTORS, register::QUEUE_AVAILABLE, register::QUEUE_USED];
        for (register, address) in registers.into_iter().zip([parts[0], parts[1], used]) {
            self.write(register, address as u32)?;
            self.write(register + 4, (address >> 32) as u32)?;
        }
        self.write(register::QUEUE_READY, 1)
    }

    /// Sends the page numbers `start..end` to a queue, a buffer at a time.
    fn send(&mut self, queue: usize, start: u64, end: u64) -> Result<(), Error> {
        // SAFETY: only computes the address of a field.
        let numbers = unsafe { &raw mut (*AREA.0.get()).numbers };
        let mut first = start;
        while first < end {
            let count = (end - first).min(BATCH as u64);
            for i in 0..count {
                // SAFETY: `i` is below BATCH, the array's length; no buffer is in flight that holds it.
                unsafe { numbers.cast::<u32>().add(i as usize).write_volatile((first + i) as u32) };
            }
            self.submit(queue, numbers as u64, count as u32 * 4, false)?;
            first += count;
        }
        Ok(())
    }

    /// Gives one buffer to the device and waits until it comes back; returns the length that the device reports.
    fn submit(&mut self, queue: usize, address: u64, length: u32, device_writes: bool) -> Result<u32, Error> {
        let flags = if device_writes { DEVICE_WRITES } else { 0 };
        let ticket = self.offer(queue, &[Descriptor { address, length, flags, next: 0 }])?;
        self.collect(ticket, POLLS)?.ok_or(Error::Other("the device did not answer"))
    }

    /// Gives descriptors 0 and up to the device, as one chain that begins with the first, and rings the bell.
    fn offer(&mut self, queue: usize, chain: &[Descriptor]) -> Result<Ticket, Error> {
        if queue >= self.queues() {
            return Err(Error::Other("there is no such queue"));
        }
        let memory = area_queue(queue);
        for (i, descriptor) in chain.iter().enumerate().take(usize::from(MOST_ENTRIES)) {
            // SAFETY: the pointer is to one of the area's queues, which lives for ever and which no reference is made to;
            // `i` is below the table's length.
            unsafe { (&raw mut (*memory).descriptors[i]).write_volatile(*descriptor) };
        }
        self.publish(queue, 0, 1)
    }

    /// Puts `head` into the available ring, adds `ahead` to its index, and rings the bell.
    fn publish(&mut self, queue: usize, head: u16, ahead: u16) -> Result<Ticket, Error> {
        let memory = area_queue(queue);
        // SAFETY: as in `offer`; the ring index is below the queue's size, hence below the arrays' length.
        let seen = unsafe {
            let seen = (&raw const (*memory).used.index).read_volatile();
            let index = (&raw const (*memory).available.index).read_volatile();
            let slot = usize::from(index % self.queue_size);
            (&raw mut (*memory).available.entries[slot]).write_volatile(head);
            fence(SeqCst);
            (&raw mut (*memory).available.index).write_volatile(index.wrapping_add(ahead));
            fence(SeqCst);
            seen
        };
        self.write(register::QUEUE_NOTIFY, queue as u32)?;
        Ok(Ticket { queue, seen })
    }

    /// Waits until the device has returned something: the length that it reports, or nothing after `polls` milliseconds.
    fn collect(&mut self, ticket: Ticket, polls: u32) -> Result<Option<u32>, Error> {
        let Ticket { queue, seen } = ticket;
        let memory = area_queue(queue);
        // SAFETY: the pointer is to one of the area's queues, which lives for ever and which no reference is made to.
        let used_index = || unsafe { (&raw const (*memory).used.index).read_volatile() };
        for _ in 0..SPINS {
            if used_index() != seen {
                break;
            }
            spin_loop();
        }
        let mut polled = 0;
        while used_index() == seen {
            if polled == polls {
                return Ok(None);
            }
            polled += 1;
            io::wait(POLL_MS);
        }
        fence(SeqCst);
        let slot = usize::from(seen % self.queue_size);
        // SAFETY: as above; the slot is below the queue's size, hence below the array's length.
        let [_, used] = unsafe { (&raw const (*memory).used.entries[slot]).read_volatile() };
        let pending = self.read(register::INTERRUPT_STATUS)?;
        if pending != 0 {
            self.write(register::INTERRUPT_ACK, pending)?;
        }
        Ok(Some(used))
    }

    /// Follows the target for some rounds with the pages of `START SIZE`, from the first one up; at most `limit` pages
    /// a round, a round each `every` milliseconds. `rounds=0` ends when somebody types.
    fn follow(&mut self, arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
        let (start, end) = range(arguments)?;
        let rounds = arguments.number_or("rounds", 1)?;
        let limit = arguments.number_or("limit", u64::MAX)?;
        let every = io::dword(arguments.number_or("every", ROUND_MS.into())?);
        let mut round = 0;
        loop {
            let target = u64::from(self.read(register::CONFIG_NUM_PAGES)?).min(end - start);
            if target > self.given {
                let next = target.min(self.given.saturating_add(limit));
                self.send(INFLATE, start + self.given, start + next)?;
                self.given = next;
            } else if target < self.given {
                let next = target.max(self.given.saturating_sub(limit));
                self.send(DEFLATE, start + next, start + self.given)?;
                self.given = next;
            }
            if u64::from(self.actual) != self.given {
                self.set_actual(self.given)?;
            }
            round += 1;
            if round == rounds || rounds == 0 && io::wanted() {
                return self.describe(self.given, answer);
            }
            io::wait(every);
        }
    }

    fn set_actual(&mut self, pages: u64) -> Result<(), Error> {
        self.actual = io::dword(pages);
        self.write(register::CONFIG_ACTUAL, self.actual)
    }

    fn status(&mut self, answer: &mut Line) -> Result<(), Error> {
        self.describe(self.given, answer)?;
        let state = self.read(register::STATUS)?;
        let _ = write!(answer, " status={state:#x} features={:#x}", self.features);
        Ok(())
    }

    fn describe(&mut self, pages: u64, answer: &mut Line) -> Result<(), Error> {
        let (target, actual) = (self.read(register::CONFIG_NUM_PAGES)?, self.read(register::CONFIG_ACTUAL)?);
        let _ = write!(answer, " pages={pages} target={target} actual={actual}");
        Ok(())
    }

    fn window(&self) -> Result<u64, Error> {
        self.window.ok_or(Error::Other("no device yet: balloon init"))
    }

    fn read(&self, register: u64) -> Result<u32, Error> {
        Ok(read32(self.window()? + register))
    }

    fn write(&self, register: u64, value: u32) -> Result<(), Error> {
        let address = self.window()? + register;
        // SAFETY: a device register of 32 bits; no memory of this program is there.
        unsafe {
            core::arch::asm!("mov dword ptr [{}], {:e}", in(reg) address, in(reg) value,
                options(nostack, preserves_flags));
        }
        Ok(())
    }
}

/// The pages, by number, of plain words 1 and 2: `START SIZE`.
fn range(arguments: Arguments<'_>) -> Result<(u64, u64), Error> {
    let (start, size) = (arguments.number(1, "START")?, arguments.number(2, "SIZE")?);
    if start % PAGE_SIZE != 0 || size % PAGE_SIZE != 0 {
        return Err(Error::Other("START and SIZE must be multiples of 4K"));
    }
    let end = start.checked_add(size).ok_or(Error::Other("START + SIZE is too large"))?;
    Ok((start / PAGE_SIZE, end / PAGE_SIZE))
}

fn area_queue(queue: usize) -> *mut Queue {
    // SAFETY: only computes the address of an element; the index is below QUEUES, or this panics.
    unsafe { &raw mut (*AREA.0.get()).queues[queue] }
}

/// Reads a device register. One plain instruction, which every monitor's emulator knows.
fn read32(address: u64) -> u32 {
    let value: u32;
    // SAFETY: a device register of 32 bits; where no device is, the monitor answers with something, and nothing else
    // happens.
    unsafe {
        core::arch::asm!("mov {:e}, dword ptr [{}]", out(reg) value, in(reg) address,
            options(nostack, preserves_flags));
    }
    value
}

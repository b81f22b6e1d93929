//! The guest's side: memory that can refuse, a driver with one queue, and an owner of pages that keeps a diary.
//!
//! `virtio_queue::mock::MockSplitQueue` places the used ring over the second half of the available ring, so it serves
//! only for short rings (see `basic.rs`); this driver has a layout of its own.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;

use balloon::{GuestPages, PageRange, WouldBlock};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions};

pub const MEMORY: u64 = 1 << 20;
pub const DESC: u64 = 0x1000;
pub const AVAIL: u64 = 0x4000;
pub const USED: u64 = 0x6000;
pub const BUFFERS: u64 = 0x10000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Guest memory of which the device may be refused a range, or a number of accesses to come.
pub struct FlakyMemory {
    mem: GuestMemoryMmap,
    pub blocked: RefCell<Vec<Range<u64>>>,
    pub accesses_until_refusal: Cell<Option<u32>>,
    pub accesses: Cell<u64>,
}

impl GuestMemory for FlakyMemory {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = <GuestMemoryMmap as GuestMemory>::Bitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&self.mem, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, GuestMemoryError> {
        self.accesses.set(self.accesses.get() + 1);
        let refused = match self.accesses_until_refusal.get() {
            Some(0) => {
                self.accesses_until_refusal.set(None);
                true
            }
            Some(n) => {
                self.accesses_until_refusal.set(Some(n - 1));
                false
            }
            None => false,
        };
        let end = addr.0.saturating_add(count as u64);
        if refused || self.blocked.borrow().iter().any(|b| b.start < end && addr.0 < b.end) {
            return Err(GuestMemoryError::IOError(io::ErrorKind::WouldBlock.into()));
        }
        GuestMemory::get_slices(&self.mem, addr, count, access)
    }
}

/// A driver with one queue. It writes behind the back of `FlakyMemory`: the guest is never refused.
pub struct Driver {
    pub mem: FlakyMemory,
    pub size: u16,
    pub avail: u16,
}

impl Driver {
    pub fn new(size: u16) -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let mem = FlakyMemory {
            mem,
            blocked: RefCell::default(),
            accesses_until_refusal: Cell::default(),
            accesses: Cell::default(),
        };
        Driver { mem, size, avail: 0 }
    }

    /// The device's view of the queue.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(DESC)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_ready(true);
        assert!(queue.is_valid(&self.mem));
        queue
    }

    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.mem.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub fn write_pfns(&self, addr: u64, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.write(addr, &bytes);
    }

    pub fn describe(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
        self.mem.mem.write_obj(descriptor, GuestAddress(DESC + 16 * u64::from(index))).unwrap();
    }

    /// Makes the chain that starts at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.avail % self.size);
        self.mem.mem.write_obj(head.to_le(), GuestAddress(AVAIL + 4 + 2 * slot)).unwrap();
        self.set_avail(self.avail.wrapping_add(1));
    }

    pub fn set_avail(&mut self, index: u16) {
        self.avail = index;
        self.mem.mem.write_obj(index.to_le(), GuestAddress(AVAIL + 2)).unwrap();
    }

    /// One chain of one descriptor, number `head`, with these page numbers.
    pub fn send(&mut self, head: u16, pfns: &[u32]) {
        let addr = BUFFERS + 0x400 * u64::from(head);
        self.write_pfns(addr, pfns);
        self.describe(head, addr, 4 * pfns.len() as u32, 0, 0);
        self.offer(head);
    }

    /// One chain of descriptors `head`, `head + 1` and so on, each a range of memory (address, bytes) that is reported.
    pub fn report(&mut self, head: u16, ranges: &[(u64, u32)]) {
        for (i, &(addr, len)) in (head..).zip(ranges) {
            let flags = WRITE | if usize::from(i - head) + 1 < ranges.len() { NEXT } else { 0 };
            self.describe(i, addr, len, flags, i + 1);
        }
        self.offer(head);
    }

    pub fn used_index(&self) -> u16 {
        u16::from_le(self.mem.mem.read_obj(GuestAddress(USED + 2)).unwrap())
    }

    /// The heads in the used ring, oldest first, of the last `size` at most.
    pub fn used(&self) -> Vec<u16> {
        let index = self.used_index();
        let first = index.saturating_sub(self.size);
        (first..index)
            .map(|i| {
                let at = GuestAddress(USED + 4 + 8 * u64::from(i % self.size));
                let [head, len]: [u32; 2] = self.mem.mem.read_obj(at).unwrap();
                assert_eq!(len, 0, "the device writes into no buffer");
                u16::try_from(u32::from_le(head)).unwrap()
            })
            .collect()
    }
}

/// An owner of guest memory that writes down what it was asked for, and refuses when told to.
#[derive(Default)]
pub struct Diary {
    pub inflated: Vec<Vec<PageRange>>,
    pub deflated: Vec<Vec<PageRange>>,
    pub reported: Vec<Vec<PageRange>>,
    pub refuse: u32,
}

impl Diary {
    fn refused(&mut self) -> Result<(), WouldBlock> {
        match self.refuse.checked_sub(1) {
            Some(left) => {
                self.refuse = left;
                Err(WouldBlock)
            }
            None => Ok(()),
        }
    }
}

impl GuestPages for Diary {
    fn inflate(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        self.refused()?;
        self.inflated.push(ranges.to_vec());
        Ok(())
    }

    fn deflate(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        self.refused()?;
        self.deflated.push(ranges.to_vec());
        Ok(())
    }

    fn report(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        self.refused()?;
        self.reported.push(ranges.to_vec());
        Ok(())
    }
}

pub fn range(first: u64, pages: u64) -> PageRange {
    PageRange { first, pages }
}

/// The bytes of a statistics buffer.
pub fn stats(entries: &[(u16, u64)]) -> Vec<u8> {
    let entry = |&(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat();
    entries.iter().flat_map(entry).collect()
}

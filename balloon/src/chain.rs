//! Reading descriptor chains, with the reason when one cannot be read.
//!
//! `virtio_queue::DescriptorChain` ends silently at an error. Here an access that is refused for the moment must not
//! look like a short chain: its page numbers would be lost and its buffer returned. So the walk is done here, on the
//! addresses that the [`Queue`] holds, and says which of the two it met.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

use crate::counters::{GuestFault, GuestFaults};
use crate::pages::is_would_block;
use crate::ranges::PageRange;
use crate::spec;

/// Why something in guest memory was not read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Not available at the moment: put back what was taken and try later.
    Blocked,
    /// The guest's doing: count it and go on.
    Fault(GuestFault),
}

impl From<GuestMemoryError> for Refused {
    fn from(error: GuestMemoryError) -> Self {
        if is_would_block(&error) { Refused::Blocked } else { Refused::Fault(GuestFault::NotRam) }
    }
}

impl From<virtio_queue::Error> for Refused {
    fn from(error: virtio_queue::Error) -> Self {
        match error {
            virtio_queue::Error::GuestMemory(e) | virtio_queue::Error::GuestMemoryError(e) => e.into(),
            virtio_queue::Error::InvalidDescriptorIndex => Refused::Fault(GuestFault::DescriptorIndex),
            _ => Refused::Fault(GuestFault::NotRam),
        }
    }
}

/// How many chains the guest has made available and the device has not taken: at most the queue's size.
pub(crate) fn available<M: GuestMemory>(queue: &Queue, mem: &M) -> Result<u16, Refused> {
    let index = queue.avail_idx(mem, Ordering::Acquire)?.0;
    let ahead = index.wrapping_sub(queue.next_avail());
    if ahead > queue.size() { Err(Refused::Fault(GuestFault::AvailIndex)) } else { Ok(ahead) }
}

/// Takes the head of the next available chain. On a fault the entry is passed over; on `Blocked` it stays.
pub(crate) fn pop<M: GuestMemory>(queue: &mut Queue, mem: &M) -> Result<u16, Refused> {
    let next = queue.next_avail();
    let slot = u64::from(next.checked_rem(queue.size()).ok_or(Refused::Fault(GuestFault::AvailIndex))?);
    // Behind the ring's flags and index, two bytes each.
    let head = ring_address(queue.avail_ring(), 4 + 2 * slot)
        .and_then(|at| mem.load::<u16>(at, Ordering::Acquire).map_err(Refused::from));
    if head != Err(Refused::Blocked) {
        queue.set_next_avail(next.wrapping_add(1));
    }
    let head = u16::from_le(head?);
    if head < queue.size() { Ok(head) } else { Err(Refused::Fault(GuestFault::DescriptorIndex)) }
}

/// Puts `head` into the used ring. On an error nothing has been returned, and it may be tried again.
pub(crate) fn give_back<M: GuestMemory>(queue: &mut Queue, mem: &M, head: u16) -> Result<(), Refused> {
    let next_used = queue.next_used();
    queue.add_used(mem, head, 0).map_err(|error| {
        // `add_used` moves on before it publishes the index; only the index makes an entry visible.
        queue.set_next_used(next_used);
        error.into()
    })
}

/// Appends to `buffer` what the device-readable descriptors of a chain hold, up to `limit` bytes from this chain. The
/// rest of a longer one is counted and dropped. On an error the buffer may hold a part of the chain.
///
/// The work is bounded by the queue's size and `limit`, whatever the descriptors say.
pub(crate) fn read<M: GuestMemory>(
    queue: &Queue,
    mem: &M,
    head: u16,
    limit: usize,
    buffer: &mut Vec<u8>,
    faults: &mut GuestFaults,
) -> Result<(), Refused> {
    let mut room = limit;
    walk(queue, mem, head, |descriptor| {
        if descriptor.is_write_only() {
            return Err(Refused::Fault(GuestFault::Writable));
        }
        let len = (descriptor.len() as usize).min(room);
        if len > 0 {
            let start = buffer.len();
            buffer.resize(start + len, 0);
            mem.read_slice(&mut buffer[start..], descriptor.addr())?;
        }
        room -= len;
        if len < descriptor.len() as usize {
            faults.count(GuestFault::Oversized);
            return Ok(ControlFlow::Break(()));
        }
        Ok(ControlFlow::Continue(()))
    })
}

/// Appends to `ranges` the pages that the device-writable descriptors of a chain describe, up to `limit` pages from this
/// chain; the rest of a longer one is counted and dropped. Nothing is read from them or written to them. On an error
/// `ranges` may hold a part of the chain.
///
/// A page is reported whole and lies in RAM, or its whole chain is refused: a driver that cannot tell its pages is not
/// believed about their neighbours.
pub(crate) fn reported<M: GuestMemory>(
    queue: &Queue,
    mem: &M,
    head: u16,
    limit: u64,
    ranges: &mut Vec<PageRange>,
    faults: &mut GuestFaults,
) -> Result<(), Refused> {
    let mut room = limit;
    walk(queue, mem, head, |descriptor| {
        if !descriptor.is_write_only() {
            return Err(Refused::Fault(GuestFault::Readable));
        }
        let (address, bytes) = (descriptor.addr(), u64::from(descriptor.len()));
        if bytes == 0 || (address.0 | bytes) % spec::PAGE_BYTES != 0 {
            return Err(Refused::Fault(GuestFault::NotPages));
        }
        // Asks where RAM is; nothing is touched.
        if !mem.check_range(address, bytes as usize, Permissions::Write) {
            return Err(Refused::Fault(GuestFault::NotRam));
        }
        let pages = (bytes / spec::PAGE_BYTES).min(room);
        if pages > 0 {
            ranges.push(PageRange { first: address.0 / spec::PAGE_BYTES, pages });
        }
        room -= pages;
        if pages < bytes / spec::PAGE_BYTES {
            faults.count(GuestFault::Oversized);
            return Ok(ControlFlow::Break(()));
        }
        Ok(ControlFlow::Continue(()))
    })
}

/// Shows each descriptor of a chain to `visit`, until that has seen enough. Never more than the table holds.
fn walk<M: GuestMemory>(
    queue: &Queue,
    mem: &M,
    head: u16,
    mut visit: impl FnMut(&Descriptor) -> Result<ControlFlow<()>, Refused>,
) -> Result<(), Refused> {
    let mut index = head;
    for _ in 0..queue.size() {
        if index >= queue.size() {
            return Err(Refused::Fault(GuestFault::DescriptorIndex));
        }
        let at = ring_address(queue.desc_table(), u64::from(index) * size_of::<Descriptor>() as u64)?;
        let descriptor: Descriptor = mem.read_obj(at)?;
        if descriptor.refers_to_indirect_table() {
            return Err(Refused::Fault(GuestFault::Indirect));
        }
        if visit(&descriptor)?.is_break() || !descriptor.has_next() {
            return Ok(());
        }
        index = descriptor.next();
    }
    Err(Refused::Fault(GuestFault::Loop))
}

fn ring_address(base: u64, offset: u64) -> Result<GuestAddress, Refused> {
    GuestAddress(base).checked_add(offset).ok_or(Refused::Fault(GuestFault::NotRam))
}

//! The arena: a mapping that is cut into segments, and what the two halves of the store share.
//!
//! Of each segment two numbers are shared. `written` is the writer's. `released` is the reader's while the segment has
//! entries; when both are equal nobody refers to the segment any more, and the writer alone decides what becomes of it.
//! So no number has two writers at a time, and plain loads and stores are enough. Only the bits of the segments that
//! fell empty are set by one side and cleared by the other; they say where to look and decide nothing.
//!
//! The mapping has no huge pages and is not merged, so a page of it is real memory exactly from the first byte written to
//! the discard.

use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::entry::{DEAD, HEADER, Header, UNIT};
use super::{Damage, PAGE};
use crate::worker::protocol::Area;

/// Bytes of a segment: what is freed at once.
pub const SEGMENT: usize = 64 << 10;

/// Units of a segment.
pub const SEGMENT_UNITS: u32 = (SEGMENT / UNIT) as u32;

/// The most segments: a place is 32 bits, of which the first is none and the last quarter is for the file.
const MOST_SEGMENTS: u64 = (super::FIRST_SLOT / SEGMENT_UNITS - 1) as u64;

/// Segments for a guest with `ram_pages` pages of RAM: all of it, and an eighth for what is dead. Entries are at most
/// 3/4 of a page, so an arena that is cleaned is never full.
pub fn segments_for(ram_pages: u64) -> usize {
    let ram = ram_pages.div_ceil((SEGMENT / PAGE) as u64);
    (ram + ram / 8 + 4).min(MOST_SEGMENTS) as usize
}

/// Private anonymous memory, all zeroes, that is real only where it was written.
pub struct Mapping {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to the value alone and any thread may unmap it.
unsafe impl Send for Mapping {}
// SAFETY: a shared reference gives nothing but the address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes`.
    ///
    /// # Errors
    /// When the host refuses the address space.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
        let base = match NonNull::new(raw.cast()) {
            Some(base) if raw != libc::MAP_FAILED => base,
            _ => return Err(io::Error::last_os_error()),
        };
        let mapping = Self { base, bytes };
        for advice in [libc::MADV_DONTFORK, libc::MADV_DONTDUMP, libc::MADV_NOHUGEPAGE, libc::MADV_UNMERGEABLE] {
            // A kernel without huge pages, or without merging, has nothing against it.
            mapping
                .advise(0, bytes, advice)
                .or_else(|e| if e.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(e) })?;
        }
        Ok(mapping)
    }

    /// The memory, for an owner who shares it with nobody.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is readable and writable for its whole length, initialised with zeroes by the kernel, and
        // the exclusive reference keeps everybody else away.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }

    /// Where it is in this process.
    pub fn area(&self) -> Area {
        Area { hva: self.base.as_ptr() as u64, bytes: self.bytes as u64 }
    }

    fn advise(&self, from: usize, bytes: usize, advice: i32) -> io::Result<()> {
        assert!(from + bytes <= self.bytes);
        // SAFETY: the range is inside the mapping. The one piece of advice that changes content is the discard of
        // `Arena::discard`, whose segment nobody refers to.
        match unsafe { libc::madvise(self.base.as_ptr().add(from).cast(), bytes, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and with the value the last reference to it goes.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

/// Numbers of which all are zero at first, so that those that are never used take no memory.
struct Zeroes<T> {
    map: Mapping,
    length: usize,
    of: PhantomData<T>,
}

impl<T: ZeroIsValid> Zeroes<T> {
    fn new(length: usize) -> io::Result<Self> {
        Ok(Self { map: Mapping::new(length * size_of::<T>())?, length, of: PhantomData })
    }
}

impl<T: ZeroIsValid> Deref for Zeroes<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping has room for `length` of them and is aligned to a page; all bits zero is valid, and nobody
        // has another way to it than this.
        unsafe { std::slice::from_raw_parts(self.map.base.as_ptr().cast(), self.length) }
    }
}

/// # Safety
/// A value with all bits zero is valid.
unsafe trait ZeroIsValid {}

// SAFETY: integers.
unsafe impl ZeroIsValid for Segment {}
// SAFETY: an integer.
unsafe impl ZeroIsValid for AtomicU64 {}

/// What is shared of a segment, in units.
struct Segment {
    written: AtomicU16,
    released: AtomicU16,
}

/// The mapping and the shared numbers.
pub struct Arena {
    map: Mapping,
    segments: Zeroes<Segment>,
    /// A bit for each segment that fell empty since the writer last looked; it may have entries again.
    empty: Zeroes<AtomicU64>,
    /// Units that were ever released.
    released: AtomicU64,
    /// How often a segment fell empty.
    emptied: AtomicU64,
}

impl Arena {
    /// An arena of `segments` segments.
    ///
    /// # Errors
    /// When the host refuses the address space.
    pub fn map(segments: usize) -> io::Result<Self> {
        Ok(Self {
            map: Mapping::new(segments * SEGMENT)?,
            segments: Zeroes::new(segments)?,
            empty: Zeroes::new(segments.div_ceil(64))?,
            released: AtomicU64::new(0),
            emptied: AtomicU64::new(0),
        })
    }

    /// Where the mapping is in this process.
    pub fn area(&self) -> Area {
        self.map.area()
    }

    /// Number of segments.
    pub fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Units written to a segment since it was free.
    pub fn written(&self, segment: u32) -> u32 {
        self.segments[segment as usize].written.load(Ordering::Acquire).into()
    }

    /// Units of a segment that are not released. For the writer: an upper bound while the reader releases.
    pub fn live(&self, segment: u32) -> u32 {
        // Acquire: what the reader read of these entries, it read before.
        self.written(segment) - u32::from(self.segments[segment as usize].released.load(Ordering::Acquire))
    }

    /// Units that were ever released.
    pub fn released(&self) -> u64 {
        self.released.load(Ordering::Acquire)
    }

    /// How often a segment fell empty.
    pub fn emptied(&self) -> u64 {
        self.emptied.load(Ordering::Acquire)
    }

    /// Writes an entry, in `parts`, at the end of what is written to its segment. For the writer.
    ///
    /// # Panics
    /// When the entry is not at the end, or does not fit.
    pub fn write(&self, unit: u32, parts: [&[u8]; 2]) {
        let (segment, offset) = (unit / SEGMENT_UNITS, unit % SEGMENT_UNITS);
        let [bytes, rest] = parts.map(<[u8]>::len);
        let end = offset + super::entry::units(bytes + rest);
        assert!(offset == self.written(segment) && end <= SEGMENT_UNITS);
        let to = self.at(unit);
        // SAFETY: both parts lie between the end of what is written and the end of the segment, by the assertion. Nobody
        // reads there: `entry` goes no further than `written`, which is raised below.
        unsafe {
            std::ptr::copy_nonoverlapping(parts[0].as_ptr(), to, bytes);
            std::ptr::copy_nonoverlapping(parts[1].as_ptr(), to.add(bytes), rest);
        }
        self.segments[segment as usize].written.store(end as u16, Ordering::Release);
    }

    /// The entry at `unit`: its header, its payload, and whether it was released. The checksum is not looked at.
    ///
    /// # Errors
    /// [`Damage::NoEntry`] when nothing is written there, [`Damage::Header`] when it is no entry.
    pub fn entry(&self, unit: u32) -> Result<(Header, &[u8], bool), Damage> {
        let (segment, offset) = (unit / SEGMENT_UNITS, unit % SEGMENT_UNITS);
        if segment as usize >= self.segments.len() || offset >= self.written(segment) {
            return Err(Damage::NoEntry);
        }
        let at = self.at(unit);
        let mut bytes = [0; HEADER];
        // SAFETY: a unit below `written` is in the mapping and written, and a unit has more bytes than a header. Nobody
        // writes there but the reader, to the byte DEAD, which is left out here.
        unsafe {
            std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), DEAD);
            std::ptr::copy_nonoverlapping(at.add(DEAD + 1), bytes.as_mut_ptr().add(DEAD + 1), HEADER - DEAD - 1);
        }
        let header = Header::parse(bytes)?;
        if offset + header.units() > self.written(segment) {
            return Err(Damage::Header);
        }
        // SAFETY: the payload ends below `written`, as was just checked. An entry that is not released is not written to;
        // of a place that is none the bytes may be those of other entries, and then the checksum tells.
        let payload = unsafe { std::slice::from_raw_parts(at.add(HEADER), header.length.into()) };
        Ok((header, payload, self.dead(unit).load(Ordering::Relaxed) != 0))
    }

    /// Counts the entry at `unit`, of `units`, as released. For the reader, once an entry.
    ///
    /// # Errors
    /// [`Damage::Header`] when the segment has not so much that is live.
    pub fn release(&self, unit: u32, units: u32) -> Result<(), Damage> {
        let number = unit / SEGMENT_UNITS;
        let segment = &self.segments[number as usize];
        let written = u32::from(segment.written.load(Ordering::Relaxed));
        let released = u32::from(segment.released.load(Ordering::Relaxed)) + units;
        if released > written {
            return Err(Damage::Header);
        }
        self.dead(unit).store(1, Ordering::Relaxed);
        self.released.store(self.released.load(Ordering::Relaxed) + u64::from(units), Ordering::Release);
        // Release: the writer that sees the segment empty may write over what was read of it.
        segment.released.store(released as u16, Ordering::Release);
        if released == written {
            self.mark_empty(number);
            self.emptied.store(self.emptied.load(Ordering::Relaxed) + 1, Ordering::Release);
        }
        Ok(())
    }

    /// The writer should look at a segment: it may be empty.
    pub fn mark_empty(&self, segment: u32) {
        self.empty[(segment / 64) as usize].fetch_or(1 << (segment % 64), Ordering::Release);
    }

    /// Calls `each` with every segment that was marked since the last time, among the first `segments`. For the writer.
    pub fn take_empty(&self, segments: usize, mut each: impl FnMut(u32)) {
        for (index, word) in self.empty[..segments.div_ceil(64)].iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                let mut bits = word.swap(0, Ordering::Acquire);
                while bits != 0 {
                    each(index as u32 * 64 + bits.trailing_zeros());
                    bits &= bits - 1;
                }
            }
        }
    }

    /// An empty segment begins anew. For the writer.
    pub fn reset(&self, segment: u32) {
        debug_assert_eq!(self.live(segment), 0);
        let segment = &self.segments[segment as usize];
        segment.written.store(0, Ordering::Relaxed);
        segment.released.store(0, Ordering::Relaxed);
    }

    /// Discards the first `pages` of a segment that was reset. For the writer.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn discard(&self, segment: u32, pages: usize) -> io::Result<()> {
        self.map.advise(segment as usize * SEGMENT, pages * PAGE, libc::MADV_DONTNEED)
    }

    /// The address of a unit of the arena.
    fn at(&self, unit: u32) -> *mut u8 {
        assert!(((unit / SEGMENT_UNITS) as usize) < self.segments.len());
        // SAFETY: the unit is in the mapping, as was just asserted.
        unsafe { self.map.base.as_ptr().add(unit as usize * UNIT) }
    }

    /// The byte that says whether the entry at `unit` was released.
    fn dead(&self, unit: u32) -> &AtomicU8 {
        // SAFETY: in the mapping, since a unit has more bytes than a header; the byte of an entry that others know of is
        // used by nothing but this function.
        unsafe { AtomicU8::from_ptr(self.at(unit).add(DEAD)) }
    }
}

#[cfg(test)]
impl Arena {
    /// Where the mapping is, for tests that count its pages and damage its bytes.
    pub fn raw(&self) -> (*mut u8, usize) {
        (self.map.base.as_ptr(), self.map.bytes)
    }
}

//! Guest RAM: one private anonymous mapping per slot, and beside it the slot's *stage*.
//!
//! Each mapping has `hva = gpa` modulo 2 MiB, so that a huge page of the host can back a huge page of the guest. RAM is
//! `DONTFORK` (a page that a fork shared cannot be moved by userfaultfd any more) and `DONTDUMP`; from the moment it is
//! charged also `NOHUGEPAGE` (nobody but us decides what becomes resident) and `UNMERGEABLE` (as `DONTFORK`, for KSM).
//!
//! The stage is as long as the slot. A page that is not in use is moved there, to the same offset, with its content; the
//! guest does not see the stage, so a page there has no writer and its next touch is a fault.
//!
//! Pages are numbered densely over the slots: the *page index* is what frame table, present map and fault path use. The
//! stage goes on where RAM ends: page `i` is aside at the index `i +` [`Ram::pages`].

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use memcg_core::units::PAGE_SIZE;

use super::pool::Pool;
use super::uffd::Uffd;
use crate::worker::protocol::{MAX_SLOTS, RamSlot};

/// Bytes of a huge page of the host.
pub const HUGE: u64 = 2 << 20;

/// The RAM of one guest. Stays mapped until the process ends.
#[derive(Debug)]
pub struct Ram {
    slots: Vec<RamSlot>,
    /// There once RAM is charged.
    present: OnceLock<PresentMap>,
    /// There once RAM is registered.
    uffd: OnceLock<Arc<Uffd>>,
    /// A bit for each block of [`HUGE`] bytes of RAM: it is one huge page of the host, here or in the stage. Whoever takes
    /// a part of it away takes the bit.
    huge: Vec<AtomicU64>,
    /// How many of these bits are set.
    huge_blocks: AtomicU64,
    /// Where its huge pages come from.
    pool: Pool,
}

impl Ram {
    /// Maps RAM for `ranges` of guest-physical bytes (first address, length; page-aligned, sorted, disjoint).
    ///
    /// # Errors
    /// When the host refuses the address space.
    ///
    /// # Panics
    /// With more than [`MAX_SLOTS`] ranges or ranges that are not page-aligned: the caller's layout is wrong.
    pub fn map(ranges: &[(u64, u64)]) -> io::Result<Self> {
        assert!(ranges.len() <= MAX_SLOTS && ranges.iter().all(|(gpa, bytes)| (gpa | bytes) % PAGE_SIZE == 0));
        let mut slots = Vec::with_capacity(ranges.len());
        for &(gpa, bytes) in ranges {
            let slot = RamSlot { gpa, hva: reserve(gpa, bytes)?, bytes, stage: reserve(gpa, bytes)? };
            for start in [slot.hva, slot.stage] {
                advise(start, bytes, libc::MADV_DONTFORK)?;
                advise(start, bytes, libc::MADV_DONTDUMP)?;
            }
            slots.push(slot);
        }
        let blocks = slots.iter().map(|slot| slot.bytes.div_ceil(HUGE)).sum::<u64>();
        let huge = (0..blocks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let (present, uffd) = (OnceLock::new(), OnceLock::new());
        Ok(Self { slots, present, uffd, huge, huge_blocks: AtomicU64::new(0), pool: Pool::map()? })
    }

    /// From now on the host makes no page resident or shared on its own account. What is a huge page already stays one.
    ///
    /// # Errors
    /// As the kernel says; a kernel that has no huge pages or no merging has nothing against it.
    pub fn keep_to_touches(&self) -> io::Result<()> {
        for slot in &self.slots {
            for start in [slot.hva, slot.stage] {
                for advice in [libc::MADV_NOHUGEPAGE, libc::MADV_UNMERGEABLE] {
                    advise(start, slot.bytes, advice)
                        .or_else(|e| if e.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(e) })?;
                }
            }
        }
        Ok(())
    }

    /// RAM is charged from now on, and so far nothing is present. No effect the second time.
    pub fn begin_charging(&self) -> &PresentMap {
        self.present.get_or_init(|| PresentMap::new(self.pages()))
    }

    /// The slots, by rising guest-physical address.
    pub fn slots(&self) -> &[RamSlot] {
        &self.slots
    }

    /// The slots in the form of the protocol.
    pub fn slot_array(&self) -> [RamSlot; MAX_SLOTS] {
        let mut array = [RamSlot::default(); MAX_SLOTS];
        array[..self.slots.len()].copy_from_slice(&self.slots);
        array
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.slots.iter().map(|s| s.bytes / PAGE_SIZE).sum()
    }

    /// The page index of a guest-physical address, if it is RAM.
    pub fn index_of_gpa(&self, gpa: u64) -> Option<u64> {
        self.index(gpa, |s| s.gpa)
    }

    /// The page index of an address of this process, if it is guest RAM.
    pub fn index_of_hva(&self, hva: u64) -> Option<u64> {
        self.index(hva, |s| s.hva)
    }

    /// The address in this process of a page of RAM or of the stage.
    ///
    /// # Panics
    /// When `index` is not below twice [`Ram::pages`].
    pub fn hva(&self, index: u64) -> u64 {
        let aside = index.checked_sub(self.pages());
        let (slot, offset) = self.slot_of(aside.unwrap_or(index)).expect("page index out of range");
        (if aside.is_some() { slot.stage } else { slot.hva }) + offset * PAGE_SIZE
    }

    /// The index of page `index` of RAM in the stage, and back.
    pub fn other(&self, index: u64) -> u64 {
        index.checked_sub(self.pages()).unwrap_or(index + self.pages())
    }

    /// The indices of the slot that holds page `index`: a range of pages that are contiguous in this process.
    ///
    /// # Panics
    /// When `index` is not below [`Ram::pages`].
    pub fn contiguous(&self, index: u64) -> Range<u64> {
        let (slot, offset) = self.slot_of(index).expect("page index out of range");
        index - offset..index - offset + slot.bytes / PAGE_SIZE
    }

    /// Which pages are present, when RAM is charged.
    pub fn present(&self) -> Option<&PresentMap> {
        self.present.get()
    }

    /// RAM is registered with `uffd`. No effect the second time.
    pub fn set_uffd(&self, uffd: Arc<Uffd>) {
        let _ = self.uffd.set(uffd);
    }

    /// The userfaultfd, when RAM is registered.
    pub fn uffd(&self) -> Option<&Uffd> {
        self.uffd.get().map(Arc::as_ref)
    }

    /// Huge pages that are zeroed ahead of need.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The block of page `index`, of RAM or of the stage, is one huge page of the host.
    pub fn set_huge(&self, index: u64) {
        let (word, bit) = self.huge_bit(index);
        if word.fetch_or(bit, Ordering::AcqRel) & bit == 0 {
            self.huge_blocks.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Blocks of RAM that are one huge page of the host.
    pub fn huge_blocks(&self) -> u64 {
        self.huge_blocks.load(Ordering::Relaxed)
    }

    /// Whether the block of page `index`, of RAM or of the stage, is one huge page of the host.
    pub fn is_huge(&self, index: u64) -> bool {
        let (word, bit) = self.huge_bit(index);
        word.load(Ordering::Acquire) & bit != 0
    }

    /// The same, and it is none any more: a part of it, or all, is taken away.
    pub fn take_huge(&self, index: u64) -> bool {
        self.is_huge(index) && {
            let (word, bit) = self.huge_bit(index);
            let was = word.fetch_and(!bit, Ordering::AcqRel) & bit != 0;
            self.huge_blocks.fetch_sub(was.into(), Ordering::Relaxed);
            was
        }
    }

    /// Takes away the page table that a fault has left at the block that begins with page `first`, in which there is no page:
    /// a huge page that is moved onto one would be split. Where this fails, that is all that is lost.
    pub fn clear_table(&self, first: u64) {
        let _ = advise(self.hva(first), HUGE, libc::MADV_DONTNEED);
    }

    fn huge_bit(&self, index: u64) -> (&AtomicU64, u64) {
        let block = (index % self.pages()) / (HUGE / PAGE_SIZE);
        (&self.huge[(block / 64) as usize], 1 << (block % 64))
    }

    /// The address in this process of `count` bytes at `gpa`, up to the end of the slot, with how many fit there.
    pub fn bytes_at(&self, gpa: u64, count: u64) -> Option<(u64, u64)> {
        let slot = self.slots.iter().find(|s| gpa >= s.gpa && gpa - s.gpa < s.bytes)?;
        let offset = gpa - slot.gpa;
        Some((slot.hva + offset, count.min(slot.bytes - offset)))
    }

    fn index(&self, address: u64, start: impl Fn(&RamSlot) -> u64) -> Option<u64> {
        let mut before = 0;
        for slot in &self.slots {
            if address >= start(slot) && address - start(slot) < slot.bytes {
                return Some(before + (address - start(slot)) / PAGE_SIZE);
            }
            before += slot.bytes / PAGE_SIZE;
        }
        None
    }

    fn slot_of(&self, index: u64) -> Option<(&RamSlot, u64)> {
        let mut offset = index;
        for slot in &self.slots {
            let pages = slot.bytes / PAGE_SIZE;
            if offset < pages {
                return Some((slot, offset));
            }
            offset -= pages;
        }
        None
    }
}

/// Gives a piece of advice about memory that is ours and that no Rust reference points into.
pub(super) fn advise(start: u64, bytes: u64, advice: i32) -> io::Result<()> {
    // SAFETY: the range is a mapping of ours that stays. Content is lost only where that is asked for, in the pool.
    match unsafe { libc::madvise(start as *mut libc::c_void, bytes as usize, advice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Maps `bytes` so that the address equals `gpa` modulo 2 MiB; what is left over before and behind is unmapped again.
pub(super) fn reserve(gpa: u64, bytes: u64) -> io::Result<u64> {
    let total = bytes.checked_add(HUGE).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let raw = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            total as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if raw == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = raw as u64;
    let hva = start + (gpa.wrapping_sub(start) % HUGE);
    for (from, to) in [(start, hva), (hva + bytes, start + total)] {
        if to > from {
            // SAFETY: both ranges are parts of the mapping just made that nobody knows of yet.
            unsafe { libc::munmap(from as *mut libc::c_void, (to - from) as usize) };
        }
    }
    Ok(hva)
}

/// One bit a page: filled by the fault thread. A hint for everybody else: a page that it says is present may be gone
/// when it is touched (the touch is then a fault like any other), and the other way round.
#[derive(Debug)]
pub struct PresentMap(Vec<AtomicU64>);

impl PresentMap {
    fn new(pages: u64) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Marks pages as filled. Only the fault thread calls it.
    pub fn set(&self, pages: Range<u64>) {
        for page in pages {
            self.0[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
        }
    }

    /// Marks pages as gone, before they are discarded. Only the fault thread calls it.
    pub fn clear(&self, pages: Range<u64>) {
        for page in pages {
            self.0[(page / 64) as usize].fetch_and(!(1 << (page % 64)), Ordering::Release);
        }
    }

    /// True when every page of the range was present.
    pub fn all(&self, mut pages: Range<u64>) -> bool {
        pages.all(|page| self.0[(page / 64) as usize].load(Ordering::Acquire) & 1 << (page % 64) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_indices_agree_over_two_slots() {
        let ram = Ram::map(&[(0, 4 << 20), (4 << 30, 2 << 20)]).unwrap();
        assert_eq!(ram.pages(), 1536);
        for slot in ram.slots() {
            assert_eq!((slot.hva - slot.gpa) % HUGE, 0);
        }
        assert_eq!(ram.index_of_gpa(4 << 20), None);
        assert_eq!(ram.index_of_gpa((4 << 30) + 4096), Some(1025));
        assert_eq!(ram.index_of_hva(ram.hva(1025)), Some(1025));
        let aside = ram.hva(ram.other(1025));
        assert_eq!((aside - ram.slots()[1].stage, aside % HUGE, ram.index_of_hva(aside)), (4096, 4096, None));
        assert_eq!(ram.other(ram.other(1025)), 1025);
        assert_eq!(ram.contiguous(1025), 1024..1536);
        assert_eq!(ram.contiguous(7), 0..1024);
        assert_eq!(ram.bytes_at((4 << 20) - 16, 64), Some((ram.slots()[0].hva + (4 << 20) - 16, 16)));
    }

    #[test]
    fn the_present_map_is_exact_across_words() {
        let ram = Ram::map(&[(0, 4 << 20)]).unwrap();
        assert!(ram.present().is_none());
        let map = ram.begin_charging();
        map.set(60..130);
        assert!(map.all(60..130) && !map.all(59..130) && !map.all(60..131));
        map.clear(64..65);
        assert!(!map.all(60..70) && map.all(65..130));
    }
}

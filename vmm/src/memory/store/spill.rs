//! A file for pages that do not shrink, or for which the store has no room. It belongs to the reclaim thread: reading takes
//! as long as the disk likes, and the fault thread waits for nothing. A fault on such a page waits until the reclaim thread
//! has read it. All that the fault thread does here is to say which slots nobody wants any more ([`Released`]).
//!
//! The file has no name, so it is gone with its last descriptor, and is allocated as a whole when it is made, so that a
//! full disk is met before any page depends on it. Reads and writes go past the host's page cache (`O_DIRECT`): cached,
//! what was evicted would be in memory again.
//!
//! What lies on the disk is encrypted with ChaCha20-Poly1305, under a key that was never anywhere but in this process,
//! in memory that is not dumped. The nonce is a count of writes, so it is used once; page and slot are authenticated
//! with the content, and the tags stay in memory: an old content of a slot is no content.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fmt, io};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, Tag, UnboundKey};
use rustix::fs::{FallocateFlags, Mode, OFlags};

use super::arena::Mapping;
use super::writer::{BATCH, Stored};
use super::{Corrupt, Damage, FIRST_SLOT, PAGE, Place};

/// The most pages of a file.
const MOST_SLOTS: u32 = u32::MAX - FIRST_SLOT;

/// Bytes of the key.
const KEY: usize = 32;

/// Bytes of a tag.
const TAG: usize = 16;

/// Where the batch is in the buffer, behind the page that holds the key and the one that is read.
const BATCH_AT: usize = 2 * PAGE;

/// Makes a file without a name in `directory` for `pages` pages. For the controller; the worker gets the descriptor.
///
/// # Errors
/// As the kernel says: the disk is full, or the file system has no `O_TMPFILE` or no `O_DIRECT`.
pub fn create(directory: &Path, pages: u32) -> io::Result<OwnedFd> {
    // EXCL: it cannot be given a name later either.
    let flags = OFlags::TMPFILE | OFlags::EXCL | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, u64::from(pages) * PAGE as u64)?;
    Ok(file)
}

/// Slots that nobody wants any more: set by the fault thread, cleared by the reclaim thread before it writes there again.
#[derive(Debug)]
pub struct Released(Box<[AtomicU64]>);

impl Released {
    fn new(slots: u32) -> Self {
        Self((0..slots.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Nobody wants the slot any more.
    ///
    /// # Errors
    /// When there is none, or it was released before.
    pub(super) fn release(&self, slot: u32) -> Result<(), Damage> {
        let word = self.0.get(slot as usize / 64).ok_or(Damage::NoEntry)?;
        let bit = 1 << (slot % 64);
        // What was read of the slot is read before it can be written again.
        if word.fetch_or(bit, Ordering::Release) & bit == 0 { Ok(()) } else { Err(Damage::Released) }
    }
}

/// What is known of a slot that is in use.
#[derive(Clone, Copy, Default)]
struct Slot {
    /// Which write it was, and so its nonce: never 0.
    write: u64,
    page: u32,
    tag: [u8; TAG],
}

/// Memory that a file for `pages` pages takes, in bytes: what is known of each slot, and the buffers.
pub fn memory(pages: u32) -> u64 {
    let slots = u64::from(pages) * size_of::<Slot>() as u64;
    slots + 2 * u64::from(pages.div_ceil(8)) + (BATCH_AT + BATCH * PAGE) as u64
}

/// The file, and what is where in it.
pub struct Spill<F = OwnedFd> {
    file: F,
    /// Key, page that is read, batch; not dumped, and aligned to pages as `O_DIRECT` wants it.
    memory: Mapping,
    slots: Vec<Slot>,
    /// One bit for each slot that is not free.
    used: Vec<u64>,
    released: Arc<Released>,
    /// Where the next free slot is looked for: what is evicted together lies together, and is one write.
    next: u32,
    batch: Vec<u32>,
    writes: u64,
}

impl<F: AsFd> Spill<F> {
    /// A store in `file`, which has room for `pages` pages, under a new key.
    ///
    /// # Errors
    /// When the host refuses address space or randomness.
    pub fn new(file: F, pages: u32) -> io::Result<Self> {
        let mut memory = Mapping::new(BATCH_AT + BATCH * PAGE)?;
        let key = &mut memory.as_mut_slice()[..KEY];
        // SAFETY: the kernel writes at most as many bytes as the slice has.
        if unsafe { libc::getrandom(key.as_mut_ptr().cast(), KEY, 0) } != KEY as isize {
            return Err(io::Error::last_os_error());
        }
        let pages = pages.min(MOST_SLOTS);
        let mut used = vec![0; pages.div_ceil(64) as usize];
        if let Some(last) = used.last_mut().filter(|_| !pages.is_multiple_of(64)) {
            *last = u64::MAX << (pages % 64);
        }
        let (slots, batch) = (vec![Slot::default(); pages as usize], Vec::with_capacity(BATCH));
        Ok(Self { file, memory, slots, used, released: Arc::new(Released::new(pages)), next: 0, batch, writes: 0 })
    }

    /// For the thread that releases slots.
    pub fn released(&self) -> Arc<Released> {
        self.released.clone()
    }

    /// Encrypts a page into the batch. False when the batch or the file is full. Nobody may write to `content` meanwhile.
    pub fn put(&mut self, page: u32, content: &[u8; PAGE]) -> bool {
        self.batch.len() < BATCH && self.seal(page, content).is_some()
    }

    fn seal(&mut self, page: u32, content: &[u8; PAGE]) -> Option<()> {
        let slot = self.free_slot()?;
        self.writes += 1;
        let key = self.key()?;
        let at = BATCH_AT + self.batch.len() * PAGE;
        let bytes = &mut self.memory.as_mut_slice()[at..at + PAGE];
        bytes.copy_from_slice(content);
        let tag = key.seal_in_place_separate_tag(nonce(self.writes), about(page, slot), bytes).ok()?;
        let tag = tag.as_ref().try_into().ok()?;
        self.used[slot as usize / 64] |= 1 << (slot % 64);
        self.slots[slot as usize] = Slot { write: self.writes, page, tag };
        self.batch.push(slot);
        Some(())
    }

    /// Pages in the batch.
    pub fn pending(&self) -> usize {
        self.batch.len()
    }

    /// Writes the batch, with one call for slots that lie together, and adds to `stored` where each page is, in the order
    /// in which they were put. Only then may the pages be discarded.
    ///
    /// # Errors
    /// As the kernel says; no page of the batch is stored then.
    pub fn write(&mut self, stored: &mut Vec<Stored>) -> io::Result<()> {
        let mut at = BATCH_AT;
        let memory = self.memory.as_mut_slice();
        let written = self.batch.chunk_by(|a, b| a + 1 == *b).try_for_each(|run| {
            let bytes = &memory[at..at + run.len() * PAGE];
            at += bytes.len();
            write_all(&self.file, bytes, offset(run[0]))
        });
        for slot in self.batch.drain(..) {
            match written {
                Ok(()) => stored.push(Stored { page: self.slots[slot as usize].page, place: Place::of_slot(slot) }),
                Err(_) => self.used[slot as usize / 64] &= !(1 << (slot % 64)),
            }
        }
        written
    }

    /// Reads the content of `page`, which is at `place`, to `out`. The slot stays.
    ///
    /// # Errors
    /// [`Corrupt`] when the disk does not give back what was written; `out` means nothing then.
    pub fn read(&mut self, page: u32, place: Place, out: &mut [u8; PAGE]) -> Result<(), Corrupt> {
        let (slot, Slot { write, tag, .. }) = self.slot(page, place)?;
        let key = self.key().ok_or(place.corrupt(Damage::Checksum))?;
        let bytes = &mut self.memory.as_mut_slice()[PAGE..2 * PAGE];
        if rustix::io::pread(&self.file, &mut *bytes, offset(slot)) != Ok(PAGE) {
            return Err(place.corrupt(Damage::Unreadable));
        }
        let opened = key.open_in_place_separate_tag(nonce(write), about(page, slot), Tag::from(tag), bytes, 0..);
        out.copy_from_slice(opened.map_err(|_| place.corrupt(Damage::Checksum))?);
        Ok(())
    }

    /// The next slot that is free, or has been released.
    fn free_slot(&mut self) -> Option<u32> {
        let words = self.used.len();
        let first = self.next as usize / 64;
        for step in 0..=words {
            let word = (first + step) % words.max(1);
            let mut taken = *self.used.get(word)?;
            if taken != 0 {
                // Where the fault thread has released nothing, its word is only read.
                let released = &self.released.0[word];
                if released.load(Ordering::Relaxed) != 0 {
                    taken &= !released.swap(0, Ordering::Acquire);
                    self.used[word] = taken;
                }
            }
            // Behind the last one first, and from the beginning of its word at the end.
            let before = if step == 0 { (1 << (self.next % 64)) - 1 } else { 0 };
            let free = !(taken | before);
            if free != 0 {
                let slot = word as u32 * 64 + free.trailing_zeros();
                self.next = slot + 1;
                return Some(slot);
            }
        }
        None
    }

    fn slot(&self, page: u32, place: Place) -> Result<(u32, Slot), Corrupt> {
        let number = place.slot().ok_or(place.corrupt(Damage::NoEntry))?;
        match self.slots.get(number as usize) {
            Some(slot) if slot.write == 0 => Err(place.corrupt(Damage::NoEntry)),
            Some(slot) if slot.page == page => Ok((number, *slot)),
            Some(_) => Err(place.corrupt(Damage::OtherPage)),
            None => Err(place.corrupt(Damage::NoEntry)),
        }
    }

    /// The key, as the cipher wants it: it is nowhere else for longer than a call.
    fn key(&mut self) -> Option<LessSafeKey> {
        UnboundKey::new(&CHACHA20_POLY1305, &self.memory.as_mut_slice()[..KEY]).ok().map(LessSafeKey::new)
    }
}

impl<F> fmt::Debug for Spill<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.slots.len();
        f.debug_struct("Spill").field("slots", &slots).field("writes", &self.writes).finish_non_exhaustive()
    }
}

/// Where a slot is in the file.
fn offset(slot: u32) -> u64 {
    u64::from(slot) * PAGE as u64
}

/// The nonce of the `write`th write.
fn nonce(write: u64) -> Nonce {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&write.to_le_bytes());
    Nonce::assume_unique_for_key(bytes)
}

/// What is authenticated with the content.
fn about(page: u32, slot: u32) -> Aad<[u8; 8]> {
    Aad::from((u64::from(page) << 32 | u64::from(slot)).to_le_bytes())
}

fn write_all(file: &impl AsFd, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn page(seed: u64) -> [u8; PAGE] {
        let mut state = seed;
        std::array::from_fn(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        })
    }

    fn spill(pages: u32) -> (Spill<File>, File) {
        let file = tempfile::tempfile().unwrap();
        (Spill::new(file.try_clone().unwrap(), pages).unwrap(), file)
    }

    fn store(spill: &mut Spill<File>, pages: std::ops::Range<u32>, seed: u64) -> Vec<Stored> {
        let mut stored = Vec::new();
        for index in pages {
            assert!(spill.put(index, &page(seed + u64::from(index))), "page {index}");
        }
        spill.write(&mut stored).unwrap();
        stored
    }

    #[test]
    fn what_is_written_comes_back_until_it_is_released() {
        let (mut spill, _) = spill(100);
        let mut model = BTreeMap::new();
        let released = spill.released();
        for round in 0..20u64 {
            let first = (round as u32 * 37) % 60;
            for index in first..first + 40 {
                if let Some((place, _)) = model.remove(&index) {
                    let slot = Place::slot(place).unwrap();
                    released.release(slot).unwrap();
                    assert_eq!(released.release(slot), Err(Damage::Released));
                }
            }
            for Stored { page: index, place } in store(&mut spill, first..first + 40, round << 32) {
                model.insert(index, (place, page((round << 32) + u64::from(index))));
            }
            for (index, (place, content)) in &model {
                let mut out = [0; PAGE];
                spill.read(*index, *place, &mut out).unwrap();
                assert!(out == *content, "page {index} in round {round}");
            }
        }
    }

    #[test]
    fn a_full_file_takes_no_more_and_a_batch_has_its_size() {
        let (mut small, _) = spill(5);
        store(&mut small, 0..5, 0);
        assert!(!small.put(5, &page(5)));
        small.released().release(3).unwrap();
        assert_eq!(store(&mut small, 9..10, 0), [Stored { page: 9, place: Place::of_slot(3) }]);
        assert!(!small.put(5, &page(5)));
        assert_eq!(small.released().release(64), Err(Damage::NoEntry));
        let (mut large, _) = spill(1000);
        assert!((0..BATCH as u32).all(|index| large.put(index, &page(0))));
        assert!(!large.put(64, &page(0)));
    }

    /// Nothing of a page can be read on the disk, and equal pages do not look equal.
    #[test]
    fn the_disk_sees_neither_contents_nor_which_are_equal() {
        let (mut spill, file) = spill(16);
        for index in 0..16 {
            assert!(spill.put(index, &[0x55; PAGE]));
        }
        spill.write(&mut Vec::new()).unwrap();
        let mut disk = vec![0; 16 * PAGE];
        file.read_exact_at(&mut disk, 0).unwrap();
        let mut blocks: Vec<&[u8]> = disk.chunks(16).collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), disk.len() / 16);
    }

    /// A flipped bit, another slot's bytes and older bytes of the same slot and page are all found out.
    #[test]
    fn what_the_disk_changes_is_reported() {
        let (mut spill, file) = spill(16);
        let stored = store(&mut spill, 0..3, 0);
        let mut old = vec![0; PAGE];
        file.read_exact_at(&mut old, 0).unwrap();
        let damaged = |spill: &mut Spill<File>, stored: Stored| {
            let mut out = [0; PAGE];
            spill.read(stored.page, stored.place, &mut out).is_err_and(|corrupt| corrupt.damage == Damage::Checksum)
        };
        file.write_all_at(&[old[77] ^ 1], 77).unwrap();
        assert!(damaged(&mut spill, stored[0]), "a bit");
        file.write_all_at(&old, offset(1)).unwrap();
        assert!(damaged(&mut spill, stored[1]), "another slot");
        (0..16).for_each(|slot| spill.released().release(slot).unwrap());
        spill.next = 0;
        let again = store(&mut spill, 0..1, 9);
        assert_eq!(again[0], stored[0]);
        file.write_all_at(&old, 0).unwrap();
        assert!(damaged(&mut spill, again[0]), "older bytes");
        file.set_len(0).unwrap();
        let cut_off = spill.read(2, stored[2].place, &mut [0; PAGE]);
        assert_eq!(cut_off.unwrap_err().damage, Damage::Unreadable);
    }

    /// Where the disk fails nothing is stored and nothing is lost.
    #[test]
    fn a_write_that_fails_stores_nothing() {
        let read_only = File::open("/dev/null").unwrap();
        let mut spill = Spill::new(read_only, 8).unwrap();
        let mut stored = Vec::new();
        for _ in 0..3 {
            (0..8).for_each(|index| assert!(spill.put(index, &page(0))));
            assert!(spill.write(&mut stored).is_err());
            assert!(stored.is_empty());
        }
    }

    /// Past the page cache, in a file without a name, where the file system can do that.
    #[test]
    fn a_file_without_a_name_takes_pages_directly() {
        let directory = tempfile::tempdir().unwrap();
        let file = match create(directory.path(), 64) {
            Ok(file) => file,
            Err(error) => return println!("SKIP direct reason={error}"),
        };
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let mut spill = Spill::new(file, 64).unwrap();
        let mut stored = Vec::new();
        (0..64).for_each(|index| assert!(spill.put(index, &page(u64::from(index)))));
        spill.write(&mut stored).unwrap();
        for Stored { page: index, place } in stored {
            let mut out = [0; PAGE];
            spill.read(index, place, &mut out).unwrap();
            assert!(out == page(u64::from(index)));
        }
    }
}

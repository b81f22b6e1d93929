//! The last 64 KiB of a console, in memory that two processes share: one writes, the other may look at any time.
//!
//! ```text
//!  0        8       64                            64 + 64 KiB
//!  │ begun  │ done  …│ byte n of all output is at 64 + n mod 64 KiB │
//! ```
//!
//! `begun` and `done` count all bytes ever printed, before and after they are written. Who reads takes `done`, then the
//! bytes, then `begun`: what was overwritten meanwhile is then known, and left out. The writer keeps its own count and
//! never reads what the other side could have changed; the reader believes neither number more than it must.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// Bytes of output that are kept.
pub const RING_BYTES: usize = 64 << 10;
/// Bytes before them, for the two counts.
const HEADER: usize = 64;
const BYTES: usize = HEADER + RING_BYTES;

/// Memory for a ring, which cannot change its size any more. It is empty and takes none before it is written to.
///
/// # Errors
/// When the host has no descriptor left.
pub fn create() -> io::Result<File> {
    let memory: OwnedFd = rustix::fs::memfd_create("ballast-console", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memory, BYTES as u64)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memory.into())
}

/// What a ring holds now, the oldest byte first. Whatever is in `memory`, this is at most [`RING_BYTES`].
///
/// # Errors
/// When it cannot be read, or is too short.
pub fn read(memory: &File) -> io::Result<Vec<u8>> {
    let count = |at| {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, at).map(|()| u64::from_le_bytes(bytes))
    };
    let done = count(8)?;
    let length = done.min(RING_BYTES as u64) as usize;
    let mut bytes = vec![0; length];
    memory.read_exact_at(&mut bytes, HEADER as u64)?;
    let overwritten = count(0)?.wrapping_sub(done);
    if done > RING_BYTES as u64 {
        bytes.rotate_left((done % RING_BYTES as u64) as usize);
    }
    // Those that came meanwhile are in the places of the oldest; before the ring is full they are behind the last.
    let lost = overwritten.saturating_sub((RING_BYTES - length) as u64).min(length as u64);
    bytes.drain(..lost as usize);
    Ok(bytes)
}

/// The writer's side. Numbers of bytes are counted from the first that was ever printed.
#[derive(Debug)]
pub struct Ring {
    /// [`BYTES`] bytes of shared memory, mapped as long as this lives.
    memory: NonNull<u8>,
    end: u64,
}

// SAFETY: the memory is reached by atomics only.
unsafe impl Send for Ring {}

impl Ring {
    /// An empty ring in memory of [`create`].
    ///
    /// # Errors
    /// When it cannot be mapped.
    pub fn map(memory: &File) -> io::Result<Self> {
        let flags = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses; the file's size is sealed, so all of it is there.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), BYTES, flags, MapFlags::SHARED, memory, 0) }?;
        let memory = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { memory, end: 0 })
    }

    /// Number of the byte that will be printed next.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Number of the oldest byte that is kept.
    pub fn start(&self) -> u64 {
        self.end.saturating_sub(RING_BYTES as u64)
    }

    /// Appends bytes; the oldest make room.
    pub fn push(&mut self, bytes: &[u8]) {
        let end = self.end + bytes.len() as u64;
        self.counts()[0].store(end.to_le(), Ordering::Relaxed);
        fence(Ordering::Release);
        let skipped = bytes.len().saturating_sub(RING_BYTES);
        for (number, byte) in (self.end + skipped as u64..).zip(&bytes[skipped..]) {
            self.bytes()[(number % RING_BYTES as u64) as usize].store(*byte, Ordering::Relaxed);
        }
        self.end = end;
        self.counts()[1].store(end.to_le(), Ordering::Release);
    }

    /// Copies bytes from number `at` on, which must be kept or the next, and returns how many there were.
    pub fn copy(&self, at: u64, to: &mut [u8]) -> usize {
        let length = usize::try_from(self.end - at).unwrap_or(usize::MAX).min(to.len());
        for (number, byte) in (at..).zip(&mut to[..length]) {
            *byte = self.bytes()[(number % RING_BYTES as u64) as usize].load(Ordering::Relaxed);
        }
        length
    }

    /// Begun and done.
    fn counts(&self) -> &[AtomicU64; 2] {
        // SAFETY: the first bytes of a mapping, which is aligned to pages, and reached by atomics only.
        unsafe { self.memory.cast().as_ref() }
    }

    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: the mapping has as many bytes behind the header, reached by atomics only.
        unsafe { slice::from_raw_parts(self.memory.add(HEADER).cast().as_ptr(), RING_BYTES) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` has made; references to it do not outlive this. That it stays is harmless.
        let _ = unsafe { rustix::mm::munmap(self.memory.as_ptr().cast(), BYTES) };
    }
}

//! Giving the host's memory back: vectored discards.
//!
//! One `process_madvise(DONTNEED)` takes up to `VECTOR` ranges. The kernel offers that since 6.13 for the caller's own
//! memory; where it does not, each range is one `madvise`.
//!
//! A part of a huge page can be discarded, and the page tables say that it is gone, but the host has nothing back until
//! the last part is. A VM whose accounting began while it ran may have huge pages: each is split by the first discard
//! of a part of it. `MADV_COLD` for one page does that and changes no content; about 200 µs once for each.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::client::Run;
use super::ram::{HUGE, Ram};
use memcg_core::units::PAGE_SIZE;
use std::os::fd::{AsRawFd, OwnedFd};

/// Ranges in one call.
const VECTOR: usize = 512;

/// Discards pages of this process.
#[derive(Debug)]
pub struct Discarder {
    me: Option<OwnedFd>,
    vectored: AtomicBool,
}

impl Default for Discarder {
    fn default() -> Self {
        let me = Pid::from_raw(std::process::id() as i32).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Self { vectored: AtomicBool::new(me.is_some()), me }
    }
}

impl Discarder {
    /// Discards `runs`: when it returns, the host holds nothing for them and a touch faults again.
    ///
    /// # Errors
    /// As the kernel says; some of the runs may be gone then.
    pub fn discard(&self, ram: &Ram, runs: &[Run]) -> io::Result<()> {
        let mut vector = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; VECTOR];
        split(ram, runs);
        for batch in runs.chunks(VECTOR) {
            for (entry, run) in vector.iter_mut().zip(batch) {
                entry.iov_base = ram.hva(run.first) as *mut libc::c_void;
                entry.iov_len = (run.pages * PAGE_SIZE) as usize;
            }
            let vector = &vector[..batch.len()];
            if !(batch.len() > 1 && self.vectored.load(Ordering::Relaxed) && self.all_at_once(vector)?) {
                for entry in vector {
                    // SAFETY: the entry is a range of guest RAM, which is ours and which no Rust reference points into.
                    if unsafe { libc::madvise(entry.iov_base, entry.iov_len, libc::MADV_DONTNEED) } != 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
            }
        }
        Ok(())
    }

    /// True when one vectored call did it all; false when this kernel does not do that (and never will).
    fn all_at_once(&self, vector: &[libc::iovec]) -> io::Result<bool> {
        let Some(me) = &self.me else { return Ok(false) };
        let wanted: usize = vector.iter().map(|e| e.iov_len).sum();
        // SAFETY: the vector holds ranges of guest RAM of this very process; the discard is what the caller asks for.
        let done = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                me.as_raw_fd(),
                vector.as_ptr(),
                vector.len(),
                libc::MADV_DONTNEED,
                0,
            )
        };
        if done < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EINVAL | libc::ENOSYS | libc::EPERM) => {
                    self.vectored.store(false, Ordering::Relaxed);
                    Ok(false)
                }
                _ => Err(error),
            };
        }
        // A partial result is finished by the slow way: discarding twice does no harm, these pages are claimed.
        Ok(done as usize == wanted)
    }
}

/// Splits the host's huge pages that `runs` hold only parts of.
fn split(ram: &Ram, runs: &[Run]) {
    const BLOCK: u64 = HUGE / PAGE_SIZE;
    for run in runs {
        let (mut at, end) = (run.first, run.first + run.pages);
        // Blocks begin where RAM does, and where its stage does.
        let begin = at - at % ram.pages();
        while at < end {
            let next = end.min(begin + ((at - begin) / BLOCK + 1) * BLOCK);
            if ram.take_huge(at) && next - at < BLOCK {
                // SAFETY: one page of guest RAM; this advice changes no content. Where the kernel cannot split (somebody
                // holds a page of it), the memory goes back later, when the host is short.
                unsafe { libc::madvise(ram.hva(at) as *mut libc::c_void, PAGE_SIZE as usize, libc::MADV_COLD) };
            }
            at = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discarded_pages_read_as_zero_and_their_neighbours_keep_their_content() {
        let ram = Ram::map(&[(0, 4 << 20)]).unwrap();
        let byte = |page: u64| ram.hva(page) as *mut u8;
        for page in 0..1024 {
            // SAFETY: the page is in the mapping.
            unsafe { byte(page).write_volatile(page as u8 | 1) };
        }
        let runs: Vec<Run> = (0..1024).step_by(3).map(|first| Run { first, pages: 1 }).collect();
        Discarder::default().discard(&ram, &runs).unwrap();
        for page in 0..1024 {
            // SAFETY: as above.
            let value = unsafe { byte(page).read_volatile() };
            assert_eq!(value, if page % 3 == 0 { 0 } else { page as u8 | 1 }, "page {page}");
        }
    }
}

//! userfaultfd: a safe wrapper of the few operations that the fault path uses.
//!
//! Only MISSING faults of private anonymous memory are asked for. Registering a range is `unsafe` (from then on a touch
//! waits for us); filling an absent page is not: it cannot change what anybody has read.
//!
//! `UFFDIO_ZEROPAGE` is never used: on anonymous memory it maps the shared zero page read-only, and the first write
//! faults a second time, in the kernel, where nobody counts it.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use linux_raw_sys::general as sys;
use linux_raw_sys::ioctl as nr;
use memcg_core::units::PAGE_SIZE;

/// `_IOWR(0xAA, 0x05, struct uffdio_move)`.
pub const UFFDIO_MOVE: u32 = 0xC028_AA05;
/// Its bit among the operations of a range; it decides whether this kernel is new enough.
const UFFDIO_MOVE_BIT: u64 = 1 << sys::_UFFDIO_MOVE;
/// `USERFAULTFD_IOC_NEW`, `_IO(0xAA, 0x00)`.
pub const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
/// Largest number of pages one [`Uffd::fill`] writes (256 KiB). Waiters wake when a call ends, so one that has caught up
/// with a long fill waits for a piece of it, not for all.
pub const MAX_FILL: u64 = 64;

/// What became of a request to fill pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// This many pages from the first on are now present because of us; their waiters are awake.
    Filled(u64),
    /// The first page was there already; nothing was done.
    AlreadyPresent,
    /// The address space is changing; ask again.
    RetryLater,
    /// The host has no memory for the first page.
    NoMemory,
    /// The range is not registered, or the process is going away.
    Gone,
}

/// What became of a request to move pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Move {
    /// This many pages from the first on are at their new place; those who wait for them there are awake.
    Moved(u64),
    /// The first page is not at its old place.
    Absent,
    /// There is a page at the new place of the first one.
    Occupied,
    /// The kernel cannot move the first page now: somebody holds it, or its neighbourhood is changing.
    Busy,
    /// The host has no memory for what a mapping of the first page takes.
    NoMemory,
    /// A range is not registered, or the process is going away.
    Gone,
}

/// One fault as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The faulting address in this process, exact.
    pub address: u64,
    /// Kernel's id of the thread that faulted. With an in-kernel APIC this is usually a kernel worker's: no proof of
    /// anything.
    pub tid: u32,
}

/// A userfaultfd that reports missing pages.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
    /// [`MAX_FILL`] pages of zeroes to copy from.
    zeroes: u64,
    /// Whether the host has no memory, for tests.
    #[cfg(test)]
    pub(super) is_out: std::sync::atomic::AtomicBool,
}

impl Uffd {
    /// Opens a userfaultfd through the device, so that faults of the kernel (KVM's own) are reported too.
    ///
    /// # Errors
    /// When the kernel lacks what is needed (`UFFDIO_MOVE`, exact addresses, thread ids).
    pub fn from_device(device: &File) -> io::Result<Self> {
        // SAFETY: USERFAULTFD_IOC_NEW takes flags by value and returns a new descriptor.
        let raw = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just returned to us and is owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(raw) };
        let mut api = sys::uffdio_api {
            api: 0xAA,
            features: u64::from(sys::UFFD_FEATURE_THREAD_ID) | u64::from(sys::UFFD_FEATURE_EXACT_ADDRESS),
            ioctls: 0,
        };
        ioctl(fd.as_fd(), nr::UFFDIO_API, &mut api)?;
        if api.features & u64::from(sys::UFFD_FEATURE_MOVE) == 0 {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel has no UFFDIO_MOVE (Linux 6.12 or newer is needed)",
            ));
        }
        Ok(Self {
            fd,
            zeroes: zeroes()?,
            #[cfg(test)]
            is_out: Default::default(),
        })
    }

    /// Registers `bytes` from `address` on: from now on a touch of an absent page waits for [`Uffd::fill`].
    ///
    /// # Errors
    /// As the kernel says; also when the range does not offer COPY, MOVE and WAKE.
    ///
    /// # Safety
    /// The range is private anonymous memory that the caller owns, and some thread reads the events until the
    /// process ends.
    pub unsafe fn register(&self, address: u64, bytes: u64) -> io::Result<()> {
        let mut arg = sys::uffdio_register {
            range: sys::uffdio_range { start: address, len: bytes },
            mode: u64::from(sys::UFFDIO_REGISTER_MODE_MISSING),
            ioctls: 0,
        };
        ioctl(self.fd.as_fd(), nr::UFFDIO_REGISTER, &mut arg)?;
        let needed = UFFDIO_MOVE_BIT | 1 << sys::_UFFDIO_COPY | 1 << sys::_UFFDIO_WAKE;
        if arg.ioctls & needed != needed {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "userfaultfd does not offer COPY and MOVE for guest memory",
            ));
        }
        Ok(())
    }

    /// Fills up to [`MAX_FILL`] absent pages with zeroes, from `address` on, and wakes who waits for them.
    pub fn fill(&self, address: u64, pages: u64) -> Fill {
        self.copy(address, self.zeroes, pages.min(MAX_FILL))
    }

    /// Fills absent pages from `address` on with `content`, and wakes who waits for them.
    ///
    /// # Panics
    /// When `content` is not a whole number of pages.
    pub fn fill_with(&self, address: u64, content: &[u8]) -> Fill {
        let pages = content.len() as u64 / PAGE_SIZE;
        assert_eq!(content.len() as u64, pages * PAGE_SIZE);
        self.copy(address, content.as_ptr() as u64, pages)
    }

    fn copy(&self, address: u64, from: u64, pages: u64) -> Fill {
        #[cfg(test)]
        if self.is_out.load(std::sync::atomic::Ordering::Relaxed) {
            return Fill::NoMemory;
        }
        let mut arg = sys::uffdio_copy { dst: address, src: from, len: pages * PAGE_SIZE, mode: 0, copy: 0 };
        let result = ioctl(self.fd.as_fd(), nr::UFFDIO_COPY, &mut arg);
        match (result, arg.copy) {
            (_, done) if done > 0 => Fill::Filled(done as u64 / PAGE_SIZE),
            (Err(e), _) => match e.raw_os_error() {
                Some(libc::EEXIST) => Fill::AlreadyPresent,
                Some(libc::EAGAIN) => Fill::RetryLater,
                Some(libc::ENOMEM) => Fill::NoMemory,
                _ => Fill::Gone,
            },
            (Ok(()), _) => Fill::RetryLater,
        }
    }

    /// Moves pages with their contents from `from` to `to`, where none are, and wakes who waits for them there. What is
    /// mapped elsewhere, as by KVM, loses its mapping first.
    ///
    /// A range within one mapping each. It stops at the first page that cannot be moved.
    ///
    /// Linux 6.18 moves several pages in one step, and forgets to count a step that follows one that had to be tried again: it
    /// comes to the same pages once more, finds them at `to`, and says that somebody else's are there. (`move_pages()` in
    /// `mm/userfaultfd.c` keeps the `-EAGAIN` of the step before when `move_pages_ptes()` succeeds.) Such pages
    /// are moved back and moved again, which also wakes those who wait for them. Where there are pages on both sides neither
    /// direction does anything.
    ///
    /// # Safety
    /// Nobody but the guest and those who serve its faults relies on what is at `from`: a later touch of it is a fault. Nor does
    /// anybody rely on a page at `to` that is not there yet.
    pub unsafe fn move_pages(&self, to: u64, from: u64, pages: u64) -> Move {
        for _ in 0..UNTOLD {
            match self.move_once(to, from, pages) {
                // Whether it does anything is seen by the next try: it may not count its pages either.
                Move::Occupied => _ = self.move_once(from, to, pages),
                other => return other,
            }
        }
        Move::Occupied
    }

    /// One call, and what it says.
    fn move_once(&self, to: u64, from: u64, pages: u64) -> Move {
        #[cfg(test)]
        if self.is_out.load(std::sync::atomic::Ordering::Relaxed) {
            return Move::NoMemory;
        }
        let mut arg = sys::uffdio_move { dst: to, src: from, len: pages * PAGE_SIZE, mode: 0, move_: 0 };
        let result = ioctl(self.fd.as_fd(), UFFDIO_MOVE, &mut arg);
        match (result, arg.move_) {
            (_, done) if done > 0 => Move::Moved(done as u64 / PAGE_SIZE),
            (Err(e), _) => match e.raw_os_error() {
                Some(libc::ENOENT) => Move::Absent,
                Some(libc::EEXIST) => Move::Occupied,
                Some(libc::EAGAIN | libc::EBUSY) => Move::Busy,
                Some(libc::ENOMEM) => Move::NoMemory,
                _ => Move::Gone,
            },
            (Ok(()), _) => Move::Busy,
        }
    }

    /// Wakes who waits for a page in the range, without filling anything.
    pub fn wake(&self, address: u64, pages: u64) {
        let mut arg = sys::uffdio_range { start: address, len: pages * PAGE_SIZE };
        // A range that nobody waits in, or that is gone, needs no waking.
        let _ = ioctl(self.fd.as_fd(), nr::UFFDIO_WAKE, &mut arg);
    }

    /// Reads up to `N` waiting events without blocking and hands each to `each`; returns how many there were.
    pub fn read<const N: usize>(&self, mut each: impl FnMut(Event)) -> usize {
        let mut buffer = [const { MaybeUninit::<sys::uffd_msg>::uninit() }; N];
        let size = size_of::<sys::uffd_msg>();
        // SAFETY: the buffer is writable for N messages.
        let n = unsafe { libc::read(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), N * size) };
        let count = usize::try_from(n).unwrap_or(0) / size;
        for message in &buffer[..count] {
            // SAFETY: the kernel wrote `count` whole messages.
            let message = unsafe { message.assume_init_ref() };
            if u32::from(message.event) == sys::UFFD_EVENT_PAGEFAULT {
                // SAFETY: the event kind says which member of the union is filled; the thread id feature is on.
                let (address, tid) = unsafe { (message.arg.pagefault.address, message.arg.pagefault.feat.ptid) };
                each(Event { address, tid });
            }
        }
        count
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Tries to move pages in whose place something is. The kernel's mistake needs two processors at the same page, so once is
/// nearly always enough.
const UNTOLD: u32 = 4;

/// Maps zeroes to copy from, for the life of the process. Nobody writes there, so every page of it is the kernel's one
/// zero page: the copy reads from the fastest cache, however long it is.
fn zeroes() -> io::Result<u64> {
    let length = (MAX_FILL * PAGE_SIZE) as usize;
    // SAFETY: a new read-only mapping at an address of the kernel's choice; the advice concerns nothing else. It keeps
    // the huge zero page out, which would not fit into that cache.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let address = libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, flags, -1, 0);
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        libc::madvise(address, length, libc::MADV_NOHUGEPAGE);
        Ok(address as u64)
    }
}

/// One ioctl that takes a pointer to a plain struct.
fn ioctl<T>(fd: BorrowedFd<'_>, request: u32, arg: &mut T) -> io::Result<()> {
    // SAFETY: every caller pairs `request` with the struct that the userfaultfd ABI names for it.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::c_ulong::from(request), std::ptr::from_mut(arg)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

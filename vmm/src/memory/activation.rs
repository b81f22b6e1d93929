//! RAM becomes charged: before anything is in it, or while the guest runs.
//!
//! A VM without a limit has no userfaultfd. When it gets its first limit, its RAM is registered first and counted then,
//! so that no page can come in between: whatever becomes present after the registration is an event, whatever was
//! present before is counted.
//!
//! ```text
//!  vCPUs held, devices quiet ─► register ─► count ─► drop pages of zeroes ─► frame table, stock ─► vCPUs go on
//! ```
//!
//! Nobody may write to RAM in between. A page that was only ever read is the kernel's one page of zeroes: present, but
//! nobody's, and its first write would be a fault that no userfaultfd sees. Such pages are dropped, and a write between
//! the count and the drop would be lost. (KVM's workers may still be bringing pages in; that is no write.)
//!
//! Pages in the host's swap count as present: they come back without an event.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use linux_raw_sys::general::{
    PAGE_IS_HUGE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, page_region, pm_scan_arg,
};
use memcg_core::units::PAGE_SIZE;

use super::client::Run;
use super::discard::Discarder;
use super::ram::{HUGE, Ram};
use super::uffd::Uffd;

/// `PAGEMAP_SCAN`, `_IOWR('f', 16, struct pm_scan_arg)`.
pub const PAGEMAP_SCAN: libc::c_ulong = 0xC060_6610;

/// Regions that one scan returns at most.
const REGIONS: usize = 512;

/// What accounting needs of the host, opened while this process may still open something.
#[derive(Debug)]
pub struct Tools {
    /// `/dev/userfaultfd`.
    device: File,
    /// `/proc/self/pagemap`, or why there is none: it counts what is resident when accounting begins on a running VM.
    pagemap: io::Result<File>,
    discarder: Discarder,
}

impl Tools {
    /// The tools, with `device` for `/dev/userfaultfd`.
    pub fn new(device: File) -> Self {
        Self { device, pagemap: File::open("/proc/self/pagemap"), discarder: Discarder::default() }
    }
}

/// Registers all of RAM with a userfaultfd of `tools`. On an error everything is as before.
///
/// # Errors
/// When the kernel lacks what is needed.
///
/// # Safety
/// Some thread reads the events until the process ends, or until the userfaultfd is dropped.
pub unsafe fn register(ram: &Ram, tools: &Tools) -> io::Result<Uffd> {
    let uffd = Uffd::from_device(&tools.device)?;
    for slot in ram.slots() {
        // Pages can only be moved into what is registered.
        for start in [slot.hva, slot.stage] {
            // SAFETY: the slot and its stage are private anonymous memory of this process; the caller vouches for the
            // reader. Dropping the descriptor undoes what was registered.
            unsafe { uffd.register(start, slot.bytes) }?;
        }
    }
    ram.keep_to_touches()?;
    Ok(uffd)
}

/// Counts what is in registered RAM: the runs of pages that are present or swapped, rising. Drops pages of zeroes that
/// nobody owns, and notes the host's huge pages ([`Ram::set_huge`]).
///
/// # Errors
/// When the kernel cannot say (older than 6.7) or refuses a discard.
///
/// # Safety
/// Nobody writes to RAM meanwhile: what was written to a page of zeroes would be lost.
pub unsafe fn resident(ram: &Ram, tools: &Tools) -> io::Result<Vec<Run>> {
    let pagemap = tools.pagemap.as_ref().map_err(|e| io::Error::new(e.kind(), format!("/proc/self/pagemap: {e}")))?;
    let mut found = Found::default();
    for slot in ram.slots() {
        let (mut at, end) = (slot.hva, slot.hva + slot.bytes);
        while at < end {
            at = scan(pagemap, at, end, |region| found.add(ram, &region))?;
        }
    }
    tools.discarder.discard(ram, &found.zeroes)?;
    found.huge.iter().for_each(|page| ram.set_huge(*page));
    Ok(found.resident)
}

#[derive(Default)]
struct Found {
    resident: Vec<Run>,
    zeroes: Vec<Run>,
    /// First pages of the host's huge pages.
    huge: Vec<u64>,
}

impl Found {
    fn add(&mut self, ram: &Ram, region: &page_region) {
        let is = |category: u32| region.categories & u64::from(category) != 0;
        if is(PAGE_IS_PFNZERO) {
            push(&mut self.zeroes, ram, region.start, region.end);
        } else if is(PAGE_IS_HUGE) && is(PAGE_IS_PRESENT) {
            for page in (region.start..region.end).step_by(HUGE as usize) {
                // Kernels before 6.16 do not say that a huge page is the one of zeroes. One that merely holds zeroes
                // is not worth keeping either.
                if is_zero(page) {
                    push(&mut self.zeroes, ram, page, page + HUGE);
                } else {
                    push(&mut self.resident, ram, page, page + HUGE);
                    self.huge.extend(ram.index_of_hva(page));
                }
            }
        } else {
            push(&mut self.resident, ram, region.start, region.end);
        }
    }
}

/// Appends the pages of an address range, to the last run when they follow it.
fn push(runs: &mut Vec<Run>, ram: &Ram, start: u64, end: u64) {
    let first = ram.index_of_hva(start).expect("only RAM was scanned");
    let pages = (end - start) / PAGE_SIZE;
    match runs.last_mut() {
        Some(last) if last.first + last.pages == first && ram.contiguous(first).start < first => last.pages += pages,
        _ => runs.push(Run { first, pages }),
    }
}

/// Whether a huge page of RAM that is present holds nothing but zeroes.
fn is_zero(page: u64) -> bool {
    let words = page as *const u64;
    // SAFETY: the huge page is in a slot of RAM, which stays mapped; nobody writes to it meanwhile.
    (0..HUGE as usize / 8).all(|i| unsafe { words.add(i).read_volatile() } == 0)
}

/// Finds up to [`REGIONS`] regions of pages that are present or swapped in `start..end`, and returns where to go on.
pub(crate) fn scan(pagemap: &File, start: u64, end: u64, mut each: impl FnMut(page_region)) -> io::Result<u64> {
    let mut regions = [page_region { start: 0, end: 0, categories: 0 }; REGIONS];
    let mut arg = pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: 0,
        start,
        end,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: REGIONS as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: 0,
        category_anyof_mask: u64::from(PAGE_IS_PRESENT | PAGE_IS_SWAPPED),
        return_mask: u64::from(PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_HUGE),
    };
    // SAFETY: the request takes this struct, whose vector has room for as many regions as it says.
    let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
    let Ok(found) = usize::try_from(found) else { return Err(io::Error::last_os_error()) };
    regions[..found].iter().copied().for_each(&mut each);
    // A scan that ends nowhere would never end.
    if arg.walk_end > start { Ok(arg.walk_end) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(ram: &Ram, page: u64) {
        // SAFETY: the page is in the mapping.
        unsafe { (ram.hva(page) as *mut u64).write_volatile(page | 1) };
    }

    fn read(ram: &Ram, page: u64) -> u64 {
        // SAFETY: as above.
        unsafe { (ram.hva(page) as *const u64).read_volatile() }
    }

    /// Tools to count with: nothing here registers anything.
    fn tools() -> Tools {
        Tools::new(File::open("/dev/null").unwrap())
    }

    /// Present pages by the kernel's page tables, read another way.
    fn present(ram: &Ram) -> Vec<u64> {
        use std::os::unix::fs::FileExt;
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let there = |page: &u64| {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, ram.hva(*page) / PAGE_SIZE * 8).unwrap();
            u64::from_le_bytes(entry) >> 62 != 0
        };
        (0..ram.pages()).filter(there).collect()
    }

    fn pages(runs: &[Run]) -> Vec<u64> {
        runs.iter().flat_map(|run| run.first..run.first + run.pages).collect()
    }

    /// A page that was only read is nobody's: it is dropped, so that its first write is a fault that is seen.
    #[test]
    fn what_was_written_is_counted_and_what_was_only_read_is_dropped() {
        let ram = Ram::map(&[(0, 8 << 20), (4 << 30, 2 << 20)]).unwrap();
        ram.keep_to_touches().unwrap();
        let written: Vec<u64> = (0..2560).filter(|page| page % 3 == 0).collect();
        for page in 0..2560 {
            match page % 3 {
                0 => write(&ram, page),
                1 => assert_eq!(read(&ram, page), 0),
                _ => {}
            }
        }
        assert!(present(&ram).len() > written.len(), "pages of zeroes are mapped");
        // SAFETY: nobody else knows of this memory.
        let found = unsafe { resident(&ram, &tools()) }.unwrap();
        assert_eq!(pages(&found), written);
        assert_eq!(present(&ram), written);
        assert!(written.iter().all(|page| read(&ram, *page) == page | 1));
    }

    /// Runs end with their slot: an address range must not lead from one into the next.
    #[test]
    fn a_run_stays_in_its_slot() {
        let ram = Ram::map(&[(0, 1 << 20), (4 << 30, 1 << 20)]).unwrap();
        ram.keep_to_touches().unwrap();
        (0..512).for_each(|page| write(&ram, page));
        // SAFETY: nobody else knows of this memory.
        let found = unsafe { resident(&ram, &tools()) }.unwrap();
        assert_eq!(found, [Run { first: 0, pages: 256 }, Run { first: 256, pages: 256 }]);
    }

    /// Huge pages are counted whole, those of zeroes are dropped, and a discard of a part splits only its own.
    #[test]
    fn huge_pages_are_counted_noted_and_split_by_the_first_discard_of_a_part() {
        let ram = Ram::map(&[(0, 16 << 20)]).unwrap();
        // SAFETY: the mapping is ours.
        unsafe { libc::madvise(ram.hva(0) as *mut libc::c_void, 16 << 20, libc::MADV_HUGEPAGE) };
        write(&ram, 0);
        write(&ram, 512);
        assert_eq!(read(&ram, 1024), 0);
        ram.keep_to_touches().unwrap();
        // SAFETY: nobody else knows of this memory.
        let found = unsafe { resident(&ram, &tools()) }.unwrap();
        assert_eq!(present(&ram), pages(&found));
        let huge = |ram: &Ram| (0..ram.pages()).step_by(512).filter(|page| ram.is_huge(*page)).collect::<Vec<_>>();
        let count = huge(&ram).len();
        if count != 2 {
            println!("SKIP huge-pages reason=the host gave {count} of 2");
            return;
        }
        assert_eq!(pages(&found), (0..1024).collect::<Vec<_>>());
        Discarder::default().discard(&ram, &[Run { first: 7, pages: 3 }]).unwrap();
        assert_eq!(huge(&ram), [512]);
        assert_eq!(present(&ram).len(), 1021);
        assert_eq!((read(&ram, 0), read(&ram, 512)), (1, 513));
        Discarder::default().discard(&ram, &[Run { first: 512, pages: 512 }]).unwrap();
        assert!(huge(&ram).is_empty());
    }
}

//! The one accessor through which VMM code reaches guest memory.
//!
//! [`GuestMem`] implements vm-memory's `GuestMemory`, so virtqueues, loaders and devices use it like any other memory. The
//! difference: a range is charged and filled *before* a slice of it is handed out. A touch by the VMM is a touch, and it
//! never waits in the kernel for our own fault thread.
//!
//! Devices use it without waiting: when nothing can be charged, the access fails with `WouldBlock` and the queue is left
//! for later ([`balloon::is_would_block`] tells that error from a guest's mistake). The loader waits, and learns when the limit is too small.

use std::io;
use std::iter::FusedIterator;
use std::sync::{Arc, Mutex};

use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::client::{Client, Reply, Request, Run};
use super::ram::Ram;
use memcg_core::units::PAGE_SIZE;

/// Guest memory as VMM code sees it. Cloning shares the line to the fault thread.
#[derive(Clone, Debug)]
pub struct GuestMem {
    ram: Arc<Ram>,
    client: Option<Arc<Mutex<Client>>>,
    wait: bool,
}

impl GuestMem {
    /// An accessor for `ram`. Without a client, and as long as RAM is not charged, nothing is asked for. With `wait` an access waits until it is charged or
    /// refused (for the loader).
    pub fn new(ram: Arc<Ram>, client: Option<Arc<Mutex<Client>>>, wait: bool) -> Self {
        Self { ram, client, wait }
    }

    /// The mapping behind it.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// Charges and fills the pages that hold `count` bytes at `hva`-contiguous page indices `first..`.
    fn fill(&self, run: Run) -> Result<()> {
        let (Some(client), Some(present)) = (&self.client, self.ram.present()) else { return Ok(()) };
        if present.all(run.first..run.first + run.pages) {
            return Ok(());
        }
        let client = client.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match client.ask(Request::Fill { run, wait: self.wait }) {
            Reply::Done(_) | Reply::Job(..) => Ok(()),
            Reply::WouldBlock => Err(Error::IOError(io::ErrorKind::WouldBlock.into())),
        }
    }
}

impl GuestMemory for GuestMem {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        let (mut at, mut left) = (addr.0, count as u64);
        while left > 0 {
            let Some((_, here)) = self.ram.bytes_at(at, left) else { return false };
            left -= here;
            at = match at.checked_add(here) {
                Some(next) => next,
                None => return left == 0,
            };
        }
        true
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        Ok(Slices { mem: self, at: Some(addr.0), left: count as u64 })
    }
}

/// The slices of one access, each charged and filled when it is reached.
struct Slices<'a> {
    mem: &'a GuestMem,
    at: Option<u64>,
    left: u64,
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a, ()>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let at = self.at.take()?;
        let Some((hva, here)) = self.mem.ram.bytes_at(at, self.left) else {
            return Some(Err(Error::InvalidGuestAddress(GuestAddress(at))));
        };
        let first = self.mem.ram.index_of_hva(hva).unwrap_or_default();
        let pages = (hva % PAGE_SIZE + here).div_ceil(PAGE_SIZE);
        if let Err(e) = self.mem.fill(Run { first, pages }) {
            return Some(Err(e));
        }
        self.left -= here;
        self.at = at.checked_add(here);
        // SAFETY: `bytes_at` says that `here` bytes at `hva` are in one slot; slots stay mapped until the process ends.
        // The guest may change the bytes at any time, which is what a volatile slice is for.
        Some(Ok(unsafe { VolatileSlice::new(hva as *mut u8, here as usize) }))
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn uncharged_memory_reads_what_was_written_across_slots_and_refuses_the_hole() {
        let ram = Arc::new(Ram::map(&[(0, 1 << 20)]).unwrap());
        let mem = GuestMem::new(ram, None, false);
        mem.write_slice(b"hello", GuestAddress(4094)).unwrap();
        let mut back = [0; 5];
        mem.read_slice(&mut back, GuestAddress(4094)).unwrap();
        assert_eq!(&back, b"hello");
        assert!(mem.write_slice(b"hello", GuestAddress((1 << 20) - 2)).is_err());
        assert!(!mem.check_range(GuestAddress(u64::MAX - 1), 16, Permissions::Read));
    }
}

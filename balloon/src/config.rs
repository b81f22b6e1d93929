//! Configuration space: the target, written by the host, and the actual size, written by the guest.
//!
//! The two are never mixed up: `num_pages` is what is asked for, `actual` is what the guest says it has given, and the
//! guest may say anything. What has really been released is counted by whoever discards the pages.

use crate::counters::GuestFault;
use crate::spec;

/// The eight bytes of configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    num_pages: u32,
    actual: u32,
    ram_pages: u32,
}

impl ConfigSpace {
    /// A configuration space with both sizes 0, for a guest with `ram_pages` pages of 4 KiB.
    pub fn new(ram_pages: u32) -> Self {
        ConfigSpace { num_pages: 0, actual: 0, ram_pages }
    }

    /// The target: pages that the guest is asked to give.
    pub fn num_pages(&self) -> u32 {
        self.num_pages
    }

    /// Sets the target, at most all of RAM. True if this changed it, and the guest has to be told.
    pub fn set_num_pages(&mut self, pages: u32) -> bool {
        let pages = pages.min(self.ram_pages);
        let changed = self.num_pages != pages;
        self.num_pages = pages;
        changed
    }

    /// The pages that the guest says it has given, at most all of RAM.
    pub fn actual(&self) -> u32 {
        self.actual.min(self.ram_pages)
    }

    /// Forgets what the guest said; the target stays.
    pub fn reset(&mut self) {
        self.actual = 0;
    }

    /// Reads `data.len()` bytes at `offset` for the guest. What is not there reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.checked_add(i as u64).and_then(|at| usize::try_from(at).ok());
            *byte = at.and_then(|at| bytes.get(at).copied()).unwrap_or(0);
        }
    }

    /// Writes `data` at `offset` for the guest: any part of `actual`, and nothing else.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), GuestFault> {
        let end = offset.checked_add(data.len() as u64).ok_or(GuestFault::ConfigWrite)?;
        if offset < spec::CONFIG_ACTUAL || end > spec::CONFIG_LEN {
            return Err(GuestFault::ConfigWrite);
        }
        let at = (offset - spec::CONFIG_ACTUAL) as usize;
        let mut actual = self.actual.to_le_bytes();
        actual[at..at + data.len()].copy_from_slice(data);
        // Kept as written, so that the guest reads back its own value; only our reading of it is bounded.
        self.actual = u32::from_le_bytes(actual);
        if self.actual > self.ram_pages { Err(GuestFault::Actual) } else { Ok(()) }
    }

    fn bytes(&self) -> [u8; spec::CONFIG_LEN as usize] {
        let mut bytes = [0; spec::CONFIG_LEN as usize];
        bytes[spec::CONFIG_NUM_PAGES as usize..][..4].copy_from_slice(&self.num_pages.to_le_bytes());
        bytes[spec::CONFIG_ACTUAL as usize..][..4].copy_from_slice(&self.actual.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_u32(config: &ConfigSpace, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn target_is_written_by_the_host_and_actual_by_the_guest() {
        let mut config = ConfigSpace::new(1000);
        assert!(config.set_num_pages(300));
        assert!(!config.set_num_pages(300));
        assert_eq!(read_u32(&config, spec::CONFIG_NUM_PAGES), 300);
        assert_eq!(config.actual(), 0);
        config.write(spec::CONFIG_ACTUAL, &200u32.to_le_bytes()).unwrap();
        assert_eq!((config.actual(), read_u32(&config, 4), config.num_pages()), (200, 200, 300));
        config.reset();
        assert_eq!((config.actual(), config.num_pages()), (0, 300));
    }

    #[test]
    fn both_are_bounded_by_ram() {
        let mut config = ConfigSpace::new(1000);
        assert!(config.set_num_pages(5000));
        assert_eq!(config.num_pages(), 1000);
        assert_eq!(config.write(4, &1001u32.to_le_bytes()), Err(GuestFault::Actual));
        assert_eq!(config.actual(), 1000);
        assert_eq!(read_u32(&config, 4), 1001);
    }

    #[test]
    fn writes_outside_actual_change_nothing() {
        let mut config = ConfigSpace::new(1000);
        config.set_num_pages(7);
        let before = config;
        for (offset, len) in [(0, 4), (0, 8), (3, 1), (3, 2), (7, 2), (8, 1), (12, 4), (u64::MAX, 1), (u64::MAX, 8)] {
            assert_eq!(config.write(offset, &vec![0xff; len]), Err(GuestFault::ConfigWrite), "{offset}+{len}");
            assert_eq!(config, before);
        }
        config.write(5, &[1]).unwrap();
        assert_eq!(config.actual(), 256);
    }

    #[test]
    fn reads_outside_are_zero() {
        let mut config = ConfigSpace::new(1000);
        config.set_num_pages(0x0201);
        assert_eq!(read_u32(&config, 8), 0);
        assert_eq!(read_u32(&config, u64::MAX - 1), 0);
        let mut byte = [0xff];
        config.read(1, &mut byte);
        assert_eq!(byte, [2]);
    }
}

//! Configuration space: the target, written by the host, and the actual size, written by the guest.
//!
//! The two are never mixed up: `num_pages` is what is asked for, `actual` is what the guest says it has given, and the
//! guest may say anything. What has really been released is counted by whoever discards the pages.
//!
//! `poison_val` is what the guest fills free pages with, where reporting is offered. Writing it without having agreed to
//! `VIRTIO_BALLOON_F_PAGE_POISON` is forbidden, and taken as if it had: the guest loses nothing but its reports.

use crate::counters::GuestFault;
use crate::spec;

/// The sixteen bytes of configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    num_pages: u32,
    actual: u32,
    poison_val: u32,
    poison_offered: bool,
    ram_pages: u32,
    /// The least target since the guest wrote `actual` last: down to there it was told to go.
    least_target: u32,
}

impl ConfigSpace {
    /// A configuration space with both sizes 0, for a guest with `ram_pages` pages of 4 KiB. `poison_val` can be written
    /// only when it is offered.
    pub fn new(ram_pages: u32, poison_offered: bool) -> Self {
        ConfigSpace { num_pages: 0, actual: 0, poison_val: 0, poison_offered, ram_pages, least_target: 0 }
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
        self.least_target = self.least_target.min(pages);
        changed
    }

    /// The pages that the guest says it has given, at most all of RAM.
    pub fn actual(&self) -> u32 {
        self.actual.min(self.ram_pages)
    }

    /// What the guest says it fills free pages with; 0 when it has said nothing.
    pub fn poison_val(&self) -> u32 {
        self.poison_val
    }

    /// Forgets what the guest said; the target stays.
    pub fn reset(&mut self) {
        (self.actual, self.poison_val) = (0, 0);
    }

    /// Reads `data.len()` bytes at `offset` for the guest. What is not there reads as 0.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.checked_add(i as u64).and_then(|at| usize::try_from(at).ok());
            *byte = at.and_then(|at| bytes.get(at).copied()).unwrap_or(0);
        }
    }

    /// Writes `data` at `offset` for the guest: any part of `actual` or of `poison_val`, and nothing else. Returns how many
    /// pages the guest has taken back below a target that nobody has lowered, as it does when it is out of memory.
    ///
    /// A driver that goes away takes all of them: an `actual` of 0 says nothing.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<u32, GuestFault> {
        // Both are kept as written, so that the guest reads back its own value; only our reading of them is bounded.
        let before = self.actual();
        if overwrite(&mut self.actual, spec::CONFIG_ACTUAL, offset, data) {
            if self.actual > self.ram_pages {
                return Err(GuestFault::Actual);
            }
            let meant = std::mem::replace(&mut self.least_target, self.num_pages).min(before);
            return Ok(if self.actual > 0 { meant.saturating_sub(self.actual) } else { 0 });
        }
        if self.poison_offered && overwrite(&mut self.poison_val, spec::CONFIG_POISON_VAL, offset, data) {
            return Ok(0);
        }
        Err(GuestFault::ConfigWrite)
    }

    fn bytes(&self) -> [u8; spec::CONFIG_LEN as usize] {
        let mut bytes = [0; spec::CONFIG_LEN as usize];
        bytes[spec::CONFIG_NUM_PAGES as usize..][..4].copy_from_slice(&self.num_pages.to_le_bytes());
        bytes[spec::CONFIG_ACTUAL as usize..][..4].copy_from_slice(&self.actual.to_le_bytes());
        bytes[spec::CONFIG_POISON_VAL as usize..][..4].copy_from_slice(&self.poison_val.to_le_bytes());
        bytes
    }
}

/// Writes `data` at `offset` into the field that begins at `start`; false when it is not within the field.
fn overwrite(field: &mut u32, start: u64, offset: u64, data: &[u8]) -> bool {
    let mut bytes = field.to_le_bytes();
    let at = offset.checked_sub(start).and_then(|at| usize::try_from(at).ok());
    let place = at.and_then(|at| bytes.get_mut(at..at.checked_add(data.len())?));
    let Some(place) = place else { return false };
    place.copy_from_slice(data);
    *field = u32::from_le_bytes(bytes);
    true
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
        let mut config = ConfigSpace::new(1000, true);
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
    fn what_is_taken_back_below_the_target_is_told_from_what_was_asked_for() {
        let mut config = ConfigSpace::new(1000, true);
        let actual = |config: &mut ConfigSpace, pages: u32| config.write(4, &pages.to_le_bytes()).unwrap();
        config.set_num_pages(500);
        assert_eq!([200, 400, 500].map(|pages| actual(&mut config, pages)), [0; 3]);
        // As Linux does it when it is out of memory: 256 at a time.
        assert_eq!([244, 100].map(|pages| actual(&mut config, pages)), [256, 144]);
        // On the way up, and more at once than it still has to give.
        config.set_num_pages(800);
        assert_eq!([300, 250].map(|pages| actual(&mut config, pages)), [0, 50]);
        // Down to a target, and no further.
        config.set_num_pages(200);
        assert_eq!([230, 200, 190].map(|pages| actual(&mut config, pages)), [0, 0, 10]);
        // It was told to go down to 50 and is on its way there, when the target rises again.
        config.set_num_pages(50);
        config.set_num_pages(300);
        assert_eq!([60, 55].map(|pages| actual(&mut config, pages)), [0, 5]);
        assert_eq!(actual(&mut config, 0), 0, "the driver goes away");
    }

    #[test]
    fn both_are_bounded_by_ram() {
        let mut config = ConfigSpace::new(1000, true);
        assert!(config.set_num_pages(5000));
        assert_eq!(config.num_pages(), 1000);
        assert_eq!(config.write(4, &1001u32.to_le_bytes()), Err(GuestFault::Actual));
        assert_eq!(config.actual(), 1000);
        assert_eq!(read_u32(&config, 4), 1001);
    }

    #[test]
    fn writes_outside_actual_change_nothing() {
        let mut config = ConfigSpace::new(1000, true);
        config.set_num_pages(7);
        let before = config;
        let outside =
            [(0, 4), (0, 8), (0, 16), (3, 1), (3, 2), (7, 2), (8, 1), (8, 4), (10, 4), (12, 5), (15, 2), (16, 1)];
        for (offset, len) in outside.into_iter().chain([(u64::MAX, 1), (u64::MAX, 8), (u64::MAX - 3, 4)]) {
            assert_eq!(config.write(offset, &vec![0xff; len]), Err(GuestFault::ConfigWrite), "{offset}+{len}");
            assert_eq!(config, before);
        }
        config.write(5, &[1]).unwrap();
        assert_eq!(config.actual(), 256);
    }

    /// What Linux reads and writes (`virtio_cread_le` and `virtio_cwrite_le` of `struct virtio_balloon_config`), each
    /// field with one access of four bytes.
    #[test]
    fn the_fields_are_where_linux_looks_for_them() {
        let mut config = ConfigSpace::new(1000, true);
        config.set_num_pages(300);
        config.write(4, &200u32.to_le_bytes()).unwrap();
        config.write(12, &0xaaaa_aaaau32.to_le_bytes()).unwrap();
        let fields = [0, 4, 8, 12, 16].map(|offset| read_u32(&config, offset));
        assert_eq!(fields, [300, 200, 0, 0xaaaa_aaaa, 0]);
        assert_eq!((config.actual(), config.poison_val()), (200, 0xaaaa_aaaa));
        config.reset();
        assert_eq!((config.poison_val(), read_u32(&config, 12)), (0, 0));
    }

    #[test]
    fn poison_is_not_written_where_it_is_not_offered() {
        let mut config = ConfigSpace::new(1000, false);
        assert_eq!(config.write(12, &[1; 4]), Err(GuestFault::ConfigWrite));
        assert_eq!((config.poison_val(), read_u32(&config, 12)), (0, 0));
    }

    #[test]
    fn reads_outside_are_zero() {
        let mut config = ConfigSpace::new(1000, true);
        config.set_num_pages(0x0201);
        assert_eq!(read_u32(&config, 8), 0);
        assert_eq!(read_u32(&config, u64::MAX - 1), 0);
        let mut byte = [0xff];
        config.read(1, &mut byte);
        assert_eq!(byte, [2]);
    }
}

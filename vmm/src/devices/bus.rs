//! Ports and memory-mapped registers: which device answers at which address.
//!
//! A bus is built before the first vCPU runs and never changes after that, so that finding a device takes no lock.
//! What no device answers reads as all ones and takes writes silently, as on a PC; it is counted, not logged, because
//! a guest may do it a million times a second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;

use crate::worker::protocol::ExitReason;

/// What a write does to the vCPU that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing: it goes on.
    None,
    /// The VM ends.
    Exit(ExitReason),
    /// It goes on after this time.
    Wait(Duration),
}

/// A device that answers at some range of a bus. Everything it is given comes from the guest and may be nonsense: any
/// offset within the range, any length from 1 to 8, any order.
///
/// Both are called with the device's lock held, on a vCPU's thread: whoever else holds that lock must not touch guest
/// memory or wait meanwhile, because a vCPU that waits for a lock cannot be kicked.
pub trait BusDevice: Send {
    /// Fills `data` with what is read at `offset` from the start of the range.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// Takes `data` written at `offset` from the start of the range.
    fn write(&mut self, offset: u64, data: &[u8]) -> Effect;
}

/// A device as a bus and its other users share it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// A range that cannot be given to a device.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// It would overlap another one, is empty, or wraps around.
    #[error("the address range {base:#x} + {len:#x} is empty or taken")]
    Range {
        /// First address.
        base: u64,
        /// Length.
        len: u64,
    },
}

/// One bus.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, disjoint.
    ranges: Vec<(u64, u64, SharedDevice)>,
    unknown: AtomicU64,
}

/// Both buses of a VM.
#[derive(Default)]
pub struct Buses {
    /// Ports.
    pub pio: Bus,
    /// Memory-mapped registers.
    pub mmio: Bus,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.ranges.iter().map(|(base, len, _)| (base, len))).finish()
    }
}

impl std::fmt::Debug for Buses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buses").field("pio", &self.pio).field("mmio", &self.mmio).finish()
    }
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `len` addresses from `base` to `device`.
    ///
    /// # Errors
    /// When the range is empty, wraps around, or overlaps another.
    pub fn insert(&mut self, base: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        let refused = BusError::Range { base, len };
        let Some(end) = base.checked_add(len).filter(|_| len > 0) else {
            return Err(refused);
        };
        let at = self.ranges.partition_point(|r| r.0 < base);
        let clear_before = at == 0 || self.ranges[at - 1].0 + self.ranges[at - 1].1 <= base;
        let clear_after = self.ranges.get(at).is_none_or(|r| end <= r.0);
        if !(clear_before && clear_after) {
            return Err(refused);
        }
        self.ranges.insert(at, (base, len, device));
        Ok(())
    }

    /// Serves a read of `data.len()` bytes.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Serves a write.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.find(address, data.len()) {
            Some((offset, device)) => device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data),
            None => Effect::None,
        }
    }

    /// Accesses so far that no device answered, those that reach beyond the end of a device's range included.
    pub fn unknown_accesses(&self) -> u64 {
        self.unknown.load(Ordering::Relaxed)
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &SharedDevice)> {
        let at = self.ranges.partition_point(|r| r.0 <= address);
        let hit = at.checked_sub(1).map(|i| &self.ranges[i]).and_then(|(base, size, device)| {
            let offset = address - base;
            let fits = offset < *size && len as u64 <= size - offset;
            fits.then_some((offset, device))
        });
        if hit.is_none() {
            self.unknown.fetch_add(1, Ordering::Relaxed);
        }
        hit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
            self.0.push((offset, data.to_vec()));
            Effect::Wait(Duration::from_millis(offset))
        }
    }

    fn echo() -> Arc<Mutex<Echo>> {
        Arc::new(Mutex::new(Echo(Vec::new())))
    }

    #[test]
    fn finds_the_device_and_the_offset() {
        let (a, b) = (echo(), echo());
        let mut bus = Bus::new();
        bus.insert(0x100, 8, a.clone()).unwrap();
        bus.insert(0x80, 0x10, b.clone()).unwrap();
        let mut byte = [0];
        bus.read(0x107, &mut byte);
        assert_eq!(byte, [7]);
        assert_eq!(bus.write(0x8f, &[1]), Effect::Wait(Duration::from_millis(0xf)));
        assert_eq!((a.lock().unwrap().0.len(), b.lock().unwrap().0.clone()), (0, vec![(0xf, vec![1])]));
        assert_eq!(bus.unknown_accesses(), 0);
    }

    #[test]
    fn unknown_accesses_read_ones_and_are_counted() {
        let mut bus = Bus::new();
        bus.insert(0x100, 8, echo()).unwrap();
        let mut data = [0; 4];
        for address in [0, 0xff, 0x105, 0x108, u64::MAX] {
            data.fill(0);
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
        }
        assert_eq!(bus.write(0x107, &[1, 2]), Effect::None);
        assert_eq!(bus.unknown_accesses(), 6);
    }

    #[test]
    fn ranges_must_be_free() {
        let mut bus = Bus::new();
        bus.insert(0x100, 8, echo()).unwrap();
        for (base, len) in [(0x100, 1), (0xf9, 8), (0x107, 1), (0x80, 0x1000), (0x200, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(base, len, echo()), Err(BusError::Range { base, len }));
        }
        bus.insert(0x108, 8, echo()).unwrap();
        bus.insert(0xf8, 8, echo()).unwrap();
    }
}

//! Where things are in guest-physical memory.
//!
//! ```text
//!  0x0000_0500  descriptor table, page tables, boot parameters, stacks of a payload   (below 640 KiB)
//!  0x000e_0000  ACPI tables, the RSDP first                                            (reserved in the memory map)
//!  0x0010_0000  kernel or payload ... ramdisk at the high end
//!  min(size, 3 GiB)  end of the low slot
//!  0xd000_0000  virtio-mmio windows, 4 KiB each
//!  0xfec0_0000  I/O APIC        0xfee0_0000  local APIC        0xfffb_c000  KVM's own pages (Intel)
//!  4 GiB        the rest of RAM
//! ```

pub use memcg_core::units::PAGE_SIZE;
use thiserror::Error;

/// Smallest size of guest RAM: the first MiB is for the firmware's tables, the second for a payload.
pub const MIN_RAM: u64 = 2 << 20;
/// Largest size of guest RAM: all of it must lie below 512 GiB.
pub const MAX_RAM: u64 = (512 << 30) - (HIGH_RAM_START - LOW_RAM_END);
/// RAM below the hole ends here at the latest.
pub const LOW_RAM_END: u64 = 3 << 30;
/// RAM above the hole starts here.
pub const HIGH_RAM_START: u64 = 4 << 30;
/// Largest number of vCPUs.
pub const MAX_CPUS: u32 = 64;

/// Descriptor table for entering Linux in 64-bit or 32-bit mode.
pub const GDT: u64 = 0x500;
/// The zero page (bzImage) or `hvm_start_info` with its lists (PVH).
pub const BOOT_PARAMS: u64 = 0x7000;
/// The command line, NUL-terminated.
pub const CMDLINE: u64 = 0x8000;
/// Largest command line in bytes with its NUL.
pub const CMDLINE_MAX: u64 = 0x1000;
/// Page tables: PML4, PDPT, then page directories.
pub const PAGE_TABLES: u64 = 0x1_0000;
/// End of the room for page tables; 78 page directories fit, that is addresses up to 78 GiB.
pub const PAGE_TABLES_END: u64 = 0x6_0000;
/// Stacks of a flat payload's vCPUs.
pub const STACKS: u64 = 0x6_0000;
/// End of the stacks.
pub const STACKS_END: u64 = 0xa_0000;
/// End of what the memory map calls usable below 1 MiB.
pub const LOW_USABLE_END: u64 = 0x9_fc00;
/// ACPI tables; the RSDP is the first 36 bytes and lies where a guest that scans for it looks.
pub const ACPI: u64 = 0xe_0000;
/// End of the room for ACPI tables, and of the area below 1 MiB.
pub const ACPI_END: u64 = 0x10_0000;
/// Kernels and payloads start here or above.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// First virtio-mmio window.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// Size of one window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Interrupt of the first virtio-mmio device.
pub const VIRTIO_GSI: u32 = 5;
/// Largest number of virtio-mmio devices: one pin of the I/O APIC each.
pub const MAX_VIRTIO: u32 = IOAPIC_PINS - VIRTIO_GSI;
/// I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Pins of KVM's I/O APIC.
pub const IOAPIC_PINS: u32 = 24;
/// Local APICs.
pub const LAPIC: u64 = 0xfee0_0000;
/// A page that Intel's KVM needs for real mode without `unrestricted guest`.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three more of them, for its task state segment.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The first serial port, 8 ports.
pub const COM1: u16 = 0x3f8;
/// Interrupt of the first serial port.
pub const COM1_GSI: u32 = 4;
/// Interrupt of the power button, raised once for each time it is pressed.
pub const POWER_BUTTON_GSI: u32 = 3;
/// Ports for freestanding payloads, 12 of them; see [`crate::devices::debug_port`].
pub const DEBUG_PORT: u16 = 0x504;
/// ACPI registers, 3 ports; see [`crate::devices::power`].
pub const POWER_PORT: u16 = 0x600;
/// The keyboard controller's command port, of which only the reset line exists.
pub const I8042_COMMAND: u16 = 0x64;

/// Size of the stack that each vCPU of a flat payload gets, in bytes: 16 KiB up to 16 vCPUs, less with more of them.
pub const fn stack_bytes(cpus: u32) -> u64 {
    let share = (STACKS_END - STACKS) / cpus as u64 / PAGE_SIZE * PAGE_SIZE;
    if share > 0x4000 { 0x4000 } else { share }
}

/// Window of virtio-mmio device `n`.
pub const fn virtio_window(n: u32) -> u64 {
    VIRTIO_MMIO + n as u64 * VIRTIO_MMIO_SIZE
}

/// Interrupt of virtio-mmio device `n`.
pub const fn virtio_gsi(n: u32) -> u32 {
    VIRTIO_GSI + n
}

/// A size that cannot be guest RAM.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum LayoutError {
    /// Not whole pages.
    #[error("guest RAM of {0} bytes is not a multiple of {PAGE_SIZE} bytes; round it to whole pages")]
    Unaligned(u64),
    /// Too small.
    #[error("guest RAM of {0} bytes is too small; give at least {min} MiB", min = MIN_RAM >> 20)]
    TooSmall(u64),
    /// Too large.
    #[error("guest RAM of {0} bytes is too large; give at most {max} GiB", max = MAX_RAM >> 30)]
    TooLarge(u64),
}

/// One contiguous range of guest RAM, one memory slot of KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address in bytes.
    pub gpa: u64,
    /// Length in bytes, a multiple of the page size.
    pub bytes: u64,
}

impl RamRange {
    /// First address behind the range.
    pub const fn end(&self) -> u64 {
        self.gpa + self.bytes
    }
}

/// Guest RAM: one range below the 32-bit hole and, when it is large, one above. Pages are numbered densely over both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamLayout {
    size: u64,
}

impl RamLayout {
    /// Lays out `size` bytes.
    ///
    /// # Errors
    /// When `size` is not a multiple of the page size or not within [`MIN_RAM`] to [`MAX_RAM`].
    pub const fn new(size: u64) -> Result<Self, LayoutError> {
        if !size.is_multiple_of(PAGE_SIZE) {
            Err(LayoutError::Unaligned(size))
        } else if size < MIN_RAM {
            Err(LayoutError::TooSmall(size))
        } else if size > MAX_RAM {
            Err(LayoutError::TooLarge(size))
        } else {
            Ok(Self { size })
        }
    }

    /// Bytes of RAM.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The range that starts at 0.
    pub const fn low(&self) -> RamRange {
        RamRange { gpa: 0, bytes: if self.size < LOW_RAM_END { self.size } else { LOW_RAM_END } }
    }

    /// The range that starts at 4 GiB, if there is one.
    pub const fn high(&self) -> Option<RamRange> {
        if self.size > LOW_RAM_END {
            Some(RamRange { gpa: HIGH_RAM_START, bytes: self.size - LOW_RAM_END })
        } else {
            None
        }
    }

    /// The one or two ranges in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = RamRange> + use<> {
        std::iter::once(self.low()).chain(self.high())
    }

    /// First address behind all RAM.
    pub fn end(&self) -> u64 {
        self.high().unwrap_or(self.low()).end()
    }

    /// True when all of the `bytes` from `gpa` are RAM of one range.
    pub fn contains(&self, gpa: u64, bytes: u64) -> bool {
        let Some(end) = gpa.checked_add(bytes) else {
            return false;
        };
        self.ranges().any(|r| gpa >= r.gpa && end <= r.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_checked() {
        assert_eq!(RamLayout::new(MIN_RAM - PAGE_SIZE), Err(LayoutError::TooSmall(MIN_RAM - PAGE_SIZE)));
        assert_eq!(RamLayout::new(MIN_RAM + 1), Err(LayoutError::Unaligned(MIN_RAM + 1)));
        assert_eq!(RamLayout::new(MAX_RAM + PAGE_SIZE), Err(LayoutError::TooLarge(MAX_RAM + PAGE_SIZE)));
        assert!(RamLayout::new(u64::MAX).is_err());
        assert_eq!(RamLayout::new(MAX_RAM).unwrap().end(), 512 << 30);
    }

    #[test]
    fn ram_splits_at_the_hole() {
        let small = RamLayout::new(LOW_RAM_END).unwrap();
        assert_eq!(small.ranges().count(), 1);
        let large = RamLayout::new(LOW_RAM_END + PAGE_SIZE).unwrap();
        assert!(large.contains(HIGH_RAM_START, PAGE_SIZE) && large.contains(HIGH_RAM_START + 4095, 1));
        assert!(!large.contains(LOW_RAM_END, 1));
        assert!(!large.contains(HIGH_RAM_START + PAGE_SIZE, 1));
        assert!(!large.contains(LOW_RAM_END - 1, 2));
        assert!(!large.contains(u64::MAX, 2));
    }

    #[test]
    fn the_map_does_not_overlap() {
        let end_of_windows = virtio_window(MAX_VIRTIO);
        assert!(VIRTIO_MMIO >= LOW_RAM_END && end_of_windows <= IOAPIC && KVM_TSS + 0x3000 <= HIGH_RAM_START);
        assert!(virtio_gsi(MAX_VIRTIO - 1) < IOAPIC_PINS);
        for cpus in 1..=MAX_CPUS {
            assert!(stack_bytes(cpus) >= PAGE_SIZE && STACKS + stack_bytes(cpus) * u64::from(cpus) <= STACKS_END);
        }
        assert_eq!(stack_bytes(16), 0x4000);
    }

    proptest! {
        #[test]
        fn ranges_hold_all_of_ram_and_nothing_twice(pages in 512u64..(MAX_RAM / PAGE_SIZE)) {
            let ram = RamLayout::new(pages * PAGE_SIZE).unwrap();
            let ranges: Vec<RamRange> = ram.ranges().collect();
            prop_assert_eq!(ranges.iter().map(|range| range.bytes).sum::<u64>(), pages * PAGE_SIZE);
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end() <= pair[1].gpa));
            prop_assert!(ranges.iter().all(|range| ram.contains(range.gpa, range.bytes)));
        }
    }
}

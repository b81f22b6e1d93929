//! What a boot protocol wants in memory beside the kernel: page tables, descriptors, memory map, command line.

use super::BootError;
use crate::machine::layout::{self, PAGE_SIZE, RamLayout};

/// Usable memory, in the e820 map and PVH's alike.
pub(super) const E820_RAM: u32 = 1;
/// Memory to be left alone.
const E820_RESERVED: u32 = 2;

/// Bytes of the descriptor table.
pub const GDT_BYTES: u16 = 32;

const ENTRIES: u64 = 512;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const LARGE_PAGE: u64 = 2 << 20;
/// Bytes that one page directory maps.
const DIRECTORY_SPAN: u64 = ENTRIES * LARGE_PAGE;
/// Page directories that fit beside the two tables above them.
const MAX_DIRECTORIES: u64 = (layout::PAGE_TABLES_END - layout::PAGE_TABLES) / PAGE_SIZE - 2;

/// `hvm_start_info` and what it points to, all in one page.
const START_INFO_MAGIC: u32 = 0x336e_c578;
const START_INFO_VERSION: u32 = 1;
const MODULE_LIST: usize = 0x40;
const MEMORY_MAP: usize = 0x80;

/// One entry of the memory map.
pub(super) struct MapEntry {
    pub(super) gpa: u64,
    pub(super) bytes: u64,
    pub(super) kind: u32,
}

/// The memory map: RAM, and the tables below 1 MiB as reserved.
pub(super) fn memory_map(ram: &RamLayout) -> Vec<MapEntry> {
    let range = |gpa, end: u64, kind| MapEntry { gpa, bytes: end - gpa, kind };
    let mut map = vec![
        range(0, layout::LOW_USABLE_END, E820_RAM),
        range(layout::LOW_USABLE_END, layout::STACKS_END, E820_RESERVED),
        range(layout::ACPI, layout::ACPI_END, E820_RESERVED),
        range(layout::HIGH_MEMORY, ram.low().end(), E820_RAM),
    ];
    map.extend(ram.high().map(|high| range(high.gpa, high.end(), E820_RAM)));
    map
}

/// A PVH start page at [`layout::BOOT_PARAMS`] with a ramdisk at (address, bytes).
pub(super) fn start_info(ram: &RamLayout, ramdisk: Option<(u64, u64)>) -> Vec<u8> {
    let at = |offset: usize| layout::BOOT_PARAMS + offset as u64;
    let map = memory_map(ram);
    let mut info = Vec::new();
    for word in [START_INFO_MAGIC, START_INFO_VERSION, 0, u32::from(ramdisk.is_some())] {
        info.extend(word.to_le_bytes());
    }
    for address in [at(MODULE_LIST), layout::CMDLINE, layout::ACPI, at(MEMORY_MAP)] {
        info.extend(address.to_le_bytes());
    }
    info.extend((map.len() as u32).to_le_bytes());
    info.resize(MODULE_LIST, 0);
    // A module: address, bytes, its command line, reserved.
    let (gpa, bytes) = ramdisk.unwrap_or_default();
    for field in [gpa, bytes, 0, 0] {
        info.extend(field.to_le_bytes());
    }
    info.resize(MEMORY_MAP, 0);
    for MapEntry { gpa, bytes, kind } in map {
        info.extend(gpa.to_le_bytes());
        info.extend(bytes.to_le_bytes());
        info.extend(kind.to_le_bytes());
        info.extend(0u32.to_le_bytes());
    }
    info
}

/// Linux's selectors: 0x10 is 64-bit code, 0x18 data.
pub(super) fn gdt() -> Vec<u8> {
    const CODE: u64 = 0x00af_9b00_0000_ffff;
    const DATA: u64 = 0x00cf_9300_0000_ffff;
    [0, 0, CODE, DATA].into_iter().flat_map(u64::to_le_bytes).collect()
}

/// An identity map of low RAM for Linux, which replaces it at once.
pub(super) fn kernel_page_tables(ram: &RamLayout) -> Vec<u8> {
    page_tables(ram.low().end().div_ceil(DIRECTORY_SPAN), 0)
}

/// An identity map of RAM and of everything below 4 GiB for user mode.
pub(super) fn payload_page_tables(ram: &RamLayout) -> Result<Vec<u8>, BootError> {
    let directories = ram.end().max(layout::HIGH_RAM_START).div_ceil(DIRECTORY_SPAN);
    if directories > MAX_DIRECTORIES {
        let most = (MAX_DIRECTORIES * DIRECTORY_SPAN - (layout::HIGH_RAM_START - layout::LOW_RAM_END)) >> 30;
        return Err(BootError::Unsupported(format!("a flat payload can have at most {most} GiB of RAM")));
    }
    Ok(page_tables(directories, USER))
}

/// PML4, PDPT and `directories` page directories of 2 MiB pages, for [`layout::PAGE_TABLES`].
fn page_tables(directories: u64, user: u64) -> Vec<u8> {
    let link = |page: u64| (layout::PAGE_TABLES + page * PAGE_SIZE) | PRESENT | WRITABLE | user;
    let mut tables = Vec::with_capacity(((2 + directories) * ENTRIES) as usize);
    tables.push(link(1));
    tables.resize(ENTRIES as usize, 0);
    tables.extend((0..directories).map(|n| link(2 + n)));
    tables.resize(2 * ENTRIES as usize, 0);
    tables.extend((0..directories * ENTRIES).map(|n| (n * LARGE_PAGE) | PRESENT | WRITABLE | LARGE | user));
    tables.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// The user's command line behind what the VMM knows: in front, so that the user has the last word and so that it is
/// not taken for arguments of init when the user's part has a `--`.
///
/// `reboot=a` is not redundant: on a hardware-reduced ACPI platform Linux resets through EFI, and without EFI it jumps
/// to a BIOS that is not there, unless it is told otherwise.
pub(super) fn linux_cmdline(user: &str, virtio_devices: u32) -> String {
    let mut line = "console=ttyS0 reboot=a".to_owned();
    for n in 0..virtio_devices {
        // For kernels that take it; Debian's find the devices in the ACPI tables.
        let (window, gsi) = (layout::virtio_window(n), layout::virtio_gsi(n));
        line += &format!(" virtio_mmio.device=4K@{window:#x}:{gsi}");
    }
    if !user.is_empty() {
        line += " ";
        line += user;
    }
    line
}

/// A command line with its NUL, at most `max` bytes with it.
pub(super) fn cmdline(line: &str, max: u64) -> Result<Vec<u8>, BootError> {
    if line.contains('\0') {
        return Err(BootError::Cmdline("contains a NUL byte".to_owned()));
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    let len = bytes.len() as u64;
    if len > max {
        let (len, most) = (len - 1, max - 1);
        return Err(BootError::Cmdline(format!("has {len} bytes, with what is added; this guest takes {most}")));
    }
    Ok(bytes)
}

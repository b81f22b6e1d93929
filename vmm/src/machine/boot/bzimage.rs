//! A bzImage, entered by the 64-bit Linux boot protocol (`Documentation/arch/x86/boot.rst`).
//!
//! The image is put at the address where the kernel unpacks itself to anyway: so the pages of the packed image are
//! reused by the unpacked one and charged once.

use super::tables::{self, E820_RAM, MapEntry};
use super::{BootError, Kernel, KernelFile, LinuxStart, Start, check_place, layout};
use crate::machine::layout::RamLayout;

/// Where the setup header starts in the file and in the zero page.
const HEADER: usize = 0x1f1;
/// Where it may end at the latest: behind it the zero page has other fields.
const HEADER_END: usize = 0x290;
/// The oldest protocol with `xloadflags` and hence a 64-bit entry.
const PROTOCOL_2_12: u16 = 0x20c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const SECTOR: u64 = 512;
/// The 64-bit entry's distance from the load address.
const ENTRY_64: u64 = 0x200;

/// Fields by their offset in the zero page.
mod field {
    pub const ACPI_RSDP: usize = 0x070;
    pub const E820_COUNT: usize = 0x1e8;
    pub const SETUP_SECTS: usize = 0x1f1;
    pub const SYSSIZE: usize = 0x1f4;
    pub const VID_MODE: usize = 0x1fa;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const JUMP: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const LOADER: usize = 0x210;
    pub const LOADFLAGS: usize = 0x211;
    pub const CODE32_START: usize = 0x214;
    pub const RAMDISK: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const CMDLINE: usize = 0x228;
    pub const INITRD_MAX: usize = 0x22c;
    pub const XLOADFLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PREF_ADDRESS: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
    pub const E820_TABLE: usize = 0x2d0;
}

/// A loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const VID_MODE_NORMAL: u16 = 0xffff;

/// The setup header of a checked bzImage.
pub struct SetupHeader {
    /// The zero page with nothing but the header in it.
    page: Vec<u8>,
}

pub(super) fn matches(head: &[u8]) -> bool {
    head.get(field::BOOT_FLAG..field::BOOT_FLAG + 2) == Some(&[0x55, 0xaa])
        && head.get(field::MAGIC..field::MAGIC + 4) == Some(b"HdrS")
}

pub(super) fn parse<'a>(file: &KernelFile<'a>, head: &[u8], ram: &RamLayout) -> Result<Kernel<'a>, BootError> {
    file.check("its setup header", 0, HEADER_END as u64)?;
    let header = SetupHeader::new(head);
    if header.u16(field::VERSION) < PROTOCOL_2_12 {
        let version = header.u16(field::VERSION);
        let (major, minor) = (version >> 8, version & 0xff);
        return Err(BootError::Unsupported(format!("it has boot protocol {major}.{minor:02}, older than 2.12")));
    }
    if header.page[field::LOADFLAGS] & LOADED_HIGH == 0 || header.u16(field::XLOADFLAGS) & XLF_KERNEL_64 == 0 {
        return Err(BootError::Unsupported("it has no 64-bit entry; is it a 32-bit kernel?".to_owned()));
    }
    let sectors = match header.page[field::SETUP_SECTS] {
        0 => 4,
        n => u64::from(n),
    };
    let offset = (sectors + 1) * SECTOR;
    // In units of 16 bytes, rounded up.
    let bytes = u64::from(header.u32(field::SYSSIZE)) * 16;
    if bytes <= ENTRY_64 {
        return Err(BootError::Damaged("it says that its kernel is empty".to_owned()));
    }
    file.check("its kernel", offset, bytes - 15)?;
    let bytes = bytes.min(file.size - offset);
    let load = header.u64(field::PREF_ADDRESS);
    let room = u64::from(header.u32(field::INIT_SIZE)).max(bytes);
    check_place(ram, load, room)?;
    let start = Start::Linux(LinuxStart::Bzimage { rip: load + ENTRY_64, header });
    Ok(Kernel { segments: vec![file.segment(load, offset, bytes)], end: load + room, start })
}

impl SetupHeader {
    /// Takes the header out of the first [`HEADER_END`] bytes of a file.
    fn new(head: &[u8]) -> Self {
        let mut page = vec![0; layout::PAGE_SIZE as usize];
        // The jump instruction's distance is the length of the rest of the header.
        let end = (field::MAGIC + usize::from(head[field::JUMP])).min(HEADER_END);
        page[HEADER..end].copy_from_slice(&head[HEADER..end]);
        Self { page }
    }

    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.page[at], self.page[at + 1]])
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from(self.u16(at)) | u32::from(self.u16(at + 2)) << 16
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) | u64::from(self.u32(at + 4)) << 32
    }

    /// Bytes of command line with its NUL that this kernel takes.
    pub(super) fn cmdline_max(&self) -> u64 {
        (u64::from(self.u32(field::CMDLINE_SIZE)) + 1).min(layout::CMDLINE_MAX)
    }

    /// Highest address that the ramdisk may occupy.
    pub(super) fn initrd_max(&self) -> u64 {
        u64::from(self.u32(field::INITRD_MAX))
    }

    /// The zero page for `ram` and a ramdisk at (address, bytes).
    pub(super) fn zero_page(&self, ram: &RamLayout, ramdisk: Option<(u64, u64)>) -> Vec<u8> {
        let mut page = self.page.clone();
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(field::ACPI_RSDP, &layout::ACPI.to_le_bytes());
        put(field::VID_MODE, &VID_MODE_NORMAL.to_le_bytes());
        put(field::LOADER, &[LOADER_UNDEFINED]);
        put(field::CODE32_START, &(self.u64(field::PREF_ADDRESS) as u32).to_le_bytes());
        put(field::CMDLINE, &(layout::CMDLINE as u32).to_le_bytes());
        // Both are below 4 GiB: the ramdisk is in low RAM.
        let (gpa, bytes) = ramdisk.unwrap_or_default();
        put(field::RAMDISK, &(gpa as u32).to_le_bytes());
        put(field::RAMDISK_SIZE, &(bytes as u32).to_le_bytes());
        let map = tables::memory_map(ram);
        debug_assert!(map.iter().any(|e| e.kind == E820_RAM));
        put(field::E820_COUNT, &[map.len() as u8]);
        for (n, MapEntry { gpa, bytes, kind }) in map.into_iter().enumerate() {
            let at = field::E820_TABLE + n * 20;
            put(at, &gpa.to_le_bytes());
            put(at + 8, &bytes.to_le_bytes());
            put(at + 16, &kind.to_le_bytes());
        }
        page
    }
}

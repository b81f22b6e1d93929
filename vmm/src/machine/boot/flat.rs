//! Flat payloads: freestanding test guests that run at CPL 3 at native speed on every kind of KVM.
//!
//! ```text
//!   0  b"BALLAST1"
//!   8  u32  offset of the entry from the start of the file
//!  12  u32  bytes of memory from the load address, at least the size of the file; the rest reads as zero
//! ```
//!
//! The file, header included, is loaded at 1 MiB. Entered on every vCPU in 64-bit mode with `RDI` = address of the
//! command line (NUL-terminated), `RSI` = bytes of RAM, `RDX` = number of this vCPU, `RCX` = number of vCPUs, `RSP` =
//! top of a stack of its own. An identity map covers RAM and everything below 4 GiB. Everything in RAM from 1 MiB + the
//! memory asked for is the payload's to use; nothing of the VMM's lies there.

use super::{BootError, Kernel, KernelFile, Start, check_place};
use crate::machine::layout::{HIGH_MEMORY, RamLayout};

/// The first bytes.
pub const MAGIC: &[u8; 8] = b"BALLAST1";
/// Bytes of the header.
pub const HEADER: u32 = 16;

pub(super) fn matches(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

pub(super) fn parse<'a>(file: &KernelFile<'a>, head: &[u8], ram: &RamLayout) -> Result<Kernel<'a>, BootError> {
    file.check("its header", 0, u64::from(HEADER))?;
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let (entry, memory) = (word(8), u64::from(word(12)));
    if entry < HEADER || u64::from(entry) >= file.size {
        let size = file.size;
        return Err(BootError::Damaged(format!("its entry at offset {entry} is not within its {size} bytes")));
    }
    if memory < file.size {
        let size = file.size;
        return Err(BootError::Damaged(format!("it asks for {memory} bytes of memory and has {size} bytes")));
    }
    check_place(ram, HIGH_MEMORY, memory)?;
    Ok(Kernel {
        segments: vec![file.segment(HIGH_MEMORY, 0, file.size)],
        end: HIGH_MEMORY + memory,
        start: Start::Flat(HIGH_MEMORY + u64::from(entry)),
    })
}

//! An uncompressed `vmlinux`: an ELF file whose notes name the PVH entry.
//!
//! Only the file header, the program headers and the notes are looked at. Sections are not: stripped files have none,
//! and loading does not need them.

use ::elf::abi::{EM_X86_64, ET_DYN, ET_EXEC, PT_LOAD, PT_NOTE};
use ::elf::endian::AnyEndian;
use ::elf::file::{Class, FileHeader, parse_ident};
use ::elf::note::{Note, NoteIterator};
use ::elf::segment::{ProgramHeader, SegmentTable};

use super::{BootError, Kernel, KernelFile, LinuxStart, Start, check_place};
use crate::machine::layout::RamLayout;

const EHDR_BYTES: usize = 64;
const IDENT_BYTES: usize = 16;
const PHDR_BYTES: u16 = 56;
/// More program headers than any kernel has.
const MAX_PHDRS: u16 = 128;
/// More bytes of notes than any kernel has.
const MAX_NOTES: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY`, with the name `Xen`.
const PHYS32_ENTRY: u64 = 18;

pub(super) fn matches(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

pub(super) fn parse<'a>(file: &KernelFile<'a>, head: &[u8], ram: &RamLayout) -> Result<Kernel<'a>, BootError> {
    let header = header(file, head)?;
    let table = file.read("its program headers", header.e_phoff, u64::from(header.e_phnum * PHDR_BYTES))?;
    let headers: Vec<_> = SegmentTable::new(header.endianness, header.class, &table).iter().collect();
    let mut segments = Vec::new();
    let mut taken: Vec<(u64, u64)> = Vec::new();
    for p in headers.iter().filter(|p| p.p_type == PT_LOAD && p.p_memsz > 0) {
        if p.p_filesz > p.p_memsz {
            let (filesz, memsz) = (p.p_filesz, p.p_memsz);
            return Err(BootError::Damaged(format!("a segment has {filesz} bytes in the file for {memsz} in memory")));
        }
        check_place(ram, p.p_paddr, p.p_memsz)?;
        file.check("a segment", p.p_offset, p.p_filesz)?;
        if p.p_filesz > 0 {
            segments.push(file.segment(p.p_paddr, p.p_offset, p.p_filesz));
        }
        taken.push((p.p_paddr, p.p_paddr + p.p_memsz));
    }
    taken.sort_unstable();
    let Some(&(_, end)) = taken.last() else {
        return Err(BootError::Damaged("it has nothing to load".to_owned()));
    };
    if let Some(pair) = taken.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        return Err(BootError::Damaged(format!("two segments overlap at {:#x}", pair[1].0)));
    }
    let rip = pvh_entry(file, &header, &headers)?;
    if !taken.iter().any(|&(start, end)| (start..end).contains(&rip)) {
        return Err(BootError::Damaged(format!("its PVH entry {rip:#x} lies outside its segments")));
    }
    Ok(Kernel { segments, end, start: Start::Linux(LinuxStart::Pvh(rip)) })
}

fn header(file: &KernelFile<'_>, head: &[u8]) -> Result<FileHeader<AnyEndian>, BootError> {
    file.check("its ELF header", 0, EHDR_BYTES as u64)?;
    let ident = parse_ident::<AnyEndian>(&head[..IDENT_BYTES]).map_err(|e| BootError::Damaged(e.to_string()))?;
    if ident.1 != Class::ELF64 || ident.0 != AnyEndian::Little {
        return Err(BootError::Unsupported("it is not a 64-bit little-endian ELF file".to_owned()));
    }
    let header = FileHeader::parse_tail(ident, &head[IDENT_BYTES..EHDR_BYTES]);
    let header = header.map_err(|e| BootError::Damaged(e.to_string()))?;
    if header.e_machine != EM_X86_64 {
        return Err(BootError::Unsupported(format!("it is for ELF machine {}, not x86-64", header.e_machine)));
    }
    if header.e_type != ET_EXEC && header.e_type != ET_DYN {
        return Err(BootError::Unsupported(format!("it is an ELF file of type {}, no program", header.e_type)));
    }
    if header.e_phentsize != PHDR_BYTES || header.e_phnum == 0 || header.e_phnum > MAX_PHDRS {
        let (count, size) = (header.e_phnum, header.e_phentsize);
        return Err(BootError::Damaged(format!("it has {count} program headers of {size} bytes")));
    }
    Ok(header)
}

/// The address in the note that Linux has with `CONFIG_PVH`.
fn pvh_entry(
    file: &KernelFile<'_>,
    header: &FileHeader<AnyEndian>,
    headers: &[ProgramHeader],
) -> Result<u64, BootError> {
    for p in headers.iter().filter(|p| p.p_type == PT_NOTE) {
        if p.p_filesz > MAX_NOTES {
            return Err(BootError::Damaged(format!("it has {} bytes of notes", p.p_filesz)));
        }
        let data = file.read("its notes", p.p_offset, p.p_filesz)?;
        // Alignments of 0 and 1 mean 4, and nothing but 4 and 8 exists.
        let align = if p.p_align == 8 { 8 } else { 4 };
        for note in NoteIterator::new(header.endianness, header.class, align, &data) {
            let Note::Unknown(note) = note else { continue };
            if note.n_type != PHYS32_ENTRY || note.name_str().ok() != Some("Xen") {
                continue;
            }
            return match *note.desc {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => Ok(u32::from_le_bytes([a, b, c, d]).into()),
                _ => Err(BootError::Damaged("its PVH entry is no 32-bit address".to_owned())),
            };
        }
    }
    Err(BootError::Unsupported("it is an ELF file without a PVH entry; build it with CONFIG_PVH=y".to_owned()))
}

//! Plans of well-formed, damaged and random files.

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::*;

const MIB: u64 = 1 << 20;

fn ram(mib: u64) -> RamLayout {
    RamLayout::new(mib * MIB).unwrap()
}

fn request(kernel: &Vec<u8>, mib: u64) -> BootRequest<'_> {
    BootRequest { kernel, initrd: None, cmdline: "quiet", ram: ram(mib), cpus: 1, virtio_devices: 1 }
}

fn plan(kernel: &Vec<u8>, mib: u64) -> Result<(), String> {
    BootPlan::new(&request(kernel, mib)).map(drop).map_err(|e| e.to_string())
}

fn flat_file(entry: u32, memory: u32, bytes: usize) -> Vec<u8> {
    let mut file = flat::MAGIC.to_vec();
    file.extend(entry.to_le_bytes());
    file.extend(memory.to_le_bytes());
    file.resize(bytes, 0x90);
    file
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A vmlinux with one segment of 0x2000 bytes (0x5000 in memory) at 16 MiB and a PVH note.
fn elf_file() -> Vec<u8> {
    let mut file = vec![0; 0x3100];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &2u16.to_le_bytes());
    put(&mut file, 18, &62u16.to_le_bytes());
    put(&mut file, 20, &1u32.to_le_bytes());
    put(&mut file, 32, &64u64.to_le_bytes());
    put(&mut file, 54, &56u16.to_le_bytes());
    put(&mut file, 56, &2u16.to_le_bytes());
    let mut phdr = |n: usize, kind: u32, fields: [u64; 6]| {
        put(&mut file, 64 + 56 * n, &kind.to_le_bytes());
        for (i, field) in fields.into_iter().enumerate() {
            put(&mut file, 64 + 56 * n + 8 + 8 * i, &field.to_le_bytes());
        }
    };
    phdr(0, 1, [0x1000, 0, 16 * MIB, 0x2000, 0x5000, 0x1000]);
    phdr(1, 4, [0x3000, 0, 0, 24, 24, 4]);
    put(&mut file, 0x1000, b"kernel text");
    put(&mut file, 0x3000, &[4, 0, 0, 0, 8, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut file, 0x300c, b"Xen\0");
    put(&mut file, 0x3010, &(16 * MIB + 0x123).to_le_bytes());
    file
}

/// A bzImage of protocol 2.15 with 0x3000 bytes of kernel that needs 1 MiB at 16 MiB.
fn bz_file() -> Vec<u8> {
    let mut file = vec![0; 0x400 + 0x3000];
    file[0x1f1] = 1;
    put(&mut file, 0x1f4, &0x300u32.to_le_bytes());
    put(&mut file, 0x1fe, &[0x55, 0xaa]);
    file[0x201] = 0x6a;
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x20fu16.to_le_bytes());
    file[0x211] = 1;
    put(&mut file, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut file, 0x236, &1u16.to_le_bytes());
    put(&mut file, 0x238, &2047u32.to_le_bytes());
    put(&mut file, 0x258, &(16 * MIB).to_le_bytes());
    put(&mut file, 0x260, &(MIB as u32).to_le_bytes());
    put(&mut file, 0x400, b"packed kernel");
    file
}

fn memory(mib: u64) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (mib * MIB) as usize)]).unwrap()
}

fn text(memory: &GuestMemoryMmap, gpa: u64, len: usize) -> String {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    String::from_utf8(bytes.split(|b| *b == 0).next().unwrap().to_vec()).unwrap()
}

/// Numbers of the pages that are not zero.
fn touched(memory: &GuestMemoryMmap, mib: u64) -> Vec<u64> {
    let mut page = vec![0; PAGE_SIZE as usize];
    (0..mib * MIB / PAGE_SIZE)
        .filter(|n| {
            memory.read_slice(&mut page, GuestAddress(n * PAGE_SIZE)).unwrap();
            page.iter().any(|b| *b != 0)
        })
        .collect()
}

#[test]
fn a_flat_payload_is_planned_and_loaded() {
    let file = flat_file(16, 0x10_0000, 0x1801);
    let plan = BootPlan::new(&request(&file, 2)).unwrap();
    assert_eq!(plan.entry(), Entry::Flat { rip: MIB + 16, ram_bytes: 2 * MIB });
    // Two pages of payload, the command line, and the tables: 2 + 4 directories.
    assert_eq!(plan.pages(), 2 + 1 + 6);
    let memory = memory(2);
    plan.load(&memory).unwrap();
    assert_eq!(text(&memory, layout::CMDLINE, 64), "quiet");
    assert_eq!(touched(&memory, 2).len() as u64, plan.pages());
}

#[test]
fn a_vmlinux_is_planned_and_loaded() {
    let file = elf_file();
    let initrd = vec![7u8; 5000];
    let plan = BootPlan::new(&BootRequest { initrd: Some(&initrd), ..request(&file, 32) }).unwrap();
    assert_eq!(plan.entry(), Entry::Pvh { rip: 16 * MIB + 0x123, start_info: layout::BOOT_PARAMS });
    // Kernel 2 (its .bss not), ramdisk 2, command line, ACPI, start info.
    assert_eq!(plan.pages(), 2 + 2 + 1 + 1 + 1);
    let memory = memory(32);
    plan.load(&memory).unwrap();
    assert_eq!(text(&memory, 16 * MIB, 32), "kernel text");
    assert_eq!(text(&memory, layout::CMDLINE, 128), "console=ttyS0 reboot=a virtio_mmio.device=4K@0xd0000000:5 quiet");
    let module: u64 = memory.read_obj(GuestAddress(layout::BOOT_PARAMS + 0x40)).unwrap();
    assert_eq!(module, 32 * MIB - 2 * PAGE_SIZE);
    assert!(touched(&memory, 32).iter().all(|n| n * PAGE_SIZE < 16 * MIB + 0x2000 || n * PAGE_SIZE >= module));
}

#[test]
fn a_bzimage_is_planned_and_loaded() {
    let file = bz_file();
    let initrd = vec![7u8; 5000];
    let plan = BootPlan::new(&BootRequest { initrd: Some(&initrd), ..request(&file, 32) }).unwrap();
    assert_eq!(plan.entry(), Entry::Linux64 { rip: 16 * MIB + 0x200, boot_params: layout::BOOT_PARAMS });
    // Kernel 3, ramdisk 2, command line, ACPI, zero page, GDT, 3 page tables.
    assert_eq!(plan.pages(), 3 + 2 + 1 + 1 + 1 + 1 + 3);
    let memory = memory(32);
    plan.load(&memory).unwrap();
    assert_eq!(text(&memory, 16 * MIB, 32), "packed kernel");
    let word = |at: u64| memory.read_obj::<u32>(GuestAddress(layout::BOOT_PARAMS + at)).unwrap();
    assert_eq!((word(0x218), word(0x21c)), ((32 * MIB - 2 * PAGE_SIZE) as u32, 5000));
    assert_eq!(u64::from(word(0x228)), layout::CMDLINE);
    assert_eq!(word(0x1e8) & 0xff, 4, "entries of the memory map");
}

#[test]
fn what_is_no_kernel_is_named() {
    for (bytes, says) in [
        (b"".to_vec(), "the kernel file is empty"),
        (b"\x1f\x8b\x08".to_vec(), "compressed with gzip"),
        (b"MZ".to_vec(), "an EFI program"),
        (b"070701".to_vec(), "a cpio archive"),
        (b"\x00\x01".to_vec(), "it starts with 00 01"),
    ] {
        let error = plan(&bytes, 64).unwrap_err();
        assert!(error.contains(says) && error.contains("give a bzImage"), "{error}");
    }
}

#[test]
fn damaged_files_are_one_sentence() {
    /// Bytes to put at an offset.
    type Edit<'a> = (usize, &'a [u8]);
    let cases: [(Vec<u8>, &[Edit<'_>], &str); 14] = [
        (flat_file(15, 100, 100), &[], "its entry at offset 15"),
        (flat_file(100, 100, 100), &[], "its entry at offset 100"),
        (flat_file(16, 99, 100), &[], "asks for 99 bytes"),
        (flat_file(16, 99, 12)[..12].to_vec(), &[], "ends early: its header needs 16 bytes"),
        (elf_file(), &[(18, &[183, 0])], "ELF machine 183"),
        (elf_file(), &[(4, &[1])], "not a 64-bit"),
        (elf_file(), &[(56, &[0, 0])], "0 program headers"),
        (elf_file(), &[(32, &[0xff; 8])], "ends early: its program headers"),
        (elf_file(), &[(64 + 32, &[0xff; 8])], "in the file for"),
        (elf_file(), &[(64 + 8, &[0xff; 8])], "ends early: a segment"),
        (elf_file(), &[(0x3008, &[17])], "CONFIG_PVH"),
        (elf_file(), &[(0x3010, &[0; 8])], "lies outside"),
        (bz_file(), &[(0x1f4, &[0, 0x10, 0, 0])], "ends early: its kernel"),
        (bz_file(), &[(0x236, &[0])], "no 64-bit entry"),
    ];
    for (mut file, edits, says) in cases {
        for (at, bytes) in edits {
            put(&mut file, *at, bytes);
        }
        let error = plan(&file, 64).unwrap_err();
        assert!(error.contains(says), "wanted {says:?}, got: {error}");
    }
}

#[test]
fn what_does_not_fit_says_how_much_would() {
    let error = plan(&elf_file(), 16).unwrap_err();
    assert!(error.contains("at least 17 MiB") && error.contains("has 16 MiB"), "{error}");
    let error = plan(&flat_file(16, 8 << 20, 100), 4).unwrap_err();
    assert!(error.contains("at least 9 MiB"), "{error}");
    let (kernel, initrd) = (bz_file(), vec![1u8; 4 << 20]);
    let error = BootPlan::new(&BootRequest { initrd: Some(&initrd), ..request(&kernel, 20) }).unwrap_err().to_string();
    assert!(error.contains("with its initial ramdisk") && error.contains("at least 22 MiB"), "{error}");
    BootPlan::new(&BootRequest { initrd: Some(&initrd), ..request(&kernel, 22) }).unwrap();
    let error = BootPlan::new(&BootRequest { initrd: Some(&Vec::new()), ..request(&kernel, 22) }).unwrap_err();
    assert!(error.to_string().contains("is empty"));
}

#[test]
fn command_lines_are_checked() {
    let kernel = bz_file();
    let long = "x".repeat(2048);
    let error = BootPlan::new(&BootRequest { cmdline: &long, ..request(&kernel, 64) }).unwrap_err().to_string();
    assert!(error.contains("takes 2047"), "{error}");
    let error = BootPlan::new(&BootRequest { cmdline: "a\0b", ..request(&kernel, 64) }).unwrap_err().to_string();
    assert!(error.contains("NUL"), "{error}");
}

#[test]
fn a_file_that_shrinks_after_planning_is_an_error() {
    let file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut &file, &flat_file(16, 0x2000, 0x2000)).unwrap();
    let request = BootRequest { kernel: &file, initrd: None, cmdline: "", ram: ram(2), cpus: 1, virtio_devices: 0 };
    let plan = BootPlan::new(&request).unwrap();
    file.set_len(100).unwrap();
    assert!(matches!(plan.load(&memory(2)), Err(BootError::Read("kernel file", _))));
}

proptest! {
    /// Whatever the bytes, the answer is a plan within RAM or a sentence.
    #[test]
    fn mutated_files_never_panic(
        which in 0usize..3,
        edits in prop::collection::vec((0usize..0x300, any::<u8>()), 0..12),
        cut in prop::option::of(0usize..0x3200),
    ) {
        let mut file = [elf_file(), bz_file(), flat_file(16, 0x3000, 0x3000)][which].clone();
        for (at, byte) in edits {
            // Into the notes now and then.
            let at = if at % 7 == 0 { 0x3000 + at % 0x20 } else { at };
            if at < file.len() {
                file[at] = byte;
            }
        }
        file.truncate(cut.unwrap_or(file.len()));
        let request = request(&file, 64);
        match BootPlan::new(&request) {
            Ok(plan) => {
                prop_assert!(plan.segments.iter().all(|s| request.ram.contains(s.gpa, s.bytes)));
                plan.load(&memory(64)).unwrap();
            }
            Err(e) => prop_assert!(!e.to_string().contains('\n')),
        }
    }

    #[test]
    fn random_files_never_panic(tail in prop::collection::vec(any::<u8>(), 0..2048), magic in 0usize..4) {
        let mut file = [b"".as_slice(), b"\x7fELF\x02\x01\x01", flat::MAGIC, b"MZ"][magic].to_vec();
        file.extend(tail);
        let _ = plan(&file, 64);
    }
}

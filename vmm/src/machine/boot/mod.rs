//! The loader: from files to a plan, from the plan to memory.
//!
//! A [`BootPlan`] is made from the files' headers alone. It lists every range that loading will write, so that the
//! number of pages is known **before** the first is charged, and a limit that is too small can be refused with the
//! smallest one that would do. [`BootPlan::load`] then writes exactly those ranges through the guest memory's own
//! accessor, from a bounce buffer: a `read` straight into guest memory would make the kernel touch pages that nobody
//! has charged. What a file leaves at zero (`.bss`) is not written at all; fresh RAM is zero.
//!
//! | file | recognised by | entered |
//! | --- | --- | --- |
//! | flat payload | `BALLAST1` | 64-bit, CPL 3, on every vCPU ([`flat`]) |
//! | bzImage | `HdrS` at 0x202 | 64-bit Linux boot protocol ([`bzimage`]) |
//! | ELF with a PVH note | `\x7fELF` | 32-bit PVH ([`elf`]) |

pub mod bzimage;
pub mod elf;
pub mod flat;
mod tables;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use memcg_core::frame::BLOCK;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

use super::acpi::{self, AcpiRequest};
use super::layout::{self, PAGE_SIZE, RamLayout};

pub use tables::GDT_BYTES;

/// Bytes copied at a time. Not more than a worker keeps charged ahead of need, so that it need not wait.
const BOUNCE: usize = 256 << 10;

/// A kernel, payload or ramdisk: a file, or bytes in tests.
pub trait Image: Sync {
    /// Its length in bytes.
    ///
    /// # Errors
    /// When the host does not say.
    fn size(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// When the image ends before or cannot be read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Image for File {
    fn size(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }
}

impl Image for Vec<u8> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len() as u64)
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let range = start..start.checked_add(buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(self.get(range).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// Why a guest cannot be loaded. Each is one sentence for the user.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("the {0} cannot be read")]
    Read(&'static str, #[source] io::Error),
    /// A file is shorter than its own headers say.
    #[error("the {what} ends early: {part} needs {needs} bytes and the file has {has}; is it complete?")]
    Truncated {
        /// Which file.
        what: &'static str,
        /// Which part of it.
        part: &'static str,
        /// Bytes the file would have to have.
        needs: u64,
        /// Bytes it has.
        has: u64,
    },
    /// It is none of the three kinds of kernel.
    #[error("the kernel file is {0}; give a bzImage, an ELF vmlinux with a PVH entry, or a flat payload")]
    Kind(String),
    /// Its headers contradict themselves.
    #[error("the kernel file is damaged: {0}")]
    Damaged(String),
    /// It is a kernel that cannot be entered this way.
    #[error("this kernel cannot be booted: {0}")]
    Unsupported(String),
    /// Guest RAM is too small for it.
    #[error("the {what} does not fit: it needs guest RAM of at least {needs} MiB and the guest has {has} MiB")]
    TooLarge {
        /// What does not fit.
        what: &'static str,
        /// MiB of RAM that it takes, rounded up.
        needs: u64,
        /// MiB of RAM that there are, rounded down.
        has: u64,
    },
    /// The command line cannot be passed.
    #[error("the kernel command line {0}")]
    Cmdline(String),
    /// A ramdisk that makes no sense.
    #[error("the initial ramdisk {0}")]
    Initrd(&'static str),
    /// Writing to guest memory failed: normally because its pages could not be charged.
    #[error("guest memory at {gpa:#x} cannot be written")]
    Memory {
        /// Guest-physical address of the range.
        gpa: u64,
        /// What the accessor said.
        #[source]
        source: GuestMemoryError,
    },
}

/// What to boot, and on what.
#[derive(Clone, Copy)]
pub struct BootRequest<'a> {
    /// Kernel or payload.
    pub kernel: &'a dyn Image,
    /// Initial ramdisk.
    pub initrd: Option<&'a dyn Image>,
    /// Command line as the user gave it; for Linux the console and devices are put in front of it.
    pub cmdline: &'a str,
    /// Guest RAM.
    pub ram: RamLayout,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Number of virtio-mmio devices at [`layout::virtio_window`].
    pub virtio_devices: u32,
}

/// How a vCPU enters the guest, see [`super::vcpu::Vcpu::setup`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// PVH: 32-bit protected mode without paging, `EBX` = `start_info`.
    Pvh {
        /// First instruction.
        rip: u64,
        /// Guest-physical address of `hvm_start_info`.
        start_info: u64,
    },
    /// Linux's 64-bit protocol: long mode over an identity map, `RSI` = `boot_params`.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Guest-physical address of the zero page.
        boot_params: u64,
    },
    /// A flat payload on every vCPU.
    Flat {
        /// First instruction.
        rip: u64,
        /// Bytes of RAM, which it is told.
        ram_bytes: u64,
    },
}

/// One range that loading writes.
struct Segment<'a> {
    gpa: u64,
    bytes: u64,
    source: Source<'a>,
}

enum Source<'a> {
    File { image: &'a dyn Image, name: &'static str, offset: u64 },
    Bytes(Vec<u8>),
}

/// What a kernel file asks for: its segments, the memory that it occupies with its `.bss`, and where it starts.
struct Kernel<'a> {
    segments: Vec<Segment<'a>>,
    /// First address behind everything that the kernel occupies.
    end: u64,
    start: Start,
}

/// What a kernel file says about its entry.
enum Start {
    Flat(u64),
    Linux(LinuxStart),
}

enum LinuxStart {
    Pvh(u64),
    Bzimage { rip: u64, header: bzimage::SetupHeader },
}

/// Everything that loading will write, checked against guest RAM.
pub struct BootPlan<'a> {
    segments: Vec<Segment<'a>>,
    entry: Entry,
}

impl std::fmt::Debug for BootPlan<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BootPlan").field("entry", &self.entry).field("pages", &self.pages()).finish_non_exhaustive()
    }
}

impl<'a> BootPlan<'a> {
    /// Reads the headers of the files and decides where everything goes. Writes nothing.
    ///
    /// # Errors
    /// When a file is damaged, of another kind, or does not fit.
    pub fn new(request: &BootRequest<'a>) -> Result<Self, BootError> {
        let size = request.kernel.size().map_err(|e| BootError::Read("kernel file", e))?;
        let kernel = KernelFile { image: request.kernel, size };
        let head = kernel.head()?;
        let kernel = if flat::matches(&head) {
            flat::parse(&kernel, &head, &request.ram)?
        } else if bzimage::matches(&head) {
            bzimage::parse(&kernel, &head, &request.ram)?
        } else if elf::matches(&head) {
            elf::parse(&kernel, &head, &request.ram)?
        } else {
            return Err(BootError::Kind(describe(&head)));
        };
        kernel.plan(request)
    }

    /// How vCPUs enter the guest.
    pub fn entry(&self) -> Entry {
        self.entry
    }

    /// Number of distinct pages that [`Self::load`] writes, no more and no fewer.
    pub fn pages(&self) -> u64 {
        self.pieces(PAGE_SIZE)
    }

    /// Number of different blocks of [`BLOCK`] pages in which these are.
    pub fn blocks(&self) -> u64 {
        self.pieces(PAGE_SIZE * BLOCK as u64)
    }

    /// Number of different pieces of memory of `size` bytes that [`Self::load`] writes to.
    fn pieces(&self, size: u64) -> u64 {
        let mut runs: Vec<_> = self
            .segments
            .iter()
            .filter(|s| s.bytes > 0)
            .map(|s| (s.gpa / size, (s.gpa + s.bytes).div_ceil(size)))
            .collect();
        runs.sort_unstable();
        let (mut pieces, mut counted) = (0, 0);
        for (first, end) in runs {
            pieces += end.saturating_sub(first.max(counted));
            counted = counted.max(end);
        }
        pieces
    }

    /// Writes everything to guest memory.
    ///
    /// # Errors
    /// When a file has changed and is shorter now, or guest memory cannot be written.
    pub fn load<M: GuestMemory + ?Sized>(&self, memory: &M) -> Result<(), BootError> {
        let mut bounce = vec![0; BOUNCE];
        let write = |gpa, bytes: &[u8]| {
            memory.write_slice(bytes, GuestAddress(gpa)).map_err(|source| BootError::Memory { gpa, source })
        };
        for segment in &self.segments {
            match &segment.source {
                Source::Bytes(bytes) => write(segment.gpa, bytes)?,
                Source::File { image, name, offset } => {
                    let mut done = 0;
                    while done < segment.bytes {
                        let chunk = &mut bounce[..(segment.bytes - done).min(BOUNCE as u64) as usize];
                        image.read_at(chunk, offset + done).map_err(|e| BootError::Read(name, e))?;
                        write(segment.gpa + done, chunk)?;
                        done += chunk.len() as u64;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The kernel file while it is looked at.
struct KernelFile<'a> {
    image: &'a dyn Image,
    size: u64,
}

/// Bytes of a kernel file's beginning that hold every header we look at first.
const HEAD: u64 = 0x1000;

impl<'a> KernelFile<'a> {
    fn head(&self) -> Result<Vec<u8>, BootError> {
        self.read("its beginning", 0, self.size.min(HEAD))
    }

    /// Reads a part after checking that the file has it; `bytes` must be bounded by the caller.
    fn read(&self, part: &'static str, offset: u64, bytes: u64) -> Result<Vec<u8>, BootError> {
        self.check(part, offset, bytes)?;
        let mut data = vec![0; bytes as usize];
        self.image.read_at(&mut data, offset).map_err(|e| BootError::Read("kernel file", e))?;
        Ok(data)
    }

    fn check(&self, part: &'static str, offset: u64, bytes: u64) -> Result<(), BootError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.size => Ok(()),
            end => {
                Err(BootError::Truncated { what: "kernel file", part, needs: end.unwrap_or(u64::MAX), has: self.size })
            }
        }
    }

    fn segment(&self, gpa: u64, offset: u64, bytes: u64) -> Segment<'a> {
        Segment { gpa, bytes, source: Source::File { image: self.image, name: "kernel file", offset } }
    }
}

fn mib_up(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// The kernel must lie in the RAM below the hole and above the first MiB.
fn check_place(ram: &RamLayout, gpa: u64, bytes: u64) -> Result<(), BootError> {
    if gpa < layout::HIGH_MEMORY {
        return Err(BootError::Unsupported(format!("it wants to be at {gpa:#x}, below the first MiB")));
    }
    let end = gpa.saturating_add(bytes);
    if end > layout::LOW_RAM_END {
        let limit = layout::LOW_RAM_END >> 30;
        return Err(BootError::Unsupported(format!("it wants to end at {end:#x}, above {limit} GiB")));
    }
    if end > ram.low().end() {
        return Err(BootError::TooLarge { what: "kernel", needs: mib_up(end), has: ram.size() >> 20 });
    }
    Ok(())
}

/// What a file is that is no kernel, as far as its first bytes tell.
fn describe(head: &[u8]) -> String {
    const KINDS: [(&[u8], &str); 10] = [
        (b"\x1f\x8b", "compressed with gzip (unpack it first)"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd (unpack it first)"),
        (b"\xfd7zXZ", "compressed with xz (unpack it first)"),
        (b"BZh", "compressed with bzip2 (unpack it first)"),
        (b"\x02\x21\x4c\x18", "compressed with lz4 (unpack it first)"),
        (b"\x04\x22\x4d\x18", "compressed with lz4 (unpack it first)"),
        (b"070701", "a cpio archive, probably the initial ramdisk"),
        (b"QFI\xfb", "a qcow2 disk image"),
        (b"#!", "a script"),
        (b"MZ", "an EFI program without a Linux boot header"),
    ];
    if head.is_empty() {
        return "empty".to_owned();
    }
    if let Some((_, kind)) = KINDS.iter().find(|(magic, _)| head.starts_with(magic)) {
        return (*kind).to_owned();
    }
    if head.get(0x38..0x3c) == Some(b"ARM\x64") {
        return "a kernel for arm64".to_owned();
    }
    let first: Vec<_> = head.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!("of an unknown kind (it starts with {})", first.join(" "))
}

impl<'a> Kernel<'a> {
    /// Adds what the kernel's protocol wants in memory.
    fn plan(mut self, request: &BootRequest<'a>) -> Result<BootPlan<'a>, BootError> {
        let entry = match std::mem::replace(&mut self.start, Start::Flat(0)) {
            Start::Flat(rip) => self.plan_flat(rip, request)?,
            Start::Linux(start) => self.plan_linux(&start, request)?,
        };
        Ok(BootPlan { segments: self.segments, entry })
    }

    fn put(&mut self, gpa: u64, bytes: Vec<u8>) {
        self.segments.push(Segment { gpa, bytes: bytes.len() as u64, source: Source::Bytes(bytes) });
    }

    fn plan_flat(&mut self, rip: u64, request: &BootRequest<'a>) -> Result<Entry, BootError> {
        if request.initrd.is_some() {
            return Err(BootError::Initrd("is of no use to a flat payload; leave it out"));
        }
        self.put(layout::CMDLINE, tables::cmdline(request.cmdline, layout::CMDLINE_MAX)?);
        self.put(layout::PAGE_TABLES, tables::payload_page_tables(&request.ram)?);
        Ok(Entry::Flat { rip, ram_bytes: request.ram.size() })
    }

    fn plan_linux(&mut self, start: &LinuxStart, request: &BootRequest<'a>) -> Result<Entry, BootError> {
        let ram = &request.ram;
        let (cmdline_max, initrd_max) = match start {
            LinuxStart::Pvh(_) => (layout::CMDLINE_MAX, u64::MAX),
            LinuxStart::Bzimage { header, .. } => (header.cmdline_max(), header.initrd_max()),
        };
        let cmdline = tables::linux_cmdline(request.cmdline, request.virtio_devices);
        self.put(layout::CMDLINE, tables::cmdline(&cmdline, cmdline_max)?);
        let devices = AcpiRequest { cpus: request.cpus, virtio_devices: request.virtio_devices };
        self.put(layout::ACPI, acpi::tables(devices));
        let initrd = request.initrd.map(|image| place_initrd(image, ram, self.end, initrd_max)).transpose()?;
        let ramdisk = initrd.as_ref().map(|s| (s.gpa, s.bytes));
        self.segments.extend(initrd);
        Ok(match start {
            LinuxStart::Pvh(rip) => {
                self.put(layout::BOOT_PARAMS, tables::start_info(ram, ramdisk));
                Entry::Pvh { rip: *rip, start_info: layout::BOOT_PARAMS }
            }
            LinuxStart::Bzimage { rip, header } => {
                self.put(layout::BOOT_PARAMS, header.zero_page(ram, ramdisk));
                self.put(layout::GDT, tables::gdt());
                self.put(layout::PAGE_TABLES, tables::kernel_page_tables(ram));
                Entry::Linux64 { rip: *rip, boot_params: layout::BOOT_PARAMS }
            }
        })
    }
}

/// Puts the ramdisk at the high end of low RAM, out of the way of everything that the kernel unpacks.
fn place_initrd<'a>(
    image: &'a dyn Image,
    ram: &RamLayout,
    kernel_end: u64,
    highest: u64,
) -> Result<Segment<'a>, BootError> {
    let bytes = image.size().map_err(|e| BootError::Read("initial ramdisk", e))?;
    if bytes == 0 {
        return Err(BootError::Initrd("is empty"));
    }
    let top = ram.low().end().min(highest.saturating_add(1));
    let place = top.checked_sub(bytes).map(|gpa| gpa / PAGE_SIZE * PAGE_SIZE).filter(|&gpa| gpa >= kernel_end);
    let Some(gpa) = place else {
        let needs = kernel_end.saturating_add(bytes).saturating_add(PAGE_SIZE);
        if needs > layout::LOW_RAM_END.min(highest) {
            return Err(BootError::Initrd("is too large for any guest of this kernel"));
        }
        let has = ram.size() >> 20;
        return Err(BootError::TooLarge { what: "kernel with its initial ramdisk", needs: mib_up(needs), has });
    };
    Ok(Segment { gpa, bytes, source: Source::File { image, name: "initial ramdisk", offset: 0 } })
}

#[cfg(test)]
mod tests;

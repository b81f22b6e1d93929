//! What a VM costs beside its pages: the overhead that `vmm.current` counts (K).
//!
//! Each part has a share of the worker's private memory and a share of the kernel's. What is there from the start is
//! charged before it exists, so that a VM that cannot be paid for is refused instead of started. What comes with the
//! guest's use of its RAM follows it ([`Cost`]): the worker pays for it with pages that it was granted, and its next report
//! turns those from guest memory into overhead. So memory that is used never grows by it, and stays within its limit.
//!
//! | type | for each | user | kernel |
//! | --- | --- | --- | --- |
//! | worker | VM | what this very program writes as it is loaded; heap, stacks | KVM's VM, the process with its threads, descriptors |
//! | vcpu | vCPU | stack of its thread | KVM's vCPU with the pages that it keeps ready, the thread |
//! | queue | virtqueue | | eventfds and their bindings |
//! | frame_records | page of RAM | the summary of its block | |
//! | | page of swap file | where it is and what it has to be like | |
//! | | block of 2 MiB used | states; links and generations once its pages were told apart | |
//! | page_tables | page of RAM | | with shadow paging: KVM's reverse map |
//! | | block of 2 MiB used | | the host's table and KVM's |
//!
//! The kernel's figures were measured in a cgroup of a worker's own, with shadow paging and with nested paging. `show` has
//! both sides, and a test keeps them together.

use std::fs;
use std::sync::OnceLock;

use memcg_core::frame::{Cost, FrameTable};
use memcg_core::tree::Overhead;
use memcg_core::units::Pages;

use crate::memory::store::spill;
use crate::worker::protocol::Report;

/// A part of what a VM costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// What for.
    pub kind: Overhead,
    /// Private memory of the worker.
    pub user: Pages,
    /// Memory of the kernel.
    pub kernel: Pages,
}

impl Part {
    /// Both shares.
    pub fn pages(&self) -> Pages {
        self.user + self.kernel
    }
}

/// What things cost on a host, in bytes.
#[derive(Clone, Copy, Debug)]
struct Rates {
    /// A worker without vCPUs: private memory, and the kernel's.
    worker: (u64, u64),
    /// A vCPU, likewise.
    vcpu: (u64, u64),
    /// KVM's memory for each page of a slot, mapped or not.
    slot_page: u64,
}

/// Private memory of a worker beside its program: heap, stacks, thread-local memory.
const HEAP_AND_STACKS: u64 = 276 << 10;

/// Private memory of a vCPU's thread.
const VCPU_STACK: u64 = 24 << 10;

impl Rates {
    /// Of a host whose KVM uses nested paging or has to keep shadow tables.
    fn new(nested_paging: bool, program: u64) -> Self {
        let worker = program + HEAP_AND_STACKS;
        if nested_paging {
            Self { worker: (worker, 324 << 10), vcpu: (VCPU_STACK, 248 << 10), slot_page: 0 }
        } else {
            // A vCPU keeps twice as many pages ready. For each page of a slot: 8 bytes of reverse map, 2 of write tracking.
            Self { worker: (worker, 300 << 10), vcpu: (VCPU_STACK, 472 << 10), slot_page: 10 }
        }
    }

    /// This host's.
    fn here() -> &'static Self {
        static HERE: OnceLock<Rates> = OnceLock::new();
        HERE.get_or_init(|| Self::new(nested_paging(), program()))
    }
}

/// Whether KVM maps guest memory by tables of the processor.
fn nested_paging() -> bool {
    let on = |path: &str| fs::read_to_string(path).is_ok_and(|text| matches!(text.trim(), "Y" | "1"));
    on("/sys/module/kvm_intel/parameters/ept") || on("/sys/module/kvm_amd/parameters/npt")
}

/// Bytes of this program, and of its libraries, that are written to as it is loaded: a worker is the same program.
fn program() -> u64 {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let (mut file, mut kib) = (false, 0);
    for line in smaps.lines() {
        if let Some(value) = line.strip_prefix("Anonymous:") {
            kib += if file { value.split_whitespace().next().and_then(|kib| kib.parse().ok()).unwrap_or(0) } else { 0 };
        } else if line.as_bytes().first().is_some_and(u8::is_ascii_hexdigit) && line.contains('-') {
            file = line.contains('/');
        }
    }
    kib << 10
}

/// What a VM with `size` of RAM costs from the start on this host, by type.
///
/// `swap_file_pages` is the size of its swap file, 0 for none.
pub fn of(size: Pages, cpus: u32, queues: u32, swap_file_pages: u32) -> Vec<Part> {
    let mut parts = estimate(size, cpus, queues, Rates::here());
    if swap_file_pages > 0
        && let Some(records) = parts.iter_mut().find(|part| part.kind == Overhead::FrameRecords)
    {
        records.user += Pages::from_bytes_ceil(spill::memory(swap_file_pages));
    }
    parts
}

fn estimate(size: Pages, cpus: u32, queues: u32, rates: &Rates) -> Vec<Part> {
    let part = |kind, user: u64, kernel: u64| {
        let (user, kernel) = (Pages::from_bytes_ceil(user), Pages::from_bytes_ceil(kernel));
        Part { kind, user, kernel }
    };
    let cpus = u64::from(cpus);
    vec![
        part(Overhead::Worker, rates.worker.0, rates.worker.1),
        part(Overhead::Vcpu, rates.vcpu.0 * cpus, rates.vcpu.1 * cpus),
        part(Overhead::Queue, 0, Pages(queues.into()).bytes()),
        part(Overhead::FrameRecords, FrameTable::bytes_at_first(size.0), 0),
        part(Overhead::PageTables, 0, size.0.saturating_mul(rates.slot_page)),
    ]
}

/// What the pages of a VM have cost so far, as its worker says.
pub fn grown(report: &Report) -> Cost {
    Cost { tables: Pages(report.tables), records: Pages(report.records) }
}

/// Tests what a worker with `size` of RAM says that its pages have cost.
///
/// # Errors
/// A sentence about the lie.
pub fn check(report: &Report, size: Pages, accounted: bool) -> Result<(), String> {
    let (says, most) = (grown(report), if accounted { Cost::most(size) } else { Cost::default() });
    if says.tables > most.tables || says.records > most.records {
        return Err(format!(
            "says that it has paid {} for page tables and {} for records, at most {} and {} are possible",
            says.tables, says.records, most.tables, most.records
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(size: u64, cpus: u32, rates: &Rates) -> Pages {
        estimate(Pages::from_mib(size), cpus, 3, rates).iter().map(Part::pages).sum()
    }

    /// Semantics: 11.
    #[test]
    fn overhead_grows_with_vcpus_and_with_ram() {
        let nested = Rates::new(true, 172 << 10);
        // Worker 448 + 324 KiB, vCPU 24 + 248 KiB, queues, summaries of 32 blocks.
        assert_eq!(total(64, 1, &nested), Pages((112 + 81) + (6 + 62) + 3 + 1));
        assert_eq!(total(64, 2, &nested), Pages(total(64, 1, &nested).0 + 68));
        let shadow = Rates::new(false, 172 << 10);
        assert_eq!(total(64, 1, &shadow), Pages(total(64, 1, &nested).0 - 6 + 56 + 40));
        let large = Pages::from_mib(65536);
        let full = total(65536, 1, &shadow) + Cost::most(large).total();
        assert!(full.0 * 90 < large.0, "little more than one per cent of a large guest");
    }

    #[test]
    fn a_program_that_was_loaded_has_written_to_itself() {
        let bytes = program();
        assert!(bytes > 16 << 10 && bytes < 16 << 20, "{bytes}");
    }
}

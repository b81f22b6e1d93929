//! What a VM costs beside its pages: the overhead that `vmm.current` counts (K).
//!
//! It is charged before the thing exists, so that a guest that cannot be paid for is refused instead of started, and
//! it stays until the process is gone. Each part has a share of the worker's private memory and a share of the kernel's.
//!
//! | type | for each | user | kernel |
//! | --- | --- | --- | --- |
//! | worker | VM | code that was written to, heap, stacks | KVM's VM, the process with its threads, descriptors |
//! | vcpu | vCPU | stack of its thread | KVM's vCPU with its caches, the thread |
//! | queue | virtqueue | | eventfds and their bindings |
//! | frame_records | page of RAM: a record and its part of a block's summary | all of it, with accounting | |
//! | page_tables | page of RAM: 1/256 page | | the host's and KVM's, all of RAM mapped by 4 KiB pages |

use memcg_core::frame::FrameTable;
use memcg_core::tree::Overhead;
use memcg_core::units::Pages;

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

/// A worker without vCPUs.
const WORKER: Part = Part { kind: Overhead::Worker, user: Pages(128), kernel: Pages(128) };

/// A vCPU.
const VCPU: (u64, u64) = (4, 20);

/// Entries in a page table.
const TABLE_ENTRIES: u64 = 512;

/// The overhead of a VM with `size` of RAM, by type.
pub fn of(size: Pages, cpus: u32, queues: u32) -> Vec<Part> {
    // The host's tables and KVM's, each with its upper levels.
    let tables = size.0.div_ceil(TABLE_ENTRIES) + size.0.div_ceil(TABLE_ENTRIES * TABLE_ENTRIES) + 2;
    let records = Pages::from_bytes_ceil(FrameTable::bytes_for(size.0));
    let (cpus, none) = (u64::from(cpus), Pages::ZERO);
    vec![
        WORKER,
        Part { kind: Overhead::Vcpu, user: Pages(VCPU.0 * cpus), kernel: Pages(VCPU.1 * cpus) },
        Part { kind: Overhead::Queue, user: none, kernel: Pages(queues.into()) },
        Part { kind: Overhead::FrameRecords, user: records, kernel: none },
        Part { kind: Overhead::PageTables, user: none, kernel: Pages(2 * tables) },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Semantics: 11.
    #[test]
    fn overhead_grows_with_ram_and_vcpus() {
        let total = |size, cpus| of(Pages::from_mib(size), cpus, 3).iter().map(Part::pages).sum::<Pages>();
        // 1 MiB + 96 KiB + queues + 16384 records + tables of 64 MiB, twice.
        assert_eq!(total(64, 1), Pages(256 + 24 + 3 + 45 + 70));
        assert_eq!(total(64, 2), Pages(total(64, 1).0 + 24));
        assert!(total(65536, 1).0 * 100 < Pages::from_mib(65536).0, "less than one per cent of a large guest");
    }
}

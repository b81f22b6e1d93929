//! What a VM costs beside its pages: the overhead that `vmm.current` counts (K).
//!
//! It is charged before the thing exists, so that a guest that cannot be paid for is refused instead of started, and
//! it stays until the process is gone. The figures are estimates on the safe side, per thing and not per touch: user
//! space was measured (a worker has 480 KiB of its own and 20 KiB more for each vCPU), the kernel's part is added from
//! what it is known to allocate.
//!
//! | type | for each | of it |
//! | --- | --- | --- |
//! | worker | VM: 1 MiB | code that was written to, heap, stacks, descriptors; KVM's VM and the process in the kernel |
//! | vcpu | vCPU: 96 KiB | thread and its stack, `kvm_run`, KVM's vCPU with its FPU state |
//! | queue | virtqueue: 4 KiB | eventfds and their bindings |
//! | frame_records | page of RAM: a record and its part of a block's summary | only with accounting |
//! | page_tables | page of RAM: 1/256 page | the host's and KVM's, all of RAM mapped by 4 KiB pages |

use memcg_core::frame::FrameTable;
use memcg_core::tree::Overhead;
use memcg_core::units::Pages;

/// A worker without vCPUs: 1 MiB.
const WORKER: u64 = 256;

/// A vCPU: 96 KiB.
const VCPU: u64 = 24;

/// Entries in a page table.
const TABLE_ENTRIES: u64 = 512;

/// The overhead of a VM with `size` of RAM, by type.
pub fn of(size: Pages, cpus: u32, queues: u32) -> Vec<(Overhead, Pages)> {
    // The host's tables and KVM's, each with its upper levels.
    let tables = size.0.div_ceil(TABLE_ENTRIES) + size.0.div_ceil(TABLE_ENTRIES * TABLE_ENTRIES) + 2;
    vec![
        (Overhead::Worker, Pages(WORKER)),
        (Overhead::Vcpu, Pages(VCPU.saturating_mul(cpus.into()))),
        (Overhead::Queue, Pages(queues.into())),
        (Overhead::FrameRecords, Pages::from_bytes_ceil(FrameTable::bytes_for(size.0))),
        (Overhead::PageTables, Pages(2 * tables)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Semantics: 11.
    #[test]
    fn overhead_grows_with_ram_and_vcpus() {
        let total = |size, cpus| of(Pages::from_mib(size), cpus, 3).into_iter().map(|(_, pages)| pages).sum::<Pages>();
        // 1 MiB + 96 KiB + queues + 16384 records + tables of 64 MiB, twice.
        assert_eq!(total(64, 1), Pages(256 + 24 + 3 + 45 + 70));
        assert_eq!(total(64, 2), Pages(total(64, 1).0 + 24));
        assert!(total(65536, 1).0 * 100 < Pages::from_mib(65536).0, "less than one per cent of a large guest");
    }
}

//! What a worker is told at its start, as JSON in an inherited descriptor (a sealed memfd).

use serde::{Deserialize, Serialize};

/// Descriptor numbers at which a worker finds what it was handed; nothing else is inherited but 0, 1 and 2.
pub mod fd {
    /// The configuration, a memfd with the JSON of [`super::WorkerConfig`].
    pub const CONFIG: i32 = 3;
    /// The listening `SOCK_SEQPACKET` socket for the controller.
    pub const LISTEN: i32 = 4;
    /// `/dev/kvm`, opened read-write.
    pub const KVM: i32 = 5;
    /// `/dev/userfaultfd`; present unless [`super::WorkerConfig::obstacle`] says why not.
    pub const UFFD_DEV: i32 = 6;
    /// The listening `SOCK_STREAM` socket for those who want to be at the guest's console.
    pub const CONSOLE: i32 = 7;
    /// The kernel or payload file.
    pub const KERNEL: i32 = 8;
    /// The initial ramdisk; present only with [`super::WorkerConfig::initrd`].
    pub const INITRD: i32 = 9;
    /// Memory for the last of what the guest prints ([`crate::devices::console::create`]); stays open, so that a later
    /// controller can find it.
    pub const CONSOLE_RING: i32 = 10;
    /// The file for evicted pages that do not shrink ([`crate::memory::store::spill::create`]); present only with
    /// [`super::WorkerConfig::swap_file_pages`].
    pub const SWAP_FILE: i32 = 11;
}

/// One VM as its worker is told to build it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerConfig {
    /// Name of the VM, for thread names and messages.
    pub name: String,
    /// Guest RAM in bytes, a multiple of the page size.
    pub size_bytes: u64,
    /// Number of vCPUs, 1 to 64.
    pub cpus: u32,
    /// Kernel command line, without what the VMM adds.
    pub cmdline: String,
    /// True when [`fd::INITRD`] is there.
    pub initrd: bool,
    /// True when memory is charged from the start: a limit is set or `track=on`. Otherwise no userfaultfd is made
    /// before the first limit.
    pub accounting: bool,
    /// Why memory cannot be charged, not even later: one sentence for the user.
    pub obstacle: Option<String>,
    /// The ports for freestanding payloads are offered.
    pub debug_port: bool,
    /// Seconds of a generation, in which the guest's pages are aged once; 0 for never.
    pub ageing_s: u32,
    /// What has been idle for long is evicted before anybody needs the memory.
    pub proactive: bool,
    /// Pages of [`fd::SWAP_FILE`]; 0 when there is none.
    pub swap_file_pages: u32,
    /// Seconds between two readings of guest statistics; 0 for never.
    pub stats_interval_s: u32,
    /// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM` is offered.
    pub deflate_on_oom: bool,
    /// `VIRTIO_BALLOON_F_PAGE_REPORTING` is offered, and with it `VIRTIO_BALLOON_F_PAGE_POISON`.
    pub free_page_reporting: bool,
    /// What KVM supports of the CPU's features ([`to_words`](crate::machine::cpuid::to_words)).
    pub cpuid: Vec<[u32; 7]>,
    /// The fault thread keeps to the CPU of the vCPU: on this host a wake there is much cheaper.
    pub follow_vcpu: bool,
    /// Die with the process that started this one (`run`). Otherwise it outlives its controller, and standard error is a
    /// file of its own.
    pub die_with_parent: bool,
    /// Drawn at random when the VM was made: by it a later controller knows that this is the worker it looks for.
    pub instance: u64,
}

//! Numbers of the specification (virtio 1.3, section 5.5 and chapter 6), and the bounds this device sets itself.

/// Device type number of the traditional memory balloon (section 5).
pub const DEVICE_ID: u32 = 5;

/// `VIRTIO_BALLOON_F_MUST_TELL_HOST`: the guest does not use a ballooned page before the host has been told.
pub const F_MUST_TELL_HOST: u64 = 1 << 0;
/// `VIRTIO_BALLOON_F_STATS_VQ`: there is a queue for guest memory statistics.
pub const F_STATS_VQ: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`: the guest may deflate the balloon when it runs out of memory.
pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_FREE_PAGE_HINT`: there is a queue for hints of free pages. Not offered.
pub const F_FREE_PAGE_HINT: u64 = 1 << 3;
/// `VIRTIO_BALLOON_F_PAGE_POISON`: the guest tells what it fills free pages with. Offered with reporting.
pub const F_PAGE_POISON: u64 = 1 << 4;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`: there is a queue for reports of free pages.
pub const F_PAGE_REPORTING: u64 = 1 << 5;
/// `VIRTIO_F_VERSION_1`: the device follows virtio 1.0 or later. Always offered and required.
pub const F_VERSION_1: u64 = 1 << 32;

/// Offset of `num_pages` (le32, written by the device: how many pages it wants).
pub const CONFIG_NUM_PAGES: u64 = 0;
/// Offset of `actual` (le32, written by the driver: how many pages it has given).
pub const CONFIG_ACTUAL: u64 = 4;
/// Offset of `free_page_hint_cmd_id` (le32). Hinting is not offered: it reads as 0.
pub const CONFIG_HINT_CMD_ID: u64 = 8;
/// Offset of `poison_val` (le32, written by the driver: what it fills free pages with).
pub const CONFIG_POISON_VAL: u64 = 12;
/// Bytes of configuration space.
pub const CONFIG_LEN: u64 = 16;

/// The balloon counts in units of 4 KiB whatever the guest's page size is (`VIRTIO_BALLOON_PFN_SHIFT`).
pub const PFN_SHIFT: u32 = 12;
/// Bytes of a page.
pub const PAGE_BYTES: u64 = 1 << PFN_SHIFT;
/// Bytes of one page number in an inflate or deflate buffer (le32).
pub const PFN_BYTES: usize = 4;

/// Entries in each queue that the device offers. Linux needs at least 32 for free-page reporting.
pub const QUEUE_SIZE: u16 = 128;

/// Page numbers accepted in one chain. Linux sends up to 256; what is beyond this is counted and dropped.
pub const MAX_CHAIN_PFNS: usize = 4096;
/// A batch takes no further chain once it holds this many page numbers, so it never holds more than
/// `BATCH_PFNS - 1 + MAX_CHAIN_PFNS`.
pub const BATCH_PFNS: usize = 4096;
/// Reported pages accepted in one chain: 256 MiB. Linux on x86-64 sends at most half of it, 32 blocks of 4 MiB; what is
/// beyond this is counted and dropped.
pub const MAX_CHAIN_REPORTED: u64 = 65_536;
/// A batch of reports takes no further chain once it holds this many pages.
pub const BATCH_REPORTED: u64 = 65_536;
/// Chains in one batch. It bounds how long the caller's lock is held for one call.
pub const BATCH_CHAINS: usize = 32;

/// Bytes of one statistic: le16 tag, le64 value, packed.
pub const STAT_BYTES: usize = 10;
/// Statistics accepted in one buffer. Linux 6.12 sends 16; the rest of a longer buffer is counted and dropped.
pub const MAX_STATS: usize = 64;

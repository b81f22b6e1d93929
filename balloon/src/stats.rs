//! What a guest says about its memory.
//!
//! A buffer is any number of entries of ten bytes, a le16 tag and a le64 value. Kernels add tags as they like (Linux
//! 6.12 added six), so unknown ones are skipped, and a value that was not sent is absent rather than 0.

use crate::counters::{GuestFault, GuestFaults};
use crate::spec;

/// The statistics that are known (virtio 1.3, section 5.5.6.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StatTag {
    /// Memory swapped in, bytes since boot.
    SwapIn,
    /// Memory swapped out, bytes since boot.
    SwapOut,
    /// Page faults that needed I/O, since boot.
    MajorFaults,
    /// Page faults that needed no I/O, since boot.
    MinorFaults,
    /// Memory used for nothing, bytes.
    FreeMemory,
    /// All memory the guest's kernel manages, bytes.
    TotalMemory,
    /// An estimate of what new programs could use without swapping, bytes.
    AvailableMemory,
    /// Memory that can be reclaimed from disk caches quickly, bytes.
    DiskCaches,
    /// Huge pages allocated, since boot.
    HugetlbAllocations,
    /// Huge page allocations that failed, since boot.
    HugetlbFailures,
    /// Processes killed for lack of memory, since boot.
    OomKill,
    /// Allocations that had to wait for reclaim, since boot.
    AllocStall,
    /// Memory scanned by background reclaim, bytes since boot.
    AsyncScan,
    /// Memory scanned by direct reclaim, bytes since boot.
    DirectScan,
    /// Memory reclaimed in the background, bytes since boot.
    AsyncReclaim,
    /// Memory reclaimed directly, bytes since boot.
    DirectReclaim,
}

impl StatTag {
    /// Every known tag, in the order of their numbers.
    pub const ALL: [StatTag; 16] = [
        StatTag::SwapIn,
        StatTag::SwapOut,
        StatTag::MajorFaults,
        StatTag::MinorFaults,
        StatTag::FreeMemory,
        StatTag::TotalMemory,
        StatTag::AvailableMemory,
        StatTag::DiskCaches,
        StatTag::HugetlbAllocations,
        StatTag::HugetlbFailures,
        StatTag::OomKill,
        StatTag::AllocStall,
        StatTag::AsyncScan,
        StatTag::DirectScan,
        StatTag::AsyncReclaim,
        StatTag::DirectReclaim,
    ];

    /// The key in listings and in the API.
    pub fn name(self) -> &'static str {
        match self {
            StatTag::SwapIn => "swap_in",
            StatTag::SwapOut => "swap_out",
            StatTag::MajorFaults => "major_faults",
            StatTag::MinorFaults => "minor_faults",
            StatTag::FreeMemory => "free_memory",
            StatTag::TotalMemory => "total_memory",
            StatTag::AvailableMemory => "available_memory",
            StatTag::DiskCaches => "disk_caches",
            StatTag::HugetlbAllocations => "hugetlb_allocations",
            StatTag::HugetlbFailures => "hugetlb_failures",
            StatTag::OomKill => "oom_kill",
            StatTag::AllocStall => "alloc_stall",
            StatTag::AsyncScan => "async_scan",
            StatTag::DirectScan => "direct_scan",
            StatTag::AsyncReclaim => "async_reclaim",
            StatTag::DirectReclaim => "direct_reclaim",
        }
    }
}

/// One set of statistics: by tag, what the guest sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStats([Option<u64>; StatTag::ALL.len()]);

impl GuestStats {
    /// The value of one statistic, if the guest sent it.
    pub fn get(&self, tag: StatTag) -> Option<u64> {
        self.0[tag as usize]
    }

    /// All values by tag number.
    pub fn values(&self) -> [Option<u64>; StatTag::ALL.len()] {
        self.0
    }

    /// What the guest sent, in the order of the tags.
    pub fn iter(&self) -> impl Iterator<Item = (StatTag, u64)> + '_ {
        StatTag::ALL.into_iter().filter_map(|tag| Some((tag, self.get(tag)?)))
    }

    /// Reads a buffer. Returns the set and how many entries had an unknown tag; of a tag that comes twice the last
    /// value counts.
    pub(crate) fn parse(buffer: &[u8], faults: &mut GuestFaults) -> (GuestStats, u64) {
        let (entries, rest) = buffer.as_chunks::<{ spec::STAT_BYTES }>();
        if !rest.is_empty() {
            faults.count(GuestFault::Ragged);
        }
        let mut stats = GuestStats::default();
        let mut unknown = 0;
        for [t0, t1, value @ ..] in entries {
            match stats.0.get_mut(usize::from(u16::from_le_bytes([*t0, *t1]))) {
                Some(slot) => *slot = Some(u64::from_le_bytes(*value)),
                None => unknown += 1,
            }
        }
        (stats, unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()[..]].concat()
    }

    #[test]
    fn tags_have_the_numbers_of_the_specification_and_the_names_of_the_api() {
        for (i, tag) in StatTag::ALL.into_iter().enumerate() {
            assert_eq!(tag as usize, i);
        }
        let names: Vec<_> = StatTag::ALL.iter().map(|t| t.name()).collect();
        assert_eq!(
            names.join(" "),
            "swap_in swap_out major_faults minor_faults free_memory total_memory available_memory disk_caches \
             hugetlb_allocations hugetlb_failures oom_kill alloc_stall async_scan direct_scan async_reclaim \
             direct_reclaim"
        );
    }

    #[test]
    fn known_tags_are_kept_and_unknown_ones_are_skipped() {
        let buffer = [entry(4, 4096), entry(16, 1), entry(0xffff, 2), entry(15, u64::MAX), entry(4, 8192)].concat();
        let mut faults = GuestFaults::default();
        let (stats, unknown) = GuestStats::parse(&buffer, &mut faults);
        assert_eq!(unknown, 2);
        assert_eq!(faults.total(), 0);
        let sent: Vec<_> = stats.iter().collect();
        assert_eq!(sent, [(StatTag::FreeMemory, 8192), (StatTag::DirectReclaim, u64::MAX)]);
        assert_eq!(stats.get(StatTag::OomKill), None);
    }

    #[test]
    fn a_torn_entry_is_counted() {
        let mut buffer = entry(0, 7);
        buffer.extend([1, 0, 0]);
        let mut faults = GuestFaults::default();
        let (stats, _) = GuestStats::parse(&buffer, &mut faults);
        assert_eq!(stats.iter().collect::<Vec<_>>(), [(StatTag::SwapIn, 7)]);
        assert_eq!(faults.get(GuestFault::Ragged), 1);
    }

    proptest! {
        #[test]
        fn any_buffer_is_read(buffer in prop::collection::vec(any::<u8>(), 0..700)) {
            let mut faults = GuestFaults::default();
            let (stats, unknown) = GuestStats::parse(&buffer, &mut faults);
            let entries = buffer.len() / spec::STAT_BYTES;
            prop_assert!(stats.iter().count() + unknown as usize <= entries);
        }
    }
}

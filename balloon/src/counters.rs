//! What happened, in numbers that only grow, and what the guest did wrong, by kind.

/// Something a guest did that the specification forbids. It is counted and worked around, never more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestFault {
    /// The available index is further ahead than the queue is long.
    AvailIndex,
    /// A descriptor number, a chain's head or a `next`, is outside the table.
    DescriptorIndex,
    /// A chain has more descriptors than its table: it loops.
    Loop,
    /// An indirect descriptor, which was never offered.
    Indirect,
    /// A device-writable descriptor where the device only reads.
    Writable,
    /// A device-readable descriptor where the device only takes pages.
    Readable,
    /// A reported range that is empty or not made of whole pages.
    NotPages,
    /// A buffer, a table, a ring or a reported range that is not in guest RAM.
    NotRam,
    /// A buffer longer than the device accepts; the rest is dropped.
    Oversized,
    /// A buffer whose length is no multiple of its element's; the odd bytes are dropped.
    Ragged,
    /// A write to configuration space outside `actual` and, where it is offered, `poison_val`.
    ConfigWrite,
    /// An `actual` greater than guest RAM; it is read as all of RAM.
    Actual,
}

impl GuestFault {
    /// Every kind, in the order of the counters.
    pub const ALL: [GuestFault; 12] = [
        GuestFault::AvailIndex,
        GuestFault::DescriptorIndex,
        GuestFault::Loop,
        GuestFault::Indirect,
        GuestFault::Writable,
        GuestFault::Readable,
        GuestFault::NotPages,
        GuestFault::NotRam,
        GuestFault::Oversized,
        GuestFault::Ragged,
        GuestFault::ConfigWrite,
        GuestFault::Actual,
    ];

    /// A short name for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            GuestFault::AvailIndex => "avail_index",
            GuestFault::DescriptorIndex => "descriptor_index",
            GuestFault::Loop => "loop",
            GuestFault::Indirect => "indirect",
            GuestFault::Writable => "writable",
            GuestFault::Readable => "readable",
            GuestFault::NotPages => "not_pages",
            GuestFault::NotRam => "not_ram",
            GuestFault::Oversized => "oversized",
            GuestFault::Ragged => "ragged",
            GuestFault::ConfigWrite => "config_write",
            GuestFault::Actual => "actual",
        }
    }
}

/// A counter for each [`GuestFault`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestFaults([u64; GuestFault::ALL.len()]);

impl GuestFaults {
    /// Counts one fault.
    pub fn count(&mut self, fault: GuestFault) {
        self.0[fault as usize] += 1;
    }

    /// Adds the counters of `other`.
    pub fn add(&mut self, other: &GuestFaults) {
        for (sum, n) in self.0.iter_mut().zip(other.0) {
            *sum += n;
        }
    }

    /// How often `fault` was seen.
    pub fn get(&self, fault: GuestFault) -> u64 {
        self.0[fault as usize]
    }

    /// All faults together.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }
}

/// What the device did since it was made. A reset by the guest does not clear it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages (4 KiB) taken by inflation, each counted once per batch.
    pub inflated_pages: u64,
    /// Pages (4 KiB) handed back by deflation, each counted once per batch.
    pub deflated_pages: u64,
    /// Pages (4 KiB) reported as free and handed on, each counted once per batch.
    pub reported_pages: u64,
    /// Pages (4 KiB) reported as free by a guest that fills free pages with something else than zeroes: left alone.
    pub poisoned_pages: u64,
    /// Pages (4 KiB) that the guest says it has taken back below its target, where it may do so when it is out of memory.
    pub oom_deflated_pages: u64,
    /// Calls of `GuestPages` that succeeded: pages come in batches.
    pub batches: u64,
    /// Ranges in those calls: pages / ranges says how well merging does.
    pub ranges: u64,
    /// Page numbers that were in their batch already.
    pub duplicates: u64,
    /// Descriptor chains returned to the guest.
    pub chains: u64,
    /// Times that a queue was left because memory or pages were not to be had at the moment.
    pub blocked: u64,
    /// Sets of statistics received.
    pub stats_received: u64,
    /// Statistics with a tag this device does not know.
    pub stats_unknown_tags: u64,
    /// What the guest did wrong, by kind.
    pub faults: GuestFaults,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_its_own_counter_and_name() {
        let mut faults = GuestFaults::default();
        for (i, fault) in GuestFault::ALL.into_iter().enumerate() {
            assert_eq!(fault as usize, i);
            faults.count(fault);
            assert_eq!(faults.get(fault), 1);
        }
        let names: std::collections::HashSet<_> = GuestFault::ALL.iter().map(|f| f.name()).collect();
        assert_eq!(names.len(), GuestFault::ALL.len());
        let mut sum = faults;
        sum.add(&faults);
        assert_eq!(sum.total(), 2 * faults.total());
    }
}

//! Time in which vCPUs wait for evicted pages to come back: what the kernel's PSI has of refaults.
//!
//! Several that wait at the same time count once. The time begins when the fault thread learns of the fault and ends with
//! the answer; what the host takes to wake either side is in neither, so the guest has waited for somewhat longer.

/// The time so far. All in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stall {
    /// What lies before has been counted.
    counted: u64,
    total: u64,
    /// Since when a fault waits that could not be answered at once.
    since: Option<u64>,
}

impl Stall {
    /// A fault for an evicted page has been answered, or it `waits` on.
    pub fn refault(&mut self, woken: u64, now: u64, waits: bool) {
        let others = self.since.take();
        self.count(others.map_or(woken, |since| since.min(woken)), now);
        self.since = (waits || others.is_some()).then_some(now);
    }

    /// Those that waited have been looked at `now`: some still wait, or none.
    pub fn looked(&mut self, now: u64, waits: bool) {
        if let Some(since) = self.since.take() {
            self.count(since, now);
            self.since = waits.then_some(now);
        }
    }

    /// Microseconds so far.
    pub fn total_us(&self) -> u64 {
        self.total / 1000
    }

    fn count(&mut self, from: u64, to: u64) {
        self.total += to.saturating_sub(from.max(self.counted));
        self.counted = self.counted.max(to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_at_the_same_time_counts_once() {
        let mut stall = Stall::default();
        // Two faults of one wake-up, answered one after the other, and one of the next.
        stall.refault(10_000, 13_000, false);
        stall.refault(10_000, 16_000, false);
        stall.refault(20_000, 21_000, false);
        assert_eq!(stall.total_us(), 7);
    }

    #[test]
    fn a_fault_that_waits_for_the_file_counts_until_nobody_waits() {
        let mut stall = Stall::default();
        stall.looked(5_000, true);
        assert_eq!(stall.total_us(), 0, "nobody has waited");
        stall.refault(10_000, 11_000, true);
        stall.refault(20_000, 22_000, false);
        stall.looked(30_000, true);
        assert_eq!(stall.total_us(), 20);
        stall.looked(40_000, false);
        stall.looked(90_000, false);
        assert_eq!(stall.total_us(), 30);
    }
}

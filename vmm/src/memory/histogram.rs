//! A histogram of short times, for the fault path: recording is one shift and one increment.
//!
//! Buckets are quarters of an octave of microseconds, so a quantile is at most 25 % above the true value.

use crate::worker::protocol::Quantiles;

/// Buckets: 4 for each power of two up to 2^20 µs (a second); longer times fall into the last.
const BUCKETS: usize = 80;

/// Counts of times by length.
#[derive(Clone, Debug)]
pub struct Histogram {
    buckets: [u64; BUCKETS],
    count: u64,
    max_us: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], count: 0, max_us: 0 }
    }
}

impl Histogram {
    /// Counts one time in nanoseconds.
    pub fn record(&mut self, ns: u64) {
        let us = ns / 1000;
        self.buckets[bucket(us)] += 1;
        self.count += 1;
        self.max_us = self.max_us.max(us);
    }

    /// The quantiles of everything recorded so far; zeroes when there is nothing.
    pub fn quantiles(&self) -> Quantiles {
        Quantiles { count: self.count, p50_us: self.quantile(50), p99_us: self.quantile(99), max_us: self.max_us }
    }

    /// Upper end of the bucket below which `percent` of all times are, at most the longest time.
    fn quantile(&self, percent: u64) -> u64 {
        let rank = (self.count * percent).div_ceil(100);
        let mut seen = 0;
        for (i, n) in self.buckets.iter().enumerate() {
            seen += n;
            if seen >= rank && rank > 0 {
                return upper(i).min(self.max_us);
            }
        }
        0
    }
}

/// The bucket of a time in microseconds: its octave and the two bits behind the leading one.
fn bucket(us: u64) -> usize {
    if us < 4 {
        return us as usize;
    }
    let octave = us.ilog2() as usize;
    let quarter = (us >> (octave - 2) & 3) as usize;
    ((octave - 1) * 4 + quarter).min(BUCKETS - 1)
}

/// The longest time of a bucket.
fn upper(bucket: usize) -> u64 {
    if bucket < 4 {
        return bucket as u64;
    }
    let (octave, quarter) = (bucket / 4 + 1, bucket as u64 % 4);
    ((5 + quarter) << (octave - 2)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_is_in_a_bucket_whose_end_is_at_most_a_quarter_above_it() {
        for us in 0..100_000u64 {
            let end = upper(bucket(us));
            assert!(end >= us && end <= us + us / 4, "{us} us in the bucket up to {end}");
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_of_a_known_series() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantiles(), Quantiles::default());
        (1..=1000).for_each(|us| histogram.record(us * 1000));
        let q = histogram.quantiles();
        assert_eq!((q.count, q.max_us), (1000, 1000));
        assert!((500..=625).contains(&q.p50_us) && (990..=1000).contains(&q.p99_us), "{q:?}");
    }
}

//! How long each first touch takes, as the guest sees it.

use core::cell::UnsafeCell;
use core::fmt::Write;

use guest_common::{Arguments, PAGE_SIZE};

use crate::Error;
use crate::io::{self, Line};
use crate::memory::poke;

/// Buckets for a doubling of the time: a value is known to an eighth of it.
const PARTS: usize = 8;
const PART_BITS: u32 = 3;
const BUCKETS: usize = 64 * PARTS;

struct Counts(UnsafeCell<[u32; BUCKETS]>);

// SAFETY: only vCPU 0 runs commands, so there is one user.
unsafe impl Sync for Counts {}

static COUNTS: Counts = Counts(UnsafeCell::new([0; BUCKETS]));

/// `latency`: see the list of commands.
pub fn latency(arguments: Arguments<'_>, answer: &mut Line) -> Result<(), Error> {
    let (start, size) = (arguments.number(0, "START")?, arguments.number(1, "SIZE")?);
    let stride = arguments.number_or("stride", PAGE_SIZE)?;
    if start % PAGE_SIZE != 0 || stride == 0 || stride % PAGE_SIZE != 0 {
        return Err(Error::Other("START and stride must be multiples of 4K"));
    }
    let pages = size.div_ceil(stride);
    // SAFETY: the only user, and a command runs once at a time.
    let counts = unsafe { &mut *COUNTS.0.get() };
    counts.fill(0);
    let mut worst = 0;
    for page in 0..pages {
        let begin = io::cycles();
        poke(start + page * stride, page + 1);
        let spent = io::cycles().wrapping_sub(begin);
        worst = spent.max(worst);
        counts[bucket(spent)] += 1;
    }
    let at = |share: u64| {
        let mut left = pages * share / 1000;
        let found = counts.iter().position(|count| {
            let here = u64::from(*count);
            let found = left < here;
            left -= left.min(here);
            found
        });
        found.map_or(worst, lower_bound)
    };
    let per_us = (io::cycles_per_ms() / 1000).max(1);
    let [p50, p99, max] = [at(500), at(990), worst].map(|cycles| cycles * 1000 / per_us);
    let _ = write!(answer, " pages={pages} p50_ns={p50} p99_ns={p99} max_ns={max}");
    Ok(())
}

/// The bucket of a time: its first bit and the three behind that.
fn bucket(cycles: u64) -> usize {
    let cycles = cycles.max(PARTS as u64);
    let log = cycles.ilog2();
    log as usize * PARTS + (cycles >> (log - PART_BITS)) as usize % PARTS
}

/// The least time of a bucket.
fn lower_bound(bucket: usize) -> u64 {
    let (log, part) = (bucket / PARTS, bucket % PARTS);
    (PARTS + part) as u64 * (1 << log) / PARTS as u64
}

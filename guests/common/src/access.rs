//! Which page is accessed next: known access patterns, each with a hot set and, around it, a cold rest.
//!
//! No clock and no memory, only numbers: the payload walks its RAM by it, and a process on the host can walk the same way
//! to be compared.

/// How the pages of a range are accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// The hot set, one page after the other, again and again.
    Hot,
    /// The hot set, drawn by Zipf's law with exponent 1: page number k of n as often as 1/k.
    Zipf,
    /// The whole range, one page after the other.
    Scan,
    /// The hot set, every page as likely, and the hot set is elsewhere after each [`Access::moves`].
    Phase,
    /// Nothing at all.
    Idle,
}

impl Pattern {
    /// The pattern of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "hot" => Pattern::Hot,
            "zipf" => Pattern::Zipf,
            "scan" => Pattern::Scan,
            "phase" => Pattern::Phase,
            "idle" => Pattern::Idle,
            _ => return None,
        })
    }
}

/// An endless sequence of page indices below `pages`.
#[derive(Clone, Debug)]
pub struct Access {
    pattern: Pattern,
    pages: u64,
    hot: u64,
    /// From one page of the hot set to the next.
    step: u64,
    /// So that pages that are accessed often are no neighbours.
    scramble: u64,
    /// The logarithm of `hot + 1`, as [`log2`] has it.
    log: u64,
    /// Where the hot set begins.
    base: u64,
    next: u64,
    state: u64,
}

impl Access {
    /// A sequence over `pages` pages of which the first `hot` are the hot set, or, if `spread`, as many at equal distances.
    /// Neither may be 0; more hot pages than pages are as many.
    #[must_use]
    pub fn new(pattern: Pattern, pages: u64, hot: u64, spread: bool, seed: u64) -> Self {
        let pages = pages.max(1);
        let hot = hot.clamp(1, pages);
        let step = if spread { pages / hot } else { 1 };
        let (log, state) = (log2(hot + 1), seed.wrapping_mul(2) | 1);
        Self { pattern, pages, hot, step, scramble: scramble(hot), log, base: 0, next: 0, state }
    }

    /// Whether access number `n` writes, if `percent` of 100 do.
    #[must_use]
    pub const fn writes(n: u64, percent: u64) -> bool {
        (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) % 100 < percent
    }

    /// The hot set of [`Pattern::Phase`] moves on by its own length.
    pub fn moves(&mut self) {
        self.base = (self.base + self.hot * self.step) % self.pages;
    }

    /// 64 bits of a xorshift generator whose output is multiplied.
    fn random(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

impl Iterator for Access {
    type Item = u64;

    /// The next page, below `pages`. `None` if the guest idles.
    fn next(&mut self) -> Option<u64> {
        let rank = match self.pattern {
            Pattern::Idle => return None,
            Pattern::Scan => {
                let page = self.next;
                self.next = (page + 1) % self.pages;
                return Some(page);
            }
            Pattern::Hot => {
                let rank = self.next;
                self.next = (rank + 1) % self.hot;
                rank
            }
            Pattern::Zipf => (zipf(self.hot, self.log, self.random()) * self.scramble) % self.hot,
            Pattern::Phase => share(self.random(), self.hot),
        };
        Some((self.base + rank * self.step) % self.pages)
    }
}

/// A number that the ranks below `n` can be multiplied with, modulo `n`, for a permutation that puts near ones far apart.
#[must_use]
pub fn scramble(n: u64) -> u64 {
    // The golden section of it, and then the next number without a common factor.
    let near = share(0x9e37_79b9_7f4a_7c15, n);
    (near.max(1)..).find(|factor| common_factor(*factor, n) == 1).unwrap_or(1)
}

/// The number of 64 bits as a share of 1, of `n`.
fn share(random: u64, n: u64) -> u64 {
    ((u128::from(random) * u128::from(n)) >> 64) as u64
}

const fn common_factor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// A rank below `n`, drawn by Zipf's law: with `u` even in 0..1, n^u - 1 has a logarithm that is evenly spread.
/// `log` is the logarithm of `n + 1`.
fn zipf(n: u64, log: u64, random: u64) -> u64 {
    let exponent = share(random, log);
    (exp2(exponent) - 1).min(n - 1)
}

/// Fractions of 2^x that are looked up, and the bits of their index.
const STEPS: usize = 1024;
const STEP_BITS: u32 = 10;
/// Bits behind the point of a logarithm.
const POINT: u32 = 16;

/// 2^(i / STEPS), 32 bits behind the point.
static POWERS: [u64; STEPS + 1] = powers();

const fn powers() -> [u64; STEPS + 1] {
    // 2^(1 / 1024) with 62 bits behind the point, and its powers.
    const ROOT: u128 = 4_614_808_732_577_250_068;
    let mut table = [1 << 32; STEPS + 1];
    let mut value: u128 = 1 << 62;
    let mut i = 0;
    while i <= STEPS {
        table[i] = (value >> 30) as u64;
        value = (value * ROOT) >> 62;
        i += 1;
    }
    table
}

/// 2^x, rounded down, for x below 48 with [`POINT`] bits behind the point.
fn exp2(x: u64) -> u64 {
    let (whole, part) = (x >> POINT, x & ((1 << POINT) - 1));
    let index = (part >> (POINT - STEP_BITS)) as usize;
    let rest = part & ((1 << (POINT - STEP_BITS)) - 1);
    let (low, high) = (POWERS[index], POWERS[index + 1]);
    let fine = low + (((high - low) * rest) >> (POINT - STEP_BITS));
    // 33 bits and at most 31 more.
    ((u128::from(fine) << whole) >> 32) as u64
}

/// log2(n) with [`POINT`] bits behind the point, for n of at least 1.
fn log2(n: u64) -> u64 {
    let whole = n.ilog2();
    // The fraction by squaring: each square's first bit is one more bit of the logarithm.
    let mut mantissa = u128::from(n) << (63 - whole);
    let mut log = u64::from(whole);
    for _ in 0..POINT {
        mantissa = (mantissa * mantissa) >> 63;
        log <<= 1;
        if mantissa >> 64 != 0 {
            mantissa >>= 1;
            log |= 1;
        }
    }
    log
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(access: &mut Access, draws: u64) -> Vec<u64> {
        let mut counts = vec![0; access.pages as usize];
        (0..draws).for_each(|_| counts[access.next().expect("not idle") as usize] += 1);
        counts
    }

    #[test]
    fn powers_and_logarithms_are_right() {
        for n in [1u64, 2, 3, 10, 1000, 65_535, 1 << 20, (1 << 30) + 12_345] {
            let error = log2(n) as f64 / 65_536.0 - (n as f64).log2();
            assert!((-0.000_02..=0.000_001).contains(&error), "log2({n}) is {error} off");
        }
        for x in [0u64, 1, 65_535, 65_536, 100_000, 1_000_000, 1_900_000] {
            let right = (x as f64 / 65_536.0).exp2();
            assert!((exp2(x) as f64 - right).abs() <= 1.0 + right * 1e-6, "2^{x}: {} is not {right}", exp2(x));
        }
    }

    #[test]
    fn zipf_follows_its_law_and_stays_in_the_hot_set() {
        let mut access = Access::new(Pattern::Zipf, 5000, 1000, false, 7);
        let mut counts = counts(&mut access, 1_000_000);
        assert!(counts[1000..].iter().all(|n| *n == 0), "the rest is cold");
        assert!(counts[..1000].iter().all(|n| *n > 0), "all of the hot set is used");
        counts.sort_unstable_by(|a, b| b.cmp(a));
        // The share of the first ten: ln 11 / ln 1001.
        let ten = counts[..10].iter().sum::<u64>() as f64 / 1e6;
        assert!((ten - 0.347).abs() < 0.01, "{ten}");
    }

    #[test]
    fn every_pattern_covers_what_it_should() {
        let touched = |pattern, spread| {
            let mut access = Access::new(pattern, 64, 16, spread, 3);
            let counts = counts(&mut access, 4096);
            (0..64).filter(|page| counts[*page] > 0).collect::<Vec<_>>()
        };
        assert_eq!(touched(Pattern::Hot, false), (0..16).collect::<Vec<_>>());
        assert_eq!(touched(Pattern::Hot, true), (0..64).step_by(4).collect::<Vec<_>>());
        assert_eq!(touched(Pattern::Phase, false), (0..16).collect::<Vec<_>>());
        assert_eq!(touched(Pattern::Zipf, true), (0..64).step_by(4).collect::<Vec<_>>());
        assert_eq!(touched(Pattern::Scan, false), (0..64).collect::<Vec<_>>());
        assert_eq!(Access::new(Pattern::Idle, 64, 16, false, 3).next(), None);
    }

    #[test]
    fn the_hot_set_of_a_phase_moves_around_the_range() {
        let mut access = Access::new(Pattern::Phase, 40, 16, false, 3);
        let mut first = Vec::new();
        for _ in 0..4 {
            let counts = counts(&mut access, 4096);
            assert_eq!(counts.iter().filter(|n| **n > 0).count(), 16);
            first.push(counts[..16].iter().filter(|n| **n > 0).count());
            access.moves();
        }
        assert_eq!(first, [16, 0, 8, 8]);
    }

    #[test]
    fn one_seed_is_one_sequence() {
        let draw = |seed| {
            let mut access = Access::new(Pattern::Zipf, 100, 100, false, seed);
            (0..50).map(|_| access.next()).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}

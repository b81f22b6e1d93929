//! Seeded nonsense: bytes for the interface, packets and lies of a worker for the actor, a damaged journal.
//!
//! The inputs of a run follow from a seed, so a failure can be had again; it prints the number of the input. `cargo test`
//! does a few thousand of each kind; `BALLAST_FUZZ=N` does N, `BALLAST_FUZZ_SEED` others than the usual ones
//! (`scripts/fuzz`). What was ever found is among the first inputs, as it was found.

mod http;
mod journal;
mod lies;
mod packets;

/// A generator of numbers (splitmix64), the same on every machine.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// True once in `times`.
    fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }

    /// A number near one at which something changes.
    fn number(&mut self, known: &[u64]) -> u64 {
        const EDGES: [u64; 10] =
            [0, 1, 2, 64, 4096, 65536, u32::MAX as u64, i64::MAX as u64, u64::MAX / 4096, u64::MAX];
        let base = if known.is_empty() || self.once_in(3) { *self.pick(&EDGES) } else { *self.pick(known) };
        match self.below(8) {
            0 => base.wrapping_add(1),
            1 => base.wrapping_sub(1),
            2 => base.wrapping_add(self.next() % 256),
            3 => base.wrapping_sub(self.next() % 256),
            4 => self.next() >> self.below(64),
            _ => base,
        }
    }
}

/// How many inputs of a kind: `few`, or as many as were asked for.
fn inputs(few: u64) -> u64 {
    let asked = std::env::var("BALLAST_FUZZ").ok().map(|n| n.parse().expect("BALLAST_FUZZ is a number"));
    asked.unwrap_or(few)
}

/// Where the inputs come from.
fn seed() -> u64 {
    std::env::var("BALLAST_FUZZ_SEED").map_or(1, |n| n.parse().expect("BALLAST_FUZZ_SEED is a number"))
}

/// Says which input it was when the test fails during it.
struct Case<'a> {
    kind: &'static str,
    seed: u64,
    input: &'a dyn std::fmt::Debug,
}

impl Drop for Case<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("FUZZ {} failed seed={} input={:?}", self.kind, self.seed, self.input);
        }
    }
}

/// Changes some bytes: one to six of the usual mutations, with pieces of `words` and of another input.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random, words: &[&str], other: &[u8]) {
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        let length = random.below(16).min(bytes.len() - at);
        match random.below(11) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 if at < bytes.len() => {
                bytes[at] = *random.pick(&[0, b'\r', b'\n', b' ', b':', b'%', b'{', b'"', 0x7f, 0xff])
            }
            3 => bytes.truncate(at),
            4 => drop(bytes.drain(at..at + length)),
            5 => {
                let piece = bytes[at..at + length].repeat(1 + random.below(8));
                bytes.splice(at..at, piece);
            }
            6 | 7 => drop(bytes.splice(at..at + length, random.pick(words).bytes())),
            8 => {
                let number = random.number(&[]).to_string();
                let digits = bytes[at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
                bytes.splice(at..at + digits, number.bytes());
            }
            9 => {
                let from = random.below(other.len() + 1);
                let piece = &other[from..(from + random.below(64)).min(other.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            _ => drop(bytes.splice(at..at, random.pick(words).bytes())),
        }
    }
}

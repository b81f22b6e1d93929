//! Hostile guests. Whatever one does, its VMM lives, its limit holds, nobody else is harmed, and somebody counts it.

mod balloon;
mod pair;
mod rewrite;
mod storm;

use ballast_tests::skipped;

const MIB: u64 = 1 << 20;

//! Hostile guests. Whatever one does, its VMM lives, its limit holds, nobody else is harmed, and somebody counts it.

mod balloon;
mod pair;
mod rewrite;
mod storm;

use ballast_tests::missing_on_host;

const MIB: u64 = 1 << 20;

/// True, with the reason printed, when this host cannot run guests.
fn skipped(test: &str) -> bool {
    missing_on_host().inspect(|reason| println!("SKIP {test} reason={reason}")).is_some()
}

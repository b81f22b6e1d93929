//! How many sequences a property test runs.

use proptest::prelude::ProptestConfig;

/// `default` cases, unless `PROPTEST_CASES` says otherwise. For tests that are too slow, or too quick, for proptest's
/// own default.
pub fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(default);
    ProptestConfig { cases, max_shrink_iters: 20_000, ..ProptestConfig::default() }
}

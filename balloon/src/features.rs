//! Which features are offered, and which queue has which number.
//!
//! Queues are numbered densely over the negotiated features, as the Linux driver does it: with reporting but neither
//! statistics nor hinting, reporting is queue 2. The specification's text can be read as fixed numbers; no driver does.
//! [`queues`] is the only place that knows.

use crate::device::Options;
use crate::spec;

/// The queues a balloon can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueueKind {
    /// Page numbers that the guest gives.
    Inflate,
    /// Page numbers that the guest takes back.
    Deflate,
    /// One buffer of statistics that goes to and fro.
    Stats,
    /// Hints of free pages, asked for by the device. Not offered.
    FreePageHint,
    /// Reports of free pages, unasked.
    Reporting,
}

impl QueueKind {
    /// How many kinds there are: the most queues that a balloon can have.
    pub const COUNT: usize = 5;

    /// Every kind in the order of the queues, with the features of which one must be negotiated (0: always there).
    const TABLE: [(QueueKind, u64); Self::COUNT] = [
        (QueueKind::Inflate, 0),
        (QueueKind::Deflate, 0),
        (QueueKind::Stats, spec::F_STATS_VQ),
        (QueueKind::FreePageHint, spec::F_FREE_PAGE_HINT),
        (QueueKind::Reporting, spec::F_PAGE_REPORTING),
    ];
}

/// The queues that exist with these features negotiated; the n-th one is queue n.
pub fn queues(features: u64) -> impl Iterator<Item = QueueKind> {
    QueueKind::TABLE.into_iter().filter(move |(_, needs)| *needs == 0 || features & needs != 0).map(|(kind, _)| kind)
}

/// How many queues there are with these features negotiated.
pub fn queue_count(features: u64) -> usize {
    queues(features).count()
}

/// What queue number `index` is for, if there is such a queue.
pub fn queue_kind(features: u64, index: usize) -> Option<QueueKind> {
    queues(features).nth(index)
}

/// The number of the queue of this kind, if there is one.
pub fn queue_index(features: u64, kind: QueueKind) -> Option<usize> {
    queues(features).position(|k| k == kind)
}

/// The feature bits that a device with these options offers.
///
/// Indirect descriptors and event indices are not among them: a balloon sends single buffers and waits for each, so
/// they would only be two more structures in guest memory to read.
pub fn offered(options: &Options) -> u64 {
    let mut features = spec::F_VERSION_1 | spec::F_MUST_TELL_HOST;
    if options.stats {
        features |= spec::F_STATS_VQ;
    }
    if options.deflate_on_oom {
        features |= spec::F_DEFLATE_ON_OOM;
    }
    if options.reporting {
        // Without poison, a Linux guest that poisons or clears free pages does not report any (`virtballoon_validate`).
        features |= spec::F_PAGE_REPORTING | spec::F_PAGE_POISON;
    }
    features
}

#[cfg(test)]
mod tests {
    use super::*;
    use QueueKind::*;
    use spec::{F_FREE_PAGE_HINT as HINT, F_PAGE_REPORTING as REPORT, F_STATS_VQ as STATS};

    /// What the Linux driver does (`init_vqs`): absent queues have no name and are skipped when numbers are given.
    #[test]
    fn numbers_are_dense_for_every_subset_of_features() {
        let expected: [(u64, &[QueueKind]); 8] = [
            (0, &[Inflate, Deflate]),
            (STATS, &[Inflate, Deflate, Stats]),
            (HINT, &[Inflate, Deflate, FreePageHint]),
            (REPORT, &[Inflate, Deflate, Reporting]),
            (STATS | HINT, &[Inflate, Deflate, Stats, FreePageHint]),
            (STATS | REPORT, &[Inflate, Deflate, Stats, Reporting]),
            (HINT | REPORT, &[Inflate, Deflate, FreePageHint, Reporting]),
            (STATS | HINT | REPORT, &[Inflate, Deflate, Stats, FreePageHint, Reporting]),
        ];
        let others = [0, spec::F_MUST_TELL_HOST | spec::F_DEFLATE_ON_OOM | spec::F_PAGE_POISON | spec::F_VERSION_1];
        for (features, kinds) in expected {
            for other in others {
                let features = features | other;
                assert_eq!(queues(features).collect::<Vec<_>>(), kinds);
                assert_eq!(queue_count(features), kinds.len());
                for (i, kind) in kinds.iter().enumerate() {
                    assert_eq!(queue_kind(features, i), Some(*kind));
                    assert_eq!(queue_index(features, *kind), Some(i));
                }
                assert_eq!(queue_kind(features, kinds.len()), None);
            }
        }
        assert_eq!(queue_index(0, Stats), None);
    }

    #[test]
    fn offers_follow_the_options() {
        let none = Options::default();
        let plain = offered(&none);
        assert_eq!(plain, spec::F_VERSION_1 | spec::F_MUST_TELL_HOST);
        assert_eq!(offered(&Options { stats: true, ..none }), plain | STATS);
        assert_eq!(offered(&Options { deflate_on_oom: true, ..none }), plain | spec::F_DEFLATE_ON_OOM);
        assert_eq!(offered(&Options { reporting: true, ..none }), plain | REPORT | spec::F_PAGE_POISON);
        assert_eq!(queue_count(offered(&Options { stats: true, deflate_on_oom: true, reporting: true })), 4);
    }
}

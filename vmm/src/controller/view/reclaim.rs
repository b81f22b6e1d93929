//! What is being done about usage that is too high, as the interface shows it.

use memcg_core::ladder::Rung;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What is being done about a VM or a group that uses more than it should.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ReclaimView {
    /// What is done now, beside what was done before.
    pub rung: ReclaimRung,
    /// Since when, in milliseconds; absent at rest.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub since_ms: Option<u64>,
    /// What usage is to come down to; absent at rest.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub goal_bytes: Option<u64>,
    /// Why it does not come down, and what would help; only where nothing more can be had.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stuck: Option<String>,
}

/// A rung of the ladder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReclaimRung {
    /// Nothing: usage is where it should be.
    #[default]
    Rest,
    /// The stock is called back.
    Recall,
    /// The guest is giving back free memory by itself.
    Reports,
    /// The guest is asked by its balloon.
    Balloon,
    /// Cold pages are evicted.
    Evict,
    /// Usage does not come down, whatever is done.
    Stuck,
    /// The same, and the vCPUs are held.
    Hold,
    /// The policy acts.
    Oom,
}

impl From<Rung> for ReclaimRung {
    fn from(rung: Rung) -> Self {
        match rung {
            Rung::Rest => Self::Rest,
            Rung::Recall => Self::Recall,
            Rung::Reports => Self::Reports,
            Rung::Balloon => Self::Balloon,
            Rung::Evict => Self::Evict,
            Rung::Stuck => Self::Stuck,
            Rung::Hold => Self::Hold,
            Rung::Oom => Self::Oom,
        }
    }
}

impl ReclaimRung {
    /// What is being done, in words.
    pub fn doing(self) -> &'static str {
        match self {
            Self::Rest => "nothing to do",
            Self::Recall => "calling the stock back",
            Self::Reports => "the guest gives free memory back",
            Self::Balloon => "asking the balloon",
            Self::Evict => "evicting cold pages",
            Self::Stuck => "stuck: nothing more can be had",
            Self::Hold => "held: nothing more can be had",
            Self::Oom => "out of memory",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rung_has_words_of_its_own() {
        let rungs = Rung::ALL.map(|rung| ReclaimRung::from(rung).doing());
        let distinct: std::collections::BTreeSet<_> = rungs.iter().collect();
        assert_eq!(distinct.len(), rungs.len());
    }
}

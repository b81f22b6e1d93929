//! What is remembered of a VM.

use std::sync::Arc;

use super::{Entry, LimitsInBytes, NodeLimits};
use crate::controller::config::VmConfig;
use crate::controller::view::PausedBy;
use crate::controller::vm::KilledBy;

/// A VM that is remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RememberedVm {
    /// Its name.
    pub name: String,
    /// Path of the group that it is in.
    pub group: String,
    /// What its worker calls itself.
    pub instance: u64,
    /// Whether it is charged from its start.
    pub accounting: bool,
    /// As it was asked for.
    pub config: Arc<VmConfig>,
    /// Its limits and their generation, if they were changed since.
    pub limits: Option<(u64, LimitsInBytes)>,
    /// Who has paused it.
    pub paused: Option<PausedBy>,
    /// Somebody at the interface wants that, too.
    pub kept_paused: bool,
    /// Who has killed it.
    pub killed: Option<KilledBy>,
    /// How it ended, if it has.
    pub ended: Option<String>,
}

impl RememberedVm {
    /// One that was just made.
    pub(super) fn made(name: String, group: String, (instance, accounting): (u64, bool), config: VmConfig) -> Self {
        let (config, limits, paused, kept_paused, killed, ended) = (Arc::new(config), None, None, false, None, None);
        Self { name, group, instance, accounting, config, limits, paused, kept_paused, killed, ended }
    }

    /// The entries that say all of it.
    pub(super) fn entries(self) -> Vec<Entry> {
        let Self { name, group, instance, accounting, config, limits, paused, kept_paused, killed, ended } = self;
        let of = || name.clone();
        let config = Box::new(VmConfig::clone(&config));
        let mut entries = vec![Entry::Made { vm: of(), group, instance, accounting, config }];
        let in_force =
            |(generation, limits)| Entry::Limits { nodes: vec![NodeLimits { node: of(), generation, limits }] };
        entries.extend(limits.map(in_force));
        entries.extend(paused.map(|by| Entry::Paused { vm: of(), by }));
        entries.extend(kept_paused.then(|| Entry::Paused { vm: of(), by: PausedBy::User }));
        entries.extend(killed.map(|by| Entry::Killed { vm: of(), by }));
        entries.extend(ended.map(|how| Entry::Ended { vm: of(), how }));
        entries
    }

    /// It is in another group now: the same words as before are another VM.
    pub(super) fn set_group(&mut self, group: String) {
        Arc::make_mut(&mut self.config).group.clone_from(&group);
        self.group = group;
    }

    /// It is paused, or somebody else wants that, too: what it was paused for first still holds.
    pub(super) fn set_paused(&mut self, by: PausedBy) {
        let others = self.paused.filter(|first| *first != PausedBy::User);
        self.kept_paused = by == PausedBy::User && others.is_some();
        self.paused = others.filter(|_| self.kept_paused).or(Some(by));
    }
}

//! `GET /oom/rank`: who would go first if a group had no room left, with every number that decides it.
//!
//! A dry run: [`memcg_core::oom::rank`] over the VMs as they are now, and nothing is done. The list is whole, those that
//! are spared are at its end with the reason.
//!
//! A pause is worth what can then be evicted: all that the guest holds, as far as swap and store have room, less what it
//! takes in the store. What does not shrink counts only where there is room in a file for it (`cold.rs`).

use std::collections::BTreeMap;

use memcg_core::oom::{self, Action, Attributes, Candidate, Preference, Ranked, Spared};
use memcg_core::tree::NodeId;
use memcg_core::units::Pages;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Controller;
use super::actor::{Actor, answer};
use super::error::Refusal;
use super::view::{OomAction, OomPreference, VmState};
use super::vm::VmId;

/// Who would go first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RankView {
    /// The group that would have no room: only VMs in it are candidates. `/` is the host.
    pub group: String,
    /// What it has been charged.
    pub usage_bytes: u64,
    /// Its limit, `null` for none.
    pub max_bytes: Option<u64>,
    /// All VMs in it, the first to go first.
    pub candidates: Vec<RankedView>,
}

/// One VM of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RankedView {
    /// Its place in the list, from 1.
    pub rank: usize,
    /// Its name.
    pub vm: String,
    /// Path of the group that it is in.
    pub group: String,
    /// Memory charged to it.
    pub usage_bytes: u64,
    /// Of this, overhead.
    pub vmm_bytes: u64,
    /// Of this, charged ahead of need; recalled long before anybody is chosen.
    pub stock_bytes: u64,
    /// What its `memory.min` protects, in effect, while memory is looked for in this group.
    pub min_bytes: u64,
    /// What its `memory.low` protects, in effect.
    pub low_bytes: u64,
    /// Usage above the bigger of the two.
    pub above_bytes: u64,
    /// What would be done with it.
    pub action: OomAction,
    /// What that frees.
    pub frees_bytes: u64,
    /// What that frees of what is above its protection: among equals, the most goes first.
    pub score_bytes: u64,
    /// `none` goes before `avoid`, and `omit` never.
    pub preference: OomPreference,
    /// Among those of one preference, lower goes first.
    pub priority: i32,
    /// Why it would not be chosen, if it would not.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub spared: Option<SparedBy>,
    /// All of this in one sentence.
    pub why: String,
}

/// Why a VM is not chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SparedBy {
    /// Its preference is `omit`.
    Omit,
    /// It has ended, and its memory is on its way back.
    Ending,
    /// What would be done with it frees nothing.
    FreesNothing,
    /// What it uses is within its effective `memory.min`.
    WithinMin,
}

impl From<OomPreference> for Preference {
    fn from(preference: OomPreference) -> Self {
        match preference {
            OomPreference::None => Self::None,
            OomPreference::Avoid => Self::Avoid,
            OomPreference::Omit => Self::Omit,
        }
    }
}

impl From<Spared> for SparedBy {
    fn from(spared: Spared) -> Self {
        match spared {
            Spared::Omit => Self::Omit,
            Spared::Ending => Self::Ending,
            Spared::FreesNothing => Self::FreesNothing,
            Spared::WithinMin => Self::WithinMin,
        }
    }
}

impl Actor {
    /// What the ranking is told of a VM.
    fn attributes(&self, id: VmId) -> Attributes {
        let vm = &self.vms[&id];
        Attributes {
            action: self.effect(id, vm.oom.action),
            preference: vm.oom.preference.into(),
            priority: vm.oom.priority,
            ending: vm.state == VmState::Ended || vm.cause.is_some(),
            stock: Pages(vm.spare()),
            given: self.is_emptied(id).then(|| self.comes_back(id)),
        }
    }

    /// What an action would do to a VM.
    pub fn effect(&self, id: VmId, action: OomAction) -> Action {
        match action {
            // What a pause frees of one that is paused already is on its way.
            OomAction::Pause if self.vms[&id].state == VmState::Paused => Action::Pause { frees: Pages::ZERO },
            OomAction::Pause => Action::Pause { frees: self.freed_by_pause(id) },
            OomAction::Kill => Action::Kill,
        }
    }

    /// Whose each node is that is a VM's.
    pub fn owners(&self) -> BTreeMap<NodeId, VmId> {
        self.vms.iter().map(|(id, vm)| (vm.node, id)).collect()
    }

    /// The VMs at `top` and below, as candidates.
    pub fn candidates(&self, top: NodeId) -> Vec<Candidate<'_>> {
        let owners = self.owners();
        oom::candidates(&self.tree, top, |node| owners.get(&node).map(|id| self.attributes(*id)))
    }

    /// An entry of a list, at the place `at` from 0; `owners` are those of [`Self::owners`].
    pub fn ranked_view(&self, owners: &BTreeMap<NodeId, VmId>, at: usize, entry: &Ranked<'_>) -> RankedView {
        let candidate = &entry.candidate;
        let vm = &self.vms[&owners[&candidate.id]];
        RankedView {
            rank: at + 1,
            vm: vm.name.clone(),
            group: self.tree.parent(candidate.id).map_or_else(|| "/".to_owned(), |parent| self.tree.path(parent)),
            usage_bytes: candidate.usage.bytes(),
            vmm_bytes: candidate.vmm.bytes(),
            stock_bytes: candidate.attributes.stock.bytes(),
            min_bytes: candidate.protection.min.bytes(),
            low_bytes: candidate.protection.low.bytes(),
            above_bytes: candidate.above().bytes(),
            action: vm.oom.action,
            frees_bytes: entry.frees.bytes(),
            score_bytes: entry.score.bytes(),
            preference: vm.oom.preference,
            priority: candidate.attributes.priority,
            spared: entry.spared.map(SparedBy::from),
            why: entry.to_string(),
        }
    }

    /// Who would go first if there were no room in `group`.
    fn oom_rank(&self, group: &str) -> Result<RankView, Refusal> {
        let owners = self.owners();
        let top = self.find_group(group)?;
        let candidates = self.candidates(top);
        let ranked = oom::rank(&candidates);
        Ok(RankView {
            group: self.tree.path(top),
            usage_bytes: self.tree.usage(top).bytes(),
            max_bytes: self.tree.limits(top).max.as_bytes(),
            candidates: ranked.iter().enumerate().map(|(at, entry)| self.ranked_view(&owners, at, entry)).collect(),
        })
    }
}

impl Controller {
    /// Who would go first if there were no room in `group`. Nothing is done.
    ///
    /// # Errors
    /// When there is no such group.
    pub async fn oom_rank(&self, group: &str) -> Result<RankView, Refusal> {
        let group = group.to_owned();
        self.ask(move |actor, reply| answer(reply, actor.oom_rank(&group))).await
    }
}

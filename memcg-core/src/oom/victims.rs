//! One victim at a time, and what is said about it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::{Action, Ranked, Spared};
use crate::tree::{NodeId, NodeSnapshot, Tree};
use crate::units::{Pages, human};

/// How long the memory of one who was chosen may take to come back before the next one is chosen.
pub const RETURNS: Duration = Duration::from_secs(10);

/// The victims whose memory is not back yet.
///
/// ```text
///  chosen, or ending by itself
///    └──────► UNDER WAY ── its memory is back, or its node is gone ──► forgotten
///                │
///                └─ patience is over, or the action failed ──► LATE: no reason to wait any more, and not chosen
///                                                              again until its memory is back, but to be killed
///                                                              where a pause was not enough
/// ```
#[derive(Clone, Debug)]
pub struct Victims {
    patience: Duration,
    list: BTreeMap<NodeId, Victim>,
}

#[derive(Clone, Debug)]
struct Victim {
    id: NodeId,
    killed: bool,
    /// Its usage when all is back that its end, or its pause, frees.
    remains: Pages,
    /// It is waited for until then. Zero: not at all.
    deadline: Duration,
}

impl Victim {
    /// What is still to come back.
    fn returning(&self, tree: &Tree) -> Pages {
        if tree.contains(self.id) { tree.usage(self.id).saturating_sub(self.remains) } else { Pages::ZERO }
    }
}

/// What is to be done about a level without room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a victim that was chosen counts as under way"]
pub enum Choice<'a> {
    /// Nothing: somebody's memory is coming back. Retry the charge when it is, or ask again at `until`.
    Wait(Waiting),
    /// This one: carry out its action now. If that fails, call [`Victims::failed`] and ask again.
    Act(Ranked<'a>),
    /// Nothing: nobody may be chosen. The charge stays refused, and its vCPUs held, until something changes.
    Nobody(Nobody),
}

/// A victim whose memory is coming back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The victim.
    pub id: NodeId,
    /// What it still has to give back.
    pub returning: Pages,
    /// When the next best is chosen if that is not back.
    pub until: Duration,
}

/// Why nobody may be chosen: how many candidates were spared for which reason. All zero: there was no candidate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nobody {
    /// Never to be chosen.
    pub omitted: usize,
    /// Ending already.
    pub ending: usize,
    /// With nothing to free.
    pub free_nothing: usize,
    /// Within their effective `min`.
    pub within_min: usize,
    /// Chosen before, and their memory has not come back in time.
    pub late: usize,
    /// Not of this subtree.
    pub outside: usize,
}

impl fmt::Display for Nobody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Nobody { omitted, ending, free_nothing, within_min, late, outside } = *self;
        if *self == Nobody::default() {
            return f.write_str("there is no VM to choose");
        }
        let reasons = [
            (omitted, "omitted"),
            (ending, "ending"),
            (free_nothing, "with nothing to free"),
            (within_min, "within memory.min"),
            (late, "not ended in time"),
            (outside, "elsewhere"),
        ];
        f.write_str("nobody can be chosen:")?;
        let mut comma = "";
        for (count, reason) in reasons.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, "{comma} {count} {reason}")?;
            comma = ",";
        }
        Ok(())
    }
}

impl Victims {
    /// Nobody yet. A victim's memory is waited for as long as `patience`.
    pub fn new(patience: Duration) -> Victims {
        Victims { patience, list: BTreeMap::new() }
    }

    /// Who goes, now that `level` has no room and nothing else helps. `ranked` is the list for `level` (or any part of
    /// it, when a client has chosen): the first that is not spared, that is within `level`, and whose turn it was not
    /// already. It counts as under way from now on.
    pub fn decide<'a>(&mut self, tree: &Tree, level: NodeId, ranked: &[Ranked<'a>], now: Duration) -> Choice<'a> {
        self.note_endings(ranked, now);
        if let Some(waiting) = self.waiting(tree, level, now) {
            return Choice::Wait(waiting);
        }
        let mut nobody = Nobody::default();
        for entry in ranked {
            let id = entry.candidate.id;
            let killed = entry.candidate.attributes.action == Action::Kill;
            let count = match entry.spared {
                _ if !tree.contains(id) || !tree.is_within(id, level) => &mut nobody.outside,
                Some(Spared::Omit) => &mut nobody.omitted,
                Some(Spared::Ending) => &mut nobody.ending,
                Some(Spared::FreesNothing) => &mut nobody.free_nothing,
                Some(Spared::WithinMin) => &mut nobody.within_min,
                None if self.list.get(&id).is_some_and(|late| late.killed || !killed) => &mut nobody.late,
                None => {
                    let remains = tree.usage(id).saturating_sub(entry.frees);
                    let deadline = now.saturating_add(self.patience);
                    self.list.insert(id, Victim { id, killed, remains, deadline });
                    return Choice::Act(*entry);
                }
            };
            *count += 1;
        }
        Choice::Nobody(nobody)
    }

    /// Who is ending without having been chosen (a user's kill, a guest that powers off) is waited for like a victim,
    /// from when it is first seen.
    fn note_endings(&mut self, ranked: &[Ranked<'_>], now: Duration) {
        let deadline = now.saturating_add(self.patience);
        for entry in ranked.iter().filter(|entry| entry.candidate.attributes.ending) {
            let id = entry.candidate.id;
            if !self.list.get(&id).is_some_and(|victim| victim.killed) {
                self.list.insert(id, Victim { id, killed: true, remains: Pages::ZERO, deadline });
            }
        }
    }

    /// The victim whose memory will relieve `level` and is still waited for; the one that is waited for longest, where
    /// groups below `level` have each their own.
    pub fn waiting(&mut self, tree: &Tree, level: NodeId, now: Duration) -> Option<Waiting> {
        self.list.retain(|_, victim| !victim.returning(tree).is_zero());
        let here = |victim: &&Victim| now < victim.deadline && tree.is_within(victim.id, level);
        let victim = self.list.values().filter(here).max_by_key(|victim| victim.deadline)?;
        Some(Waiting { id: victim.id, returning: victim.returning(tree), until: victim.deadline })
    }

    /// What was to be done with `id` could not be done: the next is chosen at once.
    pub fn failed(&mut self, id: NodeId) {
        if let Some(victim) = self.list.get_mut(&id) {
            victim.deadline = Duration::ZERO;
        }
    }

    /// `id` runs again (it was resumed, or more memory was found): it is a candidate like any other.
    pub fn forget(&mut self, id: NodeId) {
        self.list.remove(&id);
    }
}

/// What is said when a level has no room and nothing else helped: who goes or why nobody does, with all the numbers.
///
/// Its [`Display`](fmt::Display) is one line for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report<'a> {
    /// Path of the level.
    pub level: String,
    /// Its counters: U, K and their limits and failure counts.
    pub snapshot: NodeSnapshot,
    /// What was decided.
    pub choice: Choice<'a>,
    /// All candidates, with the numbers of each.
    pub table: Vec<Ranked<'a>>,
}

impl<'a> Report<'a> {
    /// The report of a `choice` from `table` at `level`.
    pub fn new(tree: &Tree, level: NodeId, choice: Choice<'a>, table: Vec<Ranked<'a>>) -> Report<'a> {
        Report { level: tree.path(level), snapshot: tree.snapshot(level), choice, table }
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |pages: Pages| human(pages.bytes());
        let NodeSnapshot { memory, vmm, limits, .. } = &self.snapshot;
        write!(f, "out of memory in {}: ", self.level)?;
        write!(f, "memory {} of {}, failcnt {}; ", size(memory.usage), limits.max, memory.failcnt)?;
        write!(f, "vmm {} of {}, failcnt {}; ", size(vmm.usage), limits.vmm_max, vmm.failcnt)?;
        match &self.choice {
            Choice::Act(victim) => {
                let verb = if victim.candidate.attributes.action == Action::Kill { "kill" } else { "pause" };
                write!(f, "{verb} {victim}")
            }
            Choice::Wait(waiting) => write!(f, "waiting for {} of a victim", size(waiting.returning)),
            Choice::Nobody(why) => write!(f, "{why}"),
        }
    }
}

//! When nobody can give more: who is paused or ended, and why that one.
//!
//! ```text
//!  a fault's charge is refused at `level`       level(): only what waits may lead here, and never overhead
//!        │ reclaim, eviction, a hold: not enough by the deadline
//!        ▼
//!  candidates()   the VMs at `level` and below, nobody else
//!        │
//!  rank()         the whole list, each with its numbers, and why it is spared if it is
//!        │
//!        ├─► Decision     a client may decide first, until its deadline: that one, more memory, or let it be
//!        ▼
//!  Victims::decide()
//!        ├─ Wait     somebody's end is under way and will help here: wait for its memory, retry the charge
//!        ├─ Act      the first of the list
//!        └─ Nobody   all are spared: the VM that asked stays held. Nobody else is taken in their place
//! ```
//!
//! **Membership is a filter, not a score.** The kernel gave outsiders 0 points and then took the first task it saw when
//! nobody had more (B40), or the one that asked (B41). Here an outsider is not in the list; [`Victims::decide`] looks at
//! each entry's place in the tree once more, and an empty choice is a choice.
//!
//! **The order**: who is not spared before who is; preference `none` before `avoid`; the *lower* priority first; then
//! who frees most of what is above its effective protection; then the bigger one, the name, the id. Any two entries
//! are ordered, so the list does not depend on the order of the candidates. A priority is not weighed against
//! megabytes: one can say in a sentence why somebody was chosen, and it is in the entry's [`Display`](fmt::Display):
//!
//! ```text
//! web-3: 412M above its protection of 128M, priority 0
//! db-1: 2G above its protection of 1G, priority 10
//! ci-7: a pause frees 96M of 300M above its protection of 0, priority 0, to be avoided
//! build-2: spared: 64M in use are within its memory.min of 64M
//! ```
//!
//! **Pause is not kill.** A paused guest frees nothing by itself. What a pause is worth is what can be evicted from it,
//! [`Action::Pause`] says how much that is, and a guest that has given it already is spared: else everybody would be
//! paused in the end and nobody could go on.
//!
//! **One at a time.** Killing takes time and gives memory only at its end. While a victim's memory is coming back to
//! `level`, no second one is chosen for it, and neither while a VM's is that ends for another reason; but a victim
//! elsewhere is of no use here, and suspends nothing (B42). After [`Victims`]' patience the next best is chosen: a VM
//! that does not end must not hold the others.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 41, 48, 63, B40 | candidates are the VMs of the subtree where the limit was met |
//! | 44 | the last rung says [`Choice::Nobody`] and why, it does not go round again |
//! | 47 | one victim while its end is under way; a failed kill chooses the next; [`Report`] is the line in the log |
//! | 49 | [`Preference::Omit`] survives; when all do, the charge stays refused and its vCPUs held |
//! | 50, B43 | [`Choice::Wait`]: the charge is retried when the victim's memory is back, the one that asked lives |
//! | 51, T7 | [`Decision`]: a client's answer, or the built-in policy when it is silent |
//! | 74 | [`Report`] has U, K, limits and failure counts, and each candidate's numbers |
//! | 84 | [`level`]: charges that do not wait have no victims |
//! | B41 | no victim is no kill |
//! | B42 | what is under way elsewhere suspends nothing here |

mod decision;
mod standing;
mod victims;

use std::cmp::Reverse;
use std::fmt;

pub use decision::{Answer, Decision, DecisionError, Resolved};
pub use standing::standing;
pub use victims::{Choice, Nobody, RETURNS, Report, Victims, Waiting};

use crate::protection::{Protection, protections};
use crate::tree::{Counter, Mode, NodeId, Refused, Tree};
use crate::units::{Pages, human};

/// Where a victim may be looked for after a refused charge: at the level that refused, and only when the charge was one
/// that waits for memory and memory was what was short. Ahead of need, or for work that can be left for later, nobody
/// dies; nor for overhead, which no victim's memory makes room for.
pub fn level(mode: Mode, refused: &Refused) -> Option<NodeId> {
    (matches!(mode, Mode::Wait | Mode::Again) && refused.counter == Counter::Memory).then_some(refused.level)
}

/// Whether a VM is a candidate when memory is short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Preference {
    /// Like any other.
    #[default]
    None,
    /// After all others.
    Avoid,
    /// Never.
    Omit,
}

/// What is done with a VM that is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Its vCPUs stop until there is memory again.
    Pause {
        /// What can then be taken from it: what is evictable of it now, less what it keeps in order to be resumed.
        frees: Pages,
    },
    /// It ends, and frees all that it has.
    Kill,
}

/// One VM that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate<'a> {
    /// Its node.
    pub id: NodeId,
    /// Its name, for people.
    pub name: &'a str,
    /// Memory charged to it.
    pub usage: Pages,
    /// Overhead in it.
    pub vmm: Pages,
    /// What protects it while memory is looked for at this level.
    pub protection: Protection,
    /// What would be done with it.
    pub attributes: Attributes,
}

/// What [`candidates`] is told about a VM: what is not in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// What is done with it when it is chosen.
    pub action: Action,
    /// Whether it is a candidate.
    pub preference: Preference,
    /// Among those of one preference the lower number goes first.
    pub priority: i32,
    /// Its end has begun already, for whatever reason: its memory is coming back.
    pub ending: bool,
    /// What of its usage is charged ahead of need. Only shown: it is recalled long before anybody is chosen.
    pub stock: Pages,
    /// What it has given already, if it was paused for others before. Only shown.
    pub given: Option<Pages>,
}

impl Default for Attributes {
    fn default() -> Attributes {
        Attributes {
            action: Action::Kill,
            preference: Preference::None,
            priority: 0,
            ending: false,
            stock: Pages::ZERO,
            given: None,
        }
    }
}

/// Why a candidate is not chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Spared {
    /// Its preference is [`Preference::Omit`].
    Omit,
    /// Its end has begun already.
    Ending,
    /// What would be done with it frees nothing: it has nothing, or has given it.
    FreesNothing,
    /// What it uses is within its effective `min`.
    WithinMin,
}

/// One line of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranked<'a> {
    /// The candidate.
    pub candidate: Candidate<'a>,
    /// What the action frees.
    pub frees: Pages,
    /// Its score: what the action frees of what is above its effective protection.
    pub score: Pages,
    /// Why it is not to be chosen, if it is not.
    pub spared: Option<Spared>,
}

impl Action {
    /// What it frees of one that uses so much.
    pub fn frees(self, usage: Pages) -> Pages {
        match self {
            Action::Kill => usage,
            Action::Pause { frees } => frees.min(usage),
        }
    }
}

impl Candidate<'_> {
    /// What the action frees.
    fn frees(&self) -> Pages {
        self.attributes.action.frees(self.usage)
    }

    /// Memory above its protection.
    pub fn above(&self) -> Pages {
        self.usage.saturating_sub(self.protection.soft())
    }

    fn spared(&self) -> Option<Spared> {
        let Attributes { preference, ending, .. } = self.attributes;
        if preference == Preference::Omit {
            Some(Spared::Omit)
        } else if ending {
            Some(Spared::Ending)
        } else if self.frees().is_zero() {
            Some(Spared::FreesNothing)
        } else if self.usage <= self.protection.min {
            Some(Spared::WithinMin)
        } else {
            None
        }
    }
}

impl<'a> Ranked<'a> {
    fn new(candidate: Candidate<'a>) -> Ranked<'a> {
        let frees = candidate.frees();
        Ranked { candidate, frees, score: frees.min(candidate.above()), spared: candidate.spared() }
    }

    /// The same VM when it goes by this action, because somebody has decided so. The list may have spared it.
    #[must_use]
    pub fn chosen(self, action: Action) -> Ranked<'a> {
        let mut candidate = self.candidate;
        candidate.attributes.action = action;
        Ranked { spared: None, ..Ranked::new(candidate) }
    }

    /// What decides who goes first, nearly always.
    fn key(&self) -> Key {
        let Attributes { preference, priority, .. } = self.candidate.attributes;
        let (score, usage) = (Reverse(self.score), Reverse(self.candidate.usage));
        (self.spared.is_some(), preference, priority, score, usage)
    }
}

/// See [`Ranked::key`].
type Key = (bool, Preference, i32, Reverse<Pages>, Reverse<Pages>);

impl fmt::Display for Ranked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |pages: Pages| human(pages.bytes());
        let Candidate { name, usage, protection, attributes, .. } = self.candidate;
        write!(f, "{name}: ")?;
        match self.spared {
            Some(Spared::Omit) => return f.write_str("spared: its preference is omit"),
            Some(Spared::Ending) => return write!(f, "spared: it is ending, with {} to come back", size(usage)),
            Some(Spared::FreesNothing) if usage.is_zero() => return f.write_str("spared: it has nothing"),
            Some(Spared::FreesNothing) => {
                let Some(given) = attributes.given else { return f.write_str("spared: a pause would free nothing") };
                return write!(f, "spared: it has been paused, and has given {}", size(given));
            }
            Some(Spared::WithinMin) => {
                let min = size(protection.min);
                return write!(f, "spared: {} in use are within its memory.min of {min}", size(usage));
            }
            None => {}
        }
        let above = size(self.candidate.above());
        match attributes.action {
            Action::Pause { .. } if self.frees > self.score => {
                write!(f, "a pause frees {}, {above} of it", size(self.frees))?;
            }
            Action::Pause { .. } => write!(f, "a pause frees {} of {above}", size(self.frees))?,
            Action::Kill => f.write_str(&above)?,
        }
        write!(f, " above its protection of {}", size(protection.soft()))?;
        write!(f, ", priority {}", attributes.priority)?;
        if attributes.preference == Preference::Avoid { f.write_str(", to be avoided") } else { Ok(()) }
    }
}

/// The candidates in the order in which they would be chosen; those that are spared at the end, in the same order.
///
/// See the module's documentation for the order. The result is the same for any order of the candidates.
pub fn rank<'a>(candidates: &[Candidate<'a>]) -> Vec<Ranked<'a>> {
    // Keys are sorted rather than entries, which are several times as large.
    let mut order: Vec<(Key, usize)> =
        candidates.iter().enumerate().map(|(i, candidate)| (Ranked::new(*candidate).key(), i)).collect();
    order.sort_unstable_by(|(a, i), (b, j)| {
        let tie = |i: &usize| (candidates[*i].name, candidates[*i].id);
        a.cmp(b).then_with(|| tie(i).cmp(&tie(j)))
    });
    order.into_iter().map(|(_, i)| Ranked::new(candidates[i])).collect()
}

/// The VMs at `top` and below as candidates, with the protection that they have while memory is looked for at `top`.
/// `attributes` tells what is not in the tree, and `None` for what is not a VM, such as a group without members.
///
/// What is offline counts as ending.
pub fn candidates<'a>(
    tree: &'a Tree,
    top: NodeId,
    mut attributes: impl FnMut(NodeId) -> Option<Attributes>,
) -> Vec<Candidate<'a>> {
    let nodes = protections(tree, top);
    let mut candidates = Vec::with_capacity(nodes.len());
    for node in nodes {
        if tree.children(node.id).is_empty()
            && let Some(mut attributes) = attributes(node.id)
        {
            attributes.ending |= !tree.is_online(node.id);
            candidates.push(Candidate {
                id: node.id,
                name: tree.name(node.id),
                usage: node.usage,
                vmm: tree.counter(node.id, Counter::Vmm).usage,
                protection: node.protection,
                attributes,
            });
        }
    }
    candidates
}

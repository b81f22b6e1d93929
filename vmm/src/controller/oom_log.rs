//! What was decided when no memory was left, and what came of it: a ring of decisions.
//!
//! A decision is recorded as it is carried out, with the list that it was taken from, and followed from then on. Nobody has to
//! say what has become of it: after every input the VM is looked at, so memory that comes back is seen, whatever has brought it.
//!
//! ```text
//!  decided ─► UNDER WAY ─┬─ all that was to come back is back ─► FREED ──┐
//!    │                   ├─ not within RETURNS ─► LATE ─ it is back ──►──┤
//!    │                   ├─ nothing can be had of it ─► NOTHING ───────►─┤
//!    │                   └─ nothing was to come back ─► WAITS ───────────┴─ a VM that was paused goes on ─► RESUMED
//!    ├─ its worker does not listen ─► FAILED
//!    └─ nobody may be chosen ─► NOBODY
//! ```
//!
//! Like the events, decisions die with their controller, and their numbers go on above those of the controllers before
//! ([`super::events::LIFE`]). What has to survive is in the journal: which VMs stand still, and for whom.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use memcg_core::oom::{self, RETURNS, Ranked};
use memcg_core::tree::NodeId;
use memcg_core::units::Pages;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::Controller;
use super::actor::{Actor, answer};
use super::error::Refusal;
use super::events;
use super::host;
use super::rank::RankedView;
use super::shortage::{Shortage, ShortageSign};
use super::view::{OomAction, VmState};
use super::vm::VmId;

/// Decisions that are kept.
pub const RING: usize = 256;

/// Entries of the list that a decision keeps, beside the one that was chosen.
const RANKED: usize = 10;

/// Upper ends of the buckets of [`Returns`] in milliseconds; one more bucket has what took longer.
pub const BUCKETS: [u64; 8] = [10, 30, 100, 300, 1000, 3000, 10_000, 30_000];

/// Who decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DecidedBy {
    /// The built-in policy.
    Policy,
    /// A client that has asked to be asked.
    Client,
    /// The command of `serve --oom-hook`.
    Hook,
}

impl DecidedBy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Policy, Self::Client, Self::Hook];

    /// As the interface names it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Policy => "policy",
            Self::Client => "client",
            Self::Hook => "hook",
        }
    }
}

/// Why somebody had to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The VM was held at its own limit for too long.
    Limit,
    /// A VM was held for too long, because the group is full.
    Full,
    /// The VMs of the group thrash: they only took pages from each other.
    Thrash,
    /// The host ran short of memory.
    Host,
}

impl Reason {
    /// As the interface names it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Full => "full",
            Self::Thrash => "thrash",
            Self::Host => "host",
        }
    }
}

/// What is done with somebody, who has decided that, and why somebody had to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct How {
    /// What is done.
    pub action: OomAction,
    /// Who has decided it.
    pub by: DecidedBy,
    /// Why somebody had to go.
    pub reason: Reason,
}

/// What has come of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Memory is on its way back.
    UnderWay,
    /// All that was to come back is back, or all that could be had.
    Freed,
    /// Not all of it was back after ten seconds; what has come since counts as well.
    Late,
    /// Nothing can be had of it: nothing of it shrinks, or swap is full. The VM stands still in vain.
    Nothing,
    /// Nothing was to come back: the VM stands still until there is memory for it.
    Waits,
    /// It could not be done: the worker did not take the word.
    Failed,
    /// The VM that was paused has gone on.
    Resumed,
    /// Nobody could be chosen, and nothing was done.
    Nobody,
}

/// A decision about a level that has no memory left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DecisionView {
    /// Its number, without gaps: from 1, after a restart of the controller from 10 000 000 001, and so on.
    pub number: u64,
    /// When, in milliseconds since 1970.
    pub time_ms: u64,
    /// Number of the last event before it.
    pub event: u64,
    /// Path of the group or VM whose limit leaves no room; `/` is the host.
    pub level: String,
    /// Why somebody had to go.
    pub reason: Reason,
    /// What it had been charged.
    pub usage_bytes: u64,
    /// Its limit, `null` for none.
    pub max_bytes: Option<u64>,
    /// By what the host was seen to run short, if that was the reason.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub short: Option<ShortageSign>,
    /// What was left on the host then.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub available_bytes: Option<u64>,
    /// The VM that was chosen; absent when nobody was.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vm: Option<String>,
    /// Its number: another VM of the same name has another.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<u64>,
    /// What was done with it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub action: Option<OomAction>,
    /// Who decided.
    pub by: DecidedBy,
    /// What came of asking somebody else, when the policy decided after that.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub in_vain: Option<String>,
    /// Why this one, or why nobody.
    pub why: String,
    /// The first ten of the list, and the one that was chosen.
    pub ranked: Vec<RankedView>,
    /// How many of the list are not shown.
    pub not_shown: usize,
    /// What was to come back.
    pub expected_bytes: u64,
    /// What has come back so far.
    pub freed_bytes: u64,
    /// Time from the decision until all that was expected was back, in milliseconds; absent until then.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub took_ms: Option<u64>,
    /// What has come of it.
    pub outcome: Outcome,
    /// Since when, in milliseconds since 1970.
    pub outcome_ms: u64,
}

/// Decisions, the newest last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OomLogView {
    /// Decisions that were asked for and are no longer known.
    pub dropped: u64,
    /// Those that are.
    pub decisions: Vec<DecisionView>,
}

/// How long memory took to come back: how many took up to each of [`BUCKETS`], and how many longer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Returns {
    /// By bucket, each without those below it.
    pub counts: [u64; BUCKETS.len() + 1],
    /// All of it together.
    pub sum: Duration,
}

impl Returns {
    fn add(&mut self, took: Duration) {
        let bucket = BUCKETS.iter().position(|ms| took <= Duration::from_millis(*ms)).unwrap_or(BUCKETS.len());
        self.counts[bucket] += 1;
        self.sum += took;
    }
}

/// What has been counted since the controller began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OomTotals {
    /// How often what was decided, and by whom; no action: nobody could be chosen.
    pub decisions: BTreeMap<(Option<OomAction>, DecidedBy), u64>,
    /// Bytes that came back.
    pub freed: BTreeMap<OomAction, u64>,
    /// How long that took, of the decisions of which all came back.
    pub returns: BTreeMap<OomAction, Returns>,
}

/// A decision whose end is not known yet.
#[derive(Clone, Copy, Debug)]
struct Followed {
    number: u64,
    node: NodeId,
    /// Usage of the VM then.
    from: Pages,
    at: Instant,
    /// Whether it was seen to be carried out.
    begun: bool,
}

/// How a VM is that was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It stands still, or is ending, and uses so much.
    Stands(Pages, Gives),
    /// It runs.
    Runs,
    /// Its memory is back.
    Gone,
}

/// What is to come of a VM that stands still or is ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gives {
    /// What it has.
    All,
    /// No more than it has given.
    NoMore,
    /// Nothing: it waits for memory itself.
    Nothing,
}

/// The ring.
#[derive(Debug, Default)]
pub struct OomLog {
    ring: VecDeque<DecisionView>,
    /// Number before the first of this life.
    before: u64,
    last: u64,
    followed: BTreeMap<VmId, Followed>,
    totals: OomTotals,
}

impl OomLog {
    /// The decisions of a controller's life, from 1.
    pub fn of_life(life: u32) -> Self {
        let before = events::before(life);
        Self { before, last: before, ..Self::default() }
    }

    /// The decisions of this life after number `since`, as [`events::EventLog::after`] has it.
    fn after(&self, since: u64) -> OomLogView {
        let since = if since > self.last { self.before } else { since.max(self.before) };
        let oldest = self.last + 1 - self.ring.len() as u64;
        let skip = usize::try_from((since + 1).saturating_sub(oldest)).unwrap_or(usize::MAX);
        OomLogView {
            dropped: oldest.saturating_sub(since + 1),
            decisions: self.ring.iter().skip(skip).cloned().collect(),
        }
    }

    /// All that are kept, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &DecisionView> {
        self.ring.iter()
    }

    /// Adds a decision and returns its number.
    fn push(&mut self, decision: DecisionView) -> u64 {
        self.last += 1;
        *self.totals.decisions.entry((decision.action, decision.by)).or_default() += 1;
        if self.ring.len() == RING {
            self.ring.pop_front();
        }
        self.ring.push_back(DecisionView { number: self.last, ..decision });
        self.last
    }

    fn get_mut(&mut self, number: u64) -> Option<&mut DecisionView> {
        let back = usize::try_from(self.last.checked_sub(number)?).ok()?;
        let at = self.ring.len().checked_sub(back + 1)?;
        self.ring.get_mut(at)
    }

    /// Notes what has become of a decision. False when nothing more will.
    fn note(&mut self, followed: &mut Followed, seen: Seen, now: Instant) -> bool {
        // One that fell out of the ring is followed no more.
        let Some(decision) = self.get_mut(followed.number) else { return false };
        let (usage, gives) = match seen {
            Seen::Runs => {
                decision.come_to(if followed.begun { Outcome::Resumed } else { Outcome::Failed });
                return false;
            }
            Seen::Stands(usage, gives) => (usage, gives),
            Seen::Gone => (Pages::ZERO, Gives::NoMore),
        };
        // What is known in the step of the decision itself is from before it.
        if !std::mem::replace(&mut followed.begun, true) {
            if gives == Gives::Nothing {
                decision.expected_bytes = 0;
                decision.come_to(Outcome::Waits);
            }
            return true;
        }
        let freed = followed.from.saturating_sub(usage).bytes().max(decision.freed_bytes);
        let more = freed - std::mem::replace(&mut decision.freed_bytes, freed);
        let took = now.saturating_duration_since(followed.at);
        let (is_over, in_vain) = (gives == Gives::NoMore, freed == 0 && seen != Seen::Gone);
        let is_all = (is_over || freed >= decision.expected_bytes) && !in_vain;
        let mut is_back = false;
        match decision.outcome {
            Outcome::UnderWay | Outcome::Late if is_over && in_vain => decision.come_to(Outcome::Nothing),
            Outcome::UnderWay | Outcome::Late | Outcome::Nothing if is_all => {
                is_back = true;
                decision.took_ms = Some(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
                decision.come_to(Outcome::Freed);
            }
            Outcome::UnderWay if took >= host::scaled(RETURNS) => decision.come_to(Outcome::Late),
            // Something has been found after all.
            Outcome::Nothing if !in_vain => decision.come_to(Outcome::UnderWay),
            // It was ended while it waited.
            Outcome::Waits if seen == Seen::Gone => decision.come_to(Outcome::Freed),
            _ => {}
        }
        if let Some(action) = decision.action {
            *self.totals.freed.entry(action).or_default() += more;
            if is_back {
                self.totals.returns.entry(action).or_default().add(took);
            }
        }
        seen != Seen::Gone
    }
}

impl DecisionView {
    /// This has come of it.
    fn come_to(&mut self, outcome: Outcome) {
        self.outcome = outcome;
        self.outcome_ms = events::unix_ms();
    }
}

impl Actor {
    /// Records that `id` is chosen because `level` has no room, and returns the number of the decision.
    pub fn log_decision(&mut self, id: VmId, level: NodeId, how: How) -> u64 {
        let How { action, by, reason } = how;
        let (vm, owners) = (&self.vms[&id], self.owners());
        let candidates = self.candidates(level);
        let ranked = oom::rank(&candidates);
        let at = ranked.iter().position(|entry| entry.candidate.id == vm.node);
        let chosen = at.map(|at| &ranked[at]);
        let mut decision = DecisionView {
            vm: Some(vm.name.clone()),
            id: Some(id.0),
            action: Some(action),
            by,
            why: match chosen {
                // Also one that the policy would have spared, or would have done something else with.
                Some(chosen) if level != vm.node => chosen.chosen(self.effect(id, action)).to_string(),
                _ => format!("{}: it was held at its own limit for too long", vm.name),
            },
            expected_bytes: self.effect(id, action).frees(self.tree.usage(vm.node)).bytes(),
            outcome: Outcome::UnderWay,
            ..self.decision(level, reason, &ranked, &owners)
        };
        if let Some(at) = at.filter(|at| *at >= RANKED) {
            decision.ranked.push(self.ranked_view(&owners, at, &ranked[at]));
            decision.not_shown -= 1;
        }
        let (node, from, at) = (vm.node, self.tree.usage(vm.node), Instant::now());
        let number = self.decisions.push(decision);
        self.decisions.followed.insert(id, Followed { number, node, from, at, begun: false });
        number
    }

    /// Records that nobody can be chosen though `level` has no room.
    pub fn log_nobody(&mut self, level: NodeId, reason: Reason, by: DecidedBy, why: &str) -> u64 {
        let candidates = self.candidates(level);
        let decision = self.decision(level, reason, &oom::rank(&candidates), &self.owners());
        self.decisions.push(DecisionView { by, why: why.to_owned(), ..decision })
    }

    /// A decision that nobody is to go, as it is when nothing is said.
    fn decision(
        &self,
        level: NodeId,
        reason: Reason,
        ranked: &[Ranked<'_>],
        owners: &BTreeMap<NodeId, VmId>,
    ) -> DecisionView {
        let shortage =
            self.shortage.as_ref().map(Shortage::view).filter(|now| reason == Reason::Host && now.short.is_some());
        let shown = ranked.iter().enumerate().take(RANKED);
        let now = events::unix_ms();
        DecisionView {
            number: 0,
            time_ms: now,
            event: self.events.last(),
            level: self.tree.path(level),
            reason,
            usage_bytes: self.tree.usage(level).bytes(),
            max_bytes: self.tree.limits(level).max.as_bytes(),
            short: shortage.as_ref().and_then(|shortage| shortage.short),
            available_bytes: shortage.map(|shortage| shortage.available_bytes),
            vm: None,
            id: None,
            action: None,
            by: DecidedBy::Policy,
            in_vain: self.questions.in_vain.clone(),
            why: String::new(),
            ranked: shown.map(|(at, entry)| self.ranked_view(owners, at, entry)).collect(),
            not_shown: ranked.len().saturating_sub(RANKED),
            expected_bytes: 0,
            freed_bytes: 0,
            took_ms: None,
            outcome: Outcome::Nobody,
            outcome_ms: now,
        }
    }

    /// Looks what has become of those who were chosen. What this costs depends on how many stand still or are ending.
    pub fn follow_decisions(&mut self) {
        let mut followed = std::mem::take(&mut self.decisions.followed);
        let now = Instant::now();
        followed.retain(|id, followed| {
            let seen = self.seen(*id, followed.node);
            self.decisions.note(followed, seen, now)
        });
        self.decisions.followed = followed;
    }

    /// How a VM is that was chosen.
    fn seen(&self, id: VmId, node: NodeId) -> Seen {
        let Some(vm) = self.vms.get(&id).filter(|_| self.tree.contains(node)) else { return Seen::Gone };
        let usage = self.tree.usage(node);
        match vm.state {
            _ if vm.cause.is_some() => Seen::Stands(usage, Gives::All),
            VmState::Ended => Seen::Stands(usage, Gives::All),
            VmState::Starting | VmState::Running => Seen::Runs,
            VmState::Paused if !self.is_emptied(id) => Seen::Stands(usage, Gives::Nothing),
            VmState::Paused if self.has_given_all(id) => Seen::Stands(usage, Gives::NoMore),
            VmState::Paused => Seen::Stands(usage, Gives::All),
        }
    }

    /// What has been counted of decisions.
    pub fn oom_totals(&mut self) -> OomTotals {
        self.follow_decisions();
        self.decisions.totals.clone()
    }
}

impl Controller {
    /// The decisions after number `since`.
    ///
    /// # Errors
    /// When the controller is going away.
    pub async fn oom_log(&self, since: u64) -> Result<OomLogView, Refusal> {
        self.ask(move |actor, reply| {
            actor.follow_decisions();
            answer(reply, Ok(actor.decisions.after(since)));
        })
        .await
    }
}

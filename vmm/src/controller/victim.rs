//! Somebody is chosen: a level has no memory left, and what its VMs were asked for did not come in time.
//!
//! The level is a group at whose limit a VM is held (`grants.rs`), or the host (`shortage.rs`); there is one way to choose for
//! both. Who goes is `memcg_core::oom`'s: one after the other, by rules that `ballast oom rank` shows beforehand. Here it is done,
//! and said why, with the list.
//!
//! ```text
//!                 ┌─ pause: vCPUs stop, then all of its memory is evicted ── room for what it lacks, host calm ──► resume
//!  no memory ─────┼─ kill: its worker ends, and its memory is back
//!  at a level     ├─ wait: somebody's memory is on its way, or somebody was chosen just before
//!                 └─ nobody: why is said, whoever is held stays so, and it is tried again
//! ```
//!
//! Before that a client or a command may be asked (`questions.rs`).
//!
//! *One at a time*: nobody else is chosen for a level while the memory of somebody in it is on its way, nor before [`RETURNS`]
//! has passed since the last one in it was chosen. What happens elsewhere puts nothing off.
//!
//! A pause is a remedy only by what it frees. So a VM that is paused for others is *emptied*: its ladder has a goal of
//! nothing, and ends when nothing is left that could be evicted. It goes on by itself when each limit above it has room for
//! what it lacks and the host has been calm for long enough; nobody else may let it go on before. Who was paused first goes on
//! first, and one in [`RETURNS`], so that it is seen what the last one takes before the next one follows.

use std::collections::BTreeMap;
use std::time::Duration;

use memcg_core::oom::{self, Choice, Nobody, RETURNS, Ranked, Waiting};
use memcg_core::tree::{Event, NodeId};
use memcg_core::units::{Pages, exact, human};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::actor::Actor;
use super::changes::Target;
use super::error::{Code, Refusal};
use super::events::{EventKind, merged};
use super::floor::in_mib;
use super::grants::{GO_ON, SILENT_RETRY};
use super::host;
use super::oom_log::{DecidedBy, How, Reason};
use super::view::{AheadView, OomAction, OomPreference, PausedBy};
use super::vm::{KilledBy, Vm, VmEnd, VmId};

/// That nobody can be chosen for a level is told again only after this, unless there is another reason.
const QUIET: Duration = Duration::from_secs(60);

/// Entries of the list that an event shows, at most: more would crowd the others out of the log.
pub const SHOWN: usize = 10;

/// What came of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Somebody was chosen, and it is done.
    Done,
    /// Nobody may be chosen.
    Nobody,
    /// Nothing is done before this time: memory is on its way.
    Wait(Instant),
}

/// What is remembered of choices.
#[derive(Debug, Default)]
pub struct Choices {
    /// When somebody in a level was chosen last.
    chosen: BTreeMap<NodeId, Instant>,
    /// Why nobody could be, as it was told last.
    told: BTreeMap<NodeId, (String, Instant)>,
    /// When a VM that had been emptied went on last, or the host had no memory for one.
    went_on: Option<Instant>,
    /// When those that were emptied are looked at.
    pub look: Option<Instant>,
}

impl Choices {
    /// Until when nobody is chosen for a level, because somebody was.
    fn rests(&mut self, level: NodeId, now: Instant) -> Option<Instant> {
        let over = |at: Instant| at + host::scaled(RETURNS);
        self.chosen.retain(|_, at| now < over(*at));
        self.chosen.get(&level).copied().map(over)
    }

    /// Somebody in these levels was chosen.
    pub fn chosen(&mut self, levels: impl Iterator<Item = NodeId>) {
        let now = Instant::now();
        self.chosen.extend(levels.map(|at| (at, now)));
    }

    /// Nobody is to be chosen for a level, for as long as if somebody had been.
    pub fn rest(&mut self, level: NodeId) {
        self.chosen([level].into_iter());
    }

    /// Notes that it is told now why nobody could be chosen; false when that was done lately.
    fn tell(&mut self, level: NodeId, why: &str, now: Instant) -> bool {
        self.told.retain(|_, (_, at)| now < *at + QUIET);
        let lately = self.told.get(&level).is_some_and(|(told, _)| told == why);
        if !lately {
            self.told.insert(level, (why.to_owned(), now));
        }
        !lately
    }
}

impl Actor {
    /// Chooses somebody for a level that has no memory left, and does it; or asks who is to be chosen first. Nobody goes for
    /// memory that is only assumed to be used: what the host says of itself is no assumption.
    pub fn choose(&mut self, level: NodeId, reason: Reason) -> Outcome {
        if let Some(why) = self.assumed_full(level).filter(|_| reason != Reason::Host) {
            let list = shown(&oom::rank(&self.candidates(level)));
            self.tell_nobody(level, reason, DecidedBy::Policy, why, list);
            return Outcome::Nobody;
        }
        let until = self.choices.rests(level, Instant::now()).or_else(|| self.ask_first(level, reason));
        if let Some(until) = until {
            return Outcome::Wait(until);
        }
        let outcome = self.choose_by_policy(level, reason);
        let was_asked = self.questions.in_vain.take().is_some();
        if was_asked && outcome == Outcome::Nobody {
            // Each of those who are held would ask again at once, and one that fails in no time would be asked without end.
            self.choices.rest(level);
        }
        outcome
    }

    /// Chooses the first of the list, and does it. Whoever does not listen is passed over.
    fn choose_by_policy(&mut self, level: NodeId, reason: Reason) -> Outcome {
        let mut passed = Vec::new();
        let outcome = loop {
            let mut victims = self.victims.clone();
            let ranked = oom::rank(&self.candidates(level));
            let list = shown(&ranked);
            let (entry, why) = match victims.decide(&self.tree, level, &ranked, self.elapsed()) {
                Choice::Wait(waiting) => break Outcome::Wait(self.start + waiting.until),
                Choice::Nobody(why) => (None, why.to_string()),
                Choice::Act(entry) => (Some((entry.candidate.id, entry.frees)), entry.to_string()),
            };
            self.victims = victims;
            let Some((node, frees)) = entry else {
                self.tell_nobody(level, reason, DecidedBy::Policy, why, list);
                break Outcome::Nobody;
            };
            let Some(id) = self.owners().remove(&node) else { break Outcome::Nobody };
            let details = json!({ "why": why, "ranked": list, "frees_bytes": frees.bytes() });
            let how = How { action: self.vms[&id].oom.action, by: DecidedBy::Policy, reason };
            if self.carry_out(id, level, how, details) {
                self.choices.chosen(self.tree.ancestry(node));
                break Outcome::Done;
            }
            self.victims.failed(node);
            self.log_decision(id, level, how);
            passed.push(node);
        };
        // Those are candidates again the next time: their workers may listen by then.
        for node in passed {
            self.victims.forget(node);
        }
        outcome
    }

    /// Acts on a VM that is held at its own limit: nobody else would help it, and a pause need not free anything. One that is never
    /// to be chosen stays held.
    pub fn choose_itself(&mut self, id: VmId) -> Outcome {
        let vm = &self.vms[&id];
        let node = vm.node;
        if vm.oom.preference == OomPreference::Omit {
            let list = shown(&oom::rank(&self.candidates(node)));
            let why = Nobody { omitted: 1, ..Nobody::default() }.to_string();
            self.tell_nobody(node, Reason::Limit, DecidedBy::Policy, why, list);
            return Outcome::Nobody;
        }
        let how = How { action: vm.oom.action, by: DecidedBy::Policy, reason: Reason::Limit };
        if self.carry_out(id, node, how, json!({})) {
            Outcome::Done
        } else {
            Outcome::Wait(Instant::now() + SILENT_RETRY)
        }
    }

    /// Acts on a VM because `level` has no memory left; `details` say why it is this one. False when its worker does not listen.
    pub fn carry_out(&mut self, id: VmId, level: NodeId, how: How, details: Value) -> bool {
        let (vm, action) = (self.vms.get_mut(&id).expect("a candidate"), how.action);
        if action == OomAction::Pause && vm.to_worker.capacity() == 0 {
            // It holds its vCPUs itself if it has to.
            return false;
        }
        if let Some(hold) = &mut vm.hold {
            hold.acted = true;
        }
        let (node, name) = (vm.node, vm.name.clone());
        self.tell_victim(id, level, how, details);
        match action {
            OomAction::Pause => {
                let by = match level {
                    level if level == node => PausedBy::Policy,
                    level if level == self.root => PausedBy::Host,
                    _ => PausedBy::Group,
                };
                self.pause(id, by, None);
                self.look_soon(Target::Vm(id));
            }
            OomAction::Kill => {
                let by = match level {
                    level if level == node => KilledBy::Policy,
                    level if level == self.root => KilledBy::Host,
                    _ => KilledBy::Group,
                };
                self.kill(id, VmEnd::Killed(by));
            }
        }
        // Whoever looks at its console sees a guest that has stopped. Said when that is done: whoever reads this may be slow.
        let (limit, advice) = self.advice(level, Pages::ZERO);
        let reason = how.reason.word();
        tracing::warn!(vm = name, ?action, reason, "no memory is left in {limit}{advice}");
        true
    }

    /// Counts and tells what is done with a VM because `level` has no room, and who decided that; `more` is what else explains it.
    fn tell_victim(&mut self, id: VmId, level: NodeId, how: How, more: Value) {
        let number = self.log_decision(id, level, how);
        let vm = &self.vms[&id];
        let (node, name) = (vm.node, vm.name.clone());
        let (counted, action) = match how.action {
            OomAction::Pause => (Event::OomPause, "pause"),
            OomAction::Kill => (Event::OomKill, "kill"),
        };
        self.tree.record(level, Event::Oom);
        self.tree.record(node, counted);
        let path = self.tree.path(level);
        let (by, reason) = (how.by.word(), how.reason.word());
        let said = json!({ "action": action, "limit_of": path, "reason": reason, "by": by, "decision": number });
        let details = self.account(id, merged(said, more));
        self.event(EventKind::VictimSelected, Some(&name), details);
    }

    /// Tells that nobody could be chosen for a level; the same of the same level once a minute.
    pub fn tell_nobody(&mut self, level: NodeId, reason: Reason, by: DecidedBy, why: String, ranked: Vec<String>) {
        if !self.choices.tell(level, &why, Instant::now()) {
            return;
        }
        let (limit, advice) = self.advice(level, Pages::ZERO);
        tracing::warn!(why, "no memory is left in {limit}{advice}");
        let target = self.owners().remove(&level).map_or(Target::Group(level), Target::Vm);
        let number = self.log_nobody(level, reason, by, &why);
        let details = json!({ "why": why, "reason": reason.word(), "ranked": ranked, "decision": number });
        self.target_event(EventKind::NobodyChosen, target, details);
    }

    /// A level that has no memory left, and what would help it: so much is `missing`, as far as that is known; for the log.
    fn advice(&self, level: NodeId, missing: Pages) -> (String, String) {
        if level == self.root && self.is_short() {
            return ("the host".to_owned(), String::new());
        }
        let name = match self.owners().remove(&level) {
            Some(id) => format!("the limit of {:?}", self.vms[&id].name),
            None => self.tree.path(level),
        };
        (name, format!(": `{}` gives it more", self.words_to_raise(level, missing)))
    }

    /// The words that raise the limit of a VM or a group by what is `missing`; zero: nobody knows how much that is. A VM's own by
    /// a quarter at least, or it would be at it again at once.
    pub fn words_to_raise(&self, level: NodeId, missing: Pages) -> String {
        let owner = self.owners().remove(&level);
        let least = |max: Pages| if owner.is_some() { missing.max(Pages(max.0.div_ceil(4))) } else { missing };
        let max = self.tree.limits(level).max.as_pages().filter(|_| !missing.is_zero());
        let enough = max.map_or("…".to_owned(), |max| exact(in_mib(max + least(max)).bytes()));
        match owner {
            Some(id) => format!("ballast set {} memory.max={enough}", self.vms[&id].name),
            None => format!("ballast group set {} memory.max={enough}", self.tree.path(level)),
        }
    }

    /// Whether a VM stands still for others, and gives all that it has.
    pub fn is_emptied(&self, id: VmId) -> bool {
        self.vms[&id].is_emptied()
    }

    /// What a VM that was emptied needs in order to go on as before: what was evicted, less what that takes now, and what it
    /// owes.
    pub fn comes_back(&self, id: VmId) -> Pages {
        let vm = &self.vms[&id];
        Pages(vm.report.swapped.saturating_sub(vm.report.store) + vm.need())
    }

    /// What is missing until a VM that was emptied may go on, and whose limit is in its way: the host is the root. `None` when
    /// nothing is missing.
    pub fn missing(&self, id: VmId) -> Option<(Pages, NodeId)> {
        let (node, back) = (self.vms[&id].node, self.comes_back(id));
        let on_host = self.shortage.as_ref().map_or(Pages::ZERO, |shortage| shortage.missing_for(back));
        let room = self.tree.margin(node);
        let below = room.map_or(Pages::ZERO, |room| (back + Pages(GO_ON)).saturating_sub(room));
        let at = self.tree.narrowest(node).filter(|_| below >= on_host).unwrap_or(self.root);
        Some((on_host.max(below), at)).filter(|(missing, _)| !missing.is_zero())
    }

    /// Why a VM that was emptied may not go on now, if it may not.
    pub fn stays_empty(&self, id: VmId) -> Option<Refusal> {
        let (missing, at) = self.is_emptied(id).then(|| self.missing(id))??;
        let ((limit, advice), vm) = (self.advice(at, missing), &self.vms[&id]);
        let (bytes, missing) = (missing.bytes(), human(missing.bytes()));
        let (name, short) = (&vm.name, if vm.paused_by == Some(PausedBy::Host) { "the host" } else { "its group" });
        let group = self.tree.path(if at == vm.node { self.root } else { at });
        let message = format!(
            "the VM {name:?} was paused because {short} ran short of memory, and {missing} are missing still in {limit}{advice}. It \
             goes on by itself when they are there; `ballast oom rank {group}` shows who holds how much"
        );
        Some(Refusal::new(Code::ResumeRefused, message).usage(self.tree.usage(vm.node).bytes()).missing(bytes))
    }

    /// Whom a VM waits for that has no memory: the one whose memory is on its way to the limit at which it is held, or those that
    /// go on before it where it was emptied.
    pub fn waits_for(&self, id: VmId) -> Vec<AheadView> {
        let vm = &self.vms[&id];
        if let Some(level) = vm.refused_at.filter(|level| self.tree.contains(*level) && self.held_at(id, *level)) {
            let waiting = self.victims.clone().waiting(&self.tree, level, self.elapsed());
            let ahead = |waiting: Waiting| {
                let vm = self.tree.name(waiting.id).to_owned();
                AheadView { vm, bytes: waiting.returning.bytes() }
            };
            return waiting.filter(|waiting| waiting.id != vm.node).map(ahead).into_iter().collect();
        }
        if !self.is_emptied(id) || vm.kept_paused {
            return Vec::new();
        }
        let before = |(other, ahead): &(VmId, &Vm)| {
            let stays = ahead.is_emptied() && !ahead.kept_paused && (ahead.paused_at, *other) < (vm.paused_at, id);
            stays && self.missing(*other).is_some_and(|(_, at)| self.tree.is_within(vm.node, at))
        };
        let mut ahead: Vec<_> = self.vms.iter().filter(before).collect();
        ahead.sort_by_key(|(other, ahead)| (ahead.paused_at, *other));
        ahead
            .iter()
            .map(|(other, vm)| AheadView { vm: vm.name.clone(), bytes: self.comes_back(*other).bytes() })
            .collect()
    }

    /// Something may have changed for those that were emptied: they are looked at after this input.
    pub fn look_at_emptied(&mut self) {
        self.choices.look = Some(Instant::now());
    }

    /// The host had no memory for somebody: nobody goes on by itself for some time, whatever it says of itself.
    pub fn let_it_rest(&mut self) {
        self.choices.went_on = Some(Instant::now());
    }

    /// Lets one of those that were emptied go on, the first for whom there is room. Nobody overtakes another one who waits for
    /// the same limit.
    pub fn resume_emptied(&mut self) {
        let now = Instant::now();
        let over = |at: Instant| at + host::scaled(RETURNS);
        if self.choices.look.take_if(|at| *at <= now).is_none() {
            return;
        }
        let emptied = self.vms.emptied();
        let next = self.choices.went_on.map(over).filter(|next| now < *next && !emptied.is_empty());
        if next.is_some() {
            self.choices.look = next;
            return;
        }
        let mut full = Vec::new();
        for id in emptied {
            let node = self.vms[&id].node;
            if full.iter().any(|at| self.tree.is_within(node, *at)) {
                continue;
            }
            if let Some(until) = self.choices.rests(node, now) {
                // What is free now the others take back first: it was taken from them.
                self.choices.look = Some(self.choices.look.map_or(until, |look| look.min(until)));
            } else if let Some((_, at)) = self.missing(id) {
                full.push(at);
            } else if self.pay(id) {
                (self.choices.went_on, self.choices.look) = (Some(now), Some(over(now)));
                return self.resume(id, "policy", None);
            }
        }
    }
}

/// The beginning of the list, for an event.
fn shown(ranked: &[Ranked<'_>]) -> Vec<String> {
    ranked.iter().take(SHOWN).map(ToString::to_string).collect()
}

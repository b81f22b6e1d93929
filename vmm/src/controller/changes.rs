//! Changes of limits while VMs run: of one VM, of a group, or of many of both in one transaction.
//!
//! The decisions are `memcg_core::limit_change`'s; here is what surrounds them: accounting begins where there is none
//! yet, the stocks are recalled, so that pages that no guest uses are not counted against the request; the balloons and
//! the workers learn of the new aim; and whoever asked gets one answer in time:
//!
//! ```text
//!  request ─► accounting ─► recall ─► begin ─┬─ in force ──────────────────────► 200
//!               begins                       ├─ refused ───────────────────────► 409, nothing has changed
//!                                            └─ pending ─┬─ in force everywhere ► 200
//!                                                        ├─ wait_ms is over ───► 202, goes on
//!                                                        ├─ deadline ──────────► 409 limit_not_reached, old limits
//!                                                        └─ later request ─────► 409 superseded
//! ```
//!
//! A request for one node is a request for many, with one. What a group is to give is given by the VMs below it: the
//! stocks of all of them are recalled, and their balloons are aimed by `squeeze.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use memcg_core::limit_change::{LimitChange, Mode, Request, State, slack};
use memcg_core::reclaim;
use memcg_core::tree::{LimitPatch, NodeId, SetLimitError};
use memcg_core::units::{Limit, Pages, human};
use serde_json::json;
use tokio::time::Instant;

use super::Controller;
use super::actor::{Actor, answer};
use super::error::{Code, Refusal};
use super::events::EventKind;
use super::host;
use super::journal::{Entry, NodeLimits};
use super::view::{LimitsView, VmView};
use super::vm::{Reply, VmId};
use crate::worker::protocol::ToWorker;

/// How long usage may take to fall below a new limit.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// A change that is asked for.
#[derive(Clone, Copy, Debug)]
pub struct MemoryChange {
    /// The new limits.
    pub patch: LimitPatch,
    /// What to do when usage is above the new `max`.
    pub mode: Mode,
    /// Whether accounting is to be on. A limit turns it on by itself, and nothing turns it off.
    pub track: Option<bool>,
    /// How long the client waits for it, [`DEADLINE`] when it does not say.
    pub wait: Option<Duration>,
}

/// A change that was accepted.
#[derive(Clone, Debug)]
pub struct Changed<View = VmView> {
    /// It is in force; otherwise it still waits for memory to be given back.
    pub in_force: bool,
    /// What was changed, after it.
    pub view: View,
}

/// Limits of one VM or one group in a transaction.
#[derive(Clone, Debug)]
pub struct NodeChange {
    named: Named,
    patch: LimitPatch,
    track: Option<bool>,
}

/// A target as a client names it.
#[derive(Clone, Debug)]
enum Named {
    Vm(String),
    Group(String),
}

impl NodeChange {
    /// Of the VM with this name. Mode and wait of `change` are those of the transaction.
    pub fn vm(name: &str, change: &MemoryChange) -> Self {
        Self { named: Named::Vm(name.to_owned()), patch: change.patch, track: change.track }
    }

    /// Of the group with this path.
    pub fn group(path: &str, change: &MemoryChange) -> Self {
        Self { named: Named::Group(path.to_owned()), patch: change.patch, track: change.track }
    }
}

impl Controller {
    /// Changes limits of many nodes: all of it, or nothing. Completes like [`Self::change`].
    ///
    /// # Errors
    /// See [`Code`]; nothing has changed then, at any of them.
    pub async fn change_many(
        &self,
        nodes: Vec<NodeChange>,
        mode: Mode,
        wait: Option<Duration>,
    ) -> Result<Changed<LimitsView>, Refusal> {
        self.ask(move |actor, reply| {
            let parts: Result<Vec<Part>, Refusal> = nodes.iter().map(|node| actor.part(node)).collect();
            let parts = match parts {
                Ok(parts) => parts,
                Err(refusal) => return answer(reply, Err(refusal)),
            };
            let targets: Vec<_> = parts.iter().map(|part| part.target).collect();
            let done = move |actor: &mut Actor, result: Result<bool, Refusal>| {
                answer(reply, result.map(|in_force| Changed { in_force, view: actor.limits_view(in_force, &targets) }));
            };
            actor.change_all(parts, mode, wait, Box::new(done));
        })
        .await
    }
}

/// What has limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Target {
    /// A VM.
    Vm(VmId),
    /// A group, or the root.
    Group(NodeId),
}

/// One node of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub target: Target,
    pub patch: LimitPatch,
    pub track: Option<bool>,
}

/// Tells whoever asked: true when it is in force.
type Done = Box<dyn FnOnce(&mut Actor, Result<bool, Refusal>) + Send>;

/// A change that is asked for, as long as it has not begun.
pub(super) struct Requested {
    parts: Vec<Part>,
    mode: Mode,
    wait: Option<Duration>,
    until: Instant,
    done: Done,
}

/// A client that waits.
struct Waiter {
    until: Instant,
    done: Done,
}

/// A change that waits for memory to be given back.
pub(super) struct Change {
    pending: LimitChange,
    parts: Vec<Part>,
    deadline: Instant,
    waiters: Vec<Waiter>,
    /// Recalls that are not yet answered.
    recalls: BTreeMap<VmId, u32>,
}

impl Change {
    /// When it is given up.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether it is about `memory.max` of a target.
    pub fn names(&self, target: Target) -> bool {
        self.parts.iter().any(|part| part.target == target && part.patch.max.is_some())
    }

    /// When something has to be done about it.
    pub fn next_deadline(&self) -> Instant {
        self.waiters.iter().map(|waiter| waiter.until).fold(self.deadline, Instant::min)
    }
}

impl Actor {
    /// Finds what a client names.
    fn part(&self, node: &NodeChange) -> Result<Part, Refusal> {
        let target = match &node.named {
            Named::Vm(name) => Target::Vm(self.find_alive(name)?),
            Named::Group(path) => Target::Group(self.find_group(path)?),
        };
        Ok(Part { target, patch: node.patch, track: node.track })
    }

    fn limits_view(&self, in_force: bool, targets: &[Target]) -> LimitsView {
        let mut view = LimitsView { in_force, ..LimitsView::default() };
        for target in targets {
            match target {
                Target::Vm(id) => view.vms.push(self.vm_view(*id, false)),
                Target::Group(node) => view.groups.push(self.group_view(*node)),
            }
        }
        view
    }

    /// Takes a request of one client for one VM.
    pub fn change(&mut self, id: VmId, change: MemoryChange, reply: Reply<Changed>) {
        let MemoryChange { patch, mode, track, wait } = change;
        let done: Done = Box::new(move |actor, result| {
            answer(reply, result.map(|in_force| Changed { in_force, view: actor.vm_view(id, false) }));
        });
        self.change_all(vec![Part { target: Target::Vm(id), patch, track }], mode, wait, done);
    }

    /// Takes a request for any number of nodes: all of it, or nothing.
    pub fn change_all(&mut self, parts: Vec<Part>, mode: Mode, wait: Option<Duration>, done: Done) {
        let until = Instant::now() + wait.unwrap_or_else(|| host::scaled(DEADLINE));
        if let Err(refusal) = self.can_remember() {
            return done(self, Err(refusal));
        }
        self.request(Requested { parts, mode, wait, until, done });
    }

    /// Tests a request, begins accounting where it needs that, and recalls the stocks when they could be in the way.
    fn request(&mut self, requested: Requested) {
        let unaccounted = match self.check_request(&requested.parts, requested.mode) {
            Ok(unaccounted) => unaccounted,
            Err(refusal) => return (requested.done)(self, Err(refusal)),
        };
        if !unaccounted.is_empty() {
            self.account_first(&unaccounted, move |actor, result| match result {
                Err((id, refusal)) if actor.is_alive(id) => (requested.done)(actor, Err(refusal)),
                // One that has ended needs no account; if it was named itself, the request is refused.
                _ => actor.request(requested),
            });
            return;
        }
        self.track_groups(&requested.parts);
        let lowered = |part: &&Part| {
            part.patch.max.is_some_and(|max| Limit::Pages(self.tree.usage(self.node_of(part.target))) > max)
        };
        let lowered: Vec<_> = requested.parts.iter().filter(lowered).map(|part| part.target).collect();
        if lowered.is_empty() {
            return self.begin(requested);
        }
        if requested.mode == Mode::Reclaim
            && let Some(same) = self.changes.iter_mut().find(|change| same_parts(&change.parts, &requested.parts))
        {
            // Asked for already: wait together.
            same.waiters.push(Waiter { until: requested.until, done: requested.done });
            return;
        }
        let vms: BTreeSet<_> = lowered.into_iter().flat_map(|target| self.vms_of(target)).collect();
        self.recall(&vms.into_iter().collect::<Vec<_>>(), move |actor| actor.begin(requested));
    }

    /// Whether a request can be made. Returns the VMs that have to be accounted first.
    fn check_request(&self, parts: &[Part], mode: Mode) -> Result<Vec<VmId>, Refusal> {
        let mut unaccounted = BTreeSet::new();
        let mut named = BTreeSet::new();
        for part in parts {
            self.check_there(part.target)?;
            let node = self.node_of(part.target);
            if !named.insert(node) {
                return Err(self.refusal(&SetLimitError::NamedTwice { path: self.tree.path(node) }));
            }
            let limited = match self.tree.check_patch(node, &part.patch) {
                Ok(()) => node == self.root && part.patch.limits_something(),
                Err(SetLimitError::NotAccounted { .. }) => true,
                Err(error) => return Err(self.refusal(&error)),
            };
            if part.track == Some(false) && (self.tracked(part.target) || limited) {
                let what = self.describe(part.target);
                let message = format!("{what} is accounted for as long as it runs: track=off is not possible");
                return Err(Refusal::new(Code::WrongState, message));
            }
            let wanted = limited || part.track == Some(true);
            if wanted && let Target::Group(node) = part.target {
                self.check_nobody_is_being_made(node)?;
            }
            let vms = self.vms_of(part.target).into_iter();
            unaccounted
                .extend(vms.filter(|id| wanted && !self.vms[id].accounted() || self.vms[id].awaits_accounting()));
        }
        if mode == Mode::Reclaim {
            self.check_floor(parts)?;
        }
        self.check_patches(&parts.iter().map(|part| (self.node_of(part.target), part.patch)).collect::<Vec<_>>())?;
        Ok(unaccounted.into_iter().collect())
    }

    /// Turns the accounting of groups on whose VMs are all accounted.
    fn track_groups(&mut self, parts: &[Part]) {
        for part in parts {
            let Target::Group(node) = part.target else { continue };
            if part.track == Some(true) || part.patch.limits_something() {
                self.track_group(node);
            }
        }
    }

    /// The stocks are back, or will not come: begin.
    fn begin(&mut self, requested: Requested) {
        // Time has passed since it was tested.
        if let Err(refusal) = self.check_request(&requested.parts, requested.mode) {
            return (requested.done)(self, Err(refusal));
        }
        let Requested { mut parts, mode, wait, until, done } = requested;
        let deadline = host::scaled(DEADLINE).max(wait.unwrap_or_default());
        let requests: Vec<_> = parts.iter().map(|part| self.limit_request(part)).collect();
        let before: Vec<_> = requests.iter().map(|request| self.tree.generation(request.node)).collect();
        let now = self.elapsed();
        match LimitChange::begin(&mut self.tree, &requests, mode, now, deadline) {
            Err(error) => {
                let refusal = self.refusal(&error);
                done(self, Err(refusal));
            }
            Ok(change) if change.state() == State::Committed => {
                self.drop_superseded();
                let changed: Vec<_> = parts.iter().zip(before).collect();
                let changed = changed
                    .into_iter()
                    .filter(|(part, generation)| self.tree.generation(self.node_of(part.target)) != *generation);
                let changed: Vec<_> = changed.map(|(part, _)| part.target).collect();
                self.limits_changed(&changed);
                done(self, Ok(true));
            }
            Ok(pending) => {
                self.drop_superseded();
                for part in &mut parts {
                    part.patch.if_generation = None;
                }
                // Who waits for all that time hears how it ended: the recall has taken some of it.
                let whole = wait.is_none_or(|wait| wait >= host::scaled(DEADLINE));
                let deadline = Instant::now() + deadline;
                let waiters = vec![Waiter { until: if whole { deadline } else { until }, done }];
                self.changes.push(Change {
                    pending,
                    parts: parts.clone(),
                    deadline,
                    waiters,
                    recalls: BTreeMap::new(),
                });
                for Part { target, patch, .. } in parts {
                    if let Some(max) = patch.max {
                        let wanted = json!({ "max_pending_bytes": max.as_bytes() });
                        self.target_event(EventKind::LimitRequested, target, wanted);
                    }
                    self.tell(target);
                }
            }
        }
    }

    fn limit_request(&self, part: &Part) -> Request {
        let slack = self.vms_of(part.target).iter().map(|id| slack(self.vms[id].cpus)).sum();
        let margin = part.patch.max.map_or(Pages::ZERO, |max| self.margin(part.target, max));
        Request { node: self.node_of(part.target), patch: part.patch, slack, margin }
    }

    /// Everybody below learns of other limits: the workers of their room, the guests of their balloons.
    pub fn tell(&mut self, target: Target) {
        if let Target::Group(node) = target {
            self.squeeze(node);
        }
        self.look_soon(target);
        for id in self.vms_of(target) {
            self.vms.get_mut(&id).expect("listed").grant_due = true;
            // Before anything is granted under a higher limit.
            self.aim_backstop(id);
            self.aim_balloon(id);
        }
    }

    /// Tells the clients of changes that a later one has replaced.
    fn drop_superseded(&mut self) {
        let now = self.elapsed();
        let tree = &mut self.tree;
        let superseded = |change: &mut Change| change.pending.on_usage(tree, now) == State::Superseded;
        let superseded: Vec<_> = self.changes.extract_if(.., superseded).collect();
        let refusal = Refusal::new(Code::Superseded, "a later change of memory.max took this one's place");
        for waiter in superseded.into_iter().flat_map(|change| change.waiters) {
            (waiter.done)(self, Err(refusal.clone()));
        }
    }

    /// Drives every pending change.
    pub fn advance_changes(&mut self) {
        let mut at = 0;
        while at < self.changes.len() {
            // One that has ended is no longer there, and the next one is in its place.
            at += usize::from(self.advance(at));
        }
    }

    /// Looks at a pending change again; false when it has ended.
    fn advance(&mut self, at: usize) -> bool {
        let now = self.elapsed();
        let parts: Vec<_> = self.changes[at].parts.iter().map(|part| (part.target, part.patch)).collect();
        let is_there = |(target, _): &(Target, LimitPatch)| self.check_there(*target).is_ok();
        let mut ceilings = Vec::new();
        if parts.iter().all(is_there) {
            for (target, patch) in &parts {
                let node = self.node_of(*target);
                let margin = patch.max.map_or(Pages::ZERO, |max| self.margin(*target, max));
                self.changes[at].pending.set_margin(node, margin);
                ceilings.push(self.tree.snapshot(node).ceiling);
            }
        }
        match self.changes[at].pending.on_usage(&mut self.tree, now) {
            State::Pending => {
                for ((target, _), ceiling) in parts.into_iter().zip(ceilings) {
                    if self.tree.snapshot(self.node_of(target)).ceiling != ceiling {
                        for id in self.vms_of(target) {
                            self.vms.get_mut(&id).expect("listed").grant_due = true;
                        }
                    }
                }
                self.recall_last(at);
                true
            }
            State::Committed => {
                let change = self.changes.swap_remove(at);
                self.limits_changed(&change.parts.iter().map(|part| part.target).collect::<Vec<_>>());
                for waiter in change.waiters {
                    (waiter.done)(self, Ok(true));
                }
                false
            }
            State::NotReached => {
                let change = self.changes.swap_remove(at);
                self.not_reached(change);
                false
            }
            State::Superseded => {
                self.drop_superseded();
                false
            }
        }
    }

    /// The deadline of a change is over, and the old limits stay.
    fn not_reached(&mut self, change: Change) {
        let short: Vec<_> = change.pending.nodes().iter().filter(|part| !part.reached).collect();
        let say = |node: NodeId, usage: Pages| {
            let (path, max) = (self.tree.path(node), self.tree.limits(node).max);
            format!("{path} uses {} and its memory.max is still {max}", human(usage.bytes()))
        };
        let said: Vec<_> = short.iter().map(|part| say(part.node, part.usage)).collect();
        let parts = change.parts.iter().zip(change.pending.nodes()).filter(|(_, node)| !node.reached);
        let stuck: Vec<_> = parts.map(|(part, _)| part.target).filter(|target| self.is_stuck(*target)).collect();
        let advice = if stuck.is_empty() { "wait longer with --wait".to_owned() } else { self.no_more(&stuck) };
        let said = said.join(", ");
        let message = format!("not enough memory was given back in time: {said}; {advice}, or use --mode force");
        let mut refusal = Refusal::new(Code::LimitNotReached, message);
        if let Some(part) = short.first() {
            refusal = refusal.usage(part.usage.bytes()).generation(self.tree.generation(part.node));
        }
        // The ceilings are gone.
        self.roomier = true;
        for (part, node) in change.parts.iter().zip(change.pending.nodes()) {
            if part.patch.max.is_some() {
                let lowest = json!({ "lowest_bytes": node.lowest.bytes() });
                self.target_event(EventKind::LimitNotReached, part.target, lowest);
            }
            self.tell(part.target);
        }
        for waiter in change.waiters {
            (waiter.done)(self, Err(refusal.clone()));
        }
    }

    /// Recalls stocks when they alone keep a pending change from being in force.
    fn recall_last(&mut self, at: usize) {
        let vms = &self.vms;
        let unanswered =
            |id: &VmId, seq: &mut u32| vms.get(id).is_some_and(|vm| vm.alive() && vm.report.answers != Some(*seq));
        let change = &mut self.changes[at];
        change.recalls.retain(unanswered);
        let short: Vec<_> = change.pending.nodes().iter().map(|part| (part.new, part.reached)).collect();
        let targets: Vec<_> = change.parts.iter().map(|part| part.target).collect();
        for (target, (new, reached)) in targets.into_iter().zip(short) {
            let below = self.vms_of(target);
            let stock = |id: &VmId| self.vms[id].report.stock + self.vms[id].in_flight();
            let stocks: u64 = below.iter().map(stock).sum();
            let usage = self.tree.usage(self.node_of(target)).saturating_sub(Pages(stocks));
            if reached || Limit::Pages(usage) > new {
                continue;
            }
            let holders: Vec<_> = below.into_iter().filter(|id| stock(id) > 0).collect();
            for id in holders {
                let vm = self.vms.get_mut(&id).expect("listed");
                if !self.changes[at].recalls.contains_key(&id) && vm.alive() {
                    let seq = vm.next_seq();
                    // One that was not sent is not waited for: the next report is the next chance.
                    if vm.send(ToWorker::Recall { seq }) {
                        self.changes[at].recalls.insert(id, seq);
                    }
                }
            }
        }
    }

    /// How far below a new `max` usage must be before that is in force early: as far as the balloons aim, unless they
    /// are there already. A guest without a balloon driver gives nothing, so there is nothing to wait for; nor is there
    /// where its worker can make room by itself, because then the driver need not find any below `max`.
    fn margin(&self, target: Target, max: Limit) -> Pages {
        let (Limit::Pages(new), Limit::Pages(high)) = (max, reclaim::effective_high(Limit::Max, max)) else {
            return Pages::ZERO;
        };
        let giving = |id: &VmId| {
            let vm = &self.vms[id];
            let aim = match target {
                Target::Vm(_) => self.balloon_within(*id, Limit::Pages(high)),
                Target::Group(_) => self.balloon_target(*id),
            };
            let evicts = self.leases(*id).swap > 0 && !vm.report.cold.stuck;
            vm.report.balloon_ready && !evicts && u64::from(vm.report.balloon_actual) < aim.0
        };
        if self.vms_of(target).iter().any(giving) { new.saturating_sub(high) } else { Pages::ZERO }
    }

    /// A guest is held below the limit in force, by the ceiling of a change that needs it to run.
    pub fn widen_changes(&mut self, node: NodeId) {
        let above: Vec<_> = self.tree.ancestry(node).collect();
        for change in &mut self.changes {
            for at in &above {
                change.pending.widen(*at);
            }
        }
    }

    /// Ends what is overdue: the changes themselves, and the waiting of clients that do not want to wait longer.
    pub fn overdue_changes(&mut self, now: Instant) {
        self.advance_changes();
        let late =
            |change: &mut Change| change.waiters.extract_if(.., |waiter| waiter.until <= now).collect::<Vec<_>>();
        let late: Vec<_> = self.changes.iter_mut().flat_map(late).collect();
        for waiter in late {
            (waiter.done)(self, Ok(false));
        }
    }

    /// A VM has ended: the changes that name it can no longer be in force wholly.
    pub fn abandon_changes(&mut self, id: VmId, why: &Refusal) {
        let named = |change: &mut Change| change.parts.iter().any(|part| part.target == Target::Vm(id));
        for change in self.changes.extract_if(.., named).collect::<Vec<_>>() {
            change.pending.cancel(&mut self.tree);
            for waiter in change.waiters {
                (waiter.done)(self, Err(why.clone()));
            }
            self.roomier = true;
            for part in change.parts.iter().filter(|part| part.target != Target::Vm(id)) {
                self.tell(part.target);
            }
        }
    }

    /// Limits have come into force, all at once: that is remembered, and everybody concerned learns of it.
    fn limits_changed(&mut self, targets: &[Target]) {
        if targets.is_empty() {
            return;
        }
        self.roomier = true;
        let nodes = targets.iter().map(|target| self.limits_of(*target)).collect();
        self.remember(Entry::Limits { nodes });
        for target in targets {
            self.say_limits_changed(*target);
        }
    }

    /// The limits of a target, to be remembered.
    fn limits_of(&self, target: Target) -> NodeLimits {
        let at = self.node_of(target);
        let node = match target {
            Target::Vm(id) => self.vms[&id].name.clone(),
            Target::Group(_) => self.tree.path(at),
        };
        NodeLimits { node, generation: self.tree.generation(at), limits: self.tree.limits(at).into() }
    }

    fn say_limits_changed(&mut self, target: Target) {
        let counters = self.tree.snapshot(self.node_of(target));
        let limits = counters.limits;
        let details = json!({
            "generation": counters.generation,
            "min_bytes": limits.min.as_bytes(),
            "low_bytes": limits.low.as_bytes(),
            "high_bytes": limits.high.as_bytes(),
            "swap_max_bytes": limits.swap_max.as_bytes(),
            "store_max_bytes": limits.store_max.as_bytes(),
            "vmm_max_bytes": limits.vmm_max.as_bytes(),
            "overcharge_bytes": counters.overcharge.bytes(),
        });
        self.target_event(EventKind::LimitChanged, target, details);
        self.tell(target);
    }

    /// What the interface says about a change that was refused.
    pub fn refusal(&self, error: &SetLimitError) -> Refusal {
        let (code, path) = match error {
            SetLimitError::AboveMax { path, .. } => (Code::InvalidLimit, Some(path)),
            SetLimitError::Stale { path, .. } => (Code::GenerationMismatch, Some(path)),
            SetLimitError::NotAccounted { path } => (Code::NotAccounted, Some(path)),
            SetLimitError::VmmBelowUsage { path, .. } => (Code::LimitBelowUsage, Some(path)),
            SetLimitError::BelowUsage { above } => (Code::LimitBelowUsage, above.first().map(|above| &above.path)),
            SetLimitError::NamedTwice { .. } => (Code::BadRequest, None),
        };
        let refusal = Refusal::new(code, error.to_string());
        match path.and_then(|path| self.tree.find(path)) {
            Some(node) => refusal.usage(self.tree.usage(node).bytes()).generation(self.tree.generation(node)),
            None => refusal,
        }
    }
}

/// Whether two requests ask for the same.
fn same_parts(one: &[Part], other: &[Part]) -> bool {
    let same = |(one, other): (&Part, &Part)| {
        one.target == other.target && one.patch == LimitPatch { if_generation: None, ..other.patch }
    };
    one.len() == other.len() && one.iter().zip(other).all(same)
}

//! Groups: VMs that share limits, under paths such as `/gold/web`.
//!
//! ```text
//!  /            the host: its memory.max is the budget
//!  ├── gold     a group: limits for everything below it together
//!  │   ├── web  a group in a group, /gold/web
//!  │   │   └── w1   a VM; found by its name alone, so names of VMs are unique on the host
//!  │   └── db   a VM
//!  └── ci       a VM without a group
//! ```
//!
//! A group is a node of the tree and nothing else: no process, no directory. What it is charged is what is charged
//! below it. It goes when nothing is in it; while charges of VMs that have ended are not back it is shown as dying, and
//! its path is free.
//!
//! **The root** is a group that is always there. Its `memory.max` is the budget of the host, and can be changed like any
//! other limit; the first limit there begins the account of all VMs, and of all that are made later.

use std::collections::BTreeMap;

use memcg_core::protection::{Protection, protections};
use memcg_core::tree::{self, AddError, MAX_LEVELS, NodeId, RemoveError, Tree};
use memcg_core::units::{Limit, Pages};
use serde_json::{Value, json};

use super::actor::{Actor, answer};
use super::changes::{Changed, MemoryChange, Part, Target};
use super::error::{Code, Refusal};
use super::events::{EventKind, Subject, merged};
use super::journal::Entry;
use super::view::{CounterView, GroupMemoryView, GroupView, MemoryEvents};
use super::vm::{Reply, VmId};
use super::{Controller, VmState};

/// Groups that there may be. Each costs the controller a node, and every listing a line.
const MOST: usize = 1024;

/// Levels of groups below the root: a VM is one more.
pub(super) const DEEPEST: usize = MAX_LEVELS - 2;

/// What can be asked of a group by a name behind its path. No group is called like that.
pub const REQUESTS: [&str; 2] = ["move", "reclaim"];

/// A path of a group in its one form: `/`, or `/` before every name.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn path(text: &str) -> Result<String, Refusal> {
    let wrong = |what: String| Refusal::new(Code::BadRequest, what);
    let Some(names) = text.strip_prefix('/') else {
        return Err(wrong(format!("{text:?} is not the path of a group: write for example /gold or /gold/web")));
    };
    if names.is_empty() {
        return Ok("/".to_owned());
    }
    if names.split('/').count() > DEEPEST {
        return Err(wrong(format!("the path of a group has at most {DEEPEST} names, this has more: {text:?}")));
    }
    if let Some(name) = names.split('/').find(|name| REQUESTS.contains(name)) {
        return Err(wrong(format!("the path {text:?}: no group is called {name:?}: /groups/PATH/{name} is a request")));
    }
    let mut tree = Tree::new(Limit::Max);
    for name in names.split('/') {
        tree.add(tree.root(), name).or_else(|error| match error {
            AddError::Exists(_) => Ok(tree.root()),
            error => Err(wrong(format!("the path {text:?}: {error}"))),
        })?;
    }
    Ok(text.to_owned())
}

/// The path of the group that this one is in, and its name. `None` for the root.
pub fn split(path: &str) -> Option<(&str, &str)> {
    let (parent, name) = path.rsplit_once('/')?;
    (!name.is_empty()).then_some((if parent.is_empty() { "/" } else { parent }, name))
}

/// What becomes of `path` when the group `from` is at `to`; `None` for one that is not in it.
pub fn moved(path: &str, from: &str, to: &str) -> Option<String> {
    let rest = path.strip_prefix(from).filter(|rest| rest.is_empty() || rest.starts_with('/'))?;
    Some(format!("{to}{rest}"))
}

impl Controller {
    /// Makes a group with limits. True: it is new; false: it is there, and its limits are these.
    ///
    /// # Errors
    /// A bad path, a parent that does not exist, another node of this name, limits that contradict each other or do not
    /// fit, a group that exists with other limits.
    pub async fn put_group(&self, path: &str, change: MemoryChange) -> Result<(bool, GroupView), Refusal> {
        let path = path.to_owned();
        self.ask(move |actor, reply| answer(reply, actor.put_group(&path, &change))).await
    }

    /// All groups, the root first, those that are dying too.
    ///
    /// # Errors
    /// See [`Self::host`].
    pub async fn groups(&self) -> Result<Vec<GroupView>, Refusal> {
        self.ask(|actor, reply| answer(reply, Ok(actor.group_views()))).await
    }

    /// One group.
    ///
    /// # Errors
    /// A bad path, or there is none.
    pub async fn group(&self, path: &str) -> Result<GroupView, Refusal> {
        let path = path.to_owned();
        self.ask(move |actor, reply| answer(reply, actor.find_group(&path).map(|node| actor.group_view(node)))).await
    }

    /// Changes limits of a group; see [`Self::change`].
    ///
    /// # Errors
    /// See [`Code`].
    pub async fn change_group(&self, path: &str, change: MemoryChange) -> Result<Changed<GroupView>, Refusal> {
        let path = path.to_owned();
        self.ask(move |actor, reply| match actor.find_group(&path) {
            Ok(node) => actor.change_group(node, change, reply),
            Err(refusal) => answer(reply, Err(refusal)),
        })
        .await
    }

    /// Removes a group with nothing in it.
    ///
    /// # Errors
    /// When there is none, or something is in it.
    pub async fn remove_group(&self, path: &str) -> Result<(), Refusal> {
        let path = path.to_owned();
        self.ask(move |actor, reply| answer(reply, actor.remove_group(&path))).await
    }
}

impl Actor {
    fn put_group(&mut self, path: &str, change: &MemoryChange) -> Result<(bool, GroupView), Refusal> {
        let path = self::path(path)?;
        self.can_remember()?;
        if let Ok(node) = self.find_group(&path) {
            let limits = self.tree.limits(node);
            let track = change.track.is_none_or(|track| track == self.tracked(Target::Group(node)));
            if change.patch.apply(limits) == limits && track {
                return Ok((false, self.group_view(node)));
            }
            let message = format!("the group {path} exists with other limits: `ballast group set {path}` changes them");
            return Err(Refusal::new(Code::AlreadyExists, message));
        }
        if self.groups.len() >= MOST {
            return Err(Refusal::new(Code::WrongState, format!("there are {MOST} groups: remove one first")));
        }
        let (parent, name) = split(&path).expect("the root exists");
        let above = self.group_for(parent)?;
        let limited = change.patch.limits_something();
        if limited && change.track == Some(false) {
            let message = "track=off contradicts a limit: without accounting there are none";
            return Err(Refusal::new(Code::InvalidLimit, message));
        }
        let on = limited || change.track == Some(true) || self.accounts(above);
        let accounting = if on { tree::Accounting::On } else { tree::Accounting::Off };
        let node = self.tree.add_with(above, name, &change.patch, accounting).map_err(|error| match error {
            AddError::Exists(_) => Refusal::new(Code::AlreadyExists, format!("a VM is at {path}: choose another name")),
            AddError::Limits(error) => self.refusal(&error),
            error => Refusal::new(Code::WrongState, error.to_string()),
        })?;
        if let Err(refusal) = self.check_place(node, above) {
            self.tree.remove(node).expect("it is new");
            return Err(refusal);
        }
        self.groups.insert(node);
        self.remember(Entry::Group { path: path.clone(), accounting: on, limits: self.tree.limits(node).into() });
        let view = self.group_view(node);
        self.event_of(EventKind::Created, Subject::Group(&path), json!({ "max_bytes": view.memory.max_bytes }));
        Ok((true, view))
    }

    fn change_group(&mut self, node: NodeId, change: MemoryChange, reply: Reply<Changed<GroupView>>) {
        let MemoryChange { patch, mode, track, wait } = change;
        let part = Part { target: Target::Group(node), patch, track };
        let done = move |actor: &mut Self, result: Result<bool, Refusal>| {
            answer(reply, result.map(|in_force| Changed { in_force, view: actor.group_view(node) }));
        };
        self.change_all(vec![part], mode, wait, Box::new(done));
    }

    fn remove_group(&mut self, path: &str) -> Result<(), Refusal> {
        let node = self.find_group(path)?;
        if node == self.root {
            return Err(Refusal::new(Code::WrongState, "the root cannot be removed"));
        }
        let path = self.tree.path(node);
        // What is charged to it is on its way back from VMs that have ended.
        let removed = match self.tree.remove(node) {
            Err(RemoveError::Charged { .. }) => self.tree.set_offline(node),
            removed => removed,
        };
        removed.map_err(|_| {
            let view = self.group_view(node);
            let message = format!(
                "{path} has members ({} VMs, {} groups below): remove or move them first",
                view.vms, view.groups
            );
            Refusal::new(Code::NotEmpty, message)
        })?;
        let gone = Refusal::new(Code::NotFound, format!("the group {path} was removed meanwhile"));
        self.abandon_reclaims(Target::Group(node), &gone);
        self.reap();
        self.remember(Entry::GroupGone { path: path.clone() });
        self.event_of(EventKind::Removed, Subject::Group(&path), json!({}));
        Ok(())
    }

    /// Frees the nodes of groups that nothing is left of. That of a VM goes when its last view has been taken.
    pub fn reap(&mut self) {
        self.groups.retain(|node| self.tree.contains(*node));
        let mut dying: Vec<_> = self.groups.iter().copied().filter(|node| !self.tree.is_online(*node)).collect();
        // Members before what they are in.
        dying.sort_by_key(|node| std::cmp::Reverse(self.tree.ancestry(*node).count()));
        for node in dying {
            if self.tree.remove(node).is_ok() {
                self.groups.remove(&node);
            }
        }
        self.pressures.prune(&self.tree);
    }

    /// The group with this path.
    pub fn find_group(&self, path: &str) -> Result<NodeId, Refusal> {
        let path = self::path(path)?;
        let node = self.tree.find(&path).filter(|node| *node == self.root || self.groups.contains(node));
        node.ok_or_else(|| Refusal::new(Code::NotFound, format!("there is no group {path} here")))
    }

    /// The group that something is to be put into.
    pub fn group_for(&self, path: &str) -> Result<NodeId, Refusal> {
        self.find_group(path).map_err(|refusal| match refusal.code {
            Code::NotFound => {
                let message = format!("there is no group {path}: `ballast group create {path}` makes it");
                Refusal::new(Code::NoSuchGroup, message)
            }
            _ => refusal,
        })
    }

    /// Whether a VM of this name runs, or is being made.
    pub fn is_taken(&self, name: &str) -> bool {
        self.vms.running(name).is_some() || self.created.values().any(|created| created.spec.name == name)
    }

    /// Whether what is made in a group is accounted from the start.
    pub fn accounts(&self, group: NodeId) -> bool {
        self.everything_tracked || (group != self.root && self.tree.accounting(group) == tree::Accounting::On)
    }

    /// Whether a target is accounted; of the root, whether all VMs are.
    pub fn tracked(&self, target: Target) -> bool {
        match target {
            Target::Vm(id) => self.vms.get(&id).is_some_and(super::vm::Vm::accounted),
            Target::Group(node) if node == self.root => self.everything_tracked,
            Target::Group(node) => self.tree.accounting(node) == tree::Accounting::On,
        }
    }

    /// The node of a target that is there.
    pub fn node_of(&self, target: Target) -> NodeId {
        match target {
            Target::Vm(id) => self.vms[&id].node,
            Target::Group(node) => node,
        }
    }

    /// A VM that can be talked to.
    pub fn is_alive(&self, id: VmId) -> bool {
        self.vms.get(&id).is_some_and(super::vm::Vm::alive)
    }

    /// # Errors
    /// When the target is gone.
    pub fn check_there(&self, target: Target) -> Result<(), Refusal> {
        match target {
            Target::Vm(id) if self.is_alive(id) => Ok(()),
            Target::Vm(id) => {
                let name = self.vms.get(&id).map_or("", |vm| vm.name.as_str());
                Err(Refusal::new(Code::WrongState, format!("the VM {name:?} has ended")))
            }
            Target::Group(node) if self.tree.contains(node) && self.tree.is_online(node) => Ok(()),
            Target::Group(_) => Err(Refusal::new(Code::NotFound, "the group was removed meanwhile")),
        }
    }

    /// The VMs that a target consists of, as far as they can be talked to.
    pub fn vms_of(&self, target: Target) -> Vec<VmId> {
        match target {
            Target::Vm(id) => Vec::from_iter(self.is_alive(id).then_some(id)),
            Target::Group(node) => {
                let inside = self.vms.iter().filter(|(_, vm)| vm.alive() && self.tree.is_within(vm.node, node));
                inside.map(|(id, _)| id).collect()
            }
        }
    }

    /// A VM without a process yet cannot be told to begin its account.
    pub fn check_nobody_is_being_made(&self, group: NodeId) -> Result<(), Refusal> {
        let made = self.created.values().find(|made| !made.spec.accounting && self.tree.is_within(made.node, group));
        match made {
            Some(made) => {
                Err(Refusal::new(Code::Busy, format!("the VM {:?} is being started: try again", made.spec.name)))
            }
            None => Ok(()),
        }
    }

    /// A target in a sentence.
    pub fn describe(&self, target: Target) -> String {
        match target {
            Target::Vm(id) => format!("the VM {:?}", self.vms[&id].name),
            Target::Group(node) => format!("the group {}", self.tree.path(node)),
        }
    }

    /// An event of a target, with its numbers.
    pub fn target_event(&mut self, kind: EventKind, target: Target, more: Value) {
        match target {
            Target::Vm(id) => {
                let (name, details) = (self.vms[&id].name.clone(), self.account(id, more));
                self.event(kind, Some(&name), details);
            }
            Target::Group(node) => {
                let counters = self.tree.snapshot(node);
                let details = json!({
                    "usage_bytes": counters.memory.usage.bytes(),
                    "max_bytes": counters.limits.max.as_bytes(),
                });
                let path = self.tree.path(node);
                self.event_of(kind, Subject::Group(&path), merged(details, more));
            }
        }
    }

    pub fn group_views(&self) -> Vec<GroupView> {
        let groups: Vec<_> = self.groups.iter().copied().collect();
        let mut views = self.views([self.root].into_iter().chain(groups));
        views.sort_by(|a, b| a.path.cmp(&b.path));
        views
    }

    /// A group as the interface shows it.
    pub fn group_view(&self, node: NodeId) -> GroupView {
        self.views([node]).remove(0)
    }

    /// Groups as they are now, in the order of `nodes`.
    pub fn views(&self, nodes: impl IntoIterator<Item = NodeId>) -> Vec<GroupView> {
        let protections = protections(&self.tree, self.root).into_iter();
        let protections: BTreeMap<_, _> = protections.map(|at| (at.id, at.protection)).collect();
        let running = self.vms.iter().filter(|(_, vm)| vm.state != VmState::Ended).map(|(_, vm)| vm.node);
        let vms = self.count_above(running.chain(self.created.values().map(|created| created.node)));
        let groups = self.count_above(self.groups.iter().copied().filter(|group| self.tree.is_online(*group)));
        let of = |counts: &BTreeMap<NodeId, usize>, node| counts.get(&node).copied().unwrap_or_default();
        let view = |node| {
            let view = self.view(node, protections.get(&node).copied().unwrap_or_default());
            GroupView { vms: of(&vms, node), groups: of(&groups, node), ..view }
        };
        nodes.into_iter().map(view).collect()
    }

    /// For each node above one of `nodes`, how many of them are below it.
    fn count_above(&self, nodes: impl Iterator<Item = NodeId>) -> BTreeMap<NodeId, usize> {
        let mut counts = BTreeMap::new();
        for above in nodes.flat_map(|node| self.tree.ancestry(node).skip(1)) {
            *counts.entry(above).or_default() += 1;
        }
        counts
    }

    fn view(&self, group: NodeId, protection: Protection) -> GroupView {
        let node = self.tree.snapshot(group);
        let counter = |counter: tree::CounterSnapshot, max: Limit| CounterView {
            current_bytes: counter.usage.bytes(),
            peak_bytes: counter.peak.bytes(),
            max_bytes: max.as_bytes(),
        };
        GroupView {
            path: self.tree.path(group),
            dying: !node.online,
            generation: node.generation,
            accounting: self.tracked(Target::Group(group)),
            vms: 0,
            groups: 0,
            memory: GroupMemoryView {
                current_bytes: node.memory.usage.bytes(),
                peak_bytes: node.memory.peak.bytes(),
                returning_bytes: node.returning.bytes(),
                store_bytes: node.store.usage.bytes(),
                min_bytes: node.limits.min.as_bytes(),
                low_bytes: node.limits.low.as_bytes(),
                high_bytes: node.limits.high.as_bytes(),
                max_bytes: node.limits.max.as_bytes(),
                store_max_bytes: node.limits.store_max.as_bytes(),
                max_pending_bytes: node.max_pending.and_then(Limit::as_bytes),
                ceiling_bytes: node.ceiling.map(Pages::bytes),
                overcharge_bytes: node.overcharge.bytes(),
                effective_min_bytes: protection.min.bytes(),
                effective_low_bytes: protection.low.bytes(),
                events: MemoryEvents::new(node.events, node.memory.failcnt),
                events_local: MemoryEvents::new(node.events_local, node.memory.failcnt),
            },
            vmm: counter(node.vmm, node.limits.vmm_max),
            swap: counter(node.swap, node.limits.swap_max),
            reclaim: self.reclaim_view(Target::Group(group)),
            pressure: self.pressure_view(group),
        }
    }

    /// Begins the account of a group whose VMs are accounted already, and remembers it.
    pub fn track_group(&mut self, node: NodeId) {
        if self.tracked(Target::Group(node)) {
            return;
        }
        self.everything_tracked |= node == self.root;
        let charged = self.tree.activate(node, |_| Pages::ZERO);
        charged.expect("no page is charged");
        self.remember(Entry::Tracked { group: self.tree.path(node) });
    }

    /// The nearest group at or above `group` because of which everything in it is accounted.
    pub fn limit_above(&self, group: NodeId) -> String {
        if group == self.root { "the host".to_owned() } else { self.tree.path(group) }
    }
}

//! `GET /vms/{name}/why`: what has become of a VM's memory, and why, in sentences; and the facts that they are made of.
//!
//! The actor gathers [`Facts`], all of one moment: what is known of the VM and of the groups that it is in, the events of both
//! and of the host, and the decisions that concerned it. A pure function makes sentences of them:
//!
//! ```text
//!  events, decisions ─► past.rs ─► what happened, oldest first ─┐
//!  views             ─► now.rs  ─► how it is, what would help ──┴─► at most LINES sentences
//! ```
//!
//! A story is that of one VM: it begins where this one was made, not another of its name before it. It reaches back as far as
//! the controller's events do, and says what it does not know. Of a VM that was removed there is what its events tell.

mod now;
mod past;
#[cfg(test)]
mod tests;

use std::fmt;

use memcg_core::units::human;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Controller;
use super::actor::{Actor, answer};
use super::error::Refusal;
use super::events::{self, Event, EventKind};
use super::oom_log::DecisionView;
use super::shortage::ShortageView;
use super::view::{GroupView, VmView};

/// Most sentences of a story.
pub const LINES: usize = 20;

/// A VM's memory story, and beside it the keys of `Facts`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WhyView {
    /// It in sentences: first what happened, oldest first, then how it is now, then what would help.
    pub story: Vec<Sentence>,
    /// What they are made of.
    #[serde(flatten)]
    pub facts: Facts,
}

/// One sentence of a story.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Sentence {
    /// When that was, in milliseconds since 1970; absent of what is so now.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub time_ms: Option<u64>,
    /// The sentence.
    pub text: String,
}

/// What a story is made of, of one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Facts {
    /// Name of the VM.
    pub name: String,
    /// When they were gathered, in milliseconds since 1970.
    pub now_ms: u64,
    /// The VM; absent when it was removed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vm: Option<VmView>,
    /// The groups that it is in, the innermost first, `/` last.
    pub groups: Vec<GroupView>,
    /// Whether the host runs short of memory; `null` where nobody watches that.
    pub shortage: Option<ShortageView>,
    /// What happened to it, to its groups while it was in them, and to the host, as far as that is kept.
    pub events: Vec<Event>,
    /// Decisions in which it was chosen, or could have been.
    pub decisions: Vec<DecisionView>,
}

/// The sentences, at most [`LINES`].
pub fn story(facts: &Facts) -> Vec<Sentence> {
    let now = now::sentences(facts);
    let mut story = past::sentences(facts, LINES.saturating_sub(now.len()));
    story.extend(now.into_iter().map(|text| Sentence { time_ms: None, text }));
    story
}

/// An amount for people.
fn size(bytes: u64) -> String {
    human(bytes)
}

/// How long ago something was, for people.
pub fn ago(ms: u64) -> String {
    format!("{} ago", lasting(ms))
}

/// A time that has passed, in a unit in which it has few digits.
fn lasting(ms: u64) -> String {
    match ms {
        0..1_000 => format!("{ms} ms"),
        1_000..10_000 => format!("{:.1} s", ms as f64 / 1e3),
        10_000..120_000 => format!("{} s", ms / 1_000),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        7_200_000..172_800_000 => format!("{} h", ms / 3_600_000),
        _ => format!("{} days", ms / 86_400_000),
    }
}

/// Whose limit something is: the VM's own, or that of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Limited<'a> {
    /// The VM itself.
    Own,
    /// The group at this path.
    Group(&'a str),
}

impl<'a> Limited<'a> {
    /// Of what has this path, in the story that is told. A group may have the VM's name, and the VM may have been elsewhere.
    fn of(path: &'a str, facts: &Facts) -> Self {
        let is_group = path == "/" || facts.groups.iter().any(|group| group.path == path);
        let is_own = !is_group && path.rsplit('/').next() == Some(&facts.name);
        if is_own { Self::Own } else { Self::Group(path) }
    }
}

impl fmt::Display for Limited<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Own => f.write_str("its own memory.max"),
            Self::Group("/") => f.write_str("the budget of the host"),
            Self::Group(path) => write!(f, "memory.max of {path}"),
        }
    }
}

impl Controller {
    /// The memory story of a VM: one that runs, has ended, or was removed so lately that events tell of it.
    ///
    /// # Errors
    /// When nothing is known of this name.
    pub async fn why(&self, name: &str) -> Result<WhyView, Refusal> {
        let (vm, unknown) = match self.show(name).await {
            Ok(vm) => (Some(vm), None),
            Err(refusal) => (None, Some(refusal)),
        };
        let name = name.to_owned();
        self.ask(move |actor, reply| {
            let facts = actor.facts(name, vm);
            let known = facts.vm.is_some() || facts.events.iter().any(|event| event.vm.as_ref() == Some(&facts.name));
            // Of a worker that could not be taken over that is all there is to say, whatever was before.
            let refusal = unknown.filter(|_| !known || actor.strays.contains_key(&facts.name));
            answer(reply, refusal.map_or_else(|| Ok(WhyView { story: story(&facts), facts }), Err));
        })
        .await
    }
}

impl Actor {
    /// What is known of a VM, and how it is.
    fn facts(&mut self, name: String, vm: Option<VmView>) -> Facts {
        self.follow_decisions();
        let groups = vm.as_ref().map_or_else(Vec::new, |vm| self.groups_above(&vm.group));
        let events = past::of_vm(&self.events.after(0), &name, &groups);
        let began = events.iter().find(|event| event.event == EventKind::Created).map_or(0, |event| event.seq);
        let concerns = |decision: &&DecisionView| {
            let ranked = decision.ranked.iter().any(|entry| entry.vm == name);
            decision.event >= began && (ranked || decision.vm.as_ref() == Some(&name))
        };
        let decisions = self.decisions.iter().filter(concerns).cloned().collect();
        let shortage = self.shortage.as_ref().map(super::shortage::Shortage::view);
        Facts { name, now_ms: events::unix_ms(), vm, groups, shortage, events, decisions }
    }

    /// The group at `path` and those above it, as far as they are still there.
    fn groups_above(&self, path: &str) -> Vec<GroupView> {
        let node = self.tree.find(path).unwrap_or(self.root);
        self.views(self.tree.ancestry(node))
    }
}

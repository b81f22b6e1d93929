//! The rules by which somebody is chosen, as a table of small hosts that say what must come of them.
//!
//! A line is a host with its groups and VMs, what each VM does over time, and what has to be decided: who goes, by what, in
//! which order, when, and why, or that nobody does. `memcg-core/tests/core/sim.rs` plays all of them, and `ballast sim
//! --scenario ID` shows one. Amounts are MiB and times are seconds, so that a line can be played on real VMs, too.
//!
//! The hosts have 4 GiB: they are short below 204 MiB for a second, critical below 102 MiB, and somebody is chosen after five
//! seconds of that. VMs are killed and have no swap unless the line says otherwise, so that nothing but a choice helps.

mod table;

use std::time::Duration;

pub use table::RULES;

use super::host::Host;
use super::outcome::{Event, Outcome, What};
use super::setup::{Answers, Client, Group, Point, Setup, SetupError, Vm};
use crate::oom::Preference;
use crate::tree::LimitPatch;
use crate::units::{Limit, Pages};

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// What it is called.
    pub id: &'static str,
    /// The rule, in a sentence.
    pub says: &'static str,
    /// Memory of the host.
    pub memory: u64,
    /// Memory that is used outside of ballast: from when on, and how much.
    pub others: &'static [(u64, u64)],
    /// Groups: path, `memory.low` and `memory.max`; 0 and [`NONE`] for none.
    pub groups: &'static [(&'static str, u64, u64)],
    /// The VMs.
    pub vms: &'static [VmLine],
    /// Who is asked first: how long they are waited for, how long they take, and what they say.
    pub client: Option<(u64, u64, Says)>,
    /// How long it is played.
    pub seconds: u64,
    /// What has to be decided, in this order, and nothing else.
    pub expects: &'static [Expected],
}

/// No limit.
pub const NONE: u64 = u64::MAX;

/// A VM of the table.
#[derive(Clone, Copy, Debug)]
pub struct VmLine {
    /// Its name.
    pub name: &'static str,
    /// The group that it is in.
    pub group: &'static str,
    /// What it wants: when, how much, and how much of that it uses all the time.
    pub load: &'static [(u64, u64, u64)],
    /// `memory.min`.
    pub min: u64,
    /// `memory.low`.
    pub low: u64,
    /// `memory.max`.
    pub max: u64,
    /// It may be evicted.
    pub swaps: bool,
    /// It is paused when it is chosen, else killed.
    pub pauses: bool,
    /// Whether it is a candidate.
    pub preference: Preference,
    /// Lower goes first.
    pub priority: i32,
    /// It has a balloon driver.
    pub driver: bool,
    /// It does not die when it is killed.
    pub immortal: bool,
    /// It cannot be told to pause.
    pub deaf: bool,
    /// When a user ends it.
    pub ends: Option<u64>,
}

/// What a client says.
#[derive(Clone, Copy, Debug)]
pub enum Says {
    /// This one goes.
    Takes(&'static str),
    /// So much memory was freed outside of ballast.
    Frees(u64),
    /// Nobody goes.
    Ignores,
    /// It is there no more.
    Leaves,
}

/// Something that has to be decided.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Not before, and not after.
    pub between: (u64, u64),
    /// What.
    pub what: Decided,
}

/// What has to be decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decided {
    /// This VM is killed because of that level, and this is part of why.
    Kill(&'static str, &'static str, &'static str),
    /// This VM is paused because of that level, and this is part of why.
    Pause(&'static str, &'static str, &'static str),
    /// Nobody can be chosen at that level, and this is part of why. It may be said again.
    Nobody(&'static str, &'static str),
    /// A client wants nobody to go. It may be asked again.
    Spared(&'static str),
    /// This VM goes on.
    Resume(&'static str),
}

impl Rule {
    /// The line with this id.
    pub fn find(id: &str) -> Option<&'static Rule> {
        RULES.iter().find(|rule| rule.id == id)
    }

    /// The host of the line.
    pub fn setup(&self) -> Setup {
        let mut setup = Setup::new(self.id, Pages::from_mib(self.memory));
        setup.others = self.others.iter().map(|(at, mib)| (Duration::from_secs(*at), Pages::from_mib(*mib))).collect();
        let group = |(path, low, max): &(&str, u64, u64)| Group {
            path: (*path).to_owned(),
            limits: LimitPatch { low: Some(limit(*low)), max: Some(limit(*max)), ..LimitPatch::default() },
        };
        setup.groups = self.groups.iter().map(group).collect();
        setup.vms = self.vms.iter().map(VmLine::vm).collect();
        setup.client = self.client.map(|(wait, after, says)| Client {
            wait: Duration::from_secs(wait),
            after: Duration::from_secs(after),
            answer: match says {
                Says::Takes(name) => Answers::Takes(name.to_owned()),
                Says::Frees(mib) => Answers::Frees(Pages::from_mib(mib)),
                Says::Ignores => Answers::Ignores,
                Says::Leaves => Answers::Leaves,
            },
        });
        setup
    }

    /// Plays it.
    ///
    /// # Errors
    /// When the line describes no host.
    pub fn play(&self) -> Result<Outcome, SetupError> {
        Ok(Host::new(self.setup())?.run(Duration::from_secs(self.seconds), Duration::from_secs(1)))
    }

    /// Looks whether what came of it is what had to.
    ///
    /// # Errors
    /// A sentence about the first thing that is otherwise.
    pub fn verify(&self, outcome: &Outcome) -> Result<(), String> {
        let mut expects = self.expects.iter();
        let mut last: Option<Decided> = None;
        for Event { at, what } in &outcome.events {
            if last.is_some_and(|last| last.may_repeat() && last.is(what)) || !is_decision(what) {
                continue;
            }
            let seconds = at.as_secs_f64();
            let Some(expected) = expects.next() else {
                return Err(format!("{what:?} after {seconds} s is one too many"));
            };
            let (from, to) = expected.between;
            if !expected.what.is(what) || seconds < from as f64 || seconds > to as f64 {
                return Err(format!("{what:?} after {seconds} s, where {expected:?} had to be"));
            }
            last = Some(expected.what);
        }
        expects.next().map_or(Ok(()), |missing| Err(format!("{missing:?} did not come")))
    }

    /// The same for what was decided on real VMs, whose time is another: what had to come, and nothing else, in the same order. Two
    /// that may come at the same time may come in either.
    ///
    /// # Errors
    /// As [`Rule::verify`].
    pub fn verify_order<'a>(&self, decided: impl IntoIterator<Item = &'a What>) -> Result<(), String> {
        let mut left = self.expects.to_vec();
        let mut last: Option<Decided> = None;
        for what in decided {
            if last.is_some_and(|last| last.may_repeat() && last.is(what)) || !is_decision(what) {
                continue;
            }
            let Some(first) = left.first() else {
                return Err(format!("{what:?} is one too many"));
            };
            let (_, until) = first.between;
            let Some(at) = left.iter().position(|next| next.between.0 <= until && next.what.is(what)) else {
                return Err(format!("{what:?}, where {first:?} had to be"));
            };
            last = Some(left.remove(at).what);
        }
        left.first().map_or(Ok(()), |missing| Err(format!("{missing:?} did not come")))
    }
}

/// Whether an event is one of those that a line has to name.
fn is_decision(what: &What) -> bool {
    match what {
        What::Chosen { .. } | What::Nobody { .. } | What::Spared { .. } | What::Resumed { .. } => true,
        What::Short(_) | What::Calm | What::Asked { .. } | What::Refused { .. } => false,
    }
}

impl Decided {
    fn may_repeat(self) -> bool {
        matches!(self, Decided::Nobody(..) | Decided::Spared(_))
    }

    fn is(self, what: &What) -> bool {
        match (self, what) {
            (Decided::Kill(name, at, because), What::Chosen { level, vm, killed, why }) => {
                *killed && vm == name && level == at && why.contains(because)
            }
            (Decided::Pause(name, at, because), What::Chosen { level, vm, killed, why }) => {
                !killed && vm == name && level == at && why.contains(because)
            }
            (Decided::Nobody(at, because), What::Nobody { level, why }) => level == at && why.contains(because),
            (Decided::Spared(at), What::Spared { level }) => level == at,
            (Decided::Resume(name), What::Resumed { vm }) => vm == name,
            _ => false,
        }
    }
}

/// A limit of so many MiB.
fn limit(mib: u64) -> Limit {
    if mib == NONE { Limit::Max } else { Limit::Pages(Pages::from_mib(mib)) }
}

impl VmLine {
    /// The VM of the line.
    fn vm(&self) -> Vm {
        let point = |(at, footprint, hot): &(u64, u64, u64)| Point {
            at: Duration::from_secs(*at),
            footprint: Pages::from_mib(*footprint),
            hot: Pages::from_mib(*hot),
        };
        Vm {
            group: self.group.to_owned(),
            limits: LimitPatch {
                min: Some(limit(self.min)),
                low: Some(limit(self.low)),
                max: Some(limit(self.max)),
                swap_max: Some(if self.swaps { Limit::Max } else { Limit::ZERO }),
                ..LimitPatch::default()
            },
            kill: !self.pauses,
            preference: self.preference,
            priority: self.priority,
            driver: self.driver,
            immortal: self.immortal,
            deaf: self.deaf,
            ends: self.ends.map(Duration::from_secs),
            load: self.load.iter().map(point).collect(),
            ..Vm::new(self.name)
        }
    }
}

//! What is simulated.

use std::time::Duration;

use crate::host::Terms;
use crate::ladder;
use crate::oom::Preference;
use crate::spread;
use crate::tree::{AddError, LimitPatch};
use crate::units::{Limit, Pages};

/// How a need is spread: what the controller does, and what it could do instead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// As the controller does it: by what each VM has above its protection, idle memory first.
    #[default]
    Proportional,
    /// By what each has above its protection, idle or not.
    NoIdleTax,
    /// All that the VMs of the lowest priority have above their protection, before those of the next are asked.
    PriorityOnly,
}

impl Policy {
    /// All of them.
    pub const ALL: [Policy; 3] = [Policy::Proportional, Policy::NoIdleTax, Policy::PriorityOnly];

    /// As people write it.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Proportional => "proportional",
            Policy::NoIdleTax => "no-idle-tax",
            Policy::PriorityOnly => "priority-only",
        }
    }

    /// The terms on which a need is spread.
    pub(super) fn terms(self) -> spread::Terms {
        match self {
            Policy::Proportional | Policy::PriorityOnly => ladder::SPREAD,
            Policy::NoIdleTax => spread::Terms { idle_tax: 0 },
        }
    }
}

/// One host with all that happens to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    /// For people.
    pub name: String,
    /// The host's memory.
    pub memory: Pages,
    /// What all VMs together may use.
    pub budget: Limit,
    /// When the host is short.
    pub terms: Terms,
    /// Memory that is used outside of ballast: so much from that moment on, in order.
    pub others: Vec<(Duration, Pages)>,
    /// Groups, each after the one that it is in.
    pub groups: Vec<Group>,
    /// The VMs.
    pub vms: Vec<Vm>,
    /// Somebody who wants to be asked before anybody is chosen.
    pub client: Option<Client>,
    /// How a need is spread.
    pub policy: Policy,
}

impl Setup {
    /// A host with so much memory, and nothing on it.
    pub fn new(name: &str, memory: Pages) -> Setup {
        Setup {
            name: name.to_owned(),
            memory,
            budget: Limit::Max,
            terms: Terms::new(memory),
            others: Vec::new(),
            groups: Vec::new(),
            vms: Vec::new(),
            client: None,
            policy: Policy::default(),
        }
    }
}

/// A group of VMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Its path, such as `/gold`.
    pub path: String,
    /// Its limits.
    pub limits: LimitPatch,
}

/// A VM, and what it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// The group that it is in, `/` for none.
    pub group: String,
    /// Its limits.
    pub limits: LimitPatch,
    /// Its shares: who has twice as many gives half as much.
    pub shares: u32,
    /// What it costs beside its pages.
    pub overhead: Pages,
    /// Whether it is killed when it is chosen, else paused.
    pub kill: bool,
    /// Whether it is a candidate.
    pub preference: Preference,
    /// Among those of one preference the lower goes first.
    pub priority: i32,
    /// How long it may be held before somebody is chosen.
    pub deadline: Duration,
    /// What an evicted page leaves in the store, in thousandths of a page.
    pub shrinks: u32,
    /// Part of its cold memory that it touches in a minute, in thousandths.
    pub wanders: u32,
    /// What it frees goes back to the host by itself (free page reporting).
    pub reports: bool,
    /// It has a balloon driver, which gives what is free.
    pub driver: bool,
    /// It does not end when it is killed.
    pub immortal: bool,
    /// It cannot be told to pause.
    pub deaf: bool,
    /// When a user ends it.
    pub ends: Option<Duration>,
    /// What it wants, by its own time. Between two points it grows and shrinks evenly; after the last it stays as it is.
    pub load: Vec<Point>,
}

impl Vm {
    /// A VM that wants nothing.
    pub fn new(name: &str) -> Vm {
        Vm {
            name: name.to_owned(),
            group: "/".to_owned(),
            limits: LimitPatch::default(),
            shares: spread::DEFAULT_SHARES,
            overhead: Pages::ZERO,
            kill: false,
            preference: Preference::None,
            priority: 0,
            deadline: Duration::from_secs(5),
            shrinks: 350,
            wanders: 0,
            reports: false,
            driver: false,
            immortal: false,
            deaf: false,
            ends: None,
            load: Vec::new(),
        }
    }
}

/// What a guest wants at a moment of its own time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Point {
    /// The moment.
    pub at: Duration,
    /// All that it has a use for.
    pub footprint: Pages,
    /// What of it is in use all the time.
    pub hot: Pages,
}

/// A client that wants to decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// How long it is waited for.
    pub wait: Duration,
    /// How long it takes to answer.
    pub after: Duration,
    /// What it answers.
    pub answer: Answers,
}

/// What a client answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answers {
    /// That this VM goes, by what it is to be done with it.
    Takes(String),
    /// That there is more memory, because it has ended work of so many pages outside of ballast.
    Frees(Pages),
    /// That nothing is to be done.
    Ignores,
    /// Nothing: it is there no more.
    Leaves,
}

/// Why something cannot be simulated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// There is no group of this path before what is in it.
    #[error("there is no group {0}: name each group before what is in it")]
    NoGroup(String),
    /// A group or a VM that cannot be.
    #[error("{path}: {why}")]
    Bad {
        /// What of.
        path: String,
        /// Why.
        why: AddError,
    },
}

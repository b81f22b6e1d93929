//! What has become of a host.

use std::time::Duration;

use crate::host::Sign;
use crate::units::Pages;

/// What has become of one host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Everything together.
    pub sums: Sums,
    /// What was decided, in order.
    pub events: Vec<Event>,
    /// The host from time to time.
    pub samples: Vec<Sample>,
    /// The VMs, in the order of the setup.
    pub vms: Vec<VmOutcome>,
}

/// What all VMs of a host have given and lost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Memory that eviction has freed.
    pub evicted: Pages,
    /// Memory that balloons have given.
    pub given: Pages,
    /// Pages that came back from swap.
    pub refaulted: Pages,
    /// Time that VMs waited for memory, added up.
    pub stalled: Duration,
    /// Time that VMs stood still, added up.
    pub paused: Duration,
    /// VMs that were paused.
    pub pauses: u64,
    /// VMs that were killed.
    pub kills: u64,
    /// Time in which the host had no page left for somebody who wanted one: the kernel would have had reason to kill.
    pub exhausted: Duration,
}

impl Sums {
    /// Those of two hosts together.
    #[must_use]
    pub fn and(self, other: Sums) -> Sums {
        Sums {
            evicted: self.evicted + other.evicted,
            given: self.given + other.given,
            refaulted: self.refaulted + other.refaulted,
            stalled: self.stalled + other.stalled,
            paused: self.paused + other.paused,
            pauses: self.pauses + other.pauses,
            kills: self.kills + other.kills,
            exhausted: self.exhausted + other.exhausted,
        }
    }
}

/// The host at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// The moment.
    pub at: Duration,
    /// Memory that is left.
    pub available: Pages,
    /// Memory that is charged to VMs.
    pub used: Pages,
    /// Pages in swap.
    pub swapped: Pages,
    /// VMs that run, those that wait among them.
    pub running: u64,
    /// VMs that stand still.
    pub paused: u64,
    /// What has been until now.
    pub sums: Sums,
}

/// Something that was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub at: Duration,
    /// What.
    pub what: What,
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// The host is short.
    Short(Sign),
    /// It is not any more.
    Calm,
    /// A client was asked who is to go.
    Asked {
        /// Path of the level that has no room.
        level: String,
    },
    /// What a client answered cannot be done.
    Refused {
        /// Why.
        why: String,
    },
    /// A client has said that nobody goes.
    Spared {
        /// Path of the level that has no room.
        level: String,
    },
    /// A VM was chosen.
    Chosen {
        /// Path of the level that had no room.
        level: String,
        /// The VM.
        vm: String,
        /// It was killed, else paused.
        killed: bool,
        /// Why this one: its line in the list.
        why: String,
    },
    /// Nobody could be chosen.
    Nobody {
        /// Path of the level that has no room.
        level: String,
        /// Why.
        why: String,
    },
    /// A VM that was paused goes on.
    Resumed {
        /// The VM.
        vm: String,
    },
}

/// What has become of one VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmOutcome {
    /// Its name.
    pub name: String,
    /// How far it has got in its own time.
    pub lived: Duration,
    /// How far it would have got alone.
    pub wanted: Duration,
    /// It was killed by the policy.
    pub killed: bool,
    /// It stands still at the end.
    pub paused: bool,
    /// Memory that is charged to it at the end.
    pub usage: Pages,
}

impl VmOutcome {
    /// Part of the time it wanted that it got, 1 for one that wanted none.
    pub fn got(&self) -> f64 {
        if self.wanted.is_zero() { 1.0 } else { self.lived.as_secs_f64() / self.wanted.as_secs_f64() }
    }
}

/// How evenly VMs got what they wanted, by Jain's index: 1 when all got the same part of it, 1 / n when one got all.
pub fn fairness<'a>(vms: impl IntoIterator<Item = &'a VmOutcome>) -> f64 {
    let (mut count, mut sum, mut squares) = (0.0, 0.0, 0.0);
    for got in vms.into_iter().map(VmOutcome::got) {
        (count, sum, squares) = (count + 1.0, sum + got, squares + got * got);
    }
    if squares == 0.0 { 1.0 } else { sum * sum / (count * squares) }
}

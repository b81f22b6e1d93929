//! One counter, and the three of a node.

use super::charge::{Kind, Mode};
use crate::units::Pages;

/// One counter of one node at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CounterSnapshot {
    /// Pages charged here and below.
    pub usage: Pages,
    /// Pages charged to this very node: usage without its children's.
    pub own: Pages,
    /// Highest usage since the start or the last reset.
    pub peak: Pages,
    /// [`Mode::Wait`] charges that this level refused, once each, since the start or the last reset.
    pub failcnt: u64,
    /// [`Mode::NoRetry`] charges (batches ahead of need) that this level refused.
    pub batch_misses: u64,
    /// [`Mode::NoWait`] charges that this level refused.
    pub would_block: u64,
    /// [`Mode::NoFail`] charges that went above the limit of this level.
    pub forced: u64,
    /// Uncharges that asked for more than was charged. Anything but 0 is a bug.
    pub underflows: u64,
}

impl CounterSnapshot {
    /// Counts a refusal here.
    pub(super) fn refuse(&mut self, mode: Mode) {
        match mode {
            Mode::Wait => self.failcnt += 1,
            Mode::NoWait => self.would_block += 1,
            Mode::NoRetry => self.batch_misses += 1,
            Mode::Again => {}
            Mode::NoFail => self.forced += 1,
        }
    }
}

/// Which of the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    Vmm,
    Memory,
    Swap,
}

impl Kind {
    /// The counters that a charge of this kind moves, the one that cannot be reclaimed first (row 81).
    pub(super) fn counters(self) -> &'static [Which] {
        match self {
            Kind::Guest => &[Which::Memory],
            Kind::Overhead => &[Which::Vmm, Which::Memory],
            Kind::Swap => &[Which::Swap],
        }
    }
}

/// The counters of a node.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    pub memory: CounterSnapshot,
    pub vmm: CounterSnapshot,
    pub swap: CounterSnapshot,
}

impl Counters {
    pub fn get(&self, which: Which) -> &CounterSnapshot {
        match which {
            Which::Vmm => &self.vmm,
            Which::Memory => &self.memory,
            Which::Swap => &self.swap,
        }
    }

    pub fn get_mut(&mut self, which: Which) -> &mut CounterSnapshot {
        match which {
            Which::Vmm => &mut self.vmm,
            Which::Memory => &mut self.memory,
            Which::Swap => &mut self.swap,
        }
    }

    /// True when nothing is charged here or below.
    pub fn is_free(&self) -> bool {
        self.memory.usage.is_zero() && self.vmm.usage.is_zero() && self.swap.usage.is_zero()
    }

    /// True when nothing is charged to this very node.
    pub fn is_free_of_own(&self) -> bool {
        self.memory.own.is_zero() && self.vmm.own.is_zero() && self.swap.own.is_zero()
    }
}

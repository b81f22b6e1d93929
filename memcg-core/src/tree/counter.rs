//! One counter, and the four of a node.

use std::fmt;

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
    #[inline]
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

/// Which of a node's counters, hence which limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Counter {
    /// Everything in memory (U): guest pages, overhead, store.
    Memory,
    /// Overhead (K), in memory too.
    Vmm,
    /// Compressed content of evicted pages, in memory too.
    Store,
    /// Evicted pages (S), counted at their full size.
    Swap,
}

impl Counter {
    /// All of them.
    pub const ALL: [Counter; 4] = [Counter::Memory, Counter::Vmm, Counter::Store, Counter::Swap];
}

impl fmt::Display for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Counter::Memory => "memory",
            Counter::Vmm => "vmm",
            Counter::Store => "store",
            Counter::Swap => "swap",
        })
    }
}

/// What overhead of the VMM is for (row 98). It is charged before the thing exists, and refused without reclaim: it
/// cannot be reclaimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Overhead {
    /// A vCPU: its thread, stack and KVM's state.
    Vcpu,
    /// A queue of a device.
    Queue,
    /// The frame table and whatever else is kept for each page (row 11).
    FrameRecords,
    /// Page tables that map guest memory.
    PageTables,
    /// The worker process itself.
    Worker,
}

impl Overhead {
    /// All of them.
    pub const ALL: [Overhead; 5] =
        [Overhead::Vcpu, Overhead::Queue, Overhead::FrameRecords, Overhead::PageTables, Overhead::Worker];
}

/// What the overhead of one very node consists of; its parts add up to [`CounterSnapshot::own`] of vmm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OverheadParts([Pages; Overhead::ALL.len()]);

impl OverheadParts {
    /// Pages of one type.
    #[inline]
    pub fn get(&self, overhead: Overhead) -> Pages {
        self.0[overhead as usize]
    }

    /// Every type with its pages.
    pub fn iter(&self) -> impl Iterator<Item = (Overhead, Pages)> + '_ {
        Overhead::ALL.into_iter().map(|overhead| (overhead, self.get(overhead)))
    }
}

impl Kind {
    /// The counters that a charge of this kind moves, the one that cannot be reclaimed first (row 81).
    #[inline]
    pub(super) fn counters(self) -> &'static [Counter] {
        match self {
            Kind::Guest => &[Counter::Memory],
            Kind::Overhead(_) => &[Counter::Vmm, Counter::Memory],
            Kind::Store => &[Counter::Store, Counter::Memory],
            Kind::Swap => &[Counter::Swap],
        }
    }
}

/// The counters of a node.
#[derive(Clone, Debug, Default)]
pub(super) struct Counters {
    values: [CounterSnapshot; Counter::ALL.len()],
    pub parts: OverheadParts,
}

impl Counters {
    pub fn get(&self, which: Counter) -> &CounterSnapshot {
        &self.values[which as usize]
    }

    #[inline]
    pub fn get_mut(&mut self, which: Counter) -> &mut CounterSnapshot {
        &mut self.values[which as usize]
    }

    /// What is charged to this very node as `kind`.
    pub fn own(&self, kind: Kind) -> Pages {
        let own = |which| self.get(which).own;
        match kind {
            Kind::Guest => own(Counter::Memory).saturating_sub(own(Counter::Vmm)).saturating_sub(own(Counter::Store)),
            Kind::Overhead(overhead) => self.parts.get(overhead),
            Kind::Store => own(Counter::Store),
            Kind::Swap => own(Counter::Swap),
        }
    }

    /// Changes what is charged to this very node as `kind`: `change` gets each number that the kind is part of.
    #[inline]
    pub fn change_own(&mut self, kind: Kind, change: impl Fn(Pages) -> Pages) {
        for &which in kind.counters() {
            let own = &mut self.get_mut(which).own;
            *own = change(*own);
        }
        if let Kind::Overhead(overhead) = kind {
            let part = &mut self.parts.0[overhead as usize];
            *part = change(*part);
        }
    }

    /// True when nothing is charged here or below.
    pub fn is_free(&self) -> bool {
        self.values.iter().all(|counter| counter.usage.is_zero())
    }

    /// True when nothing is charged to this very node.
    pub fn is_free_of_own(&self) -> bool {
        self.values.iter().all(|counter| counter.own.is_zero())
    }
}

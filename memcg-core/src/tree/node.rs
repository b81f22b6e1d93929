//! One node, and the arithmetic of its counters and limits.

use super::counter::Counters;
use super::limits::Pending;
use super::{Accounting, Counter, Events, Limits, Mode, NodeId};
use crate::reclaim;
use crate::units::{Limit, Pages};

/// One node.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub name: String,
    pub parent: Option<NodeId>,
    pub children: Vec<NodeId>,
    /// Distance from the root.
    pub depth: usize,
    /// Childless nodes below this one, itself when it has no children: those who share its room.
    pub members: u32,
    pub online: bool,
    pub accounting: Accounting,
    pub counters: Counters,
    pub limits: Limits,
    /// A cap on memory while a lower `max` is pending.
    pub ceiling: Option<Pages>,
    pub pending: Option<Pending>,
    /// With [`super::Tree::set_returning`]: what of `returning` is its own.
    pub returning_own: Option<Pages>,
    /// Memory here and below that belongs to VMs that are gone.
    pub returning: Pages,
    /// Memory above `max`, from a forced change or a charge that could not be refused.
    pub overcharge: Pages,
    /// What happened here and below.
    pub events: Events,
    /// What happened here.
    pub events_local: Events,
    pub generation: u64,
}

impl Node {
    pub fn new(name: String, parent: Option<NodeId>, depth: usize) -> Node {
        Node {
            name,
            parent,
            children: Vec::new(),
            depth,
            members: 1,
            online: true,
            accounting: Accounting::Off,
            counters: Counters::default(),
            limits: Limits::default(),
            ceiling: None,
            pending: None,
            returning_own: None,
            returning: Pages::ZERO,
            overcharge: Pages::ZERO,
            events: Events::default(),
            events_local: Events::default(),
            generation: 0,
        }
    }

    /// The effective limit of one counter.
    pub fn limit(&self, which: Counter) -> Limit {
        match which {
            Counter::Memory => self.limits.max.min(self.ceiling.map_or(Limit::Max, Limit::Pages)),
            Counter::Vmm => self.limits.vmm_max,
            Counter::Store => self.limits.store_max,
            Counter::Swap => self.limits.swap_max,
        }
    }

    /// What could still be charged to one counter here, `None` without a limit.
    pub fn room(&self, which: Counter) -> Option<Pages> {
        self.limit(which).as_pages().map(|limit| limit.saturating_sub(self.counters.get(which).usage))
    }

    /// By how much `pages` would not fit. Without a limit only 64 bits are in the way.
    pub fn short(&self, which: Counter, pages: Pages) -> Option<Pages> {
        let usage = self.counters.get(which).usage;
        let room = self.room(which).unwrap_or(Pages(u64::MAX).saturating_sub(usage));
        (pages > room).then(|| pages.saturating_sub(room))
    }

    /// Brings the reported overcharge up to date after usage or limit moved.
    pub fn settle_overcharge(&mut self) {
        self.overcharge = match self.limits.max {
            Limit::Pages(max) => self.counters.get(Counter::Memory).usage.saturating_sub(max),
            Limit::Max => Pages::ZERO,
        };
    }

    /// Where background reclaim starts.
    pub fn high(&self) -> Limit {
        reclaim::effective_high(self.limits.high, self.limits.max)
    }

    /// Adds to one counter, which has room or is `forced`; then it is counted where it has none. True when memory went
    /// above the effective high limit with it: `high` is edge-triggered (row 115).
    pub fn raise(&mut self, which: Counter, pages: Pages, forced: bool) -> bool {
        if forced && self.short(which, pages).is_some() {
            self.counters.get_mut(which).refuse(Mode::NoFail);
        }
        let counter = self.counters.get_mut(which);
        let before = Limit::Pages(counter.usage);
        counter.usage += pages;
        counter.peak = counter.peak.max(counter.usage);
        let after = Limit::Pages(counter.usage);
        if which != Counter::Memory {
            return false;
        }
        self.settle_overcharge();
        let high = self.high();
        before <= high && after > high
    }

    /// Takes off one counter.
    pub fn lower(&mut self, which: Counter, pages: Pages) {
        let usage = &mut self.counters.get_mut(which).usage;
        *usage = usage.saturating_sub(pages);
        if which == Counter::Memory {
            self.settle_overcharge();
        }
    }
}

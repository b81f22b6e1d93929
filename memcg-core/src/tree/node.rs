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
    limits: Limits,
    ceiling: Option<Pages>,
    /// [`Node::limit`] of each counter, and [`Node::high`]: numbers that the walk of a charge compares. `u64::MAX`: none.
    caps: [Pages; Counter::ALL.len()],
    high_cap: Pages,
    pub pending: Option<Pending>,
    /// With [`super::Tree::set_returning`]: what of `returning` is its own.
    pub returning_own: Option<Pages>,
    /// Memory here and below that belongs to VMs that are gone.
    pub returning: Pages,
    /// Memory above `max`, from a forced change or a charge that could not be refused. Nothing else raises it, so that
    /// [`super::Tree::check`] finds a charge above `max` that should have been refused.
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
            caps: [Pages(u64::MAX); Counter::ALL.len()],
            high_cap: Pages(u64::MAX),
            pending: None,
            returning_own: None,
            returning: Pages::ZERO,
            overcharge: Pages::ZERO,
            events: Events::default(),
            events_local: Events::default(),
            generation: 0,
        }
    }

    /// The limits in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Puts limits in force, whatever usage is.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
        self.settle_caps();
        self.settle_overcharge();
    }

    /// The cap on memory while a lower `max` is pending.
    pub fn ceiling(&self) -> Option<Pages> {
        self.ceiling
    }

    /// Sets or lifts the cap.
    pub fn set_ceiling(&mut self, ceiling: Option<Pages>) {
        self.ceiling = ceiling;
        self.settle_caps();
    }

    fn settle_caps(&mut self) {
        self.caps = Counter::ALL.map(|which| cap(self.limit(which)));
        self.high_cap = cap(self.high());
    }

    /// The limit of one counter, a ceiling included.
    pub fn limit(&self, which: Counter) -> Limit {
        match which {
            Counter::Memory => self.limits.max.min(self.ceiling.map_or(Limit::Max, Limit::Pages)),
            Counter::Vmm => self.limits.vmm_max,
            Counter::Store => self.limits.store_max,
            Counter::Swap => self.limits.swap_max,
        }
    }

    /// Where background reclaim starts.
    pub fn high(&self) -> Limit {
        reclaim::effective_high(self.limits.high, self.limits.max)
    }

    /// What could still be charged to one counter here, `None` without a limit.
    pub fn room(&self, which: Counter) -> Option<Pages> {
        self.limit(which).as_pages().map(|limit| limit.saturating_sub(self.counters.get(which).usage))
    }

    /// By how much `pages` would not fit. Without a limit only 64 bits are in the way.
    #[inline]
    pub fn short(&self, which: Counter, pages: Pages) -> Option<Pages> {
        let room = self.caps[which as usize].saturating_sub(self.counters.get(which).usage);
        (pages > room).then(|| pages.saturating_sub(room))
    }

    /// Whether memory is above the effective high limit.
    #[inline]
    pub fn above_high(&self) -> bool {
        self.counters.get(Counter::Memory).usage > self.high_cap
    }

    /// Reports all that is above `max` as overcharge: by force, or because it could not be refused.
    fn settle_overcharge(&mut self) {
        self.overcharge = match self.limits.max {
            Limit::Pages(max) => self.counters.get(Counter::Memory).usage.saturating_sub(max),
            Limit::Max => Pages::ZERO,
        };
    }

    /// Adds to one counter, which has room or is `forced`; then it is counted where it has none. True when memory went
    /// above the effective high limit with it: `high` is edge-triggered (row 115).
    #[inline]
    pub fn raise(&mut self, which: Counter, pages: Pages, forced: bool) -> bool {
        if forced && self.short(which, pages).is_some() {
            self.counters.get_mut(which).refuse(Mode::NoFail);
        }
        let was_above = self.above_high();
        let counter = self.counters.get_mut(which);
        counter.usage += pages;
        counter.peak = counter.peak.max(counter.usage);
        if forced {
            self.settle_overcharge();
        }
        !was_above && self.above_high()
    }

    /// Takes off one counter.
    #[inline]
    pub fn lower(&mut self, which: Counter, pages: Pages) {
        let usage = &mut self.counters.get_mut(which).usage;
        *usage = usage.saturating_sub(pages);
        if !self.overcharge.is_zero() {
            self.settle_overcharge();
        }
    }
}

/// A limit as a charge asks for it.
fn cap(limit: Limit) -> Pages {
    limit.as_pages().unwrap_or(Pages(u64::MAX))
}

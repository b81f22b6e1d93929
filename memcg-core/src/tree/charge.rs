//! Charging and uncharging. A charge that is not yet used is a [`super::Reservation`].

use super::{Accounting, Counter, Event, MAX_LEVELS, NodeId, Overhead, Tree};
use crate::reclaim;
use crate::units::{Limit, Pages, human};

/// How strict a charge is, and what its refusal counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// For a guest's fault: refused at the limit, which counts in `failcnt`; the caller then reclaims, waits and tries
    /// [`Mode::Again`]. Only these may lead to a pause or kill.
    Wait,
    /// A [`Mode::Wait`] charge that has been refused before, hence counted: a further refusal counts nothing.
    Again,
    /// For device code: refused at the limit, the caller leaves that work for later (`WouldBlock`).
    NoWait,
    /// Ahead of need (stock, fault-around): refused at the limit, never a reason to reclaim.
    NoRetry,
    /// For teardown and what must not fail: never refused. What it leaves above a limit is reported as overcharge.
    NoFail,
}

/// What is charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Guest pages, and those charged ahead for them: memory.
    Guest,
    /// Overhead of the VMM: vmm and memory in one step.
    Overhead(Overhead),
    /// Compressed content of evicted pages, rounded up to pages: store and memory in one step.
    Store,
    /// Evicted pages: swap.
    Swap,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 8] = [
        Kind::Guest,
        Kind::Overhead(Overhead::Vcpu),
        Kind::Overhead(Overhead::Queue),
        Kind::Overhead(Overhead::FrameRecords),
        Kind::Overhead(Overhead::PageTables),
        Kind::Overhead(Overhead::Worker),
        Kind::Store,
        Kind::Swap,
    ];
}

/// Nodes that went above their high limit with one charge. No allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crossed {
    ids: [Option<NodeId>; MAX_LEVELS],
}

impl Crossed {
    pub(super) const NONE: Crossed = Crossed { ids: [None; MAX_LEVELS] };

    /// The nodes, the lowest first.
    pub fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.ids.iter().map_while(|id| *id)
    }

    /// True when no limit was crossed.
    pub fn is_empty(&self) -> bool {
        self.ids[0].is_none()
    }

    #[inline]
    pub(super) fn push(&mut self, id: NodeId) {
        // There is a place for every level.
        if let Some(free) = self.ids.iter_mut().find(|slot| slot.is_none()) {
            *free = Some(id);
        }
    }
}

/// A charge that was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "says which limits were crossed"]
pub struct Charge {
    /// Pages charged.
    pub pages: Pages,
    /// Nodes whose memory went above their effective high limit with this charge: wake their reclaim.
    pub crossed_high: Crossed,
    /// The lowest level whose limit the charge ignored; only with [`Mode::NoFail`].
    pub forced_at: Option<NodeId>,
}

/// A charge that was refused. Nothing has changed but one count of failures at `level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{counter}: {} in use of {limit}, short by {}", human(.usage.bytes()), human(.short_by.bytes()))]
pub struct Refused {
    /// The lowest node without room: reclaim, and the choice of a victim, are its subtree's affair alone.
    pub level: NodeId,
    /// The counter that has no room there. With [`Counter::Vmm`] reclaim does not help.
    pub counter: Counter,
    /// What that counter is now.
    pub usage: Pages,
    /// The limit in its way, a ceiling included. [`Limit::Max`]: it would leave 64 bits. An offline node refuses as if
    /// its usage were its limit.
    pub limit: Limit,
    /// Pages that did not fit there.
    pub short_by: Pages,
}

impl Tree {
    /// Charges `pages` of guest memory to `id` and all its ancestors, or none of them.
    ///
    /// # Errors
    /// [`Refused`] with the lowest level that has no room. [`Mode::NoFail`] is refused only if a counter would leave
    /// 64 bits.
    #[inline]
    pub fn try_charge(&mut self, id: NodeId, pages: Pages, mode: Mode) -> Result<Charge, Refused> {
        self.try_charge_as(id, Kind::Guest, pages, mode)
    }

    /// [`Self::try_charge`] for any kind. Overhead asks vmm at every level before it asks memory at any (row 81).
    ///
    /// # Errors
    /// As [`Self::try_charge`].
    pub fn try_charge_as(&mut self, id: NodeId, kind: Kind, pages: Pages, mode: Mode) -> Result<Charge, Refused> {
        let mut charge = Charge { pages, crossed_high: Crossed::NONE, forced_at: None };
        let node = self.node(id);
        if pages.is_zero() || node.accounting == Accounting::Off {
            return Ok(charge);
        }
        self.check_online(id, pages, mode)?;
        for &which in kind.counters() {
            let ignored = self.admit(id, which, pages, mode)?;
            charge.forced_at = charge.forced_at.or(ignored);
        }
        // Nothing can fail from here on.
        self.node_mut(id).counters.change_own(kind, |own| own + pages);
        let forced = charge.forced_at.is_some();
        let mut at = Some(id);
        while let Some(level) = at {
            let node = self.node_mut(level);
            at = node.parent;
            let mut crossed = false;
            for &which in kind.counters() {
                crossed |= node.raise(which, pages, forced);
            }
            if crossed {
                charge.crossed_high.push(level);
                self.record(level, Event::High);
            }
        }
        self.settle_returning(id);
        Ok(charge)
    }

    /// Charges as many guest pages as fit, at least `min` and at most `want`: what is wanted ahead of need shrinks,
    /// what faults wait for does not. With a `min` of zero this always succeeds, if only with zero pages, and getting none
    /// counts as a batch miss.
    ///
    /// # Errors
    /// [`Refused`] when not even `min` fits, counted by `mode`.
    pub fn charge_up_to(&mut self, id: NodeId, want: Pages, min: Pages, mode: Mode) -> Result<Charge, Refused> {
        let node = self.node(id);
        // Without a limit only the 64 bits of the root, which counts everything, are in the way.
        let bits = Pages(u64::MAX).saturating_sub(self.usage(self.root));
        let room = match (node.accounting, node.online) {
            (Accounting::Off, _) => want,
            (Accounting::On, true) => self.margin(id).map_or(bits, |margin| margin.min(bits)),
            (Accounting::On, false) => Pages::ZERO,
        };
        let pages = want.min(room).max(min);
        if pages.is_zero()
            && !want.is_zero()
            && let Some(level) = self.first_short(id, Counter::Memory, Pages::ONE)
        {
            self.count_refusal(level, Counter::Memory, Mode::NoRetry);
        }
        self.try_charge(id, pages, mode)
    }

    /// Charges what cannot be said whose it is: work without a VM's context. The root pays, so that nothing is used
    /// that is not counted, and how often that happened is counted too ([`super::TreeSnapshot::no_context`]).
    ///
    /// # Errors
    /// [`Refused`] only if a counter would leave 64 bits.
    pub fn charge_root(&mut self, kind: Kind, pages: Pages) -> Result<Charge, Refused> {
        let charge = self.try_charge_as(self.root, kind, pages, Mode::NoFail)?;
        self.no_context += 1;
        Ok(charge)
    }

    /// Takes `pages` of guest memory off `id` and all its ancestors. Never fails, never blocks.
    ///
    /// More than `id` itself is charged is a bug of the caller: it is clamped, counted, and stops a debug build.
    pub fn uncharge(&mut self, id: NodeId, pages: Pages) {
        self.uncharge_as(id, Kind::Guest, pages);
    }

    /// [`Self::uncharge`] for any kind.
    pub fn uncharge_as(&mut self, id: NodeId, kind: Kind, pages: Pages) {
        let node = self.node_mut(id);
        if node.accounting == Accounting::Off {
            return;
        }
        let real = pages.min(node.counters.own(kind));
        if real != pages {
            node.counters.get_mut(kind.counters()[0]).underflows += 1;
            debug_assert!(false, "uncharge of {pages} ({kind:?}) with {real} charged");
        }
        node.counters.change_own(kind, |own| own.saturating_sub(real));
        self.walk(id, |node| {
            for &which in kind.counters() {
                node.lower(which, real);
            }
        });
        self.settle_returning(id);
    }

    /// Of what is charged to `id` as guest memory, `pages` are overhead. Memory stays as it is; vmm rises at every level,
    /// whatever its limit: what was paid for is there already.
    ///
    /// More than there is of guest memory is a bug of the caller: it is clamped, counted, and stops a debug build.
    pub fn turn_into_overhead(&mut self, id: NodeId, overhead: Overhead, pages: Pages) {
        let node = self.node_mut(id);
        if node.accounting == Accounting::Off {
            return;
        }
        let real = pages.min(node.counters.own(Kind::Guest));
        if real != pages {
            node.counters.get_mut(Counter::Memory).underflows += 1;
            debug_assert!(false, "{pages} of overhead out of {real} of guest memory");
        }
        node.counters.change_own(Kind::Overhead(overhead), |own| own + real);
        let own = &mut node.counters.get_mut(Counter::Memory).own;
        *own = own.saturating_sub(real);
        self.walk(id, |node| {
            let forced = node.short(Counter::Vmm, real).is_some();
            // Only memory has a high limit to be crossed.
            let _ = node.raise(Counter::Vmm, real, forced);
        });
    }

    /// Takes everything off that is charged to `id` itself: its worker is gone and the memory is back. Returns the
    /// pages of memory that were charged.
    pub fn uncharge_all(&mut self, id: NodeId) -> Pages {
        let memory = self.node(id).counters.get(Counter::Memory).own;
        for kind in Kind::ALL {
            self.uncharge_as(id, kind, self.node(id).counters.own(kind));
        }
        memory
    }

    /// Guest memory that could be charged to `id` before the nearest limit of any ancestor is met, a ceiling included;
    /// `None` when there is no limit at all, and for what is not accounted.
    pub fn margin(&self, id: NodeId) -> Option<Pages> {
        if self.node(id).accounting == Accounting::Off {
            return None;
        }
        self.ancestry(id).filter_map(|at| self.node(at).room(Counter::Memory)).min()
    }

    /// [`Self::margin`] as the VM `id` is told it, which keeps a part of its room free by giving up pages of its own. Where
    /// that would be of what `min` promises it, or a group that it is in, the limits that it shares with others always
    /// leave it [`reclaim::HIGH_MARGIN`], for as much as it may know. `spare` pages of its usage nobody uses.
    pub fn room_to_keep(&self, id: NodeId, spare: Pages) -> Option<Pages> {
        if self.node(id).accounting == Accounting::Off {
            return None;
        }
        let mut is_promised = false;
        let room = |at: NodeId| {
            let room = self.node(at).room(Counter::Memory);
            let room = room.map(|room| if is_promised { room.max(reclaim::HIGH_MARGIN) } else { room });
            let keeps = reclaim::effective_high(Limit::Max, Limit::Pages(self.usage(at).saturating_sub(spare)));
            let min = self.limits(at).min;
            is_promised |= min != Limit::ZERO && keeps <= min;
            room
        };
        self.ancestry(id).filter_map(room).min()
    }

    /// Whose limit leaves `id` the least room, the nearest of those that leave the same; `None` as for [`Self::margin`].
    pub fn narrowest(&self, id: NodeId) -> Option<NodeId> {
        if self.node(id).accounting == Accounting::Off {
            return None;
        }
        let rooms = self.ancestry(id).filter_map(|at| Some((self.node(at).room(Counter::Memory)?, at)));
        rooms.min_by_key(|(room, _)| *room).map(|(_, at)| at)
    }

    /// The stock that the VM `id` may hold: at most 16 MiB, one eighth of its room, and its part of one eighth of each
    /// group's room ([`reclaim::stock_max`]).
    pub fn stock_max(&self, id: NodeId) -> Pages {
        let own = self.node(id).room(Counter::Memory);
        let part = |at: NodeId| {
            let node = self.node(at);
            reclaim::stock_max(None, node.room(Counter::Memory), node.members)
        };
        let groups = self.ancestry(id).skip(1).map(part).min().unwrap_or(reclaim::STOCK_CAP);
        reclaim::stock_max(own, None, 1).min(groups)
    }

    /// An offline node takes only what cannot be refused.
    #[inline]
    pub(super) fn check_online(&self, id: NodeId, pages: Pages, mode: Mode) -> Result<(), Refused> {
        let node = self.node(id);
        if node.online || mode == Mode::NoFail {
            return Ok(());
        }
        let usage = node.counters.get(Counter::Memory).usage;
        Err(Refused { level: id, counter: Counter::Memory, usage, limit: Limit::Pages(usage), short_by: pages })
    }

    /// Whether one counter has room for `pages` at every level; if not, the refusal is counted. [`Mode::NoFail`] gets
    /// the lowest level whose limit it ignores.
    #[inline]
    pub(super) fn admit(
        &mut self,
        id: NodeId,
        which: Counter,
        pages: Pages,
        mode: Mode,
    ) -> Result<Option<NodeId>, Refused> {
        let Some(level) = self.first_short(id, which, pages) else {
            return Ok(None);
        };
        if mode != Mode::NoFail {
            self.count_refusal(level, which, mode);
            return Err(self.refusal(level, which, pages));
        }
        self.check_bits(id, which, pages)?;
        Ok(Some(level))
    }

    /// The lowest level where `pages` do not fit.
    #[inline]
    fn first_short(&self, id: NodeId, which: Counter, pages: Pages) -> Option<NodeId> {
        self.ancestry(id).find(|at| self.node(*at).short(which, pages).is_some())
    }

    /// Says that `pages` do not fit at `level`.
    pub(super) fn refusal(&self, level: NodeId, counter: Counter, pages: Pages) -> Refused {
        let node = self.node(level);
        let (usage, limit) = (node.counters.get(counter).usage, node.limit(counter));
        Refused { level, counter, usage, limit, short_by: node.short(counter, pages).unwrap_or(pages) }
    }

    /// Whether a counter can hold `pages` more at every level.
    pub(super) fn check_bits(&self, id: NodeId, which: Counter, pages: Pages) -> Result<(), Refused> {
        let mut levels = self.ancestry(id);
        match levels.find(|at| self.node(*at).counters.get(which).usage.checked_add(pages).is_none()) {
            Some(level) => Err(self.refusal(level, which, pages)),
            None => Ok(()),
        }
    }

    fn count_refusal(&mut self, level: NodeId, which: Counter, mode: Mode) {
        let node = self.node_mut(level);
        node.counters.get_mut(which).refuse(mode);
        if which == Counter::Memory && mode == Mode::Wait {
            self.record(level, Event::Max);
        }
    }
}

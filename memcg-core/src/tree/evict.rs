//! Evicting guest pages and faulting them back: one step each, so that no moment shows a page twice or not at all.
//!
//! ```text
//!            evict n pages, compressed to s            refault
//!   memory   − n + s      (falls by what is freed)     + n − s
//!   store    + s          (store.max decides)          − s
//!   swap     + n          (swap.max decides)           − n
//! ```
//!
//! A page is evicted when its content *is* in the store: until then it stays charged (row 27), so eviction that does
//! not progress frees nothing on paper either. A page that is touched again is charged before its content is put back
//! (row 24); where the limit is met the mode decides, as with any charge. With `stored` of zero the content is
//! elsewhere (a file), which costs no memory. Evicted pages that the guest does not want any more are uncharged as
//! [`Kind::Swap`] and [`Kind::Store`].
//!
//! A worker evicts within what it was granted, and its owner hears of it afterwards, in totals: [`Tree::settle_evicted`].
//! What an evicted page frees is then stock of the worker, still charged, until it comes back like any other stock.

use super::charge::Crossed;
use super::{Accounting, Charge, Counter, Event, Kind, Mode, NodeId, Refused, Tree};
use crate::units::Pages;

/// Why nothing was evicted or faulted back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvictError {
    /// `swap.max`, `store.max`, or for a refault `memory.max` of some level.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// What is stored is larger than the pages.
    #[error("{stored} to store for {pages} of content: leave in memory what does not compress")]
    Larger {
        /// Pages of content.
        pages: Pages,
        /// Pages that the store would hold for them.
        stored: Pages,
    },
    /// More than is there. A bug of the caller.
    #[error("{asked} ({kind:?}) with {charged} charged: count again what the VM holds")]
    NotCharged {
        /// What was to be taken off.
        kind: Kind,
        /// How much of it is charged to the node itself.
        charged: Pages,
        /// How much was to be taken off.
        asked: Pages,
    },
}

impl Tree {
    /// Takes `pages` of guest memory out of `id`'s memory into swap, `stored` of them (compressed, rounded up) to the
    /// store: the content is there already. A refusal counts as [`Mode::NoWait`], since eviction leaves the page where
    /// it is and tries another way.
    ///
    /// # Errors
    /// [`EvictError`]; nothing has changed then but one count at the level that refused.
    pub fn evict(&mut self, id: NodeId, pages: Pages, stored: Pages) -> Result<(), EvictError> {
        if self.accounting(id) == Accounting::Off {
            return Ok(());
        }
        self.check_there(id, pages, stored, &[(Kind::Guest, pages)])?;
        self.admit(id, Counter::Store, stored, Mode::NoWait)?;
        self.admit(id, Counter::Swap, pages, Mode::NoWait)?;
        let freed = pages.saturating_sub(stored);
        let counters = &mut self.node_mut(id).counters;
        counters.get_mut(Counter::Memory).own = counters.get(Counter::Memory).own.saturating_sub(freed);
        counters.get_mut(Counter::Store).own += stored;
        counters.get_mut(Counter::Swap).own += pages;
        self.walk(id, |node| {
            node.lower(Counter::Memory, freed);
            node.raise(Counter::Store, stored, false);
            node.raise(Counter::Swap, pages, false);
        });
        self.settle_returning(id);
        Ok(())
    }

    /// The reverse of [`Self::evict`], charged like any touch: `pages` come back into memory, and `stored` leave the
    /// store. The caller puts the content back after that.
    ///
    /// # Errors
    /// [`EvictError`]; nothing has changed then but one count at the level that refused.
    pub fn refault(&mut self, id: NodeId, pages: Pages, stored: Pages, mode: Mode) -> Result<Charge, EvictError> {
        let mut charge = Charge { pages, crossed_high: Crossed::NONE, forced_at: None };
        if self.accounting(id) == Accounting::Off {
            return Ok(charge);
        }
        self.check_there(id, pages, stored, &[(Kind::Swap, pages), (Kind::Store, stored)])?;
        let more = pages.saturating_sub(stored);
        self.check_online(id, pages, mode)?;
        charge.forced_at = self.admit(id, Counter::Memory, more, mode)?;
        let counters = &mut self.node_mut(id).counters;
        for (which, off) in [(Counter::Swap, pages), (Counter::Store, stored)] {
            let own = &mut counters.get_mut(which).own;
            *own = own.saturating_sub(off);
        }
        counters.get_mut(Counter::Memory).own += more;
        let mut at = Some(id);
        while let Some(level) = at {
            let node = self.node_mut(level);
            node.lower(Counter::Swap, pages);
            node.lower(Counter::Store, stored);
            at = node.parent;
            if node.raise(Counter::Memory, more, charge.forced_at.is_some()) {
                charge.crossed_high.push(level);
                self.record(level, Event::High);
            }
        }
        self.settle_returning(id);
        Ok(charge)
    }

    /// `id`'s worker has so much in its store and in swap by now: of what is charged to it as guest memory or store, `stored`
    /// is store. Memory stays as it is; store and swap change at every level, whatever their limits: it has happened. What
    /// goes above a limit counts as forced.
    ///
    /// A store larger than all of that is a bug of the caller: it is clamped, counted, and stops a debug build.
    pub fn settle_evicted(&mut self, id: NodeId, stored: Pages, swapped: Pages) {
        let node = self.node_mut(id);
        if node.accounting == Accounting::Off {
            return;
        }
        let most = node.counters.own(Kind::Guest) + node.counters.own(Kind::Store);
        if stored > most {
            node.counters.get_mut(Counter::Store).underflows += 1;
            debug_assert!(false, "{stored} in the store out of {most} of memory");
        }
        for (which, now) in [(Counter::Store, stored.min(most)), (Counter::Swap, swapped)] {
            let own = &mut self.node_mut(id).counters.get_mut(which).own;
            let before = std::mem::replace(own, now);
            let (more, less) = (now.saturating_sub(before), before.saturating_sub(now));
            self.walk(id, |node| {
                let forced = node.short(which, more).is_some();
                // Only memory has a high limit to be crossed.
                let _ = node.raise(which, more, forced);
                node.lower(which, less);
            });
        }
    }

    /// Whether as much is charged as is to be taken off, and whether compression gained anything.
    fn check_there(&self, id: NodeId, pages: Pages, stored: Pages, off: &[(Kind, Pages)]) -> Result<(), EvictError> {
        if stored > pages {
            return Err(EvictError::Larger { pages, stored });
        }
        for &(kind, asked) in off {
            let charged = self.node(id).counters.own(kind);
            if asked > charged {
                return Err(EvictError::NotCharged { kind, charged, asked });
            }
        }
        Ok(())
    }
}

//! What workers evict, as the controller accounts for it.
//!
//! A worker moves cold pages out of its guest's memory by itself, within what it was granted. Its reports say what that has
//! come to, in totals: so much of its memory is its *store*, and so many pages are in *swap*, beside memory. What eviction
//! freed is stock, and comes back as stock does.
//!
//! ```text
//!  granted − returned = guest + stock + reserve + what pages cost + store          usage (U) does not move by eviction
//!                                                                                   but by the stock that comes back
//!  swap (S)           = pages whose contents are in the store
//! ```
//!
//! # Limits of swap
//!
//! A worker does not ask before it evicts: each grant says how many pages it may have in swap, and how large its store may
//! be. Of its own limit that is all. Of a group's it is what it has and a part of what is left, so that all members
//! together stay below; the parts become smaller as the room does, and whoever has been promised much more than its part
//! now is told ([`Actor::settle_cold`]). One that is above a limit, because that was lowered, may only come down. Pages in swap
//! come down as they are touched; a store moves to its VM's file, if it has one.
//!
//! Nobody sets a limit of the store (`store.max`), mostly: then it is half of `memory.max`, of the VM's and of each group's,
//! and of what these are being lowered to. A store that is larger than what it leaves the guest takes more from pages that are
//! in use than it gives to those that are not.

use memcg_core::tree::{Counter, NodeId};
use memcg_core::units::{Limit, Pages};

use super::actor::Actor;
use super::changes::Target;
use super::vm::{Vm, VmId};
use crate::worker::protocol::Report;

/// Without a limit of its own the store is at most one part in so many of `memory.max`.
const STORE_SHARE: u64 = 2;

/// Evicted pages from which it is known how far a guest's pages shrink.
const SEEN: u64 = 256;

/// What a worker may evict, as it was told last. In pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    /// Largest number of pages in swap.
    pub swap: u64,
    /// Largest store.
    pub store: u64,
}

impl Actor {
    /// A report has come and is not in force yet: a store that has shrunk has become stock, before what came back is
    /// uncharged.
    pub fn shrink_store(&mut self, id: VmId, report: &Report) {
        let vm = &self.vms[&id];
        let stored = vm.report.store.min(report.store);
        if (stored, report.swapped) != (vm.report.store, vm.report.swapped) {
            self.tree.settle_evicted(vm.node, Pages(stored), Pages(report.swapped));
        }
    }

    /// The report is in force and what came back is uncharged: a store that has grown was stock before.
    pub fn settle_cold(&mut self, id: VmId, before: &Report) {
        let vm = &self.vms[&id];
        let Report { store, swapped, .. } = vm.report;
        if store > before.store {
            self.tree.settle_evicted(vm.node, Pages(store), Pages(swapped));
        }
        if (store, swapped) != (before.store, before.swapped) {
            self.renew_leases(id);
        }
    }

    /// The pages of a worker are charged that was heard of for the first time: so much of them is its store.
    pub fn recount_cold(&mut self, id: VmId) {
        let vm = &self.vms[&id];
        self.tree.settle_evicted(vm.node, Pages(vm.report.store), Pages(vm.report.swapped));
    }

    /// A VM has more in swap, or less: those that share a limit with it have other parts of what is left.
    fn renew_leases(&mut self, id: VmId) {
        let limited = |at: &NodeId| self.tree.limits(*at).swap_max != Limit::Max || self.store_max(*at) != Limit::Max;
        let top = self.tree.ancestry(self.vms[&id].node).filter(limited).last();
        let Some(top) = top else { return };
        let below = if top == self.vms[&id].node { vec![id] } else { self.vms_of(Target::Group(top)) };
        for id in below {
            let now = self.leases(id);
            let vm = self.vms.get_mut(&id).expect("listed");
            let Report { swapped, store, .. } = vm.report;
            let parts = [(vm.leases.swap, now.swap, swapped), (vm.leases.store, now.store, store)];
            // Twice as much as it may have now, or half: what is in between is worth no message.
            let off = |(told, now, has): &(u64, u64, u64)| {
                let (told, now) = (told.saturating_sub(*has), now.saturating_sub(*has));
                told / 2 > now || now / 2 > told
            };
            vm.grant_due |= parts.iter().any(off);
        }
    }

    /// What a VM's worker may evict.
    pub fn leases(&self, id: VmId) -> Leases {
        let vm = &self.vms[&id];
        Leases {
            swap: self.lease(vm, Counter::Swap, |at| self.tree.coming_limits(at).swap_max),
            store: self.lease(vm, Counter::Store, |at| self.store_max(at)),
        }
    }

    /// What can be taken from a VM that stands still: all of its pages may be evicted then, as far as swap and store have room,
    /// and what they leave in the store is not free. How far they shrink is taken from those that were evicted, else for half.
    pub fn freed_by_pause(&self, id: VmId) -> Pages {
        let vm = &self.vms[&id];
        let Report { guest, swapped, store, stock, cold, .. } = vm.report;
        let stock = stock + vm.in_flight();
        if vm.store.bytes == 0 {
            return Pages(stock);
        }
        let leases = self.leases(id);
        // In thousandths of a page.
        let stored = swapped.saturating_sub(cold.file);
        let each = if stored >= SEEN { (store * 1000 / stored).min(1000) } else { 500 };
        let room = leases.store.saturating_sub(store).saturating_mul(1000) / each.max(1);
        let evicted = guest.min(leases.swap.saturating_sub(swapped)).min(room);
        Pages(stock + evicted - evicted * each / 1000)
    }

    /// All that a VM's own limit allows, and of each group's what it has and a part of half of what is left. Of a group that
    /// is above its limit what the others leave, or an equal part, whichever is more: as they come down that becomes more,
    /// never less, and all together are within the limit.
    fn lease(&self, vm: &Vm, which: Counter, limit: impl Fn(NodeId) -> Limit) -> u64 {
        let has = self.tree.counter(vm.node, which).usage.0;
        let allows = |at: NodeId| {
            let max = limit(at).as_pages()?.0;
            if at == vm.node {
                return Some(max);
            }
            let members = self.vms_of(Target::Group(at)).len().max(1) as u64;
            let used = self.tree.counter(at, which).usage.0;
            let left = max.saturating_sub(used);
            if used > max {
                return Some(has.min(max.saturating_sub(used.saturating_sub(has)).max(max / members)));
            }
            Some(has + if members == 1 { left } else { left / (2 * members) })
        };
        self.tree.ancestry(vm.node).filter_map(allows).min().unwrap_or(u64::MAX)
    }

    /// The limit of the store of a VM or a group: what was set, or its part of `memory.max`.
    fn store_max(&self, at: NodeId) -> Limit {
        let limits = self.tree.coming_limits(at);
        match (limits.store_max, limits.max) {
            (Limit::Max, Limit::Pages(max)) => Limit::Pages(Pages(max.0 / STORE_SHARE)),
            (set, _) => set,
        }
    }
}

/// Tests what a worker with `size` of RAM says of its cold pages.
///
/// # Errors
/// A sentence about the lie.
pub fn check(report: &Report, size: Pages, accounted: bool) -> Result<(), String> {
    let Report { guest, idle, swapped, store, .. } = *report;
    if !accounted && (idle, swapped, store) != (0, 0, 0) {
        return Err("says that it has evicted pages of a VM that is not charged".to_owned());
    }
    if idle > guest {
        return Err(format!("says that {idle} of {guest} pages are idle"));
    }
    if swapped > size.0 || store > most_stored(size).0 {
        return Err(format!("says that {swapped} pages of a RAM of {size} are in swap, in {store} pages of store"));
    }
    Ok(())
}

/// Pages that the store of a VM with `size` of RAM takes at most: all of it, and an eighth more for what is dead.
pub fn most_stored(size: Pages) -> Pages {
    size + most_dead(size)
}

/// Of these, pages for contents that nobody wants any more, and that are not cleaned away yet.
pub fn most_dead(size: Pages) -> Pages {
    Pages(size.0 / 8 + 128)
}

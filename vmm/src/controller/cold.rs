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
use serde_json::json;

use super::actor::Actor;
use super::changes::Target;
use super::events::EventKind;
use super::vm::{Vm, VmId};
use crate::worker::protocol::{Cold, Report};

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

/// What a VM's pages have shown when they were tried: how many shrank, or went to its file, and how many could only stay. The
/// last ones count, as many as it has; a page that is tried again counts again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tried {
    went: u64,
    stayed: u64,
}

impl Tried {
    /// More has been tried between two reports, of a VM that has `guest` pages.
    fn add(&mut self, before: &Cold, now: &Cold, guest: u64) {
        let went = self.went.saturating_add(now.evicted.saturating_sub(before.evicted));
        let stayed = self.stayed.saturating_add(now.incompressible.saturating_sub(before.incompressible));
        let (all, most) = (u128::from(went) + u128::from(stayed), guest.max(SEEN));
        *self = Self { went, stayed };
        if all > most.into() {
            self.went = (u128::from(went) * u128::from(most) / all) as u64;
            self.stayed = most - self.went;
        }
    }

    /// How many of `guest` pages can be expected to shrink. Those that stayed do not; of the others as large a part as of all
    /// that were tried, which of few says little.
    fn shrinking(self, guest: u64) -> u64 {
        let Self { went, stayed } = self;
        let unknown = u128::from(guest.saturating_sub(stayed));
        let went = u128::from(went) + u128::from(SEEN);
        (unknown * went / (went + u128::from(stayed))) as u64
    }
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
        let vm = self.vms.get_mut(&id).expect("checked");
        let Report { guest, store, swapped, cold, .. } = vm.report;
        vm.tried.add(&before.cold, &cold, guest);
        let vm = &self.vms[&id];
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

    /// Says that a VM's swap file cannot be written, unless that was said when it had failed half as often.
    pub fn tell_failed_writes(&mut self, id: VmId) {
        let vm = self.vms.get_mut(&id).expect("checked");
        let total = vm.report.cold.failed_writes;
        if total == 0 || total / 2 < vm.failed_told {
            return;
        }
        let more = total - std::mem::replace(&mut vm.failed_told, total);
        let (name, details) = (vm.name.clone(), json!({ "failed_writes": more, "failed_writes_total": total }));
        let details = self.account(id, details);
        self.event(EventKind::SwapFailed, Some(&name), details);
    }

    /// What a VM's worker may evict.
    pub fn leases(&self, id: VmId) -> Leases {
        let vm = &self.vms[&id];
        Leases {
            swap: self.lease(vm, Counter::Swap, |at| self.tree.coming_limits(at).swap_max),
            store: self.lease(vm, Counter::Store, |at| self.store_max(at)),
        }
    }

    /// What can be taken from a VM that stands still: what it has ahead of need, and what all of its pages free that may be evicted
    /// then.
    pub fn freed_by_pause(&self, id: VmId) -> Pages {
        let vm = &self.vms[&id];
        let evicts = vm.store.bytes > 0;
        Pages(vm.spare() + if evicts { emptied(&vm.report, self.leases(id), vm.swap_file.0, vm.tried) } else { 0 })
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

/// What a VM frees when all of its pages go where they can: to its file of so many pages as far as that has room, and what is
/// in the store with them; else to the store, where those that shrink leave as much as those that are there, or half as long
/// as these are few.
fn emptied(report: &Report, leases: Leases, file: u64, tried: Tried) -> u64 {
    let Report { guest, swapped, store, cold, .. } = *report;
    let stored = swapped.saturating_sub(cold.file);
    // In thousandths of a page.
    let each = if stored >= SEEN { (store.saturating_mul(1000) / stored).clamp(1, 1000) } else { 500 };
    let (swap, file) = (leases.swap.saturating_sub(swapped), file.saturating_sub(cold.file));
    let shrinking = tried.shrinking(guest).min(guest.saturating_sub(cold.hard));
    let filed = (guest - shrinking).min(file).min(swap);
    // What shrinks goes to the store first, and on to the file when nothing else is left.
    let file = file - filed;
    let room = (leases.store.saturating_mul(1000) / each).saturating_add(file).saturating_sub(stored);
    let shrunk = shrinking.min(swap - filed).min(room);
    let all = stored + shrunk;
    let stays = (store + shrunk * each / 1000) * all.saturating_sub(file) / all.max(1);
    (filed + shrunk + store).saturating_sub(stays)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// How a VM is, in pages, and what has become of what was tried of it.
    struct Case {
        guest: u64,
        swapped: u64,
        store: u64,
        in_file: u64,
        file: u64,
        went: u64,
        stayed: u64,
        hard: u64,
        swap_max: u64,
        store_max: u64,
    }

    /// Nothing is known of it yet, and nothing limits it.
    const NEW: Case = Case {
        guest: 10_000,
        swapped: 0,
        store: 0,
        in_file: 0,
        file: 0,
        went: 0,
        stayed: 0,
        hard: 0,
        swap_max: u64::MAX,
        store_max: u64::MAX,
    };

    /// Of this one a thousand pages are in the store, and take a tenth.
    const SHRINKS: Case = Case { swapped: 1000, store: 100, went: 1000, ..NEW };

    fn frees(case: &Case) -> u64 {
        let now = Cold {
            file: case.in_file,
            evicted: case.went,
            incompressible: case.stayed,
            hard: case.hard,
            ..Cold::default()
        };
        let report =
            Report { guest: case.guest, swapped: case.swapped, store: case.store, cold: now, ..Report::default() };
        let mut tried = Tried::default();
        tried.add(&Cold::default(), &now, case.guest);
        emptied(&report, Leases { swap: case.swap_max, store: case.store_max }, case.file, tried)
    }

    #[test]
    fn a_pause_frees_what_can_go_to_the_file_and_what_the_store_saves() {
        for (what, case, expected) in [
            ("nothing is known: half", NEW, 5000),
            ("nothing of it", Case { guest: 0, ..NEW }, 0),
            ("its own ratio", SHRINKS, 9000),
            ("few are evicted: half", Case { swapped: 200, store: 20, went: 200, ..NEW }, 5000),
            ("a store that saves nothing", Case { store: 1000, ..SHRINKS }, 0),
            ("nothing shrinks", Case { stayed: 10_000, ..NEW }, 0),
            ("the same was tried again and again", Case { stayed: 50_000, ..NEW }, 0),
            ("it says itself that they are hard", Case { hard: 9000, ..NEW }, 500),
            ("half was tried, and does not shrink", Case { stayed: 5000, ..NEW }, 122),
            ("as much of the rest shrinks as of what was tried", Case { stayed: 1000, ..SHRINKS }, 4509),
            ("few stayed, which says little", Case { stayed: 20, ..NEW }, 4628),
            ("a file that takes all", Case { file: 20_000, ..NEW }, 10_000),
            ("a file, and nothing shrinks", Case { file: 20_000, stayed: 50_000, ..NEW }, 10_000),
            ("the store goes to the file as well", Case { file: 20_000, ..SHRINKS }, 10_100),
            ("a file that takes a part", Case { file: 4000, ..NEW }, 7000),
            ("a small file, and nothing shrinks", Case { file: 4000, stayed: 50_000, ..NEW }, 4000),
            ("a full file", Case { file: 4000, swapped: 4000, in_file: 4000, ..NEW }, 5000),
            ("no swap", Case { swap_max: 0, file: 20_000, ..NEW }, 0),
            ("little swap", Case { swap_max: 3000, ..SHRINKS }, 1800),
            ("little swap, with a file", Case { swap_max: 3000, file: 20_000, ..SHRINKS }, 2100),
            ("more in swap than it may have", Case { swap_max: 500, ..SHRINKS }, 0),
            ("little store", Case { store_max: 300, ..SHRINKS }, 1800),
            ("little store, with a file", Case { store_max: 300, file: 20_000, ..SHRINKS }, 10_100),
            ("a full store, and a file that takes a part", Case { store_max: 100, file: 4000, ..SHRINKS }, 4000),
        ] {
            assert_eq!(frees(&case), expected, "{what}");
        }
    }

    #[test]
    fn what_was_tried_long_ago_is_forgotten() {
        let cold = |evicted, incompressible| Cold { evicted, incompressible, ..Cold::default() };
        let mut tried = Tried::default();
        tried.add(&cold(0, 0), &cold(0, 50_000), 10_000);
        assert_eq!(tried.shrinking(10_000), 0);
        for evicted in 0..100 {
            tried.add(&cold(evicted * 1000, 50_000), &cold((evicted + 1) * 1000, 50_000), 10_000);
        }
        assert!(tried.shrinking(10_000) > 9_900, "{tried:?}");
        // Nonsense is bounded, and what becomes smaller is nothing.
        tried.add(&cold(0, 0), &cold(u64::MAX, u64::MAX), 10_000);
        tried.add(&cold(u64::MAX, u64::MAX), &cold(0, 0), 0);
        assert!(tried.shrinking(10_000) <= 10_000);
    }
}

//! The smallest `memory.max` that a VM, or a group of them, can have while it runs.
//!
//! ```text
//!  floor of a VM    = overhead charged for it + its reserve           nothing gives either back
//!  least of a VM    = what it uses without its stock, at most floor + slack + a 32nd of its pages, compressed
//!                     if its guest can give nothing and nothing is evicted, all of what it uses
//!  of a group       = what is charged as overhead in it + the reserves of its VMs; the sum of its VMs' least
//! ```
//!
//! A limit below the floor is refused when it is asked for: to reclaim for it would take all that the guest has, and fail.
//! What is named then leaves each guest the slack that it needs in order to go on ([`slack`]).

use memcg_core::limit_change::slack;
use memcg_core::tree::Counter;
use memcg_core::units::{Limit, Pages, exact, human};

use super::actor::Actor;
use super::changes::{Part, Target};
use super::error::{Code, Refusal};
use super::vm::VmId;

/// Of so many pages that are evicted one is needed to keep them, where they compress well.
const COMPRESSED: u64 = 32;

impl Actor {
    /// Whether the limits of a request can be reached by reclaim.
    ///
    /// # Errors
    /// The first target that would keep more than its `max`, whatever its guests give.
    pub fn check_floor(&self, parts: &[Part]) -> Result<(), Refusal> {
        for part in parts {
            let node = self.node_of(part.target);
            let Some(Limit::Pages(max)) = part.patch.max.filter(|max| *max < self.tree.limits(node).max) else {
                continue;
            };
            let floor = self.floor(part.target);
            if max >= floor || self.tree.usage(node) <= max && self.is_wholly_charged(part.target) {
                continue;
            }
            let what = self.describe(part.target);
            let message = format!(
                "{what} keeps {} whatever its guests give back (overhead and reserves), and memory.max={} is less: \
                 memory.max={} is the smallest that will do{}",
                human(floor.bytes()),
                human(max.bytes()),
                exact(in_mib(self.least(part.target)).bytes()),
                self.on_what(part.target),
            );
            let refusal = Refusal::new(Code::OverheadRefused, message);
            return Err(refusal.usage(self.tree.usage(node).bytes()).generation(self.tree.generation(node)));
        }
        Ok(())
    }

    fn is_wholly_charged(&self, target: Target) -> bool {
        self.vms_of(target).iter().all(|id| self.vms[id].accounted())
    }

    /// Pages that stay in use whatever the guests of a target give.
    fn floor(&self, target: Target) -> Pages {
        match target {
            Target::Vm(id) => self.floor_of(id),
            Target::Group(node) => {
                let below = self.vms_of(target).into_iter();
                let more = below.map(|id| self.floor_of(id).saturating_sub(self.overhead_charged(id)));
                self.tree.counter(node, Counter::Vmm).usage + more.sum()
            }
        }
    }

    fn floor_of(&self, id: VmId) -> Pages {
        let vm = &self.vms[&id];
        let (overhead, reserve) = if vm.accounted() {
            (self.overhead_charged(id), vm.reserve_target)
        } else {
            (vm.fixed_overhead() + vm.grown(), vm.largest_reserve())
        };
        overhead + reserve
    }

    fn overhead_charged(&self, id: VmId) -> Pages {
        self.tree.counter(self.vms[&id].node, Counter::Vmm).usage
    }

    /// What [`Self::least`] depends on, as the end of a sentence: nothing where nobody gives anything.
    fn on_what(&self, target: Target) -> &'static str {
        let vms = self.vms_of(target);
        if vms.iter().any(|id| self.evicts(*id)) {
            ", if its cold pages compress well"
        } else if vms.iter().any(|id| self.vms[id].report.balloon_ready) {
            ", if its guest gives back the rest"
        } else {
            ""
        }
    }

    /// Whether pages of a VM may be evicted.
    fn evicts(&self, id: VmId) -> bool {
        self.leases(id).swap > 0
    }

    /// The smallest `max` that a target can be expected to come down to with its guests still running.
    fn least(&self, target: Target) -> Pages {
        let least = |id: VmId| {
            let vm = &self.vms[&id];
            let stored = Pages((vm.report.guest + vm.report.swapped).min(vm.size.0) / COMPRESSED);
            let running = self.floor_of(id) + slack(vm.cpus) + stored;
            let usage = self.tree.usage(vm.node).saturating_sub(Pages(vm.spare()));
            let gives = vm.report.balloon_ready || self.evicts(id);
            match vm.accounted() {
                true if gives => running.min(usage).max(self.floor_of(id)),
                true => usage,
                false => running,
            }
        };
        let below: Pages = self.vms_of(target).into_iter().map(least).sum();
        below.max(self.floor(target))
    }
}

/// The next whole number of MiB, for people to type.
pub(super) fn in_mib(pages: Pages) -> Pages {
    Pages::from_mib(pages.bytes().div_ceil(1 << 20))
}

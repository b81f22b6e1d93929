//! The limit of a worker's cgroup follows what its VM may use: raised before pages are granted, lowered after they are back.

use memcg_core::frame::Cost;
use memcg_core::reclaim::STOCK_CAP;
use memcg_core::tree::LimitPatch;
use memcg_core::units::{Limit, Pages};

use super::VmSpec;
use super::actor::Actor;
use super::cgroup::{self, Cgroup};
use super::cold;
use super::overhead::Part;
use super::residency::Residency;
use super::spawn::Death;
use super::vm::{VmId, reserve};

/// Bytes that a VM may use when it is made.
pub(super) fn most(spec: &VmSpec) -> u64 {
    let overhead = spec.overhead.iter().map(Part::pages).sum::<Pages>() + Cost::most(spec.size).total();
    let LimitPatch { max, .. } = spec.limits;
    bound(spec.size, spec.cpus, overhead, max.unwrap_or(Limit::Max)).bytes()
}

/// What a VM may use under `max`: never more than all its RAM and what comes on top.
fn bound(size: Pages, cpus: u32, overhead: Pages, max: Limit) -> Pages {
    let all = size + overhead + reserve(cpus) + STOCK_CAP + cold::most_dead(size);
    max.as_pages().map_or(all, |max| max.min(all))
}

/// How a worker died, with what its cgroup knows of it.
pub(super) fn explain(death: Death, cgroup: Option<&Cgroup>) -> Death {
    match (death, cgroup) {
        (Death::Signal(libc::SIGKILL), Some(cgroup)) if cgroup.oom_kills() > 0 => Death::HostOom,
        _ => death,
    }
}

impl Actor {
    /// What the host says of the worker of the VM of this name.
    pub fn residency(&self, name: &str) -> Option<Residency> {
        let id = self.find_alive(name).ok()?;
        self.vms[&id].process.residency().cloned()
    }

    /// Limits have changed: the backstop of the VM is raised at once, or lowered by a thread that can wait.
    pub fn aim_backstop(&self, id: VmId) {
        let vm = &self.vms[&id];
        let Some(cgroup) = vm.process.residency().and_then(Residency::cgroup) else { return };
        let overhead = vm.fixed_overhead() + vm.most_grown();
        // What a forced limit has left above it is still there.
        let most = bound(vm.size, vm.cpus, overhead, self.tree.limits(vm.node).max).max(self.tree.usage(vm.node));
        cgroup.set_limit(cgroup::limit_for(most.bytes()), |lower| drop(tokio::task::spawn_blocking(lower)));
    }
}

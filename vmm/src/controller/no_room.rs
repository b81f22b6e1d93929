//! What somebody is told whose VM finds no room below a limit, or cannot come down to one, and what would help.
//!
//! | the limit | what helps |
//! | --- | --- |
//! | is too small for this VM alone | a higher limit, or a smaller VM |
//! | is full of memory of VMs that have ended | to wait until the host has that back |
//! | is full of what others use | a higher limit, or less use by them |
//! | is lower than what its VMs can give | more room for what is evicted, or a file for what does not shrink |

use memcg_core::tree::{Counter, NodeId, Refused};
use memcg_core::units::{Limit, Pages, exact, human};

use super::VmSpec;
use super::actor::Actor;
use super::changes::Target;
use super::error::{Code, Refusal};
use super::floor::in_mib;
use super::vm::{Vm, VmEnd, VmId};

/// Names that a sentence lists, at most.
const NAMES: usize = 3;

impl Actor {
    /// There is no room for `cost`, what a VM costs beside its pages. The limit would have to cover `others`, who are there,
    /// and what this one needs `alone`.
    pub fn too_dear(&self, spec: &VmSpec, cost: Pages, refused: &Refused, others: Pages, alone: Pages) -> Refusal {
        let (path, limit, cost) = (self.tree.path(refused.level), refused.limit, human(cost.bytes()));
        let (knob, advice) = match limit {
            Limit::Pages(max) if refused.counter == Counter::Memory => {
                ("memory.max", self.way_out(refused.level, max, others, alone))
            }
            // What others have paid for overhead they do not give back.
            _ => ("vmm.max", be_smaller(others + alone)),
        };
        let vm = &spec.name;
        let message = format!("the VM {vm:?} needs {cost} beside its pages, and {knob} of {path} is {limit}{advice}");
        Refusal::new(Code::OverheadRefused, message)
    }

    /// How a VM has ended that needs `alone` to load its guest and did not get it; `message` is what its worker says.
    pub fn too_small(&self, id: VmId, message: String, alone: Pages) -> VmEnd {
        let node = self.vms[&id].node;
        let group = self.tree.narrowest(node).filter(|at| *at != node);
        // With its own limit out of the way, a group's is in it.
        let group = group.filter(|_| self.tree.limits(node).max >= Limit::Pages(alone));
        let Some((level, max)) = group.and_then(|at| Some((at, self.tree.limits(at).max.as_pages()?))) else {
            return VmEnd::Failed { message, smallest_max: Some(alone) };
        };
        let others = self.tree.usage(level).saturating_sub(self.tree.usage(node));
        let (path, advice) = (self.tree.path(level), self.way_out(level, max, others, alone));
        let [needs, max] = [alone, max].map(|pages| human(pages.bytes()));
        let message = format!("it needs {needs} to load its guest, and memory.max of {path} is {max}{advice}");
        VmEnd::Failed { message, smallest_max: None }
    }

    /// What helps where nothing more can be had of some targets; the middle of a sentence.
    pub fn no_more(&self, stuck: &[Target]) -> String {
        let vms = stuck.iter().flat_map(|target| self.vms_of(*target)).map(|id| &self.vms[&id]);
        // One without a store evicts nothing, whatever it is allowed.
        let evict: Vec<_> = vms.filter(|vm| vm.accounted() && vm.store.bytes > 0).collect();
        let filed = |vm: &Vm| !vm.swap_file.is_zero();
        // Of one VM alone nobody asks which.
        let alone = matches!(stuck, [Target::Vm(_)]);
        let whose = |is: &dyn Fn(&Vm) -> bool| {
            let names: Vec<_> = evict.iter().filter(|vm| is(vm)).map(|vm| vm.name.as_str()).collect();
            let more = if names.len() > NAMES { format!(" and {} more", names.len() - NAMES) } else { String::new() };
            let first = names[..names.len().min(NAMES)].join(", ");
            (!names.is_empty()).then(|| if alone { String::new() } else { format!(" of {first}{more}") })
        };
        let banned = |vm: &Vm| {
            self.tree.ancestry(vm.node).any(|at| self.tree.coming_limits(at).swap_max == Limit::Pages(Pages::ZERO))
        };
        let forbidden = whose(&banned);
        let swap = whose(&|vm| vm.report.swapped >= vm.leases.swap && !banned(vm));
        let store = whose(&|vm| vm.report.store >= vm.leases.store && !filed(vm));
        let unshrunk = whose(&|vm| vm.report.cold.incompressible > 0 && !filed(vm));
        let helps = [
            forbidden.map(|whose| format!("raise swap.max{whose} above 0, at which nothing is evicted")),
            swap.map(|whose| format!("raise swap.max{whose}, which is full")),
            store.map(|whose| format!("raise store.max{whose}, which is full")),
            unshrunk
                .map(|whose| format!("give pages{whose} that do not shrink a file (--swap-dir, when the VM is made)")),
        ];
        let helps: Vec<_> = helps.into_iter().flatten().collect();
        let emptied = |target: &Target| self.vms_of(*target).iter().all(|id| self.is_emptied(*id));
        let helps = match helps.as_slice() {
            [] if stuck.iter().all(emptied) => return "all has been given that could be had".to_owned(),
            [] => "ask for a higher limit".to_owned(),
            helps => helps.join(", "),
        };
        format!("nothing more can be had: {helps}")
    }

    /// What helps where `memory.max` of `level` is `max` and would have to cover `others` and `alone`; the end of a sentence.
    fn way_out(&self, level: NodeId, max: Pages, others: Pages, alone: Pages) -> String {
        if alone > max {
            return be_smaller(others + alone);
        }
        let missing = (others + alone).saturating_sub(max);
        let enough = exact(in_mib(others + alone).bytes());
        let returning = self.tree.snapshot(level).returning;
        if returning >= missing {
            let returning = human(returning.bytes());
            return format!(
                ", of which VMs that have ended still hold {returning}: try again in a moment, or raise it to {enough}"
            );
        }
        let (path, used, missing) = (self.tree.path(level), human(others.bytes()), exact(in_mib(missing).bytes()));
        format!(
            ", of which others use {used}: raise it to {enough}, or make room for {missing} in it: end a VM, lower the \
             memory.max of one, or, where they do not need it, `ballast reclaim {path} {missing}`"
        )
    }
}

/// What helps where a limit is too small for a VM, and `enough` would do; the end of a sentence.
fn be_smaller(enough: Pages) -> String {
    format!(": raise it to {}, or use fewer vCPUs or less RAM", exact(in_mib(enough).bytes()))
}

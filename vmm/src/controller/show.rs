//! What the interface sees: a VM and the host at one moment.

use memcg_core::frame::Cost;
use memcg_core::tree::Overhead;
use memcg_core::units::Pages;
use tokio::time::Instant;

use super::actor::Actor;
use super::changes::Target;
use super::host;
use super::overhead;
use super::overview::HostView;
use super::shortage::Shortage;
use super::view::{
    AccountedView, BalloonView, CounterView, GuestStatsView, HeldView, MemoryEvents, MemoryStat, MemoryView, OomView,
    OverheadView, VmState, VmView,
};
use super::vm::{Vm, VmId};
use crate::kernel;

impl Actor {
    /// A VM as its worker last reported it and as the tree has it now. Pages that are on their way to the worker are
    /// shown as stock, so that the parts always add up to what is charged.
    pub fn vm_view(&self, id: VmId, stale: bool) -> VmView {
        let vm = &self.vms[&id];
        VmView {
            name: vm.name.clone(),
            group: self.tree.parent(vm.node).map_or_else(String::new, |group| self.tree.path(group)),
            state: vm.state,
            pid: vm.process.pid(),
            age_ms: millis_since(vm.since),
            generation: self.tree.generation(vm.node),
            size_bytes: vm.size.bytes(),
            cpus: vm.cpus,
            accounting: vm.accounted(),
            end: vm.epitaph.clone(),
            paused_by: vm.paused_by.filter(|_| vm.state == VmState::Paused),
            kept_paused: vm.kept_paused,
            resume_bytes: self.resume_need(id).map(Pages::bytes),
            resume_missing_bytes: self.resume_missing(id).map(Pages::bytes),
            waits_for: self.waits_for(id),
            console: (vm.state != VmState::Ended)
                .then(|| vm.process.console())
                .flatten()
                .map(|path| path.display().to_string()),
            stale,
            memory: self.memory_view(vm),
            vmm: self.vmm_view(vm),
            overhead: OverheadView { accounted: accounted(vm), measured: None },
            swap: self.swap_view(vm),
            cold: vm.report.cold.into(),
            reclaim: self.reclaim_view(Target::Vm(id)),
            balloon: BalloonView {
                target_bytes: self.balloon_target(id).bytes(),
                told_bytes: vm.balloon.told(self.balloon_target(id)).bytes(),
                actual_bytes: Pages(vm.report.balloon_actual.into()).bytes(),
                ready: vm.report.balloon_ready,
                progress: vm.report.balloon_ready.then(|| vm.balloon.state().into()),
            },
            guest_stats: vm
                .guest_stats
                .as_ref()
                .map(|(stats, at)| GuestStatsView::new(stats, stats.age_ms.saturating_add(millis_since(*at)))),
            held: self.held_view(vm),
            pressure: self.pressure_view(vm.node),
            oom: OomView {
                action: vm.oom.action,
                deadline_ms: u64::try_from(vm.oom.deadline.as_millis()).unwrap_or(u64::MAX),
                priority: vm.oom.priority,
                preference: vm.oom.preference,
            },
            ram: vm.ram.clone(),
            store: vm.store,
            pool: vm.pool,
            faults: vm.report.faults.into(),
        }
    }

    fn memory_view(&self, vm: &Vm) -> MemoryView {
        let node = self.tree.snapshot(vm.node);
        let report = &vm.report;
        let ended = vm.state == VmState::Ended;
        let bytes = |pages: u64| if ended { 0 } else { Pages(pages).bytes() };
        MemoryView {
            current_bytes: node.memory.usage.bytes(),
            peak_bytes: node.memory.peak.bytes(),
            min_bytes: node.limits.min.as_bytes(),
            low_bytes: node.limits.low.as_bytes(),
            high_bytes: node.limits.high.as_bytes(),
            max_bytes: node.limits.max.as_bytes(),
            store_max_bytes: node.limits.store_max.as_bytes(),
            max_pending_bytes: node.max_pending.and_then(memcg_core::units::Limit::as_bytes),
            ceiling_bytes: node.ceiling.map(Pages::bytes),
            shares: vm.shares,
            events: MemoryEvents::new(node.events_local, node.memory.failcnt),
            stat: MemoryStat {
                guest_bytes: bytes(report.guest),
                active_bytes: bytes(report.guest.saturating_sub(report.idle)),
                idle_bytes: bytes(report.idle),
                store_bytes: bytes(report.store),
                swapped_bytes: bytes(report.swapped),
                ballooned_bytes: bytes(report.ballooned),
                stock_bytes: bytes(report.stock + vm.in_flight()),
                reserve_bytes: bytes(report.reserve),
                vmm_bytes: node.vmm.usage.bytes(),
                debt_bytes: bytes(report.debt),
                overcharge_bytes: node.overcharge.bytes(),
            },
        }
    }

    fn vmm_view(&self, vm: &Vm) -> CounterView {
        let node = self.tree.snapshot(vm.node);
        CounterView {
            current_bytes: node.vmm.usage.bytes(),
            peak_bytes: node.vmm.peak.bytes(),
            max_bytes: node.limits.vmm_max.as_bytes(),
        }
    }

    fn swap_view(&self, vm: &Vm) -> CounterView {
        let node = self.tree.snapshot(vm.node);
        CounterView {
            current_bytes: node.swap.usage.bytes(),
            peak_bytes: node.swap.peak.bytes(),
            max_bytes: node.limits.swap_max.as_bytes(),
        }
    }

    fn held_view(&self, vm: &Vm) -> HeldView {
        let until = vm.hold.filter(|hold| !hold.acted && vm.state == VmState::Running).map(|hold| hold.deadline);
        let now = vm.report.held && vm.state != VmState::Ended;
        let at = vm.refused_at.filter(|at| now && vm.refused() && self.tree.contains(*at));
        HeldView {
            now,
            limit_of: at.map(|at| self.tree.path(at)),
            total_us: vm.report.held_us,
            deadline_ms: until.map(|until| {
                u64::try_from(until.saturating_duration_since(Instant::now()).as_millis()).unwrap_or(u64::MAX)
            }),
        }
    }

    /// The host now.
    pub fn host_view(&self) -> HostView {
        let memory = host::memory().unwrap_or_default();
        let root = self.tree.snapshot(self.root);
        HostView {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            kernel: kernel::release(),
            total_bytes: memory.total,
            available_bytes: memory.available,
            budget_bytes: root.limits.max.as_bytes(),
            current_bytes: root.memory.usage.bytes(),
            vms: self.vms.iter().filter(|(_, vm)| vm.state != VmState::Ended).count(),
            last_event: self.events.last(),
            shortage: self.shortage.as_ref().map(Shortage::view),
            strays: self.stray_views(),
        }
    }
}

/// What is charged for the VM beside its pages.
fn accounted(vm: &Vm) -> AccountedView {
    let mut view = AccountedView::default();
    if !vm.accounted() || vm.state == VmState::Ended {
        return view;
    }
    for part in &vm.overhead {
        let of_its_kind = match part.kind {
            Overhead::Worker => &mut view.worker_bytes,
            Overhead::Vcpu => &mut view.vcpu_bytes,
            Overhead::Queue => &mut view.queue_bytes,
            Overhead::FrameRecords => &mut view.frame_records_bytes,
            Overhead::PageTables => &mut view.page_tables_bytes,
        };
        *of_its_kind += part.pages().bytes();
        view.user_bytes += part.user.bytes();
        view.kernel_bytes += part.kernel.bytes();
    }
    let Cost { tables, records } = overhead::grown(&vm.report);
    view.page_tables_bytes += tables.bytes();
    view.kernel_bytes += tables.bytes();
    view.frame_records_bytes += records.bytes();
    view.user_bytes += records.bytes();
    view
}

fn millis_since(at: Instant) -> u64 {
    u64::try_from(at.elapsed().as_millis()).unwrap_or(u64::MAX)
}

//! Views for tests.

use super::*;

const MIB: u64 = 1 << 20;

/// A VM that runs, with so much in use of 256 MiB.
pub fn vm(name: &str, group: &str, used_mib: u64) -> VmView {
    VmView {
        name: name.to_owned(),
        paused_by: None,
        kept_paused: false,
        resume_bytes: None,
        resume_missing_bytes: None,
        waits_for: Vec::new(),
        group: group.to_owned(),
        state: VmState::Running,
        pid: 1,
        age_ms: 1,
        generation: 0,
        size_bytes: 512 * MIB,
        cpus: 1,
        accounting: true,
        end: None,
        console: None,
        stale: false,
        memory: MemoryView { current_bytes: used_mib * MIB, max_bytes: Some(256 * MIB), ..MemoryView::default() },
        vmm: CounterView::default(),
        overhead: OverheadView::default(),
        swap: CounterView::default(),
        cold: ColdView::default(),
        reclaim: ReclaimView::default(),
        balloon: BalloonView {
            target_bytes: 64 * MIB,
            actual_bytes: MIB + MIB / 2,
            ready: true,
            ..BalloonView::default()
        },
        guest_stats: None,
        held: HeldView::default(),
        pressure: PressureView::default(),
        oom: OomView { action: OomAction::Pause, deadline_ms: 5000, priority: 0, preference: OomPreference::None },
        ram: Vec::new(),
        store: Default::default(),
        pool: Default::default(),
        faults: FaultsView::default(),
    }
}

/// A group.
pub fn group(path: &str, used_mib: u64, max_mib: Option<u64>) -> GroupView {
    let max_bytes = max_mib.map(|mib| mib * MIB);
    GroupView {
        path: path.to_owned(),
        dying: false,
        generation: 0,
        accounting: true,
        vms: 1,
        groups: 0,
        memory: GroupMemoryView { current_bytes: used_mib * MIB, max_bytes, ..GroupMemoryView::default() },
        vmm: CounterView::default(),
        swap: CounterView::default(),
        reclaim: ReclaimView::default(),
        pressure: PressureView::default(),
    }
}

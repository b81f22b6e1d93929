//! A VM before it has a process.
//!
//! ```text
//!  create: node, limits, overhead charged ──► worker is started ──► attach: it is one of the VMs
//!     └ refused: nothing is left                  └ failed ──► withdraw: nothing is left
//! ```
//!
//! Overhead is charged before the thing exists (semantics rows 98, 114): what cannot be paid for is not started, and
//! whoever starts VMs without end is refused at a number that can be computed, while its neighbours still can: `vmm.max`
//! is asked for what the VMs cost when all their RAM is in use, whatever they use now.

use memcg_core::frame::Cost;
use memcg_core::tree::{Accounting, AddError, Counter, Kind, Mode, NodeId, Overhead};
use memcg_core::units::{Limit, Pages};
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::actor::{Actor, WORKER_PATIENCE};
use super::balloon::BalloonAsking;
use super::cold::{Leases, Tried};
use super::config::VmConfig;
use super::error::{Code, Refusal};
use super::events::EventKind;
use super::journal::Entry;
use super::overhead::{self, Part};
use super::view::{AreaView, PausedBy, VmState};
use super::vm::{Vm, VmEnd, VmId, WorkerProcess, reserve};
use super::{VmSpec, activation, host};
use crate::worker::protocol::{Report, ToWorker};

/// A VM that was created and has no process yet.
pub(super) struct Created {
    pub spec: VmSpec,
    pub node: NodeId,
    /// It runs already: an earlier controller has started it.
    pub adopted: bool,
    /// Who has paused it.
    pub paused_by: Option<PausedBy>,
    /// Whether it does not go on by itself.
    pub kept_paused: bool,
}

impl Actor {
    /// Makes a VM's node, sets its limits and charges its overhead; all or nothing.
    pub fn create(&mut self, mut spec: VmSpec) -> Result<VmId, Refusal> {
        self.can_remember()?;
        self.no_stray(&spec.name)?;
        if self.is_taken(&spec.name) {
            return Err(Refusal::new(Code::AlreadyExists, format!("a VM named {:?} runs already", spec.name)));
        }
        let group = self.group_for(&spec.group)?;
        if self.accounts(group) && !spec.accounting {
            if spec.config.as_ref().is_some_and(|config| config.memory.track == Some(false)) {
                let message = format!("track=off contradicts the limit of {}: leave it out", self.limit_above(group));
                return Err(Refusal::new(Code::InvalidLimit, message));
            }
            spec.accounting = true;
        }
        let node = self.add_node(group, &spec)?;
        if let Err(refusal) = self.charge_overhead(node, &spec).and_then(|()| self.check_place(node, group)) {
            self.discard(node);
            return Err(refusal);
        }
        if let Some(config) = &spec.config {
            let (vm, group, config) = (spec.name.clone(), spec.group.clone(), Box::new(VmConfig::clone(config)));
            self.remember(Entry::Made { vm, group, instance: spec.instance, accounting: spec.accounting, config });
        }
        Ok(self.created(Created { spec, node, adopted: false, paused_by: None, kept_paused: false }))
    }

    /// Makes the node of a VM that runs already, and charges its overhead whatever the limits.
    pub fn create_again(
        &mut self,
        spec: VmSpec,
        paused_by: Option<PausedBy>,
        kept_paused: bool,
    ) -> Result<(VmId, NodeId), Refusal> {
        let node = self.add_node(self.group_for(&spec.group)?, &spec)?;
        if spec.accounting {
            self.charge_what_is_there(node, &spec.overhead);
        }
        Ok((self.created(Created { spec, node, adopted: true, paused_by, kept_paused }), node))
    }

    fn created(&mut self, created: Created) -> VmId {
        let id = VmId(self.next_id);
        self.next_id += 1;
        self.created.insert(id, created);
        id
    }

    /// Makes a VM's node and sets its limits.
    pub fn add_node(&mut self, group: NodeId, spec: &VmSpec) -> Result<NodeId, Refusal> {
        let accounting = if spec.accounting { Accounting::On } else { Accounting::Off };
        self.tree.add_with(group, &spec.name, &spec.limits, accounting).map_err(|error| match error {
            AddError::BadName(_) | AddError::TooDeep => Refusal::new(Code::BadRequest, error.to_string()),
            AddError::Limits(_) => Refusal::new(Code::InvalidLimit, error.to_string()),
            AddError::Exists(_) => {
                let message = format!("{} has a group named {:?}: choose another name", spec.group, spec.name);
                Refusal::new(Code::AlreadyExists, message)
            }
            _ => Refusal::new(Code::WrongState, error.to_string()),
        })
    }

    /// Charges overhead that is there already: that it is counted late is no reason to refuse it.
    pub fn charge_what_is_there(&mut self, node: NodeId, overhead: &[Part]) {
        for part in overhead {
            let charged = self.tree.try_charge_as(node, Kind::Overhead(part.kind), part.pages(), Mode::NoFail);
            let _whatever_the_limits = charged.expect("what fits into RAM fits into a counter");
        }
    }

    /// Whether a VM that was created is accounted from the start.
    pub fn is_accounted(&self, id: VmId) -> Result<bool, Refusal> {
        self.created.get(&id).map(|created| created.spec.accounting).ok_or_else(unknown)
    }

    /// Charges what the VM costs beside its pages from the start. What it will cost when all its RAM is in use is charged
    /// as it comes, out of what is granted for the pages; that it fits every `vmm.max` is looked at now.
    fn charge_overhead(&mut self, node: NodeId, spec: &VmSpec) -> Result<(), Refusal> {
        let fixed: Pages = spec.overhead.iter().map(Part::pages).sum();
        let full = fixed + Cost::most(spec.size).total();
        let limited = |at| self.tree.limits(at).vmm_max.as_pages().map(|max| (at, max));
        for (level, max) in self.tree.ancestry(node).filter_map(limited).collect::<Vec<_>>() {
            let more = full + self.growth_to_come(level);
            if self.tree.counter(level, Counter::Vmm).usage + more <= max {
                continue;
            }
            // The tree counts that.
            let kind = Kind::Overhead(Overhead::PageTables);
            if let Err(refused) = self.tree.try_charge_as(level, kind, more, Mode::Wait) {
                return Err(self.too_dear(spec, full, &refused, refused.usage, more));
            }
        }
        for part in &spec.overhead {
            let charged = self.tree.try_charge_as(node, Kind::Overhead(part.kind), part.pages(), Mode::Wait);
            if let Err(refused) = charged {
                // What was there before, and all of it: the parts charged so far are in both.
                let others = refused.usage.saturating_sub(self.tree.snapshot(node).vmm.usage);
                let alone = fixed + reserve(spec.cpus) + spec.loading;
                return Err(self.too_dear(spec, fixed, &refused, others, alone));
            }
        }
        Ok(())
    }

    /// Overhead that the VMs of a group will have beside what is charged for them, when all their RAM is in use.
    fn growth_to_come(&self, group: NodeId) -> Pages {
        let running = self.vms.iter().map(|(_, vm)| vm).filter(|vm| vm.alive() && vm.accounted());
        let running = running.map(|vm| (vm.node, vm.most_grown().saturating_sub(vm.grown())));
        let created = self.created.values().filter(|created| created.spec.accounting);
        let created = created.map(|created| (created.node, Cost::most(created.spec.size).total()));
        running.chain(created).filter(|(node, _)| self.tree.is_within(*node, group)).map(|(_, pages)| pages).sum()
    }

    /// What a VM's pages cost has grown since it was `before`. The worker has paid for it with pages that were granted, so
    /// it fits whatever the limits are.
    pub fn grow_overhead(&mut self, id: VmId, before: Cost) {
        let vm = &self.vms[&id];
        let (node, now) = (vm.node, overhead::grown(&vm.report));
        let parts = [
            (Overhead::PageTables, now.tables.saturating_sub(before.tables)),
            (Overhead::FrameRecords, now.records.saturating_sub(before.records)),
        ];
        for (part, pages) in parts.into_iter().filter(|(_, pages)| !pages.is_zero()) {
            self.tree.turn_into_overhead(node, part, pages);
        }
    }

    /// A worker was started for a VM that was created: it is one of the VMs from now on.
    pub fn attach(
        &mut self,
        id: VmId,
        process: Box<dyn WorkerProcess>,
        to_worker: mpsc::Sender<ToWorker>,
    ) -> Result<oneshot::Receiver<VmEnd>, Refusal> {
        let Created { spec, node, adopted, paused_by, kept_paused } = self.created.remove(&id).ok_or_else(unknown)?;
        let (ended, end) = oneshot::channel();
        let details = json!({
            "pid": process.pid(),
            "size_bytes": spec.size.bytes(),
            "cpus": spec.cpus,
            "max_bytes": spec.limits.max.and_then(Limit::as_bytes),
            "accounting": spec.accounting,
            "group": spec.group,
        });
        let vm = Vm {
            name: spec.name,
            node,
            size: spec.size,
            cpus: spec.cpus,
            accounting: if spec.accounting { activation::Accounting::On } else { activation::Accounting::Off },
            overhead: spec.overhead,
            shares: spec.shares,
            oom: spec.oom,
            oom_score: None,
            since: process.since(),
            process,
            to_worker,
            state: VmState::Starting,
            paused_by,
            kept_paused,
            paused_at: None,
            ram: Vec::new(),
            store: AreaView::default(),
            pool: AreaView::default(),
            instance: spec.instance,
            adopted,
            greeted: false,
            reserve_target: Pages::ZERO,
            granted_total: 0,
            returned_total: 0,
            report: Report::default(),
            reported: false,
            guest_stats: None,
            missing: 0,
            refused_since: None,
            refused_at: None,
            refused_told: None,
            grant_due: false,
            balloon: BalloonAsking::default(),
            leases: Leases::default(),
            swap_file: spec.swap_file,
            tried: Tried::default(),
            reclaim_aim: u64::MAX,
            reclaim_due: false,
            heard_at: None,
            reported_at: None,
            asked_at: None,
            evicted_told: (0, None),
            resume_seq: None,
            failed_told: 0,
            balloon_sent: None,
            balloon_due: false,
            start_due: false,
            awaits_room: false,
            hold: None,
            holds: Default::default(),
            seq: 0,
            waiting: Vec::new(),
            stopping: None,
            killers: Vec::new(),
            removers: Vec::new(),
            starters: Vec::new(),
            config: spec.config,
            console: spec.console,
            epitaph: None,
            forgotten: false,
            cause: None,
            death: None,
            link_closed: false,
            suspected: false,
            patience: Some(Instant::now() + host::scaled(WORKER_PATIENCE)),
            ended: Some(ended),
            warned: None,
        };
        self.forget(&vm.name);
        if !adopted {
            self.event(EventKind::Created, Some(&vm.name), details);
        }
        self.vms.insert(id, vm);
        self.stand_plain(id);
        Ok(end)
    }

    /// No worker could be started for a VM that was created: nothing is left of it.
    pub fn withdraw(&mut self, id: VmId) -> Result<(), Refusal> {
        let Created { node, spec, .. } = self.created.remove(&id).ok_or_else(unknown)?;
        self.discard(node);
        self.remember(Entry::Gone { vm: spec.name });
        Ok(())
    }

    /// Frees the node of a VM that never ran.
    pub fn discard(&mut self, node: NodeId) {
        self.tree.uncharge_all(node);
        // It has neither members nor charges.
        let _ = self.tree.remove(node);
        self.roomier = true;
    }
}

fn unknown() -> Refusal {
    Refusal::new(Code::NotFound, "there is no VM of this number that waits for a worker")
}

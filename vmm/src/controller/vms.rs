//! The VMs of the actor, and which of them something has to be done for.
//!
//! After every input the actor does what has become possible. It must not look at every VM for that, or a host with
//! hundreds of them would spend its time looking. So whoever gets a VM to change it ([`Vms::get_mut`]) leaves its
//! number here, and before the next question is answered the few VMs that were touched are looked at once and sorted in
//! anew:
//!
//! ```text
//!  get_mut(id) ─► touched ─► refresh: Needs::of(vm) ─┬─► deadlines  ordered by time
//!  insert         {id, …}    the only writer of the  ├─► refused    a want could not be served, the longest first
//!  remove                    sets on the right       ├─► emptied    paused for others, the longest first
//!                                                    ├─► due        a message was dropped
//!                                                    └─► restless   held, or not any more
//! ```
//!
//! Nobody else keeps these sets, so none of them can be forgotten. What [`Needs::of`] looks at is only changed through
//! `get_mut`, and time is no part of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Index;

use tokio::time::Instant;

use super::activation::Accounting;
use super::pressure::Stall;
use super::view::VmState;
use super::vm::{Vm, VmId};

/// What one VM waits for.
#[derive(Clone, Copy, Default, PartialEq)]
struct Needs {
    deadline: Option<Instant>,
    refused: Option<Instant>,
    /// Since when it stands still for others, to go on by itself; `None` in it: since before this controller.
    emptied: Option<Option<Instant>>,
    due: bool,
}

impl Needs {
    fn of(vm: &Vm) -> Self {
        let grant = vm.grant_due && vm.greeted;
        Self {
            deadline: vm.next_deadline(),
            refused: vm.refused_since,
            emptied: (vm.is_emptied() && !vm.kept_paused).then_some(vm.paused_at),
            // One that waits for room in its queue is due again when it has some.
            due: vm.alive() && !vm.awaits_room && (grant || vm.balloon_due || vm.start_due || vm.reclaim_due),
        }
    }
}

struct Entry {
    vm: Vm,
    /// As it is sorted in.
    needs: Needs,
    stall: Stall,
}

/// All VMs that have not left the accounts yet, by number.
#[derive(Default)]
pub(super) struct Vms {
    entries: BTreeMap<VmId, Entry>,
    /// The VMs of each name: at most one that runs, and those before it whose memory is not back yet.
    named: HashMap<String, BTreeSet<VmId>>,
    touched: BTreeSet<VmId>,
    deadlines: BTreeSet<(Instant, VmId)>,
    refused: BTreeSet<(Instant, VmId)>,
    emptied: BTreeSet<(Option<Instant>, VmId)>,
    due: BTreeSet<VmId>,
    restless: BTreeSet<VmId>,
    crowded: bool,
}

impl Vms {
    /// Takes a VM in. Its name does not change any more.
    pub fn insert(&mut self, id: VmId, vm: Vm) {
        self.named.entry(vm.name.clone()).or_default().insert(id);
        self.touched.insert(id);
        let before = self.entries.insert(id, Entry { vm, needs: Needs::default(), stall: Stall::default() });
        debug_assert!(before.is_none(), "numbers are never used twice");
    }

    /// Gives a VM away.
    pub fn remove(&mut self, id: &VmId) -> Option<Vm> {
        let Entry { vm, needs, .. } = self.entries.remove(id)?;
        if let Some(ids) = self.named.get_mut(&vm.name) {
            ids.remove(id);
            if ids.is_empty() {
                self.named.remove(&vm.name);
            }
        }
        self.sort(*id, needs, Needs::default());
        Some(vm)
    }

    /// A VM to look at.
    pub fn get(&self, id: &VmId) -> Option<&Vm> {
        self.entries.get(id).map(|entry| &entry.vm)
    }

    /// A VM to change: it is looked at after this input.
    pub fn get_mut(&mut self, id: &VmId) -> Option<&mut Vm> {
        let entry = self.entries.get_mut(id)?;
        self.touched.insert(*id);
        Some(&mut entry.vm)
    }

    /// All of them, the oldest first. For those who want to see them all, never after each input.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (VmId, &Vm)> {
        self.entries.iter().map(|(id, entry)| (*id, &entry.vm))
    }

    /// The VMs of this name, the oldest first.
    pub fn named(&self, name: &str) -> impl DoubleEndedIterator<Item = (VmId, &Vm)> {
        self.named.get(name).into_iter().flatten().map(|id| (*id, &self[id]))
    }

    /// The VM of this name that has not ended.
    pub fn running(&self, name: &str) -> Option<(VmId, &Vm)> {
        self.named(name).find(|(_, vm)| vm.state != VmState::Ended)
    }

    /// The earliest deadline of all.
    pub fn next_deadline(&mut self) -> Option<Instant> {
        self.refresh();
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// Those that have a deadline that is over.
    pub fn overdue(&mut self, now: Instant) -> Vec<VmId> {
        self.refresh();
        self.deadlines.iter().take_while(|(at, _)| *at <= now).map(|(_, id)| *id).collect()
    }

    /// Those whose last want could not be served; who has waited for longest comes first.
    pub fn refused(&mut self) -> Vec<VmId> {
        self.refresh();
        self.refused.iter().map(|(_, id)| *id).collect()
    }

    /// Those that stand still for others, and go on by themselves; who was paused first comes first.
    pub fn emptied(&mut self) -> Vec<VmId> {
        self.refresh();
        self.emptied.iter().map(|(_, id)| *id).collect()
    }

    /// Those for whose workers a message was dropped, and who do not wait for room yet.
    pub fn due(&mut self) -> Vec<VmId> {
        self.refresh();
        self.due.iter().copied().collect()
    }

    /// Those that have begun or ceased to wait for memory, or have waited, since the last time.
    pub fn restless(&mut self) -> BTreeSet<VmId> {
        self.refresh();
        std::mem::take(&mut self.restless)
    }

    /// Whether the queue of a worker that was written to since the last time is more than half full.
    pub fn crowded(&mut self) -> bool {
        self.refresh();
        std::mem::take(&mut self.crowded)
    }

    /// Whether every VM is sorted in as it is. For tests: it looks at all of them.
    pub fn in_order(&self) -> bool {
        let sorted = |(id, entry): (&VmId, &Entry)| self.touched.contains(id) || Needs::of(&entry.vm) == entry.needs;
        self.entries.iter().all(sorted)
    }

    /// Looks at what was touched.
    fn refresh(&mut self) {
        while let Some(id) = self.touched.pop_first() {
            let Some(entry) = self.entries.get_mut(&id) else { continue };
            let vm = &entry.vm;
            self.crowded |= vm.alive() && vm.to_worker.capacity() < vm.to_worker.max_capacity() / 2;
            let now = Needs::of(vm);
            let before = std::mem::replace(&mut entry.needs, now);
            let stall = Stall::of(vm);
            if std::mem::replace(&mut entry.stall, stall) != stall {
                self.restless.insert(id);
            }
            self.sort(id, before, now);
        }
    }

    fn sort(&mut self, id: VmId, before: Needs, now: Needs) {
        let times =
            [(&mut self.deadlines, before.deadline, now.deadline), (&mut self.refused, before.refused, now.refused)];
        for (set, before, now) in times {
            if before != now {
                before.map(|at| set.remove(&(at, id)));
                now.map(|at| set.insert((at, id)));
            }
        }
        if before.emptied != now.emptied {
            before.emptied.map(|at| self.emptied.remove(&(at, id)));
            now.emptied.map(|at| self.emptied.insert((at, id)));
        }
        match (before.due, now.due) {
            (false, true) => drop(self.due.insert(id)),
            (true, false) => drop(self.due.remove(&id)),
            (true, true) | (false, false) => {}
        }
    }
}

/// A VM that is known to be there.
impl Index<&VmId> for Vms {
    type Output = Vm;

    fn index(&self, id: &VmId) -> &Vm {
        self.get(id).expect("a VM of this number")
    }
}

impl Vm {
    /// When something has to be done for it without being told.
    fn next_deadline(&self) -> Option<Instant> {
        let answers = self.waiting.iter().map(|w| w.until);
        let hold = self.hold.filter(|hold| !hold.acted && self.state == VmState::Running).map(|hold| hold.deadline);
        let activation = match &self.accounting {
            Accounting::Beginning(beginning) => beginning.next_deadline(),
            Accounting::Off | Accounting::On => None,
        };
        let stop = self.stopping.as_ref().and_then(|stopping| stopping.until);
        let balloon = self.balloon.next().filter(|_| self.alive());
        answers.chain(hold).chain(activation).chain(stop).chain(balloon).chain(self.patience).min()
    }
}

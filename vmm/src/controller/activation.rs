//! Accounting that begins on a running VM: with its first limit, or because somebody wants to see what it uses.
//!
//! ```text
//!              a limit, or track=on          Activated: charge what is resident, reserve, stock
//!   OFF ────────────────────────────► BEGINNING ────────────────────────────────────────────────► ON
//!    ▲                                    │ NotActivated: every request is refused, nothing has changed
//!    └────────────────────────────────────┘
//! ```
//!
//! Requests that come meanwhile wait in their order and are made when the account is there: each is then a change like
//! any other, of a VM that was always accounted. A limit of a group needs the account of all VMs below it: all of them
//! begin, or the limit is refused. A client is never told of half of it. A worker that does not answer
//! in time has its clients told so; when it does answer later, the VM is accounted, and without a limit that is no harm.
//! There is no way back (semantics row 70).

use std::time::Duration;

use memcg_core::units::Pages;
use serde_json::json;
use tokio::time::Instant;

use super::actor::{Actor, silent};
use super::error::{Code, Refusal};
use super::events::EventKind;
use super::host;
use super::vm::{Vm, VmId};
use crate::worker::protocol::ToWorker;

/// How long a worker may take to register and count its RAM.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether a VM is charged for what it uses.
pub(super) enum Accounting {
    /// Nothing is charged, and its worker has no userfaultfd.
    Off,
    /// Its worker was told to begin.
    Beginning(Beginning),
    /// For the life of the VM.
    On,
}

/// Goes on when a VM is accounted, or will not be.
type Then = Box<dyn FnOnce(&mut Actor, Result<(), Refusal>) + Send>;

/// Accounting that was asked for.
pub(super) struct Beginning {
    seq: u32,
    until: Instant,
    waiting: Vec<Then>,
}

impl Beginning {
    /// When its clients have to be answered.
    pub fn next_deadline(&self) -> Option<Instant> {
        (!self.waiting.is_empty()).then_some(self.until)
    }
}

impl Vm {
    /// Whether memory is charged to this VM.
    pub fn accounted(&self) -> bool {
        matches!(self.accounting, Accounting::On)
    }

    /// Whether requests wait for the account to begin: later ones wait behind them.
    pub fn awaits_accounting(&self) -> bool {
        matches!(&self.accounting, Accounting::Beginning(beginning) if !beginning.waiting.is_empty())
    }
}

impl Actor {
    /// Has all of `vms` accounted, and goes on: with the first that will not be and why, if there is one. All are told
    /// at once, and waited for one after the other.
    pub fn account_first(
        &mut self,
        vms: &[VmId],
        then: impl FnOnce(&mut Self, Result<(), (VmId, Refusal)>) + Send + 'static,
    ) {
        for id in vms {
            if let Err(refusal) = self.begin_accounting(*id) {
                return then(self, Err((*id, refusal)));
            }
        }
        let beginning =
            |id: &VmId| self.vms.get(id).is_some_and(|vm| matches!(vm.accounting, Accounting::Beginning(_)));
        let Some(at) = vms.iter().position(beginning) else { return then(self, Ok(())) };
        let (id, rest) = (vms[at], vms[at + 1..].to_vec());
        let vm = self.vms.get_mut(&id).expect("it begins");
        if let Accounting::Beginning(beginning) = &mut vm.accounting {
            beginning.waiting.push(Box::new(move |actor, result| match result {
                Ok(()) => actor.account_first(&rest, then),
                Err(refusal) => then(actor, Err((id, refusal))),
            }));
        }
    }

    /// Tells a worker to begin, unless it has been told already.
    fn begin_accounting(&mut self, id: VmId) -> Result<(), Refusal> {
        let Some(vm) = self.vms.get_mut(&id) else { return Ok(()) };
        let until = Instant::now() + host::scaled(PATIENCE);
        match &mut vm.accounting {
            Accounting::On => {}
            // Its clients have lost patience, and its worker may still answer.
            Accounting::Beginning(beginning) if beginning.waiting.is_empty() => beginning.until = until,
            Accounting::Beginning(_) => {}
            Accounting::Off => {
                let seq = vm.next_seq();
                if !vm.send(ToWorker::Activate { seq, epoch: self.epoch }) {
                    return Err(silent(&vm.name));
                }
                vm.accounting = Accounting::Beginning(Beginning { seq, until, waiting: Vec::new() });
            }
        }
        Ok(())
    }

    /// Tells those who wait for accounting to begin that it will not, or not for them.
    pub fn refuse_waiting(&mut self, id: VmId, why: &Refusal) {
        let vm = self.vms.get_mut(&id).expect("checked");
        let Accounting::Beginning(beginning) = &mut vm.accounting else { return };
        for then in std::mem::take(&mut beginning.waiting) {
            then(self, Err(why.clone()));
        }
    }

    /// A worker charges from now on; its guest holds `resident` pages.
    pub fn activated(&mut self, id: VmId, seq: u32, resident: Pages, reserve_target: Pages) {
        let vm = self.vms.get_mut(&id).expect("checked");
        let most = vm.largest_reserve();
        let lie = match &vm.accounting {
            Accounting::Beginning(beginning) if beginning.seq == seq => {
                if resident > vm.size {
                    Some(format!("says that {resident} of {} are resident", vm.size))
                } else if reserve_target > most {
                    Some(format!("wants a reserve of {reserve_target}, at most {most} are needed"))
                } else {
                    None
                }
            }
            _ => Some("began to charge without being asked".to_owned()),
        };
        if let Some(lie) = lie {
            self.lie(id, lie);
            return;
        }
        let waiting = match std::mem::replace(&mut vm.accounting, Accounting::On) {
            Accounting::Beginning(beginning) => beginning.waiting,
            Accounting::Off | Accounting::On => Vec::new(),
        };
        vm.reserve_target = reserve_target;
        vm.granted_total = resident.0;
        vm.report.granted_total = resident.0;
        vm.report.guest = resident.0;
        vm.report.debt = reserve_target.0;
        let node = vm.node;
        let name = vm.name.clone();
        self.tree.activate(node, |_| resident).expect("what fits into RAM fits into a counter");
        let overhead = vm.overhead.clone();
        self.charge_what_is_there(node, &overhead);
        self.fund(id);
        let details = self.account(id, json!({ "resident_bytes": resident.bytes() }));
        self.event(EventKind::AccountingBegan, Some(&name), details);
        for then in waiting {
            then(self, Ok(()));
        }
    }

    /// A worker cannot charge; everything is as it was.
    pub fn not_activated(&mut self, id: VmId, seq: u32, message: &str) {
        let vm = self.vms.get_mut(&id).expect("checked");
        if !matches!(&vm.accounting, Accounting::Beginning(beginning) if beginning.seq == seq) {
            self.lie(id, "refused to charge without being asked".to_owned());
            return;
        }
        let message: String = message.chars().filter(|c| !c.is_control()).collect();
        let message = format!("accounting of the VM {:?} cannot begin: {message}", vm.name);
        let refused = std::mem::replace(&mut vm.accounting, Accounting::Off);
        if let Accounting::Beginning(beginning) = refused {
            let refusal = Refusal::new(Code::NotAccounted, message);
            for then in beginning.waiting {
                then(self, Err(refusal.clone()));
            }
        }
    }

    /// Answers clients whose VM's worker has not answered in time.
    pub fn overdue_activation(&mut self, id: VmId, now: Instant) {
        let Some(vm) = self.vms.get_mut(&id) else { return };
        if let Accounting::Beginning(beginning) = &vm.accounting
            && beginning.until <= now
        {
            let silent = silent(&vm.name);
            self.refuse_waiting(id, &silent);
        }
    }
}

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
//! any other, of a VM that was always accounted. A client is never told of half of it. A worker that does not answer
//! in time has its clients told so; when it does answer later, the VM is accounted, and without a limit that is no harm.
//! There is no way back (semantics row 70).

use std::time::Duration;

use memcg_core::tree::{Kind, Mode, SetLimitError};
use memcg_core::units::Pages;
use serde_json::json;
use tokio::time::Instant;

use super::actor::{Actor, answer, silent};
use super::changes::{Changed, MemoryChange};
use super::error::{Code, Refusal};
use super::events::EventKind;
use super::grants::EPOCH;
use super::host;
use super::vm::{Reply, Vm, VmId};
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

/// Accounting that was asked for.
pub(super) struct Beginning {
    seq: u32,
    until: Instant,
    waiting: Vec<(MemoryChange, Reply<Changed>)>,
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

    /// Tells the clients that wait for accounting to begin that it will not, or not for them.
    pub fn refuse_waiting(&mut self, why: &Refusal) {
        if let Accounting::Beginning(beginning) = &mut self.accounting {
            for (_, reply) in beginning.waiting.drain(..) {
                answer(reply, Err(why.clone()));
            }
        }
    }
}

impl Actor {
    /// Sees to it that the VM is accounted if `change` needs that. Returns the request when it can be made now;
    /// otherwise it is refused, or waits.
    pub fn accounted_first(
        &mut self,
        id: VmId,
        change: MemoryChange,
        reply: Reply<Changed>,
    ) -> Option<(MemoryChange, Reply<Changed>)> {
        let vm = self.vms.get_mut(&id).expect("found");
        if let Accounting::Beginning(beginning) = &mut vm.accounting
            && !beginning.waiting.is_empty()
        {
            beginning.waiting.push((change, reply));
            return None;
        }
        let unlimited = match self.tree.check_patch(vm.node, &change.patch) {
            Ok(()) => true,
            Err(SetLimitError::NotAccounted { .. }) => false,
            Err(error) => {
                answer(reply, Err(self.refusal(id, &error)));
                return None;
            }
        };
        if change.track == Some(false) && (vm.accounted() || !unlimited) {
            let message =
                format!("the VM {:?} is accounted for as long as it runs: track=off is not possible", vm.name);
            answer(reply, Err(Refusal::new(Code::WrongState, message)));
            return None;
        }
        if vm.accounted() || unlimited && change.track != Some(true) {
            return Some((change, reply));
        }
        let until = Instant::now() + host::scaled(PATIENCE);
        if let Accounting::Beginning(beginning) = &mut vm.accounting {
            // Its clients have lost patience, and its worker may still answer.
            beginning.until = until;
            beginning.waiting.push((change, reply));
            return None;
        }
        let seq = vm.next_seq();
        if vm.send(ToWorker::Activate { seq, epoch: EPOCH }) {
            vm.accounting = Accounting::Beginning(Beginning { seq, until, waiting: vec![(change, reply)] });
        } else {
            answer(reply, Err(silent(&vm.name)));
        }
        None
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
        let node = vm.node;
        let name = vm.name.clone();
        self.tree.activate(node, |_| resident).expect("what fits into RAM fits into a counter");
        for (part, pages) in &vm.overhead {
            // It is there already; that it is counted late is no reason to refuse it.
            let charged = self.tree.try_charge_as(node, Kind::Overhead(*part), *pages, Mode::NoFail);
            let _no_limit_yet = charged.expect("what fits into RAM fits into a counter");
        }
        self.fund(id);
        let details = self.account(id, json!({ "resident_bytes": resident.bytes() }));
        self.event(EventKind::AccountingBegan, Some(&name), details);
        for (change, reply) in waiting {
            self.change(id, change, reply);
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
        vm.refuse_waiting(&Refusal::new(Code::NotAccounted, message));
        vm.accounting = Accounting::Off;
    }

    /// Answers clients whose VM's worker has not answered in time.
    pub fn overdue_activation(&mut self, id: VmId, now: Instant) {
        let Some(vm) = self.vms.get_mut(&id) else { return };
        if let Accounting::Beginning(beginning) = &vm.accounting
            && beginning.until <= now
        {
            let silent = silent(&vm.name);
            vm.refuse_waiting(&silent);
        }
    }
}

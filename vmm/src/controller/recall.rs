//! Recalling stocks: what workers hold charged ahead of need comes back before it is decided over.
//!
//! A change of limits, a move and the policy for memory that is out all begin so: pages that no guest uses must not
//! refuse what is asked for. One recall may be of many VMs; what is to be done then is done once, when the last of them
//! has answered, has ended, or has been silent for too long: a silent worker's stock stays counted.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::actor::{Actor, Request};
use super::host;
use super::vm::VmId;
use crate::worker::protocol::ToWorker;

/// How long a worker's stock is waited for.
const PATIENCE: Duration = Duration::from_millis(500);

/// Stocks that are on their way back.
pub(super) struct Recall {
    /// The number of the message that each worker has to answer.
    awaited: BTreeMap<VmId, u32>,
    until: Instant,
    then: Request,
}

impl Recall {
    /// When it is waited for no longer.
    pub fn deadline(&self) -> Instant {
        self.until
    }
}

impl Actor {
    /// Recalls the stocks of `vms`, and does `then` when they are back: at once where there is nobody to ask.
    pub fn recall(&mut self, vms: &[VmId], then: impl FnOnce(&mut Self) + Send + 'static) {
        let mut awaited = BTreeMap::new();
        for id in vms {
            let Some(vm) = self.vms.get_mut(id).filter(|vm| vm.greeted && vm.accounted() && vm.alive()) else {
                continue;
            };
            let seq = vm.next_seq();
            if vm.send(ToWorker::Recall { seq }) {
                awaited.insert(*id, seq);
            }
        }
        if awaited.is_empty() {
            then(self);
        } else {
            self.recalls.push(Recall { awaited, until: Instant::now() + host::scaled(PATIENCE), then: Box::new(then) });
        }
    }

    /// Whether the stock of a VM is on its way back.
    pub fn is_recalled(&self, id: VmId) -> bool {
        self.recalls.iter().any(|recall| recall.awaited.contains_key(&id))
    }

    /// A worker has answered message `seq`.
    pub fn stock_is_back(&mut self, id: VmId, seq: u32) {
        for recall in &mut self.recalls {
            if recall.awaited.get(&id) == Some(&seq) {
                recall.awaited.remove(&id);
            }
        }
        self.end_recalls(None);
    }

    /// A VM has ended: its stock comes back with everything else.
    pub fn recalled_in_vain(&mut self, id: VmId) {
        for recall in &mut self.recalls {
            recall.awaited.remove(&id);
        }
        self.end_recalls(None);
    }

    /// Does what waited for stocks that are back, and at `now` what has waited long enough.
    pub fn end_recalls(&mut self, now: Option<Instant>) {
        let over = |recall: &mut Recall| recall.awaited.is_empty() || now.is_some_and(|now| recall.until <= now);
        // What is done may recall again.
        let ended: Vec<_> = self.recalls.extract_if(.., over).collect();
        for recall in ended {
            (recall.then)(self);
        }
    }
}

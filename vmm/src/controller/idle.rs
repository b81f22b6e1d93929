//! VMs that have nothing to say.
//!
//! A worker speaks when it needs something, or has given something back. That of a guest that touches nothing is silent, and what it
//! said last, when its guest worked, would be taken for what is in use for as long as the guest rests. So whoever looks at all VMs
//! has those asked that have been silent for [`SILENT`]. Nobody waits for the answers: they are there for the next look. Where nobody
//! looks, nobody is woken.

use std::time::Duration;

use tokio::time::Instant;

use super::Controller;
use super::actor::{Actor, Input};
use super::host;
use super::vm::{Vm, VmId};
use crate::worker::protocol::ToWorker;

/// A worker that has said nothing for so long is asked.
const SILENT: Duration = Duration::from_secs(1);

impl Controller {
    /// Has the workers asked that were silent of late; what they say is seen by whoever looks next.
    pub async fn ask_idle(&self) {
        // A controller that is gone has nobody to ask, and says so to whoever looks.
        let _ = self.inbox.send(Input::Request(Box::new(Actor::ask_idle))).await;
    }
}

impl Actor {
    fn ask_idle(&mut self) {
        let now = Instant::now();
        let is_silent = |vm: &Vm| vm.heard_at.is_none_or(|at| at + host::scaled(SILENT) <= now);
        // One that does not answer is not asked again: its queue is for what is more important.
        let is_asked = |vm: &Vm| vm.asked_at > vm.heard_at;
        let idle = |(id, vm): (VmId, &Vm)| (vm.alive() && vm.reported && is_silent(vm) && !is_asked(vm)).then_some(id);
        for id in self.vms.iter().filter_map(idle).collect::<Vec<_>>() {
            let vm = self.vms.get_mut(&id).expect("listed");
            let seq = vm.next_seq();
            if vm.send(ToWorker::Query { seq }) {
                vm.asked_at = Some(now);
            }
        }
    }
}

//! A host that has no memory for a page that is charged.
//!
//! The account says that there is room, and the kernel finds no page: the host is full, or a cgroup that the worker is in. The
//! worker has put the page back as it was, and holds its vCPUs (`memory/fill.rs`). Here the VM is paused, as one that was chosen
//! for the host: what it has is evicted, and it goes on by itself when the host has room, 10 s later at the earliest, or when
//! somebody asks for that.

use serde_json::json;

use super::actor::Actor;
use super::changes::Target;
use super::events::EventKind;
use super::view::{PausedBy, VmState};
use super::vm::VmId;

impl Actor {
    /// A worker has reported: pauses its VM when the host had no memory for it more than `before` times.
    pub fn stop_unfilled(&mut self, id: VmId, before: u64) {
        let vm = self.vms.get_mut(&id).expect("checked");
        // What it met before it heard that it may go on is what it was paused for.
        let is_old = vm.resume_seq.is_some();
        vm.resume_seq.take_if(|seq| vm.report.answers == Some(*seq));
        let times = vm.report.faults.unfilled.saturating_sub(before);
        if times == 0 || is_old || vm.state != VmState::Running || vm.cause.is_some() {
            return;
        }
        let name = vm.name.clone();
        tracing::warn!(vm = name, "the host has no memory for a page that it was granted: it is paused");
        let details = self.account(id, json!({ "times": times }));
        self.event(EventKind::HostOutOfMemory, Some(&name), details);
        self.pause(id, PausedBy::Host, None);
        self.let_it_rest();
        self.look_soon(Target::Vm(id));
    }
}

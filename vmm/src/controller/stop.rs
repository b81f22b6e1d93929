//! Ending a VM in the way of its guest, and starting it again.
//!
//! ```text
//!  stop ─► PowerButton ─► the guest is told ─┬─ it powers itself off ──► Ended, `killed: false`
//!                                            └─ the deadline is over ──► killed, Ended, `killed: true`
//!  start ─► the words of the VM that has ended ─► as `PUT` with them
//! ```
//!
//! A VM that a user has paused goes on, because a guest that stands still hears nothing. One that was paused for want of memory
//! goes on as soon as there is room for it, before others that wait for it too: its end gives all back. While there is none, and
//! while it is held, it hears nothing, and is killed when the time is over; that is said.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::Controller;
use super::actor::{Actor, answer};
use super::config::VmConfig;
use super::error::{Code, Refusal};
use super::view::{VmState, VmView};
use super::vm::{KilledBy, Reply, VmEnd, VmId};
use crate::worker::protocol::ToWorker;

/// How long a guest has to power itself off when nobody says otherwise, before [`super::host::scaled`].
pub const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// A VM that was stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StopView {
    /// True when it had to be killed; false when its guest ended by itself, or had before.
    pub killed: bool,
    /// True when its guest stood still for want of memory as its time was over: it has heard of nothing.
    #[serde(default)]
    pub unheard: bool,
    /// The VM after its end.
    pub vm: VmView,
}

/// A VM whose guest was asked to power itself off.
pub(super) struct Stopping {
    /// When it is killed; absent once it is.
    pub until: Option<Instant>,
    /// Its guest stood still when that was over.
    pub unheard: bool,
    /// Who waits for its end.
    pub replies: Vec<Reply<StopView>>,
}

impl Actor {
    /// Asks the guest to power itself off, and has the VM killed after `patience`. Answered at its end.
    pub fn stop(&mut self, name: &str, patience: Duration, reply: Reply<StopView>) {
        let ended = |vm| StopView { killed: false, unheard: false, vm };
        let id = match self.find(name) {
            Ok(id) => id,
            Err(refusal) => return answer(reply, self.past_view(name).map(ended).ok_or(refusal)),
        };
        let until = Instant::now() + patience;
        let vm = self.vms.get_mut(&id).expect("found");
        if vm.state == VmState::Ended {
            answer(reply, Ok(ended(self.vm_view(id, false))));
            return;
        }
        if let Some(stopping) = &mut vm.stopping {
            // Whoever has the least patience decides.
            stopping.until = stopping.until.map(|before| before.min(until));
            stopping.replies.push(reply);
            return;
        }
        vm.stopping = Some(Stopping { until: Some(until), unheard: false, replies: vec![reply] });
        // A worker that does not read has its guest killed.
        vm.send(ToWorker::PowerButton);
        if vm.state == VmState::Paused {
            self.resume_to_stop(id, until);
        }
    }

    /// Kills a guest that has not powered itself off in time.
    pub fn overdue_stop(&mut self, id: VmId, now: Instant) {
        let Some(stopping) = self.vms.get_mut(&id).and_then(|vm| vm.stopping.as_mut()) else { return };
        if stopping.until.take_if(|until| *until <= now).is_some() {
            let vm = self.vms.get_mut(&id).expect("it is stopped");
            let stands = vm.state == VmState::Paused || vm.hold.is_some();
            if let Some(stopping) = &mut vm.stopping {
                stopping.unheard = stands;
            }
            self.kill(id, VmEnd::Killed(KilledBy::Stop));
        }
    }

    /// What a VM was asked for with, whether it runs or has ended.
    fn config(&self, name: &str) -> Result<Arc<VmConfig>, Refusal> {
        let config = match self.find(name) {
            Ok(id) => &self.vms[&id].config,
            Err(refusal) => &self.past.get(name).ok_or(refusal)?.config,
        };
        let unknown = || Refusal::new(Code::WrongState, format!("nobody knows how the VM {name:?} was made"));
        config.clone().ok_or_else(unknown)
    }
}

impl Controller {
    /// Asks a guest to power itself off, kills the VM after `patience`, and completes when its worker is gone.
    ///
    /// # Errors
    /// When there is none of this name.
    pub async fn stop(&self, name: &str, patience: Duration) -> Result<StopView, Refusal> {
        let name = name.to_owned();
        self.ask(move |actor, reply| actor.stop(&name, patience, reply)).await
    }

    /// What a VM was asked for with.
    ///
    /// # Errors
    /// When there is none of this name, or it was not made by a request.
    pub async fn config(&self, name: &str) -> Result<Arc<VmConfig>, Refusal> {
        let name = name.to_owned();
        self.ask(move |actor, reply| answer(reply, actor.config(&name))).await
    }
}

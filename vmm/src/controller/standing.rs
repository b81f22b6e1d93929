//! What the kernel is told for the case that it acts before we do: the OOM scores of the controller and its workers.
//!
//! The controller is the last that may go: without it nobody decides, and held guests stay held. So `serve` gives itself the
//! lowest score that it may have. Workers inherit that, and lose it at once: they stand like any other process. While the host is
//! short they stand in the order in which they would be chosen ([`memcg_core::oom::standing`]), set when that begins and at
//! each choice; who is spared stands as before. `run` has one VM, watches no host, and changes nothing.
//!
//! Whoever has raised a score may lower it again to the lowest that it ever had, so this needs no privilege but for the first
//! step below 0: `CAP_SYS_RESOURCE`, or `OOMScoreAdjust=` of the unit.

use std::fs::File;
use std::io;

use memcg_core::oom;

use super::actor::Actor;
use super::shortage::Shortage;
use super::vm::VmId;

/// The score of who is never taken.
const NEVER: i16 = -1000;

/// The score of a worker while the host is not short, and of those that are not chosen: that of any other process.
const PLAIN: i16 = 0;

/// Where a process has its score.
///
/// # Errors
/// As the kernel says: there is no such process, or it is another user's.
pub fn of(pid: i32) -> io::Result<File> {
    File::options().write(true).open(format!("/proc/{pid}/oom_score_adj"))
}

/// The score of this process.
fn own() -> i16 {
    let text = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    text.trim().parse().unwrap_or(PLAIN)
}

/// Makes this process the last one that the kernel takes. Returns its score then.
pub fn stand_last() -> i16 {
    // What may not be done is seen in what is returned.
    let _ = std::fs::write("/proc/self/oom_score_adj", NEVER.to_string());
    own()
}

/// What is missing, in a sentence for people, when a controller has `score`.
pub fn obstacle(score: i16) -> Option<String> {
    (score > NEVER).then(|| {
        format!(
            "the kernel may take the controller when memory is out (its OOM score is {score}): OOMScoreAdjust={NEVER} in its \
             unit, or CAP_SYS_RESOURCE"
        )
    })
}

impl Actor {
    /// Tells the kernel in which order the workers would be chosen for the host, or that they are like any other process.
    pub fn tell_kernel(&mut self) {
        let Some(memory) = self.shortage.as_ref().map(Shortage::memory) else { return };
        let owners = self.owners();
        let scores: Vec<(VmId, i16)> = if self.is_short() {
            let ranked = oom::rank(&self.candidates(self.root));
            let ids = ranked.iter().filter_map(|entry| owners.get(&entry.candidate.id).copied());
            ids.zip(oom::standing(&ranked, memory)).collect()
        } else {
            owners.values().map(|id| (*id, PLAIN)).collect()
        };
        for (id, score) in scores {
            self.stand(id, score);
        }
    }

    /// A worker that has just been taken in stands like any other process, where a host is watched.
    pub fn stand_plain(&mut self, id: VmId) {
        if self.shortage.is_some() {
            self.stand(id, PLAIN);
        }
    }

    /// Gives a VM's worker a score, if that is another one than it has.
    fn stand(&mut self, id: VmId, score: i16) {
        let Some(vm) = self.vms.get_mut(&id).filter(|vm| vm.alive() && vm.oom_score != Some(score)) else { return };
        if let Err(error) = vm.process.set_oom_score(score) {
            tracing::debug!(%error, vm = vm.name, score, "the worker's OOM score stays as it is");
        }
        vm.oom_score = Some(score);
    }
}

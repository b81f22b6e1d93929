//! Does a worker hold what it says? A worker is believed only as far as the host bears it out.
//!
//! Every minute, when it is taken over, and when somebody checks, the host is asked how much of guest RAM is resident and
//! how much private memory the worker has in all; the actor compares that with what it has charged. No guess is in it: a
//! page is charged before it is filled and given up before it is uncharged, so at no moment can more be resident than was
//! charged at its beginning and granted since.
//!
//! ```text
//!  actor: granted, charged ─► a thread: PAGEMAP_SCAN, RssAnon ─► actor: granted meanwhile ─► compare
//!                                                                         │ more is resident, twice in a row
//!                                                                         ▼ the VM ends, with the numbers
//! ```

use std::ops::Range;
use std::time::Duration;

use memcg_core::audit;
use memcg_core::units::{Pages, human};
use tokio::sync::mpsc;

use super::actor::{Actor, Input, answer};
use super::error::{Code, Refusal};
use super::residency::{Residency, Resident, looseness};
use super::view::VmState;
use super::vm::VmId;
use super::{Controller, host};

/// Time between two audits of a VM.
const EVERY: Duration = Duration::from_secs(60);

/// Time after which one that does not fit is audited again, when all are.
const AGAIN: Duration = Duration::from_millis(200);

/// Resident pages that are overlooked: the kernel's page tables are read while they change.
const TOLERANCE: Pages = Pages(64);

/// Private memory above what the worker is charged that is overlooked: what it costs is an estimate.
const PRIVATE_TOLERANCE: Pages = Pages(1024);

/// What an audit has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Pages of guest RAM that are resident.
    pub resident: Pages,
    /// Private pages of the worker, guest RAM included.
    pub private: Pages,
    /// Pages that were charged for guest RAM: resident, in stock, in reserve. All of RAM where nothing is charged.
    pub charged: Pages,
    /// Pages that the VM may cost beside them.
    pub overhead: Pages,
    /// It was the second time in a row, and the VM was ended.
    pub ended: bool,
}

impl Finding {
    /// Whether the account covers what is there.
    pub fn ok(&self) -> bool {
        let private = self.charged + self.overhead + PRIVATE_TOLERANCE + looseness();
        self.resident <= self.charged + TOLERANCE && self.private <= private
    }

    fn words(&self) -> String {
        let [resident, private, charged, overhead] =
            [self.resident, self.private, self.charged, self.overhead].map(|pages| human(pages.bytes()));
        format!(
            "holds {resident} of guest memory and {private} in all, and was granted {charged} and {overhead} beside it"
        )
    }
}

/// What the actor knew when an audit began.
struct Before {
    residency: Residency,
    /// RAM, its stage, and the store.
    areas: Vec<Range<u64>>,
    granted: u64,
    charged: Pages,
}

impl Controller {
    /// Compares what is resident of a VM with what it is charged for. What does not fit twice in a row ends it.
    ///
    /// # Errors
    /// When there is no such VM that runs, or the host does not let its worker be looked into.
    pub async fn audit(&self, id: VmId) -> Result<Finding, Refusal> {
        let before = self.ask(move |actor, reply| answer(reply, actor.begin_audit(id))).await?;
        let Before { residency, areas, granted, charged } = before;
        let seen = tokio::task::spawn_blocking(move || residency.resident(&areas)).await;
        let seen = seen.map_err(std::io::Error::other).flatten();
        let seen =
            seen.map_err(|error| Refusal::new(Code::Busy, format!("the worker cannot be looked into: {error}")))?;
        self.ask(move |actor, reply| answer(reply, actor.end_audit(id, seen, granted, charged))).await
    }

    /// Audits all VMs that run, one after the other; those with too much memory a second time, which ends them.
    ///
    /// # Errors
    /// When the controller is going away.
    pub async fn audit_all(&self) -> Result<audit::Finding, Refusal> {
        let (mut audited, mut unseen, mut wrong) = (0, 0, Vec::new());
        for (id, name) in self.ask(|actor, reply| answer(reply, Ok(actor.auditable()))).await? {
            let mut found = self.audit(id).await;
            if found.as_ref().is_ok_and(|finding| !finding.ok() && !finding.ended) {
                tokio::time::sleep(host::scaled(AGAIN)).await;
                found = self.audit(id).await;
            }
            match found {
                Ok(finding) if !finding.ok() => wrong.push(format!("{name}: {}: it was ended", finding.words())),
                Ok(_) => audited += 1,
                // Ended meanwhile, by itself or by another audit.
                Err(refusal) if refusal.code == Code::NotFound => {}
                Err(refusal) if refusal.code == Code::Stopping => return Err(refusal),
                Err(_) => unseen += 1,
            }
        }
        let unseen = if unseen > 0 { format!("; {unseen} cannot be looked into") } else { String::new() };
        let looked_at = format!("{audited} VMs: the host finds no more memory at them than was charged{unseen}");
        Ok(audit::Finding::new("audit", looked_at, &wrong))
    }
}

/// Audits a VM every minute as long as it is there. The first time comes at a moment of its own, so that many VMs that
/// were started together are not looked into together.
pub(super) async fn keep(inbox: mpsc::WeakSender<Input>, news: tokio::sync::watch::Receiver<u64>, id: VmId) {
    // Steps of the golden ratio spread any number of VMs evenly.
    let mut pause = EVERY.mul_f64((id.0 as f64 * 0.618_034).fract());
    loop {
        tokio::time::sleep(host::scaled(pause)).await;
        pause = EVERY;
        let Some(inbox) = inbox.upgrade() else { return };
        let controller = Controller { inbox, news: news.clone() };
        match controller.audit(id).await {
            Err(refusal) if refusal.code != Code::Busy => return,
            _ => {}
        }
    }
}

impl Actor {
    /// The VMs that have said what they hold.
    fn auditable(&self) -> Vec<(VmId, String)> {
        let said = self.vms.iter().filter(|(_, vm)| vm.alive() && vm.reported);
        said.map(|(id, vm)| (id, vm.name.clone())).collect()
    }

    fn begin_audit(&self, id: VmId) -> Result<Before, Refusal> {
        let vm = self.vms.get(&id).filter(|vm| vm.alive());
        let vm = vm.ok_or_else(|| Refusal::new(Code::NotFound, "the VM has ended"))?;
        let residency = vm.process.residency().cloned();
        let unseen = || Refusal::new(Code::WrongState, "the worker cannot be looked into: its pagemap is not open");
        let charged = if vm.accounted() { vm.outstanding().saturating_sub(vm.grown()) } else { vm.size };
        Ok(Before { residency: residency.ok_or_else(unseen)?, areas: vm.areas(), granted: vm.granted_total, charged })
    }

    fn end_audit(&mut self, id: VmId, seen: Resident, granted: u64, charged: Pages) -> Result<Finding, Refusal> {
        let vm = self.vms.get_mut(&id).filter(|vm| vm.alive());
        let vm = vm.ok_or_else(|| Refusal::new(Code::NotFound, "the VM has ended"))?;
        let overhead = vm.fixed_overhead() + vm.grown();
        // All of it may have become resident before the host was asked.
        let charged = charged + Pages(vm.granted_total.saturating_sub(granted));
        let mut finding = Finding { resident: seen.areas, private: seen.private, charged, overhead, ended: false };
        let before = std::mem::replace(&mut vm.suspected, !finding.ok());
        if vm.suspected {
            let name = vm.name.clone();
            tracing::warn!(vm = name, ?finding, "more is resident than was charged");
            if before && vm.state != VmState::Ended {
                finding.ended = true;
                self.lie(id, finding.words());
            }
        }
        Ok(finding)
    }
}

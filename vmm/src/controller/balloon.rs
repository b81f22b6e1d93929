//! What a guest's balloon is told, and whether the guest follows.
//!
//! The size that a balloon *should* have follows from limits ([`Actor::balloon_target`]). What the guest is told is the
//! same, until it stalls: then it is what the guest has, so that its driver does not try in vain for ever, and after a
//! rest the target again ([`memcg_core::progress`]). That is looked at with every report and at the end of each window.
//!
//! What a guest has given is what its worker has in BALLOONED, never what the guest says.
//!
//! With `deflate_on_oom` a guest that is out of memory takes pages back. That is an event, one a second at most, and
//! nothing is asked of this guest for a while. The pages are charged when they are touched, like any other.
//!
//! What a guest claims and its worker refuses is an event too: the first time, and each time that there is twice as much.

use std::time::Duration;

use memcg_core::progress::{Asking, News, State};
use memcg_core::units::Pages;
use serde_json::json;
use tokio::time::Instant;

use super::actor::Actor;
use super::events::EventKind;
use super::host;
use super::view::VmState;
use super::vm::{Vm, VmId};
use crate::worker::protocol::{Report, ToWorker};

/// Time between two events about one guest that takes pages back.
const TAKEN_BACK_EVERY: Duration = Duration::from_secs(1);

/// What is asked of one guest's balloon, and its own time.
#[derive(Debug)]
pub(super) struct BalloonAsking {
    asking: Asking,
    /// Time in which the guest has run and could have given something, up to `at`.
    ran: Duration,
    at: Instant,
    /// It runs since then.
    runs: bool,
    /// Pages that it has taken back because it was out of memory, as the last event has said.
    taken_back: u64,
    /// When the next such event may come: somebody waits for that time.
    taken_back_next: Option<Instant>,
    /// Guest errors, as the last event has said.
    errors: u64,
}

impl Default for BalloonAsking {
    fn default() -> Self {
        let (asking, at) = (Asking::new(), Instant::now());
        Self { asking, ran: Duration::ZERO, at, runs: false, taken_back: 0, taken_back_next: None, errors: 0 }
    }
}

impl BalloonAsking {
    /// The guest's time now, and whether it goes on. On a slow host it is slow.
    fn tick(&mut self, runs: bool) -> Duration {
        let now = Instant::now();
        if self.runs {
            self.ran += now.saturating_duration_since(self.at);
        }
        (self.at, self.runs) = (now, runs);
        self.ran / host::slowness()
    }

    /// How the guest answers.
    pub fn state(&self) -> State {
        self.asking.state()
    }

    /// What the guest is told when `wanted` pages are wanted of it.
    pub fn told(&self, wanted: Pages) -> Pages {
        self.asking.told(wanted)
    }

    /// When somebody should look again: at the guest not while it stands still.
    pub fn next(&self) -> Option<Instant> {
        self.next_look().into_iter().chain(self.taken_back_next).min()
    }

    fn next_look(&self) -> Option<Instant> {
        let next = self.asking.next().filter(|_| self.runs)?;
        Some(self.at + host::scaled(next).saturating_sub(self.ran))
    }

    /// A worker is taken over: what its guest has taken back so far, and got wrong, was told by somebody else.
    pub fn adopted(&mut self, report: &Report) {
        (self.taken_back, self.errors) = (report.oom_deflated, report.faults.guest_errors);
    }
}

/// Whether the guest could give something now.
fn can_give(vm: &Vm) -> bool {
    vm.state == VmState::Running && !vm.report.held && vm.report.balloon_ready && vm.accounted()
}

impl Actor {
    /// Looks how far the guest is, and sends the balloon target that follows from that and from the limits, when it has
    /// changed.
    pub fn aim_balloon(&mut self, id: VmId) {
        let wanted = self.balloon_target(id);
        let vm = self.vms.get_mut(&id).expect("checked");
        let runs = can_give(vm);
        let now = vm.balloon.tick(runs);
        if !vm.report.balloon_ready {
            // The next driver begins anew.
            vm.balloon.asking = Asking::new();
        }
        let (released, actual) = (Pages(vm.report.ballooned), Pages(vm.report.balloon_actual.into()));
        if vm.report.oom_deflated > vm.balloon.taken_back {
            vm.balloon.asking.taken_back(now, actual);
        }
        let news = if runs { vm.balloon.asking.look(now, wanted, released, actual) } else { None };
        self.send_target(id, wanted);
        self.tell_taken_back(id);
        if let Some(news) = news {
            self.balloon_news(id, wanted, news);
        }
    }

    fn send_target(&mut self, id: VmId, wanted: Pages) {
        let vm = self.vms.get_mut(&id).expect("checked");
        let pages = u32::try_from(vm.balloon.told(wanted).0).unwrap_or(u32::MAX);
        if vm.state == VmState::Starting || vm.balloon_sent == Some(pages) {
            vm.balloon_due = false;
            return;
        }
        let sent = vm.send(ToWorker::BalloonTarget { pages });
        vm.balloon_due = !sent;
        if sent {
            vm.balloon_sent = Some(pages);
        }
    }

    fn balloon_news(&mut self, id: VmId, wanted: Pages, news: News) {
        let vm = &self.vms[&id];
        let missing = wanted.saturating_sub(Pages(vm.report.ballooned));
        let rest = vm.balloon.next_look().map(|at| at.saturating_duration_since(Instant::now()));
        let details = json!({
            "missing_bytes": missing.bytes(),
            "told_bytes": vm.balloon.told(wanted).bytes(),
            "again_in_ms": rest.map(|rest| u64::try_from(rest.as_millis()).unwrap_or(u64::MAX)),
        });
        let (name, details) = (vm.name.clone(), self.account(id, details));
        let kind = match news {
            News::Stalled => EventKind::TargetStalled,
            News::Uncooperative => EventKind::Uncooperative,
        };
        self.event(kind, Some(&name), details);
    }

    /// Says what the guest has taken back because it was out of memory, unless that was said a moment ago.
    fn tell_taken_back(&mut self, id: VmId) {
        let vm = self.vms.get_mut(&id).expect("checked");
        let now = Instant::now();
        if vm.balloon.taken_back_next.is_some_and(|next| now < next) {
            return;
        }
        let total = vm.report.oom_deflated;
        let taken = total.saturating_sub(vm.balloon.taken_back);
        vm.balloon.taken_back_next = (taken > 0).then(|| now + TAKEN_BACK_EVERY);
        if taken == 0 {
            return;
        }
        vm.balloon.taken_back = total;
        let details = json!({ "taken_bytes": Pages(taken).bytes(), "taken_total_bytes": Pages(total).bytes() });
        let (name, details) = (vm.name.clone(), self.account(id, details));
        self.event(EventKind::GuestDeflatedOnOom, Some(&name), details);
    }

    /// Says that the guest has claimed what was refused, unless that was said when there was half as much.
    pub fn tell_guest_errors(&mut self, id: VmId) {
        let vm = self.vms.get_mut(&id).expect("checked");
        let total = vm.report.faults.guest_errors;
        if total == 0 || total / 2 < vm.balloon.errors {
            return;
        }
        let more = total - std::mem::replace(&mut vm.balloon.errors, total);
        let (name, details) = (vm.name.clone(), json!({ "guest_errors": more, "guest_errors_total": total }));
        let details = self.account(id, details);
        self.event(EventKind::GuestMisbehaves, Some(&name), details);
    }

    /// Looks again at a guest that was asked for pages.
    pub fn overdue_balloon(&mut self, id: VmId, now: Instant) {
        if self.vms.get(&id).is_some_and(|vm| vm.alive() && vm.balloon.next().is_some_and(|at| at <= now)) {
            self.aim_balloon(id);
        }
    }
}

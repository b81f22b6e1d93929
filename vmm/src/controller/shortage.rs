//! A host that runs short of memory: its VMs are asked for some before the kernel has to act.
//!
//! Whether it is short, and how much is missing, is `memcg_core::host`'s; here are the readings and what comes of them. What is
//! missing is asked of the root group like anybody's request (`reclaim.rs`), so the same ladder finds it: it is spread over all
//! VMs by what they have above their protection, idle memory first, and whoever does not give is not waited for.
//!
//! ```text
//!  Signals ── every 250 ms to 10 s ──► Watch ──► short: pressure_entered, a request for the root, small stocks
//!                                            ├─► critical for too long: somebody is chosen (`victim.rs`)
//!                                            └─► calm:  pressure_left, who was paused goes on
//! ```
//!
//! A host is looked at before it could have become short, so one with plenty of memory wakes nobody more than once in 10 s.

use std::time::Duration;

use memcg_core::host::{Reading, Sign, Terms, Verdict, Watch};
use memcg_core::units::Pages;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::oneshot;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::Controller;
use super::actor::Actor;
use super::changes::Target;
use super::events::EventKind;
use super::host;
use super::oom_log::Reason;
use super::victim::Outcome;
use super::vm::{Vm, VmId};

/// Stock that a VM may have while the host is short: what it is granted ahead of need is missing elsewhere.
pub const STOCK: Pages = Pages(64);

/// Reads what the host says; `None` when it says nothing.
pub type Read = Box<dyn FnMut() -> Option<Reading> + Send>;

/// The host as it is watched.
pub struct Shortage {
    read: Read,
    watch: Watch,
    /// All memory that it has.
    memory: Pages,
    reading: Reading,
    verdict: Verdict,
    /// Since when it is short, and for how long it was before.
    since: Option<Instant>,
    total: Duration,
    next: Instant,
}

impl Shortage {
    /// When the host is to be looked at again.
    pub fn next_look(&self) -> Instant {
        self.next
    }

    /// All memory that it has.
    pub fn memory(&self) -> Pages {
        self.memory
    }

    /// Whether it is short.
    pub fn is_short(&self) -> bool {
        self.verdict.short.is_some()
    }

    /// Whether reclaim has had its time, and did not help.
    pub fn is_critical(&self) -> bool {
        self.verdict.victim
    }

    /// Has it looked at by `now`.
    pub fn look_at(&mut self, now: Instant) {
        self.next = self.next.min(now);
    }

    /// What is missing until `back` could come back without making the host short again.
    pub fn missing_for(&self, back: Pages) -> Pages {
        self.watch.missing_for(back)
    }

    /// For people and their tools.
    pub fn view(&self) -> ShortageView {
        let terms = self.watch.terms();
        let total = self.total + self.since.map_or(Duration::ZERO, |since| since.elapsed());
        ShortageView {
            short: self.verdict.short.map(ShortageSign::from),
            available_bytes: self.reading.available.bytes(),
            enter_bytes: terms.enter.bytes(),
            leave_bytes: terms.leave.bytes(),
            critical_bytes: terms.critical.bytes(),
            total_us: u64::try_from(total.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

/// Whether the host runs short of memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShortageView {
    /// By what that is seen; `null` when it does not.
    pub short: Option<ShortageSign>,
    /// Memory that could be had without swapping: the least of what the host and the cgroups above the controller leave.
    pub available_bytes: u64,
    /// Below this much for a second the host is short.
    pub enter_bytes: u64,
    /// Above this much for ten seconds it is not any more.
    pub leave_bytes: u64,
    /// Below this much for five seconds somebody is chosen.
    pub critical_bytes: u64,
    /// For how long it was short in all, in microseconds; counted anew by every controller.
    pub total_us: u64,
}

/// How a host shows that it is short of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ShortageSign {
    /// Little memory is left.
    Available,
    /// Some is left, and everybody waits for memory.
    Stalled,
}

impl From<Sign> for ShortageSign {
    fn from(sign: Sign) -> Self {
        match sign {
            Sign::Available => Self::Available,
            Sign::Stalled => Self::Stalled,
        }
    }
}

impl Controller {
    /// Watches the host, which has so much `memory`, from now on: what `read` says, on these terms.
    pub async fn watch_host(&self, read: Read, memory: Pages, terms: Terms) {
        let (reading, verdict, next) = (Reading::default(), Verdict::default(), Instant::now());
        let (watch, total) = (Watch::new(terms), Duration::ZERO);
        let shortage = Shortage { read, watch, memory, reading, verdict, since: None, total, next };
        let begin = move |actor: &mut Actor| {
            actor.shortage = Some(shortage);
            actor.tell_kernel();
        };
        // A controller that is gone watches nothing.
        let _ = self.inbox.send(super::actor::Input::Request(Box::new(begin))).await;
    }
}

impl Actor {
    /// Whether the host is short of memory.
    pub fn is_short(&self) -> bool {
        self.shortage.as_ref().is_some_and(Shortage::is_short)
    }

    /// Looks at the host when it is time.
    pub fn overdue_shortage(&mut self, now: Instant) {
        let (elapsed, asked) = (self.elapsed(), self.asked_of_all());
        let Some(shortage) = self.shortage.as_mut().filter(|shortage| shortage.next <= now) else { return };
        let Some(reading) = (shortage.read)() else {
            shortage.next = now + host::scaled(Duration::from_secs(10));
            return;
        };
        let before = std::mem::replace(&mut shortage.verdict, shortage.watch.step(elapsed, reading, asked));
        (shortage.reading, shortage.next) = (reading, now + shortage.watch.next_look(reading));
        let verdict = shortage.verdict;
        if before.short.is_some() != verdict.short.is_some() {
            let began = std::mem::replace(&mut shortage.since, verdict.short.map(|_| now));
            shortage.total += began.map_or(Duration::ZERO, |began| now.saturating_duration_since(began));
            self.tell_pressure(before, verdict);
        }
        if !verdict.reclaim.is_zero() {
            self.ask_all(asked + verdict.reclaim);
        }
        if verdict.short.is_none() {
            self.look_at_emptied();
        }
        // While memory is on its way, it is asked again with the next reading.
        if verdict.victim && !matches!(self.choose(self.root, Reason::Host), Outcome::Wait(_)) {
            self.chosen_for_host();
        }
    }

    /// Somebody was chosen for the host, or nobody could be: it has time now to show what comes of it.
    pub fn chosen_for_host(&mut self) {
        let elapsed = self.elapsed();
        if let Some(shortage) = &mut self.shortage {
            shortage.watch.chosen(elapsed);
            self.tell_kernel();
        }
    }

    /// What all VMs together have been asked for and have not given yet.
    fn asked_of_all(&self) -> Pages {
        let goal = self.reclaim_goal(Target::Group(self.root)).map(|(goal, _)| goal);
        goal.map_or(Pages::ZERO, |goal| self.tree.usage(self.root).saturating_sub(goal))
    }

    /// Asks all VMs together for so much.
    fn ask_all(&mut self, wanted: Pages) {
        let Some(patience) = self.shortage.as_ref().map(|shortage| shortage.watch.terms().patience) else { return };
        // Nobody waits for the answer: the next reading says what came of it.
        let (reply, _) = oneshot::channel();
        self.reclaim(Ok(Target::Group(self.root)), wanted, host::scaled(patience), reply);
    }

    fn tell_pressure(&mut self, before: Verdict, verdict: Verdict) {
        let Some(shortage) = &self.shortage else { return };
        let mut details = serde_json::to_value(shortage.view()).unwrap_or_default();
        let kind = match verdict.short {
            Some(_) => EventKind::PressureEntered,
            None => EventKind::PressureLeft,
        };
        if let (None, Some(details)) = (verdict.short, details.as_object_mut()) {
            let lasted = self.elapsed().saturating_sub(before.since);
            details.insert("lasted_ms".to_owned(), json!(lasted.as_millis() as u64));
        }
        tracing::warn!(%details, "{}", if verdict.short.is_some() { "the host runs short" } else { "the host has memory again" });
        self.event(kind, None, details);
        self.tell_kernel();
        // What workers may hold ahead of need is another amount now.
        let greeted = |(id, vm): (VmId, &Vm)| (vm.greeted && vm.accounted() && self.is_alive(id)).then_some(id);
        let ids: Vec<_> = self.vms.iter().filter_map(greeted).collect();
        for id in ids {
            self.send_grant(id, self.vms[&id].refused());
        }
    }
}

//! Everything at one moment: what a dashboard and a collector of metrics want, in one request.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Controller;
use super::actor::answer;
use super::error::Refusal;
use super::events::{Event, EventKind};
use super::oom_log::OomTotals;
use super::shortage::ShortageView;
use super::view::{GroupView, VmView};

/// Events that an overview shows at most.
pub const MOST_EVENTS: usize = 100;

/// The host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostView {
    /// Version of ballast.
    pub version: String,
    /// Process id of the controller.
    pub pid: u32,
    /// Release of the kernel.
    pub kernel: String,
    /// `MemTotal`.
    pub total_bytes: u64,
    /// `MemAvailable`.
    pub available_bytes: u64,
    /// What all VMs together may use, `null` for no limit.
    pub budget_bytes: Option<u64>,
    /// What all VMs together have been charged.
    pub current_bytes: u64,
    /// Number of VMs.
    pub vms: usize,
    /// Number of the newest event.
    pub last_event: u64,
    /// Whether the host runs short of memory; `null` where nobody watches that.
    pub shortage: Option<ShortageView>,
    /// Workers that run and could not be taken over.
    #[serde(default)]
    pub strays: Vec<StrayView>,
}

/// A worker that runs and could not be taken over from an earlier controller: what becomes of it is not known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StrayView {
    /// Name of its VM.
    pub name: String,
    /// Path of the group that it is in; `null` when the journal does not know it.
    pub group: Option<String>,
    /// Its process, as far as that is known.
    pub pid: Option<i32>,
    /// Why it could not be taken over.
    pub why: String,
    /// It was killed, and is not gone yet.
    pub is_ending: bool,
    /// What is charged for it: what is seen at it, and what it may hold beside that.
    pub charged_bytes: u64,
}

/// The host with all that is on it, of one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Overview {
    /// The host and the controller.
    pub host: HostView,
    /// All groups, the root first.
    pub groups: Vec<GroupView>,
    /// All VMs, with their last known numbers.
    pub vms: Vec<VmView>,
    /// The newest events, the oldest of them first.
    pub events: Vec<Event>,
}

/// What is counted since the controller began, whatever VMs there are by now.
#[derive(Clone, Debug, PartialEq)]
pub struct Tally {
    /// How often what has happened.
    pub events: Vec<(EventKind, u64)>,
    /// What was decided when no memory was left.
    pub oom: OomTotals,
}

impl Controller {
    /// Everything at one moment, with at most `events` events.
    ///
    /// # Errors
    /// See [`Self::host`].
    pub async fn overview(&self, events: usize) -> Result<Overview, Refusal> {
        self.ask(move |actor, reply| {
            let since = actor.events.last().saturating_sub(events.min(MOST_EVENTS) as u64);
            let overview = Overview {
                host: actor.host_view(),
                groups: actor.group_views(),
                vms: actor.list(),
                events: actor.events.after(since),
            };
            answer(reply, Ok(overview));
        })
        .await
    }

    /// Everything at one moment, and what has been counted.
    ///
    /// # Errors
    /// See [`Self::host`].
    pub async fn tally(&self) -> Result<(Overview, Tally), Refusal> {
        let overview = self.overview(0).await?;
        let tally = self.ask(|actor, reply| {
            let tally = Tally { events: actor.events.counts(), oom: actor.oom_totals() };
            answer(reply, Ok(tally));
        });
        Ok((overview, tally.await?))
    }
}

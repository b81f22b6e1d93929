//! Looking at a whole host: `GET /overview`, `GET /check`, `GET /oom/rank`, `GET /oom/log`; and at one VM: `GET
//! /vms/{name}/why`.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::{Name, Shared};
use crate::controller::check::CheckView;
use crate::controller::error::{Code, Refusal};
use crate::controller::oom_log::OomLogView;
use crate::controller::overview::Overview;
use crate::controller::rank::RankView;
use crate::controller::why::WhyView;

/// The query of a request for an overview.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct OverviewQuery {
    /// How many of the newest events to show, at most 100.
    #[serde(default)]
    events: usize,
}

/// The query of a request for a ranking.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct RankQuery {
    /// Path of the group that would have no room, `/` for the host.
    #[serde(default = "host")]
    group: String,
}

/// The query of a request for decisions.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LogQuery {
    /// Number of the last decision that is known; 0 for all that are kept. Of an earlier controller: all that this one keeps.
    #[serde(default)]
    since: u64,
}

fn host() -> String {
    "/".to_owned()
}

fn understood<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Refusal> {
    let Query(query) = query.map_err(|error| Refusal::new(Code::BadRequest, error.body_text()))?;
    Ok(query)
}

/// Everything at one moment: the host, all groups and VMs, and the newest events. Of a VM it is what its worker said last; one that
/// has been silent for a second is asked, and has answered when you look again.
#[utoipa::path(
    get, path = "/overview", params(OverviewQuery),
    responses((status = 200, body = Overview), (status = 400, body = Refusal)),
)]
pub(super) async fn overview(
    State(shared): State<Shared>,
    query: Result<Query<OverviewQuery>, QueryRejection>,
) -> Result<Json<Overview>, Refusal> {
    let events = understood(query)?.events;
    shared.controller.ask_idle().await;
    shared.controller.overview(events).await.map(Json)
}

/// Whether the invariants hold on this host now. Takes as long as counting the pages of all guests does.
#[utoipa::path(
    get, path = "/check",
    responses((status = 200, description = "looked at; `ok` says whether all hold", body = CheckView),
        (status = 503, body = Refusal)),
)]
pub(super) async fn check(State(shared): State<Shared>) -> Result<Json<CheckView>, Refusal> {
    let state = shared.service.as_ref().map(|service| service.state().to_owned());
    shared.controller.check(state).await.map(Json)
}

/// Who would be paused or killed first if a group had no room left: a dry run with every number that decides it.
#[utoipa::path(
    get, path = "/oom/rank", params(RankQuery),
    responses((status = 200, body = RankView), (status = 400, body = Refusal), (status = 404, body = Refusal)),
)]
pub(super) async fn oom_rank(
    State(shared): State<Shared>,
    query: Result<Query<RankQuery>, QueryRejection>,
) -> Result<Json<RankView>, Refusal> {
    shared.controller.oom_rank(&understood(query)?.group).await.map(Json)
}

/// What has become of a VM's memory, and why, in sentences: what happened, the oldest first, how it is now, and what would
/// help; with the facts behind them. Also of a VM that has ended, or was removed so lately that events tell of it.
#[utoipa::path(
    get, path = "/vms/{name}/why", params(("name" = String, Path, description = "name of the VM")),
    responses((status = 200, body = WhyView), (status = 404, body = Refusal)),
)]
pub(super) async fn why(State(shared): State<Shared>, Name(name): Name) -> Result<Json<WhyView>, Refusal> {
    shared.controller.why(&name).await.map(Json)
}

/// What was decided when no memory was left, and what has come of it: the newest 256 decisions of this controller.
#[utoipa::path(
    get, path = "/oom/log", params(LogQuery),
    responses((status = 200, body = OomLogView), (status = 400, body = Refusal)),
)]
pub(super) async fn oom_log(
    State(shared): State<Shared>,
    query: Result<Query<LogQuery>, QueryRejection>,
) -> Result<Json<OomLogView>, Refusal> {
    shared.controller.oom_log(understood(query)?.since).await.map(Json)
}

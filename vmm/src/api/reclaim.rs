//! `POST /vms/{name}/reclaim`, and what a group's has in common with it.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::IntoParams;

use super::memory::MAX_WAIT;
use super::{Name, Shared};
use crate::controller::DEADLINE;
use crate::controller::error::{Code, Refusal};
use crate::controller::host::scaled;
use crate::controller::reclaim::ReclaimedView;

/// The query of a reclaim.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ReclaimQuery {
    /// By how much usage is to fall, rounded up to pages.
    bytes: u64,
    /// How long to try; 10000 by default, at most a day.
    wait_ms: Option<u64>,
}

/// Takes memory back from a VM by all means that do not hurt it: stock, balloon, eviction. No limit changes, and the guest
/// may take all of it again. Answered when usage has fallen by as much, or with less when the time is over or nothing more
/// can be had.
#[utoipa::path(
    post, path = "/vms/{name}/reclaim", params(("name" = String, Path, description = "name of the VM"), ReclaimQuery),
    responses((status = 200, description = "all of it", body = ReclaimedView),
        (status = 202, description = "less", body = ReclaimedView),
        (status = 400, body = Refusal), (status = 404, body = Refusal), (status = 409, body = Refusal)),
)]
pub(super) async fn reclaim(
    State(shared): State<Shared>,
    Name(name): Name,
    query: Result<Query<ReclaimQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let (bytes, wait) = asked(query)?;
    shared.controller.reclaim(&name, bytes, wait).await.map(answer)
}

/// How much is asked for, in bytes, and for how long.
///
/// # Errors
/// When that makes no sense.
pub(super) fn asked(query: Result<Query<ReclaimQuery>, QueryRejection>) -> Result<(u64, Duration), Refusal> {
    let wrong = |message: String| Refusal::new(Code::BadRequest, message);
    let Query(query) = query.map_err(|error| wrong(format!("the query: {}", error.body_text())))?;
    let wait = query.wait_ms.map_or_else(|| scaled(DEADLINE), Duration::from_millis);
    if wait > MAX_WAIT {
        return Err(wrong("wait_ms is longer than a day".to_owned()));
    }
    Ok((query.bytes, wait))
}

/// What has come of it.
pub(super) fn answer(reclaimed: ReclaimedView) -> Response {
    let status = if reclaimed.is_reached() { StatusCode::OK } else { StatusCode::ACCEPTED };
    (status, Json(reclaimed)).into_response()
}

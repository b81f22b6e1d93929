//! `POST /vms/{name}/resume`.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::memory::MAX_WAIT;
use super::{Name, Shared};
use crate::controller::error::{Code, Refusal};
use crate::controller::view::VmView;

/// The query of a resume.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ResumeQuery {
    /// How long to wait until the memory that the VM needs fits; 0 by default, at most a day.
    #[serde(default)]
    wait_ms: u64,
}

/// Lets the vCPUs go on. Refused while the memory that the VM needs does not fit; with `wait_ms` only when it still does not by
/// then, with what is missing. Who asks takes a `pause` back in any case: a VM that the policy has paused goes on by itself when
/// it can.
#[utoipa::path(
    post, path = "/vms/{name}/resume", params(("name" = String, Path, description = "name of the VM"), ResumeQuery),
    responses((status = 200, body = VmView), (status = 400, body = Refusal), (status = 404, body = Refusal),
        (status = 409, body = Refusal), (status = 503, body = Refusal)),
)]
pub(super) async fn resume(
    State(shared): State<Shared>,
    Name(name): Name,
    query: Result<Query<ResumeQuery>, QueryRejection>,
) -> Result<Json<VmView>, Refusal> {
    let wrong = |message: String| Refusal::new(Code::BadRequest, message);
    let Query(query) = query.map_err(|error| wrong(format!("the query: {}", error.body_text())))?;
    let wait = Duration::from_millis(query.wait_ms);
    if wait > MAX_WAIT {
        return Err(wrong("wait_ms is longer than a day".to_owned()));
    }
    shared.controller.resume_within(&name, wait).await.map(Json)
}

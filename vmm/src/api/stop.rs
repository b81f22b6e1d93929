//! `POST /vms/{name}/stop` and `/start`.

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
use crate::controller::error::{Code, Refusal};
use crate::controller::host::scaled;
use crate::controller::stop::{STOP_PATIENCE, StopView};
use crate::controller::view::VmView;

/// The query of a stop.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct StopQuery {
    /// How long the guest has to power itself off before the VM is killed; 10000 by default, 0 kills it at once, at
    /// most a day.
    timeout_ms: Option<u64>,
}

/// Asks the guest to power itself off (the ACPI power button, or a bit of the debug port), kills the VM when it has not in
/// time, and is answered when the worker is gone; `killed` says which. No effect on one that has ended.
#[utoipa::path(
    post, path = "/vms/{name}/stop", params(("name" = String, Path, description = "name of the VM"), StopQuery),
    responses((status = 200, body = StopView), (status = 400, body = Refusal), (status = 404, body = Refusal)),
)]
pub(super) async fn stop(
    State(shared): State<Shared>,
    Name(name): Name,
    query: Result<Query<StopQuery>, QueryRejection>,
) -> Result<Json<StopView>, Refusal> {
    let wrong = |message: String| Refusal::new(Code::BadRequest, message);
    let Query(query) = query.map_err(|error| wrong(format!("the query: {}", error.body_text())))?;
    let patience = query.timeout_ms.map_or_else(|| scaled(STOP_PATIENCE), Duration::from_millis);
    if patience > MAX_WAIT {
        return Err(wrong("timeout_ms is longer than a day".to_owned()));
    }
    shared.controller.stop(&name, patience).await.map(Json)
}

/// Starts a VM that has ended again, as it was made; answered when its guest runs. No effect when it runs.
#[utoipa::path(
    post, path = "/vms/{name}/start", params(("name" = String, Path, description = "name of the VM")),
    responses((status = 201, description = "started", body = VmView),
        (status = 200, description = "it runs already", body = VmView),
        (status = 404, body = Refusal), (status = 405, description = "not in serve", body = Refusal),
        (status = 409, body = Refusal), (status = 503, body = Refusal)),
)]
pub(super) async fn start(State(shared): State<Shared>, Name(name): Name) -> Result<Response, Refusal> {
    let service = shared.service()?;
    let config = shared.controller.config(&name).await?;
    let (new, view) = service.put(&shared.controller, &name, (*config).clone()).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(view)).into_response())
}

//! VMs that come and go: `PUT` and `DELETE /vms/{name}`, and what one has printed.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use utoipa::ToSchema;

use super::{Contents, Name, Shared};
use crate::controller::config::VmConfig;
use crate::controller::error::{Code, Refusal};
use crate::controller::start::Service;
use crate::controller::view::VmView;

impl Shared {
    /// What makes VMs here.
    pub(super) fn service(&self) -> Result<&Arc<Service>, Refusal> {
        self.service.as_ref().ok_or_else(|| {
            let message = "this is the controller of one `ballast run`: `ballast serve` makes and removes VMs";
            Refusal::new(Code::MethodNotAllowed, message)
        })
    }
}

/// Makes and starts a VM; answered when its guest runs. No effect when it runs and was made with the same words.
#[utoipa::path(
    put, path = "/vms/{name}", params(("name" = String, Path, description = "name of the VM")),
    request_body = VmConfig,
    responses((status = 201, description = "made and started", body = VmView),
        (status = 200, description = "it runs already, and is the same", body = VmView),
        (status = 400, body = Refusal), (status = 405, description = "not in serve", body = Refusal),
        (status = 409, body = Refusal), (status = 503, body = Refusal)),
)]
pub(super) async fn put(State(shared): State<Shared>, Name(name): Name, body: Contents) -> Result<Response, Refusal> {
    let service = shared.service()?;
    let config: VmConfig = body.object("{\"kernel\": \"/path\", \"memory\": {\"size_bytes\": 268435456}}")?;
    let (new, view) = service.put(&shared.controller, &name, config).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(view)).into_response())
}

/// Ends a VM if it runs, and forgets it; answered when its worker is gone.
#[utoipa::path(
    delete, path = "/vms/{name}", params(("name" = String, Path, description = "name of the VM")),
    responses((status = 204, description = "gone"), (status = 404, body = Refusal),
        (status = 405, description = "not in serve", body = Refusal)),
)]
pub(super) async fn delete(State(shared): State<Shared>, Name(name): Name) -> Result<StatusCode, Refusal> {
    shared.service()?;
    shared.controller.remove(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The last 64 KiB that the guest has printed. What is not UTF-8 is replaced.
#[utoipa::path(
    get, path = "/vms/{name}/console", params(("name" = String, Path, description = "name of the VM")),
    responses((status = 200, body = String, content_type = "text/plain"), (status = 404, body = Refusal),
        (status = 409, description = "it ended before this controller began, and nothing was kept", body = Refusal)),
)]
pub(super) async fn console(State(shared): State<Shared>, Name(name): Name) -> Result<Response, Refusal> {
    let text = shared.controller.console(&name).await?;
    Ok(([("content-type", "text/plain; charset=utf-8"), ("cache-control", "no-store")], text).into_response())
}

/// Where a VM is to be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MoveVm {
    /// Path of the group.
    group: String,
}

/// Moves a VM to another group, with everything charged to it; its guest notices nothing. No effect when it is there.
#[utoipa::path(
    post, path = "/vms/{name}/move", params(("name" = String, Path, description = "name of the VM")),
    request_body = MoveVm,
    responses((status = 200, body = VmView), (status = 400, body = Refusal), (status = 404, body = Refusal),
        (status = 409, description = "no such group, or it does not fit: nothing has changed", body = Refusal),
        (status = 503, body = Refusal)),
)]
pub(super) async fn move_to(
    State(shared): State<Shared>,
    Name(name): Name,
    body: Contents,
) -> Result<Json<VmView>, Refusal> {
    let MoveVm { group } = body.object("{\"group\": \"/gold\"}")?;
    shared.controller.move_vm(&name, &group).await.map(Json)
}

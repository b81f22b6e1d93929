//! `PATCH /vms/{name}/memory`: limits.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use memcg_core::limit_change::Mode;
use memcg_core::tree::LimitPatch;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{Contents, Name, Shared};
use crate::controller::MemoryChange;
use crate::controller::config::{present, to_limit};
use crate::controller::error::{Code, Refusal};
use crate::controller::view::VmView;

/// Longest time that a client may ask to wait: a day.
pub const MAX_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Limits to change. A key that is absent leaves its limit as it is; `null` means no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryPatch {
    /// Never reclaimed below this.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub min_bytes: Option<Option<u64>>,
    /// Reclaimed below this only in need.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub low_bytes: Option<Option<u64>>,
    /// Reclaim starts here.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub high_bytes: Option<Option<u64>>,
    /// No charge is granted above this.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub max_bytes: Option<Option<u64>>,
    /// No eviction above this.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub swap_max_bytes: Option<Option<u64>>,
    /// Overhead above this is refused.
    #[serde(default, deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub vmm_max_bytes: Option<Option<u64>>,
    /// `true` turns accounting on without a limit. A limit does so by itself; nothing turns it off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub track: Option<bool>,
}

impl MemoryPatch {
    /// The same in pages.
    ///
    /// # Errors
    /// When a limit is not a multiple of the page size; the refusal names it.
    fn limits(&self) -> Result<LimitPatch, Refusal> {
        Ok(LimitPatch {
            min: to_limit("min_bytes", self.min_bytes)?,
            low: to_limit("low_bytes", self.low_bytes)?,
            high: to_limit("high_bytes", self.high_bytes)?,
            max: to_limit("max_bytes", self.max_bytes)?,
            swap_max: to_limit("swap_max_bytes", self.swap_max_bytes)?,
            store_max: None,
            vmm_max: to_limit("vmm_max_bytes", self.vmm_max_bytes)?,
            if_generation: None,
        })
    }
}

/// What to do when usage is above the new `max`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangeMode {
    /// Reclaim first; the old limit stays in force until usage fits.
    #[default]
    Reclaim,
    /// In force now; usage above it is reported as overcharge and may only fall.
    Force,
    /// Refuse.
    Refuse,
}

/// The query of a change of limits.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ChangeQuery {
    /// What to do when usage is above the new `max`.
    #[serde(default)]
    #[param(inline)]
    mode: ChangeMode,
    /// How long to wait for the limit to be in force; by default until it is, or is given up.
    wait_ms: Option<u64>,
    /// Only if this is still the generation of the limits.
    generation: Option<u64>,
}

/// Changes limits: all of those named, or none.
#[utoipa::path(
    patch, path = "/vms/{name}/memory",
    params(("name" = String, Path, description = "name of the VM"), ChangeQuery),
    request_body = MemoryPatch,
    responses(
        (status = 200, description = "in force", body = VmView),
        (status = 202, description = "wait_ms is over, memory is still being given back", body = VmView),
        (status = 400, body = Refusal), (status = 404, body = Refusal), (status = 409, body = Refusal),
    ),
)]
pub(super) async fn patch(
    State(shared): State<Shared>,
    Name(name): Name,
    query: Result<Query<ChangeQuery>, QueryRejection>,
    Contents(body): Contents,
) -> Result<Response, Refusal> {
    let Query(query) = query.map_err(|error| Refusal::new(Code::BadRequest, error.body_text()))?;
    // The type of the content is not asked for: curl says it is a form.
    // A list would do for a structure of optional fields, and change nothing.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(Refusal::new(
            Code::BadRequest,
            "the body must be a JSON object such as {\"max_bytes\": 268435456}",
        ));
    }
    let patch: MemoryPatch =
        serde_json::from_slice(&body).map_err(|error| Refusal::new(Code::BadRequest, format!("the body: {error}")))?;
    let track = patch.track;
    let wait = query.wait_ms.map(Duration::from_millis);
    if wait.is_some_and(|wait| wait > MAX_WAIT) {
        let message = format!("wait_ms is at most {} (a day)", MAX_WAIT.as_millis());
        return Err(Refusal::new(Code::BadRequest, message));
    }
    let mode = match query.mode {
        ChangeMode::Reclaim => Mode::Reclaim,
        ChangeMode::Force => Mode::Force,
        ChangeMode::Refuse => Mode::Refuse,
    };
    let patch = LimitPatch { if_generation: query.generation, ..patch.limits()? };
    let changed = shared.controller.change(&name, MemoryChange { patch, mode, track, wait }).await?;
    let status = if changed.in_force { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(changed.view)).into_response())
}

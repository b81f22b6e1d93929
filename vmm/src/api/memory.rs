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
use crate::controller::config::with_limits;
use crate::controller::error::{Code, Refusal};
use crate::controller::view::VmView;

/// Longest time that a client may ask to wait: a day.
pub const MAX_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

with_limits! {
    /// Limits to change. A key that is absent leaves its limit as it is; `null` means no limit.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
    #[serde(deny_unknown_fields)]
    pub struct MemoryPatch {
        ..limits,
        /// `true` turns accounting on without a limit. A limit does so by itself; nothing turns it off.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pub track: Option<bool>,
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

impl ChangeQuery {
    /// The query with these words.
    pub(super) fn new(mode: ChangeMode, wait_ms: Option<u64>, generation: Option<u64>) -> Self {
        Self { mode, wait_ms, generation }
    }

    /// The change that a request asks for with `patch` in its body.
    ///
    /// # Errors
    /// A size that makes no sense, or a wait that is too long.
    pub(super) fn change(&self, patch: &MemoryPatch) -> Result<MemoryChange, Refusal> {
        let wait = self.wait_ms.map(Duration::from_millis);
        if wait.is_some_and(|wait| wait > MAX_WAIT) {
            let message = format!("wait_ms is at most {} (a day)", MAX_WAIT.as_millis());
            return Err(Refusal::new(Code::BadRequest, message));
        }
        let mode = match self.mode {
            ChangeMode::Reclaim => Mode::Reclaim,
            ChangeMode::Force => Mode::Force,
            ChangeMode::Refuse => Mode::Refuse,
        };
        let track = patch.track;
        let patch = LimitPatch { if_generation: self.generation, ..patch.limits()? };
        Ok(MemoryChange { patch, mode, track, wait })
    }
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
    body: Contents,
) -> Result<Response, Refusal> {
    let Query(query) = query.map_err(|error| Refusal::new(Code::BadRequest, error.body_text()))?;
    let patch: MemoryPatch = body.object("{\"max_bytes\": 268435456}")?;
    let changed = shared.controller.change(&name, query.change(&patch)?).await?;
    let status = if changed.in_force { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(changed.view)).into_response())
}

//! `POST /limits`: limits of many VMs and groups, in one transaction.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::memory::{ChangeMode, ChangeQuery, MemoryPatch};
use super::{Contents, Shared};
use crate::controller::NodeChange;
use crate::controller::config::object;
use crate::controller::error::{Code, Refusal};
use crate::controller::view::LimitsView;

/// Limits of one VM or of one group, in a list of many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NodeLimits {
    /// Name of the VM; this or `group`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// Path of the group; this or `vm`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// The limits to change.
    #[serde(deserialize_with = "object")]
    pub limits: MemoryPatch,
    /// Only if this is still the generation of its limits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
}

/// The query of a transaction.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct LimitsQuery {
    /// What to do when usage is above a new `max`.
    #[serde(default)]
    #[param(inline)]
    mode: ChangeMode,
    /// How long to wait for all of it to be in force; by default until it is, or is given up.
    wait_ms: Option<u64>,
}

/// Changes limits of many VMs and groups: all of it, or nothing. What is lowered comes down first, then everything is in
/// force in one step.
#[utoipa::path(
    post, path = "/limits", params(LimitsQuery), request_body = [NodeLimits],
    responses(
        (status = 200, description = "in force", body = LimitsView),
        (status = 202, description = "wait_ms is over, memory is still being given back", body = LimitsView),
        (status = 400, body = Refusal), (status = 404, body = Refusal), (status = 409, body = Refusal),
        (status = 503, body = Refusal),
    ),
)]
pub(super) async fn post(
    State(shared): State<Shared>,
    query: Result<Query<LimitsQuery>, QueryRejection>,
    body: Contents,
) -> Result<Response, Refusal> {
    let wrong = |message: &str| Refusal::new(Code::BadRequest, message);
    let Query(LimitsQuery { mode, wait_ms }) = query.map_err(|error| wrong(&error.body_text()))?;
    let list: Vec<NodeLimits> = body.list("[{\"vm\": \"web\", \"limits\": {\"max_bytes\": 268435456}}]")?;
    let Some(first) = list.first() else { return Err(wrong("the list is empty: name a VM or a group")) };
    let of = |node: &NodeLimits| ChangeQuery::new(mode, wait_ms, node.generation).change(&node.limits);
    let common = of(first)?;
    let mut nodes = Vec::with_capacity(list.len());
    for node in &list {
        let change = of(node)?;
        nodes.push(match (&node.vm, &node.group) {
            (Some(name), None) => NodeChange::vm(name, &change),
            (None, Some(path)) => NodeChange::group(path, &change),
            _ => return Err(wrong("each entry names a vm or a group, one of the two")),
        });
    }
    let changed = shared.controller.change_many(nodes, common.mode, common.wait).await?;
    let status = if changed.in_force { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(changed.view)).into_response())
}

//! Groups: `GET /groups`, `GET|PUT|PATCH|DELETE /groups/{path}`, and `POST /groups/{path}/{move,reclaim}`.
//!
//! A path is written as it is, `/groups/gold/web`, or with its slashes encoded, as clients do that are generated from
//! the document: `/groups/gold%2Fweb`. The root is `/groups/`.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequestParts, Path, Query, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use utoipa::{OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;

use super::memory::{ChangeQuery, MemoryPatch};
use super::reclaim::{self, ReclaimQuery};
use super::{Contents, Shared};
use crate::controller::error::{Code, Refusal};
use crate::controller::groups::REQUESTS;
use crate::controller::reclaim::ReclaimedView;
use crate::controller::view::GroupView;

/// The paths are described here, because the document has no word for the rest of a path.
#[derive(OpenApi)]
#[openapi(paths(list, show, put, patch, delete, move_to, reclaim))]
struct Document;

/// The routes.
pub(super) fn described() -> OpenApiRouter<Shared> {
    let one = || get(show).put(put).patch(patch).delete(delete);
    OpenApiRouter::with_openapi(Document::openapi())
        .route("/groups", get(list))
        .route("/groups/", one())
        .route("/groups/{*path}", one().post(posted))
}

/// The path of a group at the end of a URI. It is checked by the controller.
struct GroupPath(String);

impl<S: Send + Sync> FromRequestParts<S> for GroupPath {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = match Option::<Path<String>>::from_request_parts(parts, state).await {
            Ok(path) => path.map(|Path(path)| path).unwrap_or_default(),
            Err(error) => return Err(Refusal::new(Code::BadRequest, format!("the path: {}", error.body_text()))),
        };
        let path = if path.starts_with('/') { path } else { format!("/{path}") };
        // The rest of a path is matched as a whole, these too; no group has such a name.
        let asks = path.rsplit_once('/').is_some_and(|(_, name)| REQUESTS.contains(&name));
        if asks && parts.method != Method::POST {
            let message = format!("/groups{path} has no method {}", parts.method);
            return Err(Refusal::new(Code::MethodNotAllowed, message));
        }
        Ok(Self(path))
    }
}

/// All groups, the root and those that are dying too, ordered by path.
#[utoipa::path(get, path = "/groups", responses((status = 200, body = [GroupView])))]
async fn list(State(shared): State<Shared>) -> Result<Json<Vec<GroupView>>, Refusal> {
    shared.controller.groups().await.map(Json)
}

/// One group.
#[utoipa::path(
    get, path = "/groups/{path}", params(("path" = String, Path, description = "path of the group")),
    responses((status = 200, body = GroupView), (status = 400, body = Refusal), (status = 404, body = Refusal)),
)]
async fn show(State(shared): State<Shared>, GroupPath(path): GroupPath) -> Result<Json<GroupView>, Refusal> {
    shared.controller.group(&path).await.map(Json)
}

/// Makes a group. No effect when it is there and its limits are these.
#[utoipa::path(
    put, path = "/groups/{path}", params(("path" = String, Path, description = "path of the group")),
    request_body = MemoryPatch,
    responses((status = 201, description = "made", body = GroupView),
        (status = 200, description = "it is there, and is the same", body = GroupView),
        (status = 400, body = Refusal), (status = 409, body = Refusal)),
)]
async fn put(State(shared): State<Shared>, GroupPath(path): GroupPath, body: Contents) -> Result<Response, Refusal> {
    let patch: MemoryPatch = body.object("{\"max_bytes\": 268435456}")?;
    let (new, view) = shared.controller.put_group(&path, ChangeQuery::default().change(&patch)?).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(view)).into_response())
}

/// Changes limits of a group: all of those named, or none. Of `/`, `max_bytes` is the budget of the host.
#[utoipa::path(
    patch, path = "/groups/{path}",
    params(("path" = String, Path, description = "path of the group"), ChangeQuery),
    request_body = MemoryPatch,
    responses(
        (status = 200, description = "in force", body = GroupView),
        (status = 202, description = "wait_ms is over, memory is still being given back", body = GroupView),
        (status = 400, body = Refusal), (status = 404, body = Refusal), (status = 409, body = Refusal),
        (status = 503, body = Refusal),
    ),
)]
async fn patch(
    State(shared): State<Shared>,
    GroupPath(path): GroupPath,
    query: Result<Query<ChangeQuery>, QueryRejection>,
    body: Contents,
) -> Result<Response, Refusal> {
    let Query(query) = query.map_err(|error| Refusal::new(Code::BadRequest, error.body_text()))?;
    let patch: MemoryPatch = body.object("{\"max_bytes\": 268435456}")?;
    let changed = shared.controller.change_group(&path, query.change(&patch)?).await?;
    let status = if changed.in_force { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(changed.view)).into_response())
}

/// Where a group is to be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct MoveGroup {
    /// Path of the group that it is to be in.
    parent: String,
}

/// Moves a group, with everything in it, into another group. No effect when it is there.
#[utoipa::path(
    post, path = "/groups/{path}/move", params(("path" = String, Path, description = "path of the group")),
    request_body = MoveGroup,
    responses((status = 200, body = GroupView), (status = 400, body = Refusal), (status = 404, body = Refusal),
        (status = 409, description = "no such group, or it does not fit: nothing has changed", body = Refusal),
        (status = 503, body = Refusal)),
)]
async fn move_to(shared: &Shared, path: &str, body: &Contents) -> Result<Response, Refusal> {
    let MoveGroup { parent } = body.object("{\"parent\": \"/gold\"}")?;
    shared.controller.move_group(path, &parent).await.map(|view| Json(view).into_response())
}

/// Takes memory back from the VMs of a group together, as from one VM: each gives by what it uses above its protection. Of
/// `/`: from all VMs of the host.
#[utoipa::path(
    post, path = "/groups/{path}/reclaim",
    params(("path" = String, Path, description = "path of the group"), ReclaimQuery),
    responses((status = 200, description = "all of it", body = ReclaimedView),
        (status = 202, description = "less", body = ReclaimedView),
        (status = 400, body = Refusal), (status = 404, body = Refusal), (status = 409, body = Refusal)),
)]
async fn reclaim(
    shared: &Shared,
    path: &str,
    query: Result<Query<ReclaimQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let (bytes, wait) = reclaim::asked(query)?;
    shared.controller.reclaim_group(path, bytes, wait).await.map(reclaim::answer)
}

/// What is posted to a group: the rest of a path is matched as a whole, and says at its end what it is.
async fn posted(
    State(shared): State<Shared>,
    GroupPath(path): GroupPath,
    query: Result<Query<ReclaimQuery>, QueryRejection>,
    body: Contents,
) -> Result<Response, Refusal> {
    let (group, request) = path.rsplit_once('/').unwrap_or_default();
    let group = if group.is_empty() { "/" } else { group };
    match request {
        "move" => move_to(&shared, group, &body).await,
        "reclaim" => reclaim(&shared, group, query).await,
        _ => {
            let message = format!("nothing can be posted to /groups{path}; there are /groups/PATH/move and …/reclaim");
            Err(Refusal::new(Code::MethodNotAllowed, message))
        }
    }
}

/// Removes a group with nothing in it. What was charged in it by VMs that have ended keeps it in the list, as dying,
/// until it is back.
#[utoipa::path(
    delete, path = "/groups/{path}", params(("path" = String, Path, description = "path of the group")),
    responses((status = 204, description = "gone"), (status = 404, body = Refusal), (status = 409, body = Refusal)),
)]
async fn delete(State(shared): State<Shared>, GroupPath(path): GroupPath) -> Result<StatusCode, Refusal> {
    shared.controller.remove_group(&path).await?;
    Ok(StatusCode::NO_CONTENT)
}

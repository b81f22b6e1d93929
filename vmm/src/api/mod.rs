//! HTTP over a unix socket: the routes, and the document that describes them.
//!
//! Handlers hold no state of their own: each asks the controller and shows the answer. Every refusal, also of paths,
//! methods and bodies, is a [`Refusal`] in JSON.

pub(crate) mod connection;
mod document;
mod events;
mod groups;
mod limits;
mod memory;
mod metrics;
mod observe;
mod oom;
mod reclaim;
pub mod reference;
mod resume;
pub mod server;
mod stop;
mod vms;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Request, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use hyper::body::Body;
use tokio::sync::watch;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::controller::Controller;
use crate::controller::error::{Code, Refusal};
use crate::controller::overview::HostView;
use crate::controller::start::Service;
use crate::controller::view::VmView;

pub use limits::NodeLimits;
pub use memory::MemoryPatch;

/// Largest body that is read.
const MAX_BODY: usize = 64 * 1024;

/// How long a body may take to come.
const BODY_TIME: Duration = Duration::from_secs(10);

/// What handlers work with.
#[derive(Clone)]
struct Shared {
    controller: Controller,
    /// Makes VMs; absent in `run`, which has made its own.
    service: Option<Arc<Service>>,
    /// Becomes true when followers of events have to come to an end.
    stopping: watch::Receiver<bool>,
}

#[derive(OpenApi)]
#[openapi(info(
    title = "ballast",
    description = "\
HTTP/1.1 over a unix socket that its user and root can open, for example \
`curl --unix-socket $XDG_RUNTIME_DIR/ballast/ballast.sock http://ballast/vms`. The document itself is at `/openapi.json`.

Numbers are integers with their unit in the name. Bodies are JSON objects; an unknown key, and a query where there is none, \
is refused. What is asked for twice is done once. What changes something is carried out to its end when the client hangs up.

There are at most 256 connections at a time, those that follow events included. A client has 30 s for the head of a \
request (64 KiB, 100 headers), 10 s for its body (64 KiB), and 30 s in which it may read nothing of its answer. A \
request that is refused before all of it has come may be sent to its end, for 10 s. What is no HTTP, or too large a head, \
is answered 400, 414 or 431 without a body, or closed; every other refusal is a `Refusal`."
))]
struct Document;

/// The bytes of a request that is not too large. A length that is announced is believed before it is waited for.
struct Contents(Bytes);

impl<S: Send + Sync> FromRequest<S> for Contents {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let too_large = || Refusal::new(Code::TooLarge, format!("the body is larger than {MAX_BODY} bytes"));
        if request.body().size_hint().lower() > MAX_BODY as u64 {
            return Err(too_large());
        }
        match tokio::time::timeout(BODY_TIME, Bytes::from_request(request, state)).await {
            Ok(Ok(bytes)) => Ok(Self(bytes)),
            Ok(Err(error)) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => Err(too_large()),
            Ok(Err(error)) => Err(Refusal::new(Code::BadRequest, error.body_text())),
            Err(_) => {
                let message = format!("the body did not come within {} s: send all of it", BODY_TIME.as_secs());
                Err(Refusal::new(Code::BodyTimeout, message))
            }
        }
    }
}

impl Contents {
    /// The body as a JSON object; `example` is one. The type of the content is not asked for: curl says it is a form.
    ///
    /// # Errors
    /// What is not an object, and what is not one of these.
    fn object<T: serde::de::DeserializeOwned>(&self, example: &str) -> Result<T, Refusal> {
        let wrong = |message: String| Refusal::new(Code::BadRequest, message);
        // A list would do for a structure, and of optional fields change nothing.
        if self.0.trim_ascii_start().first() != Some(&b'{') {
            return Err(wrong(format!("the body must be a JSON object such as {example}")));
        }
        serde_json::from_slice(&self.0).map_err(|error| wrong(format!("the body: {error}")))
    }

    /// The body as a JSON list; `example` is one.
    ///
    /// # Errors
    /// What is not a list, and what is not one of these.
    fn list<T: serde::de::DeserializeOwned>(&self, example: &str) -> Result<Vec<T>, Refusal> {
        /// An object in the list: a list of its values is none.
        #[derive(serde::Deserialize)]
        #[serde(transparent, bound = "T: serde::de::DeserializeOwned")]
        struct Entry<T>(#[serde(deserialize_with = "crate::controller::config::object")] T);
        let list: Result<Vec<Entry<T>>, _> = serde_json::from_slice(&self.0);
        list.map(|list| list.into_iter().map(|Entry(entry)| entry).collect()).map_err(|error| {
            Refusal::new(Code::BadRequest, format!("the body must be a JSON list such as {example}: {error}"))
        })
    }
}

/// The name of a VM in a path. It is not checked here: a name that no VM can have is one that no VM has.
struct Name(String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let Path(name) = Path::from_request_parts(parts, state)
            .await
            .map_err(|error| Refusal::new(Code::BadRequest, format!("the path: {}", error.body_text())))?;
        Ok(Self(name))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self)).into_response()
    }
}

fn described() -> OpenApiRouter<Shared> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(host))
        .routes(routes!(list))
        .routes(routes!(show, vms::put, vms::delete))
        .routes(routes!(vms::console))
        .routes(routes!(memory::patch))
        .routes(routes!(pause))
        .routes(routes!(resume::resume))
        .routes(routes!(kill))
        .routes(routes!(stop::stop))
        .routes(routes!(reclaim::reclaim))
        .routes(routes!(stop::start))
        .routes(routes!(events::events))
        .routes(routes!(observe::overview))
        .routes(routes!(observe::check))
        .routes(routes!(observe::oom_rank))
        .routes(routes!(observe::oom_log))
        .routes(routes!(observe::why))
        .routes(routes!(oom::policy))
        .routes(routes!(oom::decision))
        .routes(routes!(metrics::metrics))
        .routes(routes!(limits::post))
        .routes(routes!(vms::move_to))
        .merge(groups::described())
}

/// The OpenAPI document as JSON.
pub fn document() -> String {
    format!("{:#}", document::complete(described().into_openapi()))
}

/// The routes, served by `controller`, with `service` also those that make VMs; followers of events end when `stopping`
/// becomes true.
pub fn router(controller: Controller, service: Option<Arc<Service>>, stopping: watch::Receiver<bool>) -> Router {
    let (router, described) = described().split_for_parts();
    let document = document::complete(described);
    let with_query = document::with_query(&document);
    let document = format!("{document:#}");
    let openapi = move || async move { ([("content-type", "application/json")], document.clone()) };
    router
        .route("/openapi.json", axum::routing::get(openapi))
        .route_layer(axum::middleware::from_fn_with_state(with_query, document::refuse_unknown_queries))
        .fallback(async |uri: axum::http::Uri| {
            Refusal::new(Code::NotFound, format!("there is nothing at {}", uri.path()))
        })
        .method_not_allowed_fallback(async |method: axum::http::Method, uri: axum::http::Uri| {
            Refusal::new(Code::MethodNotAllowed, format!("{} has no method {method}", uri.path()))
        })
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Shared { controller, service, stopping })
}

/// The host and the controller.
#[utoipa::path(get, path = "/host", responses((status = 200, body = HostView)))]
async fn host(State(shared): State<Shared>) -> Result<Json<HostView>, Refusal> {
    shared.controller.host().await.map(Json)
}

/// All VMs, with their last known numbers.
#[utoipa::path(get, path = "/vms", responses((status = 200, body = [VmView])))]
async fn list(State(shared): State<Shared>) -> Result<Json<Vec<VmView>>, Refusal> {
    shared.controller.list().await.map(Json)
}

/// One VM, with numbers that its worker gave for this request.
#[utoipa::path(
    get, path = "/vms/{name}", params(("name" = String, Path, description = "name of the VM")),
    responses((status = 200, body = VmView), (status = 404, body = Refusal)),
)]
async fn show(State(shared): State<Shared>, Name(name): Name) -> Result<Json<VmView>, Refusal> {
    shared.controller.show(&name).await.map(Json)
}

/// Stops every vCPU; answered when they stand still. No effect on a paused VM.
#[utoipa::path(
    post, path = "/vms/{name}/pause", params(("name" = String, Path, description = "name of the VM")),
    responses((status = 200, body = VmView), (status = 404, body = Refusal), (status = 409, body = Refusal),
        (status = 503, body = Refusal)),
)]
async fn pause(State(shared): State<Shared>, Name(name): Name) -> Result<Json<VmView>, Refusal> {
    shared.controller.pause(&name).await.map(Json)
}

/// Ends a VM at once; answered when its worker is gone.
#[utoipa::path(
    post, path = "/vms/{name}/kill", params(("name" = String, Path, description = "name of the VM")),
    responses((status = 200, body = VmView), (status = 404, body = Refusal)),
)]
async fn kill(State(shared): State<Shared>, Name(name): Name) -> Result<Json<VmView>, Refusal> {
    shared.controller.kill(&name).await.map(Json)
}

//! The OpenAPI document: what the annotations of the routes say, and what holds for all routes alike.
//!
//! Names of operations follow from method and path, so that two handlers of one name in different files are two
//! operations for a generated client. Every operation has the answer `default`, a [`Refusal`]: each may be refused for its
//! path, its size or its time, and an annotation names only the refusals that mean something of its own.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use serde_json::{Value, json};
use utoipa::openapi::OpenApi;

use crate::controller::error::{Code, Refusal};
use crate::controller::groups;

/// The methods that a path may have, as the document writes them.
const METHODS: [&str; 7] = ["get", "put", "post", "delete", "patch", "head", "options"];

/// The operations of a document: path, method, and what it says of them.
pub(super) fn operations(document: &Value) -> impl Iterator<Item = (&str, &str, &Value)> {
    let paths = document["paths"].as_object().into_iter().flatten();
    paths.flat_map(|(path, item)| {
        METHODS.iter().filter_map(move |method| Some((path.as_str(), *method, item.get(method)?)))
    })
}

/// The document, complete.
pub(super) fn complete(described: OpenApi) -> Value {
    // Made of strings and maps with string keys: cannot fail.
    let mut document = serde_json::to_value(described).unwrap_or_default();
    document["servers"] =
        json!([{ "url": "http://ballast", "description": "any host name will do: the socket decides" }]);
    let refusal = json!({
        "description": "refused; `code` says why, and the table of errors what to do",
        "content": { "application/json": { "schema": { "$ref": "#/components/schemas/Refusal" } } },
    });
    for (path, item) in document["paths"].as_object_mut().into_iter().flatten() {
        for method in METHODS {
            if let Some(operation) = item.get_mut(method) {
                operation["operationId"] = operation_id(method, path).into();
                for (status, answer) in operation["responses"].as_object_mut().into_iter().flatten() {
                    if answer["description"].as_str().is_none_or(str::is_empty) {
                        answer["description"] = if status.starts_with('2') { "done" } else { "refused" }.into();
                    }
                }
                operation["responses"]["default"] = refusal.clone();
                operation.as_object_mut().map(|operation| operation.remove("tags"));
            }
        }
    }
    document
}

/// The name of an operation: `get_vms`, `get_vms_by_name`, `patch_vms_by_name_memory`.
fn operation_id(method: &str, path: &str) -> String {
    let words = path.split('/').filter(|part| !part.is_empty()).map(|part| match part.strip_prefix('{') {
        Some(parameter) => format!("by_{}", parameter.trim_end_matches('}')),
        None => part.to_owned(),
    });
    [method.to_owned()].into_iter().chain(words).collect::<Vec<_>>().join("_")
}

/// The operations that have something in their query.
pub(super) fn with_query(document: &Value) -> Arc<BTreeSet<(String, String)>> {
    let has_query = |operation: &Value| {
        operation["parameters"].as_array().into_iter().flatten().any(|parameter| parameter["in"] == "query")
    };
    let with_query = operations(document).filter(|(.., operation)| has_query(operation));
    Arc::new(with_query.map(|(path, method, _)| (path.to_owned(), method.to_uppercase())).collect())
}

/// Refuses a query where none is known: what is silently left out looks as if it had been done.
pub(super) async fn refuse_unknown_queries(
    State(with_query): State<Arc<BTreeSet<(String, String)>>>,
    path: MatchedPath,
    request: Request,
    next: Next,
) -> Result<Response, Refusal> {
    // The rest of a path is a parameter like others in the document; where it is empty it has a route of its own.
    let mut path = path.as_str().replace("{*", "{");
    if path.ends_with('/') {
        path.push_str("{path}");
    } else if path.ends_with("{path}")
        && let Some((_, name)) = request.uri().path().rsplit_once('/')
        && groups::REQUESTS.contains(&name)
    {
        path.push('/');
        path.push_str(name);
    }
    let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
    let known = || with_query.contains(&(path.clone(), method.as_str().to_owned()));
    match request.uri().query() {
        Some(query) if !query.is_empty() && !known() => {
            let message = format!("{method} {path} has no parameters: leave out what follows the question mark");
            Err(Refusal::new(Code::BadRequest, message))
        }
        _ => Ok(next.run(request).await),
    }
}

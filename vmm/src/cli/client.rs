//! Requests to a controller: HTTP/1.1 over its unix socket.

use std::path::Path;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;

use super::socket::deserted;
use super::{Failure, NOT_REACHED};
use crate::chain::chain;
use crate::controller::error::{Code, Refusal};

/// Sends a request and returns the answer with its body still to come.
pub async fn open(socket: &Path, method: Method, target: &str, body: String) -> Result<Response<Incoming>, Failure> {
    let lost = |error: &dyn std::error::Error| {
        Failure::error(format!("the controller at {} does not answer: {}", socket.display(), chain(error)))
    };
    let stream = tokio::net::UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::ConnectionRefused => deserted(socket),
        std::io::ErrorKind::PermissionDenied => {
            Failure::error(format!("no permission to use {}: only the user who started the VM may", socket.display()))
        }
        _ => lost(&error),
    })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| lost(&error))?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the connection has ended");
        }
    });
    let request = Request::builder()
        .method(method)
        .uri(target)
        .header("host", "ballast")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| lost(&error))?;
    sender.send_request(request).await.map_err(|error| lost(&error))
}

/// Sends a request and reads the whole answer; a refusal becomes a failure with its sentence.
pub async fn request(
    socket: &Path,
    method: Method,
    target: &str,
    body: String,
) -> Result<(StatusCode, Bytes), Failure> {
    let answer = open(socket, method, target, body).await?;
    let status = answer.status();
    let body = answer.into_body().collect().await;
    let body = body.map_err(|error| Failure::error(format!("the answer was cut off: {}", chain(&error))))?.to_bytes();
    if status.is_success() { Ok((status, body)) } else { Err(refused(status, &body)) }
}

/// The failure that an answer from 400 upwards stands for.
pub fn refused(status: StatusCode, body: &[u8]) -> Failure {
    match serde_json::from_slice::<Refusal>(body) {
        Ok(refusal) if refusal.code == Code::LimitNotReached => {
            Failure { message: refusal.message, status: NOT_REACHED }
        }
        Ok(refusal) => Failure::error(refusal.message),
        Err(_) => Failure::error(format!("the controller answered {status}")),
    }
}

/// Reads an answer's JSON.
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| Failure::error(format!("the answer makes no sense: {error}")))
}

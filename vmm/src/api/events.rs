//! `GET /events`: one JSON object a line, first what is in the ring, then what happens.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use serde::Deserialize;
use tokio::sync::mpsc;
use utoipa::IntoParams;

use super::Shared;
use crate::controller::error::{Code, Refusal};
use crate::controller::events::Event;

/// Lines that may wait for a client that does not read. What does not fit stays in the ring, and when it falls out
/// of that, the client is told how many it has missed.
const QUEUE: usize = 64;

/// The query of a request for events.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Number of the last event that is known; 0 for all that are kept. Of an earlier controller: all that this one keeps.
    #[serde(default)]
    since: u64,
    /// Whether to wait for more.
    #[serde(default = "yes")]
    follow: bool,
}

fn yes() -> bool {
    true
}

/// A body that ends when its sender is dropped.
pub(super) struct Lines(pub mpsc::Receiver<Bytes>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

/// Events, one JSON object a line. Never ends unless `follow=false` or the controller goes.
#[utoipa::path(
    get, path = "/events", params(EventQuery),
    responses((status = 200, description = "one event a line", body = Event, content_type = "application/x-ndjson")),
)]
pub(super) async fn events(
    State(shared): State<Shared>,
    query: Result<Query<EventQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let Query(query) = query.map_err(|error| Refusal::new(Code::BadRequest, error.body_text()))?;
    let (lines, body) = mpsc::channel(QUEUE);
    tokio::spawn(feed(shared, query, lines));
    let headers = [("content-type", "application/x-ndjson"), ("cache-control", "no-store")];
    Ok((headers, Body::new(Lines(body))).into_response())
}

async fn feed(mut shared: Shared, query: EventQuery, lines: mpsc::Sender<Bytes>) {
    let mut news = shared.controller.news();
    let mut since = query.since;
    loop {
        // Before the batch is read: what comes after it is a change again.
        let stopping = *shared.stopping.borrow_and_update();
        news.mark_unchanged();
        let Ok(batch) = shared.controller.events(since).await else {
            return;
        };
        for event in batch {
            since = event.seq;
            let Ok(mut line) = serde_json::to_vec(&event) else {
                return;
            };
            line.push(b'\n');
            if lines.send(line.into()).await.is_err() {
                return;
            }
        }
        if !query.follow || stopping {
            return;
        }
        tokio::select! {
            changed = news.changed() => if changed.is_err() { return },
            changed = shared.stopping.changed() => if changed.is_err() { return },
            () = lines.closed() => return,
        }
    }
}

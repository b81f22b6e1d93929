//! `PUT /oom/policy` and `POST /oom/decisions/{id}`: a client that decides.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::events::Lines;
use super::{Contents, Shared};
use crate::controller::error::{Code, Refusal};
use crate::controller::questions::{DecisionAnswer, QuestionView, WAITS};

/// How a client decides.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OomPolicyBody {
    /// How long its answer to a question is waited for: 100 to 60000.
    wait_ms: u64,
    /// Whether it is asked; with `false` the answer ends at once and only says that it could be.
    #[serde(default = "yes")]
    follow: bool,
}

fn yes() -> bool {
    true
}

/// Asks this client before anybody is paused or killed for a group or the host: as long as the connection is open, each question
/// is a line. When it is not answered in time, or the connection ends, the policy decides. There is one such client at a time.
#[utoipa::path(
    put, path = "/oom/policy", request_body = OomPolicyBody,
    responses((status = 200, description = "one question a line", body = QuestionView, content_type = "application/x-ndjson"),
        (status = 400, body = Refusal), (status = 409, description = "another client decides", body = Refusal)),
)]
pub(super) async fn policy(State(shared): State<Shared>, body: Contents) -> Result<Response, Refusal> {
    let OomPolicyBody { wait_ms, follow } = body.object("{\"wait_ms\": 2000}")?;
    let wait = Duration::from_millis(wait_ms);
    let [least, most] = WAITS;
    if wait < least || wait > most {
        let (least, most) = (least.as_millis(), most.as_millis());
        return Err(Refusal::new(Code::BadRequest, format!("wait_ms is from {least} to {most}")));
    }
    let questions = shared.controller.decide(wait).await?;
    let (lines, body) = mpsc::channel(1);
    if follow {
        tokio::spawn(feed(shared, questions, lines));
    }
    let headers = [("content-type", "application/x-ndjson"), ("cache-control", "no-store")];
    Ok((headers, Body::new(Lines(body))).into_response())
}

async fn feed(mut shared: Shared, mut questions: mpsc::Receiver<QuestionView>, lines: mpsc::Sender<Bytes>) {
    while !*shared.stopping.borrow_and_update() {
        tokio::select! {
            question = questions.recv() => {
                let Some(Ok(mut line)) = question.map(|question| serde_json::to_vec(&question)) else { return };
                line.push(b'\n');
                if lines.send(line.into()).await.is_err() {
                    return;
                }
            }
            changed = shared.stopping.changed() => if changed.is_err() { return },
            () = lines.closed() => return,
        }
    }
}

/// Answers a question. One that cannot be followed leaves it open for another.
#[utoipa::path(
    post, path = "/oom/decisions/{id}", params(("id" = u64, Path, description = "number of the question")),
    request_body = DecisionAnswer,
    responses((status = 204, description = "done"), (status = 400, body = Refusal),
        (status = 404, description = "no such question is open, or no such VM is there", body = Refusal),
        (status = 409, description = "it would not help, or is not needed any more", body = Refusal),
        (status = 503, body = Refusal)),
)]
pub(super) async fn decision(
    State(shared): State<Shared>,
    id: Result<Path<u64>, axum::extract::rejection::PathRejection>,
    body: Contents,
) -> Result<StatusCode, Refusal> {
    let Path(id) = id.map_err(|error| Refusal::new(Code::BadRequest, format!("the path: {}", error.body_text())))?;
    let said: DecisionAnswer = body.object("{\"answer\": \"pause\", \"vm\": \"web\"}")?;
    shared.controller.answer_question(id, said).await?;
    Ok(StatusCode::NO_CONTENT)
}

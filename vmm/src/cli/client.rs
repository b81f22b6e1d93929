//! Requests to a controller: HTTP/1.1 over its unix socket.
//!
//! A request may take long: a limit that is waited for, a guest that powers itself off. A controller that is stopped never
//! answers. What tells one from the other is that a controller answers a small question at once, whatever else it is asked:
//!
//! ```text
//!  request ──── PATIENCE ────► GET /host ──┬─ answered: wait on, for another PATIENCE
//!     └ answered: done                     └─ not within PATIENCE: it is silent
//! ```

use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::Parts;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::socket::deserted;
use super::{DONE, Failure, NOT_REACHED, usage};
use crate::chain::chain;
use crate::controller::error::{Code, Refusal};
use crate::controller::host::scaled;

/// How long nothing may be heard of a controller before it is asked whether it is there, and how long it may take to say so.
const PATIENCE: Duration = Duration::from_millis(2500);

/// How long the last words of a controller that has closed a connection are waited for, and the most of them that is read.
const LAST_WORDS: Duration = Duration::from_secs(1);
const MOST_SAID: u64 = 16 * 1024;

/// Time between two attempts to connect with one at whom as many wait already as may.
const CONNECT_AGAIN: Duration = Duration::from_millis(20);

/// Waits for what a controller is to answer, for as long as that lives.
///
/// # Errors
/// When it is silent.
pub async fn awaited<T>(socket: &Path, answer: impl Future<Output = T>) -> Result<T, Failure> {
    let patience = scaled(PATIENCE);
    let mut answer = pin!(answer);
    loop {
        if let Ok(answer) = timeout(patience, &mut answer).await {
            return Ok(answer);
        }
        let question = timeout(patience, send(socket, Method::GET, "/host", String::new()));
        tokio::select! {
            answer = &mut answer => return Ok(answer),
            alive = question => match alive {
                Ok(Ok(_)) => {}
                // It takes no more requests, but may still answer those that it has.
                Ok(Err(failure)) => return timeout(patience, answer).await.map_err(|_| failure),
                Err(_) => return Err(silent(socket)),
            }
        }
    }
}

fn silent(socket: &Path) -> Failure {
    Failure::error(format!(
        "the controller at {} has not answered for {} s: its process is stopped or has too little CPU time; kill -CONT lets \
         a stopped one go on, which then does what it was asked",
        socket.display(),
        (2 * scaled(PATIENCE)).as_secs()
    ))
}

/// Sends a request and returns the answer with its body still to come.
///
/// # Errors
/// When it is not answered.
pub async fn open(socket: &Path, method: Method, target: &str, body: String) -> Result<Response<Incoming>, Failure> {
    awaited(socket, send(socket, method, target, body)).await?
}

/// [`open`], however long that takes.
async fn send(socket: &Path, method: Method, target: &str, body: String) -> Result<Response<Incoming>, Failure> {
    let lost = |error: &dyn std::error::Error| {
        Failure::error(format!("the controller at {} does not answer: {}", socket.display(), chain(error)))
    };
    let stream = loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => sleep(CONNECT_AGAIN).await,
            stream => break stream,
        }
    };
    let stream = stream.map_err(|error| match error.kind() {
        std::io::ErrorKind::ConnectionRefused => deserted(socket),
        std::io::ErrorKind::PermissionDenied => {
            Failure::error(format!("no permission to use {}: only the user who started the VM may", socket.display()))
        }
        _ => lost(&error),
    })?;
    let (mut sender, mut connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| lost(&error))?;
    let (left, rest) = oneshot::channel();
    tokio::spawn(async move {
        if let Err(error) = poll_fn(|cx| connection.poll_without_shutdown(cx)).await {
            tracing::debug!(%error, "the connection has ended");
        }
        // Whoever has an answer waits for no last words.
        if !left.is_closed() {
            let Parts { io, read_buf, .. } = connection.into_parts();
            let mut said = read_buf.to_vec();
            // What cannot be read was not said. Whoever has asked may have gone.
            let _ = timeout(LAST_WORDS, io.into_inner().take(MOST_SAID).read_to_end(&mut said)).await;
            let _ = left.send(said);
        }
    });
    let request = Request::builder()
        .method(method)
        .uri(target)
        .header("host", "ballast")
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| lost(&error))?;
    match sender.send_request(request).await {
        Ok(answer) => Ok(answer),
        Err(error) => Err(rest.await.ok().and_then(|said| turned_away(&said)).unwrap_or_else(|| lost(&error))),
    }
}

/// What a controller said to one from whom it took no request, if it said anything: it had closed before that came.
fn turned_away(said: &[u8]) -> Option<Failure> {
    let head = said.windows(4).position(|end| end == b"\r\n\r\n")?;
    let status = said.strip_prefix(b"HTTP/1.1 ")?.get(..3).and_then(|status| StatusCode::from_bytes(status).ok())?;
    Some(refused(status, &said[head + 4..]))
}

/// Sends a request and reads the whole answer; a refusal becomes a failure with its sentence.
pub async fn request(
    socket: &Path,
    method: Method,
    target: &str,
    body: String,
) -> Result<(StatusCode, Bytes), Failure> {
    let answer = async {
        let answer = send(socket, method, target, body).await?;
        Ok((answer.status(), answer.into_body().collect().await))
    };
    let (status, body) = awaited(socket, answer).await??;
    let body = body.map_err(|error| Failure::error(format!("the answer was cut off: {}", chain(&error))))?.to_bytes();
    if status.is_success() { Ok((status, body)) } else { Err(refused(status, &body)) }
}

/// An answer in lines.
pub struct Lines {
    socket: PathBuf,
    body: Incoming,
    pending: Vec<u8>,
    what: &'static str,
    endless: bool,
}

impl Lines {
    /// Sends a request whose answer is lines: `what` they are, such as its events. An `endless` one may say nothing for as long
    /// as it likes.
    ///
    /// # Errors
    /// When it is not answered; a refusal becomes a failure with its sentence.
    pub async fn open(
        socket: &Path,
        method: Method,
        target: &str,
        body: String,
        what: &'static str,
        endless: bool,
    ) -> Result<Self, Failure> {
        let answer = open(socket, method, target, body).await?;
        let (status, body) = (answer.status(), answer.into_body());
        if !status.is_success() {
            let said = awaited(socket, body.collect()).await?;
            return Err(refused(status, &said.map_or_else(|_| Bytes::new(), |said| said.to_bytes())));
        }
        Ok(Self { socket: socket.to_owned(), body, pending: Vec::new(), what, endless })
    }

    /// The next line with its end, `None` after the last.
    ///
    /// # Errors
    /// When the controller is gone before it has said where they end, or is silent.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Failure> {
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                return Ok(Some(self.pending.drain(..=end).collect()));
            }
            let frame = self.body.frame();
            let frame = if self.endless { frame.await } else { awaited(&self.socket, frame).await? };
            let Some(frame) = frame else { return Ok(None) };
            if let Ok(data) = frame.map_err(|_| self.ended())?.into_data() {
                self.pending.extend_from_slice(&data);
            }
        }
    }

    /// That the controller is gone, and what it said with it.
    pub fn ended(&self) -> Failure {
        Failure::error(format!("the controller at {} has ended, and with it {}", self.socket.display(), self.what))
    }
}

/// Asks all of these controllers the same at once, and waits until each has answered or is known not to.
pub async fn ask_all<T>(sockets: &[PathBuf], target: &str) -> Vec<Result<T, Failure>>
where
    T: DeserializeOwned + Send + 'static,
{
    let ask = |socket: &PathBuf| {
        let (socket, target) = (socket.clone(), target.to_owned());
        tokio::spawn(async move { decode(&request(&socket, Method::GET, &target, String::new()).await?.1) })
    };
    let mut answers = Vec::new();
    for asked in sockets.iter().map(ask).collect::<Vec<_>>() {
        answers.push(asked.await.unwrap_or_else(|error| Err(Failure::error(error.to_string()))));
    }
    answers
}

/// [`ask_all`]: the answers, each with its socket, and the exit status. One that does not answer, or has just ended, does
/// not hide the others: that is said on stderr.
pub async fn answers<T>(sockets: Vec<PathBuf>, target: &str) -> (Vec<(PathBuf, T)>, u8)
where
    T: DeserializeOwned + Send + 'static,
{
    let (mut answers, mut status) = (Vec::new(), DONE);
    let asked = ask_all(&sockets, target).await;
    for (socket, answer) in sockets.into_iter().zip(asked) {
        match answer {
            Ok(answer) => answers.push((socket, answer)),
            Err(failure) => {
                eprintln!("ballast: {}", usage::printable(&failure.message));
                status = failure.status;
            }
        }
    }
    (answers, status)
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    /// Takes a connection with the request at its beginning, of which the first line is given.
    fn take(listener: &UnixListener) -> (UnixStream, String) {
        let (mut stream, _) = listener.accept().unwrap();
        let mut head = [0; 1024];
        let length = stream.read(&mut head).unwrap();
        let head = String::from_utf8_lossy(&head[..length]).into_owned();
        (stream, head.lines().next().unwrap_or_default().to_owned())
    }

    /// Answers in one piece: who asks only whether somebody is there hangs up as soon as the head has come.
    fn answer(mut stream: &UnixStream, body: &str) {
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(answer.as_bytes()).unwrap();
    }

    /// One who has too many clients says so and closes, before it has read what the next one wants.
    #[tokio::test]
    async fn who_is_turned_away_is_told_why() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let refusal = Refusal::new(Code::Busy, "there are 256 connections already");
        let body = serde_json::to_string(&refusal).unwrap();
        let controller = std::thread::spawn(move || {
            for _ in 0..20 {
                let (mut stream, _) = listener.accept().unwrap();
                let head = format!("HTTP/1.1 503 Service Unavailable\r\ncontent-length: {}\r\n\r\n", body.len());
                stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
            }
        });
        for _ in 0..20 {
            let failure = request(&path, Method::GET, "/host", String::new()).await.unwrap_err();
            assert_eq!(failure.message, refusal.message);
        }
        controller.join().unwrap();
    }

    #[tokio::test]
    async fn a_controller_that_is_there_may_take_its_time() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let controller = std::thread::spawn(move || {
            let (long, first) = take(&listener);
            let (question, second) = take(&listener);
            answer(&question, "{}");
            let (again, third) = take(&listener);
            answer(&again, "{}");
            answer(&long, "[7]");
            [first, second, third]
        });
        let answers: Vec<Result<Vec<u32>, _>> = ask_all(std::slice::from_ref(&path), "/long").await;
        assert_eq!(answers[0].as_ref().unwrap(), &[7]);
        assert_eq!(controller.join().unwrap(), ["GET /long HTTP/1.1", "GET /host HTTP/1.1", "GET /host HTTP/1.1"]);
    }
}

//! One connection: how long it may take, how much it may send, and what becomes of its requests.
//!
//! A client has [`PATIENCE`] for everything that it has to do: to send the head of a request (so a half-sent one and an
//! unused connection end), and to read what it asked for (so nothing is kept for one that does not). The answer to a
//! request takes as long as it takes; it has its own deadlines.
//!
//! Whoever is refused before all of the request was read may be sending the rest of it. It is read away for [`LINGER`]: a
//! socket that is closed meanwhile fails the client's `write`, and many then never read the answer that says why.
//!
//! ```text
//!  head ─► answer ─► nothing more is written ─► the rest is read away ─► closed
//!                                                └ until the client closes, but no longer than LINGER
//! ```
//!
//! A request that may change something is carried out to its end, also when the client hangs up: half a `PUT` would be
//! a VM whose name is taken and that nobody starts. It keeps its connection's place meanwhile.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::response::{IntoResponse, Response};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::Sleep;

use super::server::GRACE;
use crate::controller::error::{Code, Refusal};

/// How long a client may take to send the head of a request, be it the first or the next, and how long it may leave an
/// answer unread.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// How long a client may go on with a request that was answered before all of it was read.
const LINGER: Duration = Duration::from_secs(10);

/// Most bytes of a request's first line and headers, and of an answer that waits to be read.
const MAX_HEAD: usize = 64 * 1024;

/// The routes, as one connection uses them.
pub(crate) struct Service {
    router: TowerToHyperService<Router>,
    place: Arc<OwnedSemaphorePermit>,
    stopping: watch::Receiver<bool>,
}

impl Service {
    /// For a connection that has this `place` among all of them.
    pub fn new(router: Router, place: OwnedSemaphorePermit, stopping: watch::Receiver<bool>) -> Self {
        Self { router: TowerToHyperService::new(router), place: Arc::new(place), stopping }
    }
}

impl hyper::service::Service<Request<Incoming>> for Service {
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let changes = !request.method().is_safe();
        let answer = self.router.call(request);
        let (place, mut stopping) = (Arc::clone(&self.place), self.stopping.clone());
        Box::pin(async move {
            let work = async move {
                let answer = answer.await;
                drop(place);
                answer
            };
            let too_late = async move {
                told(&mut stopping).await;
                tokio::time::sleep(GRACE).await;
            };
            let answer = async {
                if changes {
                    // A panic in there goes on here, as it would without the task.
                    tokio::spawn(work).await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
                } else {
                    work.await
                }
            };
            tokio::select! {
                answer = answer => answer,
                () = too_late => Ok(Refusal::new(Code::Stopping, "the controller is going away").into_response()),
            }
        })
    }
}

/// Answers the requests of one client until it hangs up, takes too long, or the server stops.
pub(crate) async fn converse<S>(stream: S, service: Service, mut stopping: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(PATIENCE).max_buf_size(MAX_HEAD);
    let stream = Patient { stream, stalled: None };
    let mut connection = http.serve_connection(TokioIo::new(stream), service);
    let result = tokio::select! {
        result = poll_fn(|cx| connection.poll_without_shutdown(cx)) => result,
        () = told(&mut stopping) => {
            Pin::new(&mut connection).graceful_shutdown();
            poll_fn(|cx| connection.poll_without_shutdown(cx)).await
        }
    };
    if let Err(error) = &result {
        // Clients may do what they like.
        tracing::debug!(%error, "a connection has ended");
    }
    // Who says nothing, or reads nothing, has had its time.
    if result.as_ref().err().is_none_or(hyper::Error::is_parse) {
        // The service has the connection's place.
        let hyper::server::conn::http1::Parts { io, service: _place, .. } = connection.into_parts();
        tokio::select! {
            () = linger(io.into_inner()) => {}
            () = told(&mut stopping) => {}
        }
    }
}

/// Waits until the server stops.
async fn told(stopping: &mut watch::Receiver<bool>) {
    // Without a sender there is no server any more either.
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

/// Says that nothing more will come, and reads away what does.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let rest = async {
        stream.shutdown().await?;
        while stream.read(&mut [0; 4096]).await? > 0 {}
        io::Result::Ok(())
    };
    // Whatever ends it, it has ended.
    let _ = tokio::time::timeout(LINGER, rest).await;
}

/// Answers before anything was asked, as far as that goes without waiting; the connection is to be closed then.
pub(super) fn turn_away(stream: &UnixStream, refusal: Refusal) {
    tracing::debug!(%refusal, "a connection was turned away");
    let (status, body) = (refusal.code.status(), serde_json::to_string(&refusal).unwrap_or_default());
    let reason = hyper::StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason());
    let answer = format!(
        "HTTP/1.1 {status} {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        reason.unwrap_or_default(),
        body.len()
    );
    // A new connection has room for it; one that has gone needs none.
    let _ = stream.try_write(answer.as_bytes());
}

/// A stream that fails when the other side has not read for [`PATIENCE`] what is written to it.
struct Patient<S> {
    stream: S,
    /// Runs while nothing more can be written.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Patient<S> {
    /// What `written` means, given the time.
    fn unless_stalled<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(PATIENCE)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.unless_stalled(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.unless_stalled(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

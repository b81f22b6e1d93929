//! The same over a real socket, and the HTTP interface over another.

use std::os::fd::OwnedFd;

use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, socketpair};
use serde_json::{Value, json};

use super::super::link;
use super::*;
use crate::api::server;
use crate::worker::protocol::{MAX_MESSAGE, VERSION, decode, encode};

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a socket pair")
}

async fn received(inbox: &mut mpsc::Receiver<FromLink>) -> FromLink {
    tokio::time::timeout(Duration::from_secs(10), inbox.recv()).await.expect("in time").expect("open")
}

#[tokio::test]
async fn packets_become_messages_and_nothing_is_heard_behind_garbage() {
    for garbage in
        [&[0xff; 16][..], &[VERSION], &[VERSION; MAX_MESSAGE], &[VERSION; MAX_MESSAGE + 100], &[VERSION + 1, 0]]
    {
        let (near, far) = pair();
        let (sender, mut inbox) = mpsc::channel(8);
        let (to_worker, reader) = link::attach(near, sender, |item| item).expect("attached");
        tokio::spawn(reader);
        let mut buffer = [0; MAX_MESSAGE];
        let send = |packet: &[u8]| rustix::net::send(&far, packet, SendFlags::empty()).expect("sent");
        let message = FromWorker::Loaded { plan: 9 };
        send(encode(&message, &mut buffer));
        assert_eq!(received(&mut inbox).await, FromLink::Message(message.clone()));
        send(garbage);
        send(garbage);
        send(encode(&message, &mut buffer));
        assert!(matches!(received(&mut inbox).await, FromLink::Garbage(_)), "{} bytes", garbage.len());
        to_worker.send(ToWorker::Start).await.expect("queued");
        let mut packet = [0; MAX_MESSAGE];
        let length = loop {
            match rustix::net::recv(&far, &mut packet, RecvFlags::DONTWAIT) {
                Ok((length, _)) => break length,
                Err(rustix::io::Errno::AGAIN) => tokio::task::yield_now().await,
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!(decode::<ToWorker>(&packet[..length]), Ok(ToWorker::Start));
        drop(far);
        assert_eq!(received(&mut inbox).await, FromLink::Closed);
    }
}

#[tokio::test]
async fn a_stranger_at_the_workers_socket_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("worker");
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let listener = listener.expect("a socket");
    rustix::net::bind(&listener, &rustix::net::SocketAddrUnix::new(&path).expect("short")).expect("bound");
    rustix::net::listen(&listener, 1).expect("listens");
    let own = std::process::id().cast_signed();
    assert!(link::connect(&path, own).is_ok());
    assert!(matches!(link::connect(&path, own + 1), Err(link::ConnectError::Stranger { .. })));
    drop(listener);
    assert!(matches!(link::connect(&path, own), Err(link::ConnectError::Connect { .. })));
}

#[tokio::test]
async fn last_words_are_heard_from_a_worker_that_has_not_read_its_messages() {
    let (near, far) = pair();
    let mut buffer = [0; MAX_MESSAGE];
    rustix::net::send(&near, encode(&ToWorker::Start, &mut buffer), SendFlags::empty()).expect("sent");
    let words = FromWorker::Failed { message: "the kernel file is empty".to_owned(), smallest_max: None };
    rustix::net::send(&far, encode(&words, &mut buffer), SendFlags::empty()).expect("sent");
    drop(far);
    let (inbox, mut heard) = tokio::sync::mpsc::channel(4);
    let (_queue, reader) = link::attach(near, inbox, |item| item).expect("attached");
    reader.await;
    assert_eq!(heard.recv().await, Some(link::FromLink::Message(words)));
    assert_eq!(heard.recv().await, Some(link::FromLink::Closed));
}

/// An interface with one VM behind it, and requests to it.
pub(super) struct Site {
    pub dir: tempfile::TempDir,
    pub path: std::path::PathBuf,
    pub server: server::Server,
    pub worker: FakeWorker,
}

impl Site {
    pub async fn new(setup: Setup) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("vm.sock");
        let worker = FakeWorker::running(setup).await;
        let bound = server::bind(&path).expect("bound");
        let server = server::serve(bound, worker.controller.clone(), None).expect("served");
        Self { dir, path, server, worker }
    }

    pub async fn ask(&self, method: &str, target: &str, body: impl Into<String>) -> (StatusCode, String) {
        let stream = tokio::net::UnixStream::connect(&self.path).await.expect("connected");
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
        tokio::spawn(connection);
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        let body = Full::new(axum::body::Bytes::from(body.into()));
        let request = Request::builder().method(method).uri(target).header("host", "x").body(body).expect("a request");
        let answer = sender.send_request(request).await.expect("an answer");
        let status = answer.status();
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        (status, String::from_utf8(body.to_vec()).expect("text"))
    }

    pub async fn json(&self, method: &str, target: &str, body: impl Into<String>) -> (u16, Value) {
        let (status, body) = self.ask(method, target, body).await;
        (status.as_u16(), serde_json::from_str(&body).unwrap_or_else(|_| panic!("no JSON: {body:?}")))
    }
}

/// Semantics: 6, 8, 65, B3, T6.
#[tokio::test]
async fn everything_wrong_is_refused_in_the_same_form() {
    let site = Site::new(Setup::default()).await;
    let limit = "/vms/vm/memory";
    let cases = [
        ("GET", "/nothing", String::new(), 404, "not_found"),
        ("GET", "/vms/nobody", String::new(), 404, "not_found"),
        ("DELETE", "/host", String::new(), 405, "method_not_allowed"),
        ("PATCH", limit, String::new(), 400, "bad_request"),
        ("PATCH", limit, "{".to_owned(), 400, "bad_request"),
        ("PATCH", limit, "[]".to_owned(), 400, "bad_request"),
        ("PATCH", limit, r#"{"limit_bytes":1}"#.to_owned(), 400, "bad_request"),
        ("PATCH", limit, r#"{"current_bytes":0}"#.to_owned(), 400, "bad_request"),
        ("PATCH", limit, r#"{"failcnt":0}"#.to_owned(), 400, "bad_request"),
        ("PATCH", limit, r#"{"max_bytes":-1}"#.to_owned(), 400, "bad_request"),
        ("PATCH", limit, r#"{"max_bytes":"1M"}"#.to_owned(), 400, "bad_request"),
        ("PATCH", limit, r#"{"max_bytes":1.5}"#.to_owned(), 400, "bad_request"),
        ("PATCH", limit, r#"{"max_bytes":18446744073709551616}"#.to_owned(), 400, "bad_request"),
        ("PATCH", limit, r#"{"track":"on"}"#.to_owned(), 400, "bad_request"),
        ("PATCH", limit, r#"{"track":false}"#.to_owned(), 409, "wrong_state"),
        ("PATCH", limit, r#"{"max_bytes":1}"#.to_owned(), 400, "invalid_limit"),
        ("PATCH", limit, r#"{"max_bytes":4194304,"min_bytes":8388608}"#.to_owned(), 400, "invalid_limit"),
        ("PATCH", limit, r#"{"max_bytes":null} x"#.to_owned(), 400, "bad_request"),
        ("PATCH", "/vms/vm/memory?mode=hard", "{}".to_owned(), 400, "bad_request"),
        ("PATCH", "/vms/vm/memory?wait=1", "{}".to_owned(), 400, "bad_request"),
        ("PATCH", "/vms/vm/memory?wait_ms=99999999999", "{}".to_owned(), 400, "bad_request"),
        ("PATCH", "/vms/vm/memory?generation=999", "{}".to_owned(), 409, "generation_mismatch"),
        ("PATCH", "/vms/nobody/memory", "{}".to_owned(), 404, "not_found"),
        ("PATCH", limit, " ".repeat(70_000), 413, "too_large"),
        ("GET", "/events?since=x", String::new(), 400, "bad_request"),
        ("POST", "/vms/nobody/kill", String::new(), 404, "not_found"),
    ];
    for (method, target, body, status, code) in cases {
        let short: String = body.chars().take(60).collect();
        let (got, answer) = site.json(method, target, body).await;
        assert_eq!((got, answer["code"].as_str()), (status, Some(code)), "{method} {target} {short}: {answer}");
        assert!(answer["message"].as_str().is_some_and(|message| !message.is_empty()), "{answer}");
    }
    site.server.stop().await;
    assert!(!site.path.exists());
}

/// Semantics: 8.
#[tokio::test]
async fn limits_are_changed_over_http() {
    let mut site = Site::new(Setup::default()).await;
    let body = json!({ "max_bytes": 3000 * 4096, "high_bytes": null }).to_string();
    let (status, answer) = site.json("PATCH", "/vms/vm/memory?wait_ms=1000", body).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!(answer["memory"]["max_bytes"], 3000 * 4096);
    assert_eq!(answer["memory"]["high_bytes"], Value::Null);
    let (status, same) = site.json("PATCH", "/vms/vm/memory", "{}").await;
    assert_eq!((status, &same["generation"]), (200, &answer["generation"]), "nothing asked for, nothing changed");

    site.worker.book();
    site.worker.touch(500).await;
    let (status, answer) = site.json("PATCH", "/vms/vm/memory?wait_ms=0", r#"{"max_bytes":1228800}"#).await;
    assert_eq!(status, 202, "{answer}");
    let (status, answer) = site.json("PATCH", "/vms/vm/memory?mode=refuse", r#"{"max_bytes":1228800}"#).await;
    assert_eq!((status, answer["code"].as_str()), (409, Some("limit_below_usage")), "{answer}");
    assert!(answer["usage_bytes"].as_u64().is_some_and(|usage| usage > 1_228_800));
}

#[tokio::test]
async fn the_document_describes_every_route() {
    let site = Site::new(Setup::default()).await;
    let (status, document) = site.json("GET", "/openapi.json", "").await;
    assert_eq!(status, 200);
    assert!(document["openapi"].as_str().is_some_and(|version| version.starts_with("3.")));
    for (path, method) in [
        ("/host", "get"),
        ("/vms", "get"),
        ("/vms/{name}", "get"),
        ("/vms/{name}/memory", "patch"),
        ("/vms/{name}/pause", "post"),
        ("/vms/{name}/resume", "post"),
        ("/vms/{name}/kill", "post"),
        ("/events", "get"),
    ] {
        assert!(document["paths"][path][method].is_object(), "{method} {path}");
    }
    let limits = &document["components"]["schemas"]["MemoryPatch"]["properties"];
    assert!(limits["max_bytes"].is_object(), "{limits}");
    let (status, host) = site.json("GET", "/host", "").await;
    assert_eq!((status, &host["vms"]), (200, &json!(1)));
}

#[tokio::test]
async fn events_are_lines_and_end_with_the_server() {
    let site = Site::new(Setup::default()).await;
    let (_, text) = site.ask("GET", "/events?follow=false", "").await;
    let kinds: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!(kinds[0]["event"], "created");
    assert_eq!(kinds[1]["event"], "started");
    assert_eq!(kinds[1]["seq"], 2);
    let (_, text) = site.ask("GET", "/events?since=2&follow=false", "").await;
    assert!(text.is_empty());

    let Site { path, server, worker, dir: _dir } = site;
    let stream = tokio::net::UnixStream::connect(&path).await.expect("connected");
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("HTTP");
    tokio::spawn(connection);
    let request = Request::builder().uri("/events?since=2").header("host", "x").body(Full::default());
    let request: Request<Full<axum::body::Bytes>> = request.expect("a request");
    let mut body = sender.send_request(request).await.expect("an answer").into_body();
    worker.exit(ExitReason::PowerOff).await;
    let frame = body.frame().await.expect("a line").expect("no error").into_data().expect("data");
    let event: Value = serde_json::from_slice(&frame).expect("JSON");
    assert_eq!((event["event"].as_str(), event["reason"].as_str()), (Some("stopped"), Some("power_off")));
    server.stop().await;
    assert!(body.frame().await.is_none(), "the stream has ended in order");
}

#[tokio::test]
async fn a_socket_in_use_is_refused_and_a_dead_one_is_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("deeper/vm.sock");
    let first = server::bind(&path).expect("bound");
    let mode = |path: &std::path::Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().expect("a parent")), 0o700);
    assert!(matches!(server::bind(&path), Err(server::BindError::InUse(_))));
    drop(first);
    assert!(!path.exists());
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    assert!(path.exists(), "left by a process that died");
    let second = server::bind(&path).expect("taken over");
    drop(second);
    std::fs::write(&path, "not a socket").expect("written");
    assert!(matches!(server::bind(&path), Err(server::BindError::NotASocket(_))));
    assert!(path.exists());
    let long = dir.path().join("x".repeat(120));
    assert!(matches!(server::bind(&long), Err(server::BindError::Path(_))));
}

//! Clients of the interface that are slow, many, strangers, or gone: each is bounded in time and in what it costs, and
//! the next one is answered. In paused time: half a minute of silence passes at once.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout};

use super::super::events::RING;
use super::wire::Site;
use super::*;
use crate::api::server::MAX_CONNECTIONS;

/// Longer than anything may last.
const LONG: Duration = Duration::from_secs(600);

async fn connect(site: &Site) -> UnixStream {
    UnixStream::connect(&site.path).await.expect("connected")
}

/// Sends `bytes` and returns what comes until the other side closes, with how long that took.
async fn to_the_end(stream: &mut UnixStream, bytes: &[u8]) -> (String, Duration) {
    let start = Instant::now();
    // Whoever is answered before the end need not send the rest.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    // Closed with something unread counts as an end.
    let _ = timeout(LONG, stream.read_to_end(&mut answer)).await.expect("the connection ends");
    (String::from_utf8_lossy(&answer).into_owned(), start.elapsed())
}

/// What a refusal on the wire says: its status and its code.
fn refused(answer: &str) -> (u16, String) {
    let status = answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"));
    let body = answer.split_once("\r\n\r\n").expect("a body").1;
    let body: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer:?}"));
    (status, body["code"].as_str().expect("a code").to_owned())
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_finish_its_request_is_left() {
    let site = Site::new(Setup::default()).await;
    let whole = "GET /host HTTP/1.1\r\nhost: x\r\n\r\n";
    for (what, bytes) in [
        ("nothing", String::new()),
        ("half a line", "GET /host HT".to_owned()),
        ("half a head", "GET /host HTTP/1.1\r\nhost: x\r\n".to_owned()),
        ("nothing after the first", whole.to_owned()),
        ("half of the second", format!("{whole}GET /ho")),
    ] {
        let (answer, time) = to_the_end(&mut connect(&site).await, bytes.as_bytes()).await;
        assert!((29..=32).contains(&time.as_secs()), "{what}: after {time:?}");
        assert_eq!(answer.starts_with("HTTP/1.1 200"), bytes.starts_with(whole), "{what}: {answer}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_does_not_come_is_refused() {
    let site = Site::new(Setup::default()).await;
    for half in ["content-length: 50\r\n\r\n{\"max", "transfer-encoding: chunked\r\n\r\n5\r\n{\"max\r\n"] {
        let head = format!("PATCH /vms/vm/memory HTTP/1.1\r\nhost: x\r\n{half}");
        let (answer, time) = to_the_end(&mut connect(&site).await, head.as_bytes()).await;
        assert_eq!(refused(&answer), (408, "body_timeout".to_owned()));
        assert!((9..=12).contains(&time.as_secs()), "after {time:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_refused_early_may_send_the_rest_and_is_left_in_the_end() {
    let site = Site::new(Setup::default()).await;
    let mut stream = connect(&site).await;
    let head = b"PUT /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n";
    let (answer, time) = to_the_end(&mut stream, head).await;
    assert_eq!(refused(&answer), (404, "not_found".to_owned()));
    assert!(time < Duration::from_secs(1), "the answer waits for nobody: {time:?}");
    for _ in 0..9 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        stream.write_all(b"{}").await.expect("it is read away");
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    stream.write_all(b"{}").await.expect_err("enough");
}

/// Makes `count` events, large enough that a socket's buffer is soon full of them.
async fn happen(controller: &Controller, count: usize) {
    let done = controller.ask(move |actor, reply| {
        for _ in 0..count {
            actor.event(EventKind::Paused, Some("vm"), json!({ "padding": "x".repeat(2000) }));
        }
        super::super::actor::answer(reply, Ok(()));
    });
    done.await.expect("the actor lives");
}

/// Lets everybody do what can be done at once.
async fn idle() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_is_left_and_holds_nothing_back() {
    let site = Site::new(Setup::default()).await;
    let mut follower = connect(&site).await;
    follower.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n").await.expect("sent");
    let mut asking = connect(&site).await;
    let many = "GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n".repeat(200);
    asking.write_all(many.as_bytes()).await.expect("sent");
    for _ in 0..20 {
        happen(&site.worker.controller, 100).await;
        idle().await;
    }
    assert_eq!(site.json("GET", "/host", "").await.0, 200);
    tokio::time::sleep(Duration::from_secs(31)).await;
    // All that there is was on its way before they were left.
    for stream in [&mut follower, &mut asking] {
        let (rest, time) = to_the_end(stream, b"").await;
        assert!(rest.len() < 1 << 20 && time.as_secs() < 1, "{} bytes, {time:?}", rest.len());
    }
}

/// Numbers of the events among `lines`, and how many are said to be missing before each.
fn told(lines: &str) -> Vec<(u64, u64)> {
    let event = |line: &str| {
        let event: Value = serde_json::from_str(line).ok()?;
        Some((event["seq"].as_u64()?, event["dropped"].as_u64().unwrap_or(0)))
    };
    lines.lines().filter_map(event).collect()
}

#[tokio::test(start_paused = true)]
async fn a_follower_that_comes_late_or_is_slow_is_told_how_much_it_has_missed() {
    let site = Site::new(Setup::default()).await;
    let before = site.worker.events().await.len();
    let mut slow = connect(&site).await;
    slow.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.expect("sent");
    idle().await;
    for _ in 0..50 {
        happen(&site.worker.controller, RING / 10).await;
        idle().await;
    }
    let last = (before + 50 * (RING / 10)) as u64;

    let (_, late) = site.ask("GET", "/events?since=7&follow=false", "").await;
    let late = told(&late);
    assert_eq!(late[0], (last - RING as u64, last - RING as u64 - 7), "the first says how many came before");
    assert_eq!(late.len(), RING + 1);

    let mut text = Vec::new();
    let reading = async {
        while told(&String::from_utf8_lossy(&text)).last().is_none_or(|(seq, _)| *seq < last) {
            assert_ne!(slow.read_buf(&mut text).await.expect("open"), 0);
        }
    };
    timeout(LONG, reading).await.expect("all events come");
    let mut seen = 0;
    let mut missing = 0;
    for (seq, dropped) in told(&String::from_utf8_lossy(&text)) {
        assert_eq!(seq, seen + dropped.max(1), "no hole that is not told");
        seen = seq;
        missing += dropped;
    }
    assert!(missing > 0, "the socket has taken it all: the test shows nothing");
}

#[tokio::test(start_paused = true)]
async fn connections_are_bounded_and_a_place_is_free_again_when_one_ends() {
    let site = Site::new(Setup::default()).await;
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        silent.push(connect(&site).await);
    }
    let (answer, _) = to_the_end(&mut connect(&site).await, b"").await;
    assert_eq!(refused(&answer), (503, "busy".to_owned()));
    silent.pop();
    idle().await;
    assert_eq!(site.json("GET", "/host", "").await.0, 200);
    tokio::time::sleep(Duration::from_secs(31)).await;
    for _ in 0..MAX_CONNECTIONS {
        assert_eq!(site.json("GET", "/host", "").await.0, 200, "those that said nothing have lost theirs");
    }
}

#[tokio::test(start_paused = true)]
async fn another_user_is_turned_away_even_where_the_file_lets_him_in() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP another_user reason=only-root-can-be-another-user");
        return;
    }
    let site = Site::new(Setup::default()).await;
    for path in [site.dir.path(), &site.path] {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).expect("changed");
    }
    let path = site.path.clone();
    let connecting = std::thread::spawn(move || {
        // SAFETY: takes numbers. The system call itself is for this thread alone, unlike the function of libc.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) }, 0);
        std::os::unix::net::UnixStream::connect(path)
    });
    let stream = connecting.join().expect("no panic").expect("connected");
    stream.set_nonblocking(true).expect("set");
    let mut stream = UnixStream::from_std(stream).expect("watched");
    let (answer, _) = to_the_end(&mut stream, b"GET /host HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert_eq!(refused(&answer), (403, "forbidden".to_owned()));
    assert_eq!(site.json("GET", "/host", "").await.0, 200);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_answers_what_it_was_asked_before() {
    let mut site = Site::new(Setup::default()).await;
    site.worker.touch(1000).await;
    let pause = b"POST /vms/vm/pause HTTP/1.1\r\nhost: x\r\n\r\n";
    let asking = tokio::spawn({
        let mut stream = connect(&site).await;
        async move { to_the_end(&mut stream, pause).await.0 }
    });
    let ToWorker::Pause { seq } = site.worker.next().await else { panic!("no pause") };
    // Nobody will answer this one: the limit is below what is used, and the guest gives nothing.
    let waiting = tokio::spawn({
        let mut stream = connect(&site).await;
        let body = r#"{"max_bytes":3145728}"#;
        let patch = format!("PATCH /vms/vm/memory HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        async move { to_the_end(&mut stream, patch.as_bytes()).await.0 }
    });
    idle().await;
    let half = tokio::spawn({
        let mut stream = connect(&site).await;
        async move { to_the_end(&mut stream, b"GET /ho").await.0 }
    });
    let Site { server, mut worker, path, dir: _dir } = site;
    let start = Instant::now();
    let stopping = tokio::spawn(server.stop());
    idle().await;
    assert!(!path.exists());
    worker.report.paused = true;
    worker.answer(seq).await;
    assert!(asking.await.expect("no panic").starts_with("HTTP/1.1 200"));
    assert_eq!(refused(&waiting.await.expect("no panic")), (503, "stopping".to_owned()));
    stopping.await.expect("no panic");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    assert_eq!(half.await.expect("no panic"), "");
}

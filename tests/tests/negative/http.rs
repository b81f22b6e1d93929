//! Nonsense on the control socket: each is refused for itself, and the next request is answered.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use ballast_tests::{TestVm, deadline, http, number};
use serde_json::{Value, json};

use super::skipped;

const MIB: u64 = 1 << 20;

/// A VM that has been running for a moment.
fn running(name: &str) -> TestVm {
    let vm = TestVm::builder(name).memory("size=64M,max=48M").cmdline("shell").start();
    vm.expect("READY", 10);
    vm.wait_state("running", 10);
    vm
}

/// Checks that an answer is a refusal with this status: JSON with a code for programs and a sentence for people.
fn refusal((status, body): (u16, String), expected: u16, of: &dyn std::fmt::Debug) -> Value {
    assert_eq!(status, expected, "{of:?}: {body}");
    let body: Value = serde_json::from_str(&body).unwrap_or_else(|e| panic!("{of:?}: {e}: {body}"));
    let code = body["code"].as_str().unwrap_or_default();
    assert!(!code.is_empty() && code.chars().all(|c| c.is_ascii_lowercase() || c == '_'), "{of:?}: {body}");
    let message = body["message"].as_str().unwrap_or_default();
    assert!(!message.is_empty() && !message.contains('\n'), "{of:?}: {body}");
    body
}

/// Semantics: 6, 8, 65.
#[test]
fn bodies_that_make_no_sense_are_refused_and_change_nothing() {
    if skipped("bad-bodies") {
        return;
    }
    let vm = running("bodies");
    let before = vm.show();
    let deep = format!("{{\"max_bytes\":{}", "[".repeat(10_000));
    let table = [
        ("", "bad_request"),
        ("{", "bad_request"),
        ("nonsense", "bad_request"),
        ("null", "bad_request"),
        ("[]", "bad_request"),
        ("[67108864]", "bad_request"),
        ("\"64M\"", "bad_request"),
        ("67108864", "bad_request"),
        ("{} {}", "bad_request"),
        ("{\"max_bytes\":67108864},", "bad_request"),
        ("max_bytes=67108864", "bad_request"),
        ("{\"max\":67108864}", "bad_request"),
        ("{\"Max_bytes\":67108864}", "bad_request"),
        ("{\"max_bytes\":67108864,\"unknown\":1}", "bad_request"),
        ("{\"max_bytes\":50331648,\"max_bytes\":67108864}", "bad_request"),
        ("{\"max_bytes\":\"64M\"}", "bad_request"),
        ("{\"max_bytes\":\"67108864\"}", "bad_request"),
        ("{\"max_bytes\":true}", "bad_request"),
        ("{\"max_bytes\":[67108864]}", "bad_request"),
        ("{\"max_bytes\":{}}", "bad_request"),
        ("{\"max_bytes\":-1}", "bad_request"),
        ("{\"max_bytes\":67108864.0}", "bad_request"),
        ("{\"max_bytes\":1.5}", "bad_request"),
        ("{\"max_bytes\":1e30}", "bad_request"),
        ("{\"max_bytes\":18446744073709551616}", "bad_request"),
        ("{\"max_bytes\":NaN}", "bad_request"),
        ("{\"max_bytes\":67108865}", "invalid_limit"),
        ("{\"max_bytes\":18446744073709551615}", "invalid_limit"),
        ("{\"high_bytes\":1}", "invalid_limit"),
        ("{\"min_bytes\":67108864}", "invalid_limit"),
        ("{\"low_bytes\":67108864}", "invalid_limit"),
        ("{\"high_bytes\":67108864}", "invalid_limit"),
        ("{\"min_bytes\":41943040,\"max_bytes\":37748736}", "invalid_limit"),
        (&deep, "bad_request"),
    ];
    for (body, code) in table {
        let shown: String = body.chars().take(60).collect();
        let answer = refusal(vm.http("PATCH", "/vms/bodies/memory", Some(body)), 400, &shown);
        assert_eq!(answer["code"], code, "{shown}: {answer}");
    }
    let now = vm.show();
    assert_eq!(now["generation"], before["generation"]);
    for key in ["min_bytes", "low_bytes", "high_bytes", "max_bytes", "max_pending_bytes"] {
        assert_eq!(now["memory"][key], before["memory"][key], "{key}");
    }
    // Nothing to change is nothing wrong.
    assert_eq!(vm.patch("", &json!({})).0, 200);
}

#[test]
fn queries_that_make_no_sense_are_refused_and_change_nothing() {
    if skipped("bad-queries") {
        return;
    }
    let vm = running("queries");
    let before = vm.show();
    let memory = "/vms/queries/memory";
    for query in [
        "mode=foo",
        "mode=",
        "mode=Force",
        "mode=force&mode=refuse",
        "wait_ms=-1",
        "wait_ms=1.5",
        "wait_ms=soon",
        "wait_ms=",
        "wait_ms=86400001",
        "wait_ms=99999999999999999999",
        "generation=x",
        "generation=-1",
        "generation=99999999999999999999",
        "frob=1",
        "mode=force&frob",
        "%ff=1",
    ] {
        let body = json!({"max_bytes": 40 * MIB}).to_string();
        let answer = refusal(vm.http("PATCH", &format!("{memory}?{query}"), Some(&body)), 400, &query);
        assert_eq!(answer["code"], "bad_request", "{query}: {answer}");
    }
    for query in ["since=x", "since=-1", "since=", "follow=2", "follow=", "frob=1"] {
        refusal(vm.http("GET", &format!("/events?{query}"), None), 400, &query);
    }
    assert_eq!(vm.show()["memory"]["max_bytes"], before["memory"]["max_bytes"]);

    // A number that is still to come is of another controller, and a mode may be given without need.
    let all = vm.http("GET", "/events?since=0&follow=false", None);
    assert_eq!(vm.http("GET", "/events?since=18446744073709551615&follow=false", None), all);
    assert_eq!(vm.patch("?mode=refuse&wait_ms=0", &json!({"max_bytes": 44 * MIB})).0, 200);
}

#[test]
fn an_old_generation_is_refused_with_the_present_one() {
    if skipped("old-generation") {
        return;
    }
    let vm = running("generation");
    let generation = number(&vm.show(), "generation");
    let query = format!("?generation={generation}");
    let (status, body) = vm.patch(&query, &json!({"max_bytes": 44 * MIB}));
    assert_eq!(status, 200, "{body}");
    let now = number(&body, "generation");
    assert_ne!(now, generation);
    let (status, body) = vm.patch(&query, &json!({"max_bytes": 40 * MIB}));
    assert_eq!((status, &body["code"]), (409, &json!("generation_mismatch")), "{body}");
    assert_eq!(number(&body, "generation"), now);
    assert_eq!(number(&vm.show(), "memory.max_bytes"), 44 * MIB);
}

#[test]
fn paths_and_methods_that_do_not_exist_are_refused() {
    if skipped("bad-paths") {
        return;
    }
    let vm = running("paths");
    let long = format!("/vms/{}", "n".repeat(10_000));
    for (method, path, status) in [
        ("GET", "/", 404),
        ("GET", "/vm", 404),
        ("GET", "/vms/", 404),
        ("GET", "//vms", 404),
        ("GET", "/vms/none", 404),
        ("GET", "/vms/PATHS", 404),
        ("GET", "/vms/paths/", 404),
        ("GET", "/vms/paths/frob", 404),
        ("GET", "/vms/%2e%2e%2fetc", 404),
        ("GET", "/vms/%00", 404),
        ("GET", "/vms/%ff", 400),
        ("GET", "/vms/a%20b", 404),
        ("GET", long.as_str(), 404),
        ("PATCH", "/vms/none/memory", 404),
        ("POST", "/vms/none/pause", 404),
        ("POST", "/vms/none/resume", 404),
        ("POST", "/vms/none/kill", 404),
        ("POST", "/vms/paths/frob", 404),
        ("POST", "/vms/%ff/kill", 400),
        ("PATCH", "/vms/%ff/memory", 400),
        ("DELETE", "/vms", 405),
        ("POST", "/vms", 405),
        ("PUT", "/vms/paths", 405),
        ("DELETE", "/vms/paths", 405),
        ("GET", "/vms/paths/memory", 405),
        ("POST", "/vms/paths/memory", 405),
        ("GET", "/vms/paths/kill", 405),
        ("GET", "/vms/paths/pause", 405),
        ("POST", "/host", 405),
        ("POST", "/events", 405),
        ("POST", "/openapi.json", 405),
        ("FROB", "/host", 405),
    ] {
        refusal(vm.http(method, path, Some("{}")), status, &(method, path.get(..40).unwrap_or(path)));
    }
    assert_eq!(vm.show()["state"], "running", "nothing has been done to it");
}

/// Sends bytes, closes that direction if told to, and returns what comes back until the other end is closed.
fn raw(vm: &TestVm, what: &str, bytes: &[u8], close: bool) -> Vec<u8> {
    let mut stream = UnixStream::connect(vm.socket()).expect("the socket can be connected");
    stream
        .set_read_timeout(Some(deadline(10)))
        .and_then(|()| stream.set_write_timeout(Some(deadline(10))))
        .expect("set");
    // Whoever answers before the end need not read the rest; that is no error here.
    let _ = stream.write_all(bytes);
    if close {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => panic!("{what}: no end of the answer: {answer:?}"),
        // Closed with something unread counts as an end.
        _ => answer,
    }
}

/// The status of a raw answer, if it is one.
fn status(answer: &[u8]) -> Option<u16> {
    let head = std::str::from_utf8(answer.get(..12)?).ok()?;
    head.strip_prefix("HTTP/1.1 ")?.parse().ok()
}

#[test]
fn what_is_not_http_is_refused_and_the_next_request_is_answered() {
    if skipped("not-http") {
        return;
    }
    let vm = running("raw");
    let patch = "PATCH /vms/raw/memory HTTP/1.1\r\nHost: x\r\nConnection: close\r\n";
    let large = [b"{\"max_bytes\":".as_slice(), &[b' '; 100_000], b"41943040}"].concat();
    let with_length = [patch.as_bytes(), b"Content-Length: 100022\r\n\r\n", &large].concat();
    let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
    let chunked = [patch.as_bytes(), b"Transfer-Encoding: chunked\r\n\r\n", &chunk, &chunk, b"0\r\n\r\n"].concat();
    let garbage: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let header = [b"GET /host HTTP/1.1\r\nX: ".as_slice(), &[b'x'; 1 << 20], b"\r\n\r\n"].concat();
    let headers = [b"GET /host HTTP/1.1\r\n".as_slice(), &b"X: y\r\n".repeat(1000), b"\r\n"].concat();
    let path = [b"GET /".as_slice(), &[b'x'; 1 << 20], b" HTTP/1.1\r\n\r\n"].concat();
    let text = |rest: &str| format!("{patch}{rest}").into_bytes();
    // What is sent, whether that is all, and the status if there must be one.
    let table: [(&str, Vec<u8>, bool, Option<u16>); 19] = [
        ("nothing", Vec::new(), true, None),
        ("garbage", garbage, true, Some(400)),
        ("zeroes", vec![0; 10_000], true, Some(400)),
        ("another protocol", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), true, Some(400)),
        ("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), true, None),
        ("HTTP/0.9", b"GET /host\r\n\r\n".to_vec(), true, Some(400)),
        ("a header without a colon", b"GET /host HTTP/1.1\r\nfrob\r\n\r\n".to_vec(), false, Some(400)),
        ("a huge header", header, false, Some(431)),
        ("a thousand headers", headers, false, Some(431)),
        ("a huge path", path, false, None),
        ("half a request", b"GET /host HT".to_vec(), true, None),
        ("half a body", text("Content-Length: 100\r\n\r\n{\"max_bytes\":"), true, None),
        ("no length", text("\r\n{\"max_bytes\":41943040}"), false, Some(400)),
        ("a negative length", text("Content-Length: -1\r\n\r\n{}"), false, Some(400)),
        ("two lengths", text("Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"), false, Some(400)),
        ("a length that is a lie", text("Content-Length: 99999999999\r\n\r\n{}"), false, Some(413)),
        ("a large body", with_length, false, Some(413)),
        ("a large body in chunks", chunked, false, Some(413)),
        ("a chunk that is none", text("Transfer-Encoding: chunked\r\n\r\nxyz\r\n"), false, Some(400)),
    ];
    for (what, bytes, close, expected) in table {
        let answer = raw(&vm, what, &bytes, close);
        if expected.is_some() {
            assert_eq!(status(&answer), expected, "{what}: {:?}", String::from_utf8_lossy(&answer));
        } else {
            assert!(status(&answer).is_none_or(|status| status >= 400), "{what}");
        }
        let (now, body) = http(vm.socket(), "GET", "/vms/raw", None).expect("the next request is answered");
        assert_eq!(now, 200, "after {what}: {body}");
    }
    assert_eq!(number(&vm.show(), "memory.max_bytes"), 48 * MIB, "none of it was a request");
}

#[test]
fn many_connections_at_once_are_answered_and_those_that_say_nothing_are_in_nobody_s_way() {
    if skipped("many-connections") {
        return;
    }
    let mut vm = running("many");
    let connect = || {
        let stream = UnixStream::connect(vm.socket()).expect("the socket can be connected");
        stream.set_read_timeout(Some(deadline(10))).expect("set");
        stream
    };
    let silent: Vec<_> = (0..60).map(|_| connect()).collect();
    let mut halves: Vec<_> = (0..60).map(|_| connect()).collect();
    for stream in &mut halves {
        stream.write_all(b"GET /host HTTP/1.1\r\nHost: x\r\n").expect("written");
    }
    let mut asking: Vec<_> = (0..120).map(|_| connect()).collect();
    for stream in &mut asking {
        stream.write_all(b"GET /vms HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("written");
    }
    for stream in &mut asking {
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("answered");
        assert_eq!(status(&answer), Some(200));
    }
    // Nor do they keep the VM from ending, or its socket in place.
    let socket = vm.socket().to_owned();
    vm.signal(libc::SIGTERM);
    assert_eq!(vm.wait(5).code(), Some(143));
    assert!(!socket.exists());
    drop((silent, halves));
}

#[test]
fn followers_of_events_that_hang_up_or_do_not_read_are_in_nobody_s_way() {
    if skipped("followers") {
        return;
    }
    let mut vm = running("follow");
    let follow = || {
        let mut stream = UnixStream::connect(vm.socket()).expect("the socket can be connected");
        stream.write_all(b"GET /events?since=0 HTTP/1.1\r\nHost: x\r\n\r\n").expect("written");
        stream
    };
    let lazy: Vec<_> = (0..20).map(|_| follow()).collect();
    for _ in 0..20 {
        drop(follow());
    }
    for _ in 0..100 {
        assert_eq!(vm.post("pause").0, 200);
        assert_eq!(vm.post("resume").0, 200);
    }
    assert!(vm.events().iter().filter(|event| event["event"] == "paused").count() > 1);
    vm.signal(libc::SIGTERM);
    assert_eq!(vm.wait(5).code(), Some(143));
    drop(lazy);
}

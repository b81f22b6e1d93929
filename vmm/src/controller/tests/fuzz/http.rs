//! Bytes for the interface: changed requests over a connection in memory, to the real routes, with a controller behind
//! them whose workers are played. Each is answered or the connection is closed, and the account stays right.

use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};

use super::super::super::actor::answer;
use super::super::super::start::Service;
use super::super::*;
use super::{Case, Random, inputs, mutate, seed};
use crate::api::connection::{self, converse};

/// Longer than a request may wait (a day), in time that passes at once.
const LONG: Duration = Duration::from_secs(200_000);

/// Inputs after which everything is made anew.
const ACT: u64 = 100;

/// What requests are made of.
const WORDS: &[&str] = &[
    "GET ",
    "PUT ",
    "POST ",
    "PATCH ",
    "DELETE ",
    "HEAD ",
    "OPTIONS ",
    "TRACE ",
    "CONNECT ",
    "PRI * ",
    " HTTP/1.1",
    " HTTP/1.0",
    "\r\n",
    "\r\n\r\n",
    "\n",
    "host: x",
    "content-length: ",
    "content-length: 18446744073709551616\r\n",
    "transfer-encoding: chunked\r\n",
    "transfer-encoding: gzip, chunked\r\n",
    "connection: close\r\n",
    "connection: upgrade\r\nupgrade: h2c\r\n",
    "expect: 100-continue\r\n",
    "0\r\n\r\n",
    "ffffffffffffffff\r\n",
    "5;x=y\r\n",
    "/",
    "//",
    "/..",
    "%2f",
    "%2e%2e",
    "%00",
    "%ff",
    "%",
    "?",
    "&",
    "=",
    "#",
    "*",
    "/vms",
    "/vms/vm",
    "/vms/vm/memory",
    "/groups",
    "/limits",
    "/events",
    "since=",
    "follow=false",
    "wait_ms=",
    "mode=",
    "generation=",
    "{",
    "}",
    "[",
    "]",
    "[[[[[[[[",
    "\"",
    ",",
    ":",
    "null",
    "true",
    "-1",
    "0.5",
    "1e999",
    "18446744073709551616",
    "\\u0000",
    "\\ud800",
    "\u{0}",
    "\u{feff}",
    "\u{1f40b}",
    "\"max_bytes\"",
    "\"size_bytes\"",
    "\"kernel\"",
    "67108864",
    "4096",
];

/// Bodies that some request takes.
const BODIES: &[&str] = &[
    "{}",
    r#"{"max_bytes": 16777216, "high_bytes": 8388608, "min_bytes": 0, "low_bytes": null}"#,
    r#"{"max_bytes": 1228800}"#,
    r#"{"vmm_max_bytes": 1048576, "swap_max_bytes": 0, "store_max_bytes": 4096, "track": true}"#,
    r#"{"kernel": "/proc/self/exe", "cmdline": "a b", "cpus": 2, "debug_port": true,
        "memory": {"size_bytes": 67108864, "max_bytes": 33554432, "swap_max_bytes": null, "track": true},
        "balloon": {"deflate_on_oom": true}, "oom": {"action": "kill", "deadline_ms": 5000, "priority": -3}}"#,
    r#"{"kernel": "/proc/self/exe", "memory": {"size_bytes": 4194304}}"#,
];

/// Every request of the document, with a VM that is there and one that is not.
fn requests() -> Vec<(String, String)> {
    let document: serde_json::Value = serde_json::from_str(&crate::api::document()).expect("JSON");
    let mut requests = vec![("GET".to_owned(), "/openapi.json".to_owned()), ("GET".to_owned(), "/nothing".to_owned())];
    for (path, item) in document["paths"].as_object().expect("paths") {
        for method in item.as_object().expect("methods").keys() {
            let parameters = item[method]["parameters"].as_array().into_iter().flatten();
            let query = parameters.filter(|parameter| parameter["in"] == "query").map(|parameter| {
                let value = match parameter["name"].as_str().expect("a name") {
                    "follow" => "false",
                    "mode" => "reclaim",
                    _ => "7",
                };
                format!("{}={value}", parameter["name"].as_str().expect("a name"))
            });
            let query = query.collect::<Vec<_>>().join("&");
            for name in ["vm", "db"] {
                let parts = path.split('/').map(|part| if part.starts_with('{') { name } else { part });
                let target = parts.collect::<Vec<_>>().join("/");
                requests.push((method.to_uppercase(), target.clone()));
                if !query.is_empty() {
                    requests.push((method.to_uppercase(), format!("{target}?{query}")));
                }
            }
        }
    }
    requests
}

/// A worker that answers whatever it is asked until it is killed.
async fn play(mut worker: FakeWorker) {
    while let Some(message) = worker.inbox.recv().await {
        worker.note(message.clone());
        worker.book();
        match message {
            ToWorker::Recall { seq } => {
                worker.report.returned_total += worker.report.stock;
                worker.report.stock = 0;
                worker.answer(seq).await;
            }
            ToWorker::Pause { seq } => {
                worker.report.paused = true;
                worker.answer(seq).await;
            }
            ToWorker::Resume { seq } => {
                worker.report.paused = false;
                worker.answer(seq).await;
            }
            ToWorker::Query { seq } => worker.answer(seq).await,
            _ => {}
        }
    }
}

/// A controller with one VM, and the routes to it.
struct Stage {
    controller: Controller,
    router: axum::Router,
    stop: watch::Sender<bool>,
    places: Arc<Semaphore>,
    vm: (VmId, Arc<AtomicBool>),
}

impl Stage {
    async fn new() -> Self {
        let mut worker = FakeWorker::running(Setup::default()).await;
        worker.touch(400).await;
        let (stop, stopped) = watch::channel(false);
        let controller = worker.controller.clone();
        // No directory can be made there, so no process is ever started.
        let service = Arc::new(Service::new(Path::new("/dev/null/state"), "off", None));
        let router = crate::api::router(controller.clone(), Some(service), stopped);
        let vm = (worker.id, Arc::clone(&worker.killed));
        let places = Arc::new(Semaphore::new(1 << 20));
        tokio::spawn(play(worker));
        Self { controller, router, stop, places, vm }
    }

    /// Sends these bytes over a connection of its own, and returns what comes until it is closed. True as well when it was
    /// closed only because the server stopped: a follower waits for ever.
    async fn send(&self, bytes: &[u8], hang_up: bool) -> (Vec<u8>, bool) {
        let (mut near, far) = tokio::io::duplex(1 << 20);
        let place = Arc::clone(&self.places).try_acquire_owned().expect("a place");
        let service = connection::Service::new(self.router.clone(), place, self.stop.subscribe());
        let client = async move {
            // Whoever is answered before the end need not send the rest.
            let _ = near.write_all(bytes).await;
            if hang_up {
                let _ = near.shutdown().await;
            }
            let mut answer = Vec::new();
            let ended = tokio::time::timeout(LONG, near.read_to_end(&mut answer)).await;
            let stopped = ended.is_err();
            if stopped {
                self.stop.send_replace(true);
                let end = tokio::time::timeout(Duration::from_secs(3), near.read_to_end(&mut answer)).await;
                end.expect("it ends when the server stops").expect("in order");
            }
            (answer, stopped)
        };
        tokio::join!(converse(far, service, self.stop.subscribe()), client).1
    }

    /// Checks that nothing is wrong, and ends the worker if that was asked for.
    async fn check(&self) {
        let violations = self.controller.ask(|actor, reply| {
            answer(reply, Ok(actor.tree.check().iter().map(ToString::to_string).collect::<Vec<_>>()));
        });
        assert_eq!(violations.await.expect("the actor lives"), [] as [String; 0]);
        if self.vm.1.swap(false, Ordering::Relaxed) {
            self.controller.worker_died(self.vm.0, Death::Signal(9)).await;
            self.controller.heard(self.vm.0, FromLink::Closed).await;
        }
    }
}

/// A request, changed: everywhere, or in its path or its body alone, with a length that fits.
fn request(random: &mut Random, requests: &[(String, String)]) -> Vec<u8> {
    let (method, target) = random.pick(requests).clone();
    let (mut target, mut body) = (target.into_bytes(), random.pick(BODIES).as_bytes().to_vec());
    let other = random.pick(BODIES).as_bytes();
    let kind = random.below(8);
    if kind <= 2 {
        let another = random.pick(requests);
        mutate(&mut target, random, WORDS, another.1.as_bytes());
        target.retain(|byte| !byte.is_ascii_whitespace() && *byte != 0);
    }
    if matches!(kind, 1 | 3 | 4 | 5) {
        mutate(&mut body, random, WORDS, other);
    }
    let mut bytes = [method.as_bytes(), b" ", &target, b" HTTP/1.1\r\nhost: x\r\n"].concat();
    if random.once_in(4) {
        let half = body.len() / 2;
        let (head, tail) = body.split_at(half);
        let chunks = format!("transfer-encoding: chunked\r\n\r\n{:x}\r\n", head.len().max(1));
        bytes.extend(chunks.bytes());
        for part in [head, format!("\r\n{:x}\r\n", tail.len()).as_bytes(), tail, b"\r\n0\r\n\r\n"] {
            bytes.extend(part);
        }
    } else {
        bytes.extend(format!("content-length: {}\r\n\r\n", body.len()).bytes());
        bytes.extend(&body);
    }
    if kind >= 6 {
        mutate(&mut bytes, random, WORDS, other);
    }
    if random.once_in(10) {
        let again = bytes.clone();
        bytes.extend(again);
    }
    bytes
}

/// What was found once, and what is near it.
fn found() -> Vec<Vec<u8>> {
    let put = |body: &str| {
        format!("PUT /vms/db HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
    };
    vec![
        // A list for a structure whose keys all have defaults.
        put(r#"{"kernel": "/proc/self/exe", "memory": {"size_bytes": 67108864}, "oom": []}"#),
        // A size near the end of all numbers.
        put(r#"{"kernel": "/proc/self/exe", "memory": {"size_bytes": 18446744073709547520}}"#),
        b"GET /vms/vm HTTP/1.0\r\n\r\n".to_vec(),
        b"GET /vms/%ff HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        b"GET http://x/vms HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        b"GET ?x HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
    ]
}

#[tokio::test(start_paused = true)]
async fn every_input_is_answered_or_its_connection_is_closed() {
    let (requests, found) = (requests(), found());
    let count = inputs(3000);
    let (mut done, mut refused, mut closed) = (0, 0, 0);
    let mut stage = Stage::new().await;
    let made = (0..count).map(|number| (seed().wrapping_add(number), None));
    for (seed, found) in found.into_iter().map(|bytes| (0, Some(bytes))).chain(made) {
        if seed % ACT == ACT - 1 {
            stage = Stage::new().await;
        }
        let mut random = Random::new(seed);
        let bytes = found.unwrap_or_else(|| request(&mut random, &requests));
        let text = String::from_utf8_lossy(&bytes);
        let _case = Case { kind: "http", seed, input: &text };
        let (answer, stopped) = stage.send(&bytes, random.once_in(8)).await;
        match answer.get(..12) {
            None => closed += 1,
            Some(head) => {
                let digits = head.strip_prefix(b"HTTP/1.").and_then(|rest| std::str::from_utf8(rest.get(2..)?).ok());
                let status = digits.and_then(|digits| digits.parse().ok());
                let status: u16 = status.unwrap_or_else(|| panic!("no HTTP: {}", String::from_utf8_lossy(&answer)));
                assert!(status < 500 || status == 503, "{}", String::from_utf8_lossy(&answer));
                if status < 400 { done += 1 } else { refused += 1 }
            }
        }
        stage.check().await;
        if stopped {
            stage = Stage::new().await;
        }
    }
    println!("FUZZ http inputs={count} done={done} refused={refused} closed={closed}");
    assert!(count < 1000 || [done, refused, closed].iter().all(|n| *n > count / 100), "inputs of one kind only");
}

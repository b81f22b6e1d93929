//! The controller as its clients see it: one call, its answer, and what is wrong with that.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ballast_tests::{deadline, http_within, wait_until};
use serde_json::Value;

/// Longest time from a request to its answer, beside what the request itself asks to wait.
const BOUND_S: u64 = 60;

/// A request.
#[derive(Clone, Debug)]
pub struct Call {
    /// The method.
    pub method: &'static str,
    /// The route as the OpenAPI document names it.
    pub route: &'static str,
    /// Path and query.
    pub path: String,
    /// The body.
    pub body: Option<Value>,
    /// What it asks to wait.
    pub wait: Duration,
}

impl Call {
    /// A request without a body.
    pub fn new(method: &'static str, route: &'static str, path: impl Into<String>) -> Self {
        Self { method, route, path: path.into(), body: None, wait: Duration::ZERO }
    }

    /// With a body.
    pub fn body(mut self, body: Value) -> Self {
        self.body = Some(body);
        self
    }

    /// With the time that it asks to wait.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }
}

/// How often each route gave each status, and the slowest answer.
#[derive(Debug, Default)]
pub struct Tally {
    /// By method, route and status.
    pub answers: BTreeMap<(&'static str, &'static str, u16), u64>,
    /// The slowest answer, less what was asked to wait.
    pub slowest: Duration,
    /// Of what.
    pub slowest_of: String,
}

/// The controller under test.
#[derive(Debug)]
pub struct World {
    socket: PathBuf,
    /// The OpenAPI document.
    document: Value,
    /// How often the controller was ended and started; odd while there is none.
    lives: AtomicU64,
    tally: Mutex<Tally>,
    failures: Mutex<Vec<String>>,
}

impl World {
    /// The controller at `socket`, which answers already.
    ///
    /// # Panics
    /// When it has no OpenAPI document.
    pub fn new(socket: PathBuf) -> Self {
        let (status, text) =
            http_within(deadline(BOUND_S), &socket, "GET", "/openapi.json", None).expect("the controller answers");
        assert_eq!(status, 200, "/openapi.json");
        Self {
            socket,
            document: serde_json::from_str(&text).expect("JSON"),
            lives: AtomicU64::new(0),
            tally: Mutex::default(),
            failures: Mutex::default(),
        }
    }

    /// True when the controller has this route.
    pub fn has(&self, method: &str, route: &str) -> bool {
        self.document["paths"][route].get(method.to_lowercase()).is_some()
    }

    fn documented(&self, call: &Call, status: u16) -> bool {
        let responses = &self.document["paths"][call.route][call.method.to_lowercase()]["responses"];
        responses.get(status.to_string()).is_some()
    }

    /// Notes that the controller is about to end, or that it answers again.
    pub fn next_life(&self) {
        self.lives.fetch_add(1, Ordering::SeqCst);
    }

    /// Notes something that must not be.
    pub fn fail(&self, what: impl Into<String>) {
        let what = what.into();
        eprintln!("soak: {what}");
        self.failures.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(what);
    }

    /// How much has failed.
    pub fn failures(&self) -> Vec<String> {
        self.failures.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// What was asked and answered so far.
    pub fn tally<T>(&self, look: impl FnOnce(&Tally) -> T) -> T {
        look(&self.tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }

    /// Makes a request, and checks that the answer is one that the document has, and comes in time. Nothing when there
    /// was no controller, or it ended meanwhile.
    pub fn call(&self, call: &Call) -> Option<(u16, Value)> {
        let life = self.lives.load(Ordering::SeqCst);
        if life % 2 == 1 {
            wait_until("the controller is back", 60, || (self.lives.load(Ordering::SeqCst) != life).then_some(()));
            return None;
        }
        let bound = deadline(BOUND_S) + call.wait;
        let body = call.body.as_ref().map(Value::to_string);
        let start = Instant::now();
        let answer = http_within(bound, &self.socket, call.method, &call.path, body.as_deref());
        let (status, text) = match answer {
            Ok(answer) => answer,
            Err(_) if self.lives.load(Ordering::SeqCst) != life => return None,
            Err(error) => {
                self.fail(format!("{} {}: {error} after {:?}", call.method, call.path, start.elapsed()));
                return None;
            }
        };
        let took = start.elapsed().saturating_sub(call.wait);
        {
            let mut tally = self.tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            *tally.answers.entry((call.method, call.route, status)).or_default() += 1;
            if took > tally.slowest {
                tally.slowest = took;
                tally.slowest_of = format!("{} {}", call.method, call.route);
            }
        }
        let value = serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.clone()));
        if !self.documented(call, status) {
            self.fail(format!("{} {} {:?}: status {status} is not documented: {text}", call.method, call.path, body));
        }
        if status >= 400 && !(value["code"].is_string() && value["message"].is_string()) {
            self.fail(format!("{} {}: status {status} without code and message: {text}", call.method, call.path));
        }
        Some((status, value))
    }

    /// A `GET` that must be answered with 200. Nothing when it is not, which has been noted.
    pub fn get(&self, route: &'static str, path: &str) -> Option<Value> {
        let (status, value) = self.call(&Call::new("GET", route, path))?;
        (status == 200).then_some(value)
    }
}

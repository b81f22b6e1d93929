//! Helpers of the integration tests: a VM of the real program, its console, its control socket, and what the host says
//! about its memory.
//!
//! Beside it, [`walk`] has random steps of a guest with a model of its contents, [`rules`] plays lines of the table of rules, and
//! [`semantics`] finds out which test proves which rule.
//!
//! Nothing here sleeps for a fixed time: everything waits for a condition with a deadline ([`wait_until`]). Deadlines are
//! ten times as long where `BALLAST_SLOW=1` says that the machine is nested.

pub mod cold;
pub mod hog;
pub mod linux;
pub mod openmetrics;
pub mod random;
pub mod rules;
pub mod semantics;
pub mod serve;
pub mod small;
pub mod walk;

use std::ffi::{CStr, CString};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use memcg_core::units::{SizeArg, parse_size};
use serde_json::Value;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// A deadline of `seconds` on an ordinary machine, ten times that in the nested rig.
pub fn deadline(seconds: u64) -> Duration {
    let slow = std::env::var("BALLAST_SLOW").is_ok_and(|v| v == "1");
    Duration::from_secs(seconds * if slow { 10 } else { 1 })
}

/// Waits until `condition` gives a value.
///
/// # Panics
/// When it has not after `seconds` (see [`deadline`]); says what was waited for.
pub fn wait_until<T>(what: &str, seconds: u64, mut condition: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + deadline(seconds);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < end, "not within {:?}: {what}", deadline(seconds));
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The `ballast` program that these tests belong to.
///
/// # Panics
/// When it has not been built.
pub fn ballast() -> PathBuf {
    if let Some(path) = std::env::var_os("BALLAST_BIN") {
        return path.into();
    }
    let test = std::env::current_exe().expect("a test has a path");
    let built = test.ancestors().skip(1).map(|dir| dir.join("ballast")).find(|p| p.is_file());
    built.expect("the program is built first: cargo build -p ballast")
}

/// A file that `scripts/guest` built, by its name in the cache: `payload.bin`, `vmlinux`, `vmlinuz`, `initrd.img`.
///
/// # Panics
/// When it has not been built.
pub fn guest_file(name: &str) -> PathBuf {
    let variable = |key: &str| std::env::var_os(key).map(PathBuf::from);
    let cache = || Some(variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?.join("ballast"));
    let guests = variable("BALLAST_GUEST").or_else(|| Some(variable("BALLAST_CACHE").or_else(cache)?.join("guest")));
    let path = guests.unwrap_or_default().join(name);
    assert!(path.is_file(), "{} has not been built: run scripts/guest", path.display());
    path
}

/// The freestanding payload.
///
/// # Panics
/// When it has not been built.
pub fn payload() -> PathBuf {
    guest_file("payload.bin")
}

/// A directory in which a swap file can be made. It is beside this program, which is on a disk, while `/tmp` may be in memory.
///
/// # Errors
/// Why there is none, for `SKIP`.
fn swap_directory() -> Result<tempfile::TempDir, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let beside = program.parent().ok_or("this program is nowhere")?;
    let directory = tempfile::tempdir_in(beside).map_err(|error| error.to_string())?;
    match ballast::controller::config::swap_file(directory.path(), 1) {
        Ok(_) => Ok(directory),
        Err(refusal) => Err(refusal.message.replace(' ', "-")),
    }
}

/// [`swap_directory`] for a test with guests; `None`, with the reason printed, where one of the two cannot be had.
pub fn swap_or_skip(test: &str) -> Option<tempfile::TempDir> {
    if skipped(test) {
        return None;
    }
    swap_directory().map_err(|reason| skip(test, reason)).ok()
}

/// The directory of the cgroup that limits the memory of a process, and the name of the file that has the limit. `process` is
/// its name in `/proc`.
pub fn memory_cgroup(process: &str) -> Option<(PathBuf, &'static str)> {
    let text = std::fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    let path = |prefix: &str| {
        let line = text.lines().find(|line| line.contains(prefix))?;
        line.split_once(prefix).map(|(_, path)| path.trim_start_matches('/').to_owned())
    };
    Some(match path(":memory:") {
        Some(path) => (PathBuf::from("/sys/fs/cgroup/memory").join(path), "memory.limit_in_bytes"),
        None => (PathBuf::from("/sys/fs/cgroup").join(path("0::")?), "memory.max"),
    })
}

/// The limit in bytes that a refused VM's message names as enough.
///
/// # Panics
/// When it names none.
pub fn enough(message: &str) -> u64 {
    let named = message.split_once("raise it to ").and_then(|(_, rest)| rest.split(',').next());
    match named.map(parse_size) {
        Some(Ok(SizeArg::Bytes(bytes))) => bytes,
        _ => panic!("no limit is named: {message}"),
    }
}

/// A limit that pays for what the message of a refused VM says that it costs beside its pages, and for little more: less than
/// its kernel needs.
///
/// # Panics
/// When it does not say so in MiB.
pub fn bare(message: &str) -> u64 {
    let costs = message.split_once(" needs ").and_then(|(_, rest)| rest.split_once("M beside its pages"));
    let mib: f64 = costs.and_then(|(mib, _)| mib.parse().ok()).unwrap_or_else(|| panic!("no cost is named: {message}"));
    ((mib + 0.1) * 256.0) as u64 * PAGE
}

/// Says that a test, or a part of one, proves nothing here, and why.
pub fn skip(test: &str, reason: impl std::fmt::Display) {
    println!("SKIP {test} reason={reason}");
}

/// True, with the reason printed, when this host cannot run guests.
pub fn skipped(test: &str) -> bool {
    missing_on_host().inspect(|reason| skip(test, reason)).is_some()
}

/// What stands in the way of guests on this host, if anything: no KVM, or no userfaultfd.
fn missing_on_host() -> Option<String> {
    for device in ["/dev/kvm", "/dev/userfaultfd"] {
        if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open(device) {
            return Some(format!("{device} cannot be opened: {e}"));
        }
    }
    None
}

/// A VM that is about to be started with `ballast run`.
#[derive(Debug)]
pub struct Builder {
    name: String,
    kernel: PathBuf,
    arguments: Vec<String>,
    env: Vec<(String, String)>,
    hidden: Option<CString>,
}

impl Builder {
    /// Adds an argument of `ballast run`.
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds an argument with its value.
    pub fn option(self, name: &str, value: impl Into<String>) -> Self {
        self.arg(name).arg(value)
    }

    /// `--memory`, as on the command line; with a `max` and no word about swap there is none. Most tests of limits are about
    /// what happens where nothing can be evicted.
    pub fn memory(self, value: &str) -> Self {
        let swap = if value.contains("max=") && !value.contains("swap=") { ",swap=0" } else { "" };
        self.option("--memory", format!("{value}{swap}"))
    }

    /// `--cmdline`: for the payload, its commands.
    pub fn cmdline(self, value: &str) -> Self {
        self.option("--cmdline", value)
    }

    /// Another kernel than the payload.
    pub fn kernel(mut self, kernel: &Path) -> Self {
        self.kernel = kernel.to_owned();
        self
    }

    /// Sets an environment variable of the program.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Puts `/dev/null` in the place of a file, for this VM alone. Needs to be root.
    ///
    /// # Panics
    /// When the path has a NUL in it.
    pub fn without(mut self, path: &str) -> Self {
        self.hidden = Some(CString::new(path).expect("a path"));
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// When the process cannot be started.
    pub fn start(self) -> TestVm {
        let directory = tempfile::Builder::new().prefix("bt").tempdir().expect("a temporary directory");
        let socket = directory.path().join(format!("{}.sock", self.name));
        let mut command = Command::new(ballast());
        command.args(["run", "--name", &self.name, "--kernel"]).arg(&self.kernel);
        command.arg("--socket").arg(&socket).arg("--debug-port").args(&self.arguments).envs(self.env);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(path) = self.hidden {
            // SAFETY: `hide` only makes system calls, with memory that it was given.
            unsafe { command.pre_exec(move || hide(&path)) };
        }
        let mut child = command.spawn().expect("ballast starts");
        let stdin = child.stdin.take();
        let console = lines(child.stdout.take().expect("piped"), std::env::var_os("BALLAST_TEST_ECHO").is_some());
        let errors = lines(child.stderr.take().expect("piped"), true);
        TestVm { name: self.name, child, stdin, console, errors, socket, _directory: directory }
    }
}

/// Puts `/dev/null` over a file in a mount namespace of the calling process's own.
fn hide(path: &CStr) -> std::io::Result<()> {
    let (none, recursive) = (std::ptr::null(), libc::MS_REC | libc::MS_PRIVATE);
    // SAFETY: all strings are NUL-terminated; no data is passed.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(none, c"/".as_ptr(), none, recursive, none.cast()) == 0
            && libc::mount(c"/dev/null".as_ptr(), path.as_ptr(), none, libc::MS_BIND, none.cast()) == 0
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Lines of a stream, read by a thread of their own so that the writer never waits.
pub fn lines(stream: impl Read + Send + 'static, echo: bool) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if echo {
                eprintln!("| {text}");
            }
            if sender.send(text).is_err() {
                return;
            }
            line.clear();
        }
    });
    receiver
}

/// A VM in the foreground of its own `ballast run`. Killed when dropped.
#[derive(Debug)]
pub struct TestVm {
    /// Its name.
    pub name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    console: Receiver<String>,
    errors: Receiver<String>,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl TestVm {
    /// A VM called `name` that runs the payload.
    pub fn builder(name: &str) -> Builder {
        Builder { name: name.to_owned(), kernel: payload(), arguments: Vec::new(), env: Vec::new(), hidden: None }
    }

    /// Process id of `ballast run`.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The control socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The next line of the console.
    ///
    /// # Panics
    /// When none comes within `seconds`, or the console ends.
    pub fn line(&self, seconds: u64) -> String {
        match self.console.recv_timeout(deadline(seconds)) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("{}: no console line within {:?}", self.name, deadline(seconds)),
            Err(RecvTimeoutError::Disconnected) => panic!("{}: the console has ended", self.name),
        }
    }

    /// The next console line if there is one now.
    pub fn try_line(&self) -> Option<String> {
        self.console.try_recv().ok()
    }

    /// Reads console lines until one starts with `prefix`, and returns it.
    ///
    /// # Panics
    /// When none does within `seconds`.
    pub fn expect(&self, prefix: &str, seconds: u64) -> String {
        let end = Instant::now() + deadline(seconds);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match self.console.recv_timeout(left) {
                Ok(line) if line.starts_with(prefix) => return line,
                Ok(_) => {}
                Err(e) => panic!("{}: no line `{prefix}…` within {:?} ({e})", self.name, deadline(seconds)),
            }
        }
    }

    /// Types a line on the console without waiting for an answer.
    ///
    /// # Panics
    /// When the console is closed.
    pub fn send(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("the console is open");
        stdin.write_all(format!("{line}\n").as_bytes()).and_then(|()| stdin.flush()).expect("the console takes input");
    }

    /// Types text as fast as it is taken, from a thread of its own, and closes the console's input.
    ///
    /// # Panics
    /// When the console is closed.
    pub fn typist(&mut self, text: String) -> std::thread::JoinHandle<()> {
        let mut stdin = self.stdin.take().expect("the console is open");
        std::thread::spawn(move || stdin.write_all(text.as_bytes()).expect("the console takes input"))
    }

    /// Types a command and returns its final line, which starts with `OK` or `ERR`.
    ///
    /// # Panics
    /// When neither comes within `seconds`.
    pub fn command(&mut self, line: &str, seconds: u64) -> String {
        self.send(line);
        let end = Instant::now() + deadline(seconds);
        loop {
            match self.console.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(answer) if answer.starts_with("OK") || answer.starts_with("ERR") => return answer,
                Ok(_) => {}
                Err(e) => panic!("{}: no answer to `{line}` within {:?} ({e})", self.name, deadline(seconds)),
            }
        }
    }

    /// One HTTP request over the control socket: status and body.
    ///
    /// # Panics
    /// When the socket does not answer.
    pub fn http(&self, method: &str, path: &str, body: Option<&str>) -> (u16, String) {
        http(&self.socket, method, path, body).unwrap_or_else(|e| panic!("{}: {method} {path}: {e}", self.name))
    }

    /// The VM as `GET /vms/{name}` shows it.
    ///
    /// # Panics
    /// When the answer is not 200 with JSON.
    pub fn show(&self) -> Value {
        let (status, body) = self.http("GET", &format!("/vms/{}", self.name), None);
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).expect("JSON")
    }

    /// The VM as [`TestVm::show`] has it, if the control socket answers yet.
    pub fn try_show(&self) -> Option<Value> {
        let (status, body) = http(&self.socket, "GET", &format!("/vms/{}", self.name), None).ok()?;
        serde_json::from_str(&body).ok().filter(|_| status == 200)
    }

    /// Waits until the control socket answers and the VM is in `state`.
    ///
    /// # Panics
    /// When it is not in time.
    pub fn wait_state(&self, state: &str, seconds: u64) -> Value {
        wait_until(&format!("{} is {state}", self.name), seconds, || self.try_show().filter(|vm| vm["state"] == state))
    }

    /// Changes limits: `PATCH /vms/{name}/memory`.
    pub fn patch(&self, query: &str, limits: &Value) -> (u16, Value) {
        let path = format!("/vms/{}/memory{query}", self.name);
        let (status, body) = self.http("PATCH", &path, Some(&limits.to_string()));
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    /// `POST /vms/{name}/{verb}`.
    pub fn post(&self, verb: &str) -> (u16, Value) {
        let (status, body) = self.http("POST", &format!("/vms/{}/{verb}", self.name), None);
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    /// All events so far.
    ///
    /// # Panics
    /// When the answer is not a list of JSON objects, one a line.
    pub fn events(&self) -> Vec<Value> {
        let (status, body) = self.http("GET", "/events?since=0&follow=false", None);
        assert_eq!(status, 200, "{body}");
        body.lines().map(|line| serde_json::from_str(line).expect("an event is JSON")).collect()
    }

    /// Waits for the end of `ballast run`.
    ///
    /// # Panics
    /// When it does not end within `seconds`.
    pub fn wait(&mut self, seconds: u64) -> ExitStatus {
        wait_until(&format!("{} ends", self.name), seconds, || self.child.try_wait().expect("our child"))
    }

    /// What `ballast run` has written to stderr and nobody has read yet.
    pub fn errors(&self) -> String {
        self.errors.iter().collect::<Vec<_>>().join("\n")
    }

    /// Sends a signal to `ballast run`.
    pub fn signal(&self, signal: i32) {
        // SAFETY: kill takes numbers; the child has not been reaped, so the id is its own.
        unsafe { libc::kill(self.child.id() as i32, signal) };
    }

    /// Closes the console's input.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }
}

impl Drop for TestVm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer over HTTP.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Status line and headers.
    pub head: String,
    /// The body; what is no UTF-8 is replaced.
    pub body: String,
}

impl Answer {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let headers = self.head.lines().filter_map(|line| line.split_once(':'));
        headers.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim()).next()
    }
}

/// One HTTP/1.1 request over a unix socket: status and body.
///
/// # Errors
/// When the socket does not answer with HTTP.
pub fn http(socket: &Path, method: &str, path: &str, body: Option<&str>) -> std::io::Result<(u16, String)> {
    exchange(deadline(120), socket, method, path, body).map(|answer| (answer.status, answer.body))
}

/// The same with the longest time that the answer may let one wait.
///
/// # Errors
/// As [`http`]; also when nothing is heard for so long.
pub fn http_within(
    bound: Duration,
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> std::io::Result<(u16, String)> {
    exchange(bound, socket, method, path, body).map(|answer| (answer.status, answer.body))
}

/// One HTTP/1.1 request over a unix socket, with the longest time that the answer may let one wait.
///
/// # Errors
/// When the socket does not answer with HTTP in time.
pub fn exchange(
    bound: Duration,
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> std::io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(bound))?;
    let body = body.unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: ballast\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    // Who is refused for the head may find the other end closed before all of the body is sent.
    let sent = stream.write_all([head.as_bytes(), body.as_bytes()].concat().as_slice());
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if answer.is_empty() || error.kind() != std::io::ErrorKind::ConnectionReset => return Err(error),
        _ if answer.is_empty() => sent?,
        _ => {}
    }
    parse_http(&answer).ok_or_else(|| std::io::Error::other("the answer is not HTTP"))
}

fn parse_http(answer: &[u8]) -> Option<Answer> {
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&answer[..end]).ok()?.to_owned();
    let status = head.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let raw = &answer[end + 4..];
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { dechunk(raw)? } else { raw.to_vec() };
    Some(Answer { status, head, body: String::from_utf8_lossy(&body).into_owned() })
}

fn dechunk(mut raw: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = raw.windows(2).position(|w| w == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&raw[..end]).ok()?.trim(), 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(raw.get(end + 2..end + 2 + size)?);
        raw = raw.get(end + 4 + size..)?;
    }
}

/// In a page's entry of pagemap: it is in memory, or swapped.
const PRESENT_OR_SWAPPED: u64 = 3 << 62;

/// Resident pages of a VM's RAM as the host's page tables have them: `PRESENT` or swapped, over every page of every slot
/// and of its stage.
///
/// # Panics
/// When the VM's worker cannot be looked into (another user's, or gone).
pub fn resident_pages(vm: &Value) -> u64 {
    ram_with(vm, PRESENT_OR_SWAPPED)
}

/// Pages of a VM's RAM that have memory of their own: not those that were only read, which are all the kernel's one page
/// of zeroes.
///
/// # Panics
/// As [`resident_pages`].
pub fn written_pages(vm: &Value) -> u64 {
    const MAPPED_EXCLUSIVELY: u64 = 1 << 56;
    ram_with(vm, MAPPED_EXCLUSIVELY)
}

/// Resident pages of the pool of huge pages that are zeroed ahead of a walk, as [`resident_pages`] counts those of RAM.
///
/// # Panics
/// As [`resident_pages`].
pub fn pool_pages(vm: &Value) -> u64 {
    pages_with(vm, number(vm, "pool.hva"), number(vm, "pool.bytes"), PRESENT_OR_SWAPPED)
}

/// Resident pages of the store of a VM's evicted pages, as [`resident_pages`] counts those of its RAM.
///
/// # Panics
/// As [`resident_pages`].
pub fn store_pages(vm: &Value) -> u64 {
    pages_with(vm, number(vm, "store.hva"), number(vm, "store.bytes"), PRESENT_OR_SWAPPED)
}

/// Pages of RAM, in the guest's sight or in the stage, whose entry in the worker's pagemap has any of these bits.
fn ram_with(vm: &Value, bits: u64) -> u64 {
    let slots = vm["ram"].as_array().expect("RAM slots").iter();
    let areas = slots.flat_map(|slot| ["hva", "stage_hva"].map(|key| (number(slot, key), number(slot, "bytes"))));
    areas.map(|(start, bytes)| pages_with(vm, start, bytes, bits)).sum()
}

/// Of the pages of `bytes` bytes at `start` in the worker, those whose entry in its pagemap has any of these bits.
fn pages_with(vm: &Value, start: u64, bytes: u64, bits: u64) -> u64 {
    pagemap(vm, start, bytes).iter().filter(|entry| **entry & bits != 0).count() as u64
}

/// What the pagemap of a VM's worker has for each page of `bytes` bytes at `start`.
///
/// # Panics
/// As [`resident_pages`]; also when that is not mapped.
pub fn pagemap(vm: &Value, start: u64, bytes: u64) -> Vec<u64> {
    let pid = vm["pid"].as_u64().expect("the VM has a worker");
    let pagemap = std::fs::File::open(format!("/proc/{pid}/pagemap")).expect("pagemap of the worker");
    let mut entries = vec![0u8; (bytes / PAGE * 8) as usize];
    pagemap.read_exact_at(&mut entries, start / PAGE * 8).expect("pagemap covers what is mapped");
    entries.chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().expect("eight bytes"))).collect()
}

/// A number out of nested JSON, by path.
///
/// # Panics
/// When it is not there.
pub fn number(value: &Value, path: &str) -> u64 {
    path.split('.').fold(value, |v, key| &v[key]).as_u64().unwrap_or_else(|| panic!("no number {path} in {value}"))
}

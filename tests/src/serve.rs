//! A `ballast serve` of its own for a test: started in a temporary directory, asked over HTTP or by verbs, killed, started
//! again, and cleared away at the end.

use std::ffi::CStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Instant;

use ballast::worker::protocol::VERSION;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};
use serde_json::{Value, json};

use crate::random::Random;
use crate::small::SmallHost;
use crate::{ballast, deadline, hide, http, number, payload, wait_until};

/// A `ballast serve` with a directory of its own. When dropped, it and its workers are killed.
#[derive(Debug)]
pub struct Serve {
    child: Child,
    place: tempfile::TempDir,
    words: Vec<String>,
    /// Where it lives; removed when it is gone.
    host: Option<SmallHost>,
}

impl Serve {
    /// Starts one with these options and waits until it answers.
    ///
    /// # Panics
    /// When it does not.
    pub fn start(words: &[&str]) -> Self {
        Self::launch(words, None)
    }

    /// The same on a small host.
    ///
    /// # Panics
    /// When it does not answer, or may not live there.
    pub fn start_on(host: SmallHost, words: &[&str]) -> Self {
        Self::launch(words, Some(host))
    }

    fn launch(words: &[&str], host: Option<SmallHost>) -> Self {
        let place = tempfile::Builder::new().prefix("bs").tempdir().expect("a temporary directory");
        let words: Vec<_> = words.iter().map(|&word| word.to_owned()).collect();
        let child = launch(&words, place.path(), host.as_ref());
        let serve = Self { child, place, words, host };
        serve.wait_ready();
        serve
    }

    /// Starts it once more in the same place, with the same options, after it has ended.
    ///
    /// # Panics
    /// When it has not ended, or does not answer.
    pub fn again(&mut self) {
        assert!(self.child.try_wait().expect("our child").is_some(), "the last one has ended");
        self.child = launch(&self.words, self.place.path(), self.host.as_ref());
        self.wait_ready();
    }

    /// [`Self::again`] with other options.
    ///
    /// # Panics
    /// As there.
    pub fn again_with(&mut self, words: &[&str]) {
        self.words = words.iter().map(|&word| word.to_owned()).collect();
        self.again();
    }

    fn wait_ready(&self) {
        wait_until("serve answers", 60, || http(&self.socket(), "GET", "/host", None).ok());
    }

    /// Process id of the controller.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The directory that holds its socket and its state.
    pub fn place(&self) -> &Path {
        self.place.path()
    }

    /// The small host that it lives on, if it does.
    pub fn host(&self) -> Option<&SmallHost> {
        self.host.as_ref()
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.place.path().join("ballast.sock")
    }

    /// The directory of its state: the journal, and one directory a VM.
    pub fn state(&self) -> PathBuf {
        self.place.path().join("ballast.d")
    }

    /// A verb against this controller.
    ///
    /// # Panics
    /// When the program cannot be started.
    pub fn verb(&self, words: &[&str]) -> Output {
        program(words, self.place.path()).output().expect("the program runs")
    }

    /// A request: status and JSON, `null` when the answer is not JSON.
    ///
    /// # Panics
    /// When nobody answers.
    pub fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let (status, body) = self.raw(method, path, body.map(Value::to_string).as_deref());
        (status, serde_json::from_str(&body).unwrap_or(Value::Null))
    }

    /// A request: status and text.
    ///
    /// # Panics
    /// When nobody answers.
    pub fn raw(&self, method: &str, path: &str, body: Option<&str>) -> (u16, String) {
        http(&self.socket(), method, path, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// All events of this controller's life so far.
    ///
    /// # Panics
    /// When the answer is not a list of JSON objects, one a line.
    pub fn events(&self) -> Vec<Value> {
        let (status, text) = self.raw("GET", "/events?since=0&follow=false", None);
        assert_eq!(status, 200, "{text}");
        text.lines().map(|line| serde_json::from_str(line).expect("an event is JSON")).collect()
    }

    /// Those of one kind, the oldest first.
    ///
    /// # Panics
    /// See [`Self::events`].
    pub fn told(&self, kind: &str) -> Vec<Value> {
        self.events().into_iter().filter(|event| event["event"] == kind).collect()
    }

    /// The VM as `GET /vms/{name}` shows it.
    ///
    /// # Panics
    /// When there is none.
    pub fn show(&self, name: &str) -> Value {
        let (status, view) = self.ask("GET", &format!("/vms/{name}"), None);
        assert_eq!(status, 200, "{view}");
        view
    }

    /// Waits until a VM is in `state`.
    ///
    /// # Panics
    /// When it is not in time.
    pub fn wait_state(&self, name: &str, state: &str) -> Value {
        wait_until(&format!("{name} is {state}"), 10, || Some(self.show(name)).filter(|vm| vm["state"] == state))
    }

    /// Makes a VM that must run then: [`shell`].
    ///
    /// # Panics
    /// When it does not.
    pub fn create(&self, name: &str) -> Value {
        self.create_with(name, &shell())
    }

    /// Makes a VM that must run then.
    ///
    /// # Panics
    /// When it does not.
    pub fn create_with(&self, name: &str, config: &Value) -> Value {
        let (status, view) = self.ask("PUT", &format!("/vms/{name}"), Some(config));
        assert_eq!(status, 201, "{view}");
        assert_eq!(view["state"], "running");
        view
    }

    /// Sends a signal to the controller.
    pub fn signal(&self, signal: i32) {
        kill(self.child.id(), signal);
    }

    /// Waits for the end of the controller.
    ///
    /// # Panics
    /// When it does not end within `seconds`.
    pub fn wait(&mut self, seconds: u64) -> ExitStatus {
        wait_until("serve ends", seconds, || self.child.try_wait().expect("our child"))
    }

    /// Names of all VMs, in order.
    ///
    /// # Panics
    /// When the answer is not a list of VMs.
    pub fn names(&self) -> Vec<String> {
        let (_, list) = self.ask("GET", "/vms", None);
        let names = list.as_array().expect("a list").iter().map(|vm| vm["name"].as_str().expect("a name").to_owned());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }

    /// What is in its directory.
    ///
    /// # Panics
    /// When that cannot be read.
    pub fn left(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.place.path()).expect("readable").flatten().map(|entry| entry.path()).collect()
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        end_workers(&self.state());
    }
}

/// Kills the workers that a controller has left in its directory: they may outlive it.
pub fn end_workers(state: &Path) {
    for vm in std::fs::read_dir(state).into_iter().flatten().flatten() {
        if let Some(pid) = listener(&vm.path().join("worker")) {
            kill(pid, libc::SIGKILL);
        }
    }
}

fn launch(words: &[String], place: &Path, host: Option<&SmallHost>) -> Child {
    let mut command = program(&["serve"], place);
    if let Some(mut door) = host.map(|host| File::options().write(true).open(host.door()).expect("a cgroup")) {
        // SAFETY: writing to a descriptor is one system call, with memory that there was before.
        unsafe { command.pre_exec(move || door.write_all(b"0")) };
    }
    if let Some(path) = host.and_then(SmallHost::hidden).map(CStr::to_owned) {
        // SAFETY: `hide` only makes system calls, with memory that it was given.
        unsafe { command.pre_exec(move || hide(&path)) };
        command.stderr(File::create(place.join("log")).expect("a file"));
    }
    command.args(words).spawn().expect("ballast starts")
}

/// The program with words that reach a controller in `place`.
pub fn program(words: &[&str], place: &Path) -> Command {
    let mut command = Command::new(ballast());
    command.args(words).env("BALLAST_SOCKET", place).env_remove("BALLAST_LOG").stdin(Stdio::null());
    command
}

/// The process that listens at a worker's socket.
fn listener(path: &Path) -> Option<u32> {
    let address = SocketAddrUnix::new(path).ok()?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).ok()?;
    rustix::net::connect(&socket, &address).ok()?;
    let peer = sockopt::socket_peercred(&socket).ok()?;
    u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
}

/// Sends a signal to a process that this test has caused.
pub fn kill(pid: u32, signal: i32) {
    // SAFETY: kill takes numbers; the process is one that this test has caused.
    unsafe { libc::kill(pid as i32, signal) };
}

/// A worker's end of the channel to its controller: a copy of the descriptor, taken out of the process as a debugger
/// would. Whoever has broken into a worker has this, and nothing else that leads to the controller. `None` when the worker
/// ends meanwhile, has no controller, or where the kernel does not let this user look into its own processes.
pub fn channel_of(worker: u32) -> Option<OwnedFd> {
    let process = i32::try_from(worker).ok().and_then(Pid::from_raw)?;
    let pidfd = rustix::process::pidfd_open(process, PidfdFlags::empty()).ok()?;
    let descriptors = std::fs::read_dir(format!("/proc/{worker}/fd")).ok()?;
    let numbers = descriptors.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let sockets = numbers.filter_map(|number| {
        let link = std::fs::read_link(format!("/proc/{worker}/fd/{number}")).ok()?;
        link.to_string_lossy().starts_with("socket:").then_some(())?;
        match rustix::process::pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) {
            Ok(copy) => Some(copy),
            Err(error) => {
                eprintln!("descriptor {number} of process {worker} cannot be copied: {error}");
                None
            }
        }
    });
    let mut channels = sockets.filter(|socket| {
        sockopt::socket_type(socket).is_ok_and(|kind| kind == SocketType::SEQPACKET)
            && sockopt::socket_acceptconn(socket).is_ok_and(|listens| !listens)
    });
    channels.next()
}

/// Sends packets of nonsense to the controller in the place of a worker, until that is gone or they are not taken any more;
/// gives their number. The first has no version that anybody speaks; half of the others have the right one.
pub fn spew(worker: u32, random: &mut Random) -> u32 {
    let Some(channel) = channel_of(worker) else {
        return 0;
    };
    let mut sent = 0;
    for round in 0..100_000 {
        if round % 256 == 255 && !is_alive(worker) {
            break;
        }
        let mut packet: Vec<u8> = (0..1 + random.below(1024)).map(|_| random.below(256) as u8).collect();
        packet[0] = if round % 2 == 0 { 0xff } else { VERSION };
        match rustix::net::send(&channel, &packet, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(_) => sent += 1,
            Err(Errno::AGAIN) => {}
            Err(_) => break,
        }
    }
    sent
}

/// Process id of the worker of a VM that is shown.
///
/// # Panics
/// When none is in the view.
pub fn pid(view: &Value) -> u32 {
    u32::try_from(number(view, "pid")).expect("a process id")
}

/// True while a process is there and is no zombie.
pub fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

/// A guest of 64 MiB without swap that waits for words nobody types.
pub fn shell() -> Value {
    json!({
        "kernel": payload(), "cmdline": "shell", "debug_port": true,
        "memory": { "size_bytes": 64 << 20, "max_bytes": 48 << 20, "swap_max_bytes": 0 },
    })
}

/// Somebody at the console of a VM, who stays there whatever becomes of the controller.
#[derive(Debug)]
pub struct Console {
    name: String,
    writer: UnixStream,
    lines: Receiver<String>,
}

impl Console {
    /// Goes to the console of a VM that is shown.
    ///
    /// # Panics
    /// When it has none, or nobody listens there.
    pub fn of(view: &Value) -> Self {
        let name = view["name"].as_str().expect("a name").to_owned();
        let path = view["console"].as_str().unwrap_or_else(|| panic!("{name} has no console: {view}"));
        let writer = UnixStream::connect(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let reader = writer.try_clone().expect("a descriptor");
        let lines = crate::lines(reader, std::env::var_os("BALLAST_TEST_ECHO").is_some());
        Self { name, writer, lines }
    }

    /// Types a line.
    ///
    /// # Panics
    /// When the console is gone.
    pub fn send(&mut self, line: &str) {
        self.try_send(line).expect("the console takes input");
    }

    /// Types a line to a guest that may be gone.
    ///
    /// # Errors
    /// When the console is.
    pub fn try_send(&mut self, line: &str) -> std::io::Result<()> {
        self.writer.write_all(format!("{line}\n").as_bytes())
    }

    /// Types a command that must succeed.
    ///
    /// # Panics
    /// When it does not within a minute.
    pub fn ok(&mut self, command: &str) {
        self.send(command);
        let answer = self.expect("", 60);
        assert!(answer.starts_with("OK"), "{}: {command}: {answer}", self.name);
    }

    /// Reads all lines that there are, and returns the last that starts with `prefix`.
    pub fn latest(&self, prefix: &str) -> Option<String> {
        self.lines.try_iter().filter(|line| line.starts_with(prefix)).last()
    }

    /// Reads lines until one starts with `prefix`, and returns it.
    ///
    /// # Panics
    /// When none does within `seconds`.
    pub fn expect(&self, prefix: &str, seconds: u64) -> String {
        let end = Instant::now() + deadline(seconds);
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) if line.starts_with(prefix) => return line,
                Ok(_) => {}
                Err(e) => panic!("{}: no line `{prefix}…` within {:?} ({e})", self.name, deadline(seconds)),
            }
        }
    }
}

/// A client that is asked who is to go, as long as it is there.
#[derive(Debug)]
pub struct Decider(BufReader<UnixStream>);

impl Decider {
    /// Registers it: each of its answers is waited for so long.
    ///
    /// # Panics
    /// When that is refused.
    pub fn register(serve: &Serve, wait_ms: u64) -> Self {
        let mut stream = UnixStream::connect(serve.socket()).expect("connected");
        stream.set_read_timeout(Some(deadline(30))).expect("set");
        let body = json!({ "wait_ms": wait_ms }).to_string();
        let head = format!("PUT /oom/policy HTTP/1.1\r\nhost: ballast\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all(format!("{head}{body}").as_bytes()).expect("sent");
        let mut lines = BufReader::new(stream);
        let mut status = String::new();
        lines.read_line(&mut status).expect("an answer");
        assert!(status.starts_with("HTTP/1.1 200"), "{status}");
        Self(lines)
    }

    /// The next question.
    ///
    /// # Panics
    /// When none comes in time.
    pub fn question(&mut self) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).expect("in time") > 0, "the stream has ended");
            if line.starts_with('{') {
                return serde_json::from_str(&line).expect("JSON");
            }
        }
    }
}

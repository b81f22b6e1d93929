//! Ways to end `ballast run`: signals, closed pipes, a key on the terminal. Whatever it is, the guest ends, the socket
//! is gone, and the terminal is as it was.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use ballast_tests::{TestVm, ballast, deadline, http, payload, wait_until};
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, Termios};
use serde_json::Value;

use super::{Place, Reaped, finish, heed_hangups, skipped, unique, word, workers};

#[test]
fn signals_in_a_pipe_end_the_guest_and_leave_nothing() {
    if skipped("signals") {
        return;
    }
    heed_hangups();
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT] {
        let name = unique("signal");
        let mut vm = TestVm::builder(&name).memory("size=64M,max=48M").cmdline("shell").start();
        vm.expect("READY", 10);
        vm.signal(signal);
        assert_eq!(vm.wait(10).code(), Some(128 + signal), "{}", vm.errors());
        assert!(!vm.socket().exists() && !vm.socket().with_extension("d").exists(), "after signal {signal}");
        assert!(workers(&name).is_empty(), "after signal {signal}");
        assert_eq!(vm.errors(), "", "after signal {signal}");
    }
}

#[test]
fn a_signal_ends_a_guest_that_is_paused_held_or_busy() {
    if skipped("signals-in-states") {
        return;
    }
    for state in ["paused", "held", "busy"] {
        let name = unique(state);
        let commands = if state == "held" { "storm" } else { "shell" };
        let mut vm = TestVm::builder(&name)
            .memory("size=64M,max=16M")
            .option("--oom", "deadline=1h")
            .option("--cpus", "2")
            .cmdline(commands)
            .start();
        match state {
            "paused" => {
                vm.expect("READY", 10);
                vm.wait_state("running", 10);
                assert_eq!(vm.post("pause").0, 200);
            }
            "held" => {
                wait_until("it is held", 20, || vm.try_show().filter(|now| now["held"]["now"] == true));
            }
            _ => {
                vm.expect("READY", 10);
                vm.send("touch 4M 4M passes=1000000");
            }
        }
        vm.signal(libc::SIGTERM);
        assert_eq!(vm.wait(10).code(), Some(143), "{state}: {}", vm.errors());
        assert!(!vm.socket().exists() && workers(&name).is_empty(), "{state}");
    }
}

#[test]
fn a_closed_stdin_or_stdout_ends_nothing_and_hangs_nothing() {
    if skipped("closed-pipes") {
        return;
    }
    let place = Place::new();
    let payload = payload();
    let run = |name: &str, commands: &str| {
        let words = ["--memory", "size=64M,max=48M", "--debug-port", "--kernel", word(&payload), "--cmdline", commands];
        place.run(name, &words)
    };
    // Nothing at descriptor 0, then none of the three.
    for closed in ["<&-", "<&- >&- 2>&-"] {
        let name = unique("closed");
        let command = run(&name, "touch 4M 4M; exit 6");
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("exec \"$@\" {closed}")).arg("sh").arg(command.get_program());
        shell.args(command.get_args());
        let said = finish(shell);
        assert_eq!(said.status, Some(6), "{closed}: {said:?}");
        place.is_untouched_by(&name, &closed);
    }
    // A reader that has enough after one line.
    let name = unique("head");
    let many = ["echo a line that nobody reads"; 100].join(";");
    let mut command = run(&name, &format!("echo first; {many}; exit 5"));
    let mut child = Reaped(command.stdout(Stdio::piped()).spawn().expect("the program starts"));
    let mut line = String::new();
    BufReader::new(child.0.stdout.take().expect("piped")).read_line(&mut line).expect("a line");
    assert!(line.contains("first"), "{line}");
    assert_eq!(child.wait("it ends"), Some(5));
    place.is_untouched_by(&name, &"head");
    // A reader that does not read does not keep it from ending either.
    let name = unique("full");
    let mut command = run(&name, &format!("{}touch 32M 8M; shell", "echo x;".repeat(500)));
    let (reader, writer) = std::io::pipe().expect("a pipe");
    // What the guest prints before it touches memory is more than that.
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("a pipe");
    let child = Reaped(command.stdin(Stdio::piped()).stdout(writer).spawn().expect("the program starts"));
    let socket = place.path("sockets").join(format!("{name}.sock"));
    wait_until("the guest has printed it all", 10, || {
        let (_, body) = http(&socket, "GET", &format!("/vms/{name}"), None).ok()?;
        let now: Value = serde_json::from_str(&body).ok()?;
        now["memory"]["stat"]["guest_bytes"].as_u64().filter(|touched| *touched >= 8 << 20)
    });
    child.signal(libc::SIGTERM);
    assert_eq!(child.wait("it ends"), Some(143));
    place.is_untouched_by(&name, &"a full pipe");
    drop(reader);
}

#[test]
fn a_hangup_that_is_ignored_at_the_start_ends_nothing() {
    if skipped("nohup") {
        return;
    }
    let place = Place::new();
    let name = unique("nohup");
    let payload = payload();
    let words = ["--memory", "size=64M,max=48M", "--debug-port", "--kernel", word(&payload), "--cmdline", "shell"];
    let command = place.run(&name, &words);
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$@\"", "sh"]).arg(command.get_program()).args(command.get_args());
    let mut child = Reaped(shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the program starts"));
    let mut console = BufReader::new(child.0.stdout.take().expect("piped")).lines();
    let mut line = || console.next().expect("a line").expect("text");
    assert_eq!(line(), "READY");
    child.signal(libc::SIGHUP);
    child.0.stdin.as_ref().expect("piped").write_all(b"echo still here\n").expect("the console takes input");
    assert_eq!(line(), "OK echo still here");
    child.signal(libc::SIGTERM);
    assert_eq!(child.wait("it ends"), Some(143));
    place.is_untouched_by(&name, &"nohup");
}

#[test]
fn a_console_without_input_goes_on() {
    if skipped("no-input") {
        return;
    }
    let mut vm = TestVm::builder("mute").memory("size=64M").cmdline("shell").start();
    vm.expect("READY", 10);
    vm.send("echo last words");
    vm.close_stdin();
    vm.expect("OK echo last words", 10);
    assert_eq!(vm.wait_state("running", 10)["state"], "running");
    vm.signal(libc::SIGTERM);
    assert_eq!(vm.wait(10).code(), Some(143));
}

/// `ballast run` on a terminal of its own.
struct OnTerminal {
    child: Option<Reaped>,
    ours: File,
    printed: Receiver<Vec<u8>>,
    seen: String,
    /// The terminal's other end, kept open so that its settings can be asked for at the end.
    terminal: OwnedFd,
    before: String,
    place: Place,
    name: String,
}

/// Everything about a terminal that a program may change.
fn settings(terminal: &OwnedFd) -> Termios {
    rustix::termios::tcgetattr(terminal).expect("a terminal")
}

fn text(settings: &Termios) -> String {
    format!("{settings:?}")
}

impl OnTerminal {
    /// `ballast run` of a VM of its own.
    fn start(words: &[&str]) -> Self {
        let (place, name) = (Place::new(), unique("tty"));
        let socket = place.path("vm.sock");
        let words = [&["run", "--name", &name, "--socket", word(&socket)], words].concat();
        Self::with(place, name.clone(), &words)
    }

    /// The program with these words.
    fn with(place: Place, name: String, words: &[&str]) -> Self {
        Self::of_kind("xterm", place, name, words)
    }

    /// The program with these words, on a terminal of this kind.
    fn of_kind(kind: &str, place: Place, name: String, words: &[&str]) -> Self {
        let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a pty");
        rustix::pty::grantpt(&ours).and_then(|()| rustix::pty::unlockpt(&ours)).expect("a pty of ours");
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let terminal = rustix::pty::ioctl_tiocgptpeer(&ours, flags).expect("its other end");
        let before = text(&settings(&terminal));
        let mut command = Command::new(ballast());
        let end = || terminal.try_clone().expect("a descriptor");
        command.args(words).env("TERM", kind).env_remove("BALLAST_LOG").stdin(end()).stdout(end()).stderr(end());
        let lead = || {
            rustix::process::setsid()?;
            // SAFETY: descriptor 0 is open: it is the terminal that was just put there.
            let stdin = unsafe { std::os::fd::BorrowedFd::borrow_raw(0) };
            Ok(rustix::process::ioctl_tiocsctty(stdin)?)
        };
        // SAFETY: the closure makes two system calls and touches no memory but its own.
        unsafe { command.pre_exec(lead) };
        let child = Reaped(command.spawn().expect("the program starts"));
        let ours = File::from(ours);
        let (sender, printed) = channel();
        let mut reader = ours.try_clone().expect("a descriptor");
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = reader.read(&mut buffer)
                && length > 0
                && sender.send(buffer[..length].to_vec()).is_ok()
            {}
        });
        Self { child: Some(child), ours, printed, seen: String::new(), terminal, before, place, name }
    }

    /// Waits until `part` has been printed since the last call; gives that and what was before it.
    fn expect(&mut self, part: &str) -> String {
        let end = Instant::now() + deadline(10);
        loop {
            if let Some(at) = self.seen.find(part) {
                return self.seen.drain(..at + part.len()).collect();
            }
            match self.printed.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("no {part:?} on the terminal ({error}), but {:?}", self.seen),
            }
        }
    }

    fn type_in(&mut self, keys: &[u8]) {
        self.ours.write_all(keys).expect("the terminal takes keys");
    }

    fn signal(&self, signal: i32) {
        self.child.as_ref().expect("running").signal(signal);
    }

    /// Waits for the end; checks that nothing is left and that the terminal is as it was. Returns the status.
    fn ended(mut self) -> Option<i32> {
        let status = self.child.take().expect("running").wait("it ends");
        assert_eq!(text(&settings(&self.terminal)), self.before, "the terminal is not as it was");
        let left: Vec<_> = std::fs::read_dir(self.place.path("")).expect("ours").flatten().collect();
        assert!(left.is_empty(), "left: {left:?}");
        assert!(workers(&self.name).is_empty());
        status
    }
}

#[test]
fn on_a_terminal_ctrl_c_is_the_guest_s_and_one_key_leaves() {
    if skipped("terminal") {
        return;
    }
    let payload = payload();
    let words = ["--memory", "size=64M,max=48M", "--debug-port", "--cmdline", "shell", "--kernel", word(&payload)];
    let mut run = OnTerminal::start(&words);
    run.expect("READY");
    let raw = settings(&run.terminal).local_modes;
    assert!(!raw.intersects(LocalModes::ISIG | LocalModes::ICANON | LocalModes::ECHO), "{raw:?}");
    // Ctrl-C, Ctrl-\ and Ctrl-Z are bytes like others: the guest reads them in a line.
    run.type_in(b"\x03\x1c\x1a\r");
    run.expect("ERR ");
    run.expect("no such command");
    run.type_in(b"echo still here\r");
    run.expect("OK echo still here");
    run.type_in(b"\x1d");
    assert_eq!(run.ended(), Some(0));

    // What is typed before the key still is the guest's, and what is behind it nobody's.
    let mut run = OnTerminal::start(&words);
    run.expect("READY");
    run.type_in(b"wait 60000\r\x1dexit 9\r");
    assert_eq!(run.ended(), Some(0));
}

#[test]
fn one_who_leaves_the_console_of_a_vm_leaves_the_vm_alone() {
    if skipped("console-terminal") {
        return;
    }
    let mut vm = TestVm::builder(&unique("visited")).memory("size=64M,max=48M").cmdline("shell").start();
    vm.expect("READY", 10);
    let socket = vm.socket().to_owned();
    let words = ["console", &vm.name.clone(), "--socket", word(&socket)];
    let visit = || OnTerminal::with(Place::new(), unique("visitor"), &words);
    let mut visitor = visit();
    visitor.expect("Ctrl-] leaves it");
    visitor.expect("READY");
    let raw = settings(&visitor.terminal).local_modes;
    assert!(!raw.intersects(LocalModes::ISIG | LocalModes::ICANON | LocalModes::ECHO), "{raw:?}");
    visitor.type_in(b"\x03\recho typed by a visitor\r");
    visitor.expect("OK echo typed by a visitor");
    vm.expect("OK echo typed by a visitor", 10);
    visitor.type_in(b"\x1dexit 9\r");
    visitor.expect("which goes on");
    assert_eq!(visitor.ended(), Some(0));
    assert!(vm.command("echo still here", 10).starts_with("OK"));

    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut visitor = visit();
        visitor.expect("OK echo still here");
        visitor.signal(signal);
        assert_eq!(visitor.ended(), Some(128 + signal));
    }
    let mut visitor = visit();
    visitor.expect("OK echo still here");
    visitor.type_in(b"exit 0\r");
    visitor.expect("OK exit");
    assert_eq!(visitor.ended(), Some(0));
    assert_eq!(vm.wait(10).code(), Some(0));
}

#[test]
fn a_terminal_without_a_cursor_gets_one_page_of_what_is_going_on() {
    if skipped("top-terminal") {
        return;
    }
    let vm = TestVm::builder(&unique("watched")).memory("size=64M,max=48M").cmdline("shell").start();
    vm.expect("READY", 10);
    let words = ["top", "--socket", word(vm.socket())];
    let look = |kind: &str| OnTerminal::of_kind(kind, Place::new(), unique("looker"), &words);
    for kind in ["dumb", ""] {
        let mut top = look(kind);
        let page = top.expect(&vm.name);
        assert!(page.starts_with("ballast: 1 VM") && !page.contains('\x1b'), "{kind:?}: {page:?}");
        assert_eq!(top.ended(), Some(0), "{kind:?}");
    }
    let mut top = look("xterm");
    top.expect("\x1b[?1049h");
    top.type_in(b"q");
    assert_eq!(top.ended(), Some(0));
}

#[test]
fn every_other_end_on_a_terminal_gives_it_back_too() {
    if skipped("terminal-ends") {
        return;
    }
    heed_hangups();
    let payload = payload();
    let words = ["--memory", "size=64M,max=48M", "--debug-port", "--kernel", word(&payload), "--cmdline"];
    let start = |commands: &str| OnTerminal::start(&[&words[..], &[commands]].concat());

    assert_eq!(start("exit 9").ended(), Some(9));

    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let mut run = start("shell");
        run.expect("READY");
        run.signal(signal);
        assert_eq!(run.ended(), Some(128 + signal));
    }

    let mut run = start("shell");
    run.expect("READY");
    let worker = workers(&run.name)[0];
    // SAFETY: kill takes numbers; the worker runs.
    unsafe { libc::kill(worker as i32, libc::SIGKILL) };
    run.expect("ballast: ");
    assert_eq!(run.ended(), Some(125));

    let run = OnTerminal::start(&["--memory", "size=64M", "--kernel", "none"]);
    assert_eq!(run.ended(), Some(125));
    let run = OnTerminal::start(&["--memory", "size=64"]);
    assert_eq!(run.ended(), Some(2));
}

#[test]
fn a_terminal_that_goes_away_ends_the_guest() {
    if skipped("hangup") {
        return;
    }
    heed_hangups();
    let payload = payload();
    let words = ["--memory", "size=64M,max=48M", "--debug-port", "--cmdline", "shell", "--kernel", word(&payload)];
    let mut run = OnTerminal::start(&words);
    run.expect("READY");
    let OnTerminal { child, ours, printed, place, name, terminal, .. } = run;
    // The reading thread holds the last copy of our end; it is told by the hangup of the other.
    drop((ours, printed, terminal));
    let child = child.expect("running");
    // What the kernel sends to the leader of a session whose terminal has gone.
    child.signal(libc::SIGHUP);
    assert_eq!(child.wait("it ends"), Some(129));
    assert!(std::fs::read_dir(place.path("")).expect("ours").flatten().next().is_none());
    assert!(workers(&name).is_empty());
}

//! Bad input, from the command line to the socket: what is wrong is said in one sentence that says what to do, the
//! exit status is not 0, and nothing is half done: no socket, no directory of the VM, no process.

mod ends;
mod http;
mod start;
mod verbs;
mod words;

use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use ballast_tests::{ballast, skipped, wait_until};

/// Has programs that are started from here on be ended by SIGHUP, also where the tests themselves run under nohup.
fn heed_hangups() {
    // SAFETY: takes numbers; the default action replaces whatever this process inherited.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
}

/// A name that no other VM on this machine has, so that its processes can be told from others'.
fn unique(name: &str) -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// What a program said until its end.
#[derive(Debug)]
struct Said {
    /// The exit status; none after a signal.
    status: Option<i32>,
    out: String,
    err: String,
}

impl Said {
    /// Checks the exit status and that stderr is one sentence of ours with `part` in it.
    fn refused(&self, status: i32, part: &str, of: &dyn std::fmt::Debug) {
        let err = &self.err;
        assert_eq!(self.status, Some(status), "{of:?}: {self:?}");
        assert!(err.starts_with("ballast: ") && err.ends_with('\n'), "{of:?}: {err:?}");
        assert_eq!(err.lines().count(), 1, "{of:?}: more than one line: {err}");
        assert!(!err.trim_end().chars().any(char::is_control), "{of:?}: control characters in {err:?}");
        assert!(err.contains(part), "{of:?}: no {part:?} in {err}");
        assert!(self.out.is_empty(), "{of:?}: {self:?}");
    }
}

/// The program with words, nothing on stdin, and none of the user's settings.
fn program(words: &[&str]) -> Command {
    let mut command = Command::new(ballast());
    command.args(words).stdin(Stdio::null()).env_remove("BALLAST_SOCKET").env_remove("BALLAST_LOG");
    command
}

/// Runs a program to its end.
///
/// # Panics
/// When it takes longer than ten seconds; it is ended then.
fn finish(mut command: Command) -> Said {
    let capture = || tempfile::tempfile().expect("a temporary file");
    let (mut out, mut err) = (capture(), capture());
    command.stdout(out.try_clone().expect("a descriptor")).stderr(err.try_clone().expect("a descriptor"));
    let child = Reaped(command.spawn().expect("the program starts"));
    let status = child.wait(&format!("{command:?} ends"));
    let text = |file: &mut File| {
        let mut bytes = Vec::new();
        file.rewind().and_then(|()| file.read_to_end(&mut bytes)).expect("a file of ours can be read");
        String::from_utf8(bytes).expect("text")
    };
    Said { status, out: text(&mut out), err: text(&mut err) }
}

/// A process that does not outlive its test.
struct Reaped(std::process::Child);

impl Reaped {
    /// Sends it a signal.
    fn signal(&self, signal: i32) {
        // SAFETY: kill takes numbers; the child has not been reaped, so the id is its own.
        unsafe { libc::kill(self.0.id() as i32, signal) };
    }

    /// Waits for the end and returns the exit status.
    fn wait(mut self, what: &str) -> Option<i32> {
        wait_until(what, 10, || self.0.try_wait().expect("our child")).code()
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        // It has ended as a rule.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory of its own in which VMs listen.
struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { directory: tempfile::Builder::new().prefix("bn").tempdir().expect("a temporary directory") }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A file with these contents.
    fn file(&self, name: &str, contents: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, contents).expect("a file can be made");
        path
    }

    /// `ballast run` of a VM called `name` that would listen at `sockets/NAME.sock`, plus `words`.
    fn run(&self, name: &str, words: &[&str]) -> Command {
        let sockets = self.path("sockets");
        std::fs::create_dir_all(&sockets).expect("a directory can be made");
        let mut command = program(&["run", "--name", name, "--socket"]);
        command.arg(sockets).args(words);
        command
    }

    /// Checks that of a VM called `name` nothing is there: no socket, no directory, no process.
    fn is_untouched_by(&self, name: &str, of: &dyn std::fmt::Debug) {
        let left: Vec<_> = std::fs::read_dir(self.path("sockets")).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{of:?} has left {left:?}");
        let workers = workers(name);
        assert!(workers.is_empty(), "{of:?} has left processes {workers:?}");
    }
}

/// Process ids of the workers of VMs called `name`, the dead that nobody has collected left out.
fn workers(name: &str) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").expect("procfs").flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let command = format!("ballast\0worker\0{name}\0");
    ids.filter(|id| std::fs::read(format!("/proc/{id}/cmdline")).is_ok_and(|line| line == command.as_bytes())).collect()
}

/// A path as a word of a command line.
fn word(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

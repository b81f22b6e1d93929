//! `docs/tutorial.md`, done as a reader would do it.
//!
//! In its blocks of `console` stands what is typed in which terminal, and what comes then:
//!
//! ```text
//! two$ ballast ps          a command for the shell of the terminal `two`; `\` continues it on the next line
//! NAME  STATE …            what it prints: these lines, in this order, perhaps with others between them
//! one> touch 16M 64M       a line for the program that runs in the terminal `one`
//! one| OK touch …          what that prints later on
//! one> ^]                  a key that leaves it
//! ```
//!
//! Numbers are not compared, nor is what stands behind `…`. A command must succeed, and end, unless it is one of [`STAY`].

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;

use ballast_tests::serve::{end_workers, kill};
use ballast_tests::{ballast, deadline, lines, payload, wait_until};

use super::docs::top;
use super::skipped;

/// Commands that go on until somebody ends them.
const STAY: &[&str] = &["ballast run ", "ballast events -f", "ballast console "];

/// The line behind each command's output.
const END: &str = "[end ";

/// Something that is typed, with what has to come.
#[derive(Debug, Default, PartialEq)]
struct Step {
    terminal: String,
    /// A command for the shell; otherwise input for what runs there, or nothing.
    command: bool,
    text: String,
    expected: Vec<String>,
}

/// The steps of the blocks of `console`.
fn steps(text: &str) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut lines = text.lines();
    while lines.any(|line| line == "```console") {
        let mut goes_on = false;
        for line in lines.by_ref().take_while(|line| *line != "```") {
            let step = steps.last_mut();
            if goes_on && let Some(step) = step {
                step.text = format!("{}\n{line}", step.text);
            } else if let Some((terminal, kind, text)) = prompt(line) {
                let (terminal, text) = (terminal.to_owned(), text.to_owned());
                steps.push(match kind {
                    '|' => Step { terminal, expected: vec![text], ..Step::default() },
                    kind => Step { terminal, command: kind == '$', text, expected: Vec::new() },
                });
            } else if !line.trim().is_empty() {
                step.expect("a prompt comes first").expected.push(line.to_owned());
                continue;
            }
            goes_on = line.ends_with('\\');
        }
    }
    steps
}

/// The terminal, one of `$`, `>` and `|`, and the rest.
fn prompt(line: &str) -> Option<(&str, char, &str)> {
    let end = line.find(|c: char| !c.is_ascii_lowercase()).filter(|end| *end > 0)?;
    let (terminal, rest) = line.split_at(end);
    let kind = rest.chars().next().filter(|kind| "$>|".contains(*kind))?;
    Some((terminal, kind, rest[1..].strip_prefix(' ')?))
}

/// A line without what differs from run to run.
fn essence(line: &str) -> String {
    let mut essence = String::new();
    for c in line.split_whitespace().collect::<Vec<_>>().join(" ").chars() {
        match c {
            '0'..='9' if essence.ends_with('#') => {}
            '0'..='9' => essence.push('#'),
            '.' | ':' if essence.ends_with('#') => {}
            _ => essence.push(c),
        }
    }
    essence
}

fn is_like(line: &str, expected: &str) -> bool {
    match expected.split_once('…') {
        Some((beginning, _)) => essence(line).starts_with(essence(beginning).trim_end()),
        None => essence(line) == essence(expected),
    }
}

/// A shell, in which something may be running.
struct Terminal {
    shell: Child,
    keys: ChildStdin,
    lines: Receiver<String>,
    busy: bool,
}

impl Terminal {
    fn open(runtime: &Path) -> Self {
        let mut command = Command::new("bash");
        let path = format!("{}/bin:{}", runtime.display(), std::env::var("PATH").unwrap_or_default());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        command.env("PATH", path).env("XDG_RUNTIME_DIR", runtime).env("PAYLOAD", payload());
        command.env_remove("BALLAST_SOCKET").env_remove("BALLAST_LOG");
        let mut shell = command.spawn().expect("bash");
        let (mut keys, output) = (shell.stdin.take().expect("piped"), shell.stdout.take().expect("piped"));
        keys.write_all(b"exec 2>&1\n").expect("taken");
        Self { shell, keys, lines: lines(output, false), busy: false }
    }

    /// Does a step, and waits for what has to come.
    fn step(&mut self, step: &Step) {
        if step.command {
            self.end(step);
            let quoted = step.text.replace('\'', r"'\''");
            writeln!(self.keys, "eval '{quoted}'; printf '\\n{END}%s]\\n' $?").expect("taken");
            self.busy = true;
        } else if step.text.starts_with('^') {
            // In a pipe a signal is what the key is on a terminal.
            let children = format!("/proc/{0}/task/{0}/children", self.shell.id());
            for child in std::fs::read_to_string(children).expect("a list").split_whitespace() {
                kill(child.parse().expect("a process"), libc::SIGINT);
            }
        } else if !step.text.is_empty() {
            writeln!(self.keys, "{}", step.text).expect("taken");
        }
        for expected in &step.expected {
            self.until(step, expected, |line| is_like(line, expected));
        }
        if step.command && !STAY.iter().any(|stays| step.text.contains(stays)) || step.text.starts_with('^') {
            self.end(step);
        }
    }

    /// Waits for the end of what runs there.
    fn end(&mut self, step: &Step) {
        if std::mem::take(&mut self.busy) {
            let end = self.until(step, "its end", |line| line.starts_with(END));
            // By a signal, or because somebody else killed the VM.
            let good = [0, 130, 137].map(|status| format!("{END}{status}]"));
            assert!(good.contains(&end), "{step:?}: {end}");
        }
    }

    fn until(&self, step: &Step, what: &str, found: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + deadline(30);
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    println!("{}| {line}", step.terminal);
                    if found(&line) {
                        return line;
                    }
                    assert!(!line.starts_with(END), "{step:?}: it ended before {what:?}: {line}");
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("{step:?}: nothing like {what:?}")
                }
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // SAFETY: kill takes numbers; the group is the shell's own.
        unsafe { libc::kill(-self.shell.id().cast_signed(), libc::SIGKILL) };
        let _ = self.shell.wait();
    }
}

/// Where the readers' VMs are; none of them outlives the test.
struct Runtime(tempfile::TempDir);

impl Drop for Runtime {
    fn drop(&mut self) {
        end_workers(&self.0.path().join("ballast/ballast.d"));
    }
}

#[test]
fn the_tutorial_works_as_it_stands() {
    if skipped("docs-tutorial") {
        return;
    }
    let text = std::fs::read_to_string(top().join("docs/tutorial.md")).expect("readable");
    let steps = steps(&text);
    let commands = steps.iter().filter(|step| step.command).count();
    assert!(commands > 30, "{commands} commands only: have they another form now?");
    let runtime = Runtime(tempfile::Builder::new().prefix("bt").tempdir().expect("a temporary directory"));
    let place = runtime.0.path();
    let bin = place.join("bin");
    std::fs::create_dir(&bin).expect("made");
    std::os::unix::fs::symlink(ballast(), bin.join("ballast")).expect("made");
    let mut terminals = std::collections::BTreeMap::new();
    for step in &steps {
        println!("{}{} {}", step.terminal, if step.command { '$' } else { '>' }, step.text);
        terminals.entry(&step.terminal).or_insert_with(|| Terminal::open(place)).step(step);
        if step.text.ends_with('&') {
            // Before a reader has typed the next line, it answers.
            let socket = place.join("ballast/ballast.sock");
            wait_until("serve answers", 30, || ballast_tests::http(&socket, "GET", "/host", None).ok());
        }
    }
}

#[test]
fn a_tutorial_is_taken_apart() {
    let text = "```console\none$ a \\\n  b\nout 1\n\n…\none> key\none| 2\n```\ntwo$ c\n```sh\none$ no\n```\n";
    let step = |command, text: &str, expected: &[&str]| Step {
        terminal: "one".to_owned(),
        command,
        text: text.to_owned(),
        expected: expected.iter().map(|&line| line.to_owned()).collect(),
    };
    assert_eq!(
        steps(text),
        [step(true, "a \\\n  b", &["out 1", "…"]), step(false, "key", &[]), step(false, "", &["2"])]
    );
    assert!(is_like("used 17.3 MiB  of 9", "used 2 MiB of 100.5"));
    assert!(is_like("12:00:01 web started usage_bytes=9", "09:13:55 web started …"));
    assert!(!is_like("used 1 KiB", "used 1 MiB"));
}

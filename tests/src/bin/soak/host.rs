//! What the host says about the controller and its workers, without asking them.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, WaitOptions};

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its parent.
    pub parent: u32,
    /// True when it has ended and nobody has waited for it.
    pub zombie: bool,
    /// True when it is a worker.
    pub worker: bool,
}

/// All processes with one of these parents.
///
/// # Panics
/// When `/proc` is not there.
pub fn children(parents: &[u32]) -> Vec<Process> {
    let all = fs::read_dir("/proc").expect("/proc").flatten();
    all.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        let zombie = fields.next()? == "Z";
        let parent = fields.next()?.parse().ok()?;
        if !parents.contains(&parent) {
            return None;
        }
        let words = fs::read(entry.path().join("cmdline")).ok()?;
        let worker = words.split(|byte| *byte == 0).nth(1) == Some(b"worker");
        Some(Process { pid, parent, zombie, worker })
    })
    .collect()
}

/// Makes orphans of our descendants our own children: nothing that outlives its parent is out of sight.
///
/// # Panics
/// When the kernel refuses, which it has no reason to.
pub fn adopt_orphans() {
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).expect("this process may adopt orphans");
}

/// Waits for an orphan that has ended. Nothing happens to one that has not.
pub fn reap(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // An error says that somebody else has waited for it.
    let _ = rustix::process::waitpid(pid, WaitOptions::NOHANG);
}

/// What a process has of the things that leak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Anonymous memory that is resident, in bytes.
    pub memory: u64,
}

/// What a process holds now.
///
/// # Panics
/// When it is gone.
pub fn holdings(pid: u32) -> Holdings {
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).expect("the process is there").count();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.trim().strip_suffix(" kB"));
    let memory = anonymous.and_then(|kib| kib.trim().parse::<u64>().ok()).expect("RssAnon") * 1024;
    Holdings { descriptors: count("fd"), threads: count("task"), memory }
}

/// Everything below a directory.
pub fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        found.push(entry.path());
        // A symbolic link is not followed: there is none, and one would be shown.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&entry.path()));
        }
    }
    found.sort();
    found
}

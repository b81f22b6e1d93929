//! `GET /check`: do the invariants hold on this host, now?
//!
//! ```text
//!  for each VM:   ask its worker ─► count its pages by pagemap ─► ask again: nothing moved? then they are comparable
//!  the actor:     counters, what was granted, who is there         (one moment, consistent)
//!  the host:      processes, their descriptors, their sandboxes    (/proc, in a thread that may block)
//!  each worker:   no more memory than it was charged (`audit.rs`), standing still or not
//!        └► findings; when one is bad, everything is looked at again, up to three times in all
//! ```
//!
//! A host is never at rest as a whole: a VM may end between two looks. So a violation is what is found at every look.
//! A guest that never stands still is not counted, and the finding says so; it is not stopped for it.
//!
//! What is found is decided by pure functions over what was seen ([`memcg_core::audit`], [`Seen`]), so tests can show
//! that each of them can fail.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use memcg_core::audit::{self, Finding, VmFacts};
use memcg_core::units::{PAGE_SIZE, Pages};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Controller;
use super::actor::{Actor, answer};
use super::error::{Code, Refusal};
use super::host;
use super::overview::StrayView;
use super::view::{RamView, VmState, VmView};

/// How often everything is looked at before something that is wrong is believed.
const LOOKS: usize = 3;

/// How often a guest's pages are counted in one look, until nothing has moved meanwhile.
const COUNTS: usize = 3;

/// Time between two looks: what was on its way has arrived then.
const BETWEEN: Duration = Duration::from_millis(200);

/// The answer: every invariant, whether it holds or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CheckView {
    /// All of them hold.
    pub ok: bool,
    /// Each of them.
    pub invariants: Vec<InvariantView>,
}

/// One invariant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InvariantView {
    /// Its name.
    pub name: String,
    /// It holds.
    pub ok: bool,
    /// What was looked at, or what is wrong, with the numbers.
    pub message: String,
}

impl From<Finding> for InvariantView {
    fn from(finding: Finding) -> Self {
        Self { name: finding.name.to_owned(), ok: finding.ok, message: finding.message }
    }
}

/// What the actor knows at one moment.
struct Known {
    /// The findings about the counters.
    tree: Vec<Finding>,
    /// Nodes that are nobody's, and VMs without a node.
    nodes: Finding,
    vms: Vec<VmFacts>,
    workers: Vec<Worker>,
    strays: Vec<StrayView>,
}

/// A worker that the actor believes to be there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Worker {
    name: String,
    pid: i32,
    /// It has userfaultfd, because its VM is accounted.
    accounted: bool,
    /// The guest runs or has run, so its threads are in their sandboxes.
    sandboxed: bool,
}

impl Actor {
    fn known(&self) -> Known {
        let workers = self.vms.iter().filter(|(_, vm)| vm.alive()).map(|(_, vm)| Worker {
            name: vm.name.clone(),
            pid: vm.process.pid(),
            accounted: vm.accounted(),
            sandboxed: vm.state != VmState::Starting,
        });
        let vms = self.vms.iter().filter(|(_, vm)| vm.alive() && vm.reported).map(|(_, vm)| {
            let node = self.tree.snapshot(vm.node);
            VmFacts {
                name: vm.name.clone(),
                accounted: vm.accounted(),
                charged: node.memory.usage,
                vmm: node.vmm.usage,
                store: node.store.usage,
                outstanding: vm.outstanding().saturating_sub(vm.grown() + node.store.usage),
                in_flight: Pages(vm.in_flight()),
                guest: Pages(vm.report.guest),
                stock: Pages(vm.report.stock),
                reserve: Pages(vm.report.reserve),
                resident: None,
            }
        });
        Known {
            tree: audit::tree(&self.tree, &self.tree.check()),
            nodes: self.check_nodes(),
            vms: vms.collect(),
            workers: workers.collect(),
            strays: self.stray_views(),
        }
    }

    /// Every VM has a node that is there, no two share one, and a node that is offline is there because of its charges.
    fn check_nodes(&self) -> Finding {
        let mut wrong = Vec::new();
        let mut owners = BTreeMap::new();
        for (_, vm) in self.vms.iter() {
            if !self.tree.contains(vm.node) {
                wrong.push(format!("{}: its node was freed while the VM is there", vm.name));
            } else if let Some(other) = owners.insert(vm.node, &vm.name) {
                wrong.push(format!("{}: shares its node with {other}", vm.name));
            }
        }
        for id in self.tree.ids() {
            let node = self.tree.snapshot(id);
            if !node.online && node.memory.usage.is_zero() && node.swap.usage.is_zero() && !owners.contains_key(&id) {
                wrong.push(format!("{}: was removed and has no charges left, but is still there", self.tree.path(id)));
            }
        }
        let looked_at = format!(
            "{} nodes, {} of them of VMs; none freed too early or too late",
            self.tree.ids().count(),
            owners.len()
        );
        Finding::new("nodes", looked_at, &wrong)
    }
}

impl Controller {
    /// Looks whether the invariants hold. `state` is the directory of the workers' sockets, where there is one for many.
    ///
    /// # Errors
    /// When the controller is going away, or `/proc` cannot be looked at.
    pub async fn check(&self, state: Option<PathBuf>) -> Result<CheckView, Refusal> {
        let audited = self.audit_all().await?;
        let mut findings = self.look(state.clone()).await?;
        for _ in 1..LOOKS {
            if findings.iter().all(|finding| finding.ok) {
                break;
            }
            tokio::time::sleep(host::scaled(BETWEEN)).await;
            let again = self.look(state.clone()).await?;
            findings = again.into_iter().zip(&findings).map(|(now, before)| now.since(before)).collect();
        }
        findings.push(audited);
        let ok = findings.iter().all(|finding| finding.ok);
        Ok(CheckView { ok, invariants: findings.into_iter().map(InvariantView::from).collect() })
    }

    /// One look at everything.
    async fn look(&self, state: Option<PathBuf>) -> Result<Vec<Finding>, Refusal> {
        let mut resident = BTreeMap::new();
        for vm in self.list().await? {
            if vm.accounting && matches!(vm.state, VmState::Running | VmState::Paused) {
                resident.insert(vm.name.clone(), self.count_at_rest(&vm.name).await?);
            }
        }
        let mut known = self.ask(|actor, reply| answer(reply, Ok(actor.known()))).await?;
        for vm in &mut known.vms {
            // What was counted is compared with what the worker said then: it may have moved since.
            if let Some(Some((guest, present))) = resident.get(&vm.name).copied()
                && guest == vm.guest
            {
                vm.resident = Some(present);
            }
        }
        let (workers, strays) = (known.workers, known.strays);
        let seen =
            tokio::task::spawn_blocking(move || Seen::on_host(state.as_deref(), &workers).map(|seen| (seen, workers)));
        let seen = seen.await.map_err(|error| Refusal::new(Code::Stopping, error.to_string()))?;
        let (seen, workers) =
            seen.map_err(|error| Refusal::new(Code::Busy, format!("/proc cannot be looked at: {error}")))?;
        Ok([known.tree, vec![known.nodes], audit::vms(&known.vms), seen.findings(&workers, &strays)].concat())
    }

    /// The pages charged to a guest and those present, counted while nothing moved. `None`: it never stood still, or its
    /// worker does not answer.
    async fn count_at_rest(&self, name: &str) -> Result<Option<(Pages, Pages)>, Refusal> {
        let shown = |result: Result<VmView, Refusal>| match result {
            Ok(view) if !view.stale && view.state != VmState::Ended => Ok(Some(view)),
            // Ended or removed meanwhile.
            Ok(_) => Ok(None),
            Err(refusal) if refusal.code == Code::NotFound => Ok(None),
            Err(refusal) => Err(refusal),
        };
        let Some(mut before) = shown(self.show(name).await)? else { return Ok(None) };
        for _ in 0..COUNTS {
            let (pid, areas) = (before.pid, before.ram.iter().flat_map(RamView::areas).collect::<Vec<_>>());
            let present = tokio::task::spawn_blocking(move || present_pages(pid, &areas)).await;
            let present = present.map_err(|error| Refusal::new(Code::Stopping, error.to_string()))?;
            let Some(after) = shown(self.show(name).await)? else { return Ok(None) };
            let Ok(present) = present else { return Ok(None) };
            if still(&before, &after) {
                return Ok(Some((Pages(after.memory.stat.guest_bytes / PAGE_SIZE), present)));
            }
            before = after;
        }
        Ok(None)
    }
}

/// Whether nothing happened to a guest's pages between two looks.
fn still(before: &VmView, after: &VmView) -> bool {
    let moved = |vm: &VmView| {
        let f = &vm.faults;
        let back = [f.discarded_pages, f.reported_pages];
        (vm.memory.stat.guest_bytes, f.touched_pages, f.around_pages, back, f.events, f.from_reserve_pages)
    };
    before.pid == after.pid && moved(before) == moved(after)
}

/// Pages of some areas that the page tables of a worker hold, or the host's swap.
fn present_pages(pid: i32, areas: &[Range<u64>]) -> io::Result<Pages> {
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;
    let pagemap = std::fs::File::open(format!("/proc/{pid}/pagemap"))?;
    let mut entries = [0; 64 * 1024];
    let mut present = 0;
    for area in areas {
        let (mut at, end) = (area.start / PAGE_SIZE * 8, area.end / PAGE_SIZE * 8);
        while at < end {
            let length = entries.len().min(usize::try_from(end - at).unwrap_or(usize::MAX));
            pagemap.read_exact_at(&mut entries[..length], at)?;
            let entry = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            let there = entries[..length].chunks_exact(8).filter(|bytes| entry(bytes) & PRESENT_OR_SWAPPED != 0);
            present += there.count() as u64;
            at += length as u64;
        }
    }
    Ok(Pages(present))
}

/// What a look at `/proc` has seen.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    /// Processes that are workers of this controller, by their names and what they listen on.
    workers: BTreeMap<i32, Process>,
}

/// One process that is a worker.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Process {
    /// The name that it was started with.
    name: String,
    /// Userfaultfds that it has.
    userfaultfds: usize,
    /// Threads.
    threads: usize,
    /// Of these, those that are outside of a sandbox.
    free_threads: usize,
}

/// The workers that listen below `state`, by the names that they were started with.
///
/// # Errors
/// When `/proc` cannot be looked at.
pub(super) fn workers_below(state: &Path) -> io::Result<BTreeMap<String, i32>> {
    let seen = Seen::on_host(Some(state), &[])?;
    Ok(seen.workers.into_iter().map(|(pid, process)| (process.name, pid)).collect())
}

impl Seen {
    /// Looks at the host: every process that is a worker and either a child of this one, or listens below `state`, or
    /// is one of `known`.
    fn on_host(state: Option<&Path>, known: &[Worker]) -> io::Result<Self> {
        let ours = state.map(sockets_below).transpose()?.unwrap_or_default();
        let known: BTreeSet<_> = known.iter().map(|worker| worker.pid).collect();
        let mut seen = Self::default();
        for entry in std::fs::read_dir("/proc")? {
            let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            // A process that ends while it is looked at was not there.
            if let Ok(Some(process)) = look_at(pid, &ours, known.contains(&pid)) {
                seen.workers.insert(pid, process);
            }
        }
        Ok(seen)
    }

    /// What is wrong with the processes. What a worker holds that could not be taken over is compared with nothing.
    fn findings(&self, known: &[Worker], strays: &[StrayView]) -> Vec<Finding> {
        let (mut workers, mut strangers, mut sandbox, mut untracked) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for Worker { name, pid, accounted, sandboxed } in known {
            let Some(process) = self.workers.get(pid) else {
                workers.push(format!("{name}: its worker {pid} is not there any more"));
                continue;
            };
            if process.name != *name {
                workers.push(format!("{name}: its worker {pid} was started for {}", process.name));
            }
            if *sandboxed && process.free_threads > 0 {
                let Process { threads, free_threads, .. } = process;
                sandbox
                    .push(format!("{name}: {free_threads} of {threads} threads of its worker {pid} have no sandbox"));
            }
            let wrong = if *accounted { process.userfaultfds == 0 } else { process.userfaultfds > 0 };
            if wrong {
                let is = if *accounted { "is" } else { "is not" };
                untracked.push(format!("{name}: it {is} accounted, and has {} userfaultfds", process.userfaultfds));
            }
        }
        let pids: BTreeSet<_> = known.iter().map(|worker| worker.pid).collect();
        for (pid, process) in self.workers.iter().filter(|(pid, _)| !pids.contains(pid)) {
            let stray = strays.iter().find(|stray| stray.pid == Some(*pid));
            strangers.push(match stray {
                Some(stray) if stray.is_ending => continue,
                Some(stray) => format!("{}: its worker {pid} could not be taken over: {}", stray.name, stray.why),
                None => format!("process {pid} is a worker for {:?} that nobody knows", process.name),
            });
        }
        let count = known.len();
        let threads: usize = self.workers.values().map(|process| process.threads).sum();
        vec![
            Finding::new("workers", format!("{count} VMs, the worker of each is alive"), &workers),
            Finding::new("strangers", format!("{} workers run, each of a VM", self.workers.len()), &strangers),
            Finding::new("sandbox", format!("{threads} threads, all that may run a guest are shut in"), &sandbox),
            Finding::new("untracked", format!("{count} VMs: userfaultfd where it is accounted, else not"), &untracked),
        ]
    }
}

/// The inodes of unix sockets whose path is below `state`.
fn sockets_below(state: &Path) -> io::Result<BTreeSet<String>> {
    let table = std::fs::read_to_string("/proc/net/unix")?;
    let below = |path: &str| Path::new(path).starts_with(state);
    let inode = |line: &str| {
        // Num RefCount Protocol Flags Type St Inode Path
        let mut words = line.split_whitespace();
        let (inode, path) = (words.nth(6)?, words.next()?);
        below(path).then(|| inode.to_owned())
    };
    Ok(table.lines().skip(1).filter_map(inode).collect())
}

/// A process, if it is a worker of this controller and no zombie.
fn look_at(pid: i32, ours: &BTreeSet<String>, known: bool) -> io::Result<Option<Process>> {
    let directory = PathBuf::from(format!("/proc/{pid}"));
    let words = std::fs::read(directory.join("cmdline"))?;
    let words: Vec<_> = words.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
    let [program, verb, name, ..] = words.as_slice() else { return Ok(None) };
    if program != "ballast" || verb != "worker" {
        return Ok(None);
    }
    let status = std::fs::read_to_string(directory.join("status"))?;
    let parent = field(&status, "PPid:").and_then(|parent| parent.parse().ok());
    let mut process = Process { name: name.clone().into_owned(), ..Process::default() };
    let mut listens = false;
    for entry in std::fs::read_dir(directory.join("fd"))? {
        let Ok(target) = std::fs::read_link(entry?.path()) else { continue };
        let target = target.to_string_lossy();
        process.userfaultfds += usize::from(target == "anon_inode:[userfaultfd]");
        let inode = target.strip_prefix("socket:[").and_then(|inode| inode.strip_suffix(']'));
        listens |= inode.is_some_and(|inode| ours.contains(inode));
    }
    if !known && !listens && parent != Some(std::process::id()) {
        return Ok(None);
    }
    for entry in std::fs::read_dir(directory.join("task"))? {
        let Ok(status) = std::fs::read_to_string(entry?.path().join("status")) else { continue };
        process.threads += 1;
        process.free_threads += usize::from(!is_shut_in(&status));
    }
    Ok(Some(process))
}

/// Whether a thread has a filter of system calls, no capabilities, and no way to new ones.
fn is_shut_in(status: &str) -> bool {
    let capabilities = field(status, "CapEff:").is_some_and(|bits| bits.bytes().all(|bit| bit == b'0'));
    field(status, "Seccomp:") == Some("2") && field(status, "NoNewPrivs:") == Some("1") && capabilities
}

fn field<'t>(status: &'t str, key: &str) -> Option<&'t str> {
    status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(name: &str, pid: i32) -> Worker {
        Worker { name: name.to_owned(), pid, accounted: true, sandboxed: true }
    }

    fn process(name: &str) -> Process {
        Process { name: name.to_owned(), userfaultfds: 1, threads: 5, free_threads: 0 }
    }

    fn bad(findings: &[Finding]) -> Vec<(&str, &str)> {
        let bad = findings.iter().filter(|finding| !finding.ok);
        bad.map(|finding| (finding.name, finding.message.as_str())).collect()
    }

    #[test]
    fn what_is_wrong_with_a_process_is_found_by_its_name() {
        let seen = |processes: &[(i32, Process)]| Seen { workers: processes.iter().cloned().collect() };
        let known = [worker("web", 7)];
        assert_eq!(bad(&seen(&[(7, process("web"))]).findings(&known, &[])), []);
        let wrong = |processes: &[(i32, Process)]| {
            let findings = seen(processes).findings(&known, &[]);
            let [(name, message)] = bad(&findings)[..] else { panic!("{findings:?}") };
            format!("{name}: {message}")
        };
        assert_eq!(wrong(&[]), "workers: web: its worker 7 is not there any more");
        assert_eq!(wrong(&[(7, process("db"))]), "workers: web: its worker 7 was started for db");
        assert_eq!(
            wrong(&[(7, process("web")), (8, process("old"))]),
            "strangers: process 8 is a worker for \"old\" that nobody knows"
        );
        assert_eq!(
            wrong(&[(7, Process { free_threads: 2, ..process("web") })]),
            "sandbox: web: 2 of 5 threads of its worker 7 have no sandbox"
        );
        assert_eq!(
            wrong(&[(7, Process { userfaultfds: 0, ..process("web") })]),
            "untracked: web: it is accounted, and has 0 userfaultfds"
        );
        // Without accounting it is the other way round, and before its guest runs a worker is not shut in.
        let early = [Worker { accounted: false, sandboxed: false, ..worker("web", 7) }];
        let loading = |userfaultfds| seen(&[(7, Process { userfaultfds, free_threads: 5, ..process("web") })]);
        assert_eq!(bad(&loading(0).findings(&early, &[])), []);
        assert_eq!(bad(&loading(1).findings(&early, &[])).len(), 1);
    }

    #[test]
    fn a_thread_is_shut_in_when_all_three_hold() {
        let good = "Name:\tvcpu0\nCapEff:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n";
        assert!(is_shut_in(good));
        for (from, to) in [("Seccomp:\t2", "Seccomp:\t0"), ("NoNewPrivs:\t1", "NoNewPrivs:\t0"), ("0000\n", "0001\n")] {
            assert!(!is_shut_in(&good.replacen(from, to, 1)), "{to}");
        }
        assert!(!is_shut_in(""));
    }

    /// The pages that this test writes to, and no others of the range.
    #[test]
    fn present_pages_are_counted_from_the_page_tables() {
        let bytes = 4 << 20;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            let (none, flags) = (std::ptr::null_mut(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(none, bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: the mapping is ours and as long as this.
        unsafe { libc::madvise(start, bytes, libc::MADV_NOHUGEPAGE) };
        for page in [0, 3, 4, 1023] {
            // SAFETY: in the mapping.
            unsafe { start.cast::<u8>().add(page * 4096).write_volatile(1) };
        }
        let area = start as u64..start as u64 + bytes as u64;
        assert_eq!(present_pages(std::process::id() as i32, &[area]).unwrap(), Pages(4));
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(start, bytes) };
    }
}

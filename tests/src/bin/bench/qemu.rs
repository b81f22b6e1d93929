//! What a Linux guest has freed comes back to the host: by QEMU's balloon, and by ours.
//!
//! Both run the same kernel and the same init, with one vCPU. The guest touches memory and frees it; from then on QEMU's
//! host asks for it by balloon, and ours has it reported. It is over when the process that holds the guest has so much
//! less resident memory, which the host's kernel says of both.
//!
//! What is compared is how fast the memory falls once it does: Linux begins to report two seconds after pages were freed,
//! whoever listens, and how long its balloon takes to begin is printed too.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use ballast_tests::{TestVm, deadline, guest_file, lines, number, wait_until};
use serde_json::json;

use crate::vm::cpu_ms;
use crate::{Goal, MIB, Outcome, full, median, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 1] = ["R9"];

/// RAM of the guest, what it frees, what a balloon asks for, and what is to come back. A balloon may take first what the
/// guest has never touched, which is little: nothing comes back by that.
const SIZE: u64 = 384 * MIB;
const FREED: u64 = 288 * MIB;
const ASKED: u64 = 256 * MIB;
const BACK: u64 = 192 * MIB;
/// Seconds that a step of a guest may take.
const PATIENCE: u64 = 60;

/// Measures one of [`IDS`].
pub fn measure(_id: &str) -> Result<Outcome, String> {
    let modules = ["kvm_intel", "kvm_amd"].map(|module| Path::new("/sys/module").join(module));
    if !modules.iter().any(|module| module.exists()) {
        return Err("needs-a-KVM-that-runs-kernels".to_owned());
    }
    Command::new(QEMU).arg("--version").output().map_err(|_| format!("{QEMU}-is-missing"))?;
    Ok(end_to_end())
}

/// What has to be gone for it to have begun: more than a process frees by chance.
const BEGUN: u64 = 4 * MIB;

/// R9: how fast memory falls by our reports, over QEMU's balloon.
fn end_to_end() -> Outcome {
    let runs = pairs(full(3, 7), qemu, || ours(true));
    let asked: Vec<Run> = (0..runs.len()).map(|_| ours(false)).collect();
    let asked = |what: fn(&Run) -> f64| median(asked.iter().map(what));
    let gib = (BACK - BEGUN) as f64 / (1024.0 * MIB as f64);
    let of = |run: fn(&(Run, Run)) -> &Run, what: fn(&Run) -> f64| median(runs.iter().map(|pair| what(run(pair))));
    let [theirs, mine] = [of(|pair| &pair.0, Run::seconds), of(|pair| &pair.1, Run::seconds)];
    let notes = format!(
        "qemu_begins_s={:.3} report_begins_s={:.3} balloon_begins_s={:.3} qemu_s={theirs:.3} report_s={mine:.3} \
         balloon_s={:.3} over_balloon={:.2} gib_per_s={:.3} \
         qemu_cpu_s_per_gib={:.2} report_cpu_s_per_gib={:.2} balloon_cpu_s_per_gib={:.2} ",
        of(|pair| &pair.0, Run::begins),
        of(|pair| &pair.1, Run::begins),
        asked(Run::begins),
        asked(Run::seconds),
        theirs / asked(Run::seconds),
        gib / mine,
        of(|pair| &pair.0, |run| run.cpu) / gib,
        of(|pair| &pair.1, |run| run.cpu) / gib,
        asked(|run| run.cpu) / gib,
    );
    let values = runs.iter().map(|(qemu, ours)| qemu.seconds() / ours.seconds()).collect();
    let goal = Goal::AtLeast { floor: 1.5, target: 5.0 };
    Outcome { id: "R9", name: "balloon_end_to_end", unit: "x", goal, values, notes }
}

/// How long it took to begin, and from then on; and what the process that holds the guest computed meanwhile, the guest
/// included, in seconds.
struct Run {
    begins: Duration,
    time: Duration,
    cpu: f64,
}

impl Run {
    /// The time from the request to the first pages.
    fn begins(&self) -> f64 {
        self.begins.as_secs_f64()
    }

    /// The time in which the memory fell.
    fn seconds(&self) -> f64 {
        self.time.as_secs_f64()
    }
}

/// Resident memory of a process, in bytes.
fn resident(pid: u64) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

/// Asks for what the guest has just freed, and waits until the host has it.
fn comes_back(pid: u64, ask: impl FnOnce()) -> Run {
    let (begin, before, cpu) = (Instant::now(), resident(pid), cpu_ms(pid));
    ask();
    wait_until("the memory falls", PATIENCE, || (resident(pid) + BEGUN <= before).then_some(()));
    let begins = begin.elapsed();
    wait_until("the memory is back", PATIENCE, || (resident(pid) + BACK <= before).then_some(()));
    let time = begin.elapsed().saturating_sub(begins);
    Run { begins, time, cpu: (cpu_ms(pid) - cpu) as f64 / 1000.0 }
}

/// Ours, by reports or by balloon alone.
fn ours(report: bool) -> Run {
    let reporting = if report { "on" } else { "off" };
    let mut vm = TestVm::builder("bench")
        .kernel(&guest_file("vmlinux"))
        .option("--initrd", guest_file("initrd.img").to_string_lossy())
        .cmdline("quiet panic=-1 pci=off")
        .memory(&format!("size={}M,max={}M", SIZE / MIB, (SIZE + 64 * MIB) / MIB))
        .option("--balloon", format!("free_page_reporting={reporting}"))
        .start();
    vm.expect("READY", PATIENCE);
    let touched = vm.command(&format!("touch {FREED}"), PATIENCE);
    let freed = vm.command("free", PATIENCE);
    assert!(touched.starts_with("OK") && freed.starts_with("OK"), "{touched} {freed}");
    let now = vm.show();
    comes_back(number(&now, "pid"), || {
        if !report {
            // The answer comes when the limit is in force; what counts is what the host has.
            let (status, body) = vm.patch("?mode=reclaim&wait_ms=0", &json!({ "max_bytes": SIZE - ASKED }));
            assert!(status < 300, "{body}");
        }
    })
}

const QEMU: &str = "qemu-system-x86_64";

/// QEMU with a guest; killed when dropped.
struct Qemu {
    child: Child,
    console: ChildStdin,
    lines: Receiver<String>,
    monitor: BufReader<UnixStream>,
    _place: tempfile::TempDir,
}

impl Qemu {
    fn start() -> Self {
        let place = tempfile::Builder::new().prefix("bq").tempdir().expect("a temporary directory");
        let socket = place.path().join("qmp");
        let mut child = Command::new(QEMU)
            .args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-nodefaults", "-display", "none", "-no-reboot"])
            .args(["-m", &format!("{}M", SIZE / MIB), "-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio"])
            .arg("-kernel")
            .arg(guest_file("vmlinuz"))
            .arg("-initrd")
            .arg(guest_file("initrd.img"))
            .args(["-device", "virtio-balloon-pci", "-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("QEMU starts");
        let console = child.stdin.take().expect("piped");
        let lines = lines(child.stdout.take().expect("piped"), std::env::var_os("BALLAST_TEST_ECHO").is_some());
        let monitor = wait_until("QEMU listens", PATIENCE, || UnixStream::connect(&socket).ok());
        let mut qemu = Self { child, console, lines, monitor: BufReader::new(monitor), _place: place };
        qemu.hear();
        qemu.ask("qmp_capabilities", json!({}));
        qemu
    }

    /// The next line of the monitor.
    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.monitor.read_line(&mut line).expect("the monitor answers");
        line
    }

    /// A command of the monitor.
    fn ask(&mut self, command: &str, arguments: serde_json::Value) {
        let words = json!({ "execute": command, "arguments": arguments });
        writeln!(self.monitor.get_mut(), "{words}").expect("the monitor listens");
        // Events may come first.
        let answer = loop {
            let line = self.hear();
            if !line.contains("\"event\"") {
                break line;
            }
        };
        assert!(answer.contains("\"return\""), "{command}: {answer}");
    }

    /// Waits for a line of the console.
    fn expect(&self, prefix: &str) {
        let end = Instant::now() + deadline(PATIENCE);
        let next = || self.lines.recv_timeout(end.saturating_duration_since(Instant::now()));
        while !next().unwrap_or_else(|error| panic!("QEMU's guest: no {prefix} ({error})")).starts_with(prefix) {}
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// QEMU's, by balloon.
fn qemu() -> Run {
    let mut qemu = Qemu::start();
    qemu.expect("READY");
    for command in [&format!("touch {FREED}"), "free"] {
        writeln!(qemu.console, "{command}").expect("the console takes input");
        qemu.expect("OK");
    }
    let pid = qemu.child.id().into();
    comes_back(pid, || qemu.ask("balloon", json!({ "value": SIZE - ASKED })))
}

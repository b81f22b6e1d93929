//! What a VM costs beside its pages: R18 in user space, R19 in the kernel.
//!
//! Both are read from the kernel's own books, of a VM of 128 MiB with one vCPU. R18 from the mappings of the process, when
//! the guest has touched all of its RAM, so that the records of its pages are in use; R19 from the memory of a cgroup that
//! the process was born in, when the guest idles.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use ballast::controller::cgroup::Cgroups;
use ballast_tests::serve::Serve;
use ballast_tests::{number, payload, wait_until};
use serde_json::json;

use super::many::{Mode, first_instruction};
use super::{Goal, MIB, Outcome, full, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 2] = ["R18", "R19"];

/// RAM of every VM here.
const SIZE: u64 = 128 * MIB;

/// Measures one of [`IDS`], or says what this host lacks for it.
pub fn measure(id: &str) -> Result<Outcome, String> {
    if id == "R18" { user_memory() } else { kernel_memory() }
}

/// A figure of a VM whose guest has touched `touched` bytes.
fn ours(serve: &Serve, touched: u64, figure: &str) -> u64 {
    let cmdline = if touched > 0 { format!("touch 16M {}M seed=1; shell", touched / MIB) } else { "shell".to_owned() };
    let config = json!({
        "kernel": payload(), "cmdline": cmdline, "debug_port": true,
        "memory": { "size_bytes": SIZE, "max_bytes": 2 * SIZE },
    });
    serve.create_with("vm", &config);
    // It has run then, so its vCPU has what it runs with.
    wait_until("the guest has touched its RAM", 60, || {
        serve.raw("GET", "/vms/vm/console", None).1.contains("READY").then_some(())
    });
    let vm = serve.show("vm");
    assert!(number(&vm, "memory.stat.guest_bytes") >= touched, "{vm}");
    assert_eq!(serve.ask("DELETE", "/vms/vm", None).0, 204);
    number(&vm, figure)
}

/// R18: private memory of our process without guest RAM, over that of QEMU's microvm with a VM of the same size.
fn user_memory() -> Result<Outcome, String> {
    let found = Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status();
    if !found.is_ok_and(|status| status.success()) {
        return Err("no-qemu-system-x86_64-to-compare-with".to_owned());
    }
    let serve = Serve::start(&[]);
    let mut accelerator = "";
    let runs = pairs(
        full(5, 11),
        || {
            let (bytes, with) = qemu();
            accelerator = with;
            bytes
        },
        || ours(&serve, 111 * MIB, "overhead.measured.user_bytes"),
    );
    let (theirs, mine) = runs[runs.len() / 2];
    let notes = format!("bytes={mine} microvm_bytes={theirs} microvm_accel={accelerator} ");
    let values = runs.iter().map(|(theirs, mine)| *mine as f64 / *theirs as f64).collect();
    let goal = Goal::AtMost { floor: 0.4, target: 0.16 };
    Ok(Outcome { id: "R18", name: "user_memory", unit: "x", goal, values, notes })
}

/// Private dirty memory of QEMU with a microvm that is set up and has not run, without the guest's RAM. KVM where it
/// can; emulation otherwise, which has buffers of its own that a VM that has not run does not use.
fn qemu() -> (u64, &'static str) {
    for accelerator in ["kvm", "tcg"] {
        let place = tempfile::tempdir().expect("a temporary directory");
        let socket = place.path().join("qmp");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-M", "microvm", "-accel", accelerator, "-m", "128", "-smp", "1", "-nodefaults", "-display"]);
        command.args(["none", "-no-user-config", "-S", "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        let mut child = command.stderr(Stdio::null()).spawn().expect("it was there");
        let greeted = wait_until("QEMU answers or ends", 20, || {
            if child.try_wait().expect("our child").is_some() {
                return Some(false);
            }
            let mut stream = UnixStream::connect(&socket).ok()?;
            Some(stream.read(&mut [0; 64]).is_ok_and(|n| n > 0))
        });
        let bytes = private_dirty(child.id());
        end(&mut child);
        if greeted && bytes > 0 {
            return (bytes, accelerator);
        }
    }
    panic!("QEMU's microvm cannot be set up here");
}

fn end(child: &mut Child) {
    // One that has ended by itself is as good.
    let _ = child.kill();
    let _ = child.wait();
}

/// Private memory of a process that was written to, guest RAM aside: the mappings as large as it.
fn private_dirty(pid: u32) -> u64 {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let (mut total, mut size) = (0, 0);
    for line in smaps.lines() {
        let kib = |line: &str| line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0);
        if line.starts_with("Size:") {
            size = kib(line) << 10;
        } else if line.starts_with("Private_Dirty:") && size != SIZE {
            total += kib(line) << 10;
        }
    }
    total
}

/// R19: kernel memory of our VM over that of KVM's own calls up to a guest's first instruction: before it, a vCPU has not
/// allocated what it runs with. That instruction is in the mode in which our guests run: KVM with shadow paging keeps
/// 160 KiB more ready for a vCPU that pages. Without paging the bare one is in the notes.
fn kernel_memory() -> Result<Outcome, String> {
    let cgroups = Cgroups::find(None).map_err(|_| "no-cgroup-to-measure-in".to_owned())?;
    let serve = Serve::start(&["--cgroup", "auto"]);
    let unpaged = bare(&cgroups, "real");
    let runs = pairs(full(5, 11), || bare(&cgroups, "paged"), || ours(&serve, 0, "overhead.measured.kernel_bytes"));
    let (bare, mine) = runs[runs.len() / 2];
    let notes = format!("bytes={mine} bare_bytes={bare} unpaged_bare_bytes={unpaged} ");
    let values = runs.iter().map(|(bare, mine)| *mine as f64 / *bare as f64).collect();
    let goal = Goal::AtMost { floor: 1.3, target: 1.1 };
    Ok(Outcome { id: "R19", name: "kernel_memory", unit: "x", goal, values, notes })
}

/// Kernel memory of a process in a cgroup of its own that has a VM of the same size, in `mode`, and nothing else.
fn bare(cgroups: &Cgroups, mode: &str) -> u64 {
    let cgroup = cgroups.make("bare", 1 << 30).expect("a cgroup");
    let entrance = cgroup.entrance().expect("its entrance");
    let mut command = Command::new(std::env::current_exe().expect("a program has a path"));
    command.args(["child", "kept", mode]).stdin(Stdio::piped()).stdout(Stdio::piped());
    // SAFETY: one write of a constant, between fork and exec.
    unsafe {
        command.pre_exec(move || match libc::write(entrance.as_raw_fd(), c"0".as_ptr().cast(), 1) {
            1 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let mut child = command.spawn().expect("bench starts");
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().expect("piped"));
    output.read_line(&mut line).expect("it says that it is ready");
    assert_eq!(line.trim(), "ready");
    let bytes = cgroup.charged().expect("counted").kernel;
    drop(child.stdin.take());
    child.wait().expect("our child");
    cgroup.remove();
    bytes
}

/// The bare VM, in a process of its own: `words` are its arguments. It stays until its input is closed.
pub fn child(words: &[String]) -> bool {
    let mode = match words {
        [what, mode] if what == "kept" => {
            if mode == "paged" {
                Mode::Paged
            } else {
                Mode::Real
            }
        }
        _ => return false,
    };
    first_instruction(mode);
    println!("ready");
    // Whatever comes, it is the end.
    let _ = std::io::stdin().read(&mut [0; 1]);
    true
}

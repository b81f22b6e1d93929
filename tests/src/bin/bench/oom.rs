//! Memory that is short, and somebody who goes for it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ballast::worker::gate::monotonic_ns;
use ballast_tests::serve::{Console, Decider, Serve, pid};
use ballast_tests::{number, payload, wait_until};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::{Value, json};

use crate::{Goal, MIB, Outcome, full, median, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 3] = ["R16", "R17", "pause_evict"];

/// Memory of whoever goes in R17.
const SIZE: u64 = 1024 * MIB;

/// Measures one of [`IDS`].
pub fn measure(id: &str) -> Result<Outcome, String> {
    Ok(match id {
        "R16" => reaction(),
        "R17" => returned(),
        _ => emptied(),
    })
}

/// A part of a measurement that runs in a process of its own; `words` are its arguments. False when they are another's.
pub fn child(words: &[String]) -> bool {
    let [what, how] = words else { return false };
    match what.as_str() {
        "fat" => fat(how == "huge"),
        "busy" => busy(how.parse().unwrap_or(1)),
        _ => false,
    }
}

/// Writes to [`SIZE`] of memory once.
fn fat(huge: bool) -> ! {
    crate::vm::huge_pages(huge);
    const HUGE: usize = 2 << 20;
    let mut memory: Vec<u8> = Vec::with_capacity(SIZE as usize + HUGE);
    let start = memory.as_ptr().align_offset(HUGE);
    let memory = &mut memory.spare_capacity_mut()[start..][..SIZE as usize];
    // SAFETY: the memory is this process's, and nobody else's.
    let advised = unsafe { libc::madvise(memory.as_mut_ptr().cast(), memory.len(), libc::MADV_HUGEPAGE) };
    assert_eq!(advised, 0, "{}", std::io::Error::last_os_error());
    for (at, byte) in memory.iter_mut().enumerate() {
        byte.write((at % 251) as u8);
    }
    println!("ready");
    loop {
        std::thread::park();
    }
}

/// Has so many threads, one of which writes to memory all the time, and is named as a vCPU's is.
fn busy(threads: usize) -> ! {
    for _ in 2..threads {
        std::thread::spawn(|| {
            loop {
                std::thread::park();
            }
        });
    }
    let works = std::thread::Builder::new().name("vcpu0".to_owned()).spawn(|| {
        let mut memory = vec![0u8; 16 * MIB as usize];
        println!("ready");
        loop {
            memory.chunks_mut(4096).for_each(|page| page[0] = std::hint::black_box(page[0]).wrapping_add(1));
        }
    });
    works.expect("a thread").join().expect("it works for ever");
    unreachable!("it works for ever")
}

fn pidfd(pid: u32) -> OwnedFd {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process id");
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).expect("it runs")
}

/// The state of the thread of a worker that runs its vCPU.
fn vcpu_of(worker: u32) -> File {
    let threads = std::fs::read_dir(format!("/proc/{worker}/task")).expect("it runs").flatten();
    let is_vcpu =
        |path: &PathBuf| std::fs::read_to_string(path.join("comm")).is_ok_and(|name| name.starts_with("vcpu"));
    let vcpu = threads.map(|thread| thread.path()).find(is_vcpu).expect("it has a vCPU");
    File::open(vcpu.join("stat")).expect("it runs")
}

/// When a thread has stopped for good, on the host's monotonic clock: the kernel has begun to end it, or it is gone. Looked at
/// every 100 µs, because there are not many CPUs and each look takes some of the time that is measured.
fn end_of(thread: &File) -> u64 {
    let mut text = [0; 512];
    loop {
        let length = thread.read_at(&mut text, 0).unwrap_or(0);
        let text = String::from_utf8_lossy(&text[..length]);
        // The seventh behind the name: flags, of which this one says that the thread is ending.
        let flags = text.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6)?.parse::<u64>().ok());
        if flags.is_none_or(|flags| flags & PF_EXITING != 0) {
            return monotonic_ns();
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// `PF_EXITING` of `include/linux/sched.h`.
const PF_EXITING: u64 = 4;

/// A guest that takes words, and runs.
fn guest(serve: &Serve, name: &str, group: &str, size: u64, oom: &Value) -> (Value, Console) {
    let config = json!({
        "kernel": payload(), "cmdline": "shell", "debug_port": true, "group": group, "oom": oom,
        "memory": { "size_bytes": size, "track": true, "swap_max_bytes": 0, "ageing_s": 0 },
    });
    let view = serve.create_with(name, &config);
    let console = Console::of(&view);
    console.expect("READY", 20);
    (view, console)
}

fn good(serve: &Serve, method: &str, path: &str, body: Option<&Value>) -> Value {
    let (status, answer) = serve.ask(method, path, body);
    assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
    answer
}

/// From SIGKILL until the thread that works has stopped for good, of a process with so many threads that is no VM, in ms.
fn plain(threads: usize) -> f64 {
    let child = Plain::start("busy", &threads.to_string());
    let (process, works) = (pidfd(child.0.id()), vcpu_of(child.0.id()));
    let begin = monotonic_ns();
    rustix::process::pidfd_send_signal(&process, Signal::KILL).expect("it runs");
    end_of(&works).saturating_sub(begin) as f64 / 1e6
}

/// R16: the time from a touch that does not fit into a full group until the vCPU of another VM of it, the one that the rules
/// choose, has left the guest for good. Beside it is what the last step takes of a process that is no VM, on the same host at the
/// same time: a host on which SIGKILL takes milliseconds to arrive stops no VM sooner.
fn reaction() -> Outcome {
    let serve = Serve::start(&[]);
    let (_, mut asks) = guest(&serve, "asks", "/", 4096 * MIB, &json!({ "deadline_ms": 0, "preference": "omit" }));
    let (mut ms, mut kill_ms) = (Vec::new(), Vec::new());
    for round in 0..full(60, 240) as u64 {
        // In each group only one in ten seconds is chosen.
        let (group, path) = (format!("/g{round}"), format!("/groups/g{round}"));
        good(&serve, "PUT", &path, Some(&json!({ "max_bytes": 1024 * MIB })));
        good(&serve, "POST", "/vms/asks/move", Some(&json!({ "group": group })));
        let (view, mut goes) = guest(&serve, "goes", &group, 64 * MIB, &json!({ "action": "kill" }));
        goes.ok("touch 16M 16M");
        goes.send("access hot 16M 16M period=100");
        goes.expect("ACCESS", 20);
        // What nobody uses comes back first, so that the next touch does not fit.
        let usage = || number(&good(&serve, "GET", &path, None), "memory.current_bytes");
        wait_until("there is no room", 20, || {
            let stock = || ["goes", "asks"].map(|name| number(&serve.show(name), "memory.stat.stock_bytes"));
            let max = usage() - stock().iter().sum::<u64>();
            good(&serve, "PATCH", &format!("{path}?mode=force"), Some(&json!({ "max_bytes": max })));
            (stock() == [0, 0] && usage() == max).then_some(())
        });
        // Who was given memory a moment ago would be waited for: more may be on its way.
        asks.ok("wait 200");
        let vcpu = vcpu_of(pid(&view));
        let threads = std::fs::read_dir(format!("/proc/{}/task", pid(&view))).expect("it runs").count();
        asks.send(&format!("touch {}M 2M mark=1", 16 + 16 * round));
        let end = end_of(&vcpu);
        // The first touches are served from the reserve, and those after the crossing with the memory that comes back.
        let mark = || {
            let line = asks.expect("MARK 1 ", 20);
            line.split(' ').nth(2).and_then(|ns| ns.parse::<u64>().ok()).expect("a mark has its time")
        };
        let before = std::iter::repeat_with(mark).take_while(|ns| *ns < end);
        let crossed = before.last().expect("it was touched before anybody went");
        ms.push((end - crossed) as f64 / 1e6);
        asks.expect("OK", 20);
        good(&serve, "DELETE", "/vms/goes", None);
        kill_ms.push(plain(threads));
    }
    let at = |ms: &mut Vec<f64>, per_cent: usize| {
        ms.sort_by(f64::total_cmp);
        ms[(ms.len() * per_cent).div_ceil(100).saturating_sub(1)]
    };
    let mut notes = format!("p50={:.3} p90={:.3} worst={:.3} ", at(&mut ms, 50), at(&mut ms, 90), at(&mut ms, 100));
    let kill = [50, 90, 99].map(|per_cent| at(&mut kill_ms, per_cent));
    notes +=
        &format!("kill_p50={:.3} kill_p90={:.3} kill_p99={:.3} crossings={} ", kill[0], kill[1], kill[2], ms.len());
    let goal = Goal::AtMost { floor: 10.0, target: 1.0 };
    Outcome { id: "R16", name: "oom_reaction", unit: "ms", goal, values: vec![at(&mut ms, 99)], notes }
}

/// R17: the time from the decision to kill a VM until its memory is back, for a GiB, against the same of a process. The VM is on
/// huge pages, as any charged VM where the host gives some; the process is not, as any that does not ask for them. Both the other
/// way round are printed too.
fn returned() -> Outcome {
    let serve = |huge| {
        // Workers have from the controller whether they may use huge pages.
        crate::vm::huge_pages(huge);
        let serve = Serve::start(&[]);
        crate::vm::huge_pages(false);
        good(&serve, "PUT", "/groups/g", Some(&json!({})));
        serve
    };
    let (huge, small) = (serve(true), serve(false));
    let runs = pairs(full(5, 15), || ours(&huge), || raw("small"));
    let other = pairs(full(3, 7), || ours(&small), || raw("huge"));
    let ms = |ns: f64| ns / 1e6;
    let middle = |runs: &[(f64, f64)], which: fn(&(f64, f64)) -> f64| ms(median(runs.iter().map(which)));
    let notes = format!(
        "ms_per_gib={:.2} raw_ms_per_gib={:.2} small_ms_per_gib={:.2} raw_huge_ms_per_gib={:.2} ",
        middle(&runs, |run| run.0),
        middle(&runs, |run| run.1),
        middle(&other, |run| run.0),
        middle(&other, |run| run.1),
    );
    let values = runs.iter().map(|(ours, raw)| ours / raw).collect();
    Outcome {
        id: "R17",
        name: "oom_returned",
        unit: "x",
        goal: Goal::AtMost { floor: 1.5, target: 1.1 },
        values,
        notes,
    }
}

/// From the request to kill a VM of a GiB until nothing of it is charged any more.
fn ours(serve: &Serve) -> f64 {
    let (_, mut console) = guest(serve, "fat", "/g", SIZE + 32 * MIB, &json!({}));
    console.ok(&format!("touch 16M {}M fill=full", SIZE / MIB));
    let begin = monotonic_ns();
    good(serve, "POST", "/vms/fat/kill", None);
    wait_until("its memory is back", 20, || {
        (number(&good(serve, "GET", "/groups/g", None), "memory.current_bytes") == 0).then_some(())
    });
    let took = monotonic_ns() - begin;
    good(serve, "DELETE", "/vms/fat", None);
    took as f64
}

/// From SIGKILL until a process of a GiB is gone, with its memory taken from it meanwhile.
fn raw(pages: &str) -> f64 {
    let mut child = Plain::start("fat", pages);
    let process = pidfd(child.0.id());
    let begin = monotonic_ns();
    rustix::process::pidfd_send_signal(&process, Signal::KILL).expect("it runs");
    // SAFETY: the call takes numbers. It fails when there is nothing left to take.
    unsafe { libc::syscall(libc::SYS_process_mrelease, process.as_fd().as_raw_fd(), 0) };
    child.0.wait().expect("our child");
    (monotonic_ns() - begin) as f64
}

/// A process that goes, and is no VM.
struct Plain(Child);

impl Plain {
    fn start(what: &str, how: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("a program has a path"));
        let mut child = command.args(["child", what, how]).stdout(Stdio::piped()).spawn().expect("bench starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("it says when it is ready");
        Self(child)
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the guest of `pause_evict` has written to, and the part of it that may be left when it counts as empty.
const WRITTEN: u64 = 768 * MIB;
const LEFT: u64 = WRITTEN / 16;
/// What is promised to it: nearly all that it uses then, so its group takes no more than a few MiB from it.
const PROMISED: u64 = WRITTEN + 16 * MIB;

/// `pause_evict`: GiB/s at which a VM is emptied that was paused because its group is full, from the decision on, over those at which
/// as much is taken from one like it that runs and does nothing. Half of each page is data, half of it zeroes.
fn emptied() -> Outcome {
    let runs = pairs(full(5, 11), taken, paused);
    let of = |what: fn(&(f64, f64)) -> f64| median(runs.iter().map(what));
    let notes = format!("gib_per_s={:.2} alone_gib_per_s={:.2} ", of(|run| run.1), of(|run| run.0));
    let values = runs.iter().map(|(alone, paused)| paused / alone).collect();
    let goal = Goal::AtLeast { floor: 0.9, target: 1.0 };
    Outcome { id: "pause_evict", name: "pause_throughput", unit: "x", goal, values, notes }
}

/// The guest, in a group of its own in which nobody can take from it.
fn promised(serve: &Serve) -> Console {
    good(serve, "PUT", "/groups/g", Some(&json!({ "max_bytes": 2 * WRITTEN })));
    let config = json!({
        "kernel": payload(), "cmdline": "shell", "debug_port": true, "group": "/g",
        "memory": { "size_bytes": WRITTEN + 32 * MIB, "min_bytes": PROMISED, "track": true, "swap_max_bytes": null },
    });
    let mut console = Console::of(&serve.create_with("gives", &config));
    console.expect("READY", 20);
    console.ok(&format!("touch 16M {}M seed=1 fill=half", WRITTEN / MIB));
    console
}

/// GiB/s of what is evicted of the guest from now on, once `begin` has been called, until it is empty.
fn rate(serve: &Serve, begin: impl FnOnce()) -> f64 {
    let before = number(&serve.show("gives"), "cold.evicted_bytes");
    let start = monotonic_ns();
    begin();
    loop {
        // Seldom: who answers is who evicts.
        std::thread::sleep(Duration::from_millis(20));
        let (now, at) = (serve.show("gives"), monotonic_ns());
        if number(&now, "memory.stat.guest_bytes") <= LEFT {
            let evicted = number(&now, "cold.evicted_bytes") - before;
            return evicted as f64 / (1024 * MIB) as f64 / ((at - start) as f64 / 1e9);
        }
        assert!(at - start < ballast_tests::deadline(60).as_nanos() as u64, "it is not emptied: {now}");
    }
}

/// The eviction alone: it runs, and somebody asks for all that it has.
fn taken() -> f64 {
    let serve = &Serve::start(&[]);
    let _console = promised(serve);
    std::thread::scope(|scope| {
        let rate = rate(serve, || {
            // Answered when there is no more to be had, which nobody waits for.
            let all = format!("/vms/gives/reclaim?bytes={}&wait_ms=60000", 2 * WRITTEN);
            scope.spawn(move || serve.ask("POST", &all, None));
        });
        good(serve, "POST", "/vms/gives/kill", None);
        rate
    })
}

/// The same by a pause: another VM in its group is held, and a client decides.
fn paused() -> f64 {
    let serve = Serve::start(&[]);
    let mut client = Decider::register(&serve, 60_000);
    let _console = promised(&serve);
    let (_, mut asks) = guest(&serve, "asks", "/g", 96 * MIB, &json!({ "deadline_ms": 0, "preference": "omit" }));
    let usage = number(&good(&serve, "GET", "/groups/g", None), "memory.current_bytes");
    good(&serve, "PATCH", "/groups/g?mode=force", Some(&json!({ "max_bytes": usage })));
    // More than is charged ahead of need, which comes back first.
    asks.send("touch 16M 64M");
    let question = client.question();
    assert_eq!(question["level"], "/g", "{question}");
    rate(&serve, || {
        let answer = json!({ "answer": "pause", "vm": "gives" });
        good(&serve, "POST", &format!("/oom/decisions/{}", question["id"]), Some(&answer));
    })
}

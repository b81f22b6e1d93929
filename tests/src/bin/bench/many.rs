//! Figures of a controller with many VMs: how fast one is made, what idle ones cost, how fast a limit is set.
//!
//! Everything is asked of a `ballast serve` of its own over HTTP, as a user would. The baselines are measured between
//! our runs: KVM's own calls up to the first instruction of a guest, and a socket that only echoes.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ballast::worker::gate::monotonic_ns;
use ballast_tests::serve::Serve;
use ballast_tests::{number, wait_until};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use serde_json::{Value, json};

use crate::{Goal, MIB, Outcome, full, median};

/// The ids that are measured here.
pub const IDS: [&str; 7] = ["R25", "create_rate", "create_rate8", "R26", "R27", "fleet50", "fleet500"];

/// RAM of the VMs here.
const SIZE: u64 = 128 * MIB;

/// How long idle VMs are watched.
const WATCHED: Duration = Duration::from_secs(10);

/// A guest that says once that it runs, and waits for ever: `mark 1`, then the waiting port again and again.
const QUIET_GUEST: [u8; 38] = [
    b'B', b'A', b'L', b'L', b'A', b'S', b'T', b'1', 16, 0, 0, 0, 38, 0, 0, 0, // entry at 16, 38 bytes
    0x66, 0xba, 0x0c, 0x05, // mov dx, 0x50c
    0xb8, 1, 0, 0, 0,    // mov eax, 1
    0xef, // out dx, eax
    0x66, 0xba, 0x08, 0x05, // mov dx, 0x508
    0xb8, 0xff, 0xff, 0xff, 0xff, // mov eax, -1
    0xef, // out dx, eax
    0xeb, 0xfd, // jmp to the out
];

/// Measures one of [`IDS`].
pub fn measure(id: &str) -> Outcome {
    // What else the machine does is not what is measured; everybody started from here inherits it.
    schedule(libc::SCHED_FIFO, 10);
    let outcome = outcome(id);
    schedule(libc::SCHED_OTHER, 0);
    outcome
}

/// Sets how this thread is scheduled, as far as that is allowed.
fn schedule(policy: libc::c_int, priority: libc::c_int) {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the call reads the parameters.
    let _ = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
}

fn outcome(id: &str) -> Outcome {
    match id {
        "R25" => create(),
        "create_rate" => create_rate("create_rate", 1),
        "create_rate8" => create_rate("create_rate8", 8),
        "R26" => idle(),
        "R27" => set_limit(),
        "fleet50" => fleet("fleet50", 50),
        _ => fleet("fleet500", 500),
    }
}

/// A part of a measurement that runs in a process of its own; `words` are its arguments.
pub fn child(words: &[String]) -> bool {
    match words {
        [what] if what == "first_instruction" => println!("{}", first_instruction(Mode::Real)),
        [what, socket, request, answer] if what == "echo" => {
            echo(Path::new(socket), request.parse().expect("a number"), answer.parse().expect("a number"));
        }
        _ => return false,
    }
    true
}

/// A controller with the guest that its VMs run.
struct Host {
    serve: Serve,
    guest: PathBuf,
}

impl Host {
    fn start() -> Self {
        let serve = Serve::start(&[]);
        let guest = serve.place().join("quiet.bin");
        std::fs::write(&guest, QUIET_GUEST).expect("the guest is written");
        // The first VM pays for what is measured and read once.
        let host = Self { serve, guest };
        let mut client = host.client();
        host.make(&mut client, "first");
        host.unmake(&mut client, "first");
        host
    }

    fn client(&self) -> Client {
        Client::new(&self.serve.socket())
    }

    fn make(&self, client: &mut Client, name: &str) -> Value {
        let vm = json!({
            "kernel": self.guest, "debug_port": true,
            "memory": { "size_bytes": SIZE, "max_bytes": SIZE * 3 / 4 },
        });
        let (status, view) = client.ask("PUT", &format!("/vms/{name}"), &vm.to_string());
        assert_eq!(status, 201, "{view}");
        serde_json::from_str(&view).expect("JSON")
    }

    fn unmake(&self, client: &mut Client, name: &str) {
        let (status, answer) = client.ask("DELETE", &format!("/vms/{name}"), "");
        assert_eq!(status, 204, "{answer}");
    }

    /// When the guest executed its first instruction that can be seen, on the host's clock.
    fn first_mark(&self, client: &mut Client, name: &str) -> u64 {
        wait_until("the guest has said that it runs", 20, || {
            let (_, text) = client.ask("GET", &format!("/vms/{name}/console"), "");
            text.lines().find_map(|line| line.strip_prefix("MARK 1 ")?.trim().parse().ok())
        })
    }
}

/// One kept-alive connection.
struct Client {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Client {
    fn new(socket: &Path) -> Self {
        Self { stream: UnixStream::connect(socket).expect("the controller listens"), buffer: vec![0; 1 << 20] }
    }

    /// One request: status and body.
    fn ask(&mut self, method: &str, path: &str, body: &str) -> (u16, String) {
        let request = request(method, path, body);
        self.stream.write_all(request.as_bytes()).expect("the controller reads");
        let mut got = 0;
        loop {
            let n = self.stream.read(&mut self.buffer[got..]).expect("the controller answers");
            assert!(n > 0, "{method} {path}: the connection was closed");
            got += n;
            let Some(head) = self.buffer[..got].windows(4).position(|w| w == b"\r\n\r\n") else { continue };
            let text = String::from_utf8_lossy(&self.buffer[..head]).to_ascii_lowercase();
            let status = text.split_ascii_whitespace().nth(1).and_then(|s| s.parse().ok()).expect("a status");
            let length = text.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
            let end = head + 4 + length.unwrap_or(0usize);
            if got >= end {
                assert_eq!(got, end, "one answer to one request");
                return (status, String::from_utf8_lossy(&self.buffer[head + 4..end]).into_owned());
            }
        }
    }
}

fn request(method: &str, path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "{method} {path} HTTP/1.1\r\nHost: ballast\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

/// A B B A …: ours and the baseline, as pairs.
fn interleaved(n: usize, mut ours: impl FnMut() -> f64, mut base: impl FnMut() -> f64) -> Vec<(f64, f64)> {
    crate::pairs(n, &mut base, &mut ours).into_iter().map(|(base, ours)| (ours, base)).collect()
}

/// R25: from the request for a VM to its guest's first instruction, over KVM's own calls for that.
fn create() -> Outcome {
    let host = Host::start();
    let mut client = host.client();
    let mut n = 0;
    let ours = || {
        n += 1;
        let name = format!("vm{n}");
        let asked = monotonic_ns();
        host.make(&mut client, &name);
        let ran = host.first_mark(&mut client, &name);
        host.unmake(&mut client, &name);
        (ran - asked) as f64
    };
    let runs = interleaved(full(31, 101), ours, || own("first_instruction"));
    let notes = format!(
        "ours_ms={:.2} bare_ms={:.2} ",
        median(runs.iter().map(|(ours, _)| ours / 1e6)),
        median(runs.iter().map(|(_, bare)| bare / 1e6)),
    );
    let goal = Goal::AtMost { floor: 20.0, target: 5.0 };
    Outcome { id: "R25", name: "create_to_first_instruction", unit: "x", goal, values: ratios(&runs), notes }
}

/// Ours over the other's, run by run.
fn ratios(runs: &[(f64, f64)]) -> Vec<f64> {
    runs.iter().map(|(ours, other)| ours / other).collect()
}

/// VMs a second that `clients` make, each one after the other, until the answer that the guest runs.
fn create_rate(id: &'static str, clients: usize) -> Outcome {
    let host = Host::start();
    let each = full(64, 256) / clients;
    let mut values = Vec::new();
    for _ in 0..full(3, 5) {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for client in 0..clients {
                let host = &host;
                scope.spawn(move || {
                    let mut connection = host.client();
                    (0..each).for_each(|i| drop(host.make(&mut connection, &format!("c{client}-{i}"))));
                });
            }
        });
        values.push((each * clients) as f64 / begin.elapsed().as_secs_f64());
        let mut client = host.client();
        for name in host.serve.names() {
            host.unmake(&mut client, &name);
        }
    }
    let notes = format!("vms={} clients={clients} ", each * clients);
    Outcome { id, name: id, unit: "per_s", goal: Goal::AtLeast { floor: 100.0, target: 150.0 }, values, notes }
}

/// R26: how often idle VMs and their controller wake, for each VM and second.
fn idle() -> Outcome {
    let host = Host::start();
    let vms = full(20, 100);
    let mut client = host.client();
    let workers: Vec<u64> = (0..vms).map(|i| number(&host.make(&mut client, &format!("vm{i}")), "pid")).collect();
    let all = || -> Vec<u64> { workers.iter().copied().chain([u64::from(host.serve.pid())]).collect() };
    settle(&workers);
    let mut ours = 0.0;
    let values = (0..full(2, 6))
        .map(|_| {
            let (before, controller) = (wakes(&all()), wakes(&[u64::from(host.serve.pid())]));
            // Idleness is watched for a time, there is nothing to wait for.
            std::thread::sleep(WATCHED);
            let seconds = WATCHED.as_secs_f64();
            ours = (wakes(&[u64::from(host.serve.pid())]) - controller) as f64 / seconds;
            (wakes(&all()) - before) as f64 / vms as f64 / seconds
        })
        .collect();
    Outcome {
        id: "R26",
        name: "idle_wakes",
        unit: "per_s",
        goal: Goal::AtMost { floor: 1.0, target: 0.1 },
        values,
        notes: format!("vms={vms} controller_per_s={ours:.2} "),
    }
}

/// Waits until nobody in these workers has run for a while. The controller of many audits one of them at any time.
fn settle(workers: &[u64]) {
    wait_until("idle VMs are idle", 60, || {
        let before = wakes(workers);
        std::thread::sleep(Duration::from_millis(500));
        (wakes(workers) - before <= 2).then_some(())
    });
}

/// How often the threads of these processes have been switched away from so far.
fn wakes(processes: &[u64]) -> u64 {
    let of = |pid: &u64| -> u64 {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        threads
            .filter_map(|thread| std::fs::read_to_string(thread.path().join("status")).ok())
            .flat_map(|text| {
                text.lines()
                    .filter_map(|line| line.split_once("ctxt_switches:")?.1.trim().parse().ok())
                    .collect::<Vec<u64>>()
            })
            .sum()
    };
    processes.iter().map(of).sum()
}

/// R27: raising a limit over a kept-alive connection, over an echo of as many bytes between two processes that are on
/// the same CPUs.
fn set_limit() -> Outcome {
    const BATCH: u64 = 200;
    let host = Host::start();
    let mut client = host.client();
    host.make(&mut client, "vm");
    let mut max = SIZE * 3 / 4;
    let path = "/vms/vm/memory";
    let body = |max: u64| json!({ "max_bytes": max }).to_string();
    let answer = client.ask("PATCH", path, &body(max)).1.len() + 120;
    let asked = request("PATCH", path, &body(max)).len();
    let socket = host.serve.place().join("echo.sock");
    let echo = Echo::start(&socket, asked, answer);
    let mut plain = echo.client(&socket);
    let bytes = vec![b'x'; asked];
    let mut back = vec![0; answer];
    let mut both = |ours_at: usize, n: usize| -> Vec<(f64, f64)> {
        bind(0, 0);
        bind(host.serve.pid(), ours_at);
        bind(echo.0.id(), ours_at);
        let ours = || {
            let begin = monotonic_ns();
            for _ in 0..BATCH {
                max += 4096;
                let (status, view) = client.ask("PATCH", path, &body(max));
                assert_eq!(status, 200, "{view}");
            }
            (monotonic_ns() - begin) as f64 / BATCH as f64
        };
        let base = || {
            let begin = monotonic_ns();
            for _ in 0..BATCH {
                plain.write_all(&bytes).expect("the echo reads");
                plain.read_exact(&mut back).expect("the echo answers");
            }
            (monotonic_ns() - begin) as f64 / BATCH as f64
        };
        interleaved(n, ours, base)
    };
    let same = both(0, full(7, 15));
    let runs = both(1, full(15, 41));
    let us = |runs: &[(f64, f64)], which: fn(&(f64, f64)) -> f64| median(runs.iter().map(which)) / 1000.0;
    let notes = format!(
        "ours_us={:.1} echo_us={:.1} one_cpu={:.2} one_cpu_ours_us={:.1} one_cpu_echo_us={:.1} bytes={asked}+{answer} ",
        us(&runs, |run| run.0),
        us(&runs, |run| run.1),
        median(same.iter().map(|(ours, echo)| ours / echo)),
        us(&same, |run| run.0),
        us(&same, |run| run.1),
    );
    let goal = Goal::AtMost { floor: 3.0, target: 1.5 };
    Outcome { id: "R27", name: "set_limit_round_trip", unit: "x", goal, values: ratios(&runs), notes }
}

/// Binds all threads of a process (0: this thread) to a CPU, as far as there is one of that number.
fn bind(pid: u32, cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    let threads = match pid {
        0 => vec![None],
        pid => {
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
            let ids = tasks.filter_map(|task| task.file_name().to_str()?.parse().ok());
            ids.map(rustix::process::Pid::from_raw).collect()
        }
    };
    for thread in threads {
        // A host with one CPU has only one placement.
        let _ = rustix::thread::sched_setaffinity(thread, &set);
    }
}

/// A process that answers so many bytes for so many bytes.
struct Echo(Child);

impl Echo {
    fn start(socket: &Path, request: usize, answer: usize) -> Self {
        let me = std::env::current_exe().expect("a program has a path");
        let mut command = Command::new(me);
        command.arg("child").arg("echo").arg(socket).args([request.to_string(), answer.to_string()]);
        Self(command.spawn().expect("bench starts"))
    }

    fn client(&self, socket: &Path) -> UnixStream {
        wait_until("the echo listens", 10, || UnixStream::connect(socket).ok())
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn echo(socket: &Path, request: usize, answer: usize) {
    let listener = UnixListener::bind(socket).expect("a new socket");
    let mut stream = listener.accept().expect("a client").0;
    let (mut question, reply) = (vec![0; request], vec![b'y'; answer]);
    while stream.read_exact(&mut question).is_ok() && stream.write_all(&reply).is_ok() {}
}

/// Runs a part in a process of its own: KVM's descriptors cannot be closed in this one.
fn own(what: &str) -> f64 {
    let me = std::env::current_exe().expect("a program has a path");
    let output = Command::new(me).args(["child", what]).stderr(Stdio::inherit()).output().expect("bench starts");
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().unwrap_or_else(|_| panic!("{what} said `{}`", text.trim()))
}

/// How the bare guest's vCPU begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As after a reset: nothing to set up, and KVM needs no page tables of its own.
    Real,
    /// As our guests begin, in 64-bit mode: a KVM with shadow paging keeps its vCPU ready to shadow page tables.
    Paged,
}

/// Puts a vCPU into 64-bit user mode, over the tables at `tables` that map the first 2 MiB.
fn page(sregs: &mut kvm_sregs, tables: u64) {
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = flat(0x2b, 0x3);
    sregs.cs = kvm_segment { l: 1, db: 0, ..flat(0x33, 0xb) };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // With the permission bitmap of a task state segment at 0 that permits every port.
    sregs.tr = kvm_segment { limit: 0xffff, type_: 0xb, present: 1, ..Default::default() };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8005_0033, tables, 0x220, 0xd01);
}

/// What nobody can be faster than: KVM's own calls for a VM with interrupt controllers, memory and a vCPU, up to the
/// exit of its first instruction. In nanoseconds.
pub fn first_instruction(mode: Mode) -> u64 {
    // out dx, al
    const CODE: u8 = 0xee;
    const AT: u64 = 0x1000;
    const TABLES: u64 = 0x3000;
    let kvm = Kvm::new().expect("KVM");
    let begin = monotonic_ns();
    // SAFETY: a new mapping that touches nothing that exists.
    let ram = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), SIZE as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_ne!(ram, libc::MAP_FAILED, "memory");
    let vm = kvm.create_vm().expect("a VM");
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: SIZE,
        userspace_addr: ram as u64,
    };
    // SAFETY: the mapping is for the guest alone and stays until the process ends.
    unsafe { vm.set_user_memory_region(region) }.expect("a slot");
    vm.create_irq_chip().expect("interrupt controllers");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    // SAFETY: the address is in the mapping.
    unsafe { ram.cast::<u8>().add(AT as usize).write_volatile(CODE) };
    let mut sregs = vcpu.get_sregs().expect("registers");
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    if mode == Mode::Paged {
        // Present, writable, for the user; the last one maps 2 MiB.
        for (table, entry) in [(0, (TABLES + 0x1000) | 7), (1, (TABLES + 0x2000) | 7), (2, 0x87)] {
            // SAFETY: the address is in the mapping, and aligned.
            unsafe { ram.cast::<u8>().add((TABLES + table * 0x1000) as usize).cast::<u64>().write_volatile(entry) };
        }
        // A processor that is described has 64-bit mode.
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
        vcpu.set_cpuid2(&cpuid).expect("CPUID");
        page(&mut sregs, TABLES);
    }
    vcpu.set_sregs(&sregs).expect("registers");
    let mut regs = vcpu.get_regs().expect("registers");
    // With ports allowed to the user.
    let flags = if mode == Mode::Paged { 0x3002 } else { 2 };
    (regs.rip, regs.rflags, regs.rdx) = (AT, flags, 0x3f8);
    vcpu.set_regs(&regs).expect("registers");
    match vcpu.run().expect("the guest runs") {
        VcpuExit::IoOut(0x3f8, _) => {}
        other => panic!("the guest's first instruction: {other:?}"),
    }
    let ns = monotonic_ns() - begin;
    // KVM's descriptors are never closed in a live process.
    std::mem::forget((vcpu, vm, kvm));
    ns
}

/// What a VM costs when there are many: the time to make the last ones, and from the host's books before and after.
fn fleet(id: &'static str, vms: usize) -> Outcome {
    let host = Host::start();
    let mut client = host.client();
    let controller = u64::from(host.serve.pid());
    let before = kernel_bytes();
    let (own_before, cpu_before) = (private_bytes(controller), cpu_ns(controller));
    let mut workers = Vec::new();
    let mut times = Vec::new();
    for i in 0..vms {
        let begin = Instant::now();
        workers.push(number(&host.make(&mut client, &format!("vm{i}")), "pid"));
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
    }
    let all: Vec<u64> = workers.iter().copied().chain([controller]).collect();
    settle(&workers);
    let made_cpu = cpu_ns(controller) - cpu_before;
    let kernel = (kernel_bytes() - before) / vms as f64;
    let guests: u64 = guest_bytes(&mut client);
    let worker = (workers.iter().map(|pid| private_bytes(*pid)).sum::<f64>() - guests as f64) / vms as f64;
    let of_controller = (private_bytes(controller) - own_before) / vms as f64;
    let (wakes_before, ns_before, ns_controller) = (wakes(&all), all_cpu_ns(&all), cpu_ns(controller));
    std::thread::sleep(WATCHED);
    let seconds = WATCHED.as_secs_f64();
    let per_vm = |value: f64| value / vms as f64 / seconds;
    let rate = per_vm((wakes(&all) - wakes_before) as f64);
    let cpu_us = per_vm((all_cpu_ns(&all) - ns_before) / 1000.0);
    let controller_us = (cpu_ns(controller) - ns_controller) / 1000.0 / seconds;
    let mut shows: Vec<f64> = Vec::new();
    for i in 0..100 {
        let begin = Instant::now();
        let (status, _) = client.ask("GET", &format!("/vms/vm{}", i * vms / 100), "");
        assert_eq!(status, 200);
        shows.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    let begin = Instant::now();
    let listed = client.ask("GET", "/vms", "").1.len();
    let list_ms = begin.elapsed().as_secs_f64() * 1000.0;
    let last = &times[vms - vms / 10..];
    let notes = format!(
        "vms={vms} worker_kib={:.0} controller_kib={:.1} kernel_kib={:.0} fds={} controller_fds={} threads={} \
         controller_threads={} wakes_per_s={rate:.3} cpu_us_per_s={cpu_us:.1} controller_cpu_us_per_s={controller_us:.0} \
         make_ms={:.2} last_make_ms={:.2} make_controller_ms={:.2} show_us={:.0} list_ms={list_ms:.1} list_kib={} ",
        worker / 1024.0,
        of_controller / 1024.0,
        kernel / 1024.0,
        entries(workers[0], "fd"),
        entries(controller, "fd"),
        entries(workers[0], "task"),
        entries(controller, "task"),
        median(times.iter().copied()),
        median(last.iter().copied()),
        made_cpu / 1e6 / vms as f64,
        median(shows.into_iter()),
        listed / 1024,
    );
    Outcome {
        id,
        name: "idle_vm_bytes",
        unit: "bytes",
        goal: Goal::AtMost { floor: 8.0 * MIB as f64, target: 4.0 * MIB as f64 },
        values: vec![worker + of_controller + kernel],
        notes,
    }
}

/// What the guests of all VMs hold.
fn guest_bytes(client: &mut Client) -> u64 {
    let (_, list) = client.ask("GET", "/vms", "");
    let list: Value = serde_json::from_str(&list).expect("JSON");
    list.as_array().expect("a list").iter().map(|vm| number(vm, "memory.stat.guest_bytes")).sum()
}

/// Memory that a process has for itself, guest pages among it.
fn private_bytes(pid: u64) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it runs");
    let kib = |key: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0.0)
    };
    (kib("Private_Dirty:") + kib("Private_Hugetlb:")) * 1024.0
}

/// What the kernel has for itself.
fn kernel_bytes() -> f64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("/proc is mounted");
    let keys = ["SUnreclaim:", "KernelStack:", "PageTables:", "SecPageTables:", "Percpu:", "VmallocUsed:"];
    let kib = text.lines().filter(|line| keys.iter().any(|key| line.starts_with(key)));
    kib.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok()).sum::<f64>() * 1024.0
}

fn entries(pid: u64, what: &str) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count)
}

/// CPU time of all threads of a process so far.
fn cpu_ns(pid: u64) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of = |path: PathBuf| std::fs::read_to_string(path.join("schedstat")).ok();
    threads.filter_map(|thread| of(thread.path())?.split_whitespace().next()?.parse::<f64>().ok()).sum()
}

fn all_cpu_ns(processes: &[u64]) -> f64 {
    processes.iter().map(|pid| cpu_ns(*pid)).sum()
}

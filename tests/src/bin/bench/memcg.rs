//! The kernel's own way, to be compared with: a process in a memory cgroup whose limit is lowered, over a compressed swap
//! device that is made for it and removed after it.
//!
//! Nobody else is swapped out: the machine is not short of memory, and only the process's own cgroup has a limit.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ballast::worker::gate::monotonic_ns;
use guest_common::{Access, Arguments, Fill, PAGE_SIZE, Pattern, pattern};

use crate::vm::field;

const CONTROL: &str = "/sys/class/zram-control";
/// As large as what is swapped to it may be, before compression.
const DEVICE_BYTES: u64 = 4 << 30;

/// A swap device of compressed memory. Gone when it is dropped.
struct Zram(u32);

impl Zram {
    fn new() -> Result<Self, String> {
        // Reading it makes a device.
        let number = read(&Path::new(CONTROL).join("hot_add")).map_err(|_| "no-zram-to-swap-to")?;
        let device = Self(number.parse().map_err(|_| "no-zram-to-swap-to")?);
        let block = device.block();
        fs::write(block.join("disksize"), DEVICE_BYTES.to_string()).map_err(|_| "zram-takes-no-size")?;
        let made = Command::new("mkswap").arg(device.node()).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let path = std::ffi::CString::new(device.node()).expect("a path");
        // SAFETY: the path is NUL-terminated.
        if !made.is_ok_and(|status| status.success()) || unsafe { libc::swapon(path.as_ptr(), 0) } != 0 {
            return Err("zram-is-no-swap".to_owned());
        }
        Ok(device)
    }

    fn node(&self) -> String {
        format!("/dev/zram{}", self.0)
    }

    fn block(&self) -> PathBuf {
        PathBuf::from(format!("/sys/block/zram{}", self.0))
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let path = std::ffi::CString::new(self.node()).expect("a path");
        // SAFETY: the path is NUL-terminated.
        unsafe { libc::swapoff(path.as_ptr()) };
        // What cannot be removed is seen in /sys/block.
        let _ = fs::write(self.block().join("reset"), "1");
        let _ = fs::write(Path::new(CONTROL).join("hot_remove"), self.0.to_string());
    }
}

/// Who makes the device and the cgroup, and removes them: a process of its own, which outlives this one also when it is
/// killed.
struct Guardian {
    child: Child,
    /// Closed when it is dropped, and that is the end.
    input: Option<ChildStdin>,
}

impl Guardian {
    fn start(cgroup: &Path) -> Result<Self, String> {
        let mut command = Command::new(std::env::current_exe().expect("a program has a path"));
        command.args(["child", "guardian"]).arg(cgroup).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("bench starts");
        let mut line = String::new();
        let read = BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line);
        let guardian = Self { input: child.stdin.take(), child };
        match line.trim() {
            "ready" => Ok(guardian),
            "" => Err(format!("no-answer:{read:?}")),
            why => Err(why.to_owned()),
        }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.wait();
    }
}

/// The guardian itself.
fn guard(cgroup: &Path) -> Result<(), String> {
    // Ctrl-C ends those who use it, and with them this.
    // SAFETY: a signal is ignored; no handler is called.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_IGN) };
    let _swap = Zram::new()?;
    fs::create_dir_all(cgroup).map_err(|_| "no-cgroup-can-be-made")?;
    // There is nothing but anonymous memory to take.
    let ready =
        fs::write(cgroup.join("memory.swappiness"), "100").map_err(|_| "no-memory-cgroup-of-version-1".to_owned());
    if ready.is_ok() {
        println!("ready");
        let _ = std::io::stdin().read(&mut [0; 1]);
    }
    // The process ends with its input, as this does.
    let end = Instant::now() + Duration::from_secs(10);
    while fs::remove_dir(cgroup).is_err() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    ready
}

/// A process with memory of its own in a cgroup of its own. It does what it is told, a line at a time.
pub struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    cgroup: PathBuf,
    _guardian: Guardian,
}

impl Process {
    /// Starts one that has touched `bytes` as the payload's `touch` would with `fill`.
    pub fn start(bytes: u64, fill: &str) -> Result<Self, String> {
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = own.lines().find_map(|line| line.split_once(":memory:/")).ok_or("no-memory-cgroup-of-version-1")?.1;
        let parent = Path::new("/sys/fs/cgroup/memory").join(own);
        let cgroup = parent.join(format!("ballast-bench-{}", std::process::id()));
        let guardian = Guardian::start(&cgroup)?;
        let entrance = std::ffi::CString::new(cgroup.join("cgroup.procs").into_os_string().into_encoded_bytes());
        let entrance = entrance.expect("a path");
        let mut command = Command::new(std::env::current_exe().expect("a program has a path"));
        command.args(["child", "hog", &bytes.to_string(), fill]).stdin(Stdio::piped()).stdout(Stdio::piped());
        // SAFETY: system calls with constants, between fork and exec.
        unsafe {
            command.pre_exec(move || {
                let fd = libc::open(entrance.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
                match libc::write(fd, c"0".as_ptr().cast(), 1) {
                    1 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let mut child = command.spawn().map_err(|e| format!("no-process-in-a-cgroup:{e}").replace(' ', "-"))?;
        let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let mut process = Self { child, input, output: BufReader::new(output), cgroup, _guardian: guardian };
        process.line();
        Ok(process)
    }

    /// Writes its limit: how long that took, in nanoseconds, and what CPU time it took of it.
    pub fn limit(&self, bytes: u64) -> (u64, u64) {
        let (begin, cpu) = (monotonic_ns(), own_cpu_ns());
        fs::write(self.cgroup.join("memory.limit_in_bytes"), bytes.to_string()).expect("the limit can be reached");
        (monotonic_ns() - begin, own_cpu_ns() - cpu)
    }

    /// Its id.
    pub fn pid(&self) -> u64 {
        self.child.id().into()
    }

    /// Bytes that it has swapped out now.
    pub fn swapped(&self) -> u64 {
        self.stat("swap")
    }

    /// A number of its `memory.stat`.
    pub fn stat(&self, key: &str) -> u64 {
        let text = fs::read_to_string(self.cgroup.join("memory.stat")).expect("a cgroup has it");
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("no {key} in memory.stat"))
    }

    /// Lets it read one word of each page, in order: how long that took, in nanoseconds.
    pub fn pass(&mut self) -> u64 {
        field(&self.ask("pass"), "ns") as u64
    }

    /// Lets it access pages as the payload's `access zipf` does over the same memory, below a limit of `limit`. Returns how
    /// often the kernel found no page to take and would have killed it.
    ///
    /// It does so when all pages were in use a moment ago. Then the process has room for a MiB more for a moment.
    pub fn access(&mut self, accesses: u64, seed: u64, limit: u64) -> u64 {
        let (control, file) = (self.cgroup.join("memory.oom_control"), self.cgroup.join("memory.limit_in_bytes"));
        fs::write(&control, "1").expect("nobody need be killed");
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut rescues = 0;
                while !done.load(Relaxed) {
                    if fs::read_to_string(&control).is_ok_and(|text| text.contains("under_oom 1")) {
                        rescues += 1;
                        fs::write(&file, (limit + (1 << 20)).to_string()).expect("a limit can be raised");
                        while fs::write(&file, limit.to_string()).is_err() && !done.load(Relaxed) {}
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                rescues
            });
            self.ask(&format!("access {accesses} {seed}"));
            done.store(true, Relaxed);
            watch.join().expect("no panic")
        })
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").expect("it reads");
        self.line()
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it answers");
        assert!(!line.is_empty(), "the process has ended");
        line
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time of this thread.
fn own_cpu_ns() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_whitespace().next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}

/// Pages swapped out since the start of the machine.
pub fn swapped_out() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("pswpout ")?.parse().ok()).unwrap_or(0)
}

/// A process of this file: `words` are its arguments. It ends with its input.
pub fn child(words: &[String]) -> bool {
    match words {
        [what, cgroup] if what == "guardian" => {
            if let Err(why) = guard(Path::new(cgroup)) {
                println!("{why}");
            }
        }
        [what, bytes, fill] if what == "hog" => hog(bytes, fill),
        _ => return false,
    }
    true
}

fn hog(bytes: &str, fill: &str) {
    let bytes: usize = bytes.parse().expect("a number");
    let fill = Arguments(fill).fill().unwrap_or(Fill::Ends);
    // SAFETY: a new mapping that touches nothing that exists.
    let memory = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    assert_ne!(memory, libc::MAP_FAILED, "memory");
    // SAFETY: the advice changes no content.
    unsafe { libc::madvise(memory, bytes, libc::MADV_NOHUGEPAGE) };
    let pages = bytes as u64 / PAGE_SIZE;
    let at = |page: u64, word: u64| {
        // SAFETY: `page` is below the number of pages and `word` below those of a page: the address is in the mapping.
        unsafe { memory.cast::<u64>().add((page * PAGE_SIZE / 8 + word) as usize) }
    };
    for page in 0..pages {
        for word in fill.words() {
            // SAFETY: the address is in the mapping, which nobody else uses.
            unsafe { at(page, word as u64).write_volatile(pattern(1, page, word)) };
        }
    }
    println!("ready");
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let begin = monotonic_ns();
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["access", accesses, seed] => {
                let seed = seed.parse().expect("a number");
                let next = Access::new(Pattern::Zipf, pages, pages, false, seed);
                for (n, page) in (1..=accesses.parse().expect("a number")).zip(next) {
                    // SAFETY: as above.
                    unsafe {
                        match Access::writes(n, 50) {
                            true => at(page, 1).write_volatile(n),
                            false => drop(at(page, 0).read_volatile()),
                        }
                    }
                }
            }
            _ => (0..pages).for_each(|page| {
                // SAFETY: as above.
                unsafe { at(page, 0).read_volatile() };
            }),
        }
        println!("ns={}", monotonic_ns() - begin);
    }
}

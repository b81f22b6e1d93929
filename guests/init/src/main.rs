//! The first and only program of the Linux guest: it loads the balloon driver and obeys a line protocol on the console.
//!
//! It prints `READY` when it listens. Then each line is a command; its answer is some lines of data, none for most, and
//! exactly one last line that begins with `OK` or `ERR`. Nothing is echoed and there is no prompt. `help` lists the
//! commands.
//!
//! It powers the machine off when somebody presses the power button, as `ballast stop` does.
//!
//! The memory that `touch` takes belongs to a second process, the *holder*: when the guest's own OOM killer strikes, it
//! finds that one, the console still answers, and the next command says what happened.

mod button;
mod cache;
mod console;
mod holder;
mod sys;

use std::fs;
use std::io;

use guest_common::Arguments;

use cache::Cache;
use holder::Holder;

/// Parameters of modules, by the files' names.
const PARAMETERS: [(&str, &str); 1] = [("brd.ko", "rd_nr=1 rd_size=262144")];

const HELP: &str = "\
touch SIZE [seed=N] [full=1]   take anonymous memory, write a pattern to each page (fill=half|mixed|same: others)
verify                         read all of it back: VERIFY ok pages=N | VERIFY bad pages=N bad=N first=N
cache SIZE [seed=N] [full=1]   write a pattern to a disk in memory: as much page cache that can be dropped
cache-verify                   read all of it back: CACHE ok pages=N | CACHE bad pages=N bad=N first=N
free [last=N]                  give all of it back to the kernel, or what was touched by the last N commands
meminfo                        MEMINFO MemTotal=KiB MemFree=KiB ...
vmstat                         VMSTAT balloon_inflate=N ...
dmesg-check                    DMESG stalls=N ooms=N bugs=N warnings=N, after the lines counted
dmesg                          the kernel's messages
drop-caches                    drop clean caches
compact                        compact memory, so that free pages can be reported
cat PATH                       the lines of a file
write PATH TEXT                write a line to a file
echo TEXT                      TEXT
poweroff | reboot | crash      end";

fn main() {
    // The same program, started again by itself, is the holder.
    if std::env::args().nth(1).as_deref() == Some(holder::ARGUMENT) {
        holder::serve();
        return;
    }
    if let Err(error) = start() {
        println!("ERR init: {error}");
    }
    // Only emergencies reach the console from here on: anything else would end up inside an answer. `dmesg` has it all.
    sys::console_level(1);
    button::watch();
    println!("READY");
    let mut kept = Kept::default();
    loop {
        match console::read_line() {
            Ok(line) => answer(&line, &mut kept),
            Err(error) => {
                println!("ERR console: {error}");
                sys::power_off();
            }
        }
    }
}

/// What is kept from one command to the next.
#[derive(Default)]
struct Kept {
    holder: Option<Holder>,
    cache: Option<Cache>,
}

/// Mounts what the commands read, sets the console up and loads the modules.
fn start() -> Result<(), String> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        // The directory may exist already, and if it cannot be made the mount says so.
        let _ = fs::create_dir(target);
        sys::mount(kind, target).map_err(|e| format!("cannot mount {target}: {e}"))?;
    }
    console::open().map_err(|e| format!("cannot open the console: {e}"))?;
    let order = fs::read_to_string("/modules/order").map_err(|e| format!("cannot read /modules/order: {e}"))?;
    for module in order.lines() {
        let parameters = PARAMETERS.iter().find(|(name, _)| *name == module).map_or("", |(_, words)| words);
        match sys::load_module(&format!("/modules/{module}"), parameters) {
            // The kernel's command line has it in `module_blacklist=`.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            loaded => loaded.map_err(|e| format!("cannot load {module}: {e}"))?,
        }
    }
    Ok(())
}

/// Obeys one line and prints its answer.
fn answer(line: &str, kept: &mut Kept) {
    let (verb, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
    if verb.is_empty() {
        return;
    }
    match obey(verb, rest.trim(), kept) {
        Ok(data) if data.is_empty() => println!("OK {verb}"),
        Ok(data) => println!("{}\nOK {verb}", data.trim_end()),
        Err(error) => println!("ERR {verb}: {error}"),
    }
}

fn obey(verb: &str, rest: &str, kept: &mut Kept) -> Result<String, String> {
    match verb {
        "touch" | "verify" | "free" => ask(verb, rest, &mut kept.holder),
        "cache" => {
            kept.cache = Some(Cache::new(Arguments(rest))?);
            Ok(String::new())
        }
        "cache-verify" => kept.cache.as_ref().ok_or("nothing is cached")?.verify(),
        "meminfo" => meminfo().map_err(|e| e.to_string()),
        "vmstat" => vmstat().map_err(|e| e.to_string()),
        "dmesg" => Ok(sys::kernel_log()),
        "dmesg-check" => Ok(check(&sys::kernel_log())),
        "drop-caches" => write_line("/proc/sys/vm/drop_caches", "3"),
        "compact" => write_line("/proc/sys/vm/compact_memory", "1"),
        "cat" => fs::read_to_string(rest).map_err(|e| format!("cannot read {rest:?}: {e}")),
        "write" => {
            let (path, text) = rest.split_once(' ').ok_or("PATH TEXT expected")?;
            write_line(path, text)
        }
        "echo" => Ok(rest.to_owned()),
        "help" => Ok(HELP.to_owned()),
        "poweroff" => {
            println!("OK poweroff");
            console::drain();
            sys::power_off()
        }
        "reboot" => {
            println!("OK reboot");
            console::drain();
            sys::restart()
        }
        // The kernel panics when its init ends.
        "crash" => {
            println!("OK crash");
            console::drain();
            std::process::exit(1)
        }
        _ => Err("no such command; try help".to_owned()),
    }
}

/// Passes a command to the holder, starting one if there is none.
fn ask(verb: &str, rest: &str, holder: &mut Option<Holder>) -> Result<String, String> {
    if verb == "touch" {
        // Refuse nonsense here, where an error does not look like a dead holder.
        let arguments = Arguments(rest);
        arguments.number(0, "SIZE").map_err(|e| e.to_string())?;
    }
    let mut running = match holder.take() {
        Some(running) => running,
        None => Holder::start().map_err(|e| format!("cannot start the holder: {e}"))?,
    };
    match running.ask(&format!("{verb} {rest}")) {
        Ok(answer) => {
            *holder = Some(running);
            answer
        }
        Err(error) => Err(format!("the process that held the memory is gone ({error}); so is the memory")),
    }
}

/// Writes `text` to `path`, which is one of the kernel's files.
fn write_line(path: &str, text: &str) -> Result<String, String> {
    fs::write(path, text).map(|()| String::new()).map_err(|e| format!("cannot write to {path:?}: {e}"))
}

/// The lines of `/proc/meminfo` that say how large the guest thinks it is, in KiB.
fn meminfo() -> io::Result<String> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let wanted = ["MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "AnonPages", "Slab", "Balloon"];
    let found = text.lines().filter_map(|line| {
        let (key, value) = line.split_once(':')?;
        let value = value.trim().trim_end_matches(" kB");
        wanted.contains(&key).then(|| format!(" {key}={value}"))
    });
    Ok(format!("MEMINFO{}", found.collect::<String>()))
}

/// The lines of `/proc/vmstat` that a balloon or a shortage changes.
fn vmstat() -> io::Result<String> {
    let text = fs::read_to_string("/proc/vmstat")?;
    let wanted = ["balloon_inflate", "balloon_deflate", "oom_kill", "pgfault", "pgmajfault", "nr_free_pages"];
    let found = text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        wanted.contains(&key).then(|| format!(" {key}={value}"))
    });
    Ok(format!("VMSTAT{}", found.collect::<String>()))
}

/// Counts the messages which say that something was late, killed or broken; shows the first few of them.
fn check(log: &str) -> String {
    let stalls = ["detected stall", "self-detected", "soft lockup", "blocked for more than"];
    let ooms = ["invoked oom-killer"];
    let bugs = ["BUG:", "Oops", "general protection fault"];
    let warnings = ["WARNING:"];
    let found = |words: &[&str]| -> Vec<String> {
        let matching = log.lines().filter(|line| words.iter().any(|word| line.contains(word)));
        matching.map(str::to_owned).collect()
    };
    let [stalls, ooms, bugs, warnings] = [&stalls[..], &ooms, &bugs, &warnings].map(found);
    let shown: String =
        [&stalls, &ooms, &bugs, &warnings].into_iter().flatten().take(8).map(|line| format!("| {line}\n")).collect();
    format!("{shown}DMESG stalls={} ooms={} bugs={} warnings={}", stalls.len(), ooms.len(), bugs.len(), warnings.len())
}

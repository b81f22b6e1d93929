//! `ballast run`: a private controller with one VM, in the foreground.

use std::fs::File;
use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process;
use std::task::Poll;
use std::time::Duration;

use balloon::QueueKind;
use memcg_core::units::{Limit, exact};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::options::{BalloonArg, MemoryArg, OomArg, name};
use super::{DONE, ERROR, Failure, KILLED, RUN_FAILED, SocketArg, chain, console, socket};
use crate::api::server;
use crate::controller::spawn::{self, Launch};
use crate::controller::{Controller, KilledBy, OomPolicy, VmEnd, VmSpec, host, overhead};
use crate::worker::config::WorkerConfig;
use crate::worker::protocol::ExitReason;

/// Most vCPUs that a VM can have.
const MAX_CPUS: u32 = 64;

/// `ballast run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Name of the VM [default: vm-PID]
    #[arg(long, value_parser = name)]
    name: Option<String>,
    /// Guest RAM and limits: size=1G,max=512M,high=448M,low=128M,min=64M,swap=1G,vmm=32M,track=on|off
    #[arg(long, value_name = "SIZES", value_parser = str::parse::<MemoryArg>)]
    memory: MemoryArg,
    /// The balloon: deflate_on_oom=on|off,stats_interval=1s
    #[arg(long, value_name = "WORDS", value_parser = str::parse::<BalloonArg>)]
    balloon: Option<BalloonArg>,
    /// For a VM held at its limit too long: action=pause|kill,deadline=5s,priority=N,preference=none|avoid|omit
    #[arg(long, value_name = "WORDS", value_parser = str::parse::<OomArg>)]
    oom: Option<OomArg>,
    /// Kernel: bzImage, ELF with a PVH note, or a flat payload
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// Initial ramdisk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    cmdline: String,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = cpus)]
    cpus: u32,
    /// Offer the ports of freestanding payloads: exit, wait and print
    #[arg(long)]
    debug_port: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// How long the output of a guest that was ended may take to be read.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// A number of vCPUs.
fn cpus(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is not possible: write a number from 1 to {MAX_CPUS}");
    text.parse().ok().filter(|cpus| (1..=MAX_CPUS).contains(cpus)).ok_or_else(wrong)
}

/// Opens the file that the guest gets by `option`.
fn open(what: &str, option: &str, path: &Path) -> Result<File, Failure> {
    let failed = |error| {
        let path = path.display();
        Failure::run(format!("the {what} {path} cannot be opened ({error}): give another file with {option}"))
    };
    // Opening a pipe would otherwise wait for somebody to write to it.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.is_file() {
        Ok(file)
    } else {
        Err(Failure::run(format!("the {what} {} is not a file: give one with {option}", path.display())))
    }
}

/// The signals that end a VM.
struct Signals(Vec<(Signal, i32)>);

impl Signals {
    fn new() -> std::io::Result<Self> {
        let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate(), SignalKind::quit()];
        // Whoever starts a VM with nohup wants it to outlive the terminal.
        if !is_ignored(libc::SIGHUP) {
            kinds.push(SignalKind::hangup());
        }
        let signals = kinds.into_iter().map(|kind| Ok((signal(kind)?, kind.as_raw_value())));
        signals.collect::<std::io::Result<_>>().map(Self)
    }

    /// The number of the next signal.
    async fn next(&mut self) -> i32 {
        poll_fn(|context| {
            let arrived =
                self.0.iter_mut().find_map(|(signal, number)| signal.poll_recv(context).is_ready().then_some(*number));
            arrived.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// Whether this process was started with a signal ignored.
fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action this only writes the present one to `action`, which is large enough.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: all of a sigaction are numbers and an optional function, for which zeroes are valid values.
    asked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// The exit status after signal number `signal`.
fn signal_status(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(RUN_FAILED)
}

/// Removes the VM's directory at the end.
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        spawn::tidy(&self.0);
    }
}

/// Runs a VM until it ends.
pub async fn run(args: RunArgs, log: &str) -> Result<u8, Failure> {
    let vm_name = args.name.clone().unwrap_or_else(|| format!("vm-{}", process::id()));
    let listen = socket::to_listen(&args.socket, &vm_name);
    let directory = socket::vm_directory(&listen);
    let as_failure = |error: &dyn std::error::Error| Failure::run(chain(error));
    spawn::check_socket_path(&listen).map_err(|error| as_failure(&error))?;
    spawn::check_socket_path(&spawn::worker_socket(&directory)).map_err(|error| as_failure(&error))?;
    let kernel = open("kernel", "--kernel", &args.kernel)?;
    let initrd = args.initrd.as_deref().map(|path| open("initial ramdisk", "--initrd", path)).transpose()?;
    host::check_kernel().map_err(|error| as_failure(&error))?;
    host::open_kvm().map_err(|error| as_failure(&error))?;
    if args.memory.accounting {
        host::open_userfaultfd().map_err(|error| as_failure(&error))?;
    }

    let mut signals = Signals::new().map_err(|error| as_failure(&error))?;
    let bound = server::bind(&listen).map_err(|error| as_failure(&error))?;
    let (controller, actor) = Controller::start(Limit::Max);
    let spec = VmSpec {
        name: vm_name.clone(),
        size: args.memory.size,
        cpus: args.cpus,
        accounting: args.memory.accounting,
        limits: args.memory.limits,
        oom: args.oom.map_or_else(OomPolicy::default, |OomArg(policy)| policy),
        overhead: overhead::of(args.memory.size, args.cpus, QueueKind::COUNT as u32),
    };
    let id = controller.create(spec).await.map_err(|error| as_failure(&error))?;
    let launch = Launch {
        config: config(&args, vm_name.clone()),
        kernel,
        initrd,
        directory: directory.clone(),
        log: log.to_owned(),
    };
    let launched = match spawn::launch(launch) {
        Ok(launched) => launched,
        Err(error) => {
            controller.withdraw(id).await.map_err(|error| as_failure(&error))?;
            return Err(as_failure(&error));
        }
    };
    let directory = Directory(directory);
    let mut end = controller
        .adopt(id, launched.handle, launched.watch, launched.link)
        .await
        .map_err(|error| as_failure(&error))?;
    let server = server::serve(bound, controller.clone()).map_err(|error| as_failure(&error))?;
    let mut console = console::start(launched.console).map_err(|error| as_failure(&error))?;

    let mut status = None;
    let left = console.left.take();
    let leaving = async {
        if let Some(left) = left
            && left.await.is_ok()
        {
            return;
        }
        std::future::pending().await
    };
    let ended = tokio::select! {
        ended = &mut end => ended,
        signal = signals.next() => {
            status = Some(signal_status(signal));
            // That it has ended by itself meanwhile is as good.
            let _ = controller.kill(&vm_name).await;
            end.await
        }
        () = leaving => {
            status = Some(DONE);
            let _ = controller.kill(&vm_name).await;
            end.await
        }
    };
    // A guest that has ended has its output read, however long that takes; one that was told to end has not.
    let patience = async {
        match status {
            Some(_) => tokio::time::sleep(host::scaled(LAST_OUTPUT)).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = console.drained() => {}
        () = patience => {}
        // Nobody reads the output and somebody has lost patience.
        signal = signals.next() => status = Some(signal_status(signal)),
    }
    console.restore();
    server.stop().await;
    drop(controller);
    drop(directory);
    // The actor ends with its last user; connections that did not let go may keep it.
    actor.abort();
    let ended = ended.map_err(|_| Failure::run("the controller has ended before the VM"))?;
    match status {
        Some(status) => Ok(status),
        None => conclude(ended, &vm_name, &args.memory),
    }
}

fn config(args: &RunArgs, name: String) -> WorkerConfig {
    let balloon = args.balloon.unwrap_or_default();
    WorkerConfig {
        name,
        size_bytes: args.memory.size.bytes(),
        cpus: args.cpus,
        cmdline: args.cmdline.clone(),
        initrd: args.initrd.is_some(),
        accounting: args.memory.accounting,
        obstacle: None,
        debug_port: args.debug_port,
        stats_interval_s: balloon.stats_interval_s,
        deflate_on_oom: balloon.deflate_on_oom,
        die_with_parent: true,
    }
}

/// The exit status of `run` for an end of the VM, or the sentence that explains it.
fn conclude(end: VmEnd, name: &str, memory: &MemoryArg) -> Result<u8, Failure> {
    match end {
        VmEnd::Guest(ExitReason::PowerOff | ExitReason::Reset) => Ok(DONE),
        VmEnd::Guest(ExitReason::Status(status)) => Ok(status),
        VmEnd::Guest(ExitReason::TripleFault) => {
            Err(Failure { message: format!("the guest {name} stopped with a triple fault"), status: ERROR })
        }
        VmEnd::Guest(ExitReason::Error) => Err(Failure::run(format!("the VM {name} failed"))),
        VmEnd::Killed(KilledBy::Request) => {
            Err(Failure { message: format!("the VM {name} was killed on request"), status: KILLED })
        }
        VmEnd::Killed(KilledBy::Policy) => Err(Failure {
            message: format!(
                "the VM {name} was killed: it was held at memory.max {} for too long; raise max, or choose --oom \
                 action=pause",
                memory.limits.max.unwrap_or(Limit::Max)
            ),
            status: KILLED,
        }),
        VmEnd::Failed { message, smallest_max: Some(smallest) } => Err(Failure::run(format!(
            "{message}: use --memory size={},max={} or more",
            exact(memory.size.bytes()),
            exact(smallest.bytes())
        ))),
        VmEnd::Failed { message, smallest_max: None } => Err(Failure::run(message)),
        VmEnd::Died { message } => Err(Failure::run(format!("the worker of the VM {name} {message}"))),
    }
}

#[cfg(test)]
mod tests {
    use memcg_core::units::Pages;

    use super::*;

    fn status(end: VmEnd) -> u8 {
        let memory: MemoryArg = "size=64M,max=32M".parse().unwrap();
        conclude(end, "web", &memory).unwrap_or_else(|failure| failure.status)
    }

    #[test]
    fn every_end_has_its_status() {
        assert_eq!(status(VmEnd::Guest(ExitReason::PowerOff)), 0);
        assert_eq!(status(VmEnd::Guest(ExitReason::Reset)), 0);
        assert_eq!(status(VmEnd::Guest(ExitReason::Status(42))), 42);
        assert_eq!(status(VmEnd::Guest(ExitReason::TripleFault)), 1);
        assert_eq!(status(VmEnd::Guest(ExitReason::Error)), 125);
        assert_eq!(status(VmEnd::Killed(KilledBy::Policy)), 137);
        assert_eq!(status(VmEnd::Killed(KilledBy::Request)), 137);
        assert_eq!(status(VmEnd::Died { message: "vanished".to_owned() }), 125);
        assert_eq!(signal_status(15), 143);
    }

    #[test]
    fn the_smallest_limit_is_named_so_that_it_can_be_typed() {
        let memory: MemoryArg = "size=64M,max=1M".parse().unwrap();
        let end = |pages| VmEnd::Failed { message: "too small".to_owned(), smallest_max: Some(Pages(pages)) };
        let sentence = |pages| conclude(end(pages), "web", &memory).unwrap_err().message;
        assert_eq!(sentence(2048), "too small: use --memory size=64M,max=8M or more");
        assert!(sentence(2049).contains("max=8392704 "), "{}", sentence(2049));
    }
}

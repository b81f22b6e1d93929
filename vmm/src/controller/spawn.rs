//! Starting a worker: this program again, in a process of its own, with what it may use at fixed descriptors.
//!
//! Everything that can be refused is refused before the fork: the kernel's age, the devices, the socket's path.
//! Between fork and exec the child runs `ChildPlan::apply`, which does system calls only: no allocation, no lock.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use memcg_core::units::Pages;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::cgroup::Cgroup;
use super::host::{self, Problem};
use super::link::{self, ConnectError};
use super::release;
use super::residency::Residency;
use super::standing;
use crate::machine::cpuid;
use crate::machine::kvm::{VmError, supported_cpuid};
use crate::memory::place;
use crate::worker::config::{WorkerConfig, fd};

/// Longest path of a unix socket in bytes: `sun_path` without its final zero.
pub const MAX_SOCKET_PATH: usize = 107;

/// First number of descriptors that are copies made for the child; above every fixed number.
const ABOVE_FIXED: RawFd = 32;

/// One past the last fixed number.
const FIXED_END: RawFd = fd::SWAP_FILE + 1;

/// Connections that may wait for a worker.
const BACKLOG: libc::c_int = 8;

/// What a worker is started with.
#[derive(Debug)]
pub struct Launch {
    /// The VM as the worker is told to build it.
    pub config: WorkerConfig,
    /// The kernel or payload, open for reading.
    pub kernel: File,
    /// The initial ramdisk, if any; [`WorkerConfig::initrd`] says so too.
    pub initrd: Option<File>,
    /// The swap file, if any; [`WorkerConfig::swap_file_pages`] says so too.
    pub swap_file: Option<OwnedFd>,
    /// Where the last of what the guest prints is kept ([`crate::devices::console::create`]).
    pub console: File,
    /// Whether to go to the console before the guest can print.
    pub attach: bool,
    /// Directory of this VM, made if absent, mode 0700; the worker's sockets are in it.
    pub directory: PathBuf,
    /// The cgroup that the worker begins in, if it has one of its own.
    pub cgroup: Option<Cgroup>,
    /// Level of the worker's log, for the environment variable `BALLAST_LOG`.
    pub log: String,
}

/// A worker that runs.
#[derive(Debug)]
pub struct Launched {
    /// To end it.
    pub handle: WorkerHandle,
    /// To learn of its end.
    pub watch: DeathWatch,
    /// The connected channel.
    pub link: OwnedFd,
    /// The guest's console, with [`Launch::attach`].
    pub console: Option<UnixStream>,
}

/// Why a worker could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The host lacks something; the sentence says how to get it.
    #[error(transparent)]
    Host(#[from] Problem),
    /// The path of a socket does not fit into an address.
    #[error("the socket path {0} is {1} bytes long, at most {MAX_SOCKET_PATH} are possible: choose a shorter --socket")]
    PathTooLong(String, usize),
    /// No descriptor is left.
    #[error(
        "the {0} descriptors that the controller may have are in use: allow more (ulimit -n, or LimitNOFILE of its unit) and start it again, or remove VMs"
    )]
    Descriptors(u64),
    /// KVM does not say what it supports.
    #[error("KVM cannot be used")]
    Kvm(#[from] VmError),
    /// Something else is where the VM's directory has to be.
    #[error(
        "{0} is in the way: it must be a directory for nobody but you, or not be there; choose another --socket or --state-dir"
    )]
    InTheWay(String),
    /// A system call failed.
    #[error("{what}")]
    System {
        /// What was being done.
        what: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The worker started but its socket did not answer as expected.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> SpawnError {
    let what = what.into();
    move |source| SpawnError::System { what, source }
}

/// Checks that `path` fits into the address of a unix socket.
///
/// # Errors
/// When it is longer than [`MAX_SOCKET_PATH`].
pub fn check_socket_path(path: &Path) -> Result<(), SpawnError> {
    let length = path.as_os_str().as_bytes().len();
    if length > MAX_SOCKET_PATH {
        return Err(SpawnError::PathTooLong(path.display().to_string(), length));
    }
    Ok(())
}

/// The socket on which the worker of the VM in `directory` listens.
pub fn worker_socket(directory: &Path) -> PathBuf {
    directory.join("worker")
}

/// The socket on which the console of the VM in `directory` is.
pub fn console_socket(directory: &Path) -> PathBuf {
    directory.join("console")
}

/// The file that takes what the worker of the VM in `directory` says on standard error, when it outlives its controller.
pub fn worker_log(directory: &Path) -> PathBuf {
    directory.join("log")
}

/// Most bytes that a worker can write to its log.
pub const MAX_LOG: u64 = 256 * 1024;

/// The end of a worker's log, for people and for [`adopt`](super::adopt); empty when there is none.
pub fn log_tail(directory: &Path) -> String {
    const TAIL: u64 = 4096;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(worker_log(directory))?;
        let from = file.metadata()?.len().saturating_sub(TAIL);
        file.seek(io::SeekFrom::Start(from))?;
        let mut text = Vec::new();
        file.take(TAIL).read_to_end(&mut text)?;
        Ok(text)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// Starts a worker. Blocks for the time of a fork and an exec; the caller's thread must live as long as the
/// process when the worker is to die with it.
///
/// # Errors
/// See [`SpawnError`]. Nothing is left behind then, and what was there before stays.
///
/// # Panics
/// Outside a tokio runtime.
pub fn launch(launch: Launch) -> Result<Launched, SpawnError> {
    let Launch { mut config, kernel, initrd, swap_file, console, attach, directory, cgroup, log } = launch;
    check_socket_path(&console_socket(&directory))?;
    host::check_kernel()?;
    let kvm = host::open_kvm()?;
    config.cpuid = host_cpuid(&kvm)?.to_vec();
    // Without accounting it is only opened, for a first limit later.
    let uffd_device = match host::open_userfaultfd() {
        Ok(device) => {
            config.follow_vcpu = config.cpus == 1 && place::same_cpu_pays();
            Some(device)
        }
        Err(problem) if config.accounting => return Err(problem.into()),
        Err(problem) => {
            config.obstacle = Some(problem.to_string());
            None
        }
    };

    make_directory(&directory)?;
    let files = Files { kvm, uffd_device, kernel, initrd, swap_file, console, attach, cgroup };
    launch_in(&directory, &config, &files, &log).inspect_err(|_| tidy(&directory))
}

/// [`launch`] on a thread that does nothing else: nobody who is served by the caller's waits for a fork. The thread lives as
/// long as the process, because a worker that is to die with its starter dies with this thread.
///
/// # Errors
/// See [`SpawnError`].
///
/// # Panics
/// Outside a tokio runtime.
pub async fn launch_aside(what: Launch) -> Result<Launched, SpawnError> {
    type Job = Box<dyn FnOnce() + Send>;
    static STARTER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let starter = STARTER.get_or_init(|| {
        let (starter, jobs) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new().name("starter".into());
        if let Err(error) = thread.spawn(move || jobs.iter().for_each(|job| job())) {
            tracing::error!(%error, "there is no thread that starts workers");
        }
        starter
    });
    let runtime = tokio::runtime::Handle::current();
    let (reply, launched) = tokio::sync::oneshot::channel();
    let job = move || {
        let _in_runtime = runtime.enter();
        if let Err(Ok(launched)) = reply.send(launch(what)) {
            // The runtime ends, and nobody is left who would have it.
            launched.handle.kill();
            launched.handle.tidy();
        }
    };
    // Without the thread the job is dropped, and its answer with it.
    let _ = starter.send(Box::new(job));
    let gone = |_| system("the worker process cannot be started")(io::Error::other("the thread for that is gone"));
    launched.await.map_err(gone)?
}

/// What KVM supports of this host's CPU: listed at the first start.
fn host_cpuid(kvm: &OwnedFd) -> Result<&'static [[u32; 7]], SpawnError> {
    static LIST: OnceLock<Vec<[u32; 7]>> = OnceLock::new();
    if LIST.get().is_none() {
        // Two that come first at once find the same.
        let _ = LIST.set(cpuid::to_words(&supported_cpuid(kvm.as_fd())?));
    }
    Ok(LIST.get().expect("just set"))
}

/// Descriptors that a start takes for a moment, with a margin.
const SPARE: usize = 40;

/// Finds out whether there are descriptors left for a start. It could fail at any of them otherwise, and would say so in
/// many ways.
///
/// # Errors
/// [`SpawnError::Descriptors`].
pub fn check_descriptors() -> Result<(), SpawnError> {
    let none_left = |_| SpawnError::Descriptors(host::descriptors().0);
    let one = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).map_err(none_left)?;
    let more: Result<Vec<_>, _> = (1..SPARE).map(|_| rustix::io::fcntl_dupfd_cloexec(&one, 0)).collect();
    more.map(drop).map_err(none_left)
}

/// What a worker is handed besides its configuration and sockets.
struct Files {
    kvm: OwnedFd,
    uffd_device: Option<OwnedFd>,
    kernel: File,
    initrd: Option<File>,
    swap_file: Option<OwnedFd>,
    console: File,
    attach: bool,
    cgroup: Option<Cgroup>,
}

/// The part of [`launch`] that makes things.
fn launch_in(directory: &Path, config: &WorkerConfig, files: &Files, log: &str) -> Result<Launched, SpawnError> {
    let path = worker_socket(directory);
    let memfd = config_memfd(config).map_err(system("the worker's configuration cannot be written"))?;
    let listen = |path: &Path, kind| {
        bind(path, kind).map_err(system(format!("the worker's socket {} cannot be made", path.display())))
    };
    let listener = listen(&path, SocketType::SEQPACKET)?;
    let console = listen(&console_socket(directory), SocketType::STREAM)?;

    let mut plan = ChildPlan::new(config.die_with_parent, Pages(config.swap_file_pages.into()).bytes());
    for (source, target) in [
        (Some(memfd.as_fd()), fd::CONFIG),
        (Some(listener.as_fd()), fd::LISTEN),
        (Some(files.kvm.as_fd()), fd::KVM),
        (files.uffd_device.as_ref().map(AsFd::as_fd), fd::UFFD_DEV),
        (Some(console.as_fd()), fd::CONSOLE),
        (Some(files.kernel.as_fd()), fd::KERNEL),
        (files.initrd.as_ref().map(AsFd::as_fd), fd::INITRD),
        (Some(files.console.as_fd()), fd::CONSOLE_RING),
        (files.swap_file.as_ref().map(AsFd::as_fd), fd::SWAP_FILE),
    ] {
        let Some(source) = source else { continue };
        let copy = rustix::io::fcntl_dupfd_cloexec(source, ABOVE_FIXED)
            .map_err(io::Error::from)
            .map_err(system("no descriptor is left for the worker"))?;
        plan.give(copy, target);
    }
    if let Some(cgroup) = &files.cgroup {
        plan.entrance = Some(cgroup.entrance().map_err(system("the worker's cgroup cannot be entered"))?);
    }
    let log_file = (!config.die_with_parent).then(|| make_log(directory)).transpose();
    let log_file = log_file.map_err(system(format!("the log in {} cannot be made", directory.display())))?;
    let child =
        spawn_child(&config.name, log, log_file, plan).map_err(system("the worker process cannot be started"))?;
    let (handle, watch) =
        supervise(child, directory, files.cgroup.clone()).map_err(system("the worker process cannot be watched"))?;
    let attach = |pid| -> Result<_, SpawnError> {
        let console = UnixStream::from(link::connect_as(SocketType::STREAM, &console_socket(directory), pid)?);
        console.set_nonblocking(false).map_err(system("the console cannot be used"))?;
        Ok(console)
    };
    let connect = |pid| -> Result<_, SpawnError> {
        let link = link::connect(&path, pid)?;
        Ok((link, files.attach.then(|| attach(pid)).transpose()?))
    };
    match connect(handle.pid()) {
        Ok((link, console)) => Ok(Launched { handle, watch, link, console }),
        Err(error) => {
            handle.kill();
            Err(error)
        }
    }
}

/// Makes `directory` for this user alone. One that exists, because a killed process has left it, must be so already:
/// somebody else's is not changed.
///
/// # Errors
/// When it cannot be made, or something else is there.
pub fn make_directory(directory: &Path) -> Result<(), SpawnError> {
    let failed = |e| system(format!("the directory {} cannot be made", directory.display()))(e);
    if let Some(parent) = directory.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
    }
    match DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => return Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        Err(e) => return Err(failed(e)),
    }
    let found = std::fs::symlink_metadata(directory).map_err(failed)?;
    let private = found.is_dir() && found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o077 == 0;
    if private { Ok(()) } else { Err(SpawnError::InTheWay(directory.display().to_string())) }
}

/// Removes what [`launch`] has made in `directory`, and the directory if nothing else is in it.
pub fn tidy(directory: &Path) {
    // What is not there need not be removed; what is not ours stays.
    let _ = remove_socket(&worker_socket(directory));
    let _ = remove_socket(&console_socket(directory));
    let _ = std::fs::remove_file(worker_log(directory));
    let _ = std::fs::remove_dir(directory);
}

/// Removes the socket at `path`, if there is one; a file of another kind is an error.
fn remove_socket(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path),
        Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
    }
}

/// An empty log. A worker that outlives its controller has nobody who reads a pipe, and must never wait for one.
fn make_log(directory: &Path) -> io::Result<File> {
    let path = worker_log(directory);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    File::options().append(true).create_new(true).mode(0o600).open(path)
}

fn config_memfd(config: &WorkerConfig) -> io::Result<OwnedFd> {
    let memfd = rustix::fs::memfd_create("ballast-config", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(memfd);
    file.write_all(&serde_json::to_vec(config)?)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file.into())
}

/// Binds a socket of the worker, in place of one that a dead worker left. It is the child that listens on it, so that
/// the credentials a connecting process sees are the worker's.
fn bind(path: &Path, kind: SocketType) -> io::Result<OwnedFd> {
    remove_socket(path)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// What happens in the child between fork and exec.
struct ChildPlan {
    /// Descriptor to copy to each fixed number, or -1 when nothing is handed over there.
    sources: [RawFd; FIXED_END as usize],
    /// Keeps the sources open until the fork.
    owned: Vec<OwnedFd>,
    /// Where to write `0` to be in a cgroup from the exec on: everything that the worker makes is charged there.
    entrance: Option<OwnedFd>,
    /// Process that the child must not outlive, 0 for none.
    parent: libc::pid_t,
    /// Bytes of the longest file that it may write.
    longest: u64,
}

impl ChildPlan {
    fn new(die_with_parent: bool, swap_file: u64) -> Self {
        let parent = if die_with_parent { std::process::id().cast_signed() } else { 0 };
        let longest = MAX_LOG.max(swap_file);
        Self { sources: [-1; FIXED_END as usize], owned: Vec::new(), entrance: None, parent, longest }
    }

    fn give(&mut self, source: OwnedFd, target: RawFd) {
        self.sources[target as usize] = source.as_raw_fd();
        self.owned.push(source);
    }

    /// Runs in the child of a possibly multi-threaded process: async-signal-safe calls only.
    fn apply(&self) -> io::Result<()> {
        let check = |result: libc::c_long| {
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        };
        if let Some(entrance) = &self.entrance {
            // SAFETY: the buffer is one byte of a constant, and the descriptor is open.
            check(unsafe { libc::write(entrance.as_raw_fd(), c"0".as_ptr().cast(), 1) } as libc::c_long)?;
        }
        for target in fd::CONFIG..FIXED_END {
            let source = self.sources[target as usize];
            if source >= 0 {
                // SAFETY: dup2 takes numbers; `target` is a fixed number that the parent has made sure to be no
                // descriptor the standard library uses between fork and exec.
                check(unsafe { libc::dup2(source, target) }.into())?;
            } else {
                // SAFETY: close_range takes numbers and, with this flag, only marks for closing at exec.
                check(unsafe { libc::syscall(libc::SYS_close_range, target, target, libc::CLOSE_RANGE_CLOEXEC) })?;
            }
        }
        // SAFETY: as above. Closing waits for the exec because the standard library's own pipe is in the range.
        check(unsafe {
            libc::syscall(libc::SYS_close_range, FIXED_END, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
        })?;
        // A session of its own: no terminal, and no signal that is meant for the controller's process group.
        // SAFETY: setsid takes nothing; the child of a fork leads no process group yet.
        check(unsafe { libc::setsid() }.into())?;
        for socket in [fd::LISTEN, fd::CONSOLE] {
            // SAFETY: listen takes a number and a length.
            check(unsafe { libc::listen(socket, BACKLOG) }.into())?;
        }
        // SAFETY: this prctl takes four numbers.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
        if self.parent != 0 {
            // SAFETY: this prctl takes a signal number.
            check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) }.into())?;
            // SAFETY: getppid has no conditions. A parent that died before the prctl would never be noticed.
            if unsafe { libc::getppid() } != self.parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        } else {
            // The only files that a worker can write are its log and its swap file: a guest that has broken in must not fill
            // the disk.
            let most = libc::rlimit { rlim_cur: self.longest, rlim_max: self.longest };
            // SAFETY: this reads one `rlimit`, which lives until the call returns.
            check(unsafe { libc::setrlimit(libc::RLIMIT_FSIZE, &raw const most) }.into())?;
        }
        Ok(())
    }
}

fn spawn_child(name: &str, log: &str, log_file: Option<File>, plan: ChildPlan) -> io::Result<Child> {
    // Occupies the fixed numbers, so that the pipe by which the standard library reports a failed exec is
    // not at one of them.
    let mut placeholders = vec![rustix::io::fcntl_dupfd_cloexec(&plan.owned[0], fd::CONFIG)?];
    while placeholders.last().is_some_and(|last| last.as_raw_fd() < FIXED_END) {
        placeholders.push(rustix::io::fcntl_dupfd_cloexec(&plan.owned[0], fd::CONFIG)?);
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg0("ballast").arg("worker").arg(name).env("BALLAST_LOG", log);
    command.stdin(Stdio::null()).stdout(Stdio::null()).current_dir("/");
    if let Some(file) = log_file {
        command.stderr(file);
    }
    // SAFETY: `apply` calls async-signal-safe functions only and touches no memory but its own.
    unsafe { command.pre_exec(move || plan.apply()) };
    command.spawn()
}

/// How a worker process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// It exited with this status.
    Exited(i32),
    /// A signal ended it.
    Signal(i32),
    /// The host's OOM killer ended it, because its cgroup was full.
    HostOom,
    /// Its status is not known.
    Unknown,
}

impl std::fmt::Display for Death {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Signal(libc::SIGKILL) => write!(f, "was killed by the host (signal 9)"),
            Self::HostOom => write!(f, "was killed by the host: its cgroup was full"),
            Self::Signal(libc::SIGSYS) => {
                write!(f, "was ended by its sandbox (signal 31; the host's log has the call)")
            }
            Self::Signal(signal) => write!(f, "was ended by signal {signal}"),
            Self::Unknown => write!(f, "ended in an unknown way"),
        }
    }
}

/// Ends a worker, whoever its process id belongs to by then.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    pid: i32,
    pidfd: Arc<OwnedFd>,
    directory: Arc<Path>,
    residency: Option<Residency>,
    since: Instant,
}

impl WorkerHandle {
    /// The end of what it has said on standard error, when that is a file of its own.
    pub fn log_tail(&self) -> String {
        log_tail(&self.directory)
    }

    /// Process id.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// How long its guest has run in all, as the kernel counts it in the process; `None` when the process is gone.
    pub fn guest_ran(&self) -> Option<Duration> {
        let ticks = procfs::process::Process::new(self.pid).and_then(|process| process.stat()).ok()?.guest_time?;
        Some(Duration::from_micros(ticks.saturating_mul(1_000_000) / procfs::ticks_per_second()))
    }

    /// When it was started, perhaps by an earlier controller.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The VM's directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Sends SIGKILL, and has its memory taken; harmless when it is dead already.
    pub fn kill(&self) {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) => release::after_kill(&self.pidfd),
            Err(error) => tracing::debug!(%error, pid = self.pid, "the worker is gone already"),
        }
    }

    /// Gives it an OOM score.
    ///
    /// # Errors
    /// As the kernel says, or when it is dead.
    pub fn set_oom_score(&self, score: i16) -> io::Result<()> {
        let mut file = standing::of(self.pid)?;
        // Alive after that, so the number was its own. A descriptor of it that is readable is a process that has ended.
        let mut ended = [rustix::event::PollFd::new(&self.pidfd, rustix::event::PollFlags::IN)];
        if rustix::event::poll(&mut ended, Some(&rustix::event::Timespec::default()))? > 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        file.write_all(score.to_string().as_bytes())
    }

    /// The socket at which its guest's console is.
    pub fn console(&self) -> PathBuf {
        console_socket(&self.directory)
    }

    /// What the host says of its memory.
    pub fn residency(&self) -> Option<&Residency> {
        self.residency.as_ref()
    }

    /// Removes what [`launch`] has made for it on disk.
    pub fn tidy(&self) {
        tidy(&self.directory);
    }
}

/// Waits for the end of a worker and collects its status.
#[derive(Debug)]
pub struct DeathWatch {
    /// Absent when it is another process's child: then nobody tells how it ended.
    child: Option<Child>,
    pidfd: AsyncFd<Arc<OwnedFd>>,
}

impl DeathWatch {
    /// Completes when the process has ended and been reaped.
    pub async fn ended(mut self) -> Death {
        if self.pidfd.readable().await.is_err() {
            return Death::Unknown;
        }
        let Some(child) = &mut self.child else {
            return Death::Unknown;
        };
        match child.wait() {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Death::Exited(code),
                (None, Some(signal)) => Death::Signal(signal),
                (None, None) => Death::Unknown,
            },
            Err(_) => Death::Unknown,
        }
    }
}

fn supervise(mut child: Child, directory: &Path, cgroup: Option<Cgroup>) -> io::Result<(WorkerHandle, DeathWatch)> {
    let pid = child.id().cast_signed();
    let watch = move || -> io::Result<_> {
        let id = Pid::from_raw(pid).ok_or(io::ErrorKind::NotFound)?;
        // Not reaped yet, so the number is still this child's.
        watch_over(pid, rustix::process::pidfd_open(id, PidfdFlags::NONBLOCK)?, directory, cgroup)
    };
    match watch() {
        Ok((handle, mut watch)) => {
            watch.child = Some(child);
            Ok((handle, watch))
        }
        Err(error) => {
            // Nobody else would end it.
            let _ = child.kill();
            let _ = child.wait();
            Err(error)
        }
    }
}

/// When a process was started; one that is gone, now.
fn started(pid: i32) -> Instant {
    let now = Instant::now();
    let ticks = procfs::process::Process::new(pid).and_then(|process| process.stat()).map(|stat| stat.starttime);
    let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let boot = Duration::new(boot.tv_sec.unsigned_abs(), boot.tv_nsec as u32);
    let age = ticks.ok().and_then(|ticks| {
        let at = Duration::from_millis(ticks.saturating_mul(1000) / procfs::ticks_per_second());
        boot.checked_sub(at)
    });
    now.checked_sub(age.unwrap_or_default()).unwrap_or(now)
}

/// The handle and the watch of a process that is another one's child.
///
/// # Errors
/// When the descriptor cannot be watched.
///
/// # Panics
/// Outside a tokio runtime.
pub fn watch_over(
    pid: i32,
    pidfd: OwnedFd,
    directory: &Path,
    cgroup: Option<Cgroup>,
) -> io::Result<(WorkerHandle, DeathWatch)> {
    let pidfd = Arc::new(pidfd);
    release::prepare();
    // After the exec: the address space is the worker's. One that may not be looked into is not audited.
    let residency = Residency::open(pid, cgroup).inspect_err(|error| tracing::warn!(%error, pid, "no pagemap")).ok();
    let handle =
        WorkerHandle { pid, pidfd: Arc::clone(&pidfd), directory: directory.into(), residency, since: started(pid) };
    // SAFETY: the descriptor is owned and stays the same as long as one of its owners lives.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
    Ok((handle, DeathWatch { child: None, pidfd }))
}

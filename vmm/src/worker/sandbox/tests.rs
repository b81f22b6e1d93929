//! Every test enters a sandbox in a child process of its own and looks at how the child ends.

use super::*;

const EVERY: [Thread; 4] = [Thread::Vcpu, Thread::Fault, Thread::Device, Thread::Reclaim];

/// How a child ends that enters the sandbox of `thread` and does `act`: 0 when that came back, else the signal.
fn ending(thread: Thread, act: impl FnOnce()) -> i32 {
    // SAFETY: the child leaves by `_exit` or a signal. It allocates, which glibc allows after a fork.
    match unsafe { libc::fork() } {
        -1 => panic!("no child: {}", io::Error::last_os_error()),
        0 => {
            let status = if enter(thread).is_ok() { 0 } else { 1 };
            act();
            crate::worker::exit(status)
        }
        child => {
            let mut status = 0;
            // SAFETY: the status is a local; the child is ours and reaped once.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            if libc::WIFSIGNALED(status) {
                return libc::WTERMSIG(status);
            }
            assert_eq!(libc::WEXITSTATUS(status), 0, "{thread:?}: the sandbox refused the child");
            0
        }
    }
}

fn syscall(number: libc::c_long, arguments: [u64; 4]) {
    let [a, b, c, d] = arguments;
    // SAFETY: the callers pass numbers that name no memory but constant strings, or memory that the kernel checks.
    unsafe { libc::syscall(number, a, b, c, d, 0, 0) };
}

/// What an intruder would do first ends the whole process.
#[test]
fn files_sockets_programs_processes_and_debugging_end_the_process() {
    let path = c"/etc/passwd".as_ptr() as u64;
    let at = libc::AT_FDCWD as u64;
    let forbidden = [
        (libc::SYS_openat, [at, path, 0, 0]),
        (libc::SYS_open, [path, 0, 0, 0]),
        (libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0]),
        (libc::SYS_connect, [0, 0, 0, 0]),
        (libc::SYS_execve, [path, 0, 0, 0]),
        (libc::SYS_fork, [0; 4]),
        (libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0]),
        (libc::SYS_clone3, [0; 4]),
        (libc::SYS_ptrace, [libc::PTRACE_ATTACH as u64, 1, 0, 0]),
        (libc::SYS_process_vm_readv, [1, 0, 0, 0]),
        (libc::SYS_kill, [1, 0, 0, 0]),
        (libc::SYS_tgkill, [1, 1, 0, 0]),
        (libc::SYS_seccomp, [0; 4]),
        (libc::SYS_io_uring_setup, [1, 0, 0, 0]),
        (libc::SYS_bpf, [0; 4]),
        // The other table of numbers that this machine has (x32).
        (libc::SYS_read | 0x4000_0000, [0; 4]),
    ];
    for thread in EVERY {
        for (number, arguments) in forbidden {
            assert_eq!(ending(thread, || syscall(number, arguments)), libc::SIGSYS, "{thread:?}: system call {number}");
        }
    }
}

/// A descriptor that stays open is good for what its thread does with it and no more.
#[test]
fn calls_that_are_needed_are_limited_by_their_arguments() {
    use linux_raw_sys::ioctl as nr;
    let create_vm = 0xAE01;
    let ioctl = |request: u32| move || syscall(libc::SYS_ioctl, [u64::MAX, request.into(), 0, 0]);
    for (thread, allowed, forbidden) in [
        (Thread::Vcpu, 0xAE80, create_vm),
        (Thread::Vcpu, 0xAEAD, nr::UFFDIO_COPY),
        (Thread::Vcpu, 0x8090_AE81, libc::TIOCSTI as u32),
        (Thread::Fault, nr::UFFDIO_COPY, nr::UFFDIO_UNREGISTER),
        (Thread::Fault, nr::UFFDIO_WAKE, 0xAE80),
        (Thread::Fault, nr::UFFDIO_REGISTER, create_vm),
    ] {
        assert_eq!(ending(thread, ioctl(allowed)), 0, "{thread:?}: ioctl {allowed:#x}");
        assert_eq!(ending(thread, ioctl(forbidden)), libc::SIGSYS, "{thread:?}: ioctl {forbidden:#x}");
    }
    let map = |prot: i32, flags: i32| move || syscall(libc::SYS_mmap, [0, 4096, prot as u64, flags as u64]);
    let (write, anonymous) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    for thread in EVERY {
        assert_eq!(ending(thread, map(write, anonymous)), 0, "{thread:?}");
        assert_eq!(ending(thread, map(write | libc::PROT_EXEC, anonymous)), libc::SIGSYS, "{thread:?}: code");
        assert_eq!(ending(thread, map(write, libc::MAP_SHARED)), libc::SIGSYS, "{thread:?}: a file");
        assert_eq!(ending(thread, map(write, anonymous | libc::MAP_FIXED)), libc::SIGSYS, "{thread:?}: an address");
    }
    // Advice about nothing at all: the kernel has nothing against it.
    let advise = |advice: i32| move || syscall(libc::SYS_madvise, [0, 0, advice as u64, 0]);
    for thread in [Thread::Fault, Thread::Reclaim] {
        assert_eq!(ending(thread, advise(libc::MADV_POPULATE_WRITE)), 0, "{thread:?}");
        assert_eq!(ending(thread, advise(libc::MADV_HUGEPAGE)), libc::SIGSYS, "{thread:?}");
    }
    assert_eq!(
        ending(Thread::Device, advise(libc::MADV_POPULATE_WRITE)),
        libc::SIGSYS,
        "devices make nothing resident"
    );
    assert_eq!(ending(Thread::Device, ioctl(0xAE80)), libc::SIGSYS, "devices need no ioctl");
    assert_eq!(ending(Thread::Vcpu, || syscall(libc::SYS_read, [u64::MAX, 0, 0, 0])), libc::SIGSYS);
}

/// A worker whose thread fails must end, and say why, from inside.
#[test]
fn threads_can_allocate_lock_log_and_abort() {
    for thread in EVERY {
        let work = || {
            let mut bytes = vec![1u8; 64 << 10];
            bytes.resize(8 << 20, 2);
            let (sender, receiver) = std::sync::mpsc::sync_channel(1);
            let _ = sender.send(bytes.len());
            let _ = receiver.recv();
            let _ = std::time::Instant::now();
            drop(bytes);
            tracing::warn!("a line of the log");
            std::thread::yield_now();
        };
        let log = tracing_subscriber::fmt().with_writer(io::sink).finish();
        assert_eq!(tracing::subscriber::with_default(log, || ending(thread, work)), 0, "{thread:?}");
        assert_eq!(ending(thread, || std::process::abort()), libc::SIGABRT, "{thread:?}");
    }
}

/// The second wall stands by itself: where the kernel has Landlock, a thread can open nothing any more.
#[test]
fn landlock_alone_keeps_all_files_shut() {
    if let Err(reason) = landlock_version() {
        println!("SKIP landlock reason={reason}");
        return;
    }
    let thread = std::thread::spawn(|| {
        restrict_files().unwrap();
        (std::fs::File::open("/etc/passwd").map(drop), std::fs::read_dir("/").map(drop))
    });
    let (file, directory) = thread.join().unwrap();
    assert_eq!(file.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert_eq!(directory.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    assert!(std::fs::File::open("/etc/passwd").is_ok(), "only that thread is shut in");
}

/// Root has capabilities to lose; they are gone from every set, so that nothing brings them back.
#[test]
fn no_capability_is_left_in_any_set() {
    let status = std::thread::spawn(|| {
        drop_capabilities().unwrap();
        std::fs::read_to_string("/proc/thread-self/status").unwrap()
    });
    let status = status.join().unwrap();
    let root = rustix::process::geteuid().is_root();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"] {
        let line = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(":\t")).unwrap();
        assert!(line == "0000000000000000" || (set == "CapBnd" && !root), "{set}: {line}");
    }
}

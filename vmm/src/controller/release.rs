//! Memory of a worker that was killed, back without waiting for the worker.
//!
//! A killed process gives its memory back when the last of its threads has ended, and each of them has to run for that. On a
//! host that is short of memory one may wait long for its turn, or in the kernel for memory. `process_mrelease` takes what the
//! process has at once, in the time of whoever calls it. That time is as long as it takes to free the pages, so the call is made
//! by a thread that does nothing else, and never by the actor. It is there before anybody is killed: when memory is out is no
//! time to start one.
//!
//! A worker whose threads run sees the signal by itself, and the call would take a CPU from the very threads that have to: a vCPU
//! went on for 2 ms because of it. So it is made for those that are still there after [`PATIENCE`].
//!
//! Nothing depends on it. A kernel that refuses leaves everything to the end of the process, and charges are released when the
//! memory is seen to be back, either way.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, OnceLock, mpsc};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a killed worker has to end by itself.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// How often the call is made where the kernel says that it has to be made again.
const TRIES: usize = 3;

/// The thread's inbox. Without the thread it takes messages that nobody reads.
fn releaser() -> &'static mpsc::Sender<Arc<OwnedFd>> {
    static RELEASER: OnceLock<mpsc::Sender<Arc<OwnedFd>>> = OnceLock::new();
    RELEASER.get_or_init(|| {
        let (releaser, killed) = mpsc::channel();
        let thread = std::thread::Builder::new().name("release".into()).stack_size(64 << 10);
        if let Err(error) = thread.spawn(move || killed.iter().for_each(|pidfd: Arc<OwnedFd>| release(&pidfd))) {
            tracing::warn!(%error, "memory of killed workers comes back as they end, and no faster");
        }
        releaser
    })
}

/// Makes sure that there is somebody to do it.
pub fn prepare() {
    releaser();
}

/// Takes the memory of a process that has been sent SIGKILL. Returns at once.
pub fn after_kill(pidfd: &Arc<OwnedFd>) {
    // Without the thread there is nobody to do it, which has been said.
    let _ = releaser().send(Arc::clone(pidfd));
}

fn release(pidfd: &OwnedFd) {
    // It is readable when the process has ended.
    if poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&PATIENCE)).is_ok_and(|ended| ended > 0) {
        return;
    }
    for _ in 0..TRIES {
        match mrelease(pidfd) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
            Ok(()) => return,
            // It has none any more, or is not ending after all, or this kernel cannot.
            Err(error) => return tracing::debug!(%error, "a killed worker's memory comes back as it ends"),
        }
    }
}

fn mrelease(pidfd: &OwnedFd) -> io::Result<()> {
    // SAFETY: the call takes a descriptor, which is open, and flags, of which there are none; it changes no memory of ours.
    match unsafe { libc::syscall(libc::SYS_process_mrelease, pidfd.as_raw_fd(), 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

    use super::*;

    /// Who is not dying keeps what it has, and who is gone has nothing to give: neither is an error for anybody.
    #[test]
    fn only_a_process_that_was_killed_loses_its_memory_and_nobody_waits_for_that() {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().expect("a process");
        let pid = Pid::from_raw(child.id().cast_signed()).expect("a number");
        let pidfd = Arc::new(pidfd_open(pid, PidfdFlags::empty()).expect("a descriptor"));
        let refused = mrelease(&pidfd).expect_err("it lives").raw_os_error();
        assert!(matches!(refused, Some(libc::EINVAL | libc::ENOSYS)), "{refused:?}");
        assert!(child.try_wait().expect("ours").is_none(), "it lives on");
        pidfd_send_signal(&pidfd, Signal::KILL).expect("killed");
        let begin = Instant::now();
        after_kill(&pidfd);
        assert!(begin.elapsed() < Duration::from_secs(1));
        child.wait().expect("reaped");
        let gone = mrelease(&pidfd).expect_err("it is gone").raw_os_error();
        assert!(matches!(gone, Some(libc::ESRCH | libc::ENOSYS)), "{gone:?}");
    }
}

//! The system calls of each kind of thread, and why it makes them.
//!
//! | call | vcpu | fault | device | reclaim | what for |
//! | --- | --- | --- | --- | --- | --- |
//! | `futex` | x | x | x | x | the gate; locks, channels |
//! | `write` | x | x | x | x | eventfds; the console; messages of a worker that fails, to standard error |
//! | `read` | | x | x | x | userfaultfd, eventfds, timers, the console |
//! | `ioctl` | KVM's | userfaultfd's, `PAGEMAP_SCAN` | | userfaultfd's | the guest; filling and moving pages, the begin of accounting |
//! | `epoll_wait` | | | x | | the device loop |
//! | `epoll_pwait` | | x | | | the fault loop |
//! | `epoll_ctl` | | x | x | | a controller that connects, the new userfaultfd; clients of the console |
//! | `ppoll` | | x | x | x | last words: the controller's socket, the console; the bell |
//! | `madvise` | allocator's | x | x | x | discards; splitting a huge page, zeroing a new one; the begin of accounting |
//! | `process_madvise` | | x | x | x | discards of many ranges: pages of zeroes; the balloon; evicted pages |
//! | `accept4`, `getsockopt`, `geteuid`, `close` | | x | x | | a controller, a client of the console that connects, and who it is; one that goes |
//! | `sendto`, `recvfrom` | | x | | | messages |
//! | `fcntl` | | `F_GETFD` | `F_GETFD` | | a check before `close` in debug builds |
//! | `pread64`, `sched_setaffinity` | | x | | | going where the vCPU runs |
//! | `pread64`, `pwrite64` | | | | the swap file's | evicted pages that do not shrink |
//! | `prctl` | | `PR_SET_NAME` | | | `channel` becomes `fault` |
//! | `timerfd_settime` | | | x | | the guest's statistics |
//! | `tgkill` | own | own | own | own | the kick of vCPUs; `abort` |
//! | `mmap`, `munmap`, `mprotect`, `mremap`, `brk` | x | x | x | x | the allocator (a) |
//! | `rt_sigprocmask`, `rt_sigaction`, `gettid`, `getpid`, `exit_group` | x | x | x | x | `abort` (b), `_exit` |
//! | `rt_sigreturn`, `restart_syscall` | x | x | x | x | after a kick; after a stop (`SIGSTOP`, a debugger) |
//! | `clock_gettime` | x | x | x | x | where the clock cannot be read without a call |
//! | `sched_yield` | x | x | x | x | a channel's short wait |
//!
//! (a) Memory is private and anonymous, never executable and never at an address that the caller chose.
//! (b) `rt_sigaction` is for the signals that end a process: `SIGABRT`, `SIGSEGV`, `SIGBUS`.
//!
//! A filter is a chain of comparisons by rising number, and what runs at every fault (`read`, `write`, `ioctl`) has
//! small numbers. Of an `ioctl` the ways are compared in the order given here. What is allowed with any arguments the
//! kernel remembers, and runs no filter for. Measured: 15 to 30 ns a call for those, 50 ns for an `ioctl`.

use linux_raw_sys::ioctl as nr;

use super::Thread;
use crate::memory::activation::PAGEMAP_SCAN;
use crate::memory::uffd::{UFFDIO_MOVE, USERFAULTFD_IOC_NEW};
use crate::worker::config::fd;

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: u32 = 0xAE80;
/// `_IOR(KVMIO, 0x81, struct kvm_regs)`.
const KVM_GET_REGS: u32 = 0x8090_AE81;
/// `_IO(KVMIO, 0xad)`.
const KVM_KVMCLOCK_CTRL: u32 = 0xAEAD;

/// What an argument must be: its low 32 bits, under a mask.
#[derive(Clone, Copy, Debug)]
pub struct Is {
    pub argument: u8,
    pub mask: u32,
    pub value: u32,
}

/// A call that is allowed.
#[derive(Clone, Debug)]
pub struct Call {
    pub number: i64,
    /// Any of these must be met as a whole; with none, the arguments do not matter.
    pub ways: Vec<Vec<Is>>,
}

fn any(number: i64) -> Call {
    Call { number, ways: Vec::new() }
}

/// `argument` is one of `values`.
fn one_of(number: i64, argument: u8, values: &[u32]) -> Call {
    let ways = values.iter().map(|&value| vec![Is { argument, mask: u32::MAX, value }]);
    Call { number, ways: ways.collect() }
}

/// Of the bits in `mask`, `argument` has those of `value`.
fn masked(argument: u8, mask: i32, value: i32) -> Is {
    Is { argument, mask: mask.cast_unsigned(), value: value.cast_unsigned() }
}

/// Everything that `thread` may do.
pub fn of(thread: Thread) -> Vec<Call> {
    let mut calls = everybody();
    calls.extend(match thread {
        Thread::Vcpu => vcpu(),
        Thread::Fault => fault(),
        Thread::Device => device(),
        Thread::Reclaim => reclaim(),
    });
    calls
}

fn everybody() -> Vec<Call> {
    let not_executable = masked(2, libc::PROT_EXEC, 0);
    let (kind, new_memory) = (libc::MAP_TYPE | libc::MAP_FIXED, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let anonymous = masked(3, kind | libc::MAP_ANONYMOUS, new_memory);
    vec![
        any(libc::SYS_futex),
        any(libc::SYS_write),
        Call { number: libc::SYS_mmap, ways: vec![vec![not_executable, anonymous]] },
        any(libc::SYS_munmap),
        Call { number: libc::SYS_mprotect, ways: vec![vec![not_executable]] },
        one_of(libc::SYS_mremap, 3, &[libc::MREMAP_MAYMOVE.cast_unsigned()]),
        any(libc::SYS_brk),
        one_of(libc::SYS_tgkill, 0, &[std::process::id()]),
        any(libc::SYS_rt_sigprocmask),
        one_of(libc::SYS_rt_sigaction, 0, &[libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS].map(i32::cast_unsigned)),
        any(libc::SYS_rt_sigreturn),
        any(libc::SYS_restart_syscall),
        any(libc::SYS_gettid),
        any(libc::SYS_getpid),
        any(libc::SYS_exit_group),
        any(libc::SYS_clock_gettime),
        any(libc::SYS_sched_yield),
    ]
}

fn vcpu() -> Vec<Call> {
    vec![
        // The guest; its clock after a hold; where it was when it cannot go on.
        one_of(libc::SYS_ioctl, 1, &[KVM_RUN, KVM_KVMCLOCK_CTRL, KVM_GET_REGS]),
        advice(libc::SYS_madvise, 2, &[libc::MADV_DONTNEED]),
    ]
}

fn fault() -> Vec<Call> {
    let ioctls = [
        nr::UFFDIO_COPY,
        nr::UFFDIO_WAKE,
        UFFDIO_MOVE,
        // When accounting begins on a running VM: the count, a userfaultfd, the registration.
        PAGEMAP_SCAN as u32,
        USERFAULTFD_IOC_NEW as u32,
        nr::UFFDIO_API,
        nr::UFFDIO_REGISTER,
    ];
    // The last two when accounting begins: no huge pages, no merging.
    let pieces_of_advice = [
        libc::MADV_DONTNEED,
        libc::MADV_COLD,
        libc::MADV_POPULATE_WRITE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_UNMERGEABLE,
    ];
    vec![
        any(libc::SYS_read),
        one_of(libc::SYS_ioctl, 1, &ioctls),
        any(libc::SYS_epoll_pwait),
        any(libc::SYS_epoll_ctl),
        any(libc::SYS_ppoll),
        advice(libc::SYS_madvise, 2, &pieces_of_advice),
        advice(libc::SYS_process_madvise, 3, &[libc::MADV_DONTNEED]),
        any(libc::SYS_accept4),
        any(libc::SYS_getsockopt),
        any(libc::SYS_geteuid),
        any(libc::SYS_sendto),
        any(libc::SYS_recvfrom),
        any(libc::SYS_close),
        one_of(libc::SYS_fcntl, 1, &[libc::F_GETFD.cast_unsigned()]),
        any(libc::SYS_pread64),
        any(libc::SYS_sched_setaffinity),
        one_of(libc::SYS_prctl, 0, &[libc::PR_SET_NAME.cast_unsigned()]),
    ]
}

fn device() -> Vec<Call> {
    vec![
        any(libc::SYS_read),
        any(libc::SYS_epoll_wait),
        any(libc::SYS_epoll_ctl),
        any(libc::SYS_ppoll),
        advice(libc::SYS_madvise, 2, &[libc::MADV_DONTNEED, libc::MADV_COLD]),
        advice(libc::SYS_process_madvise, 3, &[libc::MADV_DONTNEED]),
        any(libc::SYS_timerfd_settime),
        any(libc::SYS_accept4),
        any(libc::SYS_getsockopt),
        any(libc::SYS_geteuid),
        any(libc::SYS_close),
        one_of(libc::SYS_fcntl, 1, &[libc::F_GETFD.cast_unsigned()]),
    ]
}

fn reclaim() -> Vec<Call> {
    vec![
        any(libc::SYS_read),
        one_of(libc::SYS_ioctl, 1, &[UFFDIO_MOVE]),
        any(libc::SYS_ppoll),
        one_of(libc::SYS_pread64, 0, &[fd::SWAP_FILE.cast_unsigned()]),
        one_of(libc::SYS_pwrite64, 0, &[fd::SWAP_FILE.cast_unsigned()]),
        advice(libc::SYS_madvise, 2, &[libc::MADV_DONTNEED, libc::MADV_COLD, libc::MADV_POPULATE_WRITE]),
        advice(libc::SYS_process_madvise, 3, &[libc::MADV_DONTNEED]),
    ]
}

fn advice(number: i64, argument: u8, values: &[i32]) -> Call {
    let values: Vec<u32> = values.iter().map(|value| value.cast_unsigned()).collect();
    one_of(number, argument, &values)
}

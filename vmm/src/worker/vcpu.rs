//! The thread of one vCPU: pass the gate, enter the guest, serve its exit.
//!
//! All signals are blocked in every thread of a worker but for the kick here: a system call of another thread that met
//! one while it waits for a guest page would spin.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};

use vmm_sys_util::eventfd::EventFd;

use super::gate::{Gate, kick_signal};
use super::protocol::ExitReason;
use super::sandbox::{self, SandboxError, Thread};
use crate::devices::bus::Buses;
use crate::machine::vcpu::{Step, Vcpu};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// How the VM came to its end, from the vCPU that saw it.
#[derive(Debug)]
pub enum End {
    /// The guest ended it.
    Guest(ExitReason),
    /// A vCPU cannot go on; a sentence for the user.
    Broken(String),
}

/// Where vCPU threads say that the VM has ended.
#[derive(Clone, Debug)]
pub struct EndSender {
    /// The first end is the one that counts; later ones find the channel full and are dropped.
    pub sender: SyncSender<End>,
    /// Written after sending.
    pub event: Arc<EventFd>,
}

/// Why a vCPU has no thread.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The host gives none.
    #[error("no thread for a vCPU")]
    Thread(#[from] io::Error),
    /// It is not in its sandbox.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

/// Starts the thread of one vCPU and returns its kernel thread id. It is in its sandbox, and waits at the gate first.
///
/// # Errors
/// When the host gives no thread, or no sandbox.
pub fn spawn(mut vcpu: Vcpu, gate: Arc<Gate>, buses: Arc<Buses>, end: EndSender) -> Result<i32, SpawnError> {
    let (tid_sender, tid) = sync_channel(1);
    let index = vcpu.index() as usize;
    std::thread::Builder::new().name(format!("vcpu{index}")).stack_size(256 << 10).spawn(move || {
        IMMEDIATE_EXIT.set(vcpu.immediate_exit_ptr());
        unblock_kick();
        gate.register(index);
        // SAFETY: gettid has no conditions.
        let tid = unsafe { libc::gettid() };
        let _ = tid_sender.send(sandbox::enter(Thread::Vcpu).map(|()| tid));
        let ended = run(&mut vcpu, &gate, &buses);
        if end.sender.try_send(ended).is_ok() {
            let _ = end.event.write(1);
        }
        // The descriptors of a vCPU are never closed while the process lives.
        loop {
            std::thread::park();
        }
    })?;
    Ok(tid.recv().map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))??)
}

fn run(vcpu: &mut Vcpu, gate: &Gate, buses: &Buses) -> End {
    loop {
        vcpu.clear_kick();
        if !gate.open() {
            gate.park();
            vcpu.kvmclock_ctrl();
            continue;
        }
        match vcpu.run_once(buses) {
            Step::Continue | Step::Interrupted => {}
            Step::Wait(time) => gate.idle(time),
            Step::Exit(reason) => return End::Guest(reason),
            Step::Failed(sentence) => return End::Broken(sentence),
        }
    }
}

extern "C" fn on_kick(_: libc::c_int) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer belongs to this thread's vCPU, which is never closed.
        unsafe { AtomicU8::from_ptr(flag) }.store(1, Ordering::SeqCst);
    }
}

/// Installs the handler of the kick and blocks every signal in the calling thread, and so in all that it starts.
///
/// # Errors
/// As the kernel says.
pub fn prepare_signals() -> io::Result<()> {
    // SAFETY: zeroed is a valid `sigaction` and `sigset_t`; the handler only stores one byte, which is
    // async-signal-safe; the thread-local it reads is const-initialised and has no destructor.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as extern "C" fn(libc::c_int) as libc::sighandler_t;
        if libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        match libc::pthread_sigmask(libc::SIG_SETMASK, &all, std::ptr::null_mut()) {
            0 => Ok(()),
            e => Err(io::Error::from_raw_os_error(e)),
        }
    }
}

fn unblock_kick() {
    // SAFETY: zeroed is a valid `sigset_t`; only this thread's mask changes.
    unsafe {
        let mut kick: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut kick);
        libc::sigaddset(&mut kick, kick_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &kick, std::ptr::null_mut());
    }
}

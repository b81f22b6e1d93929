//! What a worker can still do once its guest runs: only what its threads need.
//!
//! A guest that has broken into its worker finds a process without capabilities, files and network. Every thread goes
//! in by itself, when all that it needs is open and before the first instruction of the guest:
//!
//! ```text
//!  controller   descriptors, no_new_privs
//!  worker       capabilities dropped ─► RAM, devices, KVM, threads ─► each thread: Landlock, then seccomp ─► `Loaded`
//!               all sets, first of all                                no file, no TCP    the calls of `calls.rs`
//! ```
//!
//! * **seccomp**: a filter for each kind of thread ([`Thread`]). Any other call ends the process with `SIGSYS`, all
//!   threads together; the kernel's log has its number. Without it no guest is started.
//! * **Landlock**: nothing can be opened even if a filter had a hole. As much of it as the kernel has; `ballast doctor`
//!   says when that is nothing. Signals are left out: kernels before 6.15 would refuse the kick from one thread of the
//!   worker to another. Their receiver is checked by seccomp.
//! * **Capabilities**: all sets, so that a worker started by root is no more than another user's.
//!
//! A thread inherits what the one that starts it has. Workers of KVM in the kernel that appear with the first `KVM_RUN`
//! are started by a vCPU's thread, so they are in here too.

mod calls;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;

use landlock::{ABI, Access, AccessFs, AccessNet, RestrictionStatus, Ruleset, RulesetAttr};
use rustix::thread::{CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

/// Newest version of Landlock whose rights are asked for; an older kernel gives those that it has.
const LANDLOCK: ABI = ABI::V9;

/// A kind of thread; each has calls of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Runs the guest.
    Vcpu,
    /// Answers faults and speaks to the controller.
    Fault,
    /// Serves the devices.
    Device,
    /// Moves cold pages aside and evicts them.
    Reclaim,
}

/// Why a thread is not in its sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Capabilities are still there.
    #[error("capabilities cannot be dropped")]
    Capabilities(#[source] io::Error),
    /// The kernel has Landlock and refuses it.
    #[error("Landlock cannot be used")]
    Landlock(#[from] landlock::RulesetError),
    /// The filter cannot be made or installed.
    #[error("the seccomp filter cannot be used")]
    Seccomp(#[from] seccompiler::Error),
    /// A rule is not one of seccomp's.
    #[error("the seccomp filter cannot be made")]
    Rule(#[from] seccompiler::BackendError),
}

/// Puts the calling thread into the sandbox of its kind, for ever.
///
/// # Errors
/// When the kernel refuses. The guest must not run then.
pub fn enter(thread: Thread) -> Result<(), SandboxError> {
    // The first look at the clock asks the kernel where its fast form is; that may be a file.
    let _ = super::gate::monotonic_ns();
    restrict_files()?;
    Ok(seccompiler::apply_filter(&filter(thread)?)?)
}

/// The filter of one kind of thread.
fn filter(thread: Thread) -> Result<BpfProgram, SandboxError> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    for call in calls::of(thread) {
        let ways = call.ways.iter().map(|way| {
            let conditions = way.iter().map(|is| {
                let compare = match is.mask {
                    u32::MAX => SeccompCmpOp::Eq,
                    mask => SeccompCmpOp::MaskedEq(mask.into()),
                };
                SeccompCondition::new(is.argument, SeccompCmpArgLen::Dword, compare, is.value.into())
            });
            SeccompRule::new(conditions.collect::<Result<_, _>>()?)
        });
        let ways = ways.collect::<Result<Vec<_>, _>>()?;
        let before = rules.insert(call.number, ways);
        debug_assert!(before.is_none(), "system call {} is listed twice", call.number);
    }
    let filter = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// Takes all files and TCP from the calling thread, as far as the kernel can.
fn restrict_files() -> Result<RestrictionStatus, SandboxError> {
    let rules = Ruleset::default().handle_access(AccessFs::from_all(LANDLOCK))?;
    Ok(rules.handle_access(AccessNet::from_all(LANDLOCK))?.create()?.restrict_self()?)
}

/// Drops every capability of the calling thread, and so of all that it starts.
///
/// # Errors
/// As the kernel says. A user who has none loses none, which is no error.
pub fn drop_capabilities() -> Result<(), SandboxError> {
    for number in 0..u64::BITS {
        // SAFETY: this prctl takes numbers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) } != 0 {
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                // One past the last capability; or a user without them, whom no_new_privs keeps from getting any.
                Some(libc::EINVAL | libc::EPERM) => break,
                _ => return Err(SandboxError::Capabilities(error)),
            }
        }
    }
    let failed = |e: rustix::io::Errno| SandboxError::Capabilities(e.into());
    clear_ambient_capability_set().map_err(failed)?;
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none }).map_err(failed)
}

/// Checks that the kernel can end a process for a forbidden call.
///
/// # Errors
/// As the kernel says.
pub fn check_seccomp() -> io::Result<()> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: this operation reads one number.
    let found = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    if found == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The version of the kernel's Landlock; an error when it has none or it is switched off.
///
/// # Errors
/// As the kernel says.
pub fn landlock_version() -> io::Result<u64> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call takes no memory and only returns a number.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, VERSION) };
    u64::try_from(version).map_err(|_| io::Error::last_os_error())
}

//! Memory that the controller needs in order to act is there before it has to.
//!
//! A controller that waits for a page of its own cannot help a host that has none. So `serve` locks what it has, and what it
//! will have: pages are there from their first use on and do not leave. And it has some ahead, which its allocator keeps. A
//! host that does not allow it has a controller that works all the same, and may be slow just when it matters.

use std::io;

use rustix::process::{Resource, Rlimit};

/// Bytes that the allocator has ahead.
const AHEAD: usize = 1 << 20;

/// Locks the memory of this process.
///
/// # Errors
/// A sentence for people when that is not allowed. Nothing has changed then.
pub fn lock() -> Result<(), String> {
    let limit = rustix::process::getrlimit(Resource::Memlock);
    if limit.maximum.is_none() && limit.current.is_some() {
        // What cannot be had is seen in what follows.
        let _ = rustix::process::setrlimit(Resource::Memlock, Rlimit { current: None, ..limit });
    }
    // With a limit that is met later, memory would be refused that is to be had now.
    let is_free = rustix::process::getrlimit(Resource::Memlock).current.is_none();
    if !is_free && !has_capability() {
        let most = limit.maximum.unwrap_or(u64::MAX);
        return Err(format!(
            "the controller's memory cannot be locked (at most {} may be): LimitMEMLOCK=infinity in its unit, or CAP_IPC_LOCK",
            memcg_core::units::human(most)
        ));
    }
    // SAFETY: mlockall takes flags and changes no memory, only what the kernel may do with it.
    match unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } {
        0 => Ok(()),
        _ => Err(format!("the controller's memory cannot be locked ({})", io::Error::last_os_error())),
    }
}

/// Has memory ahead: the allocator keeps what was written once.
pub fn put_by() {
    // SAFETY: mallopt takes two numbers; of these, one says how much the allocator keeps, and one that so much is no mapping of
    // its own.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, 4 * AHEAD as libc::c_int);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 2 * AHEAD as libc::c_int);
    }
    let mut ahead = vec![0u8; AHEAD];
    for page in ahead.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&ahead);
}

/// Whether this process may lock whatever it likes.
fn has_capability() -> bool {
    const CAP_IPC_LOCK: u64 = 1 << 14;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|bits| bits & CAP_IPC_LOCK != 0)
}

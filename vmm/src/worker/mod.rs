//! One VM's process.
//!
//! ```text
//!   main thread    devices: serial, balloon queues, the end of the guest      (event-manager)
//!   fault thread   the guest's pages, the controller's channel               (memory/thread.rs)
//!   vcpuN threads  the guest                                                 (vcpu.rs, gate.rs)
//! ```
//!
//! The process is started by the controller with everything it may use at fixed descriptors ([`config::fd`]); it opens
//! nothing for the guest by name. Once all is set up its threads enter the [`sandbox`]. It ends by `exit_group` only: closing KVM's descriptors in a live process can hang for ever.

pub mod channel;
pub mod config;
pub mod gate;
pub mod protocol;
pub mod sandbox;
pub mod start;
pub mod vcpu;

use std::io::Write;

pub use start::main;

/// Says something on standard error, for people. That nobody takes it is no reason to end, as it is with `eprintln!`: the
/// pipe of a controller that is gone, a file that is full.
pub fn complain(what: std::fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "ballast: {what}");
}

/// Our own books are wrong: says how, and ends the process, since nothing that goes on could be trusted.
pub fn broken(how: std::fmt::Arguments<'_>) -> ! {
    complain(format_args!("worker failed: {how}"));
    std::process::abort()
}

/// How a line of standard error begins that has words which no controller was there to hear.
pub const LAST_WORDS: &str = "ballast: last words: ";

/// Writes down what no controller hears: the next one reads it.
pub fn leave(words: &protocol::FromWorker) {
    let words = serde_json::to_string(words).unwrap_or_default();
    let _ = writeln!(std::io::stderr(), "{LAST_WORDS}{words}");
}

/// Ends the process at once, all threads together, without running destructors.
pub fn exit(status: i32) -> ! {
    // SAFETY: `_exit` has no conditions; nothing here relies on destructors or buffered output.
    unsafe { libc::_exit(status) }
}

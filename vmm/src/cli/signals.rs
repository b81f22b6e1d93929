//! The signals that end `run` and `serve`.

use std::future::poll_fn;
use std::mem::MaybeUninit;
use std::task::Poll;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that end what runs in the foreground.
pub struct Signals(Vec<(Signal, i32)>);

impl Signals {
    /// Begins to take them.
    ///
    /// # Errors
    /// When the system does not let it.
    pub fn new() -> std::io::Result<Self> {
        let mut kinds = vec![SignalKind::interrupt(), SignalKind::terminate(), SignalKind::quit()];
        // Whoever starts a VM with nohup wants it to outlive the terminal.
        if !is_ignored(libc::SIGHUP) {
            kinds.push(SignalKind::hangup());
        }
        let signals = kinds.into_iter().map(|kind| Ok((signal(kind)?, kind.as_raw_value())));
        signals.collect::<std::io::Result<_>>().map(Self)
    }

    /// The number of the next signal.
    pub async fn next(&mut self) -> i32 {
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

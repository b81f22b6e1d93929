//! The end of what a guest has printed, kept for whoever asks.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::AsyncReadExt;

/// Bytes that are kept: the last 64 KiB.
pub const KEPT: usize = 64 * 1024;

/// The last [`KEPT`] bytes of a console. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct ConsoleLog(Arc<Mutex<VecDeque<u8>>>);

impl ConsoleLog {
    /// Adds what was printed; the oldest bytes make room.
    pub fn push(&self, printed: &[u8]) {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let printed = &printed[printed.len().saturating_sub(KEPT)..];
        let over = (ring.len() + printed.len()).saturating_sub(KEPT);
        ring.drain(..over);
        ring.extend(printed);
    }

    /// What is kept, as text; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(ring.make_contiguous()).into_owned()
    }

    /// Starts to keep what a guest prints, until its end is closed. Nothing is typed on this console.
    ///
    /// # Errors
    /// When the stream cannot be watched.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn follow(&self, guest: UnixStream) -> io::Result<()> {
        guest.set_nonblocking(true)?;
        let mut guest = tokio::net::UnixStream::from_std(guest)?;
        let log = self.clone();
        tokio::spawn(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(length @ 1..) = guest.read(&mut buffer).await {
                log.push(&buffer[..length]);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_are_kept() {
        let log = ConsoleLog::default();
        log.push(b"first ");
        log.push(&vec![b'x'; KEPT - 3]);
        log.push(b"end");
        let text = log.text();
        assert_eq!(text.len(), KEPT);
        assert!(text.starts_with("xxx") && text.ends_with("xend"));
        log.push(&vec![b'y'; 3 * KEPT]);
        assert_eq!(log.text(), "y".repeat(KEPT));
        log.push(b"\xff");
        assert!(log.text().ends_with("y\u{fffd}"));
    }
}

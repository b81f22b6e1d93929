//! The end of what a guest has printed, kept for whoever asks.
//!
//! The worker writes it to memory that the controller has as well ([`crate::devices::console`]). So nobody has to be asked
//! for it, and it is there when the worker is not: stopped, broken, or gone.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::devices::console;
use crate::worker::config::fd;

/// The last 64 KiB of a console. Clones are of the same one.
#[derive(Clone, Debug)]
pub enum ConsoleLog {
    /// Of a worker that may still write.
    Live(Arc<File>),
    /// Of one that is gone.
    Kept(Arc<[u8]>),
}

impl ConsoleLog {
    /// An empty one.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        console::create().map(|memory| Self::Live(Arc::new(memory)))
    }

    /// The one of a worker that runs, for a controller that has not started it.
    ///
    /// # Errors
    /// When there is no such worker, or it is another user's.
    pub fn of_worker(pid: i32) -> io::Result<Self> {
        File::open(format!("/proc/{pid}/fd/{}", fd::CONSOLE_RING)).map(|memory| Self::Live(Arc::new(memory)))
    }

    /// The memory for a worker to write to.
    ///
    /// # Errors
    /// When the worker is gone, or the host has no descriptor left.
    pub fn memory(&self) -> io::Result<File> {
        match self {
            Self::Live(memory) => memory.try_clone(),
            Self::Kept(_) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// What is kept, as text; what is not UTF-8 is replaced.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes()).into_owned()
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            // A worker that was broken into can make it unreadable, and has only itself to thank.
            Self::Live(memory) => console::read(memory).unwrap_or_default(),
            Self::Kept(bytes) => bytes.to_vec(),
        }
    }

    /// The worker is gone: lets go of the descriptor, and keeps what it has written.
    pub fn keep(&mut self) {
        *self = Self::Kept(self.bytes().into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_outlive_the_memory_that_they_were_written_to() {
        let mut log = ConsoleLog::new().unwrap();
        let same = log.clone();
        let memory = log.memory().unwrap();
        let mut ring = console::Ring::map(&memory).unwrap();
        ring.push(b"last words\xff");
        assert_eq!((log.text(), same.text()), ("last words\u{fffd}".to_owned(), "last words\u{fffd}".to_owned()));
        log.keep();
        ring.push(b"nobody wrote this");
        assert_eq!(log.text(), "last words\u{fffd}");
        log.keep();
        assert_eq!(log.text(), "last words\u{fffd}");
        assert!(log.memory().is_err());
    }

    #[test]
    fn memory_that_is_no_ring_is_an_empty_console() {
        assert_eq!(ConsoleLog::Live(Arc::new(File::open("/dev/null").unwrap())).text(), "");
        assert!(ConsoleLog::of_worker(i32::MAX).is_err());
    }
}

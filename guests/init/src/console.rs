//! The console: raw, byte by byte, so that what the other side sends is what a command sees.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::fd::AsRawFd;

use crate::sys;

/// Longest command in bytes; more is cut off.
const MAX_LINE: usize = 4096;

/// Makes the console the standard input, output and error, without echo and without any translation.
pub fn open() -> io::Result<()> {
    let console = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/console")
        .or_else(|_| OpenOptions::new().read(true).write(true).open("/dev/ttyS0"))?;
    sys::make_raw(console.as_raw_fd())?;
    sys::make_standard(console.as_raw_fd())
}

/// The next line, without its end: a line feed, a carriage return or both.
pub fn read_line() -> io::Result<String> {
    let mut line = Vec::new();
    for byte in io::stdin().lock().bytes() {
        match byte? {
            b'\n' | b'\r' if line.is_empty() => {}
            b'\n' | b'\r' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            byte if line.len() < MAX_LINE => line.push(byte),
            _ => {}
        }
    }
    Err(io::Error::from(io::ErrorKind::UnexpectedEof))
}

/// Waits until the other side has all that was printed.
pub fn drain() {
    sys::drain(libc::STDOUT_FILENO);
}

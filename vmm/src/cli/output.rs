//! What verbs print on stdout.

use std::io::{ErrorKind, Write};

use serde::Serialize;

use super::{DONE, Failure};

/// Prints; says whether anybody still reads. That nobody does is the reader's choice and no error.
///
/// # Errors
/// When it cannot be written for another reason, such as a disk that is full.
pub fn write(text: impl AsRef<[u8]>) -> Result<bool, Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_ref()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(unwritten(&error)),
    }
}

/// That the output could not be written.
pub fn unwritten(error: &std::io::Error) -> Failure {
    Failure::error(format!("the output could not be written: {error}"))
}

/// Prints, and that was all: the exit status.
///
/// # Errors
/// As [`write`].
pub fn print(text: impl AsRef<[u8]>) -> Result<u8, Failure> {
    write(text).map(|_| DONE)
}

/// Prints as JSON, and that was all: the exit status.
///
/// # Errors
/// As [`write`], and when it is no JSON.
pub fn json<T: Serialize + ?Sized>(value: &T) -> Result<u8, Failure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::error(error.to_string()))?;
    print(format!("{text}\n"))
}

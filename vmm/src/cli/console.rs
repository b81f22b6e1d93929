//! The guest's console on this process's terminal, or on its pipes.
//!
//! Two threads pump bytes with blocking calls, so that a slow reader of stdout stops the guest's output and nothing
//! else. On a terminal the keyboard is raw: Ctrl-C is the guest's, Ctrl-] leaves. Whatever happens, a panic
//! included, the terminal is as it was before.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;

use rustix::termios::{InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios};
use tokio::sync::oneshot;

/// Ctrl-], the key that leaves.
const LEAVE: u8 = 0x1d;

/// How the terminal was before, for every way out of this process.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// A terminal in raw mode; restored when dropped.
#[derive(Debug)]
struct Raw(());

impl Raw {
    /// Makes the terminal on stdin raw.
    fn enter() -> std::io::Result<Self> {
        let stdin = std::io::stdin();
        let before = rustix::termios::tcgetattr(&stdin)?;
        let mut raw = before.clone();
        // As cfmakeraw, but output is left alone: messages of ballast still end in whole lines.
        raw.input_modes &= !(InputModes::IGNBRK
            | InputModes::BRKINT
            | InputModes::PARMRK
            | InputModes::ISTRIP
            | InputModes::INLCR
            | InputModes::IGNCR
            | InputModes::ICRNL
            | InputModes::IXON);
        raw.local_modes &=
            !(LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG | LocalModes::IEXTEN);
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        *BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(before);
        let raw_mode = Self(());
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            hook(info);
        }));
        rustix::termios::tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(raw_mode)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was; the second time does nothing.
fn restore() {
    let before = BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    if let Some(before) = before {
        // A terminal that is gone needs no restoring.
        let _ = rustix::termios::tcsetattr(std::io::stdin(), OptionalActions::Drain, &before);
    }
}

/// The console while it runs.
#[derive(Debug)]
pub struct Console {
    raw: Option<Raw>,
    drained: oneshot::Receiver<()>,
    left: Option<oneshot::Receiver<()>>,
}

impl Console {
    /// Completes when the user has typed Ctrl-]. The end of stdin is not the end: the answer may still come.
    pub fn leaving(&mut self) -> impl Future<Output = ()> + use<> {
        let left = self.left.take();
        async move {
            if let Some(left) = left
                && left.await.is_ok()
            {
                return;
            }
            std::future::pending().await
        }
    }
}

/// Connects the guest's console with stdin and stdout.
///
/// # Errors
/// When the terminal cannot be made raw or the threads cannot be started.
pub fn start(guest: UnixStream) -> std::io::Result<Console> {
    let stdin_is_terminal = std::io::stdin().is_terminal();
    // A process in the background may neither change the terminal nor read from it.
    let foreground = stdin_is_terminal
        && rustix::termios::tcgetpgrp(std::io::stdin()).is_ok_and(|group| group == rustix::process::getpgrp());
    let interactive = foreground && std::io::stdout().is_terminal();
    let raw = if interactive { Some(Raw::enter()?) } else { None };

    let (done, drained) = oneshot::channel();
    let output = guest.try_clone()?;
    thread::Builder::new().name("console-out".to_owned()).spawn(move || {
        pump_out(output);
        // Whoever has stopped waiting does not mind.
        let _ = done.send(());
    })?;
    let mut left = None;
    if foreground || !stdin_is_terminal {
        let (leave, leaving) = oneshot::channel();
        thread::Builder::new().name("console-in".to_owned()).spawn(move || {
            if pump_in(guest, interactive) {
                let _ = leave.send(());
            }
        })?;
        left = Some(leaving);
    }
    Ok(Console { raw, drained, left })
}

/// Copies what the guest prints to stdout until its end is closed. When nobody reads stdout any more the guest's
/// output is dropped and the guest goes on.
fn pump_out(mut guest: UnixStream) {
    let mut buffer = [0; 16 * 1024];
    let mut open = true;
    loop {
        let length = match guest.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let mut stdout = std::io::stdout().lock();
        open = open && stdout.write_all(&buffer[..length]).and_then(|()| stdout.flush()).is_ok();
    }
}

/// Copies stdin to the guest; true when it ended because the user has typed [`LEAVE`] on a terminal.
fn pump_in(mut guest: UnixStream, interactive: bool) -> bool {
    let stdin = std::io::stdin();
    let mut buffer = [0; 1024];
    loop {
        // Not through `Stdin`, whose buffer would keep what is typed until a line ends.
        let length = match rustix::io::read(stdin.as_fd(), &mut buffer) {
            Ok(0) => {
                // The guest's side learns that nothing more will be typed. A socket that is gone knows already.
                let _ = guest.shutdown(std::net::Shutdown::Write);
                return false;
            }
            Ok(length) => length,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return false,
        };
        let typed = &buffer[..length];
        let end = if interactive { typed.iter().position(|byte| *byte == LEAVE) } else { None };
        if guest.write_all(&typed[..end.unwrap_or(length)]).is_err() {
            return false;
        }
        if end.is_some() {
            return true;
        }
    }
}

impl Console {
    /// Completes when everything that the guest has printed is on stdout. The guest's end must be closed.
    pub async fn drained(&mut self) {
        // A thread that is gone has printed what it could.
        let _ = (&mut self.drained).await;
    }

    /// Gives the terminal back.
    pub fn restore(&mut self) {
        self.raw = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_ends_with_the_guest() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        pump_out(near);
    }
}

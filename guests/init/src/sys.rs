//! The system calls that the standard library does not have.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;

fn check(result: i64) -> io::Result<i64> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Mounts a virtual file system of type `kind` on `target`. One that is there already is as good.
pub fn mount(kind: &str, target: &str) -> io::Result<()> {
    let (kind, target) = (CString::new(kind)?, CString::new(target)?);
    // SAFETY: all three strings are NUL-terminated and outlive the call; the data may be null.
    let result = unsafe { libc::mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, ptr::null()) };
    match check(result.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EBUSY) => Err(error),
        _ => Ok(()),
    }
}

/// Loads the module in file `path` with `parameters`. One that is loaded already is as good.
pub fn load_module(path: &str, parameters: &str) -> io::Result<()> {
    let (file, parameters) = (File::open(path)?, CString::new(parameters)?);
    // SAFETY: the descriptor is open during the call and the parameters are a NUL-terminated string that outlives it.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0) };
    match check(result) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(error),
        _ => Ok(()),
    }
}

/// Switches a terminal's echo, line editing, signals and translation off, in both directions.
pub fn make_raw(fd: RawFd) -> io::Result<()> {
    // SAFETY: termios is plain data, for which zeroes are a value.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a termios that lives on this stack.
    check(unsafe { libc::tcgetattr(fd, &mut termios) }.into())?;
    // SAFETY: as above.
    unsafe { libc::cfmakeraw(&mut termios) };
    // SAFETY: as above; the call only reads it.
    check(unsafe { libc::tcsetattr(fd, libc::TCSANOW, &termios) }.into()).map(drop)
}

/// Makes `fd` the standard input, output and error.
pub fn make_standard(fd: RawFd) -> io::Result<()> {
    for standard in 0..=2 {
        // SAFETY: dup2 takes any two numbers; those descriptors belong to the standard library's handles, which hold no
        // state about the file behind them.
        check(unsafe { libc::dup2(fd, standard) }.into())?;
    }
    Ok(())
}

/// Waits until everything written to a terminal has left it.
pub fn drain(fd: RawFd) {
    // SAFETY: takes a number; a bad descriptor is an error, which changes nothing here.
    unsafe { libc::tcdrain(fd) };
}

/// Lets only messages more urgent than `level` (1..=8) reach the console.
pub fn console_level(level: i32) {
    const SYSLOG_ACTION_CONSOLE_LEVEL: i32 = 8;
    // SAFETY: this action ignores the buffer.
    unsafe { libc::klogctl(SYSLOG_ACTION_CONSOLE_LEVEL, ptr::null_mut(), level) };
}

/// All that the kernel's message buffer holds.
pub fn kernel_log() -> String {
    const SYSLOG_ACTION_READ_ALL: i32 = 3;
    let mut buffer = vec![0u8; 1 << 20];
    // SAFETY: the length is the buffer's, and the kernel writes no more than that.
    let length = unsafe { libc::klogctl(SYSLOG_ACTION_READ_ALL, buffer.as_mut_ptr().cast(), 1 << 20) };
    buffer.truncate(usize::try_from(length).unwrap_or(0));
    String::from_utf8_lossy(&buffer).into_owned()
}

/// Maps `bytes` (a multiple of the page size) of anonymous memory as words, all zero.
pub fn map(bytes: usize) -> io::Result<&'static mut [u64]> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new private mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe { libc::mmap(ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping is page-aligned, zeroed, that long, ours alone, and lives until `unmap` takes the slice.
    Ok(unsafe { std::slice::from_raw_parts_mut(start.cast(), bytes / 8) })
}

/// Gives memory from `map` back.
pub fn unmap(words: &'static mut [u64]) {
    let bytes = size_of_val(words);
    // SAFETY: the slice came from `map`, is exactly its mapping, and is consumed here.
    unsafe { libc::munmap(words.as_mut_ptr().cast(), bytes) };
}

/// Switches the machine off.
pub fn power_off() -> ! {
    end(libc::LINUX_REBOOT_CMD_POWER_OFF)
}

/// Resets the machine.
pub fn restart() -> ! {
    end(libc::LINUX_REBOOT_CMD_RESTART)
}

fn end(command: i32) -> ! {
    // SAFETY: the commands used here take no argument; the call does not return if it works.
    unsafe { libc::reboot(command) };
    // It did not: a kernel whose init ends panics, and with `panic=-1` resets the machine.
    std::process::exit(1)
}

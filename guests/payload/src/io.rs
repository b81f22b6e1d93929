//! Ports: the serial port and the monitor's ports for payloads. Each access is an exit, tens of microseconds, and each
//! character is an access, even of a string instruction: answers are short, and waiting is done by the monitor.

use core::arch::asm;
use core::fmt;

/// The first serial port: data.
const COM1: u16 = 0x3f8;
/// Its line status; bit 0: a byte has arrived.
const COM1_STATUS: u16 = 0x3fd;
/// Ends the machine with a status; when read, bit 0 says that somebody wants it to end.
const EXIT: u16 = 0x504;
/// Is answered after that many milliseconds.
const WAIT: u16 = 0x508;
/// Prints a line with the value and the monitor's clock.
const MARK: u16 = 0x50c;
/// Mask registers of the two old interrupt controllers, which are open at reset.
const INTERRUPT_MASKS: [u16; 2] = [0x21, 0xa1];
/// Milliseconds between two looks at the serial port.
const POLL_MS: u32 = 2;

fn out32(port: u16, value: u32) {
    // SAFETY: the ports used here change nothing in this guest's memory; I/O is allowed at this privilege level.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

fn in32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) };
    value
}

fn out8(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) };
    value
}

/// Keeps interrupts away. There is no descriptor table to take one with, and a device may raise one whenever its
/// configuration changes, even if its driver only polls.
pub fn mask_interrupts() {
    INTERRUPT_MASKS.into_iter().for_each(|port| out8(port, 0xff));
}

/// Prints text with one instruction.
pub fn print(text: &str) {
    // SAFETY: `rep outsb` is asked to read `text.len()` bytes from the text's start; the direction flag is clear.
    unsafe {
        asm!("rep outsb", in("dx") COM1, inout("rsi") text.as_ptr() => _, inout("rcx") text.len() => _,
            options(nostack, preserves_flags, readonly));
    }
}

/// Prints `OK verb results` or `ERR verb results`, where the verb is the first word of the command.
pub fn answer(kind: &str, command: &str, results: &str) {
    let mut line = Line::new();
    line.push(kind);
    line.push(command.split(' ').next().unwrap_or(""));
    line.push(results);
    line.push("\n");
    print(line.text());
}

/// Reads the next line that is not empty, without its end. While there is none, the machine ends with status 0 as soon as
/// somebody wants it to.
pub fn read_line(line: &mut Line) {
    loop {
        while in8(COM1_STATUS) & 1 == 0 {
            if in32(EXIT) & 1 != 0 {
                exit(0);
            }
            wait(POLL_MS);
        }
        match in8(COM1) {
            b'\n' | b'\r' if line.text().is_empty() => {}
            b'\n' | b'\r' => return,
            byte => line.push_byte(byte),
        }
    }
}

/// Whether somebody has typed, or wants the machine to end: what goes on for ever ends then.
pub fn wanted() -> bool {
    in8(COM1_STATUS) & 1 != 0 || in32(EXIT) & 1 != 0
}

/// Lets the monitor answer after `ms` milliseconds.
pub fn wait(ms: u32) {
    out32(WAIT, ms);
}

/// Makes the monitor print a line with `value` and its clock.
pub fn mark(value: u32) {
    out32(MARK, value);
}

/// Ends the machine.
pub fn exit(status: u32) -> ! {
    out32(EXIT, status);
    loop {
        wait(1000);
    }
}

/// A number as what a port takes; one that is too large becomes the largest.
pub fn dword(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// The processor's own clock, in cycles.
pub fn cycles() -> u64 {
    // SAFETY: reads a counter, which is allowed at this privilege level.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Cycles of a millisecond, by the monitor's clock: the best of some waits, because each is a little too long.
pub fn cycles_per_ms() -> u64 {
    const MS: u32 = 20;
    let measure = |_| {
        let begin = cycles();
        wait(MS);
        cycles().wrapping_sub(begin) / u64::from(MS)
    };
    (0..3).map(measure).min().unwrap_or(1).max(1)
}

/// A line of text of bounded length; what does not fit is left out.
pub struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Line {
    /// An empty one.
    pub const fn new() -> Self {
        Self { bytes: [0; 512], length: 0 }
    }

    /// Makes it empty again.
    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// What is in it. Empty if a character was cut in two, or if someone typed what is not UTF-8.
    pub fn text(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.length]).unwrap_or("")
    }

    fn push(&mut self, text: &str) {
        text.bytes().for_each(|byte| self.push_byte(byte));
    }

    fn push_byte(&mut self, byte: u8) {
        // The last byte is kept for the line's end.
        if self.length < self.bytes.len() - 1 || byte == b'\n' && self.length < self.bytes.len() {
            self.bytes[self.length] = byte;
            self.length += 1;
        }
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text);
        Ok(())
    }
}

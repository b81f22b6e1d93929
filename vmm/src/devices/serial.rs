//! The serial port: a 16550A whose output goes to the [`Console`] and whose input the console's pump brings.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use super::bus::{BusDevice, Effect};
use super::console::Console;

/// Number of ports.
pub const PORTS: u64 = 8;

/// The transmitter's end of the ring.
struct RingWriter(Arc<Console>);

impl Write for RingWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.print(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the pump when the guest has read the FIFO empty and input is waiting.
struct Signals {
    console: Arc<Console>,
    input_waits: AtomicBool,
}

impl SerialEvents for Signals {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        if self.input_waits.swap(false, Ordering::AcqRel) {
            self.console.wake();
        }
    }
}

/// A 16550A on the port bus.
pub struct SerialPort {
    uart: Serial<Line, Signals, RingWriter>,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").field("room", &self.uart.fifo_capacity()).finish_non_exhaustive()
    }
}

impl SerialPort {
    /// A port that prints to `console` and interrupts by `irq`.
    pub fn new(console: Arc<Console>, irq: EventFd) -> Self {
        let signals = Signals { console: Arc::clone(&console), input_waits: AtomicBool::new(false) };
        Self { uart: Serial::with_events(Line(irq), signals, RingWriter(console)) }
    }

    /// Free bytes in the FIFO of received bytes. When there are none, the pump is woken once there are.
    pub(super) fn room_or_wake_later(&mut self) -> usize {
        let room = self.uart.fifo_capacity();
        self.uart.events().input_waits.store(room == 0, Ordering::Release);
        room
    }

    /// Takes what was typed; at most as many bytes as there is room for.
    pub(super) fn receive(&mut self, typed: &[u8]) {
        // In loopback mode a UART does not hear its line; that the FIFO is full the caller has excluded.
        let _ = self.uart.enqueue_raw_bytes(typed);
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (offset, byte) in (offset as u8..).zip(data) {
            *byte = self.uart.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        for (offset, byte) in (offset as u8..).zip(data) {
            // The ring takes everything; an interrupt that cannot be raised is pending already.
            let _ = self.uart.write(offset, *byte);
        }
        Effect::None
    }
}

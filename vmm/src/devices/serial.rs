//! The serial port, and the way of its bytes to and from the console's stream.
//!
//! ```text
//!  vCPU ──OUT──► SerialPort ──► Console (ring, drops the oldest) ──► ConsolePump ──EPOLLOUT──► stream
//!  vCPU ◄──IN─── SerialPort ◄── FIFO of 64 bytes ◄─────────────────── ConsolePump ◄─EPOLLIN── stream
//! ```
//!
//! A vCPU never waits for whoever reads the console: what does not fit in the ring pushes out the oldest bytes, which
//! are counted. The pump is a subscriber of the device thread's event loop. It stops listening to the stream while the
//! FIFO is full, and the port wakes it when the guest has emptied that.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::bus::{BusDevice, Effect};

/// Bytes of output that wait for a slow reader at most.
pub const RING_BYTES: usize = 256 << 10;
/// Number of ports.
pub const PORTS: u64 = 8;
/// Bytes moved by one system call at most.
const CHUNK: usize = 4096;

/// What the guest has printed and nobody has read yet.
#[derive(Debug)]
pub struct Console {
    ring: Mutex<Ring>,
    /// Wakes the pump: there is output where there was none, or the FIFO has room again.
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    dropped: u64,
}

impl Console {
    /// An empty console.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { ring: Mutex::default(), wake: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Appends output. Never waits; when the ring is full the oldest bytes go.
    pub fn print(&self, bytes: &[u8]) {
        let mut ring = self.ring();
        let was_empty = ring.bytes.is_empty();
        ring.bytes.extend(bytes);
        let excess = ring.bytes.len().saturating_sub(RING_BYTES);
        ring.bytes.drain(..excess);
        ring.dropped += excess as u64;
        drop(ring);
        if was_empty && !bytes.is_empty() {
            self.wake();
        }
    }

    /// Takes all that waits.
    pub fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.ring().bytes).into()
    }

    /// Bytes that were pushed out before anybody read them, since the start.
    pub fn dropped_bytes(&self) -> u64 {
        self.ring().dropped
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        // It fails only when the counter is full, and then the pump is awake anyway.
        let _ = self.wake.write(1);
    }
}

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
    fn room_or_wake_later(&mut self) -> usize {
        let room = self.uart.fifo_capacity();
        self.uart.events().input_waits.store(room == 0, Ordering::Release);
        room
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

/// Moves bytes between the console, the port and a stream. Belongs to the device thread's event loop.
#[derive(Debug)]
pub struct ConsolePump {
    console: Arc<Console>,
    port: Arc<Mutex<SerialPort>>,
    stream: OwnedFd,
    /// The other side takes nothing any more.
    gone: bool,
    /// False when the other side has said all it wants to say.
    input_open: bool,
}

impl ConsolePump {
    /// A pump for `stream`, a socket, pipe or terminal, which is made non-blocking.
    ///
    /// # Errors
    /// When `stream` cannot be made non-blocking.
    pub fn new(console: Arc<Console>, port: Arc<Mutex<SerialPort>>, stream: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&stream)?;
        rustix::fs::fcntl_setfl(&stream, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self { console, port, stream, gone: false, input_open: true })
    }

    /// Writes what is left, for the end of a VM. Gives up after `patience`.
    pub fn finish(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.pump_output() {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.gone || left.is_zero() {
                return;
            }
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            match poll(&mut [PollFd::new(&self.stream, PollFlags::OUT)], Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Writes output until there is none or the stream takes no more. Returns true when output is left.
    fn pump_output(&mut self) -> bool {
        let mut chunk = [0; CHUNK];
        loop {
            // Copied out, so that the lock is not held in a system call: a vCPU may want to print.
            let (len, dropped) = {
                let ring = self.console.ring();
                let len = ring.bytes.len().min(CHUNK);
                chunk.iter_mut().zip(&ring.bytes).for_each(|(to, from)| *to = *from);
                (len, ring.dropped)
            };
            if self.gone || len == 0 {
                return len > 0;
            }
            match rustix::io::write(&self.stream, &chunk[..len]) {
                Ok(written) => {
                    let mut ring = self.console.ring();
                    // What was pushed out meanwhile was at the front: those bytes are gone from the ring already.
                    let pushed = usize::try_from(ring.dropped - dropped).unwrap_or(usize::MAX);
                    let now = written.saturating_sub(pushed).min(ring.bytes.len());
                    ring.bytes.drain(..now);
                    // They were read after all.
                    ring.dropped -= written.min(pushed) as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return true,
                Err(_) => self.gone = true,
            }
        }
    }

    /// Reads input as long as the FIFO has room.
    fn pump_input(&mut self) {
        let mut chunk = [0; CHUNK];
        while self.input_open {
            let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
            let room = port.room_or_wake_later().min(CHUNK);
            if room == 0 {
                return;
            }
            // The stream is non-blocking, so the lock is not held for long; only this thread adds to the FIFO.
            match rustix::io::read(&self.stream, &mut chunk[..room]) {
                Ok(0) => self.input_open = false,
                Ok(len) => {
                    // In loopback mode a UART does not hear its line; a full FIFO was excluded above.
                    let _ = port.uart.enqueue_raw_bytes(&chunk[..len]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => self.input_open = false,
            }
        }
    }

    /// What to listen for on the stream now.
    fn interest(&mut self, output_left: bool) -> EventSet {
        let mut set = EventSet::empty();
        if output_left {
            set |= EventSet::OUT;
        }
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        if self.input_open && port.room_or_wake_later() > 0 {
            set |= EventSet::IN;
        }
        set
    }
}

impl MutEventSubscriber for ConsolePump {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let from_stream = events.fd() == self.stream.as_raw_fd();
        if !from_stream {
            let _ = self.console.wake.read();
        }
        if self.gone {
            return;
        }
        self.pump_input();
        let output_left = self.pump_output();
        // A hang-up cannot be masked and would be reported for ever; nothing more can come or go after it.
        self.gone |= from_stream && events.event_set().intersects(EventSet::HANG_UP | EventSet::ERROR);
        let result = if self.gone {
            ops.remove(Events::empty(&self.stream))
        } else {
            let interest = self.interest(output_left);
            ops.modify(Events::new(&self.stream, interest))
        };
        if let Err(e) = result {
            tracing::warn!("the console can no longer be watched: {e}");
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let output_left = self.pump_output();
        let interest = self.interest(output_left);
        for events in [Events::new(&self.console.wake, EventSet::IN), Events::new(&self.stream, interest)] {
            if let Err(e) = ops.add(events) {
                tracing::warn!("the console cannot be watched: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use event_manager::{EventManager, SubscriberOps};
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    const DATA: u64 = 0;
    const LINE_STATUS: u64 = 5;
    const DEADLINE: Duration = Duration::from_secs(20);

    struct Rig {
        console: Arc<Console>,
        port: Arc<Mutex<SerialPort>>,
        pump: Arc<Mutex<ConsolePump>>,
        loop_: EventManager<Arc<Mutex<ConsolePump>>>,
        user: UnixStream,
    }

    fn rig() -> Rig {
        let (ours, user) = UnixStream::pair().unwrap();
        user.set_nonblocking(true).unwrap();
        let console = Arc::new(Console::new().unwrap());
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let port = Arc::new(Mutex::new(SerialPort::new(Arc::clone(&console), irq)));
        let pump = ConsolePump::new(Arc::clone(&console), Arc::clone(&port), ours.into()).unwrap();
        let pump = Arc::new(Mutex::new(pump));
        let mut loop_ = EventManager::new().unwrap();
        loop_.add_subscriber(Arc::clone(&pump));
        Rig { console, port, pump, loop_, user }
    }

    impl Rig {
        /// Runs the event loop until `done` or the deadline.
        fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
            let deadline = Instant::now() + DEADLINE;
            while !done(self) {
                assert!(Instant::now() < deadline, "no {what} in {DEADLINE:?}");
                self.loop_.run_with_timeout(10).unwrap();
            }
        }

        fn guest_reads(&self) -> Option<u8> {
            let mut port = self.port.lock().unwrap();
            let mut byte = [0];
            port.read(LINE_STATUS, &mut byte);
            (byte[0] & 1 != 0).then(|| {
                port.read(DATA, &mut byte);
                byte[0]
            })
        }
    }

    #[test]
    fn output_reaches_the_stream() {
        let mut rig = rig();
        for byte in b"hello" {
            assert_eq!(rig.port.lock().unwrap().write(DATA, &[*byte]), Effect::None);
        }
        let mut got = Vec::new();
        rig.until("output", |rig| {
            let _ = rig.user.read_to_end(&mut got);
            got == b"hello"
        });
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole_and_in_order() {
        let mut rig = rig();
        let sent: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        rig.user.write_all(&sent).unwrap();
        let mut got = Vec::new();
        rig.until("input", |rig| {
            got.extend(std::iter::from_fn(|| rig.guest_reads()));
            got.len() == sent.len()
        });
        assert_eq!(got, sent);
    }

    #[test]
    fn a_reader_that_does_not_read_costs_the_oldest_bytes_only() {
        let mut rig = rig();
        let total = RING_BYTES * 4;
        for block in 0..total / 1024 {
            rig.console.print(&[block as u8; 1024]);
            rig.loop_.run_with_timeout(0).unwrap();
        }
        assert!(rig.console.ring().bytes.len() <= RING_BYTES);
        let dropped = rig.console.dropped_bytes();
        assert!(dropped > 0);
        let mut got = Vec::new();
        rig.until("output", |rig| {
            let _ = rig.user.read_to_end(&mut got);
            got.len() as u64 == total as u64 - dropped
        });
        assert_eq!(got.last(), Some(&((total / 1024 - 1) as u8)));
    }

    #[test]
    fn a_stream_that_hangs_up_is_forgotten() {
        let mut rig = rig();
        let (_, other) = UnixStream::pair().unwrap();
        drop(std::mem::replace(&mut rig.user, other));
        rig.until("hang-up", |rig| rig.pump.lock().unwrap().gone);
        rig.console.print(b"nobody hears this");
        rig.until("quiet", |rig| rig.loop_.run_with_timeout(0).unwrap() == 0);
        rig.pump.lock().unwrap().finish(DEADLINE);
    }

    #[test]
    fn finish_writes_all_that_is_left() {
        let rig = rig();
        rig.console.print(&[b'x'; RING_BYTES]);
        let mut user = rig.user.try_clone().unwrap();
        user.set_nonblocking(false).unwrap();
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            user.read_to_end(&mut got).unwrap();
            got.len()
        });
        rig.pump.lock().unwrap().finish(DEADLINE);
        assert!(rig.console.take().is_empty());
        let Rig { pump, loop_, port, .. } = rig;
        drop((loop_, pump, port));
        assert_eq!(reader.join().unwrap(), RING_BYTES);
    }
}

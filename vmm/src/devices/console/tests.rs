//! A console with clients that the test plays, over the sockets that a worker has.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberOps};

use super::*;
use crate::devices::bus::{BusDevice, Effect};
use crate::devices::serial::SerialPort;

const DATA: u64 = 0;
const LINE_STATUS: u64 = 5;
const DEADLINE: Duration = Duration::from_secs(20);

struct Rig {
    memory: File,
    console: Arc<Console>,
    port: Arc<Mutex<SerialPort>>,
    pump: Arc<Mutex<ConsolePump>>,
    events: EventManager<Arc<Mutex<ConsolePump>>>,
    place: tempfile::TempDir,
}

fn rig() -> Rig {
    let place = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(place.path().join("console")).unwrap();
    let memory = create().unwrap();
    let console = Arc::new(Console::new(&memory).unwrap());
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let port = Arc::new(Mutex::new(SerialPort::new(Arc::clone(&console), irq)));
    let pump = ConsolePump::new(Arc::clone(&console), Arc::clone(&port), listener.into()).unwrap();
    let pump = Arc::new(Mutex::new(pump));
    let mut events = EventManager::new().unwrap();
    events.add_subscriber(Arc::clone(&pump));
    Rig { memory, console, port, pump, events, place }
}

impl Rig {
    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.place.path().join("console")).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// Runs the event loop until `done` or the deadline.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !done(self) {
            assert!(Instant::now() < deadline, "no {what} in {DEADLINE:?}");
            self.events.run_with_timeout(10).unwrap();
        }
    }

    /// Runs the event loop until the client has been given `wanted`.
    fn hears(&mut self, mut client: &UnixStream, wanted: &[u8]) {
        let mut got = Vec::new();
        self.until(&format!("{:?}", String::from_utf8_lossy(wanted)), |_| {
            // That there is no more now is no error; what has come so far is kept.
            let _ = client.read_to_end(&mut got);
            got == wanted
        });
    }

    fn guest_prints(&self, text: &[u8]) {
        for byte in text {
            assert_eq!(self.port.lock().unwrap().write(DATA, &[*byte]), Effect::None);
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

    /// Runs the event loop until the guest has read as many bytes.
    fn guest_gets(&mut self, count: usize) -> Vec<u8> {
        let mut got = Vec::new();
        self.until("input", |rig| {
            got.extend(std::iter::from_fn(|| rig.guest_reads()));
            got.len() >= count
        });
        got
    }

    /// Nothing happens any more: in particular, nothing that has gone is reported for ever.
    fn comes_to_rest(&mut self) {
        self.until("rest", |rig| rig.events.run_with_timeout(0).unwrap() == 0);
    }
}

#[test]
fn who_comes_hears_what_was_printed_before_and_then_what_is_printed() {
    let mut rig = rig();
    rig.guest_prints(b"before ");
    let first = rig.client();
    rig.hears(&first, b"before ");
    rig.guest_prints(b"and after");
    rig.hears(&first, b"and after");
    let second = rig.client();
    rig.hears(&second, b"before and after");
    assert_eq!(read(&rig.memory).unwrap(), b"before and after");
}

#[test]
fn who_goes_leaves_the_others_and_the_guest_alone() {
    let mut rig = rig();
    let (stays, goes) = (rig.client(), rig.client());
    rig.comes_to_rest();
    drop(goes);
    rig.comes_to_rest();
    rig.guest_prints(b"still here");
    rig.hears(&stays, b"still here");
    drop(stays);
    rig.guest_prints(b"!");
    rig.comes_to_rest();
    let again = rig.client();
    rig.hears(&again, b"still here!");
}

#[test]
fn input_of_every_client_arrives_whole_and_in_order() {
    let mut rig = rig();
    let mut clients = [rig.client(), rig.client()];
    // Much longer than the FIFO; the top bit says whose it is.
    let sent: [Vec<u8>; 2] = [0u8, 0x80].map(|who| (0..1000u32).map(|i| who | (i % 100) as u8).collect());
    for (client, sent) in clients.iter_mut().zip(&sent) {
        client.write_all(sent).unwrap();
    }
    let got = rig.guest_gets(2000);
    let (second, first): (Vec<u8>, Vec<u8>) = got.iter().partition(|byte| **byte & 0x80 != 0);
    assert_eq!([first, second], sent);
}

/// `printf … | nc`: it has gone before the guest has read the first byte.
#[test]
fn what_was_typed_by_one_who_has_gone_arrives() {
    let mut rig = rig();
    let sent: Vec<u8> = (0..500u32).map(|i| i as u8).collect();
    let mut client = rig.client();
    client.write_all(&sent).unwrap();
    drop(client);
    rig.comes_to_rest();
    assert_eq!(rig.guest_gets(500), sent);
    rig.comes_to_rest();
    assert!(rig.pump.lock().unwrap().is_alone());
}

#[test]
fn one_who_types_no_more_goes_on_reading() {
    let mut rig = rig();
    let mut client = rig.client();
    client.write_all(b"last").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(rig.guest_gets(4), b"last");
    rig.comes_to_rest();
    rig.guest_prints(b"answer");
    rig.hears(&client, b"answer");
}

#[test]
fn a_fifth_client_is_told_so_and_may_come_when_another_has_left() {
    let mut rig = rig();
    let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| rig.client()).collect();
    let mut fifth = rig.client();
    fifth.set_nonblocking(false).unwrap();
    let reader = std::thread::spawn(move || std::io::read_to_string(&mut fifth).unwrap());
    rig.until("a refusal", |_| reader.is_finished());
    assert_eq!(
        reader.join().unwrap(),
        "\r\nballast: 4 are at this console already: try again when one has left it\r\n"
    );
    rig.guest_prints(b"for the others");
    for client in &clients {
        rig.hears(client, b"for the others");
    }
    clients.pop();
    rig.comes_to_rest();
    let late = rig.client();
    rig.hears(&late, b"for the others");
}

#[test]
fn a_reader_that_does_not_read_loses_the_oldest_bytes_and_nobody_else_does() {
    let mut rig = rig();
    let (mut slow, mut quick) = (rig.client(), rig.client());
    rig.comes_to_rest();
    let total = 16 * RING_BYTES;
    let mut heard = Vec::new();
    for block in 0..total / 1024 {
        rig.console.print(&[block as u8; 1024]);
        rig.until("what was printed", |_| {
            let _ = quick.read_to_end(&mut heard);
            heard.len() == (block + 1) * 1024
        });
    }
    let mut late = Vec::new();
    rig.until("the newest", |_| {
        slow.read_to_end(&mut late).is_err_and(|e| e.kind() == ErrorKind::WouldBlock)
            && late.ends_with(&heard[total - RING_BYTES..])
    });
    assert!(late.len() < total, "{} bytes fit into a socket", late.len());
    assert!(heard.starts_with(&late[..1024]), "what it got before it stopped reading is whole");
}

/// The device thread has a balloon to serve, too.
#[test]
fn a_guest_that_prints_without_end_does_not_keep_the_loop_to_itself() {
    let mut rig = rig();
    let client = rig.client();
    rig.comes_to_rest();
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let printing = {
        let (console, over) = (Arc::clone(&rig.console), Arc::clone(&over));
        std::thread::spawn(move || {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                console.print(&[b'x'; 512]);
            }
        })
    };
    let reading = {
        let mut client = client.try_clone().unwrap();
        client.set_nonblocking(false).unwrap();
        std::thread::spawn(move || std::io::copy(&mut client, &mut std::io::sink()).unwrap())
    };
    for _ in 0..50 {
        rig.events.run_with_timeout(1000).unwrap();
    }
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    printing.join().unwrap();
    rig.comes_to_rest();
    drop(rig);
    drop(client);
    assert!(reading.join().unwrap() > 0);
}

#[test]
fn at_the_end_everybody_gets_everything_even_who_came_last() {
    let rig = rig();
    rig.console.print(&[b'x'; RING_BYTES]);
    let readers: Vec<_> = (0..3)
        .map(|_| {
            let mut client = rig.client();
            client.set_nonblocking(false).unwrap();
            std::thread::spawn(move || {
                let mut got = Vec::new();
                client.read_to_end(&mut got).unwrap();
                got.len()
            })
        })
        .collect();
    rig.pump.lock().unwrap().finish(DEADLINE);
    drop(rig);
    for reader in readers {
        assert_eq!(reader.join().unwrap(), RING_BYTES);
    }
}

#[test]
fn the_end_does_not_wait_for_a_reader_that_does_not_read() {
    let mut rig = rig();
    let client = rig.client();
    rig.comes_to_rest();
    // More than its socket takes: a ring's worth at a time.
    for _ in 0..16 {
        rig.console.print(&[b'x'; RING_BYTES]);
        rig.comes_to_rest();
    }
    let begin = Instant::now();
    rig.pump.lock().unwrap().finish(Duration::from_millis(50));
    assert!(begin.elapsed() < DEADLINE);
    drop(client);
}

#[test]
fn the_ring_keeps_the_last_bytes_and_only_takes_what_it_needs() {
    let memory = create().unwrap();
    let blocks = || std::os::unix::fs::MetadataExt::blocks(&memory.metadata().unwrap());
    let mut ring = Ring::map(&memory).unwrap();
    assert_eq!((read(&memory).unwrap(), blocks()), (Vec::new(), 0));
    ring.push(b"first ");
    assert_eq!((read(&memory).unwrap(), blocks() * 512), (b"first ".to_vec(), 4096));
    ring.push(&vec![b'x'; RING_BYTES - 3]);
    ring.push(b"end");
    let kept = read(&memory).unwrap();
    assert_eq!((kept.len(), kept.first(), &kept[RING_BYTES - 4..]), (RING_BYTES, Some(&b'x'), b"xend".as_slice()));
    let many: Vec<u8> = (0..3 * RING_BYTES as u32 + 7).map(|i| (i / 3) as u8).collect();
    ring.push(&many);
    assert_eq!(read(&memory).unwrap(), many[many.len() - RING_BYTES..]);
    assert_eq!((ring.start(), ring.end()), (ring.end() - RING_BYTES as u64, 6 + RING_BYTES as u64 + many.len() as u64));
}

/// What is read while somebody writes is a piece of what was written, never a mixture.
#[test]
fn reading_while_it_is_written_gives_a_piece_of_it() {
    let memory = create().unwrap();
    let mut ring = Ring::map(&memory).unwrap();
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stop = Arc::clone(&over);
    let writer = std::thread::spawn(move || {
        // A counter of 16 bits after the other: neighbours differ by one.
        for number in 0u32.. {
            ring.push(&(number as u16).to_be_bytes());
            if stop.load(std::sync::atomic::Ordering::Relaxed) {
                break;
            }
        }
    });
    let mut largest = 0;
    while largest < RING_BYTES - 1024 {
        let got = read(&memory).unwrap();
        largest = largest.max(got.len());
        // `begun` and `done` are whole pushes, so it begins and ends between two numbers.
        let numbers: Vec<_> = got.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1)), "{numbers:?}");
    }
    over.store(true, std::sync::atomic::Ordering::Relaxed);
    writer.join().unwrap();
}

/// The other side may be a worker that was broken into.
#[test]
fn nonsense_in_the_counts_gives_no_more_than_a_ring() {
    use std::os::unix::fs::FileExt;
    let memory = create().unwrap();
    for (begun, done) in [(0, u64::MAX), (u64::MAX, 0), (0, 1), (u64::MAX, 1), (5, 1 << 40), (1 << 63, 70_000)] {
        memory.write_all_at(&u64::to_le_bytes(begun), 0).unwrap();
        memory.write_all_at(&u64::to_le_bytes(done), 8).unwrap();
        assert!(read(&memory).unwrap().len() <= RING_BYTES, "{begun} {done}");
    }
    assert!(memory.set_len(4096).is_err() && memory.set_len(1 << 30).is_err(), "its size is sealed");
    assert!(read(&File::open("/dev/null").unwrap()).is_err());
}

//! The whole device against a driver that uses nothing but registers, rings and interrupts, with the event loop run
//! by hand so that every step is seen.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::AtomicBool;

use balloon::{GuestFault, PageRange, StatTag, WouldBlock, spec};
use event_manager::{EventManager, SubscriberOps};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::mmio::registers::*;
use super::*;

const RAM: u64 = 8 << 20;
const SIZE: u16 = 16;
const INFLATE: u64 = 0;
const DEFLATE: u64 = 1;
const STATS: u64 = 2;

/// Pages that are written down, and refused on demand.
#[derive(Clone, Default)]
struct Pages {
    inflated: Rc<Cell<u64>>,
    deflated: Rc<Cell<u64>>,
    reported: Rc<Cell<u64>>,
    refuse: Rc<Cell<bool>>,
    calls: Rc<Cell<u32>>,
}

impl Pages {
    fn count(&self, sum: &Cell<u64>, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        self.calls.set(self.calls.get() + 1);
        if self.refuse.get() {
            return Err(WouldBlock);
        }
        sum.set(sum.get() + ranges.iter().map(|range| range.pages).sum::<u64>());
        Ok(())
    }
}

impl GuestPages for Pages {
    fn inflate(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        self.count(&self.inflated.clone(), ranges)
    }

    fn deflate(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        self.count(&self.deflated.clone(), ranges)
    }

    fn report(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
        self.count(&self.reported.clone(), ranges)
    }
}

/// A VM with nothing but a balloon, and the guest's driver for it.
struct Vm {
    mem: GuestMemoryMmap,
    window: BalloonWindow<GuestMemoryMmap>,
    handle: BalloonHandle,
    events: EventManager<BalloonDevice<GuestMemoryMmap, Pages>>,
    pages: Pages,
    irq: EventFd,
    told: EventFd,
    doorbells: Vec<EventFd>,
    avail: [u16; 4],
}

impl Vm {
    fn new(stats_interval: Option<Duration>) -> Self {
        Vm::with(BalloonConfig {
            ram_pages: (RAM / 4096) as u32,
            deflate_on_oom: true,
            reporting: false,
            stats_interval,
        })
    }

    fn with(config: BalloonConfig) -> Self {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let pages = Pages::default();
        let line = Box::new(irq.try_clone().unwrap());
        let bell = EventFd::new(EFD_NONBLOCK).unwrap();
        let told = bell.try_clone().unwrap();
        let (device, window, handle) = BalloonDevice::new(config, mem.clone(), pages.clone(), line, bell).unwrap();
        let doorbells = device.doorbells().iter().map(|bell| bell.try_clone().unwrap()).collect();
        let mut events = EventManager::new().unwrap();
        events.add_subscriber(device);
        Vm { mem, window, handle, events, pages, irq, told, doorbells, avail: [0; 4] }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.window.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.window.write(offset, &value.to_le_bytes());
    }

    /// What a Linux driver does in its probe, up to and without DRIVER_OK.
    fn probe(&mut self) {
        self.write(STATUS, 0);
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for sel in [1, 0] {
            self.write(DEVICE_FEATURES_SEL, sel);
            let offered = self.read(DEVICE_FEATURES);
            self.write(DRIVER_FEATURES_SEL, sel);
            self.write(DRIVER_FEATURES, offered);
        }
        self.write(STATUS, 0xb);
        assert_eq!(self.read(STATUS), 0xb);
        self.avail = [0; 4];
        for index in 0..self.doorbells.len() as u64 {
            self.write(QUEUE_SEL, index as u32);
            assert_eq!(self.read(QUEUE_NUM_MAX), u32::from(spec::QUEUE_SIZE));
            self.write(QUEUE_NUM, u32::from(SIZE));
            let base = ring(index);
            self.mem.write_slice(&[0; 0x3000], GuestAddress(base)).unwrap();
            for (register, at) in [(QUEUE_DESC_LOW, 0), (QUEUE_DRIVER_LOW, 0x1000), (QUEUE_DEVICE_LOW, 0x2000)] {
                self.write(register, (base + at) as u32);
                self.write(register + 4, 0);
            }
            self.write(QUEUE_READY, 1);
            assert_eq!(self.read(QUEUE_READY), 1);
        }
    }

    fn boot(stats_interval: Option<Duration>) -> Self {
        let mut vm = Vm::new(stats_interval);
        vm.probe();
        vm.write(STATUS, 0xf);
        vm.run();
        vm
    }

    /// Makes a buffer available without notifying.
    fn offer(&mut self, queue: u64, bytes: &[u8]) {
        let avail = &mut self.avail[queue as usize];
        let slot = u64::from(*avail % SIZE);
        let buffer = 0x10_0000 + queue * 0x10_0000 + slot * 0x1000;
        self.mem.write_slice(bytes, GuestAddress(buffer)).unwrap();
        let descriptor = RawDescriptor::from(Descriptor::new(buffer, bytes.len() as u32, 0, 0));
        self.mem.write_obj(descriptor, GuestAddress(ring(queue) + 16 * slot)).unwrap();
        self.mem.write_obj(slot as u16, GuestAddress(ring(queue) + 0x1004 + 2 * slot)).unwrap();
        *avail = avail.wrapping_add(1);
        self.mem.write_obj(*avail, GuestAddress(ring(queue) + 0x1002)).unwrap();
    }

    fn offer_pfns(&mut self, queue: u64, pfns: std::ops::Range<u32>) {
        let bytes: Vec<u8> = pfns.flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.offer(queue, &bytes);
    }

    /// Notifies as KVM does it for an ioeventfd.
    fn kick(&self, queue: u64) {
        self.doorbells[queue as usize].write(1).unwrap();
    }

    fn used(&self, queue: u64) -> u16 {
        self.mem.read_obj(GuestAddress(ring(queue) + 0x2002)).unwrap()
    }

    /// Runs the event loop until there is nothing to do; how many events there were.
    fn run(&mut self) -> usize {
        let mut sum = 0;
        loop {
            let events = self.events.run_with_timeout(0).unwrap();
            sum += events;
            assert!(sum < 1000, "the device is busy for nothing");
            if events == 0 {
                return sum;
            }
        }
    }

    /// Whether there was an interrupt since the last call, and why.
    fn interrupt(&self) -> Option<u32> {
        self.irq.read().ok()?;
        let why = self.read(INTERRUPT_STATUS);
        self.write(INTERRUPT_ACK, why);
        Some(why)
    }
}

fn ring(queue: u64) -> u64 {
    0x1_0000 * (queue + 1)
}

#[test]
fn target_and_actual_take_their_own_ways() {
    let mut vm = Vm::new(None);
    vm.handle.set_target(100);
    vm.run();
    assert_eq!((vm.handle.ready(), vm.interrupt()), (false, None));
    vm.probe();
    assert!(!vm.handle.ready());
    vm.write(STATUS, 0xf);
    assert!(vm.handle.ready());
    assert_eq!((vm.read(CONFIG), vm.handle.actual()), (100, 0));

    let generation = vm.read(CONFIG_GENERATION);
    vm.handle.set_target(300);
    vm.handle.set_target(200);
    assert_eq!(vm.read(CONFIG), 100, "the device thread tells the guest");
    vm.run();
    assert_eq!((vm.interrupt(), vm.read(CONFIG)), (Some(INTERRUPT_CONFIG), 200));
    assert_eq!(vm.read(CONFIG_GENERATION), generation + 1);
    vm.handle.set_target(200);
    vm.run();
    assert_eq!(vm.interrupt(), None, "nothing has changed");

    vm.write(CONFIG + 4, 150);
    assert_eq!((vm.handle.actual(), vm.handle.target()), (150, 200));
    vm.write(CONFIG + 4, u32::MAX);
    assert_eq!(vm.handle.actual(), (RAM / 4096) as u32);
    assert_eq!(vm.handle.counters().faults.get(GuestFault::Actual), 1);
    assert_eq!(vm.handle.guest_errors(), 1);
}

#[test]
fn inflate_and_deflate_by_ioeventfd_and_by_register() {
    let mut vm = Vm::boot(None);
    vm.offer_pfns(INFLATE, 10..266);
    vm.offer_pfns(INFLATE, 300..310);
    vm.kick(INFLATE);
    vm.run();
    assert_eq!((vm.pages.inflated.get(), vm.used(INFLATE)), (266, 2));
    assert_eq!(vm.interrupt(), Some(INTERRUPT_USED));
    vm.offer_pfns(DEFLATE, 10..20);
    vm.write(QUEUE_NOTIFY, DEFLATE as u32);
    assert_eq!(vm.used(DEFLATE), 0, "rings are the device thread's");
    vm.run();
    assert_eq!((vm.pages.deflated.get(), vm.used(DEFLATE)), (10, 1));
    assert_eq!(vm.interrupt(), Some(INTERRUPT_USED));
    let counters = vm.handle.counters();
    assert_eq!((counters.inflated_pages, counters.deflated_pages, counters.chains), (266, 10, 3));
    assert_eq!(vm.handle.guest_errors(), 0);
}

#[test]
fn what_was_offered_before_driver_ok_is_found_then() {
    let mut vm = Vm::new(None);
    vm.probe();
    vm.offer_pfns(INFLATE, 0..5);
    vm.kick(INFLATE);
    vm.run();
    assert_eq!((vm.pages.inflated.get(), vm.used(INFLATE)), (0, 0));
    vm.write(STATUS, 0xf);
    vm.run();
    assert_eq!((vm.pages.inflated.get(), vm.used(INFLATE)), (5, 1));
}

#[test]
fn a_deferred_queue_waits_for_retry_and_does_not_spin() {
    let mut vm = Vm::boot(None);
    vm.pages.refuse.set(true);
    vm.offer_pfns(INFLATE, 0..5);
    vm.kick(INFLATE);
    assert_eq!(vm.run(), 1);
    assert!(vm.handle.deferred());
    assert_eq!((vm.pages.calls.get(), vm.used(INFLATE), vm.interrupt()), (1, 0, None));
    assert_eq!(vm.run(), 0, "nothing to do until told");
    vm.handle.retry();
    assert_eq!((vm.run(), vm.pages.calls.get()), (1, 2));
    assert!(vm.handle.deferred());

    // Another queue is not held up.
    vm.pages.refuse.set(false);
    vm.offer_pfns(DEFLATE, 0..5);
    vm.kick(DEFLATE);
    vm.run();
    assert_eq!((vm.pages.deflated.get(), vm.pages.inflated.get()), (5, 0));
    vm.handle.retry();
    vm.run();
    assert_eq!((vm.pages.inflated.get(), vm.used(INFLATE), vm.handle.deferred()), (5, 1, false));
    assert_eq!(vm.handle.counters().blocked, 2);
}

#[test]
fn a_retry_that_comes_before_the_refusal_is_seen_is_not_lost() {
    let mut vm = Vm::boot(None);
    vm.pages.refuse.set(true);
    vm.offer_pfns(INFLATE, 0..5);
    // Memory comes back while the device thread is on its way from the refusal to its event loop.
    vm.kick(INFLATE);
    vm.events.run_with_timeout(0).unwrap();
    vm.handle.retry();
    vm.pages.refuse.set(false);
    vm.run();
    assert_eq!((vm.pages.inflated.get(), vm.handle.deferred()), (5, false));
}

#[test]
fn a_long_ring_is_done_batch_by_batch_without_further_notifications() {
    let mut vm = Vm::boot(None);
    for n in 0..10 {
        vm.offer_pfns(INFLATE, n * 1024..(n + 1) * 1024);
    }
    vm.kick(INFLATE);
    assert!(vm.run() > 2);
    assert_eq!((vm.pages.inflated.get(), vm.used(INFLATE)), (10 * 1024, 10));
}

#[test]
fn a_reset_in_the_middle_leaves_the_old_rings_alone() {
    let mut vm = Vm::boot(None);
    vm.pages.refuse.set(true);
    vm.offer_pfns(INFLATE, 0..5);
    vm.kick(INFLATE);
    vm.run();
    assert!(vm.handle.deferred());
    vm.write(CONFIG + 4, 77);
    vm.kick(INFLATE);
    vm.write(STATUS, 0);
    assert_eq!((vm.handle.ready(), vm.handle.actual()), (false, 0));
    vm.pages.refuse.set(false);
    vm.handle.retry();
    vm.run();
    assert_eq!((vm.pages.inflated.get(), vm.used(INFLATE), vm.handle.deferred()), (0, 0, false));
    assert_eq!(vm.interrupt(), None);
    // The next driver starts from nothing.
    vm.probe();
    vm.write(STATUS, 0xf);
    vm.offer_pfns(INFLATE, 50..53);
    vm.kick(INFLATE);
    vm.run();
    assert_eq!((vm.pages.inflated.get(), vm.used(INFLATE)), (3, 1));
}

/// Giving and taking back for ever: the queue is left alone, and so is the device, until that is paid for.
#[test]
fn a_queue_on_which_too_much_is_done_is_closed_for_a_while() {
    let mut vm = Vm::boot(None);
    let pages = (RAM / 4096) as u32;
    let mut rounds = 0;
    while vm.handle.guest_errors() == 0 {
        for queue in [INFLATE, DEFLATE] {
            vm.offer_pfns(queue, 0..pages / 2);
            vm.offer_pfns(queue, pages / 2..pages);
            vm.kick(queue);
            vm.run();
        }
        rounds += 1;
        assert!(rounds < 1000, "nobody minds");
    }
    let given = vm.pages.inflated.get();
    assert_eq!(vm.told.read().unwrap(), 1, "it is told of");
    for _ in 0..10 {
        vm.kick(INFLATE);
        assert_eq!((vm.events.run_with_timeout(0).unwrap(), vm.pages.inflated.get()), (0, given), "nobody is woken");
    }
    // Not so those that are not to blame.
    assert_eq!(vm.pages.deflated.get(), given + u64::from(pages), "what was given is taken back");
    let start = Instant::now();
    while vm.pages.inflated.get() == given {
        assert!(start.elapsed() < Duration::from_secs(60), "the queue stays closed");
        vm.events.run_with_timeout(1000).unwrap();
    }
    vm.run();
    assert_eq!(vm.used(INFLATE), (2 * rounds) as u16, "no buffer is lost");
}

/// An idle guest without a driver wakes nobody.
#[test]
fn without_a_driver_there_are_no_ticks() {
    let mut vm = Vm::new(Some(Duration::from_millis(1)));
    assert_eq!(vm.events.run_with_timeout(200).unwrap(), 0);
}

#[test]
fn statistics_are_asked_for_at_every_tick() {
    let tick = Duration::from_millis(1);
    let mut vm = Vm::boot(Some(tick));
    assert_eq!(vm.doorbells.len(), 3);
    let set = |free: u64| [&4u16.to_le_bytes()[..], &free.to_le_bytes()[..]].concat();
    vm.offer(STATS, &set(0));
    vm.kick(STATS);
    let start = Instant::now();
    for round in 1..=3 {
        // The buffer comes back at some tick; nothing else has to happen meanwhile.
        while vm.used(STATS) < round {
            assert!(start.elapsed() < Duration::from_secs(60), "no request for statistics");
            vm.events.run_with_timeout(1000).unwrap();
        }
        assert_eq!(vm.interrupt(), Some(INTERRUPT_USED));
        assert_eq!(vm.handle.counters().stats_received, u64::from(round) - 1);
        vm.offer(STATS, &set(1000 * u64::from(round)));
        vm.kick(STATS);
        while vm.handle.counters().stats_received < u64::from(round) {
            assert!(start.elapsed() < Duration::from_secs(60), "the statistics were not read");
            vm.events.run_with_timeout(1000).unwrap();
        }
        let (stats, at) = vm.handle.stats().unwrap();
        assert_eq!(stats.get(StatTag::FreeMemory), Some(1000 * u64::from(round)));
        assert!(at >= start && at <= Instant::now());
    }
}

/// The reporting queue is the last one, whatever is there before it.
#[test]
fn reports_are_dealt_with_on_the_queue_behind_the_others() {
    for stats_interval in [None, Some(Duration::from_secs(60))] {
        let queue = if stats_interval.is_some() { 3 } else { 2 };
        let ram_pages = (RAM / 4096) as u32;
        let mut vm = Vm::with(BalloonConfig { ram_pages, deflate_on_oom: false, reporting: true, stats_interval });
        vm.probe();
        vm.write(STATUS, 0xf);
        vm.run();
        let block = RawDescriptor::from(Descriptor::new(0x20_0000, 0x10_0000, 2, 0));
        vm.offer(queue, &[0; 4]);
        vm.mem.write_obj(block, GuestAddress(ring(queue))).unwrap();
        vm.kick(queue);
        vm.run();
        assert_eq!((vm.used(queue), vm.pages.reported.get()), (1, 256), "{stats_interval:?}");
        assert_eq!((vm.handle.counters().reported_pages, vm.handle.guest_errors()), (256, 0));
        // What the guest fills free pages with is kept with it.
        vm.write(CONFIG + spec::CONFIG_POISON_VAL, 0xaaaa_aaaa);
        assert_eq!(vm.read(CONFIG + spec::CONFIG_POISON_VAL), 0xaaaa_aaaa);
        vm.offer(queue, &[0; 4]);
        vm.mem.write_obj(block, GuestAddress(ring(queue) + 16)).unwrap();
        vm.kick(queue);
        vm.run();
        assert_eq!((vm.used(queue), vm.pages.reported.get(), vm.handle.counters().poisoned_pages), (2, 256, 256));
    }
}

/// The device thread and a vCPU at full speed: resets, set-ups and notifications while batches are being processed.
#[test]
fn resets_race_with_the_device_thread() {
    struct Slow(Arc<AtomicU32>);
    impl GuestPages for Slow {
        fn inflate(&mut self, _: &[PageRange]) -> Result<(), WouldBlock> {
            // Every third time in vain.
            if self.0.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) { Err(WouldBlock) } else { Ok(()) }
        }
        fn deflate(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
            self.inflate(ranges)
        }
        fn report(&mut self, ranges: &[PageRange]) -> Result<(), WouldBlock> {
            self.inflate(ranges)
        }
    }
    let mut vm = Vm::new(None);
    let calls = Arc::new(AtomicU32::new(0));
    let config =
        BalloonConfig { ram_pages: (RAM / 4096) as u32, deflate_on_oom: false, reporting: true, stats_interval: None };
    let line = Box::new(vm.irq.try_clone().unwrap());
    let (pages, bell) = (Slow(calls.clone()), vm.told.try_clone().unwrap());
    let (device, window, handle) = BalloonDevice::new(config, vm.mem.clone(), pages, line, bell).unwrap();
    vm.doorbells = device.doorbells().iter().map(|bell| bell.try_clone().unwrap()).collect();
    (vm.window, vm.handle) = (window, handle.clone());
    let stop = Arc::new(AtomicBool::new(false));
    let thread = std::thread::spawn({
        let (stop, handle) = (stop.clone(), handle.clone());
        move || {
            let mut events = EventManager::new().unwrap();
            events.add_subscriber(device);
            while !stop.load(Ordering::Relaxed) {
                events.run_with_timeout(100).unwrap();
                if handle.deferred() {
                    handle.retry();
                }
            }
        }
    });
    for round in 0..300u32 {
        vm.probe();
        vm.write(STATUS, 0xf);
        for n in 0..4 {
            vm.offer_pfns(INFLATE, n * 10..n * 10 + 10);
            vm.kick(INFLATE);
        }
        handle.set_target(round);
        if round % 2 == 0 {
            let start = Instant::now();
            while vm.used(INFLATE) < 4 {
                assert!(start.elapsed() < Duration::from_secs(60), "round {round}: buffers do not come back");
                std::thread::yield_now();
            }
        }
        vm.write(STATUS, 0);
        let used = vm.used(INFLATE);
        // Nothing moves after the reset has returned.
        for _ in 0..20 {
            assert_eq!(vm.used(INFLATE), used);
        }
    }
    stop.store(true, Ordering::Relaxed);
    handle.retry();
    thread.join().unwrap();
    assert!(calls.load(Ordering::Relaxed) > 0);
    assert_eq!(handle.counters().faults.total(), 0);
}

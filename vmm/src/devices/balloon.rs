//! The balloon in a worker: registers on a vCPU thread, queues on the device thread, a handle for everybody else.
//!
//! ```text
//!  vCPU threads ── BalloonWindow ──► Mutex<BalloonMmio> ◄── BalloonDevice ── device thread
//!       │ (ioeventfd)                      │ publishes            ▲  ▲
//!       └──────────── doorbells ───────────┼──────────────────────┘  │ control, retry
//!  fault thread, channel ── BalloonHandle ─┴─► Shared (atomics) ─────┘
//! ```
//! [`BalloonHandle`] takes none of the locks that are held while guest memory is touched, so the thread that serves
//! the faults may use it at any time. [`BalloonWindow`] may wait for one batch of the device thread.
//!
//! A queue that was left because memory could not be had is *deferred*: it is looked at again when the guest notifies
//! or when [`BalloonHandle::retry`] is called, and never in a loop. Whoever refuses an access must therefore call
//! `retry` when it would no longer refuse it; calling it too early or for nothing is harmless.
//!
//! A queue on which the guest has done more than it was asked for is *closed* until that is paid for ([`Budget`]): its
//! doorbell is not watched, so the guest can neither make the device work nor wake it. That counts as a guest error.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use balloon::{Balloon, Budget, Counters, GuestPages, GuestStats, Options, Progress, QueueKind, StatsRequest};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::mmio::{Interrupt, MmioEvent, MmioTransport, VirtioDevice};

/// A balloon behind its registers.
pub type BalloonMmio<M> = MmioTransport<Balloon, M>;

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        balloon::spec::DEVICE_ID
    }

    fn offered_features(&self) -> u64 {
        Balloon::offered_features(self)
    }

    fn queue_count(&self, features: u64) -> usize {
        balloon::queue_count(features)
    }

    fn queue_size(&self) -> u16 {
        balloon::spec::QUEUE_SIZE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        Balloon::read_config(self, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        Balloon::write_config(self, offset, data);
    }

    fn reset(&mut self) {
        Balloon::reset(self);
    }
}

/// What a VM's balloon is like.
#[derive(Clone, Copy, Debug)]
pub struct BalloonConfig {
    /// Guest RAM in pages of 4 KiB.
    pub ram_pages: u32,
    /// The guest may deflate the balloon when it runs out of memory.
    pub deflate_on_oom: bool,
    /// The guest may report free pages.
    pub reporting: bool,
    /// Time between two requests for guest statistics; `None` for no statistics queue at all.
    pub stats_interval: Option<Duration>,
}

/// What other threads see and say. Everything here is lock-free but `published`, which is held for a copy only.
#[derive(Debug)]
struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    ready: AtomicBool,
    deferred: AtomicBool,
    /// What the guest did wrong in queues, configuration space and registers, and how often a queue was closed.
    errors: AtomicU64,
    closed: AtomicU64,
    published: Mutex<Published>,
    control: EventFd,
    retry: EventFd,
    /// One for each queue number that can exist.
    doorbells: Vec<EventFd>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Published {
    counters: Counters,
    stats: Option<(GuestStats, Instant)>,
}

impl Shared {
    /// Copies what the registers say, after anything that may have changed it.
    fn publish<M: GuestMemory>(&self, mmio: &BalloonMmio<M>, new_stats: bool) {
        let balloon = mmio.device();
        self.actual.store(balloon.actual(), Ordering::Release);
        self.ready.store(mmio.is_live(), Ordering::Release);
        let wrong = balloon.counters().faults.total() + mmio.violations();
        self.errors.store(wrong + self.closed.load(Ordering::Relaxed), Ordering::Release);
        let mut published = lock(&self.published);
        published.counters = *balloon.counters();
        if new_stats {
            published.stats = balloon.stats().map(|stats| (*stats, Instant::now()));
        }
    }
}

/// A panic elsewhere while the lock was held leaves plain data behind, which is still the best there is.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Wakes the device thread. Fails only when the counter is full: it is awake already.
fn ring(event: &EventFd) {
    let _ = event.write(1);
}

/// A balloon as other threads know it. Cheap to clone; no call waits for guest memory.
#[derive(Clone, Debug)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Asks the guest for a balloon of this many pages of 4 KiB, at most all of its RAM. The last call counts; the
    /// device thread tells the guest.
    pub fn set_target(&self, pages: u32) {
        self.0.target.store(pages, Ordering::Release);
        ring(&self.0.control);
    }

    /// The target that was set last, in pages; 0 before the first.
    pub fn target(&self) -> u32 {
        self.0.target.load(Ordering::Acquire)
    }

    /// The pages that the guest says it has given. It is written by the guest alone, after the pages themselves.
    pub fn actual(&self) -> u32 {
        self.0.actual.load(Ordering::Acquire)
    }

    /// Whether a driver is there and ready (DRIVER_OK, and neither failed nor reset since).
    pub fn ready(&self) -> bool {
        self.0.ready.load(Ordering::Acquire)
    }

    /// The latest statistics of the guest and when they arrived. They stay, and age, when the guest stops answering.
    pub fn stats(&self) -> Option<(GuestStats, Instant)> {
        lock(&self.0.published).stats
    }

    /// What the device did so far.
    pub fn counters(&self) -> Counters {
        lock(&self.0.published).counters
    }

    /// What the guest did wrong so far: in queues, in configuration space and in registers, and by doing more than it was
    /// asked for.
    pub fn guest_errors(&self) -> u64 {
        self.0.errors.load(Ordering::Acquire)
    }

    /// Whether a queue waits for [`Self::retry`].
    pub fn deferred(&self) -> bool {
        self.0.deferred.load(Ordering::Acquire)
    }

    /// Memory may be available again: the device thread looks at the deferred queues.
    pub fn retry(&self) {
        ring(&self.0.retry);
    }
}

/// The registers, for the bus.
#[derive(Debug)]
pub struct BalloonWindow<M> {
    mmio: Arc<Mutex<BalloonMmio<M>>>,
    shared: Arc<Shared>,
}

impl<M: GuestMemory> BalloonWindow<M> {
    /// A read by the guest, of any length at any offset in the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        lock(&self.mmio).read(offset, data);
    }

    /// A write by the guest, of any length at any offset in the window.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut mmio = lock(&self.mmio);
        let event = mmio.write(offset, data);
        self.shared.publish(&mmio, false);
        match event {
            MmioEvent::None | MmioEvent::Config => {}
            // No queue is deferred any more; the device thread finds that out.
            MmioEvent::Reset => ring(&self.shared.retry),
            MmioEvent::Notify(index) => {
                if let Some(doorbell) = self.shared.doorbells.get(index) {
                    ring(doorbell);
                }
            }
            // What the driver made available before this was not looked at.
            MmioEvent::DriverOk => self.shared.doorbells.iter().for_each(ring),
        }
    }
}

/// The device thread's part: an event-manager subscriber.
pub struct BalloonDevice<M, G> {
    mmio: Arc<Mutex<BalloonMmio<M>>>,
    shared: Arc<Shared>,
    pages: G,
    /// By queue number: left because of `WouldBlock`.
    deferred: Vec<bool>,
    /// What the guest has done beyond what was asked of it.
    budget: Budget,
    begun: Instant,
    /// By queue number: left alone until then, counted from `begun`.
    closed: Vec<Option<Duration>>,
    /// Runs until the first of them.
    opening: TimerFd,
    /// Rung for who tells of guest errors, each time that there are twice as many.
    bell: EventFd,
    told: u64,
    /// Runs from an answer to the next question: nobody is asked, or woken, who has no driver.
    timer: Option<(TimerFd, Duration)>,
}

impl<M, G> std::fmt::Debug for BalloonDevice<M, G> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BalloonDevice").field("deferred", &self.deferred).finish_non_exhaustive()
    }
}

/// What an event is for; smaller numbers are queues.
const CONTROL: u32 = 0x100;
const RETRY: u32 = 0x101;
const TIMER: u32 = 0x102;
const OPENING: u32 = 0x103;

impl<M: GuestMemory, G: GuestPages> BalloonDevice<M, G> {
    /// A balloon whose rings are in `mem` and whose pages are in the care of `pages`; `interrupt` is its line. `bell` is rung
    /// when there are guest errors to tell of.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new(
        config: BalloonConfig,
        mem: M,
        pages: G,
        interrupt: Box<dyn Interrupt>,
        bell: EventFd,
    ) -> io::Result<(Self, BalloonWindow<M>, BalloonHandle)> {
        let BalloonConfig { deflate_on_oom, reporting, stats_interval, .. } = config;
        let options = Options { stats: stats_interval.is_some(), deflate_on_oom, reporting };
        let balloon = Balloon::new(config.ram_pages, options);
        let queues = balloon::queue_count(balloon.offered_features());
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let shared = Arc::new(Shared {
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            ready: AtomicBool::new(false),
            deferred: AtomicBool::new(false),
            errors: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            published: Mutex::default(),
            control: event()?,
            retry: event()?,
            doorbells: (0..queues).map(|_| event()).collect::<io::Result<_>>()?,
        });
        let mmio = MmioTransport::new(balloon, mem, interrupt).map_err(io::Error::other)?;
        let mmio = Arc::new(Mutex::new(mmio));
        let timer = match config.stats_interval {
            Some(interval) => Some((TimerFd::new()?, interval)),
            None => None,
        };
        let window = BalloonWindow { mmio: mmio.clone(), shared: shared.clone() };
        let handle = BalloonHandle(shared.clone());
        let device = BalloonDevice {
            mmio,
            shared,
            pages,
            deferred: vec![false; queues],
            budget: Budget::new(config.ram_pages),
            begun: Instant::now(),
            closed: vec![None; queues],
            opening: TimerFd::new()?,
            bell,
            told: 0,
            timer,
        };
        Ok((device, window, handle))
    }

    /// The event for each queue number, to be registered as an ioeventfd on `QueueNotify` (window + 0x50, 4 bytes)
    /// with its number as the datamatch.
    pub fn doorbells(&self) -> &[EventFd] {
        &self.shared.doorbells
    }

    /// Handles one batch of queue `index`, and comes back to it by its own doorbell if there is more.
    fn run_queue(&mut self, index: usize, ops: &mut EventOps) {
        if self.closed[index].is_some() {
            return;
        }
        let mut mmio = lock(&self.mmio);
        let kind = balloon::queue_kind(mmio.features(), index);
        let (Some(kind), Some((balloon, queue, mem))) = (kind, mmio.queue(index)) else {
            // Reset, or not live yet: DRIVER_OK rings every doorbell.
            drop(mmio);
            return self.set_deferred(index, false);
        };
        if let Some(wait) = self.budget.wait(kind, self.begun.elapsed()) {
            drop(mmio);
            return self.close(index, wait, ops);
        }
        let out = balloon.process(kind, queue, mem, &mut self.pages);
        self.budget.spend(kind, &out, self.begun.elapsed());
        if out.needs_interrupt {
            mmio.signal_used();
        }
        self.shared.publish(&mmio, out.new_stats);
        drop(mmio);
        if kind == QueueKind::Stats {
            self.ask_later();
        }
        self.set_deferred(index, out.progress == Progress::Blocked);
        if out.progress == Progress::More {
            // Through the event loop, so that no queue keeps the thread, or the lock, for itself.
            ring(&self.shared.doorbells[index]);
        }
        self.tell();
    }

    /// Leaves a queue alone for this time. The guest waits for its buffers.
    fn close(&mut self, index: usize, wait: Duration, ops: &mut EventOps) {
        self.closed[index] = Some(self.begun.elapsed() + wait);
        self.watch(index, EventSet::empty(), ops);
        self.open_later();
        self.shared.closed.fetch_add(1, Ordering::Relaxed);
        self.shared.publish(&lock(&self.mmio), false);
        self.tell();
    }

    /// Looks again at the queues that were left alone for long enough.
    fn open(&mut self, ops: &mut EventOps) {
        let now = self.begun.elapsed();
        for index in 0..self.closed.len() {
            if self.closed[index].take_if(|until| *until <= now).is_some() {
                self.watch(index, EventSet::IN, ops);
                ring(&self.shared.doorbells[index]);
            }
        }
        self.open_later();
    }

    fn open_later(&mut self) {
        if let Some(until) = self.closed.iter().flatten().min() {
            let wait = until.saturating_sub(self.begun.elapsed()).max(Duration::from_micros(1));
            self.opening.reset(wait, None).expect("a timer of a minute or so");
        }
    }

    fn watch(&self, index: usize, what: EventSet, ops: &mut EventOps) {
        let doorbell = self.shared.doorbells[index].as_raw_fd();
        ops.modify(Events::with_data_raw(doorbell, index as u32, what)).expect("the doorbell has been added");
    }

    /// Rings for who tells of guest errors, when there is news: twice as many as the last time.
    fn tell(&mut self) {
        let errors = self.shared.errors.load(Ordering::Relaxed);
        if errors > 0 && errors / 2 >= self.told {
            self.told = errors;
            ring(&self.bell);
        }
    }

    fn set_deferred(&mut self, index: usize, deferred: bool) {
        self.deferred[index] = deferred;
        self.shared.deferred.store(self.deferred.contains(&true), Ordering::Release);
    }

    fn apply_target(&mut self) {
        let target = self.shared.target.load(Ordering::Acquire);
        self.budget.set_target(target);
        let mut mmio = lock(&self.mmio);
        if mmio.device_mut().set_target(target) {
            mmio.config_changed();
        }
    }

    fn ask_later(&mut self) {
        if let Some((timer, interval)) = &mut self.timer {
            timer.reset(*interval, None).expect("a timer with a constant interval");
        }
    }

    /// Asks for a new set of statistics. The answer, or the driver's first buffer, starts the time to the next question.
    fn ask_for_stats(&mut self) {
        let mut mmio = lock(&self.mmio);
        let index = balloon::queue_index(mmio.features(), QueueKind::Stats);
        let Some((balloon, queue, mem)) = index.and_then(|index| mmio.queue(index)) else {
            return;
        };
        let asked = balloon.request_stats(queue, mem);
        if asked == (StatsRequest::Sent { needs_interrupt: true }) {
            mmio.signal_used();
        }
        self.shared.publish(&mmio, false);
        drop(mmio);
        if asked == StatsRequest::Blocked {
            self.ask_later();
        }
    }
}

impl<M: GuestMemory, G: GuestPages> MutEventSubscriber for BalloonDevice<M, G> {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        match events.data() {
            CONTROL => {
                let _ = self.shared.control.read();
                self.apply_target();
            }
            RETRY => {
                let _ = self.shared.retry.read();
                // Each once: what is refused again waits for the next call.
                for index in 0..self.deferred.len() {
                    if self.deferred[index] {
                        self.run_queue(index, ops);
                    }
                }
            }
            OPENING => {
                let _ = self.opening.wait();
                self.open(ops);
            }
            TIMER => {
                if let Some((timer, _)) = &mut self.timer {
                    let _ = timer.wait();
                }
                self.ask_for_stats();
            }
            index => {
                let index = index as usize;
                if let Some(doorbell) = self.shared.doorbells.get(index) {
                    let _ = doorbell.read();
                    self.run_queue(index, ops);
                }
            }
        }
    }

    /// # Panics
    /// When the events cannot be watched: the device would be dead without anybody knowing.
    fn init(&mut self, ops: &mut EventOps) {
        let mut watch = |fd: &dyn AsRawFd, data| {
            ops.add(Events::with_data_raw(fd.as_raw_fd(), data, EventSet::IN)).expect("the balloon's events are new");
        };
        for (index, doorbell) in self.shared.doorbells.iter().enumerate() {
            watch(doorbell, index as u32);
        }
        watch(&self.shared.control, CONTROL);
        watch(&self.shared.retry, RETRY);
        watch(&self.opening, OPENING);
        if let Some((timer, _)) = &self.timer {
            watch(timer, TIMER);
        }
    }
}

//! The fault thread: the one owner of a guest's pages.
//!
//! It sleeps in one epoll over the userfaultfd, the controller's channel, the bell of the worker's other threads and the
//! gate. It waits for nothing else, so a fault is answered within the time of a system call or two:
//!
//! ```text
//!   userfaultfd ──► faults        channel ──► grants, recalls, pauses
//!   bell ─────────► requests      gate ─────► the last vCPU has come out
//! ```
//!
//! Without accounting there is no userfaultfd and the same loop, under the name `channel`, only speaks to the controller.
//! When accounting begins it becomes the fault thread:
//!
//! ```text
//!  Activate ─► hold the vCPUs ─► all out: call the devices ─► Quiet: register, count, adopt ─► Activated ─► Grant ─► go on
//! ```
//! The devices come last, because their thread is also the one that tells of the guest's end: it must not wait for vCPUs.
//!
//! The controller may go at any moment. Then the guest goes on with what is in stock, its vCPUs are held when half of the
//! reserve is gone, and the next controller is told everything in one [`Hello`]. What an earlier one had asked and got no
//! answer to is forgotten: the next does not know of it. A worker whose guest was never started is nobody's when there is
//! no controller, and ends itself ([`Alone`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memcg_core::units::Pages as Count;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use vmm_sys_util::eventfd::EventFd;

use super::activation::{self, Tools};
use super::ageing::Plan;
use super::alone::Alone;
use super::client::{Desk, Reply, Request, Work};
use super::cold::Reclaim;
use super::pages::{Pages, reserve_target};
use super::place::Placement;
use super::ram::Ram;
use super::told::Told;
use super::uffd::Uffd;
use crate::devices::balloon::BalloonHandle;
use crate::devices::power::PowerButton;
use crate::worker::channel::{Channel, Received};
use crate::worker::complain;
use crate::worker::gate::{self, Gate, monotonic_ns};
use crate::worker::protocol::{Area, FromWorker, GuestStats, Hello, Report, ToWorker};
use crate::worker::sandbox::{self, Thread};

const FAULTS: u64 = 0;
const CHANNEL: u64 = 1;
const LISTENER: u64 = 2;
const BELL: u64 = 3;
const ALL_OUT: u64 = 4;

/// What a [`FaultThread`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// The userfaultfd that RAM is registered with; absent without accounting.
    pub uffd: Option<Uffd>,
    /// Reclaim, for when there is something to reclaim.
    pub reclaim: Reclaim,
    /// How the guest's pages are aged.
    pub plan: Plan,
    /// For when accounting begins, or the sentence that says why it cannot.
    pub tools: Result<Tools, String>,
    /// The controller's socket.
    pub channel: Channel,
    /// Where the other threads' requests arrive.
    pub desk: Desk,
    /// The gate of the vCPUs.
    pub gate: Arc<Gate>,
    /// The balloon device.
    pub balloon: BalloonHandle,
    /// Pages that the guest named to its balloon and that are not RAM.
    pub outside: Arc<AtomicU64>,
    /// Written to make the device thread ask [`Request::Quiet`].
    pub quiet: EventFd,
    /// What the controller presses for the guest to end.
    pub button: Arc<PowerButton>,
    /// Where the thread runs.
    pub placement: Placement,
    /// Guest RAM.
    pub ram: Arc<Ram>,
    /// Number of vCPUs.
    pub cpus: u32,
    /// [`WorkerConfig::instance`](crate::worker::config::WorkerConfig::instance).
    pub instance: u64,
}

/// A huge page that was put in place counts as so many faults, when it is asked how many there were since the thread has
/// looked for its place.
const AS_FAULTS: usize = 2;

/// Accounting that is to begin.
#[derive(Debug)]
struct Activation {
    seq: u32,
    epoch: u32,
    /// The device thread has been called.
    called: bool,
}

/// Everything the thread owns.
#[derive(Debug)]
pub struct FaultThread {
    pages: Option<Pages>,
    /// Reclaim, until accounting begins.
    reclaim: Option<Reclaim>,
    /// Where contents of evicted pages are.
    store: Area,
    plan: Plan,
    tools: Result<Tools, String>,
    activation: Option<Activation>,
    /// An answer that the socket had no room for; nothing else is said before it.
    unsent: Option<FromWorker>,
    channel: Channel,
    desk: Desk,
    gate: Arc<Gate>,
    balloon: BalloonHandle,
    /// Pages that the guest named to its balloon and that are not RAM.
    outside: Arc<AtomicU64>,
    placement: Placement,
    button: Arc<PowerButton>,
    quiet: EventFd,
    ram: Arc<Ram>,
    cpus: u32,
    instance: u64,
    alone: Alone,
    pause_seq: Option<u32>,
    /// The recall that waits for the reclaim thread.
    recall_seq: Option<u32>,
    /// Pages that loading filled, once it is done.
    loaded: Option<u64>,
    /// When the statistics that were sent last had come from the guest.
    stats_sent: Option<Instant>,
    /// What the controller was last told; a change is worth a report.
    told: Told,
}

impl FaultThread {
    /// The thread's state.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            uffd,
            reclaim,
            plan,
            tools,
            channel,
            desk,
            gate,
            balloon,
            outside,
            quiet,
            button,
            placement,
            ram,
            cpus,
            instance,
        } = parts;
        let store = reclaim.area();
        let (pages, reclaim) = match uffd {
            Some(uffd) => {
                (Some(Pages::new(ram.clone(), uffd, gate.clone(), cpus, balloon.clone(), reclaim, plan)), None)
            }
            None => (None, Some(reclaim)),
        };
        let told = Told::default();
        Self {
            pages,
            reclaim,
            store,
            plan,
            tools,
            activation: None,
            unsent: None,
            channel,
            desk,
            gate,
            balloon,
            outside,
            placement,
            button,
            quiet,
            ram,
            cpus,
            instance,
            alone: Alone(Some(Instant::now())),
            pause_seq: None,
            recall_seq: None,
            loaded: None,
            stats_sent: None,
            told,
        }
    }

    /// Runs until the process ends.
    ///
    /// # Errors
    /// When the host refuses epoll; anything later ends the process.
    pub fn run(mut self) -> io::Result<()> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let add =
            |fd: BorrowedFd<'_>, token| epoll::add(&epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN);
        let mut watched = false;
        add(self.channel.listener(), LISTENER)?;
        add(borrow(self.desk.bell.as_raw_fd()), BELL)?;
        add(borrow(self.gate.all_out_event().as_raw_fd()), ALL_OUT)?;
        sandbox::enter(Thread::Fault).map_err(io::Error::other)?;
        loop {
            if !watched && let Some(pages) = &self.pages {
                add(pages.uffd().as_fd(), FAULTS)?;
                rustix::thread::set_name(c"fault")?;
                watched = true;
            }
            let mut events =
                [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 8];
            // A report that the socket had no room for is offered again: nothing else may happen while all vCPUs are held.
            let again = (self.told.owed && self.channel.peer().is_some()).then_some(Duration::from_millis(10));
            let left = self.alone.left(!self.gate.closed_for(gate::NOT_STARTED), Instant::now());
            if left == Some(Duration::ZERO) {
                complain(format_args!("the guest was never started and no controller came: the worker ends"));
                crate::worker::exit(1);
            }
            let patience = self.pages.iter().flat_map(|pages| [pages.patience_left(), pages.starved_left()]);
            let patience = patience.flatten().map(Duration::from_nanos);
            let until = again.into_iter().chain(left).chain(patience).min().map(timespec);
            let count = match epoll::wait(&epoll, &mut events, until.as_ref()) {
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            let woken = monotonic_ns();
            let ready = |token| events[..count].iter().any(|e| e.data.u64() == token);
            if ready(FAULTS) {
                self.faults(woken);
            }
            if ready(BELL) {
                self.requests();
            }
            if ready(ALL_OUT) {
                self.all_out();
            }
            if ready(CHANNEL) {
                self.messages();
            }
            if ready(LISTENER) && self.accept() {
                if let Some(peer) = self.channel.peer() {
                    epoll::add(&epoll, peer, epoll::EventData::new_u64(CHANNEL), epoll::EventFlags::IN)?;
                }
                self.greet();
            }
            self.keep();
            self.speak();
        }
    }

    /// Takes the next controller in, unless there is one that lives.
    fn accept(&mut self) -> bool {
        if self.channel.hung_up() {
            // What it said before it went still counts.
            self.messages();
            self.channel.close();
            self.parted();
        }
        self.channel.accept()
    }

    /// The controller is gone, and with it everything that it had asked.
    fn parted(&mut self) {
        self.alone = Alone(Some(Instant::now()));
        self.unsent = None;
        self.pause_seq = None;
        self.recall_seq = None;
        if self.activation.take().is_some() {
            // Not begun yet. What has begun waits for the reserve that the next controller grants.
            self.gate.release(gate::ACTIVATING);
        }
        if let Some(pages) = &mut self.pages {
            pages.unasked();
        }
    }

    /// Tells a controller that has just connected who this is, how far it has got and what it holds.
    fn greet(&mut self) {
        self.alone = Alone(None);
        let hello = Hello {
            instance: self.instance,
            ram: self.ram.slot_array(),
            store: self.store,
            pool: self.ram.pool().area(),
            reserve_target: if self.pages.is_some() { reserve_target(self.cpus) } else { 0 },
            accounting: self.pages.is_some(),
            loaded: self.loaded,
            started: !self.gate.closed_for(gate::NOT_STARTED),
            paused: self.gate.closed_for(gate::PAUSED),
            report: self.measure(),
        };
        let _ = self.channel.send(&FromWorker::Hello(hello));
        self.told.owed = true;
    }

    /// Does what is due when everything that has come was answered.
    fn keep(&mut self) {
        self.ask_and_fill_due();
        let Some(pages) = &mut self.pages else { return };
        if let Some(corrupt) = pages.corrupt() {
            let message = format!("guest memory is lost: {corrupt}");
            self.finish(FromWorker::Failed { message, smallest_max: None });
        }
        if let Some((client, reply)) = pages.keep_pool() {
            self.reply(client, reply);
        }
        let Some(pages) = &mut self.pages else { return };
        if let Some((client, reply)) = pages.try_starved() {
            self.reply(client, reply);
        }
        let Some(pages) = &mut self.pages else { return };
        if let Some(seq) = self.recall_seq.take_if(|_| !pages.is_recalling()) {
            pages.on_recall();
            self.report(Some(seq), 0, 0);
        }
        if let Some(pages) = &mut self.pages {
            pages.ring_reclaim();
        }
    }

    fn faults(&mut self, woken_ns: u64) {
        let mut n = 0;
        while let Some(pages) = &mut self.pages {
            n += pages.on_faults(woken_ns);
            let more = pages.has_faults();
            n += AS_FAULTS * self.ask_and_fill_due();
            if !more {
                break;
            }
        }
        self.placement.follow(n);
    }

    /// Fills the blocks that are due; returns how many there were. Unlike [`Pages::fill_due`], this speaks to the controller
    /// between them: what comes next is asked for before each, and what is granted meanwhile is taken at once, because
    /// another thread has work to do with it.
    fn ask_and_fill_due(&mut self) -> usize {
        let mut n = 0;
        loop {
            if self.pages.as_ref().is_some_and(Pages::is_due) {
                self.speak();
            }
            let Some(pages) = &mut self.pages else { return n };
            if !pages.fill_one_due() {
                return n;
            }
            n += 1;
            self.messages();
        }
    }

    /// Tells the controller what it must know: a want, a hold that began or ended, pages given back, guest errors.
    fn speak(&mut self) {
        // Nothing is wanted ahead while what there was is on its way back.
        let ask = if self.recall_seq.is_some() { None } else { self.pages.as_mut().and_then(Pages::ask) };
        let news = self.news() != self.told;
        if ask.is_some() || news {
            let (want, want_now) = ask.unwrap_or_default();
            self.report(None, want, want_now);
        }
    }

    /// True when nothing is left that must be said before anything else.
    fn say_unsent(&mut self) -> bool {
        self.unsent.take_if(|words| self.channel.send(words).is_ok());
        self.unsent.is_none()
    }

    fn report(&mut self, answers: Option<u32>, want: u64, want_now: u64) {
        // Before the report is made: what changes meanwhile is told once more, and never missed.
        let mut told = self.news();
        let report = Report { answers, want, want_now, ..self.measure() };
        let sent = self.say_unsent() && self.channel.send(&FromWorker::Report(report)).is_ok();
        if !sent
            && want > 0
            && let Some(pages) = &mut self.pages
        {
            pages.unasked();
        }
        told.owed = !sent;
        self.told = told;
    }

    /// What the controller would hear of now.
    fn news(&self) -> Told {
        Told::now(self.pages.as_ref(), &self.balloon, self.outside.load(Ordering::Relaxed))
    }

    /// What the VM holds at this moment.
    fn measure(&self) -> Report {
        let counters = self.balloon.counters();
        let mut report = Report {
            balloon_actual: self.balloon.actual(),
            balloon_ready: self.balloon.ready(),
            oom_deflated: counters.oom_deflated_pages,
            paused: self.gate.closed_for(gate::PAUSED) && self.gate.all_out(),
            ..self.pages.as_ref().map(Pages::report).unwrap_or_default()
        };
        report.faults.guest_errors += self.balloon.guest_errors() + self.outside.load(Ordering::Relaxed);
        report.faults.reported_left += counters.poisoned_pages;
        report
    }

    /// Sends the guest's statistics when they are newer than the last ones sent.
    fn guest_stats(&mut self) {
        let Some((stats, at)) = self.balloon.stats() else { return };
        if self.stats_sent != Some(at) {
            let values = stats.values();
            let age_ms = at.elapsed().as_millis() as u64;
            if self.channel.send(&FromWorker::GuestStats(GuestStats { values, age_ms })).is_ok() {
                self.stats_sent = Some(at);
            }
        }
    }

    fn all_out(&mut self) {
        let _ = self.gate.all_out_event().read();
        if let Some(pages) = &mut self.pages {
            pages.on_all_out();
        }
        if self.gate.all_out()
            && let Some(seq) = self.pause_seq.take()
        {
            self.report(Some(seq), 0, 0);
        }
        self.call_devices();
    }

    /// Accounting is to begin: stops everybody who writes to guest memory.
    fn prepare_activation(&mut self, seq: u32, epoch: u32) {
        let obstacle = match &self.tools {
            _ if self.pages.is_some() => Some("it has begun already".to_owned()),
            Err(obstacle) => Some(obstacle.clone()),
            Ok(_) => None,
        };
        if let Some(message) = obstacle {
            self.not_activated(seq, message);
            return;
        }
        self.gate.hold(gate::ACTIVATING);
        self.activation = Some(Activation { seq, epoch, called: false });
        self.call_devices();
    }

    fn not_activated(&mut self, seq: u32, mut message: String) {
        message.truncate(message.floor_char_boundary(512));
        self.unsent = Some(FromWorker::NotActivated { seq, message });
        self.told.owed = true;
    }

    /// Asks the device thread to be quiet once every vCPU is out.
    fn call_devices(&mut self) {
        if let Some(activation) = &mut self.activation
            && !activation.called
            && self.gate.all_out()
        {
            activation.called = true;
            let _ = self.quiet.write(1);
        }
    }

    /// Nobody touches RAM now: accounting begins, or all is as before.
    fn activate(&mut self) {
        // A call that an earlier controller caused may be answered late, with vCPUs that are not out.
        let Some(Activation { seq, epoch, .. }) = self.activation.take_if(|activation| activation.called) else {
            return;
        };
        match self.adopt(epoch) {
            Ok(pages) => {
                let resident = pages.report().guest;
                self.pages = Some(pages);
                let reserve_target = reserve_target(self.cpus);
                self.unsent = Some(FromWorker::Activated { seq, resident, reserve_target });
                // With the report behind it the controller has the whole picture at once.
                self.told.owed = true;
            }
            Err(message) => {
                self.gate.release(gate::ACTIVATING);
                self.not_activated(seq, message);
            }
        }
    }

    fn adopt(&mut self, epoch: u32) -> Result<Pages, String> {
        let tools = self.tools.as_ref().map_err(Clone::clone)?;
        let failed = |what| move |e: io::Error| format!("{what}: {e}");
        // SAFETY: this thread reads the events from its next round on, until the process ends.
        let uffd = unsafe { activation::register(&self.ram, tools) };
        let uffd = uffd.map_err(failed("guest memory cannot be registered with userfaultfd"))?;
        // SAFETY: every vCPU is out of the guest and stays there, and the device thread waits for this one; nobody else
        // writes to guest memory.
        let resident = unsafe { activation::resident(&self.ram, tools) };
        let resident = resident.map_err(failed("guest memory cannot be counted"))?;
        let Some(reclaim) = self.reclaim.take() else { return Err("it has begun already".to_owned()) };
        let (ram, gate, balloon) = (self.ram.clone(), self.gate.clone(), self.balloon.clone());
        let mut pages = Pages::new(ram, uffd, gate, self.cpus, balloon, reclaim, self.plan);
        pages.adopt(epoch, &resident);
        Ok(pages)
    }

    fn messages(&mut self) {
        loop {
            match self.channel.receive() {
                Received::Message(message) => self.message(message),
                Received::Empty => return,
                Received::Closed => return self.parted(),
            }
        }
    }

    fn message(&mut self, message: ToWorker) {
        match message {
            ToWorker::Grant { epoch, granted_total, stock_max, room, swap_max, store_max, refused } => {
                let Some(pages) = &mut self.pages else { return };
                pages.set_swap_limits(swap_max, store_max);
                let room = (room != u64::MAX).then_some(Count(room));
                // Only after accounting began: the reserve is here now, or the controller has refused it.
                self.gate.release(gate::ACTIVATING);
                match pages.on_grant(epoch, granted_total, stock_max, room, refused) {
                    Ok(Some((client, reply))) => self.reply(client, reply),
                    Ok(None) => {}
                    Err(e) => self.finish(FromWorker::Failed {
                        message: format!("the controller's account contradicts itself: {e}"),
                        smallest_max: None,
                    }),
                }
            }
            ToWorker::Recall { seq } => {
                // Of two that wait, the first has what there was.
                if let Some(seq) = self.recall_seq.take() {
                    self.report(Some(seq), 0, 0);
                }
                if let Some(pages) = &mut self.pages {
                    pages.on_recall();
                }
                // A huge page that is being zeroed comes back when that has ended.
                match self.pages.as_ref().is_some_and(Pages::is_recalling) {
                    true => self.recall_seq = Some(seq),
                    false => self.report(Some(seq), 0, 0),
                }
            }
            ToWorker::Query { seq } => {
                self.guest_stats();
                self.report(Some(seq), 0, 0);
            }
            ToWorker::Start => {
                self.gate.release(gate::NOT_STARTED);
            }
            ToWorker::Pause { seq } => {
                if self.gate.hold(gate::PAUSED) {
                    self.pages.iter_mut().for_each(Pages::on_pause);
                }
                self.pause_seq = Some(seq);
                self.all_out();
            }
            ToWorker::Resume { seq } => {
                self.pause_seq = None;
                if self.gate.release(gate::PAUSED) {
                    self.pages.iter_mut().for_each(Pages::on_resume);
                }
                self.report(Some(seq), 0, 0);
            }
            ToWorker::Activate { seq, epoch } => self.prepare_activation(seq, epoch),
            ToWorker::BalloonTarget { pages } => self.balloon.set_target(pages),
            ToWorker::PowerButton => self.button.press(),
            ToWorker::Reclaim { aim } => {
                if let Some(pages) = &mut self.pages {
                    pages.reclaim.set_aim(aim);
                }
            }
        }
    }

    fn requests(&mut self) {
        let _ = self.desk.bell.read();
        while let Ok((client, request)) = self.desk.requests.try_recv() {
            // A fault that came meanwhile goes first: a vCPU waits for it.
            self.faults(monotonic_ns());
            if let Some(reply) = self.request(client, request) {
                self.reply(client, reply);
            }
        }
    }

    fn request(&mut self, client: usize, request: Request) -> Option<Reply> {
        match (request, &mut self.pages) {
            (Request::Loaded(plan), _) => {
                // Without a controller yet, it hears of it when it connects.
                self.loaded = Some(plan);
                let _ = self.channel.send(&FromWorker::Loaded { plan });
                Some(Reply::Done(Vec::new()))
            }
            (Request::Quiet, _) => {
                self.activate();
                Some(Reply::Done(Vec::new()))
            }
            (Request::Failed(message, smallest_max), _) => self.finish(FromWorker::Failed { message, smallest_max }),
            (Request::Ended(reason), _) => self.finish(FromWorker::Exited(reason)),
            (Request::Fill { run, wait }, Some(pages)) => pages.on_fill(client, run, wait),
            (Request::Claim(mut runs, to), Some(pages)) => Some(match pages.on_claim(&mut runs, to) {
                Some(claimed) => Reply::Done(claimed),
                None => Reply::WouldBlock,
            }),
            (Request::Reclaim(done, mut load), Some(pages)) => {
                let (work, reply) = pages.on_reclaim(done, &mut load);
                if let Some((other, reply)) = reply {
                    self.reply(other, reply);
                }
                Some(Reply::Job(work, load))
            }
            // Nothing is charged yet, so nothing is cold.
            (Request::Reclaim(_, load), None) => {
                self.reclaim.iter_mut().for_each(Reclaim::rest);
                Some(Reply::Job(Work::Rest(None), load))
            }
            (Request::Discarded(runs, to), Some(pages)) => {
                if let Some((other, reply)) = pages.on_discarded(&runs, to) {
                    self.reply(other, reply);
                }
                Some(Reply::Done(runs))
            }
            (Request::Deflated(runs), Some(pages)) => {
                pages.on_deflated(&runs);
                Some(Reply::Done(runs))
            }
            (Request::Fill { .. }, None) => Some(Reply::Done(Vec::new())),
            (Request::Claim(runs, _) | Request::Discarded(runs, _) | Request::Deflated(runs), None) => {
                Some(Reply::Done(runs))
            }
        }
    }

    fn reply(&self, client: usize, reply: Reply) {
        // Each client has one request in flight, so there is room for its answer.
        let _ = self.desk.replies[client].try_send(reply);
    }

    /// The last words: sent within seconds or not at all, then the process ends without closing KVM's descriptors.
    fn finish(&mut self, words: FromWorker) -> ! {
        let wait = |fd: BorrowedFd<'_>, flags| {
            let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
            poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&timeout)) == Ok(1)
        };
        // The guest may have ended before the controller has connected.
        let absent = self.channel.peer().is_none() || self.channel.hung_up();
        if absent && wait(self.channel.listener(), PollFlags::IN) && self.accept() {
            self.greet();
        }
        while let Err(e) = self.channel.send(&words) {
            let full = self.channel.peer().filter(|_| e.kind() == io::ErrorKind::WouldBlock);
            if !full.is_some_and(|peer| wait(peer, PollFlags::OUT)) {
                crate::worker::leave(&words);
                break;
            }
        }
        crate::worker::exit(0)
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

/// A descriptor that is never closed.
pub(super) fn borrow<'a>(fd: i32) -> BorrowedFd<'a> {
    // SAFETY: the descriptors passed here belong to the thread's own state, which lives until the process ends.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

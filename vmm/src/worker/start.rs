//! Builds the VM in the one order that works, then becomes the device thread.
//!
//! ```text
//!  capabilities dropped ► signals blocked ► RAM mapped and registered ► devices ► KVM: slots, irqchip, eventfds, vCPUs
//!  ► fault thread ► vCPU threads (held) ► kernel loaded through the accessor, charged like any touch ► `Loaded`
//!  ► `Start` opens the gate
//! ```
//! Each thread enters its [`sandbox`] before it does anything for the guest; this one, the last, before `Loaded`.

use std::fs::File;
use std::io::{self, Read};
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use memcg_core::frame::Cost;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

use super::channel::Channel;
use super::complain;
use super::config::{WorkerConfig, fd};
use super::gate::{Gate, PAUSED};
use super::protocol::FromWorker;
use super::sandbox::{self, SandboxError, Thread};
use super::vcpu::{End, EndSender, prepare_signals, spawn};
use crate::chain::chain;
use crate::devices::balloon::{BalloonConfig, BalloonDevice, BalloonHandle, BalloonWindow};
use crate::devices::bus::{BusDevice, Buses, Effect};
use crate::devices::console::{Console, ConsolePump};
use crate::devices::debug_port::{self, DebugPort};
use crate::devices::power::{self, AcpiPower, I8042Reset, PowerButton};
use crate::devices::serial::{self, SerialPort};
use crate::machine::boot::{BootError, BootPlan, BootRequest, Image};
use crate::machine::kvm::NewVm;
use crate::machine::{RamLayout, Vcpu, cpuid, layout};
use crate::memory::activation::Tools;
use crate::memory::ageing::Plan;
use crate::memory::client::{Client, Desk, Reply, Request, clients};
use crate::memory::cold::Reclaim;
use crate::memory::give::BalloonPages;
use crate::memory::pages::reserve_target;
use crate::memory::place::{self, Placement};
use crate::memory::reclaim::ReclaimThread;
use crate::memory::store::{Codec, Store};
use crate::memory::thread::{FaultThread, Parts};
use crate::memory::uffd::Uffd;
use crate::memory::{GuestMem, Ram, activation};

/// How long those at the console may take to accept the guest's last words.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Offset of `QueueNotify` in a virtio-mmio window (virtio 1.3, 4.2.2).
const QUEUE_NOTIFY: u64 = 0x50;

/// Why a worker could not start: one sentence each, with its cause behind it.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("{0}")]
    Os(&'static str, #[source] io::Error),
    #[error("the worker's configuration is not readable")]
    Config(#[from] serde_json::Error),
    #[error("the memory size is not possible")]
    Layout(#[from] crate::machine::LayoutError),
    #[error("the virtual machine cannot be made")]
    Vm(#[from] crate::machine::VmError),
    #[error("the CPUID of the vCPUs cannot be made")]
    Cpuid(#[from] cpuid::CpuidError),
    #[error("a vCPU cannot be set up")]
    Vcpu(#[from] crate::machine::vcpu::VcpuError),
    #[error("a vCPU cannot be started")]
    Spawn(#[from] super::vcpu::SpawnError),
    #[error("the worker cannot be shut into its sandbox")]
    Sandbox(#[from] SandboxError),
    #[error("a device cannot be put on its bus")]
    Bus(#[from] crate::devices::bus::BusError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("memory.max is too small to load this guest")]
    TooSmall(u64),
}

/// Attaches what was being done to an I/O error.
fn os<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> StartError {
    move |e| StartError::Os(what, e.into())
}

/// Whether a controller has started this process: only then is there a sealed configuration at its number.
fn has_been_launched() -> bool {
    // SAFETY: this fcntl takes numbers and changes nothing, whatever the descriptor is.
    let seals = unsafe { libc::fcntl(fd::CONFIG, libc::F_GET_SEALS) };
    seals >= 0 && seals & libc::F_SEAL_WRITE != 0
}

/// Runs one VM in this process, which does nothing else. Returns never; the controller learns why it ended.
pub fn main() -> ! {
    if !has_been_launched() {
        complain(format_args!("a worker is started by its controller, not by hand: start a VM with ballast run"));
        super::exit(2)
    }
    std::panic::set_hook(Box::new(|panic| {
        // A VM must not hang because one of its threads is gone.
        complain(format_args!("worker failed: {panic}"));
        std::process::abort();
    }));
    spare_the_heap();
    let mut channel = Channel::new(handed(fd::LISTEN));
    let vm = match build(&channel) {
        Ok(vm) => vm,
        Err(error) => {
            tell_at_last(&mut channel, &FromWorker::Failed { message: sentence(&error), smallest_max: None });
            super::exit(1)
        }
    };
    let client = vm.client.clone();
    let error = match run(vm, channel) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let smallest_max = match error {
        StartError::TooSmall(pages) => Some(pages),
        _ => None,
    };
    ask(&client, Request::Failed(sentence(&error), smallest_max));
    super::exit(1)
}

/// Tables that are larger than this are mappings of their own: what of them is never touched costs nothing.
const LARGE: libc::c_int = 32 << 10;

/// Every thread allocates from one heap: an arena of its own for each would stay for good, and costs more than it holds.
fn spare_the_heap() {
    // SAFETY: mallopt takes numbers; no other thread is there yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// The error with its causes, as one sentence of at most 512 bytes.
fn sentence(error: &StartError) -> String {
    let mut message = chain(error);
    message.truncate(message.floor_char_boundary(512));
    message
}

fn ask(client: &Mutex<Client>, request: Request) -> Reply {
    client.lock().unwrap_or_else(PoisonError::into_inner).ask(request)
}

/// Says one thing to the controller when there is no fault thread to say it.
fn tell_at_last(channel: &mut Channel, words: &FromWorker) {
    let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
    let connects = poll(&mut [PollFd::from_borrowed_fd(channel.listener(), PollFlags::IN)], Some(&timeout));
    if connects != Ok(1) || !channel.accept() || channel.send(words).is_err() {
        super::leave(words);
    }
}

/// Takes a descriptor that the controller put at a fixed number.
fn handed(number: i32) -> OwnedFd {
    // SAFETY: the numbers are those of `config::fd`; each is taken once, and nothing else in this process owns them.
    unsafe { OwnedFd::from_raw_fd(number) }
}

/// A VM whose kernel is not loaded yet.
struct Built {
    config: WorkerConfig,
    layout: RamLayout,
    ram: Arc<Ram>,
    uffd: Option<Uffd>,
    tools: Result<Tools, String>,
    gate: Arc<Gate>,
    desk: Desk,
    client: Arc<Mutex<Client>>,
    reclaim: Reclaim,
    reclaim_thread: ReclaimThread,
    balloon: BalloonHandle,
    outside: Arc<AtomicU64>,
    button: Arc<PowerButton>,
    vcpus: Vec<Vcpu>,
    buses: Arc<Buses>,
    console: Arc<Mutex<ConsolePump>>,
    balloon_device: Arc<Mutex<BalloonDevice<GuestMem, BalloonPages>>>,
}

/// Everything that needs no guest memory.
fn build(channel: &Channel) -> Result<Built, StartError> {
    sandbox::drop_capabilities()?;
    prepare_signals().map_err(os("signals cannot be blocked"))?;
    channel.prepare().map_err(os("the controller's socket cannot be used"))?;
    let mut text = Vec::new();
    File::from(handed(fd::CONFIG)).read_to_end(&mut text).map_err(os("the worker's configuration cannot be read"))?;
    let config: WorkerConfig = serde_json::from_slice(&text)?;
    let layout = RamLayout::new(config.size_bytes)?;
    let ranges: Vec<(u64, u64)> = layout.ranges().map(|r| (r.gpa, r.bytes)).collect();
    let ram = Arc::new(Ram::map(&ranges).map_err(os("guest memory cannot be mapped"))?);
    let tools = match &config.obstacle {
        None => Ok(Tools::new(File::from(handed(fd::UFFD_DEV)))),
        Some(obstacle) => Err(format!("{obstacle}; then start the VM again")),
    };
    let uffd = config.accounting.then(|| register(&ram, &tools)).transpose()?;
    let ([client, reclaimer], desk) = clients().map_err(os("no eventfd is left"))?;
    let client = Arc::new(Mutex::new(client));
    let swap_file = (config.swap_file_pages > 0).then(|| (handed(fd::SWAP_FILE), config.swap_file_pages));
    let store = Store::new(ram.pages(), Codec::default(), swap_file);
    let Store { writer, spill, reader } = store.map_err(os("the store for evicted pages cannot be made"))?;
    let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(os("no eventfd is left"))?;
    let reclaim = Reclaim::new(clone_event(&bell)?, reader);
    let reclaim_thread = ReclaimThread::new(reclaimer, bell, ram.clone(), writer, spill);
    let gate = Arc::new(Gate::new(config.cpus).map_err(os("no eventfd is left"))?);

    let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(os("no eventfd is left"));
    let (serial_irq, balloon_irq, button_irq) = (event()?, event()?, event()?);
    let button = Arc::new(PowerButton::new(clone_event(&button_irq)?));
    // It stays open for a later controller.
    let ring = ManuallyDrop::new(File::from(handed(fd::CONSOLE_RING)));
    let console = Arc::new(Console::new(&ring).map_err(os("the console cannot be used"))?);
    let port = Arc::new(Mutex::new(SerialPort::new(console.clone(), clone_event(&serial_irq)?)));
    let pump = ConsolePump::new(console.clone(), port.clone(), handed(fd::CONSOLE));
    let pump = pump.map_err(os("the console cannot be used"))?;
    let pages = BalloonPages::new(ram.clone(), Some(client.clone()));
    let outside = pages.outside();
    let stats = u64::from(config.stats_interval_s);
    let balloon_config = BalloonConfig {
        ram_pages: u32::try_from(ram.pages()).unwrap_or(u32::MAX),
        deflate_on_oom: config.deflate_on_oom,
        reporting: config.free_page_reporting,
        stats_interval: (stats > 0).then(|| Duration::from_secs(stats)),
    };
    let memory = GuestMem::new(ram.clone(), Some(client.clone()), false);
    let interrupt = Box::new(clone_event(&balloon_irq)?);
    let bell = clone_event(&desk.bell)?;
    let (balloon_device, window, balloon) =
        BalloonDevice::new(balloon_config, memory, pages, interrupt, bell).map_err(os("the balloon cannot be made"))?;

    let mut buses = Buses::default();
    buses.pio.insert(u64::from(layout::COM1), serial::PORTS, port)?;
    buses.pio.insert(u64::from(layout::POWER_PORT), power::PORTS, Arc::new(Mutex::new(AcpiPower)))?;
    buses.pio.insert(u64::from(layout::I8042_COMMAND), 1, Arc::new(Mutex::new(I8042Reset)))?;
    if config.debug_port {
        let ports = Arc::new(Mutex::new(DebugPort::new(console, button.clone())));
        buses.pio.insert(u64::from(layout::DEBUG_PORT), debug_port::PORTS, ports)?;
    }
    let window_at = layout::virtio_window(0);
    let window = Window { registers: window, bell: clone_event(&desk.bell)? };
    buses.mmio.insert(window_at, layout::VIRTIO_MMIO_SIZE, Arc::new(Mutex::new(window)))?;

    let vm = NewVm::new(handed(fd::KVM), config.cpus)?;
    // SAFETY: the mappings are guest RAM and nothing else, and stay until the process ends.
    let mut vm = unsafe { vm.set_ram(&layout, ram.slots()) }?;
    vm.add_irqfd(&serial_irq, layout::COM1_GSI)?;
    vm.add_irqfd(&button_irq, layout::POWER_BUTTON_GSI)?;
    vm.add_irqfd(&balloon_irq, layout::virtio_gsi(0))?;
    for (queue, doorbell) in (0..).zip(balloon_device.doorbells()) {
        vm.add_ioeventfd(doorbell, window_at + QUEUE_NOTIFY, Some(queue))?;
    }
    Ok(Built {
        vcpus: vm.create_vcpus(&cpuid::from_words(&config.cpuid)?)?,
        config,
        layout,
        ram,
        uffd,
        tools,
        gate,
        desk,
        client,
        reclaim,
        reclaim_thread,
        balloon,
        outside,
        button,
        buses: Arc::new(buses),
        console: Arc::new(Mutex::new(pump)),
        balloon_device: Arc::new(Mutex::new(balloon_device)),
    })
}

fn clone_event(event: &EventFd) -> Result<EventFd, StartError> {
    event.try_clone().map_err(os("no descriptor is left"))
}

/// Registers all of RAM before anything is written to it.
fn register(ram: &Ram, tools: &Result<Tools, String>) -> Result<Uffd, StartError> {
    let tools = tools.as_ref().map_err(|obstacle| io::Error::other(obstacle.clone()));
    // SAFETY: the fault thread reads the events until the end.
    let uffd = tools.and_then(|tools| unsafe { activation::register(ram, tools) });
    let uffd = uffd.map_err(os("guest memory cannot be registered with userfaultfd"))?;
    ram.begin_charging();
    Ok(uffd)
}

/// Starts the threads, loads the kernel, and serves the devices until the guest ends.
fn run(vm: Built, channel: Channel) -> Result<std::convert::Infallible, StartError> {
    let Built { config, layout, ram, uffd, tools, gate, desk, client, balloon, outside, button, vcpus, buses, .. } = vm;
    let console = vm.console;
    let (end_sender, ends) = sync_channel(1);
    let end_event = Arc::new(EventFd::new(libc::EFD_NONBLOCK).map_err(os("no eventfd is left"))?);
    let end = EndSender { sender: end_sender, event: end_event.clone() };

    // The fault thread comes first: whatever fails from here on is said through it.
    let stat = Arc::new(OnceLock::new());
    let quiet = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(os("no eventfd is left"))?;
    let thread = FaultThread::new(Parts {
        uffd,
        reclaim: vm.reclaim,
        plan: Plan { period: Duration::from_secs(config.ageing_s.into()), proactive: config.proactive },
        tools,
        channel,
        desk,
        gate: gate.clone(),
        balloon,
        outside,
        quiet: clone_event(&quiet)?,
        button,
        placement: if config.follow_vcpu { Placement::with(stat.clone()) } else { Placement::free() },
        ram: ram.clone(),
        cpus: config.cpus,
        instance: config.instance,
    });
    let spawned = std::thread::Builder::new().name("channel".into()).stack_size(256 << 10).spawn(move || {
        if let Err(e) = thread.run() {
            complain(format_args!("the fault thread cannot run: {e}"));
        }
        // Without it the VM would hang at its next fault.
        std::process::abort();
    });
    if let Err(e) = spawned {
        complain(format_args!("no thread for faults: {e}"));
        super::exit(1);
    }
    let thread = vm.reclaim_thread;
    let (ready, is_ready) = sync_channel(1);
    let spawned = std::thread::Builder::new().name("reclaim".into()).stack_size(256 << 10).spawn(move || {
        if let Err(e) = thread.run(&ready) {
            complain(format_args!("the reclaim thread cannot run: {e}"));
        }
        std::process::abort();
    });
    spawned.map_err(os("no thread for reclaim"))?;
    // No instruction of the guest before all are shut in. A thread that cannot be has ended the process.
    let _ = is_ready.recv();

    let kernel = File::from(handed(fd::KERNEL));
    let initrd = config.initrd.then(|| File::from(handed(fd::INITRD)));
    let plan = BootPlan::new(&BootRequest {
        kernel: &kernel,
        initrd: initrd.as_ref().map(|i| i as &dyn Image),
        cmdline: &config.cmdline,
        ram: layout,
        cpus: config.cpus,
        virtio_devices: 1,
    })?;
    for mut vcpu in vcpus {
        vcpu.setup(&plan.entry())?;
        let first = vcpu.index() == 0;
        let its = spawn(vcpu, gate.clone(), buses.clone(), end.clone())?;
        if first && let Ok(file) = place::stat(its) {
            let _ = stat.set(file);
        }
    }
    plan.load(&GuestMem::new(ram, Some(client.clone()), true)).map_err(|e| match e {
        BootError::Memory { source, .. } if balloon::is_would_block(&source) => {
            StartError::TooSmall(plan.pages() + Cost::of(plan.blocks(), 0).total().0 + reserve_target(config.cpus))
        }
        e => e.into(),
    })?;
    let mut events = EventManager::<Arc<Mutex<dyn MutEventSubscriber>>>::new().map_err(event_loop)?;
    events.add_subscriber(console.clone());
    events.add_subscriber(vm.balloon_device);
    events.add_subscriber(Arc::new(Mutex::new(Bell(end_event))));
    events.add_subscriber(Arc::new(Mutex::new(Quiet(quiet, client.clone()))));
    let loaded = plan.pages();
    drop(plan);
    drop((kernel, initrd));
    // What loading has needed is not needed again.
    // SAFETY: malloc_trim takes a number and gives back what the allocator has free.
    unsafe { libc::malloc_trim(0) };
    // The last thread goes in before the controller can open the gate.
    sandbox::enter(Thread::Device)?;
    ask(&client, Request::Loaded(loaded));
    loop {
        events.run().map_err(event_loop)?;
        let Ok(end) = ends.try_recv() else { continue };
        gate.hold(PAUSED);
        console.lock().unwrap_or_else(PoisonError::into_inner).finish(LAST_WORDS);
        ask(
            &client,
            match end {
                End::Guest(reason) => Request::Ended(reason),
                End::Broken(sentence) => Request::Failed(sentence, None),
            },
        );
    }
}

fn event_loop(error: event_manager::Error) -> StartError {
    StartError::Os("the devices' event loop failed", io::Error::other(error))
}

/// Only wakes the loop, which then looks whether the guest has ended.
struct Bell(Arc<EventFd>);

impl MutEventSubscriber for Bell {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.read();
    }

    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&*self.0, EventSet::IN)).expect("a new descriptor can be watched");
    }
}

/// Lets the fault thread have guest memory for itself: no device is being served while this waits.
struct Quiet(EventFd, Arc<Mutex<Client>>);

impl MutEventSubscriber for Quiet {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.0.read();
        ask(&self.1, Request::Quiet);
    }

    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(&self.0, EventSet::IN)).expect("a new descriptor can be watched");
    }
}

/// The balloon's registers on the bus. What the guest writes there may be what the controller waits for (the balloon's
/// size, a driver that is ready), so the thread that reports is woken.
struct Window {
    registers: BalloonWindow<GuestMem>,
    bell: EventFd,
}

impl BusDevice for Window {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.registers.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        self.registers.write(offset, data);
        let _ = self.bell.write(1);
        Effect::None
    }
}

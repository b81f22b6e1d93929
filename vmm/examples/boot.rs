//! Boots a kernel on plain memory without limits, with the console on standard input and output. For development.
//!
//! usage: `boot KERNEL [INITRD] [--cmdline TEXT] [--cpus N] [--mib N]`; the status is the guest's, 0 after power-off.

use std::error::Error;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use ballast::devices::bus::Buses;
use ballast::devices::debug_port::{self, DebugPort};
use ballast::devices::power::{self, AcpiPower, I8042Reset};
use ballast::devices::serial::{self, Console, ConsolePump, SerialPort};
use ballast::machine::boot::{BootPlan, BootRequest, Image};
use ballast::machine::kvm::{NewVm, RamMapping};
use ballast::machine::{RamLayout, Step, Vcpu, layout};
use ballast::worker::protocol::ExitReason;
use event_manager::{EventManager, SubscriberOps};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Default)]
struct Arguments {
    files: Vec<String>,
    cmdline: String,
    cpus: u32,
    mib: u64,
}

fn arguments() -> Result<Arguments, Box<dyn Error>> {
    let mut parsed = Arguments { cpus: 1, mib: 256, ..Default::default() };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or(format!("{word} needs a value"));
        match word.as_str() {
            "--cmdline" => parsed.cmdline = value()?,
            "--cpus" => parsed.cpus = value()?.parse()?,
            "--mib" => parsed.mib = value()?.parse()?,
            _ => parsed.files.push(word),
        }
    }
    Ok(parsed)
}

/// Connects the console to standard input and output; the thread returned ends when all output is written.
fn console_on_stdio() -> std::io::Result<(UnixStream, thread::JoinHandle<()>)> {
    let (ours, user) = UnixStream::pair()?;
    let (mut from, mut to) = (user.try_clone()?, user);
    thread::spawn(move || std::io::copy(&mut std::io::stdin(), &mut to));
    let out = thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut std::io::stdout());
    });
    Ok((ours, out))
}

fn drive(mut vcpu: Vcpu, buses: &Buses, ends: &mpsc::Sender<Step>) {
    loop {
        match vcpu.run_once(buses) {
            Step::Continue | Step::Interrupted => {}
            Step::Wait(time) => thread::sleep(time),
            end => {
                let _ = ends.send(end);
                return;
            }
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = arguments()?;
    let files: Vec<File> = arguments.files.iter().map(File::open).collect::<Result<_, _>>()?;
    let kernel = files.first().ok_or("usage: boot KERNEL [INITRD] [--cmdline TEXT] [--cpus N] [--mib N]")?;
    let ram = RamLayout::new(arguments.mib << 20)?;
    let ranges: Vec<_> = ram.ranges().map(|r| (GuestAddress(r.gpa), r.bytes as usize)).collect();
    let memory: &'static GuestMemoryMmap = Box::leak(Box::new(GuestMemoryMmap::from_ranges(&ranges)?));
    let map = |r: layout::RamRange| -> Result<_, vm_memory::GuestMemoryError> {
        let hva = memory.get_host_address(GuestAddress(r.gpa))? as u64;
        Ok(RamMapping { gpa: r.gpa, hva, bytes: r.bytes })
    };
    let mappings = ram.ranges().map(map).collect::<Result<Vec<_>, _>>()?;
    let dev_kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    let vm = NewVm::new(dev_kvm.into(), arguments.cpus)?;
    // SAFETY: the mappings are leaked above and nothing but guest memory.
    let mut vm = unsafe { vm.set_ram(&ram, &mappings) }?;

    let irq = EventFd::new(EFD_NONBLOCK)?;
    vm.add_irqfd(&irq, layout::COM1_GSI)?;
    let console = Arc::new(Console::new()?);
    let port = Arc::new(Mutex::new(SerialPort::new(Arc::clone(&console), irq)));
    let mut buses = Buses::default();
    buses.pio.insert(layout::COM1.into(), serial::PORTS, port.clone())?;
    buses.pio.insert(layout::POWER_PORT.into(), power::PORTS, Arc::new(Mutex::new(AcpiPower)))?;
    buses.pio.insert(layout::I8042_COMMAND.into(), 1, Arc::new(Mutex::new(I8042Reset)))?;
    let debug = DebugPort::new(Arc::clone(&console));
    buses.pio.insert(layout::DEBUG_PORT.into(), debug_port::PORTS, Arc::new(Mutex::new(debug)))?;

    let request = BootRequest {
        kernel,
        initrd: files.get(1).map(|f| f as &dyn Image),
        cmdline: &arguments.cmdline,
        ram,
        cpus: arguments.cpus,
        virtio_devices: 1,
    };
    let start = Instant::now();
    let plan = BootPlan::new(&request)?;
    plan.load(memory)?;
    eprintln!("loaded {plan:?} in {:?}", start.elapsed());

    let (stream, out) = console_on_stdio()?;
    let pump = Arc::new(Mutex::new(ConsolePump::new(console, port, stream.try_clone()?.into())?));
    let mut events = EventManager::new()?;
    events.add_subscriber(Arc::clone(&pump));
    thread::spawn(move || while events.run_with_timeout(1000).is_ok() {});

    let buses: &'static Buses = Box::leak(Box::new(buses));
    let (sender, ends) = mpsc::channel();
    for mut vcpu in vm.create_vcpus()? {
        vcpu.setup(&plan.entry())?;
        let sender = sender.clone();
        thread::spawn(move || drive(vcpu, buses, &sender));
    }
    let end = ends.recv()?;
    if let Ok(mut pump) = pump.lock() {
        pump.finish(Duration::from_secs(5));
    }
    stream.shutdown(std::net::Shutdown::Both)?;
    let _ = out.join();
    let (p, m) = (buses.pio.unknown_accesses(), buses.mmio.unknown_accesses());
    eprintln!("ended after {:?}: {end:?}; accesses that no device answered: {p} ports, {m} MMIO", start.elapsed());
    std::process::exit(match end {
        Step::Exit(ExitReason::Status(status)) => status.into(),
        Step::Exit(ExitReason::PowerOff | ExitReason::Reset) => 0,
        _ => 1,
    });
}

//! The payload on a VM of our own making, without any account: what others are compared with.
//!
//! Its faults are the kernel's own, or those of a loop of read and copy. It runs in a process of its own, because KVM's
//! descriptors cannot be closed in a live one; there it may also be stopped at its first mark, and something be done to the
//! memory that it has touched ([`Task`]).

use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};

use ballast::devices::bus::{BusDevice, Buses, Effect};
use ballast::devices::debug_port;
use ballast::machine::boot::{BootPlan, BootRequest};
use ballast::machine::kvm::{NewVm, Vm, supported_cpuid};
use ballast::machine::vcpu::Vcpu;
use ballast::machine::{RamLayout, Step, layout};
use ballast::memory::around::{Around, MAX_GRANULE};
use ballast::memory::place::{Placement, same_cpu_pays, stat};
use ballast::memory::uffd::{Fill, Uffd};
use ballast::memory::{GuestMem, Ram};
use ballast::worker::gate::monotonic_ns;
use ballast_tests::payload;

use crate::vm::huge_pages;
use crate::{MIB, age, discard};

/// RAM of these VMs.
const SIZE: u64 = 2080 * MIB;

/// Who answers a fault, in the words of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// The kernel, with small pages.
    Small,
    /// The kernel, with huge pages where it can.
    Huge,
    /// A thread, with as many pages as are aligned like that.
    Granule(u64),
    /// A thread, with the same fault-around as the product.
    Around,
}

impl Handler {
    fn word(self) -> String {
        match self {
            Handler::Small => "small".to_owned(),
            Handler::Huge => "huge".to_owned(),
            Handler::Granule(pages) => pages.to_string(),
            Handler::Around => "around".to_owned(),
        }
    }

    fn parse(word: &str) -> Self {
        match word {
            "small" => Handler::Small,
            "huge" => Handler::Huge,
            "around" => Handler::Around,
            pages => Handler::Granule(pages.parse().expect("a number of pages")),
        }
    }
}

/// Where the thread that answers runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where the product would have it.
    Ours,
    /// On another CPU than the vCPU, as it happens when nobody thinks of it.
    Apart,
}

impl Place {
    fn word(self) -> &'static str {
        if self == Place::Ours { "ours" } else { "apart" }
    }
}

/// The time between the payload's two marks, in nanoseconds.
pub fn ns(handler: Handler, place: Place, cpus: u32, work: &str) -> u64 {
    child(&["bare", &handler.word(), place.word(), &cpus.to_string(), work])
}

/// What the payload answers to `work`, its only command.
pub fn told(handler: Handler, place: Place, work: &str) -> String {
    output(&["bare-answer", &handler.word(), place.word(), work])
}

/// What is done to memory at the payload's first mark; see [`task`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Raw discards: of a stretch in one call, of every other page by vectors of 512, of every other page one by one.
    Discard(discard::Raw),
    /// A look at what was used, raw or by our lists.
    Age(age::Way),
}

/// How long `task` takes on the memory that the payload has touched before its first mark, in nanoseconds.
pub fn task(task: Task, work: &str) -> u64 {
    let word = match task {
        Task::Discard(raw) => raw.word(),
        Task::Age(way) => way.word(),
    };
    child(&["bare-task", word, work])
}

/// Has the host find as much memory, in whole blocks, and gives it back: where the host is a guest itself, what it has not used
/// for long is slower to be had than by any fault.
pub fn warm(bytes: u64) {
    output(&["bare-warm", &bytes.to_string()]);
}

fn child(words: &[&str]) -> u64 {
    let text = output(words);
    text.parse().unwrap_or_else(|_| panic!("{words:?} said `{text}`"))
}

fn output(words: &[&str]) -> String {
    let me = std::env::current_exe().expect("a program has a path");
    let output = Command::new(me).args(words).stderr(Stdio::inherit()).output().expect("bench starts");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The child's part: never returns when the words are for it.
pub fn serve(words: &[String]) {
    match words {
        [what, handler, place, cpus, work] if what == "bare" => {
            let cpus = cpus.parse().expect("a number of vCPUs");
            let machine = Machine::new(Handler::parse(handler), place == "ours", cpus, work);
            let marks = machine.run(2);
            println!("{}", marks[1] - marks[0]);
        }
        [what, handler, place, work] if what == "bare-answer" => {
            let machine = Machine::new(Handler::parse(handler), place == "ours", 1, &format!("{work}; mark 1; park"));
            let console = machine.console.clone();
            machine.run(1);
            print!("{}", String::from_utf8_lossy(&console.lock().expect("no panic").0));
        }
        [what, task, work] if what == "bare-task" => {
            // Dirty tracking is another userfaultfd's: there can be only one.
            let handler = if age::Way::parse(task) == Some(age::Way::Raw) { Handler::Small } else { Handler::Around };
            // Discards meet a second vCPU that polls, as that of a guest does which waits for its balloon.
            let cpus = if discard::Raw::parse(task).is_some() { 2 } else { 1 };
            let machine = Machine::new(handler, true, cpus, work);
            let (ram, uffd) = (machine.ram.clone(), machine.uffd.clone());
            machine.run(1);
            let ns = match (discard::Raw::parse(task), age::Way::parse(task)) {
                (Some(raw), _) => raw.run(&ram),
                (_, Some(way)) => way.run(&ram, uffd.as_deref()),
                _ => panic!("no such task: {task}"),
            };
            println!("{ns}");
        }
        [what, bytes] if what == "bare-warm" => {
            let ram = Ram::map(&[(0, bytes.parse().expect("a number of bytes"))]).expect("memory");
            ask_for_huge(&ram);
            let slot = ram.slots()[0];
            // SAFETY: the range is a mapping of our own, of which nobody else knows.
            let done = unsafe { libc::madvise(slot.hva as *mut _, slot.bytes as usize, libc::MADV_POPULATE_WRITE) };
            assert_eq!(done, 0, "the host has no {bytes} bytes");
        }
        _ => return,
    }
    // KVM's descriptors are never closed in a live process.
    std::process::exit(0)
}

/// The debug port: keeps the times of marks.
struct Marks(Vec<u64>);

impl BusDevice for Marks {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match offset {
            debug_port::MARK => self.0.push(monotonic_ns()),
            debug_port::WAIT => {
                let ms = data.iter().take(4).rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
                return Effect::Wait(std::time::Duration::from_millis(ms));
            }
            _ => {}
        }
        Effect::None
    }
}

/// The serial port: keeps what is printed, and nobody types.
struct Console(Vec<u8>);

impl BusDevice for Console {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if offset == 0 {
            self.0.extend_from_slice(data);
        }
        Effect::None
    }
}

struct Machine {
    console: Arc<Mutex<Console>>,
    ram: Arc<Ram>,
    uffd: Option<Arc<Uffd>>,
    vcpus: Vec<Vcpu>,
    buses: Arc<Buses>,
    marks: Arc<Mutex<Marks>>,
    first: Arc<OnceLock<std::fs::File>>,
    apart: bool,
}

impl Machine {
    /// A VM that is about to do `work` between its marks 1 and 2.
    fn new(handler: Handler, ours: bool, cpus: u32, work: &str) -> Self {
        let layout = RamLayout::new(SIZE).expect("a size");
        let ranges: Vec<(u64, u64)> = layout.ranges().map(|r| (r.gpa, r.bytes)).collect();
        let ram = Arc::new(Ram::map(&ranges).expect("memory"));
        match handler {
            Handler::Huge => ask_for_huge(&ram),
            _ => ram.keep_to_touches().expect("memory of small pages"),
        }
        let vm = NewVm::new(open("/dev/kvm").into(), cpus).expect("KVM");
        // SAFETY: the mapping is guest RAM and stays until the process ends.
        let vm: Vm = unsafe { vm.set_ram(&layout, ram.slots()) }.expect("slots");
        let kernel = std::fs::File::open(payload()).expect("the payload");
        let cmdline = if work.contains("mark ") { work.to_owned() } else { format!("mark 1; {work}; mark 2; park") };
        let request =
            BootRequest { kernel: &kernel, initrd: None, cmdline: &cmdline, ram: layout, cpus, virtio_devices: 0 };
        let plan = BootPlan::new(&request).expect("a payload");
        plan.load(&GuestMem::new(ram.clone(), None, false)).expect("loading");
        let marks = Arc::new(Mutex::new(Marks(Vec::new())));
        let mut buses = Buses::default();
        buses.pio.insert(u64::from(layout::DEBUG_PORT), debug_port::PORTS, marks.clone()).expect("a free range");
        let console = Arc::new(Mutex::new(Console(Vec::new())));
        buses.pio.insert(u64::from(layout::COM1), 8, console.clone()).expect("a free range");
        let cpuid = supported_cpuid(open("/dev/kvm").as_fd()).expect("KVM");
        let mut vcpus = vm.create_vcpus(&cpuid).expect("vCPUs");
        vcpus.iter_mut().for_each(|vcpu| vcpu.setup(&plan.entry()).expect("registers"));
        let first = Arc::new(OnceLock::new());
        let uffd = match handler {
            Handler::Small | Handler::Huge => None,
            _ => Some(answer(&ram, handler, cpus, ours.then(|| first.clone()))),
        };
        Self { console, ram, uffd, vcpus, buses: Arc::new(buses), marks, first, apart: !ours }
    }

    /// Runs until that many marks were made: their times.
    fn run(mut self, marks: usize) -> Vec<u64> {
        let mut others = self.vcpus.split_off(1).into_iter();
        for vcpu in &mut others {
            let buses = self.buses.clone();
            std::thread::spawn(move || go(vcpu, &buses, || false));
        }
        if self.apart {
            pin(0);
        }
        // SAFETY: gettid has no conditions.
        let tid = unsafe { libc::gettid() };
        let _ = self.first.set(stat(tid).expect("/proc"));
        let made = || self.marks.lock().expect("no panic").0.len();
        go(self.vcpus.remove(0), &self.buses, || made() >= marks);
        self.marks.lock().expect("no panic").0.clone()
    }
}

/// Runs a vCPU until it is enough.
fn go(mut vcpu: Vcpu, buses: &Buses, enough: impl Fn() -> bool) {
    while !enough() {
        match vcpu.run_once(buses) {
            Step::Continue | Step::Interrupted => {}
            Step::Wait(time) => std::thread::sleep(time),
            other => panic!("the payload ended: {other:?}"),
        }
    }
}

fn open(path: &str) -> std::fs::File {
    std::fs::File::options().read(true).write(true).open(path).expect("the device")
}

/// Lets the kernel use huge pages, which this program and what it starts are otherwise forbidden.
fn ask_for_huge(ram: &Ram) {
    huge_pages(true);
    for slot in ram.slots() {
        // SAFETY: the range is guest RAM; the advice changes no content.
        let done = unsafe { libc::madvise(slot.hva as *mut _, slot.bytes as usize, libc::MADV_HUGEPAGE) };
        assert_eq!(done, 0, "this kernel has no huge pages");
    }
}

/// Puts the calling thread on a CPU, if there is one of that number.
fn pin(cpu: usize) {
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    // A host with one CPU has only one place.
    let _ = rustix::thread::sched_setaffinity(None, &set);
}

/// Registers all of RAM, and starts the thread that answers: where the vCPU of `follow` is, or on CPU 1.
fn answer(ram: &Arc<Ram>, handler: Handler, cpus: u32, follow: Option<Arc<OnceLock<std::fs::File>>>) -> Arc<Uffd> {
    let uffd = Arc::new(Uffd::from_device(&open("/dev/userfaultfd")).expect("userfaultfd"));
    for slot in ram.slots() {
        // SAFETY: guest RAM; the thread below answers until the process ends.
        unsafe { uffd.register(slot.hva, slot.bytes) }.expect("registering");
    }
    let (uffd_there, ram) = (uffd.clone(), ram.clone());
    let follows = cpus == 1 && same_cpu_pays();
    std::thread::spawn(move || {
        let mut placement = match follow {
            Some(stat) if follows => Placement::with(stat),
            Some(_) => Placement::free(),
            None => {
                pin(1);
                Placement::free()
            }
        };
        let uffd = uffd_there;
        let mut windows = Around::new(cpus);
        loop {
            let mut wait = [rustix::event::PollFd::new(&*uffd, rustix::event::PollFlags::IN)];
            let _ = rustix::event::poll(&mut wait, None);
            let n = uffd.read::<64>(|event| {
                let page = ram.index_of_hva(event.address).expect("RAM");
                let (first, pages) = match handler {
                    Handler::Granule(pages) => (page - page % pages, pages),
                    _ => {
                        let (window, stream) = windows.window(page, page..ram.contiguous(page).end, MAX_GRANULE);
                        windows.filled(stream, window);
                        (window.first, window.pages)
                    }
                };
                let mut done = 0;
                while done < pages {
                    match uffd.fill(ram.hva(first + done), pages - done) {
                        Fill::Filled(pages) => done += pages,
                        // Another vCPU's fault was answered with it: who waits for it is to look again.
                        Fill::AlreadyPresent => {
                            uffd.wake(ram.hva(first + done), 1);
                            done += 1;
                        }
                        Fill::RetryLater | Fill::NoMemory | Fill::Gone => {}
                    }
                }
            });
            placement.follow(n);
        }
    });
    uffd
}

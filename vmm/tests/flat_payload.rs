//! A flat payload on this host's KVM: loader, registers of CPL 3, serial port and debug ports, on one and two vCPUs.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use ballast::devices::bus::Buses;
use ballast::devices::console::{self, Console};
use ballast::devices::debug_port::{self, DebugPort};
use ballast::devices::power::PowerButton;
use ballast::devices::serial::{self, SerialPort};
use ballast::machine::boot::{BootPlan, BootRequest};
use ballast::machine::kvm::{NewVm, supported_cpuid};
use ballast::machine::{RamLayout, Step, Vcpu, layout};
use ballast::worker::protocol::{ExitReason, RamSlot};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

// What the command line begins with decides:
//   'u'  an invalid instruction: there is no handler, so that is a triple fault
//   'z'  spin for ever
//   else vCPU 0 prints the command line and "hi", checks that it can write and read near the end of RAM, waits until all
//        others have said that they are there, and ends with status 7. The others say so and wait for ever.
std::arch::global_asm!(
    ".pushsection .rodata.payload, \"a\"",
    ".globl ballast_test_payload, ballast_test_payload_end",
    "ballast_test_payload:",
    ".ascii \"BALLAST1\"",
    ".long 2f - ballast_test_payload",
    ".long 0x10000",
    "2:",
    "cmp byte ptr [rdi], 0x75",
    "jne 3f",
    "ud2",
    "3: cmp byte ptr [rdi], 0x7a",
    "je 3b",
    "mov r8, rcx", // number of vCPUs
    "mov r9, rsi", // bytes of RAM
    "test edx, edx",
    "jnz 5f",
    "mov rsi, rdi", // command line
    "mov edx, 0x3f8",
    "3: cmp byte ptr [rsi], 0",
    "je 4f",
    "outsb",
    "jmp 3b",
    "4: lea rsi, [rip + 7f]",
    "mov ecx, 4",
    "rep outsb",
    "mov byte ptr [r9 - 1], 7",
    "movzx eax, byte ptr [r9 - 1]",
    "push rax",
    "3: pause",
    "mov ecx, dword ptr [rip + 8f]",
    "inc ecx",
    "cmp ecx, r8d",
    "jne 3b",
    "pop rax",
    "mov edx, 0x504",
    "out dx, eax",
    "5: lock inc dword ptr [rip + 8f]",
    "6: mov edx, 0x508",
    "mov eax, 1",
    "out dx, eax",
    "jmp 6b",
    "7: .ascii \" hi\\n\"",
    "8: .long 0",
    "ballast_test_payload_end:",
    ".popsection",
);

unsafe extern "C" {
    static ballast_test_payload: u8;
    static ballast_test_payload_end: u8;
}

fn payload() -> Vec<u8> {
    let (start, end) = (&raw const ballast_test_payload, &raw const ballast_test_payload_end);
    // SAFETY: the two labels bound bytes that this file assembles, in one section, read-only.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }.to_vec()
}

fn dev_kvm() -> Option<OwnedFd> {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(file.into()),
        Err(e) => {
            println!("SKIP: /dev/kvm cannot be opened: {e}");
            None
        }
    }
}

/// A VM in this process with what a payload needs. Nothing of it is ever closed.
struct TestVm {
    vcpus: Vec<Vcpu>,
    buses: Buses,
    printed: File,
}

/// `None`, after a word about it, where there is no KVM.
fn vm(cpus: u32, mib: u64, cmdline: &str) -> Option<TestVm> {
    let kvm = dev_kvm()?;
    let ram = RamLayout::new(mib << 20).unwrap();
    let ranges: Vec<_> = ram.ranges().map(|r| (GuestAddress(r.gpa), r.bytes as usize)).collect();
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    // Guest memory outlives the VM, which is never closed.
    let memory: &'static GuestMemoryMmap = Box::leak(Box::new(memory));
    let map = |r: layout::RamRange| {
        let hva = memory.get_host_address(GuestAddress(r.gpa)).unwrap() as u64;
        RamSlot { gpa: r.gpa, hva, bytes: r.bytes, stage: 0 }
    };
    let mappings: Vec<_> = ram.ranges().map(map).collect();
    let cpuid = supported_cpuid(kvm.as_fd()).unwrap();
    let vm = NewVm::new(kvm, cpus).unwrap();
    // SAFETY: the mappings are leaked above and nothing but guest memory.
    let mut vm = unsafe { vm.set_ram(&ram, &mappings) }.unwrap();

    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.add_irqfd(&irq, layout::COM1_GSI).unwrap();
    let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.add_irqfd(&interrupt, layout::virtio_gsi(0)).unwrap();
    let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.add_ioeventfd(&doorbell, layout::virtio_window(0) + 0x50, Some(0)).unwrap();
    vm.add_ioeventfd(&doorbell, layout::virtio_window(1) + 0x50, None).unwrap();
    let printed = console::create().unwrap();
    let console = Arc::new(Console::new(&printed).unwrap());
    let port = Arc::new(Mutex::new(SerialPort::new(Arc::clone(&console), irq)));
    let mut buses = Buses::default();
    buses.pio.insert(u64::from(layout::COM1), serial::PORTS, port).unwrap();
    let button = Arc::new(PowerButton::new(EventFd::new(EFD_NONBLOCK).unwrap()));
    let debug = Arc::new(Mutex::new(DebugPort::new(console, button)));
    buses.pio.insert(u64::from(layout::DEBUG_PORT), debug_port::PORTS, debug).unwrap();

    let kernel = payload();
    let request = BootRequest { kernel: &kernel, initrd: None, cmdline, ram, cpus, virtio_devices: 0 };
    let plan = BootPlan::new(&request).unwrap();
    plan.load(memory).unwrap();
    let mut vcpus = vm.create_vcpus(&cpuid).unwrap();
    vcpus.iter_mut().for_each(|vcpu| vcpu.setup(&plan.entry()).unwrap());
    // A device's interrupt: payloads have no handler, so it must not reach them.
    interrupt.write(1).unwrap();
    Some(TestVm { vcpus, buses, printed })
}

fn drive(mut vcpu: Vcpu, buses: &Buses, over: &AtomicBool, ends: &mpsc::Sender<Step>) {
    while !over.load(Ordering::SeqCst) {
        match vcpu.run_once(buses) {
            Step::Continue | Step::Interrupted => {}
            // Nothing to wait for in a test: the port is there to get out of the guest.
            Step::Wait(time) => assert_eq!(time, Duration::from_millis(1)),
            end @ (Step::Exit(_) | Step::Failed(_)) => {
                over.store(true, Ordering::SeqCst);
                let _ = ends.send(end);
            }
        }
    }
}

fn run(cpus: u32, mib: u64) {
    let Some(vm) = vm(cpus, mib, "say") else {
        return;
    };
    let (over, (sender, ends)) = (AtomicBool::new(false), mpsc::channel());
    let buses = &vm.buses;
    thread::scope(|scope| {
        for vcpu in vm.vcpus {
            let (over, sender) = (&over, sender.clone());
            scope.spawn(move || drive(vcpu, buses, over, &sender));
        }
    });
    assert_eq!(ends.recv().unwrap(), Step::Exit(ExitReason::Status(7)));
    assert_eq!(vm.buses.pio.unknown_accesses(), 0);

    assert_eq!(console::read(&vm.printed).unwrap(), b"say hi\n");
}

#[test]
fn one_vcpu_prints_and_ends_with_its_status() {
    run(1, 4);
}

#[test]
fn two_vcpus_meet() {
    run(2, 4);
}

#[test]
fn ram_above_the_hole_is_there() {
    run(1, 5 << 10);
}

#[test]
fn an_exception_is_a_triple_fault() {
    let Some(mut vm) = vm(1, 4, "u") else { return };
    assert_eq!(vm.vcpus[0].run_once(&vm.buses), Step::Exit(ExitReason::TripleFault));
}

static IMMEDIATE_EXIT: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn on_kick(_: libc::c_int) {
    // SAFETY: set before the first signal to a byte that lives as long as the process and is only accessed atomically.
    unsafe { AtomicU8::from_ptr(IMMEDIATE_EXIT.load(Ordering::SeqCst)) }.store(1, Ordering::SeqCst);
}

#[test]
fn a_kick_brings_a_spinning_vcpu_out_and_it_goes_on() {
    let Some(mut vm) = vm(1, 4, "z") else { return };
    let mut vcpu = vm.vcpus.remove(0);
    IMMEDIATE_EXIT.store(vcpu.immediate_exit_ptr(), Ordering::SeqCst);
    // SAFETY: the structure is plain data and the handler is async-signal-safe: it does two atomic accesses.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_kick as *const () as usize;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut()), 0);
    }
    // A kick before the entry is not lost, whenever it comes.
    // SAFETY: raising a signal that has a handler.
    assert_eq!(unsafe { libc::raise(libc::SIGUSR1) }, 0);
    assert_eq!(vcpu.run_once(&vm.buses), Step::Interrupted);
    assert_eq!(vcpu.run_once(&vm.buses), Step::Interrupted, "until it is cleared");
    // SAFETY: no conditions.
    let me = unsafe { libc::pthread_self() };
    for _ in 0..20 {
        vcpu.clear_kick();
        let entered = Barrier::new(2);
        thread::scope(|scope| {
            scope.spawn(|| {
                entered.wait();
                // SAFETY: that thread waits for this one to end.
                assert_eq!(unsafe { libc::pthread_kill(me, libc::SIGUSR1) }, 0);
            });
            entered.wait();
            assert_eq!(vcpu.run_once(&vm.buses), Step::Interrupted);
        });
        vcpu.kvmclock_ctrl();
    }
}

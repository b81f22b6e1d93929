//! A flat payload on this host's KVM: loader, registers of CPL 3, serial port and debug ports, on one and two vCPUs.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use ballast::devices::bus::Buses;
use ballast::devices::debug_port::{self, DebugPort};
use ballast::devices::serial::{self, Console, ConsolePump, SerialPort};
use ballast::machine::boot::{BootPlan, BootRequest};
use ballast::machine::kvm::{NewVm, RamMapping};
use ballast::machine::{RamLayout, Step, Vcpu, layout};
use ballast::worker::protocol::ExitReason;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

// vCPU 0 prints what the command line says and "hi", waits until all the others have said that they are there, checks
// that it can write and read at the last byte of RAM, and ends with status 7. The others say so and wait for ever.
std::arch::global_asm!(
    ".pushsection .rodata.payload, \"a\"",
    ".globl ballast_test_payload, ballast_test_payload_end",
    "ballast_test_payload:",
    ".ascii \"BALLAST1\"",
    ".long 2f - ballast_test_payload",
    ".long 0x10000",
    "2:",
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
    let (start, end) = (
        &raw const ballast_test_payload,
        &raw const ballast_test_payload_end,
    );
    // SAFETY: the two labels bound bytes that this file assembles, in one section, read-only.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }.to_vec()
}

fn dev_kvm() -> Option<OwnedFd> {
    match std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
    {
        Ok(file) => Some(file.into()),
        Err(e) => {
            println!("SKIP: /dev/kvm cannot be opened: {e}");
            None
        }
    }
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

fn boot(cpus: u32) {
    let Some(kvm) = dev_kvm() else { return };
    let ram = RamLayout::new(4 << 20).unwrap();
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), ram.size() as usize)]).unwrap();
    // Guest memory outlives the VM, which is never closed.
    let memory: &'static GuestMemoryMmap = Box::leak(Box::new(memory));
    let hva = memory.get_host_address(GuestAddress(0)).unwrap() as u64;
    let vm = NewVm::new(kvm, cpus).unwrap();
    // SAFETY: the mapping is leaked above and nothing but guest memory.
    let mut vm = unsafe {
        vm.set_ram(
            &ram,
            &[RamMapping {
                gpa: 0,
                hva,
                bytes: ram.size(),
            }],
        )
    }
    .unwrap();

    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    vm.add_irqfd(&irq, layout::COM1_GSI).unwrap();
    let console = Arc::new(Console::new().unwrap());
    let port = Arc::new(Mutex::new(SerialPort::new(Arc::clone(&console), irq)));
    let mut buses = Buses::default();
    buses
        .pio
        .insert(u64::from(layout::COM1), serial::PORTS, port.clone())
        .unwrap();
    let debug = Arc::new(Mutex::new(DebugPort::new(Arc::clone(&console))));
    buses
        .pio
        .insert(u64::from(layout::DEBUG_PORT), debug_port::PORTS, debug)
        .unwrap();

    let kernel = payload();
    let request = BootRequest {
        kernel: &kernel,
        initrd: None,
        cmdline: "say",
        ram,
        cpus,
        virtio_devices: 0,
    };
    let plan = BootPlan::new(&request).unwrap();
    plan.load(memory).unwrap();

    let (over, (sender, ends)) = (AtomicBool::new(false), mpsc::channel());
    thread::scope(|scope| {
        for mut vcpu in vm.create_vcpus().unwrap() {
            vcpu.setup(&plan.entry()).unwrap();
            let (buses, over, sender) = (&buses, &over, sender.clone());
            scope.spawn(move || drive(vcpu, buses, over, &sender));
        }
    });
    assert_eq!(ends.recv().unwrap(), Step::Exit(ExitReason::Status(7)));
    assert_eq!(buses.pio.unknown_accesses(), 0);

    let (ours, mut user) = UnixStream::pair().unwrap();
    let mut pump = ConsolePump::new(console, port, ours.into()).unwrap();
    pump.finish(Duration::from_secs(10));
    drop(pump);
    assert_eq!(std::io::read_to_string(&mut user).unwrap(), "say hi\n");
}

#[test]
fn one_vcpu_prints_and_ends_with_its_status() {
    boot(1);
}

#[test]
fn two_vcpus_meet() {
    boot(2);
}

//! One vCPU: its first registers, and one step of its run loop.
//!
//! The loop itself, with pausing and holding, belongs to the worker. The contract between the two:
//!
//! ```text
//!   loop {
//!       vcpu.clear_kick();                      // 1. from here on a kick makes run_once return at once
//!       if told to hold or stop { …; continue }  // 2. so nothing that was said before a kick is missed
//!       match vcpu.run_once(&buses) { … }        // 3.
//!   }
//! ```
//!
//! A kick is a signal to the vCPU's thread, after the flag that step 2 reads has been set; its handler writes 1 to
//! [`Vcpu::immediate_exit_ptr`]. All ioctls of a vCPU are made by its own thread once it runs.

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_EXIT_IO_IN, KVM_MP_STATE_RUNNABLE, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_dtable, kvm_enable_cap, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;

use super::boot::Entry;
use super::layout;
use crate::devices::bus::{Buses, Effect};
use crate::worker::protocol::ExitReason;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
/// PE MP ET NE WP AM PG.
const CR0_PAYLOAD: u64 = 0x8005_0033;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// SCE LME LMA NXE.
const EFER_PAYLOAD: u64 = 0xd01;
/// Bit 1 is always set.
const RFLAGS: u64 = 2;
/// Interrupts on and ports allowed at CPL 3.
const RFLAGS_PAYLOAD: u64 = RFLAGS | 1 << 9 | 3 << 12;

/// Local APIC registers and delivery modes.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const APIC_LVT_MASKED: u32 = 1 << 16;
const APIC_MODE_NMI: u32 = 4;
const APIC_MODE_EXTINT: u32 = 7;

/// What Linux expects a firmware to have left in the model-specific registers.
const BOOT_MSRS: [(u32, u64); 11] = [
    (0x174, 0),           // SYSENTER_CS
    (0x175, 0),           // SYSENTER_ESP
    (0x176, 0),           // SYSENTER_EIP
    (0xc000_0081, 0),     // STAR
    (0xc000_0083, 0),     // CSTAR
    (0xc000_0102, 0),     // KERNEL_GS_BASE
    (0xc000_0084, 0),     // SYSCALL_MASK
    (0xc000_0082, 0),     // LSTAR
    (0x10, 0),            // TSC
    (0x1a0, 1),           // MISC_ENABLE: fast strings
    (0x2ff, 1 << 11 | 6), // MTRR default type: enabled, write-back
];

/// A vCPU could not be set up.
#[derive(Debug, Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error("KVM refused {0}")]
    Ioctl(&'static str, #[source] kvm_ioctls::Error),
}

/// What one entry into the guest came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Enter again.
    Continue,
    /// A signal or [`Vcpu::immediate_exit_ptr`] brought it out; look why.
    Interrupted,
    /// The VM has ended.
    Exit(ExitReason),
    /// Enter again, but not before this time has passed: the guest waits for its own port access.
    Wait(Duration),
    /// The VM is broken: one sentence for the user, with the exit and the instruction pointer.
    Failed(String),
}

/// One vCPU. It is never closed, see [`super::kvm`].
#[derive(Debug)]
pub struct Vcpu {
    fd: ManuallyDrop<VcpuFd>,
    index: u32,
    cpus: u32,
}

impl Vcpu {
    /// Wraps a fresh vCPU and gives it its CPUID.
    pub(super) fn new(fd: VcpuFd, index: u32, cpus: u32, cpuid: &CpuId, enforce_pv: bool) -> Result<Self, VcpuError> {
        let fd = ManuallyDrop::new(fd);
        if enforce_pv {
            // Before CPUID: paravirtual registers that CPUID does not offer (asynchronous page faults) now fault.
            let cap =
                kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, args: [1, 0, 0, 0], ..Default::default() };
            fd.enable_cap(&cap).map_err(|e| VcpuError::Ioctl("to enforce its paravirtual CPUID", e))?;
        }
        fd.set_cpuid2(cpuid).map_err(|e| VcpuError::Ioctl("the CPUID", e))?;
        Ok(Self { fd, index, cpus })
    }

    /// Number of this vCPU, from 0; also its APIC id.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Sets the registers for the first entry. Linux starts on vCPU 0 and wakes the others itself; a flat payload
    /// starts on all of them.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn setup(&mut self, entry: &Entry) -> Result<(), VcpuError> {
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
        self.fd.set_fpu(&fpu).map_err(|e| VcpuError::Ioctl("the FPU state", e))?;
        if let Entry::Flat { .. } = entry {
            self.mask_external_interrupts()?;
            self.set_start(entry)?;
            let runnable = kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE };
            return self.fd.set_mp_state(runnable).map_err(|e| VcpuError::Ioctl("to start a vCPU", e));
        }
        self.set_msrs()?;
        self.set_lapic()?;
        if self.index == 0 { self.set_start(entry) } else { Ok(()) }
    }

    /// The byte that makes the next `KVM_RUN` return at once when it is not 0, for a signal handler. Valid for the life
    /// of the process, since vCPUs are never closed; access it as an atomic.
    pub fn immediate_exit_ptr(&mut self) -> *mut u8 {
        &raw mut self.fd.get_kvm_run().immediate_exit
    }

    /// Forgets a kick. To be called before looking for the reason of one, see the module's head.
    pub fn clear_kick(&mut self) {
        // SAFETY: the pointer is valid and aligned for a byte as long as the vCPU is open; user space only ever writes
        // this byte, here and in the signal handler of the same thread, both atomically.
        unsafe { AtomicU8::from_ptr(self.immediate_exit_ptr()) }.store(0, Ordering::SeqCst);
    }

    /// Tells the guest that it was stopped, so that it does not report a soft lockup. To be called after a hold or a
    /// pause; nothing happens when the guest has no paravirtual clock.
    pub fn kvmclock_ctrl(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Enters the guest until its next exit and serves that.
    pub fn run_once(&mut self, buses: &Buses) -> Step {
        let why = match self.fd.run() {
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => return self.port_access(buses),
            Ok(VcpuExit::MmioRead(address, data)) => {
                buses.mmio.read(address, data);
                return Step::Continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                return buses.mmio.write(address, data).into();
            }
            Ok(VcpuExit::Intr) => return Step::Interrupted,
            // HLT does not get here while the local APIC is KVM's; an AP that KVM has just woken comes as EAGAIN.
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_) | VcpuExit::SetTpr) => {
                return Step::Continue;
            }
            Ok(VcpuExit::Shutdown) => return Step::Exit(ExitReason::TripleFault),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                return Step::Exit(ExitReason::PowerOff);
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                return Step::Exit(ExitReason::Reset);
            }
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                format!("the host has no memory for guest address {gpa:#x}")
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                format!("entry failed with reason {reason:#x} on host CPU {cpu}")
            }
            Ok(VcpuExit::InternalError) => String::new(),
            Ok(other) => format!("unexpected exit {other:?}"),
            Err(e) if e.errno() == libc::EINTR => return Step::Interrupted,
            Err(e) if e.errno() == libc::EAGAIN => return Step::Continue,
            Err(e) => format!("KVM_RUN failed: {e}"),
        };
        self.failed(why)
    }

    /// Serves a port exit: `count` accesses of `size` bytes each to one port (`rep outsb` is one exit).
    fn port_access(&mut self, buses: &Buses) -> Step {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason was KVM_EXIT_IO, so this is the union's field that KVM has filled.
        let io = unsafe { run.__bindgen_anon_1.io };
        let bytes = usize::from(io.size) * io.count as usize;
        let start = &raw mut *run as *mut u8;
        // SAFETY: KVM puts `size * count` bytes at `data_offset` from the start of its mapping of this vCPU, which is
        // longer than `kvm_run` and stays mapped. Nobody else accesses it while this thread is not in KVM_RUN, and
        // `run` is not used any more.
        let data = unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), bytes) };
        let mut step = Step::Continue;
        for unit in data.chunks_exact_mut(usize::from(io.size).max(1)) {
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                buses.pio.read(u64::from(io.port), unit);
            } else {
                let next = buses.pio.write(u64::from(io.port), unit).into();
                if step == Step::Continue {
                    step = next;
                }
            }
        }
        step
    }

    /// The sentence for a vCPU that cannot go on.
    fn failed(&mut self, why: String) -> Step {
        let rip = self.fd.get_regs().map_or("unknown".to_owned(), |r| format!("{:#x}", r.rip));
        let why = if why.is_empty() {
            let run = self.fd.get_kvm_run();
            // SAFETY: only called with an empty reason after KVM_EXIT_INTERNAL_ERROR, which fills this field.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            let what = match internal.suberror {
                1 => "KVM cannot emulate an instruction",
                2 => "simultaneous exceptions",
                3 => "an exception during event delivery",
                _ => "an internal error of KVM",
            };
            format!("{what} (suberror {})", internal.suberror)
        } else {
            why
        };
        Step::Failed(format!("vCPU {} cannot go on: {why}; its instruction pointer is {rip}", self.index))
    }

    fn set_msrs(&self) -> Result<(), VcpuError> {
        // One by one: a host's KVM may lack one of them, and then it would ignore all behind it.
        for (index, data) in BOOT_MSRS {
            let entry = kvm_msr_entry { index, data, ..Default::default() };
            let msrs = Msrs::from_entries(&[entry]).expect("one entry is within the limit");
            let set = self.fd.set_msrs(&msrs).map_err(|e| VcpuError::Ioctl("model-specific registers", e))?;
            if set == 0 {
                tracing::debug!("this host's KVM has no model-specific register {index:#x}");
            }
        }
        Ok(())
    }

    /// LINT0 takes interrupts of an external controller, LINT1 NMIs: the state that a PC's firmware leaves.
    fn set_lapic(&self) -> Result<(), VcpuError> {
        let mut lapic = self.fd.get_lapic().map_err(|e| VcpuError::Ioctl("to show a local APIC", e))?;
        set_delivery_mode(&mut lapic, APIC_LVT0, APIC_MODE_EXTINT);
        set_delivery_mode(&mut lapic, APIC_LVT1, APIC_MODE_NMI);
        self.fd.set_lapic(&lapic).map_err(|e| VcpuError::Ioctl("a local APIC's state", e))
    }

    /// Closes LINT0, through which the old interrupt controller, open at reset, would deliver what devices raise: a
    /// payload has no handler, and an interrupt would be a triple fault.
    fn mask_external_interrupts(&self) -> Result<(), VcpuError> {
        let mut lapic = self.fd.get_lapic().map_err(|e| VcpuError::Ioctl("to show a local APIC", e))?;
        change_lvt(&mut lapic, APIC_LVT0, |old| old | APIC_LVT_MASKED);
        self.fd.set_lapic(&lapic).map_err(|e| VcpuError::Ioctl("a local APIC's state", e))
    }

    fn set_start(&self, entry: &Entry) -> Result<(), VcpuError> {
        let mut sregs = self.fd.get_sregs().map_err(|e| VcpuError::Ioctl("to show a vCPU's registers", e))?;
        let regs = match *entry {
            Entry::Pvh { rip, start_info } => {
                protected_mode(&mut sregs);
                kvm_regs { rflags: RFLAGS, rip, rbx: start_info, ..Default::default() }
            }
            Entry::Linux64 { rip, boot_params } => {
                long_mode(&mut sregs);
                kvm_regs { rflags: RFLAGS, rip, rsi: boot_params, ..Default::default() }
            }
            Entry::Flat { rip, ram_bytes } => {
                user_mode(&mut sregs);
                let stack = layout::stack_bytes(self.cpus);
                kvm_regs {
                    rflags: RFLAGS_PAYLOAD,
                    rip,
                    rdi: layout::CMDLINE,
                    rsi: ram_bytes,
                    rdx: u64::from(self.index),
                    rcx: u64::from(self.cpus),
                    rsp: layout::STACKS + stack * (u64::from(self.index) + 1),
                    ..Default::default()
                }
            }
        };
        self.fd.set_sregs(&sregs).map_err(|e| VcpuError::Ioctl("a vCPU's system registers", e))?;
        self.fd.set_regs(&regs).map_err(|e| VcpuError::Ioctl("a vCPU's registers", e))
    }
}

impl From<Effect> for Step {
    fn from(effect: Effect) -> Self {
        match effect {
            Effect::None => Step::Continue,
            Effect::Exit(reason) => Step::Exit(reason),
            Effect::Wait(time) => Step::Wait(time),
        }
    }
}

fn change_lvt(lapic: &mut kvm_lapic_state, register: usize, change: impl FnOnce(u32) -> u32) {
    let field = &mut lapic.regs[register..register + 4];
    let old = u32::from_le_bytes([field[0] as u8, field[1] as u8, field[2] as u8, field[3] as u8]);
    for (byte, value) in field.iter_mut().zip(change(old).to_le_bytes()) {
        *byte = value as _;
    }
}

fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    change_lvt(lapic, register, |old| old & !0x700 | mode << 8);
}

/// A segment over all of memory.
fn flat_segment(selector: u16, type_: u8, dpl: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// The task register that every entry needs and none uses.
fn task_segment() -> kvm_segment {
    kvm_segment { limit: 0x67, type_: 0xb, present: 1, ..Default::default() }
}

fn set_segments(sregs: &mut kvm_sregs, cs: kvm_segment, data: kvm_segment) {
    sregs.cs = cs;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task_segment();
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
}

/// PVH: 32-bit, flat segments, paging off. The descriptor table is undefined by the protocol, so there is none.
fn protected_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs, flat_segment(0x8, 0xb, 0), flat_segment(0x10, 0x3, 0));
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
}

/// Linux's 64-bit protocol: selectors 0x10 and 0x18 in a table that exists, paging on over an identity map.
fn long_mode(sregs: &mut kvm_sregs) {
    let mut cs = flat_segment(0x10, 0xb, 0);
    (cs.l, cs.db) = (1, 0);
    set_segments(sregs, cs, flat_segment(0x18, 0x3, 0));
    sregs.gdt = kvm_dtable { base: layout::GDT, limit: super::boot::GDT_BYTES - 1, ..Default::default() };
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

/// A flat payload: 64-bit user mode without a kernel under it. An exception finds no handler and is a triple fault.
///
/// Ports are allowed twice: by the I/O privilege level, which hardware looks at, and by the permission bitmap of a task
/// state segment at address 0, which is all that a KVM without hardware support has left to look at. That page is zero,
/// so the bitmap starts at 0 and permits every port.
fn user_mode(sregs: &mut kvm_sregs) {
    let mut cs = flat_segment(0x33, 0xb, 3);
    (cs.l, cs.db) = (1, 0);
    set_segments(sregs, cs, flat_segment(0x2b, 0x3, 3));
    sregs.tr.limit = 0xffff;
    sregs.cr0 = CR0_PAYLOAD;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE | CR4_OSFXSR;
    sregs.efer = EFER_PAYLOAD;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delivery_modes_change_only_their_bits() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[APIC_LVT0 + 2] = 1;
        set_delivery_mode(&mut lapic, APIC_LVT0, APIC_MODE_EXTINT);
        assert_eq!(lapic.regs[APIC_LVT0..APIC_LVT0 + 4], [0, 7, 1, 0]);
    }

    #[test]
    fn a_vcpu_may_move_to_its_thread() {
        fn sendable<T: Send>() {}
        sendable::<Vcpu>();
    }
}

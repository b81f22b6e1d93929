//! KVM's side of a VM, built in the one order that is safe.
//!
//! [`NewVm`] has a VM without memory. [`NewVm::set_ram`] gives it all its memory slots and only then the interrupt
//! controllers; it returns a [`Vm`], to which interrupt and doorbell descriptors can be added until
//! [`Vm::create_vcpus`] takes it. After that nothing can be added, which is what the kernel wants: memory slots and
//! event descriptors that are added later wait for vCPUs that may themselves be waiting for memory.
//!
//! **KVM's descriptors are never closed.** Closing them in a live process waits for page faults that KVM has handed to
//! kernel workers, and those wait for the very process that is closing: it would hang and then not even SIGKILL would
//! end it. So the handles here are [`ManuallyDrop`]; a process that has a VM ends with `exit_group` or by a signal.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use super::cpuid::{self, CpuidError};
use super::layout::{KVM_IDENTITY_MAP, KVM_TSS, MAX_CPUS, PAGE_SIZE, RamLayout};
use super::vcpu::{Vcpu, VcpuError};
use crate::worker::protocol::RamSlot;

/// What KVM on this host must be able to do, with the reason that a user is told.
const NEEDED: [(Cap, &str); 10] = [
    (Cap::UserMemory, "memory slots"),
    (Cap::SetTssAddr, "placing its own pages"),
    (Cap::SetIdentityMapAddr, "placing its own pages"),
    (Cap::SyncMmu, "following changes of the host's page tables"),
    (Cap::Irqchip, "interrupt controllers in the kernel"),
    (Cap::Irqfd, "interrupts by eventfd"),
    (Cap::Ioeventfd, "doorbells by eventfd"),
    (Cap::ImmediateExit, "stopping a vCPU without a race"),
    (Cap::ExtCpuid, "setting CPUID"),
    (Cap::MpState, "starting several vCPUs"),
];

/// The VM could not be built.
#[derive(Debug, Error)]
pub enum VmError {
    /// The descriptor is not KVM, or a KVM from another world.
    #[error("/dev/kvm speaks API version {0}, not {KVM_API_VERSION}; is that descriptor KVM?")]
    ApiVersion(i32),
    /// KVM lacks something.
    #[error("KVM on this host lacks {0} (needed for {1}); a kernel 6.12 or newer has it")]
    Capability(&'static str, &'static str),
    /// Too many or no vCPUs.
    #[error("{wanted} vCPUs asked for; this host's KVM allows 1 to {allowed}")]
    Cpus {
        /// What was asked for.
        wanted: u32,
        /// The least of our limit and KVM's.
        allowed: u32,
    },
    /// The mappings are not those of the layout.
    #[error("the mappings of guest RAM do not match its layout")]
    Mappings,
    /// An ioctl failed.
    #[error("KVM refused {0}")]
    Ioctl(&'static str, #[source] kvm_ioctls::Error),
    /// CPUID could not be made.
    #[error("the CPUID of the vCPUs could not be made")]
    Cpuid(#[from] CpuidError),
    /// A vCPU could not be made.
    #[error("vCPU {0} could not be made")]
    Vcpu(u32, #[source] VcpuError),
}

/// A VM that has no memory yet.
#[derive(Debug)]
pub struct NewVm {
    kvm: ManuallyDrop<Kvm>,
    fd: ManuallyDrop<VmFd>,
    cpus: u32,
}

/// A VM with memory and interrupt controllers, not yet running: the time to wire devices.
#[derive(Debug)]
pub struct Vm {
    kvm: ManuallyDrop<Kvm>,
    fd: ManuallyDrop<VmFd>,
    cpus: u32,
}

impl NewVm {
    /// Checks KVM and creates a VM for `cpus` vCPUs from an open `/dev/kvm`. The VM belongs to this process.
    ///
    /// # Errors
    /// When KVM is not what is needed, or refuses.
    pub fn new(dev_kvm: OwnedFd, cpus: u32) -> Result<Self, VmError> {
        // SAFETY: `from_raw_fd` wants a descriptor that nobody else closes; `into_raw_fd` just gave it up. That it is
        // KVM is checked next by its answer; a wrong ioctl on another device fails and harms nobody.
        let kvm = ManuallyDrop::new(unsafe { Kvm::from_raw_fd(dev_kvm.into_raw_fd()) });
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(VmError::ApiVersion(version));
        }
        for (cap, what) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(VmError::Capability(cap_name(cap), what));
            }
        }
        let allowed = u32::try_from(kvm.get_max_vcpus()).unwrap_or(MAX_CPUS).min(MAX_CPUS);
        if cpus == 0 || cpus > allowed {
            return Err(VmError::Cpus { wanted: cpus, allowed });
        }
        let fd = ManuallyDrop::new(kvm.create_vm().map_err(|e| VmError::Ioctl("a new VM", e))?);
        // Both must precede the vCPUs and must lie outside RAM; only Intel without unrestricted guest uses them.
        fd.set_identity_map_address(KVM_IDENTITY_MAP).map_err(|e| VmError::Ioctl("the identity map address", e))?;
        fd.set_tss_address(KVM_TSS as usize).map_err(|e| VmError::Ioctl("the task state address", e))?;
        Ok(Self { kvm, fd, cpus })
    }

    /// Gives the VM all of its memory and then the interrupt controllers (local APICs, I/O APIC).
    ///
    /// # Safety
    /// Each mapping must be memory that this process has mapped, private to guest RAM, for as long as the process
    /// lives: KVM and the guest read and write it behind the compiler's back.
    ///
    /// # Errors
    /// When the mappings are not the ranges of `layout` in order, or KVM refuses one.
    pub unsafe fn set_ram(self, layout: &RamLayout, mappings: &[RamSlot]) -> Result<Vm, VmError> {
        let matches = layout.ranges().count() == mappings.len()
            && layout.ranges().zip(mappings).all(|(range, map)| {
                range.gpa == map.gpa && range.bytes == map.bytes && map.hva.is_multiple_of(PAGE_SIZE)
            });
        if !matches {
            return Err(VmError::Mappings);
        }
        for (slot, map) in (0u32..).zip(mappings) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: map.gpa,
                memory_size: map.bytes,
                userspace_addr: map.hva,
            };
            // SAFETY: the caller vouches for the mapping; ranges do not overlap, since a `RamLayout`'s never do.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(|e| VmError::Ioctl("a memory slot", e))?;
        }
        self.fd.create_irq_chip().map_err(|e| VmError::Ioctl("interrupt controllers", e))?;
        Ok(Vm { kvm: self.kvm, fd: self.fd, cpus: self.cpus })
    }
}

impl Vm {
    /// Makes writes to `event` pulse interrupt `gsi` (edge-triggered: that is how the ACPI tables describe it).
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn add_irqfd(&mut self, event: &EventFd, gsi: u32) -> Result<(), VmError> {
        self.fd.register_irqfd(event, gsi).map_err(|e| VmError::Ioctl("an interrupt descriptor", e))
    }

    /// Makes guest writes of `value` (any width) to `address` signal `event` without leaving the kernel for long.
    /// `None` matches every value.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn add_ioeventfd(&mut self, event: &EventFd, address: u64, value: Option<u32>) -> Result<(), VmError> {
        let at = IoEventAddress::Mmio(address);
        match value {
            Some(value) => self.fd.register_ioevent(event, &at, value),
            None => self.fd.register_ioevent(event, &at, NoDatamatch),
        }
        .map_err(|e| VmError::Ioctl("a doorbell descriptor", e))
    }

    /// Makes all vCPUs, with their CPUID, and ends the wiring. Each is to be moved to its own thread. `supported` is from
    /// [`supported_cpuid`] on this host.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn create_vcpus(self, supported: &CpuId) -> Result<Vec<Vcpu>, VmError> {
        let caps = cpuid::HostCaps { tsc_deadline: self.kvm.check_extension(Cap::TscDeadlineTimer) };
        let enforce = self.kvm.check_extension_raw(u64::from(KVM_CAP_ENFORCE_PV_FEATURE_CPUID)) > 0;
        (0..self.cpus)
            .map(|index| {
                let fd = self.fd.create_vcpu(u64::from(index)).map_err(|e| VmError::Ioctl("a vCPU", e))?;
                let cpuid = cpuid::for_vcpu(supported, caps, index, self.cpus)?;
                Vcpu::new(fd, index, self.cpus, &cpuid, enforce).map_err(|e| VmError::Vcpu(index, e))
            })
            .collect()
    }
}

/// What KVM supports of the CPU's features on this host, for [`Vm::create_vcpus`].
///
/// # Errors
/// When it does not say.
pub fn supported_cpuid(dev_kvm: BorrowedFd<'_>) -> Result<CpuId, VmError> {
    // SAFETY: the descriptor is open during the call, and this owner of it never closes it.
    let kvm = ManuallyDrop::new(unsafe { Kvm::from_raw_fd(dev_kvm.as_raw_fd()) });
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(|e| VmError::Ioctl("to list its CPUID", e))
}

/// The kernel's name of a capability that we ask for.
fn cap_name(cap: Cap) -> &'static str {
    match cap {
        Cap::UserMemory => "KVM_CAP_USER_MEMORY",
        Cap::SetTssAddr => "KVM_CAP_SET_TSS_ADDR",
        Cap::SetIdentityMapAddr => "KVM_CAP_SET_IDENTITY_MAP_ADDR",
        Cap::SyncMmu => "KVM_CAP_SYNC_MMU",
        Cap::Irqchip => "KVM_CAP_IRQCHIP",
        Cap::Irqfd => "KVM_CAP_IRQFD",
        Cap::Ioeventfd => "KVM_CAP_IOEVENTFD",
        Cap::ImmediateExit => "KVM_CAP_IMMEDIATE_EXIT",
        Cap::ExtCpuid => "KVM_CAP_EXT_CPUID",
        Cap::MpState => "KVM_CAP_MP_STATE",
        _ => "a capability",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_needed_capability_has_its_name() {
        for (cap, _) in NEEDED {
            assert_ne!(cap_name(cap), "a capability");
        }
    }

    #[test]
    fn what_is_not_kvm_is_refused() {
        let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(matches!(NewVm::new(null, 1), Err(VmError::ApiVersion(_))));
    }
}

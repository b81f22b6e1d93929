//! The virtual machine as KVM and the guest see it: address map, VM and vCPUs, CPUID, firmware tables, and the loader.
//!
//! Nothing here knows about limits. All guest memory is reached through [`vm_memory::GuestMemory`], so that the same
//! loader works on accounted memory, where each page that it writes is charged first, and on plain mappings in tests.
//!
//! ```text
//!  NewVm ──set_ram──► Vm ──(irqfd, ioeventfd)──create_vcpus──► Vcpu × n ──setup──run_once…
//! ```
//!
//! The order is a rule, not taste: memory slots first, then the interrupt controller, then event descriptors, and all of
//! it before the first `KVM_RUN`. A slot or an event descriptor that is added later waits for running vCPUs, and one of
//! those may be waiting for memory.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod kvm;
pub mod layout;
pub mod vcpu;

pub use boot::{BootError, BootPlan, BootRequest};
pub use kvm::{NewVm, Vm, VmError};
pub use layout::{LayoutError, RamLayout, RamRange};
pub use vcpu::{Step, Vcpu};

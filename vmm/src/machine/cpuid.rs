//! What the vCPUs say about themselves.
//!
//! The base is what KVM supports on this host, hidden or changed in four places: the topology (one package, one thread
//! per core, APIC ids equal to vCPU numbers), the hypervisor bit, the TSC-deadline timer, and KVM's own leaf, which
//! loses the asynchronous page faults. Those would let a guest take fault notifications, go on, and have 64 more faults
//! waiting per vCPU: slower here, and harder to bound. Steal time stays: its page is one that the kernel touches with
//! a user-mode access, which repeats until the page is there, but faults are always answered within milliseconds.
//!
//! To list what KVM supports takes as long as to make a VM, where each `CPUID` of this host is an exit to another one. It
//! is the same for all VMs, so the controller lists it once, and tells its workers ([`to_words`], [`from_words`]).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use thiserror::Error;
use vmm_sys_util::fam;

/// KVM's feature leaf.
const KVM_FEATURES: u32 = 0x4000_0001;
/// `KVM_FEATURE_ASYNC_PF`, `_ASYNC_PF_VMEXIT` and `_ASYNC_PF_INT`.
pub const ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;
/// Features that need what this VMM does not have: MSIs with extended destinations, SEV's shared pages, migration.
const NOT_OFFERED: u32 = 1 << 15 | 1 << 16 | 1 << 17;

const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;

/// CPUID could not be built.
#[derive(Debug, Error)]
pub enum CpuidError {
    /// More entries than KVM takes.
    #[error("more CPUID entries than KVM accepts")]
    TooMany(#[source] fam::Error),
}

/// What the host's KVM can do that its CPUID list does not say.
#[derive(Debug, Clone, Copy)]
pub struct HostCaps {
    /// `KVM_CAP_TSC_DEADLINE_TIMER`.
    pub tsc_deadline: bool,
}

/// A list of CPUID as numbers: function, index, flags, EAX, EBX, ECX, EDX of each entry.
pub fn to_words(cpuid: &CpuId) -> Vec<[u32; 7]> {
    cpuid.as_slice().iter().map(|e| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx]).collect()
}

/// The list behind the numbers of [`to_words`].
///
/// # Errors
/// When there are too many entries.
pub fn from_words(words: &[[u32; 7]]) -> Result<CpuId, CpuidError> {
    let entry = |&[function, index, flags, eax, ebx, ecx, edx]: &[u32; 7]| kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    };
    CpuId::from_entries(&words.iter().map(entry).collect::<Vec<_>>()).map_err(CpuidError::TooMany)
}

/// The CPUID of vCPU `index` of `cpus`.
///
/// # Errors
/// When the result has too many entries.
pub fn for_vcpu(supported: &CpuId, caps: HostCaps, index: u32, cpus: u32) -> Result<CpuId, CpuidError> {
    let shift = cpus.next_power_of_two().trailing_zeros();
    let ids = 1u32 << shift;
    let mut entries: Vec<kvm_cpuid_entry2> = Vec::with_capacity(supported.as_slice().len() + 3);
    let max_basic = supported.as_slice().iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    for entry in supported.as_slice() {
        let mut e = *entry;
        match e.function {
            1 => {
                e.ebx = (e.ebx & 0x0000_ffff) | index << 24 | ids.min(255) << 16;
                e.ecx |= ECX_HYPERVISOR;
                e.ecx = if caps.tsc_deadline { e.ecx | ECX_TSC_DEADLINE } else { e.ecx & !ECX_TSC_DEADLINE };
                e.edx = if cpus > 1 { e.edx | EDX_HTT } else { e.edx & !EDX_HTT };
            }
            // Caches: the last level is shared by all, the others belong to one core.
            4 if e.eax & 0x1f != 0 => {
                let shared = if e.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
                e.eax = (e.eax & 0x3fff) | shared << 14 | (ids - 1).min(63) << 26;
            }
            0x8000_001d if e.eax & 0x1f != 0 => {
                let shared = if e.eax >> 5 & 7 >= 3 { ids - 1 } else { 0 };
                e.eax = (e.eax & 0x3fff) | shared << 14;
            }
            // Replaced below, or by leaf 0xb.
            0xb | 0x1f | 0x8000_0026 => continue,
            // AMD: number of threads and the bits of the APIC id that number them.
            0x8000_0008 => e.ecx = (e.ecx & !0xf0ff) | (cpus - 1) | shift << 12,
            // AMD: APIC id, core id, one thread a core, one node.
            0x8000_001e => (e.eax, e.ebx, e.ecx) = (index, index & 0xff, 0),
            KVM_FEATURES => e.eax &= !(ASYNC_PF | NOT_OFFERED),
            _ => {}
        }
        entries.push(e);
    }
    if max_basic >= 0xb {
        const SMT: u32 = 1 << 8;
        const CORE: u32 = 2 << 8;
        for (level, (eax, ebx, kind)) in (0u32..).zip([(0, 1, SMT), (shift, cpus, CORE), (0, 0, 0)]) {
            entries.push(kvm_cpuid_entry2 {
                function: 0xb,
                index: level,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax,
                ebx,
                ecx: level | kind,
                edx: index,
                ..Default::default()
            });
        }
    }
    CpuId::from_entries(&entries).map_err(CpuidError::TooMany)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ..Default::default() }
    }

    fn find(id: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *id.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn async_page_faults_are_never_offered() {
        let host = CpuId::from_entries(&[entry(0, 0xd), entry(1, 0), entry(KVM_FEATURES, u32::MAX)]).unwrap();
        let id = for_vcpu(&host, HostCaps { tsc_deadline: true }, 0, 1).unwrap();
        let features = find(&id, KVM_FEATURES, 0).eax;
        assert_eq!(features & ASYNC_PF, 0);
        assert_eq!(features & (1 << 3 | 1 << 24 | 1 << 5), 1 << 3 | 1 << 24 | 1 << 5, "clock and steal time stay");
    }

    #[test]
    fn a_list_survives_its_way_as_numbers() {
        let mut host = [entry(0, 0xd), entry(0xd, 0x240)];
        (host[1].index, host[1].flags, host[1].edx) = (1, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, 7);
        let host = CpuId::from_entries(&host).unwrap();
        assert_eq!(from_words(&to_words(&host)).unwrap().as_slice(), host.as_slice());
        assert!(from_words(&[[0; 7]; 1000]).is_err());
    }

    #[test]
    fn topology_is_one_package_of_single_thread_cores() {
        let host =
            [entry(0, 0xd), entry(1, 0), entry(4, 0x61), entry(0xb, 7), entry(0x8000_0008, 0), entry(0x8000_001e, 9)];
        let host = CpuId::from_entries(&host).unwrap();
        let id = for_vcpu(&host, HostCaps { tsc_deadline: false }, 2, 3).unwrap();
        let one = find(&id, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (2, 4));
        assert_eq!((one.ecx & ECX_HYPERVISOR != 0, one.ecx & ECX_TSC_DEADLINE), (true, 0));
        assert_ne!(one.edx & EDX_HTT, 0);
        let core = find(&id, 0xb, 1);
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
        assert_eq!(find(&id, 0xb, 0).ebx, 1);
        assert_eq!(find(&id, 4, 0).eax >> 14 & 0xfff, 3);
        assert_eq!(find(&id, 0x8000_0008, 0).ecx, 2 | 2 << 12);
        assert_eq!(find(&id, 0x8000_001e, 0).eax, 2);
    }
}

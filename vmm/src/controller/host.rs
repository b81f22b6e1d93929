//! What this host offers: kernel version, `/dev/kvm`, `/dev/userfaultfd`, memory.
//!
//! The same functions serve the start of a VM, which refuses with the first problem, and `ballast doctor`, which
//! prints all of them. A problem always carries the command that fixes it: running without accounting in silence
//! is the one thing that must never happen.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_EXACT_ADDRESS, UFFD_FEATURE_MOVE, UFFD_FEATURE_THREAD_ID, uffdio_api,
};
use linux_raw_sys::ioctl::UFFDIO_API;
use rustix::process::{Resource, Rlimit};

use crate::kernel;

/// Oldest kernel that works: the first long-term one in which `UFFDIO_MOVE` has its fixes.
pub const OLDEST_KERNEL: (u32, u32) = (6, 12);

/// `USERFAULTFD_IOC_NEW`, that is `_IO(0xAA, 0)`: a new userfaultfd from the device.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;

/// `KVM_GET_API_VERSION`, that is `_IO(0xAE, 0)`.
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;

/// The only version of the KVM interface there has been since 2007.
const KVM_API_VERSION: libc::c_int = 12;

/// Features that the accounting of guest memory cannot do without, with the names that the kernel's headers use.
const NEEDED_FEATURES: [(u32, &str); 3] = [
    (UFFD_FEATURE_MOVE, "UFFD_FEATURE_MOVE"),
    (UFFD_FEATURE_THREAD_ID, "UFFD_FEATURE_THREAD_ID"),
    (UFFD_FEATURE_EXACT_ADDRESS, "UFFD_FEATURE_EXACT_ADDRESS"),
];

/// Something that keeps VMs from running here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {fix}")]
pub struct Problem {
    /// What is wrong, without a full stop.
    pub what: String,
    /// What the user does about it: usually a command.
    pub fix: String,
}

impl Problem {
    fn new(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { what: what.into(), fix: fix.into() }
    }
}

/// By how much deadlines are multiplied: 10 with `BALLAST_SLOW=1` (an emulated host), else 1.
pub fn slowness() -> u32 {
    if std::env::var_os("BALLAST_SLOW").is_some_and(|v| v == "1") { 10 } else { 1 }
}

/// `base`, or ten times as long on a host that was declared slow.
pub fn scaled(base: Duration) -> Duration {
    base * slowness()
}

/// Checks that the kernel is new enough and returns its release.
///
/// # Errors
/// A kernel older than [`OLDEST_KERNEL`], or one whose version cannot be read.
pub fn check_kernel() -> Result<String, Problem> {
    let release = kernel::release();
    check_release(&release)?;
    Ok(release)
}

fn check_release(release: &str) -> Result<(), Problem> {
    match kernel::version_of(release) {
        Some(version) if version >= OLDEST_KERNEL => Ok(()),
        _ => Err(Problem::new(
            format!("Linux {}.{} or newer is required, this is {release}", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
            "install a newer kernel, on Debian: apt install -t bookworm-backports linux-image-amd64",
        )),
    }
}

/// Descriptors that this process may have: now, and at most.
pub fn descriptors() -> (u64, u64) {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX))
}

/// Lets this process have as many descriptors as the host allows it: each VM takes a few. Returns how many that are.
pub fn allow_descriptors() -> u64 {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // What cannot be had is not needed before there are many VMs, and is said then.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    descriptors().0
}

fn open_device(path: &str) -> io::Result<OwnedFd> {
    Ok(OpenOptions::new().read(true).write(true).open(path)?.into())
}

/// Opens `/dev/kvm` and checks that it is KVM.
///
/// # Errors
/// A missing device, a lack of permission or a foreign interface version.
pub fn open_kvm() -> Result<OwnedFd, Problem> {
    let device = open_device("/dev/kvm").map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Problem::new(
            "there is no /dev/kvm",
            "enable virtualization in the firmware (or nesting in the outer host), then: modprobe kvm_intel || \
             modprobe kvm_amd",
        ),
        io::ErrorKind::PermissionDenied => {
            Problem::new("no permission to open /dev/kvm", "sudo usermod -aG kvm $USER, then log in again")
        }
        _ => Problem::new(format!("/dev/kvm cannot be opened ({e})"), "modprobe kvm_intel || modprobe kvm_amd"),
    })?;
    // SAFETY: KVM_GET_API_VERSION takes no argument and `device` is open for the whole call.
    let version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION, 0) };
    match version {
        KVM_API_VERSION => Ok(device),
        -1 => Err(Problem::new(
            format!("/dev/kvm is not KVM ({})", io::Error::last_os_error()),
            "remove it, then: modprobe kvm_intel || modprobe kvm_amd",
        )),
        _ => Err(Problem::new(
            format!("/dev/kvm speaks version {version} of its interface, {KVM_API_VERSION} is needed"),
            "install a kernel with KVM",
        )),
    }
}

/// Opens `/dev/userfaultfd` and tests on a throw-away descriptor that it offers every feature that is needed.
///
/// # Errors
/// A missing device, a lack of permission or a missing feature.
pub fn open_userfaultfd() -> Result<OwnedFd, Problem> {
    let device = open_device("/dev/userfaultfd").map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => {
            Problem::new("there is no /dev/userfaultfd", "run a kernel with CONFIG_USERFAULTFD=y (any distribution's)")
        }
        io::ErrorKind::PermissionDenied => Problem::new(
            "no permission to open /dev/userfaultfd, which memory limits need",
            "echo 'KERNEL==\"userfaultfd\", GROUP=\"kvm\", MODE=\"0660\"' | sudo tee \
             /etc/udev/rules.d/60-ballast.rules && sudo udevadm trigger --name-match=userfaultfd",
        ),
        _ => Problem::new(format!("/dev/userfaultfd cannot be opened ({e})"), "ls -l /dev/userfaultfd"),
    })?;
    let features = userfaultfd_features(&device).map_err(|e| {
        Problem::new(format!("/dev/userfaultfd gives no userfaultfd ({e})"), "run a kernel with CONFIG_USERFAULTFD=y")
    })?;
    let missing: Vec<_> =
        NEEDED_FEATURES.iter().filter(|(bit, _)| features & u64::from(*bit) == 0).map(|(_, name)| *name).collect();
    if missing.is_empty() {
        Ok(device)
    } else {
        Err(Problem::new(
            format!("this kernel's userfaultfd lacks {}", missing.join(", ")),
            format!("install Linux {}.{} or newer", OLDEST_KERNEL.0, OLDEST_KERNEL.1),
        ))
    }
}

/// The feature bits that a userfaultfd from `device` offers.
fn userfaultfd_features(device: &OwnedFd) -> io::Result<u64> {
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value and returns a new descriptor or -1.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the ioctl has just created `fd`, nobody else owns it.
    let probe = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut api = uffdio_api { api: u64::from(UFFD_API), features: 0, ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, which lives until the call returns.
    let done = unsafe { libc::ioctl(probe.as_raw_fd(), libc::c_ulong::from(UFFDIO_API), &raw mut api) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(api.features) }
}

/// The host's memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostMemory {
    /// `MemTotal`.
    pub total: u64,
    /// `MemAvailable`: what could be had without swapping.
    pub available: u64,
}

/// Reads `/proc/meminfo`.
///
/// # Errors
/// When procfs is not mounted.
pub fn memory() -> io::Result<HostMemory> {
    let text = io::read_to_string(File::open("/proc/meminfo")?)?;
    Ok(HostMemory { total: meminfo_field(&text, "MemTotal:"), available: meminfo_field(&text, "MemAvailable:") })
}

fn meminfo_field(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
}

/// Waits until memory that a dead worker held has come back to the host: until `MemAvailable` grows by less than
/// 1 MiB in 20 ms, but never longer than a second (ten on a slow host).
///
/// The process is gone at this point, yet a kernel worker that was filling one of its pages may hold the address
/// space for tens of milliseconds longer.
pub async fn memory_settled() {
    let step = scaled(Duration::from_millis(20));
    let end = tokio::time::Instant::now() + scaled(Duration::from_secs(1));
    let mut last = memory().unwrap_or_default().available;
    while tokio::time::Instant::now() < end {
        tokio::time::sleep(step).await;
        let now = memory().unwrap_or_default().available;
        if now < last.saturating_add(1 << 20) {
            return;
        }
        last = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_is_refused_with_a_sentence_that_names_both_versions() {
        let problem = check_release("6.1.0-44-amd64").unwrap_err();
        assert_eq!(problem.what, "Linux 6.12 or newer is required, this is 6.1.0-44-amd64");
        assert!(check_release("6.12.0").is_ok());
        assert!(check_release("5.19.0").is_err());
        assert!(check_release("7.0.0").is_ok());
    }

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24575472 kB\nMemFree:  1 kB\nMemAvailable:   23575472 kB\n";
        assert_eq!(meminfo_field(text, "MemTotal:"), 24_575_472 * 1024);
        assert_eq!(meminfo_field(text, "MemAvailable:"), 23_575_472 * 1024);
        assert_eq!(meminfo_field(text, "Nothing:"), 0);
    }
}

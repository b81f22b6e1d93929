//! `ballast doctor`: can this host run VMs, and what to do if not.

use std::path::Path;

use memcg_core::units::human;

use super::{DONE, ERROR, Failure, output};
use crate::controller::cgroup::Cgroups;
use crate::controller::host::{self, Problem};
use crate::controller::{armour, standing};
use crate::worker::sandbox;

/// Below this much available memory a VM is not worth starting.
const LITTLE_MEMORY: u64 = 64 << 20;

/// Checks everything and prints a line for each; 0 when VMs can run with limits.
pub fn doctor() -> Result<u8, Failure> {
    let checks = [
        ("kernel", host::check_kernel().map(|release| format!("Linux {release}"))),
        ("kvm", host::open_kvm().map(|_| "/dev/kvm can be used".to_owned())),
        ("userfaultfd", host::open_userfaultfd().map(|_| "/dev/userfaultfd has what limits need".to_owned())),
        ("seccomp", seccomp()),
        ("memory", memory()),
    ];
    let (mut status, mut out) = (DONE, String::new());
    // No failure: freestanding guests run on any KVM.
    let linux = if ["kvm_intel", "kvm_amd"].iter().any(|module| Path::new("/sys/module").join(module).exists()) {
        "ok    linux guests this KVM runs them (VMX or SVM)\n"
    } else {
        "note  linux guests this KVM is neither VMX nor SVM: only freestanding guests run on it\n"
    };
    // No failure either: seccomp alone keeps a worker from opening anything.
    let landlock = match sandbox::landlock_version() {
        Ok(version) => format!("ok    landlock     version {version}\n"),
        Err(error) => format!(
            "note  landlock     this kernel does not offer it ({error}): workers are shut in by seccomp alone; add landlock \
             to lsm= on the kernel's command line\n"
        ),
    };
    // No failure: it is a second fence behind the account.
    let cgroup = match Cgroups::look() {
        Ok(()) => "ok    cgroup       serve --cgroup auto can limit workers by cgroups as well\n".to_owned(),
        Err(why) => format!("note  cgroup       nothing but their account limits workers: {why}\n"),
    };
    // None either: it is about the worst case.
    let locked = match armour::lock() {
        Ok(()) => "ok    locked       the controller's memory can be locked\n".to_owned(),
        Err(why) => format!("note  locked       {why}\n"),
    };
    let last = match standing::obstacle(standing::stand_last()) {
        None => "ok    oom score    the kernel takes anybody before the controller\n".to_owned(),
        Some(why) => format!("note  oom score    {why}\n"),
    };
    for (what, result) in checks {
        match result {
            Ok(text) => out.push_str(&format!("ok    {what:12} {text}\n")),
            Err(Problem { what: problem, fix }) => {
                status = ERROR;
                out.push_str(&format!("FAIL  {what:12} {problem}\n      {:12} {fix}\n", "do this:"));
            }
        }
    }
    out.push_str(&landlock);
    out.push_str(&cgroup);
    out.push_str(&locked);
    out.push_str(&last);
    out.push_str(linux);
    output::print(out)?;
    Ok(status)
}

fn seccomp() -> Result<String, Problem> {
    let found = sandbox::check_seccomp().map_err(|error| Problem {
        what: format!("workers cannot be shut in ({error})"),
        fix: "run a kernel with CONFIG_SECCOMP_FILTER=y (any distribution's)".to_owned(),
    });
    found.map(|()| "workers can be shut in".to_owned())
}

fn memory() -> Result<String, Problem> {
    let memory = host::memory().map_err(|error| Problem {
        what: format!("the host's memory cannot be read ({error})"),
        fix: "mount -t proc proc /proc".to_owned(),
    })?;
    if memory.available < LITTLE_MEMORY {
        return Err(Problem {
            what: format!("only {} of memory is available", human(memory.available)),
            fix: "free some: ps aux --sort=-rss | head".to_owned(),
        });
    }
    Ok(format!("{} of {} available", human(memory.available), human(memory.total)))
}

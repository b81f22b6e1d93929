//! A host cgroup for each worker: the backstop behind the account, and the kernel's own figures of what a VM costs.
//!
//! The account holds a VM at its limit as long as its worker is honest. A worker that a guest has broken into could fill
//! memory that it was never granted; then the kernel stops it at a limit a little above everything that the VM may use
//! (`SLACK`). No VM ever meets that limit by itself: the backstop is raised before a limit is, and lowered after.
//!
//! ```text
//!  v2   the controller's own cgroup ─ ballast-NAME-N            memory.max, memory.stat, memory.events
//!  v1   the same in the hierarchy of the controller `memory`    memory.limit_in_bytes, memory.stat, memory.oom_control
//! ```
//!
//! It is never required: `serve` has it with `--cgroup auto` (below its own cgroup) or `--cgroup PATH`. In v2 a cgroup has
//! either processes or children with controllers: a controller that is alone in its cgroup moves itself into `controller`
//! below it, as a service with `Delegate=yes` may; one that shares its cgroup with others needs a path.
//!
//! It is not the default because of its price: a process enters a cgroup under a lock that waits for an RCU grace period,
//! 10 to 20 ms for each VM (cgroup2 mounted with `favordynmods` has not), several times what all the rest of a start takes.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a worker's cgroup may use above everything that its VM may: page cache of the guest's kernel, and what the
/// kernel charges in batches.
const SLACK: u64 = 16 << 20;

/// Beginning of the name of every worker's cgroup.
const PREFIX: &str = "ballast-";

/// Which interface of cgroups the memory controller has here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    fn limit_file(self) -> &'static str {
        match self {
            Self::V1 => "memory.limit_in_bytes",
            Self::V2 => "memory.max",
        }
    }
}

/// Where the cgroups of workers are made.
#[derive(Clone, Debug)]
pub struct Cgroups {
    base: PathBuf,
    version: Version,
}

/// The limit of the backstop for a VM that may use `most` bytes.
pub fn limit_for(most: u64) -> u64 {
    most.saturating_add(SLACK).saturating_add(most / 32) & !4095
}

impl Cgroups {
    /// Where this process may make cgroups: below `asked` (a directory of a cgroup file system), else below its own.
    ///
    /// # Errors
    /// Why it may not, with what to do about it.
    pub fn find(asked: Option<&Path>) -> Result<Self, String> {
        let (base, version) = match asked {
            Some(path) => {
                let version = if path.join("cgroup.controllers").exists() { Version::V2 } else { Version::V1 };
                (path.to_owned(), version)
            }
            None => own().ok_or("there is no cgroup of this process with the memory controller")?,
        };
        let found = Self { base, version };
        found.prepare().map_err(|error| {
            let path = found.base.display();
            format!(
                "no cgroups with limits can be made in {path} ({error}): use Delegate=yes in the unit, or --cgroup PATH"
            )
        })?;
        Ok(found)
    }

    /// Sees to it that cgroups made here have the memory controller.
    fn prepare(&self) -> io::Result<()> {
        if self.version == Version::V2 {
            let control = self.base.join("cgroup.subtree_control");
            let on = || fs::read_to_string(&control).map(|on| on.split_whitespace().any(|word| word == "memory"));
            if !on()? && fs::write(&control, "+memory").is_err() {
                self.step_aside()?;
                fs::write(&control, "+memory")?;
            }
        }
        // Nothing short of making one says that one can be made.
        let probe = self.base.join(format!("{PREFIX}probe-{}", std::process::id()));
        fs::create_dir(&probe)?;
        let limited = fs::File::options().write(true).open(probe.join(self.version.limit_file()));
        fs::remove_dir(&probe)?;
        limited.map(drop)
    }

    /// Moves this process into a cgroup below its own, when nobody else is there.
    fn step_aside(&self) -> io::Result<()> {
        let me = std::process::id().to_string();
        if fs::read_to_string(self.base.join("cgroup.procs"))?.trim() != me {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let aside = self.base.join("controller");
        match fs::create_dir(&aside) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => fs::write(aside.join("cgroup.procs"), me),
        }
    }

    /// A new cgroup for the worker of the VM `name` that may use `limit` bytes.
    ///
    /// # Errors
    /// As the file system says.
    pub fn make(&self, name: &str, limit: u64) -> io::Result<Cgroup> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = self.base.join(format!("{PREFIX}{name}-{}-{number}", std::process::id()));
        fs::create_dir(&directory)?;
        let cgroup = Cgroup { directory, version: self.version, limit: Arc::new(AtomicU64::new(limit)) };
        cgroup.write_limit(limit).inspect_err(|_| cgroup.remove())?;
        Ok(cgroup)
    }
}

/// The cgroup of one worker.
#[derive(Clone, Debug)]
pub struct Cgroup {
    directory: PathBuf,
    version: Version,
    /// The limit that was asked for last.
    limit: Arc<AtomicU64>,
}

/// What a worker's cgroup is charged by the kernel, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Charged {
    /// Private memory of its processes: guest RAM and the worker's own.
    pub anon: u64,
    /// The kernel's memory for it: KVM, page tables, threads, descriptors.
    pub kernel: u64,
}

impl Cgroup {
    /// The cgroup of the process `pid`, when it is one that [`Cgroups::make`] has made.
    pub fn of_process(pid: i32) -> Option<Self> {
        let (directory, version) = memory_cgroup(&format!("/proc/{pid}"))?;
        let ours = directory.file_name()?.to_str()?.starts_with(PREFIX);
        let limit = fs::read_to_string(directory.join(version.limit_file())).ok()?.trim().parse().unwrap_or(u64::MAX);
        ours.then(|| Self { directory, version, limit: Arc::new(AtomicU64::new(limit)) })
    }

    /// A descriptor to which a process writes `0` to enter.
    ///
    /// # Errors
    /// As the file system says.
    pub fn entrance(&self) -> io::Result<OwnedFd> {
        Ok(File::options().write(true).open(self.directory.join("cgroup.procs"))?.into())
    }

    /// Raises the limit at once, which never waits, or lowers it, which may: then `lower` is called with what is to be
    /// done by a thread that can wait. Without effect when it is `limit` already.
    pub fn set_limit(&self, limit: u64, lower: impl FnOnce(Box<dyn FnOnce() + Send>)) {
        let before = self.limit.swap(limit, Ordering::SeqCst);
        if before < limit {
            self.try_limit(limit);
        } else if before > limit {
            let this = self.clone();
            lower(Box::new(move || {
                // One that was asked for meanwhile is higher or has its own thread: what was asked for last is written last.
                let mut written = u64::MAX;
                loop {
                    let wanted = this.limit.load(Ordering::SeqCst);
                    if wanted == written {
                        break;
                    }
                    this.try_limit(wanted);
                    written = wanted;
                }
            }));
        }
    }

    fn try_limit(&self, limit: u64) {
        if let Err(error) = self.write_limit(limit) {
            tracing::warn!(cgroup = %self.directory.display(), %error, "the limit of the cgroup cannot be changed");
        }
    }

    fn write_limit(&self, limit: u64) -> io::Result<()> {
        fs::write(self.directory.join(self.version.limit_file()), limit.to_string())
    }

    /// What the kernel charges it now.
    ///
    /// # Errors
    /// When it is gone.
    pub fn charged(&self) -> io::Result<Charged> {
        let stat = fs::read_to_string(self.directory.join("memory.stat"))?;
        Ok(match self.version {
            Version::V1 => {
                let kernel = fs::read_to_string(self.directory.join("memory.kmem.usage_in_bytes"))?;
                Charged { anon: field(&stat, "total_rss"), kernel: kernel.trim().parse().unwrap_or(0) }
            }
            Version::V2 => Charged { anon: field(&stat, "anon"), kernel: field(&stat, "kernel") },
        })
    }

    /// How many of its processes the kernel has killed because it was full.
    pub fn oom_kills(&self) -> u64 {
        let file = if self.version == Version::V1 { "memory.oom_control" } else { "memory.events" };
        fs::read_to_string(self.directory.join(file)).map_or(0, |text| field(&text, "oom_kill"))
    }

    /// Removes it. What it was still charged goes to its parent.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_dir(&self.directory)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(cgroup = %self.directory.display(), %error, "the cgroup cannot be removed");
        }
    }
}

/// The number behind `key` in lines of `key number`.
fn field(text: &str, key: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

/// The cgroup of this process.
fn own() -> Option<(PathBuf, Version)> {
    memory_cgroup("/proc/self")
}

/// The directory of the cgroup of a process in the hierarchy that has the memory controller.
fn memory_cgroup(process: &str) -> Option<(PathBuf, Version)> {
    let memberships = fs::read_to_string(format!("{process}/cgroup")).ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let (path, version) = membership(&memberships)?;
    let directory = mount_point(&mounts, version)?.join(path.trim_start_matches('/'));
    // Where the memory controller is in v1, v2 has no limits.
    let usable = version == Version::V1 || controllers(&directory).any(|name| name == "memory");
    usable.then_some((directory, version))
}

fn controllers(directory: &Path) -> impl Iterator<Item = String> {
    let text = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect::<Vec<_>>().into_iter()
}

/// The path of the cgroup that limits memory in the text of `/proc/PID/cgroup`.
fn membership(text: &str) -> Option<(&str, Version)> {
    let lines = || text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let v1 = lines().find(|(names, _)| names.split(',').any(|name| name == "memory"));
    let v2 = lines().find(|(names, _)| names.is_empty());
    v1.map(|(_, path)| (path, Version::V1)).or_else(|| v2.map(|(_, path)| (path, Version::V2)))
}

/// Where the hierarchy is mounted, out of the text of `/proc/self/mountinfo`.
fn mount_point(text: &str, version: Version) -> Option<PathBuf> {
    let mount = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        let (kind, options) = (after.next()?, after.nth(1)?);
        let right = match version {
            Version::V1 => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
            Version::V2 => kind == "cgroup2",
        };
        right.then(|| PathBuf::from(before.split(' ').nth(4).unwrap_or_default()))
    };
    text.lines().find_map(mount)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    #[test]
    fn the_hierarchy_with_the_memory_controller_is_found() {
        let hybrid = "9:name=systemd:/\n4:memory:/a:b/c\n0::/\n";
        assert_eq!(membership(hybrid), Some(("/a:b/c", Version::V1)));
        assert_eq!(membership("0::/user.slice\n"), Some(("/user.slice", Version::V2)));
        assert_eq!(membership("1:cpu:/\n"), None);
        assert_eq!(mount_point(MOUNTS, Version::V1).unwrap(), Path::new("/sys/fs/cgroup/memory"));
        assert_eq!(mount_point(MOUNTS, Version::V2).unwrap(), Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(mount_point("", Version::V2), None);
    }

    #[test]
    fn numbers_are_read_by_their_whole_name() {
        let text = "anon_thp 1\nanon 4096\nkernel_stack 2\nkernel 8192\n";
        assert_eq!((field(text, "anon"), field(text, "kernel"), field(text, "none")), (4096, 8192, 0));
    }

    #[test]
    fn a_cgroup_is_made_limited_and_removed() {
        let place = match Cgroups::find(None) {
            Ok(place) => place,
            Err(why) => {
                println!("SKIP cgroup reason={why}");
                return;
            }
        };
        let cgroup = place.make("test", limit_for(64 << 20)).expect("made");
        let read = || fs::read_to_string(cgroup.directory.join(cgroup.version.limit_file())).unwrap();
        assert_eq!(read().trim(), (82 << 20).to_string());
        cgroup.set_limit(128 << 20, |_| unreachable!("raising never waits"));
        assert_eq!(read().trim(), (128 << 20).to_string());
        cgroup.set_limit(96 << 20, |lower| lower());
        assert_eq!(read().trim(), (96 << 20).to_string());
        assert_eq!((cgroup.charged().expect("read").anon, cgroup.oom_kills()), (0, 0));
        let directory = cgroup.directory.clone();
        cgroup.remove();
        assert!(!directory.exists());
    }
}

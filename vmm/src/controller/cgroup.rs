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
//! A `serve` that was killed leaves cgroups behind. Those whose VM runs go when it ends; the others, which are empty, are
//! removed by the next `serve` that makes cgroups in the same place.
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
    /// Where this process makes cgroups: below `asked` (a directory of a cgroup file system), else below its own. Those that
    /// are there of controllers that were killed, and are empty, are removed.
    ///
    /// # Errors
    /// Why it may not, with what to do about it.
    pub fn find(asked: Option<&Path>) -> Result<Self, String> {
        let found = match asked {
            Some(path) => {
                let version = if path.join("cgroup.controllers").exists() { Version::V2 } else { Version::V1 };
                Self { base: path.to_owned(), version }
            }
            None => Self::own()?,
        };
        found.prepare().map_err(|error| found.refused(&error))?;
        found.sweep();
        Ok(found)
    }

    /// Whether this process could make cgroups below its own. Changes nothing.
    ///
    /// # Errors
    /// As [`Self::find`].
    pub fn look() -> Result<(), String> {
        let own = Self::own()?;
        own.may().map_err(|error| own.refused(&error))
    }

    /// Below the cgroup of this process.
    fn own() -> Result<Self, String> {
        let (base, version) =
            memory_cgroup("/proc/self").ok_or("there is no cgroup of this process with the memory controller")?;
        Ok(Self { base, version })
    }

    fn refused(&self, error: &io::Error) -> String {
        let path = self.base.display();
        format!(
            "no cgroups with limits can be made in {path} ({error}): use Delegate=yes in the unit, or --cgroup PATH"
        )
    }

    /// What [`Self::prepare`] finds out by doing it, as far as looking tells.
    fn may(&self) -> io::Result<()> {
        use rustix::fs::Access;
        rustix::fs::access(&self.base, Access::WRITE_OK | Access::EXEC_OK)?;
        if self.version == Version::V2 {
            rustix::fs::access(self.base.join("cgroup.subtree_control"), Access::WRITE_OK)?;
            // Only the root may have both processes and children with controllers.
            let root = !self.base.join("cgroup.type").exists();
            if !root && !self.has_memory()? && !self.alone()? {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
        }
        Ok(())
    }

    /// Whether cgroups made here have the memory controller.
    fn has_memory(&self) -> io::Result<bool> {
        let on = fs::read_to_string(self.base.join("cgroup.subtree_control"))?;
        Ok(on.split_whitespace().any(|word| word == "memory"))
    }

    /// Whether no other process is in this cgroup.
    fn alone(&self) -> io::Result<bool> {
        Ok(fs::read_to_string(self.base.join("cgroup.procs"))?.trim() == std::process::id().to_string())
    }

    /// Removes what controllers have left that are no more: their numbers are in the names. What is in use stays, because
    /// the kernel removes no cgroup that has processes.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.base).into_iter().flatten().flatten() {
            let Some(maker) = entry.file_name().to_str().and_then(maker) else { continue };
            // Of a process with our own number: this one has made none yet.
            let lives = maker != std::process::id() && Path::new("/proc").join(maker.to_string()).exists();
            if !lives && fs::remove_dir(entry.path()).is_ok() {
                tracing::info!(cgroup = %entry.path().display(), "removed what an earlier controller has left");
            }
        }
    }

    /// Sees to it that cgroups made here have the memory controller.
    fn prepare(&self) -> io::Result<()> {
        if self.version == Version::V2 {
            let control = self.base.join("cgroup.subtree_control");
            if !self.has_memory()? && fs::write(&control, "+memory").is_err() {
                self.step_aside()?;
                fs::write(&control, "+memory")?;
            }
        }
        // Nothing short of making one says that one can be made.
        let probe = self.create("probe")?;
        let limited = fs::File::options().write(true).open(probe.join(self.version.limit_file()));
        fs::remove_dir(&probe)?;
        limited.map(drop)
    }

    /// Moves this process into a cgroup below its own, when nobody else is there.
    fn step_aside(&self) -> io::Result<()> {
        if !self.alone()? {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let aside = self.base.join("controller");
        match fs::create_dir(&aside) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => fs::write(aside.join("cgroup.procs"), std::process::id().to_string()),
        }
    }

    /// Makes a directory with a name of its own: [`PREFIX`], `name`, the number of this process, and one more.
    fn create(&self, name: &str) -> io::Result<PathBuf> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let directory = self.base.join(format!("{PREFIX}{name}-{}-{number}", std::process::id()));
            match fs::create_dir(&directory) {
                // Of a controller with our number (in a container it is always the same), whose VM runs.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => return made.map(|()| directory),
            }
        }
    }

    /// A new cgroup for the worker of the VM `name` that may use `limit` bytes.
    ///
    /// # Errors
    /// As the file system says.
    pub fn make(&self, name: &str, limit: u64) -> io::Result<Cgroup> {
        let cgroup =
            Cgroup { directory: self.create(name)?, version: self.version, limit: Arc::new(AtomicU64::new(limit)) };
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

/// A cgroup that this process lives in, directly or further up.
#[derive(Clone, Debug)]
pub struct Level {
    directory: PathBuf,
    version: Version,
}

/// The cgroups that this process lives in and whose memory may be limited, the nearest first. None where it is in no cgroup.
pub fn levels() -> Vec<Level> {
    let Some((directory, version)) = memory_cgroup("/proc/self") else { return Vec::new() };
    let limits = |directory: &&Path| directory.join(version.limit_file()).exists();
    let level = |directory: &Path| Level { directory: directory.to_owned(), version };
    directory.ancestors().take_while(limits).map(level).collect()
}

impl Level {
    fn number(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.directory.join(file)).ok()?.trim().parse().ok()
    }

    /// Its limit in bytes, `None` when it has none.
    pub fn limit(&self) -> Option<u64> {
        // In v1 no limit is the largest number that there is, in whole pages.
        self.number(self.version.limit_file()).filter(|limit| *limit < i64::MAX as u64 - 65_536)
    }

    /// What it leaves, in bytes, counting the page cache that nobody has used of late; `None` when it has no limit.
    pub fn available(&self) -> Option<u64> {
        let limit = self.limit()?;
        let (usage, cache) = match self.version {
            Version::V1 => ("memory.usage_in_bytes", "total_inactive_file"),
            Version::V2 => ("memory.current", "inactive_file"),
        };
        let stat = fs::read_to_string(self.directory.join("memory.stat")).ok()?;
        Some(limit.saturating_sub(self.number(usage)?).saturating_add(field(&stat, cache)).min(limit))
    }
}

/// The number behind `key` in lines of `key number`.
fn field(text: &str, key: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

/// The number of the controller that has made the cgroup of this name, if one has.
fn maker(name: &str) -> Option<u32> {
    let mut parts = name.strip_prefix(PREFIX)?.rsplitn(3, '-');
    let (number, maker, _vm) = (parts.next()?, parts.next()?, parts.next()?);
    number.parse::<u64>().ok()?;
    maker.parse().ok()
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

    /// A place that is no cgroup file system, with the files that one would have.
    fn place(version: Version, files: &[(&str, String)]) -> (tempfile::TempDir, Cgroups) {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let base = dir.path().to_owned();
        (dir, Cgroups { base, version })
    }

    fn left(place: &Cgroups) -> Vec<String> {
        let entries = fs::read_dir(&place.base).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    }

    #[test]
    fn looking_changes_nothing() {
        let me = std::process::id().to_string();
        for (kind, on, procs, may) in [
            (Some("domain"), "", me.clone(), true),
            (Some("domain"), "cpu", format!("{me}\n1"), false),
            (Some("domain"), "cpu memory", String::new(), true),
            (None, "", format!("1\n{me}"), true),
        ] {
            let mut files = vec![("cgroup.subtree_control", on.to_owned()), ("cgroup.procs", procs)];
            files.extend(kind.map(|kind| ("cgroup.type", kind.to_owned())));
            let (_dir, place) = place(Version::V2, &files);
            let before = left(&place);
            assert_eq!(place.may().is_ok(), may, "{files:?}: {:?}", place.may());
            assert_eq!(left(&place), before, "{files:?}");
            assert_eq!(fs::read_to_string(place.base.join("cgroup.subtree_control")).unwrap(), on);
        }
    }

    #[test]
    fn what_a_controller_that_was_killed_has_left_is_removed_when_it_is_empty() {
        let (_dir, place) = place(Version::V1, &[]);
        let me = std::process::id();
        let parent = std::os::unix::process::parent_id();
        // No process has such a number.
        let gone = u32::MAX;
        let names = |names: &[String]| names.iter().for_each(|name| fs::create_dir(place.base.join(name)).unwrap());
        let ours = [format!("ballast-web-{gone}-0"), format!("ballast-a-b-{gone}-17"), format!("ballast-probe-{me}-0")];
        let others = [
            format!("ballast-db-{gone}-0"),
            format!("ballast-web-{parent}-0"),
            "ballast-web".to_owned(),
            format!("ballast-{gone}-x"),
            format!("other-web-{gone}-0"),
        ];
        names(&ours);
        names(&others);
        fs::create_dir(place.base.join(format!("ballast-db-{gone}-0")).join("in use")).unwrap();
        place.sweep();
        let mut expected = others.to_vec();
        expected.sort();
        assert_eq!(left(&place), expected);
    }

    #[test]
    fn what_a_cgroup_leaves_is_below_its_limit_and_counts_cold_cache() {
        let v1 = [("memory.limit_in_bytes", "1000\n"), ("memory.usage_in_bytes", "900\n")];
        let v1 = v1.map(|(name, text)| (name, text.to_owned()));
        let stat = |name: &str| ("memory.stat", format!("inactive_file 7\n{name} 50\n"));
        let (_held, place) = place(Version::V1, &[v1[0].clone(), v1[1].clone(), stat("total_inactive_file")]);
        let level = Level { directory: place.base.clone(), version: Version::V1 };
        assert_eq!((level.limit(), level.available()), (Some(1000), Some(150)));
        fs::write(place.base.join("memory.limit_in_bytes"), "9223372036854771712\n").unwrap();
        assert_eq!((level.limit(), level.available()), (None, None));
        let files = [("memory.max", "1000\n".to_owned()), ("memory.current", "990\n".to_owned()), stat("anon")];
        let (_held, place) = super::tests::place(Version::V2, &files);
        let level = Level { directory: place.base.clone(), version: Version::V2 };
        assert_eq!(level.available(), Some(17));
        fs::write(place.base.join("memory.max"), "max\n").unwrap();
        assert_eq!((level.limit(), level.available()), (None, None));
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

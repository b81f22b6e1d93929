//! A small host: a cgroup with a limit that a controller and its VMs live in. To them it is all the memory that there is.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::{memory_cgroup, skip, skipped};

const MIB: u64 = 1 << 20;

/// What is left free of it, so that its kernel does not have to act; less than what is critical.
const LEFT: u64 = 24 * MIB;

/// Most that is taken of it at a time, so that it is seen to become short.
const STEP: u64 = 32 * MIB;

/// The cgroup. Removed when dropped, when nobody lives there any more.
#[derive(Debug)]
pub struct SmallHost {
    directory: PathBuf,
    /// Names of the files with the limit and with the usage, and of the cache that can be had back, in its `memory.stat`.
    limit: &'static str,
    usage: &'static str,
    cache: &'static str,
    hidden: Option<CString>,
}

impl SmallHost {
    /// Makes one of so many bytes, for a test with guests; `None`, with the reason printed, where that is not possible.
    pub fn make_or_skip(test: &str, bytes: u64) -> Option<Self> {
        if skipped(test) {
            return None;
        }
        Self::make(bytes).map_err(|reason| skip(test, reason)).ok()
    }

    fn make(bytes: u64) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (parent, limit) = memory_cgroup("self").ok_or("no cgroups")?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = parent.join(format!("small-{}-{number}", std::process::id()));
        let (usage, cache) = match limit {
            "memory.max" => ("memory.current", "inactive_file"),
            _ => ("memory.usage_in_bytes", "total_inactive_file"),
        };
        let refused = |error: io::Error| format!("no cgroup with a limit can be made here ({error})");
        fs::create_dir(&directory).map_err(refused)?;
        let host = Self { directory, limit, usage, cache, hidden: None };
        fs::write(host.directory.join(limit), bytes.to_string()).map_err(refused)?;
        Ok(host)
    }

    /// Puts `/dev/null` in the place of a file of this host, for the controller and its VMs. What the controller logs is in the file
    /// `log` in its directory. Needs to be root.
    ///
    /// # Panics
    /// When the path has a NUL in it.
    pub fn without(mut self, path: &str) -> Self {
        self.hidden = Some(CString::new(path).expect("a path"));
        self
    }

    /// The file that it does not have.
    pub fn hidden(&self) -> Option<&CStr> {
        self.hidden.as_deref()
    }

    /// The file by which a process enters it.
    pub fn door(&self) -> PathBuf {
        self.directory.join("cgroup.procs")
    }

    /// How many bytes a guest may touch now, all others standing still. The host keeps a few MiB, whatever becomes of that.
    ///
    /// # Panics
    /// When the kernel does not say how much is used.
    pub fn room(&self) -> u64 {
        let text = |file: &str| fs::read_to_string(self.directory.join(file)).expect("a file of a cgroup");
        let number = |text: &str| text.trim().parse::<u64>().expect("a number");
        let stat = text("memory.stat");
        let cache = stat.lines().find_map(|line| line.strip_prefix(self.cache)?.strip_prefix(' ')).map_or(0, number);
        let left = (number(&text(self.limit)) + cache).saturating_sub(number(&text(self.usage)));
        left.saturating_sub(LEFT).min(STEP)
    }
}

impl Drop for SmallHost {
    fn drop(&mut self) {
        // Those who were killed are gone in a moment. It stays where it cannot be removed, which does no harm.
        let end = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.directory).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
            && Instant::now() < end
        {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

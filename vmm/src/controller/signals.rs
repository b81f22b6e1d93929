//! What this host says of its memory: how much is available, and how much time is lost to waiting for it.
//!
//! *Available* is the least of what `MemAvailable` says and of what each cgroup leaves that this process lives in: a controller
//! in a container is short when its container is. *Stalled* is the `full` line of `/proc/pressure/memory`. A kernel without PSI
//! says nothing of it, and available memory decides alone.

use std::io;
use std::time::Duration;

use memcg_core::host::Reading;
use memcg_core::units::Pages;
use procfs::{Current, MemoryPressure};

use super::cgroup::{self, Level};
use super::host;

/// Where this host says how it is.
#[derive(Debug)]
pub struct Signals {
    has_pressure: bool,
    /// The cgroups above this process that limit memory.
    levels: Vec<Level>,
}

impl Signals {
    /// Finds out what this host has.
    pub fn find() -> Self {
        // A kernel that was started with psi=0 has the file, and refuses to have it read.
        Self { has_pressure: MemoryPressure::current().is_ok(), levels: cgroup::levels() }
    }

    /// Whether the kernel says how much time is stalled.
    pub fn has_pressure(&self) -> bool {
        self.has_pressure
    }

    /// All memory that there is for this process, in bytes: the host's, or the smallest limit of a cgroup above it.
    pub fn total(&self) -> u64 {
        let host = host::memory().map_or(0, |memory| memory.total);
        self.levels.iter().filter_map(Level::limit).fold(host, u64::min)
    }

    /// How it is now.
    ///
    /// # Errors
    /// When procfs cannot be read. A cgroup that cannot be read limits nothing.
    pub fn read(&self) -> io::Result<Reading> {
        let host = host::memory()?.available;
        let available = self.levels.iter().filter_map(Level::available).fold(host, u64::min);
        let pressure = if self.has_pressure { MemoryPressure::current().ok() } else { None };
        let stalled = pressure.as_ref().map(stalled);
        Ok(Reading { available: Pages::from_bytes_floor(available), stalled })
    }
}

/// The total of the `full` line.
fn stalled(pressure: &MemoryPressure) -> Duration {
    Duration::from_micros(pressure.full.total)
}

#[cfg(test)]
mod tests {
    use procfs::FromRead;

    use super::*;

    #[test]
    fn stalled_time_is_the_total_of_the_full_line() {
        let full_total = |text: &str| MemoryPressure::from_read(text.as_bytes()).ok().as_ref().map(stalled);
        let text =
            "some avg10=1.00 avg60=0.00 avg300=0.00 total=7\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1500\n";
        assert_eq!(full_total(text), Some(Duration::from_micros(1500)));
        assert_eq!(full_total("some avg10=1.00 total=7\n"), None);
        assert_eq!(full_total(""), None);
    }

    #[test]
    fn this_host_has_memory_and_says_how_much_of_it_is_left() {
        let signals = Signals::find();
        let reading = signals.read().unwrap();
        assert!(reading.available > Pages::ZERO && reading.available.bytes() <= host::memory().unwrap().total);
        assert!(signals.total() >= reading.available.bytes());
        assert_eq!(reading.stalled.is_some(), signals.has_pressure());
    }
}

//! Simulated hosts: many of them at once, from a scenario or from a trace, and what is written about them.
//!
//! ```text
//!  --scenario NAME ─► memcg_core::sim::synthetic ─┐                                       ┌─► a table (cli/sim.rs)
//!                                                 ├─► Fleet: hosts, on all CPUs ─► Results┼─► CSV
//!  TRACE ─► trace.rs ─────────────────────────────┘                                       └─► SVG
//!    ▲
//!    └── ballast record, from a controller that runs
//! ```
//!
//! A host knows nothing of another, so each is simulated by whichever thread has time, and the results are put in order
//! afterwards: the same setups have the same results to the byte, however many CPUs there are.

pub mod csv;
pub mod plot;
pub mod trace;

use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use memcg_core::sim::synthetic::Scenario;
use memcg_core::sim::{Host, Outcome, Policy, Sample, Setup, SetupError, Sums, fairness};

/// Hosts to be simulated.
#[derive(Clone, Debug)]
pub enum Fleet {
    /// Made from a seed.
    Drawn {
        /// What they are like.
        scenario: Scenario,
        /// Each seed makes others.
        seed: u64,
        /// How many.
        hosts: u64,
        /// VMs on all of them.
        vms: u64,
    },
    /// One that is known.
    Known(Box<Setup>),
}

/// What has become of all hosts under one policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// The policy.
    pub policy: Policy,
    /// The hosts, in their order.
    pub hosts: Vec<Outcome>,
}

impl Fleet {
    /// How many hosts there are.
    pub fn hosts(&self) -> u64 {
        match self {
            Self::Drawn { hosts, .. } => *hosts,
            Self::Known(_) => 1,
        }
    }

    /// How many VMs there are on all hosts.
    pub fn vms(&self) -> u64 {
        match self {
            Self::Drawn { vms, .. } => *vms,
            Self::Known(setup) => setup.vms.len() as u64,
        }
    }

    /// The host with this number, for so long.
    fn setup(&self, index: u64, lasts: Duration) -> Setup {
        match self {
            Self::Drawn { scenario, seed, hosts, vms } => {
                // Where they cannot be divided evenly the first hosts have one more.
                let here = vms / hosts + u64::from(index < vms % hosts);
                scenario.host(*seed, index, here, lasts)
            }
            Self::Known(setup) => (**setup).clone(),
        }
    }

    /// Simulates all hosts for so long under a policy, and looks at them every so often.
    ///
    /// # Errors
    /// When a host cannot be.
    pub fn run(&self, policy: Policy, lasts: Duration, every: Duration) -> Result<Results, SetupError> {
        let next = AtomicU64::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= self.hosts() {
                    return done;
                }
                let setup = Setup { policy, ..self.setup(index, lasts) };
                done.push((index, Host::new(setup).map(|host| host.run(lasts, every))));
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
        let mut all: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("a simulation does not panic")).collect()
        });
        all.sort_unstable_by_key(|(index, _)| *index);
        let hosts = all.into_iter().map(|(_, outcome)| outcome).collect::<Result<_, _>>()?;
        Ok(Results { policy, hosts })
    }
}

impl Results {
    /// All hosts together.
    pub fn sums(&self) -> Sums {
        self.hosts.iter().fold(Sums::default(), |sums, host| sums.and(host.sums))
    }

    /// How evenly all VMs got what they wanted, by Jain's index.
    pub fn fairness(&self) -> f64 {
        fairness(self.hosts.iter().flat_map(|host| &host.vms))
    }

    /// Time that VMs wanted to run, all together.
    pub fn wanted(&self) -> Duration {
        self.hosts.iter().flat_map(|host| &host.vms).map(|vm| vm.wanted).sum()
    }

    /// All hosts together, from time to time.
    pub fn samples(&self) -> Vec<Sample> {
        let count = self.hosts.iter().map(|host| host.samples.len()).min().unwrap_or(0);
        let at = |index: usize| {
            let samples = self.hosts.iter().map(|host| host.samples[index]);
            samples.fold(Sample::default(), |all, one| Sample {
                at: one.at,
                available: all.available + one.available,
                used: all.used + one.used,
                swapped: all.swapped + one.swapped,
                running: all.running + one.running,
                paused: all.paused + one.paused,
                sums: all.sums.and(one.sums),
            })
        };
        (0..count).map(at).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(hosts: u64, vms: u64) -> Fleet {
        Fleet::Drawn { scenario: *Scenario::find("mixed").unwrap(), seed: 7, hosts, vms }
    }

    #[test]
    fn vms_are_divided_among_hosts_and_none_is_lost() {
        let fleet = drawn(3, 8);
        let each: Vec<_> = (0..3).map(|index| fleet.setup(index, Duration::from_secs(60)).vms.len()).collect();
        assert_eq!(each, [3, 3, 2]);
    }

    #[test]
    fn results_do_not_depend_on_which_thread_was_faster() {
        let run = || drawn(5, 50).run(Policy::Proportional, Duration::from_secs(300), Duration::from_secs(60)).unwrap();
        let once = run();
        assert_eq!(once, run());
        assert_eq!(csv::table(std::slice::from_ref(&once)), csv::table(&[run()]));
        assert_eq!(once.samples().len(), 6);
        assert!(once.fairness() <= 1.0 + 1e-9 && once.wanted() <= Duration::from_secs(300 * 50));
    }
}

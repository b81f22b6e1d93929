//! Simulated hosts as a table with commas, for other tools.

use std::fmt::Write;
use std::time::Duration;

use memcg_core::sim::Sample;

use super::Results;

/// The columns. Amounts that only rise are since the start; times of VMs are added up.
const HEADER: &str = "policy,host,at_s,available_bytes,used_bytes,swapped_bytes,running,paused,reclaimed_bytes,\
                      refaulted_bytes,stalled_s,paused_s,pauses,kills,exhausted_s";

/// A line for each host and each moment, under each policy.
pub fn table(results: &[Results]) -> String {
    let mut text = format!("{HEADER}\n");
    for results in results {
        for (index, host) in results.hosts.iter().enumerate() {
            for sample in &host.samples {
                let Sample { available, used, swapped, running, paused, sums, .. } = *sample;
                // Writing to a string cannot fail.
                let _ = writeln!(
                    text,
                    "{},{index},{},{},{},{},{running},{paused},{},{},{},{},{},{},{}",
                    results.policy.name(),
                    seconds(sample.at),
                    available.bytes(),
                    used.bytes(),
                    swapped.bytes(),
                    (sums.evicted + sums.given).bytes(),
                    sums.refaulted.bytes(),
                    seconds(sums.stalled),
                    seconds(sums.paused),
                    sums.pauses,
                    sums.kills,
                    seconds(sums.exhausted),
                );
            }
        }
    }
    text
}

/// Seconds with three decimals.
fn seconds(time: Duration) -> String {
    format!("{}.{:03}", time.as_secs(), time.subsec_millis())
}

#[cfg(test)]
mod tests {
    use memcg_core::sim::{Outcome, Policy, Sums};
    use memcg_core::units::Pages;

    use super::*;

    #[test]
    fn each_line_has_a_value_for_each_column() {
        let sums = Sums { evicted: Pages(1), given: Pages(2), stalled: Duration::from_millis(1500), ..Sums::default() };
        let sample = Sample { at: Duration::from_secs(60), used: Pages(3), running: 4, sums, ..Sample::default() };
        let hosts = vec![Outcome { samples: vec![sample], ..Outcome::default() }];
        let text = table(&[Results { policy: Policy::NoIdleTax, hosts }]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1], "no-idle-tax,0,60.000,0,12288,0,4,0,12288,0,1.500,0.000,0,0,0.000");
        assert_eq!(lines[0].split(',').count(), lines[1].split(',').count());
    }
}

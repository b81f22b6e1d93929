//! What a well-behaved guest notices of a hostile one beside it.
//!
//! Both have one vCPU. The baseline is the same guest beside one that is as busy and does nothing to anybody: a machine
//! with two CPUs has no third for those who wait. Latency is what the guest itself measures, one touch of a new page after
//! the other.

use ballast_tests::payload;
use ballast_tests::serve::{Console, Serve};
use serde_json::json;

use crate::vm::field;
use crate::{Goal, MIB, Outcome, full, median, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 1] = ["neighbour_latency"];

/// Measures one of [`IDS`].
pub fn measure(_id: &str) -> Result<Outcome, String> {
    Ok(beside())
}

/// Who is not hostile, only busy.
const BUSY: &str = "touch 16M 8M passes=1000000";

/// The hostile: a name, and what they do for ever.
const HOSTILE: [(&str, &str); 8] = [
    ("storm", "storm"),
    ("refault", "rewrite 16M 80M"),
    ("flood", "balloon init; balloon evil flood 32M 32M touch=1"),
    ("resets", "balloon init; balloon evil reset 32M 4M rounds=100000000"),
    ("kicks", "balloon init; balloon evil kicks 0 1000000000"),
    ("never", "balloon init; touch 16M 64M passes=1000000"),
    ("slow", "balloon init; touch 16M 32M; balloon auto 16M 32M rounds=0 limit=1 every=5000"),
    ("duplicates", "balloon init; balloon evil numbers 0 8192 4000000000 step=0"),
];

/// p50 and p99 of a guest's touches beside another guest, in nanoseconds.
fn touches(neighbour: &str) -> (f64, f64) {
    let serve = Serve::start(&[]);
    let vm = |cmdline: &str| {
        json!({
            "kernel": payload(), "cmdline": cmdline, "debug_port": true,
            "memory": { "size_bytes": 128 * MIB, "max_bytes": 96 * MIB },
        })
    };
    let good = serve.create_with("good", &vm("shell"));
    let mut console = Console::of(&good);
    console.expect("READY", 20);
    serve.create_with("other", &vm(&format!("mark 1; {neighbour}")));
    ballast_tests::wait_until("the other guest has begun", 20, || {
        serve.raw("GET", "/vms/other/console", None).1.contains("MARK 1").then_some(())
    });
    // Every other page: one fault each.
    console.send("latency 16M 80M stride=8K");
    let answer = console.expect("OK latency", 120);
    (field(&answer, "p50_ns"), field(&answer, "p99_ns"))
}

/// The worst of all neighbours: p99 beside each over p99 beside one that is only busy, the median of some pairs.
fn beside() -> Outcome {
    let (mut notes, mut worst): (String, (f64, Vec<f64>)) = (String::new(), (0.0, Vec::new()));
    for (name, commands) in HOSTILE {
        let runs = pairs(full(3, 7), || touches(BUSY), || touches(commands));
        let ratios: Vec<f64> = runs.iter().map(|(calm, hostile)| hostile.1 / calm.1).collect();
        let p99 = median(ratios.iter().copied());
        let p50 = median(runs.iter().map(|(calm, hostile)| hostile.0 / calm.0));
        let calm_us = median(runs.iter().map(|(calm, _)| calm.1 / 1000.0));
        notes += &format!("{name}={p99:.2} {name}_p50={p50:.2} {name}_baseline_us={calm_us:.0} ");
        if p99 > worst.0 {
            worst = (p99, ratios);
        }
    }
    let goal = Goal::AtMost { floor: 1.5, target: 1.2 };
    Outcome { id: "neighbour_latency", name: "neighbour_latency", unit: "x", goal, values: worst.1, notes }
}

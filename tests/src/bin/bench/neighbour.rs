//! What a well-behaved guest notices of a hostile one beside it.
//!
//! Both have one vCPU. Its own baseline is what the good guest has beside one that does nothing, or beside one that is busy
//! and does nothing to anybody, whichever is worse: where wakes across CPUs are dear, a neighbour that leaves a CPU free is
//! no better than one that does not. Latency is what the guest itself measures, one touch of a new page after the other.

use ballast_tests::payload;
use ballast_tests::serve::{Console, Serve};
use serde_json::json;

use crate::vm::field;
use crate::{Goal, MIB, Outcome, full, median};

/// The benchmarks of this file.
pub const IDS: [&str; 1] = ["neighbour_latency"];

/// Measures one of [`IDS`].
pub fn measure(_id: &str) -> Result<Outcome, String> {
    Ok(beside())
}

/// Who is not hostile: idle, and busy.
const INNOCENT: [&str; 2] = ["shell", "touch 16M 8M passes=1000000"];

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

/// p50 and p99 of a guest's touches, in nanoseconds.
type Touches = (f64, f64);

/// Those of a guest beside another guest.
fn touches(neighbour: &str) -> Touches {
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

/// One round: beside the innocent, and beside each of the hostile; every other time the other way round.
fn round(i: usize) -> ([Touches; 2], [Touches; HOSTILE.len()]) {
    let hostile = || HOSTILE.map(|(_, commands)| touches(commands));
    if i.is_multiple_of(2) {
        return (INNOCENT.map(touches), hostile());
    }
    let hostile = hostile();
    (INNOCENT.map(touches), hostile)
}

/// The worst of all neighbours: p99 beside each over the baseline of the same round, the median of some rounds.
fn beside() -> Outcome {
    // The first touch of the host's own memory is slower than all others: not counted.
    let _ = touches(INNOCENT[0]);
    let rounds: Vec<_> = (0..full(7, 15)).map(round).collect();
    let [idle, busy] = [0, 1].map(|n| median(rounds.iter().map(|(calm, _)| calm[n].1 / 1000.0)));
    let mut notes = format!("idle_us={idle:.0} busy_us={busy:.0} ");
    let mut worst: (f64, Vec<f64>) = (0.0, Vec::new());
    for (n, (name, _)) in HOSTILE.iter().enumerate() {
        let over = |what: fn(&Touches) -> f64| -> Vec<f64> {
            rounds.iter().map(|(calm, hostile)| what(&hostile[n]) / what(&calm[0]).max(what(&calm[1]))).collect()
        };
        let (p50, p99) = (over(|touch| touch.0), over(|touch| touch.1));
        let ratio = median(p99.iter().copied());
        notes += &format!("{name}={ratio:.2} {name}_p50={:.2} ", median(p50.into_iter()));
        if ratio > worst.0 {
            worst = (ratio, p99);
        }
    }
    let goal = Goal::AtMost { floor: 1.5, target: 1.2 };
    Outcome { id: "neighbour_latency", name: "neighbour_latency", unit: "x", goal, values: worst.1, notes }
}

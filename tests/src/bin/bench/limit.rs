//! What happens at a limit.

use ballast_tests::{PAGE, TestVm, number, resident_pages, wait_until};
use serde_json::json;

use crate::{Goal, MIB, Outcome, full};

/// The benchmarks of this file.
pub const IDS: [&str; 2] = ["R15", "hold"];

/// Measures one of [`IDS`].
pub fn measure(id: &str) -> Result<Outcome, String> {
    Ok(if id == "R15" { overshoot() } else { hold() })
}

/// A storm of two vCPUs, held at its limit of 32 MiB.
fn storm(name: &str) -> TestVm {
    let vm = TestVm::builder(name).memory("size=1G,max=32M").option("--cpus", "2").option("--oom", "deadline=60s");
    let vm = vm.cmdline("storm").start();
    vm.wait_state("running", 20);
    vm
}

/// Waits until the guest is held, and gives it a MiB more: the `i`th.
fn raise(vm: &TestVm, i: u64) {
    wait_until("the guest is held", 20, || (vm.show()["held"]["now"] == true).then_some(()));
    let (status, body) = vm.patch("", &json!({"max_bytes": 32 * MIB + i * MIB}));
    assert_eq!(status, 200, "{body}");
}

/// R15: by how many pages a storm exceeds a limit that is raised again and again. Its pages are counted in the worker's
/// page tables all the time, each time against the limit that was in force when the count was complete.
fn overshoot() -> Outcome {
    let vm = storm("overshoot");
    let (mut samples, mut peak, mut closest) = (0u64, 0, u64::MAX);
    let mut values = Vec::new();
    for i in 1..=full(20, 60) as u64 {
        let mut over = 0;
        for _ in 0..20 {
            let vm = vm.show();
            let resident = resident_pages(&vm);
            let max = number(&vm, "memory.max_bytes") / PAGE;
            over = over.max(resident.saturating_sub(max));
            (peak, closest) = (peak.max(resident), closest.min(max.saturating_sub(resident)));
            samples += 1;
        }
        values.push(over as f64);
        raise(&vm, i);
    }
    let worst = values.iter().fold(0.0, |worst: f64, value| worst.max(*value));
    // The figure is the worst that was ever seen, not what is usual.
    let notes = format!("samples={samples} peak_pages={peak} closest_pages={closest} steps={} ", values.len());
    // Two granules of 64 KiB, and 64 pages in stock on each CPU.
    let goal = Goal::AtMost { floor: 2.0 * 16.0 + 2.0 * 64.0, target: 0.0 };
    Outcome { id: "R15", name: "limit_overshoot", unit: "pages", goal, values: vec![worst], notes }
}

/// Many holds: a storm at a limit that is raised again and again.
fn hold() -> Outcome {
    let vm = storm("hold");
    (1..=full(100, 400) as u64).for_each(|i| raise(&vm, i));
    let hold = vm.show()["faults"]["hold"].clone();
    let [p50, p99, max] = ["p50_us", "p99_us", "max_us"].map(|k| number(&hold, k) as f64 / 1000.0);
    let notes = format!("p50={p50:.3} p99={p99:.3} worst={max:.3} holds={} ", number(&hold, "count"));
    let goal = Goal::AtMost { floor: 10.0, target: 1.0 };
    Outcome { id: "hold", name: "hold", unit: "ms", goal, values: vec![p99], notes }
}

//! What free page reporting costs a guest that allocates and frees all the time.

use ballast_tests::{TestVm, number};

use crate::vm::field;
use crate::{Goal, Outcome, full, median, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 1] = ["R28"];

/// Measures one of [`IDS`].
pub fn measure(_id: &str) -> Result<Outcome, String> {
    Ok(tax())
}

/// One run: cycles of the guest, blocks that it reported and those that it used again, and of the reported pages those
/// that were discarded and those that were left alone.
struct Run {
    cycles: f64,
    reported: f64,
    returned: f64,
    discarded: f64,
    left: f64,
}

/// Blocks of 2 MiB, and reports every two seconds, as in Linux.
fn run(report: bool) -> Run {
    let mut vm = TestVm::builder("bench")
        .memory("size=512M,max=512M")
        .option("--balloon", "free_page_reporting=on")
        .cmdline("shell")
        .start();
    vm.expect("READY", 20);
    // As a guest that has run for a time: all of its memory was in use once.
    for command in ["balloon init features=0x20", "touch 16M 256M"] {
        let answer = vm.command(command, 60);
        assert!(answer.starts_with("OK"), "{answer}");
    }
    // Long enough for some reports.
    let steps = full(2_000_000, 6_000_000);
    let answer =
        vm.command(&format!("balloon allocate 16M 256M passes=2 steps={steps} report={}", u8::from(report)), 300);
    let now = vm.show();
    let run = Run {
        cycles: field(&answer, "cycles"),
        reported: field(&answer, "reported"),
        returned: field(&answer, "returned"),
        discarded: number(&now, "faults.reported_pages") as f64,
        left: number(&now, "faults.reported_left_pages") as f64,
    };
    assert_eq!(report, run.reported > 0.0 && run.discarded > 0.0, "what is measured is reports: {answer}, {now}");
    run
}

/// R28: the time of a guest's allocations with reports over that without.
fn tax() -> Outcome {
    let runs = pairs(full(5, 11), || run(false), || run(true));
    let notes = format!(
        "reported_blocks={:.0} used_again={:.0} discarded_pages={:.0} left_pages={:.0} ",
        median(runs.iter().map(|run| run.1.reported)),
        median(runs.iter().map(|run| run.1.returned)),
        median(runs.iter().map(|run| run.1.discarded)),
        median(runs.iter().map(|run| run.1.left)),
    );
    let values = runs.iter().map(|(off, on)| on.cycles / off.cycles).collect();
    let goal = Goal::AtMost { floor: 1.10, target: 1.03 };
    Outcome { id: "R28", name: "reporting_tax", unit: "x", goal, values, notes }
}

//! The figures of the pure core: criterion's medians of `memcg-core/benches/core.rs`, and what a record weighs.

use std::path::PathBuf;
use std::process::Command;

use memcg_core::frame::{FrameState, FrameTable, List};
use serde_json::Value;

use crate::{Goal, Outcome};

/// A benchmark of the core.
struct Figure {
    id: &'static str,
    /// Criterion's group and function.
    bench: &'static str,
    /// What it is compared with, of the same run.
    baseline: &'static str,
    /// The same with what goes before it in use; its time is printed as well.
    whole: Option<&'static str>,
    unit: &'static str,
    /// Nanoseconds in the unit.
    scale: f64,
    goal: Goal,
}

/// Figures in nanoseconds, the last two in milliseconds.
const FIGURES: [Figure; 6] = [
    Figure::new("charge", "charge/stock", "atomic_add", 5.0),
    Figure::new("charge4", "charge/four_levels", "atomic_add", 40.0),
    Figure::new("lru", "lru/insert_move", "memcpy_record", 25.0),
    Figure::new("lru_run", "lru/run_512", "memcpy_record", 1.0),
    Figure::new("spread", "policy/spread_10000", "memcpy_record", 2.0).in_ms("policy/spread_from_tree"),
    Figure::new("rank", "policy/rank_10000", "memcpy_record", 2.0).in_ms("policy/rank_from_tree"),
];

impl Figure {
    const fn new(id: &'static str, bench: &'static str, baseline: &'static str, target: f64) -> Figure {
        let goal = Goal::AtMost { floor: 2.0 * target, target };
        Figure { id, bench, baseline, whole: None, unit: "ns", scale: 1.0, goal }
    }

    const fn in_ms(self, whole: &'static str) -> Figure {
        Figure { whole: Some(whole), unit: "ms", scale: 1e6, ..self }
    }
}

/// The ids that are measured by criterion.
pub const IDS: [&str; FIGURES.len()] = ["charge", "charge4", "lru", "lru_run", "spread", "rank"];

/// Runs the benchmarks of the core behind `ids`, each with its baselines, in one run of criterion.
pub fn measure(ids: &[&str]) -> Vec<Outcome> {
    let figures: Vec<&Figure> = FIGURES.iter().filter(|figure| ids.contains(&figure.id)).collect();
    if figures.is_empty() {
        return Vec::new();
    }
    let names: Vec<&str> = figures.iter().flat_map(|figure| [Some(figure.bench), figure.whole]).flatten().collect();
    let seconds = if std::env::var_os("BALLAST_FULL").is_some() { "5" } else { "1" };
    let run = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["bench", "--quiet", "--package", "memcg-core", "--bench", "core", "--"])
        .args(["--warm-up-time", "0.5", "--measurement-time", seconds])
        .arg(format!("^(baseline/.*|{})$", names.join("|")))
        .output()
        .expect("cargo starts");
    assert!(run.status.success(), "cargo bench -p memcg-core has failed: {}", String::from_utf8_lossy(&run.stderr));
    figures.into_iter().map(outcome).collect()
}

fn outcome(figure: &Figure) -> Outcome {
    let (ns, each) = median(figure.bench);
    let (plain, _) = median(&format!("baseline/{}", figure.baseline));
    // A decision about all VMs is one figure; `times` is always for each.
    let value = if figure.whole.is_some() { ns } else { ns / each } / figure.scale;
    let whole = figure.whole.map(|bench| format!("from_tree={:.3} ", median(bench).0 / figure.scale));
    let notes = format!(
        "baseline={} baseline_ns={plain:.2} times={:.2} {}",
        figure.baseline,
        ns / each / plain,
        whole.unwrap_or_default()
    );
    Outcome { id: figure.id, name: figure.id, unit: figure.unit, goal: figure.goal, values: vec![value], notes }
}

/// Criterion's median in nanoseconds, and how many elements that is for.
fn median(bench: &str) -> (f64, f64) {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let read = |file: &str| -> Value {
        let path = target.join("criterion").join(bench).join("new").join(file);
        let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{} cannot be read: {e}", path.display()));
        serde_json::from_slice(&text).expect("criterion writes JSON")
    };
    let ns = read("estimates.json")["median"]["point_estimate"].as_f64().expect("criterion estimates a median");
    let each = read("benchmark.json")["throughput"]["Elements"].as_f64().unwrap_or(1.0);
    (ns, each)
}

/// R20: what the process grows by for each page that has a record, list links and all in use.
pub fn record_bytes() -> Outcome {
    const PAGES: usize = 1 << 22;
    let before = resident_bytes();
    let mut frames = FrameTable::new(PAGES);
    // Neighbours in different states and generations: no block is one entry, each page has its links and its age.
    for page in 0..PAGES {
        frames.set(page, FrameState::Active);
    }
    frames.advance_generation();
    for page in (1..PAGES).step_by(2) {
        frames.set(page, FrameState::Moving);
        frames.set(page, FrameState::Idle);
        frames.touch(page);
    }
    let grown = resident_bytes().saturating_sub(before);
    assert_eq!(frames.count(FrameState::Idle), PAGES as u64 / 2);
    assert_eq!(frames.entries(List::Active) + frames.entries(List::Idle), PAGES, "each page is an entry of its own");
    Outcome {
        id: "R20",
        name: "record_bytes",
        unit: "bytes",
        goal: Goal::AtMost { floor: 24.0, target: 12.0 },
        values: vec![grown as f64 / PAGES as f64],
        notes: format!("pages={PAGES} grown_bytes={grown} "),
    }
}

/// Resident memory of this process.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("/proc is mounted");
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number of pages");
    pages * 4096
}

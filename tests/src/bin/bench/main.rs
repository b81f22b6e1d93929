//! Benchmarks behind `scripts/bench`: ratios of interleaved runs, one line each.
//!
//! ```text
//! BENCH R1 first_touch_seq ratio=3.31 unit=x floor>=1.00 target>=3.00 pairs=7 min=3.02 max=3.60 backend=pvm PASS
//! ```
//! Each run is a VM of the real program, started afresh; the guest says when it begins and ends by the mark port, whose
//! times are the host's monotonic clock. The baselines are the same payload on the same program without accounting, and
//! (`bare`) a minimal userfaultfd handler without any.

mod age;
mod bare;
mod core;
mod cost;
mod discard;
mod evict;
mod fault;
mod limit;
mod many;
mod memcg;
mod neighbour;
mod oom;
mod overload;
mod plot;
mod qemu;
mod report;
mod vm;

use std::path::Path;
use std::process::ExitCode;

use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// The direction in which a figure is good.
#[derive(Clone, Copy)]
enum Goal {
    AtLeast { floor: f64, target: f64 },
    AtMost { floor: f64, target: f64 },
}

/// One benchmark's outcome.
struct Outcome {
    id: &'static str,
    name: &'static str,
    unit: &'static str,
    goal: Goal,
    /// The value of each pair; the median is the figure.
    values: Vec<f64>,
    /// More `key=value` for the line.
    notes: String,
}

impl Outcome {
    /// Prints the line; true when the floor holds.
    fn print(&self, backend: &str) -> bool {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted[sorted.len() / 2];
        let (sign, floor, target) = match self.goal {
            Goal::AtLeast { floor, target } => (">=", floor, target),
            Goal::AtMost { floor, target } => ("<=", floor, target),
        };
        let reaches = |bound: f64| if sign == ">=" { median >= bound } else { median <= bound };
        let verdict = match (reaches(target), reaches(floor)) {
            (true, _) => "PASS",
            (false, true) => "FLOOR",
            (false, false) => "FAIL",
        };
        println!(
            "BENCH {} {} ratio={median:.3} unit={} floor{sign}{floor:.2} target{sign}{target:.2} pairs={} min={:.3} max={:.3} {}backend={backend} {verdict}",
            self.id,
            self.name,
            self.unit,
            self.values.len(),
            sorted[0],
            sorted[sorted.len() - 1],
            self.notes,
        );
        verdict != "FAIL"
    }

    fn json(&self, backend: &str) -> Value {
        json!({"id": self.id, "name": self.name, "unit": self.unit, "values": self.values, "notes": self.notes.trim(),
            "backend": backend, "kernel": std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim()})
    }
}

/// Benchmarks that belong together, and how one of them is measured: the error is what this host lacks for it.
type Family = (&'static [&'static str], fn(&str) -> Result<Outcome, String>);

/// All but those of the core, which are measured together.
const FAMILIES: [Family; 12] = [
    (&fault::IDS, fault::measure),
    (&discard::IDS, discard::measure),
    (&limit::IDS, limit::measure),
    (&evict::IDS, evict::measure),
    (&report::IDS, report::measure),
    (&age::IDS, age::measure),
    (&neighbour::IDS, neighbour::measure),
    (&oom::IDS, oom::measure),
    (&cost::IDS, cost::measure),
    (&many::IDS, |id| Ok(many::measure(id))),
    (&qemu::IDS, qemu::measure),
    (&overload::IDS, overload::measure),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    bare::serve(&arguments);
    if arguments.first().is_some_and(|a| a == "child") {
        let words = &arguments[1..];
        return ExitCode::from(u8::from(
            !(cost::child(words)
                || many::child(words)
                || memcg::child(words)
                || oom::child(words)
                || overload::child(words)),
        ));
    }
    // The baselines are 4 KiB pages: no huge pages for this process and all that it starts.
    vm::huge_pages(false);
    if let [what, directory] = &arguments[..]
        && what == "plot"
    {
        return match plot::draw(Path::new(directory)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                eprintln!("bench: the pictures cannot be drawn: {e}");
                ExitCode::FAILURE
            }
        };
    }
    let all = FAMILIES.iter().flat_map(|(ids, _)| ids.iter().copied()).chain(["R20"]).chain(core::IDS);
    let wanted: Vec<&str> =
        if arguments.is_empty() { all.collect() } else { arguments.iter().map(String::as_str).collect() };
    let backend = backend();
    let mut ok = true;
    let mut results = Vec::new();
    let mut of_core = core::measure(&wanted);
    for id in wanted {
        let family = FAMILIES.iter().find(|(ids, _)| ids.contains(&id));
        let measured = match (family, of_core.iter().position(|outcome| outcome.id == id)) {
            (Some((_, measure)), _) => measure(id),
            (None, Some(index)) => Ok(of_core.swap_remove(index)),
            (None, None) if id == "R20" => Ok(core::record_bytes()),
            (None, None) => Err("no-such-benchmark".to_owned()),
        };
        match measured {
            Ok(outcome) => {
                ok &= outcome.print(backend);
                results.push(outcome.json(backend));
            }
            Err(why) => {
                println!("BENCH {id} - SKIP reason={why}");
                ok = false;
            }
        }
    }
    if let Some(path) = std::env::var_os("BALLAST_BENCH_JSON") {
        let text = serde_json::to_string_pretty(&results).unwrap_or_default();
        if let Err(e) = std::fs::write(Path::new(&path), text) {
            eprintln!("bench: {} cannot be written: {e}", Path::new(&path).display());
            ok = false;
        }
    }
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Which KVM this is; absolute figures do not travel between them.
fn backend() -> &'static str {
    [("kvm_pvm", "pvm"), ("kvm_intel", "vmx"), ("kvm_amd", "svm")]
        .into_iter()
        .find(|(module, _)| Path::new("/sys/module").join(module).exists())
        .map_or("unknown", |(_, name)| name)
}

/// Runs A B B A … and returns the pairs.
fn pairs<A, B>(n: usize, mut a: impl FnMut() -> A, mut b: impl FnMut() -> B) -> Vec<(A, B)> {
    // The first touch of the host's own memory is slower than all others: not counted.
    drop((a(), b()));
    (0..n)
        .map(|i| match i % 2 {
            0 => {
                let first = a();
                (first, b())
            }
            _ => {
                let second = b();
                (a(), second)
            }
        })
        .collect()
}

fn full(short: usize, long: usize) -> usize {
    if std::env::var_os("BALLAST_FULL").is_some() { long } else { short }
}

/// The middle one of some values.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

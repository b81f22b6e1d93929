//! First touches: how fast a charged guest gets its memory, against guests that nobody counts.

use ballast::worker::gate::monotonic_ns;
use ballast_tests::{TestVm, number};
use memcg_core::frame::{FrameState, FrameTable};
use memcg_core::stock::Stock;
use memcg_core::units::Pages;
use serde_json::Value;

use crate::bare::{self, Handler, Place};
use crate::vm::{Run, field, run};
use crate::{Goal, MIB, Outcome, full, median, pairs};

/// The benchmarks of this file.
pub const IDS: [&str; 10] = ["R1", "R1v2", "R2", "R2v2", "R3", "R4", "R5", "R6", "bloat", "fault_wait"];

/// Measures one of [`IDS`].
pub fn measure(id: &str) -> Result<Outcome, String> {
    Ok(match id {
        "R1" => first_touch("R1", 1),
        "R1v2" => first_touch("R1v2", 2),
        "R2" => huge_touch("R2", 1),
        "R2v2" => huge_touch("R2v2", 2),
        "R3" => random_touch(),
        "R4" => charge_cost(),
        "R5" => placement(),
        "R6" => scaling(),
        "bloat" => bloat(),
        _ => fault_wait(),
    })
}

/// What R1 and R2 touch, and its pages.
const STRETCH: u64 = 256 * MIB;
const STRETCH_PAGES: f64 = (STRETCH / 4096) as f64;

fn stretch(cpus: u32) -> &'static str {
    if cpus == 1 { "touch 16M 256M seed=1" } else { "touch 16M 256M seed=1 cpus=all" }
}

/// R1: sequential first touch of 256 MiB, unmanaged time over charged time.
fn first_touch(id: &'static str, cpus: u32) -> Outcome {
    let work = stretch(cpus);
    let runs = pairs(full(9, 21), || run("size=320M", cpus, work), || run("size=320M,max=320M", cpus, work));
    let (plain, charged) = &runs[runs.len() / 2];
    let notes = format!(
        "{}plain_us_per_page={:.2} plain_cpu_s_per_gib={:.2} ",
        described(charged),
        plain.ns as f64 / 1000.0 / STRETCH_PAGES,
        cpu_s_per_gib(plain),
    );
    let target = if cpus == 1 { 3.0 } else { 5.0 };
    let values = runs.iter().map(|(plain, charged)| plain.ns as f64 / charged.ns as f64).collect();
    Outcome { id, name: "first_touch_seq", unit: "x", goal: Goal::AtLeast { floor: 1.0, target }, values, notes }
}

/// R2: the same against an unmanaged guest that the host gives huge pages.
fn huge_touch(id: &'static str, cpus: u32) -> Outcome {
    let work = stretch(cpus);
    let huge = || bare::ns(Handler::Huge, Place::Ours, cpus, work);
    let runs = pairs(full(9, 21), huge, || run("size=320M,max=320M", cpus, work));
    let (huge, charged) = &runs[runs.len() / 2];
    let notes = format!("{}huge_us_per_page={:.2} ", described(charged), *huge as f64 / 1000.0 / STRETCH_PAGES);
    let values = runs.iter().map(|(huge, charged)| *huge as f64 / charged.ns as f64).collect();
    let goal = Goal::AtLeast { floor: 0.5, target: 1.0 };
    Outcome { id, name: "first_touch_huge", unit: "x", goal, values, notes }
}

/// A charged run of 256 MiB in absolute numbers.
fn described(charged: &Run) -> String {
    let (touched, around) = (number(&charged.faults, "touched_pages"), number(&charged.faults, "around_pages"));
    format!(
        "us_per_page={:.2} charged_touched={:.3} faults={touched} cpu_s_per_gib={:.2} ",
        charged.ns as f64 / 1000.0 / STRETCH_PAGES,
        (touched + around) as f64 / STRETCH_PAGES,
        cpu_s_per_gib(charged),
    )
}

fn cpu_s_per_gib(run: &Run) -> f64 {
    run.cpu_ms as f64 / 1000.0 * (1024 * MIB / STRETCH) as f64
}

/// CPU time of the worker between the marks for each GiB in single faults; the median of some runs of `faults`.
fn cpu_s_per_gib_of<'a>(runs: impl Iterator<Item = &'a Run>, faults: f64) -> f64 {
    median(runs.map(|run| run.cpu_ns as f64)) / 1e9 / (faults * 4096.0 / (1024 * MIB) as f64)
}

/// R3: one page in each 2 MiB, our time over that of a minimal handler.
fn random_touch() -> Outcome {
    let work = "touch 16M 2000M stride=2M seed=1";
    let bare = || bare::ns(Handler::Granule(1), Place::Ours, 1, work);
    let runs = pairs(full(7, 15), bare, || run("size=2080M,track=on", 1, work));
    let values = runs.iter().map(|(bare, ours)| ours.ns as f64 / *bare as f64).collect();
    let notes = format!(
        "us_per_fault={:.1} cpu_s_per_gib={:.2} ",
        median(runs.iter().map(|run| run.1.ns as f64)) / 1e6,
        cpu_s_per_gib_of(runs.iter().map(|run| &run.1), 1000.0),
    );
    let goal = Goal::AtMost { floor: 1.10, target: 1.03 };
    Outcome { id: "R3", name: "random_first_touch", unit: "x", goal, values, notes }
}

/// R4: what counting costs: the time of a page's charge over the time of its first touch, as 1 + share. The whole run
/// against the same fault-around without any account is printed too.
fn charge_cost() -> Outcome {
    let work = stretch(1);
    let bare = || bare::ns(Handler::Around, Place::Ours, 1, work);
    let runs = pairs(full(31, 61), bare, || run("size=320M,track=on", 1, work).ns);
    let values = runs.iter().map(|(_, ours)| 1.0 + charge_ns() / (*ours as f64 / STRETCH_PAGES)).collect();
    let whole = median(runs.iter().map(|(bare, ours)| *ours as f64 / *bare as f64));
    let notes = format!("charge_ns_per_page={:.2} end_to_end={whole:.3} ", charge_ns());
    let goal = Goal::AtMost { floor: 1.05, target: 1.01 };
    Outcome { id: "R4", name: "charge_cost", unit: "x", goal, values, notes }
}

/// Nanoseconds that stock and frame table take for one page when granules of 16 are charged and committed.
fn charge_ns() -> f64 {
    const PAGES: u64 = 1 << 18;
    let mut frames = FrameTable::new(PAGES as usize);
    let mut stock = Stock::new(Pages(0));
    stock.grant(1, PAGES, Pages(PAGES), None).expect("a first grant");
    let start = monotonic_ns();
    for first in (0..PAGES as usize).step_by(16) {
        if let (FrameState::Absent, _) = frames.run(first, first + 16)
            && let Some(reservation) = stock.prepare(Pages(16))
        {
            reservation.commit(Pages(16));
            frames.set_range(first, first + 16, FrameState::Active);
        }
    }
    let ns = (monotonic_ns() - start) as f64 / PAGES as f64;
    assert_eq!(frames.count(FrameState::Active), PAGES);
    ns
}

/// R5: one page in each 2 MiB with a handler on another CPU than the vCPU, over ours, where we have it run.
fn placement() -> Outcome {
    let work = "touch 16M 2000M stride=2M seed=1; touch 16M 2000M stride=1M seed=1";
    let naive = || bare::ns(Handler::Granule(1), Place::Apart, 1, work);
    let runs = pairs(full(7, 15), naive, || run("size=2080M,track=on", 1, work));
    let values = runs.iter().map(|(naive, ours)| *naive as f64 / ours.ns as f64).collect();
    let us = |ns: f64| ns / 1000.0 / 2000.0;
    let notes = format!(
        "us_per_fault={:.1} naive_us_per_fault={:.1} cpu_s_per_gib={:.2} ",
        us(median(runs.iter().map(|run| run.1.ns as f64))),
        us(median(runs.iter().map(|run| run.0 as f64))),
        cpu_s_per_gib_of(runs.iter().map(|run| &run.1), 2000.0),
    );
    let goal = Goal::AtLeast { floor: 1.15, target: 1.3 };
    Outcome { id: "R5", name: "handler_placement", unit: "x", goal, values, notes }
}

/// R6: the same pages by two vCPUs, half each, against one: a fault for each page. What the kernel makes of that without
/// us is printed too.
fn scaling() -> Outcome {
    const WORK: [&str; 2] = ["touch 16M 80M seed=1 stride=8K", "touch 16M 80M seed=1 stride=8K cpus=all"];
    let ours = |cpus: u32| run("size=128M,max=128M", cpus, WORK[cpus as usize - 1]);
    let plain = |cpus: u32| run("size=128M", cpus, WORK[cpus as usize - 1]).ns as f64;
    let runs = pairs(full(9, 21), || ours(1), || ours(2));
    let unmanaged = pairs(full(3, 7), || plain(1), || plain(2));
    let faults = (80 * MIB / 8192) as f64;
    let notes = format!(
        "us_per_fault={:.1} us_per_fault_v2={:.1} cpu_s_per_gib={:.2} v2_cpu_s_per_gib={:.2} unmanaged={:.2} ",
        median(runs.iter().map(|run| run.0.ns as f64)) / 1000.0 / faults,
        median(runs.iter().map(|run| run.1.ns as f64)) / 1000.0 / faults,
        cpu_s_per_gib_of(runs.iter().map(|run| &run.0), faults),
        cpu_s_per_gib_of(runs.iter().map(|run| &run.1), faults),
        median(unmanaged.iter().map(|(one, two)| one / two)),
    );
    let values = runs.iter().map(|(one, two)| one.ns as f64 / two.ns as f64).collect();
    let goal = Goal::AtLeast { floor: 1.27, target: 1.5 };
    Outcome { id: "R6", name: "fault_scaling", unit: "x", goal, values, notes }
}

/// Pages charged for each page that a guest touches whose accesses follow Zipf's law: what fault-around costs those who
/// do not go straight on.
fn bloat() -> Outcome {
    let charged = |seed: usize| {
        let mut vm = TestVm::builder("bloat").memory("size=640M,max=640M").cmdline("shell").start();
        vm.expect("READY", 20);
        // The books of the accesses, before what is counted.
        vm.command("access zipf 16M 512M periods=1 each=1 seed=1", 60);
        let pages = |now: &Value| number(now, "memory.stat.guest_bytes") as f64 / 4096.0;
        let before = pages(&vm.show());
        let answer = vm.command(&format!("access zipf 16M 512M periods=1 each=60000 seed={}", seed + 2), 120);
        (pages(&vm.show()) - before) / field(&answer, "distinct")
    };
    let goal = Goal::AtMost { floor: 1.15, target: 1.05 };
    let values = (0..full(3, 7)).map(charged).collect();
    Outcome { id: "bloat", name: "charged_per_touched", unit: "x", goal, values, notes: "pattern=zipf ".to_owned() }
}

/// The answers to a storm of faults.
fn fault_wait() -> Outcome {
    let faults = run("size=1G,max=1G", 2, "touch 16M 900M seed=1 stride=8K cpus=all").faults;
    let [p50, p99, max] = ["p50_us", "p99_us", "max_us"].map(|k| number(&faults["answer"], k) as f64 / 1000.0);
    let notes = format!("p50={p50:.3} p99={p99:.3} worst={max:.3} faults={} ", number(&faults, "answer.count"));
    let goal = Goal::AtMost { floor: 5.0, target: 1.0 };
    Outcome { id: "fault_wait", name: "fault_wait", unit: "ms", goal, values: vec![p99], notes }
}

//! Hosts that nobody has recorded: VMs of a few kinds, drawn from a seed.
//!
//! | kind | footprint over time | in use |
//! | --- | --- | --- |
//! | idle | touched in the first minutes, then the same | a tenth to a fifth, and a little of the rest now and then |
//! | steady | the same all the time | two thirds to nine tenths |
//! | batch | comes within a minute, goes after some minutes, comes again | nearly all of it |
//! | burst | like idle; every quarter of an hour, all at once, for three minutes everything | a tenth, then all |
//! | leak | grows without end | what it had at first |
//!
//! Each VM has a footprint of 256 to 768 MiB, its own phases, and pages that shrink to a quarter up to three fifths; one in ten
//! has pages that do not shrink. Half of the VMs report free pages, a quarter has a balloon driver, the others keep what they
//! free. They are in three groups: gold (a fifth; the last to go, half of its memory protected by `low`, and to be avoided),
//! silver (three tenths) and bronze (the others; first to go). One in four is killed when it is chosen, the others are paused.
//!
//! The host of a [`Scenario`] has memory for a part of all footprints, which is what makes it short.

use std::time::Duration;

use super::setup::{Group, Point, Setup, Vm};
use crate::oom::Preference;
use crate::tree::LimitPatch;
use crate::units::{Limit, Pages};

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Idle,
    Steady,
    Batch,
    Burst,
    Leak,
}

/// Hosts of one sort.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// What it is called.
    pub name: &'static str,
    /// What it is about, in a sentence.
    pub says: &'static str,
    /// Of a hundred VMs so many are of each kind, in the order of the module's table.
    kinds: [u64; 5],
    /// Memory of the host for each hundred of footprint.
    memory: u64,
}

/// All of them.
pub const SCENARIOS: [Scenario; 5] = [
    Scenario {
        name: "idle",
        says: "sandboxes that mostly wait: much cold memory, on hosts with three quarters of it",
        kinds: [80, 15, 5, 0, 0],
        memory: 74,
    },
    Scenario {
        name: "batch",
        says: "jobs that come and go: what is free here is wanted there",
        kinds: [5, 15, 80, 0, 0],
        memory: 80,
    },
    Scenario {
        name: "burst",
        says: "everybody wakes up at once, every quarter of an hour",
        kinds: [30, 10, 0, 60, 0],
        memory: 92,
    },
    Scenario { name: "leak", says: "a tenth of the VMs grows without end", kinds: [40, 50, 0, 0, 10], memory: 85 },
    Scenario {
        name: "mixed",
        says: "some of everything, with three classes of service",
        kinds: [40, 25, 20, 10, 5],
        memory: 80,
    },
];

/// Mean footprint of a VM in MiB.
const MEAN: u64 = 512;

/// Time between two bursts, and how long one lasts, in seconds.
const BURST: [u64; 2] = [900, 180];

impl Scenario {
    /// The scenario of this name.
    pub fn find(name: &str) -> Option<&'static Scenario> {
        SCENARIOS.iter().find(|scenario| scenario.name == name)
    }

    /// The host number `index` of those that `seed` makes, with so many VMs that have something to do for so long.
    pub fn host(&self, seed: u64, index: u64, vms: u64, lasts: Duration) -> Setup {
        let mut draw = Draw(seed ^ (index + 1).wrapping_mul(0xd6e8_feb8_6659_fd93));
        let memory = Pages::from_mib(vms * MEAN * self.memory / 100);
        let mut setup = Setup::new(&format!("{}-{index}", self.name), memory);
        // What the host itself needs.
        setup.others = vec![(Duration::ZERO, Pages(memory.0 / 50))];
        for path in ["/gold", "/silver", "/bronze"] {
            setup.groups.push(Group { path: path.to_owned(), limits: LimitPatch::default() });
        }
        setup.vms = (0..vms).map(|number| self.vm(&mut draw, number, lasts.as_secs())).collect();
        setup
    }

    fn vm(&self, draw: &mut Draw, number: u64, seconds: u64) -> Vm {
        let kind = self.kind(draw);
        let footprint = draw.between(MEAN / 2, MEAN * 3 / 2);
        let class = draw.below(10);
        let (group, priority, preference) = match class {
            0..2 => ("/gold", 20, Preference::Avoid),
            2..5 => ("/silver", 10, Preference::None),
            _ => ("/bronze", 0, Preference::None),
        };
        let low = if group == "/gold" { Some(Limit::Pages(Pages::from_mib(footprint / 2))) } else { None };
        let shrinks = if draw.below(10) == 0 { 1000 } else { draw.between(250, 600) as u32 };
        let frees = draw.below(4);
        Vm {
            group: group.to_owned(),
            limits: LimitPatch { low, ..LimitPatch::default() },
            overhead: Pages::from_mib(4),
            kill: draw.below(4) == 0,
            preference,
            priority,
            shrinks,
            wanders: draw.between(2, 20) as u32,
            reports: frees < 2,
            driver: frees == 2,
            load: load(kind, draw, footprint, seconds),
            ..Vm::new(&format!("vm-{number}"))
        }
    }

    fn kind(&self, draw: &mut Draw) -> Kind {
        let all = [Kind::Idle, Kind::Steady, Kind::Batch, Kind::Burst, Kind::Leak];
        let mut place = draw.below(self.kinds.iter().sum());
        for (kind, share) in all.into_iter().zip(self.kinds) {
            if place < share {
                return kind;
            }
            place -= share;
        }
        Kind::Idle
    }
}

/// What a VM of a kind wants, with so many MiB of footprint.
fn load(kind: Kind, draw: &mut Draw, footprint: u64, seconds: u64) -> Vec<Point> {
    let begins = draw.between(0, 120);
    let there = begins + draw.between(5, 60);
    let percent = |of: u64, draw: &mut Draw, from, to| of * draw.between(from, to) / 100;
    let mut load = vec![point(begins, 0, 0)];
    match kind {
        Kind::Idle => load.push(point(there, footprint, percent(footprint, draw, 10, 20))),
        Kind::Steady => load.push(point(there, footprint, percent(footprint, draw, 66, 90))),
        Kind::Batch => {
            let rest = footprint / 10;
            let mut at = begins + draw.between(0, 300);
            while at < seconds {
                let (up, busy, down, pause) =
                    (draw.between(10, 60), draw.between(120, 480), draw.between(1, 10), draw.between(60, 360));
                load.push(point(at, rest, rest));
                load.push(point(at + up, footprint, percent(footprint, draw, 80, 95)));
                load.push(point(at + up + busy, footprint, percent(footprint, draw, 80, 95)));
                load.push(point(at + up + busy + down, rest, rest));
                at += up + busy + down + pause;
            }
        }
        Kind::Burst => {
            let quiet = percent(footprint, draw, 8, 12);
            load.push(point(there, footprint, quiet));
            let [every, lasts] = BURST;
            for burst in 1..=seconds / every {
                let (at, up) = (burst * every, draw.between(5, 30));
                load.push(point(at, footprint, quiet));
                load.push(point(at + up, footprint, footprint));
                load.push(point(at + lasts, footprint, footprint));
                load.push(point(at + lasts + up, footprint, quiet));
            }
        }
        Kind::Leak => {
            let first = footprint / 4;
            let rate = draw.between(4, 16);
            load.push(point(there, first, first));
            load.push(point(there + seconds, first + rate * seconds / 60, first));
        }
    }
    load
}

fn point(at: u64, footprint: u64, hot: u64) -> Point {
    Point { at: Duration::from_secs(at), footprint: Pages::from_mib(footprint), hot: Pages::from_mib(hot) }
}

/// Numbers that look random, the same for the same seed: SplitMix64.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Less than `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// From `first` to `last`.
    fn between(&mut self, first: u64, last: u64) -> u64 {
        first + self.below(last - first + 1)
    }
}

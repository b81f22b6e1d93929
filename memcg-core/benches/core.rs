//! What the operations of the core cost, beside plain baselines of the same run: an atomic add (what a counter shared
//! between threads would pay at least) and the copy of a record of 12 bytes.
//!
//! `cargo bench -p memcg-core` prints all; `scripts/bench` turns the medians into its lines.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput};
use memcg_core::frame::{FrameState, FrameTable};
use memcg_core::oom::{self, Attributes};
use memcg_core::spread::{self, Claimant, DEFAULT_SHARES, Facts, Terms};
use memcg_core::stock::Stock;
use memcg_core::tree::{Accounting, LimitPatch, Mode, NodeId, Tree};
use memcg_core::units::{Limit, Pages};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    baselines(&mut criterion);
    charges(&mut criterion);
    lru(&mut criterion);
    policy(&mut criterion);
    criterion.final_summary();
}

/// What everything else is compared with.
fn baselines(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("baseline");
    let counter = AtomicU64::new(0);
    group.bench_function("atomic_add", |b| b.iter(|| counter.fetch_add(black_box(1), Ordering::Relaxed)));
    let mut records = [[1u8; 12]; 2];
    group.bench_function("memcpy_record", |b| {
        b.iter(|| {
            let [from, to] = &mut records;
            to.copy_from_slice(black_box(&from[..]));
            black_box(to[0])
        });
    });
    group.finish();
}

fn charges(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("charge");
    let mut stock = Stock::new(Pages(0));
    stock.grant(1, 1 << 20, Pages(1 << 20), None).expect("a first grant");
    // One page at a time, as at a limit; a fault elsewhere takes a granule of 16 or more at once.
    group.bench_function("stock", |b| {
        b.iter(|| {
            if let Some(reservation) = stock.prepare(black_box(Pages(1))) {
                reservation.commit(Pages(1));
            }
            stock.uncharge(black_box(Pages(1)));
        });
    });
    let (mut tree, vm) = four_levels();
    group.bench_function("four_levels", |b| {
        b.iter(|| tree.try_charge(vm, black_box(Pages(1)), Mode::Wait).map(|charge| charge.pages));
    });
    group.finish();
}

/// Root, two groups and a VM, all with limits that are never met.
fn four_levels() -> (Tree, NodeId) {
    let mut tree = Tree::new(pages(u64::MAX / 2).expect("a limit"));
    let mut at = tree.root();
    for name in ["group", "subgroup", "vm"] {
        let limits = LimitPatch { max: pages(u64::MAX / 4), ..LimitPatch::default() };
        at = tree.add_with(at, name, &limits, Accounting::On).expect("a name");
    }
    (tree, at)
}

/// Pages of the tables: a guest of 64 MiB.
const PAGES: usize = 1 << 14;

fn lru(criterion: &mut Criterion) {
    use FrameState::{Absent, Active, Discarding, Idle, Moving};
    let mut group = criterion.benchmark_group("lru");
    let mut frames = FrameTable::new(PAGES);
    // Every second page is idle, so that no block is uniform and each page is an entry of its own.
    for page in (1..PAGES).step_by(2) {
        for state in [Active, Moving, Idle] {
            frames.set(page, state);
        }
    }
    group.throughput(Throughput::Elements(PAGES as u64 / 2));
    group.bench_function("insert_move", |b| {
        b.iter_custom(|rounds| {
            timed(rounds, &mut frames, |frames| {
                for page in (0..PAGES).step_by(2) {
                    frames.set(page, Active);
                }
                for page in (0..PAGES).step_by(2) {
                    frames.set(page, Moving);
                    frames.set(page, Idle);
                }
            })
        });
    });
    let mut frames = FrameTable::new(PAGES);
    group.throughput(Throughput::Elements(PAGES as u64));
    group.bench_function("run_512", |b| {
        b.iter_custom(|rounds| {
            timed(rounds, &mut frames, |frames| {
                for first in (0..PAGES).step_by(512) {
                    for state in [Active, Moving, Idle] {
                        frames.set_range(first, first + 512, state);
                    }
                }
            })
        });
    });
    group.finish();

    /// Times `work`, which leaves the even pages at least idle, and takes them away again untimed.
    fn timed(rounds: u64, frames: &mut FrameTable, work: impl Fn(&mut FrameTable)) -> Duration {
        let odd = frames.state(1);
        let mut spent = Duration::ZERO;
        for _ in 0..rounds {
            let start = Instant::now();
            work(frames);
            spent += start.elapsed();
            for page in (0..PAGES).filter(|page| odd == Absent || page % 2 == 0) {
                frames.set(page, Discarding);
                frames.set(page, Absent);
            }
        }
        spent
    }
}

/// VMs of the host whose policies are timed, in groups of 100.
const VMS: u64 = 10_000;

/// A host with [`VMS`] VMs of different sizes, limits and protections.
fn host() -> Tree {
    let mut tree = Tree::new(Limit::Max);
    for group in 0..VMS / 100 {
        let patch = LimitPatch { low: pages(20_000), ..LimitPatch::default() };
        let root = tree.root();
        let group = tree.add_with(root, &format!("g{group}"), &patch, Accounting::On).expect("a group");
        for vm in 0..100 {
            let patch = LimitPatch { min: pages(100), low: pages(vm * 7 % 1000), ..LimitPatch::default() };
            let vm_id = tree.add_with(group, &format!("vm{vm}"), &patch, Accounting::On).expect("a VM");
            let _ = tree.try_charge(vm_id, Pages(200 + vm * 37 % 1000), Mode::Wait).expect("no limit");
        }
    }
    tree
}

fn pages(n: u64) -> Option<Limit> {
    Some(Limit::Pages(Pages(n)))
}

/// The decisions alone, and with what they need to know read from the tree first.
fn policy(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("policy");
    group.throughput(Throughput::Elements(VMS));
    let tree = host();
    let facts = |_| Some(Facts { idle: Pages(100), pinned: Pages(10), shares: DEFAULT_SHARES });
    let claimants = || spread::claimants(&tree, tree.root(), facts);
    let divide = |claimants: &[Claimant]| spread::spread(black_box(Pages(1_000_000)), claimants, &Terms::default());
    let all = claimants();
    group.bench_function("spread_10000", |b| b.iter(|| divide(&all)));
    group.bench_function("spread_from_tree", |b| b.iter(|| divide(&claimants())));
    let candidates = || oom::candidates(&tree, tree.root(), |_| Some(Attributes::default()));
    let all = candidates();
    group.bench_function("rank_10000", |b| b.iter(|| oom::rank(black_box(&all)).len()));
    group.bench_function("rank_from_tree", |b| b.iter(|| oom::rank(black_box(&candidates())).len()));
    group.finish();
}

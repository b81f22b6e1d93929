//! Spreading a need.

use std::collections::BTreeMap;

use memcg_core::protection::Protection;
use memcg_core::spread::{Claimant, DEFAULT_SHARES, Facts, Spread, Terms, claimants, spread};
use memcg_core::tree::{Kind, LimitPatch, Mode, NodeId, Overhead, Tree};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

use crate::nodes::{group, vm};

fn mib(n: u64) -> Pages {
    Pages::from_mib(n)
}

fn limit(n: u64) -> Limit {
    Limit::Pages(mib(n))
}

/// Ids of `n` VMs.
fn ids(n: usize) -> Vec<NodeId> {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    (0..n).map(|n| vm(&mut tree, root, &format!("v{n}"))).collect()
}

/// A VM that uses `usage`, nothing of it idle, protected or pinned.
fn busy(id: NodeId, usage: Pages) -> Claimant {
    Claimant { id, usage, protection: Protection::NONE, idle: Pages::ZERO, pinned: Pages::ZERO, shares: DEFAULT_SHARES }
}

fn pages(spread: &Spread) -> Vec<u64> {
    spread.takes.iter().map(|take| take.pages.0).collect()
}

fn below_low(spread: &Spread) -> Vec<u64> {
    spread.takes.iter().map(|take| take.below_low.0).collect()
}

/// Who hoards memory gives before who uses it, and who has paid for more shares gives less.
#[test]
fn an_idle_page_counts_like_four_and_shares_divide() {
    let id = ids(3);
    let a = busy(id[0], mib(200));
    let b = Claimant { idle: mib(200), ..busy(id[1], mib(200)) };
    let all = Protection { min: mib(0), low: mib(96) };
    let c = Claimant { idle: mib(96), protection: all, ..busy(id[2], mib(96)) };
    let terms = Terms::default();
    assert_eq!(pages(&spread(mib(100), &[a, b, c], &terms)), [mib(20).0, mib(80).0, 0]);
    let b = Claimant { shares: 200, ..b };
    // 25600 pages, 1 : 2.
    assert_eq!(pages(&spread(mib(100), &[a, b, c], &terms)), [8533, 17067, 0]);
    // Without the tax shares alone count.
    assert_eq!(pages(&spread(mib(90), &[a, b, c], &Terms { idle_tax: 0 })), [mib(60).0, mib(30).0, 0]);
}

/// Protection covers active pages first, so what is above it is idle as far as there are idle pages.
#[test]
fn idle_pages_are_the_unprotected_ones() {
    let id = ids(2);
    let low = |low| Protection { min: Pages::ZERO, low: Pages(low) };
    // Of 100 above the protection, 60 are idle: 40 + 4 × 60 = 280, against 100.
    let a = Claimant { idle: Pages(60), protection: low(300), ..busy(id[0], Pages(400)) };
    let b = busy(id[1], Pages(100));
    assert_eq!(pages(&spread(Pages(38), &[a, b], &Terms::default())), [28, 10]);
    // Idle ones that the first round has had do not count in the second: 10 + 4 × 10 = 50 between min and low
    // (20, of which 10 are idle still), against 4 × 20 = 80.
    let both = Protection { min: Pages(10), low: Pages(30) };
    let a = Claimant { idle: Pages(80), protection: both, ..busy(id[0], Pages(100)) };
    let b = Claimant { idle: Pages(100), protection: both, ..busy(id[1], Pages(100)) };
    let given = spread(Pages(140 + 13), &[a, b], &Terms::default());
    assert_eq!((pages(&given), below_low(&given)), (vec![70 + 5, 70 + 8], vec![5, 8]));
}

/// `low` holds while anything above anybody's `low` is left, and `min` holds always: that is what distinguishes them.
/// Semantics: T2.
#[test]
fn low_is_broken_last_and_min_never() {
    let id = ids(3);
    let protection = |min, low| Protection { min: Pages(min), low: Pages(low) };
    let a = Claimant { protection: protection(100, 200), ..busy(id[0], Pages(300)) };
    let b = Claimant { protection: protection(0, 300), ..busy(id[1], Pages(300)) };
    // A `min` above `low` protects like both.
    let c = Claimant { protection: protection(150, 50), ..busy(id[2], Pages(150)) };
    let all = [a, b, c];
    let table = [
        // Need, what each gives, what of it is below low, what is missing.
        (100, [100, 0, 0], [0, 0, 0], 0),
        (104, [101, 3, 0], [1, 3, 0], 0),
        (500, [200, 300, 0], [100, 300, 0], 0),
        (501, [200, 300, 0], [100, 300, 0], 1),
    ];
    for (need, gives, low, short) in table {
        let spread = spread(Pages(need), &all, &Terms::default());
        assert_eq!(pages(&spread), gives, "need {need}");
        assert_eq!(below_low(&spread), low, "need {need}");
        assert_eq!(spread.short, Pages(short), "need {need}");
    }
}

/// What cannot be reclaimed is not asked for; what cannot be found is said at once, so that the next rung begins.
/// Semantics: 44.
#[test]
fn what_is_pinned_stays_and_what_is_missing_is_said() {
    let id = ids(2);
    let pinned = Claimant { pinned: Pages(100), ..busy(id[0], Pages(100)) };
    let given = spread(Pages(10), &[pinned], &Terms::default());
    assert_eq!((pages(&given), given.short), (vec![0], Pages(10)));
    // It counts as used all the same: 50 of the 100 would be its part, but 20 are all there is to have.
    let partly = Claimant { pinned: Pages(80), ..pinned };
    let given = spread(Pages(100), &[partly, busy(id[1], Pages(100))], &Terms::default());
    assert_eq!((pages(&given), given.short), (vec![20, 80], Pages(0)));
    let given = spread(Pages(130), &[partly, busy(id[1], Pages(100))], &Terms::default());
    assert_eq!((pages(&given), given.short), (vec![20, 100], Pages(10)));
    // Pinned within the protection, it takes nothing from what is above.
    let low = Claimant { protection: Protection { min: Pages(0), low: Pages(90) }, ..partly };
    let given = spread(Pages(200), &[low], &Terms::default());
    assert_eq!((pages(&given), below_low(&given), given.short), (vec![20], vec![10], Pages(180)));
}

/// A VM's own reclaim never takes what belongs to its VMM: its vCPUs and queues work on, and what was compressed for it
/// cannot be compressed away.
/// Semantics: 45.
#[test]
fn overhead_and_store_are_never_asked_for() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let id = vm(&mut tree, root, "vm");
    let _ = tree.try_charge_as(id, Kind::Overhead(Overhead::Vcpu), Pages(40), Mode::Wait).unwrap();
    let _ = tree.try_charge_as(id, Kind::Store, Pages(5), Mode::Wait).unwrap();
    let _ = tree.try_charge(id, Pages(55), Mode::Wait).unwrap();
    let claimants = claimants(&tree, id, |_| Some(Facts { pinned: Pages(10), ..Facts::default() }));
    let given = spread(Pages(100), &claimants, &Terms::default());
    assert_eq!((pages(&given), given.short), (vec![45], Pages(55)));
}

/// The limit of the group is met by A's charge: A and its sibling B give, their uncle C never does, whatever it has. At
/// the host's limit all give, by the same engine; at A's own limit A alone does, its own protection notwithstanding.
/// Semantics: 41, 63, T2.
#[test]
fn only_the_subtree_of_the_limit_gives() {
    let mut tree = Tree::new(limit(900));
    let root = tree.root();
    let parent = group(&mut tree, root, "group");
    let (a, b) = (vm(&mut tree, parent, "a"), vm(&mut tree, parent, "b"));
    let c = vm(&mut tree, root, "c");
    for (id, usage) in [(a, 100), (b, 200), (c, 600)] {
        let _ = tree.try_charge(id, mib(usage), Mode::Wait).unwrap();
    }
    let all = LimitPatch { min: Some(Limit::Max), ..LimitPatch::default() };
    tree.set_limits(a, &all).unwrap();
    tree.set_limits(parent, &LimitPatch { min: Some(limit(100)), ..LimitPatch::max(limit(300)) }).unwrap();
    let spread_at = |tree: &Tree, level: NodeId, need: Pages| -> BTreeMap<NodeId, Pages> {
        // Groups have no facts.
        let claimants = claimants(tree, level, |id| (id != parent).then(Facts::default));
        let spread = spread(need, &claimants, &Terms::default());
        spread.takes.iter().map(|take| (take.id, take.pages)).collect()
    };
    let refused = tree.try_charge(a, mib(30), Mode::Wait).unwrap_err();
    assert_eq!(refused.level, parent);
    // All of A is protected within the group, so B gives.
    assert_eq!(spread_at(&tree, refused.level, mib(30)), BTreeMap::from([(a, mib(0)), (b, mib(30))]));
    // The host: the group passes its 100M on to A, who claims them.
    assert_eq!(spread_at(&tree, root, mib(80)), BTreeMap::from([(a, mib(0)), (b, mib(20)), (c, mib(60))]));
    tree.set_limits(a, &LimitPatch::max(limit(100))).unwrap();
    let refused = tree.try_charge(a, mib(30), Mode::Wait).unwrap_err();
    assert_eq!(spread_at(&tree, refused.level, mib(30)), BTreeMap::from([(a, mib(30))]));
}

/// A dead VM's memory is coming back by itself: asking for it would count the same pages twice.
#[test]
fn what_is_offline_and_what_is_no_vm_is_not_asked() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    group(&mut tree, root, "empty");
    let (dead, alive) = (vm(&mut tree, root, "dead"), vm(&mut tree, root, "alive"));
    for id in [dead, alive] {
        let _ = tree.try_charge(id, mib(10), Mode::Wait).unwrap();
    }
    tree.set_offline(dead).unwrap();
    let empty = tree.find("/empty").unwrap();
    let claimants = claimants(&tree, root, |id| (id != empty).then(Facts::default));
    assert_eq!(claimants, [busy(alive, mib(10))]);
}

/// The kernel's own test of protection (`test_memcontrol.c`, modelled in `memcg_protection.m`): B with `low` = 50M is
/// reclaimed from 150M down to its protection, and C, D, E, F end near 29M, 21M, 0 and 0.
/// Semantics: T2.
#[test]
fn repeated_reclaim_ends_where_the_kernel_s_does() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let a = group(&mut tree, root, "a");
    let parent = group(&mut tree, a, "b");
    let vms = ["c", "d", "e", "f"].map(|name| vm(&mut tree, parent, name));
    tree.set_limits(parent, &LimitPatch { low: Some(limit(50)), ..LimitPatch::default() }).unwrap();
    for (id, (low, usage)) in vms.into_iter().zip([(75, 50), (25, 50), (0, 50), (500, 0)]) {
        tree.set_limits(id, &LimitPatch { low: Some(limit(low)), ..LimitPatch::default() }).unwrap();
        let _ = tree.try_charge(id, mib(usage), Mode::Wait).unwrap();
    }
    while tree.usage(parent) > mib(50) {
        let claimants = claimants(&tree, a, |_| Some(Facts::default()));
        for take in spread(Pages(128), &claimants, &Terms::default()).takes {
            tree.uncharge(take.id, take.pages);
        }
    }
    let near = |id: NodeId, expected: u64| tree.usage(id).0.abs_diff(mib(expected).0) <= mib(2).0;
    assert!(near(vms[0], 29), "C {}", tree.usage(vms[0]));
    assert!(near(vms[1], 21), "D {}", tree.usage(vms[1]));
    assert!(near(vms[2], 0), "E {}", tree.usage(vms[2]));
    assert_eq!(tree.usage(vms[3]), Pages::ZERO);
}

/// Rounding must neither lose a page nor depend on luck: what is left over goes to the largest remainders, and among
/// equals to the older.
#[test]
fn pages_that_are_left_over_go_to_the_largest_remainders() {
    let id = ids(4);
    let of = |usage: [u64; 4]| -> Vec<Claimant> {
        id.iter().zip(usage).map(|(id, usage)| busy(*id, Pages(usage))).collect()
    };
    let table = [
        (0, [10, 10, 10, 10], [0, 0, 0, 0]),
        (1, [10, 10, 10, 10], [1, 0, 0, 0]),
        (10, [10, 10, 10, 0], [4, 3, 3, 0]),
        // 2.7, 4.5, 1.8 of 9.
        (9, [30, 50, 20, 0], [3, 4, 2, 0]),
        // 0.05, 0.1 and two times 4.9; 0.99, 1.97 and two times 98.5.
        (10, [1, 2, 100, 100], [0, 0, 5, 5]),
        (200, [1, 2, 100, 100], [1, 2, 99, 98]),
        (203, [1, 2, 100, 100], [1, 2, 100, 100]),
    ];
    for (need, usage, expected) in table {
        assert_eq!(pages(&spread(Pages(need), &of(usage), &Terms::default())), expected, "{need} of {usage:?}");
    }
}

/// Nonsense in, an exact answer out: nobody to ask, no shares, a tax of everything, numbers of 64 bits.
#[test]
fn odd_arguments_are_answered_too() {
    let id = ids(3);
    let terms = Terms { idle_tax: 255 };
    assert_eq!(spread(Pages(5), &[], &terms), Spread { takes: vec![], short: Pages(5) });
    let idle = Claimant { idle: Pages(u64::MAX), shares: 0, ..busy(id[0], Pages(u64::MAX)) };
    let active = Claimant { shares: u32::MAX, ..busy(id[1], Pages(u64::MAX)) };
    let given = spread(Pages(u64::MAX), &[idle, active, busy(id[2], Pages(1))], &terms);
    assert_eq!(given.takes.iter().map(|take| u128::from(take.pages.0)).sum::<u128>(), u128::from(u64::MAX));
    assert!(given.takes[0].pages.0 > u64::MAX - (1 << 32));
    assert_eq!(given.short, Pages::ZERO);
}

fn claimant(id: NodeId) -> impl Strategy<Value = Claimant> {
    let usage = prop_oneof![0u64..20, 0u64..5000, 0u64..1 << 24];
    (usage, prop::array::uniform4(0u64..150), prop_oneof![Just(DEFAULT_SHARES), 1u32..1000]).prop_map(
        move |(usage, [min, low, idle, pinned], shares)| {
            // Per cent of the usage, more than all of it now and then.
            let part = |per_cent: u64| Pages(if per_cent < 30 { 0 } else { usage * (per_cent - 30) / 100 });
            let protection = Protection { min: part(min).min(Pages(usage)), low: part(low).min(Pages(usage)) };
            Claimant { id, usage: Pages(usage), protection, idle: part(idle), pinned: part(pinned), shares }
        },
    )
}

fn case() -> impl Strategy<Value = (Vec<Claimant>, Pages, Terms)> {
    let claimants = (0usize..20).prop_flat_map(|n| ids(n).into_iter().map(claimant).collect::<Vec<_>>());
    (claimants, 0u64..=110, 0u8..100).prop_map(|(claimants, per_cent, idle_tax)| {
        let all: u64 = claimants.iter().map(|claimant| claimant.usage.0).sum();
        (claimants, Pages(all * per_cent / 100), Terms { idle_tax })
    })
}

/// Pages, idle ones among them and the cap of one claimant in the first or second round, by counting.
fn band(claimant: &Claimant, second: bool) -> (u64, u64, u64) {
    let (mut pages, mut idle, mut cap) = (0, 0, 0);
    let soft = claimant.protection.soft().0;
    let mut idle_left = claimant.idle.0.min(claimant.usage.0);
    let mut may_give = claimant.usage.0.saturating_sub(claimant.pinned.0);
    for (low, high, counts) in [(soft, claimant.usage.0, !second), (claimant.protection.min.0, soft, second)] {
        let width = high - low.min(high);
        let (idle_here, gives) = (idle_left.min(width), may_give.min(width));
        idle_left -= idle_here;
        may_give -= gives;
        if counts {
            (pages, idle, cap) = (width, idle_here, gives);
        }
    }
    (pages, idle, cap)
}

proptest! {
    /// Exact in sum, never below `min` or what is pinned, `low` broken by nobody while anybody has something above it,
    /// and fair: nobody who could give more has given less, measured by its weight, than anybody else, but for one page
    /// of rounding.
    /// Semantics: 44, T2.
    #[test]
    fn spreading_is_exact_and_fair((claimants, need, terms) in case()) {
        let spread = spread(need, &claimants, &terms);
        let given: u64 = pages(&spread).iter().sum();
        let most: u64 = claimants.iter().map(|c| c.usage.0.saturating_sub(c.protection.min.0.max(c.pinned.0))).sum();
        prop_assert_eq!(given, need.0.min(most));
        prop_assert_eq!(spread.short.0, need.0 - given);
        let mut caps_above_low = 0;
        for second in [false, true] {
            let mut parts = Vec::new();
            for (claimant, take) in claimants.iter().zip(&spread.takes) {
                prop_assert_eq!(take.id, claimant.id);
                let (pages, idle, cap) = band(claimant, second);
                let gives = if second { take.below_low.0 } else { take.pages.0 - take.below_low.0 };
                prop_assert!(gives <= cap);
                if !second {
                    caps_above_low += cap;
                }
                let tax = u64::from(terms.idle_tax);
                let weight = u128::from((pages - idle) * (100 - tax) + idle * 100);
                parts.push((u128::from(gives), u128::from(cap), weight, u128::from(claimant.shares)));
            }
            for (gives, cap, weight, shares) in &parts {
                for (others, _, their_weight, their_shares) in &parts {
                    if gives < cap && *others > 0 {
                        prop_assert!((others - 1) * weight * their_shares <= (gives + 1) * their_weight * shares,
                            "{gives} of {weight}/{shares} against {others} of {their_weight}/{their_shares}");
                    }
                }
            }
        }
        let below: u64 = below_low(&spread).iter().sum();
        prop_assert_eq!(below, given.saturating_sub(caps_above_low));
    }

    /// The same for whoever is listed first.
    #[test]
    fn the_order_of_the_claimants_does_not_matter((claimants, need, terms) in case(), seed in any::<u64>()) {
        let mut shuffled = claimants.clone();
        shuffled.sort_by_key(|claimant| (claimant.usage.0 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let by_id = |claimants: &[Claimant]| -> BTreeMap<NodeId, (Pages, Pages)> {
            let takes = spread(need, claimants, &terms).takes;
            takes.into_iter().map(|take| (take.id, (take.pages, take.below_low))).collect()
        };
        prop_assert_eq!(by_id(&claimants), by_id(&shuffled));
    }

    /// One page after the other, each from whoever has given least for its weight: no cleverness, and nobody is more
    /// than a page away from it when weights are equal and caps differ.
    #[test]
    fn water_filling_is_what_page_by_page_gives(usage in prop::collection::vec(0u64..60, 1..12), need in 0u64..300) {
        let id = ids(usage.len());
        // Equal weights: all have the same above their protection, and less or more of it to have.
        let of = |(id, usage): (&NodeId, &u64)| Claimant { pinned: Pages(60 - usage), ..busy(*id, Pages(60)) };
        let claimants: Vec<Claimant> = id.iter().zip(&usage).map(of).collect();
        let mut simulated = vec![0; usage.len()];
        for _ in 0..need {
            if let Some(next) = (0..usage.len()).filter(|n| simulated[*n] < usage[*n]).min_by_key(|n| simulated[*n]) {
                simulated[next] += 1;
            }
        }
        prop_assert_eq!(pages(&spread(Pages(need), &claimants, &Terms::default())), simulated);
    }
}

//! The budget of ageing.

use std::time::Duration;

use memcg_core::governor::{Governor, Seen, Terms};

const SECOND: Duration = Duration::from_secs(1);

/// What a refault costs on a slow host.
const COST: Duration = Duration::from_micros(100);

fn seen(aside: u64, refaults: u64) -> Seen {
    Seen { period: SECOND, aside, refaults, cost: COST }
}

/// One per cent of the time of each vCPU, by what a refault costs there; where they are cheap the rate is the bound.
#[test]
fn the_allowance_follows_cost_and_vcpus() {
    let allowance = |cpus, period, cost| Terms::new(cpus).allowance(period, cost);
    assert_eq!(allowance(1, SECOND, COST), 100);
    assert_eq!(allowance(4, SECOND, COST), 400);
    assert_eq!(allowance(1, 10 * SECOND, 2 * COST), 500);
    assert_eq!(allowance(1, SECOND, Duration::from_micros(5)), 100, "2000 by its share");
    assert_eq!(allowance(1, SECOND, Duration::ZERO), 100);
    assert_eq!(allowance(1, Duration::ZERO, COST), 0);
    assert_eq!(allowance(u32::MAX, Duration::MAX, Duration::from_nanos(1)), u64::MAX);
}

/// Cold memory is found at twice the speed each period.
#[test]
fn what_is_cold_is_put_aside_faster_and_faster() {
    let mut governor = Governor::new(Terms::new(1));
    let mut budget = governor.next(&seen(0, 0));
    assert_eq!(budget, 100, "no more than may come back");
    for _ in 0..10 {
        let before = budget;
        budget = governor.next(&seen(budget, 0));
        assert_eq!(budget, 2 * before);
    }
    // Nothing is left to be put aside: it stays.
    assert_eq!(governor.next(&seen(budget / 2, 0)), budget);
    assert_eq!(governor.budget(), budget);
}

/// A guest of which each page comes back at once never pays more than it should.
#[test]
fn what_is_hot_costs_no_more_than_its_share() {
    let mut governor = Governor::new(Terms::new(2));
    let mut aside = governor.next(&seen(0, 0));
    for _ in 0..100 {
        assert!(aside <= 200, "{aside}");
        aside = governor.next(&seen(aside, aside));
    }
    assert_eq!(aside, 200, "and what it can pay is used");
}

/// A guest that turns to memory that was aside for long has its refaults, and then they are paid off. Meanwhile it is
/// still looked at, at half of the price.
#[test]
fn a_change_of_phase_is_paid_off() {
    let paid_off = |governor: &mut Governor, refaults| {
        let mut periods = 0;
        while governor.owed() > 0 {
            periods += 1;
            assert!((50..=100).contains(&governor.budget()), "{governor:?}");
            governor.next(&seen(50, refaults));
        }
        periods
    };
    let mut governor = Governor::new(Terms::new(1));
    let mut budget = 0;
    for _ in 0..8 {
        budget = governor.next(&seen(budget, 0));
    }
    governor.next(&seen(budget, 550));
    assert_eq!(governor.owed(), 450, "above the allowance of 100");
    assert_eq!(paid_off(&mut governor, 0), 5);
    governor.next(&seen(budget, 550));
    assert_eq!(paid_off(&mut governor, 50), 9, "also when all that is looked at comes back");
    // A flood is not paid off for ever.
    governor.next(&seen(0, u64::MAX));
    assert_eq!(paid_off(&mut governor, 0), 10);
}

/// In the long run refaults cost what they may, whatever part of the memory is in use.
#[test]
fn refaults_settle_below_the_allowance() {
    for share in [1, 10, 33, 50, 90, 100] {
        let mut governor = Governor::new(Terms::new(1));
        let (mut aside, mut refaults, periods) = (0, 0, 1000);
        for period in 0..periods {
            // One in so many comes back, in bursts.
            let back = aside * share / 100 * (period % 3);
            refaults += back;
            aside = governor.next(&seen(aside, back));
        }
        assert!(refaults <= 100 * (periods + 10), "{share} %: {refaults}");
        assert!(refaults >= 30 * periods, "{share} %: only {refaults}");
    }
}

/// Reclaim puts aside more than the budget, and a guest says what that costs; the budget is cut all the same.
#[test]
fn what_others_put_aside_counts() {
    let mut governor = Governor::new(Terms::new(1));
    let mut budget = 0;
    for _ in 0..6 {
        budget = governor.next(&seen(budget, 0));
    }
    assert_eq!(budget, 3200);
    assert_eq!(governor.next(&seen(100_000, 80)), 4000, "3200 × 100 / 80");
    assert_eq!(governor.next(&seen(100_000, 160)), 1000, "4000 × (100 − 60) / 160");
}

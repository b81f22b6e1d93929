//! How long a guest may be held, and what puts that off.

use std::time::Duration;

use memcg_core::Pages;
use memcg_core::hold::{Account, Verdict};
use memcg_core::progress::{BRISK, LATE};
use proptest::prelude::*;

const DEADLINE: Duration = Duration::from_secs(5);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// How a guest is held, over and over: so long, for so many pages; it gets so many when it is let go, and runs so long.
#[derive(Clone, Copy, Debug)]
struct Life {
    held: u64,
    missing: u64,
    gets: u64,
    runs: u64,
    evicts: bool,
}

/// The time after which the policy acts, in seconds, in the first 1000.
fn acts_after(life: Life) -> Option<u64> {
    let Life { held, missing, gets, runs, evicts } = life;
    let (mut account, mut granted) = (Account::default(), 0);
    let round = held + runs;
    for now in (0..1_000_000).step_by(10) {
        let at = now % round;
        if at == held {
            granted += gets;
        }
        account.look(ms(now + 7000), at < held, Pages(granted));
        if at < held && account.verdict(Pages(missing), DEADLINE, evicts) == Verdict::Act {
            return Some(now / 1000);
        }
    }
    None
}

/// A page now and then is nothing; a rate that would do puts the policy off for a bounded time, and much for as long as it comes.
/// Semantics: 42, B34, T11.
#[test]
fn only_progress_that_matters_puts_the_policy_off() {
    let never = u64::MAX / 2;
    let life = |held, missing, gets, runs| Life { held, missing, gets, runs, evicts: false };
    let evicts = |life: Life| Life { evicts: true, ..life };
    let table = [
        // Nothing comes.
        (life(never, 1, 0, 10), Some(5..=5)),
        (life(never, 5000, 0, 10), Some(5..=5)),
        (evicts(life(never, 1, 0, 10)), Some(105..=105)),
        // A page every four seconds, every two, and two each second.
        (life(4000, 1, 1, 10), Some(5..=5)),
        (life(2000, 1, 1, 10), Some(5..=6)),
        (life(1000, 1, 2, 10), Some(105..=107)),
        (evicts(life(4000, 1, 1, 10)), Some(105..=107)),
        // All that it waits for, and soon, with a moment to run after each time.
        (life(1500, 64, 64, 10), Some(105..=107)),
        // More than a MiB a second is no trickle, and half of one is.
        (life(990, 1, 2 * BRISK, 10), None),
        (life(90, 1, BRISK / 8, 10), None),
        (life(990, 1, BRISK / 2, 10), Some(105..=108)),
        // It runs for half of the time.
        (life(4000, 1, 1, 4000), None),
        (life(100, 1, 1, 100), None),
        // It runs for a third of it: the two thirds left are longer by one.
        (life(100, 1, 0, 50), Some(14..=16)),
    ];
    for (life, expected) in table {
        let after = acts_after(life);
        match expected {
            Some(range) => assert!(after.is_some_and(|at| range.contains(&at)), "{life:?}: {after:?}, not {range:?}"),
            None => assert_eq!(after, None, "{life:?}"),
        }
    }
}

/// What came before the last windows is past: a guest that was served well, and then not, has no more time than another.
#[test]
fn a_rate_is_that_of_late() {
    let mut account = Account::default();
    for s in 0..8 {
        account.look(ms(s * 1000), true, Pages(s * 10_000));
    }
    let verdict = |account: &Account| account.verdict(Pages(1), DEADLINE, false);
    assert!(matches!(verdict(&account), Verdict::Wait(_)));
    let mut now = 7000;
    while matches!(verdict(&account), Verdict::Wait(_)) {
        now += 100;
        account.look(ms(now), true, Pages(70_000));
    }
    assert!((9000..=12_000).contains(&now), "{now}");
}

/// What comes at the begin of a hold, and then no more, puts a short deadline off by a moment, however much it was, and a long
/// one not at all.
#[test]
fn what_came_once_is_no_rate() {
    for (deadline, acts) in [(500, 500..=510), (5000, 5000..=5000)] {
        for came in [1, 50, 5000] {
            let (mut account, mut now) = (Account::default(), 10);
            account.look(ms(0), true, Pages(0));
            account.look(ms(now), true, Pages(came));
            while let Verdict::Wait(wait) = account.verdict(Pages(100), ms(deadline), false) {
                now += u64::try_from(wait.as_millis()).expect("short");
                account.look(ms(now), true, Pages(came));
            }
            assert!(acts.contains(&now), "{now} ms, {came} pages came");
        }
    }
}

/// A guest that ran long enough owes nothing, and its next hold has the whole deadline.
/// Semantics: 51.
#[test]
fn a_guest_that_ran_as_long_as_it_was_held_begins_anew() {
    let mut account = Account::default();
    account.look(ms(1000), true, Pages(0));
    account.look(ms(5000), false, Pages(1));
    assert_eq!(account.held(ms(7000)), ms(2000));
    account.look(ms(9000), true, Pages(1));
    assert_eq!(account.verdict(Pages(1), DEADLINE, false), Verdict::Wait(DEADLINE));
    account.look(ms(13_999), true, Pages(1));
    assert_eq!(account.verdict(Pages(1), DEADLINE, false), Verdict::Wait(ms(1)));
    account.look(ms(14_000), true, Pages(1));
    assert_eq!(account.verdict(Pages(1), DEADLINE, false), Verdict::Act);
}

proptest! {
    /// Whoever gives less than is brisk, however that is spread over time, holds nobody for longer than the deadline and
    /// [`LATE`], less what the guest runs.
    /// Semantics: B34, T11.
    #[test]
    fn the_time_held_is_bounded(
        rounds in prop::collection::vec((10u64..3000, 0u64..100, 0u64..300, any::<bool>()), 200),
        missing in 1u64..5000,
    ) {
        let (mut account, mut now, mut granted) = (Account::default(), 0, 0);
        for (held, runs, gets, evicts) in rounds {
            account.look(ms(now), true, Pages(granted));
            now += held;
            // At most half of what is brisk, and so in every window.
            granted += gets.min(held * BRISK / 2000);
            account.look(ms(now), true, Pages(granted));
            if account.verdict(Pages(missing), DEADLINE, evicts) == Verdict::Act {
                return Ok(());
            }
            prop_assert!(account.held(ms(now)) < DEADLINE + LATE);
            account.look(ms(now), false, Pages(granted));
            now += runs.min(held / 2);
        }
    }
}

//! A clock that jumps. What is decided by how long something lasts is not decided twice for that, nor before its time, and nothing
//! panics. [`crate::oom`] has the same of those whose memory is waited for, and a trace in [`crate::host`] what is said moment by
//! moment.
//!
//! The controller's own clock is the kernel's monotonic one: nobody can set it, and it stands still while the host sleeps. It seems to
//! jump ahead when the controller was stopped for a time.

use std::time::Duration;

use memcg_core::Pages;
use memcg_core::hold::{Account, Verdict};
use memcg_core::host::{Reading, Terms, Watch};
use memcg_core::thrash;
use memcg_core::tree::Tree;
use memcg_core::units::Limit;
use proptest::prelude::*;

use crate::nodes::vm;

/// A day, in milliseconds.
const DAY: i64 = 86_400_000;

/// Steps of a clock, in milliseconds: now and then it is set back, or ahead.
fn step() -> impl Strategy<Value = i64> {
    prop_oneof![12 => 0..3000i64, 1 => -DAY..0, 1 => 3000..DAY]
}

/// MiB that a host of 1 GiB has: mostly far too little.
fn available() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0u64..30, 1 => 60u64..200]
}

/// The clock.
struct Clock {
    now: Duration,
    /// What it has gone on by; being set back takes nothing from it.
    passed: Duration,
}

impl Clock {
    fn new() -> Self {
        Self { now: Duration::from_secs(3600), passed: Duration::ZERO }
    }

    fn step(&mut self, ms: i64) {
        let by = Duration::from_millis(ms.unsigned_abs());
        if ms < 0 {
            self.now = self.now.saturating_sub(by);
        } else {
            (self.now, self.passed) = (self.now + by, self.passed + by);
        }
    }
}

proptest! {
    /// Nobody is chosen for the host before it has been critical for its time without a break, nor twice before it has cooled down.
    #[test]
    fn no_clock_makes_a_host_choose_twice(moments in prop::collection::vec((step(), available()), 1..300)) {
        let terms = Terms::new(Pages::from_mib(1024));
        let (mut watch, mut clock) = (Watch::new(terms), Clock::new());
        let (mut critical, mut chosen) = (None, None::<Duration>);
        for (ms, available) in moments {
            clock.step(ms);
            let reading = Reading { available: Pages::from_mib(available), stalled: None };
            critical = (reading.available < terms.critical).then(|| critical.unwrap_or(clock.passed));
            let verdict = watch.step(clock.now, reading, Pages::ZERO);
            prop_assert!(watch.next_look(reading) <= Duration::from_secs(10));
            if verdict.victim {
                prop_assert!(critical.is_some_and(|since| clock.passed - since >= terms.patience));
                prop_assert!(chosen.is_none_or(|before| clock.passed - before >= terms.cool_down));
                chosen = Some(clock.passed);
                watch.chosen(clock.now);
            }
            if watch.may_resume(clock.now) {
                prop_assert!(verdict.short.is_none());
                watch.resumed(clock.now);
            }
        }
    }

    /// Nobody is acted on who was not held for the deadline.
    #[test]
    fn no_clock_holds_a_guest_for_longer_than_it_was(
        moments in prop::collection::vec((step(), any::<bool>(), 0u64..20), 1..300),
        deadline in 100u64..10_000,
    ) {
        let deadline = Duration::from_millis(deadline);
        let (mut account, mut clock) = (Account::default(), Clock::new());
        account.look(clock.now, false, Pages::ZERO);
        let (mut held, mut is_held, mut granted) = (Duration::ZERO, false, 0);
        for (ms, holds, gets) in moments {
            let before = clock.passed;
            clock.step(ms);
            if is_held {
                held += clock.passed - before;
            }
            (is_held, granted) = (holds, granted + gets);
            account.look(clock.now, is_held, Pages(granted));
            if account.verdict(Pages(1), deadline, false) == Verdict::Act {
                prop_assert!(held >= deadline);
            }
        }
    }

    /// Guests thrash when they have for all of that time, and again when they have for as long once more.
    #[test]
    fn no_clock_makes_guests_thrash_sooner(moments in prop::collection::vec((step(), 0u64..4), 1..300)) {
        let mut tree = Tree::new(Limit::Max);
        let root = tree.root();
        let guests = ["a", "b"].map(|name| vm(&mut tree, root, name));
        let (mut watch, mut clock) = (thrash::Watch::default(), Clock::new());
        let (mut returned, mut since) = (0, Duration::ZERO);
        watch.step(clock.now, guests.map(|id| (id, 0)), |_| Some(Duration::ZERO));
        for (ms, suffer) in moments {
            clock.step(ms);
            returned += if suffer > 0 { 1 << 24 } else { 0 };
            if watch.step(clock.now, guests.map(|id| (id, returned)), |_| Some(Duration::ZERO)) {
                prop_assert!(clock.passed - since >= thrash::LASTS);
                watch.acted();
                since = clock.passed;
            }
        }
    }
}

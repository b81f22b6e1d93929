//! The ladder: which rung, when, and what is asked for there.

use std::time::Duration;

use memcg_core::ladder::{Asks, Driver, Eviction, Ladder, Means, Rung, SPREAD, STEP, Sample, Terms, aims};
use memcg_core::spread::Facts;
use memcg_core::tree::{LimitPatch, Mode, Tree};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

use crate::nodes::{family, group, vm};

use Rung::{Balloon, Evict, Hold, Oom, Recall, Reports, Rest, Stuck};

const GOAL: Pages = Pages(10_000);

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A VM of which everything can be had.
const WILLING: Means =
    Means { stock: Pages(100), reporting: true, driver: Driver::Cooperating, eviction: Eviction::Possible, held: None };

/// One of which only cold pages can be had.
const DEAF: Means = Means { stock: Pages::ZERO, reporting: false, driver: Driver::Absent, ..WILLING };

/// One of which nothing can be had.
const EMPTY: Means = Means { eviction: Eviction::Stuck, ..DEAF };

/// A ladder and what it sees.
struct Climb {
    ladder: Ladder,
    sample: Sample,
}

impl Climb {
    fn new(means: Means) -> Climb {
        let sample = Sample { now: ms(1000), usage: Pages(20_000), goal: Some(GOAL), until: None, means };
        Climb { ladder: Ladder::new(Terms::default()), sample }
    }

    /// Looks after `wait` ms; the rungs that were reached.
    fn after(&mut self, wait: u64) -> Vec<Rung> {
        self.sample.now += ms(wait);
        self.ladder.look(&self.sample).collect()
    }

    /// Goes on to the ladder's own deadline.
    fn overdue(&mut self) -> Vec<Rung> {
        self.sample.now = self.ladder.deadline(&self.sample).expect("it has a deadline");
        self.ladder.look(&self.sample).collect()
    }

    fn held(&mut self, until: u64) {
        self.sample.means.held = Some(ms(until));
    }
}

/// Everything polite has its time, one after the other, and all of it goes on when the next thing begins.
#[test]
fn a_willing_guest_is_asked_politely_first() {
    let mut climb = Climb::new(WILLING);
    let asks = |recall, balloon, evict| Asks { recall, balloon, evict };
    assert_eq!(climb.ladder.asks(), Asks::default());
    assert_eq!(climb.after(0), [Recall]);
    assert_eq!(climb.ladder.asks(), asks(true, None, None));
    assert_eq!(climb.after(1999), []);
    assert_eq!(climb.after(1), [Reports]);
    assert_eq!(climb.ladder.asks(), asks(true, None, None));
    assert_eq!(climb.overdue(), [Balloon]);
    assert_eq!(climb.ladder.asks(), asks(true, Some(GOAL), None));
    assert_eq!((climb.after(1999), climb.after(1)), (vec![], vec![Evict]));
    assert_eq!(climb.ladder.asks(), asks(true, Some(GOAL), Some(GOAL)));
    assert_eq!((climb.ladder.rung(), climb.ladder.since()), (Evict, ms(7000)));
    climb.sample.usage = GOAL;
    assert_eq!(climb.after(0), [Rest]);
    assert_eq!((climb.ladder.asks(), climb.ladder.goal()), (Asks::default(), None));
}

/// What cannot be had is not waited for.
#[test]
fn rungs_that_have_nothing_are_passed_at_once() {
    assert_eq!(Climb::new(DEAF).after(0), [Recall, Reports, Balloon, Evict]);
    assert_eq!(Climb::new(EMPTY).after(0), [Recall, Reports, Balloon, Stuck]);
    for driver in [Driver::Slow, Driver::Stalled] {
        assert_eq!(Climb::new(Means { driver, ..DEAF }).after(0), [Recall, Reports, Balloon, Evict]);
    }
    let stock = Means { stock: Pages(1), ..DEAF };
    let mut climb = Climb::new(stock);
    assert_eq!(climb.after(0), [Recall]);
    climb.sample.means.stock = Pages::ZERO;
    assert_eq!(climb.after(10), [Reports, Balloon, Evict]);
    let mut climb = Climb::new(Means { stock: Pages::ZERO, ..WILLING });
    assert_eq!(climb.after(0), [Recall, Reports]);
    climb.sample.means.reporting = false;
    assert_eq!(climb.after(10), [Balloon]);
    climb.sample.means.driver = Driver::Slow;
    assert_eq!(climb.after(10), [Evict]);
}

/// A guest that owes pages cannot help itself: its cold pages are evicted at once, whatever was tried before.
/// Semantics: T7.
#[test]
fn who_is_held_is_not_waited_for() {
    for looks in 0..3 {
        let mut climb = Climb::new(WILLING);
        for _ in 0..looks {
            climb.after(0);
            climb.sample.means.stock = Pages::ZERO;
        }
        climb.held(60_000);
        assert_eq!(climb.after(0).last(), Some(&Evict), "after {looks} looks");
    }
    let mut climb = Climb::new(WILLING);
    climb.held(60_000);
    assert_eq!(climb.after(0), [Recall, Evict]);
    // It is held although its usage would be allowed: the pages that it owes are more than there are.
    let mut climb = Climb::new(DEAF);
    climb.sample.usage = GOAL;
    climb.held(60_000);
    assert_eq!(climb.after(0), [Recall, Evict]);
    climb.sample.means.held = None;
    assert_eq!(climb.after(0), [Rest]);
}

/// When nothing is left to be evicted it stays held, and at the end of the time that it was given the policy is to act.
#[test]
fn a_hold_ends_with_the_policy() {
    let mut climb = Climb::new(EMPTY);
    climb.held(6000);
    assert_eq!(climb.after(0), [Recall, Evict, Hold]);
    assert_eq!(climb.after(4999), []);
    assert_eq!(climb.after(1), [Oom]);
    assert_eq!(climb.after(1), []);
    // Whoever holds gives it more time.
    climb.held(9000);
    assert_eq!(climb.after(0), [Hold]);
    // Something became cold, and has been evicted.
    climb.sample.usage = Pages(15_000);
    climb.sample.means.eviction = Eviction::Possible;
    assert_eq!(climb.after(1), [Evict]);
    // No more came.
    assert_eq!(climb.overdue(), [Hold]);
    assert_eq!(climb.overdue(), [Oom]);
    climb.sample.means.held = None;
    climb.sample.usage = GOAL;
    assert_eq!(climb.after(0), [Rest]);
}

/// Eviction has its time anew as long as it gets somewhere, and a page now and then is nowhere.
/// Semantics: 42, 117.
#[test]
fn only_memory_that_came_back_is_progress() {
    let mut climb = Climb::new(DEAF);
    climb.after(0);
    for _ in 0..5 {
        climb.sample.usage = climb.sample.usage.saturating_sub(Pages(500));
        assert_eq!(climb.after(1500), []);
    }
    for _ in 0..3 {
        climb.sample.usage = climb.sample.usage.saturating_sub(Pages(10));
        assert_eq!(climb.after(600), []);
    }
    climb.sample.usage = climb.sample.usage.saturating_sub(Pages(10));
    assert_eq!(climb.after(600), [Stuck]);
    // All of it goes on, and when it gets somewhere that is seen.
    assert_eq!(climb.ladder.asks().evict, Some(GOAL));
    assert_eq!((climb.ladder.deadline(&climb.sample), climb.after(60_000)), (None, vec![]));
    climb.sample.usage = climb.sample.usage.saturating_sub(Pages(500));
    assert_eq!(climb.after(0), [Evict]);
}

/// With nothing to evict the balloon is waited for as long as it gives.
#[test]
fn a_balloon_that_gives_is_enough() {
    let mut climb = Climb::new(Means { driver: Driver::Cooperating, ..EMPTY });
    assert_eq!(climb.after(0), [Recall, Reports, Balloon]);
    for _ in 0..5 {
        climb.sample.usage = climb.sample.usage.saturating_sub(Pages(500));
        assert_eq!(climb.after(1500), []);
    }
    assert_eq!(climb.overdue(), [Stuck]);
}

/// The polite means have half of the time that there is, so that the other half is left for what needs no consent.
#[test]
fn before_a_deadline_eviction_begins_in_time() {
    for (wait, rung) in [(2400, 400), (12_000, 2000), (120_000, 2000), (6, 1)] {
        let mut climb = Climb::new(WILLING);
        climb.sample.until = Some(climb.sample.now + ms(wait));
        assert_eq!(climb.after(0), [Recall]);
        for next in [Reports, Balloon, Evict] {
            assert_eq!(climb.after(rung), [next], "of {wait} ms");
        }
        // At the deadline the climb is over, whatever comes later.
        climb.sample.means.driver = Driver::Stalled;
        climb.sample.usage = Pages(19_000);
        climb.sample.now = climb.sample.until.expect("set");
        assert_eq!(climb.after(0), [Stuck], "of {wait} ms");
        climb.sample.usage = Pages(18_000);
        assert_eq!(climb.after(1), []);
    }
}

/// Somebody wants more than before: that has its own time from the start.
#[test]
fn a_lower_goal_is_another_climb() {
    let mut climb = Climb::new(DEAF);
    climb.after(0);
    climb.sample.means = WILLING;
    climb.sample.goal = Some(Pages(9000));
    assert_eq!(climb.after(1000), [Recall]);
    assert_eq!((climb.ladder.goal(), climb.ladder.since()), (Some(Pages(9000)), ms(2000)));
    climb.sample.goal = Some(Pages(9500));
    assert_eq!(climb.after(0), []);
    climb.sample.goal = None;
    assert_eq!(climb.after(0), [Rest]);
    climb.held(60_000);
    assert_eq!(climb.after(0), [], "nobody says what it should come down to");
}

/// Every pair is decided, and no rung is a dead end.
#[test]
fn transitions_are_those_of_the_diagram() {
    let next = |rung: Rung| Rung::ALL.into_iter().filter(move |next| rung.can_become(*next)).collect::<Vec<_>>();
    let diagram = [
        (Rest, vec![Recall]),
        (Recall, vec![Rest, Reports, Evict]),
        (Reports, vec![Rest, Balloon, Evict]),
        (Balloon, vec![Rest, Evict, Stuck]),
        (Evict, vec![Rest, Stuck, Hold]),
        (Stuck, vec![Rest, Evict, Hold]),
        (Hold, vec![Rest, Evict, Oom]),
        (Oom, vec![Rest, Evict, Hold]),
    ];
    for (rung, becomes) in diagram {
        assert_eq!(next(rung), becomes, "{rung:?}");
    }
}

/// Of many together each can be asked for what it has.
#[test]
fn a_group_can_give_what_one_of_it_can() {
    let held = |until| Means { held: Some(ms(until)), ..EMPTY };
    let all = Means::together([Means { stock: Pages(7), ..EMPTY }, WILLING, held(9), held(5)]);
    assert_eq!(all, Means { stock: Pages(107), held: Some(ms(5)), ..WILLING });
    assert_eq!(Means::together([]), Means::default());
    assert_eq!(Means::together([EMPTY, DEAF]), DEAF);
}

/// One engine for a VM, a group and the host: those below give, and nobody else.
/// Semantics: 41, 63.
#[test]
fn the_need_of_a_group_is_divided_below_it() {
    let mut family = family();
    let all = [(family.vm, 300), (family.sibling, 100), (family.uncle, 1000)];
    for (id, pages) in all {
        let _ = family.tree.try_charge(id, Pages(pages), Mode::Wait).expect("no limit");
    }
    let known = |_| Some(Facts::default());
    let of_group = aims(&family.tree, family.group, Pages(40), &SPREAD, known);
    assert_eq!(of_group, (vec![(family.vm, Pages(270)), (family.sibling, Pages(90))], Pages::ZERO));
    let of_vm = aims(&family.tree, family.vm, Pages(400), &SPREAD, known);
    assert_eq!(of_vm, (vec![(family.vm, Pages::ZERO)], Pages(100)));
    let some = aims(&family.tree, family.group, Pages(40), &SPREAD, |id| (id == family.sibling).then(Facts::default));
    assert_eq!(some, (vec![(family.sibling, Pages(60))], Pages::ZERO));
}

/// Whoever is busy loses next to nothing as long as a neighbour has idle pages, and its part when it has not.
/// Semantics: 41, 63.
#[test]
fn idle_pages_of_a_neighbour_are_evicted_before_those_in_use() {
    let mut family = family();
    for (id, pages) in [(family.vm, 900), (family.sibling, 300)] {
        let _ = family.tree.try_charge(id, Pages(pages), Mode::Wait).expect("no limit");
    }
    let gives = |idle| {
        let of = |id| Facts { idle: Pages(if id == family.sibling { idle } else { 0 }), ..Facts::default() };
        let (aims, _) = aims(&family.tree, family.group, Pages(200), &SPREAD, |id| Some(of(id)));
        [900 - aims[0].1.0, 300 - aims[1].1.0]
    };
    assert_eq!(gives(300), [6, 194]);
    assert_eq!(gives(0), [150, 50]);
}

fn means() -> impl Strategy<Value = Means> {
    let driver = prop::sample::select(vec![Driver::Absent, Driver::Stalled, Driver::Slow, Driver::Cooperating]);
    let eviction = prop::sample::select(vec![Eviction::Stuck, Eviction::Possible]);
    (0u64..3, any::<bool>(), driver, eviction, prop::option::weighted(0.3, 0u64..20_000)).prop_map(
        |(stock, reporting, driver, eviction, held)| Means {
            stock: Pages(stock * 50),
            reporting,
            driver,
            eviction,
            held: held.map(ms),
        },
    )
}

proptest! {
    /// Whatever a target does, its ladder goes only where it may, and asks for nothing that nobody wants; and whenever
    /// nothing gets better, a bounded time later it has ended in a rung that says so.
    /// Semantics: 44, B34, B50.
    #[test]
    fn a_ladder_always_gets_to_an_end(
        steps in prop::collection::vec((0u64..3000, 0u64..30_000, means(), any::<bool>()), 1..30),
        until in prop::option::of(1000u64..20_000),
    ) {
        let mut climb = Climb::new(EMPTY);
        climb.sample.until = until.map(ms);
        for (wait, usage, means, wanted) in steps {
            climb.sample.usage = Pages(usage);
            climb.sample.means = means;
            climb.sample.goal = wanted.then_some(GOAL);
            let mut at = climb.ladder.rung();
            for rung in climb.after(wait) {
                prop_assert!(at.can_become(rung), "{at:?} to {rung:?}");
                at = rung;
            }
            prop_assert_eq!(at, climb.ladder.rung());
            let over = wanted && (climb.sample.usage > GOAL || means.held.is_some());
            prop_assert_eq!(over, at != Rest);
            prop_assert_eq!(climb.ladder.asks() != Asks::default(), over);
            prop_assert!(climb.ladder.deadline(&climb.sample).is_none_or(|at| at > climb.sample.now));
        }
        // Nothing changes any more: each deadline is the end of a rung, and there are not more than there are rungs.
        let start = climb.sample.now;
        for _ in 0..Rung::ALL.len() {
            if climb.ladder.deadline(&climb.sample).is_some() {
                prop_assert!(!climb.overdue().is_empty());
            }
        }
        prop_assert!(matches!(climb.ladder.rung(), Rest | Stuck | Oom), "{:?}", climb.ladder);
        let held = climb.sample.means.held.unwrap_or_default();
        prop_assert!(climb.sample.now <= (start + ms(8000)).max(held));
    }

    /// A guest that gives as little as possible delays the end by a bounded number of rungs.
    /// Semantics: B83.
    #[test]
    fn a_trickle_is_not_for_ever(pages in 1u64..200, every in 1u64..2000) {
        let mut climb = Climb::new(DEAF);
        let mut looks = 0;
        climb.after(0);
        while climb.ladder.rung() == Evict {
            climb.sample.usage = climb.sample.usage.saturating_sub(Pages(pages));
            climb.after(every);
            looks += 1;
            prop_assert!(looks <= 10_000 / pages + 2000 / every + 2);
        }
        prop_assert!(matches!(climb.ladder.rung(), Rest | Stuck));
    }

    /// However usage and protection are distributed, nobody outside the subtree is asked, and what nobody can give is
    /// said.
    /// Semantics: 63.
    #[test]
    fn nobody_outside_of_the_subtree_gives(
        vms in prop::collection::vec((0usize..3, 0u64..1000, 0u64..500), 1..12),
        top in 0usize..3,
        need in 0u64..5000,
    ) {
        let mut tree = Tree::new(Limit::Max);
        let root = tree.root();
        let gold = group(&mut tree, root, "gold");
        let web = group(&mut tree, gold, "web");
        let groups = [root, gold, web];
        for (n, (place, usage, min)) in vms.into_iter().enumerate() {
            let id = vm(&mut tree, groups[place], &format!("v{n}"));
            let _ = tree.try_charge(id, Pages(usage), Mode::Wait).expect("no limit");
            let patch = LimitPatch { min: Some(Limit::Pages(Pages(min))), ..LimitPatch::default() };
            tree.set_limits(id, &patch).expect("no max");
        }
        let top = groups[top];
        let (aims, short) = aims(&tree, top, Pages(need), &SPREAD, |_| Some(Facts::default()));
        let mut given = 0;
        for (id, aim) in aims {
            prop_assert!(tree.is_within(id, top));
            let usage = tree.usage(id);
            prop_assert!(aim < usage);
            given += usage.saturating_sub(aim).0;
        }
        prop_assert_eq!(given + short.0, need);
    }
}

/// The least progress is what is worth a look.
#[test]
fn the_least_progress_is_a_quarter_of_a_mebibyte() {
    assert_eq!(STEP.bytes(), 256 << 10);
}

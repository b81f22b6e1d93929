//! One change of `memory.max` on a running guest.

use std::time::Duration;

use memcg_core::limit_change::{Begun, LimitChange, Mode, Outcome, Step, Terms, slack};
use memcg_core::tree::{Kind, LimitPatch, Mode as Charge, NodeId, Overhead, SetLimitError, Tree};
use memcg_core::units::{Limit, Pages};

use proptest::prelude::*;

const WAIT: Duration = Duration::from_secs(10);
const TERMS: Terms = Terms { wait: WAIT, slack: Pages(10), margin: Pages::ZERO };

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A VM with `used` pages and a limit.
fn vm(used: u64, max: Limit) -> (Tree, NodeId) {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let vm = crate::nodes::vm(&mut tree, root, "vm");
    tree.set_limits(vm, &LimitPatch::max(max)).unwrap();
    let _ = tree.try_charge(vm, Pages(used), Charge::Wait).unwrap();
    (tree, vm)
}

fn limit(n: u64) -> Limit {
    Limit::Pages(Pages(n))
}

fn begin(tree: &mut Tree, id: NodeId, new: Limit, mode: Mode) -> Result<Begun, SetLimitError> {
    LimitChange::begin(tree, id, new, mode, at(0), TERMS)
}

fn pending(tree: &mut Tree, id: NodeId, new: u64) -> LimitChange {
    match begin(tree, id, limit(new), Mode::Reclaim) {
        Ok(Begun::Pending(change)) => change,
        other => panic!("{other:?}"),
    }
}

fn committed(begun: Result<Begun, SetLimitError>) -> Outcome {
    match begun {
        Ok(Begun::Committed(outcome)) => outcome,
        other => panic!("{other:?}"),
    }
}

/// semantics row 118, B81: usage at the new limit fits; nothing more is reclaimed.
#[test]
fn usage_that_fits_is_committed_at_once() {
    for mode in [Mode::Reclaim, Mode::Force, Mode::Refuse] {
        let (mut tree, vm) = vm(100, limit(200));
        let generation = tree.generation(vm);
        let outcome = committed(begin(&mut tree, vm, limit(100), mode));
        assert_eq!(outcome, Outcome { generation: generation + 1, usage: Pages(100), overcharge: Pages::ZERO });
        assert_eq!(tree.limits(vm).max, limit(100));
        let _ = committed(begin(&mut tree, vm, Limit::Max, mode));
        assert_eq!(tree.margin(vm), None);
    }
}

/// semantics row 118: while usage falls the old limit is read, a ceiling follows; then the new one is in force.
#[test]
fn reclaim_commits_when_usage_fits() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(200), Some(limit(50)), Some(Pages(110))));
    assert_eq!(node.effective_high, limit(0), "reclaim aims below the limit to come");
    tree.uncharge(vm, Pages(30));
    assert_eq!(change.on_usage(&mut tree, at(1)), Step::Waiting { ceiling: Pages(80), progress: Pages(30) });
    tree.uncharge(vm, Pages(20));
    let Step::Committed(outcome) = change.on_usage(&mut tree, at(2)) else { panic!("usage is 50") };
    assert_eq!((outcome.usage, outcome.overcharge), (Pages(50), Pages::ZERO));
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(50), None, None));
    assert_eq!(node.generation, outcome.generation);
    assert_eq!(tree.try_charge(vm, Pages(1), Charge::Wait).unwrap_err().level, vm);
    assert_eq!(change.on_usage(&mut tree, at(999_999)), Step::Committed(outcome), "the end is the end");
}

/// B83: a guest that faults back in meets the ceiling, which only falls.
#[test]
fn the_ceiling_is_a_ratchet() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    tree.uncharge(vm, Pages(40));
    assert_eq!(change.on_usage(&mut tree, at(1)), Step::Waiting { ceiling: Pages(70), progress: Pages(40) });
    let _ = tree.try_charge(vm, Pages(10), Charge::Wait).expect("the slack lets the guest go on");
    let _ = tree.try_charge(vm, Pages(1), Charge::Wait).expect_err("and no further");
    assert_eq!(change.on_usage(&mut tree, at(2)), Step::Waiting { ceiling: Pages(70), progress: Pages(40) });
    tree.uncharge(vm, Pages(18));
    assert_eq!(change.on_usage(&mut tree, at(3)), Step::Waiting { ceiling: Pages(62), progress: Pages(48) });
}

/// A driver that must touch a batch of pages before it can give them back is held at the ceiling, and held it gives nothing.
#[test]
fn a_guest_held_at_the_ceiling_gets_more_slack_but_never_more_than_the_old_limit() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    for ceiling in [120, 140, 180, 200, 200] {
        change.widen();
        assert_eq!(change.on_usage(&mut tree, at(1)), Step::Waiting { ceiling: Pages(ceiling), progress: Pages::ZERO });
    }
}

/// A guest whose balloon is still filling would be held at the very limit, in the middle of giving.
#[test]
fn with_a_margin_the_limit_is_in_force_only_when_usage_is_that_far_below_or_at_the_deadline() {
    let terms = Terms { margin: Pages(5), ..TERMS };
    let (mut tree, vm) = vm(52, limit(200));
    let begun = LimitChange::begin(&mut tree, vm, limit(55), Mode::Reclaim, at(0), terms);
    let Ok(Begun::Pending(mut change)) = begun else { panic!("52 is not 5 below 55") };
    tree.uncharge(vm, Pages(1));
    assert!(matches!(change.on_usage(&mut tree, at(1)), Step::Waiting { .. }));
    change.set_margin(Pages(4));
    assert!(matches!(change.on_usage(&mut tree, at(2)), Step::Committed(_)), "51 is 4 below 55");
    let begun = LimitChange::begin(&mut tree, vm, limit(52), Mode::Reclaim, at(3), terms);
    let Ok(Begun::Pending(mut change)) = begun else { panic!("51 is not 5 below 52") };
    assert!(matches!(change.on_usage(&mut tree, at(3) + WAIT), Step::Committed(_)), "it fits: in time");
    let begun = LimitChange::begin(&mut tree, vm, limit(51), Mode::Refuse, at(0), terms);
    assert!(matches!(begun, Ok(Begun::Committed(_))), "a refusal knows no margin");
}

/// The ceiling is never below the new limit, never above the old one.
#[test]
fn the_ceiling_stays_between_the_limits() {
    let (mut tree, vm) = vm(100, limit(105));
    let mut change = pending(&mut tree, vm, 99);
    assert_eq!(change.on_usage(&mut tree, at(1)), Step::Waiting { ceiling: Pages(105), progress: Pages::ZERO });
    let (mut tree, vm) = self::vm(100, Limit::Max);
    let change =
        LimitChange::begin(&mut tree, vm, limit(98), Mode::Reclaim, at(0), Terms { slack: Pages::ZERO, ..TERMS });
    assert_eq!(tree.snapshot(vm).ceiling, Some(Pages(100)));
    let Ok(Begun::Pending(mut change)) = change else { panic!("usage is above") };
    tree.uncharge(vm, Pages(1));
    assert_eq!(change.on_usage(&mut tree, at(1)), Step::Waiting { ceiling: Pages(99), progress: Pages(1) });
    assert_eq!(slack(2), Pages(256 + 128));
}

/// semantics row 118: pinned memory. At the deadline the old limit is in force, wholly, and the answer says how far.
#[test]
fn at_the_deadline_the_old_limit_stays() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    tree.uncharge(vm, Pages(30));
    assert!(!change.on_usage(&mut tree, at(9_999)).is_final());
    let _ = tree.try_charge(vm, Pages(5), Charge::Wait).unwrap();
    let not_reached = Step::NotReached { usage: Pages(75), lowest: Pages(70) };
    assert_eq!(change.on_usage(&mut tree, at(10_000)), not_reached);
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(200), None, None));
    let _ = tree.try_charge(vm, Pages(125), Charge::Wait).expect("the old limit");
    tree.uncharge(vm, Pages(200));
    assert_eq!(change.on_usage(&mut tree, at(20_000)), not_reached, "too late");
    assert_eq!(tree.limits(vm).max, limit(200));
}

/// Usage that fits when the deadline is noticed is in time; limit 0 is reached at usage 0 (B81).
#[test]
fn fitting_at_the_deadline_is_in_time() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 0);
    tree.uncharge(vm, Pages(100));
    assert!(matches!(change.on_usage(&mut tree, at(10_001)), Step::Committed(_)));
    assert_eq!(tree.limits(vm).max, Limit::ZERO);
}

/// semantics rows 82, 83: forced, the excess is reported and may only fall.
#[test]
fn force_reports_the_excess() {
    let (mut tree, vm) = vm(100, limit(200));
    let outcome = committed(begin(&mut tree, vm, limit(60), Mode::Force));
    assert_eq!((outcome.usage, outcome.overcharge), (Pages(100), Pages(40)));
    assert_eq!(tree.limits(vm).max, limit(60));
    let _ = tree.try_charge(vm, Pages(1), Charge::Wait).unwrap_err();
    tree.uncharge(vm, Pages(10));
    assert_eq!(tree.snapshot(vm).overcharge, Pages(30));
    // Raising it part of the way is not lowering: at once, though usage is still above.
    let outcome = committed(begin(&mut tree, vm, limit(70), Mode::Refuse));
    assert_eq!(outcome.overcharge, Pages(20));
    assert!(tree.check().is_empty());
}

/// semantics row 71: refused, the old limit stays.
#[test]
fn refuse_is_an_error() {
    let (mut tree, vm) = vm(100, limit(200));
    let before = tree.snapshot(vm);
    let error = begin(&mut tree, vm, limit(99), Mode::Refuse).unwrap_err();
    assert_eq!(error, SetLimitError::BelowUsage { usage: Pages(100), limit: limit(99) });
    assert_eq!(tree.snapshot(vm), before);
}

/// Two clients: the later accepted request wins, the earlier one learns of it and touches nothing more.
#[test]
fn a_later_request_supersedes() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut first = pending(&mut tree, vm, 50);
    let mut second = pending(&mut tree, vm, 80);
    assert_eq!(tree.snapshot(vm).max_pending, Some(limit(80)));
    tree.uncharge(vm, Pages(15));
    assert_eq!(first.on_usage(&mut tree, at(99_999)), Step::Superseded);
    assert_eq!(tree.snapshot(vm).max_pending, Some(limit(80)), "the second goes on");
    tree.uncharge(vm, Pages(5));
    assert!(matches!(second.on_usage(&mut tree, at(1)), Step::Committed(_)));
    // A request that needs no waiting supersedes as well, and lifts the ceiling.
    let mut third = pending(&mut tree, vm, 10);
    let _ = committed(begin(&mut tree, vm, limit(300), Mode::Reclaim));
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(300), None, None));
    assert_eq!(third.on_usage(&mut tree, at(1)), Step::Superseded);
    // So does writing the limit that is in force: it says that this is the one that is wanted.
    let mut fourth = pending(&mut tree, vm, 10);
    let _ = committed(begin(&mut tree, vm, limit(300), Mode::Reclaim));
    assert_eq!((fourth.on_usage(&mut tree, at(1)), tree.snapshot(vm).ceiling), (Step::Superseded, None));
}

/// A request that is refused leaves the pending one alone; a pending one makes the seen generation stale.
#[test]
fn a_refused_request_does_not_supersede() {
    let (mut tree, vm) = vm(100, limit(200));
    let seen = tree.generation(vm);
    let mut first = pending(&mut tree, vm, 50);
    let _ = begin(&mut tree, vm, limit(40), Mode::Refuse).unwrap_err();
    let patch = LimitPatch { if_generation: Some(seen), ..LimitPatch::max(limit(500)) };
    let stale = LimitChange::begin_patch(&mut tree, vm, &patch, Mode::Force, at(0), TERMS).unwrap_err();
    assert!(matches!(stale, SetLimitError::Stale { .. }));
    assert!(matches!(first.on_usage(&mut tree, at(1)), Step::Waiting { .. }));
    assert_eq!(tree.snapshot(vm).max_pending, Some(limit(50)));
}

/// Everything in a request comes into force together, or nothing does.
#[test]
fn a_request_is_all_or_nothing() {
    let (mut tree, vm) = vm(100, limit(200));
    let patch = LimitPatch { high: Some(limit(40)), low: Some(limit(20)), ..LimitPatch::max(limit(50)) };
    let begin = |tree: &mut Tree| match LimitChange::begin_patch(tree, vm, &patch, Mode::Reclaim, at(0), TERMS) {
        Ok(Begun::Pending(change)) => change,
        other => panic!("{other:?}"),
    };
    let before = tree.limits(vm);
    let mut change = begin(&mut tree);
    assert_eq!((tree.limits(vm), tree.reclaim_high(vm)), (before, limit(40)));
    assert!(tree.above_high(vm), "reclaim already works towards it");
    assert!(matches!(change.on_usage(&mut tree, WAIT), Step::NotReached { .. }));
    assert_eq!(tree.limits(vm), before);
    let mut change = begin(&mut tree);
    tree.uncharge(vm, Pages(60));
    assert!(matches!(change.on_usage(&mut tree, at(1)), Step::Committed(_)));
    assert_eq!(tree.limits(vm), patch.apply(before));
    // A patch that cannot be is refused before anything is pending.
    let bad = LimitPatch { high: Some(limit(40)), ..LimitPatch::max(limit(30)) };
    let error = LimitChange::begin_patch(&mut tree, vm, &bad, Mode::Reclaim, at(0), TERMS).unwrap_err();
    assert!(matches!(error, SetLimitError::AboveMax { knob: "memory.high", .. }));
}

/// Other limits may change while one is pending, as long as they fit both the old and the new `max`.
#[test]
fn other_limits_must_fit_the_pending_one_too() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    let min = |n| LimitPatch { min: Some(limit(n)), ..LimitPatch::default() };
    assert!(matches!(tree.set_limits(vm, &min(60)), Err(SetLimitError::AboveMax { .. })));
    tree.set_limits(vm, &min(30)).unwrap();
    tree.uncharge(vm, Pages(50));
    assert!(matches!(change.on_usage(&mut tree, at(1)), Step::Committed(_)));
    assert_eq!((tree.limits(vm).min, tree.limits(vm).max), (limit(30), limit(50)));
    assert!(tree.check().is_empty());
}

/// A `vmm.max` in the request that overhead outgrew meanwhile is not forced.
#[test]
fn overhead_that_grew_meanwhile_is_waited_for() {
    let (mut tree, vm) = vm(100, limit(200));
    let patch = LimitPatch { vmm_max: Some(limit(5)), ..LimitPatch::max(limit(50)) };
    let begun = LimitChange::begin_patch(&mut tree, vm, &patch, Mode::Reclaim, at(0), TERMS);
    let Ok(Begun::Pending(mut change)) = begun else { panic!("usage is above") };
    let _ = tree.try_charge_as(vm, Kind::Overhead(Overhead::Queue), Pages(6), Charge::Wait).unwrap();
    tree.uncharge(vm, Pages(90));
    assert!(matches!(change.on_usage(&mut tree, at(1)), Step::Waiting { .. }));
    tree.uncharge_as(vm, Kind::Overhead(Overhead::Queue), Pages(1));
    assert!(matches!(change.on_usage(&mut tree, at(2)), Step::Committed(_)));
}

#[test]
fn a_cancelled_change_leaves_no_trace() {
    let (mut tree, vm) = vm(100, limit(200));
    let change = pending(&mut tree, vm, 50);
    assert_eq!((change.node(), change.new_max(), change.deadline()), (vm, Pages(50), WAIT));
    change.cancel(&mut tree);
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(200), None, None));
    // One that is superseded cancels nothing of its successor.
    let first = pending(&mut tree, vm, 50);
    let _second = pending(&mut tree, vm, 60);
    first.cancel(&mut tree);
    assert_eq!(tree.snapshot(vm).max_pending, Some(limit(60)));
}

#[test]
fn a_node_that_is_gone_ends_the_change() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    tree.uncharge_all(vm);
    tree.remove(vm).unwrap();
    assert_eq!(change.on_usage(&mut tree, at(1)), Step::Superseded);
}

proptest! {
    /// Any guest against one change: `max` reads the old value until it is committed, the ceiling never rises and
    /// bounds usage, and the change ends by its deadline in exactly one of its two ways.
    #[test]
    fn a_change_is_in_force_or_not(
        used in 0u64..300, old in 0u64..300, new in 0u64..300, slack in 0u64..40,
        steps in prop::collection::vec((any::<bool>(), 0u64..60), 0..60),
    ) {
        let old_max = limit(old.max(used));
        let (mut tree, vm) = vm(used, old_max);
        let begun = LimitChange::begin(&mut tree, vm, limit(new), Mode::Reclaim, at(0), Terms { wait: at(50), slack: Pages(slack), ..TERMS }).unwrap();
        let mut change = match begun {
            Begun::Committed(_) => {
                prop_assert!(used <= new || limit(new) >= old_max);
                prop_assert_eq!(tree.limits(vm).max, limit(new));
                return Ok(());
            }
            Begun::Pending(change) => change,
        };
        prop_assert!(used > new);
        let mut ceiling = tree.snapshot(vm).ceiling.unwrap();
        for (ms, (grow, pages)) in (1..).zip(steps) {
            if grow {
                let _ = tree.try_charge(vm, Pages(pages), Charge::Wait);
            } else {
                tree.uncharge(vm, Pages(pages).min(tree.usage(vm)));
            }
            let usage = tree.usage(vm);
            prop_assert!(tree.check().is_empty());
            match change.on_usage(&mut tree, at(ms)) {
                Step::Waiting { ceiling: next, .. } => {
                    prop_assert!(usage > Pages(new) && ms < 50);
                    prop_assert!(next <= ceiling && next >= Pages(new) && limit(next.0) <= old_max);
                    prop_assert!(usage <= next);
                    prop_assert_eq!(tree.limits(vm).max, old_max);
                    ceiling = next;
                }
                Step::Committed(outcome) => {
                    prop_assert!(usage <= Pages(new));
                    prop_assert_eq!((outcome.usage, tree.limits(vm).max), (usage, limit(new)));
                    return Ok(());
                }
                Step::NotReached { .. } => {
                    prop_assert!(usage > Pages(new) && ms >= 50);
                    prop_assert_eq!((tree.limits(vm).max, tree.snapshot(vm).ceiling), (old_max, None));
                    return Ok(());
                }
                Step::Superseded => prop_assert!(false, "nobody else"),
            }
        }
        prop_assert!(change.on_usage(&mut tree, at(50)).is_final());
    }
}

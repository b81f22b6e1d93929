//! Changes of `memory.max` on running guests: one node. Many at once are in `transactions`.

use std::time::Duration;

use memcg_core::limit_change::{LimitChange, Mode, Request, State, slack};
use memcg_core::tree::{Kind, LimitPatch, Mode as Charge, NodeId, Overhead, SetLimitError, Tree};
use memcg_core::units::{Limit, Pages};

use proptest::prelude::*;

const WAIT: Duration = Duration::from_secs(10);

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

fn request(node: NodeId, max: Limit) -> Request {
    Request { slack: Pages(10), ..Request::new(node, LimitPatch::max(max)) }
}

fn begin(tree: &mut Tree, id: NodeId, new: Limit, mode: Mode) -> Result<LimitChange, SetLimitError> {
    LimitChange::begin(tree, &[request(id, new)], mode, at(0), WAIT)
}

fn pending(tree: &mut Tree, id: NodeId, new: u64) -> LimitChange {
    let change = begin(tree, id, limit(new), Mode::Reclaim).unwrap();
    assert_eq!(change.state(), State::Pending);
    change
}

/// Begins a change that is in force at once; usage and overcharge with it.
fn committed(tree: &mut Tree, id: NodeId, new: Limit, mode: Mode) -> (Pages, Pages) {
    let change = begin(tree, id, new, mode).unwrap();
    assert_eq!(change.state(), State::Committed);
    assert_eq!(tree.limits(id).max, new);
    let part = &change.nodes()[0];
    assert_eq!((part.node, part.generation, part.ceiling), (id, tree.generation(id), None));
    (part.usage, part.overcharge)
}

/// Looks at a change that goes on: its ceiling, and what the node has given.
fn waiting(change: &mut LimitChange, tree: &mut Tree, ms: u64) -> (u64, u64) {
    assert_eq!(change.on_usage(tree, at(ms)), State::Pending);
    let part = &change.nodes()[0];
    assert_eq!(tree.snapshot(part.node).ceiling, part.ceiling);
    (part.ceiling.unwrap().0, part.progress().0)
}

/// Usage at the new limit fits: nothing more is reclaimed, as the `<` of 2006 did, one page too many.
/// Semantics: 118, B81.
#[test]
fn usage_that_fits_is_committed_at_once() {
    for mode in [Mode::Reclaim, Mode::Force, Mode::Refuse] {
        let (mut tree, vm) = vm(100, limit(200));
        let generation = tree.generation(vm);
        assert_eq!(committed(&mut tree, vm, limit(100), mode), (Pages(100), Pages::ZERO));
        assert_eq!(tree.generation(vm), generation + 1);
        committed(&mut tree, vm, Limit::Max, mode);
        assert_eq!(tree.margin(vm), None);
    }
}

/// While usage falls the old limit is read and a ceiling follows; then the new limit is in force, in one step.
/// Semantics: 118, T3.
#[test]
fn reclaim_commits_when_usage_fits() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(200), Some(limit(50)), Some(Pages(110))));
    assert_eq!(node.effective_high, limit(0), "reclaim aims below the limit to come");
    tree.uncharge(vm, Pages(30));
    assert_eq!(waiting(&mut change, &mut tree, 1), (80, 30));
    tree.uncharge(vm, Pages(20));
    assert_eq!(change.on_usage(&mut tree, at(2)), State::Committed);
    let part = &change.nodes()[0];
    assert_eq!((part.usage, part.overcharge, part.reached), (Pages(50), Pages::ZERO, true));
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(50), None, None));
    assert_eq!(node.generation, part.generation);
    assert_eq!(tree.try_charge(vm, Pages(1), Charge::Wait).unwrap_err().level, vm);
    assert_eq!(change.on_usage(&mut tree, at(999_999)), State::Committed, "the end is the end");
}

/// The freed amount is the real fall of usage, to the page: not a balloon's target, and no batch of 32 is needed to count.
/// Semantics: 43, B35.
#[test]
fn progress_is_counted_in_pages_that_came_back() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    for given in 1..50 {
        tree.uncharge(vm, Pages(1));
        assert_eq!(waiting(&mut change, &mut tree, given), (110 - given, given));
    }
    tree.uncharge(vm, Pages(1));
    assert_eq!(change.on_usage(&mut tree, at(50)), State::Committed);
}

/// A guest that faults back in meets the ceiling, which only falls: it cannot race with its own reclaim for ever.
/// Semantics: 118, B83.
#[test]
fn the_ceiling_is_a_ratchet() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    tree.uncharge(vm, Pages(40));
    assert_eq!(waiting(&mut change, &mut tree, 1), (70, 40));
    let _ = tree.try_charge(vm, Pages(10), Charge::Wait).expect("the slack lets the guest go on");
    let _ = tree.try_charge(vm, Pages(1), Charge::Wait).expect_err("and no further");
    assert_eq!(waiting(&mut change, &mut tree, 2), (70, 40));
    tree.uncharge(vm, Pages(18));
    assert_eq!(waiting(&mut change, &mut tree, 3), (62, 48));
}

/// A driver that must touch a batch of pages before it can give them back is held at the ceiling, and held it gives nothing.
/// Semantics: 46.
#[test]
fn a_guest_held_at_the_ceiling_gets_more_slack_but_never_more_than_the_old_limit() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    for ceiling in [120, 140, 180, 200, 200] {
        change.widen(vm);
        assert_eq!(waiting(&mut change, &mut tree, 1), (ceiling, 0));
    }
}

/// A guest whose balloon is still filling would be held at the very limit, in the middle of giving.
/// Semantics: 118.
#[test]
fn with_a_margin_the_limit_is_in_force_only_when_usage_is_that_far_below_or_at_the_deadline() {
    let asks = |vm, max| Request { margin: Pages(5), ..request(vm, limit(max)) };
    let (mut tree, vm) = vm(52, limit(200));
    let mut change = LimitChange::begin(&mut tree, &[asks(vm, 55)], Mode::Reclaim, at(0), WAIT).unwrap();
    assert_eq!(change.state(), State::Pending, "52 is not 5 below 55");
    tree.uncharge(vm, Pages(1));
    assert_eq!(change.on_usage(&mut tree, at(1)), State::Pending);
    change.set_margin(vm, Pages(4));
    assert_eq!(change.on_usage(&mut tree, at(2)), State::Committed, "51 is 4 below 55");
    let mut change = LimitChange::begin(&mut tree, &[asks(vm, 52)], Mode::Reclaim, at(3), WAIT).unwrap();
    assert_eq!(change.state(), State::Pending, "51 is not 5 below 52");
    assert_eq!(change.on_usage(&mut tree, at(3) + WAIT), State::Committed, "it fits: in time");
    assert!(change.nodes()[0].reached);
    let change = LimitChange::begin(&mut tree, &[asks(vm, 51)], Mode::Refuse, at(0), WAIT).unwrap();
    assert_eq!(change.state(), State::Committed, "a refusal knows no margin");
}

/// The ceiling is never below the new limit (the guest could not reach it alive), never above the old one.
/// Semantics: B83.
#[test]
fn the_ceiling_stays_between_the_limits() {
    let (mut tree, vm) = vm(100, limit(105));
    let mut change = pending(&mut tree, vm, 99);
    assert_eq!(waiting(&mut change, &mut tree, 1), (105, 0));
    let (mut tree, vm) = self::vm(100, Limit::Max);
    let tight = Request::new(vm, LimitPatch::max(limit(98)));
    let mut change = LimitChange::begin(&mut tree, &[tight], Mode::Reclaim, at(0), WAIT).unwrap();
    assert_eq!(tree.snapshot(vm).ceiling, Some(Pages(100)));
    tree.uncharge(vm, Pages(1));
    assert_eq!(waiting(&mut change, &mut tree, 1), (99, 1));
    assert_eq!(slack(2), Pages(256 + 128));
}

/// Pinned memory: at the deadline the old limit is in force, wholly, and the answer says how far it got.
/// Semantics: 118, B83.
#[test]
fn at_the_deadline_the_old_limit_stays() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    tree.uncharge(vm, Pages(30));
    assert_eq!(change.on_usage(&mut tree, at(9_999)), State::Pending);
    let _ = tree.try_charge(vm, Pages(5), Charge::Wait).unwrap();
    assert_eq!(change.on_usage(&mut tree, at(10_000)), State::NotReached);
    let part = &change.nodes()[0];
    assert_eq!((part.usage, part.lowest, part.progress()), (Pages(75), Pages(70), Pages(30)));
    assert_eq!((part.old, part.new, part.reached, part.ceiling), (limit(200), limit(50), false, None));
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(200), None, None));
    let _ = tree.try_charge(vm, Pages(125), Charge::Wait).expect("the old limit");
    tree.uncharge(vm, Pages(200));
    assert_eq!(change.on_usage(&mut tree, at(20_000)), State::NotReached, "too late");
    assert_eq!(tree.limits(vm).max, limit(200));
}

/// Usage that fits when the deadline is noticed is in time, and a limit of 0 is reached at usage 0.
/// Semantics: 118, B81.
#[test]
fn fitting_at_the_deadline_is_in_time() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 0);
    tree.uncharge(vm, Pages(100));
    assert_eq!(change.on_usage(&mut tree, at(10_001)), State::Committed);
    assert_eq!(tree.limits(vm).max, Limit::ZERO);
    assert!(tree.try_charge(vm, Pages(1), Charge::Wait).is_err());
}

/// Forced, the excess is reported rather than hidden, and may only fall.
/// Semantics: 82, 83, T15.
#[test]
fn force_reports_the_excess() {
    let (mut tree, vm) = vm(100, limit(200));
    assert_eq!(committed(&mut tree, vm, limit(60), Mode::Force), (Pages(100), Pages(40)));
    let _ = tree.try_charge(vm, Pages(1), Charge::Wait).unwrap_err();
    tree.uncharge(vm, Pages(10));
    assert_eq!(tree.snapshot(vm).overcharge, Pages(30));
    // Raising it part of the way is not lowering: at once, though usage is still above.
    assert_eq!(committed(&mut tree, vm, limit(70), Mode::Refuse), (Pages(90), Pages(20)));
    assert!(tree.check().is_empty());
}

/// Asked to refuse, nothing has happened; the answer names the node and the numbers.
/// Semantics: 71, B2.
#[test]
fn refuse_is_an_error() {
    let (mut tree, vm) = vm(256, limit(512));
    let before = tree.snapshot(vm);
    let error = begin(&mut tree, vm, limit(255), Mode::Refuse).unwrap_err();
    assert_eq!(
        error.to_string(),
        "/vm: memory.max 1020K is below the 1M in use: free memory first, or use mode=reclaim or mode=force"
    );
    assert_eq!(tree.snapshot(vm), before);
}

/// Two clients: the later accepted request wins, the earlier one learns of it and touches nothing more.
/// Semantics: 72.
#[test]
fn a_later_request_supersedes() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut first = pending(&mut tree, vm, 50);
    let mut second = pending(&mut tree, vm, 80);
    assert_eq!(tree.snapshot(vm).max_pending, Some(limit(80)));
    tree.uncharge(vm, Pages(15));
    assert_eq!(first.on_usage(&mut tree, at(99_999)), State::Superseded);
    assert_eq!(tree.snapshot(vm).max_pending, Some(limit(80)), "the second goes on");
    tree.uncharge(vm, Pages(5));
    assert_eq!(second.on_usage(&mut tree, at(1)), State::Committed);
    // A request that needs no waiting supersedes as well, and lifts the ceiling.
    let mut third = pending(&mut tree, vm, 10);
    committed(&mut tree, vm, limit(300), Mode::Reclaim);
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(300), None, None));
    assert_eq!(third.on_usage(&mut tree, at(1)), State::Superseded);
    // So does writing the limit that is in force: it says that this is the one that is wanted.
    let mut fourth = pending(&mut tree, vm, 10);
    committed(&mut tree, vm, limit(300), Mode::Reclaim);
    assert_eq!((fourth.on_usage(&mut tree, at(1)), tree.snapshot(vm).ceiling), (State::Superseded, None));
}

/// A request that is refused leaves the pending one alone; a pending one makes the seen generation stale.
/// Semantics: 72.
#[test]
fn a_refused_request_does_not_supersede() {
    let (mut tree, vm) = vm(100, limit(200));
    let seen = tree.generation(vm);
    let mut first = pending(&mut tree, vm, 50);
    let before = tree.snapshot(vm);
    let _ = begin(&mut tree, vm, limit(40), Mode::Refuse).unwrap_err();
    let patch = LimitPatch { if_generation: Some(seen), ..LimitPatch::max(limit(500)) };
    let stale = LimitChange::begin(&mut tree, &[Request::new(vm, patch)], Mode::Force, at(0), WAIT).unwrap_err();
    assert_eq!(stale, SetLimitError::Stale { path: "/vm".to_owned(), expected: seen, actual: seen + 1 });
    assert_eq!(tree.snapshot(vm), before);
    assert_eq!(first.on_usage(&mut tree, at(1)), State::Pending);
}

/// Everything in a request comes into force together, or nothing does.
/// Semantics: 118, B2.
#[test]
fn a_request_is_all_or_nothing() {
    let (mut tree, vm) = vm(100, limit(200));
    let patch = LimitPatch { high: Some(limit(40)), low: Some(limit(20)), ..LimitPatch::max(limit(50)) };
    let begin =
        |tree: &mut Tree, patch| LimitChange::begin(tree, &[Request::new(vm, patch)], Mode::Reclaim, at(0), WAIT);
    let before = tree.limits(vm);
    let mut change = begin(&mut tree, patch).unwrap();
    assert_eq!((tree.limits(vm), tree.reclaim_high(vm)), (before, limit(40)));
    assert!(tree.above_high(vm), "reclaim already works towards it");
    assert_eq!(change.on_usage(&mut tree, WAIT), State::NotReached);
    assert_eq!(tree.limits(vm), before);
    let mut change = begin(&mut tree, patch).unwrap();
    tree.uncharge(vm, Pages(60));
    assert_eq!(change.on_usage(&mut tree, at(1)), State::Committed);
    assert_eq!(tree.limits(vm), patch.apply(before));
    // A patch that cannot be is refused before anything is pending.
    let bad = LimitPatch { high: Some(limit(40)), ..LimitPatch::max(limit(30)) };
    assert!(matches!(begin(&mut tree, bad), Err(SetLimitError::AboveMax { why, .. }) if why.knob == "memory.high"));
}

/// A `high` that comes into force below usage is a crossing, also when it came with a `max` that was waited for.
/// Semantics: 115, B91.
#[test]
fn high_is_looked_at_again_when_a_change_is_in_force() {
    let (mut tree, vm) = vm(100, limit(2000));
    let patch = LimitPatch { high: Some(limit(60)), ..LimitPatch::max(limit(80)) };
    let mut change = LimitChange::begin(&mut tree, &[Request::new(vm, patch)], Mode::Reclaim, at(0), WAIT).unwrap();
    tree.uncharge(vm, Pages(30));
    assert_eq!(tree.snapshot(vm).events.high, 0);
    assert_eq!(change.on_usage(&mut tree, at(1)), State::Committed);
    assert_eq!((tree.snapshot(vm).events.high, tree.above_high(vm)), (1, true));
}

/// Other limits may change while one is pending, as long as they fit both the old and the new `max`.
/// Semantics: 72.
#[test]
fn other_limits_must_fit_the_pending_one_too() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    let min = |n| LimitPatch { min: Some(limit(n)), ..LimitPatch::default() };
    assert!(matches!(tree.set_limits(vm, &min(60)), Err(SetLimitError::AboveMax { .. })));
    tree.set_limits(vm, &min(30)).unwrap();
    tree.uncharge(vm, Pages(50));
    assert_eq!(change.on_usage(&mut tree, at(1)), State::Committed);
    assert_eq!((tree.limits(vm).min, tree.limits(vm).max), (limit(30), limit(50)));
    assert!(tree.check().is_empty());
}

/// A `vmm.max` in the request that overhead outgrew meanwhile is not forced: overhead cannot be reclaimed.
/// Semantics: 71.
#[test]
fn overhead_that_grew_meanwhile_is_waited_for() {
    let (mut tree, vm) = vm(100, limit(200));
    let patch = LimitPatch { vmm_max: Some(limit(5)), ..LimitPatch::max(limit(50)) };
    let mut change =
        LimitChange::begin(&mut tree, &[Request { patch, ..request(vm, limit(50)) }], Mode::Reclaim, at(0), WAIT)
            .unwrap();
    let queue = Kind::Overhead(Overhead::Queue);
    let _ = tree.try_charge_as(vm, queue, Pages(6), Charge::Wait).unwrap();
    tree.uncharge(vm, Pages(90));
    assert_eq!(change.on_usage(&mut tree, at(1)), State::Pending);
    tree.uncharge_as(vm, queue, Pages(1));
    assert_eq!(change.on_usage(&mut tree, at(2)), State::Committed);
}

/// A client that gives up leaves no ceiling behind, and nothing of its successor's is touched.
/// Semantics: B83.
#[test]
fn a_cancelled_change_leaves_no_trace() {
    let (mut tree, vm) = vm(100, limit(200));
    let change = pending(&mut tree, vm, 50);
    assert_eq!((change.nodes()[0].new, change.deadline()), (limit(50), WAIT));
    change.cancel(&mut tree);
    let node = tree.snapshot(vm);
    assert_eq!((node.limits.max, node.max_pending, node.ceiling), (limit(200), None, None));
    let first = pending(&mut tree, vm, 50);
    let _second = pending(&mut tree, vm, 60);
    first.cancel(&mut tree);
    assert_eq!(tree.snapshot(vm).max_pending, Some(limit(60)));
}

/// The host's budget is a limit like any other: lowered, it is reclaimed for, and its ceiling holds every VM.
/// Semantics: 101, 118.
#[test]
fn the_budget_of_the_host_can_be_lowered() {
    let (mut tree, vm) = vm(100, limit(200));
    let root = tree.root();
    let mut change = pending(&mut tree, root, 60);
    assert_eq!(tree.try_charge(vm, Pages(11), Charge::Wait).unwrap_err().level, root);
    tree.uncharge(vm, Pages(40));
    assert_eq!(change.on_usage(&mut tree, at(1)), State::Committed);
    assert_eq!((tree.limits(root).max, tree.margin(vm)), (limit(60), Some(Pages::ZERO)));
}

/// Charges that cannot fail and arrive while a change is pending do not make it end wrongly.
/// Semantics: 82, B53.
#[test]
fn what_cannot_fail_delays_the_change_and_is_no_overcharge_before() {
    let (mut tree, vm) = vm(100, limit(200));
    let mut change = pending(&mut tree, vm, 50);
    tree.uncharge(vm, Pages(40));
    assert_eq!(waiting(&mut change, &mut tree, 1), (70, 40));
    let forced = tree.try_charge(vm, Pages(20), Charge::NoFail).unwrap();
    assert_eq!(forced.forced_at, Some(vm), "above the ceiling");
    assert_eq!(tree.snapshot(vm).overcharge, Pages::ZERO, "the limit in force is the old one");
    assert_eq!(waiting(&mut change, &mut tree, 2), (70, 40));
    assert_eq!(change.on_usage(&mut tree, WAIT), State::NotReached);
    assert!(tree.check().is_empty());
}

proptest! {
    /// Any guest against one change: `max` reads the old value until it is committed, the ceiling never rises and
    /// bounds usage, and the change ends by its deadline in exactly one of its two ways, whatever the guest does.
    /// Semantics: 118, B81, B83.
    #[test]
    fn a_change_is_in_force_or_not(
        used in 0u64..300, old in 0u64..300, new in 0u64..300, slack in 0u64..40,
        steps in prop::collection::vec((any::<bool>(), 0u64..60), 0..60),
    ) {
        let old_max = limit(old.max(used));
        let (mut tree, vm) = vm(used, old_max);
        let asks = Request { slack: Pages(slack), ..request(vm, limit(new)) };
        let mut change = LimitChange::begin(&mut tree, &[asks], Mode::Reclaim, at(0), at(50)).unwrap();
        if change.state() == State::Committed {
            prop_assert!(used <= new || limit(new) >= old_max);
            prop_assert_eq!(tree.limits(vm).max, limit(new));
            return Ok(());
        }
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
                State::Pending => {
                    let next = tree.snapshot(vm).ceiling.unwrap();
                    prop_assert!(usage > Pages(new) && ms < 50);
                    prop_assert!(next <= ceiling && next >= Pages(new) && limit(next.0) <= old_max);
                    prop_assert!(usage <= next);
                    prop_assert_eq!(tree.limits(vm).max, old_max);
                    ceiling = next;
                }
                State::Committed => {
                    prop_assert!(usage <= Pages(new));
                    prop_assert_eq!((change.nodes()[0].usage, tree.limits(vm).max), (usage, limit(new)));
                    return Ok(());
                }
                State::NotReached => {
                    prop_assert!(usage > Pages(new) && ms >= 50);
                    prop_assert_eq!((tree.limits(vm).max, tree.snapshot(vm).ceiling), (old_max, None));
                    return Ok(());
                }
                State::Superseded => prop_assert!(false, "nobody else"),
            }
        }
        prop_assert!(change.on_usage(&mut tree, at(50)) != State::Pending);
    }
}

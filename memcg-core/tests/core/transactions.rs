//! One change of limits at many nodes: shrink first, then grow, all or nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use memcg_core::limit_change::{LimitChange, Mode, Request, State};
use memcg_core::tree::{LimitPatch, Mode as Charge, NodeId, SetLimitError, Tree};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

const WAIT: Duration = Duration::from_secs(10);

fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn limit(n: u64) -> Limit {
    Limit::Pages(Pages(n))
}

fn max(node: NodeId, pages: u64) -> Request {
    Request { slack: Pages(10), ..Request::new(node, LimitPatch::max(limit(pages))) }
}

/// A budget of 300 pages: `a`, `b` and `c` may have 100 each; `a` and `b` use 90, `c` nothing.
struct Host {
    tree: Tree,
    a: NodeId,
    b: NodeId,
    c: NodeId,
}

impl Host {
    fn new() -> Host {
        let mut tree = Tree::new(limit(300));
        let root = tree.root();
        let group = crate::nodes::group(&mut tree, root, "group");
        let [a, b] = ["a", "b"].map(|name| crate::nodes::vm(&mut tree, group, name));
        let c = crate::nodes::vm(&mut tree, root, "c");
        for (vm, used) in [(a, 90), (b, 90), (c, 0)] {
            tree.set_limits(vm, &LimitPatch::max(limit(100))).unwrap();
            let _ = tree.try_charge(vm, Pages(used), Charge::Wait).unwrap();
        }
        Host { tree, a, b, c }
    }

    fn begin(&mut self, requests: &[Request], mode: Mode) -> Result<LimitChange, SetLimitError> {
        LimitChange::begin(&mut self.tree, requests, mode, at(0), WAIT)
    }

    /// `max` and ceiling of the three VMs.
    fn state(&self) -> [(Limit, Option<u64>); 3] {
        [self.a, self.b, self.c].map(|vm| {
            let node = self.tree.snapshot(vm);
            (node.limits.max, node.ceiling.map(|pages| pages.0))
        })
    }

    fn snapshots(&self) -> Vec<memcg_core::tree::NodeSnapshot> {
        self.tree.ids().map(|id| self.tree.snapshot(id)).collect()
    }
}

/// What one VM is to get is what the others have still to give: it gets nothing before they have, and then everything
/// is in force in one step.
/// Semantics: 118, T3.
#[test]
fn shrink_first_then_grow() {
    let mut host = Host::new();
    let (a, b, c) = (host.a, host.b, host.c);
    let mut change = host.begin(&[max(a, 50), max(c, 200), max(b, 60)], Mode::Reclaim).unwrap();
    assert_eq!(change.state(), State::Pending);
    assert_eq!(host.state(), [(limit(100), Some(100)), (limit(100), Some(100)), (limit(100), None)]);
    host.tree.uncharge(a, Pages(40));
    assert_eq!(change.on_usage(&mut host.tree, at(1)), State::Pending);
    assert!(change.nodes()[0].reached && !change.nodes()[2].reached);
    assert_eq!(host.state(), [(limit(100), Some(50)), (limit(100), Some(100)), (limit(100), None)]);
    let refused = host.tree.try_charge(a, Pages(1), Charge::Wait).unwrap_err();
    assert_eq!(refused.level, a, "what has shrunk stays shrunk while the other is still falling");
    host.tree.uncharge(b, Pages(30));
    assert_eq!(change.on_usage(&mut host.tree, at(2)), State::Committed);
    assert_eq!(host.state(), [(limit(50), None), (limit(60), None), (limit(200), None)]);
    assert!(change.nodes().iter().all(|part| part.reached && part.generation == host.tree.generation(part.node)));
}

/// A raised `max` or `high` counts for nothing before it is in force: reclaim of that VM goes on as before.
/// Semantics: 118.
#[test]
fn what_is_to_grow_is_reclaimed_as_before_until_it_may() {
    let mut host = Host::new();
    let (a, b) = (host.a, host.b);
    let patch = LimitPatch { high: Some(limit(180)), ..LimitPatch::max(limit(200)) };
    host.tree.set_limits(b, &LimitPatch { high: Some(limit(80)), ..LimitPatch::default() }).unwrap();
    let mut change = host.begin(&[max(a, 10), Request::new(b, patch)], Mode::Reclaim).unwrap();
    assert_eq!((host.tree.reclaim_high(b), host.tree.above_high(b)), (limit(80), true));
    assert_eq!(host.tree.snapshot(b).max_pending, Some(limit(200)));
    host.tree.uncharge(a, Pages(80));
    assert_eq!(change.on_usage(&mut host.tree, at(1)), State::Committed);
    assert_eq!((host.tree.reclaim_high(b), host.tree.above_high(b)), (limit(180), false));
}

/// One that cannot give keeps all the others as they were; the answer says of each how far it got.
/// Semantics: 118, B2.
#[test]
fn at_the_deadline_nothing_has_changed_anywhere() {
    let mut host = Host::new();
    let (a, b, c) = (host.a, host.b, host.c);
    let mut change = host.begin(&[max(a, 50), max(b, 50), max(c, 200)], Mode::Reclaim).unwrap();
    host.tree.uncharge(a, Pages(60));
    host.tree.uncharge(b, Pages(15));
    assert_eq!(change.on_usage(&mut host.tree, WAIT - at(1)), State::Pending);
    assert_eq!(change.on_usage(&mut host.tree, WAIT), State::NotReached);
    let got: Vec<_> = change.nodes().iter().map(|part| (part.node, part.progress().0, part.reached)).collect();
    assert_eq!(got, [(a, 60, true), (b, 15, false), (c, 0, true)]);
    assert_eq!(host.state(), [(limit(100), None), (limit(100), None), (limit(100), None)]);
    let _ = host.tree.try_charge(a, Pages(70), Charge::Wait).expect("the old limit is wholly in force");
}

/// Every patch is checked before anything moves, and the message names the node at fault.
/// Semantics: 71, B2.
#[test]
fn one_impossible_patch_refuses_all_of_them() {
    let mut host = Host::new();
    let (a, b, c) = (host.a, host.b, host.c);
    let waiting = host.begin(&[max(a, 50)], Mode::Reclaim).unwrap();
    let queue = memcg_core::tree::Kind::Overhead(memcg_core::tree::Overhead::Queue);
    let _ = host.tree.try_charge_as(c, queue, Pages(4), Charge::Wait).unwrap();
    let root = host.tree.root();
    host.tree.add(root, "off").unwrap();
    let off = host.tree.find("/off").unwrap();
    let patch = |node, patch| Request::new(node, patch);
    let generation = host.tree.generation(b);
    let bad = [
        (
            patch(b, LimitPatch { min: Some(limit(101)), ..LimitPatch::default() }),
            "/group/b: memory.min 404K would be above memory.max 400K: choose a lower memory.min or a higher memory.max; a \
             request may set both",
        ),
        (
            patch(b, LimitPatch { if_generation: Some(7), ..LimitPatch::max(limit(200)) }),
            "/group/b: the limits have changed meanwhile (generation 1, not 7): read them again and decide anew",
        ),
        (
            patch(c, LimitPatch { vmm_max: Some(limit(3)), ..LimitPatch::default() }),
            "/c: vmm.max 12K is below the 16K of overhead in use, which cannot be reclaimed",
        ),
        (max(a, 200), "/group/a is named twice in one request: put its limits in one place"),
        (max(off, 200), "/off is not accounted, so there is nothing to limit: activate its accounting first"),
    ];
    assert_eq!(generation, 1);
    let before = host.snapshots();
    for (request, message) in bad {
        for mode in [Mode::Reclaim, Mode::Force, Mode::Refuse] {
            let error = host.begin(&[max(a, 95), request], mode).unwrap_err();
            assert_eq!(error.to_string(), message);
            assert_eq!(host.snapshots(), before, "{message}");
        }
    }
    waiting.cancel(&mut host.tree);
}

/// Refused, the caller learns of every node that is in the way, not of one after the other.
/// Semantics: 71.
#[test]
fn refuse_names_every_node_that_is_above() {
    let mut host = Host::new();
    let (a, b, c) = (host.a, host.b, host.c);
    let before = host.snapshots();
    let error = host.begin(&[max(a, 50), max(c, 10), max(b, 89)], Mode::Refuse).unwrap_err();
    let SetLimitError::BelowUsage { above } = &error else { panic!("{error}") };
    let paths: Vec<_> = above.iter().map(|node| (node.path.as_str(), node.usage.0, node.limit)).collect();
    assert_eq!(paths, [("/group/a", 90, limit(50)), ("/group/b", 90, limit(89))]);
    assert_eq!(
        error.to_string(),
        "/group/a: memory.max 200K is below the 360K in use; /group/b: memory.max 356K is below the 360K in use: \
         free memory first, or use mode=reclaim or mode=force"
    );
    assert_eq!(host.snapshots(), before);
    let change = host.begin(&[max(a, 90), max(c, 10)], Mode::Refuse).unwrap();
    assert_eq!(change.state(), State::Committed);
    assert_eq!(host.state().map(|(max, _)| max), [limit(90), limit(100), limit(10)]);
}

/// Forced, all of it is in force now, and each node says what is above.
/// Semantics: 82, 83.
#[test]
fn force_is_in_force_at_every_node() {
    let mut host = Host::new();
    let (a, b, c) = (host.a, host.b, host.c);
    let change = host.begin(&[max(a, 50), max(c, 250), max(b, 60)], Mode::Force).unwrap();
    assert_eq!(change.state(), State::Committed);
    let over: Vec<_> = change.nodes().iter().map(|part| part.overcharge.0).collect();
    assert_eq!(over, [40, 0, 30]);
    assert!(host.tree.check().is_empty());
}

/// A later request for one of the nodes takes the place of the whole earlier one: no ceiling is left anywhere, and what
/// was to grow stays.
/// Semantics: 72, 118.
#[test]
fn a_later_request_for_one_node_supersedes_the_change_at_all() {
    let mut host = Host::new();
    let (a, b, c) = (host.a, host.b, host.c);
    let mut first = host.begin(&[max(a, 50), max(b, 50), max(c, 200)], Mode::Reclaim).unwrap();
    let mut second = host.begin(&[max(b, 70)], Mode::Reclaim).unwrap();
    assert_eq!(host.state(), [(limit(100), None), (limit(100), Some(100)), (limit(100), None)]);
    assert_eq!(first.on_usage(&mut host.tree, at(1)), State::Superseded);
    host.tree.uncharge(b, Pages(20));
    assert_eq!(second.on_usage(&mut host.tree, at(2)), State::Committed);
    assert_eq!(host.state(), [(limit(100), None), (limit(70), None), (limit(100), None)]);
    // One that is in force at once does so too, though the node that it names was only to grow.
    let mut third = host.begin(&[max(a, 50), max(c, 200)], Mode::Reclaim).unwrap();
    host.tree.set_limits(c, &LimitPatch::max(limit(30))).unwrap();
    assert_eq!(host.state(), [(limit(100), None), (limit(70), None), (limit(30), None)]);
    assert_eq!(third.on_usage(&mut host.tree, at(3)), State::Superseded);
    // And the client who had seen the limits before the first request learns that they are pending.
    let seen = host.tree.generation(c);
    let _fourth = host.begin(&[max(a, 50), max(c, 200)], Mode::Reclaim).unwrap();
    let late = LimitPatch { if_generation: Some(seen), ..LimitPatch::max(limit(40)) };
    assert!(matches!(host.tree.set_limits(c, &late), Err(SetLimitError::Stale { .. })));
}

/// A change of other limits leaves a pending one alone; one that has to wait itself takes its place.
/// Semantics: 72.
#[test]
fn other_limits_supersede_only_when_they_wait_themselves() {
    let mut host = Host::new();
    let (a, b) = (host.a, host.b);
    let low = |node| Request::new(node, LimitPatch { low: Some(limit(5)), ..LimitPatch::default() });
    let mut first = host.begin(&[max(a, 50)], Mode::Reclaim).unwrap();
    let at_once = host.begin(&[low(a), max(b, 95)], Mode::Reclaim).unwrap();
    assert_eq!(at_once.state(), State::Committed);
    assert_eq!(first.on_usage(&mut host.tree, at(1)), State::Pending);
    let second = host.begin(&[low(a), max(b, 50)], Mode::Reclaim).unwrap();
    assert_eq!((first.on_usage(&mut host.tree, at(1)), second.state()), (State::Superseded, State::Pending));
    assert_eq!(host.state()[..2], [(limit(100), None), (limit(95), Some(95))]);
}

/// A VM that goes offline has still to give back; when it is gone, the change cannot be in force wholly any more, and no
/// ceiling stays at the others, whether or not anybody looks at the change again.
/// Semantics: 118, 79.
#[test]
fn a_node_that_is_removed_ends_the_change_everywhere() {
    let mut host = Host::new();
    let (a, b, c) = (host.a, host.b, host.c);
    let mut change = host.begin(&[max(a, 50), max(b, 50), max(c, 200)], Mode::Reclaim).unwrap();
    host.tree.set_offline(a).unwrap();
    host.tree.uncharge_all(a);
    assert_eq!(change.on_usage(&mut host.tree, at(1)), State::Pending);
    host.tree.remove(a).unwrap();
    assert_eq!((host.tree.snapshot(b).ceiling, host.tree.snapshot(c).max_pending), (None, None));
    assert_eq!(change.on_usage(&mut host.tree, at(2)), State::Superseded);
    assert_eq!((host.tree.limits(b).max, host.tree.limits(c).max), (limit(100), limit(100)));
}

/// What is pending moves with its node: it is the node's own, and its group's change is reached when the node has left.
/// Semantics: 118, 33.
#[test]
fn a_node_that_moves_takes_its_part_of_the_change_along() {
    let mut host = Host::new();
    let (a, b, root) = (host.a, host.b, host.tree.root());
    let group = host.tree.parent(a).unwrap();
    let mut change = host.begin(&[max(a, 50), max(group, 100)], Mode::Reclaim).unwrap();
    let _ = host.tree.move_node(a, root).unwrap();
    assert_eq!(host.tree.snapshot(a).ceiling, Some(Pages(100)));
    assert_eq!(change.on_usage(&mut host.tree, at(1)), State::Pending);
    assert!(change.nodes()[1].reached && !change.nodes()[0].reached);
    host.tree.uncharge(a, Pages(40));
    assert_eq!(change.on_usage(&mut host.tree, at(2)), State::Committed);
    assert_eq!((host.tree.path(a), host.tree.limits(a).max), ("/a".to_owned(), limit(50)));
    // The ceiling of a group that is to shrink refuses who wants to move in.
    let change = host.begin(&[max(group, 10)], Mode::Reclaim).unwrap();
    assert!(host.tree.move_node(a, group).is_err());
    change.cancel(&mut host.tree);
    host.tree.set_limits(group, &LimitPatch::max(Limit::Max)).unwrap();
    let _ = host.tree.move_node(a, group).unwrap();
    assert_eq!(host.tree.usage(group), host.tree.usage(a) + host.tree.usage(b));
}

/// A VM that is torn down gives everything: the others get what it was to give.
/// Semantics: 118, 79.
#[test]
fn an_offline_node_still_counts() {
    let mut host = Host::new();
    let (a, c) = (host.a, host.c);
    let mut change = host.begin(&[max(a, 50), max(c, 200)], Mode::Reclaim).unwrap();
    host.tree.set_offline(a).unwrap();
    host.tree.uncharge(a, Pages(40));
    assert_eq!(change.on_usage(&mut host.tree, at(1)), State::Committed);
    assert_eq!(host.tree.limits(c).max, limit(200));
}

/// A guest that has reached its new limit and is held there, while others are still falling, is let go on: it would be
/// punished for a limit that is not in force.
/// Semantics: 46, 118.
#[test]
fn a_node_that_is_held_at_its_new_limit_gets_its_slack_back() {
    let mut host = Host::new();
    let (a, b) = (host.a, host.b);
    let mut change = host.begin(&[max(a, 50), max(b, 50)], Mode::Reclaim).unwrap();
    host.tree.uncharge(a, Pages(40));
    assert_eq!(change.on_usage(&mut host.tree, at(1)), State::Pending);
    let _ = host.tree.try_charge(a, Pages(1), Charge::Wait).unwrap_err();
    change.widen(a);
    assert_eq!(change.on_usage(&mut host.tree, at(2)), State::Pending);
    assert_eq!(host.tree.snapshot(a).ceiling, Some(Pages(70)));
    let _ = host.tree.try_charge(a, Pages(20), Charge::Wait).unwrap();
    host.tree.uncharge(b, Pages(40));
    assert_eq!(change.on_usage(&mut host.tree, at(3)), State::Pending, "and must come down again");
    host.tree.uncharge(a, Pages(20));
    assert_eq!(change.on_usage(&mut host.tree, at(4)), State::Committed);
}

/// A group and its members in one request: each is judged by its own usage, and the ceiling of the group holds them all.
/// Semantics: 118, 63.
#[test]
fn a_group_and_its_members_in_one_change() {
    let mut host = Host::new();
    let (a, b) = (host.a, host.b);
    let group = host.tree.parent(a).unwrap();
    let mut change = host.begin(&[max(group, 100), max(a, 80)], Mode::Reclaim).unwrap();
    host.tree.uncharge(a, Pages(80));
    assert_eq!(change.on_usage(&mut host.tree, at(1)), State::Committed);
    let refused = host.tree.try_charge(b, Pages(1), Charge::Wait).unwrap_err();
    assert_eq!(refused.level, group);
    // Nothing asked for is in force already.
    assert_eq!(host.begin(&[], Mode::Reclaim).unwrap().state(), State::Committed);
}

/// Writing back what is there, at every node at once, is no change.
/// Semantics: 69.
#[test]
fn writing_everything_back_changes_nothing() {
    let mut host = Host::new();
    let same: Vec<_> = host.tree.ids().map(|id| (id, host.tree.limits(id))).collect();
    let same: Vec<_> = same
        .into_iter()
        .map(|(id, limits)| {
            let patch = LimitPatch { min: Some(limits.min), low: Some(limits.low), ..LimitPatch::max(limits.max) };
            Request::new(id, LimitPatch { high: Some(limits.high), vmm_max: Some(limits.vmm_max), ..patch })
        })
        .collect();
    let before = host.snapshots();
    for mode in [Mode::Reclaim, Mode::Force, Mode::Refuse] {
        assert_eq!(host.begin(&same, mode).unwrap().state(), State::Committed);
        assert_eq!(host.snapshots(), before);
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Requests of this mode for these VMs.
    Begin(Mode, Vec<(usize, u64)>),
    /// A VM touches or gives so many pages.
    Touch(usize, u64),
    Give(usize, u64),
    /// The owner looks at everything.
    Look,
}

fn op() -> impl Strategy<Value = Op> {
    let mode = prop_oneof![4 => Just(Mode::Reclaim), 1 => Just(Mode::Force), 1 => Just(Mode::Refuse)];
    let parts = prop::collection::vec((0usize..5, 0u64..120), 1..4);
    prop_oneof![
        2 => (mode, parts).prop_map(|(mode, parts)| Op::Begin(mode, parts)),
        3 => (0usize..5, 0u64..40).prop_map(|(vm, pages)| Op::Touch(vm, pages)),
        3 => (0usize..5, 0u64..60).prop_map(|(vm, pages)| Op::Give(vm, pages)),
        3 => Just(Op::Look),
    ]
}

/// A request as the model sees it.
struct Asked {
    change: LimitChange,
    wanted: Vec<(usize, u64)>,
    /// A later accepted request has named one of its nodes.
    replaced: bool,
}

proptest! {
    /// Clients that know nothing of each other, against a model that only knows whole requests: the limits are at every
    /// moment those of the requests that were committed, in that order, and a ceiling is only where a request waits.
    /// Semantics (table): 71, 72, 118, B2, B83.
    #[test]
    fn limits_are_those_of_whole_requests(ops in prop::collection::vec(op(), 0..60)) {
        let mut tree = Tree::new(Limit::Max);
        let root = tree.root();
        let vms: Vec<_> = (0..5).map(|n| crate::nodes::vm(&mut tree, root, &format!("vm{n}"))).collect();
        let mut limits = [100u64; 5];
        for vm in &vms {
            tree.set_limits(*vm, &LimitPatch::max(limit(100))).unwrap();
        }
        let mut waiting: Vec<Asked> = Vec::new();
        for (ms, op) in (0u64..).zip(ops) {
            match op {
                Op::Begin(mode, wanted) => {
                    let usage = |vm: usize| tree.usage(vms[vm]).0;
                    let names: BTreeSet<_> = wanted.iter().map(|(vm, _)| *vm).collect();
                    let above = wanted.iter().any(|&(vm, new)| new < limits[vm] && usage(vm) > new);
                    let requests: Vec<_> = wanted.iter().map(|&(vm, new)| max(vms[vm], new)).collect();
                    match LimitChange::begin(&mut tree, &requests, mode, at(ms), at(10)) {
                        Err(error) => {
                            let twice = names.len() < wanted.len();
                            prop_assert!(twice || (mode == Mode::Refuse && above), "{}", error);
                        }
                        Ok(change) => {
                            prop_assert_eq!(names.len(), wanted.len());
                            for asked in &mut waiting {
                                asked.replaced |= asked.wanted.iter().any(|(vm, _)| names.contains(vm));
                            }
                            if mode == Mode::Reclaim && above {
                                prop_assert_eq!(change.state(), State::Pending);
                                waiting.push(Asked { change, wanted, replaced: false });
                            } else {
                                prop_assert_eq!(change.state(), State::Committed);
                                wanted.iter().for_each(|&(vm, new)| limits[vm] = new);
                            }
                        }
                    }
                }
                Op::Touch(vm, pages) => {
                    let _ = tree.try_charge(vms[vm], Pages(pages), Charge::Wait);
                }
                Op::Give(vm, pages) => tree.uncharge(vms[vm], Pages(pages).min(tree.usage(vms[vm]))),
                Op::Look => {
                    for mut asked in std::mem::take(&mut waiting) {
                        let fits = asked.wanted.iter().all(|&(vm, new)| {
                            new >= limits[vm] || tree.usage(vms[vm]).0 <= new
                        });
                        let late = at(ms) >= asked.change.deadline();
                        match asked.change.on_usage(&mut tree, at(ms)) {
                            State::Superseded => prop_assert!(asked.replaced),
                            _ if asked.replaced => prop_assert!(false, "it was replaced"),
                            State::Committed => {
                                prop_assert!(fits);
                                asked.wanted.iter().for_each(|&(vm, new)| limits[vm] = new);
                            }
                            State::NotReached => prop_assert!(late && !fits),
                            State::Pending => {
                                prop_assert!(!late && !fits);
                                waiting.push(asked);
                            }
                        }
                    }
                }
            }
            prop_assert!(tree.check().is_empty(), "{:?}", tree.check());
            for (n, vm) in vms.iter().enumerate() {
                let node = tree.snapshot(*vm);
                prop_assert_eq!(node.limits.max, limit(limits[n]));
                let asked = waiting.iter().find(|asked| !asked.replaced && asked.wanted.iter().any(|(vm, _)| *vm == n));
                let new = asked.and_then(|asked| asked.wanted.iter().find(|(vm, _)| *vm == n)).map(|(_, new)| *new);
                prop_assert_eq!(node.max_pending, new.map(limit));
                prop_assert_eq!(node.ceiling.is_some(), new.is_some_and(|new| new < limits[n]));
            }
        }
    }
}

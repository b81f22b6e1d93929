//! Effective protection, with cgroup v2's own cases computed by hand.

use memcg_core::protection::{Parent, Protected, Protection, effective, protections};
use memcg_core::tree::{LimitPatch, Mode, NodeId, Tree};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

use crate::nodes::{group, vm};

fn mib(n: u64) -> Pages {
    Pages::from_mib(n)
}

fn limit(n: u64) -> Limit {
    Limit::Pages(mib(n))
}

fn set(tree: &mut Tree, id: NodeId, min: Limit, low: Limit) {
    tree.set_limits(id, &LimitPatch { min: Some(min), low: Some(low), ..LimitPatch::default() }).unwrap();
}

fn charge(tree: &mut Tree, id: NodeId, pages: Pages) {
    let _ = tree.try_charge(id, pages, Mode::Wait).unwrap();
}

fn protection(nodes: &[Protected], id: NodeId) -> Protection {
    nodes.iter().find(|node| node.id == id).unwrap().protection
}

/// The tree of the kernel's own test (`test_memcontrol.c`): A/B with `low` = `b`, and C, D, E, F below.
fn kernel_s_tree(b: Limit) -> (Tree, NodeId, [NodeId; 4]) {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let a = group(&mut tree, root, "a");
    let parent = group(&mut tree, a, "b");
    let vms = ["c", "d", "e", "f"].map(|name| vm(&mut tree, parent, name));
    set(&mut tree, parent, Limit::ZERO, b);
    for (id, (low, usage)) in vms.into_iter().zip([(75, 50), (25, 50), (0, 50), (500, 0)]) {
        set(&mut tree, id, Limit::ZERO, limit(low));
        charge(&mut tree, id, mib(usage));
    }
    (tree, a, vms)
}

/// Claims beyond what the parent has must not protect more than it has, and a claim that is not used takes nothing from
/// the others: F claims 500M and uses nothing.
/// Semantics: T2.
#[test]
fn claims_beyond_the_parent_s_are_scaled_by_what_is_in_use() {
    let (tree, a, vms) = kernel_s_tree(limit(50));
    let nodes = protections(&tree, a);
    // 12800 pages among 12800 + 6400 protected ones.
    let low = vms.map(|id| protection(&nodes, id).low);
    assert_eq!(low, [Pages(8533), Pages(4266), Pages(0), Pages(0)]);
    assert!(vms.iter().all(|id| protection(&nodes, *id).min.is_zero()), "min and low are two things");
}

/// A group is protected as a whole when its members claim nothing: else nobody could protect a group without
/// knowing what is in it.
#[test]
fn what_nobody_claims_is_spread_by_unprotected_usage() {
    let (tree, a, vms) = kernel_s_tree(limit(105));
    let nodes = protections(&tree, a);
    let low = vms.map(|id| protection(&nodes, id).low);
    assert_eq!(low, [mib(50), mib(35), mib(20), mib(0)]);

    let (tree, a, vms) = kernel_s_tree(Limit::Max);
    let nodes = protections(&tree, a);
    let low = vms.map(|id| protection(&nodes, id).low);
    assert_eq!(low, [mib(50), mib(50), mib(50), mib(0)], "all of the group is all of its members");
}

/// Protection is from others' need. When a limit is met, its own subtree must give, whatever protects that from outside:
/// else a VM at its `max` could be protected from itself for ever.
/// Semantics: T2.
#[test]
fn the_reclaim_root_has_no_protection_and_passes_none_on() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let parent = group(&mut tree, root, "group");
    let (a, b) = (vm(&mut tree, parent, "a"), vm(&mut tree, parent, "b"));
    set(&mut tree, parent, limit(100), limit(100));
    set(&mut tree, a, limit(30), limit(40));
    charge(&mut tree, a, mib(60));
    charge(&mut tree, b, mib(40));

    // From the host, all of the group is protected, so all of its members.
    let nodes = protections(&tree, root);
    assert_eq!(nodes.len(), 4);
    assert_eq!(protection(&nodes, parent), Protection { min: mib(100), low: mib(100) });
    assert_eq!(protection(&nodes, a), Protection { min: mib(60), low: mib(60) });
    assert_eq!(protection(&nodes, b), Protection { min: mib(40), low: mib(40) });
    // From the group, only what its members claim.
    let nodes = protections(&tree, parent);
    assert_eq!(nodes.len(), 3);
    assert_eq!(protection(&nodes, parent), Protection::NONE);
    assert_eq!(protection(&nodes, a), Protection { min: mib(30), low: mib(40) });
    assert_eq!(protection(&nodes, b), Protection::NONE);
    // From the VM itself, nothing.
    assert_eq!(protections(&tree, a), [Protected { id: a, usage: mib(60), protection: Protection::NONE }]);
}

/// A child cannot protect what its parent does not: a user within a group could take the whole host otherwise.
/// Semantics: T2.
#[test]
fn a_claim_without_a_parent_s_is_nothing() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let parent = group(&mut tree, root, "group");
    let a = vm(&mut tree, parent, "a");
    set(&mut tree, a, limit(64), Limit::Max);
    charge(&mut tree, a, mib(64));
    assert_eq!(protection(&protections(&tree, root), a), Protection::NONE);
    assert_eq!(protection(&protections(&tree, parent), a), Protection { min: mib(64), low: mib(64) });
}

/// What is offline is on its way out; a claim left behind must not shield a dead VM's memory against living ones.
#[test]
fn a_node_that_is_offline_claims_nothing() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let (dead, alive) = (vm(&mut tree, root, "dead"), vm(&mut tree, root, "alive"));
    for id in [dead, alive] {
        set(&mut tree, id, limit(10), limit(20));
        charge(&mut tree, id, mib(30));
    }
    tree.set_offline(dead).unwrap();
    let nodes = protections(&tree, root);
    assert_eq!(protection(&nodes, dead), Protection::NONE);
    assert_eq!(protection(&nodes, alive), Protection { min: mib(10), low: mib(20) });
}

/// The formula, case by case; numbers by hand.
#[test]
fn the_formula() {
    let parent = |usage, effective, claimed| Parent {
        usage: Pages(usage),
        effective: Pages(effective),
        claimed: Pages(claimed),
    };
    let pages = |n| Limit::Pages(Pages(n));
    let table = [
        // Claim and usage, the parent's usage, effective and claimed.
        ("as it stands", pages(30), 50, parent(100, 60, 60), 30),
        ("not more than is used", pages(30), 20, parent(100, 60, 60), 20),
        ("all of it", Limit::Max, 50, parent(100, 50, 50), 50),
        ("all of it, but the parent has half", Limit::Max, 50, parent(50, 25, 50), 25),
        ("over-committed 3:2, rounded down", pages(50), 50, parent(150, 50, 75), 33),
        ("nothing to pass on", pages(50), 50, parent(150, 0, 75), 0),
        ("unclaimed 40, half of the unprotected", pages(10), 30, parent(60, 60, 20), 30),
        ("unclaimed 20 of 40 unprotected", pages(10), 30, parent(60, 40, 20), 20),
        ("no claim at all, by usage alone", pages(0), 30, parent(90, 60, 0), 20),
        ("nothing in use", pages(10), 0, parent(90, 60, 60), 0),
        ("everything protected, nothing to divide", pages(10), 10, parent(60, 80, 60), 10),
        ("never more than is used, whatever the parent says", pages(10), 30, parent(60, 80, 20), 30),
        ("numbers of 64 bits", Limit::Max, u64::MAX, parent(u64::MAX, u64::MAX - 1, u64::MAX), u64::MAX - 1),
    ];
    for (what, claim, usage, parent, expected) in table {
        assert_eq!(effective(claim, Pages(usage), &parent), Pages(expected), "{what}");
    }
}

#[derive(Clone, Debug)]
struct Leaf {
    parent: prop::sample::Index,
    usage: u64,
}

fn claim() -> impl Strategy<Value = Limit> {
    prop_oneof![
        2 => Just(Limit::ZERO),
        6 => (0u64..1000).prop_map(|pages| Limit::Pages(Pages(pages))),
        1 => Just(Limit::Max),
    ]
}

/// What the kernel would say about one node: asked from the node upwards, all sums from scratch.
fn oracle(tree: &Tree, top: NodeId, id: NodeId, claim: &impl Fn(NodeId) -> Limit) -> u64 {
    if id == top {
        return 0;
    }
    let used = |id: NodeId| tree.usage(id).0;
    let mine = |id: NodeId| match claim(id) {
        Limit::Max => used(id),
        Limit::Pages(Pages(claim)) => claim.min(used(id)),
    };
    let parent = tree.parent(id).unwrap();
    if parent == top {
        return mine(id);
    }
    let passed_on = oracle(tree, top, parent, claim);
    let claimed: u64 = tree.children(parent).iter().map(|child| mine(*child)).sum();
    if claimed > passed_on {
        mine(id) * passed_on / claimed
    } else if used(parent) == claimed {
        mine(id)
    } else {
        mine(id) + (passed_on - claimed) * (used(id) - mine(id)) / (used(parent) - claimed)
    }
}

proptest! {
    /// Whatever the tree: nobody has more than it uses, children not more than their parent, a claim that is covered is
    /// met in full, and every number is what the kernel's rule says, node by node.
    /// Semantics: T2.
    #[test]
    fn protection_is_what_cgroup_v2_says(
        groups in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
        leaves in prop::collection::vec(
            (any::<prop::sample::Index>(), 0u64..1000).prop_map(|(parent, usage)| Leaf { parent, usage }), 1..20),
        claims in prop::collection::vec((claim(), claim()), 28),
        top in any::<prop::sample::Index>(),
    ) {
        let mut tree = Tree::new(Limit::Max);
        let mut inner = vec![tree.root()];
        for (n, parent) in groups.iter().enumerate() {
            let parent = *parent.get(&inner);
            if tree.ancestry(parent).count() < 6 {
                inner.push(group(&mut tree, parent, &format!("g{n}")));
            }
        }
        let mut all = inner.clone();
        for (n, leaf) in leaves.iter().enumerate() {
            let id = vm(&mut tree, *leaf.parent.get(&inner), &format!("v{n}"));
            charge(&mut tree, id, Pages(leaf.usage));
            all.push(id);
        }
        for (id, (min, low)) in all.iter().zip(&claims) {
            set(&mut tree, *id, *min, *low);
        }
        let top = *top.get(&all);
        let nodes = protections(&tree, top);
        prop_assert_eq!(nodes.len(), all.iter().filter(|id| tree.is_within(**id, top)).count());
        for node in &nodes {
            prop_assert_eq!(node.usage, tree.usage(node.id));
            prop_assert!(node.protection.min <= node.usage && node.protection.low <= node.usage);
            prop_assert_eq!(node.protection.min.0, oracle(&tree, top, node.id, &|id| tree.limits(id).min));
            prop_assert_eq!(node.protection.low.0, oracle(&tree, top, node.id, &|id| tree.limits(id).low));
            let below = tree.children(node.id).iter().map(|id| protection(&nodes, *id));
            if node.id != top {
                prop_assert!(below.clone().map(|child| child.min).sum::<Pages>() <= node.protection.min);
                prop_assert!(below.map(|child| child.low).sum::<Pages>() <= node.protection.low);
            }
        }
    }
}

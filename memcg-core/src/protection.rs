//! Effective protection: what of a node's `min` and `low` counts, given its parents, its siblings and what is in use.
//!
//! `min` and `low` are claims. A parent passes on at most what it has itself, its children may together claim more, and
//! nobody's claim covers memory that is not in use. So the claims are distributed down the tree, by usage, as cgroup v2
//! does it with `memory_recursiveprot`; `min` and `low` each for themselves, by the same rule:
//!
//! ```text
//! E = what the parent passes on           U = the parent's usage
//! protected = min(claim, usage)           S = the sum of `protected` over the children
//!
//! S > E   over-committed:    effective = protected × E / S
//! S ≤ E   everybody served:  effective = protected + (E − S) × (usage − protected) / (U − S)
//!                                                    └ what nobody claimed, by unprotected usage
//! ```
//!
//! By what is *used* of a claim, not by the claim: what one sibling claims and does not use shields the others. The rest
//! is for groups whose members claim nothing: they are protected from other groups and compete freely among themselves.
//! Divisions round down, so the children never have more together than their parent: effective ≤ usage, and the sum of
//! the children's ≤ the parent's.
//!
//! # Relative to the reclaim root
//!
//! Protection is from *others'* need. When a limit is met at `top`, its own subtree must give, so the protection of
//! `top` and of everything above it does not count: `top` has none, and the claims of its children stand as they are,
//! each up to its usage. A VM at its own `max` is not protected from itself. Where the root is `top`, everything
//! counts.
//!
//! # Example
//!
//! The group B has `low` = 50M and is a child of `top`; the four VMs claim 600M between them and use 150M.
//!
//! | VM | `low` | usage | protected | effective |
//! | --- | --- | --- | --- | --- |
//! | C | 75M | 50M | 50M | 50 × 50 / 75 = 33.3M |
//! | D | 25M | 50M | 25M | 25 × 50 / 75 = 16.7M |
//! | E | 0 | 50M | 0 | 0 |
//! | F | 500M | 0 | 0 | 0 |
//!
//! Had B a `low` of 105M, C and D would keep 50M and 25M, and the 30M that nobody claims would go to the unprotected
//! 75M: nothing for C, 30 × 25 / 75 = 10M more for D, 30 × 50 / 75 = 20M for E.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | T2 | nothing is reclaimed for others from a VM at or below its effective `min` |
//! | 41, 63 | protection is computed for the subtree that is reclaimed, nothing outside is looked at |

use crate::tree::{NodeId, Tree};
use crate::units::{Limit, Pages};

/// What protects a node, in effect. Never more than its usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Protection {
    /// Never reclaimed below this for others.
    pub min: Pages,
    /// Reclaimed below this only when nothing above `low` is left anywhere. May be less than `min`: see
    /// [`Self::soft`].
    pub low: Pages,
}

impl Protection {
    /// No protection.
    pub const NONE: Protection = Protection { min: Pages::ZERO, low: Pages::ZERO };

    /// Where reclaim stops at first: the bigger of `min` and `low`.
    pub fn soft(&self) -> Pages {
        self.min.max(self.low)
    }
}

/// What a parent has for its children.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parent {
    /// Memory charged to it and below.
    pub usage: Pages,
    /// Its own effective protection: what it passes on.
    pub effective: Pages,
    /// The sum of [`protected`] over all its children.
    pub claimed: Pages,
}

/// How much of `claim` (`min` or `low`; [`Limit::Max`]: all of it) is in use.
pub fn protected(claim: Limit, usage: Pages) -> Pages {
    claim.as_pages().map_or(usage, |claim| claim.min(usage))
}

/// The effective protection of one child from its `claim` and its `usage`. See the module's documentation.
pub fn effective(claim: Limit, usage: Pages, parent: &Parent) -> Pages {
    let protected = protected(claim, usage);
    let Parent { usage: in_use, effective, claimed } = *parent;
    if claimed > effective {
        return part(protected, effective, claimed);
    }
    let unclaimed = effective.saturating_sub(claimed);
    let rest = part(unclaimed, usage.saturating_sub(protected), in_use.saturating_sub(claimed));
    (protected + rest).min(usage)
}

/// `of × mine / all`, rounded down; nothing of nothing.
fn part(of: Pages, mine: Pages, all: Pages) -> Pages {
    let product = u128::from(of.0) * u128::from(mine.0);
    Pages(product.checked_div(u128::from(all.0)).map_or(0, |pages| u64::try_from(pages).unwrap_or(u64::MAX)))
}

/// A node with its effective protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Protected {
    /// The node.
    pub id: NodeId,
    /// Memory charged to it and below.
    pub usage: Pages,
    /// What of it is protected while `top` is reclaimed.
    pub protection: Protection,
}

/// Effective protection of `top` (none) and of everything below it, each node after its parent, for a reclaim of `top`.
///
/// One pass: each node is looked at once. A node that is offline claims nothing any more; it has only what its parent
/// has to spare.
pub fn protections(tree: &Tree, top: NodeId) -> Vec<Protected> {
    let mut nodes = vec![Protected { id: top, usage: tree.usage(top), protection: Protection::NONE }];
    let mut claims: Vec<(Limit, Limit)> = Vec::new();
    let mut at = 0;
    while at < nodes.len() {
        let parent = nodes[at];
        let first = nodes.len();
        let children = tree.children(parent.id);
        claims.clear();
        let (mut min, mut low) = (Pages::ZERO, Pages::ZERO);
        for &id in children {
            let (usage, limits) = (tree.usage(id), tree.limits(id));
            let claim = if tree.is_online(id) { (limits.min, limits.low) } else { (Limit::ZERO, Limit::ZERO) };
            min += protected(claim.0, usage);
            low += protected(claim.1, usage);
            claims.push(claim);
            nodes.push(Protected { id, usage, protection: Protection::NONE });
        }
        // The children of `top` get what they claim, whatever `top` has.
        let passed_on = |claimed, effective| if at == 0 { claimed } else { effective };
        let min = Parent { usage: parent.usage, effective: passed_on(min, parent.protection.min), claimed: min };
        let low = Parent { usage: parent.usage, effective: passed_on(low, parent.protection.low), claimed: low };
        for (node, claim) in nodes[first..].iter_mut().zip(&claims) {
            node.protection.min = effective(claim.0, node.usage, &min);
            node.protection.low = effective(claim.1, node.usage, &low);
        }
        at += 1;
    }
    nodes
}

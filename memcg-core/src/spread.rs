//! Spreading a need over a subtree: who gives how much.
//!
//! The need is a number of pages, the subtree that of the limit that was met, or the whole host. Each VM gives in
//! proportion to what it has above its effective protection ([`crate::protection`]), an idle page counting more than an
//! active one, and in inverse proportion to its shares:
//!
//! ```text
//! above  = usage − max(low, min)             idle' = min(idle, above)      (active pages are protected first)
//! k      = 1 / (1 − tax)                     tax 75 %: an idle page counts like 4 active ones
//! weight = (above − idle' + k × idle') / shares
//! gives  = min(cap, λ × weight)              λ: as large as it takes for the sum to be the need
//! cap    = what of `above` can be reclaimed
//! ```
//!
//! That is ESX's idle memory tax: with a tax of 0 idleness does not matter, with 75 %, the default, most of what is idle
//! goes before what is used, while something is left to whoever becomes active suddenly. VMs that use all they have are
//! divided by shares alone: twice the shares, half the loss. What is idle [`crate::idle`] says. What a group has to give is
//! spread with a higher tax ([`crate::ladder::aims`]).
//!
//! # Two rounds
//!
//! First from what is above `low` (or `min`, where that is more), everywhere. Only when all of that is spoken for and
//! it is not enough: from what is between `min` and `low`, by the same rule. Never below `min`, and never what cannot be
//! reclaimed. What could then not be found is [`Spread::short`]: the answer is honest, so that the next rung of the
//! ladder, or the choice of a victim, begins at once instead of another round in vain.
//!
//! # Exactness
//!
//! The sum is the need, or all that may be reclaimed, to the page. λ is found by filling up those who meet their cap
//! first, in the order of cap / weight; each of the others gets its part rounded down, and the pages that are left over
//! go one each to the largest remainders, the older node first where these are equal. So nobody is a page away from its
//! part, and the result does not depend on the order of the claimants. O(n log n).
//!
//! # Example
//!
//! A need of 100M, tax 75 %, nothing protected but c's 96M:
//!
//! | VM | usage | idle | protection | shares | weight | gives |
//! | --- | --- | --- | --- | --- | --- | --- |
//! | a | 200M | 0 | 0 | 100 | 200 / 100 = 2 | 20M |
//! | b | 200M | 200M | 0 | 100 | 4 × 200 / 100 = 8 | 80M |
//! | c | 96M | 96M | 96M | 100 | 0 | 0 |
//!
//! With 200 shares b would have a weight of 4: a would give 33.3M and b 66.7M.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 41 | one engine for a VM, a group and the host: only the claimants differ, and only they ever give |
//! | 44 | [`Spread::short`]: what could not be found is said, not tried again |
//! | 45 | overhead and store are never asked for: [`claimants`] counts them as not reclaimable |
//! | 63 | the subtree where the limit was met gives, siblings of the one that asked too, nobody else |
//! | T2 | nobody gives what is within its `min` |

use std::cmp::Reverse;

use crate::protection::{Protection, protections};
use crate::tree::{Counter, NodeId, Tree};
use crate::units::Pages;

/// Shares of a VM that nobody has given any.
pub const DEFAULT_SHARES: u32 = 100;

/// The idle tax that ESX has by default: 75 per cent.
pub const DEFAULT_IDLE_TAX: u8 = 75;

/// One VM that may have to give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimant {
    /// Its node.
    pub id: NodeId,
    /// Memory charged to it.
    pub usage: Pages,
    /// What of it is protected from this need.
    pub protection: Protection,
    /// What of it is idle. More than there is counts as all of it.
    pub idle: Pages,
    /// What of it cannot be reclaimed, protected or not.
    pub pinned: Pages,
    /// Its shares: who has twice as many gives half as much. 0 counts as 1.
    pub shares: u32,
}

/// What [`claimants`] is told about a VM: what is not in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its idle pages.
    pub idle: Pages,
    /// Its pages that cannot be reclaimed, beside its overhead and its store.
    pub pinned: Pages,
    /// Its shares; [`DEFAULT_SHARES`] unless somebody has said otherwise.
    pub shares: u32,
}

impl Default for Facts {
    fn default() -> Facts {
        Facts { idle: Pages::ZERO, pinned: Pages::ZERO, shares: DEFAULT_SHARES }
    }
}

/// How to spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// The idle tax in per cent, 0 to 99; what is above counts as 99.
    pub idle_tax: u8,
}

impl Default for Terms {
    fn default() -> Terms {
        Terms { idle_tax: DEFAULT_IDLE_TAX }
    }
}

/// What one VM gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Take {
    /// Its node.
    pub id: NodeId,
    /// Pages to reclaim from it.
    pub pages: Pages,
    /// How many of them are within its `low`: cgroup v2's event `low`.
    pub below_low: Pages,
}

/// Who gives how much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spread {
    /// One entry a claimant, in their order; those who give nothing too.
    pub takes: Vec<Take>,
    /// What nobody can give. Zero, or else all that may be reclaimed is in `takes`.
    pub short: Pages,
}

/// Spreads `need` over the claimants. See the module's documentation.
pub fn spread(need: Pages, claimants: &[Claimant], terms: &Terms) -> Spread {
    let mut takes: Vec<Take> =
        claimants.iter().map(|claimant| Take { id: claimant.id, pages: Pages::ZERO, below_low: Pages::ZERO }).collect();
    let mut short = need;
    for round in [Round::AboveLow, Round::AboveMin] {
        let mut bids: Vec<Bid> =
            claimants.iter().enumerate().filter_map(|(at, claimant)| round.bid(at, claimant, terms)).collect();
        short = short.saturating_sub(fill(short, &mut bids));
        for bid in &bids {
            let take = &mut takes[bid.at];
            take.pages += Pages(bid.gives);
            if round == Round::AboveMin {
                take.below_low = Pages(bid.gives);
            }
        }
        if short.is_zero() {
            break;
        }
    }
    Spread { takes, short }
}

/// The VMs at `top` and below as claimants, with the protection that they have while `top` is reclaimed. `facts` tells
/// what is not in the tree, and `None` for what is not to be asked, such as a group without members.
///
/// Overhead and store count as pinned. What is offline is left out: its memory is coming back anyway.
pub fn claimants(tree: &Tree, top: NodeId, mut facts: impl FnMut(NodeId) -> Option<Facts>) -> Vec<Claimant> {
    let nodes = protections(tree, top);
    let mut claimants = Vec::with_capacity(nodes.len());
    for node in nodes {
        if !tree.children(node.id).is_empty() {
            continue;
        }
        if tree.is_online(node.id)
            && let Some(Facts { idle, pinned, shares }) = facts(node.id)
        {
            let used = |counter| tree.counter(node.id, counter).usage;
            let pinned = pinned + used(Counter::Vmm) + used(Counter::Store);
            claimants.push(Claimant {
                id: node.id,
                usage: node.usage,
                protection: node.protection,
                idle,
                pinned,
                shares,
            });
        }
    }
    claimants
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    AboveLow,
    AboveMin,
}

/// What one claimant could give in one round.
#[derive(Debug)]
struct Bid {
    id: NodeId,
    /// Its index among the claimants.
    at: usize,
    /// Not more than this. Not 0.
    cap: u64,
    /// Not 0. Once normalised (in [`fill`]), the sum of all is below 2^64.
    weight: u128,
    gives: u64,
    /// Of the division that `gives` comes from.
    remainder: u128,
}

impl Round {
    fn bid(self, at: usize, claimant: &Claimant, terms: &Terms) -> Option<Bid> {
        let Claimant { id, usage, protection, idle, pinned, shares } = *claimant;
        let above_low = usage.saturating_sub(protection.soft());
        let gives_above_low = usage.saturating_sub(protection.soft().max(pinned));
        // The pages that the round is about, how many of them can be had, and how many of them are idle: those above
        // the protection are idle as far as the idle ones reach.
        let (pages, cap, idle) = match self {
            Round::AboveLow => (above_low, gives_above_low, idle),
            Round::AboveMin => {
                let all = usage.saturating_sub(protection.min.max(pinned));
                let between = protection.soft().min(usage).saturating_sub(protection.min);
                (between, all.saturating_sub(gives_above_low), idle.saturating_sub(above_low))
            }
        };
        let idle = u128::from(idle.min(pages).0);
        let active = u128::from(pages.0) - idle;
        // Times 100 × (1 − tax) to stay with whole numbers, and times 2^32 for the sake of the division by shares.
        let taxed = active * u128::from(100 - terms.idle_tax.min(99)) + idle * 100;
        let weight = (taxed << 32) / u128::from(shares.max(1));
        (cap.0 > 0).then_some(Bid { id, at, cap: cap.0, weight, gives: 0, remainder: 0 })
    }
}

/// Divides `need` among the bids: `gives` = min(cap, λ × weight), exact in sum. Returns the sum.
fn fill(need: Pages, bids: &mut [Bid]) -> Pages {
    let caps: u128 = bids.iter().map(|bid| u128::from(bid.cap)).sum();
    if caps <= u128::from(need.0) {
        for bid in bids.iter_mut() {
            bid.gives = bid.cap;
        }
        // Fits: it is at most `need`.
        return Pages(caps as u64);
    }
    // Weights of 63 bits in sum: products with a number of pages fit.
    let sum: u128 = bids.iter().map(|bid| bid.weight).sum();
    let surplus = (u128::BITS - sum.leading_zeros()).saturating_sub(63);
    for bid in bids.iter_mut() {
        bid.weight = (bid.weight >> surplus).max(1);
    }
    // Who meets its cap at the smallest λ comes first.
    bids.sort_unstable_by(|a, b| (u128::from(a.cap) * b.weight).cmp(&(u128::from(b.cap) * a.weight)));
    let mut rest = u128::from(need.0);
    let mut weights: u128 = bids.iter().map(|bid| bid.weight).sum();
    let mut full = 0;
    while let Some(bid) = bids.get_mut(full)
        && rest * bid.weight >= u128::from(bid.cap) * weights
    {
        bid.gives = bid.cap;
        rest -= u128::from(bid.cap);
        weights -= bid.weight;
        full += 1;
    }
    // Nobody of the others meets its cap, not even with one page more.
    let open = &mut bids[full..];
    let mut left_over = rest;
    for bid in open.iter_mut() {
        let gives = rest * bid.weight / weights;
        bid.remainder = rest * bid.weight % weights;
        bid.gives = gives as u64;
        left_over -= gives;
    }
    let left_over = left_over as usize;
    if left_over > 0 {
        open.select_nth_unstable_by_key(left_over - 1, |bid| (Reverse(bid.remainder), bid.id));
        for bid in &mut open[..left_over] {
            bid.gives += 1;
        }
    }
    need
}

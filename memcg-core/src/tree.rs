//! The tree of counters: host, groups, VMs.
//!
//! One owner, plain integers: no atomics, no locks, every snapshot consistent. Each node has four counters: memory
//! (U, everything), vmm (K, overhead, always in U too), store (compressed content of evicted pages, in U too) and swap
//! (S). A node is charged only when its accounting is on ([`Accounting`]). A charge walks from the node to the root; it is
//! checked at every level before the first counter moves, so a refused charge changes nothing but one count of failures
//! at the level that refused.
//!
//! ```text
//!  /  (the host: max = budget)          usage = own + sum of the children's usage, at every level
//!  ├── build (group)
//!  │   ├── vm1                          charge: vm1 → build → /, all or nothing
//!  │   └── vm2
//!  └── vm3
//! ```
//!
//! # A charge
//!
//! So many pages of one [`Kind`], to one node, in one [`Mode`]. It is asked of the node and of each node above, and
//! granted by all of them or by none; then the usage of all of them rises by it, and their peaks. Overhead is asked of
//! `vmm.max` everywhere before it is asked of `memory.max` anywhere: what no reclaim can make room for must not cause
//! any. A granted [`Charge`] says which nodes went above their `high` with it, so that somebody can wake their reclaim.
//! [`Tree::reserve`] is the same in two phases: prepared, then committed or refunded.
//!
//! # A refusal
//!
//! [`Refused`] names the lowest level without room, the counter and the numbers. It has changed nothing but one count
//! there, by the mode: `failcnt` for a fault that waits ([`Mode::Wait`]), and counts of their own for work that can be
//! put off ([`Mode::NoWait`]) and for charging ahead ([`Mode::NoRetry`]). Only the first may lead to reclaim, and to a
//! victim, and only in the subtree of that level. [`Mode::NoFail`] is never refused; what it leaves above a limit is
//! reported as overcharge and may only fall.
//!
//! # Parts
//!
//! | part | what it says |
//! | --- | --- |
//! | [`charge`], [`reserve`] | charging in one step and in two |
//! | [`counter`], [`snapshot`] | the four counters; looking at a node or at all of them |
//! | [`limits`] | limits, and setting them wholly or not at all |
//! | [`accounting`] | off at first, then on for good |
//! | [`lifetime`] | born whole, offline while charged, freed once |
//! | [`moving`] | a node changes its place with all its charges |
//! | [`evict`] | memory, store and swap in one step |
//! | [`events`] | `memory.events` |
//! | [`check`] | the invariants, to be asked at any time |
//!
//! # Rules
//!
//! By their numbers in `docs/semantics.md`.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 1, 3, B1 | `pages <= limit.saturating_sub(usage)`; limit 0 refuses the first page |
//! | 3, 64 | all or nothing: 512 pages with room for 511 are refused whole |
//! | 2, 10, 119 | a new node has usage 0, failcnt 0, no limit; the root exists first, its limit is the host's budget |
//! | 4, B65 | an uncharge below zero is clamped, counted, and stops a debug build |
//! | 5, B4, B64 | a snapshot is a copy of one moment: K ≤ U, parent = own + children |
//! | 7 | [`Tree::margin`]: room for the real request, not "one more" |
//! | 9, 13, 20, 79, 90-97 | born whole; goes only without children and charges, until then offline: [`lifetime`] |
//! | 19, 77, T16, T24 | [`Tree::charge_root`]: work without a VM's context is the root's, and counted |
//! | 24, 27 | [`Tree::evict`] and [`Tree::refault`]: memory, store and swap in one step; [`Tree::settle_evicted`] |
//! | 32-34, 89, 100, 134 | [`Tree::move_node`]: everything below the common ancestor, or nothing |
//! | 61, 117, B39, B70 | `failcnt`: refused [`Mode::Wait`] charges, once each; batch misses apart |
//! | 57, 81, B51 | overhead charges K first, then U, in one step; a refusal by K touches only K's count |
//! | 58, 67, 68, 70, 73, 93, 94 | [`Accounting`]: off at first, inherited, one-way, turned on in one step |
//! | 62, 84, 116 | [`Mode`] |
//! | 63 | [`Refused::level`]: where the limit was met, hence whose subtree may be reclaimed |
//! | 66 | peak and failcnt can be reset, counter by counter; peak ≥ usage always; [`Events`] count on |
//! | 69 | writing the limits that are already there changes nothing |
//! | 71 | lowering `vmm.max` below usage is refused |
//! | 77, 82, 83 | [`Mode::NoFail`] is counted; what it leaves above a limit is [`NodeSnapshot::overcharge`] |
//! | 78, B13 | [`Reservation`]: commit or refund |
//! | 115, B80, B91 | `high` is edge-triggered: `before <= high && after > high`, re-evaluated when it is lowered |
//! | 120 | peak moves only when the whole charge succeeded |

pub mod accounting;
pub mod charge;
pub mod check;
pub mod counter;
pub mod events;
pub mod evict;
pub mod lifetime;
pub mod limits;
pub mod moving;
mod node;
pub mod reserve;
pub mod snapshot;

#[doc(inline)]
pub use accounting::Accounting;
#[doc(inline)]
pub use charge::{Charge, Crossed, Kind, Mode, Refused};
#[doc(inline)]
pub use check::Violation;
#[doc(inline)]
pub use counter::{Counter, CounterSnapshot, Overhead, OverheadParts};
#[doc(inline)]
pub use events::{Event, Events};
#[doc(inline)]
pub use evict::EvictError;
#[doc(inline)]
pub use lifetime::{AddError, RemoveError};
pub(crate) use limits::Waits;
#[doc(inline)]
pub use limits::{Above, AboveMax, LimitPatch, Limits, SetLimitError};
#[doc(inline)]
pub use moving::{MoveError, Moved};
#[doc(inline)]
pub use reserve::Reservation;
#[doc(inline)]
pub use snapshot::{NodeSnapshot, TreeNode, TreeSnapshot};

use node::Node;

use crate::units::Limit;

/// Levels that a tree may have, the root included. A bound, so that a charge needs no allocation.
pub const MAX_LEVELS: usize = 8;

/// Longest name of a node in bytes.
pub const MAX_NAME: usize = 64;

/// A node of one tree. Stays unique: an id is never given out again after [`Tree::remove`].
///
/// Methods of [`Tree`] that take an id panic when it is of a removed node (or of another tree): the owner of the tree
/// hands out and forgets ids itself, and going on with the wrong node would corrupt the account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId {
    index: u32,
    /// How often the slot has been used before.
    life: u32,
}

#[derive(Clone, Debug)]
struct Slot {
    life: u32,
    node: Option<Node>,
}

/// All counters of one host. See the module's documentation.
#[derive(Clone, Debug)]
pub struct Tree {
    slots: Vec<Slot>,
    free: Vec<u32>,
    root: NodeId,
    /// Accounted nodes, the root aside.
    accounted: usize,
    /// [`Self::charge_root`] charges.
    no_context: u64,
    /// Number of the next pending change of a limit; never reused.
    next_ticket: u64,
}

impl Tree {
    /// A tree that is only a root, whose `max` is the host's `budget`.
    pub fn new(budget: Limit) -> Tree {
        let mut root = Node::new("/".to_owned(), None, 0);
        root.set_limits(Limits { max: budget, ..Limits::default() });
        root.accounting = Accounting::On;
        let slots = vec![Slot { life: 0, node: Some(root) }];
        Tree {
            slots,
            free: Vec::new(),
            root: NodeId { index: 0, life: 0 },
            accounted: 0,
            no_context: 0,
            next_ticket: 1,
        }
    }

    /// The root: the host.
    pub fn root(&self) -> NodeId {
        self.root
    }

    fn insert(&mut self, node: Node) -> NodeId {
        match self.free.pop() {
            Some(index) => {
                let slot = &mut self.slots[index as usize];
                slot.node = Some(node);
                NodeId { index, life: slot.life }
            }
            None => {
                let index = u32::try_from(self.slots.len()).expect("fewer than 2^32 nodes");
                self.slots.push(Slot { life: 0, node: Some(node) });
                NodeId { index, life: 0 }
            }
        }
    }

    /// Whether `id` is a node of this tree that has not been removed.
    pub fn contains(&self, id: NodeId) -> bool {
        self.slots.get(id.index as usize).is_some_and(|slot| slot.life == id.life && slot.node.is_some())
    }

    /// All nodes, the root first; otherwise in no particular order.
    pub fn ids(&self) -> impl Iterator<Item = NodeId> + '_ {
        (0u32..)
            .zip(&self.slots)
            .filter(|(_, slot)| slot.node.is_some())
            .map(|(index, slot)| NodeId { index, life: slot.life })
    }

    /// The node above, `None` for the root.
    pub fn parent(&self, id: NodeId) -> Option<NodeId> {
        self.node(id).parent
    }

    /// The nodes directly below, in the order in which they were added; offline ones too.
    pub fn children(&self, id: NodeId) -> &[NodeId] {
        &self.node(id).children
    }

    /// The online child of `parent` with this name.
    pub fn child(&self, parent: NodeId, name: &str) -> Option<NodeId> {
        let called = |id: &&NodeId| {
            let node = self.node(**id);
            node.online && node.name == name
        };
        self.node(parent).children.iter().find(called).copied()
    }

    /// The online node at a path such as `/build/vm1`; `/` and the empty path are the root.
    pub fn find(&self, path: &str) -> Option<NodeId> {
        path.split('/').filter(|part| !part.is_empty()).try_fold(self.root, |at, name| self.child(at, name))
    }

    /// Name of the node within its parent, `/` for the root.
    pub fn name(&self, id: NodeId) -> &str {
        &self.node(id).name
    }

    /// Path of the node from the root, such as `/build/vm1`.
    pub fn path(&self, id: NodeId) -> String {
        let mut names: Vec<&str> = self.ancestry(id).map(|id| self.name(id)).collect();
        // The root's own name is the slash in front.
        names.pop();
        names.push("");
        names.reverse();
        if names.len() == 1 { "/".to_owned() } else { names.join("/") }
    }

    /// `id` and its ancestors, the root last.
    pub fn ancestry(&self, id: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        std::iter::successors(Some(id), |at| self.node(*at).parent)
    }

    /// `id` and everything below it, each before what is below it.
    pub fn subtree(&self, id: NodeId) -> impl Iterator<Item = NodeId> + '_ {
        let mut left = vec![id];
        std::iter::from_fn(move || {
            let at = left.pop()?;
            left.extend(self.node(at).children.iter().rev());
            Some(at)
        })
    }

    /// Whether `id` is `top` or below it: a limit met at `top` may be relieved only there (rows 48, 63).
    pub fn is_within(&self, id: NodeId, top: NodeId) -> bool {
        self.ancestry(id).any(|at| at == top)
    }

    #[inline]
    fn node(&self, id: NodeId) -> &Node {
        let slot = self.slots.get(id.index as usize).filter(|slot| slot.life == id.life);
        slot.and_then(|slot| slot.node.as_ref()).expect("the id is of a node of this tree")
    }

    #[inline]
    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        let slot = self.slots.get_mut(id.index as usize).filter(|slot| slot.life == id.life);
        slot.and_then(|slot| slot.node.as_mut()).expect("the id is of a node of this tree")
    }

    /// Calls `f` on `id` and its ancestors, upwards.
    fn walk(&mut self, id: NodeId, mut f: impl FnMut(&mut Node)) {
        let mut at = Some(id);
        while let Some(id) = at {
            let node = self.node_mut(id);
            f(node);
            at = node.parent;
        }
    }
}

/// Whether a node may be called `name`: 1 to [`MAX_NAME`] letters, digits, `-`, `_` and `.` of ASCII, the first a letter or
/// a digit.
pub fn is_name(name: &str) -> bool {
    name.len() <= MAX_NAME
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

//! Moving a VM, or a group with everything below it, to another group.
//!
//! ```text
//!            /  common ancestor: sees nothing, at no instant
//!          ┌─┴─┐
//!    was ─ a   b ─ new ancestors: must have room for U, K, store and S
//!          │   │
//!          vm ─┘  all that is charged to it and below moves with it
//! ```
//!
//! The unit is a node of the tree: a VM as a whole, never one of its threads (row 32). All its charges move, overhead
//! too, or nothing does and the error says why (rows 33, 100, B25): a VM that left its charges behind would be limited
//! by a group for what it uses in another. Only levels below the common ancestor change (row 89). A move is one step
//! of the tree's owner, so no charge can fall between the old place and the new one (row 34), and since a charge names
//! its node, what was charged before the move is uncharged from the new ancestors after it (row 78).

use super::charge::Crossed;
use super::{Accounting, Counter, Event, MAX_LEVELS, NodeId, Refused, Tree};

/// What a move did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "says which limits were crossed"]
pub enum Moved {
    /// It was there already.
    Unchanged,
    /// It is there now. Memory of these new ancestors went above their effective high limit with it: wake their
    /// reclaim.
    Moved(Crossed),
}

/// Why a node was not moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MoveError {
    /// The root stays.
    #[error("the root cannot be moved")]
    Root,
    /// It would be below itself.
    #[error("{name:?} cannot be moved to {to}, which is {name:?} itself or below it")]
    IntoItself {
        /// Name of the node.
        name: String,
        /// Path of the destination.
        to: String,
    },
    /// It is being removed.
    #[error("{0:?} is being removed: what is charged to it returns where it is")]
    Offline(String),
    /// The destination is being removed.
    #[error("the group {0:?} is being removed: choose another")]
    ParentOffline(String),
    /// The destination is a VM.
    #[error("{0:?} is a VM with memory of its own: only groups can have members")]
    ParentCharged(String),
    /// The destination has a child of that name.
    #[error("{to} has a member {name:?} already: remove or move that one first")]
    Exists {
        /// Name of both.
        name: String,
        /// Path of the destination.
        to: String,
    },
    /// More than [`MAX_LEVELS`].
    #[error("{name:?} has {height} levels of members and {to} is {depth} deep: {} are possible", MAX_LEVELS - 1)]
    TooDeep {
        /// Name of the node.
        name: String,
        /// Levels below it.
        height: usize,
        /// Path of the destination.
        to: String,
        /// Levels from the root to the destination.
        depth: usize,
    },
    /// Members of an accounted group are accounted, and this is not.
    #[error("{name:?} is not accounted and {to} is: activate the accounting of {name:?} first")]
    NotAccounted {
        /// Name of the node.
        name: String,
        /// Path of the destination.
        to: String,
    },
    /// A new ancestor has no room.
    #[error("{name:?} does not fit {path} ({refused}): raise that limit, or free memory first")]
    NoRoom {
        /// Name of the node.
        name: String,
        /// Path of the lowest new ancestor without room.
        path: String,
        /// The ancestor, the counter and the numbers.
        refused: Refused,
    },
}

impl Tree {
    /// Moves `id`, with everything below it and all that is charged there, below `new_parent`. Its own limits, peaks,
    /// counts and a pending change of `max` stay with it.
    ///
    /// # Errors
    /// [`MoveError`]; nothing has changed then.
    pub fn move_node(&mut self, id: NodeId, new_parent: NodeId) -> Result<Moved, MoveError> {
        let Some(old_parent) = self.parent(id) else {
            return Err(MoveError::Root);
        };
        if old_parent == new_parent {
            return Ok(Moved::Unchanged);
        }
        self.check_place(id, new_parent)?;
        // The root is above both, so there is one.
        let common = self.ancestry(old_parent).find(|at| self.is_within(new_parent, *at)).unwrap_or(self.root);
        let usage = Counter::ALL.map(|which| self.node(id).counters.get(which).usage);
        for which in [Counter::Vmm, Counter::Store, Counter::Memory, Counter::Swap] {
            let pages = usage[which as usize];
            let mut below = self.ancestry(new_parent).take_while(|at| *at != common);
            if let Some(level) = below.find(|at| self.node(*at).short(which, pages).is_some()) {
                let (name, path) = (self.name(id).to_owned(), self.path(level));
                return Err(MoveError::NoRoom { name, path, refused: self.refusal(level, which, pages) });
            }
        }
        // Nothing can fail from here on.
        let returning = self.returning(id);
        self.detach(id, old_parent);
        self.attach(id, new_parent);
        let mut at = old_parent;
        while at != common {
            let node = self.node_mut(at);
            for which in Counter::ALL {
                node.lower(which, usage[which as usize]);
            }
            node.returning = node.returning.saturating_sub(returning);
            at = node.parent.expect("the common ancestor is above");
        }
        let mut crossed = Crossed::NONE;
        let mut at = new_parent;
        while at != common {
            let node = self.node_mut(at);
            node.returning += returning;
            let above = node.parent.expect("the common ancestor is above");
            for which in Counter::ALL {
                if self.node_mut(at).raise(which, usage[which as usize], false) {
                    crossed.push(at);
                    self.record(at, Event::High);
                }
            }
            at = above;
        }
        let (old, new) = (self.node(id).depth, self.node(new_parent).depth + 1);
        for at in self.subtree(id).collect::<Vec<_>>() {
            let node = self.node_mut(at);
            node.depth = node.depth + new - old;
        }
        Ok(Moved::Moved(crossed))
    }

    /// Whether `id` may be below `new_parent`, limits apart.
    fn check_place(&self, id: NodeId, new_parent: NodeId) -> Result<(), MoveError> {
        let (node, above) = (self.node(id), self.node(new_parent));
        let name = || node.name.clone();
        let to = || self.path(new_parent);
        if self.is_within(new_parent, id) {
            return Err(MoveError::IntoItself { name: name(), to: to() });
        }
        if !node.online {
            return Err(MoveError::Offline(name()));
        }
        if !above.online {
            return Err(MoveError::ParentOffline(above.name.clone()));
        }
        if new_parent != self.root && !above.counters.is_free_of_own() {
            return Err(MoveError::ParentCharged(above.name.clone()));
        }
        if self.child(new_parent, &node.name).is_some() {
            return Err(MoveError::Exists { name: name(), to: to() });
        }
        let deepest = self.subtree(id).map(|at| self.node(at).depth).max().unwrap_or(node.depth);
        let height = deepest - node.depth;
        if above.depth + 1 + height >= MAX_LEVELS {
            return Err(MoveError::TooDeep { name: name(), height, to: to(), depth: above.depth });
        }
        if node.accounting == Accounting::Off && above.accounting == Accounting::On && new_parent != self.root {
            return Err(MoveError::NotAccounted { name: name(), to: to() });
        }
        Ok(())
    }
}

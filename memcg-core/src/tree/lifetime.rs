//! From birth to the last uncharge: nodes are made whole or not at all, and freed exactly once.
//!
//! ```text
//!                   remove (nothing charged, no members)
//!   ONLINE ────────────────────────────────────────────────────────────► gone
//!     │                                                                   ▲
//!     └─ set_offline, set_returning ─► OFFLINE ── last uncharge ─► reap ──┘
//!                                      no name, no new members,    children first, then parents
//!                                      a zombie while charged      that are free because of it
//! ```
//!
//! Charges may outlive what they were made for: a worker's memory that the host has not got back, a write under way
//! (row 90). Then a node goes offline: its name is free at once, and the struct stays as long as something is charged
//! to it (rows 20, 79). Nobody counts references: a node is free when it is offline, has no children and no charges,
//! which [`Tree::reap`] looks at for the whole tree, deepest nodes first. So a parent that becomes free because of its
//! child's last uncharge is freed as well, in the same call (B58), in whatever order removal and the last uncharge
//! came (rows 88, 91, 92), and never on a fault's path (row 97): the owner of the tree reaps when it has time.
//!
//! **Returning** is what is charged to VMs that are gone but whose memory is not back: in use, hence not room for
//! anybody, but known to become room soon. It shrinks with each uncharge, and is summed up the tree, so that who
//! waits for room can see how much is on its way before another victim is chosen.

use super::node::Node;
use super::{Accounting, Counter, LimitPatch, MAX_LEVELS, MAX_NAME, NodeId, SetLimitError, Tree, is_name};
use crate::units::Pages;

/// Why a node was not added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Not a name.
    #[error("{0:?} is not a name: use 1 to {MAX_NAME} letters, digits, '-', '_' or '.', the first a letter or digit")]
    BadName(String),
    /// The parent has a child of that name.
    #[error("{0:?} exists already: choose another name")]
    Exists(String),
    /// More than [`MAX_LEVELS`].
    #[error("groups can be nested {} deep at most, below the root", MAX_LEVELS - 1)]
    TooDeep,
    /// The parent is being removed.
    #[error("the group {0:?} is being removed: choose another")]
    ParentOffline(String),
    /// The parent is charged for itself: it is a VM, not a group.
    #[error("{0:?} is a VM with memory of its own: only groups can have members")]
    ParentCharged(String),
    /// Its limits cannot be set.
    #[error(transparent)]
    Limits(#[from] SetLimitError),
}

/// Why a node was not removed or taken offline.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RemoveError {
    /// The root stays.
    #[error("the root cannot be removed")]
    Root,
    /// It has children that are online.
    #[error("{name:?} has members ({children}): remove or move them first")]
    HasChildren {
        /// Name of the node.
        name: String,
        /// How many of its children are online.
        children: usize,
    },
    /// Something is still charged to it, or it has members that are being removed and not yet reaped.
    #[error("{name:?} still has {usage} charged: taken offline, it goes when they are back")]
    Charged {
        /// Name of the node.
        name: String,
        /// Memory and swap charged, in pages.
        usage: Pages,
    },
}

impl Tree {
    /// Adds a node below `parent`, without limits and charges (`min` and `low` are 0). It is accounted from the start
    /// below an accounted group, and not otherwise; the root's own accounting is not passed on.
    ///
    /// # Errors
    /// [`AddError`]; nothing has changed then.
    pub fn add(&mut self, parent: NodeId, name: &str) -> Result<NodeId, AddError> {
        let above = self.node(parent);
        if !is_name(name) {
            return Err(AddError::BadName(name.to_owned()));
        }
        if !above.online {
            return Err(AddError::ParentOffline(above.name.clone()));
        }
        if above.depth + 1 >= MAX_LEVELS {
            return Err(AddError::TooDeep);
        }
        if self.child(parent, name).is_some() {
            return Err(AddError::Exists(name.to_owned()));
        }
        if parent != self.root && !above.counters.is_free_of_own() {
            return Err(AddError::ParentCharged(above.name.clone()));
        }
        let mut node = Node::new(name.to_owned(), Some(parent), above.depth + 1);
        if parent != self.root {
            node.accounting = above.accounting;
        }
        self.accounted += usize::from(node.accounting == Accounting::On);
        let id = self.insert(node);
        self.attach(id, parent);
        Ok(id)
    }

    /// [`Self::add`] with limits and accounting from the start, all or nothing (row 9). [`Accounting::Off`] below an
    /// accounted group is On all the same.
    ///
    /// # Errors
    /// [`AddError`]; nothing has changed then, and the name is free.
    pub fn add_with(
        &mut self,
        parent: NodeId,
        name: &str,
        limits: &LimitPatch,
        accounting: Accounting,
    ) -> Result<NodeId, AddError> {
        let id = self.add(parent, name)?;
        if self.accounting(id) == Accounting::Off && accounting == Accounting::On {
            self.node_mut(id).accounting = Accounting::On;
            self.accounted += 1;
        }
        match self.set_limits(id, limits) {
            Ok(_) => Ok(id),
            Err(error) => {
                self.free(id, parent);
                Err(AddError::Limits(error))
            }
        }
    }

    /// Removes a node that has no children and no charges. [`Self::set_offline`] is for those that have charges.
    ///
    /// # Errors
    /// [`RemoveError`]; nothing has changed then.
    pub fn remove(&mut self, id: NodeId) -> Result<(), RemoveError> {
        let node = self.node(id);
        let Some(parent) = node.parent else {
            return Err(RemoveError::Root);
        };
        let children = self.online_children(id);
        if children > 0 {
            return Err(RemoveError::HasChildren { name: node.name.clone(), children });
        }
        // Members that are being removed can neither be removed nor moved: it waits for them.
        if !node.children.is_empty() || !node.counters.is_free() {
            let usage = node.counters.get(Counter::Memory).usage + node.counters.get(Counter::Swap).usage;
            return Err(RemoveError::Charged { name: node.name.clone(), usage });
        }
        self.free(id, parent);
        Ok(())
    }

    /// Takes a node's name away while its charges are still returning: the name can be used again, and nothing but
    /// [`super::Mode::NoFail`] charges it any more. Offline is for ever; [`Self::reap`] frees the node when it is
    /// empty. A second time changes nothing.
    ///
    /// # Errors
    /// [`RemoveError`] for the root, and while members are online: a group does not go before its VMs.
    pub fn set_offline(&mut self, id: NodeId) -> Result<(), RemoveError> {
        let node = self.node(id);
        if node.parent.is_none() {
            return Err(RemoveError::Root);
        }
        let children = self.online_children(id);
        if children > 0 {
            return Err(RemoveError::HasChildren { name: node.name.clone(), children });
        }
        self.node_mut(id).online = false;
        Ok(())
    }

    fn online_children(&self, id: NodeId) -> usize {
        self.node(id).children.iter().filter(|child| self.node(**child).online).count()
    }

    /// Takes a VM offline that is gone, and calls what is charged to it *returning* from now on: the host will have it
    /// back soon. The owner of the tree uncharges it when the memory is back.
    ///
    /// # Errors
    /// As [`Self::set_offline`].
    pub fn set_returning(&mut self, id: NodeId) -> Result<(), RemoveError> {
        self.set_offline(id)?;
        self.node_mut(id).returning_own.get_or_insert(Pages::ZERO);
        self.settle_returning(id);
        Ok(())
    }

    /// Memory charged to `id` and below that belongs to VMs that are gone, [`Self::set_returning`].
    pub fn returning(&self, id: NodeId) -> Pages {
        self.node(id).returning
    }

    /// Follows what is charged to a returning node, up the tree.
    pub(super) fn settle_returning(&mut self, id: NodeId) {
        let node = self.node_mut(id);
        let now = node.counters.get(Counter::Memory).own;
        if let Some(before) = node.returning_own
            && before != now
        {
            node.returning_own = Some(now);
            self.walk(id, |node| node.returning = node.returning.saturating_sub(before) + now);
        }
    }

    /// Frees every offline node without children and charges, children before their parents, and says which: each id
    /// once, and never again.
    pub fn reap(&mut self) -> Vec<NodeId> {
        let mut zombies: Vec<NodeId> = self.zombies().collect();
        zombies.sort_by_key(|id| std::cmp::Reverse(self.node(*id).depth));
        zombies.retain(|id| self.remove(*id).is_ok());
        zombies
    }

    /// Nodes that are offline and not yet reaped, in no particular order.
    pub fn zombies(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.ids().filter(|id| !self.node(*id).online)
    }

    /// Accounted nodes, the root aside. 0: nobody is charged for anything.
    pub fn accounted(&self) -> usize {
        self.accounted
    }

    /// Makes `id` the last child of `parent`, and its members those of all above.
    pub(super) fn attach(&mut self, id: NodeId, parent: NodeId) {
        let members = self.node(id).members;
        self.node_mut(id).parent = Some(parent);
        let above = self.node_mut(parent);
        above.children.push(id);
        // A parent without children counted as one member itself; the child takes its place.
        let instead = u32::from(above.children.len() == 1);
        self.walk(parent, |node| node.members = node.members + members - instead);
    }

    /// The reverse of [`Self::attach`].
    pub(super) fn detach(&mut self, id: NodeId, parent: NodeId) {
        let members = self.node(id).members;
        let above = self.node_mut(parent);
        above.children.retain(|child| *child != id);
        let instead = u32::from(above.children.is_empty());
        self.walk(parent, |node| node.members = node.members + instead - members);
    }

    /// Frees a node without children and charges.
    fn free(&mut self, id: NodeId, parent: NodeId) {
        // What was asked for can no longer be in force wholly.
        self.end_pending(id, false);
        self.accounted -= usize::from(self.accounting(id) == Accounting::On);
        self.detach(id, parent);
        let slot = &mut self.slots[id.index as usize];
        slot.node = None;
        // A slot that has used up its lives is not used again, so that no id ever means two nodes.
        if let Some(life) = slot.life.checked_add(1) {
            slot.life = life;
            self.free.push(id.index);
        }
    }
}

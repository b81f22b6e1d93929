//! Nodes as tests want them.

use memcg_core::tree::{NodeId, Tree};

/// A VM's leaf below `parent`.
pub fn vm(tree: &mut Tree, parent: NodeId, name: &str) -> NodeId {
    tree.add(parent, name).unwrap()
}

/// A group below `parent`.
pub fn group(tree: &mut Tree, parent: NodeId, name: &str) -> NodeId {
    tree.add(parent, name).unwrap()
}

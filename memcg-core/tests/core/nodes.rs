//! Nodes as tests want them: accounted.

use memcg_core::tree::{NodeId, Tree};
use memcg_core::units::Pages;

/// A VM's leaf below `parent`.
pub fn vm(tree: &mut Tree, parent: NodeId, name: &str) -> NodeId {
    accounted(tree, parent, name)
}

/// A group below `parent`.
pub fn group(tree: &mut Tree, parent: NodeId, name: &str) -> NodeId {
    accounted(tree, parent, name)
}

fn accounted(tree: &mut Tree, parent: NodeId, name: &str) -> NodeId {
    let id = tree.add(parent, name).unwrap();
    tree.activate(id, |_| Pages::ZERO).unwrap();
    id
}

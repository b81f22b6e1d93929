//! Nodes as tests want them: accounted.

use memcg_core::tree::{NodeId, Tree};
use memcg_core::units::{Limit, Pages};

/// A VM's leaf below `parent`.
pub fn vm(tree: &mut Tree, parent: NodeId, name: &str) -> NodeId {
    accounted(tree, parent, name)
}

/// A group below `parent`.
pub fn group(tree: &mut Tree, parent: NodeId, name: &str) -> NodeId {
    accounted(tree, parent, name)
}

/// `/ → group → vm, sibling` and `/ → uncle`.
pub struct Family {
    pub tree: Tree,
    pub group: NodeId,
    pub vm: NodeId,
    pub sibling: NodeId,
    pub uncle: NodeId,
}

/// A family without limits.
pub fn family() -> Family {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let group = group(&mut tree, root, "group");
    let [vm, sibling] = ["vm", "sibling"].map(|name| vm(&mut tree, group, name));
    let uncle = self::vm(&mut tree, root, "uncle");
    Family { tree, group, vm, sibling, uncle }
}

fn accounted(tree: &mut Tree, parent: NodeId, name: &str) -> NodeId {
    let id = tree.add(parent, name).unwrap();
    tree.activate(id, |_| Pages::ZERO).unwrap();
    id
}

//! Moving a VM, or a group with everything in it, to another group.
//!
//! ```text
//!  request ─► accounting ─► recall of the stocks ─► Tree::move_node ─┬─ there, with all that is charged ─► 200
//!               begins                                               └─ does not fit ─► 409, nothing has changed
//! ```
//!
//! A guest notices nothing of it. What is charged and not used need not fit the new place, so the stocks come back
//! first; a silent worker's stays counted and moves along. A VM that is not charged yet is counted before it comes into
//! a group that is. To move something to where it is changes nothing.

use memcg_core::tree::{MoveError, Moved, NodeId};
use serde_json::json;

use super::Controller;
use super::actor::{Actor, answer};
use super::changes::Target;
use super::error::{Code, Refusal};
use super::events::EventKind;
use super::groups;
use super::journal::Entry;
use super::view::{GroupView, VmView};

/// Tells whoever asked how it went.
type Done = Box<dyn FnOnce(&mut Actor, Result<(), Refusal>) + Send>;

impl Controller {
    /// Moves a VM to the group with this path.
    ///
    /// # Errors
    /// When there is no such VM or group, the VM has ended, or it does not fit there.
    pub async fn move_vm(&self, name: &str, group: &str) -> Result<VmView, Refusal> {
        let (name, group) = (name.to_owned(), group.to_owned());
        self.ask(move |actor, reply| match actor.find_alive(&name) {
            Ok(id) => {
                let done = move |actor: &mut Actor, moved: Result<(), Refusal>| {
                    answer(reply, moved.map(|()| actor.vm_view(id, false)));
                };
                actor.move_to(Target::Vm(id), group, Box::new(done));
            }
            Err(refusal) => answer(reply, Err(refusal)),
        })
        .await
    }

    /// Moves a group, with everything in it, into the group with the path `parent`.
    ///
    /// # Errors
    /// When there is no such group, it would be in itself, or it does not fit there.
    pub async fn move_group(&self, path: &str, parent: &str) -> Result<GroupView, Refusal> {
        let (path, parent) = (path.to_owned(), parent.to_owned());
        self.ask(move |actor, reply| match actor.find_group(&path) {
            Ok(node) => {
                let done = move |actor: &mut Actor, moved: Result<(), Refusal>| {
                    answer(reply, moved.map(|()| actor.group_view(node)));
                };
                actor.move_to(Target::Group(node), parent, Box::new(done));
            }
            Err(refusal) => answer(reply, Err(refusal)),
        })
        .await
    }
}

impl Actor {
    /// Tests a move, begins accounting where the new place needs it, and recalls the stocks.
    fn move_to(&mut self, target: Target, path: String, done: Done) {
        let to = match self.check_move(target, &path).and_then(|to| self.can_remember().map(|()| to)) {
            Ok(to) => to,
            Err(refusal) => return done(self, Err(refusal)),
        };
        if self.tree.parent(self.node_of(target)) == Some(to) {
            return done(self, Ok(()));
        }
        if self.accounts(to) {
            let unaccounted: Vec<_> = self.vms_of(target).into_iter().filter(|id| !self.vms[id].accounted()).collect();
            if !unaccounted.is_empty() {
                self.account_first(&unaccounted, move |actor, result| match result {
                    Err((id, refusal)) if actor.is_alive(id) => done(actor, Err(refusal)),
                    _ => actor.move_to(target, path, done),
                });
                return;
            }
            if let Target::Group(node) = target {
                self.track_group(node);
            }
        }
        let vms = self.vms_of(target);
        self.recall(&vms, move |actor| {
            let moved = actor.move_now(target, &path);
            done(actor, moved);
        });
    }

    /// Whether the target and the place are there. Returns the place.
    fn check_move(&self, target: Target, path: &str) -> Result<NodeId, Refusal> {
        self.check_there(target)?;
        let to = self.group_for(path)?;
        if let Target::Group(node) = target {
            if self.accounts(to) {
                self.check_nobody_is_being_made(node)?;
            }
            self.check_depth(node, to)?;
        }
        Ok(to)
    }

    /// Whether each group at and below `node` would still leave a level for VMs.
    fn check_depth(&self, node: NodeId, to: NodeId) -> Result<(), Refusal> {
        let names = |at: NodeId| self.tree.ancestry(at).count() - 1;
        let inside = self.groups.iter().filter(|at| self.tree.is_within(**at, node));
        let height = inside.map(|at| names(*at) - names(node)).max().unwrap_or(0);
        let deepest = names(to) + 1 + height;
        // Into itself it cannot be moved in any case.
        if deepest <= groups::DEEPEST || self.tree.is_within(to, node) {
            return Ok(());
        }
        let (most, name, to) = (groups::DEEPEST, self.tree.path(node), self.tree.path(to));
        let message = format!(
            "the path of a group has at most {most} names, and the deepest in {name} would have {deepest} in {to}: move it to \
             another, or its groups first"
        );
        Err(Refusal::new(Code::WrongState, message))
    }

    /// The stocks are back, or will not come: move.
    fn move_now(&mut self, target: Target, path: &str) -> Result<(), Refusal> {
        // Time has passed since it was tested.
        let to = self.check_move(target, path)?;
        let node = self.node_of(target);
        let from = self.tree.path(node);
        if self.tree.parent(node).is_some() && !self.tree.is_within(to, node) {
            self.check_place(node, to)?;
        }
        match self.tree.move_node(node, to).map_err(refusal)? {
            Moved::Unchanged => return Ok(()),
            Moved::Moved(_) => {}
        }
        self.name_groups(node, &from);
        // There is room where it was, and less where it is: everybody there learns of it.
        self.roomier = true;
        self.tell(target);
        self.squeeze_above(to);
        for id in self.vms_of(target) {
            // What other groups wanted of it is theirs no more.
            self.aim_reclaim(id, None);
            self.look_above(id);
        }
        let path = self.tree.path(node);
        self.remember(match target {
            Target::Vm(id) => Entry::Moved { node: self.vms[&id].name.clone(), to: self.tree.path(to) },
            Target::Group(_) => Entry::Moved { node: from.clone(), to: path.clone() },
        });
        self.target_event(EventKind::Moved, target, json!({ "from": from, "to": path }));
        Ok(())
    }

    /// The VMs at and below `node`, whose path was `from`, were asked for in the groups where they are now: the same words
    /// are the same VM.
    fn name_groups(&mut self, node: NodeId, from: &str) {
        let inside = self.vms.iter().filter(|(_, vm)| self.tree.is_within(vm.node, node));
        for id in inside.map(|(id, _)| id).collect::<Vec<_>>() {
            let vm = self.vms.get_mut(&id).expect("listed");
            let group = self.tree.parent(vm.node).map(|group| self.tree.path(group)).unwrap_or_default();
            if let Some(config) = &mut vm.config {
                std::sync::Arc::make_mut(config).group = group;
            }
        }
        for created in self.created.values_mut().filter(|created| self.tree.is_within(created.node, node)) {
            let group = self.tree.parent(created.node).map(|group| self.tree.path(group)).unwrap_or_default();
            if let Some(config) = &mut created.spec.config {
                std::sync::Arc::make_mut(config).group.clone_from(&group);
            }
            created.spec.group = group;
        }
        // Those that have ended have no node.
        let to = self.tree.path(node);
        for past in self.past.values_mut() {
            let Some(group) = groups::moved(&past.view.group, from, &to) else { continue };
            if let Some(config) = &mut past.config {
                std::sync::Arc::make_mut(config).group.clone_from(&group);
            }
            past.view.group = group;
        }
    }
}

/// What the interface says about a move that was refused.
fn refusal(error: MoveError) -> Refusal {
    let message = error.to_string();
    match error {
        MoveError::NoRoom { refused, .. } => {
            Refusal::new(Code::DoesNotFit, message).usage(refused.usage.bytes()).missing(refused.short_by.bytes())
        }
        MoveError::Exists { .. } => Refusal::new(Code::AlreadyExists, message),
        MoveError::NotAccounted { .. } => Refusal::new(Code::NotAccounted, message),
        MoveError::Root
        | MoveError::IntoItself { .. }
        | MoveError::Offline(_)
        | MoveError::ParentOffline(_)
        | MoveError::ParentCharged(_)
        | MoveError::TooDeep { .. } => Refusal::new(Code::WrongState, message),
    }
}

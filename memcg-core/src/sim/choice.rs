//! Somebody is chosen, by a client or by the rules; and whoever was paused goes on.

use std::collections::BTreeMap;
use std::time::Duration;

use super::guest::{Guest, State};
use super::host::Host;
use super::outcome::What;
use super::setup::Answers;
use crate::hold::Verdict;
use crate::ladder::{Rung, STEP};
use crate::oom::{self, Action, Answer, Attributes, Choice, Decision, Nobody, Preference, RETURNS, Resolved};
use crate::tree::{Event, Mode, NodeId, Tree};
use crate::units::Pages;

/// When a level is looked at again at which nothing could be done.
const AGAIN: Duration = Duration::from_secs(1);

/// A question to the client that is open.
#[derive(Debug)]
pub struct Question {
    decision: Decision,
    asked: Duration,
    /// How long the client takes to answer.
    after: Duration,
    /// What it has answered cannot be done, and it says nothing else.
    refused: bool,
}

/// What came of a choice.
enum Came {
    /// Somebody's memory is coming back.
    Waits,
    /// This one goes.
    Goes(usize, Action, String),
    /// The client wants nobody to go.
    Spared,
    /// Nobody can be chosen.
    Nobody(String),
}

/// What the ranking is told of a VM.
fn attributes(vm: &Guest, tree: &Tree) -> Option<Attributes> {
    let action = match (vm.setup.kill, vm.state) {
        (_, State::Gone) => return None,
        (true, _) => Action::Kill,
        // What a pause frees of one that is paused already is on its way.
        (false, State::Paused { .. }) => Action::Pause { frees: Pages::ZERO },
        (false, _) => Action::Pause { frees: vm.freed_by_pause(tree) },
    };
    Some(Attributes {
        action,
        preference: vm.setup.preference,
        priority: vm.setup.priority,
        ending: vm.state == State::Ending,
        stock: Pages::ZERO,
        given: None,
    })
}

impl Host {
    /// Has somebody chosen for `level`; says whether the time to cool down begins.
    pub(super) fn choose(&mut self, level: NodeId) -> bool {
        let rests = self.chosen.get(&level).is_some_and(|at| self.now < *at + RETURNS);
        if rests || self.questions.contains_key(&level) || self.victims.waiting(&self.tree, level, self.now).is_some() {
            return false;
        }
        if let Some(client) = &self.client {
            let decision = Decision::new(level, self.now, client.wait);
            self.questions.insert(level, Question { decision, asked: self.now, after: client.after, refused: false });
            self.tell(What::Asked { level: self.tree.path(level) });
            return false;
        }
        self.decide(level)
    }

    /// Acts on a VM that is held at its own limit: nobody else would help it, and a pause need not free anything. Nobody is asked
    /// about it. Says whether that was done.
    fn choose_itself(&mut self, at: usize) -> bool {
        let vm = &self.vms[at];
        let (node, action) = (vm.node, if vm.setup.kill { Action::Kill } else { Action::Pause { frees: Pages::ZERO } });
        if vm.setup.preference == Preference::Omit {
            let why = Nobody { omitted: 1, ..Nobody::default() }.to_string();
            return self.finish(node, Came::Nobody(why));
        }
        let why = format!("{}: it was held at its own limit for too long", vm.setup.name);
        self.finish(node, Came::Goes(at, action, why))
    }

    /// Hears what the client says about what it was asked.
    pub(super) fn answer(&mut self) {
        let levels: Vec<_> = self.questions.keys().copied().collect();
        for level in levels {
            if self.settle(level) {
                self.questions.remove(&level);
                if level == self.tree.root() {
                    self.watch.chosen(self.now);
                }
            }
        }
    }

    /// Whether a question is settled, and what was to be done is done.
    fn settle(&mut self, level: NodeId) -> bool {
        let question = &self.questions[&level];
        let (decision, said) = (question.decision, self.now >= question.asked + question.after && !question.refused);
        let Some(client) = self.client.clone() else {
            self.decide(level);
            return true;
        };
        if said && client.answer == Answers::Leaves {
            // Nobody is there any more who would answer.
            self.client = None;
            self.decide(level);
            return true;
        }
        let answer = match client.answer {
            _ if !said => None,
            Answers::Leaves => None,
            Answers::Takes(name) => self.vms.iter().find(|vm| vm.setup.name == name).map(|vm| {
                let action = attributes(vm, &self.tree).map_or(Action::Kill, |attributes| attributes.action);
                Answer::Act(vm.node, action)
            }),
            Answers::Frees(pages) => {
                self.freed += pages;
                Some(Answer::Raised)
            }
            Answers::Ignores => Some(Answer::Ignore),
        };
        let told = |node: NodeId| attributes(&self.vms[*self.owners.get(&node)?], &self.tree);
        let ranked = oom::rank(&oom::candidates(&self.tree, level, told));
        let came = match decision.resolve(answer, &ranked, self.now) {
            Ok(Resolved::Open) => return false,
            Ok(Resolved::Retry | Resolved::Leave) => Came::Spared,
            Ok(Resolved::Chosen(entry)) => {
                came(&self.victims.decide(&self.tree, level, &[entry], self.now), &self.owners)
            }
            Ok(Resolved::BuiltIn) => came(&self.victims.decide(&self.tree, level, &ranked, self.now), &self.owners),
            Err(why) => {
                let why = why.to_string();
                self.tell(What::Refused { why });
                self.questions.entry(level).and_modify(|question| question.refused = true);
                return false;
            }
        };
        self.finish(level, came);
        true
    }

    /// Decides about a level by the rules. Says whether that was done.
    fn decide(&mut self, level: NodeId) -> bool {
        let told = |node: NodeId| attributes(&self.vms[*self.owners.get(&node)?], &self.tree);
        let ranked = oom::rank(&oom::candidates(&self.tree, level, told));
        let came = came(&self.victims.decide(&self.tree, level, &ranked, self.now), &self.owners);
        self.finish(level, came)
    }

    /// Does what was decided about a level. Says whether it could be done.
    fn finish(&mut self, level: NodeId, came: Came) -> bool {
        let path = self.tree.path(level);
        match came {
            Came::Waits => return false,
            Came::Goes(at, action, why) => return self.act(at, level, action, why),
            Came::Nobody(why) => self.tell(What::Nobody { level: path, why }),
            Came::Spared => {
                self.put_off(level);
                self.tell(What::Spared { level: path });
            }
        }
        true
    }

    /// Whoever is held at a level is not asked about before some time.
    fn put_off(&mut self, level: NodeId) {
        let until = self.now + self.watch.terms().cool_down;
        for vm in self.vms.iter_mut().filter(|vm| vm.refused.is_some_and(|refused| refused.level == level)) {
            vm.asked_until = until;
        }
    }

    /// Does what was chosen. False when it cannot be done.
    fn act(&mut self, at: usize, level: NodeId, action: Action, why: String) -> bool {
        let killed = action == Action::Kill;
        let vm = &mut self.vms[at];
        if !killed && vm.setup.deaf {
            self.victims.failed(vm.node);
            return false;
        }
        let name = vm.setup.name.clone();
        if killed {
            (vm.state, vm.killed) = (State::Ending, true);
            self.sums.kills += 1;
        } else {
            vm.state = State::Paused { level, emptied: level != vm.node };
            self.sums.pauses += 1;
        }
        vm.refused = None;
        vm.paused_at = self.now;
        let node = vm.node;
        if level != node {
            self.chosen.extend(self.tree.ancestry(node).map(|at| (at, self.now)));
        }
        self.tree.record(level, Event::Oom);
        self.tree.record(node, if killed { Event::OomKill } else { Event::OomPause });
        self.tell(What::Chosen { level: self.tree.path(level), vm: name, killed, why });
        true
    }

    /// Has somebody chosen where a VM is held for too long.
    pub(super) fn hold(&mut self) {
        for at in 0..self.vms.len() {
            let vm = &mut self.vms[at];
            let held = vm.refused.filter(|_| vm.state == State::Runs);
            if held.is_some() || !vm.account.held(self.now).is_zero() {
                vm.account.look(self.now, held.is_some(), vm.granted);
            }
            let Some(level) = held.and_then(|refused| oom::level(Mode::Wait, &refused)) else { continue };
            if self.now < vm.asked_until {
                continue;
            }
            let helps = self.climbs.get(&level).is_some_and(|climb| climb.rung() == Rung::Evict);
            if vm.account.verdict(vm.owes, vm.setup.deadline, helps) == Verdict::Act {
                let done = if level == vm.node { self.choose_itself(at) } else { self.choose(level) };
                let wait = if done { self.watch.terms().cool_down } else { AGAIN };
                self.vms[at].asked_until = self.now + wait;
            }
        }
    }

    /// Who was paused goes on when there is room for what it had; one after the other.
    pub(super) fn resume(&mut self) {
        let root = self.tree.root();
        let cool_down = self.watch.terms().cool_down;
        let may = |vm: &Guest| {
            let State::Paused { level, emptied } = vm.state else { return false };
            let room = self.tree.margin(vm.node).unwrap_or(Pages(u64::MAX));
            let back = if emptied { vm.comes_back() } else { vm.owes };
            let fits = room >= back + STEP;
            if level == root {
                fits && self.watch.may_resume(self.now) && self.watch.missing_for(back).is_zero()
            } else {
                fits && self.verdict.short.is_none() && self.now >= vm.paused_at + cool_down
            }
        };
        let Some(at) = self.vms.iter().position(may) else { return };
        let vm = &mut self.vms[at];
        if matches!(vm.state, State::Paused { level, .. } if level == root) {
            self.watch.resumed(self.now);
        }
        vm.state = State::Runs;
        self.victims.forget(vm.node);
        let vm = vm.setup.name.clone();
        self.tell(What::Resumed { vm });
    }
}

/// What a choice comes to, without what it is about.
fn came(choice: &Choice<'_>, owners: &BTreeMap<NodeId, usize>) -> Came {
    match choice {
        Choice::Wait(_) => Came::Waits,
        Choice::Nobody(why) => Came::Nobody(why.to_string()),
        Choice::Act(entry) => {
            let candidate = &entry.candidate;
            Came::Goes(owners[&candidate.id], candidate.attributes.action, entry.to_string())
        }
    }
}

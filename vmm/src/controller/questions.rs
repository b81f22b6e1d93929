//! Who decides: a client, or a command, may be asked before the policy chooses somebody for a group or for the host.
//!
//! ```text
//!  somebody has to go ─► nobody to ask ────────────────────────────────► the policy chooses
//!        │
//!        └► question, event decision_pending ─┬─ a good answer in time ─► what it says
//!                                             ├─ none, or nonsense ─────► the policy, when the time is over
//!                                             └─ whoever was asked gone ─► the policy, at once
//! ```
//!
//! The one who is asked is the client that has registered (`PUT /oom/policy`), as long as its connection is open; else the command
//! of `serve --oom-hook`. There is one question at a time in a subtree, and it has a deadline. Nothing waits for it but whoever
//! is held anyway: an answer is an input like any other, and when the deadline is over the policy chooses as if nobody had been
//! asked. An answer counts only as long as memory is still missing: what was asked a second ago may be settled.
//!
//! A client is not bound by preference, priority or protection; but by the list: whoever is not in it is not below the limit.

pub mod command;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use memcg_core::oom::{self, Answer, Choice, Decision, Resolved};
use memcg_core::tree::NodeId;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use utoipa::ToSchema;

use super::Controller;
use super::actor::{Actor, Input, Request, answer};
use super::changes::Target;
use super::error::{Code, Refusal};
use super::events::{self, EventKind};
use super::host;
use super::oom_log::{DecidedBy, How, Reason};
use super::rank::RankedView;
use super::victim::SHOWN;
use super::view::OomAction;
use super::vm::Reply;

/// How long somebody may be given to answer.
pub const WAITS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(60)];

/// Entries of the list that a question has, at most.
const RANKED: usize = 100;

/// Questions that may wait for a client that does not read.
const QUEUE: usize = 16;

/// Characters of a refusal that are kept.
const SAID: usize = 300;

/// A question whose deadline has passed for so long is of the past: nobody has to be chosen any more.
const STALE: Duration = Duration::from_secs(2);

/// A question: a level has no memory left, who is to go?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct QuestionView {
    /// Its number: the answer goes to `/oom/decisions/{id}`.
    pub id: u64,
    /// Path of the group that has no room; `/` is the host.
    pub level: String,
    /// Why somebody has to go.
    pub reason: Reason,
    /// What it has been charged.
    pub usage_bytes: u64,
    /// Its limit, `null` for none.
    pub max_bytes: Option<u64>,
    /// How long an answer is waited for, in milliseconds.
    pub wait_ms: u64,
    /// When that is over, in milliseconds since 1970. Then the policy chooses the first of the list that is not spared.
    pub deadline_ms: u64,
    /// The first hundred of the VMs in it, in the order in which the policy would choose them.
    pub ranked: Vec<RankedView>,
    /// How many more there are.
    pub not_shown: usize,
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AnswerWord {
    /// This VM ends.
    Kill,
    /// This VM is paused and emptied.
    Pause,
    /// There is more memory: nobody goes, and whoever waits tries again.
    Raise,
    /// Nobody goes, and whoever is held stays so. Asked again after ten seconds, if need be.
    Ignore,
}

/// The answer to a question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DecisionAnswer {
    /// What is to be done.
    pub answer: AnswerWord,
    /// With which VM; for `kill` and `pause`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vm: Option<String>,
}

/// A client that decides.
#[derive(Debug)]
struct Client {
    number: u64,
    wait: Duration,
    questions: mpsc::Sender<QuestionView>,
}

/// A command that decides.
#[derive(Clone, Debug)]
pub struct Hook {
    /// The program; it is given no arguments.
    pub program: PathBuf,
    /// How long it may take.
    pub wait: Duration,
    /// Where this controller listens, for a program that asks it something.
    pub socket: PathBuf,
}

#[derive(Debug)]
struct Question {
    id: u64,
    decision: Decision,
    wait: Duration,
    deadline: Instant,
    by: DecidedBy,
    reason: Reason,
    /// Why the last answer was none.
    refused: Option<String>,
    /// The command that works at it, which ends with it.
    command: Option<AbortHandle>,
}

impl Question {
    /// What came of it when the policy decided after all.
    fn in_vain(&self) -> String {
        let why = match &self.refused {
            Some(why) => why.chars().filter(|c| !c.is_control()).take(SAID).collect(),
            None => format!("no answer within {} ms", self.wait.as_millis()),
        };
        format!("the {} was asked in vain: {why}", self.by.word())
    }
}

impl Drop for Question {
    fn drop(&mut self) {
        if let Some(command) = &self.command {
            command.abort();
        }
    }
}

/// Who is asked, and what is asked now.
#[derive(Debug, Default)]
pub struct Questions {
    last: u64,
    clients: u64,
    client: Option<Client>,
    hook: Option<Hook>,
    open: BTreeMap<NodeId, Question>,
    /// While the policy decides about a level: what came of asking somebody else first.
    pub in_vain: Option<String>,
}

impl Actor {
    /// Asks whoever may decide about a level, if somebody may and has not been asked. Until when nothing is to be done, if so.
    pub fn ask_first(&mut self, level: NodeId, reason: Reason) -> Option<Instant> {
        let now = Instant::now();
        let tree = &self.tree;
        self.questions.open.retain(|at, question| tree.contains(*at) && now < question.deadline + host::scaled(STALE));
        if self.questions.open.get(&level).is_some_and(|question| question.deadline <= now) {
            let why = self.questions.open.remove(&level).expect("seen").in_vain();
            tracing::warn!("{why}: the policy decides");
            self.questions.in_vain = Some(why);
            return None;
        }
        let concerns = |at: &NodeId| tree.is_within(*at, level) || tree.is_within(level, *at);
        if let Some((_, question)) = self.questions.open.iter().find(|(at, _)| concerns(at)) {
            return Some(question.deadline.max(now + WAITS[0]));
        }
        if self.questions.client.is_none() && self.questions.hook.is_none() {
            return None;
        }
        let ranked = oom::rank(&self.candidates(level));
        let choice = self.victims.clone().decide(&self.tree, level, &ranked, self.elapsed());
        if ranked.is_empty() || matches!(choice, Choice::Wait(_)) {
            return None;
        }
        self.put(level, reason, now)
    }

    /// Puts a question. `None` when nobody takes it.
    fn put(&mut self, level: NodeId, reason: Reason, now: Instant) -> Option<Instant> {
        self.questions.last += 1;
        let id = self.questions.last;
        let client = self.questions.client.take().and_then(|client| {
            let taken = client.questions.try_send(self.question(id, (level, reason), client.wait)).is_ok();
            // One that does not read decides nothing.
            taken.then_some(client)
        });
        let (by, wait, command) = match (&client, self.questions.hook.clone()) {
            (Some(client), _) => (DecidedBy::Client, client.wait, None),
            (None, Some(hook)) => {
                let (view, inbox, wait) =
                    (self.question(id, (level, reason), hook.wait), self.inbox.clone(), hook.wait);
                let task = tokio::spawn(async move {
                    let said = hook.ask(&view).await;
                    let heard: Request = Box::new(move |actor| actor.hook_said(id, said));
                    if let Some(inbox) = inbox.upgrade() {
                        // An actor that is gone needs no answer.
                        let _ = inbox.send(Input::Request(heard)).await;
                    }
                });
                (DecidedBy::Hook, wait, Some(task.abort_handle()))
            }
            (None, None) => return None,
        };
        self.questions.client = client;
        let decision = Decision::new(level, self.elapsed(), wait);
        let deadline = now + wait;
        let ranked = oom::rank(&self.candidates(level));
        let ranked: Vec<_> = ranked.iter().take(SHOWN).map(ToString::to_string).collect();
        self.questions
            .open
            .insert(level, Question { id, decision, wait, deadline, by, reason, refused: None, command });
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let details = json!({
            "id": id, "asked": by.word(), "reason": reason.word(), "wait_ms": wait_ms, "ranked": ranked,
        });
        self.target_event(EventKind::DecisionPending, Target::Group(level), details);
        Some(deadline)
    }

    fn question(&self, id: u64, (level, reason): (NodeId, Reason), wait: Duration) -> QuestionView {
        let (candidates, owners) = (self.candidates(level), self.owners());
        let ranked = oom::rank(&candidates);
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        QuestionView {
            id,
            level: self.tree.path(level),
            reason,
            usage_bytes: self.tree.usage(level).bytes(),
            max_bytes: self.tree.limits(level).max.as_bytes(),
            wait_ms,
            deadline_ms: events::unix_ms().saturating_add(wait_ms),
            ranked: ranked
                .iter()
                .enumerate()
                .take(RANKED)
                .map(|(at, entry)| self.ranked_view(&owners, at, entry))
                .collect(),
            not_shown: ranked.len().saturating_sub(RANKED),
        }
    }

    /// Registers a client, which is asked from now on until nobody takes the questions any more.
    fn register(&mut self, wait: Duration) -> Result<mpsc::Receiver<QuestionView>, Refusal> {
        if self.questions.client.as_ref().is_some_and(|client| !client.questions.is_closed()) {
            let message = "another client decides already: it has to close its connection first";
            return Err(Refusal::new(Code::WrongState, message));
        }
        let (questions, taken) = mpsc::channel(QUEUE);
        self.questions.clients += 1;
        let number = self.questions.clients;
        let (sender, inbox) = (questions.clone(), self.inbox.clone());
        tokio::spawn(async move {
            sender.closed().await;
            let gone: Request = Box::new(move |actor| actor.client_gone(number));
            if let Some(inbox) = inbox.upgrade() {
                // An actor that is gone has no questions.
                let _ = inbox.send(Input::Request(gone)).await;
            }
        });
        self.questions.client = Some(Client { number, wait, questions });
        Ok(taken)
    }

    /// The client's connection has ended: what it was asked the policy decides at once.
    fn client_gone(&mut self, number: u64) {
        if self.questions.client.as_ref().is_some_and(|client| client.number != number) {
            return;
        }
        self.questions.client = None;
        let asked = self.questions.open.iter().filter(|(_, question)| question.by == DecidedBy::Client);
        for level in asked.map(|(level, _)| *level).collect::<Vec<_>>() {
            self.refuse(level, "it has gone".to_owned());
            self.hurry(level);
        }
    }

    /// What the command said about question `id`.
    fn hook_said(&mut self, id: u64, said: Result<DecisionAnswer, String>) {
        let Some(level) = self.level_of(id) else { return };
        let done =
            said.and_then(|said| self.answered_by(id, &said, DecidedBy::Hook).map_err(|refusal| refusal.message));
        if let Err(why) = done {
            self.refuse(level, why);
            self.hurry(level);
        }
    }

    /// Notes why an answer about a level was none, while there is time for another.
    fn refuse(&mut self, level: NodeId, why: String) {
        let now = Instant::now();
        if let Some(question) = self.questions.open.get_mut(&level).filter(|question| now < question.deadline) {
            question.refused = Some(why);
        }
    }

    /// The level that question `id` is about.
    fn level_of(&self, id: u64) -> Option<NodeId> {
        self.questions.open.iter().find(|(_, question)| question.id == id).map(|(level, _)| *level)
    }

    /// No answer to what was asked about a level will come: the policy chooses now.
    fn hurry(&mut self, level: NodeId) {
        let now = Instant::now();
        if let Some(question) = self.questions.open.get_mut(&level) {
            question.deadline = now;
        }
        if !self.tree.contains(level) {
            return;
        }
        for id in self.vms_of(Target::Group(level)) {
            let here = self.held_at(id, level);
            let hold = self.vms.get_mut(&id).and_then(|vm| vm.hold.as_mut());
            if let Some(hold) = hold.filter(|hold| here && hold.recalled && !hold.acted) {
                hold.deadline = now;
            }
        }
        if level == self.root
            && let Some(shortage) = &mut self.shortage
        {
            shortage.look_at(now);
        }
    }

    /// Whether somebody still has to go because of a level.
    fn is_missed(&self, level: NodeId) -> bool {
        let on_host = level == self.root && self.shortage.as_ref().is_some_and(|shortage| shortage.is_critical());
        on_host
            || self.thrashing.is_seen(level)
            || self.vms_of(Target::Group(level)).into_iter().any(|id| self.held_at(id, level))
    }

    /// Does what somebody has answered, or keeps why not.
    fn answered_by(&mut self, id: u64, said: &DecisionAnswer, by: DecidedBy) -> Result<(), Refusal> {
        let done = self.do_as_answered(id, said, by);
        if let (Err(refusal), Some(level)) = (&done, self.level_of(id)) {
            self.refuse(level, refusal.message.clone());
        }
        done
    }

    fn do_as_answered(&mut self, id: u64, said: &DecisionAnswer, by: DecidedBy) -> Result<(), Refusal> {
        let wrong = |code, message: String| Err(Refusal::new(code, message));
        let level = self
            .level_of(id)
            .filter(|level| self.tree.contains(*level) && self.questions.open[level].deadline > Instant::now());
        let Some(level) = level else {
            let message = format!("no question {id} is open: it has been answered, its time is over, or it never was");
            return wrong(Code::NotFound, message);
        };
        let (vm, action) = match (said.answer, &said.vm) {
            (AnswerWord::Kill, Some(vm)) => (Some(self.find_alive(vm)?), OomAction::Kill),
            (AnswerWord::Pause, Some(vm)) => (Some(self.find_alive(vm)?), OomAction::Pause),
            (AnswerWord::Kill | AnswerWord::Pause, None) => {
                return wrong(Code::BadRequest, "kill and pause need the name of a VM in `vm`".to_owned());
            }
            (AnswerWord::Raise | AnswerWord::Ignore, Some(_)) => {
                return wrong(Code::BadRequest, "raise and ignore are about no VM: leave `vm` out".to_owned());
            }
            (AnswerWord::Raise | AnswerWord::Ignore, None) => (None, OomAction::Kill),
        };
        if !self.is_missed(level) {
            self.questions.open.remove(&level);
            let message = format!("{} has memory again: nobody has to go any more", self.tree.path(level));
            return wrong(Code::WrongState, message);
        }
        let answer = match (vm, said.answer) {
            (Some(vm), _) => Answer::Act(self.vms[&vm].node, self.effect(vm, action)),
            (None, AnswerWord::Raise) => Answer::Raised,
            (None, _) => Answer::Ignore,
        };
        let (mut victims, now) = (self.victims.clone(), self.elapsed());
        let ranked = oom::rank(&self.candidates(level));
        let chosen = match self.questions.open[&level].decision.resolve(Some(answer), &ranked, now) {
            Err(error) => return wrong(Code::WrongState, error.to_string()),
            Ok(Resolved::Chosen(entry)) => match victims.decide(&self.tree, level, &[entry], now) {
                Choice::Act(entry) => Some((entry.candidate.id, entry.frees, entry.to_string())),
                Choice::Wait(_) => {
                    let message = "the memory of another one is on its way: wait for that first";
                    return wrong(Code::WrongState, message.to_owned());
                }
                Choice::Nobody(why) => return wrong(Code::WrongState, why.to_string()),
            },
            // At its deadline it is closed above.
            Ok(Resolved::Retry | Resolved::Leave | Resolved::Open | Resolved::BuiltIn) => None,
        };
        let reason = self.questions.open[&level].reason;
        let list: Vec<_> = ranked.iter().take(SHOWN).map(ToString::to_string).collect();
        let Some(((node, frees, why), vm)) = chosen.zip(vm) else {
            self.choices.rest(level);
            self.roomier = true;
            let said = if said.answer == AnswerWord::Raise { "there is more memory" } else { "nobody is to go" };
            self.tell_nobody(level, reason, by, format!("the {} says that {said}", by.word()), list);
            self.questions.open.remove(&level);
            return Ok(());
        };
        let details = json!({ "why": why, "ranked": list, "frees_bytes": frees.bytes(), "question": id });
        if !self.carry_out(vm, level, How { action, by, reason }, details) {
            let message = format!("the worker of the VM {:?} does not listen: choose another", self.vms[&vm].name);
            return wrong(Code::Busy, message);
        }
        self.victims = victims;
        self.choices.chosen(self.tree.ancestry(node));
        self.questions.open.remove(&level);
        Ok(())
    }
}

impl Controller {
    /// Has a client asked before the policy chooses somebody: for `wait` each time, as long as it takes the questions.
    ///
    /// # Errors
    /// When another client is asked.
    pub async fn decide(&self, wait: Duration) -> Result<mpsc::Receiver<QuestionView>, Refusal> {
        self.ask(move |actor, reply| answer(reply, actor.register(wait))).await
    }

    /// Answers a question.
    ///
    /// # Errors
    /// When it is not open, or the answer does not fit. It stays open in the latter case.
    pub async fn answer_question(&self, id: u64, said: DecisionAnswer) -> Result<(), Refusal> {
        self.ask(move |actor, reply: Reply<()>| answer(reply, actor.answered_by(id, &said, DecidedBy::Client))).await
    }

    /// Has a command asked where no client is.
    ///
    /// # Errors
    /// When the controller is going away.
    pub async fn ask_hook(&self, hook: Hook) -> Result<(), Refusal> {
        self.ask(move |actor, reply| {
            actor.questions.hook = Some(hook);
            answer(reply, Ok(()));
        })
        .await
    }
}

impl Hook {
    /// Runs the command with a question at its standard input, and takes its first line for the answer.
    ///
    /// # Errors
    /// A sentence: it cannot be run, takes too long, fails, or says something else.
    async fn ask(&self, question: &QuestionView) -> Result<DecisionAnswer, String> {
        let mut command = Command::new(&self.program);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("BALLAST_SOCKET", &self.socket).current_dir("/");
        command::ask(command, question, self.wait).await
    }
}

#[cfg(test)]
mod tests;

//! A client decides, if it does so in time.

use std::time::Duration;

use super::{Action, Ranked};
use crate::tree::NodeId;

/// A question to clients that is open: `level` has no room, who shall go? Asked before [`super::Victims::decide`], when
/// nobody's end is under way there. At the deadline the built-in policy decides, so a silent client holds nobody up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    level: NodeId,
    deadline: Duration,
}

/// What a client may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This VM, and what to do with it. Preference, priority and protection do not bind a client.
    Act(NodeId, Action),
    /// There is more memory: a limit was raised, or something was freed.
    Raised,
    /// Leave it as it is: the vCPUs that wait stay held.
    Ignore,
}

/// Why an answer was refused. The question stays open.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecisionError {
    /// Not a VM of the subtree that has no room.
    #[error("that VM is not below the limit that was met: nothing would be gained, choose one of the list")]
    NotACandidate,
    /// It would not help.
    #[error("{0:?} would free nothing, or is ending already: choose another")]
    Useless(String),
}

/// How a question stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolved<'a> {
    /// Open until the deadline.
    Open,
    /// The client has chosen: give this entry to [`super::Victims::decide`].
    Chosen(Ranked<'a>),
    /// Retry the charge; nobody goes.
    Retry,
    /// Nobody goes, the vCPUs stay held. A later refusal is a new question.
    Leave,
    /// Nobody has answered in time: give the whole list to [`super::Victims::decide`].
    BuiltIn,
}

impl Decision {
    /// A question about `level`, to be answered within `wait`.
    pub fn new(level: NodeId, now: Duration, wait: Duration) -> Decision {
        Decision { level, deadline: now.saturating_add(wait) }
    }

    /// The level that has no room.
    pub fn level(&self) -> NodeId {
        self.level
    }

    /// When the built-in policy decides.
    pub fn deadline(&self) -> Duration {
        self.deadline
    }

    /// How the question stands at `now`, with an answer or without. `ranked` is the list for the level at this moment.
    /// At the deadline an answer is too late.
    ///
    /// # Errors
    /// [`DecisionError`]: the answer cannot be followed, and another one may be given until the deadline.
    pub fn resolve<'a>(
        &self,
        answer: Option<Answer>,
        ranked: &[Ranked<'a>],
        now: Duration,
    ) -> Result<Resolved<'a>, DecisionError> {
        if now >= self.deadline {
            return Ok(Resolved::BuiltIn);
        }
        Ok(match answer {
            None => Resolved::Open,
            Some(Answer::Raised) => Resolved::Retry,
            Some(Answer::Ignore) => Resolved::Leave,
            Some(Answer::Act(id, action)) => {
                let entry = ranked.iter().find(|entry| entry.candidate.id == id);
                let chosen = entry.ok_or(DecisionError::NotACandidate)?.chosen(action);
                if chosen.candidate.attributes.ending || chosen.frees.is_zero() {
                    return Err(DecisionError::Useless(chosen.candidate.name.to_owned()));
                }
                Resolved::Chosen(chosen)
            }
        })
    }
}

//! Refusals: what the interface answers when it does not do what it was asked for.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request makes no sense; the message says where.
    BadRequest,
    /// A limit contradicts another one.
    InvalidLimit,
    /// The client is neither the user of the controller nor root.
    Forbidden,
    /// There is no such VM or path.
    NotFound,
    /// The path has no such method.
    MethodNotAllowed,
    /// The body did not come in time.
    BodyTimeout,
    /// The body is larger than any sensible one.
    TooLarge,
    /// The limits have changed since the generation that was named.
    GenerationMismatch,
    /// Usage is above the limit and `mode=refuse` was asked for.
    LimitBelowUsage,
    /// Memory was not given back in time; the old limit is in force.
    LimitNotReached,
    /// A later request took this one's place.
    Superseded,
    /// There is no room for what the VM costs beside its pages.
    OverheadRefused,
    /// The members of a group would be promised more than its limit.
    DoesNotFit,
    /// A group that is named does not exist.
    NoSuchGroup,
    /// The group has VMs or groups in it.
    NotEmpty,
    /// The VM runs without accounting, and that cannot begin.
    NotAccounted,
    /// The VM's state does not allow it.
    WrongState,
    /// The VM cannot go on because its memory does not fit.
    ResumeRefused,
    /// A VM of this name exists.
    AlreadyExists,
    /// The VM could not be started, or ended before its guest ran.
    StartFailed,
    /// The controller could not remember it, so it was not done.
    CannotRemember,
    /// The worker does not answer, or there are too many connections.
    Busy,
    /// The controller is going away.
    Stopping,
}

impl Code {
    /// The HTTP status that goes with it.
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest | Self::InvalidLimit => 400,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::BodyTimeout => 408,
            Self::TooLarge => 413,
            Self::GenerationMismatch
            | Self::LimitBelowUsage
            | Self::LimitNotReached
            | Self::Superseded
            | Self::OverheadRefused
            | Self::DoesNotFit
            | Self::NoSuchGroup
            | Self::NotEmpty
            | Self::NotAccounted
            | Self::WrongState
            | Self::ResumeRefused
            | Self::AlreadyExists
            | Self::StartFailed => 409,
            Self::Busy | Self::Stopping => 503,
            Self::CannotRemember => 507,
        }
    }

    /// What it means and what to do, for the reference: a sentence or two without a full stop at the end.
    pub fn advice(self) -> &'static str {
        match self {
            Self::BadRequest => "the request makes no sense: correct what `message` names",
            Self::InvalidLimit => {
                "a limit contradicts another one, is no multiple of 4096, or is out of range: correct it"
            }
            Self::Forbidden => "another user's controller: ask as the user who started it, or as root",
            Self::NotFound => "nothing of this name or path is here: `GET /vms` has those that are",
            Self::MethodNotAllowed => {
                "the path has no such method, or `ballast run` is asked for what only `serve` does"
            }
            Self::BodyTimeout => "the body did not come in time: send it at once, and as much as `content-length` says",
            Self::TooLarge => "the body is larger than 64 KiB: no request needs that",
            Self::GenerationMismatch => {
                "somebody changed the limits since that `generation`: read them again, and ask again with the present one"
            }
            Self::LimitBelowUsage => {
                "`usage_bytes` are in use and `mode=refuse` was asked for: ask for more, or with `mode=reclaim`"
            }
            Self::LimitNotReached => {
                "the guest did not give back enough in time, the old limit holds: ask for more than `usage_bytes`, give it \
                 longer (`wait_ms`) unless `message` says that nothing more can be had, or use `mode=force`"
            }
            Self::Superseded => "a later request took this one's place: nothing to do, unless yours was the right one",
            Self::OverheadRefused => {
                "no room for what the VM costs beside its pages: raise the limit that `message` names, or end another VM"
            }
            Self::NotAccounted => {
                "the VM runs without accounting and that cannot begin: `message` says what is missing"
            }
            Self::DoesNotFit => {
                "the members of a group would be promised more than its limit: raise the limit that `message` names, or \
                 promise less (`min_bytes`, overhead)"
            }
            Self::NoSuchGroup => "a group that is named is not here: make it first with `PUT /groups/{path}`",
            Self::NotEmpty => "the group has VMs or groups in it: remove or move those first",
            Self::WrongState => "the VM has ended, is starting, or is otherwise not as it must be: look at its `state`",
            Self::ResumeRefused => {
                "the memory that the VM needs does not fit: raise `max_bytes` of the VM or group whose limit is in its way, then resume"
            }
            Self::AlreadyExists => {
                "another VM or group of this name is here: choose another name, or `DELETE` that one first"
            }
            Self::StartFailed => "the VM could not be started: `message` has what its worker said",
            Self::CannotRemember => {
                "the controller's journal cannot be written, so nothing was done: make room where its state directory is"
            }
            Self::Busy => {
                "a worker does not answer, or there are too many connections: try again; if it stays so, kill the VM"
            }
            Self::Stopping => "the controller is going away: ask again when it is back",
        }
    }
}

/// A refusal, also the body of every HTTP answer from 400 upwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Why, for programs.
    pub code: Code,
    /// Why and what to do, for people: one sentence without a full stop.
    pub message: String,
    /// Usage of the VM at that moment, where it matters.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub usage_bytes: Option<u64>,
    /// Generation of the VM's limits, where it matters.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub generation: Option<u64>,
    /// What is missing, where something does not fit.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub missing_bytes: Option<u64>,
}

impl Refusal {
    /// A refusal without numbers.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), usage_bytes: None, generation: None, missing_bytes: None }
    }

    /// The same with the VM's usage in bytes.
    #[must_use]
    pub fn usage(mut self, bytes: u64) -> Self {
        self.usage_bytes = Some(bytes);
        self
    }

    /// The same with what is missing in bytes.
    #[must_use]
    pub fn missing(mut self, bytes: u64) -> Self {
        self.missing_bytes = Some(bytes);
        self
    }

    /// The same with the generation of the VM's limits.
    #[must_use]
    pub fn generation(mut self, generation: u64) -> Self {
        self.generation = Some(generation);
        self
    }
}

//! What happened, in order: a ring of events with sequence numbers, for replay and for following.
//!
//! The ring is bounded. A reader that comes late is told how many events it has missed rather than being given a
//! story with holes.
//!
//! The ring dies with its controller, and the numbers must not begin again with the next one: whoever follows would wait
//! with an old number for what has long happened. So each life has numbers of its own, above those of all lives before it
//! ([`LIFE`]), and its first event says that it has begun.

use std::collections::{BTreeMap, VecDeque};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// Events kept for replay.
pub const RING: usize = 1024;

/// Numbers of events that each life of a controller has. The second begins with 10 000 000 001: people see which life it
/// is, no life uses them up, and those of 900 000 lives are still exact in a double.
pub const LIFE: u64 = 10_000_000_000;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A VM was made: its worker runs, its guest does not yet. Or a group was made.
    Created,
    /// The guest runs.
    Started,
    /// The VM was taken over from a controller that is gone; the numbers are what its worker holds.
    Adopted,
    /// The worker of a VM runs and cannot be taken over: it is left alone.
    NotAdopted,
    /// The guest has ended by itself.
    Stopped,
    /// What the VM uses is charged from now on: it was started without a limit and has got its first.
    AccountingBegan,
    /// A change of a limit was asked for that has to wait for memory to be given back.
    LimitRequested,
    /// A limit is in force.
    LimitChanged,
    /// Memory was not given back in time; the old limit is still in force.
    LimitNotReached,
    /// Usage has risen above a `high` that was set. The one that `max` implies is only counted.
    HighCrossed,
    /// Usage is above what it should be, and something else is done about it from now on: `rung` says what. The same rung of
    /// one VM or group is told once a minute.
    Reclaim,
    /// Usage has come down to where it should be, so much of it by balloon, reports and eviction.
    Reclaimed,
    /// The VM's cold pages are evicted; told once a minute.
    Evicted,
    /// A charge was refused at `max` and the VM is held; the same limit is told of once a minute.
    MaxHit,
    /// The guest gives nothing of what its balloon is asked for: it is told that what it has given is enough, and asked
    /// again later.
    TargetStalled,
    /// It has stalled again, without having given anything worth mentioning in between.
    Uncooperative,
    /// The guest was out of memory and has taken pages back from its balloon.
    GuestDeflatedOnOom,
    /// The guest has claimed something that was refused, or made its balloon work more than anybody had asked for; told the
    /// first time, and when that has happened twice as often.
    GuestMisbehaves,
    /// The VM was paused.
    Paused,
    /// The VM goes on.
    Resumed,
    /// The VM cannot go on: its memory does not fit.
    ResumeRefused,
    /// The host runs short of memory: `sign` says by what that is seen. Its VMs are asked for memory.
    PressureEntered,
    /// The host has had enough memory for some time.
    PressureLeft,
    /// The host had no memory for a page that was charged: the VM is paused, and nothing of it is lost.
    HostOutOfMemory,
    /// The VM's swap file cannot be written, as on a full disk: what was to go there stays in memory. Told the first time, and when
    /// that has happened twice as often.
    SwapFailed,
    /// Somebody has to go: `asked`, a client or a command, may say who within `wait_ms`.
    DecisionPending,
    /// This VM was chosen to be paused or killed; `by` says who has decided that.
    VictimSelected,
    /// A group, or the host, has no memory left and nobody may be chosen; `why` says how many are spared for which reason. The same is
    /// told once a minute.
    NobodyChosen,
    /// The VM was killed.
    Killed,
    /// The worker ended without being asked to, or was ended because it lied.
    WorkerDied,
    /// A VM that has ended was removed: nothing shows it any more. Or a group was removed.
    Removed,
    /// A VM or a group is in another group, with everything charged to it.
    Moved,
    /// A controller has begun after another one, which is gone with its events; `life` is its number.
    Restarted,
    /// Events before this one are no longer known; the number is in `dropped`.
    Dropped,
}

impl EventKind {
    /// All of them.
    pub const ALL: [Self; 34] = [
        Self::Created,
        Self::Started,
        Self::Adopted,
        Self::NotAdopted,
        Self::Stopped,
        Self::AccountingBegan,
        Self::LimitRequested,
        Self::LimitChanged,
        Self::LimitNotReached,
        Self::HighCrossed,
        Self::Reclaim,
        Self::Reclaimed,
        Self::Evicted,
        Self::MaxHit,
        Self::TargetStalled,
        Self::Uncooperative,
        Self::GuestDeflatedOnOom,
        Self::GuestMisbehaves,
        Self::Paused,
        Self::Resumed,
        Self::ResumeRefused,
        Self::PressureEntered,
        Self::PressureLeft,
        Self::HostOutOfMemory,
        Self::SwapFailed,
        Self::DecisionPending,
        Self::VictimSelected,
        Self::NobodyChosen,
        Self::Killed,
        Self::WorkerDied,
        Self::Removed,
        Self::Moved,
        Self::Restarted,
        Self::Dropped,
    ];
}

/// One event. The numbers that explain it are in further keys, their units in the names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Sequence number, without gaps: from 1, after a restart of the controller from 10 000 000 001, and so on.
    pub seq: u64,
    /// Wall-clock time in milliseconds since 1970.
    pub time_ms: u64,
    /// What happened.
    pub event: EventKind,
    /// The VM it happened to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub vm: Option<String>,
    /// The group it happened to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub group: Option<String>,
    /// The numbers that explain it, with their units in the names.
    #[serde(flatten)]
    #[schema(value_type = Object)]
    pub details: Map<String, Value>,
}

/// The details of an event, and more of them: both JSON objects.
pub fn merged(mut details: Value, more: Value) -> Value {
    if let (Some(map), Value::Object(more)) = (details.as_object_mut(), more) {
        map.extend(more);
    }
    details
}

/// What an event happened to.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// Neither of the following.
    Host,
    /// The VM of this name.
    Vm(&'a str),
    /// The group with this path.
    Group(&'a str),
}

/// The ring.
#[derive(Debug, Default)]
pub struct EventLog {
    ring: VecDeque<Event>,
    /// Number before the first of this life.
    before: u64,
    last: u64,
    counts: BTreeMap<EventKind, u64>,
}

impl EventLog {
    /// The events of a controller's life, from 1.
    pub fn of_life(life: u32) -> Self {
        let before = before(life);
        let mut log = Self { before, last: before, ..Self::default() };
        if before > 0 {
            log.push(EventKind::Restarted, Subject::Host, serde_json::json!({ "life": life }));
        }
        log
    }

    /// Adds an event and returns its sequence number. `details` must be a JSON object; anything else is left out.
    pub fn push(&mut self, event: EventKind, subject: Subject<'_>, details: Value) -> u64 {
        self.last += 1;
        *self.counts.entry(event).or_default() += 1;
        let details = if let Value::Object(map) = details { map } else { Map::new() };
        let (vm, group) = match subject {
            Subject::Host => (None, None),
            Subject::Vm(name) => (Some(name.to_owned()), None),
            Subject::Group(path) => (None, Some(path.to_owned())),
        };
        tracing::info!(seq = self.last, vm, group, ?event, ?details, "event");
        if self.ring.len() == RING {
            self.ring.pop_front();
        }
        self.ring.push_back(Event { seq: self.last, time_ms: unix_ms(), event, vm, group, details });
        self.last
    }

    /// Sequence number of the newest event; before the first of all, 0.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// How often what has happened; 0 for what never has, so that its first time is seen as a change.
    pub fn counts(&self) -> Vec<(EventKind, u64)> {
        let count = |kind| self.counts.get(kind).copied().unwrap_or_default();
        EventKind::ALL.iter().map(|kind| (*kind, count(kind))).collect()
    }

    /// The events of this life after number `since`, oldest first; led by an event `dropped` when some are no longer
    /// there. A number that is still to come is of a controller whose journal is gone: like 0, it means all.
    pub fn after(&self, since: u64) -> Vec<Event> {
        let since = if since > self.last { self.before } else { since.max(self.before) };
        let oldest = self.last + 1 - self.ring.len() as u64;
        let mut events = Vec::new();
        if since + 1 < oldest {
            let dropped = oldest - 1 - since;
            let details = Map::from_iter([("dropped".to_owned(), Value::from(dropped))]);
            let (seq, event) = (oldest - 1, EventKind::Dropped);
            events.push(Event { seq, time_ms: unix_ms(), event, vm: None, group: None, details });
        }
        let skip = usize::try_from((since + 1).saturating_sub(oldest)).unwrap_or(usize::MAX);
        events.extend(self.ring.iter().skip(skip).cloned());
        events
    }
}

/// The number before the first of a controller's life, from 1.
pub fn before(life: u32) -> u64 {
    // More lives than that, one a second for 34 years, share their numbers.
    u64::from(life.saturating_sub(1)).min(1 << 30) * LIFE
}

/// Now, in milliseconds since 1970.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn replay_starts_after_the_number_given() {
        let mut log = EventLog::default();
        assert!(log.after(0).is_empty());
        for n in 1..=5 {
            assert_eq!(log.push(EventKind::Paused, Subject::Vm("a"), json!({ "n": n })), n);
        }
        let seqs = |since| log.after(since).iter().map(|e| e.seq).collect::<Vec<_>>();
        assert_eq!(seqs(0), [1, 2, 3, 4, 5]);
        assert_eq!(seqs(3), [4, 5]);
        assert!(seqs(5).is_empty());
        assert_eq!(seqs(6), [1, 2, 3, 4, 5], "somebody else's number");
        assert_eq!(seqs(u64::MAX), [1, 2, 3, 4, 5]);
    }

    /// Whoever has followed an earlier controller hears everything of this one, and that it is another one.
    #[test]
    fn the_numbers_of_a_life_are_above_those_of_all_before_it() {
        assert!(EventLog::of_life(1).after(0).is_empty());
        let mut log = EventLog::of_life(3);
        let paused = log.push(EventKind::Paused, Subject::Vm("a"), json!({}));
        assert_eq!(paused, 2 * LIFE + 2);
        for since in [0, 7, LIFE + 1_000_000, 2 * LIFE] {
            let events = log.after(since);
            let kinds: Vec<_> = events.iter().map(|event| (event.seq, event.event)).collect();
            assert_eq!(kinds, [(2 * LIFE + 1, EventKind::Restarted), (paused, EventKind::Paused)], "{since}");
            assert_eq!(events[0].details["life"], 3);
        }
        assert_eq!(log.after(2 * LIFE + 1).len(), 1);
        for _ in 0..RING {
            log.push(EventKind::Resumed, Subject::Host, json!({}));
        }
        let dropped = &log.after(7)[0];
        assert_eq!((dropped.event, &dropped.details["dropped"]), (EventKind::Dropped, &json!(2)), "of this life");
        assert!(EventLog::of_life(u32::MAX).last() < u64::MAX - LIFE);
    }

    #[test]
    fn what_fell_out_of_the_ring_is_counted() {
        let mut log = EventLog::default();
        for _ in 0..RING + 10 {
            log.push(EventKind::Resumed, Subject::Host, json!({}));
        }
        let events = log.after(3);
        assert_eq!(events.len(), RING + 1);
        assert_eq!(events[0].event, EventKind::Dropped);
        assert_eq!(events[0].details["dropped"], 7);
        assert_eq!(events[0].seq, 10);
        assert_eq!(events[1].seq, 11);
        assert_eq!(log.after(10).len(), RING);
    }

    #[test]
    fn every_kind_is_counted_from_the_start() {
        let counts = EventLog::default().counts();
        assert!(counts.is_sorted_by_key(|(kind, _)| *kind) && counts.iter().all(|(_, count)| *count == 0));
        let schema = serde_json::to_value(<EventKind as utoipa::PartialSchema>::schema()).unwrap();
        assert_eq!(schema["enum"], serde_json::to_value(&EventKind::ALL[..]).unwrap());
    }

    #[test]
    fn an_event_is_one_flat_object() {
        let mut log = EventLog::default();
        log.push(EventKind::LimitChanged, Subject::Vm("web"), json!({ "max_bytes": 4096 }));
        let mut value = serde_json::to_value(&log.after(0)[0]).unwrap();
        value.as_object_mut().unwrap().remove("time_ms");
        assert_eq!(value, json!({ "seq": 1, "event": "limit_changed", "vm": "web", "max_bytes": 4096 }));
    }
}

//! `memory.events`: what has happened to a node, counted as in cgroup v2.
//!
//! Each event belongs to one level: the one whose limit was met, or whose subtree a victim was chosen in. It counts
//! there (`memory.events.local`), and there and at every ancestor (`memory.events`), so a reader of a group sees what
//! happened anywhere below. Everything is recorded through [`Tree::record`]; nothing resets these counts. They are
//! history: a node that moves takes its own along, and its old ancestors keep theirs.

use super::{NodeId, Tree};

/// Something that is counted at a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// It was reclaimed from although it was below its `low`.
    Low,
    /// Its memory went above its effective high limit, or that was lowered below it. The tree records this itself.
    High,
    /// A [`super::Mode::Wait`] charge was refused by its `max`, or a ceiling on the way to a lower one. The tree records
    /// this itself.
    Max,
    /// Reclaim below it did not make room for a charge in time.
    Oom,
    /// A VM below it was killed because of that.
    OomKill,
    /// A VM below it was paused because of that.
    OomPause,
}

/// How often each [`Event`] has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// [`Event::Low`].
    pub low: u64,
    /// [`Event::High`].
    pub high: u64,
    /// [`Event::Max`].
    pub max: u64,
    /// [`Event::Oom`].
    pub oom: u64,
    /// [`Event::OomKill`].
    pub oom_kill: u64,
    /// [`Event::OomPause`].
    pub oom_pause: u64,
}

impl Events {
    fn count(&mut self, event: Event) {
        let count = match event {
            Event::Low => &mut self.low,
            Event::High => &mut self.high,
            Event::Max => &mut self.max,
            Event::Oom => &mut self.oom,
            Event::OomKill => &mut self.oom_kill,
            Event::OomPause => &mut self.oom_pause,
        };
        *count += 1;
    }
}

impl Tree {
    /// Counts an event that happened at `id`: there, and in what its ancestors show of their subtrees.
    pub fn record(&mut self, id: NodeId, event: Event) {
        self.node_mut(id).events_local.count(event);
        self.walk(id, |node| node.events.count(event));
    }
}

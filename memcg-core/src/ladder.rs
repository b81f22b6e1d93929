//! The ladder: what is done, one thing after the other, about a VM or a group that uses more than it should.
//!
//! Polite means first, then those that need no consent, then those that stop somebody; each for a bounded time. There is
//! one [`Ladder`] for each target, whatever the reason: above `high`, a lower limit that is pending, memory that somebody
//! asked for, a guest that is held because it owes pages. The reasons differ in the *goal*, in the time that there is, and
//! in whether the guest can still help.
//!
//! ```text
//!                 ┌───────────────────── held: the guest cannot help ─────────────────────┐
//!                 │                                                                       ▼
//!  REST ──► RECALL ────────► REPORTS ──────► BALLOON ──────────────────────────────────► EVICT ──────────► STUCK
//!   ▲  above  │ stock back,    │ quiet,        │ no driver, slow, stalled, time over       ▲ │ nothing left,   │ ▲
//!   │  goal   │ time over      │ time over     └── the same, and nothing can be evicted ─┐ │ │ no progress in  │ │
//!   │         ▼                ▼                                                         │ │ │ its time        │ │
//!   │       (next)           (next)                                                      └─┼─┼─────────────────┘ │
//!   │                                                                                      │ ▼ held              │
//!   └── goal reached, or nobody asks any more: from everywhere                             ├─HOLD ◄──────────────┘
//!                                                                                 progress │  │ ▲        held
//!                                                                              or released │  ▼ │ time given
//!                                                                                          └─OOM
//! ```
//!
//! A rung adds to those below it: the balloon goes on while pages are evicted, and what comes into the stock is recalled
//! all the time. *Progress* is a usage that falls, by a 64th of what is missing and at least [`STEP`]; so a guest that
//! gives a page now and then keeps nobody waiting, and of what is missing eviction may begin its time anew a bounded number of times.
//!
//! # Time
//!
//! A rung has [`Terms::rung`] (2 s). Where there is a deadline the polite rungs have half of the time at most, so that
//! eviction begins early enough, and at the deadline it is STUCK that remains to be said. HOLD lasts as long as
//! whoever holds the vCPUs says ([`Means::held`]); OOM is the policy's turn. A lower goal than before is another climb.
//!
//! # Who
//!
//! A target is asked only about itself. What a group is to give is divided among those below it, and nobody else, by
//! [`crate::spread`] ([`aims`]), what is idle before what is in use; only who can give in a certain way is asked to give in
//! that way.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 41, 63 | [`aims`]: one engine for a VM, a group and the host; nobody outside of the subtree gives |
//! | 42, 117 | progress is memory that has come back, not what somebody says |
//! | 44, B34, B50, B83 | each rung ends by its deadline: reached, stuck, or the next one |
//! | T7 | who is held is not waited for: eviction at once |

use std::time::Duration;

use crate::spread::{Claimant, Facts, Terms as SpreadTerms, claimants, spread};
use crate::tree::{NodeId, Tree};
use crate::units::Pages;

/// Least number of pages that count as progress: 256 KiB.
pub const STEP: Pages = Pages(64);

/// Progress is at least one part in so many of what is missing.
const SHARE: u64 = 64;

/// Before a deadline, a polite rung has at most one part in so many of the whole time: the three of them half of it.
const POLITE: u32 = 6;

/// How a ladder spreads what a group has to give. What is evicted and in use comes back by a fault at once, and a guest whose
/// balloon takes what it uses comes to a stop. So idle pages go first, by whatever means.
pub const SPREAD: SpreadTerms = SpreadTerms { idle_tax: 99 };

/// What is done at last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rung {
    /// Nothing: usage is where it should be.
    Rest,
    /// What was charged ahead of need comes back.
    Recall,
    /// The guest is giving free pages back by itself.
    Reports,
    /// The guest is asked by its balloon.
    Balloon,
    /// Cold pages are evicted.
    Evict,
    /// Usage does not come down, whatever is done; all of it goes on.
    Stuck,
    /// The same, and vCPUs are held.
    Hold,
    /// The policy is to act.
    Oom,
}

impl Rung {
    /// All of them, from the bottom.
    pub const ALL: [Rung; 8] =
        [Rung::Rest, Rung::Recall, Rung::Reports, Rung::Balloon, Rung::Evict, Rung::Stuck, Rung::Hold, Rung::Oom];

    /// Whether a ladder may go from here to `next`.
    pub fn can_become(self, next: Rung) -> bool {
        use Rung::{Balloon, Evict, Hold, Oom, Recall, Reports, Rest, Stuck};
        match (self, next) {
            (Rest, Recall) | (Recall, Reports) | (Reports, Balloon) | (Balloon, Evict | Stuck) => true,
            (Recall | Reports, Evict) | (Evict, Stuck | Hold) => true,
            (Stuck, Evict | Hold) | (Hold, Evict | Oom) | (Oom, Evict | Hold) => true,
            // Another goal is another climb; a goal that is reached is the end of one.
            (Recall | Reports | Balloon | Evict | Stuck | Hold | Oom, Rest) => true,
            (Rest, Rest | Reports | Balloon | Evict | Stuck | Hold | Oom) => false,
            (Recall, Recall | Balloon | Stuck | Hold | Oom) => false,
            (Reports, Recall | Reports | Stuck | Hold | Oom) => false,
            (Balloon, Recall | Reports | Balloon | Hold | Oom) => false,
            (Evict, Recall | Reports | Balloon | Evict | Oom) => false,
            (Stuck, Recall | Reports | Balloon | Stuck | Oom) => false,
            (Hold, Recall | Reports | Balloon | Stuck | Hold) => false,
            (Oom, Recall | Reports | Balloon | Stuck | Oom) => false,
        }
    }
}

/// How far a guest's balloon driver helps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Driver {
    /// There is none.
    #[default]
    Absent,
    /// It has given nothing for some time.
    Stalled,
    /// It gives, too little.
    Slow,
    /// It gives.
    Cooperating,
}

/// Whether cold pages can be evicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Eviction {
    /// No: swap is full or forbidden, or nothing is left that is cold and shrinks.
    #[default]
    Stuck,
    /// Yes, as far as is known.
    Possible,
}

/// What can be had from a target, and how it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Means {
    /// Pages charged ahead of need.
    pub stock: Pages,
    /// Free pages have come back by reports just now.
    pub reporting: bool,
    /// Its balloon driver.
    pub driver: Driver,
    /// Its cold pages.
    pub eviction: Eviction,
    /// Its vCPUs are held for want of memory, until then at most, in the caller's time.
    pub held: Option<Duration>,
}

impl Means {
    /// What can be had of many together: of each kind the best that one of them has. Who is held for the shortest time
    /// counts.
    pub fn together(members: impl IntoIterator<Item = Means>) -> Means {
        members.into_iter().fold(Means::default(), |all, one| Means {
            stock: all.stock + one.stock,
            reporting: all.reporting || one.reporting,
            driver: all.driver.max(one.driver),
            eviction: all.eviction.max(one.eviction),
            held: [all.held, one.held].into_iter().flatten().min(),
        })
    }
}

/// A target at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Time since any fixed start.
    pub now: Duration,
    /// Pages that it uses, those that its faults wait for included.
    pub usage: Pages,
    /// Pages that it should use at most; `None` when nobody asks.
    pub goal: Option<Pages>,
    /// When it should be there, if that was said.
    pub until: Option<Duration>,
    /// What can be had.
    pub means: Means,
}

/// What a target is asked for now, all of it at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Asks {
    /// The stock is to come back.
    pub recall: bool,
    /// The balloon is to bring usage down to this.
    pub balloon: Option<Pages>,
    /// Eviction is to bring usage down to this.
    pub evict: Option<Pages>,
}

/// Times of a ladder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// What a rung may take.
    pub rung: Duration,
}

impl Default for Terms {
    fn default() -> Terms {
        Terms { rung: Duration::from_secs(2) }
    }
}

/// The ladder of one target. See the module's documentation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ladder {
    terms: Terms,
    rung: Rung,
    /// Since when it is on this rung.
    since: Duration,
    /// Since when usage is above the goal.
    began: Duration,
    goal: Pages,
    /// Usage from which progress is counted, and since when.
    mark: Pages,
    marked: Duration,
    /// There was some since this rung was entered.
    progress: bool,
}

impl Ladder {
    /// At rest.
    pub fn new(terms: Terms) -> Ladder {
        let zero = Duration::ZERO;
        let none = Pages::ZERO;
        Ladder {
            terms,
            rung: Rung::Rest,
            since: zero,
            began: zero,
            goal: none,
            mark: none,
            marked: zero,
            progress: false,
        }
    }

    /// The rung that it is on.
    pub fn rung(&self) -> Rung {
        self.rung
    }

    /// Since when it is on this rung, in the caller's time.
    pub fn since(&self) -> Duration {
        self.since
    }

    /// Pages that usage is to come down to, while it is above.
    pub fn goal(&self) -> Option<Pages> {
        (self.rung != Rung::Rest).then_some(self.goal)
    }

    /// Looks at the target: goes as far as it has to now. Returns the rungs that were reached on the way, the last one
    /// being where it stays.
    pub fn look(&mut self, sample: &Sample) -> impl Iterator<Item = Rung> + use<> {
        let mut reached = [None; Rung::ALL.len() + 1];
        let mut places = reached.iter_mut();
        let lower = sample.goal.is_some_and(|goal| goal < self.goal);
        if lower && self.rung != Rung::Rest && sample.means.held.is_none() {
            self.enter(Rung::Rest, sample);
        }
        self.goal = sample.goal.unwrap_or(self.goal);
        self.measure(sample);
        while let Some(next) = self.next(sample)
            && let Some(place) = places.next()
        {
            self.enter(next, sample);
            *place = Some(next);
        }
        reached.into_iter().flatten()
    }

    /// What the target is asked for on this rung.
    pub fn asks(&self) -> Asks {
        let goal = Some(self.goal);
        match self.rung {
            Rung::Rest => Asks::default(),
            Rung::Recall | Rung::Reports => Asks { recall: true, ..Asks::default() },
            Rung::Balloon => Asks { recall: true, balloon: goal, evict: None },
            Rung::Evict | Rung::Stuck | Rung::Hold | Rung::Oom => Asks { recall: true, balloon: goal, evict: goal },
        }
    }

    /// When it has to be looked at again though nothing has happened.
    pub fn deadline(&self, sample: &Sample) -> Option<Duration> {
        match self.rung {
            Rung::Rest | Rung::Stuck | Rung::Oom => None,
            Rung::Recall | Rung::Reports => Some(self.since.saturating_add(self.polite(sample))),
            Rung::Balloon => {
                // Where nothing can be evicted there is no hurry as long as it gives.
                let from = if sample.means.eviction == Eviction::Stuck { self.marked } else { self.since };
                Some(from.saturating_add(self.polite(sample)))
            }
            Rung::Evict => {
                let late = self.marked.saturating_add(self.terms.rung);
                Some(sample.until.map_or(late, |until| until.min(late)))
            }
            Rung::Hold => sample.means.held,
        }
    }

    /// What a polite rung may take.
    fn polite(&self, sample: &Sample) -> Duration {
        let all = sample.until.map(|until| until.saturating_sub(self.began) / POLITE);
        all.map_or(self.terms.rung, |part| part.min(self.terms.rung))
    }

    fn enter(&mut self, rung: Rung, sample: &Sample) {
        debug_assert!(self.rung.can_become(rung), "{:?} to {rung:?}", self.rung);
        if self.rung == Rung::Rest {
            self.began = sample.now;
        }
        (self.rung, self.since) = (rung, sample.now);
        (self.mark, self.marked, self.progress) = (sample.usage, sample.now, false);
    }

    /// Notes progress.
    fn measure(&mut self, sample: &Sample) {
        let missing = self.mark.saturating_sub(self.goal);
        let step = STEP.max(Pages(missing.0 / SHARE));
        // Where time is not at stake, what a guest has grown by meanwhile is not held against it.
        let patient = matches!(self.rung, Rung::Stuck | Rung::Hold | Rung::Oom);
        if sample.usage + step <= self.mark {
            (self.mark, self.marked, self.progress) = (sample.usage, sample.now, true);
        } else if patient {
            self.mark = self.mark.max(sample.usage);
        }
    }

    /// Where it has to go from here, `None` to stay.
    fn next(&self, sample: &Sample) -> Option<Rung> {
        let Means { stock, reporting, driver, eviction, held } = sample.means;
        let is_held = held.is_some();
        if !sample.goal.is_some_and(|goal| sample.usage > goal || is_held) {
            return (self.rung != Rung::Rest).then_some(Rung::Rest);
        }
        let late = self.deadline(sample).is_some_and(|deadline| sample.now >= deadline);
        let in_time = sample.until.is_none_or(|until| sample.now < until);
        // Whoever is held cannot run a driver.
        let gives = driver == Driver::Cooperating && !is_held;
        match self.rung {
            Rung::Rest => Some(Rung::Recall),
            Rung::Recall | Rung::Reports | Rung::Balloon if is_held => Some(Rung::Evict),
            Rung::Recall => (stock.is_zero() || late).then_some(Rung::Reports),
            Rung::Reports => (!reporting || late).then_some(Rung::Balloon),
            Rung::Balloon => (!gives || late).then_some(match eviction {
                Eviction::Possible => Rung::Evict,
                Eviction::Stuck => Rung::Stuck,
            }),
            Rung::Evict => {
                let nothing_left = eviction == Eviction::Stuck && !gives;
                (nothing_left || late).then_some(if is_held { Rung::Hold } else { Rung::Stuck })
            }
            Rung::Stuck if is_held => Some(Rung::Hold),
            Rung::Stuck => (self.progress && in_time).then_some(Rung::Evict),
            Rung::Hold if late => Some(Rung::Oom),
            Rung::Hold => (self.progress || !is_held).then_some(Rung::Evict),
            Rung::Oom if !is_held => Some(Rung::Evict),
            Rung::Oom => held.is_some_and(|until| sample.now < until).then_some(Rung::Hold),
        }
    }
}

/// What the VMs at and below `top` should come down to, so that together they give `need` by one means, on `terms`
/// ([`SPREAD`]): those that `facts` knows can give by it, in the order of the tree. Who gives nothing is left out. Also what nobody can give.
pub fn aims(
    tree: &Tree,
    top: NodeId,
    need: Pages,
    terms: &SpreadTerms,
    facts: impl FnMut(NodeId) -> Option<Facts>,
) -> (Vec<(NodeId, Pages)>, Pages) {
    let claimants: Vec<Claimant> = claimants(tree, top, facts);
    let spread = spread(need, &claimants, terms);
    let gives = claimants.iter().zip(&spread.takes).filter(|(_, take)| !take.pages.is_zero());
    (gives.map(|(vm, take)| (vm.id, vm.usage.saturating_sub(take.pages))).collect(), spread.short)
}

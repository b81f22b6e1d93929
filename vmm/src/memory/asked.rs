//! When a worker asks its controller for pages, and when it asks again.
//!
//! ```text
//!            ask: it wants something                  a grant
//!   NO ─────────────────────────────► WAITING ──────────────────────► NO
//!   ▲                                   │  ▲ ask again: faults wait for
//!   │                                   │  │ twice as much as was asked
//!   │ a grant                 a refusal │  └─┐
//!   └───────────────────── REFUSED ◄────┘    │
//!                             └──────────────┘ ask again: more faults wait than were refused
//! ```
//!
//! Each answer ends a question, and may be the reason for the next one. So the number of questions under way would never
//! fall by itself, and each of them costs the controller as much as a useful one: a guest that faults while an answer is
//! on its way must not make a question of each fault. The controller's part is to answer no question twice.

use memcg_core::stock::Stock;
use memcg_core::units::Pages;

/// What was asked last, and what became of it. In pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Asked {
    /// Nothing is asked.
    #[default]
    No,
    /// Not answered yet.
    Waiting {
        /// What was asked for.
        want: u64,
        /// How much of it was for faults that had happened.
        now: u64,
    },
    /// The controller cannot grant it now and will speak when it can.
    Refused {
        /// What is missing, as the controller knows it.
        now: u64,
    },
}

impl Asked {
    /// What to ask for now, if anything: all that is wanted, and how much of it cannot wait. It counts as asked. `unserved`
    /// pages are waited for by faults or by the loader.
    pub fn ask(&mut self, stock: &Stock, unserved: Pages) -> Option<(u64, u64)> {
        let now = stock.want_now(unserved).0;
        let due = match *self {
            Self::No => true,
            Self::Waiting { want, .. } => now >= 2 * want,
            Self::Refused { now: known } => now > known,
        };
        let want = stock.want(unserved).0;
        if !due || want == 0 {
            return None;
        }
        *self = Self::Waiting { want, now };
        Some((want, now))
    }

    /// A grant has come, with so many pages that are new.
    pub fn answered(&mut self, new: Pages, refused: bool) {
        *self = match *self {
            _ if !refused => Self::No,
            Self::Waiting { now, .. } | Self::Refused { now } => Self::Refused { now: now.saturating_sub(new.0) },
            Self::No => Self::Refused { now: 0 },
        };
    }

    /// Whether the controller's last word was no.
    pub fn refused(self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stock whose reserve of 100 pages is full, with room for any batch.
    fn stock() -> Stock {
        let mut stock = Stock::new(Pages(100));
        stock.grant(1, 100, Pages(1000), None).expect("the first grant");
        stock
    }

    /// A fault that the reserve answers.
    fn fault(stock: &mut Stock) {
        stock.prepare_reserve().expect("not empty").commit(Pages(1));
    }

    #[test]
    fn a_burst_of_faults_is_few_questions() {
        let (mut stock, mut asked) = (stock(), Asked::default());
        let (want, now) = asked.ask(&stock, Pages(0)).expect("a batch ahead of need");
        assert!(want > 0 && now == 0);
        let mut questions = Vec::new();
        for _ in 0..100 {
            fault(&mut stock);
            questions.extend(asked.ask(&stock, Pages(0)));
            assert_eq!(asked.ask(&stock, Pages(0)), None, "nothing has changed");
        }
        assert!((1..=3).contains(&questions.len()), "{questions:?}");
        assert!(questions.iter().all(|(want, now)| want >= now && *now > 0), "{questions:?}");
    }

    #[test]
    fn what_was_refused_is_asked_for_again_only_when_more_is_missing() {
        let (mut stock, mut asked) = (stock(), Asked::default());
        (0..8).for_each(|_| fault(&mut stock));
        assert_eq!(asked.ask(&stock, Pages(0)).expect("a debt").1, 8);
        // Three of them come, there are no more, and another fault has crossed that.
        fault(&mut stock);
        let new = stock.grant(1, 103, Pages(0), Some(Pages(0))).expect("a grant");
        asked.answered(new, true);
        assert!(asked.refused());
        assert_eq!(asked.ask(&stock, Pages(0)), Some((6, 6)), "the controller knows of five");
        asked.answered(Pages(0), true);
        assert_eq!(asked.ask(&stock, Pages(0)), None);
        // A refusal that nobody has asked for, when a limit changes, makes no difference.
        asked.answered(Pages(0), true);
        assert_eq!(asked.ask(&stock, Pages(0)), None);
        asked.answered(Pages(0), false);
        assert_eq!(asked.ask(&stock, Pages(0)), Some((6, 6)), "there may be room now");
    }
}

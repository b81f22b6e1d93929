//! What a guest may make its balloon do that nobody has asked it for.
//!
//! Each page that a guest gives is read, checked, claimed and discarded, and filled again when it takes it back: work of
//! the host's, on CPUs that other guests need as well. So a guest that gives and takes the same pages for ever, names them
//! a thousand times, or rings for nothing, has its queue left alone until it has *paid* with time. It waits for its
//! buffers meanwhile, which is its own affair:
//!
//! | what costs nothing | what costs |
//! | --- | --- |
//! | giving a page, as long as no more are held than RAM has | giving more than that: some are given twice |
//! | taking back what was given | taking back more than that; and, charged to the next giving, without being asked |
//! | | what is named twice in one batch, and each thing that the guest does wrong: 1 |
//! | | ringing when there is nothing: [`IDLE`]; a reported range: 1 |
//!
//! A unit takes [`UNIT`] to pay. Up to [`ALLOWANCE`] may be owed before a queue is left alone, and never more than [`MOST`]
//! beyond: a guest that had to take back all that it had given may give it again after that. Giving and taking have queues
//! of their own, so taking back what was given, perhaps because the guest is out of memory, waits for nothing.
//!
//! Time is a parameter, since any moment.

use std::time::Duration;

use crate::features::QueueKind;
use crate::page_queue::Processed;

/// Time that pays for one unit: 4000 a second, which is 16 MiB of pages.
pub const UNIT: Duration = Duration::from_micros(250);

/// Time that may be owed: 8000 units, 32 MiB of pages.
pub const ALLOWANCE: Duration = Duration::from_secs(2);

/// Time that is owed beyond that at most.
pub const MOST: Duration = Duration::from_secs(60);

/// Units for a look at a queue in which nothing was.
pub const IDLE: u64 = 16;

/// What one guest owes, for each of its queues.
#[derive(Clone, Debug)]
pub struct Budget {
    ram_pages: u64,
    /// Pages that were given and not taken back, as far as that can be true.
    held: u64,
    /// Of these, pages that it was asked to take back.
    unwanted: u64,
    /// By kind of queue: when all is paid.
    paid: [Duration; QueueKind::COUNT],
}

impl Budget {
    /// A guest of so many pages of RAM that owes nothing.
    pub fn new(ram_pages: u32) -> Self {
        Self { ram_pages: ram_pages.into(), held: 0, unwanted: 0, paid: [Duration::ZERO; QueueKind::COUNT] }
    }

    /// The guest is asked for a balloon of so many pages from now on.
    pub fn set_target(&mut self, pages: u32) {
        self.unwanted = self.held.saturating_sub(pages.into());
    }

    /// How long the queues of this kind have to be left alone, if they have.
    pub fn wait(&self, kind: QueueKind, now: Duration) -> Option<Duration> {
        let wait = self.paid[kind as usize].saturating_sub(now + ALLOWANCE);
        (!wait.is_zero()).then_some(wait)
    }

    /// A queue of this kind was looked at, and this came of it.
    pub fn spend(&mut self, kind: QueueKind, out: &Processed, now: Duration) {
        let free = match kind {
            QueueKind::Inflate => {
                let free = out.pages.min(self.ram_pages - self.held);
                self.held += free;
                free
            }
            QueueKind::Deflate => {
                let free = out.pages.min(self.held);
                self.held -= free;
                let asked = free.min(self.unwanted);
                self.unwanted -= asked;
                self.owe(QueueKind::Inflate, free - asked, now);
                free
            }
            QueueKind::Reporting => out.pages - out.ranges,
            QueueKind::Stats | QueueKind::FreePageHint => 0,
        };
        let nothing = if out.pages == 0 { IDLE } else { 0 };
        self.owe(kind, out.pages - free + out.duplicates + out.faults + nothing, now);
    }

    fn owe(&mut self, kind: QueueKind, units: u64, now: Duration) {
        if units > 0 {
            let time = UNIT.saturating_mul(u32::try_from(units).unwrap_or(u32::MAX));
            let paid = self.paid[kind as usize].max(now);
            self.paid[kind as usize] = paid.saturating_add(time).min(now + ALLOWANCE + MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAM: u32 = 32_768;
    const SECOND: Duration = Duration::from_secs(1);

    fn pages(pages: u64) -> Processed {
        Processed { pages, ranges: 1, ..Processed::default() }
    }

    /// Pages that a guest can have handled in `time`, when it sends a batch as soon as it may.
    fn handled(budget: &mut Budget, mut now: Duration, time: Duration, round: &[(QueueKind, Processed)]) -> u64 {
        let (end, mut sum) = (now + time, 0);
        for (kind, batch) in round.iter().cycle() {
            now += budget.wait(*kind, now).unwrap_or_default().max(Duration::from_micros(100));
            if now > end {
                return sum;
            }
            budget.spend(*kind, batch, now);
            sum += batch.pages + batch.duplicates;
        }
        sum
    }

    /// A guest that gives what it is asked for, and takes back what it may, waits for nothing, however much that is.
    #[test]
    fn a_guest_that_follows_its_target_owes_nothing() {
        let mut budget = Budget::new(RAM);
        for step in 0..1000u64 {
            let target = if step % 2 == 0 { RAM / 2 } else { 0 };
            budget.set_target(target);
            let kind = if step % 2 == 0 { QueueKind::Inflate } else { QueueKind::Deflate };
            for _ in 0..RAM / 2 / 1024 {
                assert_eq!(budget.wait(kind, Duration::ZERO), None, "step {step}");
                budget.spend(kind, &pages(1024), Duration::ZERO);
            }
        }
        assert_eq!(budget.paid, [Duration::ZERO; QueueKind::COUNT]);
    }

    /// All of RAM may be given unasked, once.
    #[test]
    fn giving_everything_once_is_free_and_giving_it_again_is_not() {
        let mut budget = Budget::new(RAM);
        for _ in 0..RAM / 1024 {
            budget.spend(QueueKind::Inflate, &pages(1024), SECOND);
        }
        assert_eq!(budget.paid[QueueKind::Inflate as usize], Duration::ZERO);
        budget.spend(QueueKind::Inflate, &pages(16_000), SECOND);
        assert_eq!(budget.wait(QueueKind::Inflate, SECOND), Some(Duration::from_secs(2)));
        assert_eq!(budget.wait(QueueKind::Inflate, 3 * SECOND), None);
    }

    #[test]
    fn a_flood_is_as_fast_as_it_is_paid_for() {
        let minute = 60 * SECOND;
        for (round, allowed) in [
            // Given and taken back: half of the pages are free.
            (vec![(QueueKind::Inflate, pages(4096)), (QueueKind::Deflate, pages(4096))], 2 * 4000),
            (vec![(QueueKind::Inflate, Processed { duplicates: 1023, ..pages(1) })], 4000),
            (vec![(QueueKind::Deflate, pages(1024))], 4000),
        ] {
            let mut budget = Budget::new(RAM);
            let sum = handled(&mut budget, Duration::ZERO, minute, &round);
            let most = allowed * 62 + u64::from(RAM) + 8192;
            assert!(sum <= most && sum >= allowed * 60, "{sum} pages of at most {most}: {round:?}");
        }
    }

    #[test]
    fn ringing_for_nothing_is_answered_so_many_times_a_second() {
        let mut budget = Budget::new(RAM);
        let mut looks = 0;
        for tick in 0..1_000_000 {
            let now = Duration::from_micros(60 * tick);
            if budget.wait(QueueKind::Inflate, now).is_none() {
                budget.spend(QueueKind::Inflate, &Processed::default(), now);
                looks += 1;
            }
        }
        assert!((62 * 250 - 10..=62 * 250 + 10).contains(&looks), "{looks} looks in a minute");
    }

    /// The valve of a guest that is out of memory is never closed, and what it has taken it may give again in a minute.
    #[test]
    fn what_was_given_can_always_be_taken_back() {
        let mut budget = Budget::new(u32::MAX);
        budget.set_target(1 << 30);
        budget.spend(QueueKind::Inflate, &pages(1 << 30), SECOND);
        for _ in 0..1 << 14 {
            assert_eq!(budget.wait(QueueKind::Deflate, SECOND), None);
            budget.spend(QueueKind::Deflate, &pages(1 << 16), SECOND);
        }
        assert_eq!(budget.wait(QueueKind::Inflate, SECOND), Some(MOST));
        assert_eq!(budget.wait(QueueKind::Inflate, SECOND + MOST), None);
    }

    /// Blocks of 2 MiB, as Linux reports them: 15 GiB at once before it waits, and then 8 GiB a second.
    #[test]
    fn reports_cost_by_the_range() {
        const GIB: u64 = 512;
        let mut budget = Budget::new(1 << 25);
        let blocks = |blocks| Processed { pages: blocks * 512, ranges: blocks, ..Processed::default() };
        budget.spend(QueueKind::Reporting, &blocks(15 * GIB), Duration::ZERO);
        assert_eq!(budget.wait(QueueKind::Reporting, Duration::ZERO), None);
        budget.spend(QueueKind::Reporting, &blocks(8 * GIB), Duration::ZERO);
        assert!(budget.wait(QueueKind::Reporting, Duration::ZERO).is_some_and(|wait| wait < SECOND));
    }
}

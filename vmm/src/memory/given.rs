//! What the guest gives away, as the owner of its pages books it.
//!
//! Claim, discard, uncharge: see [`super::client`]. Whatever state a page is in, it is given away before the guest has its
//! buffer back: of an idle page the copy in the stage is discarded, of an evicted one the entry of the store is dropped.

use memcg_core::frame::FrameState;
use memcg_core::units::Pages as Count;

use super::client::{GivenAway, Reply, Run};
use super::pages::{Pages, seconds};
use crate::worker::gate::monotonic_ns;

/// A guest with less room than this is short of it: 8 MiB. Its reports are discarded whatever came back before.
const SHORT: Count = Count::from_mib(8);

impl Pages {
    /// Claims pages for a discard and returns what is to be discarded: the pages that are present, idle ones by their number
    /// in the stage. Faults there wait until [`Pages::on_discarded`]. A page that has no memory is given away at once.
    /// `None`, and nothing has changed, while the reclaim thread has claimed one of them.
    pub fn on_claim(&mut self, runs: &mut Vec<Run>, to: GivenAway) -> Option<Vec<Run>> {
        if runs.iter().any(|run| self.is_claimed(run)) {
            self.device_blocked = true;
            self.reclaim.give_way();
            return None;
        }
        let without_memory = to.state();
        let mut claimed = std::mem::take(&mut self.spare_runs);
        claimed.clear();
        if to == GivenAway::Report {
            self.now = seconds(monotonic_ns());
            let short = self.stock.room().is_some_and(|room| room < SHORT);
            if !self.reports.welcome(self.now, short) {
                self.counts.reported_left += runs.iter().map(|run| run.pages).sum::<u64>();
                self.spare_runs = std::mem::take(runs);
                return Some(claimed);
            }
        }
        for run in runs.iter() {
            let (mut at, last) = (run.first as usize, (run.first + run.pages) as usize);
            while at < last {
                let (state, end) = self.frames.run(at, last);
                match state {
                    FrameState::Active => {
                        self.frames.set_range(at, end, FrameState::Discarding);
                        if let Some(present) = self.ram.present() {
                            present.clear(at as u64..end as u64);
                        }
                        claimed.push(Run { first: at as u64, pages: (end - at) as u64 });
                    }
                    FrameState::Idle => {
                        self.frames.set_range(at, end, FrameState::Discarding);
                        claimed.push(Run { first: self.ram.other(at as u64), pages: (end - at) as u64 });
                    }
                    FrameState::Swapped => {
                        self.forget(at as u64..end as u64);
                        self.frames.set_range(at, end, without_memory);
                    }
                    FrameState::Absent if to == GivenAway::Report => {}
                    FrameState::Absent => self.frames.set_range(at, end, FrameState::Ballooned),
                    // Given a second time: it is not the guest's to give.
                    FrameState::Ballooned => self.counts.guest_errors += (end - at) as u64,
                    // Named twice by the guest in one batch: the first time counts.
                    FrameState::Discarding => self.counts.guest_errors += (end - at) as u64,
                    FrameState::Moving | FrameState::Evicting => unreachable!("looked at before"),
                }
                at = end;
            }
        }
        self.stock.owe(self.cost());
        self.spare_runs = std::mem::take(runs);
        Some(claimed)
    }

    /// Whether the reclaim thread works on a page of `run`.
    fn is_claimed(&self, run: &Run) -> bool {
        let (mut at, last) = (run.first as usize, (run.first + run.pages) as usize);
        while at < last {
            let (state, end) = self.frames.run(at, last);
            if matches!(state, FrameState::Moving | FrameState::Evicting) {
                return true;
            }
            at = end;
        }
        false
    }

    /// The claimed pages are gone: their charges return, and faults that waited for them are served.
    pub fn on_discarded(&mut self, runs: &[Run], to: GivenAway) -> Option<(usize, Reply)> {
        let state = to.state();
        let count = match to {
            GivenAway::Balloon => &mut self.counts.discarded,
            GivenAway::Report => &mut self.counts.reported,
        };
        for run in runs {
            let first = (run.first % self.ram.pages()) as usize;
            let pages = first..first + run.pages as usize;
            self.frames.set_range(pages.start, pages.end, state);
            *count += run.pages;
            if to == GivenAway::Report {
                self.reports.discarded(self.now, pages);
            }
            self.stock.uncharge(Count(run.pages));
        }
        self.stock.owe(self.cost());
        self.settle()
    }

    /// The guest takes pages back: they are absent until touched.
    pub fn on_deflated(&mut self, runs: &[Run]) {
        for page in runs.iter().flat_map(|r| r.first..r.first + r.pages) {
            if self.frames.state(page as usize) == FrameState::Ballooned {
                self.frames.set(page as usize, FrameState::Absent);
            }
        }
        self.stock.owe(self.cost());
    }
}

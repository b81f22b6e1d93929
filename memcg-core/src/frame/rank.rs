//! The page of a given rank among those that have a content: how a sample that was drawn by numbers becomes pages.

use super::FrameTable;
use super::state::FrameState;
use super::table::BLOCK;

/// Where a walk through the pages that are kept has got to. The table may change between two steps: a rank is then that of some
/// page nearby, and none comes twice.
#[derive(Clone, Debug, Default)]
pub struct Walk {
    block: usize,
    /// Pages before that block, as they were counted.
    before: u64,
    /// No page before this one is found again.
    from: usize,
}

/// States of pages that have a content, wherever it is; one that is being given back has none soon.
const KEPT: [FrameState; 5] =
    [FrameState::Active, FrameState::Idle, FrameState::Moving, FrameState::Evicting, FrameState::Swapped];

impl FrameTable {
    /// Pages with a content that the guest may want: those that [`Self::kept_at`] numbers. Moving one aside or evicting it
    /// changes nothing about that.
    pub fn kept(&self) -> u64 {
        KEPT.iter().map(|state| self.count(*state)).sum()
    }

    /// The page that has `rank` among those that are [kept](Self::kept), in the order of their numbers; `None` when there is
    /// none.
    /// Ranks have to increase from call to call: a walk passes each block once, whatever it looks for.
    pub fn kept_at(&self, walk: &mut Walk, rank: u64) -> Option<usize> {
        while let Some(block) = self.blocks.get(walk.block) {
            let pages: u64 = KEPT.iter().map(|state| u64::from(block.counts[*state as usize])).sum();
            if rank < walk.before + pages {
                let first = walk.block * BLOCK;
                let skip = rank.saturating_sub(walk.before) as usize;
                let numbers = first..self.len().min(first + BLOCK);
                let mut kept = numbers.filter(|page| KEPT.contains(&self.state(*page)));
                let page = kept.nth(skip).filter(|page| *page >= walk.from)?;
                walk.from = page + 1;
                return Some(page);
            }
            walk.before += pages;
            walk.block += 1;
        }
        None
    }
}

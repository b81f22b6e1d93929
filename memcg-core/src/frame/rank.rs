//! The resident page of a given rank: how a sample that was drawn by numbers becomes pages.

use super::FrameTable;
use super::state::FrameState;
use super::table::BLOCK;

/// Where a walk through the resident pages has got to. The table may change between two steps: a rank is then that of some
/// page nearby, and none comes twice.
#[derive(Clone, Debug, Default)]
pub struct Walk {
    block: usize,
    /// Resident pages before that block, as they were counted.
    before: u64,
    /// No page before this one is found again.
    from: usize,
}

impl FrameTable {
    /// Pages that are ACTIVE or IDLE: those that [`Self::resident_at`] numbers.
    pub fn resident(&self) -> u64 {
        self.count(FrameState::Active) + self.count(FrameState::Idle)
    }

    /// The page that has `rank` among the ACTIVE and IDLE ones in the order of their numbers; `None` when there is none.
    /// Ranks have to increase from call to call: a walk passes each block once, whatever it looks for.
    pub fn resident_at(&self, walk: &mut Walk, rank: u64) -> Option<usize> {
        let there = |state: FrameState| matches!(state, FrameState::Active | FrameState::Idle);
        while let Some(block) = self.blocks.get(walk.block) {
            let [active, idle] = [FrameState::Active, FrameState::Idle].map(|state| block.counts[state as usize]);
            let pages = u64::from(active) + u64::from(idle);
            if rank < walk.before + pages {
                let first = walk.block * BLOCK;
                let skip = rank.saturating_sub(walk.before) as usize;
                let numbers = first..self.len().min(first + BLOCK);
                let mut resident = numbers.filter(|page| there(self.state(*page)));
                let page = resident.nth(skip).filter(|page| *page >= walk.from)?;
                walk.from = page + 1;
                return Some(page);
            }
            walk.before += pages;
            walk.block += 1;
        }
        None
    }
}

//! The order in which pages were evicted, and a search by it.
//!
//! Reclaim takes the coldest pages first, so of two evicted pages the one that went later was in use later. Its turn is noted
//! beside its place, where its other link was, and costs nothing. A search goes through the pages by number, and passes blocks
//! without evicted pages: pages that lie side by side are found so, and can come back with one system call.

use super::FrameTable;
use super::state::FrameState;
use super::table::BLOCK;

/// A part of the order: the evictions from `first` on, `count` of them. Their numbers wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turns {
    /// Number of the first one.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl Turns {
    /// Whether `turn` is one of them.
    pub fn contains(self, turn: u32) -> bool {
        turn.wrapping_sub(self.first) < self.count
    }

    /// The last ones, at most `most`, and those before them.
    pub fn split_last(self, most: u32) -> (Turns, Turns) {
        let count = self.count.min(most);
        let before = self.count - count;
        (Turns { first: self.first.wrapping_add(before), count }, Turns { count: before, ..self })
    }
}

impl FrameTable {
    /// Notes the number of the eviction by which page `i` has become SWAPPED. Means something until it is not any more.
    pub fn set_turn(&mut self, i: usize, turn: u32) {
        debug_assert_eq!(self.state(i), FrameState::Swapped, "page {i} is not in the store");
        self.links.set_turn(i, turn);
    }

    /// Finds the SWAPPED pages from page `from` on that were evicted in `turns`, in the order of their numbers, until `take`
    /// takes no more. Looks at the pages of at most `blocks` blocks. Returns the page to go on with, `None` after the last.
    pub fn evicted_in(
        &self,
        turns: Turns,
        from: usize,
        mut blocks: usize,
        mut take: impl FnMut(usize) -> bool,
    ) -> Option<usize> {
        let mut at = from;
        while at < self.len() {
            let end = self.block_pages(at / BLOCK).end;
            if self.blocks[at / BLOCK].counts[FrameState::Swapped as usize] > 0 {
                blocks = match blocks.checked_sub(1) {
                    Some(left) => left,
                    None => return Some(at),
                };
                let evicted = |page: &usize| self.state(*page) == FrameState::Swapped;
                let found = (at..end).filter(evicted).filter(|page| turns.contains(self.links.turn(*page)));
                for page in found {
                    if !take(page) {
                        return Some(page);
                    }
                }
            }
            at = end;
        }
        None
    }
}

//! The invariants of the table, as a function that anyone may call at any time.

use super::age::Ages;
use super::links::List;
use super::state::{FrameState, record};
use super::table::{BLOCK, Block, FrameTable, has_age};

/// An invariant that does not hold. There should never be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A counter is not what the records say.
    #[error("{counted} pages are counted as {state:?}, {found} are")]
    Count {
        /// The state.
        state: FrameState,
        /// The counter.
        counted: u64,
        /// What a look at each page finds.
        found: u64,
    },
    /// A counter of a block is not what its records say.
    #[error("block {block}: {counted} pages are counted as {state:?}, {found} are")]
    BlockCount {
        /// Number of the block.
        block: usize,
        /// The state.
        state: FrameState,
        /// The counter.
        counted: u16,
        /// What a look at each page finds.
        found: u16,
    },
    /// The pages of a whole block are not alike, or it is not a block of 512.
    #[error("block {block} is one entry and its pages are not alike")]
    NotUniform {
        /// Number of the block.
        block: usize,
    },
    /// An entry is on a list that is not its state's, or is not an entry.
    #[error("page {page} is on the list of {list:?} pages, but {state:?} or part of a block")]
    Misplaced {
        /// First page of the entry.
        page: usize,
        /// The list.
        list: List,
        /// Its state.
        state: FrameState,
    },
    /// Two neighbours do not name each other, or the walk does not end.
    #[error("the list of {list:?} pages is broken at page {page}")]
    Broken {
        /// The list.
        list: List,
        /// Where.
        page: usize,
    },
    /// A list does not have the entries that it should have.
    #[error("the list of {list:?} pages counts {counted} entries, a walk finds {found}, states ask for {expected}")]
    Length {
        /// The list.
        list: List,
        /// The counter.
        counted: usize,
        /// Entries found from tail to head.
        found: usize,
        /// Entries that the states ask for.
        expected: usize,
    },
    /// The counters by generation are not what the charged pages add up to.
    #[error("age {age}: {counted} charged pages are counted, {found} are there")]
    Ages {
        /// Age in generations; 64 for all from there on.
        age: u16,
        /// The counter.
        counted: u64,
        /// What a look at each page finds.
        found: u64,
    },
}

impl FrameTable {
    /// Every invariant that does not hold: counters, uniform blocks, lists (each listed page once, on its state's list,
    /// links in both directions), ages. Empty in a healthy table, at any moment. Looks at every page and allocates.
    pub fn check(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        self.check_counts(&mut found);
        let mut seen = vec![false; self.len() + self.blocks.len()];
        for list in List::ALL {
            self.check_list(list, &mut seen, &mut found);
        }
        self.check_ages(&mut found);
        found
    }

    fn check_counts(&self, violations: &mut Vec<Violation>) {
        let mut counts = [0u64; FrameState::ALL.len()];
        for (block, bytes) in self.bytes.chunks(BLOCK).enumerate() {
            let summary = &self.blocks[block];
            for state in FrameState::ALL {
                let found = bytes.iter().filter(|byte| FrameState::from_bits(**byte) == state).count();
                counts[state as usize] += found as u64;
                let (counted, found) = (summary.counts[state as usize], found as u16);
                if counted != found {
                    violations.push(Violation::BlockCount { block, state, counted, found });
                }
            }
            let alike = |byte: &u8| match has_age(FrameState::from_bits(*byte)) {
                true => byte & (record::KEY | record::REFERENCED) == summary.key,
                false => byte & record::REFERENCED == 0,
            };
            if summary.whole && !bytes.iter().all(alike) {
                violations.push(Violation::NotUniform { block });
            }
        }
        for state in FrameState::ALL {
            let (counted, found) = (self.count(state), counts[state as usize]);
            if counted != found {
                violations.push(Violation::Count { state, counted, found });
            }
        }
    }

    fn check_list(&self, list: List, seen: &mut [bool], violations: &mut Vec<Violation>) {
        let (mut found, mut colder, mut at) = (0, None, self.links.tail(list));
        while let Some(entry) = at {
            let page = self.entry_pages(entry).start;
            let twice = seen.get(entry).is_none_or(|seen| *seen);
            if twice || self.links.colder(entry) != colder {
                violations.push(Violation::Broken { list, page });
                return;
            }
            seen[entry] = true;
            let (block, state) = (&self.blocks[page / BLOCK], self.state(page));
            let right =
                if block.whole { entry >= self.len() && block.list() == Some(list) } else { state == list.state() };
            if !right {
                violations.push(Violation::Misplaced { page, list, state });
            }
            found += 1;
            (colder, at) = (at, self.links.hotter(entry));
        }
        if self.links.head(list) != colder {
            violations
                .push(Violation::Broken { list, page: self.links.head(list).map_or(0, |e| self.entry_pages(e).start) });
        }
        let entries = |block: &Block| match block.whole {
            true => usize::from(block.list() == Some(list)),
            false => usize::from(block.counts[list.state() as usize]),
        };
        let expected = self.blocks.iter().map(entries).sum();
        let counted = self.entries(list);
        if found != expected || counted != expected {
            violations.push(Violation::Length { list, counted, found, expected });
        }
    }

    fn check_ages(&self, violations: &mut Vec<Violation>) {
        let mut ages = Ages::new(self.ages.now);
        for (block, summary) in self.blocks.iter().enumerate() {
            let charged = |i: &usize| self.state(*i).is_charged();
            let pages = self.block_pages(block).filter(charged);
            if summary.whole {
                let pages = pages.count() as u64;
                ages.cell(summary.generation).add(pages, u64::from(pages > 0));
            } else {
                pages.for_each(|i| ages.cell(self.generations[i]).add(1, 1));
            }
        }
        for ((age, counted), (_, found)) in self.ages.cells().zip(ages.cells()) {
            if counted != found {
                violations.push(Violation::Ages { age, counted: counted.pages, found: found.pages });
            }
        }
    }
}

//! Generations: how long ago a page was last seen in use.
//!
//! Time is cut into generations by the caller ([`FrameTable::advance_generation`]); each charged page has the one in
//! which it was last seen touched. Ages are differences that wrap, so 16 bits are enough for ever: before a page's age
//! could wrap to "young", a sweep of a few blocks a generation has set it back to [`OLDEST`].
//!
//! The pages of each of the last [`EXACT`] generations are counted as they come and go, and all older ones together.
//! So histogram and working set cost a sum over 64 numbers, never a look at the pages.
//!
//! [`FrameTable::advance_generation`]: super::FrameTable::advance_generation

use crate::units::Pages;

/// Ages below this are counted one by one.
pub const EXACT: u16 = 64;

/// No page is said to be older than this many generations plus [`SWEEP`].
pub(super) const OLDEST: u16 = 1 << 15;

/// Generations in which the sweep comes by each block once.
pub(super) const SWEEP: usize = 1 << 14;

/// Pages by age.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Pages in each bucket; `pages[i].bytes()` for bytes.
    pub pages: [Pages; Histogram::FROM.len()],
}

impl Histogram {
    /// The least age of each bucket, in generations; a bucket ends where the next begins, the last one never.
    pub const FROM: [u16; 8] = [0, 1, 2, 4, 8, 16, 32, EXACT];

    /// The bucket of `age`.
    pub fn bucket(age: u16) -> usize {
        Histogram::FROM.iter().rposition(|from| age >= *from).unwrap_or(0)
    }

    /// All pages.
    pub fn total(&self) -> Pages {
        self.pages.iter().copied().sum()
    }

    fn add(&mut self, age: u16, pages: u64) {
        self.pages[Histogram::bucket(age)] += Pages(pages);
    }
}

/// What is known of the pages that were in use of late. The truth about what was *seen* lies in
/// `at_least..=at_most`.
///
/// **`at_most` is too high** by what came along with a touch: a whole block counts as touched when one of its pages
/// is, and a page that fault-around filled counts as touched. **Both are too low** by touches that nobody has looked
/// for: an ACTIVE page is mapped, and its later touches are seen only by moving it aside. The more of the active list
/// is aged in each generation, the smaller that part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// One page for each entry (a page, or all pages of a whole block) seen in use.
    pub at_least: Pages,
    /// All pages of these entries.
    pub at_most: Pages,
}

/// Charged pages of one generation, and how many entries they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cell {
    pub pages: u64,
    pub entries: u64,
}

impl Cell {
    #[inline]
    pub fn add(&mut self, pages: u64, entries: u64) {
        self.pages += pages;
        self.entries += entries;
    }

    #[inline]
    fn remove(&mut self, pages: u64, entries: u64) {
        self.pages -= pages;
        self.entries -= entries;
    }
}

/// The current generation, and what is counted by generation.
#[derive(Clone, Debug)]
pub(super) struct Ages {
    /// The current generation.
    pub now: u16,
    /// Where the sweep goes on.
    pub hand: usize,
    /// By generation modulo [`EXACT`]: the divisor of 2^16 keeps the place right when generations wrap.
    recent: [Cell; EXACT as usize],
    older: Cell,
    refaults: Histogram,
}

impl Ages {
    pub fn new(now: u16) -> Ages {
        let none = Cell::default();
        Ages { now, hand: 0, recent: [none; EXACT as usize], older: none, refaults: Histogram::default() }
    }

    /// The age of a page seen in `generation`.
    #[inline]
    pub fn age(&self, generation: u16) -> u16 {
        self.now.wrapping_sub(generation)
    }

    /// The counters of `generation`.
    #[inline]
    pub fn cell(&mut self, generation: u16) -> &mut Cell {
        if self.age(generation) < EXACT { &mut self.recent[usize::from(generation % EXACT)] } else { &mut self.older }
    }

    /// Pages that share `generation`, and are so many entries, make a step.
    #[inline]
    pub fn step(&mut self, step: &super::state::Step, generation: u16, pages: u64, entries: u64) {
        if step.refault {
            self.refaults.add(self.age(generation), pages);
        }
        if step.leaves {
            self.cell(generation).remove(pages, entries);
        }
        if step.stamped {
            self.cell(self.now).add(pages, entries);
        }
    }

    /// Pages of `generation` were seen in use now.
    pub fn touch(&mut self, generation: u16, pages: u64, entries: u64) {
        self.cell(generation).remove(pages, entries);
        self.cell(self.now).add(pages, entries);
    }

    /// The next generation begins; the oldest one that was counted by itself joins the older ones.
    pub fn advance(&mut self) {
        self.now = self.now.wrapping_add(1);
        let oldest = std::mem::take(&mut self.recent[usize::from(self.now % EXACT)]);
        self.older.add(oldest.pages, oldest.entries);
    }

    /// Cells and their ages, the youngest first; the last one holds everything from its age on.
    pub fn cells(&self) -> impl Iterator<Item = (u16, Cell)> + '_ {
        let recent = |age: u16| (age, self.recent[usize::from(self.now.wrapping_sub(age) % EXACT)]);
        (0..EXACT).map(recent).chain([(EXACT, self.older)])
    }

    pub fn histogram(&self) -> Histogram {
        let mut histogram = Histogram::default();
        for (age, cell) in self.cells() {
            histogram.add(age, cell.pages);
        }
        histogram
    }

    pub fn refaults(&self) -> Histogram {
        self.refaults
    }

    pub fn working_set(&self, generations: u16) -> WorkingSet {
        let mut set = WorkingSet::default();
        for (_, cell) in self.cells().take_while(|(age, _)| *age < generations.min(EXACT)) {
            set.at_most += Pages(cell.pages);
            set.at_least += Pages(cell.entries);
        }
        set
    }
}

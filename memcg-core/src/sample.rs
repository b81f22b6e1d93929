//! How much memory a guest uses, from a few pages: the working set by random samples.
//!
//! A mapped page does not say whether it is touched. A page that was moved aside does: its next touch is a fault. To move
//! all of them aside in turn would cost a fault for each page that is in use; of a *cohort*, drawn at random, the share
//! that comes back says the same for the price of a few hundred faults.
//!
//! ```text
//!  period      1         2         3         4            pages that are kept, cut into as many strides as pages are drawn
//!  cohort A    ├──── observed ─────┤ estimate             ├────·──┼·──────┼──────·┼─·─────┼───·───┤
//!  cohort B              ├──── observed ─────┤ estimate        one of each stride, at random
//!  cohort C                        ├──── observed ─────…
//! ```
//!
//! Each period a cohort begins, and the one that was begun two periods ago ends; in its last two periods the guest has
//! touched about
//!
//! ```text
//!  pages = population × came back / drawn  +  pages that came to the population by a touch meanwhile
//! ```
//!
//! distinct pages. The *population* is what had a content as the cohort was drawn, in memory or evicted: so nothing about it
//! changes when pages are evicted and come back, however often. What had none (absent, ballooned) and is touched needs no
//! sample: its fault is seen anyway and counted as an arrival.
//!
//! # How sure that is
//!
//! [`Estimate::error`] is the half width of the interval that holds the truth in 95 of 100 cases. The strides make the draw
//! even, so a working set that lies in one piece is found to a stride or two. What chance remains is estimated from the
//! neighbours in the cohort that differ: `Var(came back) ≈ ½ × changes`, at most what a draw without strides would have.
//! A share of 0 or 1 is not taken for certain: of 3 pages in each `drawn`, none is seen one time in 20. Pages that
//! fault-around filled count as touched, and are all of them part of the error. A page that was drawn comes back by its
//! own touch only ([`Sampler::between`]): one that came along with another would count as not used.
//!
//! Of too few pages, or when not all strides were drawn from ([`Sampler::spoil`]), nothing is said. Nor is it ever said that
//! more may have been touched than there is.
//!
//! # What lies between
//!
//! Memory that is used lies together, more or less, and so does memory that is not. Where two neighbours of a cohort have
//! not come back, what lies between them is more likely to be cold than what has not been touched first for longest
//! ([`Sampler::quiet_after`]): of pages that are resident and mapped nothing else is known.
//!
//! # How many are drawn
//!
//! What matters for the precision is how many come back, and that is what costs. So a cohort is as large as it takes for
//! [`RETURNS`] of it to come back by the share that was seen last, within its bounds: a guest with a small working set
//! has large cohorts that cost nothing, one that uses everything small ones.
//!
//! Nothing is allocated after [`Sampler::new`]; a touch costs two binary searches.

use std::ops::Range;

use crate::units::Pages;

/// Pages of a cohort that should come back: the error is then at most 8 % of the estimate.
pub const RETURNS: u64 = 600;

/// A cohort with fewer pages says nothing, unless these are all that there are.
pub const FEW: u64 = 16;

/// Least pages of a cohort, where there are as many.
pub const LEAST: u64 = 1024;

/// Half width of the interval that holds 95 % of a normal distribution, in standard deviations, squared.
const WIDTH_SQUARED: f64 = 1.96 * 1.96;

/// Pages in each `drawn` that no draw sees one time in 20, squared.
const UNSEEN_SQUARED: f64 = 9.0;

/// Pages that came to the population since the start, in totals: those that had no content and were touched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrivals {
    /// Pages that were touched.
    pub touched: Pages,
    /// Pages that were filled around those, touched or not.
    pub around: Pages,
}

/// Distinct pages that the guest has touched in the two periods of a cohort.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// How many.
    pub pages: Pages,
    /// The truth is at most this far away, in 95 of 100 cases.
    pub error: Pages,
    /// Pages that were drawn.
    pub drawn: u32,
    /// Of these, pages that were touched.
    pub returned: u32,
}

impl Estimate {
    /// The same, where it is known that the truth is at most `most`.
    pub fn within(self, most: Pages) -> Estimate {
        let pages = self.pages.min(most);
        Estimate { pages, error: self.error.min(pages.max(most.saturating_sub(pages))), ..self }
    }

    /// What it is worth when a period has passed of which nothing is known.
    pub fn stale(self) -> Estimate {
        Estimate { error: self.error + self.error.max(Pages(self.pages.0 / 8)), ..self }
    }
}

/// The ranks of the pages to be drawn, among those of the population in the order of their numbers; increasing, one in
/// each stride.
#[derive(Clone, Debug)]
pub struct Ranks {
    population: u64,
    size: u64,
    next: u64,
    random: Random,
}

impl Iterator for Ranks {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        if self.next == self.size {
            return None;
        }
        let bound = |stride: u64| (u128::from(stride) * u128::from(self.population) / u128::from(self.size)) as u64;
        let (from, to) = (bound(self.next), bound(self.next + 1));
        self.next += 1;
        Some(from + self.random.below(to - from))
    }
}

/// SplitMix64: a guest sees which pages were drawn, too late to make use of it.
#[derive(Clone, Debug)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}

/// Pages that were drawn at one time.
#[derive(Clone, Debug)]
struct Cohort {
    /// Their numbers, increasing.
    pages: Vec<u32>,
    /// A bit for each: it has come back.
    back: Vec<u64>,
    population: u64,
    /// Strides that the population was cut into; 0 when not all were drawn from.
    strides: u64,
    /// Arrivals before it was drawn.
    before: Arrivals,
}

impl Cohort {
    fn new(capacity: usize) -> Cohort {
        let back = vec![0; capacity.div_ceil(64)];
        Cohort { pages: Vec::with_capacity(capacity), back, population: 0, strides: 0, before: Arrivals::default() }
    }

    fn begin(&mut self, population: Pages, strides: u64, before: Arrivals) {
        self.pages.clear();
        self.back.fill(0);
        (self.population, self.strides, self.before) = (population.0, strides, before);
    }

    /// Where its pages of `pages` are in it.
    fn within(&self, pages: &Range<u32>) -> Range<usize> {
        let place = |page: u32| self.pages.partition_point(|drawn| *drawn < page);
        let first = place(pages.start);
        // Mostly the next one is beyond.
        if self.pages.get(first).is_none_or(|next| *next >= pages.end) { first..first } else { first..place(pages.end) }
    }

    fn touched(&mut self, pages: &Range<u32>) -> bool {
        let mut news = false;
        for at in self.within(pages) {
            news |= !self.is_back(at);
            self.back[at / 64] |= 1 << (at % 64);
        }
        news
    }

    /// The part of `pages` that lies around `page` and has no other page that is waited for.
    fn between(&self, page: u32, pages: Range<u32>) -> Range<u32> {
        let within = self.within(&pages);
        let waited_for = |at: &usize| !self.is_back(*at);
        let before = |at: &usize| self.pages[*at] < page;
        let last = within.clone().take_while(before).filter(waited_for).last();
        let next = within.skip_while(before).filter(waited_for).find(|at| self.pages[*at] > page);
        last.map_or(pages.start, |at| self.pages[at] + 1)..next.map_or(pages.end, |at| self.pages[at])
    }

    fn is_back(&self, at: usize) -> bool {
        self.back[at / 64] & (1 << (at % 64)) != 0
    }

    fn estimate(&self, now: Arrivals) -> Option<Estimate> {
        let drawn = self.pages.len();
        if self.strides < FEW.min(self.population) {
            return None;
        }
        let returned = (0..drawn).filter(|at| self.is_back(*at)).count();
        let changes = (1..drawn).filter(|at| self.is_back(*at) != self.is_back(at - 1)).count();
        // Pages that each drawn one stands for; and nothing is left to chance where all were drawn.
        let stride = self.population as f64 / self.strides.max(1) as f64;
        let left_out = 1.0 - self.strides as f64 / self.population.max(1) as f64;
        let chance = stride * ((UNSEEN_SQUARED + WIDTH_SQUARED * changes as f64 / 2.0) * left_out).sqrt();
        let touched = now.touched.saturating_sub(self.before.touched);
        let around = now.around.saturating_sub(self.before.around);
        let estimate = Estimate {
            pages: Pages((stride * returned as f64).round() as u64) + touched + around,
            error: Pages(chance.ceil() as u64) + around,
            drawn: drawn as u32,
            returned: returned as u32,
        };
        Some(estimate.within(Pages(self.population) + touched + around))
    }
}

/// The cohorts of one VM. See the module's documentation.
#[derive(Clone, Debug)]
pub struct Sampler {
    /// The older one first.
    cohorts: [Cohort; 2],
    capacity: u64,
    /// Pages that the next cohort should have.
    size: u64,
    /// Periods so far.
    periods: u64,
    random: Random,
}

impl Sampler {
    /// For cohorts of at most `capacity` pages. `seed` is not to be known to the guest.
    pub fn new(capacity: usize, seed: u64) -> Sampler {
        let cohorts = [Cohort::new(capacity), Cohort::new(capacity)];
        let capacity = capacity as u64;
        Sampler { cohorts, capacity, size: LEAST.min(capacity), periods: 0, random: Random(seed) }
    }

    /// A period ends and the next one begins: what the cohort of two periods ago says, and whom to draw for the new one.
    /// `population` is how many pages are kept now, `most` how many may be drawn.
    ///
    /// For each rank the caller finds the page ([`FrameTable::kept_at`]), moves it aside, unless it is there already or
    /// evicted, and tells [`Self::add`]; one that cannot be moved is left out.
    ///
    /// [`FrameTable::kept_at`]: crate::frame::FrameTable::kept_at
    pub fn turn(&mut self, population: Pages, arrivals: Arrivals, most: u64) -> (Option<Estimate>, Ranks) {
        let estimate = (self.periods >= 2).then(|| self.cohorts[0].estimate(arrivals)).flatten();
        if let Some(estimate) = estimate {
            self.size = next_size(&estimate, self.size).clamp(LEAST.min(self.capacity), self.capacity);
        }
        self.periods += 1;
        self.cohorts.swap(0, 1);
        let size = self.size.min(most).min(population.0);
        self.cohorts[1].begin(population, size, arrivals);
        // The copy draws from another sequence than the next turn's.
        let random = Random(self.random.next());
        (estimate, Ranks { population: population.0, size, next: 0, random })
    }

    /// The newest cohort could not be drawn to its end: it will say nothing.
    pub fn spoil(&mut self) {
        self.cohorts[1].strides = 0;
    }

    /// A page that was drawn for the newest cohort is aside. In increasing order.
    ///
    /// One that is out of order, or more than fits, is not taken: it would only not be found again.
    pub fn add(&mut self, page: u32) {
        let cohort = &mut self.cohorts[1];
        if cohort.pages.len() < cohort.pages.capacity() && cohort.pages.last().is_none_or(|last| *last < page) {
            cohort.pages.push(page);
        }
    }

    /// Pages that were aside have been touched. True when that is news of one that was drawn.
    ///
    /// Whoever brings others back with the one that was touched asks [`Self::between`] before: of those nothing would be
    /// known any more.
    pub fn touched(&mut self, pages: Range<u32>) -> bool {
        let [older, newer] = &mut self.cohorts;
        // One page may be in both.
        older.touched(&pages) | newer.touched(&pages)
    }

    /// The part of `pages` that may come back with `page`: up to the next ones whose own touch is waited for.
    pub fn between(&self, page: u32, pages: Range<u32>) -> Range<u32> {
        self.cohorts.iter().fold(pages, |pages, cohort| cohort.between(page, pages))
    }

    /// The pages between two neighbours of the older cohort of which neither has come back, from the `at`th pair on, which
    /// becomes the one after: in the middle of what is not used, for all that is known. `None` after the last.
    pub fn quiet_after(&self, at: &mut usize) -> Option<Range<u32>> {
        let older = &self.cohorts[0];
        while *at + 1 < older.pages.len() {
            let pair = *at;
            *at += 1;
            if !older.is_back(pair) && !older.is_back(pair + 1) {
                return Some(older.pages[pair] + 1..older.pages[pair + 1]);
            }
        }
        None
    }

    /// Pages that the next cohort should have, if nobody has less to give.
    pub fn size(&self) -> u64 {
        self.size
    }
}

/// The size of a cohort of which [`RETURNS`] come back, as far as one estimate says; at most twice what it was.
fn next_size(estimate: &Estimate, size: u64) -> u64 {
    let enough = RETURNS.saturating_mul(estimate.drawn.into()) / u64::from(estimate.returned.max(1));
    enough.min(size.saturating_mul(2))
}

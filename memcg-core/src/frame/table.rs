//! The table: records, block summaries, and transitions that keep lists and counters true.

use std::iter::successors;
use std::ops::Range;

use super::age::{Ages, Histogram, OLDEST, SWEEP, WorkingSet};
use super::links::{Links, List};
use super::state::{BadTransition, FrameState, Step, record};

/// Pages in a block: 2 MiB, what one huge page of the host covers.
pub const BLOCK: usize = 512;

/// The most pages that a table has: numbers of pages and blocks, and "none", fit 32 bits together.
const MOST: usize = (1 << 32) - (1 << 24);

/// Number of states.
const STATES: usize = FrameState::ALL.len();

/// What is known of a block of [`BLOCK`] pages; the last block of a table may have fewer. Its *members* are the pages
/// that have an age: all that are not ABSENT or BALLOONED.
#[derive(Clone, Debug)]
pub(super) struct Block {
    /// Pages in each state.
    pub counts: [u16; STATES],
    /// Generation of all members, when whole: their own records are not written then, so a block that was never split
    /// costs no memory for generations.
    pub generation: u16,
    /// All members have one key, generation and referenced flag: on a list they are one entry.
    pub whole: bool,
    /// The referenced flag of all members, when whole: their own is clear.
    pub referenced: bool,
    /// The key of all members, when whole and when there are any.
    pub key: u8,
    /// A page of it has had an age.
    pub touched: bool,
    /// A page of it was moved aside.
    pub aside: bool,
    /// It has been split.
    pub opened: bool,
}

impl Block {
    /// Number of pages that have an age.
    pub fn members(&self) -> usize {
        use FrameState::{Active, Discarding, Evicting, Idle, Moving, Swapped};
        let aged = [Active, Idle, Swapped, Moving, Evicting, Discarding];
        aged.iter().map(|state| usize::from(self.counts[*state as usize])).sum()
    }

    /// The list on which the members are one entry.
    pub fn list(&self) -> Option<List> {
        if self.whole && self.members() > 0 { List::of(FrameState::from_bits(self.key)) } else { None }
    }
}

/// The records of all pages of one VM, indexed by page number in guest RAM.
///
/// Every method that takes an index panics when it is out of range: the caller has validated page numbers before.
/// Nothing allocates after [`FrameTable::new`] but [`FrameTable::check`].
#[derive(Clone, Debug)]
pub struct FrameTable {
    /// State and flags.
    pub(super) bytes: Vec<u8>,
    pub(super) generations: Vec<u16>,
    pub(super) links: Links,
    pub(super) blocks: Vec<Block>,
    pub(super) counts: [u64; STATES],
    pub(super) entries: [usize; List::ALL.len()],
    pub(super) ages: Ages,
    /// Blocks that were ever touched, and ever split.
    pub(super) touched: u64,
    /// Blocks of which a page was ever moved aside.
    pub(super) aside: u64,
    /// A page was ever evicted.
    pub(super) evicted: bool,
    pub(super) opened: u64,
}

impl FrameTable {
    /// A table of `pages` records, all [`FrameState::Absent`].
    ///
    /// # Panics
    /// Above 2^32 - 2^24 pages (just below 16 TiB): links would not fit.
    pub fn new(pages: usize) -> FrameTable {
        assert!(pages <= MOST, "a frame table has at most {MOST} pages, not {pages}");
        let mut counts = [0; STATES];
        counts[FrameState::Absent as usize] = pages as u64;
        let block = |first: usize| {
            let pages = BLOCK.min(pages - first);
            let mut counts = [0; STATES];
            counts[FrameState::Absent as usize] = pages as u16;
            Block {
                counts,
                generation: 0,
                whole: true,
                referenced: false,
                key: 0,
                touched: false,
                aside: false,
                opened: false,
            }
        };
        FrameTable {
            bytes: vec![0; pages],
            generations: vec![0; pages],
            links: Links::new(pages + pages.div_ceil(BLOCK)),
            blocks: (0..pages).step_by(BLOCK).map(block).collect(),
            counts,
            entries: [0; List::ALL.len()],
            ages: Ages::new(0),
            touched: 0,
            aside: 0,
            evicted: false,
            opened: 0,
        }
    }

    /// Bytes of a table of `pages` records, everything included: eleven a page for the record, and for each block a
    /// summary. Saturates.
    pub const fn bytes_for(pages: u64) -> u64 {
        let record = (size_of::<u8>() + size_of::<u16>() + size_of::<[u32; 2]>()) as u64;
        Self::bytes_at_first(pages).saturating_add(pages.saturating_mul(record))
    }

    /// Of these, the bytes that are written when the table is made. The rest is written with use: [`Self::cost`].
    pub const fn bytes_at_first(pages: u64) -> u64 {
        let block = (size_of::<Block>() + size_of::<[u32; 2]>()) as u64;
        pages.div_ceil(BLOCK as u64).saturating_mul(block).saturating_add(size_of::<FrameTable>() as u64)
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True for a table without records.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// State of page `i`.
    pub fn state(&self, i: usize) -> FrameState {
        FrameState::from_bits(self.bytes[i])
    }

    /// Sets the state of page `i`; its block is split when its pages are no longer alike. Flags stay, but that a page was
    /// referenced is forgotten with its charge. An impossible transition is a bug of the caller and stops a debug build.
    #[inline]
    pub fn set(&mut self, i: usize, state: FrameState) {
        let block = i / BLOCK;
        if self.blocks[block].whole {
            if self.gather(block, i..i + 1, state) {
                return;
            }
            self.open(block);
        }
        let step = self.leave(block, i..i + 1, i..i + 1, state);
        self.ages.step(step, self.generations[i], 1, 1);
        if step.stamped {
            self.generations[i] = self.ages.now;
        }
        self.bytes[i] = self.bytes[i] & step.keep | step.set;
        self.arrive(block, i..i + 1, state);
    }

    /// Sets the state of page `i`, or refuses.
    ///
    /// # Errors
    /// [`BadTransition`] when there is no such transition; nothing has changed then.
    pub fn try_set(&mut self, i: usize, state: FrameState) -> Result<(), BadTransition> {
        let from = self.state(i);
        if !from.can_become(state) {
            return Err(BadTransition { index: i, from, to: state });
        }
        self.set(i, state);
        Ok(())
    }

    /// [`Self::set`] for each page of `start..end`. A whole block in the range makes one step, and stays whole.
    ///
    /// A page that becomes ACTIVE gets the current generation when it was charged just now or when it had been put
    /// aside (SWAPPED, or IDLE and MOVING): then it is a refault, and the page counts as referenced. A page that comes
    /// back from a claim that failed keeps its age.
    #[inline]
    pub fn set_range(&mut self, start: usize, end: usize, state: FrameState) {
        let mut at = start;
        while at < end {
            let block = at / BLOCK;
            let until = end.min((block + 1) * BLOCK);
            if until - at == 1 {
                self.set(at, state);
            } else {
                self.set_pages(block, at..until, state);
            }
            at = until;
        }
    }

    /// The step of several pages of one block.
    fn set_pages(&mut self, block: usize, mut pages: Range<usize>, to: FrameState) {
        let summary = &self.blocks[block];
        if summary.whole && pages.len() == summary.members() && pages == self.block_pages(block) {
            self.set_whole(block, to);
            return;
        }
        while !pages.is_empty() && self.blocks[block].whole {
            let run = self.same_key(pages.clone());
            if !self.gather(block, run.clone(), to) {
                self.open(block);
                break;
            }
            pages.start = run.end;
        }
        if !pages.is_empty() {
            self.set_part(block, pages, to);
        }
    }

    /// The first of `pages`, as many as have one key.
    fn same_key(&self, pages: Range<usize>) -> Range<usize> {
        let key = self.bytes[pages.start] & record::KEY;
        pages.start..pages.start + same(&self.bytes[pages], key, record::KEY)
    }

    /// The step of a run of one key in a whole block, when the block stays whole by it: pages without an age stay so, or
    /// are charged and alike to the members, if there are any. False when the block has to be opened first.
    #[inline]
    fn gather(&mut self, block: usize, run: Range<usize>, to: FrameState) -> bool {
        let summary = &self.blocks[block];
        let (bits, members) = (self.bytes[run.start], summary.members());
        let alike = FrameState::from_bits(summary.key) == FrameState::Active
            && summary.generation == self.ages.now
            && !summary.referenced;
        let joins = to == FrameState::Active && (members == 0 || alike);
        if has_age(FrameState::from_bits(bits)) || (has_age(to) && !joins) {
            return false;
        }
        let step = self.recount(block, run.clone(), to);
        for byte in &mut self.bytes[run.clone()] {
            *byte = *byte & step.keep | step.set;
        }
        if joins {
            let entry = self.block_entry(block);
            self.ages.step(step, 0, run.len() as u64, u64::from(members == 0));
            let summary = &mut self.blocks[block];
            (summary.generation, summary.referenced, summary.key) = (self.ages.now, false, to as u8);
            if members == 0 {
                self.list(entry, to);
            } else {
                self.rotate(List::Active, entry.start);
            }
        }
        true
    }

    /// The step of a whole block that is all members.
    fn set_whole(&mut self, block: usize, to: FrameState) {
        let pages = self.block_pages(block);
        let entry = self.block_entry(block);
        let step = self.leave(block, pages.clone(), entry.clone(), to);
        let summary = &mut self.blocks[block];
        self.ages.step(step, summary.generation, pages.len() as u64, 1);
        if step.stamped {
            summary.generation = self.ages.now;
        }
        summary.referenced = (summary.referenced && step.keep & record::REFERENCED != 0) || step.refault;
        summary.key = step.set & record::KEY;
        for byte in &mut self.bytes[pages] {
            *byte = *byte & step.keep | step.set & !record::REFERENCED;
        }
        self.list(entry, to);
    }

    /// The steps of pages of an open block, run by run of equal keys.
    #[inline]
    fn set_part(&mut self, block: usize, pages: Range<usize>, to: FrameState) {
        let mut at = pages.start;
        while at < pages.end {
            let run = self.same_key(at..pages.end);
            let step = self.leave(block, run.clone(), run.clone(), to);
            let generations = &mut self.generations[run.clone()];
            if step.leaves || step.refault {
                for equal in generations.chunk_by(|a, b| a == b) {
                    let only = Step { stamped: false, ..*step };
                    self.ages.step(&only, equal[0], equal.len() as u64, equal.len() as u64);
                }
            }
            if step.stamped {
                self.ages.cell(self.ages.now).add(run.len() as u64, run.len() as u64);
                generations.fill(self.ages.now);
            }
            for byte in &mut self.bytes[run.clone()] {
                *byte = *byte & step.keep | step.set;
            }
            at = run.end;
        }
        self.arrive(block, pages, to);
    }

    /// Takes `entries`, which are `pages` of one key, off their list, and counts them as `to`.
    ///
    /// This and what it calls is always inlined: it is on the fault path, and calls make a page's step half as long again.
    #[inline(always)]
    fn leave(&mut self, block: usize, pages: Range<usize>, entries: Range<usize>, to: FrameState) -> &'static Step {
        let from = self.state(pages.start);
        let step = self.recount(block, pages, to);
        if let Some(list) = List::of(from) {
            self.unlist(list, entries);
        }
        step
    }

    /// Counts `pages` of a block, which have one key, as `to`; returns what else their step does.
    #[inline(always)]
    fn recount(&mut self, block: usize, pages: Range<usize>, to: FrameState) -> &'static Step {
        let bits = self.bytes[pages.start];
        let from = FrameState::from_bits(bits);
        debug_assert!(from.can_become(to), "page {} is {from:?} and cannot become {to:?}", pages.start);
        if to == FrameState::Moving && !std::mem::replace(&mut self.blocks[block].aside, true) {
            self.aside += 1;
        }
        self.evicted |= to == FrameState::Swapped;
        if has_age(to) && !std::mem::replace(&mut self.blocks[block].touched, true) {
            self.touched += 1;
        }
        self.counts[from as usize] -= pages.len() as u64;
        self.counts[to as usize] += pages.len() as u64;
        let counts = &mut self.blocks[block].counts;
        counts[from as usize] -= pages.len() as u16;
        counts[to as usize] += pages.len() as u16;
        Step::of(bits, to)
    }

    /// Pages of an open block have been set to `state`: they are listed, or the block is whole now.
    #[inline(always)]
    fn arrive(&mut self, block: usize, pages: Range<usize>, state: FrameState) {
        let summary = &self.blocks[block];
        let alike = match state {
            FrameState::Absent | FrameState::Ballooned => summary.members() == 0,
            _ => usize::from(summary.counts[state as usize]) == self.block_pages(block).len(),
        };
        if !(alike && self.join(block, &pages, state)) {
            self.list(pages, state);
        }
    }

    /// Puts entries at the head of the list of `state`, if it has one.
    #[inline(always)]
    fn list(&mut self, entries: Range<usize>, state: FrameState) {
        if let Some(list) = List::of(state) {
            self.entries[list as usize] += entries.len();
            self.links.push(list, entries);
        }
    }

    /// Takes entries off their list.
    #[inline(always)]
    pub(super) fn unlist(&mut self, list: List, entries: Range<usize>) {
        self.entries[list as usize] -= entries.len();
        self.links.remove(list, entries);
    }

    /// Puts an entry, which is on `list`, to its head.
    #[inline]
    pub(super) fn rotate(&mut self, list: List, entry: usize) {
        if self.links.head(list) != Some(entry) {
            self.links.remove(list, entry..entry + 1);
            self.links.push(list, entry..entry + 1);
        }
    }

    /// Splits the block of page `i` when it is whole: its pages take its place in the list, the first one coldest. They
    /// become one entry again with the next change after which all 512 are alike in state, generation and reference.
    pub fn split(&mut self, i: usize) {
        assert!(i < self.len(), "page {i} is not in a table of {} pages", self.len());
        self.open(i / BLOCK);
    }

    #[inline]
    pub(super) fn open(&mut self, block: usize) {
        if self.blocks[block].whole {
            self.open_whole(block);
        }
    }

    fn open_whole(&mut self, block: usize) {
        let pages = self.block_pages(block);
        let summary = &self.blocks[block];
        let (members, list, key) = (summary.members(), summary.list(), summary.key);
        let Block { generation, referenced, .. } = *summary;
        self.blocks[block].whole = false;
        self.opened += u64::from(!std::mem::replace(&mut self.blocks[block].opened, true));
        if members == 0 {
            return;
        }
        self.generations[pages.clone()].fill(generation);
        if FrameState::from_bits(key).is_charged() {
            self.ages.cell(generation).entries += members as u64 - 1;
        }
        if referenced {
            let aged = |byte: &&mut u8| **byte & record::KEY == key;
            self.bytes[pages.clone()].iter_mut().filter(aged).for_each(|byte| *byte |= record::REFERENCED);
        }
        let Some(list) = list else { return };
        self.entries[list as usize] += members - 1;
        let (mut old, mut at) = (Some(self.block_entry(block).start), pages.start);
        let mut hottest = pages.start;
        while at < pages.end {
            let run = self.same_key(at..pages.end);
            at = run.end;
            if self.state(run.start) == list.state() {
                match old.take() {
                    Some(old) => self.links.replace(list, old, run.clone()),
                    None => self.links.insert_above(list, hottest, run.clone()),
                }
                hottest = run.end - 1;
            }
        }
    }

    /// Makes an open block whole whose members are all in `state`, or that has none. When there are members all pages are,
    /// and they must be alike in all else too; their entry comes to the head. Only `changed`, which came last, are on no
    /// list yet. False when the block stays open.
    fn join(&mut self, block: usize, changed: &Range<usize>, state: FrameState) -> bool {
        let pages = self.block_pages(block);
        let (byte, generation) = (self.bytes[pages.start], self.generations[pages.start]);
        if has_age(state) {
            let mask = record::KEY | record::REFERENCED;
            let alike = same(&self.bytes[pages.clone()], byte & mask, mask) == pages.len()
                && self.generations[pages.clone()].iter().fold(0, |differ, g| differ | (g ^ generation)) == 0;
            if !alike {
                return false;
            }
        }
        if let Some(list) = List::of(state) {
            self.unlist(list, pages.start..changed.start);
            self.unlist(list, changed.end..pages.end);
        }
        if state.is_charged() {
            self.ages.cell(generation).entries -= pages.len() as u64 - 1;
        }
        let referenced = byte & record::REFERENCED != 0;
        if referenced {
            self.bytes[pages].iter_mut().for_each(|byte| *byte &= !record::REFERENCED);
        }
        self.blocks[block] =
            Block { generation, whole: true, referenced, key: byte & record::KEY, ..self.blocks[block] };
        self.list(self.block_entry(block), state);
        true
    }

    /// The state of page `i` and the end of the run of pages in that state that starts there, at most `end`.
    /// For `i >= end` the run is empty: `(state, i)`.
    pub fn run(&self, i: usize, end: usize) -> (FrameState, usize) {
        let state = self.state(i);
        let end = end.min(self.len());
        if i >= end {
            return (state, i);
        }
        (state, i + same(&self.bytes[i..end], state as u8, record::STATE))
    }

    /// The block of page `i`, when all its pages are charged and alike: one entry of a list.
    pub fn whole_block(&self, i: usize) -> Option<Range<usize>> {
        let (summary, pages) = (&self.blocks[i / BLOCK], self.block_pages(i / BLOCK));
        (summary.whole && summary.members() == pages.len()).then_some(pages)
    }

    /// Number of pages in `state`.
    pub fn count(&self, state: FrameState) -> u64 {
        self.counts[state as usize]
    }

    /// Number of pages that are charged to memory ([`FrameState::is_charged`]).
    pub fn charged(&self) -> u64 {
        FrameState::ALL.iter().filter(|state| state.is_charged()).map(|state| self.count(*state)).sum()
    }

    /// Number of entries of `list`: a page, or all pages of a whole block. In pages it is [`Self::count`] of the list's
    /// state.
    pub fn entries(&self, list: List) -> usize {
        self.entries[list as usize]
    }

    /// The pages on `list` as runs, the next victim first. An entry is one run, or several when its block has pages in
    /// other states.
    pub fn iter(&self, list: List) -> impl Iterator<Item = Range<usize>> + '_ {
        self.links.iter(list).flat_map(move |entry| {
            let pages = self.entry_pages(entry);
            let run = move |at: usize| (at < pages.end).then(|| self.same_key(at..pages.end));
            successors(run(self.entry_pages(entry).start), move |last| run(last.end))
                .filter(move |run| self.state(run.start) == list.state())
        })
    }

    /// The pages of an entry by its number in the links: of a block all pages, members or not.
    pub(super) fn entry_pages(&self, entry: usize) -> Range<usize> {
        match entry.checked_sub(self.len()) {
            Some(block) => self.block_pages(block),
            None => entry..entry + 1,
        }
    }

    /// The number in the links of a whole block, as a range of one.
    #[inline]
    fn block_entry(&self, block: usize) -> Range<usize> {
        self.len() + block..self.len() + block + 1
    }

    /// The pages of a block.
    #[inline]
    pub(super) fn block_pages(&self, block: usize) -> Range<usize> {
        block * BLOCK..self.len().min((block + 1) * BLOCK)
    }

    /// Whether a fault waits for the claim on page `i` to end. Reclaim leaves such a page alone.
    pub fn wanted(&self, i: usize) -> bool {
        self.bytes[i] & record::WANTED != 0
    }

    /// Sets [`Self::wanted`].
    pub fn set_wanted(&mut self, i: usize, on: bool) {
        self.set_flag(i, record::WANTED, on);
    }

    /// Whether page `i` is in use by somebody who has its address (a device at work on it). Reclaim leaves it alone.
    pub fn pinned(&self, i: usize) -> bool {
        self.bytes[i] & record::PINNED != 0
    }

    /// Sets [`Self::pinned`].
    pub fn set_pinned(&mut self, i: usize, on: bool) {
        self.set_flag(i, record::PINNED, on);
    }

    /// Whether page `i` belongs to a huge page of the host, which must be split before a part of it is given back.
    pub fn huge(&self, i: usize) -> bool {
        self.bytes[i] & record::HUGE != 0
    }

    /// Sets [`Self::huge`].
    pub fn set_huge(&mut self, i: usize, on: bool) {
        self.set_flag(i, record::HUGE, on);
    }

    fn set_flag(&mut self, i: usize, flag: u8, on: bool) {
        if on {
            self.bytes[i] |= flag;
        } else {
            self.bytes[i] &= !flag;
        }
    }

    /// Where the content of page `i` is kept, as [`Self::set_place`] said. Means nothing unless the page is SWAPPED.
    pub fn place(&self, i: usize) -> u32 {
        self.links.note(i)
    }

    /// Notes where the content of page `i`, which is SWAPPED, is kept. It takes the place of the page's links: a page
    /// without memory is on no list. So an evicted page has no larger record than others (its block is counted as split,
    /// because its pages' links are written).
    pub fn set_place(&mut self, i: usize, place: u32) {
        debug_assert_eq!(self.state(i), FrameState::Swapped, "page {i} is not in the store");
        self.opened += u64::from(!std::mem::replace(&mut self.blocks[i / BLOCK].opened, true));
        self.links.set_note(i, place);
    }

    /// Whether page `i` was seen in use since a scan last came by. All members of a whole block have one answer.
    pub fn referenced(&self, i: usize) -> bool {
        let block = &self.blocks[i / BLOCK];
        if block.whole { block.referenced && has_age(self.state(i)) } else { self.bytes[i] & record::REFERENCED != 0 }
    }

    /// Page `i` was seen in use: it gets the current generation and a second chance at the next scan, and with it its
    /// whole block. Without effect on a page that is not charged.
    pub fn touch(&mut self, i: usize) {
        if !self.state(i).is_charged() {
            return;
        }
        let block = &mut self.blocks[i / BLOCK];
        if block.whole {
            self.ages.touch(block.generation, block.members() as u64, 1);
            (block.generation, block.referenced) = (self.ages.now, true);
        } else {
            self.ages.touch(self.generations[i], 1, 1);
            self.generations[i] = self.ages.now;
            self.bytes[i] |= record::REFERENCED;
        }
    }

    /// The current generation. It wraps.
    pub fn generation(&self) -> u16 {
        self.ages.now
    }

    /// Generations since page `i` was last seen in use, as far as that matters: `None` for a page that is ABSENT or
    /// BALLOONED. Exact up to 2^15; an older page is said to be at least that old.
    pub fn age(&self, i: usize) -> Option<u16> {
        let block = &self.blocks[i / BLOCK];
        let generation = if block.whole { block.generation } else { self.generations[i] };
        has_age(self.state(i)).then(|| self.ages.age(generation))
    }

    /// Begins the next generation. The caller's clock says when; a generation is as long as the caller likes.
    ///
    /// Looks at one block in 2^14 and at least one, to keep very old pages from wrapping to young.
    pub fn advance_generation(&mut self) {
        self.ages.advance();
        for _ in 0..self.blocks.len().div_ceil(SWEEP) {
            let block = self.ages.hand;
            self.ages.hand = (block + 1) % self.blocks.len();
            let (now, pages) = (self.ages.now, self.block_pages(block));
            let clamp = |g: &mut u16| {
                if now.wrapping_sub(*g) > OLDEST {
                    *g = now.wrapping_sub(OLDEST);
                }
            };
            match &mut self.blocks[block] {
                summary if summary.whole => clamp(&mut summary.generation),
                _ => self.generations[pages].iter_mut().for_each(clamp),
            }
        }
    }

    /// The charged pages by age.
    pub fn ages(&self) -> Histogram {
        self.ages.histogram()
    }

    /// Refaults so far by the age that the page had: how many generations after its last use it was missed. Many young
    /// ones mean that pages are put aside too early.
    pub fn refaults(&self) -> Histogram {
        self.ages.refaults()
    }

    /// Charged pages seen in use in the last `generations` generations, the current one included. More than 64 are
    /// taken for 64.
    pub fn working_set(&self, generations: u16) -> WorkingSet {
        self.ages.working_set(generations)
    }
}

/// Whether the generation of a page in `state` says something: it is charged, or it was and will be asked for again.
pub(super) const fn has_age(state: FrameState) -> bool {
    !matches!(state, FrameState::Absent | FrameState::Ballooned)
}

/// How many of the first of `bytes` are `value` under `mask`. Compares 64 at a time without a branch.
#[inline]
pub(super) fn same(bytes: &[u8], value: u8, mask: u8) -> usize {
    let differs = |chunk: &[u8]| chunk.iter().fold(0, |differ, byte| differ | (byte ^ value)) & mask != 0;
    let equal = 64 * bytes.chunks_exact(64).take_while(|chunk| !differs(chunk)).count();
    equal + bytes[equal..].iter().take_while(|byte| (**byte ^ value) & mask == 0).count()
}

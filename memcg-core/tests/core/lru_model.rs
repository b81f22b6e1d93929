//! Random sequences of everything that a frame table can do, against plain vectors: a page is a struct, a list is a
//! `VecDeque`, every number is counted from scratch.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use memcg_core::Pages;
use memcg_core::frame::{BLOCK, FrameState, FrameTable, Histogram, List, Scan, Scanned, WorkingSet};
use proptest::prelude::*;

use FrameState::{Absent, Active, Ballooned, Idle, Moving, Swapped};

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Page {
    state: FrameState,
    /// Generation of the last use, counted without wrapping.
    used: u64,
    referenced: bool,
    was_idle: bool,
    wanted: bool,
    pinned: bool,
    huge: bool,
}

impl Page {
    fn ageless(&self) -> bool {
        matches!(self.state, Absent | Ballooned)
    }

    fn alike(&self, other: &Page) -> bool {
        let detail = |p: &Page| (p.used, p.referenced, p.was_idle);
        self.state == other.state && (self.ageless() || detail(self) == detail(other))
    }
}

/// An entry of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Entry {
    Page(usize),
    /// All pages of a block that have an age.
    Block(usize),
}

#[derive(Clone, Debug, Default)]
struct Model {
    pages: Vec<Page>,
    /// Active and idle, the next victim in front.
    lists: [VecDeque<Entry>; 2],
    /// Numbers of the blocks whose pages with an age are one entry.
    whole: BTreeSet<usize>,
    now: u64,
    refaults: Vec<u64>,
}

fn list_of(state: FrameState) -> Option<usize> {
    match state {
        Active => Some(0),
        Idle => Some(1),
        _ => None,
    }
}

impl Model {
    fn new(pages: usize) -> Model {
        let blocks = (0..pages.div_ceil(BLOCK)).collect();
        Model { pages: vec![Page::default(); pages], whole: blocks, ..Model::default() }
    }

    fn block(&self, block: usize) -> Range<usize> {
        block * BLOCK..self.pages.len().min((block + 1) * BLOCK)
    }

    /// The pages of a block that have an age.
    fn aged(&self, block: usize) -> Vec<usize> {
        self.block(block).filter(|i| !self.pages[*i].ageless()).collect()
    }

    fn entry_pages(&self, entry: Entry) -> Vec<usize> {
        match entry {
            Entry::Page(i) => vec![i],
            Entry::Block(block) => self.aged(block),
        }
    }

    fn change(&mut self, i: usize, to: FrameState) {
        let (now, page) = (self.now, &mut self.pages[i]);
        let refault = to == Active && (page.state == Swapped || (page.state == Moving && page.was_idle));
        if refault {
            self.refaults.push(now - page.used);
        }
        if refault || (!page.state.is_charged() && to.is_charged()) {
            (page.used, page.referenced) = (now, refault);
        }
        page.referenced &= to.is_charged();
        page.was_idle = page.state == Idle && to == Moving;
        page.state = to;
    }

    fn unlist(&mut self, pages: &Range<usize>) {
        let gone = |entry: &Entry| matches!(entry, Entry::Page(i) if pages.contains(i));
        self.lists.iter_mut().for_each(|list| list.retain(|entry| !gone(entry)));
    }

    /// To the head of its list, if its pages are on one.
    fn list(&mut self, entry: Entry) {
        if let Entry::Block(_) = entry {
            self.lists.iter_mut().for_each(|list| list.retain(|e| *e != entry));
        }
        if let Some(list) = self.entry_pages(entry).first().and_then(|i| list_of(self.pages[*i].state)) {
            self.lists[list].push_back(entry);
        }
    }

    fn split(&mut self, block: usize) {
        let aged = self.aged(block);
        if self.whole.remove(&block) {
            for list in &mut self.lists {
                let parts = |entry| match entry {
                    Entry::Block(b) if b == block => aged.iter().map(|i| Entry::Page(*i)).collect(),
                    other => vec![other],
                };
                *list = list.drain(..).flat_map(parts).collect();
            }
        }
    }

    /// Whether page `i` may become `to` without a split: it has no age before, and none after or that of its block.
    fn gathers(&self, i: usize, to: FrameState) -> bool {
        let new = Page { state: to, used: self.now, ..Page::default() };
        let same = || to == Active && self.aged(i / BLOCK).iter().all(|other| self.pages[*other].alike(&new));
        self.pages[i].ageless() && (new.ageless() || same())
    }

    fn set_range(&mut self, range: Range<usize>, to: FrameState) {
        for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            let all = self.block(block);
            let mut part = range.start.max(all.start)..range.end.min(all.end);
            if self.whole.contains(&block) && part == all && self.aged(block).len() == all.len() {
                part.for_each(|i| self.change(i, to));
                self.list(Entry::Block(block));
                continue;
            }
            // Looked at page by page for the first, and then only where the answer may be another one.
            while self.whole.contains(&block) && !part.is_empty() {
                if !self.gathers(part.start, to) {
                    self.split(block);
                    break;
                }
                let run = part.clone().take_while(|i| self.pages[*i].state == self.pages[part.start].state).count();
                (part.start..part.start + run).for_each(|i| self.change(i, to));
                if to == Active {
                    self.list(Entry::Block(block));
                }
                part.start += run;
            }
            if part.is_empty() {
                continue;
            }
            self.unlist(&part);
            part.clone().for_each(|i| self.change(i, to));
            let aged = self.aged(block);
            let full = aged.len() == all.len() && all.clone().all(|i| self.pages[i].alike(&self.pages[all.start]));
            if full || aged.is_empty() {
                self.unlist(&all);
                self.whole.insert(block);
                self.list(Entry::Block(block));
            } else {
                part.for_each(|i| self.list(Entry::Page(i)));
            }
        }
    }

    fn touch(&mut self, i: usize) {
        let pages = if self.whole.contains(&(i / BLOCK)) { self.aged(i / BLOCK) } else { vec![i] };
        if self.pages[i].state.is_charged() {
            pages.into_iter().for_each(|i| (self.pages[i].used, self.pages[i].referenced) = (self.now, true));
        }
    }

    fn isolate(&mut self, scan: &Scan) -> (Scanned, Vec<Range<usize>>) {
        let (mut done, mut taken, mut seen) = (Scanned::default(), Vec::new(), BTreeSet::new());
        let list = scan.list as usize;
        while done.entries < scan.budget && done.taken < scan.want {
            let Some(&entry) = self.lists[list].front().filter(|entry| !seen.contains(*entry)) else { break };
            let pages = self.entry_pages(entry);
            let n = pages.len() as u64;
            let area = if let Entry::Block(block) = entry { self.block(block) } else { pages[0]..pages[0] + 1 };
            let within = area.clone().filter(|i| scan.within.contains(i)).count();
            let busy = area.clone().any(|i| self.pages[i].pinned || self.pages[i].wanted);
            let referenced = within > 0 && self.pages[pages[0]].referenced;
            let too_much = scan.fine && done.taken + n > scan.want;
            let parts = pages.len() < area.len() || within < area.len() || busy || too_much;
            if let Entry::Block(block) = entry
                && within > 0
                && !referenced
                && parts
            {
                self.split(block);
                continue;
            }
            seen.insert(entry);
            done.entries += 1;
            done.scanned += n;
            if within == 0 || busy || referenced {
                self.lists[list].rotate_left(1);
            } else {
                self.set_range(area.clone(), if list == 0 { Moving } else { FrameState::Evicting });
                done.taken += n;
                taken.push(area);
            }
            if referenced {
                pages.into_iter().for_each(|i| self.pages[i].referenced = false);
                done.referenced += n;
            }
        }
        (done, taken)
    }

    fn histogram(ages: impl Iterator<Item = u64>) -> Histogram {
        let mut histogram = Histogram::default();
        for age in ages {
            let from = Histogram::FROM.iter().filter(|from| u64::from(**from) <= age).count();
            histogram.pages[from - 1] += Pages(1);
        }
        histogram
    }

    fn working_set(&self, generations: u64) -> WorkingSet {
        let hot = |i: &usize| self.pages[*i].state.is_charged() && self.now - self.pages[*i].used < generations;
        let blocks = self.whole.iter().filter_map(|block| self.aged(*block).first().copied());
        let singles = (0..self.pages.len()).filter(|i| !self.whole.contains(&(i / BLOCK)));
        WorkingSet {
            at_least: Pages(singles.chain(blocks).filter(hot).count() as u64),
            at_most: Pages((0..self.pages.len()).filter(hot).count() as u64),
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// One page to any state, allowed or not.
    Try(usize, usize),
    /// As far as allowed, from a page on to one of the states that it may go to. With the last one set, whole blocks.
    Range(usize, usize, usize, bool),
    /// As `Range`, for each run of pages that are in one state. Claims end, lists grow long.
    Sweep(usize, usize),
    Touch(usize),
    Flag(usize, u8, bool),
    Split(usize),
    Advance(u64),
    Isolate(Scan),
}

fn op() -> impl Strategy<Value = Op> {
    let page = || 0usize..3000;
    let count = || prop_oneof![1usize..4, 1usize..600, Just(BLOCK), 1usize..3000];
    let list = prop_oneof![Just(List::Active), Just(List::Idle)];
    let within = prop_oneof![3 => Just(0..usize::MAX), 1 => (page(), count()).prop_map(|(from, n)| from..from + n)];
    let want = prop_oneof![0u64..20, 1u64..1500, Just(u64::MAX)];
    let scan = (list, prop_oneof![0usize..10, 1usize..1500], want, within, any::<bool>());
    let scan = scan.prop_map(|(list, budget, want, within, fine)| Scan { list, budget, want, within, fine });
    prop_oneof![
        2 => (page(), 0usize..8).prop_map(|(i, to)| Op::Try(i, to)),
        6 => (page(), count(), 0usize..4, any::<bool>()).prop_map(|(i, n, to, whole)| Op::Range(i, n, to, whole)),
        1 => (0usize..8, 0usize..4).prop_map(|(from, to)| Op::Sweep(from, to)),
        2 => page().prop_map(Op::Touch),
        1 => (page(), 0u8..3, any::<bool>()).prop_map(|(i, flag, on)| Op::Flag(i, flag, on)),
        1 => page().prop_map(Op::Split),
        2 => prop_oneof![4 => 1u64..4, 1 => 4u64..80].prop_map(Op::Advance),
        3 => scan.prop_map(Op::Isolate),
    ]
}

/// The `n`th of the states that come after `from`.
fn next(from: FrameState, n: usize) -> FrameState {
    let next: Vec<_> = FrameState::ALL.into_iter().filter(|to| from.can_become(*to)).collect();
    next[n % next.len()]
}

fn set_range(table: &mut FrameTable, model: &mut Model, range: Range<usize>, to: FrameState) {
    let allowed = range.clone().take_while(|i| model.pages[*i].state.can_become(to)).count();
    let end = range.start + allowed;
    table.set_range(range.start, end, to);
    model.set_range(range.start..end, to);
}

fn step(table: &mut FrameTable, model: &mut Model, op: &Op) -> Result<(), TestCaseError> {
    let len = model.pages.len();
    match op {
        Op::Try(i, to) => {
            let (i, to) = (i % len, FrameState::ALL[*to]);
            let allowed = model.pages[i].state.can_become(to);
            prop_assert_eq!(table.try_set(i, to).is_ok(), allowed);
            if allowed {
                model.set_range(i..i + 1, to);
            }
        }
        Op::Range(i, n, to, whole) => {
            let i = if *whole { i % len / BLOCK * BLOCK } else { i % len };
            let n = if *whole { n.next_multiple_of(BLOCK) } else { *n };
            let to = next(model.pages[i].state, *to);
            set_range(table, model, i..len.min(i + n), to);
        }
        Op::Sweep(from, to) => {
            let (from, mut at) = (FrameState::ALL[*from], 0);
            while at < len {
                let (state, end) = table.run(at, len);
                if state == from {
                    set_range(table, model, at..end, next(from, *to));
                }
                at = end;
            }
        }
        Op::Touch(i) => {
            table.touch(i % len);
            model.touch(i % len);
        }
        Op::Flag(i, flag, on) => {
            let (i, on) = (i % len, *on);
            match flag {
                0 => (table.set_wanted(i, on), model.pages[i].wanted = on),
                1 => (table.set_pinned(i, on), model.pages[i].pinned = on),
                _ => (table.set_huge(i, on), model.pages[i].huge = on),
            };
        }
        Op::Split(i) => {
            table.split(i % len);
            model.split(i % len / BLOCK);
        }
        Op::Advance(n) => {
            (0..*n).for_each(|_| table.advance_generation());
            model.now += n;
        }
        Op::Isolate(scan) => {
            let (mut taken, expected) = (Vec::new(), model.isolate(scan));
            let done = table.isolate(scan, |pages| taken.push(pages));
            prop_assert!(done.taken + done.referenced <= done.scanned && done.entries <= scan.budget);
            prop_assert_eq!((done, taken), expected);
        }
    }
    Ok(())
}

fn compare(table: &FrameTable, model: &Model) -> Result<(), TestCaseError> {
    prop_assert_eq!(table.check(), []);
    let mut counts = [0u64; 8];
    for (i, page) in model.pages.iter().enumerate() {
        counts[page.state as usize] += 1;
        let flags = (table.referenced(i), table.wanted(i), table.pinned(i), table.huge(i));
        let expected = (page.referenced, page.wanted, page.pinned, page.huge);
        let age = (!page.ageless()).then_some((model.now - page.used) as u16);
        if (table.state(i), flags, table.age(i)) != (page.state, expected, age) {
            prop_assert_eq!((i, table.state(i), flags, table.age(i)), (i, page.state, expected, age));
        }
    }
    for state in FrameState::ALL {
        prop_assert_eq!(table.count(state), counts[state as usize]);
    }
    let mut listed = 0;
    for list in List::ALL {
        let expected = &model.lists[list as usize];
        let expected_pages = expected.iter().flat_map(|entry| model.entry_pages(*entry));
        prop_assert!(table.iter(list).flatten().eq(expected_pages.clone()), "{list:?}");
        prop_assert_eq!(table.entries(list), expected.len());
        listed += expected_pages.count() as u64;
    }
    let charged = || model.pages.iter().filter(|page| page.state.is_charged());
    let isolated = charged().filter(|page| page.state.is_claim()).count() as u64;
    prop_assert_eq!((table.charged(), listed + isolated), (charged().count() as u64, table.charged()));
    prop_assert_eq!(table.ages(), Model::histogram(charged().map(|page| model.now - page.used)));
    prop_assert_eq!(table.refaults(), Model::histogram(model.refaults.iter().copied()));
    for generations in [1, 3, 64] {
        prop_assert_eq!(table.working_set(generations), model.working_set(generations.into()));
    }
    Ok(())
}

proptest! {
    /// One view of a frame, whoever looks: lists are the deques, in order; listed and isolated pages are the charged ones;
    /// links are sound in both directions; blocks are uniform; flags, counts and ages are those of the pages one by one.
    /// Some tables begin just before generations wrap.
    /// Semantics (table): 35, 36, 37, 38, 39, 52, 104, 109, 112, B27, B31, B32, B86.
    #[test]
    fn the_table_agrees_with_plain_vectors(
        len in prop_oneof![3 => 1usize..40, 2 => 500usize..530, 2 => 1020usize..1100, 1 => 1usize..3000],
        wraps in prop::bool::weighted(0.1),
        ops in prop::collection::vec(op(), 1..50),
    ) {
        let (mut table, mut model) = (FrameTable::new(len), Model::new(len));
        (0..if wraps { 65_500 } else { 0 }).for_each(|_| table.advance_generation());
        for op in &ops {
            step(&mut table, &mut model, op)?;
            compare(&table, &model)?;
        }
    }
}

//! The lists: index-linked, so that a page costs eight bytes and no list ever allocates.

use std::iter::successors;
use std::ops::Range;

use super::state::FrameState;

/// The lists of a table. Membership is the state: a page is on a list exactly while it is in the list's state.
///
/// There are two, because two states have memory that reclaim may take: `active` is what is aged, `idle` is what is
/// evicted. One mixed list would make each scan walk the other's pages (B86). ABSENT and BALLOONED have no memory,
/// SWAPPED has none in RAM and is only ever asked for by its number, and a claim is on no list because it is
/// *isolated*: nobody but the claimer may act on it (B32).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum List {
    /// Pages in [`FrameState::Active`].
    Active = 0,
    /// Pages in [`FrameState::Idle`].
    Idle = 1,
}

impl List {
    /// Both lists.
    pub const ALL: [List; 2] = [List::Active, List::Idle];

    /// The state of the pages on this list.
    pub const fn state(self) -> FrameState {
        match self {
            List::Active => FrameState::Active,
            List::Idle => FrameState::Idle,
        }
    }

    /// The claim that takes a page off this list for reclaim: active pages are moved aside, idle ones evicted.
    pub const fn claim(self) -> FrameState {
        match self {
            List::Active => FrameState::Moving,
            List::Idle => FrameState::Evicting,
        }
    }

    /// The list of pages in `state`, if they are on one.
    pub const fn of(state: FrameState) -> Option<List> {
        match state {
            FrameState::Active => Some(List::Active),
            FrameState::Idle => Some(List::Idle),
            FrameState::Absent
            | FrameState::Swapped
            | FrameState::Ballooned
            | FrameState::Moving
            | FrameState::Evicting
            | FrameState::Discarding => None,
        }
    }
}

/// The neighbour towards the head, the end of the hot pages, in a link; and the head among the ends of a list.
const HEAD: usize = 0;
/// The neighbour towards the tail, the end of the next victim.
const TAIL: usize = 1;

/// Links of all pages and all blocks, and the ends of all lists.
///
/// An entry is a number: of a page, or the number of pages plus that of a whole block. So a block that is never split
/// needs no memory for its pages' links.
///
/// A link is stored one too high: 0 is "none", and fresh memory needs no initialisation. Links of entries that are on no
/// list mean nothing and are not cleared.
#[derive(Clone, Debug)]
pub(super) struct Links {
    entries: Vec<[u32; 2]>,
    ends: [[u32; 2]; List::ALL.len()],
}

impl Links {
    /// Links for `entries` entries, all lists empty.
    pub fn new(entries: usize) -> Links {
        Links { entries: vec![[0; 2]; entries], ends: [[0; 2]; List::ALL.len()] }
    }

    /// The entry at the tail.
    pub fn tail(&self, list: List) -> Option<usize> {
        index(self.ends[list as usize][TAIL])
    }

    /// The entry at the head.
    pub fn head(&self, list: List) -> Option<usize> {
        index(self.ends[list as usize][HEAD])
    }

    /// The neighbour of entry `i` towards the head.
    pub fn hotter(&self, i: usize) -> Option<usize> {
        index(self.entries[i][HEAD])
    }

    /// The neighbour of entry `i` towards the tail.
    pub fn colder(&self, i: usize) -> Option<usize> {
        index(self.entries[i][TAIL])
    }

    /// What was noted for entry `i` while it is on no list.
    pub fn note(&self, i: usize) -> u32 {
        self.entries[i][HEAD]
    }

    /// Notes a number for entry `i`, which is on no list and keeps it until it is on one.
    pub fn set_note(&mut self, i: usize, note: u32) {
        self.entries[i][HEAD] = note;
    }

    /// What was noted beside that.
    pub fn turn(&self, i: usize) -> u32 {
        self.entries[i][TAIL]
    }

    /// Notes another number for entry `i`, which is on no list.
    pub fn set_turn(&mut self, i: usize, turn: u32) {
        self.entries[i][TAIL] = turn;
    }

    /// The entries of a list, coldest first.
    pub fn iter(&self, list: List) -> impl Iterator<Item = usize> + '_ {
        successors(self.tail(list), |i| self.hotter(*i))
    }

    /// Puts each of `entries` at the head, the first one first.
    #[inline(always)]
    pub fn push(&mut self, list: List, entries: Range<usize>) {
        self.chain(list, self.ends[list as usize][HEAD], entries, 0);
    }

    /// Takes `entries`, all of them on `list`, off it. Neighbouring numbers that are neighbours in the list, as a walk
    /// leaves them, are cut out together.
    #[inline(always)]
    pub fn remove(&mut self, list: List, entries: Range<usize>) {
        let mut at = entries.start;
        while at < entries.end {
            let mut last = at;
            while last + 1 < entries.end && self.entries[last][HEAD] == link(last + 1) {
                last += 1;
            }
            let (above, below) = (self.entries[last][HEAD], self.entries[at][TAIL]);
            *self.link_below(list, above) = below;
            *self.link_above(list, below) = above;
            at = last + 1;
        }
    }

    /// Puts `entries` in the place of `old`: the first coldest, the last hottest.
    pub fn replace(&mut self, list: List, old: usize, entries: Range<usize>) {
        let [above, below] = self.entries[old];
        self.chain(list, below, entries, above);
    }

    /// Puts `entries` next to `entry`, on its hot side.
    pub fn insert_above(&mut self, list: List, entry: usize, entries: Range<usize>) {
        self.chain(list, link(entry), entries, self.entries[entry][HEAD]);
    }

    /// Links `entries` between the links `below` and `above`.
    #[inline(always)]
    fn chain(&mut self, list: List, below: u32, entries: Range<usize>, above: u32) {
        if entries.is_empty() {
            return;
        }
        let (first, last) = (entries.start, entries.end - 1);
        for i in first..last {
            self.entries[i][HEAD] = link(i + 1);
            self.entries[i + 1][TAIL] = link(i);
        }
        self.entries[first][TAIL] = below;
        self.entries[last][HEAD] = above;
        *self.link_above(list, below) = link(first);
        *self.link_below(list, above) = link(last);
    }

    /// Where it is written what comes above `below`: in that entry, or in the list's tail when there is none.
    fn link_above(&mut self, list: List, below: u32) -> &mut u32 {
        match index(below) {
            Some(i) => &mut self.entries[i][HEAD],
            None => &mut self.ends[list as usize][TAIL],
        }
    }

    /// Where it is written what comes below `above`: in that entry, or in the list's head when there is none.
    fn link_below(&mut self, list: List, above: u32) -> &mut u32 {
        match index(above) {
            Some(i) => &mut self.entries[i][TAIL],
            None => &mut self.ends[list as usize][HEAD],
        }
    }
}

/// Page `i` as a link.
fn link(i: usize) -> u32 {
    i as u32 + 1
}

/// The page that a link names.
fn index(link: u32) -> Option<usize> {
    (link as usize).checked_sub(1)
}

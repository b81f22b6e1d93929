//! The state of every page of guest RAM.
//!
//! ```text
//!            touch (charge, fill)              claim             by the result
//!  ABSENT ───────────────────────► ACTIVE ◄────────────► MOVING ◄─────────────► IDLE
//!   ▲  │ ▲                          │  ▲ ▲                                      │  ▲ │
//!   │  │ └──────────┐         claim │  │ └── touch (charge, decompress) ──┐     │  │ │
//!   │  │            │               ▼  │ the discard failed              │     │  │ │
//!   │  │ inflate    └────────── DISCARDING ◄── claim, from IDLE too ───────┼─────┘  │ │ claim
//!   │  ▼                            │                                     │        │ ▼
//!  BALLOONED ◄──────────────────────┘                                SWAPPED ◄── EVICTING
//!   └─ touch: ACTIVE (implicit deflate)           discard: ABSENT, BALLOONED ◄┘
//! ```
//!
//! MOVING, EVICTING and DISCARDING are claims: they are set *before* the system call and replaced after it by what the
//! call really did, so that nobody acts on a page in between. A fault on a claimed page sets [`FrameTable::wanted`] and
//! is served when the claim ends. A range is filled in runs of equal state ([`FrameTable::run`]): zeroes over an idle
//! or swapped hole would succeed and lose data.
//!
//! A page costs 11 bytes, in separate arrays: states are scanned 64 to a cache line, and what nobody uses yet (links,
//! generations) is memory that the allocator took as zeroes from the kernel and that nobody has touched.
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 11, 104 | a record is charged or not by its state alone: [`FrameState::is_charged`] |
//! | 12 | page number → record is an index; there are no optional records |
//! | 16, 17 | one owner sets states, so a page leaves ABSENT exactly once per charge |
//! | 21 | a page that is not charged cannot be uncharged: its transition does not exist |

/// Where a page is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameState {
    /// Never touched or given back: no memory, no charge, reads as zeroes.
    #[default]
    Absent = 0,
    /// Mapped where the guest uses it.
    Active = 1,
    /// Moved to the stage; contents kept, still charged.
    Idle = 2,
    /// In the store; charged to swap instead of memory.
    Swapped = 3,
    /// The guest gave it to the balloon.
    Ballooned = 4,
    /// Claimed: on its way between RAM and stage.
    Moving = 5,
    /// Claimed: on its way from the stage to the store.
    Evicting = 6,
    /// Claimed: its memory is being given back to the host.
    Discarding = 7,
}

impl FrameState {
    /// All states, in the order of their numbers.
    pub const ALL: [FrameState; 8] = [
        FrameState::Absent,
        FrameState::Active,
        FrameState::Idle,
        FrameState::Swapped,
        FrameState::Ballooned,
        FrameState::Moving,
        FrameState::Evicting,
        FrameState::Discarding,
    ];

    /// Whether a page may go from this state to `next`. Staying is no transition.
    pub const fn can_become(self, next: FrameState) -> bool {
        use FrameState::{Absent, Active, Ballooned, Discarding, Evicting, Idle, Moving, Swapped};
        match self {
            // Nothing is there: the owner fills it, or the guest gives away what it never had.
            Absent => match next {
                Active | Ballooned => true,
                Absent | Idle | Swapped | Moving | Evicting | Discarding => false,
            },
            // Every way out of present memory goes through a claim.
            Active => match next {
                Moving | Discarding => true,
                Absent | Active | Idle | Swapped | Ballooned | Evicting => false,
            },
            Idle => match next {
                Moving | Evicting | Discarding => true,
                Absent | Active | Idle | Swapped | Ballooned => false,
            },
            // The copy in the store is the owner's own memory: no system call, so no claim.
            Swapped => match next {
                Active | Absent | Ballooned => true,
                Idle | Swapped | Moving | Evicting | Discarding => false,
            },
            // Deflated, or touched without a word.
            Ballooned => match next {
                Absent | Active => true,
                Idle | Swapped | Ballooned | Moving | Evicting | Discarding => false,
            },
            // Either direction may fail and leave the page where it was.
            Moving => match next {
                Active | Idle => true,
                Absent | Swapped | Ballooned | Moving | Evicting | Discarding => false,
            },
            Evicting => match next {
                Swapped | Idle => true,
                Absent | Active | Ballooned | Moving | Evicting | Discarding => false,
            },
            // Done for the guest (ABSENT) or for the balloon, or failed and back.
            Discarding => match next {
                Absent | Ballooned | Active | Idle => true,
                Swapped | Moving | Evicting | Discarding => false,
            },
        }
    }

    /// True while a page in this state is charged to memory. A claim keeps the charge until its result is known.
    pub const fn is_charged(self) -> bool {
        match self {
            FrameState::Active
            | FrameState::Idle
            | FrameState::Moving
            | FrameState::Evicting
            | FrameState::Discarding => true,
            FrameState::Absent | FrameState::Swapped | FrameState::Ballooned => false,
        }
    }

    /// True while a system call is under way on the page, so that nobody else may act on it.
    pub const fn is_claim(self) -> bool {
        match self {
            FrameState::Moving | FrameState::Evicting | FrameState::Discarding => true,
            FrameState::Absent
            | FrameState::Active
            | FrameState::Idle
            | FrameState::Swapped
            | FrameState::Ballooned => false,
        }
    }

    /// The state with number `bits & 7`.
    const fn from_bits(bits: u8) -> FrameState {
        FrameState::ALL[(bits & STATE) as usize]
    }
}

/// A transition that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("page {index} is {from:?} and cannot become {to:?}")]
pub struct BadTransition {
    /// Index of the page.
    pub index: usize,
    /// Its state, unchanged.
    pub from: FrameState,
    /// The state that was refused.
    pub to: FrameState,
}

/// Bits of the state in a record's first byte; the flags follow.
const STATE: u8 = 0b0000_0111;
const WANTED: u8 = 1 << 3;
const HUGE: u8 = 1 << 4;
const REFERENCED: u8 = 1 << 5;

/// No page, in a link.
const NO_LINK: u32 = 0;

/// The records of all pages of one VM, indexed by page number in guest RAM.
///
/// Every method that takes an index panics when it is out of range: the caller has validated page numbers before.
#[derive(Clone, Debug)]
pub struct FrameTable {
    /// State and flags.
    bytes: Vec<u8>,
    generations: Vec<u16>,
    /// Links are stored one too high, so that 0 is "none" and fresh memory needs no initialisation.
    next: Vec<u32>,
    prev: Vec<u32>,
    counts: [u64; FrameState::ALL.len()],
}

impl FrameTable {
    /// Bytes that a record costs.
    pub const RECORD_BYTES: usize = 11;

    /// A table of `pages` records, all [`FrameState::Absent`].
    ///
    /// # Panics
    /// Above `u32::MAX - 1` pages (16 TiB): links would not fit.
    pub fn new(pages: usize) -> FrameTable {
        assert!(pages < u32::MAX as usize, "a frame table holds fewer than 2^32 - 1 pages");
        let mut counts = [0; FrameState::ALL.len()];
        counts[FrameState::Absent as usize] = pages as u64;
        FrameTable {
            bytes: vec![0; pages],
            generations: vec![0; pages],
            next: vec![NO_LINK; pages],
            prev: vec![NO_LINK; pages],
            counts,
        }
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

    /// Sets the state of page `i`; flags stay. An impossible transition is a bug of the caller and stops a debug build.
    pub fn set(&mut self, i: usize, state: FrameState) {
        let from = self.state(i);
        debug_assert!(from.can_become(state), "page {i} is {from:?} and cannot become {state:?}");
        self.put(i, from, state);
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
        self.put(i, from, state);
        Ok(())
    }

    /// [`Self::set`] for each page of `start..end`.
    pub fn set_range(&mut self, start: usize, end: usize, state: FrameState) {
        for i in start..end {
            self.set(i, state);
        }
    }

    fn put(&mut self, i: usize, from: FrameState, to: FrameState) {
        self.counts[from as usize] -= 1;
        self.counts[to as usize] += 1;
        self.bytes[i] = (self.bytes[i] & !STATE) | to as u8;
    }

    /// The state of page `i` and the end of the run of pages in that state that starts there, at most `end`.
    /// For `i >= end` the run is empty: `(state, i)`.
    pub fn run(&self, i: usize, end: usize) -> (FrameState, usize) {
        let state = self.state(i);
        let end = end.min(self.len());
        if i >= end {
            return (state, i);
        }
        let same = self.bytes[i..end].iter().take_while(|byte| **byte & STATE == state as u8).count();
        (state, i + same)
    }

    /// Number of pages in `state`.
    pub fn count(&self, state: FrameState) -> u64 {
        self.counts[state as usize]
    }

    /// Number of pages that are charged to memory ([`FrameState::is_charged`]).
    pub fn charged(&self) -> u64 {
        FrameState::ALL.iter().filter(|state| state.is_charged()).map(|state| self.count(*state)).sum()
    }

    /// Whether a fault waits for the claim on page `i` to end.
    pub fn wanted(&self, i: usize) -> bool {
        self.bytes[i] & WANTED != 0
    }

    /// Sets [`Self::wanted`].
    pub fn set_wanted(&mut self, i: usize, on: bool) {
        self.set_flag(i, WANTED, on);
    }

    /// Whether page `i` belongs to a huge page of the host, which must be split before a part of it is given back.
    pub fn huge(&self, i: usize) -> bool {
        self.bytes[i] & HUGE != 0
    }

    /// Sets [`Self::huge`].
    pub fn set_huge(&mut self, i: usize, on: bool) {
        self.set_flag(i, HUGE, on);
    }

    /// Whether page `i` was touched since it was last aged.
    pub fn referenced(&self, i: usize) -> bool {
        self.bytes[i] & REFERENCED != 0
    }

    /// Sets [`Self::referenced`].
    pub fn set_referenced(&mut self, i: usize, on: bool) {
        self.set_flag(i, REFERENCED, on);
    }

    fn set_flag(&mut self, i: usize, flag: u8, on: bool) {
        if on {
            self.bytes[i] |= flag;
        } else {
            self.bytes[i] &= !flag;
        }
    }

    /// The generation in which page `i` was last seen, 0 at first.
    pub fn generation(&self, i: usize) -> u16 {
        self.generations[i]
    }

    /// Sets [`Self::generation`].
    pub fn set_generation(&mut self, i: usize, generation: u16) {
        self.generations[i] = generation;
    }

    /// The neighbours of page `i` in the list that it is on: `(previous, next)`.
    pub fn links(&self, i: usize) -> (Option<u32>, Option<u32>) {
        (self.prev[i].checked_sub(1), self.next[i].checked_sub(1))
    }

    /// Sets [`Self::links`].
    pub fn set_links(&mut self, i: usize, previous: Option<u32>, next: Option<u32>) {
        self.prev[i] = previous.map_or(NO_LINK, |link| link + 1);
        self.next[i] = next.map_or(NO_LINK, |link| link + 1);
    }
}

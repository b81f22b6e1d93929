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
//! **Lists.** Pages whose memory reclaim may take are on a list, by their state alone: ACTIVE ones on [`List::Active`],
//! IDLE ones on [`List::Idle`]. What is new comes to the head, what is taken comes from the tail; a claim is on no list,
//! it is *isolated*. Nobody links a page by hand, so a list and a state cannot disagree. [`FrameTable::isolate`] is the
//! one way by which reclaim gets pages.
//!
//! **Blocks.** The pages with an age (all but ABSENT and BALLOONED) of an aligned block of 512 are one entry of a list as
//! long as they are alike in state, generation and reference. So a guest that walks its memory writes no link and no
//! generation for a page, and a step of 512 pages costs as much as a few steps of single ones. A change that makes a
//! difference splits the block in its place; the change that makes all 512 alike again, or the last of them leave, joins
//! them, at the head.
//!
//! ```text
//!   whole ───── a change after which its pages differ ─────► an entry a page,
//!   1 entry ◄── all 512 are alike again, or none is there ── in the same place
//! ```
//!
//! **Ages.** The caller's clock begins generations; a page has the one in which it was last seen in use. Histogram,
//! working set and refault distances are counted as pages come and go ([`Histogram`], [`WorkingSet`]).
//!
//! A page costs 11 bytes in separate arrays (states are scanned 64 to a cache line) and a 16th of a byte for the summary
//! and the links of its block. Links and generations of pages are written only where blocks are split: the rest of these
//! arrays is memory that the allocator took as zeroes from the kernel and that nobody has touched. What has been written so
//! far, and the page tables below it, is [`FrameTable::cost`].
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 11, 104 | a record is charged or not by its state alone: [`FrameState::is_charged`] |
//! | 12 | page number → record is an index; there are no optional records |
//! | 15, 16, 17, 85 | one owner sets states, so a page leaves ABSENT once per charge and a claim once per uncharge |
//! | 21 | a page that is not charged cannot be uncharged: its transition does not exist |
//! | 28 | becoming part of a huge page, or of a whole block, changes no charge |
//! | 35, 52, B86 | two lists, one owner, membership follows the state |
//! | 36, 38, 39, 112, T4 | [`FrameTable::isolate`]: coldest first, busy ones skipped, all that is looked at rotated |
//! | 37, B31 | a scan's work has a bound of its own |
//! | 113, B89 | [`FrameTable::scan_target`] is never 0 |

mod age;
mod check;
mod cost;
mod evicted;
mod isolate;
mod links;
mod rank;
mod state;
mod table;

pub use age::{EXACT, Histogram, WorkingSet};
pub use check::Violation;
pub use cost::Cost;
pub use evicted::Turns;
pub use isolate::{Scan, Scanned};
pub use links::List;
pub use rank::Walk;
pub use state::{BadTransition, FrameState};
pub use table::{BLOCK, FrameTable};

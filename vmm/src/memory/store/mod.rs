//! The store: compressed contents of evicted guest pages, in memory of the worker.
//!
//! | file | concern |
//! | --- | --- |
//! | `arena` | the mapping, its segments, and what the two halves share |
//! | `entry` | an entry's header and checksum |
//! | `codec` | lz4 and zstd, and pages of one word |
//! | `writer` | the reclaim thread's half: compress, append |
//! | `clean` | the same half: what frees memory again |
//! | `write_back` | the same half: what leaves a store that is too large, for the file |
//! | `reader` | the fault thread's half: read, release |
//! | `spill` | a file for pages that do not shrink; the reclaim thread's alone |
//!
//! ```text
//!  reclaim thread: Writer                                      fault thread: Reader
//!  compress ──► scratch ──► (pages discarded) ──► append ── Stored ──► remembers the place, or releases it
//!                                                                      touch: read, release
//!  clean, write back: a copy of what lives ──────────────── Moved ───► where old is remembered: new, release old;
//!                                                                      else: release new
//!  collect ◄─────────────── released units of each segment ◄────────── release
//! ```
//!
//! The arena is a log in segments of 64 KiB. An entry is written once, by the writer, at the end of the open segment. It is
//! dead when the reader has released it, and a segment whose entries are all dead is discarded or written again. Where
//! a page's content lies is known to the owner of the frame table alone: there is no index here.
//!
//! No locks: the writer tells of a place only when its bytes are written, through a channel, in order; from then until
//! the release only the reader's side decides about it. The number that goes the other way, how much of a segment is
//! released, is written by the reader alone while the segment has entries. The reader makes no system call and
//! allocates nothing.
//!
//! Real memory is counted exactly ([`Writer::resident_pages`]): a page of the arena counts from the first byte written
//! to it until it is discarded. A batch never needs more pages than it has, since an entry is at most 3/4 of a page.
//!
//! Every entry has a checksum. What does not match is reported ([`Corrupt`]) and never decompressed: the guest's memory
//! is lost then, and only its VM.

pub mod arena;
pub mod clean;
pub mod codec;
mod entry;
pub mod reader;
pub mod spill;
mod write_back;
pub mod writer;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use arena::Arena;
pub use clean::Moved;
pub use codec::Codec;
pub use reader::Reader;
pub use spill::Spill;
pub use writer::{BATCH, Outcome, Stored, Writer};

/// Bytes of a page.
const PAGE: usize = memcg_core::units::PAGE_SIZE as usize;

/// Places from here on are slots of the file: below are 48 GiB of arena, above 4 TiB of file.
const FIRST_SLOT: u32 = 0xc000_0000;

/// Where the content of an evicted page is, in four bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place(u32);

impl Place {
    /// The place of every page of zeroes. It takes no bytes.
    pub const ZEROES: Place = Place(u32::MAX);

    /// The place that [`Self::raw`] said; 0 is none.
    pub const fn from_raw(raw: u32) -> Option<Place> {
        match raw {
            0 => None,
            raw => Some(Place(raw)),
        }
    }

    /// The place as a number, never 0.
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// The place of a slot of the file.
    const fn of_slot(slot: u32) -> Place {
        Place(FIRST_SLOT + slot)
    }

    /// The slot of the file, when the content is there: the fault thread cannot read it, and asks for it.
    pub const fn slot(self) -> Option<u32> {
        match self {
            Place::ZEROES => None,
            Place(raw) => raw.checked_sub(FIRST_SLOT),
        }
    }

    /// The place of the entry that begins at a unit of the arena.
    const fn of_unit(unit: u32) -> Place {
        Place(unit + 1)
    }

    /// The unit where the entry begins. Means nothing for pages of zeroes.
    const fn unit(self) -> u32 {
        self.0.wrapping_sub(1)
    }

    const fn corrupt(self, damage: Damage) -> Corrupt {
        Corrupt { place: self.0, damage }
    }
}

/// What the store holds is not what was written to it, or a place is none. The content of a guest's page is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the store is damaged at place {place:#x}: {damage}")]
pub struct Corrupt {
    /// The place, as a number.
    pub place: u32,
    /// What is wrong.
    pub damage: Damage,
}

/// What is wrong with an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// No entry was ever written there, or its segment is free.
    #[error("nothing was written there")]
    NoEntry,
    /// Length or kind are impossible.
    #[error("the header makes no sense")]
    Header,
    /// The entry belongs to another page.
    #[error("it holds another page")]
    OtherPage,
    /// It was released before.
    #[error("it was released before")]
    Released,
    /// The bytes are not those that were written.
    #[error("the checksum differs")]
    Checksum,
    /// The disk does not give them back.
    #[error("the file cannot be read")]
    Unreadable,
    /// The checksum is right, and yet the bytes do not decompress to a page.
    #[error("it does not decompress to a page")]
    Content,
}

/// The file of a store: its descriptor, and the pages for which it has room.
pub type SpillFile = (OwnedFd, u32);

/// The parts of a store.
#[derive(Debug)]
pub struct Store {
    /// For the thread that evicts.
    pub writer: Writer,
    /// For the same thread, where there is a file.
    pub spill: Option<Spill>,
    /// For the thread that answers faults.
    pub reader: Reader,
}

impl Store {
    /// An empty store for a guest with `ram_pages` pages of RAM. Takes address space; what is behind it becomes real as
    /// pages are compressed.
    ///
    /// # Errors
    /// When the host refuses the address space.
    pub fn new(ram_pages: u64, codec: Codec, file: Option<SpillFile>) -> io::Result<Self> {
        let arena = Arc::new(Arena::map(arena::segments_for(ram_pages))?);
        let spill = file.map(|(file, pages)| Spill::new(file, pages)).transpose()?;
        let released = spill.as_ref().map(Spill::released);
        Ok(Self { writer: Writer::new(arena.clone(), codec)?, reader: Reader::new(arena, codec, released)?, spill })
    }
}

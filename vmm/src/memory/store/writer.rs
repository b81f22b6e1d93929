//! The reclaim thread's half: compresses pages, and appends what came of them to the arena.
//!
//! In two steps, so that real memory never exceeds what is charged: [`Writer::compress`] writes to a scratch buffer of
//! fixed size, the caller discards the pages, and then [`Writer::append`] makes pages of the arena real, no more than were
//! discarded.

use std::sync::Arc;
use std::{fmt, io};

use super::arena::{Arena, Mapping, SEGMENT, SEGMENT_UNITS};
use super::codec::{Codec, Decoder, Encoder, ROOM, same_word};
use super::entry::{HEADER, Header, Kind, MOST, UNIT, units};
use super::{Corrupt, PAGE, Place, reader};

/// The most pages of a batch.
pub const BATCH: usize = 64;

/// Bytes of the scratch buffer.
const SCRATCH: usize = (BATCH * MOST + HEADER + ROOM).next_multiple_of(PAGE);

/// Pages of the scratch buffer: real from the first eviction on, whatever is stored.
pub const SCRATCH_PAGES: u64 = (SCRATCH / PAGE) as u64;

/// What became of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All zeroes: takes no bytes.
    Zeroes,
    /// One word, repeated.
    Word,
    /// Compressed, to so many bytes with what the store adds.
    Compressed(u32),
    /// It does not shrink below 3/4 and is not in the batch: it stays in memory.
    Incompressible,
}

/// A page of an appended batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Index of the guest's page.
    pub page: u32,
    /// Where its content is.
    pub place: Place,
}

/// A page in scratch.
#[derive(Clone, Copy)]
struct Pending {
    page: u32,
    /// Bytes of its entry; a page of zeroes has none.
    bytes: usize,
}

/// A segment that is written to.
#[derive(Clone, Copy)]
struct Open {
    segment: u32,
    /// Units that are written.
    at: u32,
}

/// What a segment is to the writer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Empty: on one of the lists of segments to write.
    Free,
    /// Written to.
    Open,
    /// Not written to any more.
    Closed,
    /// The same, and it is left alone until it falls empty by itself: its entries were copied, or one is damaged.
    Moved,
}

/// A segment that was ever used.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    /// What it is.
    pub state: State,
    /// Its pages that are real: the first ones.
    real: u8,
}

/// Compresses, appends, cleans and collects.
pub struct Writer {
    pub(super) arena: Arc<Arena>,
    encoder: Encoder,
    /// For what is written back.
    pub(super) decoder: Decoder,
    scratch: Mapping,
    filled: usize,
    pending: Vec<Pending>,
    open: Option<Open>,
    /// Those that were ever used; the next fresh one comes behind them.
    pub(super) segments: Vec<Segment>,
    /// Empty segments with pages that are real, to be written first.
    kept: Vec<u32>,
    /// Empty segments without.
    free: Vec<u32>,
    resident: u64,
    /// Units of all entries, live or dead, in segments that are not empty.
    used: u64,
    /// Units that were ever written.
    appended: u64,
    /// What [`Arena::emptied`] said when empty segments were last looked for.
    seen: u64,
    /// A segment was empty when it was closed.
    look: bool,
}

impl Writer {
    /// The half that writes to `arena`.
    ///
    /// # Errors
    /// When the host refuses address space, or the encoder cannot be made.
    pub(super) fn new(arena: Arc<Arena>, codec: Codec) -> io::Result<Self> {
        Ok(Self {
            encoder: Encoder::new(codec)?,
            decoder: Decoder::new(codec)?,
            scratch: Mapping::new(SCRATCH)?,
            filled: 0,
            pending: Vec::with_capacity(BATCH),
            open: None,
            segments: Vec::new(),
            kept: Vec::new(),
            free: Vec::new(),
            resident: 0,
            used: 0,
            appended: 0,
            seen: 0,
            look: false,
            arena,
        })
    }

    /// Adds a page to the batch, if it shrinks. Nobody may write to `content` meanwhile.
    ///
    /// # Panics
    /// When the batch has [`BATCH`] pages already.
    pub fn compress(&mut self, page: u32, content: &[u8; PAGE]) -> Outcome {
        assert!(self.pending.len() < BATCH, "append the batch first");
        let (head, out) = self.scratch.as_mut_slice()[self.filled..].split_at_mut(HEADER);
        let (outcome, kind, length) = match same_word(content) {
            Some(0) => {
                self.pending.push(Pending { page, bytes: 0 });
                return Outcome::Zeroes;
            }
            Some(word) => {
                out[..8].copy_from_slice(&word.to_le_bytes());
                (Outcome::Word, Kind::Word, 8)
            }
            None => match self.encoder.encode(content, out) {
                Some(length) => (Outcome::Compressed((HEADER + length) as u32), self.encoder.kind(), length),
                None => return Outcome::Incompressible,
            },
        };
        head.copy_from_slice(&Header::of(page, kind, &out[..length]).bytes());
        self.pending.push(Pending { page, bytes: HEADER + length });
        self.filled += HEADER + length;
        outcome
    }

    /// Writes the content of `page`, which is at `place`, in memory, to `out`, whatever becomes of the entry meanwhile: what was
    /// read of one that has been released means nothing. Only this half makes a segment empty, so the bytes stay.
    ///
    /// # Errors
    /// [`Corrupt`] when it is not what was written, or was released; `out` means nothing then.
    pub fn read(&mut self, page: u32, place: Place, out: &mut [u8; PAGE]) -> Result<(), Corrupt> {
        reader::read(&self.arena, &mut self.decoder, page, place, out)
    }

    /// Pages in the batch.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Pages of the arena that [`Self::append`] would make real: never more than the batch has pages.
    pub fn would_take(&self) -> u64 {
        let mut plan = self.plan();
        self.pending.iter().map_while(|p| plan.add(p.bytes)).sum()
    }

    /// Drops the end of the batch, so that the rest makes no more than `room` pages real and fits the arena. Returns how
    /// many pages the batch still has; those behind are to stay in memory.
    pub fn keep_within(&mut self, room: u64) -> usize {
        let mut plan = self.plan();
        let mut left = room;
        let fits = |p: &&Pending| match plan.add(p.bytes).and_then(|pages| left.checked_sub(pages)) {
            Some(rest) => {
                left = rest;
                true
            }
            None => false,
        };
        let kept = self.pending.iter().take_while(fits).count();
        self.filled -= self.pending[kept..].iter().map(|p| p.bytes).sum::<usize>();
        self.pending.truncate(kept);
        kept
    }

    /// Appends the batch to the arena, and adds to `stored` where each page is, in the order in which they were
    /// compressed. The batch is empty then.
    ///
    /// # Panics
    /// When the arena is full: [`Self::keep_within`] comes first.
    pub fn append(&mut self, stored: &mut Vec<Stored>) {
        let mut from = 0;
        for i in 0..self.pending.len() {
            let Pending { page, bytes } = self.pending[i];
            let place = match bytes {
                0 => Place::ZEROES,
                _ => {
                    let unit = self.take(bytes);
                    self.arena.write(unit, [&self.scratch.as_mut_slice()[from..from + bytes], &[]]);
                    Place::of_unit(unit)
                }
            };
            from += bytes;
            stored.push(Stored { page, place });
        }
        self.pending.clear();
        self.filled = 0;
    }

    /// Frees segments that fell empty. Up to `keep` of them stay real, to be written next; the others are discarded.
    /// Returns how many pages were discarded. Cheap when nothing fell empty.
    ///
    /// # Errors
    /// As the kernel says; what could not be discarded is still counted.
    ///
    /// # Panics
    /// Between [`Self::compress`] and [`Self::append`]: the batch would take more than was foretold.
    pub fn collect(&mut self, keep: usize) -> io::Result<u64> {
        assert!(self.pending.is_empty(), "append the batch first");
        let emptied = self.arena.emptied();
        if emptied != self.seen || self.look {
            if self.open.is_some_and(|open| self.arena.live(open.segment) == 0) {
                self.close();
            }
            (self.seen, self.look) = (emptied, false);
            let arena = self.arena.clone();
            arena.take_empty(self.segments.len(), |segment| {
                let state = self.segments[segment as usize].state;
                if matches!(state, State::Closed | State::Moved) && arena.live(segment) == 0 {
                    self.empty(segment);
                }
            });
        }
        let before = self.resident;
        while self.kept.len() > keep {
            let segment = self.kept[0];
            let real = &mut self.segments[segment as usize].real;
            self.arena.discard(segment, (*real).into())?;
            self.resident -= u64::from(std::mem::take(real));
            self.kept.swap_remove(0);
            self.free.push(segment);
        }
        Ok(before - self.resident)
    }

    /// Pages of the arena that are real, exactly: written to, and not discarded since.
    pub fn resident_pages(&self) -> u64 {
        self.resident
    }

    /// Bytes of entries that are not released.
    pub fn live_bytes(&self) -> u64 {
        (self.appended - self.arena.released()) * UNIT as u64
    }

    /// Bytes of released entries in segments that are not free.
    pub fn dead_bytes(&self) -> u64 {
        (self.used * UNIT as u64).saturating_sub(self.live_bytes())
    }

    /// True when more than a quarter of the store is dead, and enough to be worth the work.
    pub fn needs_cleaning(&self) -> bool {
        let dead = self.dead_bytes();
        dead > 2 * SEGMENT as u64 && dead * 4 > self.used * UNIT as u64
    }

    /// Segments that can still be opened.
    pub(super) fn openable(&self) -> usize {
        self.kept.len() + self.free.len() + self.arena.segments() - self.segments.len()
    }

    /// Takes room for an entry, and counts it.
    pub(super) fn take(&mut self, bytes: usize) -> u32 {
        let size = units(bytes);
        let open = match self.open {
            Some(open) if open.at + size <= SEGMENT_UNITS => open,
            _ => {
                self.close();
                Open { segment: self.next_segment(), at: 0 }
            }
        };
        let at = open.at + size;
        self.open = Some(Open { at, ..open });
        let real = &mut self.segments[open.segment as usize].real;
        let more = pages(at).saturating_sub(*real);
        *real += more;
        self.resident += u64::from(more);
        self.used += u64::from(size);
        self.appended += u64::from(size);
        open.segment * SEGMENT_UNITS + open.at
    }

    /// Nothing more is written to the open segment.
    pub(super) fn close(&mut self) {
        if let Some(Open { segment, .. }) = self.open.take() {
            self.segments[segment as usize].state = State::Closed;
            // Where it fell empty while it was open, nobody says so again. It is not free before `collect`: what a batch
            // takes is foretold, and does not change by what the reader does meanwhile.
            if self.arena.live(segment) == 0 {
                self.arena.mark_empty(segment);
                self.look = true;
            }
        }
    }

    /// A closed segment without anything that lives is written again, or discarded.
    fn empty(&mut self, segment: u32) {
        self.used -= u64::from(self.arena.written(segment));
        self.arena.reset(segment);
        self.segments[segment as usize].state = State::Free;
        self.kept.push(segment);
    }

    /// The next segment to write: one that is real, or was, or the next of the arena. [`Plan`] foretells it.
    fn next_segment(&mut self) -> u32 {
        let segment = self.kept.pop().or_else(|| self.free.pop()).unwrap_or_else(|| {
            assert!(self.segments.len() < self.arena.segments(), "the arena is full");
            self.segments.push(Segment { state: State::Free, real: 0 });
            self.segments.len() as u32 - 1
        });
        self.segments[segment as usize].state = State::Open;
        segment
    }

    fn plan(&self) -> Plan<'_> {
        let (at, real) =
            self.open.map_or((SEGMENT_UNITS, 0), |open| (open.at, self.segments[open.segment as usize].real));
        Plan { writer: self, at, real, opened: 0 }
    }
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Writer")
            .field("resident", &self.resident)
            .field("live_bytes", &self.live_bytes())
            .field("dead_bytes", &self.dead_bytes())
            .field("pending", &self.pending.len())
            .finish_non_exhaustive()
    }
}

/// What [`Writer::take`] would do, entry by entry.
struct Plan<'a> {
    writer: &'a Writer,
    at: u32,
    real: u8,
    /// Segments that would be opened.
    opened: usize,
}

impl Plan<'_> {
    /// Pages that the next entry makes real; nothing when the arena has no room for it.
    fn add(&mut self, bytes: usize) -> Option<u64> {
        let size = units(bytes);
        if size == 0 {
            return Some(0);
        }
        if self.at + size > SEGMENT_UNITS {
            if self.opened == self.writer.openable() {
                return None;
            }
            let kept = self.writer.kept.iter().rev().nth(self.opened);
            self.real = kept.map_or(0, |segment| self.writer.segments[*segment as usize].real);
            self.at = 0;
            self.opened += 1;
        }
        self.at += size;
        let more = pages(self.at).saturating_sub(self.real);
        self.real += more;
        Some(more.into())
    }
}

/// Pages that the first `units` of a segment lie on.
fn pages(units: u32) -> u8 {
    (units as usize * UNIT).div_ceil(PAGE) as u8
}

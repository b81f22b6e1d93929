//! Cleaning: what lives in segments that are mostly dead is copied to the end of the log, so that they fall empty.
//!
//! The writer does not know which page is where, and need not: it copies every entry that is not released, and tells of
//! both places. The owner of the frame table answers for each by releasing one of them, and with the last one the old
//! segment is empty. Until then it cannot be written again, so an old place means the same entry on both sides.

use std::iter;

use super::arena::{Arena, SEGMENT, SEGMENT_UNITS};
use super::entry::{Header, UNIT};
use super::writer::{State, Writer};
use super::{Corrupt, Damage, PAGE, Place};

/// Segments that one call cleans: half a MiB of copying, about as long as the compression of a batch.
const AT_ONCE: usize = 8;

/// Segments with more that lives than this are not worth cleaning.
const WORTH_UNITS: u32 = SEGMENT_UNITS / 8 * 7;

/// An entry that was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Index of the guest's page.
    pub page: u32,
    /// Where its content was, and is as long as this is not released.
    pub old: Place,
    /// Where a copy of it is.
    pub new: Place,
}

impl Writer {
    /// Copies the entries of the segments with the least that lives, and adds them to `moved`. Makes no more than `room`
    /// pages real; 17 are enough for one segment. Returns how many segments it was: none when none is worth it.
    ///
    /// For each of `moved`, in order and before anything that the writer says later: when the page is remembered at
    /// `old`, then it is at `new` from now on and `old` is released; when it is not, `new` is released.
    ///
    /// # Errors
    /// [`Corrupt`] when an entry is not what was written.
    ///
    /// # Panics
    /// Between [`Writer::compress`] and [`Writer::append`]: the batch would take more than was foretold.
    pub fn clean(&mut self, room: u64, moved: &mut Vec<Moved>) -> Result<usize, Corrupt> {
        assert_eq!(self.pending(), 0, "append the batch first");
        let most = self.resident_pages().saturating_add(room);
        let mut cleaned = 0;
        for (live, segment) in self.victims(WORTH_UNITS) {
            let bytes = live as usize * UNIT;
            // Part of it may come to the open segment and the rest to the next, so one more page may begin.
            let worst = bytes.div_ceil(PAGE) as u64 + 1;
            if self.resident_pages() + worst > most || self.openable() == 0 {
                break;
            }
            self.segments[segment as usize].state = State::Moved;
            self.copy(segment, live, moved)?;
            cleaned += 1;
        }
        Ok(cleaned)
    }

    /// The segments with the least that lives, of those that have `most` units of it at most, and how much that is; the
    /// least first.
    pub(super) fn victims(&self, most: u32) -> Vec<(u32, u32)> {
        let mut victims = Vec::with_capacity(AT_ONCE + 1);
        for (segment, _) in (0..).zip(&self.segments).filter(|(_, segment)| segment.state == State::Closed) {
            let live = self.arena.live(segment);
            let worth = live > 0 && live <= most;
            if worth && (victims.len() < AT_ONCE || victims.last().is_some_and(|last| (live, segment) < *last)) {
                let at = victims.partition_point(|victim| *victim < (live, segment));
                victims.insert(at, (live, segment));
                victims.truncate(AT_ONCE);
            }
        }
        victims
    }

    /// Copies what lives in a segment, which is `live` units at most.
    fn copy(&mut self, segment: u32, live: u32, moved: &mut Vec<Moved>) -> Result<(), Corrupt> {
        let arena = self.arena.clone();
        let mut left = live;
        for entry in living(&arena, segment) {
            let (old, header, payload) = entry?;
            // An entry is marked before it is counted, so there cannot be more that lives than was counted.
            left = left.checked_sub(header.units()).ok_or(old.corrupt(Damage::Released))?;
            let new = self.take(header.entry());
            arena.write(new, [&header.bytes(), payload]);
            moved.push(Moved { page: header.page, old, new: Place::of_unit(new) });
        }
        Ok(())
    }
}

/// The entries of a segment that are not released: place, header and payload. Ends behind the first that is [`Corrupt`].
pub(super) fn living(arena: &Arena, segment: u32) -> impl Iterator<Item = Result<(Place, Header, &[u8]), Corrupt>> {
    let first = segment * SEGMENT_UNITS;
    let end = first + arena.written(segment);
    let mut unit = first;
    iter::from_fn(move || {
        while unit < end {
            let place = Place::of_unit(unit);
            let (header, payload, dead) = match arena.entry(unit) {
                Ok((header, payload, dead)) if dead || header.matches(payload) => (header, payload, dead),
                damaged => {
                    unit = end;
                    return Some(Err(place.corrupt(damaged.err().unwrap_or(Damage::Checksum))));
                }
            };
            unit += header.units();
            if !dead {
                return Some(Ok((place, header, payload)));
            }
        }
        None
    })
}

const _: () = assert!(SEGMENT / PAGE == 16, "the doc comment of clean says 17");

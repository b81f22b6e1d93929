//! Writing back: contents leave a store that is larger than it may be, for the file.
//!
//! A limit is lowered, and what was compressed under the old one takes too much of the new. As with cleaning the writer does
//! not know which page is where: it reads every entry that is not released, the caller writes what it has read, and tells of
//! both places. A segment whose entries have all been written is released by that, and collected.

use super::arena::SEGMENT_UNITS;
use super::clean::living;
use super::writer::{State, Writer};
use super::{Corrupt, Damage, PAGE, Place};

impl Writer {
    /// Reads entries of the segments with the least that lives, where the least has to be written for what is freed, and
    /// gives `take` each one's page, place and content, until it takes no more. What it has taken is to be released before
    /// the next call, or it is read again.
    ///
    /// # Errors
    /// [`Corrupt`] when an entry is not what was written. Its segment is left alone from then on.
    ///
    /// # Panics
    /// Between [`Writer::compress`] and [`Writer::append`]: the batch would take more than was foretold.
    pub fn read_out(&mut self, mut take: impl FnMut(u32, Place, &[u8; PAGE]) -> bool) -> Result<(), Corrupt> {
        assert_eq!(self.pending(), 0, "append the batch first");
        let mut victims = self.victims(SEGMENT_UNITS);
        if victims.is_empty() {
            // What is left is in the open one.
            self.close();
            victims = self.victims(SEGMENT_UNITS);
        }
        let arena = self.arena.clone();
        let mut content = [0; PAGE];
        for (_, segment) in victims {
            for entry in living(&arena, segment) {
                let decoded = entry.and_then(|(place, header, payload)| {
                    match self.decoder.decode(header.kind, payload, &mut content) {
                        true => Ok((header.page, place)),
                        false => Err(place.corrupt(Damage::Content)),
                    }
                });
                match decoded {
                    Ok((page, place)) if take(page, place, &content) => {}
                    Ok(_) => return Ok(()),
                    Err(corrupt) => {
                        self.segments[segment as usize].state = State::Moved;
                        return Err(corrupt);
                    }
                }
            }
        }
        Ok(())
    }
}

//! The fault thread's half: reads entries and releases them. No system call, no allocation, no lock.

use std::sync::Arc;
use std::{fmt, io};

use super::arena::Arena;
use super::codec::{Codec, Decoder};
use super::entry::Header;
use super::spill::Released;
use super::{Corrupt, Damage, PAGE, Place};
use crate::worker::protocol::Area;

/// Reads and releases. It decides what of the store is live.
pub struct Reader {
    arena: Arc<Arena>,
    decoder: Decoder,
    /// Slots of the file that nobody wants any more.
    released: Option<Arc<Released>>,
}

impl Reader {
    /// The half that reads what a writer with `codec` writes to `arena`, and releases slots of a file.
    ///
    /// # Errors
    /// When the decoder cannot be made.
    pub(super) fn new(arena: Arc<Arena>, codec: Codec, released: Option<Arc<Released>>) -> io::Result<Self> {
        Ok(Self { arena, decoder: Decoder::new(codec)?, released })
    }

    /// Whether there is a file, for what does not shrink or has no room in memory.
    pub fn has_file(&self) -> bool {
        self.released.is_some()
    }

    /// Writes the content of `page`, which is at `place`, in memory, to `out`. The entry stays.
    ///
    /// # Errors
    /// [`Corrupt`] when it is not what was written; `out` means nothing then.
    pub fn read(&mut self, page: u32, place: Place, out: &mut [u8; PAGE]) -> Result<(), Corrupt> {
        read(&self.arena, &mut self.decoder, page, place, out)
    }

    /// Nobody wants `page`'s entry at `place` any more. Once for every place that the writer told of, whether it was ever
    /// read or not.
    ///
    /// # Errors
    /// [`Corrupt`] when there is no such entry, or none any more; nothing is released then.
    pub fn release(&mut self, page: u32, place: Place) -> Result<(), Corrupt> {
        if place == Place::ZEROES {
            return Ok(());
        }
        if let Some(slot) = place.slot() {
            let released = self.released.as_ref().ok_or(Damage::NoEntry).and_then(|released| released.release(slot));
            return released.map_err(|damage| place.corrupt(damage));
        }
        // A wrong length would count as dead what lives, so the checksum matters here too.
        let (header, _) = entry(&self.arena, page, place)?;
        self.arena.release(place.unit(), header.units()).map_err(|damage| place.corrupt(damage))
    }

    /// Where the store is in this process.
    pub fn area(&self) -> Area {
        self.arena.area()
    }

    /// How often a segment fell empty: when this has changed, the writer has something to collect.
    pub fn emptied(&self) -> u64 {
        self.arena.emptied()
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("emptied", &self.emptied()).finish_non_exhaustive()
    }
}

/// Writes the content of `page`, which is at `place`, to `out`.
///
/// # Errors
/// [`Corrupt`] when it is not what was written, or nobody wants it any more.
pub(super) fn read(
    arena: &Arena,
    decoder: &mut Decoder,
    page: u32,
    place: Place,
    out: &mut [u8; PAGE],
) -> Result<(), Corrupt> {
    if place == Place::ZEROES {
        out.fill(0);
        return Ok(());
    }
    let (header, payload) = entry(arena, page, place)?;
    match decoder.decode(header.kind, payload, out) {
        true => Ok(()),
        false => Err(place.corrupt(Damage::Content)),
    }
}

/// The entry at `place`, if it is a live one of `page` and what was written.
fn entry(arena: &Arena, page: u32, place: Place) -> Result<(Header, &[u8]), Corrupt> {
    let (header, payload, dead) = arena.entry(place.unit()).map_err(|damage| place.corrupt(damage))?;
    if header.page != page {
        Err(place.corrupt(Damage::OtherPage))
    } else if dead {
        Err(place.corrupt(Damage::Released))
    } else if !header.matches(payload) {
        Err(place.corrupt(Damage::Checksum))
    } else {
        Ok((header, payload))
    }
}

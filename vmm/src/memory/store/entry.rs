//! An entry of the arena: a header of 12 bytes, and the content of one page behind it.
//!
//! ```text
//!  0        4         6      7      8          12
//!  page     length    kind   dead   checksum   payload …
//! ```
//!
//! `dead` is written by the reader when it releases the entry, and is the one byte that changes after the entry was
//! written; the checksum covers everything else.

use super::Damage;

/// Bytes of a header.
pub const HEADER: usize = 12;

/// Offset of the byte that says that the entry was released.
pub const DEAD: usize = 7;

/// The most bytes of an entry: a page that does not shrink below 3/4 is not worth storing.
pub const MOST: usize = 3072;

/// The most bytes behind a header.
pub const MOST_PAYLOAD: usize = MOST - HEADER;

/// Bytes of a unit: entries begin at multiples of it, so that 32 bits can tell of 64 GiB.
pub const UNIT: usize = 16;

/// What the payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Eight bytes that the page repeats.
    Word = 1,
    /// An lz4 block.
    Lz4 = 2,
    /// A zstd frame.
    Zstd = 3,
}

/// A header that makes sense. Nothing but the checksum says whether it is true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Index of the guest's page.
    pub page: u32,
    /// Bytes of payload.
    pub length: u16,
    /// What they are.
    pub kind: Kind,
    /// Of the other fields and the payload.
    pub checksum: u32,
}

impl Header {
    /// The header of `payload`, which is at most [`MOST_PAYLOAD`] bytes.
    pub fn of(page: u32, kind: Kind, payload: &[u8]) -> Self {
        let length = payload.len() as u16;
        Self { page, length, kind, checksum: checksum(page, length, kind, payload) }
    }

    /// Reads a header; the byte [`DEAD`] is not looked at.
    ///
    /// # Errors
    /// [`Damage::Header`] when the length is too large or the kind unknown.
    pub fn parse(bytes: [u8; HEADER]) -> Result<Self, Damage> {
        let [p0, p1, p2, p3, l0, l1, kind, _, c0, c1, c2, c3] = bytes;
        let kind = match kind {
            1 => Kind::Word,
            2 => Kind::Lz4,
            3 => Kind::Zstd,
            _ => return Err(Damage::Header),
        };
        let length = u16::from_le_bytes([l0, l1]);
        if usize::from(length) > MOST_PAYLOAD {
            return Err(Damage::Header);
        }
        Ok(Self {
            page: u32::from_le_bytes([p0, p1, p2, p3]),
            length,
            kind,
            checksum: u32::from_le_bytes([c0, c1, c2, c3]),
        })
    }

    /// The header as bytes, of an entry that lives.
    pub fn bytes(self) -> [u8; HEADER] {
        let [p0, p1, p2, p3] = self.page.to_le_bytes();
        let [l0, l1] = self.length.to_le_bytes();
        let [c0, c1, c2, c3] = self.checksum.to_le_bytes();
        [p0, p1, p2, p3, l0, l1, self.kind as u8, 0, c0, c1, c2, c3]
    }

    /// Bytes of the entry.
    pub fn entry(self) -> usize {
        HEADER + usize::from(self.length)
    }

    /// Units that the entry takes.
    pub fn units(self) -> u32 {
        units(self.entry())
    }

    /// True when `payload` is what was written.
    pub fn matches(self, payload: &[u8]) -> bool {
        checksum(self.page, self.length, self.kind, payload) == self.checksum
    }
}

/// Units that an entry of `bytes` takes.
pub fn units(bytes: usize) -> u32 {
    bytes.div_ceil(UNIT) as u32
}

/// Odd, so that multiplication loses nothing; its bits look random.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(state: u64, word: u64) -> u64 {
    (state ^ word).wrapping_mul(FACTOR).rotate_left(29)
}

/// A checksum against accidents, not against forgery: nobody but this process writes here. Each step is one to one,
/// so a single damaged word always changes the 64 bits; of them 32 are kept. Four lanes, because one would wait
/// for its multiplications: 0.1 µs for 1.5 KiB.
fn checksum(page: u32, length: u16, kind: Kind, payload: &[u8]) -> u32 {
    let seed = u64::from(page) << 32 | u64::from(length) << 8 | kind as u64;
    let mut lanes = [seed, FACTOR, !seed, !FACTOR];
    let (chunks, rest) = payload.as_chunks::<32>();
    for chunk in chunks {
        add(&mut lanes, chunk);
    }
    if !rest.is_empty() {
        let mut last = [0; 32];
        last[..rest.len()].copy_from_slice(rest);
        add(&mut lanes, &last);
    }
    let all = lanes.into_iter().fold(FACTOR, mix);
    ((all ^ all >> 32).wrapping_mul(FACTOR) >> 32) as u32
}

fn add(lanes: &mut [u64; 4], chunk: &[u8; 32]) {
    for (lane, word) in lanes.iter_mut().zip(chunk.as_chunks::<8>().0) {
        *lane = mix(*lane, u64::from_le_bytes(*word));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        for kind in [Kind::Word, Kind::Lz4, Kind::Zstd] {
            let header = Header::of(0xdead_beef, kind, &[7; MOST_PAYLOAD]);
            assert_eq!(Header::parse(header.bytes()), Ok(header));
            assert_eq!((header.entry(), header.units()), (MOST, 192));
        }
    }

    #[test]
    fn impossible_headers_are_refused() {
        let good = Header::of(1, Kind::Lz4, b"content").bytes();
        for (at, value) in [(5, 0xff), (6, 0), (6, 4)] {
            let mut bad = good;
            bad[at] = value;
            assert_eq!(Header::parse(bad), Err(Damage::Header), "byte {at} is {value}");
        }
    }

    #[test]
    fn no_flipped_bit_goes_unnoticed() {
        for length in [0, 1, 8, 31, 32, 33, 500] {
            let payload: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
            let header = Header::of(9, Kind::Lz4, &payload);
            for bit in 0..length * 8 {
                let mut bad = payload.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(!header.matches(&bad), "bit {bit} of {length} bytes");
            }
            for bit in (0..HEADER * 8).filter(|bit| bit / 8 != DEAD) {
                let mut bytes = header.bytes();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let noticed =
                    Header::parse(bytes).is_ok_and(|bad| usize::from(bad.length) == length && bad.matches(&payload));
                assert!(!noticed, "bit {bit} of the header");
            }
        }
    }
}

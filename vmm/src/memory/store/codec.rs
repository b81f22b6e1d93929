//! How a page becomes small: lz4, zstd, or a word that it repeats.
//!
//! The guest chooses what is compressed, so lz4's encoder and decoder are those without `unsafe` (10 % slower).
//! Both halves allocate when they are made; then lz4 uses one table for all pages, and zstd one context for each direction.
//!
//! Measured, µs a page (records with pointers, words of text, random bytes): lz4 4.4, 8.1, 1.2; zstd 11.5, 15, 2.7;
//! back again lz4 2.5, 1.7; zstd 5.1, 6.2.

use std::io;

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use zstd::bulk::{Compressor, Decompressor};

use super::PAGE;
use super::entry::{Kind, MOST_PAYLOAD};

/// How pages are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Codec {
    /// Fast both ways.
    #[default]
    Lz4,
    /// A third smaller, and three times as slow.
    Zstd,
}

/// Bytes that [`Encoder::encode`] wants to have at its disposal.
pub const ROOM: usize = get_maximum_output_size(PAGE);

/// The level of zstd.
const LEVEL: i32 = 1;

/// Compresses pages one at a time.
pub enum Encoder {
    /// With the table that every page uses again.
    Lz4(CompressTable),
    /// With zstd's context.
    Zstd(Box<Compressor<'static>>),
}

impl Encoder {
    /// An encoder for `codec`.
    ///
    /// # Errors
    /// When zstd refuses its parameters.
    pub fn new(codec: Codec) -> io::Result<Self> {
        Ok(match codec {
            Codec::Lz4 => Self::Lz4(CompressTable::small()),
            Codec::Zstd => Self::Zstd(Box::new(Compressor::new(LEVEL)?)),
        })
    }

    /// Compresses `content` to the begin of `out`, which has [`ROOM`] bytes. Says how long it is, or nothing when that is
    /// more than [`MOST_PAYLOAD`]. Random bytes take a third of the time: lz4 skips ahead, and zstd stops.
    pub fn encode(&mut self, content: &[u8; PAGE], out: &mut [u8]) -> Option<usize> {
        let length = match self {
            Self::Lz4(table) => compress_into_with_table(content, out, table).ok()?,
            Self::Zstd(context) => context.compress_to_buffer(content, &mut out[..MOST_PAYLOAD]).ok()?,
        };
        (length <= MOST_PAYLOAD).then_some(length)
    }

    /// What the payload will be.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Lz4(_) => Kind::Lz4,
            Self::Zstd(_) => Kind::Zstd,
        }
    }
}

/// Decompresses pages; allocates when it is made, and else only for the error of a zstd frame whose checksum was right.
pub struct Decoder(Option<Box<Decompressor<'static>>>);

impl Decoder {
    /// A decoder for what `codec` makes.
    ///
    /// # Errors
    /// When zstd refuses its parameters.
    pub fn new(codec: Codec) -> io::Result<Self> {
        Ok(Self(match codec {
            Codec::Lz4 => None,
            Codec::Zstd => Some(Box::new(Decompressor::new()?)),
        }))
    }

    /// Fills `out` from `payload`. False when that is no page; what is in `out` means nothing then.
    pub fn decode(&mut self, kind: Kind, payload: &[u8], out: &mut [u8; PAGE]) -> bool {
        match (kind, &mut self.0) {
            (Kind::Word, _) => {
                let Ok(word) = <[u8; 8]>::try_from(payload) else { return false };
                out.as_chunks_mut().0.fill(word);
                true
            }
            (Kind::Lz4, _) => decompress_into(payload, out).is_ok_and(|length| length == PAGE),
            (Kind::Zstd, Some(context)) => {
                context.decompress_to_buffer(payload, &mut out[..]).is_ok_and(|length| length == PAGE)
            }
            (Kind::Zstd, None) => false,
        }
    }
}

/// The word that the page is made of, if there is one. Mostly the first comparison says no.
pub fn same_word(content: &[u8; PAGE]) -> Option<u64> {
    let words = content.as_chunks::<8>().0;
    let first = words[0];
    words.iter().all(|word| *word == first).then_some(u64::from_le_bytes(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_decodes_and_random_bytes_are_refused() {
        let text: Vec<u8> = (0..PAGE).map(|i| b"the guest's pages "[i % 18] + (i / 1000) as u8).collect();
        let text: [u8; PAGE] = text.try_into().unwrap();
        let mut state = 1u64;
        let noise = std::array::from_fn(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 56) as u8
        });
        for codec in [Codec::Lz4, Codec::Zstd] {
            let (mut encoder, mut decoder) = (Encoder::new(codec).unwrap(), Decoder::new(codec).unwrap());
            let (mut small, mut back) = ([0; ROOM], [0; PAGE]);
            let length = encoder.encode(&text, &mut small).unwrap();
            assert!(length < 400, "{codec:?}: {length} bytes");
            assert!(decoder.decode(encoder.kind(), &small[..length], &mut back));
            assert_eq!(back, text, "{codec:?}");
            assert!(!decoder.decode(encoder.kind(), &small[..length - 1], &mut back), "{codec:?}: cut off");
            assert_eq!(encoder.encode(&noise, &mut small), None, "{codec:?}");
            assert!(encoder.encode(&text, &mut small).is_some(), "{codec:?}: after a refusal");
        }
    }

    #[test]
    fn a_page_is_one_word_only_when_all_of_it_is() {
        let mut page = [0; PAGE];
        page.as_chunks_mut::<8>().0.fill(77u64.to_le_bytes());
        assert_eq!(same_word(&page), Some(77));
        page[PAGE - 1] = 1;
        assert_eq!(same_word(&page), None);
        assert_eq!(same_word(&[0; PAGE]), Some(0));
    }
}

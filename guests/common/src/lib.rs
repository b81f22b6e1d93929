//! What the Linux guest's init and the freestanding payload share: sizes, arguments and the pattern in each page.
//!
//! No allocation and no standard library: the payload has neither.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod access;

pub use access::{Access, Pattern, scramble};

/// Bytes in a page, the unit of everything the guests touch.
pub const PAGE_SIZE: u64 = 4096;
/// 64-bit words in a page.
pub const PAGE_WORDS: usize = 512;

/// The value that word `word` (0..512) of page number `page` holds under `seed`. Never zero, so that a page which was
/// lost and filled with zeroes is told from one which was kept; different for every page, so that two pages which were
/// exchanged are found as well.
#[must_use]
pub const fn pattern(seed: u64, page: u64, word: usize) -> u64 {
    // splitmix64's finisher: a bijection, cheap, and no two nearby inputs look alike.
    let mut x = seed.wrapping_mul(0xd134_2543_de82_ef95) ^ page.wrapping_mul(512).wrapping_add(word as u64);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)) | 1
}

/// What of each page is written, and so how well it compresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Words 0 and 511; the rest stays what it was, mostly zeroes, so the page compresses well.
    Ends,
    /// Words 0 to 255; the rest stays what it was, so the page compresses as much data does.
    Half,
    /// All words, of which the second half hold the same value: compresses like [`Fill::Half`].
    Mixed,
    /// All words with the same value: one word says what is in the page.
    Same,
    /// All words, each with another value: does not compress at all.
    Full,
}

impl Fill {
    /// The words of a page which hold the pattern.
    pub fn words(self) -> core::iter::StepBy<core::ops::Range<usize>> {
        match self {
            Fill::Ends => (0..PAGE_WORDS).step_by(PAGE_WORDS - 1),
            Fill::Half => (0..PAGE_WORDS / 2).step_by(1),
            Fill::Mixed | Fill::Same | Fill::Full => (0..PAGE_WORDS).step_by(1),
        }
    }

    /// The value that word `word` of page number `page` holds under `seed`, if it is one of [`Fill::words`].
    #[must_use]
    pub const fn value(self, seed: u64, page: u64, word: usize) -> u64 {
        match self {
            Fill::Mixed if word >= PAGE_WORDS / 2 => pattern(seed, page, 0),
            Fill::Same => pattern(seed, page, 0),
            Fill::Ends | Fill::Half | Fill::Mixed | Fill::Full => pattern(seed, page, word),
        }
    }
}

/// Parses a number: decimal, or hexadecimal after `0x`, with an optional suffix K, M, G or T of base 1024 (and `i`, `B`
/// after it). `None` for anything else, overflow included.
#[must_use]
pub fn parse_number(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).ok();
    }
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_end_matches('B').trim_end_matches('i') {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The arguments of one command: words, of which those with a `=` are options and may stand anywhere.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a>(pub &'a str);

impl<'a> Arguments<'a> {
    /// The plain word number `index`, options not counted.
    #[must_use]
    pub fn word(&self, index: usize) -> Option<&'a str> {
        self.0.split_ascii_whitespace().filter(|w| !w.contains('=')).nth(index)
    }

    /// The value of option `name`.
    #[must_use]
    pub fn option(&self, name: &str) -> Option<&'a str> {
        self.0.split_ascii_whitespace().find_map(|w| w.split_once('=').filter(|(key, _)| *key == name).map(|kv| kv.1))
    }

    /// The number in plain word `index`; an error names it as `what`.
    ///
    /// # Errors
    /// The word is missing or is not a number.
    pub fn number(&self, index: usize, what: &'static str) -> Result<u64, BadArgument> {
        self.word(index).and_then(parse_number).ok_or(BadArgument(what))
    }

    /// The number in option `name`, or `default` without that option.
    ///
    /// # Errors
    /// The option's value is not a number.
    pub fn number_or(&self, name: &'static str, default: u64) -> Result<u64, BadArgument> {
        self.option(name).map_or(Ok(default), |v| parse_number(v).ok_or(BadArgument(name)))
    }

    /// What of each page to write: option `full=1`, or `fill=` with the name of a [`Fill`].
    ///
    /// # Errors
    /// The option's value is not a number, or not a name.
    pub fn fill(&self) -> Result<Fill, BadArgument> {
        match self.option("fill") {
            None if self.number_or("full", 0)? == 0 => Ok(Fill::Ends),
            None | Some("full") => Ok(Fill::Full),
            Some("ends") => Ok(Fill::Ends),
            Some("half") => Ok(Fill::Half),
            Some("mixed") => Ok(Fill::Mixed),
            Some("same") => Ok(Fill::Same),
            Some(_) => Err(BadArgument("fill")),
        }
    }
}

/// An argument which is missing or not understood, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadArgument(pub &'static str);

impl core::fmt::Display for BadArgument {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} is missing or not what it should be", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_base_1024_and_junk_is_refused() {
        assert_eq!(parse_number("64M"), Some(64 << 20));
        assert_eq!(parse_number("4KiB"), Some(4096));
        assert_eq!(parse_number("0x1000"), Some(4096));
        assert_eq!(parse_number("7"), Some(7));
        for junk in ["", "M", "-1", "12X", "99999999999T", "0x"] {
            assert_eq!(parse_number(junk), None, "{junk}");
        }
    }

    #[test]
    fn options_do_not_count_as_words() {
        let a = Arguments("seed=7 0x200000 64M full=1");
        assert_eq!(a.number(0, "START"), Ok(0x20_0000));
        assert_eq!(a.number(1, "SIZE"), Ok(64 << 20));
        assert_eq!(a.number_or("seed", 1), Ok(7));
        assert_eq!(a.number_or("passes", 3), Ok(3));
        assert_eq!(a.fill(), Ok(Fill::Full));
        assert_eq!(Arguments("fill=half").fill(), Ok(Fill::Half));
        assert_eq!(Arguments("fill=most").fill(), Err(BadArgument("fill")));
        assert_eq!(a.number(2, "STRIDE"), Err(BadArgument("STRIDE")));
        assert_eq!(Arguments("seed=x").number_or("seed", 1), Err(BadArgument("seed")));
    }

    #[test]
    fn the_pattern_is_never_zero_and_differs_between_pages() {
        let mut seen: Vec<u64> = (0..4096).map(|page| pattern(1, page, 0)).collect();
        assert!(seen.iter().all(|v| *v != 0));
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 4096);
        assert_ne!(pattern(1, 0, 0), pattern(2, 0, 0));
        assert_eq!(Fill::Ends.words().collect::<Vec<_>>(), [0, 511]);
        assert_eq!(Fill::Half.words().collect::<Vec<_>>(), (0..256).collect::<Vec<_>>());
        assert_eq!(Fill::Full.words().count(), 512);
    }

    #[test]
    fn a_fill_has_as_many_values_as_its_name_says() {
        let values = |fill: Fill| {
            let mut values: Vec<u64> = fill.words().map(|word| fill.value(3, 7, word)).collect();
            values.sort_unstable();
            values.dedup();
            values.len()
        };
        let fills = [Fill::Ends, Fill::Half, Fill::Mixed, Fill::Same, Fill::Full];
        assert_eq!(fills.map(values), [2, 256, 256, 1, 512]);
        for (text, fill) in [("fill=mixed", Fill::Mixed), ("fill=same", Fill::Same), ("fill=ends full=1", Fill::Ends)] {
            assert_eq!(Arguments(text).fill(), Ok(fill), "{text}");
        }
        assert_eq!(Arguments("fill=none").fill(), Err(BadArgument("fill")));
    }
}

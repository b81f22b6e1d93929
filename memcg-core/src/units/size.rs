//! Sizes as people write and read them.

use super::{Limit, PAGE_SIZE, Pages};

/// Units in rising order: suffix and the power of two that it stands for.
const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// More decimals than this are refused: nobody means them, and with them `decimals << 40` fits 128 bits.
const MAX_DECIMALS: usize = 26;

/// A size as the user wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeArg {
    /// So many bytes; any number, not yet checked against the page size.
    Bytes(u64),
    /// `max`: no limit.
    Max,
}

impl SizeArg {
    /// The size as a limit.
    ///
    /// # Errors
    /// [`SizeError::NotPages`] when it is not a multiple of [`PAGE_SIZE`].
    pub fn to_limit(self) -> Result<Limit, SizeError> {
        match self {
            SizeArg::Max => Ok(Limit::Max),
            SizeArg::Bytes(bytes) if bytes.is_multiple_of(PAGE_SIZE) => {
                Ok(Limit::Pages(Pages::from_bytes_floor(bytes)))
            }
            SizeArg::Bytes(bytes) => Err(SizeError::NotPages { bytes, below: bytes - bytes % PAGE_SIZE }),
        }
    }

    /// The size as a number of pages, where `max` makes no sense (guest RAM, an amount to reclaim).
    ///
    /// # Errors
    /// As [`Self::to_limit`], and [`SizeError::MaxNotAllowed`] for `max`.
    pub fn to_pages(self) -> Result<Pages, SizeError> {
        self.to_limit()?.as_pages().ok_or(SizeError::MaxNotAllowed)
    }
}

/// Why a size was refused. The message says what to write instead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Nothing there.
    #[error("empty size: write bytes, a number with K, M, G or T such as 512M, or max")]
    Empty,
    /// A minus sign, `-1` included.
    #[error("{0:?} is negative: for no limit write max")]
    Negative(String),
    /// A share of something.
    #[error("{0:?} is a percentage: write an absolute size such as 512M")]
    Percent(String),
    /// Anything else that is no size.
    #[error("{0:?} is not a size: write bytes, a number with K, M, G or T such as 512M or 1.5G, or max")]
    Malformed(String),
    /// More than 64 bits.
    #[error("{0:?} is too large: the largest size is {max} bytes", max = u64::MAX)]
    TooLarge(String),
    /// Decimals that leave a part of a byte.
    #[error("{0:?} is not a whole number of bytes: use a smaller unit")]
    Fraction(String),
    /// Not a multiple of the page size.
    #[error("{bytes} bytes is not a multiple of the page size {PAGE_SIZE}: {}", instead(*.bytes, *.below))]
    NotPages {
        /// What was asked for.
        bytes: u64,
        /// The next smaller multiple.
        below: u64,
    },
    /// `max` where a number is needed.
    #[error("max is not possible here: write a size such as 512M")]
    MaxNotAllowed,
}

/// What to write instead of so many bytes. A number that is less than a page was meant with a unit.
fn instead(bytes: u64, below: u64) -> String {
    match below {
        0 => format!("did you mean {bytes}M, which is {}?", bytes << 20),
        _ => format!("write {below}, the next smaller one"),
    }
}

/// Reads a size: bytes, or a number with `K M G T` (base 1024, either case, optional `i`, optional `B`, decimals
/// allowed) or `max`. White space around it is ignored (the newline of `echo`), anything else is refused.
///
/// # Errors
/// For empty, negative, percentages, trailing junk, more than 64 bits, and parts of a byte. The caller keeps its old
/// value then (semantics row 6).
pub fn parse_size(text: &str) -> Result<SizeArg, SizeError> {
    let text = text.trim();
    let owned = || text.to_owned();
    if text.is_empty() {
        return Err(SizeError::Empty);
    }
    if text == "max" {
        return Ok(SizeArg::Max);
    }
    if text.starts_with('-') {
        return Err(SizeError::Negative(owned()));
    }
    if text.ends_with('%') {
        return Err(SizeError::Percent(owned()));
    }
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let shift = shift_of(suffix).ok_or_else(|| SizeError::Malformed(owned()))?;
    let (whole, decimals) = match number.split_once('.') {
        Some((whole, decimals)) if !decimals.is_empty() && !decimals.contains('.') => (whole, decimals),
        Some(_) => return Err(SizeError::Malformed(owned())),
        None => (number, ""),
    };
    if whole.is_empty() {
        return Err(SizeError::Malformed(owned()));
    }
    let too_large = || SizeError::TooLarge(owned());
    // Only digits are left, so a failure to parse can only be an overflow.
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let decimals = decimals.trim_end_matches('0');
    if decimals.len() > MAX_DECIMALS {
        return Err(SizeError::Fraction(owned()));
    }
    let part: u128 = if decimals.is_empty() { 0 } else { decimals.parse().map_err(|_| too_large())? };
    let part = part << shift;
    let scale = 10u128.pow(decimals.len() as u32);
    if !part.is_multiple_of(scale) {
        return Err(SizeError::Fraction(owned()));
    }
    let bytes = (u128::from(whole) << shift) + part / scale;
    u64::try_from(bytes).map(SizeArg::Bytes).map_err(|_| too_large())
}

/// The power of two that a suffix stands for, `None` when it is no suffix.
fn shift_of(suffix: &str) -> Option<u32> {
    let mut rest = suffix.chars();
    let Some(first) = rest.next() else {
        return Some(0);
    };
    let first = first.to_ascii_uppercase();
    if first == 'B' {
        return rest.next().is_none().then_some(0);
    }
    let shift = UNITS.iter().find(|(unit, _)| *unit == first)?.1;
    matches!(rest.as_str(), "" | "i" | "B" | "b" | "iB" | "ib").then_some(shift)
}

/// `bytes` to be typed in again: a whole number of the largest unit in which it is one, such as `1300M`.
pub fn exact(bytes: u64) -> String {
    let whole = |(_, shift): &&(char, u32)| bytes > 0 && bytes.trailing_zeros() >= *shift;
    let unit = UNITS.iter().rev().find(whole);
    unit.map_or_else(|| bytes.to_string(), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}

/// `bytes` for people: `192M`, `1.5G`. A whole number of units has no decimal, anything else is rounded to one; so
/// `1.0G` is a little more or less than `1G`.
pub fn human(bytes: u64) -> String {
    // The largest unit that fits at least once.
    let Some(at) = UNITS.iter().rposition(|(_, shift)| bytes >> shift > 0) else {
        return bytes.to_string();
    };
    let (unit, shift) = UNITS[at];
    if bytes.trailing_zeros() >= shift {
        return format!("{}{unit}", bytes >> shift);
    }
    let tenths = |shift: u32| ((u128::from(bytes) * 10 + (1 << (shift - 1))) >> shift) as u64;
    // Rounding can lift a number to the next unit: 1023.96K is 1.0M.
    let (unit, tenths) = match UNITS.get(at + 1) {
        Some((next, next_shift)) if tenths(shift) >= 10 * 1024 => (*next, tenths(*next_shift)),
        _ => (unit, tenths(shift)),
    };
    format!("{}.{}{unit}", tenths / 10, tenths % 10)
}

//! Pages, limits and sizes.
//!
//! Inside there are only pages, outside only bytes; this module is the one place that converts between them. "No limit"
//! is a value of its own ([`Limit::Max`]), not an accident of arithmetic (semantics row 2).

mod size;

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};

pub use size::{SizeArg, SizeError, exact, human, parse_size};

/// Bytes in a page: 4 KiB of guest-physical memory, whatever the host uses underneath.
pub const PAGE_SIZE: u64 = 4096;

/// A number of pages of [`PAGE_SIZE`] bytes.
///
/// Addition saturates: a sum that does not fit 64 bits is larger than any limit, and a panic would serve nobody.
/// There is no `-`: each subtraction says what happens below zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pages(pub u64);

impl Pages {
    /// No page.
    pub const ZERO: Pages = Pages(0);
    /// One page.
    pub const ONE: Pages = Pages(1);

    /// The whole pages in `bytes`, a remainder dropped.
    pub const fn from_bytes_floor(bytes: u64) -> Pages {
        Pages(bytes / PAGE_SIZE)
    }

    /// The pages needed to hold `bytes`.
    pub const fn from_bytes_ceil(bytes: u64) -> Pages {
        Pages(bytes.div_ceil(PAGE_SIZE))
    }

    /// `mib` MiB in pages.
    pub const fn from_mib(mib: u64) -> Pages {
        Pages(mib.saturating_mul((1 << 20) / PAGE_SIZE))
    }

    /// The same amount in bytes; saturates at `u64::MAX`.
    pub const fn bytes(self) -> u64 {
        self.0.saturating_mul(PAGE_SIZE)
    }

    /// True for zero pages.
    #[inline]
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// `self - other`, zero when `other` is larger.
    #[must_use]
    #[inline]
    pub const fn saturating_sub(self, other: Pages) -> Pages {
        Pages(self.0.saturating_sub(other.0))
    }

    /// `self - other`, `None` when `other` is larger.
    #[inline]
    pub const fn checked_sub(self, other: Pages) -> Option<Pages> {
        match self.0.checked_sub(other.0) {
            Some(n) => Some(Pages(n)),
            None => None,
        }
    }

    /// `self + other`, `None` when that does not fit 64 bits.
    #[inline]
    pub const fn checked_add(self, other: Pages) -> Option<Pages> {
        match self.0.checked_add(other.0) {
            Some(n) => Some(Pages(n)),
            None => None,
        }
    }
}

impl Add for Pages {
    type Output = Pages;

    #[inline]
    fn add(self, other: Pages) -> Pages {
        Pages(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Pages {
    #[inline]
    fn add_assign(&mut self, other: Pages) {
        *self = *self + other;
    }
}

impl Sum for Pages {
    fn sum<I: Iterator<Item = Pages>>(pages: I) -> Pages {
        pages.fold(Pages::ZERO, Add::add)
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("1 page"),
            n => write!(f, "{n} pages"),
        }
    }
}

/// A limit: a number of pages, or none. Ordered, with [`Limit::Max`] above every number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Limit {
    /// Not more than this many pages.
    Pages(Pages),
    /// No limit.
    #[default]
    Max,
}

impl Limit {
    /// A limit of zero pages.
    pub const ZERO: Limit = Limit::Pages(Pages::ZERO);

    /// The number of pages, `None` without a limit.
    #[inline]
    pub const fn as_pages(self) -> Option<Pages> {
        match self {
            Limit::Pages(pages) => Some(pages),
            Limit::Max => None,
        }
    }

    /// The limit in bytes, `None` without a limit (`null` in JSON).
    pub fn as_bytes(self) -> Option<u64> {
        self.as_pages().map(Pages::bytes)
    }

    /// True without a limit.
    pub const fn is_max(self) -> bool {
        matches!(self, Limit::Max)
    }
}

impl From<Option<Pages>> for Limit {
    fn from(pages: Option<Pages>) -> Limit {
        pages.map_or(Limit::Max, Limit::Pages)
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::Pages(pages) => f.write_str(&human(pages.bytes())),
            Limit::Max => f.write_str("max"),
        }
    }
}

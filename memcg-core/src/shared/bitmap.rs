//! One bit a page.

use std::ops::Range;

/// A set of pages below a fixed number.
#[derive(Clone, Debug)]
pub(super) struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    /// The empty set of pages below `pages`.
    pub fn new(pages: usize) -> Bitmap {
        Bitmap { words: vec![0; pages.div_ceil(64)] }
    }

    pub fn contains(&self, page: usize) -> bool {
        self.words[page / 64] & (1 << (page % 64)) != 0
    }

    pub fn insert(&mut self, page: usize) {
        self.words[page / 64] |= 1 << (page % 64);
    }

    pub fn remove(&mut self, page: usize) {
        self.words[page / 64] &= !(1 << (page % 64));
    }

    /// The first page of the set in `range`.
    pub fn first_in(&self, range: Range<usize>) -> Option<usize> {
        let mut at = range.start;
        while at < range.end {
            let word = self.words[at / 64] >> (at % 64);
            if word != 0 {
                let page = at + word.trailing_zeros() as usize;
                return (page < range.end).then_some(page);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// The pages of the set in `range`, the lowest first.
    pub fn iter_in(&self, range: Range<usize>) -> impl Iterator<Item = usize> + '_ {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let page = self.first_in(at..range.end)?;
            at = page + 1;
            Some(page)
        })
    }
}

//! From page numbers to page ranges.
//!
//! Guests send page numbers one by one, in the order of their allocator: often a descending run. One discard of a
//! range is much cheaper than one of each page, and a discard inside a huge page costs a split, so neighbours belong
//! together.

/// A run of guest pages of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// Number of the first page: its guest-physical address divided by 4096.
    pub first: u64,
    /// How many pages, at least 1.
    pub pages: u64,
}

impl PageRange {
    /// Number of the first page after the range.
    pub fn end(&self) -> u64 {
        self.first + self.pages
    }
}

/// Merges page numbers into ranges that are sorted, disjoint and not adjacent; `pfns` is left sorted and `ranges` is
/// replaced. Returns how many numbers were there more than once (each repetition counts).
pub fn merge(pfns: &mut [u32], ranges: &mut Vec<PageRange>) -> u64 {
    ranges.clear();
    pfns.sort_unstable();
    let mut duplicates = 0;
    for &pfn in &*pfns {
        let pfn = u64::from(pfn);
        match ranges.last_mut() {
            Some(last) if pfn < last.end() => duplicates += 1,
            Some(last) if pfn == last.end() => last.pages += 1,
            _ => ranges.push(PageRange { first: pfn, pages: 1 }),
        }
    }
    duplicates
}

/// Unites ranges in any order so that they are sorted, disjoint and not adjacent. Returns how many pages were there more
/// than once (each repetition counts).
pub fn unite(ranges: &mut Vec<PageRange>) -> u64 {
    ranges.sort_unstable_by_key(|range| range.first);
    let mut duplicates = 0;
    ranges.dedup_by(|next, last| {
        if next.first > last.end() {
            return false;
        }
        let end = last.end().max(next.end());
        duplicates += last.pages + next.pages - (end - last.first);
        last.pages = end - last.first;
        true
    });
    duplicates
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn merged(pfns: &[u32]) -> (Vec<(u64, u64)>, u64) {
        let mut ranges = vec![PageRange { first: 9, pages: 9 }];
        let duplicates = merge(&mut pfns.to_vec(), &mut ranges);
        (ranges.iter().map(|r| (r.first, r.pages)).collect(), duplicates)
    }

    #[test]
    fn examples() {
        assert_eq!(merged(&[]), (vec![], 0));
        assert_eq!(merged(&[5]), (vec![(5, 1)], 0));
        assert_eq!(merged(&[9, 8, 7, 6]), (vec![(6, 4)], 0));
        assert_eq!(merged(&[1, 3, 2, 8, 1, 1]), (vec![(1, 3), (8, 1)], 2));
        assert_eq!(merged(&[u32::MAX, 0, u32::MAX - 1]), (vec![(0, 1), (u64::from(u32::MAX) - 1, 2)], 0));
    }

    proptest! {
        #[test]
        fn ranges_hold_exactly_the_numbers(
            near in prop::collection::vec(0u32..600, 0..700),
            far in prop::collection::vec(any::<u32>(), 0..50),
        ) {
            let mut pfns: Vec<u32> = near.into_iter().chain(far).collect();
            let distinct: BTreeSet<u64> = pfns.iter().map(|&pfn| u64::from(pfn)).collect();
            let sent = pfns.len();
            let mut ranges = Vec::new();
            let duplicates = merge(&mut pfns, &mut ranges);
            prop_assert_eq!(duplicates as usize, sent - distinct.len());
            prop_assert!(ranges.windows(2).all(|w| w[0].end() < w[1].first));
            prop_assert!(ranges.iter().all(|r| r.pages > 0));
            let held: Vec<u64> = ranges.iter().flat_map(|r| r.first..r.end()).collect();
            prop_assert_eq!(held, distinct.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn united_ranges_hold_exactly_the_pages(given in prop::collection::vec((0u64..300, 1u64..40), 0..60)) {
            let mut ranges: Vec<_> = given.iter().map(|&(first, pages)| PageRange { first, pages }).collect();
            let distinct: BTreeSet<u64> = ranges.iter().flat_map(|r| r.first..r.end()).collect();
            let duplicates = unite(&mut ranges);
            prop_assert_eq!(duplicates, given.iter().map(|(_, pages)| pages).sum::<u64>() - distinct.len() as u64);
            prop_assert!(ranges.windows(2).all(|w| w[0].end() < w[1].first));
            let held: Vec<u64> = ranges.iter().flat_map(|r| r.first..r.end()).collect();
            prop_assert_eq!(held, distinct.into_iter().collect::<Vec<_>>());
        }
    }
}

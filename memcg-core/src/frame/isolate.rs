//! Isolation: taking the coldest pages off a list, with bounded work.
//!
//! ```text
//!            head                                   tail
//!   new ───►  ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■ ■  ───► looked at, at most `budget` entries
//!             ▲                                             │
//!             └── pinned, wanted, outside, referenced ◄─────┼───► claimed
//! ```
//!
//! Whatever is looked at and not taken goes to the head, so that the next scan sees others: a page that cannot be
//! taken never stands in the way of those that can (B30), and a few scans see the whole list (row 39). Nothing is
//! remembered between scans (B38).

use std::ops::Range;

use super::FrameTable;
use super::links::List;
use super::state::record;
use super::table::BLOCK;

/// What a scan looks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scan {
    /// The list that is scanned.
    pub list: List,
    /// Entries that are looked at, at most; a whole block is one. See [`FrameTable::scan_target`].
    pub budget: usize,
    /// Pages wanted: the scan ends when it has as many. A whole block that is more than what is missing is taken
    /// whole, unless `fine`.
    pub want: u64,
    /// Pages that may be taken: a memory slot, say. The others go to the head all the same: ages are in the records.
    pub within: Range<usize>,
    /// Split a whole block rather than take more than what is wanted.
    pub fine: bool,
}

impl Scan {
    /// A scan of `list` for `want` pages anywhere, by whole blocks where there are any.
    pub fn new(list: List, budget: usize, want: u64) -> Scan {
        Scan { list, budget, want, within: 0..usize::MAX, fine: false }
    }
}

/// What a scan did: `taken + referenced <= scanned`, the rest was skipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// Entries looked at.
    pub entries: usize,
    /// Their pages.
    pub scanned: u64,
    /// Pages claimed.
    pub taken: u64,
    /// Pages that were seen in use since the last scan and stay once more.
    pub referenced: u64,
}

impl FrameTable {
    /// Claims cold pages of a list ([`List::claim`]) and hands each claimed entry to `out`, the coldest first. The
    /// caller ends each claim by what its system call did: [`FrameTable::set_range`].
    ///
    /// Pages that are pinned or wanted, or not in `within`, are skipped; referenced ones lose the flag and stay. Of a
    /// whole block only all pages can be taken: where that is not possible, or not wanted, it is split and the scan
    /// goes on with its pages. No entry is looked at twice in one call, whatever the budget, and at most one block is
    /// split for each 512 entries looked at, and one more.
    pub fn isolate(&mut self, scan: &Scan, mut out: impl FnMut(Range<usize>)) -> Scanned {
        let mut done = Scanned::default();
        let mut unseen = self.entries(scan.list);
        while done.entries < scan.budget && done.taken < scan.want && unseen > 0 {
            let Some(entry) = self.links.tail(scan.list) else { break };
            let pages = self.entry_pages(entry);
            let first = pages.start;
            let block = entry >= self.len();
            let members = if block { self.blocks[first / BLOCK].members() } else { 1 };
            let len = members as u64;
            let outside = pages.end <= scan.within.start || pages.start >= scan.within.end;
            let referenced = !outside && self.take_reference(first);
            let busy = self.busy(pages.clone());
            if block && !outside && !referenced {
                let cut = pages.start < scan.within.start || pages.end > scan.within.end;
                if members < pages.len() || cut || busy || (scan.fine && len > scan.want - done.taken) {
                    self.split(first);
                    unseen += members - 1;
                    continue;
                }
            }
            unseen -= 1;
            done.entries += 1;
            done.scanned += len;
            if outside || busy || referenced {
                self.rotate(scan.list, entry);
                done.referenced += if referenced { len } else { 0 };
            } else {
                self.set_range(pages.start, pages.end, scan.list.claim());
                done.taken += len;
                out(pages);
            }
        }
        done
    }

    /// Entries that a scan should look at which wants to see one part in 2^`priority` of `list`: at least one, so that a
    /// small VM is not spared (B89). Priority 0 is the whole list.
    pub fn scan_target(&self, list: List, priority: u32) -> usize {
        self.entries(list).checked_shr(priority).unwrap_or(0).max(1)
    }

    /// Whether one of `pages` must stay where it is.
    fn busy(&self, pages: Range<usize>) -> bool {
        self.bytes[pages].iter().fold(0, |all, byte| all | byte) & (record::PINNED | record::WANTED) != 0
    }

    /// The referenced flag of the entry that begins with page `first`, which is cleared.
    fn take_reference(&mut self, first: usize) -> bool {
        let block = &mut self.blocks[first / BLOCK];
        if block.whole {
            return std::mem::take(&mut block.referenced);
        }
        let referenced = self.bytes[first] & record::REFERENCED != 0;
        self.bytes[first] &= !record::REFERENCED;
        referenced
    }
}

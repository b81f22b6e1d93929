//! What a guest's use of its memory costs beside its pages.
//!
//! A block of 512 pages costs something when the first of its pages is filled (page tables, states), when its pages are
//! told apart for the first time (links and generations), and when one is moved aside for the first time (the stage's page
//! table). A block that was filled with one huge page has no table of KVM's until it is split. None of it comes back before
//! the VM ends: a discard leaves page tables empty and in place. Reclaim itself has buffers from its first page on. So the
//! cost follows from numbers that only grow.

use super::table::{BLOCK, FrameTable};
use crate::units::Pages;

/// Page tables for a block, and for each of the next larger piece: the host's and KVM's.
const TABLES: u64 = 2;

/// Bytes of states for a block, with the bit of each page that says whether it is present.
const STATES: u64 = (BLOCK + BLOCK / 8) as u64;

/// Bytes of links and generations for a block.
const LINKS: u64 = ((size_of::<[u32; 2]>() + size_of::<u16>()) * BLOCK) as u64;

/// Pages that ageing takes once it has begun: the cohorts of its samples, the stack of its thread.
const AGEING: Pages = Pages(12);

/// Pages that eviction takes once it has begun: a batch of contents, the tables of the compressor.
const EVICTION: Pages = Pages(52);

/// Pages that are used beside the guest's because of its own use of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// The kernel's page tables.
    pub tables: Pages,
    /// Frame records that were written, and the buffers of reclaim.
    pub records: Pages,
}

impl Cost {
    /// When pages of `touched` blocks have been filled, and those of `opened` blocks were told apart.
    pub fn of(touched: u64, opened: u64) -> Cost {
        let upper = touched.div_ceil(BLOCK as u64);
        let tables = touched.saturating_add(upper).saturating_mul(TABLES);
        let records = touched.saturating_mul(STATES).saturating_add(opened.saturating_mul(LINKS));
        Cost { tables: Pages(tables), records: Pages::from_bytes_ceil(records) }
    }

    /// The same, when pages of `aside` blocks have been moved aside, and some of them evicted.
    pub fn with_reclaim(mut self, aside: u64, evicted: bool) -> Cost {
        if aside > 0 {
            self.tables += Pages(aside.saturating_add(aside.div_ceil(BLOCK as u64)));
            self.records += AGEING;
        }
        if evicted {
            self.records += EVICTION;
        }
        self
    }

    /// The same, when `whole` of these blocks are one huge page each and have always been: KVM needs no table for such a one.
    pub fn with_huge(mut self, whole: u64) -> Cost {
        self.tables = self.tables.saturating_sub(Pages(whole));
        self
    }

    /// When a guest of `size` has used all there is.
    pub fn most(size: Pages) -> Cost {
        let blocks = size.0.div_ceil(BLOCK as u64);
        Cost::of(blocks, blocks).with_reclaim(blocks, blocks > 0)
    }

    /// Both.
    pub fn total(self) -> Pages {
        self.tables + self.records
    }
}

impl FrameTable {
    /// What the use of these pages has cost so far, if none of them is huge. Only grows.
    pub fn cost(&self) -> Cost {
        Cost::of(self.touched, self.opened).with_reclaim(self.aside, self.evicted)
    }
}

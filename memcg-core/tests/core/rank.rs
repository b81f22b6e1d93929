//! The kept page of a given rank.

use memcg_core::frame::{BLOCK, FrameState, FrameTable, Walk};

use FrameState::{Active, Ballooned, Discarding, Evicting, Idle, Moving, Swapped};

/// Pages of ranks, found by one walk.
fn pages(table: &FrameTable, ranks: impl IntoIterator<Item = u64>) -> Vec<Option<usize>> {
    let mut walk = Walk::default();
    ranks.into_iter().map(|rank| table.kept_at(&mut walk, rank)).collect()
}

/// A draw means the pages that have a content, wherever it is: not holes, not what is in the balloon or on its way there.
#[test]
fn a_rank_counts_what_is_kept() {
    let mut table = FrameTable::new(3 * BLOCK + 7);
    table.set_range(10, 20, Active);
    table.set_range(BLOCK, 2 * BLOCK, Active);
    table.set_range(2 * BLOCK, 2 * BLOCK + 5, Ballooned);
    table.set_range(3 * BLOCK, 3 * BLOCK + 7, Active);
    for (page, state) in [(12, Moving), (13, Discarding), (14, Moving), (14, Idle), (15, Moving), (15, Idle)] {
        table.set(page, state);
    }
    for state in [Evicting, Swapped] {
        table.set(15, state);
    }
    let kept: Vec<usize> =
        [10, 11, 12].into_iter().chain(14..20).chain(BLOCK..2 * BLOCK).chain(3 * BLOCK..3 * BLOCK + 7).collect();
    assert_eq!(table.kept(), kept.len() as u64);
    let all: Vec<_> = kept.iter().copied().map(Some).collect();
    assert_eq!(pages(&table, 0..table.kept()), all);
    let some = [1, 8, 9, 520, 521, 527, 528];
    assert_eq!(pages(&table, some), some.map(|rank| kept.get(rank as usize).copied()));
    assert_eq!(pages(&FrameTable::new(BLOCK), [0]), [None]);
}

/// The table may change under a walk: what it finds is kept, and comes once.
#[test]
fn a_walk_finds_no_page_twice() {
    let mut table = FrameTable::new(2 * BLOCK);
    table.set_range(0, 2 * BLOCK, Active);
    let mut walk = Walk::default();
    assert_eq!(table.kept_at(&mut walk, 100), Some(100));
    for page in 0..100 {
        table.set(page, Discarding);
    }
    assert_eq!(table.kept_at(&mut walk, 101), Some(201));
    for page in 0..100 {
        table.set(page, Ballooned);
        table.set(page, Active);
    }
    assert_eq!(table.kept_at(&mut walk, 102), None, "it was passed");
    assert_eq!(table.kept_at(&mut walk, 600), Some(600));
}

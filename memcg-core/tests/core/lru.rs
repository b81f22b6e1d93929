//! The lists of the frame table, and what reclaim takes from them.

use std::ops::Range;

use memcg_core::Pages;
use memcg_core::frame::{BLOCK, EXACT, FrameState, FrameTable, Histogram, List, Scan, Scanned, WorkingSet};

use FrameState::{Absent, Active, Ballooned, Discarding, Evicting, Idle, Moving, Swapped};

/// A table whose first `pages` pages were touched one by one, so that 0 is the coldest, and each is an entry.
fn touched(pages: usize) -> FrameTable {
    let mut table = FrameTable::new(pages + 2);
    (0..pages).for_each(|i| table.set(i, Active));
    (0..pages).step_by(BLOCK).for_each(|i| table.split(i));
    table
}

/// What a scan took.
fn isolate(table: &mut FrameTable, scan: &Scan) -> (Scanned, Vec<Range<usize>>) {
    let mut taken = Vec::new();
    let done = table.isolate(scan, |pages| taken.push(pages));
    assert_eq!(table.check(), []);
    (done, taken)
}

/// The first pages of a list's entries, coldest first.
fn order(table: &FrameTable, list: List) -> Vec<usize> {
    table.iter(list).map(|pages| pages.start).collect()
}

fn singles(pages: impl IntoIterator<Item = usize>) -> Vec<Range<usize>> {
    pages.into_iter().map(|i| i..i + 1).collect()
}

/// A new page was used just now: it must be the last victim, not the first.
/// Semantics: 35.
#[test]
fn a_new_page_comes_to_the_head() {
    let mut table = touched(3);
    assert_eq!(order(&table, List::Active), [0, 1, 2]);
    table.set(3, Active);
    let (_, taken) = isolate(&mut table, &Scan::new(List::Active, 3, 3));
    assert_eq!(taken, singles(0..3), "the new page was taken");
    assert_eq!(order(&table, List::Active), [3]);
}

/// Lists, claims and charges are three views of one thing. A record that is on no list while it is charged, or the other
/// way round, is memory that reclaim can never find, or finds twice.
/// Semantics: 35, 104, B37.
#[test]
fn every_charged_page_is_on_its_list_or_claimed() {
    let mut table = FrameTable::new(8);
    for (i, way) in [
        &[][..],
        &[Active],
        &[Active, Moving, Idle],
        &[Active, Moving, Idle, Evicting, Swapped],
        &[Ballooned],
        &[Active, Moving],
        &[Active, Moving, Idle, Evicting],
        &[Active, Discarding],
    ]
    .into_iter()
    .enumerate()
    {
        for state in way {
            let isolated = [Moving, Evicting, Discarding].iter().map(|claim| table.count(*claim)).sum::<u64>();
            let listed = table.iter(List::Active).chain(table.iter(List::Idle)).flatten().count() as u64;
            assert_eq!(listed + isolated, table.charged());
            table.set(i, *state);
        }
    }
    assert_eq!((order(&table, List::Active), order(&table, List::Idle)), (vec![1], vec![2]));
    assert_eq!(table.charged(), 5);
    assert_eq!(table.check(), []);
}

/// Before the first charge the lists are there, empty and sound, for a table of any size.
/// Semantics: B6.
#[test]
fn lists_are_sound_before_the_first_page() {
    for pages in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1] {
        let mut table = FrameTable::new(pages);
        assert_eq!(table.check(), []);
        for list in List::ALL {
            assert_eq!(isolate(&mut table, &Scan::new(list, 10, 10)), (Scanned::default(), Vec::new()));
        }
        table.advance_generation();
        assert_eq!((table.ages().total(), table.working_set(1)), (Pages(0), WorkingSet::default()));
    }
}

/// Pages change sides without a word to any list, and without having a record first.
/// Semantics: B28.
#[test]
fn a_page_that_was_never_charged_moves_between_no_lists() {
    let mut table = FrameTable::new(4);
    table.set(0, Ballooned);
    table.set(0, Absent);
    table.touch(0);
    assert!(!table.referenced(0), "a page that is not there was referenced");
    assert_eq!((table.entries(List::Active), table.entries(List::Idle), table.age(0)), (0, 0, None));
    assert_eq!(table.check(), []);
}

/// Candidates come coldest first, from one end, as many as are wanted and no more.
/// Semantics: 36, 112, B88.
#[test]
fn isolation_takes_the_coldest_as_many_as_wanted() {
    let mut table = touched(20);
    let (done, taken) = isolate(&mut table, &Scan::new(List::Active, 20, 5));
    assert_eq!(taken, singles(0..5));
    assert_eq!(done, Scanned { entries: 5, scanned: 5, taken: 5, referenced: 0 });
    assert!((0..5).all(|i| table.state(i) == Moving));
    assert_eq!(order(&table, List::Active), (5..20).collect::<Vec<_>>());
}

/// A page at which a device is at work, or on which a fault waits, stays where it is, however often one scans.
/// Semantics: 36.
#[test]
fn busy_pages_are_never_taken() {
    let mut table = touched(10);
    (0..10).step_by(2).for_each(|i| table.set_pinned(i, true));
    table.set_wanted(3, true);
    let mut all = Vec::new();
    for _ in 0..5 {
        let (done, taken) = isolate(&mut table, &Scan::new(List::Active, 100, 100));
        assert!(done.scanned >= done.taken);
        all.extend(taken);
    }
    assert_eq!(all, singles([1, 5, 7, 9]));
}

/// A page that is being given back is nobody's: a scan that runs meanwhile must not take it, nor evict it afterwards.
/// Semantics: 112.
#[test]
fn a_page_that_is_being_released_is_not_isolated() {
    let mut table = touched(3);
    table.set(1, Discarding);
    assert_eq!(isolate(&mut table, &Scan::new(List::Active, 10, 10)).1, singles([0, 2]));
    table.set(1, Absent);
    assert_eq!(isolate(&mut table, &Scan::new(List::Active, 10, 10)).1, []);
    assert_eq!(table.charged(), 2);
}

/// What one scan has isolated no other scan sees.
/// Semantics: B32.
#[test]
fn isolated_pages_are_not_scanned_again() {
    let mut table = touched(10);
    isolate(&mut table, &Scan::new(List::Active, 4, 4));
    let (done, taken) = isolate(&mut table, &Scan::new(List::Active, 100, 100));
    assert_eq!((done.scanned, taken), (6, singles(4..10)));
    assert_eq!(isolate(&mut table, &Scan::new(List::Active, 100, 100)).0.scanned, 0);
}

/// One page at the tail that cannot be taken must not stop the reclaim of a hundred that can.
/// Semantics: 38, B30.
#[test]
fn one_stubborn_page_at_the_tail_stops_nothing() {
    let mut table = touched(101);
    table.set_pinned(0, true);
    let mut taken = 0;
    for _ in 0..101 {
        taken += isolate(&mut table, &Scan::new(List::Active, 1, 1)).0.taken;
    }
    assert_eq!(taken, 100);
    assert_eq!(order(&table, List::Active), [0]);
}

/// A scan for one memory slot finds that slot's pages behind any number of others.
/// Semantics: 38, T4.
#[test]
fn a_scan_can_be_for_one_slot() {
    let mut table = touched(100);
    let slot = Scan { within: 90..95, ..Scan::new(List::Active, 10, 100) };
    let scans: Vec<_> = (0..10).map(|_| isolate(&mut table, &slot).0).collect();
    assert!(scans[..9].iter().all(|done| (done.scanned, done.taken) == (10, 0)));
    assert_eq!((scans[9].scanned, scans[9].taken), (10, 5));
    assert!((90..95).all(|i| table.state(i) == Moving));
    assert_eq!((table.count(Moving), table.entries(List::Active)), (5, 95));
}

/// The border of a slot may run through a block: then pages inside can be taken, and none outside.
/// Semantics: T4.
#[test]
fn a_block_on_the_border_of_a_slot_is_split() {
    let mut table = FrameTable::new(2 * BLOCK);
    table.set_range(0, 2 * BLOCK, Active);
    let slot = Scan { within: 0..100, ..Scan::new(List::Active, 1000, 1000) };
    let (done, taken) = isolate(&mut table, &slot);
    assert_eq!((done.taken, taken), (100, singles(0..100)));
    assert_eq!(order(&table, List::Active).last(), Some(&BLOCK), "a block that lies outside stays one");
}

/// Two scans of n on a list of 2n see all of it.
/// Semantics: 39.
#[test]
fn two_scans_of_half_the_list_cover_it() {
    let mut table = touched(64);
    (0..64).for_each(|i| table.touch(i));
    for _ in 0..2 {
        let (done, taken) = isolate(&mut table, &Scan::new(List::Active, 32, 64));
        assert_eq!((done.referenced, taken), (32, vec![]));
    }
    assert!((0..64).all(|i| !table.referenced(i)), "a page was not looked at");
}

/// A page that was used since the last scan gets a second chance, and one only.
/// Semantics: 37.
#[test]
fn a_referenced_page_gets_a_second_chance() {
    let mut table = touched(4);
    table.touch(0);
    table.touch(2);
    let (done, taken) = isolate(&mut table, &Scan::new(List::Active, 4, 4));
    assert_eq!(taken, singles([1, 3]));
    assert_eq!(done, Scanned { entries: 4, scanned: 4, taken: 2, referenced: 2 });
    assert_eq!(isolate(&mut table, &Scan::new(List::Active, 4, 4)).1, singles([0, 2]));
}

/// Every page of the list is in the wrong place (all were used and nobody had looked): one scan ends after its budget,
/// or after one round if that is less, and leaves the list sound.
/// Semantics: 37, B31.
#[test]
fn a_scan_is_bounded_when_every_page_is_misplaced() {
    for (budget, looked) in [(0, 0), (1, 1), (100, 100), (300, 300), (usize::MAX, 300)] {
        let mut table = touched(300);
        (0..300).for_each(|i| table.touch(i));
        let (done, taken) = isolate(&mut table, &Scan::new(List::Active, budget, u64::MAX));
        assert_eq!((done.entries, done.taken, taken.len()), (looked, 0, 0), "budget {budget}");
        assert_eq!(table.entries(List::Active), 300);
    }
}

/// A VM that can give nothing is told so at once, each time, so that the next rung of the ladder is not kept waiting.
/// Semantics: 44, B31.
#[test]
fn a_wholly_pinned_vm_gives_nothing_quickly() {
    let mut table = touched(1000);
    (0..1000).for_each(|i| table.set_pinned(i, true));
    for _ in 0..3 {
        let (done, taken) = isolate(&mut table, &Scan::new(List::Active, usize::MAX, u64::MAX));
        assert_eq!((done.entries, done.taken, taken.len()), (1000, 0, 0));
    }
}

/// That nothing could be taken last time says nothing about this time.
/// Semantics: B38.
#[test]
fn a_scan_remembers_nothing_of_the_last_one() {
    let mut table = touched(10);
    (0..10).for_each(|i| table.set_pinned(i, true));
    assert_eq!(isolate(&mut table, &Scan::new(List::Active, 10, 10)).0.taken, 0);
    (0..10).for_each(|i| table.set_pinned(i, false));
    assert_eq!(isolate(&mut table, &Scan::new(List::Active, 10, 10)).0.taken, 10);
}

/// Aging walks active pages, eviction idle ones; neither looks at one page of the other.
/// Semantics: 35, B86.
#[test]
fn each_scan_walks_its_own_list() {
    let mut table = touched(10);
    for i in (0..10).step_by(2) {
        table.set(i, Moving);
        table.set(i, Idle);
    }
    let (active, aged) = isolate(&mut table, &Scan::new(List::Active, 100, 100));
    assert_eq!((active.scanned, aged), (5, singles([1, 3, 5, 7, 9])));
    let (idle, evicted) = isolate(&mut table, &Scan::new(List::Idle, 100, 100));
    assert_eq!((idle.scanned, evicted), (5, singles([0, 2, 4, 6, 8])));
    assert!((0..10).all(|i| table.state(i) == if i % 2 == 0 { Evicting } else { Moving }));
}

/// Eight pages are worth a scan, and one page taken is a success: no size is rounded to nothing.
/// Semantics: 113, B35, B89.
#[test]
fn a_vm_of_eight_pages_is_reclaimable() {
    let mut table = FrameTable::new(8);
    table.set_range(0, 8, Active);
    table.split(0);
    for priority in [0, 1, 2, 3, 4, 12, 31, 63, 64, u32::MAX] {
        assert_eq!(table.scan_target(List::Active, priority), (8usize >> priority.min(31)).max(1), "{priority}");
    }
    let least = table.scan_target(List::Active, 12);
    let mut freed = 0;
    while table.charged() > 0 {
        let (aged, pages) = isolate(&mut table, &Scan::new(List::Active, least, 32));
        assert_eq!(aged.taken, 1, "the real number, not whole clusters");
        pages.into_iter().for_each(|pages| table.set_range(pages.start, pages.end, Idle));
        let (evicted, pages) = isolate(&mut table, &Scan::new(List::Idle, least, 32));
        pages.into_iter().for_each(|pages| table.set_range(pages.start, pages.end, Swapped));
        freed += evicted.taken;
        assert_eq!(table.charged(), 8 - freed);
    }
    assert_eq!((freed, table.count(Swapped)), (8, 8));
}

/// A page whose move failed was not cold enough or is not movable now: others come first next time. Its age stays: a
/// failed claim is no use of the page.
/// Semantics: 38.
#[test]
fn a_page_comes_back_from_a_failed_claim_at_the_head() {
    let mut table = touched(3);
    table.advance_generation();
    isolate(&mut table, &Scan::new(List::Active, 1, 1));
    table.set(0, Active);
    assert_eq!(order(&table, List::Active), [1, 2, 0]);
    assert_eq!((table.age(0), table.refaults().total()), (Some(1), Pages(0)));
}

/// A uniform block of 512 is looked at, aged and evicted as one: the lists are not walked page by page.
/// Semantics: B87.
#[test]
fn a_block_of_512_is_one_step() {
    let mut table = FrameTable::new(4 * BLOCK);
    table.set_range(0, 4 * BLOCK, Active);
    assert_eq!(table.entries(List::Active), 4);
    let (done, taken) = isolate(&mut table, &Scan::new(List::Active, 2, u64::MAX));
    assert_eq!(done, Scanned { entries: 2, scanned: 2 * BLOCK as u64, taken: 2 * BLOCK as u64, referenced: 0 });
    assert_eq!(taken, [0..BLOCK, BLOCK..2 * BLOCK]);
    table.set_range(0, 2 * BLOCK, Idle);
    assert_eq!((table.entries(List::Active), table.entries(List::Idle)), (2, 2));
    assert_eq!(isolate(&mut table, &Scan::new(List::Idle, 1, 8)).0.taken, BLOCK as u64, "blocks are taken whole");
}

/// Eight pages wanted, and eight taken, when the caller has no use for 512.
/// Semantics: B88.
#[test]
fn a_fine_scan_takes_no_more_than_wanted() {
    let mut table = FrameTable::new(2 * BLOCK);
    table.set_range(0, 2 * BLOCK, Active);
    let fine = Scan { fine: true, ..Scan::new(List::Active, 100, 8) };
    let (done, taken) = isolate(&mut table, &fine);
    assert_eq!((done.taken, done.entries, taken), (8, 8, singles(0..8)));
    let (done, taken) = isolate(&mut table, &Scan { want: 2 * BLOCK as u64 - 8, budget: 1000, ..fine });
    assert_eq!(done.taken, 2 * BLOCK as u64 - 8);
    assert_eq!(taken.last(), Some(&(BLOCK..2 * BLOCK)), "a block that is wanted whole is taken whole");
}

/// One pinned page in a block keeps itself in place, not the other 511.
/// Semantics: 36, B30.
#[test]
fn a_pinned_page_does_not_pin_its_block() {
    let mut table = FrameTable::new(BLOCK);
    table.set_range(0, BLOCK, Active);
    table.set_pinned(77, true);
    let (done, taken) = isolate(&mut table, &Scan::new(List::Active, 1000, u64::MAX));
    assert_eq!(done, Scanned { entries: 512, scanned: 512, taken: 511, referenced: 0 });
    assert_eq!(taken, singles((0..BLOCK).filter(|i| *i != 77)));
    assert_eq!(table.state(77), Active);
}

/// A touch of one page gives its block a second chance as one, and is not lost when the block is split.
/// Semantics: 37.
#[test]
fn a_block_is_referenced_as_a_whole() {
    let mut table = FrameTable::new(BLOCK);
    table.set_range(0, BLOCK, Active);
    table.touch(5);
    assert!(table.referenced(5) && table.referenced(500));
    let (done, _) = isolate(&mut table, &Scan::new(List::Active, 10, 10));
    assert_eq!((done.entries, done.referenced), (1, BLOCK as u64));
    table.touch(6);
    table.split(0);
    assert!((0..BLOCK).all(|i| table.referenced(i)));
    assert_eq!(table.check(), []);
}

/// A page whose content is being written or discarded is still there: it is charged until that is done, and when it
/// could not be done it stays, with its charge.
/// Semantics: 27.
#[test]
fn a_page_on_its_way_out_is_charged_until_it_is_out() {
    for (list, way, out) in [(List::Idle, Evicting, Swapped), (List::Active, Discarding, Ballooned)] {
        let mut table = touched(4);
        if list == List::Idle {
            table.set_range(0, 4, Moving);
            table.set_range(0, 4, Idle);
        }
        table.set_range(0, 2, way);
        assert_eq!((table.charged(), table.count(way)), (4, 2), "{way:?}: nothing is out yet");
        table.set(0, out);
        assert_eq!(table.charged(), 3);
        table.set(1, if list == List::Idle { Idle } else { Active });
        assert_eq!((table.charged(), order(&table, list).contains(&1)), (3, true), "{way:?} failed");
        assert_eq!(table.check(), []);
    }
}

/// Ages are in the caller's generations, and the histogram is always that of the charged pages.
/// Semantics: T8.
#[test]
fn the_histogram_is_that_of_the_charged_pages() {
    let mut table = FrameTable::new(3 * BLOCK);
    table.set_range(0, BLOCK, Active);
    table.advance_generation();
    table.set(BLOCK, Active);
    for _ in 0..5 {
        table.advance_generation();
    }
    table.set(BLOCK + 1, Active);
    table.set(BLOCK + 2, Ballooned);
    let mut expected = Histogram::default();
    expected.pages[Histogram::bucket(6)] = Pages(BLOCK as u64);
    expected.pages[Histogram::bucket(5)] += Pages(1);
    expected.pages[0] = Pages(1);
    assert_eq!(table.ages(), expected);
    assert_eq!(table.ages().pages[3].bytes(), (BLOCK as u64 + 1) * 4096);
    table.touch(3);
    assert_eq!((table.ages().pages[0], table.age(400)), (Pages(BLOCK as u64 + 1), Some(0)));
    table.set_range(0, BLOCK, Discarding);
    assert_eq!(table.ages().total(), Pages(table.charged()), "a claim is still charged");
    table.set_range(0, BLOCK, Ballooned);
    assert_eq!((table.ages().total(), table.charged()), (Pages(2), 2));
}

/// Each bucket begins where it says.
#[test]
fn buckets_begin_where_they_say() {
    for (bucket, from) in Histogram::FROM.into_iter().enumerate() {
        assert_eq!(Histogram::bucket(from), bucket);
        if from > 0 {
            assert_eq!(Histogram::bucket(from - 1), bucket - 1);
        }
    }
    assert_eq!(Histogram::bucket(u16::MAX), 7);
}

/// The working set is given with what is certain: one page of each entry was seen in use, at most all of it was.
/// Semantics: T8.
#[test]
fn the_working_set_says_how_sure_it_is() {
    let mut table = FrameTable::new(3 * BLOCK);
    table.set_range(0, 2 * BLOCK, Active);
    table.advance_generation();
    table.advance_generation();
    assert_eq!(table.working_set(2), WorkingSet::default());
    table.set(2 * BLOCK, Active);
    table.touch(9);
    let seen = WorkingSet { at_least: Pages(2), at_most: Pages(BLOCK as u64 + 1) };
    assert_eq!((table.working_set(1), table.working_set(2)), (seen, seen));
    let all = WorkingSet { at_least: Pages(3), at_most: Pages(2 * BLOCK as u64 + 1) };
    assert_eq!((table.working_set(3), table.working_set(u16::MAX)), (all, all));
    assert_eq!(table.working_set(0), WorkingSet::default());
    table.split(9);
    assert_eq!(table.working_set(1).at_least, Pages(BLOCK as u64 + 1), "each page is an entry now");
}

/// Generations wrap; a page that nobody uses must not turn young by that.
#[test]
fn an_old_page_stays_old_when_generations_wrap() {
    let mut table = FrameTable::new(3 * BLOCK + 7);
    table.set_range(0, BLOCK, Active);
    table.set_range(BLOCK, BLOCK + 9, Active);
    table.set(3 * BLOCK, Active);
    table.set_range(BLOCK, BLOCK + 3, Moving);
    table.set_range(BLOCK, BLOCK + 3, Idle);
    table.set(BLOCK, Evicting);
    table.set(BLOCK, Swapped);
    for n in 1..=140_000u32 {
        table.advance_generation();
        if n % 997 == 0 || n == 140_000 {
            for i in [0, 511, BLOCK, BLOCK + 1, BLOCK + 5, 3 * BLOCK] {
                assert!(u32::from(table.age(i).unwrap_or(0)) >= n.min(1 << 15), "page {i} in generation {n}");
            }
            assert_eq!(table.ages().total(), Pages(table.charged()));
            assert!(n < 64 || table.ages().pages[7] == Pages(table.charged()));
        }
    }
    assert_eq!(table.working_set(EXACT), WorkingSet::default());
    table.set(BLOCK, Active);
    assert_eq!((table.age(BLOCK), table.refaults().pages[7]), (Some(0), Pages(1)));
    assert_eq!(table.check(), []);
}

/// A page that was put aside and is missed says how early that was: the statistic by which the aging is tuned.
/// Semantics: T8.
#[test]
fn a_refault_is_counted_by_the_age_of_the_page() {
    let mut table = FrameTable::new(2 * BLOCK);
    table.set_range(0, BLOCK + 2, Active);
    let aside = |table: &mut FrameTable, to: &[FrameState]| {
        to.iter().for_each(|state| table.set_range(0, BLOCK, *state));
        to.iter().for_each(|state| table.set(BLOCK, *state));
    };
    aside(&mut table, &[Moving, Idle]);
    (0..3).for_each(|_| table.advance_generation());
    aside(&mut table, &[Moving, Active]);
    let mut expected = Histogram::default();
    expected.pages[2] = Pages(BLOCK as u64 + 1);
    assert_eq!(table.refaults(), expected, "missed at age 3");
    assert_eq!((table.age(0), table.age(BLOCK), table.age(BLOCK + 1)), (Some(0), Some(0), Some(3)));
    assert!(table.referenced(0) && table.referenced(BLOCK), "a refault is a use");
    aside(&mut table, &[Moving, Idle, Evicting, Swapped]);
    assert_eq!(table.ages().total(), Pages(1), "what is in the store has no charge and no place in the histogram");
    table.advance_generation();
    aside(&mut table, &[Active]);
    expected.pages[1] = Pages(BLOCK as u64 + 1);
    assert_eq!(table.refaults(), expected, "missed at age 1");
    assert_eq!(table.check(), []);
}

/// Pages that are charged one after the other in one generation are one entry from the first to the last of their block:
/// a guest that walks its memory writes no link for a page.
/// Semantics: B87.
#[test]
fn a_walk_is_one_entry_for_each_block() {
    let mut table = FrameTable::new(3 * BLOCK);
    table.set(3 * BLOCK - 1, Ballooned);
    for i in 0..3 * BLOCK {
        table.set(i, Active);
        assert_eq!(table.entries(List::Active), i / BLOCK + 1);
        assert_eq!(table.iter(List::Active).last(), Some(i / BLOCK * BLOCK..i + 1), "it is at the head");
    }
    table.set(BLOCK + 10, Discarding);
    let middle = [BLOCK..BLOCK + 1, BLOCK + 1..BLOCK + 2].map(Some);
    assert_eq!(table.iter(List::Active).take(3).map(Some).collect::<Vec<_>>()[1..], middle, "it is split in place");
    table.advance_generation();
    table.set(BLOCK + 10, Active);
    assert_eq!(table.entries(List::Active), 3, "a failed claim is no use of the page: its block is alike again");
    table.set(5, Discarding);
    table.set(5, Absent);
    table.set(5, Active);
    assert_eq!(table.entries(List::Active), 2 + BLOCK, "page 5 is younger than its block");
    assert_eq!(table.check(), []);
}

/// A page that is charged in a later generation does not make the pages around it young.
/// Semantics: T8.
#[test]
fn a_new_neighbour_makes_no_page_younger() {
    let mut table = FrameTable::new(BLOCK);
    table.set_range(0, 100, Active);
    table.advance_generation();
    table.set(100, Active);
    assert_eq!((table.age(99), table.age(100), table.entries(List::Active)), (Some(1), Some(0), 101));
    assert_eq!(table.working_set(1).at_most, Pages(1));
    table.set_range(0, 101, Discarding);
    table.set_range(0, 101, Absent);
    table.set_range(200, 300, Active);
    assert_eq!(table.entries(List::Active), 1, "an empty block begins anew");
    assert_eq!(table.check(), []);
}

/// The part of a block that is there is scanned page by page, and given a second chance as one.
/// Semantics: 36, 37.
#[test]
fn a_block_with_holes_is_isolated_page_by_page() {
    let mut table = FrameTable::new(BLOCK);
    table.set_range(10, 12, Active);
    table.set_range(500, 501, Active);
    table.touch(11);
    assert_eq!(table.iter(List::Active).collect::<Vec<_>>(), [10..12, 500..501]);
    let (done, taken) = isolate(&mut table, &Scan::new(List::Active, 1, 2));
    assert_eq!((done, taken), (Scanned { entries: 1, scanned: 3, taken: 0, referenced: 3 }, vec![]));
    let (done, taken) = isolate(&mut table, &Scan::new(List::Active, 3, 2));
    assert_eq!((done.taken, taken), (2, singles([10, 11])));
}

//! The frame table.

use memcg_core::frame::{BLOCK, Cost, FrameState, FrameTable, List, Turns};
use memcg_core::units::Pages;
use proptest::prelude::*;

use FrameState::{Absent, Active, Ballooned, Discarding, Evicting, Idle, Moving, Swapped};

/// The diagram of the module, state by state.
#[test]
fn the_transitions_are_those_of_the_diagram() {
    let table: [(FrameState, &[FrameState]); 8] = [
        (Absent, &[Active, Ballooned]),
        (Active, &[Moving, Discarding]),
        (Idle, &[Moving, Evicting, Discarding]),
        (Swapped, &[Absent, Active, Ballooned]),
        (Ballooned, &[Absent, Active]),
        (Moving, &[Active, Idle]),
        (Evicting, &[Idle, Swapped]),
        (Discarding, &[Absent, Active, Idle, Ballooned]),
    ];
    for (from, to) in table {
        for next in FrameState::ALL {
            assert_eq!(from.can_become(next), to.contains(&next), "{from:?} -> {next:?}");
        }
    }
}

/// A charge appears and disappears only where somebody charges or uncharges: into ACTIVE, and out of a claim. A record
/// that is still charged can therefore not be dropped, nor its page be used for something else.
/// Semantics: 31, 105, B16.
#[test]
fn charge_changes_only_at_fill_and_at_the_end_of_a_claim() {
    for from in FrameState::ALL {
        for to in FrameState::ALL {
            if !from.can_become(to) || from.is_charged() == to.is_charged() {
                continue;
            }
            if to.is_charged() {
                assert_eq!(to, Active, "{from:?} -> {to:?}");
            } else {
                assert!(from.is_claim(), "{from:?} -> {to:?}");
            }
        }
    }
}

#[test]
fn every_state_can_be_left_and_reached() {
    for state in FrameState::ALL {
        assert!(FrameState::ALL.iter().any(|next| state.can_become(*next)), "{state:?} is a dead end");
        assert!(FrameState::ALL.iter().any(|from| from.can_become(state)), "{state:?} cannot be reached");
        assert!(!state.can_become(state));
    }
}

#[test]
fn flags_and_state_do_not_disturb_each_other() {
    let mut table = FrameTable::new(4);
    table.set(1, Active);
    table.set_wanted(1, true);
    table.set_huge(1, true);
    table.set_pinned(1, true);
    table.touch(1);
    table.set(1, Moving);
    assert_eq!(table.state(1), Moving);
    assert!(table.wanted(1) && table.huge(1) && table.pinned(1) && table.referenced(1));
    table.set_wanted(1, false);
    assert!(!table.wanted(1) && table.huge(1) && table.pinned(1) && table.referenced(1));
    table.set_huge(1, false);
    table.set_pinned(1, false);
    assert!(!table.huge(1) && !table.pinned(1) && table.referenced(1));
    assert_eq!((table.state(1), table.state(0), table.wanted(0), table.referenced(0)), (Moving, Absent, false, false));
}

/// The records are overhead of the VM that they describe: their price is known before they exist, lists and summaries
/// included, and it is at most 12 bytes a page.
/// Semantics: 11, T9.
#[test]
fn a_record_costs_at_most_twelve_bytes_everything_included() {
    for pages in [BLOCK as u64, 1 << 15, 1 << 18, (1 << 18) + 1, 1 << 40] {
        let bytes = FrameTable::bytes_for(pages) - FrameTable::bytes_for(0);
        assert!(bytes <= 12 * pages, "{bytes} bytes for {pages} pages");
        assert!(bytes >= 11 * pages);
    }
    assert!(FrameTable::bytes_for(0) < 4096, "the fixed part is less than a page");
    assert_eq!(FrameTable::bytes_for(u64::MAX), u64::MAX);
}

/// What a table has cost follows its use and only grows: page tables and states with the first page of a block, links and
/// generations once its pages are told apart, the stage's tables once they are moved aside.
/// Semantics: 11.
#[test]
fn the_cost_of_a_table_follows_its_use() {
    let mut table = FrameTable::new(4 * BLOCK);
    assert_eq!(table.cost(), Cost::default());
    table.set_range(0, 100, Ballooned);
    assert_eq!(table.cost().tables, Pages(0), "nothing is mapped");
    table.set_range(BLOCK, 2 * BLOCK + 1, Active);
    assert_eq!(table.cost(), Cost::of(2, 0));
    assert_eq!(table.cost().tables, Pages(6), "of two blocks, and of what is above them, twice");
    table.set(BLOCK + 7, Discarding);
    assert_eq!(table.cost(), Cost::of(2, 1));
    table.set(BLOCK + 7, Ballooned);
    table.set(BLOCK + 7, Active);
    table.set_range(2 * BLOCK, 2 * BLOCK + 1, Discarding);
    table.set_range(2 * BLOCK, 2 * BLOCK + 1, Ballooned);
    assert_eq!(table.cost().tables, Pages(6), "what is given back leaves its tables");
    for block in [0, 2, 3, 1] {
        if table.state(block * BLOCK) != Active {
            table.set(block * BLOCK, Active);
        }
        table.split(block * BLOCK);
    }
    assert_eq!(table.cost(), Cost::of(4, 4));
    assert_eq!(table.cost().with_huge(3).tables + Pages(3), table.cost().tables, "huge pages have no table of KVM's");
    for block in [3, 0, 1, 2, 3] {
        [Moving, Idle, Moving, Active].into_iter().for_each(|state| table.set(block * BLOCK, state));
    }
    assert_eq!(table.cost(), Cost::of(4, 4).with_reclaim(4, false));
    assert_eq!(table.cost().tables, Cost::of(4, 4).tables + Pages(5), "the stage's tables, and what is above them");
    [Moving, Idle, Evicting, Swapped].into_iter().for_each(|state| table.set(0, state));
    assert_eq!(table.cost(), Cost::most(Pages(4 * BLOCK as u64)), "once evicted, reclaim has all its buffers");
    assert!(Cost::most(Pages(u64::MAX)).total() > Pages(u64::MAX / 512));
}

#[test]
fn an_impossible_transition_is_refused_and_changes_nothing() {
    let mut table = FrameTable::new(1);
    let error = table.try_set(0, Idle).expect_err("nothing is there to be idle");
    assert_eq!((error.index, error.from, error.to), (0, Absent, Idle));
    assert_eq!(error.to_string(), "page 0 is Absent and cannot become Idle");
    assert_eq!(table.count(Absent), 1);
}

/// Two vCPUs touch one page at once: the second finds it ACTIVE, and there is one charge.
/// Semantics: 15.
#[test]
fn two_first_touches_are_one_charge() {
    let mut table = FrameTable::new(2 * BLOCK);
    for i in 0..table.len() {
        assert!(table.try_set(i, Active).is_ok());
        assert!(table.try_set(i, Active).is_err(), "page {i} was charged twice");
        assert_eq!(table.charged(), i as u64 + 1);
    }
    assert_eq!(table.check(), []);
}

/// A page that was never touched has no charge that its loss could give back: inflating it changes none.
/// Semantics: 21.
#[test]
fn giving_away_an_untouched_page_uncharges_nothing() {
    let mut table = FrameTable::new(BLOCK);
    table.set(0, Active);
    for to in [Discarding, Moving, Evicting, Idle, Swapped] {
        assert!(table.try_set(1, to).is_err(), "an untouched page became {to:?}");
    }
    table.set(1, Ballooned);
    assert!(table.try_set(1, Ballooned).is_err());
    assert_eq!((table.charged(), table.count(Ballooned)), (1, 1));
}

/// The balloon and the end of the VM want one page at the same time: who claims it first uncharges it, once.
/// Semantics: 85, B17.
#[test]
fn of_two_who_want_to_discard_a_page_one_uncharges_it() {
    let mut table = FrameTable::new(BLOCK);
    table.set_range(0, BLOCK, Active);
    let mut uncharged = 0;
    for i in 0..BLOCK {
        let claims = [table.try_set(i, Discarding), table.try_set(i, Discarding)];
        assert_eq!(claims.map(|claim| claim.is_ok()), [true, false]);
        assert_eq!(table.charged(), (BLOCK - uncharged) as u64, "a claim keeps the charge");
        for _ in claims.iter().filter(|claim| claim.is_ok()) {
            table.set(i, Absent);
            uncharged += 1;
        }
    }
    assert_eq!((uncharged, table.charged()), (BLOCK, 0));
    assert_eq!(table.check(), []);
}

/// A page is given away and touched again while its discard is under way, and once more after it: list and charge go by
/// the record as it is then, never by what it was when the discard began.
/// Semantics: 109, B66.
#[test]
fn a_page_that_comes_back_has_a_new_record() {
    let mut table = FrameTable::new(4);
    table.set(0, Active);
    table.set(0, Discarding);
    table.set_wanted(0, true);
    assert!(table.try_set(0, Active).is_ok(), "the discard failed: the page stays, with its charge");
    table.set_wanted(0, false);
    table.set(0, Discarding);
    table.set(0, Absent);
    table.set(0, Active);
    assert!(table.try_set(0, Absent).is_err(), "the late end of the first discard hit the new page");
    assert_eq!((table.charged(), table.entries(List::Active)), (1, 1));
    assert_eq!(table.check(), []);
}

/// Small pages are made a huge one, taken apart, and moved about: their records go along and nothing is charged anew, so
/// nothing of it can be refused, however full the VM is.
/// Semantics: 28, B19.
#[test]
fn pages_that_change_places_take_their_charge_along() {
    let mut table = FrameTable::new(BLOCK);
    for i in 0..BLOCK {
        table.set(i, Active);
        table.set_huge(i, true);
        assert_eq!(table.charged(), i as u64 + 1);
    }
    assert_eq!(table.entries(List::Active), 1);
    table.split(7);
    assert_eq!((table.entries(List::Active), table.charged()), (BLOCK, BLOCK as u64));
    assert!((0..BLOCK).all(|i| table.huge(i)));
    for i in 0..BLOCK {
        for state in [Moving, if i % 2 == 0 { Idle } else { Active }] {
            table.set(i, state);
            assert_eq!(table.charged(), BLOCK as u64, "page {i} in {state:?}");
        }
    }
    assert_eq!((table.entries(List::Active), table.entries(List::Idle)), (BLOCK / 2, BLOCK / 2));
    assert_eq!(table.check(), []);
}

/// How much is given back is what the records say, whatever the caller thinks was allocated together: a part of a block,
/// pages that were charged one by one, pages that are gone already.
/// Semantics: B65.
#[test]
fn the_size_of_an_uncharge_is_in_the_records() {
    let mut table = FrameTable::new(2 * BLOCK);
    table.set_range(0, 2 * BLOCK, Active);
    table.set_range(100, BLOCK + 100, Discarding);
    assert_eq!(table.charged(), 2 * BLOCK as u64);
    table.set_range(100, 300, Absent);
    assert_eq!(table.charged(), 2 * BLOCK as u64 - 200);
    table.set_range(300, BLOCK + 100, Ballooned);
    assert_eq!(table.charged(), BLOCK as u64);
    assert_eq!(table.check(), []);
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "cannot become")]
fn an_impossible_transition_stops_a_debug_build() {
    FrameTable::new(1).set(0, Swapped);
}

#[test]
fn runs_end_where_the_state_or_the_range_ends() {
    let mut table = FrameTable::new(8);
    table.set_range(2, 5, Active);
    table.touch(3);
    assert_eq!(table.run(0, 8), (Absent, 2));
    assert_eq!(table.run(2, 8), (Active, 5));
    assert_eq!(table.run(3, 4), (Active, 4));
    assert_eq!(table.run(5, 1000), (Absent, 8));
    assert_eq!(table.run(6, 6), (Absent, 6));
    assert_eq!(table.run(6, 2), (Absent, 6));
    assert!(FrameTable::new(0).is_empty());
}

proptest! {
    /// Any sequence of attempts: counts are those of a plain vector, refused ones change nothing, runs tile the table.
    #[test]
    fn counts_and_runs_agree_with_a_vector(ops in prop::collection::vec((0usize..24, 0usize..8), 0..400)) {
        let mut table = FrameTable::new(24);
        let mut model = [Absent; 24];
        for (i, to) in ops {
            let to = FrameState::ALL[to];
            prop_assert_eq!(table.try_set(i, to).is_ok(), model[i].can_become(to));
            if model[i].can_become(to) {
                model[i] = to;
            }
            for state in FrameState::ALL {
                let expected = model.iter().filter(|s| **s == state).count() as u64;
                prop_assert_eq!(table.count(state), expected);
            }
            prop_assert_eq!(table.charged(), model.iter().filter(|s| s.is_charged()).count() as u64);
        }
        let mut at = 0;
        while at < table.len() {
            let (state, end) = table.run(at, table.len());
            prop_assert!(end > at);
            prop_assert!(model[at..end].iter().all(|s| *s == state));
            prop_assert!(end == model.len() || model[end] != state);
            at = end;
        }
    }
}

/// Pages that were evicted last are found first, those of one window in the order of their numbers, however much of the table
/// is looked at at a time. Numbers of evictions may wrap.
#[test]
fn evicted_pages_are_found_by_the_order_in_which_they_went() {
    const FIRST: u32 = u32::MAX - 5;
    let mut frames = FrameTable::new(8 * 512);
    // Backwards through every other block.
    let pages: Vec<usize> = (0..4).rev().flat_map(|block| (1024 * block..1024 * block + 5).rev()).collect();
    for (page, turn) in pages.iter().zip(0..) {
        use FrameState::{Active, Evicting, Idle, Moving, Swapped};
        [Active, Moving, Idle, Evicting, Swapped].iter().for_each(|state| frames.set(*page, *state));
        frames.set_place(*page, 1);
        frames.set_turn(*page, FIRST.wrapping_add(turn));
    }
    let all = Turns { first: FIRST, count: 20 };
    let search = |turns, blocks: usize, most: usize| {
        let (mut found, mut from) = (Vec::new(), Some(0));
        while let Some(at) = from {
            let before = found.len();
            from = frames.evicted_in(turns, at, blocks, |page| {
                let takes = found.len() - before < most;
                found.extend(takes.then_some(page));
                takes
            });
        }
        found
    };
    for (blocks, most) in [(1, 1), (1, 100), (100, 3), (100, 100)] {
        let (last, before) = all.split_last(7);
        assert_eq!(search(last, blocks, most), [0, 1, 2, 3, 4, 1024, 1025]);
        let (last, before) = before.split_last(8);
        assert_eq!(search(last, blocks, most), [1026, 1027, 1028, 2048, 2049, 2050, 2051, 2052]);
        let (last, before) = before.split_last(100);
        assert_eq!(search(last, blocks, most), [3072, 3073, 3074, 3075, 3076]);
        assert_eq!(before.count, 0);
    }
    // One that is moved within the store keeps its turn, one that is back has none.
    frames.set_place(2, 77);
    frames.set(1, FrameState::Active);
    let (last, _) = all.split_last(5);
    let mut found = Vec::new();
    assert_eq!(
        frames.evicted_in(last, 0, 100, |page| {
            found.push(page);
            true
        }),
        None
    );
    assert_eq!(found, [0, 2, 3, 4]);
}

/// A page without memory is on no list: what its links were has room for where its content is. What happens to its
/// neighbours, and to its block, does not change that.
#[test]
fn an_evicted_page_remembers_where_its_content_is() {
    let mut frames = FrameTable::new(1024);
    let set = |frames: &mut FrameTable, pages: std::ops::Range<usize>, states: &[FrameState]| {
        states.iter().for_each(|state| frames.set_range(pages.start, pages.end, *state));
    };
    use FrameState::{Active, Evicting, Idle, Moving, Swapped};
    set(&mut frames, 0..1024, &[Active, Moving, Idle, Evicting, Swapped]);
    (0..1024).for_each(|i| frames.set_place(i, 7 * i as u32 + 1));
    // One block is split by a page that comes back, the other stays whole.
    set(&mut frames, 3..4, &[Active]);
    set(&mut frames, 100..200, &[Active, Moving, Idle]);
    set(&mut frames, 3..4, &[Moving, Active, Moving, Idle, Evicting, Swapped]);
    frames.set_place(3, 99);
    for i in (0..100).chain(200..1024) {
        assert_eq!(frames.place(i), if i == 3 { 99 } else { 7 * i as u32 + 1 }, "page {i}");
    }
    assert_eq!(frames.check(), []);
}

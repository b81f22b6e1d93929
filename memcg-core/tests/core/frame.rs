//! The frame table.

use memcg_core::frame::{FrameState, FrameTable};
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

/// A charge appears and disappears only where somebody charges or uncharges: into ACTIVE, and out of a claim.
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
fn flags_links_and_generations_do_not_disturb_each_other() {
    let mut table = FrameTable::new(4);
    table.set(1, Active);
    table.set_wanted(1, true);
    table.set_huge(1, true);
    table.set_referenced(1, true);
    table.set_generation(1, u16::MAX);
    table.set_links(1, Some(0), Some(3));
    table.set(1, Moving);
    assert_eq!(table.state(1), Moving);
    assert!(table.wanted(1) && table.huge(1) && table.referenced(1));
    table.set_wanted(1, false);
    assert!(!table.wanted(1) && table.huge(1) && table.referenced(1));
    table.set_huge(1, false);
    table.set_referenced(1, false);
    assert!(!table.huge(1) && !table.referenced(1));
    assert_eq!((table.state(1), table.generation(1)), (Moving, u16::MAX));
    assert_eq!(table.links(1), (Some(0), Some(3)));
    table.set_links(1, None, None);
    assert_eq!(table.links(1), (None, None));
    assert_eq!((table.state(0), table.wanted(0), table.links(0)), (Absent, false, (None, None)));
}

#[test]
fn a_record_is_small() {
    // R20 of the performance goals.
    const { assert!(FrameTable::RECORD_BYTES <= 12) };
}

#[test]
fn an_impossible_transition_is_refused_and_changes_nothing() {
    let mut table = FrameTable::new(1);
    let error = table.try_set(0, Idle).expect_err("nothing is there to be idle");
    assert_eq!((error.index, error.from, error.to), (0, Absent, Idle));
    assert_eq!(table.count(Absent), 1);
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
    table.set_referenced(3, true);
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

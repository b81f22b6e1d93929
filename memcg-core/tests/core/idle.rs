//! How much of a VM's memory nobody uses.

use memcg_core::Pages;
use memcg_core::frame::Histogram;
use memcg_core::idle::Known;
use proptest::prelude::*;

/// What is aside is idle for certain, what a sample says only as far as it is not out of date.
#[test]
fn idle_is_what_is_aside_or_neither_in_the_working_set_nor_seen_of_late() {
    let table = [
        // Resident, aside, seen in the last two generations, in use at most, idle.
        (1000, 0, 1000, None, 0),
        (1000, 300, 700, None, 300),
        (1000, 0, 0, None, 0),
        (1000, 0, 0, Some(100), 900),
        (1000, 300, 0, Some(100), 900),
        (1000, 300, 0, Some(900), 300),
        (1000, 300, 0, Some(2000), 300),
        // It has grown by 600 pages since the sample.
        (1000, 0, 650, Some(100), 350),
        (1000, 400, 650, Some(100), 400),
        // All of it is old, and some of what is in use is evicted: that may be all of the working set.
        (1000, 0, 0, Some(0), 1000),
        (0, 0, 0, Some(500), 0),
    ];
    for (resident, aside, late, in_use, idle) in table {
        let mut ages = Histogram::default();
        (ages.pages[1], ages.pages[4]) = (Pages(late), Pages(resident - late));
        let known = Known { resident: Pages(resident), aside: Pages(aside), ages, in_use: in_use.map(Pages) };
        assert_eq!(known.idle(), Pages(idle), "{known:?}");
    }
}

proptest! {
    /// Whatever a worker says, no more is idle than there is.
    #[test]
    fn no_more_is_idle_than_there_is(
        (resident, aside, in_use) in any::<(u64, u64, Option<u64>)>(),
        ages in any::<[u64; 8]>(),
    ) {
        let ages = Histogram { pages: ages.map(Pages) };
        let known = Known { resident: Pages(resident), aside: Pages(aside), ages, in_use: in_use.map(Pages) };
        prop_assert!(known.idle() <= known.resident);
    }
}

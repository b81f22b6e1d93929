//! The worker's account, alone and against a controller behind a channel that loses and repeats.

use memcg_core::stock::{Stock, StockError};
use memcg_core::units::Pages;
use proptest::prelude::*;

const MANY: Pages = Pages(2048);

/// A stock with its reserve of 10 filled, and `pages` above.
fn stocked(pages: u64) -> Stock {
    let mut stock = Stock::new(Pages(10));
    stock.grant(1, 10 + pages, MANY, None).unwrap();
    stock
}

#[test]
fn a_grant_fills_the_reserve_first() {
    let mut stock = Stock::new(Pages(10));
    assert_eq!((stock.debt(), stock.want(Pages::ZERO)), (Pages(10), Pages(10)), "it starts in debt");
    assert_eq!(stock.grant(1, 4, MANY, None), Ok(Pages(4)));
    assert_eq!((stock.reserve(), stock.stock(), stock.debt()), (Pages(4), Pages::ZERO, Pages(6)));
    assert_eq!(stock.grant(1, 30, MANY, Some(Pages(100))), Ok(Pages(26)));
    assert_eq!((stock.reserve(), stock.stock(), stock.debt()), (Pages(10), Pages(20), Pages::ZERO));
    assert_eq!((stock.room(), stock.stock_max(), stock.epoch()), (Some(Pages(100)), MANY, 1));
    assert!(stock.is_balanced());
}

/// Totals, not deltas: a repeated message is nothing new, a lost one is made good by the next.
#[test]
fn replayed_and_lost_grants_count_once() {
    let mut stock = stocked(20);
    assert_eq!(stock.grant(1, 30, Pages(7), Some(Pages(5))), Ok(Pages::ZERO));
    assert_eq!((stock.stock(), stock.stock_max(), stock.room()), (Pages(20), Pages(7), Some(Pages(5))));
    // 40 was lost.
    assert_eq!(stock.grant(1, 50, MANY, None), Ok(Pages(20)));
    assert_eq!(stock.grant(1, 40, Pages(1), None), Err(StockError::TotalFell { got: 40, known: 50 }));
    assert_eq!((stock.stock(), stock.granted_total(), stock.stock_max()), (Pages(40), 50, MANY));
    assert_eq!(stock.grant(0, 99, MANY, None), Err(StockError::OldEpoch { got: 0, known: 1 }));
    assert!(stock.is_balanced());
}

/// A new epoch is a recount: totals restart at what is held.
#[test]
fn a_new_epoch_counts_from_what_is_held() {
    let mut stock = stocked(20);
    stock.prepare(Pages(5)).unwrap().commit(Pages(5));
    assert_eq!(stock.give_back(Pages(3)), Pages(3));
    assert_eq!((stock.held(), stock.granted_total(), stock.returned_total()), (Pages(27), 30, 3));
    assert_eq!(stock.grant(2, 26, MANY, None), Err(StockError::TotalFell { got: 26, known: 27 }));
    assert_eq!((stock.epoch(), stock.granted_total(), stock.returned_total()), (1, 30, 3), "nothing changed");
    assert_eq!(stock.grant(2, 27, MANY, None), Ok(Pages::ZERO));
    assert_eq!((stock.epoch(), stock.granted_total(), stock.returned_total()), (2, 27, 0));
    assert_eq!(stock.grant(3, 40, MANY, None), Ok(Pages(13)));
    assert_eq!((stock.held(), stock.stock()), (Pages(40), Pages(25)));
    assert_eq!(stock.grant(2, 500, MANY, None), Err(StockError::OldEpoch { got: 2, known: 3 }));
    assert!(stock.is_balanced());
}

/// semantics rows 17, 18, 78, 107: prepared pages go to the guest by commit alone, the rest goes back.
#[test]
fn a_reservation_commits_or_goes_back() {
    let mut stock = stocked(20);
    drop(stock.prepare(Pages(16)).unwrap());
    assert_eq!((stock.stock(), stock.guest()), (Pages(20), Pages::ZERO));
    let reservation = stock.prepare(Pages(16)).unwrap();
    assert_eq!(reservation.pages(), Pages(16));
    reservation.commit(Pages(9));
    assert_eq!((stock.stock(), stock.guest()), (Pages(11), Pages(9)));
    // semantics row 64: a granule gets what there is.
    let rest = stock.prepare(Pages(512)).unwrap();
    assert_eq!(rest.pages(), Pages(11));
    rest.commit(Pages(11));
    assert!(stock.prepare(Pages(1)).is_none());
    assert!(stock.prepare(Pages::ZERO).is_none());
    assert!(stock.is_balanced());
}

#[test]
fn the_reserve_answers_one_page_at_a_time_and_is_repaid_first() {
    let mut stock = stocked(0);
    drop(stock.prepare_reserve().unwrap());
    assert_eq!(stock.debt(), Pages::ZERO);
    for n in 1..=10 {
        let page = stock.prepare_reserve().unwrap();
        assert_eq!(page.pages(), Pages(1));
        page.commit(Pages(1));
        assert_eq!((stock.debt(), stock.guest(), stock.want_now(Pages::ZERO)), (Pages(n), Pages(n), Pages(n)));
    }
    assert!(stock.prepare_reserve().is_none(), "never more than the reserve");
    stock.uncharge(Pages(4));
    assert_eq!((stock.debt(), stock.stock(), stock.guest()), (Pages(6), Pages::ZERO, Pages(6)));
    stock.grant(1, 13, MANY, None).unwrap();
    assert_eq!((stock.debt(), stock.stock()), (Pages(3), Pages::ZERO));
    stock.uncharge(Pages(6));
    assert_eq!((stock.debt(), stock.stock(), stock.guest()), (Pages::ZERO, Pages(3), Pages::ZERO));
    assert!(stock.is_balanced());
}

/// semantics row 60: after a recall nothing is held but guest and reserve.
#[test]
fn recall_leaves_guest_and_reserve() {
    let mut stock = stocked(20);
    stock.prepare(Pages(5)).unwrap().commit(Pages(5));
    assert_eq!(stock.recall(), Pages(15));
    assert_eq!((stock.stock(), stock.returned_total(), stock.held()), (Pages::ZERO, 15, Pages(15)));
    assert_eq!(stock.recall(), Pages::ZERO);
    assert!(stock.is_balanced());
}

#[test]
fn surplus_is_what_the_controller_does_not_allow() {
    let mut stock = stocked(20);
    assert_eq!(stock.surplus(), Pages::ZERO);
    stock.grant(1, 30, Pages(8), None).unwrap();
    assert_eq!(stock.surplus(), Pages(12));
    assert_eq!(stock.give_back(stock.surplus()), Pages(12));
    assert_eq!((stock.surplus(), stock.stock()), (Pages::ZERO, Pages(8)));
    assert_eq!(stock.give_back(Pages(100)), Pages(8), "not more than there is");
}

/// Answers wants at once, without a limit, and returns the largest stock that was ever asked for.
fn use_up(stock: &mut Stock, rounds: usize, stock_max: Pages, room: Option<Pages>) -> Pages {
    let mut largest = Pages::ZERO;
    for _ in 0..rounds {
        if let Some(all) = stock.prepare(stock.stock()) {
            let pages = all.pages();
            all.commit(pages);
        }
        let want = stock.want(Pages::ZERO);
        largest = largest.max(want);
        let total = stock.granted_total() + want.0;
        stock.grant(stock.epoch(), total, stock_max, room).unwrap();
    }
    largest
}

/// A batch doubles while faults are frequent, up to 8 MiB, and no further.
#[test]
fn batches_grow_while_they_are_used_up() {
    let mut stock = stocked(0);
    assert_eq!(stock.want(Pages::ZERO), Pages(16));
    assert_eq!(use_up(&mut stock, 4, MANY, None), Pages(64));
    assert_eq!(use_up(&mut stock, 20, MANY, None), Pages(2048));
    assert!(stock.is_balanced());
}

/// It asks at half of a batch, and a want that was answered in time does not grow.
#[test]
fn it_asks_at_half_a_batch() {
    let mut stock = stocked(16);
    assert_eq!(stock.want(Pages::ZERO), Pages::ZERO);
    stock.prepare(Pages(8)).unwrap().commit(Pages(8));
    assert_eq!(stock.want(Pages::ZERO), Pages::ZERO);
    stock.prepare(Pages(1)).unwrap().commit(Pages(1));
    assert_eq!(stock.want(Pages::ZERO), Pages(9));
    stock.grant(1, 35, MANY, None).unwrap();
    assert_eq!(stock.want(Pages::ZERO), Pages::ZERO, "7 were left: the round trip is fast enough");
    stock.prepare(Pages(9)).unwrap().commit(Pages(9));
    assert_eq!(stock.want(Pages::ZERO), Pages(9));
}

/// An idle worker's batch falls to single pages; a busy one's stays.
#[test]
fn idle_beats_shrink_the_batch() {
    let mut stock = stocked(0);
    use_up(&mut stock, 30, MANY, None);
    stock.tick();
    for _ in 0..20 {
        stock.tick();
    }
    stock.recall();
    assert_eq!(stock.want(Pages::ZERO), Pages(1));
}

/// Near a limit: an eighth of the room, then single pages; without any stock allowed, only what cannot wait.
#[test]
fn batches_shrink_near_a_limit() {
    let mut stock = stocked(0);
    use_up(&mut stock, 30, MANY, None);
    stock.recall();
    let total = stock.granted_total();
    stock.grant(1, total, MANY, Some(Pages(800))).unwrap();
    assert_eq!(stock.want(Pages::ZERO), Pages(100));
    stock.grant(1, total, Pages(50), Some(Pages(800))).unwrap();
    assert_eq!(stock.want(Pages::ZERO), Pages(50));
    stock.grant(1, total, MANY, Some(Pages(3))).unwrap();
    assert_eq!(stock.want(Pages::ZERO), Pages(1));
    stock.grant(1, total, Pages::ZERO, Some(Pages::ZERO)).unwrap();
    assert_eq!(stock.want(Pages::ZERO), Pages::ZERO);
    assert_eq!((stock.want(Pages(2)), stock.want_now(Pages(2))), (Pages(2), Pages(2)), "faults that wait");
    stock.prepare_reserve().unwrap().commit(Pages(1));
    assert_eq!(stock.want(Pages(2)), Pages(3), "and the debt");
}

/// What waits is covered by the stock before anything is asked for at once.
#[test]
fn waiting_faults_count_against_the_stock() {
    let stock = stocked(16);
    assert_eq!((stock.want_now(Pages(16)), stock.want_now(Pages(20))), (Pages::ZERO, Pages(4)));
    assert_eq!(stock.want(Pages(16)), Pages(16), "a batch for afterwards");
}

/// semantics row 4, B65: never below zero, and never silently.
#[test]
#[cfg(not(debug_assertions))]
fn an_uncharge_below_zero_is_clamped_and_counted() {
    let mut stock = stocked(20);
    stock.prepare(Pages(2)).unwrap().commit(Pages(2));
    stock.uncharge(Pages(3));
    assert_eq!((stock.guest(), stock.stock(), stock.underflows()), (Pages::ZERO, Pages(20), 1));
    stock.prepare(Pages(2)).unwrap().commit(Pages(3));
    assert_eq!((stock.guest(), stock.underflows()), (Pages(2), 2));
    assert!(stock.is_balanced());
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "uncharge of 3 pages with 2 pages charged")]
fn an_uncharge_below_zero_stops_a_debug_build() {
    let mut stock = stocked(20);
    stock.prepare(Pages(2)).unwrap().commit(Pages(2));
    stock.uncharge(Pages(3));
}

/// Whatever a hostile or broken controller sends, nothing panics and the account balances.
#[test]
fn absurd_grants_are_survived() {
    let mut stock = Stock::new(Pages(10));
    stock.grant(u32::MAX, u64::MAX, Pages(u64::MAX), Some(Pages(u64::MAX))).unwrap();
    assert!(stock.is_balanced());
    assert!(stock.want(Pages(u64::MAX)) >= Pages(1));
    stock.recall();
    assert!(stock.is_balanced());
    let mut stock = Stock::new(Pages(u64::MAX));
    stock.grant(1, 5, MANY, None).unwrap();
    assert!(stock.want(Pages(u64::MAX)) == Pages(u64::MAX));
    assert!(stock.is_balanced());
}

#[derive(Clone, Debug)]
enum Op {
    /// The controller charges pages and sends a grant, which arrives 0, 1 or 2 times.
    Grant(u64, u8),
    /// The guest touches pages; the fill does this many of them.
    Fill(u64, u64),
    /// A fault that could not wait; true when the fill worked.
    Reserve(bool),
    Uncharge(u64),
    GiveBack(u64),
    Recall,
    /// The controller hears from the worker.
    Report,
    /// A new controller takes over: it counts what the worker holds.
    Adopt,
    Tick,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0u64..100, 0u8..3).prop_map(|(n, times)| Op::Grant(n, times)),
        4 => (0u64..60, 0u64..60).prop_map(|(want, used)| Op::Fill(want, used)),
        2 => any::<bool>().prop_map(Op::Reserve),
        3 => (0u64..60).prop_map(Op::Uncharge),
        1 => (0u64..60).prop_map(Op::GiveBack),
        1 => Just(Op::Recall),
        2 => Just(Op::Report),
        1 => Just(Op::Adopt),
        1 => Just(Op::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// Against a model of three plain numbers and a controller that keeps totals: each page is in exactly one place,
    /// and whatever was lost or repeated on the way, the controller never believes less than the worker holds.
    #[test]
    fn the_account_agrees_with_the_model(target in 0u64..20, ops in prop::collection::vec(op(), 0..120)) {
        let mut stock = Stock::new(Pages(target));
        let (mut guest, mut free, mut reserve) = (0u64, 0u64, 0u64);
        let (mut epoch, mut granted, mut returned) = (1u32, 0u64, 0u64);
        for op in ops {
            match op {
                Op::Grant(n, times) => {
                    granted += n;
                    for time in 0..times {
                        let held = guest + free + reserve;
                        let before = if stock.epoch() == epoch { stock.granted_total() } else { held };
                        let new = stock.grant(epoch, granted, MANY, None).unwrap().0;
                        prop_assert_eq!(new, granted - before);
                        prop_assert!(time == 0 || new == 0);
                        let repaid = new.min(target - reserve);
                        reserve += repaid;
                        free += new - repaid;
                    }
                }
                Op::Fill(want, used) => match stock.prepare(Pages(want)) {
                    Some(reservation) => {
                        prop_assert_eq!(reservation.pages().0, want.min(free));
                        if used <= reservation.pages().0 {
                            reservation.commit(Pages(used));
                            free -= used;
                            guest += used;
                        }
                    }
                    None => prop_assert!(want == 0 || free == 0),
                },
                Op::Reserve(works) => match stock.prepare_reserve() {
                    Some(reservation) if works => {
                        reservation.commit(Pages(1));
                        reserve -= 1;
                        guest += 1;
                    }
                    Some(_) => {}
                    None => prop_assert_eq!(reserve, 0),
                },
                Op::Uncharge(n) => {
                    let n = n.min(guest);
                    stock.uncharge(Pages(n));
                    guest -= n;
                    let repaid = n.min(target - reserve);
                    reserve += repaid;
                    free += n - repaid;
                }
                Op::GiveBack(n) => {
                    prop_assert_eq!(stock.give_back(Pages(n)).0, n.min(free));
                    free -= n.min(free);
                }
                Op::Recall => {
                    prop_assert_eq!(stock.recall().0, free);
                    free = 0;
                }
                Op::Report => {
                    // A report of another epoch says nothing about this one's totals.
                    if stock.epoch() == epoch {
                        returned = stock.returned_total();
                    }
                }
                Op::Adopt => {
                    epoch += 1;
                    granted = stock.held().0;
                    returned = 0;
                }
                Op::Tick => stock.tick(),
            }
            prop_assert!(stock.is_balanced());
            prop_assert_eq!((stock.guest().0, stock.stock().0, stock.reserve().0), (guest, free, reserve));
            prop_assert_eq!(stock.debt().0, target - reserve);
            prop_assert!(granted - returned >= stock.held().0, "usage covers what is held");
            let want = stock.want(Pages::ZERO);
            prop_assert!(want >= stock.debt() && want.0 <= stock.debt().0 + 2048);
            prop_assert_eq!(stock.underflows(), 0);
        }
        // One more round trip, and both agree to the page.
        stock.grant(epoch, granted, MANY, None).unwrap();
        returned = if stock.epoch() == epoch { stock.returned_total() } else { returned };
        prop_assert_eq!(granted - returned, stock.held().0);
    }
}

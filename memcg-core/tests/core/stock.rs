//! The worker's account, alone and against a controller behind a channel that loses and repeats. With a tree: `grants`.

use memcg_core::frame::Cost;
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

/// The reserve is what faults are answered from when nothing else is there: it comes before what is ahead of need.
/// Semantics: 46.
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
/// Semantics: 59.
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

/// Two faults of one page in one batch: the second fill finds the page there, and its charge goes back to where it came
/// from. One page is charged once.
/// Semantics: 18, B9.
#[test]
fn who_loses_the_race_for_a_page_refunds() {
    let mut stock = stocked(20);
    stock.prepare(Pages(1)).unwrap().commit(Pages(1));
    stock.prepare(Pages(1)).unwrap().commit(Pages::ZERO);
    assert_eq!((stock.guest(), stock.stock(), stock.reserve()), (Pages(1), Pages(19), Pages(10)));
    stock.recall();
    stock.prepare_reserve().unwrap().commit(Pages(1));
    stock.prepare_reserve().unwrap().commit(Pages::ZERO);
    assert_eq!((stock.guest(), stock.stock(), stock.reserve()), (Pages(2), Pages::ZERO, Pages(9)));
    assert_eq!((stock.underflows(), stock.is_balanced()), (0, true));
}

/// A fault can fail before its charge, after it, and half way: each time everything is as it was but for what is filled.
/// Semantics: 17, 107, B13.
#[test]
fn a_failure_at_any_step_leaves_no_charge() {
    let mut stock = Stock::new(Pages(2));
    assert!(stock.prepare(Pages(1)).is_none() && stock.prepare_reserve().is_none(), "nothing is charged yet");
    assert_eq!((stock.held(), stock.debt()), (Pages::ZERO, Pages(2)));
    stock.grant(1, 12, MANY, None).unwrap();
    for filled in 0..=10 {
        let before = (stock.guest(), stock.stock());
        let run = stock.prepare(Pages(10)).unwrap();
        if filled == 0 {
            drop(run);
        } else {
            run.commit(Pages(filled));
            stock.uncharge(Pages(filled));
        }
        assert_eq!((stock.guest(), stock.stock()), before);
        drop(stock.prepare_reserve().unwrap());
        assert_eq!((stock.debt(), stock.is_balanced()), (Pages::ZERO, true));
    }
}

/// Accounting that begins on a running guest: what is resident is its charge, nothing is ahead of need, and the first
/// grant refills the reserve, as in any other life of the account.
/// Semantics: 67, 68, 60.
#[test]
fn a_running_guest_is_adopted_with_what_it_has() {
    let mut stock = Stock::adopt(3, Pages(10), Pages(1000));
    assert_eq!((stock.guest(), stock.held(), stock.debt()), (Pages(1000), Pages(1000), Pages(10)));
    assert_eq!((stock.epoch(), stock.granted_total(), stock.returned_total()), (3, 1000, 0));
    assert!(stock.is_balanced());
    assert!(stock.prepare(Pages(1)).is_none() && stock.prepare_reserve().is_none(), "nothing to answer a fault with");
    assert_eq!((stock.recall(), stock.give_back(Pages(5)), stock.returned_total()), (Pages::ZERO, Pages::ZERO, 0));
    assert_eq!((stock.want_now(Pages::ZERO), stock.want(Pages(3))), (Pages(10), Pages(13)), "not what it has");
    // A page that it gives back before the first grant repays the reserve.
    stock.uncharge(Pages(4));
    assert_eq!((stock.guest(), stock.debt(), stock.held()), (Pages(996), Pages(6), Pages(1000)));
    assert_eq!(stock.grant(2, 1010, MANY, None), Err(StockError::OldEpoch { got: 2, known: 3 }));
    assert_eq!(stock.grant(3, 999, MANY, None), Err(StockError::TotalFell { got: 999, known: 1000 }));
    assert_eq!(stock.grant(3, 1010, MANY, None), Ok(Pages(10)));
    assert_eq!((stock.debt(), stock.stock(), stock.held()), (Pages::ZERO, Pages(4), Pages(1010)));
    // A controller that did not wait for the answer, and begins a life of its own, counts from what is held.
    let mut stock = Stock::adopt(3, Pages(10), Pages(1000));
    assert_eq!(stock.grant(4, 1010, MANY, None), Ok(Pages(10)));
    assert_eq!((stock.held(), stock.debt(), stock.is_balanced()), (Pages(1010), Pages::ZERO, true));
}

/// A new epoch is a recount: totals restart at what is held.
/// Semantics: 60.
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

/// Prepared pages go to the guest by commit alone, which cannot fail; whatever else happens puts them back.
/// Semantics: 107, 108, 78.
#[test]
fn a_reservation_commits_or_goes_back() {
    let mut stock = stocked(20);
    drop(stock.prepare(Pages(16)).unwrap());
    assert_eq!((stock.stock(), stock.guest()), (Pages(20), Pages::ZERO));
    let reservation = stock.prepare(Pages(16)).unwrap();
    assert_eq!(reservation.pages(), Pages(16));
    reservation.commit(Pages(9));
    assert_eq!((stock.stock(), stock.guest()), (Pages(11), Pages(9)));
    let rest = stock.prepare(Pages(512)).unwrap();
    assert_eq!(rest.pages(), Pages(11));
    rest.commit(Pages(11));
    assert!(stock.prepare(Pages(1)).is_none());
    assert!(stock.prepare(Pages::ZERO).is_none());
    assert!(stock.is_balanced());
}

/// A fault that cannot be charged in time is answered from the reserve, without waiting for anybody; what comes back
/// repays it before it is used for anything else.
/// Semantics: 46.
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

/// After a recall nothing is held but guest and reserve.
/// Semantics: 60.
#[test]
fn recall_leaves_guest_and_reserve() {
    let mut stock = stocked(20);
    stock.prepare(Pages(5)).unwrap().commit(Pages(5));
    assert_eq!(stock.recall(), Pages(15));
    assert_eq!((stock.stock(), stock.returned_total(), stock.held()), (Pages::ZERO, 15, Pages(15)));
    assert_eq!(stock.recall(), Pages::ZERO);
    assert!(stock.is_balanced());
}

/// A cap that was lowered holds for what is there already, too.
/// Semantics: 59, 60.
#[test]
fn surplus_is_what_the_controller_does_not_allow() {
    let mut stock = stocked(20);
    assert_eq!(stock.surplus(Pages::ZERO), Pages::ZERO);
    stock.grant(1, 30, Pages(8), None).unwrap();
    assert_eq!(stock.surplus(Pages::ZERO), Pages(12));
    assert_eq!(stock.give_back(stock.surplus(Pages::ZERO)), Pages(12));
    assert_eq!((stock.surplus(Pages::ZERO), stock.stock()), (Pages::ZERO, Pages(8)));
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
/// Semantics: 59.
#[test]
fn batches_grow_while_they_are_used_up() {
    let mut stock = stocked(0);
    assert_eq!(stock.want(Pages::ZERO), Pages(16));
    assert_eq!(use_up(&mut stock, 4, MANY, None), Pages(64));
    assert_eq!(use_up(&mut stock, 20, MANY, None), Pages(2048));
    assert!(stock.is_balanced());
}

/// It asks at half of a batch, and a want that was answered in time does not grow.
/// Semantics: 59.
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

/// An idle worker's batch falls to single pages.
/// Semantics: 59.
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
/// Semantics: 59, 61, B70.
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

/// What waits is covered by the stock before anything is asked for at once: only what is not may lead to reclaim.
/// Semantics: 61.
#[test]
fn waiting_faults_count_against_the_stock() {
    let stock = stocked(16);
    assert_eq!((stock.want_now(Pages(16)), stock.want_now(Pages(20))), (Pages::ZERO, Pages(4)));
    assert_eq!(stock.want(Pages(16)), Pages(16), "a batch for afterwards");
}

/// Never below zero, and never silently.
/// Semantics: 4, B65.
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

/// A build for tests stops at the first double uncharge.
/// Semantics: 4, B65.
#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "uncharge of 3 pages with 2 pages charged")]
fn an_uncharge_below_zero_stops_a_debug_build() {
    let mut stock = stocked(20);
    stock.prepare(Pages(2)).unwrap().commit(Pages(2));
    stock.uncharge(Pages(3));
}

/// Whatever a hostile or broken controller sends, nothing panics, overflows or goes below zero, and the account balances.
/// Semantics: B73.
#[test]
fn absurd_grants_are_survived() {
    let mut stock = Stock::new(Pages(10));
    for (total, max) in [(u64::MAX - 2, u64::MAX), (u64::MAX - 1, 0), (u64::MAX, u64::MAX)] {
        stock.grant(1, total, Pages(max), Some(Pages(u64::MAX))).unwrap();
        let most = stock.stock();
        stock.prepare(Pages(u64::MAX)).unwrap().commit(most);
        assert!(stock.want(Pages(u64::MAX)) >= Pages(1));
        stock.tick();
        assert!(stock.is_balanced());
    }
    stock.uncharge(stock.guest());
    assert_eq!(stock.surplus(Pages::ZERO), Pages::ZERO);
    assert!(stock.is_balanced());
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

/// What the guest's pages cost is paid with stock, at once or by the next pages: until then it is debt. Nothing else changes
/// hands, and it is not given back.
/// Semantics: 14.
#[test]
fn what_pages_cost_is_paid_before_the_guest_gets_more() {
    let mut stock = Stock::new(Pages(2));
    stock.grant(1, 10, Pages(100), None).expect("fresh");
    stock.prepare(Pages(3)).expect("there").commit(Pages(3));
    let cost = |tables, records| Cost { tables: Pages(tables), records: Pages(records) };
    stock.owe(cost(2, 1));
    assert_eq!((stock.paid(), stock.stock(), stock.debt()), (cost(2, 1), Pages(2), Pages(0)));
    stock.owe(cost(6, 2));
    assert_eq!((stock.paid(), stock.stock(), stock.debt()), (cost(4, 1), Pages(0), Pages(3)));
    assert_eq!(stock.want_now(Pages(1)), Pages(4));
    stock.prepare_reserve().expect("there").commit(Pages(1));
    stock.uncharge(Pages(2));
    assert_eq!((stock.paid(), stock.reserve(), stock.debt()), (cost(5, 1), Pages(2), Pages(2)), "the reserve first");
    assert_eq!(stock.recall(), Pages(0));
    stock.grant(1, 15, Pages(100), None).expect("more");
    assert_eq!((stock.paid(), stock.stock(), stock.debt()), (cost(6, 2), Pages(3), Pages(0)));
    stock.owe(cost(1, 0));
    assert_eq!(stock.paid(), cost(6, 2), "it only grows");
    assert!(stock.is_balanced());
    stock.grant(2, stock.held().0, Pages(100), None).expect("the next controller counts it, too");
    assert!(stock.is_balanced());
}

proptest! {
    #![proptest_config(crate::cases::cases(500))]

    /// Against a model of three plain numbers and a controller that keeps totals: each page is in exactly one place,
    /// and whatever was lost or repeated on the way, the controller never believes less than the worker holds. The
    /// account begins with an empty guest or with one that is running already.
    /// Semantics (table): 17, 18, 46, 59, 60, 67, 78, 107, 108, B9, B13.
    #[test]
    fn the_account_agrees_with_the_model(
        target in 0u64..20, resident in prop::option::of(0u64..100), ops in prop::collection::vec(op(), 0..120),
    ) {
        let mut stock = match resident {
            Some(resident) => Stock::adopt(1, Pages(target), Pages(resident)),
            None => Stock::new(Pages(target)),
        };
        let resident = resident.unwrap_or(0);
        let (mut guest, mut free, mut reserve) = (resident, 0u64, 0u64);
        let (mut epoch, mut granted, mut returned) = (1u32, resident, 0u64);
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

/// What is set aside for memory that exists already is stock: it counts against what is allowed, is asked for once, and can be
/// given back only when its memory is gone.
/// Semantics: 59, 60.
#[test]
fn stock_that_has_memory_already_is_stock_and_goes_back_after_its_memory() {
    let mut stock = stocked(1100);
    assert!(!stock.set_aside(Pages(1101)) && stock.set_aside(Pages(1024)));
    assert_eq!((stock.stock(), stock.ahead(), stock.held()), (Pages(76), Pages(1024), Pages(1110)));
    assert_eq!(stock.want(Pages::ZERO), Pages::ZERO, "there is enough");
    assert_eq!(stock.recall(), Pages(76));
    assert_eq!((stock.held(), stock.is_balanced()), (Pages(1034), true));
    // One half is used, the other repays the reserve first.
    stock.prepare_reserve().unwrap().commit(Pages(1));
    stock.use_ahead(Pages(512));
    stock.put_back(Pages(512));
    assert_eq!((stock.guest(), stock.stock(), stock.reserve()), (Pages(513), Pages(511), Pages(10)));
    assert_eq!((stock.ahead(), stock.underflows(), stock.is_balanced()), (Pages::ZERO, 0, true));
}

/// A guest that walks through its memory need not run dry eight times before as much is asked for as it uses.
#[test]
fn what_is_expected_is_asked_for_within_the_caps() {
    let mut stock = stocked(0);
    stock.expect(Pages(700));
    assert_eq!(stock.want(Pages::ZERO), Pages(700));
    stock.expect(Pages(1));
    assert_eq!(stock.want(Pages::ZERO), Pages(700), "never less");
    stock.expect(Pages(1 << 40));
    assert_eq!(stock.want(Pages::ZERO), MANY);
    stock.grant(1, 10, Pages(40), Some(Pages(400))).unwrap();
    assert_eq!(stock.want(Pages::ZERO), Pages(40));
    (0..12).for_each(|_| stock.tick());
    stock.grant(1, 10, MANY, None).unwrap();
    assert_eq!(stock.want(Pages::ZERO), Pages(1), "and it is forgotten");
}

/// A limit that allows less takes what has no memory first, and says how much too much is left.
#[test]
fn a_surplus_is_what_can_be_given_back() {
    let mut stock = stocked(1024);
    assert!(stock.set_aside(Pages(512)));
    stock.grant(1, 1034, Pages(600), None).unwrap();
    assert_eq!(stock.surplus(Pages::ZERO), Pages(424));
    assert_eq!(stock.surplus(Pages(900)), Pages(124), "a margin stays");
    stock.grant(1, 1034, Pages::ZERO, None).unwrap();
    assert_eq!(stock.surplus(Pages::ZERO), Pages(512), "the rest has memory");
}

/// What is evicted is no guest page any more; what its contents take stays charged, the rest repays the reserve first.
/// Semantics: 27.
#[test]
fn eviction_frees_what_the_store_does_not_take() {
    let mut stock = Stock::new(Pages(10));
    stock.grant(1, 110, Pages(100), None).expect("the first grant");
    stock.prepare(Pages(100)).expect("there is stock").commit(Pages(100));
    stock.prepare_reserve().expect("there is a reserve").commit(Pages(1));
    let counts = |stock: &Stock| [stock.guest(), stock.store(), stock.reserve(), stock.stock()].map(|pages| pages.0);
    assert_eq!(counts(&stock), [101, 0, 9, 0]);
    stock.evicted(Pages(40), Pages(15));
    assert_eq!(counts(&stock), [61, 15, 10, 24]);
    // Refaulted like any touch; the store keeps its size until what has died in it is gone.
    stock.prepare(Pages(20)).expect("there is stock").commit(Pages(20));
    assert_eq!(counts(&stock), [81, 15, 10, 4]);
    stock.evicted(Pages(0), Pages(7));
    assert_eq!(counts(&stock), [81, 7, 10, 12]);
    assert!(stock.is_balanced() && stock.underflows() == 0);
    assert_eq!(stock.held(), Pages(110));
}

//! The working set by samples, against synthetic guests that count what they touch.

use memcg_core::sample::{Arrivals, Estimate, LEAST, Sampler};
use memcg_core::units::Pages;

/// Pages of the guests here: 256 MiB.
const PAGES: usize = 1 << 16;

/// Pages that a cohort may have.
const CAPACITY: usize = 8192;

/// Numbers that look random, and are the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.roll() % bound as u64) as usize
    }

    fn unit(&mut self) -> f64 {
        (self.roll() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A guest whose memory is all resident, with somebody who moves pages of it aside.
struct Guest {
    sampler: Sampler,
    aside: Vec<bool>,
    /// The period in which each page was last touched.
    last: Vec<u32>,
    period: u32,
    faults: u64,
}

impl Guest {
    fn new(seed: u64) -> Guest {
        let sampler = Sampler::new(CAPACITY, seed);
        Guest { sampler, aside: vec![false; PAGES], last: vec![0; PAGES], period: 0, faults: 0 }
    }

    /// Distinct pages touched in the last two periods.
    fn truth(&self) -> u64 {
        self.last.iter().filter(|last| **last != 0 && **last + 2 > self.period).count() as u64
    }

    fn touch(&mut self, page: usize) {
        self.last[page] = self.period;
        if std::mem::take(&mut self.aside[page]) {
            self.faults += 1;
            self.sampler.touched(page as u32..page as u32 + 1);
        }
    }

    fn turn(&mut self) -> Option<Estimate> {
        let (estimate, ranks) = self.sampler.turn(Pages(PAGES as u64), Arrivals::default(), u64::MAX);
        for rank in ranks {
            self.aside[rank as usize] = true;
            self.sampler.add(rank as u32);
        }
        self.period += 1;
        estimate
    }

    /// Lets the guest run for so many periods; the last estimate, and the truth that it is about.
    fn run(&mut self, periods: u32, mut touches: impl FnMut(&mut Guest, u32)) -> (Estimate, u64) {
        for period in 0..periods {
            self.turn();
            touches(self, period);
        }
        let truth = self.truth();
        (self.turn().expect("two periods are over"), truth)
    }
}

/// Pages with the popularity of Zipf's law, scattered over memory.
struct Zipf {
    /// Sums of the popularities.
    sums: Vec<f64>,
    place: Vec<usize>,
    dice: Dice,
}

impl Zipf {
    fn new(exponent: f64) -> Zipf {
        let mut sum = 0.0;
        let popularity = |rank: usize| 1.0 / (rank as f64).powf(exponent);
        let sums = (1..=PAGES)
            .map(|rank| {
                sum += popularity(rank);
                sum
            })
            .collect();
        let mut dice = Dice(7);
        let mut place: Vec<_> = (0..PAGES).collect();
        for at in (1..PAGES).rev() {
            place.swap(at, dice.below(at + 1));
        }
        Zipf { sums, place, dice }
    }

    fn page(&mut self) -> usize {
        let at = self.dice.unit() * self.sums.last().expect("not empty");
        self.place[self.sums.partition_point(|sum| *sum < at).min(PAGES - 1)]
    }
}

fn assert_near(what: &str, (estimate, truth): (Estimate, u64)) {
    let off = estimate.pages.0.abs_diff(truth);
    assert!(off * 10 <= truth, "{what}: {estimate:?}, and {truth} pages were touched");
}

/// A guest that goes round in a part of its memory, small or large, is found within 10 % after two periods.
#[test]
fn a_hot_loop_is_found_after_two_periods() {
    for hot in [PAGES / 32, PAGES / 8, PAGES / 2, PAGES] {
        let looped = |guest: &mut Guest, _| (0..hot).for_each(|page| guest.touch(page));
        assert_near(&format!("{hot} in a loop"), Guest::new(1).run(2, looped));
    }
}

/// Popularity without any order in memory, from guests that touch half of it to those that touch a twentieth: the second
/// sort needs larger cohorts, and gets them.
#[test]
fn zipf_is_found_within_a_tenth() {
    for (touches, periods) in [(200_000, 2), (30_000, 4), (5_000, 6)] {
        for seed in 1..=5 {
            let mut zipf = Zipf::new(0.99);
            let guest = |guest: &mut Guest, _| (0..touches).for_each(|_| guest.touch(zipf.page()));
            assert_near(&format!("zipf, {touches} touches, seed {seed}"), Guest::new(seed).run(periods, guest));
        }
    }
}

/// A sequential scan, a part of memory each period.
#[test]
fn a_scan_is_found_within_a_tenth() {
    for part in [PAGES / 16, PAGES / 5, PAGES] {
        let scan = |guest: &mut Guest, period: u32| {
            (0..part).for_each(|page| guest.touch((period as usize * part + page) % PAGES));
        };
        assert_near(&format!("a scan of {part} pages"), Guest::new(3).run(7, scan));
    }
}

/// One that turns to other memory has, two periods later, another working set.
#[test]
fn a_change_of_phase_is_seen_two_periods_later() {
    let phases = |guest: &mut Guest, period: u32| {
        let (from, pages) = if period < 4 { (0, PAGES / 2) } else { (PAGES * 3 / 4, PAGES / 8) };
        (from..from + pages).for_each(|page| guest.touch(page));
    };
    assert_near("before", Guest::new(4).run(4, phases));
    assert_near("both", Guest::new(4).run(5, phases));
    assert_near("after", Guest::new(4).run(6, phases));
}

/// Of a guest that touches nothing nothing comes back, and that is not taken for certain.
#[test]
fn an_idle_guest_has_no_working_set_and_an_error_bar() {
    let (estimate, truth) = Guest::new(5).run(4, |_, _| ());
    assert_eq!((estimate.pages, truth), (Pages::ZERO, 0));
    assert!(estimate.error.0 > 0 && estimate.error.0 < PAGES as u64 / 100, "{estimate:?}");
}

/// The bar holds the truth about as often as it says.
#[test]
fn the_error_bar_holds_the_truth_in_nineteen_of_twenty() {
    let mut held = 0;
    for seed in 0..200 {
        let mut dice = Dice(seed + 1);
        let guest = |guest: &mut Guest, _| (0..20_000).for_each(|_| guest.touch(dice.below(PAGES)));
        let (estimate, truth) = Guest::new(seed).run(2, guest);
        held += u32::from(estimate.pages.0.abs_diff(truth) <= estimate.error.0);
    }
    assert!(held >= 185, "{held} of 200");
}

/// The price of an estimate does not grow with the working set: about as many faults, whatever the guest does.
#[test]
fn a_period_costs_some_hundred_faults() {
    for hot in [PAGES / 32, PAGES / 8, PAGES / 2, PAGES] {
        let mut guest = Guest::new(6);
        let looped = |guest: &mut Guest, _| (0..hot).for_each(|page| guest.touch(page));
        guest.run(6, looped);
        let before = guest.faults;
        looped(&mut guest, 0);
        assert!(guest.faults - before <= LEAST, "{hot} pages cost {} faults", guest.faults - before);
    }
}

/// Where all pages are drawn nothing is left to chance.
#[test]
fn a_small_population_is_counted() {
    let mut sampler = Sampler::new(CAPACITY, 1);
    let turn = |sampler: &mut Sampler| {
        let (estimate, ranks) = sampler.turn(Pages(100), Arrivals::default(), u64::MAX);
        ranks.for_each(|rank| sampler.add(rank as u32));
        estimate
    };
    turn(&mut sampler);
    for page in [3, 99, 3] {
        sampler.touched(page..page + 1);
    }
    turn(&mut sampler);
    sampler.touched(3..4);
    sampler.touched(50..51);
    let counted = Estimate { pages: Pages(3), error: Pages::ZERO, drawn: 100, returned: 3 };
    assert_eq!(turn(&mut sampler), Some(counted));
    // The second cohort was drawn after the page 99 was touched.
    assert_eq!(turn(&mut sampler).map(|estimate| estimate.pages), Some(Pages(2)));
}

/// What was not resident and is touched needs no sample. What came along is part of the error.
#[test]
fn arrivals_count_whole() {
    let mut sampler = Sampler::new(CAPACITY, 1);
    let arrivals = |touched, around| Arrivals { touched: Pages(touched), around: Pages(around) };
    sampler.turn(Pages::ZERO, arrivals(10, 10), 0);
    sampler.turn(Pages(1000), arrivals(110, 25), 0);
    let (estimate, _) = sampler.turn(Pages(2000), arrivals(210, 25), 0);
    let counted = Estimate { pages: Pages(200 + 15), error: Pages(15), drawn: 0, returned: 0 };
    assert_eq!(estimate, Some(counted));
    // Nobody was drawn of those that were there: nothing is known.
    assert_eq!(sampler.turn(Pages(2000), arrivals(210, 25), 0).0, None);
}

/// A cohort is a set of fixed size: more than fits, and what is out of order, is not taken.
#[test]
fn a_cohort_takes_what_fits_in_order() {
    let mut sampler = Sampler::new(3, 1);
    let (_, ranks) = sampler.turn(Pages(1 << 40), Arrivals::default(), u64::MAX);
    assert_eq!(ranks.count(), 3);
    for page in [5, 5, 4, 6, 7, 8] {
        sampler.add(page);
    }
    let news: Vec<_> = (0..10).filter(|page| sampler.touched(*page..*page + 1)).collect();
    assert_eq!(news, [5, 6, 7]);
    assert!(!sampler.touched(5..6), "told before");
    sampler.turn(Pages(100), Arrivals::default(), u64::MAX);
    sampler.add(5);
    assert!(sampler.touched(5..6), "drawn again");
}

/// What comes back with a page that was touched says nothing about those that were drawn: they are left aside.
#[test]
fn nobody_who_was_drawn_comes_back_with_another() {
    let mut sampler = Sampler::new(8, 1);
    sampler.turn(Pages(100), Arrivals::default(), u64::MAX);
    [10, 20, 30].into_iter().for_each(|page| sampler.add(page));
    sampler.turn(Pages(100), Arrivals::default(), u64::MAX);
    [17, 20, 40].into_iter().for_each(|page| sampler.add(page));
    assert_eq!(sampler.between(25, 0..64), 21..30);
    assert_eq!(sampler.between(18, 0..64), 18..20, "of both cohorts");
    assert_eq!(sampler.between(20, 0..64), 18..30, "the one that was touched comes back");
    assert_eq!(sampler.between(35, 34..38), 34..38, "nobody was drawn there");
    assert!(sampler.touched(16..22), "both of them");
    assert_eq!(sampler.between(18, 0..64), 11..30, "those that are back stop nobody");
    assert!(!sampler.touched(11..30));
}

/// Cold is what lies between two that have not come back for a period.
#[test]
fn what_lies_between_quiet_neighbours_is_quiet() {
    let mut sampler = Sampler::new(8, 1);
    sampler.turn(Pages(100), Arrivals::default(), u64::MAX);
    [10, 20, 30, 40, 50].into_iter().for_each(|page| sampler.add(page));
    assert_eq!(sampler.quiet_after(&mut 0), None, "the newest cohort has had no time");
    sampler.turn(Pages(100), Arrivals::default(), u64::MAX);
    sampler.touched(30..31);
    let mut at = 0;
    let quiet: Vec<_> = std::iter::from_fn(|| sampler.quiet_after(&mut at)).collect();
    assert_eq!(quiet, [11..20, 41..50]);
}

/// Of a cohort with few pages, or one that was not drawn to its end, nothing is said.
#[test]
fn a_poor_cohort_says_nothing() {
    let second = |most: u64, spoilt: bool| {
        let mut sampler = Sampler::new(CAPACITY, 1);
        for _ in 0..2 {
            let (_, ranks) = sampler.turn(Pages(100_000), Arrivals::default(), most);
            ranks.for_each(|rank| sampler.add(rank as u32));
            if spoilt {
                sampler.spoil();
            }
        }
        sampler.turn(Pages(100_000), Arrivals::default(), most).0
    };
    assert!(second(LEAST, false).is_some());
    assert_eq!(second(2, false), None);
    assert_eq!(second(LEAST, true), None);
}

/// Nobody has touched more than there is, and what is not known now is known less well later.
#[test]
fn an_estimate_stays_within_what_can_be() {
    let estimate = |pages, error| Estimate { pages: Pages(pages), error: Pages(error), drawn: 9, returned: 3 };
    assert_eq!(estimate(2100, 1800).within(Pages(256)), estimate(256, 256));
    assert_eq!(estimate(0, 775).within(Pages(512)), estimate(0, 512));
    assert_eq!(estimate(100, 500).within(Pages(256)), estimate(100, 156));
    assert_eq!(estimate(100, 10).within(Pages(256)), estimate(100, 10));
    assert_eq!(estimate(160, 4).stale().stale(), estimate(160, 48));
}

//! Guests that free memory for good, and guests that take the same blocks again at once.

use memcg_core::reporting::{LEAST, PERIOD, QUIET, RECENT, Reports};

/// Pages of 2 MiB, and of the guest: 1 GiB.
const BLOCK: usize = 512;
const SIZE: usize = 512 * BLOCK;

/// A guest that each second reports 32 MiB, a different part of RAM each time, and after `after` seconds touches
/// `share` per cent of it again. Says for each second whether its report was discarded.
fn guest(seconds: u32, after: u32, share: usize) -> Vec<bool> {
    let mut reports = Reports::new(SIZE);
    let part = |second: u32| {
        let first = second as usize % 32 * 16 * BLOCK;
        first..first + 16 * BLOCK
    };
    let mut welcome = Vec::new();
    for now in 1..=seconds {
        let taken = reports.welcome(now, false);
        welcome.push(taken);
        if taken {
            reports.discarded(now, part(now));
        }
        if let Some(then) = now.checked_sub(after).filter(|then| *then > 0 && welcome[*then as usize - 1]) {
            let pages = part(then);
            reports.filled(now, pages.start..pages.start + pages.len() * share / 100);
        }
    }
    welcome
}

/// The lengths of the spans in which reports were left alone.
fn quiet(welcome: &[bool]) -> Vec<usize> {
    welcome.chunk_by(|a, b| a == b).filter(|span| !span[0]).map(<[bool]>::len).collect()
}

#[test]
fn reports_of_a_guest_that_takes_it_all_back_are_left_alone_for_longer_and_longer() {
    let spans = quiet(&guest(2000, 1, 100));
    assert_eq!(spans[..6], [10, 20, 40, 80, 160, 320]);
    assert!(spans[6..spans.len() - 1].iter().all(|span| *span == QUIET[1] as usize), "{spans:?}");
}

#[test]
fn what_stays_free_or_comes_back_late_is_always_discarded() {
    assert_eq!(quiet(&guest(1000, 1, 0)), []);
    assert_eq!(quiet(&guest(1000, 1, 40)), []);
    assert_eq!(quiet(&guest(1000, RECENT, 100)), [], "later than just now");
    assert!(!quiet(&guest(1000, RECENT - 1, 100)).is_empty());
}

#[test]
fn a_guest_that_changes_its_ways_is_left_alone_for_a_short_time_again() {
    let mut reports = Reports::new(SIZE);
    let churn = |reports: &mut Reports, from: u32| {
        let mut now = from;
        while reports.welcome(now, false) {
            reports.discarded(now, 0..16 * BLOCK);
            reports.filled(now, 0..16 * BLOCK);
            now += 1;
        }
        reports.quiet_until(now).unwrap() - now
    };
    assert_eq!(churn(&mut reports, 1), 10);
    assert_eq!(churn(&mut reports, 100), 20);
    for now in 200..200 + 3 * PERIOD {
        assert!(reports.welcome(now, false));
        reports.discarded(now, 0..16 * BLOCK);
    }
    assert_eq!(churn(&mut reports, 1000), 10);
}

#[test]
fn who_is_short_of_room_is_not_left_alone() {
    let mut reports = Reports::new(SIZE);
    reports.discarded(1, 0..LEAST.0 as usize);
    assert_eq!(reports.filled(2, 0..LEAST.0 as usize), LEAST.0);
    assert!(reports.welcome(3, true) && !reports.welcome(4, false) && reports.welcome(5, true));
    assert_eq!((reports.quiet_until(12), reports.quiet_until(13)), (Some(13), None));
}

#[test]
fn a_page_comes_back_when_its_block_was_reported_just_now() {
    let mut reports = Reports::new(3 * BLOCK + 7);
    assert_eq!(reports.filled(0, 0..SIZE.min(3 * BLOCK + 7)), 0, "nothing was ever reported");
    reports.discarded(5, BLOCK..2 * BLOCK);
    reports.discarded(5, 3 * BLOCK..3 * BLOCK + 7);
    assert_eq!(reports.filled(6, 0..BLOCK), 0);
    assert_eq!(reports.filled(6, BLOCK - 1..BLOCK + 9), 9);
    assert_eq!(reports.filled(6, 2 * BLOCK..3 * BLOCK + 7), 7);
    assert_eq!(reports.filled(5 + RECENT - 1, 2 * BLOCK - 1..2 * BLOCK), 1);
    assert_eq!(reports.filled(5 + RECENT, BLOCK..2 * BLOCK), 0);
    // Never more than was reported.
    reports.discarded(50, 0..1);
    assert_eq!(reports.filled(51, 0..BLOCK), BLOCK as u64 + 7 + 1 - 17);
}

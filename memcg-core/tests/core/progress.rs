//! Guests that give, give a little, and do not.

use std::time::Duration;

use memcg_core::Pages;
use memcg_core::progress::State::{Cooperating, Slow, Stalled};
use memcg_core::progress::{Asking, BRISK, FAST, News, Progress, REST, State, WINDOW};

/// A guest of which `missing` pages are wanted and that gives `each` pages every `every` milliseconds, looked at every
/// 100 ms for a minute: how it was judged at the end of each window.
fn judged(missing: u64, each: u64, every: u64) -> Vec<State> {
    let mut progress = Progress::new();
    let mut verdicts = Vec::new();
    for now in (0..=60_000).step_by(100) {
        let released = (now / every * each).min(missing);
        progress.sample(Duration::from_millis(now), Pages(released), Pages(missing - released));
        if now > 0 && now % 2000 == 0 {
            verdicts.push(progress.state());
        }
    }
    verdicts
}

/// Semantics: 42, 117.
#[test]
fn progress_is_a_rate_against_what_is_missing() {
    let mib = 256;
    // missing, pages, every so many ms, judgement throughout
    let table = [
        // A page every five seconds is a guest that keeps somebody waiting.
        (1024 * mib, 1, 5_000, Stalled),
        (1024 * mib, 0, 1, Stalled),
        (1, 0, 1, Stalled),
        // One in a hundred seconds is what slow means, and one in ten what is good enough.
        (1000, 10, 1_000, Slow),
        (1000, 9, 1_000, Stalled),
        (10_000, 1_000, 1_000, Cooperating),
        // Much is much, however much more is missing.
        (1 << 40, FAST, 1_000, Cooperating),
        (1 << 40, FAST - 1, 1_000, Slow),
        (1 << 40, BRISK, 1_000, Slow),
        (1 << 40, BRISK - 1, 1_000, Stalled),
        // 256 pages in a batch, as Linux does it, once a second.
        (1 << 30, 256, 1_000, Slow),
    ];
    for (missing, each, every, expected) in table {
        let verdicts = judged(missing, each, every);
        // The page every five seconds is in some windows; it changes nothing.
        let first = verdicts[..4].iter().all(|verdict| *verdict == expected);
        assert!(first, "{each} pages every {every} ms of {missing}: {verdicts:?}");
    }
}

#[test]
fn who_has_just_been_asked_has_time_to_begin() {
    let mut progress = Progress::new();
    let ms = Duration::from_millis;
    for now in [5_000, 5_001, 6_999] {
        assert_eq!(progress.sample(ms(now), Pages(0), Pages(10)), Cooperating);
        assert_eq!((progress.verdict(), progress.next()), (None, Some(ms(7_000))));
    }
    assert_eq!(progress.sample(ms(7_000), Pages(0), Pages(10)), Stalled);
    // It has stalled until another window has shown something else, or it is done.
    assert_eq!(progress.sample(ms(8_000), Pages(9), Pages(1)), Stalled);
    assert_eq!(progress.sample(ms(9_000), Pages(9), Pages(1)), Cooperating);
    assert_eq!(progress.sample(ms(11_000), Pages(9), Pages(1)), Stalled);
    assert_eq!(progress.sample(ms(11_100), Pages(10), Pages(0)), Cooperating);
    assert_eq!(progress.next(), None);
    assert_eq!(progress.sample(ms(90_000), Pages(10), Pages(5)), Cooperating, "another need, another grace");
}

/// A target that rises at the end of a window is no reason to call slow who has done what was asked.
#[test]
fn what_was_asked_for_only_lately_does_not_count_against_a_guest() {
    let mut progress = Progress::new();
    progress.sample(Duration::ZERO, Pages(0), Pages(100));
    assert_eq!(progress.sample(WINDOW, Pages(90), Pages(1_000_000)), Cooperating);
    // A target that falls asks for less; what it has given back before counts for nothing.
    assert_eq!(progress.sample(2 * WINDOW, Pages(50), Pages(10)), Stalled);
    assert_eq!(progress.sample(3 * WINDOW, Pages(52), Pages(8)), Cooperating);
}

/// Linux tries for ever to reach its target: one that it cannot reach costs it a CPU.
#[test]
fn a_guest_that_stalls_is_left_alone_for_longer_and_longer() {
    let (wanted, actual) = (Pages(1000), Pages(10));
    let mut asking = Asking::new();
    let (mut now, mut spans, mut news) = (Duration::ZERO, Vec::new(), Vec::new());
    let mut told = wanted;
    let mut since = now;
    while now < Duration::from_secs(400) {
        news.extend(asking.look(now, wanted, actual, actual));
        if asking.told(wanted) != told {
            spans.push((told, (now - since).as_secs()));
            (told, since) = (asking.told(wanted), now);
        }
        now = asking.next().expect("something is missing").max(now + Duration::from_millis(1));
    }
    let expected: Vec<_> =
        [2, 4, 8, 16, 32, 64, 64, 64, 64, 64].into_iter().flat_map(|rest| [(wanted, 2), (actual, rest)]).collect();
    assert_eq!(spans, expected[..spans.len()]);
    assert!(spans.len() > 12 && REST.map(|rest| rest.as_secs()) == [2, 64]);
    assert_eq!(news, [News::Stalled, News::Uncooperative], "each is said once");
    assert_eq!(asking.state(), Stalled, "asked again or not");
}

#[test]
fn a_guest_that_gives_again_begins_anew() {
    let secs = Duration::from_secs;
    let mut asking = Asking::new();
    let look = |asking: &mut Asking, at, released| asking.look(secs(at), Pages(1000), Pages(released), Pages(released));
    assert_eq!(look(&mut asking, 0, 0), None);
    assert_eq!(look(&mut asking, 2, 0), Some(News::Stalled));
    assert_eq!((asking.told(Pages(1000)), asking.next()), (Pages(0), Some(secs(4))));
    assert_eq!(look(&mut asking, 3, 0), None);
    assert_eq!(look(&mut asking, 4, 0), None);
    assert_eq!((asking.told(Pages(1000)), asking.state()), (Pages(1000), Stalled));
    assert_eq!(look(&mut asking, 6, 500), None);
    assert_eq!(asking.state(), Cooperating);
    // A second time, but it has given in between.
    assert_eq!(look(&mut asking, 8, 500), Some(News::Stalled));
    assert_eq!(asking.next(), Some(secs(10)), "a short rest again");
    assert_eq!(look(&mut asking, 9, 1000), None);
    assert_eq!((asking.state(), asking.told(Pages(1000)), asking.next()), (Cooperating, Pages(1000), None));
}

/// While a guest rests, a limit may be raised: then nothing is missing any more.
#[test]
fn a_target_below_what_the_guest_has_ends_its_rest() {
    let secs = Duration::from_secs;
    let mut asking = Asking::new();
    asking.look(secs(0), Pages(1000), Pages(300), Pages(300));
    assert_eq!(asking.look(secs(2), Pages(1000), Pages(300), Pages(300)), Some(News::Stalled));
    assert_eq!((asking.told(Pages(1000)), asking.told(Pages(200))), (Pages(300), Pages(200)));
    assert_eq!(asking.look(secs(3), Pages(200), Pages(300), Pages(300)), None);
    assert_eq!((asking.state(), asking.told(Pages(1000))), (Cooperating, Pages(1000)));
}

/// What a guest says about itself is what it is told when it rests, and never a reason to believe that it has given.
#[test]
fn a_guest_that_only_says_that_it_gives_has_stalled() {
    let mut asking = Asking::new();
    asking.look(Duration::ZERO, Pages(1000), Pages(0), Pages(1000));
    assert_eq!(asking.look(WINDOW, Pages(1000), Pages(0), Pages(u64::MAX)), Some(News::Stalled));
    assert_eq!((asking.state(), asking.told(Pages(1000))), (Stalled, Pages(1000)));
    assert_eq!(asking.look(WINDOW, Pages(1000), Pages(0), Pages(u64::MAX)), None);
    assert_eq!((asking.state(), asking.next()), (Stalled, Some(2 * WINDOW)), "it rests like any other");
}

#[test]
fn a_guest_that_ran_out_of_memory_is_left_alone_for_long() {
    let secs = Duration::from_secs;
    let mut asking = Asking::new();
    let look = |asking: &mut Asking, at, given| asking.look(secs(at), Pages(1000), Pages(given), Pages(given));
    look(&mut asking, 0, 0);
    assert_eq!((look(&mut asking, 2, 900), asking.state()), (None, Cooperating));
    asking.taken_back(secs(3), Pages(644));
    assert_eq!((asking.told(Pages(1000)), asking.state(), asking.next()), (Pages(644), Stalled, Some(secs(67))));
    assert_eq!((look(&mut asking, 66, 644), asking.told(Pages(1000))), (None, Pages(644)));
    assert_eq!(
        (look(&mut asking, 67, 644), asking.told(Pages(1000)), asking.state()),
        (None, Pages(1000), Cooperating)
    );
    // A lower target is met at once.
    asking.taken_back(secs(68), Pages(600));
    assert_eq!((asking.look(secs(69), Pages(500), Pages(600), Pages(600)), asking.state()), (None, Cooperating));
}

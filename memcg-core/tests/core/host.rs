//! A host that runs short, played from traces.

use std::time::Duration;

use memcg_core::host::{Reading, Terms, Verdict, Watch};
use memcg_core::units::{Pages, SizeArg, parse_size};
use proptest::prelude::*;

/// The traces, each with its name.
const TRACES: [(&str, &str); 6] = [
    ("slow-leak", include_str!("traces/slow-leak.trace")),
    ("burst", include_str!("traces/burst.trace")),
    ("oscillation", include_str!("traces/oscillation.trace")),
    ("stalls", include_str!("traces/stalls.trace")),
    ("no-psi", include_str!("traces/no-psi.trace")),
    ("clock", include_str!("traces/clock.trace")),
];

fn size(word: &str) -> Pages {
    match parse_size(word) {
        Ok(SizeArg::Bytes(bytes)) => Pages::from_bytes_floor(bytes),
        other => panic!("{word}: {other:?}"),
    }
}

/// `calm`, or what of it is said in a trace.
fn said(verdict: &Verdict) -> String {
    let Some(_) = verdict.short else { return "calm".to_owned() };
    let mut words = vec!["short".to_owned()];
    if !verdict.reclaim.is_zero() {
        words.push(format!("{}M", verdict.reclaim.bytes() >> 20));
    }
    if verdict.victim {
        words.push("victim".to_owned());
    }
    words.join(" ")
}

/// Each trace says of each moment what must come of it.
#[test]
fn each_trace_is_answered_as_it_says() {
    for (name, text) in TRACES {
        let mut watch = None;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        for line in lines {
            let words: Vec<&str> = line.split_whitespace().collect();
            if words[0] == "host" {
                watch = Some(Watch::new(Terms::new(size(words[1]))));
                continue;
            }
            let watch = watch.as_mut().expect("a host first");
            let now = Duration::from_secs_f64(words[0].parse().expect("seconds"));
            let stalled = (words[2] != "-").then(|| Duration::from_millis(words[2].parse().expect("milliseconds")));
            let reading = Reading { available: size(words[1]), stalled };
            let (asked, expected) = match words[3] {
                "asked" => (size(words[4]), &words[5..]),
                _ => (Pages::ZERO, &words[3..]),
            };
            let verdict = watch.step(now, reading, asked);
            assert_eq!(said(&verdict), expected.join(" "), "{name}: {line}");
            if verdict.victim {
                watch.chosen(now);
            }
        }
        assert!(watch.is_some(), "{name} is empty");
    }
}

/// A small host may have as much less available as it is smaller, within bounds.
#[test]
fn terms_grow_with_the_host_between_bounds() {
    let enter = |mib| Terms::new(Pages::from_mib(mib)).enter.bytes() >> 20;
    assert_eq!((enter(512), enter(4096), enter(1 << 20)), (64, 204, 2048));
    let terms = Terms::new(Pages::from_mib(4096));
    assert!(terms.critical < terms.enter && terms.enter < terms.leave && terms.least < terms.critical);
}

/// Nobody looks often at a host with plenty of memory, and nobody is late at one that has little.
#[test]
fn a_host_is_looked_at_before_it_can_be_short() {
    let mut watch = Watch::new(Terms::new(size("24G")));
    let mut look = |available: &str| {
        let reading = Reading { available: size(available), stalled: None };
        let _ = watch.step(Duration::ZERO, reading, Pages::ZERO);
        watch.next_look(reading).as_millis()
    };
    assert_eq!([look("200G"), look("9420M"), look("2G"), look("1200M")], [10_000, 1999, 250, 250]);
}

proptest! {
    /// Whatever a host says: between two victims there is the time to cool down, nothing is asked of a host that is calm, never
    /// more than a step, and a host with plenty of memory is never short.
    #[test]
    fn no_history_makes_a_watch_rash(readings in prop::collection::vec((0u64..4000, 0u64..3000, 0u64..4000, 0u64..400), 1..200)) {
        let terms = Terms::new(Pages::from_mib(16384));
        let mut watch = Watch::new(terms);
        let (mut now, mut stalled, mut last) = (Duration::ZERO, Duration::ZERO, None::<Duration>);
        for (ms, available, share, asked) in readings {
            now += Duration::from_millis(ms);
            stalled += Duration::from_millis(ms * share.min(1000) / 1000);
            let reading = Reading { available: Pages::from_mib(available), stalled: Some(stalled) };
            let verdict = watch.step(now, reading, Pages::from_mib(asked));
            prop_assert!(verdict.reclaim <= terms.step);
            if verdict.short.is_none() {
                prop_assert!(verdict.reclaim.is_zero() && !verdict.victim);
                prop_assert!(reading.available >= terms.critical);
            }
            if verdict.victim {
                prop_assert!(last.is_none_or(|last| now - last >= terms.cool_down));
                (last, _) = (Some(now), watch.chosen(now));
            }
        }
    }
}

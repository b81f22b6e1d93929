//! A limit below what a Linux guest uses: what it gives, and what is taken.

use ballast_tests::guest_file;
use ballast_tests::linux::{Story, play};

fn story(name: &str, driver: bool) -> Story {
    let story = play(name, &guest_file("vmlinux"), &guest_file("initrd.img"), driver);
    println!("{name}: {}", story.numbers());
    assert!(story.is_below(), "{}", story.after);
    assert!(story.by("evicted") > 0, "{}", story.reclaimed);
    assert!(story.is_intact(), "{:?}", story.answers);
    story
}

/// Means that need the guest's help come first, each has its time, and what they leave over is evicted.
/// Semantics: 24, T3.
#[test]
fn linux_gives_by_reports_and_balloon_and_then_loses_cold_pages_and_finds_every_byte() {
    let story = story("ladder", true);
    assert_eq!(story.rungs, ["reports", "balloon", "evict"]);
    assert!(story.reported() > 0 && story.by("balloon") > 0, "{}", story.reclaimed);
}

/// Page cache and anonymous memory are evicted without a balloon driver, and nobody waits for one.
/// Semantics: 24, T3.
#[test]
fn linux_without_a_balloon_driver_is_evicted_below_its_limit_and_finds_every_byte() {
    let story = story("alone", false);
    assert_eq!(story.rungs, ["evict"]);
    assert_eq!((story.reported(), story.by("balloon")), (0, 0), "{}", story.reclaimed);
}

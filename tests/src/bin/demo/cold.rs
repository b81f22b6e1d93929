//! Cold pages: a limit that leaves room for little more than what the guest uses, and one that leaves a Linux guest less.

use std::path::Path;

use ballast_tests::cold::{FOLLOWS, LOW_MAX, Tempo, play};
use ballast_tests::{deadline, linux, number};

use super::Step;
use super::single::draw;

/// The steps, in order.
pub const STEPS: [&str; 3] = ["cold-lower", "cold-speed", "cold-verify"];

/// The steps of the Linux guests.
pub const LINUX_STEPS: [&str; 3] = ["linux-ladder", "linux-no-balloon", "linux-verify"];

/// The freestanding guest, without a balloon driver.
pub fn native(step: &mut Step) {
    let story = play(Tempo::SHOWN, |now| draw("cold", now, "a hot set, and four times as much that is cold"));
    let ms = story.lowered.1 - story.lowered.0;
    let usage = |vm: &serde_json::Value| number(vm, "memory.current_bytes");
    let after = story.moments.iter().filter(|moment| moment.ms > story.lowered.1);
    let peak = after.map(|moment| moment.usage).max().unwrap_or(u64::MAX);
    step(
        STEPS[0],
        story.status == 200 && peak <= LOW_MAX && ms <= deadline(FOLLOWS.as_secs()).as_secs_f64() * 1000.0,
        &format!(
            "status={} ms={ms:.0} before_bytes={} usage_bytes={} peak_after_bytes={peak} max_bytes={LOW_MAX} \
             swapped_bytes={} store_bytes={} balloon_bytes={}",
            story.status,
            usage(&story.before),
            usage(&story.after),
            number(&story.after, "memory.stat.swapped_bytes"),
            number(&story.after, "memory.stat.store_bytes"),
            number(&story.after, "balloon.actual_bytes"),
        ),
    );
    let [before, during, after] = story.cycles();
    step(
        STEPS[1],
        // All of the hot set fits.
        story.is_fast_again(),
        &format!(
            "before_cycles_per_access={:.1} during={:.1} after={:.1} during_speed={:.3} after_speed={:.3}",
            before / 1000.0,
            during / 1000.0,
            after / 1000.0,
            before / during,
            before / after
        ),
    );
    let answers = [&story.accessed, &story.verified];
    step(
        STEPS[2],
        answers.iter().all(|answer| answer.starts_with("OK") && answer.contains(" bad=0")),
        &format!("accessed={} verified={}", story.accessed.replace(' ', ","), story.verified.replace(' ', ",")),
    );
}

/// Two Debian guests, one of them without its balloon driver.
pub fn linux(step: &mut Step, kernel: &Path, initrd: &Path) {
    let ladder = linux::play("ladder", kernel, initrd, true);
    let ways =
        |story: &linux::Story| [story.reported(), story.by("balloon"), story.by("evicted")].map(|bytes| bytes > 0);
    step(
        LINUX_STEPS[0],
        ladder.is_below() && ladder.rungs == ["reports", "balloon", "evict"] && ways(&ladder) == [true; 3],
        &ladder.numbers(),
    );
    let alone = linux::play("alone", kernel, initrd, false);
    step(
        LINUX_STEPS[1],
        alone.is_below() && alone.rungs == ["evict"] && ways(&alone) == [false, false, true],
        &alone.numbers(),
    );
    let told = |story: &linux::Story| story.answers.join(";").replace(' ', ",");
    step(
        LINUX_STEPS[2],
        ladder.is_intact() && alone.is_intact(),
        &format!("ladder={} no_balloon={}", told(&ladder), told(&alone)),
    );
}

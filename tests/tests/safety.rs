//! Contents are safe: whatever is done to a guest's memory, the guest finds every byte that it has written, and what is
//! charged is what is there.
//!
//! The short form is a part of every run of the tests. `BALLAST_FULL=1` makes the long one: 10 000 steps, and ten minutes
//! of a guest that rewrites what is evicted.

use std::time::{Duration, Instant};

use ballast_tests::walk::{Swap, Walk, exact, seed_or};
use ballast_tests::{TestVm, number, skipped, swap_or_skip};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// The number for the short form, or the one for the long form.
fn form(short: u64, long: u64) -> u64 {
    if std::env::var("BALLAST_FULL").is_ok_and(|full| full == "1") { long } else { short }
}

/// Three vCPUs: one does what it is told, the others rewrite pages of their own for most of the time. Limits go up and down
/// meanwhile, and there is never room for all.
/// Semantics: 11, 14.
#[test]
fn no_byte_differs_after_random_steps_of_touching_evicting_giving_and_changing_limits() {
    if skipped("safety") {
        return;
    }
    walk("safe", seed_or(0x5afe_0001), &Swap::Memory, form(600, 10_000));
}

/// The same where what does not shrink goes to a file: by pages that no fault can be answered with before they are read.
#[test]
fn no_byte_differs_where_some_pages_are_in_a_file() {
    let Some(directory) = swap_or_skip("safety-file") else { return };
    let end = walk("filed", seed_or(0x5afe_0002), &Swap::File(directory.path()), form(400, 3_000));
    assert!(number(&end, "cold.fetched_bytes") > MIB, "{end}");
}

/// Takes `steps` steps, and returns the VM as it was at the end.
fn walk(name: &str, seed: u64, swap: &Swap<'_>, steps: u64) -> Value {
    let (begin, longest) = (Instant::now(), Duration::from_secs(form(30, u64::MAX)));
    let mut walk = Walk::start(name, seed, 3, swap);
    for step in 1..=steps {
        walk.step();
        if step % 7 == 0 {
            walk.rest();
        }
        if step % 200 == 0 {
            walk.verify_all();
        }
        if begin.elapsed() > longest {
            break;
        }
    }
    walk.verify_all();
    let end = walk.rest();
    println!("relieved={} seconds={} {}", walk.relieved, begin.elapsed().as_secs(), end["cold"]);
    assert!(number(&end, "cold.evicted_bytes") > 16 * MIB, "{end}");
    assert!(number(&end, "cold.refaulted_bytes") > 4 * MIB, "{end}");
    walk.give_all();
    end
}

/// Two vCPUs rewrite everything while it is evicted under them; each page knows what it must hold.
#[test]
fn no_byte_differs_in_a_guest_that_rewrites_what_is_evicted() {
    if skipped("rewrite") {
        return;
    }
    let seconds = form(5, 600);
    let vm = TestVm::builder("rewrite").memory("size=128M,max=44M,swap=max").option("--cpus", "2");
    let mut vm = vm.cmdline("shell").start();
    vm.expect("READY", 10);
    let answer = vm.command(&format!("rewrite 16M 48M seconds={seconds}"), seconds + 60);
    assert!(answer.starts_with("OK"), "{answer}");
    let end = exact(&vm);
    println!("{answer} {}", end["cold"]);
    assert!(number(&end, "cold.evicted_bytes") > 16 * MIB, "{end}");
}

//! Charges are resident pages: after every step, whatever it is, the pages that are charged to a guest are the pages that
//! the host's page tables hold for it (invariant 4).

use std::fs::File;
use std::os::unix::fs::FileExt;

use ballast_tests::walk::{Swap, Walk, seed_or};
use ballast_tests::{PAGE, TestVm, number, pagemap, pool_pages, resident_pages, skip, skipped, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// Pages of a huge page.
const HUGE: usize = 512;

/// A guest that takes commands, `name` with this `--memory` and these further options, unless this host can run none.
fn guest(name: &str, memory: &str, options: &[&str]) -> Option<TestVm> {
    if skipped(name) {
        return None;
    }
    let builder = TestVm::builder(name).memory(memory).cmdline("shell");
    let vm = options.iter().fold(builder, |builder, option| builder.arg(*option)).start();
    vm.expect("READY", 10);
    Some(vm)
}

/// Types a command that must succeed.
fn ok(vm: &mut TestVm, command: &str) {
    let answer = vm.command(command, 20);
    assert!(answer.starts_with("OK"), "{command}: {answer}");
}

/// The guest's pages that are charged: exactly those that are resident.
fn guest_pages(vm: &TestVm) -> u64 {
    let now = vm.show();
    let charged = number(&now, "memory.stat.guest_bytes") / PAGE;
    assert_eq!(charged, resident_pages(&now), "charged and resident differ in {now}");
    charged
}

/// [`guest_pages`] after a command that must succeed.
fn pages_after(vm: &mut TestVm, command: &str) -> u64 {
    ok(vm, command);
    guest_pages(vm)
}

/// Without swap, so that nothing but the guest's own steps moves a page.
/// Semantics: 11, 14, 21.
#[test]
fn charges_equal_resident_pages_after_each_of_500_random_steps() {
    if skipped("exact") {
        return;
    }
    let mut walk = Walk::start("exact", seed_or(0x5eed_1234_9876), 1, &Swap::None);
    for _ in 0..500 {
        walk.step();
        walk.rest();
    }
    walk.verify_all();
}

/// A page that is only read would be free if it were the host's page of zeroes, until the first write to it fails.
/// Semantics: 22.
#[test]
fn reading_untouched_memory_charges_it_and_writing_to_it_then_does_not() {
    let Some(mut vm) = guest("read", "size=64M,max=64M", &[]) else { return };
    let before = guest_pages(&vm);
    let read = pages_after(&mut vm, "touch 16M 16M mode=read");
    assert!(read >= before + 16 * MIB / PAGE, "{before} pages, then {read}");
    assert_eq!(pages_after(&mut vm, "touch 16M 16M seed=2"), read);
}

/// The guest decides what it gives and touches: each page is still charged exactly while it is there.
/// Semantics: 4, 21, B65.
#[test]
fn a_page_given_twice_is_uncharged_once_and_touched_again_charged_again() {
    let Some(mut vm) = guest("twice", "size=64M,max=64M", &[]) else { return };
    let mut after = |command: &str| pages_after(&mut vm, command);
    after("balloon init");
    // The driver's own pages: from here on it touches no new ones.
    after("balloon inflate 40M 8M");
    let touched = after("touch 16M 8M seed=3");
    let given = after("balloon inflate 16M 8M");
    assert_eq!(touched - given, 8 * MIB / PAGE);
    assert_eq!(after("balloon inflate 16M 8M"), given, "given twice");
    assert_eq!(after("touch 16M 8M seed=4"), touched, "touched without a deflate");
    assert_eq!(number(&vm.show(), "faults.implicit_deflates"), 8 * MIB / PAGE);
}

/// What a guest has reported as free costs nothing until it is touched: then it is a first touch like any other.
/// Semantics: 4, 21.
#[test]
fn reported_pages_are_uncharged_read_as_zeroes_and_are_charged_again_when_touched() {
    let reporting = ["--balloon", "free_page_reporting=on"];
    let Some(mut vm) = guest("reported", "size=64M,max=64M", &reporting) else { return };
    let mut after = |command: &str| pages_after(&mut vm, command);
    after("balloon init features=0x31");
    after("balloon report 40M 8M");
    let touched = after("touch 16M 16M seed=3");
    let reported = after("balloon report 16M 8M");
    assert_eq!(touched - reported, 8 * MIB / PAGE);
    assert_eq!(after("balloon report 16M 8M"), reported, "reported twice");
    assert_eq!(after("verify 24M 8M seed=3"), reported, "its neighbours are what they were");
    assert_eq!(after("touch 16M 8M mode=read"), touched);
    assert_eq!(after("verify 16M 8M zero=only"), touched);
    // What is in the balloon is not the guest's to report.
    let given = after("balloon inflate 16M 8M");
    assert_eq!(after("balloon report 16M 8M"), given);
    let now = vm.show();
    assert_eq!(number(&now, "faults.reported_pages"), 8 * MIB / PAGE);
    assert_eq!(number(&now, "faults.implicit_deflates"), 0);
    assert_eq!(number(&now, "memory.stat.ballooned_bytes"), 8 * MIB);
}

/// A guest that takes at once what it has just reported makes two sides work for nothing. Its reports are answered, and
/// left alone for a while.
#[test]
fn reports_of_what_comes_back_at_once_are_left_alone() {
    let reporting = ["--balloon", "free_page_reporting=on"];
    let Some(mut vm) = guest("left-alone", "size=128M,max=128M", &reporting) else { return };
    let mut after = |command: &str| pages_after(&mut vm, command);
    after("balloon init features=0x31");
    after("balloon report 100M 4K");
    // What a walk fills beyond its end depends on what is ready: here it ends at pages that are never filled so.
    after("balloon inflate 48M 8M");
    let touched = after("touch 16M 32M seed=3");
    assert_eq!(touched - after("balloon report 16M 32M"), 32 * MIB / PAGE);
    assert_eq!(after("touch 16M 32M seed=4"), touched);
    assert_eq!(after("balloon report 16M 32M"), touched, "left alone");
    assert_eq!(after("verify 16M 32M seed=4"), touched);
    let now = vm.show();
    let pages = ["reported", "reported_back", "reported_left"].map(|k| number(&now, &format!("faults.{k}_pages")));
    assert_eq!(pages, [32 * MIB / PAGE; 3]);
}

/// For each page of RAM's first slot from `start` on: whether the host has it as a part of a larger one; `None` where it has
/// none. An error, the reason for `SKIP`, where the host does not say so.
fn is_part(vm: &Value, start: u64, bytes: u64) -> Result<Vec<Option<bool>>, String> {
    const COMPOUND: u64 = 3 << 15;
    let unreadable = |error: std::io::Error| format!("/proc/kpageflags cannot be read ({error})");
    let flags = File::open("/proc/kpageflags").map_err(unreadable)?;
    let part = |entry: u64| {
        let frame = entry & ((1 << 55) - 1);
        if entry >> 63 == 0 {
            return Ok(None);
        }
        if frame == 0 {
            return Err("pagemap hides where pages are".to_owned());
        }
        let mut bits = [0; 8];
        flags.read_exact_at(&mut bits, frame * 8).map_err(unreadable)?;
        Ok(Some(u64::from_le_bytes(bits) & COMPOUND != 0))
    };
    pagemap(vm, number(&vm["ram"][0], "hva") + start, bytes).into_iter().map(part).collect()
}

/// Which blocks of 2 MiB, of `bytes` from `start` on, are huge pages; an error as of [`is_part`].
fn huge_blocks(vm: &TestVm, start: u64, bytes: u64) -> Result<Vec<bool>, String> {
    let parts = is_part(&vm.show(), start, bytes)?;
    Ok(parts.chunks(HUGE).map(|block| block.iter().all(|page| *page == Some(true))).collect())
}

/// [`huge_blocks`] of a guest with room that has walked through 64 MiB from 16 MiB on. An error also where none is one: what is
/// to be seen of huge pages is not seen on such a host.
fn huge_blocks_of_a_walk(vm: &mut TestVm) -> Result<Vec<bool>, String> {
    ok(vm, "touch 16M 64M seed=3");
    let huge = huge_blocks(vm, 16 * MIB, 64 * MIB)?;
    if huge.contains(&true) { Ok(huge) } else { Err("the host gave no huge page".to_owned()) }
}

/// A guest that walks gets whole blocks, as huge pages where the host has some. Each page is charged while it is there, in the
/// guest as in the pool, and the pool is empty soon after the walk.
/// Semantics: 11, 28, 60.
#[test]
fn a_walk_is_charged_exactly_in_blocks_and_the_pool_does_not_outlive_it() {
    let Some(mut vm) = guest("walk", "size=256M,max=256M", &[]) else { return };
    let before = guest_pages(&vm);
    for start in (16..144).step_by(32) {
        ok(&mut vm, &format!("touch {start}M 32M seed=3"));
        let now = vm.show();
        assert!(pool_pages(&now) * PAGE <= number(&now, "memory.stat.stock_bytes"), "{now}");
        let parts = ["guest", "stock", "reserve", "vmm"].map(|k| number(&now, &format!("memory.stat.{k}_bytes")));
        assert_eq!(parts.iter().sum::<u64>(), number(&now, "memory.current_bytes"), "{now}");
    }
    let walked = guest_pages(&vm) - before;
    assert!((128 * MIB / PAGE..160 * MIB / PAGE).contains(&walked), "{walked} pages");
    ok(&mut vm, "verify 16M 128M seed=3");
    wait_until("the pool is empty", 10, || (pool_pages(&vm.show()) == 0).then_some(()));
    guest_pages(&vm);
}

/// What is held ahead of need, with memory or without, is no reason to refuse a limit: it is back when that is decided.
/// Semantics: 60.
#[test]
fn a_limit_that_what_the_guest_uses_fits_in_is_taken_in_the_middle_of_a_walk() {
    let Some(mut vm) = guest("back", "size=256M,max=256M", &[]) else { return };
    for start in (16..112).step_by(32) {
        ok(&mut vm, &format!("touch {start}M 32M seed=3"));
        let now = vm.show();
        let stock = number(&now, "memory.stat.stock_bytes");
        assert!(stock > 0, "{now}");
        let max = number(&now, "memory.current_bytes") - stock;
        let (status, body) = vm.patch("?mode=refuse", &json!({ "max_bytes": max }));
        assert_eq!(status, 200, "{body}");
        assert_eq!(pool_pages(&vm.show()), 0);
        let (status, body) = vm.patch("", &json!({ "max_bytes": 256 * MIB }));
        assert_eq!(status, 200, "{body}");
    }
}

/// The host has back what is discarded of a huge page, not only when the last page of it goes: what is left is no part of one
/// any more.
/// Semantics: 28.
#[test]
fn the_rest_of_a_huge_page_holds_nothing_that_was_discarded() {
    let Some(mut vm) = guest("rest", "size=256M,max=256M", &[]) else { return };
    ok(&mut vm, "balloon init");
    let huge = match huge_blocks_of_a_walk(&mut vm) {
        Ok(huge) => huge,
        Err(reason) => return skip("rest", reason),
    };
    let before = guest_pages(&vm);
    for block in 0..32 {
        ok(&mut vm, &format!("balloon inflate {} {}", (16 + 2 * block) * MIB + PAGE, 2 * MIB - PAGE));
    }
    let given = before - guest_pages(&vm);
    assert!(given >= 32 * 500, "{given} pages");
    let left = is_part(&vm.show(), 16 * MIB, 64 * MIB).expect("known before");
    for (block, _) in huge.iter().enumerate().filter(|(_, huge)| **huge) {
        assert_eq!(left[block * HUGE], Some(false), "block {block} of {huge:?}");
        assert!(left[block * HUGE + 1..][..HUGE - 1].iter().all(Option::is_none), "block {block}");
    }
    ok(&mut vm, "verify 16M 4K seed=3");
}

/// Near its limit a guest gets no memory in blocks, and none is zeroed ahead: what it does not use may be what it needs. On this
/// host another one that has room does get huge pages, or nothing is shown of them.
/// Semantics: 60, 64.
#[test]
fn a_walk_near_the_limit_gets_no_huge_pages() {
    let Some(mut vm) = guest("near", "size=256M,max=18M,swap=0", &[]) else { return };
    let before = guest_pages(&vm);
    for start in (16..26).step_by(2) {
        ok(&mut vm, &format!("touch {start}M 2M seed=3"));
        assert_eq!(pool_pages(&vm.show()), 0);
    }
    assert!((10 * MIB / PAGE..12 * MIB / PAGE).contains(&(guest_pages(&vm) - before)));
    let mut other = guest("near-other", "size=256M,max=256M", &[]).expect("the first one runs");
    match huge_blocks_of_a_walk(&mut other) {
        Ok(_) => assert_eq!(huge_blocks(&vm, 16 * MIB, 10 * MIB), Ok(vec![false; 5])),
        Err(reason) => skip("near", reason),
    }
}

/// Ageing looks at a huge page as a whole: aside and back, it is one still, and its guest as fast as before.
#[test]
fn what_ageing_has_looked_at_is_a_huge_page_still() {
    let Some(mut vm) = guest("still-huge", "size=256M,max=256M,swap=0,ageing=1s", &[]) else { return };
    let huge = match huge_blocks_of_a_walk(&mut vm) {
        Ok(huge) => huge,
        Err(reason) => return skip("still-huge", reason),
    };
    vm.send("access hot 16M 64M hot=64M period=1000");
    wait_until("all of it was aside", 60, || (number(&vm.show(), "cold.returned_bytes") >= 128 * MIB).then_some(()));
    let parts = is_part(&vm.show(), 16 * MIB, 64 * MIB).expect("known before");
    let is_small = |block: &[Option<bool>]| block.contains(&Some(false));
    let split = parts.chunks(HUGE).zip(huge).filter(|(block, huge)| *huge && is_small(block)).count();
    assert_eq!(split, 0, "huge pages are small ones now");
}

/// What the guest has given away is not filled by a walk that comes near.
/// Semantics: 21.
#[test]
fn a_walk_fills_nothing_that_is_in_the_balloon() {
    let Some(mut vm) = guest("edge", "size=256M,max=256M", &[]) else { return };
    ok(&mut vm, "balloon init");
    for start in (32..128).step_by(32) {
        ok(&mut vm, &format!("balloon inflate {}M 5M", start + 27));
        ok(&mut vm, &format!("touch {start}M 27M seed=3"));
    }
    assert_eq!(number(&vm.show(), "memory.stat.ballooned_bytes"), 3 * 5 * MIB);
    guest_pages(&vm);
}

/// Who jumps about gets what it touches. Who walks a little, only to jump away, is charged for the blocks that it got so:
/// no more than one stock full of them each time.
/// Semantics: 11, 60.
#[test]
fn jumps_are_charged_by_the_page_and_short_walks_by_a_few_blocks() {
    let Some(mut vm) = guest("jumps", "size=512M,max=512M", &[]) else { return };
    let before = guest_pages(&vm);
    let jumps = pages_after(&mut vm, "random 256M 128M count=500 seed=9") - before;
    assert!((400..=600).contains(&jumps), "{jumps} pages for 500 touches");
    assert_eq!(pool_pages(&vm.show()), 0);
    for start in (16..144).step_by(16) {
        let before = guest_pages(&vm);
        let pages = pages_after(&mut vm, &format!("touch {start}M 2049K seed=3")) - before;
        assert!(pages <= (2 + 8) * MIB / PAGE, "{pages} pages for 513 touches");
    }
    guest_pages(&vm);
}

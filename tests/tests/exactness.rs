//! Charges are resident pages: after every step, whatever it is, the pages that are charged to a guest are the pages that
//! the host's page tables hold for it (invariant 4).

use std::os::unix::fs::FileExt;

use ballast_tests::walk::{Swap, Walk, seed_or};
use ballast_tests::{TestVm, missing_on_host, number, resident_pages, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Without swap, so that nothing but the guest's own steps moves a page.
/// Semantics: 11, 14, 21.
#[test]
fn charges_equal_resident_pages_after_each_of_500_random_steps() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP exactness reason={reason}");
        return;
    }
    let mut walk = Walk::start("exact", seed_or(0x5eed_1234_9876), 1, &Swap::None);
    for _ in 0..500 {
        walk.step();
        walk.rest();
    }
    walk.verify_all();
}

/// The guest's pages that are charged: exactly those that are resident.
fn guest_pages(vm: &TestVm) -> u64 {
    let now = vm.show();
    let charged = number(&now, "memory.stat.guest_bytes") / PAGE;
    assert_eq!(charged, resident_pages(&now), "charged and resident differ in {now}");
    charged
}

/// A page that is only read would be free if it were the host's page of zeroes, until the first write to it fails.
/// Semantics: 22.
#[test]
fn reading_untouched_memory_charges_it_and_writing_to_it_then_does_not() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP read-faults reason={reason}");
        return;
    }
    let mut vm = TestVm::builder("read").memory("size=64M,max=64M").cmdline("shell").start();
    vm.expect("READY", 10);
    let before = guest_pages(&vm);
    assert!(vm.command("touch 16M 16M mode=read", 10).starts_with("OK"));
    let read = guest_pages(&vm);
    assert!(read >= before + 16 * MIB / PAGE, "{before} pages, then {read}");
    assert!(vm.command("touch 16M 16M seed=2", 10).starts_with("OK"));
    assert_eq!(guest_pages(&vm), read);
}

/// The guest decides what it gives and touches: each page is still charged exactly while it is there.
/// Semantics: 4, 21, B65.
#[test]
fn a_page_given_twice_is_uncharged_once_and_touched_again_charged_again() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP double-inflate reason={reason}");
        return;
    }
    let mut vm = TestVm::builder("twice").memory("size=64M,max=64M").cmdline("shell").start();
    vm.expect("READY", 10);
    let mut ok = |command: &str| {
        let answer = vm.command(command, 10);
        assert!(answer.starts_with("OK"), "{command}: {answer}");
        guest_pages(&vm)
    };
    ok("balloon init");
    // The driver's own pages: from here on it touches no new ones.
    ok("balloon inflate 40M 8M");
    let touched = ok("touch 16M 8M seed=3");
    let given = ok("balloon inflate 16M 8M");
    assert_eq!(touched - given, 8 * MIB / PAGE);
    assert_eq!(ok("balloon inflate 16M 8M"), given, "given twice");
    assert_eq!(ok("touch 16M 8M seed=4"), touched, "touched without a deflate");
    assert_eq!(number(&vm.show(), "faults.implicit_deflates"), 8 * MIB / PAGE);
}

/// What a guest has reported as free costs nothing until it is touched: then it is a first touch like any other.
/// Semantics: 4, 21.
#[test]
fn reported_pages_are_uncharged_read_as_zeroes_and_are_charged_again_when_touched() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP reported reason={reason}");
        return;
    }
    let vm = TestVm::builder("reported").memory("size=64M,max=64M").option("--balloon", "free_page_reporting=on");
    let mut vm = vm.cmdline("shell").start();
    vm.expect("READY", 10);
    let mut ok = |command: &str| {
        let answer = vm.command(command, 10);
        assert!(answer.starts_with("OK"), "{command}: {answer}");
        guest_pages(&vm)
    };
    ok("balloon init features=0x31");
    ok("balloon report 40M 8M");
    let touched = ok("touch 16M 16M seed=3");
    let reported = ok("balloon report 16M 8M");
    assert_eq!(touched - reported, 8 * MIB / PAGE);
    assert_eq!(ok("balloon report 16M 8M"), reported, "reported twice");
    assert_eq!(ok("verify 24M 8M seed=3"), reported, "its neighbours are what they were");
    assert_eq!(ok("touch 16M 8M mode=read"), touched);
    assert_eq!(ok("verify 16M 8M zero=only"), touched);
    // What is in the balloon is not the guest's to report.
    let given = ok("balloon inflate 16M 8M");
    assert_eq!(ok("balloon report 16M 8M"), given);
    let now = vm.show();
    assert_eq!(number(&now, "faults.reported_pages"), 8 * MIB / PAGE);
    assert_eq!(number(&now, "faults.implicit_deflates"), 0);
    assert_eq!(number(&now, "memory.stat.ballooned_bytes"), 8 * MIB);
}

/// A guest that takes at once what it has just reported makes two sides work for nothing. Its reports are answered, and
/// left alone for a while.
#[test]
fn reports_of_what_comes_back_at_once_are_left_alone() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP left-alone reason={reason}");
        return;
    }
    let vm = TestVm::builder("left-alone").memory("size=128M,max=128M").option("--balloon", "free_page_reporting=on");
    let mut vm = vm.cmdline("shell").start();
    vm.expect("READY", 10);
    let mut ok = |command: &str| {
        let answer = vm.command(command, 10);
        assert!(answer.starts_with("OK"), "{command}: {answer}");
        guest_pages(&vm)
    };
    ok("balloon init features=0x31");
    ok("balloon report 100M 4K");
    // What a walk fills beyond its end depends on what is ready: here it ends at pages that are never filled so.
    ok("balloon inflate 48M 8M");
    let touched = ok("touch 16M 32M seed=3");
    assert_eq!(touched - ok("balloon report 16M 32M"), 32 * MIB / PAGE);
    assert_eq!(ok("touch 16M 32M seed=4"), touched);
    assert_eq!(ok("balloon report 16M 32M"), touched, "left alone");
    assert_eq!(ok("verify 16M 32M seed=4"), touched);
    let now = vm.show();
    let pages = ["reported", "reported_back", "reported_left"].map(|k| number(&now, &format!("faults.{k}_pages")));
    assert_eq!(pages, [32 * MIB / PAGE; 3]);
}

/// The bits of each page's entry in the worker's pagemap, of RAM's first slot and of the pool.
fn pagemap(vm: &Value, area: (u64, u64)) -> Vec<u64> {
    let path = format!("/proc/{}/pagemap", number(vm, "pid"));
    let mut entries = vec![0u8; (area.1 / PAGE * 8) as usize];
    let file = std::fs::File::open(path).expect("pagemap of the worker");
    file.read_exact_at(&mut entries, area.0 / PAGE * 8).expect("pagemap covers it");
    entries.chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().expect("eight bytes"))).collect()
}

/// Pages of the pool that have memory.
fn pool_pages(vm: &Value) -> u64 {
    let area = (number(vm, "pool.hva"), number(vm, "pool.bytes"));
    pagemap(vm, area).iter().filter(|entry| **entry >> 62 != 0).count() as u64
}

/// For each page of RAM's first slot from `start` on: whether the host has it as a part of a larger one; `None` where it has
/// none. No answer for who may not know where pages are.
fn is_part(vm: &Value, start: u64, bytes: u64) -> Option<Vec<Option<bool>>> {
    const COMPOUND: u64 = 3 << 15;
    let flags = std::fs::File::open("/proc/kpageflags").ok()?;
    let entries = pagemap(vm, (number(&vm["ram"][0], "hva") + start, bytes));
    let part = |entry: &u64| {
        let frame = entry & ((1 << 55) - 1);
        let mut bits = [0; 8];
        flags.read_exact_at(&mut bits, frame * 8).ok()?;
        (frame != 0).then_some((entry >> 63 == 1).then_some(u64::from_le_bytes(bits) & COMPOUND != 0))
    };
    entries.iter().map(|entry| if entry >> 62 == 0 { Some(None) } else { part(entry) }).collect()
}

/// A guest that walks gets whole blocks, as huge pages where the host has some. Each page is charged while it is there, in the
/// guest as in the pool, and the pool is empty soon after the walk.
/// Semantics: 11, 28, 60.
#[test]
fn a_walk_is_charged_exactly_in_blocks_and_the_pool_does_not_outlive_it() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP walk reason={reason}");
        return;
    }
    let mut vm = TestVm::builder("walk").memory("size=256M,max=256M").cmdline("shell").start();
    vm.expect("READY", 10);
    let before = guest_pages(&vm);
    for start in (16..144).step_by(32) {
        assert!(vm.command(&format!("touch {start}M 32M seed=3"), 20).starts_with("OK"));
        let now = vm.show();
        assert!(pool_pages(&now) * PAGE <= number(&now, "memory.stat.stock_bytes"), "{now}");
        let parts = ["guest", "stock", "reserve", "vmm"].map(|k| number(&now, &format!("memory.stat.{k}_bytes")));
        assert_eq!(parts.iter().sum::<u64>(), number(&now, "memory.current_bytes"), "{now}");
    }
    let walked = guest_pages(&vm) - before;
    assert!((128 * MIB / PAGE..160 * MIB / PAGE).contains(&walked), "{walked} pages");
    assert!(vm.command("verify 16M 128M seed=3", 20).starts_with("OK"));
    wait_until("the pool is empty", 10, || (pool_pages(&vm.show()) == 0).then_some(()));
    guest_pages(&vm);
}

/// What is held ahead of need, with memory or without, is no reason to refuse a limit: it is back when that is decided.
/// Semantics: 60.
#[test]
fn a_limit_that_what_the_guest_uses_fits_in_is_taken_in_the_middle_of_a_walk() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP walk-recall reason={reason}");
        return;
    }
    let mut vm = TestVm::builder("back").memory("size=256M,max=256M").cmdline("shell").start();
    vm.expect("READY", 10);
    for start in (16..112).step_by(32) {
        assert!(vm.command(&format!("touch {start}M 32M seed=3"), 20).starts_with("OK"));
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
    if let Some(reason) = missing_on_host() {
        println!("SKIP huge-discard reason={reason}");
        return;
    }
    let mut vm = TestVm::builder("rest").memory("size=256M,max=256M").cmdline("shell").start();
    vm.expect("READY", 10);
    assert!(vm.command("balloon init", 10).starts_with("OK"));
    assert!(vm.command("touch 16M 64M seed=3", 20).starts_with("OK"));
    let parts = |vm: &TestVm| is_part(&vm.show(), 16 * MIB, 64 * MIB);
    let huge =
        parts(&vm).map(|pages| pages.chunks(512).map(|b| b.iter().all(|p| *p == Some(true))).collect::<Vec<_>>());
    let huge = huge.unwrap_or_default();
    let count = huge.iter().filter(|huge| **huge).count();
    if count == 0 {
        println!("SKIP huge-discard reason=the host gave no huge page, or does not say so");
        return;
    }
    let before = guest_pages(&vm);
    for block in 0..32 {
        let answer = vm.command(&format!("balloon inflate {} {}", (16 + 2 * block) * MIB + PAGE, 2 * MIB - PAGE), 20);
        assert!(answer.starts_with("OK"), "{answer}");
    }
    let given = before - guest_pages(&vm);
    assert!(given >= 32 * 500, "{given} pages");
    let left = parts(&vm).expect("known before");
    for (block, _) in huge.iter().enumerate().filter(|(_, huge)| **huge) {
        assert_eq!(left[block * 512], Some(false), "block {block} of {count}");
        assert!(left[block * 512 + 1..][..511].iter().all(Option::is_none), "block {block}");
    }
    assert!(vm.command("verify 16M 4K seed=3", 10).starts_with("OK"));
}

/// Huge pages in `bytes` of RAM from `start` on, `None` where the host does not say.
fn huge_pages(vm: &TestVm, start: u64, bytes: u64) -> Option<usize> {
    let parts = is_part(&vm.show(), start, bytes)?;
    Some(parts.chunks(512).filter(|block| block.iter().all(|page| *page == Some(true))).count())
}

/// Near its limit a guest gets no memory in blocks, and none is zeroed ahead: what it does not use may be what it needs.
/// Semantics: 60, 64.
#[test]
fn a_walk_near_the_limit_gets_no_huge_pages() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP near reason={reason}");
        return;
    }
    let mut vm = TestVm::builder("near").memory("size=256M,max=18M,swap=0").cmdline("shell").start();
    vm.expect("READY", 10);
    let before = guest_pages(&vm);
    for start in (16..26).step_by(2) {
        assert!(vm.command(&format!("touch {start}M 2M seed=3"), 20).starts_with("OK"));
        assert_eq!(pool_pages(&vm.show()), 0);
    }
    assert!((10 * MIB / PAGE..12 * MIB / PAGE).contains(&(guest_pages(&vm) - before)));
    assert!(huge_pages(&vm, 16 * MIB, 10 * MIB).is_none_or(|count| count == 0));
}

/// What the guest has given away is not filled by a walk that comes near.
/// Semantics: 21.
#[test]
fn a_walk_fills_nothing_that_is_in_the_balloon() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP balloon-walk reason={reason}");
        return;
    }
    let mut vm = TestVm::builder("edge").memory("size=256M,max=256M").cmdline("shell").start();
    vm.expect("READY", 10);
    assert!(vm.command("balloon init", 10).starts_with("OK"));
    for start in (32..128).step_by(32) {
        assert!(vm.command(&format!("balloon inflate {}M 5M", start + 27), 20).starts_with("OK"));
        assert!(vm.command(&format!("touch {start}M 27M seed=3"), 20).starts_with("OK"));
    }
    assert_eq!(number(&vm.show(), "memory.stat.ballooned_bytes"), 3 * 5 * MIB);
    guest_pages(&vm);
}

/// Who jumps about gets what it touches. Who walks a little, only to jump away, is charged for the blocks that it got so:
/// no more than one stock full of them each time.
/// Semantics: 11, 60.
#[test]
fn jumps_are_charged_by_the_page_and_short_walks_by_a_few_blocks() {
    if let Some(reason) = missing_on_host() {
        println!("SKIP jumps reason={reason}");
        return;
    }
    let mut vm = TestVm::builder("jumps").memory("size=512M,max=512M").cmdline("shell").start();
    vm.expect("READY", 10);
    let before = guest_pages(&vm);
    assert!(vm.command("random 256M 128M count=500 seed=9", 20).starts_with("OK"));
    let jumps = guest_pages(&vm) - before;
    assert!((400..=600).contains(&jumps), "{jumps} pages for 500 touches");
    assert_eq!(pool_pages(&vm.show()), 0);
    for start in (16..144).step_by(16) {
        let before = guest_pages(&vm);
        assert!(vm.command(&format!("touch {start}M 2049K seed=3"), 20).starts_with("OK"));
        let pages = guest_pages(&vm) - before;
        assert!(pages <= (2 + 8) * MIB / PAGE, "{pages} pages for 513 touches");
    }
    guest_pages(&vm);
}

//! Charges are resident pages: after every step, whatever it is, the pages that are charged to a guest are the pages that
//! the host's page tables hold for it (invariant 4).

use ballast_tests::walk::{Swap, Walk, seed_or};
use ballast_tests::{TestVm, missing_on_host, number, resident_pages};

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
    let touched = ok("touch 16M 32M seed=3");
    assert_eq!(touched - ok("balloon report 16M 32M"), 32 * MIB / PAGE);
    assert_eq!(ok("touch 16M 32M seed=4"), touched);
    assert_eq!(ok("balloon report 16M 32M"), touched, "left alone");
    assert_eq!(ok("verify 16M 32M seed=4"), touched);
    let now = vm.show();
    let pages = ["reported", "reported_back", "reported_left"].map(|k| number(&now, &format!("faults.{k}_pages")));
    assert_eq!(pages, [32 * MIB / PAGE; 3]);
}

//! Free page reporting: buffers that are themselves the pages.

use balloon::{GuestFault, Progress, QueueKind, spec};

use crate::basic::balloon;
use crate::driver::*;

const PAGE: u64 = 4096;

/// As `page_reporting` of Linux does it: up to 32 blocks in one chain, all of them device-writable, in any order.
#[test]
fn blocks_are_merged_and_returned_with_one_interrupt() {
    let mut driver = Driver::new(64);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    let blocks: Vec<(u64, u32)> = (0..32).rev().map(|n| (0x20000 + 0x4000 * n, 0x4000)).collect();
    driver.report(0, &blocks);
    driver.report(40, &[(0xf0000, 0x1000)]);
    let out = balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.pages, out.ranges, out.faults), (2, 129, 2, 0));
    assert!(out.needs_interrupt && out.progress == Progress::Drained);
    assert_eq!(pages.reported, [[range(0x20, 128), range(0xf0, 1)]]);
    assert!(pages.inflated.is_empty() && pages.deflated.is_empty());
    assert_eq!(driver.used(), [0, 40]);
    assert_eq!((balloon.counters().reported_pages, balloon.counters().inflated_pages), (129, 0));
}

/// With poison the guest finds its own pattern in a page that it takes back, so nothing may be discarded; it gets
/// its buffers back all the same.
#[test]
fn a_guest_that_poisons_its_pages_keeps_them() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    balloon.write_config(spec::CONFIG_POISON_VAL, &0xaaaa_aaaau32.to_le_bytes());
    driver.report(0, &[(0x20000, 0x4000)]);
    let out = balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.faults, out.needs_interrupt), (1, 0, true));
    assert_eq!((pages.reported.len(), balloon.counters().poisoned_pages), (0, 4));

    // Zeroes are what a discarded page holds (`init_on_free`).
    balloon.write_config(spec::CONFIG_POISON_VAL, &0u32.to_le_bytes());
    driver.report(1, &[(0x20000, 0x4000)]);
    balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((pages.reported.len(), balloon.counters().reported_pages), (1, 4));
    assert_eq!(balloon.counters().faults.total(), 0);

    // The next driver begins without.
    balloon.write_config(spec::CONFIG_POISON_VAL, &1u32.to_le_bytes());
    balloon.reset();
    driver.report(2, &[(0x20000, 0x4000)]);
    balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!(pages.reported.len(), 2);
}

#[test]
fn reports_that_cannot_be_dealt_with_stay_available() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary { refuse: 1, ..Diary::default() });
    driver.report(0, &[(0x20000, 0x1000)]);
    let out = balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.progress, out.chains, driver.used_index()), (Progress::Blocked, 0, 0));
    driver.mem.blocked.borrow_mut().push(USED..USED + 4);
    let out = balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.progress, out.chains), (Progress::Blocked, 0));
    driver.mem.blocked.borrow_mut().clear();
    let out = balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.progress, out.chains), (Progress::Drained, 1));
    assert_eq!(pages.reported, [[range(0x20, 1)]], "once: by now the guest may have written to it");
}

/// One bad range among good ones: nothing of its chain is touched, the other chains are served, all are returned.
fn bad_report(fault: GuestFault, prepare: impl FnOnce(&Driver)) {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.report(0, &[(0xa000, 0x1000)]);
    driver.describe(1, 0x42000, 0x1000, NEXT | WRITE, 2);
    prepare(&driver);
    driver.offer(1);
    driver.report(7, &[(0x14000, 0x1000)]);
    let out = balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.faults, out.progress), (3, 1, Progress::Drained), "{fault:?}");
    assert_eq!(balloon.counters().faults.get(fault), 1, "{fault:?}: {:?}", balloon.counters().faults);
    assert_eq!(pages.reported, [[range(10, 1), range(20, 1)]], "{fault:?}");
    assert_eq!(driver.used(), [0, 1, 7]);
}

#[test]
fn bad_reports_are_counted_and_returned() {
    bad_report(GuestFault::NotPages, |d| d.describe(2, 0x44000, 0, WRITE, 0));
    bad_report(GuestFault::NotPages, |d| d.describe(2, 0x44800, 0x1000, WRITE, 0));
    bad_report(GuestFault::NotPages, |d| d.describe(2, 0x44000, 0x1001, WRITE, 0));
    bad_report(GuestFault::NotPages, |d| d.describe(2, 0x44000, u32::MAX, WRITE, 0));
    bad_report(GuestFault::NotRam, |d| d.describe(2, MEMORY, 0x1000, WRITE, 0));
    bad_report(GuestFault::NotRam, |d| d.describe(2, MEMORY - PAGE, 0x2000, WRITE, 0));
    bad_report(GuestFault::NotRam, |d| d.describe(2, 0x44000, 0xffff_f000, WRITE, 0));
    bad_report(GuestFault::NotRam, |d| d.describe(2, u64::MAX - 0xfff, 0x1000, WRITE, 0));
    bad_report(GuestFault::NotRam, |d| d.describe(2, u64::MAX - 0xfff, 0xffff_f000, WRITE, 0));
    bad_report(GuestFault::Readable, |d| d.describe(2, 0x44000, 0x1000, 0, 0));
    bad_report(GuestFault::Indirect, |d| d.describe(2, 0x44000, 0x1000, WRITE | INDIRECT, 0));
    bad_report(GuestFault::DescriptorIndex, |d| d.describe(2, 0x44000, 0x1000, WRITE | NEXT, 8));
    bad_report(GuestFault::Loop, |d| d.describe(2, 0x44000, 0x1000, WRITE | NEXT, 1));
    bad_report(GuestFault::Loop, |d| d.describe(2, 0x44000, 0x1000, WRITE | NEXT, 2));
}

#[test]
fn pages_that_are_there_twice_are_handed_on_once() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.report(0, &[(0x20000, 0x4000), (0x22000, 0x4000), (0x20000, 0x4000)]);
    let out = balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.pages, out.duplicates), (6, 6));
    assert_eq!(pages.reported, [[range(0x20, 6)]]);
}

/// The lock is held for one batch, so a chain cannot make the device discard for as long as it likes.
#[test]
fn a_chain_of_more_pages_than_a_batch_holds_is_cut() {
    let mut driver = Driver::new(512);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    let all = u32::try_from(MEMORY).unwrap();
    driver.report(0, &[(0, all); 300]);
    driver.report(400, &[(0x20000, 0x1000)]);
    let out = balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.faults, out.progress), (1, 1, Progress::More));
    assert_eq!(balloon.counters().faults.get(GuestFault::Oversized), 1);
    assert_eq!(out.pages + out.duplicates, spec::MAX_CHAIN_REPORTED);
    let out = balloon.process(QueueKind::Reporting, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.pages, out.progress), (1, 1, Progress::Drained));
}

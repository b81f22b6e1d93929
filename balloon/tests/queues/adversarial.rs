//! A guest that breaks every rule: bounded work, counted faults, no panic, and a device that goes on.

use balloon::{GuestFault, Progress, QueueKind, StatsRequest, spec};
use proptest::prelude::*;

use crate::basic::balloon;
use crate::driver::*;

/// One bad chain between two good ones: the good ones are served, the bad one is returned, its pages are left alone.
fn bad_chain(fault: GuestFault, prepare: impl FnOnce(&Driver)) {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.send(0, &[10]);
    driver.write_pfns(BUFFERS + 0x8000, &[66, 77]);
    prepare(&driver);
    driver.offer(1);
    driver.send(7, &[20]);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.faults, out.progress), (3, 1, Progress::Drained), "{fault:?}");
    assert_eq!(balloon.counters().faults.get(fault), 1, "{fault:?}: {:?}", balloon.counters().faults);
    assert_eq!(pages.inflated, [[range(10, 1), range(20, 1)]]);
    assert_eq!(driver.used(), [0, 1, 7]);
}

#[test]
fn bad_chains_are_counted_and_returned() {
    let buffer = BUFFERS + 0x8000;
    bad_chain(GuestFault::Loop, |d| d.describe(1, buffer, 4, NEXT, 1));
    bad_chain(GuestFault::Loop, |d| {
        d.describe(1, buffer, 4, NEXT, 2);
        d.describe(2, buffer, 4, NEXT, 1);
    });
    bad_chain(GuestFault::DescriptorIndex, |d| d.describe(1, buffer, 4, NEXT, 8));
    bad_chain(GuestFault::DescriptorIndex, |d| d.describe(1, buffer, 4, NEXT, u16::MAX));
    bad_chain(GuestFault::Indirect, |d| d.describe(1, buffer, 16, INDIRECT, 0));
    bad_chain(GuestFault::Writable, |d| d.describe(1, buffer, 4, WRITE, 0));
    bad_chain(GuestFault::Writable, |d| {
        d.describe(1, buffer, 4, NEXT, 2);
        d.describe(2, buffer, 4, WRITE, 0);
    });
    bad_chain(GuestFault::NotRam, |d| d.describe(1, MEMORY, 4, 0, 0));
    bad_chain(GuestFault::NotRam, |d| d.describe(1, MEMORY - 2, 4, 0, 0));
    bad_chain(GuestFault::NotRam, |d| d.describe(1, u64::MAX - 1, 4, 0, 0));
    bad_chain(GuestFault::NotRam, |d| d.describe(1, u64::MAX, u32::MAX, 0, 0));
}

#[test]
fn odd_bytes_are_dropped() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.write_pfns(BUFFERS, &[3, 4]);
    driver.describe(0, BUFFERS, 7, 0, 0);
    driver.offer(0);
    balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!(pages.inflated, [[range(3, 1)]]);
    assert_eq!(balloon.counters().faults.get(GuestFault::Ragged), 1);
}

/// A length is an allegation: nothing is read for none, and no more than a chain may hold for 4 GiB.
#[test]
fn lengths_of_nothing_and_of_four_gibibytes_are_bounded() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.describe(0, BUFFERS, 0, NEXT, 1);
    driver.describe(1, u64::MAX, 0, 0, 0);
    driver.offer(0);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.pages, out.faults), (1, 0, 0));
    driver.write_pfns(BUFFERS, &(0..spec::MAX_CHAIN_PFNS as u32).collect::<Vec<_>>());
    driver.describe(2, BUFFERS, u32::MAX, NEXT, 3);
    driver.describe(3, BUFFERS, u32::MAX, 0, 0);
    driver.offer(2);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.pages, out.duplicates), (1, spec::MAX_CHAIN_PFNS as u64, 0));
    assert_eq!(balloon.counters().faults.get(GuestFault::Oversized), 1);
    // Where it begins decides whether it is RAM.
    driver.describe(4, MEMORY - 4, u32::MAX, 0, 0);
    driver.offer(4);
    balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!(balloon.counters().faults.get(GuestFault::NotRam), 1);
    assert_eq!((pages.inflated.len(), driver.used()), (1, vec![0, 2, 4]));
}

/// Page numbers are handed on as they are, each once in a batch: what is RAM, and what has been given before, is for the
/// owner of the pages to know.
#[test]
fn numbers_outside_of_ram_and_numbers_given_before_are_handed_on_once_a_batch() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.send(0, &[u32::MAX, 7, 7, u32::MAX, 0x0010_0000]);
    driver.send(1, &[7]);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.pages, out.duplicates, out.faults), (3, 3, 0));
    driver.send(2, &[7]);
    balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    let outside = [range(0x0010_0000, 1), range(u64::from(u32::MAX), 1)];
    assert_eq!(pages.inflated, [vec![range(7, 1), outside[0], outside[1]], vec![range(7, 1)]]);
}

#[test]
fn a_head_outside_the_table_is_passed_over() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.offer(8);
    driver.offer(u16::MAX);
    driver.send(0, &[1]);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.faults), (1, 2));
    assert_eq!(balloon.counters().faults.get(GuestFault::DescriptorIndex), 2);
}

#[test]
fn an_index_too_far_ahead_does_nothing_until_it_is_sane() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.send(0, &[1]);
    for index in [9, 0x8000, u16::MAX] {
        driver.set_avail(index);
        let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
        assert_eq!((out.chains, out.faults, out.progress), (0, 1, Progress::Drained));
        let stats = balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);
        assert_eq!((stats.faults, stats.progress), (1, Progress::Drained));
    }
    assert_eq!(balloon.counters().faults.get(GuestFault::AvailIndex), 6);
    driver.set_avail(1);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!(out.chains, 1);
}

#[test]
fn statistics_buffers_are_bounded_and_bad_ones_are_held() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.describe(0, BUFFERS, 0, 0, 0);
    driver.offer(0);
    // A second buffer must not make the device give the first one back unasked.
    driver.describe(1, BUFFERS, u32::MAX, 0, 0);
    driver.offer(1);
    for _ in 0..3 {
        balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);
        assert_eq!(driver.used_index(), 0);
    }
    assert!(matches!(balloon.request_stats(&mut queue, &driver.mem), StatsRequest::Sent { .. }));
    // 60 000 of them, a buffer as long as a guest likes.
    let many: Vec<(u16, u64)> = (0..60_000).map(|n| (n, u64::from(n))).collect();
    driver.write(BUFFERS, &stats(&many));
    balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);
    assert_eq!(balloon.counters().faults.get(GuestFault::Oversized), 1);
    assert_eq!(balloon.counters().stats_unknown_tags, spec::MAX_STATS as u64 - 16);

    assert!(matches!(balloon.request_stats(&mut queue, &driver.mem), StatsRequest::Sent { .. }));
    driver.describe(2, BUFFERS, 10, WRITE, 0);
    driver.offer(2);
    let out = balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.faults, out.new_stats), (1, false));
    assert!(matches!(balloon.request_stats(&mut queue, &driver.mem), StatsRequest::Sent { .. }));
    assert_eq!(driver.used(), [0, 1, 2]);
}

/// A descriptor: mostly plausible, so that the walk gets somewhere.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let addr = prop_oneof![4 => 0..MEMORY, 1 => any::<u64>()];
    let len = prop_oneof![4 => 0u32..64, 1 => 0u32..100_000, 1 => any::<u32>()];
    let flags = prop_oneof![3 => Just(NEXT), 3 => Just(0u16), 1 => any::<u16>()];
    let next = prop_oneof![4 => 0u16..16, 1 => any::<u16>()];
    let buffer = (addr, len, flags, next);
    // Pages, whole ones, for reports.
    let (first, count) = (0..MEMORY / 4096 + 1, prop_oneof![9 => 1u32..20, 1 => 0u32..1 << 20]);
    let flags = prop_oneof![Just(WRITE | NEXT), Just(WRITE)];
    let pages =
        (first, count, flags, 0u16..16).prop_map(|(first, n, flags, next)| (first * 4096, n * 4096, flags, next));
    prop_oneof![3 => buffer, 1 => pages]
}

proptest! {
    #[test]
    fn arbitrary_rings_are_survived(
        table in prop::collection::vec(descriptor(), 16),
        heads in prop::collection::vec(prop_oneof![6 => 0u16..16, 1 => any::<u16>()], 16),
        kicks in prop::collection::vec((prop_oneof![3 => 0u16..20, 1 => any::<u16>()], 0u8..5), 1..12),
    ) {
        let mut driver = Driver::new(16);
        let mut queue = driver.queue();
        let (mut balloon, mut pages) = (balloon(), Diary::default());
        for (i, &(addr, len, flags, next)) in table.iter().enumerate() {
            driver.describe(i as u16, addr, len, flags, next);
        }
        for (i, head) in heads.iter().enumerate() {
            driver.write(AVAIL + 4 + 2 * i as u64, &head.to_le_bytes());
        }
        for (index, what) in kicks {
            driver.set_avail(index);
            let before = driver.mem.accesses.get();
            let used = driver.used_index();
            let kind = match what {
                0 => QueueKind::Inflate,
                1 => QueueKind::Deflate,
                2 => QueueKind::Stats,
                3 => QueueKind::Reporting,
                _ => {
                    balloon.request_stats(&mut queue, &driver.mem);
                    continue;
                }
            };
            let out = balloon.process(kind, &mut queue, &driver.mem, &mut pages);
            prop_assert!(out.chains <= 16);
            prop_assert_eq!(driver.used_index().wrapping_sub(used), out.chains as u16);
            prop_assert_ne!(out.progress, Progress::Blocked);
            let most = match kind {
                QueueKind::Reporting => MEMORY / spec::PAGE_BYTES,
                _ => (spec::BATCH_PFNS - 1 + spec::MAX_CHAIN_PFNS) as u64,
            };
            prop_assert!(out.pages <= most);
            // Per chain: its head, two reads for each descriptor of the table, and two writes to the used ring.
            let accesses = driver.mem.accesses.get() - before;
            prop_assert!(accesses <= 2 + 16 * (1 + 2 * 16 + 2), "{} accesses", accesses);
        }
        prop_assert!(pages.reported.iter().flatten().all(|range| range.end() <= MEMORY / spec::PAGE_BYTES));
        for ranges in pages.inflated.iter().chain(&pages.deflated).chain(&pages.reported) {
            prop_assert!(!ranges.is_empty());
            prop_assert!(ranges.windows(2).all(|w| w[0].end() < w[1].first));
        }
    }
}

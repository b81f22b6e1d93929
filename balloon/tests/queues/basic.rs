//! What a well-behaved driver sees.

use balloon::{Balloon, GuestFault, Options, Processed, Progress, QueueKind, StatTag, StatsRequest, spec};
use virtio_queue::Queue;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::driver::*;

pub fn balloon() -> Balloon {
    Balloon::new((MEMORY / 4096) as u32, Options { stats: true, deflate_on_oom: true, reporting: true })
}

#[test]
fn one_batch_is_merged_and_returned_with_one_interrupt() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.send(0, &[30, 29, 28]);
    driver.send(1, &[5, 31, 29]);
    driver.send(2, &[7]);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    let expected = Processed {
        chains: 3,
        pages: 6,
        ranges: 3,
        duplicates: 1,
        needs_interrupt: true,
        progress: Progress::Drained,
        ..Processed::default()
    };
    assert_eq!(out, expected);
    assert_eq!(pages.inflated, [[range(5, 1), range(7, 1), range(28, 4)]]);
    assert_eq!(driver.used(), [0, 1, 2]);
    assert_eq!((balloon.counters().inflated_pages, balloon.counters().deflated_pages), (6, 0));

    let idle = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!(idle, Processed::default());

    driver.send(3, &[28, 29]);
    balloon.process(QueueKind::Deflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!(pages.deflated, [[range(28, 2)]]);
    assert_eq!(driver.used(), [0, 1, 2, 3]);
    assert_eq!(balloon.counters().deflated_pages, 2);
}

#[test]
fn page_numbers_may_be_spread_over_descriptors() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.write_pfns(BUFFERS, &[1, 2, 0x0102_0304]);
    driver.describe(4, BUFFERS, 6, NEXT, 2);
    driver.describe(2, BUFFERS, 0, NEXT, 1);
    driver.describe(1, BUFFERS + 6, 6, 0, 7);
    driver.offer(4);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.faults, out.chains), (0, 1));
    assert_eq!(pages.inflated, [[range(1, 2), range(0x0102_0304, 1)]]);
    assert_eq!(driver.used(), [4]);
}

/// The same against the mock driver of virtio-queue.
#[test]
fn the_mock_driver_is_served() {
    let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
    let mock = MockSplitQueue::new(&mem, 16);
    mem.write_slice(&77u32.to_le_bytes(), GuestAddress(BUFFERS)).unwrap();
    mock.add_desc_chains(&[RawDescriptor::from(Descriptor::new(BUFFERS, 4, 0, 0))], 0).unwrap();
    let mut queue: Queue = mock.create_queue().unwrap();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    let out = balloon.process(QueueKind::Inflate, &mut queue, &mem, &mut pages);
    assert_eq!((out.chains, out.needs_interrupt), (1, true));
    assert_eq!(pages.inflated, [[range(77, 1)]]);
    assert_eq!(mock.used().idx().load(), 1);
}

#[test]
fn a_full_ring_is_done_in_batches_over_the_end_of_the_ring() {
    let mut driver = Driver::new(128);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    let mut returned = 0;
    for round in 0..5 {
        for head in 0..128 {
            driver.send(head, &[1000 * round + u32::from(head)]);
        }
        let mut calls = 0;
        loop {
            let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
            assert!(out.chains as usize <= spec::BATCH_CHAINS);
            returned += out.chains;
            calls += 1;
            if out.progress == Progress::Drained {
                break;
            }
            assert_eq!(out.progress, Progress::More);
        }
        assert_eq!(calls, 128 / spec::BATCH_CHAINS);
        assert_eq!(driver.used(), (0..128).collect::<Vec<_>>());
    }
    assert_eq!(returned, 5 * 128);
    assert_eq!(balloon.counters().inflated_pages, 5 * 128);
}

#[test]
fn a_long_buffer_ends_a_batch() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    let pfns: Vec<u32> = (0..spec::MAX_CHAIN_PFNS as u32 + 3).map(|n| 2 * n).collect();
    driver.write_pfns(BUFFERS, &pfns);
    driver.describe(0, BUFFERS, 4 * pfns.len() as u32, 0, 0);
    driver.describe(1, BUFFERS, 4, 0, 0);
    driver.offer(0);
    driver.offer(1);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.faults, out.progress), (1, 1, Progress::More));
    assert_eq!(out.pages, spec::MAX_CHAIN_PFNS as u64);
    assert_eq!(balloon.counters().faults.get(GuestFault::Oversized), 1);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.chains, out.pages, out.progress), (1, 1, Progress::Drained));
}

#[test]
fn statistics_are_asked_for_and_only_then_believed() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    assert_eq!(balloon.request_stats(&mut queue, &driver.mem), StatsRequest::NoBuffer);

    // The first buffer is the driver's invitation to ask.
    let first = stats(&[(0, 0), (4, 0)]);
    driver.write(BUFFERS, &first);
    driver.describe(3, BUFFERS, first.len() as u32, 0, 0);
    driver.offer(3);
    let out = balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);
    assert_eq!(out, Processed::default());
    assert_eq!((balloon.stats(), driver.used()), (None, vec![]));

    let sent = StatsRequest::Sent { needs_interrupt: true };
    assert_eq!(balloon.request_stats(&mut queue, &driver.mem), sent);
    assert_eq!(driver.used(), [3]);
    assert_eq!(balloon.request_stats(&mut queue, &driver.mem), StatsRequest::NoBuffer);

    let set = stats(&[(4, 1 << 20), (5, 8 << 20), (99, 1)]);
    driver.write(BUFFERS, &set);
    driver.describe(3, BUFFERS, set.len() as u32, 0, 0);
    driver.offer(3);
    let out = balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);
    assert!(out.new_stats && !out.needs_interrupt && out.faults == 0);
    let got: Vec<_> = balloon.stats().unwrap().iter().collect();
    assert_eq!(got, [(StatTag::FreeMemory, 1 << 20), (StatTag::TotalMemory, 8 << 20)]);
    assert_eq!((balloon.counters().stats_received, balloon.counters().stats_unknown_tags), (1, 1));
    assert_eq!(driver.used(), [3], "the buffer stays with the device");
    assert_eq!(balloon.request_stats(&mut queue, &driver.mem), sent);
    assert_eq!(driver.used(), [3, 3]);
}

#[test]
fn a_reset_forgets_the_queues_and_keeps_target_counters_and_statistics() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    assert!(balloon.set_target(40));
    balloon.write_config(spec::CONFIG_ACTUAL, &30u32.to_le_bytes());
    driver.send(0, &[]);
    balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);
    balloon.reset();
    assert_eq!((balloon.target(), balloon.actual()), (40, 0));
    assert_eq!(balloon.request_stats(&mut driver.queue(), &driver.mem), StatsRequest::NoBuffer);
}

#[test]
fn a_queue_that_is_not_ready_is_left_alone() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.send(0, &[1]);
    virtio_queue::QueueT::set_ready(&mut queue, false);
    for kind in [QueueKind::Inflate, QueueKind::Deflate, QueueKind::Stats, QueueKind::Reporting] {
        assert_eq!(balloon.process(kind, &mut queue, &driver.mem, &mut pages), Processed::default());
    }
    assert_eq!(balloon.request_stats(&mut queue, &driver.mem), StatsRequest::NoBuffer);
    assert_eq!(driver.mem.accesses.get(), 0);
}

//! Memory or pages are not to be had at the moment: nothing is lost, repeated too late, or returned too early.

use std::collections::BTreeSet;

use balloon::{Balloon, Progress, QueueKind, StatTag, StatsRequest};
use proptest::prelude::*;
use virtio_queue::QueueT;

use crate::basic::balloon;
use crate::driver::*;

#[test]
fn a_batch_that_cannot_be_discarded_stays_available() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary { refuse: 2, ..Diary::default() });
    driver.send(0, &[1]);
    driver.describe(1, BUFFERS, 4, WRITE, 0);
    driver.offer(1);
    for _ in 0..2 {
        let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
        assert_eq!((out.progress, out.chains, out.faults, out.needs_interrupt), (Progress::Blocked, 0, 0, false));
        assert_eq!((queue.next_avail(), driver.used_index()), (0, 0));
    }
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.progress, out.chains, out.faults), (Progress::Drained, 2, 1));
    assert_eq!(pages.inflated, [[range(1, 1)]]);
    assert_eq!((balloon.counters().blocked, balloon.counters().faults.total()), (2, 1));
}

#[test]
fn what_was_read_before_the_refusal_is_done() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.send(0, &[1]);
    driver.send(1, &[2]);
    driver.send(2, &[3]);
    let second = BUFFERS + 0x400;
    driver.mem.blocked.borrow_mut().push(second..second + 4);
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.progress, out.chains, out.needs_interrupt), (Progress::Blocked, 1, true));
    assert_eq!(driver.used(), [0]);
    driver.mem.blocked.borrow_mut().clear();
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.progress, out.chains), (Progress::Drained, 2));
    assert_eq!(pages.inflated, [[range(1, 1)], [range(2, 2)]]);
    assert_eq!(driver.used(), [0, 1, 2]);
}

#[test]
fn pages_are_not_discarded_again_while_the_used_ring_is_refused() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    driver.send(0, &[1]);
    driver.mem.blocked.borrow_mut().push(USED..USED + 4);
    for _ in 0..3 {
        let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
        assert_eq!((out.progress, out.chains), (Progress::Blocked, 0));
    }
    assert_eq!(pages.inflated.len(), 1);
    driver.mem.blocked.borrow_mut().clear();
    let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
    assert_eq!((out.progress, out.chains, out.needs_interrupt), (Progress::Drained, 1, true));
    assert_eq!((pages.inflated.len(), driver.used()), (1, vec![0]));
}

#[test]
fn statistics_wait_too() {
    let mut driver = Driver::new(8);
    let mut queue = driver.queue();
    let (mut balloon, mut pages) = (balloon(), Diary::default());
    let set = stats(&[(4, 17)]);
    driver.write(BUFFERS, &set);
    driver.describe(0, BUFFERS, set.len() as u32, 0, 0);
    driver.offer(0);
    driver.mem.blocked.borrow_mut().push(BUFFERS..BUFFERS + 1);
    let out = balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);
    assert_eq!(out.progress, Progress::Blocked);
    driver.mem.blocked.borrow_mut().clear();
    balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);

    driver.mem.blocked.borrow_mut().push(USED..USED + 4);
    assert_eq!(balloon.request_stats(&mut queue, &driver.mem), StatsRequest::Blocked);
    driver.mem.blocked.borrow_mut().clear();
    assert!(matches!(balloon.request_stats(&mut queue, &driver.mem), StatsRequest::Sent { .. }));
    driver.offer(0);
    balloon.process(QueueKind::Stats, &mut queue, &driver.mem, &mut pages);
    assert_eq!(balloon.stats().unwrap().get(StatTag::FreeMemory), Some(17));
}

/// Every page number belongs to one chain: `1000 * head + n`.
fn send_all(driver: &mut Driver, lengths: &[u32]) -> BTreeSet<u64> {
    for (head, &len) in lengths.iter().enumerate() {
        let pfns: Vec<u32> = (0..len).map(|n| 1000 * head as u32 + n).collect();
        driver.send(head as u16, &pfns);
    }
    let numbers = |(head, &len): (usize, &u32)| (0..u64::from(len)).map(move |n| 1000 * head as u64 + n);
    lengths.iter().enumerate().flat_map(numbers).collect()
}

/// Discards, and checks that the guest has none of these pages' buffers back.
struct Strict<'a> {
    driver: &'a Driver,
    discarded: &'a mut BTreeSet<u64>,
    refuse: bool,
}

impl balloon::GuestPages for Strict<'_> {
    fn inflate(&mut self, ranges: &[balloon::PageRange]) -> Result<(), balloon::WouldBlock> {
        let used = self.driver.used();
        for page in ranges.iter().flat_map(|r| r.first..r.end()) {
            assert!(!used.contains(&((page / 1000) as u16)), "page {page} is the guest's again");
            // A part may be done before a refusal.
            self.discarded.insert(page);
        }
        if self.refuse { Err(balloon::WouldBlock) } else { Ok(()) }
    }

    fn deflate(&mut self, _: &[balloon::PageRange]) -> Result<(), balloon::WouldBlock> {
        unreachable!("only inflating here")
    }

    fn report(&mut self, _: &[balloon::PageRange]) -> Result<(), balloon::WouldBlock> {
        unreachable!("only inflating here")
    }
}

fn returned_chains_are_discarded(driver: &Driver, lengths: &[u32], discarded: &BTreeSet<u64>) {
    for head in driver.used() {
        for n in 0..lengths[usize::from(head)] {
            assert!(discarded.contains(&(1000 * u64::from(head) + u64::from(n))), "chain {head} came back too early");
        }
    }
}

proptest! {
    /// Wherever a refusal falls, every chain is returned once, after its pages were discarded and never before.
    #[test]
    fn refusals_lose_nothing(
        lengths in prop::collection::vec(0u32..200, 1..50),
        refusals in prop::collection::vec((0u32..60, any::<bool>()), 0..40),
    ) {
        let mut driver = Driver::new(64);
        let mut queue = driver.queue();
        let mut balloon: Balloon = balloon();
        let sent = send_all(&mut driver, &lengths);
        let mut discarded = BTreeSet::new();
        let mut chains = 0;
        for (after, refuse) in refusals {
            driver.mem.accesses_until_refusal.set(Some(after));
            let mut pages = Strict { driver: &driver, discarded: &mut discarded, refuse };
            chains += balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages).chains;
            returned_chains_are_discarded(&driver, &lengths, &discarded);
        }
        driver.mem.accesses_until_refusal.set(None);
        loop {
            let mut pages = Strict { driver: &driver, discarded: &mut discarded, refuse: false };
            let out = balloon.process(QueueKind::Inflate, &mut queue, &driver.mem, &mut pages);
            chains += out.chains;
            prop_assert_ne!(out.progress, Progress::Blocked);
            if out.progress == Progress::Drained {
                break;
            }
        }
        prop_assert_eq!(&discarded, &sent);
        prop_assert_eq!(chains as usize, lengths.len());
        prop_assert_eq!(driver.used(), (0..lengths.len() as u16).collect::<Vec<_>>());
        prop_assert_eq!(balloon.counters().inflated_pages, sent.len() as u64);
        prop_assert_eq!(balloon.counters().faults.total(), 0);
    }
}

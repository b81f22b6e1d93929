//! The inflate, the deflate and the reporting queue: batches of pages.
//!
//! ```text
//!   available ring ──pop──►    pages     ──merge──► ranges ──GuestPages──► done ──► used ring ──► one interrupt
//!          ▲                     │                              │            ▲
//!          └──── put back ◄──────┴────────── WouldBlock ◄───────┘            └ kept here while the used ring is blocked
//! ```
//! A chain is in exactly one place: available, `done`, or used. It enters `done` only when its pages have been dealt
//! with, so that a repeated attempt never discards pages that the guest has back.
//!
//! Pages to inflate and deflate are written down as numbers in a buffer; pages that are reported *are* the buffer.

use std::collections::VecDeque;

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

use crate::chain::{self, Refused};
use crate::counters::{Counters, GuestFault, GuestFaults};
use crate::pages::WouldBlock;
use crate::ranges::{PageRange, merge, unite};
use crate::spec;

/// Whether a queue needs another look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Progress {
    /// Nothing is left; the guest notifies when there is more.
    #[default]
    Drained,
    /// There is more, but this call did its share: call again when others have had their turn.
    More,
    /// Something was not to be had at the moment. What is left stays in the queue until the caller tries again.
    Blocked,
}

/// What one call did to one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Processed {
    /// Chains returned to the guest.
    pub chains: u32,
    /// Distinct pages in the batch that was inflated, deflated or reported.
    pub pages: u64,
    /// Ranges that they made up.
    pub ranges: u64,
    /// Pages that were in the batch already.
    pub duplicates: u64,
    /// Things that the guest did wrong.
    pub faults: u64,
    /// Whether a new set of statistics has come in.
    pub new_stats: bool,
    /// Whether the guest has to be interrupted for this queue.
    pub needs_interrupt: bool,
    /// Whether there is more to do.
    pub progress: Progress,
}

/// How a chain says which pages it is about.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Content {
    /// Their numbers are in its buffers.
    #[default]
    Numbers,
    /// They are its buffers.
    Pages,
}

/// The device's side of an inflate, a deflate or a reporting queue.
#[derive(Debug, Default)]
pub(crate) struct PageQueue {
    content: Content,
    /// Heads of chains whose pages are dealt with and that are not in the used ring yet.
    done: VecDeque<u16>,
    // Kept from batch to batch for their capacity.
    heads: Vec<u16>,
    bytes: Vec<u8>,
    pfns: Vec<u32>,
    ranges: Vec<PageRange>,
    /// Pages in the ranges of this batch, those that are there twice counted twice.
    reported: u64,
}

impl PageQueue {
    /// A queue whose chains are of this kind.
    pub fn new(content: Content) -> Self {
        PageQueue { content, ..PageQueue::default() }
    }

    /// Forgets everything, as after a reset.
    pub fn reset(&mut self) {
        *self = PageQueue::new(self.content);
    }

    /// Handles at most one batch with `handle`, which is one of the calls of `GuestPages`.
    pub fn process<M: GuestMemory>(
        &mut self,
        queue: &mut Queue,
        mem: &M,
        counters: &mut Counters,
        handle: impl FnOnce(&[PageRange]) -> Result<(), WouldBlock>,
    ) -> Processed {
        let mut out = Processed::default();
        let mut faults = GuestFaults::default();
        out.progress = self
            .return_done(queue, mem, &mut out, &mut faults)
            .and_then(|()| self.batch(queue, mem, &mut out, &mut faults, handle))
            .unwrap_or(Progress::Blocked);
        if out.chains > 0 {
            // An interrupt too many does no harm, so an unreadable ring means yes.
            out.needs_interrupt = queue.needs_notification(mem).unwrap_or(true);
        }
        out.faults = faults.total();
        counters.faults.add(&faults);
        counters.chains += u64::from(out.chains);
        counters.ranges += out.ranges;
        counters.duplicates += out.duplicates;
        counters.batches += u64::from(out.ranges > 0);
        counters.blocked += u64::from(out.progress == Progress::Blocked);
        out
    }

    fn batch<M: GuestMemory>(
        &mut self,
        queue: &mut Queue,
        mem: &M,
        out: &mut Processed,
        faults: &mut GuestFaults,
        handle: impl FnOnce(&[PageRange]) -> Result<(), WouldBlock>,
    ) -> Result<Progress, WouldBlock> {
        let before = queue.next_avail();
        // Faults of a batch that is put back are not counted: they will be met again.
        let mut seen = GuestFaults::default();
        let gathered = self.gather(queue, mem, &mut seen);
        let duplicates = match self.content {
            Content::Numbers => merge(&mut self.pfns, &mut self.ranges),
            Content::Pages => unite(&mut self.ranges),
        };
        if !self.ranges.is_empty() {
            if let Err(blocked) = handle(&self.ranges) {
                queue.set_next_avail(before);
                return Err(blocked);
            }
            out.duplicates = duplicates;
            out.ranges = self.ranges.len() as u64;
            out.pages = self.ranges.iter().map(|range| range.pages).sum();
        }
        faults.add(&seen);
        self.done.extend(self.heads.drain(..));
        self.return_done(queue, mem, out, faults)?;
        gathered
    }

    /// Takes chains and their pages until the batch is full, the ring is empty, or something is refused.
    fn gather<M: GuestMemory>(
        &mut self,
        queue: &mut Queue,
        mem: &M,
        faults: &mut GuestFaults,
    ) -> Result<Progress, WouldBlock> {
        self.heads.clear();
        self.pfns.clear();
        self.ranges.clear();
        self.reported = 0;
        let mut left = match chain::available(queue, mem) {
            Ok(left) => left,
            Err(Refused::Blocked) => return Err(WouldBlock),
            Err(Refused::Fault(fault)) => {
                faults.count(fault);
                return Ok(Progress::Drained);
            }
        };
        while left > 0 {
            if self.is_full() {
                return Ok(Progress::More);
            }
            left -= 1;
            let position = queue.next_avail();
            let head = match chain::pop(queue, mem) {
                Ok(head) => head,
                Err(Refused::Blocked) => return Err(WouldBlock),
                Err(Refused::Fault(fault)) => {
                    // No chain that could be returned: a driver that does this has lost the entry.
                    faults.count(fault);
                    continue;
                }
            };
            let mut seen = GuestFaults::default();
            match self.take(queue, mem, head, &mut seen) {
                Ok(()) => {}
                Err(Refused::Blocked) => {
                    queue.set_next_avail(position);
                    return Err(WouldBlock);
                }
                // None of a bad chain's pages are touched, but its buffer goes back.
                Err(Refused::Fault(fault)) => seen.count(fault),
            }
            faults.add(&seen);
            self.heads.push(head);
        }
        Ok(Progress::Drained)
    }

    /// The batch takes no further chain.
    fn is_full(&self) -> bool {
        self.heads.len() >= spec::BATCH_CHAINS
            || self.pfns.len() >= spec::BATCH_PFNS
            || self.reported >= spec::BATCH_REPORTED
    }

    /// Adds the pages of one chain to the batch: all, or on an error none.
    fn take<M: GuestMemory>(
        &mut self,
        queue: &Queue,
        mem: &M,
        head: u16,
        faults: &mut GuestFaults,
    ) -> Result<(), Refused> {
        match self.content {
            Content::Numbers => {
                self.bytes.clear();
                let limit = spec::MAX_CHAIN_PFNS * spec::PFN_BYTES;
                chain::read(queue, mem, head, limit, &mut self.bytes, faults)?;
                let (pfns, rest) = self.bytes.as_chunks::<{ spec::PFN_BYTES }>();
                if !rest.is_empty() {
                    faults.count(GuestFault::Ragged);
                }
                self.pfns.extend(pfns.iter().map(|pfn| u32::from_le_bytes(*pfn)));
            }
            Content::Pages => {
                let before = self.ranges.len();
                let taken = chain::reported(queue, mem, head, spec::MAX_CHAIN_REPORTED, &mut self.ranges, faults);
                if taken.is_err() {
                    self.ranges.truncate(before);
                }
                self.reported += self.ranges[before..].iter().map(|range| range.pages).sum::<u64>();
                taken?;
            }
        }
        Ok(())
    }

    fn return_done<M: GuestMemory>(
        &mut self,
        queue: &mut Queue,
        mem: &M,
        out: &mut Processed,
        faults: &mut GuestFaults,
    ) -> Result<(), WouldBlock> {
        while let Some(&head) = self.done.front() {
            match chain::give_back(queue, mem, head) {
                Ok(()) => out.chains += 1,
                Err(Refused::Blocked) => return Err(WouldBlock),
                Err(Refused::Fault(fault)) => faults.count(fault),
            }
            self.done.pop_front();
        }
        Ok(())
    }
}

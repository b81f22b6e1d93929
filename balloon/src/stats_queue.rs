//! The statistics queue: one buffer, driven by the device.
//!
//! The driver makes a buffer available once; the device holds it and returns it to ask for a new set; the driver fills
//! it and makes it available again. The first buffer was never asked for and is empty by the specification: nothing
//! in it is believed. Buffers beyond the one that is held stay in the ring.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

use crate::chain::{self, Refused};
use crate::counters::{Counters, GuestFaults};
use crate::page_queue::{Processed, Progress};
use crate::spec;
use crate::stats::GuestStats;

/// What became of a request for statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatsRequest {
    /// The buffer went back to the guest; interrupt it if `needs_interrupt`.
    Sent {
        /// Whether the guest has to be interrupted.
        needs_interrupt: bool,
    },
    /// The device has no buffer: the guest has not answered the last request, or has no statistics queue.
    NoBuffer,
    /// Not possible at the moment; try again later.
    Blocked,
}

/// The device's side of the statistics queue.
#[derive(Debug, Default)]
pub(crate) struct StatsQueue {
    held: Option<u16>,
    requested: bool,
    bytes: Vec<u8>,
}

impl StatsQueue {
    /// Forgets everything, as after a reset.
    pub fn reset(&mut self) {
        *self = StatsQueue::default();
    }

    /// Takes the guest's buffer, if none is held, and returns the set it holds, if one was asked for.
    pub fn process<M: GuestMemory>(
        &mut self,
        queue: &mut Queue,
        mem: &M,
        counters: &mut Counters,
    ) -> (Processed, Option<GuestStats>) {
        let mut faults = GuestFaults::default();
        let mut out = Processed::default();
        let mut stats = None;
        match self.take(queue, mem, &mut faults) {
            Ok(true) if self.requested => {
                let (set, unknown) = GuestStats::parse(&self.bytes, &mut faults);
                self.requested = false;
                counters.stats_received += 1;
                counters.stats_unknown_tags += unknown;
                out.new_stats = true;
                stats = Some(set);
            }
            Ok(_) => {}
            Err(Refused::Fault(fault)) => faults.count(fault),
            Err(Refused::Blocked) => {
                out.progress = Progress::Blocked;
                counters.blocked += 1;
            }
        }
        out.faults = faults.total();
        counters.faults.add(&faults);
        (out, stats)
    }

    /// Returns the held buffer to the guest, which asks it for a new set.
    pub fn request<M: GuestMemory>(&mut self, queue: &mut Queue, mem: &M, counters: &mut Counters) -> StatsRequest {
        let Some(head) = self.held else {
            return StatsRequest::NoBuffer;
        };
        match chain::give_back(queue, mem, head) {
            Ok(()) => {
                self.held = None;
                self.requested = true;
                counters.chains += 1;
                StatsRequest::Sent { needs_interrupt: queue.needs_notification(mem).unwrap_or(true) }
            }
            Err(Refused::Blocked) => {
                counters.blocked += 1;
                StatsRequest::Blocked
            }
            Err(Refused::Fault(fault)) => {
                self.held = None;
                counters.faults.count(fault);
                StatsRequest::NoBuffer
            }
        }
    }

    /// Reads the next available buffer into `bytes` and holds it. False if there is none to take.
    fn take<M: GuestMemory>(&mut self, queue: &mut Queue, mem: &M, faults: &mut GuestFaults) -> Result<bool, Refused> {
        let mut left = if self.held.is_some() { 0 } else { chain::available(queue, mem)? };
        while left > 0 {
            left -= 1;
            let position = queue.next_avail();
            let head = match chain::pop(queue, mem) {
                Ok(head) => head,
                Err(Refused::Blocked) => return Err(Refused::Blocked),
                Err(Refused::Fault(fault)) => {
                    faults.count(fault);
                    continue;
                }
            };
            self.bytes.clear();
            let limit = spec::MAX_STATS * spec::STAT_BYTES;
            let mut seen = GuestFaults::default();
            let read = chain::read(queue, mem, head, limit, &mut self.bytes, &mut seen);
            if read == Err(Refused::Blocked) {
                queue.set_next_avail(position);
                return Err(Refused::Blocked);
            }
            faults.add(&seen);
            // A bad buffer is held too: returning it is how the next set is asked for.
            self.held = Some(head);
            return read.map(|()| true);
        }
        Ok(false)
    }
}

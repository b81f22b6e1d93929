//! The device: configuration, queues and counters together.

use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory;

use crate::config::ConfigSpace;
use crate::counters::Counters;
use crate::features::{QueueKind, offered};
use crate::page_queue::{Content, PageQueue, Processed};
use crate::pages::GuestPages;
use crate::stats::GuestStats;
use crate::stats_queue::{StatsQueue, StatsRequest};

/// What a balloon offers to the guest, fixed for its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A queue for guest statistics.
    pub stats: bool,
    /// The guest may deflate the balloon when it runs out of memory.
    pub deflate_on_oom: bool,
    /// A queue for reports of free pages, and a place to say what they are filled with.
    pub reporting: bool,
}

/// A balloon. The transport owns the queues and their numbers; this owns what happens to their contents.
#[derive(Debug)]
pub struct Balloon {
    options: Options,
    config: ConfigSpace,
    inflate: PageQueue,
    deflate: PageQueue,
    reports: PageQueue,
    stats: StatsQueue,
    latest: Option<GuestStats>,
    counters: Counters,
}

impl Balloon {
    /// A balloon with target 0 for a guest with `ram_pages` pages of 4 KiB.
    pub fn new(ram_pages: u32, options: Options) -> Self {
        Balloon {
            options,
            config: ConfigSpace::new(ram_pages, options.reporting),
            inflate: PageQueue::new(Content::Numbers),
            deflate: PageQueue::new(Content::Numbers),
            reports: PageQueue::new(Content::Pages),
            stats: StatsQueue::default(),
            latest: None,
            counters: Counters::default(),
        }
    }

    /// The feature bits to offer.
    pub fn offered_features(&self) -> u64 {
        offered(&self.options)
    }

    /// Reads configuration space for the guest; what is not there reads as 0.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// Writes configuration space for the guest; what it may not write is counted and ignored.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        match self.config.write(offset, data) {
            Ok(taken) if self.options.deflate_on_oom => self.counters.oom_deflated_pages += u64::from(taken),
            Ok(_) => {}
            Err(fault) => self.counters.faults.count(fault),
        }
    }

    /// Sets the target in pages of 4 KiB, at most all of RAM. True if the guest has to be told (a configuration
    /// change interrupt).
    pub fn set_target(&mut self, pages: u32) -> bool {
        self.config.set_num_pages(pages)
    }

    /// The target in pages.
    pub fn target(&self) -> u32 {
        self.config.num_pages()
    }

    /// The pages that the guest says it has given, at most all of RAM. The guest updates this after inflating, and
    /// may lie; it is never the target.
    pub fn actual(&self) -> u32 {
        self.config.actual()
    }

    /// The latest statistics of the guest. They outlive a reset: the caller knows how old they are.
    pub fn stats(&self) -> Option<&GuestStats> {
        self.latest.as_ref()
    }

    /// What the device did since it was made.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Handles at most one batch of the queue `kind`; nothing if it is not ready. Call again while the result
    /// says [`crate::Progress::More`]; after [`crate::Progress::Blocked`], when memory may be available again.
    pub fn process<M: GuestMemory, G: GuestPages>(
        &mut self,
        kind: QueueKind,
        queue: &mut Queue,
        mem: &M,
        pages: &mut G,
    ) -> Processed {
        if !queue.ready() {
            return Processed::default();
        }
        let counters = &mut self.counters;
        match kind {
            QueueKind::Inflate => {
                let out = self.inflate.process(queue, mem, counters, |ranges| pages.inflate(ranges));
                counters.inflated_pages += out.pages;
                out
            }
            QueueKind::Deflate => {
                let out = self.deflate.process(queue, mem, counters, |ranges| pages.deflate(ranges));
                counters.deflated_pages += out.pages;
                out
            }
            QueueKind::Stats => {
                let (out, stats) = self.stats.process(queue, mem, counters);
                self.latest = stats.or(self.latest);
                out
            }
            // A page that must come back as it was, with the guest's pattern in it, is worth nothing to the host.
            QueueKind::Reporting if self.config.poison_val() != 0 => {
                let out = self.reports.process(queue, mem, counters, |_| Ok(()));
                counters.poisoned_pages += out.pages;
                out
            }
            QueueKind::Reporting => {
                let out = self.reports.process(queue, mem, counters, |ranges| pages.report(ranges));
                counters.reported_pages += out.pages;
                out
            }
            // Never offered, so never negotiated: there is no such queue.
            QueueKind::FreePageHint => Processed::default(),
        }
    }

    /// Asks the guest for a new set of statistics, on the statistics queue.
    pub fn request_stats<M: GuestMemory>(&mut self, queue: &mut Queue, mem: &M) -> StatsRequest {
        if !queue.ready() {
            return StatsRequest::NoBuffer;
        }
        self.stats.request(queue, mem, &mut self.counters)
    }

    /// The guest reset the device: nothing of the queues is remembered. Target, counters and statistics stay.
    pub fn reset(&mut self) {
        self.config.reset();
        self.inflate.reset();
        self.deflate.reset();
        self.reports.reset();
        self.stats.reset();
    }
}

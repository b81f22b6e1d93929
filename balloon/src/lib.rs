//! virtio-balloon (virtio 1.2 and 1.3, section 5.5): the device, without a transport and without a mapping.
//!
//! The balloon is how a guest gives memory back by its own will: it takes pages from its own allocator, writes their
//! numbers to the inflate queue, and the host drops what was in them. Free pages that it only keeps for itself it may
//! *report*: the host drops what is in them as well, and the guest takes them without a word. This crate reads which
//! pages are meant; whoever owns guest memory does the rest through [`GuestPages`], so there is no mmap, no ioctl and no
//! eventfd here.
//!
//! Two rules shape the code:
//! * **A page is discarded before its descriptor is returned.** The guest may write to the page as soon as it has the
//!   buffer back; a discard after that would destroy what it wrote. Hence batches: read which pages, merge them, one
//!   call of [`GuestPages`], then the used ring, then at most one interrupt.
//! * **The guest is not believed.** Every index, length and address is checked, every buffer is bounded, and what does
//!   not fit is counted in [`Counters`] by kind. Nothing a guest writes stops the device or makes it panic.
//!
//! Access to guest memory may be refused for the moment (a page that cannot be charged now). The refused chain is put
//! back, and the queue is left until the caller tries again: see [`Progress::Blocked`].

#![forbid(unsafe_code)]

mod budget;
mod chain;
mod config;
mod counters;
mod device;
mod features;
mod page_queue;
mod pages;
mod ranges;
pub mod spec;
mod stats;
mod stats_queue;

pub use budget::Budget;
pub use config::ConfigSpace;
pub use counters::{Counters, GuestFault, GuestFaults};
pub use device::{Balloon, Options};
pub use features::{QueueKind, offered, queue_count, queue_index, queue_kind, queues};
pub use page_queue::{Processed, Progress};
pub use pages::{GuestPages, WouldBlock, is_would_block};
pub use ranges::{PageRange, merge, unite};
pub use stats::{GuestStats, StatTag};
pub use stats_queue::StatsRequest;

//! Guest memory: where it is mapped, and how every page of it comes to be charged.
//!
//! | file | concern |
//! | --- | --- |
//! | `ram` | the mappings; page indices |
//! | `uffd` | userfaultfd, wrapped |
//! | `activation` | how RAM becomes charged, at the start or later |
//! | `pages` | frame table and stock: what a fault, a grant, a discard change |
//! | `thread` | the thread that owns them |
//! | `told` | what the controller hears of unasked |
//! | `alone` | how long a worker does without a controller |
//! | `fill` | filling pages, and a host that has no memory for them |
//! | `around` | how many pages one fault fills |
//! | `pool` | huge pages that are zeroed ahead of need |
//! | `huge` | a guest that walks gets whole blocks of them |
//! | `client` | how other threads ask |
//! | `cold` | which pages are moved aside and evicted, and how they come back |
//! | `ageing` | how it is found out what is in use |
//! | `refill` | what a guest that goes on gets back before it asks |
//! | `reclaim` | the thread that moves and evicts them |
//! | `guest` | the accessor of all VMM code |
//! | `give` | the balloon's pages: claim, discard, uncharge |
//! | `given` | the same, as the owner of the pages books it |
//! | `discard` | vectored discards |
//! | `histogram` | how long faults and holds take |
//! | `place` | where the fault thread runs |
//! | `stall` | how long vCPUs wait for evicted pages |
//! | `store` | compressed contents of evicted pages |

pub mod activation;
pub mod ageing;
mod alone;
pub mod around;
pub mod asked;
pub mod client;
pub mod cold;
pub mod discard;
mod fill;
pub mod give;
pub mod given;
pub mod guest;
pub mod histogram;
mod huge;
pub mod pages;
pub mod place;
pub mod pool;
pub mod ram;
pub mod reclaim;
mod refill;
mod stall;
pub mod store;
pub mod thread;
mod told;
pub mod uffd;

pub use guest::GuestMem;
pub use ram::Ram;

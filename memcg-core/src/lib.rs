//! The memory controller of `ballast`, pure.
//!
//! Everything here is plain data and functions of their arguments: no file descriptor, no thread, no clock. Time is a
//! parameter, so that a test can live a week in a millisecond, and each structure has exactly one owner (the tree: the
//! controller's actor; stock and frame table: a worker's fault thread), so there are no locks and no memory order.
//!
//! | module | what it is | owner |
//! | --- | --- | --- |
//! | [`units`] | pages, limits, sizes as people write them | |
//! | [`tree`] | counters, limits and charges of host, groups and VMs | controller |
//! | [`limit_change`] | one change of `memory.max` while the guest runs | controller |
//! | [`reclaim`] | how much reclaim should aim at, and how much stock a VM may hold | controller |
//! | [`protection`] | how much of `min` and `low` counts, down the tree | controller |
//! | [`spread`] | who gives how much when memory is needed | controller |
//! | [`oom`] | who is paused or ended when nobody can give more | controller |
//! | [`shared`] | memory that several VMs map: who owns a page, who inherits it | controller |
//! | [`stock`] | the worker's side of the account | worker |
//! | [`frame`] | the state of every page of one VM | worker |

#![forbid(unsafe_code)]

pub mod frame;
pub mod limit_change;
pub mod oom;
pub mod protection;
pub mod reclaim;
pub mod shared;
pub mod spread;
pub mod stock;
pub mod tree;
pub mod units;

pub use units::{Limit, PAGE_SIZE, Pages};

//! The memory controller of `ballast`, pure.
//!
//! Everything here is plain data and functions of their arguments: no file descriptor, no thread, no clock. Time is a
//! parameter, so that a test can live a week in a millisecond, and each structure has exactly one owner (the tree: the
//! controller's actor; stock and frame table: a worker's fault thread), so there are no locks and no memory order.
//!
//! # Reading order
//!
//! Start with [`tree`]: what a charge is, who may refuse it, and what a refusal leaves behind. Then [`stock`], which is
//! why no fault of a guest ever waits for the tree, and [`frame`], the pages that the charges are for. [`limit_change`]
//! moves a limit while a guest runs. [`ladder`] says what is done when there is not enough; [`protection`], [`spread`]
//! and [`oom`] decide who gives, in this order of severity. [`shared`] stands apart: pages that several VMs map and one of them pays for.
//!
//! | module | what it is | owner |
//! | --- | --- | --- |
//! | [`units`] | pages, limits, sizes as people write them | |
//! | [`tree`] | counters, limits and charges of host, groups and VMs | controller |
//! | [`limit_change`] | one change of limits, of one node or many, while guests run | controller |
//! | [`reclaim`] | how much reclaim should aim at, and how much stock a VM may hold | controller |
//! | [`progress`] | whether a guest gives what it is asked for, and when it is asked again | controller |
//! | [`protection`] | how much of `min` and `low` counts, down the tree | controller |
//! | [`spread`] | who gives how much when memory is needed | controller |
//! | [`idle`] | how much of a VM's memory nobody uses | controller |
//! | [`ladder`] | what is done about a VM or a group that uses too much, and when the next thing | controller |
//! | [`hold`] | how long a guest may be held before that, and what puts it off | controller |
//! | [`oom`] | who is paused or ended when nobody can give more | controller |
//! | [`pressure`] | how much time goes to waiting for memory: PSI of a VM or a group | controller |
//! | [`audit`] | the invariants of a running host, as findings with numbers | controller |
//! | [`shared`] | memory that several VMs map: who owns a page, who inherits it | controller |
//! | [`stock`] | the worker's side of the account | worker |
//! | [`reporting`] | whether the pages that a guest reports as free stay free | worker |
//! | [`frame`] | state, lists and ages of every page of one VM | worker |
//! | [`sample`] | how much of its memory a guest uses, from random samples | worker |
//! | [`governor`] | how many pages may be put aside to learn that, so that a guest hardly notices | worker |
//! | [`sim`] | hosts that are not there, under the same policy | `ballast sim`, tests |
//!
//! # For readers who know cgroup v2
//!
//! | there | here |
//! | --- | --- |
//! | a cgroup | a node of the [`tree::Tree`]: a group, or a VM as a leaf; `/` is the host |
//! | `memory.current`, `memory.peak` | [`tree::CounterSnapshot`] `usage` and `peak`, of [`tree::NodeSnapshot::memory`] |
//! | `memory.min low high max`, `memory.swap.max` | [`tree::Limits`]; beside them `vmm_max` for overhead and `store_max` |
//! | writing `memory.max` | [`limit_change::LimitChange`]: reclaim first, force, or refuse; many nodes at once |
//! | `memory.events`, `memory.events.local` | [`tree::Events`], [`tree::Tree::record`] |
//! | `memory.stat` | [`tree::NodeSnapshot`], and for the pages [`frame::FrameTable::count`] |
//! | kernel memory (`memory.stat` `kernel`) | [`tree::Overhead`] in the counter `vmm`, by type |
//! | `try_charge`, uncharge | [`tree::Tree::try_charge`], [`tree::Tree::uncharge`]; in two phases: [`tree::Reservation`] |
//! | the per-CPU stock | [`stock::Stock`], one a VM |
//! | moving a process | [`tree::Tree::move_node`], with all that is charged |
//! | rmdir, dying cgroups | [`tree::Tree::remove`], [`tree::Tree::set_offline`], [`tree::Tree::reap`] |
//! | `memory.pressure` | [`pressure::Pressure`], with the kernel's averages |
//! | effective protection | [`protection::protections`], recursive |
//! | `memory.reclaim` of a subtree | [`ladder::Ladder`] says by what means, [`spread::spread`] who gives, [`frame::FrameTable::isolate`] which pages |
//! | LRU lists, generations, workingset refaults | [`frame`] |
//! | the memcg OOM killer, `memory.oom.group` | [`oom::rank`], [`oom::Victims`] |
//!
//! The rules have numbers ("semantics row 63", "B81", "T3"); `docs/semantics.md` says each in one line, and
//! `scripts/semantics` which tests prove it.

#![forbid(unsafe_code)]

pub mod audit;
pub mod frame;
pub mod governor;
pub mod hold;
pub mod host;
pub mod idle;
pub mod ladder;
pub mod limit_change;
pub mod oom;
pub mod pressure;
pub mod progress;
pub mod protection;
pub mod reclaim;
pub mod reporting;
pub mod sample;
pub mod shared;
pub mod sim;
pub mod spread;
pub mod stock;
pub mod thrash;
pub mod tree;
pub mod units;

pub use units::{Limit, PAGE_SIZE, Pages};

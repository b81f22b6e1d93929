//! A host that is not there: VMs that need memory over time, under the same policy as real ones.
//!
//! What a rule does is best seen where it acts, and a host that runs out of memory is a bad place to try one. Here the host
//! and its guests are numbers, and everything that decides is what decides in the controller, not a copy of it:
//!
//! | what | whose it is |
//! | --- | --- |
//! | charges, limits, swap and store | [`crate::tree::Tree`] |
//! | whether the host is short, how much is missing, when somebody is chosen | [`crate::host::Watch`] |
//! | what is done about it, one thing after the other | [`crate::ladder::Ladder`] |
//! | who gives how much | [`crate::ladder::aims`], on [`crate::spread`] and [`crate::protection`] |
//! | how long a guest is held before somebody is chosen in a full group | [`crate::hold::Account`] |
//! | whether guests only take pages from each other | [`crate::thrash::Watch`] |
//! | who is chosen, one at a time | [`crate::oom::rank`], [`crate::oom::Victims`], [`crate::oom::Decision`] |
//! | time that everybody waits for memory | [`crate::pressure::Pressure`] |
//!
//! # The guest
//!
//! [`guest`] is the model of a VM: at each moment of its own time it wants a *footprint*, of which a part is *hot*. What it has
//! touched is in memory or in swap. Its time stands still while it waits, so work that is held up is done later, and how far a
//! VM got in its own time says what the policy has cost it.
//!
//! # The host
//!
//! [`Host`] goes on in steps of a second, and of a quarter while anything is under way:
//!
//! ```text
//!  each guest wants ─► charged, refused by a limit, or there is no memory left in the host
//!       │
//!       ├─► climbs (climb.rs)    levels above their high, or asked for memory, give: balloons, then eviction
//!       ├─► watch  (host.rs)     the host's reading; asks the root for memory, or has somebody chosen
//!       ├─► thrash (thrash.rs)   groups whose guests get nowhere
//!       └─► choice (choice.rs)   held too long, or the host has nothing left: client, rank, act
//! ```
//!
//! There is no clock and nothing random in it: a [`Setup`] has one outcome. [`synthetic`] makes setups from a seed, [`rules`]
//! is a table of small ones that say what must come of them.
//!
//! # What is not in it
//!
//! Stocks and reserves of workers, page sizes, what it costs to age pages, wrong estimates of what is idle, CPUs: a guest waits
//! for one fault after the other, and nobody waits for a CPU. What is idle is known exactly. A host whose memory is gone lets
//! everybody wait; the kernel would kill somebody, and [`Sums::exhausted`] says for how long it would have had reason to.

mod choice;
mod climb;
pub mod guest;
mod host;
mod outcome;
pub mod rules;
mod setup;
pub mod synthetic;
mod thrash;

pub use host::Host;
pub use outcome::{Event, Outcome, Sample, Sums, VmOutcome, What, fairness};
pub use setup::{Answers, Client, Group, Point, Policy, Setup, SetupError, Vm};

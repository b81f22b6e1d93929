//! The model of a guest.
//!
//! ```text
//!  footprint ├───────── hot ─────────┼──────────── cold ────────────┤        what it wants, by its own time
//!  in memory ├───── hot ──────┤      ├──── cold ────┤├──── free ───┤         charged
//!  swapped                    ├ hot ─┤              ├──── cold ────┤         and what that leaves in the store is charged
//! ```
//!
//! * A guest that wants more than it has allocates: what is free first, then new pages, at most [`GROWS`] in a second.
//! * What it does not want any more is free: it is given back at once by a guest that reports, and stays charged otherwise.
//! * Hot pages that are in swap come back one after the other, each in [`REFAULT_US`]. The guest waits meanwhile.
//! * Of the cold pages a part is touched in each minute and is hot from then on, as many others are hot no more.
//! * What is evicted is free or cold as long as there is such, then hot; at most [`EVICTS`] in a second.
//!
//! A guest whose charge is refused is held, and one that finds no page in the host waits: in both cases for the part of the
//! time for which what it got was not enough.

use std::time::Duration;

use super::setup::{Point, Vm as Setup};
use crate::hold;
use crate::ladder::{Driver, Eviction};
use crate::pressure::Member;
use crate::tree::{Counter, EvictError, Kind, Mode, NodeId, Overhead, Refused, Tree};
use crate::units::Pages;

/// Pages that a guest allocates in a second, at most: 1 GiB.
pub const GROWS: u64 = 262_144;

/// Pages that are evicted from one guest in a second, at most: 400 MiB.
pub const EVICTS: u64 = 102_400;

/// Pages that a balloon gives in a second, at most: 1 GiB.
pub const GIVES: u64 = 262_144;

/// Pages of a guest that has been killed which come back in a second: 4 GiB.
pub const RETURNS: u64 = 1_048_576;

/// What it takes until an evicted page is back, in microseconds: what [thrashing](crate::thrash::COST) counts for it, too.
pub const REFAULT_US: u64 = crate::thrash::COST.as_micros() as u64;

/// What a VM is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// It runs, or would.
    #[default]
    Runs,
    /// It stands still until its memory is there: what a level had no room for.
    Paused {
        /// The level.
        level: NodeId,
        /// All that it has is evicted; not where only its own limit was in the way.
        emptied: bool,
    },
    /// It was killed, and its memory is on its way back.
    Ending,
    /// It is gone.
    Gone,
}

/// One guest.
#[derive(Debug)]
pub struct Guest {
    /// What it is.
    pub setup: Setup,
    /// Its node.
    pub node: NodeId,
    /// What it is doing.
    pub state: State,
    /// The level that refused what it wants.
    pub refused: Option<Refused>,
    /// Pages that it waits for.
    pub owes: Pages,
    /// How it counts in the host's pressure.
    pub member: Member,
    /// How long it has been held.
    pub account: hold::Account,
    /// The policy is not asked about it before this.
    pub asked_until: Duration,
    /// When it was paused last.
    pub paused_at: Duration,
    /// The policy has killed it.
    pub killed: bool,
    /// Pages that it was granted in all.
    pub granted: Pages,
    /// Its own time, in milliseconds.
    pub lived: u64,
    /// Time that it wanted to run, in milliseconds.
    pub wanted: u64,
    /// Time that it waited, in microseconds.
    pub stalled_us: u64,
    /// Time that it was paused, in milliseconds.
    pub paused: u64,
    /// Pages that have come back from swap.
    pub refaulted: u64,
    pages: Held,
    /// The levels at and above it that limit swap or store.
    limits: Vec<NodeId>,
    /// The point of its load that is reached.
    at: usize,
    /// Touches of cold pages in swap that are not whole yet.
    wandered: u64,
}

/// Pages of a guest, by what they are and where.
#[derive(Clone, Copy, Debug, Default)]
struct Held {
    hot: u64,
    cold: u64,
    free: u64,
    hot_out: u64,
    cold_out: u64,
    free_out: u64,
    stored: u64,
}

impl Held {
    fn resident(&self) -> u64 {
        self.hot + self.cold + self.free
    }

    fn swapped(&self) -> u64 {
        self.hot_out + self.cold_out + self.free_out
    }

    /// What the guest has a use for.
    fn footprint(&self) -> u64 {
        self.hot + self.cold + self.hot_out + self.cold_out
    }

    /// What leaves the store with `pages` of what is swapped.
    fn stored_of(&self, pages: u64) -> u64 {
        part(self.stored, pages, self.swapped())
    }
}

/// `of × mine / all`, rounded down, all of it where `mine` is all; nothing of nothing.
fn part(of: u64, mine: u64, all: u64) -> u64 {
    if mine >= all { of } else { (u128::from(of) * u128::from(mine) / u128::from(all.max(1))) as u64 }
}

impl Guest {
    /// A guest that has nothing yet but its overhead.
    pub fn new(setup: Setup, node: NodeId, tree: &mut Tree) -> Guest {
        // Whoever sets up a host that has no room for its VMs is told by what becomes of them.
        let _ = tree.try_charge_as(node, Kind::Overhead(Overhead::Worker), setup.overhead, Mode::NoFail);
        let limited = |at: &NodeId| {
            let limits = tree.limits(*at);
            !(limits.swap_max.is_max() && limits.store_max.is_max())
        };
        let limits = tree.ancestry(node).filter(limited).collect();
        Guest {
            setup,
            node,
            limits,
            state: State::Runs,
            refused: None,
            owes: Pages::ZERO,
            member: Member::Running,
            account: hold::Account::default(),
            asked_until: Duration::ZERO,
            paused_at: Duration::ZERO,
            killed: false,
            granted: Pages::ZERO,
            lived: 0,
            wanted: 0,
            stalled_us: 0,
            paused: 0,
            refaulted: 0,
            pages: Held::default(),
            at: 0,
            wandered: 0,
        }
    }

    /// Whether it is there and is not on its way out.
    pub fn is_alive(&self) -> bool {
        matches!(self.state, State::Runs | State::Paused { .. })
    }

    /// Whether it stands still, and all that it has is evicted.
    pub fn is_emptied(&self) -> bool {
        matches!(self.state, State::Paused { emptied: true, .. })
    }

    /// Pages in memory that nobody uses.
    pub fn idle(&self) -> Pages {
        let in_use = if self.state == State::Runs { self.pages.hot } else { 0 };
        Pages(self.pages.resident() - in_use)
    }

    /// Pages in swap.
    pub fn swapped(&self) -> Pages {
        Pages(self.pages.swapped())
    }

    /// What it needs in order to go on as before: what is in swap, less what that takes now.
    pub fn comes_back(&self) -> Pages {
        Pages(self.pages.swapped().saturating_sub(self.pages.stored))
    }

    /// How far its balloon driver helps.
    pub fn driver(&self) -> Driver {
        match (self.setup.driver && self.state == State::Runs, self.pages.free) {
            (false, _) => Driver::Absent,
            (true, 0) => Driver::Stalled,
            (true, _) => Driver::Cooperating,
        }
    }

    /// Whether anything of it can be evicted.
    pub fn eviction(&self, tree: &Tree) -> Eviction {
        if self.evictable(tree) > 0 { Eviction::Possible } else { Eviction::Stuck }
    }

    /// What it frees when it stands still and all is evicted.
    pub fn freed_by_pause(&self, tree: &Tree) -> Pages {
        let pages = self.evictable(tree);
        Pages(pages - self.shrunk(pages))
    }

    /// What `pages` leave in the store.
    fn shrunk(&self, pages: u64) -> u64 {
        (pages * u64::from(self.setup.shrinks.min(1000))).div_ceil(1000)
    }

    /// Pages that swap and store have room for, of those in memory.
    fn evictable(&self, tree: &Tree) -> u64 {
        let mut most = self.pages.resident();
        for at in self.limits.iter().copied() {
            let limits = tree.limits(at);
            if let Some(max) = limits.swap_max.as_pages() {
                most = most.min(max.saturating_sub(tree.counter(at, Counter::Swap).usage).0);
            }
            if let Some(max) = limits.store_max.as_pages() {
                let room = max.saturating_sub(tree.counter(at, Counter::Store).usage).0;
                most = most.min(room * 1000 / u64::from(self.setup.shrinks.clamp(1, 1000)));
            }
        }
        // A page that leaves all of itself in the store frees nothing.
        if self.setup.shrinks >= 1000 { 0 } else { most }
    }

    /// What it wants at `ms` of its own time.
    fn wants(&mut self, ms: u64) -> Point {
        let load = &self.setup.load;
        while load.get(self.at + 1).is_some_and(|next| next.at.as_millis() <= u128::from(ms)) {
            self.at += 1;
        }
        let Some(from) = load.get(self.at).copied() else { return Point::default() };
        let begins = from.at.as_millis() as u64;
        if ms < begins {
            return Point::default();
        }
        let Some(to) = load.get(self.at + 1) else { return from };
        let share = (ms - begins) as f64 / (to.at.as_millis() as u64 - begins).max(1) as f64;
        let between = |from: Pages, to: Pages| Pages((from.0 as f64 + (to.0 as f64 - from.0 as f64) * share) as u64);
        Point { at: from.at, footprint: between(from.footprint, to.footprint), hot: between(from.hot, to.hot) }
    }

    /// Goes on for `ms` of the host's time, in which the host has so much `room` left.
    pub fn live(&mut self, tree: &mut Tree, ms: u64, room: &mut u64) {
        match self.state {
            State::Runs => {}
            State::Paused { .. } => {
                (self.wanted, self.paused) = (self.wanted + ms, self.paused + ms);
                return;
            }
            State::Ending => return self.vanish(tree, ms),
            State::Gone => return,
        }
        let wants = self.wants(self.lived + ms);
        let (footprint, hot) = (wants.footprint.0, wants.hot.min(wants.footprint).0);
        self.settle(tree, footprint, hot);
        self.wander(ms);
        self.refused = None;
        let grows = self.grow(tree, footprint, hot, ms, *room);
        *room -= grows.got.min(*room);
        let faults = self.refault(tree, ms, *room);
        *room -= faults.charged.min(*room);
        let refaulting = faults.got * REFAULT_US;
        let (got, want) = (grows.got + faults.got, grows.want + faults.want);
        let us = ms * 1000;
        let waited = if got < want { us - part(us, got, want) } else { 0 };
        let stalled = (waited + refaulting).min(us);
        self.owes = Pages(want - got);
        self.member = match (got < want, self.refused) {
            (true, None) => Member::Fully,
            _ => Member::Running,
        };
        self.granted += Pages(got);
        self.refaulted += faults.got;
        self.stalled_us += stalled;
        self.wanted += ms;
        self.lived += ms - stalled / 1000;
    }

    /// What it has is hot, cold or free by what it wants now.
    fn settle(&mut self, tree: &mut Tree, footprint: u64, hot: u64) {
        let pages = &mut self.pages;
        let (all, is_hot) = (pages.footprint(), pages.hot + pages.hot_out);
        if is_hot > hot {
            let out = part(pages.hot_out, is_hot - hot, is_hot);
            let in_memory = (is_hot - hot - out).min(pages.hot);
            (pages.hot_out, pages.cold_out) = (pages.hot_out - out, pages.cold_out + out);
            (pages.hot, pages.cold) = (pages.hot - in_memory, pages.cold + in_memory);
        } else {
            // What is allocated is in use at first.
            let more = (hot - is_hot).saturating_sub(footprint.saturating_sub(all));
            let (more, out) = pages.of_cold(more);
            (pages.cold_out, pages.hot_out) = (pages.cold_out - out, pages.hot_out + out);
            (pages.cold, pages.hot) = (pages.cold - more, pages.hot + more);
        }
        if all > footprint {
            let (freed, out) = pages.of_cold(all - footprint);
            (pages.cold, pages.cold_out) = (pages.cold - freed, pages.cold_out - out);
            if self.setup.reports {
                let stored = pages.stored_of(out);
                pages.stored -= stored;
                self.discard(tree, freed, out, stored);
            } else {
                (pages.free, pages.free_out) = (pages.free + freed, pages.free_out + out);
            }
        }
    }

    /// Pages that are wanted no more leave memory, swap and store.
    fn discard(&self, tree: &mut Tree, freed: u64, out: u64, stored: u64) {
        tree.uncharge(self.node, Pages(freed));
        tree.uncharge_as(self.node, Kind::Swap, Pages(out));
        tree.uncharge_as(self.node, Kind::Store, Pages(stored));
    }

    /// Cold pages that are in swap are touched.
    fn wander(&mut self, ms: u64) {
        if self.pages.cold_out == 0 || self.setup.wanders == 0 {
            return;
        }
        self.wandered += self.pages.cold_out * u64::from(self.setup.wanders) * ms;
        let touched = (self.wandered / 60_000_000).min(self.pages.cold_out).min(self.pages.hot);
        self.wandered %= 60_000_000;
        self.pages.cold_out -= touched;
        self.pages.hot_out += touched;
        self.pages.hot -= touched;
        self.pages.cold += touched;
    }

    fn grow(&mut self, tree: &mut Tree, footprint: u64, hot: u64, ms: u64, room: u64) -> Got {
        let want = footprint.saturating_sub(self.pages.footprint()).min(GROWS * ms / 1000);
        if want == 0 {
            return Got::default();
        }
        let free = want.min(self.pages.free);
        self.pages.free -= free;
        let free_out = (want - free).min(self.pages.free_out);
        self.pages.free_out -= free_out;
        let (new, fits) = (want - free - free_out, want.min(room));
        let charged = self.charge(tree, new.min(fits));
        let got = free + charged;
        let hotter = hot.saturating_sub(self.pages.hot + self.pages.hot_out);
        let of_swap = hotter.min(free_out);
        (self.pages.hot_out, self.pages.cold_out) =
            (self.pages.hot_out + of_swap, self.pages.cold_out + free_out - of_swap);
        let hotter = (hotter - of_swap).min(got);
        (self.pages.hot, self.pages.cold) = (self.pages.hot + hotter, self.pages.cold + got - hotter);
        Got { want: free + new, got, charged }
    }

    /// Charges as much of `pages` as fits, and notes who refuses the rest.
    fn charge(&mut self, tree: &mut Tree, pages: u64) -> u64 {
        if pages == 0 || tree.try_charge(self.node, Pages(pages), Mode::Wait).is_ok() {
            return pages;
        }
        let fits = tree.charge_up_to(self.node, Pages(pages), Pages::ZERO, Mode::NoRetry);
        let fits = fits.map_or(0, |charge| charge.pages.0);
        self.refused = tree.try_charge(self.node, Pages(pages - fits), Mode::Again).err();
        fits
    }

    /// Hot pages come back from swap.
    fn refault(&mut self, tree: &mut Tree, ms: u64, room: u64) -> Got {
        let want = self.pages.hot_out.min(ms * 1000 / REFAULT_US);
        if want == 0 {
            return Got::default();
        }
        let margin = tree.margin(self.node).map_or(u64::MAX, |margin| margin.0);
        let mut got = want;
        if want - self.pages.stored_of(want) > margin.min(room) {
            // What leaves the store makes room for a part of it.
            let all = self.pages.swapped();
            got = part(margin.min(room), all, all.saturating_sub(self.pages.stored).max(1)).min(want);
        }
        let mut take = |tree: &mut Tree, pages: u64| {
            let stored = self.pages.stored_of(pages);
            match tree.refault(self.node, Pages(pages), Pages(stored), Mode::Wait) {
                Ok(_) => {
                    self.pages.stored -= stored;
                    self.pages.hot_out -= pages;
                    self.pages.hot += pages;
                    Ok(pages.saturating_sub(stored))
                }
                Err(error) => Err(error),
            }
        };
        let mut charged = 0;
        match take(tree, got) {
            Ok(more) => charged = more,
            Err(_) => got = 0,
        }
        if got < want && margin <= room {
            // Who refuses the next one is whose limit is in the way.
            match take(tree, want - got) {
                Ok(more) => (got, charged) = (want, charged + more),
                Err(EvictError::Refused(refused)) => self.refused = Some(refused),
                Err(_) => {}
            }
        }
        Got { want, got, charged }
    }

    /// Its balloon gives what is free, so that usage comes down to `aim`. Returns how much that was.
    pub fn give(&mut self, tree: &mut Tree, aim: Pages, ms: u64) -> Pages {
        if self.driver() != Driver::Cooperating {
            return Pages::ZERO;
        }
        let above = tree.usage(self.node).saturating_sub(aim).0;
        let given = above.min(self.pages.free).min(GIVES * ms / 1000);
        self.pages.free -= given;
        tree.uncharge(self.node, Pages(given));
        Pages(given)
    }

    /// Evicts, so that usage comes down to `aim`. Returns by how much memory it did.
    pub fn evict(&mut self, tree: &mut Tree, aim: Pages, ms: u64) -> Pages {
        let above = tree.usage(self.node).saturating_sub(aim).0;
        if above == 0 {
            return Pages::ZERO;
        }
        let enough = (above * 1000).div_ceil(u64::from(1000 - self.setup.shrinks.min(999)));
        let pages = enough.min(self.evictable(tree)).min(EVICTS * ms / 1000);
        let stored = self.shrunk(pages);
        if pages == 0 || tree.evict(self.node, Pages(pages), Pages(stored)).is_err() {
            return Pages::ZERO;
        }
        let held = &mut self.pages;
        let idle = held.free + held.cold;
        let free = part(held.free, pages.min(idle), idle);
        let cold = (pages.min(idle) - free).min(held.cold);
        let hot = pages - free - cold;
        (held.free, held.free_out) = (held.free - free, held.free_out + free);
        (held.cold, held.cold_out) = (held.cold - cold, held.cold_out + cold);
        (held.hot, held.hot_out) = (held.hot - hot, held.hot_out + hot);
        held.stored += stored;
        Pages(pages - stored)
    }

    /// Its memory comes back after it was killed.
    fn vanish(&mut self, tree: &mut Tree, ms: u64) {
        self.wanted += ms;
        if self.setup.immortal {
            return;
        }
        let mut left = RETURNS * ms / 1000;
        let pages = &mut self.pages;
        for part in [&mut pages.free, &mut pages.cold, &mut pages.hot] {
            let back = left.min(*part);
            (*part, left) = (*part - back, left - back);
            tree.uncharge(self.node, Pages(back));
        }
        if left == 0 {
            return;
        }
        tree.uncharge_all(self.node);
        self.pages = Held::default();
        self.state = State::Gone;
    }
}

impl Held {
    /// So many of the cold pages, as they come: in memory and in swap.
    fn of_cold(&self, pages: u64) -> (u64, u64) {
        let pages = pages.min(self.cold + self.cold_out);
        let out = part(self.cold_out, pages, self.cold + self.cold_out);
        let in_memory = (pages - out).min(self.cold);
        (in_memory, pages - in_memory)
    }
}

/// What a guest wanted and got.
#[derive(Clone, Copy, Debug, Default)]
struct Got {
    want: u64,
    got: u64,
    /// Of this, pages that the host has less.
    charged: u64,
}

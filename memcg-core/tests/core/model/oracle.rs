//! The same account kept differently: a list of pages. Nothing is ever added up ahead; every number is counted anew.

use memcg_core::reclaim::effective_high;
use memcg_core::tree::{Accounting, Counter, Events, Kind, Limits, MAX_LEVELS, Mode, NodeId};
use memcg_core::units::{Limit, Pages};

/// One page and why it is charged.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub node: usize,
    pub kind: Kind,
}

/// What is counted, not charged, at one counter of one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub peak: u64,
    pub failcnt: u64,
    pub batch_misses: u64,
    pub would_block: u64,
    pub forced: u64,
}

/// One node.
#[derive(Clone, Debug)]
pub struct Node {
    pub id: NodeId,
    pub parent: Option<usize>,
    pub accounting: Accounting,
    pub online: bool,
    pub gone: bool,
    /// Its VM is gone and its memory not yet back.
    pub returning: bool,
    pub limits: Limits,
    pub ceiling: Option<u64>,
    pub counts: [Counts; Counter::ALL.len()],
    pub events_local: Events,
    pub events: Events,
}

/// A charge as it must come out.
#[derive(Debug, PartialEq, Eq)]
pub enum Expected {
    /// Granted; the lowest level whose limit it ignores.
    Granted(Option<usize>),
    /// Refused here, by this counter; `None` where a node that is offline refuses without a count.
    Refused(usize, Option<Counter>),
}

#[derive(Clone, Debug)]
pub struct Oracle {
    pub nodes: Vec<Node>,
    pub pages: Vec<Page>,
}

/// The counters that a kind is part of, in the order in which they are asked.
pub fn counters(kind: Kind) -> &'static [Counter] {
    match kind {
        Kind::Guest => &[Counter::Memory],
        Kind::Overhead(_) => &[Counter::Vmm, Counter::Memory],
        Kind::Store => &[Counter::Store, Counter::Memory],
        Kind::Swap => &[Counter::Swap],
    }
}

/// Place of a kind in [`Kind::ALL`].
pub fn index(kind: Kind) -> usize {
    Kind::ALL.iter().position(|other| *other == kind).expect("all of them")
}

impl Node {
    pub fn new(id: NodeId, parent: Option<usize>, accounting: Accounting) -> Node {
        Node {
            id,
            parent,
            accounting,
            online: true,
            gone: false,
            returning: false,
            limits: Limits::default(),
            ceiling: None,
            counts: Default::default(),
            events_local: Events::default(),
            events: Events::default(),
        }
    }

    pub fn limit(&self, counter: Counter) -> Limit {
        match counter {
            Counter::Memory => self.limits.max.min(self.ceiling.map_or(Limit::Max, |pages| Limit::Pages(Pages(pages)))),
            Counter::Vmm => self.limits.vmm_max,
            Counter::Store => self.limits.store_max,
            Counter::Swap => self.limits.swap_max,
        }
    }

    fn above_high(&self, usage: u64) -> bool {
        Limit::Pages(Pages(usage)) > effective_high(self.limits.high, self.limits.max)
    }
}

impl Oracle {
    /// The node and its ancestors, the root last.
    pub fn chain(&self, node: usize) -> Vec<usize> {
        std::iter::successors(Some(node), |at| self.nodes[*at].parent).collect()
    }

    pub fn alive(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.nodes.len()).filter(|n| !self.nodes[*n].gone)
    }

    pub fn children(&self, node: usize) -> Vec<usize> {
        self.alive().filter(|n| self.nodes[*n].parent == Some(node)).collect()
    }

    pub fn below(&self, node: usize) -> Vec<usize> {
        self.alive().filter(|n| self.chain(*n).contains(&node)).collect()
    }

    /// Childless nodes below, itself if it is one.
    pub fn members(&self, node: usize) -> usize {
        self.below(node).into_iter().filter(|n| self.children(*n).is_empty()).count()
    }

    /// Usage of every node in every counter: each page walks up once.
    pub fn usages(&self) -> Vec<[u64; Counter::ALL.len()]> {
        let mut usages = vec![[0; Counter::ALL.len()]; self.nodes.len()];
        for page in &self.pages {
            let mut at = Some(page.node);
            while let Some(level) = at {
                for counter in counters(page.kind) {
                    usages[level][*counter as usize] += 1;
                }
                at = self.nodes[level].parent;
            }
        }
        usages
    }

    /// Pages of each kind charged to each very node.
    pub fn owns(&self) -> Vec<[u64; Kind::ALL.len()]> {
        let mut owns = vec![[0; Kind::ALL.len()]; self.nodes.len()];
        for page in &self.pages {
            owns[page.node][index(page.kind)] += 1;
        }
        owns
    }

    pub fn usage(&self, node: usize, counter: Counter) -> u64 {
        self.usages()[node][counter as usize]
    }

    /// Pages of one kind charged to this very node.
    pub fn own(&self, node: usize, kind: Kind) -> u64 {
        self.pages.iter().filter(|page| page.node == node && page.kind == kind).count() as u64
    }

    /// Pages charged to this very node in one counter.
    pub fn own_in(&self, node: usize, counter: Counter) -> u64 {
        let counted = |page: &&Page| page.node == node && counters(page.kind).contains(&counter);
        self.pages.iter().filter(counted).count() as u64
    }

    fn is_off(&self, node: usize) -> bool {
        self.nodes[node].accounting == Accounting::Off
    }

    /// The lowest level at which `pages` more do not fit.
    pub fn first_full(&self, node: usize, counter: Counter, pages: u64) -> Option<usize> {
        let usages = self.usages();
        let full = |level: &usize| {
            Limit::Pages(Pages(usages[*level][counter as usize] + pages)) > self.nodes[*level].limit(counter)
        };
        self.chain(node).into_iter().find(full).filter(|_| pages > 0)
    }

    /// What must come of a charge of `pages` in these counters, asked in this order.
    pub fn expect(&self, node: usize, asks: &[(Counter, u64)], mode: Mode) -> Expected {
        if asks.iter().all(|(_, pages)| *pages == 0) || self.is_off(node) {
            return Expected::Granted(None);
        }
        if !self.nodes[node].online && mode != Mode::NoFail {
            return Expected::Refused(node, None);
        }
        let mut asked = asks
            .iter()
            .filter_map(|(counter, pages)| self.first_full(node, *counter, *pages).map(|level| (level, *counter)));
        match asked.next() {
            None => Expected::Granted(None),
            Some((level, _)) if mode == Mode::NoFail => Expected::Granted(Some(level)),
            Some((level, counter)) => Expected::Refused(level, Some(counter)),
        }
    }

    /// Books a refusal: one count at one level.
    pub fn refused(&mut self, level: usize, counter: Option<Counter>, mode: Mode) {
        let Some(counter) = counter else { return };
        let node = &mut self.nodes[level];
        let counts = &mut node.counts[counter as usize];
        match mode {
            Mode::Wait => counts.failcnt += 1,
            Mode::NoWait => counts.would_block += 1,
            Mode::NoRetry => counts.batch_misses += 1,
            Mode::Again => {}
            Mode::NoFail => unreachable!("never refused"),
        }
        if mode == Mode::Wait && counter == Counter::Memory {
            self.record(level, |events| &mut events.max);
        }
    }

    /// Counts an event: at its level, and at that and all above.
    pub fn record(&mut self, level: usize, which: fn(&mut Events) -> &mut u64) {
        *which(&mut self.nodes[level].events_local) += 1;
        for at in self.chain(level) {
            *which(&mut self.nodes[at].events) += 1;
        }
    }

    /// Puts pages on the list. Returns the nodes that went above their high limit.
    pub fn charge(&mut self, node: usize, kind: Kind, pages: u64) -> Vec<NodeId> {
        if self.is_off(node) || pages == 0 {
            return Vec::new();
        }
        let before = self.usages();
        let mut crossed = Vec::new();
        for level in self.chain(node) {
            for counter in counters(kind) {
                let usage = before[level][*counter as usize];
                let above = Limit::Pages(Pages(usage + pages)) > self.nodes[level].limit(*counter);
                self.nodes[level].counts[*counter as usize].forced += u64::from(above);
                if *counter == Counter::Memory
                    && !self.nodes[level].above_high(usage)
                    && self.nodes[level].above_high(usage + pages)
                {
                    self.record(level, |events| &mut events.high);
                    crossed.push(self.nodes[level].id);
                }
            }
        }
        self.put(node, kind, pages);
        self.raise_peaks();
        crossed
    }

    /// Counts at each level where `pages` more, which cannot be refused, go above its limit.
    pub fn force(&mut self, node: usize, counter: Counter, pages: u64) {
        let usages = self.usages();
        for level in self.chain(node) {
            let usage = Limit::Pages(Pages(usages[level][counter as usize] + pages));
            let above = pages > 0 && usage > self.nodes[level].limit(counter);
            self.nodes[level].counts[counter as usize].forced += u64::from(above);
        }
    }

    /// Puts pages on the list that are in memory already, or not to be.
    pub fn put(&mut self, node: usize, kind: Kind, pages: u64) {
        self.pages.extend((0..pages).map(|_| Page { node, kind }));
    }

    /// Whether memory of `node` was not above its high limit `before` and is now.
    pub fn crosses(&self, node: usize, before: [u64; Counter::ALL.len()]) -> bool {
        let node_ = &self.nodes[node];
        !node_.above_high(before[Counter::Memory as usize]) && node_.above_high(self.usage(node, Counter::Memory))
    }

    /// Takes pages off the list.
    pub fn uncharge(&mut self, node: usize, kind: Kind, pages: u64) {
        let mut left = if self.is_off(node) { 0 } else { pages };
        self.pages.retain(|page| {
            let taken = left > 0 && page.node == node && page.kind == kind;
            left -= u64::from(taken);
            !taken
        });
    }

    /// Peaks follow usage up.
    pub fn raise_peaks(&mut self) {
        let usages = self.usages();
        for (node, usages) in self.nodes.iter_mut().zip(usages) {
            for (counts, usage) in node.counts.iter_mut().zip(usages) {
                counts.peak = counts.peak.max(usage);
            }
        }
    }

    /// Puts limits in force; a high limit that comes down past usage is crossed.
    pub fn set_limits(&mut self, node: usize, limits: Limits) {
        let usage = self.usage(node, Counter::Memory);
        let was_above = self.nodes[node].above_high(usage);
        self.nodes[node].limits = limits;
        if !was_above && self.nodes[node].above_high(usage) {
            self.record(node, |events| &mut events.high);
        }
    }

    /// Whether `node` may be moved below `to`, and which levels are new to it.
    pub fn may_move(&self, node: usize, to: usize) -> (bool, Vec<usize>) {
        let (old, new) = (self.chain(node), self.chain(to));
        let newly: Vec<usize> = new.iter().copied().filter(|level| !old.contains(level)).collect();
        let depth = |n: usize| self.chain(n).len();
        let height = self.below(node).into_iter().map(depth).max().unwrap_or(0) - depth(node);
        let usages = self.usages();
        let fits = |level: &usize| {
            Counter::ALL.iter().all(|counter| {
                let pages = usages[node][*counter as usize];
                let sum = Limit::Pages(Pages(usages[*level][*counter as usize] + pages));
                pages == 0 || sum <= self.nodes[*level].limit(*counter)
            })
        };
        let possible = node != 0
            && !new.contains(&node)
            && self.nodes[node].online
            && self.nodes[to].online
            && !(self.is_off(node) && !self.is_off(to) && to != 0)
            && (to == 0 || Counter::ALL.iter().all(|counter| self.own_in(to, *counter) == 0))
            && depth(to) + 1 + height <= MAX_LEVELS
            && newly.iter().all(fits);
        (possible, newly)
    }
}

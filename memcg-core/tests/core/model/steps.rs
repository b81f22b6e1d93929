//! What each operation does to the tree, and what the oracle says must come of it.

use memcg_core::tree::{Accounting, Counter, EvictError, Kind, Mode, Moved, Refused};
use memcg_core::units::Pages;

use super::oracle::{Expected, Node, counters};
use super::{MOST, Op, Run};

impl Run {
    pub fn apply(&mut self, op: Op) {
        match op {
            Op::Add(n) => self.add(n),
            Op::AddMany(n, times) => (0..times).for_each(|_| self.add(n)),
            Op::Activate(n, resident) => self.activate(n, resident),
            Op::Offline(n, returning) => self.offline(n, returning),
            Op::Remove(n) => self.remove(n),
            Op::Reap => self.reap(),
            Op::Move(n, m) => self.move_node(n, m),
            Op::Charge(n, kind, pages, mode) => self.charge(n, kind, pages, mode),
            Op::UpTo(n, want, min) => self.charge_up_to(n, want, min),
            Op::Reserve(n, kind, pages, used) => self.reserve(n, kind, pages, used),
            Op::Uncharge(n, kind, pages) => {
                let node = self.pick(n);
                let pages = pages.min(self.oracle.own(node, kind));
                self.tree.uncharge_as(self.id(node), kind, Pages(pages));
                self.oracle.uncharge(node, kind, pages);
            }
            Op::UnchargeAll(n) => {
                let node = self.pick(n);
                let memory = self.oracle.own_in(node, Counter::Memory);
                assert_eq!(self.tree.uncharge_all(self.id(node)).0, memory);
                self.oracle.pages.retain(|page| page.node != node);
            }
            Op::Evict(n, pages, stored) => self.evict(n, pages, stored),
            Op::Refault(n, pages, stored, mode) => self.refault(n, pages, stored, mode),
            Op::Evicted(n, stored, swapped) => self.evicted(n, stored, swapped),
            Op::Change(wanted, mode, wait) => self.begin_change(wanted, mode, wait),
            Op::Wait(seconds) => self.wait(seconds),
            Op::Cancel(n) => self.cancel(n),
            Op::Reset(n, counter) => {
                let node = self.pick(n);
                self.tree.reset_peak(self.id(node), counter);
                self.tree.reset_failcnt(self.id(node), counter);
                let usage = self.oracle.usage(node, counter);
                let counts = &mut self.oracle.nodes[node].counts[counter as usize];
                (counts.peak, counts.failcnt) = (usage, 0);
            }
        }
    }

    fn add(&mut self, n: usize) {
        if self.oracle.alive().count() >= MOST {
            return;
        }
        let parent = self.pick(n);
        let name = format!("n{}", self.oracle.nodes.len());
        let charged = Counter::ALL.iter().any(|counter| self.oracle.own_in(parent, *counter) > 0);
        let deep = self.oracle.chain(parent).len() >= memcg_core::tree::MAX_LEVELS;
        let possible = self.oracle.nodes[parent].online && !deep && (parent == 0 || !charged);
        let added = self.tree.add(self.id(parent), &name);
        assert_eq!(added.is_ok(), possible, "{added:?}");
        if let Ok(id) = added {
            let inherited = if parent == 0 { Accounting::Off } else { self.oracle.nodes[parent].accounting };
            self.oracle.nodes.push(Node::new(id, Some(parent), inherited));
        }
    }

    fn activate(&mut self, n: usize, resident: u64) {
        let node = self.pick(n);
        let off: Vec<usize> = self.oracle.below(node);
        let off: Vec<usize> = off.into_iter().filter(|n| self.oracle.nodes[*n].accounting == Accounting::Off).collect();
        let charged = self.tree.activate(self.id(node), |_| Pages(resident)).expect("far from 64 bits");
        let leaves: Vec<usize> = off.iter().copied().filter(|n| self.oracle.children(*n).is_empty()).collect();
        assert_eq!(charged.len(), leaves.len());
        for n in off {
            self.oracle.nodes[n].accounting = Accounting::On;
        }
        for (id, charge) in charged {
            let leaf = leaves.iter().copied().find(|n| self.id(*n) == id).expect("one of the leaves, once");
            assert_eq!(self.oracle.charge(leaf, Kind::Guest, resident), charge.crossed_high.iter().collect::<Vec<_>>());
        }
    }

    fn offline(&mut self, n: usize, returning: bool) {
        let node = self.pick(n);
        let members = self.oracle.children(node).into_iter().any(|n| self.oracle.nodes[n].online);
        let id = self.id(node);
        let done = if returning { self.tree.set_returning(id) } else { self.tree.set_offline(id) };
        assert_eq!(done.is_ok(), node != 0 && !members);
        if done.is_ok() {
            self.oracle.nodes[node].online = false;
            self.oracle.nodes[node].returning |= returning;
        }
    }

    fn is_free(&self, node: usize) -> bool {
        let usages = self.oracle.usages();
        node != 0 && self.oracle.children(node).is_empty() && usages[node].iter().all(|usage| *usage == 0)
    }

    fn remove(&mut self, n: usize) {
        let node = self.pick(n);
        let removed = self.tree.remove(self.id(node)).is_ok();
        assert_eq!(removed, self.is_free(node));
        self.oracle.nodes[node].gone = removed;
        self.supersede_gone();
    }

    fn reap(&mut self) {
        let mut expected = Vec::new();
        loop {
            let free = self.oracle.alive().find(|n| !self.oracle.nodes[*n].online && self.is_free(*n));
            let Some(free) = free else { break };
            self.oracle.nodes[free].gone = true;
            expected.push(self.id(free));
        }
        let mut reaped = self.tree.reap();
        reaped.sort_unstable();
        expected.sort_unstable();
        assert_eq!(reaped, expected, "parents that are free because of it, too, and each once");
        self.supersede_gone();
    }

    fn move_node(&mut self, n: usize, m: usize) {
        let (node, to) = (self.pick(n), self.pick(m));
        let (possible, newly) = self.oracle.may_move(node, to);
        let moved = self.tree.move_node(self.id(node), self.id(to));
        if node != 0 && self.oracle.nodes[node].parent == Some(to) {
            assert_eq!(moved, Ok(Moved::Unchanged));
            return;
        }
        assert_eq!(moved.is_ok(), possible, "{moved:?}");
        let Ok(moved) = moved else { return };
        let before = self.oracle.usages();
        self.oracle.nodes[node].parent = Some(to);
        let crossed = newly.into_iter().filter(|level| self.oracle.crosses(*level, before[*level])).collect::<Vec<_>>();
        for level in &crossed {
            self.oracle.record(*level, |events| &mut events.high);
        }
        self.oracle.raise_peaks();
        let crossed: Vec<_> = crossed.into_iter().map(|level| self.id(level)).collect();
        let Moved::Moved(reported) = moved else { panic!("it was elsewhere") };
        assert_eq!(reported.iter().collect::<Vec<_>>(), crossed);
    }

    /// Books a refusal after comparing it with the expected one.
    fn refused(&mut self, refused: Refused, expected: &Expected, mode: Mode) {
        let Expected::Refused(level, counter) = *expected else { panic!("{refused} where {expected:?}") };
        assert_eq!(refused.level, self.id(level));
        assert_eq!(refused.counter, counter.unwrap_or(Counter::Memory));
        self.oracle.refused(level, counter, mode);
    }

    fn charge(&mut self, n: usize, kind: Kind, pages: u64, mode: Mode) {
        let node = self.pick(n);
        let asks: Vec<_> = counters(kind).iter().map(|counter| (*counter, pages)).collect();
        let expected = self.oracle.expect(node, &asks, mode);
        match self.tree.try_charge_as(self.id(node), kind, Pages(pages), mode) {
            Ok(charge) => {
                let Expected::Granted(forced) = expected else { panic!("granted where {expected:?}") };
                assert_eq!(charge.forced_at, forced.map(|level| self.id(level)));
                let crossed = self.oracle.charge(node, kind, pages);
                assert_eq!(charge.crossed_high.iter().collect::<Vec<_>>(), crossed, "edge-triggered");
            }
            Err(refused) => self.refused(refused, &expected, mode),
        }
    }

    fn charge_up_to(&mut self, n: usize, want: u64, min: u64) {
        let node = self.pick(n);
        let off = self.oracle.nodes[node].accounting == Accounting::Off;
        let most = want.max(min);
        let fits = |pages: &u64| self.oracle.first_full(node, Counter::Memory, *pages).is_none();
        let room = match (off, self.oracle.nodes[node].online) {
            (true, _) => most,
            (false, true) => (0..=most).rev().find(fits).unwrap_or(0),
            (false, false) => 0,
        };
        let pages = want.min(room).max(min);
        if pages == 0
            && want > 0
            && let Some(level) = self.oracle.first_full(node, Counter::Memory, 1)
        {
            self.oracle.refused(level, Some(Counter::Memory), Mode::NoRetry);
        }
        let expected = self.oracle.expect(node, &[(Counter::Memory, pages)], Mode::Wait);
        match self.tree.charge_up_to(self.id(node), Pages(want), Pages(min), Mode::Wait) {
            Ok(charge) => {
                assert_eq!((charge.pages.0, &expected), (pages, &Expected::Granted(None)));
                self.oracle.charge(node, Kind::Guest, pages);
            }
            Err(refused) => self.refused(refused, &expected, Mode::Wait),
        }
    }

    fn reserve(&mut self, n: usize, kind: Kind, pages: u64, used: u64) {
        let node = self.pick(n);
        let asks: Vec<_> = counters(kind).iter().map(|counter| (*counter, pages)).collect();
        let expected = self.oracle.expect(node, &asks, Mode::NoWait);
        // Dropped, all of it goes back; else what is not used.
        let kept = (used <= pages).then_some(used);
        let refused = match self.tree.reserve_as(self.id(node), kind, Pages(pages), Mode::NoWait) {
            Ok(reservation) => {
                match kept {
                    Some(used) => assert_eq!(reservation.commit_part(Pages(used)).pages.0, used),
                    None => drop(reservation),
                }
                None
            }
            Err(refused) => Some(refused),
        };
        match refused {
            None => {
                assert!(matches!(expected, Expected::Granted(_)));
                self.oracle.charge(node, kind, pages);
                self.oracle.uncharge(node, kind, pages - kept.unwrap_or(0));
            }
            Some(refused) => self.refused(refused, &expected, Mode::NoWait),
        }
    }

    fn evict(&mut self, n: usize, pages: u64, stored: u64) {
        let node = self.pick(n);
        let off = self.oracle.nodes[node].accounting == Accounting::Off;
        let there = off || (stored <= pages && self.oracle.own(node, Kind::Guest) >= pages);
        // An offline node may be emptied.
        let first = |counter, pages| self.oracle.first_full(node, counter, pages).map(|level| (level, counter));
        let full = first(Counter::Store, stored).or(first(Counter::Swap, pages)).filter(|_| !off);
        match self.tree.evict(self.id(node), Pages(pages), Pages(stored)) {
            Ok(()) => {
                assert!(there && full.is_none());
                self.oracle.uncharge(node, Kind::Guest, pages);
                // Together they are less than what has gone, so nothing is crossed or forced in memory.
                if !off {
                    self.oracle.put(node, Kind::Store, stored);
                    self.oracle.put(node, Kind::Swap, pages);
                    self.oracle.raise_peaks();
                }
            }
            Err(EvictError::Refused(refused)) => {
                let (level, counter) = full.expect("there is room");
                self.refused(refused, &Expected::Refused(level, Some(counter)), Mode::NoWait);
            }
            Err(error) => assert!(!there, "{error}"),
        }
    }

    fn evicted(&mut self, n: usize, stored: u64, swapped: u64) {
        let node = self.pick(n);
        let [guest, store, swap] = [Kind::Guest, Kind::Store, Kind::Swap].map(|kind| self.oracle.own(node, kind));
        let stored = stored.min(guest + store);
        self.tree.settle_evicted(self.id(node), Pages(stored), Pages(swapped));
        let more = [(Counter::Store, stored.saturating_sub(store)), (Counter::Swap, swapped.saturating_sub(swap))];
        if self.oracle.nodes[node].accounting == Accounting::Off {
            return;
        }
        for (counter, pages) in more {
            self.oracle.force(node, counter, pages);
        }
        // Every page is taken off and put back as what it is now.
        for (kind, pages) in [(Kind::Guest, guest), (Kind::Store, store), (Kind::Swap, swap)] {
            self.oracle.uncharge(node, kind, pages);
        }
        for (kind, pages) in [(Kind::Guest, guest + store - stored), (Kind::Store, stored), (Kind::Swap, swapped)] {
            self.oracle.put(node, kind, pages);
        }
        self.oracle.raise_peaks();
    }

    fn refault(&mut self, n: usize, pages: u64, stored: u64, mode: Mode) {
        let node = self.pick(n);
        let off = self.oracle.nodes[node].accounting == Accounting::Off;
        let there = stored <= pages
            && self.oracle.own(node, Kind::Swap) >= pages
            && self.oracle.own(node, Kind::Store) >= stored;
        let more = pages.saturating_sub(stored);
        let mut expected = self.oracle.expect(node, &[(Counter::Memory, more)], mode);
        if !self.oracle.nodes[node].online && mode != Mode::NoFail && !off {
            expected = Expected::Refused(node, None);
        }
        match self.tree.refault(self.id(node), Pages(pages), Pages(stored), mode) {
            Ok(_) if off => {}
            Ok(charge) => {
                assert!(there);
                let Expected::Granted(forced) = expected else { panic!("granted where {expected:?}") };
                assert_eq!(charge.forced_at, forced.map(|level| self.id(level)));
                self.oracle.uncharge(node, Kind::Swap, pages);
                self.oracle.uncharge(node, Kind::Store, stored);
                // What the store held has stayed in memory all the time.
                self.oracle.put(node, Kind::Guest, stored);
                let crossed = self.oracle.charge(node, Kind::Guest, more);
                assert_eq!(charge.crossed_high.iter().collect::<Vec<_>>(), crossed);
            }
            Err(EvictError::Refused(refused)) => self.refused(refused, &expected, mode),
            Err(error) => assert!(!there, "{error}"),
        }
    }

    /// Everything is given back: the tree ends as it began.
    pub fn end(mut self) {
        while !self.running.is_empty() {
            self.cancel(0);
        }
        for n in self.oracle.alive().collect::<Vec<_>>() {
            self.tree.uncharge_all(self.id(n));
        }
        self.oracle.pages.clear();
        loop {
            let left: Vec<_> = self.tree.ids().filter(|id| *id != self.tree.root()).collect();
            if left.is_empty() {
                break;
            }
            for id in left {
                let _ = self.tree.set_offline(id);
            }
            assert!(!self.tree.reap().is_empty(), "each round frees the lowest");
        }
        assert_eq!((self.tree.accounted(), self.tree.usage(self.tree.root())), (0, Pages::ZERO));
    }
}

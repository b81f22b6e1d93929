//! Changes of limits in the model: what waits, and that each is wholly in force or not at all.

use std::time::Duration;

use memcg_core::limit_change::{LimitChange, Mode, Request, State};
use memcg_core::tree::{Accounting, Counter, LimitPatch};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

use super::Run;

/// Limits that are asked for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    max: Option<Option<u64>>,
    high: Option<Option<u64>>,
    vmm_max: Option<Option<u64>>,
    store_max: Option<Option<u64>>,
    swap_max: Option<Option<u64>>,
}

pub fn wanted() -> impl Strategy<Value = Wanted> {
    let large = || prop::option::weighted(0.6, prop::option::weighted(0.8, 0u64..1500));
    let small = || prop::option::weighted(0.2, prop::option::weighted(0.8, 0u64..200));
    (large(), small(), small(), small(), small()).prop_map(|(max, high, vmm_max, store_max, swap_max)| Wanted {
        max,
        high,
        vmm_max,
        store_max,
        swap_max,
    })
}

impl Wanted {
    fn patch(self) -> LimitPatch {
        let limit = |wanted: Option<Option<u64>>| wanted.map(|pages| Limit::from(pages.map(Pages)));
        LimitPatch {
            max: limit(self.max),
            high: limit(self.high),
            vmm_max: limit(self.vmm_max),
            store_max: limit(self.store_max),
            swap_max: limit(self.swap_max),
            ..LimitPatch::default()
        }
    }
}

/// A change that waits.
pub struct Running {
    change: LimitChange,
    /// Its nodes, with what each is to become.
    parts: Vec<(usize, LimitPatch)>,
}

impl Run {
    pub fn begin_change(&mut self, wanted: Vec<(usize, Wanted)>, mode: Mode, wait: u64) {
        let parts: Vec<(usize, LimitPatch)> = wanted.into_iter().map(|(n, w)| (self.pick(n), w.patch())).collect();
        let slack = Pages(4 * wait);
        let requests: Vec<Request> =
            parts.iter().map(|(n, patch)| Request { slack, ..Request::new(self.id(*n), *patch) }).collect();
        let usages = self.oracle.usages();
        let used = |n: usize, counter: Counter| Limit::Pages(Pages(usages[n][counter as usize]));
        let becomes = |(n, patch): &(usize, LimitPatch)| patch.apply(self.oracle.nodes[*n].limits);
        let twice = (1..parts.len()).any(|i| parts[..i].iter().any(|(n, _)| *n == parts[i].0));
        let impossible = parts.iter().any(|part @ (n, patch)| {
            let new = becomes(part);
            (!new.high.is_max() && new.high > new.max)
                || (patch.vmm_max.is_some() && used(*n, Counter::Vmm) > new.vmm_max)
                || (patch.limits_something() && self.oracle.nodes[*n].accounting == Accounting::Off)
        });
        let above = parts.iter().any(|part @ (n, _)| {
            let new = becomes(part).max;
            new < self.oracle.nodes[*n].limits.max && used(*n, Counter::Memory) > new
        });
        let waits = parts.iter().any(|(n, _)| self.waits(*n));
        let change = match LimitChange::begin(&mut self.tree, &requests, mode, at(self.now), at(wait)) {
            Ok(change) => change,
            Err(error) => {
                // What is pending at one of the nodes may contradict it as well.
                assert!(twice || impossible || (mode == Mode::Refuse && above) || waits, "{error}");
                return;
            }
        };
        let refused = mode == Mode::Refuse && above;
        assert!(!twice && !impossible && !refused);
        let pending = change.state() == State::Pending;
        assert_eq!(pending, mode == Mode::Reclaim && above, "nothing waits but for usage to fall");
        // The later request for a `max` takes the place of whatever waits at that node, wholly.
        let overruled = |n: usize| parts.iter().any(|(m, patch)| *m == n && (pending || patch.max.is_some()));
        self.supersede(|running| running.parts.iter().any(|(n, _)| overruled(*n)));
        for (n, patch) in &parts {
            for (_, theirs) in self.running.iter_mut().flat_map(|r| &mut r.parts).filter(|(m, _)| m == n) {
                *theirs = without(*theirs, patch);
            }
        }
        if pending {
            self.running.push(Running { change, parts });
        } else {
            self.commit(&parts);
        }
        self.see_ceilings();
    }

    /// Time passes, and everything that waits looks.
    pub fn wait(&mut self, seconds: u64) {
        self.now += seconds;
        for mut running in std::mem::take(&mut self.running) {
            let late = at(self.now) >= running.change.deadline();
            let usages = self.oracle.usages();
            let fits = running.parts.iter().all(|(n, patch)| {
                let old = self.oracle.nodes[*n].limits;
                let new = patch.apply(old);
                let [memory, vmm] =
                    [Counter::Memory, Counter::Vmm].map(|counter| Limit::Pages(Pages(usages[*n][counter as usize])));
                (new.max >= old.max || memory <= new.max) && (patch.vmm_max.is_none() || vmm <= new.vmm_max)
            });
            match running.change.on_usage(&mut self.tree, at(self.now)) {
                State::Pending => {
                    assert!(!late && !fits);
                    self.running.push(running);
                }
                State::Committed => {
                    assert!(fits, "usage fits every new limit");
                    self.commit(&running.parts);
                }
                State::NotReached => assert!(late && !fits),
                State::Superseded => panic!("nobody has asked for anything else there"),
            }
        }
        self.see_ceilings();
    }

    pub fn cancel(&mut self, n: usize) {
        if !self.running.is_empty() {
            let running = self.running.swap_remove(n % self.running.len());
            running.change.cancel(&mut self.tree);
            self.see_ceilings();
        }
    }

    /// Nodes are gone, and with them what waited there.
    pub fn supersede_gone(&mut self) {
        let gone: Vec<usize> = (0..self.oracle.nodes.len()).filter(|n| self.oracle.nodes[*n].gone).collect();
        self.supersede(|running| running.parts.iter().any(|(n, _)| gone.contains(n)));
        self.see_ceilings();
    }

    /// These have been ended by somebody else: they say so, and do nothing more.
    fn supersede(&mut self, ended: impl Fn(&Running) -> bool) {
        for mut running in std::mem::take(&mut self.running) {
            if ended(&running) {
                assert_eq!(running.change.on_usage(&mut self.tree, at(self.now)), State::Superseded);
            } else {
                self.running.push(running);
            }
        }
    }

    /// All parts in one step, or none: this is where limits change, and nowhere else.
    fn commit(&mut self, parts: &[(usize, LimitPatch)]) {
        for (n, patch) in parts {
            let new = patch.apply(self.oracle.nodes[*n].limits);
            if new != self.oracle.nodes[*n].limits {
                self.oracle.set_limits(*n, new);
            }
        }
    }

    fn waits(&self, node: usize) -> bool {
        self.running.iter().any(|running| running.parts.iter().any(|(n, _)| *n == node))
    }

    /// Ceilings are the change's own affair between these bounds: never below the new limit, never above the old one.
    fn see_ceilings(&mut self) {
        for node in self.oracle.nodes.iter_mut().filter(|node| !node.gone) {
            node.ceiling = None;
        }
        for (n, patch) in self.running.iter().flat_map(|running| &running.parts) {
            let node = &mut self.oracle.nodes[*n];
            let (old, new) = (node.limits.max, patch.max.unwrap_or(node.limits.max));
            let ceiling = self.tree.snapshot(node.id).ceiling;
            match ceiling {
                Some(ceiling) => assert!(new < old && Limit::Pages(ceiling) >= new && Limit::Pages(ceiling) <= old),
                None => assert!(new >= old, "what is to be lowered has a ceiling"),
            }
            node.ceiling = ceiling.map(|pages| pages.0);
        }
    }

    /// What waits reads as the old limits, and as pending.
    pub fn check_changes(&self) {
        for (n, patch) in self.running.iter().flat_map(|running| &running.parts) {
            let snapshot = self.tree.snapshot(self.id(*n));
            assert_eq!(snapshot.max_pending, patch.max);
        }
        for n in self.oracle.alive().filter(|n| !self.waits(*n)) {
            assert_eq!(self.tree.snapshot(self.id(n)).max_pending, None);
        }
    }
}

/// `patch` without what `later` sets.
fn without(patch: LimitPatch, later: &LimitPatch) -> LimitPatch {
    let keep = |mine: Option<Limit>, later: Option<Limit>| mine.filter(|_| later.is_none());
    LimitPatch {
        min: None,
        low: None,
        high: keep(patch.high, later.high),
        max: keep(patch.max, later.max),
        swap_max: keep(patch.swap_max, later.swap_max),
        store_max: keep(patch.store_max, later.store_max),
        vmm_max: keep(patch.vmm_max, later.vmm_max),
        if_generation: None,
    }
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

//! One host, step by step.

use std::collections::BTreeMap;
use std::time::Duration;

use super::choice::Question;
use super::climb::{Climb, Request};
use super::guest::{Guest, State};
use super::outcome::{Event, Outcome, Sample, Sums, VmOutcome, What};
use super::setup::{Client, Policy, Setup, SetupError};
use super::thrash::Thrashing;
use crate::host::{Reading, Verdict, Watch};
use crate::oom::{RETURNS, Victims};
use crate::pressure::{Member, Pressure};
use crate::tree::{Accounting, LimitPatch, NodeId, Tree};
use crate::units::{Limit, Pages};

/// Length of a step while something is under way, and while all is quiet, in milliseconds.
const STEPS: [u64; 2] = [250, 1000];

/// A host with its VMs. See [`super`].
#[derive(Debug)]
pub struct Host {
    pub(super) now: Duration,
    pub(super) memory: Pages,
    pub(super) policy: Policy,
    pub(super) tree: Tree,
    pub(super) vms: Vec<Guest>,
    /// Whose each node is that is a VM's.
    pub(super) owners: BTreeMap<NodeId, usize>,
    /// The VMs at and below each node.
    pub(super) members: BTreeMap<NodeId, Vec<usize>>,
    /// Nodes with a limit at which reclaim begins.
    pub(super) limited: Vec<NodeId>,
    pub(super) watch: Watch,
    pub(super) verdict: Verdict,
    pub(super) requests: Vec<Request>,
    pub(super) climbs: BTreeMap<NodeId, Climb>,
    pub(super) thrashing: Thrashing,
    pub(super) victims: Victims,
    /// When somebody at or below each node was chosen last.
    pub(super) chosen: BTreeMap<NodeId, Duration>,
    pub(super) client: Option<Client>,
    pub(super) questions: BTreeMap<NodeId, Question>,
    /// Memory outside of ballast that a client has made free.
    pub(super) freed: Pages,
    pub(super) sums: Sums,
    others: Vec<(Duration, Pages)>,
    pressure: Pressure,
    counted: Vec<Member>,
    look: Duration,
    steps: usize,
    events: Vec<Event>,
    samples: Vec<Sample>,
}

impl Host {
    /// The host before anything has happened.
    ///
    /// # Errors
    /// [`SetupError`] when a group or a VM cannot be there.
    pub fn new(setup: Setup) -> Result<Host, SetupError> {
        let mut tree = Tree::new(setup.budget);
        for group in &setup.groups {
            let (above, name) = group.path.rsplit_once('/').unwrap_or(("", &group.path));
            add(&mut tree, above, name, &group.limits)?;
        }
        let count = setup.vms.len();
        let (mut vms, mut owners) = (Vec::with_capacity(count), BTreeMap::new());
        let mut members: BTreeMap<NodeId, Vec<usize>> = BTreeMap::new();
        for (index, vm) in setup.vms.into_iter().enumerate() {
            let mut limits = vm.limits;
            if let (Some(Limit::Pages(max)), None) = (limits.max, limits.store_max) {
                // As the controller does where nobody sets it.
                limits.store_max = Some(Limit::Pages(Pages(max.0 / 2)));
            }
            let node = add(&mut tree, &vm.group, &vm.name, &limits)?;
            owners.insert(node, index);
            for at in tree.ancestry(node) {
                members.entry(at).or_default().push(index);
            }
            vms.push(Guest::new(vm, node, &mut tree));
        }
        let limited = tree.ids().filter(|id| !tree.reclaim_high(*id).is_max()).collect();
        Ok(Host {
            now: Duration::ZERO,
            memory: setup.memory,
            policy: setup.policy,
            tree,
            vms,
            owners,
            members,
            limited,
            watch: Watch::new(setup.terms),
            verdict: Verdict::default(),
            requests: Vec::new(),
            climbs: BTreeMap::new(),
            thrashing: Thrashing::default(),
            victims: Victims::new(RETURNS),
            chosen: BTreeMap::new(),
            client: setup.client,
            questions: BTreeMap::new(),
            freed: Pages::ZERO,
            sums: Sums::default(),
            others: setup.others,
            pressure: Pressure::new(Duration::ZERO),
            counted: vec![Member::Idle; count],
            look: Duration::ZERO,
            steps: 0,
            events: Vec::new(),
            samples: Vec::new(),
        })
    }

    /// Goes on until then, and looks at itself every so often.
    pub fn run(mut self, until: Duration, every: Duration) -> Outcome {
        let mut next = Duration::ZERO;
        while self.now < until {
            if self.now >= next {
                self.sample();
                next += every.max(Duration::from_millis(STEPS[0]));
            }
            self.step(next.min(until));
        }
        self.sample();
        let vms = self.vms.iter().map(|vm| self.became(vm)).collect();
        Outcome { sums: self.summed(), events: self.events, samples: self.samples, vms }
    }

    /// Memory that is left.
    pub(super) fn available(&self) -> Pages {
        let others = self.others.iter().take_while(|(from, _)| *from <= self.now).last();
        let others = others.map_or(Pages::ZERO, |(_, pages)| *pages).saturating_sub(self.freed);
        self.memory.saturating_sub(others).saturating_sub(self.tree.usage(self.tree.root()))
    }

    /// Notes what was decided.
    pub(super) fn tell(&mut self, what: What) {
        self.events.push(Event { at: self.now, what });
    }

    /// Goes on by a step, not beyond `end`.
    fn step(&mut self, end: Duration) {
        let left = end.saturating_sub(self.now).as_millis() as u64;
        let ms = STEPS[usize::from(self.is_quiet())].min(left).max(1);
        self.now += Duration::from_millis(ms);
        self.end_those_who_end();
        self.live(ms);
        // Guests that want more take what comes back as it comes, so what is left is looked at before more comes.
        self.look();
        self.climb(ms);
        self.thrash();
        self.answer();
        self.hold();
        self.resume();
    }

    /// Whether nothing is under way.
    fn is_quiet(&self) -> bool {
        self.verdict.short.is_none()
            && self.climbs.is_empty()
            && self.questions.is_empty()
            && self.look > self.now
            && self.vms.iter().all(|vm| vm.state != State::Ending && vm.refused.is_none())
    }

    /// A user ends VMs.
    fn end_those_who_end(&mut self) {
        for vm in &mut self.vms {
            if vm.setup.ends.is_some_and(|ends| ends <= self.now) && vm.is_alive() {
                vm.state = State::Ending;
            }
        }
    }

    fn live(&mut self, ms: u64) {
        let mut room = self.available().0;
        let count = self.vms.len();
        let mut waits = false;
        // Whoever comes first gets what is there, so it is another one each time.
        for at in (0..count).map(|place| (place + self.steps) % count) {
            let vm = &mut self.vms[at];
            vm.live(&mut self.tree, ms, &mut room);
            let member = if vm.state == State::Runs { vm.member } else { Member::Idle };
            waits |= member == Member::Fully;
            let before = std::mem::replace(&mut self.counted[at], member);
            if before != member {
                self.pressure.change(self.now, before, member);
            }
        }
        self.steps += 1;
        if waits {
            self.sums.exhausted += Duration::from_millis(ms);
        }
    }

    /// Looks at the host when it is time.
    fn look(&mut self) {
        if self.look > self.now {
            return;
        }
        let stalled = Some(self.pressure.full(self.now).total);
        let reading = Reading { available: self.available(), stalled };
        let asked = self.asked();
        let before = std::mem::replace(&mut self.verdict, self.watch.step(self.now, reading, asked));
        self.look = self.now + self.watch.next_look(reading);
        match (before.short, self.verdict.short) {
            (None, Some(sign)) => self.tell(What::Short(sign)),
            (Some(_), None) => self.tell(What::Calm),
            _ => {}
        }
        if !self.verdict.reclaim.is_zero() {
            self.ask(asked + self.verdict.reclaim);
        }
        let root = self.tree.root();
        if self.verdict.victim && self.choose(root) {
            self.watch.chosen(self.now);
        }
    }

    fn summed(&self) -> Sums {
        let total = |of: fn(&Guest) -> u64| self.vms.iter().map(of).sum::<u64>();
        Sums {
            refaulted: Pages(total(|vm| vm.refaulted)),
            stalled: Duration::from_micros(total(|vm| vm.stalled_us)),
            paused: Duration::from_millis(total(|vm| vm.paused)),
            ..self.sums
        }
    }

    fn sample(&mut self) {
        let are = |wanted: fn(&Guest) -> bool| self.vms.iter().filter(|vm| wanted(vm)).count() as u64;
        let sample = Sample {
            at: self.now,
            available: self.available(),
            used: self.tree.usage(self.tree.root()),
            swapped: self.vms.iter().map(Guest::swapped).sum(),
            running: are(|vm| vm.state == State::Runs),
            paused: are(|vm| matches!(vm.state, State::Paused { .. })),
            sums: self.summed(),
        };
        self.samples.push(sample);
    }

    fn became(&self, vm: &Guest) -> VmOutcome {
        VmOutcome {
            name: vm.setup.name.clone(),
            lived: Duration::from_millis(vm.lived),
            wanted: Duration::from_millis(vm.wanted),
            killed: vm.killed,
            paused: matches!(vm.state, State::Paused { .. }),
            usage: self.tree.usage(vm.node),
        }
    }
}

/// Adds a node that is charged from the start.
fn add(tree: &mut Tree, above: &str, name: &str, limits: &LimitPatch) -> Result<NodeId, SetupError> {
    let parent = tree.find(above).ok_or_else(|| SetupError::NoGroup(above.to_owned()))?;
    let bad = |why| SetupError::Bad { path: format!("{}/{name}", above.trim_end_matches('/')), why };
    tree.add_with(parent, name, limits, Accounting::On).map_err(bad)
}

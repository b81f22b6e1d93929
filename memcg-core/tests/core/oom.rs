//! Who is chosen when nobody can give more.

use std::collections::BTreeMap;
use std::time::Duration;

use memcg_core::oom::{
    Action, Answer, Attributes, Candidate, Choice, Decision, DecisionError, Nobody, Preference, Ranked, Report,
    Resolved, Spared, Victims, Waiting, candidates, level, rank, standing,
};
use memcg_core::protection::Protection;
use memcg_core::spread::{Facts, Terms, claimants, spread};
use memcg_core::tree::{Kind, LimitPatch, Mode, NodeId, Overhead, Tree};
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

use crate::nodes::{group, vm};

const PATIENCE: Duration = Duration::from_secs(10);

fn mib(n: u64) -> Pages {
    Pages::from_mib(n)
}

fn limit(n: u64) -> Limit {
    Limit::Pages(mib(n))
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// A group of 300M with `a` (100M) and `b` (200M), and `c` (600M) beside it.
struct Host {
    tree: Tree,
    root: NodeId,
    group: NodeId,
    a: NodeId,
    b: NodeId,
    c: NodeId,
    attributes: BTreeMap<NodeId, Attributes>,
}

impl Host {
    fn new() -> Host {
        let mut tree = Tree::new(limit(900));
        let root = tree.root();
        let group = group(&mut tree, root, "group");
        let (a, b) = (vm(&mut tree, group, "a"), vm(&mut tree, group, "b"));
        let c = vm(&mut tree, root, "c");
        tree.set_limits(group, &LimitPatch::max(limit(300))).unwrap();
        for (id, usage) in [(a, 100), (b, 200), (c, 600)] {
            let _ = tree.try_charge(id, mib(usage), Mode::Wait).unwrap();
        }
        let attributes = [a, b, c].map(|id| (id, Attributes::default())).into();
        Host { tree, root, group, a, b, c, attributes }
    }

    fn set(&mut self, id: NodeId, change: impl FnOnce(&mut Attributes)) {
        change(self.attributes.get_mut(&id).unwrap());
    }

    fn rank(&self, level: NodeId) -> Vec<Ranked<'_>> {
        rank(&candidates(&self.tree, level, |id| self.attributes.get(&id).copied()))
    }

    fn order(&self, level: NodeId) -> Vec<NodeId> {
        self.rank(level).iter().map(|ranked| ranked.candidate.id).collect()
    }

    /// The choice at `level` without what it borrows.
    fn decide(&self, victims: &mut Victims, level: NodeId, now: Duration) -> Chosen {
        match victims.decide(&self.tree, level, &self.rank(level), now) {
            Choice::Wait(waiting) => Chosen::Wait(waiting),
            Choice::Act(ranked) => Chosen::Act(ranked.candidate.id),
            Choice::Nobody(nobody) => Chosen::Nobody(nobody),
        }
    }
}

#[derive(Debug, PartialEq)]
enum Chosen {
    Wait(Waiting),
    Act(NodeId),
    Nobody(Nobody),
}

/// An out-of-memory group must not reach outside, not for the biggest VM of the host, and not when it has nobody to
/// choose: membership decides who is in the list, and no score brings an outsider in.
/// Semantics: 48, 63, B40.
#[test]
fn a_victim_is_of_the_subtree_or_nobody() {
    let mut host = Host::new();
    let refused = host.tree.try_charge(host.a, mib(1), Mode::Wait).unwrap_err();
    let at = level(Mode::Wait, &refused).unwrap();
    assert_eq!(at, host.group);
    assert_eq!(host.order(at), [host.b, host.a]);
    assert_eq!(host.order(host.root), [host.c, host.b, host.a], "the host's limit is everybody's");

    for id in [host.a, host.b] {
        host.set(id, |attributes| attributes.preference = Preference::Omit);
    }
    let mut victims = Victims::new(PATIENCE);
    let nobody = Nobody { omitted: 2, ..Nobody::default() };
    assert_eq!(host.decide(&mut victims, at, secs(0)), Chosen::Nobody(nobody));
    // Not even with a list of the whole host.
    let outside = Nobody { outside: 1, ..nobody };
    assert_eq!(victims.decide(&host.tree, at, &host.rank(host.root), secs(0)), Choice::Nobody(outside));
}

/// The one that asked is not taken because nobody else is there: its charge stays refused, it stays held, it lives.
/// Semantics: 49, B41.
#[test]
fn when_all_are_omitted_nobody_goes() {
    let mut host = Host::new();
    host.tree.set_limits(host.a, &LimitPatch::max(limit(100))).unwrap();
    host.set(host.a, |attributes| attributes.preference = Preference::Omit);
    let refused = host.tree.try_charge(host.a, Pages(1), Mode::Wait).unwrap_err();
    let mut victims = Victims::new(PATIENCE);
    let nobody = Nobody { omitted: 1, ..Nobody::default() };
    assert_eq!(host.decide(&mut victims, refused.level, secs(0)), Chosen::Nobody(nobody));
    assert_eq!(nobody.to_string(), "nobody can be chosen: 1 omitted");
    assert!(host.tree.try_charge(host.a, Pages(1), Mode::Again).is_err());
    // Where there is no VM at all, that is said.
    assert_eq!(victims.decide(&host.tree, host.group, &[], secs(0)), Choice::Nobody(Nobody::default()));
    assert_eq!(Nobody::default().to_string(), "there is no VM to choose");
    // One that may go goes before one that may not, however much smaller.
    host.set(host.b, |attributes| attributes.preference = Preference::Omit);
    host.set(host.a, |attributes| attributes.preference = Preference::Avoid);
    assert_eq!(host.decide(&mut victims, host.group, secs(0)), Chosen::Act(host.a));
}

fn candidate(id: NodeId, name: &str) -> Candidate<'_> {
    Candidate {
        id,
        name,
        usage: mib(100),
        vmm: Pages::ZERO,
        protection: Protection::NONE,
        attributes: Attributes::default(),
    }
}

/// The order, one rule after the other: each pair differs in what the rule is about, and everything below it speaks for
/// the other one. And each line says why.
/// Semantics: 49.
#[test]
fn the_order_and_its_sentences() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let (id, other) = (vm(&mut tree, root, "x"), vm(&mut tree, root, "y"));
    let of = |usage, min, low, attributes| Candidate {
        usage: mib(usage),
        protection: Protection { min: mib(min), low: mib(low) },
        attributes,
        ..candidate(id, "x")
    };
    let kill = Attributes::default();
    let pause = |frees| Attributes { action: Action::Pause { frees: mib(frees) }, ..kill };
    let emptied = Attributes { given: Some(mib(400)), ..pause(0) };
    let omit = Attributes { preference: Preference::Omit, priority: -9, ..kill };
    let avoid = Attributes { preference: Preference::Avoid, priority: -9, ..kill };
    let first = Attributes { priority: -1, ..kill };
    let later = Attributes { priority: 3, ..kill };
    let ending = Attributes { ending: true, priority: -9, ..kill };
    let list = [
        (of(540, 0, 128, first), None, "x: 412M above its protection of 128M, priority -1"),
        (of(1000, 0, 0, kill), None, "x: 1000M above its protection of 0, priority 0"),
        (of(1200, 0, 400, kill), None, "x: 800M above its protection of 400M, priority 0"),
        (of(3000, 0, 0, pause(700)), None, "x: a pause frees 700M of 2.9G above its protection of 0, priority 0"),
        (of(650, 0, 0, kill), None, "x: 650M above its protection of 0, priority 0"),
        // A pause frees 900M, but what is above its protection counts.
        (
            of(1000, 400, 0, pause(900)),
            None,
            "x: a pause frees 900M, 600M of it above its protection of 400M, priority 0",
        ),
        (of(600, 0, 0, kill), None, "x: 600M above its protection of 0, priority 0"),
        // Within its low, though not within its min: the last of its class, and no reason to spare it.
        (of(700, 100, 700, kill), None, "x: 0 above its protection of 700M, priority 0"),
        (of(9000, 0, 0, later), None, "x: 8.8G above its protection of 0, priority 3"),
        (of(9999, 0, 0, avoid), None, "x: 9.8G above its protection of 0, priority -9, to be avoided"),
        (of(500, 0, 0, ending), Some(Spared::Ending), "x: spared: it is ending, with 500M to come back"),
        (of(300, 300, 0, kill), Some(Spared::WithinMin), "x: spared: 300M in use are within its memory.min of 300M"),
        (of(200, 0, 0, pause(0)), Some(Spared::FreesNothing), "x: spared: a pause would free nothing"),
        (of(90, 0, 0, emptied), Some(Spared::FreesNothing), "x: spared: it has been paused, and has given 400M"),
        (of(0, 0, 0, kill), Some(Spared::FreesNothing), "x: spared: it has nothing"),
        (of(9999, 0, 0, omit), Some(Spared::Omit), "x: spared: its preference is omit"),
    ];
    let mut shuffled: Vec<Candidate<'_>> = list.iter().map(|(candidate, ..)| *candidate).collect();
    shuffled.rotate_left(7);
    shuffled.reverse();
    let ranked = rank(&shuffled);
    for (ranked, (candidate, spared, sentence)) in ranked.iter().zip(&list) {
        assert_eq!((&ranked.candidate, ranked.spared), (candidate, *spared));
        assert_eq!(ranked.to_string(), *sentence);
    }
    assert_eq!(ranked.len(), list.len());
    // Equal in everything: the name, then the older one.
    let (x, y) = (candidate(id, "x"), candidate(id, "y"));
    assert_eq!(rank(&[y, x])[0].candidate.name, "x");
    let (x, y) = (candidate(id, "x"), candidate(other, "x"));
    assert_eq!(rank(&[y, x])[0].candidate.id, id);
}

/// A paused guest frees nothing by itself. If pausing counted as a remedy each time, everybody would be paused.
/// Semantics: 49.
#[test]
fn a_pause_is_worth_what_it_frees() {
    let mut host = Host::new();
    host.set(host.b, |attributes| attributes.action = Action::Pause { frees: mib(90) });
    assert_eq!(host.order(host.group), [host.a, host.b], "killing a frees 100M, pausing b only 90M");
    host.set(host.b, |attributes| attributes.action = Action::Pause { frees: mib(150) });
    let mut victims = Victims::new(PATIENCE);
    assert_eq!(host.decide(&mut victims, host.group, secs(0)), Chosen::Act(host.b));
    host.tree.uncharge(host.b, mib(149));
    let waiting = Waiting { id: host.b, returning: mib(1), until: secs(10) };
    assert_eq!(host.decide(&mut victims, host.group, secs(1)), Chosen::Wait(waiting));
    // What could be had is back: it has nothing more to give while it is paused, so another goes if it must be.
    host.tree.uncharge(host.b, mib(1));
    host.set(host.b, |attributes| attributes.action = Action::Pause { frees: mib(0) });
    assert_eq!(host.decide(&mut victims, host.group, secs(2)), Chosen::Act(host.a));
}

/// A VM alone over its limit is the victim itself, though all of it is protected from others; while it is dying a
/// second refusal chooses nobody else.
/// Semantics: 47.
#[test]
fn one_victim_until_its_memory_is_back() {
    let mut host = Host::new();
    let mut victims = Victims::new(PATIENCE);
    let protected = LimitPatch { min: Some(Limit::Max), ..LimitPatch::max(limit(100)) };
    host.tree.set_limits(host.a, &protected).unwrap();
    let refused = host.tree.try_charge(host.a, Pages(1), Mode::Wait).unwrap_err();
    assert_eq!(refused.level, host.a);
    assert_eq!(host.decide(&mut victims, host.a, secs(1)), Chosen::Act(host.a));
    // Its memory will help the group and the host as well: they wait too.
    let waiting = |returning| Chosen::Wait(Waiting { id: host.a, returning, until: secs(11) });
    for level in [host.a, host.group, host.root] {
        assert_eq!(host.decide(&mut victims, level, secs(2)), waiting(mib(100)));
    }
    host.tree.uncharge(host.a, mib(99));
    assert_eq!(host.decide(&mut victims, host.group, secs(10)), waiting(mib(1)));
    host.tree.set_offline(host.a).unwrap();
    host.tree.uncharge(host.a, mib(1));
    host.tree.remove(host.a).unwrap();
    assert_eq!(host.decide(&mut victims, host.group, secs(10)), Chosen::Act(host.b));
}

/// A victim that does not end, or cannot be ended, must not hold the others for ever; nor is it chosen again and again.
/// Where it was paused, it may still be killed.
/// Semantics: 47.
#[test]
fn who_does_not_end_in_time_is_followed_by_the_next() {
    let mut host = Host::new();
    let mut victims = Victims::new(PATIENCE);
    host.set(host.b, |attributes| attributes.action = Action::Pause { frees: mib(150) });
    assert_eq!(host.decide(&mut victims, host.group, secs(0)), Chosen::Act(host.b));
    assert_eq!(host.decide(&mut victims, host.group, secs(10)), Chosen::Act(host.a), "the patience is over");
    victims.failed(host.a);
    let late = Nobody { late: 2, ..Nobody::default() };
    assert_eq!(host.decide(&mut victims, host.group, secs(10)), Chosen::Nobody(late), "each has had its turn");
    host.set(host.b, |attributes| attributes.action = Action::Kill);
    assert_eq!(host.decide(&mut victims, host.group, secs(11)), Chosen::Act(host.b));
    assert_eq!(host.decide(&mut victims, host.group, secs(21)), Chosen::Nobody(late));
    // Somebody found memory and resumed a: it is like any other again.
    victims.forget(host.a);
    assert_eq!(host.decide(&mut victims, host.group, secs(22)), Chosen::Act(host.a));
}

/// Any dying task of the whole system suspended the kernel's choice, and the charge failed though nothing came back to
/// its group. Here only what helps is waited for.
/// Semantics: B42.
#[test]
fn a_victim_elsewhere_suspends_nothing() {
    let host = Host::new();
    let mut victims = Victims::new(PATIENCE);
    assert_eq!(host.decide(&mut victims, host.c, secs(0)), Chosen::Act(host.c));
    assert_eq!(host.decide(&mut victims, host.group, secs(1)), Chosen::Act(host.b));
    // The host waits for the one that is waited for longest.
    let waiting = Waiting { id: host.b, returning: mib(200), until: secs(11) };
    assert_eq!(host.decide(&mut victims, host.root, secs(2)), Chosen::Wait(waiting));
    // A sibling's memory does not help at a VM's own limit.
    assert_eq!(host.decide(&mut victims, host.a, secs(2)), Chosen::Act(host.a));
}

/// The kernel failed the charge at once after the kill, so the one that asked died too. Two VMs in one group: the big
/// one goes, the charge of the small one is retried when that memory is back, and it goes on; one failure is counted.
/// Semantics: 50, B43.
#[test]
fn the_charge_is_retried_when_the_victim_s_memory_is_back() {
    let mut host = Host::new();
    let mut victims = Victims::new(PATIENCE);
    assert!(host.tree.try_charge(host.a, mib(50), Mode::Wait).is_err());
    assert_eq!(host.decide(&mut victims, host.group, secs(0)), Chosen::Act(host.b));
    host.tree.set_offline(host.b).unwrap();
    // Dying: nothing is back yet, so the charge is refused again, and nobody else is chosen for that.
    let refused = host.tree.try_charge(host.a, mib(50), Mode::Again).unwrap_err();
    let at = level(Mode::Again, &refused).unwrap();
    assert!(matches!(host.decide(&mut victims, at, secs(1)), Chosen::Wait(_)));
    host.tree.uncharge_all(host.b);
    let charge = host.tree.try_charge(host.a, mib(50), Mode::Again).unwrap();
    assert_eq!((charge.pages, host.tree.usage(host.a)), (mib(50), mib(150)));
    assert_eq!(host.tree.snapshot(host.group).memory.failcnt, 1);
    assert_eq!(victims.waiting(&host.tree, host.group, secs(2)), None);
}

/// Charges ahead of need, and those that can be left for later, fail by the thousand near a limit. None of them may
/// cost a VM; neither may overhead, which no victim's pages make room for.
/// Semantics: 84, B52.
#[test]
fn only_charges_that_wait_have_victims() {
    let mut host = Host::new();
    let mut victims = 0;
    for mode in [Mode::NoWait, Mode::NoRetry] {
        for _ in 0..10_000 {
            let refused = host.tree.try_charge(host.a, mib(1), mode).unwrap_err();
            victims += usize::from(level(mode, &refused).is_some());
        }
    }
    assert_eq!(victims, 0);
    for mode in [Mode::Wait, Mode::Again] {
        let refused = host.tree.try_charge(host.a, mib(1), mode).unwrap_err();
        assert_eq!(level(mode, &refused), Some(host.group));
    }
    let none = LimitPatch { vmm_max: Some(Limit::ZERO), ..LimitPatch::max(Limit::Max) };
    host.tree.set_limits(host.group, &none).unwrap();
    let refused = host.tree.try_charge_as(host.a, Kind::Overhead(Overhead::Vcpu), mib(1), Mode::Wait).unwrap_err();
    assert_eq!(level(Mode::Wait, &refused), None);
}

/// All of a VM is pinned: reclaim says at once that it can do nothing, and the choice of a victim follows without
/// another round; when that is nobody, that too is said.
/// Semantics: 44.
#[test]
fn the_last_rung_reports_its_failure() {
    let mut host = Host::new();
    host.tree.set_limits(host.a, &LimitPatch::max(limit(100))).unwrap();
    let pinned = Facts { pinned: mib(100), ..Facts::default() };
    let given = spread(mib(1), &claimants(&host.tree, host.a, |_| Some(pinned)), &Terms::default());
    assert_eq!(given.short, mib(1));
    let mut victims = Victims::new(PATIENCE);
    host.set(host.a, |attributes| attributes.action = Action::Pause { frees: mib(100).saturating_sub(pinned.pinned) });
    let nothing = Nobody { free_nothing: 1, ..Nobody::default() };
    assert_eq!(host.decide(&mut victims, host.a, secs(0)), Chosen::Nobody(nothing));
    host.set(host.a, |attributes| attributes.action = Action::Kill);
    assert_eq!(host.decide(&mut victims, host.a, secs(0)), Chosen::Act(host.a));
}

/// What is within its `min` is not ended for others' need either. What is offline is ending, though nobody has chosen
/// it: its memory is waited for like a victim's, and not for longer.
/// Semantics: 47, T2.
#[test]
fn min_and_a_grave_spare_a_vm() {
    let mut host = Host::new();
    let all = LimitPatch { min: Some(Limit::Max), ..LimitPatch::default() };
    host.tree.set_limits(host.b, &all).unwrap();
    host.tree.set_offline(host.a).unwrap();
    let mut victims = Victims::new(PATIENCE);
    let waiting = Waiting { id: host.a, returning: mib(100), until: secs(10) };
    for now in [secs(0), secs(9)] {
        assert_eq!(host.decide(&mut victims, host.group, now), Chosen::Wait(waiting));
    }
    let nobody = Nobody { ending: 1, within_min: 1, ..Nobody::default() };
    assert_eq!(host.decide(&mut victims, host.group, secs(10)), Chosen::Nobody(nobody));
    assert_eq!(nobody.to_string(), "nobody can be chosen: 1 ending, 1 within memory.min");
}

/// A paused victim has not helped, and then its user kills it: now all its memory is coming back, so nobody else goes.
/// Semantics: 47.
#[test]
fn an_end_for_another_reason_is_waited_for() {
    let mut host = Host::new();
    host.set(host.b, |attributes| attributes.action = Action::Pause { frees: mib(150) });
    let mut victims = Victims::new(PATIENCE);
    assert_eq!(host.decide(&mut victims, host.group, secs(0)), Chosen::Act(host.b));
    host.set(host.b, |attributes| attributes.ending = true);
    let waiting = Waiting { id: host.b, returning: mib(200), until: secs(20) };
    assert_eq!(host.decide(&mut victims, host.group, secs(10)), Chosen::Wait(waiting));
    assert_eq!(host.decide(&mut victims, host.group, secs(20)), Chosen::Act(host.a));
}

/// A client raises the limit and nobody goes; it names a VM and that one goes; it is silent and the built-in policy
/// decides when its time is over.
/// Semantics: 51, T7.
#[test]
fn a_client_may_decide_first() {
    let mut host = Host::new();
    let mut victims = Victims::new(PATIENCE);
    let asked = Decision::new(host.group, secs(1), secs(2));
    assert_eq!((asked.level(), asked.deadline()), (host.group, secs(3)));
    let just_before = Duration::from_millis(2999);
    {
        let ranked = host.rank(host.group);
        assert_eq!(asked.resolve(None, &ranked, just_before), Ok(Resolved::Open));
        assert_eq!(asked.resolve(Some(Answer::Ignore), &ranked, just_before), Ok(Resolved::Leave));
        // The built-in policy would have taken b.
        let answer = Some(Answer::Act(host.a, Action::Kill));
        let Ok(Resolved::Chosen(chosen)) = asked.resolve(answer, &ranked, just_before) else {
            panic!("a client's answer is followed");
        };
        assert_eq!(victims.clone().decide(&host.tree, host.group, &[chosen], secs(3)), Choice::Act(chosen));
        assert_eq!(chosen.candidate.id, host.a);
        // Silent, or too late: the built-in policy.
        assert_eq!(asked.resolve(None, &ranked, secs(3)), Ok(Resolved::BuiltIn));
        assert_eq!(asked.resolve(answer, &ranked, secs(3)), Ok(Resolved::BuiltIn));
    }
    assert_eq!(host.decide(&mut victims.clone(), host.group, secs(3)), Chosen::Act(host.b));
    // More memory.
    assert!(host.tree.try_charge(host.a, mib(1), Mode::Wait).is_err());
    host.tree.set_limits(host.group, &LimitPatch::max(limit(310))).unwrap();
    host.tree.set_limits(host.root, &LimitPatch::max(limit(910))).unwrap();
    assert_eq!(asked.resolve(Some(Answer::Raised), &host.rank(host.group), secs(2)), Ok(Resolved::Retry));
    assert!(host.tree.try_charge(host.a, mib(1), Mode::Again).is_ok());
    assert_eq!(victims.waiting(&host.tree, host.root, secs(2)), None, "nobody went");
}

/// A client knows better than preference and protection, but it cannot gain anything by a VM elsewhere, or by one that
/// has nothing to give; then it may answer again.
/// Semantics: 51, B40.
#[test]
fn a_client_s_answer_must_help() {
    let mut host = Host::new();
    host.set(host.a, |attributes| attributes.preference = Preference::Omit);
    host.set(host.b, |attributes| attributes.ending = true);
    let asked = Decision::new(host.group, secs(0), secs(2));
    let ranked = host.rank(host.group);
    let resolve = |id, action| asked.resolve(Some(Answer::Act(id, action)), &ranked, secs(1));
    let pause = |frees| Action::Pause { frees: mib(frees) };
    assert_eq!(resolve(host.c, Action::Kill), Err(DecisionError::NotACandidate));
    assert_eq!(resolve(host.b, Action::Kill), Err(DecisionError::Useless("b".to_owned())));
    assert_eq!(resolve(host.a, pause(0)), Err(DecisionError::Useless("a".to_owned())));
    let Ok(Resolved::Chosen(chosen)) = resolve(host.a, pause(30)) else {
        panic!("a client may choose what the policy spares");
    };
    assert_eq!((chosen.candidate.id, chosen.frees, chosen.spared), (host.a, mib(30), None));
    let mut victims = Victims::new(PATIENCE);
    assert_eq!(victims.decide(&host.tree, host.group, &[chosen], secs(1)), Choice::Act(chosen));
}

/// What is said must name the group, the victim, and the numbers that explain it, or nobody will believe it.
/// Semantics: 47, 74.
#[test]
fn the_report_has_all_numbers() {
    let mut host = Host::new();
    host.tree.uncharge(host.a, mib(10));
    let _ = host.tree.try_charge_as(host.a, Kind::Overhead(Overhead::Vcpu), mib(10), Mode::Wait).unwrap();
    host.set(host.a, |attributes| attributes.stock = mib(8));
    assert!(host.tree.try_charge(host.a, mib(1), Mode::Wait).is_err());
    let mut victims = Victims::new(PATIENCE);
    let table = host.rank(host.group);
    let choice = victims.decide(&host.tree, host.group, &table, secs(0));
    let report = Report::new(&host.tree, host.group, choice, table);
    assert_eq!(
        report.to_string(),
        "out of memory in /group: memory 300M of 300M, failcnt 1; vmm 10M of max, failcnt 0; \
         kill b: 200M above its protection of 0, priority 0"
    );
    let small = &report.table[1].candidate;
    assert_eq!((small.name, small.usage, small.vmm, small.attributes.stock), ("a", mib(100), mib(10), mib(8)));
    let line = |choice| Report { choice, ..report.clone() }.to_string();
    let waiting = Waiting { id: host.b, returning: mib(200), until: secs(10) };
    assert!(line(Choice::Wait(waiting)).ends_with("; waiting for 200M of a victim"));
    let nobody = Nobody { omitted: 1, late: 2, ..Nobody::default() };
    assert!(line(Choice::Nobody(nobody)).ends_with("; nobody can be chosen: 1 omitted, 2 not ended in time"));
}

fn attributes() -> impl Strategy<Value = Attributes> {
    let action = prop_oneof![
        2 => Just(Action::Kill),
        1 => (0u64..600).prop_map(|frees| Action::Pause { frees: Pages(frees) }),
    ];
    let preference =
        prop::sample::select(vec![Preference::None, Preference::None, Preference::Avoid, Preference::Omit]);
    (action, preference, -1i32..2, prop::bool::weighted(0.1)).prop_map(|(action, preference, priority, ending)| {
        Attributes { action, preference, priority, ending, stock: Pages::ZERO, given: None }
    })
}

#[derive(Clone, Debug)]
enum Op {
    Decide { level: prop::sample::Index },
    Return { vm: prop::sample::Index, pages: u64 },
    Fail { vm: prop::sample::Index },
    Later { secs: u64 },
    Earlier { secs: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        4 => index().prop_map(|level| Op::Decide { level }),
        2 => (index(), 0u64..600).prop_map(|(vm, pages)| Op::Return { vm, pages }),
        1 => index().prop_map(|vm| Op::Fail { vm }),
        2 => (1u64..8).prop_map(|secs| Op::Later { secs }),
        1 => (1u64..80).prop_map(|secs| Op::Earlier { secs }),
    ]
}

/// Two levels of groups with `usage` pages in each VM, and every node.
fn forest(usage: &[u64]) -> (Tree, Vec<NodeId>, Vec<NodeId>) {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let left = group(&mut tree, root, "left");
    let right = group(&mut tree, root, "right");
    let inner = group(&mut tree, left, "inner");
    let groups = [root, left, right, inner];
    let mut vms = Vec::new();
    for (n, usage) in usage.iter().enumerate() {
        let id = vm(&mut tree, groups[n % 4], &format!("v{n}"));
        let low = Some(Limit::Pages(Pages(usage / 4)));
        tree.set_limits(id, &LimitPatch { min: Some(Limit::Pages(Pages(20))), low, ..LimitPatch::default() }).unwrap();
        let _ = tree.try_charge(id, Pages(*usage), Mode::Wait).unwrap();
        vms.push(id);
    }
    let all = groups.into_iter().chain(vms.iter().copied()).collect();
    (tree, vms, all)
}

proptest! {
    /// A total order: the same list for whatever order of the candidates, each of them once, nobody who is spared before
    /// anybody who is not, no line before one that should be chosen first.
    /// Semantics: 49.
    #[test]
    fn ranking_is_a_total_order(
        each in prop::collection::vec((0u64..500, 0u64..200, 0u64..200, attributes()), 0..20),
        seed in any::<u64>(),
    ) {
        let (_, vms, _) = forest(&vec![0; each.len()]);
        let candidates: Vec<Candidate<'_>> = vms.iter().zip(&each).map(|(id, (usage, min, low, attributes))| Candidate {
            usage: Pages(*usage),
            protection: Protection { min: Pages(*min.min(usage)), low: Pages(*low.min(usage)) },
            attributes: *attributes,
            ..candidate(*id, "same")
        }).collect();
        let ranked = rank(&candidates);
        let mut shuffled = candidates.clone();
        shuffled.sort_by_key(|candidate| (candidate.usage.0 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        prop_assert_eq!(&ranked, &rank(&shuffled));
        let mut ids: Vec<NodeId> = ranked.iter().map(|ranked| ranked.candidate.id).collect();
        ids.sort();
        prop_assert_eq!(ids, vms);
        for pair in ranked.windows(2) {
            let key = |ranked: &Ranked<'_>| {
                let Attributes { preference, priority, .. } = ranked.candidate.attributes;
                let score = i64::try_from(ranked.score.0).unwrap();
                (ranked.spared.is_some(), preference, priority, -score)
            };
            prop_assert!(key(&pair[0]) <= key(&pair[1]));
        }
        for Ranked { candidate, frees, score, spared } in ranked {
            prop_assert!(score <= frees && frees <= candidate.usage);
            let Attributes { preference, ending, .. } = candidate.attributes;
            let may_go = preference != Preference::Omit && !ending && frees.0 > 0
                && candidate.usage > candidate.protection.min;
            prop_assert_eq!(spared.is_none(), may_go);
        }
    }

    /// Whatever happens, in whatever order, and whatever the clock says: nobody outside the level and nobody spared is chosen, nobody at all while
    /// the memory of one that ends is coming back to the level in time, and nobody twice for the same.
    /// Semantics: 47, B40, B42.
    #[test]
    fn one_victim_at_a_time_in_each_subtree(
        usage in prop::collection::vec(0u64..500, 1..10),
        each in prop::collection::vec(attributes(), 10),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let (mut tree, vms, all) = forest(&usage);
        let attributes: BTreeMap<NodeId, Attributes> = vms.iter().copied().zip(each).collect();
        let mut victims = Victims::new(PATIENCE);
        // Chosen, with the usage when all is back, and until when that is waited for.
        let mut chosen: BTreeMap<NodeId, (Pages, Duration)> = BTreeMap::new();
        let mut now = secs(1);
        for op in ops {
            match op {
                Op::Later { secs: more } => now += secs(more),
                Op::Earlier { secs: less } => now = now.saturating_sub(secs(less)),
                Op::Return { vm, pages } => {
                    let id = *vm.get(&vms);
                    tree.uncharge(id, Pages(pages).min(tree.usage(id)));
                }
                Op::Fail { vm } => {
                    let id = *vm.get(&vms);
                    victims.failed(id);
                    chosen.entry(id).and_modify(|(_, until)| *until = secs(0));
                }
                Op::Decide { level } => {
                    let level = *level.get(&all);
                    chosen.retain(|id, (remains, _)| tree.usage(*id) > *remains);
                    let ranked = rank(&candidates(&tree, level, |id| attributes.get(&id).copied()));
                    for Candidate { id, usage, .. } in ranked.iter().map(|ranked| ranked.candidate) {
                        if attributes[&id].ending && !usage.is_zero() {
                            chosen.entry(id).or_insert((Pages::ZERO, now + PATIENCE));
                        }
                    }
                    let coming = |id: &NodeId, until: &Duration| tree.is_within(*id, level) && now < *until;
                    let under_way = chosen.iter().any(|(id, (_, until))| coming(id, until));
                    prop_assert!(ranked.iter().all(|ranked| tree.is_within(ranked.candidate.id, level)));
                    let may_go = |ranked: &&Ranked<'_>| {
                        ranked.spared.is_none() && !chosen.contains_key(&ranked.candidate.id)
                    };
                    let best = ranked.iter().find(may_go);
                    match victims.decide(&tree, level, &ranked, now) {
                        Choice::Wait(waiting) => {
                            let (remains, until) = chosen[&waiting.id];
                            prop_assert!(coming(&waiting.id, &until));
                            prop_assert_eq!(waiting.returning, tree.usage(waiting.id).saturating_sub(remains));
                        }
                        Choice::Act(ranked) => {
                            prop_assert!(!under_way);
                            prop_assert_eq!(Some(&ranked), best);
                            let id = ranked.candidate.id;
                            let remains = tree.usage(id).saturating_sub(ranked.frees);
                            chosen.insert(id, (remains, now + PATIENCE));
                        }
                        Choice::Nobody(_) => {
                            prop_assert!(!under_way);
                            prop_assert_eq!(best, None);
                        }
                    }
                }
            }
        }
    }
}

/// The kernel adds what a process uses and its adjustment, in thousandths: the sums of the workers are in our order, whoever is
/// larger, and those that are spared come last, without an adjustment.
#[test]
fn the_kernel_would_take_the_same_one_after_the_other() {
    let mut host = Host::new();
    let total = mib(1000);
    let sums = |host: &Host| {
        let ranked = host.rank(host.root);
        let scores: Vec<_> = standing(&ranked, total).collect();
        let share = |entry: &Ranked<'_>| (entry.candidate.usage.0 * 1000 / total.0) as i16;
        let sum = |(entry, score): (&Ranked<'_>, &i16)| (entry.candidate.id, *score, *score + share(entry));
        ranked.iter().zip(&scores).map(sum).collect::<Vec<_>>()
    };
    let plain = sums(&host);
    assert_eq!(plain.iter().map(|sum| sum.0).collect::<Vec<_>>(), [host.c, host.b, host.a]);
    assert_eq!(plain[0].2, 1000, "as much as a process that has everything");
    assert!(plain.is_sorted_by(|a, b| a.2 > b.2), "{plain:?}");
    // The largest goes last, and then not at all.
    host.set(host.c, |attributes| attributes.priority = 5);
    let last = sums(&host);
    assert!(last[2].0 == host.c && last.is_sorted_by(|a, b| a.2 >= b.2), "{last:?}");
    host.set(host.c, |attributes| attributes.preference = Preference::Omit);
    let spared = sums(&host);
    assert_eq!((spared[2].0, spared[2].1), (host.c, 0));
    assert!(spared.is_sorted_by(|a, b| a.2 > b.2), "{spared:?}");
}

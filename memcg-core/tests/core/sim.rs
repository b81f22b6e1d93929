//! Hosts that are not there: the table of rules, and what a simulation is.

use std::collections::BTreeSet;
use std::time::Duration;

use memcg_core::host::Terms;
use memcg_core::sim::rules::{RULES, Rule};
use memcg_core::sim::synthetic::{SCENARIOS, Scenario};
use memcg_core::sim::{Group, Host, Outcome, Point, Policy, Setup, SetupError, Vm, What, fairness};
use memcg_core::tree::LimitPatch;
use memcg_core::units::{Limit, Pages};
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

/// Each line of the table is decided as it says: who goes, why, in which order, when, or that nobody does.
#[test]
fn each_rule_of_the_table_decides_as_it_says() {
    let mut wrong = Vec::new();
    for rule in RULES {
        let outcome = rule.play().unwrap_or_else(|error| panic!("{}: {error}", rule.id));
        if let Err(why) = rule.verify(&outcome) {
            wrong.push(format!("{}: {} But: {why}\n{}", rule.id, rule.says, told(&outcome)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn told(outcome: &Outcome) -> String {
    outcome.events.iter().map(|event| format!("    {:?} {:?}\n", event.at, event.what)).collect()
}

/// A table that lost a line, or has one twice, would pass as well.
#[test]
fn the_table_has_its_lines_once_each() {
    let ids: BTreeSet<_> = RULES.iter().map(|rule| rule.id).collect();
    assert_eq!(ids.len(), RULES.len());
    assert!(RULES.len() >= 30);
    assert!(RULES.iter().all(|rule| rule.says.ends_with('.') && Rule::find(rule.id).is_some()));
}

/// A line that expects what does not happen fails: the table would prove nothing otherwise.
#[test]
fn a_line_that_says_something_else_is_found_out() {
    let [most, omits] = ["most-above-protection", "everybody-omits"].map(|id| Rule::find(id).expect("a line"));
    let outcome = most.play().expect("a host");
    assert!(most.verify(&outcome).is_ok());
    assert!(Rule { expects: &[], ..*most }.verify(&outcome).unwrap_err().contains("one too many"));
    assert!(omits.verify(&outcome).unwrap_err().contains("had to be"));
    let pause = Rule::find("pause-and-resume").expect("a line");
    let short = Rule { seconds: 30, ..*pause };
    assert!(pause.verify(&short.play().expect("a host")).unwrap_err().contains("did not come"));
}

/// Where nobody looks at a clock the order counts, but for those who may go at the same time.
#[test]
fn a_line_is_compared_with_what_was_decided_elsewhere() {
    for (id, either) in [("two-groups-at-once", true), ("refuses-to-die", false)] {
        let rule = Rule::find(id).expect("a line");
        let events = rule.play().expect("a host").events.into_iter().map(|event| event.what);
        let mut decided: Vec<_> = events.filter(|what| matches!(what, What::Chosen { .. })).collect();
        assert_eq!(rule.verify_order(&decided), Ok(()), "{id}");
        assert!(rule.verify_order(&decided[..1]).unwrap_err().contains("did not come"));
        let thrice = decided.iter().chain(&decided[..1]);
        assert!(rule.verify_order(thrice).unwrap_err().contains("one too many"));
        decided.reverse();
        assert_eq!(rule.verify_order(&decided).is_ok(), either, "{id}");
    }
}

/// A VM that wants so many MiB from the start, of which so many are hot.
fn vm(name: &str, footprint: u64, hot: u64) -> Vm {
    let load = vec![Point { at: Duration::ZERO, footprint: Pages::from_mib(footprint), hot: Pages::from_mib(hot) }];
    Vm { load, ..Vm::new(name) }
}

fn host(mib: u64, vms: impl IntoIterator<Item = Vm>) -> Setup {
    Setup { vms: vms.into_iter().collect(), ..Setup::new("test", Pages::from_mib(mib)) }
}

fn run(setup: &Setup, seconds: u32) -> Outcome {
    Host::new(setup.clone()).expect("a host").run(SECOND * seconds, SECOND)
}

/// On a host with room nothing is decided, nobody waits, and each VM has what it wants.
#[test]
fn a_host_with_room_lets_everybody_live() {
    let outcome = run(&host(4096, [vm("a", 1000, 100), vm("b", 500, 500)]), 60);
    assert_eq!((outcome.events.len(), outcome.sums), (0, Default::default()));
    for (vm, mib) in outcome.vms.iter().zip([1000, 500]) {
        assert_eq!((vm.lived, vm.wanted, vm.usage), (SECOND * 60, SECOND * 60, Pages::from_mib(mib)));
    }
    assert_eq!(fairness(&outcome.vms), 1.0);
}

/// What is evicted leaves its compressed contents behind, and comes back when it is touched; the guest waits as long as that
/// takes, and its own time with it.
#[test]
fn a_guest_above_its_limit_gives_cold_memory_and_waits_for_what_it_touches() {
    let limits = LimitPatch { max: Some(Limit::Pages(Pages::from_mib(512))), ..LimitPatch::default() };
    let of = |hot, wanders| Vm { limits, wanders, ..vm("vm", 700, hot) };
    let cold = run(&host(4096, [of(100, 0)]), 60);
    assert!(cold.vms[0].usage <= Pages::from_mib(512));
    let swapped = cold.samples.last().expect("one").swapped;
    assert!(swapped >= Pages::from_mib(188) && cold.sums.refaulted.is_zero(), "{swapped}");
    let wandering = run(&host(4096, [of(100, 100)]), 60);
    assert!(wandering.sums.refaulted > Pages::from_mib(5), "{:?}", wandering.sums);
    let thrashing = run(&host(4096, [of(700, 0)]), 60);
    assert!(thrashing.sums.stalled > SECOND * 10, "{:?}", thrashing.sums);
    assert!(thrashing.vms[0].lived < SECOND * 50 && thrashing.vms[0].lived + thrashing.sums.stalled <= SECOND * 61);
}

/// A guest that frees memory gives it back by reports at once, by its balloon when it is asked, and otherwise not at all.
#[test]
fn freed_memory_comes_back_as_the_guest_gives_it() {
    let load = [(0, 1000), (10, 1000), (11, 200)];
    let point = |(at, mib)| Point { at: SECOND * at, footprint: Pages::from_mib(mib), hot: Pages::from_mib(mib) };
    let of = |reports, driver| Vm { reports, driver, load: load.map(point).into(), ..Vm::new("vm") };
    let usage = |vm: Vm, reclaims: bool| {
        // The other one wants more than there is unless something is given back.
        let other = if reclaims { 3700 } else { 100 };
        let other = vm_from(15, "other", other);
        run(&host(4096, [Vm { limits: no_swap(), ..vm }, Vm { limits: no_swap(), ..other }]), 40).vms[0].usage
    };
    assert_eq!(usage(of(true, false), false), Pages::from_mib(200));
    assert_eq!(usage(of(false, true), false), Pages::from_mib(1000));
    assert!(usage(of(false, true), true) < Pages::from_mib(400));
    assert_eq!(usage(of(false, false), true), Pages::from_mib(1000));
}

fn no_swap() -> LimitPatch {
    LimitPatch { swap_max: Some(Limit::ZERO), ..LimitPatch::default() }
}

/// A VM that wants so many MiB from so many seconds on.
fn vm_from(seconds: u32, name: &str, mib: u64) -> Vm {
    let point = |at, mib| Point { at, footprint: Pages::from_mib(mib), hot: Pages::from_mib(mib) };
    Vm {
        load: vec![point(Duration::ZERO, 0), point(SECOND * seconds, 0), point(SECOND * (seconds + 5), mib)],
        ..Vm::new(name)
    }
}

/// The three policies take from whom they say: idle memory first, all alike, or the lowest priority first.
#[test]
fn each_policy_takes_from_whom_it_says() {
    let busy = Vm { priority: 1, ..vm("busy", 1500, 1500) };
    let idle = Vm { priority: 2, ..vm("idle", 1500, 150) };
    let setup = host(4096, [busy, idle, Vm { priority: 3, ..vm_from(10, "grows", 1200) }]);
    let taken = |policy| {
        let outcome = run(&Setup { policy, ..setup.clone() }, 40);
        let usage = |at: usize| outcome.vms[at].usage;
        (usage(0), usage(1), outcome.sums.refaulted)
    };
    let all = Pages::from_mib(1500);
    let (busy, idle, few) = taken(Policy::Proportional);
    assert!(busy == all && idle < all, "{busy} {idle}");
    let (_, idle, many) = taken(Policy::NoIdleTax);
    assert!(idle < all && many.0 > few.0 * 5, "{idle} {few} {many}");
    let (_, idle, many) = taken(Policy::PriorityOnly);
    assert!(idle == all && many.0 > few.0 * 5, "{idle} {few} {many}");
}

/// A setup has one outcome, whatever else there is; another seed has another.
#[test]
fn a_seed_has_one_outcome() {
    for scenario in SCENARIOS {
        let play = |seed| run(&scenario.host(seed, 3, 20, SECOND * 600), 600);
        let once = play(1);
        assert_eq!(once, play(1), "{}", scenario.name);
        assert_ne!(once, play(2), "{}", scenario.name);
        assert_eq!(once.vms.len(), 20);
    }
    assert!(Scenario::find("mixed").is_some() && Scenario::find("none").is_none());
}

/// What cannot be there is refused with its name.
#[test]
fn a_host_that_cannot_be_is_refused() {
    let stray = Vm { group: "/none".to_owned(), ..Vm::new("stray") };
    assert_eq!(Host::new(host(64, [stray])).unwrap_err(), SetupError::NoGroup("/none".to_owned()));
    let twice = Host::new(host(64, [Vm::new("twice"), Vm::new("twice")])).unwrap_err();
    assert!(twice.to_string().contains("/twice"), "{twice}");
    let mut unnamed = host(64, []);
    unnamed.groups.push(Group { path: "gold".to_owned(), limits: LimitPatch::default() });
    assert!(Host::new(unnamed).is_ok(), "a path may be written without its slash");
}

/// A VM that does anything.
fn any_vm() -> impl Strategy<Value = Vm> {
    let load = prop::collection::vec((0u64..60, 0u64..1500, 0u64..1500), 0..6);
    let limits = (0u64..3, 0u64..1200, 0u64..2000);
    let whims = (any::<[bool; 6]>(), 0u32..=1100, 0u32..2000, -2i32..3);
    (load, limits, whims).prop_map(|(mut load, (group, low, max), (whims, shrinks, wanders, priority))| {
        load.sort_unstable();
        let point = |(at, footprint, hot)| Point {
            at: Duration::from_secs(at),
            footprint: Pages::from_mib(footprint),
            hot: Pages::from_mib(hot),
        };
        let [kill, reports, driver, immortal, deaf, capped] = whims;
        let max = if capped { Some(Limit::Pages(Pages::from_mib(max))) } else { None };
        let low =
            Some(Limit::Pages(Pages::from_mib(low.min(max.and_then(Limit::as_pages).map_or(low, |max| max.0 / 256)))));
        Vm {
            group: ["/", "/a", "/a/b"][group as usize].to_owned(),
            limits: LimitPatch { low, max, ..LimitPatch::default() },
            kill,
            priority,
            shrinks,
            wanders,
            reports,
            driver,
            immortal,
            deaf,
            load: load.into_iter().map(point).collect(),
            ..Vm::new("any")
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever guests do: the account holds (the tree stops a debug build that takes off more than there is), no VM lives longer
    /// than it wanted, the host has no more memory in use than there is, and between two victims of the host is its time to
    /// cool down.
    #[test]
    fn no_guests_make_a_host_rash(vms in prop::collection::vec(any_vm(), 1..8), max in 500u64..3000, others in 0u64..1000) {
        let vms = vms.into_iter().enumerate().map(|(at, vm)| Vm { name: format!("vm-{at}"), ..vm });
        let mut setup = host(2048, vms);
        setup.others = vec![(Duration::ZERO, Pages::ZERO), (SECOND * 30, Pages::from_mib(others))];
        let limits = LimitPatch::max(Limit::Pages(Pages::from_mib(max)));
        setup.groups = ["/a", "/a/b"].map(|path| Group { path: path.to_owned(), limits }).into();
        let outcome = run(&setup, 90);
        let cool_down = Terms::new(setup.memory).cool_down;
        let mut last = None::<Duration>;
        for event in &outcome.events {
            if let What::Chosen { level, .. } = &event.what && level == "/" {
                prop_assert!(last.is_none_or(|last| event.at - last >= cool_down), "{}", told(&outcome));
                last = Some(event.at);
            }
        }
        for sample in &outcome.samples {
            prop_assert!(sample.used <= setup.memory, "{sample:?}");
        }
        for vm in &outcome.vms {
            prop_assert!(vm.lived <= vm.wanted && vm.wanted <= SECOND * 90, "{vm:?}");
        }
        prop_assert!((0.0..=1.0 + 1e-9).contains(&fairness(&outcome.vms)));
    }
}

//! `memory.pressure`: the kernel's numbers for the kernel's histories, and what several VMs add up to.

use std::time::Duration;

use memcg_core::pressure::{DECAY, Member, Pressure};
use proptest::prelude::*;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A VM that runs from the beginning.
fn running() -> Pressure {
    let mut vm = Pressure::new(ms(0));
    vm.change(ms(0), Member::Idle, Member::Running);
    vm
}

/// A VM whose vCPUs all wait in each of these spans of milliseconds.
fn held(spans: impl IntoIterator<Item = (u64, u64)>) -> Pressure {
    let mut vm = running();
    for (from, until) in spans {
        vm.change(ms(from), Member::Running, Member::Fully);
        vm.change(ms(until), Member::Fully, Member::Running);
    }
    vm
}

fn averages(vm: &Pressure, at: u64) -> [u32; 3] {
    let some = vm.some(ms(at));
    assert_eq!(some, vm.full(ms(at)), "of one VM that is wholly held, the lines are equal");
    some.hundredths
}

#[test]
fn what_is_left_after_a_period_is_the_kernel_s() {
    for (decay, seconds) in DECAY.into_iter().zip([10.0, 60.0, 300.0]) {
        assert_eq!(decay, (2048.0 * f64::exp(-2.0 / seconds)).round() as u64);
    }
}

/// The numbers are what `calc_load` of Linux 6.12 makes of the same histories, period by period.
#[test]
fn the_averages_are_what_the_kernel_prints() {
    let mut vm = running();
    vm.change(ms(0), Member::Running, Member::Fully);
    for (at, expected) in [
        (1_999, [0, 0, 0]),
        (2_000, [1811, 327, 68]),
        (3_999, [1811, 327, 68]),
        (10_000, [6318, 1532, 337]),
        (60_000, [9975, 6313, 1860]),
        (360_000, [10_000, 9975, 7093]),
    ] {
        assert_eq!(averages(&looked_at_each_period(vm, Member::Fully, at), at), expected, "held for {at} ms");
    }
    let quarter = held((0..30).map(|n| (n * 2000 + 700, n * 2000 + 1200)));
    assert_eq!(averages(&quarter, 60_000), [2493, 1578, 465]);
    // 0.95 % of the time: the kernel samples whole per cents.
    let little = held((0..30).map(|n| (n * 2000, n * 2000 + 19)));
    assert_eq!(averages(&little, 60_000), [0, 0, 0]);
    assert_eq!(little.some(ms(60_000)).total, ms(30 * 19));
}

/// As [`Pressure`] is when somebody has booked every period of its present state by itself.
fn looked_at_each_period(mut vm: Pressure, state: Member, until: u64) -> Pressure {
    for at in (0..=until).step_by(2000) {
        vm.change(ms(at), state, state);
    }
    vm
}

/// The numbers are `calc_load_n`'s, by which the kernel goes over periods in which it slept.
#[test]
fn many_periods_at_once_are_the_kernel_s_power() {
    let mut vm = running();
    vm.change(ms(0), Member::Running, Member::Fully);
    assert_eq!(averages(&vm, 60_000), [9976, 6311, 1872]);
    let vm = held((0..5).map(|n| (n * 2000, n * 2000 + 2000)));
    assert_eq!(averages(&vm, 10_000), [6318, 1532, 337]);
    assert_eq!(averages(&vm, 70_000), [15, 565, 274]);
    assert_eq!(averages(&vm, 100 * 365 * 24 * 3_600_000), [0, 0, 0], "a century later");
}

#[test]
fn asking_changes_nothing_and_time_before_the_last_change_is_booked_once() {
    let vm = held([(100, 300)]);
    assert_eq!(vm.some(ms(5_000)), vm.some(ms(5_000)));
    assert_eq!(vm.some(ms(250)).total, ms(200), "nobody can ask about the past");
    let mut vm = held([(100, 300)]);
    // Late news of a hold that began before the last one ended.
    vm.change(ms(200), Member::Running, Member::Fully);
    vm.change(ms(400), Member::Fully, Member::Running);
    assert_eq!(vm.some(ms(400)).total, ms(300), "from 100 to 400, and never twice");
}

/// The picture in the module's documentation.
#[test]
fn of_several_vms_some_is_the_union_and_full_the_intersection() {
    let mut group = Pressure::new(ms(0));
    for _ in 0..2 {
        group.change(ms(0), Member::Idle, Member::Running);
    }
    group.change(ms(400), Member::Running, Member::Fully);
    group.change(ms(600), Member::Running, Member::Fully);
    assert_eq!(group.full(ms(700)).total, ms(100), "before anybody goes on");
    group.change(ms(1000), Member::Fully, Member::Running);
    group.change(ms(1200), Member::Fully, Member::Running);
    assert_eq!((group.some(ms(2000)).total, group.full(ms(2000)).total), (ms(800), ms(400)));
    assert_eq!(group.some(ms(2000)).hundredths[0], 40 * 1811 / 100);
}

#[test]
fn one_vcpu_of_several_is_some_and_not_full() {
    let mut vm = running();
    vm.change(ms(0), Member::Running, Member::Partly);
    vm.change(ms(500), Member::Partly, Member::Fully);
    vm.change(ms(700), Member::Fully, Member::Running);
    assert_eq!((vm.some(ms(900)).total, vm.full(ms(900)).total), (ms(700), ms(200)));
}

#[test]
fn a_vm_that_would_not_run_keeps_no_group_from_being_stalled() {
    let mut group = Pressure::new(ms(0));
    group.change(ms(0), Member::Idle, Member::Running);
    group.change(ms(0), Member::Idle, Member::Fully);
    assert_eq!(group.full(ms(100)).total, ms(0));
    // The one that runs is paused, then it goes on, then it is removed.
    group.change(ms(100), Member::Running, Member::Idle);
    group.change(ms(300), Member::Idle, Member::Running);
    group.change(ms(400), Member::Running, Member::Idle);
    assert_eq!(group.full(ms(500)).total, ms(300));
    // The other one too: nobody is there, and nothing is stalled.
    group.change(ms(500), Member::Fully, Member::Idle);
    let total = (group.some(ms(9_000)).total, group.full(ms(9_000)).total);
    assert_eq!(total, (ms(500), ms(300)));
}

/// What a member does, and for how many milliseconds.
fn histories() -> impl Strategy<Value = Vec<(usize, u8, u64)>> {
    prop::collection::vec((0..3usize, 0..4u8, prop_oneof![0..50u64, 0..3000u64, 0..60_000u64]), 1..40)
}

fn member(n: u8) -> Member {
    [Member::Idle, Member::Running, Member::Partly, Member::Fully][usize::from(n)]
}

proptest! {
    /// Against a model that goes through time millisecond by millisecond.
    #[test]
    fn totals_and_averages_are_those_of_a_step_by_step_model(history in histories()) {
        let mut group = Pressure::new(ms(0));
        let mut members = [Member::Idle; 3];
        let (mut now, mut some, mut full) = (0u64, 0u64, 0u64);
        let mut model = [0f64; 3];
        let mut in_period = 0u64;
        for (which, state, wait) in history {
            group.change(ms(now), members[which], member(state));
            members[which] = member(state);
            let waits = |m: &Member| matches!(m, Member::Partly | Member::Fully);
            let any = members.iter().any(waits);
            let present = members.iter().filter(|m| **m != Member::Idle).count();
            let all = present > 0 && members.iter().filter(|m| **m == Member::Fully).count() == present;
            for _ in 0..wait {
                now += 1;
                some += u64::from(any);
                full += u64::from(all);
                in_period += u64::from(any);
                if now % 2000 == 0 {
                    let share = (in_period * 100 / 2000) as f64;
                    in_period = 0;
                    for (average, decay) in model.iter_mut().zip(DECAY) {
                        let left = decay as f64 / 2048.0;
                        *average = *average * left + share * (1.0 - left);
                    }
                }
            }
        }
        let is = group.some(ms(now));
        prop_assert_eq!((is.total, group.full(ms(now)).total), (ms(some), ms(full)));
        for (is, model) in is.hundredths.into_iter().zip(model) {
            // Fixed point: a power rounds each of its factors.
            prop_assert!((f64::from(is) / 100.0 - model).abs() < 0.75, "{is} hundredths, the model has {model}");
        }
    }
}

//! `memory.pressure` from what workers say.

use super::super::view::PressureView;
use super::*;

/// The pressure of the host and of each VM, in order of their making.
async fn pressures(controller: &Controller) -> (PressureView, Vec<PressureView>) {
    let overview = controller.overview(0).await.expect("the actor lives");
    (overview.groups[0].pressure, overview.vms.iter().map(|vm| vm.pressure).collect())
}

/// Time that all vCPUs waited, in milliseconds.
fn full_ms(pressure: &PressureView) -> u64 {
    assert!(pressure.full.total_us <= pressure.some.total_us);
    pressure.full.total_us / 1000
}

async fn pass(ms: u64) {
    tokio::time::advance(Duration::from_millis(ms)).await;
}

/// Reports a hold that has begun, or ended after `held_us` in all.
async fn hold(worker: &mut FakeWorker, held: bool, held_us: u64) {
    worker.report.held = held;
    worker.report.held_us = held_us;
    worker.tell().await;
    worker.controller.host().await.expect("the actor lives");
}

fn patient() -> Setup {
    let oom = OomPolicy { deadline: Duration::from_secs(3600), ..OomPolicy::default() };
    Setup { oom, ..Setup::default() }
}

#[tokio::test(start_paused = true)]
async fn a_hold_is_pressure_while_it_lasts_and_nobody_is_woken_for_it() {
    let mut worker = FakeWorker::running(patient()).await;
    let controller = worker.controller.clone();
    hold(&mut worker, true, 0).await;
    pass(20_000).await;
    let (host, vms) = pressures(&controller).await;
    assert_eq!(host, vms[0], "there is no other VM");
    assert_eq!(full_ms(&vms[0]), 20_000);
    assert!((80.0..=90.0).contains(&vms[0].full.avg10), "{vms:?}");
    assert_eq!(worker.try_next().await, None, "the worker was not asked");
    hold(&mut worker, false, 20_000_000).await;
    pass(60_000).await;
    let (_, vms) = pressures(&controller).await;
    assert_eq!(full_ms(&vms[0]), 20_000);
    assert!(vms[0].full.avg10 < 1.0 && vms[0].full.avg300 > 1.0, "{vms:?}");
}

#[tokio::test(start_paused = true)]
async fn a_hold_that_was_over_before_the_report_counts_with_its_length() {
    let mut worker = FakeWorker::running(patient()).await;
    let controller = worker.controller.clone();
    pass(1_000).await;
    hold(&mut worker, false, 250_000).await;
    assert_eq!(full_ms(&pressures(&controller).await.1[0]), 250);
    // A worker cannot have been held for longer than it ran, nor less than before.
    pass(1_000).await;
    hold(&mut worker, false, u64::MAX).await;
    assert_eq!(full_ms(&pressures(&controller).await.1[0]), 1_250);
    hold(&mut worker, false, 0).await;
    hold(&mut worker, false, 100_000).await;
    assert_eq!(full_ms(&pressures(&controller).await.1[0]), 1_250, "no time has passed");
}

/// Reports the time that vCPUs have waited for evicted pages in all.
async fn refaults(worker: &mut FakeWorker, refault_us: u64) {
    worker.report.refault_us = refault_us;
    hold(worker, false, worker.report.held_us).await;
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_evicted_pages_is_stalled() {
    for (cpus, all) in [(1, true), (2, false)] {
        let mut worker = FakeWorker::running(Setup { cpus, ..patient() }).await;
        let controller = worker.controller.clone();
        for second in 1..=10 {
            pass(1_000).await;
            refaults(&mut worker, second * 600_000).await;
        }
        let (host, vms) = pressures(&controller).await;
        assert_eq!(host, vms[0], "there is no other VM");
        assert_eq!((host.some.total_us, full_ms(&host)), (6_000_000, if all { 6_000 } else { 0 }));
        assert!(host.some.avg10 > 30.0, "{host:?}");
        // A hold is told with it, and neither can be longer than the time that has passed.
        pass(1_000).await;
        worker.report.held_us = 300_000;
        refaults(&mut worker, 6_500_000).await;
        let (host, _) = pressures(&controller).await;
        assert_eq!((host.some.total_us, full_ms(&host)), (6_800_000, if all { 6_800 } else { 300 }));
        pass(1_000).await;
        refaults(&mut worker, u64::MAX).await;
        assert_eq!(pressures(&controller).await.0.some.total_us, 7_800_000);
        pass(1_000).await;
        assert_eq!(pressures(&controller).await.0.some.total_us, 7_800_000, "it is over");
    }
}

#[tokio::test(start_paused = true)]
async fn of_two_vms_some_is_either_and_full_is_both_of_those_that_would_run() {
    let mut a = FakeWorker::running(patient()).await;
    let controller = a.controller.clone();
    let mut b = FakeWorker::add_to(&controller, "b", patient()).await.expect("added");
    b.hello().await;
    hold(&mut a, true, 0).await;
    pass(1_000).await;
    let (host, _) = pressures(&controller).await;
    assert_eq!((full_ms(&host), host.some.total_us), (1_000, 1_000_000), "b does not run yet");
    b.say(FromWorker::Loaded { plan: 0 }).await;
    controller.host().await.expect("the actor has heard it");
    pass(1_000).await;
    assert_eq!(full_ms(&pressures(&controller).await.0), 1_000, "b runs");
    hold(&mut b, true, 0).await;
    pass(1_000).await;
    hold(&mut a, false, 3_000_000).await;
    pass(1_000).await;
    let (host, vms) = pressures(&controller).await;
    assert_eq!((host.some.total_us, full_ms(&host)), (4_000_000, 2_000));
    assert_eq!(vms.iter().map(full_ms).collect::<Vec<_>>(), [3_000, 2_000]);
    // One that ends is in nobody's way.
    a.die(Death::Signal(9)).await;
    pass(1_000).await;
    assert_eq!(full_ms(&pressures(&controller).await.0), 3_000);
}

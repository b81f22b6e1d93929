//! What workers evict.

use super::super::cold;
use super::super::{MemoryChange, NodeChange};
use super::limits::change;
use super::*;

/// Bytes of so many pages.
const fn bytes(pages: u64) -> u64 {
    pages * 4096
}

/// A change of `swap.max`.
fn swap_max(max: u64) -> MemoryChange {
    let patch = LimitPatch { swap_max: Some(pages(max)), ..LimitPatch::default() };
    MemoryChange { patch, ..change(Limit::Max) }
}

/// What is evicted was charged as guest memory, and what it takes in the store still is; swap is beside memory. What was
/// freed leaves the account as stock does.
/// Semantics: 24, 27.
#[tokio::test(start_paused = true)]
async fn eviction_turns_guest_memory_into_store_and_stock() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    worker.touch(1000).await;
    let before = worker.view().await.memory.current_bytes;
    worker.report.idle = 50;
    worker.evict(400, 100).await;
    let view = worker.view().await;
    let stat = view.memory.stat;
    assert_eq!((view.memory.current_bytes, view.swap.current_bytes), (before, bytes(400)));
    assert_eq!((stat.guest_bytes, stat.active_bytes, stat.idle_bytes), (bytes(600), bytes(550), bytes(50)));
    assert_eq!((stat.store_bytes, stat.swapped_bytes), (bytes(100), bytes(400)));
    let parts = stat.guest_bytes + stat.store_bytes + stat.stock_bytes + stat.reserve_bytes + stat.vmm_bytes;
    assert_eq!(parts, view.memory.current_bytes);
    // In one report: all of it is touched again, the store is cleaned, and its memory comes back.
    worker.report.guest += 300;
    worker.report.stock -= 300;
    worker.report.swapped -= 300;
    worker.report.store -= 80;
    worker.report.returned_total += 80;
    let view = worker.view().await;
    assert_eq!((view.memory.current_bytes, view.swap.current_bytes), (before - bytes(80), bytes(100)));
    assert_eq!(view.swap.peak_bytes, bytes(400));
    assert_eq!(worker.controller.group("/").await.expect("the host").swap.current_bytes, bytes(100));
}

/// Its end takes a VM's swap and its store out of every account.
/// Semantics: 8, 96.
#[tokio::test(start_paused = true)]
async fn the_end_of_a_vm_is_the_end_of_what_it_has_evicted() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    worker.touch(1000).await;
    worker.evict(400, 100).await;
    let controller = worker.controller.clone();
    worker.exit(ExitReason::PowerOff).await;
    while controller.group("/").await.expect("the host").memory.current_bytes > 0 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(controller.group("/").await.expect("the host").swap.current_bytes, 0);
}

/// A word about cold pages is believed as far as it can be true.
/// Semantics: 4.
#[tokio::test(start_paused = true)]
async fn lies_about_cold_pages_end_the_worker() {
    type Lie = fn(&mut Report);
    let lies: [(&str, Lie); 4] = [
        ("more idle than resident", |r| r.idle = r.guest + 1),
        ("more in swap than RAM", |r| r.swapped = SIZE + 1),
        ("a store that it was not granted", |r| r.store += 1),
        ("a store larger than any", |r| {
            (r.guest, r.stock, r.store) = (0, 0, cold::most_stored(Pages(SIZE)).0 + 1);
        }),
    ];
    for (what, lie) in lies {
        let mut worker = FakeWorker::running(Setup { max: Limit::Max, ..Setup::default() }).await;
        worker.touch(100).await;
        lie(&mut worker.report);
        worker.tell().await;
        worker.controller.host().await.expect("alive");
        assert!(worker.killed(), "{what}");
    }
}

/// Without a limit a worker may evict everything, into half of what its VM may use; with one, as much as that says. Who has
/// more already may only come down.
/// Semantics: 115, 118.
#[tokio::test(start_paused = true)]
async fn a_grant_says_what_may_be_evicted() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    assert_eq!(worker.leases, (u64::MAX, 2048));
    worker.touch(1000).await;
    worker.evict(400, 100).await;
    assert!(worker.controller.change("vm", swap_max(300)).await.expect("a limit").in_force);
    while worker.try_next().await.is_some() {}
    assert_eq!(worker.leases, (300, 2048));
    let view = worker.view().await;
    assert_eq!((view.swap.current_bytes, view.swap.max_bytes), (bytes(400), Some(bytes(300))));
    let max = change(Limit::Max);
    assert!(worker.controller.change("vm", max).await.expect("a limit").in_force);
    while worker.try_next().await.is_some() {}
    assert_eq!(worker.leases, (300, u64::MAX));
}

/// A limit of the store takes the place of half of the VM's `max`, and goes with it when it is taken back. A group's is for all
/// that is in it.
#[tokio::test(start_paused = true)]
async fn a_store_may_have_a_limit_of_its_own() {
    let store_max = |max| {
        let patch = LimitPatch { store_max: Some(max), ..LimitPatch::default() };
        MemoryChange { patch, ..change(Limit::Max) }
    };
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(Limit::Max)).await.expect("made");
    let setup = Setup { group: "/gold", ..Setup::default() };
    let mut worker = FakeWorker::add_to(&controller, "vm", setup).await.expect("added");
    worker.hello().await;
    worker.say(FromWorker::Loaded { plan: 0 }).await;
    worker.touch(1000).await;
    worker.evict(400, 100).await;
    for (limit, lease) in [(pages(3000), 3000), (pages(60), 60), (Limit::Max, 2048)] {
        assert!(worker.controller.change("vm", store_max(limit)).await.expect("a limit").in_force);
        while worker.try_next().await.is_some() {}
        assert_eq!(worker.leases.1, lease);
        let memory = worker.view().await.memory;
        assert_eq!((memory.store_max_bytes, memory.stat.store_bytes), (limit.as_bytes(), bytes(100)));
    }
    worker.controller.change_group("/gold", store_max(pages(150))).await.expect("a limit");
    while worker.try_next().await.is_some() {}
    assert_eq!(worker.leases.1, 150);
    let memory = worker.controller.group("/gold").await.expect("shown").memory;
    assert_eq!((memory.store_max_bytes, memory.store_bytes), (Some(bytes(150)), bytes(100)));
}

/// What a limit is being lowered to counts from the start: a store that had filled half of the old one would leave nothing of
/// the new one to the guest.
/// Semantics: 115, 118.
#[tokio::test(start_paused = true)]
async fn a_store_may_have_half_of_what_a_limit_is_being_lowered_to() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    worker.touch(3000).await;
    worker.tell().await;
    let controller = worker.controller.clone();
    let lowering = tokio::spawn(async move { controller.change("vm", change(pages(1000))).await });
    worker.answer_recall().await;
    worker.evict(8, 1).await;
    while worker.try_next().await.is_some() {}
    assert_eq!(worker.leases.1, 500);
    assert!(!lowering.is_finished());
}

/// Two VMs without limits of their own in the group `/gold`, which run.
async fn two_in_gold(controller: &Controller) -> [FakeWorker; 2] {
    let member = async |name| {
        let setup = Setup { max: Limit::Max, group: "/gold", ..Setup::default() };
        let mut worker = FakeWorker::add_to(controller, name, setup).await.expect("added");
        worker.hello().await;
        worker.say(FromWorker::Loaded { plan: 0 }).await;
        worker
    };
    [member("a").await, member("b").await]
}

/// The stores of a group's members are within half of what the group may use, also when none of them has a limit itself.
/// Semantics: 63.
#[tokio::test(start_paused = true)]
async fn the_stores_of_a_group_have_half_of_its_memory() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(pages(4000))).await.expect("made");
    let [mut one, mut other] = two_in_gold(&controller).await;
    one.touch(1000).await;
    one.evict(400, 100).await;
    for worker in [&mut one, &mut other] {
        while worker.try_next().await.is_some() {}
    }
    assert_eq!((one.leases.1, other.leases.1), (2000 / 4, 2000 / 4), "its part of half of what is left");
}

/// The stores of a group whose limit for them is lowered are to come down to the new one together: who has much gives, as far
/// as the others leave it no more, and nobody gives below an equal part.
/// Semantics: 63.
#[tokio::test(start_paused = true)]
async fn the_stores_of_a_group_come_down_together() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", change(Limit::Max)).await.expect("made");
    let mut members = two_in_gold(&controller).await;
    for (worker, stored) in members.iter_mut().zip([900, 200]) {
        worker.touch(2000).await;
        worker.evict(1900, stored).await;
    }
    for (limit, leases) in [(800, [600, 200]), (300, [150, 150])] {
        let patch = LimitPatch { store_max: Some(pages(limit)), ..LimitPatch::default() };
        controller.change_group("/gold", MemoryChange { patch, ..change(Limit::Max) }).await.expect("a limit");
        for worker in &mut members {
            while worker.try_next().await.is_some() {}
        }
        assert_eq!([members[0].leases.1, members[1].leases.1], leases, "of {limit}");
    }
}

/// The members of a group are promised no more swap together than it may have, however they use it.
/// Semantics: 63.
#[tokio::test(start_paused = true)]
async fn the_members_of_a_group_share_its_swap() {
    let (controller, _) = Controller::start(Limit::Max);
    controller.put_group("/gold", swap_max(1000)).await.expect("made");
    let mut members = two_in_gold(&controller).await;
    for worker in &mut members {
        worker.touch(2000).await;
        worker.tell().await;
    }
    let told = |members: &[FakeWorker]| members.iter().map(|worker| worker.leases.0).collect::<Vec<_>>();
    for step in 0..200 {
        let worker = &mut members[usize::from(step % 3 == 0)];
        let more = worker.leases.0 - worker.report.swapped;
        worker.evict(more, more / 4).await;
        for worker in &mut members {
            while worker.try_next().await.is_some() {}
            worker.book();
        }
        let all: u64 = told(&members).iter().sum();
        assert!(all <= 1000, "{all} at step {step}");
    }
    let used: Vec<_> = members.iter().map(|worker| worker.report.swapped).collect();
    assert!(used.iter().sum::<u64>() > 900, "nearly all of it can be used: {used:?}");
    assert_eq!(controller.group("/gold").await.expect("shown").swap.current_bytes, bytes(used.iter().sum()));
    // What one gives up is another's.
    let stored = members[0].report.store;
    members[0].report.store = 0;
    members[0].report.stock += stored;
    members[0].report.swapped = 0;
    members[0].tell().await;
    let b = &mut members[1];
    while b.try_next().await.is_some() {}
    assert!(b.leases.0 > used[1] + 100, "{:?}", b.leases);
    let both = [NodeChange::group("/gold", &swap_max(10))];
    let mode = memcg_core::limit_change::Mode::Reclaim;
    controller.change_many(both.to_vec(), mode, None).await.expect("it may only fall");
    while b.try_next().await.is_some() {}
    assert_eq!(b.leases.0, 10);
}

/// A swap file that cannot be written is told once, and again when that has happened twice as often.
#[tokio::test(start_paused = true)]
async fn writes_to_a_swap_file_that_fail_are_an_event_each_time_that_they_have_doubled() {
    let mut worker = FakeWorker::running(Setup::default()).await;
    for failed in [0, 1, 1, 2, 3, 5, 5, 9] {
        worker.report.cold.failed_writes = failed;
        worker.tell().await;
    }
    let events = worker.events().await;
    let told = events.iter().filter(|event| event.event == EventKind::SwapFailed);
    let totals: Vec<_> = told.map(|event| event.details["failed_writes_total"].as_u64().unwrap()).collect();
    assert_eq!(totals, [1, 2, 5]);
}

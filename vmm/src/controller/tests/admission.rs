//! Overhead is paid before there is a VM.

use memcg_core::tree::{LimitPatch, Overhead};
use memcg_core::units::{Limit, Pages, SizeArg, parse_size};

use super::super::changes::MemoryChange;
use super::super::error::Code;
use super::super::view::VmState;
use super::super::{Controller, VmId, VmSpec, overhead};
use super::limits::change;
use super::{FakeWorker, SIZE, Setup, growth, pages, plain};
use crate::controller::error::Refusal;

fn spec(name: &str, limits: LimitPatch) -> VmSpec {
    VmSpec { limits, overhead: overhead::of(Pages(SIZE), 1, 3, 0), ..plain(name) }
}

/// What each VM of [`spec`] costs beside its pages.
fn cost() -> u64 {
    spec("", LimitPatch::default()).overhead.iter().map(|part| part.pages().0).sum()
}

/// Creates VMs until one is refused.
async fn spawn_bomb(controller: &Controller, prefix: &str) -> (Vec<VmId>, Refusal) {
    let mut created = Vec::new();
    loop {
        match controller.create(spec(&format!("{prefix}{}", created.len()), LimitPatch::default())).await {
            Ok(id) => created.push(id),
            Err(refusal) => return (created, refusal),
        }
    }
}

/// A host's budget ends a spawn bomb at a number that can be computed; what is withdrawn makes room for exactly one more.
/// Semantics: 56, 98.
#[tokio::test(start_paused = true)]
async fn a_spawn_bomb_ends_where_the_budget_does() {
    let (controller, _) = Controller::start(pages(7 * cost() + cost() / 2));
    let (created, refusal) = spawn_bomb(&controller, "vm").await;
    assert_eq!(created.len(), 7);
    assert_eq!(refusal.code, Code::OverheadRefused);
    assert!(refusal.message.contains("memory.max of / is"), "{}", refusal.message);
    assert_eq!(controller.host().await.expect("shown").current_bytes, 7 * cost() * 4096, "nothing half paid is left");
    controller.withdraw(created[3]).await.expect("it waits for a worker");
    assert_eq!(spawn_bomb(&controller, "again").await.0.len(), 1);
}

/// Overhead above its own limit is refused whatever memory there is, and no node is left under the name.
/// Semantics: 9, 81, 114.
#[tokio::test(start_paused = true)]
async fn vmm_max_refuses_a_vm_before_it_exists() {
    let (controller, _) = Controller::start(Limit::Max);
    // A limit of its own covers what a VM costs when it uses all its RAM.
    let full = cost() + growth();
    let limits = LimitPatch { vmm_max: Some(pages(full - 1)), ..LimitPatch::default() };
    let refusal = controller.create(spec("web", limits)).await.expect_err("one page short");
    assert_eq!(refusal.code, Code::OverheadRefused);
    assert!(refusal.message.contains("vmm.max of /web is"), "{}", refusal.message);
    let limits = LimitPatch { vmm_max: Some(pages(full)), ..LimitPatch::default() };
    controller.create(spec("web", limits)).await.expect("the name is free, and it fits exactly");
    let refusal = controller.create(spec("web", limits)).await.expect_err("the name is taken");
    assert_eq!(refusal.code, Code::AlreadyExists);
}

/// However little its VMs use now: what they will cost when they use all their RAM is promised, and the bomb ends before it.
/// Semantics: 56, 114.
#[tokio::test(start_paused = true)]
async fn a_spawn_bomb_in_a_group_ends_where_its_vmm_max_would_if_all_ram_was_used() {
    let (controller, _) = Controller::start(Limit::Max);
    let patch = LimitPatch { vmm_max: Some(pages(3 * (cost() + growth()) + cost())), ..LimitPatch::default() };
    controller.put_group("/bomb", MemoryChange { patch, ..change(Limit::Max) }).await.expect("made");
    let vm = |n: usize| VmSpec { group: "/bomb".to_owned(), ..spec(&format!("vm{n}"), LimitPatch::default()) };
    for n in 0..3 {
        controller.create(vm(n)).await.expect("fits");
    }
    let refusal = controller.create(vm(3)).await.expect_err("one too many");
    assert_eq!(refusal.code, Code::OverheadRefused);
    assert!(refusal.message.contains("vmm.max of /bomb is"), "{}", refusal.message);
    controller.create(spec("neighbour", LimitPatch::default())).await.expect("nobody else is refused");
}

/// Rounded to a decimal, the limit and what is needed often read the same: the refusal says what to type.
#[tokio::test(start_paused = true)]
async fn a_refusal_names_the_limit_that_is_enough() {
    let (controller, _) = Controller::start(Limit::Max);
    let vmm = |pages| LimitPatch { vmm_max: Some(pages), ..LimitPatch::default() };
    for (limit, knob) in [(vmm as fn(Limit) -> LimitPatch, "vmm.max"), (LimitPatch::max, "memory.max")] {
        for too_small in [0, 1, cost() - 1] {
            let refusal = controller.create(spec("web", limit(pages(too_small)))).await.expect_err("too small");
            assert!(refusal.message.contains(knob), "{}", refusal.message);
            let named = refusal.message.split_once("raise it ").expect("what to do").1;
            let named = named.split([' ', ',']).nth(1).expect("a limit");
            let Ok(SizeArg::Bytes(enough)) = parse_size(named) else { panic!("{named}") };
            let enough = Pages::from_bytes_ceil(enough);
            // With room for the reserve, which the worker will ask for, in whole MiB.
            let least = cost() + if knob == "vmm.max" { growth() } else { super::RESERVE };
            assert_eq!(enough.0, least.next_multiple_of(256));
            let id = controller.create(spec("web", limit(Limit::Pages(enough)))).await.expect("it is enough");
            controller.withdraw(id).await.expect("it waits for a worker");
        }
    }
}

/// Overhead is a part of usage, is shown as such, takes room from the guest, and goes with the memory of the dead VM.
/// Semantics: 14, 87, 90.
#[tokio::test(start_paused = true)]
async fn overhead_is_a_part_of_usage_until_the_memory_is_back() {
    let overhead = super::cost([(Overhead::Worker, 100), (Overhead::Vcpu, 24)]);
    let mut worker = FakeWorker::running(Setup { overhead, ..Setup::default() }).await;
    worker.touch(5000).await;
    let view = worker.view().await;
    assert_eq!((view.vmm.current_bytes, view.memory.stat.vmm_bytes), (124 * 4096, 124 * 4096));
    assert_eq!(view.memory.current_bytes, 4096 * 4096, "inside max");
    let stat = view.memory.stat;
    let parts = stat.guest_bytes + stat.stock_bytes + stat.reserve_bytes + stat.vmm_bytes;
    assert_eq!(parts, view.memory.current_bytes);
    let controller = worker.controller.clone();
    worker.die(super::Death::Signal(9)).await;
    assert_eq!(controller.show("vm").await.expect("shown").state, VmState::Ended);
    while controller.host().await.expect("shown").current_bytes > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

/// A VM without accounting costs nothing in the books.
#[tokio::test(start_paused = true)]
async fn nothing_is_charged_without_accounting() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut free = spec("free", LimitPatch::default());
    free.accounting = false;
    controller.create(free.clone()).await.expect("there is no limit to ask");
    assert_eq!(controller.host().await.expect("shown").current_bytes, 0);
    let (controller, _) = Controller::start(pages(1));
    let refusal = controller.create(free).await.expect_err("with a budget everybody is charged");
    assert_eq!(refusal.code, Code::OverheadRefused);
}

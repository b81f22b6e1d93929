//! Setting limits at once: order, compare-and-set, idempotence. Changes that wait are in `limit_change`.

use memcg_core::tree::{Kind, LimitPatch, Limits, Mode, NodeId, Overhead, SetLimitError, Tree};
use memcg_core::units::{Limit, Pages};

fn vm() -> (Tree, NodeId) {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let vm = crate::nodes::vm(&mut tree, root, "vm");
    (tree, vm)
}

fn pages(n: u64) -> Option<Limit> {
    Some(Limit::Pages(Pages(n)))
}

const NONE: LimitPatch = LimitPatch {
    min: None,
    low: None,
    high: None,
    max: None,
    swap_max: None,
    store_max: None,
    vmm_max: None,
    if_generation: None,
};

/// semantics row 6: a refused change leaves every limit, and says which knob to turn.
#[test]
fn limits_must_fit_each_other() {
    let (mut tree, vm) = vm();
    tree.set_limits(vm, &LimitPatch { min: pages(10), low: pages(20), high: pages(80), max: pages(100), ..NONE })
        .unwrap();
    let before = tree.snapshot(vm);
    let bad = [
        (LimitPatch { min: pages(101), ..NONE }, "memory.min"),
        (LimitPatch { low: pages(101), ..NONE }, "memory.low"),
        (LimitPatch { high: pages(101), ..NONE }, "memory.high"),
        (LimitPatch { max: pages(79), ..NONE }, "memory.high"),
        (LimitPatch { max: pages(9), high: pages(9), ..NONE }, "memory.min"),
    ];
    for (patch, knob) in bad {
        let error = tree.set_limits(vm, &patch).unwrap_err();
        assert!(matches!(&error, SetLimitError::AboveMax { why, .. } if why.knob == knob), "{error}");
        assert!(error.to_string().contains(knob));
    }
    assert_eq!(tree.snapshot(vm), before);
    // Both in one request is fine, and so is "all of it" for a protection.
    tree.set_limits(vm, &LimitPatch { max: pages(50), high: Some(Limit::Max), ..NONE }).unwrap();
    tree.set_limits(vm, &LimitPatch { min: Some(Limit::Max), low: Some(Limit::Max), ..NONE }).unwrap();
}

/// semantics row 69: writing back what is there changes nothing, the generation included.
#[test]
fn writing_the_same_is_no_change() {
    let (mut tree, vm) = vm();
    let generation = tree.set_limits(vm, &LimitPatch { min: pages(1), max: pages(9), ..NONE }).unwrap();
    assert_eq!(generation, 1);
    let Limits { min, low, high, max, swap_max, store_max, vmm_max } = tree.limits(vm);
    let same = LimitPatch {
        min: Some(min),
        low: Some(low),
        high: Some(high),
        max: Some(max),
        swap_max: Some(swap_max),
        store_max: Some(store_max),
        vmm_max: Some(vmm_max),
        if_generation: None,
    };
    let before = tree.snapshot(vm);
    assert_eq!(tree.set_limits(vm, &same), Ok(1));
    assert_eq!(tree.set_limits(vm, &NONE), Ok(1));
    assert_eq!(tree.snapshot(vm), before);
}

/// Compare-and-set: of two clients who have seen the same generation, one is refused.
#[test]
fn a_stale_generation_is_refused() {
    let (mut tree, vm) = vm();
    let seen = tree.generation(vm);
    let mine = LimitPatch { max: pages(9), if_generation: Some(seen), ..NONE };
    let theirs = LimitPatch { max: pages(5), if_generation: Some(seen), ..NONE };
    assert_eq!(tree.set_limits(vm, &mine), Ok(seen + 1));
    let stale = SetLimitError::Stale { path: "/vm".to_owned(), expected: seen, actual: seen + 1 };
    assert_eq!(tree.set_limits(vm, &theirs), Err(stale));
    assert_eq!(tree.limits(vm).max, Limit::Pages(Pages(9)));
}

/// semantics row 71: overhead cannot be reclaimed, so a lower `vmm.max` is refused.
#[test]
fn vmm_max_below_usage_is_refused() {
    let (mut tree, vm) = vm();
    let _ = tree.try_charge_as(vm, Kind::Overhead(Overhead::Queue), Pages(2048), Mode::Wait).unwrap();
    let error = tree.set_limits(vm, &LimitPatch { vmm_max: pages(1024), ..NONE }).unwrap_err();
    assert_eq!(error.to_string(), "/vm: vmm.max 4M is below the 8M of overhead in use, which cannot be reclaimed");
    assert_eq!(tree.limits(vm).vmm_max, Limit::Max);
    tree.set_limits(vm, &LimitPatch { vmm_max: pages(2048), ..NONE }).unwrap();
    // semantics row 70: without a limit again it is still counted.
    tree.set_limits(vm, &LimitPatch { vmm_max: Some(Limit::Max), ..NONE }).unwrap();
    tree.uncharge_as(vm, Kind::Overhead(Overhead::Queue), Pages(48));
    assert_eq!(tree.snapshot(vm).vmm.usage, Pages(2000));
}

/// B91: a `high` that is lowered below usage is a crossing too.
#[test]
fn lowering_high_below_usage_is_a_crossing() {
    let (mut tree, vm) = vm();
    let _ = tree.try_charge(vm, Pages(10), Mode::Wait).unwrap();
    tree.set_limits(vm, &LimitPatch { high: pages(10), ..NONE }).unwrap();
    assert_eq!((tree.above_high(vm), tree.snapshot(vm).events.high), (false, 0));
    tree.set_limits(vm, &LimitPatch { high: pages(9), ..NONE }).unwrap();
    assert_eq!((tree.above_high(vm), tree.snapshot(vm).events.high), (true, 1));
    tree.set_limits(vm, &LimitPatch { high: pages(8), ..NONE }).unwrap();
    assert_eq!(tree.snapshot(vm).events.high, 1, "it was above already");
}

/// semantics row 101: the root's limit is the host's budget, and can be changed.
#[test]
fn the_root_has_a_limit() {
    let mut tree = Tree::new(Limit::Pages(Pages(8)));
    let root = tree.root();
    let vm = crate::nodes::vm(&mut tree, root, "vm");
    assert_eq!(tree.try_charge(vm, Pages(9), Mode::Wait).unwrap_err().level, tree.root());
    tree.set_limits(tree.root(), &LimitPatch::max(Limit::Pages(Pages(9)))).unwrap();
    let _ = tree.try_charge(vm, Pages(9), Mode::Wait).unwrap();
}

/// A ceiling caps charges but is no limit of the user's.
#[test]
fn a_ceiling_caps_charges() {
    let (mut tree, vm) = vm();
    tree.set_limits(vm, &LimitPatch::max(Limit::Pages(Pages(100)))).unwrap();
    let generation = tree.generation(vm);
    tree.set_ceiling(vm, Some(Pages(10)));
    assert_eq!((tree.margin(vm), tree.limits(vm).max), (Some(Pages(10)), Limit::Pages(Pages(100))));
    let _ = tree.try_charge(vm, Pages(11), Mode::Wait).unwrap_err();
    tree.set_ceiling(vm, None);
    let _ = tree.try_charge(vm, Pages(11), Mode::Wait).unwrap();
    assert_eq!(tree.generation(vm), generation);
    tree.set_ceiling(vm, Some(Pages(5)));
    assert_eq!((tree.margin(vm), tree.snapshot(vm).overcharge), (Some(Pages::ZERO), Pages::ZERO));
}

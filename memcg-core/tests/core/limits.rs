//! Setting limits at once: order, compare-and-set, idempotence. Changes that wait are in `limit_change`.

use memcg_core::tree::{Kind, LimitPatch, Limits, Mode, NodeId, Overhead, SetLimitError, Tree};
use memcg_core::units::{Limit, PAGE_SIZE, Pages, SizeArg, SizeError, parse_size};

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

/// A refused change leaves every limit, and says which knob to turn.
/// Semantics: 8.
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

/// Writing back what is there changes nothing, the generation included.
/// Semantics: 69, 8.
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
/// Semantics: 72.
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

/// Overhead cannot be reclaimed, so a lower `vmm.max` is refused; without a limit again it is still counted.
/// Semantics: 71, 70.
#[test]
fn vmm_max_below_usage_is_refused() {
    let (mut tree, vm) = vm();
    let _ = tree.try_charge_as(vm, Kind::Overhead(Overhead::Queue), Pages(2048), Mode::Wait).unwrap();
    let error = tree.set_limits(vm, &LimitPatch { vmm_max: pages(1024), ..NONE }).unwrap_err();
    assert_eq!(error.to_string(), "/vm: vmm.max 4M is below the 8M of overhead in use, which cannot be reclaimed");
    assert_eq!(tree.limits(vm).vmm_max, Limit::Max);
    tree.set_limits(vm, &LimitPatch { vmm_max: pages(2048), ..NONE }).unwrap();
    tree.set_limits(vm, &LimitPatch { vmm_max: Some(Limit::Max), ..NONE }).unwrap();
    tree.uncharge_as(vm, Kind::Overhead(Overhead::Queue), Pages(48));
    assert_eq!(tree.snapshot(vm).vmm.usage, Pages(2000));
}

/// A `high` that is lowered below usage is a crossing too, and only once.
/// Semantics: 115, B91.
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

/// The root's limit is the host's budget, and can be changed.
/// Semantics: 101.
#[test]
fn the_root_has_a_limit() {
    let mut tree = Tree::new(Limit::Pages(Pages(8)));
    let root = tree.root();
    let vm = crate::nodes::vm(&mut tree, root, "vm");
    assert_eq!(tree.try_charge(vm, Pages(9), Mode::Wait).unwrap_err().level, tree.root());
    tree.set_limits(tree.root(), &LimitPatch::max(Limit::Pages(Pages(9)))).unwrap();
    let _ = tree.try_charge(vm, Pages(9), Mode::Wait).unwrap();
}

/// A ceiling caps charges but is no limit of the user's: nothing is an overcharge because of it.
/// Semantics: 83, B83.
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

/// A new VM has no limit, no protection, and nothing is counted; the same for a name that is used again.
/// Semantics: 119, 2.
#[test]
fn a_new_vm_is_unlimited_until_a_limit_is_set() {
    let (mut tree, old) = vm();
    tree.set_limits(old, &LimitPatch { min: pages(1), high: pages(2), max: pages(3), vmm_max: pages(3), ..NONE })
        .unwrap();
    let _ = tree.try_charge(old, Pages(4), Mode::Wait).unwrap_err();
    tree.remove(old).unwrap();
    let root = tree.root();
    let vm = crate::nodes::vm(&mut tree, root, "vm");
    let node = tree.snapshot(vm);
    assert_eq!(node.limits, Limits::default());
    assert_eq!((node.limits.max, node.limits.high, node.limits.min), (Limit::Max, Limit::Max, Limit::ZERO));
    assert_eq!((node.memory.usage, node.memory.failcnt, node.generation), (Pages::ZERO, 0, 0));
    assert_eq!(tree.margin(vm), None);
    let _ = tree.try_charge(vm, Pages(1 << 40), Mode::Wait).expect("there is no limit");
}

/// Each limit reads as what was written, and only that one has changed.
/// Semantics: 8.
#[test]
fn reading_a_limit_returns_what_was_written() {
    let (mut tree, vm) = vm();
    let mut expected = tree.limits(vm);
    let values = [
        LimitPatch { max: pages(100), ..NONE },
        LimitPatch { high: pages(90), ..NONE },
        LimitPatch { low: pages(20), ..NONE },
        LimitPatch { min: pages(10), ..NONE },
        LimitPatch { swap_max: pages(7), ..NONE },
        LimitPatch { store_max: pages(6), ..NONE },
        LimitPatch { vmm_max: pages(5), ..NONE },
    ];
    for (n, patch) in values.iter().enumerate() {
        assert_eq!(tree.set_limits(vm, patch), Ok(n as u64 + 1));
        expected = patch.apply(expected);
        assert_eq!(tree.limits(vm), expected);
    }
    let Limits { min, low, high, max, swap_max, store_max, vmm_max } = expected;
    assert_eq!(
        [max, high, low, min, swap_max, store_max, vmm_max].map(Some),
        [100, 90, 20, 10, 7, 6, 5].map(pages),
        "all seven are their own"
    );
}

/// What is typed sets a limit or is refused with the old one in force: 0 denies everything, `max` is no limit, and a
/// percentage, -1, nothing at all or too much is none of these.
/// Semantics (table): 6, 103, B3, B57.
#[test]
fn what_is_typed_sets_a_limit_or_changes_nothing() {
    let (mut tree, vm) = vm();
    let write = |tree: &mut Tree, text: &str| -> Result<(), SizeError> {
        let max = parse_size(text)?.to_limit()?;
        tree.set_limits(vm, &LimitPatch::max(max)).unwrap();
        Ok(())
    };
    write(&mut tree, "192M").unwrap();
    let before = tree.snapshot(vm);
    for text in ["", " ", "-1", "50%", "0x10", "4M junk", "18446744073709551616", "99999999999T", "4097", "unset"] {
        assert!(write(&mut tree, text).is_err(), "{text:?}");
        assert_eq!(tree.snapshot(vm), before, "{text:?}");
    }
    assert_eq!(write(&mut tree, "-1").unwrap_err().to_string(), "\"-1\" is negative: for no limit write max");
    write(&mut tree, "0\n").unwrap();
    assert!(tree.try_charge(vm, Pages(1), Mode::Wait).is_err(), "0 is a limit");
    write(&mut tree, "max\n").unwrap();
    let _ = tree.try_charge(vm, Pages(1), Mode::Wait).expect("max is none");
    // The largest size there is: a limit, and not one that wraps to a small one.
    let largest = u64::MAX / PAGE_SIZE * PAGE_SIZE;
    assert_eq!(parse_size(&largest.to_string()), Ok(SizeArg::Bytes(largest)));
    write(&mut tree, &largest.to_string()).unwrap();
    let _ = tree.try_charge(vm, Pages(1 << 40), Mode::Wait).expect("there is room");
}

/// Two clients, VMs that come, and guests that touch, in turns: there is one owner, so each step is whole, and no charge
/// waits for a change of limits.
/// Semantics: 72.
#[test]
fn requests_of_many_are_one_after_the_other() {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let mut vms = Vec::new();
    for n in 0..50u64 {
        let vm = crate::nodes::vm(&mut tree, root, &format!("vm{n}"));
        vms.push(vm);
        let seen = tree.generation(vm);
        for (client, max) in [(0, 100 + n), (1, 200 + n)] {
            let patch = LimitPatch { max: pages(max), if_generation: Some(seen), ..NONE };
            assert_eq!(tree.set_limits(vm, &patch).is_ok(), client == 0, "the second has not seen the first");
            for vm in &vms {
                let _ = tree.try_charge(*vm, Pages(1), Mode::Wait).unwrap();
            }
        }
        assert_eq!(tree.limits(vm).max, Limit::Pages(Pages(100 + n)));
    }
    assert_eq!(tree.usage(root), Pages((1..=50).map(|n| 2 * n).sum()));
    assert!(tree.check().is_empty());
}

/// A charge that cannot fail may leave usage above a limit while its VM dies. Whoever reads `limit - usage` then reads
/// zero, not 2^64, and after the teardown nothing is above.
/// Semantics: 82, 83, B53.
#[test]
fn what_is_above_a_limit_is_reported_and_harms_no_reader() {
    let (mut tree, vm) = vm();
    tree.set_limits(vm, &LimitPatch { high: pages(8), max: pages(10), ..NONE }).unwrap();
    let _ = tree.try_charge(vm, Pages(10), Mode::Wait).unwrap();
    let forced = tree.try_charge(vm, Pages(3), Mode::NoFail).unwrap();
    assert_eq!(forced.forced_at, Some(vm));
    let node = tree.snapshot(vm);
    assert_eq!((node.memory.usage, node.overcharge, node.memory.forced), (Pages(13), Pages(3), 1));
    assert_eq!((tree.margin(vm), tree.stock_max(vm)), (Some(Pages::ZERO), Pages::ZERO));
    let none = tree.charge_up_to(vm, Pages(5), Pages::ZERO, Mode::Wait).unwrap();
    assert_eq!((none.pages, tree.above_high(vm), tree.check().is_empty()), (Pages::ZERO, true, true));
    tree.uncharge(vm, Pages(2));
    assert_eq!(tree.snapshot(vm).overcharge, Pages(1));
    tree.uncharge_all(vm);
    assert_eq!((tree.snapshot(vm).overcharge, tree.margin(vm)), (Pages::ZERO, Some(Pages(10))));
}

/// Two faults wait while reclaim works: of what it frees each page goes to exactly one of them, and a failure is counted
/// once, however often it was tried.
/// Semantics: 117, 42, B34.
#[test]
fn each_freed_page_serves_one_fault() {
    let (mut tree, vm) = vm();
    tree.set_limits(vm, &LimitPatch { max: pages(10), ..NONE }).unwrap();
    let _ = tree.try_charge(vm, Pages(10), Mode::Wait).unwrap();
    for _ in 0..2 {
        let _ = tree.try_charge(vm, Pages(1), Mode::Wait).unwrap_err();
    }
    for round in 0..5 {
        tree.uncharge(vm, Pages(1));
        let served = (0..2).filter(|_| tree.try_charge(vm, Pages(1), Mode::Again).is_ok()).count();
        assert_eq!(served, 1, "round {round}");
    }
    // A fault of two pages: freed one by one, it fits as soon as there is room for all of it, whatever reclaim said of
    // its progress.
    assert_eq!(tree.try_charge(vm, Pages(2), Mode::Wait).unwrap_err().short_by, Pages(2));
    tree.uncharge(vm, Pages(1));
    assert_eq!(tree.try_charge(vm, Pages(2), Mode::Again).unwrap_err().short_by, Pages(1));
    tree.uncharge(vm, Pages(1));
    let _ = tree.try_charge(vm, Pages(2), Mode::Again).unwrap();
    assert_eq!((tree.snapshot(vm).memory.failcnt, tree.usage(vm)), (3, Pages(10)));
}

/// Device code must not wait: it is told to come back, which is no failure and no reason to reclaim.
/// Semantics: 62, B82, T28.
#[test]
fn device_code_is_told_to_come_back() {
    let (mut tree, vm) = vm();
    tree.set_limits(vm, &LimitPatch { max: pages(10), ..NONE }).unwrap();
    let _ = tree.try_charge(vm, Pages(10), Mode::NoWait).unwrap();
    for _ in 0..1000 {
        let _ = tree.try_charge(vm, Pages(1), Mode::NoWait).unwrap_err();
    }
    let node = tree.snapshot(vm);
    assert_eq!((node.memory.would_block, node.memory.failcnt, node.events.max), (1000, 0, 0));
    tree.uncharge(vm, Pages(1));
    let _ = tree.try_charge(vm, Pages(1), Mode::NoWait).unwrap();
}

/// A reservation that is not used gives back exactly what it took, at every level, whatever limits say by then.
/// Semantics: 78, 17, B13.
#[test]
fn a_reservation_refunds_what_it_took() {
    let (mut tree, vm) = vm();
    let root = tree.root();
    tree.set_limits(vm, &LimitPatch { max: pages(10), ..NONE }).unwrap();
    drop(tree.reserve(vm, Pages(10), Mode::Wait).unwrap());
    assert_eq!((tree.usage(vm), tree.usage(root)), (Pages::ZERO, Pages::ZERO));
    let kept = tree.reserve(vm, Pages(10), Mode::Wait).unwrap().commit_part(Pages(3));
    assert_eq!((kept.pages, tree.usage(vm), tree.usage(root)), (Pages(3), Pages(3), Pages(3)));
    assert!(tree.reserve(vm, Pages(8), Mode::Wait).is_err());
    assert_eq!(tree.usage(vm), Pages(3));
    let _ = tree.reserve(vm, Pages(7), Mode::Wait).unwrap().commit();
    assert_eq!((tree.usage(vm), tree.check().is_empty()), (Pages(10), true));
}

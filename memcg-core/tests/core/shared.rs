//! Shared regions: who pays, and what fraction is whose; in `heirs`, who inherits. Sequences are in `shared_model`.

mod heirs;

use memcg_core::shared::{
    Handover, HoldId, Origin, Owner, RegionId, Regions, Released, SharedError, TemplateId, Touch,
};
use memcg_core::tree::{Counter, LimitPatch, Mode, NodeId, Tree};
use memcg_core::units::{Limit, PAGE_SIZE, Pages};

use crate::nodes::{group, vm};

/// `/ → left → a, b`, `/ → right → c, d`, and one region of 128 pages that nobody maps yet.
struct Host {
    tree: Tree,
    regions: Regions,
    region: RegionId,
    left: NodeId,
    right: NodeId,
    vms: [NodeId; 4],
}

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;
const D: usize = 3;

fn host() -> Host {
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let (left, right) = (group(&mut tree, root, "left"), group(&mut tree, root, "right"));
    let vms = [(left, "a"), (left, "b"), (right, "c"), (right, "d")].map(|(group, name)| vm(&mut tree, group, name));
    let mut regions = Regions::new();
    let region = regions.declare(Pages(128)).unwrap();
    Host { tree, regions, region, left, right, vms }
}

/// A host on which these VMs map the region, in this order, and are no kin.
fn mapped_by(vms: &[usize]) -> Host {
    let mut h = host();
    for vm in vms {
        h.map(*vm, Origin::default());
    }
    h
}

impl Host {
    fn map(&mut self, vm: usize, origin: Origin) {
        self.regions.map(&self.tree, self.region, self.vms[vm], origin).unwrap();
    }

    fn try_touch(&mut self, vm: usize, page: u64) -> Result<Touch, SharedError> {
        self.regions.touch(&mut self.tree, self.region, self.vms[vm], page, Mode::Wait)
    }

    fn touch(&mut self, vm: usize, pages: std::ops::Range<u64>) {
        for page in pages {
            self.try_touch(vm, page).unwrap();
        }
    }

    fn unmap_page(&mut self, vm: usize, page: u64) -> Released {
        self.regions.unmap_pages(&mut self.tree, self.region, self.vms[vm], page..page + 1, None).unwrap()
    }

    /// The VM ends, and the caller gets to know of every hand-over.
    fn leave(&mut self, vm: usize) -> Vec<Handover> {
        let mut heard = Vec::new();
        let _ =
            self.regions.leave(&mut self.tree, self.vms[vm], Some(&mut |handover: &Handover| heard.push(*handover)));
        heard
    }

    fn unhold(&mut self, hold: HoldId) -> Released {
        self.regions.unhold(&mut self.tree, self.region, hold).unwrap()
    }

    fn max(&mut self, node: NodeId, pages: u64) {
        self.tree.set_limits(node, &LimitPatch::max(Limit::Pages(Pages(pages)))).unwrap();
    }

    fn vm_max(&mut self, vm: usize, pages: u64) {
        self.max(self.vms[vm], pages);
    }

    fn usages(&self) -> [u64; 4] {
        self.vms.map(|vm| self.tree.usage(vm).0)
    }

    fn root_own(&self) -> u64 {
        self.tree.snapshot(self.tree.root()).memory.own.0
    }

    fn owner(&self, page: u64) -> Option<Owner> {
        self.regions.region(self.region).unwrap().owner(page)
    }

    fn resident(&self) -> u64 {
        self.regions.region(self.region).unwrap().resident().0
    }

    fn is(&self, vm: usize) -> Option<Owner> {
        Some(Owner::Vm(self.vms[vm]))
    }

    /// Everything that a refused call must not change.
    fn state(&self) -> (Vec<memcg_core::tree::NodeSnapshot>, String) {
        (self.tree.ids().map(|id| self.tree.snapshot(id)).collect(), format!("{:?}", self.regions))
    }
}

fn clone_of(vm: NodeId) -> Origin {
    Origin { clone_of: Some(vm), template: None }
}

fn template(number: u64) -> Origin {
    Origin { clone_of: None, template: Some(TemplateId(number)) }
}

/// Memory that is there already costs nobody anything: a VM at its limit can map it, and the first toucher keeps paying.
/// Semantics: 16, 18, B9.
#[test]
fn a_second_vm_maps_for_free_even_at_its_limit() {
    let mut h = mapped_by(&[A, B]);
    h.vm_max(B, 0);
    assert!(matches!(h.try_touch(A, 5), Ok(Touch::Charged(charge)) if charge.pages == Pages(1)));
    assert_eq!(h.try_touch(B, 5), Ok(Touch::Shared(h.is(A).unwrap())));
    assert_eq!(h.usages(), [1, 0, 0, 0]);
    assert_eq!(h.tree.snapshot(h.vms[B]).memory.failcnt, 0, "nobody was asked");
    assert_eq!(h.try_touch(B, 5), Ok(Touch::Present(h.is(A).unwrap())), "a fault that lost its race counts nothing");
    assert_eq!(h.regions.region(h.region).unwrap().refs(5), 2);
}

/// Charge and uncharge are symmetric: however many map a page and in whatever order they go, nothing stays charged.
/// Semantics: 30, B15.
#[test]
fn a_hundred_mappers_leave_nothing_behind() {
    for reverse in [false, true] {
        let mut h = host();
        let mut vms: Vec<NodeId> = (0..100).map(|n| vm(&mut h.tree, h.left, &format!("vm{n}"))).collect();
        for vm in &vms {
            h.regions.map(&h.tree, h.region, *vm, Origin::default()).unwrap();
            h.regions.touch(&mut h.tree, h.region, *vm, 7, Mode::Wait).unwrap();
        }
        assert_eq!((h.tree.usage(h.left), h.resident()), (Pages(1), 1));
        if reverse {
            vms.reverse();
        }
        for (gone, vm) in vms.iter().enumerate() {
            assert_eq!(h.tree.usage(h.left), Pages(1), "{gone} have left");
            let _ = h.regions.unmap_pages(&mut h.tree, h.region, *vm, 7..8, None).unwrap();
        }
        assert_eq!((h.tree.usage(h.left), h.owner(7), h.resident()), (Pages(0), None, 0));
        assert_eq!(h.tree.check(), []);
    }
}

/// The last unmap ends the record: who touches then is the first again and is charged exactly once.
/// Semantics: 110, B17.
#[test]
fn after_the_last_unmap_a_touch_is_the_first_again() {
    let mut h = mapped_by(&[A, C]);
    h.touch(A, 0..1);
    h.touch(C, 0..1);
    assert_eq!(h.unmap_page(A, 0), Released { handed_over: Pages(1), ..Released::default() });
    assert_eq!((h.usages(), h.owner(0)), ([0, 0, 1, 0], h.is(C)));
    assert_eq!(h.unmap_page(C, 0), Released { freed: Pages(1), ..Released::default() });
    assert_eq!((h.usages(), h.owner(0)), ([0; 4], None));
    h.touch(A, 0..1);
    h.touch(A, 0..1);
    assert_eq!((h.usages(), h.owner(0)), ([1, 0, 0, 0], h.is(A)));
}

/// What cannot be is found before anything is charged, and a refused charge leaves no trace but one failcnt.
/// Semantics: 25, B14, B21.
#[test]
fn bad_requests_and_refusals_change_nothing() {
    let mut h = mapped_by(&[A]);
    h.touch(A, 0..1);
    h.vm_max(A, 1);
    let before = h.state();
    let a = h.vms[A];
    let region = h.region;
    assert_eq!(
        h.regions.map(&h.tree, region, a, Origin::default()).unwrap_err().to_string(),
        "\"/left/a\" maps shared region 1 already: unmap it first"
    );
    assert_eq!(
        h.try_touch(A, 128).unwrap_err().to_string(),
        "pages 128 to 129 are not within the 128 pages of shared region 1"
    );
    assert!(matches!(h.try_touch(A, u64::MAX), Err(SharedError::OutOfRange { .. })));
    assert!(matches!(h.try_touch(B, 1), Err(SharedError::NotMapped { vm, .. }) if vm == "/left/b"));
    let unmap = |h: &mut Host, vm: usize, pages| h.regions.unmap_pages(&mut h.tree, region, h.vms[vm], pages, None);
    assert!(matches!(unmap(&mut h, A, 100..129), Err(SharedError::OutOfRange { end: 129, .. })));
    assert!(matches!(unmap(&mut h, B, 0..1), Err(SharedError::NotMapped { .. })));
    assert!(matches!(h.regions.unmap(&mut h.tree, region, h.vms[B], None), Err(SharedError::NotMapped { .. })));
    assert_eq!(h.state(), before, "not even a failcnt: no charge was tried");

    let Err(SharedError::Refused(refused)) = h.try_touch(A, 1) else {
        panic!("there is no room for a second page");
    };
    assert_eq!((refused.level, refused.short_by), (a, Pages(1)));
    h.tree.reset_failcnt(a, Counter::Memory);
    let mut after = h.state();
    for (old, new) in before.0.iter().zip(&mut after.0) {
        (new.events, new.events_local) = (old.events, old.events_local);
    }
    assert_eq!(after, before);
}

/// Regions that never were, groups, the root and VMs that are going are told so, with their numbers.
/// Semantics: B7.
#[test]
fn only_a_vm_that_is_there_can_map_a_region_that_is_there() {
    let mut h = host();
    let gone = h.regions.declare(Pages(1)).unwrap();
    h.regions.forget(gone).unwrap();
    assert_eq!(h.regions.forget(gone), Err(SharedError::UnknownRegion(gone)));
    assert_ne!(h.regions.declare(Pages(1)).unwrap(), gone, "a number is never given out twice");
    assert_eq!(h.regions.declare(Pages(0)), Err(SharedError::BadSize(Pages(0))));
    assert!(h.regions.declare(Pages(u64::MAX)).unwrap_err().to_string().contains("use 1 to 268435456 pages"));

    let removed = vm(&mut h.tree, h.left, "removed");
    h.tree.remove(removed).unwrap();
    h.tree.set_offline(h.vms[B]).unwrap();
    for not in [h.tree.root(), h.left, h.vms[B], removed] {
        let error = h.regions.map(&h.tree, h.region, not, Origin::default()).unwrap_err();
        assert!(matches!(error, SharedError::NotAVm(_)), "{error}");
    }
    h.map(A, Origin::default());
    h.tree.set_offline(h.vms[A]).unwrap();
    let offline = h.regions.touch(&mut h.tree, h.region, h.vms[A], 0, Mode::NoFail);
    assert_eq!(offline, Err(SharedError::NotAVm("/left/a".to_owned())), "not even what cannot be refused");
    assert_eq!(
        h.regions.forget(h.region).unwrap_err().to_string(),
        "shared region 1 is in use (mappings: 1, temporary ones: 0): end them first"
    );
}

/// A VM that is not accounted can be given members: then it is a group, and a group owns and inherits nothing.
/// Semantics: 121, 127.
#[test]
fn who_has_got_members_owns_nothing_new() {
    let mut h = host();
    let root = h.tree.root();
    let [off, other] = ["off", "other"].map(|name| h.tree.add(root, name).unwrap());
    for vm in [other, off] {
        h.regions.map(&h.tree, h.region, vm, Origin::default()).unwrap();
        h.regions.touch(&mut h.tree, h.region, vm, 0, Mode::Wait).unwrap();
    }
    h.tree.add(off, "member").unwrap();
    let touched = h.regions.touch(&mut h.tree, h.region, off, 1, Mode::Wait);
    assert_eq!(touched, Err(SharedError::NotAVm("/off".to_owned())));
    h.tree.activate(off, |_| Pages::ZERO).unwrap();
    let released = h.regions.unmap(&mut h.tree, h.region, other, None).unwrap();
    assert_eq!((released.handed_over, released.to_root), (Pages(0), Pages(1)));
    assert_eq!(h.tree.snapshot(off).memory.own, Pages(0));
    assert_eq!(h.regions.unmap(&mut h.tree, h.region, off, None).unwrap().freed, Pages(1));
    assert_eq!(h.tree.check(), []);
}

/// Giving back is always welcome: what was never touched is counted and costs nothing.
/// Semantics: 21.
#[test]
fn unmapping_what_was_never_touched_is_counted() {
    let mut h = mapped_by(&[A, B]);
    h.touch(A, 0..2);
    let released = h.regions.unmap_pages(&mut h.tree, h.region, h.vms[B], 0..100, None).unwrap();
    assert_eq!((released, h.usages()), (Released::default(), [2, 0, 0, 0]));
    assert_eq!(h.regions.region(h.region).unwrap().redundant_unmaps(), 100);
    h.leave(A);
    assert_eq!(h.regions.region(h.region).unwrap().redundant_unmaps(), 100, "an end is not a claim");
}

/// Breaking the sharing of a snapshot costs the writer its own copies; the shared pages keep their payer, and if the
/// payer writes, who still needs them pays.
/// Semantics: 110.
#[test]
fn a_copy_on_write_is_the_writer_s() {
    let mut h = host();
    for vm in [A, B] {
        h.map(vm, template(1));
        h.touch(vm, 0..128);
    }
    assert_eq!(h.usages(), [128, 0, 0, 0]);
    let write = |h: &mut Host, vm: usize| {
        let _ = h.tree.try_charge(h.vms[vm], Pages(100), Mode::Wait).unwrap();
        h.regions.unmap_pages(&mut h.tree, h.region, h.vms[vm], 0..100, None).unwrap()
    };
    assert_eq!(write(&mut h, B), Released::default());
    assert_eq!(h.usages(), [128, 100, 0, 0]);
    assert_eq!((h.owner(0), h.owner(127)), (h.is(A), h.is(A)));
    // Nobody else maps what A now replaces.
    assert_eq!(write(&mut h, A).freed, Pages(100));
    assert_eq!(h.usages(), [128, 100, 0, 0]);
    // The base's rest: A leaves it, B pays.
    let _ = h.regions.unmap(&mut h.tree, h.region, h.vms[A], None).unwrap();
    assert_eq!(h.usages(), [100, 128, 0, 0]);
}

/// A page that no VM maps any more but that is still held stays charged until the hold ends.
/// Semantics: 26, 128.
#[test]
fn what_a_hold_keeps_the_root_pays_for() {
    let mut h = mapped_by(&[A, B]);
    h.touch(A, 0..10);
    h.touch(B, 0..3);
    let (snapshotter, debugger) = (h.regions.hold(h.region).unwrap(), h.regions.hold(h.region).unwrap());
    h.leave(A);
    assert_eq!((h.usages(), h.root_own(), h.resident()), ([0, 3, 0, 0], 7, 10));
    assert_eq!(h.owner(5), Some(Owner::Root));
    assert_eq!(h.unhold(snapshotter), Released::default(), "another one is left");
    assert_eq!((h.unhold(debugger).freed, h.root_own(), h.resident()), (Pages(7), 0, 3));
    let twice = h.regions.unhold(&mut h.tree, h.region, debugger).unwrap_err();
    assert_eq!(twice.to_string(), "shared region 1 has no temporary mapping 3");
    assert_eq!(h.usages(), [0, 3, 0, 0]);
}

/// The root pays for want of anybody else, not as a way out of a limit: who touches a page that only a hold keeps pays
/// for it, or is refused.
/// Semantics: 128, B106.
#[test]
fn a_held_page_becomes_its_next_toucher_s() {
    let mut h = mapped_by(&[A, B]);
    h.touch(A, 0..2);
    h.regions.hold(h.region).unwrap();
    h.leave(A);
    assert_eq!(h.root_own(), 2);
    assert!(matches!(h.try_touch(B, 0), Ok(Touch::Charged(_))));
    assert_eq!((h.usages(), h.root_own(), h.owner(0)), ([0, 1, 0, 0], 1, h.is(B)));
    h.vm_max(B, 1);
    assert!(matches!(h.try_touch(B, 1), Err(SharedError::Refused(_))));
    assert_eq!((h.root_own(), h.owner(1), h.resident()), (1, Some(Owner::Root), 2));
}

/// Who pays is found from the page's owner; a fresh page has none and asks the toucher's own limits, not its sharer's.
/// Semantics: 123.
#[test]
fn a_fresh_page_asks_its_toucher_s_limit() {
    let mut h = mapped_by(&[A, C]);
    h.touch(A, 0..4);
    h.vm_max(A, 4);
    assert!(matches!(h.try_touch(C, 4), Ok(Touch::Charged(_))), "that A is full is no affair of C");
    assert!(matches!(h.try_touch(A, 5), Err(SharedError::Refused(refused)) if refused.level == h.vms[A]));
    h.touch(C, 0..4);
    assert_eq!((h.usages(), h.tree.usage(h.left), h.tree.usage(h.right)), ([4, 0, 1, 0], Pages(4), Pages(1)));
}

/// A VM that is not accounted owns like any other and costs nobody anything; from the moment that it is accounted it pays
/// for all it owns, and gives exactly that back.
/// Semantics: 67, 94.
#[test]
fn what_a_vm_owned_before_it_was_accounted_is_charged_at_activation() {
    let mut h = mapped_by(&[]);
    let off = h.tree.add(h.tree.root(), "off").unwrap();
    h.vms[A] = off;
    h.map(A, Origin::default());
    h.map(C, Origin::default());
    h.touch(A, 0..6);
    h.touch(C, 0..2);
    assert_eq!((h.usages(), h.tree.usage(h.tree.root()), h.owner(0)), ([0; 4], Pages(0), h.is(A)));
    let Host { tree, regions, .. } = &mut h;
    let _ = tree.activate(off, |vm| regions.owned(Owner::Vm(vm))).unwrap();
    assert_eq!(h.usages(), [6, 0, 0, 0]);
    h.touch(A, 6..7);
    h.leave(A);
    assert_eq!((h.usages(), h.tree.usage(h.tree.root())), ([0, 0, 2, 0], Pages(2)));
    assert_eq!(h.tree.check(), []);
}

/// Private RAM has no owner but its leaf: a VM without regions has nothing to hand over, and ends at no cost.
/// Semantics: 135.
#[test]
fn private_memory_is_never_handed_over() {
    let mut h = mapped_by(&[A, B]);
    for vm in [A, B, C] {
        let _ = h.tree.try_charge(h.vms[vm], Pages(50), Mode::Wait).unwrap();
    }
    h.touch(A, 0..2);
    h.touch(B, 0..2);
    assert_eq!(h.leave(C), []);
    h.leave(A);
    assert_eq!(h.usages(), [50, 52, 50, 0]);
    assert_eq!((h.tree.uncharge_all(h.vms[A]), h.regions.owned(Owner::Vm(h.vms[B]))), (Pages(50), Pages(2)));
}

/// Fractions are exact: with any number of sharers, joined and left in any order, they are one page together, and equal
/// but for the bytes that cannot be divided.
/// Semantics: 111, T27.
#[test]
fn shares_of_a_page_are_exactly_one_page() {
    let mut h = host();
    let vms: Vec<NodeId> = (0..7).map(|n| vm(&mut h.tree, h.right, &format!("vm{n}"))).collect();
    let shares = |h: &Host| -> Vec<u64> {
        let region = h.regions.region(h.region).unwrap();
        let shares: Vec<u64> = region.mappers().map(|vm| region.page_share(9, Owner::Vm(vm))).collect();
        assert_eq!(shares.iter().sum::<u64>(), PAGE_SIZE, "{shares:?}");
        shares
    };
    for vm in &vms {
        h.regions.map(&h.tree, h.region, *vm, Origin::default()).unwrap();
    }
    // Touched in another order than joined: the order of joining decides.
    for (n, vm) in vms.iter().enumerate().rev() {
        h.regions.touch(&mut h.tree, h.region, *vm, 9, Mode::Wait).unwrap();
        assert_eq!(shares(&h)[n..].len(), 7 - n);
    }
    assert_eq!(shares(&h), [586, 585, 585, 585, 585, 585, 585]);
    for gone in [3, 0, 6, 2] {
        let _ = h.regions.unmap(&mut h.tree, h.region, vms[gone], None).unwrap();
        shares(&h);
    }
    assert_eq!(shares(&h), [1366, 1365, 1365]);
    let _ = h.regions.unmap_pages(&mut h.tree, h.region, vms[4], 9..10, None).unwrap();
    assert_eq!(shares(&h), [2048, 0, 2048], "who maps the region but not the page has no part in it");
    // A page of one VM, and all of it together.
    h.regions.touch(&mut h.tree, h.region, vms[4], 0, Mode::Wait).unwrap();
    assert_eq!(h.regions.share(Owner::Vm(vms[4])), PAGE_SIZE);
    assert_eq!(vms.iter().map(|vm| h.regions.share(Owner::Vm(*vm))).sum::<u64>(), 2 * PAGE_SIZE);
    assert_eq!(h.regions.share(Owner::Root), 0);
}

/// What nobody but a hold keeps is the root's whole page; what the root merely pays for belongs to those who map it.
/// Semantics: 111, 128.
#[test]
fn the_root_s_share_is_what_no_vm_maps() {
    let mut h = mapped_by(&[A, B]);
    h.touch(A, 0..2);
    h.touch(B, 0..1);
    h.vm_max(B, 0);
    let hold = h.regions.hold(h.region).unwrap();
    h.leave(A);
    assert_eq!(h.root_own(), 2);
    assert_eq!(h.regions.share(Owner::Root), PAGE_SIZE);
    assert_eq!(h.regions.share(Owner::Vm(h.vms[B])), PAGE_SIZE);
    assert_eq!(h.regions.share(Owner::Vm(h.vms[A])), 0);
    // The hold ends: only what nobody maps goes.
    assert_eq!(h.unhold(hold).freed, Pages(1));
    assert_eq!((h.root_own(), h.regions.share(Owner::Root)), (1, 0));
    assert_eq!(h.regions.share(Owner::Vm(h.vms[B])), PAGE_SIZE);
}

//! Random sequences on shared regions against an oracle that keeps, for each page, the set of VMs that map it and who
//! pays, and recomputes every number from that.

use std::collections::BTreeSet;
use std::ops::Range;

use memcg_core::shared::{
    Handover, HoldId, Origin, Owner, Region, RegionId, Regions, Released, SharedError, TemplateId, Touch,
};
use memcg_core::tree::{LimitPatch, Mode, NodeId, Tree};
use memcg_core::units::{Limit, PAGE_SIZE, Pages};
use proptest::prelude::*;

use crate::nodes::{group, vm};

const VMS: usize = 8;
const REGIONS: usize = 2;
const PAGES: u64 = 70;

/// Nodes by number: the VMs, the two groups, the root.
const ROOT: usize = VMS + 2;

/// One page: who maps it, and who pays (`None`: the root).
#[derive(Clone, Debug)]
struct Page {
    by: BTreeSet<usize>,
    owner: Option<usize>,
}

#[derive(Clone, Debug)]
struct Object {
    id: RegionId,
    /// In the order of joining.
    mappers: Vec<(usize, Origin)>,
    holds: Vec<HoldId>,
    /// Resident ones only.
    pages: Vec<Option<Page>>,
}

/// A host with two groups of three VMs and two VMs at the root, at first.
struct Run {
    tree: Tree,
    regions: Regions,
    groups: [NodeId; 2],
    vms: [NodeId; VMS],
    /// The node above each VM.
    above: [usize; VMS],
    online: [bool; VMS],
    /// What each VM is charged besides shared pages.
    private: [u64; VMS],
    /// Limits of the VMs, the two groups, the root.
    max: [Option<u64>; ROOT + 1],
    objects: Vec<Object>,
    /// Fractions as one would deal them out, byte by byte to each in turn: for so many sharers, to each of them.
    dealt: [[u64; VMS]; VMS + 1],
    /// Number of the next VM's name.
    named: usize,
}

#[derive(Clone, Debug)]
enum Op {
    Map(usize, usize, Option<usize>, Option<u64>),
    Touch(usize, usize, u64, u64, Mode),
    UnmapPages(usize, usize, u64, u64),
    Unmap(usize, usize),
    /// Leaves, and comes back as another VM.
    Leave(usize),
    Offline(usize),
    Hold(usize),
    Unhold(usize, usize),
    Private(usize, u64),
    Limit(usize, Option<u64>),
    /// To a group, or the root.
    Move(usize, usize),
}

fn op() -> impl Strategy<Value = Op> {
    let (v, r, p) = (0..VMS, 0..REGIONS, 0..PAGES);
    let mode = prop_oneof![8 => Just(Mode::Wait), 1 => Just(Mode::NoRetry), 1 => Just(Mode::NoFail)];
    let limit = prop::option::weighted(0.7, 0u64..100);
    let template = prop::option::of(0u64..2);
    prop_oneof![
        6 => (v.clone(), r.clone(), prop::option::of(v.clone()), template).prop_map(|(v, r, c, t)| Op::Map(v, r, c, t)),
        12 => (v.clone(), r.clone(), p.clone(), 1u64..40, mode).prop_map(|(v, r, p, n, m)| Op::Touch(v, r, p, n, m)),
        4 => (v.clone(), r.clone(), p, 1u64..40).prop_map(|(v, r, p, n)| Op::UnmapPages(v, r, p, n)),
        2 => (v.clone(), r.clone()).prop_map(|(v, r)| Op::Unmap(v, r)),
        3 => v.clone().prop_map(Op::Leave),
        1 => v.clone().prop_map(Op::Offline),
        1 => r.clone().prop_map(Op::Hold),
        1 => (r, 0usize..4).prop_map(|(r, n)| Op::Unhold(r, n)),
        2 => (v, 0u64..60).prop_map(|(v, n)| Op::Private(v, n)),
        4 => (0..ROOT + 1, limit).prop_map(|(n, l)| Op::Limit(n, l)),
        1 => (0..VMS, 0usize..3).prop_map(|(v, to)| Op::Move(v, to)),
    ]
}

impl Run {
    fn new() -> Run {
        let mut tree = Tree::new(Limit::Max);
        let root = tree.root();
        let groups = ["g0", "g1"].map(|name| group(&mut tree, root, name));
        let above = [VMS, VMS, VMS, VMS + 1, VMS + 1, VMS + 1, ROOT, ROOT];
        let mut named = 0;
        let vms = above.map(|parent| {
            named += 1;
            vm(&mut tree, [groups[0], groups[1], root][parent - VMS], &format!("vm{named}"))
        });
        let mut regions = Regions::new();
        let object = |_| Object {
            id: regions.declare(Pages(PAGES)).unwrap(),
            mappers: Vec::new(),
            holds: Vec::new(),
            pages: vec![None; PAGES as usize],
        };
        let objects = (0..REGIONS).map(object).collect();
        let (online, private, max) = ([true; VMS], [0; VMS], [None; ROOT + 1]);
        let mut dealt = [[0; VMS]; VMS + 1];
        for sharers in 1..=VMS {
            (0..PAGE_SIZE as usize).for_each(|byte| dealt[sharers][byte % sharers] += 1);
        }
        Run { tree, regions, groups, vms, above, online, private, max, objects, dealt, named }
    }

    fn node(&self, n: usize) -> NodeId {
        match n {
            0..VMS => self.vms[n],
            VMS => self.groups[0],
            ROOT => self.tree.root(),
            _ => self.groups[1],
        }
    }

    /// The chain of limits above a VM: itself, its group if it has one, the root.
    fn chain(&self, vm: usize) -> Vec<usize> {
        let mut chain = vec![vm, self.above[vm], ROOT];
        chain.dedup();
        chain
    }

    fn owned(&self, owner: Option<usize>) -> u64 {
        let pages = self.objects.iter().flat_map(|object| object.pages.iter().flatten());
        pages.filter(|page| page.owner == owner).count() as u64
    }

    /// What a node of the tree must show, from scratch.
    fn usage(&self, n: usize) -> u64 {
        let below = (0..VMS).filter(|vm| self.chain(*vm).contains(&n));
        let vms: u64 = below.map(|vm| self.private[vm] + self.owned(Some(vm))).sum();
        vms + if n == ROOT { self.owned(None) } else { 0 }
    }

    fn fits(&self, vm: usize) -> bool {
        self.chain(vm).iter().all(|n| self.max[*n].is_none_or(|max| self.usage(*n) < max))
    }

    fn payer(&self, owner: Option<usize>) -> Owner {
        owner.map_or(Owner::Root, |vm| Owner::Vm(self.vms[vm]))
    }

    fn maps(&self, vm: usize, r: usize) -> bool {
        self.objects[r].mappers.iter().any(|(mapper, _)| *mapper == vm)
    }

    /// Who may inherit from `leaver`, in order.
    fn heirs(&self, r: usize, leaver: usize) -> Vec<usize> {
        let mappers = &self.objects[r].mappers;
        let (_, own) = *mappers.iter().find(|(vm, _)| *vm == leaver).unwrap();
        let others = || mappers.iter().filter(|(vm, _)| *vm != leaver);
        let clones = others().filter(|(_, origin)| origin.clone_of == Some(self.vms[leaver]));
        let siblings = others().filter(|(_, origin)| {
            let of = |origin: Origin| (origin.clone_of, origin.template);
            let ((a, s), (b, t)) = (of(own), of(*origin));
            (a == b && a.is_some()) || (s == t && s.is_some())
        });
        let mut order: Vec<usize> = Vec::new();
        for (vm, _) in clones.chain(siblings).chain(others()) {
            if !order.contains(vm) {
                order.push(*vm);
            }
        }
        order
    }

    /// Unmaps in the oracle; what the hook must hear, and what the call must return.
    fn unmap(&mut self, r: usize, leaver: usize, range: Range<u64>) -> (Vec<Handover>, Released) {
        let (mut released, mut heard) = (Released::default(), Vec::new());
        let held = !self.objects[r].holds.is_empty();
        let mut orphans = Vec::new();
        for n in range.start as usize..range.end as usize {
            let Some(page) = &mut self.objects[r].pages[n] else {
                continue;
            };
            if !page.by.remove(&leaver) {
                continue;
            }
            if page.by.is_empty() && !held {
                self.objects[r].pages[n] = None;
                released.freed += Pages(1);
            } else if page.owner == Some(leaver) {
                orphans.push(n);
            }
        }
        // While they have no owner they are nobody's charge: leaver and root are charged without them.
        let mut waiting: Vec<(usize, Page)> =
            orphans.into_iter().map(|n| (n, self.objects[r].pages[n].take().unwrap())).collect();
        for heir in self.heirs(r, leaver) {
            let mut got = 0;
            let mut rest = Vec::new();
            for (n, mut page) in waiting {
                if page.by.contains(&heir) && self.online[heir] && self.fits(heir) {
                    page.owner = Some(heir);
                    self.objects[r].pages[n] = Some(page);
                    got += 1;
                } else {
                    rest.push((n, page));
                }
            }
            waiting = rest;
            released.handed_over += Pages(got);
            if got > 0 && self.above[heir] != self.above[leaver] {
                heard.push((Some(heir), got));
            }
        }
        if !waiting.is_empty() {
            released.to_root = Pages(waiting.len() as u64);
            heard.push((None, released.to_root.0));
        }
        for (n, mut page) in waiting {
            page.owner = None;
            self.objects[r].pages[n] = Some(page);
        }
        let region = self.objects[r].id;
        let from = self.payer(Some(leaver));
        let told =
            |(to, pages): (Option<usize>, u64)| Handover { region, from, to: self.payer(to), pages: Pages(pages) };
        (heard.into_iter().map(told).collect(), released)
    }

    fn touch(&mut self, vm: usize, r: usize, n: u64, mode: Mode) {
        let (id, leaf) = (self.objects[r].id, self.vms[vm]);
        let result = self.regions.touch(&mut self.tree, id, leaf, n, mode);
        if !self.maps(vm, r) {
            assert!(matches!(result, Err(SharedError::NotMapped { .. })), "{result:?}");
            return;
        }
        if !self.online[vm] {
            assert!(matches!(result, Err(SharedError::NotAVm(_))), "{result:?}");
            return;
        }
        let resident = self.objects[r].pages[n as usize].take();
        if let Some(mut page) = resident.clone().filter(|page| !page.by.is_empty()) {
            let payer = self.payer(page.owner);
            let expected = if page.by.insert(vm) { Touch::Shared(payer) } else { Touch::Present(payer) };
            assert_eq!(result, Ok(expected));
            self.objects[r].pages[n as usize] = Some(page);
            return;
        }
        // The toucher is asked while the root still pays for what is only held.
        self.objects[r].pages[n as usize] = resident;
        if self.fits(vm) || mode == Mode::NoFail {
            assert!(matches!(result, Ok(Touch::Charged(charge)) if charge.pages == Pages(1)), "{result:?}");
            self.objects[r].pages[n as usize] = Some(Page { by: BTreeSet::from([vm]), owner: Some(vm) });
        } else {
            assert!(matches!(result, Err(SharedError::Refused(_))), "{result:?}");
        }
    }

    fn leave(&mut self, vm: usize) {
        let mut heard = Vec::new();
        let mut hook = |handover: &Handover| heard.push(*handover);
        let real = self.regions.leave(&mut self.tree, self.vms[vm], Some(&mut hook));
        let (mut expected, mut sum) = (Vec::new(), Released::default());
        for r in 0..REGIONS {
            if self.maps(vm, r) {
                let (handovers, released) = self.unmap(r, vm, 0..PAGES);
                expected.extend(handovers);
                sum.freed += released.freed;
                sum.handed_over += released.handed_over;
                sum.to_root += released.to_root;
                self.objects[r].mappers.retain(|(mapper, _)| *mapper != vm);
            }
        }
        assert_eq!((heard, real), (expected, sum));
        // What is left is its own; then another VM takes its place.
        let parent = self.tree.parent(self.vms[vm]).unwrap();
        assert_eq!(self.tree.uncharge_all(self.vms[vm]), Pages(self.private[vm]));
        self.tree.remove(self.vms[vm]).unwrap();
        self.named += 1;
        self.vms[vm] = crate::nodes::vm(&mut self.tree, parent, &format!("vm{}", self.named));
        (self.online[vm], self.private[vm], self.max[vm]) = (true, 0, None);
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Map(vm, r, clone_of, template) => {
                let origin = Origin {
                    clone_of: clone_of.filter(|of| *of != vm).map(|of| self.vms[of]),
                    template: template.map(TemplateId),
                };
                let result = self.regions.map(&self.tree, self.objects[r].id, self.vms[vm], origin);
                match (self.online[vm], self.maps(vm, r)) {
                    (false, _) => assert!(matches!(result, Err(SharedError::NotAVm(_)))),
                    (true, true) => assert!(matches!(result, Err(SharedError::AlreadyMapped { .. }))),
                    (true, false) => {
                        assert_eq!(result, Ok(()));
                        self.objects[r].mappers.push((vm, origin));
                    }
                }
            }
            Op::Touch(vm, r, from, n, mode) => {
                (from..PAGES.min(from + n)).for_each(|page| self.touch(vm, r, page, mode));
            }
            Op::UnmapPages(vm, r, from, n) => {
                let (id, range) = (self.objects[r].id, from..PAGES.min(from + n));
                let mut heard = Vec::new();
                let mut hook = |handover: &Handover| heard.push(*handover);
                let (tree, leaf) = (&mut self.tree, self.vms[vm]);
                let real = self.regions.unmap_pages(tree, id, leaf, range.clone(), Some(&mut hook));
                if self.maps(vm, r) {
                    let (expected, released) = self.unmap(r, vm, range);
                    assert_eq!((heard, real), (expected, Ok(released)));
                } else {
                    assert!(matches!(real, Err(SharedError::NotMapped { .. })));
                }
            }
            Op::Unmap(vm, r) => {
                let real = self.regions.unmap(&mut self.tree, self.objects[r].id, self.vms[vm], None);
                if self.maps(vm, r) {
                    assert_eq!(real, Ok(self.unmap(r, vm, 0..PAGES).1));
                    self.objects[r].mappers.retain(|(mapper, _)| *mapper != vm);
                } else {
                    assert!(matches!(real, Err(SharedError::NotMapped { .. })));
                }
            }
            Op::Leave(vm) => self.leave(vm),
            Op::Offline(vm) => {
                self.tree.set_offline(self.vms[vm]).unwrap();
                self.online[vm] = false;
            }
            Op::Hold(r) => {
                let hold = self.regions.hold(self.objects[r].id).unwrap();
                self.objects[r].holds.push(hold);
            }
            Op::Unhold(r, n) => {
                let object = &mut self.objects[r];
                if object.holds.is_empty() {
                    return;
                }
                let hold = object.holds.remove(n % object.holds.len());
                let before = self.regions.region(object.id).unwrap().resident();
                if object.holds.is_empty() {
                    let kept = |page: &Option<Page>| page.as_ref().is_some_and(|page| page.by.is_empty());
                    object.pages.iter_mut().filter(|page| kept(page)).for_each(|page| *page = None);
                }
                let left = object.pages.iter().flatten().count() as u64;
                let released = self.regions.unhold(&mut self.tree, object.id, hold).unwrap();
                assert_eq!(released, Released { freed: Pages(before.0 - left), ..Released::default() });
            }
            Op::Private(vm, n) => {
                self.tree.uncharge(self.vms[vm], Pages(self.private[vm]));
                self.private[vm] = 0;
                if self.tree.try_charge(self.vms[vm], Pages(n), Mode::NoWait).is_ok() {
                    self.private[vm] = n;
                }
            }
            Op::Limit(n, max) => {
                let patch = LimitPatch::max(Limit::from(max.map(Pages)));
                if self.tree.set_limits(self.node(n), &patch).is_ok() {
                    self.max[n] = max;
                }
            }
            Op::Move(vm, to) => {
                if self.tree.move_node(self.vms[vm], self.node(VMS + to)).is_ok() {
                    self.above[vm] = VMS + to;
                }
            }
        }
    }

    fn check(&self) {
        assert_eq!(self.tree.check(), []);
        for n in 0..ROOT + 1 {
            assert_eq!(self.tree.usage(self.node(n)), Pages(self.usage(n)), "node {n}");
        }
        for object in &self.objects {
            self.check_object(object, self.regions.region(object.id).unwrap());
        }
        let owners = (0..VMS).map(Some).chain([None]);
        let charged: Pages = owners.clone().map(|owner| self.regions.owned(self.payer(owner))).sum();
        let resident = self.regions.iter().map(|(_, region)| region.resident()).sum();
        assert_eq!(charged, resident, "each resident page has one payer");
        let shares: u64 = owners.map(|owner| self.regions.share(self.payer(owner))).sum();
        assert_eq!(shares, charged.bytes(), "fractions add up");
    }

    fn check_object(&self, object: &Object, region: &Region) {
        let mappers: Vec<NodeId> = object.mappers.iter().map(|(vm, _)| self.vms[*vm]).collect();
        assert_eq!(region.mappers().collect::<Vec<_>>(), mappers);
        assert_eq!(region.resident().0, object.pages.iter().flatten().count() as u64);
        for (n, page) in (0..).zip(&object.pages) {
            let owner = page.as_ref().map(|page| self.payer(page.owner));
            assert_eq!(region.owner(n), owner, "page {n}");
            if let Some(Owner::Vm(vm)) = region.owner(n) {
                assert!(self.tree.contains(vm) && region.maps(vm, n), "an owner is alive and maps its page");
            }
            let by = page.as_ref().map(|page| page.by.clone()).unwrap_or_default();
            assert_eq!(region.refs(n), by.len());
            let turn: Vec<usize> = object.mappers.iter().map(|(vm, _)| *vm).filter(|vm| by.contains(vm)).collect();
            let mut dealt = [0; VMS];
            for (place, vm) in turn.iter().enumerate() {
                dealt[*vm] = self.dealt[turn.len()][place];
            }
            let shares: Vec<u64> = self.vms.iter().map(|vm| region.page_share(n, Owner::Vm(*vm))).collect();
            assert_eq!(shares, dealt, "page {n}");
        }
    }
}

proptest! {
    #![proptest_config(crate::cases::cases(100))]

    /// Whoever maps, leaves, is refused or dies in whatever order: each resident page has exactly one payer that is
    /// alive and maps it, or the root; heirs, hooks and fractions are the oracle's; and in the end nothing is left.
    /// Semantics (table): 16, 30, 110, 111, 121, 124, 126, 127, 128, 129, 133, B15, B17, B90, B103, B108, B111, T27, T29.
    #[test]
    fn regions_agree_with_the_oracle(
        families in prop::option::of(prop::collection::vec((prop::option::of(0..VMS), prop::option::of(0u64..2)), VMS)),
        ops in prop::collection::vec(op(), 1..60),
    ) {
        let mut run = Run::new();
        // Some hosts begin with everybody on the same pages, or kin would seldom meet as heirs.
        for (vm, (clone_of, template)) in families.into_iter().flatten().enumerate() {
            run.apply(Op::Map(vm, 0, clone_of, template));
            run.apply(Op::Touch(vm, 0, 0, PAGES / 2, Mode::Wait));
        }
        for op in ops {
            run.apply(op);
            run.check();
        }
        (0..VMS).for_each(|vm| run.leave(vm));
        for r in 0..REGIONS {
            while !run.objects[r].holds.is_empty() {
                run.apply(Op::Unhold(r, 0));
            }
            prop_assert_eq!(run.regions.forget(run.objects[r].id), Ok(()));
        }
        run.objects.clear();
        run.check();
        prop_assert_eq!(run.tree.usage(run.tree.root()), Pages::ZERO);
    }
}

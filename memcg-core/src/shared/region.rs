//! One region: its pages, and who maps them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::bitmap::Bitmap;
use super::{HoldId, Origin, Owner, Released, Touch};
use crate::tree::{Mode, NodeId, Refused, Tree};
use crate::units::{PAGE_SIZE, Pages};

/// `Record::owner` of a page that is not resident.
const NONE: u16 = u16::MAX;

/// `Record::owner` of a page that the root pays for. Slots of mappers are below.
pub(super) const ROOT: u16 = u16::MAX - 1;

/// One page.
#[derive(Clone, Copy, Debug)]
struct Record {
    /// Slot of the mapper that pays, [`ROOT`] or [`NONE`]. An owner maps the page.
    owner: u16,
    /// VMs that map the page. Zero with an owner: only holds keep it.
    refs: u16,
}

// What the module's documentation promises.
const _: () = assert!(size_of::<Record>() == 4);

/// One VM's mapping.
#[derive(Clone, Debug)]
struct Mapper {
    vm: NodeId,
    origin: Origin,
    /// The pages that it has touched.
    maps: Bitmap,
    /// How many of them it owns.
    owned: u64,
}

/// How near an heir is to who leaves. The nearest inherits first (row 126).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kin {
    Clone,
    Sibling,
    Other,
}

impl Kin {
    /// What `other` is to `leaver`.
    fn of(leaver: &Mapper, other: &Mapper) -> Kin {
        let same = |a: Option<NodeId>, b| a.is_some() && a == b;
        let template = leaver.origin.template;
        if other.origin.clone_of == Some(leaver.vm) {
            Kin::Clone
        } else if (template.is_some() && template == other.origin.template)
            || same(leaver.origin.clone_of, other.origin.clone_of)
        {
            Kin::Sibling
        } else {
            Kin::Other
        }
    }
}

/// A memory object that several VMs map. Changed through [`super::Regions`] alone.
#[derive(Clone, Debug)]
pub struct Region {
    records: Vec<Record>,
    /// Mappers at their slots; a slot is used again after its mapper has left.
    mappers: Vec<Option<Mapper>>,
    slots: BTreeMap<NodeId, u16>,
    /// Slots in the order in which their mappers joined.
    order: Vec<u16>,
    holds: BTreeSet<HoldId>,
    resident: u64,
    /// Pages that the root pays for.
    root_owned: u64,
    redundant_unmaps: u64,
}

impl Region {
    /// Size of the region.
    pub fn pages(&self) -> Pages {
        Pages(self.records.len() as u64)
    }

    /// Pages that are charged to somebody: those that a VM maps, and those that a hold keeps.
    pub fn resident(&self) -> Pages {
        Pages(self.resident)
    }

    /// Who pays for a page; `None` if it is not resident or not within the region.
    pub fn owner(&self, page: u64) -> Option<Owner> {
        self.payer(self.record(page)?.owner)
    }

    /// How many VMs map a page; 0 outside of the region.
    pub fn refs(&self, page: u64) -> usize {
        self.record(page).map_or(0, |record| record.refs.into())
    }

    /// Whether `vm` maps a page: it has touched it and not unmapped it since.
    pub fn maps(&self, vm: NodeId, page: u64) -> bool {
        self.record(page).is_some() && self.slot(vm).is_some_and(|slot| self.mapper(slot).maps.contains(page as usize))
    }

    /// The VMs that map the region, in the order in which they joined.
    pub fn mappers(&self) -> impl ExactSizeIterator<Item = NodeId> + '_ {
        self.order.iter().map(|slot| self.mapper(*slot).vm)
    }

    /// Temporary mappings.
    pub fn holds(&self) -> usize {
        self.holds.len()
    }

    /// Pages of this region that `owner` pays for.
    pub fn owned(&self, owner: Owner) -> Pages {
        Pages(match owner {
            Owner::Vm(vm) => self.slot(vm).map_or(0, |slot| self.mapper(slot).owned),
            Owner::Root => self.root_owned,
        })
    }

    /// Pages in calls of [`super::Regions::unmap_pages`] that the VM did not map, since the region was declared.
    pub fn redundant_unmaps(&self) -> u64 {
        self.redundant_unmaps
    }

    /// The fraction of one page that `who` accounts for, in bytes, whoever pays for it (row 111).
    ///
    /// Each of the n VMs that map a page has 4096 / n bytes of it, and the first ones in the order of joining one byte
    /// more until nothing is left: the shares add up to exactly one page, whoever joined and left before. A page that
    /// only holds keep is the root's. 0 for a page that is not resident.
    pub fn page_share(&self, page: u64, who: Owner) -> u64 {
        let Some(record) = self.record(page) else {
            return 0;
        };
        match who {
            Owner::Root => PAGE_SIZE * u64::from(record.refs == 0 && record.owner == ROOT),
            Owner::Vm(vm) if self.maps(vm, page) => {
                self.place(vm).map_or(0, |place| self.part_of(page as usize, place))
            }
            Owner::Vm(_) => 0,
        }
    }

    /// The sum of [`Self::page_share`] over the region, in bytes. Over all VMs and the root these add up to exactly the
    /// resident pages.
    ///
    /// A look at each page, and, where only some of the region's mappers map a page that they cannot divide evenly, at
    /// those who joined earlier: for people who ask, not for a fault.
    pub fn share(&self, who: Owner) -> u64 {
        match who {
            Owner::Root => (0..self.pages().0).map(|page| self.page_share(page, who)).sum(),
            Owner::Vm(vm) => self.place(vm).map_or(0, |place| {
                let maps = &self.mapper(self.order[place]).maps;
                maps.iter_in(0..self.records.len()).map(|page| self.part_of(page, place)).sum()
            }),
        }
    }

    /// Where `vm` is in the order of joining.
    fn place(&self, vm: NodeId) -> Option<usize> {
        let slot = self.slot(vm)?;
        self.order.iter().position(|other| *other == slot)
    }

    /// The part that the mapper at `place` has of a page that it maps, in bytes.
    fn part_of(&self, page: usize, place: usize) -> u64 {
        let n = usize::from(self.records[page].refs);
        let (each, rest) = (PAGE_SIZE / n as u64, (PAGE_SIZE % n as u64) as usize);
        let others = self.order.len() - n;
        // How many of the page's mappers joined earlier: `place`, less those of the others that did.
        let is_first = if place < rest {
            true
        } else if place >= rest + others {
            false
        } else {
            let earlier = self.order[..place].iter().filter(|slot| self.mapper(**slot).maps.contains(page));
            earlier.count() < rest
        };
        each + u64::from(is_first)
    }

    pub(super) fn new(pages: Pages) -> Region {
        let pages = usize::try_from(pages.0).expect("not above MAX_REGION");
        Region {
            records: vec![Record { owner: NONE, refs: 0 }; pages],
            mappers: Vec::new(),
            slots: BTreeMap::new(),
            order: Vec::new(),
            holds: BTreeSet::new(),
            resident: 0,
            root_owned: 0,
            redundant_unmaps: 0,
        }
    }

    pub(super) fn slot(&self, vm: NodeId) -> Option<u16> {
        self.slots.get(&vm).copied()
    }

    /// A VM that does not map the region yet, and there is a slot for it.
    pub(super) fn join(&mut self, vm: NodeId, origin: Origin) {
        let mapper = Mapper { vm, origin, maps: Bitmap::new(self.records.len()), owned: 0 };
        let index = match self.mappers.iter().position(Option::is_none) {
            Some(free) => {
                self.mappers[free] = Some(mapper);
                free
            }
            None => {
                self.mappers.push(Some(mapper));
                self.mappers.len() - 1
            }
        };
        let slot = u16::try_from(index).expect("not above MAX_MAPPERS");
        self.slots.insert(vm, slot);
        self.order.push(slot);
    }

    /// The mapper at `slot` touches a page of the region.
    pub(super) fn touch(&mut self, tree: &mut Tree, slot: u16, page: u64, mode: Mode) -> Result<Touch, Refused> {
        let page = page as usize;
        let Record { owner, refs } = self.records[page];
        let vm = self.mapper(slot).vm;
        let touch = match self.payer(owner) {
            Some(payer) if self.mapper(slot).maps.contains(page) => return Ok(Touch::Present(payer)),
            Some(payer) if refs > 0 => Touch::Shared(payer),
            kept => {
                // The toucher is charged before the root is uncharged: refused, nothing has to be put back.
                let charge = tree.try_charge(vm, Pages::ONE, mode)?;
                if kept.is_some() {
                    tree.uncharge(tree.root(), Pages::ONE);
                    self.root_owned -= 1;
                } else {
                    self.resident += 1;
                }
                self.records[page].owner = slot;
                self.mapper_mut(slot).owned += 1;
                Touch::Charged(charge)
            }
        };
        self.records[page].refs += 1;
        self.mapper_mut(slot).maps.insert(page);
        Ok(touch)
    }

    /// The mapper at `slot` unmaps everything and leaves.
    pub(super) fn part(
        &mut self,
        tree: &mut Tree,
        slot: u16,
        report: Option<impl FnMut(&Tree, Owner, Owner, Pages)>,
    ) -> Released {
        let redundant = self.redundant_unmaps;
        let released = self.release(tree, slot, 0..self.pages().0, report);
        // Nobody said that it maps all of it.
        self.redundant_unmaps = redundant;
        if let Some(mapper) = self.mappers[usize::from(slot)].take() {
            self.slots.remove(&mapper.vm);
        }
        self.order.retain(|other| *other != slot);
        released
    }

    /// The mapper at `slot` unmaps what it maps of `pages`; `report` hears of each pair of old and new owner.
    pub(super) fn release(
        &mut self,
        tree: &mut Tree,
        slot: u16,
        pages: Range<u64>,
        mut report: Option<impl FnMut(&Tree, Owner, Owner, Pages)>,
    ) -> Released {
        let pages = pages.start as usize..pages.end as usize;
        let (mut unmapped, mut freed, mut freed_root, mut orphans) = (0, 0, 0, 0);
        let mut at = pages.start;
        while let Some(page) = self.mapper(slot).maps.first_in(at..pages.end) {
            at = page + 1;
            unmapped += 1;
            self.mapper_mut(slot).maps.remove(page);
            let record = &mut self.records[page];
            record.refs -= 1;
            let own = record.owner == slot;
            if record.refs > 0 || !self.holds.is_empty() {
                // Still needed. What was the leaver's keeps its name until it is given away, below.
                orphans += u64::from(own);
            } else {
                record.owner = NONE;
                freed += u64::from(own);
                // An owner maps its pages, so the last mapper's are its own or the root's.
                freed_root += u64::from(!own);
            }
        }
        self.redundant_unmaps += pages.len() as u64 - unmapped;
        self.resident -= freed + freed_root;
        self.root_owned -= freed_root;
        tree.uncharge(tree.root(), Pages(freed_root));

        // Uncharged first: what stays within a group needs no room there.
        let leaver = self.mapper(slot).vm;
        self.mapper_mut(slot).owned -= freed + orphans;
        if tree.contains(leaver) {
            tree.uncharge(leaver, Pages(freed + orphans));
        }
        let mut to_root = orphans;
        for heir in self.heirs(slot, orphans) {
            let pages = self.inherit(tree, heir, slot, pages.clone(), to_root);
            to_root -= pages;
            if pages > 0
                && let Some(report) = &mut report
            {
                report(tree, Owner::Vm(leaver), Owner::Vm(self.mapper(heir).vm), Pages(pages));
            }
        }
        if to_root > 0 {
            self.leave_to_root(tree, slot, pages, to_root);
            if let Some(report) = &mut report {
                report(tree, Owner::Vm(leaver), Owner::Root, Pages(to_root));
            }
        }
        let handed_over = Pages(orphans - to_root);
        Released { freed: Pages(freed + freed_root), handed_over, to_root: Pages(to_root) }
    }

    pub(super) fn hold(&mut self, hold: HoldId) {
        self.holds.insert(hold);
    }

    /// Ends a hold. With the last one, frees what no VM maps and returns how much that was. `None`: no such hold.
    pub(super) fn unhold(&mut self, tree: &mut Tree, hold: HoldId) -> Option<Pages> {
        if !self.holds.remove(&hold) {
            return None;
        }
        let mut freed = 0;
        // Only the root's pages can be without a mapper.
        if self.holds.is_empty() && self.root_owned > 0 {
            for record in self.records.iter_mut().filter(|record| record.owner == ROOT && record.refs == 0) {
                record.owner = NONE;
                freed += 1;
            }
        }
        self.root_owned -= freed;
        self.resident -= freed;
        tree.uncharge(tree.root(), Pages(freed));
        Some(Pages(freed))
    }

    /// Candidates for the `orphans` of the mapper at `slot`, the nearest first, then in the order of joining. The leaver
    /// may be among them and gets nothing: it maps none of these pages any more (B111).
    fn heirs(&self, slot: u16, orphans: u64) -> Vec<u16> {
        if orphans == 0 {
            return Vec::new();
        }
        let leaver = self.mapper(slot);
        let mut heirs = self.order.clone();
        // A stable sort keeps the order of joining.
        heirs.sort_by_key(|heir| Kin::of(leaver, self.mapper(*heir)));
        heirs
    }

    /// Gives to `heir` the lowest orphans of `slot` in `pages` that it maps and can be charged for, of the `left` that
    /// there are. Returns how many.
    fn inherit(&mut self, tree: &mut Tree, heir: u16, slot: u16, pages: Range<usize>, left: u64) -> u64 {
        let Some(Mapper { vm, maps, owned, .. }) = &mut self.mappers[usize::from(heir)] else {
            return 0;
        };
        if left == 0 || !super::is_vm(tree, *vm) {
            return 0;
        }
        let is_orphan = |page: &usize| self.records[*page].owner == slot;
        let room = tree.margin(*vm).map_or(usize::MAX, |room| usize::try_from(room.0).unwrap_or(usize::MAX));
        let wanted = maps.iter_in(pages.clone()).filter(is_orphan).take(room).count() as u64;
        let Ok(charge) = tree.try_charge(*vm, Pages(wanted), Mode::NoRetry) else {
            return 0;
        };
        let mut given = 0;
        for page in maps.iter_in(pages) {
            if given == charge.pages.0 {
                break;
            }
            if self.records[page].owner == slot {
                self.records[page].owner = heir;
                given += 1;
            }
        }
        *owned += given;
        given
    }

    /// The root pays for the `left` orphans of `slot` in `pages`.
    fn leave_to_root(&mut self, tree: &mut Tree, slot: u16, pages: Range<usize>, left: u64) {
        let orphans = self.records[pages].iter_mut().filter(|record| record.owner == slot);
        orphans.for_each(|record| record.owner = ROOT);
        self.root_owned += left;
        // Refused only above 2^64 pages.
        let charged = tree.try_charge(tree.root(), Pages(left), Mode::NoFail);
        debug_assert!(charged.is_ok(), "{charged:?}");
    }

    fn record(&self, page: u64) -> Option<&Record> {
        self.records.get(usize::try_from(page).ok()?)
    }

    fn payer(&self, owner: u16) -> Option<Owner> {
        match owner {
            NONE => None,
            ROOT => Some(Owner::Root),
            slot => Some(Owner::Vm(self.mapper(slot).vm)),
        }
    }

    fn mapper(&self, slot: u16) -> &Mapper {
        self.mappers[usize::from(slot)].as_ref().expect("a slot in use")
    }

    fn mapper_mut(&mut self, slot: u16) -> &mut Mapper {
        self.mappers[usize::from(slot)].as_mut().expect("a slot in use")
    }
}

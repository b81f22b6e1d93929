//! Shared regions: who pays for memory that several VMs map.
//!
//! A region is a memory object that is declared to be shared: an ivshmem-like window, or the base that clones of one
//! template map. Private guest RAM never comes here: a VM's records belong to its leaf, and only pages of shared
//! regions carry an owner (row 135).
//!
//! ```text
//!  ┌────────┐  touch: charged to the toucher   ┌─────────┐ ◄─┐ touch by another VM: a reference, charged to nobody
//!  │ ABSENT │ ───────────────────────────────► │ A VM's  │ ──┤
//!  │        │ ◄─────────────────────────────── │         │ ──┘ the owner unmaps, others do not: to the next heir
//!  └────────┘  last unmap: uncharged           └─────────┘
//!      ▲                                         │     ▲
//!      │                no heir: only holds keep │     │ touch of what only holds keep:
//!      │                it, or nobody has room   ▼     │ charged to the toucher
//!      │                                       ┌─────────┐
//!      └────────────────────────────────────── │ ROOT's  │
//!        last unmap, last hold: uncharged      └─────────┘
//! ```
//!
//! At any moment each resident page is charged exactly once, to its owner, so the charges of all owners add up to the
//! resident pages. Owners are leaves of the tree, not threads or processes: a VMM that restarts itself, or whose main
//! thread ends, keeps what its VM owns, and a VM that moves to another group takes its charges along, because they are
//! its leaf's (rows 121, 125, 132). A VM that is not accounted owns like any other and is charged nothing, until
//! [`Tree::activate`] charges it what it owns ([`Regions::owned`]).
//!
//! **Heirs.** When an owner unmaps a page that others still map, its charge goes to the first of them that can take it:
//! clones of the leaver, then its siblings (same template, or clones of the same VM), then any other, each in the order
//! in which they mapped the region. The leaver is uncharged first, so a hand-over inside a group needs no room there.
//! Each candidate takes the lowest pages that it maps and has room for ([`Mode::NoRetry`]); a VM that is offline,
//! removed or a group by now takes none. What is left is the root's, and stays there until the last unmap.
//!
//! **Holds** are temporary mappings: of a snapshotter, of a debugger. They keep what is resident, and never own nor
//! inherit. A page that only holds keep is the root's, and becomes that VM's who touches it next.
//!
//! **Memory.** 4 bytes a page, and one bit a page for each mapper. The index from region to mappers is the region's own
//! list: an heir is looked for among those who map the region, once for all pages, never among all VMs (T29).
//!
//! | semantics row | rule here |
//! | --- | --- |
//! | 16, 18, B9 | a page that is resident is mapped without a charge, also by a VM at its limit |
//! | 21 | unmapping what is not mapped is a no-op that is counted |
//! | 25, B21 | checked first, charged then: an error leaves tree and region as they were |
//! | 30, 110, B15, B17 | the first reference charges, the last one uncharges |
//! | 111 | [`Region::share`]: exact fractions, computed, not stored |
//! | 122 | who touches first owns; that is no hand-over |
//! | 123 | a fresh page asks the toucher's limit; a resident one is its owner's affair, whoever touches it |
//! | 124, 128, B103, B108 | holds are no heirs; without an heir the root pays |
//! | 126, 127, B101, B111 | heirs as above, each checked again; the leaver maps nothing any more, so it is none |
//! | 129, 130, B107 | [`Hook`]: once per pair, only when the group changes; absent, nothing is looked up for it |
//! | 131 | [`Regions::leave`] after the VM stopped, before its node is removed |
//! | 133 | charges move with ownership |
//!
//! One owner: the controller's actor. Touching allocates nothing.

mod bitmap;
mod region;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

pub use region::Region;

use crate::tree::{Charge, Mode, NodeId, Refused, Tree};
use crate::units::Pages;

/// Largest region: 1 TiB, whose table has 1 GiB.
pub const MAX_REGION: Pages = Pages(1 << 28);

/// VMs that may map one region at a time.
pub const MAX_MAPPERS: usize = region::ROOT as usize;

/// A declared region. Never given out twice by the same [`Regions`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(u64);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A temporary mapping of one region: [`Regions::hold`]. Never given out twice by the same [`Regions`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldId(u64);

/// A template that VMs are cloned from: the caller's number for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TemplateId(pub u64);

/// Where a VM comes from, as far as heirs are concerned (row 126).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "what is freed goes back to the host"]
pub struct Origin {
    /// The running VM that it is a clone of. That VM may be gone.
    pub clone_of: Option<NodeId>,
    /// The template that it, or the VM it is a clone of, was made from.
    pub template: Option<TemplateId>,
}

/// Who pays for a resident page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// This VM's leaf.
    Vm(NodeId),
    /// The root, for want of an heir (row 128).
    Root,
}

/// What a touch did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// The page is new, or only holds kept it: the toucher owns it now and has been charged one page.
    Charged(Charge),
    /// The page was resident: a reference, and nobody was charged.
    Shared(Owner),
    /// The VM has mapped the page before; nothing has changed.
    Present(Owner),
}

/// What unmapping did, in pages of the leaver's mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "what is freed goes back to the host"]
pub struct Released {
    /// No longer resident: uncharged from their owner. Their memory can go back to the host.
    pub freed: Pages,
    /// Now another VM's.
    pub handed_over: Pages,
    /// Now the root's.
    pub to_root: Pages,
}

impl Released {
    fn add(&mut self, other: Released) {
        self.freed += other.freed;
        self.handed_over += other.handed_over;
        self.to_root += other.to_root;
    }
}

/// Pages of one region that changed their owner, and by that the group that pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handover {
    /// The region.
    pub region: RegionId,
    /// Who paid before.
    pub from: Owner,
    /// Who pays now.
    pub to: Owner,
    /// How many pages.
    pub pages: Pages,
}

/// Called after a hand-over, once for each pair of old and new owner in a region, and only if they are members of
/// different groups; the root as an owner is a group of its own. `None`: nothing is looked up for it.
pub type Hook<'h> = Option<&'h mut dyn FnMut(&Handover)>;

/// Why nothing was done. Tree and regions are as before, but for a count of failures where a charge was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SharedError {
    /// Not the size of a region.
    #[error("a shared region of {0} cannot be: use 1 to {max} pages", max = MAX_REGION.0)]
    BadSize(Pages),
    /// Never declared, or forgotten.
    #[error("there is no shared region {0}")]
    UnknownRegion(RegionId),
    /// The hold has ended, or is of another region.
    #[error("shared region {region} has no temporary mapping {hold}")]
    UnknownHold {
        /// The region.
        region: RegionId,
        /// Number of the hold.
        hold: u64,
    },
    /// Behind the end of the region.
    #[error("pages {start} to {end} are not within the {size} of shared region {region}", size = .pages)]
    OutOfRange {
        /// The region.
        region: RegionId,
        /// First page asked for.
        start: u64,
        /// The page after the last one.
        end: u64,
        /// Size of the region.
        pages: Pages,
    },
    /// Only VMs that are there map regions: not the root, not groups, not what is being removed.
    #[error("{0:?} cannot map a shared region: it is a group, or is being removed")]
    NotAVm(String),
    /// Mapped already.
    #[error("{vm:?} maps shared region {region} already: unmap it first")]
    AlreadyMapped {
        /// The region.
        region: RegionId,
        /// Path of the VM.
        vm: String,
    },
    /// Not mapped.
    #[error("{vm:?} does not map shared region {region}: map it first")]
    NotMapped {
        /// The region.
        region: RegionId,
        /// Path of the VM.
        vm: String,
    },
    /// More than [`MAX_MAPPERS`].
    #[error("shared region {0} is mapped by {MAX_MAPPERS} VMs, more cannot map it")]
    TooManyMappers(RegionId),
    /// Somebody still maps or holds it.
    #[error("shared region {region} is in use (mappings: {mappers}, temporary ones: {holds}): end them first")]
    InUse {
        /// The region.
        region: RegionId,
        /// VMs that map it.
        mappers: usize,
        /// Temporary mappings.
        holds: usize,
    },
    /// No room for a page that nobody has touched before.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// All shared regions of a host. See the module's documentation.
///
/// Methods that charge take the tree whose leaves the VMs are; it must be the same one each time.
#[derive(Clone, Debug, Default)]
pub struct Regions {
    regions: BTreeMap<RegionId, Region>,
    /// Number of the next region or hold; never reused.
    next: u64,
}

impl Regions {
    /// No regions.
    pub fn new() -> Regions {
        Regions::default()
    }

    /// Declares a region of `pages`, which nobody maps and none of which is resident.
    ///
    /// # Errors
    /// [`SharedError::BadSize`] for zero pages and above [`MAX_REGION`].
    pub fn declare(&mut self, pages: Pages) -> Result<RegionId, SharedError> {
        if pages.is_zero() || pages > MAX_REGION {
            return Err(SharedError::BadSize(pages));
        }
        let id = RegionId(self.number());
        self.regions.insert(id, Region::new(pages));
        Ok(id)
    }

    /// Forgets a region that nobody maps or holds any more.
    ///
    /// # Errors
    /// [`SharedError::UnknownRegion`], [`SharedError::InUse`].
    pub fn forget(&mut self, id: RegionId) -> Result<(), SharedError> {
        let region = self.region(id)?;
        let (mappers, holds) = (region.mappers().count(), region.holds());
        if mappers > 0 || holds > 0 {
            return Err(SharedError::InUse { region: id, mappers, holds });
        }
        self.regions.remove(&id);
        Ok(())
    }

    /// A region, for its numbers.
    ///
    /// # Errors
    /// [`SharedError::UnknownRegion`].
    pub fn region(&self, id: RegionId) -> Result<&Region, SharedError> {
        self.regions.get(&id).ok_or(SharedError::UnknownRegion(id))
    }

    /// Lets the VM `vm` touch a region. Charges nothing: pages are charged when they are touched.
    ///
    /// # Errors
    /// [`SharedError::UnknownRegion`], [`SharedError::NotAVm`], [`SharedError::AlreadyMapped`],
    /// [`SharedError::TooManyMappers`].
    pub fn map(&mut self, tree: &Tree, id: RegionId, vm: NodeId, origin: Origin) -> Result<(), SharedError> {
        let region = self.regions.get_mut(&id).ok_or(SharedError::UnknownRegion(id))?;
        if !is_vm(tree, vm) {
            return Err(SharedError::NotAVm(path(tree, vm)));
        }
        if region.slot(vm).is_some() {
            return Err(SharedError::AlreadyMapped { region: id, vm: path(tree, vm) });
        }
        if region.mappers().count() >= MAX_MAPPERS {
            return Err(SharedError::TooManyMappers(id));
        }
        region.join(vm, origin);
        Ok(())
    }

    /// `vm` touches `page`. Only a page without an owner that could be asked is charged, to `vm` and by `mode`: what
    /// is not resident, or kept only by holds. If the page cannot be filled afterwards, [`Self::unmap_pages`] refunds.
    ///
    /// # Errors
    /// [`SharedError::UnknownRegion`], [`SharedError::NotMapped`], [`SharedError::OutOfRange`],
    /// [`SharedError::NotAVm`] for what is being removed or has got members since it was mapped, and
    /// [`SharedError::Refused`].
    pub fn touch(
        &mut self,
        tree: &mut Tree,
        id: RegionId,
        vm: NodeId,
        page: u64,
        mode: Mode,
    ) -> Result<Touch, SharedError> {
        let (region, slot) = self.mapped(tree, id, vm)?;
        in_range(id, region, &(page..page.saturating_add(1)))?;
        if !is_vm(tree, vm) {
            return Err(SharedError::NotAVm(path(tree, vm)));
        }
        Ok(region.touch(tree, slot, page, mode)?)
    }

    /// `vm` no longer maps `pages` (given back, or replaced by copies of its own). Pages of the range that it has not
    /// mapped are counted ([`Region::redundant_unmaps`]) and otherwise ignored.
    ///
    /// # Errors
    /// [`SharedError::UnknownRegion`], [`SharedError::NotMapped`], [`SharedError::OutOfRange`].
    pub fn unmap_pages(
        &mut self,
        tree: &mut Tree,
        id: RegionId,
        vm: NodeId,
        pages: Range<u64>,
        hook: Hook<'_>,
    ) -> Result<Released, SharedError> {
        let (region, slot) = self.mapped(tree, id, vm)?;
        in_range(id, region, &pages)?;
        Ok(region.release(tree, slot, pages, report(id, hook)))
    }

    /// `vm` no longer maps the region at all.
    ///
    /// # Errors
    /// [`SharedError::UnknownRegion`], [`SharedError::NotMapped`].
    pub fn unmap(
        &mut self,
        tree: &mut Tree,
        id: RegionId,
        vm: NodeId,
        hook: Hook<'_>,
    ) -> Result<Released, SharedError> {
        let (region, slot) = self.mapped(tree, id, vm)?;
        Ok(region.part(tree, slot, report(id, hook)))
    }

    /// `vm` is about to go: it unmaps every region. To be called when it runs no more and before its node is called
    /// returning ([`Tree::set_returning`]: what others inherit does not come back) or is uncharged and removed. The node
    /// may be offline. Cannot fail, and does nothing for a VM that maps no region.
    pub fn leave(&mut self, tree: &mut Tree, vm: NodeId, mut hook: Hook<'_>) -> Released {
        let mut released = Released::default();
        for (id, region) in &mut self.regions {
            if let Some(slot) = region.slot(vm) {
                // A fresh borrow for each region.
                let hook: Hook<'_> = match &mut hook {
                    Some(hook) => Some(&mut **hook),
                    None => None,
                };
                released.add(region.part(tree, slot, report(*id, hook)));
            }
        }
        released
    }

    /// A temporary mapping of a whole region: what is resident stays, whoever unmaps it.
    ///
    /// # Errors
    /// [`SharedError::UnknownRegion`].
    pub fn hold(&mut self, id: RegionId) -> Result<HoldId, SharedError> {
        self.region(id)?;
        let hold = HoldId(self.number());
        if let Some(region) = self.regions.get_mut(&id) {
            region.hold(hold);
        }
        Ok(hold)
    }

    /// Ends a temporary mapping. With the last one, the pages that no VM maps are freed.
    ///
    /// # Errors
    /// [`SharedError::UnknownRegion`], [`SharedError::UnknownHold`].
    pub fn unhold(&mut self, tree: &mut Tree, id: RegionId, hold: HoldId) -> Result<Released, SharedError> {
        let region = self.regions.get_mut(&id).ok_or(SharedError::UnknownRegion(id))?;
        match region.unhold(tree, hold) {
            Some(freed) => Ok(Released { freed, ..Released::default() }),
            None => Err(SharedError::UnknownHold { region: id, hold: hold.0 }),
        }
    }

    /// Shared pages that `owner` pays for, in all regions. For a VM whose accounting begins, these are resident too.
    pub fn owned(&self, owner: Owner) -> Pages {
        self.regions.values().map(|region| region.owned(owner)).sum()
    }

    /// [`Region::share`] over all regions, in bytes.
    pub fn share(&self, who: Owner) -> u64 {
        self.regions.values().map(|region| region.share(who)).sum()
    }

    /// All regions.
    pub fn iter(&self) -> impl Iterator<Item = (RegionId, &Region)> {
        self.regions.iter().map(|(id, region)| (*id, region))
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn mapped(&mut self, tree: &Tree, id: RegionId, vm: NodeId) -> Result<(&mut Region, u16), SharedError> {
        let region = self.regions.get_mut(&id).ok_or(SharedError::UnknownRegion(id))?;
        match region.slot(vm) {
            Some(slot) => Ok((region, slot)),
            None => Err(SharedError::NotMapped { region: id, vm: path(tree, vm) }),
        }
    }
}

/// Whether `vm` can own pages: a leaf, not the root, that is there and not being removed.
fn is_vm(tree: &Tree, vm: NodeId) -> bool {
    tree.contains(vm) && vm != tree.root() && tree.children(vm).is_empty() && tree.snapshot(vm).online
}

/// For errors: the caller may have removed the VM before it asked.
fn path(tree: &Tree, vm: NodeId) -> String {
    if tree.contains(vm) { tree.path(vm) } else { "(removed)".to_owned() }
}

fn in_range(id: RegionId, region: &Region, pages: &Range<u64>) -> Result<(), SharedError> {
    let size = region.pages();
    if pages.start < pages.end && pages.end <= size.0 {
        return Ok(());
    }
    Err(SharedError::OutOfRange { region: id, start: pages.start, end: pages.end, pages: size })
}

/// What tells the caller's hook about hand-overs in one region, `None` without a hook.
fn report<'h>(region: RegionId, hook: Hook<'h>) -> Option<impl FnMut(&Tree, Owner, Owner, Pages) + 'h> {
    let hook = hook?;
    // The root as an owner is in no group, not even in its own.
    let group = |tree: &Tree, owner| match owner {
        Owner::Vm(vm) if tree.contains(vm) => tree.parent(vm),
        Owner::Vm(_) | Owner::Root => None,
    };
    Some(move |tree: &Tree, from: Owner, to: Owner, pages: Pages| {
        if group(tree, from) != group(tree, to) {
            hook(&Handover { region, from, to, pages });
        }
    })
}

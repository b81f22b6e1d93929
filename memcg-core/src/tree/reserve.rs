//! Two-phase charges: prepare (may be refused) → commit (cannot fail) or refund (row 78).

use super::{Charge, Kind, Mode, NodeId, Refused, Tree};
use crate::units::Pages;

/// A charge that is not yet used. Dropped, it refunds; [`Reservation::commit`] keeps it.
#[derive(Debug)]
#[must_use = "dropped, the charge is refunded at once"]
pub struct Reservation<'t> {
    tree: &'t mut Tree,
    id: NodeId,
    kind: Kind,
    charge: Charge,
    /// What is refunded on drop.
    open: Pages,
}

impl Reservation<'_> {
    /// Pages reserved.
    pub fn pages(&self) -> Pages {
        self.open
    }

    /// Keeps the whole charge. Cannot fail.
    pub fn commit(mut self) -> Charge {
        self.open = Pages::ZERO;
        self.charge
    }

    /// Keeps `used` pages (at most what was reserved) and refunds the rest. Cannot fail.
    pub fn commit_part(mut self, used: Pages) -> Charge {
        let used = used.min(self.open);
        self.open = self.open.saturating_sub(used);
        Charge { pages: used, ..self.charge }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.tree.uncharge_as(self.id, self.kind, self.open);
    }
}

impl Tree {
    /// [`Self::try_charge`] as a [`Reservation`] that refunds itself unless it is committed.
    ///
    /// # Errors
    /// As [`Self::try_charge`].
    pub fn reserve(&mut self, id: NodeId, pages: Pages, mode: Mode) -> Result<Reservation<'_>, Refused> {
        self.reserve_as(id, Kind::Guest, pages, mode)
    }

    /// [`Self::reserve`] for any kind.
    ///
    /// # Errors
    /// As [`Self::try_charge`].
    pub fn reserve_as(&mut self, id: NodeId, kind: Kind, pages: Pages, mode: Mode) -> Result<Reservation<'_>, Refused> {
        let charge = self.try_charge_as(id, kind, pages, mode)?;
        Ok(Reservation { tree: self, id, kind, charge, open: pages })
    }
}

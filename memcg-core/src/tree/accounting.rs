//! Accounting is off until somebody wants it, and then on for good.
//!
//! ```text
//!   OFF ── activate(id): id and all below, in one step, each leaf charged what it has resident ──► ON
//!    └── born below the root or an Off group                      born below an On group ──────────┘
//! ```
//!
//! A VM without a limit costs nothing (rows 58, 67): its charges and uncharges succeed and leave no trace, so whoever
//! reports them need not know. One enum, no half state: what is below an On group is On (row 73, B60, B61), and one
//! step means that no page is uncharged that was not charged (row 94). There is no way back (row 70, T18): usage that
//! left out some time in between would mean nothing. What is resident is charged at activation, so usage means "everything" from
//! the first moment; that is why a running VM may be activated, where the kernel had to refuse (row 68).
//!
//! The root is always On, as the host's budget, and does not pass it on: its children choose.
//! An Off group shows what its On members are charged; it has no limits ([`super::SetLimitError::NotAccounted`]).

use super::{Charge, Counter, Mode, NodeId, Refused, Tree};
use crate::units::Pages;

/// Whether a node is charged for what it uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Accounting {
    /// Charges and uncharges are no-ops that succeed. At first, outside accounted groups.
    #[default]
    Off,
    /// Everything is charged. For the life of the node.
    On,
}

impl Tree {
    /// Whether `id` is charged for what it uses.
    pub fn accounting(&self, id: NodeId) -> Accounting {
        self.node(id).accounting
    }

    /// Turns accounting on for `id` and everything below, in one step, and charges each leaf that becomes accounted
    /// what `resident` says it has: guest pages that are there already, which no limit can refuse ([`Mode::NoFail`]).
    /// Those leaves are returned with their charges. What is On already stays as it is: a second time changes nothing.
    ///
    /// # Errors
    /// [`Refused`] only if a counter would leave 64 bits; nothing has changed then.
    pub fn activate(
        &mut self,
        id: NodeId,
        mut resident: impl FnMut(NodeId) -> Pages,
    ) -> Result<Vec<(NodeId, Charge)>, Refused> {
        let mut off = Vec::new();
        let mut leaves = Vec::new();
        let mut total = Pages::ZERO;
        for at in self.subtree(id) {
            let node = self.node(at);
            if node.accounting == Accounting::On {
                continue;
            }
            off.push(at);
            if node.children.is_empty() {
                let pages = resident(at);
                total = total.checked_add(pages).ok_or_else(|| self.refusal(id, Counter::Memory, pages))?;
                leaves.push((at, pages));
            }
        }
        self.check_bits(id, Counter::Memory, total)?;
        self.accounted += off.len();
        for at in off {
            self.node_mut(at).accounting = Accounting::On;
        }
        leaves.into_iter().map(|(at, pages)| Ok((at, self.try_charge(at, pages, Mode::NoFail)?))).collect()
    }
}

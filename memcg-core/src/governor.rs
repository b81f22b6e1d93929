//! How much ageing a guest can bear: a budget of pages to put aside.
//!
//! Whether a page is in use is found out by moving it aside, and a page that is in use then costs its guest a fault. The
//! governor keeps these faults within a share of the vCPUs' time, by counting them: nothing is assumed about the guest.
//!
//! ```text
//!  allowance = period × vCPUs × min(share / cost of a refault, rate)             refaults a period
//!
//!  refaults of the last period ─► above the allowance: the rest is owed          budget × (allowance − owed) / refaults,
//!                                 below: what is owed is paid off                at most twice what it was
//! ```
//!
//! So the budget grows twofold each period as long as what is put aside is cold, and meets the allowance where it is not.
//! One that was not used up does not grow: it would say nothing about the pages that were left alone. In the long run
//! refaults cost no more than the share; in a single period they may, when a guest turns to memory that it has left alone
//! for long. As many pages as there may be refaults can be put aside whatever the guest does.
//!
//! Whatever is owed, half of the allowance is left, and with the other half it is paid: a guest that has just turned to
//! other memory is one whose working set is worth knowing, and who must not be looked at does not tell.
//!
//! Memory that has to be found is another matter: whoever reclaims for a limit does not ask the governor.

use std::time::Duration;

/// Periods after which a debt is forgotten: one change of phase is not to stop ageing for long.
const MEMORY: u64 = 10;

/// What ageing may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Part of a vCPU's time that may go to refaults, in thousandths.
    pub per_mille: u32,
    /// Refaults in a second that a vCPU bears, however cheap they are.
    pub rate: u32,
    /// vCPUs.
    pub cpus: u32,
}

impl Terms {
    /// One per cent of the time of each vCPU, and at most a hundred refaults a second.
    pub fn new(cpus: u32) -> Terms {
        Terms { per_mille: 10, rate: 100, cpus }
    }

    /// Refaults that a period may cost when each of them costs `cost`.
    pub fn allowance(&self, period: Duration, cost: Duration) -> u64 {
        let (period, cpus) = (period.as_nanos(), u128::from(self.cpus));
        let by_rate = period * u128::from(self.rate) / 1_000_000_000;
        let by_share = (period * u128::from(self.per_mille) / 1000).checked_div(cost.as_nanos()).unwrap_or(by_rate);
        u64::try_from(by_rate.min(by_share) * cpus).unwrap_or(u64::MAX)
    }
}

/// What a period was like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// How long it was. The next one is taken to be as long.
    pub period: Duration,
    /// Pages that were put aside in it.
    pub aside: u64,
    /// Faults for pages that were aside, since when does not matter. One that brings several back counts once.
    pub refaults: u64,
    /// What one of these faults costs the guest, as measured.
    pub cost: Duration,
}

/// The budget of one VM.
#[derive(Clone, Debug)]
pub struct Governor {
    terms: Terms,
    /// Pages for the period that is running.
    budget: u64,
    /// Refaults above the allowance that are not paid off.
    owed: u64,
}

impl Governor {
    /// A VM of which nothing is known: it has no budget before its first period is over.
    pub fn new(terms: Terms) -> Governor {
        Governor { terms, budget: 0, owed: 0 }
    }

    /// A period is over: how many pages may be put aside in the next one.
    pub fn next(&mut self, seen: &Seen) -> u64 {
        let allowance = self.terms.allowance(seen.period, seen.cost);
        let owed = self.owed.saturating_add(seen.refaults).saturating_sub(allowance);
        self.owed = owed.min(allowance.saturating_mul(MEMORY));
        let free = allowance.saturating_sub(self.owed);
        let used = seen.aside >= self.budget;
        // Twice as much at most, and only after the whole of it has shown what it costs.
        let most = if used { self.budget.saturating_mul(2) } else { self.budget };
        let bearable = u128::from(self.budget) * u128::from(free) / u128::from(seen.refaults.max(1));
        self.budget = u64::try_from(bearable).unwrap_or(u64::MAX).min(most).max(free).max(allowance / 2);
        self.budget
    }

    /// Pages for the period that is running.
    pub fn budget(&self) -> u64 {
        self.budget
    }

    /// Refaults above the allowance that are not paid off.
    pub fn owed(&self) -> u64 {
        self.owed
    }
}

//! The invariants of a running host, as findings that people read.
//!
//! [`tree`] looks at the counters, [`vms`] at what each VM's worker says against what is charged and what the host's page
//! tables hold. Both are given facts and look at nothing themselves, so a test can give them a broken state and see that
//! it is found. Each finding is there whether it is good or bad, with the numbers it was made of: a check that says
//! nothing might have looked at nothing.
//!
//! | finding | what holds |
//! | --- | --- |
//! | `limits` | usage ≤ limit, but for an overcharge that is reported |
//! | `overhead` | vmm ≤ memory, and what is charged to a node covers its overhead and store |
//! | `sums` | a parent's counters are its own and its children's; so is what is returning, and who is accounted |
//! | `counters` | peak ≥ usage, nothing was uncharged below zero |
//! | `charges` | what is charged to a VM = granted − returned + overhead |
//! | `parts` | charged − guest − overhead − store = stock + reserve |
//! | `resident` | guest pages charged = guest pages present, exactly |

use crate::tree::{Counter, Tree, Violation};
use crate::units::{Pages, human};

/// Violations that a sentence names; the others are counted.
const NAMED: usize = 3;

/// What was found about one invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its name.
    pub name: &'static str,
    /// It holds.
    pub ok: bool,
    /// What was looked at, or what is wrong, with the numbers.
    pub message: String,
    looked_at: String,
    violations: Vec<String>,
}

impl Finding {
    /// The finding about `name`: it holds when there is no violation, and then `looked_at` says what was looked at.
    pub fn new(name: &'static str, looked_at: impl Into<String>, violations: &[String]) -> Finding {
        let mut message = violations.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join("; ");
        if violations.len() > NAMED {
            message.push_str(&format!("; and {} more", violations.len() - NAMED));
        }
        let (ok, looked_at) = (violations.is_empty(), looked_at.into());
        let message = if ok { looked_at.clone() } else { message };
        Finding { name, ok, message, looked_at, violations: violations.to_vec() }
    }

    /// What is still wrong of what was wrong in an earlier look at the same invariant, with the numbers of this one. Two
    /// violations are of the same thing when they begin with the same words before a colon.
    #[must_use]
    pub fn since(self, before: &Finding) -> Finding {
        let about = |violation: &String| violation.split(": ").next().map(str::to_owned);
        let known: Vec<_> = before.violations.iter().map(about).collect();
        let still: Vec<_> = self.violations.into_iter().filter(|violation| known.contains(&about(violation))).collect();
        Finding::new(self.name, self.looked_at, &still)
    }
}

/// What is known of one VM at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmFacts {
    /// Its name.
    pub name: String,
    /// Whether it is charged for what it uses.
    pub accounted: bool,
    /// Memory charged to its node.
    pub charged: Pages,
    /// Of this, overhead.
    pub vmm: Pages,
    /// Of this, compressed content of evicted pages.
    pub store: Pages,
    /// Pages granted to its worker and not given back, by the controller's totals.
    pub outstanding: Pages,
    /// Pages granted that the worker has not seen yet.
    pub in_flight: Pages,
    /// Pages of its guest, as its worker says.
    pub guest: Pages,
    /// Pages charged ahead of need, as it says.
    pub stock: Pages,
    /// Pages in its reserve, as it says.
    pub reserve: Pages,
    /// Pages of RAM that the host's page tables hold for it, and whether the guest stood still while they were counted.
    /// `None` when they could not be counted at rest.
    pub resident: Option<Pages>,
}

/// The counters, of which [`Tree::check`] has found these violations: `limits`, `overhead`, `sums`, `counters`.
pub fn tree(tree: &Tree, violations: &[Violation]) -> Vec<Finding> {
    let mut found: [Vec<String>; 4] = Default::default();
    for violation in violations {
        let group = match violation {
            Violation::OverLimit { .. } => 0,
            Violation::VmmAboveMemory { .. } | Violation::Parts { .. } => 1,
            Violation::Accounting { .. }
            | Violation::Returning { .. }
            | Violation::Orphan { .. }
            | Violation::Accounted { .. }
            | Violation::Sum { .. }
            | Violation::Members { .. } => 2,
            Violation::Peak { .. } | Violation::Underflow { .. } => 3,
        };
        found[group].push(violation.to_string());
    }
    let [limits, overhead, sums, counters] = found;
    let root = tree.root();
    let size = |counter| human(tree.counter(root, counter).usage.bytes());
    let nodes = match tree.ids().count() {
        1 => "1 node".to_owned(),
        nodes => format!("{nodes} nodes"),
    };
    let over: Pages = tree.ids().map(|id| tree.snapshot(id).overcharge).sum();
    let reported = if over.is_zero() { "no overcharge".to_owned() } else { format!("overcharge {over}, reported") };
    let memory = size(Counter::Memory);
    vec![
        Finding::new("limits", format!("{nodes} within their limits, {reported}"), &limits),
        Finding::new("overhead", format!("{} of {memory} charged are overhead", size(Counter::Vmm)), &overhead),
        Finding::new("sums", format!("{nodes}: each is its own and its children's, {memory} in all"), &sums),
        Finding::new("counters", format!("{nodes}: no peak below its usage, nothing uncharged twice"), &counters),
    ]
}

/// The VMs: `charges`, `parts`, `resident`.
pub fn vms(vms: &[VmFacts]) -> Vec<Finding> {
    let [mut charges, mut parts, mut resident] = <[Vec<String>; 3]>::default();
    let accounted = || vms.iter().filter(|vm| vm.accounted);
    for vm in accounted() {
        let VmFacts { name, charged, vmm, store, outstanding, in_flight, guest, stock, reserve, .. } = vm;
        let beside = *vmm + *store;
        if *outstanding + beside != *charged {
            charges.push(format!(
                "{name}: {charged} are charged, {outstanding} are granted and not returned, {beside} are overhead and store"
            ));
        }
        let rest = charged.saturating_sub(*guest + beside);
        if *guest + beside > *charged || rest != *stock + *reserve + *in_flight {
            parts.push(format!(
                "{name}: {charged} are charged, but guest {guest}, overhead and store {beside}, stock {stock}, reserve \
                 {reserve} and on their way {in_flight}"
            ));
        }
        if let Some(present) = vm.resident
            && present != *guest
        {
            resident.push(format!("{name}: {guest} are charged to the guest, {present} of its RAM are present"));
        }
    }
    let of = |count: usize| if count == 1 { "1 VM".to_owned() } else { format!("{count} VMs") };
    let looked_at = of(accounted().count());
    let counted = accounted().filter(|vm| vm.resident.is_some());
    let present: Pages = counted.clone().filter_map(|vm| vm.resident).sum();
    let busy = match accounted().filter(|vm| vm.resident.is_none()).count() {
        0 => String::new(),
        busy => format!("; {} never stood still and could not be counted", of(busy)),
    };
    vec![
        Finding::new("charges", format!("{looked_at}: charged is granted − returned + overhead"), &charges),
        Finding::new("parts", format!("{looked_at}: what is charged and not in use is stock and reserve"), &parts),
        Finding::new(
            "resident",
            format!("{}: {present} charged to guests, all of them present and no others{busy}", of(counted.count())),
            &resident,
        ),
    ]
}

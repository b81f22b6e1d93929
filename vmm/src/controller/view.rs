//! What the interface shows of a VM and of the host, as JSON. Amounts carry their unit in the name.

mod cold;
#[cfg(test)]
pub mod example;
mod reclaim;

use std::ops::Range;

use memcg_core::progress::State;
use memcg_core::tree::Events;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use cold::{AGES, AgeView, ColdView};
pub use reclaim::{ReclaimRung, ReclaimView};

use super::residency::MeasuredView;
use crate::worker::protocol::{Area, FaultCounts, GuestStats, Quantiles};

/// Where a VM is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// The worker is setting it up and loading the kernel.
    Starting,
    /// The guest runs, or is held for want of memory (see `held`).
    Running,
    /// Every vCPU is stopped until `resume`.
    Paused,
    /// The guest has ended; what it used is on its way back to the host.
    Ended,
}

/// One VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// The group that it is in.
    #[serde(default)]
    pub group: String,
    /// Where it is in its life.
    pub state: VmState,
    /// Process id of its worker.
    pub pid: i32,
    /// Time since its worker was started, in milliseconds.
    pub age_ms: u64,
    /// Number of the last change of its limits, for compare-and-set.
    pub generation: u64,
    /// Guest RAM.
    pub size_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// False as long as nothing is charged: no limit was ever set, and `track` is off.
    pub accounting: bool,
    /// How it ended, when it has.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub end: Option<String>,
    /// Who has paused it, as long as it is paused.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub paused_by: Option<PausedBy>,
    /// Somebody at the interface wants it paused as well: it does not go on by itself.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub kept_paused: bool,
    /// What has to be free for it to go on, as long as it is paused for want of memory: what it gave up, or what it owes.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub resume_bytes: Option<u64>,
    /// What is missing of that still.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub resume_missing_bytes: Option<u64>,
    /// Whom it waits for, as long as it has no memory: whose memory is on its way for it while it is held, or who goes on before
    /// it where it was paused for others.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub waits_for: Vec<AheadView>,
    /// Socket at which its console is, as long as it has not ended: a stream with the last of what it printed, then
    /// what it prints; what is written to it is typed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub console: Option<String>,
    /// True when the worker did not answer in time and these are its last known numbers.
    pub stale: bool,
    /// The counter of everything.
    pub memory: MemoryView,
    /// Overhead of the VMM, a part of `memory`.
    pub vmm: CounterView,
    /// What `vmm` consists of, next to what was measured.
    pub overhead: OverheadView,
    /// Evicted pages.
    pub swap: CounterView,
    /// What is known of its cold pages.
    pub cold: ColdView,
    /// What is being done about memory that it should not use.
    #[serde(default)]
    pub reclaim: ReclaimView,
    /// The balloon.
    pub balloon: BalloonView,
    /// What the guest says about its memory, when it has said anything.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub guest_stats: Option<GuestStatsView>,
    /// Whether the vCPUs are stopped for want of memory.
    pub held: HeldView,
    /// `memory.pressure`: how much of the time they wait for memory.
    pub pressure: PressureView,
    /// What happens when the VM stays held.
    pub oom: OomView,
    /// Where guest RAM is mapped in the worker.
    pub ram: Vec<RamView>,
    /// Where the contents of its evicted pages are kept.
    pub store: AreaView,
    /// Where huge pages are zeroed ahead of need; they are charged as stock.
    pub pool: AreaView,
    /// The fault path since the start.
    pub faults: FaultsView,
}

impl VmView {
    /// It stands still for others, and gives all that it has.
    pub fn is_emptied(&self) -> bool {
        self.state == VmState::Paused && self.paused_by.is_some_and(PausedBy::is_for_others)
    }

    /// Whether `path` is its own, not that of a group.
    pub fn is_at(&self, path: &str) -> bool {
        path.strip_suffix(&self.name)
            .and_then(|group| group.strip_suffix('/'))
            .is_some_and(|group| group == self.group || group.is_empty() && self.group == "/")
    }
}

/// A VM that another one waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AheadView {
    /// Its name.
    pub vm: String,
    /// What is still to come back of it, or what it needs in order to go on.
    pub bytes: u64,
}

/// Who has paused a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PausedBy {
    /// Somebody at the interface: only they let it go on.
    User,
    /// The policy: it goes on when there is room for more than its debt.
    Policy,
    /// The policy, because the host ran short of memory: all that it held was evicted, and it goes on when there is room for it.
    Host,
    /// The same, because its group had no room left.
    Group,
}

impl PausedBy {
    /// Whether it stands still so that others have its memory: then all that it has is evicted.
    pub fn is_for_others(self) -> bool {
        match self {
            Self::Host | Self::Group => true,
            Self::User | Self::Policy => false,
        }
    }

    /// As events name it.
    pub fn word(self) -> &'static str {
        match self {
            Self::User => "request",
            Self::Policy => "policy",
            Self::Host => "host",
            Self::Group => "group",
        }
    }
}

/// What a VM costs beside its pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OverheadView {
    /// What is charged for it.
    pub accounted: AccountedView,
    /// What the host finds; only when one VM is asked for, and its worker can be looked into.
    pub measured: Option<MeasuredView>,
}

/// What is charged for a VM beside its pages: by what it is for, and the same by whose memory it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AccountedView {
    /// The worker's process, without what is named below.
    pub worker_bytes: u64,
    /// The vCPUs.
    pub vcpu_bytes: u64,
    /// The virtqueues.
    pub queue_bytes: u64,
    /// The records of guest pages.
    pub frame_records_bytes: u64,
    /// Page tables, the host's and KVM's.
    pub page_tables_bytes: u64,
    /// Of all these, private memory of the worker.
    pub user_bytes: u64,
    /// Of all these, memory of the kernel.
    pub kernel_bytes: u64,
}

/// A counter with its limit; `null` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CounterView {
    /// What is charged now.
    pub current_bytes: u64,
    /// The most that was ever charged.
    pub peak_bytes: u64,
    /// The limit, `null` for none.
    pub max_bytes: Option<u64>,
}

/// The memory counter and its limits; `null` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryView {
    /// What is charged now: guest pages, store, stock, reserve and overhead.
    pub current_bytes: u64,
    /// The most that was ever charged.
    pub peak_bytes: u64,
    /// Never reclaimed below this.
    pub min_bytes: Option<u64>,
    /// Reclaimed below this only in need.
    pub low_bytes: Option<u64>,
    /// Reclaim starts here.
    pub high_bytes: Option<u64>,
    /// No charge is granted above this.
    pub max_bytes: Option<u64>,
    /// The contents of evicted pages take no more than this; `null` is half of `max`.
    pub store_max_bytes: Option<u64>,
    /// A `max` that was asked for and is not yet in force.
    pub max_pending_bytes: Option<u64>,
    /// While a smaller `max` is pending: what usage may not exceed meanwhile.
    pub ceiling_bytes: Option<u64>,
    /// Who has twice as many gives half as much, when several have to give.
    pub shares: u32,
    /// Counts of events.
    pub events: MemoryEvents,
    /// What the charge consists of.
    pub stat: MemoryStat,
}

/// One group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GroupView {
    /// Its path; `/` is the host.
    pub path: String,
    /// It is removed, and what was charged in it is not all back yet.
    pub dying: bool,
    /// Number of the last change of its limits, for compare-and-set.
    pub generation: u64,
    /// Whether everything in it is charged.
    pub accounting: bool,
    /// VMs below it, also those of groups in it.
    pub vms: usize,
    /// Groups below it.
    pub groups: usize,
    /// The counter of everything below it.
    pub memory: GroupMemoryView,
    /// Overhead of the VMM for its VMs, a part of `memory`.
    pub vmm: CounterView,
    /// Evicted pages.
    pub swap: CounterView,
    /// What is being done about memory that it should not use.
    #[serde(default)]
    pub reclaim: ReclaimView,
    /// `memory.pressure` of all VMs below it together.
    pub pressure: PressureView,
}

/// What a transaction has changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LimitsView {
    /// All of it is in force; otherwise all of it waits for memory to be given back.
    pub in_force: bool,
    /// The VMs that were named, after it.
    pub vms: Vec<VmView>,
    /// The groups that were named, after it.
    pub groups: Vec<GroupView>,
}

/// The memory counter of a group and its limits; `null` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GroupMemoryView {
    /// What is charged below it now.
    pub current_bytes: u64,
    /// The most that was ever charged.
    pub peak_bytes: u64,
    /// Of `current`, what VMs that have ended used: on its way back to the host.
    pub returning_bytes: u64,
    /// Of `current`, what the contents of evicted pages take.
    pub store_bytes: u64,
    /// Never reclaimed below this.
    pub min_bytes: Option<u64>,
    /// Reclaimed below this only in need.
    pub low_bytes: Option<u64>,
    /// Reclaim starts here.
    pub high_bytes: Option<u64>,
    /// No charge is granted above this. Of `/`: the budget of the host.
    pub max_bytes: Option<u64>,
    /// The contents of evicted pages take no more than this, all together.
    pub store_max_bytes: Option<u64>,
    /// A `max` that was asked for and is not yet in force.
    pub max_pending_bytes: Option<u64>,
    /// While a smaller `max` is pending: what usage may not exceed meanwhile.
    pub ceiling_bytes: Option<u64>,
    /// Usage above `max`, left by a forced change; may only fall.
    pub overcharge_bytes: u64,
    /// What `min` protects in effect when the host is short, given usage and the groups above.
    pub effective_min_bytes: u64,
    /// What `low` protects in effect.
    pub effective_low_bytes: u64,
    /// What happened at its limits and below it.
    pub events: MemoryEvents,
    /// What happened at its own limits.
    pub events_local: MemoryEvents,
}

/// How often things happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryEvents {
    /// Usage rose above `high`.
    pub high: u64,
    /// A charge met `max`.
    pub max: u64,
    /// Charges refused to waiting faults.
    pub failcnt: u64,
    /// Times that a VM was held at this limit until the policy had to act.
    pub oom: u64,
    /// Times that the policy killed a VM because of it.
    pub oom_kill: u64,
    /// Times that the policy paused a VM because of it.
    #[serde(default)]
    pub oom_pause: u64,
}

impl MemoryEvents {
    /// What the tree has counted, with the failures of the counter.
    pub fn new(events: Events, failcnt: u64) -> Self {
        let Events { high, max, oom, oom_kill, oom_pause, .. } = events;
        Self { high, max, failcnt, oom, oom_kill, oom_pause }
    }
}

/// What `current` consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryStat {
    /// Resident guest pages: active and idle.
    pub guest_bytes: u64,
    /// Of these, mapped into the guest.
    pub active_bytes: u64,
    /// Of these, set aside until their next touch.
    pub idle_bytes: u64,
    /// Compressed contents of evicted pages.
    pub store_bytes: u64,
    /// Evicted pages, at their full size (not charged to memory: `swap.current`).
    pub swapped_bytes: u64,
    /// Given to the balloon (not charged).
    pub ballooned_bytes: u64,
    /// Charged ahead of need.
    pub stock_bytes: u64,
    /// Charged for faults that cannot be charged.
    pub reserve_bytes: u64,
    /// Overhead of the VMM: `vmm.current`.
    pub vmm_bytes: u64,
    /// Missing from the reserve, or for what the guest's pages cost: what it touched while nothing could be charged.
    pub debt_bytes: u64,
    /// Usage above `max`, left by a forced change; may only fall.
    pub overcharge_bytes: u64,
}

/// The balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct BalloonView {
    /// What the guest should give.
    pub target_bytes: u64,
    /// What it is told to give: less than the target for a while after it has stalled.
    pub told_bytes: u64,
    /// What it says it has given.
    pub actual_bytes: u64,
    /// Its driver is running.
    pub ready: bool,
    /// How it answers, while its driver is running.
    pub progress: Option<BalloonProgress>,
}

/// How a guest answers when its balloon is asked for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BalloonProgress {
    /// It has given what it should, or does so in reasonable time, or has just been asked.
    Cooperating,
    /// It gives, but nobody can wait for it.
    Slow,
    /// It gives nothing, or next to nothing.
    Stalled,
}

impl From<State> for BalloonProgress {
    fn from(state: State) -> Self {
        match state {
            State::Cooperating => Self::Cooperating,
            State::Slow => Self::Slow,
            State::Stalled => Self::Stalled,
        }
    }
}

/// Whether the vCPUs are stopped for want of memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HeldView {
    /// They are now.
    pub now: bool,
    /// Path of the group whose limit leaves no room for what they wait for, or of the VM itself; only while they are.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub limit_of: Option<String>,
    /// They were for so long since the start.
    pub total_us: u64,
    /// Time until the policy acts, while it is going to.
    pub deadline_ms: Option<u64>,
}

/// `memory.pressure` of a VM or of a group, as the kernel's PSI has it. A group's is that of all its VMs together: `some`
/// while any vCPU waits, `full` while all that would run do. A vCPU waits while it is held for want of memory, and while
/// a page comes back that was evicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PressureView {
    /// At least one vCPU waits for memory.
    pub some: PressureLine,
    /// Every vCPU that would run waits.
    pub full: PressureLine,
}

/// One line of `memory.pressure`. The averages are updated every 2 s.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PressureLine {
    /// Per cent of the last 10 s, with two decimals.
    pub avg10: f64,
    /// Per cent of the last 60 s.
    pub avg60: f64,
    /// Per cent of the last 300 s.
    pub avg300: f64,
    /// Time in all, in microseconds; counted anew by every controller.
    pub total_us: u64,
}

/// What happens to a VM that stays held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OomView {
    /// What is done to it.
    pub action: OomAction,
    /// How long it may be held before.
    pub deadline_ms: u64,
    /// Among several candidates, lower goes first.
    pub priority: i32,
    /// Whether it is a candidate when others must choose.
    pub preference: OomPreference,
}

/// What the policy does to a VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OomAction {
    /// Stop its vCPUs until there is memory again.
    #[default]
    Pause,
    /// End it.
    Kill,
}

impl OomAction {
    /// As the interface names it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Kill => "kill",
        }
    }
}

/// Whether a VM is a candidate when memory is short elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OomPreference {
    /// Like any other.
    #[default]
    None,
    /// After all others.
    Avoid,
    /// Never.
    Omit,
}

/// One slot of guest RAM in the worker's address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RamView {
    /// First guest-physical address.
    pub gpa: u64,
    /// First address in the worker.
    pub hva: u64,
    /// Length.
    pub bytes: u64,
    /// First address in the worker of the slot's stage, as long as the slot: an idle page is there instead.
    pub stage_hva: u64,
}

impl RamView {
    /// Where the pages of this slot may be in the worker.
    pub fn areas(&self) -> [Range<u64>; 2] {
        [self.hva, self.stage_hva].map(|start| start..start.saturating_add(self.bytes))
    }
}

/// A mapping of the worker's that is part of a VM's memory and not RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AreaView {
    /// First address in the worker.
    pub hva: u64,
    /// Length; 0 when there is none.
    pub bytes: u64,
}

impl From<Area> for AreaView {
    fn from(area: Area) -> Self {
        Self { hva: area.hva, bytes: area.bytes }
    }
}

impl AreaView {
    /// Its place in the worker.
    pub fn area(&self) -> Range<u64> {
        self.hva..self.hva.saturating_add(self.bytes)
    }
}

/// Counters of the fault path, all since the start of the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FaultsView {
    /// Events read from userfaultfd.
    pub events: u64,
    /// Events for a page that was there already.
    pub stale: u64,
    /// Pages filled because they were touched.
    pub touched_pages: u64,
    /// Pages filled around a touched page.
    pub around_pages: u64,
    /// Pages granted from the reserve.
    pub from_reserve_pages: u64,
    /// Times that the host had no memory for a page that is charged.
    #[serde(default)]
    pub unfilled: u64,
    /// Pages taken back from the balloon without a word.
    pub implicit_deflates: u64,
    /// Faults of the VMM's own threads.
    pub vmm: u64,
    /// Pages discarded for the balloon.
    pub discarded_pages: u64,
    /// Pages discarded because the guest has reported them as free.
    pub reported_pages: u64,
    /// Of these, pages that the guest has touched again within seconds.
    pub reported_back_pages: u64,
    /// Pages reported as free and left alone: too many had come back, or the guest wants to find its poison in them.
    pub reported_left_pages: u64,
    /// Things a guest claimed that were refused.
    pub guest_errors: u64,
    /// Time from the fault thread's waking up to its answer.
    pub answer: Quantiles,
    /// Time from the decision to hold the vCPUs to the last one out of the guest.
    pub hold: Quantiles,
}

impl From<FaultCounts> for FaultsView {
    fn from(counts: FaultCounts) -> Self {
        Self {
            events: counts.events,
            stale: counts.stale,
            touched_pages: counts.touched,
            around_pages: counts.around,
            from_reserve_pages: counts.from_reserve,
            unfilled: counts.unfilled,
            implicit_deflates: counts.implicit_deflates,
            vmm: counts.vmm,
            discarded_pages: counts.discarded,
            reported_pages: counts.reported,
            reported_back_pages: counts.reported_back,
            reported_left_pages: counts.reported_left,
            guest_errors: counts.guest_errors,
            answer: counts.answer,
            hold: counts.hold,
        }
    }
}

/// Names a structure after the guest's statistics, so that tag number, field and JSON key are one list.
macro_rules! guest_stats {
    ($($tag:literal $field:ident $doc:literal,)*) => {
        /// What the guest said about its memory; a value that it did not send is absent.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
        pub struct GuestStatsView {
            $(
                #[doc = $doc]
                #[serde(skip_serializing_if = "Option::is_none", default)]
                pub $field: Option<u64>,
            )*
            /// Time since it said so, in milliseconds.
            pub age_ms: u64,
        }

        impl GuestStatsView {
            /// The view of `stats`, which are `age_ms` old.
            pub fn new(stats: &GuestStats, age_ms: u64) -> Self {
                Self { $($field: stats.values[$tag],)* age_ms }
            }
        }
    };
}

guest_stats! {
    0 swap_in "Bytes swapped in.",
    1 swap_out "Bytes swapped out.",
    2 major_faults "Faults that needed a disk.",
    3 minor_faults "Faults that did not.",
    4 free_memory "Bytes unused.",
    5 total_memory "Bytes it knows of.",
    6 available_memory "Bytes it could give without swapping.",
    7 disk_caches "Bytes of cache that could be dropped at once.",
    8 hugetlb_allocations "Huge pages allocated.",
    9 hugetlb_failures "Huge pages that could not be.",
    10 oom_kill "Processes its OOM killer has killed.",
    11 alloc_stall "Allocations that had to wait.",
    12 async_scan "Pages scanned in the background.",
    13 direct_scan "Pages scanned by an allocation.",
    14 async_reclaim "Pages reclaimed in the background.",
    15 direct_reclaim "Pages reclaimed by an allocation.",
}

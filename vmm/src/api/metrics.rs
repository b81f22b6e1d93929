//! `GET /metrics`: what Prometheus collects, as OpenMetrics text.
//!
//! Nothing is kept here: every answer is made of one look at everything ([`Overview`]). Counters count from the start of
//! the controller: where one takes a VM over, what it counts itself (`memory.events`, pressure) begins at 0 again, and what
//! the worker counts goes on. What is not known is absent, never 0 or -1: a limit that is not set, statistics that the guest has not sent.
//!
//! A series is of a VM (label `vm`) or of a group (label `group`; `/` is the host), never of both, so
//! `sum(ballast_memory_current_bytes{vm!=""})` counts every page once. How many there are is bounded by how many VMs and
//! groups there are.

use std::fmt::Error;

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::Shared;
use crate::controller::error::{Code, Refusal};
use crate::controller::oom_log::{BUCKETS, DecidedBy, OomTotals, Returns};
use crate::controller::overview::{Overview, Tally};
use crate::controller::shortage::ShortageSign;
use crate::controller::view::{
    ColdView, CounterView, GroupView, MemoryEvents, OomAction, PressureView, VmState, VmView,
};
use crate::worker::protocol::Quantiles;

/// What this is, for whoever collects it.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Numbers of all VMs, groups and the host, for Prometheus.
#[utoipa::path(
    get, path = "/metrics",
    responses((status = 200, description = "OpenMetrics text", body = String,
        content_type = "application/openmetrics-text")),
)]
pub(super) async fn metrics(State(shared): State<Shared>) -> Result<Response, Refusal> {
    shared.controller.ask_idle().await;
    let (overview, tally) = shared.controller.tally().await?;
    let text = text(overview, tally)
        .map_err(|error| Refusal::new(Code::Busy, format!("the numbers cannot be written down: {error}")))?;
    Ok(([("content-type", CONTENT_TYPE), ("cache-control", "no-store")], text).into_response())
}

/// The numbers as text.
fn text(overview: Overview, tally: Tally) -> Result<String, Error> {
    let mut registry = Registry::with_prefix("ballast");
    registry.register_collector(Box::new(Scrape { overview, tally }));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

/// One look at everything.
#[derive(Debug)]
struct Scrape {
    overview: Overview,
    tally: Tally,
}

/// What VMs and groups have alike.
struct Node<'a> {
    label: (&'static str, &'a str),
    current: u64,
    peak: u64,
    limits: [(&'static str, Option<u64>); 7],
    vmm: &'a CounterView,
    swap: &'a CounterView,
    events: &'a MemoryEvents,
    pressure: &'a PressureView,
}

/// A [`Node`] of a view of a VM or of a group: they have the same names for it.
macro_rules! node {
    ($label:expr, $view:expr) => {{
        let (view, memory) = ($view, &$view.memory);
        Node {
            label: $label,
            current: memory.current_bytes,
            peak: memory.peak_bytes,
            limits: [
                ("min", memory.min_bytes),
                ("low", memory.low_bytes),
                ("high", memory.high_bytes),
                ("max", memory.max_bytes),
                ("vmm_max", view.vmm.max_bytes),
                ("swap_max", view.swap.max_bytes),
                ("store_max", memory.store_max_bytes),
            ],
            vmm: &view.vmm,
            swap: &view.swap,
            events: &memory.events,
            pressure: &view.pressure,
        }
    }};
}

impl<'a> Node<'a> {
    fn of_vm(vm: &'a VmView) -> Self {
        node!(("vm", &vm.name), vm)
    }

    fn of_group(group: &'a GroupView) -> Self {
        node!(("group", &group.path), group)
    }
}

/// A label with its value.
type Label<'a> = (&'static str, &'a str);

/// One metric with all its series.
struct Family<'e>(MetricEncoder<'e>);

impl Family<'_> {
    fn gauge(&mut self, labels: &[Label<'_>], value: u64) -> Result<(), Error> {
        self.0.encode_family(&labels)?.encode_gauge(&value)
    }

    fn gauge_f(&mut self, labels: &[Label<'_>], value: f64) -> Result<(), Error> {
        self.0.encode_family(&labels)?.encode_gauge(&value)
    }

    fn count(&mut self, labels: &[Label<'_>], value: u64) -> Result<(), Error> {
        self.0.encode_family(&labels)?.encode_counter::<[Label<'_>; 0], _, u64>(&value, None)
    }

    fn seconds(&mut self, labels: &[Label<'_>], micros: u64) -> Result<(), Error> {
        let seconds = micros as f64 / 1e6;
        self.0.encode_family(&labels)?.encode_counter::<[Label<'_>; 0], _, u64>(&seconds, None)
    }

    fn times(&mut self, labels: &[Label<'_>], times: &Returns) -> Result<(), Error> {
        let ends = BUCKETS.iter().map(|ms| *ms as f64 / 1e3).chain([f64::INFINITY]);
        let buckets: Vec<_> = ends.zip(times.counts).collect();
        let (sum, count) = (times.sum.as_secs_f64(), times.counts.iter().sum());
        self.0.encode_family(&labels)?.encode_histogram::<[Label<'_>; 0]>(sum, count, &buckets, None)
    }
}

/// Writes the head of a metric.
fn family<'e>(
    encoder: &'e mut DescriptorEncoder<'_>,
    kind: MetricType,
    name: &'e str,
    unit: Option<&'e Unit>,
    help: &str,
) -> Result<Family<'e>, Error> {
    encoder.encode_descriptor(name, help, unit, kind).map(Family)
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let vms: Vec<_> = self.overview.vms.iter().filter(|vm| vm.state != VmState::Ended).collect();
        self.host(&mut encoder)?;
        self.shortage(&mut encoder)?;
        self.oom(&mut encoder)?;
        self.nodes(&mut encoder, &vms)?;
        states(&mut encoder, &vms)?;
        memory(&mut encoder, &vms)?;
        cold(&mut encoder, &vms)?;
        faults(&mut encoder, &vms)?;
        guest(&mut encoder, &vms)
    }
}

impl Scrape {
    fn host(&self, e: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        use MetricType::{Counter, Gauge, Info};
        let host = &self.overview.host;
        let version = [("version", host.version.as_str())];
        family(e, Info, "build", None, "The controller.")?.0.encode_info(&version)?;
        let bytes = Some(&Unit::Bytes);
        family(e, Gauge, "host_total", bytes, "Memory of the host.")?.gauge(&[], host.total_bytes)?;
        let help = "Memory that the host could give without swapping.";
        family(e, Gauge, "host_available", bytes, help)?.gauge(&[], host.available_bytes)?;
        family(e, Gauge, "vms", None, "VMs that have not ended.")?.gauge(&[], host.vms as u64)?;
        let mut events = family(e, Counter, "events", None, "Events by kind since the controller began.")?;
        for (kind, count) in &self.tally.events {
            // A kind is written as a string.
            let kind = serde_json::to_value(kind).map_err(|_| Error)?;
            events.count(&[("event", kind.as_str().unwrap_or_default())], *count)?;
        }
        Ok(())
    }

    /// Whether the host runs short of memory, where somebody watches that.
    fn shortage(&self, e: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        use MetricType::{Counter, Gauge};
        let Some(now) = &self.overview.host.shortage else { return Ok(()) };
        let bytes = Some(&Unit::Bytes);
        let help = "1 while the host is seen to run short of memory, by this sign.";
        let mut short = family(e, Gauge, "shortage", None, help)?;
        for (name, sign) in [("available", ShortageSign::Available), ("stalled", ShortageSign::Stalled)] {
            short.gauge(&[("sign", name)], (now.short == Some(sign)).into())?;
        }
        let help = "Memory that the host, and the cgroups above the controller, could give without swapping.";
        family(e, Gauge, "shortage_available", bytes, help)?.gauge(&[], now.available_bytes)?;
        let help = "Available memory below which the host is short, above which it is not any more, and below which somebody \
                    is chosen.";
        let mut marks = family(e, Gauge, "shortage_mark", bytes, help)?;
        for (mark, bytes) in [("enter", now.enter_bytes), ("leave", now.leave_bytes), ("critical", now.critical_bytes)]
        {
            marks.gauge(&[("mark", mark)], bytes)?;
        }
        let help = "Time that the host was short of memory.";
        family(e, Counter, "shortage", Some(&Unit::Seconds), help)?.seconds(&[], now.total_us)
    }

    /// What was decided when no memory was left, and what that brought.
    fn oom(&self, e: &mut DescriptorEncoder<'_>) -> Result<(), Error> {
        use MetricType::{Counter, Histogram};
        const ACTIONS: [OomAction; 2] = [OomAction::Pause, OomAction::Kill];
        let OomTotals { decisions, freed, returns } = &self.tally.oom;
        let help = "Decisions when no memory was left, by what was done and who decided; none: nobody could be chosen.";
        let mut decided = family(e, Counter, "oom_decisions", None, help)?;
        for action in ACTIONS.map(Some).into_iter().chain([None]) {
            for by in DecidedBy::ALL {
                let labels = [("action", action.map_or("none", OomAction::word)), ("by", by.word())];
                decided.count(&labels, decisions.get(&(action, by)).copied().unwrap_or_default())?;
            }
        }
        let mut bytes = family(e, Counter, "oom_freed", Some(&Unit::Bytes), "Memory that came back of those chosen.")?;
        for action in ACTIONS {
            bytes.count(&[("action", action.word())], freed.get(&action).copied().unwrap_or_default())?;
        }
        let help = "Time from a decision until all that was expected of it was back.";
        let mut times = family(e, Histogram, "oom_return", Some(&Unit::Seconds), help)?;
        for action in ACTIONS {
            times.times(&[("action", action.word())], &returns.get(&action).copied().unwrap_or_default())?;
        }
        Ok(())
    }

    /// What VMs and groups have alike.
    fn nodes(&self, e: &mut DescriptorEncoder<'_>, vms: &[&VmView]) -> Result<(), Error> {
        use MetricType::{Counter, Gauge};
        let bytes = Some(&Unit::Bytes);
        let groups = self.overview.groups.iter().filter(|group| !group.dying);
        let nodes: Vec<_> = groups.map(Node::of_group).chain(vms.iter().map(|vm| Node::of_vm(vm))).collect();
        let mut current = family(e, Gauge, "memory_current", bytes, "Memory charged: guest pages, stock, overhead.")?;
        for node in &nodes {
            current.gauge(&[node.label], node.current)?;
        }
        let mut peak = family(e, Gauge, "memory_peak", bytes, "The most that was charged.")?;
        for node in &nodes {
            peak.gauge(&[node.label], node.peak)?;
        }
        let mut limit = family(e, Gauge, "memory_limit", bytes, "Limits in force; absent where there is none.")?;
        for node in &nodes {
            for (kind, bytes) in node.limits.iter().filter_map(|(kind, bytes)| Some((kind, (*bytes)?))) {
                limit.gauge(&[node.label, ("kind", kind)], bytes)?;
            }
        }
        let mut vmm = family(e, Gauge, "vmm_current", bytes, "Overhead of the VMM, part of memory_current.")?;
        for node in &nodes {
            vmm.gauge(&[node.label], node.vmm.current_bytes)?;
        }
        let mut swap = family(e, Gauge, "swap_current", bytes, "Evicted pages, at their full size.")?;
        for node in &nodes {
            swap.gauge(&[node.label], node.swap.current_bytes)?;
        }
        let mut events = family(e, Counter, "memory_events", None, "memory.events.")?;
        for (node, MemoryEvents { high, max, failcnt, oom, oom_kill, oom_pause }) in
            nodes.iter().map(|node| (node, node.events))
        {
            for (event, count) in [
                ("high", high),
                ("max", max),
                ("failcnt", failcnt),
                ("oom", oom),
                ("oom_kill", oom_kill),
                ("oom_pause", oom_pause),
            ] {
                events.count(&[node.label, ("event", event)], *count)?;
            }
        }
        let help = "Time that vCPUs waited for memory: some of them, or all that would run.";
        let mut total = family(e, Counter, "pressure", Some(&Unit::Seconds), help)?;
        for node in &nodes {
            for (line, value) in [("some", &node.pressure.some), ("full", &node.pressure.full)] {
                total.seconds(&[node.label, ("line", line)], value.total_us)?;
            }
        }
        let help = "memory.pressure: the share of time that vCPUs waited for memory, 0 to 1.";
        let mut share = family(e, Gauge, "pressure_ratio", None, help)?;
        for node in &nodes {
            for (line, value) in [("some", &node.pressure.some), ("full", &node.pressure.full)] {
                for (window, per_cent) in [("10s", value.avg10), ("60s", value.avg60), ("300s", value.avg300)] {
                    share.gauge_f(&[node.label, ("line", line), ("window", window)], per_cent / 100.0)?;
                }
            }
        }
        Ok(())
    }
}

/// What each VM is doing, and where.
fn states(e: &mut DescriptorEncoder<'_>, vms: &[&VmView]) -> Result<(), Error> {
    let mut place = family(e, MetricType::Info, "vm", None, "The group that a VM is in.")?;
    for vm in vms {
        place.0.encode_family(&[("vm", vm.name.as_str())])?.encode_info(&[("group", vm.group.as_str())])?;
    }
    let help = "1 for the state that the VM is in, 0 for the others.";
    let mut state = family(e, MetricType::Gauge, "vm_state", None, help)?;
    for vm in vms {
        let held = vm.state == VmState::Running && vm.held.now;
        for (name, is) in [
            ("starting", vm.state == VmState::Starting),
            ("running", vm.state == VmState::Running && !held),
            ("held", held),
            ("paused", vm.state == VmState::Paused),
        ] {
            state.gauge(&[("vm", &vm.name), ("state", name)], is.into())?;
        }
    }
    let help = "Time that the vCPUs were held for want of memory.";
    let mut held = family(e, MetricType::Counter, "held", Some(&Unit::Seconds), help)?;
    for vm in vms {
        held.seconds(&[("vm", &vm.name)], vm.held.total_us)?;
    }
    Ok(())
}

/// What the charge of each VM consists of, and its balloon.
fn memory(e: &mut DescriptorEncoder<'_>, vms: &[&VmView]) -> Result<(), Error> {
    use MetricType::{Counter, Gauge};
    let bytes = Some(&Unit::Bytes);
    let mut stat = family(e, Gauge, "memory_stat", bytes, "memory.stat: what the charge consists of.")?;
    for vm in vms {
        let parts = &vm.memory.stat;
        for (kind, bytes) in [
            ("guest", parts.guest_bytes),
            ("active", parts.active_bytes),
            ("idle", parts.idle_bytes),
            ("store", parts.store_bytes),
            ("swapped", parts.swapped_bytes),
            ("ballooned", parts.ballooned_bytes),
            ("stock", parts.stock_bytes),
            ("reserve", parts.reserve_bytes),
            ("debt", parts.debt_bytes),
            ("overcharge", parts.overcharge_bytes),
        ] {
            stat.gauge(&[("vm", &vm.name), ("kind", kind)], bytes)?;
        }
    }
    let mut target = family(e, Gauge, "balloon_target", bytes, "What the guest is asked to give.")?;
    for vm in vms {
        target.gauge(&[("vm", &vm.name)], vm.balloon.target_bytes)?;
    }
    let mut actual = family(e, Gauge, "balloon_actual", bytes, "What the guest says it has given.")?;
    for vm in vms {
        actual.gauge(&[("vm", &vm.name)], vm.balloon.actual_bytes)?;
    }
    let help = "Memory of the guest that came back: given by its balloon, reported as free, or evicted.";
    let mut reclaimed = family(e, Counter, "reclaimed", bytes, help)?;
    for vm in vms {
        let bytes = |pages: u64| pages.saturating_mul(memcg_core::PAGE_SIZE);
        for (via, bytes) in [
            ("balloon", bytes(vm.faults.discarded_pages)),
            ("report", bytes(vm.faults.reported_pages)),
            ("eviction", vm.cold.evicted_bytes),
        ] {
            reclaimed.count(&[("vm", &vm.name), ("via", via)], bytes)?;
        }
    }
    Ok(())
}

/// Which memory is in use, and what was taken that was.
fn cold(e: &mut DescriptorEncoder<'_>, vms: &[&VmView]) -> Result<(), Error> {
    use MetricType::{Counter, Gauge};
    let bytes = Some(&Unit::Bytes);
    let help = "Memory in use in the last two generations, estimated; absent as long as nothing is known.";
    let mut set = family(e, Gauge, "working_set", bytes, help)?;
    for vm in vms {
        if let Some(bytes) = vm.cold.working_set_bytes {
            set.gauge(&[("vm", &vm.name)], bytes)?;
        }
    }
    let help = "The working set is known up to this, in 95 of 100 cases.";
    let mut error = family(e, Gauge, "working_set_error", bytes, help)?;
    for vm in vms {
        if let Some(bytes) = vm.cold.working_set_error_bytes {
            error.gauge(&[("vm", &vm.name)], bytes)?;
        }
    }
    let aged: Vec<_> = vms.iter().filter(|vm| vm.cold.generation_ms > 0).collect();
    let help = "Length of a generation, the unit of ages; absent while nothing is aged.";
    let mut length = family(e, Gauge, "generation", Some(&Unit::Seconds), help)?;
    for vm in &aged {
        length.gauge_f(&[("vm", &vm.name)], f64::from(vm.cold.generation_ms) / 1e3)?;
    }
    let help = "Resident memory by age: the least number of generations since it was seen in use.";
    let mut cold = family(e, Gauge, "cold", bytes, help)?;
    for vm in &aged {
        for age in &vm.cold.ages {
            cold.gauge(&[("vm", &vm.name), ("age", &age.generations.to_string())], age.resident_bytes)?;
        }
    }
    let help = "Pages that were moved aside or evicted, and touched again.";
    let mut refaults = family(e, Counter, "refaults", None, help)?;
    for vm in vms {
        let ColdView { returned_bytes, refaulted_bytes, .. } = vm.cold;
        for (of, bytes) in [("idle", returned_bytes), ("evicted", refaulted_bytes)] {
            refaults.count(&[("vm", &vm.name), ("of", of)], bytes / memcg_core::PAGE_SIZE)?;
        }
    }
    Ok(())
}

/// The fault path.
fn faults(e: &mut DescriptorEncoder<'_>, vms: &[&VmView]) -> Result<(), Error> {
    use MetricType::{Counter, Gauge};
    let mut count = family(e, Counter, "faults", None, "Faults: all, of a page that was there, of the VMM's threads.")?;
    for vm in vms {
        for (kind, value) in [("all", vm.faults.events), ("stale", vm.faults.stale), ("vmm", vm.faults.vmm)] {
            count.count(&[("vm", &vm.name), ("kind", kind)], value)?;
        }
    }
    let help = "Pages filled: touched, around those, from the reserve, taken back from the balloon.";
    let mut filled = family(e, Counter, "filled_pages", None, help)?;
    for vm in vms {
        for (kind, value) in [
            ("touched", vm.faults.touched_pages),
            ("around", vm.faults.around_pages),
            ("reserve", vm.faults.from_reserve_pages),
            ("implicit_deflate", vm.faults.implicit_deflates),
        ] {
            filled.count(&[("vm", &vm.name), ("kind", kind)], value)?;
        }
    }
    let help = "Pages filled for each page touched.";
    let mut ratio = family(e, Gauge, "charged_touched_ratio", None, help)?;
    for vm in vms.iter().filter(|vm| vm.faults.touched_pages > 0) {
        let charged = vm.faults.touched_pages.saturating_add(vm.faults.around_pages);
        ratio.gauge_f(&[("vm", &vm.name)], charged as f64 / vm.faults.touched_pages as f64)?;
    }
    let help = "Time to answer a fault, since the VM's start.";
    durations(e, "fault_duration", help, vms, |vm| vm.faults.answer)?;
    let help = "Time from the decision to hold the vCPUs to the last one out of the guest, since the VM's start.";
    durations(e, "hold_duration", help, vms, |vm| vm.faults.hold)?;
    let mut errors = family(e, Counter, "guest_errors", None, "Things that the guest claimed and that were refused.")?;
    for vm in vms {
        errors.count(&[("vm", &vm.name)], vm.faults.guest_errors)?;
    }
    Ok(())
}

/// Quantiles of a time, where there is one.
fn durations(
    e: &mut DescriptorEncoder<'_>,
    name: &'static str,
    help: &str,
    vms: &[&VmView],
    of: impl Fn(&VmView) -> Quantiles,
) -> Result<(), Error> {
    let mut times = family(e, MetricType::Gauge, name, Some(&Unit::Seconds), help)?;
    for vm in vms {
        let times_of = of(vm);
        if times_of.count > 0 {
            for (quantile, us) in [("0.5", times_of.p50_us), ("0.99", times_of.p99_us), ("1", times_of.max_us)] {
                times.gauge_f(&[("vm", &vm.name), ("quantile", quantile)], us as f64 / 1e6)?;
            }
        }
    }
    Ok(())
}

/// What the guests say of themselves.
fn guest(e: &mut DescriptorEncoder<'_>, vms: &[&VmView]) -> Result<(), Error> {
    use MetricType::Gauge;
    let said: Vec<_> = vms.iter().filter_map(|vm| Some((vm.name.as_str(), vm.guest_stats.as_ref()?))).collect();
    let mut age = family(e, Gauge, "guest_stats_age", Some(&Unit::Seconds), "Time since the guest's last statistics.")?;
    for (vm, stats) in &said {
        age.gauge_f(&[("vm", vm)], stats.age_ms as f64 / 1e3)?;
    }
    let help = "What the guest says of its memory; absent where it does not.";
    let mut memory = family(e, Gauge, "guest_memory", Some(&Unit::Bytes), help)?;
    for (vm, stats) in &said {
        for (kind, bytes) in [
            ("total", stats.total_memory),
            ("free", stats.free_memory),
            ("available", stats.available_memory),
            ("caches", stats.disk_caches),
        ] {
            if let Some(bytes) = bytes {
                memory.gauge(&[("vm", vm), ("kind", kind)], bytes)?;
            }
        }
    }
    Ok(())
}

//! Traces: what the VMs of a real host used over time, in a file that `ballast record` writes and `ballast sim` plays.
//!
//! A line is a JSON object with one key, which says what it is about:
//!
//! ```text
//! {"host":{"version":1,"total_bytes":25769803776,"budget_bytes":null}}                    first
//! {"group":{"path":"/gold","limits":{"low_bytes":1073741824}}}                            before what is in it
//! {"vm":{"name":"web","group":"/gold","limits":{"max_bytes":536870912},"priority":10,…}}  before it is used; again
//!                                                                                         when something has changed
//! {"at":{"ms":1000,"others_bytes":2147483648,"vms":{"web":[314572800,104857600]}}}        footprint, and what of it is hot
//! ```
//!
//! Of a group or a VM the last line counts, for the whole trace. A VM that a moment does not name uses nothing then.
//! `footprint` is what the guest holds in memory and in swap, `hot` its working set; `others` is what the host has in use
//! beside its VMs.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::time::Duration;

use memcg_core::sim::{Group, Point, Setup, Vm};
use memcg_core::tree::LimitPatch;
use memcg_core::units::{Limit, Pages};
use serde::{Deserialize, Serialize};

use crate::controller::overview::Overview;
use crate::controller::view::{GroupView, OomAction, OomPreference, VmState, VmView};

/// The version of the format.
const VERSION: u32 = 1;

/// Longest line that is read: a moment of 100 000 VMs fits.
const MOST: u64 = 16 << 20;

/// Longest time that is simulated: nobody waits for the end of more.
pub const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);

/// Evicted memory from which it is known how far a guest's pages shrink.
const SEEN: u64 = 1 << 20;

/// Part of its cold memory that a VM of a trace touches in a minute, in thousandths: a trace does not say.
const WANDERS: u32 = 10;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// The host.
    Host(HostLine),
    /// A group.
    Group(GroupLine),
    /// A VM.
    Vm(VmLine),
    /// A moment.
    At(AtLine),
}

/// The host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostLine {
    /// Version of the format.
    pub version: u32,
    /// Its memory.
    pub total_bytes: u64,
    /// What all VMs together may use, `null` for no limit.
    pub budget_bytes: Option<u64>,
}

/// Limits; what is absent is not set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsLine {
    /// `memory.min`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_bytes: Option<u64>,
    /// `memory.low`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low_bytes: Option<u64>,
    /// `memory.high`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high_bytes: Option<u64>,
    /// `memory.max`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
    /// `swap.max`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap_max_bytes: Option<u64>,
    /// `store.max`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store_max_bytes: Option<u64>,
}

/// A group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupLine {
    /// Its path.
    pub path: String,
    /// Its limits.
    #[serde(default)]
    pub limits: LimitsLine,
}

/// A VM. What is absent is as it is by default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmLine {
    /// Its name.
    pub name: String,
    /// Path of its group.
    #[serde(default = "root")]
    pub group: String,
    /// Its limits.
    #[serde(default)]
    pub limits: LimitsLine,
    /// What it costs beside its pages.
    #[serde(default)]
    pub overhead_bytes: u64,
    /// Its shares.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shares: Option<u32>,
    /// What is done with it when it is chosen.
    #[serde(default)]
    pub action: OomAction,
    /// Whether it is a candidate.
    #[serde(default)]
    pub preference: OomPreference,
    /// Lower goes first.
    #[serde(default)]
    pub priority: i32,
    /// How long it may be held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// What an evicted page leaves in the store, in thousandths of a page.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shrinks_permille: Option<u32>,
    /// It has a balloon driver.
    #[serde(default)]
    pub balloon: bool,
    /// It reports free pages.
    #[serde(default)]
    pub reports: bool,
}

/// What VMs use at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AtLine {
    /// The moment, since the first.
    pub ms: u64,
    /// What is used beside the VMs.
    pub others_bytes: u64,
    /// Footprint and what of it is hot, in bytes, by the VM's name.
    pub vms: BTreeMap<String, [u64; 2]>,
}

fn root() -> String {
    "/".to_owned()
}

/// What makes lines of what a controller says, one moment after the other.
#[derive(Debug, Default)]
pub struct Recorder {
    groups: BTreeMap<String, GroupLine>,
    vms: BTreeMap<String, VmLine>,
    begun: bool,
}

impl Recorder {
    /// The lines of a moment, `ms` after the first.
    pub fn lines(&mut self, ms: u64, overview: &Overview) -> Vec<Line> {
        let mut lines = Vec::new();
        let host = &overview.host;
        if !self.begun {
            self.begun = true;
            let (total_bytes, budget_bytes) = (host.total_bytes, host.budget_bytes);
            lines.push(Line::Host(HostLine { version: VERSION, total_bytes, budget_bytes }));
        }
        for group in overview.groups.iter().filter(|group| group.path != "/").map(GroupLine::of) {
            if self.groups.get(&group.path) != Some(&group) {
                self.groups.insert(group.path.clone(), group.clone());
                lines.push(Line::Group(group));
            }
        }
        let there = || overview.vms.iter().filter(|vm| vm.state != VmState::Ended);
        for vm in there().map(VmLine::of) {
            if self.vms.get(&vm.name) != Some(&vm) {
                self.vms.insert(vm.name.clone(), vm.clone());
                lines.push(Line::Vm(vm));
            }
        }
        let others_bytes = host.total_bytes.saturating_sub(host.available_bytes).saturating_sub(host.current_bytes);
        let vms = there().map(|vm| (vm.name.clone(), used(vm))).collect();
        lines.push(Line::At(AtLine { ms, others_bytes, vms }));
        lines
    }
}

/// What a guest holds in memory and in swap, and how much of that it uses.
fn used(vm: &VmView) -> [u64; 2] {
    let stat = &vm.memory.stat;
    let footprint = stat.guest_bytes + stat.swapped_bytes;
    let hot = vm.cold.working_set_bytes.unwrap_or(stat.active_bytes);
    [footprint, hot.min(footprint)]
}

impl GroupLine {
    fn of(view: &GroupView) -> Self {
        let memory = &view.memory;
        let limits = LimitsLine {
            min_bytes: memory.min_bytes.filter(|bytes| *bytes > 0),
            low_bytes: memory.low_bytes.filter(|bytes| *bytes > 0),
            high_bytes: memory.high_bytes,
            max_bytes: memory.max_bytes,
            swap_max_bytes: view.swap.max_bytes,
            store_max_bytes: memory.store_max_bytes,
        };
        Self { path: view.path.clone(), limits }
    }
}

impl VmLine {
    fn of(view: &VmView) -> Self {
        let memory = &view.memory;
        let stored = memory.stat.swapped_bytes.saturating_sub(view.cold.file_bytes);
        // In steps, as the overhead is, or each moment would say something else.
        let shrinks =
            (stored >= SEEN).then(|| (memory.stat.store_bytes.saturating_mul(20) / stored).min(20) as u32 * 50);
        Self {
            name: view.name.clone(),
            group: if view.group.is_empty() { root() } else { view.group.clone() },
            limits: LimitsLine {
                min_bytes: memory.min_bytes.filter(|bytes| *bytes > 0),
                low_bytes: memory.low_bytes.filter(|bytes| *bytes > 0),
                high_bytes: memory.high_bytes,
                max_bytes: memory.max_bytes,
                swap_max_bytes: view.swap.max_bytes,
                store_max_bytes: memory.store_max_bytes,
            },
            overhead_bytes: view.vmm.current_bytes.next_multiple_of(1 << 20),
            shares: Some(memory.shares),
            action: view.oom.action,
            preference: view.oom.preference,
            priority: view.oom.priority,
            deadline_ms: Some(view.oom.deadline_ms),
            shrinks_permille: shrinks,
            balloon: view.balloon.ready,
            reports: view.faults.reported_pages > 0,
        }
    }
}

/// Why a trace cannot be played.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Read(#[from] std::io::Error),
    /// A line that makes no sense.
    #[error("line {line}: {why}")]
    Line {
        /// Which, from 1.
        line: usize,
        /// Why.
        why: String,
    },
    /// Nothing happens in it.
    #[error("there is no moment in it: a trace has a line \"host\", and a line \"at\" for each moment")]
    Empty,
}

/// What has been read of a trace.
#[derive(Default)]
struct Read {
    host: Option<HostLine>,
    groups: Vec<GroupLine>,
    vms: BTreeMap<String, VmLine>,
    loads: BTreeMap<String, Vec<Point>>,
    others: Vec<(Duration, Pages)>,
    now: Option<Duration>,
}

/// Reads a trace: the host, and how long it lasts.
///
/// # Errors
/// [`TraceError`], with the line.
pub fn read(mut from: impl BufRead) -> Result<(Setup, Duration), TraceError> {
    let mut read = Read::default();
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        let wrong = |why: String| TraceError::Line { line, why };
        let length = std::io::Read::take(&mut from, MOST).read_until(b'\n', &mut text)?;
        if length == 0 {
            break;
        }
        if length as u64 == MOST {
            return Err(wrong(format!("is longer than {} MiB", MOST >> 20)));
        }
        if text.trim_ascii().is_empty() {
            continue;
        }
        let parsed = match serde_json::from_slice(&text) {
            // The end of a recording that was cut off while it was written.
            Err(_) if !text.ends_with(b"\n") && read.now.is_some() => break,
            parsed => parsed.map_err(|error| wrong(error.to_string()))?,
        };
        read.take(parsed).map_err(wrong)?;
    }
    read.setup().ok_or(TraceError::Empty)
}

impl Read {
    fn take(&mut self, line: Line) -> Result<(), String> {
        match line {
            Line::Host(host) if host.version != VERSION => {
                return Err(format!("is of version {}, this ballast reads version {VERSION}", host.version));
            }
            Line::Host(host) => self.host = Some(host),
            _ if self.host.is_none() => return Err("comes before the host: the first line is {\"host\":…}".to_owned()),
            Line::Group(group) => match self.groups.iter_mut().find(|known| known.path == group.path) {
                Some(known) => *known = group,
                None => self.groups.push(group),
            },
            Line::Vm(vm) => drop(self.vms.insert(vm.name.clone(), vm)),
            Line::At(at) => return self.moment(at),
        }
        Ok(())
    }

    fn moment(&mut self, line: AtLine) -> Result<(), String> {
        let at = Duration::from_millis(line.ms);
        if at > LONGEST {
            return Err(format!("{} ms is more than a year", line.ms));
        }
        if self.now.is_some_and(|now| at <= now) {
            return Err(format!("{} ms is not after the moment before it", line.ms));
        }
        if let Some(name) = line.vms.keys().find(|name| !self.vms.contains_key(*name)) {
            return Err(format!("there is no line about the VM {name:?} before it"));
        }
        self.others.push((at, Pages::from_bytes_floor(line.others_bytes)));
        for name in self.vms.keys() {
            let [footprint, hot] = line.vms.get(name).copied().unwrap_or_default().map(Pages::from_bytes_floor);
            self.loads.entry(name.clone()).or_default().push(Point { at, footprint, hot });
        }
        self.now = Some(at);
        Ok(())
    }

    fn setup(mut self) -> Option<(Setup, Duration)> {
        let (host, lasts) = (self.host?, self.now?);
        let limit = |bytes: Option<u64>| bytes.map(|bytes| Limit::Pages(Pages::from_bytes_floor(bytes)));
        let limits = |line: LimitsLine| LimitPatch {
            min: limit(line.min_bytes),
            low: limit(line.low_bytes),
            high: limit(line.high_bytes),
            max: limit(line.max_bytes),
            swap_max: limit(line.swap_max_bytes),
            store_max: limit(line.store_max_bytes),
            ..LimitPatch::default()
        };
        let mut setup = Setup::new("trace", Pages::from_bytes_floor(host.total_bytes));
        setup.budget = limit(host.budget_bytes).unwrap_or(Limit::Max);
        setup.others = self.others;
        setup.groups =
            self.groups.into_iter().map(|group| Group { path: group.path, limits: limits(group.limits) }).collect();
        let vm = |line: VmLine| {
            let usual = Vm::new(&line.name);
            Vm {
                group: line.group,
                limits: limits(line.limits),
                shares: line.shares.unwrap_or(usual.shares),
                overhead: Pages::from_bytes_floor(line.overhead_bytes),
                kill: line.action == OomAction::Kill,
                preference: line.preference.into(),
                priority: line.priority,
                deadline: line.deadline_ms.map_or(usual.deadline, Duration::from_millis),
                shrinks: line.shrinks_permille.unwrap_or(usual.shrinks),
                wanders: WANDERS,
                driver: line.balloon,
                reports: line.reports,
                load: self.loads.remove(&line.name).unwrap_or_default(),
                ..usual
            }
        };
        setup.vms = self.vms.into_values().map(vm).collect();
        Some((setup, lasts))
    }
}

#[cfg(test)]
mod tests {
    use memcg_core::oom::Preference;

    use super::*;

    const TRACE: &str = r#"
{"host":{"version":1,"total_bytes":4294967296,"budget_bytes":null}}
{"group":{"path":"/gold","limits":{"low_bytes":1073741824}}}
{"vm":{"name":"web","group":"/gold","limits":{"max_bytes":536870912},"priority":10,"action":"kill","preference":"avoid"}}
{"at":{"ms":0,"others_bytes":1048576,"vms":{"web":[314572800,104857600]}}}
{"vm":{"name":"db","shares":200,"balloon":true}}
{"vm":{"name":"web","group":"/gold","limits":{"max_bytes":1073741824},"priority":20}}
{"at":{"ms":1000,"others_bytes":2097152,"vms":{"db":[4096,4096]}}}
"#;

    fn parsed(text: &str) -> Result<(Setup, Duration), String> {
        read(text.as_bytes()).map_err(|error| error.to_string())
    }

    #[test]
    fn a_trace_is_a_host_over_time() {
        let (setup, lasts) = parsed(TRACE).unwrap();
        assert_eq!((setup.memory, setup.budget, lasts), (Pages::from_mib(4096), Limit::Max, Duration::from_secs(1)));
        assert_eq!(setup.others, [(Duration::ZERO, Pages(256)), (Duration::from_secs(1), Pages(512))]);
        assert_eq!(setup.groups[0].limits.low, Some(Limit::Pages(Pages::from_mib(1024))));
        let [db, web] = &setup.vms[..] else { panic!("two VMs: {:?}", setup.vms) };
        assert_eq!((db.group.as_str(), db.shares, db.driver, db.kill), ("/", 200, true, false));
        assert_eq!(db.load, [Point { at: Duration::from_secs(1), footprint: Pages(1), hot: Pages(1) }]);
        // The last line counts, wholly: it says nothing of what is done with it, and that is a pause.
        assert_eq!((web.priority, web.kill, web.preference), (20, false, Preference::None));
        assert_eq!(web.limits.max, Some(Limit::Pages(Pages::from_mib(1024))));
        let footprints: Vec<_> = web.load.iter().map(|point| (point.footprint.0, point.hot.0)).collect();
        assert_eq!(footprints, [(76_800, 25_600), (0, 0)], "a VM that is not named uses nothing");
    }

    #[test]
    fn a_line_that_makes_no_sense_is_named_with_its_number() {
        let host = r#"{"host":{"version":1,"total_bytes":1,"budget_bytes":null}}"#;
        let at = |ms: u64, vms: &str| format!(r#"{{"at":{{"ms":{ms},"others_bytes":0,"vms":{{{vms}}}}}}}"#);
        for (text, expected) in [
            (String::new(), "no moment"),
            (host.to_owned(), "no moment"),
            (at(0, ""), "line 1: comes before the host"),
            (host.replace(":1,\"total", ":2,\"total"), "line 1: is of version 2"),
            (format!("{host}\n{}", at(0, r#""web":[1,1]"#)), "line 2: there is no line about the VM \"web\""),
            (format!("{host}\n{}\n{}", at(5, ""), at(5, "")), "line 3: 5 ms is not after"),
            (format!("{host}\nnonsense"), "line 2: expected"),
            (format!("{host}\n{}\nnonsense\n", at(5, "")), "line 3: expected"),
            (format!("{host}\n{}", at(u64::MAX, "")), "line 2: 18446744073709551615 ms is more than a year"),
            (format!("{host}\n{{\"vm\":{{\"name\":\"a\",\"colour\":\"red\"}}}}"), "line 2: unknown field `colour`"),
        ] {
            let error = parsed(&text).expect_err(&text);
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    #[test]
    fn a_trace_that_was_cut_off_in_a_line_is_played_as_far_as_it_goes() {
        let whole = parsed(TRACE).unwrap();
        let cut = |by: usize| {
            parsed(&format!("{TRACE}{}", &TRACE.trim_end().lines().last().unwrap().replace("1000", "2000")[..by]))
        };
        assert_eq!(cut(40).unwrap(), whole);
        assert_eq!(cut(0).unwrap(), whole);
    }

    #[test]
    fn a_trace_whose_numbers_are_absurd_is_played_without_harm() {
        let most = u64::MAX;
        let text = format!(
            "{{\"host\":{{\"version\":1,\"total_bytes\":{most},\"budget_bytes\":{most}}}}}\n\
             {{\"vm\":{{\"name\":\"a\",\"limits\":{{\"max_bytes\":{most},\"swap_max_bytes\":{most},\"store_max_bytes\":{most}}},\
             \"overhead_bytes\":{most},\"shares\":0,\"shrinks_permille\":4000000000,\"deadline_ms\":{most}}}}}\n\
             {{\"at\":{{\"ms\":0,\"others_bytes\":{most},\"vms\":{{\"a\":[{most},{most}]}}}}}}\n\
             {{\"at\":{{\"ms\":5000,\"others_bytes\":0,\"vms\":{{\"a\":[{most},0]}}}}}}\n"
        );
        let (setup, lasts) = parsed(&text).unwrap();
        let host = memcg_core::sim::Host::new(setup).unwrap();
        assert_eq!(host.run(lasts, lasts).vms.len(), 1);
    }
}

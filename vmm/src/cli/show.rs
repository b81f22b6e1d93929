//! `ballast show`: one VM for people.

use std::fmt::Write;

use hyper::Method;
use memcg_core::units::{Pages, human};
use serde_json::Value;

use super::options::name;
use super::{Failure, SocketArg, client, output, socket};
use crate::controller::view::{
    BalloonProgress, ColdView, OverheadView, PausedBy, PressureLine, ReclaimRung, VmState, VmView,
};

/// Shows a VM.
pub async fn show(vm: &str, json: bool, arg: &SocketArg) -> Result<u8, Failure> {
    let vm = name(vm).map_err(Failure::usage)?;
    let socket = socket::to_reach(arg, &vm)?;
    let (_, body) = client::request(&socket, Method::GET, &format!("/vms/{vm}"), String::new()).await?;
    let text = if json {
        let value: Value = client::decode(&body)?;
        format!("{value:#}\n")
    } else {
        table(&client::decode(&body)?)
    };
    output::print(text)
}

/// A JSON value without quotes.
pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// A limit for people.
pub fn limit(bytes: Option<u64>) -> String {
    bytes.map_or("max".to_owned(), human)
}

/// The state in words.
pub fn state(vm: &VmView) -> &'static str {
    match vm.state {
        VmState::Starting => "starting",
        VmState::Running if vm.held.now => "held",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Ended => "ended",
    }
}

/// Usage as a share of the limit, where there is one.
pub fn share(vm: &VmView) -> Option<f64> {
    let max = vm.memory.max_bytes.filter(|max| *max > 0 && vm.accounting && vm.state != VmState::Ended)?;
    Some(vm.memory.current_bytes as f64 / max as f64)
}

/// A time that has passed, in its largest unit.
pub fn age(ms: u64) -> String {
    match ms / 1000 {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7_200 => format!("{}m", seconds / 60),
        seconds @ 7_200..172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

/// Lines of columns as wide as what is in them. The first `words` begin where their column does, numbers end there.
pub fn columns<const N: usize>(rows: &[[String; N]], words: usize) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or_default();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, text) in row.iter().enumerate() {
            let width = width(column);
            // Writing to a string cannot fail.
            let _ = if column < words { write!(line, "{text:width$}  ") } else { write!(line, "{text:>width$}  ") };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// What is charged beside the pages, next to what was measured.
fn overhead(overhead: &OverheadView) -> String {
    let measured = |bytes: Option<u64>| bytes.map_or("not measured".to_owned(), human);
    let (charged, found) = (&overhead.accounted, overhead.measured);
    format!(
        " user {} (measured {}), kernel {} (measured {})",
        human(charged.user_bytes),
        measured(found.map(|found| found.user_bytes)),
        human(charged.kernel_bytes),
        measured(found.and_then(|found| found.kernel_bytes))
    )
}

/// Generations until the first sample says something: one without, two in which it is watched.
const SAMPLED: u16 = 3;

/// So many generations in whole seconds.
fn seconds(cold: &ColdView, generations: u16) -> u64 {
    u64::from(generations) * u64::from(cold.generation_ms) / 1000
}

/// Resident memory that may be unused for so many generations, two at least. What was not *seen* in use that long may have
/// been all the same, because nobody has looked; but not more than what the working set leaves.
fn unused(cold: &ColdView, generations: u16) -> u64 {
    let older = |than: u16| cold.ages.iter().filter(|age| age.generations >= than).map(|age| age.resident_bytes).sum();
    let unseen: u64 = older(generations);
    let used = cold.working_set_bytes.unwrap_or(0).saturating_sub(cold.working_set_error_bytes.unwrap_or(0));
    let resident: u64 = older(0);
    unseen.min(resident.saturating_sub(used))
}

/// What is known of its cold pages, and what was evicted of them; nothing as long as nothing is.
fn cold(cold: &ColdView) -> Option<String> {
    if cold.generation_ms == 0 && cold.evicted_bytes == 0 {
        return None;
    }
    let mut text = match (cold.working_set_bytes, cold.working_set_error_bytes) {
        (Some(set), Some(error)) => format!(" working set {} ± {}", human(set), human(error)),
        _ if cold.generation_ms == 0 => " working set not known: nothing is aged".to_owned(),
        _ => format!(" working set not known before it has run for {} s", seconds(cold, SAMPLED)),
    };
    if cold.generation_ms > 0 {
        let unused = |than| format!("{} for {} s", human(unused(cold, than)), seconds(cold, than));
        let _ = write!(text, "; unused at most {}", [4, 16, 64].map(unused).join(", "));
    }
    if cold.evicted_bytes > 0 {
        let (evicted, again) = (human(cold.evicted_bytes), human(cold.refaulted_bytes));
        let _ = write!(text, "; {evicted} evicted so far, {again} of it touched again");
    }
    if cold.file_bytes > 0 {
        let _ = write!(text, "; {} in its file", human(cold.file_bytes));
    }
    Some(text)
}

/// The table.
fn table(vm: &VmView) -> String {
    let mut out = String::new();
    let state = match vm.paused_by {
        Some(PausedBy::Policy) if vm.state == VmState::Paused => {
            "paused by its policy (it goes on when memory.max of it or its groups is raised)"
        }
        Some(PausedBy::Host) if vm.state == VmState::Paused => {
            "paused because the host ran short of memory (it goes on when there is room for what was evicted)"
        }
        Some(PausedBy::Group) if vm.state == VmState::Paused => {
            "paused because its group ran short of memory (it goes on when there is room for what was evicted)"
        }
        Some(PausedBy::User) if vm.state == VmState::Paused => "paused on request (resume lets it go on)",
        _ => state(vm),
    };
    let mut line = |label: &str, text: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{label:10}{text}");
    };
    let stale = if vm.stale { ", the worker does not answer: last known numbers" } else { "" };
    let plural = if vm.cpus == 1 { "" } else { "s" };
    line(
        &vm.name,
        format!(
            " {state}{}, in {}, pid {}, {} old, {} vCPU{plural}, {} of RAM{stale}",
            vm.end.as_ref().map_or(String::new(), |end| format!(" ({end})")),
            vm.group,
            vm.pid,
            age(vm.age_ms),
            vm.cpus,
            human(vm.size_bytes)
        ),
    );
    if let Some(bytes) = vm.resume_bytes {
        let kept = if vm.kept_paused { ", and somebody has to ask for it: it is paused on request, too" } else { "" };
        let ahead: Vec<_> = vm.waits_for.iter().map(|ahead| format!("{} ({})", ahead.vm, human(ahead.bytes))).collect();
        let behind = if ahead.is_empty() { String::new() } else { format!(", after {}", ahead.join(", ")) };
        let missing = vm.resume_missing_bytes.filter(|missing| *missing > 0);
        let missing = missing.map_or(String::new(), |missing| format!(", {} are missing", human(missing)));
        line("  resume", format!(" {} have to be free for it to go on{missing}{behind}{kept}", human(bytes)));
    }
    if !vm.accounting {
        line("  memory", " not tracked: no limit was ever set, and track is off".to_owned());
        return out;
    }
    let memory = &vm.memory;
    let mut used =
        format!(" {} of {}, peak {}", human(memory.current_bytes), limit(memory.max_bytes), human(memory.peak_bytes));
    if let Some(pending) = memory.max_pending_bytes {
        used.push_str(&format!(", going to {}", human(pending)));
    }
    if memory.stat.overcharge_bytes > 0 {
        used.push_str(&format!(", {} above the limit", human(memory.stat.overcharge_bytes)));
    }
    line("  memory", used);
    let stat = &memory.stat;
    line(
        "",
        format!(
            " guest {}, stock {}, reserve {}, vmm {}, ballooned {}",
            human(stat.guest_bytes),
            human(stat.stock_bytes),
            human(stat.reserve_bytes),
            human(stat.vmm_bytes),
            human(stat.ballooned_bytes)
        ),
    );
    let moved = [stat.idle_bytes, stat.store_bytes, stat.swapped_bytes];
    if moved.iter().any(|bytes| *bytes > 0) {
        let [idle, store, swapped] = moved.map(human);
        line("", format!(" idle {idle} of guest, store {store} for {swapped} in swap"));
    }
    if vm.reclaim.rung != ReclaimRung::Rest {
        let goal = vm.reclaim.goal_bytes.unwrap_or_default();
        let text = match &vm.reclaim.stuck {
            _ if vm.is_emptied() && vm.stale => " to be emptied: its worker does not answer".to_owned(),
            _ if vm.is_emptied() && vm.reclaim.stuck.is_some() => " emptied: it has given what could be had".to_owned(),
            _ if vm.is_emptied() => format!(" {}, until nothing is left", vm.reclaim.rung.doing()),
            Some(why) => format!(" stuck above {}: {why}", human(goal)),
            None => format!(" {}, down to {}", vm.reclaim.rung.doing(), human(goal)),
        };
        line("  reclaim", text);
    }
    line("  overhead", overhead(&vm.overhead));
    line(
        "  limits",
        format!(
            " min {}, low {}, high {}, max {}, swap {}, store {}, vmm {}, shares {}, generation {}",
            limit(memory.min_bytes),
            limit(memory.low_bytes),
            limit(memory.high_bytes),
            limit(memory.max_bytes),
            limit(vm.swap.max_bytes),
            match (memory.store_max_bytes, memory.max_bytes) {
                (None, Some(_)) => "max (half of max)".to_owned(),
                (set, _) => limit(set),
            },
            limit(vm.vmm.max_bytes),
            memory.shares,
            vm.generation
        ),
    );
    let events = &memory.events;
    line(
        "  events",
        format!(" high {}, max {}, failcnt {}, oom {}", events.high, events.max, events.failcnt, events.oom),
    );
    if let Some(cold) = cold(&vm.cold) {
        line("  cold", cold);
    }
    let answer = match vm.balloon.progress {
        None => ", the guest has no driver running",
        Some(BalloonProgress::Cooperating) => "",
        Some(BalloonProgress::Slow) => ", the guest gives slowly",
        Some(BalloonProgress::Stalled) => ", the guest gives nothing",
    };
    line(
        "  balloon",
        format!(" target {}, actual {}{answer}", human(vm.balloon.target_bytes), human(vm.balloon.actual_bytes)),
    );
    let faults = &vm.faults;
    let pages = [faults.reported_pages, faults.reported_back_pages, faults.reported_left_pages];
    if pages.iter().any(|pages| *pages > 0) {
        let [taken, back, left] = pages.map(|pages| human(Pages(pages).bytes()));
        line("  reports", format!(" {taken} taken, {back} of it touched again at once, {left} left alone"));
    }
    if let Some(guest) = &vm.guest_stats {
        let size = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), human);
        line(
            "  guest",
            format!(
                " available {}, free {}, caches {}, said {:.1} s ago",
                size(guest.available_memory),
                size(guest.free_memory),
                size(guest.disk_caches),
                guest.age_ms as f64 / 1e3
            ),
        );
    }
    let mut held = format!(" {:.1} ms in all", vm.held.total_us as f64 / 1e3);
    if let Some(path) = &vm.held.limit_of {
        let whose = if vm.is_at(path) { "its own limit".to_owned() } else { format!("the limit of {path}") };
        held.push_str(&format!(", now at {whose}"));
    }
    if let Some(ahead) = vm.waits_for.first().filter(|_| vm.held.now) {
        held.push_str(&format!(", {} of {} are on their way", human(ahead.bytes), ahead.vm));
    }
    if let Some(deadline) = vm.held.deadline_ms {
        held.push_str(&format!(", the policy acts in {:.1} s", deadline as f64 / 1e3));
    }
    line("  held", held);
    let share = |line: &PressureLine| format!("{:.2} {:.2} {:.2}", line.avg10, line.avg60, line.avg300);
    let pressure = &vm.pressure;
    line("  pressure", format!(" some {}, full {} % of 10, 60, 300 s", share(&pressure.some), share(&pressure.full)));
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::view::AgeView;
    use crate::controller::view::example::vm;

    const MIB: u64 = 1 << 20;

    #[test]
    fn what_is_asked_of_an_emptied_vm_and_whose_limit_it_is_are_said_as_they_are() {
        let mut web = vm("web", "/gold", 3);
        web.accounting = true;
        (web.state, web.paused_by) = (VmState::Paused, Some(PausedBy::Group));
        web.reclaim.rung = ReclaimRung::Evict;
        assert!(table(&web).contains("reclaim  evicting cold pages, until nothing is left\n"));
        (web.reclaim.rung, web.reclaim.stuck) = (ReclaimRung::Stuck, Some("ask for a higher limit".to_owned()));
        assert!(table(&web).contains("reclaim  emptied: it has given what could be had\n"));
        web.held.now = true;
        for (path, whose) in
            [("/gold/web", "at its own limit"), ("/gold", "at the limit of /gold"), ("/web", "of /web")]
        {
            web.held.limit_of = Some(path.to_owned());
            assert!(table(&web).contains(whose), "{}", table(&web));
        }
    }

    /// Of 160 MiB, 40 were seen in use of late; the rest nobody has looked at for 100 generations.
    fn aged() -> ColdView {
        let age = |generations, mib: u64| AgeView { generations, resident_bytes: mib * MIB, refaulted_bytes: 0 };
        let ages = [(0, 30), (1, 10), (2, 0), (4, 0), (8, 0), (16, 0), (32, 0), (64, 120)];
        ColdView { generation_ms: 30_000, ages: ages.map(|(from, mib)| age(from, mib)), ..ColdView::default() }
    }

    #[test]
    fn what_nobody_has_looked_at_is_not_called_unused_when_the_working_set_says_otherwise() {
        let sampled =
            ColdView { working_set_bytes: Some(100 * MIB), working_set_error_bytes: Some(10 * MIB), ..aged() };
        let text = cold(&sampled).expect("aged");
        assert_eq!(text, " working set 100M ± 10M; unused at most 70M for 120 s, 70M for 480 s, 70M for 1920 s");
        let thrashing = ColdView { working_set_bytes: Some(200 * MIB), working_set_error_bytes: Some(MIB), ..aged() };
        assert!(cold(&thrashing).expect("aged").contains("unused at most 0 for 120 s, 0 for 480 s"));
    }

    #[test]
    fn why_a_working_set_is_not_known_is_said() {
        let text = cold(&aged()).expect("aged");
        assert!(
            text.starts_with(" working set not known before it has run for 90 s; unused at most 120M for"),
            "{text}"
        );
        let off = ColdView { evicted_bytes: 8 * MIB, ..ColdView::default() };
        let text = cold(&off).expect("evicted");
        assert!(text.starts_with(" working set not known: nothing is aged; 8M evicted so far"), "{text}");
        assert_eq!(cold(&ColdView::default()), None);
    }
}

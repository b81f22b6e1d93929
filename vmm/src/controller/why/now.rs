//! How a VM's memory is now, and what would help.

use super::super::grants::GO_ON;
use super::super::view::{BalloonProgress, GroupView, PausedBy, ReclaimRung, VmState, VmView};
use super::{Facts, Limited, lasting, size};
use memcg_core::units::{Pages, exact};

/// A mebibyte.
const MIB: u64 = 1 << 20;

/// Part of its time that a VM waits for memory, in per cent, from which that is worth a word.
const PRESSED: f64 = 0.5;

/// Sentences about now, and what would help.
pub fn sentences(facts: &Facts) -> Vec<String> {
    let Some(vm) = &facts.vm else {
        return vec!["it is not there any more: it was removed".to_owned()];
    };
    let mut now = vec![state(vm, facts)];
    if vm.state == VmState::Ended {
        let left = vm.memory.current_bytes;
        let returning = if left > 0 {
            format!("{} of its memory are on their way back", size(left))
        } else {
            "all of its memory is back".to_owned()
        };
        now.push(format!("{returning}; it used {} at most", size(vm.memory.peak_bytes)));
    } else if vm.accounting {
        now.push(usage(vm));
        now.push(limits(vm, facts));
        now.extend(asked(vm, facts));
        now.push(guest(vm));
        now.extend(waited(vm));
    }
    now.push(help(vm, facts));
    now
}

/// What it is doing.
fn state(vm: &VmView, facts: &Facts) -> String {
    let what = match (vm.state, vm.paused_by) {
        (VmState::Starting, _) => "it is starting".to_owned(),
        (VmState::Running, _) if vm.held.now => held(vm, facts),
        (VmState::Running, _) => "it runs".to_owned(),
        (VmState::Paused, Some(PausedBy::User)) => "it is paused, because somebody wanted that".to_owned(),
        (VmState::Paused, Some(PausedBy::Policy)) => {
            "it is paused by the policy, until there is memory for it".to_owned()
        }
        (VmState::Paused, Some(PausedBy::Host)) => {
            format!("it is paused for the others, until there is room for {}", back(vm))
        }
        (VmState::Paused, Some(PausedBy::Group)) => {
            format!("it is paused for the others of its group, until there is room for {}", back(vm))
        }
        (VmState::Paused, None) => "it is paused".to_owned(),
        (VmState::Ended, _) => format!("it has ended: {}", vm.end.as_deref().unwrap_or("nobody knows how")),
    };
    let ahead: Vec<_> = vm.waits_for.iter().map(|ahead| format!("{} ({})", ahead.vm, size(ahead.bytes))).collect();
    let behind = match (ahead.as_slice(), vm.state) {
        ([], _) => String::new(),
        ([first], VmState::Paused) => format!("; {first} goes on before it"),
        (_, VmState::Paused) => format!("; {} go on before it", ahead.join(", then ")),
        _ => format!("; memory of {} is on its way", ahead.join(", ")),
    };
    let kept = if vm.kept_paused { "; somebody wants it paused as well" } else { "" };
    let stale = if vm.stale { "; its worker does not answer, so these are the last known numbers" } else { "" };
    format!("{what}{behind}{kept}{stale}")
}

/// What there has to be room for before it goes on.
fn back(vm: &VmView) -> String {
    vm.resume_bytes.map_or("what was evicted of it".to_owned(), |bytes| format!("the {} that it needs", size(bytes)))
}

/// That its vCPUs are stopped, and whose limit it is.
fn held(vm: &VmView, facts: &Facts) -> String {
    let at = vm.held.limit_of.as_deref().map_or("a limit".to_owned(), |path| Limited::of(path, facts).to_string());
    let until = vm.held.deadline_ms.map_or(String::new(), |ms| format!("; the policy acts in {}", lasting(ms)));
    format!("it is held: its vCPUs wait for memory, and {at} leaves no room{until}")
}

/// What it uses, and for what.
fn usage(vm: &VmView) -> String {
    let (memory, stat) = (&vm.memory, &vm.memory.stat);
    let working_set = match vm.cold.working_set_bytes {
        Some(set) => format!(" (about {} in use of late, {} set aside)", size(set), size(stat.idle_bytes)),
        None => String::new(),
    };
    let mut parts = vec![format!("{} of its guest{working_set}", size(stat.guest_bytes))];
    if stat.swapped_bytes > 0 {
        parts.push(format!("{} of store for {} that are evicted", size(stat.store_bytes), size(stat.swapped_bytes)));
    }
    parts.push(format!("{} of overhead", size(stat.vmm_bytes)));
    let ahead = stat.stock_bytes + stat.reserve_bytes;
    if ahead > 0 {
        parts.push(format!("{} ahead of need", size(ahead)));
    }
    let peak = size(memory.peak_bytes);
    format!("it uses {}, {peak} at most so far: {}", size(memory.current_bytes), parts.join(", "))
}

/// The limits of it and of its groups: usage, limit, and whose it is.
fn levels<'f>(vm: &VmView, facts: &'f Facts) -> impl Iterator<Item = (u64, u64, Limited<'f>)> {
    let own = vm.memory.max_bytes.map(|max| (vm.memory.current_bytes, max, Limited::Own));
    let above = facts.groups.iter().filter_map(|group: &GroupView| {
        Some((group.memory.current_bytes, group.memory.max_bytes?, Limited::Group(group.path.as_str())))
    });
    own.into_iter().chain(above)
}

/// What leaves how much room: usage, limit, and whose it is.
fn room<'f>(vm: &VmView, facts: &'f Facts) -> Option<(u64, u64, u64, Limited<'f>)> {
    let rooms = levels(vm, facts).map(|(used, max, whose)| (max.saturating_sub(used), used, max, whose));
    rooms.min_by_key(|(left, ..)| *left)
}

/// What it is limited by.
fn limits(vm: &VmView, facts: &Facts) -> String {
    let own = vm.memory.max_bytes.map(size);
    let mut text = match room(vm, facts) {
        None => "no limit is set, neither of it nor of its groups".to_owned(),
        Some((left, _, max, Limited::Own)) => {
            format!("its own memory.max is the nearest limit: {} leave {}", size(max), size(left))
        }
        Some((left, used, max, nearest)) => {
            let own = own.map_or("it has none of its own".to_owned(), |own| format!("its own is {own}"));
            format!(
                "{nearest} is the nearest limit: {} of {} in use leave {}; {own}",
                size(used),
                size(max),
                size(left)
            )
        }
    };
    if let Some(high) = vm.memory.high_bytes {
        text.push_str(&format!("; memory is taken back above its memory.high of {}", size(high)));
    }
    if let Some(pending) = vm.memory.max_pending_bytes {
        text.push_str(&format!("; its memory.max is going to {}", size(pending)));
    }
    text
}

/// What is being done about its usage, or that of its groups.
fn asked(vm: &VmView, facts: &Facts) -> Option<String> {
    let groups = facts.groups.iter().map(|group| (group.path.as_str(), &group.reclaim));
    let busy = |(_, reclaim): &(&str, &super::super::view::ReclaimView)| reclaim.rung != ReclaimRung::Rest;
    if vm.is_emptied() {
        if vm.stale {
            return Some("it is to give all that it has, and its worker does not answer".to_owned());
        }
        let rung = vm.reclaim.rung;
        return Some(match rung >= ReclaimRung::Stuck || rung == ReclaimRung::Rest {
            true => "it has given what could be had of it".to_owned(),
            false => format!("it is to give all that it has: {}", rung.doing()),
        });
    }
    let (who, reclaim) = std::iter::once(("it", &vm.reclaim)).chain(groups).find(busy)?;
    let goal = reclaim.goal_bytes.map_or(String::new(), |goal| format!(" to {}", size(goal)));
    // What has just begun anew is under way for longer than that.
    let since = reclaim.since_ms.filter(|ms| *ms >= 1000).map_or(String::new(), |ms| format!(" for {}", lasting(ms)));
    let doing = reclaim.stuck.as_deref().unwrap_or_else(|| reclaim.rung.doing());
    Some(format!("{who} is to come down{goal}{since}: {doing}"))
}

/// Whether its guest helps.
fn guest(vm: &VmView) -> String {
    let balloon = &vm.balloon;
    let (target, actual) = (size(balloon.target_bytes), size(balloon.actual_bytes));
    match balloon.progress {
        None if vm.swap.max_bytes == Some(0) => {
            "its guest runs no balloon driver, and nothing of it is evicted (swap.max is 0): it gives nothing back"
                .to_owned()
        }
        None => "its guest runs no balloon driver: what has to come back is evicted".to_owned(),
        Some(_) if balloon.target_bytes == 0 && balloon.actual_bytes == 0 => {
            "its guest is asked for nothing".to_owned()
        }
        Some(BalloonProgress::Cooperating) => {
            format!("its guest cooperates: it has given {actual}, {target} are asked for")
        }
        Some(BalloonProgress::Slow) => format!("its guest gives slowly: {actual} of the {target} that are asked for"),
        Some(BalloonProgress::Stalled) => {
            format!("its guest does not cooperate: it has given {actual} of the {target} that are asked for")
        }
    }
}

/// How long it has waited for memory.
fn waited(vm: &VmView) -> Option<String> {
    let held = vm.held.total_us / 1000;
    let pressed = vm.pressure.some.avg60;
    let held = (held > 0).then(|| format!("it was held for {} in all", lasting(held)));
    let pressed =
        (pressed >= PRESSED).then(|| format!("its vCPUs waited for memory for {pressed:.0} % of the last minute"));
    let both: Vec<_> = held.into_iter().chain(pressed).collect();
    (!both.is_empty()).then(|| both.join("; "))
}

/// What it needs beside what it has: to go on, where it was paused for want of memory, with those who go on before it; else
/// what it owes, or used of late and has not.
fn needs(vm: &VmView) -> u64 {
    if let Some(bytes) = vm.resume_bytes {
        return bytes + Pages(GO_ON).bytes() + vm.waits_for.iter().map(|ahead| ahead.bytes).sum::<u64>();
    }
    let used_of_late = vm.cold.working_set_bytes.map(|set| set + vm.cold.working_set_error_bytes.unwrap_or(0));
    let outside = used_of_late.map_or(0, |set| set.saturating_sub(vm.memory.stat.guest_bytes));
    outside.max(vm.memory.stat.debt_bytes)
}

/// The limits that leave less than it needs and a quarter more.
fn narrow<'f>(vm: &VmView, facts: &'f Facts) -> Vec<(u64, u64, Limited<'f>)> {
    let needs = with_quarter(needs(vm));
    levels(vm, facts).filter(|(used, max, _)| max.saturating_sub(*used) < needs).collect()
}

/// The words that raise each limit that is too narrow, or else the nearest one by a quarter.
fn raise(vm: &VmView, facts: &Facts) -> Option<String> {
    let (_, used, max, nearest) = room(vm, facts)?;
    let mut narrow = narrow(vm, facts);
    if narrow.is_empty() {
        narrow.push((used, max, nearest));
    }
    let words = narrow.into_iter().map(|(used, max, whose)| {
        // Where it is known what is missing, that is enough. Who was paused at its own limit would be soon again.
        let known = vm.resume_bytes.is_some() && vm.paused_by != Some(PausedBy::Policy);
        let least = if known { max } else { with_quarter(max.max(used)) };
        let more = typed(least.max(used.saturating_add(with_quarter(needs(vm)))));
        match whose {
            Limited::Own => format!("`ballast set {} memory.max={more}`", facts.name),
            Limited::Group(path) => format!("`ballast group set {path} memory.max={more}`"),
        }
    });
    Some(words.collect::<Vec<_>>().join(" with "))
}

/// A quarter more.
fn with_quarter(bytes: u64) -> u64 {
    bytes.saturating_add(bytes.div_ceil(4))
}

/// At least so much, to be typed in: no rounding makes it less.
fn typed(bytes: u64) -> String {
    exact(bytes.div_ceil(MIB).saturating_mul(MIB))
}

/// What would help, with the words to type.
fn help(vm: &VmView, facts: &Facts) -> String {
    let name = &facts.name;
    let raised = || raise(vm, facts).map_or("more memory helps".to_owned(), |raise| format!("{raise} gives it more"));
    match (vm.state, vm.paused_by) {
        (VmState::Ended, _) => format!("`ballast start {name}` runs it again"),
        (VmState::Starting, _) => "nothing needs to be done".to_owned(),
        (VmState::Paused, _) if vm.kept_paused => {
            let resume = format!("`ballast resume {name}` lets it go on as soon as there is room");
            let lacks = vm.resume_missing_bytes.is_some_and(|missing| missing > 0) && !narrow(vm, facts).is_empty();
            raise(vm, facts)
                .filter(|_| lacks)
                .map_or(resume.clone(), |raise| format!("{raise} gives it more; {resume}"))
        }
        (VmState::Paused, Some(PausedBy::Policy | PausedBy::Host | PausedBy::Group)) => go_on(vm, facts),
        (VmState::Paused, _) => format!("`ballast resume {name}` lets it go on"),
        (VmState::Running, _) if !vm.accounting => {
            format!("what it uses is not known, as it has no limit: `ballast set {name} track=on` counts it")
        }
        (VmState::Running, _) if vm.held.now => {
            let (_, group) = room(vm, facts).map_or((0, None), |(left, .., nearest)| match nearest {
                Limited::Group(path) => (left, Some(path)),
                Limited::Own => (left, None),
            });
            let others =
                group.map_or(String::new(), |path| format!("; `ballast oom rank {path}` shows who uses how much"));
            format!("{}{others}", raised())
        }
        (VmState::Running, _) if is_tight(vm) => format!("what it uses of late does not fit: {}", raised()),
        (VmState::Running, _) => "nothing needs to be done".to_owned(),
    }
}

/// Whether what it uses of late is more than it may have, or it waits for memory.
fn is_tight(vm: &VmView) -> bool {
    let needs = vm.cold.working_set_bytes.map(|set| set + vm.memory.stat.vmm_bytes);
    let too_much = vm.memory.max_bytes.zip(needs).is_some_and(|(max, needs)| needs > max);
    too_much || vm.pressure.some.avg60 >= 5.0
}

/// What lets a VM go on that was paused for want of memory.
fn go_on(vm: &VmView, facts: &Facts) -> String {
    if vm.resume_missing_bytes == Some(0) {
        return match vm.waits_for.as_slice() {
            [] => "there is room for it: it goes on by itself in a moment".to_owned(),
            _ => format!(
                "there is room for it, but not for who comes first: `ballast resume {}` lets it go on now",
                vm.name
            ),
        };
    }
    let by_host = vm.paused_by == Some(PausedBy::Host);
    let is_short = by_host || facts.shortage.as_ref().is_some_and(|host| host.short.is_some());
    let raised = match raise(vm, facts).filter(|_| !is_short || !narrow(vm, facts).is_empty()) {
        Some(raise) => Some(format!("{raise} gives it more, and it goes on by itself")),
        None if is_short => None,
        None => Some("it goes on by itself when there is more memory".to_owned()),
    };
    let host = is_short.then(|| host(vm, facts));
    raised.into_iter().chain(host).collect::<Vec<_>>().join("; ")
}

/// What a VM waits for where the host has too little.
fn host(vm: &VmView, facts: &Facts) -> String {
    let lacks =
        vm.resume_missing_bytes.map_or(String::new(), |missing| format!(", of which {} are missing", size(missing)));
    let missing = facts.shortage.as_ref().map(|host| match host.short {
        Some(_) => format!("the host is short of memory ({} available)", size(host.available_bytes)),
        None => format!("the host has {} available", size(host.available_bytes)),
    });
    let missing = missing.unwrap_or_else(|| "nobody watches the host".to_owned());
    format!("it goes on by itself when there is room{lacks}: {missing}; `ballast oom rank` shows who uses how much")
}

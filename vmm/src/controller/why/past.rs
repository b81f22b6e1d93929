//! What happened to a VM's memory: a sentence for each event that says something, and for each decision.
//!
//! What comes again and again (usage above `high`, cold pages that are evicted) is one sentence, with how often, until
//! something else happens that matters. What is too much then is left out from the beginning, and that is said.

use serde_json::Value;

use super::super::events::{Event, EventKind};
use super::super::oom_log::{DecisionView, Outcome, Reason};
use super::super::rank::RankedView;
use super::super::view::{GroupView, OomAction, ReclaimRung};
use super::{Facts, Limited, Sentence, ago, lasting, size};

/// Names that a sentence lists, at most.
const NAMES: usize = 3;

/// The events of one VM, of the groups that it is in, and of the host: from where it was made, or else from the first.
pub fn of_vm(all: &[Event], name: &str, groups: &[GroupView]) -> Vec<Event> {
    let is_its = |event: &Event| event.vm.as_deref() == Some(name);
    let made = all.iter().rposition(|event| event.event == EventKind::Created && is_its(event)).unwrap_or(0);
    let moved = all.iter().rposition(|event| event.event == EventKind::Moved && is_its(event)).unwrap_or(made);
    let above = |event: &Event| groups.iter().any(|group| event.group.as_ref() == Some(&group.path));
    let told = |(at, event): &(usize, &Event)| {
        let of_host = event.vm.is_none() && event.group.is_none();
        *at >= made && (is_its(event) || of_host || *at >= moved && above(event))
    };
    // What nobody can remember from before it was made is not missing.
    let missing = |event: &Event| event.event == EventKind::Dropped && made > 0;
    let events = all.iter().enumerate().filter(told).map(|(_, event)| event);
    events.filter(|event| !missing(event)).cloned().collect()
}

/// A sentence in the making.
struct Told {
    time_ms: u64,
    text: String,
    /// What comes again and again, and how often it came until when.
    again: Option<(EventKind, Option<String>)>,
    times: u32,
    last_ms: u64,
}

/// At most `most` sentences, the oldest first.
pub fn sentences(facts: &Facts, most: usize) -> Vec<Sentence> {
    let mut told: Vec<Told> = Vec::new();
    // By their numbers: the host's clock may have been set.
    let decisions = facts.decisions.iter().enumerate();
    let mut order: Vec<_> = decisions.map(|(at, decision)| (decision.event, 1, at)).collect();
    order.extend(facts.events.iter().enumerate().map(|(at, event)| (event.seq, 0, at)));
    order.sort_unstable();
    for (_, of, at) in order {
        let (time_ms, text, again) = if of == 1 {
            let decision = &facts.decisions[at];
            (decision.time_ms, Some(decided(decision, facts)), None)
        } else {
            let event = &facts.events[at];
            if is_told(event, facts) {
                continue;
            }
            let again = is_routine(event.event).then(|| (event.event, event.group.clone()));
            (event.time_ms, happened(event, facts), again)
        };
        let Some(text) = text else { continue };
        let since = told.iter().rposition(|told| told.again.is_none()).map_or(0, |at| at + 1);
        match told[since..].iter_mut().find(|told| again.is_some() && told.again == again) {
            Some(before) => (before.text, before.times, before.last_ms) = (text, before.times + 1, time_ms),
            None => told.push(Told { time_ms, text, again, times: 1, last_ms: time_ms }),
        }
    }
    let sentence = |told: Told| {
        let last = ago(facts.now_ms.saturating_sub(told.last_ms));
        let text =
            if told.times > 1 { format!("{} ({} times, the last {last})", told.text, told.times) } else { told.text };
        Sentence { time_ms: Some(told.time_ms), text }
    };
    let left_out = if told.len() > most { told.len() + 1 - most } else { 0 };
    let mut rest = told.into_iter().map(sentence);
    let Some(last) = (0..left_out).filter_map(|_| rest.next()).last() else { return rest.collect() };
    let text = format!("{left_out} things before are left out: `ballast events {}` has them", facts.name);
    std::iter::once(Sentence { text, ..last }).chain(rest).collect()
}

/// Whether a decision that is told says it already.
fn is_told(event: &Event, facts: &Facts) -> bool {
    let number = event.details.get("decision").and_then(Value::as_u64);
    let of_decision = number.is_some_and(|number| facts.decisions.iter().any(|decision| decision.number == number));
    let by_policy = ["policy", "group", "host"].contains(&word(event, "by"));
    let chosen = |decision: &DecisionView| decision.vm.as_ref() == Some(&facts.name);
    let paused = event.event == EventKind::Paused && by_policy && facts.decisions.iter().any(chosen);
    of_decision || paused
}

/// Whether something comes again and again where memory is short.
fn is_routine(kind: EventKind) -> bool {
    use EventKind::{
        Evicted, GuestDeflatedOnOom, GuestMisbehaves, HighCrossed, MaxHit, Reclaim, Reclaimed, SwapFailed,
        TargetStalled, Uncooperative,
    };
    matches!(
        kind,
        HighCrossed
            | Reclaim
            | Reclaimed
            | Evicted
            | SwapFailed
            | MaxHit
            | TargetStalled
            | Uncooperative
            | GuestDeflatedOnOom
            | GuestMisbehaves
    )
}

/// A number of an event.
fn number(event: &Event, key: &str) -> Option<u64> {
    event.details.get(key).and_then(Value::as_u64)
}

/// An amount of an event.
fn bytes(event: &Event, key: &str) -> String {
    number(event, key).map_or_else(|| "no limit".to_owned(), size)
}

/// A word of an event.
fn word<'e>(event: &'e Event, key: &str) -> &'e str {
    event.details.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// The sentence of an event; none for those that say nothing of memory.
fn happened(event: &Event, facts: &Facts) -> Option<String> {
    let whose = event.group.as_deref().map_or("its".to_owned(), |group| format!("{group}'s"));
    let who = event.group.as_deref().unwrap_or("it");
    let usage = || bytes(event, "usage_bytes");
    let size_of = |key| bytes(event, key);
    Some(match event.event {
        EventKind::Created if event.group.is_none() => {
            let max = number(event, "max_bytes").map(|max| format!("a memory.max of {}", size(max)));
            format!("it was made, with {}", max.unwrap_or_else(|| "no limit of its own".to_owned()))
        }
        EventKind::Started => "its guest started".to_owned(),
        EventKind::Adopted => format!("a new controller took it over, with {} in use", usage()),
        EventKind::NotAdopted => format!("a new controller could not take it over: {}", word(event, "reason")),
        EventKind::AccountingBegan => format!("what it uses has been charged since then: {} at first", usage()),
        EventKind::LimitRequested => {
            format!(
                "{whose} memory.max was to become {}; {} were in use, which had to come down",
                size_of("max_pending_bytes"),
                usage()
            )
        }
        EventKind::LimitChanged => format!("{whose} limits were changed: {}", limits(event)),
        EventKind::LimitNotReached => {
            format!(
                "the lower memory.max of {who} was given up: usage came down to {}, no further",
                size_of("lowest_bytes")
            )
        }
        EventKind::HighCrossed => format!("{whose} usage rose above memory.high, to {}", usage()),
        EventKind::Reclaim => reclaim(event, who),
        EventKind::Reclaimed
            if ["balloon_bytes", "report_bytes", "evicted_bytes"].map(|key| number(event, key)) == [Some(0); 3] =>
        {
            format!(
                "what {who} was asked for has ended after {}: nothing was given",
                lasting(number(event, "took_ms").unwrap_or(0))
            )
        }
        EventKind::Reclaimed => format!(
            "{who} was where it should be again after {}: {} by the balloon, {} by reports of the guest, {} by eviction",
            lasting(number(event, "took_ms").unwrap_or(0)),
            size_of("balloon_bytes"),
            size_of("report_bytes"),
            size_of("evicted_bytes")
        ),
        EventKind::Evicted => format!(
            "{} of its cold pages were evicted; then {} were in swap, and took {}",
            size_of("evicted_bytes"),
            size_of("swap_bytes"),
            size_of("store_bytes")
        ),
        EventKind::MaxHit => max_hit(event, facts),
        EventKind::TargetStalled => {
            format!("its guest gave nothing of the {} that its balloon was asked for", size_of("missing_bytes"))
        }
        EventKind::Uncooperative => format!(
            "its guest gave nothing again of the {} that its balloon was asked for: it does not cooperate",
            size_of("missing_bytes")
        ),
        EventKind::GuestDeflatedOnOom => {
            format!("its guest was out of memory and took {} back from its balloon", size_of("taken_bytes"))
        }
        EventKind::GuestMisbehaves => "its guest claimed what cannot be; that was refused".to_owned(),
        EventKind::Paused => match word(event, "by") {
            "request" => "somebody paused it".to_owned(),
            "host" => "it was paused because the host ran short of memory".to_owned(),
            "group" => "it was paused because its group had no memory left".to_owned(),
            _ => "its policy paused it, because no memory was left for it".to_owned(),
        },
        EventKind::Resumed => match word(event, "by") {
            "request" => "somebody let it go on".to_owned(),
            _ => "it went on by itself: there was memory for it".to_owned(),
        },
        EventKind::ResumeRefused => {
            let why = event.details.get("why").and_then(Value::as_str).map(str::to_owned);
            let missing = || format!("{} were missing", size_of("missing_bytes"));
            format!("somebody wanted it to go on, and it could not: {}", why.unwrap_or_else(missing))
        }
        EventKind::DecisionPending => {
            let short = match word(event, "reason") {
                "thrash" => thrashed(who),
                _ => format!("{who} had no memory left"),
            };
            format!("{short}, and a {} was asked who is to go", word(event, "asked"))
        }
        EventKind::VictimSelected => match (word(event, "limit_of"), word(event, "reason")) {
            (level, "thrash") => format!("it was chosen: {}", thrashed(level)),
            (_, "host") => "it was chosen: the host had no memory left".to_owned(),
            (level, _) => format!("it was chosen: {} left no room", Limited::of(level, facts)),
        },
        EventKind::Killed => match word(event, "by") {
            "request" => "somebody killed it".to_owned(),
            "stop" => "it was killed: it did not power itself off in time".to_owned(),
            _ => "its end came: the policy had it killed".to_owned(),
        },
        EventKind::Stopped => format!("its guest ended ({})", word(event, "reason").replace('_', " ")),
        EventKind::WorkerDied => format!("it broke: {}", word(event, "reason")),
        EventKind::Removed if event.group.is_none() => "it was removed".to_owned(),
        EventKind::Moved => {
            // A VM's path looks like that of a group.
            let place = |key| match word(event, key).rsplit_once('/') {
                Some(("", _)) if event.group.is_none() => "/",
                Some((group, _)) if event.group.is_none() => group,
                _ => word(event, key),
            };
            format!("{who} was moved from {} to {}", place("from"), place("to"))
        }
        EventKind::PressureEntered => format!(
            "the host ran short of memory ({}{} available): all VMs were asked for some",
            if word(event, "short") == "stalled" { "everybody waited for it, " } else { "" },
            size_of("available_bytes")
        ),
        EventKind::PressureLeft => {
            format!("the host had enough memory again, after {}", lasting(number(event, "lasted_ms").unwrap_or(0)))
        }
        EventKind::HostOutOfMemory => {
            "the host had no memory for a page that it touched; nothing of it was lost".to_owned()
        }
        EventKind::SwapFailed => {
            "its swap file could not be written, as on a full disk: what was to go there stayed in memory".to_owned()
        }
        EventKind::NobodyChosen => format!("{who} had no memory left, and {}", word(event, "why")),
        EventKind::Restarted => "a new controller began: what was before is not known any more".to_owned(),
        EventKind::Dropped => format!("{} events before are not known any more", number(event, "dropped").unwrap_or(0)),
        EventKind::Created | EventKind::Removed => return None,
    })
}

/// The limits that an event names, those that are set.
fn limits(event: &Event) -> String {
    let named = [
        ("min_bytes", "memory.min"),
        ("low_bytes", "memory.low"),
        ("high_bytes", "memory.high"),
        ("max_bytes", "memory.max"),
        ("swap_max_bytes", "swap.max"),
        ("store_max_bytes", "store.max"),
        ("vmm_max_bytes", "vmm.max"),
    ];
    let set = named.iter().filter_map(|(key, name)| {
        let bytes = number(event, key)?;
        // Protection of nothing is none.
        (bytes > 0 || !["min_bytes", "low_bytes"].contains(key)).then(|| format!("{name} {}", size(bytes)))
    });
    let set: Vec<_> = set.collect();
    if set.is_empty() { "none is left".to_owned() } else { set.join(", ") }
}

/// What was done about too much usage.
fn reclaim(event: &Event, who: &str) -> String {
    let rung = event.details.get("rung").and_then(|rung| serde_json::from_value(rung.clone()).ok());
    let doing = rung.map_or("memory was taken back", |rung: ReclaimRung| rung.doing());
    if event.group.is_none() && number(event, "goal_bytes") == Some(0) {
        return format!("all that it has was asked of it: {doing}");
    }
    let (above, goal) = (bytes(event, "above_bytes"), bytes(event, "goal_bytes"));
    format!("{who} used {above} more than the {goal} that it should come down to: {doing}")
}

/// A charge was refused.
fn max_hit(event: &Event, facts: &Facts) -> String {
    let at = match word(event, "limit_of") {
        "" => "its limit".to_owned(),
        path => Limited::of(path, facts).to_string(),
    };
    format!(
        "a touch of memory found no room below {at} ({} in use by it), and its vCPUs had to wait",
        bytes(event, "usage_bytes")
    )
}

/// That the VMs of the group at `path` thrashed.
fn thrashed(path: &str) -> String {
    let whose = if path == "/" { "the host" } else { path };
    format!("the VMs of {whose} thrashed, they only took pages from each other")
}

/// The sentence of a decision.
fn decided(decision: &DecisionView, facts: &Facts) -> String {
    let level = Limited::of(&decision.level, facts);
    let there = match (decision.short, decision.available_bytes) {
        (Some(_), Some(available)) => format!("the host had no memory left ({} available)", size(available)),
        _ if decision.reason == Reason::Thrash => {
            format!("{} ({} in use)", thrashed(&decision.level), size(decision.usage_bytes))
        }
        _ => format!("{level} left no room ({} in use)", size(decision.usage_bytes)),
    };
    let by = format!("the {}", decision.by.word());
    match &decision.vm {
        None => format!("{there}: {}", decision.why),
        Some(vm) if *vm == facts.name => {
            let done = match decision.action {
                Some(OomAction::Kill) => "killed it",
                _ => "paused it",
            };
            let why = if level == Limited::Own { String::new() } else { why_this(decision, &facts.name) };
            format!("{there}: {by} {done}{why}{}", outcome(decision))
        }
        Some(vm) => {
            let done = match decision.action {
                Some(OomAction::Kill) => "killed",
                _ => "paused",
            };
            let place = decision.ranked.iter().find(|entry| entry.vm == facts.name);
            let this = place.map_or_else(String::new, |entry| match entry.spared {
                Some(_) => format!(", which was {}", reason(entry)),
                None => format!(", which came {} in the list ({})", nth(entry.rank), reason(entry)),
            });
            format!("{there}: {by} {done} {vm}, not this one{this}")
        }
    }
}

/// Why it was this one, and why not others.
fn why_this(decision: &DecisionView, name: &str) -> String {
    let Some(chosen) = decision.ranked.iter().find(|entry| entry.vm == name) else { return String::new() };
    let mut why = format!(", {} in the list: {}", nth(chosen.rank), without_name(&decision.why, name));
    let others = decision.ranked.iter().filter(|entry| entry.vm != name);
    if let Some(next) = others.clone().find(|entry| entry.spared.is_none() && entry.rank > chosen.rank) {
        why.push_str(&format!("; after it came {} ({})", next.vm, reason(next)));
    }
    let spared = others.filter(|entry| entry.spared.is_some());
    let spared: Vec<_> = spared.take(NAMES).map(|entry| format!("{} was {}", entry.vm, reason(entry))).collect();
    if !spared.is_empty() {
        why.push_str(&format!("; {}", spared.join("; ")));
    }
    why
}

/// What is said of an entry of the list, without its name.
fn reason(entry: &RankedView) -> &str {
    without_name(&entry.why, &entry.vm)
}

/// A sentence about a VM, without its name in front.
fn without_name<'a>(sentence: &'a str, name: &str) -> &'a str {
    sentence.strip_prefix(name).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(sentence)
}

/// A place in a list.
fn nth(rank: usize) -> String {
    let ending = match (rank % 100, rank % 10) {
        (11..=13, _) => "th",
        (_, 1) => "st",
        (_, 2) => "nd",
        (_, 3) => "rd",
        _ => "th",
    };
    format!("{rank}{ending}")
}

/// What a decision brought; the end of a sentence.
fn outcome(decision: &DecisionView) -> String {
    let (freed, expected) = (size(decision.freed_bytes), size(decision.expected_bytes));
    match (decision.outcome, decision.took_ms) {
        (Outcome::Failed, _) => "; that failed, because its worker did not listen".to_owned(),
        (Outcome::Nothing, _) => "; nothing could be had of it".to_owned(),
        (_, Some(took)) => format!("; {freed} came back within {}", lasting(took)),
        (Outcome::UnderWay | Outcome::Late, None) => format!("; {freed} of {expected} have come back so far"),
        (Outcome::Freed | Outcome::Waits | Outcome::Resumed | Outcome::Nobody, None) => String::new(),
    }
}

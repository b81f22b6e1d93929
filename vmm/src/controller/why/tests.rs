use memcg_core::units::Pages;
use serde_json::{Value, json};

use super::super::oom_log::{DecidedBy, Outcome, Reason};
use super::super::rank::{RankedView, SparedBy};
use super::super::shortage::ShortageSign;
use super::super::view::example::{group, vm};
use super::super::view::{
    AheadView, BalloonProgress, HeldView, OomAction, OomPreference, PausedBy, ReclaimRung, ReclaimView, VmState,
};
use super::*;

const MIB: u64 = 1 << 20;

/// When the stories are told.
const NOW: u64 = 1_000_000_000;

/// An event `ago` seconds before the story is told.
fn event(ago: u64, event: EventKind, details: Value) -> Event {
    let Value::Object(details) = details else { panic!("no object") };
    Event { seq: NOW / 1000 - ago, time_ms: NOW - ago * 1000, event, vm: Some("web".to_owned()), group: None, details }
}

/// The same of a group.
fn of_group(ago: u64, kind: EventKind, details: Value) -> Event {
    Event { vm: None, group: Some("/gold".to_owned()), ..event(ago, kind, details) }
}

/// The same of the host.
fn of_host(ago: u64, kind: EventKind, details: Value) -> Event {
    Event { vm: None, ..event(ago, kind, details) }
}

/// A VM in /gold that uses 180 of its 256 MiB, and what was known of it.
fn facts(events: Vec<Event>) -> Facts {
    Facts {
        name: "web".to_owned(),
        now_ms: NOW,
        vm: Some(vm("web", "/gold", 180)),
        groups: vec![group("/gold", 300, Some(512)), group("/", 300, None)],
        shortage: None,
        events,
        decisions: Vec::new(),
    }
}

fn ranked(rank: usize, vm: &str, spared: Option<SparedBy>, why: &str) -> RankedView {
    let preference = OomPreference::None;
    let (usage_bytes, frees_bytes, action) = (180 * MIB, 100 * MIB, OomAction::Pause);
    RankedView {
        rank,
        vm: vm.to_owned(),
        group: "/gold".to_owned(),
        usage_bytes,
        vmm_bytes: 0,
        stock_bytes: 0,
        min_bytes: 0,
        low_bytes: 0,
        above_bytes: usage_bytes,
        action,
        frees_bytes,
        score_bytes: frees_bytes,
        preference,
        priority: 0,
        spared,
        why: format!("{vm}: {why}"),
    }
}

/// A decision that `vm` is paused because the host has no memory left.
fn decision(ago: u64, vm: &str) -> DecisionView {
    DecisionView {
        number: 7,
        time_ms: NOW - ago * 1000,
        event: NOW / 1000 - ago - 1,
        level: "/".to_owned(),
        reason: Reason::Host,
        usage_bytes: 300 * MIB,
        max_bytes: None,
        short: Some(ShortageSign::Available),
        available_bytes: Some(30 * MIB),
        vm: Some(vm.to_owned()),
        id: Some(1),
        action: Some(OomAction::Pause),
        by: DecidedBy::Policy,
        in_vain: None,
        why: format!("{vm}: a pause frees 100M"),
        ranked: vec![
            ranked(1, "web", None, "a pause frees 100M"),
            ranked(2, "db", None, "a pause frees 40M"),
            ranked(3, "precious", Some(SparedBy::Omit), "spared: its preference is omit"),
        ],
        not_shown: 0,
        expected_bytes: 100 * MIB,
        freed_bytes: 98 * MIB,
        took_ms: Some(1200),
        outcome: Outcome::Freed,
        outcome_ms: 0,
    }
}

/// The story as `ballast why` prints it, without spaces in front.
fn told(facts: &Facts) -> Vec<String> {
    let when = |time_ms: Option<u64>| time_ms.map_or("now".to_owned(), |at| ago(NOW - at));
    story(facts).iter().map(|line| format!("{}: {}", when(line.time_ms), line.text)).collect()
}

/// What is told of the past alone.
fn past_of(facts: &Facts) -> Vec<String> {
    told(facts).into_iter().filter(|line| !line.starts_with("now: ")).collect()
}

/// Each kind of event that says something of memory is a sentence.
#[test]
fn every_event_has_its_sentence() {
    let table = [
        (event(3, EventKind::Created, json!({ "max_bytes": 256 * MIB })), "it was made, with a memory.max of 256M"),
        (event(3, EventKind::Adopted, json!({ "usage_bytes": MIB })), "a new controller took it over, with 1M in use"),
        (
            event(3, EventKind::LimitRequested, json!({ "max_pending_bytes": 64 * MIB, "usage_bytes": 80 * MIB })),
            "its memory.max was to become 64M; 80M were in use, which had to come down",
        ),
        (
            of_group(3, EventKind::LimitChanged, json!({ "max_bytes": 64 * MIB, "min_bytes": 0, "high_bytes": null })),
            "/gold's limits were changed: memory.max 64M",
        ),
        (
            event(3, EventKind::LimitNotReached, json!({ "lowest_bytes": 70 * MIB })),
            "the lower memory.max of it was given up: usage came down to 70M, no further",
        ),
        (
            event(3, EventKind::HighCrossed, json!({ "usage_bytes": 70 * MIB })),
            "its usage rose above memory.high, to 70M",
        ),
        (
            of_group(3, EventKind::Reclaim, json!({ "rung": "evict", "above_bytes": MIB, "goal_bytes": 64 * MIB })),
            "/gold used 1M more than the 64M that it should come down to: evicting cold pages",
        ),
        (
            event(
                3,
                EventKind::Reclaimed,
                json!({ "took_ms": 1500, "balloon_bytes": MIB, "report_bytes": 0, "evicted_bytes": 8 * MIB }),
            ),
            "it was where it should be again after 1.5 s: 1M by the balloon, 0 by reports of the guest, 8M by eviction",
        ),
        (
            event(3, EventKind::Reclaim, json!({ "rung": "evict", "above_bytes": 9 * MIB, "goal_bytes": 0 })),
            "all that it has was asked of it: evicting cold pages",
        ),
        (
            event(
                3,
                EventKind::Reclaimed,
                json!({ "took_ms": 1500, "balloon_bytes": 0, "report_bytes": 0, "evicted_bytes": 0 }),
            ),
            "what it was asked for has ended after 1.5 s: nothing was given",
        ),
        (
            event(3, EventKind::MaxHit, json!({ "usage_bytes": 180 * MIB, "limit_of": "/gold" })),
            "a touch of memory found no room below memory.max of /gold (180M in use by it), and its vCPUs had to wait",
        ),
        (
            event(3, EventKind::MaxHit, json!({ "usage_bytes": 180 * MIB, "limit_of": "/gold/web" })),
            "a touch of memory found no room below its own memory.max (180M in use by it), and its vCPUs had to wait",
        ),
        (
            event(3, EventKind::Uncooperative, json!({ "missing_bytes": 9 * MIB })),
            "its guest gave nothing again of the 9M that its balloon was asked for: it does not cooperate",
        ),
        (
            event(3, EventKind::VictimSelected, json!({ "limit_of": "/gold/web", "reason": "limit" })),
            "it was chosen: its own memory.max left no room",
        ),
        (
            event(3, EventKind::VictimSelected, json!({ "limit_of": "/", "reason": "host" })),
            "it was chosen: the host had no memory left",
        ),
        (event(3, EventKind::Paused, json!({ "by": "request" })), "somebody paused it"),
        (event(3, EventKind::Resumed, json!({ "by": "policy" })), "it went on by itself: there was memory for it"),
        (event(3, EventKind::Killed, json!({ "by": "request" })), "somebody killed it"),
        (
            event(3, EventKind::WorkerDied, json!({ "reason": "the worker was silent" })),
            "it broke: the worker was silent",
        ),
        (event(3, EventKind::Moved, json!({ "from": "/web", "to": "/gold/web" })), "it was moved from / to /gold"),
        (
            of_host(3, EventKind::PressureEntered, json!({ "short": "stalled", "available_bytes": 90 * MIB })),
            "the host ran short of memory (everybody waited for it, 90M available): all VMs were asked for some",
        ),
        (
            of_host(3, EventKind::PressureLeft, json!({ "lasted_ms": 30_000 })),
            "the host had enough memory again, after 30 s",
        ),
        (
            of_host(3, EventKind::Restarted, json!({ "life": 2 })),
            "a new controller began: what was before is not known any more",
        ),
    ];
    for (event, sentence) in table {
        let kind = event.event;
        assert_eq!(past_of(&facts(vec![event])), [format!("3.0 s ago: {sentence}")], "{kind:?}");
    }
}

/// Why this one and not another, from which list, and what it brought; the event of the pause says nothing more.
#[test]
fn a_victim_hears_why_it_was_chosen_and_who_was_not() {
    let chosen = json!({ "decision": 7, "limit_of": "/", "action": "pause" });
    let events = vec![
        of_host(20, EventKind::PressureEntered, json!({ "short": "available", "available_bytes": 60 * MIB })),
        event(12, EventKind::VictimSelected, chosen),
        event(12, EventKind::Paused, json!({ "by": "host" })),
    ];
    let mut facts = Facts { decisions: vec![decision(12, "web")], ..facts(events) };
    let web = facts.vm.as_mut().expect("there");
    (web.state, web.paused_by) = (VmState::Paused, Some(PausedBy::Host));
    facts.shortage = Some(ShortageView {
        short: Some(ShortageSign::Available),
        available_bytes: 50 * MIB,
        enter_bytes: 64 * MIB,
        leave_bytes: 96 * MIB,
        critical_bytes: 32 * MIB,
        total_us: 0,
    });
    let story = told(&facts);
    assert_eq!(
        story[..3],
        [
            "20 s ago: the host ran short of memory (60M available): all VMs were asked for some",
            "12 s ago: the host had no memory left (30M available): the policy paused it, 1st in the list: a pause frees 100M; \
             after it came db (a pause frees 40M); precious was spared: its preference is omit; 98M came back within 1.2 s",
            "now: it is paused for the others, until there is room for what was evicted of it",
        ]
    );
    let last = story.last().expect("a sentence");
    assert_eq!(
        last,
        "now: it goes on by itself when there is room: the host is short of memory (50M available); `ballast oom rank` shows \
         who uses how much"
    );
}

/// Who was not chosen hears that, too.
#[test]
fn who_was_spared_or_came_later_hears_it() {
    let of = |name: &str| {
        let vm = Some(vm(name, "/gold", 180));
        past_of(&Facts { name: name.to_owned(), vm, decisions: vec![decision(12, "web")], ..facts(Vec::new()) })
    };
    let begin = "12 s ago: the host had no memory left (30M available): the policy paused web, not this one, which";
    assert_eq!(of("db"), [format!("{begin} came 2nd in the list (a pause frees 40M)")]);
    assert_eq!(of("precious"), [format!("{begin} was spared: its preference is omit")]);
    let nobody =
        DecisionView { vm: None, action: None, why: "nobody can be chosen: 3 omitted".to_owned(), ..decision(12, "x") };
    assert_eq!(
        past_of(&Facts { decisions: vec![nobody], ..facts(Vec::new()) }),
        ["12 s ago: the host had no memory left (30M available): nobody can be chosen: 3 omitted"]
    );
}

/// The end of a group's room is the group's, and of one's own nobody else is named.
#[test]
fn a_pause_at_a_limit_names_the_limit() {
    let at = |level: &str| DecisionView {
        level: level.to_owned(),
        reason: Reason::Full,
        short: None,
        available_bytes: None,
        max_bytes: Some(256 * MIB),
        took_ms: None,
        outcome: Outcome::Waits,
        ..decision(12, "web")
    };
    let of = |level| past_of(&Facts { decisions: vec![at(level)], ..facts(Vec::new()) }).remove(0);
    assert_eq!(of("/gold/web"), "12 s ago: its own memory.max left no room (300M in use): the policy paused it");
    assert!(
        of("/gold").starts_with("12 s ago: memory.max of /gold left no room (300M in use): the policy paused it, 1st")
    );
    assert!(of("/").starts_with("12 s ago: the budget of the host left no room"));
    let thrashing =
        Facts { decisions: vec![DecisionView { reason: Reason::Thrash, ..at("/gold") }], ..facts(Vec::new()) };
    let begin =
        "12 s ago: the VMs of /gold thrashed, they only took pages from each other (300M in use): the policy paused it";
    assert!(past_of(&thrashing).remove(0).starts_with(begin));
}

/// How it is, what it is made of, which limit is the nearest, and whether the guest helps.
#[test]
fn a_vm_that_runs_is_described_and_needs_nothing() {
    let mut facts = facts(Vec::new());
    let web = facts.vm.as_mut().expect("there");
    web.memory.peak_bytes = 200 * MIB;
    web.memory.stat.guest_bytes = 150 * MIB;
    web.memory.stat.idle_bytes = 20 * MIB;
    web.memory.stat.vmm_bytes = 2 * MIB;
    web.memory.stat.swapped_bytes = 40 * MIB;
    web.memory.stat.store_bytes = 10 * MIB;
    web.cold.working_set_bytes = Some(90 * MIB);
    web.balloon.progress = Some(BalloonProgress::Stalled);
    assert_eq!(
        told(&facts),
        [
            "now: it runs",
            "now: it uses 180M, 200M at most so far: 150M of its guest (about 90M in use of late, 20M set aside), 10M of store for \
             40M that are evicted, 2M of overhead",
            "now: its own memory.max is the nearest limit: 256M leave 76M",
            "now: its guest does not cooperate: it has given 1.5M of the 64M that are asked for",
            "now: nothing needs to be done",
        ]
    );
}

/// One that is held hears at whose limit, how long, and the words that help.
#[test]
fn a_vm_that_is_held_hears_whose_limit_it_is_and_what_to_type() {
    let mut facts = facts(Vec::new());
    facts.groups[0] = group("/gold", 510, Some(512));
    facts.groups[0].reclaim = ReclaimView {
        rung: ReclaimRung::Hold,
        since_ms: Some(4000),
        goal_bytes: Some(512 * MIB),
        stuck: Some("nothing more can be had: raise swap.max, which is full".to_owned()),
    };
    let web = facts.vm.as_mut().expect("there");
    let limit_of = Some("/gold".to_owned());
    web.held = HeldView { now: true, limit_of, total_us: 3_200_000, deadline_ms: Some(1500) };
    web.pressure.some.avg60 = 12.0;
    let story = told(&facts);
    for sentence in [
        "now: it is held: its vCPUs wait for memory, and memory.max of /gold leaves no room; the policy acts in 1.5 s",
        "now: memory.max of /gold is the nearest limit: 510M of 512M in use leave 2M; its own is 256M",
        "now: /gold is to come down to 512M for 4.0 s: nothing more can be had: raise swap.max, which is full",
        "now: its guest runs no balloon driver: what has to come back is evicted",
        "now: it was held for 3.2 s in all; its vCPUs waited for memory for 12 % of the last minute",
        "now: `ballast group set /gold memory.max=640M` gives it more; `ballast oom rank /gold` shows who uses how much",
    ] {
        assert!(story.iter().any(|line| line == sentence), "{sentence}\nin {story:#?}");
    }
}

/// Of one that is emptied, and of one of which nothing may be evicted, nothing is said that cannot be.
#[test]
fn what_is_asked_of_a_vm_is_said_as_it_is() {
    let mut facts = facts(Vec::new());
    let web = facts.vm.as_mut().expect("there");
    web.swap.max_bytes = Some(0);
    let said = |facts: &Facts, sentence: &str| {
        let story = told(facts);
        assert!(story.iter().any(|line| line == sentence), "{sentence}\nin {story:#?}");
    };
    let nothing =
        "now: its guest runs no balloon driver, and nothing of it is evicted (swap.max is 0): it gives nothing back";
    said(&facts, nothing);
    let web = facts.vm.as_mut().expect("there");
    web.reclaim = ReclaimView { rung: ReclaimRung::Evict, since_ms: Some(6), goal_bytes: Some(0), stuck: None };
    said(&facts, "now: it is to come down to 0: evicting cold pages");
    let web = facts.vm.as_mut().expect("there");
    (web.state, web.paused_by) = (VmState::Paused, Some(PausedBy::Group));
    said(&facts, "now: it is to give all that it has: evicting cold pages");
    let web = facts.vm.as_mut().expect("there");
    (web.reclaim.rung, web.reclaim.stuck) = (ReclaimRung::Stuck, Some("ask for a higher limit".to_owned()));
    said(&facts, "now: it has given what could be had of it");
    facts.vm.as_mut().expect("there").stale = true;
    said(&facts, "now: it is to give all that it has, and its worker does not answer");
}

/// Who waits for another VM hears for which, and for how much of it.
#[test]
fn who_waits_behind_another_vm_hears_for_whom() {
    let mut facts = facts(Vec::new());
    let web = facts.vm.as_mut().expect("there");
    let ahead = |vm: &str, mib: u64| AheadView { vm: vm.to_owned(), bytes: mib * MIB };
    web.waits_for = vec![ahead("batch", 40)];
    web.held = HeldView { now: true, limit_of: Some("/gold".to_owned()), ..HeldView::default() };
    let first = |facts: &Facts| told(facts).remove(0);
    assert_eq!(
        first(&facts),
        "now: it is held: its vCPUs wait for memory, and memory.max of /gold leaves no room; memory of batch (40M) is on its way"
    );
    let web = facts.vm.as_mut().expect("there");
    (web.state, web.paused_by, web.resume_bytes) = (VmState::Paused, Some(PausedBy::Group), Some(80 * MIB));
    web.waits_for.push(ahead("ci", 10));
    assert_eq!(
        first(&facts),
        "now: it is paused for the others of its group, until there is room for the 80M that it needs; batch (40M), then ci (10M) go \
         on before it"
    );
}

/// What to type in each state.
#[test]
fn what_would_help_depends_on_the_state() {
    let help = |change: fn(&mut VmView)| {
        let mut facts = facts(Vec::new());
        change(facts.vm.as_mut().expect("there"));
        told(&facts).pop().expect("a sentence")
    };
    let paused_by = |by| move |vm: &mut VmView| (vm.state, vm.paused_by) = (VmState::Paused, Some(by));
    let mut facts_of_user = facts(Vec::new());
    paused_by(PausedBy::User)(facts_of_user.vm.as_mut().expect("there"));
    assert_eq!(told(&facts_of_user).pop().expect("said"), "now: `ballast resume web` lets it go on");
    let mut facts_of_policy = facts(Vec::new());
    paused_by(PausedBy::Policy)(facts_of_policy.vm.as_mut().expect("there"));
    assert_eq!(
        told(&facts_of_policy).pop().expect("said"),
        "now: `ballast set web memory.max=320M` gives it more, and it goes on by itself"
    );
    let kept = |vm: &mut VmView| {
        (vm.state, vm.paused_by) = (VmState::Paused, Some(PausedBy::Host));
        (vm.kept_paused, vm.resume_bytes) = (true, Some(80 * MIB));
    };
    assert_eq!(help(kept), "now: `ballast resume web` lets it go on as soon as there is room");
    assert_eq!(help(|vm| vm.state = VmState::Ended), "now: `ballast start web` runs it again");
    assert!(help(|vm| vm.accounting = false).ends_with("`ballast set web track=on` counts it"));
}

/// A limit that is named is one that helps: for what a VM needs in order to go on, with those who come first, in each limit
/// that leaves too little, or for what it used of late.
#[test]
fn the_limits_that_are_named_would_be_enough() {
    let help = |change: &dyn Fn(&mut Facts)| {
        let mut facts = facts(Vec::new());
        change(&mut facts);
        let last = told(&facts).pop().expect("a sentence");
        last.strip_prefix("now: ").expect("of now").to_owned()
    };
    let paused = |by, needs: u64, missing: u64| {
        move |facts: &mut Facts| {
            let web = facts.vm.as_mut().expect("there");
            (web.state, web.paused_by) = (VmState::Paused, Some(by));
            (web.resume_bytes, web.resume_missing_bytes) = (Some(needs * MIB), Some(missing * MIB));
        }
    };
    // Usage of the group is 300M of 512M, its own 180M of 256M.
    let own = "`ballast set web memory.max=306M` gives it more, and it goes on by itself";
    // What is missing would not be enough for long at its own limit.
    assert_eq!(help(&paused(PausedBy::Policy, 100, 24)), own.replace("306M", "320M"));
    let both = "`ballast set web memory.max=556M` with `ballast group set /gold memory.max=676M` gives it more, and it goes on by \
                itself";
    assert_eq!(help(&paused(PausedBy::Group, 300, 224)), both);
    let behind = |facts: &mut Facts| {
        paused(PausedBy::Group, 40, 1)(facts);
        let web = facts.vm.as_mut().expect("there");
        web.memory.max_bytes = None;
        web.waits_for = vec![AheadView { vm: "batch".to_owned(), bytes: 1000 * MIB }];
    };
    assert_eq!(help(&behind), "`ballast group set /gold memory.max=1601M` gives it more, and it goes on by itself");
    let next = |facts: &mut Facts| {
        behind(facts);
        facts.vm.as_mut().expect("there").resume_missing_bytes = Some(0);
    };
    assert_eq!(
        help(&next),
        "there is room for it, but not for who comes first: `ballast resume web` lets it go on now"
    );
    let fits = "there is room for it: it goes on by itself in a moment";
    assert_eq!(help(&paused(PausedBy::Group, 40, 0)), fits);
    let kept = |facts: &mut Facts| {
        paused(PausedBy::Policy, 100, 24)(facts);
        facts.vm.as_mut().expect("there").kept_paused = true;
    };
    assert_eq!(
        help(&kept),
        "`ballast set web memory.max=320M` gives it more; `ballast resume web` lets it go on as soon as there is room"
    );
    let host = "it goes on by itself when there is room, of which 30M are missing: nobody watches the host; `ballast oom rank` \
                shows who uses how much";
    assert_eq!(help(&paused(PausedBy::Host, 40, 30)), host);
    let in_both = format!("{own}; {host}");
    assert_eq!(help(&paused(PausedBy::Host, 100, 30)), in_both);
    // 120M are in use of late that are elsewhere.
    let thrashes = |facts: &mut Facts| {
        let web = facts.vm.as_mut().expect("there");
        (web.cold.working_set_bytes, web.memory.stat.guest_bytes) = (Some(290 * MIB), 170 * MIB);
        web.pressure.some.avg60 = 20.0;
    };
    assert_eq!(help(&thrashes), "what it uses of late does not fit: `ballast set web memory.max=330M` gives it more");
}

/// A story goes on after the end, and after that of its view.
#[test]
fn a_vm_that_has_ended_or_was_removed_has_a_story() {
    let events = vec![
        event(40, EventKind::Created, json!({ "max_bytes": null })),
        event(3, EventKind::Killed, json!({ "by": "host" })),
    ];
    let mut facts = facts(events);
    let web = facts.vm.as_mut().expect("there");
    (web.state, web.end) = (VmState::Ended, Some("it was killed: the host ran short of memory".to_owned()));
    web.memory.current_bytes = 0;
    web.memory.peak_bytes = 200 * MIB;
    let expected = [
        "40 s ago: it was made, with no limit of its own",
        "3.0 s ago: its end came: the policy had it killed",
        "now: it has ended: it was killed: the host ran short of memory",
        "now: all of its memory is back; it used 200M at most",
        "now: `ballast start web` runs it again",
    ];
    assert_eq!(told(&facts), expected);
    let gone = Facts { vm: None, ..facts };
    assert_eq!(told(&gone).pop().as_deref(), Some("now: it is not there any more: it was removed"));
}

/// What comes again and again is one sentence until something else happens, and a long story has an end.
#[test]
fn a_story_is_no_longer_than_a_page() {
    let crossed = |ago| event(ago, EventKind::HighCrossed, json!({ "usage_bytes": 70 * MIB }));
    let evicted =
        |ago| event(ago, EventKind::Evicted, json!({ "evicted_bytes": MIB, "swap_bytes": MIB, "store_bytes": MIB }));
    let paused = event(50, EventKind::Paused, json!({ "by": "request" }));
    let busy = facts(vec![crossed(90), evicted(80), crossed(70), crossed(60), paused, crossed(40)]);
    let lines = past_of(&busy);
    assert_eq!(lines[0], "90 s ago: its usage rose above memory.high, to 70M (3 times, the last 60 s ago)");
    assert_eq!((lines.len(), lines[3].as_str()), (4, "40 s ago: its usage rose above memory.high, to 70M"));
    let pause = |ago| event(ago, EventKind::Paused, json!({ "by": "request" }));
    let long = facts((1..=100).rev().map(pause).collect());
    let story = told(&long);
    assert_eq!(story.len(), LINES);
    let left_out = 101 - past_of(&long).len();
    assert!(
        story[0].ends_with(&format!("{left_out} things before are left out: `ballast events web` has them")),
        "{story:?}"
    );
}

/// The story is of this VM, in the groups where it is, not of another of its name.
#[test]
fn only_what_concerned_this_vm_is_told() {
    let made = |ago| event(ago, EventKind::Created, json!({}));
    let crossed = |ago| of_group(ago, EventKind::HighCrossed, json!({}));
    let other = Event { vm: Some("db".to_owned()), ..event(5, EventKind::Paused, json!({})) };
    let all = vec![
        of_host(99, EventKind::Dropped, json!({ "dropped": 3 })),
        made(90),
        event(80, EventKind::Removed, json!({})),
        made(70),
        crossed(60),
        event(50, EventKind::Moved, json!({ "from": "/web", "to": "/gold/web" })),
        crossed(40),
        of_host(30, EventKind::PressureLeft, json!({})),
        other,
    ];
    let groups = [group("/gold", 1, None)];
    let its: Vec<_> = past::of_vm(&all, "web", &groups).iter().map(|event| (NOW - event.time_ms) / 1000).collect();
    assert_eq!(its, [70, 50, 40, 30]);
    // A group with the VM's name is a group.
    let facts = Facts { groups: vec![group("/web", 1, None)], ..facts(Vec::new()) };
    assert_eq!(Limited::of("/web", &facts), Limited::Group("/web"));
    assert_eq!(Limited::of("/gold/web", &facts), Limited::Own);
    assert_eq!(size(Pages(1).bytes()), "4K");
}

/// A clock that is set back while a VM lives changes what its story says of when, and not the order.
#[test]
fn a_story_is_told_in_order_whatever_the_clock_said() {
    let hour = 3_600_000;
    let mut facts = facts(vec![
        event(40, EventKind::Created, json!({})),
        event(30, EventKind::Started, json!({})),
        event(20, EventKind::Paused, json!({ "by": "request" })),
        event(10, EventKind::Resumed, json!({ "by": "request" })),
    ]);
    facts.decisions = vec![decision(15, "db")];
    let in_order = texts(&facts);
    facts.events[2..].iter_mut().for_each(|event| event.time_ms -= hour);
    facts.decisions[0].time_ms -= hour;
    assert_eq!(texts(&facts), in_order);
    let expected = ["was made", "started", "somebody paused it", "paused db", "let it go on"];
    let as_expected = expected.iter().zip(&in_order).all(|(part, text)| text.contains(part));
    assert!(as_expected && in_order.len() == expected.len(), "{in_order:?}");
}

/// What a story says, without when.
fn texts(facts: &Facts) -> Vec<String> {
    story(facts).into_iter().filter(|line| line.time_ms.is_some()).map(|line| line.text).collect()
}

//! The table.

use super::Decided::{Kill, Nobody, Pause, Resume, Spared};
use super::{Expected, NONE, Rule, Says, VmLine};
use crate::oom::Preference;

/// A VM of `name` that wants nothing.
const fn vm(name: &'static str) -> VmLine {
    VmLine {
        name,
        group: "/",
        load: &[],
        min: 0,
        low: 0,
        max: NONE,
        swaps: false,
        pauses: false,
        preference: Preference::None,
        priority: 0,
        driver: false,
        immortal: false,
        deaf: false,
        ends: None,
    }
}

/// Uses more than half of the host from the start.
const fn big(name: &'static str) -> VmLine {
    VmLine { load: &[(0, 2200, 2200)], ..vm(name) }
}

/// Grows into what [`big`] leaves, and beyond it.
const fn grows(name: &'static str) -> VmLine {
    VmLine { load: &[(0, 1000, 1000), (5, 1000, 1000), (25, 1950, 1950)], ..vm(name) }
}

/// Uses the same all the time, all of it, and could be evicted; it is paused when it is chosen.
const fn hot(name: &'static str, load: &'static [(u64, u64, u64)]) -> VmLine {
    VmLine { load, swaps: true, pauses: true, ..vm(name) }
}

/// In a group, from the start on 700 MiB.
const fn filler(name: &'static str, group: &'static str) -> VmLine {
    VmLine { group, load: &[(0, 700, 700)], ..vm(name) }
}

/// In a group, grows to 600 MiB.
const fn climber(name: &'static str, group: &'static str) -> VmLine {
    VmLine { group, load: &[(0, 0, 0), (5, 0, 0), (15, 600, 600)], ..vm(name) }
}

/// A line of which nothing is said.
const LINE: Rule = Rule {
    id: "",
    says: "",
    memory: 4096,
    others: &[],
    groups: &[],
    vms: &[],
    client: None,
    seconds: 60,
    expects: &[],
};

/// `what`, not before and not after so many seconds.
const fn at(from: u64, to: u64, what: super::Decided) -> Expected {
    Expected { between: (from, to), what }
}

/// All of them.
pub const RULES: &[Rule] = &[
    Rule {
        id: "most-above-protection",
        says: "Among equals the one goes that frees most of what is above its protection.",
        vms: &[big("big"), grows("small")],
        expects: &[at(25, 35, Kill("big", "/", "above its protection of 0, priority 0"))],
        ..LINE
    },
    Rule {
        id: "lower-priority",
        says: "A lower priority goes before a higher one, however much either has.",
        vms: &[VmLine { priority: 10, ..big("big") }, grows("small")],
        expects: &[at(25, 35, Kill("small", "/", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "avoid-goes-last",
        says: "One that is to be avoided goes after all others, whatever its priority.",
        vms: &[VmLine { preference: Preference::Avoid, priority: -100, ..big("big") }, grows("small")],
        expects: &[at(25, 35, Kill("small", "/", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "avoid-but-alone",
        says: "One that is to be avoided goes all the same when all others are never to go.",
        vms: &[
            VmLine { preference: Preference::Avoid, ..big("big") },
            VmLine { preference: Preference::Omit, ..grows("small") },
        ],
        expects: &[at(25, 35, Kill("big", "/", "to be avoided"))],
        ..LINE
    },
    Rule {
        id: "omit-lives",
        says: "One that is omitted is not chosen, however big it is.",
        vms: &[VmLine { preference: Preference::Omit, ..big("big") }, grows("small")],
        expects: &[at(25, 35, Kill("small", "/", "above its protection"))],
        ..LINE
    },
    Rule {
        id: "everybody-omits",
        says: "When all are omitted nobody goes, and it is said why.",
        vms: &[
            VmLine { preference: Preference::Omit, ..big("big") },
            VmLine { preference: Preference::Omit, ..grows("small") },
        ],
        expects: &[at(25, 35, Nobody("/", "2 omitted"))],
        ..LINE
    },
    Rule {
        id: "exactly-at-min",
        says: "A VM that uses exactly its memory.min is not chosen, though it is the biggest and has the lowest priority.",
        vms: &[VmLine { min: 2200, priority: -10, ..big("big") }, grows("small")],
        expects: &[at(25, 35, Kill("small", "/", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "all-within-min",
        says: "When all are within their memory.min nobody goes.",
        vms: &[VmLine { min: 2200, ..big("big") }, VmLine { min: 1950, ..grows("small") }],
        expects: &[at(25, 35, Nobody("/", "2 within memory.min"))],
        ..LINE
    },
    Rule {
        id: "low-counts",
        says: "What memory.low protects does not count: a big VM with little above it stays.",
        vms: &[VmLine { low: 2000, ..big("big") }, grows("small")],
        expects: &[at(25, 35, Kill("small", "/", "above its protection of 0"))],
        ..LINE
    },
    Rule {
        id: "group-protects",
        says: "A group's protection is its members', who need claim none themselves.",
        groups: &[("/gold", 2100, NONE)],
        vms: &[VmLine { group: "/gold", ..big("big") }, grows("small")],
        expects: &[at(25, 35, Kill("small", "/", "above its protection of 0"))],
        ..LINE
    },
    Rule {
        id: "equals-by-name",
        says: "Between two that are equal in everything the name decides, so it can be known before.",
        others: &[(10, 1000)],
        vms: &[
            VmLine { load: &[(0, 1550, 1550)], ..vm("twin-b") },
            VmLine { load: &[(0, 1550, 1550)], ..vm("twin-a") },
        ],
        expects: &[at(14, 20, Kill("twin-a", "/", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "refuses-to-die",
        says: "A victim that does not die is waited for ten seconds; then the next goes.",
        vms: &[VmLine { immortal: true, ..big("big") }, grows("small")],
        expects: &[at(25, 35, Kill("big", "/", "priority 0")), at(36, 46, Kill("small", "/", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "ending-is-waited-for",
        says: "While a VM's memory is coming back that a user has ended, nobody is chosen, for as long as for a victim.",
        vms: &[
            big("big"),
            grows("small"),
            VmLine { load: &[(0, 300, 300)], immortal: true, ends: Some(10), ..vm("ended") },
        ],
        expects: &[at(29, 36, Kill("big", "/", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "deaf-is-passed-over",
        says: "One that cannot be told to pause is passed over at once: the next goes.",
        vms: &[VmLine { deaf: true, priority: -1, ..hot("deaf", &[(0, 2400, 2400)]) }, hot("next", &[(0, 2400, 2400)])],
        expects: &[at(5, 25, Pause("next", "/", "a pause frees"))],
        ..LINE
    },
    Rule {
        id: "pause-and-resume",
        says: "A VM that was paused for the host goes on by itself when there is room for all that it had.",
        vms: &[
            VmLine { priority: -1, ..hot("paused", &[(0, 2400, 2400)]) },
            VmLine { ends: Some(60), ..hot("other", &[(0, 2400, 2400)]) },
        ],
        seconds: 120,
        expects: &[at(5, 25, Pause("paused", "/", "priority -1")), at(60, 90, Resume("paused"))],
        ..LINE
    },
    Rule {
        id: "pause-that-frees-nothing",
        says: "A pause that would free nothing is no remedy: the one without swap is spared, and another goes.",
        vms: &[VmLine { pauses: true, ..big("big") }, grows("small")],
        expects: &[at(25, 35, Kill("small", "/", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "pause-once",
        says: "One that was paused has given what it had: the next time it is another's turn.",
        vms: &[
            VmLine { priority: -2, ..hot("first", &[(0, 2000, 2000)]) },
            VmLine { priority: -1, ..hot("second", &[(0, 2400, 2400)]) },
            VmLine { preference: Preference::Omit, load: &[(0, 0, 0), (40, 0, 0), (44, 2300, 2300)], ..vm("third") },
        ],
        seconds: 90,
        expects: &[at(5, 25, Pause("first", "/", "priority -2")), at(45, 65, Pause("second", "/", "priority -1"))],
        ..LINE
    },
    Rule {
        id: "idle-memory-first",
        says: "Nobody is chosen while memory that nobody uses can be had.",
        vms: &[VmLine { load: &[(0, 2200, 200)], swaps: true, ..vm("idle") }, grows("busy")],
        ..LINE
    },
    Rule {
        id: "balloon-first",
        says: "Nobody is chosen while a balloon gives what its guest has freed.",
        vms: &[
            VmLine { load: &[(0, 2200, 200), (8, 2200, 200), (10, 300, 200)], driver: true, ..vm("freed") },
            grows("busy"),
        ],
        ..LINE
    },
    Rule {
        id: "oscillation",
        says: "A load that comes and goes every two seconds is never critical for long: nobody is chosen for it.",
        others: &[
            (10, 1150),
            (12, 0),
            (14, 1150),
            (16, 0),
            (18, 1150),
            (20, 0),
            (22, 1150),
            (24, 0),
            (26, 1150),
            (28, 0),
            (30, 1150),
            (32, 0),
        ],
        vms: &[big("big"), VmLine { load: &[(0, 700, 700)], ..vm("small") }],
        ..LINE
    },
    Rule {
        id: "one-in-a-cool-down",
        says: "However the load comes and goes, there is one victim in each time to cool down.",
        others: &[(10, 1200), (18, 0), (20, 1600), (29, 0), (31, 2000), (41, 0)],
        vms: &[
            VmLine { load: &[(0, 1000, 1000)], priority: 1, ..vm("a") },
            VmLine { load: &[(0, 500, 500)], priority: 2, ..vm("b") },
            VmLine { load: &[(0, 500, 500)], priority: 3, ..vm("c") },
            VmLine { load: &[(0, 900, 900)], priority: 4, ..vm("d") },
        ],
        expects: &[at(14, 18, Kill("a", "/", "priority 1"))],
        ..LINE
    },
    Rule {
        id: "full-group",
        says: "In a group that is full one of its own goes: nobody outside helps, however big.",
        groups: &[("/ci", 0, 1000)],
        vms: &[filler("inside", "/ci"), climber("grows", "/ci"), VmLine { priority: -9, ..big("outside") }],
        expects: &[at(14, 25, Kill("inside", "/ci", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "two-groups-at-once",
        says: "Two groups that are full at once have a victim each: one waits for the other's in vain.",
        groups: &[("/ci", 0, 1000), ("/web", 0, 1000)],
        vms: &[filler("a", "/ci"), climber("b", "/ci"), filler("c", "/web"), climber("d", "/web")],
        expects: &[at(14, 25, Kill("a", "/ci", "priority 0")), at(14, 25, Kill("c", "/web", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "inner-group",
        says: "In a group within a group only those go that are in the one that is full.",
        groups: &[("/ci", 0, 3000), ("/ci/jobs", 0, 1000)],
        vms: &[
            VmLine { priority: -9, load: &[(0, 1500, 1500)], ..filler("above", "/ci") },
            filler("inside", "/ci/jobs"),
            climber("grows", "/ci/jobs"),
        ],
        expects: &[at(14, 25, Kill("inside", "/ci/jobs", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "own-limit",
        says: "A VM that stays held at its own limit is chosen itself, however big its neighbours are.",
        vms: &[VmLine { load: &[(0, 400, 400), (10, 800, 800)], max: 500, ..vm("held") }, big("big")],
        expects: &[at(7, 20, Kill("held", "/held", "held at its own limit"))],
        ..LINE
    },
    Rule {
        id: "own-limit-pauses",
        says: "At its own limit a VM is paused though that frees nothing: nobody else needs its memory.",
        vms: &[
            VmLine { load: &[(0, 400, 400), (10, 800, 800)], max: 500, pauses: true, ..vm("held") },
            VmLine { priority: -9, ..big("big") },
        ],
        expects: &[at(7, 20, Pause("held", "/held", "held at its own limit"))],
        ..LINE
    },
    Rule {
        id: "own-limit-omitted",
        says: "One that is omitted stays held at its own limit.",
        vms: &[VmLine { load: &[(0, 400, 400), (10, 800, 800)], max: 500, preference: Preference::Omit, ..vm("held") }],
        expects: &[at(7, 20, Nobody("/held", "1 omitted"))],
        ..LINE
    },
    Rule {
        id: "group-cold-first",
        says: "In a full group the cold memory of the neighbours goes first, and nobody is chosen.",
        groups: &[("/ci", 0, 1000)],
        vms: &[VmLine { group: "/ci", load: &[(0, 700, 50)], swaps: true, ..vm("cold") }, climber("grows", "/ci")],
        ..LINE
    },
    Rule {
        id: "group-thrashes",
        says: "Where VMs of a group only take pages from each other, one of them stands still.",
        groups: &[("/ci", 0, 1000)],
        vms: &[
            VmLine { group: "/ci", ..hot("a", &[(0, 700, 700)]) },
            VmLine { group: "/ci", priority: -1, ..hot("b", &[(0, 700, 700)]) },
        ],
        expects: &[at(10, 20, Pause("b", "/ci", "priority -1"))],
        ..LINE
    },
    Rule {
        id: "group-fits",
        says: "Pages that come back now and then are no reason for anybody to go.",
        groups: &[("/ci", 0, 1000)],
        vms: &[
            VmLine { group: "/ci", ..hot("a", &[(0, 600, 300)]) },
            VmLine { group: "/ci", ..hot("b", &[(0, 600, 300)]) },
        ],
        ..LINE
    },
    Rule {
        id: "group-of-omitted",
        says: "In a full group whose VMs are all omitted the one that asked stays held; nobody outside is taken instead.",
        groups: &[("/ci", 0, 1000)],
        vms: &[
            VmLine { preference: Preference::Omit, ..filler("inside", "/ci") },
            VmLine { preference: Preference::Omit, ..climber("grows", "/ci") },
            big("outside"),
        ],
        expects: &[at(14, 25, Nobody("/ci", "2 omitted"))],
        ..LINE
    },
    Rule {
        id: "client-decides",
        says: "A client that answers in time decides, and no preference binds it.",
        vms: &[VmLine { preference: Preference::Omit, ..big("omitted") }, grows("small")],
        client: Some((5, 2, Says::Takes("omitted"))),
        expects: &[at(27, 38, Kill("omitted", "/", "above its protection"))],
        ..LINE
    },
    Rule {
        id: "client-is-late",
        says: "At the deadline the rules decide; what a client says later is too late.",
        vms: &[big("big"), grows("small")],
        client: Some((5, 6, Says::Takes("small"))),
        expects: &[at(30, 40, Kill("big", "/", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "client-leaves",
        says: "When the client that was asked is gone the rules decide, and nobody waits for it again.",
        vms: &[big("big"), grows("small")],
        client: Some((5, 1, Says::Leaves)),
        expects: &[at(26, 36, Kill("big", "/", "priority 0"))],
        ..LINE
    },
    Rule {
        id: "client-frees",
        says: "A client that has made room saves everybody.",
        others: &[(0, 400)],
        vms: &[VmLine { load: &[(0, 1800, 1800)], ..vm("big") }, grows("small")],
        client: Some((5, 1, Says::Frees(400))),
        expects: &[at(26, 38, Spared("/"))],
        ..LINE
    },
    Rule {
        id: "client-ignores",
        says: "A client may leave it as it is, and is asked again after the time to cool down, not before.",
        vms: &[big("big"), grows("small")],
        client: Some((5, 1, Says::Ignores)),
        expects: &[at(26, 36, Spared("/"))],
        ..LINE
    },
    Rule {
        id: "client-names-an-outsider",
        says: "A client cannot have a VM killed whose end would not help: that is refused, and the rules decide at the deadline.",
        groups: &[("/ci", 0, 1000)],
        vms: &[filler("inside", "/ci"), climber("grows", "/ci"), big("outside")],
        client: Some((5, 1, Says::Takes("outside"))),
        expects: &[at(19, 30, Kill("inside", "/ci", "priority 0"))],
        ..LINE
    },
];

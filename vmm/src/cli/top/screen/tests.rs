use super::*;
use crate::controller::events::EventKind;
use crate::controller::overview::HostView;
use crate::controller::view::example::{group, vm};
use crate::controller::view::{HeldView, VmState};

const MIB: u64 = 1 << 20;

fn overview(vms: Vec<VmView>) -> Overview {
    let event = |seq| Event {
        seq,
        time_ms: 45_296_000 + seq,
        event: EventKind::MaxHit,
        vm: Some("vm-1".to_owned()),
        group: None,
        details: serde_json::Map::from_iter([("usage_bytes".to_owned(), (64 * MIB).into())]),
    };
    Overview {
        host: HostView {
            version: String::new(),
            pid: 1,
            kernel: String::new(),
            total_bytes: 24 << 30,
            available_bytes: 18 << 30,
            budget_bytes: Some(4 << 30),
            current_bytes: 1 << 30,
            vms: vms.len(),
            last_event: 9,
            shortage: None,
            strays: Vec::new(),
        },
        groups: vec![group("/", 1024, Some(4096)), group("/gold", 300, None)],
        vms,
        events: (1..=9).map(event).collect(),
    }
}

fn screen(vms: Vec<VmView>) -> Screen {
    let mut screen = Screen::new(Sort::Usage, None, true);
    screen.show(vec![overview(vms)], Vec::new());
    screen
}

/// The text for a terminal of this size; it must fit.
fn text(screen: &mut Screen, width: u16, height: u16) -> Vec<String> {
    let lines: Vec<_> = screen.lines(width, height).iter().map(ToString::to_string).collect();
    assert_eq!(lines.len(), usize::from(height), "{lines:#?}");
    for line in &lines {
        assert!(line.chars().count() <= usize::from(width), "{width}: {line:?}");
    }
    lines.iter().map(|line| line.trim_end().to_owned()).collect()
}

/// The first words of the rows.
fn names(lines: &[String]) -> Vec<&str> {
    let rows = lines.iter().skip(3).take_while(|line| !line.is_empty() && !line.starts_with('─'));
    rows.map(|line| line.split(' ').next().unwrap_or_default()).collect()
}

fn many(count: u64) -> Vec<VmView> {
    (0..count).map(|n| vm(&format!("vm-{n:03}"), if n % 2 == 0 { "/gold" } else { "/silver/web" }, n)).collect()
}

#[test]
fn an_ordinary_terminal_has_everything_in_its_place() {
    let mut vms = vec![vm("web", "/", 192), vm("db", "/", 256), vm("idle", "/", 8)];
    vms[1].held = HeldView { now: true, limit_of: None, total_us: 61_000_000, deadline_ms: Some(5000) };
    vms[1].pressure.some.avg10 = 63.18;
    vms[2].state = VmState::Paused;
    let lines = text(&mut screen(vms), 80, 24);
    assert_eq!(lines[0], "ballast: 3 VMs, 1 held, 1 paused                       host 18G of 24G available");
    assert!(lines[1].starts_with("/ [||||||||"), "{}", lines[1]);
    assert!(lines[1].ends_with("1G of 4G, 25%   pressure some 0.00 full 0.00"), "{}", lines[1]);
    let heading: Vec<_> = lines[2].split_whitespace().collect();
    assert_eq!(heading, ["NAME", "STATE", "USED", "MAX", "USAGE", "%", "BALLOON", "PRESS", "HELD"]);
    assert_eq!(names(&lines), ["db", "web", "idle"]);
    let row: Vec<_> = lines[3].split_whitespace().collect();
    assert_eq!(row[..4], ["db", "held", "256M", "256M"]);
    assert_eq!(row[5..], ["100", "1.5M/64M", "63.18", "61.0s"]);
    assert!(lines[4].contains("|||||||| "), "{}", lines[4]);
    assert!(lines[22].starts_with("00:00") || lines[22].starts_with("12:34:56"), "{}", lines[22]);
    assert!(lines[22].contains("max_hit") && lines[22].ends_with("usage=64M"), "{}", lines[22]);
    assert!(lines[23].starts_with("q quit"), "{}", lines[23]);
}

#[test]
fn two_hundred_vms_scroll() {
    let mut screen = screen(many(200));
    let lines = text(&mut screen, 80, 24);
    assert_eq!(names(&lines)[0], "vm-199");
    let rows = names(&lines).len();
    assert!(rows >= 12, "{lines:#?}");
    assert!(lines.iter().any(|line| line.contains(&format!(" 1-{rows} of 200 "))), "{lines:#?}");
    screen.scroll_pages(1);
    assert_eq!(names(&text(&mut screen, 80, 24))[0], format!("vm-{}", 199 - rows));
    screen.scroll(isize::MAX);
    assert_eq!(names(&text(&mut screen, 80, 24)).last(), Some(&"vm-000"));
    screen.scroll(isize::MIN);
    assert_eq!(names(&text(&mut screen, 80, 24))[0], "vm-199");
    // Most of them go while it is scrolled down.
    screen.scroll(isize::MAX);
    screen.show(vec![overview(many(3))], Vec::new());
    assert_eq!(names(&text(&mut screen, 80, 24)), ["vm-002", "vm-001", "vm-000"]);
}

#[test]
fn every_size_of_a_terminal_is_filled_and_never_overfilled() {
    let mut vms = many(40);
    vms[7].name = "a-very-long-name-that-somebody-has-thought-of-for-a-machine".to_owned();
    vms[3].memory.max_pending_bytes = Some(100 * MIB);
    vms[4].accounting = false;
    let mut screen = screen(vms);
    for width in (1..30).chain((30..220).step_by(7)) {
        for height in [1, 2, 3, 5, 10, 13, 14, 24, 60] {
            text(&mut screen, width, height);
        }
    }
    // What there is least room for still says who uses how much.
    let narrow = text(&mut screen, 30, 24);
    assert!(narrow[2].starts_with("NAME") && narrow[2].contains("USED"), "{}", narrow[2]);
}

#[test]
fn long_names_are_cut_with_a_sign_of_it() {
    let long = "a-very-long-name-that-somebody-has-thought-of";
    let mut screen = screen(vec![vm(long, "/", 1), vm("b", "/", 2)]);
    let lines = text(&mut screen, 80, 24);
    assert!(names(&lines)[1].ends_with('…') && lines[4].starts_with("a-very"), "{}", lines[4]);
    screen.utf8 = false;
    let lines: Vec<_> = screen.lines(80, 24).iter().map(ToString::to_string).collect();
    assert!(lines.iter().all(|line| line.is_ascii()), "{lines:#?}");
    assert!(lines[4].contains('~'), "{}", lines[4]);
    screen.utf8 = true;
    assert_eq!(names(&text(&mut screen, 200, 24))[1].chars().count(), WIDEST[0]);
}

#[test]
fn keys_sort_and_the_same_key_again_sorts_the_other_way_round() {
    let mut vms = vec![vm("a", "/", 30), vm("b", "/", 10), vm("c", "/", 20)];
    vms[1].pressure.some.avg10 = 5.0;
    vms[2].held.total_us = 7;
    vms[0].memory.max_bytes = None;
    let mut screen = screen(vms);
    let mut order = |sort: Option<Sort>| {
        if let Some(sort) = sort {
            screen.sort_by(sort);
        }
        names(&text(&mut screen, 80, 24)).concat()
    };
    assert_eq!(order(None), "acb");
    assert_eq!(order(Some(Sort::Usage)), "bca", "again");
    assert_eq!(order(Some(Sort::Usage)), "acb");
    assert_eq!(order(Some(Sort::Pressure)), "bac");
    assert_eq!(order(Some(Sort::Held)), "cab");
    assert_eq!(order(Some(Sort::Name)), "abc");
    assert_eq!(order(Some(Sort::Share)), "cba", "one without a limit has no share");
}

#[test]
fn groups_are_gone_through_one_after_the_other() {
    let mut screen = screen(many(4));
    let mut shown = || {
        screen.next_group();
        let lines = text(&mut screen, 100, 24);
        (names(&lines).join(" "), lines[1].clone(), lines.last().expect("keys").clone())
    };
    let (gold, totals, keys) = shown();
    assert_eq!(gold, "vm-002 vm-000");
    assert!(keys.ends_with("g group: /gold"), "{keys}");
    assert_eq!(totals, "/gold  300M in use, no limit   pressure some 0.00 full 0.00");
    assert_eq!(shown().0, "vm-003 vm-001");
    assert_eq!(shown().0, "vm-003 vm-002 vm-001 vm-000");
    screen.group = Some("/silver".to_owned());
    assert_eq!(names(&text(&mut screen, 80, 24)), ["vm-003", "vm-001"], "of the groups in it, too");
    screen.group = Some("/sil".to_owned());
    assert!(text(&mut screen, 80, 24)[3].contains("no VM in /sil"));
}

#[test]
fn an_empty_host_says_how_to_make_a_vm_and_troubles_are_shown() {
    let mut screen = screen(Vec::new());
    let lines = text(&mut screen, 80, 24);
    assert!(lines[0].starts_with("ballast: 0 VMs ") && lines[3].contains("ballast create"), "{lines:#?}");
    screen.show(Vec::new(), vec!["the controller at /run/a.sock does not answer".to_owned()]);
    assert!(text(&mut screen, 80, 24)[2].contains("does not answer"), "what was known stays");
}

#[test]
fn a_page_has_all_of_them_and_nothing_to_press() {
    let lines: Vec<_> = screen(many(200)).page(100).iter().map(ToString::to_string).collect();
    assert_eq!(lines.len(), 203);
    assert!(lines[2].contains("GROUP") && lines[202].starts_with("vm-000"), "{}", lines[202]);
}

#[test]
fn times_fit_their_column() {
    for (us, expected) in [
        (0, "0"),
        (250_000, "0.2s"),
        (99_900_000, "99.9s"),
        (100_000_000, "1m40s"),
        (5_999_000_000, "99m59s"),
        (6_000_000_000, "1h40m"),
        (3_600_000_000_000, "1000h00m"),
    ] {
        assert_eq!(seconds(us), expected);
    }
}

//! The bytes of each message, as the builds of this version write them (`messages.hex`).
//!
//! A worker may be of an earlier build than its controller, so the bytes may change only together with [`VERSION`]. After
//! such a change `BALLAST_WRITE=1 cargo test -p ballast --lib protocol` writes the file anew; it does not do so for a
//! version that has been written before.

use std::fmt::Write as _;
use std::path::Path;

use super::*;

/// The numbers 1, 2, 3, …: no two fields have the same, so that those that change places are noticed.
struct Numbers(u64);

impl Numbers {
    fn next<N: TryFrom<u64>>(&mut self) -> N {
        self.0 += 1;
        N::try_from(self.0).ok().expect("fits")
    }
}

fn ram(n: &mut Numbers) -> RamSlot {
    RamSlot { gpa: n.next(), hva: n.next(), bytes: n.next(), stage: n.next() }
}

fn quantiles(n: &mut Numbers) -> Quantiles {
    Quantiles { count: n.next(), p50_us: n.next(), p99_us: n.next(), max_us: n.next() }
}

/// `odd` decides what is true: neighbours among the truth values differ.
fn report(n: &mut Numbers, odd: bool) -> Report {
    Report {
        answers: Some(n.next()),
        epoch: n.next(),
        granted_total: n.next(),
        returned_total: n.next(),
        guest: n.next(),
        stock: n.next(),
        reserve: n.next(),
        tables: n.next(),
        records: n.next(),
        debt: n.next(),
        ballooned: n.next(),
        store: n.next(),
        swapped: n.next(),
        idle: n.next(),
        want: n.next(),
        want_now: n.next(),
        balloon_actual: n.next(),
        oom_deflated: n.next(),
        balloon_ready: odd,
        held: !odd,
        paused: odd,
        held_us: n.next(),
        refault_us: n.next(),
        faults: FaultCounts {
            events: n.next(),
            stale: n.next(),
            touched: n.next(),
            around: n.next(),
            from_reserve: n.next(),
            unfilled: n.next(),
            implicit_deflates: n.next(),
            vmm: n.next(),
            discarded: n.next(),
            reported: n.next(),
            reported_back: n.next(),
            reported_left: n.next(),
            guest_errors: n.next(),
            answer: quantiles(n),
            hold: quantiles(n),
        },
        cold: cold(n, odd),
    }
}

fn cold(n: &mut Numbers, odd: bool) -> Cold {
    Cold {
        aim: n.next(),
        stuck: !odd,
        aged: n.next(),
        returned: n.next(),
        evicted: n.next(),
        refaulted: n.next(),
        read_around: n.next(),
        read_ahead: n.next(),
        incompressible: n.next(),
        hard: n.next(),
        file: n.next(),
        fetched: n.next(),
        failed_writes: n.next(),
        generation_ms: n.next(),
        working_set: Some(n.next()),
        error: n.next(),
        ages: std::array::from_fn(|_| n.next()),
        refaults: std::array::from_fn(|_| n.next()),
    }
}

fn to_worker() -> Vec<(&'static str, ToWorker)> {
    let messages = [
        ToWorker::Grant {
            epoch: 1,
            granted_total: 2,
            stock_max: 3,
            room: u64::MAX,
            swap_max: 4,
            store_max: 5,
            refused: true,
        },
        ToWorker::Recall { seq: 1 },
        ToWorker::Query { seq: 1 },
        ToWorker::Start,
        ToWorker::Pause { seq: 1 },
        ToWorker::Resume { seq: 1 },
        ToWorker::Activate { seq: 1, epoch: 2 },
        ToWorker::BalloonTarget { pages: 1 },
        ToWorker::PowerButton,
        ToWorker::Reclaim { aim: 1 },
    ];
    // A message that is new here has to be added above as well.
    let name = |message: &ToWorker| match message {
        ToWorker::Grant { .. } => "Grant",
        ToWorker::Recall { .. } => "Recall",
        ToWorker::Query { .. } => "Query",
        ToWorker::Start => "Start",
        ToWorker::Pause { .. } => "Pause",
        ToWorker::Resume { .. } => "Resume",
        ToWorker::Activate { .. } => "Activate",
        ToWorker::BalloonTarget { .. } => "BalloonTarget",
        ToWorker::PowerButton => "PowerButton",
        ToWorker::Reclaim { .. } => "Reclaim",
    };
    messages.into_iter().map(|message| (name(&message), message)).collect()
}

fn from_worker() -> Vec<(&'static str, FromWorker)> {
    let n = &mut Numbers(0);
    let hello = |odd, n: &mut Numbers| Hello {
        instance: n.next(),
        ram: [ram(n), ram(n)],
        store: Area { hva: n.next(), bytes: n.next() },
        pool: Area { hva: n.next(), bytes: n.next() },
        reserve_target: n.next(),
        accounting: odd,
        loaded: Some(n.next()),
        started: !odd,
        paused: odd,
        report: report(n, odd),
    };
    let exits =
        [ExitReason::PowerOff, ExitReason::Reset, ExitReason::Status(7), ExitReason::TripleFault, ExitReason::Error];
    let mut messages = vec![
        FromWorker::Hello(hello(true, n)),
        FromWorker::Report(report(&mut Numbers(0), false)),
        FromWorker::Activated { seq: 1, resident: 2, reserve_target: 3 },
        FromWorker::NotActivated { seq: 1, message: "no".to_owned() },
        FromWorker::Loaded { plan: 1 },
        FromWorker::GuestStats(GuestStats { values: std::array::from_fn(|tag| Some(tag as u64)), age_ms: 99 }),
        FromWorker::Failed { message: "no".to_owned(), smallest_max: Some(1) },
    ];
    messages.extend(exits.map(FromWorker::Exited));
    let name = |message: &FromWorker| match message {
        FromWorker::Hello(_) => "Hello",
        FromWorker::Report(_) => "Report",
        FromWorker::Activated { .. } => "Activated",
        FromWorker::NotActivated { .. } => "NotActivated",
        FromWorker::Loaded { .. } => "Loaded",
        FromWorker::GuestStats(_) => "GuestStats",
        FromWorker::Failed { .. } => "Failed",
        FromWorker::Exited(reason) => match reason {
            ExitReason::PowerOff => "Exited PowerOff",
            ExitReason::Reset => "Exited Reset",
            ExitReason::Status(_) => "Exited Status",
            ExitReason::TripleFault => "Exited TripleFault",
            ExitReason::Error => "Exited Error",
        },
    };
    messages.into_iter().map(|message| (name(&message), message)).collect()
}

fn bytes<M: Serialize>(messages: &[(&str, M)]) -> String {
    let mut text = String::new();
    for (name, message) in messages {
        let mut buffer = [0; MAX_MESSAGE];
        let [_version, rest @ ..] = encode(message, &mut buffer) else { unreachable!("it is led by the version") };
        let hex: String = rest.iter().map(|byte| format!("{byte:02x}")).collect();
        writeln!(text, "{name}: {hex}").expect("a string");
    }
    text
}

/// What a check of the bytes says, given what stands in the file.
fn verdict(file: &str, now: &str) -> Result<(), String> {
    let version = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    if file == now {
        Ok(())
    } else if version(file) == version(now) {
        let changed = now.lines().filter(|line| !file.lines().any(|old| old == *line));
        let changed: Vec<_> = changed.filter_map(|line| line.split_once(':')).map(|(name, _)| name).collect();
        Err(format!(
            "messages have other bytes than before ({}): give protocol::VERSION a new number",
            changed.join(", ")
        ))
    } else {
        Err("a new version: BALLAST_WRITE=1 cargo test -p ballast --lib protocol".to_owned())
    }
}

#[test]
fn the_bytes_of_messages_change_only_with_the_version() {
    let now = format!("version {VERSION}\n{}{}", bytes(&to_worker()), bytes(&from_worker()));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/worker/protocol/messages.hex");
    let file = std::fs::read_to_string(&path).unwrap_or_default();
    let found = verdict(&file, &now);
    let newer = file.lines().next() != now.lines().next();
    if found.is_err() && newer && std::env::var_os("BALLAST_WRITE").is_some() {
        std::fs::write(&path, now).expect("written");
    } else {
        found.unwrap();
    }
}

#[test]
fn a_change_without_a_new_version_is_told_by_its_message() {
    let file = "version 2\nStart: 03\nPause: 0401\n";
    assert_eq!(verdict(file, file), Ok(()));
    let said = verdict(file, "version 2\nStart: 03\nPause: 040102\n").unwrap_err();
    assert!(said.contains("(Pause)") && said.contains("VERSION"), "{said}");
    assert!(verdict(file, "version 3\nStart: 03\nPause: 040102\n").unwrap_err().contains("BALLAST_WRITE"));
}

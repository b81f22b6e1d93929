//! A worker that lies, beside an honest one: whatever it says, nobody else is charged, the account stays right, the actor
//! answers, and the liar is ended at its first word that cannot be true, and not before.

use memcg_core::frame::Cost;

use super::super::super::actor::answer;
use super::super::super::{Changed, MemoryChange};
use super::super::*;
use super::{Case, Random, inputs, seed};
use crate::controller::view::VmState;
use crate::controller::{cold, overhead};
use crate::worker::protocol::{GuestStats, MAX_SLOTS};

/// What all VMs may use.
const BUDGET: u64 = 6000;

/// What may be asked of a VM that goes on, and what ends it.
const HARMLESS: &[&str] = &["pause", "resume", "show", "lower", "raise", "force", "refuse"];
const FATAL: &[&str] = &["kill", "remove"];

/// What the actor knows.
#[derive(Debug)]
struct Facts {
    violations: Vec<String>,
    used: u64,
    honest: u64,
    liar: Option<Liar>,
}

/// What it knows of the liar while that is there.
#[derive(Clone, Debug)]
struct Liar {
    usage: u64,
    granted: u64,
    returned: u64,
    report: Report,
    starting: bool,
    doomed: bool,
    ended: bool,
}

async fn facts(controller: &Controller, honest: VmId, liar: VmId) -> Facts {
    let facts = controller.ask(move |actor, reply| {
        let usage = |node| actor.tree.snapshot(node).memory.usage.0;
        let liar = actor.vms.get(&liar).map(|vm| Liar {
            usage: usage(vm.node),
            granted: vm.granted_total,
            returned: vm.returned_total,
            report: vm.report,
            starting: vm.state == VmState::Starting,
            doomed: vm.cause.is_some(),
            ended: vm.state == VmState::Ended,
        });
        let violations = actor.tree.check().iter().map(ToString::to_string).collect();
        let facts = Facts { violations, used: usage(actor.root), honest: usage(actor.vms[&honest].node), liar };
        answer(reply, Ok(facts));
    });
    tokio::time::timeout(Duration::from_secs(1), facts).await.expect("the actor answers").expect("it lives")
}

/// What is said or done in one step.
#[derive(Clone, Debug)]
enum Step {
    Says(Box<FromLink>),
    Asks(&'static str),
    Dies,
    Waits(Duration),
    Reads,
}

/// A report that is true but for a few numbers.
fn report(random: &mut Random, liar: &Liar) -> Report {
    let mut report =
        Report { answers: None, granted_total: liar.granted, returned_total: liar.returned, ..liar.report };
    let charged = liar.granted - liar.returned;
    // True: what it has is somewhere, and what it gives back is gone.
    let (before, most) = (overhead::grown(&liar.report), Cost::most(Pages(SIZE)));
    let free = charged - before.total().0;
    let back = if random.once_in(3) { random.next() % (free + 1) } else { 0 };
    report.returned_total += back;
    let left = free - back;
    let paid = (random.next() % (most.tables.0 - before.tables.0 + 1)).min(left);
    report.tables += paid;
    report.guest = random.next() % (left - paid + 1);
    report.store = random.next() % (left - paid - report.guest + 1);
    report.stock = left - paid - report.guest - report.store;
    report.idle = random.next() % (report.guest + 1);
    report.swapped = random.next() % (SIZE + 1);
    report.reserve = 0;
    report.want = random.next() % 5000;
    let known = [liar.granted, liar.returned, charged, liar.report.granted_total, SIZE, RESERVE, liar.usage];
    // What nobody can check.
    for _ in 0..random.below(4) {
        let value = random.number(&known);
        match random.below(14) {
            0 => report.answers = Some(random.below(12) as u32),
            1 => report.epoch = value as u32,
            2 => report.debt = value,
            3 => report.want = value,
            4 => report.want_now = value,
            5 => report.balloon_actual = value as u32,
            6 => report.held = !report.held,
            7 => report.paused = !report.paused,
            8 => report.faults.guest_errors = value,
            9 => report.cold.aim = value,
            10 => report.cold.stuck = !report.cold.stuck,
            11 => (report.cold.evicted, report.cold.working_set) = (value, Some(value)),
            12 => report.refault_us = value,
            _ => report.held_us = value,
        }
    }
    // What the controller has counted itself.
    if random.once_in(12) {
        let value = random.number(&known);
        match random.below(11) {
            6 => report.tables = value,
            7 => report.records = value,
            8 => report.store = value,
            9 => report.swapped = value,
            10 => report.idle = value,
            0 => report.granted_total = value,
            1 => report.returned_total = value,
            2 => report.guest = value,
            3 => report.stock = value,
            4 => report.reserve = value,
            _ => report.ballooned = value,
        }
    }
    report
}

fn says(random: &mut Random, liar: &Liar) -> FromLink {
    let known = [liar.granted, SIZE, RESERVE, SIZE * 4096, 1, 2, 3];
    let number = |random: &mut Random| random.number(&known);
    let message = match random.below(40) {
        0 if random.once_in(4) => {
            let mut ram = [RamSlot::default(); MAX_SLOTS];
            for slot in &mut ram {
                *slot =
                    RamSlot { gpa: number(random), hva: number(random), bytes: number(random), stage: number(random) };
            }
            FromWorker::Hello(Hello { ram, reserve_target: number(random), ..hello(random.once_in(2)) })
        }
        1 if random.once_in(4) => FromWorker::Loaded { plan: number(random) },
        2 if random.once_in(4) => {
            let (seq, resident) = (number(random) as u32, number(random));
            FromWorker::Activated { seq, resident, reserve_target: number(random) }
        }
        3 if random.once_in(4) => {
            FromWorker::NotActivated { seq: number(random) as u32, message: "\u{7}\n".repeat(random.below(250)) }
        }
        4 | 5 => {
            let values = [0; 16].map(|_| random.once_in(2).then(|| number(random)));
            FromWorker::GuestStats(GuestStats { values, age_ms: number(random) })
        }
        6 if random.once_in(4) => {
            FromWorker::Failed { message: "\u{1b}[2J\n".to_owned(), smallest_max: Some(number(random)) }
        }
        7 if random.once_in(4) => FromWorker::Exited(ExitReason::Status(random.next() as u8)),
        8 if random.once_in(4) => return FromLink::Garbage("none".to_owned()),
        9 if random.once_in(4) => return FromLink::Closed,
        _ => FromWorker::Report(report(random, liar)),
    };
    FromLink::Message(message)
}

fn step(random: &mut Random, liar: &Liar) -> Step {
    match random.below(20) {
        0 => Step::Asks(HARMLESS[random.below(HARMLESS.len())]),
        1 if random.once_in(10) => Step::Asks(FATAL[random.below(FATAL.len())]),
        2 if random.once_in(20) => Step::Dies,
        3 => Step::Waits(Duration::from_millis(random.next() % 12_000)),
        4..=6 => Step::Reads,
        _ => Step::Says(Box::new(says(random, liar))),
    }
}

/// Whether this cannot be true, by what the controller has itself granted and heard.
fn is_lie(liar: &Liar, item: &FromLink) -> Option<bool> {
    let message = match item {
        FromLink::Garbage(_) => return Some(true),
        FromLink::Closed => return None,
        FromLink::Message(message) => message,
    };
    match message {
        FromWorker::Hello { .. } => Some(true),
        FromWorker::Loaded { .. } => Some(!liar.starting),
        // It was accounted from the start: nobody has asked for it.
        FromWorker::Activated { .. } | FromWorker::NotActivated { .. } => Some(true),
        FromWorker::GuestStats(_) => Some(false),
        // Its own end; whether it is true is nobody's business.
        FromWorker::Failed { .. } | FromWorker::Exited(_) => None,
        FromWorker::Report(report) => {
            let Report { guest, stock, reserve, store, returned_total, tables, records, .. } = *report;
            let held: u128 =
                [guest, stock, reserve, store, returned_total, tables, records].map(u128::from).iter().sum();
            let (before, most) = (overhead::grown(&liar.report), Cost::most(Pages(SIZE)));
            Some(
                report.granted_total > liar.granted
                    || report.granted_total < liar.report.granted_total
                    || report.returned_total < liar.returned
                    || held > u128::from(report.granted_total)
                    || !(before.tables.0..=most.tables.0).contains(&tables)
                    || !(before.records.0..=most.records.0).contains(&records)
                    || report.ballooned > SIZE
                    || report.idle > guest
                    || report.swapped > SIZE
                    || store > cold::most_stored(Pages(SIZE)).0,
            )
        }
    }
}

/// Asks for something without waiting for the answer.
fn ask(controller: &Controller, what: &'static str) {
    let controller = controller.clone();
    let limit = |max: u64, mode| {
        let patch = LimitPatch { max: Some(pages(max)), ..LimitPatch::default() };
        MemoryChange { patch, mode, track: None, wait: Some(Duration::from_secs(3)) }
    };
    tokio::spawn(async move {
        use memcg_core::limit_change::Mode;
        let changed = match what {
            "lower" => controller.change("liar", limit(700, Mode::Reclaim)).await,
            "raise" => controller.change("liar", limit(5000, Mode::Reclaim)).await,
            "force" => controller.change("liar", limit(300, Mode::Force)).await,
            "refuse" => controller.change("liar", limit(500, Mode::Refuse)).await,
            "remove" => return drop(controller.remove("liar").await),
            _ => {
                let view = match what {
                    "pause" => controller.pause("liar").await,
                    "resume" => controller.resume("liar").await,
                    "kill" => controller.kill("liar").await,
                    _ => controller.show("liar").await,
                };
                return drop(view);
            }
        };
        // Whether it was done is not the question.
        drop::<Result<Changed, Refusal>>(changed);
    });
}

/// A VM that runs and has reported once.
async fn running(controller: &Controller, name: &str) -> FakeWorker {
    let overhead = super::super::cost([(Overhead::ALL[0], 9)]);
    let mut worker = FakeWorker::add_to(controller, name, Setup { overhead, ..Setup::default() }).await.expect("added");
    worker.hello().await;
    worker.say(FromWorker::Loaded { plan: 0 }).await;
    while worker.try_next().await.is_some() {}
    worker.tell().await;
    worker
}

/// One life of a liar: returns how many messages it has sent, and whether it was caught.
async fn life(mut random: Random) -> (u64, bool) {
    let (controller, _) = Controller::start(pages(BUDGET));
    let mut honest = running(&controller, "honest").await;
    honest.touch(600).await;
    let mut liar = running(&controller, "liar").await;
    let before = facts(&controller, honest.id, liar.id).await;
    let mut known = before.liar.clone().expect("it runs");
    let (mut sent, mut caught) = (0, false);
    for _ in 0..40 {
        let step = step(&mut random, &known);
        let _case = Case { kind: "lies", seed: 0, input: &step };
        let mut lie = None;
        match &step {
            Step::Says(item) => {
                lie = if known.doomed || known.ended { None } else { is_lie(&known, item) };
                sent += 1;
                controller.heard(liar.id, (**item).clone()).await;
            }
            Step::Asks(what) => {
                ask(&controller, what);
                // So that what is known afterwards includes it.
                tokio::task::yield_now().await;
            }
            Step::Dies => controller.worker_died(liar.id, Death::Signal(9)).await,
            Step::Waits(time) => tokio::time::advance(*time).await,
            Step::Reads => while liar.inbox.try_recv().is_ok() {},
        }
        let now = facts(&controller, honest.id, liar.id).await;
        assert_eq!(now.violations, [] as [String; 0], "after {step:?} with {known:?}");
        assert_eq!(now.honest, before.honest, "the honest one is charged: {step:?} with {known:?}");
        assert!(now.used <= BUDGET, "{now:?}");
        assert!(!honest.killed());
        let Some(of_liar) = now.liar else { break };
        assert!(of_liar.ended || of_liar.usage == of_liar.granted - of_liar.returned + 9, "{of_liar:?}");
        match lie {
            Some(true) => {
                assert!(liar.killed() && of_liar.doomed, "believed: {step:?} with {known:?}");
                caught = true;
            }
            Some(false) => assert!(!liar.killed(), "ended for the truth: {step:?} with {known:?}"),
            None => {}
        }
        known = of_liar;
        if caught && random.once_in(3) {
            break;
        }
    }
    // The honest one is served as before.
    honest.touch(100).await;
    assert_eq!(facts(&controller, honest.id, liar.id).await.violations, [] as [String; 0]);
    (sent, caught)
}

#[tokio::test(start_paused = true)]
async fn a_liar_is_ended_and_harms_nobody() {
    let count = inputs(6000);
    let (mut messages, mut lives, mut caught) = (0, 0, 0);
    while messages < count {
        let seed = seed().wrapping_add(lives);
        let _case = Case { kind: "lies", seed, input: &"the whole life" };
        let (sent, was_caught) = life(Random::new(seed)).await;
        messages += sent.max(1);
        caught += u64::from(was_caught);
        lives += 1;
    }
    println!("FUZZ lies inputs={messages} lives={lives} caught={caught}");
    assert!(count < 1000 || (caught > lives / 10 && caught < lives), "lives of one kind only");
}

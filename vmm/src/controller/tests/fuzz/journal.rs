//! Journals: damaged lines are refused, with their number, or mean something that a controller can begin with; what it
//! then writes means the same to the next.

use std::io;
use std::path::Path;
use std::sync::Mutex;

use super::super::super::actor::answer;
use super::super::super::journal::{Journal, Store};
use super::super::*;
use super::{Case, Random, inputs, mutate, seed};

/// A journal in memory.
#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn text(&self) -> Vec<u8> {
        self.0.lock().expect("no panic").clone()
    }
}

impl Store for Memory {
    fn make_room(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn append(&mut self, line: &[u8]) -> io::Result<u64> {
        let mut text = self.0.lock().expect("no panic");
        text.extend(line);
        Ok(text.len() as u64)
    }

    fn replace(&mut self, lines: &[u8]) -> io::Result<u64> {
        *self.0.lock().expect("no panic") = lines.to_vec();
        Ok(lines.len() as u64)
    }
}

const LIMITS: &str = r#"{"min":0,"low":0,"high":null,"max":16777216,"swap_max":null,"store_max":null,"vmm_max":null}"#;

/// One line of each kind, in an order that makes sense.
fn example() -> Vec<String> {
    let config = |size: u64| format!(r#"{{"kernel":"/k","memory":{{"size_bytes":{size}}}}}"#);
    let made = |vm: &str, group: &str, size| {
        let config = config(size);
        format!(r#"{{"made":{{"vm":"{vm}","group":"{group}","instance":7,"accounting":true,"config":{config}}}}}"#)
    };
    let limits =
        |node: &str| format!(r#"{{"limits":{{"nodes":[{{"node":"{node}","generation":3,"limits":{LIMITS}}}]}}}}"#);
    vec![
        r#"{"life":{"format":1,"epoch":4}}"#.to_owned(),
        format!(r#"{{"group":{{"path":"/gold","accounting":true,"limits":{LIMITS}}}}}"#),
        format!(r#"{{"group":{{"path":"/gold/web","accounting":false,"limits":{LIMITS}}}}}"#),
        format!(r#"{{"group":{{"path":"/away","accounting":false,"limits":{LIMITS}}}}}"#),
        made("vm1", "/gold/web", 64 << 20),
        made("vm2", "/", 128 << 20),
        made("vm3", "/gold", 32 << 20),
        limits("vm1"),
        limits("/gold"),
        limits("/"),
        r#"{"tracked":{"group":"/gold/web"}}"#.to_owned(),
        r#"{"paused":{"vm":"vm1","by":"user"}}"#.to_owned(),
        r#"{"paused":{"vm":"vm2","by":"policy"}}"#.to_owned(),
        r#"{"resumed":{"vm":"vm2"}}"#.to_owned(),
        r#"{"moved":{"node":"/gold/web","to":"/web"}}"#.to_owned(),
        r#"{"moved":{"node":"vm2","to":"/web"}}"#.to_owned(),
        r#"{"ended":{"vm":"vm3","how":"it was killed on request"}}"#.to_owned(),
        r#"{"group_gone":{"path":"/away"}}"#.to_owned(),
        r#"{"gone":{"vm":"vm3"}}"#.to_owned(),
    ]
}

/// Lines in another order, twice, not at all, changed, or the last one cut off.
fn damage(random: &mut Random) -> Vec<u8> {
    let mut lines = example();
    let words =
        ["/", "/gold", "vm1", "../..", "\"", "{", "}", "null", "18446744073709551615", "/a/b/c/d/e/f/g/h/i", "move"];
    for _ in 0..random.below(4) {
        let (at, other) = (random.below(lines.len()), random.below(lines.len()));
        match random.below(4) {
            0 => lines.swap(at, other),
            1 => lines.insert(at, lines[other].clone()),
            2 if lines.len() > 1 => drop(lines.remove(at)),
            _ => {
                let mut bytes = lines[at].clone().into_bytes();
                mutate(&mut bytes, random, &words, lines[other].as_bytes());
                lines[at] = String::from_utf8_lossy(&bytes).into_owned();
            }
        }
    }
    let mut text = (lines.join("\n") + "\n").into_bytes();
    if random.once_in(4) {
        text.truncate(random.below(text.len()));
    }
    if random.once_in(20) {
        mutate(&mut text, random, &words, &[0, 0xff, b'\n']);
    }
    text
}

/// True when a controller begins with it.
async fn begins(text: &[u8]) -> bool {
    let store = Memory::default();
    let (remembered, journal) = match Journal::reopen(text, Box::new(store.clone())) {
        Ok(opened) => opened,
        Err((line, why)) => {
            assert!(line > 0 && !why.is_empty(), "line {line}: {why}");
            return false;
        }
    };
    let (again, _) = Journal::reopen(&store.text(), Box::new(Memory::default())).expect("its own words");
    assert!(again.vms().eq(remembered.vms()) && again.groups().eq(remembered.groups()), "{again:?} {remembered:?}");
    let (controller, _) = Controller::start_with(Limit::Max, journal);
    // Groups that contradict each other are refused here: the controller does not begin, and says why.
    let taken_over = controller.take_over(Path::new("/nowhere"), &remembered).await;
    let violations = controller.ask(|actor, reply| {
        let violations: Vec<_> = actor.tree.check().iter().map(ToString::to_string).collect();
        answer(reply, Ok(violations));
    });
    assert_eq!(violations.await.expect("the actor lives"), Vec::<String>::new());
    taken_over.is_ok()
}

#[test]
fn every_journal_is_refused_or_can_be_begun_with() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    let runtime = runtime.expect("a runtime");
    let example = example().join("\n") + "\n";
    assert!(runtime.block_on(begins(example.as_bytes())), "the example itself");
    let count = inputs(2000);
    let mut begun = 0;
    for number in 0..count {
        let text = damage(&mut Random::new(seed().wrapping_add(number)));
        let shown = String::from_utf8_lossy(&text);
        let _case = Case { kind: "journal", seed: seed().wrapping_add(number), input: &shown };
        begun += u64::from(runtime.block_on(begins(&text)));
    }
    println!("FUZZ journal inputs={count} begun={begun} refused={}", count - begun);
    assert!(count < 1000 || (begun > count / 20 && begun < count), "inputs of one kind only: {begun} of {count}");
}

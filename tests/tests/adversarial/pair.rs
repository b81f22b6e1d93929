//! A hostile guest and a well-behaved one under one controller, and somebody who looks at the hostile one all the time.

use std::sync::atomic::{AtomicBool, Ordering};

use ballast_tests::serve::{Console, Serve};
use ballast_tests::{PAGE, http, number, payload, resident_pages, wait_until};
use serde_json::{Value, json};

use super::MIB;

/// RAM of each guest, and the hostile one's limit.
const SIZE: u64 = 128 * MIB;
pub const MAX: u64 = 96 * MIB;

/// Both VMs: `evil`, which runs what the test types, and `good`, whose memory holds a pattern.
pub struct Pair {
    pub serve: Serve,
    console: Console,
    good: Console,
}

impl Pair {
    /// Starts both. `balloon` is the configuration of the hostile one's balloon.
    pub fn start(balloon: Value) -> Self {
        let serve = Serve::start(&[]);
        let config = json!({
            "kernel": payload(), "cmdline": "shell", "debug_port": true, "cpus": 2,
            "memory": { "size_bytes": SIZE, "max_bytes": MAX },
        });
        let mut evil = config.clone();
        evil["balloon"] = balloon;
        let [mut console, mut good] = [("evil", evil), ("good", config)].map(|(name, config)| {
            let console = Console::of(&serve.create_with(name, &config));
            console.expect("READY", 20);
            console
        });
        command(&mut good, "touch 16M 48M seed=5 full=1");
        command(&mut console, "balloon init");
        Self { serve, console, good }
    }

    /// Lets the hostile guest do all that, one after the other, while its usage is watched.
    pub fn attack(&mut self, commands: &[&str]) -> Vec<String> {
        let done = AtomicBool::new(false);
        let socket = self.serve.socket();
        std::thread::scope(|scope| {
            let (watch, socket) = (&done, &socket);
            scope.spawn(move || {
                while !watch.load(Ordering::Relaxed) {
                    let (status, body) = http(socket, "GET", "/vms/evil", None).expect("the controller answers");
                    assert_eq!(status, 200, "{body}");
                    within(&serde_json::from_str(&body).expect("JSON"));
                }
            });
            // The watcher must end with this test also when it fails: the scope waits for it.
            let attack = || commands.iter().map(|line| command(&mut self.console, line)).collect();
            let answers = std::panic::catch_unwind(std::panic::AssertUnwindSafe(attack));
            done.store(true, Ordering::Relaxed);
            answers.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Types a line that the hostile guest does not answer at once.
    pub fn send(&mut self, line: &str) {
        self.console.send(line);
    }

    /// Waits for the hostile guest's answer to that.
    pub fn answer(&mut self) -> String {
        answer(&self.console, "what was sent")
    }

    /// The hostile VM, at rest, after it was found alive, exactly charged and below its limit, a sane driver was found to
    /// work in it, and the other guest to have noticed nothing.
    pub fn recover(&mut self) -> Value {
        let before = self.rest();
        command(&mut self.console, "balloon init");
        command(&mut self.console, "touch 64M 4M seed=6");
        let touched = self.rest();
        command(&mut self.console, "balloon inflate 64M 4M");
        let given = self.rest();
        let guest = |vm: &Value| number(vm, "memory.stat.guest_bytes");
        // The driver's queues may be new to it as well.
        assert!(guest(&touched) - guest(&given) >= 4 * MIB - 16 * PAGE, "{touched} then {given}");
        command(&mut self.console, "balloon deflate 64M 4M");
        command(&mut self.good, "verify 16M 48M seed=5 full=1");
        command(&mut self.good, "touch 64M 4M seed=7");
        let good = self.serve.show("good");
        assert_eq!((number(&good, "faults.guest_errors"), &good["state"]), (0, &json!("running")), "{good}");
        assert_eq!(number(&before, "pid"), number(&given, "pid"), "it is the same worker");
        before
    }

    /// What the hostile VM shows when every charge is a resident page.
    pub fn rest(&self) -> Value {
        wait_until("every charge is a resident page", 10, || {
            let vm = self.serve.show("evil");
            within(&vm);
            (number(&vm, "memory.stat.guest_bytes") == resident_pages(&vm) * PAGE).then_some(vm)
        })
    }
}

fn within(vm: &Value) {
    let (usage, max) = (number(vm, "memory.current_bytes"), number(vm, "memory.max_bytes"));
    assert!(usage <= max, "usage {usage} above max {max}: {vm}");
    assert_eq!(number(vm, "memory.stat.overcharge_bytes"), 0, "{vm}");
}

/// Types a command that must succeed; its answer.
fn command(console: &mut Console, line: &str) -> String {
    console.send(line);
    answer(console, line)
}

fn answer(console: &Console, line: &str) -> String {
    loop {
        let answer = console.expect("", 60);
        assert!(!answer.starts_with("ERR"), "{line}: {answer}");
        if answer.starts_with("OK") {
            return answer;
        }
    }
}

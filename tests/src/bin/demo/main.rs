//! The demonstration behind `scripts/demo`: a guest that meets its limit, gets a higher one while it runs, and loses
//! nothing; one whose cold memory is taken without its help; and forty guests of one controller that lose nothing either
//! when others, or it, are killed.
//!
//! `demo native` and `demo cold` run a freestanding guest; `demo fleet` forty of them; `demo linux KERNEL INITRD` and `demo
//! cold KERNEL INITRD` a Debian kernel. Every step ends in one line `DEMO <step> PASS|FAIL|SKIP key=value …`. A step that
//! fails ends the scene, and the steps behind it are skipped; but the steps of a cold scene look at what has been played
//! already, and each is looked at.

mod cold;
mod fleet;
mod pressure;
mod single;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

const MIB: u64 = 1 << 20;

fn main() -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.payload_as_str().unwrap_or("an unknown failure");
        eprintln!("{}demo: {message}", clear());
    }));
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (tally, arguments) = match arguments[..] {
        ["--tally", file, ref scene @ ..] => (Some(Path::new(file)), scene.to_vec()),
        _ => (None, arguments),
    };
    if let ["hog", bytes] = arguments[..] {
        pressure::hog(bytes.parse().expect("a number of bytes"));
    }
    let scene = |steps: &[&'static str], failed, play: fn(&mut Step, &[&str])| {
        scene(steps, failed, tally, |step| play(step, &arguments[1..]))
    };
    let ok = match arguments[..] {
        ["native"] => {
            scene(&["native-limit", "native-raise", "native-verify"], Failed::Ends, |step, _| single::native(step))
        }
        ["cold"] => scene(&cold::STEPS, Failed::GoesOn, |step, _| cold::native(step)),
        ["cold", _, _] => scene(&cold::LINUX_STEPS, Failed::GoesOn, |step, files| {
            cold::linux(step, Path::new(files[0]), Path::new(files[1]));
        }),
        ["pressure"] => scene(&pressure::STEPS, Failed::Ends, |step, _| pressure::native(step)),
        ["pressure", _, _] => scene(&pressure::LINUX_STEPS, Failed::Ends, |step, files| {
            pressure::linux(step, Path::new(files[0]), Path::new(files[1]));
        }),
        ["fleet"] => scene(&fleet::STEPS, Failed::Ends, |step, _| fleet::fleet(step)),
        ["linux", _, _] => scene(
            &["linux-boot", "linux-lower", "linux-raise", "linux-verify", "linux-poweroff"],
            Failed::Ends,
            |step, files| {
                single::linux(step, Path::new(files[0]), Path::new(files[1]));
            },
        ),
        _ => {
            eprintln!(
                "usage: demo native | demo fleet | demo pressure [KERNEL INITRD] | demo cold [KERNEL INITRD] | demo linux KERNEL INITRD"
            );
            return ExitCode::from(2);
        }
    };
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Reports the end of a step: its name, whether it passed, and the numbers.
type Step<'a> = dyn FnMut(&'static str, bool, &str) + 'a;

/// What a step that failed does to its scene.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Failed {
    /// The steps behind it cannot be played.
    Ends,
    /// They do not depend on it.
    GoesOn,
}

/// Plays a scene. Steps that it did not reach are printed as skipped. The lines of its steps go to the end of `tally` too.
fn scene(steps: &[&'static str], failed: Failed, tally: Option<&Path>, play: impl FnOnce(&mut Step)) -> bool {
    let mut done: Vec<(&str, bool)> = Vec::new();
    let reached = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        play(&mut |step, pass, numbers| {
            let word = if pass { "PASS" } else { "FAIL" };
            say(tally, &format!("DEMO {step} {word} {numbers}"));
            done.push((step, pass));
            assert!(pass || failed == Failed::GoesOn, "step {step} failed");
        });
    }));
    let ended_by_step = failed == Failed::Ends && done.iter().any(|(_, pass)| !pass);
    if reached.is_err()
        && !ended_by_step
        && let Some(step) = steps.get(done.len())
    {
        say(tally, &format!("DEMO {step} FAIL reason=see-the-messages-above"));
        done.push((step, false));
    }
    for step in &steps[done.len()..] {
        say(tally, &format!("DEMO {step} SKIP reason=an-earlier-step-failed"));
    }
    done.len() == steps.len() && done.iter().all(|(_, pass)| *pass)
}

/// Says how a step ended.
fn say(tally: Option<&Path>, line: &str) {
    println!("{}{line}", clear());
    let Some(file) = tally else { return };
    let kept = std::fs::OpenOptions::new().append(true).create(true).open(file);
    if let Err(error) = kept.and_then(|mut file| writeln!(file, "{line}")) {
        eprintln!("demo: {}: {error}", file.display());
    }
}

/// On a terminal, what erases the live line; nothing in a pipe.
fn clear() -> &'static str {
    if std::io::stdout().is_terminal() { "\r\x1b[K" } else { "" }
}

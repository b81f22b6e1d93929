//! The demonstration behind `scripts/demo`: a guest that meets its limit, gets a higher one while it runs, and loses
//! nothing; one whose cold memory is taken without its help; and forty guests of one controller that lose nothing either
//! when others, or it, are killed.
//!
//! `demo native` and `demo cold` run a freestanding guest; `demo fleet` forty of them; `demo linux KERNEL INITRD` and `demo
//! cold KERNEL INITRD` a Debian kernel. Every step ends in one line `DEMO <step> PASS|FAIL|SKIP key=value …`; a step that fails ends the scene, and the steps behind
//! it are skipped.

mod cold;
mod fleet;
mod single;

use std::io::IsTerminal;
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
    let ok = match arguments[..] {
        ["native"] => scene(&["native-limit", "native-raise", "native-verify"], single::native),
        ["cold"] => scene(&cold::STEPS, cold::native),
        ["cold", kernel, initrd] => {
            scene(&cold::LINUX_STEPS, |step| cold::linux(step, Path::new(kernel), Path::new(initrd)))
        }
        ["fleet"] => scene(&fleet::STEPS, fleet::fleet),
        ["linux", kernel, initrd] => {
            scene(&["linux-boot", "linux-lower", "linux-raise", "linux-verify", "linux-poweroff"], |step| {
                single::linux(step, Path::new(kernel), Path::new(initrd))
            })
        }
        _ => {
            eprintln!("usage: demo native | demo fleet | demo cold [KERNEL INITRD] | demo linux KERNEL INITRD");
            return ExitCode::from(2);
        }
    };
    if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Reports the end of a step: its name, whether it passed, and the numbers.
type Step<'a> = dyn FnMut(&'static str, bool, &str) + 'a;

/// Plays a scene. Steps that it did not reach are printed as skipped.
fn scene(steps: &[&'static str], play: impl FnOnce(&mut Step) + std::panic::UnwindSafe) -> bool {
    let mut done: Vec<(&str, bool)> = Vec::new();
    let reached = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        play(&mut |step, pass, numbers| {
            let word = if pass { "PASS" } else { "FAIL" };
            println!("{}DEMO {step} {word} {numbers}", clear());
            done.push((step, pass));
            assert!(pass, "step {step} failed");
        });
    }));
    if reached.is_err()
        && done.iter().all(|(_, pass)| *pass)
        && let Some(step) = steps.get(done.len())
    {
        println!("{}DEMO {step} FAIL reason=see-the-messages-above", clear());
        done.push((step, false));
    }
    for step in &steps[done.len()..] {
        println!("DEMO {step} SKIP reason=an-earlier-step-failed");
    }
    done.len() == steps.len() && done.iter().all(|(_, pass)| *pass)
}

/// On a terminal, what erases the live line; nothing in a pipe.
fn clear() -> &'static str {
    if std::io::stdout().is_terminal() { "\r\x1b[K" } else { "" }
}

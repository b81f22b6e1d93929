//! The systemd units in `scripts/systemd`: systemd understands them, and what they start is what the program has.

use std::path::{Path, PathBuf};
use std::process::Command;

use ballast_tests::{ballast, skip};

fn units() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/systemd")
}

/// The program of a unit is where it is installed; here it is the one that was built.
fn with_our_program(name: &str, place: &Path) -> PathBuf {
    let text = std::fs::read_to_string(units().join(name)).expect("a unit");
    assert!(text.contains("/usr/local/bin/ballast "), "{name} starts the installed program");
    let path = place.join(name);
    let program = ballast();
    let text = text.replace("/usr/local/bin/ballast", program.to_str().expect("a path that is text"));
    std::fs::write(&path, text).expect("a copy");
    path
}

#[test]
fn systemd_has_nothing_to_say_about_the_units() {
    if let Err(reason) = Command::new("systemd-analyze").arg("--version").output() {
        skip("systemd-units", format_args!("systemd-analyze: {reason}"));
        return;
    }
    let place = tempfile::tempdir().expect("a temporary directory");
    let service = with_our_program("ballast.service", place.path());
    let template = with_our_program("ballast-vm@.service", place.path());
    let instance = place.path().join("ballast-vm@web.service");
    std::fs::rename(template, &instance).expect("an instance of it");
    for unit in [service, instance] {
        let mut command = Command::new("systemd-analyze");
        let said = command.args(["verify", "--man=no", "--recursive-errors=no"]).arg(&unit).output().expect("it runs");
        let err = String::from_utf8_lossy(&said.stderr);
        assert!(said.status.success() && err.is_empty(), "{}: {err}", unit.display());
    }
}

/// The words after the program are taken apart by the program itself: with a word more that it does not have, that one is
/// what it complains about.
#[test]
fn what_the_units_start_are_words_that_the_program_has() {
    for name in ["ballast.service", "ballast-vm@.service"] {
        let text = std::fs::read_to_string(units().join(name)).expect("a unit");
        let commands = text.lines().filter_map(|line| line.strip_prefix("Exec")?.split_once("/usr/local/bin/ballast "));
        let mut count = 0;
        for (_, words) in commands {
            count += 1;
            let words = words.replace("%i", "web");
            let said = Command::new(ballast()).args(words.split(' ')).arg("--frob").output().expect("it runs");
            let err = String::from_utf8_lossy(&said.stderr);
            assert!(err.contains("unexpected argument '--frob'"), "{name}: {words}: {err}");
        }
        assert!(count > 0, "{name} starts something");
    }
}

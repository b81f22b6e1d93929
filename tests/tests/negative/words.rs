//! Words that make no sense: found before a file is opened, and answered with status 2.

use super::{Place, finish, program, unique};

/// What `ballast run` with a sensible name, kernel and size says to one more option.
#[test]
fn options_that_make_no_sense_are_usage_errors() {
    let long = "n".repeat(65);
    let name = "1 to 64 letters, digits, '-', '_' or '.'";
    let table = [
        // Unknown, incomplete or repeated words.
        (["--frob", "1"], "unexpected argument '--frob'"),
        (["--kernal", "x"], "tip: a similar argument exists: '--kernel'"),
        (["--name", "again"], "cannot be used multiple times"),
        (["--log", "loud"], "possible values: off, error, warn, info, debug, trace"),
        (["--balloon", "size=1G"], "no key \"size\"; the keys are free_page_reporting, deflate_on_oom, stats_interval"),
        (["--balloon", "deflate_on_oom=yes"], "\"yes\" is neither on nor off"),
        (["--balloon", "stats_interval=1"], "write a number with ms, s, m or h such as 5s"),
        (["--balloon", "stats_interval=1500ms"], "not a whole number of seconds"),
        (["--balloon", "free_page_reporting=1"], "\"1\" is neither on nor off"),
        (["--oom", "acton=kill"], "no key \"acton\"; the keys are action, priority, preference, deadline"),
        (["--oom", "action=shoot"], "neither pause nor kill"),
        (["--oom", "deadline=-1s"], "write a number with ms, s, m or h"),
        (["--oom", "deadline=99999999999999999999s"], "longer than a day"),
        (["--oom", "priority=high"], "not a whole number"),
        (["--oom", ""], "the keys are action"),
        // Numbers of vCPUs.
        (["--cpus", "0"], "write a number from 1 to 64"),
        (["--cpus", "65"], "write a number from 1 to 64"),
        (["--cpus", "-1"], "-1"),
        (["--cpus", "two"], "write a number from 1 to 64"),
        (["--cpus", "1.5"], "write a number from 1 to 64"),
        (["--cpus", "99999999999999999999"], "write a number from 1 to 64"),
        (["--socket", ""], "a value is required for '--socket <PATH>'"),
    ];
    for (option, part) in table {
        refused(&["--name", "web", "--memory", "size=64M"], &option, part);
    }
    for bad in ["", "a/b", "/", "..", ".hidden", "-dash", "a b", "a\nb", "a\u{1b}[2Jb", "a\u{7f}", "ü", &long] {
        let option = format!("--name={bad}");
        refused(&["--memory", "size=64M"], &[&option], if bad.is_empty() { "--name" } else { name });
    }
}

/// Semantics: 6, 103, B57, T6.
#[test]
fn sizes_that_make_no_sense_are_usage_errors() {
    let table = [
        ("", "is not KEY=VALUE; the keys are size, max, high, low, min, swap, store, vmm, track"),
        ("max=64M", "size is missing: write for example size=1G"),
        ("size", "is not KEY=VALUE"),
        ("size=64M,", "is not KEY=VALUE"),
        ("size=64M,limit=5M", "no key \"limit\"; the keys are size, max"),
        ("size=64M,size=65M", "size is given twice"),
        ("size=", "write for example size=512M"),
        ("size=-1", "write for example size=512M"),
        ("size=max", "write a size such as 512M"),
        ("size=50%", "write an absolute size such as 512M"),
        ("size=12x", "is not a size"),
        ("size=0x1000000", "is not a size"),
        ("size=1e9", "is not a size"),
        ("size=64 M", "is not a size"),
        ("size=1.G", "is not a size"),
        ("size=.5G", "is not a size"),
        ("size=1.5.5G", "is not a size"),
        ("size=99999999999G", "is too large"),
        ("size=18446744073709551616", "is too large"),
        ("size=0", "at least 2 MiB"),
        ("size=4K", "at least 2 MiB"),
        ("size=2097151", "is not a multiple of the page size"),
        ("size=67108865", "write 67108864"),
        ("size=1.0001M", "is not a whole number of bytes"),
        ("size=600G", "give at most"),
        ("size=16777215T", "give at most"),
        ("size=64M,max=", "max: empty size"),
        ("size=64M,max=-1", "for no limit write max"),
        ("size=64M,max=50%", "max: \"50%\" is a percentage"),
        ("size=64M,max=12x", "max: \"12x\" is not a size"),
        ("size=64M,max=99999999999G", "max: \"99999999999G\" is too large"),
        ("size=64M,high=4097", "high: 4097 bytes is not a multiple"),
        ("size=64M,low=none", "low: \"none\" is not a size"),
        ("size=64M,min=32M,max=16M", "memory.min 32M would be above memory.max 16M"),
        ("size=64M,low=32M,max=16M", "memory.low 32M would be above memory.max 16M"),
        ("size=64M,high=32M,max=16M", "memory.high 32M would be above memory.max 16M"),
        ("size=64M,max=16M,track=off", "contradicts"),
        ("size=64M,track=maybe", "neither on nor off"),
    ];
    for (memory, part) in table {
        refused(&["--name", "web"], &["--memory", memory], part);
    }
}

/// Runs with `sensible` words, a kernel that is not there, and `wrong` ones.
fn refused(sensible: &[&str], wrong: &[&str], part: &str) {
    let place = Place::new();
    let mut command = program(&["run", "--kernel", "none"]);
    if wrong[0] != "--socket" {
        command.arg("--socket").arg(place.path("web.sock"));
    }
    command.args(sensible).args(wrong);
    let said = finish(command);
    said.refused(2, part, &wrong);
    assert!(said.err.contains("see ballast run --help"), "{}", said.err);
    assert_eq!(std::fs::read_dir(place.path("")).expect("still there").count(), 0, "{wrong:?} has left something");
}

#[test]
fn unusual_sizes_that_make_sense_are_taken() {
    let place = Place::new();
    for memory in
        ["size=1.5G", "size=2M", "size=65536KiB,max=1G", "size=64m,max=MAX", "size=64M,max=max", "size=0.5gib"]
    {
        let name = unique("odd");
        let said = finish(place.run(&name, &["--memory", memory, "--kernel", "none"]));
        if memory.contains("MAX") {
            said.refused(2, "is not a size", &memory);
        } else {
            // The words are good: it gets as far as the kernel.
            said.refused(125, "the kernel none cannot be opened", &memory);
        }
        place.is_untouched_by(&name, &memory);
    }
}

#[test]
fn verbs_that_make_no_sense_are_usage_errors() {
    let table: &[(&[&str], &str)] = &[
        (&["frob"], "unrecognized subcommand 'frob'; see ballast --help"),
        (&["--frob"], "unexpected argument '--frob'"),
        (&["run"], "the following required arguments were not provided: --memory <SIZES> --kernel <FILE>"),
        (&["run", "x"], "unexpected argument 'x'"),
        (&["show"], "not provided: <NAME>"),
        (&["show", "a", "b"], "unexpected argument 'b'"),
        (&["show", "a/b"], "\"a/b\" is not a name"),
        (&["pause", ""], "\"\" is not a name"),
        (&["resume", "../x"], "is not a name"),
        (&["kill", "a\nb"], "\"a\\nb\" is not a name"),
        (&["events", "a?b"], "is not a name"),
        (&["events", "--since", "x"], "--since: invalid digit"),
        (&["events", "--since=-1"], "--since"),
        (&["set", "web"], "not provided: <LIMIT=SIZE>"),
        (&["set", "a b", "memory.max=1M"], "is not a name"),
        (&["set", "web", "memory.max"], "write for example memory.max=256M"),
        (
            &["set", "web", "max=256M"],
            "there are memory.min, memory.low, memory.high, memory.max, swap.max, store.max and vmm.max",
        ),
        (&["set", "web", "memory.max="], "memory.max: empty size"),
        (&["set", "web", "memory.max=-1"], "for no limit write max"),
        (&["set", "web", "memory.max=50%"], "memory.max: \"50%\" is a percentage"),
        (&["set", "web", "memory.max=4097"], "write 4096"),
        (&["set", "web", "memory.max=1M", "memory.max=2M"], "memory.max is given twice"),
        (&["set", "web", "memory.max=1M", "--mode", "maybe"], "possible values: reclaim, force, refuse"),
        (&["set", "web", "memory.max=1M", "--wait", "2d"], "write a number with ms, s, m or h"),
        (&["set", "web", "memory.max=1M", "--generation", "x"], "--generation"),
        (&["worker"], "start a VM with ballast run"),
        (&["worker", "web"], "start a VM with ballast run"),
    ];
    for (words, part) in table {
        finish(program(words)).refused(2, part, words);
    }
}

#[test]
fn help_and_version_are_no_errors_and_no_words_are_answered_with_the_help() {
    for words in [&["--help"][..], &["run", "--help"], &["--version"]] {
        let said = finish(program(words));
        assert_eq!((said.status, said.err.as_str()), (Some(0), ""), "{words:?}");
        assert!(!said.out.is_empty(), "{words:?}");
    }
    let said = finish(program(&[]));
    assert_eq!(said.status, Some(2));
    assert!(said.err.contains("Usage: ballast"), "{}", said.err);
}

#[test]
fn words_that_are_not_text_are_usage_errors() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    let mut command = program(&["run", "--memory", "size=64M", "--kernel", "none", "--cmdline"]);
    command.arg(OsStr::from_bytes(b"a\xff"));
    finish(command).refused(2, "invalid UTF-8", &"a command line that is not text");
}

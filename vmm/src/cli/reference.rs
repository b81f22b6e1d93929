//! `docs/cli.md`, the reference of the command line: made from the program's own description, and tested to be up to date.

use std::fmt::Write as _;

use clap::{Arg, ArgAction, Command};

use super::manual::documented;

/// Where it is.
const REFERENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md");

/// The reference of all verbs in Markdown.
fn reference() -> String {
    let mut text = "# Command line reference\n\nWritten from the program itself: do not edit.\n".to_owned();
    section(&mut text, &documented());
    text
}

/// A verb with its words, and those below it.
fn section(text: &mut String, command: &Command) {
    let name = command.get_bin_name().unwrap_or(command.get_name());
    let usage = command.clone().render_usage().to_string();
    let usage = usage.strip_prefix("Usage: ").unwrap_or(&usage);
    let about = command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default();
    // Writing to a string cannot fail, here and below.
    let _ = write!(text, "\n## {name}\n\n{about}.\n\n```text\n{usage}\n```\n");
    let words: Vec<_> = command.get_arguments().filter(|arg| shown(arg, name == "ballast")).collect();
    if !words.is_empty() {
        text.push_str("\n| word | meaning |\n| --- | --- |\n");
        for word in words {
            let _ = writeln!(text, "| {} | {} |", spelled(word), explained(word));
        }
    }
    for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
        section(text, verb);
    }
}

/// Whether a word is explained here: those that every verb has only once.
fn shown(arg: &Arg, at_the_top: bool) -> bool {
    let everywhere = matches!(arg.get_action(), ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong);
    !arg.is_hide_set() && !everywhere && (at_the_top || !arg.is_global_set())
}

/// How an argument is written.
fn spelled(arg: &Arg) -> String {
    let values = || {
        let names = arg.get_value_names().unwrap_or_default();
        names.iter().map(|name| format!(" {name}")).collect::<String>()
    };
    let value = if arg.get_action().takes_values() { values() } else { String::new() };
    let words = match (arg.get_short(), arg.get_long()) {
        (Some(short), Some(long)) => format!("-{short}, --{long}{value}"),
        (None, Some(long)) => format!("--{long}{value}"),
        (Some(short), None) => format!("-{short}{value}"),
        (None, None) => value.trim_start().to_owned(),
    };
    // In a table it would end the cell, in code too.
    format!("`{}`", words.replace('|', "\\|"))
}

/// What an argument means, with what it may be and what it is by default, in one line.
fn explained(arg: &Arg) -> String {
    let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
    let mut text = help.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|");
    let possible: Vec<_> = arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    if arg.get_action().takes_values() && possible.first().is_some_and(|first| !text.contains(first)) {
        let _ = write!(text, ": {}", possible.join(", "));
    }
    let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
    if !defaults.is_empty() && arg.get_action().takes_values() {
        let _ = write!(text, " (default: {})", defaults.join(" "));
    }
    if let Some(variable) = arg.get_env() {
        let _ = write!(text, " (environment: `{}`)", variable.to_string_lossy());
    }
    text
}

/// With `BALLAST_WRITE=1` it is written instead.
#[test]
fn the_reference_in_the_documentation_is_up_to_date() {
    if std::env::var_os("BALLAST_WRITE").is_some_and(|value| value == "1") {
        std::fs::write(REFERENCE, reference()).expect("docs/cli.md can be written");
    }
    let there = std::fs::read_to_string(REFERENCE).unwrap_or_default();
    assert!(
        there == reference(),
        "docs/cli.md is not what the program says; write it anew: BALLAST_WRITE=1 cargo test -p ballast --lib cli::reference"
    );
}

#[test]
fn every_verb_and_option_is_in_the_reference() {
    let text = reference();
    let rows = text.lines().filter(|line| line.starts_with('|'));
    for row in rows {
        assert_eq!(row.replace("\\|", "").matches('|').count(), 3, "a row of two cells: {row}");
    }
    for part in ["\n## ballast run\n", "`--memory SIZES`", "`-f, --follow`", "(environment: `BALLAST_SOCKET`)"] {
        assert!(text.contains(part), "{part}");
    }
    assert!(!text.contains("--help") && text.lines().all(|line| !line.ends_with(' ')));
}

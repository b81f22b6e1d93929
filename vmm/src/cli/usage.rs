//! A command line that makes no sense, in one sentence.
//!
//! clap answers with a paragraph, a summary of the verb and a hint at the help. Programs that start VMs put the first
//! line of stderr into their logs, so here everything is in that line.

use std::error::Error;

use clap::CommandFactory;
use clap::error::{ContextKind, ErrorKind};

use super::Cli;

/// The sentence for `error`, which is about `words`, the command line without the program.
pub fn sentence<'w>(error: &clap::Error, words: impl IntoIterator<Item = &'w str>) -> String {
    let what = match (error.source(), error.get(ContextKind::InvalidArg)) {
        (Some(source), Some(option)) => {
            let option = option.to_string();
            format!("{}: {source}", option.split_whitespace().next().unwrap_or_default())
        }
        _ => first_paragraphs(&error.to_string()),
    };
    let command = Cli::command();
    let is_verb = |word: &&str| command.get_subcommands().any(|verb| verb.get_name() == *word && !verb.is_hide_set());
    let verb = words.into_iter().find(is_verb).unwrap_or_default();
    // `--memory` is what `create` has, and clap's tip would be to write it after `--`.
    let option = error.get(ContextKind::InvalidArg).map(ToString::to_string).unwrap_or_default();
    let unknown = error.kind() == ErrorKind::UnknownArgument && option.starts_with("--memory");
    let what = match what.split_once("; tip: ") {
        Some((what, _)) if unknown && ["group", "set"].contains(&verb) => {
            format!("{what}; tip: limits are words without dashes, such as memory.max=400M")
        }
        _ => what,
    };
    let verb = if verb.is_empty() { String::new() } else { format!(" {verb}") };
    printable(&format!("{what}; see ballast{verb} --help"))
}

/// What clap says before it comes to the summary, with its tips, on one line.
fn first_paragraphs(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let end = ["\n\nUsage: ", "\n\nFor more information"].iter().filter_map(|summary| text.find(summary)).min();
    let paragraphs = text[..end.unwrap_or(text.len())].split("\n\n");
    let lines = paragraphs.map(|paragraph| paragraph.split_whitespace().collect::<Vec<_>>().join(" "));
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

/// `text` without anything that would move the cursor or start a second line: what a user typed, or a file's name,
/// may hold such things.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn said(words: &[&str]) -> String {
        let error = Cli::try_parse_from([&["ballast"], words].concat()).expect_err("refused");
        sentence(&error, words.iter().copied())
    }

    #[test]
    fn every_kind_of_usage_error_is_one_sentence_with_the_verb_s_help() {
        let run = ["run", "--memory", "size=64M", "--kernel", "k"];
        for (words, expected) in [
            (&["--frob"][..], "unexpected argument '--frob' found; see ballast run --help"),
            (&["--cpus", "0"], "--cpus: \"0\" is not possible: write a number from 1 to 64; see ballast run --help"),
            (&["--balloon", "x"], "--balloon: \"x\" is not KEY=VALUE; the keys are free_page_reporting, "),
            (&["--name", "a\u{1b}b"], "--name: \"a\\u{1b}b\" is not a name: "),
            (&["--log", "loud"], "invalid value 'loud' for '--log <LEVEL>' [possible values: off, error, "),
        ] {
            let sentence = said(&[&run, words].concat());
            assert!(sentence.starts_with(expected), "{words:?}: {sentence}");
        }
        for words in [&["group", "create", "/gold", "--memory", "max=400M"][..], &["set", "web", "--memory=max=400M"]] {
            let (sentence, tip) = (said(words), "tip: limits are words without dashes, such as memory.max=400M; see ");
            assert!(sentence.starts_with("unexpected argument '--memory' found; tip: "), "{sentence}");
            assert!(sentence.contains(tip) && !sentence.contains("-- --"), "{sentence}");
        }
        let missing = "the following required arguments were not provided: --memory <SIZES> --kernel <FILE>; see";
        assert!(said(&["run"]).starts_with(missing), "{}", said(&["run"]));
        assert_eq!(said(&["frob"]), "unrecognized subcommand 'frob'; see ballast --help");
        assert!(said(&["run", "--kernal", "x"]).contains("tip: a similar argument exists: '--kernel'"));
    }
}

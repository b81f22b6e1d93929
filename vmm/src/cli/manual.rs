//! What is generated from the command line's own description: completions and man pages.

use std::path::PathBuf;

use clap::{Arg, Command, CommandFactory, ValueEnum};

use super::{Cli, DONE, Failure, output};

/// A shell that completions can be made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU bash.
    Bash,
    /// zsh.
    Zsh,
    /// fish.
    Fish,
}

/// `ballast completions`.
#[derive(Debug, clap::Args)]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// `ballast man`.
#[derive(Debug, clap::Args)]
pub struct ManArgs {
    /// Where to write them; made if it is missing
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Prints completions for a shell.
pub fn completions(args: &CompletionsArgs) -> Result<u8, Failure> {
    let shell = match args.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "ballast", &mut text);
    output::print(text)
}

/// Writes a page for the program and one for each verb.
pub fn man(args: &ManArgs) -> Result<u8, Failure> {
    let failed = |error: std::io::Error| {
        Failure::error(format!("the man pages cannot be written to {}: {error}", args.directory.display()))
    };
    std::fs::create_dir_all(&args.directory).map_err(failed)?;
    clap_mangen::generate_to(repeated(documented()), &args.directory).map_err(failed)?;
    Ok(DONE)
}

/// The command with dots at what may be there several times: in a synopsis they would be missing.
fn repeated(command: Command) -> Command {
    let dotted = |arg: Arg| {
        let many = arg.is_positional() && arg.get_num_args().is_some_and(|number| number.max_values() > 1);
        match arg.get_value_names() {
            Some([name]) if many => {
                // clap takes only names that last as long as the program, which ends with the pages.
                let name: &str = format!("{name}...").leak();
                arg.value_name(name)
            }
            _ => arg,
        }
    };
    command.mut_args(dotted).mut_subcommands(repeated)
}

/// The command with what clap adds by itself left out of the pages.
pub(super) fn documented() -> Command {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_page_for_each_verb() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("man");
        man(&ManArgs { directory: directory.clone() }).expect("written");
        let pages: Vec<_> = std::fs::read_dir(&directory).unwrap().flatten().map(|entry| entry.file_name()).collect();
        for page in ["ballast.1", "ballast-run.1", "ballast-stop.1", "ballast-completions.1"] {
            assert!(pages.iter().any(|found| found == page), "{page} is not among {pages:?}");
        }
        let run = std::fs::read_to_string(directory.join("ballast-run.1")).unwrap();
        assert!(run.contains(".TH") && run.contains("Guest RAM and limits"));
        let set = std::fs::read_to_string(directory.join("ballast-set.1")).unwrap();
        let synopsis = set.split(".SH SYNOPSIS").nth(1).and_then(|rest| rest.split(".SH").next()).unwrap();
        assert!(synopsis.contains("LIMIT=SIZE...") && !synopsis.contains("NAME..."), "{synopsis}");
        let nowhere = ManArgs { directory: "/proc/none".into() };
        assert!(man(&nowhere).unwrap_err().message.contains("/proc/none"));
    }

    #[test]
    fn each_shell_has_completions_that_know_the_verbs() {
        for shell in [clap_complete::Shell::Bash, clap_complete::Shell::Zsh, clap_complete::Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ballast", &mut text);
            let text = String::from_utf8(text).unwrap();
            assert!(text.contains("console") && text.contains("no-follow"), "{shell}");
        }
    }
}

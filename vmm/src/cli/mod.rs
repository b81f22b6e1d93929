//! The command line: verbs, their words, and what they print.
//!
//! Everything a user can get wrong is found before anything is made. Errors are one sentence on stderr.
//!
//! | exit status | meaning |
//! | --- | --- |
//! | 0 | done |
//! | 1 | error |
//! | 2 | usage |
//! | 3 | not reached in the time given |
//! | `run` | the guest's own status; 125 when ballast failed; 137 when the VM was killed; 128 + signal |

mod attach;
mod client;
mod console;
mod doctor;
mod file;
mod fleet;
mod group;
mod manual;
mod notify;
mod observe;
mod oom_log;
mod oom_policy;
mod options;
mod output;
mod reclaim;
mod record;
#[cfg(test)]
mod reference;
mod run;
mod serve;
mod show;
mod signals;
mod sim;
mod socket;
mod top;
mod usage;
mod verbs;
mod vm_args;
mod why;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};

pub use attach::ConsoleArgs;
pub use fleet::{CreateArgs, MoveArgs, PsArgs};
pub use group::GroupArgs;
pub use manual::{CompletionsArgs, ManArgs};
pub use options::{BalloonArg, MemoryArg, OomArg};
pub use reclaim::ReclaimArgs;
pub use run::RunArgs;
pub use serve::ServeArgs;
pub use top::TopArgs;
pub use verbs::{EventsArgs, ResumeArgs, SetArgs, StopArgs};
pub use vm_args::VmArgs;

/// Done.
pub const DONE: u8 = 0;
/// Something failed.
pub const ERROR: u8 = 1;
/// The command line makes no sense.
pub const USAGE: u8 = 2;
/// Not reached in the time given.
pub const NOT_REACHED: u8 = 3;
/// `run`: ballast failed, not the guest.
pub const RUN_FAILED: u8 = 125;
/// `run`: the VM was killed.
pub const KILLED: u8 = 137;

/// Environment variable with the level of the log, for the worker too.
pub const LOG_VARIABLE: &str = "BALLAST_LOG";

/// Launches KVM guests under memory limits that hold.
#[derive(Debug, Parser)]
#[command(name = "ballast", version, about, propagate_version = false, disable_help_subcommand = true)]
pub struct Cli {
    /// How much is logged on stderr: off, error, warn, info, debug or trace
    #[arg(long, global = true, value_name = "LEVEL", env = LOG_VARIABLE, default_value = "warn",
        value_parser = ["off", "error", "warn", "info", "debug", "trace"])]
    pub log: String,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run one VM in the foreground, its console on the terminal (Ctrl-] leaves and ends it)
    Run(Box<RunArgs>),
    /// Run a controller for many VMs, which `create` makes, until a signal comes
    Serve(ServeArgs),
    /// Make and start a VM in `serve`
    Create(Box<CreateArgs>),
    /// List the VMs
    Ps(PsArgs),
    /// End VMs of `serve` and forget them
    Rm(NamesArg),
    /// Start VMs of `serve` that have ended again
    Start(NamesArg),
    /// Ask the guests of VMs to power themselves off, and kill those that do not
    Stop(StopArgs),
    /// Go to the console of a VM (Ctrl-] leaves it alone again)
    Console(ConsoleArgs),
    /// Show a VM
    Show {
        /// Name of the VM
        name: String,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// Where its controller listens
        #[command(flatten)]
        socket: SocketArg,
    },
    /// Tell what has become of a VM's memory, and why: what happened, how it is, what would help
    Why(why::WhyArgs),
    /// Change limits of running VMs and of groups
    Set(SetArgs),
    /// Take memory back from a VM, whatever its limits: stock, balloon, cold pages
    Reclaim(ReclaimArgs),
    /// Move a VM to another group
    Move(MoveArgs),
    /// Make, change, list and remove groups of VMs
    Group(GroupArgs),
    /// Stop the vCPUs of VMs
    Pause(NamesArg),
    /// Let the vCPUs of VMs go on
    Resume(ResumeArgs),
    /// End VMs at once
    Kill(NamesArg),
    /// Print what has happened, and what happens
    Events(EventsArgs),
    /// Look at a host while it runs: usage, balloons, pressure, events
    Top(TopArgs),
    /// Say whether this host can run VMs, and what to do if not
    Doctor,
    /// Look whether the invariants hold on this host, now
    Check(observe::CheckArgs),
    /// What happens when there is no memory left
    #[command(subcommand)]
    Oom(observe::OomVerb),
    /// Write what the VMs use over time to a file, for `ballast sim`
    Record(record::RecordArgs),
    /// Simulate hosts under the controller's policy: recorded ones, or made-up ones
    Sim(Box<sim::SimArgs>),
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Write man pages
    Man(ManArgs),
}

/// Where the controller listens.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct SocketArg {
    /// Socket of the controller, or a directory with ballast.sock or NAME.sock [default: in $XDG_RUNTIME_DIR/ballast or /run/ballast]
    #[arg(long, value_name = "PATH", env = "BALLAST_SOCKET")]
    pub socket: Option<PathBuf>,
}

/// A verb that needs names only.
#[derive(Debug, clap::Args)]
pub struct NamesArg {
    /// Name of the VM, or of several
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    #[command(flatten)]
    socket: SocketArg,
}

/// Why a verb failed, with its exit status.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// One sentence.
    pub message: String,
    /// The exit status.
    pub status: u8,
}

impl Failure {
    /// An error of the usual kind.
    pub fn error(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: ERROR }
    }

    /// A command line that makes no sense.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: USAGE }
    }

    /// `run` failed before or beside the guest.
    fn run(message: impl Into<String>) -> Self {
        Self { message: message.into(), status: RUN_FAILED }
    }
}

/// Sends the log to stderr. `level` is one of those of `--log`; anything else counts as `warn`.
pub fn init_log(level: &str) {
    let level = level.parse().unwrap_or(tracing_subscriber::filter::LevelFilter::WARN);
    // A second call in one process (tests) changes nothing.
    let _ = tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).with_target(false).try_init();
}

/// Reads the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; a command line with nothing on it is answered with the help.
            if !error.use_stderr() || error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
                if let Err(error) = error.print()
                    && error.kind() != std::io::ErrorKind::BrokenPipe
                {
                    eprintln!("ballast: {}", output::unwritten(&error));
                    return ExitCode::from(ERROR);
                }
                return ExitCode::from(if error.use_stderr() { USAGE } else { DONE });
            }
            let words: Vec<_> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
            eprintln!("ballast: {}", usage::sentence(&error, words.iter().map(String::as_str)));
            return ExitCode::from(USAGE);
        }
    };
    init_log(&cli.log);
    // A thread for slow things that has nothing to do costs a stack and does not come back for minutes.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().thread_keep_alive(Duration::from_secs(1));
    let runtime = match runtime.build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ballast: the runtime cannot be started: {error}");
            return ExitCode::from(ERROR);
        }
    };
    let result = runtime.block_on(async {
        match cli.verb {
            Verb::Run(args) => run::run(*args, &cli.log).await,
            Verb::Serve(args) => serve::serve(args, &cli.log).await,
            Verb::Create(args) => fleet::create(*args).await,
            Verb::Ps(args) => fleet::ps(args).await,
            Verb::Rm(args) => fleet::rm(args).await,
            Verb::Start(args) => verbs::act(args, "start").await,
            Verb::Stop(args) => verbs::stop(args).await,
            Verb::Console(args) => attach::attach(args).await,
            Verb::Show { name, json, socket } => show::show(&name, json, &socket).await,
            Verb::Why(args) => why::why(args).await,
            Verb::Set(args) => verbs::set(args).await,
            Verb::Reclaim(args) => reclaim::reclaim(args).await,
            Verb::Move(args) => fleet::move_to(args).await,
            Verb::Group(args) => group::group(args).await,
            Verb::Pause(args) => verbs::act(args, "pause").await,
            Verb::Resume(args) => verbs::resume(args).await,
            Verb::Kill(args) => verbs::act(args, "kill").await,
            Verb::Events(args) => verbs::events(args).await,
            Verb::Top(args) => top::top(args).await,
            Verb::Check(args) => observe::check(args).await,
            Verb::Oom(verb) => observe::oom(verb).await,
            Verb::Record(args) => record::record(args).await,
            Verb::Sim(args) => sim::sim(&args),
            Verb::Doctor => doctor::doctor(),
            Verb::Completions(args) => manual::completions(&args),
            Verb::Man(args) => manual::man(&args),
        }
    });
    // Threads that read the terminal end with the process; nothing waits for them.
    runtime.shutdown_background();
    match result {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("ballast: {}", usage::printable(&failure.message));
            ExitCode::from(failure.status)
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_words_of_run_are_understood() {
        let cli = Cli::try_parse_from([
            "ballast",
            "run",
            "--name",
            "web",
            "--memory",
            "size=1G,max=512M,high=448M,low=128M,min=64M,swap=1G,store=256M,vmm=32M,track=on",
            "--balloon",
            "deflate_on_oom=on,stats_interval=1s",
            "--oom",
            "action=kill,priority=-3,preference=avoid,deadline=5s",
            "--kernel",
            "vmlinuz",
            "--initrd",
            "initrd",
            "--swap-dir",
            "swap",
            "--cmdline",
            "console=ttyS0",
            "--cpus",
            "2",
            "--debug-port",
            "--log",
            "debug",
        ]);
        let cli = cli.expect("understood");
        assert_eq!(cli.log, "debug");
        assert!(matches!(cli.verb, Verb::Run(_)));
    }
}

//! `ballast sim`: hosts that are not there, under the policy that real ones have.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use memcg_core::host::Terms;
use memcg_core::sim::rules::{RULES, Rule};
use memcg_core::sim::synthetic::{SCENARIOS, Scenario};
use memcg_core::sim::{Event, Outcome, Policy, What};
use memcg_core::units::{Limit, human};
use serde_json::json;

use super::options::{duration, limit};
use super::{DONE, ERROR, Failure, output, show};
use crate::sim::{Fleet, Results, csv, plot, trace};

/// `ballast sim`.
#[derive(Debug, clap::Args)]
pub struct SimArgs {
    /// A trace that `ballast record` has written
    #[arg(value_name = "TRACE", required_unless_present = "scenario", conflicts_with = "scenario")]
    trace: Option<PathBuf>,
    /// Made-up hosts of this name, or a line of the table of rules; `list` prints all
    #[arg(long, value_name = "NAME")]
    scenario: Option<String>,
    /// Other hosts of the same kind for each number
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "trace")]
    seed: u64,
    /// How many hosts [default: one for each 100 VMs]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=100_000), conflicts_with = "trace")]
    hosts: Option<u64>,
    /// How many VMs on all hosts together
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000_000),
        conflicts_with = "trace")]
    vms: u64,
    /// How long [default: 1h, or as long as the trace]
    #[arg(long, value_name = "TIME", value_parser = lasting)]
    duration: Option<Duration>,
    /// How a need is spread; several, with commas, are compared
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_value = "proportional", value_parser = policy())]
    policy: Vec<Policy>,
    /// Play a trace on a host with so much memory
    #[arg(long, value_name = "SIZE", value_parser = limit, conflicts_with = "scenario")]
    memory: Option<Limit>,
    /// Time between two lines of the CSV, and two points of the SVG
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1m")]
    every: Duration,
    /// Print what was decided, and when
    #[arg(long)]
    events: bool,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
    /// Write each host over time as a table
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draw all hosts together over time, a line for each policy
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// How long a simulation may last: between a second and a year.
fn lasting(text: &str) -> Result<Duration, String> {
    let lasts = duration(text)?;
    let fits = (Duration::from_secs(1)..=trace::LONGEST).contains(&lasts);
    fits.then_some(lasts).ok_or_else(|| "a simulation lasts a second at least, and a year at most".to_owned())
}

/// The names of policies.
fn policy() -> impl TypedValueParser<Value = Policy> {
    let parse = |name: String| Policy::ALL.into_iter().find(|policy| policy.name() == name).unwrap_or_default();
    PossibleValuesParser::new(Policy::ALL.map(Policy::name)).map(parse)
}

/// Simulates, and prints what came of it.
pub fn sim(args: &SimArgs) -> Result<u8, Failure> {
    if args.scenario.as_deref() == Some("list") {
        return output::print(list());
    }
    if let Some(rule) = args.scenario.as_deref().and_then(Rule::find) {
        return play(rule);
    }
    let (fleet, lasts, title) = fleet(args)?;
    let mut policies = args.policy.clone();
    let mut seen = Vec::new();
    policies.retain(|policy| !seen.contains(policy) && (seen.push(*policy), true).1);
    let every = args.every.max(Duration::from_secs(1));
    let run = |policy| fleet.run(policy, lasts, every).map_err(|error| Failure::error(error.to_string()));
    let results: Vec<Results> = policies.into_iter().map(run).collect::<Result<_, _>>()?;
    if let Some(path) = &args.csv {
        write(path, &csv::table(&results))?;
    }
    if let Some(path) = &args.svg {
        let picture = plot::svg(&title, &results).map_err(|error| Failure::error(error.to_string()))?;
        write(path, &picture)?;
    }
    if args.json {
        return output::json(&results.iter().map(as_json).collect::<Vec<_>>());
    }
    let mut text = format!("{title}\n{}", table(&results));
    if args.events {
        text.extend(results.iter().map(events));
    }
    output::print(text)
}

/// What is to be simulated, for how long, and what it is.
fn fleet(args: &SimArgs) -> Result<(Fleet, Duration, String), Failure> {
    let hour = Duration::from_secs(3600);
    if let Some(path) = &args.trace {
        let failed = |error: &dyn std::fmt::Display| Failure::error(format!("{}: {error}", path.display()));
        let file = File::open(path).map_err(|error| failed(&error))?;
        let (mut setup, lasts) = trace::read(BufReader::new(file)).map_err(|error| failed(&error))?;
        if let Some(Limit::Pages(memory)) = args.memory {
            (setup.memory, setup.terms) = (memory, Terms::new(memory));
        }
        let title = format!("{}: {} VMs on {}", path.display(), setup.vms.len(), human(setup.memory.bytes()));
        return Ok((Fleet::Known(Box::new(setup)), args.duration.unwrap_or(lasts), title));
    }
    let name = args.scenario.as_deref().unwrap_or_default();
    let scenario = *Scenario::find(name).ok_or_else(|| {
        let known: Vec<_> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        let message = format!("there is no scenario {name:?}: write one of {}, or list for all", known.join(", "));
        Failure::usage(message)
    })?;
    let hosts = args.hosts.unwrap_or(args.vms.div_ceil(100)).min(args.vms);
    let lasts = args.duration.unwrap_or(hour);
    let minutes = lasts.as_secs() / 60;
    let title = format!("{name}: {} VMs on {hosts} hosts, {minutes} minutes, seed {}", args.vms, args.seed);
    Ok((Fleet::Drawn { scenario, seed: args.seed, hosts, vms: args.vms }, lasts, title))
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let failed = |error| Failure::error(format!("{} cannot be written: {error}", path.display()));
    std::fs::write(path, text).map_err(failed)
}

/// What there is to be simulated.
fn list() -> String {
    let mut text = "Made-up hosts:\n".to_owned();
    text.extend(SCENARIOS.iter().map(|scenario| format!("  {:24} {}\n", scenario.name, scenario.says)));
    text.push_str("Lines of the table of rules:\n");
    text.extend(RULES.iter().map(|rule| format!("  {:24} {}\n", rule.id, rule.says)));
    text
}

/// Plays a line of the table.
fn play(rule: &Rule) -> Result<u8, Failure> {
    let outcome = rule.play().map_err(|error| Failure::error(error.to_string()))?;
    output::print(format!("{}\n{}", rule.says, told(&outcome)))?;
    match rule.verify(&outcome) {
        Ok(()) => Ok(DONE),
        Err(why) => Err(Failure { message: format!("the rule does not hold: {why}"), status: ERROR }),
    }
}

/// A line for each policy.
fn table(results: &[Results]) -> String {
    let header = ["POLICY", "RECLAIMED", "REFAULTED", "STALLED", "PAUSED", "PAUSES", "KILLS", "EXHAUSTED", "FAIRNESS"];
    let rows = [header.map(str::to_owned)].into_iter().chain(results.iter().map(row));
    show::columns(&rows.collect::<Vec<_>>(), 1)
}

fn row(results: &Results) -> [String; 9] {
    let sums = results.sums();
    let wanted = results.wanted().as_secs_f64().max(f64::MIN_POSITIVE);
    let percent = |time: Duration| format!("{:.3}%", 100.0 * time.as_secs_f64() / wanted);
    [
        results.policy.name().to_owned(),
        human((sums.evicted + sums.given).bytes()),
        human(sums.refaulted.bytes()),
        percent(sums.stalled),
        percent(sums.paused),
        sums.pauses.to_string(),
        sums.kills.to_string(),
        format!("{}s", sums.exhausted.as_secs()),
        format!("{:.5}", results.fairness()),
    ]
}

fn as_json(results: &Results) -> serde_json::Value {
    let sums = results.sums();
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    json!({
        "policy": results.policy.name(),
        "reclaimed_bytes": (sums.evicted + sums.given).bytes(),
        "refaulted_bytes": sums.refaulted.bytes(),
        "wanted_ms": ms(results.wanted()),
        "stalled_ms": ms(sums.stalled),
        "paused_ms": ms(sums.paused),
        "pauses": sums.pauses,
        "kills": sums.kills,
        "exhausted_ms": ms(sums.exhausted),
        "fairness": results.fairness(),
    })
}

/// What was decided under a policy, host by host.
fn events(results: &Results) -> String {
    let mut text = String::new();
    for (index, host) in results.hosts.iter().enumerate().filter(|(_, host)| !host.events.is_empty()) {
        text.push_str(&format!("\n{}, host {index}:\n{}", results.policy.name(), told(host)));
    }
    text
}

/// What was decided, a line each.
fn told(outcome: &Outcome) -> String {
    let line = |event: &Event| format!("{:>9.2}s  {}\n", event.at.as_secs_f64(), sentence(&event.what));
    outcome.events.iter().map(line).collect()
}

fn sentence(what: &What) -> String {
    match what {
        What::Short(sign) => {
            let sign = format!("{sign:?}").to_lowercase();
            format!("the host runs short ({sign})")
        }
        What::Calm => "the host has memory again".to_owned(),
        What::Asked { level } => format!("{level} has no room: the client is asked who goes"),
        What::Refused { why } => format!("the client's answer is refused: {why}"),
        What::Spared { level } => format!("{level} has no room: the client wants nobody to go"),
        What::Chosen { level, killed, why, .. } => {
            let verb = if *killed { "kill" } else { "pause" };
            format!("{level} has no room: {verb} {why}")
        }
        What::Nobody { level, why } => format!("{level} has no room: {why}"),
        What::Resumed { vm } => format!("{vm} goes on"),
    }
}

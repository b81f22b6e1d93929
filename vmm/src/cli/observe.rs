//! `check` and `oom rank`: looking at a whole host.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use hyper::Method;
use memcg_core::units::human;

use super::oom_log::{self, LogArgs};
use super::oom_policy::{self, PolicyArgs};
use super::{ERROR, Failure, SocketArg, client, output, show, socket};
use crate::controller::check::CheckView;
use crate::controller::rank::{RankView, RankedView};
use crate::controller::view::OomPreference;

/// `ballast check`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Looks whether the invariants hold under every controller that runs. Ends with an error when one does not.
pub async fn check(args: CheckArgs) -> Result<u8, Failure> {
    let sockets = socket::all(&args.socket)?;
    if sockets.is_empty() {
        return Err(socket::none_runs());
    }
    let only = sockets.len() == 1;
    let (views, mut status) = client::answers::<CheckView>(sockets, "/check").await;
    if views.iter().any(|(_, view)| !view.ok) {
        status = ERROR;
    }
    match views.as_slice() {
        [] => {}
        [(_, view), ..] if args.json && only => drop(output::json(view)?),
        all if args.json => drop(output::json(&all.iter().map(|(_, view)| view).collect::<Vec<_>>())?),
        all => {
            let report = |(socket, view): &(PathBuf, _)| report((!only).then_some(socket), view);
            output::print(all.iter().map(report).collect::<String>())?;
        }
    }
    Ok(status)
}

/// The findings, one a line.
fn report(socket: Option<&Path>, view: &CheckView) -> String {
    let mut out = socket.map(|socket| format!("{}\n", socket.display())).unwrap_or_default();
    for invariant in &view.invariants {
        let verdict = if invariant.ok { "ok" } else { "WRONG" };
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{verdict:6} {:10} {}", invariant.name, invariant.message);
    }
    out
}

/// `ballast oom`.
#[derive(Debug, clap::Subcommand)]
pub enum OomVerb {
    /// Show who would be paused or killed first if there were no room, and why; nothing is done
    Rank(RankArgs),
    /// Show what was decided when no memory was left, and what came of it
    Log(LogArgs),
    /// Be the client that decides who is paused or killed, before the policy does
    Policy(PolicyArgs),
}

/// `ballast oom rank`.
#[derive(Debug, clap::Args)]
pub struct RankArgs {
    /// Path of the group that would have no room
    #[arg(default_value = "/")]
    group: String,
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Does what the word after `oom` says.
pub async fn oom(verb: OomVerb) -> Result<u8, Failure> {
    match verb {
        OomVerb::Rank(args) => rank(args).await,
        OomVerb::Log(args) => oom_log::log(args).await,
        OomVerb::Policy(args) => oom_policy::policy(args).await,
    }
}

/// Shows who would go first.
async fn rank(args: RankArgs) -> Result<u8, Failure> {
    if !args.group.starts_with('/') || !args.group.chars().all(|c| c.is_ascii_alphanumeric() || "/-_.".contains(c)) {
        let message = format!("{:?} is not the path of a group: write for example / or /gold", args.group);
        return Err(Failure::usage(message));
    }
    let socket = socket::the_only(&args.socket)?;
    let target = format!("/oom/rank?group={}", args.group);
    let (_, body) = client::request(&socket, Method::GET, &target, String::new()).await?;
    let view: RankView = client::decode(&body)?;
    if args.json { output::json(&view) } else { output::print(ranking(&view)) }
}

/// The list, with what decides it from left to right.
fn ranking(view: &RankView) -> String {
    let max = view.max_bytes.map_or("no limit".to_owned(), human);
    let mut out = format!("If {} had no room left ({} in use, {max}):\n", view.group, human(view.usage_bytes));
    if view.candidates.is_empty() {
        out.push_str("nobody would go: there is no VM in it\n");
        return out;
    }
    let header = ["#", "NAME", "GROUP", "WOULD", "PREF", "PRIO", "USED", "PROTECTED", "ABOVE", "FREES"];
    let rows = [header.map(str::to_owned)].into_iter().chain(view.candidates.iter().map(row));
    out.push_str(&show::columns(&rows.collect::<Vec<_>>(), 5));
    out.push('\n');
    for candidate in &view.candidates {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}. {}", candidate.rank, candidate.why);
    }
    out
}

fn row(candidate: &RankedView) -> [String; 10] {
    let would = match (candidate.spared, candidate.action) {
        (Some(_), _) => "-",
        (None, action) => action.word(),
    };
    let preference = match candidate.preference {
        OomPreference::None => "none",
        OomPreference::Avoid => "avoid",
        OomPreference::Omit => "omit",
    };
    [
        candidate.rank.to_string(),
        candidate.vm.clone(),
        candidate.group.clone(),
        would.to_owned(),
        preference.to_owned(),
        candidate.priority.to_string(),
        human(candidate.usage_bytes),
        human(candidate.min_bytes.max(candidate.low_bytes)),
        human(candidate.above_bytes),
        human(candidate.frees_bytes),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::check::InvariantView;
    use crate::controller::rank::SparedBy;
    use crate::controller::view::OomAction;

    #[test]
    fn a_violation_stands_out() {
        let invariant =
            |name: &str, ok, message: &str| InvariantView { name: name.into(), ok, message: message.into() };
        let invariants = vec![invariant("limits", true, "fine"), invariant("parts", false, "web: 7 pages too many")];
        let view = CheckView { ok: false, invariants };
        assert_eq!(report(None, &view), "ok     limits     fine\nWRONG  parts      web: 7 pages too many\n");
        assert!(report(Some(Path::new("/run/a.sock")), &view).starts_with("/run/a.sock\nok "));
    }

    #[test]
    fn the_list_has_every_term_and_the_sentences() {
        let candidate = |rank, vm: &str, spared| RankedView {
            rank,
            vm: vm.to_owned(),
            group: "/gold".to_owned(),
            usage_bytes: 100 << 20,
            vmm_bytes: 2 << 20,
            stock_bytes: 0,
            min_bytes: 0,
            low_bytes: 30 << 20,
            above_bytes: 70 << 20,
            action: OomAction::Kill,
            frees_bytes: 100 << 20,
            score_bytes: 70 << 20,
            preference: OomPreference::Avoid,
            priority: -3,
            spared,
            why: format!("{vm}: because"),
        };
        let candidates = vec![candidate(1, "web", None), candidate(2, "db", Some(SparedBy::Omit))];
        let view =
            RankView { group: "/gold".to_owned(), usage_bytes: 200 << 20, max_bytes: Some(256 << 20), candidates };
        let expected = "If /gold had no room left (200M in use, 256M):\n\
            #  NAME  GROUP  WOULD  PREF   PRIO  USED  PROTECTED  ABOVE  FREES\n\
            1  web   /gold  kill   avoid    -3  100M        30M    70M   100M\n\
            2  db    /gold  -      avoid    -3  100M        30M    70M   100M\n\
            \n1. web: because\n2. db: because\n";
        assert_eq!(ranking(&view), expected);
        assert!(ranking(&RankView { candidates: Vec::new(), ..view }).ends_with("there is no VM in it\n"));
    }
}

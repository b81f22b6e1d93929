//! `ballast group`: the groups of `ballast serve`.

use std::fmt::Write;
use std::time::Duration;

use hyper::{Method, StatusCode};
use memcg_core::units::human;
use serde::Serialize;

use super::options::{duration, group_path};
use super::verbs::{change_query, changed, patch};
use super::{DONE, Failure, SocketArg, client, output, show, socket};
use crate::api::MemoryPatch;
use crate::controller::view::{GroupView, LimitsView};

/// `ballast group`.
#[derive(Debug, clap::Args)]
pub struct GroupArgs {
    #[command(subcommand)]
    verb: GroupVerb,
}

/// What to do with groups.
#[derive(Debug, clap::Subcommand)]
enum GroupVerb {
    /// Make a group; does nothing when it is there with these limits
    Create {
        /// Path of the group, such as /gold/web; the groups above it must exist
        #[arg(value_parser = group_path)]
        path: String,
        /// Limits, such as memory.max=1G memory.min=256M
        #[arg(value_name = "LIMIT=SIZE")]
        limits: Vec<String>,
        #[command(flatten)]
        print: PrintArgs,
    },
    /// Change limits of a group; memory.max of / is the budget of the host
    Set {
        /// Path of the group
        #[arg(value_parser = group_path)]
        path: String,
        /// Limits, such as memory.max=1G memory.high=max
        #[arg(required = true, value_name = "LIMIT=SIZE")]
        limits: Vec<String>,
        /// What to do when usage is above the new memory.max: reclaim first, force it, or refuse
        #[arg(long, default_value = "reclaim", value_parser = ["reclaim", "force", "refuse"])]
        mode: String,
        /// How long to wait for it to be in force, such as 10s
        #[arg(long, value_name = "TIME", value_parser = duration)]
        wait: Option<Duration>,
        /// Only if the limits are still of this generation
        #[arg(long, value_name = "N")]
        generation: Option<u64>,
        #[command(flatten)]
        print: PrintArgs,
    },
    /// Move a group, with everything in it, into another group
    Move {
        /// Path of the group
        #[arg(value_parser = group_path)]
        path: String,
        /// Path of the group that it is to be in, / for none
        #[arg(value_parser = group_path)]
        parent: String,
        #[command(flatten)]
        print: PrintArgs,
    },
    /// Remove a group with nothing in it
    Rm {
        /// Path of the group
        #[arg(value_parser = group_path)]
        path: String,
        #[command(flatten)]
        socket: SocketArg,
    },
    /// List the groups
    Ls(PrintArgs),
    /// Show a group
    Show {
        /// Path of the group
        #[arg(value_parser = group_path)]
        path: String,
        #[command(flatten)]
        print: PrintArgs,
    },
}

/// How and from where.
#[derive(Debug, clap::Args)]
struct PrintArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Does what is to be done with groups.
pub async fn group(args: GroupArgs) -> Result<u8, Failure> {
    match args.verb {
        GroupVerb::Create { path, limits, print } => {
            let body = encode(&patch(&limits).map_err(Failure::usage)?)?;
            let (_, view) = one(&print, Method::PUT, &format!("/groups{path}"), body).await?;
            answer(print.json.then_some(&view))
        }
        GroupVerb::Set { path, limits, mode, wait, generation, print } => {
            let body = encode(&patch(&limits).map_err(Failure::usage)?)?;
            let query = change_query(&mode, wait, generation);
            let (status, view) = one(&print, Method::PATCH, &format!("/groups{path}?{query}"), body).await?;
            answer(print.json.then_some(&view))?;
            let late = status == StatusCode::ACCEPTED;
            Ok(changed(late, &LimitsView { groups: vec![view], ..LimitsView::default() }))
        }
        GroupVerb::Move { path, parent, print } => {
            let body = serde_json::json!({ "parent": parent }).to_string();
            let (_, view) = one(&print, Method::POST, &format!("/groups{path}/move"), body).await?;
            answer(print.json.then_some(&view))
        }
        GroupVerb::Rm { path, socket } => {
            let socket = socket::to_reach_service(&socket)?;
            client::request(&socket, Method::DELETE, &format!("/groups{path}"), String::new()).await?;
            Ok(DONE)
        }
        GroupVerb::Ls(print) => {
            let socket = socket::to_reach_service(&print.socket)?;
            let (_, body) = client::request(&socket, Method::GET, "/groups", String::new()).await?;
            let views: Vec<GroupView> = client::decode(&body)?;
            if print.json { answer(Some(&views)) } else { output::print(table(&views)) }
        }
        GroupVerb::Show { path, print } => {
            let (_, view) = one(&print, Method::GET, &format!("/groups{path}"), String::new()).await?;
            if print.json { answer(Some(&view)) } else { output::print(lines(&view)) }
        }
    }
}

/// A request whose answer is one group.
async fn one(
    print: &PrintArgs,
    method: Method,
    target: &str,
    body: String,
) -> Result<(StatusCode, GroupView), Failure> {
    let socket = socket::to_reach_service(&print.socket)?;
    let (status, body) = client::request(&socket, method, target, body).await?;
    Ok((status, client::decode(&body)?))
}

fn encode(patch: &MemoryPatch) -> Result<String, Failure> {
    serde_json::to_string(patch).map_err(|error| Failure::error(error.to_string()))
}

/// Prints an answer as JSON, if there is one to print.
fn answer<T: Serialize>(view: Option<&T>) -> Result<u8, Failure> {
    view.map_or(Ok(DONE), output::json)
}

fn table(groups: &[GroupView]) -> String {
    let header = ["GROUP", "VMS", "CURRENT", "MIN", "MAX", "VMM", "VMM.MAX"].map(str::to_owned);
    let rows = groups.iter().map(|group| {
        [
            if group.dying { format!("{} (dying)", group.path) } else { group.path.clone() },
            group.vms.to_string(),
            human(group.memory.current_bytes),
            show::limit(group.memory.min_bytes),
            show::limit(group.memory.max_bytes),
            human(group.vmm.current_bytes),
            show::limit(group.vmm.max_bytes),
        ]
    });
    show::columns(&[header].into_iter().chain(rows).collect::<Vec<_>>(), 1)
}

fn lines(group: &GroupView) -> String {
    let mut out = String::new();
    let mut line = |label: &str, text: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{label:10} {text}");
    };
    let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    let dying = if group.dying { ", removed: its memory is on its way back" } else { "" };
    line(&group.path, format!("{}, {} below{dying}", plural(group.vms, "VM"), plural(group.groups, "group")));
    let memory = &group.memory;
    let mut used = format!(
        "{} of {}, peak {}",
        human(memory.current_bytes),
        show::limit(memory.max_bytes),
        human(memory.peak_bytes)
    );
    if let Some(pending) = memory.max_pending_bytes {
        used.push_str(&format!(", going to {}", human(pending)));
    }
    for (bytes, what) in [(memory.overcharge_bytes, "above the limit"), (memory.returning_bytes, "on its way back")] {
        if bytes > 0 {
            used.push_str(&format!(", {} {what}", human(bytes)));
        }
    }
    line("  memory", used);
    line("  vmm", format!("{} of {}", human(group.vmm.current_bytes), show::limit(group.vmm.max_bytes)));
    line(
        "  limits",
        format!(
            "min {} (in effect {}), low {} ({}), high {}, max {}, generation {}",
            show::limit(memory.min_bytes),
            human(memory.effective_min_bytes),
            show::limit(memory.low_bytes),
            human(memory.effective_low_bytes),
            show::limit(memory.high_bytes),
            show::limit(memory.max_bytes),
            group.generation
        ),
    );
    let (all, local) = (&memory.events, &memory.events_local);
    line(
        "  events",
        format!(
            "high {}, max {}, oom {}, oom_kill {}, oom_pause {}; at its own limits max {}, oom {}",
            all.high, all.max, all.oom, all.oom_kill, all.oom_pause, local.max, local.oom
        ),
    );
    out
}

//! `set`, `start`, `stop`, `pause`, `resume`, `kill`, `events`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Method;
use memcg_core::units::human;

use super::client::Lines;
use super::options::{duration, group_path, limit, name, on_off};
use super::{DONE, Failure, NOT_REACHED, NamesArg, SocketArg, client, output, show, socket, usage};
use crate::api::{MemoryPatch, NodeLimits};
use crate::controller::events::{Event, EventKind};
use crate::controller::stop::StopView;
use crate::controller::view::{LimitsView, VmState, VmView};
use crate::controller::{DEADLINE, host};

/// `ballast set`.
#[derive(Debug, clap::Args)]
pub struct SetArgs {
    /// Name of the VM, or path of a group such as /gold
    pub name: String,
    /// Limits, such as memory.max=256M memory.high=max; before them more names
    ///
    /// The limits are memory.min, memory.low, memory.high, memory.max, swap.max, store.max and vmm.max. All of those named
    /// come into force, or none, at all of the VMs and groups in one step. The first limit of a VM that was started
    /// without one turns its accounting on, and so does track=on.
    #[arg(required = true, value_name = "LIMIT=SIZE")]
    pub limits: Vec<String>,
    /// What to do when usage is above the new memory.max: reclaim first, force it, or refuse
    #[arg(long, default_value = "reclaim", value_parser = ["reclaim", "force", "refuse"])]
    pub mode: String,
    /// How long to wait for it to be in force, such as 10s
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub wait: Option<Duration>,
    /// Only if the limits are still of this generation
    #[arg(long, value_name = "N")]
    pub generation: Option<u64>,
    /// Print what was changed as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// The query of a request that changes limits.
pub fn change_query(mode: &str, wait: Option<Duration>, generation: Option<u64>) -> String {
    let mut query = format!("mode={mode}");
    if let Some(wait) = wait {
        query.push_str(&format!("&wait_ms={}", wait.as_millis()));
    }
    if let Some(generation) = generation {
        query.push_str(&format!("&generation={generation}"));
    }
    query
}

/// The body of the request that `set` sends.
///
/// # Errors
/// A sentence that says what to write instead.
pub fn patch(limits: &[String]) -> Result<MemoryPatch, String> {
    let mut patch = MemoryPatch::default();
    for pair in limits {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(format!("{pair:?} is not LIMIT=SIZE: write for example memory.max=256M"));
        };
        if key == "track" {
            if patch.track.replace(on_off(value)?).is_some() {
                return Err("track is given twice".to_owned());
            }
            continue;
        }
        let place = match key {
            "memory.min" => &mut patch.min_bytes,
            "memory.low" => &mut patch.low_bytes,
            "memory.high" => &mut patch.high_bytes,
            "memory.max" => &mut patch.max_bytes,
            "swap.max" => &mut patch.swap_max_bytes,
            "store.max" => &mut patch.store_max_bytes,
            "vmm.max" => &mut patch.vmm_max_bytes,
            _ => {
                return Err(format!(
                    "there is no limit {key:?}; there are memory.min, memory.low, memory.high, memory.max, swap.max, \
                     store.max and vmm.max, and track=on"
                ));
            }
        };
        if place.is_some() {
            return Err(format!("{key} is given twice"));
        }
        *place = Some(limit(value).map_err(|error| format!("{key}: {error}"))?.as_bytes());
    }
    Ok(patch)
}

/// Changes limits.
pub async fn set(args: SetArgs) -> Result<u8, Failure> {
    // Names come first. Without any limit the last word was meant to be one.
    let first = args.limits.iter().position(|word| word.contains('=')).unwrap_or(args.limits.len() - 1);
    let (more, limits) = args.limits.split_at(first);
    let patch = patch(limits).map_err(Failure::usage)?;
    if !more.is_empty() || args.name.starts_with('/') {
        return set_all(&args, &[std::slice::from_ref(&args.name), more].concat(), patch).await;
    }
    let vm = name(&args.name).map_err(Failure::usage)?;
    let target = format!("/vms/{vm}/memory?{}", change_query(&args.mode, args.wait, args.generation));
    let socket = socket::to_reach_only(&args.socket, &vm, false).await?;
    let body = serde_json::to_string(&patch).map_err(|error| Failure::error(error.to_string()))?;
    let (status, body) = client::request(&socket, Method::PATCH, &target, body).await?;
    let view: VmView = client::decode(&body)?;
    if args.json {
        output::json(&view)?;
    }
    Ok(changed(status == hyper::StatusCode::ACCEPTED, &LimitsView { vms: vec![view], ..LimitsView::default() }))
}

/// Changes limits of many VMs and groups in one transaction.
async fn set_all(args: &SetArgs, names: &[String], patch: MemoryPatch) -> Result<u8, Failure> {
    let node = |word: &String| -> Result<NodeLimits, String> {
        let (vm, group) =
            if word.starts_with('/') { (None, Some(group_path(word)?)) } else { (Some(name(word)?), None) };
        Ok(NodeLimits { vm, group, limits: patch, generation: args.generation })
    };
    let nodes: Vec<_> = names.iter().map(node).collect::<Result<_, _>>().map_err(Failure::usage)?;
    if nodes.len() > 1 && args.generation.is_some() {
        return Err(Failure::usage("--generation is of one VM or group: name only that one"));
    }
    let socket = socket::to_reach_service(&args.socket)?;
    let target = format!("/limits?{}", change_query(&args.mode, args.wait, None));
    let body = serde_json::to_string(&nodes).map_err(|error| Failure::error(error.to_string()))?;
    let (_, body) = client::request(&socket, Method::POST, &target, body).await?;
    let view: LimitsView = client::decode(&body)?;
    if args.json {
        output::json(&view)?;
    }
    Ok(changed(!view.in_force, &view))
}

/// Says what there is to say about limits that were accepted. Returns the exit status.
pub fn changed(late: bool, view: &LimitsView) -> u8 {
    let vms = view.vms.iter().map(|vm| {
        let memory = &vm.memory;
        (&vm.name, memory.current_bytes, memory.max_bytes, memory.max_pending_bytes, memory.stat.overcharge_bytes)
    });
    let groups = view.groups.iter().map(|group| {
        let memory = &group.memory;
        (&group.path, memory.current_bytes, memory.max_bytes, memory.max_pending_bytes, memory.overcharge_bytes)
    });
    let many = view.vms.len() + view.groups.len() > 1;
    for (name, current, max, pending, overcharge) in vms.chain(groups) {
        let of = if many { format!("{name}: ") } else { String::new() };
        if late {
            eprintln!(
                "ballast: {of}not reached yet: {} is in use; memory.max goes from {} to {} if that fits within {} s of \
                 the request, and otherwise stays as it is",
                human(current),
                show::limit(max),
                show::limit(pending),
                host::scaled(DEADLINE).as_secs(),
            );
        } else if overcharge > 0 {
            eprintln!("ballast: {of}in force; {} more than memory.max is in use", human(overcharge));
        }
    }
    if late { NOT_REACHED } else { DONE }
}

/// Requests under way at one time.
const AT_ONCE: usize = 16;

/// Does something with each of several VMs, many at a time; `ended`: also with one that has ended. Nothing is done to any
/// unless each name is that of one VM. After that, what fails is said in one line each and keeps no other from being done;
/// the exit status is that of the last failure.
pub async fn each<F>(
    names: &[String],
    at: &SocketArg,
    ended: bool,
    one: impl Fn(String, PathBuf) -> F,
) -> Result<u8, Failure>
where
    F: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let (vms, wrong): (Vec<_>, Vec<_>) = names.iter().map(|text| name(text)).partition(Result::is_ok);
    told(wrong.into_iter().filter_map(Result::err).map(Failure::usage).collect())?;
    let vms: Vec<_> = vms.into_iter().flatten().collect();
    let several = vms.len() > 1;
    let found = at_once(&vms, |vm| find(at.clone(), vm.clone(), ended, several)).await?;
    at_once(&found, |(vm, socket)| one(vm.clone(), socket.clone())).await.map(|_| DONE)
}

/// Does the same with each of several things, many at a time, and all of it whatever fails.
async fn at_once<T, D, F>(things: &[T], one: impl Fn(&T) -> F) -> Result<Vec<D>, Failure>
where
    D: Send + 'static,
    F: Future<Output = Result<D, Failure>> + Send + 'static,
{
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    for some in things.chunks(AT_ONCE) {
        for task in some.iter().map(|thing| tokio::spawn(one(thing))).collect::<Vec<_>>() {
            match task.await.unwrap_or_else(|error| Err(Failure::error(error.to_string()))) {
                Ok(what) => done.push(what),
                Err(failure) => failures.push(failure),
            }
        }
    }
    told(failures).map(|()| done)
}

/// Says all failures but the last, which is what the program ends with.
fn told(mut failures: Vec<Failure>) -> Result<(), Failure> {
    let Some(last) = failures.pop() else { return Ok(()) };
    for failure in failures {
        eprintln!("ballast: {}", usage::printable(&failure.message));
    }
    Err(last)
}

/// A VM with the socket of its controller; `several`: others are named beside it, so that its controller is asked whether
/// it has it before anything is done to them.
async fn find(at: SocketArg, vm: String, ended: bool, several: bool) -> Result<(String, PathBuf), Failure> {
    let socket = socket::to_reach_only(&at, &vm, ended).await?;
    if several {
        client::request(&socket, Method::GET, &format!("/vms/{vm}"), String::new()).await?;
    }
    Ok((vm, socket))
}

/// Does one of the verbs that are a word and names.
pub async fn act(args: NamesArg, verb: &'static str) -> Result<u8, Failure> {
    let ended = verb == "start";
    each(&args.names, &args.socket, ended, move |vm, socket| async move {
        let (_, body) = client::request(&socket, Method::POST, &format!("/vms/{vm}/{verb}"), String::new()).await?;
        client::decode::<VmView>(&body).map(drop)
    })
    .await
}

/// `ballast resume`.
#[derive(Debug, clap::Args)]
pub struct ResumeArgs {
    #[command(flatten)]
    vms: NamesArg,
    /// How long to wait for the memory that a VM needs, such as 30s
    #[arg(long, value_name = "TIME", value_parser = duration)]
    wait: Option<Duration>,
}

/// Lets VMs go on, at once or as soon as there is memory for them.
pub async fn resume(args: ResumeArgs) -> Result<u8, Failure> {
    let wait = args.wait.unwrap_or_default();
    each(&args.vms.names, &args.vms.socket, false, move |vm, socket| async move {
        let target = format!("/vms/{vm}/resume?wait_ms={}", wait.as_millis());
        let (_, body) = client::request(&socket, Method::POST, &target, String::new()).await?;
        let view: VmView = client::decode(&body)?;
        if view.state == VmState::Running && view.held.now {
            eprintln!("ballast: {vm} goes on when it has memory: it is held at its limit");
        }
        Ok(())
    })
    .await
}

/// `ballast stop`.
#[derive(Debug, clap::Args)]
pub struct StopArgs {
    #[command(flatten)]
    vms: NamesArg,
    /// How long a guest has to power itself off before its VM is killed
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s")]
    timeout: Duration,
}

/// Asks guests to power themselves off, and says which had to be killed.
pub async fn stop(args: StopArgs) -> Result<u8, Failure> {
    let timeout = host::scaled(args.timeout);
    each(&args.vms.names, &args.vms.socket, false, move |vm, socket| async move {
        let target = format!("/vms/{vm}/stop?timeout_ms={}", timeout.as_millis());
        let (_, body) = client::request(&socket, Method::POST, &target, String::new()).await?;
        let stopped: StopView = client::decode(&body)?;
        if stopped.killed && stopped.unheard {
            eprintln!("ballast: {vm} was killed: it stood still for want of memory, so its guest heard nothing");
        } else if stopped.killed {
            eprintln!("ballast: {vm} did not power itself off and was killed");
        }
        Ok(())
    })
    .await
}

/// `ballast events`.
#[derive(Debug, clap::Args)]
pub struct EventsArgs {
    /// Name of the VM; not needed when only one is running
    pub name: Option<String>,
    /// The same
    #[arg(long, value_name = "NAME", conflicts_with = "name")]
    pub vm: Option<String>,
    /// Wait for more
    #[arg(short, long)]
    pub follow: bool,
    /// Only those after this number
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub since: u64,
    /// As JSON, one object a line
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Prints events.
pub async fn events(args: EventsArgs) -> Result<u8, Failure> {
    let only = args.name.or(args.vm);
    let socket = match &only {
        Some(vm) => {
            let socket = socket::to_reach(&args.socket, &name(vm).map_err(Failure::usage)?)?;
            check_known(&socket, vm).await?;
            socket
        }
        None => socket::the_only(&args.socket)?,
    };
    let target = format!("/events?since={}&follow={}", args.since, args.follow);
    let mut lines = Lines::open(&socket, Method::GET, &target, String::new(), "its events", args.follow).await?;
    while let Some(line) = lines.next().await? {
        let event: Event = client::decode(&line)?;
        // A controller with many VMs tells of all. What is lost may have been of this one.
        let lost = matches!(event.event, EventKind::Dropped | EventKind::Restarted);
        if only.is_some() && event.vm != only && !lost {
            continue;
        }
        let text = if args.json { line } else { event_line(&event).into_bytes() };
        if !output::write(text)? {
            return Ok(DONE);
        }
    }
    if args.follow { Err(lines.ended()) } else { Ok(DONE) }
}

/// Whether a controller has a VM, or has had it since its oldest event.
///
/// # Errors
/// What the controller says of a name that it does not know.
async fn check_known(socket: &Path, vm: &str) -> Result<(), Failure> {
    let shown = client::open(socket, Method::GET, &format!("/vms/{vm}"), String::new()).await?;
    if shown.status() != hyper::StatusCode::NOT_FOUND {
        return Ok(());
    }
    let unknown = client::awaited(socket, shown.into_body().collect()).await?;
    let unknown = unknown.map_or_else(|_| Vec::new(), |body| body.to_bytes().to_vec());
    let (_, body) = client::request(socket, Method::GET, "/events?since=0&follow=false", String::new()).await?;
    let of_it = |line: &[u8]| serde_json::from_slice::<Event>(line).is_ok_and(|event| event.vm.as_deref() == Some(vm));
    match body.split(|byte| *byte == b'\n').any(of_it) {
        true => Ok(()),
        false => Err(client::refused(hyper::StatusCode::NOT_FOUND, &unknown)),
    }
}

/// An event for people: time of day (UTC), VM, what happened, and the numbers.
pub fn event_line(event: &Event) -> String {
    let seconds = event.time_ms / 1000;
    let (hours, minutes, seconds) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let kind = serde_json::to_value(event.event).ok();
    let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or("?");
    let mut line = format!(
        "{:>5} {hours:02}:{minutes:02}:{seconds:02}.{:03} {:12} {kind:18}",
        event.seq,
        event.time_ms % 1000,
        event.vm.as_deref().or(event.group.as_deref()).unwrap_or("-"),
    );
    if event.event == EventKind::Dropped {
        line.push_str(" events before this one are lost:");
    }
    for (key, value) in &event.details {
        match (key.strip_suffix("_bytes"), value.as_u64()) {
            (_, None) if value.is_null() => {}
            (Some(key), Some(bytes)) => line.push_str(&format!(" {key}={}", human(bytes))),
            _ => line.push_str(&format!(" {key}={}", show::plain(value))),
        }
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(limits: &[&str]) -> Result<String, String> {
        let limits: Vec<_> = limits.iter().map(|&limit| limit.to_owned()).collect();
        patch(&limits).map(|patch| serde_json::to_string(&patch).unwrap())
    }

    #[test]
    fn limits_become_a_body() {
        assert_eq!(body(&["memory.max=256M"]).unwrap(), r#"{"max_bytes":268435456}"#);
        assert_eq!(body(&["track=on"]).unwrap(), r#"{"track":true}"#);
        assert_eq!(body(&["memory.high=max", "swap.max=0"]).unwrap(), r#"{"high_bytes":null,"swap_max_bytes":0}"#);
        assert_eq!(body(&["store.max=4M"]).unwrap(), r#"{"store_max_bytes":4194304}"#);
    }

    #[test]
    fn wrong_limits_are_usage_errors() {
        for (limits, part) in [
            (&["memory.max"][..], "not LIMIT=SIZE"),
            (&["memory.limit=5M"], "no limit \"memory.limit\""),
            (&["memory.max=1M", "memory.max=2M"], "given twice"),
            (&["track=yes"], "neither on nor off"),
            (&["memory.max=-1"], "negative"),
            (&["memory.max="], "empty size"),
            (&["memory.max=4097"], "not a multiple"),
            (&["memory.max=99999999999T"], "too large"),
        ] {
            let error = body(limits).expect_err("refused");
            assert!(error.contains(part), "{limits:?}: {error}");
        }
    }

    #[test]
    fn an_event_is_a_line_with_human_sizes() {
        let event: Event = serde_json::from_str(
            r#"{"seq":7,"time_ms":3723004,"event":"max_hit","vm":"web","usage_bytes":67108864,"held_ms":3}"#,
        )
        .unwrap();
        assert_eq!(event_line(&event), "    7 01:02:03.004 web          max_hit            held_ms=3 usage=64M\n");
    }
}

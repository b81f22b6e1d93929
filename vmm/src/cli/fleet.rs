//! `create`, `ps` and `rm`: the VMs of `ballast serve`.

use hyper::Method;
use memcg_core::units::human;

use super::options::{group_path, name};
use super::verbs::each;
use super::vm_args::VmArgs;
use super::{DONE, Failure, NamesArg, SocketArg, client, output, show, socket};
use crate::controller::overview::{Overview, StrayView};
use crate::controller::view::{VmState, VmView};

/// `ballast create`.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// Name of the VM [default: that of --config]
    #[arg(value_parser = name, required_unless_present = "config")]
    name: Option<String>,
    /// Group that the VM is made in, such as /gold [default: that of --config, or /]
    #[arg(long, value_name = "PATH", value_parser = group_path)]
    group: Option<String>,
    #[command(flatten)]
    vm: VmArgs,
    #[command(flatten)]
    socket: SocketArg,
}

/// Makes a VM in `serve` and waits until its guest runs.
pub async fn create(args: CreateArgs) -> Result<u8, Failure> {
    let (name_in_file, mut config) = args.vm.absolute_config()?;
    let name = args.name.or(name_in_file);
    let name =
        name.ok_or_else(|| Failure::usage("the file gives the VM no name: write one there, or before --config"))?;
    config.group = args.group.unwrap_or(config.group);
    let socket = socket::to_reach_service(&args.socket)?;
    let body = serde_json::to_string(&config).map_err(|error| Failure::error(error.to_string()))?;
    client::request(&socket, Method::PUT, &format!("/vms/{name}"), body).await?;
    Ok(DONE)
}

/// `ballast move`.
#[derive(Debug, clap::Args)]
pub struct MoveArgs {
    /// Name of the VM
    #[arg(value_parser = name)]
    name: String,
    /// Path of the group that it is to be in, / for none
    #[arg(value_parser = group_path)]
    group: String,
    /// Print the VM as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Moves a VM to another group.
pub async fn move_to(args: MoveArgs) -> Result<u8, Failure> {
    let socket = socket::to_reach_only(&args.socket, &args.name, false).await?;
    let body = serde_json::json!({ "group": args.group }).to_string();
    let (_, body) = client::request(&socket, Method::POST, &format!("/vms/{}/move", args.name), body).await?;
    let view: VmView = client::decode(&body)?;
    if args.json { output::json(&view) } else { Ok(DONE) }
}

/// Ends VMs and forgets them.
pub async fn rm(args: NamesArg) -> Result<u8, Failure> {
    each(&args.names, &args.socket, true, |vm, socket| async move {
        client::request(&socket, Method::DELETE, &format!("/vms/{vm}"), String::new()).await?;
        Ok(())
    })
    .await
}

/// `ballast ps`.
#[derive(Debug, clap::Args)]
pub struct PsArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Lists the VMs of `serve` and of every `run`.
pub async fn ps(args: PsArgs) -> Result<u8, Failure> {
    let (hosts, status) = client::answers::<Overview>(socket::all(&args.socket)?, "/overview?events=0").await;
    if hosts.is_empty() && status != DONE {
        // That there are none is not known.
        return Ok(status);
    }
    let (mut vms, mut strays) = (Vec::new(), Vec::new());
    for (_, overview) in hosts {
        vms.extend(overview.vms);
        strays.extend(overview.host.strays);
    }
    vms.sort_by(|a, b| a.name.cmp(&b.name));
    if args.json {
        output::json(&vms)?
    } else {
        output::print(table(&vms, &strays))?
    };
    Ok(status)
}

/// One line for each VM, in columns as wide as what is in them; those of which nothing is known but what is charged come last.
fn table(vms: &[VmView], strays: &[StrayView]) -> String {
    let header =
        ["NAME", "GROUP", "STATE", "CURRENT", "MAX", "%", "VMM", "BALLOON", "PRESSURE", "AGE"].map(str::to_owned);
    let rows = vms.iter().map(|vm| {
        let charged = |bytes: u64| if vm.accounting { human(bytes) } else { "-".to_owned() };
        [
            vm.name.clone(),
            vm.group.clone(),
            show::state(vm).to_owned(),
            charged(vm.memory.current_bytes),
            vm.memory.max_bytes.map_or("max".to_owned(), human),
            show::share(vm).map_or("-".to_owned(), |share| format!("{:.0}", share * 100.0)),
            charged(vm.vmm.current_bytes),
            human(vm.balloon.actual_bytes),
            format!("{:.2}", vm.pressure.some.avg10),
            if vm.state == VmState::Ended { "-".to_owned() } else { show::age(vm.age_ms) },
        ]
    });
    let unknown = strays.iter().map(|stray| {
        let known = [stray.name.clone(), stray.group.clone().unwrap_or("-".to_owned()), "unreachable".to_owned()];
        let mut known = known.into_iter().chain([human(stray.charged_bytes)]);
        std::array::from_fn(|_| known.next().unwrap_or("-".to_owned()))
    });
    show::columns(&[header].into_iter().chain(rows).chain(unknown).collect::<Vec<_>>(), 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_list_has_a_header() {
        assert_eq!(table(&[], &[]), "NAME  GROUP  STATE  CURRENT  MAX  %  VMM  BALLOON  PRESSURE  AGE\n");
    }

    #[test]
    fn who_could_not_be_taken_over_is_listed_with_what_is_charged() {
        let (group, why) = (Some("/gold".to_owned()), "it says nothing".to_owned());
        let stray =
            StrayView { name: "web".to_owned(), group, pid: Some(7), why, is_ending: false, charged_bytes: 88 << 20 };
        let table = table(&[], &[stray]);
        let words: Vec<_> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
        assert_eq!(words, ["web", "/gold", "unreachable", "88M", "-", "-", "-", "-", "-", "-"]);
    }
}

//! `ballast run`: a private controller with one VM, in the foreground.

use std::process;
use std::time::Duration;

use memcg_core::units::{Limit, exact};

use super::options::name;
use super::signals::Signals;
use super::vm_args::VmArgs;
use super::{DONE, ERROR, Failure, KILLED, RUN_FAILED, SocketArg, console, notify, socket};
use crate::api::server;
use crate::chain::chain;
use crate::controller::config::Memory;
use crate::controller::start::{Started, start};
use crate::controller::{Controller, KilledBy, VmEnd, host, spawn};
use crate::worker::protocol::ExitReason;

/// `ballast run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// Name of the VM [default: that of --config, or vm-PID]
    #[arg(long, value_parser = name)]
    name: Option<String>,
    #[command(flatten)]
    vm: VmArgs,
    #[command(flatten)]
    socket: SocketArg,
}

/// How long the output of a guest that was ended may take to be read.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// The exit status after signal number `signal`.
pub fn signal_status(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(RUN_FAILED)
}

/// Runs a VM until it ends. Its controller has no groups: a `group` in the file of `--config` is taken no notice of.
pub async fn run(args: RunArgs, log: &str) -> Result<u8, Failure> {
    let (name_in_file, mut config) = args.vm.config()?;
    // The file may be one for `create`.
    config.group = "/".to_owned();
    let vm_name = args.name.or(name_in_file).unwrap_or_else(|| format!("vm-{}", process::id()));
    let listen = socket::to_listen(&args.socket, &vm_name);
    let directory = socket::vm_directory(&listen);
    let as_failure = |error: &dyn std::error::Error| Failure::run(chain(error));
    spawn::check_socket_path(&listen).map_err(|error| as_failure(&error))?;
    spawn::check_socket_path(&spawn::console_socket(&directory)).map_err(|error| as_failure(&error))?;
    socket::check_place(&args.socket, &listen).map_err(Failure::run)?;
    let memory = config.memory.check().map_err(|error| as_failure(&error))?;
    let plan = config.plan(&vm_name).map_err(|error| as_failure(&error))?;
    host::check_kernel().map_err(|error| as_failure(&error))?;
    host::open_kvm().map_err(|error| as_failure(&error))?;
    if plan.spec.accounting {
        host::open_userfaultfd().map_err(|error| as_failure(&error))?;
    }

    let mut signals = Signals::new().map_err(|error| as_failure(&error))?;
    let bound = server::bind(&listen).map_err(|error| as_failure(&error))?;
    let (controller, actor) = Controller::start(Limit::Max);
    let Started { mut end, console, .. } =
        start(&controller, plan, directory, log, true, None).await.map_err(|error| as_failure(&error))?;
    let server = server::serve(bound, controller.clone(), None).map_err(|error| as_failure(&error))?;
    let console = console.ok_or_else(|| Failure::run("the console is not connected"))?;
    let mut console = console::start(console).map_err(|error| as_failure(&error))?;

    notify::ready();
    let mut status = None;
    let leaving = console.leaving();
    let ended = tokio::select! {
        ended = &mut end => ended,
        signal = signals.next() => {
            status = Some(signal_status(signal));
            // That it has ended by itself meanwhile is as good.
            let _ = controller.kill(&vm_name).await;
            end.await
        }
        () = leaving => {
            status = Some(DONE);
            let _ = controller.kill(&vm_name).await;
            end.await
        }
    };
    // A guest that has ended has its output read, however long that takes; one that was told to end has not.
    let patience = async {
        match status {
            Some(_) => tokio::time::sleep(host::scaled(LAST_OUTPUT)).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = console.drained() => {}
        () = patience => {}
        // Nobody reads the output and somebody has lost patience.
        signal = signals.next() => status = Some(signal_status(signal)),
    }
    console.restore();
    server.stop().await;
    drop(controller);
    // The actor ends with its last user; connections that did not let go may keep it.
    actor.abort();
    let ended = ended.map_err(|_| Failure::run("the controller has ended before the VM"))?;
    match status {
        Some(status) => Ok(status),
        None => conclude(ended, &vm_name, &memory),
    }
}

/// The exit status of `run` for an end of the VM, or the sentence that explains it.
fn conclude(end: VmEnd, name: &str, memory: &Memory) -> Result<u8, Failure> {
    match end {
        VmEnd::Guest(ExitReason::PowerOff | ExitReason::Reset) => Ok(DONE),
        VmEnd::Guest(ExitReason::Status(status)) => Ok(status),
        VmEnd::Guest(ExitReason::TripleFault) => {
            Err(Failure { message: format!("the guest {name} stopped with a triple fault"), status: ERROR })
        }
        VmEnd::Guest(ExitReason::Error) => Err(Failure::run(format!("the VM {name} failed"))),
        VmEnd::Killed(KilledBy::Request) => {
            Err(Failure { message: format!("the VM {name} was killed on request"), status: KILLED })
        }
        VmEnd::Killed(KilledBy::Stop) => Err(Failure {
            message: format!("the VM {name} was killed: it did not power itself off in time"),
            status: KILLED,
        }),
        VmEnd::Killed(KilledBy::Host) => {
            Err(Failure { message: format!("the VM {name} was killed: the host ran short of memory"), status: KILLED })
        }
        VmEnd::Killed(KilledBy::Group) => {
            Err(Failure { message: format!("the VM {name} was killed: its group ran short of memory"), status: KILLED })
        }
        VmEnd::Killed(KilledBy::Policy) => Err(Failure {
            message: format!(
                "the VM {name} was killed: it was held at memory.max {} for too long; raise max, or choose --oom \
                 action=pause",
                memory.limits.max.unwrap_or(Limit::Max)
            ),
            status: KILLED,
        }),
        VmEnd::Failed { message, smallest_max: Some(smallest) } => Err(Failure::run(format!(
            "{message}: use --memory size={},max={} or more",
            exact(memory.size.bytes()),
            exact(smallest.bytes())
        ))),
        VmEnd::Failed { message, smallest_max: None } => Err(Failure::run(message)),
        VmEnd::Died { message } => Err(Failure::run(format!("the worker of the VM {name} {message}"))),
    }
}

#[cfg(test)]
mod tests {
    use memcg_core::units::Pages;

    use super::super::options::MemoryArg;
    use super::*;

    fn status(end: VmEnd) -> u8 {
        let MemoryArg { memory, .. } = "size=64M,max=32M".parse().unwrap();
        conclude(end, "web", &memory).unwrap_or_else(|failure| failure.status)
    }

    #[test]
    fn every_end_has_its_status() {
        assert_eq!(status(VmEnd::Guest(ExitReason::PowerOff)), 0);
        assert_eq!(status(VmEnd::Guest(ExitReason::Reset)), 0);
        assert_eq!(status(VmEnd::Guest(ExitReason::Status(42))), 42);
        assert_eq!(status(VmEnd::Guest(ExitReason::TripleFault)), 1);
        assert_eq!(status(VmEnd::Guest(ExitReason::Error)), 125);
        assert_eq!(status(VmEnd::Killed(KilledBy::Policy)), 137);
        assert_eq!(status(VmEnd::Killed(KilledBy::Request)), 137);
        assert_eq!(status(VmEnd::Killed(KilledBy::Stop)), 137);
        assert_eq!(status(VmEnd::Died { message: "vanished".to_owned() }), 125);
        assert_eq!(signal_status(15), 143);
    }

    #[test]
    fn the_smallest_limit_is_named_so_that_it_can_be_typed() {
        let MemoryArg { memory, .. } = "size=64M,max=1M".parse().unwrap();
        let end = |pages| VmEnd::Failed { message: "too small".to_owned(), smallest_max: Some(Pages(pages)) };
        let sentence = |pages| conclude(end(pages), "web", &memory).unwrap_err().message;
        assert_eq!(sentence(2048), "too small: use --memory size=64M,max=8M or more");
        assert!(sentence(2049).contains("max=8196K "), "{}", sentence(2049));
    }
}

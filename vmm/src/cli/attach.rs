//! `ballast console`: goes to the console of a VM that runs, and leaves it alone when it goes.

use std::io::IsTerminal;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use hyper::Method;

use super::options::name;
use super::signals::Signals;
use super::{DONE, Failure, SocketArg, client, console, output, socket, usage};
use crate::chain::chain;
use crate::controller::host;
use crate::controller::view::VmView;

/// How long a VM may take to end when its console has, and how often that is looked at.
const END: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// `ballast console`.
#[derive(Debug, clap::Args)]
pub struct ConsoleArgs {
    /// Name of the VM
    name: String,
    /// Print the last 64 KiB and end; works for a VM that has ended, too
    #[arg(long)]
    no_follow: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Prints what the guest has printed and prints, and types what is typed, until Ctrl-], a signal, or the VM's end.
pub async fn attach(args: ConsoleArgs) -> Result<u8, Failure> {
    let vm = name(&args.name).map_err(Failure::usage)?;
    let socket = socket::to_reach(&args.socket, &vm)?;
    if args.no_follow {
        let (_, text) = client::request(&socket, Method::GET, &format!("/vms/{vm}/console"), String::new()).await?;
        return output::print(text);
    }
    let show = async || -> Result<VmView, Failure> {
        let (_, body) = client::request(&socket, Method::GET, &format!("/vms/{vm}"), String::new()).await?;
        client::decode(&body)
    };
    let at = show().await?.console.ok_or_else(|| {
        Failure::error(format!("the VM {vm:?} has ended: `ballast console --no-follow {vm}` prints its last words"))
    })?;
    let failed = |error: std::io::Error| Failure::error(format!("the console {at} cannot be used: {}", chain(&error)));
    let stream = UnixStream::connect(&at).map_err(failed)?;
    let mut signals = Signals::new().map_err(failed)?;
    let terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if terminal {
        eprintln!("ballast: this is the console of {vm}; Ctrl-] leaves it");
    }
    let mut console = console::start(stream).map_err(failed)?;
    let leaving = console.leaving();
    let status = tokio::select! {
        () = leaving => Some(DONE),
        signal = signals.next() => Some(super::run::signal_status(signal)),
        () = console.drained() => None,
    };
    console.restore();
    if let Some(status) = status {
        if terminal {
            eprintln!("\nballast: left {vm}, which goes on");
        }
        return Ok(status);
    }
    // The stream has ended: so does the VM, or we were not let in, and were told so there.
    let until = tokio::time::Instant::now() + host::scaled(END);
    let now = loop {
        match show().await {
            Ok(view) if view.console.is_some() && tokio::time::Instant::now() < until => {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            now => break now,
        }
    };
    match now {
        Ok(view) if view.console.is_some() => Err(Failure::error(format!("the console of {vm} was closed"))),
        Ok(view) => {
            if terminal {
                let how = view.end.as_deref().unwrap_or("it has ended");
                eprintln!("ballast: {vm} is over: {}", usage::printable(how));
            }
            Ok(DONE)
        }
        // Its controller has ended with it.
        Err(_) => Ok(DONE),
    }
}

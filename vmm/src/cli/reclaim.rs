//! `ballast reclaim`: memory back from a VM or a group, now.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use hyper::Method;
use memcg_core::units::{Limit, human};

use super::options::{duration, group_path, limit, name};
use super::{DONE, Failure, NOT_REACHED, SocketArg, client, output, socket};
use crate::controller::reclaim::ReclaimedView;
use crate::controller::view::ReclaimView;

/// Time between two looks at how far it has got.
const LOOK: Duration = Duration::from_millis(250);

/// `ballast reclaim`.
#[derive(Debug, clap::Args)]
pub struct ReclaimArgs {
    /// Name of the VM, or path of a group such as /gold; / is the whole host
    pub name: String,
    /// By how much its usage is to fall, such as 64M
    #[arg(value_name = "SIZE")]
    pub size: String,
    /// How long to try
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s")]
    pub wait: Duration,
    /// Print what came of it as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Takes memory back, and says how much. On a terminal what is being done is shown meanwhile.
pub async fn reclaim(args: ReclaimArgs) -> Result<u8, Failure> {
    let bytes = size(&args.size).map_err(Failure::usage)?;
    let (socket, place) = if args.name.starts_with('/') {
        let path = group_path(&args.name).map_err(Failure::usage)?;
        (socket::to_reach_service(&args.socket)?, format!("/groups{path}"))
    } else {
        let vm = name(&args.name).map_err(Failure::usage)?;
        (socket::to_reach_only(&args.socket, &vm, false).await?, format!("/vms/{vm}"))
    };
    let wait = crate::controller::host::scaled(args.wait);
    let target = format!("{place}/reclaim?bytes={bytes}&wait_ms={}", wait.as_millis());
    let asked = client::request(&socket, Method::POST, &target, String::new());
    let (status, body) = if std::io::stderr().is_terminal() {
        let answer = tokio::select! {
            answer = asked => answer,
            never = progress(&socket, &place) => never,
        };
        show("");
        answer
    } else {
        asked.await
    }?;
    let reclaimed: ReclaimedView = client::decode(&body)?;
    if args.json {
        output::json(&reclaimed)?;
    }
    if status == hyper::StatusCode::ACCEPTED {
        let (got, wanted) = (human(reclaimed.reclaimed_bytes), human(reclaimed.requested_bytes));
        let vm = reclaimed.vm.map(|vm| vm.memory.current_bytes);
        let usage = vm.or(reclaimed.group.map(|group| group.memory.current_bytes)).map_or("?".to_owned(), human);
        eprintln!("ballast: {got} of {wanted} came back, {usage} is in use: nothing more could be had in this time");
        return Ok(NOT_REACHED);
    }
    Ok(DONE)
}

/// A size in bytes.
fn size(word: &str) -> Result<u64, String> {
    match limit(word)? {
        Limit::Pages(pages) => Ok(pages.bytes()),
        Limit::Max => Err("max is no amount: write for example 64M".to_owned()),
    }
}

/// Shows on stderr what is being done, until somebody stops it.
async fn progress<T>(socket: &Path, place: &str) -> Result<T, Failure> {
    /// What a VM and a group have in common.
    #[derive(serde::Deserialize)]
    struct View {
        memory: Memory,
        reclaim: ReclaimView,
    }
    #[derive(serde::Deserialize)]
    struct Memory {
        current_bytes: u64,
    }
    loop {
        tokio::time::sleep(LOOK).await;
        let (_, body) = client::request(socket, Method::GET, place, String::new()).await?;
        let view: View = client::decode(&body)?;
        show(&format!("{}, {} in use", view.reclaim.rung.doing(), human(view.memory.current_bytes)));
    }
}

/// Shows a line on stderr, in the place of the last one.
fn show(line: &str) {
    // A terminal that is gone has seen enough.
    let _ = write!(std::io::stderr(), "\r\x1b[K{line}\r").and_then(|()| std::io::stderr().flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_amount_is_a_size_and_has_an_end() {
        assert_eq!(size("64M"), Ok(64 << 20));
        for (word, says) in [("max", "max is no amount"), ("", "size"), ("-1", "-1"), ("4x", "4x")] {
            let message = size(word).expect_err(word);
            assert!(message.contains(says), "{word:?}: {message}");
        }
    }
}

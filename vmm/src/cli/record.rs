//! `ballast record`: what the VMs of a controller use, as a trace for `ballast sim`.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;
use std::time::Duration;

use hyper::Method;
use tokio::time::{Instant, MissedTickBehavior};

use super::options::duration;
use super::signals::Signals;
use super::{DONE, Failure, SocketArg, client, socket};
use crate::controller::overview::Overview;
use crate::sim::trace::Recorder;

/// Shortest time between two moments.
const SHORTEST: Duration = Duration::from_millis(100);

/// `ballast record`.
#[derive(Debug, clap::Args)]
pub struct RecordArgs {
    /// Where to write it, - for stdout
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Time between two moments
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1s")]
    every: Duration,
    /// How long [default: until a signal comes]
    #[arg(long = "for", value_name = "TIME", value_parser = duration)]
    lasts: Option<Duration>,
    #[command(flatten)]
    socket: SocketArg,
}

/// Writes a moment after the other until it is time, or a signal comes. What has been written is a whole trace at any time.
pub async fn record(args: RecordArgs) -> Result<u8, Failure> {
    let socket = socket::the_only(&args.socket)?;
    let unwritten = |error| Failure::error(format!("{} cannot be written: {error}", args.file.display()));
    let mut signals = Signals::new().map_err(|error| Failure::error(format!("signals cannot be taken: {error}")))?;
    let mut file: Box<dyn Write> = match args.file.as_os_str() == "-" {
        true => Box::new(std::io::stdout()),
        false => Box::new(File::create(&args.file).map_err(unwritten)?),
    };
    let mut recorder = Recorder::default();
    let mut clock = tokio::time::interval(args.every.max(SHORTEST));
    clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let begun = Instant::now();
    loop {
        tokio::select! {
            _ = signals.next() => return Ok(DONE),
            _ = clock.tick() => {}
        }
        let (_, body) = client::request(&socket, Method::GET, "/overview?events=0", String::new()).await?;
        let overview: Overview = client::decode(&body)?;
        let ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let mut text = String::new();
        for line in recorder.lines(ms, &overview) {
            text.push_str(&serde_json::to_string(&line).map_err(|error| Failure::error(error.to_string()))?);
            text.push('\n');
        }
        match file.write_all(text.as_bytes()).and_then(|()| file.flush()) {
            // Whoever reads it has enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(DONE),
            written => written.map_err(unwritten)?,
        }
        if args.lasts.is_some_and(|lasts| begun.elapsed() + args.every > lasts) {
            return Ok(DONE);
        }
    }
}

//! The holder: a process of its own for the memory that `touch` takes, because the kernel never kills its init.

use std::io::{self, BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use guest_common::{Arguments, Fill, PAGE_SIZE, PAGE_WORDS};

use crate::sys;

/// The argument that makes this program the holder.
pub const ARGUMENT: &str = "--holder";

/// A running holder, seen from init.
pub struct Holder {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Holder {
    /// Starts one, holding nothing.
    pub fn start() -> io::Result<Self> {
        let mut child = Command::new("/init").arg(ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("no pipes"));
        };
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    /// Sends a command. The outer error means that the holder has died of it; the inner is the command's.
    pub fn ask(&mut self, command: &str) -> io::Result<Result<String, String>> {
        let mut answer = String::new();
        let sent = writeln!(self.input, "{command}").and_then(|()| self.output.read_line(&mut answer));
        if sent.is_err() || answer.is_empty() {
            return Err(io::Error::other(self.child.wait()?.to_string()));
        }
        let answer = answer.trim_end();
        Ok(match answer.strip_prefix("ERR ") {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer.to_owned()),
        })
    }
}

/// One stretch of anonymous memory and what was written to it.
struct Region {
    words: &'static mut [u64],
    seed: u64,
    fill: Fill,
}

/// The holder's own side: obeys lines on standard input until there are no more, one line of answer for each.
pub fn serve() {
    let mut regions = Vec::new();
    for line in io::stdin().lock().lines() {
        let Ok(line) = line else { return };
        let (verb, rest) = line.split_once(' ').unwrap_or((&line, ""));
        match verb {
            "touch" => match touch(Arguments(rest)) {
                Ok(region) => {
                    println!("TOUCH pages={}", region.words.len() / PAGE_WORDS);
                    regions.push(region);
                }
                Err(error) => println!("ERR {error}"),
            },
            "verify" => println!("{}", verify(&regions)),
            _ => {
                let kept = regions.len().saturating_sub(last(Arguments(rest)).unwrap_or(regions.len()));
                let pages: usize = regions[kept..].iter().map(|r: &Region| r.words.len() / PAGE_WORDS).sum();
                regions.drain(kept..).for_each(|region| sys::unmap(region.words));
                println!("FREE pages={pages}");
            }
        }
    }
}

/// How many stretches `free [last=N]` means; all without it.
fn last(arguments: Arguments<'_>) -> Option<usize> {
    arguments.option("last")?.parse().ok()
}

/// `touch SIZE [seed=N] [fill=ends|half|mixed|same|full]`; a second plain word is a seed as well.
fn touch(arguments: Arguments<'_>) -> Result<Region, String> {
    let size = arguments.number(0, "SIZE").map_err(|e| e.to_string())?;
    let word_seed = arguments.number(1, "seed").unwrap_or(1);
    let seed = arguments.number_or("seed", word_seed).map_err(|e| e.to_string())?;
    let fill = arguments.fill().map_err(|e| e.to_string())?;
    let bytes = size.div_ceil(PAGE_SIZE).max(1).checked_mul(PAGE_SIZE).and_then(|b| usize::try_from(b).ok());
    let bytes = bytes.ok_or("SIZE is too large")?;
    let words = sys::map(bytes).map_err(|e| format!("cannot map {bytes} bytes: {e}"))?;
    for (page, words) in words.chunks_exact_mut(PAGE_WORDS).enumerate() {
        for word in fill.words() {
            words[word] = fill.value(seed, page as u64, word);
        }
    }
    Ok(Region { words, seed, fill })
}

/// Reads everything back; the first bad page is numbered over all regions, in the order they were touched.
fn verify(regions: &[Region]) -> String {
    let (mut pages, mut bad, mut first) = (0, 0, None);
    for region in regions {
        for (page, words) in region.words.chunks_exact(PAGE_WORDS).enumerate() {
            let Region { seed, fill, .. } = *region;
            let good = fill.words().all(|word| words[word] == fill.value(seed, page as u64, word));
            if !good {
                bad += 1;
                first.get_or_insert(pages);
            }
            pages += 1;
        }
    }
    match first {
        None => format!("VERIFY ok pages={pages}"),
        Some(first) => format!("VERIFY bad pages={pages} bad={bad} first={first}"),
    }
}

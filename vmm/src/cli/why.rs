//! `ballast why`: a VM's memory story.

use std::fmt::Write;

use hyper::Method;

use super::options::name;
use super::{Failure, SocketArg, client, output, socket};
use crate::controller::why::{WhyView, ago};

/// `ballast why`.
#[derive(Debug, clap::Args)]
pub struct WhyArgs {
    /// Name of the VM, also of one that has ended
    name: String,
    /// As JSON, with the facts behind the sentences
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    socket: SocketArg,
}

/// Tells the story.
pub async fn why(args: WhyArgs) -> Result<u8, Failure> {
    let vm = name(&args.name).map_err(Failure::usage)?;
    let socket = socket::to_reach(&args.socket, &vm)?;
    let (_, body) = client::request(&socket, Method::GET, &format!("/vms/{vm}/why"), String::new()).await?;
    let view: WhyView = client::decode(&body)?;
    if args.json { output::json(&view) } else { output::print(lines(&view)) }
}

/// A sentence a line, with when it was.
fn lines(view: &WhyView) -> String {
    let when = |time_ms: Option<u64>| time_ms.map_or("now".to_owned(), |at| ago(view.facts.now_ms.saturating_sub(at)));
    let mut out = String::new();
    for sentence in &view.story {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{:>12}  {}", when(sentence.time_ms), sentence.text);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::why::{Facts, Sentence};

    #[test]
    fn a_sentence_is_a_line_that_says_when() {
        let sentence = |time_ms, text: &str| Sentence { time_ms, text: text.to_owned() };
        let facts = Facts {
            name: "web".to_owned(),
            now_ms: 100_000,
            vm: None,
            groups: Vec::new(),
            shortage: None,
            events: Vec::new(),
            decisions: Vec::new(),
        };
        let view = WhyView { story: vec![sentence(Some(88_000), "it broke"), sentence(None, "it is gone")], facts };
        assert_eq!(lines(&view), "    12 s ago  it broke\n         now  it is gone\n");
    }
}

//! The `curl --unix-socket` lines of README.md and docs/, run as they stand.
//!
//! The blocks of `sh` of a document that have such a line in them are run one after the other in one shell, with what they
//! set, where a reader would run them: there is a `ballast serve`, and a VM called `web` of `ballast run` beside it. What
//! a document takes for granted beyond that is in [`BEFORE`]. Verbs in these blocks have tests of their own, and may be
//! for a terminal only: they do nothing here.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use ballast_tests::serve::Serve;
use ballast_tests::{TestVm, ballast, payload, skip};

use super::skipped;

/// Commands (`curl`) for the VMs and groups of `serve` that a document has made by the time of its first `curl`.
const BEFORE: &[(&str, &str)] = &[];

/// What a reader's shell is: a command that fails ends it, and an answer from 400 upwards is a failure.
const SHELL: &str = r#"
set -euo pipefail
curl() { command curl --fail-with-body --max-time 60 "$@"; }
ballast() { :; }
"#;

/// The checkout.
pub(super) fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace")
}

fn documents() -> Vec<PathBuf> {
    let docs = std::fs::read_dir(top().join("docs")).expect("docs").flatten().map(|entry| entry.path());
    let mut found: Vec<_> = docs.filter(|path| path.extension().is_some_and(|extension| extension == "md")).collect();
    found.push(top().join("README.md"));
    found.sort();
    found
}

/// The blocks of `sh` that ask a socket.
fn blocks(text: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while lines.any(|line| line.trim() == "```sh") {
        let block: Vec<_> = lines.by_ref().take_while(|line| line.trim() != "```").collect();
        blocks.push(block.join("\n"));
    }
    blocks.retain(|block| block.contains("curl") && block.contains("--unix-socket"));
    blocks
}

#[test]
fn the_curl_lines_of_the_documentation_work() {
    let curl = Command::new("curl").arg("--version").stdout(Stdio::null()).status();
    if !curl.is_ok_and(|status| status.success()) {
        skip("docs-curl", "there-is-no-curl");
        return;
    }
    if skipped("docs-curl") {
        return;
    }
    let mut run = 0;
    for path in documents() {
        let name = path.strip_prefix(top()).expect("below").to_str().expect("text").to_owned();
        let blocks = blocks(&std::fs::read_to_string(&path).expect("readable"));
        if blocks.is_empty() {
            continue;
        }
        let serve = Serve::start(&[]);
        let vm = TestVm::builder("web").memory("size=64M,max=48M").cmdline("shell").start();
        vm.wait_state("running", 10);
        let runtime = tempfile::Builder::new().prefix("bd").tempdir().expect("a temporary directory");
        let sockets = runtime.path().join("ballast");
        std::fs::create_dir(&sockets).expect("made");
        symlink(serve.socket(), sockets.join("ballast.sock")).expect("made");
        symlink(vm.socket(), sockets.join("web.sock")).expect("made");
        let shell = |commands: &str| {
            let mut command = Command::new("bash");
            command.arg("-c").arg(format!("{SHELL}{commands}")).stdin(Stdio::null());
            command.env("XDG_RUNTIME_DIR", runtime.path()).env("PAYLOAD", payload());
            let output = command.env_remove("BALLAST_SOCKET").output().expect("bash");
            let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{name}:\n{commands}\n-- {}\n{out}\n{err}", output.status);
        };
        let before = BEFORE.iter().find(|(document, _)| *document == name).map_or("", |(_, before)| before);
        let commands = format!("{before}\n{}", blocks.join("\n"));
        shell(&commands);
        run += commands.matches("--unix-socket").count();
    }
    println!("{run} lines");
    assert!(run > 5, "{run} lines only: have they another form now?");
}

/// What README.md types at `serve`, from the first VM to the budget: every verb as it stands, one after the other.
#[test]
fn the_verbs_of_the_readme_work_one_after_the_other() {
    if skipped("docs-verbs") {
        return;
    }
    let text = std::fs::read_to_string(top().join("README.md")).expect("readable");
    let from = text.find("## Many guests").expect("its heading");
    let to = text.find("## A VM in a file").expect("its heading");
    let blocks = text[from..to].split("```sh\n").skip(1).filter_map(|block| block.split("```").next());
    // Each block with one verb a line; those of curl have a test of their own, and one controller runs already.
    let commands: String = blocks.filter(|block| !block.contains("curl")).collect();
    let commands = commands.replace("ballast serve --budget 1G &", ":");
    assert!(commands.matches("\nballast ").count() > 12, "have they another form now?\n{commands}");
    let serve = Serve::start(&["--budget", "1G"]);
    let mut command = Command::new("bash");
    command.arg("-euc").arg(format!("ballast() {{ {} \"$@\"; }}\n{commands}", ballast().display()));
    command.env("BALLAST_SOCKET", serve.place()).env("PAYLOAD", payload()).stdin(Stdio::null());
    let output = command.output().expect("bash");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && err.is_empty(), "{commands}\n-- {}\n{out}\n{err}", output.status);
    assert_eq!(serve.show("w1")["group"], "/gold");
}

#[test]
fn blocks_of_other_languages_and_without_curl_are_left_alone() {
    let text = "```sh\necho\n```\n```json\ncurl --unix-socket\n```\n  ```sh\nS=1\ncurl --unix-socket $S\n```\n";
    assert_eq!(blocks(text), ["S=1\ncurl --unix-socket $S"]);
}

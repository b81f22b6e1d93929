//! A command that decides: it is run for each question, which is at its standard input, and the first line that it prints is
//! the answer. `serve --oom-hook` and `ballast oom policy` ask theirs in this way.

use std::io;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::{AnswerWord, DecisionAnswer, QuestionView};

/// Bytes of a command's answer that are read.
const MOST_SAID: u64 = 4096;

/// The processes of a command, killed unless they have ended.
struct Processes(Option<Pid>);

impl Drop for Processes {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // None of them may be left.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
}

/// Runs a command with a question at its standard input, and takes its first line for the answer. It is killed, with its
/// children, when it takes longer than `wait`.
///
/// # Errors
/// A sentence: it cannot be run, takes too long, fails, or says something else.
pub async fn ask(command: Command, question: &QuestionView, wait: Duration) -> Result<DecisionAnswer, String> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    match tokio::time::timeout(wait, run(command, question)).await {
        Ok(Ok(said)) => understood(said.lines().next().unwrap_or_default()),
        Ok(Err(error)) => Err(format!("{program}: {error}")),
        Err(_) => Err(format!("{program} did not end within {} ms", wait.as_millis())),
    }
}

async fn run(mut command: Command, question: &QuestionView) -> io::Result<String> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
    let mut child = command.spawn()?;
    let mut processes = Processes(child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)));
    let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
    let question = serde_json::to_vec(question).map_err(io::Error::other)?;
    let tell = async {
        if let Some(mut stdin) = stdin {
            // One that does not read it may know all the same.
            let _ = stdin.write_all(&[&question[..], b"\n"].concat()).await;
        }
    };
    let mut said = Vec::new();
    let hear = async {
        match stdout {
            Some(stdout) => stdout.take(MOST_SAID).read_to_end(&mut said).await.map(drop),
            None => Ok(()),
        }
    };
    let ((), heard) = tokio::join!(tell, hear);
    heard?;
    let status = child.wait().await?;
    processes.0 = None;
    if !status.success() {
        return Err(io::Error::other(format!("it failed ({status})")));
    }
    Ok(String::from_utf8_lossy(&said).into_owned())
}

/// A line as an answer.
///
/// # Errors
/// When it is none.
pub fn understood(line: &str) -> Result<DecisionAnswer, String> {
    let (answer, vm) = match line.split_whitespace().collect::<Vec<_>>()[..] {
        ["kill", vm] => (AnswerWord::Kill, Some(vm.to_owned())),
        ["pause", vm] => (AnswerWord::Pause, Some(vm.to_owned())),
        ["raise"] => (AnswerWord::Raise, None),
        ["ignore"] => (AnswerWord::Ignore, None),
        _ => {
            let line: String = line.chars().filter(|c| !c.is_control()).take(100).collect();
            return Err(format!("it said {line:?}, which is none of kill NAME, pause NAME, raise, ignore"));
        }
    };
    Ok(DecisionAnswer { answer, vm })
}

//! `ballast oom policy`: a script is the client that decides who is paused or killed.
//!
//! ```text
//!  with a command      question ─► its standard input      the first line that it prints ─► answer
//!  without one         question ─► a line of JSON          a line NUMBER ANSWER at stdin ─► answer
//! ```
//!
//! It is asked as long as it runs. When it ends, and for each question that is not answered in time, the policy decides. An
//! answer that is refused is said on stderr, and another one may be given. Without a command an answer has the number of its
//! question: one that comes too late must not be taken for the next.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use hyper::Method;
use serde_json::json;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::client::Lines;
use super::options::duration;
use super::signals::Signals;
use super::{DONE, Failure, SocketArg, client, output, socket, usage};
use crate::controller::questions::{AnswerWord, DecisionAnswer, QuestionView, WAITS, command};

/// `ballast oom policy`.
#[derive(Debug, clap::Args)]
pub struct PolicyArgs {
    /// How long an answer is waited for before the policy decides, 100ms to 60s
    #[arg(long, value_name = "TIME", value_parser = wait, default_value = "2s")]
    wait: Duration,
    /// Command that decides: it is run for each question, has it as JSON at its standard input, and prints kill NAME, pause
    /// NAME, raise or ignore
    ///
    /// Without a command each question is a line on stdout, and is answered by a line at stdin with its number before the answer.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    #[command(flatten)]
    socket: SocketArg,
}

/// How long an answer may be waited for.
fn wait(text: &str) -> Result<Duration, String> {
    let wait = duration(text)?;
    let fits = (WAITS[0]..=WAITS[1]).contains(&wait);
    fits.then_some(wait).ok_or_else(|| "an answer is waited for between 100ms and 60s".to_owned())
}

/// Whether there is such a program, as the shell looks for one.
fn is_there(program: &OsString) -> bool {
    if program.as_bytes().contains(&b'/') {
        return Path::new(program).is_file();
    }
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|below| below.join(program).is_file()))
}

/// Decides until a signal comes, nobody reads the questions or gives answers any more, or the controller has gone.
pub async fn policy(args: PolicyArgs) -> Result<u8, Failure> {
    if let Some(program) = args.command.first().filter(|program| !is_there(program)) {
        return Err(Failure::usage(format!("there is no program {}", program.display())));
    }
    let socket = socket::the_only(&args.socket)?;
    let mut signals = Signals::new().map_err(|error| Failure::error(format!("signals cannot be taken: {error}")))?;
    let wait_ms = u64::try_from(args.wait.as_millis()).unwrap_or(u64::MAX);
    let body = json!({ "wait_ms": wait_ms }).to_string();
    let questions = Lines::open(&socket, Method::PUT, "/oom/policy", body, "its questions", true).await?;
    eprintln!("ballast: asked from now on, before the policy decides");
    let decided = async {
        match args.command.split_first() {
            Some((program, words)) => by_command(program, words, &socket, questions).await,
            None => by_lines(&socket, questions).await,
        }
    };
    tokio::select! {
        // What it has asked dies with it.
        _ = signals.next() => Ok(DONE),
        status = decided => status,
    }
}

/// The next question.
async fn next(questions: &mut Lines) -> Result<(Vec<u8>, QuestionView), Failure> {
    let line = questions.next().await?.ok_or_else(|| questions.ended())?;
    let question = client::decode(&line)?;
    Ok((line, question))
}

/// Runs a command for each question. One that takes its time puts off nobody else's.
async fn by_command(
    program: &OsString,
    words: &[OsString],
    socket: &Path,
    mut questions: Lines,
) -> Result<u8, Failure> {
    let mut asked = JoinSet::new();
    loop {
        let question = tokio::select! {
            question = next(&mut questions) => question?.1,
            Some(_) = asked.join_next() => continue,
        };
        let mut command = Command::new(program);
        command.args(words).env("BALLAST_SOCKET", socket);
        let socket = socket.to_owned();
        asked.spawn(async move {
            let wait = Duration::from_millis(question.wait_ms);
            match command::ask(command, &question, wait).await {
                Ok(answer) => give(&socket, question.id, &answer).await,
                Err(why) => complain(question.id, &format!("{why}: the policy decides")),
            }
        });
    }
}

/// Prints questions and reads answers.
async fn by_lines(socket: &Path, mut questions: Lines) -> Result<u8, Failure> {
    let (lines, mut typed) = mpsc::channel(1);
    // It ends with the process, whatever it waits for.
    std::thread::spawn(move || {
        for line in std::io::stdin().lines() {
            if lines.blocking_send(line).is_err() {
                return;
            }
        }
    });
    loop {
        tokio::select! {
            question = next(&mut questions) => if !output::write(question?.0)? { return Ok(DONE) },
            line = typed.recv() => {
                let Some(line) = line else { return Ok(DONE) };
                let line: String = line.map_err(|error| Failure::error(format!("stdin cannot be read: {error}")))?;
                match numbered(&line) {
                    Ok((id, answer)) => give(socket, id, &answer).await,
                    Err(why) => eprintln!("ballast: {}", usage::printable(&why)),
                }
            }
        }
    }
}

/// A line with the number of a question and the answer to it.
fn numbered(line: &str) -> Result<(u64, DecisionAnswer), String> {
    let (number, answer) = line.trim().split_once(char::is_whitespace).unwrap_or((line.trim(), ""));
    let id = number.parse().map_err(|_| format!("{line:?} does not begin with the number of a question, its id"))?;
    Ok((id, command::understood(answer)?))
}

/// Gives an answer. What was done is said on stderr, as is why it was not.
async fn give(socket: &Path, id: u64, answer: &DecisionAnswer) {
    let Ok(body) = serde_json::to_string(answer) else { return };
    match client::request(socket, Method::POST, &format!("/oom/decisions/{id}"), body).await {
        Ok(_) => eprintln!("ballast: question {id}: {}", words(answer)),
        Err(failure) => complain(id, &format!("{} is refused: {}", words(answer), failure.message)),
    }
}

/// An answer as it is typed.
fn words(answer: &DecisionAnswer) -> String {
    let word = match answer.answer {
        AnswerWord::Kill => "kill",
        AnswerWord::Pause => "pause",
        AnswerWord::Raise => "raise",
        AnswerWord::Ignore => "ignore",
    };
    answer.vm.as_ref().map_or(word.to_owned(), |vm| format!("{word} {vm}"))
}

fn complain(id: u64, why: &str) {
    eprintln!("ballast: question {id}: {}", usage::printable(why));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_has_the_number_of_its_question() {
        let said = |line: &str| numbered(line).map(|(id, answer)| (id, words(&answer)));
        for (line, id, answer) in [
            ("7 kill web", 7, "kill web"),
            ("  8\tpause  web-1 ", 8, "pause web-1"),
            ("9 raise", 9, "raise"),
            ("10 ignore", 10, "ignore"),
        ] {
            assert_eq!(said(line), Ok((id, answer.to_owned())), "{line}");
        }
        for (line, why) in [
            ("kill web", "does not begin with the number"),
            ("", "does not begin with the number"),
            ("7", "none of kill NAME"),
            ("7 kill", "none of kill NAME"),
            ("-1 raise", "does not begin with the number"),
        ] {
            let error = said(line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
    }
}

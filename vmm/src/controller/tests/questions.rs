//! Somebody else decides, if it does so in time.

use super::super::error::Code;
use super::super::oom_log::{DecidedBy, Reason};
use super::super::questions::{AnswerWord, DecisionAnswer, QuestionView};
use super::super::view::{OomPreference, VmState};
use super::limits::change;
use super::shortage::{all, left, policy, watched};
use super::victims::{Full, KILL, kill};
use super::*;

/// The time that a client has to answer.
const WAIT: Duration = Duration::from_secs(2);

fn says(answer: AnswerWord, vm: &str) -> DecisionAnswer {
    DecisionAnswer { answer, vm: (!vm.is_empty()).then(|| vm.to_owned()) }
}

/// A full group of three, of which `big` would go first and `last` never, and a client that decides.
async fn decided() -> (Full, mpsc::Receiver<QuestionView>) {
    let vms =
        [("big", 2000, kill(KILL, 0)), ("last", 1000, kill(OomPreference::Omit, 0)), ("asks", 500, kill(KILL, 9))];
    let mut full = Full::new(6000, &vms).await;
    full.add("outside", "/", 3000, kill(KILL, -9)).await;
    let questions = full.controller.decide(WAIT).await.expect("registered");
    full.fill_with(2, 100).await;
    (full, questions)
}

/// The question that has been asked by now.
fn question(questions: &mut mpsc::Receiver<QuestionView>) -> QuestionView {
    questions.try_recv().expect("a question")
}

/// A client may choose whom it likes of those in the group, also one that the policy would never choose. That it was the client
/// who decided is on record.
/// Semantics: 51, T7.
#[tokio::test(start_paused = true)]
async fn a_client_decides() {
    let (mut full, mut questions) = decided().await;
    full.pass(6000).await;
    let asked = question(&mut questions);
    assert_eq!((asked.level.as_str(), asked.wait_ms, asked.not_shown), ("/gold", 2000, 0));
    assert_eq!(asked.ranked.iter().map(|entry| entry.vm.as_str()).collect::<Vec<_>>(), ["big", "asks", "last"]);
    let pending = all(&full.controller, EventKind::DecisionPending).await.pop().expect("told");
    assert_eq!((pending.group.as_deref(), &pending.details["asked"]), (Some("/gold"), &"client".into()));
    assert_eq!((pending.details["id"].as_u64(), pending.details["wait_ms"].as_u64()), (Some(asked.id), Some(2000)));
    assert_eq!(full.killed(), [false; 4], "it has its time");
    full.controller.answer_question(asked.id, says(AnswerWord::Kill, "last")).await.expect("done");
    full.pass(5000).await;
    assert_eq!(full.killed(), [false, true, false, false]);
    let victim = all(&full.controller, EventKind::VictimSelected).await.pop().expect("told");
    assert_eq!((victim.vm.as_deref(), &victim.details["by"]), (Some("last"), &"client".into()));
    let logged = full.controller.oom_log(0).await.expect("shown").decisions.pop().expect("one");
    assert_eq!((logged.by, logged.vm.as_deref()), (DecidedBy::Client, Some("last")));
    assert_eq!(victim.details["why"], logged.why.as_str(), "it is not said to be spared");
    assert!(logged.why.starts_with("last: ") && logged.why.ends_with(" above its protection of 0, priority 0"));
    let told = full.controller.why("last").await.expect("told");
    let text = format!("the client killed it, 3rd in the list: {}", logged.why.trim_start_matches("last: "));
    assert!(told.story.iter().any(|sentence| sentence.text.contains(&text)), "{:#?}", told.story);
    let again = full.controller.answer_question(asked.id, says(AnswerWord::Kill, "big")).await.expect_err("answered");
    assert_eq!(again.code, Code::NotFound);
}

/// When it says nothing in time the policy decides, as if nobody had been asked.
/// Semantics: 51, T7.
#[tokio::test(start_paused = true)]
async fn a_client_that_is_late_decides_nothing() {
    let (mut full, mut questions) = decided().await;
    full.pass(6500).await;
    assert_eq!(full.killed(), [false; 4]);
    full.pass(1500).await;
    assert_eq!(full.killed(), [true, false, false, false]);
    let asked = question(&mut questions);
    let late = full.controller.answer_question(asked.id, says(AnswerWord::Kill, "last")).await.expect_err("late");
    assert_eq!(late.code, Code::NotFound);
    let logged = full.controller.oom_log(0).await.expect("shown").decisions.pop().expect("one");
    assert_eq!(logged.by, DecidedBy::Policy);
    assert_eq!(logged.in_vain.as_deref(), Some("the client was asked in vain: no answer within 2000 ms"));
}

/// Why an answer was none, and that the client has gone, is on record with what the policy decided instead.
/// Semantics: 51, 63.
#[tokio::test(start_paused = true)]
async fn what_was_refused_is_on_record() {
    for (leaves, in_vain) in [(false, "there is no VM named \"unknown\" here"), (true, "it has gone")] {
        let (mut full, mut questions) = decided().await;
        full.pass(5600).await;
        let asked = question(&mut questions);
        full.controller.answer_question(asked.id, says(AnswerWord::Kill, "unknown")).await.expect_err("unknown");
        if leaves {
            drop(questions);
        }
        full.pass(2500).await;
        assert_eq!(full.killed(), [true, false, false, false]);
        let logged = full.controller.oom_log(0).await.expect("shown").decisions.pop().expect("one");
        let said = logged.in_vain.expect("said");
        assert!(said.starts_with("the client was asked in vain: ") && said.contains(in_vain), "{said}");
    }
}

/// When its connection ends the policy decides at once, and is asked no more.
/// Semantics: 51.
#[tokio::test(start_paused = true)]
async fn a_client_that_leaves_holds_nobody_up() {
    let (mut full, questions) = decided().await;
    full.pass(5600).await;
    assert_eq!(full.killed(), [false; 4]);
    drop(questions);
    full.pass(200).await;
    assert_eq!(full.killed(), [true, false, false, false]);
}

/// A VM of elsewhere would free nothing here; the question stays open for another answer.
/// Semantics: 48, 51, B40.
#[tokio::test(start_paused = true)]
async fn an_answer_that_does_not_fit_is_refused() {
    let (mut full, mut questions) = decided().await;
    full.pass(5600).await;
    let id = question(&mut questions).id;
    for (answer, vm, code) in [
        (AnswerWord::Kill, "outside", Code::WrongState),
        (AnswerWord::Kill, "unknown", Code::NotFound),
        (AnswerWord::Kill, "", Code::BadRequest),
        (AnswerWord::Ignore, "big", Code::BadRequest),
    ] {
        let refused = full.controller.answer_question(id, says(answer, vm)).await.expect_err(vm);
        assert_eq!(refused.code, code, "{answer:?} {vm}: {refused}");
    }
    assert_eq!(full.killed(), [false; 4]);
    full.controller.answer_question(id, says(AnswerWord::Kill, "asks")).await.expect("done");
    assert_eq!(full.killed(), [false, false, true, false]);
}

/// It may leave everything as it is: whoever is held stays so, and it is asked again after a while.
/// Semantics: 50, 51, T7.
#[tokio::test(start_paused = true)]
async fn a_client_may_leave_everybody_alone() {
    let (mut full, mut questions) = decided().await;
    full.pass(5600).await;
    let first = question(&mut questions).id;
    full.controller.answer_question(first, says(AnswerWord::Ignore, "")).await.expect("done");
    full.pass(9000).await;
    assert!(questions.try_recv().is_err());
    full.pass(1500).await;
    let second = question(&mut questions).id;
    let asked = full.controller.clone();
    let raised = tokio::spawn(async move { asked.change_group("/gold", change(pages(7000))).await });
    full.pass(500).await;
    raised.await.expect("no panic").expect("raised");
    let settled = full.controller.answer_question(second, says(AnswerWord::Kill, "big")).await.expect_err("settled");
    assert!(settled.code == Code::WrongState && settled.message.contains("has memory again"), "{settled}");
    full.let_go(2).await;
    full.pass(20_000).await;
    assert_eq!(full.killed(), [false; 4]);
}

/// Where nobody may be chosen, whoever is asked in vain is asked again after ten seconds, however many are held, and though its
/// answers are refused.
/// Semantics: 50, 51.
#[tokio::test(start_paused = true)]
async fn nobody_is_asked_without_end() {
    let omit = kill(OomPreference::Omit, 0);
    let mut full = Full::new(6000, &[("a", 2000, omit), ("b", 1000, omit), ("c", 500, omit)]).await;
    let mut questions = full.controller.decide(WAIT).await.expect("registered");
    for held in [0, 1, 2] {
        full.fill_with(held, 100).await;
    }
    let mut asked = 0;
    for _ in 0..60 {
        full.pass(1000).await;
        if let Ok(question) = questions.try_recv() {
            asked += 1;
            full.controller.answer_question(question.id, says(AnswerWord::Kill, "none")).await.expect_err("refused");
        }
    }
    assert!((4..=6).contains(&asked), "{asked} questions in a minute");
    assert_eq!(full.killed(), [false; 3]);
}

/// There is one client that decides, and there may be another one when it is gone.
#[tokio::test(start_paused = true)]
async fn a_second_client_is_refused() {
    let (controller, _) = Controller::start(Limit::Max);
    let first = controller.decide(WAIT).await.expect("registered");
    let refused = controller.decide(WAIT).await.expect_err("one is enough");
    assert_eq!(refused.code, Code::WrongState);
    drop(first);
    let second = controller.decide(WAIT).await.expect("registered");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!second.is_closed() && controller.decide(WAIT).await.is_err(), "the end of the first is not the second's");
}

/// There is one question at a time in a subtree: the host's waits for the group's.
/// Semantics: 47.
#[tokio::test(start_paused = true)]
async fn one_question_is_open_in_a_subtree() {
    let (mut full, mut questions) = decided().await;
    let host = watched(&full.controller).await;
    *host.lock().expect("alive") = left(300);
    full.pass(5900).await;
    let first = question(&mut questions);
    assert!(questions.try_recv().is_err(), "after {}", first.level);
    full.controller.answer_question(first.id, says(AnswerWord::Kill, "big")).await.expect("done");
    full.pass(5000).await;
    assert!(questions.try_recv().is_err(), "memory is on its way to both");
}

/// For the host it is the same.
/// Semantics: 51.
#[tokio::test(start_paused = true)]
async fn a_client_decides_for_the_host() {
    let (controller, _) = Controller::start(Limit::Max);
    let mut full = Full { controller, workers: Vec::new() };
    full.add("a", "/", 2000, kill(KILL, 0)).await;
    full.add("b", "/", 1000, kill(KILL, 0)).await;
    let mut questions = full.controller.decide(WAIT).await.expect("registered");
    let host = watched(&full.controller).await;
    *host.lock().expect("alive") = left(300);
    full.pass(6000).await;
    let asked = question(&mut questions);
    assert_eq!((asked.level.as_str(), asked.ranked.len(), full.killed()), ("/", 2, vec![false; 2]));
    full.controller.answer_question(asked.id, says(AnswerWord::Kill, "b")).await.expect("done");
    full.pass(5000).await;
    assert_eq!(full.killed(), [false, true]);
    // Nobody answers the next one.
    full.pass(14_000).await;
    assert_eq!(full.killed(), [true, true]);
    assert_eq!(full.state("a").await, VmState::Running, "it is on its way");
}

/// Guests that thrash need somebody to go, although nobody is held.
/// Semantics: 51.
#[tokio::test(start_paused = true)]
async fn a_client_decides_for_guests_that_thrash() {
    let pause = |priority| OomPolicy { priority, ..policy(OomAction::Pause, KILL) };
    let mut full = Full::new(6000, &[("a", 2800, pause(0)), ("b", 2600, pause(9))]).await;
    let mut questions = full.controller.decide(WAIT).await.expect("registered");
    let mut asked = None;
    for _ in 0..30 {
        for worker in &mut full.workers {
            worker.report.cold.evicted += 2000;
            worker.report.cold.refaulted += 2000;
            worker.tell().await;
        }
        full.pass(1000).await;
        if let Ok(question) = questions.try_recv() {
            asked = Some(question);
            break;
        }
    }
    let asked = asked.expect("a question");
    assert_eq!(asked.reason, Reason::Thrash);
    full.controller.answer_question(asked.id, says(AnswerWord::Kill, "b")).await.expect("done");
    assert_eq!(full.killed(), [false, true]);
}

//! Commands that decide, run for real.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;

const WAIT: Duration = Duration::from_secs(20);

/// What a script answers that is given `wait`.
async fn answer_of(script: &str, wait: Duration) -> Result<DecisionAnswer, String> {
    let place = TempDir::new().unwrap();
    let program = place.path().join("hook");
    fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    let question = QuestionView {
        id: 7,
        level: "/gold".to_owned(),
        reason: Reason::Full,
        usage_bytes: 4096,
        max_bytes: None,
        wait_ms: 1,
        deadline_ms: 2,
        ranked: Vec::new(),
        not_shown: 0,
    };
    Hook { program, wait, socket: place.path().join("ballast.sock") }.ask(&question).await
}

fn says(answer: AnswerWord, vm: Option<&str>) -> Result<DecisionAnswer, String> {
    Ok(DecisionAnswer { answer, vm: vm.map(str::to_owned) })
}

#[tokio::test]
async fn the_first_line_of_a_command_is_its_answer() {
    let script = r#"grep -q '"id":7,"level":"/gold"' && echo kill web && echo more"#;
    assert_eq!(answer_of(script, WAIT).await, says(AnswerWord::Kill, Some("web")));
    assert_eq!(answer_of("echo pause web-1", WAIT).await, says(AnswerWord::Pause, Some("web-1")));
    assert_eq!(answer_of("echo raise", WAIT).await, says(AnswerWord::Raise, None), "it has read nothing");
    assert_eq!(answer_of("cat > /dev/null; echo ignore", WAIT).await, says(AnswerWord::Ignore, None));
}

#[tokio::test]
async fn it_has_an_environment_of_its_own() {
    let script = r#"test "$(env | cut -d= -f1 | grep -v -e PWD -e SHLVL -e ^_ | sort | tr '\n' ' ')" = "BALLAST_SOCKET PATH " && echo raise"#;
    assert_eq!(answer_of(script, WAIT).await, says(AnswerWord::Raise, None));
}

#[tokio::test]
async fn what_is_no_answer_is_said() {
    for (script, why) in [
        ("echo kill", "which is none of"),
        ("echo shoot web", "it said \"shoot web\""),
        ("", "it said \"\""),
        ("echo kill web; exit 3", "it failed (exit status: 3)"),
        ("head -c 100000 /dev/zero", "it failed"),
    ] {
        let error = answer_of(script, WAIT).await.unwrap_err();
        assert!(error.contains(why), "{script}: {error}");
    }
}

#[tokio::test]
async fn one_that_hangs_is_killed_with_its_children() {
    let place = TempDir::new().unwrap();
    let left = place.path().join("pid");
    let script =
        format!("sleep 1000 & echo $! > {}.new; mv {}.new {}; wait", left.display(), left.display(), left.display());
    let error = answer_of(&script, Duration::from_millis(1500)).await.unwrap_err();
    assert!(error.contains("did not end within 1500 ms"), "{error}");
    let pid = fs::read_to_string(&left).unwrap();
    let gone = || {
        let status = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        status.is_empty() || status.contains(") Z")
    };
    let until = std::time::Instant::now() + Duration::from_secs(10);
    while !gone() && std::time::Instant::now() < until {
        tokio::task::yield_now().await;
    }
    assert!(gone(), "process {pid} is left");
}

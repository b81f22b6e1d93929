//! Reads what a test run said: the JUnit file of cargo-nextest, or the text of `cargo test`.

use std::collections::BTreeMap;

use super::labels::Test;

/// Whether each test that ran has passed. A test that ran twice has passed if it did so both times.
pub type Results = BTreeMap<Test, bool>;

/// Adds what `text` says to `results`.
pub fn parse(text: &str, results: &mut Results) {
    let mut add = |target: String, name: &str, passed: bool| {
        *results.entry(Test { target, name: name.to_owned() }).or_insert(true) &= passed;
    };
    if text.trim_start().starts_with("<?xml") {
        junit(text, &mut add);
    } else {
        libtest(text, &mut add);
    }
}

/// `<testcase name="charge::x" classname="memcg-core::core" …>`, with a `<failure …>` inside when it failed.
fn junit(text: &str, add: &mut impl FnMut(String, &str, bool)) {
    for case in text.split("<testcase ").skip(1) {
        let (head, rest) = case.split_once('>').unwrap_or((case, ""));
        let body = if head.ends_with('/') { "" } else { rest.split("</testcase>").next().unwrap_or_default() };
        if let (Some(name), Some(binary)) = (attribute(head, "name"), attribute(head, "classname")) {
            add(target(binary), name, !body.contains("<failure") && !body.contains("<error"));
        }
    }
}

fn attribute<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let at = head.split(' ').find_map(|part| part.strip_prefix(name)?.strip_prefix("=\""))?;
    at.split('"').next()
}

/// Nextest's name of a program: `package` for unit tests, `package::name` and `package::bin/name` for others.
fn target(binary: &str) -> String {
    match binary.split_once("::") {
        Some((_, name)) => name.to_owned(),
        None => binary.replace('-', "_"),
    }
}

/// `     Running tests/core/main.rs (target/debug/deps/core-0123456789abcdef)`, then `test charge::x ... ok`.
fn libtest(text: &str, add: &mut impl FnMut(String, &str, bool)) {
    let mut target = String::new();
    for line in text.lines() {
        if let Some((source, program)) =
            line.trim_start().strip_prefix("Running ").and_then(|rest| rest.split_once(" ("))
        {
            let program = program.trim_end_matches(')').rsplit('/').next().unwrap_or_default();
            let program = program.rsplit_once('-').map_or(program, |(name, _)| name);
            let source = source.trim_start_matches("unittests ");
            let is_bin = source == "src/main.rs" || source.starts_with("src/bin/");
            target = if is_bin { format!("bin/{program}") } else { program.to_owned() };
        } else if line.trim_start().starts_with("Doc-tests ") {
            target.clear();
        } else if let Some((name, outcome)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... ")) {
            let name = name.trim_end_matches(" - should panic");
            match outcome.split(' ').next().unwrap_or_default() {
                "ok" if !target.is_empty() => add(target.clone(), name, true),
                "FAILED" if !target.is_empty() => add(target.clone(), name, false),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(texts: &[&str]) -> Vec<(String, bool)> {
        let mut results = Results::new();
        texts.iter().for_each(|text| parse(text, &mut results));
        results.into_iter().map(|(test, passed)| (test.to_string(), passed)).collect()
    }

    #[test]
    fn junit_says_what_failed() {
        let text = r#"<?xml version="1.0" encoding="UTF-8"?>
<testsuites name="nextest-run" tests="3" failures="1" errors="0">
  <testsuite name="memcg-core::core" tests="2">
    <testcase name="charge::good" classname="memcg-core::core" timestamp="2026-01-01" time="0.004">
      <system-out>test charge::good ... ok</system-out>
    </testcase>
    <testcase name="charge::bad" classname="memcg-core::core" time="0.004">
      <failure message="panicked &quot;x&quot;" type="test failure">…</failure>
    </testcase>
    <testcase name="controller::tests::unit" classname="ballast" time="0.004"/>
    <testcase name="parses" classname="ballast-tests::bin/demo" time="0.004"/>
    <testcase name="semantics::x" classname="ballast-tests" time="0.004"/>
  </testsuite>
</testsuites>"#;
        let expected = [
            ("ballast:controller::tests::unit", true),
            ("ballast_tests:semantics::x", true),
            ("bin/demo:parses", true),
            ("core:charge::bad", false),
            ("core:charge::good", true),
        ];
        assert_eq!(read(&[text]), expected.map(|(name, passed)| (name.to_owned(), passed)));
    }

    #[test]
    fn cargo_test_says_which_program_runs() {
        let text = "
     Running unittests src/lib.rs (target/debug/deps/ballast-0123456789abcdef)
test cli::a ... ok
     Running unittests src/main.rs (target/debug/deps/ballast-fedcba9876543210)
test b ... ok
     Running tests/core/main.rs (/x-y/deps/memcg_core-0123456789abcdef)
test charge::c ... FAILED
test charge::d - should panic ... ok
test charge::e ... ignored
test result: FAILED. 2 passed; 1 failed
   Doc-tests balloon
test balloon/src/lib.rs - (line 9) ... ok
";
        let expected = [
            ("ballast:cli::a", true),
            ("bin/ballast:b", true),
            ("memcg_core:charge::c", false),
            ("memcg_core:charge::d", true),
        ];
        assert_eq!(read(&[text]), expected.map(|(name, passed)| (name.to_owned(), passed)));
    }

    #[test]
    fn once_failed_is_failed() {
        let run = |outcome: &str| format!("Running tests/core/main.rs (deps/core-01)\ntest a ... {outcome}\n");
        assert_eq!(read(&[&run("FAILED"), &run("ok")]), [("core:a".to_owned(), false)]);
    }
}

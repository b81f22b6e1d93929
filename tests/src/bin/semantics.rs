//! Behind `scripts/semantics`: says for each number of `docs/semantics.md` which tests prove it, and whether they passed.

use std::path::Path;
use std::process::ExitCode;

use ballast_tests::semantics::results::Results;
use ballast_tests::semantics::{doc, labels, report, results};

const USAGE: &str = "usage: semantics --list | --filter | [--no-guests] RESULTS...   (see scripts/semantics --help)";

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("semantics: {problem}");
            ExitCode::from(125)
        }
    }
}

fn run() -> Result<bool, String> {
    let (mut list, mut filter, mut guests, mut files) = (false, false, true, Vec::new());
    for word in std::env::args().skip(1) {
        match word.as_str() {
            "--list" => list = true,
            "--filter" => filter = true,
            "--no-guests" => guests = false,
            option if option.starts_with('-') => return Err(format!("unknown option {option}; {USAGE}")),
            _ => files.push(word),
        }
    }
    if !list && !filter && files.is_empty() {
        return Err(USAGE.to_owned());
    }
    let read = |path: &str| std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
    let (labels, mut problems) = labels::scan(Path::new(".")).map_err(|e| format!("reading the tests: {e}"))?;
    if filter {
        // Tests of whole guests take long: only those that prove something.
        let mut terms = vec!["not (package(ballast-tests) + binary(flat_payload))".to_owned()];
        for label in labels.iter().filter(|label| guests && label.needs_guests && label.test.target != "rig") {
            terms.push(format!("(binary(={}) & test(={}))", label.test.target, label.test.name));
        }
        println!("{}", terms.join(" + "));
        return Ok(true);
    }
    let mut results = Results::new();
    for file in &files {
        results::parse(&read(file)?, &mut results);
    }
    let (rules, wrong) = doc::parse(&read("docs/semantics.md")?);
    problems.extend(wrong);
    let report = report::build(&rules, &labels, (!list).then_some(&results), guests);
    problems.extend(report.problems);
    for problem in &problems {
        eprintln!("semantics: {problem}");
    }
    print!("{}", report.text);
    Ok(report.good && problems.is_empty())
}

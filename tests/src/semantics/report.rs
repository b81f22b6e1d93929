//! Puts rules, labels and results together.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::Number;
use super::doc::{Excuse, Rules};
use super::labels::Label;
use super::results::Results;

/// What became of a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Tested,
    Later,
    NotApplicable,
    /// No test, or none that could run here.
    Missing,
    Failed,
}

/// The table, the sums, and what is wrong.
#[derive(Debug)]
pub struct Report {
    /// One line a number, and the three lines with the sums at the end.
    pub text: String,
    /// What is wrong beside missing and failed numbers.
    pub problems: Vec<String>,
    /// Nothing is missing, failed or wrong.
    pub good: bool,
}

/// Builds the report. Without `results` nothing was run, and each test counts as if it had passed. Without `guests` the
/// tests of whole guests count as not run, whatever they said.
pub fn build(rules: &Rules, labels: &[Label], results: Option<&Results>, guests: bool) -> Report {
    let mut tests: BTreeMap<Number, Vec<&Label>> = BTreeMap::new();
    let mut problems = Vec::new();
    for label in labels {
        for number in &label.numbers {
            if rules.contains_key(number) {
                tests.entry(*number).or_default().push(label);
            } else {
                problems.push(format!("{} names {number}, which docs/semantics.md does not have", label.test));
            }
        }
    }
    let mut text = String::new();
    let mut sums: BTreeMap<&str, [usize; 5]> = BTreeMap::new();
    for (number, rule) in rules {
        let tests = tests.get(number).map_or(&[][..], Vec::as_slice);
        if !tests.is_empty() && rule.excuse.is_some() {
            problems.push(format!("{number} has a test ({}) and an excuse in docs/semantics.md", tests[0].test));
        }
        let (verdict, shown) = judge(rule.excuse.as_ref(), tests, results, guests);
        let word = match verdict {
            Verdict::Tested => "tested",
            Verdict::Later => "later",
            Verdict::NotApplicable => "n/a",
            Verdict::Missing => "MISSING",
            Verdict::Failed => "FAILED",
        };
        writeln!(text, "{number:<5} {word:<8} {shown}").expect("a string takes everything");
        let kind = match number {
            Number::Row(_) => "rows",
            Number::Todo(_) => "todos",
            Number::Bug(_) => "bugs",
        };
        sums.entry(kind).or_default()[verdict as usize] += 1;
    }
    let mut good = problems.is_empty();
    for kind in ["rows", "todos", "bugs"] {
        let sum = sums.get(kind).copied().unwrap_or_default();
        let [tested, later, not_applicable, missing, failed] = sum;
        let total: usize = sum.iter().sum();
        good &= missing + failed == 0;
        writeln!(
            text,
            "SEMANTICS {kind} total={total} tested={tested} later={later} not_applicable={not_applicable} missing={missing} failed={failed}"
        )
        .expect("a string takes everything");
    }
    Report { text, problems, good }
}

/// The verdict on one number, and the last column of its line.
fn judge(excuse: Option<&Excuse>, tests: &[&Label], results: Option<&Results>, guests: bool) -> (Verdict, String) {
    match excuse {
        Some(Excuse::Later(what)) => return (Verdict::Later, what.clone()),
        Some(Excuse::NotApplicable(why)) => return (Verdict::NotApplicable, why.clone()),
        None if tests.is_empty() => return (Verdict::Missing, "no test names it".to_owned()),
        None => {}
    }
    let outcome = |label: &Label| match results {
        None => Some(true),
        Some(_) if label.needs_guests && !guests => None,
        Some(results) => results.get(&label.test).copied(),
    };
    let word = |label: &Label| match (results, outcome(label)) {
        (None, _) => String::new(),
        (_, Some(true)) => " ok".to_owned(),
        (_, Some(false)) => " FAILED".to_owned(),
        (_, None) => " not run".to_owned(),
    };
    let shown: Vec<String> = tests.iter().map(|label| format!("{}{}", label.test, word(label))).collect();
    let outcomes: Vec<Option<bool>> = tests.iter().map(|label| outcome(label)).collect();
    let verdict = if outcomes.contains(&Some(false)) {
        Verdict::Failed
    } else if outcomes.contains(&Some(true)) {
        Verdict::Tested
    } else {
        Verdict::Missing
    };
    (verdict, shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::doc::Rule;
    use super::super::labels::Test;
    use super::*;

    fn rules(lines: &[(&str, Option<Excuse>)]) -> Rules {
        let rule = |excuse: &Option<Excuse>| Rule { text: "x".into(), excuse: excuse.clone() };
        lines.iter().map(|(number, excuse)| (Number::parse(number).unwrap(), rule(excuse))).collect()
    }

    fn label(name: &str, needs_guests: bool, numbers: &[&str]) -> Label {
        let test = Test { target: "core".into(), name: name.into() };
        Label { test, numbers: numbers.iter().map(|n| Number::parse(n).unwrap()).collect(), needs_guests }
    }

    fn results(outcomes: &[(&str, bool)]) -> Results {
        let test = |name: &str| Test { target: "core".into(), name: name.into() };
        outcomes.iter().map(|(name, passed)| (test(name), *passed)).collect()
    }

    #[test]
    fn each_number_is_counted_once_and_the_parts_add_up() {
        let later = Some(Excuse::Later("disks".into()));
        let none = Some(Excuse::NotApplicable("no locks".into()));
        let rules = rules(&[("1", None), ("2", None), ("3", later), ("4", None), ("B1", none), ("T1", None)]);
        let labels = [label("a", false, &["1", "T1"]), label("b", false, &["2"]), label("c", false, &["1"])];
        let report = build(&rules, &labels, Some(&results(&[("a", true), ("b", false), ("c", true)])), true);
        assert!(!report.good && report.problems.is_empty());
        let lines: Vec<&str> = report.text.lines().collect();
        assert_eq!(lines[0], "1     tested   core:a ok, core:c ok");
        assert_eq!(lines[1], "2     FAILED   core:b FAILED");
        assert_eq!(lines[2], "3     later    disks");
        assert_eq!(lines[3], "4     MISSING  no test names it");
        assert_eq!(
            lines[6..],
            [
                "SEMANTICS rows total=4 tested=1 later=1 not_applicable=0 missing=1 failed=1",
                "SEMANTICS todos total=1 tested=1 later=0 not_applicable=0 missing=0 failed=0",
                "SEMANTICS bugs total=1 tested=0 later=0 not_applicable=1 missing=0 failed=0",
            ]
        );
    }

    #[test]
    fn a_test_that_did_not_run_proves_nothing() {
        let rules = rules(&[("1", None), ("2", None)]);
        let labels = [label("guest", true, &["1", "2"]), label("unit", false, &["1"]), label("gone", false, &["2"])];
        let results = results(&[("guest", true), ("unit", true)]);
        assert!(build(&rules, &labels, Some(&results), true).good);
        let report = build(&rules, &labels, Some(&results), false);
        assert!(!report.good);
        let lines: Vec<&str> = report.text.lines().collect();
        assert_eq!(lines[0], "1     tested   core:guest not run, core:unit ok");
        assert_eq!(lines[1], "2     MISSING  core:guest not run, core:gone not run");
        assert!(build(&rules, &labels, None, false).good, "a list alone runs nothing");
    }

    #[test]
    fn unknown_numbers_and_excused_ones_are_problems() {
        let rules = rules(&[("1", Some(Excuse::Later("disks".into())))]);
        let report = build(&rules, &[label("a", false, &["1", "136"])], None, true);
        assert!(!report.good);
        assert_eq!(report.problems.len(), 2);
        assert!(
            report.problems[0].contains("core:a names 136") && report.problems[1].contains("1 has a test (core:a)")
        );
    }
}

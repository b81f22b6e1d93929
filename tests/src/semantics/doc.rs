//! Reads `docs/semantics.md`: every number with its rule, and what is said instead of a test.

use std::collections::BTreeMap;

use super::Number;

/// What may be said instead of a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Excuse {
    /// Work to come brings the rule to life, and its test.
    Later(String),
    /// There is nothing to test, for this reason.
    NotApplicable(String),
}

/// One line of the tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The rule's one line.
    pub text: String,
    /// `None`: there must be a test.
    pub excuse: Option<Excuse>,
}

/// All rules by number.
pub type Rules = BTreeMap<Number, Rule>;

/// Rows, TODOs and bugs that there are.
pub const TOTALS: (usize, usize, usize) = (135, 30, 95);
/// Rows that may be `n/a`.
const MAX_NOT_APPLICABLE: usize = 20;
/// What `later` may name.
const LATER: [&str; 5] = ["one host, many guests", "cold pages", "host pressure", "shared regions", "disks"];

/// Reads the document. The second value is what is wrong with it.
pub fn parse(text: &str) -> (Rules, Vec<String>) {
    let mut rules = Rules::new();
    let mut problems = Vec::new();
    for (at, line) in (1..).zip(text.lines()) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let Some(number) = cells.get(1).and_then(|cell| Number::parse(cell)) else { continue };
        let ["", _, text, proof, ""] = cells.as_slice() else {
            problems.push(format!("line {at}: {number} has {} cells, not 3", cells.len().saturating_sub(2)));
            continue;
        };
        if text.is_empty() {
            problems.push(format!("line {at}: {number} has no rule"));
        }
        let excuse = excuse(proof).unwrap_or_else(|problem| {
            problems.push(format!("line {at}: {number}: {problem}"));
            None
        });
        if rules.insert(number, Rule { text: (*text).to_owned(), excuse }).is_some() {
            problems.push(format!("line {at}: {number} is there twice"));
        }
    }
    problems.extend(totals(&rules));
    (rules, problems)
}

fn excuse(proof: &str) -> Result<Option<Excuse>, String> {
    if proof.is_empty() {
        return Ok(None);
    }
    match proof.split_once(": ") {
        Some(("later", what)) if LATER.contains(&what) => Ok(Some(Excuse::Later(what.to_owned()))),
        Some(("later", what)) => Err(format!("{what:?} brings nothing; one of: {}", LATER.join(" | "))),
        Some(("n/a", why)) if why.contains(' ') => Ok(Some(Excuse::NotApplicable(why.to_owned()))),
        _ => Err(format!("{proof:?} is neither empty nor `later: …` nor `n/a: why`")),
    }
}

fn totals(rules: &Rules) -> Vec<String> {
    let mut problems = Vec::new();
    let mut expect = |what: &str, found: usize, total: usize| {
        if found != total {
            problems.push(format!("{found} {what} are there, not {total}"));
        }
    };
    expect("rows", rules.keys().filter(|n| matches!(n, Number::Row(1..=135))).count(), TOTALS.0);
    expect("TODOs", rules.keys().filter(|n| matches!(n, Number::Todo(1..=30))).count(), TOTALS.1);
    expect("bugs", rules.keys().filter(|n| matches!(n, Number::Bug(_))).count(), TOTALS.2);
    expect("numbers", rules.len(), TOTALS.0 + TOTALS.1 + TOTALS.2);
    let not_applicable = rules
        .iter()
        .filter(|(number, rule)| {
            matches!(number, Number::Row(_)) && matches!(rule.excuse, Some(Excuse::NotApplicable(_)))
        })
        .count();
    if not_applicable > MAX_NOT_APPLICABLE {
        problems.push(format!("{not_applicable} rows are n/a, more than {MAX_NOT_APPLICABLE}"));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Problems of the lines themselves, without the totals, which no short text has.
    fn problems(text: &str) -> Vec<String> {
        parse(text).1.into_iter().filter(|problem| problem.starts_with("line ")).collect()
    }

    #[test]
    fn a_line_has_a_number_a_rule_and_perhaps_an_excuse() {
        let (rules, _) = parse(
            "| # | rule | |\n| --- | --- | --- |\n| 63 | It holds. | |\n| T3 | X. | later: disks |\n| B6 | Y. | n/a: no lists |",
        );
        assert_eq!(rules[&Number::Row(63)], Rule { text: "It holds.".into(), excuse: None });
        assert_eq!(rules[&Number::Todo(3)].excuse, Some(Excuse::Later("disks".into())));
        assert_eq!(rules[&Number::Bug(6)].excuse, Some(Excuse::NotApplicable("no lists".into())));
        assert_eq!(rules.len(), 3);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, part) in [
            ("| 1 | a | |\n| 1 | b | |", "line 2: 1 is there twice"),
            ("| 1 | a |", "has 2 cells"),
            ("| 1 | a | b | c |", "has 4 cells"),
            ("| 1 | | |", "has no rule"),
            ("| 1 | a | later: someday |", "brings nothing"),
            ("| 1 | a | n/a |", "neither empty"),
            ("| 1 | a | n/a: no |", "neither empty"),
            ("| 1 | a | see above |", "neither empty"),
        ] {
            let found = problems(text);
            assert!(found.len() == 1 && found[0].contains(part), "{text:?}: {found:?}");
        }
    }

    #[test]
    fn the_totals_are_fixed_and_excuses_are_few() {
        let row = |n: usize, proof: &str| format!("| {n} | a | {proof} |\n");
        let all: String = (1..=135).map(|n| row(n, if n <= 21 { "n/a: there is none" } else { "" })).collect();
        let found = parse(&all).1;
        assert_eq!(found.len(), 4, "{found:?}");
        assert!(
            found[0].starts_with("0 TODOs") && found[1].starts_with("0 bugs") && found[2].starts_with("135 numbers")
        );
        assert!(found[3].starts_with("21 rows are n/a"));
        assert!(parse(&all.replace("| 7 |", "| 777 |")).1[0].starts_with("134 rows"));
    }

    /// The document of this checkout is whole.
    #[test]
    fn the_document_is_right() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/semantics.md");
        assert_eq!(parse(&std::fs::read_to_string(path).unwrap()).1, Vec::<String>::new());
    }
}

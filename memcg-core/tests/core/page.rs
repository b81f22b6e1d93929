//! The worked example of `docs/victims.md`: the numbers of its table, ranked, are its list.

use memcg_core::oom::{Action, Attributes, Candidate, Preference, rank};
use memcg_core::protection::Protection;
use memcg_core::tree::Tree;
use memcg_core::units::{Limit, Pages};

use crate::nodes::vm;

/// A size as the page writes it.
fn size(text: &str) -> Pages {
    let text = text.trim();
    match text.split_at_checked(text.len() - 1) {
        Some((number, "M")) => Pages::from_mib(number.parse().unwrap()),
        Some((number, "G")) => Pages::from_mib(number.parse::<u64>().unwrap() * 1024),
        _ => Pages(text.parse().unwrap()),
    }
}

/// Semantics: 48.
#[test]
fn the_example_of_the_page_is_what_the_ranking_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/victims.md");
    let page = std::fs::read_to_string(path).unwrap();
    let example = page.split("## An example").nth(1).unwrap().split("## Then").next().unwrap();
    let mut tree = Tree::new(Limit::Max);
    let root = tree.root();
    let rows: Vec<Vec<&str>> = example
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| ---"))
        .skip(1)
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let candidates: Vec<_> = rows
        .iter()
        .map(|row| {
            let [name, usage, min, low, action, preference, priority] = row[..] else { panic!("{row:?}") };
            let action = match action.strip_prefix("pause, frees ") {
                Some(frees) => Action::Pause { frees: size(frees) },
                None => Action::Kill,
            };
            let preference = match preference {
                "avoid" => Preference::Avoid,
                "omit" => Preference::Omit,
                _ => Preference::None,
            };
            let priority = priority.parse().unwrap();
            Candidate {
                id: vm(&mut tree, root, name),
                name,
                usage: size(usage),
                vmm: Pages::ZERO,
                protection: Protection { min: size(min), low: size(low) },
                attributes: Attributes { action, preference, priority, ..Attributes::default() },
            }
        })
        .collect();
    assert_eq!(candidates.len(), 7);
    let list = example.split("```text\n").nth(1).unwrap().split("```").next().unwrap();
    let ranked: Vec<_> = rank(&candidates).iter().map(ToString::to_string).collect();
    assert_eq!(ranked, list.lines().collect::<Vec<_>>());
}

//! Finds the labels: in which test's doc comment is which number named?
//!
//! ```text
//! /// Why it matters.
//! /// Semantics: 63, 81, B51, T3.          or: /// Semantics (table): 1, 2, 3, 4.
//! #[test]
//! fn overhead_asks_vmm_first() {
//! ```
//! The label is the end of the comment and may run over several lines. Source files are formatted by rustfmt, so lines
//! are enough to see modules and functions.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use super::Number;

/// Directories of the workspace's packages that have tests.
const PACKAGES: [&str; 4] = ["memcg-core", "balloon", "vmm", "tests"];
/// Rows that a test may claim if it is not a table.
const MAX_ROWS: usize = 3;

/// A test, by the program that runs it and its full name there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Test {
    /// Program: `core` for `tests/core/main.rs`, the library's name for unit tests, `bin/ballast` for a program's.
    pub target: String,
    /// Name with its modules, such as `charge::overhead_asks_vmm_first`.
    pub name: String,
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.target, self.name)
    }
}

/// A test and the numbers that it claims.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The test.
    pub test: Test,
    /// What it says that it proves.
    pub numbers: BTreeSet<Number>,
    /// It is a whole guest's test: where guests cannot run, it passes without having run.
    pub needs_guests: bool,
}

/// All labels of the checkout at `root`, in the order of the files. The second value is what is wrong with them.
///
/// # Errors
/// A directory or file that cannot be read.
pub fn scan(root: &Path) -> std::io::Result<(Vec<Label>, Vec<String>)> {
    let (mut labels, mut problems) = (Vec::new(), Vec::new());
    for package in PACKAGES {
        let manifest = std::fs::read_to_string(root.join(package).join("Cargo.toml"))?;
        let name = manifest.lines().find_map(|line| line.strip_prefix("name = ")).unwrap_or(package);
        let library = name.trim_matches('"').replace('-', "_");
        let mut files = Vec::new();
        for part in ["src", "tests"] {
            collect(&root.join(package).join(part), &mut files)?;
        }
        files.sort();
        for file in files {
            let inside = file.strip_prefix(root.join(package)).expect("found below it");
            let Some((target, modules)) = place(inside, &library) else { continue };
            let needs_guests = (package == "tests" && target != library) || target == "flat_payload";
            let shown = Path::new(package).join(inside);
            let source = Source { file: &shown.to_string_lossy(), target: &target, modules, needs_guests };
            source.scan(&std::fs::read_to_string(&file)?, &mut labels, &mut problems);
        }
    }
    Ok((labels, problems))
}

fn collect(dir: &Path, files: &mut Vec<std::path::PathBuf>) -> std::io::Result<()> {
    if !dir.is_dir() {
        return Ok(());
    }
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|end| end == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// Program and modules of a file, given by its path inside its package.
fn place(inside: &Path, library: &str) -> Option<(String, Vec<String>)> {
    let inside = inside.with_extension("");
    let mut parts = inside.iter().map(|part| part.to_str().unwrap_or_default().to_owned());
    let (top, rest) = (parts.next()?, parts.collect::<Vec<_>>());
    let rest_but = |n: usize| -> Vec<String> {
        rest[n..].iter().filter(|part| !matches!(part.as_str(), "mod" | "lib" | "main")).cloned().collect()
    };
    let first = rest.first()?;
    Some(match (top.as_str(), first.as_str()) {
        ("tests", _) => (first.clone(), rest_but(1)),
        ("src", "main") => (format!("bin/{library}"), Vec::new()),
        ("src", "bin") => (format!("bin/{}", rest.get(1)?), rest_but(2)),
        ("src", _) => (library.to_owned(), rest_but(0)),
        _ => return None,
    })
}

/// One file.
struct Source<'a> {
    file: &'a str,
    target: &'a str,
    modules: Vec<String>,
    needs_guests: bool,
}

/// What a label says.
struct Claim {
    line: usize,
    table: bool,
    text: String,
}

impl Source<'_> {
    fn scan(&self, text: &str, labels: &mut Vec<Label>, problems: &mut Vec<String>) {
        // The inline modules around the line, each with the line that closes it.
        let mut inline: Vec<(String, String)> = Vec::new();
        let mut claim: Option<Claim> = None;
        let mut is_test = false;
        let mut problem = |line: usize, what: String| problems.push(format!("{}:{line}: {what}", self.file));
        for (at, line) in (1..).zip(text.lines()) {
            let code = line.trim_start();
            if let Some(comment) = code.strip_prefix("///") {
                let comment = comment.trim();
                if let Some(rest) = comment.strip_prefix("Semantics") {
                    let (table, rest) = rest.strip_prefix(" (table)").map_or((false, rest), |rest| (true, rest));
                    match rest.strip_prefix(": ") {
                        Some(_) if claim.is_some() => problem(at, "two labels on one test".to_owned()),
                        Some(text) => claim = Some(Claim { line: at, table, text: text.to_owned() }),
                        None => problem(at, "not a label: `/// Semantics: 63, B51.` or `(table)`".to_owned()),
                    }
                } else if let Some(claim) = &mut claim {
                    claim.text.push(' ');
                    claim.text.push_str(comment);
                }
                continue;
            }
            if code.starts_with("#[") {
                is_test |= matches!(code.split(['(', ']']).next(), Some("#[test" | "#[tokio::test"));
                continue;
            }
            if let Some(name) = word_after(code, "mod ").filter(|_| code.ends_with('{')) {
                inline.push((name.to_owned(), format!("{}}}", &line[..line.len() - code.len()])));
            } else if inline.last().is_some_and(|(_, end)| end == line) {
                inline.pop();
            }
            if let Some(claim) = claim.take() {
                match word_after(code, "fn ").filter(|_| is_test) {
                    Some(name) => {
                        let modules = self.modules.iter().chain(inline.iter().map(|(name, _)| name));
                        let path: Vec<&str> = modules.map(String::as_str).chain([name]).collect();
                        let test = Test { target: self.target.to_owned(), name: path.join("::") };
                        match numbers(&claim) {
                            Ok(numbers) => labels.push(Label { test, numbers, needs_guests: self.needs_guests }),
                            Err(what) => problem(claim.line, what),
                        }
                    }
                    None => problem(claim.line, "a label without a test".to_owned()),
                }
            }
            is_test = false;
        }
    }
}

/// The identifier after `keyword`, where the line begins with that, but for `pub` and `async`.
fn word_after<'a>(code: &'a str, keyword: &str) -> Option<&'a str> {
    let code = code.strip_prefix("pub ").unwrap_or(code);
    let rest = code.strip_prefix("async ").unwrap_or(code).strip_prefix(keyword)?;
    rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().filter(|name| !name.is_empty())
}

fn numbers(claim: &Claim) -> Result<BTreeSet<Number>, String> {
    let list =
        claim.text.trim_end().strip_suffix('.').ok_or("the label is the end of the comment and ends with a dot")?;
    let mut numbers = BTreeSet::new();
    for part in list.split(',').map(str::trim) {
        let number = Number::parse(part).ok_or_else(|| format!("{part:?} is not a number such as 63, B51 or T3"))?;
        if !numbers.insert(number) {
            return Err(format!("{number} is named twice"));
        }
    }
    let rows = numbers.iter().filter(|number| matches!(number, Number::Row(_))).count();
    if rows > MAX_ROWS && !claim.table {
        return Err(format!("{rows} rows: a test that is no table proves at most {MAX_ROWS}"));
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scans a source in which `§` stands for the three slashes, so that the labels here are none.
    fn scan_text(text: &str) -> (Vec<Label>, Vec<String>) {
        let (mut labels, mut problems) = (Vec::new(), Vec::new());
        let source = Source { file: "x.rs", target: "core", modules: vec!["charge".into()], needs_guests: false };
        source.scan(&text.replace('§', "///"), &mut labels, &mut problems);
        (labels, problems)
    }

    fn found(text: &str) -> Vec<(String, String)> {
        let (labels, problems) = scan_text(text);
        assert_eq!(problems, Vec::<String>::new(), "{text}");
        let show = |label: &Label| label.numbers.iter().map(Number::to_string).collect::<Vec<_>>().join(" ");
        labels.iter().map(|label| (label.test.to_string(), show(label))).collect()
    }

    #[test]
    fn a_label_names_the_test_below_it() {
        let text =
            "§ Why.\n§ Semantics: 63, 81, B51, T3.\n#[test]\nfn one() {\n}\n\n§ No label.\n#[test]\nfn two() {}\n";
        assert_eq!(found(text), [("core:charge::one".to_owned(), "63 81 T3 B51".to_owned())]);
    }

    #[test]
    fn tables_may_claim_many_rows_and_lines() {
        let text = "§ Semantics (table): 1, 2, 3,\n§ 4, 5.\n#[test]\n#[should_panic(expected = \"x\")]\nfn all() {}";
        assert_eq!(found(text), [("core:charge::all".to_owned(), "1 2 3 4 5".to_owned())]);
    }

    #[test]
    fn tests_in_macros_modules_and_of_tokio_are_tests() {
        let text = "\
mod tests {
    use super::*;
    proptest! {
        #![proptest_config(cases(256))]
        § Semantics: 1.
        #[test]
        fn random(ops in ops()) {}
    }
    mod inner {
        § Semantics: 2.
        #[tokio::test(flavor = \"current_thread\")]
        async fn later() {}
    }
    § Semantics: 3.
    #[test]
    fn after() {}
}
§ Semantics: 4.
#[test]
fn outside() {}
";
        let names: Vec<String> = found(text).into_iter().map(|(name, _)| name).collect();
        let prefix = "core:charge::";
        assert_eq!(
            names,
            ["tests::random", "tests::inner::later", "tests::after", "outside"].map(|n| prefix.to_owned() + n)
        );
    }

    #[test]
    fn bad_labels_are_said_with_their_line() {
        for (text, part) in [
            ("§ Semantics: 1, 2, 3, 4.\n#[test]\nfn f() {}", "x.rs:1: 4 rows"),
            ("§ Semantics: 1\n#[test]\nfn f() {}", "ends with a dot"),
            ("§ Semantics: 1, H4.\n#[test]\nfn f() {}", "\"H4\" is not a number"),
            ("§ Semantics: 1-5.\n#[test]\nfn f() {}", "\"1-5\" is not a number"),
            ("§ Semantics: 1, 1.\n#[test]\nfn f() {}", "1 is named twice"),
            ("§ Semantics: .\n#[test]\nfn f() {}", "\"\" is not a number"),
            ("§ Semantics 1.\n#[test]\nfn f() {}", "not a label"),
            ("§ Semantics (Table): 1.\n#[test]\nfn f() {}", "not a label"),
            ("§ Semantics: 1.\n§ Why it matters.\n#[test]\nfn f() {}", "is not a number"),
            ("§ Semantics: 1.\n§ Semantics: 2.\n#[test]\nfn f() {}", "two labels"),
            ("§ Semantics: 1.\nfn f() {}", "without a test"),
            ("§ Semantics: 1.\n#[test]\nconst X: u8 = 1;", "without a test"),
        ] {
            let problems = scan_text(text).1;
            assert!(problems.len() == 1 && problems[0].contains(part), "{text:?}: {problems:?}");
        }
    }

    #[test]
    fn the_place_of_a_file_says_program_and_modules() {
        let place = |path: &str| {
            let (target, modules) = place(Path::new(path), "ballast").unwrap();
            format!("{target} {}", modules.join("::"))
        };
        assert_eq!(place("tests/core/charge.rs"), "core charge");
        assert_eq!(place("tests/core/main.rs"), "core ");
        assert_eq!(place("tests/limits.rs"), "limits ");
        assert_eq!(place("src/lib.rs"), "ballast ");
        assert_eq!(place("src/main.rs"), "bin/ballast ");
        assert_eq!(place("src/bin/demo.rs"), "bin/demo ");
        assert_eq!(place("src/controller/tests/mod.rs"), "ballast controller::tests");
        assert_eq!(place("src/devices/mmio/tests.rs"), "ballast devices::mmio::tests");
    }

    /// The labels of this checkout can be read.
    #[test]
    fn all_labels_are_right() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
        assert_eq!(scan(root).unwrap().1, Vec::<String>::new());
    }
}

//! Behind `scripts/semantics`: which test proves which rule of `docs/semantics.md`, and did it pass?
//!
//! ```text
//!  docs/semantics.md ──► doc::Rules ───────┐
//!  /// Semantics: 63, B51. ──► labels ─────┼──► report: number → tests → result, three lines with the sums
//!  output of the test run ──► results ─────┘
//! ```
//! The link is in the doc comment of the test, so that it moves and dies with the test.

pub mod doc;
pub mod labels;
pub mod report;
pub mod results;

use std::fmt;

/// A rule's number: what a label names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Number {
    /// `63`: one of the 135 rows.
    Row(u16),
    /// `T3`: one of the 30 things that the designs left to do.
    Todo(u16),
    /// `B51`: one of the 95 bugs.
    Bug(u16),
}

impl Number {
    /// Reads `63`, `T3` or `B51`; nothing else is a number, not even `063`.
    pub fn parse(text: &str) -> Option<Number> {
        let (make, digits): (fn(u16) -> Number, &str) = match text.as_bytes().first()? {
            b'T' => (Number::Todo, &text[1..]),
            b'B' => (Number::Bug, &text[1..]),
            _ => (Number::Row, text),
        };
        if !digits.bytes().all(|b| b.is_ascii_digit()) || digits.starts_with('0') {
            return None;
        }
        digits.parse().ok().map(make)
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Number::Row(n) => n.to_string(),
            Number::Todo(n) => format!("T{n}"),
            Number::Bug(n) => format!("B{n}"),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_digits_with_at_most_one_letter_before_them() {
        assert_eq!(Number::parse("63"), Some(Number::Row(63)));
        assert_eq!(Number::parse("T3"), Some(Number::Todo(3)));
        assert_eq!(Number::parse("B113"), Some(Number::Bug(113)));
        for bad in ["", "B", "T", "b51", "H1", "B 1", "063", "B0", "-1", "+1", "1-5", "63.", "99999", "６"] {
            assert_eq!(Number::parse(bad), None, "{bad:?}");
        }
    }
}

//! A strict reader of the OpenMetrics text format, 1.0.
//!
//! It refuses what a collector would refuse: a line that is out of place, a name or label that is none, a series that is
//! there twice, a family whose lines are not together, a counter that is not called `_total`, a missing end.

use std::collections::{BTreeMap, BTreeSet};

/// One family of metrics.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Family {
    /// `counter`, `gauge`, `info`, …
    pub kind: String,
    /// The help, which must not be empty.
    pub help: String,
    /// The unit, if there is one.
    pub unit: Option<String>,
    /// Values by their labels in order, `name="value"` joined with commas; of a histogram with `_bucket `, `_count ` or
    /// `_sum ` before them.
    pub series: BTreeMap<String, f64>,
}

/// Reads a whole exposition, by name of the family.
///
/// # Errors
/// A sentence with the line that is wrong.
pub fn parse(text: &str) -> Result<BTreeMap<String, Family>, String> {
    let body = text.strip_suffix("# EOF\n").ok_or("does not end with # EOF")?;
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in body.lines() {
        let wrong = |what: &str| format!("{what}: {line:?}");
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let [Some(word), Some(name), Some(rest)] = [words.next(), words.next(), words.next()] else {
                return Err(wrong("a comment of two words"));
            };
            if !is_name(name) {
                return Err(wrong("not a name"));
            }
            if name != current {
                if families.insert(name.to_owned(), Family::default()).is_some() {
                    return Err(wrong("a family that was there before"));
                }
                name.clone_into(&mut current);
            }
            let family = families.get_mut(name).expect("just there");
            if !family.series.is_empty() {
                return Err(wrong("a comment after series"));
            }
            match word {
                "HELP" if family.help.is_empty() && !rest.is_empty() => rest.clone_into(&mut family.help),
                "TYPE" if family.kind.is_empty() && ["counter", "gauge", "histogram", "info"].contains(&rest) => {
                    rest.clone_into(&mut family.kind);
                }
                "UNIT" if family.unit.is_none() && name.ends_with(&format!("_{rest}")) => {
                    family.unit = Some(rest.to_owned());
                }
                _ => return Err(wrong("an odd comment")),
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').ok_or_else(|| wrong("no value"))?;
        let value: f64 = value.parse().map_err(|_| wrong("no number"))?;
        let (name, labels) = match series.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').ok_or_else(|| wrong("no end of labels"))?),
            None => (series, ""),
        };
        let family = families.get_mut(&current).ok_or_else(|| wrong("a series without a family"))?;
        let suffixes: &[&str] = match family.kind.as_str() {
            "counter" => &["_total"],
            "histogram" => &["_bucket", "_count", "_sum"],
            "info" => &["_info"],
            "gauge" => &[""],
            _ => return Err(wrong("a family without a type")),
        };
        let suffix = name.strip_prefix(&current).filter(|suffix| suffixes.contains(suffix));
        let suffix = suffix.ok_or_else(|| wrong("a series of another family"))?;
        if suffixes.len() > 1 && (suffix == "_bucket") != labels.contains("le=\"") {
            return Err(wrong("a bucket without an end, or an end without a bucket"));
        }
        if ["counter", "histogram"].contains(&family.kind.as_str()) && !(value >= 0.0 && value.is_finite()) {
            return Err(wrong("a count that is none"));
        }
        let labels = ordered(labels).ok_or_else(|| wrong("odd labels"))?;
        // The parts of a histogram have the same labels.
        let part = if suffixes.len() > 1 { format!("{suffix} ") } else { String::new() };
        if family.series.insert(part + &labels, value).is_some() {
            return Err(wrong("a series that was there before"));
        }
    }
    match families.iter().find(|(_, family)| family.help.is_empty() || family.kind.is_empty()) {
        Some((name, _)) => Err(format!("{name} has no help or no type")),
        None => Ok(families),
    }
}

fn is_name(text: &str) -> bool {
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    text.starts_with(first) && text.chars().all(|c| first(c) || c.is_ascii_digit())
}

/// The labels in order; `None` when they are not labels or one is there twice.
fn ordered(labels: &str) -> Option<String> {
    let mut found = BTreeSet::new();
    let mut names = BTreeSet::new();
    let mut rest = labels;
    while !rest.is_empty() {
        let (name, after) = rest.split_once("=\"")?;
        let mut escaped = false;
        let end = after.find(|c| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        })?;
        let (value, after) = (&after[..end], &after[end + 1..]);
        if !is_name(name) || !names.insert(name) {
            return None;
        }
        found.insert(format!("{name}=\"{value}\""));
        rest = match after.strip_prefix(',') {
            Some("") => return None,
            Some(more) => more,
            None if after.is_empty() => "",
            None => return None,
        };
    }
    Some(found.into_iter().collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_collector_takes_is_read() {
        let histogram = "# HELP h H.\n# TYPE h histogram\nh_sum 0.5\nh_count 1\nh_bucket{le=\"1\"} 1\n# EOF\n";
        let series = &parse(histogram).unwrap()["h"].series;
        assert_eq!((series["_sum "], series["_count "], series["_bucket le=\"1\""]), (0.5, 1.0, 1.0));
        let text = "# HELP b_x_bytes Some.\n# TYPE b_x_bytes gauge\n# UNIT b_x_bytes bytes\n\
                    b_x_bytes{vm=\"a\\\"b\",kind=\"c,d\"} 3\nb_x_bytes 4.5\n# EOF\n";
        let families = parse(text).unwrap();
        assert_eq!(families["b_x_bytes"].series["kind=\"c,d\",vm=\"a\\\"b\""], 3.0);
        assert_eq!(families["b_x_bytes"].series[""], 4.5);
    }

    #[test]
    fn what_a_collector_refuses_is_refused() {
        let head = "# HELP x X.\n# TYPE x counter\n";
        for (text, part) in [
            ("x 1\n# EOF\n".to_owned(), "without a family"),
            (format!("{head}x_total 1\n"), "does not end"),
            (format!("{head}x 1\n# EOF\n"), "another family"),
            (format!("{head}x_total 1\nx_total 2\n# EOF\n"), "there before"),
            (format!("{head}x_total{{a=\"1\",b=\"2\"}} 1\nx_total{{b=\"2\",a=\"1\"}} 2\n# EOF\n"), "there before"),
            (format!("{head}x_total{{a=\"1\",a=\"2\"}} 1\n# EOF\n"), "odd labels"),
            (format!("{head}x_total -1\n# EOF\n"), "a count that is none"),
            (format!("{head}x_total one\n# EOF\n"), "no number"),
            (format!("{head}x_total 1\n{head}# EOF\n"), "after series"),
            (format!("{head}# HELP y Y.\n# TYPE y gauge\n{head}# EOF\n"), "that was there before"),
            (format!("{head}# UNIT x bytes\n# EOF\n"), "an odd comment"),
            ("# TYPE x counter\nx_total 1\n# EOF\n".to_owned(), "no help"),
            (format!("{head}x_total{{a=1}} 1\n# EOF\n"), "odd labels"),
            ("# HELP x X.\n# TYPE x histogram\nx_bucket 1\n# EOF\n".to_owned(), "without an end"),
            ("# HELP x X.\n# TYPE x histogram\nx_total 1\n# EOF\n".to_owned(), "another family"),
        ] {
            let error = parse(&text).expect_err(&text);
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}

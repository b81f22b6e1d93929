//! `docs/api.md`: the reference of the interface, written from the OpenAPI document and from the table of codes.

use std::fmt::Write;

use serde_json::Value;

use super::document::operations;
use crate::controller::error::Code;

/// How the reference is written anew.
const WRITE: &str = "BALLAST_WRITE=1 cargo test -p ballast --lib api::reference";

/// The reference as markdown.
pub fn reference(document: &Value) -> String {
    let mut out = format!(
        "# The interface over HTTP\n\n\
         <!-- Written from the OpenAPI document. Change the annotations in vmm/src, then run: {WRITE} -->\n\n{}\n\n\
         ## Requests\n\n| request | |\n| --- | --- |\n",
        document["info"]["description"].as_str().unwrap_or_default()
    );
    let _ = operations(document).try_for_each(|(path, method, operation)| {
        let heading = format!("{} {path}", method.to_uppercase());
        writeln!(out, "| [`{heading}`](#{}) | {} |", anchor(&heading), text(&operation["summary"]))
    });
    for (path, method, operation) in operations(document) {
        describe(&mut out, path, method, operation);
    }
    out.push_str("\n## Errors\n\nThe body of every answer from 400 upwards is a [Refusal](#refusal). Its `code`:\n\n");
    out.push_str("| code | status | why, and what to do |\n| --- | --- | --- |\n");
    for name in document["components"]["schemas"]["Code"]["enum"].as_array().into_iter().flatten() {
        // The names are those of the codes.
        let Ok(code) = serde_json::from_value::<Code>(name.clone()) else { continue };
        let _ = writeln!(out, "| `{}` | {} | {} |", text(name), code.status(), code.advice());
    }
    out.push_str("\n## Types\n\nA key that is not `required` may be absent. `null` is said where it is possible.\n");
    for (name, schema) in document["components"]["schemas"].as_object().into_iter().flatten() {
        define(&mut out, name, schema);
    }
    out
}

/// One request.
fn describe(out: &mut String, path: &str, method: &str, operation: &Value) {
    let _ = write!(out, "\n### {} {path}\n\n{}\n", method.to_uppercase(), text(&operation["summary"]));
    if let Some(more) = operation["description"].as_str() {
        let _ = write!(out, "\n{more}\n");
    }
    let parameters = operation["parameters"].as_array().into_iter().flatten();
    let rows: Vec<_> = parameters
        .map(|parameter| {
            let required = if parameter["required"] == true { ", required" } else { "" };
            format!(
                "| `{}` | in the {}{required} | {} | {} |\n",
                text(&parameter["name"]),
                text(&parameter["in"]),
                kind(&parameter["schema"]),
                text(&parameter["description"])
            )
        })
        .collect();
    if !rows.is_empty() {
        let _ = write!(out, "\n| parameter | where | type | meaning |\n| --- | --- | --- | --- |\n{}", rows.concat());
    }
    if let Some(content) = operation["requestBody"]["content"].as_object() {
        let _ = write!(out, "\nBody: {}\n", contents(content));
    }
    out.push_str("\n| status | meaning | body |\n| --- | --- | --- |\n");
    for (status, answer) in operation["responses"].as_object().into_iter().flatten() {
        let status = if status == "default" { "any other" } else { status };
        let body = answer["content"].as_object().map(contents).unwrap_or_default();
        let _ = writeln!(out, "| {status} | {} | {body} |", text(&answer["description"]));
    }
}

/// The types of a body, with their media type where it is not JSON.
fn contents(content: &serde_json::Map<String, Value>) -> String {
    let one = |(media, body): (&String, &Value)| match media.as_str() {
        "application/json" => kind(&body["schema"]),
        "text/plain" => "text".to_owned(),
        media => format!("{} as `{media}`", kind(&body["schema"])),
    };
    content.iter().map(one).collect::<Vec<_>>().join(" or ")
}

/// One type.
fn define(out: &mut String, name: &str, schema: &Value) {
    let _ = write!(out, "\n### {name}\n\n{}\n", text(&schema["description"]));
    if let Some(values) = schema["enum"].as_array() {
        let values: Vec<_> = values.iter().map(|value| format!("`{}`", text(value))).collect();
        let _ = write!(out, "\nOne of {}.\n", values.join(", "));
    }
    let parts = std::iter::once(schema).chain(schema["allOf"].as_array().into_iter().flatten());
    let rows: Vec<_> = parts.flat_map(fields).collect();
    if !rows.is_empty() {
        let _ = write!(out, "\n| key | type | meaning |\n| --- | --- | --- |\n{}", rows.concat());
    }
}

/// The keys of an object.
fn fields(schema: &Value) -> Vec<String> {
    let required = |key: &str| schema["required"].as_array().is_some_and(|keys| keys.iter().any(|k| k == key));
    let properties = schema["properties"].as_object().into_iter().flatten();
    let row = |(key, property): (&String, &Value)| {
        let needed = if required(key) { ", required" } else { "" };
        format!("| `{key}` | {}{needed} | {} |\n", kind(property), meaning(property))
    };
    properties.map(row).collect()
}

/// What a key means; where it may be `null` or one of our types, that is said with the type.
fn meaning(property: &Value) -> String {
    let kinds = property["oneOf"].as_array().into_iter().flatten();
    text(
        std::iter::once(property)
            .chain(kinds)
            .map(|one| &one["description"])
            .find(|d| d.is_string())
            .unwrap_or(&Value::Null),
    )
}

/// A type in a word or two, with a link where it is one of ours.
fn kind(schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.iter().map(|value| format!("`{}`", text(value))).collect::<Vec<_>>().join(", ");
    }
    for several in ["oneOf", "anyOf", "allOf"] {
        if let Some(kinds) = schema[several].as_array() {
            let kinds: Vec<_> = kinds.iter().map(kind).filter(|kind| !kind.is_empty()).collect();
            return kinds.join(" or ");
        }
    }
    if let Some(kinds) = schema["type"].as_array() {
        return kinds.iter().map(text).collect::<Vec<_>>().join(" or ");
    }
    match schema["type"].as_str() {
        Some("array") => format!("list of {}", kind(&schema["items"])),
        Some(kind) => kind.to_owned(),
        None => String::new(),
    }
}

/// A text of the document as the cell of a table.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().replace('\n', " ").replace('|', "\\|")
}

/// Where a heading can be found.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || *c == '-' || *c == '_').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference is part of the repository, because that is where it is read.
    #[test]
    fn the_reference_is_up_to_date() {
        let document = serde_json::from_str(&crate::api::document()).expect("JSON");
        let (path, new) = (concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/api.md"), reference(&document));
        if std::env::var_os("BALLAST_WRITE").is_some() {
            std::fs::write(path, &new).expect("written");
        }
        let old = std::fs::read_to_string(path).unwrap_or_default();
        assert!(old == new, "docs/api.md is not what the routes say; write it anew: {WRITE}");
    }

    #[test]
    fn every_request_and_type_says_what_it_is() {
        let document: Value = serde_json::from_str(&crate::api::document()).expect("JSON");
        for (path, method, operation) in operations(&document) {
            assert!(!text(&operation["summary"]).is_empty(), "{method} {path} has no doc comment");
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                assert!(!text(&parameter["description"]).is_empty(), "{method} {path}: {parameter}");
            }
        }
        for (name, schema) in document["components"]["schemas"].as_object().expect("types") {
            assert!(!text(&schema["description"]).is_empty(), "{name} has no doc comment");
            for (key, property) in schema["properties"].as_object().into_iter().flatten() {
                assert!(!meaning(property).is_empty(), "{name}.{key} has no doc comment");
            }
        }
    }
}

//! The document as a judge of answers.

use ballast_tests::serve::Serve;
use ballast_tests::{Answer, deadline, exchange};
use serde_json::{Value, json};

/// The methods that the interface uses.
pub const METHODS: [&str; 5] = ["get", "put", "post", "patch", "delete"];

/// Sends a request.
pub fn send(serve: &Serve, method: &str, target: &str, body: &str) -> Answer {
    let body = (!body.is_empty()).then_some(body);
    exchange(deadline(120), &serve.socket(), method, target, body)
        .unwrap_or_else(|error| panic!("{method} {target}: {error}"))
}

/// The served document.
pub struct Contract {
    document: Value,
}

impl Contract {
    /// That of this controller. Keys of an answer that it does not name are wrong.
    pub fn of(serve: &Serve) -> Self {
        let answer = send(serve, "GET", "/openapi.json", "");
        assert_eq!((answer.status, answer.header("content-type")), (200, Some("application/json")));
        let mut document: Value = serde_json::from_str(&answer.body).expect("JSON");
        // What is a part of something else has keys beside its own.
        let text = document.to_string();
        let is_part = |name: &str| {
            let reference = format!("{{\"$ref\":\"#/components/schemas/{name}\"");
            text.split("\"allOf\":[").skip(1).any(|parts| parts.starts_with(&reference))
        };
        for (name, schema) in document["components"]["schemas"].as_object_mut().expect("types") {
            let open = schema.get("additionalProperties").is_none() && !is_part(name);
            if schema["properties"].is_object() && open {
                schema["additionalProperties"] = json!(false);
            }
        }
        Self { document }
    }

    /// All operations: path, method, and what the document says.
    pub fn operations(&self) -> impl Iterator<Item = (&str, &str, &Value)> {
        let paths = self.document["paths"].as_object().expect("paths");
        paths
            .iter()
            .flat_map(|(path, item)| METHODS.iter().filter_map(move |m| Some((path.as_str(), *m, item.get(m)?))))
    }

    /// A schema with what it refers to, so that it can be used alone.
    pub fn validator(&self, schema: &Value) -> jsonschema::Validator {
        let mut alone = schema.clone();
        alone["components"] = self.document["components"].clone();
        jsonschema::draft202012::new(&alone).expect("a schema")
    }

    /// What a schema refers to, if it is a reference, or may be `null` or one.
    pub fn resolve<'a>(&'a self, schema: &'a Value) -> &'a Value {
        let several = ["oneOf", "anyOf", "allOf"].iter().find_map(|key| schema[key].as_array());
        let schemas = std::iter::once(schema).chain(several.into_iter().flatten());
        match schemas.filter_map(|schema| schema["$ref"].as_str()?.strip_prefix('#')).next() {
            Some(pointer) => self.document.pointer(pointer).expect("it refers to something"),
            None => schema,
        }
    }

    fn fits(&self, schema: &Value, body: &str) -> Result<(), String> {
        let value: Value = serde_json::from_str(body).map_err(|error| format!("{error}: {body}"))?;
        self.validator(schema).validate(&value).map_err(|error| format!("{error} at {}: {body}", error.instance_path()))
    }

    /// Whether this answer to a request of `route` is one that the document promises.
    pub fn check(&self, route: &str, answer: &Answer) -> Result<(), String> {
        let (method, path) = route.split_once(' ').expect("a method and a path");
        let operation = &self.document["paths"][path][method.to_lowercase()];
        if operation.is_null() {
            return Err("the document has no such route".to_owned());
        }
        let responses = &operation["responses"];
        let promised = match responses.get(answer.status.to_string()) {
            Some(promised) => promised,
            None if answer.status >= 400 => &responses["default"],
            None => return Err(format!("the document does not promise the status {}: {}", answer.status, answer.body)),
        };
        let Some((media, content)) = promised["content"].as_object().and_then(|content| content.iter().next()) else {
            let empty = answer.body.is_empty();
            return if empty { Ok(()) } else { Err(format!("a body where none is promised: {}", answer.body)) };
        };
        let sent = answer.header("content-type").unwrap_or_default();
        if sent.split(';').next() != Some(media.as_str()) {
            return Err(format!("the body is {sent:?}, not {media}"));
        }
        match media.as_str() {
            "application/json" => self.fits(&content["schema"], &answer.body),
            "application/x-ndjson" => answer.body.lines().try_for_each(|line| self.fits(&content["schema"], line)),
            _ => Ok(()),
        }
    }

    /// Whether this is a refusal in the form that all have: a code for programs, one sentence for people.
    pub fn check_refusal(&self, answer: &Answer) -> Result<(), String> {
        if !(400..500).contains(&answer.status) {
            return Err(format!("answered {}", answer.status));
        }
        self.fits(&json!({ "$ref": "#/components/schemas/Refusal" }), &answer.body)?;
        let refusal: Value = serde_json::from_str(&answer.body).map_err(|error| error.to_string())?;
        let message = refusal["message"].as_str().unwrap_or_default();
        if message.is_empty() || message.contains('\n') { Err("not one sentence".to_owned()) } else { Ok(()) }
    }
}

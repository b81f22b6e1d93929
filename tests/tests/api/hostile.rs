//! Requests that the document does not allow, made up from the document itself: a new route is attacked without a word.

use serde_json::{Map, Value, json};

use super::calls::{CALLS, Call};
use super::contract::{Contract, METHODS};

/// A request that must be refused.
pub struct Attack {
    pub method: String,
    pub target: String,
    pub body: String,
    /// What is wrong with it.
    pub why: String,
    /// The status, where only one is right.
    status: Option<u16>,
}

impl Attack {
    /// Whether the status is the right one.
    pub fn expected(&self, status: u16) -> Result<(), String> {
        if self.status.is_none_or(|right| right == status) { Ok(()) } else { Err(format!("answered {status}")) }
    }
}

/// Names that nobody can have: paths, controls, bytes that are no text, what is too long.
fn names() -> Vec<String> {
    let long = "n".repeat(5000);
    let names = [
        "..%2F..%2Fetc%2Fpasswd",
        "%2e%2e",
        "%2Fetc",
        "%00",
        "web%00",
        "%ff%fe",
        "a%20b",
        "%0d%0aX:%20y",
        "-web",
        "%F0%9F%90%8B",
        "w%C3%A9b",
        "web%2F",
        "%7Bname%7D",
        "%25%32%65",
        "*",
        "?",
        "%",
        "%zz",
        &long,
    ];
    names.map(str::to_owned).into()
}

/// Bodies that are not what any request takes.
fn nonsense() -> Vec<String> {
    let deep = format!("{{\"a\":{}", "[".repeat(10_000));
    let large = format!("{{\"a\":\"{}\"}}", "x".repeat(70_000));
    let fixed = [
        "",
        " ",
        "{",
        "}",
        "nonsense",
        "null",
        "true",
        "[]",
        "[{}]",
        "\"x\"",
        "0",
        "{} {}",
        "{},",
        "{\"frob\":1}",
        "{\"\":1}",
        "{'a':1}",
        "{a:1}",
        "{\"a\":NaN}",
        "\u{feff}{}",
        "{\"a\":\"\\ud800\"}",
        "{\"a\":1e999}",
        &deep,
        &large,
    ];
    fixed.map(str::to_owned).into()
}

/// Values that some types are not.
fn junk() -> Vec<Value> {
    vec![
        json!(null),
        json!(true),
        json!(-1),
        json!(0.5),
        json!("x"),
        json!(""),
        json!("18446744073709551616"),
        json!([]),
        json!([1]),
        json!({}),
        json!({ "frob": 1 }),
        json!("\u{1f40b}"),
        json!("../../etc"),
        json!("\u{0}"),
    ]
}

/// Numbers that fit no integer; a schema cannot say so.
const HUGE: [&str; 4] =
    ["18446744073709551616", "1e30", "-9223372036854775809", "99999999999999999999999999999999999999"];

/// All that can be made up.
pub fn attacks(contract: &Contract) -> Vec<Attack> {
    let mut attacks = Vec::new();
    for (path, method, operation) in contract.operations() {
        let route = format!("{} {path}", method.to_uppercase());
        // The contract's own test says when there is none.
        let Some(good) = CALLS.iter().find(|call| call.route == route && !call.refused()) else { continue };
        let maker = Maker { contract, path, method, operation, good };
        maker.wrong_methods(&mut attacks);
        maker.wrong_names(&mut attacks);
        maker.wrong_queries(&mut attacks);
        maker.wrong_bodies(&mut attacks);
    }
    attacks
}

/// One operation and an example of it.
struct Maker<'a> {
    contract: &'a Contract,
    path: &'a str,
    method: &'a str,
    operation: &'a Value,
    good: &'a Call,
}

impl Maker<'_> {
    fn attack(&self, target: String, body: String, why: impl Into<String>, status: Option<u16>) -> Attack {
        Attack { method: self.method.to_uppercase(), target, body, why: why.into(), status }
    }

    /// The example's path, without its query.
    fn target(&self) -> &str {
        self.good.target.split('?').next().expect("a path")
    }

    fn wrong_methods(&self, attacks: &mut Vec<Attack>) {
        let known: Vec<_> =
            self.contract.operations().filter(|(path, ..)| *path == self.path).map(|(_, m, _)| m).collect();
        for method in METHODS.iter().filter(|method| !known.contains(method)).chain(&["frob"]) {
            let why = format!("{} is not for this path", method.to_uppercase());
            let attack = self.attack(self.target().to_owned(), "{}".to_owned(), why, Some(405));
            attacks.push(Attack { method: method.to_uppercase(), ..attack });
        }
    }

    fn wrong_names(&self, attacks: &mut Vec<Attack>) {
        let (Some(start), Some(end)) = (self.path.find('{'), self.path.find('}')) else { return };
        // The rest of a path may have slashes in it, and be empty.
        let rest = self.path[start..end].contains("path");
        for name in names().into_iter().filter(|name| !rest || !["%2Fetc", "web%2F", "?"].contains(&name.as_str())) {
            let target = format!("{}{name}{}", &self.path[..start], &self.path[end + 1..]);
            attacks.push(self.attack(target, super::body(self.good), "no such name", None));
        }
    }

    fn wrong_queries(&self, attacks: &mut Vec<Attack>) {
        let mut queries = vec!["frob=1".to_owned(), "%ff=1".to_owned(), "%F0%9F%90%8B".to_owned()];
        let parameters = self.operation["parameters"].as_array().into_iter().flatten();
        for parameter in parameters.filter(|parameter| parameter["in"] == "query") {
            let name = parameter["name"].as_str().expect("a name");
            let schema = self.contract.resolve(&parameter["schema"]).to_string();
            // What is a string may be anything, so it is its meaning that would have to be wrong.
            let free = schema.contains("\"string\"") && !schema.contains("enum");
            if !free {
                queries.extend(["", "frob", "-1", "1.5", "18446744073709551616", "%00"].map(|v| format!("{name}={v}")));
            }
            queries.push(format!("{name}=1&{name}=1"));
        }
        for query in queries {
            let target = format!("{}?{query}", self.target());
            attacks.push(self.attack(target, super::body(self.good), "a wrong query", Some(400)));
        }
    }

    fn wrong_bodies(&self, attacks: &mut Vec<Attack>) {
        let Some(schema) = self.operation.pointer("/requestBody/content/application~1json/schema") else { return };
        let mut push = |body: String, why: String, status| {
            attacks.push(self.attack(self.target().to_owned(), body, why, status));
        };
        for body in nonsense() {
            push(body, "a body that is none".to_owned(), None);
        }
        let text = super::body(self.good);
        let good: Value = serde_json::from_str(&text).expect("the example is JSON");
        // A list is attacked in its first entry.
        let (entry, at, of) = match &good {
            Value::Array(list) => (&list[0], "/0", &self.contract.resolve(schema)["items"]),
            object => (object, "", schema),
        };
        for (key, value) in entry.as_object().expect("an object") {
            let twice = text.replacen('{', &format!("{{{}:{value},", json!(key)), 1);
            push(twice, format!("{key} twice"), Some(400));
        }
        let valid = self.contract.validator(schema);
        assert!(valid.is_valid(&good), "the example fits its schema: {text}");
        for (pointer, property) in self.places(of, entry, at) {
            for value in junk() {
                let body = with(&good, &pointer, value);
                if !valid.is_valid(&body) {
                    push(body.to_string(), format!("wrong at {pointer}"), None);
                }
            }
            if property.to_string().contains("\"integer\"") {
                for number in HUGE {
                    let body = with(&good, &pointer, json!("HUGE")).to_string().replace("\"HUGE\"", number);
                    push(body, format!("huge at {pointer}"), Some(400));
                }
            }
        }
    }

    /// Every place in a body that has a type, and one in each object that none has.
    fn places<'a>(&'a self, schema: &'a Value, example: &Value, at: &str) -> Vec<(String, &'a Value)> {
        let schema = self.contract.resolve(schema);
        let Some(properties) = schema["properties"].as_object() else { return Vec::new() };
        assert_eq!(schema["additionalProperties"], false, "{}: unknown keys are to be refused", self.path);
        let mut places = vec![(format!("{at}/frob"), &Value::Null)];
        for (key, property) in properties {
            let at = format!("{at}/{key}");
            places.extend(self.places(property, &example[key], &at));
            places.push((at, property));
        }
        places
    }
}

/// `body` with another value at a place; objects on the way there are made.
fn with(body: &Value, pointer: &str, value: Value) -> Value {
    let mut new = body.clone();
    let mut place = &mut new;
    for key in pointer.split('/').skip(1) {
        if let Some(at) = key.parse().ok().filter(|at: &usize| place.as_array().is_some_and(|list| *at < list.len())) {
            place = &mut place[at];
            continue;
        }
        if !place.is_object() {
            *place = Value::Object(Map::new());
        }
        place = &mut place[key];
    }
    *place = value;
    new
}

//! What an answer must be, off a request: OpenAI's `response_format`, and vLLM's `guided_...` and
//! `structured_outputs`.
//!
//! Checked here is the form of the request; whether a schema or grammar can be used is the lead's to
//! say, before the first token.

use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::error::Error;
use super::fields::Fields;
use super::json::kind;
use crate::generation::Structure;
use crate::group::stream::Grammar;

/// Longest schema, expression or grammar.
const MAX_BYTES: usize = 256 << 10;
const MAX_CHOICES: usize = 1024;
/// Longest name and description of a schema, in characters.
const MAX_NAME_CHARS: usize = 64;
const MAX_DESCRIPTION_CHARS: usize = 4096;
const FORMATS: &str = "`text`, `json_object` or `json_schema`";

/// # Errors
/// A field that is not as it should be, or more than one of them.
pub fn take(fields: &mut Fields) -> Result<Option<Structure>, Error> {
    let found = [
        ("response_format", response_format(fields)?),
        ("structured_outputs", structured_outputs(fields)?),
        ("guided_json", guided(fields, "guided_json", json_schema)?),
        ("guided_regex", guided(fields, "guided_regex", regex)?),
        ("guided_choice", guided(fields, "guided_choice", choice)?),
        ("guided_grammar", guided(fields, "guided_grammar", lark)?),
    ];
    let mut given = found.into_iter().filter_map(|(field, grammar)| Some((field, grammar?)));
    let Some((field, grammar)) = given.next() else { return Ok(None) };
    if let Some((second, _)) = given.next() {
        let message = format!("`{second}` does not go with `{field}`; send only one of them");
        return Err(Error::field(second, message));
    }
    Ok(Some(Structure { field, grammar }))
}

fn response_format(fields: &mut Fields) -> Result<Option<Grammar>, Error> {
    let map = match fields.take("response_format") {
        None => return Ok(None),
        Some(Value::Object(map)) => map,
        Some(other) => {
            let message = format!("`response_format` must be an object, not {}", kind(&other));
            return Err(Error::field("response_format", message));
        }
    };
    let mut fields = Fields::new("response_format", map);
    let grammar = match fields.take("type") {
        Some(Value::String(text)) if text == "text" => None,
        Some(Value::String(text)) if text == "json_object" => Some(any_object()),
        Some(Value::String(text)) if text == "json_schema" => Some(named_schema(&mut fields)?),
        other => {
            let got = match &other {
                None => "missing".to_owned(),
                Some(Value::String(_)) => "another word".to_owned(),
                Some(value) => kind(value).to_owned(),
            };
            let message = format!("`response_format.type` must be {FORMATS}; it is {got}");
            return Err(Error::field("response_format.type", message));
        }
    };
    fields.finish(&["type", "json_schema"])?;
    Ok(grammar)
}

/// OpenAI's `{"name", "description", "schema", "strict"}`.
fn named_schema(fields: &mut Fields) -> Result<Grammar, Error> {
    let name = fields.name("json_schema");
    let map = match fields.take("json_schema") {
        Some(Value::Object(map)) => map,
        other => {
            let got = other.as_ref().map_or("missing", kind);
            let message =
                format!("`{name}` must be an object with `name` and `schema`; it is {got}");
            return Err(Error::field(&name, message));
        }
    };
    let mut inner = Fields::new(&name, map);
    let label = inner.label("name", MAX_NAME_CHARS)?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !label.is_some_and(|label| !label.is_empty() && label.chars().all(is_plain)) {
        let name = inner.name("name");
        let message = format!("`{name}` must be 1 to {MAX_NAME_CHARS} of a-z, A-Z, 0-9, _ and -");
        return Err(Error::field(&name, message));
    }
    inner.label("description", MAX_DESCRIPTION_CHARS)?;
    let is_strict = inner.boolean("strict")?.unwrap_or(false);
    let field = inner.name("schema");
    let schema = match inner.take("schema") {
        None => json!({"type": "object"}),
        Some(schema) => schema,
    };
    inner.finish(&["name", "description", "schema", "strict"])?;
    schema_text(&field, schema, is_strict)
}

fn structured_outputs(fields: &mut Fields) -> Result<Option<Grammar>, Error> {
    let name = "structured_outputs";
    let map = match fields.take(name) {
        None => return Ok(None),
        Some(Value::Object(map)) => map,
        Some(other) => {
            let message = format!("`{name}` must be an object, not {}", kind(&other));
            return Err(Error::field(name, message));
        }
    };
    let mut inner = Fields::new(name, map);
    let is_any = inner.boolean("json_object")?.unwrap_or(false);
    let given: Vec<Grammar> = [
        guided(&mut inner, "json", json_schema)?,
        guided(&mut inner, "regex", regex)?,
        guided(&mut inner, "choice", choice)?,
        guided(&mut inner, "grammar", lark)?,
        is_any.then(any_object),
    ]
    .into_iter()
    .flatten()
    .collect();
    inner.finish(&["json", "regex", "choice", "grammar", "json_object"])?;
    match <[Grammar; 1]>::try_from(given) {
        Ok([grammar]) => Ok(Some(grammar)),
        Err(given) if given.is_empty() => Ok(None),
        Err(_) => {
            let message = format!("`{name}` must have only one of its fields");
            Err(Error::field(name, message))
        }
    }
}

type Read = fn(&str, Value) -> Result<Grammar, Error>;

fn guided(fields: &mut Fields, field: &str, read: Read) -> Result<Option<Grammar>, Error> {
    let name = fields.name(field);
    fields.take(field).map(|value| read(&name, value)).transpose()
}

fn any_object() -> Grammar {
    Grammar::JsonSchema("{\"type\":\"object\"}".into())
}

/// A schema, or the text of one, as vLLM takes it.
fn json_schema(name: &str, value: Value) -> Result<Grammar, Error> {
    let Value::String(text) = value else { return schema_text(name, value, true) };
    let parsed = serde_json::from_str(&text).map_err(|error| {
        Error::field(name, format!("`{name}` must be a JSON schema, or the text of one: {error}"))
    })?;
    schema_text(name, parsed, true)
}

/// Where it is not strict, what the compiler does not know of a schema is left out of account.
fn schema_text(name: &str, mut schema: Value, is_strict: bool) -> Result<Grammar, Error> {
    match &mut schema {
        Value::Object(map) if !is_strict => {
            map.insert("x-guidance".to_owned(), json!({"lenient": true}));
        }
        Value::Object(map) => drop::<Option<Value>>(Map::remove(map, "x-guidance")),
        Value::Bool(_) => {}
        other => {
            let message = format!("`{name}` must be a JSON schema, not {}", kind(other));
            return Err(Error::field(name, message));
        }
    }
    Ok(Grammar::JsonSchema(bounded(name, schema.to_string())?.into()))
}

fn regex(name: &str, value: Value) -> Result<Grammar, Error> {
    Ok(Grammar::Regex(text(name, value)?.into()))
}

fn lark(name: &str, value: Value) -> Result<Grammar, Error> {
    Ok(Grammar::Lark(text(name, value)?.into()))
}

/// One of these texts: an expression that matches nothing else.
fn choice(name: &str, value: Value) -> Result<Grammar, Error> {
    let refuse = |got: String| {
        let allowed =
            format!("`{name}` must be an array of 1 to {MAX_CHOICES} strings, none empty");
        Error::field(name, format!("{allowed}; {got}"))
    };
    let items = match value {
        Value::Array(items) if (1..=MAX_CHOICES).contains(&items.len()) => items,
        Value::Array(items) => return Err(refuse(format!("there are {}", items.len()))),
        other => return Err(refuse(format!("it is {}", kind(&other)))),
    };
    let mut expression = String::from("(?:");
    for (idx, item) in items.iter().enumerate() {
        let text = item.as_str().filter(|text| !text.is_empty());
        let text = text.ok_or_else(|| refuse(format!("number {idx} is none")))?;
        expression.push_str(if idx == 0 { "" } else { "|" });
        for c in text.chars() {
            let is_plain = c.is_alphanumeric() || c == ' ';
            match is_plain {
                true => expression.push(c),
                false => {
                    write!(expression, "\\x{{{:X}}}", u32::from(c)).map_err(|_| Error::Defect)?
                }
            }
        }
    }
    expression.push(')');
    Ok(Grammar::Regex(bounded(name, expression)?.into()))
}

fn text(name: &str, value: Value) -> Result<String, Error> {
    match value {
        Value::String(text) if !text.is_empty() => bounded(name, text),
        Value::String(_) => Err(Error::field(name, format!("`{name}` must not be empty"))),
        other => {
            let message = format!("`{name}` must be a string, not {}", kind(&other));
            Err(Error::field(name, message))
        }
    }
}

fn bounded(name: &str, text: String) -> Result<String, Error> {
    if text.len() <= MAX_BYTES {
        return Ok(text);
    }
    let message = format!("`{name}` has {} bytes; at most {MAX_BYTES} are taken", text.len());
    Err(Error::field(name, message))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Option<Structure>, Error> {
        let Value::Object(map) = body else { panic!("a test's body is an object") };
        let mut fields = Fields::new("", map);
        let structure = take(&mut fields)?;
        fields.finish(&[])?;
        Ok(structure)
    }

    #[test]
    fn each_form_becomes_its_grammar() {
        let schema = |text: &str| Grammar::JsonSchema(text.into());
        let regex = |text: &str| Grammar::Regex(text.into());
        let named = |schema: Value, strict: Value| {
            let named = json!({"name": "a-1_B", "schema": schema, "strict": strict});
            json!({"response_format": {"type": "json_schema", "json_schema": named}})
        };
        let lenient = r#"{"type":"array","x-guidance":{"lenient":true}}"#;
        let any = r#"{"type":"object"}"#;
        let table = [
            (json!({"response_format": {"type": "json_object"}}), schema(any)),
            (named(json!({"type": "array"}), json!(true)), schema(r#"{"type":"array"}"#)),
            (named(json!({"type": "array"}), json!(false)), schema(lenient)),
            (named(json!({"type": "array"}), json!(null)), schema(lenient)),
            (
                named(json!({"type": "array", "x-guidance": 3}), json!(true)),
                schema(r#"{"type":"array"}"#),
            ),
            (json!({"guided_json": {"type": "null"}}), schema(r#"{"type":"null"}"#)),
            (json!({"guided_json": "{\"type\": \"null\"}"}), schema(r#"{"type":"null"}"#)),
            (json!({"guided_json": true}), schema("true")),
            (json!({"guided_regex": "a|b"}), regex("a|b")),
            (json!({"guided_choice": ["ja", "n/ein."]}), regex(r"(?:ja|n\x{2F}ein\x{2E})")),
            (json!({"guided_grammar": "start: \"a\""}), Grammar::Lark("start: \"a\"".into())),
            (json!({"structured_outputs": {"regex": "a"}}), regex("a")),
            (json!({"structured_outputs": {"json_object": true}}), schema(any)),
            (json!({"structured_outputs": {"choice": ["x"], "json": null}}), regex("(?:x)")),
        ];
        for (body, expect) in table {
            let field = body.as_object().unwrap().keys().next().unwrap().clone();
            let structure = read(body.clone()).unwrap().unwrap();
            assert_eq!((structure.field, structure.grammar), (field.as_str(), expect), "{body}");
        }
        for nothing in [
            json!({}),
            json!({"response_format": null, "guided_json": null}),
            json!({"response_format": {"type": "text"}}),
            json!({"structured_outputs": {}}),
        ] {
            assert_eq!(read(nothing.clone()).unwrap(), None, "{nothing}");
        }
    }

    #[test]
    fn what_is_not_as_it_should_be_is_named() {
        let format = |format: Value| json!({"response_format": format});
        let named = |named: Value| format(json!({"type": "json_schema", "json_schema": named}));
        let table = [
            (format(json!("json_object")), "response_format"),
            (format(json!({})), "response_format.type"),
            (format(json!({"type": "xml"})), "response_format.type"),
            (format(json!({"type": "json_object", "colour": 1})), "response_format.colour"),
            (format(json!({"type": "json_schema"})), "response_format.json_schema"),
            (named(json!({"schema": {}})), "response_format.json_schema.name"),
            (named(json!({"name": "a b", "schema": {}})), "response_format.json_schema.name"),
            (named(json!({"name": "a", "schema": 3})), "response_format.json_schema.schema"),
            (named(json!({"name": "a", "strict": 1})), "response_format.json_schema.strict"),
            (named(json!({"name": "a", "other": 1})), "response_format.json_schema.other"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_json": 3}), "guided_json"),
            (json!({"guided_regex": 3}), "guided_regex"),
            (json!({"guided_regex": ""}), "guided_regex"),
            (json!({"guided_regex": "x".repeat(300_000)}), "guided_regex"),
            (json!({"guided_choice": "yes"}), "guided_choice"),
            (json!({"guided_choice": []}), "guided_choice"),
            (json!({"guided_choice": ["yes", ""]}), "guided_choice"),
            (json!({"guided_choice": ["yes", 3]}), "guided_choice"),
            (json!({"guided_grammar": ["yes"]}), "guided_grammar"),
            (json!({"guided_regex": "a", "guided_choice": ["a"]}), "guided_choice"),
            (json!({"structured_outputs": {"regex": "a", "choice": ["a"]}}), "structured_outputs"),
            (json!({"structured_outputs": {"xml": "a"}}), "structured_outputs.xml"),
            (json!({"structured_outputs": {"regex": 3}}), "structured_outputs.regex"),
        ];
        for (body, param) in table {
            match read(body.clone()) {
                Err(Error::Invalid { param: Some(got), message }) => {
                    assert_eq!(got, param, "{body}: {message}");
                    assert!(message.contains(param), "{body}: {message}");
                }
                Err(other) => panic!("{body}: {other:?}"),
                Ok(_) => panic!("{body} was taken"),
            }
        }
    }
}

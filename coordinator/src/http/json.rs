//! A body as JSON: bounded in depth, no key twice, nothing after it.
//!
//! serde_json alone takes the last of two equal keys, so that two readers of one body may see
//! different requests.

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// serde_json's own bound on recursion is 128; ours must come first.
pub const MAX_DEPTH: usize = 120;

/// Parses an object.
///
/// # Errors
/// In words for whoever sent it: not JSON, too deep, a key twice, or no object.
pub fn parse_object(bytes: &[u8], max_depth: usize) -> Result<Map<String, Value>, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let seed = Bounded { depth_left: max_depth.min(MAX_DEPTH) };
    let value = seed
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|e| format!("the body is not valid JSON: {e}"))?;
    match value {
        Value::Object(map) => Ok(map),
        other => Err(format!("the body must be a JSON object, not {}", kind(&other))),
    }
}

/// What a value is, with its article.
#[must_use]
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_f64() => "a number with a fraction",
        Value::Number(_) => "an integer",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[derive(Clone, Copy)]
struct Bounded {
    depth_left: usize,
}

impl Bounded {
    fn inner<E: serde::de::Error>(self) -> Result<Self, E> {
        match self.depth_left.checked_sub(1) {
            Some(depth_left) => Ok(Self { depth_left }),
            None => Err(E::custom("nested too deep")),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Bounded {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        let number = Number::from_f64(value).ok_or_else(|| E::custom("a number out of range"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(inner)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let value = access.next_value_seed(inner)?;
            if map.contains_key(&key) {
                return Err(A::Error::custom("an object has the same key twice"));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_request_is_refused_in_words() {
        let deep = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n)).into_bytes();
        let table: &[(&[u8], &str)] = &[
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b"{} x", "trailing"),
            (b"[]", "not an array"),
            (b"3", "not an integer"),
            (b"\"x\"", "not a string"),
            (b"null", "not null"),
            (b"{\"a\":NaN}", "not valid JSON"),
            (b"{\"a\":1e999}", "out of range"),
            (b"{\"a\":-1e999}", "out of range"),
            (b"{\"a\":1,\"a\":2}", "same key twice"),
            (b"{\"a\":[{\"b\":1,\"b\":1}]}", "same key twice"),
            (b"{\"a\":\"\xff\"}", "not valid JSON"),
            (b"{\"a\":\"\\ud800\"}", "not valid JSON"),
            (&deep(9), "nested too deep"),
            (&deep(100_000), "nested too deep"),
        ];
        for (body, expect) in table {
            let error = parse_object(body, 9).unwrap_err();
            assert!(error.contains(expect), "{expect} is not in {error}");
        }
    }

    #[test]
    fn what_is_within_the_bounds_is_what_serde_json_reads() {
        let bodies = [
            r#"{}"#,
            r#"{"a":[[[[[[[[1]]]]]]]]}"#,
            r#"{"n":9223372036854775807,"f":0.5,"e":-0.0,"t":true,"z":null,"s":"é😀\n"}"#,
        ];
        for body in bodies {
            let map = parse_object(body.as_bytes(), 9).unwrap();
            assert_eq!(Value::Object(map), serde_json::from_str::<Value>(body).unwrap());
        }
    }
}

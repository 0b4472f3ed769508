//! Checked reading of an object's fields: each is taken by name, what is left over is refused.
//!
//! Null means absent, as in OpenAI's API. Every refusal names the field and what would be allowed.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::Error;
use super::json::kind;

/// An object being read.
pub struct Fields {
    /// Of this object within the body, empty for the body itself: `messages[0]`.
    path: String,
    map: Map<String, Value>,
}

impl Fields {
    #[must_use]
    pub fn new(path: impl Into<String>, map: Map<String, Value>) -> Self {
        Self { path: path.into(), map }
    }

    /// The name of a field within the body.
    #[must_use]
    pub fn name(&self, field: &str) -> String {
        if self.path.is_empty() { field.to_owned() } else { format!("{}.{field}", self.path) }
    }

    /// A field as it is; none if absent or null.
    pub fn take(&mut self, field: &str) -> Option<Value> {
        self.map.shift_remove(field).filter(|value| !value.is_null())
    }

    /// # Errors
    /// Not a boolean.
    pub fn boolean(&mut self, field: &str) -> Result<Option<bool>, Error> {
        match self.take(field) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(self.refuse(field, &other, "true or false")),
        }
    }

    /// # Errors
    /// Not an integer, or out of the range.
    pub fn integer(
        &mut self,
        field: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, Error> {
        let Some(value) = self.take(field) else {
            return Ok(None);
        };
        let allowed = || match (*range.start(), *range.end()) {
            (i64::MIN, i64::MAX) => "an integer of 64 bits".to_owned(),
            (start, i64::MAX) => format!("an integer of at least {start}"),
            (start, end) => format!("an integer from {start} to {end}"),
        };
        match value.as_i64() {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            Some(n) => Err(self.out_of_range(field, &n, &allowed())),
            None if value.is_u64() => Err(self.out_of_range(field, &value, &allowed())),
            None => Err(self.refuse(field, &value, &allowed())),
        }
    }

    /// # Errors
    /// Not a number, or out of the range.
    pub fn number(
        &mut self,
        field: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, Error> {
        let Some(value) = self.take(field) else {
            return Ok(None);
        };
        let allowed = format!("a number from {} to {}", range.start(), range.end());
        match value.as_f64() {
            Some(x) if range.contains(&x) => Ok(Some(x)),
            Some(x) => Err(self.out_of_range(field, &x, &allowed)),
            None => Err(self.refuse(field, &value, &allowed)),
        }
    }

    /// # Errors
    /// Not a string, longer than `max_chars`, or with control characters.
    pub fn label(&mut self, field: &str, max_chars: usize) -> Result<Option<String>, Error> {
        let allowed = format!("a string of at most {max_chars} characters, none of them a control");
        match self.take(field) {
            None => Ok(None),
            Some(Value::String(text)) => {
                if text.chars().count() > max_chars || text.chars().any(char::is_control) {
                    let name = self.name(field);
                    return Err(Error::field(&name, format!("`{name}` must be {allowed}")));
                }
                Ok(Some(text))
            }
            Some(other) => Err(self.refuse(field, &other, &allowed)),
        }
    }

    /// A field that is known but does nothing here: only the values that ask for nothing are taken.
    ///
    /// # Errors
    /// Any other value.
    pub fn inert(&mut self, field: &str, allowed: &[Value]) -> Result<(), Error> {
        let Some(value) = self.take(field) else {
            return Ok(());
        };
        let same = |a: &Value, b: &Value| a == b || (a.is_number() && a.as_f64() == b.as_f64());
        if allowed.iter().any(|a| same(a, &value)) {
            return Ok(());
        }
        let name = self.name(field);
        let mut words: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        words.push("leaving it out".to_owned());
        let words = words.join(" or ");
        Err(Error::field(&name, format!("`{name}` is not supported; allowed is {words}")))
    }

    /// # Errors
    /// A field that nobody took.
    pub fn finish(self, known: &[&str]) -> Result<(), Error> {
        let Some((field, _)) = self.map.iter().find(|(_, value)| !value.is_null()) else {
            return Ok(());
        };
        // A name is the sender's text: shown short and escaped.
        let shown: String = field.chars().take(64).flat_map(char::escape_default).collect();
        let name = self.name(&shown);
        let known = known.join(", ");
        Err(Error::field(&name, format!("`{name}` is not known; known are {known}")))
    }

    fn refuse(&self, field: &str, got: &Value, allowed: &str) -> Error {
        let name = self.name(field);
        Error::field(&name, format!("`{name}` must be {allowed}, not {}", kind(got)))
    }

    fn out_of_range(&self, field: &str, got: &dyn Display, allowed: &str) -> Error {
        let name = self.name(field);
        Error::field(&name, format!("`{name}` must be {allowed}; {got} is out of range"))
    }
}

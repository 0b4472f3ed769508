//! What chat and completions have in common in a request: sampling, length, streaming, and what is
//! refused.
//!
//! Bounds are those of OpenAI's specification, or tighter. A field of the specification that is not
//! implemented is refused by name, never ignored; one that asks for nothing (`"tools": []`) is
//! taken.

use std::sync::Arc;

use serde_json::{Value, json};

use super::error::Error;
use super::fields::Fields;
use super::json::kind;
use crate::group::stream::MAX_PRIORITY;

/// Longest stop string, in characters.
const MAX_STOP_CHARS: usize = 1000;
const MAX_STOPS: usize = 4;
const MAX_N: i64 = 128;
/// Longest `user` and the like, in characters.
const MAX_LABEL_CHARS: usize = 512;

/// The common fields, each within its bounds.
#[derive(Clone)]
pub struct Common {
    pub model: String,
    pub n: u32,
    pub stream: bool,
    pub include_usage: bool,
    pub stop: Arc<[String]>,
    pub seed: Option<u64>,
    pub temperature: f32,
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// Empty: nobody in particular.
    pub user: String,
    /// Sets a part of what is cached apart from the rest. vLLM's.
    pub cache_salt: String,
    /// Lower is sooner. vLLM's, but for its bounds.
    pub priority: i32,
}

/// Names of the fields that [`Common::take`] reads, for "known are".
pub const KNOWN: [&str; 23] = [
    "model",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "logprobs",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_p",
    "logit_bias",
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "store",
    "priority",
    "cache_salt",
];

impl Common {
    /// # Errors
    /// The first field that is out of its bounds.
    pub fn take(fields: &mut Fields) -> Result<Self, Error> {
        let model = model(fields)?;
        let n = fields.integer("n", 1..=MAX_N)?.unwrap_or(1);
        let stream = fields.boolean("stream")?.unwrap_or(false);
        let include_usage = stream_options(fields, stream)?;
        let stop = stop(fields)?;
        let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
        let temperature = fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0);
        let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
        // -1 is how some servers spell "off".
        let top_k = fields.integer("top_k", -1..=i64::from(i32::MAX))?.unwrap_or(0);
        let user = fields.label("user", MAX_LABEL_CHARS)?.unwrap_or_default();
        let cache_salt = fields.label("cache_salt", MAX_LABEL_CHARS)?.unwrap_or_default();
        let most = i64::from(MAX_PRIORITY);
        let priority = fields.integer("priority", -most..=most)?.unwrap_or(0);
        accept_labels(fields)?;
        refuse_unimplemented(fields)?;
        Ok(Self {
            model,
            n: u32::try_from(n).unwrap_or(1),
            stream,
            include_usage,
            stop,
            seed: seed.map(|seed| seed as u64), // all 64 bits: negative seeds are seeds too
            temperature: temperature as f32,
            top_p: top_p as f32,
            top_k: u32::try_from(top_k).unwrap_or(0),
            user,
            cache_salt,
            priority: i32::try_from(priority).unwrap_or(0),
        })
    }
}

fn model(fields: &mut Fields) -> Result<String, Error> {
    match fields.take("model") {
        Some(Value::String(model)) => Ok(model),
        Some(other) => {
            let message = format!("`model` must be the name of a model, not {}", kind(&other));
            Err(Error::field("model", message))
        }
        None => {
            let message = "`model` is missing; GET /v1/models lists the names";
            Err(Error::field("model", message))
        }
    }
}

fn stream_options(fields: &mut Fields, stream: bool) -> Result<bool, Error> {
    match fields.take("stream_options") {
        None => Ok(false),
        Some(_) if !stream => {
            let message = "`stream_options` is allowed only with `\"stream\": true`";
            Err(Error::field("stream_options", message))
        }
        Some(Value::Object(map)) => {
            let mut options = Fields::new("stream_options", map);
            let include_usage = options.boolean("include_usage")?.unwrap_or(false);
            options.inert("include_obfuscation", &[json!(false)])?;
            options.finish(&["include_usage", "include_obfuscation"])?;
            Ok(include_usage)
        }
        Some(other) => {
            let message = format!("`stream_options` must be an object, not {}", kind(&other));
            Err(Error::field("stream_options", message))
        }
    }
}

fn stop(fields: &mut Fields) -> Result<Arc<[String]>, Error> {
    let refuse = |message: String| {
        let allowed = format!(
            "`stop` must be one string or 1 to {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} \
             characters; {message}"
        );
        Error::field("stop", allowed)
    };
    let items = match fields.take("stop") {
        None => return Ok(Arc::from([])),
        Some(Value::Array(items)) if items.is_empty() || items.len() > MAX_STOPS => {
            return Err(refuse(format!("there are {}", items.len())));
        }
        Some(Value::Array(items)) => items,
        Some(one @ Value::String(_)) => vec![one],
        Some(other) => return Err(refuse(format!("it is {}", kind(&other)))),
    };
    let mut stops = Vec::with_capacity(items.len());
    for (idx, item) in items.into_iter().enumerate() {
        match item {
            Value::String(text) => match text.chars().count() {
                1..=MAX_STOP_CHARS => stops.push(text),
                n => return Err(refuse(format!("number {idx} has {n}"))),
            },
            other => return Err(refuse(format!("number {idx} is {}", kind(&other)))),
        }
    }
    Ok(stops.into())
}

/// Fields that say something about the request, not about the answer.
fn accept_labels(fields: &mut Fields) -> Result<(), Error> {
    fields.label("safety_identifier", MAX_LABEL_CHARS)?;
    fields.label("prompt_cache_key", MAX_LABEL_CHARS)?;
    fields.inert("store", &[json!(false)])?;
    fields.inert("service_tier", &[json!("auto"), json!("default")])?;
    let allowed = "`metadata` must be an object of at most 16 strings of at most 512 characters \
                   under keys of at most 64";
    match fields.take("metadata") {
        None => Ok(()),
        Some(Value::Object(map)) => {
            let fits = |(key, value): (&String, &Value)| {
                let short = value.as_str().is_some_and(|text| text.chars().count() <= 512);
                short && key.chars().count() <= 64
            };
            if map.len() <= 16 && map.iter().all(fits) {
                Ok(())
            } else {
                Err(Error::field("metadata", allowed))
            }
        }
        Some(_) => Err(Error::field("metadata", allowed)),
    }
}

fn refuse_unimplemented(fields: &mut Fields) -> Result<(), Error> {
    fields.inert("frequency_penalty", &[json!(0)])?;
    fields.inert("presence_penalty", &[json!(0)])?;
    fields.inert("repetition_penalty", &[json!(1)])?;
    fields.inert("min_p", &[json!(0)])?;
    fields.inert("logit_bias", &[json!({})])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn take(body: Value) -> Result<Common, Error> {
        let Value::Object(mut map) = body else { panic!("a test's body is an object") };
        map.entry("model").or_insert(json!("m"));
        let mut fields = Fields::new("", map);
        let common = Common::take(&mut fields)?;
        fields.finish(&KNOWN)?;
        Ok(common)
    }

    #[test]
    fn a_field_out_of_its_bounds_is_named() {
        let table = [
            (json!({"n": 0}), "n"),
            (json!({"n": -1}), "n"),
            (json!({"n": 129}), "n"),
            (json!({"n": 1_000_000_000}), "n"),
            (json!({"n": 1.5}), "n"),
            (json!({"n": "1"}), "n"),
            (json!({"n": u64::MAX}), "n"),
            (json!({"n": true}), "n"),
            (json!({"seed": 9_223_372_036_854_775_808u64}), "seed"),
            (json!({"seed": 1e20}), "seed"),
            (json!({"seed": "7"}), "seed"),
            (json!({"temperature": -1}), "temperature"),
            (json!({"temperature": 1000}), "temperature"),
            (json!({"temperature": 1e38}), "temperature"),
            (json!({"temperature": "0.5"}), "temperature"),
            (json!({"top_p": 1.01}), "top_p"),
            (json!({"top_p": -0.1}), "top_p"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"top_k": 2_147_483_648u64}), "top_k"),
            (json!({"stop": ["a", "b", "c", "d", "e"]}), "stop"),
            (json!({"stop": []}), "stop"),
            (json!({"stop": ""}), "stop"),
            (json!({"stop": ["a", ""]}), "stop"),
            (json!({"stop": 3}), "stop"),
            (json!({"stop": ["a", 3]}), "stop"),
            (json!({"stop": "x".repeat(1_000_000)}), "stop"),
            (json!({"stream": 1}), "stream"),
            (json!({"stream_options": {"include_usage": true}}), "stream_options"),
            (json!({"stream": true, "stream_options": 3}), "stream_options"),
            (
                json!({"stream": true, "stream_options": {"include_usage": 1}}),
                "stream_options.include_usage",
            ),
            (
                json!({"stream": true, "stream_options": {"continuous_usage_stats": true}}),
                "stream_options.continuous_usage_stats",
            ),
            (json!({"model": 3}), "model"),
            (json!({"model": null}), "model"),
            (json!({"presence_penalty": 0.5}), "presence_penalty"),
            (json!({"frequency_penalty": -2}), "frequency_penalty"),
            (json!({"logit_bias": {"1": 2}}), "logit_bias"),
            (json!({"repetition_penalty": 1.1}), "repetition_penalty"),
            (json!({"store": true}), "store"),
            (json!({"user": "a\nb"}), "user"),
            (json!({"user": 3}), "user"),
            (json!({"cache_salt": "a\u{0}b"}), "cache_salt"),
            (json!({"cache_salt": "x".repeat(513)}), "cache_salt"),
            (json!({"priority": 101}), "priority"),
            (json!({"priority": -101}), "priority"),
            (json!({"priority": 0.5}), "priority"),
            (json!({"metadata": {"a": 3}}), "metadata"),
            (json!({"surprise": 3}), "surprise"),
            (json!({"evil\nname": 3}), "evil\\nname"),
        ];
        for (body, param) in table {
            match take(body.clone()) {
                Err(Error::Invalid { param: Some(got), message }) => {
                    assert_eq!(got, param, "{body}: {message}");
                    assert!(message.contains(param), "{body}: {message}");
                }
                Err(other) => panic!("{body}: {other:?}"),
                Ok(_) => panic!("{body} was taken"),
            }
        }
    }

    #[test]
    fn the_edges_and_the_harmless_are_taken() {
        let bodies = [
            json!({}),
            json!({"n": 1}),
            json!({"n": 128}),
            json!({"temperature": 0, "top_p": 0, "top_k": -1}),
            json!({"temperature": -0.0}),
            json!({"temperature": 2.0, "top_p": 1, "seed": i64::MIN}),
            json!({"seed": i64::MAX, "stop": "a"}),
            json!({"stop": ["a", "b", "c", "d"], "n": null, "surprise": null}),
            json!({"stream": true, "stream_options": {"include_usage": true}}),
            json!({"stream": true, "stream_options": {"include_obfuscation": false}}),
            json!({"user": "u", "metadata": {"k": "v"}, "store": false, "service_tier": "auto"}),
            json!({"priority": -100, "cache_salt": "s"}),
            json!({"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}),
        ];
        for body in bodies {
            if let Err(error) = take(body.clone()) {
                panic!("{body}: {error}");
            }
        }
        assert_eq!(take(json!({"seed": -1})).unwrap().seed, Some(u64::MAX));
    }
}

//! What chat and completions have in common in a request: how many answers, streaming, labels, and
//! (in decoding.rs) how tokens are chosen.
//!
//! Bounds are those of OpenAI's specification, or tighter. A field of the specification that is not
//! implemented is refused by name, never ignored; one that asks for nothing (`"tools": []`) is
//! taken.

use serde_json::{Value, json};

use super::decoding;
use super::error::Error;
use super::fields::Fields;
use super::json::kind;
use crate::generation::Decoding;
use crate::group::stream::MAX_PRIORITY;

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
    pub decoding: Decoding,
    /// Empty: nobody in particular.
    pub user: String,
    /// Sets a part of what is cached apart from the rest. vLLM's.
    pub cache_salt: String,
    /// Lower is sooner. vLLM's, but for its bounds.
    pub priority: i32,
}

/// Names of the fields that [`Common::take`] reads, for "known are".
pub const KNOWN: [&str; 32] = [
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
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
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
        let decoding = decoding::take(fields)?;
        let user = fields.label("user", MAX_LABEL_CHARS)?.unwrap_or_default();
        let cache_salt = fields.label("cache_salt", MAX_LABEL_CHARS)?.unwrap_or_default();
        let most = i64::from(MAX_PRIORITY);
        let priority = fields.integer("priority", -most..=most)?.unwrap_or(0);
        accept_labels(fields)?;
        Ok(Self {
            model,
            n: u32::try_from(n).unwrap_or(1),
            stream,
            include_usage,
            decoding,
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
            (json!({"presence_penalty": 2.01}), "presence_penalty"),
            (json!({"frequency_penalty": -2.5}), "frequency_penalty"),
            (json!({"frequency_penalty": "1"}), "frequency_penalty"),
            (json!({"repetition_penalty": 0}), "repetition_penalty"),
            (json!({"repetition_penalty": 1e300}), "repetition_penalty"),
            (json!({"min_p": 1.5}), "min_p"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias"),
            (json!({"logit_bias": {"1": "2"}}), "logit_bias"),
            (json!({"logit_bias": {"-1": 2}}), "logit_bias"),
            (json!({"logit_bias": {"1": 2, "01": 3}}), "logit_bias"),
            (json!({"logit_bias": {"hello": 2}}), "logit_bias"),
            (json!({"logit_bias": {"4294967296": 2}}), "logit_bias"),
            (json!({"logit_bias": [[1, 2]]}), "logit_bias"),
            (json!({"stop_token_ids": 3}), "stop_token_ids"),
            (json!({"stop_token_ids": [-3]}), "stop_token_ids"),
            (json!({"stop_token_ids": [1.5]}), "stop_token_ids"),
            (json!({"stop_token_ids": vec![1; 129]}), "stop_token_ids"),
            (json!({"ignore_eos": 1}), "ignore_eos"),
            (json!({"min_tokens": -1}), "min_tokens"),
            (json!({"min_tokens": u64::MAX}), "min_tokens"),
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
            json!({"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.1}),
            json!({"logit_bias": {"1": -100, "2": 100, "3": 0.5}, "min_p": 1}),
            json!({"stop_token_ids": [1, 2], "ignore_eos": true, "min_tokens": 3}),
        ];
        for body in bodies {
            if let Err(error) = take(body.clone()) {
                panic!("{body}: {error}");
            }
        }
        assert_eq!(take(json!({"seed": -1})).unwrap().decoding.seed, Some(u64::MAX));
    }
}

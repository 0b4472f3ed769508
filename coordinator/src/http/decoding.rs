//! How tokens are chosen, off a request: OpenAI's fields, and under vLLM's names those that OpenAI
//! does not have.
//!
//! Bounds are those of OpenAI's specification where it has the field. Whether a token id is one of
//! the model's is seen later, where the model is known.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::error::Error;
use super::fields::Fields;
use super::json::kind;
use super::structure;
use crate::generation::Decoding;

/// Longest stop string, in characters.
const MAX_STOP_CHARS: usize = 1000;
const MAX_STOPS: usize = 4;
const MAX_STOP_TOKENS: usize = 128;
const MAX_BIASED: usize = 1024;
const MAX_BIAS: f64 = 100.0;

/// # Errors
/// The first field that is out of its bounds.
pub fn take(fields: &mut Fields) -> Result<Decoding, Error> {
    let stop = stop(fields)?;
    let seed = fields.integer("seed", i64::MIN..=i64::MAX)?;
    let temperature = fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0);
    let top_p = fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0);
    // -1 is how some servers spell "off".
    let top_k = fields.integer("top_k", -1..=i64::from(i32::MAX))?.unwrap_or(0);
    let min_p = fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0);
    let repetition = fields.number("repetition_penalty", 0.01..=100.0)?.unwrap_or(1.0);
    let presence = fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0);
    let frequency = fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0);
    let min_tokens = fields.integer("min_tokens", 0..=i64::from(i32::MAX))?.unwrap_or(0);
    let ignore_eos = fields.boolean("ignore_eos")?.unwrap_or(false);
    let structure = structure::take(fields)?;
    if ignore_eos && let Some(given) = &structure {
        let field = given.field;
        let message = format!("`ignore_eos` does not go with `{field}`, which says where to end");
        return Err(Error::field("ignore_eos", message));
    }
    Ok(Decoding {
        temperature: temperature as f32,
        top_p: top_p as f32,
        top_k: u32::try_from(top_k).unwrap_or(0),
        min_p: min_p as f32,
        repetition_penalty: repetition as f32,
        presence_penalty: presence as f32,
        frequency_penalty: frequency as f32,
        logit_bias: logit_bias(fields)?,
        seed: seed.map(|seed| seed as u64), // all 64 bits: negative seeds are seeds too
        stop,
        stop_token_ids: stop_token_ids(fields)?,
        ignore_eos,
        min_tokens: u32::try_from(min_tokens).unwrap_or(0),
        structure,
    })
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

fn logit_bias(fields: &mut Fields) -> Result<Vec<(u32, f32)>, Error> {
    let refuse = |message: String| {
        let allowed = format!(
            "`logit_bias` must be an object of at most {MAX_BIASED} token ids, each with a number \
             from -{MAX_BIAS} to {MAX_BIAS}; {message}"
        );
        Error::field("logit_bias", allowed)
    };
    let map = match fields.take("logit_bias") {
        None => return Ok(Vec::new()),
        Some(Value::Object(map)) if map.len() <= MAX_BIASED => map,
        Some(Value::Object(map)) => return Err(refuse(format!("there are {}", map.len()))),
        Some(other) => return Err(refuse(format!("it is {}", kind(&other)))),
    };
    let mut biases = BTreeMap::new();
    for (idx, (id, bias)) in map.into_iter().enumerate() {
        let id = id.parse::<u32>().ok().filter(|parsed| parsed.to_string() == id);
        let id = id.ok_or_else(|| refuse(format!("key number {idx} is no token id")))?;
        match bias.as_f64() {
            Some(x) if x.abs() <= MAX_BIAS => biases.insert(id, x as f32),
            Some(x) => return Err(refuse(format!("that of token {id} is {x}"))),
            None => return Err(refuse(format!("that of token {id} is {}", kind(&bias)))),
        };
    }
    Ok(biases.into_iter().collect())
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, Error> {
    let refuse = |message: String| {
        let allowed = format!(
            "`stop_token_ids` must be an array of at most {MAX_STOP_TOKENS} token ids; {message}"
        );
        Error::field("stop_token_ids", allowed)
    };
    let items = match fields.take("stop_token_ids") {
        None => return Ok(Vec::new()),
        Some(Value::Array(items)) if items.len() <= MAX_STOP_TOKENS => items,
        Some(Value::Array(items)) => return Err(refuse(format!("there are {}", items.len()))),
        Some(other) => return Err(refuse(format!("it is {}", kind(&other)))),
    };
    let id = |(idx, item): (usize, Value)| {
        let id = item.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| refuse(format!("number {idx} is none")))
    };
    items.into_iter().enumerate().map(id).collect()
}

//! A request's sampling off the wire, each number within what the engine can take.

use std::collections::HashSet;
use std::fmt::Display;
use std::ops::RangeInclusive;

use evener_proto::worker as proto;

use crate::engine::grammar::Source;
use crate::engine::sampler::{MAX_LOGPROBS, MAX_TEMPERATURE, Penalties, Sampling};

/// Most tokens with a bias of their own, and most stop tokens.
const MAX_LISTED: usize = 1024;
/// Beyond it a penalty or a bias says no more than never or always.
const MAX_SHIFT: f32 = 1000.0;
const REPETITION: RangeInclusive<f32> = 0.001..=1000.0;

/// # Errors
/// The first number out of its range, for people.
pub fn parse(wire: proto::Sampling, n_prompt: usize) -> Result<Sampling, String> {
    let repetition = match wire.repetition_penalty {
        0.0 => 1.0,
        other => other,
    };
    let shift = -MAX_SHIFT..=MAX_SHIFT;
    within("temperature", &wire.temperature, &(0.0..=MAX_TEMPERATURE))?;
    within("top_p", &wire.top_p, &(0.0..=1.0))?;
    within("min_p", &wire.min_p, &(0.0..=1.0))?;
    within("repetition_penalty", &repetition, &REPETITION)?;
    within("presence_penalty", &wire.presence_penalty, &shift)?;
    within("frequency_penalty", &wire.frequency_penalty, &shift)?;
    within("n_logprobs", &wire.n_logprobs.unwrap_or(0), &(0..=MAX_LOGPROBS))?;
    within("n_resumed", &(wire.n_resumed as usize), &(0..=n_prompt))?;
    within("the number of stop_token_ids", &wire.stop_token_ids.len(), &(0..=MAX_LISTED))?;
    within("the number of logit_bias", &wire.logit_bias.len(), &(0..=MAX_LISTED))?;
    let mut biased = HashSet::new();
    for &proto::LogitBias { id, bias } in &wire.logit_bias {
        within("a logit_bias", &bias, &shift)?;
        if !biased.insert(id) {
            return Err(format!("token {id} has two biases"));
        }
    }
    Ok(Sampling {
        temperature: wire.temperature,
        top_k: wire.top_k,
        top_p: wire.top_p,
        min_p: wire.min_p,
        penalties: Penalties {
            repetition,
            presence: wire.presence_penalty,
            frequency: wire.frequency_penalty,
        },
        logit_bias: wire.logit_bias.into_iter().map(|one| (one.id, one.bias)).collect(),
        seed: wire.seed,
        stop_token_ids: wire.stop_token_ids,
        min_tokens: wire.min_tokens,
        n_resumed: wire.n_resumed,
        grammar: None,
        n_logprobs: wire.n_logprobs,
    })
}

/// What a request's output must be; compile.rs makes a grammar of it.
///
/// # Errors
/// A grammar without a source.
pub fn source(sampling: Option<&mut proto::Sampling>) -> Result<Option<Source>, String> {
    use proto::grammar::Source as Wire;
    let Some(grammar) = sampling.and_then(|sampling| sampling.grammar.take()) else {
        return Ok(None);
    };
    match grammar.source {
        None => Err("a grammar has no source".to_owned()),
        Some(Wire::JsonSchema(text)) => Ok(Some(Source::JsonSchema(text))),
        Some(Wire::Regex(text)) => Ok(Some(Source::Regex(text))),
        Some(Wire::Lark(text)) => Ok(Some(Source::Lark(text))),
    }
}

fn within<T: PartialOrd + Display>(
    what: &str,
    got: &T,
    range: &RangeInclusive<T>,
) -> Result<(), String> {
    if range.contains(got) {
        return Ok(());
    }
    Err(format!("{what} is {got}; it must be from {} to {}", range.start(), range.end()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn wire() -> proto::Sampling {
        proto::Sampling { top_p: 1.0, ..proto::Sampling::default() }
    }

    #[test]
    fn nothing_said_is_greedy_and_edits_nothing() {
        let sampling = parse(wire(), 1).unwrap();
        assert_eq!(sampling, Sampling::default());
        assert!(!sampling.asks());
    }

    #[test]
    fn what_the_engine_cannot_take_is_refused_by_name() {
        let check = |change: fn(&mut proto::Sampling), expect: &str| {
            let mut wire = wire();
            change(&mut wire);
            let error = parse(wire, 5).unwrap_err();
            assert!(error.starts_with(expect), "`{error}` does not say `{expect}`");
        };
        check(|s| s.temperature = -0.5, "temperature is -0.5");
        check(|s| s.temperature = f32::NAN, "temperature is NaN");
        check(|s| s.temperature = 101.0, "temperature is 101");
        check(|s| s.top_p = 1.5, "top_p is 1.5");
        check(|s| s.min_p = -0.1, "min_p is -0.1");
        check(|s| s.repetition_penalty = -1.0, "repetition_penalty is -1");
        check(|s| s.repetition_penalty = f32::INFINITY, "repetition_penalty is inf");
        check(|s| s.presence_penalty = f32::NEG_INFINITY, "presence_penalty is -inf");
        check(|s| s.frequency_penalty = 1001.0, "frequency_penalty is 1001");
        check(|s| s.n_logprobs = Some(21), "n_logprobs is 21");
        check(|s| s.n_resumed = 6, "n_resumed is 6");
        check(|s| s.stop_token_ids = vec![1; 1025], "the number of stop_token_ids is 1025");
        check(|s| s.logit_bias = vec![proto::LogitBias::default(); 2], "token 0 has two biases");
        check(
            |s| s.logit_bias = vec![proto::LogitBias { id: 1, bias: f32::NAN }],
            "a logit_bias is NaN",
        );
    }
}

//! What a client sees: streamed completions through the whole HTTP path.
//!
//! Decode is timed from the first to the last token at temperature 0; the time to the first token
//! has the HTTP path and the prompt in it.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::future::try_join_all;
use serde::Serialize;
use serde_json::json;

use super::report::Spread;
use crate::client::{Client, Event, Sampling};

/// What to ask for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Streams at once, one kind of run each.
    pub concurrency: Vec<usize>,
    /// Of each prompt, about.
    pub prompt_tokens: u32,
    /// Of each answer.
    pub tokens: u32,
    pub runs: u32,
}

/// Streams of one kind.
#[derive(Debug, Clone, Serialize)]
pub struct Streams {
    pub concurrency: usize,
    /// Tokens per second of all streams together.
    pub decode_tok_s: Spread,
    pub time_to_first_token_ms: Spread,
    /// Tokens that were generated in a stream.
    pub tokens: Spread,
    /// Tokens that the prompts turned out to have.
    pub prompt_tokens: Spread,
}

/// Runs each kind of streams, after a run that is not counted.
///
/// # Errors
/// A stream that was refused or cut.
pub async fn measure(
    options: &Options,
    client: &Client,
    model: &str,
) -> anyhow::Result<Vec<Streams>> {
    let mut outcomes = Vec::new();
    for &concurrency in &options.concurrency {
        let (mut rates, mut firsts) = (Vec::new(), Vec::new());
        let (mut counts, mut prompts) = (Vec::new(), Vec::new());
        for run in 0..=options.runs {
            let streams = (0..concurrency).map(|i| stream(options, client, model, i));
            let timings = try_join_all(streams).await?;
            if run == 0 {
                continue;
            }
            rates.push(rate(&timings)?);
            firsts.extend(timings.iter().map(|t| t.to_first.as_secs_f64() * 1e3));
            counts.extend(timings.iter().map(|t| t.tokens as f64));
            prompts.extend(timings.iter().map(|t| t.prompt_tokens as f64));
        }
        outcomes.push(Streams {
            concurrency,
            decode_tok_s: Spread::of(rates),
            time_to_first_token_ms: Spread::of(firsts),
            tokens: Spread::of(counts),
            prompt_tokens: Spread::of(prompts),
        });
    }
    Ok(outcomes)
}

struct Timing {
    to_first: Duration,
    first: Instant,
    last: Instant,
    tokens: u64,
    prompt_tokens: u64,
}

/// One streamed completion.
async fn stream(
    options: &Options,
    client: &Client,
    model: &str,
    nth: usize,
) -> anyhow::Result<Timing> {
    // One word over and over: about one token each, another word for each stream, and a model at
    // temperature 0 goes on with it for as long as it may.
    const WORDS: [&str; 8] = [" la", " ha", " no", " go", " so", " do", " me", " we"];
    let prompt = WORDS[nth % WORDS.len()].repeat(options.prompt_tokens as usize);
    let sampling = Sampling {
        temperature: Some(0.0),
        max_tokens: Some(options.tokens),
        ..Sampling::default()
    };
    let start = Instant::now();
    let mut answer = client.complete(model, &json!(prompt), &sampling).await?;
    let (mut first, mut last, mut tokens, mut prompt_tokens) = (None, start, 0, 0);
    while let Some(events) = answer.next().await? {
        let now = Instant::now();
        for event in events {
            match event {
                Event::Text(_) => {
                    first.get_or_insert(now);
                    last = now;
                }
                Event::Finish(_) => last = now,
                Event::Usage { prompt, completion } => {
                    (prompt_tokens, tokens) = (prompt, completion)
                }
            }
        }
    }
    let first = first.context("a stream brought no token")?;
    Ok(Timing { to_first: first - start, first, last, tokens, prompt_tokens })
}

/// Tokens per second of all streams together, between the first token of any and the last of all.
fn rate(timings: &[Timing]) -> anyhow::Result<f64> {
    let first = timings.iter().map(|t| t.first).min().context("no stream was run")?;
    let last = timings.iter().map(|t| t.last).max().context("no stream was run")?;
    // The first token of each stream comes out of its prompt, not of a decoding step.
    let tokens: u64 = timings.iter().map(|t| t.tokens.saturating_sub(1)).sum();
    if tokens == 0 {
        bail!("the model ended its answers at once; there is nothing to measure");
    }
    Ok(tokens as f64 / (last - first).as_secs_f64().max(1e-9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_token_of_a_stream_is_not_counted_as_decoded() {
        let start = Instant::now();
        let timing = |first, last, tokens| Timing {
            to_first: Duration::ZERO,
            first: start + Duration::from_secs(first),
            last: start + Duration::from_secs(last),
            tokens,
            prompt_tokens: 1,
        };
        assert_eq!(rate(&[timing(1, 3, 11)]).ok(), Some(5.0));
        assert_eq!(rate(&[timing(1, 3, 11), timing(2, 6, 11)]).ok(), Some(4.0));
        assert!(rate(&[timing(1, 1, 1)]).is_err());
    }
}

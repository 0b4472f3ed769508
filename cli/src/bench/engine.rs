//! The engine's own figures: sequences submitted straight to a group's lead, timed by the messages
//! that each step sends.
//!
//! It speaks the same stream a coordinator does, so lengths are exact and no text is involved.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use evener_proto::MAX_MESSAGE_BYTES;
use evener_proto::worker::generate_request::Body;
use evener_proto::worker::worker_client::WorkerClient;
use evener_proto::worker::{GenerateRequest, Sampling, Submit};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::view::View;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Tokens of prompts that a step takes at least, whatever else is in it.
const LEAST_PREFILL: usize = 4;
/// Longest silence of a lead that has work.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);

/// A group's lead.
pub struct Engine {
    lead: WorkerClient<Channel>,
    epoch: u64,
    vocab: u32,
    /// Tokens that a sequence may come to.
    context_length: usize,
    /// So that no two prompts are equal.
    n_prompts: u32,
}

/// What one message said, and when.
#[derive(Debug, Clone, Copy)]
struct Step {
    at: Instant,
    n_tokens: usize,
}

impl Engine {
    /// # Errors
    /// No group is ready, or its lead does not answer.
    pub async fn connect(view: &View, vocab: u32, context_length: usize) -> anyhow::Result<Self> {
        let group = view.groups.iter().find(|group| group.state == "ready");
        let group = group.context("no group is ready")?;
        let lead = group.members.first().context("the group has no lead")?;
        let endpoint = Endpoint::from_shared(format!("http://{}", lead.address))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        let channel = endpoint
            .connect()
            .await
            .with_context(|| format!("the lead does not answer at {}", lead.address))?;
        let lead = WorkerClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
        Ok(Self { lead, epoch: group.epoch, vocab, context_length, n_prompts: 0 })
    }

    /// Time from a prompt of so many tokens to the first token of its answer.
    ///
    /// # Errors
    /// The lead refused it, or failed.
    pub async fn prefill(&mut self, n_tokens: usize) -> anyhow::Result<Duration> {
        let (start, steps) = self.run(1, n_tokens, 1, |_| false).await?;
        Ok(steps.last().context("no token came")?.at - start)
    }

    /// Time of one step in which `n_sequences` each add a token, from `n_steps` of them; each
    /// sequence began with `context` tokens. The first may be well ahead when the last prompt is
    /// read, so they are asked for more tokens than that, and given up once enough was seen.
    ///
    /// # Errors
    /// The lead refused a sequence, failed, or never ran them all at once.
    pub async fn decode(
        &mut self,
        n_sequences: usize,
        context: usize,
        n_steps: usize,
    ) -> anyhow::Result<Duration> {
        let n_ahead = n_sequences * context / LEAST_PREFILL;
        let n_tokens = (n_steps + 1 + n_ahead).min(self.context_length - context);
        let is_enough = |steps: &[Step]| n_full(steps, n_sequences) > n_steps;
        let (_, steps) = self.run(n_sequences, context, n_tokens, is_enough).await?;
        window(&steps, n_sequences).with_context(|| {
            format!("the lead never ran {n_sequences} sequences of {context} tokens at once")
        })
    }

    /// Generates exactly `n_tokens` for each of `n_sequences` prompts, or until enough was seen;
    /// when they were submitted, and what every message brought.
    async fn run(
        &mut self,
        n_sequences: usize,
        prompt: usize,
        n_tokens: usize,
        is_enough: impl Fn(&[Step]) -> bool,
    ) -> anyhow::Result<(Instant, Vec<Step>)> {
        let (requests, receiver) = mpsc::channel(n_sequences);
        let stream = self.lead.generate(ReceiverStream::new(receiver));
        let start = Instant::now();
        for id in 0..n_sequences as u64 {
            requests
                .send(self_submit(
                    self.epoch,
                    self.vocab,
                    &mut self.n_prompts,
                    id,
                    [prompt, n_tokens],
                ))
                .await?;
        }
        let mut outputs = stream.await?.into_inner();
        let (mut steps, mut n_running) = (Vec::new(), n_sequences);
        while n_running > 0 && !is_enough(&steps) {
            let output = tokio::time::timeout(STEP_TIMEOUT, outputs.message()).await;
            let output = output.with_context(|| format!("no step within {STEP_TIMEOUT:?}"))??;
            let output = output.context("the lead ended the stream")?;
            let at = Instant::now();
            let mut n_tokens = 0;
            for event in output.events {
                if let Some(error) = event.error {
                    bail!("the lead refused a sequence: {}", error.message);
                }
                n_tokens += event.tokens.len();
                n_running -= usize::from(event.finish != 0);
            }
            if n_tokens > 0 {
                steps.push(Step { at, n_tokens });
            }
        }
        Ok((start, steps))
    }
}

/// A prompt of ordinary tokens, unlike any before.
fn self_submit(
    epoch: u64,
    vocab: u32,
    n_prompts: &mut u32,
    request_id: u64,
    [prompt, n_tokens]: [usize; 2],
) -> GenerateRequest {
    *n_prompts += 1;
    let seed = n_prompts.wrapping_mul(104_729);
    let token = |i: u32| i.wrapping_mul(7919).wrapping_add(seed) % vocab;
    let submit = Submit {
        request_id,
        prompt: (0..prompt as u32).map(token).collect(),
        sampling: Some(Sampling { temperature: 0.0, top_p: 1.0, ..Sampling::default() }),
        max_tokens: n_tokens as u32,
        prompt_logprobs: false,
        ..Submit::default()
    };
    GenerateRequest { epoch, body: Some(Body::Submit(submit)) }
}

/// Mean time between messages while every sequence got a token in each.
fn window(steps: &[Step], n_sequences: usize) -> Option<Duration> {
    let n = n_full(steps, n_sequences);
    let first = steps.iter().position(|step| step.n_tokens == n_sequences)?;
    let last = first + n - 1;
    (n >= 2).then(|| (steps[last].at - steps[first].at) / (n as u32 - 1))
}

/// Messages in a row, from the first such one on, in which every sequence got a token.
fn n_full(steps: &[Step], n_sequences: usize) -> usize {
    let from_first = steps.iter().skip_while(|step| step.n_tokens != n_sequences);
    from_first.take_while(|step| step.n_tokens == n_sequences).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_steps_that_serve_every_sequence_are_timed() {
        let start = Instant::now();
        let steps: Vec<Step> = [(0, 1), (5, 2), (15, 2), (25, 2), (90, 1)]
            .map(|(ms, n_tokens)| Step { at: start + Duration::from_millis(ms), n_tokens })
            .into();
        assert_eq!(window(&steps, 2), Some(Duration::from_millis(10)));
        assert_eq!(window(&steps, 3), None);
        assert_eq!(window(&steps[..2], 2), None);
    }

    #[test]
    fn prompts_differ_and_stay_in_the_vocabulary() {
        let mut n = 0;
        let mut prompt = || match self_submit(1, 300, &mut n, 0, [20, 1]).body {
            Some(Body::Submit(submit)) => submit.prompt,
            Some(Body::Cancel(_)) | None => Vec::new(),
        };
        let (a, b) = (prompt(), prompt());
        assert_eq!((a.len(), b.len()), (20, 20));
        assert_ne!(a, b);
        assert!(a.iter().chain(&b).all(|&token| token < 300));
    }
}

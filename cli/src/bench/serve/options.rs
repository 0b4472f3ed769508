//! The options of `evener bench serve`, and which of them cannot go together.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use serde_json::Value;

use super::{slo, traffic};

const EXAMPLES: &str = "Examples:
  evener bench serve --concurrency 32 --prompt-tokens 128 --output-tokens 128
  evener bench serve --rate 4 --duration 60s --slo ttft=500ms,itl=100ms --svg latency.svg
  evener bench serve --traffic shared-prefix --prefix-tokens 1000 --prompt-tokens 1100
  evener bench serve --url http://127.0.0.1:8000 --model llama --json run.json

Any endpoint with OpenAI's streamed /v1/completions can be asked. docs/bench.md says what each
figure means.";

/// Most requests of a run.
pub const MAX_REQUESTS: usize = 1_000_000;

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Where the endpoint listens.
    #[arg(long, env = "EVENER_URL", default_value = "http://127.0.0.1:8080")]
    pub url: String,
    /// Name of the model; default: the first that is served.
    #[arg(long, env = "EVENER_CHAT_MODEL")]
    pub model: Option<String>,
    /// Requests at once, a new one as soon as one ends.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub concurrency: usize,
    /// Requests a second at random (Poisson) times instead, whatever runs.
    #[arg(long, value_name = "R")]
    pub rate: Option<f64>,
    /// Requests that are counted; default: 100, or as many as fit into --duration.
    #[arg(long, value_name = "N")]
    pub requests: Option<usize>,
    /// Send no new request after this long, such as 60s; those that run are waited for.
    #[arg(long, value_name = "TIME", value_parser = checked_time)]
    pub duration: Option<String>,
    /// Requests before, which are not counted.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub warm_up: usize,
    /// Tokens of a prompt, about; in a conversation, those that each turn adds.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub prompt_tokens: u32,
    /// Tokens of an answer, exactly: no end-of-text token ends it sooner.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub output_tokens: u32,
    /// What is asked.
    #[arg(long, value_enum, default_value_t = traffic::Kind::Random)]
    pub traffic: traffic::Kind,
    /// Tokens at the beginning of a prompt that all share, with shared-prefix.
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub prefix_tokens: u32,
    /// Requests of a conversation.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub turns: usize,
    /// What answers must be: a JSON schema. It ends them where they are complete, so only one that
    /// is never complete too soon gives them the length asked for.
    #[arg(long, value_name = "SCHEMA", value_parser = checked_schema)]
    pub json_schema: Option<String>,
    /// Beside all this send R other prompts a second at random (Poisson) times, answered with one
    /// token each; they are not counted.
    #[arg(long, value_name = "R")]
    pub beside_rate: Option<f64>,
    /// Tokens of each of those, about.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub beside_tokens: u32,
    /// Of prompts and arrivals; the same seed is the same load.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// What a good request keeps, of ttft, itl, tpot and e2e: ttft=500ms,itl=100ms.
    #[arg(long, value_name = "LIMITS", value_parser = checked_slo)]
    pub slo: Option<String>,
    /// Longest wait for a whole answer, such as 90s.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = checked_time)]
    pub timeout: String,
    /// Write all figures to this file too.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the distributions of TTFT and ITL into this file.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

fn checked_time(text: &str) -> anyhow::Result<String> {
    slo::seconds(text).map(|_| text.to_owned())
}

fn checked_schema(text: &str) -> anyhow::Result<String> {
    let schema: Value = serde_json::from_str(text).context(
        "it is not JSON; the schema itself is wanted, of a file by --json-schema \"$(cat FILE)\"",
    )?;
    if !(schema.is_object() || schema.is_boolean()) {
        bail!("a JSON schema is an object");
    }
    Ok(text.to_owned())
}

fn checked_slo(text: &str) -> anyhow::Result<String> {
    text.parse::<slo::Slo>().map(|_| text.to_owned())
}

impl Options {
    pub fn check(&self) -> anyhow::Result<()> {
        if self.concurrency == 0 || self.prompt_tokens == 0 || self.output_tokens == 0 {
            bail!("--concurrency, --prompt-tokens and --output-tokens must be at least 1");
        }
        if self.beside_tokens == 0 {
            bail!("--beside-tokens must be at least 1");
        }
        if self.requests == Some(0) || self.requests > Some(MAX_REQUESTS) {
            bail!("--requests must be 1 to {MAX_REQUESTS}");
        }
        if self.turns == 0 {
            bail!("--turns must be at least 1");
        }
        for (name, rate) in [("--rate", self.rate), ("--beside-rate", self.beside_rate)] {
            if rate.is_some_and(|rate| !(rate.is_finite() && rate > 0.0)) {
                bail!("{name} must be more than 0 requests a second");
            }
        }
        if self.traffic == traffic::Kind::SharedPrefix && self.prefix_tokens >= self.prompt_tokens {
            bail!(
                "--prefix-tokens {} leaves nothing of --prompt-tokens {}",
                self.prefix_tokens,
                self.prompt_tokens
            );
        }
        Ok(())
    }

    pub fn n_requests(&self) -> usize {
        let unbounded = if self.duration.is_some() { MAX_REQUESTS } else { 100 };
        self.requests.unwrap_or(unbounded)
    }
}

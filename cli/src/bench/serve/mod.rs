//! `evener bench serve`: load on any OpenAI-compatible endpoint, and the field's figures of what it
//! gives. It starts no cluster and knows nothing of one beyond its public API.

mod arrivals;
mod load;
mod options;
mod random;
mod request;
mod slo;
mod statistics;
mod svg;
mod table;
mod traffic;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::Serialize;
use tokio_util::task::AbortOnDropHandle;

use crate::client::Client;
use crate::signals::Signals;
use arrivals::Arrivals;
use load::{Ended, Live, Load};
use options::MAX_REQUESTS;
pub use options::Options;
use random::Random;
use request::Asker;
use slo::Slo;
use statistics::{Outcome, Summary};
use traffic::Traffic;

/// Words of the request that measures how many words make a token.
const N_TRIAL_WORDS: usize = 64;
/// Numbers of the first sessions that are not counted, far from those that are.
const WARM_UP_SESSION: u64 = 1 << 40;
const BESIDE_SESSION: u64 = 1 << 41;

/// A run as `--json` writes it.
#[derive(Debug, Serialize)]
pub struct Report {
    version: &'static str,
    model: String,
    /// In words.
    load: String,
    options: Options,
    summary: Summary,
    /// Prompts sent beside what was measured.
    beside: Option<Ended>,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    options.check()?;
    let slo: Option<Slo> = options.slo.as_deref().map(str::parse).transpose()?;
    let client = Client::new(&options.url)?;
    let model = choose(&client, options.model.as_deref()).await?;
    let timeout = Duration::from_secs_f64(slo::seconds(&options.timeout)?);
    let schema = options.json_schema.as_deref().map(serde_json::from_str).transpose()?;
    let asker = Asker { client, model, n_output: options.output_tokens, schema, timeout };
    let words_per_token = words_per_token(&options, &asker).await?;
    let traffic = traffic(&options, words_per_token);
    let mut signals = Signals::listen()?;
    let load = |n_requests, first_session| Load {
        asker: asker.clone(),
        traffic,
        arrivals: Arrivals::closed(options.concurrency),
        n_requests,
        duration: None,
        first_session,
        live: Arc::default(),
    };
    if options.warm_up > 0 {
        let warm = load(options.warm_up, WARM_UP_SESSION);
        let warm = warm.run(Some("warm-up"), signals.next()).await?;
        if warm.iter().all(|outcome| outcome.result.is_err()) {
            bail!("no request of the warm-up was served; there is nothing to measure");
        }
    }
    let mut measured = load(options.n_requests(), 0);
    if let Some(rate) = options.rate {
        measured.arrivals = Arrivals::open(rate / traffic.n_turns() as f64, options.seed);
    }
    if let Some(duration) = &options.duration {
        measured.duration = Some(Duration::from_secs_f64(slo::seconds(duration)?));
    }
    let beside = beside(&options, &asker, words_per_token);
    let seen = beside.as_ref().map(|beside| beside.live.clone());
    // Ends with what is measured, whatever of it still runs.
    let task = beside.map(|beside| {
        AbortOnDropHandle::new(tokio::spawn(beside.run(None, std::future::pending())))
    });
    let outcomes = measured.run(Some("measuring"), signals.next()).await?;
    drop(task);
    let beside = seen.map(|seen| seen.ended());
    let summary = Summary::of(&outcomes, u64::from(options.output_tokens), slo.as_ref())
        .context("no request ended; there is nothing to show")?;
    let load = match options.rate {
        Some(rate) => format!("{rate} requests/s at random times"),
        None => format!("{} requests at once", options.concurrency),
    };
    let version = env!("CARGO_PKG_VERSION");
    show(&Report { version, model: asker.model, load, options, summary, beside }, &outcomes)
}

/// The prompts that come beside what is measured, if there are any.
fn beside(options: &Options, asker: &Asker, words_per_token: f64) -> Option<Load> {
    let rate = options.beside_rate?;
    let n_words = n_words(options.beside_tokens, words_per_token);
    Some(Load {
        asker: Asker { n_output: 1, schema: None, ..asker.clone() },
        traffic: Traffic { kind: traffic::Kind::Random, n_words, ..traffic(options, 1.0) },
        // Of other times than what is measured.
        arrivals: Arrivals::open(rate, options.seed.wrapping_add(1)),
        n_requests: MAX_REQUESTS,
        duration: None,
        first_session: BESIDE_SESSION,
        live: Arc::<Live>::default(),
    })
}

/// The model named, if it is served, or the first that is.
async fn choose(client: &Client, wanted: Option<&str>) -> anyhow::Result<String> {
    let served = client.models().await?;
    match wanted {
        Some(name) if served.iter().any(|model| model == name) => Ok(name.to_owned()),
        Some(name) => {
            bail!("{} does not serve {name}; it serves {}", client.url(), served.join(", "))
        }
        None => {
            served.into_iter().next().with_context(|| format!("{} serves no model", client.url()))
        }
    }
}

/// How many words make a token is the tokenizer's matter, so one request tells it.
async fn words_per_token(options: &Options, asker: &Asker) -> anyhow::Result<f64> {
    let trial = traffic::words(&mut Random::new(options.seed, WARM_UP_SESSION - 1), N_TRIAL_WORDS);
    let asker = Asker { n_output: 1, schema: None, ..asker.clone() };
    let answer = asker.ask(&trial, |_| {}).await;
    let (served, _) = answer.map_err(|failure| anyhow!(failure.message))?;
    Ok(N_TRIAL_WORDS as f64 / served.n_prompt.max(1) as f64)
}

fn traffic(options: &Options, words_per_token: f64) -> Traffic {
    Traffic {
        kind: options.traffic,
        seed: options.seed,
        n_words: n_words(options.prompt_tokens, words_per_token),
        n_prefix_words: n_words(options.prefix_tokens, words_per_token),
        n_turns: options.turns,
    }
}

fn n_words(n_tokens: u32, words_per_token: f64) -> usize {
    ((f64::from(n_tokens) * words_per_token).round() as usize).max(1)
}

fn show(report: &Report, outcomes: &[Outcome]) -> anyhow::Result<()> {
    print!("{}", table::render(report));
    if let Some(path) = &report.options.json {
        let json = serde_json::to_string_pretty(report)?;
        std::fs::write(path, json + "\n")
            .with_context(|| format!("the figures cannot be written to {}", path.display()))?;
    }
    if let Some(path) = &report.options.svg {
        let served = || outcomes.iter().filter_map(|outcome| outcome.result.as_ref().ok());
        let first: Vec<f64> = served().map(|served| served.ttft).collect();
        let gaps: Vec<f64> = served().flat_map(|served| served.gaps.iter().copied()).collect();
        let title = format!("{}, {}", report.model, report.load);
        let series =
            [("time to first token", "#1f77b4", first), ("between tokens", "#d62728", gaps)];
        let svg = svg::render(&title, &series).context("there is nothing to draw")?;
        std::fs::write(path, svg)
            .with_context(|| format!("the plot cannot be written to {}", path.display()))?;
    }
    if report.summary.served == 0 {
        bail!("no request was served");
    }
    Ok(())
}

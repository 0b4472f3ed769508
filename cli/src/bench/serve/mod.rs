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

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::Serialize;

use crate::client::Client;
use crate::signals::Signals;
use arrivals::Arrivals;
use load::Load;
pub use options::Options;
use random::Random;
use request::Asker;
use slo::Slo;
use statistics::{Outcome, Summary};
use traffic::Traffic;

/// Words of the request that measures how many words make a token.
const N_TRIAL_WORDS: usize = 64;
/// Number of the first session that is not counted, far from those that are.
const WARM_UP_SESSION: u64 = 1 << 40;

/// A run as `--json` writes it.
#[derive(Debug, Serialize)]
pub struct Report {
    version: &'static str,
    model: String,
    /// In words.
    load: String,
    options: Options,
    summary: Summary,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    options.check()?;
    let slo: Option<Slo> = options.slo.as_deref().map(str::parse).transpose()?;
    let client = Client::new(&options.url)?;
    let model = choose(&client, options.model.as_deref()).await?;
    let timeout = Duration::from_secs_f64(slo::seconds(&options.timeout)?);
    let asker = Asker { client, model, n_output: options.output_tokens, timeout };
    let traffic = size(&options, &asker).await?;
    let mut signals = Signals::listen()?;
    let load = |n_requests, first_session| Load {
        asker: asker.clone(),
        traffic,
        arrivals: Arrivals::closed(options.concurrency),
        n_requests,
        duration: None,
        first_session,
    };
    if options.warm_up > 0 {
        let warm = load(options.warm_up, WARM_UP_SESSION).run("warm-up", &mut signals).await?;
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
    let outcomes = measured.run("measuring", &mut signals).await?;
    let summary = Summary::of(&outcomes, u64::from(options.output_tokens), slo.as_ref())
        .context("no request ended; there is nothing to show")?;
    let load = match options.rate {
        Some(rate) => format!("{rate} requests/s at random times"),
        None => format!("{} requests at once", options.concurrency),
    };
    let version = env!("CARGO_PKG_VERSION");
    show(&Report { version, model: asker.model, load, options, summary }, &outcomes)
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

/// How many words the wanted tokens are is the tokenizer's matter, so one request tells it.
async fn size(options: &Options, asker: &Asker) -> anyhow::Result<Traffic> {
    let trial = traffic::words(&mut Random::new(options.seed, WARM_UP_SESSION - 1), N_TRIAL_WORDS);
    let asker = Asker { n_output: 1, ..asker.clone() };
    let (served, _) = asker.ask(&trial).await.map_err(|failure| anyhow!(failure.message))?;
    let per_token = N_TRIAL_WORDS as f64 / served.n_prompt.max(1) as f64;
    let n_words = |tokens: u32| ((f64::from(tokens) * per_token).round() as usize).max(1);
    Ok(Traffic {
        kind: options.traffic,
        seed: options.seed,
        n_words: n_words(options.prompt_tokens),
        n_prefix_words: n_words(options.prefix_tokens),
        n_turns: options.turns,
    })
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

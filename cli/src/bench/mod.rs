//! `evener bench`: how fast a cluster on this machine answers, through the whole HTTP path, and how
//! near that is to what its memory allows.
//!
//! Decoding one stream reads every weight once a token, so tokens per second times weight bytes is
//! the memory traffic that the figure implies.

mod bandwidth;

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use futures::future::try_join_all;
use serde::Serialize;
use serde_json::json;

use crate::client::{Client, Event, Sampling};
use crate::signals::Signals;
use crate::table::Table;
use crate::up::{Cluster, Plan, Progress, Shape, Started};
use crate::view::View;

const EXAMPLES: &str = "Examples:
  evener bench --model model.gguf --workers 2 --threads 1
  evener bench --model model.gguf --shares 2:1 --concurrency 1,4,8 --json

Decode is measured from the first to the last token of a streamed completion at temperature 0;
the time to the first token includes the whole HTTP path and the prompt.";

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// PATH or NAME of a GGUF file; may be repeated.
    #[arg(long, env = "EVENER_MODEL", value_name = "PATH|NAME", value_delimiter = ',')]
    model: Vec<String>,
    /// Shape of a model of random weights, without a file: llama-tiny, llama-1b, llama-8b or
    /// llama-70b; may be repeated.
    #[arg(long, env = "EVENER_SYNTHETIC", value_name = "SHAPE", value_delimiter = ',')]
    synthetic: Vec<String>,
    /// Format of its weights, one or several: f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k,
    /// q5_k, q6_k, or q4_k_m, the mixture of that name.
    #[arg(
        long,
        env = "EVENER_FORMAT",
        value_name = "FORMAT,...",
        value_delimiter = ',',
        default_value = "q4_k_m"
    )]
    format: Vec<String>,
    #[command(flatten)]
    #[serde(flatten)]
    shape: Shape,
    /// Tokens of each prompt, about.
    #[arg(long, env = "EVENER_PROMPT_TOKENS", value_name = "N", default_value_t = 64)]
    prompt_tokens: u32,
    /// Tokens of each answer.
    #[arg(long, env = "EVENER_TOKENS", value_name = "N", default_value_t = 256)]
    tokens: u32,
    /// Measured runs of each kind, after one that is not counted.
    #[arg(long, env = "EVENER_RUNS", value_name = "N", default_value_t = 5)]
    runs: u32,
    /// Streams at once, one kind of run each.
    #[arg(
        long,
        env = "EVENER_CONCURRENCY",
        value_name = "N,...",
        value_delimiter = ',',
        default_value = "1"
    )]
    concurrency: Vec<usize>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// Everything measured.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    shares: Vec<u32>,
    threads_per_worker: usize,
    backend: String,
    /// Bytes of weights over all ranks.
    weight_bytes: u64,
    /// Bytes per second read from memory by one thread, and by as many as the workers have.
    read_bandwidth_1: f64,
    n_threads: usize,
    read_bandwidth_n: f64,
    results: Vec<Outcome>,
}

#[derive(Debug, Serialize)]
struct Outcome {
    concurrency: usize,
    /// Tokens per second of all streams together.
    decode_tok_s: Spread,
    /// Milliseconds.
    time_to_first_token_ms: Spread,
    /// Tokens that were generated in a stream, of those asked for.
    tokens: Spread,
    /// Tokens that the prompts turned out to have.
    prompt_tokens: Spread,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

pub async fn run(options: Options, log: &str) -> anyhow::Result<()> {
    if options.runs == 0 || options.tokens < 2 || options.concurrency.contains(&0) {
        bail!("--runs and --concurrency must be at least 1 and --tokens at least 2");
    }
    let mut signals = Signals::listen()?;
    let n_threads_of = |plan: &Plan| plan.threads * plan.shares.len();
    let any_port = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let mut models = options.model.clone();
    for shape in &options.synthetic {
        models.extend(options.format.iter().map(|format| format!("synthetic:{shape}:{format}")));
    }
    let [model] = models.as_slice() else { bail!("name one model") };
    let plan = Plan::check(model, None, &options.shape, any_port)?;
    let n_threads = n_threads_of(&plan);
    eprintln!("Measuring this machine's memory ...");
    let read_bandwidth_1 = bandwidth::read_bandwidth(1);
    let read_bandwidth_n =
        if n_threads == 1 { read_bandwidth_1 } else { bandwidth::read_bandwidth(n_threads) };

    let mut progress = Progress::new(&plan);
    let mut cluster = match Cluster::start(&plan, log, &mut signals, &mut progress).await? {
        Started::Ready(cluster) => cluster,
        Started::Interrupted => bail!("stopped before anything was measured"),
    };
    progress.finish();
    let measured = tokio::select! {
        measured = measure(&options, &cluster.client, cluster.model.as_str()) => measured,
        () = signals.next() => Err(anyhow::anyhow!("stopped before everything was measured")),
    };
    let status = cluster.client.status().await;
    cluster.stop(&mut signals).await?;
    let (results, view) = (measured?, View::read(&status?)?);
    let report = Report {
        model: plan.name.to_string(),
        shares: plan.shares.clone(),
        threads_per_worker: plan.threads,
        backend: view.workers.first().map_or_else(String::new, |w| w.device.backend.clone()),
        weight_bytes: view.workers.iter().map(|w| w.resident_weight_bytes).sum(),
        read_bandwidth_1,
        n_threads,
        read_bandwidth_n,
        results,
    };
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", render(&report));
    }
    Ok(())
}

async fn measure(options: &Options, client: &Client, model: &str) -> anyhow::Result<Vec<Outcome>> {
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
            eprintln!("{concurrency} at once, run {run}: {:.1} tok/s", rates[rates.len() - 1]);
        }
        outcomes.push(Outcome {
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

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (n, max) = (values.len(), values.last().copied().unwrap_or(0.0));
        Self { median: values[n / 2], min: values[0], max }
    }

    fn show(&self) -> String {
        format!("{:.1} ({:.1} to {:.1})", self.median, self.min, self.max)
    }
}

fn render(report: &Report) -> String {
    let gb = |bytes: f64| format!("{:.1} GB/s", bytes / 1e9);
    let shares: Vec<String> = report.shares.iter().map(u32::to_string).collect();
    let mut out = format!(
        "{}, shares {}, {} thread(s) a worker, backend {}\n\
         memory read: {} with 1 thread, {} with {}\n\n",
        report.model,
        shares.join(":"),
        report.threads_per_worker,
        report.backend,
        gb(report.read_bandwidth_1),
        gb(report.read_bandwidth_n),
        report.n_threads,
    );
    let mut table = Table::new(&[
        "streams",
        "prompt",
        "tokens",
        "first token ms",
        "decode tok/s",
        "weights read",
        "of memory",
    ]);
    for result in &report.results {
        // With several streams a step serves all of them with one read of the weights.
        let steps_s = result.decode_tok_s.median / result.concurrency as f64;
        let bytes_s = steps_s * report.weight_bytes as f64;
        table.row(vec![
            result.concurrency.to_string(),
            format!("{:.0}", result.prompt_tokens.median),
            format!("{:.0}", result.tokens.median),
            result.time_to_first_token_ms.show(),
            result.decode_tok_s.show(),
            gb(bytes_s),
            format!("{:.0} %", 100.0 * bytes_s / report.read_bandwidth_n),
        ]);
    }
    out.push_str(&table.render("nothing was measured"));
    out
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

    #[test]
    fn the_median_stands_between_the_extremes() {
        let spread = Spread::of(vec![3.0, 1.0, 2.0]);
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.0, 3.0));
    }
}

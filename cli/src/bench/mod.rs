//! `evener bench`: how fast models run on this machine in several layouts, each beside what its
//! memory and arithmetic allow at most.
//!
//! Decoding one sequence reads every weight once a token; a prompt multiplies every weight with
//! every token. What the machine reads and multiplies at most is measured in the same run.

mod engine;
mod http;
mod llama_cpp;
mod machine;
mod report;
mod serve;
mod split;
mod subject;
mod svg;
mod tables;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use evener_worker::checkpoint::synthetic;
use evener_worker::measure::Buffer;
use serde::Serialize;

use crate::signals::Signals;
use crate::up::{Cluster, Plan, Progress, Shape, Started};
use crate::view::View;
use engine::Engine;
use llama_cpp::{Pair, Rates};
use machine::Memory;
use report::{Ceilings, Laid, Machine, Model, Report, Settings, Spread, Work};
use split::Split;
use subject::Subject;

const EXAMPLES: &str = "Examples:
  evener bench --synthetic llama-1b --format q4_0,q8_0
  evener bench --model model.gguf --split 1x2,2x1/shm --svg roofline.svg
  evener bench --model model.gguf --shares 2:1 --concurrency 1,4,8 --json
  evener bench --model model.gguf --compare-llama-cpp ~/llama.cpp/llama-bench
  evener bench --kernels
  evener bench serve --concurrency 32     load on a running endpoint

Engine figures come from sequences submitted to the group's lead; those through HTTP from streamed
completions at temperature 0. docs/bench.md says what each figure means.";

/// Sequences that a lead runs at once by default.
const MAX_BATCH: usize = 32;
/// Tokens of a prompt that one step takes by default.
const MAX_PREFILL: usize = 16_384;
/// Tokens that llama-bench generates for one pair.
const PAIR_TOKENS: usize = 64;

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    #[serde(skip)]
    verb: Option<Verb>,
    /// PATH or NAME of a GGUF file; several with commas.
    #[arg(long, env = "EVENER_MODEL", value_name = "PATH|NAME", value_delimiter = ',')]
    model: Vec<String>,
    /// Shape of a model of random weights, without a file: llama-tiny, llama-1b, llama-8b,
    /// llama-70b, mixtral-tiny or mixtral-8x7b, with as many layers as memory holds; several with
    /// commas.
    #[arg(
        long,
        env = "EVENER_SYNTHETIC",
        value_name = "SHAPE",
        value_delimiter = ',',
        value_parser = shape_name
    )]
    synthetic: Vec<String>,
    /// Format of its weights, one or several: f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q4_k,
    /// q5_k, q6_k, or q4_k_m, the mixture of that name.
    #[arg(
        long,
        env = "EVENER_FORMAT",
        value_name = "FORMAT",
        value_delimiter = ',',
        value_parser = format_name,
        default_value = "q4_k_m"
    )]
    format: Vec<String>,
    /// Layers of it; default: all, or as many as memory holds.
    #[arg(long, env = "EVENER_LAYERS", value_name = "N")]
    layers: Option<usize>,
    /// Write the one synthetic model to this GGUF file, and measure that.
    #[arg(long, env = "EVENER_SAVE", value_name = "FILE")]
    save: Option<PathBuf>,
    /// Layouts to measure: RANKSxTHREADS or RANKSxTHREADS/TRANSPORT; default: the one that
    /// --workers, --shares, --threads and --transport describe, or, without them, one rank with
    /// all cores and two ranks over shm and over tcp.
    #[arg(long, env = "EVENER_SPLIT", value_name = "SPLIT", value_delimiter = ',')]
    split: Vec<Split>,
    #[command(flatten)]
    #[serde(flatten)]
    shape: Shape,
    /// Tokens of the prompt whose prefill is timed.
    #[arg(long, env = "EVENER_PREFILL", value_name = "N", default_value_t = 512)]
    prefill: usize,
    /// Sequences at once in each timing of decode.
    #[arg(
        long,
        env = "EVENER_BATCHES",
        value_name = "N",
        value_delimiter = ',',
        default_value = "1,4,8,16,32"
    )]
    batches: Vec<usize>,
    /// Tokens in each sequence's cache when its decode begins.
    #[arg(long, env = "EVENER_CONTEXT", value_name = "N", default_value_t = 16)]
    context: usize,
    /// Steps of decode in one timing.
    #[arg(long, env = "EVENER_STEPS", value_name = "N", default_value_t = 48)]
    steps: usize,
    /// Timings of each kind, after one that is not counted.
    #[arg(long, env = "EVENER_RUNS", value_name = "N", default_value_t = 3)]
    runs: u32,
    /// HTTP streams at once, one kind of run each; default: 1 for files, none for synthetic models.
    #[arg(long, env = "EVENER_CONCURRENCY", value_name = "N", value_delimiter = ',')]
    concurrency: Vec<usize>,
    /// Tokens of the prompt of an HTTP stream, about.
    #[arg(long, env = "EVENER_PROMPT_TOKENS", value_name = "N", default_value_t = 64)]
    prompt_tokens: u32,
    /// Tokens of the answer of an HTTP stream.
    #[arg(long, env = "EVENER_TOKENS", value_name = "N", default_value_t = 128)]
    tokens: u32,
    /// Measure linear layers alone too, in every format.
    #[arg(long, env = "EVENER_KERNELS")]
    kernels: bool,
    /// Run this llama-bench on the same file in turn with ours, and print the ratios.
    #[arg(long, env = "EVENER_COMPARE_LLAMA_CPP", value_name = "PATH_TO_BENCH")]
    compare_llama_cpp: Option<PathBuf>,
    /// Draw a roofline plot into this file.
    #[arg(long, env = "EVENER_SVG", value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Subcommand)]
enum Verb {
    /// Put load on an endpoint and measure what its clients see
    Serve(Box<serve::Options>),
}

/// The effective options as a file that `--config` takes.
pub fn print(options: &Options) -> anyhow::Result<()> {
    match &options.verb {
        Some(Verb::Serve(serve)) => {
            crate::options::print("bench", &std::collections::BTreeMap::from([("serve", serve)]))
        }
        None => crate::options::print("bench", options),
    }
}

fn shape_name(text: &str) -> Result<String, synthetic::Error> {
    text.parse::<synthetic::Shape>().map(|shape| shape.name.to_owned())
}

fn format_name(text: &str) -> Result<String, synthetic::Error> {
    text.parse::<synthetic::Mix>().map(|mix| mix.to_string())
}

pub async fn run(options: Options, log: &str) -> anyhow::Result<()> {
    if let Some(Verb::Serve(options)) = options.verb {
        return serve::run(*options).await;
    }
    options.check()?;
    let subjects = options.subjects()?;
    let splits = options.splits();
    // Refused before minutes are spent on measuring.
    for subject in &subjects {
        for split in &splits {
            options.plan(subject, split)?;
        }
    }
    let mut signals = Signals::listen()?;
    let mut n_threads: Vec<usize> = splits.iter().map(Split::n_threads).chain([1]).collect();
    n_threads.sort_unstable();
    n_threads.dedup();
    let mut report = measure_machine(&options, &n_threads)?;
    for subject in &subjects {
        let mut model = Model {
            model: subject.model.clone(),
            quantization: subject.quantization.clone(),
            note: subject.note.clone(),
            step_bytes: subject.demand.step_bytes,
            weights: subject.demand.layer_weights + subject.demand.head_weights,
            splits: Vec::new(),
        };
        if let Some(note) = &subject.note {
            eprintln!("{}: {note}", subject.model);
        }
        for split in &splits {
            let bench = Bench { options: &options, subject, split, machine: &report.machine };
            model.splits.push(bench.run(log, &mut signals).await?);
        }
        report.models.push(model);
    }
    show(&options, &report)
}

/// All but the models. The buffer is gone before they are loaded, and its pages are theirs.
fn measure_machine(options: &Options, n_threads: &[usize]) -> anyhow::Result<Report> {
    let buffer = Buffer::new();
    let most = n_threads.last().copied().unwrap_or(1);
    let kernels = || machine::kernels(most, &buffer, options.shape.activations.into());
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        settings: Settings {
            kv: options.shape.kv,
            activations: options.shape.activations,
            context: options.context,
            runs: options.runs,
        },
        machine: machine::measure(n_threads, &buffer),
        all_reduce: machine::all_reduce()?,
        kernels: if options.kernels { kernels() } else { Vec::new() },
        models: Vec::new(),
    })
}

fn show(options: &Options, report: &Report) -> anyhow::Result<()> {
    if let Some(path) = &options.svg {
        let svg = svg::render(report).context("there is nothing to draw")?;
        std::fs::write(path, svg)
            .with_context(|| format!("the plot cannot be written to {}", path.display()))?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(report)?);
    } else {
        print!("{}", tables::render(report));
    }
    Ok(())
}

impl Options {
    fn check(&self) -> anyhow::Result<()> {
        if self.runs == 0 || self.tokens < 2 || self.concurrency.contains(&0) {
            bail!("--runs and --concurrency must be at least 1 and --tokens at least 2");
        }
        if self.steps < 2 || self.context == 0 {
            bail!("--steps must be at least 2 and --context at least 1");
        }
        if !(1..=MAX_PREFILL).contains(&self.prefill) {
            bail!("--prefill {} cannot be timed; 1 to {MAX_PREFILL} tokens can", self.prefill);
        }
        if let Some(n) = self.batches.iter().find(|n| !(1..=MAX_BATCH).contains(*n)) {
            bail!("--batches {n} cannot run at once; 1 to {MAX_BATCH} sequences can");
        }
        if self.save.is_some() && (self.synthetic.len(), self.format.len()) != (1, 1) {
            bail!("--save writes one model; name one --synthetic shape and one --format");
        }
        if self.compare_llama_cpp.is_some() && !self.synthetic.is_empty() && self.save.is_none() {
            bail!(
                "--compare-llama-cpp needs a file, and a synthetic model has none; give --save \
                 FILE to make one of it"
            );
        }
        if let Some(program) = &self.compare_llama_cpp
            && program.components().count() > 1
            && !program.is_file()
        {
            bail!("--compare-llama-cpp {}: no such program; name llama-bench", program.display());
        }
        Ok(())
    }

    fn subjects(&self) -> anyhow::Result<Vec<Subject>> {
        if self.kernels && self.model.is_empty() && self.synthetic.is_empty() {
            return Ok(Vec::new());
        }
        let kv = self.shape.kv.into();
        let (models, shapes) = (&self.model, &self.synthetic);
        let mut subjects = subject::all(models, shapes, &self.format, self.layers, kv)?;
        if let (Some(path), Some(subject)) = (&self.save, subjects.last_mut()) {
            subject.save(path.clone())?;
        }
        for subject in &subjects {
            let longest = self.prefill.max(self.context + self.steps + 1) + 1;
            if longest > subject.context_length {
                bail!(
                    "{} takes {} tokens; --prefill or --context and --steps ask for {longest}",
                    subject.model,
                    subject.context_length
                );
            }
        }
        Ok(subjects)
    }

    fn splits(&self) -> Vec<Split> {
        if !self.split.is_empty() {
            return self.split.clone();
        }
        let Shape { workers, shares, threads, transport, .. } = &self.shape;
        let is_standard = workers.is_none()
            && shares.is_none()
            && threads.is_none()
            && *transport == crate::values::Transport::Auto;
        let n_cores = machine::n_cores();
        if is_standard {
            return split::standard(n_cores);
        }
        let shares = match shares {
            Some(shares) => shares.0.clone(),
            None => vec![1; workers.unwrap_or(2)],
        };
        let threads = threads.unwrap_or((n_cores / shares.len().max(1)).max(1));
        vec![Split { shares, threads, transport: *transport }]
    }

    fn plan(&self, subject: &Subject, split: &Split) -> anyhow::Result<Plan> {
        let any_port = SocketAddr::from(([127, 0, 0, 1], 0));
        Plan::check(&subject.model, None, &split.of(&self.shape), any_port)
    }

    fn http(&self, subject: &Subject) -> http::Options {
        let default = if subject.file.is_some() { vec![1] } else { Vec::new() };
        let asked = !self.concurrency.is_empty();
        http::Options {
            concurrency: if asked { self.concurrency.clone() } else { default },
            prompt_tokens: self.prompt_tokens,
            tokens: self.tokens,
            runs: self.runs,
        }
    }
}

/// One model in one layout.
struct Bench<'a> {
    options: &'a Options,
    subject: &'a Subject,
    split: &'a Split,
    machine: &'a Machine,
}

impl Bench<'_> {
    async fn run(&self, log: &str, signals: &mut Signals) -> anyhow::Result<Laid> {
        let plan = self.options.plan(self.subject, self.split)?;
        let mut progress = Progress::new(&plan);
        let start = Instant::now();
        let mut cluster = match Cluster::start(&plan, log, signals, &mut progress).await? {
            Started::Ready(cluster) => cluster,
            Started::Interrupted => bail!("stopped before anything was measured"),
        };
        let ready_s = start.elapsed().as_secs_f64();
        progress.finish();
        let measured = tokio::select! {
            measured = self.measure(&cluster, ready_s) => measured,
            () = signals.next() => Err(anyhow::anyhow!("stopped before all was measured")),
        };
        cluster.stop(signals).await?;
        measured
    }

    async fn measure(&self, cluster: &Cluster, ready_s: f64) -> anyhow::Result<Laid> {
        let (options, subject) = (self.options, self.subject);
        let view = View::read(&cluster.client.status().await?)?;
        let mut engine = Engine::connect(&view, subject.vocab, subject.context_length).await?;
        let work = self.work(&mut engine).await?;
        let model = cluster.model.as_str();
        let http = http::measure(&options.http(subject), &cluster.client, model).await?;
        let llama_cpp = self.pairs(&mut engine).await?;
        let view = View::read(&cluster.client.status().await?)?;
        let members = view.groups.iter().flat_map(|group| &group.members);
        let load_ms = members.filter_map(|member| member.load_ms).filter(|&ms| ms > 0).max();
        let lead = view.groups.iter().find_map(|group| group.members.first());
        let device = view.workers.first().map(|worker| worker.device.backend.clone());
        let backend = lead.and_then(|lead| lead.backend.clone()).or(device);
        Ok(Laid {
            split: self.split.to_string(),
            n_ranks: self.split.shares.len(),
            threads_per_rank: self.split.threads,
            backend: backend.unwrap_or_default(),
            links: lead.map(|lead| lead.links.clone()).unwrap_or_default(),
            resident_weight_bytes: view.workers.iter().map(|w| w.resident_weight_bytes).sum(),
            ready_s,
            load_ms,
            work,
            http,
            llama_cpp,
        })
    }

    fn ceilings(&self) -> anyhow::Result<&Ceilings> {
        self.machine.ceilings(self.split.n_threads()).context("no ceiling was measured")
    }

    async fn work(&self, engine: &mut Engine) -> anyhow::Result<Vec<Work>> {
        let (options, demand, ceilings) = (self.options, &self.subject.demand, self.ceilings()?);
        let memory = Memory::new(self.split.n_threads());
        let mut done = Vec::new();
        engine.prefill(options.prefill).await?;
        let (mut seconds, mut read) = (Vec::new(), Vec::new());
        for _ in 0..options.runs {
            seconds.push(engine.prefill(options.prefill).await?.as_secs_f64());
            read.push(memory.read_now().await);
        }
        let ceilings = |read| ceilings.with_read(Spread::of(read).median);
        done.push(Work::prefill(options.prefill, &seconds, demand, &ceilings(read)));
        self.tell(&done);
        for &n in &options.batches {
            engine.decode(n, options.context, 2).await?;
            let (mut seconds, mut read) = (Vec::new(), Vec::new());
            for _ in 0..options.runs {
                let step = engine.decode(n, options.context, options.steps).await?;
                seconds.push(step.as_secs_f64());
                read.push(memory.read_now().await);
            }
            let context = options.context as f64 + options.steps as f64 / 2.0;
            done.push(Work::decode(n, context, &seconds, demand, &ceilings(read)));
            self.tell(&done);
        }
        Ok(done)
    }

    /// Ours and llama.cpp's in turn, if that is wanted.
    async fn pairs(&self, engine: &mut Engine) -> anyhow::Result<Vec<Pair>> {
        let Some(program) = &self.options.compare_llama_cpp else { return Ok(Vec::new()) };
        let file = self.subject.file.as_ref().context("a synthetic model has no file")?;
        let n_prompt = self.options.prefill;
        let mut pairs = Vec::new();
        for run in 0..self.options.runs {
            engine.prefill(n_prompt).await?;
            let prefill = n_prompt as f64 / engine.prefill(n_prompt).await?.as_secs_f64();
            let step = engine.decode(1, 1, PAIR_TOKENS).await?;
            let ours = Rates { prefill, decode: 1.0 / step.as_secs_f64() };
            let n_threads = self.split.n_threads();
            let theirs = llama_cpp::run(program, file, n_threads, n_prompt, PAIR_TOKENS).await?;
            eprintln!(
                "pair {}: prefill {:.1} and {:.1}, decode {:.1} and {:.1} tok/s",
                run + 1,
                ours.prefill,
                theirs.prefill,
                ours.decode,
                theirs.decode
            );
            pairs.push(Pair { ours, theirs });
        }
        Ok(pairs)
    }

    fn tell(&self, done: &[Work]) {
        if let Some(Work { what, n, tok_s, share, .. }) = done.last() {
            let (split, share) = (self.split, 100.0 * share);
            eprintln!(
                "{split}: {what} {n}: {:.1} tok/s, {share:.0} % of the ceiling",
                tok_s.median
            );
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(args: &[&str]) -> Options {
        Line::try_parse_from(["bench"].iter().chain(args)).unwrap().options
    }

    #[test]
    fn layouts_are_those_asked_for_or_the_standard_ones() {
        let names =
            |args: &[&str]| options(args).splits().iter().map(Split::to_string).collect::<Vec<_>>();
        assert_eq!(names(&[]).len(), 3);
        assert_eq!(names(&["--workers", "2", "--threads", "1"]), ["2x1"]);
        assert_eq!(names(&["--shares", "2:1", "--threads", "3"]), ["2x3 2:1"]);
        assert_eq!(names(&["--split", "1x1,2x1/tcp"]), ["1x1", "2x1/tcp"]);
    }

    #[test]
    fn a_step_reads_the_cache_in_the_format_asked_for() {
        let bytes = |kv| {
            let subjects = options(&["--synthetic", "llama-tiny", "--kv", kv]).subjects().unwrap();
            subjects[0].demand.kv_bytes_per_token
        };
        assert_eq!(bytes("f32"), 2 * bytes("f16"));
        assert!(bytes("int8") < bytes("f16"));
    }

    #[test]
    fn what_cannot_be_measured_is_refused_in_one_sentence() {
        let refused = |args: &[&str]| options(args).check().unwrap_err().to_string();
        assert!(refused(&["--batches", "1,33"]).contains("1 to 32"));
        assert!(refused(&["--steps", "1"]).contains("--steps"));
        assert!(refused(&["--prefill", "0"]).contains("--prefill 0"));
        let compare = ["--synthetic", "llama-1b", "--compare-llama-cpp", "x"];
        assert!(refused(&compare).contains("--save FILE"));
        assert!(refused(&["--compare-llama-cpp", "/no/llama-bench"]).contains("no such program"));
        let save = ["--synthetic", "llama-1b", "--format", "q4_0,q8_0", "--save", "x"];
        assert!(refused(&save).contains("one --format"));
        assert!(
            options(&[]).subjects().unwrap_err().to_string().contains("--synthetic llama-tiny")
        );
        assert!(options(&["--kernels"]).subjects().unwrap().is_empty());
        let long = ["--synthetic", "llama-tiny", "--context", "16384"];
        assert!(options(&long).subjects().unwrap_err().to_string().contains("16384 tokens"));
    }

    #[test]
    fn shapes_and_formats_are_known_names() {
        let refused = |args: &[&str]| {
            Line::try_parse_from(["bench"].iter().chain(args)).unwrap_err().to_string()
        };
        assert!(refused(&["--synthetic", "gpt"]).contains("llama-8b"));
        assert!(refused(&["--synthetic", "llama-1b", "--format", "q3"]).contains("q4_k_m"));
        assert!(refused(&["--split", "2"]).contains("RANKSxTHREADS"));
    }
}

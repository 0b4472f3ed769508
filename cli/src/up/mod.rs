//! `evener up`: a whole cluster on this machine, as child processes of this one.
//!
//! One coordinator and N workers, each this same binary. They end with this process, whatever ends
//! it.

mod cluster;
mod preflight;
mod progress;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use serde_json::json;

pub use cluster::{Cluster, Started};
pub use preflight::{Plan, available_memory};
pub use progress::Progress;

use crate::client::Sampling;
use crate::signals::Signals;
use crate::traces::Tracing;
use crate::values::{
    Activations, Backend, Bytes, Cores, Device, Kv, Registry, Shares, Transport, Weights,
};

const EXAMPLES: &str = "Examples:
  evener up --model model.gguf                              two equal workers
  evener up --model model.gguf --shares 2:1                 two workers, the first holds two thirds
  evener up --model model.gguf --workers 4 --threads 1 --listen 0.0.0.0:8080
  evener up --model model.gguf --registry etcd://127.0.0.1:2379
  evener up --model model.gguf --ask \"What is the capital of France?\" --exit-after-answer

Ctrl-C finishes the requests that run and ends; a second Ctrl-C ends at once.
Talk to the cluster with `evener chat`, look at it with `evener status`.";

/// A cluster on this machine.
#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Shape {
    /// Workers that share the model; default: as many as shares, else 2.
    #[arg(long, env = "EVENER_WORKERS", value_name = "N")]
    pub workers: Option<usize>,
    /// Weights of the workers in the split, such as 2:1; default: equal.
    #[arg(long, env = "EVENER_SHARES", value_name = "A:B")]
    pub shares: Option<Shares>,
    /// Threads of each worker; default: the cores divided by the workers, at least 1.
    #[arg(long, env = "EVENER_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Cores to deal out to the workers' threads, one each: a list such as 0-3, auto (all that this
    /// process may use, if there are enough), or none (the system chooses).
    #[arg(long, env = "EVENER_CORES", value_name = "LIST", default_value = "auto")]
    pub cores: Cores,
    /// Where membership and load stand: embedded (in the coordinator) or
    /// etcd://HOST:PORT,....
    #[arg(long, env = "EVENER_REGISTRY", default_value = "embedded")]
    pub registry: Registry,
    /// What computes.
    #[arg(long, env = "EVENER_BACKEND", value_enum, default_value_t = Backend::Cpu)]
    pub backend: Backend,
    /// What all workers compute on: cpu, cuda:N (they share a card), or auto.
    #[arg(long, env = "EVENER_DEVICE", value_name = "DEVICE", default_value_t = Device::Cpu)]
    pub device: Device,
    /// How the workers exchange partial sums.
    #[arg(long, env = "EVENER_TRANSPORT", value_enum, default_value_t = Transport::Auto)]
    pub transport: Transport,
    /// How keys and values are kept.
    #[arg(long, env = "EVENER_KV", value_enum, default_value_t = Kv::F16)]
    pub kv: Kv,
    /// How finely processors round what they multiply weights with.
    #[arg(long, env = "EVENER_ACTIVATIONS", value_enum, default_value_t = Activations::Int12)]
    pub activations: Activations,
    /// How the model's weights are kept.
    #[arg(long, env = "EVENER_WEIGHTS", value_enum, default_value_t = Weights::Stored)]
    pub weights: Weights,
    /// Draft up to N tokens (at most 8) of an answer from its own text and prompt, and verify them
    /// with its next token, where that is faster; answers stay the same. 0: never.
    #[arg(
        long,
        env = "EVENER_SPECULATE",
        value_name = "N",
        default_value_t = 0,
        value_parser = clap::value_parser!(u8).range(..=8)
    )]
    pub speculate: u8,
    /// Memory each worker may use, such as 2GiB; default: what the machine has left, shared out.
    #[arg(long, env = "EVENER_MEMORY", value_name = "SIZE")]
    pub memory: Option<Bytes>,
    /// Longest wait for the cluster to be ready, in seconds.
    #[arg(long, env = "EVENER_START_TIMEOUT", value_name = "SECONDS", default_value_t = 600)]
    pub start_timeout: u64,
    /// Longest wait for running requests when asked to stop, in seconds.
    #[arg(long, env = "EVENER_DRAIN_TIMEOUT", value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout: u64,
    /// Directory under which each run keeps its logs; default: evener in the system's temporary
    /// directory.
    #[arg(long, env = "EVENER_LOG_DIR", value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// Show every log line of the children here, not only warnings and errors.
    #[arg(short, long, env = "EVENER_VERBOSE")]
    pub verbose: bool,
    #[command(flatten)]
    #[serde(flatten)]
    pub tracing: Tracing,
}

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// PATH of a GGUF file, NAME of one in EVENER_MODELS (directories, separated by colons) or
    /// .cache/models, or a model of random weights: synthetic:SHAPE:FORMAT, or with :LAYERS after it.
    #[arg(long, env = "EVENER_MODEL", value_name = "PATH|NAME")]
    pub model: String,
    /// Name it is served under; default: the file's stem.
    #[arg(long, env = "EVENER_NAME")]
    pub name: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    pub shape: Shape,
    /// Address of the HTTP API; port 0 takes any free one.
    #[arg(long, env = "EVENER_LISTEN", value_name = "ADDR:PORT", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Ask this once the cluster is ready, and stream the answer to standard output.
    #[arg(long, env = "EVENER_ASK", value_name = "QUESTION")]
    pub ask: Option<String>,
    /// End after the answer to --ask; exit status 0 only if a whole answer came.
    #[arg(long, env = "EVENER_EXIT_AFTER_ANSWER", requires = "ask")]
    pub exit_after_answer: bool,
}

/// Most tokens of the answer to `--ask`.
const ASK_MAX_TOKENS: u32 = 128;

pub async fn run(options: Options, log: &str) -> anyhow::Result<()> {
    let mut signals = Signals::listen()?;
    let plan =
        Plan::check(&options.model, options.name.as_deref(), &options.shape, options.listen)?;
    let mut progress = Progress::new(&plan);
    let mut cluster = match Cluster::start(&plan, log, &mut signals, &mut progress).await? {
        Started::Ready(cluster) => cluster,
        Started::Interrupted if options.exit_after_answer => bail!("stopped before an answer came"),
        Started::Interrupted => return Ok(()),
    };
    progress.finish();
    print!("{}", greeting(&cluster));
    std::io::stdout().flush().context("the terminal is gone")?;

    let outcome = serve(&mut cluster, &options, &mut signals).await;
    eprintln!("Stopping: running requests are finished (Ctrl-C again ends at once).");
    let stopped = cluster.stop(&mut signals).await;
    outcome.and(stopped)
}

fn greeting(cluster: &Cluster) -> String {
    let (name, url) = (&cluster.model, cluster.client.url());
    format!(
        "\nServing {name} at {url}/v1\n\n  \
         curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n    \
         -d '{{\"model\": \"{name}\", \
         \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'\n\n"
    )
}

/// Until a signal, or until the answer if that is wanted.
async fn serve(
    cluster: &mut Cluster,
    options: &Options,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let asking = ask(cluster, options.ask.clone());
    tokio::pin!(asking);
    let mut asked = options.ask.is_none();
    if asked {
        eprintln!("Ctrl-C stops it.");
    }
    loop {
        tokio::select! {
            answer = &mut asking, if !asked => {
                asked = true;
                if options.exit_after_answer {
                    return answer;
                }
                if let Err(error) = answer {
                    eprintln!("error: {error:#}");
                }
                eprintln!("Serving until Ctrl-C.");
            }
            supervised = cluster.supervise() => supervised?,
            () = signals.next() => {
                if options.exit_after_answer && !asked {
                    bail!("stopped before the answer was complete");
                }
                return Ok(());
            }
        }
    }
}

/// Streams the answer to standard output.
fn ask(
    cluster: &Cluster,
    question: Option<String>,
) -> impl Future<Output = anyhow::Result<()>> + use<> {
    let (client, model) = (cluster.client.clone(), cluster.model.clone());
    async move {
        let Some(question) = question else { return Ok(()) };
        println!("> {question}");
        let messages = json!([{ "role": "user", "content": question }]);
        let sampling = Sampling {
            temperature: Some(0.0),
            max_tokens: Some(ASK_MAX_TOKENS),
            ..Sampling::default()
        };
        let answer = client.chat(model.as_str(), &messages, &sampling).await?;
        let show = |piece: &str| {
            print!("{piece}");
            // A closed standard output does not make the answer wrong.
            let _ = std::io::stdout().flush();
        };
        let (text, _) = answer.collect(show).await?;
        println!("\n");
        if text.trim().is_empty() {
            bail!("the model answered nothing");
        }
        Ok(())
    }
}

impl Shape {
    pub fn start_timeout(&self) -> Duration {
        Duration::from_secs(self.start_timeout)
    }

    pub fn drain_timeout(&self) -> Duration {
        Duration::from_secs(self.drain_timeout)
    }
}

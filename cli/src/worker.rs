//! `evener worker`: one rank of a group, as one process with one device.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use evener_proto::ids::WorkerId;
use evener_worker::{backend, config, host, registration};
use serde::Serialize;

use crate::models;
use crate::signals;
use crate::traces::{Tracing, finish};
use crate::values::{Backend, Bytes, Cores, Device, Registry, Transport, Weights};

const EXAMPLES: &str = "Examples:
  evener worker --model SmolLM2-135M-Instruct.Q4_1.gguf --registry embedded://127.0.0.1:8081
  evener worker --model llama=/models/llama.gguf --registry etcd://10.0.0.1:2379 \\
      --listen 10.0.0.7:9000 --collective-listen 10.0.0.7:9001 --threads 8

A worker holds model files and waits; the coordinator decides which group it joins and which
part of the model it loads. It stays when the registry or the coordinator goes away.";

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Name of this worker in its cluster; ranks follow the order of names. Default: host name and
    /// process id.
    #[arg(long, env = "EVENER_ID")]
    pub id: Option<String>,
    /// Model it can serve: PATH of a GGUF file, or NAME=PATH; may be repeated. NAME defaults to the
    /// file's stem.
    #[arg(
        long,
        env = "EVENER_MODEL",
        value_name = "[NAME=]PATH",
        required = true,
        value_delimiter = ','
    )]
    pub model: Vec<String>,
    /// Where membership stands: embedded://HOST:PORT of a coordinator, or
    /// etcd://HOST:PORT,....
    #[arg(long, env = "EVENER_REGISTRY", default_value = "embedded://127.0.0.1:8081")]
    pub registry: Registry,
    /// Address at which the coordinator reaches it; port 0 takes any free one.
    #[arg(long, env = "EVENER_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Address at which other ranks reach it; port 0 takes any free one.
    #[arg(long, env = "EVENER_COLLECTIVE_LISTEN", default_value = "127.0.0.1:0")]
    pub collective_listen: SocketAddr,
    /// What computes.
    #[arg(long, env = "EVENER_BACKEND", value_enum, default_value_t = Backend::Cpu)]
    pub backend: Backend,
    /// What it computes on: cpu, cuda:N (a card of the driver's), or auto (the first card, if there
    /// is one). `evener doctor` shows what there is.
    #[arg(long, env = "EVENER_DEVICE", value_name = "DEVICE", default_value_t = Device::Cpu)]
    pub device: Device,
    /// How the weights of its models are kept. All workers of a group must keep them alike.
    #[arg(long, env = "EVENER_WEIGHTS", value_enum, default_value_t = Weights::Stored)]
    pub weights: Weights,
    /// Threads that compute; default: one per core.
    #[arg(long, env = "EVENER_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Cores of the threads, one each: a list such as 0-3, none (the system chooses), or auto (all
    /// cores, if it has a thread for each and is alone in its group on this host).
    #[arg(long, env = "EVENER_CORES", value_name = "LIST", default_value = "auto")]
    pub cores: Cores,
    /// How ranks of one host exchange partial sums.
    #[arg(long, env = "EVENER_TRANSPORT", value_enum, default_value_t = Transport::Auto)]
    pub transport: Transport,
    /// Memory of its KV cache, such as 2GiB; default: what full contexts need, at most a quarter of
    /// what is available.
    #[arg(long, env = "EVENER_KV_MEMORY", value_name = "SIZE")]
    pub kv_memory: Option<Bytes>,
    /// Sequences that run at once; more wait.
    #[arg(long, env = "EVENER_MAX_RUNNING", value_name = "N", default_value_t = 32)]
    pub max_running: usize,
    /// Tokens of one step, over all its sequences.
    #[arg(long, env = "EVENER_MAX_BATCH_TOKENS", value_name = "N", default_value_t = 512)]
    pub max_batch_tokens: usize,
    /// While some read their answers, prompts of others may make a step this many times as long
    /// as it would be without.
    #[arg(long, env = "EVENER_MAX_STRETCH", value_name = "RATIO", default_value_t = 2.0)]
    pub max_stretch: f64,
    /// Draft up to N tokens (at most 8) of an answer from its own text and prompt, and verify them
    /// with its next token, where that is faster; answers stay the same. 0: never. Counts on the
    /// rank that leads.
    #[arg(
        long,
        env = "EVENER_SPECULATE",
        value_name = "N",
        default_value_t = 0,
        value_parser = clap::value_parser!(u8).range(..=8)
    )]
    pub speculate: u8,
    /// Host by which others reach it, where that is not the address it listens on.
    #[arg(long, env = "EVENER_ADVERTISE_HOST", value_name = "HOST")]
    pub advertise_host: Option<String>,
    /// Longest wait for running sequences when asked to stop, in seconds.
    #[arg(long, env = "EVENER_DRAIN_TIMEOUT", value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout: u32,
    #[command(flatten)]
    #[serde(flatten)]
    pub tracing: Tracing,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    let shutdown = signals::shutdown_token()?;
    let tracing = options.tracing.clone();
    let mut options = options.into_worker()?;
    let tracer = tracing.start("evener-worker", options.worker_id.to_string())?;
    options.tracer = tracer.clone();
    let result = evener_worker::run(options, shutdown).await;
    finish(tracer).await;
    Ok(result?)
}

impl Options {
    fn into_worker(self) -> anyhow::Result<config::Options> {
        if self.registry == Registry::Embedded {
            bail!(
                "--registry embedded says nothing to a worker: name the coordinator that holds it, \
                 embedded://HOST:PORT (its --registry-listen)"
            );
        }
        let place = registration::Place::parse(&self.registry.to_string())?;
        let id = match &self.id {
            Some(id) => WorkerId::parse(id)?,
            None => default_id()?,
        };
        let models = self.model.iter().map(|m| held(m)).collect::<anyhow::Result<_>>()?;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let mut options = config::Options::new(id, models);
        options.listen = self.listen;
        options.collective_listen = self.collective_listen;
        options.advertise_host = self.advertise_host;
        options.backend = backend_on(self.backend, self.device)?;
        options.kept = self.weights.into();
        options.threads = self.threads.unwrap_or(cores);
        options.cores = match self.cores {
            Cores::Auto => config::Cores::Auto,
            Cores::None => config::Cores::Anywhere,
            Cores::List(cores) => config::Cores::On(cores),
        };
        options.transport = match self.transport {
            Transport::Auto => config::Transport::Auto,
            Transport::Tcp => config::Transport::Tcp,
            Transport::Shm => config::Transport::Shm,
        };
        options.kv_memory_bytes = self.kv_memory.map(|bytes| bytes.0);
        options.max_running = self.max_running;
        options.max_batch_tokens = self.max_batch_tokens;
        options.max_stretch = self.max_stretch;
        options.max_drafts = self.speculate.into();
        options.registry = Some(registration::Options::at(place));
        options.drain_timeout = Duration::from_secs(self.drain_timeout.into());
        Ok(options)
    }
}

/// Which implementation runs, and on what.
fn backend_on(backend: Backend, device: Device) -> anyhow::Result<backend::Kind> {
    use host::probe::n_cards;
    match (backend, device) {
        (Backend::Cpu, Device::Cpu) => Ok(backend::Kind::Cpu),
        (Backend::Cpu, Device::Auto) => Ok(match n_cards() {
            Ok(1..) => backend::Kind::Cuda(backend::Place::Card(0)),
            Ok(0) | Err(_) => backend::Kind::Cpu,
        }),
        (Backend::Cpu, Device::Cuda(ordinal)) => {
            let n_cards = n_cards().with_context(|| format!("--device cuda:{ordinal}"))?;
            if ordinal >= n_cards {
                return Err(host::probe::Error::NoCard { ordinal, n_cards }.into());
            }
            Ok(backend::Kind::Cuda(backend::Place::Card(ordinal)))
        }
        (Backend::Reference, Device::Cpu | Device::Auto) => Ok(backend::Kind::Reference),
        (Backend::Reference, Device::Cuda(ordinal)) => bail!(
            "--backend reference computes on the processor only; leave out --device cuda:{ordinal}"
        ),
    }
}

/// `NAME=PATH`, or a path or name as everywhere.
fn held(text: &str) -> anyhow::Result<config::Model> {
    let (name, path) = match text.split_once('=') {
        Some((name, path)) if !Path::new(text).is_file() => (Some(name), path),
        _ => (None, text),
    };
    let path = models::resolve(path)?;
    Ok(config::Model { name: models::served_name(&path, name)?, path })
}

/// The host's name, so that people know it again, and the process id, so that a host may run
/// several.
fn default_id() -> anyhow::Result<WorkerId> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host
        .trim()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .take(64)
        .collect();
    let id = format!("{host}-{}", std::process::id());
    WorkerId::parse(&id)
        .with_context(|| format!("`{id}` cannot be this worker's name; give one with --id"))
}

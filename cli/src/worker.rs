//! `evener worker`: one rank of a group, as one process with one device.

use std::net::SocketAddr;

use clap::Args;
use serde::Serialize;

use crate::values::{Backend, Bytes, Registry, Transport};

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
    /// Name of this worker in its cluster; ranks follow the order of names. Default: host name and a random part.
    #[arg(long, env = "EVENER_ID")]
    pub id: Option<String>,
    /// Model it can serve: PATH of a GGUF file, or NAME=PATH; may be repeated. NAME defaults to the file's stem.
    #[arg(
        long,
        env = "EVENER_MODEL",
        value_name = "[NAME=]PATH",
        required = true,
        value_delimiter = ','
    )]
    pub model: Vec<String>,
    /// Where membership stands: embedded://HOST:PORT of a coordinator, or etcd://HOST:PORT[,HOST:PORT].
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
    /// Threads that compute; default: one per core.
    #[arg(long, env = "EVENER_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// How ranks of one host exchange partial sums.
    #[arg(long, env = "EVENER_TRANSPORT", value_enum, default_value_t = Transport::Auto)]
    pub transport: Transport,
    /// Memory it may use for weights and KV cache, such as 2GiB; default: what is available.
    #[arg(long, env = "EVENER_MEMORY", value_name = "SIZE")]
    pub memory: Option<Bytes>,
    /// Longest wait for running sequences when asked to stop, in seconds.
    #[arg(long, env = "EVENER_DRAIN_TIMEOUT", value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout: u32,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    let _ = (options, crate::signals::shutdown_token()?);
    anyhow::bail!("not merged yet")
}

//! `evener coordinator`: the HTTP API, the router and the supervisor of groups, as one process.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use evener_coordinator::cluster::records::Deployment;
use evener_coordinator::{cluster, config, http};
use evener_proto::ids::ModelName;
use serde::Serialize;

use crate::signals;
use crate::traces::{Tracing, finish};
use crate::values::{Activations, Kv, Registry, Shares};

const EXAMPLES: &str = "Examples:
  One coordinator that keeps the registry itself, and a worker that joins it:
    evener coordinator --deploy SmolLM2-135M-Instruct.Q4_1 --group-size 2
    evener worker --model SmolLM2-135M-Instruct.Q4_1.gguf --registry embedded://127.0.0.1:8081

  Coordinators and workers that meet in etcd:
    evener coordinator --registry etcd://10.0.0.1:2379,10.0.0.2:2379 --deploy llama --shares 2:1

`evener up` starts a coordinator and its workers on one machine in one command.";

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// Address of the HTTP API.
    #[arg(long, env = "EVENER_LISTEN", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Where membership and load stand: embedded (in this process) or etcd://HOST:PORT,....
    #[arg(long, env = "EVENER_REGISTRY", default_value = "embedded")]
    pub registry: Registry,
    /// Address at which an embedded registry is offered to workers (their --registry
    /// embedded://ADDRESS).
    #[arg(long, env = "EVENER_REGISTRY_LISTEN", default_value = "127.0.0.1:8081")]
    pub registry_listen: SocketAddr,
    /// Model to serve, by the name its workers hold it under; default: whatever the registry asks
    /// for.
    #[arg(long, env = "EVENER_DEPLOY", value_name = "NAME")]
    pub deploy: Option<String>,
    /// Workers that share the deployed model; default: as many as shares, else all that hold it.
    #[arg(long, env = "EVENER_GROUP_SIZE", value_name = "N", requires = "deploy")]
    pub group_size: Option<u32>,
    /// Weights of the ranks in the split, such as 2:1; default: equal.
    #[arg(long, env = "EVENER_SHARES", value_name = "A:B", requires = "deploy")]
    pub shares: Option<Shares>,
    /// How the groups' workers keep keys and values.
    #[arg(long, env = "EVENER_KV", value_enum, default_value_t = Kv::F16)]
    pub kv: Kv,
    /// How finely processors round what they multiply weights with.
    #[arg(long, env = "EVENER_ACTIVATIONS", value_enum, default_value_t = Activations::Int12)]
    pub activations: Activations,
    /// Let requests of different users share what is cached of equal prompts; one can then tell by
    /// the time an answer takes what others asked.
    #[arg(long, env = "EVENER_SHARE_PREFIXES")]
    pub share_prefixes: bool,
    /// Longest wait for running requests when asked to stop, in seconds.
    #[arg(long, env = "EVENER_DRAIN_TIMEOUT", value_name = "SECONDS", default_value_t = 30)]
    pub drain_timeout: u32,
    #[command(flatten)]
    #[serde(flatten)]
    pub tracing: Tracing,
}

pub async fn run(options: Options) -> anyhow::Result<()> {
    let shutdown = signals::shutdown_token()?;
    let tracing = options.tracing.clone();
    let mut options = options.into_coordinator()?;
    let tracer = tracing.start("evener-coordinator", options.cluster.identity.clone())?;
    options.http.tracer = tracer.clone();
    let result = evener_coordinator::run(options, shutdown).await;
    finish(tracer).await;
    Ok(result?)
}

impl Options {
    fn into_coordinator(self) -> anyhow::Result<config::Options> {
        let place = match self.registry {
            Registry::Embedded => config::Place::Embedded { listen: self.registry_listen },
            Registry::EmbeddedAt(address) => config::Place::Remote { address },
            Registry::Etcd(addresses) => config::Place::Etcd { addresses },
        };
        let mut cluster = cluster::Options::at(place);
        cluster.supervisor.placement.kv_format = self.kv.into();
        cluster.supervisor.placement.activations = self.activations.into();
        if let Some(name) = &self.deploy {
            let shares = self.shares.map(|shares| shares.0).unwrap_or_default();
            let n_shares = u32::try_from(shares.len()).unwrap_or(u32::MAX);
            let world_size = match self.group_size {
                Some(0) => bail!("--group-size 0 asks for no worker; a group needs at least 1"),
                Some(n) if n_shares > 0 && n != n_shares => bail!(
                    "--shares names {n_shares} workers and --group-size asks for {n}; they must \
                     agree"
                ),
                Some(n) => Some(n),
                None => (n_shares > 0).then_some(n_shares),
            };
            let model = ModelName::parse(name)?;
            cluster.deployments = vec![Deployment { model, world_size, shares, replicas: 1 }];
        }
        let drain_timeout = Duration::from_secs(self.drain_timeout.into());
        let http = http::Options {
            drain_timeout,
            share_prefixes: self.share_prefixes,
            ..http::Options::default()
        };
        Ok(config::Options { http_listen: self.listen, http, cluster })
    }
}

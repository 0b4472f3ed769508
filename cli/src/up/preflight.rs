//! What can be known before any process is started: the model opens, the shares split, memory
//! suffices, the port is free.
//!
//! Every refusal says what was asked, what stood against it and what would work.

use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use evener_proto::KvFormat;
use evener_proto::ids::ModelName;
use evener_worker::checkpoint::Checkpoint;
use evener_worker::host;
use evener_worker::model::shard;

use super::Shape;
use crate::models;
use crate::plan;
use crate::ports::{self, Reserved};
use crate::values::{Bytes, Cores, Kv, Registry};

/// Longest wait for one address of etcd.
const ETCD_TIMEOUT: Duration = Duration::from_secs(2);
/// Tokens of KV cache that a worker must at least have room for, over all sequences.
const MIN_KV_TOKENS: u64 = 512;
/// A worker's own needs beside weights and cache: code, buffers, tokenizer, the runtime.
const WORKER_OVERHEAD_BYTES: u64 = 32 << 20;

/// A cluster that can be started.
#[derive(Debug)]
pub struct Plan {
    pub shape: Shape,
    pub model: PathBuf,
    pub name: ModelName,
    /// By rank.
    pub shares: Vec<u32>,
    /// Of each worker.
    pub threads: usize,
    /// Of each worker, as many as threads; none where the system chooses.
    pub cores: Vec<Vec<usize>>,
    /// Of each rank's weights, bytes.
    pub weight_bytes: Vec<u64>,
    /// What `--memory` leaves each rank for its KV cache, bytes; empty where the workers choose.
    pub kv_bytes: Vec<u64>,
    pub http: Reserved,
    /// Where the coordinator offers its embedded registry; none with etcd.
    pub registry: Option<Reserved>,
}

impl Plan {
    /// `model` as people type it; `name` if it is to be served under another than its own.
    pub fn check(
        model: &str,
        name: Option<&str>,
        shape: &Shape,
        listen: SocketAddr,
    ) -> anyhow::Result<Self> {
        let shares = shares(shape)?;
        let threads = threads(shape, shares.len())?;
        let cores = cores(&shape.cores, threads, shares.len())?;
        let model = models::resolve(model)?;
        let name = models::served_name(&model, name)?;
        let checkpoint = Checkpoint::open_and_keep(&model, shape.weights.into());
        let checkpoint = checkpoint.context("the model cannot be served")?;
        let split = shard::split(&checkpoint.config, &shares)?;
        let weight_bytes = (0..shares.len())
            .map(|rank| plan::rank_bytes(&checkpoint, &split, rank, |_| true))
            .collect::<anyhow::Result<Vec<u64>>>()?;
        let kv_bytes = check_memory(shape, &checkpoint, &weight_bytes)?;
        let http = ports::reserve(listen)?;
        let registry = match &shape.registry {
            Registry::Embedded => Some(ports::reserve(SocketAddr::from(([127, 0, 0, 1], 0)))?),
            Registry::Etcd(addresses) => {
                check_etcd(addresses)?;
                None
            }
            Registry::EmbeddedAt(address) => bail!(
                "--registry embedded://{address} is another coordinator's registry, and \
                 `evener up` starts its own coordinator; write embedded, or join that one with `evener worker`"
            ),
        };
        let shape = shape.clone();
        Ok(Self {
            shape,
            model,
            name,
            shares,
            threads,
            cores,
            weight_bytes,
            kv_bytes,
            http,
            registry,
        })
    }
}

fn shares(shape: &Shape) -> anyhow::Result<Vec<u32>> {
    match (&shape.shares, shape.workers) {
        (_, Some(0)) => bail!("--workers 0 asks for no worker; a model needs at least 1"),
        (None, workers) => {
            let n = workers.unwrap_or(2);
            if n > shard::MAX_WORLD_SIZE {
                bail!(
                    "--workers {n} is more than a group can have; at most {}",
                    shard::MAX_WORLD_SIZE
                );
            }
            Ok(vec![1; n])
        }
        (Some(shares), Some(workers)) if shares.0.len() != workers => bail!(
            "--shares {shares} names {} workers and --workers asks for {workers}; write {workers} \
             shares, or leave --workers out",
            shares.0.len()
        ),
        (Some(shares), _) => Ok(shares.0.clone()),
    }
}

fn threads(shape: &Shape, n_workers: usize) -> anyhow::Result<usize> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    match shape.threads {
        Some(0) => bail!("--threads 0 leaves a worker nothing to compute with; write 1 or more"),
        Some(n) if n > 1024 => bail!("--threads {n} is more than a worker can have; at most 1024"),
        Some(n) => Ok(n),
        None => Ok((cores / n_workers).max(1)),
    }
}

/// Deals cores out: disjoint runs, if there is one for each thread.
fn cores(asked: &Cores, threads: usize, n_workers: usize) -> anyhow::Result<Vec<Vec<usize>>> {
    let needed = threads * n_workers;
    let cores = match asked {
        Cores::None => return Ok(Vec::new()),
        Cores::Auto => host::cores(),
        Cores::List(cores) if cores.len() < needed => bail!(
            "--cores {asked} names {} cores and {n_workers} workers with {threads} threads each \
             need {needed}; name more cores, or write none",
            cores.len()
        ),
        Cores::List(cores) => cores.clone(),
    };
    let fits = needed <= cores.len();
    Ok(if fits {
        cores.chunks(threads).take(n_workers).map(<[_]>::to_vec).collect()
    } else {
        Vec::new()
    })
}

/// Whether any member of the etcd cluster answers now. Later it may come and go.
fn check_etcd(addresses: &[String]) -> anyhow::Result<()> {
    let answers = |address: &String| {
        let resolved = address.to_socket_addrs().into_iter().flatten();
        let mut resolved = resolved.take(4);
        resolved.any(|socket| TcpStream::connect_timeout(&socket, ETCD_TIMEOUT).is_ok())
    };
    if addresses.iter().any(answers) {
        return Ok(());
    }
    bail!(
        "no etcd answers at {}; start one there, or leave --registry out to use the embedded \
         registry",
        addresses.join(" or ")
    )
}

/// What each rank may use for its KV cache, if that is bounded.
fn check_memory(
    shape: &Shape,
    checkpoint: &Checkpoint,
    weight_bytes: &[u64],
) -> anyhow::Result<Vec<u64>> {
    let n_ranks = weight_bytes.len() as u64;
    let kv = kv_bytes_per_token(checkpoint, shape.kv) * MIN_KV_TOKENS / n_ranks;
    let needs: Vec<u64> = weight_bytes.iter().map(|w| w + kv + WORKER_OVERHEAD_BYTES).collect();
    if let Some(memory) = shape.memory {
        for (rank, &need) in needs.iter().enumerate() {
            if need > memory.0 {
                bail!(
                    "worker w{rank} may use {memory} and needs at least {}: {} for its part of the \
                     weights, {} for the cache of {MIN_KV_TOKENS} tokens and {} for itself; raise \
                     --memory, add workers, or give this one a smaller share",
                    Bytes(need),
                    Bytes(weight_bytes[rank]),
                    Bytes(kv),
                    Bytes(WORKER_OVERHEAD_BYTES)
                );
            }
        }
    }
    let (need, available) = (needs.iter().sum::<u64>(), available_memory());
    if let Some(available) = available.filter(|&available| need > available) {
        bail!(
            "{n_ranks} workers need at least {} together and this machine has {} available; free \
             some memory, or serve a smaller model",
            Bytes(need),
            Bytes(available)
        );
    }
    let kv_of = |weights: &u64| shape.memory.map(|m| m.0 - weights - WORKER_OVERHEAD_BYTES);
    Ok(weight_bytes.iter().filter_map(kv_of).collect())
}

/// Of the whole model, in the format asked for.
fn kv_bytes_per_token(checkpoint: &Checkpoint, kv: Kv) -> u64 {
    let description = &checkpoint.description;
    let n_heads = description.n_layers * description.n_kv_heads;
    KvFormat::from(kv).bytes_per_token(description.kv_bytes_per_token, n_heads as u64)
}

/// Bytes that new processes can use: the kernel's estimate, within this control group's limit.
pub fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = meminfo.lines().find_map(|line| {
        let kib = line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?;
        kib.trim().parse::<u64>().ok().map(|kib| kib << 10)
    })?;
    let read = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let group = read("memory.max").zip(read("memory.current"));
    Some(group.map_or(machine, |(max, used)| machine.min(max.saturating_sub(used))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_gets_cores_of_its_own_or_none_does() {
        let list = |cores: &[usize]| Cores::List(cores.to_vec());
        let dealt = cores(&list(&[4, 5, 6, 7, 9]), 2, 2).unwrap();
        assert_eq!(dealt, [[4, 5], [6, 7]]);
        assert!(cores(&Cores::None, 1, 1).unwrap().is_empty());
        assert!(cores(&Cores::Auto, 1000, 1000).unwrap().is_empty());
        assert_eq!(cores(&Cores::Auto, 1, 1).unwrap(), [[host::cores()[0]]]);
        let error = cores(&list(&[0, 1]), 1, 3).unwrap_err().to_string();
        assert!(error.contains("need 3"), "{error}");
    }
}

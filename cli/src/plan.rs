//! `evener plan`: how a model would be split, without starting anything.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use clap::Args;
use evener_proto::KvFormat;
use evener_worker::checkpoint::Checkpoint;
use evener_worker::model::program::{Role, Weight};
use evener_worker::model::{families, shard};
use serde::Serialize;

use crate::models;
use crate::table::Table;
use crate::values::{Bytes, Kv, Reads, Shares, Weights};

const EXAMPLES: &str = "Examples:
  evener plan --model model.gguf --shares 2:1
  evener plan --model model.gguf --shares 3:2:2 --ops
  evener plan --model model.gguf --shares 40:1 --reads 4300:50  # a card and a processor";

#[derive(Debug, Clone, Args, Serialize)]
#[serde(rename_all = "kebab-case")]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// PATH of a GGUF file, or NAME of one in EVENER_MODELS (directories, separated by colons) or
    /// .cache/models.
    #[arg(long, env = "EVENER_MODEL", value_name = "PATH|NAME")]
    model: String,
    /// Weights of the workers in the split, such as 2:1.
    #[arg(long, env = "EVENER_SHARES", value_name = "A:B", default_value = "1:1")]
    shares: Shares,
    /// What each worker's memory reads, in GB/s (`evener bench` and `make gpu-bench` measure it): adds how
    /// long a token takes at least.
    #[arg(long, value_name = "GB/S:GB/S")]
    reads: Option<Reads>,
    /// How keys and values are kept.
    #[arg(long, env = "EVENER_KV", value_enum, default_value_t = Kv::F16)]
    kv: Kv,
    /// How the model's weights are kept.
    #[arg(long, env = "EVENER_WEIGHTS", value_enum, default_value_t = Weights::Stored)]
    weights: Weights,
    /// Print the program of rank 0, one op a line.
    #[arg(long)]
    ops: bool,
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let path = models::resolve(&options.model)?;
    let checkpoint = Checkpoint::open_and_keep(&path, options.weights.into());
    let checkpoint = checkpoint.context("the model cannot be served")?;
    let split = shard::split(&checkpoint.config, &options.shares.0)?;
    let costs = options.reads.as_ref().map(|reads| costs(&checkpoint, &split, reads));
    let costs = costs.transpose()?;
    let mut header = vec!["rank", "share", "weights", "kv a token", "shard"];
    header.extend(costs.iter().map(|_| "a token takes"));
    let mut table = Table::new(&header);
    for (rank, shard) in split.shards.iter().enumerate() {
        let mut row = vec![
            rank.to_string(),
            options.shares.0[rank].to_string(),
            Bytes(rank_bytes(&checkpoint, &split, rank, |_| true)?).to_string(),
            Bytes(kv_bytes_per_token(&checkpoint, shard, options.kv)).to_string(),
            shard.describe(),
        ];
        row.extend(costs.iter().map(|costs| milliseconds(costs.seconds[rank])));
        table.row(row);
    }
    println!("{}\n{}", path.display(), table.render("no rank"));
    if let Some(costs) = costs {
        println!("{}", costs.describe());
    }
    if options.ops {
        let program = families::compile(&checkpoint.config, &split, 0);
        for (i, op) in program.ops.iter().enumerate() {
            println!("{i:>4}  {op:?}");
        }
    }
    Ok(())
}

/// What a token of one sequence costs at least: each rank reads its weights once, and all wait for the
/// slowest.
struct Costs {
    /// By rank.
    seconds: Vec<f64>,
    /// The rank that reads the fastest, and how long it would take with all weights.
    alone: (usize, f64),
    /// Shares by which all would take the same time.
    even: Shares,
}

fn costs(checkpoint: &Checkpoint, split: &shard::Split, reads: &Reads) -> anyhow::Result<Costs> {
    let (n, Reads(rates)) = (split.shards.len(), reads);
    let n_rates = rates.len();
    ensure!(
        n_rates == n,
        "the split has {n} workers and --reads speaks of {n_rates}: name one rate for each"
    );
    // Of a table one row is read.
    let is_read = |weight: &Weight| weight.role != Role::Table;
    let bytes: Vec<u64> = (0..n)
        .map(|rank| rank_bytes(checkpoint, split, rank, is_read))
        .collect::<Result<_, _>>()?;
    let seconds = |bytes: u64, rate: f64| bytes as f64 / (rate * 1e9);
    let fastest = (0..n).max_by(|&a, &b| rates[a].total_cmp(&rates[b])).unwrap_or(0);
    let slowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(Costs {
        seconds: bytes.iter().zip(rates).map(|(&bytes, &rate)| seconds(bytes, rate)).collect(),
        alone: (fastest, seconds(bytes.iter().sum(), rates[fastest])),
        even: Shares(rates.iter().map(|rate| (rate / slowest).round() as u32).collect()),
    })
}

impl Costs {
    fn describe(&self) -> String {
        let all = self.seconds.iter().copied().fold(0.0, f64::max);
        let last = self.seconds.iter().position(|&seconds| seconds == all).unwrap_or(0);
        let (fastest, alone) = self.alone;
        let rate = |seconds: f64| format!("{:.0} tokens/s", 1.0 / seconds);
        let mut text = format!(
            "All wait for rank {last}: {} a token, at most {} for one sequence, before sums are exchanged.",
            milliseconds(all),
            rate(all)
        );
        if self.seconds.len() > 1 {
            let than = if alone <= all { "no slower, if it holds the model" } else { "slower" };
            text.push_str(&format!(
                "\nRank {fastest} alone would take {}, {}: {than}. By what they read, shares are {}.",
                milliseconds(alone),
                rate(alone),
                self.even
            ));
        }
        text
    }
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.2} ms", 1e3 * seconds)
}

/// Bytes of a token's keys and values on one rank.
fn kv_bytes_per_token(checkpoint: &Checkpoint, shard: &shard::Shard, kv: Kv) -> u64 {
    let config = &checkpoint.config;
    let n_heads = (config.n_layers * shard.kv_heads.len()) as u64;
    KvFormat::from(kv).bytes_per_token(n_heads * 2 * 2 * config.head_dim as u64, n_heads)
}

/// Bytes of a rank's slices that count, as they are kept.
pub fn rank_bytes(
    checkpoint: &Checkpoint,
    split: &shard::Split,
    rank: usize,
    counts: impl Fn(&Weight) -> bool,
) -> anyhow::Result<u64> {
    let program = families::compile(&checkpoint.config, split, rank);
    let mut seen = BTreeSet::new();
    let mut bytes = 0;
    for weight in program.weights.iter().filter(|weight| counts(weight)) {
        let (rows, columns) = (&weight.rows, &weight.columns);
        // A tied head uses the embedding's rows a second time.
        if !seen.insert((&weight.tensor, rows.start, rows.end, columns.start, columns.end)) {
            continue;
        }
        let slice = checkpoint
            .slice(weight)
            .with_context(|| format!("rank {rank} cannot take its part of {}", weight.tensor))?;
        bytes += slice.n_bytes() as u64;
    }
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn costs_of(shares: &[u32], rates: &[f64]) -> anyhow::Result<Costs> {
        let checkpoint = Checkpoint::open("synthetic:llama-tiny:q8_0".as_ref()).unwrap();
        let split = shard::split(&checkpoint.config, shares).unwrap();
        costs(&checkpoint, &split, &Reads(rates.to_vec()))
    }

    #[test]
    fn a_group_is_as_slow_as_its_slowest_and_says_who_that_is() {
        let even = costs_of(&[1, 1], &[100.0, 100.0]).unwrap();
        assert!((even.seconds[0] / even.seconds[1] - 1.0).abs() < 0.1, "{:?}", even.seconds);
        assert!(even.describe().contains("slower"), "{}", even.describe());
        let mixed = costs_of(&[1, 1], &[4300.0, 50.0]).unwrap();
        assert!(mixed.seconds[1] > 50.0 * mixed.seconds[0]);
        let said = mixed.describe();
        let parts = ["All wait for rank 1", "Rank 0 alone", "no slower", "86:1"];
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    }

    #[test]
    fn a_rate_is_asked_of_every_worker() {
        let error = costs_of(&[1, 1], &[100.0]).err().unwrap().to_string();
        assert!(error.contains("has 2 workers and --reads speaks of 1"), "{error}");
        assert!("4300:0".parse::<Reads>().is_err() && "a".parse::<Reads>().is_err());
    }
}

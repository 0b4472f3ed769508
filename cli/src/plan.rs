//! `evener plan`: how a model would be split, without starting anything.

use std::collections::BTreeSet;

use anyhow::Context;
use clap::Args;
use evener_proto::KvFormat;
use evener_worker::checkpoint::Checkpoint;
use evener_worker::model::{families, shard};
use serde::Serialize;

use crate::models;
use crate::table::Table;
use crate::values::{Bytes, Kv, Shares, Weights};

const EXAMPLES: &str = "Examples:
  evener plan --model model.gguf --shares 2:1
  evener plan --model model.gguf --shares 3:2:2 --ops";

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
    let mut table = Table::new(&["rank", "share", "weights", "kv a token", "shard"]);
    for (rank, shard) in split.shards.iter().enumerate() {
        table.row(vec![
            rank.to_string(),
            options.shares.0[rank].to_string(),
            Bytes(rank_bytes(&checkpoint, &split, rank)?).to_string(),
            Bytes(kv_bytes_per_token(&checkpoint, shard, options.kv)).to_string(),
            shard.describe(),
        ]);
    }
    println!("{}\n{}", path.display(), table.render("no rank"));
    if options.ops {
        let program = families::compile(&checkpoint.config, &split, 0);
        for (i, op) in program.ops.iter().enumerate() {
            println!("{i:>4}  {op:?}");
        }
    }
    Ok(())
}

/// Bytes of a token's keys and values on one rank.
fn kv_bytes_per_token(checkpoint: &Checkpoint, shard: &shard::Shard, kv: Kv) -> u64 {
    let config = &checkpoint.config;
    let n_heads = (config.n_layers * shard.kv_heads.len()) as u64;
    KvFormat::from(kv).bytes_per_token(n_heads * 2 * 2 * config.head_dim as u64, n_heads)
}

/// Bytes of a rank's slices, as they are kept.
pub fn rank_bytes(
    checkpoint: &Checkpoint,
    split: &shard::Split,
    rank: usize,
) -> anyhow::Result<u64> {
    let program = families::compile(&checkpoint.config, split, rank);
    let mut seen = BTreeSet::new();
    let mut bytes = 0;
    for weight in &program.weights {
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

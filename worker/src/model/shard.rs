//! Shares to ranges: which heads, FFN columns and vocabulary rows each rank holds. Pure arithmetic.
//!
//! Any world size, any shares. Cuts fall on leaves of the model's fixed summation trees, so that
//! the split never changes a bit (the trees belong to the model, not to the world size).

use std::ops::Range;

use evener_collective::{ReducePlan, SumTree};

use super::config::ModelConfig;

/// Rows of the head that are cut together: a kernel tile.
const VOCAB_UNIT: usize = 16;

/// Most ranks of one group.
pub const MAX_WORLD_SIZE: usize = 64;

/// What one rank holds. Ranges are in the whole model's numbering.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shard {
    pub heads: Range<usize>,
    /// The KV heads its query heads read; neighbours may hold the same one.
    pub kv_heads: Range<usize>,
    /// Columns of the FFN.
    pub ffn: Range<usize>,
    /// Rows of embedding and head.
    pub vocab: Range<usize>,
}

/// A model's split over a group, the same on every rank.
#[derive(Debug, Clone)]
pub struct Split {
    pub shards: Vec<Shard>,
    /// Leaves are query heads, grouped by KV head.
    pub heads_tree: SumTree,
    pub heads_plan: ReducePlan,
    /// Leaves are runs of `ModelConfig::ffn_leaf` columns.
    pub ffn_tree: SumTree,
    pub ffn_plan: ReducePlan,
    /// Only one rank's row is not zero, so any order gives the same sum.
    pub embed_plan: ReducePlan,
    /// What the lead alone computed, for all.
    pub lead_plan: ReducePlan,
}

/// Why shares cannot be split.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("a group needs at least one rank; no shares were given")]
    NoRanks,
    #[error("{got} ranks were asked for; at most {max} can form a group")]
    TooManyRanks { got: usize, max: usize },
    #[error("the share of rank {rank} is 0; every share must be at least 1")]
    ZeroShare { rank: usize },
    #[error(
        "with shares {shares} rank {rank} would hold nothing: the model has only {heads} heads, \
         {ffn} runs of FFN columns and {vocab} tiles of vocabulary rows to give; use fewer ranks or \
         shares closer together"
    )]
    NothingLeft { rank: usize, shares: String, heads: usize, ffn: usize, vocab: usize },
}

/// Splits a model over ranks by their shares.
///
/// Attention is cut between KV-head groups while there are at least as many as ranks; beyond that a
/// KV head is replicated and its query heads are split. A rank may hold no head at all.
///
/// # Errors
/// Shares that no split can serve.
pub fn split(config: &ModelConfig, shares: &[u32]) -> Result<Split, Error> {
    if shares.is_empty() {
        return Err(Error::NoRanks);
    }
    if shares.len() > MAX_WORLD_SIZE {
        return Err(Error::TooManyRanks { got: shares.len(), max: MAX_WORLD_SIZE });
    }
    if let Some(rank) = shares.iter().position(|&share| share == 0) {
        return Err(Error::ZeroShare { rank });
    }
    let per_kv = config.heads_per_kv();
    let heads = if config.n_kv_heads >= shares.len() {
        scaled(apportion(config.n_kv_heads, shares), per_kv)
    } else {
        apportion(config.n_heads, shares)
    };
    let ffn_leaf = config.ffn_leaf();
    let ffn = apportion(config.ffn / ffn_leaf, shares);
    let vocab = scaled(apportion(config.vocab.div_ceil(VOCAB_UNIT), shares), VOCAB_UNIT);

    let shards: Vec<Shard> = (0..shares.len())
        .map(|rank| Shard {
            heads: heads[rank].clone(),
            kv_heads: kv_heads_of(&heads[rank], per_kv),
            ffn: ffn[rank].start * ffn_leaf..ffn[rank].end * ffn_leaf,
            vocab: vocab[rank].start.min(config.vocab)..vocab[rank].end.min(config.vocab),
        })
        .collect();
    let holds_nothing = |s: &Shard| s.heads.is_empty() && s.ffn.is_empty() && s.vocab.is_empty();
    if let Some(rank) = shards.iter().position(holds_nothing) {
        return Err(Error::NothingLeft {
            rank,
            shares: shares.iter().map(u32::to_string).collect::<Vec<_>>().join(":"),
            heads: config.n_heads,
            ffn: config.ffn / ffn_leaf,
            vocab: config.vocab.div_ceil(VOCAB_UNIT),
        });
    }

    let heads_tree = SumTree::nested(&vec![per_kv; config.n_kv_heads]);
    let ffn_tree = SumTree::balanced(config.ffn / ffn_leaf);
    let lead_only: Vec<_> = (0..shares.len()).map(|rank| usize::from(rank > 0)..1).collect();
    Ok(Split {
        heads_plan: ReducePlan::new(&heads_tree, &heads),
        ffn_plan: ReducePlan::new(&ffn_tree, &ffn),
        embed_plan: ReducePlan::any_order(shares.len()),
        lead_plan: ReducePlan::new(&SumTree::balanced(1), &lead_only),
        heads_tree,
        ffn_tree,
        shards,
    })
}

impl Shard {
    /// One line for people: `heads 0..6, kv heads 0..2, ffn 0..1024, vocabulary 0..32768`.
    #[must_use]
    pub fn describe(&self) -> String {
        let Self { heads, kv_heads, ffn, vocab } = self;
        format!("heads {heads:?}, kv heads {kv_heads:?}, ffn {ffn:?}, vocabulary {vocab:?}")
    }
}

/// Contiguous ranges of `n_units` by largest remainder; ties go to the lower rank.
fn apportion(n_units: usize, shares: &[u32]) -> Vec<Range<usize>> {
    let total: u64 = shares.iter().map(|&s| u64::from(s)).sum();
    let exact = |share: u32| n_units as u64 * u64::from(share);
    let mut counts: Vec<u64> = shares.iter().map(|&s| exact(s) / total).collect();
    let mut by_remainder: Vec<usize> = (0..shares.len()).collect();
    by_remainder.sort_by_key(|&r| (std::cmp::Reverse(exact(shares[r]) % total), r));
    let left = n_units as u64 - counts.iter().sum::<u64>();
    for &rank in by_remainder.iter().take(left as usize) {
        counts[rank] += 1;
    }
    let mut start = 0;
    counts
        .into_iter()
        .map(|count| {
            let range = start..start + count as usize;
            start = range.end;
            range
        })
        .collect()
}

fn scaled(ranges: Vec<Range<usize>>, by: usize) -> Vec<Range<usize>> {
    ranges.into_iter().map(|r| r.start * by..r.end * by).collect()
}

fn kv_heads_of(heads: &Range<usize>, per_kv: usize) -> Range<usize> {
    if heads.is_empty() {
        let at = heads.start / per_kv;
        return at..at;
    }
    heads.start / per_kv..heads.end.div_ceil(per_kv)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::model::config::{Family, Rope, RopePairs};

    fn smollm2() -> ModelConfig {
        ModelConfig {
            family: Family::Llama,
            hidden: 576,
            n_layers: 30,
            n_heads: 9,
            n_kv_heads: 3,
            head_dim: 64,
            ffn: 1536,
            vocab: 49152,
            context_length: 8192,
            norm_eps: 1e-5,
            rope: Rope { theta: 1e5, dim: 64, pairs: RopePairs::Adjacent },
            tied_head: true,
            experts: None,
        }
    }

    fn check(shares: &[u32], heads: &[Range<usize>], kv_heads: &[Range<usize>]) {
        let split = split(&smollm2(), shares).unwrap();
        let got: Vec<_> = split.shards.iter().map(|s| s.heads.clone()).collect();
        assert_eq!(got, heads, "heads for shares {shares:?}");
        let got: Vec<_> = split.shards.iter().map(|s| s.kv_heads.clone()).collect();
        assert_eq!(got, kv_heads, "kv heads for shares {shares:?}");
    }

    #[test]
    fn heads_that_do_not_divide_are_split_by_largest_remainder() {
        check(&[1], std::slice::from_ref(&(0..9)), std::slice::from_ref(&(0..3)));
        check(&[1, 1], &[0..6, 6..9], &[0..2, 2..3]);
        check(&[2, 1], &[0..6, 6..9], &[0..2, 2..3]);
        check(&[1, 5], &[0..3, 3..9], &[0..1, 1..3]);
        check(&[3, 2, 2], &[0..3, 3..6, 6..9], &[0..1, 1..2, 2..3]);
    }

    #[test]
    fn more_ranks_than_kv_heads_replicate_kv_heads_and_split_their_query_heads() {
        check(&[1; 4], &[0..3, 3..5, 5..7, 7..9], &[0..1, 1..2, 1..3, 2..3]);
    }

    #[test]
    fn every_unit_has_exactly_one_owner() {
        for n in 1..=12 {
            for shares in [vec![1; n], (1..=n as u32).collect(), (1..=n as u32).rev().collect()] {
                let split = split(&smollm2(), &shares).unwrap();
                let covers = |pick: fn(&Shard) -> &Range<usize>, end: usize| {
                    let last = split.shards.iter().fold(0, |at, s| {
                        assert_eq!(pick(s).start, at);
                        pick(s).end
                    });
                    assert_eq!(last, end);
                };
                covers(|s| &s.heads, 9);
                covers(|s| &s.ffn, 1536);
                covers(|s| &s.vocab, 49152);
            }
        }
    }

    #[test]
    fn impossible_shares_are_refused_by_name() {
        assert_eq!(split(&smollm2(), &[]).unwrap_err(), Error::NoRanks);
        assert_eq!(split(&smollm2(), &[1, 0]).unwrap_err(), Error::ZeroShare { rank: 1 });
        let error = split(&smollm2(), &[1, 100_000]).unwrap_err();
        assert!(matches!(error, Error::NothingLeft { rank: 0, .. }), "{error}");
        assert!(matches!(split(&smollm2(), &[1; 65]), Err(Error::TooManyRanks { .. })));
    }
}

//! Logits of every position of given token lists, under a batching of the caller's choice. For
//! tests and benchmarks that compare splits bit for bit; serving does not use it.

use evener_collective::Collective;

use super::kv_blocks::blocks_for;
use super::rank::Rank;
use super::step::{Entry, Kind, StepPlan};
use super::{Error, follower};
use crate::metrics::Figures;

/// How token lists become steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Tokens of one list in one step.
    pub chunk: usize,
    /// All lists in the same steps; else one list after the other.
    pub together: bool,
}

/// Leads a group of `ranks` (rank 0 first), the others as threads, and returns by list the logits
/// of all its positions: `[positions, vocab]`.
///
/// # Errors
/// The lead's or else a follower's.
///
/// # Panics
/// The lists do not fit the ranks' limits.
pub fn group_logits(
    mut ranks: Vec<Rank>,
    lists: &[Vec<u32>],
    batching: Batching,
) -> Result<Vec<Vec<f32>>, Error> {
    let (lead, followers) = ranks.split_first_mut().expect("a group has a lead");
    std::thread::scope(|scope| {
        let follow = |rank| scope.spawn(|| follower::run(rank, &Figures::default()));
        let followers: Vec<_> = followers.iter_mut().map(follow).collect();
        let result = logits(lead, lists, batching);
        if result.is_err() {
            lead.mesh().abort_handle().abort("the probe failed");
        }
        let joined = followers.into_iter().map(|thread| thread.join().expect("no panic"));
        let followed: Result<(), Error> = joined.collect();
        result.and_then(|logits| followed.map(|()| logits))
    })
}

/// The lead's part of it; followers run [`follower::run`].
///
/// # Errors
/// The epoch is over.
///
/// # Panics
/// The lists do not fit the rank's limits.
pub fn logits(
    lead: &mut Rank,
    lists: &[Vec<u32>],
    batching: Batching,
) -> Result<Vec<Vec<f32>>, Error> {
    assert!(batching.chunk > 0, "a step has at least one token");
    let mut out: Vec<Vec<f32>> = lists.iter().map(|_| Vec::new()).collect();
    let (mut plan, mut fetch) = (StepPlan::default(), StepPlan::default());
    let mut next_block = 0;
    let groups: Vec<Vec<usize>> = match batching.together {
        true => vec![(0..lists.len()).collect()],
        false => (0..lists.len()).map(|list| vec![list]).collect(),
    };
    let mut row = Vec::new();
    for group in groups {
        let longest = group.iter().map(|&list| lists[list].len()).max().unwrap_or(0);
        for start in (0..longest).step_by(batching.chunk) {
            plan.clear();
            plan.kind = Kind::Run;
            for &list in &group {
                let end = lists[list].len().min(start + batching.chunk);
                if start < end {
                    push(&mut plan, list, &lists[list][start..end], start, &mut next_block);
                }
            }
            assert!(next_block <= lead.limits().n_kv_blocks, "too few KV blocks for the lists");
            lead.lead(&mut plan)?;
            fetch.clear();
            fetch.rows.extend(0..plan.n_sampled() as u32);
            lead.fetch(&mut fetch)?;
            let mut nth = 0;
            for entry in &plan.entries {
                for _ in 0..entry.n_sampled {
                    lead.fetched(nth, &mut row);
                    out[entry.slot as usize].extend_from_slice(&row);
                    nth += 1;
                }
            }
        }
    }
    plan.clear();
    plan.kind = Kind::Leave;
    lead.lead(&mut plan)?;
    Ok(out)
}

fn push(plan: &mut StepPlan, list: usize, tokens: &[u32], start: usize, next_block: &mut u32) {
    let n_blocks = blocks_for(start + tokens.len()) - blocks_for(start);
    plan.blocks.extend(*next_block..*next_block + n_blocks as u32);
    *next_block += n_blocks as u32;
    plan.tokens.extend_from_slice(tokens);
    plan.entries.push(Entry {
        slot: list as u32,
        start: start as u32,
        n_tokens: tokens.len() as u32,
        n_blocks: n_blocks as u32,
        n_sampled: tokens.len() as u32,
    });
}

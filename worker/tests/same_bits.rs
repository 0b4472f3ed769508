//! The same bits: logits of a real model do not change with the split, the threads or the batch.
//!
//! Ranks are threads over local links; the whole system is compared the same way in the system tests.
#![allow(clippy::unwrap_used)]

use std::ops::{ControlFlow, Range};

use evener_collective::{Mesh, Options as MeshOptions};
use evener_worker::backend::{self, Batch, KV_BLOCK_LEN, Kind, Options, Span};
use evener_worker::checkpoint::Checkpoint;
use evener_worker::model::{families, shard};

mod support;

const PROMPT_LEN: usize = 40;
const N_KV_BLOCKS: u32 = 16;

/// A prompt of ordinary token ids.
fn tokens(seed: u32) -> Vec<u32> {
    (0..PROMPT_LEN as u32).map(|i| 100 + (i * 7919 + seed * 104_729) % 40_000).collect()
}

/// Rows of one sequence, whose blocks begin at `first_block` of the cache.
fn add(batch: &mut Batch, tokens: &[u32], rows: Range<usize>, first_block: u32) {
    let n_blocks = rows.end.div_ceil(KV_BLOCK_LEN) as u32;
    batch.spans.push(Span {
        first_row: batch.tokens.len() as u32,
        n_rows: rows.len() as u32,
        first_block: batch.block_tables.len() as u32,
        n_blocks,
    });
    // Blocks in reverse, so that a sequence is never contiguous in the cache.
    let table: Vec<u32> = (0..n_blocks).map(|b| first_block + 3 - b).collect();
    for position in rows {
        let (block, at) = (position / KV_BLOCK_LEN, position % KV_BLOCK_LEN);
        batch.sample_rows.push(batch.tokens.len() as u32);
        batch.tokens.push(tokens[position]);
        batch.positions.push(position as u32);
        batch.slots.push(table[block] * KV_BLOCK_LEN as u32 + at as u32);
    }
    batch.block_tables.extend(table);
}

/// Logits of every sampled row over all batches, `[rows][vocab]`, as bits.
fn run(
    checkpoint: &Checkpoint,
    shares: &[u32],
    threads: usize,
    batches: &[Batch],
) -> Vec<Vec<u32>> {
    let split = shard::split(&checkpoint.config, shares).unwrap();
    let options = Options {
        threads,
        max_batch_tokens: 128,
        max_sample_rows: 128,
        max_context: 64,
        spin: false,
    };
    let mesh_options = MeshOptions { spin: false, ..MeshOptions::default() };
    let meshes = Mesh::local(shares.len(), 1, &mesh_options).unwrap();
    let ranks: Vec<Vec<f32>> = std::thread::scope(|scope| {
        let ranks: Vec<_> = meshes
            .into_iter()
            .enumerate()
            .map(|(rank, mut mesh)| {
                let program = families::compile(&checkpoint.config, &split, rank);
                let options = &options;
                scope.spawn(move || {
                    let go_on = &mut |_, _| ControlFlow::Continue(());
                    let loaded =
                        backend::load(Kind::Cpu, checkpoint, program, options, go_on).unwrap();
                    let mut backend = loaded.into_backend(N_KV_BLOCKS).unwrap();
                    let mut logits = Vec::new();
                    for batch in batches {
                        backend.run(batch, &mut mesh).unwrap();
                        logits.extend_from_slice(backend.logits());
                    }
                    logits
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    let n_rows: usize = batches.iter().map(|batch| batch.sample_rows.len()).sum();
    (0..n_rows)
        .map(|row| {
            let of_rank = |(logits, shard): (&Vec<f32>, &shard::Shard)| {
                let n = shard.vocab.len();
                logits[row * n..(row + 1) * n].iter().map(|v| v.to_bits()).collect::<Vec<_>>()
            };
            ranks.iter().zip(&split.shards).flat_map(of_rank).collect()
        })
        .collect()
}

fn whole(step: u64, tokens: &[u32]) -> Batch {
    let mut batch = Batch { step, ..Batch::default() };
    add(&mut batch, tokens, 0..tokens.len(), 0);
    batch
}

#[test]
fn logits_do_not_depend_on_the_split_or_the_threads() {
    let checkpoint = Checkpoint::open(&support::real_model()).unwrap();
    let batches = [whole(1, &tokens(1))];
    let want = run(&checkpoint, &[1], 1, &batches);
    let splits: [&[u32]; 8] =
        [&[1], &[1, 1], &[2, 1], &[1, 5], &[1, 1, 1], &[3, 2, 2], &[1, 1, 1, 1], &[7, 1, 2, 3, 1]];
    for shares in splits {
        for threads in [1, 2] {
            let got = run(&checkpoint, shares, threads, &batches);
            assert!(got == want, "shares {shares:?} with {threads} threads give other bits");
        }
    }
}

#[test]
fn logits_do_not_depend_on_the_batch() {
    let checkpoint = Checkpoint::open(&support::real_model()).unwrap();
    let (a, b, c) = (tokens(1), tokens(2), tokens(3));
    let alone = run(&checkpoint, &[1], 1, &[whole(1, &a)]);

    // The same sequence among others: chunks of its prompt, then token by token.
    let mut batches = Vec::new();
    let mut rows_of_a = Vec::new();
    let mut n_rows = 0;
    let pieces = [0..5, 5..17, 17..18, 18..37, 37..38, 38..39, 39..40];
    for (step, piece) in pieces.into_iter().enumerate() {
        let mut batch = Batch { step: step as u64 + 1, ..Batch::default() };
        add(&mut batch, &b, step..step + 1, 4);
        rows_of_a.extend((0..piece.len()).map(|i| n_rows + 1 + i));
        add(&mut batch, &a, piece, 0);
        add(&mut batch, &c, 3 * step..3 * step + 3, 8);
        n_rows += batch.sample_rows.len();
        batches.push(batch);
    }
    for shares in [&[1][..], &[2, 1]] {
        let got = run(&checkpoint, shares, 2, &batches);
        for (position, &row) in rows_of_a.iter().enumerate() {
            assert!(got[row] == alone[position], "position {position}, shares {shares:?}");
        }
    }
}

//! The same bits: logits of a real model do not change with the split, the threads or the batch.
//!
//! Ranks are threads over local links; the system tests compare whole clusters the same way.

#![allow(clippy::unwrap_used)]

mod support;

use evener_worker::backend::{Kind, KvFormat};
use evener_worker::checkpoint::Checkpoint;

use support::group::Group;
use support::real_model;

const PROMPT_LEN: u32 = 40;

/// A prompt of ordinary token ids.
fn tokens(seed: u32) -> Vec<u32> {
    (0..PROMPT_LEN).map(|i| 100 + (i * 7919 + seed * 104_729) % 40_000).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn logits_do_not_depend_on_the_split_or_the_threads() {
    let checkpoint = Checkpoint::open(&real_model()).unwrap();
    let prompt = tokens(1);
    let logits = |kv_format, shares, threads| {
        let group = Group { kind: Kind::Cpu, shares, threads, chunk: prompt.len(), kv_format };
        bits(&group.logits(&checkpoint, &[&prompt])[0])
    };
    for kv_format in [KvFormat::F32, KvFormat::Int8] {
        let equal = logits(kv_format, &[1], 1) == logits(kv_format, &[3, 1], 2);
        assert!(equal, "a split gives other bits with KV in {kv_format:?}");
    }
    let logits = |shares, threads| logits(KvFormat::F16, shares, threads);
    let want = logits(&[1], 1);
    let splits: [&[u32]; 8] =
        [&[1], &[1, 1], &[2, 1], &[1, 5], &[1, 1, 1], &[3, 2, 2], &[1, 1, 1, 1], &[7, 1, 2, 3, 1]];
    for shares in splits {
        for threads in [1, 2] {
            let equal = logits(shares, threads) == want;
            assert!(equal, "shares {shares:?} with {threads} threads give other bits");
        }
    }
}

#[test]
fn logits_do_not_depend_on_the_batch() {
    let checkpoint = Checkpoint::open(&real_model()).unwrap();
    let prompts: Vec<Vec<u32>> = (1..=3).map(tokens).collect();
    let together: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let (one, kind, chunk) = (&[1][..], Kind::Cpu, PROMPT_LEN as usize);
    for (kv_format, cases) in [
        (KvFormat::F16, &[(one, 7), (&[2, 1], 1), (&[1, 1], 16)][..]),
        (KvFormat::F32, &[(one, 7)]),
        (KvFormat::Int8, &[(one, 7)]),
    ] {
        let group = Group { kind, shares: one, threads: 1, chunk, kv_format };
        let alone = |prompt: &Vec<u32>| bits(&group.logits(&checkpoint, &[prompt])[0]);
        let alone: Vec<_> = prompts.iter().map(alone).collect();
        for &(shares, chunk) in cases {
            let group = Group { kind, shares, threads: 2, chunk, kv_format };
            let got = group.logits(&checkpoint, &together);
            let equal = got.iter().map(|logits| bits(logits)).eq(alone.iter().cloned());
            let how = format!("{chunk} tokens at a time, shares {shares:?}, KV in {kv_format:?}");
            assert!(equal, "together, {how}: other bits");
        }
    }
}

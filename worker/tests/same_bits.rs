//! The same bits: logits of a real model do not change with the split, the threads or the batch.
//!
//! Ranks are threads over local links; the system tests compare whole clusters the same way.

#![allow(clippy::unwrap_used)]

mod support;

use evener_worker::backend::{Activations, KvFormat};
use evener_worker::checkpoint::Checkpoint;

use support::group::Group;
use support::real_model;

/// How a group keeps KV and rounds activations; the default first.
const FORMATS: [(KvFormat, Activations); 4] = [
    (KvFormat::F16, Activations::Int12),
    (KvFormat::F32, Activations::Int12),
    (KvFormat::Int8, Activations::Int12),
    (KvFormat::F16, Activations::Int8),
];

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
    let logits = |group: Group<'_>| {
        let group = Group { chunk: prompt.len(), ..group };
        bits(&group.logits(&checkpoint, &[&prompt])[0])
    };
    for (kv_format, activations) in FORMATS {
        let one = Group { kv_format, activations, ..Group::default() };
        let two = Group { shares: &[3, 1], threads: 2, ..one.clone() };
        let equal = logits(one) == logits(two);
        assert!(equal, "a split gives other bits with KV in {kv_format:?}, {activations:?}");
    }
    let logits = |shares, threads| logits(Group { shares, threads, ..Group::default() });
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
    for (i, (kv_format, activations)) in FORMATS.into_iter().enumerate() {
        let base = Group { kv_format, activations, ..Group::default() };
        let group = Group { chunk: PROMPT_LEN as usize, ..base.clone() };
        let alone = |prompt: &Vec<u32>| bits(&group.logits(&checkpoint, &[prompt])[0]);
        let alone: Vec<_> = prompts.iter().map(alone).collect();
        let all: [(&[u32], usize); 3] = [(&[1], 7), (&[2, 1], 1), (&[1, 1], 16)];
        for &(shares, chunk) in if i == 0 { &all[..] } else { &all[..1] } {
            let group = Group { shares, threads: 2, chunk, ..base.clone() };
            let got = group.logits(&checkpoint, &together);
            let equal = got.iter().map(|logits| bits(logits)).eq(alone.iter().cloned());
            let how = format!("{chunk} tokens at a time, shares {shares:?}, {base:?}");
            assert!(equal, "together, {how}: other bits");
        }
    }
}

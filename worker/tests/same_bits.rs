//! The same bits: logits of a real model do not change with the split, the threads or the batch.
//!
//! Ranks are threads over local links; the system tests compare whole clusters the same way.

#![allow(clippy::unwrap_used)]

mod support;

use evener_worker::backend::Kind;
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
    let logits = |shares, threads| {
        let group = Group { kind: Kind::Cpu, shares, threads, chunk: prompt.len() };
        bits(&group.logits(&checkpoint, &[&prompt])[0])
    };
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
    let alone: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| {
            let group = Group { kind: Kind::Cpu, shares: &[1], threads: 1, chunk: prompt.len() };
            bits(&group.logits(&checkpoint, &[prompt])[0])
        })
        .collect();
    let together: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    for (shares, chunk) in [(&[1][..], 7), (&[2, 1], 1), (&[1, 1], 16)] {
        let group = Group { kind: Kind::Cpu, shares, threads: 2, chunk };
        let got: Vec<_> = group.logits(&checkpoint, &together).iter().map(|l| bits(l)).collect();
        assert!(got == alone, "together, {chunk} tokens at a time, shares {shares:?}: other bits");
    }
}

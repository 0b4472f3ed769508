//! Sampling as a whole, on a tiny model: the same tokens however the vocabulary is split, and
//! frequencies that are those of the oracle's logits.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Cursor;

use candle_core::quantized::{GgmlDType, gguf_file};
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use evener_worker::checkpoint::{Checkpoint, FileBytes};
use evener_worker::engine::output::End;
use evener_worker::engine::sampler::{Penalties, Sampling};
use evener_worker::engine::sequence::{Finish, Origin, Spec};

use support::serving::Serving;
use support::tiny_model::TinyModel;

/// More than the ranks' first answers name.
const VOCAB: usize = 2000;
/// With the prompt, three KV blocks.
const N_TOKENS: u32 = 40;

fn file() -> Vec<u8> {
    // The oracle takes a head's width from the others.
    let (hidden, n_heads, head_dim) = (192, 6, 32);
    let format = GgmlDType::F32;
    TinyModel { vocab: VOCAB, hidden, n_heads, head_dim, format, ..TinyModel::default() }.bytes()
}

fn checkpoint(file: &[u8]) -> Checkpoint {
    Checkpoint::from_bytes(FileBytes::Owned(file.to_vec())).unwrap()
}

fn spec(prompt: &[u32], max_tokens: u32, sampling: &Sampling) -> Spec {
    let sampling = sampling.clone();
    Spec {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling,
        prompt_logprobs: false,
        origin: Origin::default(),
    }
}

/// One of each transformation, and some together.
fn samplings() -> Vec<Sampling> {
    let warm = Sampling { temperature: 0.9, seed: 7, ..Sampling::default() };
    let penalties = |repetition, presence, frequency| Penalties { repetition, presence, frequency };
    let bias: Vec<(u32, f32)> = (0..60).map(|i| (i * 31, (i % 7) as f32 - 2.0)).collect();
    vec![
        Sampling::default(),
        Sampling { n_logprobs: Some(3), ..Sampling::default() },
        warm.clone(),
        Sampling { n_logprobs: Some(20), ..warm.clone() },
        Sampling { top_k: 40, ..warm.clone() },
        Sampling { top_k: 1500, top_p: 0.9, ..warm.clone() },
        Sampling { top_p: 0.95, ..warm.clone() },
        Sampling { top_p: 0.05, n_logprobs: Some(0), ..warm.clone() },
        Sampling { min_p: 0.6, ..warm.clone() },
        Sampling { min_p: 0.01, top_p: 0.5, ..warm.clone() },
        Sampling { penalties: penalties(1.5, 0.0, 0.0), ..Sampling::default() },
        Sampling { penalties: penalties(1.1, 0.5, 0.25), n_logprobs: Some(5), ..warm.clone() },
        Sampling { penalties: penalties(1.0, -1.0, 0.5), top_p: 0.7, ..warm.clone() },
        Sampling { logit_bias: bias.clone(), ..Sampling::default() },
        Sampling { logit_bias: bias, penalties: penalties(1.3, 0.0, 1.0), ..warm.clone() },
        Sampling { stop_token_ids: (0..1000).collect(), min_tokens: 6, ..warm },
    ]
}

fn specs() -> Vec<Spec> {
    samplings().iter().map(|sampling| spec(&[5, 12, 19, 26, 33], N_TOKENS, sampling)).collect()
}

#[test]
fn what_a_sequence_gets_depends_neither_on_the_split_nor_on_company() {
    let checkpoint = checkpoint(&file());
    let mut all = Vec::new();
    for world_size in 1..=3 {
        let group = Serving::start(&checkpoint, world_size);
        all.push(group.run(specs()));
        all.push(specs().into_iter().flat_map(|spec| group.run([spec])).collect());
        group.leave();
    }
    // And so few KV blocks that sequences are preempted all the time: three of them fit at most.
    let group = Serving::with_blocks(&checkpoint, 2, 6);
    all.push(group.run(specs()));
    assert!(group.figures.preemptions_total() > 0);
    group.leave();
    for outcomes in &all[1..] {
        for ((outcome, expect), sampling) in outcomes.iter().zip(&all[0]).zip(samplings()) {
            assert_eq!(outcome, expect, "{sampling:?}");
        }
    }
    // Each sampling does something: no two that differ in more than what is told are alike.
    let ids: Vec<Vec<u32>> = all[0].iter().map(|outcome| outcome.ids()).collect();
    assert_eq!((&ids[0], &ids[2]), (&ids[1], &ids[3]), "telling more changes no token");
    for (i, one) in ids.iter().enumerate().skip(3) {
        assert!(ids[i + 1..].iter().all(|other| one != other), "{i}: {one:?}");
    }
}

#[test]
fn an_interrupted_sequence_goes_on_with_the_same_tokens() {
    let checkpoint = checkpoint(&file());
    let group = Serving::start(&checkpoint, 2);
    for spec in specs() {
        let whole = group.run([spec.clone()]).remove(0);
        for cut in [1, 5].into_iter().filter(|&cut| cut < whole.tokens.len()) {
            let mut prompt = spec.prompt.clone();
            prompt.extend(&whole.ids()[..cut]);
            let sampling = Sampling { n_resumed: cut as u32, ..spec.sampling.clone() };
            let rest = Spec { prompt, sampling, max_tokens: N_TOKENS - cut as u32, ..spec.clone() };
            assert_eq!(group.run([rest])[0].tokens, whole.tokens[cut..], "{:?}", spec.sampling);
        }
    }
    group.leave();
}

#[test]
fn no_stop_token_comes_before_min_tokens() {
    let checkpoint = checkpoint(&file());
    let group = Serving::start(&checkpoint, 2);
    let stop_token_ids: Vec<u32> = (0..1000).collect();
    let mut lengths = Vec::new();
    for seed in 0..20 {
        let sampling = Sampling {
            temperature: 1.0,
            seed,
            stop_token_ids: stop_token_ids.clone(),
            min_tokens: 6,
            ..Sampling::default()
        };
        let outcome = group.run([spec(&[1, 2], 40, &sampling)]).remove(0);
        assert_eq!(outcome.end, Some(End::Finished(Finish::Stop)));
        lengths.push(outcome.tokens.len());
    }
    assert!(lengths.iter().all(|&n| n > 6) && lengths.contains(&7), "{lengths:?}");
    group.leave();
}

/// The oracle's logits after a prompt.
fn oracle_logits(file: &[u8], prompt: &[u32]) -> Vec<f32> {
    let mut reader = Cursor::new(file);
    let content = gguf_file::Content::read(&mut reader).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut reader, &Device::Cpu).unwrap();
    let input = Tensor::from_vec(prompt.to_vec(), (1, prompt.len()), &Device::Cpu).unwrap();
    model.forward(&input, 0).unwrap().to_vec2::<f32>().unwrap().remove(0)
}

/// Probabilities by the textbook, in f64 and over the whole vocabulary.
fn distribution(logits: &[f32], sampling: &Sampling, prompt: &[u32]) -> Vec<f64> {
    let mut logits: Vec<f64> = logits.iter().map(|&logit| logit.into()).collect();
    for &(token, bias) in &sampling.logit_bias {
        logits[token as usize] += f64::from(bias);
    }
    let n_prompt = prompt.len() - sampling.n_resumed as usize;
    for (token, logit) in logits.iter_mut().enumerate() {
        let Penalties { repetition, presence, frequency } = sampling.penalties;
        let count = |tokens: &[u32]| tokens.iter().filter(|&&t| t as usize == token).count();
        if count(prompt) > 0 {
            let repetition = f64::from(repetition);
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
        }
        let n_output = count(&prompt[n_prompt..]);
        *logit -= f64::from(frequency) * n_output as f64;
        *logit -= if n_output > 0 { f64::from(presence) } else { 0.0 };
        if (sampling.n_resumed as usize) < sampling.min_tokens as usize
            && sampling.stop_token_ids.contains(&(token as u32))
        {
            *logit = f64::NEG_INFINITY;
        }
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    let highest = logits[order[0]];
    let weight = |logit: f64| ((logit - highest) / f64::from(sampling.temperature)).exp();
    let mut kept: Vec<(usize, f64)> = order.iter().map(|&t| (t, weight(logits[t]))).collect();
    kept.retain(|(_, weight)| *weight >= f64::from(sampling.min_p));
    if sampling.top_k > 0 {
        kept.truncate(sampling.top_k as usize);
    }
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let mut sum = 0.0;
    let n = kept.iter().take_while(|(_, weight)| {
        let is_needed = sum < f64::from(sampling.top_p) * total;
        sum += weight;
        is_needed
    });
    kept.truncate(n.count().max(1));
    let total: f64 = kept.iter().map(|(_, weight)| weight).sum();
    let mut probabilities = vec![0.0; logits.len()];
    kept.iter().for_each(|&(token, weight)| probabilities[token] = weight / total);
    probabilities
}

/// The value that chi-square of `n` degrees of freedom passes once in ten thousand (Wilson and
/// Hilferty 1931). Seeds are fixed, so the test passes always or never.
fn chi_square_limit(n: f64) -> f64 {
    const NORMAL_QUANTILE: f64 = 3.719;
    let spread = 2.0 / (9.0 * n);
    n * (1.0 - spread + NORMAL_QUANTILE * spread.sqrt()).powi(3)
}

/// Tokens of a bin are expected so often at least, as Cochran's rule for chi-square wants.
const MIN_EXPECTED: f64 = 10.0;
/// Our logits differ from the oracle's by the rounding of activations, so where a cut falls between
/// two tokens as good as equal, either may be left out: so much probability may fall on tokens that
/// the oracle leaves out.
const MAX_LEFT_OUT: f64 = 0.01;

#[test]
fn frequencies_are_those_of_the_oracles_logits() {
    const N: usize = 6000;
    let file = file();
    let checkpoint = checkpoint(&file);
    // The last five count as generated before.
    let prompt = [72, 101, 108, 108, 111, 44, 32, 119, 111, 111, 111, 44];
    let logits = oracle_logits(&file, &prompt);
    let best = (0..VOCAB as u32).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]));
    let best = best.unwrap();
    let base = Sampling { temperature: 0.3, n_resumed: 5, ..Sampling::default() };
    let penalties = Penalties { repetition: 1.3, presence: 0.4, frequency: 0.3 };
    let logit_bias = vec![(111, 2.0), (44, 1.5), (best, -0.5), (1999, 2.0)];
    let group = Serving::start(&checkpoint, 2);
    for sampling in [
        base.clone(),
        Sampling { temperature: 0.15, ..base.clone() },
        Sampling { top_k: 20, ..base.clone() },
        Sampling { top_p: 0.6, ..base.clone() },
        Sampling { min_p: 0.1, ..base.clone() },
        Sampling { top_k: 200, top_p: 0.8, min_p: 0.02, ..base.clone() },
        Sampling { penalties, logit_bias: logit_bias.clone(), ..base.clone() },
        Sampling { penalties, logit_bias, top_k: 30, ..base.clone() },
        Sampling { min_tokens: 9, stop_token_ids: vec![best], ..base },
    ] {
        let expect = distribution(&logits, &sampling, &prompt);
        let seeded = |seed: usize| Sampling { seed: seed as u64, ..sampling.clone() };
        let specs = (0..N).map(|seed| spec(&prompt, 1, &seeded(seed)));
        let mut counts = vec![0.0; VOCAB];
        for outcome in group.run(specs) {
            counts[outcome.ids()[0] as usize] += 1.0;
        }
        let mut order: Vec<usize> = (0..VOCAB).collect();
        order.sort_by(|&a, &b| expect[b].total_cmp(&expect[a]));
        let (mut statistic, mut n_bins, mut n_left_out) = (0.0, 0, 0.0);
        let (mut expected, mut got) = (0.0, 0.0);
        for token in order {
            if expect[token] == 0.0 {
                n_left_out += counts[token];
                continue;
            }
            expected += expect[token] * N as f64;
            got += counts[token];
            if expected >= MIN_EXPECTED {
                statistic += (got - expected).powi(2) / expected;
                (n_bins, expected, got) = (n_bins + 1, 0.0, 0.0);
            }
        }
        let limit = chi_square_limit(f64::from(n_bins - 1));
        println!("chi-square {statistic:.1} of {n_bins} bins, limit {limit:.1}: {sampling:?}");
        assert!(n_bins > 4 && statistic < limit, "{statistic} of {n_bins} bins: {sampling:?}");
        assert!(n_left_out <= MAX_LEFT_OUT * N as f64, "{n_left_out} left out: {sampling:?}");
    }
    group.leave();
}

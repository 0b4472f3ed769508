//! The whole model against candle-transformers' Llama on the same file, over real text. Also against
//! that Llama with dequantised weights: its quantised matrices round activations to int8, so the two
//! comparisons show what is ours and what is rounding.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::Cursor;

use candle_core::quantized::gguf_file;
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use evener_worker::backend::Kind;
use evener_worker::checkpoint::Checkpoint;
use evener_worker::model::{families, shard};
use tokenizers::Tokenizer;

use support::gguf_writer::{File, Tensor as FileTensor, Value};
use support::group::Group;
use support::real_model;

/// Positions compared with the oracle.
const N_POSITIONS: usize = 512;
/// Positions compared with the dequantised oracle, which is slow.
const N_EXACT: usize = 96;

/// Share of positions at which both would continue with the same token.
const MIN_TOP_1: f64 = 0.99;
/// Relative difference of the perplexities.
const MAX_PERPLEXITY: f64 = 0.005;
/// Logits of this model span about 40. Each of its 211 matrices rounds activations to 8 bits, in other
/// blocks and at other places than the oracle does; that moves single logits by some tenths.
const MAX_ROUNDING: f32 = 1.5;
/// Against dequantised weights only the order of f32 additions differs.
const MAX_REORDERING: f32 = 0.02;

fn text_tokens(checkpoint: &Checkpoint) -> Vec<u32> {
    let tokenizer = Tokenizer::from_bytes(&checkpoint.description.tokenizer_json).unwrap();
    let text = include_str!("data/eveners.txt");
    let mut tokens = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    assert!(tokens.len() > N_POSITIONS, "the text has only {} tokens", tokens.len());
    tokens.truncate(N_POSITIONS + 1);
    tokens
}

/// The oracle's logits of the first `n` positions: `[n, vocab]`.
fn oracle_logits(file: &[u8], tokens: &[u32], n: usize) -> Vec<f32> {
    let mut reader = Cursor::new(file);
    let content = gguf_file::Content::read(&mut reader).unwrap();
    let mut model = ModelWeights::from_gguf(content, &mut reader, &Device::Cpu).unwrap();
    let mut logits = Vec::new();
    for (position, &token) in tokens[..n].iter().enumerate() {
        let input = Tensor::new(&[[token]], &Device::Cpu).unwrap();
        let row = model.forward(&input, position).unwrap();
        logits.extend(row.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    }
    logits
}

/// The same model with every tensor as f32.
fn dequantised_file(checkpoint: &Checkpoint) -> Vec<u8> {
    let config = &checkpoint.config;
    let mut file = File::default();
    file.set("general.architecture", Value::String("llama".to_owned()));
    let sizes = [
        ("llama.block_count", config.n_layers),
        ("llama.context_length", config.context_length),
        ("llama.embedding_length", config.hidden),
        ("llama.feed_forward_length", config.ffn),
        ("llama.attention.head_count", config.n_heads),
        ("llama.attention.head_count_kv", config.n_kv_heads),
        ("llama.rope.dimension_count", config.rope.dim),
    ];
    for (key, size) in sizes {
        file.set(key, Value::U32(size as u32));
    }
    file.set("llama.attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps));
    file.set("llama.rope.freq_base", Value::F32(config.rope.theta));
    let split = shard::split(config, &[1]).unwrap();
    for weight in families::compile(config, &split, 0).weights {
        let known = file.tensors.iter().any(|tensor| tensor.name == weight.tensor);
        if known {
            continue;
        }
        let slice = checkpoint.slice(&weight).unwrap();
        let mut row = vec![0.0; slice.columns];
        let mut data = Vec::with_capacity(4 * slice.rows * slice.columns);
        for i in 0..slice.rows {
            slice.dequantized_row(i, &mut row);
            data.extend(row.iter().flat_map(|x| x.to_le_bytes()));
        }
        let dimensions = match slice.rows {
            1 => vec![slice.columns as u64],
            rows => vec![slice.columns as u64, rows as u64],
        };
        file.tensors.push(FileTensor { name: weight.tensor, dimensions, ggml_type: 0, data });
    }
    file.write().bytes
}

/// How far apart two sets of logits are.
#[derive(Debug)]
struct Comparison {
    n_positions: usize,
    top_1: f64,
    perplexities: [f64; 2],
    largest_difference: f32,
}

impl Comparison {
    /// `tokens[i + 1]` is what follows position i.
    fn new(ours: &[f32], oracle: &[f32], tokens: &[u32], vocab: usize) -> Self {
        let n_positions = oracle.len() / vocab;
        let ours = &ours[..oracle.len()];
        let rows = || ours.chunks_exact(vocab).zip(oracle.chunks_exact(vocab));
        let n_equal = rows().filter(|(a, b)| argmax(a) == argmax(b)).count();
        let difference = |(a, b): (&f32, &f32)| {
            let difference = (a - b).abs();
            assert!(difference.is_finite(), "logits are finite");
            difference
        };
        Self {
            n_positions,
            top_1: n_equal as f64 / n_positions as f64,
            perplexities: [ours, oracle].map(|logits| perplexity(logits, tokens, vocab)),
            largest_difference: ours.iter().zip(oracle).map(difference).fold(0.0, f32::max),
        }
    }

    fn relative_perplexity(&self) -> f64 {
        (self.perplexities[0] / self.perplexities[1] - 1.0).abs()
    }
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best })
}

fn perplexity(logits: &[f32], tokens: &[u32], vocab: usize) -> f64 {
    let rows = logits.chunks_exact(vocab);
    let n = rows.len() as f64;
    let loss = |(row, &next): (&[f32], &u32)| {
        let max = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
        max + sum.ln() - f64::from(row[next as usize])
    };
    (rows.zip(&tokens[1..]).map(loss).sum::<f64>() / n).exp()
}

fn against_the_oracle(kind: Kind) {
    let checkpoint = Checkpoint::open(&real_model()).unwrap();
    let (tokens, vocab) = (text_tokens(&checkpoint), checkpoint.config.vocab);
    let group = Group { kind, shares: &[1], threads: 2, chunk: 64 };
    let ours = group.logits(&checkpoint, &[&tokens[..N_POSITIONS]]).remove(0);
    let oracle = oracle_logits(checkpoint.gguf().bytes(), &tokens, N_POSITIONS);
    let comparison = Comparison::new(&ours, &oracle, &tokens, vocab);
    println!("{kind:?} against candle-transformers, int8 activations: {comparison:?}");
    assert_eq!(comparison.n_positions, N_POSITIONS);
    assert!(comparison.top_1 >= MIN_TOP_1, "{comparison:?}");
    assert!(comparison.relative_perplexity() <= MAX_PERPLEXITY, "{comparison:?}");
    assert!(comparison.largest_difference <= MAX_ROUNDING, "{comparison:?}");
}

#[test]
fn cpu_agrees_with_the_oracle() {
    against_the_oracle(Kind::Cpu);
}

#[test]
fn reference_agrees_with_the_oracle() {
    against_the_oracle(Kind::Reference);
}

#[test]
fn reference_equals_the_oracle_with_dequantised_weights_for_any_split() {
    let checkpoint = Checkpoint::open(&real_model()).unwrap();
    let (tokens, vocab) = (text_tokens(&checkpoint), checkpoint.config.vocab);
    let oracle = oracle_logits(&dequantised_file(&checkpoint), &tokens, N_EXACT);
    for shares in [&[1][..], &[1, 1], &[3, 2, 2], &[1, 1, 1, 1]] {
        let group = Group { kind: Kind::Reference, shares, threads: 1, chunk: 40 };
        let ours = group.logits(&checkpoint, &[&tokens[..N_EXACT]]).remove(0);
        let comparison = Comparison::new(&ours, &oracle, &tokens, vocab);
        println!("reference {shares:?} against candle-transformers, f32: {comparison:?}");
        assert_eq!(comparison.n_positions, N_EXACT);
        assert!((comparison.top_1 - 1.0).abs() < f64::EPSILON, "{shares:?}: {comparison:?}");
        assert!(comparison.largest_difference <= MAX_REORDERING, "{shares:?}: {comparison:?}");
    }
}

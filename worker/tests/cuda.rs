//! The CUDA backend as a whole, on its emulation, or on a card (`make gpu-test`): tiny models in every format and with every kind of
//! cache, against plain f32 tensors; steps replayed from graphs; ranks of unequal shares.
//!
//! The emulation shows that the kernels, their launches and their buffers compute the right thing. No
//! card has run them yet.

#![allow(clippy::unwrap_used)]

mod support;

use candle_core::quantized::GgmlDType;
use evener_worker::backend::{Kind, KvFormat};
use evener_worker::checkpoint::{Checkpoint, FileBytes};
use evener_worker::model::{families, shard};

use support::group::{Group, cuda};
use support::tiny_model::TinyModel;

/// Of the largest logit. The reference keeps f32; the cache keeps 11 bits, so do queries and weights
/// of attention where tensor cores multiply them, and activations have 16.
const TOLERANCE: f32 = 3e-3;
/// Where a processor has a part: it rounds activations to 12 bits.
const MIXED_TOLERANCE: f32 = 2e-2;
/// Where the cache keeps 8 bits a number.
const INT8_CACHE_TOLERANCE: f32 = 3e-2;
/// Where more than 32 tokens meet weights of bf16, activations are rounded to bf16 too: 8 bits, on
/// the way through each of two layers.
const BF16_TOLERANCE: f32 = 2e-2;

fn checkpoint(model: &TinyModel) -> Checkpoint {
    Checkpoint::from_bytes(FileBytes::Owned(model.bytes())).unwrap()
}

/// Sequences of tokens that a tiny model knows.
fn sequences(lens: &[usize]) -> Vec<Vec<u32>> {
    let token = |sequence: usize, at: usize| ((at * 37 + sequence * 11 + at * at) % 260) as u32;
    lens.iter().enumerate().map(|(s, &len)| (0..len).map(|at| token(s, at)).collect()).collect()
}

/// Runs both backends over the same sequences and compares every logit.
fn check(
    model: &TinyModel,
    shares: &[u32],
    kv_format: KvFormat,
    chunk: usize,
    lens: &[usize],
    tolerance: f32,
) {
    let checkpoint = checkpoint(model);
    let sequences = sequences(lens);
    let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let [want, got] = [Kind::Reference, cuda()].map(|kind| {
        let shares = if kind == Kind::Reference { &[1] } else { shares };
        Group { kind, shares, threads: 1, chunk, kv_format }.logits(&checkpoint, &sequences)
    });
    let about = format!("{:?}, {shares:?}, {kv_format:?}, chunk {chunk}, {lens:?}", model.format);
    compare(&want, &got, tolerance, &about);
}

fn compare(want: &[Vec<f32>], got: &[Vec<f32>], tolerance: f32, about: &str) {
    for (want, got) in want.iter().zip(got) {
        assert_eq!(want.len(), got.len());
        let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
        assert!(largest > 0.1, "logits of next to nothing show nothing");
        let worst = want.iter().zip(got).map(|(want, got)| (want - got).abs());
        let worst = worst.fold(0f32, |max, x| if x > max || x.is_nan() { x } else { max });
        assert!(worst <= tolerance * largest, "{about}: off by {worst} of {largest}");
    }
}

#[test]
fn whole_models_of_every_format_agree_with_plain_tensors() {
    for (format, tolerance) in [
        (GgmlDType::F32, TOLERANCE),
        (GgmlDType::F16, TOLERANCE),
        (GgmlDType::BF16, BF16_TOLERANCE),
        (GgmlDType::Q4_0, TOLERANCE),
        (GgmlDType::Q4_1, TOLERANCE),
        (GgmlDType::Q5_0, TOLERANCE),
        (GgmlDType::Q5_1, TOLERANCE),
        (GgmlDType::Q8_0, TOLERANCE),
        (GgmlDType::Q4K, TOLERANCE),
        (GgmlDType::Q5K, TOLERANCE),
        (GgmlDType::Q6K, TOLERANCE),
    ] {
        let model = TinyModel {
            format,
            hidden: 256,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 64,
            ffn: 256,
            ..TinyModel::default()
        };
        // A prompt on tensor cores, a step of 34 tokens, and single tokens.
        check(&model, &[1], KvFormat::F16, 17, &[35, 18], tolerance);
    }
}

#[test]
fn caches_of_every_kind_agree_with_plain_tensors() {
    let model = TinyModel { format: GgmlDType::Q8_0, context_length: 700, ..TinyModel::default() };
    for kv_format in KvFormat::ALL {
        let tolerance = match kv_format {
            KvFormat::F16 | KvFormat::F32 => TOLERANCE,
            KvFormat::Int8 => INT8_CACHE_TOLERANCE,
        };
        // Past a split of 256 positions, by pieces that are tiles and pieces that are not.
        check(&model, &[1], kv_format, 90, &[275, 101], tolerance);
    }
}

#[test]
fn ranks_of_unequal_shares_agree_with_plain_tensors() {
    for shares in [&[1, 1][..], &[3, 1, 2]] {
        check(&TinyModel::default(), shares, KvFormat::F16, 5, &[12, 9], TOLERANCE);
    }
}

#[test]
fn a_processor_and_a_card_make_a_group() {
    let model = TinyModel { format: GgmlDType::Q8_0, ..TinyModel::default() };
    let (checkpoint, sequences) = (checkpoint(&model), sequences(&[12, 9]));
    let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let group =
        |kind, shares| Group { kind, shares, threads: 1, chunk: 5, kv_format: KvFormat::F16 };
    let want = group(Kind::Reference, &[1][..]).logits(&checkpoint, &sequences);
    let (shares, vocab) = (&[1, 2][..], checkpoint.config.vocab);
    let split = shard::split(&checkpoint.config, shares).unwrap();
    let program = |rank| families::compile(&checkpoint.config, &split, rank);
    for kinds in [[Kind::Cpu, cuda()], [cuda(), Kind::Cpu]] {
        let group = group(Kind::Cpu, shares);
        let got = group.run_mixed(&kinds, &checkpoint, &program, vocab, &sequences);
        compare(&want, &got, MIXED_TOLERANCE, &format!("{kinds:?}"));
    }
}

#[test]
fn steps_replayed_from_graphs_agree_with_plain_tensors() {
    // One token a step: the first of each bucket runs, the second is recorded, all others are
    // replayed with other tokens, positions and blocks. The third sequence ends early, so that the
    // bucket changes under way.
    check(&TinyModel::default(), &[1], KvFormat::F16, 1, &[24, 24, 7], TOLERANCE);
}

//! Models whose matrices are kept in FP8: the numbers are those of a file of floats that holds the
//! rounded ones, on every backend and for every split; what cannot be kept so is refused.

#![allow(clippy::unwrap_used)]

mod support;

use std::ops::ControlFlow;

use candle_core::quantized::GgmlDType;
use evener_kernels::quant::fp8;
use evener_worker::backend::{self, Activations, Kind, KvFormat};
use evener_worker::checkpoint::{Checkpoint, Error, FileBytes, Kept};
use evener_worker::model::{families, shard};

use support::gguf_writer::File;
use support::group::{Group, Meet, cuda};
use support::logits::{compare, sequences};
use support::tiny_model::TinyModel;

/// Of the largest logit. On a card activations have 11 bits, as the cache has; the reference keeps f32.
const TOLERANCE: f32 = 3e-3;
/// On a processor they meet weights of bf16, with 16 bits at least.
const CPU_TOLERANCE: f32 = 1e-4;
/// Of more than 48 tokens on a card, activations are rounded to bf16: 8 bits, on the way through each of
/// two layers.
const MANY_TOLERANCE: f32 = 2e-2;

const FLOATS: [GgmlDType; 3] = [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16];

fn open(file: &File) -> Checkpoint {
    Checkpoint::from_bytes(FileBytes::Owned(file.write().bytes)).unwrap()
}

fn kept(file: &File) -> Checkpoint {
    open(file).keep(Kept::Fp8).unwrap()
}

fn is_rounded(name: &str) -> bool {
    name.starts_with("blk.") && !name.contains("norm")
}

/// The file with every number of the layers' matrices, in F32, through `change`, row by row.
fn changed(model: &TinyModel, change: impl Fn(&mut [f32])) -> File {
    let mut file = TinyModel { format: GgmlDType::F32, ..model.clone() }.file();
    for tensor in file.tensors.iter_mut().filter(|tensor| is_rounded(&tensor.name)) {
        let columns = tensor.dimensions[0] as usize;
        for row in tensor.data.chunks_exact_mut(4 * columns) {
            let (bytes, _) = row.as_chunks_mut::<4>();
            let mut numbers: Vec<f32> =
                bytes.iter().map(|&four| f32::from_le_bytes(four)).collect();
            change(&mut numbers);
            bytes.iter_mut().zip(numbers).for_each(|(four, x)| *four = x.to_le_bytes());
        }
    }
    file
}

fn logits(
    checkpoint: &Checkpoint,
    kind: Kind,
    shares: &[u32],
    chunk: usize,
    lens: &[usize],
) -> Vec<Vec<f32>> {
    let sequences = sequences(lens);
    let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    // As the reference's, where that tells how near a processor comes to it.
    let kv_format = if kind == Kind::Cpu { KvFormat::F32 } else { KvFormat::F16 };
    let group = Group { kind, shares, chunk, kv_format, ..Group::default() };
    group.logits(checkpoint, &sequences)
}

fn models() -> [TinyModel; 3] {
    [
        // Columns that are no whole steps of 128, and a head that is the embedding.
        TinyModel::default(),
        TinyModel { hidden: 256, ffn: 512, head_dim: 64, n_heads: 4, ..TinyModel::default() },
        TinyModel { seed: 5, tied_head: false, vocab: 301, ..TinyModel::default() },
    ]
}

#[test]
fn the_numbers_are_those_of_a_file_that_holds_the_rounded_ones() {
    for model in models() {
        let rounded = changed(&model, |row| fp8::round(row, fp8::scale_of(fp8::largest(row))));
        let [want, got] = [open(&rounded), kept(&changed(&model, |_| ()))]
            .map(|checkpoint| logits(&checkpoint, Kind::Reference, &[1], 9, &[12, 9]));
        assert_eq!(want, got);
        let exact = logits(&open(&model.file()), Kind::Reference, &[1], 9, &[12, 9]);
        assert_ne!(want, exact, "rounding is seen");
    }
}

#[test]
fn a_card_agrees_with_plain_tensors_whatever_the_tokens_and_the_split() {
    for model in models() {
        let checkpoint = kept(&model.file());
        // Single tokens by graphs; a prompt of up to 8 tokens a step, of more, and by cublasLt.
        for (shares, chunk, lens, tolerance) in [
            (&[1][..], 1, &[14, 9][..], TOLERANCE),
            (&[1], 4, &[12, 9], TOLERANCE),
            (&[1], 17, &[35, 18], TOLERANCE),
            (&[3, 1, 2], 5, &[12, 9], TOLERANCE),
            (&[1], 60, &[60], MANY_TOLERANCE),
            (&[2, 1], 60, &[60], MANY_TOLERANCE),
        ] {
            let want = logits(&checkpoint, Kind::Reference, &[1], chunk, lens);
            let got = logits(&checkpoint, cuda(), shares, chunk, lens);
            compare(&want, &got, tolerance, &format!("{shares:?}, chunk {chunk}, {lens:?}"));
        }
    }
}

#[test]
fn a_processor_agrees_with_plain_tensors_and_keeps_its_bits_for_every_split() {
    let bits = |logits: &[Vec<f32>]| -> Vec<u32> {
        logits.iter().flatten().map(|logit| logit.to_bits()).collect()
    };
    for format in FLOATS {
        let checkpoint = kept(&TinyModel { format, ..models()[2].clone() }.file());
        let of = |kind, shares: &[u32], chunk| logits(&checkpoint, kind, shares, chunk, &[21, 9]);
        let whole = of(Kind::Cpu, &[1], 16);
        compare(&of(Kind::Reference, &[1], 16), &whole, CPU_TOLERANCE, "a processor");
        for (shares, chunk) in [(&[2, 1][..], 16), (&[1, 1, 3], 5)] {
            assert_eq!(bits(&whole), bits(&of(Kind::Cpu, shares, chunk)), "{format:?} {shares:?}");
        }
    }
}

#[test]
fn a_processor_and_a_card_hold_the_same_numbers() {
    let checkpoint = kept(&TinyModel { format: GgmlDType::BF16, ..TinyModel::default() }.file());
    let tokens = sequences(&[12, 9]);
    let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let want = logits(&checkpoint, Kind::Reference, &[1], 5, &[12, 9]);
    let (shares, vocab) = (&[1, 2][..], checkpoint.config.vocab);
    let split = shard::split(&checkpoint.config, shares).unwrap();
    let program = |rank| families::compile(&checkpoint.config, &split, rank);
    let group = Group { shares, chunk: 5, ..Group::default() };
    let kinds = [Kind::Cpu, cuda()];
    let got = group.run_mixed(&kinds, Meet::OnDevices, &checkpoint, &program, vocab, &tokens);
    compare(&want, &got, 2.0 * TOLERANCE, "a processor and a card");
}

#[test]
fn rows_of_zeros_and_of_extremes_stay_what_they_are() {
    let model = TinyModel { hidden: 128, n_heads: 4, ffn: 160, ..TinyModel::default() };
    let n = std::cell::Cell::new(0);
    let file = changed(&model, |row| {
        n.set(n.get() + 1);
        match n.get() % 5 {
            0 => row.fill(0.0),
            // Next to nothing beside the row's others: some vanish, none grows.
            1 => row.iter_mut().skip(1).for_each(|x| *x *= 1e-5),
            2 => row.iter_mut().for_each(|x| *x = -x.abs()),
            _ => (),
        }
    });
    let checkpoint = kept(&file);
    let want = logits(&checkpoint, Kind::Reference, &[1], 12, &[24]);
    compare(&want, &logits(&checkpoint, cuda(), &[1], 12, &[24]), TOLERANCE, "a card");
    let got = logits(&checkpoint, Kind::Cpu, &[1], 12, &[24]);
    compare(&want, &got, CPU_TOLERANCE, "a processor");
}

#[test]
fn what_is_not_finite_is_refused_by_its_place() {
    let mut file = TinyModel::default().file();
    let tensor = file.tensors.iter_mut().find(|t| t.name == "blk.1.ffn_up.weight").unwrap();
    let columns = tensor.dimensions[0] as usize;
    tensor.data[4 * (3 * columns + 7)..][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    let checkpoint = kept(&file);
    let split = shard::split(&checkpoint.config, &[1]).unwrap();
    for kind in [Kind::Cpu, Kind::Reference, cuda()] {
        let program = families::compile(&checkpoint.config, &split, 0);
        let options = backend::Options {
            threads: 1,
            max_batch_tokens: 8,
            max_sample_rows: 1,
            max_context: 8,
            kv_format: KvFormat::F16,
            activations: Activations::Int12,
            spin: false,
            cores: Vec::new(),
        };
        let mut go_on = |_, _| ControlFlow::Continue(());
        let loaded = backend::load(kind, &checkpoint, program, &options, &mut go_on);
        let error = loaded.err().unwrap().to_string();
        assert_eq!(error, "data of tensor `blk.1.ffn_up.weight`: block 7 of row 3 is not finite");
    }
}

#[test]
fn it_is_another_model_of_other_sizes_and_nothing_else_of_it_changes() {
    let file = TinyModel { format: GgmlDType::BF16, ..TinyModel::default() }.file();
    let (plain, kept) = (open(&file).description, kept(&file).description);
    let rounded = file.tensors.iter().filter(|tensor| is_rounded(&tensor.name));
    let spared: u64 =
        rounded.map(|t| t.dimensions[1] * (2 * t.dimensions[0] - (t.dimensions[0] + 4))).sum();
    assert_eq!(kept.weight_bytes, plain.weight_bytes - spared);
    assert_eq!(kept.quantization, "FP8");
    assert_eq!(kept.fingerprint.len(), 64);
    assert_ne!(kept.fingerprint, plain.fingerprint);
    assert_eq!(open(&file).keep(Kept::AsStored).unwrap().description, plain);
    assert_eq!(
        open(&file).keep(Kept::Fp8).unwrap().keep(Kept::Fp8).unwrap().description,
        kept,
        "kept so already"
    );
}

#[test]
fn a_file_without_floats_is_refused_with_what_would_work() {
    let file = TinyModel { format: GgmlDType::Q8_0, ..TinyModel::default() }.file();
    let error = open(&file).keep(Kept::Fp8).unwrap_err();
    assert!(matches!(error, Error::NothingToRound), "{error}");
    assert!(error.to_string().contains("F32, F16 or BF16"), "{error}");
    // A mixture is rounded where it can be.
    let mut mixed = TinyModel { format: GgmlDType::F16, ..TinyModel::default() }.file();
    let other = file.tensors.iter().find(|t| t.name == "blk.0.ffn_up.weight").unwrap();
    *mixed.tensors.iter_mut().find(|t| t.name == other.name).unwrap() = other.clone();
    let checkpoint = kept(&mixed);
    let want = logits(&checkpoint, Kind::Reference, &[1], 12, &[12]);
    compare(&want, &logits(&checkpoint, cuda(), &[1], 12, &[12]), TOLERANCE, "a mixture");
}

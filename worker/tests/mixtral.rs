//! Mixtures of experts: logits of the whole path against candle-transformers' Mixtral on the same
//! file, by every backend and split, and the same bits over splits, threads, batches and layouts of
//! the file. The weights are random, the architecture is Mixtral's.

#![allow(clippy::unwrap_used)]

mod support;

use candle_core::quantized::GgmlDType;
use evener_worker::backend::{Activations, Kind, KvFormat};
use evener_worker::checkpoint::{Checkpoint, FileBytes};
use evener_worker::measure::Demand;
use evener_worker::model::config::Family;
use evener_worker::model::{families, shard};

use support::group::{Group, Meet, cuda};
use support::logits::{compare, oracle, sequences};
use support::tiny_model::{Experts, TinyModel};

/// Of the largest logit, where only the order of additions differs.
const REORDERED: f32 = 1e-4;
/// Where one rounds what it multiplies to 11 or 12 bits.
const ROUNDED: f32 = 0.03;

/// Heads, FFN and vocabulary that no tile or leaf divides evenly; of a seed with which no token is torn
/// between two experts so much that rounding would decide.
fn tiny(format: GgmlDType, are_stacked: bool) -> TinyModel {
    TinyModel {
        seed: 5,
        hidden: 192,
        n_heads: 6,
        n_kv_heads: 3,
        head_dim: 32,
        ffn: 352,
        vocab: 301,
        tied_head: false,
        format,
        experts: Some(Experts { n: 5, n_used: 2, are_stacked }),
        ..TinyModel::default()
    }
}

fn open(model: &TinyModel) -> (Vec<u8>, Checkpoint) {
    let bytes = model.bytes();
    let checkpoint = Checkpoint::from_bytes(FileBytes::Owned(bytes.clone())).unwrap();
    assert_eq!(checkpoint.config.family, Family::Mixtral);
    (bytes, checkpoint)
}

#[test]
fn every_backend_and_split_gives_the_oracles_logits() {
    let (file, checkpoint) = open(&tiny(GgmlDType::F32, false));
    let prompts = sequences(&[20, 13, 7]);
    let want: Vec<_> = prompts.iter().map(|prompt| oracle(&file, prompt)).collect();
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let splits: [&[u32]; 3] = [&[1], &[2, 1], &[1, 1, 1]];
    for shares in splits {
        for kind in [Kind::Reference, Kind::Cpu, cuda()] {
            let kv_format = KvFormat::F32;
            let group = Group { kind, shares, threads: 2, chunk: 5, kv_format, ..Group::default() };
            let got = group.logits(&checkpoint, &prompts);
            compare(&want, &got, REORDERED, &format!("{kind:?}, {shares:?}"));
        }
    }
}

#[test]
fn backends_agree_on_quantised_experts() {
    for format in [GgmlDType::Q4_0, GgmlDType::Q8_0, GgmlDType::BF16] {
        let (_, checkpoint) = open(&tiny(format, true));
        let prompts = sequences(&[24, 9]);
        let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let of = |kind, shares, chunk| {
            let group = Group { kind, shares, chunk, kv_format: KvFormat::F32, ..Group::default() };
            group.logits(&checkpoint, &prompts)
        };
        let want = of(Kind::Reference, &[1], 8);
        compare(&want, &of(Kind::Cpu, &[1], 8), ROUNDED, &format!("{format:?} on the CPU"));
        for (shares, chunk) in [(&[1][..], 1), (&[1], 24), (&[1, 2], 8)] {
            let about = format!("{format:?} on a card, {shares:?}, {chunk} tokens a step");
            compare(&want, &of(cuda(), shares, chunk), ROUNDED, &about);
        }
    }
}

#[test]
fn ranks_that_round_otherwise_send_tokens_to_the_same_experts() {
    let (_, checkpoint) = open(&tiny(GgmlDType::Q8_0, true));
    let prompts = sequences(&[24, 9]);
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let group = Group { shares: &[1, 1], chunk: 8, kv_format: KvFormat::F32, ..Group::default() };
    let want = Group { kind: Kind::Reference, ..group.clone() }.logits(&checkpoint, &prompts);
    let split = shard::split(&checkpoint.config, group.shares).unwrap();
    let program = |rank| families::compile(&checkpoint.config, &split, rank);
    for (kinds, meet) in [
        ([Kind::Cpu, cuda()], Meet::OverHosts),
        ([cuda(), Kind::Cpu], Meet::OverHosts),
        ([cuda(), cuda()], Meet::OnDevices),
    ] {
        let vocab = checkpoint.config.vocab;
        let got = group.run_mixed(&kinds, meet, &checkpoint, &program, vocab, &prompts);
        compare(&want, &got, ROUNDED, &format!("{kinds:?}, {meet:?}"));
    }
}

#[test]
fn bits_do_not_depend_on_splits_threads_batch_or_the_files_layout() {
    let bits = |logits: &[Vec<f32>]| {
        let of = |logits: &Vec<f32>| logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        logits.iter().map(of).collect::<Vec<_>>()
    };
    let prompts = sequences(&[24, 24, 24]);
    let together: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    for (format, activations) in [
        (GgmlDType::Q4_0, Activations::Int12),
        (GgmlDType::Q8_0, Activations::Int8),
        (GgmlDType::BF16, Activations::Int12),
        (GgmlDType::F32, Activations::Int12),
    ] {
        let base = Group { activations, ..Group::default() };
        let (_, checkpoint) = open(&tiny(format, true));
        let alone: Vec<_> = together
            .iter()
            .map(|&prompt| {
                let group = Group { chunk: 64, ..base.clone() };
                bits(&group.logits(&checkpoint, &[prompt])).remove(0)
            })
            .collect();
        let cases: [(&[u32], usize, usize); 6] = [
            (&[1], 2, 1),
            (&[1], 1, 7),
            (&[1, 1], 1, 16),
            (&[2, 1], 2, 5),
            (&[1, 1, 1], 1, 64),
            (&[1, 1, 2, 1], 1, 3),
        ];
        for (shares, threads, chunk) in cases {
            let group = Group { shares, threads, chunk, ..base.clone() };
            let got = bits(&group.logits(&checkpoint, &together));
            assert!(got == alone, "{format:?}, {group:?}");
        }
        let (_, apart) = open(&tiny(format, false));
        let group = Group { chunk: 16, ..base.clone() };
        assert!(bits(&group.logits(&apart, &together)) == alone, "{format:?}, tensors apart");
    }
}

#[test]
fn a_step_reads_the_experts_that_its_tokens_take() {
    let open = |name: &str| Checkpoint::open(name.as_ref()).unwrap();
    let expert = 3 * 256 * 512;
    let attention = (4 + 2 + 2 + 4) * 64 * 256;
    let demand = Demand::of(&open("synthetic:mixtral-tiny:q8_0"), evener_proto::KvFormat::F16);
    let layer = attention + 4 * 256 + 2 * expert;
    assert_eq!(demand.layer_weights, 2 * layer);
    assert_eq!(demand.expert_bytes, 2 * 4 * expert / 32 * 34);
    let idle = |n_tokens| (demand.step_bytes as f64 - demand.bytes_of_step(n_tokens)).round();
    assert_eq!(idle(1), (demand.expert_bytes / 2) as f64);
    assert_eq!(idle(3), (demand.expert_bytes / 8) as f64);
    let dense = Demand::of(&open("synthetic:llama-tiny:q8_0"), evener_proto::KvFormat::F16);
    assert_eq!(dense.bytes_of_step(1), dense.step_bytes as f64);
}

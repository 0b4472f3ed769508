//! Models in bf16 and f16: logits of the whole path against candle-transformers' Llama in f32 on
//! the same file, and the same bits over splits, threads and batches.

#![allow(clippy::unwrap_used)]

mod support;

use candle_core::quantized::GgmlDType;
use evener_worker::backend::{Activations, Kind, KvFormat};
use evener_worker::checkpoint::{Checkpoint, FileBytes};

use support::group::Group;
use support::logits::oracle;
use support::tiny_model::TinyModel;

const FORMATS: [GgmlDType; 2] = [GgmlDType::BF16, GgmlDType::F16];

/// Of the largest logit. Weights are the same; activations that meet bf16 have at least 16 bits, and
/// sums another order.
const TOLERANCE: f32 = 1e-4;

const N_POSITIONS: usize = 24;

/// Heads, FFN and vocabulary that no tile or leaf divides evenly.
fn tiny(format: GgmlDType) -> TinyModel {
    TinyModel {
        hidden: 192,
        n_heads: 6,
        n_kv_heads: 3,
        head_dim: 32,
        ffn: 352,
        vocab: 301,
        tied_head: false,
        format,
        ..TinyModel::default()
    }
}

fn prompts() -> Vec<Vec<u32>> {
    (0..3).map(|s| (0..N_POSITIONS as u32).map(|i| (i * 37 + s * 101) % 290).collect()).collect()
}

fn checkpoint(format: GgmlDType) -> (Vec<u8>, Checkpoint) {
    let bytes = tiny(format).bytes();
    let checkpoint = Checkpoint::from_bytes(FileBytes::Owned(bytes.clone())).unwrap();
    (bytes, checkpoint)
}

#[test]
fn logits_are_those_of_the_oracle_in_f32() {
    for format in FORMATS {
        let (file, checkpoint) = checkpoint(format);
        let prompts = prompts();
        let inputs: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let group = Group {
            kind: Kind::Cpu,
            threads: 2,
            chunk: 16,
            kv_format: KvFormat::F32,
            ..Group::default()
        };
        for (prompt, got) in prompts.iter().zip(group.logits(&checkpoint, &inputs)) {
            let want = oracle(&file, prompt);
            assert_eq!(got.len(), want.len());
            let largest = want.iter().fold(0f32, |max, x| max.max(x.abs()));
            let worst = got.iter().zip(&want).fold(0f32, |max, (a, b)| max.max((a - b).abs()));
            println!("{format:?}: off by {worst} of {largest}");
            assert!(largest > 1e-2, "logits of zero show nothing");
            assert!(worst <= TOLERANCE * largest, "{format:?}: off by {worst} of {largest}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_splits_threads_or_batch() {
    let bits = |logits: &[f32]| logits.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let both = [Activations::Int12, Activations::Int8];
    for (format, activations) in FORMATS.into_iter().flat_map(|f| both.map(|a| (f, a))) {
        let (_, checkpoint) = checkpoint(format);
        let base = Group { kv_format: KvFormat::F32, activations, ..Group::default() };
        let prompts = prompts();
        let alone: Vec<Vec<u32>> = prompts
            .iter()
            .map(|prompt| {
                let group = Group { chunk: 64, ..base.clone() };
                bits(&group.logits(&checkpoint, &[prompt])[0])
            })
            .collect();
        let together: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
        let cases: [(&[u32], usize, usize); 5] =
            [(&[1], 2, 1), (&[1], 1, 7), (&[1, 1], 1, 16), (&[2, 1], 2, 5), (&[1, 1, 1], 1, 64)];
        for (shares, threads, chunk) in cases {
            let group = Group { shares, threads, chunk, ..base.clone() };
            let got: Vec<_> =
                group.logits(&checkpoint, &together).iter().map(|l| bits(l)).collect();
            assert!(got == alone, "{format:?}, {group:?}");
        }
    }
}

//! The CUDA backend as a whole, on its emulation, or on a card (`make gpu-test`): tiny models in every
//! format and with every kind of cache, against plain f32 tensors; steps replayed from graphs; ranks
//! of unequal shares, which sum on their devices or through their hosts.
//!
//! The emulation shows that the kernels, their launches and their buffers compute the right thing.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use candle_core::quantized::GgmlDType;
use evener_collective::{AbortHandle, Collective, Mesh, Options};
use evener_worker::backend::{Backend, Kind, KvFormat, introduce};
use evener_worker::checkpoint::{Checkpoint, FileBytes};
use evener_worker::model::{families, shard};

use support::group::{Group, Meet, cuda, first_step};
use support::logits::{compare, sequences};
use support::tiny_model::TinyModel;

/// Of the largest logit. The reference keeps f32; the cache keeps 11 bits, so do queries and weights
/// of attention where tensor cores multiply them, and activations.
const TOLERANCE: f32 = 3e-3;
/// Where a processor has a part: it rounds activations to 12 bits.
const MIXED_TOLERANCE: f32 = 2e-2;
/// Where the cache keeps 8 bits a number.
const INT8_CACHE_TOLERANCE: f32 = 3e-2;
/// Where more than 8 tokens meet weights of bf16, or more than 48 others, activations and weights are
/// rounded to bf16: 8 bits, on the way through each of two layers.
const BF16_TOLERANCE: f32 = 2e-2;
/// Of the largest logit of 30 layers: the processor rounds activations to 12 bits, the card to 11.
const DEMO_TOLERANCE: f32 = 2e-2;

fn checkpoint(model: &TinyModel) -> Checkpoint {
    Checkpoint::from_bytes(FileBytes::Owned(model.bytes())).unwrap()
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
        Group { kind, shares, chunk, kv_format, ..Group::default() }.logits(&checkpoint, &sequences)
    });
    let about = format!("{:?}, {shares:?}, {kv_format:?}, chunk {chunk}, {lens:?}", model.format);
    compare(&want, &got, tolerance, &about);
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
        // Six tokens, four, and one.
        check(&model, &[1], KvFormat::F16, 3, &[7, 4], tolerance);
    }
}

#[test]
fn many_tokens_of_every_quantised_format_agree_with_plain_tensors() {
    for format in [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ] {
        let model = TinyModel { format, hidden: 256, ffn: 512, ..TinyModel::default() };
        // Weights are turned to bf16 for so many.
        check(&model, &[1], KvFormat::F16, 60, &[60], BF16_TOLERANCE);
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
        check(&model, &[1], kv_format, 24, &[275, 101], tolerance);
    }
}

#[test]
fn prompts_of_heads_of_any_number_and_size_agree_with_plain_tensors() {
    // Tiles that are full, that end among a row's heads and that are nearly empty; contexts that end
    // within a KV block, and begin long before the rows that are asked.
    for (head_dim, n_heads, n_kv_heads) in [(64, 7, 1), (96, 4, 4), (128, 12, 2), (256, 5, 1)] {
        let model = TinyModel {
            format: GgmlDType::Q8_0,
            hidden: 128,
            n_heads,
            n_kv_heads,
            head_dim,
            context_length: 200,
            ..TinyModel::default()
        };
        check(&model, &[1], KvFormat::F16, 23, &[151, 67], TOLERANCE);
    }
}

#[test]
fn ranks_of_unequal_shares_agree_with_plain_tensors() {
    for shares in [&[1, 1][..], &[3, 1, 2]] {
        check(&TinyModel::default(), shares, KvFormat::F16, 5, &[12, 9], TOLERANCE);
    }
    // Cuts within what four tokens and one take at once of a row.
    for format in [GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K] {
        let model = TinyModel { format, hidden: 256, ffn: 768, ..TinyModel::default() };
        check(&model, &[3, 1, 2], KvFormat::F16, 2, &[5, 4], TOLERANCE);
    }
}

#[test]
fn a_processor_and_a_card_make_a_group() {
    let model = TinyModel { format: GgmlDType::Q8_0, ..TinyModel::default() };
    let (checkpoint, sequences) = (checkpoint(&model), sequences(&[12, 9]));
    let sequences: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let group = |kind, shares| Group { kind, shares, chunk: 5, ..Group::default() };
    let want = group(Kind::Reference, &[1][..]).logits(&checkpoint, &sequences);
    let (shares, vocab) = (&[1, 2][..], checkpoint.config.vocab);
    let split = shard::split(&checkpoint.config, shares).unwrap();
    let program = |rank| families::compile(&checkpoint.config, &split, rank);
    for kinds in [[Kind::Cpu, cuda()], [cuda(), Kind::Cpu]] {
        let (group, meet) = (group(Kind::Cpu, shares), Meet::OnDevices);
        let got = group.run_mixed(&kinds, meet, &checkpoint, &program, vocab, &sequences);
        compare(&want, &got, MIXED_TOLERANCE, &format!("{kinds:?}"));
    }
}

#[test]
fn the_demo_model_agrees_with_the_processor() {
    let checkpoint = Checkpoint::open(&support::real_model()).unwrap();
    let tokens: [u32; 7] = [1, 4093, 198, 504, 3575, 282, 4649];
    let [want, got] = [Kind::Cpu, cuda()].map(|kind| {
        let group = Group { kind, chunk: tokens.len(), ..Group::default() };
        group.logits(&checkpoint, &[&tokens])
    });
    compare(&want, &got, DEMO_TOLERANCE, "the demo model");
}

#[test]
fn steps_replayed_from_graphs_agree_with_plain_tensors() {
    // One token a step: the first of each bucket runs, the second is recorded, all others are
    // replayed with other tokens, positions and blocks. The third sequence ends early, so that the
    // bucket changes under way.
    check(&TinyModel::default(), &[1], KvFormat::F16, 1, &[24, 24, 7], TOLERANCE);
}

#[test]
fn ranks_that_sum_on_their_devices_agree_with_plain_tensors() {
    let (checkpoint, tokens) = (checkpoint(&TinyModel::default()), sequences(&[20, 17]));
    let sequences: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let vocab = checkpoint.config.vocab;
    let group = |kind, shares, chunk| Group { kind, shares, chunk, ..Group::default() };
    let want = group(Kind::Reference, &[1][..], 20).logits(&checkpoint, &sequences);
    // By single tokens, whose steps are replayed from graphs, sums and all; and by prompts. A rank
    // of the last has no part of attention: it adds zeros.
    for (shares, chunk) in [(&[1, 1][..], 1), (&[3, 1, 2], 17), (&[9, 9, 1], 17)] {
        let split = shard::split(&checkpoint.config, shares).unwrap();
        let program = |rank| families::compile(&checkpoint.config, &split, rank);
        let (group, kinds) = (group(cuda(), shares, chunk), vec![cuda(); shares.len()]);
        let got =
            group.run_mixed(&kinds, Meet::OnDevices, &checkpoint, &program, vocab, &sequences);
        compare(&want, &got, TOLERANCE, &format!("{shares:?}, chunk {chunk}"));
    }
}

/// How a step of rank 0 ends when rank 1 does `instead` of it, which hears of that end. Then the two
/// do the step in another epoch.
fn step_ended_by(timeout: Duration, instead: fn(Mesh, &AbortHandle, &Receiver<()>)) -> String {
    let (checkpoint, tokens) = (checkpoint(&TinyModel::default()), sequences(&[3]));
    let sequences: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let shares = &[1, 1];
    let group = Group { kind: cuda(), shares, chunk: 3, ..Group::default() };
    let split = shard::split(&checkpoint.config, shares).unwrap();
    let [mut one, mut other] = [0, 1].map(|rank| {
        let program = families::compile(&checkpoint.config, &split, rank);
        group.load(cuda(), &checkpoint, program, &sequences)
    });
    let step = first_step(&sequences, 3);
    let meshes = || -> [Mesh; 2] {
        let meshes = Mesh::local(2, 1, &Options::default()).unwrap();
        meshes.try_into().ok().unwrap()
    };
    let introduced = |backend: &mut dyn Backend, mut mesh: Mesh| {
        introduce(backend, false, 0, &mut mesh).unwrap();
        mesh
    };
    let ([mine, theirs], (ended, hears)) = (meshes(), channel());
    let said = std::thread::scope(|scope| {
        let (abort, other) = (mine.abort_handle(), other.as_mut());
        scope.spawn(move || instead(introduced(other, theirs), &abort, &hears));
        let mut mesh = introduced(one.as_mut(), mine);
        mesh.set_step_timeout(timeout);
        let error = one.run(&step, &mut mesh).unwrap_err();
        ended.send(()).unwrap_or(()); // it may have gone by itself
        error.to_string()
    });
    let [mine, theirs] = meshes();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| {
            let mut mesh = introduced(other.as_mut(), theirs);
            other.run(&step, &mut mesh).unwrap();
            mesh // kept until both have ended
        });
        let mut mesh = introduced(one.as_mut(), mine);
        one.run(&step, &mut mesh).unwrap();
        assert!(one.logits().iter().all(|logit| logit.is_finite()));
        second.join().unwrap();
    });
    said
}

#[test]
fn a_step_ends_when_another_rank_stalls() {
    let said = step_ended_by(Duration::from_millis(50), |mesh, _, ended| {
        ended.recv().unwrap();
        drop(mesh);
    });
    assert!(said.contains("waited") && said.contains("ranks [1]"), "{said}");
}

#[test]
fn a_step_ends_when_another_rank_is_lost() {
    let said = step_ended_by(Duration::from_secs(300), |mesh, _, _| drop(mesh));
    assert!(said.contains("rank 1 is lost"), "{said}");
}

#[test]
fn a_step_ends_when_the_group_is_aborted() {
    let said = step_ended_by(Duration::from_secs(300), |_mesh, abort, ended| {
        abort.abort("enough");
        ended.recv().unwrap();
    });
    assert!(said.contains("enough"), "{said}");
}

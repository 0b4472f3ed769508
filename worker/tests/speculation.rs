//! Drafts change when tokens come, never which: answers with them are those without, bit for bit,
//! whatever the sampling, the split, the company, a scarce cache and prefixes from it.

#![allow(clippy::unwrap_used)]

mod support;

use evener_worker::backend::KV_BLOCK_LEN;
use evener_worker::checkpoint::{Checkpoint, FileBytes};
use evener_worker::engine::output::{End, TokenOut};
use evener_worker::engine::sampler::{Penalties, Sampling};
use evener_worker::engine::sequence::{Finish, Origin, Spec};

use support::serving::{Outcome, Serving};
use support::tiny_model::TinyModel;

const CONTEXT: usize = 320;
const MAX_TOKENS: u32 = 90;
const MAX_DRAFTS: usize = 8;

fn checkpoint() -> Checkpoint {
    let model = TinyModel { context_length: CONTEXT, ..TinyModel::default() };
    Checkpoint::from_bytes(FileBytes::Owned(model.bytes())).unwrap()
}

/// Ways to choose, of which each has something to do with the tokens before.
fn samplings() -> Vec<(&'static str, Sampling)> {
    let plain = Sampling::default();
    // A random model's logits are close to each other: at this temperature it repeats itself often,
    // and not always.
    let warm = Sampling { temperature: 0.05, ..plain.clone() };
    let penalties = Penalties { repetition: 1.02, presence: 0.05, frequency: 0.01 };
    vec![
        ("greedy", plain.clone()),
        ("top-k", Sampling { top_k: 20, ..warm.clone() }),
        ("nucleus", Sampling { top_p: 0.9, ..warm.clone() }),
        ("min-p", Sampling { min_p: 0.05, ..warm.clone() }),
        ("any token", Sampling { temperature: 0.3, ..plain.clone() }),
        ("penalties", Sampling { penalties, ..warm.clone() }),
        ("frequency", {
            let penalties = Penalties { frequency: 0.02, ..Penalties::default() };
            Sampling { penalties, ..plain.clone() }
        }),
        ("bias", Sampling { logit_bias: vec![(7, 1.5), (9, -100.0)], ..warm.clone() }),
        ("log-probabilities", Sampling { n_logprobs: Some(3), ..plain.clone() }),
        ("both", Sampling { n_logprobs: Some(0), penalties, ..warm }),
    ]
}

/// Three choices of a prompt that repeats itself, with this sampling.
fn specs(sampling: &Sampling, nth: usize) -> Vec<Spec> {
    let phrase = |i: usize| 3 + (i * 37 + nth * 11) as u32 % 250;
    let n_prompt = 40 + 13 * nth;
    let prompt: Vec<u32> = (0..n_prompt).map(|i| phrase(i % 17)).collect();
    let spec = |seed| Spec {
        prompt: prompt.clone(),
        max_tokens: MAX_TOKENS,
        sampling: Sampling { seed, ..sampling.clone() },
        prompt_logprobs: nth.is_multiple_of(4),
        origin: Origin { priority: seed as i32 % 2, ..Origin::default() },
    };
    (0..3).map(spec).collect()
}

fn all_specs() -> Vec<Spec> {
    let samplings = samplings();
    let of_each = samplings.iter().enumerate().map(|(nth, (_, sampling))| specs(sampling, nth));
    let mut all: Vec<Spec> = of_each.flatten().collect();
    // And some that end otherwise: at tokens that the plain ones chose, or not before so many.
    let ends = all[..9].to_vec();
    for (mut spec, stop) in ends.into_iter().zip(10..) {
        spec.sampling.stop_token_ids = (stop..260).step_by(3).collect();
        spec.sampling.min_tokens = stop * 2;
        all.push(spec);
    }
    all
}

/// With bits of floats, so that equal is equal.
type Seen = (Vec<(u32, Option<u32>, Vec<(u32, u32)>)>, Vec<(u32, Option<u32>)>, Option<End>);

fn seen(outcome: Outcome) -> Seen {
    let bits = |token: &TokenOut| (token.id, token.logprob.map(f32::to_bits));
    let prompt = outcome.prompt_tokens.iter().map(bits).collect();
    let token = |token: TokenOut| {
        let top = token.top.iter().map(|&(id, logprob)| (id, logprob.to_bits())).collect();
        (token.id, token.logprob.map(f32::to_bits), top)
    };
    (outcome.tokens.into_iter().map(token).collect(), prompt, outcome.end)
}

/// One by one, without drafts.
fn plain(checkpoint: &Checkpoint) -> Vec<Seen> {
    let serving = Serving::start(checkpoint, 1);
    let outcomes = all_specs().into_iter().map(|spec| serving.run([spec]).remove(0));
    let plain = outcomes.map(seen).collect();
    assert_eq!(serving.figures.drafted_total(), 0, "off unless asked for");
    serving.leave();
    plain
}

#[test]
fn drafts_change_no_bit() {
    let checkpoint = checkpoint();
    let plain = plain(&checkpoint);
    let stopped = plain.iter().filter(|(.., end)| *end == Some(End::Finished(Finish::Stop)));
    assert!(stopped.count() > 3, "some end at stop tokens");
    let plenty = 8 * CONTEXT.div_ceil(KV_BLOCK_LEN) as u32;
    // Just enough for the longest alone.
    let scarce = (CONTEXT / KV_BLOCK_LEN) as u32;
    for (world_size, n_kv_blocks) in
        [(1, plenty), (2, plenty), (3, plenty), (1, scarce), (2, scarce)]
    {
        let serving = Serving::drafting(&checkpoint, world_size, n_kv_blocks, MAX_DRAFTS);
        // Alone, then in company, of others and of what the cache kept.
        let alone: Vec<Outcome> =
            all_specs().into_iter().map(|spec| serving.run([spec]).remove(0)).collect();
        let together = serving.run(all_specs());
        for (what, outcomes) in [("alone", alone), ("together", together)] {
            for (nth, (outcome, expect)) in outcomes.into_iter().zip(&plain).enumerate() {
                let same = seen(outcome) == *expect;
                assert!(same, "{nth} {what}, {world_size} ranks, {n_kv_blocks} blocks");
            }
        }
        let (n_drafted, n_right) =
            (serving.figures.drafted_total(), serving.figures.drafts_right_total());
        let n_preempted = serving.figures.preemptions_total();
        println!("{world_size} ranks: {n_right} of {n_drafted} right, {n_preempted} preempted");
        assert!(n_right > 100, "{n_right} drafts were right: nothing is tested");
        assert!(n_drafted > n_right + 50, "{n_right} of {n_drafted} drafts were right");
        assert_eq!(n_preempted > 3, n_kv_blocks == scarce, "{n_preempted}");
        serving.leave();
    }
}

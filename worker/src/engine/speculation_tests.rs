//! A group of one sequence or more with a clock of its own: what a step takes is a function of its
//! rows, and the next token one of the text.

use super::*;
use crate::engine::chosen::Chosen;
use crate::engine::sampler::Sampling;
use crate::engine::scheduler::Options;
use crate::engine::sequence::{Origin, Spec};
use crate::engine::step::{Limits, StepPlan};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn options() -> Options {
    Options::new(Limits {
        n_slots: 8,
        max_batch_tokens: 64,
        max_sample_rows: 40,
        max_context: 8192,
        n_kv_blocks: 4096,
        vocab: 100_000,
    })
}

/// What came of a run.
#[derive(Debug, Default)]
struct Run {
    seconds: f64,
    n_tokens: usize,
    n_steps: usize,
    n_drafts: usize,
    n_right: usize,
}

impl Run {
    /// So many times faster than a token a step.
    fn speed_up(&self, step_s: f64, n_sequences: usize) -> f64 {
        (self.n_tokens / n_sequences) as f64 * step_s / self.seconds
    }
}

const PLAIN_S: f64 = 0.010;

/// Sequences that all have this prompt and these answers.
fn run(max_drafts: usize, draft_s: f64, prompt: &[u32], answers: &[Vec<u32>]) -> Run {
    run_with(max_drafts, draft_s, prompt, answers, &Sampling::default())
}

fn run_with(
    max_drafts: usize,
    draft_s: f64,
    prompt: &[u32],
    answers: &[Vec<u32>],
    sampling: &Sampling,
) -> Run {
    let mut scheduler = Scheduler::new(options());
    let mut ids = Vec::new();
    for answer in answers {
        let (prompt, max_tokens) = (prompt.to_vec(), answer.len() as u32);
        let (sampling, origin) = (sampling.clone(), Origin::default());
        let spec = Spec { prompt, max_tokens, sampling, prompt_logprobs: false, origin };
        ids.push(scheduler.submit(spec).unwrap());
    }
    let mut speculation = Speculation::new(max_drafts, 8);
    let (mut pace, mut plan, mut out) = (Pace::new(2.0), StepPlan::default(), Vec::new());
    let mut run = Run::default();
    loop {
        speculation.draft(&mut scheduler, &pace);
        if !scheduler.schedule(&mut plan, usize::MAX) {
            return run;
        }
        let (mut chosen, mut n_drafts) = (Chosen::default(), 0);
        for (entry_idx, entry) in plan.entries.iter().enumerate() {
            let sequence = scheduler.scheduled(entry_idx);
            let answer = ids.iter().position(|&id| id == sequence.id).unwrap();
            if sequence.n_planned == sequence.tokens.len() {
                let left = &answers[answer][sequence.n_generated()..];
                let right = left.iter().zip(&sequence.drafts).take_while(|(a, b)| a == b).count();
                left[..=right].iter().for_each(|&token| chosen.push(token));
                speculation.verified(entry.slot, sequence, right);
                run.n_right += right;
            }
            n_drafts += sequence.drafts.len();
            chosen.end_entry();
        }
        let n_decodes = plan.entries.len();
        let n_prefill = plan.tokens.len() - n_drafts - n_decodes;
        let s = PLAIN_S + draft_s * (n_drafts + n_prefill) as f64;
        let took = Duration::from_secs_f64(s);
        match n_drafts {
            0 => pace.observe(n_decodes, n_prefill, took),
            _ => speculation.observe(n_decodes, n_drafts, took),
        }
        if n_prefill == 0 {
            (run.seconds, run.n_steps) = (run.seconds + s, run.n_steps + 1);
        }
        run.n_drafts += n_drafts;
        out.clear();
        scheduler.commit(&plan, &chosen, &mut out);
        run.n_tokens += if n_prefill == 0 { out.len() } else { 0 };
    }
}

/// No pair of tokens twice.
fn text(n: u32) -> Vec<u32> {
    (10..10 + n).collect()
}

/// Of few tokens, without any order: there are matches, and they tell nothing.
fn noise(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(0..20)).collect()
}

#[test]
fn copied_text_comes_several_tokens_a_step() {
    // A tenth of a step for each draft: nine tokens cost as much as two steps at most.
    let run = run(8, 0.1 * PLAIN_S, &text(300), &[text(300)]);
    assert!(run.speed_up(PLAIN_S, 1) > 4.0, "{run:?}");
    assert!(run.n_right * 10 > run.n_drafts * 9, "{run:?}");
}

#[test]
fn an_edited_copy_is_followed_again_after_each_edit() {
    let mut edited = text(300);
    (20..300).step_by(25).for_each(|at| edited[at] = 5000 + at as u32);
    let run = run(8, 0.1 * PLAIN_S, &text(300), &[edited]);
    assert!(run.speed_up(PLAIN_S, 1) > 2.5, "{run:?}");
}

#[test]
fn where_nothing_is_right_little_is_lost() {
    for draft_s in [0.05, 0.3, 1.0] {
        for seed in 0..5 {
            let run = run(8, draft_s * PLAIN_S, &noise(200, seed), &[noise(2000, 100 + seed)]);
            assert!(run.n_drafts > 0, "it was tried: {run:?}");
            assert!(run.speed_up(PLAIN_S, 1) > 0.97, "{draft_s} {run:?}");
        }
    }
}

#[test]
fn right_drafts_that_cost_what_they_bring_are_left() {
    for draft_s in [1.0, 1.5] {
        let run = run(8, draft_s * PLAIN_S, &text(1000), &[text(1000)]);
        assert!(run.speed_up(PLAIN_S, 1) > 0.97, "{draft_s} {run:?}");
    }
}

#[test]
fn tries_become_rarer_and_a_copy_after_long_noise_is_still_seen() {
    let mut answer = noise(4000, 1);
    let before = run(8, 0.3 * PLAIN_S, &text(300), &[answer.clone()]);
    let first = run(8, 0.3 * PLAIN_S, &text(300), &[answer[..1000].to_vec()]);
    assert!(before.n_drafts < 3 * first.n_drafts, "{before:?} {first:?}");
    answer.extend(text(300));
    let after = run(8, 0.3 * PLAIN_S, &text(300), &[answer]);
    let [steps, tokens] = [after.n_steps - before.n_steps, after.n_tokens - before.n_tokens];
    assert!(tokens == 300 && steps < 150, "{steps} steps");
}

#[test]
fn those_who_gain_share_a_step_with_those_who_do_not() {
    let answers: Vec<Vec<u32>> =
        (0..8).map(|i| if i % 2 == 0 { text(400) } else { noise(400, i) }).collect();
    let run = run(8, 0.02 * PLAIN_S, &text(400), &answers);
    assert!(run.n_right * 10 > run.n_drafts * 8, "{run:?}");
    // Four of eight end in a quarter of the steps, the others come token by token.
    assert!(run.n_steps < 430, "{run:?}");
    assert!(run.n_drafts > 4 * 300, "{run:?}");
}

#[test]
fn the_end_of_an_answer_is_not_drafted_beyond() {
    for n in 1..30 {
        let run = run(8, 0.0, &text(100), &[text(n)]);
        assert_eq!(run.n_tokens, n as usize - 1, "the first comes with the prompt");
    }
    // 50 is in the prompt, and ends the answer: no draft reaches it.
    let sampling = Sampling { stop_token_ids: vec![50], ..Sampling::default() };
    let answer: Vec<u32> = (10..51).collect();
    let run = run_with(8, 0.0, &text(100), &[answer], &sampling);
    assert_eq!((run.n_tokens, run.n_right), (40, run.n_drafts));
}

#[test]
fn off_is_off() {
    let run = run(0, 0.0, &text(300), &[text(300)]);
    assert_eq!((run.n_drafts, run.n_steps), (0, 299));
}

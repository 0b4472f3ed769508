//! Tables for `scheduler.rs`: who is in a step, who waits, and who gives way.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::engine::sampler::Sampling;
use crate::engine::sequence::Origin;

fn options(n_kv_blocks: u32) -> Options {
    let limits = Limits {
        n_slots: 4,
        max_batch_tokens: 32,
        max_sample_rows: 6,
        max_context: 200,
        n_kv_blocks,
        vocab: 1000,
    };
    Options { max_waiting: 5, ..Options::new(limits) }
}

/// A prompt like no other.
fn spec(prompt_len: usize, max_tokens: u32) -> Spec {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = NEXT.fetch_add(1, Ordering::Relaxed) % 900;
    let prompt = (0..prompt_len as u32).map(|i| if i == 0 { first } else { i }).collect();
    let (sampling, origin) = (Sampling::default(), Origin::default());
    Spec { prompt, max_tokens, sampling, prompt_logprobs: false, origin }
}

/// The same prompt each time.
fn common(prompt_len: usize, max_tokens: u32) -> Spec {
    Spec { prompt: (0..prompt_len as u32).collect(), ..spec(1, max_tokens) }
}

fn of(user: &str, priority: i32, spec: Spec) -> Spec {
    Spec { origin: Origin { user: user.to_owned(), priority, ..Origin::default() }, ..spec }
}

/// (slot, start, tokens, sampled)
type Brief = (u32, u32, u32, u32);

/// One step in which every sampled token is 7, and no draft is.
fn step(scheduler: &mut Scheduler) -> (Vec<Brief>, Vec<Committed>) {
    step_with(scheduler, usize::MAX)
}

fn step_with(scheduler: &mut Scheduler, max_prefill: usize) -> (Vec<Brief>, Vec<Committed>) {
    let (mut plan, mut out) = (StepPlan::default(), Vec::new());
    if scheduler.schedule(&mut plan, max_prefill) {
        let chosen: Chosen = (0..plan.entries.len())
            .map(|at| {
                let end = plan.entries[at].start + plan.entries[at].n_tokens;
                (end as usize >= scheduler.scheduled(at).tokens.len()).then_some(7)
            })
            .collect();
        scheduler.commit(&plan, &chosen, &mut out);
    }
    let entry = |e: &Entry| (e.slot, e.start, e.n_tokens, e.n_sampled);
    (plan.entries.iter().map(entry).collect(), out)
}

/// Steps until nothing is left; sequences in the order of their ends.
fn finish(scheduler: &mut Scheduler) -> Vec<SequenceId> {
    let mut ends = Vec::new();
    while !scheduler.is_idle() {
        let (entries, committed) = step(scheduler);
        assert!(!entries.is_empty(), "what can run does run");
        ends.extend(committed.iter().filter(|c| c.finish.is_some()).map(|c| c.id));
    }
    ends
}

#[test]
fn decodes_come_first_and_prefill_gets_the_rest() {
    let mut scheduler = Scheduler::new(options(64));
    scheduler.submit(spec(3, 9)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(0, 0, 3, 1)]);
    scheduler.submit(spec(100, 1)).unwrap();
    scheduler.submit(spec(2, 2)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(0, 3, 1, 1), (1, 0, 31, 0)]);
    assert_eq!(step(&mut scheduler).0, [(0, 4, 1, 1), (1, 31, 31, 0)]);
    assert_eq!(step(&mut scheduler).0, [(0, 5, 1, 1), (1, 62, 31, 0)]);
    let (entries, committed) = step(&mut scheduler);
    assert_eq!(entries, [(0, 6, 1, 1), (1, 93, 7, 1), (2, 0, 2, 1)]);
    let finish = committed.iter().map(|c| c.finish).collect::<Vec<_>>();
    assert_eq!(finish, [None, Some(Finish::Length), None]);
}

#[test]
fn prefill_beside_decodes_is_bounded_and_alone_it_is_not() {
    let mut scheduler = Scheduler::new(options(64));
    scheduler.submit(spec(40, 3)).unwrap();
    assert_eq!(step_with(&mut scheduler, 5).0, [(0, 0, 32, 0)]);
    assert_eq!(step_with(&mut scheduler, 5).0, [(0, 32, 8, 1)]);
    scheduler.submit(of("", -1, spec(40, 1))).unwrap();
    assert_eq!(step_with(&mut scheduler, 5).0, [(0, 40, 1, 1), (1, 0, 5, 0)]);
    // The newcomer stands before the first, and still leaves its token to it.
    assert_eq!(step_with(&mut scheduler, 5).0, [(1, 5, 5, 0), (0, 41, 1, 1)]);
    assert_eq!(step_with(&mut scheduler, 5).0, [(1, 10, 30, 1)]);
}

#[test]
fn a_sequence_waits_for_the_blocks_of_its_prompt_and_one_more_each() {
    let mut scheduler = Scheduler::new(options(4));
    scheduler.submit(spec(1, 48)).unwrap();
    let second = scheduler.submit(spec(33, 1)).unwrap(); // three blocks
    scheduler.submit(spec(17, 1)).unwrap(); // two, but it came later
    assert_eq!(step(&mut scheduler).0.len(), 1);
    assert_eq!((scheduler.n_running(), scheduler.n_waiting()), (1, 2));
    assert!(scheduler.cancel(second));
    assert_eq!(step(&mut scheduler).0.len(), 2);
}

#[test]
fn the_last_in_rank_is_preempted_and_goes_on_where_it_was() {
    let mut scheduler = Scheduler::new(options(5));
    let urgent = scheduler.submit(of("", -1, spec(30, 40))).unwrap();
    let first = scheduler.submit(spec(14, 40)).unwrap();
    step(&mut scheduler);
    step(&mut scheduler);
    assert_eq!(scheduler.n_running(), 2);
    let mut tokens = [0, 0];
    let mut ends = Vec::new();
    while !scheduler.is_idle() {
        for Committed { id, finish, .. } in step(&mut scheduler).1 {
            tokens[usize::from(id == first)] += 1;
            ends.extend(finish.map(|_| id));
        }
        scheduler.check_integrity();
    }
    assert!(scheduler.n_preemptions() > 0);
    assert_eq!(ends, [urgent, first]);
    assert_eq!(tokens, [38, 39], "with those of the two steps before, 40 each");
}

#[test]
fn a_preempted_sequence_comes_before_its_equals() {
    let mut scheduler = Scheduler::new(options(5));
    let a = scheduler.submit(spec(30, 48)).unwrap();
    let b = scheduler.submit(spec(14, 40)).unwrap();
    step(&mut scheduler);
    step(&mut scheduler);
    let c = scheduler.submit(of("other", 0, spec(20, 1))).unwrap();
    assert_eq!(finish(&mut scheduler), [a, b, c]);
    assert!(scheduler.n_preemptions() > 0);
}

#[test]
fn a_common_beginning_is_computed_once() {
    let places = |(entries, _): (Vec<Brief>, Vec<Committed>)| {
        entries.into_iter().map(|(_, start, n_tokens, _)| (start, n_tokens)).collect::<Vec<_>>()
    };
    let mut scheduler = Scheduler::new(options(64));
    for _ in 0..3 {
        scheduler.submit(common(24, 2)).unwrap();
    }
    // There is room for 8 more, but who begins now would compute what is being computed.
    assert_eq!(places(step(&mut scheduler)), [(0, 24)]);
    assert_eq!(scheduler.n_running(), 3);
    assert_eq!(places(step(&mut scheduler)), [(24, 1), (23, 1), (23, 1)], "the tail is copied");
    finish(&mut scheduler);
    assert_eq!(scheduler.kv().n_cached(), 1);
    // Another tenant computes all of it; the same one only the last, partial, block.
    scheduler.submit(common(24, 1)).unwrap();
    let salt = "other".to_owned();
    let origin = Origin { salt, ..Origin::default() };
    scheduler.submit(Spec { origin, ..common(24, 1) }).unwrap();
    assert_eq!(places(step(&mut scheduler)), [(16, 8), (0, 24)]);
}

#[test]
fn the_last_token_of_a_prompt_is_computed_even_if_it_is_cached() {
    let mut scheduler = Scheduler::new(options(64));
    scheduler.submit(common(32, 1)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(0, 0, 32, 1)]);
    scheduler.submit(common(32, 1)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(0, 16, 16, 1)]);
    // Log-probabilities of a prompt want all of its rows.
    scheduler.submit(Spec { prompt_logprobs: true, ..common(32, 1) }).unwrap();
    assert_eq!(step(&mut scheduler).0, [(0, 0, 6, 6)]);
}

#[test]
fn cached_tokens_are_those_of_the_prompt_that_were_not_computed() {
    let mut scheduler = Scheduler::new(options(64));
    let n_cached = |scheduler: &mut Scheduler| {
        let mut plan = StepPlan::default();
        assert!(scheduler.schedule(&mut plan, usize::MAX));
        let n = scheduler.scheduled(0).n_cached;
        scheduler.commit(&plan, &[Some(7)].into_iter().collect(), &mut Vec::new());
        n
    };
    scheduler.submit(common(20, 1)).unwrap();
    assert_eq!(n_cached(&mut scheduler), 0);
    scheduler.submit(common(30, 1)).unwrap();
    assert_eq!(n_cached(&mut scheduler), 16);
}

#[test]
fn turns_go_by_priority_then_by_service_then_by_arrival() {
    let mut options = options(64);
    options.limits.n_slots = 1;
    options.max_waiting = 100;
    let mut scheduler = Scheduler::new(options);
    let mut submit = |user: &str, priority| scheduler.submit(of(user, priority, spec(10, 2)));
    let greedy: Vec<_> = (0..4).map(|_| submit("greedy", 0).unwrap()).collect();
    let modest: Vec<_> = (0..2).map(|_| submit("modest", 0).unwrap()).collect();
    let late = submit("greedy", 1).unwrap();
    let urgent = submit("greedy", -1).unwrap();
    // The urgent one is charged to its user like any other.
    let expect = [urgent, modest[0], greedy[0], modest[1], greedy[1], greedy[2], greedy[3], late];
    assert_eq!(finish(&mut scheduler), expect);
}

#[test]
fn prompt_logprobs_sample_every_row_within_bounds() {
    let mut scheduler = Scheduler::new(options(64));
    scheduler.submit(Spec { prompt_logprobs: true, ..spec(15, 3) }).unwrap();
    scheduler.submit(spec(40, 3)).unwrap();
    assert_eq!(step(&mut scheduler).0, [(0, 0, 6, 6)]);
    assert_eq!(step(&mut scheduler).0, [(0, 6, 6, 6)]);
    assert_eq!(step(&mut scheduler).0, [(0, 12, 3, 3), (1, 0, 29, 0)]);
    assert_eq!(step(&mut scheduler).0, [(0, 15, 1, 1), (1, 29, 11, 1)]);
}

#[test]
fn a_preempted_prompt_is_told_about_once() {
    let mut options = options(8);
    options.limits.max_sample_rows = 4;
    let mut scheduler = Scheduler::new(options);
    scheduler.submit(spec(10, 60)).unwrap();
    scheduler.submit(Spec { prompt_logprobs: true, ..spec(90, 4) }).unwrap();
    let (mut n_rows, mut n_tokens) = (0, 0);
    while !scheduler.is_idle() {
        let (entries, committed) = step(&mut scheduler);
        n_rows += entries.iter().map(|entry| entry.3).sum::<u32>();
        n_tokens += committed.len() as u32;
    }
    assert!(scheduler.n_preemptions() > 0);
    assert_eq!((n_tokens, n_rows), (64, 64 + 89), "the last row of the prompt gives a token");
}

#[test]
fn what_can_never_run_is_refused_and_a_full_queue_says_so() {
    let check = |spec: Spec, expect: &str| {
        let error = Scheduler::new(options(8)).submit(spec).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    };
    check(spec(0, 1), "empty");
    check(spec(1, 0), "max_tokens is 0");
    check(spec(100, 101), "context of 200 tokens");
    check(spec(100, u32::MAX), "context of 200 tokens");
    check(spec(100, 100), "need 13 KV blocks; this group has 8");
    check(Spec { prompt: vec![1, 1000], ..spec(1, 1) }, "token id 1000");
    let sampling = Sampling { stop_token_ids: vec![1001], ..Sampling::default() };
    check(Spec { sampling, ..spec(1, 1) }, "token id 1001");
    let sampling = Sampling { logit_bias: vec![(1002, 1.0)], ..Sampling::default() };
    check(Spec { sampling, ..spec(1, 1) }, "token id 1002");
    check(of("", 101, spec(1, 1)), "priority 101 is not from -100 to 100");
    let mut scheduler = Scheduler::new(options(64));
    for _ in 0..5 {
        scheduler.submit(spec(1, 1)).unwrap();
    }
    let refused = scheduler.submit(spec(1, 1));
    assert_eq!(refused, Err(Refusal::Overloaded { waiting: 5 }));
}

/// Of the slots in blocks that sequences hold, the part without a token; the largest of all steps
/// in which 32 sequences decode, whose lengths are spread as the logarithm is even.
fn waste(seed: u64, n_drafts: usize) -> f64 {
    let mut rng = StdRng::seed_from_u64(seed);
    let limits = Limits {
        n_slots: 32,
        max_batch_tokens: 512,
        max_sample_rows: 32 * 9,
        max_context: 4096,
        n_kv_blocks: 4096,
        vocab: 1000,
    };
    let mut scheduler = Scheduler::new(Options { max_waiting: 32, ..Options::new(limits) });
    for _ in 0..32 {
        let prompt_len = 2f64.powf(rng.random_range(5.0..11.0)) as usize; // 32 to 2048
        let prompt = (0..prompt_len).map(|_| rng.random_range(0..1000)).collect();
        scheduler.submit(Spec { prompt, ..spec(1, 300) }).unwrap();
    }
    let mut worst = 0.0f64;
    while scheduler.n_running() + scheduler.n_waiting() == 32 {
        for (_, sequence) in scheduler.decoding_mut() {
            let n_left = sequence.max_tokens - sequence.n_generated();
            sequence.drafts.extend((0..n_drafts.min(n_left - 1)).map(|_| 5));
        }
        step(&mut scheduler);
        if scheduler.n_decoding() == 32 {
            let n_held = scheduler.kv().n_total() - scheduler.kv().n_available();
            let n_tokens: usize = scheduler.running().map(|sequence| sequence.n_computed).sum();
            worst = worst.max(1.0 - n_tokens as f64 / (n_held as usize * KV_BLOCK_LEN) as f64);
        }
    }
    assert!(worst > 0.0, "32 sequences decoded at once");
    worst
}

#[test]
fn less_than_4_percent_of_the_slots_are_wasted() {
    // Drafts that are wrong leave room behind them, which the next tokens take.
    for (n_drafts, most) in [(0, 0.04), (8, 0.06)] {
        let worst = (0..10).map(|seed| waste(seed, n_drafts)).fold(0.0, f64::max);
        println!("{n_drafts} drafts: {:.2} % at the worst", 100.0 * worst);
        assert!(worst < most, "{worst} with {n_drafts} drafts");
    }
}

/// One step in which the decoding sequences bring these drafts and are given these tokens.
fn step_drafting(scheduler: &mut Scheduler, drafts: &[u32], tokens: &[u32]) -> Vec<Brief> {
    let mut plan = StepPlan::default();
    for (_, sequence) in scheduler.decoding_mut() {
        sequence.drafts.extend(drafts);
    }
    assert!(scheduler.schedule(&mut plan, usize::MAX));
    let mut chosen = Chosen::default();
    for _ in &plan.entries {
        tokens.iter().for_each(|&token| chosen.push(token));
        chosen.end_entry();
    }
    let mut out = Vec::new();
    scheduler.commit(&plan, &chosen, &mut out);
    assert!(out.iter().map(|c| c.token).eq(tokens.iter().copied().cycle().take(out.len())));
    plan.entries.iter().map(|e| (e.slot, e.start, e.n_tokens, e.n_sampled)).collect()
}

#[test]
fn right_drafts_are_kept_and_wrong_ones_computed_again() {
    let mut scheduler = Scheduler::new(options(64));
    scheduler.submit(spec(14, 30)).unwrap();
    step(&mut scheduler);
    assert_eq!(step_drafting(&mut scheduler, &[5, 6, 7], &[5, 6, 9]), [(0, 14, 4, 4)]);
    assert_eq!(step_drafting(&mut scheduler, &[1, 2], &[3]), [(0, 17, 3, 3)]);
    assert_eq!(step(&mut scheduler).0, [(0, 18, 1, 1)]);
    let tokens = &scheduler.running_mut(0).tokens;
    assert_eq!(tokens[14..], [7, 5, 6, 9, 3, 7]);
}

#[test]
fn a_block_full_of_drafts_has_no_name() {
    let n_cached = |tokens: &[u32]| {
        let mut scheduler = Scheduler::new(options(64));
        let id = scheduler.submit(common(12, 20)).unwrap();
        step(&mut scheduler);
        step_drafting(&mut scheduler, &[40, 41, 42, 43], tokens);
        scheduler.cancel(id);
        scheduler.kv().n_cached()
    };
    assert_eq!(n_cached(&[40, 41, 42, 43, 44]), 1);
    assert_eq!(n_cached(&[40, 41, 42, 50]), 1);
    assert_eq!(n_cached(&[40, 41, 50]), 0);
    assert_eq!(n_cached(&[50]), 0);
}

#[test]
fn drafts_take_no_block_from_anyone_and_no_room_from_prefill() {
    let mut scheduler = Scheduler::new(options(3));
    scheduler.submit(spec(15, 20)).unwrap();
    scheduler.submit(spec(13, 9)).unwrap();
    step(&mut scheduler);
    // One block is left for two: the first needs none yet, and its drafts get none.
    assert_eq!(scheduler.room_for_drafts(), 4);
    let entries = step_drafting(&mut scheduler, &[5, 6], &[9]);
    assert_eq!(entries, [(0, 15, 1, 1), (1, 13, 3, 3)], "as many as fit the blocks that are held");
    let mut scheduler = Scheduler::new(options(64));
    scheduler.submit(spec(15, 20)).unwrap();
    step(&mut scheduler);
    assert_eq!(scheduler.room_for_drafts(), 5);
    scheduler.submit(spec(40, 20)).unwrap();
    assert_eq!(scheduler.room_for_drafts(), 0, "prefill will come");
    step(&mut scheduler);
    assert_eq!(scheduler.room_for_drafts(), 0, "prefill is not done");
    step(&mut scheduler);
    assert_eq!(scheduler.room_for_drafts(), 4);
}

#[test]
fn ids_that_are_gone_cancel_nothing() {
    let mut scheduler = Scheduler::new(options(64));
    let id = scheduler.submit(spec(1, 1)).unwrap();
    assert!(scheduler.cancel(id));
    assert!(!scheduler.cancel(id));
    assert_eq!(scheduler.n_waiting(), 0);
}

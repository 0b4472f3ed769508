//! The engine as a whole: groups of ranks as threads over local links, with a backend whose logits
//! depend on every token of a sequence, so that a wrong block, position or slot shows.
#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use evener_collective::{AbortHandle, Collective, Mesh, Options as MeshOptions, Tag};
use evener_worker::backend::{Backend, Batch, Error as BackendError, KV_BLOCK_LEN};
use evener_worker::engine::output::{End, Event, StreamEnd};
use evener_worker::engine::probe::{Batching, group_logits};
use evener_worker::engine::sampler::Sampling;
use evener_worker::engine::scheduler::{self, Refusal};
use evener_worker::engine::sequence::{Finish, Origin, Spec};
use evener_worker::engine::step::Limits;
use evener_worker::engine::{Error, Handle, Lead, Outputs, Rank, follower};
use evener_worker::metrics::Figures;

const DEADLINE: Duration = Duration::from_secs(20);

fn limits() -> Limits {
    Limits {
        n_slots: 6,
        max_batch_tokens: 24,
        max_sample_rows: 12,
        max_context: 120,
        n_kv_blocks: 30,
        vocab: 50,
    }
}

/// Logits by hashing all tokens of a sequence up to a position, read through its block table.
struct Toy {
    vocab: Range<usize>,
    /// By place in the cache: token and position.
    kv: Vec<(u32, u32)>,
    logits: Vec<f32>,
    all: Vec<Vec<u8>>,
    /// What it does at its n-th run.
    fault: Option<(u64, Fault)>,
    n_runs: u64,
}

#[derive(Clone, Copy)]
enum Fault {
    Panic,
    Fail,
    NotANumber,
    Stall,
}

impl Toy {
    fn new(vocab: Range<usize>) -> Self {
        let n_places = limits().n_kv_blocks as usize * KV_BLOCK_LEN;
        let kv = vec![(u32::MAX, u32::MAX); n_places];
        Self { vocab, kv, logits: Vec::new(), all: Vec::new(), fault: None, n_runs: 0 }
    }
}

fn mix(mut h: u64, with: u64) -> u64 {
    h ^= with.wrapping_add(0x9e37_79b9_7f4a_7c15);
    h = h.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h ^ (h >> 29)
}

fn logit(h: u64, token: usize) -> f32 {
    (mix(h, token as u64) >> 40) as f32 / (1 << 22) as f32
}

/// What the toy model says after `tokens`.
fn expected_logits(tokens: &[u32]) -> Vec<f32> {
    let h = tokens.iter().fold(0, |h, &token| mix(h, token.into()));
    (0..limits().vocab).map(|token| logit(h, token)).collect()
}

fn greedy(tokens: &[u32]) -> u32 {
    let logits = expected_logits(tokens);
    (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
}

impl Backend for Toy {
    fn run(&mut self, batch: &Batch, collective: &mut dyn Collective) -> Result<(), BackendError> {
        self.n_runs += 1;
        let fault = self.fault.filter(|(at, _)| *at == self.n_runs).map(|(_, fault)| fault);
        match fault {
            Some(Fault::Panic) => panic!("the toy was told to"),
            Some(Fault::Fail) => {
                return Err(BackendError::Device { reason: "the toy was told to".to_owned() });
            }
            Some(Fault::Stall) => std::thread::sleep(Duration::from_millis(700)),
            Some(Fault::NotANumber) | None => {}
        }
        for row in 0..batch.tokens.len() {
            self.kv[batch.slots[row] as usize] = (batch.tokens[row], batch.positions[row]);
        }
        self.logits.clear();
        let mut digest = 0;
        for span in &batch.spans {
            let blocks = &batch.block_tables[span.first_block as usize..][..span.n_blocks as usize];
            for row in span.first_row..span.first_row + span.n_rows {
                if batch.sample_rows.binary_search(&row).is_err() {
                    continue;
                }
                let mut h = 0;
                for position in 0..=batch.positions[row as usize] {
                    let block = blocks[position as usize / KV_BLOCK_LEN] as usize;
                    let place = block * KV_BLOCK_LEN + position as usize % KV_BLOCK_LEN;
                    let (token, at) = self.kv[place];
                    assert_eq!(at, position, "another sequence's token is in the cache");
                    h = mix(h, token.into());
                }
                digest = mix(digest, h);
                self.logits.extend(self.vocab.clone().map(|token| logit(h, token)));
            }
        }
        if let (Some(Fault::NotANumber), Some(first)) = (fault, self.logits.first_mut()) {
            *first = f32::NAN;
        }
        // Every rank must have seen the same step.
        let tag = Tag { step: batch.step, op: 1 };
        collective.all_gather(tag, &digest.to_le_bytes(), &mut self.all)?;
        assert!(self.all.iter().all(|theirs| *theirs == digest.to_le_bytes()));
        Ok(())
    }

    fn copy_block(&mut self, from: u32, to: u32) {
        let [from, to] = [from, to].map(|block| block as usize * KV_BLOCK_LEN);
        self.kv.copy_within(from..from + KV_BLOCK_LEN, to);
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }
}

fn ranks(
    world_size: usize,
    step_timeout: Duration,
    fault: Option<(usize, u64, Fault)>,
) -> Vec<Rank> {
    let options = MeshOptions { spin: false, step_timeout, ..MeshOptions::default() };
    let cuts: Vec<usize> =
        (0..=world_size).map(|rank| limits().vocab * rank / world_size).collect();
    let vocab: Vec<Range<usize>> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
    let meshes = Mesh::local(world_size, 7, &options).unwrap();
    let rank = |(rank, mesh): (usize, Mesh)| {
        let mut toy = Toy::new(vocab[rank].clone());
        toy.fault = fault.filter(|(at, ..)| *at == rank).map(|(_, run, fault)| (run, fault));
        Rank::new(mesh, Box::new(toy), vocab.clone(), limits())
    };
    meshes.into_iter().enumerate().map(rank).collect()
}

/// A group that serves, its ranks as threads.
struct Group {
    handle: Handle,
    aborts: Vec<AbortHandle>,
    threads: Vec<JoinHandle<Result<(), Error>>>,
    figures: Arc<Figures>,
}

impl Group {
    fn start(world_size: usize) -> Self {
        Self::with_fault(world_size, None)
    }

    fn with_fault(world_size: usize, fault: Option<(usize, u64, Fault)>) -> Self {
        let ranks = ranks(world_size, Duration::from_millis(300), fault);
        let aborts = ranks.iter().map(|rank| rank.mesh().abort_handle()).collect();
        let mut ranks = ranks.into_iter();
        let options = scheduler::Options { max_waiting: 100, ..scheduler::Options::new(limits()) };
        let figures = Arc::new(Figures::default());
        let (handle, mut lead) = Lead::new(ranks.next().unwrap(), options, Arc::clone(&figures));
        let mut threads = vec![std::thread::spawn(move || {
            let result = lead.run();
            let reason = result.as_ref().err().map_or("left".to_owned(), Error::to_string);
            lead.end_streams(&reason);
            result
        })];
        threads.extend(ranks.map(|mut rank| {
            std::thread::spawn(move || follower::run(&mut rank, &Figures::default()))
        }));
        Self { handle, aborts, threads, figures }
    }

    /// Ends it in good order and checks that all sequences' blocks came back.
    fn leave(self) {
        wait_until("all blocks are free", || {
            let load = self.figures.load();
            load.n_running + load.n_waiting == 0 && load.kv_blocks_free == load.kv_blocks_total
        });
        self.handle.leave().unwrap();
        for thread in self.threads {
            thread.join().unwrap().unwrap();
        }
    }

    /// By rank: how the epoch ended there.
    fn ends(self) -> Vec<Result<(), String>> {
        let text = |end: Result<(), Error>| end.map_err(|error| error.to_string());
        let end = |thread: JoinHandle<Result<(), Error>>| match thread.join() {
            Ok(end) => text(end),
            Err(_) => Err("panicked".to_owned()),
        };
        self.threads.into_iter().map(end).collect()
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

fn spec(prompt: &[u32], max_tokens: u32) -> Spec {
    let sampling = Sampling::default();
    Spec {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling,
        prompt_logprobs: false,
        origin: Origin::default(),
    }
}

fn sampled(prompt: &[u32], max_tokens: u32, seed: u64) -> Spec {
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, seed, ..Sampling::default() };
    Spec { sampling, ..spec(prompt, max_tokens) }
}

/// The next message, by a deadline.
fn next(outputs: &mut Outputs) -> Option<Vec<Event>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let received = runtime.block_on(async { tokio::time::timeout(DEADLINE, outputs.recv()).await });
    received.expect("an output in time").map(|output| output.events)
}

/// Tokens of a lone sequence, and how it ended; none if its stream did.
fn collect(outputs: &mut Outputs) -> (Vec<u32>, Option<End>) {
    let mut tokens = Vec::new();
    while let Some(events) = next(outputs) {
        for event in events {
            tokens.extend(event.token.iter().map(|token| token.id));
            if event.end.is_some() {
                return (tokens, event.end);
            }
        }
    }
    (tokens, None)
}

fn prompts() -> Vec<Vec<u32>> {
    let length = |i: u32| [1, 15, 16, 17, 40, 3, 70, 2, 33, 5][i as usize % 10] + i / 10;
    (0..14).map(|i| (0..length(i)).map(|k| (k * 7 + i) % 50).collect()).collect()
}

#[test]
fn tokens_are_the_models_whatever_the_group_and_the_batch() {
    for world_size in 1..=4 {
        let group = Group::start(world_size);
        let mut all: Vec<Outputs> = prompts()
            .iter()
            .map(|prompt| group.handle.submit(spec(prompt, 20), 64).unwrap())
            .collect();
        for (prompt, outputs) in prompts().iter().zip(&mut all) {
            let (tokens, end) = collect(outputs);
            assert_eq!(end, Some(End::Finished(Finish::Length)));
            let mut so_far = prompt.clone();
            for &token in &tokens {
                assert_eq!(token, greedy(&so_far), "world size {world_size}");
                so_far.push(token);
            }
            assert_eq!(tokens.len(), 20);
        }
        assert_eq!(group.figures.tokens_total(), 14 * 20);
        group.leave();
    }
}

#[test]
fn sampled_tokens_do_not_depend_on_company() {
    let run = |world_size, together: bool| -> Vec<Vec<u32>> {
        let group = Group::start(world_size);
        let submit =
            |i: usize, prompt: &[u32]| group.handle.submit(sampled(prompt, 15, i as u64), 64);
        let mut tokens = Vec::new();
        let mut pending = Vec::new();
        for (i, prompt) in prompts().iter().enumerate() {
            let mut outputs = submit(i, prompt).unwrap();
            match together {
                true => pending.push(outputs),
                false => tokens.push(collect(&mut outputs).0),
            }
        }
        tokens.extend(pending.iter_mut().map(|outputs| collect(outputs).0));
        group.leave();
        tokens
    };
    let alone = run(1, false);
    assert_eq!(alone, run(1, true));
    assert_eq!(alone, run(3, true));
}

#[test]
fn a_resumed_sequence_goes_on_with_the_same_tokens() {
    let group = Group::start(2);
    let whole = collect(&mut group.handle.submit(sampled(&[3, 1, 4], 30, 99), 64).unwrap()).0;
    for cut in [1, 13, 14, 29] {
        let mut prompt = vec![3, 1, 4];
        prompt.extend(&whole[..cut]);
        let rest = sampled(&prompt, 30 - cut as u32, 99);
        assert_eq!(collect(&mut group.handle.submit(rest, 64).unwrap()).0, whole[cut..]);
    }
    group.leave();
}

#[test]
fn stop_tokens_end_a_sequence_and_are_reported() {
    let group = Group::start(2);
    let free = collect(&mut group.handle.submit(spec(&[9, 9], 10), 64).unwrap()).0;
    let at = free.iter().position(|token| token == &free[5]).unwrap();
    let sampling = Sampling { stop_token_ids: vec![free[5]], ..Sampling::default() };
    let stopped = Spec { sampling, ..spec(&[9, 9], 10) };
    let (tokens, end) = collect(&mut group.handle.submit(stopped, 64).unwrap());
    assert_eq!(tokens, free[..=at]);
    assert_eq!(end, Some(End::Finished(Finish::Stop)));
    group.leave();
}

#[test]
fn one_message_a_step_carries_all_sequences_of_a_stream() {
    let group = Group::start(2);
    let (requests, mut outputs) = group.handle.open(64).unwrap();
    let (_, mut other) = group.handle.open(64).unwrap();
    for id in 10..14 {
        requests.submit(id, spec(&[id as u32], 25)).unwrap();
    }
    let mut n_most = 0;
    let mut n_ended = 0;
    while n_ended < 4 {
        let events = next(&mut outputs).unwrap();
        n_most = n_most.max(events.len());
        n_ended += events.iter().filter(|event| event.end.is_some()).count();
        assert!(events.iter().all(|event| (10..14).contains(&event.request_id)));
    }
    assert_eq!(n_most, 4, "they share steps");
    group.leave();
    assert_eq!(next(&mut other), None);
    assert_eq!(other.end(), StreamEnd::EpochOver { reason: "left".to_owned() });
}

#[test]
fn a_finish_says_how_long_its_lead_had_the_sequence() {
    let group = Group::start(2);
    let before = Instant::now();
    let (requests, mut outputs) = group.handle.open(64).unwrap();
    for id in 0..3 {
        requests.submit(id, spec(&[1, 2, 3], 10 + id as u32)).unwrap();
    }
    let mut lead_times = Vec::new();
    while lead_times.len() < 3 {
        for event in next(&mut outputs).unwrap() {
            assert_eq!(event.lead_time.is_some(), event.end.is_some());
            lead_times.extend(event.lead_time);
        }
    }
    let elapsed = before.elapsed();
    assert!(lead_times.iter().all(|&time| Duration::ZERO < time && time < elapsed));
    group.leave();
}

#[test]
fn prompt_logprobs_cover_every_position_but_the_first() {
    let group = Group::start(3);
    let prompt: Vec<u32> = (0..37).map(|i| i * 3 % 50).collect();
    let sampling = Sampling { n_logprobs: Some(2), ..Sampling::default() };
    let asked = Spec { sampling, prompt_logprobs: true, ..spec(&prompt, 2) };
    let mut outputs = group.handle.submit(asked, 64).unwrap();
    let (mut prompt_tokens, mut tokens) = (Vec::new(), Vec::new());
    while tokens.len() < 2 {
        for event in next(&mut outputs).unwrap() {
            assert!(event.prompt_tokens.is_empty() || tokens.is_empty());
            prompt_tokens.extend(event.prompt_tokens);
            tokens.extend(event.token);
        }
    }
    assert_eq!(prompt_tokens.iter().map(|token| token.id).collect::<Vec<_>>(), prompt[1..]);
    for (i, token) in prompt_tokens.iter().chain(&tokens).enumerate() {
        let mut before = prompt.clone();
        before.extend(tokens.iter().map(|token| token.id));
        before.truncate(i + 1);
        let logits = expected_logits(&before);
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        let expect = f64::from(logits[token.id as usize]) - sum.ln();
        assert!((f64::from(token.logprob.unwrap()) - expect).abs() < 1e-5, "position {i}");
        assert_eq!((token.top.len(), token.top[0].0), (2, greedy(&before)));
    }
    group.leave();
}

#[test]
fn what_cannot_run_is_refused_and_the_rest_goes_on() {
    let group = Group::start(2);
    let (requests, mut outputs) = group.handle.open(64).unwrap();
    requests.submit(1, spec(&[], 1)).unwrap();
    requests.submit(2, spec(&[50], 1)).unwrap();
    requests.submit(3, spec(&[1], 120)).unwrap();
    requests.submit(4, spec(&[1], 1)).unwrap();
    let mut ends = Vec::new();
    while ends.len() < 4 {
        let events = next(&mut outputs).unwrap().into_iter();
        ends.extend(events.map(|event| (event.request_id, event.end.unwrap())));
    }
    ends.sort_by_key(|(id, _)| *id);
    assert_eq!(ends[0].1, End::Refused(Refusal::EmptyPrompt));
    assert_eq!(ends[1].1, End::Refused(Refusal::BadToken { token: 50, vocab: 50 }));
    assert!(matches!(ends[2].1, End::Refused(Refusal::TooLong { .. })));
    assert_eq!(ends[3].1, End::Finished(Finish::Length));
    group.leave();
}

#[test]
fn a_full_queue_refuses_and_does_not_grow() {
    let group = Group::start(1);
    let (requests, mut outputs) = group.handle.open(4096).unwrap();
    for id in 0..150 {
        requests.submit(id, spec(&[1], 100)).unwrap();
    }
    let (mut n_refused, mut n_finished) = (0, 0);
    while n_refused + n_finished < 150 {
        for event in next(&mut outputs).unwrap() {
            match event.end {
                Some(End::Refused(Refusal::Overloaded { .. })) => n_refused += 1,
                Some(End::Finished(_)) => n_finished += 1,
                Some(other) => panic!("{other:?}"),
                None => {}
            }
        }
    }
    assert!(n_refused > 0 && n_finished >= 100, "{n_refused} {n_finished}");
    group.leave();
}

#[test]
fn a_cancelled_sequence_stops_and_frees_its_blocks() {
    let group = Group::start(2);
    let (requests, mut outputs) = group.handle.open(4096).unwrap();
    requests.submit(1, spec(&[1], 119)).unwrap();
    requests.submit(2, spec(&[2], 119)).unwrap();
    next(&mut outputs).unwrap();
    requests.cancel(1).unwrap();
    requests.cancel(77).unwrap();
    let mut n_tokens = [0; 3];
    let mut has_ended = false;
    while !has_ended {
        for event in next(&mut outputs).unwrap() {
            n_tokens[event.request_id as usize] += usize::from(event.token.is_some());
            assert!(event.request_id == 2 || event.end.is_none());
            has_ended |= event.end.is_some();
        }
    }
    assert!(n_tokens[1] < 119, "a cancel is seen between steps");
    group.leave();
}

#[test]
fn dropping_a_stream_cancels_its_sequences() {
    let group = Group::start(2);
    let (requests, outputs) = group.handle.open(4096).unwrap();
    for id in 0..20 {
        requests.submit(id, spec(&[1, 2, 3], 100)).unwrap();
    }
    drop(outputs);
    group.leave();
}

#[test]
fn a_reader_that_lags_loses_its_stream_and_nobody_else_does() {
    let group = Group::start(2);
    let mut slow = group.handle.submit(spec(&[1], 100), 4).unwrap();
    let good = collect(&mut group.handle.submit(spec(&[2], 100), 200).unwrap());
    assert_eq!((good.0.len(), good.1), (100, Some(End::Finished(Finish::Length))));
    let (tokens, end) = collect(&mut slow);
    assert_eq!((tokens.len(), end), (4, None));
    assert_eq!(slow.end(), StreamEnd::Slow { n_outputs: 4 });
    group.leave();
}

#[test]
fn a_request_id_in_use_ends_the_stream() {
    let group = Group::start(1);
    let (requests, mut outputs) = group.handle.open(4096).unwrap();
    requests.submit(5, spec(&[1], 119)).unwrap();
    requests.submit(5, spec(&[1], 119)).unwrap();
    while next(&mut outputs).is_some() {}
    assert_eq!(outputs.end(), StreamEnd::RequestIdInUse { request_id: 5 });
    group.leave();
}

#[test]
fn an_abort_ends_every_rank_and_tells_the_streams() {
    for by in 0..3 {
        let group = Group::start(3);
        let mut outputs = group.handle.submit(spec(&[1], 119), 200).unwrap();
        next(&mut outputs).unwrap();
        group.aborts[by].abort("tea time");
        while next(&mut outputs).is_some() {}
        let StreamEnd::EpochOver { reason } = outputs.end() else { panic!("{:?}", outputs.end()) };
        let ends = group.ends();
        assert!(ends.iter().all(Result::is_err), "{ends:?}");
        assert!(ends[by].as_ref().unwrap_err().contains("tea time"), "{ends:?}");
        assert_eq!(Err(reason), ends[0]);
    }
}

#[test]
fn an_idle_group_hears_of_a_lost_follower() {
    let group = Group::start(2);
    collect(&mut group.handle.submit(spec(&[1], 2), 64).unwrap());
    let began = Instant::now();
    group.aborts[1].abort("gone");
    assert!(group.ends().iter().all(Result::is_err));
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[test]
fn an_idle_group_lives_on_heartbeats() {
    let group = Group::start(2);
    let began = Instant::now();
    // Three times the step deadline, and more than two heartbeats.
    wait_until("time passed", || began.elapsed() > Duration::from_millis(1200));
    let (tokens, _) = collect(&mut group.handle.submit(spec(&[1], 3), 64).unwrap());
    assert_eq!(tokens.len(), 3);
    group.leave();
}

#[test]
fn faults_of_one_rank_end_the_epoch_on_all() {
    let cases = [
        (Fault::Panic, ""),
        (Fault::Fail, "told to"),
        (Fault::Stall, ""),
        (Fault::NotANumber, "broken"),
    ];
    for (fault, says) in cases {
        for rank in 0..2 {
            let group = Group::with_fault(2, Some((rank, 5, fault)));
            let mut outputs = group.handle.submit(spec(&[1], 119), 200).unwrap();
            while next(&mut outputs).is_some() {}
            let ends = group.ends();
            assert!(ends.iter().all(Result::is_err), "{ends:?}");
            let text = format!("{ends:?}");
            assert!(text.contains(says), "rank {rank}: {text}");
        }
    }
}

#[test]
fn probed_logits_have_the_same_bits_for_every_split_and_batching() {
    let lists: Vec<Vec<u32>> = prompts().into_iter().take(6).collect();
    let expect: Vec<Vec<u32>> = lists
        .iter()
        .map(|list| (1..=list.len()).flat_map(|n| expected_logits(&list[..n])))
        .map(|logits| logits.map(f32::to_bits).collect())
        .collect();
    for world_size in 1..=4 {
        for (chunk, together) in [(1, false), (2, true), (12, false)] {
            let batching = Batching { chunk, together };
            let ranks = ranks(world_size, Duration::from_secs(5), None);
            let logits = group_logits(ranks, &lists, batching).unwrap();
            let bits = |row: &Vec<f32>| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(logits.iter().map(bits).collect::<Vec<_>>(), expect, "{batching:?}");
        }
    }
}

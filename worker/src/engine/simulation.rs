//! Many steps of scheduler, blocks, plans and tables under random arrivals, lengths, priorities,
//! users, salts, cancels and drafts right and wrong, with a model that is a hash: the next token is
//! a function of all tokens before it, read through the block tables. So a lost, repeated, stale or
//! foreign token or block shows in what is generated.
//!
//! Checked after every step: the integrity of the scheduler, the plan's way over the wire, and that
//! every sequence gets the tokens it would get alone.

use std::collections::{HashMap, VecDeque};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::batch::Tables;
use super::chosen::Chosen;
use super::sampler::Sampling;
use super::scheduler::{Committed, Options, Scheduler};
use super::sequence::{Origin, SequenceId, Spec};
use super::step::{Limits, StepPlan};
use crate::backend::{Batch, KV_BLOCK_LEN};

/// A few seconds, unoptimised too.
const N_STEPS: u64 = 1_000_000;

fn limits() -> Limits {
    Limits {
        n_slots: 5,
        max_batch_tokens: 40,
        max_sample_rows: 8,
        max_context: 160,
        n_kv_blocks: 14,
        vocab: 1000,
    }
}

fn mix(h: u64, with: u64) -> u64 {
    let h = (h ^ with.wrapping_add(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    h ^ (h >> 29)
}

/// Of a salt, before any token.
fn origin_hash(salt: &str) -> u64 {
    salt.bytes().fold(1, |h, byte| mix(h, byte.into()))
}

/// What a client knows of its sequence.
struct Client {
    origin: u64,
    tokens: Vec<u32>,
    /// Of all tokens.
    hash: u64,
    n_left: u32,
    /// Rows still to be told about, beside those that give a token.
    n_prompt_rows: u32,
}

struct Simulation {
    rng: StdRng,
    scheduler: Scheduler,
    tables: Tables,
    batch: Batch,
    plan: StepPlan,
    wire: Vec<u8>,
    /// The KV cache: by place, the hash of all tokens up to there.
    cache: Vec<u64>,
    live: HashMap<SequenceId, Client>,
    /// In order of arrival, the ended ones included.
    ids: VecDeque<SequenceId>,
    n_done: u64,
    n_cancelled: u64,
    n_spared: u64,
    n_copies: u64,
    n_right: u64,
    n_wrong: u64,
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let options = Options { max_waiting: 12, ..Options::new(limits()) };
        Self {
            rng: StdRng::seed_from_u64(seed),
            scheduler: Scheduler::new(options),
            tables: Tables::new(&limits()),
            batch: Batch::default(),
            plan: StepPlan::default(),
            wire: Vec::new(),
            cache: vec![0; limits().n_kv_blocks as usize * KV_BLOCK_LEN],
            live: HashMap::new(),
            ids: VecDeque::new(),
            n_done: 0,
            n_cancelled: 0,
            n_spared: 0,
            n_copies: 0,
            n_right: 0,
            n_wrong: 0,
        }
    }

    /// A prompt that begins like many others, for one of a few tenants.
    fn arrive(&mut self) {
        let rng = &mut self.rng;
        let n_common = rng.random_range(0..60);
        let n_own = rng.random_range(1..50);
        let common = rng.random_range(0..3);
        let mut prompt: Vec<u32> = (0..n_common).map(|i| common * 100 + i).collect();
        prompt.extend((0..n_own).map(|_| rng.random_range(0..1000)));
        if let Some(&id) = self.ids.back()
            && let Some(other) = self.live.get(&id)
            && rng.random_bool(0.3)
            && other.tokens.len() < 100
        {
            prompt.clone_from(&other.tokens); // another choice, or the next turn
        }
        let user = format!("user {}", rng.random_range(0..4));
        let salt = ["", "a"][rng.random_range(0..2)].to_owned();
        let priority = [0, 0, 0, -5, 7][rng.random_range(0..5)];
        let (origin, max_tokens) = (origin_hash(&salt), rng.random_range(1..60));
        let prompt_logprobs = rng.random_bool(0.1);
        let client = Client {
            origin,
            hash: prompt.iter().fold(origin, |h, &token| mix(h, token.into())),
            n_left: max_tokens,
            n_prompt_rows: if prompt_logprobs { prompt.len() as u32 - 1 } else { 0 },
            tokens: prompt.clone(),
        };
        let origin = Origin { user, salt, priority, trace: None };
        let sampling = Sampling::default();
        let spec = Spec { prompt, max_tokens, sampling, prompt_logprobs, origin };
        if let Ok(id) = self.scheduler.submit(spec) {
            self.live.insert(id, client);
            self.ids.push_back(id);
        }
    }

    /// Drafts that are right up to somewhere, for some.
    fn draft(&mut self) {
        let rng = &mut self.rng;
        let mut room = self.scheduler.room_for_drafts();
        for (_, sequence) in self.scheduler.decoding_mut() {
            sequence.drafts.clear();
            let n_left = sequence.max_tokens - sequence.n_generated();
            let n = rng.random_range(0..9).min(room).min(n_left - 1);
            room -= n;
            let mut hash = self.live[&sequence.id].hash;
            for _ in 0..n {
                let token = (hash % 1000) as u32;
                hash = mix(hash, token.into());
                sequence.drafts.push((token + u32::from(rng.random_bool(0.2))) % 1000);
            }
        }
    }

    fn cancel(&mut self) {
        let at = self.rng.random_range(0..self.ids.len().max(1));
        let Some(id) = self.ids.remove(at) else { return };
        let is_live = self.live.remove(&id).is_some();
        assert_eq!(self.scheduler.cancel(id), is_live, "only live sequences can be cancelled");
        self.n_cancelled += u64::from(is_live);
    }

    fn step(&mut self, n: u64) {
        self.draft();
        let max_prefill = self.rng.random_range(1..64);
        if !self.scheduler.schedule(&mut self.plan, max_prefill) {
            assert!(self.scheduler.is_idle(), "what can run does run");
            return;
        }
        self.plan.step = n;
        self.plan.encode(&mut self.wire);
        self.plan.decode(&self.wire, &limits()).unwrap();
        self.tables.apply(&self.plan, &mut self.batch).unwrap();
        for copy in &self.plan.copies {
            let [from, to] = [copy.from, copy.to].map(|block| block as usize * KV_BLOCK_LEN);
            self.cache.copy_within(from..from + KV_BLOCK_LEN, to);
            self.n_copies += 1;
        }
        let mut chosen = Chosen::default();
        for (entry_idx, span) in self.batch.spans.iter().enumerate() {
            let sequence = self.scheduler.scheduled(entry_idx);
            let client = self.live.get_mut(&sequence.id).expect("only live sequences run");
            let blocks = &self.batch.block_tables[span.first_block as usize..];
            let (mut drafts, mut n_told) = (sequence.drafts.iter(), 0);
            for row in span.first_row..span.first_row + span.n_rows {
                let position = self.batch.positions[row as usize] as usize;
                let before = match position.checked_sub(1) {
                    Some(p) => {
                        let block = blocks[p / KV_BLOCK_LEN] as usize;
                        self.cache[block * KV_BLOCK_LEN + p % KV_BLOCK_LEN]
                    }
                    None => client.origin,
                };
                let hash = mix(before, self.batch.tokens[row as usize].into());
                self.cache[self.batch.slots[row as usize] as usize] = hash;
                if position + 1 == client.tokens.len() {
                    assert_eq!(hash, client.hash, "read through its blocks");
                }
                if position + 1 == client.tokens.len() + n_told {
                    let token = (hash % 1000) as u32;
                    chosen.push(token);
                    // What comes behind a wrong draft is not looked at.
                    n_told =
                        if drafts.next() == Some(&token) { n_told + 1 } else { usize::MAX / 2 };
                }
            }
            chosen.end_entry();
            let ends = !chosen.of(entry_idx).is_empty();
            let n_drafts = sequence.drafts.len();
            let n_right = chosen.of(entry_idx).len().saturating_sub(1);
            self.n_right += n_right as u64;
            self.n_wrong += (n_drafts - n_right) as u64;
            let entry = &self.plan.entries[entry_idx];
            client.n_prompt_rows -= entry.n_sampled - u32::from(ends) - n_drafts as u32;
            if ends && sequence.n_generated() == 0 {
                self.n_spared += sequence.n_cached as u64;
            }
        }
        let mut out = Vec::new();
        self.scheduler.commit(&self.plan, &chosen, &mut out);
        self.scheduler.check_integrity();
        for committed in out {
            self.receive(committed);
        }
    }

    fn receive(&mut self, Committed { id, token, finish }: Committed) {
        let client = self.live.get_mut(&id).expect("only live sequences get tokens");
        assert_eq!(u64::from(token), client.hash % 1000, "the token it would get alone");
        client.tokens.push(token);
        client.hash = mix(client.hash, token.into());
        client.n_left -= 1;
        assert_eq!(finish.is_some(), client.n_left == 0);
        assert_eq!(client.n_prompt_rows, 0, "its prompt was told about, once");
        if finish.is_some() {
            self.live.remove(&id);
            self.n_done += 1;
        }
    }
}

#[test]
fn every_sequence_gets_its_tokens_and_every_block_comes_back() {
    let seed = 20_261_123;
    let mut simulation = Simulation::new(seed);
    let mut n = 0;
    while n < N_STEPS || !simulation.scheduler.is_idle() {
        n += 1;
        if n <= N_STEPS && simulation.rng.random_bool(0.09) {
            simulation.arrive();
        }
        if simulation.rng.random_bool(0.04) {
            simulation.cancel();
        }
        if simulation.ids.len() > 40 {
            simulation.ids.pop_front();
        }
        simulation.step(n);
    }
    let Simulation { scheduler, live, n_done, n_cancelled, n_spared, n_copies, .. } = simulation;
    let Simulation { n_right, n_wrong, .. } = simulation;
    let n_preempted = scheduler.n_preemptions();
    println!(
        "seed {seed}: {n} steps, {n_done} done, {n_cancelled} cancelled, {n_preempted} preempted, \
         {n_spared} prompt tokens from the cache, {n_copies} copies, {n_right} drafts right and \
         {n_wrong} wrong"
    );
    assert!(live.is_empty());
    assert_eq!(scheduler.kv().n_available(), limits().n_kv_blocks);
    for (what, count) in [
        ("done", n_done),
        ("cancelled", n_cancelled),
        ("preempted", n_preempted),
        ("spared", n_spared),
        ("copied", n_copies),
        ("drafts right", n_right),
        ("drafts wrong", n_wrong),
    ] {
        assert!(count > N_STEPS / 1000, "{count} {what}: the simulation tests nothing");
    }
}

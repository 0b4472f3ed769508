//! Prints what drafts bring, on and off in turn, at a task that copies and at one that does not.
//!
//! `cargo run --release -p evener-worker --example speculation MODEL [rounds] [sequences,...]
//! [drafts] [split,...] [tokens]`. The model is an instruct model with ChatML turns (SmolLM2,
//! Qwen). Answers with drafts are compared with those without, token by token.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::thread::Scope;
use std::time::{Duration, Instant};

use evener_collective::{Mesh, Options as MeshOptions};
use evener_worker::backend::{self, Kind};
use evener_worker::checkpoint::Checkpoint;
use evener_worker::engine::sampler::Sampling;
use evener_worker::engine::sequence::{Origin, Spec};
use evener_worker::engine::step::Limits;
use evener_worker::engine::{Handle, Lead, Rank, follower, scheduler};
use evener_worker::metrics::Figures;
use evener_worker::model::{families, shard};
use tokenizers::Tokenizer;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const CONTEXT: usize = 1024;

const TEXT: &str = "The old ferry left the harbour at six in the morning, as it had done every day \
for forty years. Its captain, a quiet woman named Ilse Brandt, knew each rock of the strait by \
name and each passenger by the way they walked. On that Tuesday there were eleven of them: two \
carpenters with their tools, a teacher who was reading a letter, a family on its way to a wedding, \
and a boy who had been told to bring a crate of eggs to his aunt. The sea was grey and calm. \
Halfway across, the engine stopped. Nobody spoke at first. Then the carpenters put down their \
coffee and went below, and the teacher folded the letter and asked the captain what could be done. \
She looked at the sky, at the slow current that drew them to the north, and at the clock above the \
wheel. We have two hours before the wind turns, she said, and a sail that nobody has used since my \
father died. It took them all, even the boy, to carry the canvas up to the deck. By noon the ferry \
came into the little port of Hallen with a red sail and nine eggs left, and the wedding began only \
one hour late.";

/// A task and how its tokens are chosen.
struct Task {
    name: &'static str,
    request: String,
    temperature: f32,
}

fn tasks() -> [Task; 3] {
    let rewrite = "Write the following text again, word for word, but replace the word \"ferry\" \
                   by \"steamer\" everywhere. Answer with the text alone.";
    let story = "Write a long story about a lighthouse keeper who finds a map.";
    let task = |name, request, temperature| Task { name, request, temperature };
    [
        task("edit, greedy", format!("{rewrite}\n\n{TEXT}"), 0.0),
        task("edit, temperature 0.3", format!("{rewrite}\n\n{TEXT}"), 0.3),
        task("story, temperature 0.8", story.to_owned(), 0.8),
    ]
}

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().ok_or("the first argument is a model file")?;
    let number = |at: usize| arguments.get(at).and_then(|word| word.parse::<usize>().ok());
    let (n_rounds, max_drafts) = (number(1).unwrap_or(5), number(3).unwrap_or(8));
    let batches: Vec<usize> = match arguments.get(2) {
        Some(list) => list.split(',').map(str::parse).collect::<Result<_, _>>()?,
        None => vec![1, 8, 32],
    };
    let checkpoint = Checkpoint::open(Path::new(path))?;
    let tokenizer = Tokenizer::from_bytes(&checkpoint.description.tokenizer_json)?;
    let splits = [("1x2", &[1][..], 2), ("2x1", &[1, 1], 1)];
    let max_tokens = number(5).unwrap_or(384) as u32;
    let is_wanted =
        |name: &str| arguments.get(4).is_none_or(|list| list.split(',').any(|n| n == name));
    for (name, shares, threads) in splits.into_iter().filter(|(name, ..)| is_wanted(name)) {
        for &n_sequences in &batches {
            std::thread::scope(|scope| {
                let shape = Shape { shares, threads, n_sequences };
                let off = Engine::start(scope, &checkpoint, shape, 0)?;
                let on = Engine::start(scope, &checkpoint, shape, max_drafts)?;
                for task in tasks() {
                    let specs = specs(&task, &tokenizer, &checkpoint, shape, max_tokens)?;
                    print!("{name}, {n_sequences} sequences, {}: ", task.name);
                    compare(&off, &on, &specs, n_rounds)?;
                }
                off.handle.leave()?;
                on.handle.leave()?;
                Ok::<(), Failure>(())
            })?;
        }
    }
    Ok(())
}

/// Both in turn, and which of them is first too.
fn compare(off: &Engine, on: &Engine, specs: &[Spec], n_rounds: usize) -> Result<(), Failure> {
    let (mut plain, mut drafted, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    let before = (on.figures.drafted_total(), on.figures.drafts_right_total());
    let (mut n_tokens, mut n_steps) = (0, 0);
    for round in 0..=n_rounds {
        let order = if round % 2 == 0 { [off, on] } else { [on, off] };
        let first = order[0].run(specs)?;
        let second = order[1].run(specs)?;
        let (without, with) = if round % 2 == 0 { (first, second) } else { (second, first) };
        if without.answers != with.answers {
            return Err("drafts have changed a token".into());
        }
        n_tokens = with.answers.iter().map(Vec::len).sum::<usize>();
        n_steps = with.n_messages;
        if round > 0 {
            // The first is for warming up.
            plain.push(without.rate);
            drafted.push(with.rate);
            ratios.push(with.rate / without.rate);
        }
    }
    let n_drafted = on.figures.drafted_total() - before.0;
    let n_right = on.figures.drafts_right_total() - before.1;
    println!(
        "off {:.1} tok/s, on {:.1}, ratio {:.3} ({:.3} to {:.3}); {n_tokens} tokens in {n_steps} \
         steps, {:.0} % of {n_drafted} drafts right",
        median(&mut plain),
        median(&mut drafted),
        median(&mut ratios),
        ratios[0],
        ratios[ratios.len() - 1],
        100.0 * n_right as f64 / n_drafted.max(1) as f64,
    );
    Ok(())
}

/// Sorts.
fn median(figures: &mut [f64]) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    figures[figures.len() / 2]
}

fn specs(
    task: &Task,
    tokenizer: &Tokenizer,
    checkpoint: &Checkpoint,
    shape: Shape<'_>,
    max_tokens: u32,
) -> Result<Vec<Spec>, Failure> {
    let text = format!(
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}\
         <|im_end|>\n<|im_start|>assistant\n",
        task.request
    );
    let prompt = tokenizer.encode(text, false)?.get_ids().to_vec();
    let spec = |seed| {
        let stop_token_ids = checkpoint.description.eos_token_ids.clone();
        let temperature = task.temperature;
        let sampling = Sampling { temperature, seed, stop_token_ids, ..Sampling::default() };
        let prompt = prompt.clone();
        let origin = Origin::default();
        Spec { prompt, max_tokens, sampling, prompt_logprobs: false, origin }
    };
    Ok((0..shape.n_sequences as u64).map(spec).collect())
}

struct Engine {
    handle: Handle,
    figures: Arc<Figures>,
}

struct Outcome {
    answers: Vec<Vec<u32>>,
    /// Tokens a second, from where all sequences have their first.
    rate: f64,
    n_messages: usize,
}

#[derive(Clone, Copy)]
struct Shape<'a> {
    shares: &'a [u32],
    threads: usize,
    n_sequences: usize,
}

impl Engine {
    fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        checkpoint: &Checkpoint,
        shape: Shape<'_>,
        max_drafts: usize,
    ) -> Result<Self, Failure> {
        let mut ranks = ranks(checkpoint, shape)?.into_iter();
        let lead = ranks.next().ok_or("a group has a lead")?;
        let options =
            scheduler::Options { max_drafts, ..scheduler::Options::new(lead.limits().clone()) };
        let figures = Arc::new(Figures::default());
        let (handle, mut lead) = Lead::new(lead, options, Arc::clone(&figures));
        for mut rank in ranks {
            scope.spawn(move || follower::run(&mut rank, &Figures::default()));
        }
        scope.spawn(move || lead.run());
        Ok(Self { handle, figures })
    }

    fn run(&self, specs: &[Spec]) -> Result<Outcome, Failure> {
        let (requests, mut outputs) = self.handle.open(1 << 16)?;
        for (id, spec) in specs.iter().enumerate() {
            requests.submit(id as u64, spec.clone())?;
        }
        let mut answers = vec![Vec::new(); specs.len()];
        let (mut n_left, mut began) = (specs.len(), None);
        let (mut n_first, mut n_messages) = (0, 0);
        while n_left > 0 {
            let output = outputs.blocking_recv().ok_or("the lead is gone")?;
            for event in output.events {
                answers[event.request_id as usize].extend(event.token.map(|token| token.id));
                n_left -= usize::from(event.end.is_some());
            }
            n_messages += usize::from(began.is_some());
            if began.is_none() && answers.iter().all(|answer| !answer.is_empty()) {
                n_first = answers.iter().map(Vec::len).sum();
                began = Some(Instant::now());
            }
        }
        let n_tokens = answers.iter().map(Vec::len).sum::<usize>() - n_first;
        let seconds = began.ok_or("no sequence came that far")?.elapsed().as_secs_f64();
        Ok(Outcome { answers, rate: n_tokens as f64 / seconds, n_messages })
    }
}

fn ranks(checkpoint: &Checkpoint, shape: Shape<'_>) -> Result<Vec<Rank>, Failure> {
    let Shape { shares, threads, n_sequences } = shape;
    let split = shard::split(&checkpoint.config, shares)?;
    let vocab: Vec<_> = split.shards.iter().map(|shard| shard.vocab.clone()).collect();
    let limits = Limits {
        n_slots: n_sequences,
        max_batch_tokens: 512,
        max_sample_rows: n_sequences + 32,
        max_context: CONTEXT,
        n_kv_blocks: (n_sequences * CONTEXT / backend::KV_BLOCK_LEN) as u32,
        vocab: checkpoint.config.vocab,
    };
    let options = backend::Options {
        kv_format: backend::KvFormat::F16,
        activations: backend::Activations::Int12,
        threads,
        max_batch_tokens: limits.max_batch_tokens,
        max_sample_rows: limits.max_sample_rows,
        max_context: limits.max_context,
        spin: true,
        cores: Vec::new(),
    };
    let step_timeout = Duration::from_secs(60);
    let mesh_options = MeshOptions { step_timeout, spin: true, ..MeshOptions::default() };
    let mut ranks = Vec::new();
    for (rank, mesh) in Mesh::local(shares.len(), 1, &mesh_options)?.into_iter().enumerate() {
        let program = families::compile(&checkpoint.config, &split, rank);
        let progress = &mut |_, _| ControlFlow::Continue(());
        let loaded = backend::load(Kind::Cpu, checkpoint, program, &options, progress)?;
        let backend = loaded.into_backend(limits.n_kv_blocks)?;
        ranks.push(Rank::new(mesh, backend, vocab.clone(), limits.clone()));
    }
    Ok(ranks)
}

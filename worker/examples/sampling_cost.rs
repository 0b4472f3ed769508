//! Prints what sampling and structured output cost: a group of two ranks of one thread each
//! generates with one kind and with another, in turn.
//!
//! `cargo run --release -p evener-worker --example sampling_cost model.gguf [sequences] [tokens]`

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use evener_collective::{Mesh, Options as MeshOptions};
use evener_worker::backend::{self, Kind};
use evener_worker::checkpoint::Checkpoint;
use evener_worker::engine::grammar::{Compiler, Source};
use evener_worker::engine::sampler::Sampling;
use evener_worker::engine::sequence::{Origin, Spec};
use evener_worker::engine::step::Limits;
use evener_worker::engine::{Handle, Lead, Rank, follower, scheduler};
use evener_worker::metrics::Figures;
use evener_worker::model::{families, shard};

type Failure = Box<dyn std::error::Error>;

const CONTEXT: usize = 512;
const ROUNDS: usize = 4;

/// Never complete before a few thousand tokens, so that all sequences run to their length.
const SCHEMA: &str = r#"{
    "type": "array", "minItems": 1000, "x-guidance": {"whitespace_flexible": false},
    "items": {
        "type": "object", "required": ["name", "kind", "size", "tags"], "additionalProperties": false,
        "properties": {
            "name": {"type": "string", "maxLength": 40}, "kind": {"enum": ["horse", "mule", "ox"]},
            "size": {"type": "number"}, "tags": {"type": "array", "items": {"type": "string"}}
        }
    }
}"#;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().ok_or("the first argument is a model file")?;
    let number = |at: usize| arguments.get(at).and_then(|word| word.parse::<usize>().ok());
    let (n_sequences, n_tokens) = (number(1).unwrap_or(8), number(2).unwrap_or(96));
    let checkpoint = Checkpoint::open(Path::new(path))?;
    let about = &checkpoint.description;
    let began = Instant::now();
    let compiler = Compiler::new(&about.tokenizer_json, &about.eos_token_ids)?;
    println!("compiler of {} tokens: {:.1} ms", about.vocab, millis(began));
    let began = Instant::now();
    let grammar = compiler.compile(&Source::JsonSchema(SCHEMA.to_owned()))?;
    println!("the schema: {:.1} ms", millis(began));
    let ranks = ranks(&checkpoint, n_sequences)?;
    std::thread::scope(|scope| {
        let mut ranks = ranks.into_iter();
        let lead = ranks.next().ok_or("a group has a lead")?;
        let options = scheduler::Options::new(lead.limits().clone());
        let (handle, mut lead) = Lead::new(lead, options, Arc::default());
        for mut rank in ranks {
            scope.spawn(move || follower::run(&mut rank, &Figures::default()));
        }
        let leading = scope.spawn(move || lead.run().map_err(|error| error.to_string()));
        let warm = Sampling { temperature: 1.0, ..Sampling::default() };
        let top_k = Sampling { top_k: 40, temperature: 0.8, ..warm.clone() };
        let others = [
            ("greedy", Sampling::default()),
            ("top-k 40, structured", Sampling { grammar: Some(grammar), ..top_k.clone() }),
            ("temperature 1", warm.clone()),
            ("top-p 0.95", Sampling { top_p: 0.95, ..warm.clone() }),
            ("min-p 0.05", Sampling { min_p: 0.05, ..warm }),
        ];
        for round in 0..ROUNDS {
            for (name, other) in &others {
                let plain = rate(&handle, n_sequences, n_tokens, &top_k)?;
                let rate = rate(&handle, n_sequences, n_tokens, other)?;
                let cost = 100.0 * (1.0 - rate / plain);
                println!("{round}: top-k 40 {plain:.0} tok/s, {name} {rate:.0} tok/s: {cost:.1} %");
            }
        }
        handle.leave()?;
        leading.join().map_err(|_| "the lead panicked")??;
        Ok(())
    })
}

fn millis(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

/// Tokens a second of sequences that decode together.
fn rate(
    handle: &Handle,
    n_sequences: usize,
    n_tokens: usize,
    sampling: &Sampling,
) -> Result<f64, Failure> {
    let (requests, mut outputs) = handle.open(1 << 16)?;
    for id in 0..n_sequences as u64 {
        let sampling = Sampling { seed: id, ..sampling.clone() };
        let (prompt, max_tokens) = (vec![1, 5, 9 + id as u32], n_tokens as u32);
        let origin = Origin::default();
        requests
            .submit(id, Spec { prompt, max_tokens, sampling, prompt_logprobs: false, origin })?;
    }
    let (mut n_left, mut n_got, mut began) = (n_sequences, 0, Instant::now());
    let mut is_warm = false;
    while n_left > 0 {
        let output = outputs.blocking_recv().ok_or("the lead is gone")?;
        if is_warm {
            n_got += output.events.iter().filter(|event| event.token.is_some()).count();
        }
        n_left -= output.events.iter().filter(|event| event.end.is_some()).count();
        if !is_warm && output.events.len() == n_sequences {
            (is_warm, began) = (true, Instant::now());
        }
    }
    Ok(n_got as f64 / began.elapsed().as_secs_f64())
}

fn ranks(checkpoint: &Checkpoint, n_sequences: usize) -> Result<Vec<Rank>, Failure> {
    let split = shard::split(&checkpoint.config, &[1, 1])?;
    let vocab: Vec<_> = split.shards.iter().map(|shard| shard.vocab.clone()).collect();
    let limits = Limits {
        n_slots: n_sequences,
        max_batch_tokens: 256,
        max_sample_rows: n_sequences + 32,
        max_context: CONTEXT,
        n_kv_blocks: (n_sequences * CONTEXT / backend::KV_BLOCK_LEN) as u32,
        vocab: checkpoint.config.vocab,
    };
    let options = backend::Options {
        kv_format: backend::KvFormat::F16,
        activations: backend::Activations::Int12,
        threads: 1,
        max_batch_tokens: limits.max_batch_tokens,
        max_sample_rows: limits.max_sample_rows,
        max_context: limits.max_context,
        spin: true,
        cores: Vec::new(),
    };
    let mesh_options =
        MeshOptions { step_timeout: Duration::from_secs(60), spin: true, ..MeshOptions::default() };
    let mut ranks = Vec::new();
    for (rank, mesh) in Mesh::local(2, 1, &mesh_options)?.into_iter().enumerate() {
        let program = families::compile(&checkpoint.config, &split, rank);
        let progress = &mut |_, _| ControlFlow::Continue(());
        let loaded = backend::load(Kind::Cpu, checkpoint, program, &options, progress)?;
        let backend = loaded.into_backend(limits.n_kv_blocks)?;
        ranks.push(Rank::new(mesh, backend, vocab.clone(), limits.clone()));
    }
    Ok(ranks)
}

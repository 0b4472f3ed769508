//! Prints how fast a card runs models of random weights, beside what the card itself can do.
//!
//! `cargo run --release -p evener-worker --example cuda -- --card 0 [MODEL...]`, by `make gpu-bench`;
//! `--emulated` instead of a card shows that this program works, with figures that mean nothing. A
//! model is `synthetic:SHAPE:FORMAT[:LAYERS]`, or that with `/N` for the share of one of N ranks.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use evener_collective::{Mesh, Options as MeshOptions};
use evener_kernels::activation::Precision;
use evener_kernels::attention::Format as KvFormat;
use evener_kernels::cuda::activations::Activations;
use evener_kernels::cuda::linear::{Parts, Projection, Scratch, linear};
use evener_kernels::cuda::matrix::Matrix;
use evener_kernels::cuda::{Device, Formats, Place, Shape};
use evener_kernels::matrix::{Source, Unpacked};
use evener_kernels::quant::Format;
use evener_worker::backend::{self, Batch, KV_BLOCK_LEN, Kind, Span};
use evener_worker::checkpoint::Checkpoint;
use evener_worker::model::{families, shard};

type Failure = Box<dyn std::error::Error>;

/// What is measured of one device.
struct Sizes {
    models: Vec<String>,
    batches: &'static [usize],
    /// Positions of each sequence that decodes.
    context: usize,
    prompts: &'static [usize],
    copied_bytes: usize,
    /// Of a square product.
    product: usize,
    /// How long each figure is measured for, at least.
    patience: Duration,
}

/// What the device can do at most.
struct Ceilings {
    bytes_per_second: f64,
    flops_per_second: f64,
}

fn main() -> Result<(), Failure> {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    let place = match words.first().map(String::as_str) {
        Some("--emulated") => Place::Emulator,
        Some("--card") => Place::Card(words.get(1).ok_or("--card N")?.parse()?),
        _ => return Err("name a device: --card N, or --emulated".into()),
    };
    let n_words = if place == Place::Emulator { 1 } else { 2 };
    words.drain(..n_words);
    let sizes = sizes(place, words);
    let ceilings = ceilings(place, &sizes)?;
    for model in &sizes.models {
        measure(place, model, &sizes, &ceilings)?;
    }
    Ok(())
}

fn sizes(place: Place, models: Vec<String>) -> Sizes {
    let or = |models: Vec<String>, defaults: &[&str]| match models.is_empty() {
        true => defaults.iter().map(|&model| model.to_owned()).collect(),
        false => models,
    };
    match place {
        Place::Card(_) => Sizes {
            models: or(
                models,
                &[
                    "synthetic:llama-8b:bf16",
                    "synthetic:llama-8b:fp8",
                    "synthetic:llama-8b:q8_0",
                    "synthetic:llama-8b:q4_k_m",
                    "synthetic:llama-70b:bf16/8",
                ],
            ),
            batches: &[1, 8, 32, 128, 256],
            context: 1024,
            prompts: &[512, 1024, 2048, 4096, 8192],
            copied_bytes: 2 << 30,
            product: 8192,
            patience: Duration::from_millis(500),
        },
        Place::Emulator => Sizes {
            models: or(
                models,
                &[
                    "synthetic:llama-tiny:q4_0",
                    "synthetic:llama-tiny:fp8",
                    "synthetic:llama-tiny:bf16/2",
                ],
            ),
            batches: &[1, 3],
            context: 20,
            prompts: &[40],
            copied_bytes: 1 << 20,
            product: 64,
            patience: Duration::ZERO,
        },
    }
}

/// Seconds that `work` takes, run until `patience` is over and `device` has done all of it.
fn seconds(
    patience: Duration,
    mut work: impl FnMut() -> Result<(), Failure>,
) -> Result<f64, Failure> {
    work()?; // whatever is done once
    let (began, mut n) = (Instant::now(), 0);
    while n == 0 || began.elapsed() < patience {
        work()?;
        n += 1;
    }
    Ok(began.elapsed().as_secs_f64() / f64::from(n))
}

/// bf16 numbers that look random: products of zeros are faster than those of a model.
struct Noise {
    rows: Vec<Vec<u8>>,
}

impl Noise {
    fn new(columns: usize) -> Self {
        let mut x = 0x9e37_79b9_u32;
        let mut number = || {
            x ^= x << 13;
            x ^= x >> 17;
            x ^= x << 5;
            half::bf16::from_f32(x as f32 / u32::MAX as f32 - 0.5).to_le_bytes()
        };
        let mut row = || (0..columns).flat_map(|_| number()).collect();
        Self { rows: (0..17).map(|_| row()).collect() }
    }
}

impl Source for Noise {
    fn format(&self) -> Format {
        Format::Bf16
    }

    fn row_blocks(&self, row: usize) -> &[u8] {
        &self.rows[row % self.rows.len()]
    }

    fn first_column(&self) -> usize {
        0
    }

    fn row_f32(&self, row: usize, out: &mut [f32]) {
        for (out, bytes) in out.iter_mut().zip(self.row_blocks(row).as_chunks().0) {
            *out = half::bf16::from_le_bytes(*bytes).to_f32();
        }
    }
}

fn ceilings(place: Place, sizes: &Sizes) -> Result<Ceilings, Failure> {
    let formats = Formats::from_iter([Format::Bf16]);
    let shape = Shape { head_dim: 64, kv_format: KvFormat::F16, formats };
    let device = Device::open(place, shape, None)?;
    let [free, total] = device.memory()?.map(|bytes| bytes as f64 / 1e9);
    println!("{}, {free:.1} of {total:.1} GB free", device.name());

    let n = sizes.copied_bytes;
    let [from, to] = [device.buffer::<u8>(n)?, device.buffer::<u8>(n)?];
    let copy = seconds(sizes.patience, || {
        to.copy(0, &from, 0, n)?;
        Ok(device.synchronise()?)
    })?;
    drop((from, to));
    let bytes_per_second = 2.0 * n as f64 / copy;
    println!("copies at {:.0} GB/s, read and written", bytes_per_second / 1e9);

    let n = sizes.product;
    let noise = Noise::new(n);
    let unpacked = Unpacked { rows: n, columns: n, source: &noise };
    let weight = Matrix::load(&device, &unpacked, &mut |_| ControlFlow::Continue(()))?;
    let weight = weight.ok_or("nobody stopped it")?;
    let mut row = vec![0.0; n];
    let input = device.buffer::<f32>(n * n)?;
    for at in 0..n {
        noise.row_f32(at, &mut row);
        input.upload(at * n, &row)?;
    }
    let (parts, out) = (Parts::new(&device, [n])?, device.buffer::<f32>(n * n)?);
    let (activations, scratch) = (Activations::new(&device, n, n)?, Scratch::new(&device, n)?);
    let projection = Projection { weight: &weight, parts: &parts, out: &out, adds: false };
    let product = seconds(sizes.patience, || {
        linear(&input, n, n, &activations, &scratch, &[projection])?;
        Ok(device.synchronise()?)
    })?;
    let flops_per_second = 2.0 * (n as f64).powi(3) / product;
    println!("multiplies bf16 [{n}, {n}] at {:.1} TFLOP/s", flops_per_second / 1e12);
    Ok(Ceilings { bytes_per_second, flops_per_second })
}

fn measure(place: Place, model: &str, sizes: &Sizes, ceilings: &Ceilings) -> Result<(), Failure> {
    let (name, n_ranks) = match model.rsplit_once('/') {
        Some((name, n)) => (name, n.parse()?),
        None => (model, 1),
    };
    let checkpoint = Checkpoint::open(name.as_ref())?;
    let split = shard::split(&checkpoint.config, &vec![1; n_ranks])?;
    let program = families::compile(&checkpoint.config, &split, 0);
    let longest = sizes.prompts.iter().copied().max().unwrap_or(0).max(sizes.context);
    let most = sizes.batches.iter().copied().max().unwrap_or(1);
    let options = backend::Options {
        threads: 1,
        max_batch_tokens: longest.max(most),
        max_sample_rows: most,
        max_context: longest,
        kv_format: KvFormat::F16,
        activations: Precision::Int12,
        spin: true,
        cores: Vec::new(),
    };
    let began = Instant::now();
    let mut go_on = |_, _| ControlFlow::Continue(());
    let kind = Kind::Cuda(place);
    let loaded = backend::load(kind, &checkpoint, program, &options, &mut go_on)?;
    let (weights, of_block) = (loaded.resident_weight_bytes(), loaded.kv_block_bytes());
    println!(
        "\n{model}: {:.2} GB of weights, loaded in {:.1} s",
        weights as f64 / 1e9,
        began.elapsed().as_secs_f64()
    );
    let n_blocks = (most * sizes.context.div_ceil(KV_BLOCK_LEN)).max(longest / KV_BLOCK_LEN + 1);
    let mut backend = loaded.into_backend(n_blocks as u32)?;
    let mut mesh = Mesh::local(1, 1, &MeshOptions::default())?.remove(0);
    let mut step = |batch: &Batch| -> Result<(), Failure> {
        backend.run(batch, &mut mesh)?;
        // What an engine that chooses the likeliest token fetches; it waits for the device.
        let (mut peaks, mut best) = (Vec::new(), Vec::new());
        let columns = split.shards[0].vocab.len();
        backend.likeliest(batch.sample_rows.len(), columns, &mut peaks, &mut best);
        Ok(())
    };
    println!("decode   batch      tok/s     GB/s   of the copy bandwidth");
    for &n in sizes.batches {
        let batch = batch((0..n).map(|_| (sizes.context - 1, 1)));
        // Twice more than `seconds` does: a graph is recorded when its sizes come again.
        step(&batch)?;
        let took = seconds(sizes.patience, || step(&batch))?;
        let kv = (n * sizes.context.div_ceil(KV_BLOCK_LEN)) as f64 * of_block as f64;
        let rate = (weights as f64 + kv) / took;
        println!(
            "{n:>14} {:>10.1} {:>8.0} {:>8.1} %",
            n as f64 / took,
            rate / 1e9,
            100.0 * rate / ceilings.bytes_per_second
        );
    }
    println!("prefill  tokens     tok/s  TFLOP/s   of the bf16 peak");
    let n_weights = n_weights(&checkpoint, n_ranks);
    for &n in sizes.prompts {
        let batch = batch([(0, n)].into_iter());
        let took = seconds(sizes.patience, || step(&batch))?;
        let rate = 2.0 * n_weights * n as f64 / took;
        println!(
            "{n:>14} {:>10.0} {:>8.2} {:>8.1} %",
            n as f64 / took,
            rate / 1e12,
            100.0 * rate / ceilings.flops_per_second
        );
    }
    for batch in [
        batch([(sizes.context - 1, 1)].into_iter()),
        batch((0..most).map(|_| (sizes.context - 1, 1))),
        batch([(0, longest)].into_iter()),
    ] {
        print_ops(backend.time_ops(&batch)?, batch.tokens.len());
    }
    Ok(())
}

/// Where a step's time goes: ops that make the same, added up over the layers.
fn print_ops(times: Vec<(String, Duration)>, n_tokens: usize) {
    let mut by_label: Vec<(String, u32, Duration)> = Vec::new();
    for (label, time) in times {
        match by_label.iter_mut().find(|(of, ..)| *of == label) {
            Some((_, n, sum)) => {
                *n += 1;
                *sum += time;
            }
            None => by_label.push((label, 1, time)),
        }
    }
    let total: Duration = by_label.iter().map(|(_, _, sum)| *sum).sum();
    println!("ops of {n_tokens} tokens, one by one          n     us   of all");
    for (label, n, sum) in by_label {
        let share = 100.0 * sum.as_secs_f64() / total.as_secs_f64();
        println!("{label:>36} {n:>4} {:>6.0} {share:>6.1} %", sum.as_secs_f64() * 1e6);
    }
}

/// Weights that each token of a prompt meets on one rank: those of the layers.
fn n_weights(checkpoint: &Checkpoint, n_ranks: usize) -> f64 {
    let config = &checkpoint.config;
    let heads = config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads);
    let of_layer = config.hidden * (heads + 3 * config.ffn);
    (config.n_layers * of_layer) as f64 / n_ranks as f64
}

/// Sequences of (first position, rows), each with blocks of its own and its last row sampled.
fn batch(sequences: impl Iterator<Item = (usize, usize)>) -> Batch {
    let mut batch = Batch { step: 1, ..Batch::default() };
    let mut first_free = 0;
    for (start, n_rows) in sequences {
        let n_blocks = (start + n_rows).div_ceil(KV_BLOCK_LEN);
        batch.spans.push(Span {
            first_row: batch.tokens.len() as u32,
            n_rows: n_rows as u32,
            first_block: batch.block_tables.len() as u32,
            n_blocks: n_blocks as u32,
        });
        batch.block_tables.extend((first_free..first_free + n_blocks).map(|block| block as u32));
        for position in start..start + n_rows {
            batch.tokens.push((position * 37 % 250) as u32);
            batch.positions.push(position as u32);
            batch.slots.push((first_free * KV_BLOCK_LEN + position) as u32);
        }
        batch.sample_rows.push(batch.tokens.len() as u32 - 1);
        first_free += n_blocks;
    }
    batch
}

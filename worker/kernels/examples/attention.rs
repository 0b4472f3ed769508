//! Attention beside the machine's own limits: decode in bytes of KV a second against the read
//! bandwidth, prefill in operations against the f32 peak, all measured in turn in one run.
//!
//! `cargo run --release -p evener-kernels --example attention [CONTEXT [SHAPE]]`

use std::hint::black_box;
use std::time::Instant;

use evener_kernels::attention::{BLOCK_LEN, Format, Heads, KvCache, Rows, Scratch, Span, attend};
use evener_kernels::{Isa, Pool};

/// Each figure is the best of so many runs.
const RUNS: usize = 7;
/// Memory of the caches that decode goes through, layer by layer: more than any last-level share.
const STREAM_BYTES: usize = 512 << 20;
/// Of a prefill step.
const PREFILL_ROWS: usize = 512;

struct Shape {
    name: &'static str,
    n_kv_heads: usize,
    heads_per_kv: usize,
    head_dim: usize,
}

const SHAPES: [Shape; 4] = [
    Shape { name: "llama-1b", n_kv_heads: 8, heads_per_kv: 4, head_dim: 64 },
    Shape { name: "smollm2", n_kv_heads: 3, heads_per_kv: 3, head_dim: 64 },
    Shape { name: "8b", n_kv_heads: 8, heads_per_kv: 4, head_dim: 128 },
    Shape { name: "gemma", n_kv_heads: 1, heads_per_kv: 4, head_dim: 256 },
];

fn main() {
    let longest = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(8192);
    let only = std::env::args().nth(2);
    let is_asked = |shape: &&Shape| only.as_ref().is_none_or(|only| only == shape.name);
    let names = SHAPES.map(|shape| shape.name).join(", ");
    assert!(SHAPES.iter().any(|shape| is_asked(&shape)), "no shape {only:?}; there are: {names}");
    let isa = Isa::detect();
    println!("{}; best of {RUNS}", isa.name());
    for n_threads in [1, 2] {
        let mut pool = Pool::new(n_threads, true);
        let stream: Vec<f32> = vec![1.0; STREAM_BYTES / 4];
        let peak = f32_peak(&mut pool);
        println!(
            "\n{n_threads} threads: {:.1} GB/s read, {:.0} GFLOP/s f32",
            read(&mut pool, &stream),
            peak / 1e9
        );
        for shape in SHAPES.iter().filter(is_asked) {
            for format in Format::ALL {
                for context in [1024, longest] {
                    for batch in [1, 8] {
                        decode(&mut pool, isa, shape, format, context, batch, &stream);
                    }
                }
                for context in [PREFILL_ROWS, longest] {
                    prefill(&mut pool, isa, shape, format, context, peak);
                }
            }
        }
    }
}

/// Seconds of the fastest run.
fn best(mut f: impl FnMut()) -> f64 {
    let run = |_| {
        let began = Instant::now();
        f();
        began.elapsed().as_secs_f64()
    };
    (0..RUNS).map(run).fold(f64::INFINITY, f64::min)
}

/// GB/s of reading `stream`, with the vectors that the compiler makes of a sum.
fn read(pool: &mut Pool, stream: &[f32]) -> f64 {
    let n_threads = pool.n_threads();
    let seconds = best(|| {
        pool.run(&|thread| {
            let part = evener_kernels::pool::part(stream.len() / 64, thread, n_threads);
            let part = &stream[part.start * 64..part.end * 64];
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: the machine has AVX-512 F.
                black_box(unsafe { sum_512(part) });
                return;
            }
            black_box(sum(part));
        });
    });
    (stream.len() * 4) as f64 / seconds / 1e9
}

/// With the prefetching that a good loop has.
#[inline(always)]
fn sum(numbers: &[f32]) -> [f32; 64] {
    const AHEAD: usize = 4096;
    let mut sums = [0f32; 64];
    for run in numbers.chunks_exact(64) {
        #[cfg(target_arch = "x86_64")]
        for line in 0..4 {
            let ahead = run.as_ptr().cast::<i8>().wrapping_add(AHEAD + 64 * line);
            // SAFETY: any address may be fetched ahead.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(ahead) };
        }
        for i in 0..64 {
            sums[i] += run[i];
        }
    }
    sums
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_512(numbers: &[f32]) -> [f32; 64] {
    sum(numbers)
}

/// Operations a second of fused multiply-adds on registers.
fn f32_peak(pool: &mut Pool) -> f64 {
    const ROUNDS: usize = 1 << 20;
    let n_threads = pool.n_threads();
    let seconds = best(|| {
        pool.run(&|_| {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx512f") {
                // SAFETY: the machine has AVX-512 F.
                unsafe { fma_512(ROUNDS) }
            } else if is_x86_feature_detected!("fma") {
                // SAFETY: the machine has FMA.
                unsafe { fma_256(ROUNDS) }
            }
        });
    });
    (n_threads * ROUNDS * 192 * 2) as f64 / seconds
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn fma_512(rounds: usize) {
    use std::arch::x86_64::*;
    let mut sums = [_mm512_set1_ps(1.0); 12];
    let (a, b) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(0.5)));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, a, b);
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn fma_256(rounds: usize) {
    use std::arch::x86_64::*;
    let mut sums = [_mm256_set1_ps(1.0); 12];
    let (a, b) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(0.5)));
    for _ in 0..2 * rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, a, b);
        }
    }
    black_box(sums);
}

fn noise(n: usize) -> Vec<f32> {
    let mut x = 1u32;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        (x % 2001) as f32 / 1000.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// A layer's cache of `n_positions`, filled.
fn cache(isa: Isa, shape: &Shape, format: Format, n_positions: usize) -> KvCache {
    let n_blocks = n_positions.div_ceil(BLOCK_LEN);
    let mut cache = KvCache::new(format, n_blocks, shape.n_kv_heads, shape.head_dim)
        .expect("memory for the cache");
    let width = shape.n_kv_heads * shape.head_dim;
    let noise = noise(width + 64);
    let mut alone = Pool::new(1, false);
    for slot in 0..(n_blocks * BLOCK_LEN) as u32 {
        let row = &noise[slot as usize % 64..][..width];
        cache.write(&mut alone, isa, &[slot], row, row);
    }
    cache
}

/// Decode steps over as many layers as do not fit a last-level cache; in turn with plain reading.
fn decode(
    pool: &mut Pool,
    isa: Isa,
    shape: &Shape,
    format: Format,
    context: usize,
    batch: usize,
    stream: &[f32],
) {
    let per_head = format.bytes_per_position(shape.head_dim);
    let kv_bytes = batch * context * shape.n_kv_heads * per_head;
    let n_layers = (STREAM_BYTES / kv_bytes).clamp(1, 64);
    let layers: Vec<_> =
        (0..n_layers).map(|_| cache(isa, shape, format, batch * context)).collect();
    let n_blocks = context.div_ceil(BLOCK_LEN);
    let span = |s| Span {
        first_row: s,
        n_rows: 1,
        first_position: context - 1,
        first_block: s * n_blocks,
    };
    let spans: Vec<_> = (0..batch).map(span).collect();
    let block_tables: Vec<u32> = (0..(batch * n_blocks) as u32).collect();
    let rows = Rows { spans: &spans, block_tables: &block_tables };
    let mut step = Step::new(shape, batch, context, pool.n_threads());
    let seconds = best(|| layers.iter().for_each(|layer| step.run(pool, isa, layer, rows)));
    let rate = (n_layers * kv_bytes) as f64 / seconds / 1e9;
    let limit = read(pool, stream);
    println!(
        "decode  {:9} {:5} context {context:5} batch {batch}: {:8.1} us a layer, {rate:6.1} GB/s of \
         {limit:.1} read ({:.0} %)",
        shape.name,
        format.name(),
        seconds / n_layers as f64 * 1e6,
        100.0 * rate / limit,
    );
}

/// The last rows of a context, in one step.
fn prefill(pool: &mut Pool, isa: Isa, shape: &Shape, format: Format, context: usize, peak: f64) {
    let layer = cache(isa, shape, format, context);
    let n_rows = PREFILL_ROWS.min(context);
    let span = Span { first_row: 0, n_rows, first_position: context - n_rows, first_block: 0 };
    let block_tables: Vec<u32> = (0..context.div_ceil(BLOCK_LEN) as u32).collect();
    let rows = Rows { spans: &[span], block_tables: &block_tables };
    let mut step = Step::new(shape, n_rows, context, pool.n_threads());
    let seconds = best(|| step.run(pool, isa, &layer, rows));
    let seen: usize = (context - n_rows + 1..=context).sum();
    let operations = 4 * seen * shape.n_kv_heads * shape.heads_per_kv * shape.head_dim;
    let rate = operations as f64 / seconds;
    println!(
        "prefill {:9} {:5} context {context:5} rows {n_rows}: {:6.2} ms a layer, {:6.1} GFLOP/s \
         ({:.0} %)",
        shape.name,
        format.name(),
        seconds * 1e3,
        rate / 1e9,
        100.0 * rate / peak,
    );
}

struct Step {
    kv_of_head: Vec<usize>,
    head_dim: usize,
    q: Vec<f32>,
    out: Vec<f32>,
    scratch: Scratch,
}

impl Step {
    fn new(shape: &Shape, n_rows: usize, context: usize, n_threads: usize) -> Self {
        let n_heads = shape.n_kv_heads * shape.heads_per_kv;
        let q = noise(n_rows * n_heads * shape.head_dim);
        Self {
            kv_of_head: (0..n_heads).map(|head| head / shape.heads_per_kv).collect(),
            head_dim: shape.head_dim,
            out: q.clone(),
            q,
            scratch: Scratch::new(n_threads, context, shape.head_dim),
        }
    }

    fn run(&mut self, pool: &mut Pool, isa: Isa, layer: &KvCache, rows: Rows<'_>) {
        let heads = Heads {
            kv_of_head: &self.kv_of_head,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
        };
        attend(pool, isa, layer, heads, rows, &self.q, &mut self.out, &mut self.scratch);
        black_box(&mut self.out);
    }
}

//! The CPU backend: a rank's weights in kernel form, and the walk over its program.
//!
//! Kernels, SIMD and threads are `evener-kernels`; this file only holds memory and says which
//! kernel an op means. Every result has the same bits whatever the batch, the threads and the
//! split.

mod weights;

use std::sync::Arc;

use evener_collective::{Collective, Tag};
use evener_kernels::activation::{Activation, Precision};
use evener_kernels::attention::{self, Heads, KvCache, Scratch, attend};
use evener_kernels::elementwise::silu_gate;
use evener_kernels::linear::{self, Input, Sum, linear, linear_parts};
use evener_kernels::norm::rms_norm;
use evener_kernels::rope::{self, rotate};
use evener_kernels::{Isa, Matrix, Pool};

use super::{Backend, Batch, Error, KV_BLOCK_LEN, Loaded, Options};
use crate::model::config::{Rope, RopePairs};
use crate::model::program::{BufferId, Op, WeightId};

use weights::Weights;
pub use weights::load;

const _: () = assert!(KV_BLOCK_LEN == attention::BLOCK_LEN);

/// Of the activations that quantised weights are multiplied with. At 8 bits the demo model chooses
/// another token than exact arithmetic at 3.5 % of positions and its perplexity is 0.7 % off; at 16
/// both vanish, for twice the multiplications.
pub(crate) const PRECISION: Precision = Precision::Int12;

/// A rank's packed weights.
pub struct Cpu {
    weights: Arc<Weights>,
    options: Options,
    isa: Isa,
    /// That packed the weights: each thread reads what it touched first.
    pool: Pool,
}

impl Loaded for Cpu {
    fn resident_weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    fn kv_block_bytes(&self) -> u64 {
        let program = &self.weights.program;
        let per_layer = 2 * 4 * program.n_kv_heads * program.head_dim * KV_BLOCK_LEN;
        (program.n_layers * per_layer) as u64
    }

    fn name(&self) -> String {
        format!("cpu {}", self.isa.name())
    }

    fn deterministic(&self) -> bool {
        true
    }

    fn into_backend(self: Box<Self>, n_kv_blocks: u32) -> Result<Box<dyn Backend>, Error> {
        Ok(Box::new(Rank::new(*self, n_kv_blocks as usize)))
    }
}

/// A rank at work: weights, cache, buffers and threads.
struct Rank {
    weights: Arc<Weights>,
    isa: Isa,
    pool: Pool,
    /// By [`BufferId`]; the front of each is `[n_parts, T, columns]` of the current step.
    buffers: Vec<Vec<f32>>,
    /// By layer.
    caches: Vec<KvCache>,
    activation: Activation,
    attention: Scratch,
    angles: Angles,
    sampled: Vec<f32>, // [S, hidden]
    logits: Vec<f32>,  // [S, own vocabulary rows]
    n_logits: usize,
    max_batch_tokens: usize,
    max_sample_rows: usize,
}

impl Rank {
    fn new(loaded: Cpu, n_kv_blocks: usize) -> Self {
        let Cpu { weights, options, isa, pool } = loaded;
        let program = &weights.program;
        let tokens = options.max_batch_tokens;
        let widest = program.buffers.iter().map(|b| b.columns).max().unwrap_or(0);
        let buffers: Vec<_> =
            program.buffers.iter().map(|b| vec![0.0; b.n_parts * tokens * b.columns]).collect();
        let new_cache = || KvCache::new(n_kv_blocks, program.n_kv_heads, program.head_dim);
        Self {
            isa,
            pool,
            buffers,
            caches: (0..program.n_layers).map(|_| new_cache()).collect(),
            activation: Activation::with_capacity(tokens.max(options.max_sample_rows), widest, PRECISION),
            attention: Scratch::new(options.threads, options.max_context, program.head_dim),
            angles: Angles::new(weights.rope, tokens),
            sampled: vec![0.0; options.max_sample_rows * widest],
            logits: vec![0.0; options.max_sample_rows * program.vocab.len()],
            n_logits: 0,
            max_batch_tokens: tokens,
            max_sample_rows: options.max_sample_rows,
            weights,
        }
    }
}

impl Backend for Rank {
    fn run(&mut self, batch: &Batch, collective: &mut dyn Collective) -> Result<(), Error> {
        assert!(
            batch.tokens.len() <= self.max_batch_tokens,
            "the engine keeps to its token budget"
        );
        assert!(batch.sample_rows.len() <= self.max_sample_rows, "and to its sample rows");
        let weights = Arc::clone(&self.weights);
        self.angles.fill(&batch.positions);
        let mut step = Step { rank: self, weights: &weights, batch, n_tokens: batch.tokens.len() };
        let mut op_tag = 0;
        for op in &weights.program.ops {
            if let Op::AllReduce { .. } = op {
                op_tag += 1;
            }
            step.run(op, Tag { step: batch.step, op: op_tag }, collective)?;
        }
        Ok(())
    }

    fn logits(&self) -> &[f32] {
        &self.logits[..self.n_logits]
    }
}

/// One step of one rank.
struct Step<'a> {
    rank: &'a mut Rank,
    weights: &'a Weights,
    batch: &'a Batch,
    n_tokens: usize,
}

impl Step<'_> {
    fn run(&mut self, op: &Op, tag: Tag, collective: &mut dyn Collective) -> Result<(), Error> {
        match op {
            Op::Embed { table, out } => self.embed(*table, *out),
            Op::Norm { residual, delta, weight, eps, out } => {
                self.norm(*residual, *delta, *weight, *eps, *out);
            }
            Op::Linear { input, projections } => {
                let mut outs: Vec<_> = projections.iter().map(|p| self.take(p.out)).collect();
                let mut jobs: Vec<_> = projections
                    .iter()
                    .zip(&mut outs)
                    .map(|(p, out)| {
                        let weight = self.weights.matrix(p.weight);
                        linear::Projection {
                            weight,
                            out: &mut out[..self.n_tokens * weight.rows()],
                        }
                    })
                    .collect();
                let rank = &mut *self.rank;
                let columns = self.weights.columns(*input);
                let input = Input {
                    x: &rank.buffers[input.0][..self.n_tokens * columns],
                    rows: self.n_tokens,
                    columns,
                    scratch: &mut rank.activation,
                };
                linear(&mut rank.pool, rank.isa, input, &mut jobs);
                for (projection, out) in projections.iter().zip(outs) {
                    self.put(projection.out, out);
                }
            }
            Op::LinearParts { input, weight, sum, out: out_id } => {
                let mut out = self.take(*out_id);
                let rank = &mut *self.rank;
                let columns = self.weights.columns(*input);
                let input = Input {
                    x: &rank.buffers[input.0][..self.n_tokens * columns],
                    rows: self.n_tokens,
                    columns,
                    scratch: &mut rank.activation,
                };
                let weight = self.weights.matrix(*weight);
                let n = sum.part_leaves.len() * self.n_tokens * weight.rows();
                let projection = linear::Projection { weight, out: &mut out[..n] };
                let sum = Sum {
                    leaf_columns: sum.leaf_columns,
                    part_leaves: &sum.part_leaves,
                    merges: &sum.merges,
                };
                linear_parts(&mut rank.pool, rank.isa, input, projection, &sum);
                self.put(*out_id, out);
            }
            Op::RopeKv { q, k, v, layer, rope } => self.rope_kv([*q, *k, *v], *layer, rope.pairs),
            Op::Attention { q, layer, kv_of_head, scale, out } => {
                self.attention(*q, *layer, kv_of_head, *scale, *out);
            }
            Op::SiluGate { gate, up, out: out_id } => {
                let mut out = self.take(*out_id);
                let n = self.n_tokens * self.weights.columns(*out_id);
                let rank = &mut *self.rank;
                let (gate, up) = (&rank.buffers[gate.0][..n], &rank.buffers[up.0][..n]);
                silu_gate(&mut rank.pool, rank.isa, gate, up, &mut out[..n]);
                self.put(*out_id, out);
            }
            Op::AllReduce { parts, plan, out: out_id } => {
                let mut out = self.take(*out_id);
                let n = self.n_tokens * self.weights.columns(*out_id);
                let program = &self.weights.program;
                let n_parts = program.buffers[parts.0].n_parts;
                let parts = &self.rank.buffers[parts.0][..n_parts * n];
                let plan = &program.reduce_plans[plan.0];
                let result = collective.all_reduce(tag, plan, parts, &mut out[..n]);
                self.put(*out_id, out);
                result?;
            }
            Op::Head { input, weight } => self.head(*input, *weight),
        }
        Ok(())
    }

    /// Takes a buffer out, so that it can be written while others are read; no memory moves.
    fn take(&mut self, id: BufferId) -> Vec<f32> {
        std::mem::take(&mut self.rank.buffers[id.0])
    }

    fn put(&mut self, id: BufferId, buffer: Vec<f32>) {
        self.rank.buffers[id.0] = buffer;
    }

    fn embed(&mut self, table: WeightId, out: BufferId) {
        let mut buffer = self.take(out);
        let columns = self.weights.columns(out);
        let rows = &self.weights.program.weights[table.0].rows;
        let matrix = self.weights.matrix(table);
        for (&token, out) in self.batch.tokens.iter().zip(buffer.chunks_exact_mut(columns)) {
            let token = token as usize;
            if rows.contains(&token) {
                matrix.dequantise_row(token - rows.start, out);
            } else {
                out.fill(0.0);
            }
        }
        self.put(out, buffer);
    }

    fn norm(
        &mut self,
        residual: BufferId,
        delta: Option<BufferId>,
        weight: WeightId,
        eps: f32,
        out: BufferId,
    ) {
        let n = self.n_tokens * self.weights.columns(out);
        let (mut stream, mut normed) = (self.take(residual), self.take(out));
        let rank = &mut *self.rank;
        let delta = delta.map(|id| &rank.buffers[id.0][..n]);
        let weight = self.weights.vector(weight);
        rms_norm(&mut rank.pool, rank.isa, &mut stream[..n], delta, weight, eps, &mut normed[..n]);
        self.put(residual, stream);
        self.put(out, normed);
    }

    fn rope_kv(&mut self, [q, k, v]: [BufferId; 3], layer: usize, pairs: RopePairs) {
        let head_dim = self.weights.program.head_dim;
        let (q_columns, kv_columns) = (self.weights.columns(q), self.weights.columns(k));
        let pairs = match pairs {
            RopePairs::Adjacent => rope::Pairs::Adjacent,
            RopePairs::Halves => rope::Pairs::Halves,
        };
        let (mut queries, mut keys) = (self.take(q), self.take(k));
        let rank = &mut *self.rank;
        let values = &rank.buffers[v.0];
        for (row, &slot) in self.batch.slots.iter().enumerate() {
            let (cos, sin) = rank.angles.row(row);
            let (q, kv) = (row * q_columns, row * kv_columns);
            rotate(&mut queries[q..q + q_columns], head_dim, pairs, cos, sin);
            rotate(&mut keys[kv..kv + kv_columns], head_dim, pairs, cos, sin);
            let (k, v) = (&keys[kv..kv + kv_columns], &values[kv..kv + kv_columns]);
            rank.caches[layer].write(slot as usize, k, v);
        }
        self.put(q, queries);
        self.put(k, keys);
    }

    fn attention(
        &mut self,
        q: BufferId,
        layer: usize,
        kv_of_head: &[usize],
        scale: f32,
        out: BufferId,
    ) {
        let n = self.n_tokens * self.weights.columns(q);
        let mut buffer = self.take(out);
        let batch = self.batch;
        let spans: Vec<_> = batch
            .spans
            .iter()
            .map(|span| attention::Span {
                first_row: span.first_row as usize,
                n_rows: span.n_rows as usize,
                first_position: batch.positions[span.first_row as usize] as usize,
                blocks: &batch.block_tables[span.first_block as usize..][..span.n_blocks as usize],
            })
            .collect();
        let heads = Heads { kv_of_head, head_dim: self.weights.program.head_dim, scale };
        let rank = &mut *self.rank;
        attend(
            &mut rank.pool,
            rank.isa,
            &rank.caches[layer],
            heads,
            &spans,
            &rank.buffers[q.0][..n],
            &mut buffer[..n],
            &mut rank.attention,
        );
        self.put(out, buffer);
    }

    fn head(&mut self, input: BufferId, weight: WeightId) {
        let columns = self.weights.columns(input);
        let rank = &mut *self.rank;
        let n_rows = self.batch.sample_rows.len();
        for (&row, out) in self.batch.sample_rows.iter().zip(rank.sampled.chunks_exact_mut(columns))
        {
            let at = row as usize * columns;
            out.copy_from_slice(&rank.buffers[input.0][at..at + columns]);
        }
        let weight: &Matrix = self.weights.matrix(weight);
        rank.n_logits = n_rows * weight.rows();
        let input = Input {
            x: &rank.sampled[..n_rows * columns],
            rows: n_rows,
            columns,
            scratch: &mut rank.activation,
        };
        let out = &mut rank.logits[..rank.n_logits];
        linear(&mut rank.pool, rank.isa, input, &mut [linear::Projection { weight, out }]);
    }
}

/// Cosine and sine of every row's angles, made once a step.
#[derive(Default)]
struct Angles {
    frequencies: Vec<f64>, // radians a position, by pair
    cos: Vec<f32>,         // [T, pairs]
    sin: Vec<f32>,         // [T, pairs]
}

impl Angles {
    /// libm's own functions, so that all machines turn by the same angle.
    fn new(rope: Option<Rope>, max_rows: usize) -> Self {
        let Some(rope) = rope else { return Self::default() };
        let exponent = |pair: usize| -2.0 * pair as f64 / rope.dim as f64;
        let frequency = |pair| libm::pow(f64::from(rope.theta), exponent(pair));
        let frequencies: Vec<f64> = (0..rope.dim / 2).map(frequency).collect();
        let room = max_rows * frequencies.len();
        Self { frequencies, cos: Vec::with_capacity(room), sin: Vec::with_capacity(room) }
    }

    fn fill(&mut self, positions: &[u32]) {
        self.cos.clear();
        self.sin.clear();
        for &position in positions {
            for frequency in &self.frequencies {
                let angle = f64::from(position) * frequency;
                self.cos.push(libm::cos(angle) as f32);
                self.sin.push(libm::sin(angle) as f32);
            }
        }
    }

    fn row(&self, row: usize) -> (&[f32], &[f32]) {
        let n = self.frequencies.len();
        (&self.cos[row * n..(row + 1) * n], &self.sin[row * n..(row + 1) * n])
    }
}

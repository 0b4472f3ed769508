//! The CPU backend: a rank's weights in kernel form, and the walk over its program.
//!
//! Kernels, SIMD and threads are `evener-kernels`; this file only holds memory and says which
//! kernel an op means. Every result has the same bits whatever the batch, the threads and the
//! split.

mod angles;
mod experts;
mod weights;

use std::sync::Arc;

use evener_collective::{Collective, Tag};
use evener_kernels::activation::Activation;
use evener_kernels::attention::{self, Heads, KvCache, Rows, Scratch, attend};
use evener_kernels::elementwise::silu_gate;
use evener_kernels::linear::{self, Input, Sum, linear, linear_parts};
use evener_kernels::memory::prefer_huge;
use evener_kernels::norm::rms_norm;
use evener_kernels::peaks::{n_peaks, peaks};
use evener_kernels::rope::{self, rotate};
use evener_kernels::{Isa, Matrix, Pool};

use super::{Backend, Batch, Error, KV_BLOCK_LEN, Loaded, Options};
use crate::model::config::RopePairs;
use crate::model::program::{BufferId, Op, Projection, WeightId};

use angles::Angles;
use weights::Weights;
pub use weights::load;

const _: () = assert!(KV_BLOCK_LEN == attention::BLOCK_LEN);

/// Most weights that one linear op has.
const MAX_PROJECTIONS: usize = 4;

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
        let per_head = self.options.kv_format.bytes_per_position(program.head_dim);
        (program.n_layers * program.n_kv_heads * per_head * KV_BLOCK_LEN) as u64
    }

    fn name(&self) -> String {
        format!("cpu {}", self.isa.name())
    }

    fn deterministic(&self) -> bool {
        true
    }

    fn into_backend(self: Box<Self>, n_kv_blocks: u32) -> Result<Box<dyn Backend>, Error> {
        let rank = Rank::new(*self, n_kv_blocks as usize);
        let no_memory =
            |error| Error::Device { reason: format!("memory for the KV cache: {error}") };
        Ok(Box::new(rank.map_err(no_memory)?))
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
    /// Of the current step.
    spans: Vec<attention::Span>,
    angles: Angles,
    /// Places in the routes of those tokens that take the expert at work.
    taking: Vec<usize>,
    sampled: Vec<f32>, // [S, hidden]
    logits: Vec<f32>,  // [S, own vocabulary rows]
    n_logits: usize,
    max_batch_tokens: usize,
    max_sample_rows: usize,
}

impl Rank {
    fn new(loaded: Cpu, n_kv_blocks: usize) -> std::io::Result<Self> {
        let Cpu { weights, options, isa, mut pool } = loaded;
        linear::prepare(&mut pool);
        let program = &weights.program;
        let tokens = options.max_batch_tokens;
        let widest = program.buffers.iter().map(|b| b.columns).max().unwrap_or(0);
        let buffers: Vec<_> =
            program.buffers.iter().map(|b| vec![0.0; b.n_parts * tokens * b.columns]).collect();
        let (n_kv_heads, head_dim) = (program.n_kv_heads, program.head_dim);
        let new_cache = || KvCache::new(options.kv_format, n_kv_blocks, n_kv_heads, head_dim);
        buffers.iter().for_each(|buffer| prefer_huge(buffer));
        let caches = (0..program.n_layers).map(|_| new_cache()).collect::<std::io::Result<_>>()?;
        Ok(Self {
            isa,
            pool,
            buffers,
            caches,
            activation: Activation::with_capacity(
                tokens.max(options.max_sample_rows),
                widest,
                options.activations,
            ),
            attention: Scratch::new(options.threads, options.max_context, program.head_dim),
            spans: Vec::with_capacity(tokens),
            angles: Angles::new(weights.rope, options.max_context),
            taking: Vec::with_capacity(tokens),
            sampled: vec![0.0; options.max_sample_rows * widest],
            logits: vec![0.0; options.max_sample_rows * program.vocab.len()],
            n_logits: 0,
            max_batch_tokens: tokens,
            max_sample_rows: options.max_sample_rows,
            weights,
        })
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
        let end = batch.positions.iter().max().map_or(0, |&last| last as usize + 1);
        self.angles.extend(&mut self.pool, end);
        self.spans.clear();
        self.spans.extend(batch.spans.iter().map(|span| attention::Span {
            first_row: span.first_row as usize,
            n_rows: span.n_rows as usize,
            first_position: batch.positions[span.first_row as usize] as usize,
            first_block: span.first_block as usize,
        }));
        let mut step = Step { rank: self, weights: &weights, batch, n_tokens: batch.tokens.len() };
        let mut op_tag = 0;
        for (op, next) in weights.ops() {
            if let Op::AllReduce { .. } = op {
                op_tag += 1;
            }
            if let Some(next) = next {
                step.rank.pool.read_next(|thread, n_threads| next.tiles_of(thread, n_threads));
            }
            step.run(op, Tag { step: batch.step, op: op_tag }, collective)?;
        }
        Ok(())
    }

    fn copy_block(&mut self, from: u32, to: u32) {
        self.caches.iter_mut().for_each(|cache| cache.copy_block(from as usize, to as usize));
    }

    fn logits(&self) -> &[f32] {
        &self.logits[..self.n_logits]
    }

    fn peaks(&mut self, columns: usize, out: &mut Vec<f32>) {
        let rows = self.n_logits.checked_div(columns).unwrap_or(0);
        out.resize(rows * n_peaks(columns), 0.0);
        peaks(&mut self.pool, self.isa, &self.logits[..self.n_logits], columns, out);
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
            Op::Linear { input, projections } => self.linear(*input, projections),
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
            Op::Route { logits, out, .. } => self.route(*logits, *out),
            Op::Experts { input, routes, experts, sum, room, out } => {
                self.experts([*input, *routes, *out], experts, sum, room);
            }
            Op::Combine { outputs, routes, out } => self.combine(*outputs, *routes, *out),
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
        let tokens = &self.batch.tokens;
        let pool = &mut self.rank.pool;
        pool.for_rows(&mut buffer[..self.n_tokens * columns], columns, &|row, out| {
            let token = tokens[row] as usize;
            if rows.contains(&token) {
                matrix.dequantise_row(token - rows.start, out);
            } else {
                out.fill(0.0);
            }
        });
        self.put(out, buffer);
    }

    fn linear(&mut self, input: BufferId, projections: &[Projection]) {
        assert!(projections.len() <= MAX_PROJECTIONS, "{} projections", projections.len());
        let mut outs: [Vec<f32>; MAX_PROJECTIONS] = Default::default();
        for (out, projection) in outs.iter_mut().zip(projections) {
            *out = self.take(projection.out);
        }
        let mut outs_left = outs.iter_mut();
        let mut jobs: [linear::Projection<'_>; MAX_PROJECTIONS] = std::array::from_fn(|i| {
            // Places beyond the last projection repeat it without room for a product.
            let weight = self.weights.matrix(projections[i.min(projections.len() - 1)].weight);
            let out = outs_left.next().expect("as many places");
            let n = if i < projections.len() { self.n_tokens * weight.rows() } else { 0 };
            linear::Projection { weight, out: &mut out[..n] }
        });
        let rank = &mut *self.rank;
        let columns = self.weights.columns(input);
        let input = Input {
            x: &rank.buffers[input.0][..self.n_tokens * columns],
            rows: self.n_tokens,
            columns,
            scratch: &mut rank.activation,
        };
        linear(&mut rank.pool, rank.isa, input, &mut jobs[..projections.len()]);
        for (projection, out) in projections.iter().zip(outs) {
            self.put(projection.out, out);
        }
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
        let (batch, n) = (self.batch, self.n_tokens);
        let rank = &mut *self.rank;
        let (isa, angles) = (rank.isa, &rank.angles);
        let turn = |row: usize, x: &mut [f32]| {
            let (cos, sin) = angles.at(batch.positions[row] as usize);
            rotate(isa, x, head_dim, pairs, cos, sin);
        };
        rank.pool.for_rows(&mut queries[..n * q_columns], q_columns, &turn);
        rank.pool.for_rows(&mut keys[..n * kv_columns], kv_columns, &turn);
        let values = &rank.buffers[v.0];
        let n = self.n_tokens * kv_columns;
        let pool = &mut rank.pool;
        rank.caches[layer].write(pool, isa, &batch.slots, &keys[..n], &values[..n]);
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
        let heads = Heads { kv_of_head, head_dim: self.weights.program.head_dim, scale };
        let rank = &mut *self.rank;
        let rows = Rows { spans: &rank.spans, block_tables: &self.batch.block_tables };
        attend(
            &mut rank.pool,
            rank.isa,
            &rank.caches[layer],
            heads,
            rows,
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
        let (rows, stream) = (&self.batch.sample_rows, &rank.buffers[input.0]);
        rank.pool.for_rows(&mut rank.sampled[..n_rows * columns], columns, &|i, out| {
            out.copy_from_slice(&stream[rows[i] as usize * columns..][..columns]);
        });
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

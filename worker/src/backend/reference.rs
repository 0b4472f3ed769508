//! Every op in plain candle-core tensors, f32: slow and obvious, the truth that other backends are
//! tested against. No int8 activations, no fusion, no buffers kept between steps.

use std::ops::ControlFlow;

use candle_core::{D, Device, Tensor};
use evener_collective::{Collective, Tag};
use evener_kernels::quant::Format;

use crate::checkpoint::Checkpoint;
use crate::model::config::{Rope, RopePairs};
use crate::model::program::{BufferId, Expert, LeafSum, Op, Program, Weight, WeightId};

use super::{Backend, Batch, Error, KV_BLOCK_LEN, LoadError, Loaded, Progress, Span};

/// A rank's weights as f32 tensors.
struct ReferenceWeights {
    program: Program,
    weights: Vec<Tensor>, // by WeightId: [rows, columns]
    resident_bytes: u64,
}

/// The weights with a KV cache and the buffers of the step that runs.
struct Reference {
    program: Program,
    weights: Vec<Tensor>,
    cache: Vec<LayerCache>,
    buffers: Vec<Option<Tensor>>, // by BufferId: [n_parts, T, columns]; none until written
    logits: Vec<f32>,
}

/// Keys and values of one layer, as rotated and written: `[slot][kv_head][head_dim]`.
struct LayerCache {
    k: Vec<f32>,
    v: Vec<f32>,
}

/// Dequantises this rank's slices.
///
/// # Errors
/// A tensor that is missing, of another shape or not finite; candle's own; the caller's stop.
pub(super) fn load(
    checkpoint: &Checkpoint,
    program: Program,
    progress: &mut Progress<'_>,
) -> Result<Box<dyn Loaded>, LoadError> {
    let ids = || (0..program.weights.len()).map(WeightId);
    let mut total = 0;
    for id in ids().filter(|&id| program.twin(id).is_none()) {
        total += checkpoint.slice(&program.weights[id.0])?.n_bytes() as u64;
    }
    let (mut done, mut resident_bytes) = (0, 0);
    let mut weights: Vec<Tensor> = Vec::with_capacity(program.weights.len());
    for id in ids() {
        if let Some(twin) = program.twin(id) {
            weights.push(weights[twin.0].clone());
            continue;
        }
        let weight = &program.weights[id.0];
        let tensor = dequantize(checkpoint, weight)?;
        resident_bytes += 4 * tensor.elem_count() as u64;
        weights.push(tensor);
        done += checkpoint.slice(weight)?.n_bytes() as u64;
        if let ControlFlow::Break(()) = progress(done, total) {
            return Err(LoadError::Stopped);
        }
    }
    Ok(Box::new(ReferenceWeights { weights, resident_bytes, program }))
}

/// A slice as f32 `[rows, columns]`.
fn dequantize(checkpoint: &Checkpoint, weight: &Weight) -> Result<Tensor, LoadError> {
    use candle_core::quantized::{GgmlDType, QStorage, QTensor};
    let slice = checkpoint.slice(weight)?;
    slice.check_finite(0..slice.rows)?;
    let device = Device::Cpu;
    if slice.rows == 0 || slice.columns == 0 {
        return Ok(Tensor::zeros((slice.rows, slice.columns), candle_core::DType::F32, &device)?);
    }
    if slice.format != slice.stored {
        let mut numbers = vec![0.0; slice.rows * slice.columns];
        for (row, out) in numbers.chunks_exact_mut(slice.columns).enumerate() {
            slice.dequantized_row(row, out);
        }
        return Ok(Tensor::from_vec(numbers, (slice.rows, slice.columns), &device)?);
    }
    let blocks: Vec<u8> = (0..slice.rows).flat_map(|row| slice.row(row)).copied().collect();
    let covered = blocks.len() / slice.rows / slice.format.block_bytes() * slice.format.block_len();
    let dtype = match slice.format {
        Format::F32 => GgmlDType::F32,
        Format::F16 => GgmlDType::F16,
        Format::Bf16 => GgmlDType::BF16,
        Format::Q4_0 => GgmlDType::Q4_0,
        Format::Q4_1 => GgmlDType::Q4_1,
        Format::Q5_0 => GgmlDType::Q5_0,
        Format::Q5_1 => GgmlDType::Q5_1,
        Format::Q8_0 => GgmlDType::Q8_0,
        Format::Q4K => GgmlDType::Q4K,
        Format::Q5K => GgmlDType::Q5K,
        Format::Q6K => GgmlDType::Q6K,
        Format::Fp8 => unreachable!("no file has it"),
    };
    let storage = QStorage::from_data(blocks.into(), &device, dtype)?;
    let whole = QTensor::new(storage, (slice.rows, covered))?.dequantize(&device)?;
    Ok(whole.narrow(1, slice.first_column, slice.columns)?.contiguous()?)
}

impl Loaded for ReferenceWeights {
    fn resident_weight_bytes(&self) -> u64 {
        self.resident_bytes
    }

    fn kv_block_bytes(&self) -> u64 {
        (2 * self.program.n_layers * KV_BLOCK_LEN * slot_len(&self.program) * 4) as u64
    }

    fn name(&self) -> String {
        "reference".to_owned()
    }

    fn deterministic(&self) -> bool {
        false
    }

    fn into_backend(self: Box<Self>, n_kv_blocks: u32) -> Result<Box<dyn Backend>, Error> {
        let len = n_kv_blocks as usize * KV_BLOCK_LEN * slot_len(&self.program);
        let zeros = || {
            let mut zeros = Vec::new();
            zeros.try_reserve_exact(len).map_err(|error| Error::Device {
                reason: format!("no memory for {n_kv_blocks} KV blocks: {error}"),
            })?;
            zeros.resize(len, 0.0);
            Ok::<_, Error>(zeros)
        };
        let cache = (0..self.program.n_layers).map(|_| Ok(LayerCache { k: zeros()?, v: zeros()? }));
        Ok(Box::new(Reference {
            cache: cache.collect::<Result<_, Error>>()?,
            buffers: vec![None; self.program.buffers.len()],
            logits: Vec::new(),
            weights: self.weights,
            program: self.program,
        }))
    }
}

/// `silu(gate) * up`
fn silu_gate(gate: &Tensor, up: &Tensor) -> Result<Tensor, Error> {
    let silu = (gate / (gate.neg()?.exp()? + 1.0)?)?;
    Ok((silu * up)?)
}

/// Numbers of one slot in a layer's k (or v) cache.
fn slot_len(program: &Program) -> usize {
    program.n_kv_heads * program.head_dim
}

impl Backend for Reference {
    fn run(&mut self, batch: &Batch, collective: &mut dyn Collective) -> Result<(), Error> {
        self.buffers.fill(None);
        let ops = std::mem::take(&mut self.program.ops);
        let mut n_collectives = 0;
        let ran = ops.iter().try_for_each(|op| {
            n_collectives += u32::from(matches!(op, Op::AllReduce { .. }));
            let tag = Tag { step: batch.step, op: n_collectives };
            self.run_op(op, batch, collective, tag)
        });
        self.program.ops = ops;
        ran
    }

    fn copy_block(&mut self, from: u32, to: u32) {
        let len = KV_BLOCK_LEN * slot_len(&self.program);
        let (from, to) = (from as usize * len, to as usize * len);
        for layer in &mut self.cache {
            layer.k.copy_within(from..from + len, to);
            layer.v.copy_within(from..from + len, to);
        }
    }

    fn logits(&self) -> &[f32] {
        &self.logits
    }
}

impl Reference {
    fn run_op(
        &mut self,
        op: &Op,
        batch: &Batch,
        collective: &mut dyn Collective,
        tag: Tag,
    ) -> Result<(), Error> {
        match op {
            Op::Embed { table, out } => self.embed(*table, *out, batch),
            Op::Norm { residual, delta, weight, eps, out } => {
                let mut x = self.read(*residual);
                if let Some(delta) = delta {
                    x = (x + self.read(*delta))?;
                    self.write(*residual, x.clone())?;
                }
                let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
                let rms = (mean_square + f64::from(*eps))?.sqrt()?;
                let weight = self.weights[weight.0].flatten_all()?;
                self.write(*out, x.broadcast_div(&rms)?.broadcast_mul(&weight)?)
            }
            Op::Linear { input, projections } => projections.iter().try_for_each(|projection| {
                let out = self.read(*input).matmul(&self.weights[projection.weight.0].t()?)?;
                self.write(projection.out, out)
            }),
            Op::LinearParts { input, weight, sum, out } => {
                self.linear_parts(*input, *weight, sum, *out)
            }
            Op::RopeKv { q, k, v, layer, rope } => {
                let [rotated_q, rotated_k] =
                    [self.rotate(*q, batch, *rope)?, self.rotate(*k, batch, *rope)?];
                self.write(*q, rotated_q)?;
                self.write(*k, rotated_k)?;
                self.write_cache(*layer, *k, *v, batch)
            }
            Op::Attention { q, layer, kv_of_head, scale, out } => {
                let spans: Result<Vec<Tensor>, Error> = batch
                    .spans
                    .iter()
                    .map(|span| self.attend(*q, *layer, kv_of_head, *scale, batch, span))
                    .collect();
                self.write(*out, Tensor::cat(&spans?, 0)?)
            }
            Op::SiluGate { gate, up, out } => {
                let activated = silu_gate(&self.read(*gate), &self.read(*up))?;
                self.write(*out, activated)
            }
            Op::AllReduce { parts, plan, out } => {
                let plan = &self.program.reduce_plans[plan.0];
                // A rank that owns no leaf has written no parts.
                let parts = match &self.buffers[parts.0] {
                    Some(parts) => parts.flatten_all()?.to_vec1()?,
                    None => Vec::new(),
                };
                let (n_rows, columns) = (batch.tokens.len(), self.program.buffers[out.0].columns);
                let mut sum = vec![0.0; n_rows * columns];
                collective.all_reduce(tag, plan, &parts, &mut sum)?;
                self.write(*out, Tensor::from_vec(sum, (n_rows, columns), &Device::Cpu)?)
            }
            Op::Route { logits, n_used, out } => self.route(*logits, *n_used, *out),
            Op::Experts { input, routes, experts, sum, out, .. } => {
                self.experts(*input, *routes, experts, sum, *out)
            }
            Op::Combine { outputs, routes, out } => {
                let (outputs, routes) = (self.read(*outputs), self.read(*routes));
                let (n_rows, n_used) = (routes.dim(0)?, routes.dim(1)? / 2);
                let weights = routes.narrow(1, n_used, n_used)?.unsqueeze(2)?;
                let outputs = outputs.reshape((n_rows, n_used, ()))?;
                self.write(*out, outputs.broadcast_mul(&weights)?.sum(1)?)
            }
            Op::Head { input, weight } => self.head(*input, *weight, batch),
        }
    }

    /// A buffer of one part: `[T, columns]`.
    fn read(&self, id: BufferId) -> Tensor {
        let tensor = self.buffers[id.0].clone();
        let name = self.program.buffers[id.0].name;
        let tensor =
            tensor.unwrap_or_else(|| panic!("buffer `{name}` is read before it is written"));
        tensor.squeeze(0).expect("only all-reduces read buffers of several parts")
    }

    fn write(&mut self, id: BufferId, tensor: Tensor) -> Result<(), Error> {
        let tensor = if tensor.rank() == 2 { tensor.unsqueeze(0)? } else { tensor };
        let buffer = &self.program.buffers[id.0];
        let (n_parts, _, columns) = tensor.dims3()?;
        assert_eq!((n_parts, columns), (buffer.n_parts, buffer.columns), "{}", buffer.name);
        self.buffers[id.0] = Some(tensor);
        Ok(())
    }

    fn embed(&mut self, table: WeightId, out: BufferId, batch: &Batch) -> Result<(), Error> {
        let (weight, table) = (&self.program.weights[table.0], &self.weights[table.0]);
        let mut rows = Vec::with_capacity(batch.tokens.len());
        for &token in &batch.tokens {
            let token = token as usize;
            rows.push(if weight.rows.contains(&token) {
                table.get(token - weight.rows.start)?
            } else {
                Tensor::zeros(weight.columns.len(), candle_core::DType::F32, &Device::Cpu)?
            });
        }
        // + 0.0: no -0.0 is left, whose sign would depend on which ranks add zeros to it.
        let out_rows = Tensor::stack(&rows, 0)?.affine(1.0, 0.0)?;
        self.write(out, out_rows)
    }

    fn route(&mut self, logits: BufferId, n_used: usize, out: BufferId) -> Result<(), Error> {
        let mut routes = Vec::new();
        for logits in self.read(logits).to_vec2::<f32>()? {
            let mut order: Vec<usize> = (0..logits.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
            order.truncate(n_used);
            order.sort_unstable();
            let odds: Vec<f64> = order.iter().map(|&e| f64::from(logits[e]).exp()).collect();
            routes.extend(order.iter().map(|&e| e as f32));
            routes.extend(odds.iter().map(|one| (one / odds.iter().sum::<f64>()) as f32));
        }
        let n_rows = routes.len() / (2 * n_used);
        self.write(out, Tensor::from_vec(routes, (n_rows, 2 * n_used), &Device::Cpu)?)
    }

    /// Row by row and expert by expert.
    fn experts(
        &mut self,
        input: BufferId,
        routes: BufferId,
        experts: &[Expert],
        sum: &LeafSum,
        out: BufferId,
    ) -> Result<(), Error> {
        let (input, routes) = (self.read(input), self.read(routes).to_vec2::<f32>()?);
        let mut rows = Vec::new();
        for (t, routes) in routes.iter().enumerate() {
            let x = input.narrow(0, t, 1)?;
            let mut outputs = Vec::new();
            for &e in &routes[..routes.len() / 2] {
                let expert = &experts[e as usize];
                let gate = x.matmul(&self.weights[expert.gate.0].t()?)?;
                let up = x.matmul(&self.weights[expert.up.0].t()?)?;
                outputs.push(self.sum_leaves(&silu_gate(&gate, &up)?, expert.down, sum)?);
            }
            rows.push(Tensor::cat(&outputs, 2)?);
        }
        self.write(out, Tensor::cat(&rows, 1)?)
    }

    fn linear_parts(
        &mut self,
        input: BufferId,
        weight: WeightId,
        sum: &LeafSum,
        out: BufferId,
    ) -> Result<(), Error> {
        let parts = self.sum_leaves(&self.read(input), weight, sum)?;
        self.write(out, parts)
    }

    /// `[n_parts, T, rows of the weight]`
    fn sum_leaves(&self, input: &Tensor, weight: WeightId, sum: &LeafSum) -> Result<Tensor, Error> {
        let weight = self.weights[weight.0].clone();
        let mut parts = Vec::with_capacity(sum.part_leaves.len());
        let mut leaf = 0;
        for &n_leaves in &sum.part_leaves {
            let mut stack: Vec<Tensor> = Vec::new();
            for _ in 0..n_leaves {
                let (start, len) = (leaf * sum.leaf_columns, sum.leaf_columns);
                let input = input.narrow(1, start, len)?.contiguous()?;
                let weight = weight.narrow(1, start, len)?.contiguous()?;
                stack.push(input.matmul(&weight.t()?)?);
                for _ in 0..sum.merges[leaf] {
                    let right = stack.pop().expect("a merge has two operands");
                    let left = stack.pop().expect("a merge has two operands");
                    stack.push((left + right)?);
                }
                leaf += 1;
            }
            let part = stack.pop().expect("a part has at least one leaf");
            assert!(stack.is_empty(), "a part is one sum");
            parts.push(part);
        }
        Ok(Tensor::stack(&parts, 0)?)
    }

    /// q or k with the first `rope.dim` columns of each head rotated by the tokens' positions.
    fn rotate(&self, id: BufferId, batch: &Batch, rope: Rope) -> Result<Tensor, Error> {
        let x = self.read(id);
        let (n_rows, columns) = x.dims2()?;
        let (head_dim, half) = (self.program.head_dim, rope.dim / 2);
        let n_heads = columns / head_dim;
        // Angles in f64: at long positions f32 would lose their fraction.
        let angle = |position: u32, i: usize| {
            let power = -2.0 * i as f64 / rope.dim as f64;
            f64::from(position) * f64::from(rope.theta).powf(power)
        };
        let table = |f: fn(f64) -> f64| {
            let of = |&position: &u32| (0..half).map(move |i| f(angle(position, i)) as f32);
            let values: Vec<f32> = batch.positions.iter().flat_map(of).collect();
            Tensor::from_vec(values, (n_rows, 1, half), &Device::Cpu)
        };
        let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
        let x = x.reshape((n_rows, n_heads, head_dim))?;
        let rotating = x.narrow(2, 0, rope.dim)?.contiguous()?;
        let (a, b) = match rope.pairs {
            RopePairs::Adjacent => {
                let pairs = rotating.reshape((n_rows, n_heads, half, 2))?;
                (pairs.narrow(3, 0, 1)?.squeeze(3)?, pairs.narrow(3, 1, 1)?.squeeze(3)?)
            }
            RopePairs::Halves => (rotating.narrow(2, 0, half)?, rotating.narrow(2, half, half)?),
        };
        let rotated_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let rotated_b = (a.broadcast_mul(&sin)? + b.broadcast_mul(&cos)?)?;
        let rotated = match rope.pairs {
            RopePairs::Adjacent => {
                Tensor::stack(&[rotated_a, rotated_b], 3)?.reshape((n_rows, n_heads, rope.dim))?
            }
            RopePairs::Halves => Tensor::cat(&[rotated_a, rotated_b], 2)?,
        };
        let rest = x.narrow(2, rope.dim, head_dim - rope.dim)?;
        let whole = if rope.dim == head_dim { rotated } else { Tensor::cat(&[rotated, rest], 2)? };
        Ok(whole.reshape((n_rows, columns))?)
    }

    fn write_cache(
        &mut self,
        layer: usize,
        k: BufferId,
        v: BufferId,
        batch: &Batch,
    ) -> Result<(), Error> {
        let len = slot_len(&self.program);
        let [k, v] = [self.read(k), self.read(v)].map(|x| x.flatten_all()?.to_vec1::<f32>());
        let (k, v) = (k?, v?);
        let cache = &mut self.cache[layer];
        for (row, &slot) in batch.slots.iter().enumerate() {
            let (from, to) = (row * len..(row + 1) * len, slot as usize * len);
            cache.k[to..to + len].copy_from_slice(&k[from.clone()]);
            cache.v[to..to + len].copy_from_slice(&v[from]);
        }
        Ok(())
    }

    /// Attention of one sequence's rows: `[n_rows, n_heads * head_dim]`.
    fn attend(
        &self,
        q: BufferId,
        layer: usize,
        kv_of_head: &[usize],
        scale: f32,
        batch: &Batch,
        span: &Span,
    ) -> Result<Tensor, Error> {
        let head_dim = self.program.head_dim;
        let (first_row, n_rows) = (span.first_row as usize, span.n_rows as usize);
        let positions = &batch.positions[first_row..first_row + n_rows];
        let context = positions[n_rows - 1] as usize + 1;
        let first_block = span.first_block as usize;
        let blocks = &batch.block_tables[first_block..first_block + span.n_blocks as usize];
        let slots: Vec<usize> = (0..context)
            .map(|position| {
                let block = blocks[position / KV_BLOCK_LEN] as usize;
                block * KV_BLOCK_LEN + position % KV_BLOCK_LEN
            })
            .collect();
        let hidden = |&position: &u32| {
            (0..context).map(move |at| if at as u32 <= position { 0.0 } else { f32::NEG_INFINITY })
        };
        let mask: Vec<f32> = positions.iter().flat_map(hidden).collect();
        let mask = Tensor::from_vec(mask, (n_rows, context), &Device::Cpu)?;
        let q = self.read(q).narrow(0, first_row, n_rows)?;
        let mut heads = Vec::with_capacity(kv_of_head.len());
        for (head, &kv_head) in kv_of_head.iter().enumerate() {
            let q = q.narrow(1, head * head_dim, head_dim)?.contiguous()?;
            let k = self.cached(&self.cache[layer].k, &slots, kv_head)?;
            let v = self.cached(&self.cache[layer].v, &slots, kv_head)?;
            let scores = ((q.matmul(&k.t()?)? * f64::from(scale))? + &mask)?;
            let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
            let weights = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
            heads.push(weights.matmul(&v)?);
        }
        Ok(Tensor::cat(&heads, 1)?)
    }

    /// One KV head of the given slots: `[n_slots, head_dim]`.
    fn cached(&self, cache: &[f32], slots: &[usize], kv_head: usize) -> Result<Tensor, Error> {
        let (head_dim, len) = (self.program.head_dim, slot_len(&self.program));
        let of = |&slot: &usize| {
            let start = slot * len + kv_head * head_dim;
            cache[start..start + head_dim].iter().copied()
        };
        let values: Vec<f32> = slots.iter().flat_map(of).collect();
        Ok(Tensor::from_vec(values, (slots.len(), head_dim), &Device::Cpu)?)
    }

    fn head(&mut self, input: BufferId, weight: WeightId, batch: &Batch) -> Result<(), Error> {
        self.logits.clear();
        let weight = &self.weights[weight.0];
        if batch.sample_rows.is_empty() || weight.dim(0)? == 0 {
            return Ok(());
        }
        let rows = Tensor::new(batch.sample_rows.as_slice(), &Device::Cpu)?;
        let logits = self.read(input).index_select(&rows, 0)?.matmul(&weight.t()?)?;
        self.logits = logits.flatten_all()?.to_vec1()?;
        Ok(())
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Device { reason: error.to_string() }
    }
}

impl From<candle_core::Error> for LoadError {
    fn from(error: candle_core::Error) -> Self {
        Self::Device { reason: error.to_string() }
    }
}

//! A rank's program: the flat list of ops that one step runs, over buffers allocated once.
//!
//! A family's file builds it from (config, split, rank); backends walk it. It holds no weights and
//! no numbers of a step: weights are named slices of the checkpoint, steps come as
//! `backend::Batch`.

use std::ops::Range;

use evener_collective::ReducePlan;

use super::config::Rope;

/// Index into [`Program::buffers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferId(pub usize);

/// Index into [`Program::weights`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WeightId(pub usize);

/// Index into [`Program::reduce_plans`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ReduceId(pub usize);

/// Everything one rank does in a step.
#[derive(Debug, Clone, Default)]
pub struct Program {
    pub buffers: Vec<Buffer>,
    pub weights: Vec<Weight>,
    pub reduce_plans: Vec<ReducePlan>,
    pub ops: Vec<Op>,
    pub n_layers: usize,
    /// KV heads that this rank caches.
    pub n_kv_heads: usize,
    pub head_dim: usize,
    /// Vocabulary rows of this rank's logits.
    pub vocab: Range<usize>,
}

/// Activations, f32: `[n_parts, T, columns]`, T being the tokens of the step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Buffer {
    pub name: &'static str,
    /// 1, but for partial sums on their way to an all-reduce: one per subtree this rank owns.
    pub n_parts: usize,
    pub columns: usize,
}

/// A slice of a checkpoint tensor: what this rank holds of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weight {
    /// Name in the checkpoint.
    pub tensor: String,
    /// Shape of the whole tensor; `[1, columns]` for a vector.
    pub shape: [usize; 2],
    pub rows: Range<usize>,
    /// Multiples of 32, unless it is the whole width.
    pub columns: Range<usize>,
    pub role: Role,
}

/// What a weight is used for; two uses may share one tensor (a tied head).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Rows are looked up.
    Table,
    /// Rows are multiplied with activations.
    Matrix,
    /// The same, to logits.
    Head,
    /// Read as f32, whole.
    Vector,
}

/// One fused operation.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// `out[t] = table[token[t]]` where this rank holds the row, else 0.
    Embed { table: WeightId, out: BufferId },
    /// `residual += delta`, if there is one; then `out = rms_norm(residual) * weight`
    /// (Zhang and Sennrich 2019).
    Norm { residual: BufferId, delta: Option<BufferId>, weight: WeightId, eps: f32, out: BufferId },
    /// Several weights on one activation: `out_i = input * weight_i^T`. Each output is one chain of
    /// float additions over the blocks of its row.
    Linear { input: BufferId, projections: Vec<Projection> },
    /// `out[p] = ` sum over the leaves of part p of `input * weight^T`, for an all-reduce.
    LinearParts { input: BufferId, weight: WeightId, sum: LeafSum, out: BufferId },
    /// Rotates q and k in place, then writes k and v into the cache of `layer`.
    RopeKv { q: BufferId, k: BufferId, v: BufferId, layer: usize, rope: Rope },
    /// Causal attention of q over the cached sequence (Vaswani et al. 2017, section 3.2), grouped
    /// queries: local query head h reads local KV head `kv_of_head[h]`.
    Attention { q: BufferId, layer: usize, kv_of_head: Vec<usize>, scale: f32, out: BufferId },
    /// `out = silu(gate) * up` (Shazeer 2020).
    SiluGate { gate: BufferId, up: BufferId, out: BufferId },
    /// The experts that each token takes and what they weigh: the `n_used` of the largest logits, of
    /// equals the first, and the softmax of those (Jiang et al. 2024, "Mixtral of experts", section
    /// 2.1). `out[t]`: their numbers, ascending, as floats; then their weights.
    Route { logits: BufferId, n_used: usize, out: BufferId },
    /// The gated FFN of each token's experts, before it is summed over ranks:
    /// `out[p][t][k] = ` sum over the leaves of part p of
    /// `(silu(x * gate_e^T) * (x * up_e^T)) * down_e^T`, e being the k-th expert of token t.
    Experts {
        input: BufferId,
        routes: BufferId,
        experts: Vec<Expert>,
        sum: LeafSum,
        room: Room,
        out: BufferId,
    },
    /// `out[t] = ` sum over the token's experts, in their order, of weight times output.
    Combine { outputs: BufferId, routes: BufferId, out: BufferId },
    /// Sums the parts of all ranks by the plan's tree.
    AllReduce { parts: BufferId, plan: ReduceId, out: BufferId },
    /// Logits of the rows to be sampled, over this rank's vocabulary rows.
    Head { input: BufferId, weight: WeightId },
}

impl Op {
    /// The first matrix that it multiplies with, if it multiplies; of experts nobody knows before.
    #[must_use]
    pub fn first_matrix(&self) -> Option<WeightId> {
        match self {
            Self::Linear { projections, .. } => projections.first().map(|first| first.weight),
            Self::LinearParts { weight, .. } | Self::Head { weight, .. } => Some(*weight),
            _ => None,
        }
    }
}

/// One weight of a [`Op::Linear`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Projection {
    pub weight: WeightId,
    pub out: BufferId,
}

/// The matrices of one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expert {
    pub gate: WeightId,
    pub up: WeightId,
    pub down: WeightId,
}

/// Buffers for the tokens of one expert at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Their rows of the input.
    pub input: BufferId,
    pub gate: BufferId,
    pub up: BufferId,
    pub activated: BufferId,
    pub parts: BufferId,
}

/// How a row-parallel matrix sums its columns: leaf by leaf, and leaves by a fixed tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafSum {
    /// Columns of a leaf, a multiple of 32. This rank's columns are a whole number of leaves.
    pub leaf_columns: usize,
    /// Leaves of each part (a maximal subtree this rank owns), in order.
    pub part_leaves: Vec<usize>,
    /// For each leaf of this rank: how often to add the two topmost sums once it is on the stack.
    pub merges: Vec<u8>,
}

impl Program {
    pub fn buffer(&mut self, name: &'static str, n_parts: usize, columns: usize) -> BufferId {
        self.buffers.push(Buffer { name, n_parts, columns });
        BufferId(self.buffers.len() - 1)
    }

    pub fn weight(&mut self, weight: Weight) -> WeightId {
        self.weights.push(weight);
        WeightId(self.weights.len() - 1)
    }

    pub fn reduce_plan(&mut self, plan: ReducePlan) -> ReduceId {
        self.reduce_plans.push(plan);
        ReduceId(self.reduce_plans.len() - 1)
    }

    /// An earlier weight that is the same slice, and so need not be held again: a tied head is its
    /// embedding.
    #[must_use]
    pub fn twin(&self, id: WeightId) -> Option<WeightId> {
        let weight = &self.weights[id.0];
        let is_same = |other: &Weight| {
            other.role != Role::Vector
                && (&other.tensor, &other.rows, &other.columns)
                    == (&weight.tensor, &weight.rows, &weight.columns)
        };
        self.weights[..id.0].iter().position(is_same).map(WeightId)
    }

    pub fn op(&mut self, op: Op) {
        self.ops.push(op);
    }
}

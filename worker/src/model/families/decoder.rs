//! What decoders of Llama's kind have in common: embedding, attention, the parts of an FFN, head.
//! Tensor names are GGUF's.

use std::ops::Range;

use crate::model::config::ModelConfig;
use crate::model::program::{
    BufferId, LeafSum, Op, Program, Projection, ReduceId, Role, Weight, WeightId,
};
use crate::model::shard::{Shard, Split};

use evener_collective::SumTree;

pub(super) struct Builder<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) shard: &'a Shard,
    pub(super) rank: usize,
    pub(super) split: &'a Split,
    pub(super) buffers: Buffers,
}

pub(super) struct Buffers {
    pub(super) embed_part: BufferId,
    pub(super) residual: BufferId,
    pub(super) normed: BufferId,
    pub(super) q: BufferId,
    pub(super) k: BufferId,
    pub(super) v: BufferId,
    pub(super) attended: BufferId,
    pub(super) head_parts: BufferId,
    pub(super) gate: BufferId,
    pub(super) up: BufferId,
    pub(super) activated: BufferId,
    pub(super) ffn_parts: BufferId,
    pub(super) delta: BufferId,
    pub(super) embed_plan: ReduceId,
    pub(super) heads_plan: ReduceId,
    pub(super) ffn_plan: ReduceId,
}

impl Buffers {
    fn new(program: &mut Program, config: &ModelConfig, split: &Split, rank: usize) -> Self {
        let shard = &split.shards[rank];
        let q_columns = shard.heads.len() * config.head_dim;
        let kv_columns = shard.kv_heads.len() * config.head_dim;
        let hidden = config.hidden;
        Self {
            embed_part: program.buffer("embed_part", 1, hidden),
            residual: program.buffer("residual", 1, hidden),
            normed: program.buffer("normed", 1, hidden),
            q: program.buffer("q", 1, q_columns),
            k: program.buffer("k", 1, kv_columns),
            v: program.buffer("v", 1, kv_columns),
            attended: program.buffer("attended", 1, q_columns),
            head_parts: program.buffer("head_parts", split.heads_plan.n_parts(rank), hidden),
            gate: program.buffer("gate", 1, shard.ffn.len()),
            up: program.buffer("up", 1, shard.ffn.len()),
            activated: program.buffer("activated", 1, shard.ffn.len()),
            ffn_parts: program.buffer("ffn_parts", split.ffn_plan.n_parts(rank), hidden),
            delta: program.buffer("delta", 1, hidden),
            embed_plan: program.reduce_plan(split.embed_plan.clone()),
            heads_plan: program.reduce_plan(split.heads_plan.clone()),
            ffn_plan: program.reduce_plan(split.ffn_plan.clone()),
        }
    }
}

impl<'a> Builder<'a> {
    /// With a program in which tokens have become rows of the residual stream.
    pub(super) fn begin(config: &'a ModelConfig, split: &'a Split, rank: usize) -> (Self, Program) {
        let shard = &split.shards[rank];
        let mut program = Program {
            n_layers: config.n_layers,
            n_kv_heads: shard.kv_heads.len(),
            head_dim: config.head_dim,
            vocab: shard.vocab.clone(),
            ..Program::default()
        };
        let buffers = Buffers::new(&mut program, config, split, rank);
        let builder = Self { config, shard, rank, split, buffers };
        let table = program.weight(builder.table("token_embd.weight", Role::Table));
        let (parts, plan) = (builder.buffers.embed_part, builder.buffers.embed_plan);
        program.op(Op::Embed { table, out: parts });
        program.op(Op::AllReduce { parts, plan, out: builder.buffers.residual });
        (builder, program)
    }

    /// The last norm and the head.
    pub(super) fn end(&self, mut program: Program) -> Program {
        let weight = self.vector(&mut program, "output_norm.weight".to_owned());
        self.norm(&mut program, Some(self.buffers.delta), weight);
        let head = if self.config.tied_head { "token_embd.weight" } else { "output.weight" };
        let weight = program.weight(self.table(head, Role::Head));
        program.op(Op::Head { input: self.buffers.normed, weight });
        program
    }

    /// To the sum over all heads, in `delta`.
    pub(super) fn attention(&self, program: &mut Program, layer: usize) {
        let Self { config, shard, buffers, .. } = self;
        let delta = (layer > 0).then_some(buffers.delta);
        let weight = self.vector(program, format!("blk.{layer}.attn_norm.weight"));
        self.norm(program, delta, weight);
        if !shard.heads.is_empty() {
            let (q_rows, kv_rows) = (self.head_rows(&shard.heads), self.head_rows(&shard.kv_heads));
            let n_q = config.n_heads * config.head_dim;
            let n_kv = config.n_kv_heads * config.head_dim;
            let projections = [
                ("attn_q", n_q, q_rows.clone(), buffers.q),
                ("attn_k", n_kv, kv_rows.clone(), buffers.k),
                ("attn_v", n_kv, kv_rows, buffers.v),
            ]
            .map(|(name, n_rows, rows, out)| {
                let tensor = format!("blk.{layer}.{name}.weight");
                Projection { weight: self.column_parallel(program, tensor, n_rows, rows), out }
            });
            let (q, k, v) = (buffers.q, buffers.k, buffers.v);
            program.op(Op::Linear { input: buffers.normed, projections: projections.to_vec() });
            program.op(Op::RopeKv { q, k, v, layer, rope: config.rope });
            let per_kv = config.heads_per_kv();
            program.op(Op::Attention {
                q,
                layer,
                kv_of_head: shard
                    .heads
                    .clone()
                    .map(|h| h / per_kv - shard.kv_heads.start)
                    .collect(),
                scale: 1.0 / (config.head_dim as f32).sqrt(),
                out: buffers.attended,
            });
            let weight = program.weight(Weight {
                tensor: format!("blk.{layer}.attn_output.weight"),
                shape: [config.hidden, n_q],
                rows: 0..config.hidden,
                columns: q_rows,
                role: Role::Matrix,
            });
            let sum = leaf_sum(&self.split.heads_tree, shard.heads.clone(), config.head_dim);
            program.op(Op::LinearParts {
                input: buffers.attended,
                weight,
                sum,
                out: buffers.head_parts,
            });
        }
        program.op(Op::AllReduce {
            parts: buffers.head_parts,
            plan: buffers.heads_plan,
            out: buffers.delta,
        });
    }

    /// The norm before a layer's FFN.
    pub(super) fn ffn_norm(&self, program: &mut Program, layer: usize) {
        let weight = self.vector(program, format!("blk.{layer}.ffn_norm.weight"));
        self.norm(program, Some(self.buffers.delta), weight);
    }

    /// How this rank sums its columns of an FFN's down projection.
    pub(super) fn ffn_sum(&self) -> LeafSum {
        let leaf = self.config.ffn_leaf();
        let leaves = self.shard.ffn.start / leaf..self.shard.ffn.end / leaf;
        leaf_sum(&self.split.ffn_tree, leaves, leaf)
    }

    fn norm(&self, program: &mut Program, delta: Option<BufferId>, weight: WeightId) {
        program.op(Op::Norm {
            residual: self.buffers.residual,
            delta,
            weight,
            eps: self.config.norm_eps,
            out: self.buffers.normed,
        });
    }

    fn head_rows(&self, heads: &Range<usize>) -> Range<usize> {
        heads.start * self.config.head_dim..heads.end * self.config.head_dim
    }

    fn vector(&self, program: &mut Program, tensor: String) -> WeightId {
        let columns = self.config.hidden;
        program.weight(Weight {
            tensor,
            shape: [1, columns],
            rows: 0..1,
            columns: 0..columns,
            role: Role::Vector,
        })
    }

    pub(super) fn column_parallel(
        &self,
        program: &mut Program,
        tensor: String,
        n_rows: usize,
        rows: Range<usize>,
    ) -> WeightId {
        let columns = self.config.hidden;
        program.weight(Weight {
            tensor,
            shape: [n_rows, columns],
            rows,
            columns: 0..columns,
            role: Role::Matrix,
        })
    }

    fn table(&self, tensor: &str, role: Role) -> Weight {
        let shape = [self.config.vocab, self.config.hidden];
        let rows = self.split.shards[self.rank].vocab.clone();
        Weight { tensor: tensor.to_owned(), shape, rows, columns: 0..self.config.hidden, role }
    }
}

fn leaf_sum(tree: &SumTree, leaves: Range<usize>, leaf_columns: usize) -> LeafSum {
    let parts = tree.parts(leaves);
    LeafSum {
        leaf_columns,
        part_leaves: parts.iter().map(ExactSizeIterator::len).collect(),
        merges: parts.into_iter().flat_map(|part| tree.merges(part)).collect(),
    }
}

//! Llama (Touvron et al. 2023): pre-norm RMS, rotary positions, grouped queries, SwiGLU. Also the
//! shape of SmolLM2. Tensor names are GGUF's.

use std::ops::Range;

use crate::model::config::ModelConfig;
use crate::model::program::{
    BufferId, LeafSum, Op, Program, Projection, ReduceId, Role, Weight, WeightId,
};
use crate::model::shard::{Shard, Split};

use evener_collective::SumTree;

pub(super) fn compile(config: &ModelConfig, split: &Split, rank: usize) -> Program {
    let shard = &split.shards[rank];
    let mut program = Program {
        n_layers: config.n_layers,
        n_kv_heads: shard.kv_heads.len(),
        head_dim: config.head_dim,
        vocab: shard.vocab.clone(),
        ..Program::default()
    };
    let builder = Builder {
        config,
        shard,
        rank,
        split,
        buffers: Buffers::new(&mut program, config, split, rank),
    };

    let table = program.weight(builder.table("token_embd.weight", Role::Table));
    program.op(Op::Embed { table, out: builder.buffers.embed_part });
    let plan = builder.buffers.embed_plan;
    program.op(Op::AllReduce {
        parts: builder.buffers.embed_part,
        plan,
        out: builder.buffers.residual,
    });

    let mut delta = None;
    for layer in 0..config.n_layers {
        builder.attention(&mut program, layer, delta);
        builder.ffn(&mut program, layer);
        delta = Some(builder.buffers.delta);
    }
    let weight = builder.vector(&mut program, "output_norm.weight".to_owned());
    builder.norm(&mut program, delta, weight);
    let head = if config.tied_head { "token_embd.weight" } else { "output.weight" };
    let weight = program.weight(builder.table(head, Role::Head));
    program.op(Op::Head { input: builder.buffers.normed, weight });
    program
}

struct Builder<'a> {
    config: &'a ModelConfig,
    shard: &'a Shard,
    rank: usize,
    split: &'a Split,
    buffers: Buffers,
}

struct Buffers {
    embed_part: BufferId,
    residual: BufferId,
    normed: BufferId,
    q: BufferId,
    k: BufferId,
    v: BufferId,
    attended: BufferId,
    head_parts: BufferId,
    gate: BufferId,
    up: BufferId,
    activated: BufferId,
    ffn_parts: BufferId,
    delta: BufferId,
    embed_plan: ReduceId,
    heads_plan: ReduceId,
    ffn_plan: ReduceId,
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

impl Builder<'_> {
    fn attention(&self, program: &mut Program, layer: usize, delta: Option<BufferId>) {
        let Self { config, shard, buffers, .. } = self;
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

    fn ffn(&self, program: &mut Program, layer: usize) {
        let Self { config, shard, buffers, .. } = self;
        let weight = self.vector(program, format!("blk.{layer}.ffn_norm.weight"));
        self.norm(program, Some(buffers.delta), weight);
        if !shard.ffn.is_empty() {
            let projections =
                [("ffn_gate", buffers.gate), ("ffn_up", buffers.up)].map(|(name, out)| {
                    let tensor = format!("blk.{layer}.{name}.weight");
                    let weight =
                        self.column_parallel(program, tensor, config.ffn, shard.ffn.clone());
                    Projection { weight, out }
                });
            program.op(Op::Linear { input: buffers.normed, projections: projections.to_vec() });
            program.op(Op::SiluGate { gate: buffers.gate, up: buffers.up, out: buffers.activated });
            let weight = program.weight(Weight {
                tensor: format!("blk.{layer}.ffn_down.weight"),
                shape: [config.hidden, config.ffn],
                rows: 0..config.hidden,
                columns: shard.ffn.clone(),
                role: Role::Matrix,
            });
            let leaf = config.ffn_leaf();
            let leaves = shard.ffn.start / leaf..shard.ffn.end / leaf;
            let sum = leaf_sum(&self.split.ffn_tree, leaves, leaf);
            program.op(Op::LinearParts {
                input: buffers.activated,
                weight,
                sum,
                out: buffers.ffn_parts,
            });
        }
        program.op(Op::AllReduce {
            parts: buffers.ffn_parts,
            plan: buffers.ffn_plan,
            out: buffers.delta,
        });
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

    fn column_parallel(
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

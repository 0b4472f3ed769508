//! Mixtral (Jiang et al. 2024): a Llama whose layers have several FFNs, of which a router gives each
//! token a few. Every expert is split over the ranks as a single FFN would be.

use super::decoder::Builder;
use crate::model::config::{Experts, ModelConfig};
use crate::model::program::{
    BufferId, Expert, Op, Program, Projection, ReduceId, Role, Room, Weight, WeightId,
};
use crate::model::shard::Split;

pub(super) fn compile(config: &ModelConfig, split: &Split, rank: usize) -> Program {
    let experts = config.experts.expect("a config of this family is checked to have experts");
    let (builder, mut program) = Builder::begin(config, split, rank);
    let routing = Routing::new(&mut program, &builder, experts);
    for layer in 0..config.n_layers {
        builder.attention(&mut program, layer);
        routing.route(&mut program, &builder, layer);
        routing.ffns(&mut program, &builder, layer);
    }
    builder.end(program)
}

struct Routing {
    experts: Experts,
    logit_parts: BufferId,
    logits: BufferId,
    routes: BufferId,
    room: Room,
    parts: BufferId,
    outputs: BufferId,
    lead_plan: ReduceId,
}

impl Routing {
    fn new(program: &mut Program, builder: &Builder<'_>, experts: Experts) -> Self {
        let Builder { config, split, rank, buffers, .. } = builder;
        let (hidden, n_used) = (config.hidden, experts.n_used);
        Self {
            experts,
            logit_parts: program.buffer("router_parts", split.lead_plan.n_parts(*rank), experts.n),
            logits: program.buffer("router_logits", 1, experts.n),
            routes: program.buffer("routes", 1, 2 * n_used),
            room: Room {
                input: program.buffer("expert_input", 1, hidden),
                gate: buffers.gate,
                up: buffers.up,
                activated: buffers.activated,
                parts: buffers.ffn_parts,
            },
            parts: program.buffer("expert_parts", split.ffn_plan.n_parts(*rank), n_used * hidden),
            outputs: program.buffer("expert_outputs", 1, n_used * hidden),
            lead_plan: program.reduce_plan(split.lead_plan.clone()),
        }
    }

    /// The lead tells all ranks where tokens go: devices that round otherwise must not choose
    /// otherwise.
    fn route(&self, program: &mut Program, builder: &Builder<'_>, layer: usize) {
        builder.ffn_norm(program, layer);
        if builder.rank == 0 {
            let (n, tensor) = (self.experts.n, format!("blk.{layer}.ffn_gate_inp.weight"));
            let weight = builder.column_parallel(program, tensor, n, 0..n);
            let projections = vec![Projection { weight, out: self.logit_parts }];
            program.op(Op::Linear { input: builder.buffers.normed, projections });
        }
        let (parts, plan, out) = (self.logit_parts, self.lead_plan, self.logits);
        program.op(Op::AllReduce { parts, plan, out });
        let n_used = self.experts.n_used;
        program.op(Op::Route { logits: self.logits, n_used, out: self.routes });
    }

    fn ffns(&self, program: &mut Program, builder: &Builder<'_>, layer: usize) {
        let buffers = &builder.buffers;
        if !builder.shard.ffn.is_empty() {
            let experts = (0..self.experts.n)
                .map(|e| Expert {
                    gate: self.columns(program, builder, layer, "ffn_gate", e),
                    up: self.columns(program, builder, layer, "ffn_up", e),
                    down: self.rows(program, builder, layer, e),
                })
                .collect();
            program.op(Op::Experts {
                input: buffers.normed,
                routes: self.routes,
                experts,
                sum: builder.ffn_sum(),
                room: self.room,
                out: self.parts,
            });
        }
        let (parts, plan) = (self.parts, buffers.ffn_plan);
        program.op(Op::AllReduce { parts, plan, out: self.outputs });
        let (outputs, routes, out) = (self.outputs, self.routes, buffers.delta);
        program.op(Op::Combine { outputs, routes, out });
    }

    /// An expert's gate or up matrix.
    fn columns(
        &self,
        program: &mut Program,
        builder: &Builder<'_>,
        layer: usize,
        name: &str,
        expert: usize,
    ) -> WeightId {
        let (ffn, own) = (builder.config.ffn, &builder.shard.ffn);
        let (tensor, n, first) = self.place(layer, name, expert);
        let rows = first * ffn + own.start..first * ffn + own.end;
        builder.column_parallel(program, tensor, n * ffn, rows)
    }

    /// An expert's down matrix.
    fn rows(
        &self,
        program: &mut Program,
        builder: &Builder<'_>,
        layer: usize,
        expert: usize,
    ) -> WeightId {
        let (hidden, ffn) = (builder.config.hidden, builder.config.ffn);
        let (tensor, n, first) = self.place(layer, "ffn_down", expert);
        program.weight(Weight {
            tensor,
            shape: [n * hidden, ffn],
            rows: first * hidden..(first + 1) * hidden,
            columns: builder.shard.ffn.clone(),
            role: Role::Matrix,
        })
    }

    /// The tensor with an expert's matrix, of how many experts, and which of them it is.
    fn place(&self, layer: usize, name: &str, expert: usize) -> (String, usize, usize) {
        match self.experts.are_stacked {
            true => (format!("blk.{layer}.{name}_exps.weight"), self.experts.n, expert),
            false => (format!("blk.{layer}.{name}.{expert}.weight"), 1, 0),
        }
    }
}

//! Llama (Touvron et al. 2023): pre-norm RMS, rotary positions, grouped queries, SwiGLU. Also the
//! shape of SmolLM2 and of Mistral 7B.

use super::decoder::Builder;
use crate::model::config::ModelConfig;
use crate::model::program::{Op, Program, Projection, Role, Weight};
use crate::model::shard::Split;

pub(super) fn compile(config: &ModelConfig, split: &Split, rank: usize) -> Program {
    let (builder, mut program) = Builder::begin(config, split, rank);
    for layer in 0..config.n_layers {
        builder.attention(&mut program, layer);
        ffn(&builder, &mut program, layer);
    }
    builder.end(program)
}

fn ffn(builder: &Builder<'_>, program: &mut Program, layer: usize) {
    let Builder { config, shard, buffers, .. } = builder;
    builder.ffn_norm(program, layer);
    if !shard.ffn.is_empty() {
        let projections =
            [("ffn_gate", buffers.gate), ("ffn_up", buffers.up)].map(|(name, out)| {
                let tensor = format!("blk.{layer}.{name}.weight");
                let weight =
                    builder.column_parallel(program, tensor, config.ffn, shard.ffn.clone());
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
        program.op(Op::LinearParts {
            input: buffers.activated,
            weight,
            sum: builder.ffn_sum(),
            out: buffers.ffn_parts,
        });
    }
    let (parts, plan, out) = (buffers.ffn_parts, buffers.ffn_plan, buffers.delta);
    program.op(Op::AllReduce { parts, plan, out });
}

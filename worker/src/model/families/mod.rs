//! One file per model family: (config, split, rank) to a [`Program`].

mod decoder;
mod llama;
mod mixtral;

use super::config::{Family, ModelConfig};
use super::program::Program;
use super::shard::Split;

/// Compiles a rank's program.
#[must_use]
pub fn compile(config: &ModelConfig, split: &Split, rank: usize) -> Program {
    match config.family {
        Family::Llama => llama::compile(config, split, rank),
        Family::Mixtral => mixtral::compile(config, split, rank),
    }
}

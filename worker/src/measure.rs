//! What `evener bench` may ask of this machine and of single parts: memory, arithmetic, one layer,
//! one all-reduce, and what a step of a model asks of them. Nothing here serves.

pub use evener_collective::latency::{Latency, Link, measure as all_reduce};
pub use evener_kernels::Pool;
pub use evener_kernels::activation::Precision;
pub use evener_kernels::isa::Isa;
pub use evener_kernels::measure::Rate;
pub use evener_kernels::measure::bandwidth::{
    Buffer, read as read_bandwidth, read_now as read_bandwidth_now,
};
pub use evener_kernels::measure::linear::{Figure, Place};
pub use evener_kernels::measure::peaks::{Kind, Peak, measure as peaks};
pub use evener_kernels::quant::Format;

use evener_kernels::measure::linear;
use evener_proto::kv_format::KvFormat;

use crate::checkpoint::Checkpoint;

/// One linear layer of `[rows, columns]` on 1 to many rows of activations, as the CPU backend runs
/// it.
pub fn linear(
    pool: &mut Pool,
    far: &Buffer,
    precision: Precision,
    format: Format,
    shape: [usize; 2],
    ms: &[usize],
    place: Place,
) -> Vec<Figure> {
    linear::measure(pool, far, precision, format, shape, ms, place)
}

/// What a format is multiplied with at best.
#[must_use]
pub fn arithmetic(format: Format) -> Kind {
    match format {
        Format::F32 => Kind::F32,
        Format::F16 | Format::Bf16 | Format::Fp8 => Kind::Bf16,
        Format::Q4_0
        | Format::Q4_1
        | Format::Q5_0
        | Format::Q5_1
        | Format::Q8_0
        | Format::Q4K
        | Format::Q5K
        | Format::Q6K => Kind::Int8,
    }
}

/// What a step of a model must do at least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Of the layers' matrices: multiplied with every token.
    pub layer_weights: u64,
    /// Of the head: multiplied with every token that is sampled.
    pub head_weights: u64,
    /// Bytes of both and of the vectors, in the file's formats: read once a step. A few rows of the
    /// embedding, if that is not the head, are left out.
    pub step_bytes: u64,
    /// Of one token, over all layers, as the cache keeps it.
    pub kv_bytes_per_token: u64,
    /// What most of the weights are multiplied with at best.
    pub arithmetic: Kind,
}

impl Demand {
    #[must_use]
    pub fn of(checkpoint: &Checkpoint, kv: KvFormat) -> Self {
        let description = &checkpoint.description;
        let n_kv_heads = (description.n_layers * description.n_kv_heads) as u64;
        let tensors = checkpoint.gguf().tensors();
        let head = if checkpoint.config.tied_head { "token_embd.weight" } else { "output.weight" };
        let n_weights = |tensor: &crate::checkpoint::gguf::TensorInfo| {
            (tensor.shape[0] * tensor.shape[1]) as u64
        };
        let is_step = |name: &str| name == head || name != "token_embd.weight";
        let layers = tensors.iter().filter(|t| t.name.starts_with("blk.") && t.shape[0] > 1);
        let weights_of = |kind| -> u64 {
            let same = tensors.iter().filter(|t| arithmetic(t.format) == kind);
            same.filter(|t| t.shape[0] > 1).map(n_weights).sum()
        };
        let kinds = [Kind::Int8, Kind::Bf16, Kind::F32];
        Self {
            layer_weights: layers.map(n_weights).sum(),
            head_weights: tensors.iter().filter(|t| t.name == head).map(n_weights).sum(),
            step_bytes: tensors
                .iter()
                .filter(|t| is_step(&t.name))
                .map(|t| t.bytes.len() as u64)
                .sum(),
            kv_bytes_per_token: kv.bytes_per_token(description.kv_bytes_per_token, n_kv_heads),
            arithmetic: kinds.into_iter().max_by_key(|&k| weights_of(k)).unwrap_or(Kind::F32),
        }
    }
}

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
use crate::model::config::Experts;

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
    /// Of the layers' matrices: multiplied with every token. Of experts as many as a token takes.
    pub layer_weights: u64,
    /// Of the head: multiplied with every token that is sampled.
    pub head_weights: u64,
    /// Bytes of all matrices and vectors, in the file's formats: a step reads none twice. A few rows
    /// of the embedding, if that is not the head, are left out.
    pub step_bytes: u64,
    /// Of them those of experts, and which they are.
    pub expert_bytes: u64,
    pub experts: Option<Experts>,
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
        let experts = checkpoint.config.experts;
        let is_step = |name: &str| name == head || name != "token_embd.weight";
        let is_expert = |name: &str| experts.is_some() && is_of_experts(name);
        let of_experts = |name: &str, n: u64| match experts {
            Some(Experts { n: all, n_used, .. }) if is_expert(name) => {
                n * n_used as u64 / all as u64
            }
            _ => n,
        };
        let layers = tensors.iter().filter(|t| t.name.starts_with("blk.") && t.shape[0] > 1);
        let bytes_of = |is_one: &dyn Fn(&str) -> bool| -> u64 {
            tensors.iter().filter(|t| is_one(&t.name)).map(|t| t.bytes.len() as u64).sum()
        };
        let weights_of = |kind| -> u64 {
            let same = tensors.iter().filter(|t| arithmetic(t.format) == kind);
            same.filter(|t| t.shape[0] > 1).map(n_weights).sum()
        };
        let kinds = [Kind::Int8, Kind::Bf16, Kind::F32];
        Self {
            layer_weights: layers.map(|t| of_experts(&t.name, n_weights(t))).sum(),
            head_weights: tensors.iter().filter(|t| t.name == head).map(n_weights).sum(),
            step_bytes: bytes_of(&is_step),
            expert_bytes: bytes_of(&is_expert),
            experts,
            kv_bytes_per_token: kv.bytes_per_token(description.kv_bytes_per_token, n_kv_heads),
            arithmetic: kinds.into_iter().max_by_key(|&k| weights_of(k)).unwrap_or(Kind::F32),
        }
    }

    /// Bytes of weights that a step of so many tokens reads, of experts those that tokens would take
    /// if each of them were as likely.
    #[must_use]
    pub fn bytes_of_step(&self, n_tokens: usize) -> f64 {
        let idle = self.experts.map_or(0.0, |Experts { n, n_used, .. }| {
            (1.0 - n_used as f64 / n as f64).powi(n_tokens as i32)
        });
        self.step_bytes as f64 - self.expert_bytes as f64 * idle
    }
}

/// Whether a tensor is an expert's matrix, or several experts': `ffn_up_exps`, `ffn_up.3`.
fn is_of_experts(name: &str) -> bool {
    let mut words = name.split('.').skip(2);
    let (kind, next) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    kind.ends_with("_exps") || (kind.starts_with("ffn_") && next.parse::<u32>().is_ok())
}

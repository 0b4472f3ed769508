//! The CUDA backend: a rank's weights on a device, and the walk over its program.
//!
//! Kernels and the device are `evener_kernels::cuda`; this holds memory and says which op launches
//! what. It runs on a card or on its emulation alike. Sums are in another order than the CPU's, and
//! large products of bf16 in another than small ones: it does not promise the same bits.

mod angles;
mod experts;
mod fusion;
mod graphs;
mod plan;
mod rank;
mod step;
mod sums;
mod weights;

use std::path::PathBuf;

use evener_kernels::cuda::source::MAX_HEAD_DIM;
use evener_kernels::cuda::{self, Device, Place, Shape};

use super::{Backend, Error, KV_BLOCK_LEN, LoadError, Loaded, Options, Progress};
use crate::checkpoint::Checkpoint;
use crate::model::program::Program;

use weights::Weights;

/// Of a program that has no heads: kernels are compiled for some number all the same.
const ANY_HEAD_DIM: usize = 64;
/// Columns of a head come 32 at a time.
const HEAD_UNIT: usize = 32;

/// A rank's weights on a device.
struct Cuda {
    device: Device,
    weights: Weights,
    options: Options,
    shape: Shape,
}

/// Opens the device, makes its kernels for the program's heads, and loads the weights.
///
/// # Errors
/// The device or the checkpoint cannot be used, or a stop was asked for.
pub(super) fn load(
    place: Place,
    checkpoint: &Checkpoint,
    program: Program,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Box<dyn Loaded>, LoadError> {
    let head_dim = if program.head_dim == 0 { ANY_HEAD_DIM } else { program.head_dim };
    if !head_dim.is_multiple_of(HEAD_UNIT) || head_dim > MAX_HEAD_DIM {
        let reason = format!(
            "heads of {head_dim} columns: the kernels take multiples of {HEAD_UNIT} up to \
             {MAX_HEAD_DIM}; use --device cpu"
        );
        return Err(LoadError::Device { reason });
    }
    let formats = weights::formats(checkpoint, &program)?;
    let shape = Shape { head_dim, kv_format: options.kv_format, formats };
    let device = Device::open(place, shape, cache_dir())?;
    let weights = Weights::load(&device, checkpoint, program, progress)?;
    Ok(Box::new(Cuda { device, weights, options: options.clone(), shape }))
}

/// Where compiled kernels are kept: EVENER_CACHE, else the user's cache directory.
fn cache_dir() -> Option<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    from("EVENER_CACHE")
        .map(PathBuf::from)
        .or_else(|| from("XDG_CACHE_HOME").map(|dir| PathBuf::from(dir).join("evener")))
        .or_else(|| from("HOME").map(|dir| PathBuf::from(dir).join(".cache/evener")))
        .map(|dir| dir.join("kernels"))
}

impl Loaded for Cuda {
    fn resident_weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    fn kv_block_bytes(&self) -> u64 {
        let program = &self.weights.program;
        let per_head = self.options.kv_format.bytes_per_position(program.head_dim);
        (program.n_layers * program.n_kv_heads * per_head * KV_BLOCK_LEN) as u64
    }

    fn name(&self) -> String {
        format!("cuda {}", self.device.name())
    }

    fn deterministic(&self) -> bool {
        false
    }

    fn free_bytes(&self) -> Option<u64> {
        let [free, _] = self.device.memory().ok()?;
        let buffers = rank::buffer_bytes(&self.weights.program, &self.options);
        Some(free.saturating_sub(buffers))
    }

    fn into_backend(self: Box<Self>, n_kv_blocks: u32) -> Result<Box<dyn Backend>, Error> {
        let Self { device, weights, options, shape } = *self;
        Ok(Box::new(rank::Rank::new(device, weights, &options, shape, n_kv_blocks as usize)?))
    }
}

impl From<cuda::Error> for Error {
    fn from(error: cuda::Error) -> Self {
        Self::Device { reason: error.to_string() }
    }
}

impl From<cuda::Error> for LoadError {
    fn from(error: cuda::Error) -> Self {
        Self::Device { reason: error.to_string() }
    }
}

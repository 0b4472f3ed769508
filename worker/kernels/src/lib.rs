//! Kernels of the CPU backend, the weight formats they read and the thread pool they run on. The
//! only home of SIMD. No dependency on the rest of Evener, no I/O.
//!
//! Every result is a function of its own row and the weights: the sequence of float operations of
//! an output element does not depend on the batch, the number of threads or (but for bf16 weights,
//! see `dense`) the instruction set. Tests compare bits.

// Lanes and rows of several arrays are walked together by one index, and inner loops take what they
// work on as arguments.
#![allow(clippy::needless_range_loop, clippy::too_many_arguments)]

pub mod quant;

pub mod activation;
mod ahead;
pub mod attention;
pub mod cores;
pub mod cuda;
pub mod elementwise;
pub mod isa;
pub mod linear;
pub mod matrix;
pub mod measure;
pub mod memory;
pub mod norm;
pub mod peaks;
mod pieces;
pub mod pool;
pub mod rope;
pub mod routing;
pub mod softmax;

mod dense;
mod lanes;
mod math;
#[cfg(target_arch = "x86_64")]
mod tile_registers;
#[cfg(target_arch = "x86_64")]
mod windows;

pub use isa::Isa;
pub use matrix::Matrix;
pub use pool::Pool;

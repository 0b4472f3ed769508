//! The CUDA side: devices, the kernels of `worker/kernels/cuda`, and safe ops that launch them.
//!
//! Nothing of CUDA is needed to build this, and a machine without it is told so ([`probe`]). An op
//! takes buffers of one device and checks their lengths; what a step puts into tables and slots its
//! caller has checked. Tests run them on [`Place::Emulator`], or on a card.

pub mod activations;
pub mod attention;
pub mod compiler;
pub mod group;
pub mod linear;
pub mod matrix;
pub mod probe;
pub mod routing;
pub mod rows;
pub mod source;

mod card;
mod cublas;
mod device;
mod emulated_group;
mod emulator;
mod error;
mod fp8;
mod kernels;
mod launch;
mod memory;
mod nccl;

pub use device::{Device, Graph, Place};
pub use error::Error;
pub use memory::{Buffer, Number, View};
pub use source::{Formats, Shape};

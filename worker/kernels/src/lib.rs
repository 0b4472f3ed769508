//! Kernels of the CPU backend and the weight formats they read. The only home of SIMD.
//!
//! No dependency on the rest of Evener, no threads of its own, no I/O.

pub mod quant;

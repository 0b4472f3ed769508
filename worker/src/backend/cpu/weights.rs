//! Loading for the CPU backend: slices of the checkpoint into packed matrices and f32 vectors.

use std::sync::Arc;

use evener_kernels::matrix::Source;
use evener_kernels::quant::Format;
use evener_kernels::{Isa, Matrix};

use super::Cpu;
use crate::backend::{LoadError, Options, Progress};
use crate::checkpoint::{Checkpoint, Slice};
use crate::model::config::Rope;
use crate::model::program::{BufferId, Op, Program, Role, WeightId};

/// What a rank holds, by [`WeightId`].
pub(super) struct Weights {
    pub(super) program: Program,
    /// The rope of all layers, if the program rotates.
    pub(super) rope: Option<Rope>,
    /// Index into `matrices` or `vectors`, by the weight's role.
    index: Vec<usize>,
    matrices: Vec<Matrix>,
    vectors: Vec<Vec<f32>>,
}

impl Weights {
    pub(super) fn matrix(&self, id: WeightId) -> &Matrix {
        &self.matrices[self.index[id.0]]
    }

    pub(super) fn vector(&self, id: WeightId) -> &[f32] {
        &self.vectors[self.index[id.0]]
    }

    pub(super) fn columns(&self, id: BufferId) -> usize {
        self.program.buffers[id.0].columns
    }

    pub(super) fn bytes(&self) -> u64 {
        let vectors: usize = self.vectors.iter().map(|v| 4 * v.len()).sum();
        self.matrices.iter().map(Matrix::bytes).sum::<u64>() + vectors as u64
    }
}

/// Reads and packs a rank's weights. `progress(done, total)` counts bytes of the file; it may stop
/// the loading.
///
/// # Errors
/// A tensor that is missing, misshapen or not finite, or a stop asked for.
pub fn load(
    checkpoint: &Checkpoint,
    program: Program,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Cpu, LoadError> {
    let slices: Vec<Slice<'_>> =
        program.weights.iter().map(|weight| checkpoint.slice(weight)).collect::<Result<_, _>>()?;
    let twins: Vec<_> = (0..slices.len()).map(|id| program.twin(WeightId(id))).collect();
    let is_own = |(_, twin): &(&Slice<'_>, &Option<WeightId>)| twin.is_none();
    let own = slices.iter().zip(&twins).filter(is_own);
    let total: u64 = own.map(|(slice, _)| slice.n_bytes() as u64).sum();
    let mut done = 0;
    let (mut index, mut matrices, mut vectors) = (Vec::new(), Vec::new(), Vec::new());
    for ((slice, twin), weight) in slices.iter().zip(&twins).zip(&program.weights) {
        if let Some(twin) = twin {
            index.push(index[twin.0]);
            continue;
        }
        slice.check_finite()?;
        match weight.role {
            Role::Vector => {
                let mut values = vec![0.0; slice.columns];
                slice.dequantized_row(0, &mut values);
                vectors.push(values);
                index.push(vectors.len() - 1);
            }
            Role::Table | Role::Matrix => {
                matrices.push(Matrix::pack(slice.rows, slice.columns, slice));
                index.push(matrices.len() - 1);
            }
        }
        done += slice.n_bytes() as u64;
        if progress(done, total).is_break() {
            return Err(LoadError::Stopped);
        }
    }
    let rope = program.ops.iter().find_map(|op| match op {
        Op::RopeKv { rope, .. } => Some(*rope),
        _ => None,
    });
    let weights = Weights { rope, index, matrices, vectors, program };
    Ok(Cpu { weights: Arc::new(weights), options: options.clone(), isa: Isa::detect() })
}

impl Source for Slice<'_> {
    fn format(&self) -> Format {
        self.format
    }

    fn row_blocks(&self, row: usize) -> &[u8] {
        self.row(row)
    }

    fn first_column(&self) -> usize {
        self.first_column
    }

    fn row_f32(&self, row: usize, out: &mut [f32]) {
        self.dequantized_row(row, out);
    }
}

//! Loading for the CUDA backend: slices of the checkpoint to matrices and vectors on the device.

use std::ops::ControlFlow;

use evener_kernels::cuda::matrix::Matrix;
use evener_kernels::cuda::{Buffer, Device, Formats};
use evener_kernels::matrix::{Source, Unpacked};

use crate::backend::{LoadError, Progress};
use crate::checkpoint::{Checkpoint, Slice};
use crate::model::program::{BufferId, Program, Role, Weight, WeightId};

/// What a rank holds, by [`WeightId`].
pub(super) struct Weights {
    pub(super) program: Program,
    /// Index into `matrices` or `vectors`, by the weight's role.
    index: Vec<usize>,
    matrices: Vec<Matrix>,
    vectors: Vec<Buffer<f32>>,
}

/// What the program's matrices and tables are kept in.
///
/// # Errors
/// A tensor that is missing or misshapen.
pub(super) fn formats(checkpoint: &Checkpoint, program: &Program) -> Result<Formats, LoadError> {
    let is_matrix = |weight: &&Weight| weight.role != Role::Vector;
    let format = |weight: &Weight| Ok(checkpoint.slice(weight)?.format());
    program.weights.iter().filter(is_matrix).map(format).collect()
}

impl Weights {
    /// Packs and uploads. `progress(done, total)` counts bytes of the file.
    ///
    /// # Errors
    /// A tensor that is missing, misshapen or not finite, too little memory, or a stop asked for.
    pub(super) fn load(
        device: &Device,
        checkpoint: &Checkpoint,
        program: Program,
        progress: &mut Progress<'_>,
    ) -> Result<Self, LoadError> {
        let slices: Vec<Slice<'_>> = program
            .weights
            .iter()
            .map(|weight| checkpoint.slice(weight))
            .collect::<Result<_, _>>()?;
        let own = |id: &usize| program.twin(WeightId(*id)).is_none();
        let total = (0..slices.len()).filter(own).map(|id| slices[id].n_bytes() as u64).sum();
        let mut loaded =
            Self { index: Vec::new(), matrices: Vec::new(), vectors: Vec::new(), program };
        let mut done = 0;
        for (id, slice) in slices.iter().enumerate() {
            if let Some(twin) = loaded.program.twin(WeightId(id)) {
                loaded.index.push(loaded.index[twin.0]);
                continue;
            }
            match loaded.program.weights[id].role {
                Role::Vector => {
                    slice.check_finite(0..slice.rows)?;
                    let mut values = vec![0.0; slice.columns];
                    slice.dequantized_row(0, &mut values);
                    loaded.index.push(loaded.vectors.len());
                    loaded.vectors.push(device.holding(&values)?);
                    done += slice.n_bytes() as u64;
                }
                Role::Table | Role::Matrix | Role::Head => {
                    loaded.index.push(loaded.matrices.len());
                    loaded.matrices.push(matrix(device, slice, &mut done, total, progress)?);
                }
            }
        }
        match progress(total, total) {
            ControlFlow::Continue(()) => Ok(loaded),
            ControlFlow::Break(()) => Err(LoadError::Stopped),
        }
    }

    pub(super) fn matrix(&self, id: WeightId) -> &Matrix {
        &self.matrices[self.index[id.0]]
    }

    pub(super) fn vector(&self, id: WeightId) -> &Buffer<f32> {
        &self.vectors[self.index[id.0]]
    }

    pub(super) fn columns(&self, id: BufferId) -> usize {
        self.program.buffers[id.0].columns
    }

    /// Of device memory.
    pub(super) fn bytes(&self) -> u64 {
        let vectors: usize = self.vectors.iter().map(|vector| 4 * vector.len()).sum();
        self.matrices.iter().map(Matrix::bytes).sum::<u64>() + vectors as u64
    }
}

/// One matrix, looked over for what is not finite while it is read.
fn matrix(
    device: &Device,
    slice: &Slice<'_>,
    done: &mut u64,
    total: u64,
    progress: &mut Progress<'_>,
) -> Result<Matrix, LoadError> {
    let mut fault = None;
    let unpacked = Unpacked { rows: slice.rows, columns: slice.columns, source: slice };
    let mut admit = |rows: std::ops::Range<usize>| {
        let bytes = slice.row_bytes() * rows.len();
        if let Err(error) = slice.check_finite(rows) {
            fault = Some(error);
            return ControlFlow::Break(());
        }
        *done += bytes as u64;
        progress(*done, total)
    };
    let loaded = Matrix::load(device, &unpacked, &mut admit)?;
    match (loaded, fault) {
        (_, Some(fault)) => Err(fault.into()),
        (Some(matrix), None) => Ok(matrix),
        (None, None) => Err(LoadError::Stopped),
    }
}

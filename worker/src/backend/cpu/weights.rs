//! Loading for the CPU backend: slices of the checkpoint into packed matrices and f32 vectors.

use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use evener_kernels::matrix::{Source, Unpacked, pack_all};
use evener_kernels::quant::Format;
use evener_kernels::{Isa, Matrix, Pool};

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
    /// By op: if it multiplies, the first matrix of the next that does; after the last, of the first.
    next: Vec<Option<WeightId>>,
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

    /// Ops, and the matrix that is multiplied with next after each that multiplies.
    pub(super) fn ops(&self) -> impl Iterator<Item = (&Op, Option<&Matrix>)> {
        let next = self.next.iter().map(|id| id.map(|id| self.matrix(id)));
        self.program.ops.iter().zip(next)
    }

    pub(super) fn columns(&self, id: BufferId) -> usize {
        self.program.buffers[id.0].columns
    }

    pub(super) fn bytes(&self) -> u64 {
        let vectors: usize = self.vectors.iter().map(|v| 4 * v.len()).sum();
        self.matrices.iter().map(Matrix::bytes).sum::<u64>() + vectors as u64
    }
}

/// Reads and packs a rank's weights, on all threads of the rank's pool. `progress(done, total)`
/// counts bytes of the file; it may stop the loading.
///
/// # Errors
/// A tensor that is missing, misshapen or not finite, too little memory, or a stop asked for.
pub fn load(
    checkpoint: &Checkpoint,
    program: Program,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Cpu, LoadError> {
    let slices: Vec<Slice<'_>> =
        program.weights.iter().map(|weight| checkpoint.slice(weight)).collect::<Result<_, _>>()?;
    let (mut index, mut vectors, mut unpacked) = (Vec::new(), Vec::new(), Vec::new());
    let mut total = 0;
    for (id, (slice, weight)) in slices.iter().zip(&program.weights).enumerate() {
        if let Some(twin) = program.twin(WeightId(id)) {
            index.push(index[twin.0]);
            continue;
        }
        total += slice.n_bytes() as u64;
        match weight.role {
            Role::Vector => {
                slice.check_finite(0..slice.rows)?;
                let mut values = vec![0.0; slice.columns];
                slice.dequantized_row(0, &mut values);
                vectors.push(values);
                index.push(vectors.len() - 1);
            }
            Role::Table | Role::Matrix | Role::Head => {
                unpacked.push(slice);
                index.push(unpacked.len() - 1);
            }
        }
    }
    let n_vector_bytes: usize = vectors.iter().map(|values: &Vec<f32>| 4 * values.len()).sum();
    let mut pool = match options.cores.get(..options.threads) {
        Some(cores) => Pool::on_cores(cores, options.spin),
        None => Pool::new(options.threads, options.spin),
    };
    let matrices = pack(&mut pool, &unpacked, n_vector_bytes as u64, total, progress)?;
    if progress(total, total).is_break() {
        return Err(LoadError::Stopped);
    }
    let rope = program.ops.iter().find_map(|op| match op {
        Op::RopeKv { rope, .. } => Some(*rope),
        _ => None,
    });
    let next = next_matrices(&program.ops);
    let weights = Weights { rope, index, next, matrices, vectors, program };
    let isa = Isa::detect();
    Ok(Cpu { weights: Arc::new(weights), options: options.clone(), isa, pool })
}

/// For [`Weights::next`].
fn next_matrices(ops: &[Op]) -> Vec<Option<WeightId>> {
    let mut next = ops.iter().find_map(Op::first_matrix);
    let behind = ops.iter().rev().map(|op| {
        let first = op.first_matrix()?;
        next.replace(first)
    });
    let mut next: Vec<_> = behind.collect();
    next.reverse();
    next
}

/// Packs slices, each looked over for what is not finite while it is read.
fn pack(
    pool: &mut Pool,
    slices: &[&Slice<'_>],
    done: u64,
    total: u64,
    progress: &mut Progress<'_>,
) -> Result<Vec<Matrix>, LoadError> {
    let done = AtomicU64::new(done);
    let progress = Mutex::new(progress);
    let fault = OnceLock::new();
    let admit = |thread, matrix: usize, rows: Range<usize>| {
        let slice = slices[matrix];
        let bytes = slice.row_bytes() * rows.len();
        if let Err(error) = slice.check_finite(rows) {
            let _ = fault.set(error); // one is enough
            return ControlFlow::Break(());
        }
        let done = done.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        // One voice; the others' bytes are in what it says next.
        if thread > 0 {
            return ControlFlow::Continue(());
        }
        let mut progress = progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress(done, total)
    };
    let unpacked: Vec<_> = slices.iter().map(|slice| unpacked(slice)).collect();
    let packed = pack_all(pool, &unpacked, &admit);
    match (packed, fault.into_inner()) {
        (_, Some(fault)) => Err(fault.into()),
        (Ok(Some(matrices)), None) => Ok(matrices),
        (Ok(None), None) => Err(LoadError::Stopped),
        (Err(error), None) => {
            Err(LoadError::Device { reason: format!("no memory for weights: {error}") })
        }
    }
}

fn unpacked<'a>(slice: &'a Slice<'_>) -> Unpacked<'a> {
    Unpacked { rows: slice.rows, columns: slice.columns, source: slice }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::program::Projection;

    #[test]
    fn after_each_product_comes_the_next_and_after_the_last_the_first() {
        let (buffer, [a, b, c]) = (BufferId(0), [0, 1, 2].map(WeightId));
        let projections = [a, b].map(|weight| Projection { weight, out: buffer }).to_vec();
        let ops = [
            Op::Embed { table: c, out: buffer },
            Op::Linear { input: buffer, projections },
            Op::SiluGate { gate: buffer, up: buffer, out: buffer },
            Op::Head { input: buffer, weight: c },
        ];
        assert_eq!(next_matrices(&ops), [None, Some(c), None, Some(a)]);
        assert_eq!(next_matrices(&ops[..1]), [None]);
    }
}

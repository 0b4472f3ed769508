//! Ops on rows: sums of parts, rows by number, the likeliest tokens.

use super::launch::{Arguments, Geometry, Kernel};
use super::memory::{Buffer, Number};
use super::{Device, Error, kernels};
use crate::peaks::{STRETCH, n_peaks};

/// `out` = the sum of `parts`, `[n_parts, n]`, in order; zeros if there are none.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If there are not so many numbers.
pub fn add_parts(
    parts: &Buffer<f32>,
    n_parts: usize,
    out: &Buffer<f32>,
    n: usize,
) -> Result<(), Error> {
    assert!(parts.len() >= n_parts * n && out.len() >= n);
    let arguments = Arguments::new().memory(parts).memory(out).number(n).number(n_parts);
    let geometry = Geometry::new(n.div_ceil(kernels::ROW_THREADS), 1, 1);
    // SAFETY: the kernel stops at n, within the lengths asserted.
    unsafe { launch(out.device(), kernels::ADD_PARTS, geometry, arguments) }
}

/// Logits of a row that one block looks at.
const CANDIDATES: usize = 2048;

/// Numbers that [`likeliest`] keeps of a row on its way.
#[must_use]
pub const fn candidates_len(columns: usize) -> usize {
    2 * columns.div_ceil(CANDIDATES)
}

/// Of each row of logits `[n_rows, columns]` the largest and the bits of its index, of equals the
/// lowest; if one is not finite, the first such. `candidates`: `[n_rows, candidates_len]`; `out`:
/// `[n_rows, 2]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree, or there are no columns.
pub fn likeliest(
    logits: &Buffer<f32>,
    columns: usize,
    candidates: &Buffer<f32>,
    out: &Buffer<f32>,
    n_rows: usize,
) -> Result<(), Error> {
    assert!(columns > 0 && logits.len() >= n_rows * columns && out.len() >= 2 * n_rows);
    assert!(candidates.len() >= n_rows * candidates_len(columns));
    let arguments = Arguments::new().memory(logits).memory(candidates).number(columns);
    let n = columns.div_ceil(CANDIDATES);
    let geometry = Geometry::new(n, n_rows, 1).shared_floats(2 * kernels::ROW_THREADS / 32);
    // SAFETY: a block a stretch of a row, within the lengths asserted; two words of shared memory a
    // warp.
    unsafe { launch(out.device(), kernels::CANDIDATES, geometry, arguments) }?;
    let arguments = Arguments::new().memory(candidates).memory(out).number(n);
    // SAFETY: a warp a row, within the lengths asserted.
    unsafe { launch(out.device(), kernels::LIKELIEST, Geometry::new(n_rows, 1, 1), arguments) }
}

/// The peaks (`crate::peaks`) of each row of logits. `out`: `[n_rows, n_peaks(columns)]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree.
pub fn peaks(
    logits: &Buffer<f32>,
    columns: usize,
    out: &Buffer<f32>,
    n_rows: usize,
) -> Result<(), Error> {
    assert!(logits.len() >= n_rows * columns && out.len() >= n_rows * n_peaks(columns));
    let arguments = Arguments::new().memory(logits).memory(out).number(columns);
    let geometry = Geometry::new(columns.div_ceil(STRETCH), n_rows, 1);
    // SAFETY: a warp for each stretch of each row, within the lengths asserted.
    unsafe { launch(out.device(), kernels::PEAKS, geometry, arguments) }
}

/// Launches, unless the grid is empty.
///
/// # Safety
/// The arguments are what the kernel takes, and its threads stay within their memory.
pub(super) unsafe fn launch(
    device: &Device,
    kernel: Kernel,
    geometry: Geometry,
    mut arguments: Arguments,
) -> Result<(), Error> {
    if geometry.is_empty() {
        return Ok(());
    }
    // SAFETY: the caller's promise.
    unsafe { device.driver().launch(kernel, geometry, &mut arguments) }
}

/// Panics unless all lie on one device.
pub(super) fn assert_together<T: Number, U: Number>(one: &Buffer<T>, other: &Buffer<U>) {
    assert!(one.device().is(other.device()), "buffers of two devices in one op");
}

//! Mixtures of experts on a device: as `crate::routing`, and the rows of an expert's tokens.

use super::launch::{Arguments, Geometry};
use super::memory::{Buffer, View};
use super::rows::{assert_together, launch};
use super::{Error, kernels};

/// The experts of each token and their weights, as [`crate::routing::route`] gives them. `logits`:
/// `[n_tokens, n]`; `routes`: `[n_tokens, 2 n_used]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree, or fewer experts exist than are used.
pub fn route(
    logits: &Buffer<f32>,
    n: usize,
    routes: &Buffer<f32>,
    n_used: usize,
    n_tokens: usize,
) -> Result<(), Error> {
    assert!(n_used <= n, "{n_used} of {n} experts");
    assert!(logits.len() >= n_tokens * n && routes.len() >= n_tokens * 2 * n_used);
    assert_together(logits, routes);
    let arguments = Arguments::new().memory(logits).memory(routes).number(n).number(n_used);
    let geometry = Geometry::new(n_tokens, 1, 1).shared_floats(n);
    // SAFETY: a warp a token, within the lengths asserted; a word of shared memory an expert.
    unsafe { launch(routes.device(), kernels::ROUTE_TOKENS, geometry, arguments) }
}

/// `to[i] = from[places[i] / n_used]`, rows of `columns`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If `to` has too few rows. Places are the caller's to keep within `from`.
pub fn gather(
    from: &Buffer<f32>,
    places: View<'_, u32>,
    n_used: usize,
    to: &Buffer<f32>,
    columns: usize,
) -> Result<(), Error> {
    assert!(to.len() >= places.len * columns && n_used > 0);
    assert_together(from, to);
    let arguments = Arguments::new().memory(from).view(places).memory(to);
    let arguments = arguments.number(n_used).number(columns);
    let geometry = Geometry::new(columns.div_ceil(kernels::ROW_THREADS), places.len, 1);
    // SAFETY: rows of `to` as asserted, and of `from` as the caller promises.
    unsafe { launch(to.device(), kernels::GATHER_ROWS, geometry, arguments) }
}

/// `to[part][places[i]] = from[part][i]`, rows of `columns`: `from` is `[n_parts, places, columns]`,
/// `to` is `[n_parts, n_to, columns]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree. Places are the caller's to keep below `n_to`.
pub fn scatter(
    from: &Buffer<f32>,
    n_parts: usize,
    places: View<'_, u32>,
    to: &Buffer<f32>,
    n_to: usize,
    columns: usize,
) -> Result<(), Error> {
    assert!(from.len() >= n_parts * places.len * columns && to.len() >= n_parts * n_to * columns);
    assert_together(from, to);
    let arguments = Arguments::new().memory(from).view(places).memory(to);
    let arguments = arguments.number(n_to).number(columns);
    let geometry = Geometry::new(columns.div_ceil(kernels::ROW_THREADS), places.len, n_parts);
    // SAFETY: rows of `from` as asserted, and of `to` as the caller promises.
    unsafe { launch(to.device(), kernels::SCATTER_ROWS, geometry, arguments) }
}

/// As [`crate::routing::combine`]: `outputs` is `[n_tokens, n_used, columns]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree.
pub fn combine(
    outputs: &Buffer<f32>,
    routes: &Buffer<f32>,
    n_used: usize,
    out: &Buffer<f32>,
    columns: usize,
    n_tokens: usize,
) -> Result<(), Error> {
    assert!(outputs.len() >= n_tokens * n_used * columns && out.len() >= n_tokens * columns);
    assert!(routes.len() >= n_tokens * 2 * n_used);
    assert_together(outputs, out);
    assert_together(routes, out);
    let arguments = Arguments::new().memory(outputs).memory(routes).memory(out);
    let arguments = arguments.number(n_used).number(columns);
    let geometry = Geometry::new(columns.div_ceil(kernels::ROW_THREADS), n_tokens, 1);
    // SAFETY: within the lengths asserted.
    unsafe { launch(out.device(), kernels::COMBINE_EXPERTS, geometry, arguments) }
}

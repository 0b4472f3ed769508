//! Activations as products take them (`cuda/activations.cu`), made by what computes them: once for
//! all weights that share them, without a pass of their own.

use super::launch::{Arguments, Geometry, Words};
use super::linear::{Route, route};
use super::matrix::{Matrix, STEP};
use super::memory::Buffer;
use super::rows::{assert_together, launch};
use super::{Device, Error, View, kernels};
use crate::quant::blocks::RUN;

/// Columns that share a scale.
pub(super) const STEP_COLUMNS: usize = STEP * RUN;
/// Tokens of a tensor core's tile.
pub(super) const TOKEN_TILE: usize = 8;
/// Columns that a block of threads makes at a time.
const MAKE_COLUMNS: usize = 4 * kernels::MAKE_THREADS;

/// Room for activations of a step.
#[derive(Debug)]
pub struct Activations {
    max_tokens: usize,
    max_columns: usize,
    pub(super) halves: Buffer<u16>, // [token][columns, padded to whole steps]
    pub(super) scales: Buffer<f32>, // [step][padded tokens]
    pub(super) totals: Buffer<u32>, // [half a run][padded tokens]
    pub(super) first: Buffer<u16>,  // [token][columns], bf16
    pub(super) second: Buffer<u16>, // the same: what `first` lost
    // Of a few tokens: [token][columns, padded to whole steps], two bytes each; [token][step]; [token][half a run]
    pub(super) bytes: Buffer<u16>,
    pub(super) byte_scales: Buffer<f32>,
    pub(super) byte_sums: Buffer<u32>,
}

impl Activations {
    /// For so many tokens of at most `columns`.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(device: &Device, max_tokens: usize, columns: usize) -> Result<Self, Error> {
        let padded = max_tokens.next_multiple_of(TOKEN_TILE);
        let (n, n_steps) = (padded * columns, columns.div_ceil(STEP_COLUMNS));
        let all = Self {
            max_tokens,
            max_columns: columns,
            halves: device.buffer(padded * n_steps * STEP_COLUMNS)?,
            scales: device.buffer(n_steps * padded)?,
            totals: device.buffer(n_steps * STEP_COLUMNS / RUN * 2 * padded)?,
            first: device.buffer(n)?,
            second: device.buffer(n)?,
            bytes: device.buffer(TOKEN_TILE * n_steps * STEP_COLUMNS)?,
            byte_scales: device.buffer(TOKEN_TILE * n_steps)?,
            byte_sums: device.buffer(TOKEN_TILE * n_steps * STEP_COLUMNS / RUN * 2)?,
        };
        // What lies beyond the columns of a last step meets weights of zero, so it must be a number.
        all.halves.clear()?;
        all.totals.clear()?;
        Ok(all)
    }
}

/// Which forms of activations somebody reads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forms {
    pub(super) bytes: bool,
    pub(super) halves: bool,
    pub(super) first: bool,
    pub(super) second: bool,
    pub(super) plain: bool,
}

impl Forms {
    /// Rows in f32, and nothing else.
    pub const PLAIN: Self =
        Self { bytes: false, halves: false, first: false, second: false, plain: true };

    /// Whether all of `others` are among these.
    pub(super) fn has(self, others: Self) -> bool {
        let list =
            |forms: Self| [forms.bytes, forms.halves, forms.first, forms.second, forms.plain];
        list(self).iter().zip(list(others)).all(|(&has, wants)| has || !wants)
    }

    /// Those that products of so many tokens with these weights read.
    #[must_use]
    pub fn read_by<'a>(
        matrices: impl IntoIterator<Item = &'a Matrix>,
        n_tokens: usize,
        device: &Device,
    ) -> Self {
        let mut forms = Self::default();
        for matrix in matrices {
            match route(matrix, n_tokens, device) {
                Route::Bytes(..) => forms.bytes = true,
                Route::Halves(..) => forms.halves = true,
                Route::Dense(..) => {
                    forms.first = true;
                    forms.second = true;
                }
                Route::Gemm => forms.first = true,
                Route::Plain(_) => forms.plain = true,
            }
        }
        forms
    }
}

/// Where activations go: `[n_tokens, columns]`.
#[derive(Debug, Clone, Copy)]
pub struct Making<'a> {
    pub activations: &'a Activations,
    pub forms: Forms,
    /// Written if the forms say so.
    pub plain: &'a Buffer<f32>,
    pub columns: usize,
    pub n_tokens: usize,
    /// What products make theirs of by themselves, instead of reading what was made.
    pub normed: Option<Normed<'a>>,
}

/// One token's `row / rms(row) * weight`.
#[derive(Debug, Clone, Copy)]
pub struct Normed<'a> {
    pub row: &'a Buffer<f32>,
    pub weight: &'a Buffer<f32>,
    pub eps: f32,
}

/// `Made` of the kernels.
pub(super) struct Made([u64; 10]);

impl Words for Made {
    fn words(&self) -> &[u64] {
        &self.0
    }
}

impl Making<'_> {
    /// The same, but for rows in f32: these are there.
    #[must_use]
    pub fn without_plain(self) -> Self {
        Self { forms: Forms { plain: false, ..self.forms }, ..self }
    }

    /// # Panics
    /// If there is no room, or columns are no whole runs.
    pub(super) fn made(&self) -> Made {
        let Self { activations, forms, plain, columns, n_tokens, .. } = *self;
        assert!(columns.is_multiple_of(RUN), "{columns} columns are no whole runs");
        assert!(n_tokens <= activations.max_tokens && columns <= activations.max_columns);
        assert!(!forms.plain || plain.len() >= n_tokens * columns, "plain rows too few");
        assert!(!forms.bytes || n_tokens <= TOKEN_TILE, "bytes of many tokens");
        let or_null = |is_read: bool, address: u64| if is_read { address } else { 0 };
        Made([
            or_null(forms.halves, activations.halves.address()),
            activations.scales.address(),
            activations.totals.address(),
            or_null(forms.first, activations.first.address()),
            or_null(forms.second, activations.second.address()),
            or_null(forms.plain, plain.address()),
            or_null(forms.bytes, activations.bytes.address()),
            activations.byte_scales.address(),
            activations.byte_sums.address(),
            columns as u64 | (n_tokens as u64) << 32,
        ])
    }

    fn grid(&self) -> Geometry {
        Geometry::new(self.columns.div_ceil(MAKE_COLUMNS), self.n_tokens, 1)
    }
}

/// Of rows in f32: those of `input` that `rows` names, or its first.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree. Rows that are named must be among `input`'s; that is the caller's to know.
pub fn plain(
    input: &Buffer<f32>,
    rows: Option<View<'_, u32>>,
    to: Making<'_>,
) -> Result<(), Error> {
    match rows {
        None => assert!(input.len() >= to.n_tokens * to.columns),
        Some(rows) => assert_eq!(rows.len, to.n_tokens),
    }
    assert_together(input, to.plain);
    let arguments = Arguments::new().memory(input).view_or_null(rows).structure(&to.made());
    // SAFETY: rows as asserted here and in `made`; threads beyond the columns write nothing.
    unsafe { launch(input.device(), kernels::MAKE_PLAIN, to.grid(), arguments) }
}

/// `residual += delta`, if there is one; then `residual / rms(residual) * weight`. All of
/// `[n_tokens, columns]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree.
pub fn rms_norm(
    residual: &Buffer<f32>,
    delta: Option<&Buffer<f32>>,
    weight: &Buffer<f32>,
    eps: f32,
    to: Making<'_>,
) -> Result<(), Error> {
    let n = to.n_tokens * to.columns;
    assert!(residual.len() >= n && delta.is_none_or(|delta| delta.len() >= n));
    assert_eq!(weight.len(), to.columns);
    let arguments = Arguments::new()
        .memory(residual)
        .memory_or_null(delta)
        .memory(weight)
        .structure(&to.made())
        .float(eps);
    let geometry = Geometry::new(to.n_tokens, 1, 1).shared_floats(kernels::NORM_THREADS / 32);
    // SAFETY: a block a row, within the lengths asserted; a float of shared memory for each warp.
    unsafe { launch(residual.device(), kernels::RMS_NORM, geometry, arguments) }
}

/// `silu(gate) * up`, both `[n_tokens, columns]`.
///
/// # Errors
/// The device failed.
///
/// # Panics
/// If shapes disagree.
pub fn silu_gate(gate: &Buffer<f32>, up: &Buffer<f32>, to: Making<'_>) -> Result<(), Error> {
    assert!(gate.len().min(up.len()) >= to.n_tokens * to.columns);
    let arguments = Arguments::new().memory(gate).memory(up).structure(&to.made());
    // SAFETY: as of `plain`.
    unsafe { launch(gate.device(), kernels::SILU_GATE, to.grid(), arguments) }
}
